"""Sums and counts, kept on the device and read at the end; losses, read now and then."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset.clips import VideoTable
from utils.errors import OtherProcessError, UserError
from utils.runtime import ALONE, Runtime

# Reading a loss waits for the GPU. There, losses are read once in so many batches.
_BATCHES_BETWEEN_READINGS = 10


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN."""


class ClipScores:
    """Loss and top-1/top-5 accuracy over clips. The sums are float64, so that a checkpoint in mid-epoch can store
    them and the resumed epoch ends with the same totals."""

    def __init__(self, device: torch.device, sums: Tensor | None = None):
        # loss sum, top-1 hits, top-5 hits, clips
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        if sums is not None:
            self.sums += sums.to(device)

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """logits [B, classes], labels [B], loss the mean over the B clips."""
        hits = _hits(logits, labels)
        self.sums[0] += loss.detach().double() * len(labels)
        self.sums[1] += hits[:, 0].sum()
        self.sums[2] += hits.sum()
        self.sums[3] += len(labels)

    @staticmethod
    def result(sums: Tensor) -> dict[str, float]:
        """From `sums`, of one rank or added up over ranks: the mean loss, "top1" and "top5" accuracy in percent (all
        NaN without a clip), and the integers "top1_hits", "top5_hits" and "clips"."""
        loss, *counts = sums.tolist()
        return {"loss": loss / (counts[2] or math.nan), **_accuracy(*counts, of="clips")}


class VideoScores:
    """Top-1/top-5 accuracy over videos: the softmax of a video's clips is averaged."""

    def __init__(self, videos: int, device: torch.device):
        self._probabilities: Tensor | None = None  # [videos, classes], from the first batch on
        self._labels = torch.full((videos,), -1, dtype=torch.long, device=device)

    def add(self, logits: Tensor, labels: Tensor, videos: Tensor) -> None:
        """logits [B, classes], labels [B], videos [B]: index of each clip's video."""
        if self._probabilities is None:
            self._probabilities = self._labels.new_zeros((len(self._labels), logits.shape[1]), dtype=torch.float64)
        # The sum ranks as the mean does: every video has the same number of views.
        self._probabilities.index_add_(0, videos, logits.detach().double().softmax(1))
        self._labels[videos] = labels

    def sums(self) -> Tensor:
        """float64 [3]: top-1 hits, top-5 hits, videos that had a clip."""
        seen = self._labels >= 0
        if self._probabilities is None:
            return torch.zeros(3, dtype=torch.float64, device=seen.device)
        hits = _hits(self._probabilities[seen], self._labels[seen]).double()
        return torch.stack([hits[:, 0].sum(), hits.sum(), seen.double().sum()])

    def of_all_ranks(self, runtime: Runtime, classes: int) -> tuple[Tensor, Tensor]:
        """(labels int64 [videos], mean probabilities float64 [videos, classes]) on the CPU; -1 and NaN for a video
        without a clip. All ranks call it."""
        own = self._probabilities
        sums = self._labels.new_zeros((len(self._labels), classes), dtype=torch.float64) if own is None else own
        sums = runtime.sum(sums).cpu()  # a video has clips in one rank only
        return runtime.sum(self._labels + 1).cpu() - 1, sums / sums.sum(1, keepdim=True)

    @staticmethod
    def result(sums: Tensor) -> dict[str, float]:
        """From `sums`: as `ClipScores.result`, without a loss and with "videos" in place of "clips"."""
        return _accuracy(*sums.tolist(), of="videos")


def _accuracy(top1: float, top5: float, count: float, of: str) -> dict[str, float]:
    return {
        "top1": 100 * top1 / (count or math.nan), "top5": 100 * top5 / (count or math.nan),
        "top1_hits": int(top1), "top5_hits": int(top5), of: int(count),
    }  # fmt: skip


def _hits(scores: Tensor, labels: Tensor) -> Tensor:
    """[B, min(5, classes)] booleans: whether the label is the k-th best."""
    best = scores.detach().topk(min(5, scores.shape[1]), dim=1).indices
    return best == labels[:, None]


