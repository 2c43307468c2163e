"""The semantics of the spiking neuron, in one value that every backend takes."""

import functools
import json
import math
from dataclasses import dataclass, field

import torch

from models.kernels.surrogates import SURROGATES


@dataclass(frozen=True)
class LIFParameters:
    """Leaky integrate-and-fire semantics, per time step t (ReSpike, arXiv 2409.01564, section 3):

        charge   h_t = v_{t-1} + (x_t - v_{t-1}) / tau
        fire     s_t = 1 where h_t >= v_threshold, else 0
        reset    hard: v_t = h_t (1 - s_t) + v_reset s_t;  soft (v_reset None): v_t = h_t - v_threshold s_t

    ds/dh is the derivative of the surrogate (`models.kernels.surrogates`) at h_t - v_threshold.
    """

    tau: float = 4.0 / 3.0  # membrane time constant, in time steps
    v_threshold: float = 1.0
    v_reset: float | None = 0.0  # None: soft reset
    surrogate: str = "atan"
    alpha: float = 2.0  # steepness of the surrogate
    detach_reset: bool = True  # no gradient through the reset's spike
    # All of these in one word: operators of torch.library take numbers and words only, and are slow with many.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("tau", "v_threshold", "v_reset", "alpha"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if not self.tau >= 1.0:
            raise ValueError(f"tau must be at least 1 time step, got {self.tau}")
        if self.surrogate not in SURROGATES:
            raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {self.surrogate!r}")
        if not self.alpha > 0.0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if self.v_reset is not None and not self.v_reset < self.v_threshold:
            raise ValueError(f"v_reset must be below v_threshold {self.v_threshold}, got {self.v_reset}")
        object.__setattr__(self, "text", json.dumps(vars(self)))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> "LIFParameters":
        return LIFParameters(**json.loads(text))


def membrane_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the membrane and batch norm's statistics are kept in: eight bits of mantissa would lose the leak."""
    return torch.float64 if dtype == torch.float64 else torch.float32
