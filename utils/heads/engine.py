"""One epoch of training, and testing, of a head on sequences. utils/heads/fit.py calls both."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.neurons import rate_counterpart
from utils.errors import UserError
from utils.progress import Progress

_STEPS_BETWEEN_CHECKS = 10  # of the loss: on a GPU each check waits for the step


@contextlib.contextmanager
def neurons_of(head: nn.Module, train_mode: str) -> Iterator[None]:
    """A context in which `head` has the neurons that it trains with. train_mode "spiking": its own neurons; "rate":
    their rate-based counterparts, as in the original pipeline. A head is always tested with its own neurons."""
    own = head.neuron
    if train_mode == "rate" and own is not None:
        head.neuron = rate_counterpart(own)
    try:
        yield
    finally:
        head.neuron = own


def sequence_loss(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Cross-entropy of logits [T, B, classes]. loss "last": at the last step; "every": the mean over all steps."""
    if loss == "last":
        return F.cross_entropy(logits[-1], labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


def train_epoch(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    task: str,
    steps: int,
    loss: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Train for one epoch.

    network: inputs -> logits [T, B, classes].
    batches: minibatches (inputs, labels int64 [B]) on the network's device.
    task: name of the epoch, for messages.
    steps: number of minibatches, for the progress bar.
    loss: as for `sequence_loss`.
    should_stop: called before each step; the epoch is left unfinished if it returns True.

    Returns {"train_loss", "train_last_step"}, the latter an accuracy in percent; None if the epoch was stopped.
    Raises UserError if the loss is not finite.
    """
    network.train()
    sums = 0  # of loss, correct, clips
    with Progress(steps, task, "minibatch") as progress:
        for done, (inputs, labels) in enumerate(batches, start=1):
            if should_stop():
                return None
            logits = network(inputs)
            value = sequence_loss(logits, labels, loss)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            correct = (logits[-1].argmax(-1) == labels).sum().double()
            count = torch.full_like(correct, len(labels))
            sums = sums + torch.stack([value.detach().double() * count, correct, count])
            progress.advance()
            if done % _STEPS_BETWEEN_CHECKS == 0 and not sums[0].isfinite():
                break
    total, correct, clips = sums.tolist()
    if not math.isfinite(total):
        raise UserError(f"{task}: the loss became {total}; take a smaller learning_rate")
    return {"train_loss": total / clips, "train_last_step": 100 * correct / clips}


@torch.no_grad()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], videos: Tensor) -> dict:
    """Test with the neurons that the head has.

    batches: minibatches (inputs, labels) of all clips in order. videos: int64 [clips], the video of each clip.

    Returns accuracies in percent: "per_step", a list over time; "last_step"; "video", from the mean of the softmax
    of the last step over a video's clips. Also "loss", the mean over the clips at the last step, and "counts".
    """
    network.eval()
    correct = loss = 0
    probabilities, labels = [], []
    for inputs, wanted in batches:
        logits = network(inputs)
        correct = correct + (logits.argmax(-1) == wanted).sum(1)  # [T]
        loss = loss + F.cross_entropy(logits[-1], wanted, reduction="sum").double()
        probabilities.append(logits[-1].softmax(-1))
        labels.append(wanted)
    probabilities, labels = torch.cat(probabilities), torch.cat(labels)
    _, video = torch.unique(videos.to(labels.device), return_inverse=True)
    count = int(video.max()) + 1
    summed = probabilities.new_zeros(count, probabilities.shape[1]).index_add_(0, video, probabilities)
    right = summed.argmax(-1) == labels.new_zeros(count).index_copy_(0, video, labels)
    per_step = (100 * correct.double() / len(labels)).tolist()
    return {
        "loss": float(loss) / len(labels), "per_step": per_step, "last_step": per_step[-1],
        "video": 100 * right.double().mean().item(), "counts": {"clips": len(labels), "videos": count},
    }  # fmt: skip
