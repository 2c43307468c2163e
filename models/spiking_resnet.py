"""SNN branch: a spiking ResNet with pre-activation blocks, as a stem and four stages.

Tensors are time first, [S, N, C, H, W] with N = B*K segments. Layers without a state run once over the folded
[S*N, C, H, W]. Only the neurons, and batch norm in training, see the time steps.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.batch_norm import StepBatchNorm2d
from models.colours import ColourConv2d
from models.kernels.packing import spike_conv2d
from models.neurons import LIF

CHANNELS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2


def fold_steps(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a stateless layer to every step at once: [S, N, ...] -> [S, N, ...]."""
    y = layer(x.flatten(0, 1))
    return y.view(*x.shape[:2], *y.shape[1:])  # less of the host's time than unflatten


class SpikingBlock(nn.Module):
    """LIF, 3x3 conv, BN, LIF, 3x3 conv, BN, plus the real-valued input.

    [S, N, C_in, H, W] -> [S, N, C, H/stride, W/stride]. If the shape changes, the input passes 2x2 average
    pooling, a 1x1 conv and BN.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        neuron: Callable[[], LIF],
        norm: Callable[[int], StepBatchNorm2d],
        pack_spikes: bool,
    ):
        super().__init__()
        self.lif1 = neuron()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.lif2 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.stride = stride
        self._convolve = spike_conv2d if pack_spikes else fold_steps
        if stride != 1 or in_channels != channels:
            self.shortcut_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.shortcut_bn = norm(channels)
        else:
            self.shortcut_conv = None

    def forward(
        self,
        x: Tensor,
        spikes: Tensor | None = None,
        next_neuron: LIF | None = None,
        neurons: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
        first_step: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """(input of the next block, spikes of `next_neuron` for it).

        x: [S, N, C_in, H, W]. With `spikes` it may come averaged over 2x2 pixels, if the shape changes here.
        spikes: those of lif1 for x, if the batch norm that made x has fired them already; None: lif1 runs here.
        next_neuron: the neurons that take the result. The last batch norm then fires them in the same pass.
        neurons: what fires for lif1 and lif2: the same neurons from another state than zero. None: they themselves.
        first_step: number of the first of the S steps, as for batch norm.
        """
        lif1, lif2 = neurons or (self.lif1, self.lif2)
        if spikes is None:
            spikes = lif1(x)
        _, spikes = self.bn1(self._convolve(self.conv1, spikes), neuron=lif2, spikes_only=True, first_step=first_step)
        out = self._convolve(self.conv2, spikes)
        if self.shortcut_conv is None:
            return self.bn2(out, x, next_neuron, first_step=first_step)
        if x.shape[3:] != out.shape[3:]:
            x = F.avg_pool2d(x.flatten(0, 1), self.stride).unflatten(0, x.shape[:2])
        shortcut, _ = self.shortcut_bn(fold_steps(self.shortcut_conv, x), first_step=first_step)
        return self.bn2(out, shortcut, next_neuron, first_step=first_step)


class SpikingStage(nn.Sequential):
    """Blocks in a row. Arguments and results are those of a block."""

    def forward(
        self, x: Tensor, spikes: Tensor | None = None, next_neuron: LIF | None = None
    ) -> tuple[Tensor, Tensor | None]:
        next_neurons = [*(block.lif1 for block in self[1:]), next_neuron]
        for block, block_next in zip(self, next_neurons, strict=True):
            x, spikes = block(x, spikes, block_next)
        return x, spikes


class SpikingStem(nn.Module):
    """3x3 stride-2 convolution and BN: [S, N, 3, H, W] -> [S, N, C, H/2, W/2].

    Behind it come the neurons, at this size, and the average pool of the first block's shortcut. So the currents are
    returned pooled, [S, N, C, H/4, W/4], and the spikes are not.
    """

    def __init__(self, channels: int, norm: Callable[[int], StepBatchNorm2d]):
        super().__init__()
        self.conv = ColourConv2d(3, channels, 3, stride=2, padding=1, bias=False)
        self.bn = norm(channels)

    def forward(self, residual: Tensor, next_neuron: LIF, first_step: int = 0) -> tuple[Tensor, Tensor]:
        return self.bn(fold_steps(self.conv, residual), neuron=next_neuron, pool=True, first_step=first_step)


class SpikingResNetStages(nn.Module):
    """Stem and four stages of two blocks; each halves height and width.

    stem: residual frames [S, N, 3, H, W] -> currents [S, N, 64, H/4, W/4], spikes [S, N, 64, H/2, W/2].
    stages[i]: -> currents and, if the neurons that take them are given, spikes [S, N, channels[i], H/4/2^i, W/4/2^i].

    neuron: makes a layer of neurons.
    norm: makes a batch norm of so many channels.
    pack_spikes: keep one bit a spike for the backward pass.
    """

    def __init__(
        self, neuron: Callable[[], LIF], norm: Callable[[int], StepBatchNorm2d], pack_spikes: bool = False
    ):  # fmt: skip
        super().__init__()
        self.channels = list(CHANNELS)
        self.stem = SpikingStem(CHANNELS[0], norm)
        self.stages = nn.ModuleList()
        in_channels = CHANNELS[0]
        for channels in CHANNELS:
            blocks = [SpikingBlock(in_channels, channels, 2, neuron, norm, pack_spikes)]
            for _ in range(BLOCKS_PER_STAGE - 1):
                blocks.append(SpikingBlock(channels, channels, 1, neuron, norm, pack_spikes))
            self.stages.append(SpikingStage(*blocks))
            in_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
