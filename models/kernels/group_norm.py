"""Group norm (arXiv 1803.08494) of channels-last tensors in one pass, forward and backward.

PyTorch's own takes contiguous tensors on a GPU: it copies others, both ways. Here a program keeps all pixels of some
groups of a sample in registers, so that each value is read once. The backward pass computes the statistics again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.operator import operator
from models.kernels.parameters import membrane_dtype
from models.kernels.reference import in_transform
from models.kernels.triton_lif import compute_type, constant
from utils.triton_language import next_power_of_2, tl, triton, why_not_on

_VALUES = 8192  # of a program: 32 a thread
_MOST_VALUES = 2 * _VALUES  # of a group, without spilling registers; PyTorch takes larger ones


@triton.jit
def _tile(rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(elements before each value [ROWS, COLUMNS] of some groups of a sample, column numbers, mask)"""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = (tl.program_id(0).to(tl.int64) * rows + row) * channels + column[None, :]
    return at, column, row < rows


@triton.jit
def _group_mean(x, rows, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The mean of each group, in all its columns: [ROWS, COLUMNS] -> [1, COLUMNS]"""
    sums = tl.sum(tl.reshape(tl.sum(x, 0), [COLUMNS // WIDTH, WIDTH]), 1)
    sums = tl.broadcast_to(sums[:, None], [COLUMNS // WIDTH, WIDTH])
    return tl.reshape(sums, [COLUMNS])[None, :] / (rows * WIDTH)


@triton.jit
def _standardise(x, mask, rows, EPS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """(x - mean) / standard deviation, and 1 / standard deviation"""
    away = tl.where(mask, x - _group_mean(x, rows, COLUMNS, WIDTH), 0.0)
    variance = _group_mean(away * away, rows, COLUMNS, WIDTH)
    inverse = tl.rsqrt(variance + constant(variance, EPS))
    return away * inverse, inverse


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, channels,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at, column, mask = _tile(rows, channels, ROWS, COLUMNS)
    x = tl.load(x_ptr + at, mask, 0.0).to(COMPUTE)
    standard, _ = _standardise(x, mask, rows, EPS, COLUMNS, WIDTH)
    weight, bias = tl.load(weight_ptr + column).to(COMPUTE), tl.load(bias_ptr + column).to(COMPUTE)
    tl.store(out_ptr + at, (standard * weight[None, :] + bias[None, :]).to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(
    x_ptr, grad_ptr, weight_ptr, grad_x_ptr, sums_ptr, rows, channels,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad_x, and for each sample the sums over pixels that are the gradients of weight and bias."""
    at, column, mask = _tile(rows, channels, ROWS, COLUMNS)
    x = tl.load(x_ptr + at, mask, 0.0).to(COMPUTE)
    grad = tl.load(grad_ptr + at, mask, 0.0).to(COMPUTE)
    standard, inverse = _standardise(x, mask, rows, EPS, COLUMNS, WIDTH)
    own = tl.program_id(0).to(tl.int64) * 2 * channels + column
    tl.store(sums_ptr + own, tl.sum(grad * standard, 0))
    tl.store(sums_ptr + own + channels, tl.sum(grad, 0))
    grad *= tl.load(weight_ptr + column).to(COMPUTE)[None, :]
    along = _group_mean(grad * standard, rows, COLUMNS, WIDTH)
    grad_x = inverse * (grad - _group_mean(grad, rows, COLUMNS, WIDTH) - standard * along)
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask)


def _launch(kernel, tensors: tuple[Tensor, ...], groups: int, eps: float) -> None:
    """tensors: the first is x [N, C, H, W], channels-last."""
    x = tensors[0]
    samples, channels, rows = x.shape[0], x.shape[1], x.shape[2:].numel()
    width, padded = channels // groups, next_power_of_2(rows)
    columns = width
    while 2 * columns * padded <= _VALUES and channels % (2 * columns) == 0:
        columns *= 2
    if x.numel():
        with torch.cuda.device_of(x):
            kernel[(samples, channels // columns)](
                *tensors, rows, channels, EPS=eps, COMPUTE=compute_type(x.dtype),
                ROWS=padded, COLUMNS=columns, WIDTH=width, num_warps=8,
            )  # fmt: skip


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@operator("respike::group_norm")
def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x, out = _channels_last(x), _like(x)
    _launch(_forward_kernel, (x, weight, bias, out), groups, eps)
    return out


@_group_norm.register_fake
def _(x, groups, weight, bias, eps):
    return _like(x)


@operator("respike::group_norm_backward")
def _group_norm_backward(
    x: Tensor, grad: Tensor, groups: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of weight and bias for each sample [N, 2, C]."""
    x, grad = _channels_last(x), _channels_last(grad)
    grad_x, sums = _like_backward(x)
    _launch(_backward_kernel, (x, grad, weight, grad_x, sums), groups, eps)
    return grad_x, sums


@_group_norm_backward.register_fake
def _(x, grad, groups, weight, eps):
    return _like_backward(x)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _like_backward(x: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_zeros(x.shape[0], 2, x.shape[1], dtype=membrane_dtype(x.dtype))


def _context(ctx, inputs, output) -> None:
    x, ctx.groups, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _gradient(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x, sums = _group_norm_backward(x, grad, ctx.groups, weight, ctx.eps)
    grad_weight, grad_bias = sums.sum(0)
    return grad_x, None, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


_group_norm.register_autograd(_gradient, setup_context=_context)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """[N, C, H, W] -> the same, in the type of x, with statistics in float32 or more."""
    if x.device.type == "cuda" and why_not_on("cuda") is None and _fits(x, groups) and not in_transform():
        return _group_norm(x, groups, weight, bias, eps)
    return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


def _fits(x: Tensor, groups: int) -> bool:
    """Whether a group of a sample fits into the registers of a program. Kernels count in powers of two."""
    width = x.shape[1] // groups
    return width.bit_count() == 1 and next_power_of_2(x.shape[2:].numel()) * width <= _MOST_VALUES
