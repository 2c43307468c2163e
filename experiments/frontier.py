"""Accuracy against energy: the networks of sweeps, and which of them no other beats in both.

    python -m experiments.frontier runs/ablations runs/fights --titles "binding demo" "fights" --out frontier.png
    python -m experiments.frontier runs/demo runs/demo-ann --out frontier.png

A sweep (its --out) becomes a panel: a point is a variant, at its mean over seeds or folds, with its deviation. Run
folders become one panel. Every run needs the evaluation.json that evaluate.py --energy writes; sweeps have it. Networks
without an SNN stand beside ReSpike as open squares. A network is on the Pareto front if every other one that is at
least as accurate takes more energy. Energy is arithmetic only, an estimate.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import ArgumentParser, UserError
from utils.figures import COLOURS, check_format, drawn, new_figure, save_figure
from utils.script import run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_RESPIKE, _OTHER, _FRONT = *COLOURS[:2], "0.45"
_RADII = (2, 10, 20, 34, 50, 70, 95)  # pixels from a point's marker to its name
_MARKER_PIXELS = 6  # half its side


@dataclass(frozen=True)
class Point:
    """A network, by its runs."""

    name: str
    top1: tuple[float, ...]  # video top-1 of each run, percent
    energy_mj: float  # of a clip, mean over runs
    spiking: bool  # whether it has an SNN

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1)

    @property
    def deviation(self) -> float:
        """Of the sample; 0 of a single run."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0


# ---- reading ------------------------------------------------------------------------------------------


def read_sweep(folder: Path) -> list[Point]:
    """The variants of a sweep, by the runs that are evaluated. Raises UserError if there is none."""
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*-*/evaluation.json")):
        variants.setdefault(file.parent.name.rpartition("-")[0], []).append(file.parent)
    if not variants:
        raise UserError(
            f"{folder}: expected a run folder, or a sweep whose runs evaluate.py RUN --energy has tested; found no "
            "evaluation.json"
        )
    return [read_point(name, runs) for name, runs in variants.items()]


def read_point(name: str, runs: Sequence[Path]) -> Point:
    """Raises UserError for a run without accuracy and energy."""
    top1, energies, spiking = [], [], False
    for run in runs:
        file = run / "evaluation.json"
        try:
            report = json.loads(file.read_text())
            top1.append(float(report["video_top1"]))
            energies.append(float(report["energy"]["total_mj"]))
            spiking = report["network"].get("branches", "ann") != "ann"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = "a file without them" if file.exists() else "no such file"
            raise UserError(
                f"{file}: expected accuracy and energy, found {found}; run python evaluate.py {run} --energy"
            ) from error
    return Point(name, tuple(top1), statistics.mean(energies), spiking)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: by rising energy, each more accurate than all before it."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.energy_mj, -point.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front


# ---- drawing ------------------------------------------------------------------------------------------


