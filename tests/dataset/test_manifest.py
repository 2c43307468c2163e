"""What a prepared folder says of itself, whether one process made it or several."""

import json
import shutil

import pytest

import dataset.prepare as prepare
from dataset.shards import Shard
from tests.helpers.kill_prepare import content
from tests.helpers.script import full_disk, refused


def test_other_settings_are_refused_by_name(run_prepare, refuse_prepare, tmp_path):
    run_prepare(quality=80)
    refuse_prepare(r"out: was prepared with quality 80, not 90")
    refuse_prepare(r"out: was prepared with short side 256, not 128", quality=80, short_side=128)
    (tmp_path / "out" / "prepared.json").write_text("[]")
    refuse_prepare(r"prepared\.json: is not a manifest")


def test_broken_videos_are_named_and_the_rest_goes_on(tiny_lists, tmp_path, run_prepare, refuse_prepare):
    folder = tmp_path / "data"
    shutil.copytree(tiny_lists["--train-list"].parent, folder)
    broken, gone = sorted((folder / "videos").rglob("*.avi"))[:2]
    broken.write_bytes(b"no video")
    gone.unlink()
    lists = {"train_list": folder / "train.txt", "val_list": folder / "val.txt"}
    out = run_prepare(**lists)
    assert "1 videos cannot be read" in out and "1 listed videos are not on disk" in out
    (line,) = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert line.startswith(f"{broken}: not a")
    assert (tmp_path / "out" / "missing.txt").read_text() == f"{gone}\n"
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["videos"] == 30
    refuse_prepare(rf"--strict: {broken}: not a", strict=None, **lists)


# ---- shards: jobs of an array ------------------------------------------------------------------------


@pytest.fixture
def some_broken(tiny_lists, tmp_path) -> dict:
    """Lists of 32 videos, of which two are broken and one is gone."""
    folder = shutil.copytree(tiny_lists["--train-list"].parent, tmp_path / "data")
    for broken in sorted((folder / "videos").rglob("*.avi"))[5:25:15]:
        broken.write_bytes(b"no video")
    max((folder / "videos").rglob("*.avi")).unlink()
    return {"train_list": folder / "train.txt", "val_list": folder / "val.txt"}


def without_shards(folder) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if not name.startswith(".shards/")}


def test_shards_in_any_order_leave_the_folder_of_one_process(run_prepare, some_broken, tmp_path):
    run_prepare(out=tmp_path / "whole", **some_broken)
    out = [run_prepare(shard=f"{number}/3", **some_broken) for number in (2, 3, 1)]
    assert without_shards(tmp_path / "out") == content(tmp_path / "whole")
    assert "31 videos, 1 listed" in out[0] and "of them in shard 2 of 3" in out[0]
    assert "not done, or done with other videos: 1, 3. The last one writes" in out[0]
    assert "shard 3 of 3 is done" in out[1] and "other videos: 1. The" in out[1]
    assert "29 videos, 290 frames" in out[2] and "2 videos cannot be read" in out[2]


def test_a_shard_converts_its_own_videos_alone(run_prepare, tmp_path):
    run_prepare(shard="1/4")
    here = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.mov")}
    assert 0 < len(here) < 16 and all(Shard(1, 4).has(name) for name in here)
    assert not json.loads((tmp_path / "out" / "prepared.json").read_text())["complete"]


def test_a_shard_leaves_what_another_is_writing(run_prepare, tmp_path):
    run_prepare(shard="1/2")
    names = [path.with_name(f".{path.name}.tmp") for path in (tmp_path / "out").rglob("*.mov")]
    own, another = names[0], names[0].with_name(".another.mov.tmp")
    for partial in (own, another):
        partial.write_bytes(b"half")
    run_prepare(shard="1/2")
    assert not own.exists() and another.exists()


def test_a_shard_that_was_stopped_is_started_again(run_prepare, tiny_lists, tmp_path, monkeypatch, capfd):
    run_prepare(out=tmp_path / "whole")
    run_prepare(shard="1/2")
    flags = {**tiny_lists, "--out": tmp_path / "out", "--jobs": 1, "--shard": "2/2"}
    with full_disk(9_000):
        refused(monkeypatch, capfd, flags, r"cannot be written \(File too large\)", prepare)
    assert not json.loads((tmp_path / "out" / "prepared.json").read_text())["complete"]
    run_prepare(shard="2/2")
    assert without_shards(tmp_path / "out") == content(tmp_path / "whole")


def test_a_shard_that_is_started_once_more_mends_its_files(run_prepare, tmp_path):
    for number in (1, 2):
        run_prepare(shard=f"{number}/2")
    before = content(tmp_path / "out")
    damaged = next(path for path in sorted((tmp_path / "out").rglob("*.mov")) if Shard(1, 2).has(
        str(path.relative_to(tmp_path / "out"))))  # fmt: skip
    damaged.write_bytes(damaged.read_bytes()[:-20])
    run_prepare(shard="1/2")
    assert content(tmp_path / "out") == before


def test_shards_of_other_videos_do_not_count(run_prepare, tmp_path):
    """One list, then the other, in as many shards: each is complete only after all of its own shards."""
    for number in (1, 2):
        run_prepare(shard=f"{number}/2", val_list="")
    out = run_prepare(shard="1/2", train_list="")
    assert "other videos: 2. The" in out
    manifest = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert not manifest["complete"] and len(manifest["files"]) == 24
    run_prepare(shard="2/2", train_list="")
    manifest = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert manifest["complete"] and manifest["videos"] == 32


def test_a_shard_may_have_no_video(run_prepare, tiny_lists, tmp_path):
    (tmp_path / "list.txt").write_text(tiny_lists["--train-list"].read_text().splitlines()[0])
    lists = {"train_list": tmp_path / "list.txt", "val_list": "", "train_root": tiny_lists["--train-list"].parent}
    for more in ({"dry_run": None}, {}):
        out = [run_prepare(shard=f"{number}/3", **lists, **more) for number in (1, 2, 3)]
        assert sum("0 of them in shard" in text for text in out) == 2
    assert "prepare: 1 videos, 10 frames" in out[-1]


def test_what_cannot_be_sharded(refuse_prepare, run_prepare, tmp_path):
    refuse_prepare(r"--shard must be such as 3/16, the third of 16, from 1/16 to 16/16, got 0/2", shard="0/2")
    refuse_prepare(r"--shard: demo is generated by one process", shard="1/2", dset="demo", train_list="", val_list="")
    run_prepare(shard="1/2", quality=80)
    refuse_prepare(r"out: was prepared with quality 80, not 90", shard="2/2")
