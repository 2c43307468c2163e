"""Generated data sets: eight classes of motion that no single frame tells, a question that takes both branches, or six
orders of colours.

Motion: six textured shapes, brighter than their textured ground, move left, right, up or down, turn clockwise or
counter-clockwise, grow or shrink. Everything else is drawn independently of the class and stays so in every frame:
places lie on a torus, angles on a circle, and the logarithm of the size on an interval whose ends are joined, so a
shape that has become largest goes on as smallest. A single frame therefore has the same distribution under every
class. A horizontal flip would swap classes.

Binding: how does the blob on the vertical stripes move? See dataset/demo_binding.py.

Orders of colours: three tints of the ground follow each other, each for some frames; the class is their order. It is
for heads on the features of a frozen CNN: even a random one tells tints apart, and the last frame alone leaves two
orders to choose from.

Written in AVI, in HMDB-51's layout, by PyAV.
"""

import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy

from dataset import demo_binding
from utils.errors import UserError
from utils.lock import locked
from utils.progress import Progress
from utils.signals import leave_signals_to_the_main_process

# Class -> direction to the right, direction down, clockwise turn, growth.
_MOTIONS = {
    "move_left": (-1, 0, 0, 0), "move_right": (1, 0, 0, 0), "move_up": (0, -1, 0, 0), "move_down": (0, 1, 0, 0),
    "turn_clockwise": (0, 0, 1, 0), "turn_counterclockwise": (0, 0, -1, 0),
    "grow": (0, 0, 0, 1), "shrink": (0, 0, 0, -1),
}  # fmt: skip
CLASSES = tuple(_MOTIONS)
_FRAMES_A_SECOND = 30
_PARTS = {"train": 1, "test": 2}  # the numbers in HMDB-51's split files
_TINTS = {"red": (1.6, 0.7, 0.7), "green": (0.7, 1.6, 0.7), "blue": (0.7, 0.7, 1.6)}
COLOUR_ORDERS = tuple("_".join(order) for order in itertools.permutations(_TINTS))


@dataclass(frozen=True)
class DemoSettings:
    """Everything that shapes the generated files."""

    train_videos_per_class: int = 120
    test_videos_per_class: int = 24
    frames: int = 16
    side_pixels: int = 80
    shapes: int = 6
    seed: int = 0
    version: int = 2  # of the code below
    kind: str = "motion"  # a key of _KINDS

    @property
    def classes(self) -> tuple[str, ...]:
        return _KINDS[self.kind].classes


def generate_demo(root: Path, settings: DemoSettings, workers: int) -> tuple[Path, Path]:
    """Write the data set under `root` unless it is there already, with these settings.

    Returns (data_root, annotation_path) for `dataset.splits.read_hmdb51`. train.txt and val.txt name the
    same videos for `dataset.lists`.
    """
    videos, splits, stamp = root / "videos", root / "splits", root / "demo_settings.json"
    wanted = json.dumps({**asdict(settings), "complete": True})

    def is_there() -> bool:
        return stamp.is_file() and stamp.read_text() == wanted

    try:
        if not is_there():
            root.mkdir(parents=True, exist_ok=True)
            with locked(root, waits=True):  # several runs that start at once, as in a sweep
                if not is_there():
                    _generate(root, settings, workers)
                    stamp.write_text(wanted)
    except OSError as error:
        raise UserError(f"{root}: the demo videos cannot be written ({error.strerror})") from error
    return videos, splits


def _generate(root: Path, settings: DemoSettings, workers: int) -> None:
    videos, splits, stamp = root / "videos", root / "splits", root / "demo_settings.json"
    counts = {"train": settings.train_videos_per_class, "test": settings.test_videos_per_class}
    # Only what carries the demo's stamp is the demo's to replace.
    if not stamp.is_file() and (videos.exists() or splits.exists()):
        raise UserError(f"{root}: holds videos that are not the demo's; name another folder", about="data_root")
    try:
        kind = json.loads(stamp.read_text())["kind"]
    except (FileNotFoundError, ValueError):  # none, or of a generation that was interrupted
        kind = settings.kind
    if kind != settings.kind:
        raise UserError(f"{root}: holds the videos of another demo ({kind}); name another folder", about="data_root")
    stamp.write_text("")  # an interrupted generation starts over
    for folder in (videos, splits):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    # <source>_<class>_<properties>_<number>.avi, as HMDB-51 names its files
    tasks = [
        (videos / name / f"{part}{number:04d}_{name}_f_nm_np1_fr_goo_0.avi", label, part, number, settings)
        for label, name in enumerate(settings.classes)
        for part in _PARTS
        for number in range(counts[part])
    ]
    for name in settings.classes:
        (videos / name).mkdir()
        lines = [f"{file.name} {_PARTS[part]}\n" for file, _, part, *_ in tasks if file.parent.name == name]
        (splits / f"{name}_test_split1.txt").write_text("".join(lines))
    for part, list_name in (("train", "train.txt"), ("test", "val.txt")):
        lines = [f"{file.relative_to(root)} {label}\n" for file, label, of, *_ in tasks if of == part]
        (root / list_name).write_text("".join(lines))
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    with (
        ProcessPoolExecutor(workers, context, leave_signals_to_the_main_process) as pool,
        Progress(len(tasks), "generating demo videos", unit="video") as progress,
    ):
        for _ in pool.map(_write_task, tasks, chunksize=4):
            progress.advance()


