"""A training script and an evaluate.py that take no time, and a sweep over them in this process."""

import csv
import sys
from pathlib import Path

import pytest

from experiments import ablations, sweep
from utils.script import run_script

# Accuracy and time are made of the flags and of the number in a list's name; "snn" with seed 2 fails as long as a file
# is there.
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
    top1 += 3 * int("".join(filter(str.isdigit, Path(value("--val-list", "")).name)) or 0)
    line = {"epoch": epoch, "video_top1": top1, "train_clips": 60, "clips_per_second": 10 * seed}
    with metrics.open("a") as file:
        file.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def training(tmp_path, monkeypatch) -> Path:
    """The fake training script. A file evaluate.py beside it stands for the real one, once a test has written it."""
    script = tmp_path / "train.py"
    script.write_text(FAKE)
    monkeypatch.setattr(sweep, "EVALUATE", tmp_path / "evaluate.py")
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.01)
    return script


@pytest.fixture
def run_sweep(tmp_path, monkeypatch, capsys):
    """Runs the main of an experiment with flags, and --out: (exit status, stdout, stderr)."""

    def run(main, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["experiment", "--out", str(tmp_path / "out"), *map(str, flags)])
        with pytest.raises(SystemExit) as left:
            run_script(main)
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def sweeping(training, run_sweep):
    """Runs the ablations: (exit status, stdout, stderr)."""

    def run(*flags: str, only=("cross", "snn"), seeds=(1, 2), jobs=2) -> tuple[int, str, str]:
        words = ["--script", training, "--only", *only, "--seeds", *seeds, "--jobs", jobs]
        return run_sweep(ablations.main, *words, "--", "--dset", "demo", *flags)

    return run


def rows(out: Path) -> dict[str, dict]:
    with open(out / "table.csv", newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}
