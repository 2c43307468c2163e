import pickle

import numpy

from dataset.clips import (
    NO_VIDEO,
    RANDOM_PLACE,
    VideoTable,
    clip_ids,
    clips_in_order,
    count_short,
    dense_clips,
    eval_clips,
    fingerprint,
    random_clips,
)
from dataset.decode import SeekPoint
from dataset.frame_sampling import SegmentSampling, WindowSampling
from dataset.index import VideoInfo
from dataset.splits import VideoRecord

PATHS = ["/data/a/one.avi", "/data/b/zwei ümlaut.mp4", "/data/c/\udcff.avi", "/data/d/four.mkv"]


def table(paths=PATHS, frames=(48, 10, 100, 16)) -> VideoTable:
    points = [(), (SeekPoint(0, 0),), (SeekPoint(12, 500), SeekPoint(40, -7)), ()]
    names = [path.removeprefix("/data/").removeprefix("/mnt/other/") for path in paths]
    records = [
        VideoRecord(path, number, "", name) for number, (path, name) in enumerate(zip(paths, names, strict=True))
    ]
    infos = [VideoInfo(frames=f, seek_points=p) for f, p in zip(frames, points, strict=False)]
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
    assert len(set(clip_ids(here, eval_clips(here, SegmentSampling(4, 3), 3)).tolist())) == 36


def test_an_order_outlives_videos_that_come_and_go():
    before = table()
    names = clip_ids(before, random_clips(before))[[2, 0, 3, 1]]
    after = table([PATHS[3], "/data/e/new.avi", PATHS[0], PATHS[2]])
    kept, new = clips_in_order(after, random_clips(after), names)
    assert kept["video"].tolist() == [3, 2, 0, NO_VIDEO] and new == 1


def test_a_video_listed_twice_keeps_both_places():
    twice = table([PATHS[0], PATHS[0], PATHS[1]], frames=(48, 48, 10))
    names = clip_ids(twice, random_clips(twice))
    kept, new = clips_in_order(twice, random_clips(twice), names)
    assert new == 0 and kept["video"].tolist() == [0, 1, 2]
    assert numpy.array_equal(names[:1], names[1:2])
