"""What the pictures are made of, the files, and what a user can get wrong."""

import json
import math

import pytest
import torch

from dataset.decode import decode_frames
from dataset.transforms import eval_transforms
from models import ReSpike
from models.attention import CrossAttentionFusion
from tests.helpers.fake_gpu import fake_gpu
from tests.helpers.script import refused, run_here
from utils import plots
from utils.errors import UserError
from utils.figures import as_image, new_figure, save_figure
from utils.plots import (
    calibration,
    curves_figure,
    firing_rate_figure,
    fusion_figure,
    key_residual_picture,
    raster_figure,
    read_clip,
    read_metrics,
    record,
    save_calibration,
    save_confusion,
)
from utils.trained import TrainedNetwork, export
from utils.training.metrics import FiringRates

PNG = b"\x89PNG"


def network(**settings) -> ReSpike:
    """One whose fusion changes something: as it starts, it is the identity."""
    model = ReSpike(num_classes=3, **settings)
    for fusion in model.fusions:
        if isinstance(fusion, CrossAttentionFusion):
            torch.nn.init.normal_(fusion.proj_out.weight, std=0.05)
    return model.eval()


def clips(batch: int = 2, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, 3, 32, width), torch.randn(batch, 2, 3, 3, 32, width)


# ---- recording ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"lif_backend": "triton"}, {"pack_spikes": True}, {"fusion": "lean"}, {"branches": "snn"}], ids=str
)
def test_spikes_are_those_that_firing_rates_count(settings):
    model, (key, residual) = network(**settings), clips()
    with FiringRates(model) as rates:
        recording = record(model, key[:, :1], residual[:, :1])
    assert recording.firing_rates().shape == (16, 3)
    assert recording.firing_rates().mean(1).tolist() == pytest.approx(rates.per_layer(), rel=1e-5)
    assert list(recording.spikes) == [f"stage{stage}.{layer}" for stage in range(1, 5) for layer in range(1, 5)]
    assert recording.spikes["stage1.1"].shape == (3, 2, 64, 16, 16)


def test_recording_leaves_the_network_as_it_was():
    model, batch = network().train(), clips()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record(model, *batch)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("counted" in vars(layer) for group in model.lif_layers().values() for layer in group)


def test_clips_may_lie_on_another_device_than_the_network(monkeypatch):
    """As at the end of a run on a GPU."""
    with fake_gpu(monkeypatch):
        key, residual = (part.to("cpu") for part in clips())
        recording = record(network(), key, residual)
    assert recording.key.device.type == "cpu" and recording.logits.shape == (2, 3)


def test_a_compiled_network_is_recorded_uncompiled():
    model, batch = network(), clips()
    expected = record(model, *batch)
    with torch.no_grad():
        assert torch.equal(expected.logits, model(*batch))
    model.compile(backend=lambda *_: pytest.fail("compiled"))
    found = record(model, *batch)
    assert torch.equal(found.firing_rates(), expected.firing_rates()) and found.attention


@pytest.mark.parametrize("fusion", ["cross", "lean"])
def test_attention_is_that_of_the_network(fusion):
    """The maps, times the values, give what `attend` gives. Two heads' mean equals an explicit softmax of each."""
    model, batch = network(fusion=fusion), clips()
    seen = {}
    attend = model.fusions[2].attend_ann
    attend.to_q.register_forward_hook(lambda module, inputs, output: seen.update(q=inputs[0]))
    attend.to_k.register_forward_hook(lambda module, inputs, output: seen.update(k=inputs[0]))
    recording = record(model, *batch)
    for weights in recording.attention.values():
        assert weights.shape[:2] == (4, 3)
        torch.testing.assert_close(weights.sum(3), torch.ones(weights.shape[:3]))
    q, k = attend._in_heads(attend.to_q(seen["q"])), attend._in_heads(attend.to_k(seen["k"]))
    tokens = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)  # as values they give the weights themselves
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, tokens).mean(1)
    torch.testing.assert_close(recording.attention["stage3"].flatten(1, 2), expected)


def test_maps_weigh_the_tokens_that_moved():
    key, residual = clips(batch=1, width=64)
    residual[:] = 0
    residual[0, 0, 1, :, :16, :16] = 1  # one token of stage 3's grid of 2 x 4, at the second step
    recording = record(network(), key, residual)
    weights, maps = recording.attention["stage3"], recording.fusion_maps()["stage3"]
    assert maps.shape == (2, 2, 4)
    torch.testing.assert_close(maps[0].flatten(), 8 * weights[0, 1, 0])
    torch.testing.assert_close(maps[1].flatten(), 8 * weights[1].mean((0, 1)))  # nothing moved: all alike
    torch.testing.assert_close(maps.mean((1, 2)), torch.ones(2))


