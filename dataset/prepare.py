"""Convert a data set once, so that afterwards a frame costs only itself.

    python -m dataset.prepare --dset hmdb51 --data-root data/hmdb51/videos --out data/hmdb51-prepared
    python train_fusion.py    --dset hmdb51 --data-root data/hmdb51-prepared ...

Each video becomes a QuickTime file (.mov) of JPEGs with its own path and name below --out, which any player shows.
The frames are those that `dataset.decode.decode_frames` gives, upright, scaled down to --short-side if they are
larger. docs/data.md says when this pays and what it costs in disk.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
import functools
import os
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

from dataset.convert import LARGEST_RATE, SUFFIX, Outcome, Settings, Task, convert_or_report
from dataset.demo import DEMOS, copy_lists
from dataset.manifest import MANIFEST, Manifest, conclude
from dataset.pool import map_in_processes
from dataset.shards import ShardResults, listing
from dataset.splits import VIDEO_SUFFIXES
from dataset.which_videos import Found, WhichVideos, add_video_flags, find_videos
from utils.device import cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import writing
from utils.lock import locked
from utils.progress import Progress
from utils.script import run_script

_SAMPLE = 16  # videos that --dry-run converts


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Convert a data set once into files whose frames are read one by one.")
    # fmt: off
    add = add_video_flags(parser)
    add("--strict", action=argparse.BooleanOptionalAction, default=False, help="stop at a video that cannot be read")
    add("--index-dir", help="not used: the videos are decoded anyway")
    add("--verify", choices=("quick", "full"), default="quick",
        help="what is there already: its index, first and last frame are checked, or every frame")
    add = parser.add_argument_group("prepared files").add_argument
    add("--out", required=True, metavar="FOLDER", help="where the prepared files go")
    add("--short-side", type=int, default=256, metavar="PIXELS", help="larger frames are scaled down to this")
    add("--quality", type=int, default=90, metavar="Q", help="of JPEG, 1 to 100")
    add("--limit-fps", type=float, metavar="FPS", help="keep so many frames per second at most; default: every frame")
    add("--jobs", type=int, default=cpu_count(), metavar="N", help="processes")
    add("--dry-run", action="store_true", help="convert a sample, print the size and time of all, write nothing")
    # fmt: on
    args = parser.parse_args()
    if args.short_side < 16:
        raise UserError(f"--short-side must be at least 16 pixels, got {args.short_side}")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality must be 1 to 100, got {args.quality}")
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    if args.limit_fps is not None and not 0.01 <= args.limit_fps <= LARGEST_RATE:
        raise UserError(f"--limit-fps must be 0.01 to {LARGEST_RATE}, got {args.limit_fps:g}")
    return args


def main() -> int:
    args = parse_args()
    settings = Settings(args.short_side, args.quality, args.limit_fps)
    out = Path(args.out)
    videos, missing, source = find_videos(WhichVideos.of(args), args.jobs)
    targets = targets_of(videos, out / "videos" if args.dset in DEMOS else out)
    names = {video: str(target.relative_to(out)) for video, target in targets.items()}
    print(f"prepare: {len(targets)} videos, {len(missing)} listed videos are not on disk", flush=True)
    own = targets
    if args.shard is not None:
        own = {video: target for video, target in targets.items() if args.shard.has(names[video])}
        print(f"prepare: {len(own)} of them in shard {args.shard.number} of {args.shard.count}", flush=True)
    if args.dry_run:
        if own:  # a shard of few videos may have none
            predict(own, settings, args.jobs)
        return 0
    listed = listing(names.values())
    with locked(_made(out), shared=args.shard is not None, about="out"):
        manifest = Manifest(out, settings, source, listed, args.shard)
        if args.shard is None:
            results = prepare(targets, manifest, args.jobs, args.strict, args.verify == "full")
            conclude(manifest, results, missing)
        else:
            shards = ShardResults(out, args.shard, listed)
            with locked(_made(shards.own_folder), about="out"):
                manifest.files |= {name: found for name, found in shards.begin().items() if isinstance(found, list)}
                shards.end(prepare(own, manifest, args.jobs, args.strict, args.verify == "full"))
            results, unfinished = shards.collect()
            if unfinished:
                print(
                    f"prepare: shard {args.shard.number} of {args.shard.count} is done; not done, or done with other "
                    f"videos: {', '.join(map(str, unfinished))}. The last one writes {out / MANIFEST}"
                )
            else:
                conclude(manifest, {name: results[name] for name in names.values()}, missing)
        if args.dset in DEMOS:
            copy_lists(Path(source["data_root"]), out)
    return 0


def targets_of(videos: list[Found], out: Path) -> dict[str, Path]:
    """Source -> target: the path below the root, with the suffix .mov.

    Raises UserError if the same lists would not find a target, or if two videos have the same one.
    """
    targets: dict[str, Path] = {}
    taken: dict[str, str] = {}
    for path, root in videos:
        below = os.path.normpath(os.path.relpath(path, root)) if path.startswith(root) else path
        if os.path.isabs(below) or below.startswith(".."):
            raise UserError(f"{path}: lies outside of {root}, so the same list could not find its prepared file")
        stem, suffix = os.path.splitext(below)
        target = (stem if suffix.lower() in VIDEO_SUFFIXES else below) + SUFFIX
        if taken.setdefault(target, path) != path:
            raise UserError(
                f"{taken[target]} and {path} would both become {out / target}; "
                "prepare the two lists into two folders, or rename one of the videos"
            )
        targets[path] = out / target
    return targets


def _made(folder: Path) -> Path:
    with writing(folder, about="out"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare(
    targets: dict[str, Path], manifest: Manifest, jobs: int, strict: bool, verify_full: bool
) -> dict[str, list[int] | str]:
    """Convert what is not there yet. Returns, by the target's path below the folder, its bytes and frames, or the error
    of an unreadable video.

    Raises UserError if the disk is full, or, under `strict`, at the first unreadable video.
    """
    own = {f".{target.name}.tmp" for target in targets.values()}
    _remove_partial_files(manifest.folder, own)
    for folder in sorted({target.parent for target in targets.values()}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    tasks = [Task(source, str(target), manifest.settings, manifest.known(target)) for source, target in targets.items()]
    outcomes: dict[str, Outcome] = {}
    written = 0
    start = time.monotonic()
    convert_one = functools.partial(convert_or_report, verify_full=verify_full)
    try:
        with (
            closing(map_in_processes(convert_one, tasks, jobs)) as results,
            Progress(len(tasks), "preparing videos", unit="video") as progress,
        ):
            for task, outcome in results:
                if outcome is None:
                    outcome = Outcome(error=f"{task.source}: decoding it kills the decoder's process")
                if outcome.disk_error:
                    raise UserError(
                        f"{task.target}: {outcome.disk_error}; {len(outcomes)} videos are done and stay good: "
                        "make room and start the same command again"
                    )
                if outcome.error and strict:
                    raise UserError(f"--strict: {outcome.error}")
                outcomes[task.source] = outcome
                written += outcome.file_bytes
                rate = len(outcomes) / max(time.monotonic() - start, 1e-3)
                progress.advance(rate=f"{rate:.1f} videos/s", there=f"{written / 1e9:.2f} GB")
    finally:  # Ctrl-C, SIGTERM, a full disk: nothing half-written stays
        _remove_partial_files(manifest.folder, own)
    results = {}
    for source, target in targets.items():
        outcome = outcomes[source]
        results[manifest.name_of(target)] = outcome.error or [outcome.file_bytes, outcome.frames]
    return results


def _remove_partial_files(folder: Path, names: set[str]) -> None:
    for partial in folder.rglob(f".*{SUFFIX}.tmp"):
        if partial.name in names:  # not of a shard that is at work
            partial.unlink(missing_ok=True)


def predict(targets: dict[str, Path], settings: Settings, jobs: int) -> None:
    """Convert videos spread over the data set and print what all of them would take."""
    sources = sorted(targets)
    sample = sources[:: max(1, len(sources) // _SAMPLE)][:_SAMPLE]
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(s, f"{folder}/{n}{SUFFIX}", settings, keep=False) for n, s in enumerate(sample)]
        done = {task.source: outcome for task, outcome in map_in_processes(convert_or_report, tasks, jobs)}
    good = {source: outcome for source, outcome in done.items() if outcome is not None and outcome.frames}
    if not good:
        first = next(iter(done.values()))
        raise UserError(f"--dry-run: none of {len(sample)} videos could be converted, the first: {first}")
    share = sum(map(_size_of, sources)) / sum(map(_size_of, good))  # of all bytes to the sample's
    size = share * sum(outcome.file_bytes for outcome in good.values())
    seconds = share * sum(outcome.seconds for outcome in good.values()) / jobs
    frames = sum(outcome.frames for outcome in good.values())
    print(
        f"prepare: from {len(good)} videos: about {size / 1e9:.2f} GB "
        f"({sum(o.file_bytes for o in good.values()) / frames / 1e3:.1f} KB a frame) and "
        f"{seconds / 60:.1f} minutes with --jobs {jobs}"
    )
    existing = next(folder for folder in next(iter(targets.values())).absolute().parents if folder.exists())
    print(f"prepare: {shutil.disk_usage(existing).free / 1e9:.2f} GB are free there")


def _size_of(path: str) -> int:
    return os.stat(path).st_size


if __name__ == "__main__":
    run_script(main)
