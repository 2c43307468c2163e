"""Triton if it is installed, else stand-ins so that the modules of kernels can be imported."""

import functools
import os
import tempfile

import torch

# Products and sums may be one rounding; newer versions of Triton want this to be set. If it matters, the kernels name
# the rounding themselves.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if os.path.expanduser("~") == "~":  # a user without a home folder: Triton would make one of this name
    os.environ.setdefault("TRITON_HOME", os.path.join(tempfile.gettempdir(), f"respike-{os.getuid()}"))
try:
    import triton
    import triton.language as tl
except ImportError:  # not packaged for this system: everything but the kernels works

    class _NoTriton:
        """Stands in for the modules `triton` and `triton.language` in decorators and annotations."""

        constexpr = None

        @staticmethod
        def jit(function):
            return function

    triton = tl = _NoTriton()

HAS_TRITON = not type(triton).__name__.startswith("_")


@torch.compiler.assume_constant_result
def why_not_on(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, or None. On a CPU they do in Triton's
    interpreter, for tests: TRITON_INTERPRET=1 in the environment from the start."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton; it comes with PyTorch for CUDA on Linux)"
    if device_type == "cpu" and not _interpreted():
        return "Triton kernels run on a GPU, these tensors are on the CPU"
    if device_type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA devices, these tensors are on {device_type!r}"
    if torch.version.hip is not None:
        return "the kernels have not been tried on AMD GPUs"
    if device_type == "cuda" and _capability() < (8, 0):
        return "Triton kernels need a GPU of compute capability 8.0 or newer"
    return None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own function takes 5 microseconds, and a launch calls it several times.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
