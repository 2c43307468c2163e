"""Feature-wise linear modulation by place: the ResNet's features scale and shift the SNN's currents at their place."""

import torch
from torch import Tensor, nn

from models.attention import NORM_GROUPS, GroupNorm


class FilmFusion(nn.Module):
    """Fuse one stage: snn * (1 + gain) + shift, with the interface of `models.attention.CrossAttentionFusion`.

    Gain and shift are two 1x1 convolutions of the group-normalised features of the ResNet (FiLM, arXiv 1709.07871;
    spatial feature transform, arXiv 1804.02815). They are made once per key frame and serve every time step. Attention
    has no positions: it cannot ask what is at the place that moves. This block can, because gain and shift belong to a
    place. It works at the full size of every stage, whatever `pool` is: it costs little.

    snn [S, N, C, H, W], ann [N, C_ann, H, W] -> [S, N, C, H, W], in the type and the memory layout of `snn`.
    """

    def __init__(self, channels: int, ann_channels: int, pool: int = 1):
        super().__init__()
        self.norm = GroupNorm(NORM_GROUPS, ann_channels, eps=1e-6)
        self.to_gain = nn.Conv2d(ann_channels, channels, 1)
        self.to_shift = nn.Conv2d(ann_channels, channels, 1)
        # The block starts as the identity: training decides how much of the other branch to let in.
        for layer in (self.to_gain, self.to_shift):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, snn: Tensor, ann: Tensor) -> Tensor:
        return self.fuse(snn, self.context(ann))

    def context(self, ann: Tensor) -> tuple[Tensor, Tensor]:
        """1 + gain and shift, [N, C, H, W] each: all that `fuse` needs of [N, C_ann, H, W]."""
        normed = self.norm(ann)
        return 1 + self.to_gain(normed), self.to_shift(normed)

    def fuse(self, snn: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """[S, N, C, H, W] -> [S, N, C, H, W]. No time step sees another one."""
        scale, shift = (part.to(snn.dtype) for part in context)
        return torch.addcmul(shift, snn, scale)
