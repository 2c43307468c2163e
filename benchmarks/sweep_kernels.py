"""The fused kernels with other tiles, warps and programs than the chosen ones. Needs a CUDA device.

    python -m benchmarks.sweep_kernels
    python -m benchmarks.sweep_kernels --shape 7 64 64 112 112 --layers "batch norm + LIF"

Each line is a setting: milliseconds of the forward and of the backward pass (medians), and the share of the bandwidth
of a copy, as benchmarks/bench_lif.py counts it. The first line is the chosen setting; the last ones are the best.
--compile-only compiles each setting for an H100 instead, without a GPU, and lists registers, spills and instructions.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator

import torch

from benchmarks.bench_lif import LAYERS, PASSES, LayerBench, implementations, measured_copy
from models.kernels import triton_batch_norm

# The names are those of models/kernels/triton_batch_norm.py; each value is tried with each of the others.
SETTINGS = {
    "WARPS": (8, 4),
    "AHEAD": (3, 1),
    "VALUES": ({1: 16, 4: 8, 8: 4, 32: 2}, {1: 8, 4: 4, 8: 2, 32: 1}),
    "REDUCED_VALUES": ({4: 4, 8: 2, 32: 1}, {4: 8, 8: 4, 32: 2}),
    "PROGRAMS_OF_MOMENTS": (4 * 132, 8 * 132),
    "PROGRAMS_OF_SUMS": (2 * 132, 4 * 132),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=5, default=[3, 128, 64, 112, 112], metavar=("S", "N", "C", "H", "W"))
    parser.add_argument("--layers", nargs="+", default=LAYERS[1:], choices=LAYERS[1:])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile-only", action="store_true", help="without a GPU: what the compiler makes of each")
    return parser.parse_args()


def settings() -> Iterator[dict]:
    for values in itertools.product(*SETTINGS.values()):
        yield dict(zip(SETTINGS, values, strict=True))


def use(setting: dict) -> None:
    for name, value in setting.items():
        setattr(triton_batch_norm, name, value)


def main() -> None:
    args = parse_args()
    if args.compile_only:
        return compile_all(args.shape[0])
    device, dtype = torch.device("cuda"), torch.bfloat16
    copy = measured_copy(args.shape, dtype, device, args.rounds)
    size = torch.Size(args.shape).numel() * dtype.itemsize
    for layer in args.layers:
        bench = LayerBench(args.shape, dtype, device, residual="residual" in layer)
        found = []
        for setting in settings():
            use(setting)
            ours = implementations(layer, args.shape[2], device, dtype, False)["ours, triton"]
            times, failed = bench.time({"ours": ours}, args.rounds)
            if failed:
                print(json.dumps({"layer": layer, **setting, "failed": failed["ours"]}))
                continue
            seconds = [statistics.median(part) for part in zip(*times["ours"], strict=True)]
            shares = [passes * size / part / copy for passes, part in zip(PASSES[layer], seconds, strict=True)]
            found.append((sum(seconds), {"ms": [1e3 * part for part in seconds], "share": shares, **setting}))
            print(json.dumps({"layer": layer, **found[-1][1]}))
        print(
            f"best of {layer}:",
            *(json.dumps(line) for _, line in sorted(found, key=lambda item: item[0])[:3]),
            sep="\n  ",
        )


def compile_all(steps: int) -> None:
    from models.kernels.parameters import LIFParameters
    from tests.helpers import compile_kernels

    compiled = compile_kernels.compile_only()
    for setting in settings():
        use(setting)
        del compiled[:]
        compile_kernels.launch_all(steps, torch.bfloat16, compile_kernels.channels_last, LIFParameters())
        for kernel in compiled:
            del kernel["ptx"]
            print(json.dumps({**setting, **kernel}))


if __name__ == "__main__":
    main()
