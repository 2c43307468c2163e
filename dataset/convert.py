"""One video converted: its frames as JPEGs in a QuickTime file, which `dataset.jpeg_video` reads one by one."""

import errno
import io
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dataset.container import VideoError, open_video, reason, video_stream
from dataset.decode import TimedFrame, every_frame, timed_frames
from dataset.index import probe
from dataset.jpeg_video import marked

SUFFIX = ".mov"
LARGEST_RATE = 1000  # frames per second
_RATE_IF_UNKNOWN = Fraction(25)  # frames per second, if the container gives none; only players need it
_EARLY = Fraction(1, 10)  # of an interval: so much may a rounded timestamp lie before its time


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
    if not 0 < rate <= LARGEST_RATE:
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
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, VideoError) and str(partial) in str(error):  # not the source's fault
            raise OSError(errno.EIO, str(error)) from error
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
