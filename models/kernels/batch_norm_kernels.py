"""Triton kernels of batch norm with what follows it: adding a residual, and a LIF layer or ReLU.

A program takes a tile of rows (n and pixel) times channels through all steps.
"""

from models.kernels.reduction_kernels import place_row, place_tile
from models.kernels.triton_lif import charge, charge_gradient, constant, elements_before, fire, reset
from utils.triton_language import tl, triton


@triton.jit
def forward_kernel(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, residual_ptr, sum_ptr, spike_ptr,
    rows, channels, inner, step_elements, width, statistics_step,
    CHANNELS_LAST: tl.constexpr, POOL: tl.constexpr, FIRE: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    STEPS: tl.constexpr, AHEAD: tl.constexpr,
    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    at, column, mask = place_tile(first_row, rows, channels, inner, width, CHANNELS_LAST, POOL, ROWS, COLUMNS)
    is_channel = column < channels
    weight = tl.load(weight_ptr + column, is_channel, 0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + column, is_channel, 0.0).to(COMPUTE)
    v = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if POOL and sum_ptr is not None:
        window = first_row // 4 + tl.arange(0, ROWS // 4)[:, None]
        pooled_at = place_row(window, column, channels, inner // 4, CHANNELS_LAST)
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
def backward_sums_kernel(
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
        at, column, mask = place_tile(first_row, rows, channels, inner, width, CHANNELS_LAST, POOL, ROWS, COLUMNS)
        pooled_at = place_row(
            (first_row + tl.arange(0, ROWS)[:, None]) // 4, column, channels, inner // 4, CHANNELS_LAST
        )
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
            grad_y, grad_v = _into_sum(
                grad_sum_ptr, grad_spike_ptr, grad_sum, grad_spike, charged, STEPS - 1 - back, grad_v, POOL, FIRE,
                TAU, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET, COMPUTE, ROWS, COLUMNS,
            )  # fmt: skip
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
def backward_input_kernel(
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
    at, column, mask = place_tile(first_row, rows, channels, inner, width, CHANNELS_LAST, POOL, ROWS, COLUMNS)
    pooled_at = place_row((first_row + tl.arange(0, ROWS)[:, None]) // 4, column, channels, inner // 4, CHANNELS_LAST)
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
        grad_y, grad_v = _into_sum(
            grad_sum_ptr, grad_spike_ptr, grad_sum, grad_spike, charged, STEPS - 1 - back, grad_v, POOL, FIRE,
            TAU, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET, COMPUTE, ROWS, COLUMNS,
        )  # fmt: skip
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


@triton.jit
def _into_sum(
    grad_sum_ptr, grad_spike_ptr, grad_sum, grad_spike, charged, STEP: tl.constexpr, grad_v,
    POOL: tl.constexpr, FIRE: tl.constexpr, TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(gradient of a step's sum, of the membrane before the step), from what `_gradients` loaded."""
    grad_y = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if FIRE:
        into_spike = tl.zeros([ROWS, COLUMNS], COMPUTE)
        if grad_spike_ptr is not None:
            into_spike = grad_spike.to(COMPUTE)
        grad_h = charge_gradient(
            charged[STEP], into_spike, grad_v, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET
        )  # fmt: skip
        grad_y = grad_h * (1.0 / TAU)
        grad_v = grad_h * (1.0 - 1.0 / TAU)
    if grad_sum_ptr is not None:
        grad_y += grad_sum.to(COMPUTE) * (0.25 if POOL else 1.0)
    return grad_y, grad_v


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
def _values(count_ptr, values, like):
    """How many values the statistics are of: those of this process, or the number that lies in memory."""
    if count_ptr is None:
        return tl.full(like.shape, values, like.dtype)
    else:
        return tl.load(count_ptr).to(like.dtype)
