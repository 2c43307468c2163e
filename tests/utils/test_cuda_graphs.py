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
def replayed(monkeypatch) -> list:
    """The sizes of the batches that were. PyTorch's function runs the network and puts a forward of its own into it."""
    sizes = []

    def make_graphed_callables(model, inputs):
        assert model.training and not torch.is_autocast_cache_enabled()  # as PyTorch demands
        for _ in range(3):
            model(*inputs)
        own = model.forward

        def forward(key, residual):
            sizes.append(len(key))
            return own(key, residual)

        model.forward = forward

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    return sizes


def graphed() -> GraphedNetwork:
    return GraphedNetwork(_Network(), *torch.randn(2, 8, 3), precision=None)


def test_batches_of_one_size_are_replayed_and_leave_what_others_leave(replayed):
    plain, network = _Network(), graphed()
    for clips in (8, 8, 5, 8):
        key, residual = torch.randn(2, clips, 3)
        plain(key, residual).sum().backward()
        network(key, residual).sum().backward()
    assert replayed == [8, 8, 8]
    for own, other in zip(network.model.norm.buffers(), plain.norm.buffers(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


def test_the_model_itself_is_never_replayed(replayed):
    """It is what is tested and saved."""
    network = graphed()
    network.model(*torch.randn(2, 8, 3))
    network.eval()(*torch.randn(2, 8, 3))
    assert not replayed and "forward" not in vars(network.model)
    network.train()(*torch.randn(2, 8, 3))
    assert replayed == [8]


def test_the_memory_of_the_graphs_is_known(replayed, monkeypatch):
    """Blocks that are empty after the recording do not count; those of a graph are never given back."""
    reserved = {"graph": 0, "empty": 300}
    record = torch.cuda.make_graphed_callables

    def recording(model, inputs):
        record(model, inputs)
        reserved.update(graph=2000, empty=500)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recording)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserved.update(empty=0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: sum(reserved.values()))
    assert graphed().held_bytes == 2000
