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
        about, weights, same_classes = _of_state_dict(model, path, refusal)
    else:
        about, weights, same_classes = _of_run(model, settings, path, trained)
    fitted = fit_running(weights, model.state_dict())
    if not same_classes:
        weights |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not weights of the network that --model, --branches, --fusion, --downsample and --neuron name "
            f"({detail})",
            about="init",
        ) from error
    notes = "" if same_classes else "; the head is new: other classes"
    if fitted:
        each = settings["snn_batch_norm"] == "through-time"
        notes += f"; SNN batch norm: {'every time step starts' if each else 'starts'} from statistics of all steps"
    return f"network: starts from {path} ({about}){notes}"


def _of_run(model: Network, settings: dict, path: Path, trained: TrainedNetwork) -> tuple[str, dict[str, Tensor], bool]:
    """(what was taken, the weights, whether their head has the same classes)"""
    if trained.network != type(model).__name__:
        raise UserError(f"{path}: holds a {trained.network}, this run trains a {type(model).__name__}", about="init")
    for name, flag in _SHAPING.items():
        there, here = trained.settings.get(name), settings.get(name)
        if there != here:
            raise UserError(f"{path}: its --{flag} is {there}, this run has {here}", about="init")
    changed = [
        f"{name} {trained.settings.get(name)} there, {here} here" for name, here in settings.items()
        if name not in ("classes", "num_classes") and trained.settings.get(name) != here
    ]  # fmt: skip
    about = "; ".join([f"trained for {trained.epochs} epochs", *changed])
    return about, dict(trained.weights), trained.classes == settings["classes"]


def _of_state_dict(model: Network, path: Path, refusal: UserError) -> tuple[str, dict[str, Tensor], bool]:
    """As `_of_run`. refusal: why the file is no checkpoint of this project."""
    try:
        weights = {_WRAPPERS.sub("", name): value for name, value in read_state_dict(path).items()}
    except UserError:
        raise UserError(str(refusal), about="init") from refusal
    if weights.keys() & model.state_dict().keys():
        return "a state dict, without settings", weights, len(weights.get("head.bias", ())) == model.head.out_features
    if not isinstance(model, ReSpike):
        raise UserError(str(refusal), about="init") from refusal
    same_classes = len(weights.get("fc.bias", ())) == model.head.out_features
    if not same_classes:
        weights |= {f"fc.{name}": value for name, value in model.head.state_dict().items()}
    try:
        return "weights of the published code", rename_published_state_dict(weights, model), same_classes
    except UserError as error:
        raise UserError(f"{path}: {error}; weights of a ResNet alone go to --weights", about="init") from error
