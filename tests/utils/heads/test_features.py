import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import dataset.video
import utils.heads.features
from dataset.clips import eval_clips
from dataset.frame_sampling import SegmentSampling
from dataset.residual import IMAGENET_MEAN, IMAGENET_STD
from dataset.transforms import eval_transforms
from dataset.video import VideoDataset
from models.heads.cnn import FrameCNN, weights_digest
from tests.helpers.processes import table
from tests.helpers.script import ROOT
from utils.errors import UserError
from utils.heads.config import CNNConfig, DataloaderConfig, TrainerConfig, read_config
from utils.heads.features import Features, cached_features

CPU = torch.device("cpu")
SAMPLING = SegmentSampling(4, views=2)
VIDEOS = 5


class Colours(nn.Module):
    """A stand-in for the CNN: five mixtures of the mean colours of each half. Fails at batch `fails_at`."""

    width = 5

    def __init__(self, seed: int = 0, fails_at: int | None = None):
        super().__init__()
        self.mix = nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(seed)
        for value in self.parameters():
            nn.init.normal_(value, generator=generator)
        self.fails_at = fails_at
        self.frames: list[int] = []  # number of frames of each batch

    def forward(self, frames):
        if len(self.frames) + 1 == self.fails_at:
            raise KeyboardInterrupt
        self.frames.append(len(frames))
        return self.mix(frames.unflatten(2, (2, -1)).mean((3, 4)).flatten(1))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(dataset.video, "RETRY_SECONDS", 0.0)


@pytest.fixture
def folder(tiny_demo, tmp_path) -> Path:
    """A folder with copies of some videos, which a test may change."""
    own = tmp_path / "videos" / "class"
    own.mkdir(parents=True)
    for video in sorted(Path(tiny_demo[0]).glob("*/*.avi"))[: 2 * VIDEOS : 2]:
        shutil.copy(video, own)
    return tmp_path


@pytest.fixture
def videos(folder):
    return table(str(folder / "videos"), VIDEOS)


def features(
    folder,
    videos,
    network=None,
    sampling=SAMPLING,
    backbone="resnet50",
    batch_size=3,
    workers=0,
    size=32,
    may_build=True,
    verify=False,
) -> Features:
    config = dataclasses.replace(
        read_config(ROOT / "configs/demo.json"), CNN=CNNConfig(backbone=backbone),
        dataloader=DataloaderConfig(batch_size=batch_size, workers=workers, size=size),
        SNN_trainer=TrainerConfig(epochs=1, import_CNN_forward_data=not may_build, verify_CNN_data=verify),
    )  # fmt: skip
    cache = folder / "cache"
    files = (cache / "features.npy", cache / "labels.npy")
    return cached_features(*files, videos, sampling, network or Colours(), config, CPU)


def the_part(folder) -> Path:
    (part,) = (folder / "cache").glob(".features.npy.*.part")
    return part


def no_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded although the features are cached")

    monkeypatch.setattr(dataset.video, "decode_frames", fail)


def test_values_are_those_of_the_network(folder, videos):
    network = Colours()
    found = features(folder, videos, network)
    assert isinstance(found.data, numpy.memmap) and found.data.dtype == numpy.float32
    assert found.data.shape == (2 * VIDEOS, 4, 5)
    assert found.labels.dtype == found.videos.dtype == numpy.int64
    assert found.videos.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.labels.tolist() == videos.labels[found.videos].tolist()
    data = VideoDataset(videos, eval_clips(videos, SAMPLING), SAMPLING, eval_transforms(32, 37), 0)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    for index in range(len(data)):
        clip, label, video = data[0, index]
        with torch.no_grad():
            want = network((clip / 255 - mean) / std)
        torch.testing.assert_close(torch.from_numpy(found.data[index].copy()), want)
        assert (label, video) == (found.labels[index], found.videos[index])
    assert not numpy.array_equal(found.data[0], found.data[1])  # two views, two sets of frames


