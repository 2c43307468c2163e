"""main.py: from videos to the score of each head."""

import copy
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import dataset.video
import main
import models.heads.cnn
from dataset.decode import VideoError
from tests.helpers.script import metrics, same_weights
from utils.checkpoint import load_checkpoint
from utils.heads import fit
from utils.heads.batches import FeatureBatches
from utils.run_folder import leave_run_folders
from utils.script import run_script

HEADS = ("ensemble_array", "lmu", "spiking_lmu")
CACHED = ("train_data", "test_data", "train_labels", "test_labels")


pytestmark = pytest.mark.usefixtures("one_thread")


def cache(folder: Path) -> dict:
    return {name: str(folder / f"{name}.npy") for name in CACHED}


def config(folder: Path, tiny_demo, **changes) -> dict:
    """A config of tiny heads on 24 tiny videos. changes: new values of keys of any section or the top level."""
    content = {
        "name": "run", "seed": 3, "dset": "hmdb51", "data_path": str(tiny_demo[0]),
        "annotation_path": str(tiny_demo[1]), "use_cuda": False, "save_dir": str(folder / "runs"),
        "dataloader": {
            "batch_size": 8, "workers": 0, "frames_per_segment": 4, "segments_per_video": 1, "size": 32,
        },
        "pickle_locations": {
            **cache(folder / "cache"), "CNN_weights": "none", "SNN_weights": str(folder / "weights.pt"),
        },
        "CNN": {"backbone": "resnet18", "projection": False},
        "SNN": {
            "minibatch_size": 10, "head": "lmu", "neuron": None, "train_mode": "spiking", "ensembles": 20,
            "neurons_per_ensemble": 10, "units": 16, "order": 2, "memory": 1, "steps_per_frame": 1, "theta": None,
            "recurrent": True, "loss": "last",
        },
        "SNN_trainer": {
            "epochs": 2, "optimizer": "adam", "learning_rate": 0.01, "get_initial_testing_accuracy": False,
            "do_SNN_training": True, "import_CNN_forward_data": False, "end_to_end": False, "resume": True,
            "verify_CNN_data": False, "weight_decay": 0.0,
        },
    }  # fmt: skip
    for key, value in changes.items():
        owner = next(part for part in (content, *content.values()) if isinstance(part, dict) and key in part)
        owner[key] = value
    return content


