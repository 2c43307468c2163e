"""Ctrl-C, SIGTERM and SIGUSR2 (a scheduler's warning) ask a run to stop: it finishes the step, saves and leaves. So
does the loss of stdout, such as a full disk behind it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys

from utils.output import Output

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def leave_signals_to_the_main_process(*_) -> None:
    """For worker processes: a terminal's Ctrl-C and a scheduler's SIGTERM reach the whole process group,
    and a worker that died of one could not serve the step that the main process still finishes. It ends
    with the main process, however that ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before this was set
        os._exit(1)


class StopRequest:
    """Inside the `with` block, `name` is None until one of the signals arrives, then the signal's name; the
    death of torchrun, which should end the processes it started, counts as one, and so does the loss of stdout.

    A second SIGINT is KeyboardInterrupt as ever, for a user who will not wait; not under torchrun, which
    hands on the SIGINT that the terminal has sent already, and itself ends what does not leave.
    """

    def __init__(self):
        self.name: str | None = None
        self._before = {}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        if isinstance(sys.stdout, Output):
            sys.stdout.when_lost = self._without_output
        return self

    def __exit__(self, *exc_info) -> None:
        if isinstance(sys.stdout, Output):
            sys.stdout.when_lost = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        if self.name is None and self._launcher is not None and os.getppid() != self._launcher:
            self.name = "the launcher's death"
        return self.name is not None

    def _receive(self, number: int, frame) -> None:
        if self.name is not None and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        if self.name is not None:
            return
        self.name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one. What cannot be written is found by the next print.
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), f"\n{self.name}: finishing the step in hand, then saving\n".encode())

    def _without_output(self, error: OSError) -> None:
        reason = f"standard output cannot be written ({error.strerror})"
        print(f"{reason}: finishing the step in hand, then saving", file=sys.stderr)
        self.name = self.name or "the loss of standard output"
