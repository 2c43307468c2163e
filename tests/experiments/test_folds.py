"""Cross-validation trains every variant on every fold, and gives mean and deviation over folds."""

import json
from pathlib import Path

import pytest

from experiments import folds
from experiments.variants import BASE, RESPIKE
from tests.experiments.conftest import FAKE, rows
from utils.errors import UserError


@pytest.fixture
def lists(tmp_path) -> Path:
    """Folds 1, 2 and 10, and files that are none."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for name in ("train1", "val1", "train2", "val2", "train10", "val10", "classes", "train-notes", "trainers.old"):
        (folder / f"{name}.txt").write_text("a.mp4 0\n")
    return folder


def test_folds_are_in_the_order_of_their_numbers(lists):
    found = folds.folds_of(lists)
    assert list(found) == ["1", "2", "10"]
    named = {"--train-list": "train2", "--val-list": "val2", "--label-map": "classes"}
    assert found["2"] == tuple(word for flag, name in named.items() for word in (flag, f"{lists}/{name}.txt"))
    (lists / "classes.txt").unlink()
    assert len(folds.folds_of(lists)["2"]) == 4
    assert list(folds.folds_of(lists, ["10", "1"])) == ["1", "10"]


def test_a_pair_of_lists_is_one_fold(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("a.mp4 0\n")
    assert list(folds.folds_of(tmp_path)) == [""]


def test_what_is_missing_is_named(lists, tmp_path):
    with pytest.raises(
        UserError, match=r"^--lists .*: expected lists train<k>.txt and val<k>.txt in it, found no train"
    ):
        folds.folds_of(tmp_path)
    with pytest.raises(UserError, match=r"^--folds 3: .* has no train3.txt; it has 1, 10, 2$"):
        folds.folds_of(lists, ["3"])
    (lists / "val2.txt").unlink()
    with pytest.raises(UserError, match=r"val2.txt: no such file; expected the test videos of the fold of train2.txt"):
        folds.folds_of(lists)


def test_every_variant_on_every_fold(lists, training, run_sweep, tmp_path, monkeypatch):
    (tmp_path / "train_kinetics.py").write_text(FAKE)
    monkeypatch.setattr(folds, "ROOT", tmp_path)
    words = ["--lists", lists, "--folds", 2, 1, "--only", "snn", "mine=--branches ann", "--jobs", 2]
    status, printed, err = run_sweep(folds.main, *words, "--", "--size", 96)
    assert status == 0, err
    found = rows(tmp_path / "out")
    # 50 in the second epoch, 20 (snn) or 10 (ann), 2 for the seed, and 3 and 6 of the folds.
    assert {name: row["video_top1_mean"] for name, row in found.items()} == {"snn": "76.5", "mine": "66.5"}
    assert {row["video_top1_deviation"] for row in found.values()} == {"2.1"} and found["snn"]["runs"] == "2"
    assert float(found["snn"]["core_minutes_mean"]) >= 0
    config = json.loads((tmp_path / "out/snn-fold2.1/config.json").read_text())
    data = ["--train-list", "train2", "--val-list", "val2", "--label-map", "classes"]
    data = [word if word.startswith("--") else f"{lists}/{word}.txt" for word in data]
    expected = [*BASE.split(), *RESPIKE.split(), "--dset", "list", "--size", "96", "--branches", "snn", *data]
    assert config["command"][6:] == [*expected, "--seed", "1"]

    status, printed, _ = run_sweep(folds.main, "--lists", lists, "--only", "snn", "--", "--size", 96)
    assert status == 0 and "2 of 3 runs are finished\nsnn-fold10.1: trains\n" in printed
