"""The first convolution of a branch, whose frames may come padded."""

import torch.nn.functional as F
from torch import Tensor, nn


class ColourConv2d(nn.Conv2d):
    """nn.Conv2d of [N, 3, H, W], or of frames with channels of zeros behind the three colours, as the loader gives them
    on a GPU: tensor cores take 8 channels at once. The weight is padded likewise, so the result is the same."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = x.shape[1] - self.in_channels
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, zeros)) if zeros > 0 else self.weight
        return self._conv_forward(x, weight, self.bias)
