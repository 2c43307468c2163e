"""The kernels as operators of torch.library: what autograd, torch.compile and checkpointing see.

Each has its implementation (on a GPU, or anywhere in Triton's interpreter), what it returns for fake
tensors, and the formula of its gradient in terms of other operators. They take the neuron as
`LIFParameters.text`. Outputs that were not asked for are empty tensors.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from models.kernels import triton_batch_norm, triton_lif
from models.kernels.layout import channels_known, is_channels_last, laid_out_as, steps_outermost
from models.kernels.operator import operator
from models.kernels.parameters import LIFParameters, membrane_dtype

# ---- the LIF layer


@operator("respike::lif")
def lif(current: Tensor, v0: Tensor | None, keep_v: bool, neuron: str) -> tuple[Tensor, Tensor]:
    """current [S, ...] with S up to 32, v0 [...] -> (spikes [S, ...], if `keep_v` the membrane after the last
    step [...])."""
    current = steps_outermost(current)
    spikes, v_end = _like_lif(current, keep_v)
    p = LIFParameters.from_text(neuron)
    triton_lif.launch_forward(current, _state(v0, current), spikes, v_end if keep_v else None, p)
    return spikes, v_end


@lif.register_fake
def _(current, v0, keep_v, neuron):
    return _like_lif(steps_outermost(current), keep_v)


@operator("respike::lif_backward")
def lif_backward(
    current: Tensor, v0: Tensor | None, grad_spikes: Tensor | None, grad_v_end: Tensor | None, needs_v0: bool,
    neuron: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `current` and, if `needs_v0`, of v0."""
    current = steps_outermost(current)
    grad_current, grad_v0 = _like_lif(current, needs_v0)
    if grad_spikes is not None:
        grad_spikes = laid_out_as(grad_spikes, current)
    triton_lif.launch_backward(
        current, _state(v0, current), grad_spikes, _state(grad_v_end, current),
        grad_current, grad_v0 if needs_v0 else None, LIFParameters.from_text(neuron),
    )  # fmt: skip
    return grad_current, grad_v0


@lif_backward.register_fake
def _(current, v0, grad_spikes, grad_v_end, needs_v0, neuron):
    return _like_lif(steps_outermost(current), needs_v0)


def _lif_context(ctx, inputs, output) -> None:
    current, v0, ctx.keep_v, ctx.neuron = inputs
    ctx.save_for_backward(current, v0)
    ctx.set_materialize_grads(False)


def _lif_gradient(ctx, grad_spikes, grad_v_end):
    current, v0 = ctx.saved_tensors
    if not ctx.keep_v:
        grad_v_end = None
    if grad_spikes is None and grad_v_end is None:
        return None, None, None, None
    needs_v0 = v0 is not None and ctx.needs_input_grad[1]
    grad_current, grad_v0 = lif_backward(current, v0, grad_spikes, grad_v_end, needs_v0, ctx.neuron)
    return grad_current, grad_v0.to(v0.dtype) if needs_v0 else None, None, None


lif.register_autograd(_lif_gradient, setup_context=_lif_context)

# ---- batch norm, with a residual and a LIF layer behind it


@operator("respike::moments")
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [S, C] of each step and channel of x [S, N, C, ...], in float32 (or float64).
    Not differentiable: `batch_norm` takes their part in the gradient into account."""
    return triton_batch_norm.launch_moments(channels_known(x), membrane_dtype(x.dtype))


@operator("respike::moments_and_running", mutates=("running_mean", "running_var", "batches"))
def moments_and_running(
    x: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`moments`, and an update of running_mean and running_var [C] once a step, in turn, with `momentum`; S is added to
    batches []. Of running statistics [S, C] each step updates its own, and 1 is added."""
    running = (running_mean, running_var, batches, momentum)
    return triton_batch_norm.launch_moments(channels_known(x), membrane_dtype(x.dtype), *running)


def _like_moments(x, *running):
    mean = x.new_empty(x.shape[0], x.shape[2], dtype=membrane_dtype(x.dtype))
    return mean, torch.empty_like(mean)


moments.register_fake(_like_moments)
moments_and_running.register_fake(_like_moments)


