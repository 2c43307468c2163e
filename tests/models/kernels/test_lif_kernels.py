"""The Triton LIF layer against the definition and SpikingJelly: in Triton's interpreter, on a GPU natively."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.kernels import operators
from models.kernels.parameters import LIFParameters
from models.kernels.reference import lif_definition
from models.kernels.surrogates import SURROGATES
from models.neurons import LIF, lif
from tests.helpers.spikingjelly import skip_without_spikingjelly

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Of the largest value; the interpreter cuts bfloat16 off where a GPU rounds.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RESETS = [(0.0, True), (0.0, False), (-0.3, True), (-0.3, False), (None, True), (None, False)]


def channels_last(x):
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def random(shape, dtype, layout="contiguous", scale=1.0):
    """In every layout the same numbers."""
    x = (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype)
    if layout == "channels last":
        return channels_last(x)
    return x if layout == "contiguous" else torch.stack([x, x], dim=-1)[..., 0]


def run(function, current, v0, grad_spikes, grad_v):
    current, v0 = current.detach().requires_grad_(), v0.detach().requires_grad_()
    spikes, v = function(current, v0)
    torch.autograd.backward([spikes, v], [grad_spikes, grad_v.to(v.dtype)])
    return spikes.detach(), v.detach(), current.grad, v0.grad


def assert_close(got, want, dtype):
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("steps", [1, 3, 7, 16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_definition(dtype, layout, steps):
    shape = (steps, 2, 5, 3, 7)
    for number, (v_reset, detach) in enumerate(RESETS):
        surrogate = SURROGATES[(number + steps) % len(SURROGATES)]  # with the numbers of steps, each meets each
        neuron = dict(tau=1.7, v_threshold=0.8, alpha=1.5)
        p = LIFParameters(v_reset=v_reset, detach_reset=detach, surrogate=surrogate, **neuron)
        current = random(shape, dtype, layout, scale=2.0)
        inputs = (
            current,
            random(shape[1:], dtype),
            random(shape, dtype, "contiguous" if layout == "channels last" else "strided"),
            random(shape[1:], torch.float32),
        )
        want = run(lambda x, v: lif_definition(x, p, v), *inputs)  # noqa: B023 - called at once
        got = run(lambda x, v: lif(x, p, v, backend="triton"), *inputs)  # noqa: B023
        assert torch.equal(got[0], want[0]) and got[0].stride() == current.stride()
        for g, w in zip(got[1:], want[1:], strict=True):
            assert_close(g, w, dtype)


@pytest.mark.parametrize("shape", [(3, 4099), (2, 1, 1), (3, 0), (33, 9), (70, 9), (4,)], ids=str)
def test_odd_sizes(shape):
    """Several programs with a rest, one neuron, none, more steps than registers hold, no dimension but time."""
    p = LIFParameters(detach_reset=False)
    inputs = random(shape, torch.float64, scale=2.0), random(shape[1:], torch.float64)
    gradients = random(shape, torch.float64), random(shape[1:], torch.float64)
    want = run(lambda x, v: lif_definition(x, p, v), *inputs, *gradients)
    got = run(lambda x, v: lif(x, p, v, backend="triton"), *inputs, *gradients)
    assert torch.equal(got[0], want[0])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("surrogate", ["atan", "sigmoid"])
def test_agrees_with_spikingjelly(surrogate, v_reset):
    skip_without_spikingjelly()
    p = LIFParameters(surrogate=surrogate, v_reset=v_reset)
    current, grad = random((7, 4, 5), torch.float32, scale=2.0).requires_grad_(), random((7, 4, 5), torch.float32)
    results = []
    for backend in ("triton", "spikingjelly"):
        spikes, v = lif(current, p, backend=backend)
        results.append((spikes, v, *torch.autograd.grad(spikes, current, grad)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].any()
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_directions_decide_alike(dtype):
    """A neuron that fired in the last step passes no gradient of its membrane: the backward pass shows which ones it
    took for firing. They must be the forward pass's, however close to the threshold (2^24 of them on a GPU)."""
    neurons = 2**24 if DEVICE == "cuda" else 2**13
    current = random((4, neurons), dtype, scale=1.5).requires_grad_()
    spikes, v = lif(current, LIFParameters(tau=1.7), backend="triton")
    (grad,) = torch.autograd.grad(v.sum(), current)
    assert torch.equal(grad[-1] != 0, spikes[-1] == 0)
    assert 0.05 < spikes[-1].float().mean() < 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neuron_fires_at_the_threshold(dtype):
    ulps = torch.arange(-4, 5, dtype=torch.float64) * torch.finfo(dtype).eps
    spikes, _ = lif((2.0 * (1.0 + ulps)).to(DEVICE, dtype)[None], LIFParameters(tau=2.0), backend="triton")
    assert torch.equal(spikes[0].cpu().double(), (ulps.to(dtype) >= 0).double())


@pytest.mark.parametrize("wanted", [0, 1], ids=["spikes", "membrane"])
def test_gradient_from_one_output_alone(wanted):
    current = random((3, 2, 5), torch.float64).requires_grad_()
    gradients = []
    for out in (lif_definition(current, LIFParameters()), lif(current, LIFParameters(), None, "triton")):
        gradients += torch.autograd.grad(out[wanted].sum(), current)  # it arrives expanded, all strides zero
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-13)


def test_operators_are_well_formed():
    """torch.library.opcheck: schema, fake tensors, autograd, and tracing with dynamic shapes."""
    neuron = LIFParameters().text
    current, v0 = random((3, 2, 5), torch.float32).requires_grad_(), random((2, 5), torch.float32).requires_grad_()
    torch.library.opcheck(operators.lif.definition, (current, v0, True, neuron))
    torch.library.opcheck(operators.lif.definition, (current, None, False, neuron))
    gradients = (random((3, 2, 5), torch.float32), random((2, 5), torch.float32))
    current, v0 = current.detach(), v0.detach()
    torch.library.opcheck(operators.lif_backward.definition, (current, v0, *gradients, True, neuron))
    torch.library.opcheck(operators.lif_backward.definition, (current, None, gradients[0], None, False, neuron))


def test_compiles_without_a_graph_break():
    layer = LIF(backend="triton")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    current = random((3, 2, 5, 4, 6), torch.float32, "channels last").requires_grad_()
    weights = random(current.shape, torch.float32)
    results = [(out := f(current), *torch.autograd.grad(out, current, weights)) for f in (layer, compiled)]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_under_checkpointing_and_accumulation():
    layer, current = LIF(backend="triton"), random((3, 2, 5), torch.float32).requires_grad_()
    (plain,) = torch.autograd.grad(layer(current).sum(), current)
    for _ in range(2):
        checkpoint(layer, current, use_reentrant=False).sum().backward()
    assert torch.equal(current.grad, 2 * plain)


def test_state_of_another_type_and_layout():
    current = random((3, 2, 5, 4, 6), torch.float16, "channels last", scale=2.0)
    v0 = random(current.shape[1:], torch.float16)
    want = lif_definition(current, LIFParameters(), v0)
    got = lif(current, LIFParameters(), v0, "triton")
    assert torch.equal(got[0], want[0]) and got[1].dtype == torch.float32
    torch.testing.assert_close(got[1], want[1])
