import errno
import os

import pytest
import torch

from utils.checkpoint import check_settings, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.seed import random_state, seed_all, set_random_state


def save(path, value=1.0):
    save_checkpoint(path, {"model_settings": {"backbone": "resnet18"}, "model": {"w": torch.full((100,), value)}})


def test_round_trip(tmp_path):
    save(tmp_path / "last.pt", 3.0)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["model"]["w"].unique().item() == 3.0
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]  # no temporary file is left


def test_random_state_survives_weights_only(tmp_path):
    import random

    seed_all(5)
    save_checkpoint(tmp_path / "r.pt", {"model_settings": {}, "random": random_state()})
    want = torch.rand(3).tolist(), random.random()
    seed_all(6)
    set_random_state(load_checkpoint(tmp_path / "r.pt")["random"])
    assert (torch.rand(3).tolist(), random.random()) == want


@pytest.mark.parametrize("kept", [0, 10, 500, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, kept):
    path = tmp_path / "last.pt"
    save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"last\.pt: not a readable checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "no.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("/tmp/respike_executed",)


def test_loading_runs_no_code(tmp_path):
    torch.save({"format": 1, "model_settings": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "evil.pt")
    assert not os.path.exists("/tmp/respike_executed")


def test_another_network_is_refused_by_name(tmp_path):
    found = {"backbone": "resnet18", "stride": 4, "downsample": True, "num_classes": 51}
    check_settings(tmp_path, found, dict(found))
    for name, value in {"backbone": "resnet50", "stride": 2, "downsample": False, "num_classes": 101}.items():
        with pytest.raises(UserError, match=f"its {name} is {found[name]}, this run's is {value}"):
            check_settings(tmp_path, found, {**found, name: value})


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, broken):
    path = tmp_path / "last.pt"
    save(path, 1.0)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "write":
        real_open = open
        monkeypatch.setattr(
            "builtins.open", lambda p, mode="r", *a, **k: full() if "w" in mode else real_open(p, mode, *a, **k)
        )
    else:
        monkeypatch.setattr(os, broken, full)
    with pytest.raises(UserError, match=r"No space left on device.*the earlier one is untouched"):
        save(path, 2.0)
    monkeypatch.undo()
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.pt"]
