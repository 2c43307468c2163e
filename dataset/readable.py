"""What a start says of the files: missing, not listed, unreadable, damaged."""

from dataset.index import VideoInfo
from dataset.splits import Split
from utils.errors import UserError
from utils.run_folder import RunFolder


def report_files(run: RunFolder | None, split: Split, infos: dict[str, VideoInfo], strict: bool) -> None:
    """Print counts and the first of each kind; every name goes to a file in the run folder,
    where there is one to write to.

    Raises UserError under `strict` where a video cannot be read.
    """
    print(f"data: {split.classes_on_disk()} of {len(split.classes)} classes have videos on disk")
    unreadable = [info.error for info in infos.values() if info.error]
    damaged = [path for path, info in infos.items() if info.damaged_packets]
    for name, lines, meaning in (
        ("missing", split.missing, "listed videos are not on disk"),
        ("unlisted", split.unlisted, "videos on disk are on no list"),
        ("unreadable", unreadable, "videos cannot be read and are left out"),
        ("damaged", damaged, "videos have damaged packets; their decodable frames are used"),
    ):
        where = "" if run is None else f" (all in {run.write_list(f'{name}.txt', lines)})"
        if lines:
            print(f"data: {len(lines)} {meaning}, the first: {lines[0]}{where}")
    if unreadable and strict:
        raise UserError(f"--strict: {len(unreadable)} videos cannot be read, the first: {unreadable[0]}")
