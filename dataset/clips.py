"""The videos of a data set, what is in them, and the clips of an epoch or a test, in a few arrays.

Arrays, not lists of objects: a data loading process shares its parent's memory until it writes to it, and
looking at a Python object writes its reference count. Kinetics-400 as objects would be copied, page by page,
into every data loading process.
"""

import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

import numpy

from dataset.decode import SeekPoint
from dataset.frame_sampling import FrameSampling, WindowSampling
from dataset.index import VideoInfo
from dataset.splits import VideoRecord
from utils.checkpoint import Checkpoint
from utils.errors import UserError

CLIP = numpy.dtype([("video", numpy.int64), ("place", numpy.int64), ("crop", numpy.int64)])
# video: index into the table. place: in the video, as `dataset.frame_sampling` counts. crop: number of the transform.
RANDOM_PLACE = -1  # the place is drawn anew each epoch
NO_VIDEO = -1  # the video was there when the run started and is gone now


class VideoTable:
    """Path, id, label, number of frames and seek points of each video."""

    def __init__(self, records: Sequence[VideoRecord], infos: Sequence[VideoInfo]):
        paths = [os.fsencode(record.path) for record in records]
        self._paths = numpy.frombuffer(b"".join(paths), dtype=numpy.uint8)
        self._path_ends = numpy.cumsum([len(path) for path in paths], dtype=numpy.int64)
        self.ids = numpy.array([_hash(record.name or record.path) for record in records], dtype=numpy.int64)
        self.labels = numpy.array([record.label for record in records], dtype=numpy.int64)
        self.frames = numpy.array([info.frames for info in infos], dtype=numpy.int64)
        points = [point for info in infos for point in info.seek_points]
        self._seek_points = numpy.array(points, dtype=numpy.int64).reshape(-1, 2)
        self._seek_point_ends = numpy.cumsum([len(info.seek_points) for info in infos], dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, video: int) -> str:
        return os.fsdecode(self._paths[_slice(self._path_ends, video)].tobytes())

    def seek_points(self, video: int) -> list[SeekPoint]:
        return [SeekPoint(*point) for point in self._seek_points[_slice(self._seek_point_ends, video)].tolist()]


def _slice(ends: numpy.ndarray, number: int) -> slice:
    return slice(ends[number - 1] if number else 0, ends[number])


def random_clips(videos: VideoTable) -> numpy.ndarray:
    """CLIP [videos]: one clip a video, at a new place each epoch."""
    return _clips(videos, lambda frames: [RANDOM_PLACE])


def dense_clips(videos: VideoTable, sampling: WindowSampling, step_frames: int) -> numpy.ndarray:
    """CLIP [clips]: every window of every video, `step_frames` apart. Long videos count more (as published)."""
    return _clips(videos, lambda frames: sampling.every_place(frames, step_frames))


def eval_clips(videos: VideoTable, sampling: FrameSampling, crops: int = 1) -> numpy.ndarray:
    """CLIP [clips]: the views of every video, each cropped `crops` times. The clips of a video are neighbours."""
    return _clips(videos, sampling.places, crops)


def _clips(videos: VideoTable, places: Callable[[int], Iterable[int]], crops: int = 1) -> numpy.ndarray:
    """places: number of frames of a video -> places of its clips."""
    lengths = enumerate(videos.frames.tolist())
    rows = [(video, at, crop) for video, frames in lengths for at in places(frames) for crop in range(crops)]
    return numpy.array(rows, dtype=CLIP)


def count_short(videos: VideoTable, sampling: FrameSampling) -> int:
    """How many videos have fewer frames than a clip, so that a clip repeats frames."""
    return sum(sampling.is_too_short(frames) for frames in videos.frames.tolist())


def clip_ids(videos: VideoTable, clips: numpy.ndarray) -> numpy.ndarray:
    """int64 [clips]: a 64-bit id for each clip. It depends on the path inside the data set only, so it is the same
    after a restart and on another machine."""
    own = videos.ids.tolist()
    return numpy.array([_hash(f"{own[video]}@{place}/{crop}") for video, place, crop in clips.tolist()], numpy.int64)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(os.fsencode(text), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(videos: VideoTable, clips: numpy.ndarray) -> str:
    """A short text that differs for other clips and for another order."""
    return f"{len(clips)} clips, {hashlib.blake2b(clip_ids(videos, clips).tobytes(), digest_size=4).hexdigest()}"


def clips_in_order(videos: VideoTable, clips: numpy.ndarray, ids: numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """(`clips` in the order of `ids`, how many of `clips` are not among `ids`).

    An epoch shuffles places in this list. A run that continues must keep the list, even if a video has come or
    gone. An id without a clip becomes a clip of NO_VIDEO.
    """
    own = defaultdict(deque)  # a list may name a video twice
    for number, clip in enumerate(clip_ids(videos, clips).tolist()):
        own[clip].append(number)
    kept = numpy.full(len(ids), numpy.array((NO_VIDEO, RANDOM_PLACE, 0), dtype=CLIP))
    for place, clip in enumerate(ids.tolist()):
        if own[clip]:
            kept[place] = clips[own[clip].popleft()]
    return kept, sum(map(len, own.values()))


def in_checkpoint_order(
    videos: VideoTable, clips: numpy.ndarray, checkpoint: Checkpoint
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(clips, their ids) in the order of the checkpoint, as `clips_in_order` gives them.

    If more than a tenth has come or gone, it is another data set, which has its own order from the next epoch on.
    Raises UserError if that happens in mid-epoch.
    """
    ids = checkpoint.state["clips"].numpy()
    kept, new = clips_in_order(videos, clips, ids)
    gone = int((kept["video"] == NO_VIDEO).sum())
    if 10 * gone > len(ids) or 10 * new > len(ids):
        if checkpoint.state["position"]["clips"] > 0:
            raise UserError(
                f"{checkpoint.path}: stopped in mid-epoch with another set of training clips: of its {len(ids)} clips "
                f"{gone} are not there, {new} are new; continue with the same set until the epoch ends"
            )
        print(f"note: from here the training clips are others: {gone} of {len(ids)} are gone, {new} are new")
        return clips, clip_ids(videos, clips)
    if gone:
        print(f"note: {gone} of {len(ids)} training clips are gone since the run started; their places stay empty")
    if new:
        print(f"note: {new} training clips are new since the run started and left out of it")
    return kept, ids
