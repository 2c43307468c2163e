"""SNN branch: a spiking ResNet with pre-activation blocks, as a stem and four stages.

Tensors are time first, [S, N, C, H, W] with N = B*K segments. Everything without a state runs once
over the folded [S*N, C, H, W]; only the neurons, and batch norm in training, see the steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import operators
from models.kernels.packing import spike_conv2d
from models.kernels.parameters import LIFParameters, membrane_dtype
from models.kernels.triton_lif import MAX_STEPS
from models.neurons import LIF, runs_on_triton

CHANNELS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2
BATCH_NORMS = ("per-step", "merged")


def fold_steps(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a stateless layer to every step at once: [S, N, ...] -> [S, N, ...]."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class StepBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [S, N, C, H, W], and what follows it in a spiking network: adding a residual and firing.

    mode "per-step": in training each time step is normalised by its own batch statistics and updates
    the running ones, S updates per forward (as published). "merged": one set of statistics over all
    steps. In evaluation both are the same: the running statistics. backend: as `models.neurons.lif`;
    with "triton" all of it is one pass over the data.
    """

    def __init__(self, channels: int, mode: str = "per-step", backend: str = "auto"):
        super().__init__(channels)
        if mode not in BATCH_NORMS:
            raise ValueError(f"batch norm mode must be one of {', '.join(BATCH_NORMS)}, got {mode!r}")
        self.mode = mode
        self.backend = backend

    def forward(
        self, x: Tensor, residual: Tensor | None = None, following: LIF | None = None, keep_sum: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """(normalised x + residual, the spikes of `following` for it), [S, N, C, H, W] both; None where not
        asked for."""
        if runs_on_triton(self.backend, x):
            return self._fused(x, residual, following, keep_sum)
        total = self.normalise(x)
        if residual is not None:
            total = total + residual.to(total.dtype)
        spikes = None if following is None else following(total)
        return total if keep_sum else None, spikes

    def normalise(self, x: Tensor) -> Tensor:
        if self.training and self.mode == "per-step":
            return torch.stack([super(StepBatchNorm2d, self).forward(step) for step in x])
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _fused(self, x: Tensor, residual: Tensor | None, following: LIF | None, keep_sum: bool):
        fires_here = following is not None and x.shape[0] <= MAX_STEPS
        neuron = LIFParameters() if following is None else following.parameters_
        mean, inverse_deviation, count = self._statistics(x)
        total, spikes, _ = operators.batch_norm(
            x, mean, inverse_deviation, self.weight, self.bias, residual, None, count,
            self.training, keep_sum or not fires_here or residual is not None, fires_here, False,
            *neuron.as_arguments(),
        )  # fmt: skip
        if following is None:
            return total, None
        spikes = following.counted(spikes) if fires_here else following(total)
        return total if keep_sum else None, spikes

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, 1 / standard deviation [S or 1, C], how many values they are of if over several processes)."""
        if not self.training:
            dtype = membrane_dtype(x.dtype)
            variance = self.running_var.to(dtype)[None]
            return self.running_mean.to(dtype)[None], torch.rsqrt(variance + self.eps), None
        if self.mode == "merged":
            x = x.flatten(0, 1)[None]
        values = x.numel() // max(1, x.shape[0] * x.shape[2])
        if values < 2:
            raise ValueError(f"batch norm in training needs more than 1 value per channel, got {list(x.shape)}")
        mean, variance, count = self.over_processes(*operators.moments(x), values)
        update_running(self, mean, variance, values if count is None else count)
        return mean, torch.rsqrt(variance + self.eps), count

    def over_processes(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, biased variance, count) of all processes from this one's; None: this one's are all."""
        return mean, variance, None


