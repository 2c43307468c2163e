"""The feature pipeline's heads: the ensemble array at its published size, and the LMU's parallel form.

    python -m benchmarks.bench_heads ensemble_array       # 10,000 x 50 neurons, 28 frames, minibatch 100
    python -m benchmarks.bench_heads lmu                  # parallel against step by step, T 28 and 256

The ensemble array: prints the seconds of a training step (forward, backward, Adam) and of a test pass over one
minibatch, and the process's peak memory. The LMU: both forms take turns on the same input. Prints the median of
their ratio over the rounds, and the largest difference of their outputs and gradients.
"""

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.bench_step import describe
from models.heads.ensemble_array import EnsembleArray
from models.heads.lmu import LMU

FRAMES, MINIBATCH, FEATURES, CLASSES = 28, 100, 512, 101


def ensemble_array(rounds: int) -> None:
    torch.manual_seed(0)
    before = peak_gib()
    head = EnsembleArray(FEATURES, CLASSES)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    features, labels = torch.randn(FRAMES, MINIBATCH, FEATURES), torch.randint(CLASSES, (MINIBATCH,))
    for number in range(rounds):
        start = time.perf_counter()
        loss = F.cross_entropy(head(features)[-1], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained = time.perf_counter()
        with torch.no_grad():
            head(features)
        tested = time.perf_counter()
        print(
            f"round {number + 1}: training step {trained - start:.1f} s, test pass {tested - trained:.1f} s; "
            f"peak memory of the process {peak_gib():.2f} GiB (before: {before:.2f})",
            flush=True,
        )


def lmu(rounds: int) -> None:
    for steps in (28, 256):
        torch.manual_seed(0)
        layer = LMU(512, 800, 2, float(steps), feedback=False, recurrent=False)
        x = torch.randn(steps, 32, 512)
        weights = torch.randn(steps, 32, 800)
        ratios, seconds, results = [], {True: [], False: []}, {}
        for number in range(rounds + 1):
            for parallel in (True, False):
                layer.parallel = parallel
                start = time.perf_counter()
                out = layer(x)
                gradients = torch.autograd.grad((out * weights).sum(), list(layer.parameters()))
                elapsed = time.perf_counter() - start
                results[parallel] = [out.detach(), *gradients]
                if number:
                    seconds[parallel].append(elapsed)
            if number:
                ratios.append(seconds[False][-1] / seconds[True][-1])
        difference = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results[True], results[False], strict=True)
        )
        print(
            f"T {steps}: step by step {1e3 * statistics.median(seconds[False]):.0f} ms, parallel "
            f"{1e3 * statistics.median(seconds[True]):.0f} ms: {statistics.median(ratios):.2f}x as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f}); largest relative difference {difference:.1e} (float32)",
            flush=True,
        )


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ensemble_array", "lmu"))
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    print(f"{describe(torch.device('cpu'))}; torch {torch.__version__}")
    ensemble_array(args.rounds or 2) if args.what == "ensemble_array" else lmu(args.rounds or 7)
