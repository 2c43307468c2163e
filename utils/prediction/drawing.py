"""An annotated video: the frame, its key frame and its residual, the prediction so far, firing rates as bars."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy
from PIL import Image, ImageDraw, ImageFont

from utils.files import write_atomically, writing

_PANEL, _GAP, _TITLE, _LINE = 256, 16, 24, 26  # pixels
_WIDTH = 3 * _PANEL + 4 * _GAP
_LINES = 6
_HEIGHT = _GAP + _TITLE + _PANEL + _GAP + _LINES * _LINE + _GAP
_BACK, _TEXT, _FAINT, _ANN, _SNN = "#ffffff", "#222222", "#dddddd", "#2f6db5", "#c4572b"
_FULL_BAR_RATE = 0.5  # firing rate of the longest bar
_FONT, _SMALL = ImageFont.load_default(16), ImageFont.load_default(14)
CODECS = ("libx264", "mpeg4")  # the first that this FFmpeg has


def draw(
    frame: numpy.ndarray,
    key: numpy.ndarray,
    residual: numpy.ndarray | None,
    top: Sequence[tuple[str, float]],
    rates: dict[str, float],
    title: str = "",
) -> Image.Image:
    """One picture. frame, key, residual: uint8 [H, W, 3]; residual None for a key frame.

    top: (class, probability), best first; empty before the first prediction.
    rates: firing rate of each stage, 0 to 1; empty if nothing fired.
    """
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), _BACK)
    pen = ImageDraw.Draw(canvas)
    panels = ((title or "frame", frame, _TEXT), ("key frame", key, _ANN), ("residual frame", residual, _SNN))
    for number, (name, picture, colour) in enumerate(panels):
        left = _GAP + number * (_PANEL + _GAP)
        pen.text((left, _GAP), name, colour, _FONT)
        if picture is None:
            pen.rectangle((left, _GAP + _TITLE, left + _PANEL - 1, _GAP + _TITLE + _PANEL - 1), _FAINT)
        else:
            canvas.paste(Image.fromarray(picture).resize((_PANEL, _PANEL)), (left, _GAP + _TITLE))

    below = 2 * _GAP + _TITLE + _PANEL
    pen.text((_GAP, below), "prediction so far", _TEXT, _FONT)
    for number, (name, probability) in enumerate(top, start=1):
        line = below + number * _LINE
        pen.text((_GAP, line), f"{100 * probability:5.1f} %", _TEXT, _SMALL)
        _bar(pen, _GAP + 64, line, 120, probability, _ANN)
        pen.text((_GAP + 192, line), _shortened(name), _TEXT, _SMALL)
    right = _GAP + 2 * (_PANEL + _GAP)
    pen.text((right, below), "firing rate", _TEXT, _FONT)
    for number, (name, rate) in enumerate(rates.items(), start=1):
        line = below + number * _LINE
        pen.text((right, line), name, _TEXT, _SMALL)
        _bar(pen, right + 60, line, 130, rate / _FULL_BAR_RATE, _SNN)
        pen.text((right + 198, line), f"{100 * rate:.1f} %", _TEXT, _SMALL)
    return canvas


def _bar(pen: ImageDraw.ImageDraw, left: int, top: int, width: int, share: float, colour: str) -> None:
    pen.rectangle((left, top + 2, left + width, top + 15), _FAINT)
    if share > 0:
        pen.rectangle((left, top + 2, left + width * min(1.0, share), top + 15), colour)


def _shortened(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


class VideoWriter:
    """Pictures into an .mp4 file, which is there once `close` has written it whole."""

    def __init__(self, path: Path, fps: float):
        self._path, self._content = path, io.BytesIO()
        self._container = av.open(self._content, "w", format="mp4")
        codec = next(name for name in CODECS if name in av.codecs_available)
        self._stream = self._container.add_stream(codec, Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height, self._stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        if codec == "mpeg4":
            self._stream.bit_rate = 4_000_000

    def add(self, picture: Image.Image) -> None:
        self._container.mux(self._stream.encode(av.VideoFrame.from_image(picture)))

    def close(self) -> None:
        """Raises UserError if the file cannot be written."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        with writing(self._path, about="save"):
            write_atomically(self._path, self._content.getvalue())
