"""The picture of accuracy against energy: what is drawn, which networks are on the front, names that can be read."""

import itertools
import json
import random
from pathlib import Path

import pytest
from matplotlib.transforms import Bbox

from experiments import frontier
from experiments.frontier import Point, frontier_figure, pareto_front, read_sweep

BRANCHES = {"film": {"branches": "both"}, "snn": {"branches": "snn"}, "ann": {"branches": "ann"},
            "r3d_18": {"network": "VideoResNet"}}  # fmt: skip


def write_run(folder: Path, top1: float, mj: float, network: dict) -> Path:
    folder.mkdir(parents=True)
    report = {"video_top1": top1, "energy": {"total_mj": mj}, "network": network}
    (folder / "evaluation.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def sweep_folder(tmp_path) -> Path:
    figures = {"film": (80, 2.0), "snn": (60, 0.5), "ann": (50, 1.5), "r3d_18": (84, 40.0)}
    for case, (name, (top1, mj)) in itertools.product(("fold1.1", "fold2.1"), figures.items()):
        write_run(tmp_path / "sweep" / f"{name}-{case}", top1 + 4 * (case == "fold2.1"), mj, BRANCHES[name])
    (tmp_path / "sweep/cross-fold1.1").mkdir()  # not evaluated yet
    (tmp_path / "sweep/table.csv").touch()
    return tmp_path / "sweep"


def test_a_sweep_is_a_point_a_variant(sweep_folder):
    points = {point.name: point for point in read_sweep(sweep_folder)}
    assert set(points) == {"film", "snn", "ann", "r3d_18"}
    film = points["film"]
    assert (film.mean, film.energy_mj) == (82, 2) and film.deviation == pytest.approx(8**0.5)
    assert {name: point.spiking for name, point in points.items()} == {
        "film": True, "snn": True, "ann": False, "r3d_18": False,
    }  # fmt: skip


def test_the_front_has_whom_nobody_beats_in_both():
    points = [Point(name, (top1,), mj, True) for name, top1, mj in (
        ("dear", 80, 9), ("best", 90, 8), ("cheap", 50, 1), ("equal", 90, 8.5), ("worse", 40, 2), ("middle", 60, 3),
        ("less", 55, 3),
    )]  # fmt: skip
    assert [point.name for point in pareto_front(points)] == ["cheap", "middle", "best"]


def test_what_is_drawn(sweep_folder):
    figure = frontier_figure([("a $weep", read_sweep(sweep_folder))])
    (axes,), (legend,) = figure.axes, figure.legends
    assert legend.get_window_extent().x0 > 0 and legend.get_window_extent().x1 < figure.bbox.x1
    front, *points = [line for line in axes.lines if line.get_marker() not in ("_", "|")]
    assert axes.get_xscale() == "log" and axes.get_title() == r"a \$weep"
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(0.5, 62), (2, 82), (40, 86)]
    markers = {(line.get_xdata()[0], line.get_marker(), line.get_markerfacecolor()) for line in points}
    assert markers == {(2, "o", "#0072B2"), (0.5, "o", "#0072B2"), (1.5, "s", "white"), (40, "s", "white")}
    bars = [segment for collection in axes.collections for segment in collection.get_segments()]
    assert sorted(segment[:, 1].mean().item() for segment in bars) == [52, 62, 82, 86]
    assert all(segment[1, 1] - segment[0, 1] == pytest.approx(2 * 8**0.5) for segment in bars)
    bold = {text.get_text(): text.get_fontweight() == "bold" for text in axes.texts}
    assert bold == {"film": True, "snn": True, "ann": False, "r3d_18": True}


@pytest.mark.parametrize("seed", range(3))
def test_names_do_not_overlap(seed):
    """Ten networks, seven of them crowded into a corner."""
    draw = random.Random(seed)
    points = [Point(f"network{n}", (98 + draw.random(), 99.5), 2 + 0.2 * draw.random(), n % 2 == 0) for n in range(7)]
    points += [Point(f"far{n}", (60 + n,), 20.0 * (n + 1), True) for n in range(3)]
    figure = frontier_figure([("one", points), ("one", points)])
    figure.canvas.draw()  # as it is written to a file
    for axes in figure.axes:
        # An annotation's own extent has the line to its point: what counts is the text.
        boxes = [Bbox.union([super(type(text), text).get_window_extent()]) for text in axes.texts]
        assert len(boxes) == 10
        overlaps = [Bbox.intersection(a, b) for a, b in itertools.combinations(boxes, 2)]
        assert not any(part is not None and part.width * part.height > 1 for part in overlaps)
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)


def test_sweeps_become_panels_and_runs_one_more(sweep_folder, tmp_path, run_sweep):
    runs = [write_run(tmp_path / name, 50, mj, BRANCHES["snn"]) for name, mj in (("a", 1.0), ("b", 2.0))]
    status, printed, err = run_sweep(frontier.main, "--out", tmp_path / "f.png", sweep_folder, *runs)
    assert status == 0, err
    assert f"{sweep_folder}: 8 runs; on the Pareto front: snn, film, r3d_18\n" in printed
    assert f"runs: 2 runs; on the Pareto front: {tmp_path}/a\n" in printed
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(sweep_folder, tmp_path, run_sweep):
    (tmp_path / "empty").mkdir()
    untested = write_run(tmp_path / "run", 50, 1.0, {})
    (untested / "evaluation.json").write_text('{"video_top1": 1.0}')
    for words, message in (
        (["--out", "a.jpg", sweep_folder], "--out a.jpg: the name of a picture must end in .png"),
        (["--out", "a.png", tmp_path / "empty"], f"{tmp_path}/empty: expected a run folder, or a sweep"),
        (["--out", "a.png", untested], f"{untested}/evaluation.json: expected accuracy and energy, found a file"),
        (["--out", "a.png", sweep_folder, "--titles", "a", "b"], "--titles: expected one for each of the 1 panels"),
    ):
        status, _, err = run_sweep(frontier.main, *words)
        assert status == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err
