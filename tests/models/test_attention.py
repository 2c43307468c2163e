"""The fusion block: its upsampling, and the types that it keeps on a GPU. Numbers: test_golden.py."""

import pytest
import torch
import torch.nn.functional as F

from models import ReSpike
from models.attention import CrossAttentionFusion, GroupNorm, LayerNorm, LeanFusion, _bilinear_matrix, upsample_tokens
from tests.helpers.fake_gpu import backward, fake_gpu
from utils.energy import count_operations


@pytest.mark.parametrize("height, width, factor", [(14, 14, 4), (3, 5, 2), (1, 2, 4)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 3e-6)], ids=str)
def test_upsampling_is_bilinear_interpolation(dtype, tolerance, height, width, factor):
    images = torch.randn(6, 8, height, width, dtype=dtype, requires_grad=True)
    want = F.interpolate(images.double(), scale_factor=factor, mode="bilinear", align_corners=False)
    got = upsample_tokens(images.flatten(2).transpose(1, 2), height, width, factor)
    got = got.transpose(1, 2).unflatten(2, (factor * height, factor * width))
    weights = torch.randn_like(want)
    for a, b in ((got, want), (torch.autograd.grad(out, images, weights.to(out))[0] for out in (got, want))):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def test_half_precision_is_rounded_once():
    """The weights are exact in bfloat16 and the sum is formed in float32."""
    images = torch.randn(2, 8, 6, 6).bfloat16()
    want = F.interpolate(images.float(), scale_factor=4, mode="bilinear", align_corners=False)
    got = upsample_tokens(images.flatten(2).transpose(1, 2), 6, 6, 4).transpose(1, 2).unflatten(2, (24, 24))
    torch.testing.assert_close(got, want.bfloat16(), rtol=2**-8, atol=1e-6)


def test_a_cached_matrix_can_be_trained_with():
    with torch.inference_mode():
        upsample_tokens(torch.randn(1, 15, 4), 5, 3, 2)
    tokens = torch.randn(1, 15, 4, requires_grad=True)
    upsample_tokens(tokens, 5, 3, 2).sum().backward()
    torch.testing.assert_close(tokens.grad.sum(), torch.tensor(4.0 * 60))


def test_a_recorded_cuda_graph_reads_no_matrix_that_the_cache_may_drop(monkeypatch):
    with fake_gpu(monkeypatch):
        tokens = torch.empty(1, 15, 4)
        for recording, kept in ((True, 0), (False, 1)):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
            _bilinear_matrix.cache_clear()
            upsample_tokens(tokens, 5, 3, 2)
            assert _bilinear_matrix.cache_info().currsize == kept
    _bilinear_matrix.cache_clear()  # without the tensors that have no memory


@pytest.mark.parametrize("block", [CrossAttentionFusion, LeanFusion])
@pytest.mark.parametrize("pool", [4, 2, 1])
def test_the_block_keeps_the_type_of_its_input_on_a_gpu(monkeypatch, pool, block):
    """CUDA's autocast runs interpolation in float32: the spiking stream behind the block would have twice the bytes."""
    with fake_gpu(monkeypatch, torch.bfloat16):
        block = block(64, 32, pool)
        snn, ann = torch.empty(3, 2, 64, 8, 8, dtype=torch.bfloat16), torch.empty(2, 32, 8, 8, dtype=torch.bfloat16)
        fused = block(snn.requires_grad_(), ann)
        assert fused.dtype == torch.bfloat16 and fused.shape == snn.shape
        backward(fused.float().sum())
        assert snn.grad.dtype == torch.bfloat16
        assert all(parameter.grad.dtype == torch.float32 for parameter in block.parameters())


@pytest.mark.parametrize("norm", [LayerNorm(64), GroupNorm(32, 64)], ids=lambda norm: type(norm).__name__)
def test_norms_keep_bfloat16_with_statistics_in_float32(norm):
    """Behind a mean of 100 deviations, statistics in bfloat16 would leave nothing of the values."""
    x = 1.0 + torch.randn(4, 64, dtype=torch.float64) / 100
    x = x.bfloat16()
    if isinstance(norm, GroupNorm):
        x = x[:, :, None, None].expand(-1, -1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), norm.double()(x.double()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pool", [4, 1])
def test_lean_fusion_is_attention_to_pooled_tokens(pool):
    """Written a second time: patches ask, 4 x 4 averages of the ANN answer, bilinear interpolation, addition."""
    block = LeanFusion(64, 32, pool).double()
    torch.nn.init.normal_(block.attend_ann.to_out.weight)
    snn, ann = torch.randn(3, 2, 64, 8, 8).double(), torch.randn(2, 32, 8, 8).double()
    answers = block.norm_ann(F.avg_pool2d(ann, 2).flatten(2).transpose(1, 2))  # 8 pixels are more than 7 tokens
    for step in range(3):
        asks = block.norm(F.avg_pool2d(snn[step], pool).flatten(2).transpose(1, 2))
        found = block.attend_ann(asks, answers).transpose(1, 2).unflatten(2, (8 // pool, 8 // pool))
        want = snn[step] + F.interpolate(found, scale_factor=pool, mode="bilinear", align_corners=False)
        torch.testing.assert_close(block(snn, ann)[step], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [4, 2])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("downsample", [True, False])
def test_lean_fusion_costs_less_than_a_quarter(backbone, stride, downsample):
    networks = [ReSpike(backbone, 51, stride, downsample, fusion=fusion) for fusion in ("cross", "lean")]
    cross, lean = (count_operations(network, 16, 224)["total.fusion"] for network in networks)
    assert 0 < lean < cross / 4


def test_lean_fusion_is_linear_in_pixels():
    network = ReSpike("resnet18", 51, 4, downsample=False, fusion="lean")
    small, large = (count_operations(network, 4, size)["total.fusion"] for size in (448, 896))
    assert large < 4 * small
