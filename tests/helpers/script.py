"""Running the training scripts in a test."""

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_fusion
from utils.checkpoint import load_checkpoint
from utils.run_folder import leave_run_folders
from utils.script import run_script

ROOT = Path(__file__).parents[2]


def command_line(flags: dict) -> list[str]:
    return [word for flag, value in flags.items() for word in ((flag,) if value is None else (flag, str(value)))]


def run_here(monkeypatch, capfd, flags: dict, script=train_fusion) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a script, run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *command_line(flags)])
    with pytest.raises(SystemExit) as left:
        run_script(script.main)
    out, err = capfd.readouterr()
    return left.value.code or 0, out, err


def run_main(flags: dict, script=train_fusion) -> None:
    """A script's main in this process, for fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *command_line(flags)])
        assert script.main() == 0
    leave_run_folders()


def small_run(tiny_demo: tuple[Path, Path], folder: Path) -> dict:
    """Flags of train_fusion.py: a tiny network on 24 tiny videos, in folder/run."""
    data_root, annotation_path = tiny_demo
    return {
        "--dset": "hmdb51", "--data-root": str(data_root), "--annotation-path": str(annotation_path),
        "--weights": "none", "--branches": "snn", "-T": "4", "--stride": "2", "--size": "32", "-b": "5", "-j": "0",
        "--epochs": "2", "-lr": "0.002", "--index-dir": str(folder / "index"), "--run-dir": str(folder / "run"),
        "--seed": "3", "--no-energy": None,
    }  # fmt: skip


def copy_run(run: Path, target: Path | str) -> Path:
    """Checkpoints are linked: they are large, and scripts replace them. A test must not write into one."""

    def copy(source: str, to: str) -> None:
        (os.link if source.endswith(".pt") else shutil.copy2)(source, to)

    return Path(shutil.copytree(run, target, copy_function=copy, dirs_exist_ok=True))


def refused(monkeypatch, capfd, flags: dict, message: str, script=train_fusion) -> None:
    status, _, err = run_here(monkeypatch, capfd, flags, script)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err


@contextlib.contextmanager
def full_disk(largest: int):
    """A limit on the size of files stands in for a full disk: a write of more than `largest` bytes fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def memory_limit(more_bytes: int):
    """This process can take so much more memory than it has."""
    gc.collect()  # what an earlier test left would make room
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl about epochs."""
    return [line for line in all_metrics(run) if "epoch" in line]


def all_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(flags: dict) -> subprocess.Popen:
    """train_fusion.py in a process of its own; stderr goes to stdout."""
    return start_python(["train_fusion.py", *command_line(flags)])


def start_python(arguments: list[str], processes: int = 1) -> subprocess.Popen:
    """A Python script, under torchrun where there are several processes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    python, environment = [sys.executable, "-X", "faulthandler"], {**os.environ, "PYTHONPATH": path}
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
        environment |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR2",
        }
    return subprocess.Popen(
        [*python, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def start_ranks(arguments: list, *counts: int) -> subprocess.Popen:
    """A task of tests/helpers/processes.py in several processes that a single one forks; in each of `counts`."""
    return start_python(["tests/helpers/processes.py", "ranks", ",".join(map(str, counts)), *map(str, arguments)])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def finish(process: subprocess.Popen, seconds: float = 300) -> str:
    """What a process says until it ends, which it must with status 0."""
    out = said(process, seconds)
    assert process.returncode == 0 and "Traceback" not in out, out
    return out


def said(process: subprocess.Popen, seconds: float = 60) -> str:
    """What a process says until it ends. After `seconds` the test fails and shows where each process stood."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for number in reversed(family(process.pid)):
            os.kill(number, signal.SIGABRT)
        pytest.fail(f"not done after {seconds} s:\n{process.communicate()[0]}")


def children(process: int) -> list[int]:
    try:
        return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except FileNotFoundError:
        return []


def family(process: int) -> list[int]:
    """The process and all that it has started, and those they have."""
    return [process, *(number for child in children(process) for number in family(child))]


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


TIMES = {"clips_per_second", "data_wait_share", "peak_memory_bytes", "precise_bn_seconds"}


def comparable(run: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics(run)]


def same_weights(run: Path, other: Path) -> bool:
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in (run, other))
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@contextlib.contextmanager
def without_privileges():
    """Root may read everything; within, a test that runs as root is a user who may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
