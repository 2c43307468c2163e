"""The definition of the LIF layer in plain PyTorch, for any floating-point type and device.

`lif_definition` is the equations, step by step, differentiated by autograd: the oracle every other
implementation is tested against. `lif_reference` computes the same in less time and memory: autograd
keeps only the layer's input, and the backward pass recomputes the membrane from it with the same
operations, so its decisions are the forward pass's bit for bit.
"""

import torch
from torch import Tensor

from models.kernels.layout import memory_order
from models.kernels.parameters import LIFParameters, membrane_dtype
from models.kernels.surrogates import surrogate_derivative


class _Spike(torch.autograd.Function):
    """Heaviside step of z = h - v_threshold forward, the surrogate's derivative backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, surrogate: str, alpha: float) -> Tensor:
        return (z >= 0).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        z, ctx.surrogate, ctx.alpha = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (z,) = ctx.saved_tensors
        return grad * surrogate_derivative(z, ctx.surrogate, ctx.alpha), None, None


def lif_definition(
    current: Tensor, p: LIFParameters, v0: Tensor | None = None, spike=_Spike.apply
) -> tuple[Tensor, Tensor]:
    """`LIFParameters`' equations, one line each; shapes as `models.neurons.lif`.

    `spike(z, surrogate, alpha)` can be replaced by a smooth function to check the gradients of all
    the rest numerically.
    """
    x_all = current.to(membrane_dtype(current.dtype))
    v = torch.zeros_like(x_all[0]) if v0 is None else v0.to(x_all.dtype)
    spikes = []
    for x in x_all:
        h = v + (x - v) / p.tau
        s = spike(h - p.v_threshold, p.surrogate, p.alpha)
        reset = s.detach() if p.detach_reset else s
        if p.v_reset is None:
            v = h - p.v_threshold * reset
        else:
            v = h * (1.0 - reset) + p.v_reset * reset
        spikes.append(s)
    return torch.stack(spikes).to(current.dtype), v


def batch_norm_definition(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, merged: bool
) -> Tensor:
    """Batch norm (arXiv 1502.03167) of x [S, N, C, ...] with its own statistics, of each step or, `merged`,
    of all, plus the residual; in float32 for half precision, rounded to x's type at the end."""
    values = x.to(membrane_dtype(x.dtype))
    over = (0, 1, *range(3, x.dim())) if merged else (1, *range(3, x.dim()))
    mean = values.mean(over, keepdim=True)
    variance = (values - mean).square().mean(over, keepdim=True)
    shape = (1, 1, -1, *(1 for _ in range(3, x.dim())))
    y = (values - mean) / torch.sqrt(variance + eps) * weight.view(shape) + bias.view(shape)
    return (y if residual is None else y + residual).to(x.dtype)


