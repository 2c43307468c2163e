"""The full cycle on real clips with official lists: prepare, train a step, test, the lists as they are."""

import json

import pytest

import dataset.prepare
import evaluate
import train_fusion
import train_kinetics
from dataset.demo import DEMOS, DemoSettings
from dataset.index import VideoIndex
from tests.helpers.script import run_here

SMALL = {
    "--weights": "none", "--branches": "snn", "-T": 4, "--stride": 2, "--size": 32, "-b": 2, "-j": 0, "--epochs": 1,
}  # fmt: skip
VIDEOS = {"hmdb51": 4, "ucf101": 4, "kinetics400": 6}


@pytest.mark.parametrize("dset", VIDEOS)
@pytest.mark.usefixtures("one_thread")
def test_prepare_train_test(monkeypatch, capfd, clips, splits, tmp_path, dset):
    source = {"--dset": dset, "--annotation-path": splits / dset}
    script = train_fusion
    if dset == "kinetics400":
        names = sorted(path.name for path in (clips / dset).iterdir())
        for part, videos in (("train", names), ("val", names[:2])):  # the official lists have none of them
            (tmp_path / f"{part}.txt").write_text("".join(f"{name} {n}\n" for n, name in enumerate(videos)))
        source = {
            "--dset": dset, "--train-list": tmp_path / "train.txt", "--val-list": tmp_path / "val.txt",
            "--label-map": splits / dset / "label_map_k400.txt",
        }  # fmt: skip
        script = train_kinetics
    out = tmp_path / "prepared"
    prepare = {**source, "--data-root": clips / dset, "--out": out}
    status, _, err = run_here(monkeypatch, capfd, prepare, dataset.prepare)
    assert status == 0, err

    before = sorted(str(path) for path in (clips / dset).rglob("*") if path.is_file())
    after = sorted(str(path) for path in out.rglob("*.mov"))
    found = VideoIndex(None).lookup([*before, *after], workers=2)
    assert len(after) == VIDEOS[dset]
    assert [found[path].frames for path in after] == [found[path].frames for path in before]

    run = {**source, "--data-root": out, **SMALL, "--run-dir": tmp_path / "run", "--index-dir": tmp_path / "index"}
    status, printed, err = run_here(monkeypatch, capfd, run, script)
    assert status == 0, err
    lists = 2 if dset == "kinetics400" else 1
    assert printed.count("are on disk with another extension than listed") == lists, printed
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2  # an epoch, the run
    status, _, err = run_here(monkeypatch, capfd, {**run, "--resume": "auto", "--test-only": None}, script)
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "test.json").read_text())["counts"]["videos"] in (1, 2, 3)


@pytest.mark.usefixtures("one_thread")
def test_a_demo_is_generated_trained_on_and_tested_on(monkeypatch, capfd, tmp_path):
    """The scripts know the demo of both branches by its name; what they read is what the checkpoint is tested on."""
    monkeypatch.setitem(DEMOS, "demo-binding", DemoSettings(2, 1, frames=4, side_pixels=32, kind="binding"))
    run = {**SMALL, "--dset": "demo-binding", "--data-root": tmp_path / "demo", "--run-dir": tmp_path / "run"}
    status, printed, err = run_here(monkeypatch, capfd, {**run, "--index-dir": tmp_path / "index"})
    assert status == 0 and "training on 8 clips of 8 videos; 4 to test" in printed, err
    flags = {str(tmp_path / "run/best.pt"): None, "--index-dir": tmp_path / "index", "-j": 0}
    status, printed, err = run_here(monkeypatch, capfd, flags, evaluate)
    assert status == 0 and " of 4)" in printed, err
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["protocol"]["dset"] == "demo-binding"
    status, _, err = run_here(monkeypatch, capfd, {**run, "--annotation-path": tmp_path, "--overwrite": None})
    assert status == 2 and err.startswith("error: --annotation-path: a demo makes its own split files")
