"""The config file of main.py: JSON, checked before anything else is read or written."""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from dataset.splits import read_hmdb51, read_ucf101
from models.heads.neurons import NEURONS
from models.resnet import BACKBONES
from utils.errors import UserError

# To add a data set, add its reader here. The generated demos have HMDB-51's layout.
READERS = {"ucf101": read_ucf101, "hmdb51": read_hmdb51, "demo": read_hmdb51, "demo_orders": read_hmdb51}
HEADS = ("ensemble_array", "lmu", "spiking_lmu")


@dataclass(frozen=True, kw_only=True)
class DataloaderConfig:
    """How videos reach the CNN."""

    shuffle: bool = True  # has no effect: a frozen CNN gives the same features in any order
    pin_memory: bool = True
    batch_size: int  # clips in a batch of the CNN
    workers: int = 0  # processes that decode videos; 0: the main process decodes
    frames_per_segment: int = 28
    segments_per_video: int = 1
    size: int = 224  # pixels, side of a frame


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """The .npy files in which features are cached, and the files of weights."""

    train_data: str
    test_data: str
    train_labels: str
    test_labels: str
    CNN_weights: str = "default"  # "default", "none" or a path, as for `models.resnet.load_weights`
    SNN_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """The network that sees single frames."""

    backbone: Literal[BACKBONES] = "resnet152"
    projection: bool = False  # to 512 features, through the published layers


@dataclass(frozen=True, kw_only=True)
class SNNConfig:
    """The head that sees the CNN's features over time."""

    minibatch_size: int  # clips
    head: Literal[(*HEADS, "all")] = "ensemble_array"  # all: one after another
    neuron: Literal[tuple(NEURONS)] | None = None  # None: SpikingRectifiedLinear
    train_mode: Literal["spiking", "rate"] = "spiking"
    ensembles: int = 10000
    neurons_per_ensemble: int = 50
    synapse_seconds: float = 0.005
    steps_per_frame: int = 1
    units: int = 800  # hidden units of an LMU
    memory: int = 1  # memories of an LMU
    order: int = 2  # numbers that each memory holds
    theta: float | None = None  # time steps, window of a memory; None: the whole clip
    train_A_and_B: bool = False
    recurrent: bool = True  # hidden units feed back, as published; False: all steps of the memory at once
    loss: Literal["every", "last"] = "last"  # of which time steps


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What is trained, and how."""

    epochs: int
    import_CNN_forward_data: bool = False  # True: the cached features are read, never built
    verify_CNN_data: bool = False  # True: the cached features' checksums are compared at this start
    get_initial_testing_accuracy: bool = True
    do_SNN_training: bool = True  # False: only test the weights in SNN_weights
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.001
    weight_decay: float = 0.0
    end_to_end: bool = False  # True: train the CNN along with the head
    resume: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole config file. The fields have the names of its keys, which are the published ones."""

    name: str
    seed: int = 1001
    dset: Literal[tuple(READERS)] = "ucf101"
    data_path: str
    annotation_path: str = ""
    split: Literal[1, 2, 3] = 1
    use_cuda: bool
    save_dir: str
    dataloader: DataloaderConfig
    pickle_locations: FilesConfig
    CNN: CNNConfig = dataclasses.field(default_factory=CNNConfig)
    SNN: SNNConfig
    SNN_trainer: TrainerConfig


# All numbers lie between these two, except for the smallest values in _LEAST and the seed's largest value.
_SMALLEST, _LARGEST = 1, 10**6
_LEAST = {
    "seed": 0, "dataloader.workers": 0, "dataloader.size": 32, "SNN.synapse_seconds": 0,
    "SNN_trainer.learning_rate": 0, "SNN_trainer.weight_decay": 0,
}  # fmt: skip


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the file or the config's key before the message of a UserError: what is called inside does not know it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def read_config(path: Path) -> Config:
    """Read and check a config file. Keys that start with "_" are comments.

    Raises UserError with the file and the dotted key of the first value that cannot work.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); configs/ holds config files") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    with naming(str(path)):
        config = _read_section(Config, content, "")
        _check(config)
    return config


def _check(config: Config) -> None:
    """Raise UserError if one value rules out another."""
    files, trainer = dataclasses.asdict(config.pickle_locations), config.SNN_trainer
    for key, name in files.items():
        if name is not None and name.lower().endswith((".pkl", ".pickle")):
            suffix = ".pt" if key.endswith("_weights") else ".npy"
            raise UserError(f"pickle_locations.{key}: pickles are not read; name a {suffix} file, got {name}")
    cached = [files[key] for key in ("train_data", "test_data", "train_labels", "test_labels")]
    if len(set(cached)) < len(cached):
        raise UserError(f"pickle_locations: data and labels need four different files, got {', '.join(cached)}")
    if not trainer.do_SNN_training and not files["SNN_weights"]:
        raise UserError("pickle_locations.SNN_weights: name a .pt file of trained weights if do_SNN_training is false")
    if config.SNN.head == "lmu" and config.SNN.neuron is not None:
        raise UserError(f"SNN.neuron: must be null for head lmu, got {config.SNN.neuron}; head spiking_lmu takes it")
    if trainer.end_to_end and trainer.import_CNN_forward_data:
        raise UserError(
            "SNN_trainer.end_to_end: trains the CNN, but import_CNN_forward_data takes the features of a frozen one; "
            "set one of the two to false"
        )


def _read_section(kind: type, content: object, prefix: str):
    """A `kind` with the values of the JSON object `content`. prefix: "SECTION.", or "" at the top level."""
    if type(content) is not dict:
        raise UserError(f"{prefix.removesuffix('.') or 'the file'}: must be {_expected(kind)}, got {_shown(content)}")
    hints = get_type_hints(kind)
    values = {key: value for key, value in content.items() if not key.startswith("_")}
    for key, value in values.items():
        if key not in hints:
            names = {name.lower(): name for name in hints}
            near = difflib.get_close_matches(key.lower(), names, n=1)
            advice = f"did you mean {prefix}{names[near[0]]}?" if near else f"the keys are {', '.join(hints)}"
            raise UserError(f"{prefix}{key}: unknown key; {advice}")
        values[key] = _read_value(hints[key], value, prefix + key)
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{field.name}: missing; add it, {_expected(hints[field.name])}")
    return kind(**values)


def _read_value(hint, value: object, key: str):
    if dataclasses.is_dataclass(hint):
        return _read_section(hint, value, f"{key}.")
    if not _fits(hint, value):
        raise UserError(f"{key}: must be {_expected(hint)}, got {_shown(value)}")
    if type(value) in (int, float):
        least, most = _LEAST.get(key, _SMALLEST), 2**63 - 1 if key == "seed" else _LARGEST
        if not least <= value <= most:  # NaN is refused here too
            raise UserError(f"{key}: must be from {least} to {most}, got {_shown(value)}")
    return float(value) if type(value) is int and _fits(hint, 0.0) else value


def _fits(hint, value: object) -> bool:
    # By exact type: Python takes True for the number 1.
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_args(hint):
        return any(_fits(part, value) for part in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _expected(hint) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_args(hint):
        return " or ".join(map(_expected, get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return f"an object {{...}} with the keys {', '.join(get_type_hints(hint))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes", NoneType: "null"}
    return words[hint]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
