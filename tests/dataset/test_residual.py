import pytest
import torch

from dataset.residual import IMAGENET_MEAN, IMAGENET_STD, RESIDUALS, check_stride, key_residual_split
from utils.errors import UserError


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_split_of_a_float_clip(stride):
    clip = torch.randn(2, 8, 3, 6, 10, dtype=torch.float64)
    key, residual = key_residual_split(clip, stride)
    assert key.shape == (2, 8 // stride, 3, 6, 10) and residual.shape == (2, 8 // stride, stride - 1, 3, 6, 10)
    assert key.dtype == residual.dtype == torch.float64
    for segment in range(8 // stride):
        first = clip[:, segment * stride]
        assert torch.equal(key[:, segment], first)
        for step in range(1, stride):
            assert torch.equal(residual[:, segment, step - 1], clip[:, segment * stride + step] - first)


def test_residuals_to_the_previous_frame_or_to_none():
    clip = torch.randn(2, 8, 3, 6, 10, dtype=torch.float64)
    frames = clip.unflatten(1, (2, 4))
    for minus, want in (("previous", frames[:, :, 1:] - frames[:, :, :-1]), ("none", frames[:, :, 1:])):
        key, residual = key_residual_split(clip, 4, minus=minus)
        assert torch.equal(key, frames[:, :, 0]) and torch.equal(residual, want)
    with pytest.raises(UserError, match="minus must be one of key, previous, none, got 'last'"):
        key_residual_split(clip, 4, minus="last")


@pytest.mark.parametrize("minus", RESIDUALS)
def test_uint8_is_normalised_per_channel(minus):
    clip = torch.randint(0, 256, (2, 4, 3, 5, 7), dtype=torch.uint8)
    key, residual = key_residual_split(clip, 4, minus=minus)
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = (clip.double() / 255 - mean) / std
    want_key, want_residual = key_residual_split(normalised, 4, minus=minus)
    torch.testing.assert_close(key, want_key.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(residual, want_residual.float(), rtol=1e-5, atol=1e-6)


def test_a_static_clip_has_exactly_zero_residuals():
    frame = torch.randint(0, 256, (3, 1, 3, 8, 8), dtype=torch.uint8)
    _, residual = key_residual_split(frame.expand(3, 16, 3, 8, 8), 4)
    assert torch.equal(residual, torch.zeros_like(residual))


def test_brightening_is_positive():
    clip = torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8)
    clip[:, 1] = 255
    _, residual = key_residual_split(clip, 2)
    torch.testing.assert_close(residual[0, 0, 0, :, 0, 0], 1 / torch.tensor(IMAGENET_STD))


def test_memory_is_as_the_network_reads_it():
    key, residual = key_residual_split(torch.zeros(2, 8, 3, 6, 10, dtype=torch.uint8), 4)
    assert key.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    steps_first = residual.movedim(2, 0).flatten(0, 2)
    assert steps_first.data_ptr() == residual.data_ptr()  # a view, not a copy
    assert steps_first.is_contiguous(memory_format=torch.channels_last)


def test_zeros_behind_the_colours():
    clip = torch.randint(0, 256, (2, 8, 3, 6, 10), dtype=torch.uint8)
    for padded, plain in zip(key_residual_split(clip, 4, channels=8), key_residual_split(clip, 4), strict=True):
        colours, zeros = padded.movedim(-3, 0).split([3, 5])
        assert torch.equal(colours, plain.movedim(-3, 0)) and not zeros.any()
        assert padded.movedim(-3, -1).stride(-2) == 8  # channels-last


@pytest.mark.parametrize("frames, stride", [(16, 1), (16, 0), (16, 3), (2, 4), (16, -4)])
def test_refused_strides(frames, stride):
    for call in (
        lambda: check_stride(frames, stride),
        lambda: key_residual_split(torch.zeros(1, frames, 3, 4, 4), stride),
    ):
        with pytest.raises(UserError, match="stride"):
            call()


def test_refused_clips():
    with pytest.raises(UserError, match=r"\[B, T, 3, H, W\]"):
        key_residual_split(torch.zeros(1, 3, 8, 4, 4), 4)
    with pytest.raises(UserError, match="uint8 or floating point"):
        key_residual_split(torch.zeros(1, 8, 3, 4, 4, dtype=torch.int32), 4)
