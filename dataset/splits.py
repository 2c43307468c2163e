"""Which videos, with which labels: one reader per official layout.

Each reader returns a `Split`: classes and labels come from the official files, so anyone's data in
the same layout works. To add a data set, add a reader here and its line in the training script.
"""

import os
import random
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dataset.label_map import check_names
from dataset.text_files import read_lines
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
    return _read(data_root, annotation_path, split, _hmdb51_lists, _hmdb51_group)


def _hmdb51_lists(annotation_path: str | Path, split: int) -> tuple[list[str], list[_Listed]]:
    annotation_path = existing_folder(annotation_path, "annotation_path", "the files <class>_test_split<n>.txt")
    suffix = f"_test_split{split}.txt"
    try:
        names = [name for name in os.listdir(annotation_path) if name.endswith(suffix) and not is_of_macos(name)]
    except OSError as error:
        raise UserError(f"{annotation_path}: cannot be read ({error.strerror})", about="annotation_path") from error
    if not names:
        raise UserError(f"{annotation_path}: expected files <class>{suffix}, found none", about="annotation_path")
    classes = sorted(name.removesuffix(suffix) for name in names)
    lists = [annotation_path / f"{name}{suffix}" for name in classes]
    listed = []
    for label, (name, file) in enumerate(zip(classes, lists, strict=True)):
        for number, line in read_lines(file):
            fields = line.strip().rsplit(maxsplit=1)
            if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
                raise UserError(f"{file}:{number}: expected `video 0|1|2`, found `{line.strip()}`")
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
    return _read(data_root, annotation_path, split, _ucf101_lists, _ucf101_group)


