"""A sweep trains what is left, names what fails, and ends in a table. The training script is a fake of a second."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from experiments import ablations, batch_norms, finetune, folds, sweep
from experiments.variants import BASE, RESPIKE
from tests.experiments.conftest import FAKE, rows
from tests.helpers.script import ROOT, children, said, start_python, wait_until

EVALUATION = """
import json, sys
from pathlib import Path
checkpoint = Path(sys.argv[1])
assert sys.argv[2:] == ["--energy"] and checkpoint.name == "last.pt"
(checkpoint.parent / "evaluation.json").write_text(json.dumps({"energy": {"total_mj": 1.5}}))
"""


def test_the_table_has_mean_and_deviation(sweeping, tmp_path):
    status, printed, _ = sweeping()
    assert status == 0
    found = rows(tmp_path / "out")
    assert list(found) == ["cross", "snn"]
    # Of the last epoch: 92 and 94; 60 clips at 10 and 20 a second in each of two epochs: 12 and 6 s.
    expected = {"runs": "2", "video_top1_mean": "93.0", "video_top1_deviation": "1.4", "seconds_mean": "9.0",
                "seconds_deviation": "4.2", "energy_mj_mean": "", "energy_mj_deviation": ""}  # fmt: skip
    assert expected.items() <= found["cross"].items() and found["snn"]["video_top1_mean"] == "73.0"
    assert printed.count(f"Every run: `{BASE} --dset demo`; ReSpike before these flags: `{RESPIKE}`\n") == 1
    line = r"\| snn \| `--branches snn` \| 2 \| 73.0 ± 1.4 \| - \| 0.0 ± 0.0 \| 9.0 ± 4.2 \|\n"
    assert re.search(line, printed) and re.search(line, (tmp_path / "out/table.md").read_text())
    config = json.loads((tmp_path / "out/snn-2/config.json").read_text())
    every_run = f"{BASE} {RESPIKE}".split()
    assert config["command"][6:] == [*every_run, "--dset", "demo", "--branches", "snn", "--seed", "2"]


def test_a_failed_run_is_named_and_only_that_one_runs_again(sweeping, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken").touch()
    status, printed, _ = sweeping(only=("snn", "cross"))
    assert status == 1
    assert f"snn-2: ended with status 2: error: no loss ({out}/snn-2.log)\n" in printed
    assert rows(out)["snn"]["runs"] == "1" and rows(out)["cross"]["runs"] == "2"
    assert "| snn | `--branches snn` | 1 | 72.0 | - | 0.0 | 12.0 |" in printed

    (out / "broken").unlink()
    status, printed, _ = sweeping(only=("snn", "cross"))
    assert status == 0 and "3 of 4 runs are finished\nsnn-2: trains\nsnn-2: 74.0 %, 6 s" in printed
    assert (out / "snn-2.log").read_text().split("starts at")[1:] == [" 0\nerror: no loss\n", " 1\n"]
    assert all(file.read_text() == "starts at 0\n" for file in out.glob("*.log") if file.name != "snn-2.log")


def test_energy_comes_from_evaluate(sweeping, tmp_path):
    sweeping(only=["cross"])
    (tmp_path / "evaluate.py").write_text(EVALUATION)
    status, printed, _ = sweeping(only=["cross"])
    assert status == 0 and "cross-1: is evaluated" in printed and "trains" not in printed
    assert "| 1.500 ± 0.000 |" in printed and rows(tmp_path / "out")["cross"]["energy_mj_mean"] == "1.500"
    (tmp_path / "evaluate.py").write_text("raise SystemExit('error: no clips')")
    status, printed, _ = sweeping(only=["cross", "ann"])
    assert status == 1 and "ann-1: ended with status 1: error: no clips" in printed
    assert "| ann | `--branches ann` | 2 | 63.0 ± 1.4 | - |" in printed  # accuracy and time are there


def test_other_flags_are_not_mixed_into_one_table(sweeping, tmp_path):
    sweeping(only=["cross"], seeds=[1])
    status, _, err = sweeping("--size", "64", only=["cross"], seeds=[1])
    assert status == 2 and err.startswith(f"error: --out {tmp_path}/out/cross-1: was trained with other flags")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "main, flag",
    [
        (ablations.main, "--seed"), (ablations.main, "--run-dir=x"), (batch_norms.main, "--val-fraction"),
        (batch_norms.main, "--precise-bn"), (folds.main, "--val-list"), (finetune.main, "--init"),
    ],
)  # fmt: skip
def test_what_the_experiment_decides_is_refused(run_sweep, main, flag):
    status, _, err = run_sweep(main, *(["--lists", "x"] if main is folds.main else []), "--", flag, "7")
    assert (
        status == 2
        and err == f"error: {flag}: the experiment itself decides this for each run; leave it out behind --\n"
    )


def test_a_script_that_is_not_there_is_refused(run_sweep):
    status, _, err = run_sweep(ablations.main, "--script", "nope.py")
    assert status == 2 and "--script must be a training script in" in err and "got nope.py" in err


def test_a_validated_run_gives_the_score_of_its_test(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "EVALUATE", Path(sweep.__file__))  # any file
    run = sweep.Run(tmp_path, tmp_path / "train.py", ("--epochs", "1"))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "video_top1": 3}\n{"best_epoch": 0, "video_top1": 4}\n{"epo')
    (tmp_path / "test.json").write_text('{"video_top1": 5}')  # also written for the energy of the best epoch
    (tmp_path / "config.json").write_text('{"flags": {"epochs": 1, "val_fraction": 0.0}}')
    assert run.top1() == 3 and run.next_command()[2:] == [f"{tmp_path}/last.pt", "--energy"]
    (tmp_path / "config.json").write_text('{"flags": {"epochs": 1, "val_fraction": 0.1}}')
    assert run.top1() == 5 and run.next_command()[2:] == [f"{tmp_path}/best.pt", "--energy"]
    # Stopped in its evaluation, and resumed: an epoch without a rate.
    lines = [{"epoch": n, "train_clips": 20, "clips_per_second": rate} for n, rate in enumerate((10, 0.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run.seconds() == 2
    (tmp_path / "test.json").unlink()  # stopped in the test
    assert not run.finished()


def test_threads_are_shared_among_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "cpu_count", lambda: 6)
    script = tmp_path / "train.py"
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    for jobs, threads in ((1, 6), (4, 1), (8, 1)):
        run = sweep.Run(tmp_path / f"jobs-{jobs}", script, ())
        assert sweep.run_all([run], jobs, lambda: None) == 1  # it has no epochs
        assert run.log.read_text() == f"{threads}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_trainings_save(tmp_path, number):
    (tmp_path / "train.py").write_text(FAKE)
    out = tmp_path / "out"
    flags = ["--out", str(out), "--script", str(tmp_path / "train.py"), "--only", "cross", "--seeds", "1", "2", "3"]
    process = start_python(["-m", "experiments.ablations", *flags, "--jobs", "2", "--", "--sleep", "30"])
    wait_until(lambda: all((out / f"cross-{seed}/running").exists() for seed in (1, 2)), process)
    # A terminal's Ctrl-C reaches its whole process group: the second SIGINT of a training would end it unsaved.
    assert os.getpgid(process.pid) not in map(os.getpgid, children(process.pid))
    os.kill(process.pid, number)
    printed = said(process)
    assert process.returncode == 130 and "stopped; the same command goes on" in printed
    assert all((out / f"cross-{seed}.log").read_text() == "starts at 0\nsaved\n" for seed in (1, 2))
    assert not (out / "cross-3").exists()


def test_processor_time_is_that_of_all_starts_and_processes(tmp_path, monkeypatch):
    """Each start takes 0.2 s of a processor itself and 0.2 s in a child; the first one fails."""
    burn = "import time\nwhile time.process_time() < 0.2: pass\n"
    script, out = tmp_path / "train.py", tmp_path / "out"
    script.write_text(f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {burn!r}])\n{burn}"
        "from pathlib import Path\nrun = Path(sys.argv[2])\n"
        "if not run.exists():\n    run.mkdir()\n    sys.exit(2)\n"
        "time.sleep(0.5)\n(run / 'config.json').write_text('{\"flags\": {\"epochs\": 0}}')\n")  # fmt: skip
    monkeypatch.setattr(sweep, "EVALUATE", tmp_path / "evaluate.py")
    run = sweep.Run(out / "a-1", script, ())
    assert run.core_minutes() is None
    assert sweep.run_all([run], 1, list) == 1
    once = 60 * run.core_minutes()
    monkeypatch.setattr(sweep.Run, "top1", lambda self: 0.0)
    assert sweep.run_all([run], 1, list) == 0
    lines = [json.loads(line) for line in run.times.read_text().splitlines()]
    assert [line["status"] for line in lines] == [2, 0] and lines[1]["seconds"] > 0.9
    assert once >= 0.4 and 60 * run.core_minutes() >= once + 0.4
    lines = ({"training": False, "processor_seconds": 600}, {"training": True, "processor_seconds": 90})
    run.times.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"tr')
    assert run.core_minutes() == 1.5  # evaluate.py does not train


def test_the_root_is_that_of_the_training_scripts():
    assert sweep.ROOT == ROOT and (sweep.ROOT / "train_fusion.py").exists()
