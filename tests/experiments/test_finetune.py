"""The two halves of the demo share no class, and what is fine-tuned starts from what was pre-trained."""

import csv
import sys
from pathlib import Path

import pytest

from dataset.demo import CLASSES
from experiments import finetune
from utils.script import run_script

# A fine-tuned run is 20 points better; it needs the checkpoint that the pre-training writes.
FAKE = """
import json, sys
from pathlib import Path
flags = sys.argv[1:]
value = dict(zip(flags, flags[1:]))
run, epochs = Path(value["--run-dir"]), int(value["--epochs"])
run.mkdir(parents=True)
bonus = 20 if "--init" in value else 0
if bonus and not Path(value["--init"]).exists():
    sys.exit("error: --init no such file")
(run / "new").write_text(json.dumps({"command": [Path(sys.argv[0]).name, *flags], "flags": {"epochs": epochs}}))
(run / "new").rename(run / "config.json")  # as the real ones do: the sweep never reads half a file
time = {"train_clips": 6, "clips_per_second": 2}
lines = [{"epoch": e, "video_top1": 10 * e + bonus + int(value["--seed"]), **time} for e in range(epochs)]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(run / "last.pt").touch()
"""


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """Two videos a class and list, in place of the generated ones."""
    root = tmp_path / "demo"
    root.mkdir()
    for part in ("train", "val"):
        lines = [f"videos/{name}/{part}{n}.avi {label}\n" for label, name in enumerate(CLASSES) for n in range(2)]
        (root / f"{part}.txt").write_text("".join(lines))
    monkeypatch.setattr(finetune, "generate_demo", lambda *_, **__: None)
    monkeypatch.setattr(finetune, "ROOT", tmp_path)
    (tmp_path / "train_kinetics.py").write_text(FAKE)
    return root


def run(demo: Path, monkeypatch, capsys) -> tuple[int, str]:
    out = demo.parent / "out"
    words = ["finetune", "--out", str(out), "--data-root", str(demo), "--seeds", "1", "3", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        run_script(finetune.main)
    return left.value.code, capsys.readouterr().out


def test_the_table_compares_equal_epochs(demo, monkeypatch, capsys):
    status, printed = run(demo, monkeypatch, capsys)
    assert status == 0
    finetuned = next(line for line in printed.splitlines() if line.startswith("| finetuned |"))
    assert finetuned.endswith("| 2 | 22.0 ± 1.4 | 32.0 ± 1.4 | 42.0 ± 1.4 | - |")
    with open(demo.parent / "out/table.csv", newline="") as file:
        rows = {(row["run"], row["epoch"]): row["video_top1_mean"] for row in csv.DictReader(file)}
    assert rows["scratch", "3"] == "22.0" and rows["pretrained", "4"] == "32.0" and len(rows) == 10
    status, printed = run(demo, monkeypatch, capsys)
    assert status == 0 and "trains" not in printed


def test_nothing_starts_from_a_failed_pre_training(demo, monkeypatch, capsys):
    script = demo.parent / "train_kinetics.py"
    broken = "if run.name == 'pretrained-3':\n    (run / 'last.pt').touch()\n    sys.exit('error: broken')\n"
    script.write_text(FAKE.replace("time =", f"{broken}time ="))
    status, printed = run(demo, monkeypatch, capsys)
    assert status == 1
    assert "pretrained-3: ended with status 1: error: broken" in printed
    assert "finetuned-1: trains" in printed and "finetuned-3" not in printed and "scratch-3: ended" not in printed


def test_the_halves_share_no_class(demo, tmp_path):
    first, second = finetune.CLASSES_OF["pretrained"], finetune.CLASSES_OF["finetuned"]
    assert finetune.CLASSES_OF["scratch"] == second and {*first} | {*second} == {*CLASSES} and len(first) == 4
    flags = finetune.write_lists(demo, tmp_path / "lists", second)
    files = dict(zip(flags[::2], flags[1::2], strict=True))
    assert Path(files["--label-map"]).read_text().split() == list(second)
    expected = [f"videos/{name}/val{n}.avi {label}" for label, name in enumerate(second) for n in range(2)]
    assert Path(files["--val-list"]).read_text().splitlines() == expected
