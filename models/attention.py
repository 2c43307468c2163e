"""The fusion block: spiking features attend to themselves, then to the ANN's features of their stage."""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.geglu import geglu
from models.kernels.group_norm import group_norm

HEAD_WIDTH = 32
NORM_GROUPS = 32
LEAN_CONTEXT = 7  # tokens along each side that the lean fusion attends to, at most


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
        return self.attend(query_tokens, self.keys_values(context_tokens))

    def keys_values(self, context_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, L, C_context] -> keys and values, [N, heads, L, 32] each."""
        return self._in_heads(self.to_k(context_tokens)), self._in_heads(self.to_v(context_tokens))

    def attend(self, query_tokens: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """[N, Q, C] -> [N, Q, C]"""
        q = self._in_heads(self.to_q(query_tokens))  # [N, heads, Q, 32]
        attended = F.scaled_dot_product_attention(q, *keys_values)  # [N, heads, Q, 32]
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _in_heads(self, tokens: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], self.heads, HEAD_WIDTH).transpose(1, 2)


class GEGLU(nn.Module):
    """Gated feed-forward layer, four times as wide inside (arXiv 2002.05202): [..., C] -> [..., C]."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 4 * channels
        self.proj_in = nn.Linear(channels, 2 * hidden)
        self.proj_out = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(geglu(self.proj_in(x)))


