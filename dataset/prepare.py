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
import errno
import functools
import io
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import av
import numpy
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dataset.container import VideoError, open_video, reason, video_stream
from dataset.decode import TimedFrame, every_frame, timed_frames
from dataset.demo import DEMOS, copy_lists
from dataset.index import probe
from dataset.jpeg_video import marked
from dataset.pool import map_in_processes
from dataset.shards import SHARDS, Shard, ShardResults, listing
from dataset.splits import VIDEO_SUFFIXES
from dataset.which_videos import Found, WhichVideos, add_video_flags, find_videos
from utils.device import cpu_count
from utils.errors import ArgumentParser, UserError
from utils.files import write_atomically, writing
from utils.lock import locked
from utils.progress import Progress
from utils.script import run_script

SUFFIX = ".mov"
MANIFEST = "prepared.json"
_FORMAT = 1  # of the files and the manifest
_RATE_IF_UNKNOWN = Fraction(25)  # frames per second, if the container gives none; only players need it
_LARGEST_RATE = 1000
_EARLY = Fraction(1, 10)  # of an interval: so much may a rounded timestamp lie before its time
_SAMPLE = 16  # videos that --dry-run converts


@dataclass(frozen=True)
class Settings:
    """What shapes the prepared files."""

    short_side: int = 256  # pixels; smaller frames are not enlarged
    quality: int = 90  # of JPEG, 1 to 100
    limit_fps: float | None = None  # frames per second kept at most


class Outcome(NamedTuple):
    """What became of one video. `error`: the video is unreadable. `disk_error`: nothing more can be written."""

    frames: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    error: str | None = None
    disk_error: str | None = None


class Task(NamedTuple):
    source: str
    target: str
    settings: Settings
    known: tuple[int, int] | None = None  # (bytes, frames) of the target in the manifest
    keep: bool = True  # False: the target is only measured


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
    if args.limit_fps is not None and not 0.01 <= args.limit_fps <= _LARGEST_RATE:
        raise UserError(f"--limit-fps must be 0.01 to {_LARGEST_RATE}, got {args.limit_fps:g}")
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


# ---- their targets --------------------------------------------------------------------------------


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


# ---- the folder -----------------------------------------------------------------------------------


