"""Batch norm with residual and LIF in one pass, against the definitions: in Triton's interpreter, on a GPU natively."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.batch_norm import BATCH_NORMS, FrameBatchNorm2d, StepBatchNorm2d
from models.kernels import operators, triton_batch_norm
from models.kernels.parameters import LIFParameters
from models.kernels.reference import batch_norm_definition, lif_definition
from models.neurons import BACKENDS, LIF
from tests.models.kernels.test_lif_kernels import DEVICE, DTYPES, assert_close, channels_last, random

pytestmark = pytest.mark.kernels
EPS = 1e-5
# What is behind the batch norm: (residual, sum kept, neurons)
PATTERNS = {
    "neurons": (False, False, True), "residual and neurons": (True, True, True),
    "neurons, sum kept": (False, True, True), "residual": (True, True, False), "nothing": (False, True, False),
}  # fmt: skip


class _Silent(LIF):
    """Neurons that never fire, with a gradient of their own."""

    def forward(self, current):
        return self.counted(current * 0.0)


def fused(x, weight, bias, residual, merged, keep_sum, fire, p):
    with torch.no_grad():
        mean, variance = operators.moments(x.flatten(0, 1)[None] if merged else x)
    how = (None, EPS, True, keep_sum, fire, False, False, p.text)
    return operators.batch_norm(x, mean, variance, weight, bias, residual, *how)


def defined(x, weight, bias, residual, merged, keep_sum, fire, p):
    total = batch_norm_definition(x, weight, bias, residual, EPS, merged)
    # Where the sum is not kept the neuron sees it before it is rounded.
    seen = total if keep_sum else batch_norm_definition(x.to(weight.dtype), weight, bias, None, EPS, merged)
    spikes, _ = lif_definition(seen, p)
    return total, spikes.to(x.dtype)


def run(function, inputs, merged, keep_sum, fire, p, gradients):
    """(sum, spikes, gradients of x, weight, bias, residual); None for what there is not."""
    inputs = [None if value is None else value.detach().requires_grad_() for value in inputs]
    outputs = function(*inputs, merged, keep_sum, fire, p)
    asked = [(out, grad) for out, grad, on in zip(outputs, gradients, (keep_sum, fire), strict=True) if on]
    torch.autograd.backward([out for out, _ in asked], [grad.to(out.dtype) for out, grad in asked])
    kept = [out.detach() if on else None for out, on in zip(outputs, (keep_sum, fire), strict=True)]
    return kept + [None if value is None else value.grad for value in inputs]


def make(shape, dtype, layout, residual):
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    x = random(shape, dtype, layout, scale=2.0) + 0.5
    weight, bias = random((shape[2],), statistics) * 0.3 + 1.5, random((shape[2],), statistics)
    return x, weight, bias, random(shape, dtype, layout) if residual else None


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_definition(dtype, layout, pattern):
    residual, keep_sum, fire = PATTERNS[pattern]
    resets = itertools.cycle([(0.0, True), (-0.3, False), (None, False)])
    for steps in (1, 3, 7, 16) if fire else (1, 3):
        merged = (steps in (3, 16)) == (layout == "contiguous")
        v_reset, detach = next(resets)
        p = LIFParameters(v_reset=v_reset, detach_reset=detach, tau=1.7, v_threshold=0.8, alpha=1.5)
        shape = (steps, 2, 3, 3, 7)
        inputs = make(shape, dtype, layout, residual)
        other = "contiguous" if layout == "channels last" else "strided"
        gradients = random(shape, dtype, other), random(shape, dtype, other)
        want = run(defined, inputs, merged, keep_sum, fire, p, gradients)
        got = run(fused, inputs, merged, keep_sum, fire, p, gradients)
        if fire:
            differ = got[1] != want[1]
            # Rounded to half precision, a sum next to the threshold may fall on either side of it.
            assert differ.sum() <= (0 if dtype in (torch.float64, torch.float32) else 2 * steps)
            if differ.any():
                continue
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                assert_close(g, w.to(g.dtype), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(3, 2, 70, 5, 9), (2, 1, 3, 50, 50), (2, 3, 1, 4, 4), (33, 1, 4, 2, 2)], ids=str)
def test_odd_sizes(shape, layout):
    """More channels than a tile has, several tiles with a rest, one channel, more steps than registers hold."""
    norm = StepBatchNorm2d(shape[2], backend="triton").double().to(DEVICE).train()
    neurons = LIF(backend="triton")
    x, weight, bias, residual = make(shape, torch.float64, layout, True)
    residual = residual.transpose(-1, -2).contiguous().transpose(-1, -2)  # in a layout of its own
    gradients = random(shape, torch.float64), random(shape, torch.float64)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    results = []
    for function in (
        lambda x, r: norm(x, r, neurons),
        lambda x, r: defined(x, weight, bias, r, False, True, True, neurons.parameters_),
    ):
        a, b = x.detach().requires_grad_(), residual.detach().requires_grad_()
        total, spikes = function(a, b)
        torch.autograd.backward([total, spikes], gradients)
        results.append((total.detach(), spikes.detach(), a.grad, b.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_sum_is_averaged_over_windows_and_the_neurons_see_all_of_it(dtype, layout, fires):
    """Several tiles with a rest; gradients by way of both outputs."""
    shape, p = (3, 3, 5, 10, 14), LIFParameters(tau=1.7, detach_reset=False)
    x, weight, bias, _ = make(shape, dtype, layout, False)
    pooled = (*shape[:3], 5, 7)
    gradients = random(pooled, dtype, "strided"), random(shape, dtype, "strided")

    def fused_and_pooled(x, weight, bias, residual, merged, keep_sum, fire, p):
        with torch.no_grad():
            mean, variance = operators.moments(x)
        how = (None, EPS, True, True, fire, False, True, p.text)
        return operators.batch_norm(x, mean, variance, weight, bias, None, *how)

    def defined_and_pooled(x, weight, bias, residual, merged, keep_sum, fire, p):
        exact = x.to(weight.dtype)
        total, spikes = defined(exact, weight, bias, None, False, False, True, p)
        return F.avg_pool2d(total.flatten(0, 1), 2).unflatten(0, x.shape[:2]).to(x.dtype), spikes.to(x.dtype)

    inputs = (x, weight, bias, None)
    want = run(defined_and_pooled, inputs, False, True, fires, p, gradients)
    got = run(fused_and_pooled, inputs, False, True, fires, p, gradients)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert_close(g, w.to(g.dtype), dtype)
    with pytest.raises(ValueError, match="H and W even"):
        fused_and_pooled(x[..., :9, :], weight, bias, None, False, True, fires, p)
    with pytest.raises(ValueError, match="not pool"):
        operators.batch_norm(
            x, weight[None], weight[None], weight, bias, x, None, EPS, True, True, True, False, True, p.text
        )


@pytest.mark.parametrize("neuron", [LIF, _Silent, None], ids=str)
def test_both_backends_pool_alike(neuron):
    x = random((2, 2, 5, 4, 6), torch.float64, "channels last")
    results = []
    for backend in ("triton", "reference"):
        norm = StepBatchNorm2d(5, backend=backend).double().to(DEVICE).train()
        results.append(norm(x, neuron=None if neuron is None else neuron(backend=backend), pool=True))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_behind_a_residual_and_without(dtype, with_residual, relu, training):
    """Several tiles with a rest, as in the ResNet of the ANN branch; against PyTorch's operators in float32 or more."""
    x, weight, bias, residual = make((1, 3, 70, 9, 7), dtype, "channels last", with_residual)
    grad = random(x[0].shape, dtype, "strided")
    results = []
    for backend in ("triton", "reference"):
        norm = FrameBatchNorm2d(70, backend).to(DEVICE, weight.dtype).train(training)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        inputs = [None if value is None else value[0].detach().requires_grad_() for value in (x, residual)]
        wide = backend == "reference"
        given = [value.to(weight.dtype) if wide and value is not None else value for value in inputs]
        out = norm(*given, relu=relu)
        out.backward(grad.to(out.dtype))
        grads = [value.grad for value in (*inputs, norm.weight, norm.bias) if value is not None]
        results.append([out.detach().to(dtype), *grads, *norm.buffers()])
    assert (results[0][0] == 0).any() == relu
    for got, want in zip(*results, strict=True):
        assert_close(got, want, dtype)


