"""Config files: what is read from them, and what is refused in one line."""

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest

from models.resnet import BACKBONES
from tests.helpers.script import ROOT
from utils.errors import UserError
from utils.heads.config import CNNConfig, Config, DataloaderConfig, FilesConfig, SNNConfig, TrainerConfig, read_config

CONFIGS = sorted((ROOT / "configs").glob("*.json"))
LEFT_OUT = object()


def least() -> dict:
    """The required keys alone."""
    return {
        "name": "x",
        "data_path": "videos",
        "use_cuda": False,
        "save_dir": "runs",
        "dataloader": {"batch_size": 2},
        "pickle_locations": {
            "train_data": "a.npy", "test_data": "b.npy", "train_labels": "c.npy", "test_labels": "d.npy",
        },
        "SNN": {"minibatch_size": 4},
        "SNN_trainer": {"epochs": 3},
    }  # fmt: skip


def changed(changes: dict) -> dict:
    """`least` with dotted keys set, or left out."""
    config = least()
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        if value is LEFT_OUT:
            del section[key]
        else:
            section[key] = value
    return config


def write(folder: Path, content: dict | list | str) -> Path:
    path = folder / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The message that refuses a config, without the file's name at its start."""
    with pytest.raises(UserError) as refused:
        read_config(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 400, message
    return message.removeprefix(f"{path}: ")


# ---- the configs that come with the program ------------------------------------------------------------


def test_there_is_a_config_for_every_published_result_and_the_demo():
    assert [path.stem for path in CONFIGS] == ["config", "demo", "ensemble_array", "lmu", "spiking_lmu"]
    assert (ROOT / "configs/config.json").read_text() == (ROOT / "configs/ensemble_array.json").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_reads(path):
    config = read_config(path)
    assert config.name == {"config": "ensemble_array", "demo": "demo_features"}.get(path.stem, path.stem)
    assert config.pickle_locations.SNN_weights == f"{config.save_dir}/{config.name}/weights.pt"
    assert not config.SNN_trainer.import_CNN_forward_data  # nothing is cached at first


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_known(path):
    def check(section: dict, kind: type) -> None:
        hints = get_type_hints(kind)
        assert set(section) <= set(hints)
        for key, value in section.items():
            assert isinstance(value, dict) == dataclasses.is_dataclass(hints[key]), key
            if isinstance(value, dict):
                check(value, hints[key])

    check(json.loads(path.read_text()), Config)


def test_published_values():
    configs = {path.stem: read_config(path) for path in CONFIGS}
    for name in ("ensemble_array", "lmu", "spiking_lmu"):
        config = configs[name]
        assert (config.dset, config.split, config.dataloader.frames_per_segment) == ("ucf101", 1, 28)
        assert (config.CNN.backbone, config.CNN.projection) == ("resnet152", True)
        assert (config.SNN.head, config.SNN.minibatch_size) == (name, 100)
    assert configs["ensemble_array"].SNN.ensembles * configs["ensemble_array"].SNN.neurons_per_ensemble == 500_000
    for name, neuron in (("lmu", None), ("spiking_lmu", "SpikingRectifiedLinear")):
        snn = configs[name].SNN
        assert (snn.units, snn.order, snn.theta, snn.neuron) == (800, 2, None, neuron)
    assert not configs["demo"].use_cuda and configs["demo"].pickle_locations.CNN_weights == "none"


# ---- reading ---------------------------------------------------------------------------------------------


def test_defaults(tmp_path):
    assert read_config(write(tmp_path, least())) == Config(
        name="x",
        seed=1001,
        dset="ucf101",
        data_path="videos",
        annotation_path="",
        split=1,
        use_cuda=False,
        save_dir="runs",
        dataloader=DataloaderConfig(
            shuffle=True, pin_memory=True, batch_size=2, workers=0, frames_per_segment=28, segments_per_video=1,
            size=224,
        ),
        pickle_locations=FilesConfig(
            train_data="a.npy", test_data="b.npy", train_labels="c.npy", test_labels="d.npy", CNN_weights="default",
            SNN_weights=None,
        ),
        CNN=CNNConfig(backbone="resnet152", projection=False),
        SNN=SNNConfig(
            minibatch_size=4, head="ensemble_array", neuron=None, train_mode="spiking", ensembles=10000,
            neurons_per_ensemble=50, synapse_seconds=0.005, steps_per_frame=1, units=800, memory=1, order=2, theta=None,
            train_A_and_B=False, recurrent=True, loss="last",
        ),
        SNN_trainer=TrainerConfig(
            epochs=3, import_CNN_forward_data=False, verify_CNN_data=False, get_initial_testing_accuracy=True,
            do_SNN_training=True, optimizer="adam", learning_rate=0.001, weight_decay=0.0, end_to_end=False,
            resume=True,
        ),
    )  # fmt: skip


def test_a_whole_number_is_a_number(tmp_path):
    config = read_config(write(tmp_path, changed({"SNN.theta": 28, "SNN_trainer.learning_rate": 0})))
    assert (config.SNN.theta, config.SNN_trainer.learning_rate) == (28.0, 0.0)
    assert type(config.SNN.theta) is float and type(config.SNN_trainer.learning_rate) is float


def test_comments(tmp_path):
    comments = {"_": "anything", "_why": {"name": 1}, "SNN._": [1], "SNN._units": None, "CNN._": ""}
    assert read_config(write(tmp_path, changed(comments))) == read_config(write(tmp_path, least()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_that_a_run_wrote_reads_the_same(path, tmp_path):
    config = read_config(path)
    assert read_config(write(tmp_path, dataclasses.asdict(config))) == config


def test_config_is_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_config(write(tmp_path, least())).SNN.units = 3


# ---- refusals --------------------------------------------------------------------------------------------

NEURONS = "RectifiedLinear, SpikingRectifiedLinear, LIFRate, LIF, AdaptiveLIFRate, AdaptiveLIF, Izhikevich"
BAD_VALUES = {
    "near key": ({"SNN.minibatchsize": 1}, "SNN.minibatchsize: unknown key; did you mean SNN.minibatch_size?"),
    "case": ({"snn": {}}, "snn: unknown key; did you mean SNN?"),
    "far key": (
        {"CNN.layers": 3},
        "CNN.layers: unknown key; the keys are backbone, projection",
    ),
    "far key at the top": (
        {"verbose": True},
        "verbose: unknown key; the keys are name, seed, dset, data_path, annotation_path, split, use_cuda, "
        "save_dir, dataloader, pickle_locations, CNN, SNN, SNN_trainer",
    ),
    "missing": ({"SNN.minibatch_size": LEFT_OUT}, "SNN.minibatch_size: missing; add it, a whole number"),
    "missing text": ({"name": LEFT_OUT}, "name: missing; add it, text in quotes"),
    "missing section": (
        {"dataloader": LEFT_OUT},
        "dataloader: missing; add it, an object {...} with the keys shuffle, pin_memory, batch_size, workers, "
        "frames_per_segment, segments_per_video, size",
    ),
    "section": ({"CNN": "resnet18"}, 'CNN: must be an object {...} with the keys backbone, projection, got "resnet18"'),
    "null section": ({"CNN": None}, "CNN: must be an object {...} with the keys backbone, projection, got null"),
    "text for int": ({"SNN.minibatch_size": "100"}, 'SNN.minibatch_size: must be a whole number, got "100"'),
    "bool for int": ({"SNN.minibatch_size": True}, "SNN.minibatch_size: must be a whole number, got true"),
    "float for int": ({"SNN.minibatch_size": 4.0}, "SNN.minibatch_size: must be a whole number, got 4.0"),
    "null for int": ({"SNN.order": None}, "SNN.order: must be a whole number, got null"),
    "int for bool": ({"use_cuda": 1}, "use_cuda: must be true or false, got 1"),
    "int for text": ({"name": 7}, "name: must be text in quotes, got 7"),
    "bool for float": ({"SNN.theta": True}, "SNN.theta: must be a number or null, got true"),
    "text for float": ({"SNN.theta": "28"}, 'SNN.theta: must be a number or null, got "28"'),
    "list": (
        {"pickle_locations.SNN_weights": ["a.pt"]},
        'pickle_locations.SNN_weights: must be text in quotes or null, got ["a.pt"]',
    ),
    "long": ({"seed": "7" * 1000}, f'seed: must be a whole number, got "{"7" * 76}...'),
    "choice": ({"dset": "kinetics"}, 'dset: must be one of ucf101, hmdb51, demo, demo_orders, got "kinetics"'),
    "choice of numbers": ({"split": 4}, "split: must be one of 1, 2, 3, got 4"),
    "bool is no choice": ({"split": True}, "split: must be one of 1, 2, 3, got true"),
    "choice or null": ({"SNN.neuron": "Lif"}, f'SNN.neuron: must be one of {NEURONS} or null, got "Lif"'),
    "backbone": ({"CNN.backbone": "vgg16"}, f'CNN.backbone: must be one of {", ".join(BACKBONES)}, got "vgg16"'),
    "nan": (
        {"SNN_trainer.learning_rate": float("nan")}, "SNN_trainer.learning_rate: must be from 0 to 1000000, got NaN",
    ),
    "infinite": ({"SNN.theta": float("inf")}, "SNN.theta: must be from 1 to 1000000, got Infinity"),
    "int beyond float": ({"SNN.theta": 10**400}, f"SNN.theta: must be from 1 to 1000000, got 1{'0' * 76}..."),
    "seed": ({"seed": 2**63}, f"seed: must be from 0 to {2**63 - 1}, got 9223372036854775808"),
    "cached data": (
        {"pickle_locations.test_labels": "cache/labels.PKL"},
        "pickle_locations.test_labels: pickles are not read; name a .npy file, got cache/labels.PKL",
    ),
    "weights": (
        {"pickle_locations.SNN_weights": "snn.pickle"},
        "pickle_locations.SNN_weights: pickles are not read; name a .pt file, got snn.pickle",
    ),
    "CNN weights": (
        {"pickle_locations.CNN_weights": "cnn.pkl"},
        "pickle_locations.CNN_weights: pickles are not read; name a .pt file, got cnn.pkl",
    ),
    "one file for two things": (
        {"pickle_locations.test_data": "c.npy"},
        "pickle_locations: data and labels need four different files, got a.npy, c.npy, c.npy, d.npy",
    ),
    "neither training nor weights": (
        {"SNN_trainer.do_SNN_training": False},
        "pickle_locations.SNN_weights: name a .pt file of trained weights if do_SNN_training is false",
    ),
    "lmu with a neuron": (
        {"SNN.head": "lmu", "SNN.neuron": "LIF"},
        "SNN.neuron: must be null for head lmu, got LIF; head spiking_lmu takes it",
    ),
    "end to end from the cache": (
        {"SNN_trainer.end_to_end": True, "SNN_trainer.import_CNN_forward_data": True},
        "SNN_trainer.end_to_end: trains the CNN, but import_CNN_forward_data takes the features of a frozen one; "
        "set one of the two to false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values(tmp_path, changes, message):
    assert refusal(write(tmp_path, changed(changes))) == message


LEAST = {
    "seed": 0, "dataloader.batch_size": 1, "dataloader.workers": 0, "dataloader.frames_per_segment": 1,
    "dataloader.segments_per_video": 1, "dataloader.size": 32, "SNN.minibatch_size": 1, "SNN.ensembles": 1,
    "SNN.neurons_per_ensemble": 1, "SNN.synapse_seconds": 0, "SNN.steps_per_frame": 1, "SNN.units": 1,
    "SNN.memory": 1, "SNN.order": 1, "SNN.theta": 1, "SNN_trainer.epochs": 1, "SNN_trainer.learning_rate": 0,
    "SNN_trainer.weight_decay": 0,
}  # fmt: skip


@pytest.mark.parametrize(("key", "low"), LEAST.items())
def test_numbers_below_their_least(tmp_path, key, low):
    read_config(write(tmp_path, changed({key: low})))
    assert refusal(write(tmp_path, changed({key: low - 1}))).startswith(f"{key}: must be from {low} to ")


BAD_FILES = {
    "empty": ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    "not JSON": (
        '{\n  "name": "x",\n  "seed" 1}', "not JSON: Expecting ':' delimiter: line 3 column 10 (char 26)",
    ),
    "list": (
        [1, 2], f"the file: must be an object {{...}} with the keys {', '.join(get_type_hints(Config))}, got [1, 2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(tmp_path, content, message):
    assert refusal(write(tmp_path, content)) == message


def test_missing_file(tmp_path):
    want = "cannot be read (No such file or directory); configs/ holds config files"
    assert refusal(tmp_path / "gone.json") == want
