"""The spiking neuron: the function over all time steps, the modules, and which code runs them.

`LIFParameters` is the whole semantics of the neuron in one frozen value that every backend takes.
`lif` runs it. `backend` names the code that runs; only "auto" chooses.

To add a neuron, write a subclass of `LIF` with a `forward` of its own and name it in NEURONS. Every backend then
calls that `forward`: the fused kernels, which know the equations of `LIF` alone, stop at the batch norm before it.
Those of SpikingJelly need no class of their own: `models.spikingjelly_neurons`.
"""

import torch
from torch import Tensor, nn

from models.kernels import operators
from models.kernels.layout import memory_order
from models.kernels.parameters import LIFParameters, membrane_dtype
from models.kernels.reference import in_transform, lif_reference
from models.kernels.triton_lif import MAX_STEPS
from utils.errors import UserError
from utils.triton_language import why_not_on

BACKENDS = ("auto", "triton", "reference", "spikingjelly")


def lif(
    current: Tensor, parameters: LIFParameters, v0: Tensor | None = None, backend: str = "auto", keep_v: bool = True
) -> tuple[Tensor, Tensor]:
    """Run a layer of LIF neurons over all time steps at once.

    current: [S, ...] input current, time first, floating point. v0: [...] membrane before the first
    step; zero if None. Returns (spikes [S, ...] in the current's type, v [...] the membrane after the
    last step; from "triton" and "reference", float32 if the current is float16 or bfloat16).
    keep_v: if False, the backend need not write v, and the tensor returned for it holds no membrane.

    backend: "triton" (fused GPU kernels), "reference" (plain PyTorch), both with the membrane recomputed
    in the backward pass, "spikingjelly" (its multi-step LIFNode), or "auto": triton for tensors on a GPU
    that it supports, else reference. Raises ValueError for an unknown backend, for current without a time
    step, and for v0 of another shape; UserError for a backend that cannot run on the current's device.
    """
    if current.dim() < 1 or current.shape[0] < 1:
        raise ValueError(f"current must be [S, ...] with S >= 1 time steps, got {list(current.shape)}")
    if not current.is_floating_point():
        raise ValueError(f"current must be floating point, got {current.dtype}")
    if v0 is not None and v0.shape != current.shape[1:]:
        raise ValueError(f"v0 must be {list(current.shape[1:])} like one step of current, got {list(v0.shape)}")
    if runs_on_triton(backend, current):
        return _lif_triton(current, parameters, v0, keep_v)
    if backend == "spikingjelly":
        return _lif_spikingjelly(current, parameters, v0)
    return lif_reference(current, parameters, v0)


def runs_on_triton(backend: str, x: Tensor) -> bool:
    """Whether the Triton kernels run for x. Raises UserError if the backend is "triton" and they cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"LIF backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        reason = why_not_on(x.device.type)
        if reason is not None:
            raise UserError(f"triton: {reason}; take auto or reference", about="lif_backend")
        return True
    return backend == "auto" and x.device.type == "cuda" and why_not_on("cuda") is None and not in_transform()


def _lif_triton(current: Tensor, parameters: LIFParameters, v0: Tensor | None, keep_v: bool) -> tuple[Tensor, Tensor]:
    if current.shape[0] <= MAX_STEPS:
        return operators.lif(current, v0, keep_v, parameters.text)
    parts = []
    for part in current.split(MAX_STEPS):
        spikes, v0 = operators.lif(part, v0, True, parameters.text)
        parts.append(spikes)
    return torch.cat(parts), v0


def _lif_spikingjelly(current: Tensor, parameters: LIFParameters, v0: Tensor | None) -> tuple[Tensor, Tensor]:
    # Imported here: SpikingJelly takes seconds to import and only this backend needs it.
    from spikingjelly.activation_based import neuron, surrogate

    if parameters.surrogate == "atan":
        spike = surrogate.ATan(alpha=parameters.alpha)
    elif parameters.surrogate == "sigmoid":
        spike = surrogate.Sigmoid(alpha=parameters.alpha)
    else:
        raise UserError(f"the LIF backend spikingjelly has no surrogate {parameters.surrogate}; take auto or reference")
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
    """A layer of LIF neurons. Their state starts at zero in every call and does not outlive it.

    forward: current [S, ...] -> spikes [S, ...]. A subclass returns `self.counted(spikes)`.

    While `count_spikes` is true, the float64 scalars `spike_sum` and `neuron_steps` (neurons times time steps) add
    up on the device; their ratio is the mean firing rate. `utils.training.metrics.FiringRates` switches and reads
    them.
    """

    def __init__(self, parameters: LIFParameters = LIFParameters(), backend: str = "auto"):
        super().__init__()
        self.parameters_ = parameters  # `parameters` is nn.Module's
        self.backend = backend
        self.count_spikes = False
        # Buffers, not Python numbers: a number that changes would make torch.compile trace anew.
        self.register_buffer("spike_sum", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("neuron_steps", torch.zeros((), dtype=torch.float64), persistent=False)

    @property
    def name(self) -> str:
        """For messages."""
        return type(self).__name__

    def learned(self) -> dict[str, float]:
        """What the neurons have learned, as far as it is numbers for the whole layer: name -> value, for metrics."""
        return {}

    def forward(self, current: Tensor) -> Tensor:
        spikes, _ = lif(current, self.parameters_, backend=self.backend, keep_v=False)
        return self.counted(spikes)

    def counted(self, spikes: Tensor) -> Tensor:
        """Count the spikes of this layer if `count_spikes` is true, and return them."""
        if self.count_spikes:
            self.spike_sum += _total(spikes.detach())
            self.neuron_steps += spikes.numel()
        return spikes

    def extra_repr(self) -> str:
        return f"{self.parameters_}, backend={self.backend!r}"


def _total(spikes: Tensor) -> Tensor:
    """The sum of [S, ...], float64 [], without a copy of the layer: `sum(dtype=torch.float64)` makes one in float64
    first. A GPU adds half precision up in float32 without one, and a CPU copies piece by piece."""
    rows = spikes.permute(0, *memory_order(spikes)).reshape(len(spikes), -1)  # [S, neurons], a view
    # Numbers of spikes up to 2^24 are exact in float32.
    pieces = rows.split(1 << (18 if spikes.device.type == "cpu" else 24), dim=1)
    sums = [piece.sum(1, dtype=membrane_dtype(spikes.dtype)) for piece in pieces]
    return torch.stack(sums).sum(dtype=torch.float64)


NEURONS = {"lif": LIF}  # name -> class, made as class(parameters, backend)
