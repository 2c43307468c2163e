import json
import os
import shutil
import zlib

import av
import pytest

import dataset.index as index_module
from dataset.container import VideoError
from dataset.convert import Settings, convert
from dataset.decode import decode_frames
from dataset.index import VideoIndex, VideoInfo, _Found, probe
from dataset.jpeg_video import JPEGVideo
from dataset.live import SourceError, frames_of
from dataset.shards import Shard
from tests.helpers.script import without_privileges
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


def never_again(paths, workers, whole):
    raise AssertionError(f"probed again: {paths}")


def test_shards_write_files_of_their_own_that_the_next_lookup_joins(videos, tmp_path, monkeypatch):
    """Each has read the index before the others write: in one file, the last would undo what the others found."""
    cache = tmp_path / "index.json"
    VideoIndex(cache).lookup(videos[:1], workers=1)
    shards = [VideoIndex(cache, shard=Shard(number, 2)) for number in (1, 2)]
    for shard, part in zip(shards, (videos[:2], videos[2:4]), strict=True):
        shard.lookup(part, workers=1)
    files = {file.name: set(json.loads(file.read_text())["files"]) for file in tmp_path.glob("index*.json")}
    assert files == {
        "index.json": set(videos[:1]), "index.1-of-2.json": set(videos[:2]), "index.2-of-2.json": set(videos[2:4])
    }  # fmt: skip
    monkeypatch.setattr(index_module, "_probe_all", never_again)
    assert [info.frames for info in VideoIndex(cache).lookup(videos[:4], workers=1).values()] == [10] * 4
    assert [file.name for file in tmp_path.glob("index*.json")] == ["index.json"]
    assert set(json.loads(cache.read_text())["files"]) == set(videos[:4])


def test_a_shard_that_was_stopped_goes_on(videos, tmp_path, monkeypatch):
    cache = tmp_path / "index.json"

    def interrupted(paths, workers, whole):
        yield paths[0], probe(paths[0]), True
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_probe_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            VideoIndex(cache, shard=Shard(1, 2)).lookup(videos[:3], workers=1)
    probed = []
    original = index_module._probe_all
    monkeypatch.setattr(index_module, "_probe_all", lambda paths, *more: probed.extend(paths) or original(paths, *more))
    VideoIndex(cache, shard=Shard(1, 2)).lookup(videos[:3], workers=1)
    assert probed == videos[1:3]


def test_a_shard_at_work_keeps_its_file(videos, tmp_path, monkeypatch):
    cache, file = tmp_path / "index.json", tmp_path / "index.1-of-2.json"
    shard = VideoIndex(cache, shard=Shard(1, 2))
    shard.lookup(videos[:1], workers=1)
    training = VideoIndex(cache)
    shard.lookup(videos[1:2], workers=1)  # after the training has read the shard's file
    training.lookup(videos[:1], workers=1)
    assert file.exists()
    monkeypatch.setattr(index_module, "_probe_all", never_again)
    assert len(VideoIndex(cache).lookup(videos[:2], workers=1)) == 2 and not file.exists()


def test_a_folder_that_may_only_be_read_serves_the_shards_files(videos, open_folder):
    (open_folder / "videos").mkdir()
    here = [shutil.copy(path, open_folder / "videos") for path in videos[:2]]
    for number, path in enumerate(here, start=1):
        VideoIndex(open_folder / "index.json", shard=Shard(number, 2)).lookup([path], workers=1)
    open_folder.chmod(0o555)
    try:
        with without_privileges():
            found = VideoIndex(open_folder / "index.json").lookup(here, workers=1)
    finally:
        open_folder.chmod(0o755)
    assert [info.frames for info in found.values()] == [10, 10]
    assert len(list(open_folder.glob("index.*-of-2.json"))) == 2


