"""Which batches are replayed, and that recording leaves no trace. The graphs themselves: tests/test_gpu.py."""

import pytest
import torch
from torch import nn

from utils.cuda_graphs import GraphedNetwork


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, key, residual):
        return self.norm(key + residual)


@pytest.fixture
def recorded(monkeypatch) -> list:
    """The batches that were replayed. PyTorch's function runs the network and puts a forward of its own into it."""
    replayed = []

    def make_graphed_callables(model, inputs):
        assert not torch.is_autocast_cache_enabled()  # as PyTorch demands
        for _ in range(3):
            model(*inputs)
        own = model.forward

        def forward(key, residual):
            replayed.append(len(key))
            return own(key, residual)

        model.forward = forward

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    return replayed


def test_batches_of_the_first_size_are_replayed_and_leave_what_others_leave(recorded):
    plain, graphed = _Network(), GraphedNetwork(_Network())
    for clips in (8, 8, 5, 8):
        key, residual = torch.randn(2, clips, 3)
        plain(key, residual).sum().backward()
        graphed(key, residual).sum().backward()
    assert recorded == [8, 8, 8]
    for own, other in zip(graphed.model.norm.buffers(), plain.norm.buffers(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(graphed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


def test_the_model_itself_is_never_replayed(recorded):
    """It is what is tested and saved."""
    graphed = GraphedNetwork(_Network())
    graphed.eval()(*torch.randn(2, 8, 3))
    graphed.train()(*torch.randn(2, 8, 3))
    graphed.model.eval()(*torch.randn(2, 8, 3))
    graphed.eval()(*torch.randn(2, 8, 3))
    assert recorded == [8]
    assert "forward" not in vars(graphed.model)
