"""The networks to compare with, trained, tested and asked as ReSpike is."""

import json

import pytest

import evaluate
import predict
import train_fusion
import train_kinetics
from models import FramesResNet, ReSpike, VideoResNet, load_network
from tests.helpers.script import all_metrics, comparable, metrics, refused, run_here, run_main, same_weights
from utils.checkpoint import load_checkpoint
from utils.energy import count_operations
from utils.errors import UserError

COMMON = {"--weights": "none", "-T": 3, "--size": 32, "-b": 8, "-j": 0, "--seed": 3, "-lr": 0.01}
NETWORKS = {"frames": {"--branches": "frames"}, "video": {"--model": "r3d_18"}}


@pytest.fixture(scope="module", params=NETWORKS)
def run(request, tiny_lists, tmp_path_factory):
    """(name, run folder, flags) of a finished run of two epochs of train_kinetics.py."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = COMMON | tiny_lists | NETWORKS[request.param] | {"--index-dir": folder / "index", "--no-flip": None}
    run_main(flags | {"--epochs": 2, "--run-dir": folder / "run"}, train_kinetics)
    return request.param, folder / "run", flags


def test_its_checkpoint_names_it(run):
    name, folder, _ = run
    model = load_network(folder)
    assert type(model) is {"frames": FramesResNet, "video": VideoResNet}[name]
    assert model.trained.frames == 3 and model.trained.stride == 1
    with pytest.raises(UserError, match="expected a ReSpike"):
        ReSpike.from_checkpoint(folder)
    closing = all_metrics(folder)[-1]["energy"]
    macs = sum(part["operations"] for part in closing["parts"].values())
    assert macs == count_operations(model, 3, 32)["total.macs"] and "spiking_convs" not in closing["parts"]
    assert closing["total_mj"] == pytest.approx(4.6e-9 * macs)


def test_stopped_in_mid_epoch_and_resumed_to_the_bit(monkeypatch, capfd, run, tmp_path):
    _, folder, flags = run
    parts = flags | {"--run-dir": tmp_path / "parts", "--resume": "auto", "--epochs": 2, "--no-energy": None}
    calls = iter([False] * 3 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr("utils.signals.StopRequest.requested", lambda self: next(calls))
        assert run_here(patch, capfd, parts, train_kinetics)[0] == 0
    assert load_checkpoint(tmp_path / "parts/last.pt")["position"]["clips"] > 0
    assert run_here(monkeypatch, capfd, parts, train_kinetics)[0] == 0
    assert comparable(tmp_path / "parts") == comparable(folder) and same_weights(tmp_path / "parts", folder)


def test_film_stopped_in_mid_epoch_and_resumed_to_the_bit(monkeypatch, capfd, tiny_lists, tmp_path):
    flags = COMMON | tiny_lists | {"-T": 2, "--stride": 2, "--fusion": "film", "--downsample": None, "--epochs": 1}
    flags |= {"--index-dir": tmp_path / "index", "--no-energy": None, "--resume": "auto"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here(monkeypatch, capfd, flags | {"--run-dir": whole}, train_kinetics)[0] == 0
    calls = iter([False] + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr("utils.signals.StopRequest.requested", lambda self: next(calls))
        assert run_here(patch, capfd, flags | {"--run-dir": parts}, train_kinetics)[0] == 0
    assert 0 < load_checkpoint(parts / "last.pt")["position"]["clips"] < 24
    assert run_here(monkeypatch, capfd, flags | {"--run-dir": parts}, train_kinetics)[0] == 0
    assert comparable(parts) == comparable(whole) and same_weights(parts, whole)


def test_evaluated_and_asked(monkeypatch, capfd, run, tiny_demo, tmp_path):
    name, folder, flags = run
    arguments = {str(folder): None, "--out": tmp_path, "--index-dir": flags["--index-dir"], "--energy": None, "-j": 0}
    status, _, err = run_here(monkeypatch, capfd, arguments, evaluate)
    assert status == 0, err
    result = json.loads((tmp_path / "evaluation.json").read_text())
    best = max(metrics(folder), key=lambda line: line["video_top1"])
    assert result["counts"] == best["counts"] and result["energy"]["baselines"]["r3d_18_112"]["macs"] > 0
    if name == "video":
        for flag, value in (("--precise-bn", 8), ("--lif-backend", "reference")):
            refused(
                monkeypatch, capfd, arguments | {flag: value}, rf"{flag} .* leave it out|it is torchvision's", evaluate
            )
    video = next(tiny_demo[0].glob("*/*.avi"))
    status, out, err = run_here(monkeypatch, capfd, {str(folder): None, str(video): None, "--json": None}, predict)
    assert status == 0 and len(json.loads(out)["top5"]) == 5, err
    for flag in ({"--stream": video}, {str(video): None, "--save": tmp_path}):
        name = next(key for key in flag if key.startswith("--"))
        refused(
            monkeypatch, capfd, {str(folder): None} | flag, rf"{name}: predicts frame by frame; a \w+ResNet", predict
        )


@pytest.mark.parametrize(
    "flags",
    [
        {"--fusion": "film"}, {"--snn-bn": "merged"}, {"--neuron": "lif"}, {"--residual": "key"}, {"--stride": 4},
        {"--downsample": None}, {"--no-downsample": None}, {"--tau": 2}, {"--surrogate": "atan"}, {"--alpha": 2},
        {"--freeze": "ann"}, {"--no-pack-spikes": None},
    ],
    ids=str,
)  # fmt: skip
def test_flags_without_a_part_in_the_network_are_refused(monkeypatch, capfd, flags):
    (flag,) = flags
    name = flag.replace("--no-", "--")
    for network, value in (("--branches", "frames"), ("--model", "r3d_18")):
        message = rf"{name}: has no part in the network of {network} {value}; leave it out"
        refused(monkeypatch, capfd, {network: value} | flags, message, train_fusion)


@pytest.mark.parametrize(
    "flags", [{"--branches": "frames"}, {"--lif-backend": "auto"}, {"--sync-bn": None}, {"--precise-bn": 8}], ids=str
)
def test_flags_without_a_part_in_a_video_network_are_refused(monkeypatch, capfd, flags):
    (flag,) = flags
    refused(monkeypatch, capfd, {"--model": "mc3_18"} | flags, rf"{flag}: has no part .* --model mc3_18", train_fusion)


def test_what_defaults_say_of_respike_has_no_part(monkeypatch):
    edited = {"freeze": "ann", "neuron": "sj.Nope", "stride": 5, "precise_bn": 8, "sync_bn": True, "fusion": "film"}
    monkeypatch.setattr(train_fusion, "DEFAULTS", train_fusion.DEFAULTS | edited | {"model": "r3d_18"})
    monkeypatch.setattr("sys.argv", ["train_fusion.py", "-T", "7"])
    args = train_fusion.parse_args()
    assert (args.stride, args.freeze, args.precise_bn, args.sync_bn) == (1, None, 0, False)


def test_the_run_folder_is_named_for_the_network(monkeypatch):
    for network, name in ((NETWORKS["frames"], "resnet18-frames-T7"), (NETWORKS["video"], "r3d_18-T7")):
        words = [str(word) for pair in (network | {"-T": 7}).items() for word in pair]
        monkeypatch.setattr("sys.argv", ["train_fusion.py", *words])
        assert train_fusion.parse_args().run_dir == f"runs/hmdb51-split1-{name}-lr0.01-seed1001"


def test_a_start_from_another_kind_of_network_is_refused(monkeypatch, capfd, run):
    name, folder, flags = run
    other = NETWORKS["video" if name == "frames" else "frames"]
    start = {k: v for k, v in flags.items() if k not in NETWORKS[name]} | other
    start |= {"--init": folder / "last.pt", "--run-dir": folder.parent / "other"}
    refused(monkeypatch, capfd, start, r"--init \S+last.pt: holds a \w+, this run trains a \w+", train_kinetics)
