"""Triton kernel of `dataset.residual.key_residual_split`: uint8 is read once, each output written once."""

import torch
from torch import Tensor

from utils.triton_language import cdiv, tl, triton

_BLOCK = 1024


@triton.jit
def _split_kernel(
    clip_ptr, key_ptr, residual_ptr, pixels, segments,
    SCALE_R: tl.constexpr, SCALE_G: tl.constexpr, SCALE_B: tl.constexpr,
    MEAN_R: tl.constexpr, MEAN_G: tl.constexpr, MEAN_B: tl.constexpr,
    MINUS: tl.constexpr, STRIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of what is written
    values = pixels * CHANNELS
    mask = at < values
    colour = at % CHANNELS
    from_at = at // CHANNELS * 3 + colour
    is_colour = mask & (colour < 3)
    scale = tl.where(colour == 0, SCALE_R, tl.where(colour == 1, SCALE_G, SCALE_B))
    mean = tl.where(colour == 0, MEAN_R, tl.where(colour == 1, MEAN_G, MEAN_B))
    first = clip_ptr + segment * STRIDE * pixels * 3
    key = tl.load(first + from_at, is_colour, 0).to(tl.float32)
    written = tl.where(is_colour, key * scale - mean, 0.0)
    tl.store(key_ptr + segment * values + at, written.to(key_ptr.dtype.element_ty), mask)
    before = key
    for step in tl.static_range(STRIDE - 1):
        frame = tl.load(first + (step + 1) * pixels * 3 + from_at, is_colour, 0).to(tl.float32)
        if MINUS == 2:
            residual = frame * scale - mean
        else:  # whole numbers are exact in float32: the residual of a static clip is exactly zero
            residual = (frame - before) * scale
        if MINUS == 1:
            before = frame
        written = tl.where(is_colour, residual, 0.0).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + (step * segments + segment) * values + at, written, mask)


def split(
    segments: Tensor, scale: tuple[float, ...], mean: tuple[float, ...], dtype: torch.dtype, minus: int = 0,
    channels: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """segments: uint8 [B, K, stride, H, W, 3], contiguous -> (key [B, K, H, W, channels], residual
    [stride-1, B, K, H, W, channels]) in `dtype`: value * scale - mean, and (value - reference) * scale; zeros behind
    the three colours.
    minus: the reference is the key frame (0), the frame before (1), or there is none and a residual frame is as a key
    frame (2)."""
    batch, keys, stride, height, width, _ = segments.shape
    key = torch.empty(batch, keys, height, width, channels, dtype=dtype, device=segments.device)
    residual = torch.empty(stride - 1, *key.shape, dtype=dtype, device=segments.device)
    pixels = height * width
    if segments.numel():
        with torch.cuda.device_of(segments):
            _split_kernel[(cdiv(pixels * channels, _BLOCK), batch * keys)](
                segments, key, residual, pixels, batch * keys, *scale, *mean, MINUS=minus, STRIDE=stride,
                CHANNELS=channels, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return key, residual
