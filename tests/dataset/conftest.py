"""What the tests of dataset.prepare and of its manifest share."""

import pytest

from dataset import prepare
from tests.helpers.script import refused, run_here


@pytest.fixture
def run_prepare(tiny_lists, tmp_path, monkeypatch, capfd):
    """Prepare the tiny lists' videos into tmp_path/out, with these flags changed. Returns stdout."""

    def run(**changed) -> str:
        flags = _flags({**tiny_lists, "--out": tmp_path / "out", "--jobs": 2}, changed)
        status, out, err = run_here(monkeypatch, capfd, flags, prepare)
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refuse_prepare(tiny_lists, tmp_path, monkeypatch, capfd):
    def refuse(message: str, **changed) -> None:
        refused(monkeypatch, capfd, _flags({**tiny_lists, "--out": tmp_path / "out"}, changed), message, prepare)

    return refuse


def _flags(flags: dict, changed: dict) -> dict:
    """`flags` with those of `changed`, in which "" leaves a flag out."""
    flags |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return {flag: value for flag, value in flags.items() if value != ""}
