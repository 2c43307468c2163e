"""Neurons and the synapse of the heads, rate-based and spiking, with nengo's semantics (nengo 4.1, dt 1 ms).

A neuron turns a current J into an output in Hz: a rate, or spikes of height 1 / dt. `step` is one time
step from a state that the caller holds. Gradients flow through `rate_gradient`, the derivative of the
firing rate by the current. For a spiking neuron this derivative is the surrogate (Hunsberger & Eliasmith,
arXiv 1510.08829): in each step the output is spikes, and the gradient is that of the rate.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

DT = 0.001  # seconds a time step
State = tuple[Tensor, ...]


class Neuron:
    """What all neurons have. A rate-based one has no state."""

    spiking = False

    def gain_bias(self, max_rates: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
        """(gain, bias) of neurons that start to fire at the represented value `intercepts` (below 1) and fire at
        `max_rates` Hz at the value 1."""

    def initial_state(self, current: Tensor, voltage: Tensor | None = None) -> State:
        """The state of neurons at rest; `current` gives shape, type and device. voltage: of spiking neurons at the
        start, in units of the threshold, broadcast to `current`."""
        return ()

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        """(output in Hz, next state). dt: seconds."""

    def rate_gradient(self, current: Tensor, state: State) -> Tensor:
        """d rate / dJ of a step; `state` is the state before the step."""


@dataclass(frozen=True)
class RectifiedLinear(Neuron):
    """rate = max(J, 0)."""

    def gain_bias(self, max_rates: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
        gain = max_rates / (1.0 - intercepts)
        return gain, -intercepts * gain

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        return current.clamp(min=0.0), state

    def rate_gradient(self, current: Tensor, state: State) -> Tensor:
        return (current > 0).to(current.dtype)


@dataclass(frozen=True)
class SpikingRectifiedLinear(RectifiedLinear):
    """Integrates max(J, 0) and spikes once for each whole number it reaches. n spikes in one step are one output
    of n times the height. State: (voltage)."""

    spiking = True

    def initial_state(self, current: Tensor, voltage: Tensor | None = None) -> State:
        return (_at(current, voltage),)

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        voltage = state[0] + current.clamp(min=0.0) * dt
        spikes = voltage.floor()
        return spikes / dt, (voltage - spikes,)


@dataclass(frozen=True)
class LIFRate(Neuron):
    """The firing rate of a leaky integrate-and-fire neuron: 1 / (tau_ref + tau_rc log(1 + 1 / (J - 1)))."""

    tau_rc: float = 0.02  # seconds
    tau_ref: float = 0.002  # seconds
    softness: float = 0.02  # smooths J - 1 in the gradient: at the threshold the rate's derivative is infinite

    def gain_bias(self, max_rates: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
        if (max_rates >= 1.0 / self.tau_ref).any():
            raise UserError(f"max_rates must be below 1 / tau_ref = {1.0 / self.tau_ref:g} Hz, got {max_rates.max():g}")
        x = 1.0 / (1.0 - torch.exp((self.tau_ref - 1.0 / max_rates) / self.tau_rc))
        gain = (1.0 - x) / (intercepts - 1.0)
        return gain, 1.0 - gain * intercepts

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        above = current - 1.0
        fires = above > 0
        rate = 1.0 / (self.tau_ref + self.tau_rc * torch.log1p(1.0 / torch.where(fires, above, 1.0)))
        return torch.where(fires, rate, 0.0), state

    def rate_gradient(self, current: Tensor, state: State) -> Tensor:
        above = (current - 1.0) / self.softness
        soft = F.softplus(above).mul(self.softness).clamp(min=1e-9)
        rate = 1.0 / (self.tau_ref + self.tau_rc * torch.log1p(1.0 / soft))
        return rate * rate * self.tau_rc / (soft * (soft + 1.0)) * torch.sigmoid(above)


@dataclass(frozen=True)
class LIF(LIFRate):
    """Leaky integrate-and-fire with a refractory time. The moment of a spike within its step is computed, so the
    refractory time can end within a step too. State: (voltage, refractory time left in seconds)."""

    spiking = True

    def initial_state(self, current: Tensor, voltage: Tensor | None = None) -> State:
        return _at(current, voltage), torch.zeros_like(current)

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        voltage, refractory = state
        refractory = refractory - dt
        active = (dt - refractory).clamp(0.0, dt)  # seconds of this step in which the voltage moves
        voltage = voltage - (current - voltage) * torch.expm1(-active / self.tau_rc)
        spiked = voltage > 1.0
        over = torch.where(spiked, (voltage - 1.0) / (current - 1.0), 0.0)
        moment = dt + self.tau_rc * torch.log1p(-over)
        refractory = torch.where(spiked, self.tau_ref + moment, refractory)
        voltage = torch.where(spiked, 0.0, voltage.clamp(min=0.0))
        return spiked.to(current.dtype) / dt, (voltage, refractory)


@dataclass(frozen=True)
class _Adaptive:
    """Recent output lowers the current of the neuron that this is mixed into. State: (*that neuron's, adaptation)."""

    tau_n: float = 1.0  # seconds
    inc_n: float = 0.01  # adaptation added by a spike

    def initial_state(self, current: Tensor, voltage: Tensor | None = None) -> State:
        return *super().initial_state(current, voltage), torch.zeros_like(current)

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        *own, adaptation = state
        output, own = super().step(current - adaptation, tuple(own), dt)
        return output, (*own, adaptation + (dt / self.tau_n) * (self.inc_n * output - adaptation))

    def rate_gradient(self, current: Tensor, state: State) -> Tensor:
        return super().rate_gradient(current - state[-1], state[:-1])


@dataclass(frozen=True)
class AdaptiveLIFRate(_Adaptive, LIFRate):
    """LIFRate whose recent output lowers its current."""


@dataclass(frozen=True)
class AdaptiveLIF(_Adaptive, LIF):
    """LIF whose recent spikes lower its current."""


@dataclass(frozen=True)
class Izhikevich(Neuron):
    """Izhikevich's neuron (IEEE Transactions on Neural Networks 14, 2003). State: (voltage, recovery).

    There is no formula for its rate. It starts to fire at J = 3.8, at about 2 J Hz (13 Hz at 6, 42 at 20, 100 at
    50). The surrogate is the slope of this line, with a smooth start.
    """

    tau_recovery: float = 0.02
    coupling: float = 0.2
    reset_voltage: float = -65.0  # millivolts
    reset_recovery: float = 8.0

    spiking = True

    def gain_bias(self, max_rates: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
        """From the line that approximates the rate: J = 3.8 at the intercept, J = max_rates / 2 at the value 1."""
        gain = (max_rates / 2.0 - 3.8) / (1.0 - intercepts)
        return gain, 3.8 - intercepts * gain

    def initial_state(self, current: Tensor, voltage: Tensor | None = None) -> State:
        resting = torch.full_like(current, self.reset_voltage)
        return resting, resting * self.coupling

    def step(self, current: Tensor, state: State, dt: float) -> tuple[Tensor, State]:
        voltage, recovery = state
        current = current.clamp(min=-30.0)  # below, the equations are unstable
        milliseconds = 1000.0 * dt
        voltage = voltage + (0.04 * voltage**2 + 5.0 * voltage + 140.0 + current - recovery) * milliseconds
        spiked = voltage >= 30.0
        voltage = torch.where(spiked, self.reset_voltage, voltage)
        recovery = recovery + self.tau_recovery * (self.coupling * voltage - recovery) * milliseconds
        recovery = torch.where(spiked, recovery + self.reset_recovery, recovery)
        return spiked.to(current.dtype) / dt, (voltage, recovery)

    def rate_gradient(self, current: Tensor, state: State) -> Tensor:
        return 2.0 * torch.sigmoid(2.0 * (current - 3.8))


def _at(current: Tensor, voltage: Tensor | None) -> Tensor:
    return torch.zeros_like(current) if voltage is None else voltage.to(current).expand_as(current)


NEURONS = {
    kind.__name__: kind
    for kind in (RectifiedLinear, SpikingRectifiedLinear, LIFRate, LIF, AdaptiveLIFRate, AdaptiveLIF, Izhikevich)
}
_RATES = {"SpikingRectifiedLinear": "RectifiedLinear", "LIF": "LIFRate", "AdaptiveLIF": "AdaptiveLIFRate"}


def rate_counterpart(neuron: Neuron) -> Neuron:
    """The rate-based neuron with the same constants, or UserError if there is none. Of a rate-based one: itself."""
    name = type(neuron).__name__
    if not neuron.spiking:
        return neuron
    if name not in _RATES:
        raise UserError(f"{name} has no rate-based counterpart; take train_mode spiking, or another neuron")
    return NEURONS[_RATES[name]](**dataclasses.asdict(neuron))


class FireStep(torch.autograd.Function):
    """One step of neurons under autograd. The output comes from `neuron.step`, the gradient from
    `neuron.rate_gradient`; no gradient flows through the state.
    apply(current, neuron, dt, *state) -> (output, *next state)."""

    @staticmethod
    def forward(ctx, current: Tensor, neuron: Neuron, dt: float, *state: Tensor):
        ctx.save_for_backward(neuron.rate_gradient(current, state))
        output, state = neuron.step(current, state, dt)
        ctx.mark_non_differentiable(*state)
        return output, *state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor, *_):
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, *(None for _ in _)


class Lowpass(nn.Module):
    """First-order synapse, discretised by zero-order hold: y_t = decay y_{t-1} + (1 - decay) x_t, y before the first
    step is 0.

    forward: [T, ...] -> [T, ...]. tau: seconds; 0 returns x. All steps are computed at once, as a product with the
    triangular matrix of the impulse response.
    """

    def __init__(self, tau: float):
        super().__init__()
        self.decay = math.exp(-DT / tau) if tau > 0 else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.decay == 0.0:
            return x
        steps = torch.arange(len(x), device=x.device)
        distance = steps[:, None] - steps[None, :]
        response = torch.where(distance >= 0, (1.0 - self.decay) * self.decay ** distance.clamp(min=0).to(x.dtype), 0.0)
        return torch.tensordot(response.to(x.dtype), x, dims=1)
