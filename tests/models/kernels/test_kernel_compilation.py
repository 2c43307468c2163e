"""The Triton kernels compile for an H100, without one: what the interpreter cannot tell."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.script import ROOT
from utils.triton_language import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not packaged for this system")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    cache = str(tmp_path_factory.mktemp("triton"))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels", "3"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 79
    return kernels


def test_no_kernel_spills_registers(compiled):
    for kernel in compiled:
        assert kernel["spilled_bytes"] == 0, kernel


def test_loads_are_as_wide_as_they_can_be(compiled):
    names = {"forward_kernel", "backward_kernel", "backward_input_kernel", "moments_kernel"}
    assert names <= {kernel["kernel"] for kernel in compiled}
    for kernel in compiled:
        if kernel["dtype"] == "torch.bfloat16" and kernel["kernel"] in names:
            # (States before and after are float32, and as wide. The number of values over processes is a float64.)
            assert set(kernel["loads"]) - {"ld.global.b64"} == {"ld.global.v4.b32"}, kernel  # 16 bytes each


def test_steps_are_loaded_ahead_of_stores(compiled):
    """A forward kernel asks for at least the second step before it writes the first: the compiler moves no load past
    a store."""
    compiled = [kernel for kernel in compiled if kernel["dtype"] == "torch.bfloat16"]
    forward = [kernel for kernel in compiled if kernel["kernel"] == "forward_kernel" and kernel["fires"]]
    assert len(forward) >= 6
    for kernel in forward:
        assert kernel["wide_loads_first"] >= 2, kernel


def test_sums_are_bound_by_memory(compiled):
    """An H200 has 28 tera-instructions a second and 4.8 TB/s: for the 4 bytes that a value and step is read with it can
    spend 24 instructions. The kernel's loop handles 4 values at 3 steps; on the code before it were 58."""
    sums = [
        kernel
        for kernel in compiled
        if kernel["kernel"] == "backward_sums_kernel" and kernel["fires"] and kernel["in_loop"]
    ]
    assert {kernel["dtype"] for kernel in sums} >= {"torch.bfloat16"}
    for kernel in sums:
        if kernel["dtype"] == "torch.bfloat16":
            # At 128 registers a multiprocessor holds two programs of 256 threads.
            assert kernel["registers"] <= 128 and kernel["in_loop"] <= 40 * 12, kernel
