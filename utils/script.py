"""How a script starts and ends: signals, streams, one line for a user's mistake, nothing left behind."""

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

from utils import interrupted
from utils.errors import OtherProcessError, UserError, explain
from utils.output import Output
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
    """One line. Before the ranks have met, all of them find the same mistake in the flags: of those that torchrun has
    started on a machine, one prints it. (RANK says nothing alone: a cluster's pods have it too.)"""
    with contextlib.suppress(OSError):
        sys.stdout.flush()  # what was printed before comes first
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        message = f"process {rank}: {message}" if rank else message
    elif "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    print(f"error: {message}", file=sys.stderr)


def _prepare_streams() -> None:
    # Python has None for a stream that its caller has closed, and the next file opened would get its number: what a
    # library prints would be written into that file.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text


def _status_of(main: Callable[[], int | None], output: Output) -> int | str | None:
    """What `main` returns, or the status of its error, which is printed unless `output` has it."""
    try:
        return main()
    except SystemExit as leaving:
        return leaving.code
    except OtherProcessError:
        return 2
    except UserError as error:
        flag = "" if error.about is None else f"--{error.about.replace('_', '-')} "
        _print_error(f"{flag}{error}")
        return 2
    except Exception as error:
        line = explain(error)
        if line is None and not (isinstance(error, OSError) and output.error):  # a fault of this code, not of its user
            traceback.print_exc()
            return 1
        if line is not None:
            _print_error(line)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main and exit with what it returns; a `UserError` becomes one line and status 2. If stdout cannot
    be written, that is an error too; but if nobody reads it any more, as after `| head`, the script ends in silence
    with the status of SIGPIPE."""
    if signal.getsignal(signal.SIGINT) is interrupted.leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _terminated)
    _prepare_streams()
    output, errors = sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    errors.when_lost = lambda error: None  # there is no place left to report it
    status = _status_of(main, output)
    with contextlib.suppress(OSError):
        output.flush()
    if isinstance(output.error, BrokenPipeError):
        status = 128 + signal.SIGPIPE
    elif output.error is not None:
        status = 2
        print(f"error: standard output cannot be written ({output.error.strerror})", file=sys.stderr)
    for stream in (output, errors):
        if stream.error is not None:  # Python would try again as it ends, complain, and change the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.stdout, sys.stderr = output.stream, errors.stream
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
