"""The spiking neuron: its parameters, the function over all time steps, and the module.

`LIFParameters` is the whole semantics of the neuron in one frozen value that every backend takes.
`lif` runs it; `backend` says with which code, and only "auto" chooses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.kernels.reference import lif_reference

SURROGATES = ("atan", "sigmoid", "triangle")
BACKENDS = ("auto", "reference", "spikingjelly")


@dataclass(frozen=True)
class LIFParameters:
    """Leaky integrate-and-fire semantics, per time step t (ReSpike, arXiv 2409.01564, section 3):

        charge   h_t = v_{t-1} + (x_t - v_{t-1}) / tau
        fire     s_t = 1 where h_t >= v_threshold, else 0
        reset    hard: v_t = h_t (1 - s_t) + v_reset s_t;  soft (v_reset None): v_t = h_t - v_threshold s_t

    The derivative ds/dh is the surrogate's, with z = h_t - v_threshold:
        atan      alpha / 2 / (1 + (pi / 2 * alpha * z)^2)      (alpha 2: 1 / (1 + (pi z)^2), as published)
        sigmoid   alpha * sigma(alpha z) * (1 - sigma(alpha z))
        triangle  max(0, alpha - alpha^2 |z|)                   (height alpha, area 1)
    """

    tau: float = 4.0 / 3.0  # membrane time constant, in time steps
    v_threshold: float = 1.0
    v_reset: float | None = 0.0  # None: soft reset
    surrogate: str = "atan"
    alpha: float = 2.0  # steepness of the surrogate
    detach_reset: bool = True  # no gradient through the reset's spike

    def __post_init__(self):
        if not self.tau >= 1.0:
            raise ValueError(f"tau must be at least 1 time step, got {self.tau}")
        if self.surrogate not in SURROGATES:
            raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {self.surrogate!r}")
        if not self.alpha > 0.0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if self.v_reset is not None and not self.v_reset < self.v_threshold:
            raise ValueError(f"v_reset must be below v_threshold {self.v_threshold}, got {self.v_reset}")


def lif(
    current: Tensor, parameters: LIFParameters, v0: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Run a layer of LIF neurons over all time steps at once.

    current: [S, ...] input current, time first, floating point. v0: [...] membrane before the first
    step; zero if None. Returns (spikes [S, ...] in the current's type, v [...] the membrane after the
    last step; from "reference", float32 where the current is float16 or bfloat16).

    backend: "reference" (plain PyTorch, membrane recomputed in the backward pass), "spikingjelly"
    (its multi-step LIFNode), or "auto", which takes the fastest that this build has. Raises
    ValueError for an unknown backend, for current without a time step, and for v0 of another shape.
    """
    if backend not in BACKENDS:
        raise ValueError(f"LIF backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if current.dim() < 1 or current.shape[0] < 1:
        raise ValueError(f"current must be [S, ...] with S >= 1 time steps, got {list(current.shape)}")
    if not current.is_floating_point():
        raise ValueError(f"current must be floating point, got {current.dtype}")
    if v0 is not None and v0.shape != current.shape[1:]:
        raise ValueError(f"v0 must be {list(current.shape[1:])} like one step of current, got {list(v0.shape)}")
    if backend == "spikingjelly":
        return _lif_spikingjelly(current, parameters, v0)
    return lif_reference(current, parameters, v0)


def _lif_spikingjelly(current: Tensor, parameters: LIFParameters, v0: Tensor | None) -> tuple[Tensor, Tensor]:
    # Imported here: SpikingJelly takes seconds to import and only this backend needs it.
    from spikingjelly.activation_based import neuron, surrogate

    if parameters.surrogate == "atan":
        spike = surrogate.ATan(alpha=parameters.alpha)
    elif parameters.surrogate == "sigmoid":
        spike = surrogate.Sigmoid(alpha=parameters.alpha)
    else:
        raise ValueError("the spikingjelly backend has no triangle surrogate; use backend 'reference'")
    node = neuron.LIFNode(
        tau=parameters.tau,
        decay_input=True,
        v_threshold=parameters.v_threshold,
        v_reset=parameters.v_reset,
        surrogate_function=spike,
        detach_reset=parameters.detach_reset,
        step_mode="m",
    )
    # SpikingJelly starts at v_reset; this project's neuron starts at zero or at v0.
    node.v = torch.zeros_like(current[0]) if v0 is None else v0.to(current.dtype)
    spikes = node(current)
    return spikes, node.v


class LIF(nn.Module):
    """A layer of LIF neurons whose state starts at zero in every call and does not outlive it.

    forward: current [S, ...] -> spikes [S, ...]. While `count_spikes` is true, the float64 scalars
    `spike_sum` and `neuron_steps` (neurons times time steps) add up on the device; their ratio is the
    mean firing rate. `utils.metrics.FiringRates` switches and reads them.
    """

    def __init__(self, parameters: LIFParameters = LIFParameters(), backend: str = "auto"):
        super().__init__()
        self.parameters_ = parameters  # `parameters` is nn.Module's
        self.backend = backend
        self.count_spikes = False
        # Buffers, not Python numbers: a number that changes would make torch.compile trace anew.
        self.register_buffer("spike_sum", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("neuron_steps", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, current: Tensor) -> Tensor:
        spikes, _ = lif(current, self.parameters_, backend=self.backend)
        if self.count_spikes:
            self.spike_sum += spikes.detach().sum(dtype=torch.float64)
            self.neuron_steps += spikes.numel()
        return spikes

    def extra_repr(self) -> str:
        return f"{self.parameters_}, backend={self.backend!r}"
