"""Augmentation of whole clips, uint8 in and out: one crop and one flip for all frames.

torchvision's v2 transforms treat the leading dimensions of [T, 3, H, W] alike, which is that.
"""

from torchvision.transforms import v2

PUBLISHED_CROP_AREA = (0.08, 1.0)  # torchvision's RandomResizedCrop default, which the published code uses


def train_transform(size: int, flip: bool, crop_area: tuple[float, float] = PUBLISHED_CROP_AREA) -> v2.Transform:
    """RandomResizedCrop to `size` pixels of a share `crop_area` of the frame; a horizontal flip half the
    time where `flip` (not where left and right are the label)."""
    steps = [v2.RandomResizedCrop(size, scale=crop_area, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def test_transform(size: int) -> v2.Transform:
    """Short side to `size` pixels, centre crop."""
    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
