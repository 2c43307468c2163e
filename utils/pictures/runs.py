"""Pictures of training runs side by side."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.figures import COLOURS, drawn, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE_STYLES = ("-", "--", "-.", ":")


def read_metrics(run: Path) -> list[dict]:
    """The epochs of a training run's metrics.jsonl. Raises UserError if there is none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{run}: expected the folder of a training run, found no metrics.jsonl in it")
    lines = []
    for text in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a line that is being written, or was when the run was killed
            lines.append(json.loads(text))
    lines = [line for line in lines if "train_loss" in line]  # the closing line has what the whole run cost
    if not lines:
        raise UserError(f"{file}: expected lines with train_loss, found none; has the first epoch ended?")
    return lines


def curves_figure(runs: dict[str, list[dict]]) -> Figure:
    """Loss, accuracy and firing rates by epoch. runs: name -> lines of metrics.jsonl."""
    figure = new_figure(12, 4.2)
    loss, accuracy, firing = figure.subplots(1, 3)
    for (name, lines), colour in zip(runs.items(), _colours(len(runs)), strict=True):
        epochs = [line["epoch"] + 1 for line in lines]

        def draw(axes: Axes, values: list[float], style: str, epochs=epochs, colour=colour, **more) -> None:
            axes.plot(epochs, values, style, color=colour, marker=".", markersize=5, linewidth=1.3, **more)

        draw(loss, [line["train_loss"] for line in lines], "--")
        draw(loss, [line[f"{line['evaluated_on']}_loss"] for line in lines], "-", label=drawn(name))
        draw(accuracy, [line["train_clip_top1"] for line in lines], "--")
        draw(accuracy, [line["video_top1"] for line in lines], "-")
        for stage, style in zip(lines[-1]["firing_rate"], _LINE_STYLES, strict=False):
            draw(firing, [100 * line["firing_rate"][stage] for line in lines], style)
    loss.set(ylabel="loss", ylim=(0, None))
    accuracy.set(ylabel="top-1 accuracy (%)", ylim=(0, 102))
    firing.set(ylabel="firing rate (%)", ylim=(0, None))
    _explain_styles(loss, {"training": "--", "evaluation": "-"})
    _explain_styles(accuracy, {"training, clips": "--", "evaluation, videos": "-"})
    _explain_styles(firing, {f"stage {n}": style for n, style in enumerate(_LINE_STYLES, 1)})
    for axes in (loss, accuracy, firing):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)))
    return figure


def _explain_styles(axes: Axes, styles: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in styles.items()]
    axes.legend(
        handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(lines), fontsize=8, frameon=False,
        handlelength=1.8, columnspacing=1,
    )  # fmt: skip


def _colours(count: int) -> list:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](number / (count - 1)) for number in range(count)]
