"""Neurons of SpikingJelly by name: what they compute, what is refused, and what is passed on."""

import copy

import pytest
import torch

from models import ReSpike
from models.kernels.parameters import LIFParameters
from models.kernels.surrogates import SURROGATES
from models.neurons import LIF
from models.spikingjelly_neurons import SpikingJellyNeuron, neuron_factory, spikingjelly_names
from models.streaming import StreamState, start_segment
from tests.helpers.spikingjelly import skip_without_spikingjelly
from utils.energy import count_operations, own_neurons
from utils.errors import UserError
from utils.training.metrics import FiringRates, learned_by_neurons


@pytest.fixture(autouse=True, scope="module")
def installed():
    skip_without_spikingjelly()


def make(name: str, parameters=LIFParameters(), steps: int = 3, **arguments) -> SpikingJellyNeuron:
    return neuron_factory(f"sj.{name}", parameters, "reference", arguments, steps)()


def currents(steps: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(steps, batch, 4, 5, 3, dtype=torch.float64) * 2


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_its_lif_is_this_projects(surrogate):
    """Spikes and gradients, with tau, surrogate and alpha as the flags give them."""
    parameters, x = LIFParameters(tau=1.7, surrogate=surrogate, alpha=1.3, v_threshold=0.8), currents(5)
    weights = torch.randn_like(x)
    theirs = make("LIFNode", parameters, 5, detach_reset=True, v_threshold=0.8)
    results = []
    for neuron in (theirs, LIF(parameters, "reference")):
        current = x.clone().requires_grad_()
        spikes = neuron(current)
        results.append((spikes.detach(), *torch.autograd.grad(spikes, current, weights)))
    assert 0.1 < results[0][0].mean() < 0.9
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


NAMES = ("ActivationAwareIFNode", "EIFNode", "IFNode", "IzhikevichNode", "KLIFNode", "LIFNode", "MaskedPSN (k)", "PSN",
         "ParametricLIFNode", "QIFNode", "SimpleLIFNode (decay_input)", "SlidingPSN (k)")  # fmt: skip


def test_the_names_that_work():
    found = set(spikingjelly_names())
    assert found >= {f"sj.{name}" for name in NAMES}
    for name in ("BaseNode", "TernaryLIFNode", "DSRLIFNode", "OTTTLIFNode", "NonSpikingLIFNode", "ILIFNode"):
        assert f"sj.{name}" not in found


@pytest.mark.parametrize("name", NAMES)
def test_state_does_not_outlive_a_call_and_parameters_are_learned(name):
    name, _, needed = name.partition(" ")
    neuron = make(name, **({"(k)": {"k": 2}, "(decay_input)": {"decay_input": False}}[needed] if needed else {}))
    neuron, x = neuron.double(), currents()
    neuron.count_spikes = True
    first = neuron(x.requires_grad_())
    assert neuron.spike_sum == first.sum() and neuron.neuron_steps == x.numel()
    neuron(currents(batch=3))  # of another size
    assert torch.equal(neuron(x), first) and torch.equal(copy.deepcopy(neuron)(x), first)
    first.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert all(parameter.grad is not None for parameter in neuron.parameters())
    assert neuron(x.detach().bfloat16().float().double()).dtype == x.dtype


def test_currents_in_half_precision():
    for name in ("ParametricLIFNode", "PSN", "IFNode"):
        with torch.autocast("cpu", torch.bfloat16):
            spikes = make(name)(currents().bfloat16())
        assert spikes.dtype == torch.bfloat16 and ((spikes == 0) | (spikes == 1)).all()


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("sj.Nothing", {}, "no neuron of this name"),
        ("sj.torch", {}, "no neuron of this name"),
        ("izhikevich", {}, "expected lif or sj.NAME"),
        ("lif", {"tau": 2.0}, "tau=2.0: are for neurons of SpikingJelly"),
        ("sj.BaseNode", {}, "does not work on currents of all time steps .*NotImplementedError"),
        ("sj.OTTTLIFNode", {}, "use single-step mode"),
        ("sj.TernaryIFNode", {}, "not 0 and 1"),
        ("sj.DSRLIFNode", {}, "not 0 and 1"),
        ("sj.NonSpikingIFNode", {}, "does not return a spike for each current"),
        ("sj.LIAFNode", {"threshold_related": True}, "argument act is neither a number nor a word"),
        ("sj.SlidingPSN", {}, "needs --neuron-args k=..."),
        ("sj.IFNode", {"tua": 2.0}, "has no argument of this name; it has v_threshold, v_reset"),
        ("sj.IFNode", {"step_mode": "s"}, "is set by the network"),
        ("sj.LIFNode", {"v_threshold": "high"}, "with v_threshold='high'.*: cannot be made"),
        ("sj.PSN", {"T": 16}, r"T=16: is the number of time steps, 3 \(--stride - 1\)"),
        ("sj.NoisyBaseNode", {"num_node": 4}, "does not work on currents"),
    ],
)
def test_what_cannot_work_is_refused_by_name_with_the_reason(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        neuron_factory(name, LIFParameters(), "reference", arguments, 3)
    assert (arguments.keys() & {"tua", "step_mode", "T"} or name in str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, parameters, arguments, about",
    [
        ("IFNode", {"tau": 2.0}, {}, "tau"),
        ("PSN", {"tau": 2.0}, {}, "tau"),
        ("GatedLIFNode", {"tau": 2.0}, {}, "tau"),  # its init_tau is a decay between 0 and 1
        ("LIFNode", {"tau": 2.0}, {"tau": 3.0}, "tau"),
    ],
)
def test_tau_is_refused_where_the_neuron_has_none(name, parameters, arguments, about):
    with pytest.raises(UserError, match=r"leave it at 1\.33") as caught:
        make(name, LIFParameters(**parameters), **arguments)
    assert caught.value.about == about


def test_a_surrogate_is_refused_where_the_neuron_has_none(monkeypatch):
    from spikingjelly.activation_based import neuron

    class Fixed(neuron.IFNode):
        def __init__(self, v_threshold: float = 1.0, step_mode: str = "m"):
            super().__init__(v_threshold, step_mode=step_mode)

    Fixed.__module__ = neuron.__name__
    monkeypatch.setattr(neuron, "Fixed", Fixed, raising=False)
    assert make("Fixed").name == "sj.Fixed"
    with pytest.raises(UserError, match=r"has no surrogate to choose; leave them at atan, 2\.0") as caught:
        make("Fixed", LIFParameters(alpha=3.0))
    assert caught.value.about == "surrogate"


def test_what_is_passed_on():
    node = make("ParametricLIFNode", LIFParameters(tau=1.6, surrogate="sigmoid", alpha=3.0), v_reset=None).node
    assert 1 / node.w.sigmoid().item() == pytest.approx(1.6) and node.v_reset is None and node.step_mode == "m"
    assert type(node.surrogate_function).__name__ == "Sigmoid" and node.surrogate_function.alpha == 3.0
    assert make("ParametricLIFNode", init_tau=3.0).learned() == {"tau": pytest.approx(3.0)}
    assert make("PSN", steps=7).node.weight.shape == (7, 7)


def network(neuron_type: str, **more) -> ReSpike:
    return ReSpike(num_classes=3, stride=4, branches="snn", neuron_type=neuron_type, **more)


def test_a_network_learns_its_time_constants():
    model = network("sj.ParametricLIFNode", neuron_args={"v_threshold": 0.5})
    assert model.snn.stages[3][1].lif2.node.v_threshold == 0.5
    before = learned_by_neurons(model)
    assert before == {"neuron_tau": {f"stage{number}": pytest.approx(4 / 3) for number in range(1, 5)}}
    assert "snn.stages.0.0.lif1.node.w" in model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with FiringRates(model.train()) as rates:
        model(torch.randn(2, 2, 3, 32, 32), torch.randn(2, 2, 3, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert min(rates.per_layer()) > 0
    after = learned_by_neurons(model)["neuron_tau"]
    assert all(after[stage] != pytest.approx(tau, abs=1e-6) for stage, tau in before["neuron_tau"].items())
    assert learned_by_neurons(network("lif")) == {}


def test_energy_counts_the_network_and_not_the_neurons_own_products():
    """A PSN is a product of matrices. FlopCounterMode must not find it, and the operations are those of LIF."""
    model = network("sj.PSN")
    assert count_operations(model, 8, 64) == count_operations(network("lif"), 8, 64)
    assert own_neurons(model) == ["sj.PSN"] and own_neurons(network("lif")) == []


def test_a_stream_has_none():
    with pytest.raises(UserError, match=r"lif neurons only; this network has sj\.IFNode"):
        start_segment(network("sj.IFNode").eval(), torch.zeros(1, 3, 32, 32), StreamState(1))
