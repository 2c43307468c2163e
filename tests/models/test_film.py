"""Fusion by gain and shift."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.residual import key_residual_split
from models import ReSpike
from models.film import FilmFusion
from utils.energy import count_operations

pytestmark = pytest.mark.usefixtures("one_thread")


def trained_block(channels: int = 64, ann_channels: int = 96) -> FilmFusion:
    """A block whose gain and shift are not zero."""
    block = FilmFusion(channels, ann_channels)
    for layer in (block.to_gain, block.to_shift):
        nn.init.normal_(layer.weight, std=0.2)
        nn.init.normal_(layer.bias, std=0.2)
    return block


def by_hand(block: FilmFusion, snn: Tensor, ann: Tensor) -> Tensor:
    """Place by place and step by step: the ResNet's features of a pixel, normalised, times two matrices."""
    normed = F.group_norm(ann, 32, block.norm.weight, block.norm.bias, 1e-6)
    fused = torch.empty_like(snn)
    for n in range(snn.shape[1]):
        for y in range(snn.shape[3]):
            for x in range(snn.shape[4]):
                gain = block.to_gain.weight[:, :, 0, 0] @ normed[n, :, y, x] + block.to_gain.bias
                shift = block.to_shift.weight[:, :, 0, 0] @ normed[n, :, y, x] + block.to_shift.bias
                for step in range(len(snn)):
                    fused[step, n, :, y, x] = snn[step, n, :, y, x] * (1 + gain) + shift
    return fused


def test_gain_and_shift_belong_to_a_place():
    block = trained_block().double()
    snn, ann = torch.randn(3, 2, 64, 3, 5).double(), torch.randn(2, 96, 3, 5).double()
    torch.testing.assert_close(block(snn, ann), by_hand(block, snn, ann), rtol=1e-10, atol=1e-10)
    ann[1, :, 2, 4] += torch.randn(96).double()
    moved = (block(snn, ann) - by_hand(block, snn, ann)).abs().amax((0, 2))
    assert moved.max() < 1e-9


def test_gradients():
    block = trained_block(32, 32).double()
    snn = torch.randn(2, 1, 32, 1, 2, dtype=torch.float64, requires_grad=True)
    ann = torch.randn(1, 32, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (snn, ann))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_lies_in_memory_as_the_currents_do(dtype):
    """Time first and channels-last, as the next batch norm reads it; in the type of the currents under autocast."""
    block = trained_block().to(memory_format=torch.channels_last)
    snn = torch.randn(3, 2, 4, 6, 64).to(dtype).permute(0, 1, 4, 2, 3)
    ann = torch.randn(2, 4, 6, 96).to(dtype).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        fused = block(snn, ann)
    assert fused.dtype == dtype and fused.stride() == snn.stride()
    torch.testing.assert_close(fused.float(), by_hand(block, snn.float(), ann.float()), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backbone, ann_channels", [("resnet18", 64), ("resnet50", 256)])
def test_operations_by_hand(backbone, ann_channels):
    """4 key frames, 12 residual frames. Channels double where a side of the frame halves."""
    with torch.device("meta"):
        model = ReSpike(backbone, 51, 4, downsample=True, fusion="film")
    counts = count_operations(model, 16, 224)
    for stage in range(4):
        pixels, snn, ann = (56 // 2**stage) ** 2, 64 * 2**stage, ann_channels * 2**stage
        name = f"fusion.stage{stage + 1}"
        assert counts[f"{name}.gain"] == counts[f"{name}.shift"] == 4 * pixels * snn * ann
        assert counts[f"{name}.modulation"] == 12 * pixels * snn
    assert counts["total.fusion"] == sum(value for name, value in counts.items() if name.startswith("fusion."))


@pytest.mark.parametrize("backbone, share", [("resnet18", 0.06), ("resnet50", 0.19)])
def test_costs_a_small_part_of_cross_attention(backbone, share):
    with torch.device("meta"):
        networks = [ReSpike(backbone, 51, 4, fusion=fusion) for fusion in ("film", "cross")]
    film, cross = (count_operations(network, 16, 224)["total.fusion"] for network in networks)
    assert film < share * cross


def test_works_at_the_full_size_of_each_stage():
    """Downsample decides which stages are fused, and not at what size."""
    key, residual = key_residual_split(torch.randn(1, 4, 3, 64, 64), 4)
    for downsample, sizes in ((True, [16, 8, 4, 2]), (False, [8, 4, 2])):
        model, seen = ReSpike("resnet18", 3, 4, downsample, fusion="film").eval(), []
        for fusion in filter(None, model.fusions):
            fusion.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(inputs[0].shape[-1]))
        with torch.no_grad():
            model(key, residual)
        assert seen == sizes
