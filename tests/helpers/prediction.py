"""A network to predict with, and predict.py run with it."""

import json
from dataclasses import replace
from pathlib import Path

import torch

import predict
from dataset.residual import key_residual_split
from models import ReSpike
from models.batch_norm import StepBatchNorm2d
from models.respike import SETTINGS
from tests.helpers.script import run_here
from utils.trained import TrainedNetwork, export

CLASSES = ["wave", "clap", "jump", "sit", "run", "swim", "fly"]


def export_random_network(path: Path) -> TrainedNetwork:
    """A random network whose neurons fire, as an exported file."""
    torch.manual_seed(5)
    network = dict(
        backbone="resnet18", num_classes=len(CLASSES), stride=2, downsample=True, branches="both", fusion="lean",
        snn_batch_norm="per-step",
    )  # fmt: skip
    model = ReSpike(**{name: network[name] for name in SETTINGS})
    with torch.no_grad():
        for _ in range(3):
            model(*key_residual_split(torch.randn(2, 4, 3, 32, 32), 2))
        for norm in (module for module in model.snn.modules() if isinstance(module, StepBatchNorm2d)):
            norm.bias.fill_(0.5)  # neurons fire for small residuals too
    settings = network | dict(
        classes=CLASSES, T=4, residual="key", neuron="lif", tau=4 / 3, surrogate="atan", alpha=2.0
    )
    flags = dict(dset="list", size=32, sampling="window", frame_stride=2, views=2, crops=1, amp=False)
    trained = TrainedNetwork(path, model.state_dict(), settings, flags, epochs=1)
    export(trained, path)
    return trained


def variant(trained: TrainedNetwork, path: Path, flags: dict | None = None, settings: dict | None = None) -> Path:
    changed = replace(
        trained, path=path, flags=trained.flags | (flags or {}), settings=trained.settings | (settings or {})
    )
    export(changed, path)
    return path


def run(monkeypatch, capfd, checkpoint, *arguments) -> tuple[int, str, str]:
    return run_here(monkeypatch, capfd, dict.fromkeys(map(str, (checkpoint, *arguments))), predict)


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]
