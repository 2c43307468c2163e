"""A run: learning rates, what a checkpoint must fit, and the files beside it."""

import json

import numpy
import pytest
import torch
from torch import nn

from tests.utils.training.test_engine import CRITERION, Net, make_loader
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import UserError
from utils.run_folder import RunFolder
from utils.runtime import ALONE, Runtime
from utils.training.engine import TrainPosition
from utils.training.fit import Training, TrainingState

FLAGS = {"seed": 3, "momentum": 0.9}


def state(optimizer=None, runtime=ALONE, **settings) -> TrainingState:
    model = Net()
    optimizer = optimizer or (lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    return TrainingState(
        model, optimizer(model), torch.amp.GradScaler("cpu", enabled=False), runtime,
        {"neuron": "lif", "tau": 4 / 3, "surrogate": "atan", "alpha": 2.0, **settings},
        clip_ids=numpy.arange(19), evaluated_clips="19 clips", flags=dict(FLAGS), position=TrainPosition(),
    )  # fmt: skip


def run_fit(run: RunFolder, state: TrainingState, epochs: int = 2, log_every: int = 0) -> bool:
    return Training(
        state, make_loader(), make_loader(shuffle=False), CRITERION, run, epochs=epochs, evaluated_on="test",
        schedule=lambda epoch: 1 / (epoch + 1), accumulation_steps=1, clip_norm=None, checkpoint_minutes=0, keep=1,
        log_every=log_every,
    ).fit()  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.setattr("utils.training.fit._draw_clips", lambda *arguments: None)  # 8 x 8 pixels of noise
    return RunFolder(tmp_path / "run", resuming=False, overwrite=False)


def test_parameter_groups_keep_their_own_learning_rates(run):
    def groups(model: nn.Module) -> torch.optim.Optimizer:
        weight, bias = model.layer.weight, model.layer.bias
        return torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.004}], lr=1.0)

    trained = state(groups)
    assert run_fit(run, trained)
    assert [group["lr"] for group in trained.optimizer.param_groups] == pytest.approx([0.05, 0.002])  # second epoch


def test_every_scalar_reaches_metrics_and_tensorboard(run, monkeypatch):
    """A number that train_one_epoch or evaluate returns needs no other line."""
    import utils.training.fit as module

    for name in ("train_one_epoch", "evaluate"):
        original = getattr(module, name)
        more = {f"of_{name}": 7.0}
        monkeypatch.setattr(module, name, lambda *a, original=original, more=more, **k: original(*a, **k) | more)
    assert run_fit(run, state(), epochs=1)
    run.close()
    (line,) = [json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert line["of_train_one_epoch"] == line["of_evaluate"] == 7.0

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path))
    events.Reload()
    assert {"of_train_one_epoch", "of_evaluate", "video_top1", "test_loss"} <= set(events.Tags()["scalars"])


def test_a_scalar_may_be_a_tensor(run, monkeypatch):
    import utils.training.fit as module

    original = module.train_one_epoch
    monkeypatch.setattr(module, "train_one_epoch", lambda *a, **k: original(*a, **k) | {"norm": torch.tensor(2.5)})
    assert run_fit(run, state(), epochs=1)
    assert json.loads((run.path / "metrics.jsonl").read_text())["norm"] == 2.5


def steps(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.path / "steps.jsonl").read_text().splitlines()]


def test_lines_within_epochs_are_cut_back_on_resume(run):
    assert run_fit(run, state(), log_every=2)
    assert [(line["epoch"], line["clips"]) for line in steps(run)] == [(0, 8), (0, 16), (1, 8), (1, 16)]
    assert [line["learning_rate"] for line in steps(run)] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    again = RunFolder(run.path, resuming=True, overwrite=False)
    again.begin(1, 8)
    assert [(line["epoch"], line["clips"]) for line in steps(again)] == [(0, 8), (0, 16), (1, 8)]


# ---- checkpoints that do not fit ---------------------------------------------------------------------


@pytest.fixture
def saved(run) -> dict:
    assert run_fit(run, state(), epochs=1)
    return load_checkpoint(run.last) | {"best": None}


