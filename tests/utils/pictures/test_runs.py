"""Training curves of runs."""

import json

from utils.pictures.runs import curves_figure, read_metrics


def write_run(folder, epochs=3, evaluated_on="test"):
    folder.mkdir(parents=True)
    lines = [
        {"epoch": n, "train_loss": 2.0 - n, f"{evaluated_on}_loss": 2.5 - n, "train_clip_top1": 10.0 * n,
         "video_top1": 9.0 * n, "firing_rate": {"stage1": 0.1 * n}, "evaluated_on": evaluated_on}
        for n in range(epochs)
    ]  # fmt: skip
    closing = {"best_epoch": 2, "video_top1": 18.0, "device_hours": 0.1}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, closing]) + '{"epoch": 3, "tr'
    )
    return folder


def test_curves_of_several_runs(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", 1, "val")
    figure = curves_figure({"a": read_metrics(first), "b": read_metrics(second)})
    loss, accuracy, firing = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2, 1, 0], [2.5, 1.5, 0.5], [2], [2.5]]
    assert [line.get_ydata().tolist() for line in accuracy.lines[:2]] == [[0, 10, 20], [0, 9, 18]]
    assert firing.lines[0].get_ydata().tolist() == [0, 10, 20] and firing.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]
