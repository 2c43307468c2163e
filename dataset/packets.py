"""What is in a video file, from its packets alone: a few frames are decoded, not all.

H.264 (with the lengths of its units in front of them, as MP4 and Matroska store it) and MPEG-4 are understood.
Any reason for doubt gives None, and `dataset.index` decodes the file:

- the packets are not as many as the container counts; a packet is empty, marked as damaged or as not to be shown
- a timestamp is missing or repeated, or does not fit the order of keyframes
- a packet does not hold exactly one picture (two fields, packed B-frames, frames that are not coded), or its units do
  not fill it, or what it calls a keyframe is none from which everything after it decodes alone
- a packet brings parameters (size, colours, coding) that are not the file's own, or an orientation: frames after a
  seek would lack them
- the first frames, which are decoded, do not come out one a packet, in the order of their timestamps

Damage inside of a picture does not show in packets.
"""

import itertools
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import av

from dataset.container import open_video, video_stream
from dataset.decode import RGBConverter, SeekPoint, decoded

FRAMES_BETWEEN_SEEK_POINTS = 10  # nearer ones save less than they cost; a file of keyframes would be all seek points
_FRAMES_DECODED = 8
_SLICE, _IDR_SLICE, _SEI = 1, 5, 6
_DATA_PARTITIONS, _PARAMETER_SETS = (2, 3, 4), (7, 8, 13, 15)
_RECOVERY_POINT, _ORIENTATION = 6, 47  # kinds of SEI messages
_VIDEO_OBJECT_LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f].*?(?=\x00\x00\x01)", re.DOTALL)  # start code and parameters


class PacketCount(NamedTuple):
    kind: str  # container and codec
    frames: int
    width: int  # pixels, upright
    height: int
    fps: float
    seek_points: tuple[SeekPoint, ...]


def count_packets(path: str | os.PathLike) -> PacketCount | None:
    """What `dataset.index.probe` finds by decoding everything, or None if there is reason for doubt.

    Raises VideoError for a file that cannot be opened.
    """
    with open_video(path) as container:
        stream = video_stream(container, path)
        is_key = _picture_reader(stream.codec_context)
        if is_key is None:
            return None
        try:
            packets = _read_packets(container, stream, is_key)
            if packets is None or len(packets) != (stream.frames or len(packets)):
                return None
            timestamps = sorted(pts for pts, _ in packets)
            keyframes = [place for place, (_, key) in enumerate(packets) if key]
            if not _in_order(packets, timestamps, keyframes):
                return None
            candidates, latest = [], 0
            for place in keyframes:
                if place >= latest + FRAMES_BETWEEN_SEEK_POINTS:
                    candidates.append(SeekPoint(place, timestamps[place]))
                    latest = place
            keys = {timestamps[place] for place in keyframes}
            points = tuple(p for p in candidates if _lands_on_a_keyframe(container, stream, p, keys))
            fps, kind = float(stream.average_rate or 0), f"{container.format.name} {stream.codec_context.name}"
        except (av.error.FFmpegError, OSError, ValueError):
            return None
    size = _size_if_first_frames_agree(path, timestamps)
    return None if size is None else PacketCount(kind, len(packets), *size, fps, points)


def _read_packets(container, stream, is_key) -> list[tuple[int, bool]] | None:
    """(presentation timestamp, whether it is a keyframe) of each packet in the file's order."""
    packets = []
    for packet in container.demux(stream):
        if packet.size == 0 and packet.dts is None:  # the end
            break
        key = is_key(bytes(packet))
        if key is None or packet.pts is None or packet.is_corrupt or packet.is_discard or key != packet.is_keyframe:
            return None
        if packet.has_sidedata("new_extradata"):
            return None
        packets.append((packet.pts, key))
    return packets or None


def _in_order(packets: list[tuple[int, bool]], timestamps: list[int], keyframes: list[int]) -> bool:
    """Whether no timestamp repeats, and what comes before or after a keyframe in the file is shown so too."""
    distinct = all(a < b for a, b in itertools.pairwise(timestamps))
    return distinct and keyframes[:1] == [0] and all(packets[place][0] == timestamps[place] for place in keyframes)


