"""Number of frames -> frame indices. Pure arithmetic; a random choice takes its generator.

A window is `clip_frames` frames, `frame_stride` apart: it spans (clip_frames - 1) * frame_stride + 1
frames of the video. A video shorter than the span is looped.
"""

import random


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


def _last_start(video_frames: int, clip_frames: int, frame_stride: int) -> int:
    if video_frames < 1:
        raise ValueError(f"a video has at least one frame, got {video_frames}")
    return max(0, video_frames - clip_span_frames(clip_frames, frame_stride))
