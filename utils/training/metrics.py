"""Sums and counts, kept on the device and read at the end."""

import math

import torch
from torch import Tensor, nn


class ClipScores:
    """Loss and top-1/top-5 accuracy over clips. All in float64 sums: a partial state is a checkpoint's
    to keep, and adding the rest gives what an undisturbed pass gives."""

    def __init__(self, device: torch.device, state: list[float] | None = None):
        # loss sum, top-1 hits, top-5 hits, clips
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        if state is not None:
            self.sums += torch.tensor(state, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """logits [B, classes], labels [B], loss the mean over the B clips."""
        hits = _hits(logits, labels)
        self.sums[0] += loss.detach().double() * len(labels)
        self.sums[1] += hits[:, 0].sum()
        self.sums[2] += hits.sum()
        self.sums[3] += len(labels)

    @staticmethod
    def result(sums: Tensor) -> dict[str, float]:
        """Of `sums`, which may have been added up over processes: mean loss; top-1 and top-5 accuracy in
        percent; NaN without a clip."""
        loss, top1, top5, clips = sums.tolist()
        clips = clips or math.nan
        return {"loss": loss / clips, "top1": 100 * top1 / clips, "top5": 100 * top5 / clips}


class VideoScores:
    """Top-1/top-5 accuracy over videos: the softmax of a video's clips is averaged."""

    def __init__(self, videos: int, classes: int, device: torch.device):
        self._probabilities = torch.zeros(videos, classes, dtype=torch.float64, device=device)
        self._labels = torch.full((videos,), -1, dtype=torch.long, device=device)

    def add(self, logits: Tensor, labels: Tensor, videos: Tensor) -> None:
        """logits [B, classes], labels [B], videos [B]: index of each clip's video."""
        # The sum ranks as the mean does: every video has the same number of views.
        self._probabilities.index_add_(0, videos, logits.detach().double().softmax(1))
        self._labels[videos] = labels

    def sums(self) -> Tensor:
        """float64 [3]: top-1 hits, top-5 hits, videos that had a clip."""
        seen = self._labels >= 0
        hits = _hits(self._probabilities[seen], self._labels[seen]).double()
        return torch.stack([hits[:, 0].sum(), hits.sum(), seen.double().sum()])

    @staticmethod
    def result(sums: Tensor) -> dict[str, float]:
        """Of `sums`: accuracies in percent, NaN without a video, and the number of videos."""
        top1, top5, videos = sums.tolist()
        return {
            "top1": 100 * top1 / (videos or math.nan),
            "top5": 100 * top5 / (videos or math.nan),
            "videos": int(videos),
        }


def _hits(scores: Tensor, labels: Tensor) -> Tensor:
    """[B, min(5, classes)] booleans: whether the label is the k-th best."""
    best = scores.detach().topk(min(5, scores.shape[1]), dim=1).indices
    return best == labels[:, None]


class FiringRates:
    """Mean firing rate of a ReSpike's LIF layers over every forward inside the `with` block.

    A rate is spikes per neuron and time step, 0 to 1.
    """

    def __init__(self, model: nn.Module):
        self._layers = model.lif_layers()

    def __enter__(self) -> "FiringRates":
        for layers in self._layers.values():
            for layer in layers:
                layer.spike_sum.zero_()
                layer.neuron_steps.zero_()
                layer.count_spikes = True
        return self

    def __exit__(self, *exc_info) -> None:
        for layers in self._layers.values():
            for layer in layers:
                layer.count_spikes = False

    def sums(self) -> Tensor:
        """float64 [layers, 2]: spikes, and neurons times time steps."""
        layers = [layer for layers in self._layers.values() for layer in layers]
        if not layers:
            return torch.zeros(0, 2, dtype=torch.float64)
        return torch.stack([torch.stack([layer.spike_sum, layer.neuron_steps]) for layer in layers])

    def per_layer(self) -> list[float]:
        return [spikes / steps for spikes, steps in self.sums().tolist()]

    def per_stage(self, sums: Tensor | None = None) -> dict[str, float]:
        """All spikes of a stage over all its neurons and steps: {"stage1": 0.12, ...}; of `sums`, which may
        have been added up over processes, or of this one's."""
        parts = (self.sums() if sums is None else sums).split([len(layers) for layers in self._layers.values()])
        totals = {stage: part.sum(0).tolist() for stage, part in zip(self._layers, parts, strict=True)}
        return {stage: spikes / (steps or math.nan) for stage, (spikes, steps) in totals.items()}
