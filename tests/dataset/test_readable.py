import pytest

from dataset.index import VideoIndex
from dataset.readable import readable_videos
from dataset.splits import Split, VideoRecord


@pytest.fixture
def records(tiny_demo) -> list[VideoRecord]:
    paths = sorted(map(str, tiny_demo[0].glob("*/train*.avi")))[:4]
    return [VideoRecord(path, label, f"group {path}") for label, path in enumerate(paths)]


def untrained(records, capsys, classes, **more) -> list[str]:
    split = Split(classes, records[:-1], records[-1:], [], [])
    readable_videos(split, VideoIndex(None), strict=False, write_list=None, **more)
    return [line for line in capsys.readouterr().out.splitlines() if "no video to train on" in line]


def test_a_class_without_a_video_to_train_on_is_named(records, capsys):
    assert untrained(records, capsys, list("abc")) == []
    assert untrained(records, capsys, list("abcde")) == ["note: 2 of 5 classes have no video to train on, such as d"]


def test_a_class_whose_videos_all_go_to_the_validation_is_named(records, capsys):
    (line,) = untrained(records, capsys, list("abc"), val_fraction=0.3)
    assert line.startswith("note: 1 of 3 classes have no video to train on")


def test_a_class_whose_only_video_cannot_be_read_is_named(records, capsys, tmp_path):
    (tmp_path / "broken.avi").write_bytes(b"no video")
    broken = [records[0], VideoRecord(str(tmp_path / "broken.avi"), 1, ""), *records[2:]]
    (line,) = untrained(broken, capsys, list("abc"))
    assert line.endswith("such as b")


def test_only_testing_needs_no_class_to_train_on(records, capsys):
    readable_videos(Split(list("abcd"), [], records, [], []), VideoIndex(None), strict=False, write_list=None)
    assert "to train on" not in capsys.readouterr().out