def frontier_figure(panels: Sequence[tuple[str, Sequence[Point]]]) -> Figure:
    """Accuracy over energy. panels: the title and the points of each."""
    figure = new_figure(max(7.0, 4.8 * len(panels)), 4.6)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, points) in zip(all_axes, panels, strict=True):
        _draw(axes, points)
        axes.set(title=drawn(title), xlabel="energy of a clip (mJ; an estimate)")
    all_axes[0].set_ylabel("video top-1 (%)")
    figure.legend(handles=_explanations(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.canvas.draw()  # places are known from now on
    for axes, (_, points) in zip(all_axes, panels, strict=True):
        _name(axes, points)
    return figure


def _draw(axes: Axes, points: Sequence[Point]) -> None:
    front = pareto_front(points)
    axes.step(
        [point.energy_mj for point in front], [point.mean for point in front], where="post", color=_FRONT,
        linewidth=1.2, linestyle="--", zorder=1,
    )  # fmt: skip
    for point in points:
        axes.errorbar(
            point.energy_mj, point.mean, point.deviation or None, capsize=3, elinewidth=1, zorder=3,
            **_style(point.spiking),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    energies = [point.energy_mj for point in points]
    if max(energies) < 10 * min(energies):  # few powers of ten, or none, lie between them
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.margins(x=0.16, y=0.14)
    axes.grid(color="0.9", zorder=0)


def _style(spiking: bool) -> dict:
    colour = _RESPIKE if spiking else _OTHER
    face = colour if spiking else "white"
    return dict(marker="o" if spiking else "s", markersize=7, color=colour, markerfacecolor=face, linestyle="none")


def _explanations() -> list:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], label="with an SNN", **_style(True)),
        Line2D([], [], label="without an SNN, to compare with", **_style(False)),
        Line2D([], [], label="Pareto front (bold names)", color=_FRONT, linestyle="--", linewidth=1.2),
    ]


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's name at the nearest place that is free."""
    from matplotlib.transforms import Bbox

    inside, figure, front = axes.get_window_extent().padded(-4), axes.figure, pareto_front(points)
    corners = [axes.transData.transform((point.energy_mj, point.mean)) for point in front]
    taken = []  # boxes, in pixels: the front's line, markers and deviations, then names
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        taken += [Bbox.from_extents(x, y - 1, next_x, y + 1), Bbox.from_extents(next_x - 1, y, next_x + 1, next_y)]
    for point in points:
        x, low = axes.transData.transform((point.energy_mj, point.mean - point.deviation))
        _, high = axes.transData.transform((point.energy_mj, point.mean + point.deviation))
        reach = _MARKER_PIXELS
        taken.append(Bbox.from_extents(x - reach, low - reach, x + reach, high + reach))
    for point in sorted(points, key=lambda point: -point.mean):
        x, y = axes.transData.transform((point.energy_mj, point.mean))
        text = axes.annotate(
            drawn(point.name), (point.energy_mj, point.mean), (0, 0), textcoords="offset points",
            ha="center", va="center", fontsize=9, fontweight="bold" if point in front else "normal", zorder=4,
            arrowprops=dict(arrowstyle="-", color="0.6", linewidth=0.7, shrinkA=0, shrinkB=4, zorder=2),
        )  # fmt: skip
        text.set_in_layout(False)
        size = text.get_window_extent()
        box, radius = _free_place(x, y, size.width, size.height, taken, inside)
        taken.append(box)
        centre = (box.x0 + box.width / 2 - x, box.y0 + box.height / 2 - y)
        text.set_position(tuple(72 / figure.dpi * distance for distance in centre))
        text.arrow_patch.set_visible(radius > _RADII[1])


def _free_place(
    x: float, y: float, width: float, height: float, taken: Sequence[Bbox], inside: Bbox
) -> tuple[Bbox, float]:
    """The box of a name of this size beside the point (x, y), and its distance from the marker: the nearest of some
    that overlaps nothing and lies inside; if there is none, the one that overlaps least. All in pixels."""
    from matplotlib.transforms import Bbox

    best = None
    for radius in _RADII:
        for step in range(24):  # from the right around
            angle = 2 * math.pi * step / 24
            reach = radius + _MARKER_PIXELS
            left = x + (reach + width / 2) * math.cos(angle) - width / 2
            low = y + (reach + height / 2) * math.sin(angle) - height / 2
            box = Bbox.from_bounds(left, low, width, height)
            shared = [Bbox.intersection(box, other) for other in taken]
            cost = sum(part.width * part.height for part in shared if part is not None)
            within = Bbox.intersection(box, inside)
            cost += width * height - (0 if within is None else within.width * within.height)
            if best is None or cost < best[0] - 1e-6:
                best = (cost, box, radius)
        if best[0] < 1e-6:
            break
    return best[1:]


# ---- the command line ---------------------------------------------------------------------------------


def main() -> int:
    parser = ArgumentParser(description="Draw accuracy against energy of the networks of sweeps or of single runs.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER", help="sweeps (a panel each) or run folders")
    parser.add_argument("--titles", nargs="+", metavar="TEXT", help="of the panels; not given: names of the folders")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture: .png, .pdf or .svg")
    args = parser.parse_args()
    check_format(args.out)
    runs = [path for path in args.paths if (path / "evaluation.json").exists() or (path / "config.json").exists()]
    panels = [(str(path), read_sweep(path)) for path in args.paths if path not in runs]
    if runs:
        panels.append(("", [read_point(str(run), [run]) for run in runs]))
    titles = args.titles or [title for title, _ in panels]
    if len(titles) != len(panels):
        raise UserError(f"--titles: expected one for each of the {len(panels)} panels, got {len(titles)}")
    panels = [(title, points) for title, (_, points) in zip(titles, panels, strict=True)]
    save_figure(args.out, frontier_figure(panels))
    for title, points in panels:
        front = ", ".join(point.name for point in pareto_front(points))
        print(f"{title or 'runs'}: {sum(len(point.top1) for point in points)} runs; on the Pareto front: {front}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
