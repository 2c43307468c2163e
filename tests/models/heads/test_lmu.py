"""The Legendre memory against keras-lmu's numbers, its parallel form against its steps."""

from pathlib import Path

import numpy
import pytest
import torch

from models.heads.lmu import LMU, RATE_HZ, LMUHead, legendre_system
from models.heads.neurons import DT, LIF, RectifiedLinear, SpikingRectifiedLinear

GOLDEN = Path(__file__).parents[2] / "golden"
CELLS = {  # inputs, units, order, theta, memory
    "lmu.order2.theta28": (6, 5, 2, 28, 1),
    "lmu.order12.theta40": (4, 8, 12, 40, 3),
}
SPIKE = 1 / (RATE_HZ * DT)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def golden():
    with numpy.load(GOLDEN / "lmu.npz") as arrays:
        yield {name: torch.from_numpy(arrays[name]).double() for name in arrays.files}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CELLS)
def test_cell_is_that_of_keras_lmu(golden, name):
    cell = LMU(*CELLS[name]).double()
    names = ("memory_encoders", "memory_recurrent", "hidden_kernel", "hidden_recurrent")
    weights = {own: golden[f"{name}.{own}"] for own in names}
    cell.load_state_dict({**weights, "A": cell.A, "B": cell.B})
    with torch.no_grad():
        hidden = cell(golden[f"{name}.x"].transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(hidden, golden[f"{name}.y"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_system_is_that_of_keras_lmu(golden, name):
    a, b = legendre_system(*CELLS[name][2:4])
    assert a.dtype == b.dtype == torch.float64
    torch.testing.assert_close(a.T, golden[f"{name}.A"], rtol=0, atol=1e-6)
    torch.testing.assert_close(b, golden[f"{name}.B"][0], rtol=0, atol=1e-6)


def test_a_memory_recalls_what_went_in(double):
    """Six numbers of state hold a window of 40 steps of a slow signal: any delay within can be read from them."""
    order, theta, steps = 6, 40, 600
    cell = LMU(1, 1, order, theta, feedback=False, recurrent=False)
    time = torch.arange(steps) / theta
    signal = torch.stack([torch.sin(2 * time * rate + rate) for rate in (0.6, 1.1, 1.7)]).sum(0)
    memories = cell._convolved(signal[:, None, None])[:, 0]
    whole = slice(2 * theta, None)
    for delay in (0, 10, 20, 40):
        delayed = signal.roll(delay)[whole, None]
        decoder = torch.linalg.lstsq(memories[whole][:260], delayed[:260]).solution
        error = (memories[whole] @ decoder - delayed)[260:].square().mean().sqrt()
        assert error < 0.02 * delayed.square().mean().sqrt(), delay
    forgotten = signal.roll(6 * theta)[whole, None]  # far outside of the window
    noise = torch.randn(steps, 1, 1)
    memories = cell._convolved(noise)[whole, 0]
    forgotten = noise.roll(3 * theta, 0)[whole, 0]
    decoder = torch.linalg.lstsq(memories, forgotten).solution
    assert (memories @ decoder - forgotten).square().mean() > 0.9 * forgotten.square().mean()


@pytest.mark.parametrize("train_system", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("steps", [1, 28, 256])
def test_parallel_form_gives_the_same(double, steps, recurrent, train_system):
    how = dict(feedback=False, recurrent=recurrent, train_system=train_system)
    cell = LMU(3, 5, order=4, theta=28.0, memory=2, **how)
    x, incoming = torch.randn(steps, 2, 3, requires_grad=True), torch.randn(steps, 2, 5)
    results = []
    for parallel in (True, False):
        cell.parallel = parallel
        hidden = cell(x)
        results.append(
            (hidden, *torch.autograd.grad(hidden, [x, *cell.parameters()], incoming, materialize_grads=True))
        )
    assert hidden.shape == (steps, 2, 5) and hidden.dtype == torch.float64
    names = {"memory_encoders", "hidden_kernel"}
    names |= ({"A", "B"} if train_system else set()) | ({"hidden_recurrent"} if recurrent else set())
    assert {name for name, _ in cell.named_parameters()} == names
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_parallel_form_is_taken_where_it_can_be(monkeypatch):
    def fail(*_):
        raise AssertionError("went step by step")

    monkeypatch.setattr(LMU, "_remember", fail)
    x = torch.randn(5, 1, 3)
    LMU(3, 5, 4, 28.0, feedback=False)(x)
    for how in (dict(feedback=True), dict(feedback=False, parallel=False)):
        with pytest.raises(AssertionError, match="step by step"):
            LMU(3, 5, 4, 28.0, **how)(x)


@pytest.mark.parametrize("feedback", [False, True])
def test_output_does_not_see_the_future(double, feedback):
    cell, x = LMU(3, 5, 4, 28.0, feedback=feedback, recurrent=feedback), torch.randn(20, 1, 3)
    changed = torch.cat([x[:12], torch.randn(8, 1, 3)])
    before, after = cell(x), cell(changed)
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-12)
    assert (before[12] - after[12]).abs().max() > 1e-3


@pytest.mark.parametrize("neuron", [SpikingRectifiedLinear(), LIF()])
@pytest.mark.parametrize("feedback", [False, True])
def test_spiking_units_give_spikes(feedback, neuron):
    cell = LMU(3, 50, 4, 28.0, neuron=neuron, feedback=feedback, recurrent=feedback)
    hidden = cell(torch.randn(28, 4, 3))
    spikes = hidden / SPIKE
    torch.testing.assert_close(spikes, spikes.round(), rtol=0, atol=1e-4)
    assert hidden.min() == 0 and spikes.round().count_nonzero() > 0
    hidden.sum().backward()
    assert all(value.grad.isfinite().all() and value.grad.count_nonzero() for value in cell.parameters())


def test_spikes_tell_the_rate():
    """A driving input of 1 gives a spike every four steps, each of height 4; its rate is 1."""
    cell = LMU(1, 2, 1, 1e9, neuron=SpikingRectifiedLinear(), feedback=False, recurrent=False)
    with torch.no_grad():
        cell.hidden_kernel.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        hidden = cell(torch.ones(40, 1, 1))[:, 0]
    torch.testing.assert_close(hidden[:, 0], torch.tensor([0.0, 0.0, 0.0, 4.0]).repeat(10))
    assert not hidden[:, 1].any()
    cell.neuron = RectifiedLinear()
    assert torch.equal(cell(torch.ones(40, 1, 1))[:, 0], torch.tensor([1.0, 0.0]).expand(40, 2))


def test_neuron_of_a_head_can_be_exchanged():
    head, x = LMUHead(3, 4, units=20, order=4, neuron=SpikingRectifiedLinear()), torch.randn(28, 2, 3)
    assert head.neuron == SpikingRectifiedLinear() and head.synapse.decay > 0
    spiking = head(x)
    head.neuron = RectifiedLinear()
    assert head.lmu.neuron == RectifiedLinear()
    rate = head(x)
    assert not torch.equal(rate, spiking)
    head.neuron = SpikingRectifiedLinear()
    assert torch.equal(head(x), spiking)  # no state is kept between calls
    assert spiking.shape == (28, 2, 4)


def test_head_without_a_neuron_reads_the_units_directly():
    head, x = LMUHead(3, 4, units=20, order=4), torch.randn(28, 2, 3)
    assert torch.equal(head(x), head.readout(head.lmu(x)))
    assert head.lmu(x).abs().max() < 1


@pytest.mark.parametrize("feedback", [False, True])
def test_feedback_of_a_head(feedback):
    lmu = LMUHead(3, 4, units=20, order=4, memory=2, feedback=feedback).lmu
    assert (lmu.memory_recurrent is not None) == (lmu.hidden_recurrent is not None) == feedback
    assert lmu.memory_encoders.shape == (23 if feedback else 3, 2)
