"""What the pictures of predictions are made of."""

import pytest
import torch

from utils.figures import save_figure
from utils.pictures.predictions import calibration_figure, confusion_figure
from utils.training.report import calibration


@pytest.mark.parametrize("count", [8, 51, 400])
def test_confusion(count):
    matrix = 3 * torch.eye(count, dtype=torch.int64)
    matrix[1, 0] = 1
    figure = confusion_figure(matrix, [f"class {n}" for n in range(count)])
    axes, share = figure.axes[0], torch.tensor(figure.axes[0].images[0].get_array())
    assert share[1, :2].tolist() == [25, 75] and share[0, 0] == 100 and share.sum() == 100 * count
    assert len(axes.get_yticks()) == (0 if count == 400 else count)
    assert axes.get_title().startswith(f"{3 * count} of {3 * count + 1} correct")
    assert [text.get_text() for text in axes.texts] == (["3", "1", *7 * ["3"]] if count == 8 else [])


def test_names_are_drawn_as_they_are(tmp_path):
    """Dollars are no formula, and bytes that are no text do not end the test."""
    figure = confusion_figure(torch.eye(3), [r"$\frac$", "bet $100_vs_$200", "caf\udce9"])
    save_figure(tmp_path / "confusion.png", figure)
    assert figure.axes[0].get_yticklabels()[2].get_text() == "caf?"


def test_calibration():
    table, error = calibration(torch.tensor([0.95, 0.85, 1.0]), torch.tensor([True, True, False]))
    above, below = calibration_figure(table, error).axes
    assert [bar.get_height() for bar in above.patches] == pytest.approx([*12 * [0], 100, 0, 50])
    assert [bar.get_height() for bar in below.patches] == pytest.approx([*12 * [0], 100 / 3, 0, 200 / 3])
    assert above.get_title() == f"Calibration error (ECE) {error:.1f} %"
