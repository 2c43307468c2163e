"""The gated activation of a GEGLU layer (arXiv 2002.05202) in one pass, forward and backward.

With h hidden values a row: 3 h values are read and written forward and 5 h backward. Out of PyTorch's operators it is
5 h and 13 h, two of them for the halves of the gradient to be put together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.operator import operator
from models.kernels.reference import in_transform
from models.kernels.triton_lif import compute_type
from utils.triton_language import cdiv, tl, triton, why_not_on

_BLOCK = 1024  # hidden values of a program


@triton.jit
def _halves(elements, hidden, BLOCK: tl.constexpr):
    """(numbers of hidden values, elements before the first half of each, mask)"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at + (at // hidden) * hidden, at < elements


@triton.jit
def _forward_kernel(x_ptr, out_ptr, elements, hidden, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at, first, mask = _halves(elements, hidden, BLOCK)
    value = tl.load(x_ptr + first, mask, 0.0).to(COMPUTE)
    gate = tl.load(x_ptr + first + hidden, mask, 0.0).to(COMPUTE)
    activated = gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + at, (value * activated).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(x_ptr, grad_ptr, grad_x_ptr, elements, hidden, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at, first, mask = _halves(elements, hidden, BLOCK)
    value = tl.load(x_ptr + first, mask, 0.0).to(COMPUTE)
    gate = tl.load(x_ptr + first + hidden, mask, 0.0).to(COMPUTE)
    grad = tl.load(grad_ptr + at, mask, 0.0).to(COMPUTE)
    below = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    grad_gate = grad * value * (below + gate * density)
    tl.store(grad_x_ptr + first, (grad * gate * below).to(grad_x_ptr.dtype.element_ty), mask)
    tl.store(grad_x_ptr + first + hidden, grad_gate.to(grad_x_ptr.dtype.element_ty), mask)


@operator("respike::geglu")
def _geglu(x: Tensor) -> Tensor:
    x, out = x.contiguous(), _half(x)
    if out.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(cdiv(out.numel(), _BLOCK),)](
                x, out, out.numel(), out.shape[-1], COMPUTE=compute_type(x.dtype), BLOCK=_BLOCK, num_warps=4
            )
    return out


@_geglu.register_fake
def _half(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operator("respike::geglu_backward")
def _geglu_backward(x: Tensor, grad: Tensor) -> Tensor:
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    if grad.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[(cdiv(grad.numel(), _BLOCK),)](
                x, grad, grad_x, grad.numel(), grad.shape[-1],
                COMPUTE=compute_type(x.dtype), BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return grad_x


@_geglu_backward.register_fake
def _(x, grad):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_input(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_geglu.register_autograd(lambda ctx, grad: _geglu_backward(*ctx.saved_tensors, grad), setup_context=_keep_input)


def geglu(x: Tensor) -> Tensor:
    """[..., 2 hidden] -> value * gelu(gate) [..., hidden]; the first half is the value, the second the gate."""
    if x.device.type == "cuda" and why_not_on("cuda") is None and not in_transform():
        return _geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
