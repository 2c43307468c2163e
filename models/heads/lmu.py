"""Legendre Memory Unit (Voelker, Kajic & Eliasmith, NeurIPS 2019), rate-based and spiking."""

import math

import torch
from torch import Tensor, nn

from models.heads.neurons import DT, FireStep, Lowpass, Neuron

# Hz for each unit of a spiking neuron's input. A higher rate represents a value more finely. With steps of 1 ms an
# input of 1 gives a spike every four steps, each of height 4.
RATE_HZ = 250.0


def legendre_system(order: int, theta: float) -> tuple[Tensor, Tensor]:
    """(A [order, order], B [order]), float64, of m_t = A m_{t-1} + B u_t. theta: the memory's window in time steps.

    This is the memory's continuous system, discretised by zero-order hold with a step of 1:

        a_ij = (2i + 1) / theta * (-1 if i < j else (-1)^(i - j + 1)),   b_i = (2i + 1) (-1)^i / theta
    """
    i = torch.arange(order, dtype=torch.float64)
    rise = (2.0 * i + 1.0) / theta
    sign = torch.where(i[:, None] < i[None, :], -1.0, (-1.0) ** (i[:, None] - i[None, :] + 1.0))
    a, b = rise[:, None] * sign, rise * (-1.0) ** i
    whole = torch.zeros(order + 1, order + 1, dtype=torch.float64)  # the exponential of [[a, b], [0, 0]] holds A and B
    whole[:order, :order], whole[:order, order] = a, b
    whole = torch.linalg.matrix_exp(whole)
    return whole[:order, :order], whole[:order, order]


class LMU(nn.Module):
    """A layer of Legendre memories, and of hidden units that read them.

        u_t = [x_t, h_{t-1}] E + m_{t-1} R           memory_encoders, memory_recurrent
        m_t = A m_{t-1} + B u_t                      for each of `memory` memories, `order` numbers each
        h_t = f([m_t, x_t] K + h_{t-1} H)            hidden_kernel, hidden_recurrent

    forward: x [T, B, inputs] -> h [T, B, units].

    inputs: features of x.
    units: hidden units.
    order: numbers that each memory holds.
    theta: window of the memories, in time steps.
    memory: number of memories.
    neuron: f is this neuron's output in units of RATE_HZ, at J = RATE_HZ times its argument; None: f is tanh.
    feedback: whether h and m feed back into u, as published. Without feedback (Chilkuri & Eliasmith, ICML 2021)
        E sees x only, and m is a convolution of u: all steps are computed at once (the parallel form).
    recurrent: whether h feeds back into h.
    train_system: whether A and B are trained.
    parallel: take the parallel form if there is no feedback; False computes the same step by step.
    """

    def __init__(
        self, inputs: int, units: int, order: int, theta: float, memory: int = 1, neuron: Neuron | None = None,
        feedback: bool = True, recurrent: bool = True, train_system: bool = False, parallel: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.units, self.memory, self.order = units, memory, order
        self.neuron, self.parallel = neuron, parallel
        a, b = (value.to(torch.get_default_dtype()) for value in legendre_system(order, theta))
        for name, value in (("A", a), ("B", b)):
            if train_system:
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) / math.sqrt(rows))

        self.memory_encoders = weights(inputs + (units if feedback else 0), memory)
        self.memory_recurrent = nn.Parameter(torch.zeros(memory * order, memory)) if feedback else None
        self.hidden_kernel = weights(memory * order + inputs, units)
        self.hidden_recurrent = nn.Parameter(torch.linalg.qr(torch.randn(units, units))[0]) if recurrent else None

    def forward(self, x: Tensor) -> Tensor:
        parallel = self.memory_recurrent is None and self.parallel
        if parallel:
            memories = self._convolved(x @ self.memory_encoders)  # [T, B, memory * order]
            driven = torch.cat([memories, x], dim=-1) @ self.hidden_kernel  # [T, B, units]
            if self.hidden_recurrent is None and self.neuron is None:
                return torch.tanh(driven)
        m, h, state = x.new_zeros(x.shape[1], self.memory * self.order), x.new_zeros(x.shape[1], self.units), None
        hidden = []
        for step in range(len(x)):
            if parallel:
                argument = driven[step]
            else:
                m = self._remember(x[step], m, h)
                argument = torch.cat([m, x[step]], dim=-1) @ self.hidden_kernel
            if self.hidden_recurrent is not None:
                argument = argument + h @ self.hidden_recurrent
            h, state = self._fire(argument, state)
            hidden.append(h)
        return torch.stack(hidden)

    def _remember(self, x: Tensor, m: Tensor, h: Tensor) -> Tensor:
        """m_t [B, memory * order] from x_t, m_{t-1} and h_{t-1}."""
        if self.memory_recurrent is None:
            u = x @ self.memory_encoders
        else:
            u = torch.cat([x, h], dim=-1) @ self.memory_encoders + m @ self.memory_recurrent
        m = m.unflatten(-1, (self.memory, self.order)) @ self.A.T + u[..., None] * self.B
        return m.flatten(-2)

    def _convolved(self, u: Tensor) -> Tensor:
        """m [T, B, memory * order] from u [T, B, memory], all steps at once: m_t = sum over k of A^k B u_{t-k}."""
        steps = len(u)
        response = [self.B]
        while len(response) < steps:  # twice as many each time: A^n times the first n
            power = torch.linalg.matrix_power(self.A, len(response))
            response += list((torch.stack(response) @ power.T)[: steps - len(response)])
        response = torch.stack(response)  # [T, order]
        # A Fourier transform makes the convolution circular; the padding keeps the end out of the beginning.
        length = 2 * steps
        spectrum = torch.fft.rfft(u, length, dim=0)[..., None] * torch.fft.rfft(response, length, dim=0)[:, None, None]
        return torch.fft.irfft(spectrum, length, dim=0)[:steps].flatten(-2)

    def _fire(self, argument: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if self.neuron is None:
            return torch.tanh(argument), None
        current = argument * RATE_HZ
        if state is None:
            state = self.neuron.initial_state(current)
        output, *state = FireStep.apply(current, self.neuron, DT, *state)
        return output / RATE_HZ, tuple(state)


class LMUHead(nn.Module):
    """An LMU and a linear readout: features [T, B, inputs] -> logits [T, B, classes].

    units, order, theta, memory, train_system: as for `LMU`.
    neuron: None: the rate-based LMU (tanh). With a neuron, the readout sees its output through a Lowpass synapse.
        Can be exchanged between calls.
    synapse_seconds: time constant of the synapse.
    feedback: of `LMU`, its `recurrent` too.
    """

    def __init__(
        self, inputs: int, classes: int, units: int = 800, order: int = 2, theta: float = 28.0, memory: int = 1,
        neuron: Neuron | None = None, synapse_seconds: float = 0.005,
        feedback: bool = True, train_system: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.lmu = LMU(inputs, units, order, theta, memory, neuron, feedback, feedback, train_system)
        self.synapse = Lowpass(synapse_seconds if neuron is not None else 0.0)
        self.readout = nn.Linear(units, classes)

    @property
    def neuron(self) -> Neuron | None:
        return self.lmu.neuron

    @neuron.setter
    def neuron(self, neuron: Neuron | None) -> None:
        self.lmu.neuron = neuron

    def forward(self, features: Tensor) -> Tensor:
        return self.readout(self.synapse(self.lmu(features)))
