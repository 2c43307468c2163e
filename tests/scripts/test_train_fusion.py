"""The script as a user runs it: it trains, and resumes to the bit. What it refuses: test_refusals.py."""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_fusion
import train_kinetics
from models import ReSpike
from models.neurons import LIF, NEURONS
from tests.helpers.script import (
    TIMES,
    all_metrics,
    comparable,
    copy_run,
    finish,
    metrics,
    refused,
    run_here,
    run_main,
    same_weights,
    small_run,
    start,
    wait_until,
)
from tests.helpers.spikingjelly import skip_without_spikingjelly
from utils.checkpoint import load_checkpoint
from utils.runtime import Runtime
from utils.training.metrics import learned_by_neurons


@pytest.fixture(scope="module")
def whole(tiny_demo, tmp_path_factory) -> Path:
    """The folder of a finished run with the flags of `flags`; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    run_main(small_run(tiny_demo, folder))
    return folder / "run"


@pytest.fixture
def finished(whole, flags) -> Path:
    """The same run in the folder that `flags` names."""
    return copy_run(whole, flags["--run-dir"])


# ---- a run ------------------------------------------------------------------------------------------


def test_a_run_and_its_folder(monkeypatch, capfd, flags):
    """Files, lines, and what TensorBoard shows: metrics and pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"--branches": "both", "--views": 2, "--energy": None}
    status, out, err = run_here(monkeypatch, capfd, flags | more)
    run = Path(flags["--run-dir"])
    assert status == 0, err
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        expected = {"train_loss", "test_loss", "clip_top1", "clip_top5", "video_top1", "video_top5", "learning_rate"}
        assert set(line) >= expected
        assert set(line) >= TIMES - {"precise_bn_seconds"} and set(line["firing_rate"]) == {
            "stage1",
            "stage2",
            "stage3",
            "stage4",
        }
        assert line["clips_per_second"] > 0 and 0 <= line["data_wait_share"] <= 1 and line["peak_memory_bytes"] > 1e6
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.002, 0.001])
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["stride"] == 2 and config["versions"]["torch"] and "git_commit" in config
    assert load_checkpoint(run / "last.pt")["position"]["epoch"] == 2 and (run / "best.pt").is_file()
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert (
        "selected on the test set itself" in out
        and "8 of 8 classes" in out
        and "8 to test, 2 views x 1 crops each" in out
    )

    events = EventAccumulator(str(run))
    events.Reload()
    assert events.Tags()["images"] == ["key_and_residual_frames", "firing_rates", "attention"]
    assert [event.step for event in events.Images("attention")] == [2]  # epochs
    shown = [event.value for event in events.Scalars("video_top1")]
    assert shown == pytest.approx([line["video_top1"] for line in lines])
    assert "firing_rate/stage1" in events.Tags()["scalars"]


def test_energy_is_not_counted_for_graded_spikes(monkeypatch, capfd, flags):
    """A neuron of the user's own: the run ends with a note, not with an error."""

    class Graded(LIF):
        def forward(self, current):
            return 0.5 + super().forward(current)  # also where nothing fires

    monkeypatch.setitem(NEURONS, "graded", Graded)
    status, out, err = run_here(monkeypatch, capfd, flags | {"--neuron": "graded", "--energy": None, "--epochs": 1})
    assert status == 0, err
    assert "neuron Graded gives others" in out and "the run ends without it" in out
    closing = all_metrics(Path(flags["--run-dir"]))[-1]
    assert "energy" not in closing and closing["device_hours"] > 0


