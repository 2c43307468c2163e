"""Triton kernels of the LIF layer, forward and backward.

Each program takes a block of neurons through all time steps with the membrane in registers. The forward
pass reads the current and writes spikes; the backward pass reads the current again, recomputes the
membrane from it with the forward pass's very operations, and walks back. In bfloat16 that is 4 and 6
bytes a neuron and step.
"""

import torch
from torch import Tensor

from models.kernels.parameters import LIFParameters
from models.kernels.surrogates import surrogate_derivative_triton
from utils.triton_language import cdiv, tl, triton

MAX_STEPS = 32  # the membrane of every step is kept in registers; longer sequences are cut by the caller

# ---- one step, shared with the fused kernels. Multiply and add are one rounding, explicitly: the compiler
# must not choose differently in the forward and in the backward kernel, or their spikes would differ.


@triton.jit
def constant(like, VALUE: tl.constexpr):
    """VALUE in the type of `like`: a bare number would be float32 among float64."""
    return tl.full(like.shape, VALUE, like.dtype)


@triton.jit
def charge(x, v, TAU: tl.constexpr):
    return tl.fma(x - v, constant(v, 1.0 / TAU), v)


@triton.jit
def fire(h, V_THRESHOLD: tl.constexpr):
    return tl.where(h >= V_THRESHOLD, 1.0, 0.0)


@triton.jit
def reset(h, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr):
    if V_RESET is None:
        return tl.where(h >= V_THRESHOLD, h - V_THRESHOLD, h)
    else:
        return tl.where(h >= V_THRESHOLD, constant(h, V_RESET), h)


@triton.jit
def charge_gradient(
    h, grad_spike, grad_v,
    V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
):  # fmt: skip
    """dL/dh of a step from the gradients of its spike and of the membrane after it."""
    if V_RESET is None:
        if not DETACH_RESET:
            grad_spike = grad_spike - grad_v * V_THRESHOLD
        through_reset = grad_v
    else:
        if not DETACH_RESET:
            grad_spike = grad_spike + grad_v * (V_RESET - h)
        through_reset = tl.where(h >= V_THRESHOLD, 0.0, grad_v)
    return tl.fma(surrogate_derivative_triton(h - V_THRESHOLD, SURROGATE, ALPHA), grad_spike, through_reset)


@triton.jit
def elements_before(t, step_elements):
    """Elements of the steps before step t: more than 2^31 in a large layer."""
    return tl.full((), t, tl.int64) * step_elements


# ---- the layer alone


@triton.jit
def _begin(v0_ptr, neurons, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """(numbers of a program's neurons, mask, their membranes before the first step)"""
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = neuron < neurons
    v = tl.zeros([BLOCK], COMPUTE)
    if v0_ptr is not None:
        v = tl.load(v0_ptr + neuron, mask, 0.0)
    return neuron, mask, v


@triton.jit
def _forward_kernel(
    x_ptr, v0_ptr, spike_ptr, v_end_ptr, neurons,
    STEPS: tl.constexpr, TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    neuron, mask, v = _begin(v0_ptr, neurons, COMPUTE, BLOCK)
    x = tl.load(x_ptr + neuron, mask, 0.0)
    for t in tl.static_range(STEPS):
        h = charge(x.to(COMPUTE), v, TAU)
        if t + 1 < STEPS:  # before the store: the compiler moves no load past a store
            x = tl.load(x_ptr + elements_before(t + 1, neurons) + neuron, mask, 0.0)
        at = elements_before(t, neurons) + neuron
        tl.store(spike_ptr + at, fire(h, V_THRESHOLD).to(spike_ptr.dtype.element_ty), mask)
        v = reset(h, V_THRESHOLD, V_RESET)
    if v_end_ptr is not None:
        tl.store(v_end_ptr + neuron, v, mask)


@triton.jit
def _backward_kernel(
    x_ptr, v0_ptr, grad_spike_ptr, grad_v_end_ptr, grad_x_ptr, grad_v0_ptr, neurons,
    STEPS: tl.constexpr, TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    neuron, mask, v = _begin(v0_ptr, neurons, COMPUTE, BLOCK)
    charged = ()
    for t in tl.static_range(STEPS):
        x = tl.load(x_ptr + elements_before(t, neurons) + neuron, mask, 0.0).to(COMPUTE)
        h = charge(x, v, TAU)
        charged = charged + (h,)
        v = reset(h, V_THRESHOLD, V_RESET)

    grad_v = tl.zeros([BLOCK], COMPUTE)
    if grad_v_end_ptr is not None:
        grad_v = tl.load(grad_v_end_ptr + neuron, mask, 0.0)
    grad_spike = tl.zeros([BLOCK], COMPUTE)
    if grad_spike_ptr is not None:
        grad_spike = tl.load(grad_spike_ptr + elements_before(STEPS - 1, neurons) + neuron, mask, 0.0).to(COMPUTE)
    for back in tl.static_range(STEPS):
        at = elements_before(STEPS - 1 - back, neurons) + neuron
        grad_h = charge_gradient(
            charged[STEPS - 1 - back], grad_spike, grad_v, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET
        )
        if grad_spike_ptr is not None and back + 1 < STEPS:
            before = elements_before(STEPS - 2 - back, neurons) + neuron
            grad_spike = tl.load(grad_spike_ptr + before, mask, 0.0).to(COMPUTE)
        tl.store(grad_x_ptr + at, (grad_h * (1.0 / TAU)).to(grad_x_ptr.dtype.element_ty), mask)
        grad_v = grad_h * (1.0 - 1.0 / TAU)
    if grad_v0_ptr is not None:
        tl.store(grad_v0_ptr + neuron, grad_v, mask)


# ---- launches. Tensors are dense and lie alike in memory, steps outermost (`models.kernels.layout`).


def compute_type(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def launch_forward(x: Tensor, v0: Tensor | None, spikes: Tensor, v_end: Tensor | None, p: LIFParameters) -> None:
    """x, spikes [S, ...] with S up to MAX_STEPS; v0, v_end [...] in `membrane_dtype`."""
    neurons = x[0].numel()
    if neurons:
        block = 1024
        with torch.cuda.device_of(x):
            _forward_kernel[(cdiv(neurons, block),)](
                x, v0, spikes, v_end, neurons, STEPS=x.shape[0], TAU=p.tau,
                V_THRESHOLD=p.v_threshold, V_RESET=p.v_reset,
                COMPUTE=compute_type(x.dtype), BLOCK=block, num_warps=4,
            )  # fmt: skip


def launch_backward(
    x: Tensor, v0: Tensor | None, grad_spikes: Tensor | None, grad_v_end: Tensor | None,
    grad_x: Tensor, grad_v0: Tensor | None, p: LIFParameters,
) -> None:  # fmt: skip
    steps, neurons = x.shape[0], x[0].numel()
    if neurons:
        # Registers hold the membrane of all steps: 8 neurons a thread (16 bytes a load) for few, 2 for many.
        block = 1024 if steps <= 8 else 512 if steps <= 16 else 256
        with torch.cuda.device_of(x):
            _backward_kernel[(cdiv(neurons, block),)](
                x, v0, grad_spikes, grad_v_end, grad_x, grad_v0, neurons, STEPS=steps, TAU=p.tau,
                V_THRESHOLD=p.v_threshold, V_RESET=p.v_reset, SURROGATE=p.surrogate, ALPHA=p.alpha,
                DETACH_RESET=p.detach_reset, COMPUTE=compute_type(x.dtype), BLOCK=block, num_warps=4,
            )  # fmt: skip
