"""A sweep trains what is left, names what fails, and ends in a table. The training script is a fake of a second."""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from experiments import ablations, sweep
from tests.helpers.script import ROOT, children, said, start_python, wait_until
from utils.script import run_script

# Accuracy and time are made of the flags; "snn" with seed 2 fails as long as a file is there.
FAKE = """
import json, signal, sys, time
from pathlib import Path
flags = sys.argv[1:]
def value(name, default):
    return flags[len(flags) - 1 - flags[::-1].index(name) + 1] if name in flags else default
run = Path(value("--run-dir", None))
run.mkdir(parents=True, exist_ok=True)
epochs, seed, branches = int(value("--epochs", 2)), int(value("--seed", 0)), value("--branches", "both")
(run / "new").write_text(json.dumps({"command": [Path(sys.argv[0]).name, *flags], "flags": {"epochs": epochs}}))
(run / "new").rename(run / "config.json")  # as the real ones do: the sweep never reads half a file
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
print("starts at", done)
def stop(*_):
    print("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
for epoch in range(done, epochs):
    (run / "running").touch()
    time.sleep(float(value("--sleep", 0)))
    if branches == "snn" and seed == 2 and (run.parent / "broken").exists() and epoch == 1:
        print("error: no loss")
        sys.exit(2)
    top1 = 50 * epoch + {"both": 40, "snn": 20, "ann": 10}[branches] + 2 * seed
    line = {"epoch": epoch, "video_top1": top1, "train_clips": 60, "clips_per_second": 10 * seed}
    with metrics.open("a") as file:
        file.write(json.dumps(line) + "\\n")
"""
EVALUATION = """
import json, sys
from pathlib import Path
checkpoint = Path(sys.argv[1])
assert sys.argv[2:] == ["--energy"] and checkpoint.name == "last.pt"
(checkpoint.parent / "evaluation.json").write_text(json.dumps({"energy": {"total_mj": 1.5}}))
"""


@pytest.fixture
def sweeping(tmp_path, monkeypatch, capsys):
    """Runs the sweep in this process: (exit status, stdout, stderr)."""
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "EVALUATE", tmp_path / "evaluate.py")
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.01)

    def run(*flags: str, only=("base", "snn"), seeds=(1, 2), jobs=2) -> tuple[int, str, str]:
        words = ["--only", *only, "--seeds", *map(str, seeds), "--jobs", str(jobs)]
        words = ["ablations", "--out", str(tmp_path / "out"), "--script", str(tmp_path / "train.py"), *words]
        monkeypatch.setattr(sys, "argv", [*words, "--", "--dset", "demo", *flags])
        with pytest.raises(SystemExit) as left:
            run_script(ablations.main)
        return left.value.code, *capsys.readouterr()

    return run


