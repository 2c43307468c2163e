import pickle

import numpy
import pytest
import torch

from dataset.clips import (
    NO_VIDEO,
    RANDOM_PLACE,
    UNKNOWN_LABEL,
    VideoTable,
    clip_ids,
    clips_in_order,
    count_short,
    dense_clips,
    eval_clips,
    fingerprint,
    in_checkpoint_order,
    random_clips,
)
from dataset.decode import SeekPoint
from dataset.frame_sampling import SegmentSampling, WindowSampling
from dataset.index import VideoInfo
from dataset.splits import VideoRecord
from utils.checkpoint import Checkpoint
from utils.errors import UserError

PATHS = ["/data/a/one.avi", "/data/b/zwei ümlaut.mp4", "/data/c/\udcff.avi", "/data/d/four.mkv"]


def table(paths=PATHS, frames=(48, 10, 100, 16), labels=None) -> VideoTable:
    points = [(), (SeekPoint(0, 0),), (SeekPoint(12, 500), SeekPoint(40, -7)), ()]
    names = [path.removeprefix("/data/").removeprefix("/mnt/other/") for path in paths]
    labels = range(len(paths)) if labels is None else labels
    records = [VideoRecord(path, label, "", name) for path, label, name in zip(paths, labels, names, strict=True)]
    infos = [VideoInfo(frames=f, seek_points=p) for f, p in zip(frames, [*points, *[()] * len(frames)], strict=False)]
    return VideoTable(records, infos)


def test_what_goes_in_comes_out():
    videos = pickle.loads(pickle.dumps(table()))  # as it travels from process to process
    assert len(videos) == 4 and [videos.path(number) for number in range(4)] == PATHS
    assert videos.labels.tolist() == [0, 1, 2, 3] and videos.frames.tolist() == [48, 10, 100, 16]
    assert videos.seek_points(0) == videos.seek_points(3) == []
    assert videos.seek_points(2) == [SeekPoint(12, 500), SeekPoint(40, -7)]
    assert len(VideoTable([], [])) == 0


def test_a_quarter_of_a_million_videos_in_a_few_megabytes():
    records = [VideoRecord(f"/data/class/{number:09d}.mp4", 0, "") for number in range(1000)]
    videos = VideoTable(records, [VideoInfo(frames=300, seek_points=(SeekPoint(0, 0), SeekPoint(99, 9)))] * 1000)
    assert len(pickle.dumps(videos)) < 1000 * 120  # bytes a video


def test_clips():
    videos = table()
    assert random_clips(videos).tolist() == [(video, RANDOM_PLACE, 0) for video in range(4)]
    windows = WindowSampling(16, views=2)
    assert dense_clips(videos, windows, 16)[:4].tolist() == [(0, 0, 0), (0, 16, 0), (0, 32, 0), (1, 0, 0)]
    assert eval_clips(videos, windows)[:4].tolist() == [(0, 0, 0), (0, 32, 0), (1, 0, 0), (1, 0, 0)]
    segments = SegmentSampling(16, views=2)
    assert eval_clips(videos, segments, crops=3)[3:9].tolist() == [
        (0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0), (1, 0, 1), (1, 0, 2),
    ]  # fmt: skip
    assert count_short(videos, windows) == 1 and count_short(videos, WindowSampling(16, 4)) == 3


def test_names_do_not_depend_on_where_the_videos_are():
    here, there = table(), table([path.replace("/data", "/mnt/other") for path in PATHS])
    assert fingerprint(here, random_clips(here)) == fingerprint(there, random_clips(there))
    assert fingerprint(here, random_clips(here)) != fingerprint(here, random_clips(here)[::-1])
    assert fingerprint(here, random_clips(here)) != fingerprint(here, eval_clips(here, SegmentSampling(4)))
    ids = clip_ids(here, eval_clips(here, SegmentSampling(4, 3), 3))
    assert len(set(ids[:, 0].tolist())) == 36 and ids[:, 1].tolist() == [label for label in range(4) for _ in range(9)]


def test_a_fingerprint_ends_with_the_labels():
    before, after = (fingerprint(videos, random_clips(videos)) for videos in (table(), table(labels=[1, 0, 2, 3])))
    assert before != after and before.partition(", labels ")[0] == after.partition(", labels ")[0]


