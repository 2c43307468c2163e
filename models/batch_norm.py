"""Batch norm of spiking layers, and batch norm over the clips of all processes.

torch.nn.SyncBatchNorm needs a GPU and knows no time steps. The synchronised layers here run on a CPU too and, in
the SNN, take statistics of each step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import operators
from models.kernels.parameters import LIFParameters
from models.kernels.triton_lif import MAX_STEPS
from models.neurons import LIF, runs_on_triton
from utils.errors import UserError

BATCH_NORMS = ("per-step", "merged", "through-time")
_NO_NEURON = LIFParameters()  # for the kernels, which then fire nothing; torch.compile could not trace its making


class FusedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [S, N, C, H, W] in one pass with what follows it, if the kernels run: the base of both below."""

    mode = "per-step"
    synchronised = False  # over all processes: see `synchronise_batch_norm`
    tally: Tensor | None = None  # while `MeasuredStatistics` adds up, float64 [S or 1, 2C + 1]: as `_over_processes`

    def __init__(self, channels: int, backend: str = "auto"):
        super().__init__(channels)
        self.backend = backend

    def in_one_pass(
        self, x: Tensor, residual: Tensor | None, neuron: LIFParameters = _NO_NEURON, keep_sum: bool = True,
        fire: bool = False, relu: bool = False, pool: bool = False, first_step: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(sum, spikes) of `models.kernels.operators.batch_norm`."""
        with torch.no_grad():  # through the statistics the gradient goes in the operator
            mean, variance, count = self._statistics(self._sets(x), first_step)
        return operators.batch_norm(
            x, mean, variance, self.weight, self.bias, residual, count, self.eps,
            self.training, keep_sum, fire, relu, pool, neuron.text,
        )  # fmt: skip

    def _statistics(self, x: Tensor, first_step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mean, biased variance) of x [S or 1, N, C, H, W]: [S or 1, C] each, and the number of values that they are
        of if it is over several processes, else None. Updates the running statistics; in evaluation it returns them."""
        if not self.training:
            return *self.running(first_step, x.shape[0]), None
        values = x.numel() // max(1, x.shape[0] * x.shape[2])
        if values < 2:
            raise ValueError(f"batch norm in training needs more than 1 value per channel, got {list(x.shape)}")
        if not self.synchronised and self.tally is None:
            running = self.running_mean, self.running_var, self.num_batches_tracked, self.momentum
            return *operators.moments_and_running(x, *running), None
        mean, variance = operators.moments(x)  # no gradient passes here: `operators.batch_norm` computes it
        all_means, all_variances, total = _over_processes(mean, variance, values)
        update_running(self, all_means, all_variances, total)
        return all_means.to(mean.dtype), all_variances.to(mean.dtype), total

    def _sets(self, x: Tensor) -> Tensor:
        """x [S, N, C, H, W] with a set of statistics for each step; [1, S*N, C, H, W] with one for all of them. While
        statistics are measured it is as in evaluation."""
        one_for_all = self.mode == "merged" or (self.mode == "per-step" and self.tally is not None)
        return x.flatten(0, 1).unsqueeze(0) if one_for_all else x

    def running(self, first_step: int, steps: int) -> tuple[Tensor, Tensor]:
        """The running mean and variance of so many steps: [1, C] each if all steps share them, else [steps, C]."""
        if self.mode != "through-time":
            return self.running_mean[None], self.running_var[None]
        own = slice(first_step, first_step + steps)
        return self.running_mean[own], self.running_var[own]


class StepBatchNorm2d(FusedBatchNorm2d):
    """Batch norm of [S, N, C, H, W], and what follows it in a spiking network: adding a residual and firing.

    mode: "per-step" normalises each time step, in training, by the step's own batch statistics and updates the
    running ones [C] S times per forward (as published); "merged" takes one set of statistics over all steps. In
    evaluation both use the running statistics for all steps. "through-time" trains as "per-step" does, but keeps
    running statistics [steps, C], one set for each step, and normalises the step by them in evaluation. BNTT (arXiv
    2010.01729) keeps such statistics too, with a weight for each step and no bias; here the steps share weight and
    bias. TEBN (NeurIPS 2022) is the other way round: "merged" statistics, and a factor for each step.
    backend: as `models.neurons.lif`; with "triton" the layer is one pass over the data.
    steps: how many time steps there are at most; only "through-time" needs it.
    """

    def __init__(self, channels: int, mode: str = "per-step", backend: str = "auto", steps: int = 1):
        super().__init__(channels, backend)
        if mode not in BATCH_NORMS:
            raise ValueError(f"batch norm mode must be one of {', '.join(BATCH_NORMS)}, got {mode!r}")
        self.mode = mode
        if mode == "through-time":
            self.running_mean = self.running_mean.repeat(steps, 1)
            self.running_var = self.running_var.repeat(steps, 1)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        neuron: LIF | None = None,
        spikes_only: bool = False,
        pool: bool = False,
        first_step: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(normalised x + residual, the spikes of `neuron` for that sum), both [S, N, C, H, W].

        residual: added after normalisation; None adds nothing.
        neuron: the neurons that take the sum; without them the spikes are None.
        spikes_only: return None for the sum, which then need not be written.
        pool: return the sum averaged over 2x2 pixels, [S, N, C, H/2, W/2]. The neurons take it as it is.
        first_step: number of the first of the S steps, in evaluation: a stream has one step at a time.

        Raises ValueError for a step that "through-time" has no statistics for.
        """
        if self.mode == "through-time" and first_step + len(x) > len(self.running_mean):
            raise ValueError(f"batch norm knows {len(self.running_mean)} time steps, got {first_step + len(x)}")
        if runs_on_triton(self.backend, x):
            return self._fused(x, residual, neuron, spikes_only, pool, first_step)
        total = self.normalise(x, first_step)
        if residual is not None:
            total = total + residual.to(total.dtype)
        spikes = None if neuron is None else neuron(total)
        return _sum(total, spikes_only, pool), spikes

    def normalise(self, x: Tensor, first_step: int = 0) -> Tensor:
        if self.training and (self.synchronised or self.tally is not None):
            return _synchronised(self._sets(x), self).view_as(x)
        if self.mode == "through-time":
            if self.training:
                self.num_batches_tracked += 1
            fixed = self.weight, self.bias, self.training, self.momentum, self.eps
            running = zip(x, *self.running(first_step, len(x)), strict=True)
            return torch.stack([F.batch_norm(step, mean, variance, *fixed) for step, mean, variance in running])
        if self.training and self.mode == "per-step":
            return torch.stack([super(StepBatchNorm2d, self).forward(step) for step in x])
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _fused(
        self, x: Tensor, residual: Tensor | None, neuron: LIF | None, spikes_only: bool, pool: bool, first_step: int
    ):  # fmt: skip
        # The kernel knows the equations of LIF itself. A subclass has its own: it runs behind the kernel.
        fires_here = type(neuron) is LIF and x.shape[0] <= MAX_STEPS
        parameters = neuron.parameters_ if fires_here else _NO_NEURON
        keep_sum = not spikes_only or not fires_here or residual is not None  # the backward pass reads such a sum
        pools_here = pool and residual is None and (fires_here or neuron is None)
        total, spikes = self.in_one_pass(
            x, residual, parameters, keep_sum, fires_here, pool=pools_here, first_step=first_step
        )
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
        if self.training and (self.synchronised or self.tally is not None):
            y = _synchronised(x.unsqueeze(0), self).squeeze(0)
        else:
            y = super().forward(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if relu else y


def _sum(total: Tensor, spikes_only: bool, pool: bool) -> Tensor | None:
    if spikes_only:
        return None
    return F.avg_pool2d(total.flatten(0, 1), 2).unflatten(0, total.shape[:2]) if pool else total


def update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """One update of the running statistics for each of the S sets [S, C], each of `count` values; or, while they are
    measured, of the tally."""
    if norm.tally is not None:
        norm.tally += _sums(mean, variance, count)
        return
    unbiased = variance * (count / (count - 1))
    if norm.running_mean.dim() == 2:  # a set of their own for each step
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var), norm.momentum)
        norm.num_batches_tracked += 1
        return
    for step in range(len(mean)):
        norm.running_mean.lerp_(mean[step].to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(unbiased[step].to(norm.running_var), norm.momentum)
    norm.num_batches_tracked += len(mean)


def fit_running(weights: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Give the running statistics in the state dict `weights` the time steps of those in `own`. Shared ones are taken
    for every step. Those of each step, where `own` has others, are first put together: the variance of the whole.
    Returns whether there were any to change."""
    changed = False
    for name in (name for name in own if name.endswith(".running_mean") and name in weights):
        of_variance = name.replace("running_mean", "running_var")
        mean, variance = weights[name], weights[of_variance]
        if mean.shape == own[name].shape or mean.shape[-1:] != own[name].shape[-1:]:
            continue
        if mean.dim() == 2:
            mean, variance = mean.mean(0), variance.mean(0) + mean.var(0, correction=0)
        weights[name], weights[of_variance] = (part.expand_as(own[name]).clone() for part in (mean, variance))
        changed = True
    return changed


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
    sums = _SumOverProcesses.apply(_sums(mean.double(), variance.double(), count))
    return *_moments(sums), sums[0, -1].detach()


def _sums(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """[S, 2C + 1]: sums of the values, sums of their squares, and their number."""
    counts = torch.ones_like(mean[:, :1]) * count
    return torch.cat([mean * count, (variance + mean.square()) * count, counts], dim=1)


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) [S, C] from `_sums`."""
    mean, square = (sums[:, :-1] / sums[:, -1:]).chunk(2, dim=1)
    return mean, (square - mean.square()).clamp_min(0.0)


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


# ---- statistics of many batches


class MeasuredStatistics:
    """In the `with` block, `model` in training mode adds up what its batch norms see, over all processes. `take` then
    makes the mean and variance of it all their running statistics. Batch norms in evaluation mode stay as they are.

    Each batch, of all processes, is normalised by its own statistics: one pass is enough, as in fvcore's
    `update_bn_stats` (PySlowFast's BN.USE_PRECISE_STATS), and no layer waits for the layers before it. They are
    statistics of the steps that share them in evaluation: the deeper layers of a "per-step" network then see what they
    see in evaluation, and not steps that were made alike.
    """

    def __init__(self, model: nn.Module):
        self._norms = [norm for norm in model.modules() if isinstance(norm, FusedBatchNorm2d) and norm.training]
        if not self._norms:  # all is frozen, or a video network of torchvision
            raise UserError(f"no batch norm of the {type(model).__name__} can be measured", about="precise_bn")

    def __enter__(self) -> "MeasuredStatistics":
        for norm in self._norms:
            mean = norm.running_mean.reshape(-1, norm.num_features)  # [S or 1, C]
            norm.tally = mean.new_zeros(len(mean), 2 * norm.num_features + 1, dtype=torch.float64)
        return self

    def __exit__(self, *exc_info) -> None:
        for norm in self._norms:
            norm.tally = None

    @torch.no_grad()
    def take(self) -> None:
        """Variances are those of all values of a channel, unbiased as PyTorch's running ones."""
        for norm in self._norms:
            (mean, variance), count = _moments(norm.tally), norm.tally[:, -1:]
            norm.running_mean.copy_(mean.view_as(norm.running_mean))
            norm.running_var.copy_((variance * count / (count - 1)).view_as(norm.running_var))
