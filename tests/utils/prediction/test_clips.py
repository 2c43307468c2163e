"""The crop in the middle, and the best classes."""

import pytest
import torch

from dataset.transforms import eval_transforms
from utils.prediction.clips import Clips, top


@pytest.mark.parametrize("crops", [1, 3])
def test_the_centre_is_the_middle_crop_of_a_test(random_network, crops):
    rgb = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8)
    found = Clips(random_network, crops=crops).centre(rgb.numpy())
    expected = eval_transforms(32, 37, crops)[crops // 2](rgb.permute(0, 3, 1, 2))
    assert found.shape == (2, 3, 32, 32) and torch.equal(found, expected)
    assert torch.equal(Clips(random_network).centre(rgb[1].numpy()), found[1])


def test_the_best_five():
    assert top(torch.tensor([0.1, 0.7, 0.2]), ["a", "b", "c"]) == [
        ("b", pytest.approx(0.7)), ("c", pytest.approx(0.2)), ("a", pytest.approx(0.1)),
    ]  # fmt: skip
    assert [name for name, _ in top(torch.arange(7) / 21, list("abcdefg"))] == list("gfedc")
    assert top(None, ["a"]) == []  # before the first prediction
