"""Triton kernels of batch norm with what follows it in one pass: adding a residual, and a LIF layer or ReLU.

Tensors are [S, N, C, ...], contiguous or channels-last; each step has its own mean and variance, or all share
one of each. A program takes a tile of rows (n and pixel) times channels through all steps. In bfloat16, a neuron
and step costs, with the statistics' own pass over x:

    batch norm + LIF                     6 bytes forward, 10 backward
    batch norm + residual + LIF          10 bytes forward, 16 backward
    batch norm + LIF, sum averaged 2x2   6.5 bytes forward, 11 backward
    batch norm + ReLU                    6 bytes forward, 10 backward
    batch norm + residual + ReLU         8 bytes forward, 14 backward
"""

import functools

import torch
from torch import Tensor

from models.kernels.layout import is_channels_last
from models.kernels.parameters import LIFParameters
from models.kernels.triton_lif import (
    MAX_STEPS,
    charge,
    charge_gradient,
    compute_type,
    constant,
    elements_before,
    fire,
    reset,
)
from utils.triton_language import cdiv, next_power_of_2, tl, triton

# ---- kernels


@triton.jit
def _tile(
    first_row, rows, channels, inner, width,
    CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(elements before each of a tile within a step, column numbers [1, COLUMNS], mask). With POOL four rows in
    turn are the 2x2 pixels of a window."""
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < channels)
    if POOL:
        window, part = row // 4, row % 4
        line, place = window // (width // 2), window % (width // 2)
        row = (2 * line + part // 2) * width + 2 * place + part % 2
    return _place(row, column, channels, inner, CHANNELS_LAST), column, mask


@triton.jit
def _place(row, column, channels, inner, CHANNELS_LAST: tl.constexpr):
    """Elements before those of a row (n and pixel, `inner` pixels an n) and column within a step."""
    if CHANNELS_LAST:
        return row * channels + column
    else:
        return (row // inner) * channels * inner + column.to(tl.int64) * inner + row % inner


@triton.jit
def _moments_kernel(
    x_ptr, mean_ptr, square_ptr, rows, channels, inner, step_elements, tiles,
    CHANNELS_LAST: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared deviations from it, of some tiles of one step (Welford in every lane,
    then Chan et al. over lanes): no cancellation however far the mean is from zero."""
    step = tl.program_id(2)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    end = tl.minimum(first + tiles * ROWS, rows)
    of_step = x_ptr + step.to(tl.int64) * step_elements
    mean = tl.zeros([ROWS, COLUMNS], COMPUTE)
    square = tl.zeros([ROWS, COLUMNS], COMPUTE)
    count = tl.zeros([ROWS, 1], COMPUTE)
    at, column, mask = _tile(first, end, channels, inner, 0, CHANNELS_LAST, False, ROWS, COLUMNS)
    loaded = tl.load(of_step + at, mask, 0.0)
    for tile in range(tiles):
        x = loaded.to(COMPUTE)
        here = mask
        # The next tile is on its way while this one is counted.
        at, column, mask = _tile(
            first + (tile + 1) * ROWS, end, channels, inner, 0, CHANNELS_LAST, False, ROWS, COLUMNS
        )  # fmt: skip
        loaded = tl.load(of_step + at, mask, 0.0)
        away = tl.where(here, x - mean, 0.0)
        count += (first + tile * ROWS + tl.arange(0, ROWS)[:, None] < rows).to(COMPUTE)
        mean += away * (1.0 / tl.maximum(count, 1.0))
        square = tl.fma(away, x - mean, square)
    total = tl.sum(count, 0)  # [1]
    together = tl.sum(mean * count, 0) / total  # [COLUMNS]
    away = mean - together[None, :]
    square = tl.sum(square + count * away * away, 0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out = (tl.program_id(0) * tl.num_programs(2) + step) * channels + column
    tl.store(mean_ptr + out, together, column < channels)
    tl.store(square_ptr + out, square, column < channels)


@triton.jit
def _statistics_kernel(
    means_ptr, squares_ptr, mean_ptr, variance_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    programs, steps, channels, rows, rows_each, momentum,
    OF_EACH_STEP: tl.constexpr, COMPUTE: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the programs of the moments kernel found, `rows_each` rows each but the last, as mean and biased variance
    of each step; and the running statistics: one update a step, or one update of the step's own (OF_EACH_STEP)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = column < channels
    if running_mean_ptr is not None:
        running_mean = tl.load(running_mean_ptr + column, is_channel, 0.0).to(COMPUTE)
        running_var = tl.load(running_var_ptr + column, is_channel, 0.0).to(COMPUTE)
    for step in range(steps):
        mean = tl.zeros([COLUMNS], COMPUTE)
        for first in range(0, programs, PROGRAMS):
            program, at, mask = _partials(first, programs, step, steps, channels, column, channels, PROGRAMS)
            share = _rows_of(program, rows, rows_each).to(COMPUTE)
            mean += tl.sum(tl.load(means_ptr + at, mask, 0.0) * share, 0)
        mean = mean / rows
        square = tl.zeros([COLUMNS], COMPUTE)
        for first in range(0, programs, PROGRAMS):
            program, at, mask = _partials(first, programs, step, steps, channels, column, channels, PROGRAMS)
            share = _rows_of(program, rows, rows_each).to(COMPUTE)
            away = tl.load(means_ptr + at, mask, 0.0) - mean[None, :]
            square += tl.sum(tl.where(mask, tl.load(squares_ptr + at, mask, 0.0) + share * away * away, 0.0), 0)
        variance = square / rows
        tl.store(mean_ptr + step * channels + column, mean, is_channel)
        tl.store(variance_ptr + step * channels + column, variance, is_channel)
        if running_mean_ptr is not None:
            own = step * channels + column
            if OF_EACH_STEP:
                running_mean = tl.load(running_mean_ptr + own, is_channel, 0.0).to(COMPUTE)
                running_var = tl.load(running_var_ptr + own, is_channel, 0.0).to(COMPUTE)
            running_mean += momentum * (mean - running_mean)
            running_var += momentum * (square / (rows - 1) - running_var)
            if OF_EACH_STEP:
                tl.store(running_mean_ptr + own, running_mean.to(running_mean_ptr.dtype.element_ty), is_channel)
                tl.store(running_var_ptr + own, running_var.to(running_var_ptr.dtype.element_ty), is_channel)
    if running_mean_ptr is not None:
        if not OF_EACH_STEP:
            tl.store(running_mean_ptr + column, running_mean.to(running_mean_ptr.dtype.element_ty), is_channel)
            tl.store(running_var_ptr + column, running_var.to(running_var_ptr.dtype.element_ty), is_channel)
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + (1 if OF_EACH_STEP else steps))


@triton.jit
def _partials(first, programs, step, steps, width, column, channels, PROGRAMS: tl.constexpr):
    """(program numbers [PROGRAMS, 1], elements before what they found of a step, `width` numbers each, mask)"""
    program = first + tl.arange(0, PROGRAMS)[:, None]
    at = (program * steps + step) * width + column[None, :]
    return program, at, (program < programs) & (column[None, :] < channels)


@triton.jit
def _rows_of(program, rows, rows_each):
    return tl.minimum(rows_each, tl.maximum(rows - program * rows_each, 0))


@triton.jit
def _together_kernel(
    partial_ptr, variance_ptr, weight_ptr, weighted_ptr, grad_weight_ptr, grad_bias_ptr,
    programs, steps, channels, statistics_step,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the programs of the backward sums found: weight times the sums of each step, and the gradients of weight and
    bias."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = column < channels
    weight = tl.load(weight_ptr + column, is_channel, 0.0).to(COMPUTE)
    grad_weight = tl.zeros([COLUMNS], COMPUTE)
    grad_bias = tl.zeros([COLUMNS], COMPUTE)
    for step in range(steps):
        plain = tl.zeros([COLUMNS], COMPUTE)
        centred = tl.zeros([COLUMNS], COMPUTE)
        for first in range(0, programs, PROGRAMS):
            _program, at, mask = _partials(first, programs, step, steps, 2 * channels, column, channels, PROGRAMS)
            plain += tl.sum(tl.load(partial_ptr + at, mask, 0.0), 0)
            centred += tl.sum(tl.load(partial_ptr + at + channels, mask, 0.0), 0)
        tl.store(weighted_ptr + step * 2 * channels + column, weight * plain, is_channel)
        tl.store(weighted_ptr + step * 2 * channels + channels + column, weight * centred, is_channel)
        variance = tl.load(variance_ptr + step * statistics_step + column, is_channel, 0.0).to(COMPUTE)
        grad_weight = tl.fma(centred, tl.rsqrt(variance + constant(variance, EPS)), grad_weight)
        grad_bias += plain
    tl.store(grad_weight_ptr + column, grad_weight.to(grad_weight_ptr.dtype.element_ty), is_channel)
    tl.store(grad_bias_ptr + column, grad_bias.to(grad_bias_ptr.dtype.element_ty), is_channel)


@triton.jit
def _statistics(mean_ptr, variance_ptr, column, is_channel, of_step, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """(mean, 1 / standard deviation)"""
    mean = tl.load(mean_ptr + of_step + column, is_channel, 0.0).to(COMPUTE)
    variance = tl.load(variance_ptr + of_step + column, is_channel, 0.0).to(COMPUTE)
    return mean, tl.rsqrt(variance + constant(variance, EPS))


@triton.jit
def _normalise(
    x, mean_ptr, variance_ptr, weight, bias, column, is_channel, of_step, EPS: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """(x - mean) / deviation weight + bias: the same operations wherever it is computed."""
    mean, inverse = _statistics(mean_ptr, variance_ptr, column, is_channel, of_step, EPS, COMPUTE)
    return tl.fma(x - mean, inverse * weight, bias)


@triton.jit
def _load_if_any(ptr, at, mask):
    """The mask stands in for what there is not: a tuple holds no None."""
    if ptr is None:
        return mask
    else:
        return tl.load(ptr + at, mask, 0.0)


@triton.jit
def _forward_kernel(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, residual_ptr, sum_ptr, spike_ptr,
    rows, channels, inner, step_elements, width, statistics_step,
    CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr, FIRE: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    STEPS: tl.constexpr, AHEAD: tl.constexpr,
    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    at, column, mask = _tile(first_row, rows, channels, inner, width, CHANNELS_LAST, POOL, ROWS, COLUMNS)
    is_channel = column < channels
    weight = tl.load(weight_ptr + column, is_channel, 0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + column, is_channel, 0.0).to(COMPUTE)
    v = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if POOL and sum_ptr is not None:
        window = first_row // 4 + tl.arange(0, ROWS // 4)[:, None]
        pooled_at = _place(window, column, channels, inner // 4, CHANNELS_LAST)
        is_window = (window < rows // 4) & is_channel
    # Steps are loaded ahead of the stores of earlier ones: the compiler moves no load past a store.
    first_step = tl.program_id(2) * STEPS
    x, added = (), ()
    for ahead in tl.static_range(AHEAD if AHEAD < STEPS else STEPS):
        here = (first_step + ahead).to(tl.int64) * step_elements + at
        x = x + (tl.load(x_ptr + here, mask, 0.0),)
        added = added + (_load_if_any(residual_ptr, here, mask),)
    for inner_step in tl.static_range(STEPS):
        step = first_step + inner_step
        here = step.to(tl.int64) * step_elements + at
        if inner_step + AHEAD < STEPS:
            later = (step + AHEAD).to(tl.int64) * step_elements + at
            x = x + (tl.load(x_ptr + later, mask, 0.0),)
            added = added + (_load_if_any(residual_ptr, later, mask),)
        y = _normalise(
            x[inner_step].to(COMPUTE), mean_ptr, variance_ptr, weight, bias, column, is_channel,
            step * statistics_step, EPS, COMPUTE,
        )  # fmt: skip
        if residual_ptr is not None:
            y += added[inner_step].to(COMPUTE)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
        if sum_ptr is not None:
            if POOL:
                four = tl.sum(tl.reshape(y, [ROWS // 4, 4, COLUMNS]), 1)
                pooled_here = step.to(tl.int64) * ((rows // 4) * channels) + pooled_at
                tl.store(sum_ptr + pooled_here, (four * 0.25).to(sum_ptr.dtype.element_ty), is_window)
            else:
                # The neuron sees what is kept: the backward pass then sees the same.
                rounded = y.to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + here, rounded, mask)
                y = rounded.to(COMPUTE)
        if FIRE:
            h = charge(y, v, TAU)
            tl.store(spike_ptr + here, fire(h, V_THRESHOLD).to(spike_ptr.dtype.element_ty), mask)
            v = reset(h, V_THRESHOLD, V_RESET)


@triton.jit
def _backward_sums_kernel(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sum_ptr, grad_sum_ptr, grad_spike_ptr,
    partial_ptr, grad_y_ptr,
    rows, channels, inner, step_elements, width, statistics_step, tiles,
    CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr, FIRE: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    STEPS: tl.constexpr,
    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of dy and dy (x - mean) over some tiles, in every lane first, then over lanes; dy is the gradient of
    batch norm's result. Stores it if sum_ptr, the forward pass's result, is given."""
    sums, centred_sums = (), ()
    for _ in tl.static_range(STEPS):
        sums = sums + (tl.zeros([ROWS, COLUMNS], COMPUTE),)
        centred_sums = centred_sums + (tl.zeros([ROWS, COLUMNS], COMPUTE),)
    for tile in range(tiles):
        first_row = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS
        at, column, mask = _tile(first_row, rows, channels, inner, width, CHANNELS_LAST, POOL, ROWS, COLUMNS)
        pooled_at = _place((first_row + tl.arange(0, ROWS)[:, None]) // 4, column, channels, inner // 4, CHANNELS_LAST)
        is_channel = column < channels
        charged = ()
        grad_v = tl.zeros([ROWS, COLUMNS], COMPUTE)
        if FIRE:
            charged = _charged(
                x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sum_ptr, at, mask, column, is_channel,
                step_elements, statistics_step, EPS, STEPS, TAU, V_THRESHOLD, V_RESET, COMPUTE, ROWS, COLUMNS,
            )  # fmt: skip
        new_sums, new_centred = (), ()
        for back in tl.static_range(STEPS):
            step = tl.program_id(2) * STEPS + (STEPS - 1 - back)
            here = step.to(tl.int64) * step_elements + at
            grad_sum, grad_spike = _gradients(
                step, at, pooled_at, mask, grad_sum_ptr, grad_spike_ptr, rows, channels, step_elements, POOL
            )
            grad_y = tl.zeros([ROWS, COLUMNS], COMPUTE)
            if FIRE:
                into_spike = tl.zeros([ROWS, COLUMNS], COMPUTE)
                if grad_spike_ptr is not None:
                    into_spike = grad_spike.to(COMPUTE)
                grad_h = charge_gradient(
                    charged[STEPS - 1 - back], into_spike, grad_v, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET
                )
                grad_y = grad_h * (1.0 / TAU)
                grad_v = grad_h * (1.0 - 1.0 / TAU)
            if grad_sum_ptr is not None:
                grad_y += grad_sum.to(COMPUTE) * (0.25 if POOL else 1.0)
            x = tl.load(x_ptr + here, mask, 0.0)
            of_step = step * statistics_step
            if RELU:
                grad_y = _through_relu(
                    grad_y, x, sum_ptr, here, mask, mean_ptr, variance_ptr, weight_ptr, bias_ptr, column, is_channel,
                    of_step, EPS, COMPUTE,
                )  # fmt: skip
            mean, _inverse = _statistics(mean_ptr, variance_ptr, column, is_channel, of_step, EPS, COMPUTE)
            centred = x.to(COMPUTE) - mean
            new_sums = new_sums + (sums[back] + grad_y,)
            new_centred = new_centred + (tl.fma(grad_y, centred, centred_sums[back]),)
            if grad_y_ptr is not None:
                tl.store(grad_y_ptr + here, grad_y.to(grad_y_ptr.dtype.element_ty), mask)
        sums, centred_sums = new_sums, new_centred
    own = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for back in tl.static_range(STEPS):
        step = tl.program_id(2) * STEPS + (STEPS - 1 - back)
        out = (tl.program_id(0).to(tl.int64) * (tl.num_programs(2) * STEPS) + step) * 2 * channels
        tl.store(partial_ptr + out + own, tl.sum(sums[back], 0), own < channels)
        tl.store(partial_ptr + out + channels + own, tl.sum(centred_sums[back], 0), own < channels)


@triton.jit
def _backward_input_kernel(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, grad_sum_ptr, grad_spike_ptr,
    weighted_ptr, count_ptr, grad_x_ptr,
    rows, channels, inner, step_elements, width, statistics_step, values,
    CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr, FIRE: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    STEPS: tl.constexpr, AHEAD: tl.constexpr,
    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x = inverse (weight dy - (sum of weight dy + inverse^2 (x - mean) sum of weight dy (x - mean)) / values);
    without the sums, which weighted_ptr has, the first term alone."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    at, column, mask = _tile(first_row, rows, channels, inner, width, CHANNELS_LAST, POOL, ROWS, COLUMNS)
    pooled_at = _place((first_row + tl.arange(0, ROWS)[:, None]) // 4, column, channels, inner // 4, CHANNELS_LAST)
    is_channel = column < channels
    weight = tl.load(weight_ptr + column, is_channel, 0.0).to(COMPUTE)
    charged = ()
    grad_v = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if FIRE:
        charged = _charged(
            x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, None, at, mask, column, is_channel,
            step_elements, statistics_step, EPS, STEPS, TAU, V_THRESHOLD, V_RESET, COMPUTE, ROWS, COLUMNS,
        )  # fmt: skip
    loaded = ()
    for ahead in tl.static_range(AHEAD if AHEAD < STEPS else STEPS):
        step = tl.program_id(2) * STEPS + (STEPS - 1 - ahead)
        loaded = loaded + (
            _gradients(step, at, pooled_at, mask, grad_sum_ptr, grad_spike_ptr, rows, channels, step_elements, POOL),
        )
    for back in tl.static_range(STEPS):
        step = tl.program_id(2) * STEPS + (STEPS - 1 - back)
        here = step.to(tl.int64) * step_elements + at
        if back + AHEAD < STEPS:
            loaded = loaded + (
                _gradients(
                    step - AHEAD, at, pooled_at, mask, grad_sum_ptr, grad_spike_ptr, rows, channels, step_elements, POOL
                ),
            )
        grad_sum, grad_spike = loaded[back]
        grad_y = tl.zeros([ROWS, COLUMNS], COMPUTE)
        if FIRE:
            into_spike = tl.zeros([ROWS, COLUMNS], COMPUTE)
            if grad_spike_ptr is not None:
                into_spike = grad_spike.to(COMPUTE)
            grad_h = charge_gradient(
                charged[STEPS - 1 - back], into_spike, grad_v, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET
            )
            grad_y = grad_h * (1.0 / TAU)
            grad_v = grad_h * (1.0 - 1.0 / TAU)
        if grad_sum_ptr is not None:
            grad_y += grad_sum.to(COMPUTE) * (0.25 if POOL else 1.0)
        x = tl.load(x_ptr + here, mask, 0.0)
        of_step = step * statistics_step
        if RELU:
            grad_y = _through_relu(
                grad_y, x, None, here, mask, mean_ptr, variance_ptr, weight_ptr, bias_ptr, column, is_channel,
                of_step, EPS, COMPUTE,
            )  # fmt: skip
        mean, inverse = _statistics(mean_ptr, variance_ptr, column, is_channel, of_step, EPS, COMPUTE)
        grad_x = (inverse * weight) * grad_y
        if weighted_ptr is not None:
            share = inverse / _values(count_ptr, values, inverse)
            offset = share * tl.load(weighted_ptr + 2 * of_step + column, is_channel, 0.0)
            factor = (
                share * inverse * inverse * tl.load(weighted_ptr + 2 * of_step + channels + column, is_channel, 0.0)
            )
            grad_x -= tl.fma(factor, x.to(COMPUTE) - mean, offset)
        tl.store(grad_x_ptr + here, grad_x.to(grad_x_ptr.dtype.element_ty), mask)


@triton.jit
def _charged(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sum_ptr, at, mask, column, is_channel,
    step_elements, statistics_step, EPS: tl.constexpr,
    STEPS: tl.constexpr, TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h of every step, as the forward kernel computed it."""
    v = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if sum_ptr is None:
        weight = tl.load(weight_ptr + column, is_channel, 0.0).to(COMPUTE)
        bias = tl.load(bias_ptr + column, is_channel, 0.0).to(COMPUTE)
    charged = ()
    for step in tl.static_range(STEPS):
        here = elements_before(step, step_elements) + at
        if sum_ptr is not None:
            y = tl.load(sum_ptr + here, mask, 0.0).to(COMPUTE)
        else:
            x = tl.load(x_ptr + here, mask, 0.0).to(COMPUTE)
            y = _normalise(
                x, mean_ptr, variance_ptr, weight, bias, column, is_channel, step * statistics_step, EPS, COMPUTE
            )  # fmt: skip
        h = charge(y, v, TAU)
        charged = charged + (h,)
        v = reset(h, V_THRESHOLD, V_RESET)
    return charged


@triton.jit
def _through_relu(
    grad_y, x, result_ptr, here, mask, mean_ptr, variance_ptr, weight_ptr, bias_ptr, column, is_channel, of_step,
    EPS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """grad_y where the forward pass's result is above zero. Without a residual the result is computed again from x."""
    if result_ptr is None:
        weight = tl.load(weight_ptr + column, is_channel, 0.0).to(COMPUTE)
        bias = tl.load(bias_ptr + column, is_channel, 0.0).to(COMPUTE)
        y = _normalise(
            x.to(COMPUTE), mean_ptr, variance_ptr, weight, bias, column, is_channel, of_step, EPS, COMPUTE
        )  # fmt: skip
        result = y.to(x.dtype)
    else:
        result = tl.load(result_ptr + here, mask, 0.0)
    return tl.where(result.to(COMPUTE) > 0.0, grad_y, 0.0)


@triton.jit
def _values(count_ptr, values, like):
    """How many values the statistics are of: those of this process, or the number that lies in memory."""
    if count_ptr is None:
        return tl.full(like.shape, values, like.dtype)
    else:
        return tl.load(count_ptr).to(like.dtype)


@triton.jit
def _gradients(
    step, at, pooled_at, mask, grad_sum_ptr, grad_spike_ptr, rows, channels, step_elements, POOL: tl.constexpr
):  # fmt: skip
    """(gradient of the sum, of the spikes) of a step, as they lie in memory."""
    here = step.to(tl.int64) * step_elements + at
    if POOL:
        here_of_sum = step.to(tl.int64) * ((rows // 4) * channels) + pooled_at
    else:
        here_of_sum = here
    return _load_if_any(grad_sum_ptr, here_of_sum, mask), _load_if_any(grad_spike_ptr, here, mask)


# ---- launches. x and all that is as large lie alike in memory; statistics are [S or 1, C] in `membrane_dtype`.


# What `benchmarks.sweep_kernels` varies.
WARPS = 8
AHEAD = 3  # steps that are loaded ahead of stores
# Values a thread, by the steps whose membranes its registers hold: 8 of bfloat16 are 16 bytes a load.
VALUES = {1: 16, 4: 8, 8: 4, MAX_STEPS: 2}
REDUCED_VALUES = {4: 4, 8: 2, MAX_STEPS: 1}  # likewise, where sums of every step are in registers too
# An H100 or H200 has 132 multiprocessors. At 64 registers a thread each holds four programs of 256 threads, at 128 two:
# all programs of a reduction run at once, and none of them is alone at the end.
PROGRAMS_OF_MOMENTS = 4 * 132
PROGRAMS_OF_SUMS = 2 * 132
PARTIALS_AT_ONCE, COLUMNS_TOGETHER = 128, 16  # of the results of a reduction's programs, when they are put together


class _Geometry:
    """Rows, channels and tiles of x [S, N, C, ...], and how programs share them; the same on every machine, so that
    processes agree. Worked out once for each shape, because a launch is due every 100 microseconds.

    values: as VALUES. pool: rows go window by window (2x2 pixels). programs: about so many share all tiles; 0: each
    tile has its own.
    """

    def __init__(self, shape: torch.Size, strides: tuple[int, ...], fires: bool, values: tuple, warps: int, pool: bool,
                 programs: int):  # fmt: skip
        self.steps, self.channels = shape[0], shape[2]
        inner = shape[3:].numel()
        self.rows = shape[1] * inner
        # A kernel of neurons takes all steps at once.
        self.steps_in_kernel, outer = (self.steps, 1) if fires else (1, self.steps)
        channels_last = is_channels_last(torch.empty_strided(shape, strides, device="meta"))
        tile = next(count for steps, count in sorted(values) if self.steps_in_kernel <= steps) * 32 * warps
        if channels_last and self.channels > 1:
            # 64 channels are 128 bytes of a row: whole lines of memory.
            columns = min(next_power_of_2(self.channels), 64 if self.steps_in_kernel <= 4 else 32)
            self.tile_rows = tile // columns
        else:
            columns, self.tile_rows, warps = 1, tile // 2, warps // 2
        row_tiles, column_tiles = cdiv(self.rows, self.tile_rows), cdiv(self.channels, columns)
        self.tiles = 1  # of a program
        if programs:
            self.tiles = cdiv(row_tiles, max(1, min(row_tiles, programs // (column_tiles * outer))))
        self.grid = cdiv(row_tiles, self.tiles), column_tiles, outer
        self.together = (cdiv(self.channels, COLUMNS_TOGETHER),)  # the grid that puts results together
        self.arguments = self.rows, self.channels, inner, self.rows * self.channels
        self.width = shape[-1] if pool else 0
        self.meta = dict(CHANNELS_LAST=channels_last, ROWS=self.tile_rows, COLUMNS=columns, num_warps=warps)


_cached_geometry = functools.lru_cache(maxsize=1024)(_Geometry)  # the layers of a network, a few times


def _geometry(x: Tensor, fires: bool, values: dict[int, int], pool: bool = False, programs: int = 0) -> _Geometry:
    if fires and x.shape[0] > MAX_STEPS:
        raise ValueError(f"the fused kernels take up to {MAX_STEPS} time steps, got {x.shape[0]}")
    return _cached_geometry(x.shape, x.stride(), fires, tuple(values.items()), WARPS, pool, programs)


def launch_moments(
    x: Tensor, dtype: torch.dtype, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    batches: Tensor | None = None, momentum: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mean, biased variance) [S, C] of each step and channel of x [S, N, C, ...]. Updates running_mean and
    running_var [C] once a step, in place, and adds S to batches []; or, if they are [S, C], each step's own once, and
    adds 1. None: there are none."""
    geometry = _geometry(x, False, {1: 8}, programs=PROGRAMS_OF_MOMENTS)
    means = torch.empty(geometry.grid[0], geometry.steps, geometry.channels, dtype=dtype, device=x.device)
    squares = torch.empty_like(means)
    mean = torch.empty(geometry.steps, geometry.channels, dtype=dtype, device=x.device)
    variance = torch.empty_like(mean)
    with torch.cuda.device_of(x):
        _moments_kernel[geometry.grid](
            x, means, squares, *geometry.arguments, geometry.tiles, COMPUTE=compute_type(x.dtype), **geometry.meta
        )
        _statistics_kernel[geometry.together](
            means, squares, mean, variance, running_mean, running_var, batches, geometry.grid[0],
            geometry.steps, geometry.channels, geometry.rows, geometry.tiles * geometry.tile_rows, momentum,
            OF_EACH_STEP=running_mean is not None and running_mean.dim() == 2,
            COMPUTE=compute_type(x.dtype), PROGRAMS=PARTIALS_AT_ONCE, COLUMNS=COLUMNS_TOGETHER, num_warps=8,
        )  # fmt: skip
    return mean, variance


def launch_forward(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor,
    residual: Tensor | None, total: Tensor | None, spikes: Tensor | None,
    eps: float, relu: bool, pool: bool, p: LIFParameters,
) -> None:  # fmt: skip
    """Fills total [S, N, C, ...] = batch norm + residual, its ReLU or its averages over 2x2 pixels, and spikes, if they
    are given."""
    fires = spikes is not None
    geometry = _geometry(x, fires, VALUES, pool)
    with torch.cuda.device_of(x):
        _forward_kernel[geometry.grid](
            x, mean, variance, weight, bias, residual, total, spikes,
            *geometry.arguments, geometry.width, _statistics_step(mean),
            POOL=pool, FIRE=fires, RELU=relu, EPS=eps, STEPS=geometry.steps_in_kernel, AHEAD=AHEAD,
            TAU=p.tau, V_THRESHOLD=p.v_threshold, V_RESET=p.v_reset, COMPUTE=compute_type(x.dtype), **geometry.meta,
        )  # fmt: skip


def launch_backward_sums(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor,
    total: Tensor | None, grad_total: Tensor | None, grad_spikes: Tensor | None,
    weighted: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_y: Tensor | None,
    eps: float, fires: bool, relu: bool, pool: bool, p: LIFParameters,
) -> None:  # fmt: skip
    """Fills weighted [S, 2, C] with weight times the sums over rows of dy and of dy (x - mean), grad_weight and
    grad_bias [C], and grad_y with dy."""
    geometry = _geometry(x, fires, REDUCED_VALUES if fires else VALUES, pool, PROGRAMS_OF_SUMS)
    partial = torch.empty(geometry.grid[0], geometry.steps, 2, geometry.channels, dtype=weighted.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_sums_kernel[geometry.grid](
            x, mean, variance, weight, bias, total, grad_total, grad_spikes,
            partial, grad_y,
            *geometry.arguments, geometry.width, _statistics_step(mean), geometry.tiles,
            POOL=pool, FIRE=fires, RELU=relu, EPS=eps, STEPS=geometry.steps_in_kernel,
            **_neuron(p), COMPUTE=compute_type(x.dtype), **geometry.meta,
        )  # fmt: skip
        _together_kernel[geometry.together](
            partial, variance, weight, weighted, grad_weight, grad_bias,
            geometry.grid[0], geometry.steps, geometry.channels, _statistics_step(mean),
            EPS=eps, COMPUTE=compute_type(x.dtype), PROGRAMS=PARTIALS_AT_ONCE, COLUMNS=COLUMNS_TOGETHER, num_warps=8,
        )  # fmt: skip


def launch_backward_input(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor,
    grad_total: Tensor | None, grad_spikes: Tensor | None,
    weighted: Tensor | None, count: Tensor | None, grad_x: Tensor,
    eps: float, fires: bool, relu: bool, pool: bool, p: LIFParameters,
) -> None:  # fmt: skip
    """Fills grad_x. weighted [S or 1, 2, C]: as `launch_backward_sums` makes it, added up over all that has its
    statistics in common; None: the statistics are no function of x. count: the number of values that they are of, in
    memory; None: those of x."""
    geometry = _geometry(x, fires, VALUES, pool)
    values = geometry.rows * geometry.steps // mean.shape[0]
    with torch.cuda.device_of(x):
        _backward_input_kernel[geometry.grid](
            x, mean, variance, weight, bias, grad_total, grad_spikes,
            weighted, count, grad_x, *geometry.arguments, geometry.width, _statistics_step(mean), values,
            POOL=pool, FIRE=fires, RELU=relu, EPS=eps, STEPS=geometry.steps_in_kernel, AHEAD=AHEAD,
            **_neuron(p), COMPUTE=compute_type(x.dtype), **geometry.meta,
        )  # fmt: skip


def _statistics_step(mean: Tensor) -> int:
    return mean.shape[1] if mean.shape[0] > 1 else 0


@functools.cache
def _neuron(p: LIFParameters) -> dict:
    return dict(
        TAU=p.tau, V_THRESHOLD=p.v_threshold, V_RESET=p.v_reset,
        SURROGATE=p.surrogate, ALPHA=p.alpha, DETACH_RESET=p.detach_reset,
    )  # fmt: skip
