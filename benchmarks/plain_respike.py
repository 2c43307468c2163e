"""ReSpike as one would first write it, to measure against: a loop over time steps.

Every step runs on its own through SpikingJelly's single-step LIFNode, nn.BatchNorm2d and the fusion
blocks. As in the published code these project with 1x1 convolutions, project the ANN's tokens again
at each step, and form the attention matrix with a softmax; memory is laid out as PyTorch does by
default. (The published code also recomputes each fusion block in the backward pass; this does not.)
It borrows its layers from a `models.ReSpike`, so both compute the same numbers
(tests/models/test_respike.py).
"""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from dataset.residual import IMAGENET_MEAN, IMAGENET_STD
from models import ReSpike
from models.attention import HEAD_WIDTH, Attention, CrossAttentionFusion
from models.batch_norm import FrameBatchNorm2d, StepBatchNorm2d
from models.spiking_resnet import SpikingBlock


def _plain_batch_norm(bn: StepBatchNorm2d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(bn.num_features, dtype=bn.weight.dtype)
    plain.load_state_dict(bn.state_dict())
    return plain


def _lif() -> neuron.LIFNode:
    return neuron.LIFNode(tau=4.0 / 3.0, surrogate_function=surrogate.ATan(), detach_reset=True)


class PlainBlock(nn.Module):
    def __init__(self, block: SpikingBlock):
        super().__init__()
        self.lif1, self.lif2 = _lif(), _lif()
        self.conv1, self.conv2 = block.conv1, block.conv2
        self.bn1, self.bn2 = _plain_batch_norm(block.bn1), _plain_batch_norm(block.bn2)
        self.shortcut = None
        if block.shortcut_conv is not None:
            pool = nn.AvgPool2d(block.stride)
            self.shortcut = nn.Sequential(pool, block.shortcut_conv, _plain_batch_norm(block.shortcut_bn))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(self.lif1(x)))
        out = self.bn2(self.conv2(self.lif2(out)))
        return out + (x if self.shortcut is None else self.shortcut(x))


class PlainFusion(nn.Module):
    """One time step of `CrossAttentionFusion`: snn [N, C, H, W], ann [N, C_ann, H, W] -> [N, C, H, W]."""

    def __init__(self, fusion: CrossAttentionFusion):
        super().__init__()
        self.fusion = fusion
        self.proj_in, self.proj_out = _pointwise_conv(fusion.proj_in), _pointwise_conv(fusion.proj_out)

    def forward(self, snn: Tensor, ann: Tensor) -> Tensor:
        f = self.fusion
        if f.pool > 1:
            snn, ann = F.avg_pool2d(snn, f.pool), F.avg_pool2d(ann, f.pool)
        context = ann.flatten(2).transpose(1, 2)
        normed = F.group_norm(snn, f.norm.num_groups, f.norm.weight, f.norm.bias, f.norm.eps)
        tokens = self.proj_in(normed).flatten(2).transpose(1, 2)
        normed = f.norm_self(tokens)
        tokens = tokens + _softmax_attention(f.attend_self, normed, normed)
        tokens = tokens + _softmax_attention(f.attend_ann, f.norm_cross(tokens), context)
        tokens = tokens + f.feed_forward(f.norm_feed_forward(tokens))
        fused = self.proj_out(tokens.transpose(1, 2).unflatten(2, snn.shape[2:])) + snn
        if f.pool > 1:
            fused = F.interpolate(fused, scale_factor=f.pool, mode="bilinear")
        return fused


def _pointwise_conv(linear: nn.Linear) -> nn.Conv2d:
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, dtype=linear.weight.dtype)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    return conv


def _softmax_attention(attention: Attention, tokens: Tensor, context: Tensor) -> Tensor:
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, HEAD_WIDTH)).transpose(1, 2)
        for layer, x in ((attention.to_q, tokens), (attention.to_k, context), (attention.to_v, context))
    )
    weights = (q @ k.transpose(-1, -2) * HEAD_WIDTH**-0.5).softmax(-1)  # [N, heads, HW, HW]
    return attention.to_out((weights @ v).transpose(1, 2).flatten(2))


def plain_split(clip: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """uint8 clip [B, T, 3, H, W] -> key, residual: normalise every frame, subtract, as it comes."""
    mean, std = (torch.tensor(x, device=clip.device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    segments = ((clip.float() / 255 - mean) / std).unflatten(1, (-1, stride))  # [B, K, stride, 3, H, W]
    return segments[:, :, 0], segments[:, :, 1:] - segments[:, :, :1]


class PlainReSpike(nn.Module):
    def __init__(self, model: ReSpike):
        super().__init__()
        self.ann = model.ann
        for module in self.ann.modules():
            if isinstance(module, FrameBatchNorm2d):
                module.backend = "reference"  # PyTorch's batch norm
        self.stem = nn.Sequential(model.snn.stem.conv, _plain_batch_norm(model.snn.stem.bn))
        self.stages = nn.ModuleList(
            nn.Sequential(*[PlainBlock(block) for block in stage]) for stage in model.snn.stages
        )
        self.fusions = nn.ModuleList(None if fusion is None else PlainFusion(fusion) for fusion in model.fusions)
        self.head = model.head

    def forward(self, key: Tensor, residual: Tensor) -> Tensor:
        functional.reset_net(self)
        batch, key_frames, steps = residual.shape[:3]
        ann_features = []
        x = self.ann.stem(key.flatten(0, 1))
        for stage in self.ann.stages:
            x = stage(x)
            ann_features.append(x)
        total = 0
        for step in range(steps):
            x = self.stem(residual[:, :, step].flatten(0, 1))
            for stage, fusion, ann in zip(self.stages, self.fusions, ann_features, strict=True):
                x = stage(x)
                if fusion is not None:
                    x = fusion(x, ann)
            total = total + x
        features = torch.cat([ann_features[-1], total / steps], dim=1)
        logits = self.head(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits.unflatten(0, (batch, key_frames)).mean(1)
