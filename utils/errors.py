"""The one exception for what a user can mend, and what turns it into one line."""

import argparse
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed


class UserError(ValueError):
    """A mistake in flags, files or data. The message is one line: what it is about, what was
    expected, what was found, what to do."""


class OtherProcessError(UserError):
    """Another process of this run cannot go on, and says why."""


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


def _say_error(error: UserError) -> None:
    """One line, from one process: before they have met, all of them find the same in the flags."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif torch.distributed.is_initialized():
        print(f"error: process {rank}: {error}", file=sys.stderr)


def _lost_another_process(error: Exception) -> bool:
    """Whether a message to another process failed because that one is no more."""
    if not torch.distributed.is_initialized():
        return False
    return (
        isinstance(error, torch.distributed.DistError)
        or "Connection closed by peer" in str(error)
        or ("gloo" in str(error) and isinstance(error, RuntimeError))
    )


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main and exit with what it returns; a `UserError` becomes one line and status 2."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _terminated)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
    except SystemExit as leaving:
        status = leaving.code
    except OtherProcessError:
        status = 2
    except UserError as error:
        sys.stdout.flush()
        _say_error(error)
        status = 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of GPU memory ({str(error).splitlines()[0]}); take a smaller -b, --accumulate makes up for it",
            file=sys.stderr,
        )
        status = 2
    except Exception as error:
        if _lost_another_process(error):
            print("error: another process of this run has ended; what it said tells why", file=sys.stderr)
            status = 2
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            print(f"error: --compile failed ({reason}); is a C++ compiler installed? Run without it", file=sys.stderr)
            status = 2
        else:  # a fault of this code, not of its user: the traceback says where
            traceback.print_exc()
            status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    _end_workers()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if status:  # others may wait for this process: leaving in order would wait for them
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        torch.distributed.destroy_process_group()
    sys.exit(status)
