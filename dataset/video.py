"""Records into clips and clips into batches.

A clip is a function of (seed, epoch, index) alone: not of the worker that makes it, their number or
what was drawn before. That is what makes a resumed run see what an undisturbed one would have.
"""

import os
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.decode import decode_frames
from dataset.index import VideoInfo
from dataset.records import VideoRecord
from dataset.sampling import clip_span_frames, every_start, random_start, spread_starts, window
from utils.stopping import leave_signals_to_the_main_process


class ClipChoice(NamedTuple):
    video: int  # index into the records
    start: int | None  # first frame; None: drawn anew each epoch


class VideoBatch(NamedTuple):
    clips: Tensor  # uint8 [B, T, 3, H, W]
    labels: Tensor  # int64 [B]
    videos: Tensor  # int64 [B], index into the data set's records


def random_clips(records: Sequence[VideoRecord]) -> list[ClipChoice]:
    """One clip a video with a random window: each video counts once an epoch."""
    return [ClipChoice(video, None) for video in range(len(records))]


def every_clip(infos: Sequence[VideoInfo], clip_frames: int, frame_stride: int, step_frames: int) -> list[ClipChoice]:
    """Every window of every video, `step_frames` apart: long videos count more, as published."""
    return [
        ClipChoice(video, start)
        for video, info in enumerate(infos)
        for start in every_start(info.frames, clip_frames, frame_stride, step_frames)
    ]


def spread_clips(infos: Sequence[VideoInfo], clip_frames: int, frame_stride: int, views: int) -> list[ClipChoice]:
    """`views` windows a video, evenly spread; one is the centred window."""
    return [
        ClipChoice(video, start)
        for video, info in enumerate(infos)
        for start in spread_starts(info.frames, clip_frames, frame_stride, views)
    ]


def count_looped(infos: Sequence[VideoInfo], clip_frames: int, frame_stride: int) -> int:
    """Videos shorter than a clip's span, which are looped."""
    return sum(info.frames < clip_span_frames(clip_frames, frame_stride) for info in infos)


class VideoDataset(Dataset):
    """Clips of `clip_frames` frames. Item (epoch, index) -> (uint8 [T, 3, H, W], label, video index).

    A file that can no longer be decoded raises VideoError.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        infos: Sequence[VideoInfo],
        clips: Sequence[ClipChoice],
        clip_frames: int,
        frame_stride: int,
        transform,
        seed: int,
    ):
        self.records = records
        self.clips = clips
        self._infos = infos
        self._clip_frames = clip_frames
        self._frame_stride = frame_stride
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        generator = random.Random(f"{self._seed}/{epoch}/{index}")
        video, start = self.clips[index]
        record, info = self.records[video], self._infos[video]
        if start is None:
            start = random_start(info.frames, self._clip_frames, self._frame_stride, generator)
        indices = window(start, info.frames, self._clip_frames, self._frame_stride)
        frames = decode_frames(record.path, indices, info.seek_points)  # uint8 [T, H, W, 3]
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, 3, H, W]
        # torchvision's transforms draw from the global generator; nobody else's state may move.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.getrandbits(63))
            clip = self._transform(clip)
        return clip, record.label, video


class EpochSampler(Sampler):
    """Yields (epoch, index), in an order that is a function of (seed, epoch), from position `start` on.

    `set_epoch` chooses both for the next pass. Unshuffled: 0, 1, 2, ...
    """

    def __init__(self, length: int, shuffle: bool, seed: int):
        self._length, self._shuffle, self._seed = length, shuffle, seed
        self._epoch = self._start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return max(0, self._length - self._start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(range(self._length))
        if self._shuffle:
            random.Random(f"order/{self._seed}/{self._epoch}").shuffle(order)
        return iter([(self._epoch, index) for index in order[self._start :]])


def fingerprint(loader: DataLoader) -> str:
    """A short name of the clips a loader goes through and their order before shuffling; the folder the
    videos are in does not count."""
    dataset = loader.dataset
    names = ["/".join(Path(dataset.records[clip.video].path).parts[-2:]) + f"@{clip.start}" for clip in dataset.clips]
    return f"{len(names)} clips, {zlib.crc32(os.fsencode(chr(10).join(names))):08x}"


def collate(samples: list[tuple[Tensor, int, int]]) -> VideoBatch:
    clips, labels, videos = zip(*samples, strict=True)
    # Stacked as they were decoded, colour last, and only seen as [B, T, 3, H, W]: no transposed copy
    # on the way to the device, where the network wants it channels-last again.
    stacked = torch.stack([clip.permute(0, 2, 3, 1) for clip in clips])  # [B, T, H, W, 3]
    return VideoBatch(stacked.permute(0, 1, 4, 2, 3), torch.tensor(labels), torch.tensor(videos))


def make_loader(
    dataset: VideoDataset, batch_size: int, workers: int, shuffle: bool, seed: int, pin: bool
) -> DataLoader:
    """A loader whose `sampler` is an `EpochSampler`; `pin` for copies to a GPU beside computation."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), shuffle, seed),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers > 0 else None,
        worker_init_fn=leave_signals_to_the_main_process,
    )