def copy_lists(root: Path, copy: Path) -> None:
    """What `generate_demo` wrote under `root` beside the videos, to a folder that holds copies of the videos:
    it is then a complete demo data set itself."""
    try:
        shutil.copytree(root / "splits", copy / "splits", dirs_exist_ok=True)
        for name in ("train.txt", "val.txt", "demo_settings.json"):
            shutil.copyfile(root / name, copy / name)
    except OSError as error:
        raise UserError(f"{copy}: the demo's lists cannot be copied ({error.strerror})") from error


def _write_task(task: tuple) -> None:
    path, label, part, number, settings = task
    # The test videos' numbers are drawn from other seeds than the training videos'.
    seed = numpy.random.SeedSequence([settings.seed, _PARTS[part], label, number])
    kind = _KINDS[settings.kind]
    frames = kind.draw(settings.classes[label], numpy.random.default_rng(seed), settings)
    write_video(path, frames, lossless=kind.lossless)


def write_video(path: Path, frames: numpy.ndarray, lossless: bool = False) -> None:
    """uint8 RGB [T, H, W, 3] to an .avi: MPEG-4 at a bit rate that leaves no trace of the motion in a frame, or FFV1,
    which gives every pixel back as it was."""
    codec, pixels = ("ffv1", "bgr0") if lossless else ("mpeg4", "yuv420p")
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream(codec, rate=Fraction(_FRAMES_A_SECOND))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        stream.codec_context.gop_size = 12
        stream.codec_context.bit_rate = 8_000_000
        stream.codec_context.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(numpy.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


_LOG_SIZE = math.log(0.08), math.log(0.19)  # half the length of a shape, as a share of the frame's side
_FLATTENED = 0.3  # width of a shape by its length: what is long shows which way it turns


def draw_video(name: str, generator: numpy.random.Generator, settings: DemoSettings) -> numpy.ndarray:
    """One video of a class: uint8 RGB [frames, side, side, 3]."""
    side = settings.side_pixels
    ground = _texture(generator, side, cells=10, low=20, high=110)  # [side, side, 3]
    # Every shape gets every kind of random number, so what the class does not use says nothing of it.
    shapes = [
        {
            "centre": generator.uniform(0, 1, 2),
            "angle": generator.uniform(0, 2 * math.pi),
            "log_size": generator.uniform(*_LOG_SIZE),
            "speed": generator.uniform(0.02, 0.035),  # of the side, a frame
            "turn": generator.uniform(0.22, 0.32),  # radians a frame
            "growth": generator.uniform(0.05, 0.08),  # of the logarithm, a frame
            "corners": int(generator.integers(3, 6)),
            "texture": _texture(generator, 24, cells=6, low=150, high=255),
        }
        for _ in range(settings.shapes)
    ]
    frames = []
    for time in range(settings.frames):
        frame = ground.copy()
        for shape in shapes:
            place, alpha, colour = _draw_shape(shape, *_pose(name, shape, time), side)
            frame[place] += alpha[..., None] * (colour - frame[place])
        frames.append(frame)
    return numpy.stack(frames).round().clip(0, 255).astype(numpy.uint8)


def draw_colour_order(name: str, generator: numpy.random.Generator, settings: DemoSettings) -> numpy.ndarray:
    """One video of a class such as red_blue_green: uint8 RGB [frames, side, side, 3]. Each tint lasts for a quarter
    of the frames at least."""
    side, frames = settings.side_pixels, settings.frames
    ground = _texture(generator, side, cells=10, low=60, high=140)
    first = int(generator.integers(frames // 4, frames // 2 + 1))
    second = int(generator.integers(first + frames // 4, frames - frames // 4 + 1))
    video = []
    for time in range(frames):
        tint = name.split("_")[(time >= first) + (time >= second)]
        drift = numpy.roll(ground, time, axis=1)
        video.append(drift * _TINTS[tint] + generator.normal(0, 8, ground.shape))
    return numpy.stack(video).round().clip(0, 255).astype(numpy.uint8)


def draw_binding(name: str, generator: numpy.random.Generator, settings: DemoSettings) -> numpy.ndarray:
    """One video of a class of dataset/demo_binding.py: uint8 RGB [frames, side, side, 3]."""
    return demo_binding.render(demo_binding.draw_scene(name, generator), settings.frames, settings.side_pixels)


def _pose(name: str, shape: dict, time: int) -> tuple[numpy.ndarray, float, float]:
    """Place, angle and size of a shape at a frame; x to the right, y down, angles clockwise on the screen."""
    right, down, turn, growth = _MOTIONS[name]
    centre = (shape["centre"] + time * shape["speed"] * numpy.array((right, down))) % 1.0
    angle = shape["angle"] + time * turn * shape["turn"]
    low, high = _LOG_SIZE
    log_size = low + (shape["log_size"] - low + time * growth * shape["growth"]) % (high - low)
    return centre, angle, math.exp(log_size)


def _draw_shape(shape: dict, centre, angle: float, size: float, side: int) -> tuple:
    """(rows and columns of a patch [P, P] around the shape, on the torus; coverage [P, P]; colour
    [P, P, 3]) of a flattened polygon with the shape's texture."""
    reach = min(math.ceil(size * side) + 2, side // 2)
    offsets = numpy.arange(-reach, reach if 2 * reach == side else reach + 1)
    columns, rows = (offsets + math.floor(c * side) for c in centre)
    dx = ((columns + 0.5) / side - centre[0])[None, :]
    dy = ((rows + 0.5) / side - centre[1])[:, None]
    x = (numpy.cos(angle) * dx + numpy.sin(angle) * dy) / size
    y = (-numpy.sin(angle) * dx + numpy.cos(angle) * dy) / (size * _FLATTENED)
    sector = 2 * math.pi / shape["corners"]
    radius, phi = numpy.hypot(x, y), numpy.arctan2(y, x)
    # Distance to the polygon's edge in units of its size, with an edge about a pixel soft.
    inside = math.cos(sector / 2) - radius * numpy.cos((phi % sector) - sector / 2)
    alpha = (inside * size * side + 0.5).clip(0.0, 1.0)
    cells = len(shape["texture"])
    column, row = (((axis + 1) / 2 * (cells - 1)).clip(0, cells - 1.001) for axis in (x, y))
    return numpy.ix_(rows % side, columns % side), alpha, _bilinear(shape["texture"], row, column)


def _texture(generator: numpy.random.Generator, side: int, cells: int, low: float, high: float) -> numpy.ndarray:
    """Smooth colour noise between two brightnesses: float [side, side, 3]."""
    noise = generator.uniform(low, high, (cells, cells, 3))
    axis = numpy.linspace(0, cells - 1.001, side)
    return _bilinear(noise, axis[:, None], axis[None, :])


def _bilinear(image: numpy.ndarray, row: numpy.ndarray, column: numpy.ndarray) -> numpy.ndarray:
    row, column = numpy.broadcast_arrays(row, column)
    r, c = row.astype(int), column.astype(int)
    fr, fc = (row - r)[..., None], (column - c)[..., None]
    top = image[r, c] * (1 - fc) + image[r, c + 1] * fc
    bottom = image[r + 1, c] * (1 - fc) + image[r + 1, c + 1] * fc
    return top * (1 - fr) + bottom * fr


@dataclass(frozen=True)
class _Kind:
    classes: tuple[str, ...]
    draw: Callable[[str, numpy.random.Generator, DemoSettings], numpy.ndarray]
    lossless: bool = False


_KINDS = {
    "motion": _Kind(CLASSES, draw_video),
    "binding": _Kind(tuple(demo_binding.MOTIONS), draw_binding, lossless=True),
    "colour_orders": _Kind(COLOUR_ORDERS, draw_colour_order),
}
# Name of a data set -> its settings.
DEMOS = {
    "demo": DemoSettings(),
    # 64 pixels: trained at this size, its frames are not scaled.
    "demo-binding": DemoSettings(300, 75, side_pixels=64, kind="binding", version=1),
    "demo_orders": DemoSettings(kind="colour_orders"),
}
