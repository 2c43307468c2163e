"""Runs of one process and of several survive being killed, and leave together."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.script import (
    children,
    command_line,
    comparable,
    finish,
    metrics,
    said,
    same_weights,
    start_python,
    wait_until,
)
from utils.checkpoint import load_checkpoint

HELPER = "tests/helpers/processes.py"


def flags_in(folder: Path, lists: dict, processes: int = 2) -> dict:
    return lists | {
        "--weights": "none", "-T": 4, "--stride": 2, "--size": 32, "-j": 1, "--epochs": 3, "-lr": 0.001,
        "--branches": "snn", "--index-dir": folder / "index", "--run-dir": folder / "run", "--resume": "auto",
        "--checkpoint-minutes": 0.02, "-b": 3 // processes,
    }  # fmt: skip


def start_logged(folder: Path, flags: dict, processes: int):
    arguments = [HELPER, "train", folder / "order", "train_kinetics.py", *command_line(flags)]
    return start_python([str(argument) for argument in arguments], processes)


def order(folder: Path, processes: int) -> dict:
    """(process, epoch, clips done) -> videos; what was trained twice, as after SIGKILL, was the same."""
    found = {}
    for rank in range(processes):
        for line in (folder / f"order.{rank}").read_text().splitlines():
            epoch, clips, videos = json.loads(line)
            assert found.setdefault((rank, epoch, clips), videos) == videos
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_mid_epoch_and_resumed_to_the_bit(tiny_lists, tmp_path, processes):
    """SIGKILL to all, SIGTERM to the launcher, SIGUSR2 to one process, SIGKILL to the launcher alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    undisturbed = flags_in(whole, tiny_lists, processes) | {"--checkpoint-minutes": 0}
    finish(start_logged(whole, undisturbed, processes))

    moment = random.Random(processes)
    done = 0
    for way in ("SIGKILL", "SIGTERM", "SIGUSR2", *(["launcher"] if processes > 1 else [])):
        process = start_logged(parts, flags_in(parts, tiny_lists, processes), processes)
        wait_until(lambda steps=done + moment.randint(1, 4): trained_steps(parts) >= steps, process)
        assert process.poll() is None, process.communicate()
        time.sleep(moment.uniform(0, 0.2))
        sent = time.monotonic()
        send(way, process, processes)
        out = said(process)
        assert time.monotonic() - sent < 30
        if way != "SIGKILL":
            assert "continue with --resume auto" in out and "error: " not in out, out
        # torchrun calls it a failure that it was sent SIGTERM, whatever its processes do.
        if way == "SIGUSR2" or (way == "SIGTERM" and processes == 1):
            assert process.returncode == 0, out
        done = trained_steps(parts)
    out = finish(start_logged(parts, flags_in(parts, tiny_lists, processes), processes))
    assert "resumed from" in out
    assert comparable(parts / "run") == comparable(whole / "run") and len(metrics(whole / "run")) == 3
    assert same_weights(parts / "run", whole / "run")
    assert order(parts, processes) == order(whole, processes)
    assert not list((parts / "run").glob(".*.tmp"))


def trained_steps(folder: Path) -> int:
    file = folder / "order.0"
    return len(file.read_text().splitlines()) if file.exists() else 0


def send(way: str, process, processes: int) -> None:
    trainers = children(process.pid) if processes > 1 else []
    if way == "SIGKILL":
        for number in (process.pid, *trainers):
            os.kill(number, signal.SIGKILL)
    elif way == "SIGUSR2" and processes > 1:
        os.kill(trainers[-1], signal.SIGUSR2)
    else:
        process.send_signal(signal.SIGKILL if way == "launcher" else getattr(signal, way))


def test_one_process_that_cannot_go_on_takes_all_along(tiny_lists, tmp_path):
    """A data loading process of one of two is killed: all save and leave, and the run goes on from there."""
    process = start_logged(tmp_path, flags_in(tmp_path, tiny_lists), 2)
    wait_until(lambda: trained_steps(tmp_path) >= 2, process)
    os.kill(children(children(process.pid)[-1])[0], signal.SIGKILL)
    out = said(process)
    assert process.returncode != 0 and out.count("error: ") == 1, out
    assert "error: process 1: " in out and "a data loading process died" in out
    position = load_checkpoint(tmp_path / "run/last.pt")["position"]
    assert position["clips"] > 0 or position["epoch"] > 0
    finish(start_logged(tmp_path, flags_in(tmp_path, tiny_lists), 2))
    assert len(metrics(tmp_path / "run")) == 3


def test_a_mistake_is_said_once(tiny_lists, tmp_path):
    for change in ({"--weights": "no.pth", "--branches": "both"}, {"--train-list": "/nowhere.txt"}, {"-T": 5}):
        process = start_logged(tmp_path, flags_in(tmp_path, tiny_lists) | change, 2)
        out = said(process)
        assert process.returncode != 0 and out.count("error: ") == 1, out
        assert "train_kinetics.py" not in out.split("error: ")[0], out  # no traceback of ours before it
