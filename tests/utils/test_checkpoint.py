import errno
import os

import pytest
import torch

from utils.checkpoint import (
    FORMAT,
    DamagedCheckpointError,
    check_settings,
    find_checkpoint,
    kept_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from utils.device import random_state, seed_all, set_random_state
from utils.errors import UserError


def save(path, value=1.0, keep=1):
    weights = {"w": torch.full((100,), value)}
    save_checkpoint(path, {"model_settings": {"backbone": "resnet18"}, "model": weights, "best": value}, keep)


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
    torch.save({"format": FORMAT, "model_settings": Payload()}, tmp_path / "evil.pt")
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


# ---- several checkpoints ----------------------------------------------------------------------------


def value_of(path) -> float:
    return load_checkpoint(path)["model"]["w"][0].item()


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept(tmp_path, monkeypatch, keep):
    replace = os.replace

    def watched(source, target):
        kept = [value_of(path) for path in kept_checkpoints(tmp_path)]
        assert value == 0 or value - 1 in kept  # a kill here loses nothing
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    for value in range(6):
        save(tmp_path / "last.pt", float(value), keep)
    assert [value_of(path) for path in kept_checkpoints(tmp_path)] == [5.0 - number for number in range(keep)]
    assert len(list(tmp_path.iterdir())) == keep


def test_fewer_are_kept_when_asked_for_fewer(tmp_path):
    for value, keep in enumerate((4, 4, 4, 2)):
        save(tmp_path / "last.pt", float(value), keep)
    assert [path.name for path in kept_checkpoints(tmp_path)] == ["last.pt", "last-1.pt"]


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    save(path)
    content = bytearray(path.read_bytes())
    position = content.index(torch.full((100,), 1.0).numpy().tobytes()) + 40
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"last\.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_auto_takes_the_one_before_a_damaged_one(tmp_path, capsys):
    for value in range(3):
        save(tmp_path / "last.pt", float(value), keep=3)
    os.truncate(tmp_path / "last.pt", (tmp_path / "last.pt").stat().st_size // 2)
    path, state = find_checkpoint("auto", tmp_path)
    assert path.name == "last-1.pt" and state["model"]["w"][0] == 1.0
    said = capsys.readouterr().out
    assert "last.pt is damaged" in said and "last.damaged" in said and "continuing from last-1.pt" in said
    # The damaged one takes no whole one's place when the next is written.
    save(tmp_path / "last.pt", 9.0, keep=3)
    assert [value_of(path) for path in kept_checkpoints(tmp_path)] == [9.0, 1.0, 0.0]
    assert (tmp_path / "last.damaged").exists()


def test_a_save_killed_after_rotating_costs_no_earlier_one(tmp_path, monkeypatch):
    for value in range(3):
        save(tmp_path / "last.pt", float(value), keep=3)
    replace = os.replace

    def killed_at_the_end(source, target):
        if target == tmp_path / "last.pt":
            raise KeyboardInterrupt
        replace(source, target)

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_at_the_end)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path / "last.pt", 8.0, keep=3)
    assert [path.name for path in kept_checkpoints(tmp_path)] == ["last-1.pt", "last-2.pt"]
    assert find_checkpoint("auto", tmp_path).state["model"]["w"][0] == 2.0
    save(tmp_path / "last.pt", 9.0, keep=3)
    assert [value_of(path) for path in kept_checkpoints(tmp_path)] == [9.0, 2.0, 1.0]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_save_that_fails_costs_no_earlier_one(tmp_path, monkeypatch):
    for value in range(3):
        save(tmp_path / "last.pt", float(value), keep=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        for _ in range(2):
            with pytest.raises(UserError, match="the earlier one is untouched"):
                save(tmp_path / "last.pt", 9.0, keep=3)
    assert [value_of(path) for path in kept_checkpoints(tmp_path)] == [2.0, 1.0, 0.0]


def test_a_disk_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    for value in range(2):
        save(tmp_path / "last.pt", float(value), keep=2)
    monkeypatch.setattr(torch, "load", lambda *args, **more: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(UserError, match=r"last\.pt: the checkpoint cannot be read"):
        find_checkpoint("auto", tmp_path)
    assert (tmp_path / "last.pt").exists()


def test_the_best_is_what_best_pt_says(tmp_path):
    save(tmp_path / "last.pt", 1.0)
    assert find_checkpoint("auto", tmp_path)[1]["best"] is None  # its weights are gone
    save(tmp_path / "best.pt", 7.0)
    assert find_checkpoint("auto", tmp_path)[1]["best"] == 7.0
    assert find_checkpoint(str(tmp_path / "last.pt"), tmp_path)[1]["best"] == 7.0
    assert find_checkpoint(str(tmp_path / "last.pt"), tmp_path / "another")[1]["best"] is None


def test_auto_with_nothing_or_nothing_whole(tmp_path, capsys):
    assert find_checkpoint("auto", tmp_path) is None and "starting anew" in capsys.readouterr().out
    assert find_checkpoint(None, tmp_path) is None
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / name).write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"last\.pt: not a readable checkpoint"):
        find_checkpoint("auto", tmp_path)
    assert (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    "last, best, found",
    [
        ("8 clips, aa, labels bb", "8 clips, aa", "8 clips, aa, labels bb"),  # best.pt is from before labels were kept
        ("8 clips, aa, labels bb", "8 clips, aa, labels cc", "8 clips, aa, labels cc"),
        ("8 clips, dd, labels bb", "8 clips, aa", "8 clips, aa"),
        ("8 clips, aa", "8 clips, aa", "8 clips, aa"),
    ],
)
def test_what_the_best_was_chosen_on(tmp_path, last, best, found):
    for name, selection in (("last.pt", last), ("best.pt", best)):
        save_checkpoint(tmp_path / name, {"model_settings": {}, "best": 1.0, "selection": selection})
    assert find_checkpoint("auto", tmp_path).state["selection"] == found
