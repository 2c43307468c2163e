"""Which frames of a video make a clip: number of frames -> frame indices. Pure arithmetic.

To add a sampling, write a class with the methods of `FrameSampling` and give it a name in SAMPLINGS.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class FrameSampling(Protocol):
    """A way to choose clips. A place is one integer that names a clip of a video."""

    clip_frames: int

    def random(self, video_frames: int, generator: random.Random) -> list[int]:
        """The frame indices of a random clip, for training."""

    def places(self, video_frames: int) -> list[int]:
        """The clips that a video is tested on."""

    def at(self, video_frames: int, place: int) -> list[int]:
        """The frame indices of the clip at a place."""

    def is_too_short(self, video_frames: int) -> bool:
        """Whether a clip of such a video repeats frames."""


def clip_span_frames(clip_frames: int, frame_stride: int) -> int:
    return (clip_frames - 1) * frame_stride + 1


def window(start: int, video_frames: int, clip_frames: int, frame_stride: int) -> list[int]:
    """The indices of one window; past the last frame it goes on from the first."""
    return [(start + step * frame_stride) % video_frames for step in range(clip_frames)]


def random_start(video_frames: int, clip_frames: int, frame_stride: int, generator: random.Random) -> int:
    """A start from which the window fits, each equally likely; 0 in a video that must be looped."""
    return generator.randint(0, _last_start(video_frames, clip_frames, frame_stride))


def spread_starts(video_frames: int, clip_frames: int, frame_stride: int, views: int) -> list[int]:
    """`views` starts spread evenly over the video; one view is centred."""
    last = _last_start(video_frames, clip_frames, frame_stride)
    if views == 1:
        return [last // 2]
    return [round(view * last / (views - 1)) for view in range(views)]


def every_start(video_frames: int, clip_frames: int, frame_stride: int, step_frames: int) -> list[int]:
    """Every window that fits, `step_frames` apart (the published training epoch: step 16); at least one."""
    return list(range(0, _last_start(video_frames, clip_frames, frame_stride) + 1, step_frames))


def random_in_segments(video_frames: int, segments: int, generator: random.Random) -> list[int]:
    """A random frame of each of `segments` equal parts of the video (TSN, arXiv 1608.00859, section 3).

    A part shorter than a frame gives the frame it starts in: a video with fewer frames than segments
    repeats some, in order.
    """
    _check_frames(video_frames)
    bounds = [segment * video_frames // segments for segment in range(segments + 1)]
    return [generator.randint(bounds[n], max(bounds[n], bounds[n + 1] - 1)) for n in range(segments)]


def fixed_in_segments(video_frames: int, segments: int, view: int, views: int) -> list[int]:
    """The frame of each of `segments` equal parts that lies (view + 1/2) / views of the way through it:
    the middle one for a single view, as TSN tests."""
    _check_frames(video_frames)
    parts = 2 * views * segments
    return [(2 * views * segment + 2 * view + 1) * video_frames // parts for segment in range(segments)]


@dataclass(frozen=True)
class WindowSampling:
    """`clip_frames` frames, `frame_stride` apart: they span (clip_frames - 1) * frame_stride + 1 frames of
    the video. A video shorter than the span is looped. A place is the window's first frame."""

    clip_frames: int
    frame_stride: int = 1
    views: int = 1  # fixed clips a video

    def random(self, video_frames: int, generator: random.Random) -> list[int]:
        return self.at(video_frames, random_start(video_frames, self.clip_frames, self.frame_stride, generator))

    def places(self, video_frames: int) -> list[int]:
        return spread_starts(video_frames, self.clip_frames, self.frame_stride, self.views)

    def every_place(self, video_frames: int, step_frames: int) -> list[int]:
        return every_start(video_frames, self.clip_frames, self.frame_stride, step_frames)

    def at(self, video_frames: int, place: int) -> list[int]:
        return window(place, video_frames, self.clip_frames, self.frame_stride)

    def is_too_short(self, video_frames: int) -> bool:
        return video_frames < clip_span_frames(self.clip_frames, self.frame_stride)


@dataclass(frozen=True)
class SegmentSampling:
    """One frame of each of `clip_frames` equal parts of the whole video (TSN). A place is a view's number."""

    clip_frames: int
    views: int = 1

    def random(self, video_frames: int, generator: random.Random) -> list[int]:
        return random_in_segments(video_frames, self.clip_frames, generator)

    def places(self, video_frames: int) -> list[int]:
        return list(range(self.views))

    def at(self, video_frames: int, place: int) -> list[int]:
        return fixed_in_segments(video_frames, self.clip_frames, place, self.views)

    def is_too_short(self, video_frames: int) -> bool:
        return video_frames < self.clip_frames


# name -> (frames a clip, frame stride, test clips a video) -> sampling
SAMPLINGS: dict[str, Callable[[int, int, int], FrameSampling]] = {
    "segments": lambda clip_frames, frame_stride, views: SegmentSampling(clip_frames, views),
    "window": WindowSampling,
}


def _last_start(video_frames: int, clip_frames: int, frame_stride: int) -> int:
    _check_frames(video_frames)
    return max(0, video_frames - clip_span_frames(clip_frames, frame_stride))


def _check_frames(video_frames: int) -> None:
    if video_frames < 1:
        raise ValueError(f"a video has at least one frame, got {video_frames}")
