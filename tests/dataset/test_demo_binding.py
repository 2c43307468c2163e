"""The demo that takes both branches: frames do not tell the motion, residual frames do not tell the stripes."""

import dataclasses
import functools
import itertools

import numpy
import pytest
import torch

from dataset import demo_binding
from dataset.decode import decode_frames
from dataset.demo import DEMOS, DemoSettings, generate_demo
from dataset.demo_binding import MOTIONS, Scene, draw_scene, render
from dataset.residual import key_residual_split
from dataset.splits import read_hmdb51

SIDE, FRAMES = 64, 8
SCENES = [(name, seed) for name in MOTIONS for seed in range(40)]


def scene(name: str, seed: int) -> Scene:
    return draw_scene(name, numpy.random.default_rng([list(MOTIONS).index(name), seed]))


def class_of(scene: Scene) -> str:
    return next(half.motion for half in scene.halves if half.vertical)


def stripes_exchanged(scene: Scene) -> Scene:
    """The blobs stay as they are; each half gets the ground of the other."""
    ground = ("vertical", "period", "phase", "grey", "contrast")
    a, b = ({name: getattr(half, name) for name in ground} for half in scene.halves)
    return dataclasses.replace(
        scene, halves=(dataclasses.replace(scene.halves[0], **b), dataclasses.replace(scene.halves[1], **a))
    )


def other_motions(scene: Scene, motions: tuple[str, str], time: int) -> Scene:
    """The blobs move elsewhere, and stand at the same places at frame `time`."""
    shape = (0.5, 1.0) if scene.side_by_side else (1.0, 0.5)  # of a half, in shares of the side

    def turned(half, motion):
        change = numpy.subtract(MOTIONS[half.motion], MOTIONS[motion]) * half.speed * time / shape
        return dataclasses.replace(half, motion=motion, place=tuple((half.place + change) % 1.0))

    return dataclasses.replace(scene, halves=tuple(map(turned, scene.halves, motions)))


@pytest.mark.parametrize("minus", ["key", "previous"])
def test_residual_frames_do_not_tell_the_stripes(minus):
    """To the bit: the same residual frames belong to a video of the other blob's class, which is as likely."""
    other_class = 0
    for name, seed in SCENES:
        one = scene(name, seed)
        other = stripes_exchanged(one)
        assert {class_of(one), class_of(other)} == {half.motion for half in one.halves}
        other_class += class_of(one) != class_of(other)
        clips = [torch.from_numpy(render(drawn, FRAMES, SIDE)).permute(0, 3, 1, 2)[None] for drawn in (one, other)]
        assert not torch.equal(*clips)
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (key_residual_split(clip, 4, dtype, minus)[1] for clip in clips)
            assert a.abs().max() > 1 and torch.equal(a, b)
    assert other_class / len(SCENES) == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("time", [0, 4])
def test_a_frame_does_not_tell_the_motion(time):
    """The same frame belongs to a video of any other motions, which is as likely: its blobs have other places at
    frame 0, and places are uniform."""
    for (name, seed), motions in zip(SCENES[::10], itertools.product(MOTIONS, MOTIONS), strict=True):
        one = scene(name, seed)
        other = other_motions(one, motions, time)
        a, b = render(one, FRAMES, SIDE), render(other, FRAMES, SIDE)
        assert numpy.abs(a[time].astype(int) - b[time]).max() <= 1  # a place is rounded in its last digit
        assert motions == tuple(half.motion for half in one.halves) or not numpy.array_equal(a, b)


def test_the_class_decides_the_motion_on_the_vertical_stripes_and_nothing_else():
    """Places are uniform; halves, stripes and the other blob's motion are as likely as each other, in every class."""
    for name in MOTIONS:
        drawn = [scene(name, seed) for seed in range(600)]
        assert all(class_of(one) == name for one in drawn)
        layouts = [(one.side_by_side, one.halves[0].vertical) for one in drawn]
        others = [half.motion for one in drawn for half in one.halves if not half.vertical]
        for values, choices in ((layouts, 4), (others, 4)):
            counts = numpy.array([values.count(value) for value in set(values)])
            assert len(counts) == choices and (numpy.abs(counts - 150) < 4 * numpy.sqrt(600 * 0.25 * 0.75)).all()
        for vertical in (True, False):
            places = numpy.array([h.place for one in drawn for h in one.halves if h.vertical == vertical])
            counts = numpy.histogram2d(*places.T, bins=4, range=[[0, 1], [0, 1]])[0]
            assert (numpy.abs(counts - 600 / 16) < 5 * numpy.sqrt(600 / 16)).all()


