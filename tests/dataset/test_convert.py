import io
import os
from fractions import Fraction

import av
import numpy
import pytest
from PIL import Image

from dataset.convert import Settings, at_most, convert, scaled_down
from dataset.decode import VideoError, decode_frames, every_frame
from dataset.index import probe
from tests.dataset.test_decode import ORACLE
from tests.helpers.damaged_files import verdicts
from tests.helpers.odd_videos import number_of, write_timed

READABLE = [name for name, want in ORACLE.items() if want.get("decoded_frames")]


@pytest.mark.parametrize("name", READABLE)
def test_prepared_frames_are_the_sources(clips, tmp_path, name):
    """All of them, upright, scaled down as torchvision does, and nothing lost but what one JPEG loses."""
    source, target = clips / name, tmp_path / "a.mov"
    convert(str(source), target, Settings())
    frames = probe(source).frames
    assert probe(target).frames == frames
    indices = range(0, frames, max(1, frames // 8))
    for frame, found in zip(decode_frames(source, indices), decode_frames(target, indices), strict=True):
        frame = scaled_down(frame, 256)
        assert min(found.shape[:2]) <= 256
        once = io.BytesIO()
        Image.fromarray(frame).save(once, "JPEG", quality=90)
        assert numpy.array_equal(found, numpy.asarray(Image.open(once)))
        assert numpy.abs(found.astype(int) - frame).mean() < 4


def test_any_player_reads_it(tiny_demo, tmp_path):
    source = next(tiny_demo[0].glob("*/*.avi"))
    convert(str(source), tmp_path / "a.mov", Settings())
    with av.open(str(tmp_path / "a.mov")) as container:
        assert container.format.name.startswith("mov") and len(container.streams) == 1
        assert container.streams.video[0].average_rate == 30
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    difference = numpy.abs(numpy.array(frames, int) - decode_frames(tmp_path / "a.mov", range(10)))
    assert difference.mean() < 3  # FFmpeg and libjpeg-turbo enlarge the colour planes in different ways


def test_every_frame_is_a_jpeg_of_the_quality(tiny_demo, tmp_path):
    source = next(tiny_demo[0].glob("*/*.avi"))
    sizes = {}
    for quality in (50, 90):
        convert(str(source), tmp_path / f"{quality}.mov", Settings(quality=quality))
        with av.open(str(tmp_path / f"{quality}.mov")) as container:
            packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        for packet, frame in zip(packets, decode_frames(source, range(10)), strict=True):
            own = io.BytesIO()
            Image.fromarray(frame).save(own, "JPEG", quality=quality)
            assert Image.open(io.BytesIO(packet)).quantization == Image.open(own).quantization
        sizes[quality] = sum(map(len, packets))
    assert sizes[50] < sizes[90]


def test_fewer_frames_a_second(tiny_demo, tmp_path):
    source = next(tiny_demo[0].glob("*/*.avi"))  # 30 frames a second
    convert(str(source), tmp_path / "a.mov", Settings(limit_fps=12))
    assert (probe(tmp_path / "a.mov").frames, probe(tmp_path / "a.mov").fps) == (4, 12)
    convert(str(source), tmp_path / "b.mov", Settings(limit_fps=60))
    assert probe(tmp_path / "b.mov").frames == 10
    want = decode_frames(tmp_path / "b.mov", [0, 3, 5, 8])  # the first at or after 0, 2.5, 5 and 7.5
    assert numpy.array_equal(decode_frames(tmp_path / "a.mov", range(4)), want)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.mov", "mjpeg")])
def test_fewer_frames_a_second_go_by_timestamps(tmp_path, name, codec):
    """10 frames a second for 2 s, then 30, a pause of 5 s, and 60."""
    times = [Fraction(n, 10) for n in range(20)] + [2 + Fraction(n, 30) for n in range(45)]
    times += [Fraction(17, 2) + Fraction(n, 60) for n in range(30)]
    path = write_timed(tmp_path / name, times, codec)
    assert probe(path).frames == len(times) == 95
    convert(str(path), tmp_path / "out.mov", Settings(limit_fps=10))
    kept = [times[number_of(frame)] for frame in every_frame(tmp_path / "out.mov")]
    seconds = [sum(begin <= time < begin + 1 for time in kept) for begin in (0, 1, 2, Fraction(17, 2))]
    assert seconds == [10, 10, 10, 5] and len(kept) == 40


@pytest.mark.parametrize(
    ("timestamps", "limit", "want"),
    [
        ([Fraction(n, 30) for n in range(10)], 12, [0, 3, 5, 8]),
        ([Fraction(n, 30) for n in range(10)], 30, list(range(10))),
        ([None] * 10, 12, [0, 3, 5, 8]),  # the average rate, 30
        ([Fraction(round(1000 * n / 24), 1000) for n in range(10)], 12, [0, 2, 4, 6, 8]),  # rounded to milliseconds
        ([Fraction(n, 15) for n in (0, 0, 1, 1, 2, 2, 3, 3)], 15, [0, 2, 4, 6]),  # packed B-frames repeat timestamps
        ([Fraction(n, 30) for n in (100, 101, 102, 103, 0, 1, 2, 3)], 15, [0, 2, 4, 6]),  # timestamps that start anew
        ([Fraction(n, 30) for n in (0, 300, 301, 302)], 15, [0, 1, 3]),  # a pause does not save up frames
    ],
)
def test_at_most_so_many_frames(timestamps, limit, want):
    frames = [(timestamp, number) for number, timestamp in enumerate(timestamps)]
    assert [number for _, number in at_most(frames, Fraction(limit), Fraction(30))] == want


def test_damaged_files_give_frames_or_a_line(tiny_demo, tmp_path):
    """tests/helpers/damaged_files.py does this with 200 copies of a real clip (benchmarks/RESULTS.md)."""
    convert(str(next(tiny_demo[0].glob("*/*.avi"))), tmp_path / "whole.mov", Settings())
    found = verdicts(tmp_path, tmp_path / "whole.mov", files=70, seed=0)
    assert len(found) == 70 and not [result for result in found if result[1].startswith("WRONG")]


def test_what_cannot_be_decoded_is_no_fault_of_the_disk(tmp_path):
    (tmp_path / "a.avi").write_bytes(b"no video")
    with pytest.raises(VideoError):
        convert(str(tmp_path / "a.avi"), tmp_path / "b.mov", Settings())
    assert os.listdir(tmp_path) == ["a.avi"]
