"""The heads' neurons and synapse against nengo's numbers, their gradients against their rates."""

import math
from pathlib import Path

import numpy
import pytest
import torch

from models.heads.neurons import (
    DT,
    LIF,
    NEURONS,
    AdaptiveLIF,
    AdaptiveLIFRate,
    FireStep,
    Izhikevich,
    LIFRate,
    Lowpass,
    RectifiedLinear,
    SpikingRectifiedLinear,
    rate_counterpart,
)
from utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden"
WITH_GAIN = ("RectifiedLinear", "SpikingRectifiedLinear", "LIFRate", "LIF")


@pytest.fixture(scope="module")
def golden():
    with numpy.load(GOLDEN / "nengo.npz") as arrays:
        yield {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def simulate(neuron, currents, voltage=None):
    state, outputs = neuron.initial_state(currents[0], voltage), []
    for current in currents:
        output, state = neuron.step(current, state, DT)
        outputs.append(output)
    return torch.stack(outputs)


# ---- nengo's numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEURONS)
def test_outputs_are_nengos(golden, name):
    neuron = NEURONS[name]()
    outputs = simulate(neuron, golden["current"] * (40 if "Rectified" in name else 1))
    assert outputs.dtype == torch.float64 and outputs.count_nonzero() > 0
    if neuron.spiking:
        assert torch.equal(outputs, golden[name])
    else:
        torch.testing.assert_close(outputs, golden[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WITH_GAIN)
def test_gain_and_bias_are_nengos(golden, name):
    found = NEURONS[name]().gain_bias(golden["max_rates"], golden["intercepts"])
    torch.testing.assert_close(found, (golden[f"{name}.gain"], golden[f"{name}.bias"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("neuron", [RectifiedLinear(), LIFRate(), LIFRate(tau_rc=0.05, tau_ref=0.001)])
def test_gain_and_bias_do_what_they_say(neuron):
    max_rates = torch.tensor([200.0, 300.0, 400.0]).double()
    intercepts = torch.tensor([-0.5, 0.0, 0.5]).double()
    gain, bias = neuron.gain_bias(max_rates, intercepts)

    def rate(x):
        return neuron.step(gain * x + bias, (), DT)[0]

    torch.testing.assert_close(rate(1.0), max_rates)
    assert not rate(intercepts - 1e-6).any() and (rate(intercepts + 1e-6) > 0).all()


def test_rates_that_the_refractory_time_rules_out():
    for neuron in (LIFRate(), LIF(), AdaptiveLIF()):
        with pytest.raises(UserError, match="max_rates must be below 1 / tau_ref = 500 Hz, got 500"):
            neuron.gain_bias(torch.tensor([200.0, 500.0]), torch.zeros(2))


# ---- spikes and rates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neuron", "currents"),
    [
        (SpikingRectifiedLinear(), (-50.0, 0.0, 3.5, 90.0, 400.0, 2500.0)),
        (LIF(), (-1.0, 0.9, 1.05, 1.5, 3.0, 12.0)),
        (LIF(tau_rc=0.04, tau_ref=0.005), (0.9, 1.05, 1.5, 3.0, 12.0)),
    ],
)
def test_spikes_come_at_the_rate(neuron, currents):
    currents = torch.tensor(currents).double()
    rate_neuron = LIFRate(neuron.tau_rc, neuron.tau_ref) if isinstance(neuron, LIF) else RectifiedLinear()
    want = rate_neuron.step(currents, (), DT)[0]
    found = simulate(neuron, currents.expand(2000, -1)).mean(0)
    assert (found > 0).tolist() == (want > 0).tolist()
    assert ((found - want).abs() <= (0.02 * want).clamp(min=1.0)).all(), (found, want)


def test_adaptation_lowers_spikes_and_rates_alike():
    currents = torch.tensor([0.5, 2.0, 5.0]).double().expand(2000, -1)
    spikes, rates = (simulate(neuron, currents) for neuron in (AdaptiveLIF(), AdaptiveLIFRate()))
    first, second = spikes.unflatten(0, (2, 1000)).mean(1)
    assert ((first - rates[:1000].mean(0)).abs() <= (0.02 * first).clamp(min=1.0)).all()
    assert ((second - rates[1000:].mean(0)).abs() <= (0.02 * second).clamp(min=1.0)).all()
    assert (second < 0.92 * first)[1:].all()


def test_phases_at_the_start():
    """The voltage at the start brings the first spike forward and changes no rate."""
    voltage = torch.tensor([0.0, 0.5, 0.95]).double()
    for neuron, current in ((SpikingRectifiedLinear(), 50.0), (LIF(), 2.0)):
        spikes = simulate(neuron, torch.full((1000, 3), current).double(), voltage)
        first = (spikes > 0).double().argmax(0)
        assert first[0] > first[1] > first[2]
        assert (spikes.sum(0) * DT).max() - (spikes.sum(0) * DT).min() <= 1


def test_several_spikes_a_step():
    spikes = simulate(SpikingRectifiedLinear(), torch.full((4, 1), 2500.0).double())
    assert (spikes.flatten() * DT).tolist() == [2, 3, 2, 3]


def test_izhikevichs_surrogate_is_near_its_rate():
    """About 2 J Hz, starting at J = 3.8."""
    currents = torch.tensor([2.0, 6.0, 10.0, 14.0]).double()
    rates = simulate(Izhikevich(), currents.expand(2000, -1))[500:].mean(0)
    assert rates[0] == 0
    assert (rates - 2 * currents).abs()[1:].max() < 2.5, rates


# ---- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neuron", "currents"),
    [
        (RectifiedLinear(), (-200.0, -0.01, 0.01, 200.0)),
        (LIFRate(), (-3.0, 1.4, 2.0, 5.0, 20.0)),
        (LIFRate(tau_rc=0.05, tau_ref=0.004), (-3.0, 1.4, 5.0)),
    ],
)
def test_gradient_is_that_of_the_rate(neuron, currents):
    current, step = torch.tensor(currents).double(), 1e-6
    up, down = (neuron.step(current + shift, (), DT)[0] for shift in (step, -step))
    torch.testing.assert_close(neuron.rate_gradient(current, ()), (up - down) / (2 * step), rtol=1e-5, atol=1e-4)


def test_gradient_is_finite_at_the_threshold():
    """The rate's own derivative is infinite there. The surrogate is 0 far below and has its peak near the threshold."""
    current = torch.linspace(-40, 3, 4301).double()
    gradient = LIFRate().rate_gradient(current, ())
    assert gradient.isfinite().all() and (gradient >= 0).all() and gradient[current < 0].max() < 1e-6
    assert 0.9 < current[gradient.argmax()] < 1.1


@pytest.mark.parametrize("spiking", [neuron for neuron in NEURONS.values() if neuron.spiking and neuron != Izhikevich])
def test_spiking_neurons_have_their_rates_gradient(spiking):
    current = torch.linspace(-2, 6, 50).double()
    voltage = torch.rand(50).double()
    neuron = spiking()
    rate = rate_counterpart(neuron)
    want = rate.rate_gradient(current, rate.initial_state(current))
    assert torch.equal(neuron.rate_gradient(current, neuron.initial_state(current, voltage)), want)


@pytest.mark.parametrize("kind", [AdaptiveLIF, AdaptiveLIFRate])
def test_gradient_is_taken_at_the_adapted_current(kind):
    current, adaptation = torch.tensor([2.0, 3.0]).double(), torch.tensor([0.25, 1.5]).double()
    state = (*kind().initial_state(current)[:-1], adaptation)
    assert torch.equal(kind().rate_gradient(current, state), LIFRate().rate_gradient(current - adaptation, ()))


@pytest.mark.parametrize("name", NEURONS)
def test_fire_step(name):
    neuron = NEURONS[name]()
    current = (torch.randn(3, 7).double() * 5 + 3).requires_grad_()
    state = tuple(value.clone().requires_grad_() for value in neuron.initial_state(current.detach()))
    detached = tuple(value.detach() for value in state)
    incoming = torch.randn(3, 7).double()
    output, *after = FireStep.apply(current, neuron, DT, *state)
    want, want_after = neuron.step(current.detach(), detached, DT)
    assert torch.equal(output, want)
    assert all(torch.equal(found, value) for found, value in zip(after, want_after, strict=True))
    assert not any(value.requires_grad for value in after)
    output.backward(incoming)
    assert torch.equal(current.grad, incoming * neuron.rate_gradient(current.detach(), detached))
    assert all(value.grad is None for value in state)


# ---- counterparts --------------------------------------------------------------------------------------


def test_rate_counterparts():
    kinds = {name: type(rate_counterpart(NEURONS[name]())).__name__ for name in NEURONS if name != "Izhikevich"}
    assert kinds == {
        "RectifiedLinear": "RectifiedLinear", "SpikingRectifiedLinear": "RectifiedLinear",
        "LIFRate": "LIFRate", "LIF": "LIFRate",
        "AdaptiveLIFRate": "AdaptiveLIFRate", "AdaptiveLIF": "AdaptiveLIFRate",
    }  # fmt: skip
    with pytest.raises(UserError, match="Izhikevich has no rate-based counterpart; take train_mode spiking"):
        rate_counterpart(Izhikevich())


@pytest.mark.parametrize(
    ("neuron", "rate"),
    [
        (LIF(tau_rc=0.05, tau_ref=0.004, softness=0.1), LIFRate(tau_rc=0.05, tau_ref=0.004, softness=0.1)),
        (AdaptiveLIF(tau_n=0.2, inc_n=0.05), AdaptiveLIFRate(tau_n=0.2, inc_n=0.05)),
    ],
)
def test_a_counterpart_has_the_same_constants(neuron, rate):
    assert rate_counterpart(neuron) == rate


# ---- synapse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.001, 0.005, 0.1])
def test_lowpass_is_its_step_loop(tau):
    x = torch.randn(50, 3, 2).double().requires_grad_()
    decay = math.exp(-DT / tau) if tau else 0.0
    value, steps = torch.zeros(3, 2).double(), []
    for step in x:
        value = decay * value + (1 - decay) * step
        steps.append(value)
    found, want, incoming = Lowpass(tau)(x), torch.stack(steps), torch.randn(50, 3, 2).double()
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(output, x, incoming)[0] for output in (found, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
