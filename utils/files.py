"""Writing files so that a reader, or the next start, never sees half of one."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.errors import UserError


def cache_folder() -> Path:
    """The folder of what can be found or computed again. Raises UserError for a user without a home folder."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if folder.startswith("~"):  # as in a container whose user id is in no list of users
        raise UserError("HOME is not set, and this user has no home folder: set XDG_CACHE_HOME to a writable folder")
    return Path(folder, "respike")


@contextlib.contextmanager
def writing(path: Path | str, advice: str = "", about: str | None = None) -> Iterator[None]:
    """An OSError inside becomes a UserError: `path` cannot be written, why, and `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}){advice}", about) from error


def write_atomically(path: Path, content: bytes, before_renaming: Callable[[], None] = lambda: None) -> None:
    """Write to a neighbour, flush it to disk, then rename: `path` holds the old content or the new.

    Raises OSError; the neighbour is removed and `path` untouched then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before_renaming()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
