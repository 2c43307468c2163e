"""What a training step of the published size moves on a GPU: every operator of more than 20 MB, as PyTorch works it out
for tensors without memory. A profile would show the same list first."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dataset.residual import PADDED_CHANNELS
from models import ReSpike
from models.kernels.layout import is_channels_last
from tests.helpers.fake_gpu import Call, Calls, backward, channels_last, fake_gpu

LARGE = 20e6  # bytes
# The operators that the design has, and how often each moves more than LARGE with ResNet-50 and with ResNet-18.
PLANNED = {
    # batch norms: 21 of the SNN, 16 of them with neurons, and 53 or 20 of the ANN with ReLUs; some are small
    "respike::moments_and_running": (53, 26),
    "respike::batch_norm": (69, 36),
    "respike::batch_norm_backward_sums": (69, 38),
    "respike::batch_norm_backward_input": (69, 36),
    # SNN: 3 layers of neurons behind fusion blocks
    "respike::lif": (3, 3),
    "respike::lif_backward": (3, 3),
    # both branches
    "convolution": (72, 37),
    "convolution_backward": (74, 41),
    "avg_pool2d": (7, 7),  # 3 shortcuts (the stem's currents come pooled), and both inputs of 2 fusion blocks
    "avg_pool2d_backward": (7, 7),
    # ANN
    "max_pool2d_with_indices": (1, 1),
    "max_pool2d_with_indices_backward": (1, 1),
    # fusion: 4 blocks
    "respike::group_norm": (3, 3),
    "respike::group_norm_backward": (4, 4),
    "native_layer_norm": (9, 9),
    "native_layer_norm_backward": (12, 12),
    "addmm": (20, 20),  # projections with a bias
    "mm": (94, 82),  # projections without, and gradients of all
    "sum.dim_IntList": (9, 9),  # gradients of biases
    "bmm": (4, 4),  # upsampling of 2 blocks, forward and backward
    "_scaled_dot_product_cudnn_attention": (8, 8),
    "_scaled_dot_product_cudnn_attention_backward": (8, 8),
    "respike::geglu": (4, 4),
    "respike::geglu_backward": (4, 4),
    "clone": (12, 12),  # steps of a key frame side by side for the attention to the ANN, and back
    # additions: the fusion blocks' skips, and gradients of what goes two ways
    "add.Tensor": (67, 54),
    # the mean over pixels
    "mean.dim": (1, 0),
    "div.Scalar": (2, 1),
}


@pytest.fixture(scope="module", params=[("resnet50", 9), ("resnet18", 9), ("resnet18", 8)], ids=str)
def step(request) -> tuple[str, list[Call]]:
    """32 clips of 16 frames, stride 4, 224 pixels, --downsample, bfloat16: the operators, forward and backward, on a
    GPU of compute capability 9.0 or 8.0."""
    backbone, major = request.param
    with pytest.MonkeyPatch.context() as patch, fake_gpu(patch, torch.bfloat16, (major, 0)):
        model = channels_last(ReSpike(backbone, num_classes=400, stride=4, downsample=True)).train()
        # As `dataset.residual.key_residual_split` lays them out.
        key = torch.empty(32, 4, 224, 224, PADDED_CHANNELS, dtype=torch.bfloat16).permute(0, 1, 4, 2, 3)
        residual = torch.empty(3, *key.permute(0, 1, 3, 4, 2).shape, dtype=torch.bfloat16).permute(1, 2, 0, 5, 3, 4)
        # A tensor that is made without a device lies on the CPU, as in a run on a GPU.
        with torch.device("cpu"), Calls() as calls:
            logits = model(key, residual)
            backward(F.cross_entropy(logits.float(), torch.zeros(32, dtype=torch.int64, device="cuda")))
    attention = {call.name for call in calls.calls if "attention" in call.name}
    own, other = ("cudnn", "flash") if major == 9 else ("flash", "cudnn")
    assert attention and not any(other in name for name in attention)
    # The plan names one of the two; either moves the same.
    named = [replace(call, name=call.name.replace(f"{own}_attention", "cudnn_attention")) for call in calls.calls]
    return backbone, named


def test_nothing_large_moves_that_is_not_planned(step):
    backbone, calls = step
    found = Counter(call.name for call in calls if call.bytes > LARGE)
    column = ("resnet50", "resnet18").index(backbone)
    planned = Counter({name: counts[column] for name, counts in PLANNED.items() if counts[column]})
    more = [str(call) for call in calls if call.bytes > LARGE and found[call.name] > planned[call.name]]
    assert found == planned, "\n".join(more)


def test_everything_large_is_bfloat16(step):
    """But the indices of max pooling, and the gradients of weights that go into float32."""
    for call in step[1]:
        for tensor in (*call.taken, *call.given):
            if tensor.numel() * tensor.element_size() > LARGE and "max_pool" not in call.name:
                assert tensor.dtype == torch.bfloat16, call


def test_everything_large_lies_channels_last_with_steps_outermost(step):
    for call in step[1]:
        for tensor in (*call.taken, *call.given):
            if tensor.numel() * tensor.element_size() < LARGE or tensor.dim() < 4 or call.name == "clone":
                continue
            if call.name in ("mean.dim", "div.Scalar"):  # the mean over pixels, channels moved last
                assert tensor.is_contiguous() or 0 in tensor.stride(), call
                continue
            if "attention" in call.name:  # [N, heads, tokens, 32]: a view of tokens
                assert tensor.stride(-1) == 1, call
            elif tensor.dim() == 5:
                assert is_channels_last(tensor), call
            else:
                assert tensor.is_contiguous(memory_format=torch.channels_last), call


def test_the_kernels_copy_none_of_their_inputs(step):
    """They take tensors of one size in one layout, and copy those that come in another (`laid_out_as`)."""
    for call in step[1]:
        if call.name.startswith("respike::"):
            large = [tensor for tensor in call.taken if tensor.dim() == 5]
            assert all(is_channels_last(tensor) for tensor in large), call
            frames = [tensor for tensor in call.taken if tensor.dim() == 4]
            assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in frames), call
            assert all(tensor.is_contiguous() for tensor in call.taken if tensor.dim() < 4), call


def test_bytes_of_a_step(step):
    """104 GB and 66 GB, each operand of an operator counted once. An H200 reads and writes 4.8 TB/s."""
    backbone, calls = step
    assert sum(call.bytes for call in calls) < {"resnet50": 104.5e9, "resnet18": 66e9}[backbone]


def test_operators_of_a_step(step):
    """Each is a launch or several: the host must be done with them before the GPU is. None updates running
    statistics, which the kernel of the statistics does."""
    backbone, calls = step
    assert len(calls) < {"resnet50": 1240, "resnet18": 920}[backbone]
    assert not any("lerp" in call.name for call in calls)
