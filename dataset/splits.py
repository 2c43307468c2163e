"""Which videos, with which labels: one reader per official layout.

Each reader returns a `Split`: classes and labels come from the official files, so anyone's data in
the same layout works. To add a data set, add a reader here and its line in the training script.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

VIDEO_SUFFIXES = {
    ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv",
    ".qt", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip


@dataclass(frozen=True)
class VideoRecord:
    path: str
    label: int
    group: str  # source of the video: clips of one source must not be on both sides of a split
    name: str = ""  # its path in the data set, wherever that is; the path itself if not given


@dataclass(frozen=True)
class Split:
    """The videos of one official split that are on disk."""

    classes: list[str]
    train: list[VideoRecord]
    test: list[VideoRecord]
    missing: list[str]  # "class/file" that the lists name and the disk lacks
    unlisted: list[str]  # "class/file" on disk that no list of this split names

    def classes_on_disk(self) -> int:
        return len({record.label for record in self.train + self.test})


class _Listed(NamedTuple):
    """A line of a list."""

    name: str  # class/file
    label: int
    part: str | None  # train, test, or in neither


def read_hmdb51(data_root: str | Path, annotation_path: str | Path, split: int) -> Split:
    """HMDB-51's layout: `data_root/<class>/*.avi` and `annotation_path/<class>_test_split<split>.txt`,
    lines `file.avi n` with n 1 for training, 2 for testing, 0 for neither. Classes in alphabetical order.

    A listed video that is on disk with another extension only (as `dataset.prepare` writes it) is that file.
    Raises UserError naming the file or folder that is missing, empty or malformed.
    """
    data_root = _folder(data_root, "data_root", "the class folders with the videos")
    classes, listed = _hmdb51_lists(annotation_path, split)
    return _match(data_root, classes, listed, f"split {split} in {annotation_path}", _hmdb51_group)


def _hmdb51_lists(annotation_path: str | Path, split: int) -> tuple[list[str], list[_Listed]]:
    annotation_path = _folder(annotation_path, "annotation_path", "the files <class>_test_split<n>.txt")
    suffix = f"_test_split{split}.txt"
    lists = sorted(annotation_path.glob(f"*{suffix}"), key=lambda file: file.name.removesuffix(suffix))
    if not lists:
        raise UserError(f"{annotation_path}: expected files <class>{suffix}, found none", about="annotation_path")
    classes = [file.name.removesuffix(suffix) for file in lists]
    listed = []
    for label, (name, file) in enumerate(zip(classes, lists, strict=True)):
        for number, line in read_lines(file):
            fields = line.rsplit(maxsplit=1)
            if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
                raise UserError(f"{file}:{number}: expected `video 0|1|2`, found `{line}`")
            listed.append(_Listed(f"{name}/{fields[0]}", label, {"0": None, "1": "train", "2": "test"}[fields[1]]))
    return classes, listed


def _hmdb51_group(name: str) -> str:
    # <source>_<class>_<6 properties>_<number>.avi: clips of one film share their source.
    video_class, file = name.split("/", 1)
    return file.rpartition(f"_{video_class}_")[0] or file


def read_ucf101(data_root: str | Path, annotation_path: str | Path, split: int) -> Split:
    """UCF-101's layout: `data_root/<class>/*.avi` and in `annotation_path` classInd.txt (`index class`),
    trainlist0<split>.txt (`class/file.avi index`) and testlist0<split>.txt (`class/file.avi`).

    A listed video that is on disk with another extension only (as `dataset.prepare` writes it) is that file.
    Raises UserError naming the file or folder that is missing, empty or malformed.
    """
    data_root = _folder(data_root, "data_root", "the class folders with the videos")
    classes, listed = _ucf101_lists(annotation_path, split)
    return _match(data_root, classes, listed, f"split {split} in {annotation_path}", _ucf101_group)


def _ucf101_lists(annotation_path: str | Path, split: int) -> tuple[list[str], list[_Listed]]:
    annotation_path = _folder(annotation_path, "annotation_path", "classInd.txt, trainlist0n.txt and testlist0n.txt")
    class_file = annotation_path / "classInd.txt"
    numbered = []
    for number, line in read_lines(class_file):
        fields = line.split(maxsplit=1)
        if len(fields) != 2 or not fields[0].isdigit():
            raise UserError(f"{class_file}:{number}: expected `index class`, found `{line}`")
        numbered.append((int(fields[0]), fields[1]))
    classes = [name for _, name in sorted(numbered)]
    labels = {name: label for label, name in enumerate(classes)}
    listed = []
    for part in ("train", "test"):
        list_file = annotation_path / f"{part}list{split:02d}.txt"
        for number, line in read_lines(list_file):
            # Only the training list carries an index behind the path; the class is the folder's name.
            name = re.sub(r"\s+\d+$", "", line)
            video_class = name.split("/", 1)[0]
            if "/" not in name or video_class not in labels:
                raise UserError(
                    f"{list_file}:{number}: expected `class/video` of a class in {class_file}, found `{line}`"
                )
            listed.append(_Listed(name, labels[video_class], part))
    return classes, listed


def _ucf101_group(name: str) -> str:
    # v_<class>_g<group>_c<clip>.avi: a group has one actor and background.
    return re.sub(r"_c\d+\.\w+$", "", name.split("/", 1)[1])


def cut_validation(
    records: list[VideoRecord], fraction: float, seed: int
) -> tuple[list[VideoRecord], list[VideoRecord]]:
    """(training, validation): whole groups moved to validation until it holds `fraction` of the videos."""
    groups = sorted({record.group for record in records})
    if len(groups) < 2:
        raise UserError(
            f"{fraction:g}: needs at least 2 source groups to cut, the training split has {len(groups)}",
            about="val_fraction",
        )
    random.Random(f"validation/{seed}").shuffle(groups)
    sizes = Counter(record.group for record in records)
    chosen, count = set(), 0
    for group in groups[:-1]:
        if count >= fraction * len(records):
            break
        chosen.add(group)
        count += sizes[group]
    return [r for r in records if r.group not in chosen], [r for r in records if r.group in chosen]


def drop(split: Split, paths: Iterable[str]) -> Split:
    """The split without some files."""
    gone = set(paths)
    return replace(
        split,
        train=[record for record in split.train if record.path not in gone],
        test=[record for record in split.test if record.path not in gone],
    )


def _folder(path: str | Path, parameter: str, expected: str) -> Path:
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; expected {expected}", about=parameter)
    return Path(path)


def read_lines(file: Path) -> Iterable[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def listed_videos(
    dset: str, data_root: str | Path, annotation_path: str | Path, splits: Iterable[int]
) -> tuple[list[str], list[str]]:
    """(paths of the videos that any of the splits lists, "class/file" of the listed videos that are not on disk).

    dset: "hmdb51" or "ucf101", for the layout. Raises UserError as its reader does.
    """
    data_root = _folder(data_root, "data_root", "the class folders with the videos")
    read = {"hmdb51": _hmdb51_lists, "ucf101": _ucf101_lists}[dset]
    names, classes = {}, []
    for split in splits:
        classes, listed = read(annotation_path, split)
        names.update(dict.fromkeys(line.name for line in listed))
    on_disk = _on_disk(data_root, classes)
    files = {name: on_disk.find(name) for name in names}
    found = [str(data_root / file) for file in files.values() if file is not None]
    if not found:
        raise UserError(
            f"{data_root}: holds none of the {len(names)} listed videos, such as {min(names)}", about="data_root"
        )
    return found, [name for name, file in files.items() if file is None]


class Files:
    """Names of files, to be found under their own extension or another of a video."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names)
        self._by_stem = {}
        for name in sorted(self.names):
            self._by_stem.setdefault(os.path.splitext(name)[0], name)
        self.other_extension = 0  # names found with another extension than asked for

    def find(self, name: str) -> str | None:
        """`name` if it is there, else the first file in alphabetical order of another extension. A name
        without the extension of a video takes that of the file."""
        if name in self.names:
            return name
        stem, suffix = os.path.splitext(name)
        is_video = suffix.lower() in VIDEO_SUFFIXES
        found = self._by_stem.get(stem if is_video else name)
        self.other_extension += found is not None and is_video
        return found


