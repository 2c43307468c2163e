"""The command that builds the index before the first training."""

import json

import pytest

import dataset.build_index as build_index
import dataset.index as index_module
from dataset.index import VideoIndex
from dataset.lists import VideoList, read_lists
from tests.helpers.script import refused, run_here


@pytest.fixture
def videos(tiny_lists) -> list[str]:
    """As a training finds them."""
    root = tiny_lists["--train-list"].parent
    split = read_lists(*(VideoList(part, tiny_lists[f"--{part}-list"], root) for part in ("train", "val")))
    return [video.path for video in split.train + split.test]


def test_shards_find_what_the_training_needs(tiny_lists, videos, tmp_path, monkeypatch, capfd):
    printed = []
    for number in (3, 1, 2):
        flags = {**tiny_lists, "--shard": f"{number}/3", "--index-dir": tmp_path, "--jobs": 1}
        status, out, err = run_here(monkeypatch, capfd, flags, build_index)
        assert status == 0, err
        printed.append(out)
    assert all("index: 32 videos, 0 listed videos are not on disk" in out for out in printed)
    assert len(list(tmp_path.glob("list.*-of-3.json"))) == 3

    def never_again(paths, workers, whole):
        raise AssertionError(f"probed again: {paths}")

    monkeypatch.setattr(index_module, "_probe_all", never_again)
    found = VideoIndex(tmp_path / "list.json").lookup(videos, workers=1)
    assert {info.frames for info in found.values()} == {10} and len(found) == 32
    assert [file.name for file in tmp_path.iterdir()] == ["list.json"]


def test_without_shards_it_is_kept_where_training_looks(tiny_lists, videos, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, out, err = run_here(monkeypatch, capfd, {**tiny_lists, "--jobs": 1}, build_index)
    assert status == 0 and f"index: 32 videos are known in {tmp_path}/respike, 0 cannot be read" in out, err
    assert set(json.loads((tmp_path / "respike/list.json").read_text())["files"]) == set(videos)


def test_what_cannot_be_read_is_named(tiny_lists, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken.avi").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("broken.avi 0\n")
    flags = {"--dset": "list", "--train-list": tmp_path / "list.txt", "--index-dir": tmp_path / "index"}
    status, out, err = run_here(monkeypatch, capfd, flags, build_index)
    assert status == 0 and f"0 videos are known in {tmp_path / 'index'}, 1 cannot be read, the first: " in out, err
    refused(monkeypatch, capfd, flags | {"--shard": "3/2"}, r"--shard must be such as 3/16", build_index)
    refused(monkeypatch, capfd, flags | {"--jobs": 0}, r"--jobs must be at least 1", build_index)
