"""The GEGLU kernel against PyTorch's operators: in Triton's interpreter, on a GPU natively."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels.geglu import _geglu, geglu
from tests.models.kernels.test_lif_kernels import DTYPES, assert_close, random

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 34), (1, 2), (2, 700, 8), (0, 4)], ids=str)
def test_agrees_with_the_definition(shape, dtype):
    x = random(shape, dtype, scale=2.0)
    grad = random((*shape[:-1], shape[-1] // 2), dtype)
    results = []
    for exact in (True, False):
        inputs = (x.double() if exact else x).detach().requires_grad_()
        value, gate = inputs.chunk(2, dim=-1)
        out = value * F.gelu(gate) if exact else _geglu(inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    for want, got in zip(*results, strict=True):
        if got.numel():
            assert_close(got, want.to(dtype), dtype)
        assert got.shape == want.shape


def test_the_operator_is_well_formed_and_reads_any_layout():
    x = random((3, 4, 6), torch.float32).requires_grad_()
    torch.library.opcheck(_geglu.definition, (x,))
    turned = x.detach().transpose(0, 1)
    torch.testing.assert_close(_geglu(turned), geglu(turned), rtol=1e-6, atol=1e-6)
