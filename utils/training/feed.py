"""Videos that cannot be read although they could be when the run started."""

import sys

from dataset.clips import NO_VIDEO, VideoTable
from dataset.video import FailedVideo, VideoBatch
from utils.errors import UserError

# One video in a hundred may rot away in a run of days; more, or many in a row, and it is the storage.
_MOST_IN_A_HUNDRED = 1
_ALWAYS_ALLOWED = 10
_MOST_IN_A_ROW = 8


class BrokenVideos:
    """Those of one set of videos. Says each once, and raises UserError when there are too many to go on."""

    def __init__(self, processes: int = 1):
        self._processes = processes  # that share the videos: each may find its part of the most there may be
        self._known: set[int] = set()  # videos, not what is said of them: that may name another frame each time
        self._unreported: list[str] = []
        self._in_a_row = 0  # videos, not clips of one
        self._latest: FailedVideo | None = None

    def check(self, batch: VideoBatch, videos: VideoTable) -> None:
        """Look at what a batch lacks."""
        for failed in batch.failed:
            if failed.video != NO_VIDEO:
                self._add(failed, videos)
        if len(batch.labels):
            self._in_a_row, self._latest = 0, None
        if self._in_a_row >= _MOST_IN_A_ROW:
            raise UserError(
                f"{self._in_a_row} videos one after another cannot be read, the last: {self._latest.error}; "
                "is the storage there? --resume auto goes on once it is"
            )

    def _add(self, failed: FailedVideo, videos: VideoTable) -> None:
        self._in_a_row += self._latest is None or self._latest.video != failed.video
        self._latest = failed
        if failed.video in self._known:
            return
        self._known.add(failed.video)
        self._unreported.append(failed.error)
        print(f"warning: left out: {failed.error}", file=sys.stderr, flush=True)
        most = max(_ALWAYS_ALLOWED, len(videos) * _MOST_IN_A_HUNDRED // 100 // self._processes)
        if len(self._known) > most:
            raise UserError(
                f"{len(self._known)} of {len(videos)} videos can no longer be read, the last: {failed.error}; "
                "see to the storage, then --resume auto goes on without those that are gone"
            )

    def take(self) -> list[str]:
        """The lines that were not taken yet."""
        taken, self._unreported = self._unreported, []
        return taken
