"""Names of classes in the order of their labels, in the forms in which label maps are handed around."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from dataset.text_files import read_text
from utils.errors import UserError

_NUMBER_NAME = re.compile(r"(\d{1,9})\s*[\s,;:]\s*(.*\S)")
_NAME_NUMBER = re.compile(r"(.*[^\s,;:])\s*[,;:\t]\s*(\d{1,9})")  # `stage 1` is a name
# The one column of a table of names, as pandas and others write it.
_COLUMN_NAMES = {"name", "names", "label", "labels", "class", "classes", "class_name", "label_name", "category"}


def read_label_map(file: Path) -> list[str]:
    """Class names in the order of their labels: one a line, or in the order of the numbers beside them.

    Numbers may stand before all names, or behind them after a comma, tab, semicolon or colon, with or without a header;
    or in a JSON file of names, of name: number, or of number: name. Empty lines and lines that begin with # are left
    out. Raises UserError if there is no name, if a name comes twice or is not in UTF-8, or if the numbers do not count
    from 0.
    """
    text = read_text(file, "a class name a line, in the order of the labels", about="label_map")
    is_json = file.suffix.lower() == ".json" or text.lstrip().startswith("{")
    numbered = _from_json(file, text) if is_json else _from_lines(file, text)
    if not numbered:
        raise UserError(f"{file}: expected a class name a line, found none", about="label_map")
    names = [name for _, name in sorted(numbered)]
    if [number for number, _ in sorted(numbered)] != list(range(len(names))):
        raise UserError(
            f"{file}: expected each number from 0 to {len(names) - 1} once, as labels count from 0, found "
            f"{_shown(sorted(number for number, _ in numbered))}; number the names from 0, or leave the numbers out",
            about="label_map",
        )
    check_names(file, names, about="label_map")
    broken = next((name for name in names if re.search("[\ud800-\udfff]", name)), None)
    if broken is not None:  # checkpoints and pictures would hold the name like this
        raise UserError(f"{file}: the class {broken!a} is not in UTF-8; save the file as UTF-8", about="label_map")
    return names


def check_names(file: Path, names: Sequence[str], about: str | None = None) -> None:
    """Raise UserError if a class name comes twice."""
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"{file}: the class `{twice}` comes {names.count(twice)} times; expected each name once", about)


def _from_lines(file: Path, text: str) -> list[tuple[int, str]]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    comments = [line for line in lines if line.startswith("#")]
    if comments:
        print(f"note: {file}: {len(comments)} lines that begin with # are left out, the first: {comments[0]}")
    lines = [line for line in lines if not line.startswith("#")]
    for form, number, name in ((_NUMBER_NAME, 1, 2), (_NAME_NUMBER, 2, 1)):
        matches = [form.fullmatch(line) for line in lines]
        rows = matches[1:] if len(lines) > 1 and matches[0] is None else matches  # the first line may be a header
        if rows and None not in rows:
            return [(int(match[number]), _unquoted(match[name])) for match in rows]
    if lines and _unquoted(lines[0]).lower() in _COLUMN_NAMES:
        print(f"note: {file}: its first line, `{lines[0]}`, is taken for a header, not for a class")
        lines = lines[1:]
    return list(enumerate(map(_unquoted, lines)))


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if len(name) > 2 and name[0] == name[-1] == '"' else name


def _from_json(file: Path, text: str) -> list[tuple[int, str]]:
    try:
        content = json.loads(text)
        pairs = list(content.items() if isinstance(content, dict) else enumerate(content))
        if all(isinstance(name, str) for _, name in pairs):  # "0": "run", or a list
            pairs = [(name, number) for number, name in pairs]
        return [(int(number), _unquoted(name)) for name, number in pairs]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: expected JSON of class names and their numbers ({error})", about="label_map"
        ) from error


def _shown(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" ... {numbers[-1]}" if len(numbers) > 5 else "")
