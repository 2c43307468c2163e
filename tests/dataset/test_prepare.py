import json
import os
import shutil
import signal

import pytest

import dataset.convert
import dataset.prepare as prepare
from dataset.demo import DEMOS, DemoSettings, generate_demo
from dataset.index import probe
from dataset.lists import VideoList, read_lists
from dataset.splits import read_hmdb51
from tests.helpers.kill_prepare import content, kills_leave_the_same_folder, start, wait_for_work
from tests.helpers.script import command_line, full_disk, refused, run_here


def test_the_same_lists_find_the_prepared_files(run_prepare, tiny_lists, tmp_path, capfd):
    run_prepare()
    out = tmp_path / "out"
    found = {}
    for root in (tiny_lists["--train-list"].parent, out):
        lists = [VideoList(part, tiny_lists[f"--{part}-list"], root) for part in ("train", "val")]
        split = read_lists(*lists)
        found[root] = [(r.name, r.label, r.group) for r in split.train + split.test]
        assert not split.missing
    assert len(set(map(tuple, found.values()))) == 1
    assert "24 videos of" in capfd.readouterr().out
    manifest = json.loads((out / "prepared.json").read_text())
    assert manifest["complete"] and (manifest["videos"], manifest["frames"]) == (32, 320)
    files = list(out.rglob("*.mov"))
    assert manifest["bytes"] == sum(path.stat().st_size for path in files) and len(files) == 32
    assert set(os.listdir(out)) == {"videos", "prepared.json"}


def test_hmdb51s_layout_finds_them(tiny_demo, tmp_path, monkeypatch, capfd):
    data_root = tiny_demo[0]
    annotations = shutil.copytree(tiny_demo[1], tmp_path / "splits")
    for file in list(annotations.iterdir()):
        for split in "23":  # the official data set has three splits
            shutil.copy(file, str(file).replace("split1", f"split{split}"))
    flags = {"--dset": "hmdb51", "--data-root": data_root, "--annotation-path": annotations, "--out": tmp_path / "out"}
    assert run_here(monkeypatch, capfd, flags, prepare)[0] == 0
    before, after = (read_hmdb51(root, annotations, 2) for root in (data_root, tmp_path / "out"))
    assert [(r.name, r.label, r.group) for r in after.train] == [(r.name, r.label, r.group) for r in before.train]
    assert all(record.path.endswith(".mov") for record in after.train + after.test)
    assert not after.missing and not after.unlisted
    assert "on disk with another extension than listed" in capfd.readouterr().out


def test_a_second_start_does_what_is_missing(run_prepare, tmp_path, monkeypatch):
    run_prepare()
    before = content(tmp_path / "out")
    first, second, third = sorted((tmp_path / "out").rglob("*.mov"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    third.with_name(f".{third.name}.tmp").write_bytes(b"half")
    original = dataset.convert.convert
    marker = tmp_path / "converted"

    def noted(source, target, settings):
        with open(marker, "a") as file:
            file.write(f"{target}\n")
        return original(source, target, settings)

    monkeypatch.setattr(dataset.convert, "convert", noted)
    run_prepare()
    converted = marker.read_text().splitlines()
    assert sorted(converted) == [str(first), str(second)] and content(tmp_path / "out") == before


def test_verify_full_finds_a_damaged_frame(run_prepare, tmp_path):
    run_prepare()
    before = content(tmp_path / "out")
    path = min((tmp_path / "out").rglob("*.mov"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run_prepare()
    assert content(tmp_path / "out") != before
    run_prepare(verify="full")
    assert content(tmp_path / "out") == before


def test_folders_and_flags_that_cannot_work(refuse_prepare, tiny_lists, tmp_path):
    folder = tiny_lists["--train-list"].parent
    refuse_prepare(r"--out .*: holds other files and no prepared\.json", out=folder)
    refuse_prepare(r"--quality must be 1 to 100, got 0", quality=0)
    refuse_prepare(r"--short-side must be at least 16", short_side=0)
    refuse_prepare(r"--limit-fps must be", limit_fps="nan")
    refuse_prepare(r"--jobs must be at least 1", jobs=0)
    refuse_prepare(r"needs at least one", train_list="", val_list="")
    refuse_prepare(r"--train-list: --dset hmdb51 has no lists", dset="hmdb51")
    outside = tmp_path / "lists"
    outside.mkdir()
    video = next(folder.glob("videos/*/*.avi"))
    (outside / "a.txt").write_text(f"{video} 0\n")
    refuse_prepare(r"lies outside of", train_list=outside / "a.txt", val_list="")
    shutil.copy(video, outside / "x.avi")
    shutil.copy(video, outside / "x.mp4")
    (outside / "a.txt").write_text("x.avi 0\nx.mp4 1\n")
    refuse_prepare(r"x\.avi and .*x\.mp4 would both become .*x\.mov", train_list=outside / "a.txt", val_list="")


def test_a_full_disk_ends_it_with_one_line(tiny_lists, tmp_path, monkeypatch, capfd):
    with full_disk(9_000):
        message = r"cannot be written \(File too large\); 0 videos are done"
        refused(monkeypatch, capfd, {**tiny_lists, "--out": tmp_path / "out", "--jobs": 1}, message, prepare)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["prepared.json"]


def test_dry_run_predicts_and_writes_nothing(run_prepare, tmp_path):
    out = run_prepare(dry_run=None)
    assert "from 16 videos: about 0.00 GB" in out and "minutes with --jobs 2" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_half_written(clips, tmp_path, number):
    (tmp_path / "list.txt").write_text(
        "".join(f"{path.name} 0\n" for path in sorted((clips / "kinetics400").iterdir()))
    )
    flags = {"--dset": "list", "--train-list": tmp_path / "list.txt", "--data-root": clips / "kinetics400"}
    process = start(command_line(flags), tmp_path / "out")
    wait_for_work(process, tmp_path / "out")
    process.send_signal(number)
    out = process.communicate(timeout=20)[0]
    assert process.returncode in (130, 143) and "Traceback" not in out, out
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "prepared.json"]
    assert all(probe(path).frames > 200 for path in left) and len(left) < 6


def test_killed_and_started_again(tiny_lists, tmp_path):
    """tests/helpers/kill_prepare.py does this ten times on real clips (benchmarks/RESULTS.md)."""
    kills_leave_the_same_folder([*command_line(tiny_lists), "--jobs", "2"], tmp_path, kills=2, seed=0)


@pytest.mark.parametrize("name, kind, videos", [("demo", "motion", (24, 8)), ("demo-binding", "binding", (12, 4))])
def test_a_demos_prepared_folder_is_a_demo_data_set(tmp_path, monkeypatch, capfd, name, kind, videos):
    settings = DemoSettings(train_videos_per_class=3, test_videos_per_class=1, frames=10, side_pixels=40, kind=kind)
    monkeypatch.setitem(DEMOS, name, settings)
    flags = {"--dset": name, "--data-root": tmp_path / "demo", "--out": tmp_path / "out"}
    for _ in range(2):  # the second start finds everything
        status, _, err = run_here(monkeypatch, capfd, flags, prepare)
        assert status == 0, err
    data_root, annotations = generate_demo(tmp_path / "out", settings, workers=1)
    split = read_hmdb51(data_root, annotations, 1)
    assert (len(split.train), len(split.test), split.missing) == (*videos, [])
    assert all(record.path.endswith(".mov") for record in split.train + split.test)
