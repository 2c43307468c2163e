"""Fine-tuning: a network that starts from the weights of another run."""

import re
from pathlib import Path

from torch import Tensor

from models.batch_norm import fit_running
from models.network import Network
from models.published_weights import rename_published_state_dict
from models.resnet import read_state_dict
from models.respike import ReSpike
from utils.errors import UserError
from utils.trained import TrainedNetwork, load_trained

_SHAPING = {"backbone": "model", "branches": "branches", "fusion": "fusion", "downsample": "downsample"}  # -> flag
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # before the names in a DistributedDataParallel, a compiled module


def initialise(model: Network, settings: dict, path: Path) -> str:
    """Fill `model` with the weights of another run. Returns a line that reports what was taken.

    settings: of the network, as the checkpoints of this run will hold them.
    path: a checkpoint, a .safetensors file, or a state dict of this network or of the published code, saved from
        DistributedDataParallel or torch.compile or not.

    The head stays as it is if the classes differ; a state dict names no classes, so their number decides. Statistics
    of batch norm that the time steps share, there or here only, are fitted (`fit_running`). Raises UserError if the
    network there has another backbone or variant.
    """
    try:
        trained = load_trained(path)
    except UserError as refusal:
        try:
            state_dict = read_state_dict(path)
        except UserError:
            raise UserError(str(refusal), about="init") from refusal
        state_dict = {_WRAPPERS.sub("", name): value for name, value in state_dict.items()}
        if state_dict.keys() & model.state_dict().keys():
            about, weights = "a state dict, without settings", state_dict
            same_classes = len(weights.get("head.bias", ())) == model.head.out_features
            fitted = fit_running(weights, model.state_dict())
        elif not isinstance(model, ReSpike):
            raise UserError(str(refusal), about="init") from refusal
        else:
            about = "weights of the published code"
            weights, same_classes = _from_published(model, state_dict, path)
            fitted = settings.get("snn_batch_norm") == "through-time"
    else:
        about, weights, same_classes = _from_run(trained, model, settings, path)
        fitted = fit_running(weights, model.state_dict())
    if not same_classes:
        weights |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not weights of the network that --model, --branches, --fusion and --downsample name ({detail})",
            about="init",
        ) from error
    notes = "" if same_classes else "; the head is new: other classes"
    if fitted:
        each = settings["snn_batch_norm"] == "through-time"
        notes += f"; SNN batch norm: {'every time step starts' if each else 'starts'} from statistics of all steps"
    return f"network: starts from {path} ({about}){notes}"


def _from_run(
    trained: TrainedNetwork, model: Network, settings: dict, path: Path
) -> tuple[str, dict[str, Tensor], bool]:  # fmt: skip
    """(what to report of it, its weights, whether its classes are the same). Raises UserError for another network."""
    if trained.network != type(model).__name__:
        raise UserError(f"{path}: holds a {trained.network}, this run trains a {type(model).__name__}", about="init")
    for name, flag in _SHAPING.items():
        if trained.settings.get(name) != settings.get(name):
            raise UserError(
                f"{path}: its --{flag} is {trained.settings.get(name)}, this run has {settings.get(name)}", about="init"
            )
    changed = [
        f"{name} {trained.settings.get(name)} there, {settings[name]} here" for name in settings
        if name not in ("classes", "num_classes") and trained.settings.get(name) != settings[name]
    ]  # fmt: skip
    about = "; ".join([f"trained for {trained.epochs} epochs", *changed])
    return about, dict(trained.weights), trained.classes == settings["classes"]


def _from_published(model: ReSpike, state_dict: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """(the weights under this project's names, whether they have a head of as many classes)"""
    own_head = {f"fc.{name}": value for name, value in model.head.state_dict().items()}
    same_classes = len(state_dict.get("fc.bias", ())) == model.head.out_features
    try:
        return rename_published_state_dict(state_dict if same_classes else state_dict | own_head, model), same_classes
    except UserError as error:
        raise UserError(f"{path}: {error}; weights of a ResNet alone go to --weights", about="init") from error
