"""The array of ensembles against nengo's numbers, and its own backward pass against autograd."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from models.heads.ensemble_array import EnsembleArray, solve_decoders
from models.heads.neurons import DT, LIF, NEURONS, AdaptiveLIF, LIFRate, RectifiedLinear, SpikingRectifiedLinear

GOLDEN = Path(__file__).parents[2] / "golden"
GOLDEN_NEURONS = {"spikingrelu": SpikingRectifiedLinear(), "lif": LIF(), "relu": RectifiedLinear()}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def golden():
    with numpy.load(GOLDEN / "nengo.npz") as arrays:
        yield {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def golden_array(golden, name: str) -> tuple[EnsembleArray, dict[str, Tensor]]:
    found = {key.removeprefix(f"ensemble_array.{name}."): value for key, value in golden.items() if f".{name}." in key}
    array = EnsembleArray(6, 4, 8, 20, GOLDEN_NEURONS[name]).double()
    values = {
        "scaled_encoders": found["gain"] * found["encoders"][..., 0], "bias": found["bias"],
        "decoders": found["decoders"][:, 0], "transform": found["transform"], "readout": found["readout"],
        "initial_voltage": found.get("state0.voltage", torch.zeros(8, 20)),
    }  # fmt: skip
    array.load_state_dict(values)
    return array, found


def represented_by(array: EnsembleArray, features: Tensor) -> Tensor:
    """The numbers that the ensembles represent: the synapse's output of the step before, computed in a loop."""
    decay, value, seen = array.synapse.decay, torch.zeros(features.shape[1], len(array.transform)).to(features), []
    for step in features:
        seen.append(value)
        value = decay * value + (1 - decay) * step @ array.transform.T
    return torch.stack(seen)


def small(neuron=SpikingRectifiedLinear(), synapse_seconds=0.005) -> EnsembleArray:
    return EnsembleArray(3, 4, ensembles=6, neurons_per_ensemble=5, neuron=neuron, synapse_seconds=synapse_seconds)


@pytest.mark.parametrize("name", GOLDEN_NEURONS)
def test_outputs_are_nengos(golden, name):
    array, want = golden_array(golden, name)
    features = want["input"][:, None]
    with torch.no_grad():
        torch.testing.assert_close(array(features)[:, 0], want["readout_output"], rtol=1e-9, atol=1e-9)
        decoded = array.decoded(represented_by(array, features))
    torch.testing.assert_close(decoded[:, 0], want["array_output"], rtol=1e-9, atol=1e-9)


