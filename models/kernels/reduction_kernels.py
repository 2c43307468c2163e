"""Triton kernels of batch norm's statistics and sums: over rows in two steps.

Some programs find what their tiles of rows hold; then what they found is put together, always in the same order.
"""

from models.kernels.triton_lif import constant
from utils.triton_language import tl, triton

# ---- where a tile of [S, N, C, ...] lies, shared with the kernels of the layers


@triton.jit
def place_tile(
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
    return place_row(row, column, channels, inner, CHANNELS_LAST), column, mask


@triton.jit
def place_row(row, column, channels, inner, CHANNELS_LAST: tl.constexpr):
    """Elements before those of a row (n and pixel, `inner` pixels an n) and column within a step."""
    if CHANNELS_LAST:
        return row * channels + column
    else:
        return (row // inner) * channels * inner + column.to(tl.int64) * inner + row % inner


# ---- moments


@triton.jit
def moments_kernel(
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
    at, column, mask = place_tile(first, end, channels, inner, 0, CHANNELS_LAST, False, ROWS, COLUMNS)
    loaded = tl.load(of_step + at, mask, 0.0)
    for tile in range(tiles):
        x = loaded.to(COMPUTE)
        here = mask
        # The next tile is on its way while this one is counted.
        at, column, mask = place_tile(
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
def statistics_kernel(
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


# ---- sums of the backward pass


@triton.jit
def together_kernel(
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


# ---- what programs found


@triton.jit
def _partials(first, programs, step, steps, width, column, channels, PROGRAMS: tl.constexpr):
    """(program numbers [PROGRAMS, 1], elements before what they found of a step, `width` numbers each, mask)"""
    program = first + tl.arange(0, PROGRAMS)[:, None]
    at = (program * steps + step) * width + column[None, :]
    return program, at, (program < programs) & (column[None, :] < channels)


@triton.jit
def _rows_of(program, rows, rows_each):
    return tl.minimum(rows_each, tl.maximum(rows - program * rows_each, 0))
