"""Figures without a display: made, written to a file, or taken as a tensor for TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import write_atomically, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DOTS_PER_INCH = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    # Imported here because the import takes a second. A figure without pyplot needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def drawn(name: str) -> str:
    """A user's name for text in a figure: matplotlib takes dollars for a formula, and cannot draw bytes that are no
    text."""
    return name.encode(errors="replace").decode().replace("$", r"\$")


def check_format(file: Path) -> None:
    if file.suffix not in FORMATS:
        raise UserError(f"{file}: the name of a picture must end in {', '.join(FORMATS)}", about="out")


def save_figure(file: Path, figure: Figure) -> None:
    """Write PNG, PDF or SVG, by the suffix. Raises UserError for another suffix, or if the file cannot be written."""
    check_format(file)
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix[1:], dpi=_DOTS_PER_INCH)
    with writing(file):
        write_atomically(file, content.getvalue())


def as_image(figure: Figure) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    figure.canvas.draw()
    pixels = numpy.asarray(figure.canvas.buffer_rgba())[:, :, :3]
    return torch.from_numpy(pixels.astype(numpy.float32) / 255).permute(2, 0, 1)