def rows(out: Path) -> dict[str, dict]:
    with open(out / "table.csv", newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_the_table_has_mean_and_deviation(sweeping, tmp_path):
    status, printed, _ = sweeping()
    assert status == 0
    found = rows(tmp_path / "out")
    assert list(found) == ["base", "snn"]
    # Of the last epoch: 92 and 94; 60 clips at 10 and 20 a second in each of two epochs: 12 and 6 s.
    expected = {"seeds": "2", "video_top1_mean": "93.0", "video_top1_deviation": "1.4", "seconds_mean": "9.0",
                "seconds_deviation": "4.2", "energy_mj_mean": "", "energy_mj_deviation": ""}  # fmt: skip
    assert expected.items() <= found["base"].items() and found["snn"]["video_top1_mean"] == "73.0"
    assert printed.count(f"Every run: `{ablations.BASE} --dset demo`\n") == 1
    line = "| snn | `--branches snn` | 2 | 73.0 ± 1.4 | - | 9.0 ± 4.2 |"
    assert line in printed and line in (tmp_path / "out/table.md").read_text()
    config = json.loads((tmp_path / "out/snn-2/config.json").read_text())
    assert config["command"][6:] == [*ablations.BASE.split(), "--dset", "demo", "--branches", "snn", "--seed", "2"]


def test_a_failed_run_is_named_and_only_that_one_runs_again(sweeping, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken").touch()
    status, printed, _ = sweeping(only=("snn", "base"))
    assert status == 1
    assert f"snn-2: ended with status 2: error: no loss ({out}/snn-2.log)\n" in printed
    assert rows(out)["snn"]["seeds"] == "1" and rows(out)["base"]["seeds"] == "2"
    assert "| snn | `--branches snn` | 1 | 72.0 | - | 12.0 |" in printed

    (out / "broken").unlink()
    status, printed, _ = sweeping(only=("snn", "base"))
    assert status == 0 and "3 of 4 runs are finished\nsnn-2: trains\nsnn-2: 74.0 %, 6 s" in printed
    assert (out / "snn-2.log").read_text().split("starts at")[1:] == [" 0\nerror: no loss\n", " 1\n"]
    assert all(file.read_text() == "starts at 0\n" for file in out.glob("*.log") if file.name != "snn-2.log")


def test_energy_comes_from_evaluate(sweeping, tmp_path):
    sweeping(only=["base"])
    (tmp_path / "evaluate.py").write_text(EVALUATION)
    status, printed, _ = sweeping(only=["base"])
    assert status == 0 and "base-1: is evaluated" in printed and "trains" not in printed
    assert "| 1.500 ± 0.000 |" in printed and rows(tmp_path / "out")["base"]["energy_mj_mean"] == "1.500"
    (tmp_path / "evaluate.py").write_text("raise SystemExit('error: no clips')")
    status, printed, _ = sweeping(only=["base", "ann"])
    assert status == 1 and "ann-1: ended with status 1: error: no clips" in printed
    assert "| ann | `--branches ann` | 2 | 63.0 ± 1.4 | - |" in printed  # accuracy and time are there


def test_other_flags_are_not_mixed_into_one_table(sweeping, tmp_path):
    sweeping(only=["base"], seeds=[1])
    status, _, err = sweeping("--size", "64", only=["base"], seeds=[1])
    assert status == 2 and err.startswith(f"error: --out {tmp_path}/out/base-1: was trained with other flags")
    assert err.count("\n") == 1


def test_a_validated_run_gives_the_score_of_its_test(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "EVALUATE", Path(sweep.__file__))  # any file
    run = sweep.Run(tmp_path, tmp_path / "train.py", ("--epochs", "1"))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "video_top1": 3}\n{"best_epoch": 0, "video_top1": 4}\n{"epo')
    (tmp_path / "test.json").write_text('{"video_top1": 5}')  # also written for the energy of the best epoch
    (tmp_path / "config.json").write_text('{"flags": {"epochs": 1, "val_fraction": 0.0}}')
    assert run.top1() == 3 and run.next_command()[2:] == [f"{tmp_path}/last.pt", "--energy"]
    (tmp_path / "config.json").write_text('{"flags": {"epochs": 1, "val_fraction": 0.1}}')
    assert run.top1() == 5 and run.next_command()[2:] == [f"{tmp_path}/best.pt", "--energy"]
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
    flags = ["--out", str(out), "--script", str(tmp_path / "train.py"), "--only", "base", "--seeds", "1", "2", "3"]
    process = start_python(["-m", "experiments.ablations", *flags, "--jobs", "2", "--", "--sleep", "30"])
    wait_until(lambda: all((out / f"base-{seed}/running").exists() for seed in (1, 2)), process)
    # A terminal's Ctrl-C reaches its whole process group: the second SIGINT of a training would end it unsaved.
    assert os.getpgid(process.pid) not in map(os.getpgid, children(process.pid))
    os.kill(process.pid, number)
    printed = said(process)
    assert process.returncode == 130 and "stopped; the same command goes on" in printed
    assert all((out / f"base-{seed}.log").read_text() == "starts at 0\nsaved\n" for seed in (1, 2))
    assert not (out / "base-3").exists()


def test_every_variant_is_a_command_of_the_training_scripts(monkeypatch):
    import train_fusion
    import train_kinetics

    for script in (train_fusion, train_kinetics):
        for flags in ablations.VARIANTS.values():
            words = [*ablations.BASE.split(), *flags.split()]
            lists = ["--dset", "list", "--train-list", "a", "--val-list", "b"] if script is train_kinetics else []
            monkeypatch.setattr(sys, "argv", [script.__name__, *words, *lists])
            assert script.parse_args().downsample


def test_the_root_is_that_of_the_training_scripts():
    assert sweep.ROOT == ROOT and (sweep.ROOT / "train_fusion.py").exists()
