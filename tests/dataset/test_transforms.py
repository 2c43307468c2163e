import pytest
import torch

from dataset.transforms import CropAlong, MultiScaleCrop, eval_transforms, multi_scale_crop, resized_crop


def coordinates(height: int, width: int) -> torch.Tensor:
    """A frame whose red is the row and whose green is the column."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    planes = [rows.expand(height, width), columns.expand(height, width), torch.zeros(height, width)]
    return torch.stack([plane.to(torch.uint8) for plane in planes])[None]  # [1, 3, H, W]


def test_one_crop_and_one_flip_for_the_whole_clip():
    """Identical frames stay identical: whatever is drawn is drawn once."""
    frame = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8)
    for transform in (resized_crop(32, flip=True), multi_scale_crop(32, flip=True)):
        for _ in range(5):
            clip = transform(frame.expand(6, 3, 40, 60))
            assert clip.shape == (6, 3, 32, 32) and all(torch.equal(clip[0], other) for other in clip)


def test_flip_follows_the_data_set():
    frame = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)
    for flip, directions in ((False, {True}), (True, {True, False})):
        for transform in (resized_crop(64, flip, crop_area=(1.0, 1.0)), multi_scale_crop(64, flip)):
            clips = [transform(frame) for _ in range(30)]
            assert {bool(clip[0, 0, 0, 0] < clip[0, 0, 0, -1]) for clip in clips} == directions


def test_multi_scale_crop_takes_the_published_sizes_and_places(monkeypatch):
    """On 100 x 200 pixels: sides of 100, 87, 75 and 66, neighbours combined, at 13 places."""
    seen = set()
    crop = MultiScaleCrop(64)

    def keep(clip, top, left, height, width, size, **kwargs):
        seen.add((top, left, height, width))
        return torch.zeros(*clip.shape[:-2], *size, dtype=clip.dtype)

    monkeypatch.setattr("dataset.transforms.F.resized_crop", keep)
    for _ in range(3000):
        crop(torch.zeros(1, 3, 100, 200, dtype=torch.uint8))
    sides = [100, 87, 75, 64]  # 66 is within 3 pixels of the wanted 64 and taken at that, as published
    pairs = {(sides[i], sides[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1}
    quarters = [(x, y) for x in (0, 2, 4) for y in (0, 2, 4)] + [(1, 1), (3, 1), (1, 3), (3, 3)]
    want = {(y * ((100 - h) // 4), x * ((200 - w) // 4), h, w) for h, w in pairs for x, y in quarters}
    assert seen == want


@pytest.mark.parametrize("height, width", [(20, 31), (32, 32), (200, 33), (1, 5)])
def test_multi_scale_crop_of_any_frame(height, width):
    for _ in range(20):
        assert MultiScaleCrop(32)(coordinates(height, width)).shape == (1, 3, 32, 32)


def test_centre_crop_keeps_the_middle():
    clip = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    clip[..., 16:48] = 200
    (centre,) = eval_transforms(32, short_side=32)
    assert torch.equal(centre(clip), torch.full((2, 3, 32, 32), 200, dtype=torch.uint8))


def test_short_side_and_three_crops():
    frame = coordinates(128, 200)
    left, middle, right = (transform(frame)[0] for transform in eval_transforms(112, short_side=128, crops=3))
    assert (left[1, 0, 0], middle[1, 0, 0], right[1, 0, 0]) == (0, 44, 88)  # columns
    assert {int(crop[0, 0, 0]) for crop in (left, middle, right)} == {8}  # rows: centred
    top, centre, bottom = (t(frame.transpose(2, 3))[0] for t in eval_transforms(112, short_side=128, crops=3))
    assert [int(crop[1, 0, 0]) for crop in (top, centre, bottom)] == [0, 44, 88]
    assert torch.equal(centre, eval_transforms(112, short_side=128)[0](frame.transpose(2, 3))[0])
    (scaled,) = eval_transforms(224, short_side=256)
    assert scaled(coordinates(100, 150)).shape == (1, 3, 224, 224)
    with pytest.raises(ValueError, match="crops must be one of 1, 3, got 2"):
        eval_transforms(32, 32, crops=2)
    assert CropAlong(32, 0.5)(coordinates(32, 32)).shape == (1, 3, 32, 32)
