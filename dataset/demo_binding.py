"""Generated videos whose class neither branch can tell alone: how does the blob on the vertical stripes move?

The ground stands still. One half has vertical stripes, the other has horizontal ones: left and right, or above and
below. A bright blob moves in each half, independently of the other: left, right, up or down. The class is the motion
of the blob on the vertical stripes.

- A single frame shows the stripes and not the motion. Each half is a torus, and a blob's place is uniform on the half
  at every frame, whatever its motion: an equally likely video of any other motion has the very same frame. What sees
  key frames alone stays at 25 %.
- A difference of frames shows the motions and not the stripes. A blob adds integers to the integers of its ground and
  stays below white, and the file is lossless: an equally likely video with the stripes exchanged has the very same
  differences. What sees residual frames alone is right where the two motions agree, in a quarter of the videos, and in
  half of the others: 62.5 %.
- Both together tell the class of every video.

The second is exact for frames at the size of the file. Scaled frames are rounded to integers, and the rounding of a
residual by one level, of the blob's 90, depends on the ground.
"""

import math
from dataclasses import dataclass

import numpy

# Class -> direction to the right, direction down.
MOTIONS = {"move_left": (-1, 0), "move_right": (1, 0), "move_up": (0, -1), "move_down": (0, 1)}
LIGHT = 90  # what a blob adds to its ground, in levels of 255
_RADIUS = 0.075  # of a blob; this and the other lengths are shares of the frame's side
_SPEED = 0.03, 0.05  # a frame
_PERIOD = 0.11, 0.16  # of the stripes: some eight pixels of 64
_GREY = 55, 90  # middle between the dark and the bright stripes
_CONTRAST = 20, 35  # of the stripes, to both sides of the middle


@dataclass(frozen=True)
class Half:
    """Everything that is drawn of one half of the frame."""

    vertical: bool  # its stripes
    period: float  # of the stripes, as a share of the frame's side
    phase: float  # of the stripes, radians
    grey: float
    contrast: float
    motion: str  # of its blob, a name in MOTIONS
    place: tuple[float, float]  # of the blob's centre at frame 0: right, down; as shares of the half's width and height
    speed: float  # of the blob, as a share of the frame's side, a frame


@dataclass(frozen=True)
class Scene:
    side_by_side: bool  # the halves lie left and right; else above and below
    halves: tuple[Half, Half]


def draw_scene(name: str, generator: numpy.random.Generator) -> Scene:
    """A scene of the class `name`. The class decides one thing: the motion of the blob on the vertical stripes."""
    vertical = int(generator.integers(2))

    def half(number: int) -> Half:
        other = list(MOTIONS)[generator.integers(len(MOTIONS))]
        return Half(
            vertical=number == vertical,
            period=generator.uniform(*_PERIOD),
            phase=generator.uniform(0, 2 * math.pi),
            grey=generator.uniform(*_GREY),
            contrast=generator.uniform(*_CONTRAST),
            motion=name if number == vertical else other,
            place=tuple(generator.uniform(0, 1, 2)),
            speed=generator.uniform(*_SPEED),
        )

    return Scene(bool(generator.integers(2)), (half(0), half(1)))


def render(scene: Scene, frames: int, side: int) -> numpy.ndarray:
    """uint8 RGB [frames, side, side, 3], grey. side: an even number of pixels."""
    width, height = (side // 2, side) if scene.side_by_side else (side, side // 2)
    axis = 2 if scene.side_by_side else 1
    video = numpy.concatenate(
        [_ground(half, width, height, side) + _light(half, frames, width, height, side) for half in scene.halves], axis
    )  # int [frames, side, side]
    return numpy.repeat(video[..., None], 3, axis=3).astype(numpy.uint8)


def _ground(half: Half, width: int, height: int, side: int) -> numpy.ndarray:
    """The stripes: int [height, width], the same at every frame."""
    y, x = numpy.ogrid[:height, :width]
    wave = numpy.sin(2 * math.pi * (x if half.vertical else y) / (half.period * side) + half.phase)
    return numpy.broadcast_to(half.grey + half.contrast * wave, (height, width)).round().astype(int)


def _light(half: Half, frames: int, width: int, height: int, side: int) -> numpy.ndarray:
    """What the blob adds: int [frames, height, width], a disc with an edge of a pixel, on the torus of its half."""
    right, down = MOTIONS[half.motion]
    travelled = numpy.arange(frames)[:, None, None] * half.speed * side  # pixels, [T, 1, 1]
    y, x = numpy.ogrid[:height, :width]
    dx = _around(x + 0.5 - half.place[0] * width - right * travelled, width)
    dy = _around(y + 0.5 - half.place[1] * height - down * travelled, height)
    inside = (_RADIUS * side - numpy.hypot(dx, dy) + 0.5).clip(0, 1)
    return (LIGHT * inside).round().astype(int)


def _around(distance: numpy.ndarray, length: int) -> numpy.ndarray:
    """The shorter way around a circle of `length`, with its sign."""
    return (distance + length / 2) % length - length / 2
