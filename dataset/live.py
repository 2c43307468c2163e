"""Frames of a source one by one: a file, a camera or an address. Nothing else in this project opens addresses.

A thread reads the source, so that a source that stalls does not hold up the program, and so that frames of a live
source can be dropped while the network is busy.
"""

import contextlib
import itertools
import os
import queue
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy

from dataset.container import VideoError, open_video, reason, video_stream
from dataset.decode import RGBConverter, decoded
from utils.errors import UserError

# With no "file" among them, what an address sends cannot name a file of this machine.
_PROTOCOLS = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "tcp", "udp", "rtp", "srt")
_ALLOWED = ",".join((*_PROTOCOLS, "tls", "crypto", "srtp", "httpproxy"))
_WAITING_FRAMES = 2


class SourceError(UserError):
    """A source that stalled or broke."""


@dataclass(frozen=True)
class LiveFrame:
    rgb: numpy.ndarray  # uint8 [H, W, 3], upright
    seconds: float  # since the first frame of the source, by its timestamps
    arrived: float  # time.monotonic(): when it was decoded; of a file, when it was asked for
    dropped: int  # frames that were dropped up to this one


def frames_of(source: str, every: int = 1, realtime: bool = False, timeout: float = 10.0) -> Iterator[LiveFrame]:
    """Every `every`-th frame of a source: a video file, a camera such as /dev/video0, a named pipe, or an address.

    A file is read as fast as frames are taken, and none is dropped. A source that goes its own pace (every other one,
    and with `realtime` a file too) is read as it comes: the oldest waiting frame is dropped if too many wait.
    realtime: frames come no sooner than their timestamps say.
    timeout: seconds without a frame after which the source counts as stalled.

    Raises UserError for a source that does not exist, SourceError if it stalls or breaks.
    """
    is_address, is_file = "://" in source, os.path.isfile(source)
    if is_address and source.partition("://")[0].lower() not in _PROTOCOLS:
        raise UserError(f"{source}: expected an address of {', '.join(_PROTOCOLS)}, or a file", about="stream")
    if not is_address and (not os.path.exists(source) or os.path.isdir(source)):
        raise UserError(f"{source}: no such file or device", about="stream")
    reader = _Reader(source, is_address, every, realtime, timeout, drops=realtime or not is_file)
    # A daemon: a read that never returns must not keep the program alive.
    threading.Thread(target=reader.run, daemon=True).start()
    try:
        yield from reader.frames()
    finally:
        reader.stop()


class _Reader:
    def __init__(self, source: str, is_address: bool, every: int, realtime: bool, timeout: float, drops: bool):
        self._source, self._is_address, self._every = source, is_address, every
        self._realtime, self._timeout, self._drops = realtime, timeout, drops
        self._waiting = queue.Queue(_WAITING_FRAMES)
        self._dropped = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        with contextlib.suppress(queue.Empty):  # the thread may wait for a place
            while True:
                self._waiting.get_nowait()

    def frames(self) -> Iterator[LiveFrame]:
        to_rgb, asked = RGBConverter(), time.monotonic()
        while True:
            try:
                item = self._waiting.get(timeout=self._timeout)
            except queue.Empty:
                raise self._stalled() from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            frame, seconds, arrived, dropped = item
            try:
                rgb = to_rgb(frame)
            except (av.error.FFmpegError, ValueError, MemoryError) as error:
                raise SourceError(f"{self._source}: a frame cannot become RGB ({reason(error)})") from error
            yield LiveFrame(rgb, seconds, arrived if self._drops else asked, dropped)
            asked = time.monotonic()

    def run(self) -> None:
        last = None  # what the program is told last: the end, or an error
        try:
            self._read()
        except VideoError as error:
            last = SourceError(str(error))
        except av.error.ExitError:  # FFmpeg's own timeout
            last = self._stalled()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            last = SourceError(f"{self._source}: the stream broke ({reason(error)})")
        self._waiting.put(last)

    def _stalled(self) -> SourceError:
        return SourceError(f"{self._source}: no frame for {self._timeout:g} s; --timeout waits longer")

    def _open(self) -> av.container.InputContainer:
        if self._is_address:
            return av.open(self._source, timeout=self._timeout, options={"protocol_whitelist": _ALLOWED})
        if os.path.isfile(self._source):
            return open_video(self._source)
        is_device = stat.S_ISCHR(os.stat(self._source).st_mode)
        return av.open(os.path.abspath(self._source), format="v4l2" if is_device else None)

    def _read(self) -> None:
        first = started = None
        with self._open() as container:
            stream = video_stream(container, self._source)
            frames = itertools.islice(decoded(container, stream), 0, None, self._every)
            for number, frame in enumerate(frames):
                now = time.monotonic()
                if started is None:
                    first, started = frame.time, now
                seconds = self._seconds(frame, first, number, stream)
                if self._realtime:
                    self._stopped.wait(started + seconds - now)
                if self._stopped.is_set():
                    return
                if self._drops and self._waiting.full():
                    with contextlib.suppress(queue.Empty):
                        self._waiting.get_nowait()
                        self._dropped += 1
                self._waiting.put((frame, seconds, time.monotonic(), self._dropped))
        if started is None:
            raise SourceError(f"{self._source}: holds no decodable frame")

    def _seconds(self, frame: av.VideoFrame, first: float | None, number: int, stream) -> float:
        if frame.time is None or first is None:
            return number * self._every / float(stream.average_rate or 25)
        return frame.time - first
