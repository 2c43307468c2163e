"""Calls that are left out are an error, and a count changes nothing."""

import pytest
import torch
from torch import nn

from models import ReSpike
from models.attention import Attention
from utils.energy.operations import count_operations


class ProductWithWeights(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, classes))

    def forward(self, x):
        return x @ self.weight


class Transposed(nn.ConvTranspose2d):
    def __init__(self):
        super().__init__(512, 512, 1)


def attention_by_hand(self, query, context):
    weights = torch.softmax(self.to_q(query) @ self.to_k(context).transpose(1, 2), dim=-1)
    return self.to_out(weights @ self.to_v(context))


def test_what_is_left_uncounted_is_an_error(monkeypatch):
    model = ReSpike(num_classes=5)
    model.head = ProductWithWeights(1024, 5)
    with pytest.raises(RuntimeError, match=r"uncounted, by FlopCounterMode: ReSpike\.head: 0 MACs of 10240$"):
        count_operations(model, 8, 64)
    model = ReSpike(num_classes=5)
    model.ann.stages[3].append(Transposed())
    with pytest.raises(RuntimeError, match=r"ReSpike\.ann\.stages\.3\.2: 0 MACs of"):
        count_operations(model, 8, 64)
    monkeypatch.setattr(Attention, "forward", attention_by_hand)
    with pytest.raises(RuntimeError, match=r"ReSpike\.fusions\.0\.attend_self: \d+ MACs of \d+; "):
        count_operations(ReSpike(num_classes=5), 8, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "spikingjelly"])
def test_a_count_changes_nothing(backend, dtype):
    """A backend that cannot run on shapes does not matter, nor do inference mode and compilation."""
    model = ReSpike(num_classes=5, lif_backend=backend, pack_spikes=True).to(dtype)
    before = {name: (value.data_ptr(), value._version) for name, value in model.state_dict(keep_vars=True).items()}
    want = count_operations(ReSpike(num_classes=5), 8, 64)
    with torch.inference_mode():
        assert count_operations(torch.compile(model, backend="eager"), 8, 64) == want
    assert {n: (v.data_ptr(), v._version) for n, v in model.state_dict(keep_vars=True).items()} == before
    assert model.training and model.snn.stages[0][0].lif1.backend == backend
