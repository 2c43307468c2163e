"""Decoded frames against what an independent decoder found in the same files (clips/frames.json)."""

import io
import json
import random
import subprocess
import sys

import av
import numpy
import pytest
from PIL import Image

from dataset.convert import Settings, convert
from dataset.decode import VideoError, decode_frames, every_frame
from dataset.demo import write_video
from dataset.index import VideoIndex, probe
from tests.conftest import SHARED
from tests.helpers.odd_videos import write_joined, write_paletted
from tests.helpers.script import memory_limit

ORACLE = json.loads((SHARED / "clips/frames.json").read_text()) if (SHARED / "clips/frames.json").is_file() else {}
# How a damaged packet is concealed depends on the decoder's threads: only the frames before it are certain.
FIRST_DAMAGED_FRAME = {"awkward/corrupted.mp4": 28}
QUARTER_TURNS = {"awkward/video_90.mov": 1, "awkward/video_180.mov": 2, "awkward/video_270.mov": 3}


def unrotated(frames: numpy.ndarray, name: str) -> numpy.ndarray:
    """Undo the display rotation, which the oracle did not apply."""
    return numpy.rot90(frames, QUARTER_TURNS.get(name, 0), axes=(1, 2))


def block_means(frame: numpy.ndarray) -> numpy.ndarray:
    """Mean RGB of an 8x8 grid of equal blocks: [8, 8, 3]."""
    height, width = frame.shape[0] // 8, frame.shape[1] // 8
    return frame[: 8 * height, : 8 * width].reshape(8, height, 8, width, 3).mean((1, 3))


@pytest.mark.usefixtures("clips")
def test_there_is_an_oracle():
    assert len(ORACLE) == 24


@pytest.mark.parametrize("name", ORACLE)
def test_frames_agree_with_the_independent_decoder(clips, name):
    want = ORACLE[name]
    means = {int(index): mean for index, mean in want.get("mean_rgb_8x8", {}).items()}
    indices = list(means) or [0]
    random.Random(0).shuffle(indices)
    frames = unrotated(decode_frames(clips / name, indices), name)
    assert frames.shape == (len(indices), want["height"], want["width"], 3) and frames.dtype == numpy.uint8
    for index, frame in zip(indices, frames, strict=True):
        if index in means and index < FIRST_DAMAGED_FRAME.get(name, 10**9):
            assert numpy.abs(block_means(frame) - numpy.array(means[index])).max() < 2, f"frame {index}"


def test_metadata_need_not_be_utf8(tmp_path):
    """Whichever version of PyAV reads them."""
    file = tmp_path / "video.avi"
    write_video(file, numpy.zeros((2, 32, 32, 3), numpy.uint8))
    content = file.read_bytes()
    assert b"Lavf" in content  # the name of the software that wrote the file
    file.write_bytes(content.replace(b"Lavf", b"\xe9\xff\xfe\xe9"))
    assert probe(file).frames == 2


@pytest.mark.parametrize("name", ORACLE)
def test_probe_agrees_with_the_independent_decoder(clips, name):
    want, info = ORACLE[name], probe(clips / name)
    turned = QUARTER_TURNS.get(name, 0) % 2
    assert info.frames == want["decoded_frames"]
    assert (info.width, info.height) == ((want["height"], want["width"]) if turned else (want["width"], want["height"]))
    numerator, denominator = map(int, want["avg_frame_rate"].split("/"))
    assert info.fps == pytest.approx(numerator / denominator)
    assert bool(info.damaged_packets) == (name in FIRST_DAMAGED_FRAME)


@pytest.mark.parametrize("name", ORACLE)
def test_seeking_gives_the_same_frames(clips, name):
    info = probe(clips / name)
    every = decode_frames(clips / name, range(info.frames))
    for point in info.seek_points:
        assert numpy.array_equal(
            decode_frames(clips / name, range(point.index, info.frames), [point]), every[point.index :]
        )
    spread = list(range(0, info.frames, 7))
    assert numpy.array_equal(decode_frames(clips / name, spread, info.seek_points), every[spread])


