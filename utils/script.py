"""How a script starts and ends: signals, one line for a user's mistake, nothing left behind."""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed

from utils.errors import LocalError, OtherProcessError, UserError
from utils.run_folder import leave_run_folders


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


def _say_error(message: str) -> None:
    """One line, from one process: before they have met, all of them find the same in the flags."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif torch.distributed.is_initialized():
        print(f"error: process {rank}: {message}", file=sys.stderr)


# What gloo and NCCL say when the process at the other end is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "remote process")


def _message_failed(error: Exception) -> bool:
    """Whether this is about sending or receiving a message."""
    if not torch.distributed.is_initialized() or isinstance(error, OSError):  # (a broken pipe may be stdout's)
        return False
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _GONE)


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
        _say_error(str(error))
        status = 2
    except LocalError as error:
        _say_error(str(error))
        status = 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of GPU memory ({str(error).splitlines()[0]}); take a smaller -b, --accumulate makes up for it",
            file=sys.stderr,
        )
        status = 2
    except Exception as error:
        if _message_failed(error):
            gone = any(words in str(error) for words in _GONE)
            first = str(error).strip().splitlines()[0]
            _say_error("another process of this run has ended; what it said tells why" if gone else first)
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
    leave_run_folders()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if status:  # others may wait for this process: leaving in order would wait for them
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(status)
        torch.distributed.destroy_process_group()
    sys.exit(status)
