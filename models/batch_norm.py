"""Batch norm of spiking layers, and batch norm over the clips of all processes.

torch.nn.SyncBatchNorm needs a GPU and knows no time steps. The synchronised layers here run on a CPU too and, in
the SNN, keep statistics for each step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import operators
from models.kernels.parameters import LIFParameters
from models.kernels.triton_lif import MAX_STEPS
from models.neurons import LIF, runs_on_triton

BATCH_NORMS = ("per-step", "merged")
_NO_NEURON = LIFParameters()  # for the kernels, which then fire nothing; torch.compile could not trace its making


class FusedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [S, N, C, H, W] in one pass with what follows it, if the kernels run: the base of both below."""

    mode = "per-step"
    synchronised = False  # over all processes: see `synchronise_batch_norm`

    def __init__(self, channels: int, backend: str = "auto"):
        super().__init__(channels)
        self.backend = backend

    def in_one_pass(
        self, x: Tensor, residual: Tensor | None, neuron: LIFParameters = _NO_NEURON, keep_sum: bool = True,
        fire: bool = False, relu: bool = False, pool: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(sum, spikes) of `models.kernels.operators.batch_norm`."""
        with torch.no_grad():  # through the statistics the gradient goes in the operator
            mean, variance, count = self._statistics(_merged(x) if self.mode == "merged" else x)
        return operators.batch_norm(
            x, mean, variance, self.weight, self.bias, residual, count, self.eps,
            self.training, keep_sum, fire, relu, pool, neuron.text,
        )  # fmt: skip

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, biased variance) of x [S or 1, N, C, H, W]: [S or 1, C] each, and the number of values that they are
        of if it is over several processes, else None. Updates the running statistics; in evaluation it returns them."""
        if not self.training:
            return self.running_mean[None], self.running_var[None], None
        values = x.numel() // max(1, x.shape[0] * x.shape[2])
        if values < 2:
            raise ValueError(f"batch norm in training needs more than 1 value per channel, got {list(x.shape)}")
        if not self.synchronised:
            running = self.running_mean, self.running_var, self.num_batches_tracked, self.momentum
            return *operators.moments_and_running(x, *running), None
        mean, variance = operators.moments(x)  # no gradient passes here: `operators.batch_norm` computes it
        all_means, all_variances, total = _over_processes(mean, variance, values)
        update_running(self, all_means, all_variances, total)
        return all_means.to(mean.dtype), all_variances.to(mean.dtype), total


class StepBatchNorm2d(FusedBatchNorm2d):
    """Batch norm of [S, N, C, H, W], and what follows it in a spiking network: adding a residual and firing.

    mode: "per-step" normalises each time step, in training, by the step's own batch statistics and updates the
    running ones S times per forward (as published); "merged" takes one set of statistics over all steps. In
    evaluation both use the running statistics.
    backend: as `models.neurons.lif`; with "triton" the layer is one pass over the data.
    """

    def __init__(self, channels: int, mode: str = "per-step", backend: str = "auto"):
        super().__init__(channels, backend)
        if mode not in BATCH_NORMS:
            raise ValueError(f"batch norm mode must be one of {', '.join(BATCH_NORMS)}, got {mode!r}")
        self.mode = mode

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        neuron: LIF | None = None,
        spikes_only: bool = False,
        pool: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(normalised x + residual, the spikes of `neuron` for that sum), both [S, N, C, H, W].

        residual: added after normalisation; None adds nothing.
        neuron: the neurons that take the sum; without them the spikes are None.
        spikes_only: return None for the sum, which then need not be written.
        pool: return the sum averaged over 2x2 pixels, [S, N, C, H/2, W/2]. The neurons take it as it is.
        """
        if runs_on_triton(self.backend, x):
            return self._fused(x, residual, neuron, spikes_only, pool)
        total = self.normalise(x)
        if residual is not None:
            total = total + residual.to(total.dtype)
        spikes = None if neuron is None else neuron(total)
        return _sum(total, spikes_only, pool), spikes

    def normalise(self, x: Tensor) -> Tensor:
        per_step = self.training and self.mode == "per-step"
        if self.training and self.synchronised:
            return _synchronised(x if per_step else _merged(x), self).view_as(x)
        if per_step:
            return torch.stack([super(StepBatchNorm2d, self).forward(step) for step in x])
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _fused(self, x: Tensor, residual: Tensor | None, neuron: LIF | None, spikes_only: bool, pool: bool):
        # The kernel knows the equations of LIF itself. A subclass has its own: it runs behind the kernel.
        fires_here = type(neuron) is LIF and x.shape[0] <= MAX_STEPS
        parameters = neuron.parameters_ if fires_here else _NO_NEURON
        keep_sum = not spikes_only or not fires_here or residual is not None  # the backward pass reads such a sum
        pools_here = pool and residual is None and (fires_here or neuron is None)
        total, spikes = self.in_one_pass(x, residual, parameters, keep_sum, fires_here, pool=pools_here)
        if neuron is None:
            return _sum(total, spikes_only, pool and not pools_here), None
        spikes = neuron.counted(spikes) if fires_here else neuron(total)
        return _sum(total, spikes_only, pool and not pools_here), spikes


class FrameBatchNorm2d(FusedBatchNorm2d):
    """nn.BatchNorm2d of [N, C, H, W], and what follows it in a ResNet: adding a residual and ReLU."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """[N, C, H, W]: normalised x; plus `residual` if it is given; its ReLU if `relu`."""
        if runs_on_triton(self.backend, x):
            residual = None if residual is None else residual.unsqueeze(0)
            total, _ = self.in_one_pass(x.unsqueeze(0), residual, relu=relu)
            return total.squeeze(0)  # not total[0], whose gradient would be copied into zeros
        if self.training and self.synchronised:
            y = _synchronised(x.unsqueeze(0), self).squeeze(0)
        else:
            y = super().forward(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if relu else y


def _merged(x: Tensor) -> Tensor:
    """[S, N, ...] -> [1, S*N, ...]"""
    return x.flatten(0, 1).unsqueeze(0)


def _sum(total: Tensor, spikes_only: bool, pool: bool) -> Tensor | None:
    if spikes_only:
        return None
    return F.avg_pool2d(total.flatten(0, 1), 2).unflatten(0, total.shape[:2]) if pool else total


def update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """One update of the running statistics for each of the S sets [S, C], each of `count` values."""
    unbiased = variance * (count / (count - 1))
    for step in range(len(mean)):
        norm.running_mean.lerp_(mean[step].to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(unbiased[step].to(norm.running_var), norm.momentum)
    norm.num_batches_tracked += len(mean)


# ---- the batch of all processes


def synchronise_batch_norm(model: nn.Module) -> None:
    """From here on, every batch norm of `model` takes its statistics over the batches of all processes, if there are
    several."""
    for module in model.modules():
        if isinstance(module, FusedBatchNorm2d):
            module.synchronised = dist.is_initialized()


def _over_processes(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance [S, C], count []) of all processes, in float64: in float32 the mean of squares
    minus the squared mean would lose the variance of a channel with a large mean."""
    mean, variance = mean.double(), variance.double()
    sums = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_full((len(mean), 1), count)], dim=1)
    sums = _SumOverProcesses.apply(sums)  # [S, 2C + 1]
    mean, square = (sums[:, :-1] / sums[:, -1:]).chunk(2, dim=1)
    return mean, (square - mean.square()).clamp_min(0.0), sums[0, -1].detach()


def _synchronised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """[S, N, C, H, W] normalised with the statistics of each step over all processes. Each of the S sets updates
    the running statistics."""
    values = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(values, dim=(1, 3, 4), correction=0)  # [S, C]
    mean, variance, total = _over_processes(mean, variance, x.numel() // (x.shape[0] * x.shape[2]))
    with torch.no_grad():
        update_running(norm, mean, variance, total)
    scale = norm.weight * torch.rsqrt(variance + norm.eps).to(norm.weight)  # [S, C]
    shift = norm.bias - mean.to(norm.weight) * scale
    normalised = values * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    return normalised.to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(values: Tensor) -> Tensor:
    values = values.clone()
    dist.all_reduce(values)
    return values
