import json
import os
import shutil

import pytest

import dataset.index as index_module
from dataset.index import VideoIndex, VideoInfo, _Found, probe
from utils.errors import UserError


@pytest.fixture
def videos(tmp_path, tiny_demo):
    """Four copies of generated videos and two files that are none."""
    sources = sorted(tiny_demo[0].glob("*/*.avi"))[:4]
    paths = [str(shutil.copy(source, tmp_path / f"{number}.avi")) for number, source in enumerate(sources)]
    (tmp_path / "bad.avi").write_bytes(b"no video")
    (tmp_path / "empty.avi").write_bytes(b"")
    return [*paths, str(tmp_path / "bad.avi"), str(tmp_path / "empty.avi")]


def test_lookup_and_cache(videos, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "index.json"
    found = VideoIndex(cache).lookup(videos, workers=2)
    assert [found[path].frames for path in videos] == [10, 10, 10, 10, 0, 0]
    assert found[videos[0]] == probe(videos[0]) and found[videos[0]].error is None
    assert videos[4] in found[videos[4]].error and videos[5] in found[videos[5]].error

    def not_again(paths, workers, whole):
        raise AssertionError(f"probed again: {paths}")

    monkeypatch.setattr(index_module, "_probe_all", not_again)
    served = VideoIndex(cache).lookup(videos[:4], workers=2)
    assert served == {path: found[path] for path in videos[:4]}


def test_a_changed_file_is_probed_again(videos, tmp_path):
    cache = tmp_path / "index.json"
    VideoIndex(cache).lookup(videos, workers=1)
    shutil.copy(videos[0], videos[4])  # mended
    found = VideoIndex(cache).lookup(videos, workers=1)
    assert found[videos[4]].error is None and found[videos[4]].frames == 10
    os.remove(videos[1])
    assert "no such file" in VideoIndex(cache).lookup(videos, workers=1)[videos[1]].error


def test_same_size_other_time_is_probed_again(videos, tmp_path):
    cache = tmp_path / "index.json"
    VideoIndex(cache).lookup(videos[:1], workers=1)
    os.utime(videos[0], ns=(1, 1))
    index = VideoIndex(cache)
    index._entries[videos[0]][1]["frames"] = 99  # would be served if the time did not count
    assert index.lookup(videos[:1], workers=1)[videos[0]].frames == 10


def test_another_decoder_or_a_damaged_cache_starts_anew(videos, tmp_path):
    cache = tmp_path / "index.json"
    VideoIndex(cache).lookup(videos, workers=1)
    content = json.loads(cache.read_text())
    content["decoder"] = "another"
    for entry in content["files"].values():
        entry[1]["frames"] = 99
    cache.write_text(json.dumps(content))
    assert VideoIndex(cache).lookup(videos, workers=1)[videos[0]].frames == 10
    cache.write_text(cache.read_text()[:100])
    assert VideoIndex(cache).lookup(videos, workers=1)[videos[0]].frames == 10


def test_two_runs_share_a_cache(videos, tmp_path):
    cache = tmp_path / "index.json"
    first, second = VideoIndex(cache), VideoIndex(cache)
    first.lookup(videos[:2], workers=1)
    second.lookup(videos[2:], workers=1)
    assert set(json.loads(cache.read_text())["files"]) == set(videos)


def kill_the_worker_on_the_second(path):
    if path.endswith("1.avi"):
        os._exit(11)
    return _Found(VideoInfo(frames=5), True)


def test_a_file_that_kills_its_decoder_is_named(videos, monkeypatch):
    monkeypatch.setattr(index_module, "_count_or_probe", kill_the_worker_on_the_second)
    found = VideoIndex(None).lookup(videos, workers=2)
    assert "kills the decoder" in found[videos[1]].error
    assert all(found[path].frames == 5 for path in videos if path != videos[1])


def away(path):
    return _Found(VideoInfo(error=f"{path}: the network drive is away"), True)


def test_what_could_not_be_read_is_tried_again(videos, tmp_path, monkeypatch):
    cache = tmp_path / "index.json"
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_count_or_probe", away)
        assert "drive is away" in VideoIndex(cache).lookup(videos[:1], workers=1)[videos[0]].error
    assert VideoIndex(cache).lookup(videos[:1], workers=1)[videos[0]].frames == 10


def test_a_file_that_breaks_the_code_is_named(videos, monkeypatch):
    def strange(path):
        raise MemoryError("too\nlarge")

    monkeypatch.setattr(index_module, "probe", strange)
    monkeypatch.setattr(index_module, "count_packets", strange)
    assert VideoIndex(None).lookup(videos[:1], workers=1)[videos[0]].error == (
        f"{videos[0]}: cannot be decoded (MemoryError: too large)"
    )


def test_cache_folder_without_permission(videos, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="--index-dir"):
        VideoIndex(blocked / "index.json").lookup(videos, workers=1)


def test_relative_and_absolute_paths_are_one_entry(videos, tmp_path, monkeypatch):
    cache = tmp_path / "index.json"
    VideoIndex(cache).lookup(videos[:1], workers=1)
    monkeypatch.chdir(tmp_path)
    found = VideoIndex(cache).lookup(["0.avi"], workers=1)
    assert found["0.avi"].frames == 10 and list(json.loads(cache.read_text())["files"]) == videos[:1]


def test_an_interrupted_start_keeps_what_it_found(videos, tmp_path, monkeypatch):
    """Hours of indexing are not lost to a Ctrl-C."""
    cache = tmp_path / "index.json"

    def interrupted(paths, workers, whole):
        yield paths[0], probe(paths[0]), True
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module, "_probe_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        VideoIndex(cache).lookup(videos, workers=1)
    assert list(json.loads(cache.read_text())["files"]) == videos[:1]
