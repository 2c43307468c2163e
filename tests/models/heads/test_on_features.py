"""Heads on features, and on frames."""

import torch
from torch import nn

from models.heads.cnn import FrameCNN
from models.heads.on_features import OnFeatures, OnFrames


def test_features_are_standardised_and_shown_for_some_steps():
    features = torch.randn(4, 2, 3) * 5 + 7  # [T, B, width]
    mean, deviation = features.flatten(0, 1).mean(0), features.flatten(0, 1).std(0, correction=0)
    seen = OnFeatures(nn.Identity(), 3, mean, deviation)(features)
    assert seen.shape == (12, 2, 3)
    torch.testing.assert_close(seen.flatten(0, 1).mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.flatten(0, 1).std(0, correction=0), torch.ones(3))
    for step in range(12):
        assert torch.equal(seen[step], (features[step // 3] - mean) / deviation)


def test_frames_go_through_the_cnn():
    cnn, clips = FrameCNN("resnet18", "none"), torch.randn(2, 3, 3, 32, 32)  # [B, T, 3, H, W]
    network = OnFrames(cnn, nn.Identity(), 1, torch.zeros(cnn.width), torch.ones(cnn.width)).eval()
    seen = network(clips)
    assert seen.shape == (3, 2, 512)
    for clip in range(2):
        torch.testing.assert_close(seen[:, clip], cnn(clips[clip]))
    seen.sum().backward()
    assert all(parameter.grad is not None for parameter in cnn.parameters())
