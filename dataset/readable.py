"""From a split to tables of the videos that can be read. The rest is printed and listed in files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dataset.clips import VideoTable
from dataset.index import VideoIndex
from dataset.splits import Split, cut_validation
from utils.device import cpu_count
from utils.errors import UserError


def readable_videos(
    split: Split,
    index: VideoIndex,
    strict: bool,
    write_list: Callable[[str, Sequence[str]], Path] | None,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[VideoTable, VideoTable, VideoTable]:
    """The readable videos to train, to validate and to test on.

    strict: raise UserError if any video cannot be read.
    write_list: takes a file name and lines and returns the file; None keeps no lists.
    val_fraction, seed: as for `dataset.splits.cut_validation`, of the training videos.

    Prints how many videos are missing, not on the lists, unreadable or damaged, how many classes have no video to
    train on, and the first of each. Raises UserError if no video to train on, or none to test on, can be read.
    """
    infos = index.lookup([record.path for record in split.train + split.test], workers=cpu_count())
    print(f"data: {split.classes_on_disk()} of {len(split.classes)} classes have videos on disk")
    unreadable = [info.error for info in infos.values() if info.error]
    damaged = [path for path, info in infos.items() if info.damaged_packets]
    for name, lines, meaning in (
        ("missing", split.missing, "listed videos are not on disk"),
        ("unlisted", split.unlisted, "videos on disk are on no list"),
        ("unreadable", unreadable, "videos cannot be read and are left out"),
        ("damaged", damaged, "videos have damaged packets; their decodable frames are used"),
    ):
        listed = "" if write_list is None else f" (all in {write_list(f'{name}.txt', lines)})"
        if lines:
            print(f"data: {len(lines)} {meaning}, the first: {lines[0]}{listed}")
    if unreadable and strict:
        raise UserError(f"--strict: {len(unreadable)} videos cannot be read, the first: {unreadable[0]}")

    train, test = ([video for video in part if not infos[video.path].error] for part in (split.train, split.test))
    for part, before, now in (("train", split.train, train), ("test", split.test, test)):
        if not now and (before or part == "test"):
            first = f", the first: {unreadable[0]}" if unreadable else ""
            raise UserError(f"none of the {len(before)} videos to {part} on can be read{first}")
    train, val = cut_validation(train, val_fraction, seed) if train and val_fraction > 0 else (train, [])
    trained = {video.label for video in train}
    untrained = [name for label, name in enumerate(split.classes) if label not in trained]
    if train and untrained:
        print(
            f"note: {len(untrained)} of {len(split.classes)} classes have no video to train on, such as {untrained[0]}"
        )
    return tuple(VideoTable(part, [infos[video.path] for video in part]) for part in (train, val, test))
