"""Batch norm over the clips of all processes.

torch.nn.SyncBatchNorm needs a GPU and knows no time steps; this one runs on both and, in the SNN, keeps
statistics for each step.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.spiking_resnet import StepBatchNorm2d, update_running


def synchronise_batch_norm(model: nn.Module) -> None:
    """Replace every batch norm of `model` in place; parameters, buffers and their names stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is StepBatchNorm2d:
                new = SyncStepBatchNorm2d(child.num_features, child.mode, child.backend)
            elif type(child) is nn.BatchNorm2d:
                new = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
            else:
                continue
            setattr(parent, name, _taken_over(new, child))


def _taken_over(new: nn.BatchNorm2d, old: nn.BatchNorm2d) -> nn.BatchNorm2d:
    new._parameters, new._buffers = old._parameters, old._buffers
    return new.train(old.training)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d of [N, C, H, W] whose batch is that of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return _synchronised(x.unsqueeze(0), self).squeeze(0)


class SyncStepBatchNorm2d(StepBatchNorm2d):
    """StepBatchNorm2d of [S, N, C, H, W] whose batch is that of all processes."""

    def normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().normalise(x)
        if self.mode == "merged":
            return _synchronised(x.flatten(0, 1).unsqueeze(0), self).squeeze(0).unflatten(0, x.shape[:2])
        return _synchronised(x, self)

    def over_processes(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """As a value alone: `models.kernels.operators.batch_norm` sees to the gradient."""
        if not dist.is_initialized():
            return mean, variance, None
        all_means, all_variances, total = _over_processes(mean, variance, count)
        return all_means.to(mean.dtype), all_variances.to(mean.dtype), total


def _over_processes(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance [S, C], count []) of all processes, in float64: there mean^2 may be taken off
    the mean of squares."""
    mean, variance = mean.double(), variance.double()
    sums = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_full((len(mean), 1), count)], dim=1)
    sums = _SumOverProcesses.apply(sums)  # [S, 2C + 1]
    mean, square = (sums[:, :-1] / sums[:, -1:]).chunk(2, dim=1)
    return mean, (square - mean.square()).clamp_min(0.0), sums[0, -1].detach()


def _synchronised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """[S, N, C, H, W] normalised with the S sets of statistics of all processes, each of which updates
    the running ones."""
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
