"""The training of a head, and how it is resumed. tests/scripts/test_main.py has whole runs."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from tests.helpers.script import ROOT
from utils.errors import UserError
from utils.heads import fit as fit_module
from utils.heads.config import TrainerConfig, read_config
from utils.heads.fit import fit, resume
from utils.run_folder import RunFolder, leave_run_folders


class Batches:
    """Two minibatches of features [T, B, width] that show their label."""

    videos = torch.arange(6)

    def __len__(self):
        return 2

    def __iter__(self):
        labels = torch.tensor([0, 1, 2])
        for _ in range(2):
            yield nn.functional.one_hot(labels, 3).float().expand(4, -1, -1), labels

    def shuffled(self, epoch):
        return iter(self)


class Head(nn.Linear):
    neuron = None

    @property
    def head(self):
        return self


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "save_curves", lambda *_: None)
    yield RunFolder(tmp_path / "run", resuming=True, overwrite=False)
    leave_run_folders()


def trained(run, head, optimizer, history, epochs) -> bool:
    config = dataclasses.replace(read_config(ROOT / "configs/demo.json"), SNN_trainer=TrainerConfig(epochs=epochs))
    return fit(head, Batches(), Batches(), optimizer, run, config, history, {"units": 3})


def test_a_resumed_run_takes_the_rates_that_it_is_given(run):
    head = Head(3, 3)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    assert resume(run, head, optimizer, {"units": 3}) == []
    assert trained(run, head, optimizer, [], epochs=2)

    other = Head(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), 0.01, momentum=0.9, weight_decay=0.5)
    history = resume(run, other, optimizer, {"units": 3})
    assert [line["epoch"] for line in history] == [0, 1] and torch.equal(other.weight, head.weight)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.5)
    assert optimizer.state[other.weight]["momentum_buffer"].count_nonzero() > 0
    assert trained(run, other, optimizer, history, epochs=3)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2] and len(history) == 3


def test_a_checkpoint_of_something_else_is_refused(run):
    head = Head(3, 3)
    assert trained(run, head, torch.optim.SGD(head.parameters(), 0.1), [], epochs=1)
    with pytest.raises(UserError, match=r"last\.pt: .*its units is 3, this run's is 4"):
        resume(run, head, torch.optim.SGD(head.parameters(), 0.1), {"units": 4})
    with pytest.raises(UserError, match=r"last\.pt: .*its optimizer is sgd, this run's is adam"):
        resume(run, head, torch.optim.Adam(head.parameters(), 0.1), {"units": 3})
