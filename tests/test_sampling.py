import random
from collections import Counter

import pytest

from dataset.sampling import clip_span_frames, every_start, random_start, spread_starts, window


def test_span():
    assert clip_span_frames(16, 1) == 16 and clip_span_frames(16, 4) == 61 and clip_span_frames(1, 9) == 1


def test_window():
    assert window(3, 20, 4, 1) == [3, 4, 5, 6]
    assert window(3, 20, 4, 3) == [3, 6, 9, 12]


def test_short_videos_are_looped():
    assert window(0, 3, 8, 1) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert window(0, 5, 4, 3) == [0, 3, 1, 4]
    assert window(0, 1, 4, 2) == [0, 0, 0, 0]


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 3])
def test_every_start_that_fits_is_drawn(frames, stride):
    last = max(0, frames - clip_span_frames(8, stride))
    generator = random.Random(0)
    counts = Counter(random_start(frames, 8, stride, generator) for _ in range(4000))
    assert set(counts) == set(range(last + 1))
    assert min(counts.values()) > 0.5 * 4000 / (last + 1)


def test_spread_starts():
    assert spread_starts(100, 16, 1, 1) == [42]  # centred: 42 frames on either side
    assert spread_starts(100, 16, 1, 3) == [0, 42, 84]
    assert spread_starts(10, 16, 1, 3) == [0, 0, 0]
    starts = spread_starts(1000, 16, 2, 10)
    assert starts[0] == 0 and starts[-1] == 1000 - 31 and len(starts) == 10


def test_every_start_as_published():
    assert every_start(48, 16, 1, 16) == [0, 16, 32]
    assert every_start(47, 16, 1, 16) == [0, 16]
    assert every_start(5, 16, 1, 16) == [0]


@pytest.mark.parametrize("frames", [1, 7, 33, 300])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_indices_are_always_in_the_video(frames, stride):
    generator = random.Random(1)
    starts = [random_start(frames, 16, stride, generator) for _ in range(50)]
    starts += spread_starts(frames, 16, stride, 4) + every_start(frames, 16, stride, 16)
    for start in starts:
        indices = window(start, frames, 16, stride)
        assert len(indices) == 16 and min(indices) >= 0 and max(indices) < frames
        if frames >= clip_span_frames(16, stride):
            assert indices == list(range(start, start + 16 * stride, stride))  # not looped where it fits


def test_no_frames():
    with pytest.raises(ValueError, match="at least one frame"):
        random_start(0, 16, 1, random.Random(0))