class LayerNorm(nn.LayerNorm):
    """Layer norm in the type of its input, with statistics in float32. CUDA's autocast would run it in float32 and
    write twice the bytes."""

    def forward(self, x: Tensor) -> Tensor:
        with _no_autocast(x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """Group norm of [N, C, H, W], likewise."""

    def forward(self, x: Tensor) -> Tensor:
        with _no_autocast(x):
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class CrossAttentionFusion(nn.Module):
    """Fuse one stage: SNN tokens ask, ANN tokens answer (ReSpike, arXiv 2409.01564, section 3.3).

    snn [S, N, C, H, W], ann [N, C_ann, H, W] -> [S, N, C, H, W], with N = B*K key frames. The ANN's
    tokens are the same at every time step, so the S steps of a key frame ask as one long query and
    keys and values are computed once. `pool` > 1 averages both inputs over pool x pool patches
    first and upsamples the result bilinearly: attention's cost falls with pool^4. The result has the type of `snn`
    and lies in memory channels-last.
    """

    def __init__(self, channels: int, ann_channels: int, pool: int = 1):
        super().__init__()
        self.pool = pool
        self.norm = GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)  # a 1x1 convolution, on tokens
        self.norm_self = LayerNorm(channels)
        self.attend_self = Attention(channels, channels)
        self.norm_cross = LayerNorm(channels)
        self.attend_ann = Attention(channels, ann_channels)
        self.norm_feed_forward = LayerNorm(channels)
        self.feed_forward = GEGLU(channels)
        self.proj_out = nn.Linear(channels, channels)
        # The block starts as the identity: training decides how much of the other branch to let in.
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, snn: Tensor, ann: Tensor) -> Tensor:
        return self.fuse(snn, self.context(ann))

    def context(self, ann: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the key frames: all that `fuse` needs of [N, C_ann, H, W]."""
        return self.attend_ann.keys_values(_to_tokens(F.avg_pool2d(ann, self.pool) if self.pool > 1 else ann))

    def fuse(self, snn: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """[S, N, C, H, W] -> [S, N, C, H, W]. No time step sees another one."""
        steps, frames = snn.shape[:2]
        features = snn.flatten(0, 1)  # [S*N, C, H, W]
        if self.pool > 1:
            features = F.avg_pool2d(features, self.pool)
        height, width = features.shape[2:]

        features_tokens = _to_tokens(features)  # [S*N, HW, C]
        tokens = self.proj_in(_to_tokens(self.norm(features)))
        normed = self.norm_self(tokens)
        tokens = tokens + self.attend_self(normed, normed)
        query = _steps_into_query(self.norm_cross(tokens), steps)  # [N, S*HW, C]
        tokens = tokens + _query_into_steps(self.attend_ann.attend(query, context), steps)
        tokens = tokens + self.feed_forward(self.norm_feed_forward(tokens))
        tokens = self.proj_out(tokens) + features_tokens
        if self.pool > 1:
            tokens = upsample_tokens(tokens, height, width, self.pool)  # [S*N, pool^2 HW, C]
        fused = tokens.transpose(1, 2).unflatten(2, (self.pool * height, self.pool * width))  # [S*N, C, H, W]
        return fused.to(snn.dtype).unflatten(0, (steps, frames))


class LeanFusion(nn.Module):
    """Fuse one stage at a small part of the cost of `CrossAttentionFusion`, with the same interface.

    Patches of `pool` x `pool` pixels of the spiking features ask; at most 7 x 7 tokens of the ANN answer. There is no
    self-attention and no feed-forward layer, so the cost is linear in pixels. What was found is upsampled and added to
    the features, which keep their full resolution.
    """

    def __init__(self, channels: int, ann_channels: int, pool: int):
        super().__init__()
        self.pool = pool
        self.norm = LayerNorm(channels)
        self.norm_ann = LayerNorm(ann_channels)
        self.attend_ann = Attention(channels, ann_channels)
        # The block starts as the identity: training decides how much of the other branch to let in.
        nn.init.zeros_(self.attend_ann.to_out.weight)
        nn.init.zeros_(self.attend_ann.to_out.bias)

    def forward(self, snn: Tensor, ann: Tensor) -> Tensor:
        return self.fuse(snn, self.context(ann))

    def context(self, ann: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the key frames: all that `fuse` needs of [N, C_ann, H, W]."""
        patch = math.ceil(max(ann.shape[2:]) / LEAN_CONTEXT)
        ann = F.avg_pool2d(ann, patch, ceil_mode=True, count_include_pad=False)
        return self.attend_ann.keys_values(self.norm_ann(_to_tokens(ann)))

    def fuse(self, snn: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """[S, N, C, H, W] -> [S, N, C, H, W]. No time step sees another one."""
        steps, frames = snn.shape[:2]
        features = snn.flatten(0, 1)  # [S*N, C, H, W]
        pooled = F.avg_pool2d(features, self.pool) if self.pool > 1 else features
        query = _steps_into_query(self.norm(_to_tokens(pooled)), steps)  # [N, S*hw, C]
        found = _query_into_steps(self.attend_ann.attend(query, context), steps)  # [S*N, hw, C]
        if self.pool > 1:
            found = upsample_tokens(found, *pooled.shape[2:], self.pool)
        found = found.transpose(1, 2).unflatten(2, features.shape[2:])  # [S*N, C, H, W]
        return (features + found.to(features.dtype)).unflatten(0, (steps, frames))


def upsample_tokens(tokens: Tensor, height: int, width: int, factor: int) -> Tensor:
    """[N, HW, C] -> [N, factor^2 HW, C]: bilinear upsampling (`F.interpolate` without align_corners), in the type of
    `tokens`.

    It is a product with a constant matrix: one sum for each result, forward and backward, so the gradient is
    deterministic. `F.interpolate` runs in float32 under CUDA's autocast, and its backward pass there adds atomically.
    """
    # What a CUDA graph reads must live as long as the graph, so it makes a matrix of its own. Dynamo traces one, too.
    own = torch.compiler.is_compiling() or (tokens.is_cuda and torch.cuda.is_current_stream_capturing())
    make = _bilinear_matrix.__wrapped__ if own else _bilinear_matrix
    matrix = make(height, width, factor, tokens.dtype, tokens.device)
    with _no_autocast(tokens):
        return torch.bmm(matrix.expand(len(tokens), -1, -1), tokens)


@functools.lru_cache(maxsize=8)  # the sizes of a run: two
def _bilinear_matrix(height: int, width: int, factor: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[factor^2 HW, HW]. The weights are multiples of 1 / (2 factor)^2: exact in bfloat16 for factors 2 and 4."""

    def along(size: int) -> Tensor:
        """[factor size, size]: how far each new place lies from each old one, in steps of the old grid."""
        place = (torch.arange(factor * size, device=device, dtype=torch.float32) + 0.5) / factor - 0.5
        distance = place.clamp(0, size - 1)[:, None] - torch.arange(size, device=device)
        return (1.0 - distance.abs()).clamp_min(0.0)

    with torch.inference_mode(False), torch.no_grad():  # so that a cached matrix can be used in training
        return torch.kron(along(height), along(width)).to(dtype)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Operators compute in the types they are given. (Device "meta" has no autocast to switch off.)"""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _to_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, HW, C]: a view of channels-last memory."""
    return x.flatten(2).transpose(1, 2)


def _steps_into_query(tokens: Tensor, steps: int) -> Tensor:
    """[S*N, HW, C] -> [N, S*HW, C]"""
    return tokens.unflatten(0, (steps, -1)).transpose(0, 1).flatten(1, 2)


def _query_into_steps(query: Tensor, steps: int) -> Tensor:
    """[N, S*HW, C] -> [S*N, HW, C]"""
    return query.unflatten(1, (steps, -1)).transpose(0, 1).flatten(0, 1)