def test_an_order_outlives_videos_that_come_and_go():
    before = table()
    names = clip_ids(before, random_clips(before))[[2, 0, 3, 1]]
    after = table([PATHS[3], "/data/e/new.avi", PATHS[0], PATHS[2]], labels=[3, 1, 0, 2])
    found = clips_in_order(after, random_clips(after), names)
    assert found.clips["video"].tolist() == [3, 2, 0, NO_VIDEO] and numpy.array_equal(found.ids, names)
    assert (found.gone, found.new, found.relabelled) == (1, 1, 0)


def test_a_video_with_another_label_is_another_clip():
    before, after = table(), table(labels=[0, 3, 2, 3])
    names = clip_ids(before, random_clips(before))
    found = clips_in_order(after, random_clips(after), names)
    assert found.clips["video"].tolist() == [0, NO_VIDEO, 2, 3] and numpy.array_equal(found.ids, names)
    assert (found.gone, found.new, found.relabelled) == (0, 0, 1)


def test_a_video_listed_twice_keeps_both_places():
    twice = table([PATHS[0], PATHS[0], PATHS[1]], frames=(48, 48, 10), labels=[5, 4, 0])
    names = clip_ids(twice, random_clips(twice))[::-1]
    found = clips_in_order(twice, random_clips(twice), names)
    assert (found.gone, found.new, found.relabelled) == (0, 0, 0) and found.clips["video"].tolist() == [2, 1, 0]
    assert names[1, 0] == names[2, 0] and names[:, 1].tolist() == [0, 4, 5]


def test_a_checkpoint_from_before_labels_were_kept_serves():
    """Its clips keep their order, whatever their labels; from then on the labels are known, but for a video that is
    away just now."""
    before = table()
    old = clip_ids(before, random_clips(before))[[2, 0, 3, 1], 0]
    here = table(PATHS[:3], (48, 10, 100), [7, 8, 9])
    found = clips_in_order(here, random_clips(here), old)
    assert found.clips["video"].tolist() == [2, 0, NO_VIDEO, 1] and found.ids[:, 0].tolist() == old.tolist()
    assert found.ids[:, 1].tolist() == [9, 7, UNKNOWN_LABEL, 8] and (found.gone, found.new) == (1, 0)
    back = table(labels=[7, 8, 9, 4])
    again = clips_in_order(back, random_clips(back), found.ids)
    assert again.clips["video"].tolist() == [2, 0, 3, 1] and again.ids[:, 1].tolist() == [9, 7, 4, 8]


@pytest.fixture
def hundred(capsys):
    """(checkpoint of a run on 100 clips, what a start with these labels continues with and prints)."""
    paths = [f"/data/{number}.avi" for number in range(100)]

    def start(checkpoint: Checkpoint, labels: list[int]) -> tuple[list[int], str]:
        videos = table(paths, [20] * 100, labels)
        clips, ids = in_checkpoint_order(videos, random_clips(videos), checkpoint)
        assert len(ids) == 100
        return clips["video"].tolist(), capsys.readouterr().out

    def checkpoint(clips_done: int) -> Checkpoint:
        videos = table(paths, [20] * 100, [0] * 100)
        names = torch.from_numpy(clip_ids(videos, random_clips(videos))[::-1].copy())
        return Checkpoint("last.pt", {"clips": names, "position": {"clips": clips_done}})

    return start, checkpoint


def test_other_training_labels_are_another_data_set(hundred):
    start, checkpoint = hundred
    kept = list(range(99, -1, -1))
    assert start(checkpoint(50), [0] * 100) == (kept, "")
    clips, out = start(checkpoint(50), [0] * 90 + [1] * 10)
    assert clips == [NO_VIDEO] * 10 + kept[10:]
    assert out == ("note: 10 of 100 training clips have another label since the run started and are left out of it\n")
    clips, out = start(checkpoint(0), [0] * 89 + [1] * 11)
    assert clips == list(range(100)) and "from here the training clips are others than in last.pt" in out
    assert "0 are not there, 0 are new, 11 have another label" in out
    with pytest.raises(UserError, match=r"last\.pt: stopped in mid-epoch .* 11 have another label; continue with"):
        start(checkpoint(50), [0] * 89 + [1] * 11)
