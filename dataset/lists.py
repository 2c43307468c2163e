"""Data sets that come as list files: Kinetics-400 in the forms it is handed around in, and anyone's own.

A list is a text file of lines `path label` or `path frames label` (MMAction's; the paths may hold
spaces, the frames are not used: the index knows), or a table with a header: the official Kinetics csv with the
columns label, youtube_id, time_start, time_end, or one with the columns path and label. Labels count from 0; those of
a table may be names, as the official ones are. Lines that begin with # are comments if they name no file.
"""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.splits import VIDEO_SUFFIXES, FilesBelow, Split, VideoRecord, existing_folder, note_repeats
from dataset.text_files import read_lines
from utils.errors import UserError

_MOST_CLASSES = 100_000  # a larger label is no label: a number of frames in the wrong column, or a mistyped one
_LAST_INTEGER = re.compile(r"(.*[^\s,;])[\s,;]+(\d+)")
_OFFICIAL_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_PATH_COLUMNS = ("path", "video_path", "file_path", "filename", "file_name", "file", "video")


@dataclass(frozen=True)
class VideoList:
    name: str  # "train" or "val"
    file: Path
    root: Path


@dataclass(frozen=True)
class _Entry:
    line: int
    names: tuple[str, ...]  # paths below the root that the video may have, the usual one first
    label: int | str
    group: str
    may_be_comment: bool = False


def read_lists(
    train: VideoList | None, test: VideoList, class_names: list[str] | None = None, num_classes: int | None = None
) -> Split:
    """The videos of two lists that are on disk; `train` None gives none to train on.

    A file is found under its listed name, whatever its suffix. A path without an extension, or with one under which
    there is no file, takes that of the video of this name that is there. Classes are `class_names`, a label map's;
    without, `num_classes` numbers; without either, as many as the largest label needs, or the names of the lists in
    alphabetical order. Prints which videos are listed several times. Raises UserError naming file and line of what is
    malformed.
    """
    found = {part: _on_disk(part, _read_list(part)) for part in (train, test) if part is not None}
    labels = [entry.label for entries in found.values() for entry, _ in entries]
    classes = _classes(labels, class_names, num_classes)
    numbers = {name: number for number, name in enumerate(classes)}
    records: dict[VideoList, list[VideoRecord]] = {}
    missing = []
    for part, entries in found.items():
        records[part] = []
        for entry, path in entries:
            label = _number(entry, part, classes, numbers)
            if path is None:
                missing.append(os.path.join(part.root, entry.names[0]))
            else:
                records[part].append(VideoRecord(path, label, entry.group, entry.names[0]))
        if not records[part]:
            raise UserError(
                f"{part.file}: none of its {len(entries)} videos is under {part.root}; expected such as "
                f"{entries[0][0].names[0]}",
                about=f"{part.name}_list",
            )
        note_repeats(str(part.file), [(record.path, record.label) for record in records[part]])
    training = records.get(train, [])
    trained = {os.path.abspath(record.path): record.label for record in training}
    tested = {os.path.abspath(record.path): record.label for record in records[test]}
    both = {path: label for path, label in tested.items() if path in trained}
    if both:
        others = sum(trained[path] != label for path, label in both.items())
        more = f", {others} of them with another label" if others else ""
        print(f"note: {len(both)} videos are both trained and tested on{more}, the first: {min(both)}")
    return Split(classes, training, records[test], missing, unlisted=[])


def _on_disk(part: VideoList, listed: list[_Entry]) -> list[tuple[_Entry, str | None]]:
    """Each entry with the path of its file, None if there is none. Comments are left out, and printed."""
    files = FilesBelow(part.root)
    found = [(entry, files.find(*entry.names)) for entry in listed]
    if files.other_extension:
        print(f"data: {files.other_extension} videos of {part.file} are on disk with another extension than listed")
    comments = [entry.line for entry, path in found if entry.may_be_comment and path is None]
    if comments:
        print(
            f"note: {part.file}: {len(comments)} lines that begin with # and name no file are taken for comments, the "
            f"first: line {comments[0]}"
        )
    entries = [(entry, path) for entry, path in found if path is not None or not entry.may_be_comment]
    if not entries:
        raise UserError(f"{part.file}: names no video", about=f"{part.name}_list")
    return entries


def _read_list(part: VideoList) -> list[_Entry]:
    about = f"{part.name}_list"
    lines = list(read_lines(part.file, "lines `path label` or `path frames label`, or the official csv", about))
    existing_folder(part.root, f"{part.name}_root", f"the videos of {part.file}")
    if not lines:
        raise UserError(f"{part.file}: names no video", about)
    header = next((place for place, (_, line) in enumerate(lines) if not line.startswith("#")), 0)
    for delimiter in ",\t;":
        try:
            columns = [column.lower() for column in _cells(lines[header][1], delimiter)]
        except csv.Error:  # a line that is too long for a table
            break
        table = _Table(part, lines[header:], columns, delimiter)
        path_column = next((column for column in _PATH_COLUMNS if column in columns), None)
        if "youtube_id" in columns:
            return list(_official_entries(table))
        if path_column is not None and "label" in columns:
            return _table_entries(table, path_column)
    return list(_text_entries(part, lines))


