"""A training step and a test pass of ReSpike against a plain build of the same network.

    python -m benchmarks.bench_step
    python -m benchmarks.bench_step --device cuda --model resnet50 -b 32 --profile

All run in this process in turn, from the same uint8 clips (laid out as a plain loader and as this
project's gives them) and the same weights; the table gives medians and the ratio of each pair of runs.
"plain" is benchmarks/plain_respike.py in float32. A training step ends with the optimizer's. --profile
lists the 15 kernels (on a CPU, operators) that take the most time of our bfloat16 training step.
"""

import argparse
import copy
import functools
import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.plain_respike import PlainReSpike, plain_split
from dataset.residual import PADDED_CHANNELS, key_residual_split
from models import ReSpike
from models.attention import HEAD_WIDTH
from models.neurons import BACKENDS
from utils.cuda_graphs import GraphedNetwork
from utils.device import choose_algorithms
from utils.runtime import Runtime


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("-b", "--batch-size", type=int, default=2, help="clips")
    parser.add_argument("-T", "--time", type=int, default=16, help="frames a clip")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--downsample", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each; one more warms up")
    parser.add_argument("--lif-backend", default="auto", choices=BACKENDS, help="of our build")
    parser.add_argument("--profile", action="store_true", help="list what takes our training step's time")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    choose_algorithms(deterministic=False)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which a plain build would have
    network = dict(num_classes=51, stride=args.stride, downsample=args.downsample, lif_backend=args.lif_backend)
    ours = ReSpike(args.model, **network)
    plain = PlainReSpike(copy.deepcopy(ours)).to(device)
    packed = ReSpike(args.model, **network, pack_spikes=True)
    packed.load_state_dict(ours.state_dict())
    ours = ours.to(device, memory_format=torch.channels_last)
    packed = packed.to(device, memory_format=torch.channels_last)
    shape = (args.batch_size, args.time, args.size, args.size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3).to(device)  # as a loader gives it
    labels = torch.randint(0, 51, (args.batch_size,)).to(device)

    builds = {
        "plain float32": (plain, plain_split, clip.contiguous(), None),
        "ours float32": (ours, key_residual_split, clip, None),
        "ours bfloat16": (ours, loader_split, clip, torch.bfloat16),
        "ours, --pack-spikes": (packed, loader_split, clip, torch.bfloat16),
    }
    if device.type == "cuda":
        builds["ours, 3 channels"] = (ours, key_residual_split, clip, torch.bfloat16)
        graphed = GraphedNetwork(copy.deepcopy(ours), *loader_split(clip, args.stride, torch.bfloat16), torch.bfloat16)
        builds["ours, --cuda-graphs"] = (graphed, loader_split, clip, torch.bfloat16)
        for kernel in attention_kernels(device, torch.bfloat16):
            network = WithAttention(ours, kernel)
            builds[f"ours, {kernel.name.lower()}"] = (network, loader_split, clip, torch.bfloat16)
    optimizers = {  # steps of size zero: all builds keep the same weights
        build: torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
        for build, (model, *_) in builds.items()
    }
    times, peaks = measure(args, device, builds, optimizers, labels)
    variant = "downsample" if args.downsample else "full"
    print(
        f"{describe(device)}; torch {torch.__version__}; {args.model}, {args.batch_size} clips of {args.time} frames, "
        f"stride {args.stride}, {args.size} px, {variant}; medians of {args.runs} runs"
    )
    figures = report(args, device, times, peaks)
    if args.profile:
        with Runtime(device, torch.bfloat16).autocast():
            split = functools.partial(loader_split, dtype=torch.bfloat16)
            profile(device, ours.train(), split, clip, labels, args.stride, optimizers["ours bfloat16"])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"settings": vars(args), "machine": describe(device), "torch": torch.__version__, "figures": figures},
                file,
                indent=2,
            )


def attention_kernels(device: torch.device, dtype: torch.dtype) -> list[SDPBackend]:
    """The fused kernels that this GPU has for the attention of a fusion block. "ours bfloat16" takes the one that
    PyTorch chooses: cuDNN's from compute capability 9.0 on, else flash attention."""
    tokens = torch.zeros(1, 2, 49, HEAD_WIDTH, dtype=dtype, device=device)
    there = []
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True):
            if torch._fused_sdp_choice(tokens, tokens, tokens) == kernel.value:
                there.append(kernel)
    return there


