"""evaluate.py as a user runs it, on runs of both training scripts."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest
import torch

import evaluate
import train_fusion
import train_kinetics
from models import ReSpike
from tests.helpers.script import (
    all_metrics,
    command_line,
    finish,
    metrics,
    refused,
    run_here,
    run_main,
    start_python,
    start_ranks,
)
from utils.energy import count_operations
from utils.trained import load_trained

COMMON = {
    "--weights": "none", "--branches": "snn", "-T": "4", "--stride": "2", "--size": "32", "-b": "5", "-j": "0",
    "--epochs": "1", "--seed": "3",
}  # fmt: skip
WRITTEN = {"evaluation.json", "predictions.csv", "confusion.csv", "confusion.png", "calibration.png"}


@pytest.fixture(scope="module")
def runs(tiny_demo, tiny_lists, tmp_path_factory) -> dict:
    """A finished run of each script; that of train_fusion.py counts its energy, and its flags are here too."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"--dset": "hmdb51", "--data-root": tiny_demo[0], "--annotation-path": tiny_demo[1]}
    index = {"--index-dir": folder / "index"}
    fusion = {**COMMON, **index, **data, "--branches": "both", "--downsample": None, "--fusion": "lean"}
    for script, flags in (
        (train_fusion, fusion),
        (train_kinetics, {**COMMON, **index, **tiny_lists, "--no-energy": None, "--residual": "previous"}),
    ):
        run_main({**flags, "--run-dir": folder / script.__name__}, script)
    return {
        "fusion": folder / "train_fusion", "kinetics": folder / "train_kinetics", "index": folder / "index",
        "fusion flags": fusion,
    }  # fmt: skip


def evaluated(monkeypatch, capfd, runs, run: str, out: Path, **more) -> tuple[dict, str]:
    flags = {str(runs[run]): None, "--out": out, "--index-dir": runs["index"], "-j": 0}
    status, printed, err = run_here(monkeypatch, capfd, {**flags, **more}, evaluate)
    assert status == 0, err
    return json.loads((out / "evaluation.json").read_text()), printed


@pytest.mark.parametrize("run", ["fusion", "kinetics"])
def test_the_script_s_own_test_again(monkeypatch, capfd, runs, tmp_path, run):
    """The same integers, with nothing but the run folder given; and what the files hold agrees with them."""
    result, printed = evaluated(monkeypatch, capfd, runs, run, tmp_path / "out")
    (line,) = metrics(runs[run])
    assert result["counts"] == line["counts"] and result["video_top1"] == line["video_top1"]
    assert result["firing_rate"] == pytest.approx(line["firing_rate"]) and result["loss"] == pytest.approx(
        line["test_loss" if run == "fusion" else "val_loss"]
    )
    assert {file.name for file in (tmp_path / "out").iterdir()} == WRITTEN
    assert f"({line['counts']['video_top1']} of 8)" in printed

    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    classes = list(rows[0])[3:]
    assert len(rows) == 8 and all(Path(row["video"]).is_file() for row in rows)
    assert sum(row["label"] == row["predicted"] for row in rows) == line["counts"]["video_top1"]
    for row in rows:
        probabilities = {name: float(row[name]) for name in classes}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert max(probabilities, key=probabilities.get) == row["predicted"]
    with open(tmp_path / "out" / "confusion.csv") as file:
        counts = [[int(value) for value in row[1:]] for row in list(csv.reader(file))[1:]]
    assert sum(map(sum, counts)) == 8 and sum(counts[i][i] for i in range(8)) == line["counts"]["video_top1"]
    assert {name: of["videos"] for name, of in result["per_class"].items()} == dict.fromkeys(classes, 1)
    confidence = sum(max(float(row[name]) for name in classes) for row in rows) / 8
    assert 0 <= result["calibration_error"] <= 100 * max(confidence, 1 - confidence) + 1e-6


def test_energy_of_the_tested_clips(monkeypatch, capfd, runs, tmp_path):
    flags = {"--energy": None, "--views": 2, "--baseline": runs["kinetics"]}
    # Its data is the same; the baseline's own flags find it.
    result, printed = evaluated(monkeypatch, capfd, runs, "fusion", tmp_path, **flags)
    energy, counts = result["energy"], count_operations(ReSpike.from_checkpoint(runs["fusion"]), 4, 32)
    macs = sum(part["operations"] for part in energy["parts"].values() if part["kind"] == "mac")
    assert macs == counts["total.macs"]
    assert energy["total_mj"] == pytest.approx(sum(part["mj"] for part in energy["parts"].values()))
    assert energy["video_mj"] == pytest.approx(2 * energy["total_mj"])
    assert 0 < energy["parts"]["spiking_convs"]["operations"] < counts["snn.spiking_convs.dense_existing"]
    assert energy["spikes"]["clips"] == result["counts"]["clips"] == 16
    other = energy["baselines"][str(runs["kinetics"])]
    assert other["video_top1"] == metrics(runs["kinetics"])[0]["video_top1"] and other["mj"] > 0
    assert "estimate, not a measurement" in printed and "r2plus1d_18_224" in printed

    # The training script counted the same clips at the end of its run (one view).
    closing = all_metrics(runs["fusion"])[-1]
    once, _ = evaluated(monkeypatch, capfd, runs, "fusion", tmp_path, **{"--energy": None})
    assert closing["energy"]["parts"] == once["energy"]["parts"]
    assert closing["device_hours"] > 0 and closing["peak_memory_bytes"] > 1e6 and "epoch" not in closing


