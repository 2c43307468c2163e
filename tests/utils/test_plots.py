"""python -m utils.plots as a user runs it, and what a user can get wrong."""

import torch

from dataset.decode import decode_frames
from dataset.transforms import eval_transforms
from models import ReSpike
from tests.helpers.script import refused, run_here
from tests.utils.pictures.test_recording import network
from tests.utils.pictures.test_runs import write_run
from utils import plots
from utils.plots import read_clip
from utils.trained import TrainedNetwork, export


def test_curves_of_runs_of_one_name(tmp_path, monkeypatch, capfd):
    """They are told apart by their whole paths."""
    runs = [write_run(tmp_path / name / "run") for name in "ab"]
    words = {str(run): None for run in runs} | {"--out": tmp_path / "c.svg"}
    status, printed, err = run_here(monkeypatch, capfd, words, plots)
    assert status == 0, err
    assert printed == f"wrote {tmp_path}/c.svg\n"
    picture = (tmp_path / "c.svg").read_text()
    assert all(f"<!-- {run} -->" in picture for run in runs)


def test_mistakes_are_one_line(tmp_path, monkeypatch, capfd):
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()

    def refuse(message, *paths, **flags):
        words = {str(path): None for path in paths} | {f"--{name}": value for name, value in flags.items()}
        refused(monkeypatch, capfd, words, message, plots)

    png = tmp_path / "a.png"
    refuse("no metrics.jsonl in it", run, tmp_path / "empty", out=png)
    refuse(r"--out .*a\.jpg: the name of a picture must end in \.png, \.pdf, \.svg", run, out=tmp_path / "a.jpg")
    refuse("cannot be written", run, out=tmp_path / "absent" / "a.png")
    refuse("--clip goes with one checkpoint", run, run / "b", clip="v.avi", out=tmp_path)
    refuse(r"best\.pt: no such checkpoint", run, clip="v.avi", out=tmp_path)
    (run / "metrics.jsonl").write_text("")
    refuse("has the first epoch ended", run, out=png)
    assert not list(tmp_path.glob("a.*"))


def write_network(path, **settings):
    """A network that was not trained, as `evaluate.py --export` writes one."""
    model = network(**settings)
    about = {
        "backbone": "resnet18", "num_classes": 3, "stride": 4, "downsample": True, "branches": "both",
        "fusion": "cross", "snn_batch_norm": "per-step", "classes": ["a", "b", "c"], "T": 8, "residual": "key",
        "neuron": "lif", "tau": 4 / 3, "surrogate": "atan", "alpha": 2.0,
    }  # fmt: skip
    flags = {"size": 32, "dset": "demo", "sampling": "window", "frame_stride": 1}
    export(TrainedNetwork(path, model.state_dict(), about | settings, flags, 0), path)
    return path


def test_pictures_of_a_video(tmp_path, tiny_demo, monkeypatch, capfd):
    video, out = sorted(tiny_demo[0].glob("*/*.avi"))[0], tmp_path / "new" / "pictures"
    words = {str(write_network(tmp_path / "a.safetensors")): None, "--clip": video, "--out": out}
    status, printed, err = run_here(monkeypatch, capfd, words, plots)
    assert status == 0, err
    assert {file.name for file in out.iterdir()} == {"firing_rates.png", "spikes.png", "attention.png"}
    assert printed.count("wrote") == 3
    refused(monkeypatch, capfd, words | {"--clip": tmp_path / "absent.avi"}, r"absent\.avi", plots)
    ann = write_network(tmp_path / "ann.safetensors", branches="ann")
    refused(
        monkeypatch, capfd, {str(ann): None, "--clip": video, "--out": out}, "no spikes and no fusion to draw", plots
    )


def test_the_clip_is_the_checkpoints_own(tmp_path, tiny_demo):
    video = sorted(tiny_demo[0].glob("*/*.avi"))[0]
    clip = read_clip(ReSpike.from_checkpoint(write_network(tmp_path / "a.safetensors")), video)
    expected = torch.from_numpy(decode_frames(video, range(1, 9))).permute(0, 3, 1, 2)  # the middle 8 of 10 frames
    assert clip.shape == (1, 8, 3, 32, 32)
    assert torch.equal(clip[0], eval_transforms(32, short_side=32)[0](expected))
