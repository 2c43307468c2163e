"""The generated data set: no single frame tells the class, the motion does."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy
import pytest

from dataset.decode import decode_frames
from dataset.demo import CLASSES, COLOUR_ORDERS, DemoSettings, draw_colour_order, draw_video, generate_demo
from dataset.index import probe
from dataset.lists import VideoList, read_lists
from dataset.splits import read_hmdb51
from utils.errors import UserError

SETTINGS = DemoSettings(frames=8, side_pixels=40)


def draw(name, seed):
    return draw_video(name, numpy.random.default_rng(seed), SETTINGS).astype(float)


def test_layout_and_files(tiny_demo):
    split = read_hmdb51(*tiny_demo, split=1)
    assert split.classes == sorted(CLASSES)
    assert len(split.train) == 24 and len(split.test) == 8 and not split.missing and not split.unlisted
    info = probe(split.train[0].path)
    assert (info.frames, info.width, info.height, info.fps, info.error) == (10, 40, 40, 30.0, None)


def test_the_lists_name_the_same_videos(tiny_demo):
    folder = tiny_demo[0].parent
    parts = [VideoList(part, folder / f"{part}.txt", folder) for part in ("train", "val")]
    lists, split = read_lists(*parts), read_hmdb51(*tiny_demo, split=1)
    for listed, official in ((lists.train, split.train), (lists.test, split.test)):
        assert sorted(record.path for record in listed) == sorted(record.path for record in official)
        assert all(CLASSES[record.label] == record.path.split("/")[-2] for record in listed)


def test_it_is_drawn_the_same_again(tmp_path, tiny_demo):
    settings = DemoSettings(train_videos_per_class=1, test_videos_per_class=1, frames=10, side_pixels=40)
    root, _ = generate_demo(tmp_path, settings, workers=1)
    name = "grow/train0000_grow_f_nm_np1_fr_goo_0.avi"
    assert (root / name).read_bytes() == (tiny_demo[0] / name).read_bytes()
    stamp = (root / name).stat().st_mtime_ns
    generate_demo(tmp_path, settings, workers=1)
    assert (root / name).stat().st_mtime_ns == stamp  # there already
    generate_demo(tmp_path, DemoSettings(1, 1, frames=5, side_pixels=40), workers=1)
    assert probe(root / name).frames == 5  # other settings: written anew


def test_other_videos_are_never_replaced(tmp_path):
    precious = tmp_path / "videos/wave/a.avi"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"mine")
    with pytest.raises(UserError, match="holds videos that are not the demo's"):
        generate_demo(tmp_path, SETTINGS, workers=1)
    assert precious.read_bytes() == b"mine"


def test_an_interrupted_generation_starts_over(tmp_path, monkeypatch):
    settings = DemoSettings(1, 1, frames=5, side_pixels=40)
    root, _ = generate_demo(tmp_path, settings, workers=1)
    stamp = tmp_path / "demo_settings.json"
    for content in (stamp.read_text().replace("true", "false"), "{", ""):
        stamp.write_text(content)
        next(root.glob("*/*.avi")).write_bytes(b"half")
        generate_demo(tmp_path, settings, workers=1)
        assert all(probe(path).frames == 5 for path in root.glob("*/*.avi"))


def test_test_videos_are_others(tiny_demo):
    videos = {path.read_bytes() for path in tiny_demo[0].glob("*/*.avi")}
    assert len(videos) == 32


def test_coding_keeps_the_drawing(tiny_demo):
    seed = numpy.random.SeedSequence([0, 1, CLASSES.index("grow"), 0])
    settings = DemoSettings(3, 1, frames=10, side_pixels=40)
    drawn = draw_video("grow", numpy.random.default_rng(seed), settings).astype(float)
    coded = decode_frames(tiny_demo[0] / "grow/train0000_grow_f_nm_np1_fr_goo_0.avi", range(10))
    assert numpy.abs(coded - drawn).mean() < 5


def test_shapes_are_brighter_than_their_ground():
    video = draw("grow", 3)
    assert video.min() < 110 < 150 < video.max()
    assert ((video.min(axis=-1) > 115) | (video.min(axis=-1) < 112)).mean() > 0.95


@functools.cache
def grey_videos(name, label):
    return numpy.stack([draw(name, [label, seed]).mean(-1) for seed in range(60)])


@pytest.mark.parametrize("time", [0, 4, 7])
def test_a_frame_is_distributed_alike_in_every_class(time):
    """Same numbers drawn, any class, any time: brightness, coverage and place agree within their noise."""
    statistics = {}
    for label, name in enumerate(CLASSES):
        frames = grey_videos(name, label)[:, time]
        bright = frames > 130
        middle = bright[:, 10:30, 10:30].mean((1, 2))
        statistics[name] = numpy.stack([frames.mean((1, 2)), bright.mean((1, 2)), middle])
    everything = numpy.concatenate(list(statistics.values()), axis=1)
    noise = everything.std(1) / numpy.sqrt(60)
    for name, values in statistics.items():
        assert (numpy.abs(values.mean(1) - everything.mean(1)) < 4 * noise).all(), name


def shift_between(before, after):
    """Displacement (x, y) in pixels by phase correlation on the torus."""
    product = numpy.fft.fft2(after) * numpy.conj(numpy.fft.fft2(before))
    correlation = numpy.fft.ifft2(product / (numpy.abs(product) + 1e-9)).real
    y, x = numpy.unravel_index(correlation.argmax(), correlation.shape)
    side = before.shape[0]
    return (x + side // 2) % side - side // 2, (y + side // 2) % side - side // 2


@pytest.mark.parametrize(
    "name, axis, sign", [("move_left", 0, -1), ("move_right", 0, 1), ("move_up", 1, -1), ("move_down", 1, 1)]
)
def test_moves_go_where_their_name_says(name, axis, sign):
    one_shape = DemoSettings(frames=8, side_pixels=40, shapes=1)
    moved = []
    for seed in range(8):
        video = draw_video(name, numpy.random.default_rng(seed), one_shape).astype(float).mean(-1)
        bright = (video > 130).astype(float)
        moved.append(shift_between(bright[0], bright[6]))
    assert numpy.median(numpy.array(moved)[:, axis]) * sign >= 3
    assert abs(numpy.median(numpy.array(moved)[:, 1 - axis])) <= 1


@pytest.mark.parametrize("name, sign", [("grow", 1), ("shrink", -1)])
def test_sizes_change_as_their_name_says(name, sign):
    one_shape = DemoSettings(frames=3, side_pixels=40, shapes=1)
    changes = []
    for seed in range(20):
        bright = draw_video(name, numpy.random.default_rng(seed), one_shape).astype(float).mean(-1) > 130
        changes.append(bright[2].sum() - bright[0].sum())
    assert numpy.median(changes) * sign > 0


@pytest.mark.parametrize("name", COLOUR_ORDERS)
def test_colour_orders(name):
    """Each tint in its turn, for a quarter of the frames at least; where one ends is drawn."""
    changes = set()
    for seed in range(8):
        frames = draw_colour_order(name, numpy.random.default_rng(seed), DemoSettings(frames=16, side_pixels=24))
        tints = frames.mean((1, 2)).argmax(1)  # the channel that is raised
        seen = [int(tint) for place, tint in enumerate(tints) if place == 0 or tint != tints[place - 1]]
        assert [("red", "green", "blue")[tint] for tint in seen] == name.split("_")
        assert min(numpy.bincount(tints)) >= 4
        changes.add(int((tints == tints[0]).sum()))
    assert len(changes) > 1


def test_two_runs_that_start_at_once_share_one_demo(tmp_path):
    """As the runs of a sweep do: the second waits for the first and finds its videos."""
    settings = DemoSettings(train_videos_per_class=2, test_videos_per_class=1, frames=4, side_pixels=32)
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        started = [pool.submit(generate_demo, tmp_path, settings, workers=1) for _ in range(3)]
        assert len({run.result() for run in started}) == 1
    assert len(list(tmp_path.glob("videos/*/*.avi"))) == 24


def test_another_demo_is_not_replaced(tmp_path):
    small = dict(train_videos_per_class=1, test_videos_per_class=1, frames=4, side_pixels=32)
    generate_demo(tmp_path, DemoSettings(**small), workers=1)
    with pytest.raises(UserError, match=r"holds the videos of another demo \(motion\); name another folder"):
        generate_demo(tmp_path, DemoSettings(**small, kind="binding"), workers=1)
    assert len(list(tmp_path.glob("videos/*/*.avi"))) == 16
