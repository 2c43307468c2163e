"""The videos that a user names: files, folders, and lists of both."""

import codecs
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.splits import VIDEO_SUFFIXES, is_of_macos
from utils.errors import UserError


def find_videos(named: Iterable[str], list_file: str | None = None) -> Iterator[str | UserError]:
    """Paths of files; an error for what cannot be read in a folder, and for a folder without a video.

    named: files, folders, and "-" for paths from standard input, one a line.
    list_file: of paths, one a line.

    A file that is named is given back whatever its name. Of a folder, all videos below it are, in alphabetical order;
    a note on stderr counts its other files. Raises UserError for a list that cannot be read.
    """
    for name in named:
        yield from _paths_of(sys.stdin.buffer) if name == "-" else _videos_in(name)
    if list_file is not None:
        try:
            lines = Path(list_file).read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{list_file}: cannot be read ({error.strerror})", about="list") from error
        yield from _paths_of(lines)


def _paths_of(lines: Iterable[bytes]) -> Iterator[str | UserError]:
    for line in lines:
        path = os.fsdecode(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n"))  # a name need not be text
        if path.strip():
            yield from _videos_in(path)


def _videos_in(path: str) -> Iterator[str | UserError]:
    if not os.path.isdir(path):
        yield path
        return
    found = list(_below(path))
    errors = [item for item in found if isinstance(item, UserError)]
    files = sorted((item for item in found if isinstance(item, str)), key=lambda file: file.split(os.sep))
    videos = [file for file in files if _suffix(file) in VIDEO_SUFFIXES]
    others = Counter(_suffix(file) or "no suffix" for file in files if _suffix(file) not in VIDEO_SUFFIXES)
    if others:
        print(
            f"note: {path}: {others.total()} files are not named as videos ({', '.join(sorted(others))}) and left out; "
            "a file that is named itself is tried",
            file=sys.stderr,
        )
    yield from [*errors, *videos] or [UserError(f"{path}: a folder without a video")]


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _below(folder: str) -> Iterator[str | UserError]:
    """The files below a folder, and an error for all that cannot be read. Links are followed. Each folder is read once:
    by its own name, or by that of a link if it lies elsewhere."""
    folders, links, seen = [folder], [], set()
    while folders or links:
        place = folders.pop() if folders else links.pop()
        try:
            status = os.stat(place)
            names = os.listdir(place)
        except OSError as error:
            yield _unreadable(place, error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            entry = os.path.join(place, name)
            try:
                mode = os.stat(entry).st_mode
            except OSError as error:  # among others, a link to nothing
                yield _unreadable(entry, error)
                continue
            if stat.S_ISDIR(mode):
                (links if os.path.islink(entry) else folders).append(entry)
            elif stat.S_ISREG(mode) and not is_of_macos(name):
                yield entry


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror})")
