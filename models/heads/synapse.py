"""Synapses: linear filters between neurons and what they drive."""

import math

import torch
from torch import Tensor, nn

from models.heads.neurons import DT


class Lowpass(nn.Module):
    """First-order synapse, discretised by zero-order hold: y_t = decay y_{t-1} + (1 - decay) x_t, from zero.

    forward: [T, ...] -> [T, ...]. tau: seconds; 0 passes x on. All steps at once, as a product with the
    triangle of its impulse response.
    """

    def __init__(self, tau: float):
        super().__init__()
        self.decay = math.exp(-DT / tau) if tau > 0 else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.decay == 0.0:
            return x
        steps = torch.arange(len(x), device=x.device)
        distance = steps[:, None] - steps[None, :]
        response = torch.where(distance >= 0, (1.0 - self.decay) * self.decay ** distance.clamp(min=0).to(x.dtype), 0.0)
        return torch.tensordot(response.to(x.dtype), x, dims=1)
