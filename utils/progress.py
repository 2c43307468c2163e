"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Counts to `total` in a task: a tqdm bar on a terminal, else a line now and then and one at the end.

    `values` given to `advance` are shown behind the count, already formatted.
    """

    def __init__(self, total: int, task: str, unit: str, start: int = 0, shown: bool = True):
        self._total, self._task, self._unit = total, task, unit
        self._start, self._done, self._values = start, start, {}
        self._started = self._printed = time.monotonic()
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=task, unit=unit, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._printed != self._started:  # the last line, if earlier ones were printed
            self._print()

    def advance(self, count: int = 1, **values: str) -> None:
        self._done, self._values = self._done + count, values
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        left = (self._total - self._done) * (self._printed - self._started) / max(1, self._done - self._start)
        values = "".join(f", {name} {value}" for name, value in self._values.items())
        print(f"{self._task}: {self._done}/{self._total} {self._unit}{values}, {left:.0f} s left", flush=True)
