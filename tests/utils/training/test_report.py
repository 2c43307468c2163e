"""What a test shows beside its accuracy."""

import math

import pytest
import torch

from utils.training.report import calibration


def test_calibration():
    confidence = torch.tensor([0.95, 0.85, 0.95, 0.55, 1.0])
    table, error = calibration(confidence, torch.tensor([True, True, False, False, True]))
    assert table[14].tolist() == pytest.approx([3 / 5, 2.9 / 3, 2 / 3])
    assert table[12].tolist() == pytest.approx([1 / 5, 0.85, 1]) and math.isnan(table[0, 2])
    assert error == pytest.approx(100 * (3 * (2.9 / 3 - 2 / 3) + 0.15 + 0.55) / 5)
    assert f"{error:.1f}" == "32.0"
