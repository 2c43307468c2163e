"""The one exception for what a user can mend, and what turns it into one line."""

import argparse
import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


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
    return UserError(message.strip().splitlines()[-1].partition("Error: ")[2])


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main and exit with what it returns; a `UserError` becomes one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    gc.collect()  # loaders that the error's traceback held shut their workers down
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain of the next line
    for worker in multiprocessing.active_children():
        worker.kill()  # data loading processes ignore the softer signals (utils/stopping.py)
    sys.exit(status)