def test_seeking_is_used_where_it_is_exact(clips):
    assert probe(clips / "kinetics400/demo.mp4").seek_points
    assert probe(clips / "ucf101/Basketball/v_Basketball_g01_c01.avi").seek_points
    assert not probe(clips / "hmdb51/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi").seek_points  # timestamps repeat


def test_a_palette_that_a_seek_leaves_behind_gives_no_seek_points(tmp_path):
    """The palette is in no plane of the picture, and a container that has decoded the file still has it."""
    path = write_paletted(tmp_path / "a.avi")
    info = VideoIndex(None).lookup([str(path)], workers=1)[str(path)]
    every = list(every_frame(path))
    assert len(every) == info.frames == 40 and min(frame.mean() for frame in every) > 50
    for index in range(0, 40, 3):
        assert numpy.array_equal(decode_frames(path, [index], info.seek_points)[0], every[index])
    assert info.seek_points == ()


SIZES = [((64, 48), 24), ((96, 72), 24), ((48, 96), 12), ((64, 48), 24)]
CHANGING = {"a.avi": "mpeg4", "b.mkv": "libvpx", "c.avi": "libx264", "d.mov": "mjpeg", "e.mkv": "mjpeg"}


@pytest.mark.parametrize("name", CHANGING)
def test_a_frame_of_another_size_is_scaled_to_the_files_first(tmp_path, name):
    """Alone, after a seek, in a clip, in a whole read and in a prepared copy it is the same."""
    path = write_joined(tmp_path / name, CHANGING[name], SIZES)
    info = VideoIndex(None).lookup([str(path)], workers=1)[str(path)]
    assert (info.frames, info.width, info.height) == (84, 64, 48) and info == probe(path)
    every = numpy.stack(list(every_frame(path)))  # of one shape
    assert every.shape == (84, 48, 64, 3)
    for index in range(84):
        assert numpy.array_equal(decode_frames(path, [index], info.seek_points)[0], every[index]), index
    assert numpy.array_equal(decode_frames(path, [80, 30, 50, 2], info.seek_points), every[[80, 30, 50, 2]])
    convert(str(path), tmp_path / "prepared.mov", Settings())
    prepared = decode_frames(tmp_path / "prepared.mov", range(84))
    assert prepared.shape == every.shape and numpy.abs(prepared.astype(int) - every).mean() < 8


def test_seek_points_stay_where_the_size_is_the_first(tmp_path):
    path = write_joined(tmp_path / "a.avi", "mpeg4", SIZES)
    assert [point.index for point in probe(path).seek_points] == [12, 60, 72]


