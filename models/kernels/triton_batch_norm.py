"""Triton kernels of batch norm over the steps of a spiking network, with what follows it in one pass:
adding a residual, and a LIF layer.

Tensors are [S, N, C, ...], contiguous or channels-last; each step has its own mean and scale, or all share
one. A program takes a tile of rows (n and pixel) times channels through all steps. In bfloat16, a neuron
and step costs, with the statistics' own pass over x:

    batch norm + LIF              6 bytes forward, 10 backward
    batch norm + residual + LIF   10 bytes forward, 16 backward
"""

import torch
from torch import Tensor

from models.kernels.layout import is_channels_last
from models.kernels.parameters import LIFParameters
from models.kernels.triton_lif import MAX_STEPS, charge, charge_gradient, compute_type, elements_before, fire, reset
from utils.triton_language import tl, triton

# ---- kernels


@triton.jit
def _tile(
    first_row, rows, channels, inner, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """(elements before each of a tile within a step, column numbers [1, COLUMNS], mask)."""
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if CHANNELS_LAST:
        at = row * channels + column
    else:
        at = (row // inner) * channels * inner + column.to(tl.int64) * inner + row % inner
    return at, column, (row < rows) & (column < channels)


@triton.jit
def _moments_kernel(
    x_ptr, mean_ptr, square_ptr, rows, channels, inner, step_elements,
    CHANNELS_LAST: tl.constexpr, TILES: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared deviations from it, of TILES tiles of one step (Welford in every lane,
    then Chan et al. over lanes): no cancellation however far the mean is from zero."""
    step = tl.program_id(2)
    first = tl.program_id(0).to(tl.int64) * TILES * ROWS
    mean = tl.zeros([ROWS, COLUMNS], COMPUTE)
    square = tl.zeros([ROWS, COLUMNS], COMPUTE)
    count = tl.zeros([ROWS, 1], COMPUTE)
    for tile in range(TILES):
        at, column, mask = _tile(first + tile * ROWS, rows, channels, inner, CHANNELS_LAST, ROWS, COLUMNS)
        x = tl.load(x_ptr + step.to(tl.int64) * step_elements + at, mask, 0.0).to(COMPUTE)
        away = tl.where(mask, x - mean, 0.0)
        count += (first + tile * ROWS + tl.arange(0, ROWS)[:, None] < rows).to(COMPUTE)
        mean += away * (1.0 / tl.maximum(count, 1.0))
        square += tl.where(mask, away * (x - mean), 0.0)
    total = tl.sum(count, 0)  # [1]
    together = tl.sum(mean * count, 0) / total  # [COLUMNS]
    away = mean - together[None, :]
    square = tl.sum(square + count * away * away, 0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out = (tl.program_id(0) * tl.num_programs(2) + step) * channels + column
    tl.store(mean_ptr + out, together, column < channels)
    tl.store(square_ptr + out, square, column < channels)


@triton.jit
def _forward_kernel(
    x_ptr, mean_ptr, scale_ptr, bias_ptr, residual_ptr, v0_ptr, sum_ptr, spike_ptr, v_end_ptr,
    rows, channels, inner, step_elements, statistics_step,
    CHANNELS_LAST: tl.constexpr, FIRE: tl.constexpr, STEPS: tl.constexpr,
    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, column, mask = _tile(
        tl.program_id(0).to(tl.int64) * ROWS, rows, channels, inner, CHANNELS_LAST, ROWS, COLUMNS
    )  # fmt: skip
    is_channel = column < channels
    bias = tl.load(bias_ptr + column, is_channel, 0.0).to(COMPUTE)
    v = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if FIRE and v0_ptr is not None:
        v = tl.load(v0_ptr + at, mask, 0.0)
    for inner_step in tl.static_range(STEPS):
        step = tl.program_id(2) * STEPS + inner_step
        here = step.to(tl.int64) * step_elements + at
        mean = tl.load(mean_ptr + step * statistics_step + column, is_channel, 0.0)
        scale = tl.load(scale_ptr + step * statistics_step + column, is_channel, 0.0)
        y = tl.fma(tl.load(x_ptr + here, mask, 0.0).to(COMPUTE) - mean, scale, bias)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + here, mask, 0.0).to(COMPUTE)
        if sum_ptr is not None:
            # The neuron sees what is kept: the backward pass then sees the same.
            rounded = y.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + here, rounded, mask)
            y = rounded.to(COMPUTE)
        if FIRE:
            h = charge(y, v, TAU)
            tl.store(spike_ptr + here, fire(h, V_THRESHOLD).to(spike_ptr.dtype.element_ty), mask)
            v = reset(h, V_THRESHOLD, V_RESET)
    if FIRE and v_end_ptr is not None:
        tl.store(v_end_ptr + at, v, mask)


@triton.jit
def _backward_kernel(
    x_ptr, mean_ptr, scale_ptr, bias_ptr, sum_ptr, v0_ptr, grad_sum_ptr, grad_spike_ptr, grad_v_end_ptr,
    partial_ptr, total_grad_sum_ptr, grad_v0_ptr, centred_factor_ptr, offset_ptr, grad_x_ptr,
    rows, channels, inner, step_elements, statistics_step,
    CHANNELS_LAST: tl.constexpr, FIRE: tl.constexpr, STEPS: tl.constexpr,
    TAU: tl.constexpr, V_THRESHOLD: tl.constexpr, V_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy, the gradient of what batch norm gave, by way of the spikes (FIRE) and of the sum, then
    either, with partial_ptr, its sums over the tile, and dy itself where the residual needs it,
    or, with grad_x_ptr, grad_x = scale dy + centred_factor (x - mean) + offset."""
    at, column, mask = _tile(
        tl.program_id(0).to(tl.int64) * ROWS, rows, channels, inner, CHANNELS_LAST, ROWS, COLUMNS
    )  # fmt: skip
    is_channel = column < channels
    charged = ()
    grad_v = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if FIRE:
        v = tl.zeros([ROWS, COLUMNS], COMPUTE)
        if v0_ptr is not None:
            v = tl.load(v0_ptr + at, mask, 0.0)
        if grad_v_end_ptr is not None:
            grad_v = tl.load(grad_v_end_ptr + at, mask, 0.0)
        if sum_ptr is None:
            bias = tl.load(bias_ptr + column, is_channel, 0.0).to(COMPUTE)
        for step in tl.static_range(STEPS):
            here = elements_before(step, step_elements) + at
            if sum_ptr is not None:
                y = tl.load(sum_ptr + here, mask, 0.0).to(COMPUTE)
            else:
                mean = tl.load(mean_ptr + step * statistics_step + column, is_channel, 0.0)
                scale = tl.load(scale_ptr + step * statistics_step + column, is_channel, 0.0)
                y = tl.fma(tl.load(x_ptr + here, mask, 0.0).to(COMPUTE) - mean, scale, bias)
            h = charge(y, v, TAU)
            charged = charged + (h,)
            v = reset(h, V_THRESHOLD, V_RESET)

    for back in tl.static_range(STEPS):
        step = tl.program_id(2) * STEPS + (STEPS - 1 - back)
        here = step.to(tl.int64) * step_elements + at
        grad_y = tl.zeros([ROWS, COLUMNS], COMPUTE)
        if FIRE:
            grad_spike = tl.zeros([ROWS, COLUMNS], COMPUTE)
            if grad_spike_ptr is not None:
                grad_spike = tl.load(grad_spike_ptr + here, mask, 0.0).to(COMPUTE)
            grad_h = charge_gradient(
                charged[STEPS - 1 - back], grad_spike, grad_v, V_THRESHOLD, V_RESET, SURROGATE, ALPHA, DETACH_RESET
            )
            grad_y = grad_h * (1.0 / TAU)
            grad_v = grad_h * (1.0 - 1.0 / TAU)
        if grad_sum_ptr is not None:
            grad_y += tl.load(grad_sum_ptr + here, mask, 0.0).to(COMPUTE)
        mean = tl.load(mean_ptr + step * statistics_step + column, is_channel, 0.0)
        centred = tl.load(x_ptr + here, mask, 0.0).to(COMPUTE) - mean
        if partial_ptr is not None:
            out = (tl.program_id(0).to(tl.int64) * (tl.num_programs(2) * STEPS) + step) * 2 * channels
            own = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            tl.store(partial_ptr + out + own, tl.sum(grad_y, 0), own < channels)
            tl.store(partial_ptr + out + channels + own, tl.sum(grad_y * centred, 0), own < channels)
        if total_grad_sum_ptr is not None:
            tl.store(total_grad_sum_ptr + here, grad_y.to(total_grad_sum_ptr.dtype.element_ty), mask)
        if grad_x_ptr is not None:
            scale = tl.load(scale_ptr + step * statistics_step + column, is_channel, 0.0)
            factor = tl.load(centred_factor_ptr + step * statistics_step + column, is_channel, 0.0)
            offset = tl.load(offset_ptr + step * statistics_step + column, is_channel, 0.0)
            grad_x = scale * grad_y + (factor * centred + offset)
            tl.store(grad_x_ptr + here, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    if FIRE and grad_v0_ptr is not None:
        tl.store(grad_v0_ptr + at, grad_v, mask)


# ---- launches. x and all that is as large lie alike in memory; statistics are [S or 1, C] in `membrane_dtype`.


class _Geometry:
    """Rows, channels and tiles of [S, N, C, ...]; the same on every machine, so that processes agree."""

    def __init__(self, x: Tensor, fires: bool):
        self.steps, self.channels = x.shape[0], x.shape[2]
        self.inner = x.shape[3:].numel()
        self.rows = x.shape[1] * self.inner
        self.channels_last = is_channels_last(x)
        in_registers = self.steps if fires else 1  # the membrane of all steps
        # Values a thread: 8 of bfloat16 are 16 bytes a load; fewer where the membrane of many steps needs the room.
        values = 8 if in_registers <= 4 else 4 if in_registers <= 8 else 2
        self.warps = 8
        if not fires:
            values = 16
        tile = values * 32 * self.warps
        if self.channels_last and self.channels > 1:
            # 64 channels are 128 bytes of a row: whole lines of memory.
            self.tile_columns = min(triton.next_power_of_2(self.channels), 64 if in_registers <= 4 else 32)
            self.tile_rows = tile // self.tile_columns
        else:
            self.tile_columns, self.tile_rows, self.warps = 1, tile // 2, 4
        self.row_tiles = triton.cdiv(self.rows, self.tile_rows)
        self.column_tiles = triton.cdiv(self.channels, self.tile_columns)

    def grid(self, fires: bool) -> tuple[int, int, int]:
        return self.row_tiles, self.column_tiles, 1 if fires else self.steps

    def arguments(self) -> tuple[int, int, int, int]:
        return self.rows, self.channels, self.inner, self.rows * self.channels

    def tiles(self) -> dict:
        return dict(
            CHANNELS_LAST=self.channels_last, ROWS=self.tile_rows, COLUMNS=self.tile_columns, num_warps=self.warps
        )


_PROGRAMS_OF_MOMENTS = 1024  # enough to fill a GPU, few enough to be added up at once


def launch_moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) [S, C] of each step and channel of x [S, N, C, ...]."""
    geometry = _Geometry(x, fires=False)
    programs = max(1, min(geometry.row_tiles, _PROGRAMS_OF_MOMENTS // (geometry.steps * geometry.column_tiles)))
    tiles = triton.next_power_of_2(triton.cdiv(geometry.row_tiles, programs))  # compiled anew for each value
    programs = triton.cdiv(geometry.row_tiles, tiles)
    means = torch.empty(programs, geometry.steps, geometry.channels, dtype=dtype, device=x.device)
    squares = torch.empty_like(means)
    with torch.cuda.device_of(x):
        _moments_kernel[(programs, geometry.column_tiles, geometry.steps)](
            x, means, squares, *geometry.arguments(), TILES=tiles, COMPUTE=compute_type(x.dtype), **geometry.tiles()
        )
    # All programs but the last have seen as many rows.
    rows = geometry.rows
    share = torch.full((programs, 1, 1), tiles * geometry.tile_rows / rows, dtype=dtype, device=x.device)
    share[-1] = 1.0 - (programs - 1) * tiles * geometry.tile_rows / rows
    mean = (share * means).sum(0)
    variance = squares.sum(0) / rows + (share * (means - mean).square()).sum(0)
    return mean, variance


def launch_forward(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, v0: Tensor | None,
    total: Tensor | None, spikes: Tensor | None, v_end: Tensor | None, p: LIFParameters,
) -> None:  # fmt: skip
    """Fills total [S, N, C, ...] = batch norm + residual, and spikes with v_end [N, C, ...], where given."""
    fires = spikes is not None
    geometry = _Geometry(x, fires)
    with torch.cuda.device_of(x):
        _forward_kernel[geometry.grid(fires)](
            x, mean, scale, bias, residual, v0, total, spikes, v_end, *geometry.arguments(), _statistics_step(mean),
            FIRE=fires, STEPS=_steps_in_kernel(geometry, fires),
            TAU=p.tau, V_THRESHOLD=p.v_threshold, V_RESET=p.v_reset, COMPUTE=compute_type(x.dtype), **geometry.tiles(),
        )  # fmt: skip


def launch_backward_sums(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, total: Tensor | None, v0: Tensor | None,
    grad_total: Tensor | None, grad_spikes: Tensor | None, grad_v_end: Tensor | None,
    whole_grad_total: Tensor | None, grad_v0: Tensor | None, fires: bool, p: LIFParameters,
) -> Tensor:  # fmt: skip
    """[S, 2, C]: the sums over rows of dy and of dy (x - mean). Fills whole_grad_total with dy, and grad_v0."""
    geometry = _Geometry(x, fires)
    partial = torch.empty(geometry.row_tiles, geometry.steps, 2, geometry.channels, dtype=mean.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[geometry.grid(fires)](
            x, mean, scale, bias, total, v0, grad_total, grad_spikes, grad_v_end,
            partial, whole_grad_total, grad_v0, None, None, None,
            *geometry.arguments(), _statistics_step(mean), FIRE=fires, STEPS=_steps_in_kernel(geometry, fires),
            **_neuron(p), COMPUTE=compute_type(x.dtype), **geometry.tiles(),
        )  # fmt: skip
    return partial.sum(0)


def launch_backward_input(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, v0: Tensor | None,
    grad_total: Tensor | None, grad_spikes: Tensor | None, grad_v_end: Tensor | None,
    centred_factor: Tensor, offset: Tensor, grad_x: Tensor, fires: bool, p: LIFParameters,
) -> None:  # fmt: skip
    """Fills grad_x = scale dy + centred_factor (x - mean) + offset."""
    geometry = _Geometry(x, fires)
    with torch.cuda.device_of(x):
        _backward_kernel[geometry.grid(fires)](
            x, mean, scale, bias, None, v0, grad_total, grad_spikes, grad_v_end,
            None, None, None, centred_factor, offset, grad_x,
            *geometry.arguments(), _statistics_step(mean), FIRE=fires, STEPS=_steps_in_kernel(geometry, fires),
            **_neuron(p), COMPUTE=compute_type(x.dtype), **geometry.tiles(),
        )  # fmt: skip


def _steps_in_kernel(geometry: _Geometry, fires: bool) -> int:
    if fires and geometry.steps > MAX_STEPS:
        raise ValueError(f"the fused kernels take up to {MAX_STEPS} time steps, got {geometry.steps}")
    return geometry.steps if fires else 1


def _statistics_step(mean: Tensor) -> int:
    return mean.shape[1] if mean.shape[0] > 1 else 0


def _neuron(p: LIFParameters) -> dict:
    return dict(
        TAU=p.tau, V_THRESHOLD=p.v_threshold, V_RESET=p.v_reset,
        SURROGATE=p.surrogate, ALPHA=p.alpha, DETACH_RESET=p.detach_reset,
    )  # fmt: skip
