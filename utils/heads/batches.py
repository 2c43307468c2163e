"""Minibatches for a head: of cached features, or of clips if the CNN is trained along."""

import random
from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from dataset.clips import VideoTable, eval_clips
from dataset.frame_sampling import FrameSampling
from dataset.residual import normalised
from dataset.video import loaded
from utils.heads.config import DataloaderConfig
from utils.heads.features import Features, eval_loader


def minibatches(count: int, size: int, seed: int, epoch: int | None) -> list[list[int]]:
    """Indices of each minibatch: shuffled by (seed, epoch), or in order if epoch is None."""
    order = list(range(count))
    if epoch is not None:
        random.Random(f"sequences/{seed}/{epoch}").shuffle(order)
    return [order[start : start + size] for start in range(0, count, size)]


class _Batches:
    """Iterating gives all clips in order, `shuffled(epoch)` gives them in the order of that epoch: (inputs, labels
    int64 [B]) on `device`. A subclass has `_load(batches)`, which loads the minibatches of these indices.

    videos: int64 [clips], the video of each clip.
    size: clips in a minibatch.
    seed: of the order.
    """

    def __init__(self, videos: numpy.ndarray, size: int, seed: int, device: torch.device):
        self.videos = torch.from_numpy(videos)
        self._size, self._seed, self._device = size, seed, device

    def __len__(self) -> int:
        return -(-len(self.videos) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.shuffled(None)

    def shuffled(self, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        return self._load(minibatches(len(self.videos), self._size, self._seed, epoch))


class FeatureBatches(_Batches):
    """inputs: features [T, B, width]."""

    def __init__(self, features: Features, size: int, seed: int, device: torch.device):
        super().__init__(features.videos, size, seed, device)
        self._features = features

    def _load(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            clips = torch.from_numpy(self._features.data[batch]).transpose(0, 1)  # [T, B, width], a copy
            labels = torch.from_numpy(self._features.labels[batch])
            yield clips.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


class ClipBatches(_Batches):
    """inputs: normalised clips float32 [B, T, 3, size, size], the evaluation clips of the videos.

    sampling: which frames make a clip.
    loading: frame size and workers.

    Iterating raises UserError if a video cannot be decoded.
    """

    def __init__(
        self, videos: VideoTable, sampling: FrameSampling, loading: DataloaderConfig, size: int, seed: int,
        device: torch.device,
    ):  # fmt: skip
        self._clips = eval_clips(videos, sampling)
        super().__init__(self._clips["video"], size, seed, device)
        self._table, self._sampling, self._loading = videos, sampling, loading

    def _load(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        keys = [[(0, clip) for clip in batch] for batch in batches]
        source = (self._table, self._clips, self._sampling, self._loading)
        for batch in loaded(eval_loader(*source, keys, self._device, strict=True)):
            clips = batch.clips.to(self._device, non_blocking=True)  # uint8: a quarter of the bytes
            frames = normalised(clips.flatten(0, 1))
            yield frames.unflatten(0, clips.shape[:2]), batch.labels.to(self._device, non_blocking=True)
