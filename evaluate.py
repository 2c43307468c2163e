"""Test the network of a checkpoint: accuracy, confusion, calibration, and the energy of a clip.

    python evaluate.py runs/demo --energy
    python evaluate.py runs/hmdb1 runs/hmdb2 runs/hmdb3 --split all --views 10 --crops 3
    torchrun --nproc-per-node 8 evaluate.py runs/kinetics/best.pt --views 10 --crops 3

The checkpoint holds how clips are cut and where its videos are. Flags change the protocol, the place of the data and
the machine. The videos are found and read by the code of the training script that wrote the checkpoint.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import argparse
import contextlib
import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import train_fusion
import train_kinetics
from dataset.device_loader import DeviceLoader
from dataset.transforms import CROP_POSITIONS
from models import Network, network_of
from models.neurons import BACKENDS, runs_on_triton
from utils.device import choose_algorithms, choose_precision
from utils.energy import (
    Constants,
    SpikeMeter,
    baselines,
    count_memory,
    count_operations,
    energy_report,
    format_report,
    own_neurons,
    spike_statistics,
)
from utils.errors import ArgumentParser, UserError
from utils.figures import save_figure
from utils.files import write_atomically, writing
from utils.pictures.predictions import calibration_figure, confusion_figure
from utils.run_folder import described_code
from utils.runtime import Runtime, join_run
from utils.script import run_script
from utils.trained import TrainedNetwork, check_suffix, export, load_trained
from utils.training.engine import evaluate
from utils.training.flags import number, of_this_machine, whole
from utils.training.metrics import VideoScores
from utils.training.precise_bn import measure_statistics
from utils.training.report import calibration, confusion, per_class, write_confusion, write_predictions

# Flags that replace what the checkpoint's run was given, each only if its training script has it.
_DATA_FLAGS = (
    "data_root", "annotation_path", "split", "val_list", "val_root", "views", "crops", "batch_size", "workers",
    "index_dir", "strict", "amp", "lif_backend", "device", "train_list", "train_root",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Test the network of a checkpoint on the videos of its run, or on others.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a checkpoint, a .safetensors file, or a "
        "run folder for its best.pt; with --split all, one of each split")  # fmt: skip
    # fmt: off
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data; not given: as in the checkpoint's run").add_argument
    add("--data-root", metavar="FOLDER", help="folder of the videos; of the demo, the one with videos/ and splits/")
    add("--annotation-path", metavar="FOLDER", help="folder of the split files (HMDB-51, UCF-101)")
    add("--split", choices=("1", "2", "3", "all"), help="official split; all: mean and deviation over three runs")
    add("--val-list", metavar="FILE", help="list of the videos to test on (Kinetics-400, lists)")
    add("--val-root", metavar="FOLDER", help="folder that its paths start from")
    add("--views", type=whole(1), metavar="N", help="clips a video, evenly spread; their softmax is averaged")
    add("--crops", type=int, choices=sorted(CROP_POSITIONS), help="crops a view")
    add("--strict", action=yes_no, help="stop at a video that cannot be read")
    add("--precise-bn", type=whole(0), default=0, metavar="N",
        help="first measure batch norm's mean and variance anew on N training clips of the checkpoint's run")
    add("--train-list", metavar="FILE", help="list of these training clips (Kinetics-400, lists)")
    add("--train-root", metavar="FOLDER", help="folder that its paths start from")
    add = parser.add_argument_group("how it is computed").add_argument
    add("-b", "--batch_size", "--batch-size", type=whole(1), metavar="N", help="clips a batch and process")
    add("-j", "--workers", type=whole(0), metavar="N", help="data loading processes of each process")
    add("--index-dir", metavar="FOLDER", help="folder of the cached video index")
    add("--amp", action=yes_no, help="mixed precision")
    add("--lif-backend", choices=BACKENDS, help="code of the spiking layers")
    add("--device", metavar="NAME", help="cuda, cuda:1 or cpu; not given: cuda if there is a GPU")
    add = parser.add_argument_group("energy").add_argument
    add("--energy", action="store_true", help="count the operations of the clips tested, and estimate their energy")
    add("--mac-pj", type=number(0.001), default=Constants.mac_pj, metavar="PJ", help="picojoule a multiply-add")
    add("--ac-pj", type=number(0.001), default=Constants.ac_pj, metavar="PJ", help="picojoule an accumulate")
    add("--baseline", nargs="+", default=[], metavar="CHECKPOINT",
        help="other runs, for example with --branches frames: tested on the same videos and counted alike")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="FOLDER", help="folder of evaluation.json and the other files; not given: the checkpoint's")
    add("--export", metavar="FILE.safetensors", help="write weights and settings to this file, and test nothing; with "
        "--precise-bn, test the network and write the weights with the measured statistics")
    # fmt: on
    args = parser.parse_args()
    if args.export is not None:
        check_suffix(Path(args.export))
        given = [name for name in (*_DATA_FLAGS, "out") if getattr(args, name) is not None]
        if args.energy or len(args.checkpoints) > 1 or (given and not args.precise_bn):
            raise UserError("--export: writes one network and tests nothing; give one checkpoint, and no other flag")
    if not args.precise_bn and (args.train_list or args.train_root):
        raise UserError("--train-list, --train-root: name training clips, which only --precise-bn N looks at")
    if args.split == "all" and len(args.checkpoints) != 3:
        raise UserError(f"--split all: expected the runs of splits 1, 2 and 3, got {len(args.checkpoints)} checkpoints")
    if args.split != "all" and len(args.checkpoints) != 1:
        raise UserError("several checkpoints are the runs of the three splits: give --split all, or one checkpoint")
    if args.baseline and not args.energy:
        raise UserError("--baseline: a network to compare the energy with; it goes with --energy")
    return args


def main() -> int:
    args = parse_args()
    if args.export is not None and not args.precise_bn:
        trained = load_trained(Path(args.checkpoints[0]))
        export(trained, Path(args.export))
        print(f"{args.export}: weights and settings of {trained.path}, {len(trained.weights)} tensors")
        return 0
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    runtime = join_run(device, amp=True)
    if args.split != "all":
        test_run(args, args.checkpoints[0], args.out, runtime)
        return 0
    runs = runtime.in_all(runs_by_split, args.checkpoints)
    results = {}
    for split, path in sorted(runs.items()):
        args.split = split
        results[split] = test_run(args, path, None if args.out is None else f"{args.out}/split{split}", runtime)
    runtime.from_main(report_splits, results, args.out)
    return 0


def runs_by_split(checkpoints: list[str]) -> dict[int, str]:
    runs = {load_trained(Path(path)).flags.get("split"): path for path in checkpoints}
    if set(runs) != {1, 2, 3}:
        raise UserError(f"--split all: expected one run of each of the splits 1, 2 and 3, got those of {list(runs)}")
    return runs


def test_run(args: argparse.Namespace, path: str, out: str | None, runtime: Runtime) -> dict:
    """Test one network and write what came out into the folder `out`. Returns the content of evaluation.json."""
    trained = runtime.in_all(load_trained, Path(path))
    runtime.in_all(check_flags, args, trained)
    others = [runtime.in_all(load_trained, Path(other)) for other in args.baseline]
    folder = Path(out or trained.path.parent)
    runtime.from_main(_make, folder)
    print(f"network: {trained.path}, trained for {trained.epochs} epochs")
    tested = test_network(args, trained, runtime)
    result = tested.result
    if args.energy:
        result["energy"] = energy(args, tested, others, runtime)
    runtime.from_main(write_all, folder, tested, result)
    runtime.from_main(print_result, result, folder)
    if args.export is not None:
        measured = {name: value.cpu() for name, value in tested.model.state_dict().items()}
        runtime.from_main(export, replace(trained, weights=measured), Path(args.export))
        print(f"{args.export}: weights and settings of {trained.path}, with the measured statistics")
    return result


# ---- one network on its videos ------------------------------------------------------------------------


@dataclass
class Tested:
    trained: TrainedNetwork
    model: Network
    result: dict  # for evaluation.json
    labels: Tensor  # int64 [videos]; -1: could not be read
    probabilities: Tensor  # float64 [videos, classes]
    paths: list[str]  # of the videos
    meter: SpikeMeter | None


def check_flags(args: argparse.Namespace, trained: TrainedNetwork) -> None:
    """Raise UserError for a flag that has no part in the tested network."""
    if args.precise_bn and not can_be_measured(trained):
        raise UserError(f"{trained.path} has no batch norm to measure: it is torchvision's, or frozen", "precise_bn")
    if args.lif_backend and trained.network == "VideoResNet":
        raise UserError(f"has no part in the network of {trained.path}; leave it out", "lif_backend")


def can_be_measured(trained: TrainedNetwork) -> bool:
    """Whether the network has batch norm that --precise-bn measures."""
    is_frozen = trained.flags.get("freeze") == "ann" and trained.settings.get("branches") == "ann"
    return trained.network != "VideoResNet" and not is_frozen


def run_flags(args: argparse.Namespace, trained: TrainedNetwork) -> argparse.Namespace:
    """The flags of the checkpoint's run, with those that were given now in their place."""
    script = script_of(trained)
    # What the run's own evaluations measured is in the checkpoint: only what is asked for now is measured. No epoch is
    # trained.
    precise_bn = args.precise_bn if can_be_measured(trained) else 0
    own = {"workers": None, "index_dir": None, "device": None, "precise_bn": precise_bn, "epochs": 0}
    flags = {**script.DEFAULTS, **trained.flags, **own, "test_only": not precise_bn}
    given = {name: getattr(args, name) for name in _DATA_FLAGS if getattr(args, name) is not None}
    for name in given:
        if name not in flags:
            raise UserError(
                f"--{name.replace('_', '-')}: not a flag of {script.__name__}.py, which wrote {trained.path}"
            )
    if "data_root" in given and "val_root" in flags:
        flags["val_root"] = flags["train_root"] = None  # a root for both lists
    if "split" in given:
        given["split"] = int(given["split"])
    return of_this_machine(argparse.Namespace(**(flags | given)))


