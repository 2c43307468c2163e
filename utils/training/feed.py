"""From the loader to the optimizer steps: fetches the batches of a whole step, then all ranks agree on it.

A batch is trained on by all ranks or by none, because DDP needs a backward pass from each.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dataset.clips import NO_VIDEO, VideoTable
from dataset.device_loader import Batch, DeviceLoader
from dataset.video import VideoBatch
from utils.errors import OtherProcessError, UserError
from utils.runtime import Runtime

# One video in a hundred may become unreadable in a run of days. If more do, it is the storage.
_SHARE_UNREADABLE = 0.01
_ALWAYS_ALLOWED = 10


class UnreadableVideos:
    """Videos of one set that became unreadable during the run, of all ranks; rank 0 keeps them."""

    def __init__(self):
        self._known: set[int] = set()
        self._unsaved: list[str] = []

    def add(self, failures: list[tuple[int, str]], videos: VideoTable) -> None:
        """Print each video once. failures: (video, line). Raises UserError if too many have failed."""
        for video, line in failures:
            if video in self._known:
                continue
            self._known.add(video)
            self._unsaved.append(line)
            print(f"warning: left out: {line}", file=sys.stderr, flush=True)
        if len(self._known) > max(_ALWAYS_ALLOWED, _SHARE_UNREADABLE * len(videos)):
            raise UserError(
                f"{len(self._known)} of {len(videos)} videos can no longer be read, the last: {self._unsaved[-1]}; "
                "is the storage there? --resume auto continues once it is"
            )

    def take(self) -> list[str]:
        """The lines that were not taken yet."""
        taken, self._unsaved = self._unsaved, []
        return taken


class Step(NamedTuple):
    """The batches of one optimizer step, and what all ranks agreed on before it."""

    batches: Iterator[Batch]  # of this rank; no rank has an empty one
    count: int  # of `batches`, the same in every rank
    clips: int  # in `batches`, over all ranks
    order: int  # clips of the epoch's order that the step uses up, readable or not
    stop: bool  # a rank was asked to stop
    save: bool  # a rank finds that a checkpoint is due


class Feed:
    """The batches of one pass over a loader. Measures clips/s and the share of time spent waiting for data."""

    def __init__(self, loader: DeviceLoader, runtime: Runtime, unreadable: UnreadableVideos):
        self._loader, self._runtime, self._unreadable = loader, runtime, unreadable
        self._batches = iter(loader)
        self._failure: UserError | None = None
        self._failed: list[tuple[int, str]] = []
        self._started = time.perf_counter()
        self._waited = 0.0
        self._clips = 0
        self.stopped = False

    def steps(
        self, accumulation_steps: int, should_stop: Callable[[], bool], should_save: Callable[[], bool]
    ) -> Iterator[Step]:
        """The rest of the epoch. The last step may have fewer batches, and its last batch fewer clips."""
        sizes = self._loader.batches.sizes()  # clips of each batch, over all ranks
        for first in range(0, len(sizes), accumulation_steps):
            group = sizes[first : first + accumulation_steps]
            fetched = [self._next() for _ in group]
            own = [len(batch.labels) for batch in fetched]
            stop, save, *sums = self._agree(should_stop(), should_save(), *own, *(clips == 0 for clips in own))
            clips, empty = sums[: len(group)], sums[len(group) :]
            kept = [number for number in range(len(group)) if not empty[number]]
            step_clips = sum(clips[number] for number in kept)
            batches = (self._loader.split(fetched[number]) for number in kept)
            self._clips += step_clips
            yield Step(batches, len(kept), step_clips, sum(group), stop > 0, save > 0)

    def batches(self, should_stop: Callable[[], bool]) -> Iterator[Batch]:
        """The batches of this rank in an evaluation. Ends early, and sets `stopped`, if a rank was asked to stop."""
        for _ in range(self._loader.batches.steps):
            batch = self._next()
            (stop,) = self._agree(should_stop())
            if stop:
                self.stopped = True
                return
            if len(batch.labels):
                yield self._loader.split(batch)

    def clips_per_second(self) -> float:
        return self._clips / (time.perf_counter() - self._started)

    def timing(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        return {"clips_per_second": self._clips / elapsed, "data_wait_share": self._waited / elapsed}

    def _next(self) -> VideoBatch:
        """The next batch; an empty one if there is none. A failure is remembered, so that all ranks leave
        together."""
        asked = time.perf_counter()
        batch = None
        try:
            batch = next(self._batches, None)
        except UserError as error:
            self._failure = error
        self._waited += time.perf_counter() - asked
        if batch is None:
            return self._loader.empty()
        self._failed += [(failed.video, failed.error) for failed in batch.failed if failed.video != NO_VIDEO]
        return batch

    def _agree(self, *counts: int) -> list[int]:
        """`counts` summed over all ranks. Raises UserError in all of them if one cannot continue."""
        failed, unreadable, *sums = self._runtime.add(self._failure is not None, len(self._failed), *counts)
        if failed:
            raise self._failure or OtherProcessError
        if unreadable:
            failures, self._failed = self._runtime.gather(self._failed), []
            self._runtime.from_main(self._unreadable.add, failures, self._loader.videos)
        return sums
