"""Batch norm with what follows it in one pass: adding a residual, and a LIF layer or ReLU. Launches of its kernels.

x is [S, N, C, ...], contiguous or channels-last, and all that is as large lies in memory as x does. Each step has its
own mean and variance, or all share one of each: [S or 1, C] in `membrane_dtype`. In bfloat16, a neuron and step costs,
with the statistics' own pass over x:

    batch norm + LIF                     6 bytes forward, 10 backward
    batch norm + residual + LIF          10 bytes forward, 16 backward
    batch norm + LIF, sum averaged 2x2   6.5 bytes forward, 11 backward
    batch norm + ReLU                    6 bytes forward, 10 backward
    batch norm + residual + ReLU         8 bytes forward, 14 backward
"""

import functools

import torch
from torch import Tensor

from models.kernels.batch_norm_kernels import backward_input_kernel, backward_sums_kernel, forward_kernel
from models.kernels.layout import is_channels_last
from models.kernels.parameters import LIFParameters
from models.kernels.reduction_kernels import moments_kernel, statistics_kernel, together_kernel
from models.kernels.triton_lif import MAX_STEPS, compute_type
from utils.triton_language import cdiv, next_power_of_2

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
        moments_kernel[geometry.grid](
            x, means, squares, *geometry.arguments, geometry.tiles, COMPUTE=compute_type(x.dtype), **geometry.meta
        )
        statistics_kernel[geometry.together](
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
        forward_kernel[geometry.grid](
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
        backward_sums_kernel[geometry.grid](
            x, mean, variance, weight, bias, total, grad_total, grad_spikes,
            partial, grad_y,
            *geometry.arguments, geometry.width, _statistics_step(mean), geometry.tiles,
            POOL=pool, FIRE=fires, RELU=relu, EPS=eps, STEPS=geometry.steps_in_kernel,
            **_neuron(p), COMPUTE=compute_type(x.dtype), **geometry.meta,
        )  # fmt: skip
        together_kernel[geometry.together](
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
        backward_input_kernel[geometry.grid](
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
