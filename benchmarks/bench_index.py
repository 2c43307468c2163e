"""Start-up on a large data set: the rate of a cold index, and the time of a warm one and of all before training.

    python -m benchmarks.bench_index ../shared/clips/hmdb51 ../shared/clips/ucf101 ../shared/clips/kinetics400

Makes hard links (or copies, across file systems) of the given folders' videos until there are
--files of them, in a temporary folder, and looks them up in a new index: cold, over --cold of them, by their
packets and decoded whole (--verify full), in turn, --rounds times; then warm, over all, five times. Last, what
train_kinetics.py does with them as lists: read the lists, look for the files, look them up, make the loaders.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import train_kinetics
from dataset.index import VideoIndex, _entry, _stamp, probe
from dataset.splits import VIDEO_SUFFIXES
from utils.device import cpu_count
from utils.run_folder import RunFolder
from utils.runtime import ALONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--cold", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=cpu_count())
    args = parser.parse_args()
    sources = [p for folder in args.folders for p in sorted(folder.rglob("*")) if p.suffix.lower() in VIDEO_SUFFIXES]
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for number in range(args.files):
            source = sources[number % len(sources)]
            target = Path(temporary) / f"{number:06d}{source.suffix}"
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
            paths.append(str(target))

        taken, found = {False: [], True: []}, {}
        for _ in range(args.rounds):
            for whole, seconds in taken.items():
                start = time.perf_counter()
                found[whole] = VideoIndex(None, verify_full=whole).lookup(paths[: args.cold], args.workers)
                seconds.append(time.perf_counter() - start)
        frames = sum(info.frames for info in found[True].values())
        for whole, name in ((True, "decoded whole"), (False, "by packets")):
            seconds = statistics.median(taken[whole])
            print(
                f"cold, {name}: {args.cold} files, {frames} frames, {args.workers} workers: "
                f"{args.cold / seconds:.0f} files/s, {frames / seconds / args.workers:.0f} frames/s a worker"
            )
        ratios = [a / b for a, b in zip(taken[True], taken[False], strict=True)]
        print(
            f"cold, by packets: {statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"the entries are {'the same' if found[True] == found[False] else 'NOT the same'}"
        )

        # The rest of the index is filled in: decoding all 10,000 would only repeat the figure above.
        infos = [probe(source) for source in sources]
        index = VideoIndex(Path(temporary) / "warm.json")
        index._entries = {
            path: _entry(path, _stamp(path), infos[number % len(sources)], True) for number, path in enumerate(paths)
        }
        index._save()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            found = VideoIndex(Path(temporary) / "warm.json").lookup(paths, args.workers)
            times.append(time.perf_counter() - start)
        size = (Path(temporary) / "warm.json").stat().st_size
        assert len(found) == args.files
        figures = {"warm_files": args.files, "warm_seconds_median": statistics.median(times), "index_bytes": size}
        figures["start_seconds_median"] = statistics.median(start_of_training(paths, Path(temporary)) for _ in range(5))
        print(json.dumps(figures))


def start_of_training(paths: list[str], folder: Path) -> float:
    """Seconds that train_kinetics.py takes to find these files as two lists and make loaders, the index at hand."""
    index = folder / "index"
    index.mkdir(exist_ok=True)
    if not (index / "list.json").exists():
        shutil.copyfile(folder / "warm.json", index / "list.json")
    cut = len(paths) * 9 // 10
    for name, part in (("train", paths[:cut]), ("val", paths[cut:])):
        (folder / f"{name}.txt").write_text(
            "".join(f"{os.path.basename(path)} {n % 400}\n" for n, path in enumerate(part))
        )
    flags = f"--dset list --train-list {folder}/train.txt --val-list {folder}/val.txt --index-dir {index} -j 0"
    sys.argv = ["train_kinetics.py", *flags.split(), "--run-dir", str(folder / "run")]
    args = train_kinetics.parse_args()
    run = RunFolder(Path(args.run_dir), resuming=True, overwrite=False)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        _, *videos = train_kinetics.find_videos(args, run, None)
        data = train_kinetics.load_data(args, *videos, ALONE, None)
    assert len(data.clip_ids) == cut
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
