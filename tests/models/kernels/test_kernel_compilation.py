"""The Triton kernels compile for an H100, without one: what the interpreter cannot tell."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.script import ROOT
from utils.triton_language import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not packaged for this system")
def test_kernels_compile_without_spilling_registers(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.compile_kernels", "3"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 2 * (11 + 3 + 8)
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        if kernel["dtype"] == "torch.bfloat16" and kernel["kernel"] in ("_forward_kernel", "_backward_kernel"):
            # (States before and after are float32, and as wide.)
            assert kernel["loads"] == ["ld.global.v4.b32"], kernel  # 16 bytes each