def update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """One update of the running statistics for each of the S sets [S, C], each of `count` values."""
    unbiased = variance * (count / (count - 1))
    for step in range(len(mean)):
        norm.running_mean.lerp_(mean[step].to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(unbiased[step].to(norm.running_var), norm.momentum)
    norm.num_batches_tracked += len(mean)


class SpikingBlock(nn.Module):
    """LIF, 3x3 conv, BN, LIF, 3x3 conv, BN, plus the real-valued input.

    [S, N, C_in, H, W] -> [S, N, C, H/stride, W/stride]. Where the shape changes the input passes
    2x2 average pooling, a 1x1 conv and BN.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int,
        neuron: LIFParameters, batch_norm: str, backend: str, pack_spikes: bool,
    ):  # fmt: skip
        super().__init__()
        self.lif1 = LIF(neuron, backend)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = StepBatchNorm2d(channels, batch_norm, backend)
        self.lif2 = LIF(neuron, backend)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = StepBatchNorm2d(channels, batch_norm, backend)
        self.stride = stride
        self._convolve = spike_conv2d if pack_spikes else fold_steps
        if stride != 1 or in_channels != channels:
            self.shortcut_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.shortcut_bn = StepBatchNorm2d(channels, batch_norm, backend)
        else:
            self.shortcut_conv = None

    def forward(
        self, x: Tensor, spikes: Tensor | None = None, following: LIF | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(x of the next block, its spikes). spikes: those of lif1 for x, where the batch norm that made x
        has fired them in passing. following: the neurons that the result goes to, to do the same for them."""
        if spikes is None:
            spikes = self.lif1(x)
        _, spikes = self.bn1(self._convolve(self.conv1, spikes), following=self.lif2, keep_sum=False)
        out = self._convolve(self.conv2, spikes)
        if self.shortcut_conv is None:
            return self.bn2(out, x, following)
        shortcut = F.avg_pool2d(x.flatten(0, 1), self.stride).unflatten(0, x.shape[:2])
        shortcut, _ = self.shortcut_bn(fold_steps(self.shortcut_conv, shortcut))
        return self.bn2(out, shortcut, following)


class SpikingStage(nn.Sequential):
    """Blocks in a row; arguments and results as those of a block."""

    def forward(
        self, x: Tensor, spikes: Tensor | None = None, following: LIF | None = None
    ) -> tuple[Tensor, Tensor | None]:
        for block, next_lif in zip(self, [*(block.lif1 for block in self[1:]), following], strict=True):
            x, spikes = block(x, spikes, next_lif)
        return x, spikes


class SpikingResNetStages(nn.Module):
    """Stem and four stages of two blocks; each halves height and width.

    stem: residual frames [S, N, 3, H, W] -> [S, N, 64, H/2, W/2] (real-valued currents).
    stages[i]: -> [S, N, channels[i], H/4/2^i, W/4/2^i]. Both give currents and, on request, the spikes
    of the neurons that take them.
    """

    def __init__(
        self, neuron: LIFParameters, batch_norm: str = "per-step", backend: str = "auto", pack_spikes: bool = False
    ):
        super().__init__()
        self.channels = list(CHANNELS)
        self.stem = SpikingStem(CHANNELS[0], batch_norm, backend)
        self.stages = nn.ModuleList()
        in_channels = CHANNELS[0]
        for channels in CHANNELS:
            how = (neuron, batch_norm, backend, pack_spikes)
            blocks = [SpikingBlock(in_channels, channels, 2, *how)]
            blocks += [SpikingBlock(channels, channels, 1, *how) for _ in range(BLOCKS_PER_STAGE - 1)]
            self.stages.append(SpikingStage(*blocks))
            in_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SpikingStem(nn.Module):
    """3x3 stride-2 convolution and BN: [S, N, 3, H, W] -> [S, N, C, H/2, W/2]."""

    def __init__(self, channels: int, batch_norm: str, backend: str):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn = StepBatchNorm2d(channels, batch_norm, backend)

    def forward(self, residual: Tensor, following: LIF | None = None) -> tuple[Tensor, Tensor | None]:
        return self.bn(fold_steps(self.conv, residual), following=following)
