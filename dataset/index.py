"""What is in each video file: found once, in parallel, and cached.

Most files are counted by their packets (`dataset.packets`), in a tenth of the time; a file that gives reason for
doubt is decoded whole. One file in 50 is both counted and decoded: if the two differ, every file of its kind
(container and codec) is decoded.

The cache's key is everything that shapes an entry: the file's path, size and modification time, the
decoder's version and this format's. Each entry has a checksum; an entry that was changed is found anew.
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import av
import numpy

from dataset.container import VideoError, decoding
from dataset.decode import RGBConverter, SeekMissedError, SeekPoint, decoded, opened, wanted_frames
from dataset.jpeg_video import JPEGVideo
from dataset.packets import FRAMES_BETWEEN_SEEK_POINTS, count_packets
from dataset.pool import map_in_processes
from dataset.shards import Shard
from utils.errors import UserError
from utils.files import write_atomically
from utils.progress import Progress

_FORMAT = 3
_DECODER = f"libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
_FRAMES_CHECKED_AFTER_A_SEEK = 8
_ONE_IN = 50  # files that are decoded although their packets can be counted
_SECONDS_BETWEEN_SAVES = 60.0
_FILES_WORTH_THREADS = 20_000


@dataclass(frozen=True)
class VideoInfo:
    """What is in a file. `error` is None for a readable file, else its one line."""

    frames: int = 0  # decodable
    width: int = 0  # pixels, upright
    height: int = 0
    fps: float = 0.0  # average frames per second by the container; 0 if it names none
    damaged_packets: int = 0
    seek_points: tuple[SeekPoint, ...] = field(default=(), repr=False)
    error: str | None = None


def probe(path: str | os.PathLike) -> VideoInfo:
    """Decode a whole file and say what is in it; of a video of JPEGs, its index and its first and last frame.
    Raises VideoError if it gives no frame, or if its frames cannot be converted to RGB."""
    damaged = 0

    def count_damage():
        nonlocal damaged
        damaged += 1

    with decoding(path):
        with opened(path) as (container, stream, jpegs):
            if jpegs is not None:
                return _of_jpegs(jpegs, float(stream.average_rate or 0))
            to_rgb, formats = RGBConverter(), set()
            candidates, checksums = [], {}
            frames, latest, seekable = 0, None, True
            width = height = 0
            for frame in decoded(container, stream, count_damage):
                pixels = frame.format.name, frame.colorspace, frame.color_trc, frame.width, frame.height
                if pixels not in formats:  # FFmpeg decodes some that it cannot convert, such as ICtCp colours
                    formats.add(pixels)
                    height, width, _ = to_rgb(frame).shape  # of each frame the same
                in_order = frame.pts is not None and (latest is None or frame.pts > latest)
                seekable = seekable and in_order and not damaged
                latest = frame.pts
                if seekable:
                    last = candidates[-1].index if candidates else 0
                    if frame.key_frame and frames >= last + FRAMES_BETWEEN_SEEK_POINTS:
                        candidates.append(SeekPoint(frames, frame.pts))
                    if candidates and frames < candidates[-1].index + _FRAMES_CHECKED_AFTER_A_SEEK:
                        checksums[frames] = _checksum(to_rgb(frame))
                frames += 1
            fps = float(stream.average_rate or 0)
        seekable = seekable and not damaged
        seek_points = tuple(p for p in candidates if _seek_is_exact(path, p, checksums)) if seekable else ()
    if not frames:
        raise VideoError(f"{path}: holds no decodable frame")
    return VideoInfo(frames, width, height, fps, damaged, seek_points)


def _of_jpegs(jpegs: JPEGVideo, fps: float) -> VideoInfo:
    """The index says how many frames there are; the first and the last are decoded. Each frame stands for itself,
    so that seek points would say nothing."""
    height, width = jpegs.frame(0).shape[:2]
    jpegs.frame(len(jpegs) - 1)
    return VideoInfo(len(jpegs), width, height, fps)


def _checksum(rgb: numpy.ndarray) -> int:
    return zlib.crc32(numpy.ascontiguousarray(rgb))


def _seek_is_exact(path: str | os.PathLike, point: SeekPoint, checksums: dict[int, int]) -> bool:
    """Whether decoding from this keyframe gives what decoding from the start gave. The file is opened anew, as for a
    clip: what is left in a container that has decoded the file, such as a palette, hides damage."""
    indices = [index for index in range(point.index, point.index + _FRAMES_CHECKED_AFTER_A_SEEK) if index in checksums]
    try:
        return all(_checksum(rgb) == checksums[index] for index, rgb in wanted_frames(path, indices, [point]))
    except (SeekMissedError, VideoError, av.error.FFmpegError, OSError):
        return False


class VideoIndex:
    """`VideoInfo` of many files, kept in one JSON file.

    cache_file None keeps nothing. `lookup` probes what the cache lacks in `workers` processes.
    verify_full: decode every file whole; an entry that was not found so is found anew.
    shard: keep what is found in a file of the shard's own, beside `cache_file`: shards that write to one file at a time
    would lose what the others found. A lookup without a shard reads these files and joins them to `cache_file`.
    """

    def __init__(self, cache_file: Path | None, verify_full: bool = False, shard: Shard | None = None):
        self._cache_file = cache_file
        self._verify_full = verify_full
        self._shard = shard
        self._entries: dict[str, list] = {}  # absolute path: `_entry`
        self._of_shards: dict[Path, list[int]] = {}  # their files, as they were read
        if cache_file is None:
            return
        self._entries = _read_cache(cache_file)
        for file in sorted(cache_file.parent.glob(f"{cache_file.stem}.*-of-*.json")):
            self._of_shards[file] = _stamp(str(file))
            self._entries |= _read_cache(file)
        if shard is not None:
            self._cache_file = cache_file.with_suffix(f".{shard}.json")

    def lookup(self, paths: Sequence[str], workers: int) -> dict[str, VideoInfo]:
        """What is in each file, by path; a file that cannot be read has `error` set."""
        keys = {path: os.path.abspath(path) for path in paths}
        if self._shard is not None:  # what others have found is theirs to keep
            self._entries = {key: self._entries[key] for key in keys.values() if key in self._entries}
        for key in keys.values():
            if key in self._entries and not _is_whole(key, self._entries[key]):
                del self._entries[key]
        stamps = dict(zip(paths, _stamps(paths), strict=True))
        stale = [path for path in stamps if not self._serves(keys[path], stamps[path])]
        before = {path: self._entries.get(keys[path]) for path in stale}
        if any(entry is None or entry[0] != stamps[path] for path, entry in before.items()):
            self._save()  # a cache that cannot be written is better known before hours of decoding
        if stale:
            saved = time.monotonic()
            try:
                for path, info, decoded_whole in _probe_all(stale, max(1, workers), self._verify_full):
                    self._entries[keys[path]] = _entry(keys[path], stamps[path], info, decoded_whole)
                    if time.monotonic() > saved + _SECONDS_BETWEEN_SAVES:
                        self._save()
                        saved = time.monotonic()
            finally:  # an interrupted start keeps what it found
                if any(self._entries.get(keys[path]) != entry for path, entry in before.items()):
                    self._save()
        if self._of_shards and self._shard is None:
            self._join_shards()
        return {path: _info_from_json(self._entries[key][1]) for path, key in keys.items()}

    def _join_shards(self) -> None:
        with contextlib.suppress(UserError, OSError):  # a folder that may only be read stays as it is
            self._save()
            for file, stamp in self._of_shards.items():
                if _stamp(str(file)) == stamp:  # if not, its shard is at work
                    file.unlink()

    def _serves(self, key: str, stamp: list[int]) -> bool:
        entry = self._entries.get(key)
        if entry is None or entry[0] != stamp or (self._verify_full and not entry[2]):
            return False
        # Unreadable files are probed again at every start: a permission may have changed without changing
        # size or modification time.
        return entry[1]["error"] is None

    def _save(self) -> None:
        if self._cache_file is None:
            return
        content = {"format": _FORMAT, "decoder": _DECODER, "files": self._entries}
        try:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            # Other runs may have added files meanwhile; the newer of two entries for a file is equal.
            content["files"] = {**_read_cache(self._cache_file), **self._entries}
            write_atomically(self._cache_file, json.dumps(content).encode())
        except OSError as error:
            raise UserError(
                f"{self._cache_file}: the video index cannot be written ({error.strerror}); "
                "name a writable folder with --index-dir, or as XDG_CACHE_HOME"
            ) from error


def _read_cache(cache_file: Path) -> dict[str, list]:
    try:
        content = json.loads(cache_file.read_bytes())
    except (OSError, ValueError):  # absent, or cut off: it is built again
        return {}
    if not isinstance(content, dict) or (content.get("format"), content.get("decoder")) != (_FORMAT, _DECODER):
        return {}
    return content["files"] if isinstance(content.get("files"), dict) else {}


def _entry(key: str, stamp: list[int], info: VideoInfo, decoded_whole: bool) -> list:
    """[stamp, info as JSON, whether every frame was decoded, checksum of these and of the path]"""
    content = [stamp, _info_to_json(info), decoded_whole]
    return [*content, _checksum_of(key, content)]


def _is_whole(key: str, entry) -> bool:
    """Whether the entry is what `_entry` wrote: a cache may have been edited, or damaged."""
    return isinstance(entry, list) and len(entry) == 4 and entry[3] == _checksum_of(key, entry[:3])


def _checksum_of(key: str, content: list) -> int:
    return zlib.crc32(json.dumps([key, *content]).encode())


def _stamps(paths: Sequence[str]) -> list[list[int]]:
    if len(paths) < _FILES_WORTH_THREADS:
        return [_stamp(path) for path in paths]
    # A network drive answers late, but many at a time.
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(_stamp, paths, chunksize=256))


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a name may hold what no file's name can
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _info_to_json(info: VideoInfo) -> dict:
    return {**asdict(info), "seek_points": [list(point) for point in info.seek_points]}


def _info_from_json(value: dict) -> VideoInfo:
    return VideoInfo(**{**value, "seek_points": tuple(SeekPoint(*point) for point in value["seek_points"])})


def _probe_or_error(path: str) -> VideoInfo:
    try:
        return probe(path)
    except VideoError as error:
        return VideoInfo(error=str(error))
    except Exception as error:  # one strange file among thousands must not end the run
        return VideoInfo(error=f"{path}: cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})")


class _Found(NamedTuple):
    info: VideoInfo
    decoded_whole: bool
    kind: str = ""  # container and codec of a file whose packets were counted
    miscounted: bool = False


def _count_or_probe(path: str) -> _Found:
    try:
        count = count_packets(path)
    except VideoError as error:
        return _Found(VideoInfo(error=str(error)), decoded_whole=True)
    except Exception:  # one strange file among thousands: decoding it says more
        count = None
    if count is None:
        return _Found(_probe_or_error(path), decoded_whole=True)
    counted = VideoInfo(count.frames, count.width, count.height, count.fps, seek_points=count.seek_points)
    if zlib.crc32(os.fsencode(os.path.basename(path))) % _ONE_IN:
        return _Found(counted, decoded_whole=False, kind=count.kind)
    info = _probe_or_error(path)
    # A damaged file says nothing about its kind.
    miscounted = info != counted and not info.damaged_packets and info.error is None
    return _Found(info, True, count.kind, miscounted)


def _probe_whole(path: str) -> _Found:
    return _Found(_probe_or_error(path), decoded_whole=True)


def _probe_all(paths: list[str], workers: int, whole: bool) -> Iterator[tuple[str, VideoInfo, bool]]:
    """Yield (path, VideoInfo, whether all of it was decoded), as they are done; of kinds that were miscounted
    twice, and the second is right. A file that kills its worker is named unreadable."""
    counted: dict[str, list[str]] = {}
    miscounted = {}
    for path, found in _run(_probe_whole if whole else _count_or_probe, paths, workers):
        yield path, found.info, found.decoded_whole
        if not found.decoded_whole:
            counted.setdefault(found.kind, []).append(path)
        if found.miscounted:
            miscounted.setdefault(found.kind, path)
    for kind, example in miscounted.items():
        print(f"data: packets do not tell the frames of {kind} files such as {example}: all of them are decoded")
        for path, found in _run(_probe_whole, counted.get(kind, []), workers):
            yield path, found.info, True


def _run(function: Callable[[str], _Found], paths: list[str], workers: int) -> Iterator[tuple[str, _Found]]:
    with (
        closing(map_in_processes(function, paths, workers)) as results,
        Progress(len(paths), "indexing videos", unit="video") as progress,
    ):
        for path, found in results:
            killed = VideoInfo(error=f"{path}: decoding it kills the decoder's process")
            yield path, found or _Found(killed, decoded_whole=True)
            progress.advance()
