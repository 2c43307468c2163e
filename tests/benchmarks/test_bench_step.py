"""The attention kernels that the benchmark of a step compares."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from benchmarks.bench_step import WithAttention, attention_kernels


def test_kernels_that_a_device_lacks_are_left_out():
    assert attention_kernels(torch.device("cpu"), torch.float32) == [SDPBackend.FLASH_ATTENTION]


class _Asks(nn.Module):
    def forward(self, key, residual):
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()


def test_the_network_sees_the_kernel_that_was_named_alone():
    assert WithAttention(_Asks(), SDPBackend.CUDNN_ATTENTION)(None, None) == (True, False)
    assert WithAttention(_Asks(), SDPBackend.FLASH_ATTENTION)(None, None) == (False, True)