def run(folder: Path, monkeypatch, capfd, content: dict, *flags: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of main.py, run in this process."""
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["main.py", "-c", str(file), *flags])
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    with pytest.raises(SystemExit) as left:
        run_script(main.main)
    out, err = capfd.readouterr()
    return left.value.code or 0, out, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_demo) -> Path:
    """The folder of a finished run of all heads, which found its features cached; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        for content in (config(folder, tiny_demo, name="first", epochs=1), config(folder, tiny_demo, head="all")):
            (folder / "config.json").write_text(json.dumps(content))
            monkeypatch.setattr(sys, "argv", ["main.py", "-c", str(folder / "config.json")])
            assert main.main() == 0
    leave_run_folders()
    return folder


@pytest.fixture
def cached(whole, tmp_path) -> None:
    """The index and the features of the tiny videos."""
    for name in ("respike", "cache"):
        shutil.copytree(whole / name, tmp_path / name)


@pytest.fixture
def start(tmp_path, tiny_demo, cached, monkeypatch, capfd):
    """start("-d", "cpu", epochs=1): a run that must end well; its stdout."""
    monkeypatch.setattr(fit, "save_curves", lambda *_: None)  # takes longer than the rest; `whole` draws them

    def begin(*flags, **changes) -> str:
        status, out, err = run(tmp_path, monkeypatch, capfd, config(tmp_path, tiny_demo, **changes), *flags)
        assert status == 0 and "Traceback" not in err, out + err
        return out

    return begin


@pytest.fixture
def refused(tmp_path, tiny_demo, cached, monkeypatch, capfd):
    """refused(message, "-d", "cpu", epochs=1): a run that must be refused in one line."""

    def begin(message, *flags, content=None, **changes) -> None:
        content = content or config(tmp_path, tiny_demo, **changes)
        status, out, err = run(tmp_path, monkeypatch, capfd, content, *flags)
        assert status == 2, out + err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert re.search(message, err), err

    return begin


def no_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded although the features are cached")

    monkeypatch.setattr(dataset.video, "decode_frames", fail)


# ---- what a run does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_what_a_run_leaves(whole, head):
    folder = whole / "runs/run" / head
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and (folder / "config.json").is_file()
    lines = metrics(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(line["test_counts"] == {"clips": 8, "videos": 8} for line in lines)
    result = json.loads((folder / "test.json").read_text())
    assert result["head"] == head and (result["frames"], result["segments"]) == (4, 1)
    assert len(result["per_step"]) == 4
    assert all(result[name] == lines[-1][f"test_{name}"] for name in ("loss", "per_step", "last_step", "video"))
    weights, last = load_checkpoint(whole / f"weights-{head}.pt"), load_checkpoint(folder / "last.pt")
    assert weights["model_settings"] == last["model_settings"] and weights["model"].keys() == last["model"].keys()
    assert all(torch.equal(value, last["model"][name]) for name, value in weights["model"].items())


def test_a_second_start_goes_on(whole, tmp_path, tiny_demo, monkeypatch, capfd):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    before = {head: (folder / "runs/run" / head / "test.json").read_text() for head in HEADS}
    for head in HEADS:
        (folder / "runs/run" / head / "test.json").unlink()
    no_decoding(monkeypatch)
    status, out, err = run(folder, monkeypatch, capfd, config(folder, tiny_demo, head="all"))
    assert status == 0, err
    assert out.count("after epoch 2\n") == 3 and "epoch 1/2" not in out and "building" not in out
    for head in HEADS:
        assert (folder / "runs/run" / head / "test.json").read_text() == before[head]
        assert len(metrics(folder / "runs/run" / head)) == 2


@pytest.mark.parametrize("head", HEADS)
def test_a_resumed_run_ends_as_an_undisturbed_one(start, tmp_path, whole, head):
    start(head=head, epochs=1)
    assert "last.pt, after epoch 1\n" in start(head=head, epochs=2)
    ours, other = tmp_path / "runs/run", whole / "runs/run" / head
    assert same_weights(ours, other)
    assert metrics(ours) == metrics(other) and len(metrics(ours)) == 2
    assert (ours / "test.json").read_text() == (other / "test.json").read_text()


def test_a_run_that_a_signal_stops(start, tmp_path, whole, monkeypatch):
    """The next start begins the stopped epoch again, and ends with the weights of an undisturbed run."""
    shuffled = FeatureBatches.shuffled

    def signalled(self, epoch):
        for number, batch in enumerate(shuffled(self, epoch)):
            if (epoch, number) == (1, 1):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(FeatureBatches, "shuffled", signalled)
        assert "stopped by SIGTERM in epoch 2; the next start begins this epoch again" in start()
    run = tmp_path / "runs/run"
    assert load_checkpoint(run / "last.pt")["epoch"] == 1
    assert not (run / "test.json").exists() and not (tmp_path / "weights.pt").exists()
    start()
    assert same_weights(run, whole / "runs/run/lmu")


def test_the_cache_does_not_show(start, tmp_path):
    """A head starts from the same weights whether the features were computed or found."""
    assert "building" in start(name="built", epochs=1, **cache(tmp_path / "fresh"))
    assert "building" not in start(name="found", epochs=1)
    assert same_weights(tmp_path / "runs/built", tmp_path / "runs/found")


def test_heads_train(start, tmp_path):
    out = start(epochs=15, learning_rate=0.02, get_initial_testing_accuracy=True)
    lines = metrics(tmp_path / "runs/run")
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    assert re.search(r"^before training: last step [\d.]+ %, video [\d.]+ %$", out, re.M)


def test_a_trained_head_is_tested(whole, tmp_path, tiny_demo, monkeypatch, capfd):
    content = config(whole, tiny_demo, head="all", do_SNN_training=False, save_dir=str(tmp_path / "runs"))
    status, out, err = run(tmp_path, monkeypatch, capfd, content)
    assert status == 0 and "epoch" not in out, out + err
    for head in HEADS:
        tested = tmp_path / "runs/run" / head
        assert (tested / "test.json").read_text() == (whole / "runs/run" / head / "test.json").read_text()
        assert not (tested / "last.pt").exists() and not (tested / "metrics.jsonl").exists()


def test_training_with_rates_is_not_training_with_spikes(start, tmp_path):
    for mode in ("rate", "spiking"):
        start(head="spiking_lmu", name=mode, train_mode=mode, epochs=1)
    assert not same_weights(tmp_path / "runs/rate", tmp_path / "runs/spiking")
    assert json.loads((tmp_path / "runs/rate/test.json").read_text())["train_mode"] == "rate"


def test_segments_and_steps(start, tmp_path):
    out = start(epochs=1, frames_per_segment=2, segments_per_video=2, steps_per_frame=3)
    assert "features: [48, 2, 512] to train on, [16, 2, 512] to test on" in out
    result = json.loads((tmp_path / "runs/run/test.json").read_text())
    assert result["segments"] == 2 and result["counts"] == {"clips": 16, "videos": 8}
    assert len(result["per_step"]) == 6
    assert load_checkpoint(tmp_path / "runs/run/last.pt")["model_settings"]["steps_per_frame"] == 3


def test_end_to_end_trains_the_cnn_as_well(start, tmp_path, monkeypatch):
    built = []

    class Recorded(models.heads.cnn.FrameCNN):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            built.append((self, copy.deepcopy(self.state_dict())))

    def fail(*_, **__):
        raise AssertionError("the features of a network that is trained were cached")

    monkeypatch.setattr(main, "FrameCNN", Recorded)
    monkeypatch.setattr(main, "cached_features", fail)
    start(end_to_end=True, epochs=1, frames_per_segment=2, segments_per_video=2, minibatch_size=24)
    (cnn, before), trained = built[0], load_checkpoint(tmp_path / "runs/run/last.pt")["model"]
    for name, _ in cnn.named_parameters():
        assert not torch.equal(trained[f"cnn.{name}"], before[name]), name
    result = json.loads((tmp_path / "runs/run/test.json").read_text())
    assert result["counts"] == {"clips": 16, "videos": 8}


def test_device_flag(start, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "; CPU" in start("-d", "cpu", use_cuda=True, epochs=1)


# ---- what is refused -----------------------------------------------------------------------------------


def test_a_typo_in_the_config(refused, tmp_path, tiny_demo):
    content = config(tmp_path, tiny_demo)
    content["SNN"]["ensemble"] = content["SNN"].pop("ensembles")
    refused(r"config\.json: SNN\.ensemble: unknown key; did you mean SNN\.ensembles\?", content=content)
    assert not (tmp_path / "runs").exists()


def test_without_a_gpu(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(r"config\.json: use_cuda is true, and this machine has no CUDA device; set it to false", use_cuda=True)
    refused(r"cuda:0: this machine has 0 CUDA devices", "-d", "0")
    refused(r"--device tpu: expected cuda, cuda:N or cpu", "-d", "tpu")
    refused(r"unrecognized arguments: --devise", "--devise", "cpu")


def test_another_head_under_the_same_name(start, refused):
    start(epochs=1)
    refused(r"last\.pt: checkpoint of another network", units=17)
    refused(r"last\.pt: checkpoint of another network", head="spiking_lmu")
    refused(r"weights\.pt: checkpoint of another network", units=17, do_SNN_training=False)
    start(epochs=1, minibatch_size=5, loss="every")  # what may change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"units": 17}, "units is 16, this run's is 17"), ({"theta": 9.0}, "theta"), ({"order": 3}, "order"),
        # With theta null the memory's window is the number of frames, so other frames are another network.
        ({"frames_per_segment": 5}, "checkpoint of another network"),
        ({"optimizer": "sgd"}, "optimizer.*adam.*sgd"),
    ],
)  # fmt: skip
def test_what_differs_is_named(start, refused, change, named):
    start(epochs=1)
    refused(named, **change)


def test_a_run_that_is_not_to_be_gone_on_with(start, refused, tmp_path):
    start(epochs=1)
    before = (tmp_path / "runs/run/last.pt").read_bytes()
    refused(r"runs/run: holds a run already; set SNN_trainer\.resume to true .* or give another name", resume=False)
    assert (tmp_path / "runs/run/last.pt").read_bytes() == before


def test_weights_that_are_not_there(start, refused, tmp_path):
    refused(r"weights\.pt: no such checkpoint", do_SNN_training=False)
    start(epochs=1)
    os.truncate(tmp_path / "weights.pt", 1000)
    refused(r"weights\.pt: not a readable checkpoint", do_SNN_training=False)


def test_a_loss_that_is_not_finite(refused, tmp_path):
    """SGD multiplies the weights by 1 - learning_rate * weight_decay in each step."""
    message = r"the loss became (nan|inf); take a smaller learning_rate"
    refused(message, optimizer="sgd", learning_rate=1e6, weight_decay=1e6, epochs=5)
    assert not (tmp_path / "weights.pt").exists()


def test_weights_that_cannot_be_written(refused, tmp_path):
    refused(r"/dev/null/x/weights\.pt", SNN_weights="/dev/null/x/weights.pt", epochs=1)


def test_a_truncated_cache(start, refused, tmp_path):
    start(epochs=1)
    data = tmp_path / "cache/train_data.npy"
    before = data.read_bytes()
    os.truncate(data, 1000)
    refused(r"train_data\.npy: damaged: expected \d+ bytes, found 1000.*", import_CNN_forward_data=True)
    assert "train_data.npy: damaged" in start()
    assert data.read_bytes() == before
    start(import_CNN_forward_data=True)


def test_a_changed_cache_is_noticed_on_request(start, refused, tmp_path):
    data = tmp_path / "cache/train_data.npy"
    content = bytearray(data.read_bytes())
    content[-2] ^= 1
    data.write_bytes(content)
    start(epochs=1)
    assert data.read_bytes() == content
    refused(r"train_data\.npy: damaged: its checksum differs", import_CNN_forward_data=True, verify_CNN_data=True)
    assert "checksum differs; building it" in start(name="verified", epochs=1, verify_CNN_data=True)
    assert data.read_bytes() != content


def test_a_cache_that_is_not_there(refused, tmp_path):
    (tmp_path / "cache/train_data.npy").unlink()
    refused(r"train_data\.npy: no such file; set import_CNN_forward_data to false", import_CNN_forward_data=True)


def test_a_video_that_cannot_be_read_is_left_out(start, tmp_path, tiny_demo):
    shutil.copytree(tiny_demo[0], tmp_path / "videos")
    broken = sorted(tmp_path.glob("videos/*/*.avi"))[0]
    broken.write_bytes(b"no video")
    out = start(data_path=str(tmp_path / "videos"), epochs=1, frames_per_segment=1)
    assert re.search(r"1 videos cannot be read and are left out, the first: .*" + broken.name, out)
    clips = re.search(r"features: \[(\d+), .* \[(\d+), ", out)
    assert sum(map(int, clips.groups())) == 31


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_that_is_lost_end_to_end(refused, monkeypatch, workers):
    def fail(path, *_):
        raise VideoError(f"{path}: cannot be decoded")

    monkeypatch.setattr(dataset.video, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(dataset.video, "decode_frames", fail)
    refused(r"^error: \S+\.avi: cannot be decoded", end_to_end=True, workers=workers)


BAD_PATHS = {
    "data_path": ("/nowhere", r"/nowhere: no such folder"),
    "annotation_path": ("/nowhere", r"/nowhere: no such folder"),
    "save_dir": ("/dev/null", r"/dev/null/run: cannot be written"),
    "CNN_weights": ("r18.pth", r"r18\.pth: .*no such file"),
}


@pytest.mark.parametrize(("key", "value", "message"), [(key, *rest) for key, rest in BAD_PATHS.items()])
def test_bad_paths_are_named_by_their_key(refused, key, value, message):
    refused(rf"^error: (?=[\w., ]*\b{key}\b[\w., ]*: ).*{message}", **{key: value})


def test_every_data_set_has_a_reader_of_its_layout(refused, tmp_path):
    """HMDB-51's lists are not UCF-101's."""
    refused(r"classInd\.txt", dset="ucf101")
    refused(r"dset: must be one of ucf101, hmdb51, demo, demo_orders, got \"hmdb\"", dset="hmdb")


def test_features_are_imported_without_the_weights_that_made_them(start):
    start(epochs=1)
    out = start(name="imported", epochs=1, import_CNN_forward_data=True, CNN_weights="gone.pth")
    assert "without comparing the CNN's weights" in out and "gone.pth" in out and "building" not in out
