"""Videos whose frames are JPEGs: each wanted frame is read by its own position and size, and decoded alone.

Any MJPEG in a QuickTime, MP4 or AVI file is read like this if its index is complete and plain; the rule is
`JPEGVideo.open`. `dataset.prepare` writes such files. In these, each JPEG carries a mark, a comment segment with
the frame's number and a checksum, so that a damaged file gives an error and never a wrong frame.
"""

import io
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy
import torch
from PIL import Image

from dataset.container import open_video, video_stream
from dataset.orientation import Orientation, orientation_of

try:  # The operator behind torchvision.io.decode_jpeg. That is deprecated and says so at each call, which takes time.
    import torchvision  # noqa: F401

    _decode_jpeg = torch.ops.image.decode_jpeg
except (ImportError, AttributeError):
    _decode_jpeg = None
_RGB = 3  # torchvision.io.ImageReadMode.RGB

# Bytes from an index entry's position to the frame's data: an AVI entry points to the chunk's header.
_HEADER_BYTES = {"mov": 0, "avi": 8}
_MARK = b"respike 1 "  # of format 1; then "<frame> <0, or 1 for the last frame> <checksum>"
_BYTES_BEFORE_THE_FIRST_MARK = 256  # at least: the boxes before the first frame, and its first segment

_SOI = b"\xff\xd8"
_SOS, _APP1, _COMMENT = 0xDA, 0xE1, 0xFE
_START_OF_FRAME = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive: what libjpeg-turbo decodes
_OTHER_START_OF_FRAME = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


class JPEGError(ValueError):
    """A frame, or the index, of a JPEG video cannot be used. The message is one line without the file's name."""


class JPEGHeader(NamedTuple):
    width: int
    height: int
    mark: tuple[int, bool] | None  # (number of the frame, whether it is the last), if there is a mark


class JPEGVideo:
    """The frames of a file that obeys the rule. Frame `i` is entry `i` of the container's index."""

    def __init__(self, file: int, places: list["_Place"], first: JPEGHeader, orientation: Orientation):
        self._file = file
        self._places = places
        self._first = first
        self._orientation = orientation

    @classmethod
    def open(
        cls, path: str | os.PathLike, container: av.container.InputContainer, stream: av.video.stream.VideoStream
    ) -> "JPEGVideo | None":
        """The video, or None if it must be read by FFmpeg's decoder. To be closed.

        The rule: codec mjpeg; in QuickTime, MP4 or AVI; as many index entries as the header counts frames; every
        entry a keyframe that is shown, inside the file; timestamps strictly increase, so that the index's order
        is the order of presentation; the first frame is a plain JPEG (`read_header`) and FFmpeg finds the same
        size in it. Raises JPEGError if a file that `dataset.prepare` wrote does not obey it: FFmpeg's decoder
        would conceal the damage.
        """
        if stream.codec_context.name != "mjpeg":
            return None
        file = os.open(path, os.O_RDONLY)
        try:
            prepared = _MARK in os.pread(file, _BYTES_BEFORE_THE_FIRST_MARK, 0)
            try:
                places = _frame_places(container, stream, os.fstat(file).st_size)
                first = read_header(memoryview(_read(file, places[0])), 0)
                # A prepared file is upright. In any other, FFmpeg tells how it is shown.
                orientation = Orientation() if first.mark else _orientation(path, first)
            except JPEGError as error:
                if prepared:
                    raise JPEGError(f"damaged: {error}; prepare it again") from error
                os.close(file)
                return None
        except BaseException:
            os.close(file)
            raise
        return cls(file, places, first, orientation)

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "JPEGVideo":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def timestamps(self) -> list[int]:
        """Of each frame, in the stream's time base."""
        return [place.timestamp for place in self._places]

    @property
    def is_prepared(self) -> bool:
        return self._first.mark is not None

    def frame(self, index: int) -> numpy.ndarray:
        """uint8 RGB [H, W, 3], upright, H and W those of the first frame. Raises JPEGError if the JPEG is damaged."""
        data = _read(self._file, self._places[index])
        header = read_header(memoryview(data), index)
        other_size = header[:2] != self._first[:2]
        if other_size and self.is_prepared:
            raise JPEGError(
                f"frame {index} has {header.width} x {header.height} pixels, "
                f"the first frame {self._first.width} x {self._first.height}"
            )
        if self.is_prepared and header.mark != (index, index == len(self) - 1):
            raise JPEGError(f"damaged: the index does not lead to frame {index}; prepare the video again")
        try:
            rgb = _decode(data)
        except (RuntimeError, OSError, ValueError, SyntaxError) as error:
            raise JPEGError(f"frame {index} is a damaged JPEG ({str(error).splitlines()[0]})") from error
        if other_size:
            rgb = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(*self._first[:2], threads=1).to_ndarray()
        return self._orientation.upright(rgb)


def _decode(data: numpy.ndarray) -> numpy.ndarray:
    """uint8 RGB [H, W, 3]. Both are libjpeg-turbo, and give the same; Pillow takes 1.2x the time."""
    if _decode_jpeg is None:
        return numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    picture = _decode_jpeg(torch.from_numpy(data), _RGB, False)  # [3, H, W], of [H, W, 3] in memory
    return picture.permute(1, 2, 0).numpy()


