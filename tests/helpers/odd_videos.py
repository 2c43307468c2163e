"""Videos as cameras, converters and damaged tools write them: sizes that change, palettes, display matrices."""

from fractions import Fraction
from pathlib import Path

import av
import numpy

# a, b, c, d of a display matrix: a stored point (x, y), y down, is shown at (a x + c y, b x + d y). The four corners of
# the picture as FFmpeg 5.1's own command line shows them, from the stored "RG/BW" (R: top left, G: top right).
MATRICES = {
    (1, 0, 0, 1): "RG/BW",
    (0, 1, -1, 0): "BR/WG",
    (-1, 0, 0, -1): "WB/GR",
    (0, -1, 1, 0): "GW/RB",
    (-1, 0, 0, 1): "GR/WB",
    (1, 0, 0, -1): "BW/RG",
    (0, 1, 1, 0): "RB/GW",
    (0, -1, -1, 0): "WG/BR",
}
_COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


def four_corners(height: int = 48, width: int = 64) -> numpy.ndarray:
    """uint8 [H, W, 3]: red and green above, blue and white below."""
    corners = numpy.array([[_COLOURS[c] for c in "RG"], [_COLOURS[c] for c in "BW"]], dtype=numpy.uint8)
    return corners.repeat(height // 2, 0).repeat(width // 2, 1)


def corners_of(frame: numpy.ndarray) -> str:
    """What `MATRICES` says, of a frame [H, W, 3]."""
    height, width = frame.shape[:2]
    points = frame[[height // 4, 3 * height // 4]][:, [width // 4, 3 * width // 4]].astype(int)  # [2, 2, 3]
    names = [min(_COLOURS, key=lambda c: abs(point - _COLOURS[c]).sum()) for point in points.reshape(4, 3)]
    return f"{''.join(names[:2])}/{''.join(names[2:])}"


def set_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Change the display matrix of the last track of a QuickTime or MP4 file (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(path.read_bytes())
    numbers = content.rindex(b"tkhd") + 44  # 9 numbers of 4 bytes, these four in 1/65536
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        content[numbers + place : numbers + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)


def moving_ramp(frames: int, size: tuple[int, int], seed: int = 0) -> list[numpy.ndarray]:
    """Blocks of random colours that move to the right: uint8 [H, W, 3] each; (width, height) divisible by (8, 6)."""
    blocks = numpy.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=numpy.uint8)
    moved = (numpy.roll(blocks, number, axis=1) for number in range(frames))
    return [picture.repeat(size[1] // 6, 0).repeat(size[0] // 8, 1) for picture in moved]


def write_joined(path: Path, codec: str, parts: list[tuple[tuple[int, int], int]], options: dict | None = None) -> Path:
    """Videos of one codec one after the other in one stream, as recorders write them that change their size: a list of
    ((width, height), frames). A keyframe each 12 frames at most."""
    rate, pixels = Fraction(10), "yuvj420p" if codec == "mjpeg" else "yuv420p"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        (stream.width, stream.height), stream.pix_fmt = parts[0][0], pixels
        written = 0
        for seed, (size, frames) in enumerate(parts):
            coder = av.CodecContext.create(codec, "w")
            (coder.width, coder.height), coder.pix_fmt = size, pixels
            coder.time_base, coder.gop_size, coder.max_b_frames = 1 / rate, 12, 0
            coder.thread_count, coder.options = 1, options or {}
            packets = []
            for number, picture in enumerate(moving_ramp(frames, size, seed)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, 1 / rate
                packets += coder.encode(frame)
            for packet in [*packets, *coder.encode(None)]:
                own = av.Packet(bytes(packet))
                own.stream, own.time_base, own.is_keyframe = stream, 1 / rate, packet.is_keyframe
                own.pts = own.dts = written
                own.duration = 1
                container.mux(own)
                written += 1
    return path


def write_timed(path: Path, times: list[Fraction], codec: str = "mpeg4") -> Path:
    """A video with a frame at each of these times in seconds; `number_of` tells a frame's number."""
    base = Fraction(1, 3000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = base
        for number, time in enumerate(times):
            bits = numpy.array([number >> bit & 1 for bit in range(8)], dtype=numpy.uint8)
            picture = numpy.broadcast_to(255 * bits.repeat(8)[None, :, None], (48, 64, 3))
            frame = av.VideoFrame.from_ndarray(numpy.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def number_of(frame: numpy.ndarray) -> int:
    return sum(1 << bit for bit in range(8) if frame[24, 8 * bit + 4].mean() > 127)


def write_paletted(path: Path, frames: int = 40) -> Path:
    """Uncompressed frames of 8 bits and a palette, as ImageJ and laboratory cameras write them."""
    palette = numpy.zeros((256, 4), dtype=numpy.uint8)
    palette[:, 0], palette[:, 1:] = 255, numpy.random.default_rng(0).integers(0, 256, (256, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        for number in range(frames):
            indices = (numpy.arange(48 * 64).reshape(48, 64) // 12 + 5 * number).astype(numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray((indices, palette), format="pal8")))
        container.mux(stream.encode(None))
    return path