def test_other_constants(monkeypatch, capfd, runs, tmp_path):
    flags = {"--energy": None, "--mac-pj": 1, "--ac-pj": 2}
    result, _ = evaluated(monkeypatch, capfd, runs, "fusion", tmp_path, **flags)
    parts = result["energy"]["parts"]
    picojoule = {"mac": 1, "ac": 2, "mac+ac": 3}
    want = sum(1e-9 * picojoule[part["kind"]] * part["operations"] for part in parts.values())
    assert result["energy"]["total_mj"] == pytest.approx(want)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_count_the_same(runs, tmp_path, processes):
    """Two by torchrun, three that are forked."""
    flags = {str(runs["fusion"]): None, "--out": tmp_path, "--index-dir": runs["index"], "-j": 0, "--energy": None}
    command = ["evaluate.py", *command_line(flags)]
    finish(start_python(command, 2) if processes == 2 else start_ranks(["run", *command], 3))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["counts"] == metrics(runs["fusion"])[0]["counts"] and result["protocol"]["processes"] == processes
    parts = all_metrics(runs["fusion"])[-1]["energy"]["parts"]
    assert result["energy"]["parts"] == parts
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 9


def test_an_exported_network(monkeypatch, capfd, runs, tmp_path):
    file = tmp_path / "network.safetensors"
    status, printed, _ = run_here(monkeypatch, capfd, {str(runs["fusion"]): None, "--export": file}, evaluate)
    assert status == 0 and str(file) in printed
    flags = {str(file): None, "--index-dir": runs["index"], "-j": 0}
    assert run_here(monkeypatch, capfd, flags, evaluate)[0] == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())  # beside the file
    assert result["counts"] == metrics(runs["fusion"])[0]["counts"]


def test_measured_batch_norm_of_a_run_that_did_not_measure(monkeypatch, capfd, runs, tmp_path, tiny_lists):
    """It is what the training would have measured with --precise-bn: the weights are the same, and so are the clips.
    What was measured can be exported. A list that has moved is named anew."""
    run = tmp_path / "measured"
    run_main(runs["fusion flags"] | {"--precise-bn": 9, "--no-energy": None, "--run-dir": run}, train_fusion)
    (line,) = metrics(run)
    assert line["test_loss"] != metrics(runs["fusion"])[0]["test_loss"]
    file = tmp_path / "measured.safetensors"
    flags = {"--precise-bn": 9, "--export": file}
    result, printed = evaluated(monkeypatch, capfd, runs, "fusion", tmp_path / "out", **flags)
    assert result["loss"] == line["test_loss"] and result["counts"] == line["counts"]
    assert result["protocol"]["precise_bn_clips"] == 9 and "measured on 9 training clips in" in printed
    own = load_trained(run / "best.pt").weights
    assert all(torch.equal(value, own[name]) for name, value in load_trained(file).weights.items())
    assert f"weights and settings of {runs['fusion'] / 'best.pt'}, with the measured statistics" in printed

    moved = tmp_path / "moved.txt"
    moved.write_text(tiny_lists["--train-list"].read_text())
    again = {"--precise-bn": 9, "--train-list": moved, "--train-root": tiny_lists["--train-list"].parent}
    result, _ = evaluated(monkeypatch, capfd, runs, "kinetics", tmp_path / "lists", **again)
    assert result["loss"] != metrics(runs["kinetics"])[0]["val_loss"]
    first, *_ = tiny_lists["--val-list"].read_text().splitlines(keepends=True)
    (tmp_path / "one.txt").write_text(first)  # of one class; nothing is trained, so a small last batch does not matter
    again |= {"--val-list": tmp_path / "one.txt", "--val-root": tiny_lists["--val-list"].parent, "-b": 4}
    result, printed = evaluated(monkeypatch, capfd, runs, "kinetics", tmp_path / "one", **again)
    assert result["counts"]["videos"] == 1 and "the loss may grow" not in printed
    refused(monkeypatch, capfd, {str(runs["fusion"]): None, "--train-list": moved}, "only --precise-bn N", evaluate)