def test_a_clip_that_does_not_fit_into_memory_is_a_video_that_cannot_be_read(tmp_path):
    """A picture of one colour: thousands of pixels wide in a file of a few thousand bytes."""
    content = io.BytesIO()
    Image.new("1", (6000, 6000)).save(content, "PNG")
    path = tmp_path / "large.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 6000, 6000, "monob"
        packet = av.Packet(content.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
        container.mux(packet)
    assert path.stat().st_size < 20_000
    with memory_limit(900_000_000):
        with pytest.raises(VideoError, match=r"large\.mov: cannot be decoded \(Unable to allocate"):
            decode_frames(path, [0] * 16)
        assert decode_frames(path, [0]).shape == (1, 6000, 6000, 3)
    with memory_limit(20_000_000), pytest.raises(VideoError, match=r"large\.mov: cannot be decoded \(.*allocate"):
        probe(path)


def test_wrong_seek_points_are_not_believed(clips):
    path = clips / "kinetics400/demo.mp4"
    point = probe(path).seek_points[0]
    wrong = point._replace(pts=point.pts + 1)
    assert numpy.array_equal(decode_frames(path, [200], [wrong]), decode_frames(path, [200]))


def test_order_and_repeats(clips):
    path = clips / "awkward/unordered.mov"
    frames = decode_frames(path, [3, 0, 3, 1])
    assert numpy.array_equal(frames, decode_frames(path, [0, 1, 2, 3])[[3, 0, 3, 1]])


def test_nothing_past_the_last_wanted_frame_is_decoded(clips, monkeypatch):
    seen = []
    original = av.Packet.decode
    import dataset.decode as module

    def counting(container, stream, on_damage=lambda: None):
        for packet in container.demux(stream):
            seen.append(packet)
            yield from original(packet)

    monkeypatch.setattr(module, "decoded", counting)
    decode_frames(clips / "kinetics400/demo.mp4", [0, 4])
    assert len(seen) < 16  # 5 frames and the decoder's reordering delay, of 280


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.avi"
    frames = numpy.linspace(30, 220, 12)[:, None, None, None] * numpy.ones((12, 32, 48, 3))
    write_video(path, frames.astype(numpy.uint8))
    return path


def test_generated_video(video):
    frames = decode_frames(video, [0, 5, 11])
    assert numpy.abs(frames.mean((1, 2, 3)) - numpy.linspace(30, 220, 12)[[0, 5, 11]]).max() < 3


def test_strange_names(video):
    for name in ("concat:a.avi", "50% off #1.avi", "ünïcode clip.avi", "http:x.avi"):
        other = video.with_name(name)
        other.write_bytes(video.read_bytes())
        assert decode_frames(other, [2]).shape == (1, 32, 48, 3)


def test_too_few_frames(video):
    with pytest.raises(VideoError, match=r"video\.avi: frame 12 was wanted, the file has 12 decodable frames"):
        decode_frames(video, [3, 12])
    with pytest.raises(ValueError, match="count from 0"):
        decode_frames(video, [-1])
    with pytest.raises(ValueError, match="no indices"):
        decode_frames(video, [])


@pytest.mark.parametrize(
    "name", ["http://localhost/a.avi", "concat:/tmp/a.avi", "tcp://127.0.0.1:1", "-", "/", "no.avi"]
)
@pytest.mark.parametrize("read", [probe, lambda path: decode_frames(path, [0])], ids=["probe", "decode"])
def test_only_local_files_are_opened(name, read):
    with pytest.raises(VideoError, match="no such file") as caught:
        read(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXTINF:10,\n{0}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{0}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "dash": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{0}</BaseURL></Period></MPD>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".m3u8", ".mpd"])
def test_a_playlist_dressed_up_as_a_video_opens_nothing(tmp_path, video, kind, suffix):
    trap = tmp_path / f"trap{suffix}"
    trap.write_text(PLAYLISTS[kind].format(video))
    for read in (probe, lambda path: decode_frames(path, [0])):
        with pytest.raises(VideoError, match=f"trap{suffix}: not a"):
            read(trap)


def test_audio_alone(clips):
    with pytest.raises(VideoError, match=r"audio\.mp3"):
        probe(clips / "awkward/nasa_13013.mp4.audio.mp3")


def test_damage_is_silent_on_the_terminal(video, tmp_path):
    """FFmpeg prints nothing of its own, whatever is in the file."""
    content = bytearray(video.read_bytes())
    for place in range(len(content) // 3, 2 * len(content) // 3, 7):
        content[place] ^= 0xFF
    broken = tmp_path / "broken.avi"
    broken.write_bytes(content)
    code = "import sys\nfrom dataset.index import probe\ntry: probe(sys.argv[1])\nexcept ValueError as e: print(e)"
    result = subprocess.run([sys.executable, "-c", code, broken], capture_output=True, text=True, check=True)
    assert result.stderr == "" and result.stdout.count("\n") <= 1


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not a video at all" * 100])
def test_unreadable_files_give_one_line(tmp_path, content):
    path = tmp_path / "bad.avi"
    path.write_bytes(content)
    for read in (probe, lambda path: decode_frames(path, [0])):
        with pytest.raises(VideoError, match=r"bad\.avi: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)
