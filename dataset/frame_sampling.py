"""Which frames of a video make a clip: number of frames -> frame indices. Pure arithmetic.

To add a sampling, write a class with the methods of `FrameSampling` and give it a name in SAMPLINGS.
"""

import itertools
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


@dataclass(frozen=True)
class WindowSampling:
    """`clip_frames` frames, `frame_stride` apart. A video shorter than their span is looped: past its last frame the
    window goes on from the first. A place is the window's first frame."""

    clip_frames: int
    frame_stride: int = 1
    views: int = 1  # fixed clips a video

    @property
    def span_frames(self) -> int:
        """Frames of the video from the first to the last of a clip."""
        return (self.clip_frames - 1) * self.frame_stride + 1

    def random(self, video_frames: int, generator: random.Random) -> list[int]:
        """Each start from which the window fits is equally likely."""
        return self.at(video_frames, generator.randint(0, self._last_start(video_frames)))

    def places(self, video_frames: int) -> list[int]:
        """Spread evenly over the video; one view is centred."""
        last = self._last_start(video_frames)
        if self.views == 1:
            return [last // 2]
        return [round(view * last / (self.views - 1)) for view in range(self.views)]

    def every_place(self, video_frames: int, step_frames: int) -> list[int]:
        """Every window that fits, `step_frames` apart (the published training epoch: step 16); at least one."""
        return list(range(0, self._last_start(video_frames) + 1, step_frames))

    def at(self, video_frames: int, place: int) -> list[int]:
        return [(place + step * self.frame_stride) % video_frames for step in range(self.clip_frames)]

    def is_too_short(self, video_frames: int) -> bool:
        return video_frames < self.span_frames

    def _last_start(self, video_frames: int) -> int:
        """From which the window fits; 0 in a video that must be looped."""
        _check_frames(video_frames)
        return max(0, video_frames - self.span_frames)


@dataclass(frozen=True)
class SegmentSampling:
    """One frame of each of `clip_frames` equal parts of the whole video (TSN, arXiv 1608.00859, section 3). A place is
    a view's number.

    A part shorter than a frame gives the frame it starts in: a video with fewer frames than parts repeats some, in
    order.
    """

    clip_frames: int
    views: int = 1

    def random(self, video_frames: int, generator: random.Random) -> list[int]:
        """A random frame of each part."""
        _check_frames(video_frames)
        bounds = [part * video_frames // self.clip_frames for part in range(self.clip_frames + 1)]
        return [generator.randint(first, max(first, end - 1)) for first, end in itertools.pairwise(bounds)]

    def places(self, video_frames: int) -> list[int]:
        return list(range(self.views))

    def at(self, video_frames: int, place: int) -> list[int]:
        """The frame that lies (place + 1/2) / views of the way through each part: the middle one for a single view, as
        TSN tests."""
        _check_frames(video_frames)
        parts = 2 * self.views * self.clip_frames
        offset = 2 * place + 1
        return [(2 * self.views * part + offset) * video_frames // parts for part in range(self.clip_frames)]

    def is_too_short(self, video_frames: int) -> bool:
        return video_frames < self.clip_frames


# name -> (frames a clip, frame stride, test clips a video) -> sampling
SAMPLINGS: dict[str, Callable[[int, int, int], FrameSampling]] = {
    "segments": lambda clip_frames, frame_stride, views: SegmentSampling(clip_frames, views),
    "window": WindowSampling,
}


def _check_frames(video_frames: int) -> None:
    if video_frames < 1:
        raise ValueError(f"a video has at least one frame, got {video_frames}")
