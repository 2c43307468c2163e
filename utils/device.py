"""Which device, in which precision, and what it holds."""

import contextlib
import os
import resource
import sys

import torch

from utils.distributed import local_processes
from utils.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device named "cuda", "cuda:N" or "cpu"; "cuda" is this process's own where several share the
    machine. Raises UserError for others and for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: expected cuda, cuda:N or cpu")
    processes_here = local_processes()
    if device.type == "cuda" and processes_here > 1:
        if device.index is not None:
            raise UserError(f"--device {name}: each of several processes takes its own GPU; give --device cuda")
        if processes_here > torch.cuda.device_count():
            raise UserError(
                f"--device cuda: {processes_here} processes were started on this machine, it has "
                f"{torch.cuda.device_count()} CUDA devices; start one a device (--nproc-per-node)"
            )
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def choose_precision(device: torch.device, amp: bool) -> torch.dtype | None:
    """The autocast type: bfloat16 where the hardware computes in it, float16 on older GPUs, None for float32."""
    if not amp:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else None


def autocast(device: torch.device, precision: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the run has held so far: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
