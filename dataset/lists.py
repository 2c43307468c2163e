"""Data sets that come as list files: Kinetics-400 in the forms it is handed around in, and anyone's own.

A list is a text file of lines `path label` or `path frames label` (MMAction's; the paths may hold
spaces, the frames are not used: the index knows), or the official Kinetics csv with the columns label,
youtube_id, time_start, time_end. Labels count from 0; the csv's are names.
"""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.splits import VIDEO_SUFFIXES, Files, Split, VideoRecord, read_lines
from utils.errors import UserError

_MOST_CLASSES = 100_000  # a larger label is no label: a number of frames in the wrong column, or a mistyped one
_LAST_INTEGER = re.compile(r"(.*[^\s,])[\s,]+(\d+)")


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


def read_lists(
    train: VideoList | None, test: VideoList, class_names: list[str] | None = None, num_classes: int | None = None
) -> Split:
    """The videos of two lists that are on disk; `train` None gives none to train on.

    A path without an extension, or with one under which there is no file, takes that of the file of
    this name that is there. Classes are `class_names`, a label map's; without, `num_classes` numbers;
    without either, as many as the largest label needs, or the csv's names in alphabetical order. Raises
    UserError naming file and line of what is malformed.
    """
    entries = {part: _read_list(part) for part in (train, test) if part is not None}
    labels = [entry.label for listed in entries.values() for entry in listed]
    classes = _classes(labels, class_names, num_classes)
    numbers = {name: number for number, name in enumerate(classes)}
    records: dict[VideoList, list[VideoRecord]] = {}
    missing = []
    for part, listed in entries.items():
        records[part] = []
        files = _FilesBelow(part.root)
        for entry in listed:
            label = _number(entry, part, classes, numbers)
            path = files.find(entry.names)
            if path is None:
                missing.append(os.path.join(part.root, entry.names[0]))
            else:
                records[part].append(VideoRecord(path, label, entry.group, entry.names[0]))
        if not records[part]:
            raise UserError(
                f"{part.file}: none of its {len(listed)} videos is under {part.root}; expected such as "
                f"{listed[0].names[0]}",
                about=f"{part.name}_list",
            )
        if files.other_extension:
            print(f"data: {files.other_extension} videos of {part.file} are on disk with another extension than listed")
    training = records.get(train, [])
    both = {record.path for record in training} & {record.path for record in records[test]}
    if both:
        print(f"note: {len(both)} videos are both trained and tested on, the first: {min(both)}")
    return Split(classes, training, records[test], missing, unlisted=[])


def read_label_map(file: Path) -> list[str]:
    """Class names, one a line, in the order of their labels."""
    names = [line for _, line in read_lines(file)]
    if not names:
        raise UserError(f"{file}: expected a class name a line, found none", about="label_map")
    return names


def _read_list(part: VideoList) -> list[_Entry]:
    if not part.file.is_file():
        raise UserError(
            f"{part.file}: no such file; expected lines `path label` or `path frames label`, or the official csv",
            about=f"{part.name}_list",
        )
    if not part.root.is_dir():
        raise UserError(f"{part.root}: no such folder; expected the videos of {part.file}", about=f"{part.name}_root")
    lines = list(read_lines(part.file))
    if not lines:
        raise UserError(f"{part.file}: names no video", about=f"{part.name}_list")
    if "youtube_id" in lines[0][1].split(","):
        return list(_csv_entries(part, lines))
    return list(_text_entries(part, lines))


def _csv_entries(part: VideoList, lines: list[tuple[int, str]]) -> Iterator[_Entry]:
    columns = next(csv.reader([lines[0][1]]))
    for wanted in ("label", "youtube_id", "time_start", "time_end"):
        if wanted not in columns:
            raise UserError(f"{part.file}:{lines[0][0]}: expected a column {wanted}, found {', '.join(columns)}")
    for number, line in lines[1:]:
        try:
            row = dict(zip(columns, next(csv.reader([line])), strict=True))
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (ValueError, OverflowError, csv.Error) as error:
            raise UserError(f"{part.file}:{number}: expected {','.join(columns)}, found `{line}`") from error
        label, video = row["label"], row["youtube_id"]
        # The usual download scripts name a file for its cut, or for the video alone, in a folder a class or in one.
        folders = (label, label.replace(" ", "_"), "")
        stems = (f"{video}_{start:06d}_{end:06d}", video)
        yield _Entry(number, tuple(os.path.join(f, s) for s in stems for f in folders), label, video)


def _text_entries(part: VideoList, lines: list[tuple[int, str]]) -> Iterator[_Entry]:
    for number, line in lines:
        labelled = _LAST_INTEGER.fullmatch(line)
        if labelled is None:
            raise UserError(
                f"{part.file}:{number}: expected `path label` or `path frames label`, the label from 0, found `{line}`"
            )
        # `my video 12 5` is the video `my video 12`, or 12 frames of `my video`: the disk tells.
        names = [labelled[1]]
        with_frames = _LAST_INTEGER.fullmatch(labelled[1])
        if with_frames is not None:
            names.append(with_frames[1])
            if Path(with_frames[1]).suffix.lower() in VIDEO_SUFFIXES:
                names.reverse()
        if len(labelled[2]) > 9 or int(labelled[2]) >= _MOST_CLASSES:
            raise UserError(f"{part.file}:{number}: expected a label below {_MOST_CLASSES}, found {labelled[2][:20]}")
        yield _Entry(number, tuple(names), int(labelled[2]), os.path.splitext(os.path.basename(names[0]))[0])


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


class _FilesBelow:
    """The videos below a folder. Each folder is listed once: cheaper than asking for each of 240,000 files."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._listings: dict[str, Files] = {}

    def find(self, names: tuple[str, ...]) -> str | None:
        """The path of the first of `names` that is there, with its own extension or another."""
        for name in names:
            folder, file = os.path.split(os.path.join(self._root, name))
            if folder not in self._listings:
                self._listings[folder] = _listing(folder)
            found = self._listings[folder].find(file)
            if found is not None:
                return os.path.join(folder, found)
        return None

    @property
    def other_extension(self) -> int:
        return sum(files.other_extension for files in self._listings.values())


def _listing(folder: str) -> Files:
    try:
        with os.scandir(folder) as entries:
            return Files(entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES)
    except OSError:
        return Files(())
