"""A trained network as a file: read from a checkpoint or a .safetensors file, exported to the latter."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.checkpoint import EARLIER_FLAGS, EARLIER_SETTINGS, DamagedCheckpointError, load_checkpoint
from utils.errors import UserError
from utils.files import write_atomically, writing

SUFFIX = ".safetensors"
_ENTRY = "respike"  # of a .safetensors file's metadata


@dataclass(frozen=True)
class TrainedNetwork:
    """Weights, and how they were trained."""

    path: Path
    weights: dict[str, Tensor]
    settings: dict  # of the network
    flags: dict  # of the training script
    epochs: int  # that it was trained

    @property
    def network(self) -> str:
        """The class of the network: "ReSpike", or one of `models.baselines`."""
        return self.settings.get("network", "ReSpike")

    @property
    def classes(self) -> list[str]:
        return self.settings["classes"]

    @property
    def frames(self) -> int:
        """T, the frames of a clip."""
        return self.settings["T"]

    @property
    def stride(self) -> int:
        return self.settings["stride"]

    @property
    def residual(self) -> str:
        """What residual frames are taken from: `minus` of `dataset.residual.key_residual_split`."""
        return self.settings["residual"]

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.flags["size"]

    @property
    def sampling(self) -> str:
        """A name in `dataset.frame_sampling.SAMPLINGS`; the flag `frame_stride` belongs to it."""
        return self.flags["sampling"]

    @property
    def precision(self) -> str:
        """Of the training: "bfloat16", "float16" or "float32"; "not recorded" in older checkpoints."""
        return self.flags.get("precision", "not recorded")


def load_trained(path: Path) -> TrainedNetwork:
    """Read a checkpoint of either training script or a .safetensors file that `export` wrote. No code in it is run.
    A run folder stands for its best.pt.

    Raises UserError if it is absent, damaged or something else.
    """
    if path.is_dir():
        path = path / "best.pt"
    if path.suffix == SUFFIX:
        trained = _load_exported(path)
    else:
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as error:
            raise UserError(
                f"{path}: not a readable checkpoint ({type(error.__cause__).__name__}); best.pt, last.pt, or a "
                f"{SUFFIX} file of evaluate.py --export is expected"
            ) from error
        try:
            trained = TrainedNetwork(
                path, state["model"], EARLIER_SETTINGS | state["model_settings"], EARLIER_FLAGS | state["flags"],
                # best.pt is written at the end of its epoch, when the position is that of the next one.
                state["position"]["epoch"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a whole checkpoint of this project ({type(error).__name__}: {error})"
            ) from error
    for name, value in trained.weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: its weights {name} are not all finite; take an earlier checkpoint")
    return trained


def _load_exported(path: Path) -> TrainedNetwork:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable .safetensors file, it is damaged or was cut off ({error})") from error
    if not {"settings", "flags", "epochs"} <= set(about):
        raise UserError(f"{path}: a .safetensors file without the settings of this project; export it with evaluate.py")
    return TrainedNetwork(path, weights, about["settings"], about["flags"], about["epochs"])


def check_suffix(path: Path) -> None:
    """Raise UserError if `export` would refuse the name of the file: it is better known before a test."""
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: the name of the exported file must end in {SUFFIX}", about="export")


def export(trained: TrainedNetwork, path: Path) -> None:
    """Write weights and settings, without the optimizer, to a .safetensors file. Raises UserError."""
    check_suffix(path)
    about = {"settings": trained.settings, "flags": trained.flags, "epochs": trained.epochs}
    weights = {name: value.contiguous() for name, value in trained.weights.items()}
    with writing(path):
        write_atomically(path, save(weights, {"format": "pt", _ENTRY: json.dumps(about, default=str)}))
