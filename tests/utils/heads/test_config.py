"""Config files: what is read from them, and what is refused in one line."""

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest

from models.resnet import BACKBONES
from tests.helpers.script import ROOT
from utils.errors import UserError
from utils.heads.config import _LEAST, CNN, SNN, Config, Dataloader, PickleLocations, Trainer, read_config

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
    """The one line that refuses a config, less the file's name that it starts with."""
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
        dataloader=Dataloader(
            shuffle=True, pin_memory=True, batch_size=2, workers=0, frames_per_segment=28, segments_per_video=1,
            size=224,
        ),
        pickle_locations=PickleLocations(
            train_data="a.npy", test_data="b.npy", train_labels="c.npy", test_labels="d.npy", CNN_weights="default",
            SNN_weights=None,
        ),
        CNN=CNN(backbone="resnet152", projection=False),
        SNN=SNN(
            minibatch_size=4, head="ensemble_array", neuron=None, train_mode="spiking", ensembles=10000,
            neurons_per_ensemble=50, synapse_seconds=0.005, steps_per_frame=1, units=800, memory=1, order=2, theta=None,
            train_A_and_B=False, loss="last",
        ),
        SNN_trainer=Trainer(
            epochs=3, import_CNN_forward_data=False, get_initial_testing_accuracy=True, do_SNN_training=True,
            optimizer="adam", learning_rate=0.001, weight_decay=0.0, end_to_end=False, resume=True,
        ),
    )  # fmt: skip


def test_a_whole_number_is_a_number(tmp_path):
    config = read_config(write(tmp_path, changed({"SNN.theta": 28, "SNN_trainer.learning_rate": 0})))
    assert (config.SNN.theta, config.SNN_trainer.learning_rate) == (28.0, 0.0)
    assert type(config.SNN.theta) is float and type(config.SNN_trainer.learning_rate) is float


def test_comments(tmp_path):
    comments = {"_": "anything", "_why": {"name": 1}, "SNN._": [1], "SNN._units": None, "CNN._": ""}
    assert read_config(write(tmp_path, changed(comments))) == read_config(write(tmp_path, least()))
    twice = json.dumps(least())[:-1] + ', "_": 1, "_": {"a": 1, "a": 2}}'
    assert read_config(write(tmp_path, twice)) == read_config(write(tmp_path, least()))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert read_config(write(tmp_path, "\ufeff" + json.dumps(least()))).name == "x"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_as_dict_round_trip(path, tmp_path):
    config = read_config(path)
    written = config.as_dict()
    assert read_config(write(tmp_path, written)) == config
    assert list(written) == [field.name for field in dataclasses.fields(Config)]
    assert type(written["SNN"]) is dict and json.loads(json.dumps(written)) == written


def test_config_is_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_config(write(tmp_path, least())).SNN.units = 3


# ---- refusals --------------------------------------------------------------------------------------------

