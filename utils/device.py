"""Choose a device, a precision, algorithms; set, save and restore the random state."""

import os
import random
import resource
import sys

import torch

from utils.errors import UserError


def choose_device(name: str, local_rank: int = 0, local_processes: int = 1) -> torch.device:
    """The device named "cuda", "cuda:N" or "cpu"; a GPU becomes the current one. In one of several processes on this
    machine "cuda" is its own. Raises UserError for other names and for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise UserError(f"{name}: expected cuda, cuda:N or cpu", about="device")
    if device.type == "cpu":
        return device
    there, index = torch.cuda.device_count(), device.index or 0
    if "WORLD_SIZE" in os.environ and device.index is None and there:
        # A scheduler may let each process see one device only; torchrun shows all of them to each.
        sees_its_own = there == 1 and (local_processes == 1 or "TORCHELASTIC_RUN_ID" not in os.environ)
        if local_processes > there and not sees_its_own:
            raise UserError(
                f"cuda: {local_processes} processes were started on this machine, it has {there} CUDA devices; "
                "start one a device (--nproc-per-node)",
                about="device",
            )
        index = 0 if sees_its_own else local_rank
    elif local_processes > 1 and device.index is not None:
        raise UserError(f"{name}: each of several processes takes its own GPU; give cuda", about="device")
    if index >= there:
        raise UserError(f"{name}: this machine has {there} CUDA devices; use cpu", about="device")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def choose_precision(device: torch.device, amp: bool) -> torch.dtype | None:
    """The autocast type: bfloat16 where the hardware computes in it, float16 on older GPUs, None for float32."""
    if not amp:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else None


def choose_algorithms(deterministic: bool) -> None:
    """Of cuDNN, cuBLAS and PyTorch: the fastest found by trying, which may differ from run to run, or those that
    give the same numbers every time."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    if deterministic and torch.cuda.is_available():
        # Their backward passes add in any order, unless PyTorch may refuse every operator that does.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


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


def seed_all(seed: int) -> None:
    """Seed every global generator. NumPy's is not used anywhere."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The state of every global generator, in types that `torch.load(weights_only=True)` takes."""
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