def _ucf101_lists(annotation_path: str | Path, split: int) -> tuple[list[str], list[_Listed]]:
    annotation_path = existing_folder(
        annotation_path, "annotation_path", "classInd.txt, trainlist0n.txt and testlist0n.txt"
    )
    class_file = annotation_path / "classInd.txt"
    numbered = []
    for number, line in read_lines(class_file):
        fields = line.strip().split(maxsplit=1)
        if len(fields) != 2 or not re.fullmatch(r"\d{1,9}", fields[0]):
            raise UserError(f"{class_file}:{number}: expected `index class`, found `{line.strip()}`")
        numbered.append((int(fields[0]), fields[1]))
    classes = [name for _, name in sorted(numbered)]
    check_names(class_file, classes)
    labels = {name: label for label, name in enumerate(classes)}
    listed = []
    for part in ("train", "test"):
        list_file = annotation_path / f"{part}list{split:02d}.txt"
        for number, line in read_lines(list_file):
            # Only the training list carries an index behind the path; the class is the folder's name.
            name = re.sub(r"\s+\d+$", "", line.strip())
            video_class = name.split("/", 1)[0]
            if "/" not in name or video_class not in labels:
                raise UserError(
                    f"{list_file}:{number}: expected `class/video` of a class in {class_file}, found `{name}`"
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


def existing_folder(path: str | Path, parameter: str, expected: str) -> Path:
    """`path`, which must be a folder. Raises UserError about `parameter`, which was to hold what is `expected`."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return Path(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", about=parameter) from error
    raise UserError(f"{path}: no such folder; expected {expected}", about=parameter)


def listed_videos(
    dset: str, data_root: str | Path, annotation_path: str | Path, splits: Iterable[int]
) -> tuple[list[str], list[str]]:
    """(paths of the videos that any of the splits lists, "class/file" of the listed videos that are not on disk).

    dset: "hmdb51" or "ucf101", for the layout. Raises UserError as its reader does.
    """
    data_root = existing_folder(data_root, "data_root", "the class folders with the videos")
    read = {"hmdb51": _hmdb51_lists, "ucf101": _ucf101_lists}[dset]
    names = {}
    for split in splits:
        _, listed = read(annotation_path, split)
        names.update(dict.fromkeys(line.name for line in listed))
    on_disk = FilesBelow(data_root)
    files = {name: on_disk.find(name) for name in names}
    found = [file for file in files.values() if file is not None]
    if not found:
        raise UserError(
            f"{data_root}: holds none of the {len(names)} listed videos, such as {min(names)}", about="data_root"
        )
    return found, [name for name, file in files.items() if file is None]


class FilesBelow:
    """The files below a folder, to be found by the names that lists give them. Each folder is listed once: cheaper than
    asking for each of 240,000 files."""

    def __init__(self, root: str | Path):
        self._root = str(root)
        self._folders: dict[str, _Folder] = {}
        self.other_extension = 0  # names found with another extension than asked for

    def find(self, *names: str) -> str | None:
        """The path of the first of `names` that is there: a file of exactly this name, whatever it is; else the first
        video in alphabetical order of this name with another extension, or with one if the name has none.

        A file in a folder that may not be looked into counts as there: reading it tells why it cannot be read.
        """
        hidden = None
        for name in names:
            for spelling in _spellings(name):
                folder, file = os.path.split(os.path.join(self._root, spelling))
                if folder not in self._folders:
                    self._folders[folder] = _Folder(folder)
                found, is_sure = self._folders[folder].find(file)
                if found is not None and is_sure:
                    self.other_extension += found != file and _has_video_suffix(file)
                    return os.path.join(folder, found)
                if found is not None and hidden is None:
                    hidden = os.path.join(folder, found)
        return hidden

    def videos(self, name: str) -> list[str] | None:
        """Paths of the videos in the folder `name`; None if there is no such folder or it may not be looked into."""
        folder = os.path.join(self._root, name)
        if folder not in self._folders:
            self._folders[folder] = _Folder(folder)
        files = self._folders[folder].names
        if files is None:
            return None
        return [os.path.join(folder, file) for file in files if _has_video_suffix(file) and not is_of_macos(file)]


class _Folder:
    """The files in a folder."""

    def __init__(self, path: str):
        self._path = path
        self._may_be_listed = True
        self.names: set[str] | None = None  # None: no such folder, or it may not be listed
        self._by_stem: dict[str, str] = {}  # name without the extension: a video of this name
        try:
            with os.scandir(path) as entries:
                self.names = {entry.name for entry in entries if not _is_folder(entry)}
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            self._may_be_listed = False
        for name in sorted(filter(_has_video_suffix, self.names or ())):
            self._by_stem.setdefault(os.path.splitext(name)[0], name)

    def find(self, name: str) -> tuple[str | None, bool]:
        """(name of the file, whether it is sure to be there)."""
        if not self._may_be_listed:  # it may allow to open a file all the same
            try:
                os.stat(os.path.join(self._path, name))
                return name, True
            except (FileNotFoundError, NotADirectoryError):
                return None, True
            except OSError:
                return name, False
        if name in (self.names or ()):
            return name, True
        return self._by_stem.get(os.path.splitext(name)[0] if _has_video_suffix(name) else name), True


def _has_video_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def is_of_macos(name: str) -> bool:
    """Whether macOS has written the file beside another, for what the file system cannot hold."""
    return name.startswith("._")


def _is_folder(entry: os.DirEntry) -> bool:
    # What a link leads to costs a question to the disk: only asked where the name leaves a doubt.
    try:
        return entry.is_dir(follow_symlinks=not _has_video_suffix(entry.name))
    except OSError:
        return False


def _spellings(name: str) -> Iterator[str]:
    """`name`, and how the same name is written on other systems: in quotes, with backslashes, with accents as
    characters of their own (macOS) or not, in the 8-bit characters of Windows."""
    yield name
    plain = name[1:-1] if len(name) > 2 and name[0] == name[-1] == '"' else name
    plain = plain.replace("\\", "/")
    if any("\udc80" <= character <= "\udcff" for character in plain):  # bytes that are no UTF-8
        plain = os.fsencode(plain).decode("cp1252", errors="replace")
    others = {plain} if plain.isascii() else {plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))}
    yield from sorted(others - {name})


def note_repeats(what: str, listed: Iterable[tuple[str, int]]) -> None:
    """Print how many of the videos, (path, label), are listed several times."""
    labels = defaultdict(list)
    for path, label in listed:
        labels[os.path.abspath(path)].append(label)
    several = {path: sorted(set(of)) for path, of in labels.items() if len(of) > 1}
    with_labels = {path: of for path, of in several.items() if len(of) > 1}
    for paths, meaning in (
        ([path for path in several if path not in with_labels], "more than once"),
        ([f"{path} ({', '.join(map(str, of))})" for path, of in with_labels.items()], "with more than one label"),
    ):
        if paths:
            print(f"note: {what} lists {len(paths)} videos {meaning}, and each line counts; the first: {paths[0]}")


def _read(data_root: str | Path, annotation_path: str | Path, split: int, read_lists, group) -> Split:
    """Hold the lists, which `read_lists` reads, against the disk. group: name -> source of the video."""
    data_root = existing_folder(data_root, "data_root", "the class folders with the videos")
    classes, listed = read_lists(annotation_path, split)
    what = f"split {split} in {annotation_path}"
    if not listed:
        raise UserError(f"{what}: the lists name no video")
    on_disk = FilesBelow(data_root)
    parts = {"train": [], "test": []}
    missing, matched, part_of = [], set(), {}
    for name, label, part in listed:
        file = on_disk.find(name)
        if part is not None and part_of.setdefault(file or name, part) != part:
            raise UserError(f"{what}: {name} is listed both to train and to test on")
        if file is None:
            missing.append(name)
            continue
        matched.add(file)
        if part is not None:
            parts[part].append(VideoRecord(file, label, group(name), name))
    unlisted = []
    for name in classes:
        videos = on_disk.videos(name)
        if videos == [] and not any(os.path.dirname(file) == str(data_root / name) for file in matched):
            raise UserError(f"{data_root / name}: class folder without a video; fill it or remove it")
        unlisted += [os.path.relpath(video, data_root) for video in videos or () if video not in matched]
    for wanted in ("train", "test"):
        if not parts[wanted]:
            raise UserError(
                f"{data_root}: holds none of the videos to {wanted} on of {what}; expected such as {listed[0].name}",
                about="data_root",
            )
        note_repeats(f"{what}, to {wanted} on,", [(video.path, video.label) for video in parts[wanted]])
    if on_disk.other_extension:
        print(f"data: {on_disk.other_extension} videos of {what} are on disk with another extension than listed")
    return Split(classes, parts["train"], parts["test"], missing, sorted(unlisted))
