"""The config file of main.py: JSON, read whole and checked before anything else is read or written."""

import dataclasses
import difflib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from models.resnet import BACKBONES
from utils.errors import UserError

Neuron = Literal[
    "RectifiedLinear", "SpikingRectifiedLinear", "LIF", "LIFRate", "AdaptiveLIF", "AdaptiveLIFRate", "Izhikevich",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dataloader:
    """How videos reach the CNN."""

    shuffle: bool = True
    pin_memory: bool = True
    batch_size: int  # videos a batch through the CNN
    workers: int = 0  # processes that decode; 0: the main one
    frames_per_segment: int = 28
    segments_per_video: int = 1
    size: int = 224  # pixels, of a frame's side


@dataclass(frozen=True, kw_only=True)
class PickleLocations:
    """Where the CNN's outputs are cached, as .npy, and where weights are. The name is the published one."""

    train_data: str
    test_data: str
    train_labels: str
    test_labels: str
    CNN_weights: str = "default"  # "default", "none" or a path, as for `models.resnet.load_weights`
    SNN_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class CNN:
    """The network that sees single frames."""

    backbone: Literal[BACKBONES] = "resnet152"
    projection: bool = False


@dataclass(frozen=True, kw_only=True)
class SNN:
    """The head that sees the CNN's outputs over time."""

    minibatch_size: int  # segments
    head: Literal["ensemble_array", "lmu", "spiking_lmu", "all"] = "ensemble_array"  # all: each in turn
    neuron: Neuron | None = None  # None: the head's own
    train_mode: Literal["spiking", "rate"] = "spiking"
    ensembles: int = 10000
    neurons_per_ensemble: int = 50
    synapse_seconds: float = 0.005
    steps_per_frame: int = 1
    units: int = 800
    memory: int = 1
    order: int = 2
    theta: float | None = None  # steps; None: frames_per_segment
    train_A_and_B: bool = False
    recurrent: bool = True  # hidden units feed back, as published; False: all steps of the memory at once
    loss: Literal["every", "last"] = "last"


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What is trained, and how."""

    epochs: int
    import_CNN_forward_data: bool = False
    get_initial_testing_accuracy: bool = True
    do_SNN_training: bool = True
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.001
    weight_decay: float = 0.0
    end_to_end: bool = False
    resume: bool = True


_CNN = CNN  # in the body of Config, CNN is the field by the time its annotation is evaluated


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole config file; fields are named as its keys."""

    name: str
    seed: int = 1001
    dset: Literal["ucf101", "hmdb51", "demo", "demo_orders"] = "ucf101"
    data_path: str
    annotation_path: str = ""
    split: Literal[1, 2, 3] = 1
    use_cuda: bool
    save_dir: str
    dataloader: Dataloader
    pickle_locations: PickleLocations
    CNN: _CNN = dataclasses.field(default_factory=_CNN)
    SNN: SNN
    SNN_trainer: Trainer

    def as_dict(self) -> dict:
        """Nested dicts of what JSON can hold; written to a file, `read_config` reads the same from it."""
        return dataclasses.asdict(self)


_LEAST = {
    "seed": 0, "dataloader.batch_size": 1, "dataloader.workers": 0, "dataloader.frames_per_segment": 1,
    "dataloader.segments_per_video": 1, "dataloader.size": 32, "SNN.minibatch_size": 1, "SNN.ensembles": 1,
    "SNN.neurons_per_ensemble": 1, "SNN.synapse_seconds": 0, "SNN.steps_per_frame": 1, "SNN.units": 1,
    "SNN.memory": 1, "SNN.order": 1, "SNN.theta": 1, "SNN_trainer.epochs": 1, "SNN_trainer.learning_rate": 0,
    "SNN_trainer.weight_decay": 0,
}  # fmt: skip


def read_config(path: Path) -> Config:
    """Read and check a config file. Keys that start with "_" are comments.

    Raises UserError naming the file and the dotted key for the first thing that cannot work.
    """
    config = _read_section(Config, _load(path), path, "")
    check(config, path)
    return config


def check(config: Config, path: Path) -> None:
    """Raise UserError for the first value that another one, or the program, rules out."""
    if config.SNN_trainer.learning_rate > 1e6:
        raise UserError(
            f"{path}: SNN_trainer.learning_rate: must be at most 1e6, got {config.SNN_trainer.learning_rate:g}"
        )
    if not config.seed < 2**63:
        raise UserError(f"{path}: seed: must be below 2^63, got {_shown(config.seed)}")
    for key, value in dataclasses.asdict(config.pickle_locations).items():
        if value is not None and value.lower().endswith((".pkl", ".pickle")):
            if key.endswith("_weights"):
                advice = "weights are safe tensors now; name a .pt file"
            else:
                advice = "cached data are safe arrays now; name a .npy file"
            raise UserError(f"{path}: pickle_locations.{key}: {advice}, got {_shown(value)}")
    if not config.SNN_trainer.do_SNN_training and not config.pickle_locations.SNN_weights:
        raise UserError(
            f"{path}: pickle_locations.SNN_weights: must name trained weights where SNN_trainer.do_SNN_training "
            f"is false, got {_shown(config.pickle_locations.SNN_weights)}; name a .pt file"
        )
    if config.SNN.head == "lmu" and config.SNN.neuron is not None:
        raise UserError(
            f"{path}: SNN.neuron: must be null where SNN.head is lmu, got {_shown(config.SNN.neuron)}; "
            "head spiking_lmu takes a neuron"
        )
    if config.SNN_trainer.end_to_end and config.SNN_trainer.import_CNN_forward_data:
        raise UserError(
            f"{path}: SNN_trainer.end_to_end: trains the CNN, whose outputs SNN_trainer.import_CNN_forward_data "
            "takes from the cache; both are true, set one to false"
        )


class _Object(dict):
    """A JSON object that remembers which keys it was given more than once."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


def _load(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file; configs/ holds some to start from") from error
    except OSError as error:
        raise UserError(f"{path}: the config file cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be UTF-8 text, got another byte at {error.start}; save it as UTF-8") from error
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets in brackets
        raise UserError(f"{path}: a number in it is too long, or it is nested too deeply; shorten it") from error


def _read_section(kind: type, section: object, path: Path, at: str):
    """A `kind` of what `section` holds; `at` is its dotted key, "" for the top level."""
    if not isinstance(section, _Object):
        place = f"{path}: {at}" if at else f"{path}"
        raise UserError(f"{place}: must be {_expected(kind)}, got {_shown(section)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    prefix = f"{at}." if at else ""
    for key in section:
        if key.startswith("_"):
            continue
        if key not in fields:
            raise UserError(f"{path}: {prefix}{_printable(key)}: unknown key; {_known(key, list(fields), at)}")
        if key in section.repeated:
            raise UserError(f"{path}: {prefix}{key}: given more than once; keep one of them")
    values = {}
    for key, field in fields.items():
        if key in section:
            values[key] = _read_value(hints[key], section[key], path, prefix + key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}: {prefix}{key}: missing; add it, {_expected(hints[key])}")
    return kind(**values)


def _read_value(hint, value: object, path: Path, key: str):
    if dataclasses.is_dataclass(hint):
        return _read_section(hint, value, path, key)
    if not any(_is_a(kind, value) for kind in _kinds(hint)):
        raise UserError(f"{path}: {key}: must be {_expected(hint)}, got {_shown(value)}")
    if value is not None and float in _kinds(hint):
        if not abs(value) <= sys.float_info.max:
            raise UserError(f"{path}: {key}: must be a finite number, got {_shown(value)}")
        value = float(value)
    if value is not None and key in _LEAST and not value >= _LEAST[key]:
        raise UserError(f"{path}: {key}: must be at least {_LEAST[key]}, got {_shown(value)}")
    return value


def _kinds(hint) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_a(kind, value: object) -> bool:
    # By exact type: to isinstance and ==, True is the number 1.
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    return type(value) is kind or (kind is float and type(value) is int)


def _expected(hint) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes", NoneType: "null"}
    parts = []
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            parts.append(f"one of {', '.join(str(choice) for choice in get_args(kind))}")
        elif dataclasses.is_dataclass(kind):
            parts.append(
                f"an object {{...}} with the keys {', '.join(field.name for field in dataclasses.fields(kind))}"
            )
        else:
            parts.append(words[kind])
    return " or ".join(parts)


def _known(key: str, known: list[str], at: str) -> str:
    """What to write in place of an unknown key."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), names, n=1)
    if close:
        return f"did you mean {at}{'.' if at else ''}{names[close[0]]}?"
    return f"{at or 'the top level'} has {', '.join(known)}"


def _printable(key: str) -> str:
    return key if key.isprintable() else ascii(key)


def _shown(value: object) -> str:
    """A value as JSON, in one line that stays short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
