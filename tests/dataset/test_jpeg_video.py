"""Videos of JPEGs: read frame by frame if they are plain, by FFmpeg's decoder if they are not."""

import io
from fractions import Fraction

import av
import numpy
import pytest
from PIL import Image

import dataset.jpeg_video as module
from dataset.container import open_video, video_stream
from dataset.convert import Settings, convert
from dataset.decode import VideoError, decode_frames, every_frame
from dataset.index import probe
from dataset.jpeg_video import JPEGVideo, marked

RATE = Fraction(10)


def pictures(count=6, height=34, width=46) -> numpy.ndarray:
    """Colour ramps that differ from frame to frame: uint8 [count, H, W, 3]."""
    y, x, t = numpy.mgrid[:height, :width, :count].transpose(0, 3, 1, 2)
    return numpy.stack([4 * y + 10 * t, 3 * x + 20 * t, 250 - 40 * t - y], axis=-1).clip(0, 255).astype(numpy.uint8)


def jpeg(picture: numpy.ndarray, mode="RGB", **settings) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(content, "JPEG", quality=90, **settings)
    return content.getvalue()


def mux(path, jpegs, size=(46, 34)):
    """The JPEGs as they are, into the container of the path's suffix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p"
        for number, content in enumerate(jpegs):
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, 1 / RATE
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return path


def as_pillow_decodes(content: bytes) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def goes_the_fast_way(path) -> bool:
    with open_video(path) as container:
        video = JPEGVideo.open(path, container, video_stream(container, path))
        if video is not None:
            video.close()
        return video is not None


def by_ffmpeg(path, indices) -> numpy.ndarray:
    with open_video(path) as container:
        return numpy.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])[indices]


@pytest.mark.parametrize("suffix", [".mov", ".mp4", ".avi"])
@pytest.mark.parametrize(
    ("mode", "settings"),
    [("RGB", {}), ("RGB", {"subsampling": 0}), ("RGB", {"progressive": True}), ("L", {})],
    ids=["4:2:0", "4:4:4", "progressive", "grey"],
)
@pytest.mark.parametrize("size", [(34, 46), (33, 45), (1, 1)])
def test_frames_are_what_a_jpeg_decoder_gives(tmp_path, suffix, mode, settings, size):
    jpegs = [jpeg(picture, mode, **settings) for picture in pictures(6, *size)]
    path = mux(tmp_path / f"a{suffix}", jpegs, size=size[::-1])
    assert goes_the_fast_way(path)
    want = numpy.stack([as_pillow_decodes(content) for content in jpegs])
    assert numpy.array_equal(decode_frames(path, [5, 0, 3, 3]), want[[5, 0, 3, 3]])
    assert numpy.array_equal(list(every_frame(path)), want)
    info = probe(path)
    assert (info.frames, info.width, info.height, info.fps) == (6, *size[::-1], 10.0)
    with pytest.raises(VideoError, match="frame 6 was wanted, the file has 6 decodable frames"):
        decode_frames(path, [6])


def test_without_torchvisions_decoder_frames_are_the_same(tmp_path, monkeypatch):
    path = mux(tmp_path / "a.mov", [jpeg(picture) for picture in pictures()])
    frames = decode_frames(path, range(6))
    monkeypatch.setattr(module, "_decode_jpeg", None)
    assert numpy.array_equal(decode_frames(path, range(6)), frames)


def test_only_wanted_frames_are_read(tmp_path, monkeypatch):
    path = mux(tmp_path / "a.mov", [jpeg(picture) for picture in pictures()])
    decoded = []
    original = module._decode
    monkeypatch.setattr(module, "_decode", lambda data: decoded.append(1) or original(data))
    decode_frames(path, [1, 4, 4])
    assert len(decoded) == 2


def exif(turn: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = turn
    return tags


def with_comment(content: bytes, text: bytes) -> bytes:
    return content[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + content[2:]


STRANGE = {
    "EXIF": lambda picture: jpeg(picture, exif=exif(6)),
    "limited range": lambda picture: with_comment(jpeg(picture), b"CS=ITU601"),
    "CMYK": lambda picture: jpeg(picture, "CMYK"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_jpegs_go_the_old_way(tmp_path, kind, monkeypatch):
    path = mux(tmp_path / "a.mov", [STRANGE[kind](picture) for picture in pictures()])
    assert not goes_the_fast_way(path)
    frames = decode_frames(path, [1, 4])
    monkeypatch.setattr(JPEGVideo, "open", lambda *_: None)
    assert numpy.array_equal(frames, decode_frames(path, [1, 4])) and probe(path).frames == 6


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_jpeg_among_plain_ones_is_refused_by_name(tmp_path, kind):
    jpegs = [jpeg(picture) for picture in pictures()]
    jpegs[3] = STRANGE[kind](pictures()[3])
    path = mux(tmp_path / "a.mov", jpegs)
    assert len(decode_frames(path, [0, 1, 2, 4, 5])) == 5
    with pytest.raises(VideoError, match=r"a\.mov: cannot be decoded \(frame 3 "):
        decode_frames(path, [2, 3])


def test_a_jpeg_of_another_size_is_scaled_to_the_first(tmp_path):
    jpegs = [jpeg(picture) for picture in pictures()]
    jpegs[2] = jpeg(pictures(3, 68, 92)[2])
    path = mux(tmp_path / "a.mov", jpegs)
    assert goes_the_fast_way(path)
    frame = decode_frames(path, [2])[0].astype(int)
    assert frame.shape == (34, 46, 3)
    # The mean of four pixels, away from the borders.
    small = as_pillow_decodes(jpegs[2]).astype(int).reshape(34, 2, 46, 2, 3).mean((1, 3))
    assert numpy.abs(frame - small)[2:-2, 2:-2].mean() < 3


def test_a_damaged_jpeg_is_refused_by_name(tmp_path):
    jpegs = [jpeg(picture) for picture in pictures()]
    jpegs[3] = jpegs[3][:150]
    jpegs[4] = b"\xff\xd8 nothing else"
    path = mux(tmp_path / "a.mov", jpegs)
    for index in (3, 4):
        with pytest.raises(VideoError, match=r"a\.mov: cannot be decoded \(") as caught:
            decode_frames(path, [index])
        assert "\n" not in str(caught.value)


def test_a_container_without_an_index_of_every_frame_goes_the_old_way(tmp_path):
    path = mux(tmp_path / "a.mkv", [jpeg(picture) for picture in pictures()])
    assert not goes_the_fast_way(path)
    assert numpy.array_equal(decode_frames(path, [4, 1]), by_ffmpeg(path, [4, 1]))


def test_a_cut_off_file_of_somebody_else_goes_the_old_way(tmp_path):
    path = mux(tmp_path / "a.avi", [jpeg(picture) for picture in pictures()])
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"00dc", 0, content.rindex(b"idx1")) + 40])
    assert not goes_the_fast_way(path)
    assert 5 <= probe(path).frames <= 6 and len(decode_frames(path, [4])) == 1


def test_marks(tmp_path):
    content = jpeg(pictures()[0])
    own = marked(content, 7, last=True)
    assert module.read_header(memoryview(own), 7) == (46, 34, (7, True))
    assert module.read_header(memoryview(content), 7) == (46, 34, None)
    assert numpy.array_equal(as_pillow_decodes(own), as_pillow_decodes(content))
    for place in range(20, len(own)):
        damaged = bytearray(own)
        damaged[place] ^= 1
        try:
            header = module.read_header(memoryview(damaged), 7)
        except module.JPEGError:
            continue
        assert header.mark is None  # no longer a mark at all: the file's other frames have one


@pytest.fixture
def prepared(tmp_path):
    source = mux(tmp_path / "source.avi", [jpeg(picture) for picture in pictures()])
    convert(str(source), tmp_path / "a.mov", Settings())
    return tmp_path / "a.mov"


def test_a_prepared_file_never_goes_the_old_way(prepared):
    """FFmpeg's decoder would conceal the damage."""
    content = bytearray(prepared.read_bytes())
    sizes = content.rindex(b"stsz") + 12
    content[sizes + 4 : sizes + 8] = (2**31).to_bytes(4, "big")
    prepared.write_bytes(content)
    for read in (probe, lambda path: decode_frames(path, [5])):
        with pytest.raises(VideoError, match=r"a\.mov: .*damaged: the index .*; prepare it again"):
            read(prepared)


def test_an_index_that_leads_to_another_frame_is_found_out(prepared):
    content = bytearray(prepared.read_bytes())
    sizes = content.rindex(b"stsz") + 16
    with open_video(prepared) as container:
        places = [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]
    # The first chunk shall hold frames 1 to 5 and frame 5 twice: every entry leads to a whole JPEG.
    content[sizes : sizes + 24] = b"".join(places[n][1].to_bytes(4, "big") for n in (1, 2, 3, 4, 5, 5))
    chunks = content.rindex(b"stco") + 12
    content[chunks : chunks + 4] = places[1][0].to_bytes(4, "big")
    prepared.write_bytes(content)
    for index in range(6):
        with pytest.raises(VideoError, match=r"a\.mov"):
            decode_frames(prepared, [index])
