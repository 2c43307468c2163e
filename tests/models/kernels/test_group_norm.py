"""The group norm kernel against PyTorch's operator: in Triton's interpreter, on a GPU natively."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels.group_norm import _fits, _group_norm
from tests.models.kernels.test_lif_kernels import DTYPES, assert_close, random

pytestmark = pytest.mark.kernels
EPS = 1e-6


def make(shape, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    x = (random(shape, dtype, scale=2.0) + 3.0).contiguous(memory_format=torch.channels_last)
    return x, random(shape[1:2], statistics) + 1.5, random(shape[1:2], statistics)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", [((3, 64, 7, 5), 32), ((2, 24, 1, 3), 6), ((1, 4, 30, 40), 2)], ids=str)
def test_agrees_with_the_definition(shape, groups, dtype):
    """Some groups a program, all of them, and one alone."""
    given = make(shape, dtype)
    grad = random(shape, dtype)  # in a layout of its own
    results = []
    for exact in (True, False):
        x, weight, bias = (value.to(torch.float64 if exact else value.dtype).requires_grad_() for value in given)
        if exact:
            out = F.group_norm(x, groups, weight, bias, EPS)
        else:
            out = _group_norm(x, groups, weight, bias, EPS)
            assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, (x, weight, bias), grad.to(out.dtype))))
    for want, got in zip(*results, strict=True):
        assert_close(got.detach(), want.to(got.dtype).detach(), dtype)


def test_the_mean_may_be_far_from_zero():
    x, weight, bias = make((1, 4, 8, 8), torch.float32)
    x += 1e4
    want = F.group_norm(x.double(), 2, weight.double(), bias.double(), EPS)
    torch.testing.assert_close(_group_norm(x, 2, weight, bias, EPS).double(), want, rtol=5e-3, atol=5e-3)


def test_the_operator_is_well_formed():
    x, weight, bias = (value.requires_grad_() for value in make((2, 8, 3, 3), torch.float32))
    torch.library.opcheck(_group_norm.definition, (x, 4, weight, bias, EPS))


def test_what_does_not_fit_goes_to_pytorch():
    def frames(channels, side):
        return torch.empty(1, channels, side, side, device="meta")

    assert _fits(frames(512, 28), 32) and _fits(frames(64, 56), 32)
    assert not _fits(frames(512, 56), 32) and not _fits(frames(96, 4), 32)
