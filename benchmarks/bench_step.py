"""A training step and a test pass of ReSpike against a plain build of the same network.

    python -m benchmarks.bench_step
    python -m benchmarks.bench_step --device cuda --model resnet50 -b 32

Both run in this process in turn, from the same uint8 clips (laid out as a plain loader and as this
project's gives them) and the same weights; the table gives medians and the ratio of each pair of runs.
"plain" is benchmarks/plain_respike.py in float32.
"""

import argparse
import copy
import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.plain_respike import PlainReSpike, plain_split
from dataset.residual import key_residual_split
from models import ReSpike
from utils.device import autocast


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
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    ours = ReSpike(args.model, num_classes=51, stride=args.stride, downsample=args.downsample)
    plain = PlainReSpike(copy.deepcopy(ours)).to(device)
    ours = ours.to(device, memory_format=torch.channels_last)
    shape = (args.batch_size, args.time, args.size, args.size, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3).to(device)  # as a loader gives it
    labels = torch.randint(0, 51, (args.batch_size,)).to(device)

    builds = {
        "plain float32": (plain, plain_split, clip.contiguous(), None),
        "ours float32": (ours, key_residual_split, clip, None),
        "ours bfloat16": (ours, key_residual_split, clip, torch.bfloat16),
    }
    tasks = {"training step": (training_step, True), "test pass": (test_pass, False)}
    times = {(task, build): [] for task in tasks for build in builds}
    for run in range(args.runs + 1):
        for task, (function, training) in tasks.items():
            for build, (model, split, clip, precision) in builds.items():
                model.train(training)
                with autocast(device, precision):  # as the engine: entered once for all batches of a test pass
                    function(model, split, clip, labels, args.stride)  # casts weights, warms caches
                    seconds = timed(function, device, model, split, clip, labels, args.stride)
                if run > 0:
                    times[task, build].append(seconds)

    variant = "downsample" if args.downsample else "full"
    print(
        f"{describe(device)}; torch {torch.__version__}; {args.model}, {args.batch_size} clips of {args.time} frames, "
        f"stride {args.stride}, {args.size} px, {variant}; medians of {args.runs} runs"
    )
    figures = []
    for task in tasks:
        for build in builds:
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
            figures.append(figure)
            print(
                f"{task:14s} {build:14s} {figure['seconds'] * 1e3:9.1f} ms   "
                f"{args.batch_size / figure['seconds']:7.2f} clips/s   "
                f"{figure['speed_up']:5.2f}x plain ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    if device.type == "cuda":
        print(f"peak memory of the process: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"settings": vars(args), "machine": describe(device), "torch": torch.__version__, "figures": figures},
                file,
                indent=2,
            )


def training_step(model, split, clip, labels, stride) -> None:
    key, residual = split(clip, stride)
    loss = F.cross_entropy(model(key, residual).float(), labels)
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    # A fresh context for the next step: weights change between steps, so their casts are not kept.
    torch.clear_autocast_cache()


@torch.no_grad()
def test_pass(model, split, clip, labels, stride) -> None:
    key, residual = split(clip, stride)
    model(key, residual)


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
