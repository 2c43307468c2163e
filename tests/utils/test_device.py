"""Choices that matter on a GPU, without one."""

import pytest
import torch

from utils.device import choose_algorithms, choose_device
from utils.errors import UserError


def test_a_gpu_has_a_number(monkeypatch):
    """torch.cuda.set_device takes no device without one."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(UserError, match="has 2 CUDA devices"):
        choose_device("cuda:2")


def test_a_process_takes_its_own_gpu(monkeypatch):
    """torchrun shows all of them to each process; Slurm may show each its own."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda", local_rank=1, local_processes=2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="give cuda"):
        choose_device("cuda:1", local_rank=1, local_processes=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were started on this machine, it has 1"):
        choose_device("cuda", local_rank=1, local_processes=2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert choose_device("cuda", local_rank=1, local_processes=2) == torch.device("cuda", 0)


@pytest.fixture
def algorithms(monkeypatch):
    """Left as they were."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    kernels = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]
    before = cudnn.benchmark, cudnn.allow_tf32
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.allow_tf32 = before
    for enable, on in zip(
        (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_cudnn_sdp), kernels, strict=True
    ):
        enable(on)


def test_deterministic_attention_is_plain(monkeypatch, algorithms):
    """The fused kernels add in any order as long as PyTorch only warns of such operators. On a CPU they do not."""
    choose_algorithms(deterministic=True)
    assert torch.backends.cuda.flash_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose_algorithms(deterministic=True)
    enabled = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not enabled and not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_float32_is_float32(algorithms):
    choose_algorithms(deterministic=False)
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