def _lands_on_a_keyframe(container, stream, point: SeekPoint, keys: set[int]) -> bool:
    container.seek(point.pts, stream=stream, backward=True)
    packet = next(container.demux(stream))
    return packet.pts in keys and packet.pts <= point.pts


def _size_if_first_frames_agree(path: str | os.PathLike, timestamps: list[int]) -> tuple[int, int] | None:
    """(width, height), upright, if the first frames are decoded and converted as the packets promise."""
    damaged, size = [], None
    wanted = timestamps[:_FRAMES_DECODED]
    try:
        with open_video(path) as container:
            stream = video_stream(container, path)
            frames = decoded(container, stream, lambda: damaged.append(True))
            for frame, pts in itertools.zip_longest(itertools.islice(frames, len(wanted)), wanted):
                if frame is None or frame.pts != pts:
                    return None
                if size is None:
                    height, width, _ = RGBConverter()(frame).shape
                    size = width, height
    except (av.error.FFmpegError, OSError, ValueError):
        return None
    return None if damaged else size


def _picture_reader(codec) -> Callable[[bytes], bool | None] | None:
    """A function of a packet: whether its one picture is a keyframe, or None for doubt."""
    extradata = codec.extradata or b""
    if codec.name == "h264" and len(extradata) > 4 and extradata[0] == 1:
        return lambda packet: _h264_is_key(packet, (extradata[4] & 3) + 1, extradata)
    if codec.name == "mpeg4":
        macroblocks = -(-codec.width // 16) * -(-codec.height // 16)
        return lambda packet: _mpeg4_is_key(packet, macroblocks, extradata)
    return None


def _h264_is_key(packet: bytes, length_bytes: int, extradata: bytes) -> bool | None:
    """ITU-T H.264, 7.3.1 and 7.3.3; lengths as in ISO/IEC 14496-15."""
    place = slices = firsts = idr = 0
    recovers = False
    while place < len(packet):
        begin = place + length_bytes
        place = begin + int.from_bytes(packet[place:begin], "big")
        if place > len(packet) or place < begin + 2 or packet[begin] & 0x80:
            return None
        kind = packet[begin] & 31
        if kind in (_SLICE, _IDR_SLICE):
            slices += 1
            idr += kind == _IDR_SLICE
            firsts += packet[begin + 1] >> 7  # first_mb_in_slice 0 is the one bit 1
        elif kind in _DATA_PARTITIONS or (kind in _PARAMETER_SETS and packet[begin:place] not in extradata):
            return None
        elif kind == _SEI:
            messages = _messages(packet[begin:place])
            # Decoders call a frame with a recovery point a keyframe although frames before it matter.
            recovers = recovers or _RECOVERY_POINT in messages
            if _ORIENTATION in messages:
                return None
    if firsts != 1 or idr not in (0, slices) or (recovers and not idr):
        return None
    return idr > 0


def _messages(sei: bytes) -> set[int]:
    """The kinds of message in a unit of supplemental information (H.264, 7.3.2.3)."""
    sei = sei.replace(b"\0\0\3", b"\0\0")
    kinds, place = set(), 1
    while place + 2 < len(sei):
        numbers = [0, 0]  # kind and size, each as bytes of 255 and a last one
        for which in range(2):
            while place < len(sei) and sei[place] == 255:
                numbers[which] += 255
                place += 1
            numbers[which] += sei[place] if place < len(sei) else 0
            place += 1
        kinds.add(numbers[0])
        place += numbers[1]
    return kinds


def _mpeg4_is_key(packet: bytes, macroblocks: int, extradata: bytes) -> bool | None:
    """ISO/IEC 14496-2, 6.2.5. A picture that is not coded is shorter than one bit a macroblock."""
    if packet.count(b"\0\0\1\xb6") != 1 or 8 * len(packet) < macroblocks:
        return None
    place = packet.index(b"\0\0\1\xb6") + 4
    coding = packet[place] >> 6 if place < len(packet) else 2
    if coding == 0:  # an I-frame: a keyframe
        own = all(layer in extradata for layer in _VIDEO_OBJECT_LAYER.findall(packet[:place]))
        return True if own else None
    return None if coding == 2 else False  # B-frames give doubt