def test_three_splits(monkeypatch, capfd, runs, tmp_path, tiny_demo):
    """The demo's split files stand for those of all three splits."""
    lists = tmp_path / "splits"
    lists.mkdir()
    copies = []
    for split in (3, 1, 2):
        for file in Path(tiny_demo[1]).glob("*_test_split1.txt"):
            (lists / file.name.replace("split1", f"split{split}")).write_text(file.read_text())
        state = torch.load(runs["fusion"] / "best.pt", weights_only=True)
        state["flags"]["split"] = split
        copies.append(tmp_path / f"run{split}")
        copies[-1].mkdir()
        torch.save(state, copies[-1] / "best.pt")
    flags = {**dict.fromkeys(map(str, copies)), "--split": "all", "--annotation-path": lists, "-j": 0}
    flags |= {"--index-dir": runs["index"], "--out": tmp_path / "out"}
    status, printed, err = run_here(monkeypatch, capfd, flags, evaluate)
    assert status == 0, err
    summary = json.loads((tmp_path / "out" / "splits.json").read_text())
    want = metrics(runs["fusion"])[0]["video_top1"]
    assert summary["video_top1"] == {"mean": want, "std": 0.0, "splits": [want] * 3}
    assert f"video_top1 over three splits: {want:.2f} +- 0.00 %" in printed
    assert (tmp_path / "out" / "split2" / "evaluation.json").is_file()
    again = {**dict.fromkeys(map(str, [copies[0], copies[0] / "best.pt", copies[1]])), "--split": "all"}
    refused(monkeypatch, capfd, again, r"--split all: expected one run of each of the splits 1, 2 and 3", evaluate)


def test_mistakes_are_one_line(monkeypatch, capfd, runs, tmp_path):
    fusion, kinetics = str(runs["fusion"]), str(runs["kinetics"])
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    index = {"--index-dir": runs["index"]}
    for flags, message in (
        ({str(tmp_path): None}, r"best\.pt: no such checkpoint"),
        ({str(tmp_path / "broken.pt"): None}, r"broken\.pt: not a readable checkpoint"),
        ({fusion: None, "--data-root": "/gone", **index}, r"--data-root /gone: no such folder"),
        ({fusion: None, "--annotation-path": "/gone", **index}, r"--annotation-path /gone: no such folder"),
        ({fusion: None, "--val-list": "v.txt", **index}, r"--val-list: not a flag of train_fusion\.py"),
        ({kinetics: None, "--split": "2", **index}, r"--split: not a flag of train_kinetics\.py"),
        ({kinetics: None, "--val-list": "/gone.txt", **index}, r"--val-list /gone\.txt: no such file"),
        ({fusion: None, kinetics: None}, r"several checkpoints are the runs of the three splits"),
        ({fusion: None, "--split": "all"}, r"--split all: expected the runs of splits 1, 2 and 3, got 1"),
        ({fusion: None, "--baseline": kinetics}, r"--baseline: .* it goes with --energy"),
        ({fusion: None, "--export": tmp_path / "x.pt"}, r"--export .*must end in \.safetensors"),
        ({fusion: None, "--export": tmp_path / "x.safetensors", "--energy": None}, r"--export: writes one network"),
        ({fusion: None, "--export": tmp_path / "x.safetensors", "--views": 2}, r"--export: writes one network"),
        ({fusion: None, "--export": tmp_path / "x.pt", "--precise-bn": 8}, r"--export .*must end in \.safetensors"),
        ({fusion: None, "--energy": None, "--mac-pj": "0"}, r"--mac-pj must be at least 0\.001, got 0"),
        ({fusion: None, "--crops": 2}, r"--crops"),
        ({fusion: None, "--out": runs["fusion"] / "best.pt" / "x", **index}, r"cannot be written .*--out"),
    ):
        refused(monkeypatch, capfd, flags, message, evaluate)


def test_a_folder_that_takes_no_file_is_known_before_the_test(monkeypatch, capfd, runs, tmp_path):
    def refuse(**where):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("evaluate.test_network", None)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write into any folder, but not on any disk
    message = r"train_fusion: cannot be written \(Read-only file system\); name a writable folder with --out"
    refused(monkeypatch, capfd, {str(runs["fusion"]): None}, message, evaluate)
    (tmp_path / "file").write_text("")
    message = r"file/out: cannot be written \(Not a directory\); name a writable folder with --out"
    refused(monkeypatch, capfd, {str(runs["fusion"]): None, "--out": tmp_path / "file/out"}, message, evaluate)
