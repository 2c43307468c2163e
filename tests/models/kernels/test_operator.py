"""An operator is called as a plain function, and seen as an operator wherever PyTorch traces."""

import pytest
import torch
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

from models.kernels.operator import operator


@operator("respike::test_twice")
def twice(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@twice.register_fake
def _(x, factor):
    return torch.empty_like(x)


def _context(ctx, inputs, output):
    ctx.factor = inputs[1]


twice.register_autograd(lambda ctx, gradient: (twice(gradient, ctx.factor), None), _context)


@operator("respike::test_count", mutates=("total",))
def count(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return total.data.add_(x.numel()).clone()  # as a kernel does, behind the back of autograd


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def gradient_of(function, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, 3.0).square().sum(), x)[0]


def test_eager_calls_are_no_operators_and_traced_ones_are():
    x = torch.randn(4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain = gradient_of(twice, x)
    assert not any(event.key.startswith("respike::") for event in profile.key_averages())
    with _Seen() as seen:
        traced = gradient_of(twice, x)
    assert seen.names.count("respike::test_twice") == 2
    compiled = gradient_of(torch.compile(twice, fullgraph=True, backend="aot_eager"), x)
    with_func = grad(lambda x: twice(x, 3.0).square().sum())(x)
    for other in (traced, compiled, with_func):
        assert torch.equal(other, plain) and torch.equal(plain, 18 * x)


def test_a_gradient_of_the_gradient_is_refused():
    """Kernels have no second derivative, and zero would be a wrong one."""
    x = torch.randn(4, requires_grad=True)
    (first,) = torch.autograd.grad(twice(x, 3.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autograd_knows_what_was_changed():
    total, weight = torch.zeros(3), torch.ones(3, requires_grad=True)
    out = (total * weight).sum()  # keeps the total
    count(torch.ones(3), total)
    assert total.tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