@dataclass(frozen=True)
class _Table:
    part: VideoList
    lines: list[tuple[int, str]]  # from the header on
    columns: list[str]
    delimiter: str

    def refused(self, number: int, line: str) -> UserError:
        return UserError(f"{self.part.file}:{number}: expected {','.join(self.columns)}, found `{line.strip()[:200]}`")

    def rows(self, needed: tuple[str, ...]) -> Iterator[tuple[int, str, dict[str, str]]]:
        """(number, line, cells by column). Raises UserError if a cell that is `needed` is empty."""
        for number, line in self.lines[1:]:
            try:
                row = dict(zip(self.columns, _cells(line, self.delimiter), strict=True))
            except (ValueError, csv.Error) as error:
                raise self.refused(number, line) from error
            if not all(row[column] for column in needed):
                raise UserError(f"{self.part.file}:{number}: expected {' and '.join(needed)}, found an empty cell")
            yield number, line, row


def _cells(line: str, delimiter: str) -> list[str]:
    """Of a row of a table, without the spaces around them. Raises csv.Error."""
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]


def _official_entries(table: _Table) -> Iterator[_Entry]:
    for wanted in _OFFICIAL_COLUMNS:
        if wanted not in table.columns:
            raise UserError(
                f"{table.part.file}:{table.lines[0][0]}: expected a column {wanted}, found {', '.join(table.columns)}"
            )
    for number, line, row in table.rows(_OFFICIAL_COLUMNS):
        label, video = row["label"], row["youtube_id"]
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (ValueError, OverflowError) as error:
            raise table.refused(number, line) from error
        # The usual download scripts name a file for its cut, or for the video alone, in a folder a class or in one.
        folders = (label, label.replace(" ", "_"), "")
        stems = (f"{video}_{start:06d}_{end:06d}", video)
        yield _Entry(number, tuple(os.path.join(f, s) for s in stems for f in folders), label, video)


def _table_entries(table: _Table, path_column: str) -> list[_Entry]:
    # 1.0 is how pandas writes a 1 of a column that had an empty cell.
    rows = [
        (number, row[path_column], re.sub(r"^(\d+)\.0$", r"\1", row["label"]))
        for number, _, row in table.rows((path_column, "label"))
    ]
    numbers = all(label.isdecimal() for _, _, label in rows)
    return [
        _Entry(number, (path,), _integer(table.part, number, label) if numbers else label, _stem(path))
        for number, path, label in rows
    ]


def _text_entries(part: VideoList, lines: list[tuple[int, str]]) -> Iterator[_Entry]:
    for number, whole_line in lines:
        line = whole_line.strip()
        labelled = _LAST_INTEGER.fullmatch(line)
        may_be_comment = line.startswith("#")
        if may_be_comment and (labelled is None or not _is_label(labelled[2])):
            yield _Entry(number, (), 0, "", may_be_comment)
            continue
        if labelled is None:
            raise UserError(
                f"{part.file}:{number}: expected `path label` or `path frames label`, the label from 0, found "
                f"`{line[:200]}`"
            )
        # `my video 12 5` is the video `my video 12`, or 12 frames of `my video`: the disk tells.
        names = [labelled[1]]
        with_frames = _LAST_INTEGER.fullmatch(labelled[1])
        if with_frames is not None:
            names.append(with_frames[1])
            if Path(with_frames[1]).suffix.lower() in VIDEO_SUFFIXES:
                names.reverse()
        label = _integer(part, number, labelled[2])
        yield _Entry(number, tuple(names), label, _stem(names[0]), may_be_comment)


def _is_label(text: str) -> bool:
    return len(text) <= 9 and int(text) < _MOST_CLASSES


def _integer(part: VideoList, line: int, label: str) -> int:
    if not _is_label(label):
        raise UserError(f"{part.file}:{line}: expected a label below {_MOST_CLASSES}, found {label[:20]}")
    return int(label)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _classes(labels: list[int | str], class_names: list[str] | None, num_classes: int | None) -> list[str]:
    if class_names is not None:
        if num_classes not in (None, len(class_names)):
            raise UserError(f"{num_classes}: the label map has {len(class_names)} classes", about="num_classes")
        return class_names
    names = sorted({label for label in labels if isinstance(label, str)})
    if names:
        if len(names) < len(set(labels)):
            raise UserError("the lists: one names its classes, the other numbers them; give a label map")
        if num_classes not in (None, len(names)):
            raise UserError(f"{num_classes}: the lists name {len(names)} classes", about="num_classes")
        return names
    return [str(number) for number in range(num_classes or max(labels) + 1)]


def _number(entry: _Entry, part: VideoList, classes: list[str], numbers: dict[str, int]) -> int:
    label = entry.label
    if isinstance(label, str):
        label = numbers.get(label, numbers.get(label.replace(" ", "_")))
        if label is None:
            raise UserError(f"{part.file}:{entry.line}: class `{entry.label}` is not in the label map")
    elif label >= len(classes):
        raise UserError(
            f"{part.file}:{entry.line}: label {label}, but there are {len(classes)} classes, counted from 0"
        )
    return label
