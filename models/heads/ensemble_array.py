"""EnsembleArray: many one-dimensional ensembles of neurons side by side, as nengo's (Eliasmith & Anderson 2003)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.heads.neurons import DT, Lowpass, Neuron, SpikingRectifiedLinear, rate_counterpart

# nengo's defaults; drawn uniformly from these ranges.
MAX_RATES_HZ = (200.0, 400.0)
INTERCEPTS = (-1.0, 0.9)
# Neurons times clips that are simulated at a time: a dozen tensors of 1 M values stay near a CPU's cache, and the
# memory needed does not grow with the number of ensembles.
_CHUNK_VALUES = 1 << 20


class EnsembleArray(nn.Module):
    """`ensembles` ensembles of `neurons_per_ensemble` neurons; each ensemble represents one number x.

    forward: features [T, B, inputs] -> logits [T, B, classes], in four stages: transform [ensembles, inputs]
    through a Lowpass synapse gives x; neurons get the current gain * encoder * x + bias; decoders give x again;
    readout [classes, ensembles]. As in nengo, the ensembles see the synapse's output of the step before, and
    zero at the first step.

    neuron: can be exchanged between calls (to train with rates and test with spikes).
    synapse_seconds: time constant of the synapse.

    Everything but the neurons' time constants is trained. Spikes have the gradient of the rate
    (`models.heads.neurons`).
    """

    def __init__(
        self, inputs: int, classes: int, ensembles: int = 10_000, neurons_per_ensemble: int = 50,
        neuron: Neuron = SpikingRectifiedLinear(), synapse_seconds: float = 0.005,
    ):  # fmt: skip
        super().__init__()
        self.neuron = neuron
        size = (ensembles, neurons_per_ensemble)
        max_rates = torch.empty(size).uniform_(*MAX_RATES_HZ)
        gain, bias = neuron.gain_bias(max_rates, torch.empty(size).uniform_(*INTERCEPTS))
        sign = torch.randint(0, 2, size).to(gain) * 2 - 1  # a one-dimensional encoder is a direction
        self.scaled_encoders = nn.Parameter(gain * sign)  # gain * encoder, [ensembles, neurons]
        self.bias = nn.Parameter(bias)
        # The neurons of an ensemble start at different phases. Otherwise all of them would spike at once.
        self.register_buffer("initial_voltage", torch.rand(size))
        self.decoders = nn.Parameter(solve_decoders(gain * sign, bias, neuron))
        self.transform = nn.Parameter(torch.randn(ensembles, inputs) / math.sqrt(inputs))
        self.readout = nn.Parameter(torch.randn(classes, ensembles) / math.sqrt(ensembles))
        self.synapse = Lowpass(synapse_seconds)

    def forward(self, features: Tensor) -> Tensor:
        represented = self.synapse(features @ self.transform.T)  # [T, B, ensembles]
        represented = torch.cat([torch.zeros_like(represented[:1]), represented[:-1]])
        return self.decoded(represented) @ self.readout.T

    def decoded(self, represented: Tensor) -> Tensor:
        """The numbers that the ensembles decode from their neurons' output: [T, B, ensembles] -> the same shape."""
        return _Ensembles.apply(
            represented, self.scaled_encoders, self.bias, self.decoders, self.initial_voltage, self.neuron
        )


