"""Every LIF implementation against the definition, and the definition against SpikingJelly."""

import math

import pytest
import torch

from models.kernels.parameters import LIFParameters
from models.kernels.reference import lif_definition, lif_reference
from models.kernels.surrogates import SURROGATES, surrogate_derivative
from models.neurons import BACKENDS, LIF, lif
from tests.helpers.spikingjelly import skip_without_spikingjelly

SHAPES = {"vector": (7, 13), "image": (4, 2, 6, 5, 7), "one step": (1, 2, 3, 5, 5), "no neurons": (3, 0)}


def make_current(shape, layout="contiguous", dtype=torch.float64):
    current = (torch.randn(shape, dtype=torch.float64) * 2).to(dtype)
    if layout == "channels last":
        current = current.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    elif layout == "strided":
        current = torch.stack([current, -current], dim=-1)[..., 0].transpose(-1, -2)
    return current


def run(function, current, parameters, v0, grad_spikes, grad_v):
    current, v0 = current.detach().requires_grad_(), v0.detach().requires_grad_()
    spikes, v = function(current, parameters, v0)
    torch.autograd.backward([spikes, v], [grad_spikes, grad_v.to(v.dtype)])
    return spikes.detach(), v.detach(), current.grad, v0.grad


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_reference_agrees_with_the_definition(surrogate, v_reset, detach_reset, layout):
    parameters = LIFParameters(surrogate=surrogate, v_reset=v_reset, detach_reset=detach_reset)
    current = make_current(SHAPES["image"], layout)
    v0 = torch.randn(current.shape[1:], dtype=torch.float64)
    grad_spikes = torch.randn(current.shape, dtype=torch.float64).transpose(-1, -2).contiguous().transpose(-1, -2)
    grad_v = torch.randn(current.shape[1:], dtype=torch.float64)
    want = run(lif_definition, current, parameters, v0, grad_spikes, grad_v)
    got = run(lif_reference, current, parameters, v0, grad_spikes, grad_v)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2:], want[2:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_reference_in_lower_precision(shape, dtype):
    current = make_current(shape, dtype=dtype)
    v0, grad_v = torch.randn(current.shape[1:]).to(dtype), torch.randn(current.shape[1:])
    grad_spikes = torch.randn(current.shape).to(dtype)
    want = run(lif_definition, current, LIFParameters(), v0, grad_spikes, grad_v)
    got = run(lif_reference, current, LIFParameters(), v0, grad_spikes, grad_v)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    torch.testing.assert_close(got[2:], want[2:])


def test_chunks_do_not_show(monkeypatch):
    monkeypatch.setattr("models.kernels.reference._CPU_CHUNK_NEURONS", 16)
    current = make_current(SHAPES["image"])
    v0, grad_v = torch.randn(current.shape[1:]).double(), torch.randn(current.shape[1:]).double()
    grad_spikes = torch.randn(current.shape).double()
    want = run(lif_definition, current, LIFParameters(), v0, grad_spikes, grad_v)
    got = run(lif_reference, current, LIFParameters(), v0, grad_spikes, grad_v)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("surrogate", ["atan", "sigmoid"])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_definition_agrees_with_spikingjelly(surrogate, v_reset, detach_reset):
    skip_without_spikingjelly()
    parameters = LIFParameters(surrogate=surrogate, v_reset=v_reset, detach_reset=detach_reset)
    current = make_current(SHAPES["image"]).requires_grad_()
    grad = torch.randn(current.shape, dtype=torch.float64)
    results = []
    for backend in ("reference", "spikingjelly"):
        spikes, v = lif(current, parameters, backend=backend)
        (grad_current,) = torch.autograd.grad(spikes, current, grad)
        results.append((spikes, v, grad_current))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("surrogate", ["atan", "sigmoid"])
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_gradcheck_of_the_definition_with_a_smooth_spike(surrogate, v_reset):
    """With the step replaced by a smooth function, numerical and analytical gradients must agree."""

    def smooth(z, surrogate, alpha):
        if surrogate == "atan":
            return torch.atan(math.pi / 2 * alpha * z) / math.pi + 0.5
        return torch.sigmoid(alpha * z)

    parameters = LIFParameters(surrogate=surrogate, v_reset=v_reset, detach_reset=False)
    current = (torch.randn(4, 5, dtype=torch.float64) * 2).requires_grad_()
    v0 = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: lif_definition(x, parameters, v, spike=smooth), (current, v0))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_derivatives_are_densities(surrogate, alpha):
    """Each is even, positive at zero, and integrates to 1: the primitive rises from 0 to 1."""
    z = torch.linspace(-4000, 4000, 4_000_001, dtype=torch.float64)
    derivative = surrogate_derivative(z.clone(), surrogate, alpha)
    assert derivative.min() >= 0
    torch.testing.assert_close(derivative, derivative.flip(0))
    assert torch.trapezoid(derivative, z).item() == pytest.approx(1.0, abs=2e-4)