def test_clips_of_a_batch_do_not_meet(golden):
    array, want = golden_array(golden, "lif")
    features = torch.stack([want["input"], want["input"].flip(0), torch.zeros_like(want["input"])], dim=1)
    with torch.no_grad():
        logits = array(features)
        alone = torch.cat([array(features[:, clip : clip + 1]) for clip in range(3)], dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("neuron", [SpikingRectifiedLinear(), LIF(), LIFRate()])
def test_pieces_do_not_show(monkeypatch, neuron):
    array, features = small(neuron).double(), torch.randn(12, 2, 3).double().requires_grad_()
    results = []
    for values in (1 << 20, 25, 1):  # all six ensembles at once, two, one
        monkeypatch.setattr("models.heads.ensemble_array._CHUNK_VALUES", values)
        logits = array(features)
        grads = torch.autograd.grad(logits.square().sum(), [features, *array.parameters()])
        solved = solve_decoders(array.scaled_encoders.detach(), array.bias.detach(), neuron)
        results.append((logits, grads, solved))
    assert logits.count_nonzero() > 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("neuron", [RectifiedLinear(), LIFRate()])
def test_gradients_of_rates_are_autograds(neuron):
    def plain(represented, encoders, bias, decoders):
        current = represented[..., None] * encoders + bias
        if isinstance(neuron, RectifiedLinear):
            rate = current.relu()
        else:
            above = (current - 1).clamp(min=1e-12)
            rate = 1 / (neuron.tau_ref + neuron.tau_rc * torch.log1p(1 / above)) * (current > 1)
        return (rate * decoders).sum(-1)

    array = small(neuron).double()
    with torch.no_grad():  # away from the threshold, near which the surrogate is softer than the rate
        array.bias += torch.where(array.bias < 0, -3.0, 3.0) * array.scaled_encoders.abs()
    represented = (torch.rand(9, 2, 6).double() * 2 - 1).requires_grad_()
    inputs = represented, array.scaled_encoders, array.bias, array.decoders
    incoming = torch.randn(9, 2, 6).double()
    found, want = array.decoded(represented), plain(*inputs)
    torch.testing.assert_close(found, want)
    assert 0 < (represented[..., None] * array.scaled_encoders + array.bias > 1).double().mean() < 1
    found, want = (torch.autograd.grad(output, inputs, incoming) for output in (found, want))
    assert all(gradient.count_nonzero() for gradient in want)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("neuron", [SpikingRectifiedLinear(), LIF(), AdaptiveLIF()])
def test_gradients_through_spikes(neuron):
    """The decoders' gradient comes from the spikes, all others from the rates, with the neurons' state of each step."""
    array = small(neuron).double()
    represented = (torch.rand(30, 2, 6).double() * 2 - 1).requires_grad_()
    incoming = torch.randint(-3, 4, (30, 2, 6)).double()  # whole numbers: sums are exact in any order
    array.decoded(represented).backward(incoming)

    encoders, bias, decoders = (value.detach() for value in (array.scaled_encoders, array.bias, array.decoders))
    current = represented.detach()[..., None] * encoders + bias  # [T, B, e, n]
    state, spikes, slopes = neuron.initial_state(current[0], array.initial_voltage), [], []
    for step in current:
        slopes.append(neuron.rate_gradient(step, state))
        fired, state = neuron.step(step, state, DT)
        spikes.append(fired)
    spikes, grad_current = torch.stack(spikes), torch.stack(slopes) * decoders * incoming[..., None]
    assert set((spikes * DT).unique().tolist()) >= {0.0, 1.0}
    torch.testing.assert_close(array.decoders.grad, (incoming[..., None] * spikes).sum((0, 1)), rtol=0, atol=1e-9)
    torch.testing.assert_close(array.bias.grad, grad_current.sum((0, 1)))
    wanted = (grad_current * represented.detach()[..., None]).sum((0, 1))
    torch.testing.assert_close(array.scaled_encoders.grad, wanted)
    torch.testing.assert_close(represented.grad, (grad_current * encoders).sum(-1))


def test_backward_sees_the_neuron_of_its_forward():
    """Training with rates exchanges the neuron for the forward pass only."""
    array, represented = small(LIFRate()).double(), torch.rand(5, 2, 6).double()
    (want,) = torch.autograd.grad(array.decoded(represented).sum(), array.decoders)
    decoded = array.decoded(represented)
    array.neuron = LIF()
    assert torch.equal(torch.autograd.grad(decoded.sum(), array.decoders)[0], want)
    assert not torch.equal(array.decoded(represented), decoded)


def test_step_delay():
    array, features = small(RectifiedLinear()).double(), torch.randn(8, 1, 3).double().requires_grad_()
    logits = array(features)
    for step in range(8):
        (grad,) = torch.autograd.grad(logits[step].sum(), features, retain_graph=True)
        assert (grad.abs().sum((1, 2)) > 0).tolist() == [other < step for other in range(8)]


@pytest.mark.parametrize("name", NEURONS)
def test_decoders_decode(name):
    """x in [-1, 1], between the points that they were solved for."""
    neuron = NEURONS[name]()
    array = EnsembleArray(1, 1, ensembles=2, neurons_per_ensemble=50, neuron=neuron).double()
    x = torch.linspace(-0.97, 0.97, 23).double()
    if name == "Izhikevich" or "Adaptive" in name:  # their rate changes over time
        assert array.decoders.isfinite().all() and array.decoders.count_nonzero() > 0
        return
    decoded = array.decoded(x[None, :, None].expand(500 if neuron.spiking else 1, -1, 2)).mean(0)
    assert (decoded - x[:, None]).square().mean(0).sqrt().max() < 0.1


def test_neurons_are_tuned_as_nengos_are():
    """They start to fire at values in [-1, 0.9] and reach 200 to 400 Hz at the value 1 or -1."""
    torch.manual_seed(5)
    array = EnsembleArray(1, 1, ensembles=40, neurons_per_ensemble=50, neuron=LIFRate())
    encoders, bias = array.scaled_encoders.detach(), array.bias.detach()
    best = LIFRate().step(encoders.abs() + bias, (), DT)[0]
    assert 200 <= best.min() < 202 and 398 < best.max() <= 400.01
    threshold = (1 - bias) / encoders.abs()
    assert -1 <= threshold.min() < -0.99 and 0.89 < threshold.max() <= 0.9001
    assert 0.45 < (encoders > 0).double().mean() < 0.55
    assert 0 <= array.initial_voltage.min() < 0.01 and 0.99 < array.initial_voltage.max() < 1


def test_what_is_trained():
    array = small()
    assert {name for name, _ in array.named_parameters()} == {
        "scaled_encoders", "bias", "decoders", "transform", "readout"
    }  # fmt: skip
    array(torch.randn(20, 2, 3)).square().sum().backward()
    assert all(value.grad.count_nonzero() for value in array.parameters())
