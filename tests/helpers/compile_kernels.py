"""Compiles the Triton kernels for an H100 without one and prints what each needs.

    python -m tests.helpers.compile_kernels 3 15

A line of JSON for each launch: the kernel and its `resources`. Launches are stopped after compilation: nothing is
computed.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dataset import residual_kernel
from models.kernels import geglu, group_norm, operators, packing
from models.kernels.parameters import LIFParameters

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _Driver:
    """As much of a driver as compilation asks for."""

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return 9, 0


def compile_only() -> list[dict]:
    """From here on launches compile and are listed, not run."""
    triton.runtime.driver.set_active(_Driver())
    compiled, run = [], JITFunction.run

    def compiling(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        about = {"kernel": self.__name__.lstrip("_"), "fires": kwargs.get("FIRE", True)}
        compiled.append({**about, **resources(kernel.asm["cubin"]), "ptx": kernel.asm["ptx"]})
        return kernel

    JITFunction.run = compiling
    return compiled


def resources(cubin: bytes) -> dict:
    """Registers a thread, bytes spilled to memory, instructions of the machine's code (of the whole kernel, and of
    its longest loop; 0: it has none), and loads of 16 bytes before the first store."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, code = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    at = [int(number, 16) for number in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?!NOP)", code, re.M)]
    jumps = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/.*BRA.*?0x([0-9a-f]+)", code, re.M)
    jumps = [(int(to, 16), int(here, 16)) for here, to in jumps]
    loops = [sum(to <= number <= here for number in at) for to, here in jumps if to < here]
    return {
        "registers": int(re.search(r"REG:(\d+)", used)[1]),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", used)[1]),
        "instructions": len(at),
        "in_loop": max(loops, default=0),
        "wide_loads_first": code.partition(" STG.")[0].count("LDG.E.128"),
    }


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def launch_all(steps: int, dtype: torch.dtype, layout, p: LIFParameters) -> None:
    x = layout(torch.zeros(steps, 4, 64, 56, 56, dtype=dtype))  # enough tiles for a program to have several
    row = torch.ones(steps, 64)
    weight = torch.ones(64)
    neuron = p.text
    operators.lif(x, None, False, neuron)
    operators.lif_backward(x, None, x, None, False, neuron)
    operators.moments(x)
    layer = (x, row, row, weight, weight)
    weighted = torch.ones(steps, 2, 64)
    eps = 1e-5
    for residual, keep_sum, fire, relu in (
        (None, False, True, False), (x, True, True, False), (x, True, False, False), (None, True, False, True),
        (x, True, False, True),
    ):  # fmt: skip
        operators.batch_norm(*layer, residual, None, eps, True, keep_sum, fire, relu, False, neuron)
        total = x if keep_sum and (fire or (relu and residual is not None)) else None
        grads = (x if keep_sum else None, x if fire else None)
        operators.batch_norm_backward_sums(*layer, total, *grads, eps, fire, relu, False, neuron)
        if total is None:
            operators.batch_norm_backward_input(
                *layer, *grads, weighted, None, eps, fire, relu, False, neuron
            )  # fmt: skip
    pooled = layout(torch.zeros(steps, 4, 64, 28, 28, dtype=dtype))
    operators.batch_norm(*layer, None, None, eps, True, True, True, False, True, neuron)
    operators.batch_norm_backward_sums(*layer, None, pooled, x, eps, True, False, True, neuron)
    operators.batch_norm_backward_input(
        *layer, pooled, x, weighted, None, eps, True, False, True, neuron
    )  # fmt: skip


def launch_others(dtype: torch.dtype) -> None:
    """Spikes as bits, the split of clips, and neurons of other kinds with a state before and after."""
    spikes = channels_last(torch.zeros(3, 2, 64, 4, 4, dtype=dtype))
    packed = torch.zeros(spikes.numel() // 8, dtype=torch.uint8)
    packing._pack_kernel[(1,)](spikes, packed, spikes.numel(), BYTES=512, num_warps=4)
    packing._unpack_kernel[(1,)](packed, spikes, spikes.numel(), BYTES=512, num_warps=4)
    features = torch.zeros(2, 64, 14, 14, dtype=dtype)
    group_norm._group_norm(features, 32, torch.ones(64), torch.ones(64), 1e-6)
    group_norm._group_norm_backward(features, features, 32, torch.ones(64), 1e-6)
    geglu._geglu(torch.zeros(8, 128, dtype=dtype))
    geglu._geglu_backward(torch.zeros(8, 128, dtype=dtype), torch.zeros(8, 64, dtype=dtype))
    frames = torch.zeros(1, 2, 4, 8, 8, 3, dtype=torch.uint8)
    residual_kernel.split(frames, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3), dtype, channels=8)
    row, weight = torch.ones(3, 64), torch.ones(64)
    # statistics with a number of values in memory, fixed ones, and running ones; frames alone
    for x, weighted, count in (
        (spikes, torch.ones(3, 2, 64), torch.ones((), dtype=torch.float64)),
        (spikes[:1], None, None),
    ):
        layer = (x, row[: len(x)], row[: len(x)], weight, weight)
        plain = (1e-5, False, False, False, LIFParameters().text)
        operators.batch_norm_backward_input(*layer, x, None, weighted, count, *plain)
        for running in (weight, row[: len(x)]):
            operators.moments_and_running(x, running, running, torch.zeros((), dtype=torch.int64), 0.1)
    layer, v = (spikes, row, row, weight, weight), torch.zeros(spikes.shape[1:])
    for surrogate, v_reset in (("sigmoid", None), ("triangle", -0.3)):
        neuron = LIFParameters(surrogate=surrogate, v_reset=v_reset, detach_reset=False).text
        operators.lif(spikes, v, True, neuron)
        operators.lif_backward(spikes, v, spikes, v, True, neuron)
        operators.batch_norm(*layer, None, None, 1e-5, True, False, True, False, False, neuron)
        operators.batch_norm_backward_sums(*layer, None, None, spikes, 1e-5, True, False, False, neuron)


if __name__ == "__main__":
    compiled = compile_only()
    for steps in [int(word) for word in sys.argv[1:]] or [3]:
        for dtype, layout in ((torch.bfloat16, channels_last), (torch.float32, lambda x: x)):
            del compiled[:]
            launch_all(steps, dtype, layout, LIFParameters())
            if steps == 3 and dtype == torch.bfloat16:
                launch_others(dtype)
            for kernel in compiled:
                loads = re.findall(r"ld\.global\S*", kernel.pop("ptx"))
                print(json.dumps({"steps": steps, "dtype": str(dtype), **kernel, "loads": sorted(set(loads))}))
