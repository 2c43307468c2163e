"""Clips out of videos, and clips into batches.

A clip is a function of (seed, epoch, index) alone: not of the worker that makes it, their number or
what was drawn before. That is what makes a resumed run see what an undisturbed one would have.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from dataset.clips import NO_VIDEO, RANDOM_PLACE, VideoTable
from dataset.decode import VideoError, decode_frames
from utils.signals import leave_signals_to_the_main_process

# A file that cannot be read now may be readable again after a network drive's hiccup.
RETRY_SECONDS = (1.0, 5.0)
# After so many in a row it is no hiccup, and waiting would keep the run from noticing.
_WORTH_WAITING_IN_A_ROW = 2


class FailedVideo(NamedTuple):
    video: int  # index into the table; NO_VIDEO where it was known to be gone
    error: str  # one line


class VideoBatch(NamedTuple):
    clips: Tensor  # uint8 [B, T, 3, H, W]; B may be smaller than asked for, even 0
    labels: Tensor  # int64 [B]
    videos: Tensor  # int64 [B], index into the data set's table
    failed: Sequence[FailedVideo]  # what would have been in this batch, could it have been read


class VideoDataset(Dataset):
    """Clips of videos. Item (epoch, index) -> (uint8 [T, 3, H, W], label, video), or a `FailedVideo`.

    clips: int64 [clips, 3] (`dataset.clips`). transforms: one for each crop a clip may name. A file that
    cannot be decoded is tried again after RETRY_SECONDS, then becomes a `FailedVideo`, or, under
    `strict`, raises VideoError.
    """

    def __init__(
        self,
        videos: VideoTable,
        clips: numpy.ndarray,
        sampling,
        transforms: Sequence[Callable[[Tensor], Tensor]],
        seed: int,
        strict: bool = False,
    ):
        self.videos = videos
        self.clips = clips
        self._sampling = sampling
        self._transforms = transforms
        self._seed = seed
        self._strict = strict
        self._given_up: set[int] = set()  # videos that are not worth the wait again
        self._failed_in_a_row = 0
        self._latest: tuple[tuple[int, int], numpy.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | FailedVideo:
        epoch, index = key
        video, place, crop = self.clips[index].tolist()
        if video == NO_VIDEO:
            return FailedVideo(NO_VIDEO, "")
        generator = random.Random(f"{self._seed}/{epoch}/{index}")
        frames = int(self.videos.frames[video])
        try:
            if place == RANDOM_PLACE:
                decoded = self._decode(video, self._sampling.random(frames, generator))
            else:
                decoded = self._decode_fixed(video, place, frames)
        except VideoError as error:
            if self._strict:
                raise
            return FailedVideo(video, str(error))
        clip = torch.from_numpy(decoded).permute(0, 3, 1, 2)  # [T, 3, H, W]
        # torchvision's transforms draw from the global generator; nobody else's state may move.
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: the seeding of a GPU that is not there formats a traceback each time.
            torch.default_generator.manual_seed(generator.getrandbits(63))
            clip = self._transforms[crop](clip)
        return clip, int(self.videos.labels[video]), video

    def _decode_fixed(self, video: int, place: int, frames: int) -> numpy.ndarray:
        # Several crops of one view stand together: it is decoded once for all of them.
        if len(self._transforms) == 1:
            return self._decode(video, self._sampling.at(frames, place))
        if self._latest is None or self._latest[0] != (video, place):
            self._latest = (video, place), self._decode(video, self._sampling.at(frames, place))
        return self._latest[1]

    def _decode(self, video: int, indices: list[int]) -> numpy.ndarray:
        """uint8 [T, H, W, 3]"""
        path, seek_points = self.videos.path(video), self.videos.seek_points(video)
        hopeless = video in self._given_up or self._failed_in_a_row >= _WORTH_WAITING_IN_A_ROW
        waits = iter(() if hopeless else RETRY_SECONDS)
        while True:
            try:
                frames = decode_frames(path, indices, seek_points)
                self._failed_in_a_row = 0
                return frames
            except VideoError:
                seconds = next(waits, None)
                if seconds is None:
                    self._given_up.add(video)
                    self._failed_in_a_row += 1
                    raise
                time.sleep(seconds)


def collate(samples: list[tuple[Tensor, int, int] | FailedVideo]) -> VideoBatch:
    failed = [sample for sample in samples if isinstance(sample, FailedVideo)]
    samples = [sample for sample in samples if not isinstance(sample, FailedVideo)]
    if not samples:
        none = torch.zeros(0, dtype=torch.int64)
        return VideoBatch(torch.zeros(0, 1, 3, 1, 1, dtype=torch.uint8), none, none.clone(), failed)
    clips, labels, videos = zip(*samples, strict=True)
    # Stacked as they were decoded, colour last, and only seen as [B, T, 3, H, W]: no transposed copy
    # on the way to the device, where the network wants it channels-last again.
    clips = [clip.permute(0, 2, 3, 1) for clip in clips]
    stacked = torch.empty(len(clips), *clips[0].shape, dtype=torch.uint8)  # [B, T, H, W, 3]
    if get_worker_info() is not None:
        # Into the memory that the main process will read. Left to the queue that takes the batch there, it
        # would be copied once more, and a full /dev/shm would be an error that nobody hears of.
        stacked.share_memory_()
    torch.stack(clips, out=stacked)
    return VideoBatch(stacked.permute(0, 1, 4, 2, 3), torch.tensor(labels), torch.tensor(videos), failed)


def make_loader(dataset: VideoDataset, batches: Sampler, workers: int, pin: bool) -> DataLoader:
    """batches: of `dataset.batch_sampler`. `pin` for copies to a GPU beside computation."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers > 0 else None,
        worker_init_fn=leave_signals_to_the_main_process,
        # Not what newer versions of Python start by default: workers end with the process they are forked from.
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
    )
