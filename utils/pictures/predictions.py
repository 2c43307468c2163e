"""Pictures of how good predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.figures import COLOURS, drawn, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CLASSES_COUNTED = 12  # a larger confusion matrix shows no numbers
_MOST_CLASSES_NAMED = 120  # a larger one shows no names


def confusion_figure(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """matrix: counts [classes, classes], a row for each true class, a column for each predicted one."""
    from matplotlib.colors import PowerNorm

    counts = torch.as_tensor(matrix).double()
    count = len(classes)
    named = count <= _MOST_CLASSES_NAMED
    side = max(5.0, 2.5 + 0.14 * count) if named else 13.0
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    # The root makes a confusion of a few percent visible.
    image = axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    hits, total = float(counts.trace()), float(counts.sum())
    axes.set(
        xlabel="predicted class", ylabel="true class",
        title=f"{hits:.0f} of {total:.0f} correct ({100 * hits / max(total, 1):.1f} %)",
    )  # fmt: skip
    size, names = 9 if count <= 30 else 6.5, [drawn(name) for name in classes] if named else []
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if count <= _MOST_CLASSES_COUNTED:
        for row, column in counts.nonzero().tolist():
            colour = "white" if share[row, column] > 35 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure


def calibration_figure(table: Tensor, error: float) -> Figure:
    """Reliability diagram: accuracy against confidence. table, error: of `utils.training.report.calibration`."""
    share, _, accuracy = (100 * table).T
    bins = len(table)
    middles = [100 * (n + 0.5) / bins for n in range(bins)]
    figure = new_figure(5, 5.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(middles, accuracy.nan_to_num().tolist(), 92 / bins, color=COLOURS[0], label="network")
    above.plot([0, 100], [0, 100], color="0.3", linestyle="--", label="perfect calibration")
    above.set(ylabel="accuracy (%)", ylim=(0, 100), title=f"Calibration error (ECE) {error:.1f} %")
    above.legend(loc="upper left")
    below.bar(middles, share.tolist(), 92 / bins, color="0.6")
    below.set(xlabel="confidence (%)", ylabel="predictions (%)", xlim=(0, 100))
    return figure