def restored(saved: dict, **settings) -> TrainingState:
    into = state(**settings)
    into.restore(Checkpoint("last.pt", saved))
    return into


def test_round_trip(saved):
    assert torch.equal(restored(saved).model.layer.weight, saved["model"]["layer.weight"])


def test_restored_sums_lie_on_the_device_of_the_run(saved):
    """The step log subtracts them from the epoch's sums, which lie there."""
    into = state(runtime=Runtime(torch.device("meta")))
    into.restore(Checkpoint("last.pt", saved))
    assert into.position.sums.device.type == "meta"


@pytest.mark.parametrize("name, value", [("neuron", "other"), ("tau", 2.0), ("surrogate", "sigmoid"), ("alpha", 1.0)])
def test_another_neuron_is_refused_by_name(saved, name, value):
    with pytest.raises(UserError, match=f"last.pt: checkpoint of another network: its {name} is .*, this run's is"):
        restored(saved, **{name: value})


def test_a_checkpoint_without_these_settings_had_todays_defaults(saved, capsys):
    for name in ("neuron", "tau", "surrogate", "alpha"):
        del saved["model_settings"][name]
    del saved["flags"]["momentum"]
    restored(saved)
    assert "note: --" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"its tau is 1\.33.*, this run's is 2\.0"):
        restored(saved, tau=2.0)


def test_a_flag_that_the_checkpoint_lacks_is_noted(saved, capsys):
    into = state()
    into.flags["loss"] = "margin"
    into.restore(Checkpoint("last.pt", saved))
    assert "note: --loss was not there, is now margin" in capsys.readouterr().out


def test_another_optimizer_is_refused_by_name(saved):
    into = state(lambda model: torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match="its optimizer is SGD, this run's is AdamW"):
        into.restore(Checkpoint("last.pt", saved))


def test_another_momentum_is_noted(saved, capsys):
    saved["flags"]["momentum"] = 0.5
    restored(saved)
    assert "note: --momentum was 0.5, is now 0.9" in capsys.readouterr().out


SELECTIONS = {
    "the same": ("19 clips, aa, labels bb", True),
    "from before labels were kept": ("19 clips, aa", True),
    "other labels": ("19 clips, aa, labels cc", False),
    "other clips": ("19 clips, cc, labels bb", False),
}


@pytest.mark.parametrize("selection, counts", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_a_best_epoch_counts_on_the_same_videos_with_the_same_labels(saved, capsys, selection, counts):
    into = state()
    into.evaluated_clips = "19 clips, aa, labels bb"
    into.restore(Checkpoint("last.pt", saved | {"best": {"epoch": 0, "video_top1": 62.5}, "selection": selection}))
    assert (into.best["epoch"] == 0) == counts
    assert ("there is no best epoch so far on these videos and labels" in capsys.readouterr().out) != counts


DAMAGE = {
    "shape": (lambda s: s["model"].update({"layer.weight": torch.zeros(3, 5)}), "size mismatch for layer.weight"),
    "missing": (lambda s: s["model"].pop("layer.bias"), "Missing key"),
    "nan": (lambda s: s["model"]["layer.bias"].fill_(float("nan")), "its weights layer.bias are not all finite"),
    "epoch": (lambda s: s["position"].update(epoch=-1), "its position is clip 0 of epoch -1"),
    "clips": (lambda s: s["position"].update(clips=20), "its position is clip 20 of epoch 1, with 19 clips an epoch"),
    "type": (lambda s: s["position"].update(epoch="one"), "not a whole checkpoint of this network"),
    "scores": (lambda s: s["position"].update(scores=[1.0]), "not a whole checkpoint of this network"),
    "optimizer": (lambda s: s.pop("optimizer"), "not a whole checkpoint of this network"),
    "groups": (lambda s: s["optimizer"].update(param_groups=[]), "not a whole checkpoint of this network"),
    "random": (lambda s: s.update(random={}), "not a whole checkpoint of this network"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_changed_checkpoint_is_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        restored(saved)
    assert str(caught.value).startswith("last.pt: ") and "\n" not in str(caught.value)
