"""Batch samplers: which clips each rank sees, in which order. Pure functions of (seed, epoch, position).

Both samplers give batches of keys (epoch, clip), for `DataLoader(batch_sampler=...)`. Neither pads: no clip is
seen twice.
"""

import itertools
import random
from collections.abc import Iterator

import numpy
from torch.utils.data import Sampler


class TrainBatchSampler(Sampler):
    """Shuffled anew each epoch. A batch takes the next `batch_size` clips for each rank, so that W ranks train on
    what one rank with a batch W times as large would. The last batch of an epoch shares out evenly what is left;
    if fewer clips than ranks are left, they are left out.

    `set_position` chooses the epoch and how many of its clips are done already. `set_first` chooses the first clips of
    an epoch alone.
    """

    def __init__(self, clips: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1):
        self._clips, self._seed = clips, seed
        self.batch_size = batch_size
        self._rank, self._processes = rank, processes
        self._epoch = self._done = 0
        self._first: int | None = None

    def set_position(self, epoch: int, clips_done: int = 0) -> None:
        self._epoch, self._done, self._first = epoch, clips_done, None

    def set_first(self, epoch: int, clips: int) -> None:
        """The first `clips` clips of the epoch, or all if it has fewer. Sizes of batches differ by one at most, and
        none is smaller than a batch of the training (but less than twice as large): no clip is left out."""
        self._epoch, self._done, self._first = epoch, 0, min(clips, self._clips)

    def sizes(self) -> list[int]:
        """Clips of each batch to come, over all ranks."""
        step = self.batch_size * self._processes
        if self._first is not None:
            batches = max(1, self._first // step)
            ends = [number * self._first // batches for number in range(batches + 1)]
            return [end - start for start, end in itertools.pairwise(ends)]
        sizes = [min(step, self._clips - start) for start in range(self._done, self._clips, step)]
        return sizes[:-1] if sizes and sizes[-1] < self._processes else sizes

    def __len__(self) -> int:
        return len(self.sizes())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self._epoch, self._done  # as they are now: a loader's workers ask later
        order = list(range(self._clips))
        random.Random(f"order/{self._seed}/{epoch}").shuffle(order)
        for size in self.sizes():
            begin, end = (start + rank * size // self._processes for rank in (self._rank, self._rank + 1))
            yield [(epoch, clip) for clip in order[begin:end]]
            start += size


class EvalBatchSampler(Sampler):
    """Every clip once, in order. Each rank gets whole videos, so that it can score them and only counts need
    adding. `steps` is the largest number of batches that a rank has."""

    def __init__(self, clips: numpy.ndarray, batch_size: int, rank: int = 0, processes: int = 1):
        owner = clips["video"] % processes
        self._own = numpy.flatnonzero(owner == rank)
        self._batch_size = batch_size
        self.clips = len(self._own)
        self.steps = -(-int(numpy.bincount(owner, minlength=1).max(initial=0)) // batch_size)

    def __len__(self) -> int:
        return -(-len(self._own) // self._batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self._own), self._batch_size):
            yield [(0, clip) for clip in self._own[start : start + self._batch_size].tolist()]