class FiringRates:
    """Mean firing rate of a ReSpike's LIF layers over every forward inside the `with` block.

    A rate is spikes per neuron and time step, 0 to 1.
    """

    def __init__(self, model: nn.Module):
        self._stages = model.lif_layers()
        self._layers = [layer for layers in self._stages.values() for layer in layers]

    def __enter__(self) -> "FiringRates":
        for layer in self._layers:
            layer.spike_sum.zero_()
            layer.neuron_steps.zero_()
            layer.count_spikes = True
        return self

    def __exit__(self, *exc_info) -> None:
        for layer in self._layers:
            layer.count_spikes = False

    def sums(self) -> Tensor:
        """float64 [layers, 2]: spikes, and neurons times time steps."""
        sums = [torch.stack([layer.spike_sum, layer.neuron_steps]) for layer in self._layers]
        return torch.stack(sums) if sums else torch.zeros(0, 2, dtype=torch.float64)

    def per_layer(self) -> list[float]:
        return [spikes / steps for spikes, steps in self.sums().tolist()]

    def per_stage(self, sums: Tensor | None = None) -> dict[str, float]:
        """All spikes of a stage over all its neurons and steps: {"stage1": 0.12, ...}. `sums` may have been added up
        over ranks; None takes this rank's."""
        parts = (self.sums() if sums is None else sums).split([len(layers) for layers in self._stages.values()])
        totals = {stage: part.sum(0).tolist() for stage, part in zip(self._stages, parts, strict=True)}
        return {stage: spikes / (steps or math.nan) for stage, (spikes, steps) in totals.items()}


def learned_by_neurons(model: nn.Module) -> dict[str, dict[str, float]]:
    """What the neurons of a ReSpike have learned, the mean over the layers of a stage: {"neuron_tau": {"stage1": 1.4,
    ...}}. Empty if they learn nothing, as LIF."""
    found: dict[str, dict[str, float]] = {}
    for stage, layers in model.lif_layers().items():
        learned = [layer.learned() for layer in layers]
        for name in learned[0] if learned else ():
            found.setdefault(f"neuron_{name}", {})[stage] = sum(each[name] for each in learned) / len(learned)
    return found


class LossWatch:
    """Reads losses now and then, stops all ranks if one is not finite, and names the videos of that batch."""

    def __init__(self, videos: VideoTable, runtime: Runtime):
        self._videos, self._runtime = videos, runtime
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._most_unread = 1 if runtime.device.type == "cpu" else _BATCHES_BETWEEN_READINGS
        self.latest = "-"  # the latest loss that was read, for the progress bar

    def add(self, loss: Tensor, videos: Tensor) -> None:
        self._unread.append((loss.detach(), videos))

    def check_now_and_then(self) -> None:
        if len(self._unread) >= self._most_unread:
            self.check()

    def check(self) -> None:
        """Read all losses. Raises NonFiniteLossError if one is not finite, OtherProcessError if one of another rank
        is not. All ranks call it."""
        losses = torch.stack([loss for loss, _ in self._unread]).tolist() if self._unread else []
        wrong = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if any(self._runtime.add(wrong is not None)):
            if wrong is None:
                raise OtherProcessError
            names = ", ".join(self._videos.path(video) for video in self._unread[wrong][1].tolist())
            raise NonFiniteLossError(f"the loss became {losses[wrong]}; videos of that batch: {names}")
        if losses:
            self.latest = f"{losses[-1]:.4f}"
        self._unread.clear()


class StepLog:
    """Curves within an epoch: scalars every `every` optimizer steps; 0 writes none. `write` takes them in rank 0.

    sums: of `ClipScores` where the epoch's training begins, if it begins in the middle.
    """

    def __init__(
        self,
        every: int = 0,
        write: Callable[[dict[str, float]], None] = lambda values: None,
        runtime: Runtime = ALONE,
        sums: Tensor | None = None,
    ):
        self._every, self._write, self._runtime = every, write, runtime
        self._before = 0.0 if sums is None else sums
        self._steps = 0

    def step(self, scores: ClipScores, **values: float | Tensor) -> None:
        """After an optimizer step, in all ranks. Writes the training loss and accuracy since the last line, and
        `values` as they are in rank 0. A tensor is read only if a line is due, because reading it waits for the GPU."""
        self._steps += 1
        if not self._every or self._steps % self._every:
            return
        recent = ClipScores.result(self._runtime.sum(scores.sums - self._before))
        self._before = scores.sums.clone()
        self._runtime.from_main(
            self._write_line, {"train_loss": recent["loss"], "train_clip_top1": recent["top1"]}, values
        )

    def _write_line(self, recent: dict[str, float], values: dict[str, float | Tensor]) -> None:
        self._write(recent | {name: float(value) for name, value in values.items()})
