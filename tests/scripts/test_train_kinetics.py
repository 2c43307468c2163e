"""The script on real clips and on lists, and what a long run meets: damage to files, processes and disks."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

import train_kinetics
from tests.helpers.script import comparable, copy_run, full_disk, metrics, run_here, run_main, same_weights
from tests.helpers.script import refused as refused_by
from utils.checkpoint import load_checkpoint
from utils.signals import StopRequest


def run(monkeypatch, capfd, flags):
    return run_here(monkeypatch, capfd, flags, train_kinetics)


def refused(monkeypatch, capfd, flags, message):
    refused_by(monkeypatch, capfd, flags, message, train_kinetics)


def flags_in(folder: Path, tiny_lists: dict) -> dict:
    return tiny_lists | {
        "--weights": "none", "--branches": "snn", "-T": 4, "--stride": 2, "--size": 32, "-b": 5, "-j": 0, "--epochs": 2,
        "-lr": 0.002, "--index-dir": folder / "index", "--run-dir": folder / "run", "--seed": 3,
    }  # fmt: skip


@pytest.fixture
def list_flags(tiny_lists, tmp_path) -> dict:
    return flags_in(tmp_path, tiny_lists)


def test_the_published_command_on_real_clips(monkeypatch, capfd, clips, tmp_path):
    lines = [f"{file.name} {label}" for label, file in enumerate(sorted((clips / "kinetics400").iterdir()))]
    (tmp_path / "train.txt").write_text("\n".join([*lines, "gone.mp4 2"]))
    (tmp_path / "val.txt").write_text("\n".join(lines[:4]))
    flags = {
        "--dset": "kinetics400", "-b": 16, "-T": 16, "--stride": 2, "-lr": 0.0001, "--model": "resnet50", "-j": 8,
        "--downsample": None,
        "--train-list": tmp_path / "train.txt", "--val-list": tmp_path / "val.txt",
        "--data-root": clips / "kinetics400", "--num-classes": 400, "--size": 32, "--epochs": 1, "--weights": "none",
        "--run-dir": tmp_path / "run",
        "--index-dir": tmp_path / "index",
    }  # fmt: skip
    status, out, err = run(monkeypatch, capfd, flags)
    assert status == 0, err
    assert "training on 6 videos; 4 to test, 1 views x 1 crops each" in out
    assert "1 listed videos are not on disk" in out and "400 classes" in out
    (line,) = metrics(tmp_path / "run")
    assert line["evaluated_on"] == "val" and line["counts"]["videos"] == 4
    assert (tmp_path / "run/missing.txt").read_text().endswith("gone.mp4\n")


def test_views_and_crops_are_averaged_and_named(monkeypatch, capfd, list_flags):
    more = {"--views": 2, "--crops": 3, "--epochs": 1}
    status, out, err = run(monkeypatch, capfd, list_flags | more)
    assert status == 0 and "8 to test, 2 views x 3 crops each" in out and "2 x 3 clips a video" in out, err
    (line,) = metrics(Path(list_flags["--run-dir"]))
    assert line["counts"]["videos"] == 8 and line["counts"]["clips"] == 48
    status, _, err = run(monkeypatch, capfd, list_flags | more | {"--resume": "auto", "--test-only": None})
    assert status == 0, err
    result = json.loads((Path(list_flags["--run-dir"]) / "test.json").read_text())
    alone = {flag: value for flag, value in list_flags.items() if flag != "--train-list"}  # needs no training videos
    status, out, err = run(monkeypatch, capfd, alone | {"--resume": "auto", "--test-only": None})
    assert status == 0 and "8 to test, 1 views x 1 crops" in out, err
    assert result["counts"] == line["counts"]
    assert (result["views"], result["crops"], result["sampling"], result["frames"]) == (2, 3, "segments", 4)


def test_windows_instead_of_segments(monkeypatch, capfd, list_flags):
    status, _, err = run(
        monkeypatch, capfd, list_flags | {"--sampling": "window", "--frame-stride": 2, "--epochs": 1, "--no-flip": None}
    )
    assert status == 0 and len(metrics(Path(list_flags["--run-dir"]))) == 1, err


def test_published_flags_and_defaults(monkeypatch):
    published = "--dset kinetics400 -b 16 -T 16 --stride 2 -lr 0.0001 --model resnet50 -j 8 --downsample"
    monkeypatch.setattr(sys, "argv", ["train_kinetics.py", *published.split()])
    args = train_kinetics.parse_args()
    assert (args.dset, args.batch_size, args.time, args.stride, args.learning_rate) == (
        "kinetics400",
        16,
        16,
        2,
        0.0001,
    )
    assert (args.model, args.workers, args.downsample, args.amp) == ("resnet50", 8, True, True)
    monkeypatch.setattr(sys, "argv", ["train_kinetics.py"])
    args = train_kinetics.parse_args()
    assert (args.dset, args.model, args.batch_size, args.learning_rate) == ("kinetics400", "resnet18", 64, 0.01)
    assert (args.epochs, args.weight_decay, args.seed, args.time, args.stride) == (100, 1e-4, 1001, 16, 4)
    assert (args.sampling, args.views, args.crops, args.keep) == ("segments", 1, 1, 2)


BAD_FLAGS = {
    "absent list": ({"--val-list": "/nowhere.txt"}, r"--val-list /nowhere\.txt: no such file; expected lines"),
    "absent root": ({"--train-root": "/nowhere"}, r"--train-root /nowhere: no such folder"),
    "classes": ({"--num-classes": 3}, r"train\.txt:\d+: label 3, but there are 3 classes"),
    "no classes": ({"--num-classes": 0}, r"--num-classes must be at least 1"),
    "crops": ({"--crops": 2}, r"--crops: invalid choice: 2"),
    "stride of segments": ({"--frame-stride": 2}, r"--frame-stride: .*--sampling window"),
    "T": ({"-T": 5}, r"-T must be a multiple of --stride"),
    "data set": ({"--dset": "hmdb51"}, r"--dset: invalid choice: 'hmdb51'"),
}


@pytest.mark.parametrize("change, message", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags(monkeypatch, capfd, list_flags, change, message):
    refused(monkeypatch, capfd, list_flags | change, message)


def test_a_list_is_needed(monkeypatch, capfd, list_flags):
    without = {flag: value for flag, value in list_flags.items() if flag != "--val-list"}
    refused(monkeypatch, capfd, without, r"--val-list: --dset list needs it")


# ---- damage -----------------------------------------------------------------------------------------


def in_mid_epoch(monkeypatch, action, question: int = 3) -> None:
    """Do something when the run asks for the n-th time whether it was told to stop: before its n-th step."""
    asked = []
    original = StopRequest.requested

    def requested(self):
        asked.append(1)
        if len(asked) == question:
            action()
        return original(self)

    monkeypatch.setattr(StopRequest, "requested", requested)


@pytest.fixture(scope="module")
def undisturbed(tiny_lists, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_main(flags_in(folder, tiny_lists), train_kinetics)
    return folder / "run"


@pytest.fixture(scope="module")
def stopped(tiny_lists, tmp_path_factory) -> Path:
    """A run that SIGTERM stopped in its second epoch, with checkpoints of every step; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        in_mid_epoch(patch, lambda: os.kill(os.getpid(), signal.SIGTERM), question=10)
        run_main(flags_in(folder, tiny_lists) | {"--checkpoint-minutes": 1e-9}, train_kinetics)
    return folder / "run"