@operator("respike::batch_norm")
def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None,
    count: Tensor | None, eps: float, of_batch: bool, keep_sum: bool, fire: bool, relu: bool, pool: bool, neuron: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum, spikes) of x [S, N, C, ...]:

        sum = (x - mean) / sqrt(variance + eps) weight + bias + residual;  spikes = LIF(sum)

    mean, variance [S or 1, C]: of each step, or of all. of_batch: they are x's own, so that the gradient goes through
    them too; count: the float64 number of rows they are of, over all processes of the default group, whose batch they
    then are; None: this process's. keep_sum, fire: which of the outputs are wanted; S is at most 32 where `fire`.
    relu: the sum's ReLU is returned for it. pool: the sum is averaged over 2x2 pixels, for x [S, N, C, H, W] with H and
    W even; the neurons take it as it is. Raises ValueError for a residual before neurons without `keep_sum` or with
    `pool`, because the backward pass reads the sum; and for `relu` with neurons or `pool`.
    """
    if residual is not None and (pool or (fire and not keep_sum)):
        raise ValueError("neurons behind a residual need keep_sum, and not pool: the backward pass reads the sum")
    if relu and (fire or pool):
        raise ValueError("relu goes with neither neurons nor pool")
    x = channels_known(x)
    total, spikes = _like_batch_norm(x, keep_sum, fire, pool)
    if x.numel():
        triton_batch_norm.launch_forward(
            x, mean.contiguous(), variance.contiguous(), weight, bias,
            None if residual is None else laid_out_as(residual, x),
            total if keep_sum else None, spikes if fire else None, eps, relu, pool, LIFParameters.from_text(neuron),
        )  # fmt: skip
    return total, spikes


@batch_norm.register_fake
def _(x, mean, variance, weight, bias, residual, count, eps, of_batch, keep_sum, fire, relu, pool, neuron):
    return _like_batch_norm(channels_known(x), keep_sum, fire, pool)


@operator("respike::batch_norm_backward_sums")
def batch_norm_backward_sums(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, total: Tensor | None,
    grad_total: Tensor | None, grad_spikes: Tensor | None, eps: float, fire: bool, relu: bool, pool: bool, neuron: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(weight times the sums over rows of dy and of dy (x - mean) [S, 2, C], gradients of weight and bias, dy). dy is
    the gradient of the result of batch norm. It is written if `total`, the forward pass's result, is given."""
    x = channels_known(x)
    outputs = _like_backward_sums(x, weight, bias, total is not None)
    weighted, grad_weight, grad_bias, grad_y = outputs
    if x.numel():
        triton_batch_norm.launch_backward_sums(
            x, mean.contiguous(), variance.contiguous(), weight, bias, total,
            _of_sum(grad_total, x, pool), _alike(grad_spikes, x),
            weighted, grad_weight, grad_bias, grad_y if total is not None else None,
            eps, fire, relu, pool, LIFParameters.from_text(neuron),
        )  # fmt: skip
    else:
        for sums in (weighted, grad_weight, grad_bias):
            sums.zero_()
    return outputs


@batch_norm_backward_sums.register_fake
def _(x, mean, variance, weight, bias, total, *more):
    return _like_backward_sums(channels_known(x), weight, bias, total is not None)


@operator("respike::batch_norm_backward_input")
def batch_norm_backward_input(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor,
    grad_total: Tensor | None, grad_spikes: Tensor | None, weighted: Tensor | None, count: Tensor | None,
    eps: float, fire: bool, relu: bool, pool: bool, neuron: str,
) -> Tensor:  # fmt: skip
    """The gradient of x. weighted [S or 1, 2, C]: the sums of all that has its statistics in common; None: these are no
    function of x. count: as for `batch_norm`."""
    x = channels_known(x)
    grad_x = torch.empty_like(x)
    if x.numel():
        triton_batch_norm.launch_backward_input(
            x, mean.contiguous(), variance.contiguous(), weight, bias,
            _of_sum(grad_total, x, pool), _alike(grad_spikes, x),
            None if weighted is None else weighted.contiguous(), count, grad_x,
            eps, fire, relu, pool, LIFParameters.from_text(neuron),
        )  # fmt: skip
    return grad_x


@batch_norm_backward_input.register_fake
def _(x, *more):
    return torch.empty_like(channels_known(x))


