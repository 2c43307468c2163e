"""Batch norm of spiking layers, and batch norm over the clips of all processes.

torch.nn.SyncBatchNorm needs a GPU and knows no time steps. The synchronised layers here run on a CPU too and, in
the SNN, keep statistics for each step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import operators
from models.kernels.parameters import LIFParameters, membrane_dtype
from models.kernels.triton_lif import MAX_STEPS
from models.neurons import LIF, runs_on_triton

BATCH_NORMS = ("per-step", "merged")


class StepBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [S, N, C, H, W], and what follows it in a spiking network: adding a residual and firing.

    mode: "per-step" normalises each time step, in training, by the step's own batch statistics and updates the
    running ones S times per forward (as published); "merged" takes one set of statistics over all steps. In
    evaluation both use the running statistics.
    backend: as `models.neurons.lif`; with "triton" the layer is one pass over the data.
    """

    def __init__(self, channels: int, mode: str = "per-step", backend: str = "auto"):
        super().__init__(channels)
        if mode not in BATCH_NORMS:
            raise ValueError(f"batch norm mode must be one of {', '.join(BATCH_NORMS)}, got {mode!r}")
        self.mode = mode
        self.backend = backend

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
        if self.training and self.mode == "per-step":
            return torch.stack([super(StepBatchNorm2d, self).forward(step) for step in x])
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _fused(self, x: Tensor, residual: Tensor | None, neuron: LIF | None, spikes_only: bool, pool: bool):
        # The kernel knows the equations of LIF itself. A subclass has its own: it runs behind the kernel.
        fires_here = type(neuron) is LIF and x.shape[0] <= MAX_STEPS
        parameters = neuron.parameters_ if fires_here else LIFParameters()
        keep_sum = not spikes_only or not fires_here or residual is not None  # the backward pass reads such a sum
        pools_here = pool and residual is None and (fires_here or neuron is None)
        mean, inverse_deviation, count = self._statistics(x)
        total, spikes, _ = operators.batch_norm(
            x, mean, inverse_deviation, self.weight, self.bias, residual, None, count,
            self.training, keep_sum, fires_here, False, pools_here, *parameters.as_arguments(),
        )  # fmt: skip
        if neuron is None:
            return _sum(total, spikes_only, pool and not pools_here), None
        spikes = neuron.counted(spikes) if fires_here else neuron(total)
        return _sum(total, spikes_only, pool and not pools_here), spikes

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, 1 / standard deviation, count): [S or 1, C] twice, and the number of values that they are of if
        it is over several processes, else None."""
        if not self.training:
            dtype = membrane_dtype(x.dtype)
            variance = self.running_var.to(dtype)[None]
            return self.running_mean.to(dtype)[None], torch.rsqrt(variance + self.eps), None
        if self.mode == "merged":
            x = x.flatten(0, 1)[None]
        values = x.numel() // max(1, x.shape[0] * x.shape[2])
        if values < 2:
            raise ValueError(f"batch norm in training needs more than 1 value per channel, got {list(x.shape)}")
        mean, variance, count = self.moments(x, values)
        return mean, torch.rsqrt(variance + self.eps), count

    def moments(self, x: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, biased variance [S or 1, C], count) of x [S or 1, N, C, H, W] with `values` values a channel, as
        `_statistics`. Updates the running statistics."""
        running = self.running_mean, self.running_var, self.num_batches_tracked, self.momentum
        return *operators.moments(x, *running), None


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
    """Replace every batch norm of `model` in place. Parameters, buffers and their names stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is StepBatchNorm2d:
                new = SyncStepBatchNorm2d(child.num_features, child.mode, child.backend)
            elif type(child) is nn.BatchNorm2d:
                new = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
            else:
                continue
            setattr(parent, name, _with_state_of(child, new))


def _with_state_of(old: nn.BatchNorm2d, new: nn.BatchNorm2d) -> nn.BatchNorm2d:
    new._parameters, new._buffers = old._parameters, old._buffers
    return new.train(old.training)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d of [N, C, H, W] over the batches of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return _synchronised(x.unsqueeze(0), self).squeeze(0)


class SyncStepBatchNorm2d(StepBatchNorm2d):
    """StepBatchNorm2d of [S, N, C, H, W] over the batches of all processes."""

    def normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().normalise(x)
        if self.mode == "merged":
            return _synchronised(x.flatten(0, 1).unsqueeze(0), self).squeeze(0).unflatten(0, x.shape[:2])
        return _synchronised(x, self)

    def moments(self, x: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """No gradient passes here: `models.kernels.operators.batch_norm` computes it."""
        if not dist.is_initialized():
            return super().moments(x, values)
        mean, variance = operators.moments(x)
        all_means, all_variances, total = _over_processes(mean, variance, values)
        update_running(self, all_means, all_variances, total)
        return all_means.to(mean.dtype), all_variances.to(mean.dtype), total


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
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
