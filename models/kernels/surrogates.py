"""Surrogate gradients: what stands in for the derivative of the spike, in PyTorch and in Triton.

With z = h - v_threshold:

    atan      alpha / 2 / (1 + (pi / 2 * alpha * z)^2)      (alpha 2: 1 / (1 + (pi z)^2), as published)
    sigmoid   alpha * sigma(alpha z) * (1 - sigma(alpha z))
    triangle  max(0, alpha - alpha^2 |z|)                   (height alpha, area 1)

To add one, add its name to SURROGATES and its formula to both functions below.
"""

import math

import torch
from torch import Tensor

from utils.triton_language import tl, triton

SURROGATES = ("atan", "sigmoid", "triangle")


def surrogate_derivative(z: Tensor, surrogate: str, alpha: float) -> Tensor:
    """ds/dh at z = h - v_threshold, same shape as z."""
    if surrogate == "atan":
        return (z * (math.pi / 2 * alpha)).square_().add_(1.0).reciprocal_().mul_(alpha / 2)
    if surrogate == "sigmoid":
        s = torch.sigmoid(z * alpha)
        return (1.0 - s).mul_(s).mul_(alpha)
    if surrogate == "triangle":
        return (alpha - z.abs().mul_(alpha * alpha)).clamp_(min=0.0)
    raise ValueError(f"no derivative defined for surrogate {surrogate!r}")


@triton.jit
def surrogate_derivative_triton(z, SURROGATE: tl.constexpr, ALPHA: tl.constexpr):
    if SURROGATE == "atan":
        # By the square of 1 / sqrt(): one instruction on a GPU, and a division is eight.
        scaled = z * (1.5707963267948966 * ALPHA)
        root = tl.rsqrt(scaled * scaled + 1.0)
        return (0.5 * ALPHA) * root * root
    elif SURROGATE == "sigmoid":
        # By exp of what is negative: it cannot overflow.
        decay = tl.exp(-ALPHA * tl.abs(z))
        return ALPHA * decay / ((1.0 + decay) * (1.0 + decay))
    else:
        tl.static_assert(SURROGATE == "triangle", "no derivative defined for this surrogate")
        return tl.maximum(ALPHA - (ALPHA * ALPHA) * tl.abs(z), 0.0)
