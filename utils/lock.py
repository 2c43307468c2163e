"""A folder for one process at a time."""

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.files import writing

_SECONDS_FOR_ANOTHER_TO_LEAVE = 30


def lock(path: Path, shared: bool = False, waits: bool = False, about: str | None = None) -> int:
    """Keep other processes out until the file descriptor returned here is closed, or this process ends.

    path: a folder, or a file that is made if need be. (Some network file systems lock files and no folders.)
    shared: except for others that take it `shared`. waits: for as long as another process needs; else for 30 s, in
    which a killed process has left. A file system without locks keeps nobody out.
    Raises UserError if it cannot be opened, or if the other process stays.
    """
    folder = path if path.is_dir() else path.parent
    with writing(folder, about=about):
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    for waited in itertools.count():
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                break  # a file system without locks
            if waited == 0:
                print(f"waiting for another process to leave {folder}", flush=True)
            if waited == _SECONDS_FOR_ANOTHER_TO_LEAVE and not waits:
                os.close(handle)
                raise UserError(
                    f"{folder}: another process is writing to it; wait for it, or name another folder", about
                ) from error
            time.sleep(1)
    return handle


@contextlib.contextmanager
def locked(path: Path, shared: bool = False, waits: bool = False, about: str | None = None) -> Iterator[None]:
    """`lock` for a `with` block."""
    handle = lock(path, shared, waits, about)
    try:
        yield
    finally:
        os.close(handle)