def lif_reference(current: Tensor, p: LIFParameters, v0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same numbers as `lif_definition`; saves only `current` (and v0) for the backward pass."""
    if torch.compiler.is_compiling() or in_transform():
        return lif_definition(current, p, v0)  # the compiler fuses plain operations better than ours
    return _LIF.apply(current, v0, p)


def in_transform() -> bool:
    """Whether torch.func.grad, vmap or another of its transforms is at work here. They take plain operations only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# Neurons handled at a time on a CPU, so that the dozen passes over a step stay in its cache.
_CPU_CHUNK_NEURONS = 1 << 18


def _rows(x: Tensor, order: list[int]) -> Tensor:
    """[S, ...] -> [S, neurons], neurons in the given order: a view where memory allows, else a copy."""
    return x.permute(0, *order).reshape(x.shape[0], -1)


class _Membrane:
    """The charge and reset of one chunk of neurons, in place, in the membrane's type.

    Comparisons write 0 and 1 as numbers and the reset multiplies by them: PyTorch vectorises that,
    and does not vectorise masks (six times slower on a CPU).
    """

    def __init__(self, like: Tensor, p):
        self.p = p
        self.h = torch.empty_like(like)
        self.v = torch.empty_like(like)
        self.spike = torch.empty_like(like)

    def charge(self, x: Tensor, v: Tensor | None) -> Tensor:
        """h = v + (x - v) / tau, and the spikes; v None stands for zero. Returns h."""
        if v is None:
            self.h.copy_(x).div_(self.p.tau)
        else:
            torch.sub(x, v, out=self.h).div_(self.p.tau).add_(v)
        torch.ge(self.h, self.p.v_threshold, out=self.spike)
        return self.h

    def reset(self) -> Tensor:
        """v after the step. Returns v."""
        p = self.p
        if p.v_reset is None:
            return torch.sub(self.h, self.spike, alpha=p.v_threshold, out=self.v)
        torch.lt(self.h, p.v_threshold, out=self.v).mul_(self.h)
        return self.v.add_(self.spike, alpha=p.v_reset) if p.v_reset else self.v


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current: Tensor, v0: Tensor | None, p) -> tuple[Tensor, Tensor]:
        ctx.p = p
        ctx.set_materialize_grads(False)
        order = memory_order(current)
        dense = current.permute(0, *order)
        if not dense[0].is_contiguous():
            current = current.contiguous()
            order = memory_order(current)
        ctx.save_for_backward(current, v0)
        dtype = membrane_dtype(current.dtype)
        spikes = torch.empty_like(current)
        v_end = torch.empty_like(current[0], dtype=dtype)

        x_rows, spike_rows = _rows(current, order), _rows(spikes, order)
        v_rows = _rows(v_end[None], order)[0]
        v0_rows = None if v0 is None else _rows(v0[None], order)[0].to(dtype)
        for chunk in _chunks(x_rows):
            v = None if v0_rows is None else v0_rows[chunk]
            membrane = _Membrane(v_rows[chunk], p)
            for x, spike in zip(x_rows[:, chunk], spike_rows[:, chunk], strict=True):
                membrane.charge(x, v)
                spike.copy_(membrane.spike)
                v = membrane.reset()
            v_rows[chunk].copy_(v)
        return spikes, v_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_spikes: Tensor | None, grad_v: Tensor | None):
        current, v0 = ctx.saved_tensors
        dtype = membrane_dtype(current.dtype)
        order = memory_order(current)
        grad_current = torch.empty_like(current)
        grad_v0 = None if v0 is None else torch.empty_like(current[0], dtype=dtype)
        if grad_spikes is None:
            grad_spikes = torch.zeros((), dtype=dtype, device=current.device).expand_as(current)

        x_rows, grad_x_rows = _rows(current, order), _rows(grad_current, order)
        grad_s_rows = _rows(grad_spikes, order)
        v0_rows = None if v0 is None else _rows(v0[None], order)[0].to(dtype)
        grad_v_rows = None if grad_v is None else _rows(grad_v[None], order)[0]
        grad_v0_rows = None if v0 is None else _rows(grad_v0[None], order)[0]
        for chunk in _chunks(x_rows):
            grad = _backward_chunk(
                x_rows[:, chunk],
                None if v0_rows is None else v0_rows[chunk],
                grad_s_rows[:, chunk],
                None if grad_v_rows is None else grad_v_rows[chunk].to(dtype),
                grad_x_rows[:, chunk],
                ctx.p,
            )
            if grad_v0_rows is not None:
                grad_v0_rows[chunk].copy_(grad)
        return grad_current, None if v0 is None else grad_v0.to(v0.dtype), None


def _chunks(rows: Tensor) -> list[slice]:
    neurons = rows.shape[1]
    size = _CPU_CHUNK_NEURONS if rows.device.type == "cpu" else max(neurons, 1)
    return [slice(start, start + size) for start in range(0, neurons, size)]


def _backward_chunk(x: Tensor, v0: Tensor | None, grad_s: Tensor, grad_v: Tensor | None, grad_x: Tensor, p) -> Tensor:
    """Backward through time over one chunk, [S, neurons] each; fills grad_x, returns dL/dv0."""
    # Forward again, with the forward pass's own operations, keeping h of every step.
    membrane = _Membrane(torch.empty_like(x[0], dtype=membrane_dtype(x.dtype)), p)
    v, charged = v0, []
    for step in range(x.shape[0]):
        charged.append(membrane.charge(x[step], v).clone())
        v = membrane.reset()

    leak = 1.0 - 1.0 / p.tau  # dh_t / dv_{t-1}
    for step in reversed(range(x.shape[0])):
        h = charged.pop()
        grad_spike = grad_s[step]
        grad_from_reset = None
        if grad_v is not None:
            grad_from_reset = grad_v
            if not p.detach_reset:
                # soft: dv/ds = -v_threshold; hard: dv/ds = v_reset - h
                dv_ds = -p.v_threshold if p.v_reset is None else p.v_reset - h
                grad_spike = grad_spike + grad_v * dv_ds
            if p.v_reset is not None:
                grad_from_reset = torch.lt(h, p.v_threshold, out=torch.empty_like(h)).mul_(grad_v)
        grad_h = surrogate_derivative(h.sub_(p.v_threshold), p.surrogate, p.alpha).mul_(grad_spike)
        if grad_from_reset is not None:
            grad_h.add_(grad_from_reset)
        torch.mul(grad_h, 1.0 / p.tau, out=grad_x[step])
        grad_v = grad_h.mul_(leak)
    return grad_v