def script_of(trained: TrainedNetwork) -> ModuleType:
    """The training script that wrote the checkpoint: it knows where the videos are and how they are read."""
    return train_fusion if trained.flags["dset"] in train_fusion.DATA_SETS else train_kinetics


def test_network(args: argparse.Namespace, trained: TrainedNetwork, runtime: Runtime) -> Tested:
    script, flags = script_of(trained), runtime.in_all(run_flags, args, trained)
    choose_algorithms(flags.deterministic)
    runtime = replace(runtime, precision=choose_precision(runtime.device, flags.amp))
    runtime.in_all(runs_on_triton, flags.lif_backend, torch.empty(0, device=runtime.device))  # refused if it cannot
    arguments = (flags, None) if script is train_fusion else (flags, None, trained)
    classes, *tables = runtime.from_main(script.find_videos, *arguments)
    runtime.in_all(_check_classes, classes, trained)
    data = runtime.in_all(script.load_data, flags, *tables, runtime, None)
    model = runtime.in_all(network_of, trained, flags.lif_backend)
    model = model.to(runtime.device, memory_format=model.memory_format)
    measured = {}
    if flags.precise_bn:
        if flags.freeze == "ann":
            model.freeze_ann()
        measured = measure(model, data.train_loader, trained.epochs, flags.precise_bn, runtime)
    videos = data.test_loader.videos
    scores = VideoScores(len(videos), runtime.device)
    meter = SpikeMeter(model) if args.energy else None
    with meter or contextlib.nullcontext():
        scored = evaluate(model, data.test_loader, runtime, videos=scores)
    places = {name: vars(flags)[name] for name in ("dset", "split", "val_list", "data_root") if name in flags}
    computed = {"lif_backend": flags.lif_backend, **runtime.described()}
    result = {
        "checkpoint": str(trained.path), "epochs": trained.epochs, "network": trained.settings,
        "protocol": places | data.protocol | computed | measured, **scored, **described_code(),
    }  # fmt: skip
    paths = [videos.path(number) for number in range(len(videos))]
    return Tested(trained, model, result, *scores.of_all_ranks(runtime, len(classes)), paths, meter)


