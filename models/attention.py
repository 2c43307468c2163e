"""The fusion block: spiking features attend to themselves, then to the ANN's features of their stage."""

import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32
NORM_GROUPS = 32


class Attention(nn.Module):
    """Multi-head scaled dot-product attention, heads of width 32 (arXiv 1706.03762, section 3.2).

    query_tokens [N, Q, C], context_tokens [N, L, C_context] -> [N, Q, C].
    """

    def __init__(self, channels: int, context_channels: int):
        super().__init__()
        self.heads = channels // HEAD_WIDTH
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, query_tokens: Tensor, context_tokens: Tensor) -> Tensor:
        q = self.to_q(query_tokens).unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2)  # [N, heads, Q, 32]
        k = self.to_k(context_tokens).unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2)  # [N, heads, L, 32]
        v = self.to_v(context_tokens).unflatten(-1, (self.heads, HEAD_WIDTH)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v)  # [N, heads, Q, 32]
        return self.to_out(attended.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Gated feed-forward layer, four times as wide inside (arXiv 2002.05202): [..., C] -> [..., C]."""

    def __init__(self, channels: int, expansion: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(channels, 2 * expansion * channels)
        self.proj_out = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class CrossAttentionFusion(nn.Module):
    """Fuse one stage: SNN tokens ask, ANN tokens answer (ReSpike, arXiv 2409.01564, section 3.3).

    snn [S, N, C, H, W], ann [N, C_ann, H, W] -> [S, N, C, H, W], with N = B*K key frames. The ANN's
    tokens are the same at every time step, so the S steps of a key frame ask as one long query and
    keys and values are computed once. `pool` > 1 averages both inputs over pool x pool patches
    first and upsamples the result bilinearly: attention's cost falls with pool^4.
    """

    def __init__(self, channels: int, ann_channels: int, pool: int = 1):
        super().__init__()
        self.pool = pool
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)  # a 1x1 convolution, on tokens
        self.norm_self = nn.LayerNorm(channels)
        self.attend_self = Attention(channels, channels)
        self.norm_cross = nn.LayerNorm(channels)
        self.attend_ann = Attention(channels, ann_channels)
        self.norm_feed_forward = nn.LayerNorm(channels)
        self.feed_forward = GEGLU(channels)
        self.proj_out = nn.Linear(channels, channels)
        # The block starts as the identity: training decides how much of the other branch to let in.
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, snn: Tensor, ann: Tensor) -> Tensor:
        steps, frames = snn.shape[:2]
        features = snn.flatten(0, 1)  # [S*N, C, H, W]
        if self.pool > 1:
            features = F.avg_pool2d(features, self.pool)
            ann = F.avg_pool2d(ann, self.pool)
        height, width = features.shape[2:]

        ann_tokens = ann.flatten(2).transpose(1, 2)  # [N, HW, C_ann]
        tokens = self.proj_in(self.norm(features).flatten(2).transpose(1, 2))  # [S*N, HW, C]
        normed = self.norm_self(tokens)
        tokens = tokens + self.attend_self(normed, normed)
        query = _steps_into_query(self.norm_cross(tokens), steps)  # [N, S*HW, C]
        tokens = tokens + _query_into_steps(self.attend_ann(query, ann_tokens), steps)
        tokens = tokens + self.feed_forward(self.norm_feed_forward(tokens))
        tokens = self.proj_out(tokens)

        fused = tokens.transpose(1, 2).unflatten(2, (height, width)) + features  # [S*N, C, H, W]
        if self.pool > 1:
            fused = F.interpolate(fused, scale_factor=self.pool, mode="bilinear", align_corners=False)
        return fused.unflatten(0, (steps, frames))


def _steps_into_query(tokens: Tensor, steps: int) -> Tensor:
    """[S*N, HW, C] -> [N, S*HW, C]"""
    return tokens.unflatten(0, (steps, -1)).transpose(0, 1).flatten(1, 2)


def _query_into_steps(query: Tensor, steps: int) -> Tensor:
    """[N, S*HW, C] -> [S*N, HW, C]"""
    return query.unflatten(1, (steps, -1)).transpose(0, 1).flatten(0, 1)