def _batch_norm_context(ctx, inputs, output) -> None:
    x, mean, variance, weight, bias, residual, count = inputs[:7]
    ctx.eps, ctx.of_batch, ctx.keep_sum, ctx.fire, ctx.relu, ctx.pool, ctx.neuron = inputs[7:]
    # What neurons saw, and what ReLU made of a sum with a residual: the caller keeps it anyway if it asked for it. Else
    # it is computed again from x.
    keeps = ctx.keep_sum and ((ctx.fire and not ctx.pool) or (ctx.relu and residual is not None))
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, mean, variance, weight, bias, count, output[0] if keeps else None)
    ctx.set_materialize_grads(False)


def _batch_norm_gradient(ctx, grad_total, grad_spikes):
    x, mean, variance, weight, bias, count, total = ctx.saved_tensors
    if not ctx.keep_sum:  # an empty output; whatever is done with it, its gradient is no gradient of x
        grad_total = None
    fire, relu = ctx.fire and grad_spikes is not None, ctx.relu
    if grad_total is None and not fire:
        return (None,) * 14
    total = total if fire or relu else None
    through = (grad_total, grad_spikes if fire else None)
    layer = (x, mean, variance, weight, bias)
    weighted, grad_weight, grad_bias, grad_y = batch_norm_backward_sums(
        *layer, total, *through, ctx.eps, fire, relu, ctx.pool, ctx.neuron
    )
    if total is not None:  # dy lies in memory: what remains is a plain batch norm
        through, fire, relu = (grad_y, None), False, False
    if not ctx.of_batch:
        weighted = None
    else:
        if mean.shape[0] == 1 and weighted.shape[0] > 1:
            weighted = weighted.sum(0, keepdim=True)
        if count is not None:
            weighted = collectives.wait_tensor(collectives.all_reduce(weighted, "sum", dist.group.WORLD))
    grad_x = batch_norm_backward_input(*layer, *through, weighted, count, ctx.eps, fire, relu, ctx.pool, ctx.neuron)
    grad_residual = None if ctx.residual_dtype is None else through[0].to(ctx.residual_dtype)
    return grad_x, None, None, grad_weight, grad_bias, grad_residual, *(None,) * 8


batch_norm.register_autograd(_batch_norm_gradient, setup_context=_batch_norm_context)

# ---- shapes and layouts, for real tensors and fake ones alike


def _state(v: Tensor | None, x: Tensor) -> Tensor | None:
    """A membrane laid out as one step of x, in the type that the kernels keep it in."""
    return None if v is None else laid_out_as(v, x[0], membrane_dtype(x.dtype))


def _alike(gradient: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gradient is None else laid_out_as(gradient, x)


def _of_sum(gradient: Tensor | None, x: Tensor, pool: bool) -> Tensor | None:
    """The gradient of the sum, laid out as the sum."""
    if gradient is None or not pool:
        return _alike(gradient, x)
    if is_channels_last(x):
        return gradient.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return gradient.contiguous()


def _pooled(x: Tensor) -> Tensor:
    """Empty, one for every 2x2 pixels of x, laid out as x."""
    if x.dim() != 5 or x.shape[3] % 2 or x.shape[4] % 2:
        raise ValueError(f"pooling needs [S, N, C, H, W] with H and W even, got {list(x.shape)}")
    steps, n, channels, height, width = x.shape
    if is_channels_last(x):
        return x.new_empty(steps, n, height // 2, width // 2, channels).permute(0, 1, 4, 2, 3)
    return x.new_empty(steps, n, channels, height // 2, width // 2)


def _like_lif(current: Tensor, with_v: bool) -> tuple[Tensor, Tensor]:
    """Spikes and a membrane, or the gradients of a current and of a membrane."""
    dtype = membrane_dtype(current.dtype)
    v = torch.empty_like(current[0], dtype=dtype) if with_v else current.new_empty(0, dtype=dtype)
    return torch.empty_like(current), v


def _like_batch_norm(x: Tensor, keep_sum: bool, fire: bool, pool: bool) -> tuple[Tensor, Tensor]:
    return (
        (_pooled(x) if pool else torch.empty_like(x)) if keep_sum else x.new_empty(0),
        torch.empty_like(x) if fire else x.new_empty(0),
    )


def _like_backward_sums(x: Tensor, weight: Tensor, bias: Tensor, keeps_grad: bool) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape[0], 2, x.shape[2], dtype=membrane_dtype(x.dtype)),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(x) if keeps_grad else x.new_empty(0),
    )