def measure(model: Network, loader: DeviceLoader, epochs: int, clips: int, runtime: Runtime) -> dict:
    """`measure_statistics` on clips of the last of the epochs, as --precise-bn measures in training."""
    measured = measure_statistics(model, loader, runtime, epoch=max(0, epochs - 1), clips=clips)
    print("batch norm: measured on {precise_bn_clips} training clips in {precise_bn_seconds:.1f} s".format(**measured))
    return measured


def _check_classes(classes: list[str], trained: TrainedNetwork) -> None:
    if classes != trained.classes:
        raise UserError(f"{trained.path}: was trained on other classes than those of the videos; name its own data set")


# ---- energy -------------------------------------------------------------------------------------------


def energy(args: argparse.Namespace, tested: Tested, networks: list[TrainedNetwork], runtime: Runtime) -> dict:
    """The energy of a clip of the tested network, beside that of other networks. `networks` are tested too."""
    constants, trained = Constants(args.mac_pj, args.ac_pj), tested.trained
    clip = (trained.frames, trained.size)
    others = baselines(tested.model, *clip, len(trained.classes), constants)
    for path, network in zip(args.baseline, networks, strict=True):
        print(f"baseline: {network.path}, trained for {network.epochs} epochs")
        other = test_network(args, network, runtime)
        report = network_energy(other, constants, runtime)
        others[str(path)] = {
            "macs": sum(part["operations"] for part in report["parts"].values() if part["kind"] == "mac"),
            "mj": report["total_mj"], "memory_mj": report["memory"]["mj"]["total"],
            "video_top1": other.result["video_top1"],
        }  # fmt: skip
    report = network_energy(tested, constants, runtime, others)
    protocol = tested.result["protocol"]
    return report | {"video_mj": report["total_mj"] * protocol["views"] * protocol["crops"]}


