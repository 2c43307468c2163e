"""Running train_fusion.py in a test."""

import json
import re
import sys
from pathlib import Path

import pytest

import train_fusion
from utils.errors import run_script

ROOT = Path(__file__).parents[1]


def command_line(flags: dict) -> list[str]:
    return [word for flag, value in flags.items() for word in ((flag,) if value is None else (flag, str(value)))]


def run_here(monkeypatch, capfd, flags: dict) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the script, run in this process."""
    monkeypatch.setattr(sys, "argv", ["train_fusion.py", *command_line(flags)])
    with pytest.raises(SystemExit) as left:
        run_script(train_fusion.main)
    out, err = capfd.readouterr()
    return left.value.code or 0, out, err


def refused(monkeypatch, capfd, flags: dict, message: str) -> None:
    status, _, err = run_here(monkeypatch, capfd, flags)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
