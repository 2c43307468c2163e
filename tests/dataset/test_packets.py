"""Packets must tell what decoding tells, or give doubt."""

import av
import numpy
import pytest

from dataset.container import open_video, video_stream
from dataset.decode import decode_frames
from dataset.index import VideoInfo, probe
from dataset.packets import _messages, count_packets
from tests.dataset.test_decode import ORACLE
from tests.helpers.odd_videos import write_joined

DECODED = [
    *(f"awkward/{name}" for name in ("av1_video.mkv", "corrupted.mp4", "h265_video.mp4")),
    *(name for name in ORACLE if name.startswith("hmdb51/")),
    "ucf101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
]


@pytest.mark.parametrize("name", ORACLE)
def test_packets_tell_what_decoding_tells(clips, name):
    count = count_packets(clips / name)
    assert (count is None) == (name in DECODED)
    if count is not None:
        found = VideoInfo(count.frames, count.width, count.height, count.fps, seek_points=count.seek_points)
        assert found == probe(clips / name)


@pytest.fixture
def h264(tmp_path):
    path = tmp_path / "a.mp4"
    frames = numpy.random.default_rng(0).integers(0, 256, (6, 6, 8, 3), dtype=numpy.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "2", "g": "12", "x264-params": "scenecut=0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            picture = frames[number % 6].repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def remux(path, change):
    """A copy whose packets `change(number, packet)` has changed: it returns the packets to write."""
    copy = path.with_name("changed.mp4")
    with open_video(path) as source, av.open(str(copy), "w") as target:
        stream = video_stream(source, path)
        own = target.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            for changed in change(number, packet):
                changed.stream = own
                target.mux(changed)
    return copy


def rebuilt(packet, content: bytes):
    new = av.Packet(content)
    new.pts, new.dts, new.time_base, new.is_keyframe = packet.pts, packet.dts, packet.time_base, packet.is_keyframe
    return new


def test_a_plain_file_is_counted(h264):
    count = count_packets(h264)
    assert count.frames == 40 == probe(h264).frames
    assert count.seek_points == probe(h264).seek_points and [p.index for p in count.seek_points] == [12, 24, 36]
    copy = count_packets(remux(h264, lambda number, packet: [packet]))
    assert (copy.frames, [p.index for p in copy.seek_points]) == (40, [12, 24, 36])


DOUBTS = {
    "a keyframe is missing": lambda number, packet: [] if number == 0 else [packet],
    "cut off unit": lambda number, packet: [rebuilt(packet, bytes(packet)[:-1]) if number == 30 else packet],
    "two pictures": lambda number, packet: [rebuilt(packet, 2 * bytes(packet)) if number == 30 else packet],
    "no picture": lambda number, packet: [rebuilt(packet, b"\0\0\0\2\x09\x10") if number == 30 else packet],
    "no start of a picture": lambda number, packet: [
        rebuilt(packet, bytes(packet)[:5] + b"\x40" + bytes(packet)[6:]) if number == 30 else packet
    ],
    "forbidden bit": lambda number, packet: [
        rebuilt(packet, bytes(packet)[:4] + b"\xff" + bytes(packet)[5:]) if number == 30 else packet
    ],
}


@pytest.mark.parametrize("kind", DOUBTS)
def test_packets_that_do_not_fit_give_doubt(h264, kind):
    assert count_packets(remux(h264, DOUBTS[kind])) is None


def test_parameters_that_are_the_files_own_may_be_repeated(h264):
    """Recorders repeat them in front of each keyframe. Others there mean that the picture changes."""
    with open_video(h264) as container:
        extradata = container.streams.video[0].codec_context.extradata  # ISO/IEC 14496-15, 5.3.3.1
    own = extradata[8 : 8 + int.from_bytes(extradata[6:8], "big")]  # its sequence parameter set
    assert own[0] & 31 == 7

    def in_front(unit: bytes, number: int):
        return lambda at, packet: [
            rebuilt(packet, len(unit).to_bytes(4, "big") + unit + bytes(packet)) if at == number else packet
        ]

    for number in (12, 30):
        assert count_packets(remux(h264, in_front(own, number))) is not None
        assert count_packets(remux(h264, in_front(own[:-1] + bytes([own[-1] ^ 4]), number))) is None


def test_a_file_of_two_sizes_gives_doubt(tmp_path):
    one, two = ((64, 48), 30), ((96, 72), 30)
    assert count_packets(write_joined(tmp_path / "one.avi", "mpeg4", [one, one])).frames == 60
    assert count_packets(write_joined(tmp_path / "two.avi", "mpeg4", [one, two])) is None


def test_repeated_timestamps_give_doubt(h264):
    pts = {}

    def change(number, packet):
        pts[number] = packet.pts
        if number == 31:
            packet.pts = pts[30]
        return [packet]

    assert count_packets(remux(h264, change)) is None


def test_open_groups_of_pictures_give_doubt(tmp_path, h264):
    """Their keyframes have a recovery point: frames shown after it may need frames before it."""
    path = tmp_path / "open.mp4"
    with av.open(str(path), "w") as container:
        options = {"bf": "2", "g": "12", "x264-params": "open-gop=1:scenecut=0"}
        stream = container.add_stream("libx264", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        with open_video(h264) as source:
            for number, frame in enumerate(source.decode(video=0)):
                frame.pts, frame.pict_type = number, 0
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert count_packets(path) is None and probe(path).frames == 40


def test_messages_are_found_behind_other_messages():
    text = bytes([6, 5, 255, 3]) + bytes(range(1, 256)) + b"abc"
    assert _messages(text + b"\x80") == {5}
    assert _messages(text + bytes([6, 1, 0x80, 0x80])) == {5, 6}
    assert _messages(bytes([6])) == _messages(bytes([6, 255])) == set()


def test_an_orientation_in_front_of_the_first_frame_holds_for_all(h264):
    """H.264 may name it once, in a message; the frames after a seek do not have it."""
    turned = (
        bytes([6, 47, 3]) + _bits("0 00 0100000000000000 010 0 1") + b"\x80"
    )  # D.2.26: a quarter, until further notice
    path = remux(
        h264,
        lambda number, packet: (
            [rebuilt(packet, len(turned).to_bytes(4, "big") + turned + bytes(packet))] if number == 0 else [packet]
        ),
    )
    assert count_packets(path) is None
    info, plain = probe(path), decode_frames(h264, range(40))
    assert (info.width, info.height, info.seek_points) == (48, 64, ())
    assert numpy.array_equal(decode_frames(path, [0, 39]), numpy.rot90(plain[[0, 39]], axes=(1, 2)))


def _bits(text: str) -> bytes:
    bits = text.replace(" ", "")
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