def test_published_surrogate():
    h = torch.tensor([0.2, 1.0, 1.7], dtype=torch.float64)
    want = 1 / (1 + (math.pi * (h - 1)) ** 2)
    torch.testing.assert_close(surrogate_derivative(h - 1, "atan", 2.0), want)


def test_a_neuron_by_hand():
    """tau 4/3: three quarters of the input and a quarter of what is left; threshold 1; reset to 0."""
    current = torch.tensor([[1.0], [1.0], [1.2], [1.2], [4 / 3]], dtype=torch.float64)
    spikes, v = lif(current, LIFParameters())
    # h: 0.75, 0.9375, 1.134 -> spike, 0.9, 1.225 -> spike
    assert spikes.flatten().tolist() == [0, 0, 1, 0, 1]
    assert v.item() == 0


def test_state_does_not_outlive_a_call():
    layer, current = LIF(), torch.full((3, 4), 0.9)
    assert torch.equal(layer(current), layer(current))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 64, 56, 56), (2, 1_300_001)], ids=str)
def test_spikes_are_counted_exactly_and_without_a_copy_of_the_layer(shape, dtype):
    layer, spikes = LIF(), make_current(shape, "channels last" if len(shape) == 5 else "contiguous").gt(0).to(dtype)
    layer.count_spikes = True
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer.counted(spikes)
    assert layer.spike_sum.item() == spikes.count_nonzero().item() and layer.neuron_steps.item() == spikes.numel()
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < most <= 3 * 4 * 2**18 < spikes.numel() * spikes.element_size()


def test_without_gradient_for_the_state():
    current = make_current(SHAPES["image"]).requires_grad_()
    spikes, _ = lif(current, LIFParameters())
    spikes.sum().backward()
    assert current.grad.isfinite().all()
    current.grad = None
    _, v = lif(current, LIFParameters())
    v.sum().backward()  # nobody asks for the spikes
    assert current.grad.isfinite().all()


def test_compiled_layer_agrees():
    layer = LIF()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    current = make_current(SHAPES["image"]).requires_grad_()
    for function in (layer, compiled):
        spikes = function(current)
        (grad,) = torch.autograd.grad(spikes.sum(), current)
        if function is layer:
            want = spikes, grad
    assert torch.equal(spikes, want[0])
    torch.testing.assert_close(grad, want[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lif(torch.zeros(3, 2), LIFParameters(), backend="cuda"), "reference"),
        (lambda: lif(torch.zeros(0, 2), LIFParameters()), "at least|S >= 1"),
        (lambda: lif(torch.zeros(3, 2), LIFParameters(), v0=torch.zeros(3)), "v0 must be"),
        (lambda: lif(torch.zeros(3, 2, dtype=torch.int64), LIFParameters()), "floating point"),
        (lambda: LIFParameters(tau=0.5), "tau"),
        (lambda: LIFParameters(surrogate="step"), "triangle"),
        (lambda: LIFParameters(v_reset=1.0), "v_reset"),
        (lambda: LIFParameters(alpha=0.0), "alpha"),
        (lambda: LIFParameters(tau=math.inf), "tau must be finite"),
        (lambda: LIFParameters(alpha=math.nan), "alpha must be finite"),
        (lambda: LIFParameters(v_threshold=math.nan, v_reset=None), "v_threshold must be finite"),
        (lambda: LIFParameters(v_reset=-math.inf), "v_reset must be finite"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_all_known(backend):
    skip_without_spikingjelly(backend)
    spikes, v = lif(torch.ones(2, 3), LIFParameters(), backend=backend)
    assert spikes.shape == (2, 3) and v.shape == (3,)
