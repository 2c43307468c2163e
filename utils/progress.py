"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Counts to `total` in a task: a tqdm bar on a terminal, else a line now and then and one at the end.

    `values` given to `advance` are shown behind the bar, already formatted.
    """

    def __init__(self, total: int, task: str, unit: str, start: int = 0, shown: bool = True):
        self._total, self._task, self._unit = total, task, unit
        self._done = start
        self._start_count = start
        self._values: dict[str, str] = {}
        self._started = self._printed = time.monotonic()
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=task, unit=unit, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._start_count and self._printed != self._started:
            self._print()  # the last line, where earlier ones were printed

    def advance(self, count: int = 1, **values: str) -> None:
        self._done += count
        self._values = values
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._printed = now
        rate = (self._done - self._start_count) / (now - self._started)
        left = (self._total - self._done) / rate if rate > 0 else float("nan")
        values = "".join(f", {name} {value}" for name, value in self._values.items())
        print(f"{self._task}: {self._done}/{self._total} {self._unit}{values}, {left:.0f} s left", flush=True)