class Manifest:
    """prepared.json: source, settings, versions, counts, and size and number of frames of each file.

    Written when a conversion begins and, with `complete` true, when it ends; of shards, when the first begins and when
    the last ends. Raises UserError for a folder that was prepared with other settings, or that holds other files.

    listed: the videos, as `dataset.shards.listing` names them.
    """

    def __init__(self, folder: Path, settings: Settings, source: dict, listed: str, shard: Shard | None = None):
        self.folder = folder
        self.settings = settings
        self._path = folder / MANIFEST
        wanted = {"format": _FORMAT, **asdict(settings)}
        names = os.listdir(folder)  # before the manifest is read: another shard may write it just now
        earlier = self._read()
        if earlier is None and any(name not in (MANIFEST, SHARDS) and not _is_partial(name) for name in names):
            raise UserError(f"--out {folder}: holds other files and no {MANIFEST}; name a new or an empty folder")
        for name, value in (earlier or {}).get("settings", {}).items():
            if wanted.get(name) != value:
                raise UserError(
                    f"--out {folder}: was prepared with {name.replace('_', ' ')} {value}, not {wanted.get(name)}; "
                    "give the same setting, or another folder"
                )
        self.files: dict[str, list[int]] = (earlier or {}).get("files", {})  # path below: [bytes, frames]
        sources = (earlier or {}).get("sources", [])
        self._content = {
            "settings": wanted,
            "sources": sources if source in sources else [*sources, source],
            "listed": listed,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("av", "torch", "torchvision", "numpy", "pillow")},
                "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
            },
        }
        if shard is None or earlier is None or earlier.get("listed") != listed:
            self.write(complete=False)

    def _read(self) -> dict | None:
        try:
            content = json.loads(self._path.read_bytes())
            if not all(isinstance(content[key], kind) for key, kind in (("settings", dict), ("files", dict))):
                raise ValueError
            return content
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path}: is not a manifest of prepared files; name another folder") from error

    def name_of(self, target: Path) -> str:
        return str(target.relative_to(self.folder))

    def known(self, target: Path) -> tuple[int, int] | None:
        entry = self.files.get(self.name_of(target))
        return tuple(entry) if isinstance(entry, list) and len(entry) == 2 else None

    def write(self, complete: bool, **counts: int) -> None:
        content = {**self._content, "complete": complete, **counts, "files": dict(sorted(self.files.items()))}
        try:
            write_atomically(self._path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from error


def _made(folder: Path) -> Path:
    with writing(folder, about="out"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_partial(name: str) -> bool:
    return name.startswith(f".{MANIFEST}.")  # as `write_atomically` begins it


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


def conclude(manifest: Manifest, results: dict[str, list[int] | str], missing: list[str]) -> None:
    """Write unreadable.txt, missing.txt and the complete manifest. results: as `prepare` returns them."""
    unreadable = [result for result in results.values() if isinstance(result, str)]
    for name, result in results.items():
        manifest.files.pop(name, None)
        if not isinstance(result, str):
            manifest.files[name] = result
    _write_list(manifest.folder / "unreadable.txt", unreadable)
    _write_list(manifest.folder / "missing.txt", missing)
    total_bytes = sum(size for size, _ in manifest.files.values())
    total_frames = sum(frames for _, frames in manifest.files.values())
    manifest.write(
        complete=True, videos=len(manifest.files), frames=total_frames, bytes=total_bytes,
        unreadable=len(unreadable), missing=len(missing),
    )  # fmt: skip
    print(
        f"prepare: {len(manifest.files)} videos, {total_frames} frames, {total_bytes / 1e9:.3f} GB in {manifest.folder}"
    )
    for lines, name, meaning in (
        (unreadable, "unreadable.txt", "videos cannot be read and are left out"),
        (missing, "missing.txt", "listed videos are not on disk"),
    ):
        if lines:
            print(f"prepare: {len(lines)} {meaning}, the first: {lines[0]} (all in {manifest.folder / name})")


def _remove_partial_files(folder: Path, names: set[str]) -> None:
    for partial in folder.rglob(f".*{SUFFIX}.tmp"):
        if partial.name in names:  # not of a shard that is at work
            partial.unlink(missing_ok=True)


def _write_list(path: Path, lines: list[str]) -> None:
    try:
        if lines:
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


# ---- one video, in a worker process ---------------------------------------------------------------


def convert_or_report(task: Task, verify_full: bool = False) -> Outcome:
    """`convert`, unless the target is there and whole."""
    start = time.monotonic()
    target = Path(task.target)
    try:
        outcome = _what_is_there(target, task.known, verify_full) or convert(task.source, target, task.settings)
        if not task.keep:
            target.unlink()
        return outcome._replace(seconds=time.monotonic() - start)
    except VideoError as error:
        return Outcome(error=str(error))
    except OSError as error:
        return Outcome(disk_error=f"cannot be written ({reason(error)})")
    except Exception as error:  # one strange file among thousands must not end the run
        line = " ".join(str(error).split())
        return Outcome(error=f"{task.source}: cannot be prepared ({type(error).__name__}: {line})")


def _what_is_there(target: Path, known: tuple[int, int] | None, verify_full: bool) -> Outcome | None:
    """The target's size and frames if it is whole: its own index and marks say so, and the manifest, if it knows it."""
    if not target.exists():
        return None
    try:
        found = target.stat().st_size, probe(target).frames
        if verify_full:
            found = found[0], sum(1 for _ in every_frame(target))
    except VideoError:
        return None
    return Outcome(found[1], found[0]) if known in (None, found) else None


def convert(source: str, target: Path, settings: Settings) -> Outcome:
    """Write the video's frames as JPEGs into a QuickTime file under another name, read it back, rename it.

    The file depends on nothing but the frames, the settings and the libraries. Raises VideoError if the source
    cannot be decoded, OSError if the target cannot be written.
    """
    partial = target.with_name(f".{target.name}.tmp")
    with open_video(source) as container:
        rate = Fraction(video_stream(container, source).average_rate or 0)
    if not 0 < rate <= _LARGEST_RATE:
        rate = _RATE_IF_UNKNOWN
    pictures = timed_frames(source)
    if settings.limit_fps is not None:
        limit = Fraction(settings.limit_fps).limit_denominator(1000)
        pictures = at_most(pictures, limit, rate)
        rate = min(rate, limit)
    try:
        frames = _write(partial, _jpegs(source, pictures, settings), rate)
        # Not every failed write is reported to the one who writes.
        if frames != probe(partial).frames:
            raise OSError(errno.EIO, f"{partial} was written and cannot be read back")
        size = partial.stat().st_size
        os.replace(partial, target)
    except VideoError as error:
        partial.unlink(missing_ok=True)
        if str(partial) in str(error):
            raise OSError(errno.EIO, str(error)) from error
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Outcome(frames, size)


class _Picture(NamedTuple):
    jpeg: bytes
    width: int
    height: int


def at_most(frames: Iterable[TimedFrame], limit_fps: Fraction, average_fps: Fraction) -> Iterator[TimedFrame]:
    """The first frame of each interval of 1 / `limit_fps` seconds, counted from the first frame.

    A frame without a timestamp later than the frame before counts as 1 / `average_fps` seconds after it.
    """
    first = now = None
    latest = -1  # interval from which a frame was kept
    for timestamp, frame in frames:
        if now is None:
            first = now = timestamp or Fraction(0)
        else:
            now = timestamp if timestamp is not None and timestamp > now else now + 1 / average_fps
        interval = math.floor((now - first) * limit_fps + _EARLY)
        if interval > latest:
            latest = interval
            yield now, frame


def _jpegs(source: str, frames: Iterable[TimedFrame], settings: Settings) -> Iterator[_Picture]:
    empty = True
    for _, frame in frames:
        empty = False
        frame = scaled_down(frame, settings.short_side)
        jpeg = io.BytesIO()
        try:
            Image.fromarray(frame).save(jpeg, "JPEG", quality=settings.quality)  # 4:2:0, as the videos are
        except (OSError, ValueError) as error:  # more than 65,500 pixels wide or high
            raise VideoError(f"{source}: a frame cannot become a JPEG ({error})") from error
        yield _Picture(jpeg.getvalue(), frame.shape[1], frame.shape[0])
    if empty:
        raise VideoError(f"{source}: holds no decodable frame")


def scaled_down(frame: numpy.ndarray, short_side: int) -> numpy.ndarray:
    """uint8 [H, W, 3] with a shorter side of at most `short_side` pixels, antialiased."""
    if min(frame.shape[:2]) <= short_side:
        return numpy.ascontiguousarray(frame)
    picture = torch.from_numpy(numpy.ascontiguousarray(frame)).permute(2, 0, 1)  # [3, H, W]
    return F.resize(picture, [short_side], antialias=True).permute(1, 2, 0).contiguous().numpy()


def _write(path: Path, pictures: Iterator[_Picture], rate: Fraction) -> int:
    """Write the JPEGs, marked, `rate` frames per second. Returns their number."""
    # Without "bitexact" the file names the library that wrote it.
    latest = next(pictures)
    with av.open(f"file:{path.absolute()}", "w", format="mov", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=rate)
        stream.width, stream.height, stream.pix_fmt = latest.width, latest.height, "yuvj420p"
        stream.time_base = 1 / rate
        count = 0
        while latest is not None:
            following = next(pictures, None)
            packet = av.Packet(marked(latest.jpeg, count, last=following is None))
            packet.stream, packet.time_base = stream, 1 / rate
            packet.pts = packet.dts = count
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)
            latest = following
            count += 1
    return count


# ---- --dry-run ------------------------------------------------------------------------------------


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
