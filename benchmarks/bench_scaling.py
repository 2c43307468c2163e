"""A training step by T, stride, size and number of processes, on this machine.

    python -m benchmarks.bench_scaling                                              # T, stride, size
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 -m benchmarks.bench_scaling --processes
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.bench_scaling --processes

Forward, backward and SGD of the network alone, from random uint8 clips, in the precision that training
takes. Prints medians, the count of operations (torch.utils.flop_counter, forward and backward) and what
share of the time gradients take to be averaged. benchmarks/scaling.md says what follows.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dataset.residual import key_residual_split
from models import ReSpike
from utils.device import device_name
from utils.runtime import Runtime, join_run

# (T, stride, size): one of them changes at a time.
GRID = [(16, 4, 224), (8, 4, 224), (32, 4, 224), (16, 2, 224), (16, 8, 224), (16, 4, 128), (16, 4, 160), (16, 2, 128)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("-b", "--batch-size", type=int, default=1, help="clips a process")
    parser.add_argument("--runs", type=int, default=5, help="counted steps; one more warms up")
    parser.add_argument("--processes", action="store_true", help="one shape, in the processes torchrun started")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.processes and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(1)
    runtime = join_run(args.device, amp=True)
    device = runtime.device
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads each; torch {torch.__version__}; {args.model}, "
        f"downsample, {args.batch_size} clips a process, {runtime.precision}; medians of {args.runs}"
    )
    for frames, stride, size in [(16, 4, 128)] if args.processes else GRID:
        torch.manual_seed(0)
        model = ReSpike(args.model, num_classes=400, stride=stride, downsample=True)
        model = model.to(device, memory_format=torch.channels_last)
        step = Step(runtime.replicate(model), (args.batch_size, frames, size), stride, runtime)
        if not args.processes:
            with FlopCounterMode(display=False) as counter:
                step()
        seconds = [step() for _ in range(args.runs + 1)][1:]
        median = statistics.median(seconds)
        line = (
            f"T {frames:2d} stride {stride} size {size}, {runtime.count} processes: {median * 1e3:8.1f} ms "
            f"({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}), "
            f"{runtime.count * args.batch_size / median:.3f} clips/s"
        )
        if not args.processes:
            operations = counter.get_total_flops() / args.batch_size
            line += f", {operations / 1e9:.0f} GFLOP a clip, {operations * args.batch_size / median / 1e9:.0f} GFLOP/s"
        print(line, flush=True)
    if dist.is_initialized():
        print(f"averaging the gradients of {sum(p.numel() for p in model.parameters()):,} parameters alone: ", end="")
        print(f"{averaging_seconds(model, args.runs) * 1e3:.1f} ms")
        dist.destroy_process_group()


class Step:
    """One optimizer step on the same random clips; returns its seconds."""

    def __init__(self, network, shape: tuple[int, int, int], stride: int, runtime: Runtime):
        batch, frames, size = shape
        clip = torch.randint(0, 256, (batch, frames, size, size, 3), dtype=torch.uint8)
        self.clip = clip.permute(0, 1, 4, 2, 3).to(runtime.device)
        self.labels = torch.zeros(batch, dtype=torch.long, device=runtime.device)
        self.network, self.stride, self.runtime = network, stride, runtime
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def __call__(self) -> float:
        self._synchronise()
        start = time.perf_counter()
        key, residual = key_residual_split(self.clip, self.stride)
        with self.runtime.autocast():
            loss = F.cross_entropy(self.network(key, residual).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


def averaging_seconds(model, runs: int) -> float:
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=next(model.parameters()).device)
    seconds = []
    for _ in range(runs + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        if gradients.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
