"""Delayed recall: does a head remember what it was shown, and does it still remember when its neurons spike?

    python -m benchmarks.memory_task --seeds 1 2 3

A symbol (one of 8) is shown for 4 steps, then noise follows for 24 steps; the class is the symbol. The symbol is
shown without noise, so the best possible accuracy is 100 %; chance is 12.5 %. Three heads of the same size are
compared: the rate-based LMU; the spiking LMU trained through its spikes; the spiking LMU trained with rates and
tested with spikes, as in the original pipeline.
"""

import argparse
import json
import statistics

import torch
from torch import Tensor

from models.heads.lmu import LMUHead
from models.heads.neurons import SpikingRectifiedLinear
from utils.heads.batches import minibatches
from utils.heads.engine import evaluate, neurons_of, train_epoch

SYMBOLS, STEPS, SHOWN = 8, 28, 4
NOISE = 0.5  # standard deviation of each input after the symbol
TRAINING, TESTING = 2000, 1000
HEADS = {
    "LMU": (None, "spiking"),
    "spiking LMU, trained through spikes": (SpikingRectifiedLinear(), "spiking"),
    "spiking LMU, trained with rates": (SpikingRectifiedLinear(), "rate"),
}


def delayed_recall(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(inputs [STEPS, count, SYMBOLS], labels [count])."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(SYMBOLS, (count,), generator=generator)
    inputs = NOISE * torch.randn(STEPS, count, SYMBOLS, generator=generator)
    inputs[:SHOWN] = torch.nn.functional.one_hot(labels, SYMBOLS).float()
    return inputs, labels


def trained(head: str, seed: int, epochs: int) -> dict[str, float]:
    """Accuracies at the last step, in percent: {"train", "test"}."""
    torch.manual_seed(seed)
    neuron, mode = HEADS[head]
    model = LMUHead(SYMBOLS, SYMBOLS, units=64, order=6, theta=STEPS, memory=4, neuron=neuron)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    inputs, labels = delayed_recall(TRAINING, 100 + seed)
    result = {}
    for epoch in range(epochs):
        order = minibatches(TRAINING, 100, seed, epoch)
        batches = ((inputs[:, batch], labels[batch]) for batch in order)
        with neurons_of(model, mode):
            result = train_epoch(model, batches, optimizer, task=f"epoch {epoch + 1}", steps=len(order), loss="last")
    inputs, labels = delayed_recall(TESTING, 200 + seed)
    tested = evaluate(model, [(inputs, labels)], torch.arange(TESTING))
    return {"train": result["train_last_step"], "test": tested["last_step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    figures = []
    for head in HEADS:
        for seed in args.seeds:
            figures.append({"head": head, "seed": seed, **trained(head, seed, args.epochs)})
        own = [figure for figure in figures if figure["head"] == head]
        tests = [figure["test"] for figure in own]
        print(
            f"{head:38s} training {statistics.mean(figure['train'] for figure in own):5.1f} %   "
            f"testing {statistics.mean(tests):5.1f} % ({', '.join(f'{value:.1f}' for value in tests)})",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "torch": torch.__version__, "figures": figures}, file, indent=2)


if __name__ == "__main__":
    main()
