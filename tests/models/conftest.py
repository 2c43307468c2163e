"""On a GPU, convolutions that give the same numbers every time, and products in full precision."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_on_a_gpu(monkeypatch):
    """TF32 has three digits, and cuDNN's fastest gradients of weights add in any order: more than the tolerances allow,
    and enough to move a sum past a neuron's threshold."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