@pytest.mark.parametrize("damage", ["cut in half", "a flipped bit", "gone"])
def test_the_newest_checkpoint_is_damaged(monkeypatch, capfd, list_flags, undisturbed, stopped, damage):
    folder = copy_run(stopped, list_flags["--run-dir"])
    last = folder / "last.pt"
    position, content = load_checkpoint(last)["position"], bytearray(last.read_bytes())
    assert position["epoch"] == 1 and position["clips"] > 0
    last.unlink()
    if damage == "cut in half":
        last.write_bytes(content[: len(content) // 2])
    elif damage == "a flipped bit":
        content[len(content) // 2] ^= 8
        last.write_bytes(content)
    status, out, err = run(monkeypatch, capfd, list_flags | {"--resume": "auto"})
    assert status == 0, err
    assert "resumed from" in out and "last-1.pt" in out and ("is damaged" in out) == (damage != "gone")
    assert comparable(folder) == comparable(undisturbed) and same_weights(folder, undisturbed)


def test_a_video_deleted_and_one_corrupted_in_mid_epoch(monkeypatch, capfd, list_flags, tiny_demo, tmp_path):
    monkeypatch.setattr("dataset.video.RETRY_SECONDS", 0.0)
    root = shutil.copytree(tiny_demo[0].parent, tmp_path / "demo")
    flags = list_flags | {"--data-root": root, "--epochs": 3, "-b": 4}
    deleted, corrupted = sorted(root.glob("videos/*/train*.avi"))[1:3]

    def damage():
        deleted.unlink()
        corrupted.write_bytes(b"\0" * corrupted.stat().st_size)

    in_mid_epoch(monkeypatch, damage)
    status, _, err = run(monkeypatch, capfd, flags)
    assert status == 0, err
    folder = Path(flags["--run-dir"])
    broken = (folder / "broken.txt").read_text().splitlines()
    assert sorted(line.split(": ")[0] for line in broken) == [str(deleted), str(corrupted)]
    assert err.count("warning: left out: ") == 2 and len(metrics(folder)) == 3


def test_labels_that_were_changed_in_mid_epoch_are_refused(monkeypatch, capfd, list_flags, stopped, tmp_path):
    """Paths, order and number of the videos are the same; classes 0 and 1 have changed places."""
    copy_run(stopped, list_flags["--run-dir"])
    lines = [line.rsplit(" ", 1) for line in Path(list_flags["--train-list"]).read_text().splitlines()]
    swapped = tmp_path / "train.txt"
    swapped.write_text("".join(f"{path} {({'0': '1', '1': '0'}).get(label, label)}\n" for path, label in lines))
    root = Path(list_flags["--train-list"]).parent
    refused(
        monkeypatch,
        capfd,
        list_flags | {"--train-list": swapped, "--train-root": root, "--resume": "auto"},
        r"last\.pt: stopped in mid-epoch with another set of training clips: of its 24 clips 0 are not there, 0 are "
        r"new, 6 have another label; continue",
    )


def test_a_data_loading_process_is_killed(monkeypatch, capfd, list_flags):
    folder = Path(list_flags["--run-dir"])
    with monkeypatch.context() as patch:
        in_mid_epoch(patch, lambda: multiprocessing.active_children()[0].kill(), question=2)
        status, _, err = run(patch, capfd, list_flags | {"-j": 1, "-b": 2})
    assert status == 2 and re.fullmatch(r"error: epoch 1, a data loading process died .*last\.pt holds all.*\n", err), (
        err
    )
    assert load_checkpoint(folder / "last.pt")["position"]["clips"] > 0
    status, _, err = run(monkeypatch, capfd, list_flags | {"--resume": "auto", "-b": 2})
    assert status == 0 and len(metrics(folder)) == 2, err


def test_a_full_disk_in_mid_epoch(monkeypatch, capfd, list_flags, undisturbed):
    """The second checkpoint cannot be written."""
    folder = Path(list_flags["--run-dir"])
    with monkeypatch.context() as patch, contextlib.ExitStack() as until_the_end:
        in_mid_epoch(patch, lambda: until_the_end.enter_context(full_disk(1_000_000)), question=4)
        status, _, err = run(patch, capfd, list_flags | {"--checkpoint-minutes": 1e-9})
    assert status == 2 and re.fullmatch(r"error: .*last\.pt: the checkpoint cannot be written .*\n", err), err
    assert load_checkpoint(folder / "last.pt")["position"]["clips"] == 10
    status, _, err = run(monkeypatch, capfd, list_flags | {"--resume": "auto"})
    assert status == 0, err
    assert comparable(folder) == comparable(undisturbed) and same_weights(folder, undisturbed)


def test_only_testing_leaves_the_runs_lists_alone(monkeypatch, capfd, list_flags, tmp_path):
    train = tmp_path / "train.txt"
    train.write_text(Path(list_flags["--train-list"]).read_text() + "\ngone/x.avi 3")
    flags = list_flags | {"--train-list": train, "--train-root": Path(list_flags["--train-list"]).parent, "--epochs": 1}
    assert run(monkeypatch, capfd, flags)[0] == 0
    missing = (Path(flags["--run-dir"]) / "missing.txt").read_text()
    status, _, err = run(
        monkeypatch, capfd, flags | {"--resume": Path(flags["--run-dir"]) / "last.pt", "--test-only": None}
    )
    assert status == 0 and missing.endswith("gone/x.avi\n"), err
    assert (Path(flags["--run-dir"]) / "missing.txt").read_text() == missing


def test_only_testing_needs_a_checkpoint(monkeypatch, capfd, list_flags):
    flags = list_flags | {"--test-only": None, "--resume": "auto"}
    refused(monkeypatch, capfd, flags, r"auto: no checkpoint in")
    unnamed = {flag: value for flag, value in flags.items() if flag not in ("--train-list", "--run-dir")}
    refused(monkeypatch, capfd, unnamed, r"--run-dir: --resume auto without --train-list")


def test_a_full_shared_memory_is_one_line(monkeypatch, capfd, list_flags):
    """Limited as the disk above: a batch does not fit where its worker hands it over."""
    monkeypatch.setattr("utils.training.fit.TrainingState.save", lambda *arguments: None)
    with full_disk(50_000):
        status, _, err = run(monkeypatch, capfd, list_flags | {"-j": 1, "-b": 5})
    assert status == 2 and re.fullmatch(r"error: .*a data loading process died .*/dev/shm.*\n", err), err