def _on_disk(data_root: Path, classes: list[str]) -> Files:
    """The videos "class/file" in the folders of the classes."""
    on_disk = []
    for name in classes:
        folder = data_root / name
        if not folder.is_dir():
            continue
        try:
            files = [file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES]
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
        if not files:
            raise UserError(f"{folder}: class folder without a video; fill it or remove it")
        on_disk.extend(f"{name}/{file.name}" for file in files)
    return Files(on_disk)


def _match(data_root: Path, classes: list[str], listed: list[_Listed], what: str, group) -> Split:
    """Hold the lists against the disk."""
    on_disk = _on_disk(data_root, classes)
    parts = {"train": [], "test": []}
    missing, matched = [], set()
    part_of = {}
    for name, _, part in listed:
        if part is not None and part_of.setdefault(name, part) != part:
            raise UserError(f"{what}: {name} is listed both to train and to test on")
    for name, label, part in listed:
        file = on_disk.find(name)
        if file is None:
            missing.append(name)
            continue
        matched.add(file)
        if part is not None:
            parts[part].append(VideoRecord(str(data_root / file), label, group(name), name))
    if not listed:
        raise UserError(f"{what}: the lists name no video")
    for wanted in ("train", "test"):
        if not parts[wanted]:
            raise UserError(
                f"{data_root}: holds none of the videos to {wanted} on of {what}; expected such as {listed[0].name}",
                about="data_root",
            )
    if on_disk.other_extension:
        print(f"data: {on_disk.other_extension} videos of {what} are on disk with another extension than listed")
    unlisted = sorted(on_disk.names - matched)
    return Split(classes, parts["train"], parts["test"], missing, unlisted)