def test_relu_lets_nan_through():
    """A loss that is not finite must be seen."""
    x = random((4, 3, 4, 4), torch.float32)
    x[0, 1, 2, 3] = float("nan")
    out = FrameBatchNorm2d(3, "triton").to(DEVICE).eval()(x, relu=True)
    assert out.isnan().sum() == 1


def test_relu_goes_with_neither_neurons_nor_pool():
    x, weight, bias, _ = make((1, 2, 3, 4, 4), torch.float32, "channels last", False)
    for fire, pool in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="neither"):
            operators.batch_norm(
                x, weight[None], weight[None], weight, bias, None, None, EPS, True, True, fire, True, pool,
                LIFParameters().text,
            )  # fmt: skip


def test_statistics_far_from_zero():
    """A mean 10,000 deviations away leaves the variance as it is: nothing is taken off a mean of squares."""
    x = (random((2, 4, 5, 9, 9), torch.float64) + 1e4).float()
    mean, variance = operators.moments(channels_last(x))
    torch.testing.assert_close(mean.double(), x.double().mean((1, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var((1, 3, 4), correction=0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_statistics_and_sums_of_many_programs(monkeypatch, layout):
    """Tiles are shared between programs, the last of which has fewer rows than the others."""
    monkeypatch.setattr(triton_batch_norm, "PROGRAMS_OF_MOMENTS", 10)
    monkeypatch.setattr(triton_batch_norm, "PROGRAMS_OF_SUMS", 3)
    monkeypatch.setattr(triton_batch_norm, "PARTIALS_AT_ONCE", 2)
    monkeypatch.setattr(triton_batch_norm, "WARPS", 2)
    x, weight, bias, _ = make((2, 3, 5, 31, 37), torch.float64, layout, False)
    mean, variance = operators.moments(x)
    torch.testing.assert_close(mean, x.mean((1, 3, 4)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(variance, x.var((1, 3, 4), correction=0), rtol=1e-12, atol=0)
    gradients = random(x.shape, torch.float64), random(x.shape, torch.float64)
    inputs = (x, weight, bias, None)
    want = run(defined, inputs, False, True, True, LIFParameters(), gradients)
    got = run(fused, inputs, False, True, True, LIFParameters(), gradients)
    for g, w in zip(got, want, strict=True):
        assert g is None or assert_close(g, w, torch.float64) is None


@pytest.mark.parametrize("mode", BATCH_NORMS)
def test_running_statistics_are_those_of_the_plain_module(mode):
    """More channels than a program of the statistics has; each step differs. Then evaluation by them: of all steps, and
    of the last one alone, as in a stream."""
    shape = (3, 2, 21, 4, 6)
    batches = [random(shape, torch.float64) * 2.0**number + number for number in range(2)]
    for x in batches:
        x *= torch.arange(1, 4, device=DEVICE)[:, None, None, None, None]
    norms = [StepBatchNorm2d(21, mode, backend, 3).double().to(DEVICE) for backend in ("triton", "reference")]
    for norm in norms:
        for x in batches:
            norm.train()(x)
    for name, value in norms[0].named_buffers():
        torch.testing.assert_close(value, norms[1].get_buffer(name), rtol=1e-12, atol=1e-13)
    for first in (0, 2):
        fused, plain = (norm.eval()(batches[0][first:], first_step=first)[0] for norm in norms)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_evaluation_with_gradients():
    """Fixed statistics are no function of x."""
    x = random((3, 2, 5, 4, 6), torch.float64, "channels last")
    weights = random(x.shape, torch.float64)
    results = []
    for backend in ("triton", "reference"):
        norm = StepBatchNorm2d(5, backend=backend).double().to(DEVICE).eval()
        norm.running_mean += 0.3
        inputs = x.detach().requires_grad_()
        _, spikes = norm(inputs, neuron=LIF(backend=backend), spikes_only=True)
        results.append(torch.autograd.grad(spikes, [inputs, norm.weight, norm.bias], weights))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


def test_operators_are_well_formed():
    neuron = LIFParameters().text
    x, weight, bias, residual = make((3, 2, 5, 4, 4), torch.float32, "channels last", True)
    mean, variance = operators.moments(x)
    layer = (x, mean, variance, weight, bias)
    torch.library.opcheck(operators.moments.definition, (x,))
    running = torch.zeros_like(weight), torch.ones_like(weight), torch.zeros((), dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(operators.moments_and_running.definition, (x, *running, 0.1))
    each = torch.zeros_like(mean), torch.ones_like(mean), running[2]
    torch.library.opcheck(operators.moments_and_running.definition, (x, *each, 0.1))
    # PyTorch 2.11 cannot call an operator that writes to an argument with a default.
    arguments = torch.ops.respike.moments_and_running.default._schema.arguments
    assert not any(argument.has_default_value() for argument in arguments)
    differentiable = [value.detach().requires_grad_() for value in (x, weight, bias, residual)]
    x_, weight_, bias_, residual_ = differentiable
    for pattern in (
        (residual_, None, EPS, True, True, True, False, False),
        (None, None, EPS, True, True, True, False, True),
        (residual_, None, EPS, True, True, False, True, False),
    ):
        torch.library.opcheck(operators.batch_norm.definition, (x_, mean, variance, weight_, bias_, *pattern, neuron))
    plain = (EPS, True, False, False, neuron)
    torch.library.opcheck(operators.batch_norm_backward_sums.definition, (*layer, x, x, x, *plain))
    weighted = torch.ones(3, 2, 5, device=DEVICE)
    torch.library.opcheck(operators.batch_norm_backward_input.definition, (*layer, None, x, weighted, None, *plain))


def test_compiles_without_a_graph_break():
    x = random((3, 2, 5, 4, 6), torch.float32, "channels last").requires_grad_()
    residual, weights = random(x.shape, torch.float32, "channels last"), random(x.shape, torch.float32)
    results = []
    for compile_it in (False, True):
        norm, neurons = StepBatchNorm2d(5, backend="triton").to(DEVICE).train(), LIF(backend="triton")
        function = torch.compile(norm, fullgraph=True, backend="aot_eager") if compile_it else norm
        total, spikes = function(x, residual, neurons)
        results.append((total, spikes, *torch.autograd.grad([total, spikes], x, [weights, weights]), norm.running_var))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


def test_what_is_not_asked_for_is_not_lost():
    """A residual before neurons whose sum nobody keeps: the module keeps it for the backward pass, the operator
    refuses to go without."""
    x, weight, bias, residual = make((3, 2, 3, 4, 4), torch.float64, "channels last", True)
    results = []
    for backend in ("triton", "reference"):
        norm = StepBatchNorm2d(3, backend=backend).double().to(DEVICE).train()
        inputs = [value.detach().requires_grad_() for value in (x, residual)]
        total, spikes = norm(*inputs, LIF(backend=backend), spikes_only=True)
        assert total is None
        results.append(torch.autograd.grad(spikes, [*inputs, norm.weight], x))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="keep_sum"):
        fused(x, weight, bias, residual, False, False, True, LIFParameters())


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_value_a_channel_cannot_be_normalised(backend):
    norm = StepBatchNorm2d(3, backend=backend).to(DEVICE).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.zeros(2, 1, 3, 1, 1, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_sums_are_those_the_neuron_sees(dtype):
    """Forward and backward pass decide on the same number: the sum as it is kept, rounded."""
    x, weight, bias, residual = make((1, 4, 8, 4, 4), dtype, "channels last", True)
    p = LIFParameters(tau=1.0)  # h is the sum
    # All sums next to the threshold: rounding moves many of them over it.
    weight, bias, residual = weight * 1e-3, torch.ones_like(bias), residual * 1e-3
    x.requires_grad_()
    total, spikes = fused(x, weight, bias, residual, False, True, True, p)
    assert torch.equal(spikes.bool(), total >= 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_of_lif_is_never_replaced_by_a_plain_one(backend):
    """The kernels know the equations of LIF only, so the subclass must run behind them."""
    x, _, _, residual = make((3, 2, 5, 4, 4), torch.float64, "channels last", True)
    norm = StepBatchNorm2d(5, backend=backend).double().to(DEVICE).train()
    for more in (None, residual):
        total, spikes = norm(x, more, _Silent(LIFParameters(), backend))
        assert (total > 1.0).any() and not spikes.any()
