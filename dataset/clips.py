"""Which videos, what is in them and which clips of them: whole data sets in a few arrays.

Arrays, not lists of objects: a data loading process shares its parent's memory until it writes to it,
and looking at a Python object writes its reference count. Kinetics-400 as objects would be copied,
page by page, into every one of them.
"""

import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy

from dataset.decode import SeekPoint
from dataset.index import VideoInfo
from dataset.splits import VideoRecord

RANDOM_PLACE = -1  # a clip's place: drawn anew each epoch
NO_VIDEO = -1  # a clip's video: it was there when the run started


class VideoTable:
    """Path, name, label, number of frames and seek points of each video."""

    def __init__(self, records: Sequence[VideoRecord], infos: Sequence[VideoInfo]):
        paths = [os.fsencode(record.path) for record in records]
        self._paths = numpy.frombuffer(b"".join(paths), dtype=numpy.uint8)
        self._path_ends = numpy.cumsum([len(path) for path in paths], dtype=numpy.int64)
        self.names = numpy.array([_number_of(record.name or record.path) for record in records], dtype=numpy.int64)
        self.labels = numpy.array([record.label for record in records], dtype=numpy.int64)
        self.frames = numpy.array([info.frames for info in infos], dtype=numpy.int64)
        points = [point for info in infos for point in info.seek_points]
        self._seek_points = numpy.array(points, dtype=numpy.int64).reshape(-1, 2)
        self._seek_point_ends = numpy.cumsum([len(info.seek_points) for info in infos], dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, video: int) -> str:
        begin, end = _bounds(self._path_ends, video)
        return os.fsdecode(self._paths[begin:end].tobytes())

    def seek_points(self, video: int) -> list[SeekPoint]:
        begin, end = _bounds(self._seek_point_ends, video)
        return [SeekPoint(index, pts) for index, pts in self._seek_points[begin:end].tolist()]


def _bounds(ends: numpy.ndarray, number: int) -> tuple[int, int]:
    return (int(ends[number - 1]) if number else 0), int(ends[number])


# Clips are an int64 array [clips, 3]: index of the video, place in it (`dataset.frame_sampling`), crop.


def random_clips(videos: VideoTable) -> numpy.ndarray:
    """One clip a video, its place drawn anew each epoch: each video counts once an epoch."""
    return numpy.array([(video, RANDOM_PLACE, 0) for video in range(len(videos))], dtype=numpy.int64).reshape(-1, 3)


def dense_clips(videos: VideoTable, sampling, step_frames: int) -> numpy.ndarray:
    """Every window of every video, `step_frames` apart: long videos count more, as published."""
    clips = [
        (video, place, 0)
        for video, frames in enumerate(videos.frames.tolist())
        for place in sampling.every_place(frames, step_frames)
    ]
    return numpy.array(clips, dtype=numpy.int64).reshape(-1, 3)


def eval_clips(videos: VideoTable, sampling, crops: int = 1) -> numpy.ndarray:
    """The sampling's views of every video, each cropped `crops` times; a video's clips stand together."""
    clips = [
        (video, place, crop)
        for video, frames in enumerate(videos.frames.tolist())
        for place in sampling.places(frames)
        for crop in range(crops)
    ]
    return numpy.array(clips, dtype=numpy.int64).reshape(-1, 3)


def count_short(videos: VideoTable, sampling) -> int:
    """Videos too short for a clip without repeated frames."""
    return sum(sampling.is_too_short(frames) for frames in videos.frames.tolist())


def clip_ids(videos: VideoTable, clips: numpy.ndarray) -> numpy.ndarray:
    """int64 [clips]: a name for each clip that holds from one start to the next and, as the folder that the
    data set is in does not count, from one machine to another."""
    own = videos.names.tolist()
    return numpy.array([_number_of(f"{own[v]}@{place}/{crop}") for v, place, crop in clips.tolist()], dtype=numpy.int64)


def _number_of(text: str) -> int:
    digest = hashlib.blake2b(os.fsencode(text), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(videos: VideoTable, clips: numpy.ndarray) -> str:
    """A short name of these clips in this order."""
    return f"{len(clips)} clips, {hashlib.blake2b(clip_ids(videos, clips).tobytes(), digest_size=4).hexdigest()}"


def clips_in_order(videos: VideoTable, clips: numpy.ndarray, names: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """(`clips` in the order of `names`, how many of `clips` are not among them).

    The order of an epoch is one of places in this list, so a run that goes on must keep it although a
    video has come or gone. A name without a clip becomes a place whose video is `NO_VIDEO`.
    """
    own = defaultdict(deque)  # a list may name a video twice
    for number, name in enumerate(clip_ids(videos, clips).tolist()):
        own[name].append(number)
    kept = numpy.tile(numpy.array([NO_VIDEO, RANDOM_PLACE, 0], dtype=numpy.int64), (len(names), 1))
    for place, name in enumerate(names.tolist()):
        if own[name]:
            kept[place] = clips[own[name].popleft()]
    return kept, sum(map(len, own.values()))
