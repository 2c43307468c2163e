"""Clips out of videos, and clips into batches.

A clip is a function of (seed, epoch, index) alone. It does not depend on the worker that makes it, on the number
of workers, or on what was drawn before. So a resumed run sees what an undisturbed one would have seen.
"""

import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from dataset.clips import NO_VIDEO, RANDOM_PLACE, VideoTable
from dataset.decode import VideoError, decode_frames
from dataset.frame_sampling import FrameSampling
from utils.errors import UserError, explain_loading
from utils.signals import leave_signals_to_the_main_process

# A file that cannot be read now may be readable again after a hiccup of the network drive.
RETRY_SECONDS = 1.0


class FailedVideo(NamedTuple):
    video: int  # index into the table; NO_VIDEO if it was known to be gone
    error: str  # one line


class VideoBatch(NamedTuple):
    clips: Tensor  # uint8 [B, T, 3, H, W]; B may be smaller than asked for, even 0
    labels: Tensor  # int64 [B]
    videos: Tensor  # int64 [B], index into the data set's table
    failed: Sequence[FailedVideo]  # clips left out because their video could not be read


class VideoDataset(Dataset):
    """Clips of videos. Item (epoch, index) -> (uint8 [T, 3, H, W], label, video), or a `FailedVideo`.

    videos: the table.
    clips: CLIP [clips] (`dataset.clips`).
    sampling: which frames make a clip.
    transforms: one for each crop that a clip may name.
    seed: of all that is drawn.
    strict: raise VideoError for a file that cannot be decoded, even at a second try; else it is a `FailedVideo`.
    """

    def __init__(
        self,
        videos: VideoTable,
        clips: numpy.ndarray,
        sampling: FrameSampling,
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
        self._latest: tuple[tuple[int, list[int]], numpy.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | FailedVideo:
        epoch, index = key
        video, place, crop = self.clips[index].tolist()
        if video == NO_VIDEO:
            return FailedVideo(NO_VIDEO, "")
        generator = random.Random(f"{self._seed}/{epoch}/{index}")
        frames = int(self.videos.frames[video])
        drawn = place == RANDOM_PLACE
        indices = self._sampling.random(frames, generator) if drawn else self._sampling.at(frames, place)
        try:
            decoded = self._decode(video, indices)
            clip = self._transformed(decoded, video, crop, seed=generator.getrandbits(63))
        except VideoError as error:
            if self._strict:
                raise
            return FailedVideo(video, str(error))
        return clip, int(self.videos.labels[video]), video

    def _transformed(self, decoded: numpy.ndarray, video: int, crop: int, seed: int) -> Tensor:
        """uint8 [T, H, W, 3] to [T, 3, size, size]. Raises VideoError if it takes more memory than there is."""
        clip = torch.from_numpy(decoded).permute(0, 3, 1, 2)  # [T, 3, H, W]
        # torchvision's transforms draw from the global generator, whose state must not change for others.
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: the seeding of a GPU that is not there formats a traceback each time.
            torch.default_generator.manual_seed(seed)
            try:
                return self._transforms[crop](clip)
            except RuntimeError as error:
                if "allocate memory" not in str(error):
                    raise
                size = f"{clip.shape[3]} x {clip.shape[2]}"
                line = f"{self.videos.path(video)}: a clip of {size} pixels needs more memory than there is"
                raise VideoError(line) from error

    def _decode(self, video: int, indices: list[int]) -> numpy.ndarray:
        """uint8 [T, H, W, 3]"""
        if self._latest is not None and self._latest[0] == (video, indices):
            return self._latest[1]
        source = self.videos.path(video), indices, self.videos.seek_points(video)
        try:
            decoded = decode_frames(*source)
        except VideoError:
            time.sleep(RETRY_SECONDS)
            decoded = decode_frames(*source)
        if len(self._transforms) > 1:  # the crops of one view are neighbours: the view is decoded once for all of them
            self._latest = (video, indices), decoded
        return decoded


def collate(samples: list[tuple[Tensor, int, int] | FailedVideo]) -> VideoBatch:
    failed = [sample for sample in samples if isinstance(sample, FailedVideo)]
    samples = [sample for sample in samples if not isinstance(sample, FailedVideo)]
    if not samples:
        none = torch.zeros(0, dtype=torch.int64)
        return VideoBatch(torch.zeros(0, 1, 3, 1, 1, dtype=torch.uint8), none, none.clone(), failed)
    clips, labels, videos = zip(*samples, strict=True)
    # Stacked as they were decoded, colour last, and viewed as [B, T, 3, H, W]. No transposed copy is made on the
    # way to the device, where the network wants them channels-last again.
    clips = [clip.permute(0, 2, 3, 1) for clip in clips]
    stacked = torch.empty(len(clips), *clips[0].shape, dtype=torch.uint8)  # [B, T, H, W, 3]
    if get_worker_info() is not None:
        # Into the memory that the main process will read. Else the queue would copy the batch once more, and
        # nobody would hear of a full /dev/shm.
        stacked.share_memory_()
    torch.stack(clips, out=stacked)
    return VideoBatch(stacked.permute(0, 1, 4, 2, 3), torch.tensor(labels), torch.tensor(videos), failed)


def make_loader(dataset: VideoDataset, batches: Sampler, workers: int, pin: bool, prefetch: int = 2) -> DataLoader:
    """batches: of `dataset.batch_sampler`. `pin` for copies to a GPU beside computation. prefetch: batches that each
    worker loads ahead. Raises UserError if there can be no workers."""
    # Forked, also by newer versions of Python: workers end with the process that they are forked from.
    method = "fork" if workers > 0 and sys.platform == "linux" else None
    if workers > 0:
        try:
            multiprocessing.get_context(method).Lock()
        except OSError as error:
            raise UserError(
                f"data loading processes need a /dev/shm that can be written ({error.strerror}); "
                "without them (-j 0) the main process loads"
            ) from error
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers > 0 else None,
        worker_init_fn=leave_signals_to_the_main_process,
        multiprocessing_context=method,
    )


def loaded(loader: DataLoader) -> Iterator[VideoBatch]:
    """The batches of a loader. Raises UserError in one line if a data loading process dies or raises UserError."""
    try:
        iterator = iter(loader)
        # PyTorch would raise a worker's death wherever the main thread happens to be, even in the middle of an
        # optimizer step. Without its handler the death is noticed at the next wait for a batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except (RuntimeError, OSError, ValueError) as error:
        explained = explain_loading(error)
        if explained is None:
            raise  # a fault of this code: the traceback shows it
        raise explained from error
