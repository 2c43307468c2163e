"""The videos of a data set, what is in them, and the clips of an epoch or a test, in a few arrays.

Arrays, not lists of objects: a data loading process shares its parent's memory until it writes to it, and
looking at a Python object writes its reference count. Kinetics-400 as objects would be copied, page by page,
into every data loading process.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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
UNKNOWN_LABEL = -1  # of a clip in a checkpoint that was written before labels were kept


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
    """int64 [clips, 2]: a 64-bit id for each clip, and its label. The id depends on the path inside the data set only,
    so it is the same after a restart and on another machine."""
    own = videos.ids.tolist()
    ids = [_hash(f"{own[video]}@{place}/{crop}") for video, place, crop in clips.tolist()]
    return numpy.stack([numpy.array(ids, numpy.int64), videos.labels[clips["video"]]], axis=1)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(os.fsencode(text), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(videos: VideoTable, clips: numpy.ndarray) -> str:
    """A short text that differs for other clips, for another order, and in its last part for other labels. Checkpoints
    from before labels were kept hold the text without this part."""
    ids, labels = (hashlib.blake2b(column.tobytes(), digest_size=4).hexdigest() for column in clip_ids(videos, clips).T)
    return f"{len(clips)} clips, {ids}, labels {labels}"


class ClipsInOrder(NamedTuple):
    clips: numpy.ndarray  # CLIP [clips]
    ids: numpy.ndarray  # int64 [clips, 2], as `clip_ids` gives them
    gone: int  # places whose video is not there
    new: int  # clips that have no place
    relabelled: int  # clips that have no place because their label is another one now


def clips_in_order(videos: VideoTable, clips: numpy.ndarray, ids: numpy.ndarray) -> ClipsInOrder:
    """`clips` in the order of `ids`, as `clip_ids` gives them, or without labels in checkpoints from before.

    An epoch shuffles places in this list. A run that continues must keep the list, even if a video has come or
    gone, or has another label. An id without a clip of its label becomes a clip of NO_VIDEO.
    """
    if ids.ndim == 1:
        ids = numpy.stack([ids, numpy.full_like(ids, UNKNOWN_LABEL)], axis=1)
    ids, own = ids.copy(), defaultdict(list)  # a list may name a video twice
    for number, (clip, label) in enumerate(clip_ids(videos, clips).tolist()):
        own[clip].append((number, label))
    kept = numpy.full(len(ids), numpy.array((NO_VIDEO, RANDOM_PLACE, 0), dtype=CLIP))
    without = []
    for place, (clip, label) in enumerate(ids.tolist()):
        found = next((mine for mine in own[clip] if label in (mine[1], UNKNOWN_LABEL)), None)
        if found is None:
            without.append(clip)
        else:
            own[clip].remove(found)
            kept[place], ids[place, 1] = clips[found[0]], found[1]
    new, gone = sum(map(len, own.values())), len(without)
    relabelled = sum(min(count, len(own[clip])) for clip, count in Counter(without).items())
    return ClipsInOrder(kept, ids, gone - relabelled, new - relabelled, relabelled)


def in_checkpoint_order(
    videos: VideoTable, clips: numpy.ndarray, checkpoint: Checkpoint
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(clips, their ids) in the order of the checkpoint, as `clips_in_order` gives them.

    If more than a tenth has come or gone or has another label, it is another data set, which has its own order from
    the next epoch on. Raises UserError if that happens in mid-epoch.
    """
    kept, ids, gone, new, relabelled = clips_in_order(videos, clips, checkpoint.state["clips"].numpy())
    if 10 * (max(gone, new) + relabelled) > len(ids):
        changes = f"of its {len(ids)} clips {gone} are not there, {new} are new, {relabelled} have another label"
        if checkpoint.state["position"]["clips"] > 0:
            raise UserError(
                f"{checkpoint.path}: stopped in mid-epoch with another set of training clips: {changes}; continue "
                "with the same set until the epoch ends"
            )
        print(f"note: from here the training clips are others than in {checkpoint.path}: {changes}")
        return clips, clip_ids(videos, clips)
    for count, what in (
        (gone, f"of {len(ids)} training clips are gone since the run started; their places stay empty"),
        (new, "training clips are new since the run started and left out of it"),
        (relabelled, f"of {len(ids)} training clips have another label since the run started and are left out of it"),
    ):
        if count:
            print(f"note: {count} {what}")
    return kept, ids
