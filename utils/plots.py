"""What the network is shown, as a picture."""

import torch
from torch import Tensor
from torchvision.utils import make_grid

_CLIPS_SHOWN = 4
_SEGMENTS_SHOWN = 2


def key_residual_picture(key: Tensor, residual: Tensor) -> Tensor:
    """A row a clip: a key frame, then its residual frames, for the first segments: [3, H, W] in [0, 1].

    key [B, K, 3, H, W], residual [B, K, S, 3, H, W]. Grey in a residual is no change, brighter and
    darker is what came and went.
    """
    key, residual = key[:_CLIPS_SHOWN, :_SEGMENTS_SHOWN].float(), residual[:_CLIPS_SHOWN, :_SEGMENTS_SHOWN].float()
    low, high = key.amin(), key.amax()
    key = (key - low) / (high - low).clamp(min=1e-6)
    residual = 0.5 + 0.5 * residual / residual.abs().amax().clamp(min=1e-6)
    tiles = torch.cat([key[:, :, None], residual], dim=2)  # [B, K, 1+S, 3, H, W]
    return make_grid(tiles.flatten(0, 2).cpu(), nrow=tiles.shape[1] * tiles.shape[2], padding=1)
