"""Minibatches of features and of clips."""

from pathlib import Path

import numpy
import pytest
import torch

import dataset.video
from dataset.clips import eval_clips
from dataset.decode import VideoError
from dataset.frame_sampling import SegmentSampling
from dataset.residual import normalised
from dataset.transforms import eval_transforms
from dataset.video import VideoDataset
from tests.helpers.processes import table
from utils.errors import UserError
from utils.heads.batches import ClipBatches, FeatureBatches, minibatches
from utils.heads.config import DataloaderConfig
from utils.heads.features import Features

CPU = torch.device("cpu")
SAMPLING = SegmentSampling(3, views=2)


@pytest.fixture
def videos(tiny_demo):
    return table(str(tiny_demo[0]), 4)


def clip_batches(videos, workers=0) -> ClipBatches:
    return ClipBatches(videos, SAMPLING, DataloaderConfig(batch_size=1, workers=workers, size=32), 3, 1, CPU)


def test_minibatches():
    first = minibatches(10, 4, seed=1, epoch=0)
    assert first == minibatches(10, 4, seed=1, epoch=0) and [len(batch) for batch in first] == [4, 4, 2]
    others = [minibatches(10, 4, 1, 1), minibatches(10, 4, 2, 0)]
    for batches in (first, *others):
        assert sorted(index for batch in batches for index in batch) == list(range(10))
    assert first not in others and others[0] != others[1]
    assert minibatches(10, 4, seed=1, epoch=None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_features_in_order_and_shuffled():
    data = numpy.arange(10 * 2 * 3, dtype=numpy.float32).reshape(10, 2, 3)
    labels, owners = numpy.arange(10) % 4, numpy.arange(10) // 2
    loader = FeatureBatches(Features(data, labels, owners), 4, 1, CPU)
    assert len(loader) == 3 and loader.videos.tolist() == owners.tolist()
    for batches, order in (
        (iter(loader), minibatches(10, 4, 1, None)),
        (loader.shuffled(0), minibatches(10, 4, 1, 0)),
        (loader.shuffled(1), minibatches(10, 4, 1, 1)),
    ):
        for (features, found), batch in zip(batches, order, strict=True):
            assert torch.equal(features, torch.from_numpy(data[batch]).transpose(0, 1))  # [T, B, width]
            assert found.tolist() == labels[batch].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_clips_in_order_and_shuffled(videos, workers):
    loader = clip_batches(videos, workers)
    assert len(loader) == 3 and loader.videos.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    data = VideoDataset(videos, eval_clips(videos, SAMPLING), SAMPLING, eval_transforms(32, 37), seed=0)
    for batches, order in ((iter(loader), minibatches(8, 3, 1, None)), (loader.shuffled(5), minibatches(8, 3, 1, 5))):
        for (clips, labels), batch in zip(batches, order, strict=True):
            assert clips.shape == (len(batch), 3, 3, 32, 32) and clips.dtype == torch.float32
            for clip, label, index in zip(clips, labels, batch, strict=True):
                want, want_label, _ = data[0, index]
                assert torch.equal(clip, normalised(want)) and label == want_label


def test_a_video_that_cannot_be_decoded_is_one_line(videos, monkeypatch):
    def fail(path, *_):
        raise VideoError(f"{path}: cannot be decoded")

    monkeypatch.setattr(dataset.video, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(dataset.video, "decode_frames", fail)
    with pytest.raises(UserError, match=rf"^\S*{Path(videos.path(0)).name}: cannot be decoded$"):
        list(clip_batches(videos))
