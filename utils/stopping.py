"""Ctrl-C and SIGTERM ask a run to stop: it finishes the step, saves and leaves."""

import signal


class StopRequest:
    """Inside the `with` block, `name` is None until SIGINT or SIGTERM arrives, then the signal's name.

    A second SIGINT is KeyboardInterrupt as ever, for a user who will not wait.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.name: str | None = None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        for number in self._SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: finishing the step in hand, then saving", flush=True)
