"""Augmentation of whole clips, uint8 [T, 3, H, W] in and out: one crop and one flip for all frames.

torchvision's v2 transforms treat the leading dimensions alike, which is that. Random numbers come from
torch's global generator, which the data set sets for each clip.
"""

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

PUBLISHED_CROP_AREA = (0.08, 1.0)  # torchvision's RandomResizedCrop default, which the published code uses
PUBLISHED_SCALES = (1.0, 0.875, 0.75, 0.66)  # of the short side, for Kinetics
_SNAP_PIXELS = 3  # a crop this near to the wanted size is taken at that size, as published

# What sides of the frame the test crops stand at, by their number: 0 left or top, 1 right or bottom.
CROP_POSITIONS = {1: (0.5,), 3: (0.0, 0.5, 1.0)}
_SHORT_SIDES = {"kinetics400": 256 / 224, "list": 256 / 224}  # of the frames, in crop sizes; other data sets: 1


def resized_crop(size: int, flip: bool, crop_area: tuple[float, float] = PUBLISHED_CROP_AREA) -> v2.Transform:
    """RandomResizedCrop to `size` pixels of a share `crop_area` of the frame; a horizontal flip half the
    time where `flip` (not where left and right are the label)."""
    return _with_flip(v2.RandomResizedCrop(size, scale=crop_area, antialias=True), flip)


def multi_scale_crop(size: int, flip: bool) -> v2.Transform:
    """MultiScaleCrop to `size` pixels; a horizontal flip half the time where `flip`."""
    return _with_flip(MultiScaleCrop(size), flip)


def _with_flip(crop: nn.Module, flip: bool) -> v2.Transform:
    return v2.Compose([crop, v2.RandomHorizontalFlip()] if flip else [crop])


def eval_short_side(size: int, data_set: str) -> int:
    """The short side, in pixels, of the frames that test crops of `size` are taken from. data_set: the flag --dset of
    the training script."""
    return round(size * _SHORT_SIDES.get(data_set, 1.0))


def eval_transforms(size: int, short_side: int, crops: int = 1) -> list[v2.Transform]:
    """One transform for each of `crops` crops of `size` pixels, of frames scaled to `short_side`: the
    centre, or the two ends and the centre of the longer side. Raises ValueError for other numbers."""
    if crops not in CROP_POSITIONS:
        raise ValueError(f"crops must be one of {', '.join(map(str, CROP_POSITIONS))}, got {crops}")
    resize = v2.Resize(short_side, antialias=True)
    return [v2.Compose([resize, CropAlong(size, position)]) for position in CROP_POSITIONS[crops]]


class MultiScaleCrop(nn.Module):
    """A crop whose height and width are each a random scale of the short side, neighbouring scales at
    most, at one of 13 fixed positions, resized to `size` (TSN, arXiv 1608.00859, section 4.1)."""

    def __init__(self, size: int, scales: tuple[float, ...] = PUBLISHED_SCALES):
        super().__init__()
        self.size = size
        self.scales = scales
        numbers = range(len(scales))
        self.pairs = [(i, j) for i in numbers for j in numbers if abs(i - j) <= 1]
        # In quarters of what the crop leaves free: corners and middles of the sides, the centre, quarters.
        self.offsets = [(x, y) for y in (0, 2, 4) for x in (0, 2, 4)] + [(x, y) for y in (1, 3) for x in (1, 3)]

    def forward(self, clip: Tensor) -> Tensor:
        height, width = clip.shape[-2:]
        sides = [self._snapped(int(min(height, width) * scale)) for scale in self.scales]
        i, j = self.pairs[_draw(len(self.pairs))]
        crop_height, crop_width = min(sides[i], height), min(sides[j], width)
        x, y = self.offsets[_draw(len(self.offsets))]
        left, top = x * ((width - crop_width) // 4), y * ((height - crop_height) // 4)
        return F.resized_crop(clip, top, left, crop_height, crop_width, [self.size, self.size], antialias=True)

    def _snapped(self, side: int) -> int:
        return self.size if abs(side - self.size) < _SNAP_PIXELS else max(1, side)


class CropAlong(nn.Module):
    """A square crop of `size` pixels, `position` (0 to 1) along the longer side, centred on the other."""

    def __init__(self, size: int, position: float):
        super().__init__()
        self.size = size
        self.position = position

    def forward(self, clip: Tensor) -> Tensor:
        height, width = clip.shape[-2:]
        down, along = (0.5, self.position) if width >= height else (self.position, 0.5)
        top, left = round((height - self.size) * down), round((width - self.size) * along)
        return F.crop(clip, top, left, self.size, self.size)


def _draw(choices: int) -> int:
    return int(torch.randint(choices, ()))