# ---- a reader of the videos: what can be read from one branch's input, and from both ------------------------


def shift_between(before: numpy.ndarray, after: numpy.ndarray) -> numpy.ndarray:
    """Displacement (right, down) in pixels of what a half shows, by phase correlation on the torus."""
    product = numpy.fft.fft2(after) * numpy.conj(numpy.fft.fft2(before))
    correlation = numpy.fft.ifft2(product / (numpy.abs(product) + 1e-9)).real
    place = numpy.array(numpy.unravel_index(correlation.argmax(), correlation.shape))
    return ((place + numpy.array(before.shape) // 2) % before.shape - numpy.array(before.shape) // 2)[::-1]


def halves_of(frame: numpy.ndarray, side_by_side: bool) -> list[numpy.ndarray]:
    return numpy.split(frame, 2, axis=1 if side_by_side else 0)


@functools.cache
def readings() -> list[tuple]:
    """Of each scene: (class, motions of the two blobs by the residual frames, vertical half by the key frame)."""
    found = []
    for name, seed in SCENES:
        one = scene(name, seed)
        video = render(one, 4, SIDE)[..., 0].astype(int)
        residual = video[1:] - video[0]
        # Where a blob comes to it is brighter; the first frame's own blob is darker in every residual frame.
        arrived = [halves_of(frame.clip(0, None), one.side_by_side) for frame in residual]
        left = [-half for half in halves_of(residual[-1].clip(None, 0), one.side_by_side)]
        moved = [shift_between(left[half], arrived[-1][half]) for half in (0, 1)]
        motions = [max(MOTIONS, key=lambda motion: numpy.dot(MOTIONS[motion], way)) for way in moved]
        # Vertical stripes change from column to column.
        change = [
            numpy.abs(numpy.diff(h, axis=1)).mean() - numpy.abs(numpy.diff(h, axis=0)).mean()
            for h in halves_of(video[0], one.side_by_side)
        ]
        found.append((name, motions, int(numpy.argmax(change))))
    return found


def test_key_and_residual_frames_together_tell_the_class():
    right = [motions[vertical] == name for name, motions, vertical in readings()]
    assert numpy.mean(right) > 0.98


def test_residual_frames_alone_tell_it_in_five_of_eight():
    """The best that is left is to guess the half."""
    guesses = numpy.random.default_rng(0).integers(2, size=(50, len(SCENES)))
    right = [[motions[g] == name for g, (name, motions, _) in zip(row, readings(), strict=True)] for row in guesses]
    assert numpy.mean(right) == pytest.approx(0.625, abs=0.05)


# ---- files ------------------------------------------------------------------------------------------------


def test_no_pixel_is_clipped():
    values = numpy.concatenate([numpy.unique(render(scene(*drawn), 2, SIDE)) for drawn in SCENES])
    brightest = demo_binding._GREY[1] + demo_binding._CONTRAST[1] + demo_binding.LIGHT
    assert values.min() >= demo_binding._GREY[0] - demo_binding._CONTRAST[1] and 180 < values.max() <= brightest < 255


def test_the_file_gives_every_pixel_back(tmp_path):
    settings = DemoSettings(2, 1, frames=FRAMES, side_pixels=32, kind="binding")
    root, splits = generate_demo(tmp_path, settings, workers=1)
    split = read_hmdb51(root, splits, split=1)
    assert split.classes == sorted(MOTIONS) and (len(split.train), len(split.test)) == (8, 4)
    for record in split.train + split.test:
        name, number = split.classes[record.label], int(record.path.rsplit("/", 1)[1].split("_")[0][-4:])
        part = 1 if record in split.train else 2
        seed = numpy.random.SeedSequence([settings.seed, part, list(MOTIONS).index(name), number])
        drawn = render(draw_scene(name, numpy.random.default_rng(seed)), FRAMES, 32)
        assert numpy.array_equal(decode_frames(record.path, range(FRAMES)), drawn)


def test_the_data_set_is_trained_at_the_size_of_its_files():
    settings = DEMOS["demo-binding"]
    assert settings.classes == tuple(MOTIONS) and settings.side_pixels == SIDE and SIDE % 32 == 0