TAMPERED = {
    "more frames": lambda files, key: files[key][1].update(frames=99),
    "negative frames": lambda files, key: files[key][1].update(frames=-3),
    "huge frames": lambda files, key: files[key][1].update(frames=10**30),
    "frames as text": lambda files, key: files[key][1].update(frames="10"),
    "frames gone": lambda files, key: files[key][1].pop("frames"),
    "a field that is none": lambda files, key: files[key][1].update(surprise=1),
    "lying seek point": lambda files, key: files[key][1].update(seek_points=[[5, 0]]),
    "seek points as text": lambda files, key: files[key][1].update(seek_points="none"),
    "an error": lambda files, key: files[key][1].update(error="made up"),
    "info as a list": lambda files, key: files[key].__setitem__(1, []),
    "another file's entry": lambda files, key: files.update({key: files[max(files)]}),
    "entry as a number": lambda files, key: files.update({key: 7}),
    "entry as null": lambda files, key: files.update({key: None}),
    "entry without an end": lambda files, key: files.update({key: files[key][:2]}),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_entry_is_found_anew(videos, tmp_path, kind):
    cache = tmp_path / "index.json"
    want = VideoIndex(cache).lookup(videos[:2], workers=1)
    content = json.loads(cache.read_text())
    TAMPERED[kind](content["files"], videos[0])
    cache.write_text(json.dumps(content))
    assert VideoIndex(cache).lookup(videos[:2], workers=1) == want
    assert VideoIndex(cache).lookup(videos[:2], workers=1) == want


@pytest.mark.parametrize("content", ["[]", "7", '{"files": 3}', "null", '{"format": 2, "files": {}}', "\x00"])
def test_a_cache_of_another_shape_is_built_again(videos, tmp_path, content):
    cache = tmp_path / "index.json"
    cache.write_text(content)
    assert VideoIndex(cache).lookup(videos[:1], workers=1)[videos[0]].frames == 10
    current = {"format": index_module._FORMAT, "decoder": index_module._DECODER, "files": [content]}
    cache.write_text(json.dumps(current))
    assert VideoIndex(cache).lookup(videos[:1], workers=1)[videos[0]].frames == 10


def test_verify_full_decodes_what_was_only_counted(clips, tmp_path, monkeypatch):
    cache, path = tmp_path / "index.json", str(clips / "awkward/nasa_13013.mp4")
    probed = tmp_path / "probed"
    original = probe

    def noted(path):
        probed.write_text("yes")
        return original(path)

    monkeypatch.setattr(index_module, "probe", noted)
    counted = VideoIndex(cache).lookup([path], workers=1)
    assert not probed.exists()
    assert VideoIndex(cache, verify_full=True).lookup([path], workers=1) == counted and probed.exists()
    probed.unlink()
    assert VideoIndex(cache, verify_full=True).lookup([path], workers=1) == counted and not probed.exists()


def test_a_kind_of_file_whose_packets_lie_is_decoded(videos, monkeypatch, capsys):
    honest = index_module.count_packets
    monkeypatch.setattr(index_module, "_ONE_IN", 3)  # of the names 0.avi to 3.avi, one is decoded too
    monkeypatch.setattr(
        index_module, "count_packets", lambda path: (count := honest(path)) and count._replace(frames=count.frames + 1)
    )
    chosen = [path for path in videos[:4] if zlib.crc32(os.path.basename(path).encode()) % 3 == 0]
    assert 0 < len(chosen) < 4
    found = VideoIndex(None).lookup(videos, workers=2)
    assert [found[path].frames for path in videos[:4]] == [10] * 4
    assert "packets do not tell the frames of avi mpeg4 files" in capsys.readouterr().out


def test_the_index_of_real_clips_is_what_decoding_gives(clips, tmp_path):
    paths = [str(path) for path in sorted(clips.rglob("*")) if path.suffix in (".avi", ".mp4", ".mov", ".mkv")]
    counted, whole = (VideoIndex(None, verify_full=full).lookup(paths, workers=2) for full in (False, True))
    assert counted == whole and len(paths) == 24


def test_pixels_that_cannot_be_converted_are_found_by_the_index(tmp_path):
    """FFmpeg decodes 10-bit ICtCp and has no conversion to RGB."""
    path = str(tmp_path / "hdr.mkv")
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10"
        coded = stream.codec_context
        coded.colorspace, coded.color_trc, coded.color_primaries = 14, 16, 9
        for _ in range(3):
            frame = av.VideoFrame(64, 48, "yuv420p10")
            frame.colorspace, frame.color_trc, frame.color_primaries = 14, 16, 9
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError) as decoding:
        decode_frames(path, [0])
    assert VideoIndex(None).lookup([path], workers=1)[path].error == str(decoding.value)
    with pytest.raises(SourceError, match=r"hdr\.mkv: a frame cannot become RGB \("):
        list(frames_of(path))


def test_a_prepared_video_is_not_decoded_whole(videos, tmp_path, monkeypatch):
    convert(videos[0], tmp_path / "a.mov", Settings())
    frames = []
    original = JPEGVideo.frame
    monkeypatch.setattr(JPEGVideo, "frame", lambda self, index: frames.append(index) or original(self, index))
    info = probe(tmp_path / "a.mov")
    assert (info.frames, info.width, info.height, info.fps) == (10, 40, 40, 30) and frames == [0, 9]
