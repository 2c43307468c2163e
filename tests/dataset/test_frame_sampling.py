import random
from collections import Counter

import pytest

from dataset.frame_sampling import SegmentSampling, WindowSampling


def test_span():
    assert [WindowSampling(*clip).span_frames for clip in ((16, 1), (16, 4), (1, 9))] == [16, 61, 1]


def test_window():
    assert WindowSampling(4, 1).at(20, 3) == [3, 4, 5, 6]
    assert WindowSampling(4, 3).at(20, 3) == [3, 6, 9, 12]


def test_short_videos_are_looped():
    assert WindowSampling(8, 1).at(3, 0) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert WindowSampling(4, 3).at(5, 0) == [0, 3, 1, 4]
    assert WindowSampling(4, 2).at(1, 0) == [0, 0, 0, 0]


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 3])
def test_every_start_that_fits_is_drawn(frames, stride):
    sampling, generator = WindowSampling(8, stride), random.Random(0)
    last = max(0, frames - sampling.span_frames)
    counts = Counter(sampling.random(frames, generator)[0] for _ in range(4000))
    assert set(counts) == set(range(last + 1))
    assert min(counts.values()) > 0.5 * 4000 / (last + 1)


def test_spread_starts():
    assert WindowSampling(16, 1, 1).places(100) == [42]  # centred: 42 frames on either side
    assert WindowSampling(16, 1, 3).places(100) == [0, 42, 84]
    assert WindowSampling(16, 1, 3).places(10) == [0, 0, 0]
    starts = WindowSampling(16, 2, 10).places(1000)
    assert starts[0] == 0 and starts[-1] == 1000 - 31 and len(starts) == 10


def test_every_start_as_published():
    assert WindowSampling(16).every_place(48, 16) == [0, 16, 32]
    assert WindowSampling(16).every_place(47, 16) == [0, 16]
    assert WindowSampling(16).every_place(5, 16) == [0]


@pytest.mark.parametrize("frames", [1, 7, 33, 300])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_indices_are_always_in_the_video(frames, stride):
    sampling, generator = WindowSampling(16, stride, views=4), random.Random(1)
    starts = [sampling.random(frames, generator)[0] for _ in range(50)]
    starts += sampling.places(frames) + sampling.every_place(frames, 16)
    for start in starts:
        indices = sampling.at(frames, start)
        assert len(indices) == 16 and min(indices) >= 0 and max(indices) < frames
        if frames >= sampling.span_frames:
            assert indices == list(range(start, start + 16 * stride, stride))  # not looped where it fits


def test_no_frames():
    with pytest.raises(ValueError, match="at least one frame"):
        WindowSampling(16).random(0, random.Random(0))


def test_the_middle_of_every_segment():
    assert SegmentSampling(4).at(100, 0) == [12, 37, 62, 87]
    assert SegmentSampling(16).at(16, 0) == list(range(16))
    # TSN's own arithmetic: int(tick / 2 + tick * segment) with tick = frames / segments
    for frames in (3, 16, 61, 250, 300):
        assert SegmentSampling(16).at(frames, 0) == [int(frames / 32 + frames / 16 * n) for n in range(16)]


def test_views_lie_evenly_in_every_segment():
    views = [SegmentSampling(4, views=3).at(120, view) for view in range(3)]
    assert views == [[5, 35, 65, 95], [15, 45, 75, 105], [25, 55, 85, 115]]


@pytest.mark.parametrize("frames, segments", [(100, 16), (33, 16), (16, 16), (5, 8), (1, 4)])
def test_a_random_frame_of_every_segment(frames, segments):
    generator = random.Random(1)
    seen = [set() for _ in range(segments)]
    for _ in range(800):
        clip = SegmentSampling(segments).random(frames, generator)
        assert clip == sorted(clip) and clip[0] >= 0 and clip[-1] < frames
        for part, index in zip(seen, clip, strict=True):
            part.add(index)
    for number, part in enumerate(seen):  # every frame of its part and no other
        first = number * frames // segments
        assert part == set(range(first, max(first + 1, (number + 1) * frames // segments)))


def test_samplings_answer_the_same_questions():
    for sampling in (WindowSampling(8, 2, views=3), SegmentSampling(8, views=3)):
        for frames in (1, 7, 8, 15, 16, 90):
            places = sampling.places(frames)
            assert len(places) == 3
            clips = [sampling.at(frames, place) for place in places] + [sampling.random(frames, random.Random(0))]
            assert all(len(clip) == 8 and min(clip) >= 0 and max(clip) < frames for clip in clips)
    assert WindowSampling(8, 2).is_too_short(14) and not WindowSampling(8, 2).is_too_short(15)
    assert SegmentSampling(8).is_too_short(7) and not SegmentSampling(8).is_too_short(8)
