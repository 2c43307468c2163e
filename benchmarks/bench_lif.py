"""The spiking layers alone, forward and backward: ours, SpikingJelly's, compiled and eager PyTorch.

    python -m benchmarks.bench_lif --device cuda                    # [3, 128, 64, 112, 112] in bfloat16
    python -m benchmarks.bench_lif --shape 3 4 64 56 56             # this machine's CPU, float32

Three layers: LIF alone; batch norm + LIF; batch norm + residual + LIF (the sum is kept, as a block's input
is). All implementations take turns in this process on the same tensors, channels-last; figures are medians,
ratios are medians of the ratio of each round. `share` is of the bandwidth of a measured copy of random numbers (read
plus write), on the bytes that the layer must move: see PASSES. Memory is the most that forward and backward hold
beyond their inputs, on a GPU. An implementation that fails is listed with its error and left out; the exit status is
then 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_step import describe
from models.batch_norm import StepBatchNorm2d
from models.kernels.parameters import LIFParameters
from models.kernels.reference import lif_definition, lif_reference
from models.neurons import LIF, lif
from utils.triton_language import why_not_on

# (forward, backward) passes over a tensor of the layer's size: what is read and written once each, with the
# statistics' own pass over the input. Times the bytes of an element, these are the bytes that must be moved.
LAYERS = ("LIF", "batch norm + LIF", "batch norm + residual + LIF")
PASSES = {"LIF": (2, 3), "batch norm + LIF": (3, 5), "batch norm + residual + LIF": (5, 8)}
Layer = Callable[[Tensor, Tensor | None], tuple[Tensor | None, Tensor]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", type=int, nargs=5, metavar=("S", "N", "C", "H", "W"), help="steps first")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=15, help="counted; two more warm up")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    shape = args.shape or ([3, 128, 64, 112, 112] if on_gpu else [3, 4, 64, 56, 56])
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    copy_bandwidth = measured_copy(shape, dtype, device, args.rounds)
    elements = torch.Size(shape).numel()
    print(
        f"{describe(device)}; torch {torch.__version__}; {shape} {str(dtype).removeprefix('torch.')}; "
        f"copy {copy_bandwidth / 1e9:.0f} GB/s; medians of {args.rounds} rounds; "
        f"batch norm of the other builds: {batch_norm_backend(shape, dtype, device)}"
    )
    figures, failures = [], []
    for layer in LAYERS:
        bench = LayerBench(shape, dtype, device, residual="residual" in layer)
        builds = implementations(layer, shape[2], device, dtype, args.compile)
        times, failed = bench.time(builds, args.rounds)
        for name, error in failed.items():
            print(f"{layer:28s} {name:28s} failed: {error}")
            failures.append({"layer": layer, "build": name, "error": error})
        if not times:
            continue
        ours = next(iter(times))  # each other is compared with it
        for name, rounds in times.items():
            forward, backward = (statistics.median(seconds[part] for seconds in rounds) for part in (0, 1))
            ratios = [sum(a) / sum(b) for a, b in zip(rounds, times[ours], strict=True)]
            must_move = [passes * elements * dtype.itemsize for passes in PASSES[layer]]
            figure = {
                "layer": layer, "build": name, "forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward,
                "forward_share": must_move[0] / forward / copy_bandwidth,
                "backward_share": must_move[1] / backward / copy_bandwidth,
                "time_of_ours": statistics.median(ratios), "time_of_ours_min": min(ratios),
                "time_of_ours_max": max(ratios), "peak_memory_mib": bench.peak_memory_mib(builds[name]),
            }  # fmt: skip
            figures.append(figure)
            memory = "" if figure["peak_memory_mib"] is None else f"   {figure['peak_memory_mib']:7.0f} MiB"
            print(
                f"{layer:28s} {name:28s} {1e3 * forward:9.3f} + {1e3 * backward:9.3f} ms   "
                f"{100 * figure['forward_share']:4.0f} % {100 * figure['backward_share']:4.0f} % of copy   "
                f"{figure['time_of_ours']:5.2f}x {ours} ({min(ratios):.2f} to {max(ratios):.2f}){memory}"
            )
    if args.json:
        with open(args.json, "w") as file:
            settings = {**vars(args), "shape": shape, "dtype": str(dtype)}
            about = {"settings": settings, "machine": describe(device), "torch": torch.__version__}
            measured = {"copy_bytes_per_second": copy_bandwidth, "figures": figures, "failures": failures}
            json.dump({**about, **measured}, file, indent=2)
    return 1 if failures else 0


# ---- what is compared


def implementations(layer: str, channels: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict:
    """name -> function of (x, residual) that gives (sum or None, spikes). The first is ours."""
    p = LIFParameters()
    fires: dict[str, Callable[[Tensor], Tensor]] = {}
    if device.type == "cuda" and why_not_on("cuda") is None:
        fires["ours, triton"] = lambda x: lif(x, p, backend="triton", keep_v=False)[0]
    fires["ours, reference"] = lambda x: lif_reference(x, p)[0]
    fires["SpikingJelly"] = spikingjelly_lif(p, None)
    if device.type == "cuda" and dtype != torch.float32:
        fires["SpikingJelly, half storage"] = spikingjelly_lif(p, str(dtype).removeprefix("torch."))
    fires["eager definition"] = lambda x: lif_definition(x, p)[0]
    if compiled:
        fires["compiled definition"] = torch.compile(lambda x: lif_definition(x, p)[0])
    if layer == "LIF":
        return {name: lambda x, residual, fire=fire: (None, fire(x)) for name, fire in fires.items()}

    keep_sum = "residual" in layer
    builds: dict[str, Layer] = {}
    if device.type == "cuda" and why_not_on("cuda") is None:
        fused, neurons = StepBatchNorm2d(channels, backend="triton").to(device).train(), LIF(p, "triton")
        builds["ours, triton"] = lambda x, residual: fused(x, residual, neurons, spikes_only=not keep_sum)
        del fires["ours, triton"]
    norm = StepBatchNorm2d(channels, backend="reference").to(device).train()

    def after_batch_norm(fire: Callable[[Tensor], Tensor]) -> Layer:
        def run(x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor]:
            total = norm.normalise(x)  # PyTorch's, a call a step
            total = total if residual is None else total + residual
            return total if keep_sum else None, fire(total)

        return run

    builds |= {f"{name}": after_batch_norm(fire) for name, fire in fires.items() if name != "compiled definition"}
    if compiled:

        def plain(x: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor]:
            steps = [F.batch_norm(step, None, None, norm.weight, norm.bias, training=True) for step in x]
            total = torch.stack(steps)
            total = total if residual is None else total + residual
            return total if keep_sum else None, lif_definition(total, p)[0]

        builds["compiled definition"] = torch.compile(plain)
    return builds


def spikingjelly_lif(p: LIFParameters, storage: str | None) -> Callable[[Tensor], Tensor]:
    """Its multi-step LIF; on a GPU its Triton kernels. storage: the type it keeps membranes in, None: float32."""
    precision = {} if storage is None else {"neuron_storage": storage}

    def run(x: Tensor) -> Tensor:
        # Here, so that without the package the other implementations are still measured.
        from spikingjelly.activation_based import functional, surrogate

        arctangent = surrogate.ATan(alpha=p.alpha)
        v = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
        neuron = dict(tau=p.tau, decay_input=True, v_threshold=p.v_threshold, v_reset=p.v_reset)
        if storage is not None:
            v = v.to(x.dtype)
        return functional.lif_multi_step(
            x, v, **neuron, surrogate_function=arctangent, detach_reset=p.detach_reset, **precision
        )[0]

    return run


# ---- how it is measured


class LayerBench:
    def __init__(self, shape: list[int], dtype: torch.dtype, device: torch.device, residual: bool):
        def tensor() -> Tensor:
            steps, n, c, h, w = shape
            return torch.randn(steps, n, h, w, c, device=device).to(dtype).permute(0, 1, 4, 2, 3)

        self._device = device
        self._x = tensor().requires_grad_()
        self._residual = tensor().requires_grad_() if residual else None
        self._grad_spikes, self._grad_sum = tensor(), tensor() if residual else None

    def _forward_backward(self, build: Layer) -> tuple[float, float]:
        """Seconds of both."""
        if self._device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # cycles: the GPU is busy until the host has launched all that follows
        start = self._now()
        total, spikes = build(self._x, self._residual)
        middle = self._now()
        outputs, gradients = [spikes], [self._grad_spikes]
        if total is not None:
            outputs, gradients = [total, spikes], [self._grad_sum, self._grad_spikes]
        inputs = [self._x] if self._residual is None else [self._x, self._residual]
        torch.autograd.grad(outputs, inputs, gradients)
        end = self._now()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3
        return middle - start, end - middle

    def _now(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time(
        self, builds: dict[str, Layer], rounds: int
    ) -> tuple[dict[str, list[tuple[float, float]]], dict[str, str]]:
        """(seconds forward and backward in each round, the first line of the error of each build that failed)"""
        times, failed = {name: [] for name in builds}, {}
        for number in range(rounds + 2):
            for name in list(times):
                try:
                    seconds = self._forward_backward(builds[name])
                except Exception as error:  # a compiler or another project's kernel: any type
                    failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                    del times[name]
                    continue
                if number >= 2:
                    times[name].append(seconds)
        return times, failed

    def peak_memory_mib(self, build: Layer) -> float | None:
        if self._device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._forward_backward(build)
        return (torch.cuda.max_memory_allocated(self._device) - before) / 2**20


def measured_copy(shape: list[int], dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    """Bytes a second of a tensor copied, read and written both counted. Of random numbers: some GPUs move zeros in
    less time."""
    source = torch.randn(shape, device=device).to(dtype)
    target = torch.empty_like(source)
    seconds = []
    for number in range(rounds + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize(device)
            elapsed = start.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            target.copy_(source)
            elapsed = time.perf_counter() - began
        if number >= 2:
            seconds.append(elapsed)
    return 2 * source.numel() * dtype.itemsize / statistics.median(seconds)


def batch_norm_backend(shape: list[int], dtype: torch.dtype, device: torch.device) -> str:
    """Whose batch norm PyTorch takes for one step: its own ("Native") or cuDNN's."""
    step = torch.empty(shape[1:], dtype=dtype, device=device).to(memory_format=torch.channels_last)
    one = torch.ones(shape[2], device=device)
    return torch._C._select_batch_norm_backend(step, one, one, one, one, True, 1e-5).name


if __name__ == "__main__":
    sys.exit(main())