def marked(jpeg: bytes, index: int, last: bool) -> bytes:
    """The JPEG with the mark of frame `index` behind its first segment (JFIF wants to stay first)."""
    _, begin, size = next(_segments(jpeg))
    before, after = jpeg[: begin + size], jpeg[begin + size :]
    text = _MARK + b"%d %d " % (index, last)
    text += b"%08x" % zlib.crc32(after, zlib.crc32(text, zlib.crc32(before)))
    return before + bytes([0xFF, _COMMENT]) + (len(text) + 2).to_bytes(2, "big") + text + after


def read_header(data: memoryview, index: int) -> JPEGHeader:
    """What the segments before the picture data tell; the checksum of a marked JPEG is verified.

    Raises JPEGError for what libjpeg-turbo would not decode, or would decode otherwise than FFmpeg shows it: no
    JPEG, arithmetic or lossless coding, CMYK, an EXIF segment (it may turn the picture), limited colour range.
    """
    size = mark = None
    for marker, begin, length in _segments(data):
        if marker in _START_OF_FRAME:
            header = bytes(data[begin : begin + 6])  # bits a sample, height, width, components
            if len(header) < 6 or header[0] != 8 or header[5] not in (1, 3):
                raise JPEGError(f"frame {index} is neither a grey nor a colour JPEG of 8 bits")
            size = int.from_bytes(header[3:5], "big"), int.from_bytes(header[1:3], "big")
        elif marker in _OTHER_START_OF_FRAME:
            raise JPEGError(f"frame {index} is a JPEG of a rare coding (lossless or arithmetic)")
        elif marker == _APP1 and bytes(data[begin : begin + 4]) == b"Exif":
            raise JPEGError(f"frame {index} has an EXIF segment")
        elif marker == _COMMENT:
            text = bytes(data[begin : begin + length])
            if text.startswith(b"CS=ITU601"):
                raise JPEGError(f"frame {index} is in limited colour range")
            if text.startswith(_MARK):
                mark = _verified_mark(data, begin, length, index)
    if size is None or 0 in size:
        raise JPEGError(f"frame {index} is a JPEG without a size")
    return JPEGHeader(*size, mark)


def _verified_mark(data: memoryview, begin: int, length: int, index: int) -> tuple[int, bool]:
    text, found = bytes(data[begin : begin + length - 8]), bytes(data[begin + length - 8 : begin + length])
    checksum = zlib.crc32(data[begin + length :], zlib.crc32(text, zlib.crc32(data[: begin - 4])))
    if found != b"%08x" % checksum:
        raise JPEGError(f"frame {index} is damaged: its checksum is wrong")
    number, last = text[len(_MARK) :].split()
    return int(number), last == b"1"


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """(marker, begin and length of its content) of each segment up to the picture data."""
    if bytes(data[:2]) != _SOI:
        raise JPEGError("the index does not lead to a JPEG")
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a byte that fills
            place += 1
            continue
        length = data[place + 2] << 8 | data[place + 3]
        if length < 2 or place + 2 + length > len(data):
            break
        yield marker, place + 4, length - 2
        if marker == _SOS:
            return
        place += 2 + length
    raise JPEGError("a JPEG breaks off before its picture data")


class _Place(NamedTuple):
    """Of a frame's data in the file."""

    begin: int
    size: int  # bytes
    timestamp: int  # in the stream's time base


def _frame_places(container, stream, file_bytes: int) -> list[_Place]:
    """Raises JPEGError if the index breaks the rule."""
    header_bytes = _HEADER_BYTES.get(container.format.name.split(",")[0])
    if header_bytes is None:
        raise JPEGError(f"container {container.format.name}")
    places = []
    for entry in stream.index_entries:
        place = _Place(entry.pos + header_bytes, entry.size, entry.timestamp)
        if place.begin < 0 or place.size < 4 or place.begin + place.size > file_bytes:
            raise JPEGError(f"the index places frame {len(places)} outside of the file")
        if not entry.is_keyframe or entry.is_discard or (places and place.timestamp <= places[-1].timestamp):
            raise JPEGError("the index does not name the frames in the order of presentation")
        places.append(place)
    if not places or len(places) != stream.frames:
        raise JPEGError(f"the index names {len(places)} frames, the header {stream.frames}")
    return places


def _orientation(path: str | os.PathLike, first: JPEGHeader) -> Orientation:
    """How the container wants the pictures shown, as FFmpeg's first frame tells."""
    with open_video(path) as container:  # once more: the caller's container stays at its start
        packet = next(container.demux(video_stream(container, path)))
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, OSError) as error:
            raise JPEGError("FFmpeg cannot decode the first frame") from error
    # A packet of two fields holds two JPEGs of half the height.
    if not frames or (frames[0].width, frames[0].height) != first[:2]:
        raise JPEGError("FFmpeg finds another first frame")
    return orientation_of(frames[0])


def _read(file: int, place: _Place) -> numpy.ndarray:
    """uint8 [size]"""
    data = numpy.empty(place.size, dtype=numpy.uint8)
    if os.preadv(file, [data], place.begin) != place.size:
        raise JPEGError("the file ends inside a frame")
    return data
