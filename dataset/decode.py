"""Exact frames out of a video file, with PyAV: path and frame indices in, uint8 RGB out.

A frame's index is its place in presentation order among the frames the decoder gives out, which is
the only definition that holds for files with missing, repeated or shuffled timestamps. There are two ways
to a frame: FFmpeg's decoder, which decodes every frame before it from a keyframe on, and, in videos whose frames
are JPEGs, `dataset.jpeg_video`, which reads and decodes this frame alone.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy
from av.video.reformatter import VideoReformatter

from dataset.container import VideoError, decoding, open_video, video_stream
from dataset.jpeg_video import JPEGVideo
from dataset.orientation import Orientation, orientation_of

# A seek costs about as much as decoding this many frames (benchmarks/RESULTS.md).
_SEEK_COST_FRAMES = 3


class SeekPoint(NamedTuple):
    """A keyframe from which decoding gives what decoding from the start gives, as `dataset.index.probe`
    found on its first frames."""

    index: int  # of the frame, in presentation order
    pts: int  # presentation timestamp, in the stream's time base


TimedFrame = tuple[Fraction | None, numpy.ndarray]  # timestamp in seconds, None if the file gives none; [H, W, 3]


def decode_frames(
    path: str | os.PathLike, indices: Sequence[int], seek_points: Sequence[SeekPoint] = ()
) -> numpy.ndarray:
    """The frames at `indices`, in that order, repeats allowed: uint8 RGB [len(indices), H, W, 3], upright.

    H and W are those of the file's first frame: a frame of another size is scaled to them.

    Decodes from the start, or from the best of `seek_points` (`dataset.index.probe` finds them), and
    nothing past the last wanted frame; converts wanted frames only; one thread. Of a video whose frames are
    JPEGs, wanted frames alone are read (`dataset.jpeg_video`). Raises VideoError for a file that is no local
    video, is damaged beyond decoding or has fewer frames.
    """
    indices = [int(index) for index in indices]
    if not indices:
        raise ValueError("decode_frames: no indices given")
    if min(indices) < 0:
        raise ValueError(f"decode_frames: indices count from 0, got {min(indices)}")
    with decoding(path):
        try:
            return _clip(wanted_frames(path, sorted(set(indices)), sorted(seek_points)), indices)
        except SeekMissedError:  # the file is not the one that was indexed, or its demuxer is not exact
            return _clip(wanted_frames(path, sorted(set(indices)), ()), indices)


def _clip(frames: Iterator[tuple[int, numpy.ndarray]], indices: list[int]) -> numpy.ndarray:
    """uint8 [len(indices), H, W, 3]. Each frame is copied as it comes, so that the next one takes its memory again."""
    clip = None
    for index, frame in frames:
        if clip is None:
            clip = numpy.empty((len(indices), *frame.shape), dtype=numpy.uint8)
        for position, wanted in enumerate(indices):
            if wanted == index:
                clip[position] = frame
    return clip


def every_frame(path: str | os.PathLike) -> Iterator[numpy.ndarray]:
    """Each frame that `decode_frames` gives, from the first to the last: uint8 RGB [H, W, 3].

    Raises VideoError as `decode_frames` does.
    """
    for _, frame in timed_frames(path):
        yield frame


def timed_frames(path: str | os.PathLike) -> Iterator[TimedFrame]:
    """Each frame of `every_frame` with its timestamp."""
    with decoding(path), opened(path) as (container, stream, jpegs):
        if jpegs is not None:
            for index, ticks in enumerate(jpegs.timestamps):
                yield ticks * stream.time_base, jpegs.frame(index)
            return
        to_rgb = RGBConverter()
        for frame in decoded(container, stream):
            yield None if frame.pts is None else frame.pts * frame.time_base, to_rgb(frame)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[tuple]:
    """(container, video stream, the frames as a JPEGVideo or None) of a file; closed in the end."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        jpegs = JPEGVideo.open(path, container, stream)
        with contextlib.nullcontext() if jpegs is None else jpegs:
            yield container, stream, jpegs


def decoded(container: av.container.InputContainer, stream, on_damage=lambda: None) -> Iterator[av.VideoFrame]:
    """Every frame from the container's position on, in presentation order; a damaged packet is passed
    over, as players do, after calling `on_damage`."""
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                on_damage()
                continue
            yield from frames
    except av.error.InvalidDataError:  # the container itself breaks off
        on_damage()


class SeekMissedError(Exception):
    """A seek did not lead to the frame that the seek point names."""


def wanted_frames(
    path: str | os.PathLike, wanted: list[int], seek_points: Sequence[SeekPoint]
) -> Iterator[tuple[int, numpy.ndarray]]:
    """(index, frame) of each of the sorted indices, as for `decode_frames`. Raises SeekMissedError."""
    with opened(path) as (container, stream, jpegs):
        if jpegs is not None:
            if wanted[-1] >= len(jpegs):
                raise _too_few(path, wanted[-1], len(jpegs))
            yield from ((index, jpegs.frame(index)) for index in wanted)
            return
        to_rgb = RGBConverter()
        frames = decoded(container, stream)
        position = 0  # index of the frame that `frames` gives next
        for index in wanted:
            point = _best_seek_point(seek_points, index)
            if point is not None and point.index > position + _SEEK_COST_FRAMES:
                frames = _seek(container, stream, point)
                position = point.index
            for frame in frames:
                position += 1
                to_rgb.see(frame)
                if position > index:
                    yield index, to_rgb(frame)
                    break
            else:
                raise _too_few(path, index, position)


def _too_few(path: str | os.PathLike, index: int, frames: int) -> VideoError:
    return VideoError(f"{path}: frame {index} was wanted, the file has {frames} decodable frames")


def _best_seek_point(seek_points: Sequence[SeekPoint], index: int) -> SeekPoint | None:
    best = None
    for point in seek_points:
        if point.index > index:
            break
        best = point
    return best


def _seek(container, stream, point: SeekPoint) -> Iterator[av.VideoFrame]:
    """The frames from a seek point on."""
    container.seek(point.pts, stream=stream, backward=True)
    frames = decoded(container, stream)
    for frame in frames:
        if frame.pts is None or frame.pts > point.pts:
            break
        if frame.pts == point.pts:
            return itertools.chain([frame], frames)
    raise SeekMissedError


class RGBConverter:
    """Frames of one file to upright RGB arrays [H, W, 3]. Size and orientation are the first frame's, as in players:
    H.264 and HEVC may name an orientation once, in front of the first frame."""

    def __init__(self):
        self._reformatter = VideoReformatter()  # kept: setting one up for each frame costs as much as using it
        self._size = None  # (width, height) as stored
        self._orientation = Orientation()

    def see(self, frame: av.VideoFrame) -> None:
        """The file's first frame must be seen, whether it is converted or not."""
        if self._size is None:
            self._size, self._orientation = (frame.width, frame.height), orientation_of(frame)

    def __call__(self, frame: av.VideoFrame) -> numpy.ndarray:
        self.see(frame)
        rgb = self._reformatter.reformat(frame, *self._size, "rgb24", threads=1).to_ndarray()
        return self._orientation.upright(rgb)
