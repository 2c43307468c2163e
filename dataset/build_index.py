"""Build the index of a data set before the first training: in several jobs, if it is large.

    python -m dataset.build_index --dset kinetics400
    python -m dataset.build_index --dset kinetics400 --shard 3/16

The training scripts find the same index, and complete it: a start of one builds what is not there yet.
"""

import argparse
from pathlib import Path

from dataset.index import VideoIndex
from dataset.which_videos import WhichVideos, add_video_flags, find_videos
from utils.device import cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import cache_folder
from utils.script import run_script


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Find out what is in each video of a data set, as a training's start does.")
    add_video_flags(parser)
    # fmt: off
    add = parser.add_argument_group("index").add_argument
    add("--index-dir", metavar="FOLDER", help="where it is kept; not given: the cache folder, as in training")
    add("--verify", choices=("quick", "full"), default="quick",
        help="count packets if they can be trusted, or decode every file")
    add("--jobs", type=int, default=cpu_count(), metavar="N", help="processes")
    # fmt: on
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    return args


def main() -> int:
    args = parse_args()
    videos, missing, _ = find_videos(WhichVideos.of(args), args.jobs)
    paths = list(dict.fromkeys(video.path for video in videos))
    print(f"index: {len(paths)} videos, {len(missing)} listed videos are not on disk", flush=True)
    if args.shard is not None:
        paths = [path for path in paths if args.shard.has(path)]
        print(f"index: {len(paths)} of them in shard {args.shard.number} of {args.shard.count}", flush=True)
    folder = Path(args.index_dir) if args.index_dir else cache_folder()
    index = VideoIndex(folder / f"{args.dset}.json", args.verify == "full", args.shard)
    infos = index.lookup(paths, args.jobs)
    unreadable = [info.error for info in infos.values() if info.error]
    first = f", the first: {unreadable[0]}" if unreadable else ""
    print(
        f"index: {len(paths) - len(unreadable)} videos are known in {folder}, {len(unreadable)} cannot be read{first}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