def test_a_neuron_of_spikingjelly(monkeypatch, capfd, flags):
    """It is trained, counted, kept in the checkpoint and named where other arguments do not fit. --help lists it."""
    skip_without_spikingjelly()
    more = {"--neuron": "sj.ParametricLIFNode", "--neuron-args": "v_threshold=0.5,detach_reset=True", "--energy": None}
    more |= {"-lr": 0.05}  # so that each time constant moves
    status, _, err = run_here(monkeypatch, capfd, flags | more | {"--epochs": 1})
    assert status == 0, err
    run = Path(flags["--run-dir"])
    (line,) = metrics(run)
    assert set(line["neuron_tau"]) == set(line["firing_rate"]) and min(line["firing_rate"].values()) > 0
    assert all(tau != pytest.approx(4 / 3, abs=1e-6) for tau in line["neuron_tau"].values())
    assert "neuron sj.ParametricLIFNode" in all_metrics(run)[-1]["energy"]["counted_as_zero"]
    model = ReSpike.from_checkpoint(run)
    assert model.trained.settings["neuron_args"] == {"v_threshold": 0.5, "detach_reset": True}
    assert learned_by_neurons(model)["neuron_tau"] == pytest.approx(line["neuron_tau"])
    other = flags | more | {"--neuron-args": "v_threshold=0.6", "--resume": "auto"}
    refused(monkeypatch, capfd, other, r"its neuron_args is \{'v_threshold': 0.5.*this run's is \{'v_threshold': 0.6\}")
    refused(monkeypatch, capfd, flags | {"--neuron": "sj.PSN", "--tau": 2}, r"^error: --tau 2\.0: sj\.PSN has no time")
    refused(monkeypatch, capfd, flags | {"--neuron-args": "tau"}, r"--neuron-args must be NAME=VALUE,\.\.\.")
    refused(monkeypatch, capfd, flags | {"--neuron": "x"}, "--neuron x: expected lif or sj.NAME of SpikingJelly")
    _, out, _ = run_here(monkeypatch, capfd, {"--help": None})
    assert "sj.PSN" in out and "sj.TernaryLIFNode" not in out


def test_validation_selects_without_the_test_set(monkeypatch, capfd, flags):
    status, out, _ = run_here(monkeypatch, capfd, flags | {"--val-fraction": 0.3})
    assert status == 0 and "selected on validation videos" in out and "selected on the test set" not in out
    assert {line["evaluated_on"] for line in metrics(Path(flags["--run-dir"]))} == {"val"}
    result = json.loads((Path(flags["--run-dir"]) / "test.json").read_text())
    assert result["counts"]["videos"] == 8 and result["views"] == 1


def test_the_published_epoch_of_every_window(monkeypatch, capfd, flags):
    status, out, _ = run_here(monkeypatch, capfd, flags | {"--clips-per-video": "all", "--epochs": 1})
    assert status == 0 and "training on 24 clips of 24 videos" in out  # 10 frames: one window every 16


@pytest.mark.parametrize("dset", ["hmdb51", "ucf101"])
def test_the_published_command_on_real_clips(monkeypatch, capfd, clips, splits, tmp_path, dset):
    flags = {
        "--dset": dset, "--model": "resnet50", "-T": 16, "-b": 32, "-lr": 0.0001, "--stride": 4, "--downsample": None,
        "--data-root": clips / dset, "--annotation-path": splits / dset, "--size": 32, "--epochs": 1, "-j": 0,
        "--weights": "none", "--run-dir": tmp_path / "run", "--index-dir": tmp_path / "index",
    }  # fmt: skip
    status, out, err = run_here(monkeypatch, capfd, flags)
    assert status == 0, err
    assert {"hmdb51": "2 of 51 classes", "ucf101": "4 of 101 classes"}[dset] in out
    assert {"hmdb51": "6762", "ucf101": "13316"}[dset] + " listed videos are not on disk" in out
    assert {"hmdb51": "44,580,339", "ucf101": "44,708,389"}[dset] + " parameters" in out
    assert len(metrics(tmp_path / "run")) == 1
    assert len((tmp_path / "run/missing.txt").read_text().splitlines()) > 6000


def test_every_published_flag_is_there(monkeypatch, tmp_path):
    published = (
        "-j 2 --workers 2 --epochs 3 --start_epoch 1 -b 4 --batch_size 4 -lr 0.1 --learning_rate 0.1 "
        "--weight_decay 0.01 --seed 5 -T 8 --time 8 --stride 4 --amp --downsample --dset ucf101 --model resnet50"
    )
    monkeypatch.setattr(sys, "argv", ["train_fusion.py", *published.split()])
    args = train_fusion.parse_args()
    assert (args.amp, args.downsample, args.time, args.start_epoch) == (True, True, 8, 1)
    monkeypatch.setattr(sys, "argv", ["train_fusion.py", "--no-amp"])
    args = train_fusion.parse_args()
    assert (args.amp, args.downsample, args.time, args.stride) == (False, False, 16, 4)
    assert (args.batch_size, args.learning_rate, args.weight_decay, args.epochs, args.seed) == (
        64,
        0.01,
        1e-4,
        100,
        1001,
    )