NEURONS = "RectifiedLinear, SpikingRectifiedLinear, LIF, LIFRate, AdaptiveLIF, AdaptiveLIFRate, Izhikevich"
BAD_VALUES = {
    "near key": ({"SNN.minibatchsize": 1}, "SNN.minibatchsize: unknown key; did you mean SNN.minibatch_size?"),
    "case": ({"snn": {}}, "snn: unknown key; did you mean SNN?"),
    "far key": (
        {"CNN.layers": 3},
        "CNN.layers: unknown key; CNN has backbone, projection",
    ),
    "far key at the top": (
        {"verbose": True},
        "verbose: unknown key; the top level has name, seed, dset, data_path, annotation_path, split, use_cuda, "
        "save_dir, dataloader, pickle_locations, CNN, SNN, SNN_trainer",
    ),
    "key over two lines": ({"CNN.a\nb": 3}, r"CNN.'a\nb': unknown key; CNN has backbone, projection"),
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
    "nan": ({"SNN_trainer.learning_rate": float("nan")}, "SNN_trainer.learning_rate: must be a finite number, got NaN"),
    "infinite": ({"SNN.theta": float("inf")}, "SNN.theta: must be a finite number, got Infinity"),
    "int beyond float": ({"SNN.theta": 10**400}, f"SNN.theta: must be a finite number, got 1{'0' * 76}..."),
    "seed": ({"seed": 2**63}, "seed: must be below 2^63, got 9223372036854775808"),
    "cached data": (
        {"pickle_locations.test_labels": "cache/labels.PKL"},
        "pickle_locations.test_labels: cached data are safe arrays now; name a .npy file, "
        'got "cache/labels.PKL"',
    ),
    "weights": (
        {"pickle_locations.SNN_weights": "snn.pickle"},
        'pickle_locations.SNN_weights: weights are safe tensors now; name a .pt file, got "snn.pickle"',
    ),
    "CNN weights": (
        {"pickle_locations.CNN_weights": "cnn.pkl"},
        'pickle_locations.CNN_weights: weights are safe tensors now; name a .pt file, got "cnn.pkl"',
    ),
    "neither training nor weights": (
        {"SNN_trainer.do_SNN_training": False},
        "pickle_locations.SNN_weights: must name trained weights where SNN_trainer.do_SNN_training is false, "
        "got null; name a .pt file",
    ),
    "lmu with a neuron": (
        {"SNN.head": "lmu", "SNN.neuron": "LIF"},
        'SNN.neuron: must be null where SNN.head is lmu, got "LIF"; head spiking_lmu takes a neuron',
    ),
    "end to end from the cache": (
        {"SNN_trainer.end_to_end": True, "SNN_trainer.import_CNN_forward_data": True},
        "SNN_trainer.end_to_end: trains the CNN, whose outputs SNN_trainer.import_CNN_forward_data takes from the "
        "cache; both are true, set one to false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values(tmp_path, changes, message):
    assert refusal(write(tmp_path, changed(changes))) == message


@pytest.mark.parametrize("key", _LEAST)
def test_numbers_below_their_least(tmp_path, key):
    low = _LEAST[key]
    read_config(write(tmp_path, changed({key: low})))
    assert refusal(write(tmp_path, changed({key: low - 1}))).startswith(f"{key}: must be at least {low}, got ")


BAD_FILES = {
    "empty": ("", "not JSON at line 1, column 1: Expecting value"),
    "not JSON": ('{\n  "name": "x",\n  "seed" 1}', "not JSON at line 3, column 10: Expecting ':' delimiter"),
    "two objects": ("{}\n{}", "not JSON at line 2, column 1: Extra data"),
    "list": ([1, 2], f"must be an object {{...}} with the keys {', '.join(get_type_hints(Config))}, got [1, 2]"),
    "digits": (f'{{"seed": {"1" * 5000}}}', "a number in it is too long, or it is nested too deeply; shorten it"),
    "brackets": ("[" * 100_000, "a number in it is too long, or it is nested too deeply; shorten it"),
    "key twice": ('{"name": "x", "name": "y"}', "name: given more than once; keep one of them"),
    "section twice": (
        json.dumps(least())[:-1] + ', "SNN": {"minibatch_size": 8}}', "SNN: given more than once; keep one of them",
    ),
    "key of a section twice": (
        json.dumps(least()).replace('"epochs"', '"epochs": 1, "epochs"'),
        "SNN_trainer.epochs: given more than once; keep one of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(tmp_path, content, message):
    assert refusal(write(tmp_path, content)) == message


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "gone.json") == "no such config file; configs/ holds some to start from"


def test_folder(tmp_path):
    assert refusal(tmp_path) == "the config file cannot be read (Is a directory)"


def test_not_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"name": "\xff"}')
    assert refusal(tmp_path / "x.json") == "must be UTF-8 text, got another byte at 10; save it as UTF-8"
