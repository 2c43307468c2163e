"""The sweep over batch norms trains each mode once and tests it twice. Training and test are fakes of a moment."""

import csv
import sys

import pytest

from experiments import batch_norms, sweep
from utils.script import run_script

TRAIN = """
import json, sys
from pathlib import Path
flags = sys.argv[1:]
value = lambda name: flags[flags.index(name) + 1]
run, seed = Path(value("--run-dir")), int(value("--seed"))
run.mkdir(parents=True)
(run / "config.json").write_text(json.dumps({"command": [Path(sys.argv[0]).name, *flags], "flags": {"epochs": 1}}))
loss = {"per-step": 0.5, "merged": 0.4, "through-time": 0.3}[value("--snn-bn")]
line = {"epoch": 0, "video_top1": 80 + 2 * seed, "test_loss": loss, "evaluated_on": "test", "train_clips": 1}
(run / "metrics.jsonl").write_text(json.dumps(line | {"clips_per_second": 1}) + chr(10))
(run / "last.pt").touch()
"""
EVALUATE = """
import json, sys
from pathlib import Path
checkpoint, *flags = sys.argv[1:]
if (Path(checkpoint).parent.parent / "broken").exists():
    sys.exit("error: no clips")
assert flags[:2] == ["--precise-bn", "7"] and checkpoint.endswith("/last.pt") and flags[2] == "--out"
out = Path(flags[3])
out.mkdir(parents=True)  # fails if it is done twice
(out / "evaluation.json").write_text(json.dumps({"video_top1": 90 + int(checkpoint.split("-")[-1][0]), "loss": 0.25}))
"""


@pytest.fixture
def sweeping(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    monkeypatch.setattr(batch_norms, "EVALUATE", tmp_path / "evaluate.py")
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.01)

    def run(*only: str) -> tuple[int, str, str]:
        words = ["batch_norms", "--out", str(tmp_path / "out"), "--script", str(tmp_path / "train.py"), "--seeds", "1",
                 "3", "--precise-bn", "7", "--only", *only, "--", "--dset", "demo"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left:
            run_script(batch_norms.main)
        return left.value.code or 0, *capsys.readouterr()

    return run


def test_each_mode_is_trained_once_and_tested_twice(sweeping, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/broken").touch()
    status, _, err = sweeping("merged", "through-time")
    assert status == 2 and "merged-1: error: no clips" in err
    (tmp_path / "out/broken").unlink()
    for already in (4, 4):
        status, printed, _ = sweeping("merged", "through-time")
        assert status == 0 and f"{already} of 4 runs are finished" in printed
    assert "is measured" not in printed
    for line in (
        "| merged | running | 2 | 84.0 ± 2.8 | 0.400 ± 0.000 |",
        "| merged | of 7 clips | 2 | 92.0 ± 1.4 | 0.250 ± 0.000 |",
        "| through-time | running | 2 | 84.0 ± 2.8 | 0.300 ± 0.000 |",
    ):
        assert line in printed
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["precise_bn"]) for row in rows] == [
        ("merged", "0"), ("merged", "7"), ("through-time", "0"), ("through-time", "7"),
    ]  # fmt: skip
    assert rows[1]["video_top1_mean"] == "92.0" and rows[1]["loss_mean"] == "0.250"
