"""Energy of a clip at the published sizes beside other networks: arithmetic only, an estimate, not a measurement.

    python -m experiments.energy                                  # neurons that fire evenly at 5, 10 and 20 %
    python -m experiments.energy --rates runs/x/evaluation.json   # and at the rates that evaluate.py --energy counted

Prints Markdown. A clip has 16 frames of 224 x 224 pixels. Firing rates are of neurons and time steps, the same all over
a layer; so the accumulates are the rate times those of a layer in which every neuron fires (targets in the padding
are not among them). --rates takes an evaluation.json, or a checkpoint or run folder beside which there is one.
"""

import json
import sys
from pathlib import Path

import torch

from models import ReSpike
from utils.energy import assumed_spikes, baselines, count_memory, count_operations, energy_report
from utils.energy.report import NOTE
from utils.errors import ArgumentParser, UserError

CLIP_FRAMES, SIZE, CLASSES = 16, 224, 51
RATES = (0.05, 0.1, 0.2)
OTHERS = ("all_frames", "r2plus1d_18_224", "r2plus1d_18_112", "respike_relu")
VERDICTS = [f"less than {name}" for name in ("ResNet on all frames", *OTHERS[1:])]


def main() -> int:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help="evaluation.json, or a checkpoint or folder beside it"
    )
    rates = {f"{100 * rate:.0f} %": rate for rate in RATES}
    try:
        path = parser.parse_args().rates
        if path is not None:
            rates["counted"] = counted_rates(path)
        print("\n".join(table(rates)))
    except UserError as error:
        print(f"energy: error: {error}", file=sys.stderr)
        return 2
    return 0


def counted_rates(path: Path) -> dict[str, float]:
    """Firing rate of each layer that an evaluation.json holds. Raises UserError if there is none."""
    if path.suffix != ".json":
        path = (path if path.is_dir() else path.parent) / "evaluation.json"
    try:
        return json.loads(path.read_text())["energy"]["spikes"]["firing_rates"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--rates {path}: expected the firing rates that evaluate.py CHECKPOINT --energy writes ({error!r})"
        ) from error


def table(rates: dict[str, float | dict[str, float]]) -> list[str]:
    """Lines of Markdown: a table of ReSpike, then one of the baselines."""
    lines = [f"mJ of a clip ({NOTE})", ""]
    columns = ["ReSpike", "spikes at", "ResNet", "fusion", "spikes", "rest", "total", "memory", *VERDICTS]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    others = {}
    for backbone in ("resnet18", "resnet50"):
        for stride in (4, 2):
            for downsample in (True, False):
                with torch.device("meta"):
                    model = ReSpike(backbone, CLASSES, stride, downsample)
                shape = (model, CLIP_FRAMES, SIZE)
                counts, memory = count_operations(*shape), count_memory(*shape)
                others[stride] = baselines(*shape, CLASSES)
                name = f"{backbone}, stride {stride}, {'downsample' if downsample else 'full'}"
                for label, rate in rates.items():
                    report = energy_report(counts, assumed_spikes(*shape, rate), memory=memory)
                    lines.append(row(name, label, report, others[stride], backbone))
    lines += ["", "| baseline | MACs | mJ | memory, mJ |", "|---|---|---|---|"]
    for stride, networks in others.items():
        for name, other in networks.items():
            per_stride = name.endswith("key_frames")
            if name != "respike_relu" and (per_stride or stride == 4):
                suffix = f", stride {stride}" if per_stride else ""
                lines.append(f"| {name}{suffix} | {other['macs']:,} | {other['mj']:.1f} | {other['memory_mj']:.1f} |")
    return lines


def row(name: str, label: str, report: dict, others: dict[str, dict], backbone: str) -> str:
    parts, total = report["parts"], report["total_mj"]
    resnet, spikes = parts["resnet"]["mj"], parts["spiking_convs"]["mj"]
    fusion = sum(part["mj"] for part_name, part in parts.items() if part_name.startswith("fusion."))
    mj = [resnet, fusion, spikes, total - resnet - fusion - spikes, total, report["memory"]["mj"]["total"]]
    verdicts = []
    for other in (f"{backbone}_all_frames", *OTHERS[1:]):
        times = others[other]["mj"] / total
        verdicts.append(f"{'yes' if times > 1 else 'no'}, {times:.2f}x")
    return f"| {' | '.join([name, label, *(f'{value:.1f}' for value in mj), *verdicts])} |"


if __name__ == "__main__":
    sys.exit(main())