def test_modulation_is_the_change_of_the_currents_at_a_place():
    model = network(fusion="film")
    torch.nn.init.normal_(model.fusions[1].to_shift.weight, std=0.1)
    torch.nn.init.normal_(model.fusions[1].to_gain.bias, std=0.1)
    seen = {}
    model.fusions[1].register_forward_hook(lambda module, inputs, out: seen.update(before=inputs[0], after=out))
    recording = record(model, *clips())
    change = (seen["after"] - seen["before"]).abs().mean((0, 2))  # over steps and channels
    assert recording.fusion == "modulation" and not recording.attention and change.max() > 0
    maps = recording.fusion_maps()
    torch.testing.assert_close(maps["stage2"], change / change.mean((1, 2), keepdim=True))
    assert not maps["stage3"].any()  # a block as new changes nothing
    assert len(fusion_figure(recording, rows=[0]).axes) == 1 + 3 + 4 + 1


# ---- pictures -----------------------------------------------------------------------------------------


def test_clips_of_a_network_that_sees_every_frame():
    picture = key_residual_picture(torch.randn(2, 5, 3, 8, 8), torch.empty(2, 5, 0, 3, 8, 8))
    assert picture.shape[2] == 5 * (8 + 1) + 1 and 0 <= picture.min() < picture.max() <= 1


def test_pictures_of_a_clip(tmp_path):
    recording = record(network(), *clips())
    rates = firing_rate_figure(recording)
    assert torch.tensor(rates.axes[0].images[0].get_array()).allclose(100 * recording.firing_rates())
    raster = raster_figure(recording, clip=1)
    chosen = raster.axes[0].collections[0].get_offsets()
    assert len(chosen) > 0 and set(chosen[:, 0]) <= set(range(6)) and chosen[:, 1].max() < 16 * 40
    attention = fusion_figure(recording, rows=[0, 2], title="two")
    assert len(attention.axes) == 2 * (1 + 3 + 4) + 1  # and the colour bar
    for figure in (rates, raster, attention):
        image = as_image(figure)
        assert image.shape[0] == 3 and 0 <= image.min() < image.max() == 1
    assert len(fusion_figure(record(network(branches="snn"), *clips())).axes) == 4 * 4  # no map


@pytest.mark.parametrize("count", [8, 51, 400])
def test_confusion(tmp_path, count):
    matrix = 3 * torch.eye(count, dtype=torch.int64)
    matrix[1, 0] = 1
    figure = plots.confusion_figure(matrix, [f"class {n}" for n in range(count)])
    axes, share = figure.axes[0], torch.tensor(figure.axes[0].images[0].get_array())
    assert share[1, :2].tolist() == [25, 75] and share[0, 0] == 100 and share.sum() == 100 * count
    assert len(axes.get_yticks()) == (0 if count == 400 else count)
    assert axes.get_title().startswith(f"{3 * count} of {3 * count + 1} correct")
    assert [text.get_text() for text in axes.texts] == (["3", "1", *7 * ["3"]] if count == 8 else [])
    save_confusion(tmp_path / "confusion.png", matrix, [str(n) for n in range(count)])
    assert (tmp_path / "confusion.png").read_bytes().startswith(PNG)


def test_calibration(tmp_path):
    confidence = torch.tensor([0.95, 0.85, 0.95, 0.55, 1.0])
    correct = torch.tensor([True, True, False, False, True])
    table, error = calibration(confidence, correct)
    assert table[14].tolist() == pytest.approx([3 / 5, 2.9 / 3, 2 / 3])
    assert table[12].tolist() == pytest.approx([1 / 5, 0.85, 1]) and math.isnan(table[0, 2])
    assert error == pytest.approx(100 * (3 * (2.9 / 3 - 2 / 3) + 0.15 + 0.55) / 5)
    save_calibration(tmp_path / "calibration.svg", confidence, correct)
    assert f"{error:.1f}" == "32.0" and b"<svg" in (tmp_path / "calibration.svg").read_bytes()


# ---- runs ---------------------------------------------------------------------------------------------


def write_run(folder, epochs=3, evaluated_on="test"):
    folder.mkdir()
    lines = [
        {"epoch": n, "train_loss": 2.0 - n, f"{evaluated_on}_loss": 2.5 - n, "train_clip_top1": 10.0 * n,
         "video_top1": 9.0 * n, "firing_rate": {"stage1": 0.1 * n}, "evaluated_on": evaluated_on}
        for n in range(epochs)
    ]  # fmt: skip
    closing = {"best_epoch": 2, "video_top1": 18.0, "device_hours": 0.1}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, closing]) + '{"epoch": 3, "tr'
    )
    return folder


def test_curves_of_several_runs(tmp_path, monkeypatch, capfd):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", 1, "val")
    figure = curves_figure({"a": read_metrics(first), "b": read_metrics(second)})
    loss, accuracy, firing = figure.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[2, 1, 0], [2.5, 1.5, 0.5], [2], [2.5]]
    assert [line.get_ydata().tolist() for line in accuracy.lines[:2]] == [[0, 10, 20], [0, 9, 18]]
    assert firing.lines[0].get_ydata().tolist() == [0, 10, 20] and firing.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]
    assert run_here(monkeypatch, capfd, {str(first): None, "--out": tmp_path / "c.pdf"}, plots)[0] == 0
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")


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
    with pytest.raises(UserError, match="must end in"):
        save_figure(tmp_path / "a.gif", new_figure(1, 1))
    assert not list(tmp_path.glob("a.*"))


# ---- a video ------------------------------------------------------------------------------------------


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
