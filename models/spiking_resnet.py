"""SNN branch: a spiking ResNet with pre-activation blocks, as a stem and four stages.

Tensors are time first, [S, N, C, H, W] with N = B*K segments. Everything without a state runs once
over the folded [S*N, C, H, W]; only the neurons, and batch norm in training, see the steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.neurons import LIF, LIFParameters

CHANNELS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2
BATCH_NORMS = ("per-step", "merged")


def fold_steps(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a stateless layer to every step at once: [S, N, ...] -> [S, N, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class StepBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [S, N, C, H, W].

    mode "per-step": in training each time step is normalised by its own batch statistics and updates
    the running ones, S updates per forward (as published). "merged": one set of statistics over all
    steps. In evaluation both are the same: the running statistics.
    """

    def __init__(self, channels: int, mode: str = "per-step"):
        super().__init__(channels)
        if mode not in BATCH_NORMS:
            raise ValueError(f"batch norm mode must be one of {', '.join(BATCH_NORMS)}, got {mode!r}")
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.mode == "per-step":
            return torch.stack([super(StepBatchNorm2d, self).forward(step) for step in x])
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class SpikingBlock(nn.Module):
    """LIF, 3x3 conv, BN, LIF, 3x3 conv, BN, plus the real-valued input.

    [S, N, C_in, H, W] -> [S, N, C, H/stride, W/stride]. Where the shape changes the input passes
    2x2 average pooling, a 1x1 conv and BN.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, neuron: LIFParameters, batch_norm: str):
        super().__init__()
        self.lif1 = LIF(neuron)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = StepBatchNorm2d(channels, batch_norm)
        self.lif2 = LIF(neuron)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = StepBatchNorm2d(channels, batch_norm)
        self.stride = stride
        if stride != 1 or in_channels != channels:
            self.shortcut_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.shortcut_bn = StepBatchNorm2d(channels, batch_norm)
        else:
            self.shortcut_conv = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(fold_steps(self.conv1, self.lif1(x)))
        out = self.bn2(fold_steps(self.conv2, self.lif2(out)))
        if self.shortcut_conv is None:
            return out + x
        shortcut = F.avg_pool2d(x.flatten(0, 1), self.stride).unflatten(0, x.shape[:2])
        return out + self.shortcut_bn(fold_steps(self.shortcut_conv, shortcut))


class SpikingResNetStages(nn.Module):
    """Stem and four stages of two blocks; each halves height and width.

    stem: residual frames [S, N, 3, H, W] -> [S, N, 64, H/2, W/2] (real-valued currents).
    stages[i]: -> [S, N, channels[i], H/4/2^i, W/4/2^i].
    """

    def __init__(self, neuron: LIFParameters, batch_norm: str = "per-step"):
        super().__init__()
        self.channels = list(CHANNELS)
        self.stem = SpikingStem(CHANNELS[0], batch_norm)
        self.stages = nn.ModuleList()
        in_channels = CHANNELS[0]
        for channels in CHANNELS:
            blocks = [SpikingBlock(in_channels, channels, 2, neuron, batch_norm)]
            blocks += [SpikingBlock(channels, channels, 1, neuron, batch_norm) for _ in range(BLOCKS_PER_STAGE - 1)]
            self.stages.append(nn.Sequential(*blocks))
            in_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SpikingStem(nn.Module):
    """3x3 stride-2 convolution and BN: [S, N, 3, H, W] -> [S, N, C, H/2, W/2]."""

    def __init__(self, channels: int, batch_norm: str):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn = StepBatchNorm2d(channels, batch_norm)

    def forward(self, residual: Tensor) -> Tensor:
        return self.bn(fold_steps(self.conv, residual))
