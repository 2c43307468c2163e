"""Spikes kept as one bit each between the forward and the backward pass.

A convolution keeps its input for the gradient of its weights. Spikes are zeros and ones: 16 bits of
bfloat16 for one of information. `spike_conv2d` keeps the one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.layout import memory_order, steps_outermost
from models.kernels.operator import operator
from models.kernels.reference import in_transform
from utils.triton_language import cdiv, tl, triton, why_not_on


@triton.jit
def _pack_kernel(spike_ptr, packed_ptr, elements, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    spikes = tl.load(spike_ptr + at, at < elements, 0.0).to(tl.float32)
    ones = tl.where(spikes > 0.0, 1, 0) << bit[None, :]
    tl.store(packed_ptr + byte, tl.sum(ones, 1).to(tl.uint8), byte * 8 < elements)


@triton.jit
def _unpack_kernel(packed_ptr, spike_ptr, elements, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    at = byte[:, None] * 8 + bit[None, :]
    packed = tl.load(packed_ptr + byte, byte * 8 < elements, 0).to(tl.int32)
    ones = (packed[:, None] >> bit[None, :]) & 1
    tl.store(spike_ptr + at, ones.to(tl.float32).to(spike_ptr.dtype.element_ty), at < elements)


_BYTES = 512  # a program's


@operator("respike::pack_spikes")
def pack_spikes(spikes: Tensor) -> Tensor:
    """Zeros and ones [S, ...] of any type -> uint8 [ceil(elements / 8)], in the order of memory."""
    spikes = steps_outermost(spikes)
    elements = spikes.numel()
    packed = torch.empty(-(-elements // 8), dtype=torch.uint8, device=spikes.device)
    if _on_triton(spikes):
        if elements:
            with torch.cuda.device_of(spikes):
                _pack_kernel[(cdiv(len(packed), _BYTES),)](spikes, packed, elements, BYTES=_BYTES, num_warps=4)
        return packed
    flat = F.pad(_as_in_memory(spikes) > 0, (0, 8 * len(packed) - elements)).view(-1, 8).to(torch.uint8)
    for bit in range(8):
        packed = flat[:, bit].clone() if bit == 0 else packed.add_(flat[:, bit], alpha=1 << bit)
    return packed


@pack_spikes.register_fake
def _(spikes):
    return torch.empty((spikes.numel() + 7) // 8, dtype=torch.uint8, device=spikes.device)


@operator("respike::unpack_spikes")
def unpack_spikes(packed: Tensor, shape: list[int], order: list[int], dtype: torch.dtype) -> Tensor:
    """What `pack_spikes` packed: `order` names its dimensions after the first from the widest stride down."""
    spikes = _empty(packed, shape, order, dtype)
    elements = spikes.numel()
    if _on_triton(packed):
        if elements:
            with torch.cuda.device_of(spikes):
                _unpack_kernel[(cdiv(len(packed), _BYTES),)](packed, spikes, elements, BYTES=_BYTES, num_warps=4)
        return spikes
    bits = torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=1).flatten()[:elements]
    _as_in_memory(spikes).copy_(bits)
    return spikes


@unpack_spikes.register_fake
def _(packed, shape, order, dtype):
    return _empty(packed, shape, order, dtype)


def _on_triton(x: Tensor) -> bool:
    return why_not_on(x.device.type) is None


def _as_in_memory(x: Tensor) -> Tensor:
    return x.permute(0, *memory_order(x)).view(-1)


def _empty(like: Tensor, shape: list[int], order: list[int], dtype: torch.dtype) -> Tensor:
    laid_out = torch.empty([shape[0], *(shape[dim] for dim in order)], dtype=dtype, device=like.device)
    return laid_out.permute(0, *(1 + order.index(dim) for dim in range(1, len(shape))))


class _SpikeConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        spikes = steps_outermost(spikes)
        ctx.shape, ctx.order, ctx.dtype = spikes.shape, memory_order(spikes), spikes.dtype
        ctx.stride, ctx.padding = stride, padding
        ctx.save_for_backward(pack_spikes(spikes), weight)
        return F.conv2d(spikes.flatten(0, 1), weight, None, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        packed, weight = ctx.saved_tensors
        spikes = unpack_spikes(packed, list(ctx.shape), ctx.order, ctx.dtype).flatten(0, 1)
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_spikes, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, spikes, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, needed
        )
        if grad_spikes is not None:
            grad_spikes = grad_spikes.unflatten(0, ctx.shape[:2])
        return grad_spikes, grad_weight, None, None


def spike_conv2d(conv: nn.Conv2d, spikes: Tensor) -> Tensor:
    """`conv` of spikes [S, N, C, H, W] -> [S, N, C_out, H', W']; what autograd keeps of them is one bit each.
    conv: without bias, groups or dilation."""
    if not torch.is_grad_enabled() or in_transform():  # nothing is kept, or not by autograd alone
        return conv(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])
    weight, device = conv.weight, spikes.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        spikes, weight = spikes.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _SpikeConv2d.apply(spikes, weight, conv.stride, conv.padding).unflatten(0, spikes.shape[:2])
