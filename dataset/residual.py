"""Split clips into key frames and residual frames, on the device that they are on."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import residual_kernel
from utils.errors import UserError
from utils.triton_language import why_not_on

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, in units of full scale
IMAGENET_STD = (0.229, 0.224, 0.225)
PADDED_CHANNELS = 8  # of half precision make 16 bytes a pixel: what tensor cores load at once
RESIDUALS = ("key", "previous", "none")  # what is subtracted from a residual frame
_SCALE = tuple(1.0 / (255.0 * std) for std in IMAGENET_STD)
_SCALED_MEAN = tuple(mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))


def normalised(frames: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32, scaled to [0, 1] and normalised with ImageNet's mean and deviation."""
    scale, mean = (value.view(3, 1, 1) for value in _constants(frames.device))
    return frames.float().mul_(scale).sub_(mean)


@functools.cache  # made once: copying them to a GPU waits for it
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(_SCALE, device=device), torch.tensor(_SCALED_MEAN, device=device)


def check_stride(frames: int, stride: int) -> None:
    """Raise UserError unless `frames` can be cut into segments of `stride` frames."""
    if stride < 2:
        raise UserError(f"--stride must be at least 2 (a key frame and one residual frame), got {stride}")
    if frames < stride or frames % stride:
        raise UserError(
            f"-T must be a multiple of --stride, got T {frames} and stride {stride}; "
            f"the nearest is T {max(stride, round(frames / stride) * stride)}"
        )


def key_residual_split(
    clip: Tensor, stride: int, dtype: torch.dtype | None = None, minus: str = "key", channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Key frames, and the others minus their key frame (ReSpike, arXiv 2409.01564, section 3.1).

    clip: [B, T, 3, H, W], T a multiple of `stride`. uint8 is scaled to [0, 1] and normalised with
    ImageNet's mean and standard deviation per channel (the mean cancels in a residual); a
    floating-point clip is taken as normalised already.
    minus: what is subtracted: the "key" frame of the segment (as published), the "previous" frame, or "none": the
    frames as they are.
    channels: 3; if more, there are zeros behind the colours, which `models.colours.ColourConv2d` takes.

    Returns key [B, T/stride, channels, H, W] and residual [B, T/stride, stride-1, channels, H, W], in `dtype`;
    None: the clip's type, float32 from uint8. Both lie in memory channels-last and the residual time first,
    as the network reads them. Raises UserError if stride is below 2 or does not divide T.
    """
    _check_clip(clip)
    check_stride(clip.shape[1], stride)
    if minus not in RESIDUALS:
        raise UserError(f"minus must be one of {', '.join(RESIDUALS)}, got {minus!r}")
    return _in_segments(clip, stride, dtype, minus, channels)


def every_frame_a_key(clip: Tensor, dtype: torch.dtype | None = None, channels: int = 3) -> tuple[Tensor, Tensor]:
    """For networks without residual frames (`models.baselines`): key [B, T, channels, H, W], and a residual without
    frames, [B, T, 0, channels, H, W]. Arguments as for `key_residual_split`. Raises UserError for another kind of
    clip."""
    _check_clip(clip)
    return _in_segments(clip, 1, dtype, "key", channels)


def _check_clip(clip: Tensor) -> None:
    if clip.dim() != 5 or clip.shape[2] != 3:
        raise UserError(f"clip must be [B, T, 3, H, W], got {list(clip.shape)}")
    if clip.dtype != torch.uint8 and not clip.is_floating_point():
        raise UserError(f"clip must be uint8 or floating point, got {clip.dtype}")


def _in_segments(
    clip: Tensor, stride: int, dtype: torch.dtype | None, minus: str, channels: int
) -> tuple[Tensor, Tensor]:
    frames = clip.unflatten(1, (-1, stride)).permute(0, 1, 2, 4, 5, 3)  # [B, K, stride, H, W, 3]
    if clip.dtype == torch.uint8 and clip.is_cuda and why_not_on("cuda") is None:
        key, residual = residual_kernel.split(
            frames.contiguous(), _SCALE, _SCALED_MEAN, dtype or torch.float32, RESIDUALS.index(minus), channels
        )
    else:
        key, residual = _split(frames, dtype, minus)
        if channels > 3:
            key, residual = F.pad(key, (0, channels - 3)), F.pad(residual, (0, channels - 3))
    return key.permute(0, 1, 4, 2, 3), residual.permute(1, 2, 0, 5, 3, 4)


def _split(frames: Tensor, dtype: torch.dtype | None, minus: str) -> tuple[Tensor, Tensor]:
    """[B, K, stride, H, W, 3] -> (key [B, K, H, W, 3], residual [stride-1, B, K, H, W, 3])"""
    segments = frames.movedim(2, 0)
    compute = torch.float32 if frames.dtype == torch.uint8 else frames.dtype
    key = segments[0].to(compute, copy=True, memory_format=torch.contiguous_format)
    residual = segments[1:].to(compute, copy=True, memory_format=torch.contiguous_format)
    # Whole numbers up to 255 are exact in float32: the residual of a static clip is exactly zero.
    if minus == "key":
        residual.sub_(key)
    elif minus == "previous":
        residual.sub_(segments[:-1])
    if frames.dtype == torch.uint8:
        scale, mean = _constants(frames.device)
        residual.mul_(scale)
        if minus == "none":
            residual.sub_(mean)
        key.mul_(scale).sub_(mean)
    return (key, residual) if dtype is None else (key.to(dtype), residual.to(dtype))
