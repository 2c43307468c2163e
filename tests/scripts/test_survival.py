"""Runs of one process and of several survive being killed, and leave together."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

import train_kinetics
from tests.helpers.processes import log_videos
from tests.helpers.script import (
    children,
    command_line,
    comparable,
    finish,
    metrics,
    run_here,
    said,
    same_weights,
    start_python,
    start_ranks,
    wait_until,
)
from utils.checkpoint import load_checkpoint

HELPER = "tests/helpers/processes.py"


def flags_in(folder: Path, lists: dict, processes: int = 2) -> dict:
    return lists | {
        "--weights": "none", "-T": 4, "--stride": 2, "--size": 32, "-j": 1, "--epochs": 3, "-lr": 0.001,
        "--branches": "snn", "--index-dir": folder / "index", "--run-dir": folder / "run", "--resume": "auto",
        "--checkpoint-minutes": 0.02, "-b": 3 // processes, "--precise-bn": 5,
    }  # fmt: skip


def logged(folder: Path, flags: dict) -> list[str]:
    return ["train", str(folder / "order"), "train_kinetics.py", *command_line(flags)]


def run_to_its_end(monkeypatch, capfd, folder: Path, flags: dict, processes: int) -> str:
    """What a run says that nothing disturbs."""
    if processes > 1:
        return finish(start_ranks(logged(folder, flags), processes))
    with monkeypatch.context() as patch:
        log_videos(folder / "order", patch.setattr)
        status, out, err = run_here(patch, capfd, flags, train_kinetics)
    assert status == 0, err
    return out


def order(folder: Path, processes: int) -> dict:
    """(process, epoch, clips done) -> videos; what was trained twice, as after SIGKILL, was the same."""
    found = {}
    for rank in range(processes):
        for line in (folder / f"order.{rank}").read_text().splitlines():
            epoch, clips, videos = json.loads(line)
            assert found.setdefault((rank, epoch, clips), videos) == videos
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_mid_epoch_and_resumed_to_the_bit(monkeypatch, capfd, tiny_lists, tmp_path, processes):
    """SIGKILL to all, SIGTERM to the launcher, SIGUSR2 to one process; of several processes also SIGKILL to the
    launcher alone and to a data loading process of one: then one process cannot go on and takes all along."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    undisturbed = flags_in(whole, tiny_lists, processes) | {"--checkpoint-minutes": 0}
    run_to_its_end(monkeypatch, capfd, whole, undisturbed, processes)

    moment = random.Random(processes)
    done = 0
    flags = flags_in(parts, tiny_lists, processes)
    for way in ("SIGKILL", "SIGTERM", "SIGUSR2", *(["launcher", "worker"] if processes > 1 else [])):
        if processes > 1 and way not in ("SIGTERM", "launcher"):  # torchrun would have no part in it
            process = start_ranks(logged(parts, flags), processes)
        else:
            process = start_python([HELPER, *logged(parts, flags)], processes)
        wait_until(lambda steps=done + moment.randint(1, 4): trained_steps(parts) >= steps, process)
        assert process.poll() is None, process.communicate()
        time.sleep(moment.uniform(0, 0.1))
        sent, saved = time.monotonic(), saved_at(parts)
        send(way, process, processes)
        out = said(process)
        assert time.monotonic() - sent < 30
        if way == "worker":
            assert process.returncode != 0 and out.count("error: ") == 1, out
            assert "error: process 1: " in out and "a data loading process died" in out
            position = load_checkpoint(parts / "run/last.pt")["position"]
            assert saved_at(parts) > saved and (position["clips"] > 0 or position["epoch"] > 0)
        elif way != "SIGKILL":
            assert "continue with --resume auto" in out and "error: " not in out, out
        # torchrun calls it a failure that it was sent SIGTERM, whatever its processes do.
        if way == "SIGUSR2" or (way == "SIGTERM" and processes == 1):
            assert process.returncode == 0, out
        done = trained_steps(parts)
    out = run_to_its_end(monkeypatch, capfd, parts, flags, processes)
    assert "resumed from" in out
    assert comparable(parts / "run") == comparable(whole / "run") and len(metrics(whole / "run")) == 3
    assert same_weights(parts / "run", whole / "run")
    assert order(parts, processes) == order(whole, processes)
    assert not list((parts / "run").glob(".*.tmp"))


def trained_steps(folder: Path) -> int:
    file = folder / "order.0"
    return len(file.read_text().splitlines()) if file.exists() else 0


def saved_at(folder: Path) -> int:
    file = folder / "run/last.pt"
    return file.stat().st_mtime_ns if file.exists() else 0


def send(way: str, process, processes: int) -> None:
    trainers = children(process.pid) if processes > 1 else []
    if way == "SIGKILL":
        for number in (process.pid, *trainers):
            os.kill(number, signal.SIGKILL)
    elif way == "worker":
        os.kill(children(trainers[-1])[0], signal.SIGKILL)
    elif way == "SIGUSR2" and processes > 1:
        os.kill(trainers[-1], signal.SIGUSR2)
    else:
        process.send_signal(signal.SIGKILL if way == "launcher" else getattr(signal, way))


@pytest.mark.parametrize(
    "change", [{"--weights": "no.pth", "--branches": "both"}, {"--train-list": "/nowhere.txt"}, {"-T": 5}], ids=str
)
def test_a_mistake_is_said_once(tiny_lists, tmp_path, change):
    """One that rank 0 finds in building the network, one that it finds for all, and one that all find alone."""
    arguments = ["run", "train_kinetics.py", *command_line(flags_in(tmp_path, tiny_lists) | change)]
    # Under torchrun once: it says more, and ends the others when one has failed.
    process = start_python([HELPER, *arguments], 2) if "-T" in change else start_ranks(arguments, 2)
    out = said(process)
    assert process.returncode != 0 and out.count("error: ") == 1, out
    assert "train_kinetics.py" not in out.split("error: ")[0], out  # no traceback of ours before it
