"""What is in each video file: found once by decoding it, in parallel, and cached.

The cache's key is everything that shapes an entry: the file's path, size and modification time, the
decoder's version and this format's.
"""

import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import av

from dataset.container import VideoError, open_video, reason, video_stream
from dataset.decode import RGBConverter, SeekPoint, decoded
from dataset.jpeg_video import JPEGVideo
from dataset.pool import map_in_processes
from utils.errors import UserError
from utils.files import write_atomically
from utils.progress import Progress

_FORMAT = 1
_DECODER = f"libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
_FRAMES_CHECKED_AFTER_A_SEEK = 8
# Nearer seek points save less than they cost; a file of keyframes only would be all seek points.
_FRAMES_BETWEEN_SEEK_POINTS = 10
_SECONDS_BETWEEN_SAVES = 60.0
_FILES_WORTH_THREADS = 20_000


@dataclass(frozen=True)
class VideoInfo:
    """What decoding a file gave. `error` is None for a readable file, else its one line."""

    frames: int = 0  # decodable
    width: int = 0  # pixels, upright
    height: int = 0
    fps: float = 0.0  # average frames per second as the container says; 0 where it does not
    damaged_packets: int = 0
    seek_points: tuple[SeekPoint, ...] = field(default=(), repr=False)
    error: str | None = None


def probe(path: str | os.PathLike) -> VideoInfo:
    """Decode a whole file and say what is in it. Raises VideoError where it gives no frame."""
    damaged = 0

    def count_damage():
        nonlocal damaged
        damaged += 1

    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            jpegs = JPEGVideo.open(path, container, stream)
            if jpegs is not None:
                with jpegs:
                    return _of_jpegs(jpegs, float(stream.average_rate or 0))
            to_rgb, formats = RGBConverter(), set()
            timestamps, keyframes, checksums = [], [], {}
            width = height = 0
            for frame in decoded(container, stream, count_damage):
                index = len(timestamps)
                if index == 0:
                    width, height = frame.width, frame.height
                    if round(frame.rotation / 90) % 2:
                        width, height = height, width
                if frame.format.name not in formats:  # that it can be converted is better known now
                    formats.add(frame.format.name)
                    to_rgb(frame)
                timestamps.append(frame.pts)
                if frame.key_frame and index >= (keyframes[-1] if keyframes else 0) + _FRAMES_BETWEEN_SEEK_POINTS:
                    keyframes.append(index)
                if keyframes and index < keyframes[-1] + _FRAMES_CHECKED_AFTER_A_SEEK:
                    checksums[index] = _checksum(frame)
            fps = float(stream.average_rate or 0)
            seek_points = ()
            if timestamps and not damaged and _strictly_increasing(timestamps):
                candidates = [SeekPoint(index, timestamps[index]) for index in keyframes]
                seek_points = tuple(p for p in candidates if _seek_is_exact(container, stream, p, checksums))
    except VideoError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be decoded ({reason(error)})") from error
    if not timestamps:
        raise VideoError(f"{path}: holds no decodable frame")
    return VideoInfo(len(timestamps), width, height, fps, damaged, seek_points)


def _of_jpegs(jpegs: JPEGVideo, fps: float) -> VideoInfo:
    """The index says how many frames there are; the first and the last are decoded. Each frame stands for itself,
    so that seek points would say nothing."""
    height, width = jpegs.frame(0).shape[:2]
    jpegs.frame(len(jpegs) - 1)
    return VideoInfo(len(jpegs), width, height, fps)


def _strictly_increasing(timestamps: list[int | None]) -> bool:
    return None not in timestamps and all(a < b for a, b in itertools.pairwise(timestamps))


def _checksum(frame: av.VideoFrame) -> int:
    return zlib.crc32(memoryview(frame.planes[0]))  # luma is enough to tell frames apart


def _seek_is_exact(container, stream, point: SeekPoint, checksums: dict[int, int]) -> bool:
    """Whether decoding from this keyframe gives the same frames as decoding from the start did."""
    try:
        container.seek(point.pts, stream=stream, backward=True)
        index = None
        for frame in decoded(container, stream):
            if index is None:
                if frame.pts is None or frame.pts > point.pts:
                    return False
                if frame.pts < point.pts:
                    continue
                index = point.index
            if index not in checksums or index >= point.index + _FRAMES_CHECKED_AFTER_A_SEEK:
                return True
            if _checksum(frame) != checksums[index]:
                return False
            index += 1
    except (av.error.FFmpegError, OSError):
        return False
    return index is not None


class VideoIndex:
    """`VideoInfo` of many files, kept in one JSON file.

    cache_file None keeps nothing. `lookup` probes what the cache lacks in `workers` processes.
    """

    def __init__(self, cache_file: Path | None):
        self._cache_file = cache_file
        self._entries: dict[str, list] = {}
        if cache_file is not None:
            self._entries = _read_cache(cache_file)

    def lookup(self, paths: Sequence[str], workers: int) -> dict[str, VideoInfo]:
        """What is in each file, by path; a file that cannot be read has `error` set."""
        keys = {path: os.path.abspath(path) for path in paths}
        stamps = dict(zip(paths, _stamps(paths), strict=True))
        stale = [path for path in stamps if not self._serves(keys[path], stamps[path])]
        before = {path: self._entries.get(keys[path]) for path in stale}
        if any(entry is None or entry[0] != stamps[path] for path, entry in before.items()):
            self._save()  # a cache that cannot be written is better known before hours of decoding
        if stale:
            saved = time.monotonic()
            try:
                for path, info in _probe_all(stale, max(1, workers)):
                    self._entries[keys[path]] = [stamps[path], _info_to_json(info)]
                    if time.monotonic() > saved + _SECONDS_BETWEEN_SAVES:
                        self._save()
                        saved = time.monotonic()
            finally:  # an interrupted start keeps what it found
                if any(self._entries.get(keys[path]) != entry for path, entry in before.items()):
                    self._save()
        return {path: _info_from_json(self._entries[key][1]) for path, key in keys.items()}

    def _serves(self, key: str, stamp: list[int]) -> bool:
        entry = self._entries.get(key)
        # What could not be read is tried again: permissions and network drives mend without a trace.
        return entry is not None and entry[0] == stamp and entry[1]["error"] is None

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
                "name a writable folder with --index-dir"
            ) from error


def _read_cache(cache_file: Path) -> dict[str, list]:
    try:
        content = json.loads(cache_file.read_bytes())
    except (OSError, ValueError):  # absent, or cut off: it is built again
        return {}
    if not isinstance(content, dict) or (content.get("format"), content.get("decoder")) != (_FORMAT, _DECODER):
        return {}
    return content["files"]


def _stamps(paths: Sequence[str]) -> list[list[int]]:
    if len(paths) < _FILES_WORTH_THREADS:
        return [_stamp(path) for path in paths]
    # A network drive answers late, but many at a time.
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(_stamp, paths, chunksize=256))


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except OSError:
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


def _probe_all(paths: list[str], workers: int) -> Iterator[tuple[str, VideoInfo]]:
    """Yield (path, VideoInfo), as they are done. A file that kills its worker is named unreadable."""
    with Progress(len(paths), "indexing videos", unit="video") as progress:
        for path, info in map_in_processes(_probe_or_error, paths, workers):
            yield path, info or VideoInfo(error=f"{path}: decoding it kills the decoder's process")
            progress.advance()
