"""How tensors lie in memory, so that kernels can read them without a copy."""

import torch
from torch import Tensor


def memory_order(x: Tensor) -> list[int]:
    """The dimensions after the first, as they lie in memory from the widest stride down."""
    return sorted(range(1, x.dim()), key=x.stride, reverse=True)


def steps_outermost(x: Tensor) -> Tensor:
    """[S, ...] itself if it has no gaps in memory and lies step after step (contiguous, channels-last, any
    order of the other dimensions), else a contiguous copy."""
    return x if x.permute(0, *memory_order(x)).is_contiguous() else x.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether [S, N, C, H, W] lies in memory as [S, N, H, W, C]."""
    return x.dim() == 5 and x.permute(0, 1, 3, 4, 2).is_contiguous()


def channels_known(x: Tensor) -> Tensor:
    """[S, N, C, ...] itself if it is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def laid_out_as(x: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x itself if it has the strides of `other` and the type `dtype`, else a copy that has."""
    dtype, strides, wanted = dtype or x.dtype, x.stride(), other.stride()
    if x.dtype == dtype and (
        strides == wanted or all(a == b for a, b, size in zip(strides, wanted, x.shape, strict=True) if size > 1)
    ):
        return x
    return torch.empty_like(other, dtype=dtype).copy_(x)