def test_built_once(folder, videos, monkeypatch):
    first = features(folder, videos, workers=1)
    assert sorted(file.name for file in (folder / "cache").iterdir()) == [
        "features.npy", "features.npy.json", "labels.npy"
    ]  # fmt: skip
    assert numpy.load(folder / "cache" / "labels.npy", allow_pickle=False).tolist() == first.labels.tolist()
    no_decoding(monkeypatch)
    network = Colours()
    for may_build in (True, False):
        again = features(folder, videos, network, batch_size=4, may_build=may_build)
        assert numpy.array_equal(again.data, first.data) and again.labels.tolist() == first.labels.tolist()
    assert network.frames == []


def test_an_interrupted_build_goes_on(folder, videos, capsys):
    want = features(folder / "whole", videos).data
    broken = Colours(fails_at=3)
    with pytest.raises(KeyboardInterrupt):
        features(folder, videos, broken)
    assert broken.frames == [12, 12] and not (folder / "cache" / "features.npy").exists()
    network = Colours()
    assert numpy.array_equal(features(folder, videos, network).data, want)
    assert network.frames == [12, 4]
    assert "6 of 10 clips are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seed", "spoil", "frames"),
    [
        (1, lambda part: None, [12, 12, 12, 4]),
        (0, lambda part: part.unlink(), [12, 12, 12, 4]),
        (0, lambda part: os.truncate(part, 100), [12, 12, 12, 4]),  # in the header
        (0, lambda part: os.truncate(part, 128 + 80 + 79), [12, 12, 12]),  # in the second clip
    ],
)
def test_the_clips_that_are_whole_and_of_the_same_network_are_kept(folder, videos, seed, spoil, frames):
    want = features(folder / "whole", videos).data
    with pytest.raises(KeyboardInterrupt):
        features(folder, videos, Colours(seed, fails_at=3))
    spoil(the_part(folder))
    network = Colours()
    assert numpy.array_equal(features(folder, videos, network).data, want)
    assert network.frames == frames
    assert not list((folder / "cache").glob(".*"))


@pytest.mark.parametrize("function", ["_finish", "write_atomically", "os.replace"])
def test_a_finished_part_is_not_computed_again(folder, videos, monkeypatch, function):
    """A build may be killed after the last clip, before the renaming; here it replaces features of the same size."""
    want = features(folder / "whole", videos).data
    features(folder, videos, Colours(1))
    real = os.replace if function == "os.replace" else getattr(utils.heads.features, function)

    def killed(*arguments):
        if function != "os.replace" or str(arguments[0]).endswith(".part"):
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "replace") if function == "os.replace" else (utils.heads.features, function)), killed)
        with pytest.raises(KeyboardInterrupt):
            features(folder, videos)
    no_decoding(monkeypatch)
    assert numpy.array_equal(features(folder, videos).data, want)


def test_checksums_are_compared_on_request_only(folder, videos, capsys):
    features(folder, videos)
    flip_a_bit("features.npy")(folder)
    network = Colours()
    features(folder, videos, network)
    assert network.frames == []
    features(folder, videos, network, verify=True)
    assert network.frames and "damaged: its checksum differs" in capsys.readouterr().out


def test_moments(folder, videos):
    found = features(folder, videos)
    data = torch.from_numpy(found.data.astype("float64")).flatten(0, 1)
    torch.testing.assert_close(found.moments(), (data.mean(0).float(), data.std(0, correction=0).float()))
    still = Features(numpy.full((300, 2, 1), 7, dtype=numpy.float32), found.labels, found.videos)
    assert still.moments() == (torch.tensor([7.0]), torch.tensor([1.0]))


def touch(folder):
    os.utime(next((folder / "videos").glob("*/*.avi")), ns=(1, 1))


def rewrite(folder):
    first, second = sorted((folder / "videos").glob("*/*.avi"))[:2]
    shutil.copy(second, first)


def truncate(folder):
    os.truncate(folder / "cache" / "features.npy", 300)


def cut_off_the_description(folder):
    os.truncate(folder / "cache" / "features.npy.json", 100)


