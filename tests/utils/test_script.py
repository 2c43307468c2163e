"""How a script ends: which process prints a mistake, and what becomes of lost streams and of Ctrl-C."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from tests.helpers.script import ROOT
from utils.errors import UserError
from utils.script import run_script


def ends_with(main) -> int:
    with pytest.raises(SystemExit) as left:
        run_script(main)
    return left.value.code or 0


def mistaken() -> int:
    raise UserError("a mistake")


# ---- which process prints


@pytest.mark.parametrize("rank", ["1", "", "0", "x"])
def test_a_rank_in_the_environment_silences_nothing(monkeypatch, capfd, rank):
    monkeypatch.setenv("RANK", rank)
    assert ends_with(mistaken) == 2
    assert capfd.readouterr().err == "error: a mistake\n"


@pytest.mark.parametrize("local_rank, printed", [("0", "error: a mistake\n"), ("1", "")])
def test_of_the_processes_of_torchrun_one_prints_the_mistake_that_all_find(monkeypatch, capfd, local_rank, printed):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert ends_with(mistaken) == 2
    assert capfd.readouterr().err == printed


# ---- streams


def printing() -> int:
    print("a line", flush=True)
    raise AssertionError("unreachable")


@pytest.fixture(params=["buffered", "unbuffered"])
def lost_stdout(request, monkeypatch):
    """lost_stdout(kind): puts a stdout that cannot be written in the place of this process's."""

    def lose(kind: str):
        if kind == "full":
            number = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, number = os.pipe()
            os.close(reader)
        buffered = request.param == "buffered"
        stream = open(number, "wb", buffering=-1 if buffered else 0)  # noqa: SIM115 - for as long as the test lasts
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, write_through=not buffered))

    return lose


@pytest.mark.parametrize("main", [printing, lambda: print("a line")], ids=["flushed", "not flushed"])
def test_a_stdout_on_a_full_disk_is_one_line(capfd, lost_stdout, main):
    lost_stdout("full")
    assert ends_with(main) == 2
    assert capfd.readouterr().err == "error: standard output cannot be written (No space left on device)\n"
    sys.stdout.close()  # as Python does at its end: nothing is left that would fail


def test_a_reader_that_has_gone_ends_a_script_in_silence(capfd, lost_stdout):
    lost_stdout("pipe")
    assert ends_with(printing) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""
    sys.stdout.close()


def test_a_stderr_that_cannot_be_written_stops_nothing(monkeypatch, capfd):
    def main():
        print("a warning", file=sys.stderr, flush=True)
        print("a result")

    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert ends_with(main) == 0
    assert capfd.readouterr().out == "a result\n"


def test_another_disk_error_is_still_a_fault_of_the_code(capfd):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device")

    assert ends_with(main) == 1
    assert "Traceback" in capfd.readouterr().err


def test_a_closed_stream_is_an_empty_one(monkeypatch, tmp_path):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def main():
        print("to nobody")
        print("to nobody", file=sys.stderr)
        return len(sys.stdin.read())

    assert ends_with(main) == 0


# ---- Ctrl-C during the imports

SCRIPTS = [["train_fusion.py"], ["train_kinetics.py"], ["evaluate.py"], ["predict.py"], ["main.py"],
           ["-m", "dataset.prepare"], ["-m", "utils.plots"]]  # fmt: skip


def start_with_slow_imports(tmp_path, script: list[str], before=lambda: None) -> subprocess.CompletedProcess:
    """A script whose first large import sends itself SIGINT, and ends with status 7 if it lives on."""
    for name in ("torch", "numpy", "av", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("import os; os.kill(os.getpid(), 2); print('alive'); os._exit(7)")
    return subprocess.run(
        [sys.executable, *script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=before,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[-1])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, script):
    ended = start_with_slow_imports(tmp_path, script, lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_a_job_in_the_background_does_not_end_by_ctrl_c(tmp_path):
    ended = start_with_slow_imports(tmp_path, ["predict.py"], lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert ended.returncode == 7