def solve_decoders(scaled_encoders: Tensor, bias: Tensor, neuron: Neuron, points: int = 51) -> Tensor:
    """[ensembles, neurons]: decoders of the represented number in [-1, 1] from the neurons' rates. Regularised least
    squares over `points` numbers, as nengo's LstsqL2 (reg 0.1)."""
    x = torch.linspace(-1.0, 1.0, points, dtype=torch.float64)
    decoders = torch.empty_like(scaled_encoders)
    pieces = max(1, _CHUNK_VALUES // (points * scaled_encoders.shape[1]))
    for start in range(0, len(decoders), pieces):
        part = slice(start, start + pieces)
        current = scaled_encoders[part, None].double() * x[:, None] + bias[part, None].double()  # [e, points, n]
        rates = _steady_rate(current, neuron)
        sigma = 0.1 * rates.amax((1, 2), keepdim=True).clamp(min=1e-9)
        gram = rates.mT @ rates + points * sigma.square() * torch.eye(rates.shape[2], dtype=torch.float64)
        solved = torch.linalg.solve(gram, rates.mT @ x[:, None])
        decoders[part] = solved[..., 0].to(decoders.dtype)
    return decoders


def _steady_rate(current: Tensor, neuron: Neuron) -> Tensor:
    """Hz at a constant current: from the rate-based counterpart, or, for Izhikevich, counted over a second."""
    if type(neuron).__name__ != "Izhikevich":
        rate = rate_counterpart(neuron)
        return rate.step(current, rate.initial_state(current), DT)[0]
    state, total = neuron.initial_state(current), torch.zeros_like(current)
    for _ in range(1000):
        spikes, state = neuron.step(current, state, DT)
        total += spikes
    return total / 1000


class _Ensembles(torch.autograd.Function):
    """All time steps of all ensembles, a piece of the ensembles at a time.

    The neurons' states and outputs are not kept for the backward pass, which runs the simulation again. It can do
    so forward in time: no output feeds back into `represented`, so the gradients of all outputs are known at its
    start.
    """

    @staticmethod
    def forward(
        ctx, represented: Tensor, encoders: Tensor, bias: Tensor, decoders: Tensor, voltage: Tensor, neuron: Neuron
    ) -> Tensor:
        ctx.save_for_backward(represented, encoders, bias, decoders, voltage)
        ctx.neuron = neuron
        decoded = torch.empty_like(represented)
        for part, step, _, output in _simulate(represented, encoders, bias, voltage, neuron):
            decoded[step][:, part] = torch.einsum("ben,en->be", output, decoders[part])
        return decoded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_decoded: Tensor):
        represented, encoders, bias, decoders, voltage = ctx.saved_tensors
        grad_represented = torch.empty_like(represented)
        grad_encoders, grad_bias, grad_decoders = (torch.zeros_like(value) for value in (encoders, bias, decoders))
        for part, step, gradient, output in _simulate(represented, encoders, bias, voltage, ctx.neuron, gradients=True):
            grad = grad_decoded[step][:, part]  # [B, e]
            grad_decoders[part] += torch.einsum("be,ben->en", grad, output)
            grad_current = gradient.mul_(decoders[part]).mul_(grad[..., None])  # [B, e, n]
            grad_bias[part] += grad_current.sum(0)
            grad_encoders[part] += torch.einsum("ben,be->en", grad_current, represented[step][:, part])
            grad_represented[step][:, part] = torch.einsum("ben,en->be", grad_current, encoders[part])
        return grad_represented, grad_encoders, grad_bias, grad_decoders, None, None


def _simulate(
    represented: Tensor, encoders: Tensor, bias: Tensor, voltage: Tensor, neuron: Neuron, gradients: bool = False
) -> Iterator[tuple[slice, int, Tensor | None, Tensor]]:
    """All steps of one piece of the ensembles after another. Yields (slice of the ensembles, step, d rate / d current,
    output) for each step, the last two [B, e, n]; the gradient is None unless `gradients`."""
    size = max(1, _CHUNK_VALUES // (represented.shape[1] * encoders.shape[1]))
    for start in range(0, len(encoders), size):
        part, state = slice(start, start + size), None
        for step, x in enumerate(represented[..., part]):
            current = torch.addcmul(bias[part], x[..., None], encoders[part])  # [B, e, n]
            if state is None:
                state = neuron.initial_state(current, voltage[part])
            gradient = neuron.rate_gradient(current, state) if gradients else None
            output, state = neuron.step(current, state, DT)
            yield part, step, gradient, output
