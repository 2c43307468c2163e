"""The one exception for what a user can mend, and what turns it into one line."""

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: what it is about, what was
    expected, what was found, what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with its complaint in one line and no guessing of abbreviated flags."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def worker_error(error: UserError) -> UserError:
    """A `UserError` raised in a DataLoader's worker comes wrapped in its traceback: its own line again."""
    message = str(error)
    if not message.startswith("Caught "):
        return error
    lines = message.strip().splitlines()
    return UserError(lines[-1].partition("Error: ")[2] or " ".join(lines))


def _terminated(number: int, frame) -> NoReturn:
    # An exception, so that what is under way can clean up; training has its own answer (utils/stopping.py).
    sys.exit(128 + number)


def _end_workers() -> None:
    """Kill the data loading processes that are left: they ignore the softer signals (utils/stopping.py),
    and a loader that an error's traceback holds waits seconds for each."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would complain of their death
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main and exit with what it returns; a `UserError` becomes one line and status 2."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
    except SystemExit as leaving:
        status = leaving.code
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of GPU memory ({str(error).splitlines()[0]}); take a smaller -b, --accumulate makes up for it",
            file=sys.stderr,
        )
        status = 2
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise  # a fault of this code, not of its user: the traceback says where
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"error: --compile failed ({reason}); is a C++ compiler installed? Run without it", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    _end_workers()
    sys.exit(status)
