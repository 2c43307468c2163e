"""Reading the text files that people bring: lists, split files and label maps, from any system and editor."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

# UTF-32 first: the mark of its little-endian form begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def read_text(file: Path, expected: str = "", about: str | None = None) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with their byte-order mark; lines end in "\\n".

    Bytes that are no UTF-8 come back as surrogates, as in the names that the file system gives: a name in another
    encoding is found under its own bytes.

    expected: what the file should hold, for the error of a file that is not there.
    about: the parameter that names the file, if there is one.

    Raises UserError for a file that cannot be read, or that is no text.
    """
    try:
        content = file.read_bytes()
        encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), None)
        text = content.decode(encoding) if encoding else content.decode("utf-8-sig", errors="surrogateescape")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file{expected and f'; expected {expected}'}", about) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})", about) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as {encoding.upper()}, which its first bytes name", about) from error
    if "\0" in text:
        raise UserError(f"{file}: expected a text file in UTF-8, found zero bytes in it; save it as UTF-8", about)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(file: Path, expected: str = "", about: str | None = None) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not blank; numbers count from 1. `expected` and `about` as for `read_text`.

    Only "\\n", "\\r\\n" and "\\r" end a line: the others that Unicode knows, such as U+2028, may stand in a name.
    """
    for number, line in enumerate(read_text(file, expected, about).split("\n"), start=1):
        if line.strip():
            yield number, line