def flip_a_bit(name):
    def flip(folder):
        file = folder / "cache" / name
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(content)

    return flip


@pytest.mark.parametrize(
    ("spoil", "changed", "message"),
    [
        (touch, {}, "made with other videos"),
        (rewrite, {}, "made with other videos"),
        (None, {"network": Colours(1)}, "made with other CNN weights"),
        (None, {"sampling": SegmentSampling(4, views=1)}, "made with other sampling"),
        (None, {"size": 28}, "made with other frame size"),
        (None, {"backbone": "resnet18"}, "made with other description"),
        (truncate, {}, "damaged: expected 928 bytes, found 300"),
        (flip_a_bit("features.npy"), {"verify": True}, "damaged: its checksum differs"),
        (cut_off_the_description, {}, "not a readable description"),
    ],
)
def test_what_changed_is_named_and_built_again(folder, videos, capsys, spoil, changed, message):
    before = features(folder, videos).data.copy()
    if spoil:
        spoil(folder)
    capsys.readouterr()
    with pytest.raises(UserError, match=f"features.npy.*{message}.*import_CNN_forward_data") as caught:
        features(folder, videos, may_build=False, **changed)
    assert "\n" not in str(caught.value)
    network = changed.get("network") or Colours()
    after = features(folder, videos, **{**changed, "network": network})
    assert message in capsys.readouterr().out and network.frames
    features_differ = changed.keys() & {"network", "sampling", "size"} or spoil is rewrite
    assert numpy.array_equal(after.data, before) == (not features_differ)
    features(folder, videos, may_build=False, **{**changed, "network": network})


def test_labels_alone_are_written_again(folder, videos, monkeypatch):
    features(folder, videos)
    no_decoding(monkeypatch)
    labels = folder / "cache" / "labels.npy"
    content = labels.read_bytes()
    for spoil in (flip_a_bit("labels.npy"), lambda _: labels.unlink()):
        spoil(folder)
        features(folder, videos)
        assert labels.read_bytes() == content


def test_without_building(folder, videos):
    with pytest.raises(UserError, match=r"features\.npy: no such file; set import_CNN_forward_data to false"):
        features(folder, videos, may_build=False)


def test_a_video_that_cannot_be_decoded_is_named(folder, videos):
    video = Path(videos.path(2))
    video.write_bytes(b"no video")
    with pytest.raises(UserError, match=f"{video.name}.*mend it or take it off the list"):
        features(folder, videos)
    assert not (folder / "cache" / "features.npy").exists()


def test_a_loading_process_that_dies_in_one_line(folder, videos, monkeypatch):
    monkeypatch.setattr(dataset.video, "decode_frames", lambda *_: os._exit(1))
    with pytest.raises(UserError, match=r"a data loading process died.*fewer workers") as caught:
        features(folder, videos, workers=1)
    assert "\n" not in str(caught.value)


def test_a_full_disk_in_one_line(folder, videos, monkeypatch):
    """/dev/full is a file whose disk is always full. What was written before is kept."""
    with monkeypatch.context() as patched, open("/dev/full", "ab") as always_full:
        patched.setattr(utils.heads.features, "open", lambda *_: always_full, raising=False)
        with pytest.raises(UserError, match=r"features.npy: cannot be read or written \(No space.*enough room"):
            features(folder, videos)
    assert not (folder / "cache" / "features.npy").exists()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(utils.heads.features, "write_atomically", full)
        with pytest.raises(UserError, match=r"features.npy: cannot be read or written \(No space left on device\)"):
            features(folder, videos)
    assert the_part(folder).stat().st_size == 928
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read or written"):
        features(folder / "file", videos)


def test_a_frame_cnn_can_be_cached(folder, videos):
    torch.manual_seed(1)
    network = FrameCNN("resnet18", "none", projection=True)
    assert features(folder, videos, network, sampling=SegmentSampling(2)).data.shape == (VIDEOS, 2, 512)
    manifest = json.loads((folder / "cache" / "features.npy.json").read_text())
    assert manifest["parts"]["CNN weights"] == weights_digest(network)