def network_energy(tested: Tested, constants: Constants, runtime: Runtime, others: dict | None = None) -> dict:
    clip = (tested.trained.frames, tested.trained.size)
    spikes = spike_statistics(runtime.sum(runtime.in_all(tested.meter.sums)), tested.meter.layers)
    return energy_report(
        count_operations(tested.model, *clip),
        spikes,
        constants,
        count_memory(tested.model, *clip),
        others,
        own_neurons(tested.model),
    )


# ---- what is written and printed ----------------------------------------------------------------------


_ELSEWHERE = "; name a writable folder with --out"


def _make(folder: Path) -> None:
    """Make the folder. Raises UserError if it cannot take a file: it is better known before hours of testing."""
    with writing(folder, _ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_all(folder: Path, tested: Tested, result: dict) -> None:
    """evaluation.json and the files beside it. Adds to `result` what the predictions show."""
    seen = tested.labels >= 0
    labels, probabilities = tested.labels[seen], tested.probabilities[seen]
    confidence, predicted = probabilities.max(1)
    classes = tested.trained.classes
    matrix = confusion(labels, predicted, len(classes))
    by_confidence, result["calibration_error"] = calibration(confidence, predicted == labels)
    result["per_class"] = per_class(matrix, classes)
    paths = [path for path, is_seen in zip(tested.paths, seen.tolist(), strict=True) if is_seen]
    write_predictions(folder / "predictions.csv", paths, labels, probabilities, classes)
    write_confusion(folder / "confusion.csv", matrix, classes)
    with writing(folder, _ELSEWHERE):
        write_atomically(folder / "evaluation.json", (json.dumps(result, indent=2, default=str) + "\n").encode())
    save_figure(folder / "confusion.png", confusion_figure(matrix, classes))
    save_figure(folder / "calibration.png", calibration_figure(by_confidence, result["calibration_error"]))


def print_result(result: dict, folder: Path) -> None:
    if "energy" in result:
        print(format_report(result["energy"]), end="\n\n")
        for name, other in result["energy"]["baselines"].items():
            if "video_top1" in other:
                print(f"{name}: video top-1 {other['video_top1']:.2f} %")
        print(f"a video of {result['protocol']['views']} x {result['protocol']['crops']} clips: "
              f"{result['energy']['video_mj']:.1f} mJ")  # fmt: skip
    worst = sorted(result["per_class"].items(), key=lambda item: item[1]["top1"])[:5]
    print("lowest classes: " + ", ".join(f"{name} {of['top1']:.0f} %" for name, of in worst))
    print(f"expected calibration error {result['calibration_error']:.1f} %")
    counts = result["counts"]
    print(
        f"clip top-1 {result['clip_top1']:.2f} %, video top-1 {result['video_top1']:.2f} % "
        f"({counts['video_top1']} of {counts['videos']}), top-5 {result['video_top5']:.2f} %; files in {folder}"
    )


def report_splits(results: dict[int, dict], out: str | None) -> None:
    """Mean and standard deviation over the three splits: printed, and in splits.json of the folder `out`."""
    summary = {}
    for name in ("clip_top1", "video_top1", "video_top5"):
        values = [result[name] for result in results.values()]
        summary[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values), "splits": values}
        print(f"{name} over three splits: {summary[name]['mean']:.2f} +- {summary[name]['std']:.2f} %")
    if out is not None:
        with writing(out):
            write_atomically(Path(out) / "splits.json", (json.dumps(summary, indent=2) + "\n").encode())


if __name__ == "__main__":
    run_script(main)
