"""What is kept of a forward pass is what the network did."""

import pytest
import torch

from models import ReSpike
from models.attention import CrossAttentionFusion
from tests.helpers.fake_gpu import fake_gpu
from utils.pictures.recording import record
from utils.training.metrics import FiringRates


def network(**settings) -> ReSpike:
    """One whose fusion changes something: as it starts, it is the identity."""
    model = ReSpike(num_classes=3, **settings)
    for fusion in model.fusions:
        if isinstance(fusion, CrossAttentionFusion):
            torch.nn.init.normal_(fusion.proj_out.weight, std=0.05)
    return model.eval()


def clips(batch: int = 2, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, 3, 32, width), torch.randn(batch, 2, 3, 3, 32, width)


@pytest.mark.parametrize(
    "settings", [{}, {"lif_backend": "triton"}, {"pack_spikes": True}, {"fusion": "lean"}, {"branches": "snn"}], ids=str
)
def test_spikes_are_those_that_firing_rates_count(settings):
    model, (key, residual) = network(**settings).to(memory_format=torch.channels_last), clips()
    with FiringRates(model) as rates:
        recording = record(model, key[:, :1], residual[:, :1])
    assert recording.firing_rates().shape == (16, 3)
    assert recording.firing_rates().mean(1).tolist() == pytest.approx(rates.per_layer(), rel=1e-5)
    assert list(recording.spikes) == [f"stage{stage}.{layer}" for stage in range(1, 5) for layer in range(1, 5)]
    assert recording.spikes["stage1.1"].shape == (3, 2, 64, 16, 16)


def test_a_fusion_of_ones_own_shows_what_it_changes():
    class Halves(torch.nn.Module):
        def forward(self, snn, ann):
            return 0.5 * snn

    model = network()
    model.fusions = torch.nn.ModuleList([None, None, None, Halves()])
    recording = record(model, *clips())
    assert recording.fusion == "modulation" and list(recording.fusion_maps()) == ["stage4"]


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
