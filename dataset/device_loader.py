"""Loaders whose batches arrive on the device, copied ahead of need and split into key and residual frames."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dataset.batch_sampler import EvalBatchSampler, TrainBatchSampler
from dataset.clips import VideoTable
from dataset.frame_sampling import FrameSampling
from dataset.residual import PADDED_CHANNELS, every_frame_a_key, key_residual_split
from dataset.video import VideoBatch, VideoDataset, collate, loaded, make_loader
from utils.errors import UserError
from utils.runtime import Runtime


class Batch(NamedTuple):
    """What the network and the criterion take."""

    key: Tensor  # [B, K, 3, H, W], normalised; in half precision on a GPU 5 channels of zeros follow
    residual: Tensor  # [B, K, stride-1, 3, H, W], likewise
    labels: Tensor  # int64 [B]
    videos: Tensor  # int64 [B], index into the table


class DeviceLoader:
    """Batches of a DataLoader on the device of `runtime`, for clips in segments of `stride` frames; with 1, every frame
    is a key frame. `minus` as for `dataset.residual.key_residual_split`.

    Iterating gives uint8 `VideoBatch`es; on a GPU the next one is copied while the present one is used. `split`
    makes a `Batch` of one just before the network takes it, because key and residual frames are up to four times
    as large.
    """

    def __init__(self, loader: DataLoader, stride: int, runtime: Runtime, minus: str = "key"):
        self._loader, self._stride, self._runtime, self._minus = loader, stride, runtime, minus
        self.batches = loader.batch_sampler
        self.videos: VideoTable = loader.dataset.videos

    @property
    def clips(self) -> int:
        """Clips in an epoch."""
        return len(self._loader.dataset)

    def __iter__(self) -> Iterator[VideoBatch]:
        return to_device(loaded(self._loader), self._runtime.device)

    def split(self, batch: VideoBatch) -> Batch:
        precision = self._runtime.precision
        channels = PADDED_CHANNELS if batch.clips.is_cuda and precision is not None else 3
        if self._stride == 1:
            key, residual = every_frame_a_key(batch.clips, precision, channels)
        else:
            key, residual = key_residual_split(batch.clips, self._stride, precision, self._minus, channels)
        return Batch(key, residual, batch.labels, batch.videos)

    def empty(self) -> VideoBatch:
        """A batch without a clip, on the device."""
        return next(to_device([collate([])], self._runtime.device))

    def sample(self) -> Batch:
        """A full training batch on the device, of one clip over and over: the first that can be read. Raises UserError
        if none can."""
        data = self._loader.dataset
        one = next((one for one in (collate([data[0, index]]) for index in range(len(data))) if len(one.labels)), None)
        if one is None:
            raise UserError("none of the training clips can be read")
        clips, *numbers = (tensor.expand(self.batches.batch_size, *tensor.shape[1:]) for tensor in one[:3])
        return self.split(next(to_device([VideoBatch(clips, *numbers, [])], self._runtime.device)))

    def first_clips(self, count: int) -> VideoBatch:
        """Clips of the first epoch, decoded in this process, for a picture. Videos that cannot be read are left
        out."""
        data = self._loader.dataset
        return collate([data[0, index] for index in range(min(count, len(data)))])


@dataclass(frozen=True)
class LoaderMaker:
    """What all loaders of a run have in common."""

    sampling: FrameSampling
    stride: int  # frames of a segment
    minus: str  # what residual frames are taken from: "key", "previous" or "none"
    batch_size: int  # clips a batch and rank
    workers: int  # data loading processes of each rank
    seed: int
    strict: bool
    runtime: Runtime

    def train(self, videos: VideoTable, clips: numpy.ndarray, transform: Callable[[Tensor], Tensor]) -> DeviceLoader:
        """The clips, shuffled anew each epoch."""
        batches = TrainBatchSampler(len(clips), self.batch_size, self.seed, self.runtime.rank, self.runtime.count)
        return self._loader(videos, clips, [transform], batches)

    def eval(
        self, videos: VideoTable, clips: numpy.ndarray, transforms: Sequence[Callable[[Tensor], Tensor]]
    ) -> DeviceLoader:
        """The clips in order. transforms: one for each crop."""
        batches = EvalBatchSampler(clips, self.batch_size, self.runtime.rank, self.runtime.count)
        return self._loader(videos, clips, transforms, batches)

    def _loader(self, videos: VideoTable, clips: numpy.ndarray, transforms: Sequence, batches: Sampler) -> DeviceLoader:
        data = VideoDataset(videos, clips, self.sampling, transforms, self.seed, self.strict)
        loader = make_loader(data, batches, self.workers, pin=self.runtime.device.type == "cuda")
        return DeviceLoader(loader, self.stride, self.runtime, self.minus)


def to_device(batches: Iterable[VideoBatch], device: torch.device) -> Iterator[VideoBatch]:
    """The batches on the device; on a GPU the next one is copied, as uint8, while the present one is used."""
    if device.type != "cuda":
        yield from batches
        return
    side, ahead = torch.cuda.Stream(device), None
    for batch in itertools.chain(batches, [None]):
        arrived = ahead
        if batch is not None:
            with torch.cuda.stream(side):
                copied = VideoBatch(*(tensor.to(device, non_blocking=True) for tensor in batch[:3]), batch.failed)
                ahead = copied, side.record_event()
        if arrived is not None:
            copied, done = arrived
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            for tensor in copied[:3]:
                tensor.record_stream(stream)  # the side stream must not reuse it while this stream reads it
            yield copied
