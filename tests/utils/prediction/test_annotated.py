"""Annotated videos, as predict.py --save writes them."""

import shutil

import av
import pytest

from dataset.index import probe
from tests.helpers.prediction import run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_annotated_videos(monkeypatch, capfd, random_network, tiny_videos, tmp_path):
    sources = [tmp_path / name for name in ("a/wave.avi", "b/wave.avi", "saved/wave.mp4")]
    for source, video in zip(sources, tiny_videos[:3], strict=True):
        source.parent.mkdir()
        shutil.copy(video, source)
    before = sources[2].read_bytes()
    status, _, err = run(monkeypatch, capfd, random_network.path, *sources, "--save", tmp_path / "saved")
    assert status == 0, err
    assert sources[2].read_bytes() == before
    written = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert written == ["wave-2.mp4", "wave-3.mp4", "wave-4.mp4", "wave.mp4"]
    with av.open(str(tmp_path / "saved" / "wave-2.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(probe(tiny_videos[0]).fps / 2, rel=0.01)
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(pictures) == 5  # every second frame of 10
    panels = [[picture[40:296, 16 + 272 * number : 272 + 272 * number] for number in range(3)] for picture in pictures]
    for number, (frame, key, residual) in enumerate(panels):
        is_key = number % 2 == 0
        assert (abs(frame - key).mean() < 4) == is_key
        assert (residual.std() < 2) == is_key  # of a key frame: one grey
        bars = pictures[number][340:460, 620:750]  # firing rates
        assert ((bars[..., 0] > 170) & (bars[..., 2] < 80)).any() != is_key
    spread = [abs(panels[number][1] - panels[0][1]).mean() for number in (1, 2)]
    assert spread[0] < 4 < spread[1]  # the key frame of the second segment is another one