class WithAttention(nn.Module):
    """`model` with another kernel of attention."""

    def __init__(self, model: nn.Module, kernel: SDPBackend):
        super().__init__()
        self.model, self.kernel = model, kernel

    def forward(self, key: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(self.kernel):
            return self.model(key, residual)


def loader_split(clip, stride, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `dataset.device_loader.DeviceLoader` gives frames in half precision."""
    return key_residual_split(clip, stride, dtype, channels=PADDED_CHANNELS if clip.is_cuda else 3)


def training_step(model, split, clip, labels, stride, optimizer) -> None:
    key, residual = split(clip, stride)
    loss = F.cross_entropy(model(key, residual).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    # A fresh context for the next step: weights change between steps, so their casts are not kept.
    torch.clear_autocast_cache()


@torch.no_grad()
def test_pass(model, split, clip, labels, stride, optimizer) -> None:
    key, residual = split(clip, stride)
    model(key, residual)


TASKS = {"training step": (training_step, True), "test pass": (test_pass, False)}


def profile(device, *arguments, steps: int = 3) -> None:
    """The 15 kernels (on a CPU, operators) with the most time of their own over some training steps."""
    activity = torch.profiler.ProfilerActivity
    training_step(*arguments)
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as recorded:
        for _ in range(steps):
            training_step(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: getattr(event, own), reverse=True)
    whole = sum(getattr(event, own) for event in events)
    for event in events[:15]:
        spent = getattr(event, own)
        share = f"{spent / steps / 1e3:9.2f} ms {100 * spent / whole:5.1f} %"
        print(f"{share}  {event.count // steps:5d} x {event.key[:90]}")


def measure(args, device, builds: dict, optimizers: dict, labels) -> tuple[dict, dict]:
    """(seconds of each counted run by (task, build), most bytes a training step of a build held on a GPU)"""
    peaks = dict.fromkeys(builds, 0.0)
    times = {(task, build): [] for task in TASKS for build in builds}
    for run in range(args.runs + 1):
        for task, (function, training) in TASKS.items():
            for build, (model, split, clip, precision) in builds.items():
                model.train(training)
                if split is not plain_split:
                    split = functools.partial(split, dtype=precision)
                arguments = (model, split, clip, labels, args.stride, optimizers[build])
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                    before = torch.cuda.memory_allocated(device)
                with Runtime(device, precision).autocast():  # as the engine: once for a whole pass
                    function(*arguments)  # casts weights, warms caches
                    seconds = timed(function, device, *arguments)
                if device.type == "cuda" and training and run > 0:  # the first tries algorithms
                    held = getattr(model, "held_bytes", 0)  # of CUDA graphs: no part of what is allocated
                    peaks[build] = max(peaks[build], held + torch.cuda.max_memory_allocated(device) - before)
                if run > 0:
                    times[task, build].append(seconds)
    return times, peaks


def report(args, device, times: dict, peaks: dict) -> list[dict]:
    """Print medians and ratios to the plain build; the same as figures."""
    figures = []
    for task in TASKS:
        for build in peaks:
            seconds = times[task, build]
            ratios = [a / b for a, b in zip(times[task, "plain float32"], seconds, strict=True)]
            figure = {
                "task": task,
                "build": build,
                "seconds": statistics.median(seconds),
                "speed_up": statistics.median(ratios),
                "speed_up_min": min(ratios),
                "speed_up_max": max(ratios),
            }
            if device.type == "cuda" and task == "training step":
                figure["peak_memory_bytes"] = peaks[build]
            figures.append(figure)
            print(
                f"{task:14s} {build:20s} {figure['seconds'] * 1e3:9.1f} ms   "
                f"{args.batch_size / figure['seconds']:7.2f} clips/s   "
                f"{figure['speed_up']:5.2f}x plain ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    if device.type == "cuda":
        for build, peak in peaks.items():
            print(f"{build:20s} peak memory of a training step, weights not counted: {peak / 2**30:.1f} GiB")
    return figures


def timed(function, device, *arguments) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
