"""The clips that a network is tested on, and the classes that it finds in them."""

import numpy
import torch
from torch import Tensor

from dataset.frame_sampling import SAMPLINGS, FrameSampling
from dataset.transforms import eval_short_side, eval_transforms
from utils.trained import TrainedNetwork

TOP = 5


class Clips:
    """The clips that the training script of a network tests it on."""

    def __init__(self, trained: TrainedNetwork, views: int = 1, crops: int = 1):
        size, flags = trained.size, trained.flags
        self.sampling: FrameSampling = SAMPLINGS[trained.sampling](trained.frames, flags["frame_stride"], views)
        self.transforms = eval_transforms(size, eval_short_side(size, flags["dset"]), crops)

    def centre(self, rgb: numpy.ndarray) -> Tensor:
        """The crop in the middle: uint8 [..., H, W, 3] -> uint8 [..., 3, size, size]."""
        return self.transforms[len(self.transforms) // 2](torch.from_numpy(rgb.copy()).movedim(-1, -3))


def top(probabilities: Tensor | None, classes: list[str]) -> list[tuple[str, float]]:
    """The best five, best first. probabilities: [classes]; None before the first prediction, which has no best."""
    if probabilities is None:
        return []
    best = probabilities.topk(min(TOP, len(classes)))
    return [(classes[label], share) for share, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