# ---- survival ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tiny_demo, tmp_path_factory):
    """Runs with the flags of `resumable`, once a module."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_main(resumable(tiny_demo, folder))
    return folder / "run"


def resumable(tiny_demo, folder: Path) -> dict:
    return {
        "--dset": "hmdb51", "--data-root": tiny_demo[0], "--annotation-path": tiny_demo[1], "--weights": "none",
        "-T": 4, "--stride": 2, "--size": 32, "-b": 5, "-j": 1, "--epochs": 3, "-lr": 0.001, "--downsample": None,
        "--index-dir": folder / "index", "--run-dir": folder / "run", "--resume": "auto",
    }  # fmt: skip


def test_interrupted_at_a_random_moment_and_resumed_to_the_bit(monkeypatch, capfd, tiny_demo, tmp_path, undisturbed):
    """Ctrl-C; the other signals, SIGKILL among them, are in test_survival.py."""
    flags, run = resumable(tiny_demo, tmp_path), tmp_path / "run"
    process = start(flags)
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 1, process)
    time.sleep(random.Random(3).uniform(0, 1.5))
    process.send_signal(signal.SIGINT)
    finish(process)
    status, _, err = run_here(monkeypatch, capfd, flags)
    assert status == 0, err
    assert comparable(run) == comparable(undisturbed)
    assert same_weights(run, undisturbed)
    best = [load_checkpoint(folder / "best.pt") for folder in (run, undisturbed)]
    assert best[0]["best"] == best[1]["best"]
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("more", [{}, {"--accumulate": 2, "--val-fraction": 0.3}], ids=["plain", "accumulate and val"])
def test_stopped_in_evaluation_and_resumed(monkeypatch, capfd, flags, tmp_path, whole, more):
    import utils.training.fit

    if more:
        whole = tmp_path / "whole"
        assert run_here(monkeypatch, capfd, flags | more | {"--run-dir": whole})[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(utils.training.fit, "evaluate", lambda *args, **kwargs: None)  # as if a signal had come
        status, out, _ = run_here(monkeypatch, capfd, flags | more)
        assert status == 0 and "continue with --resume auto" in out
    status, out, err = run_here(monkeypatch, capfd, flags | more | {"--resume": "auto"})
    assert status == 0, err
    run = Path(flags["--run-dir"])
    assert comparable(run) == comparable(whole) and same_weights(run, whole)


@pytest.fixture(scope="module")
def measured(tiny_demo, tmp_path_factory) -> Path:
    """As `whole`, with batch norm measured before each test; not to be changed."""
    folder = tmp_path_factory.mktemp("measured")
    run_main(small_run(tiny_demo, folder) | {"--precise-bn": 9})
    return folder / "run"


def test_precise_batch_norm_changes_what_is_tested_and_nothing_that_is_trained(measured, whole):
    own, other = (load_checkpoint(folder / "last.pt") for folder in (measured, whole))
    running = {name for name in own["model"] if name.endswith(("running_mean", "running_var"))}
    for name, value in own["model"].items():
        assert torch.equal(value, other["model"][name]) == (name not in running), name
    for line, before in zip(metrics(measured), metrics(whole), strict=True):
        assert line["precise_bn_clips"] == 9 and line["precise_bn_seconds"] > 0
        assert line["train_loss"] == before["train_loss"] and line["test_loss"] != before["test_loss"]


def test_stopped_while_batch_norm_is_measured_and_while_it_is_tested(monkeypatch, capfd, flags, measured):
    """Five training batches, two that are measured, two that are tested: it stops at each of the latter and resumes."""
    more = flags | {"--precise-bn": 9, "--resume": "auto"}
    for answers in ([False] * 6 + [True], [False] * 2 + [True]):
        with monkeypatch.context() as patch:
            left = iter(answers)
            patch.setattr("utils.signals.StopRequest.requested", lambda self, left=left: next(left))
            status, out, err = run_here(patch, capfd, more)
            assert status == 0 and "in epoch 1 after 24 clips" in out, err
    status, out, err = run_here(monkeypatch, capfd, more)
    assert status == 0 and "note: --" not in out and "batch norm measured in" in out, err
    run = Path(flags["--run-dir"])
    assert comparable(run) == comparable(measured) and same_weights(run, measured)


def test_too_few_clips_to_measure_batch_norm_on(monkeypatch, capfd, flags):
    alone = flags | {"-T": 2, "--stride": 2, "-b": 2, "--precise-bn": 1}
    refused(monkeypatch, capfd, alone, "--precise-bn: its smallest batch holds one key frame of 32 x 32 pixels")


def test_a_resumed_run_follows_its_flags(monkeypatch, capfd, flags, finished):
    changed = flags | {"-lr": "0.004", "--weight_decay": "0.01", "--epochs": 4, "--resume": "auto"}
    status, out, _ = run_here(monkeypatch, capfd, changed)
    assert status == 0 and "note: --learning-rate was 0.002, is now 0.004" in out
    rates = [line["learning_rate"] for line in metrics(finished)]
    assert rates == pytest.approx([0.002, 0.001, 0.002, 0.004 * 0.1464466])  # the last two: cosine over 4 epochs
    group = load_checkpoint(finished / "last.pt")["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.01


def test_start_epoch_moves_the_learning_rate(monkeypatch, capfd, flags):
    assert run_here(monkeypatch, capfd, flags | {"--start_epoch": 1})[0] == 0
    assert [line["learning_rate"] for line in metrics(Path(flags["--run-dir"]))] == pytest.approx([0.001])


@pytest.fixture
def in_mid_epoch(monkeypatch, capfd, flags):
    """A run stopped in its first epoch, two batches of 5 done."""
    with monkeypatch.context() as patch:
        answers = iter([False, False, True])
        patch.setattr("utils.signals.StopRequest.requested", lambda self: next(answers))
        status, out, _ = run_here(monkeypatch, capfd, flags)
        assert status == 0 and "after 10 clips" in out
    return flags | {"--resume": "auto"}


def test_another_seed_or_data_set_in_mid_epoch_is_refused(monkeypatch, capfd, in_mid_epoch, tiny_demo, tmp_path):
    refused(monkeypatch, capfd, in_mid_epoch | {"--seed": 4}, r"mid-epoch with --seed 3, now 4")
    refused(
        monkeypatch,
        capfd,
        in_mid_epoch | {"--val-fraction": "0.4"},
        r"mid-epoch with another set of training clips: of its 24 clips \d+ are not there, 0 are new",
    )


def test_another_batch_size_in_mid_epoch_trains_on_the_rest(monkeypatch, capfd, in_mid_epoch):
    status, out, err = run_here(monkeypatch, capfd, in_mid_epoch | {"-b": "7", "--epochs": "1"})
    assert status == 0, err
    assert "epoch 1, clip 10 of 24" in out and "note: --batch-size was 5, is now 7" in out
    assert load_checkpoint(Path(in_mid_epoch["--run-dir"]) / "last.pt")["position"]["epoch"] == 1


def test_going_on_without_a_video_that_is_gone(monkeypatch, capfd, in_mid_epoch, tiny_demo, tmp_path):
    """The order of the other clips stays, as the place of the one that is gone stays empty."""
    root = shutil.copytree(tiny_demo[0], tmp_path / "videos")
    sorted(root.glob("*/train*.avi"))[3].unlink()
    status, out, err = run_here(monkeypatch, capfd, in_mid_epoch | {"--data-root": root})
    assert status == 0, err
    assert "1 of 24 training clips are gone since the run started" in out
    assert len(metrics(Path(in_mid_epoch["--run-dir"]))) == 2
    clips = load_checkpoint(Path(in_mid_epoch["--run-dir"]) / "last.pt")["clips"]
    assert len(clips) == 24  # another start still knows the run's clips


def test_going_back_to_an_earlier_checkpoint(monkeypatch, capfd, flags, finished):
    """What is gone on from is the newest from then on, should the run be killed at once; and a best epoch that
    is yet to come again does not count."""
    assert load_checkpoint(finished / "last-1.pt")["position"]["epoch"] == 1
    back = flags | {"--resume": finished / "last-1.pt"}
    with monkeypatch.context() as patch:
        patch.setattr("utils.signals.StopRequest.requested", lambda self: True)
        status, out, err = run_here(patch, capfd, back)
        assert status == 0 and "in epoch 2 after 0 clips" in out, err
    last = load_checkpoint(finished / "last.pt")
    assert last["position"]["epoch"] == 1 and last["best"]["epoch"] in (None, 0, 1)
    assert [line["epoch"] for line in metrics(finished)] == [0]


def test_only_testing(monkeypatch, capfd, flags, finished):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    status, out, err = run_here(monkeypatch, capfd, flags | {"--resume": "auto", "--test-only": None})
    assert status == 0 and "test after 2 epochs" in out, err
    result = json.loads((finished / "test.json").read_text())
    line = metrics(finished)[-1]
    assert all(result[name] == line[name] for name in ("clip_top1", "video_top1", "video_top5", "counts"))
    assert {file.name: file.read_bytes() for file in finished.iterdir() if file.name != "test.json"} == before
    refused(monkeypatch, capfd, flags | {"--test-only": None}, r"--test-only: which weights\?")


def test_another_runs_folder_is_not_replaced_by_resuming(monkeypatch, capfd, flags, finished, whole):
    refused(monkeypatch, capfd, flags | {"--resume": whole / "last.pt"}, "holds a run already")


def test_a_mistake_does_not_cost_the_run_to_be_overwritten(monkeypatch, capfd, flags, finished):
    last = finished / "last.pt"
    before = last.read_bytes()
    refused(monkeypatch, capfd, flags | {"--overwrite": None, "--data-root": "/nowhere"}, "no such folder")
    assert last.read_bytes() == before


def test_resumed_from_a_path_and_told_what_changed(monkeypatch, capfd, flags, whole, tmp_path):
    more = flags | {"--epochs": 3, "--resume": whole / "last.pt", "--run-dir": tmp_path / "more"}
    status, out, _ = run_here(monkeypatch, capfd, more)
    assert status == 0 and "epoch 3, clip 0 of 24" in out and "note: --epochs was 2, is now 3" in out


@pytest.mark.parametrize("script", [train_fusion, train_kinetics], ids=lambda script: script.__name__)
def test_float16_is_trained_without_the_fused_optimizer(script):
    """Its first steps overflow: fused SGD leaves out the step, and keeps a momentum that nobody has written."""
    args = argparse.Namespace(**script.DEFAULTS | {"weights": "none", "branches": "snn"})
    data = SimpleNamespace(clip_ids=None, evaluated_clips="")
    for precision, fused in ((torch.float16, False), (torch.bfloat16, True)):
        state = script.build(args, ["a", "b"], data, Runtime(precision=precision), None)
        assert state.scaler.is_enabled() == (not fused) and state.optimizer.defaults["fused"] == fused


def test_resumed_without_the_freeze_that_it_began_with(monkeypatch, capfd, flags):
    """The momentum of the ANN branch begins when its training does."""
    both = flags | {"--branches": "both", "--resume": "auto", "--epochs": 1}
    assert run_here(monkeypatch, capfd, both | {"--freeze": "ann"})[0] == 0
    before = load_checkpoint(Path(flags["--run-dir"]) / "last.pt")["model"]["ann.stem.0.weight"]
    status, _, err = run_here(monkeypatch, capfd, both | {"--epochs": 2})
    assert status == 0, err
    after = load_checkpoint(Path(flags["--run-dir"]) / "last.pt")["model"]["ann.stem.0.weight"]
    assert not torch.equal(before, after)
