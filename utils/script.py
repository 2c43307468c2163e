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

from utils.errors import OtherProcessError, UserError, explain
from utils.run_folder import leave_run_folders


def _terminated(number: int, frame) -> NoReturn:
    # An exception lets `with` and `finally` clean up. During training utils/signals.py answers instead.
    sys.exit(128 + number)


def _end_workers() -> None:
    """Kill the data loading processes that are left. They ignore the softer signals (utils/signals.py), and a
    loader that an error's traceback keeps alive waits seconds for each."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain about their death
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _print_error(message: str) -> None:
    """One line from one process. Before the ranks have met, all of them find the same mistake in the flags."""
    sys.stdout.flush()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif torch.distributed.is_initialized():
        print(f"error: process {rank}: {message}", file=sys.stderr)


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
        flag = "" if error.about is None else f"--{error.about.replace('_', '-')} "
        _print_error(f"{flag}{error}")
        status = 2
    except Exception as error:
        line, status = explain(error), 2
        if line is not None:
            _print_error(line)
        else:  # a fault of this code, not of its user: the traceback shows it
            traceback.print_exc()
            status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    _end_workers()
    leave_run_folders()
    if torch.distributed.is_initialized():
        if status:  # others may wait for this process: leaving in order would wait for them
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(status)
        torch.distributed.destroy_process_group()
    sys.exit(status)
