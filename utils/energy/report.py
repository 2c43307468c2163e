"""Energy of a network for one clip, made of its operations, its spikes and its memory.

The energy is arithmetic only: an estimate, not a measurement. The role of a layer decides if it costs multiply-adds
(MACs) or accumulates (ACs), never its values: a layer in which nothing fires is still a spiking layer. What others
publish is firing rate times dense MACs. It also pays for targets in the padding, and takes the spikes at a border for
as many as those inside.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torchvision

from models import ReSpike
from utils.energy.calls import calls_of, plain
from utils.energy.memory import memory_of
from utils.energy.operations import FILM, operations_of

NOTE = "arithmetic only, an estimate, not a measurement"
COUNTED_AS_ZERO = {
    "batch norm": "running statistics at inference: folds into the convolution before it, which has a set of weights "
    "for each time step if the steps have statistics of their own (--snn-bn through-time; memory counts the sets)",
    "bias": "one addition for each output of hundreds of multiply-adds",
    "layer and group norm, softmax, GELU and its gate": "no products with weights; at most 0.6 mJ in all",
    "residual additions, pooling, upsampling": "no products with weights; within the same 0.6 mJ",
    "decoding, resizing and subtracting frames": "before the network; the same for every network that reads them",
}
OWN_NEURON = "what its equations multiply more than LIF does is not counted: an update is paid for as one of LIF"
RATE_TIMES_DENSE = "firing rate x dense MACs, as most papers publish it: pays for targets in the padding"
_VIDEO_NETWORKS = ("r3d_18", "mc3_18", "r2plus1d_18")


@dataclass(frozen=True)
class Constants:
    """Energy in picojoule of float32 at 45 nm: M. Horowitz, "Computing's energy problem (and what we can do about
    it)", ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.

    The second line, memory, is a simple model with the same rules for every network: every weight is read once a clip
    from DRAM; for every image and time step, a layer reads its weights and its input from on-chip memory and writes
    its output there once. A value has 32 bits and a spike 1. A neuron reads its current, and reads and writes its
    membrane.
    """

    mac_pj: float = 4.6  # a multiplication, 3.7, and an addition, 0.9
    ac_pj: float = 0.9  # an addition
    sram_64bit_pj: float = 100.0  # an access to a cache of 1 MB (8 KB: 10, 32 KB: 20)
    dram_64bit_pj: float = 1300.0  # the lower end of 1300 to 2600

    @property
    def neuron_step_pj(self) -> float:
        """v/4 + 3x/4 is a MAC (3/4 folds into batch norm); the comparison with the threshold counts as an addition."""
        return self.mac_pj + self.ac_pj

    def memory_mj(self, bits: dict[str, int]) -> dict[str, float]:
        """The result of `count_memory` as energy; the last item is the total."""
        pj_a_bit = {"sram": self.sram_64bit_pj / 64, "dram": self.dram_64bit_pj / 64}
        mj = {name: 1e-9 * count * pj_a_bit[name.rpartition(".")[2]] for name, count in bits.items()}
        return {**mj, "total": sum(mj.values())}


def energy_report(
    counts: dict[str, int],
    spikes: dict,
    constants: Constants = Constants(),
    memory: dict[str, int] | None = None,
    others: dict[str, dict] | None = None,
    neurons: Sequence[str] = (),
) -> dict:
    """Energy of a ReSpike for one clip, in mJ, for evaluation.json.

    counts: `count_operations` of it. spikes: `spike_statistics`. memory: `count_memory` of it. others: `baselines`.
    neurons: `own_neurons` of it. They are paid for as LIF, and named in the report.
    """
    parts: dict[str, dict] = {}
    for part, count in counts.items():
        if row := _row(part):
            kind = {"neuron_updates": "mac+ac"}.get(row, "mac")
            parts.setdefault(row, {"operations": 0, "kind": kind, "mj": 0.0})["operations"] += count
    layers = spikes["layers"]
    if layers:
        parts["spiking_convs"] = {"operations": spikes["mean"], "kind": "ac", "mj": 0.0}
    parts = {row: parts[row] for row in sorted(parts, key=_place)}
    pj = {"mac": constants.mac_pj, "ac": constants.ac_pj, "mac+ac": constants.neuron_step_pj}
    for part in parts.values():
        part["mj"] = 1e-9 * part["operations"] * pj[part["kind"]]
    total = sum(part["mj"] for part in parts.values())
    spiking_mj = parts["spiking_convs"]["mj"] if "spiking_convs" in parts else 0.0
    report = {
        "note": NOTE,
        "constants": asdict(constants),
        "parts": parts,
        "spikes": {
            "clips": spikes["clips"], "accumulates_mean": spikes["mean"], "accumulates_std": spikes["std"],
            "accumulates": {name: layer["mean"] for name, layer in layers.items()},
            "firing_rates": {name: layer["rate"] for name, layer in layers.items()},
            "mj": spiking_mj,
            "rate_x_dense_mj": 1e-9 * constants.ac_pj * sum(row["rate"] * row["dense"] for row in layers.values()),
            "rate_x_dense_is": RATE_TIMES_DENSE,
        },
        "counted_as_zero": COUNTED_AS_ZERO | {f"neuron {name}": OWN_NEURON for name in neurons},
        "total_mj": total,
        "total_mj_std": 1e-9 * constants.ac_pj * spikes["std"],
    }  # fmt: skip
    if memory is not None:
        note = "estimate: see utils.energy.Constants"
        report["memory"] = {"note": note, "bits": memory, "mj": constants.memory_mj(memory)}
    if others is not None:
        report["baselines"] = others
        rest = total - spiking_mj
        if_all_fire = 1e-9 * constants.ac_pj * counts.get("snn.spiking_convs.dense_existing", 0) or math.nan
        rates = {name: (other["mj"] - rest) / if_all_fire for name, other in others.items()}
        report["break_even_rate"] = {name: rate if 0 <= rate <= 1 else None for name, rate in rates.items()}
    return report


_ROWS = ("resnet", "snn_stem", "spiking_convs", "shortcuts", "neuron_updates", "fusion", "head")


def _place(row: str) -> tuple:
    first = row.partition(".")[0]
    return (_ROWS.index(first) if first in _ROWS else len(_ROWS), row)


def _row(part: str) -> str | None:
    """The row of the report for a part of `count_operations`; None if the part is not paid for, or by its spikes."""
    match part.split("."):
        case ["total" | "folded" | "other" | "published_code_adds", *_] | ["snn", "spiking_convs", _]:
            return None
        case ["ann", _]:
            return "resnet"
        case ["snn", "stem"]:
            return "snn_stem"
        case ["snn", "shortcut", _]:
            return "shortcuts"
        case ["snn", "lif_neuron_steps"]:
            return "neuron_updates"
        case ["fusion", stage, name]:
            if name in FILM.values():
                return part
            if name.endswith(("_qk", "_av")):
                return f"fusion.{stage}.attention"
            return f"fusion.{stage}.{'feed_forward' if name == 'feed_forward' else 'projections'}"
    return part


def baselines(
    model: ReSpike, clip_frames: int, size: int, num_classes: int, constants: Constants = Constants()
) -> dict[str, dict]:
    """Other networks on the same clip, counted alike: name -> {"macs", "mj", "memory_mj"}.

    ResNets take each frame alone. respike_relu is `model` with ReLU for its neurons: every convolution of spikes is
    then a dense one. Names of video networks end in their size in pixels.
    """

    def entry(macs: int, memory: dict[str, int]) -> dict:
        return {"macs": macs, "mj": 1e-9 * constants.mac_pj * macs, "memory_mj": constants.memory_mj(memory)["total"]}

    model = plain(model)
    shares = {"all": clip_frames, "key": clip_frames // model.stride} if model.stride > 1 else {"all": clip_frames}
    runs = {
        f"{name}_{which}_frames": (name, frames, size)
        for name in ("resnet18", "resnet50")
        for which, frames in shares.items()
    } | {f"{name}_{pixels}": (name, clip_frames, pixels) for name in _VIDEO_NETWORKS for pixels in (112, 224)}
    entries = {}
    for key, (name, *clip) in runs.items():
        with torch.device("meta"):
            network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        calls = calls_of(network, *clip)
        entries[key] = entry(operations_of(network, calls)["total.macs"], memory_of(network, calls))
    if model.snn is not None:
        calls = calls_of(model, clip_frames, size)
        counts = operations_of(model, calls)
        relu_macs = counts["total.macs"] + counts["snn.spiking_convs.dense"]
        entries["respike_relu"] = entry(relu_macs, memory_of(model, calls, spiking=False))
    return entries
