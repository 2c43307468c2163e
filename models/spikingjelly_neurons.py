"""Neurons by name: the classes of this project, and any multi-step neuron of SpikingJelly as sj.NAME.

One adapter, `SpikingJellyNeuron`, runs the classes of `spikingjelly.activation_based.neuron`. Which of them can work
here is found by trying: `neuron_factory` makes one, gives it currents and looks at what comes out.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from models.kernels.parameters import LIFParameters
from models.neurons import LIF, NEURONS
from utils.errors import UserError

PREFIX = "sj."
_SURROGATES = {
    "atan": "ATan",
    "sigmoid": "Sigmoid",
    "triangle": "PiecewiseQuadratic",
}  # this project's -> SpikingJelly's
_TIME_CONSTANTS = ("tau", "init_tau")
_SET_HERE = {
    "step_mode": "all time steps come at once", "surrogate_function": "by --surrogate and --alpha",
}  # fmt: skip


class SpikingJellyNeuron(LIF):
    """A layer of a neuron of SpikingJelly in multi-step mode, with its own equations and learnable parameters.

    forward: current [S, ...] -> spikes [S, ...]. The state starts anew in every call and does not outlive it. It starts
    as SpikingJelly's does (at v_reset), which is zero by default, as that of `LIF`. On device "meta" the currents are
    returned, because the equations may look at values.

    parameters: of which surrogate and alpha count.
    name: of its class there.
    arguments: what else the class takes, as `node_arguments` gives it.
    """

    def __init__(self, parameters: LIFParameters, backend: str, name: str, arguments: dict):
        super().__init__(parameters, backend)
        self.node = _make(name, arguments, parameters)

    @property
    def name(self) -> str:
        return PREFIX + type(self.node).__name__

    def forward(self, current: Tensor) -> Tensor:
        if current.is_meta:
            return current
        _reset(self.node)
        spikes = self.node(current).to(current.dtype)
        _reset(self.node)
        return self.counted(spikes)

    def learned(self) -> dict[str, float]:
        """The parameters of the node that are one number; of a parametric LIF the time constant, in steps."""
        found = {name: value.item() for name, value in self.node.named_parameters() if value.numel() == 1}
        if type(self.node).__name__ == "ParametricLIFNode":
            found["tau"] = 1 / torch.tensor(found.pop("w")).sigmoid().item()
        return found


def neuron_factory(
    name: str, parameters: LIFParameters, backend: str = "auto", arguments: dict | None = None, steps: int = 1
) -> Callable[[], LIF]:
    """A function that makes a layer of the neuron `name`.

    name: in `models.neurons.NEURONS`, or sj.NAME of SpikingJelly.
    parameters: of LIF. A neuron of SpikingJelly takes the surrogate, its alpha, and tau for its time constant.
    arguments: more keyword arguments of a neuron of SpikingJelly.
    steps: time steps of a call, for a neuron that must know them.

    Raises UserError for a name that is not there, for arguments that it does not have, and for a neuron of SpikingJelly
    that cannot work here, with the reason.
    """
    arguments = arguments or {}
    if name.startswith(PREFIX):
        node = name.removeprefix(PREFIX)
        arguments = node_arguments(node, parameters, arguments, steps)
        _try(node, arguments, parameters, steps)
        return functools.partial(SpikingJellyNeuron, parameters, backend, node, arguments)
    if name not in NEURONS:
        raise UserError(
            f"{name}: expected {', '.join(sorted(NEURONS))} or {PREFIX}NAME of SpikingJelly; --help lists them",
            about="neuron",
        )
    if arguments:
        raise UserError(
            f"{_listed(arguments)}: are for neurons of SpikingJelly ({PREFIX}NAME), not for {name}", about="neuron_args"
        )
    return functools.partial(NEURONS[name], parameters, backend)


def node_arguments(name: str, parameters: LIFParameters, arguments: dict, steps: int) -> dict:
    """What to make the node with, the surrogate left out: `arguments`, tau of `parameters`, and what is set here."""
    known = inspect.signature(_class(name)).parameters
    named = [key for key, one in known.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    own = PREFIX + name
    for key in arguments:
        if key in _SET_HERE:
            raise UserError(f"{key}: is set by the network: {_SET_HERE[key]}", about="neuron_args")
        if key in named and not _is_plain(known[key]):
            raise _not_plain(own, key)
        if key not in named:
            names = ", ".join(key for key in named if key not in _SET_HERE)
            raise UserError(f"{key}: {own} has no argument of this name; it has {names}", about="neuron_args")
    if arguments.get("T", steps) != steps:
        raise UserError(
            f"T={arguments['T']}: is the number of time steps, {steps} (--stride - 1); leave it out",
            about="neuron_args",
        )
    filled = ({"T": steps} if "T" in named else {}) | arguments
    usual = LIFParameters()
    # Elsewhere "tau" may be a decay between 0 and 1.
    constant = next((key for key in _TIME_CONSTANTS if key in named and _at_least_one(known[key].default)), None)
    if constant is not None and constant not in arguments:
        filled[constant] = parameters.tau
    elif parameters.tau != usual.tau:
        reason = (
            f"{own} has no time constant in time steps" if constant is None else f"--neuron-args has {constant} too"
        )
        raise UserError(f"{parameters.tau}: {reason}; leave it at {usual.tau}", about="tau")
    if "surrogate_function" not in named and (parameters.surrogate, parameters.alpha) != (usual.surrogate, usual.alpha):
        raise UserError(
            f"{parameters.surrogate}, --alpha {parameters.alpha}: {own} has no surrogate to choose; leave them at "
            f"{usual.surrogate}, {usual.alpha}", about="surrogate",
        )  # fmt: skip
    missing = [
        key for key in named
        if known[key].default is inspect.Parameter.empty and key not in filled and key not in _SET_HERE
    ]  # fmt: skip
    for key in missing:
        if not _is_plain(known[key]):
            raise _not_plain(own, key)
    if missing:
        raise _MissingArguments(own, missing)
    return filled


class _MissingArguments(UserError):
    def __init__(self, name: str, missing: list[str]):
        self.missing = missing
        super().__init__(f"{name}: needs --neuron-args {','.join(f'{key}=...' for key in missing)}", about="neuron")


def _is_plain(argument: inspect.Parameter) -> bool:
    """Whether a number or a word may be meant; an argument without a type may be anything."""
    kind = argument.annotation
    return kind is inspect.Parameter.empty or any(
        plain in inspect.formatannotation(kind) for plain in ("int", "float", "bool", "str")
    )


def _not_plain(name: str, key: str) -> UserError:
    return UserError(
        f"{name}: its argument {key} is neither a number nor a word; --neuron-args cannot give it", "neuron"
    )


def _at_least_one(default) -> bool:
    return default is inspect.Parameter.empty or (isinstance(default, int | float) and default >= 1)


def spikingjelly_names() -> list[str]:
    """sj.NAME of every neuron of SpikingJelly that works here, and the arguments that it needs, as "sj.SlidingPSN (k)".
    Empty if SpikingJelly cannot be imported."""
    try:
        names = sorted(vars(_neurons()))
    except UserError:
        return []
    found = []
    for name in names:
        needed: list[str] = []
        for _ in range(2):
            try:
                neuron_factory(PREFIX + name, LIFParameters(), arguments=dict.fromkeys(needed, 2), steps=3)
            except _MissingArguments as error:
                needed = error.missing
                continue
            except UserError:
                break
            found.append(f"{PREFIX}{name}" + (f" ({', '.join(needed)})" if needed else ""))
            break
    return found


# ---- SpikingJelly's side


def _neurons() -> ModuleType:
    # Imported here: SpikingJelly takes seconds to import.
    try:
        from spikingjelly.activation_based import neuron
    except ImportError as error:
        raise UserError(f"{PREFIX}NAME: needs SpikingJelly, which cannot be imported ({error})", "neuron") from error
    return neuron


def _class(name: str) -> type[nn.Module]:
    module = _neurons()
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__.startswith(module.__name__)):
        raise UserError(
            f"{PREFIX}{name}: SpikingJelly has no neuron of this name; --help lists those that work", about="neuron"
        )
    return found


def _make(name: str, arguments: dict, parameters: LIFParameters) -> nn.Module:
    cls = _class(name)
    known = inspect.signature(cls).parameters
    if "surrogate_function" in known:
        from spikingjelly.activation_based import surrogate

        chosen = getattr(surrogate, _SURROGATES[parameters.surrogate])(alpha=parameters.alpha)
        arguments = arguments | {"surrogate_function": chosen}
    if "step_mode" in known:
        return cls(**arguments, step_mode="m")
    node = cls(**arguments)
    node.step_mode = "m"
    return node


def _reset(node: nn.Module) -> None:
    for module in node.modules():
        if hasattr(module, "reset"):
            module.reset()


def _try(name: str, arguments: dict, parameters: LIFParameters, steps: int) -> None:
    """Raise UserError if the node cannot be made or does not turn currents into spikes."""
    fault = "cannot be made"
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
            current = (4.0 * torch.sin(torch.arange(steps * 2 * 4 * 3 * 3) * 1.7)).view(steps, 2, 4, 3, 3)
            current *= torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None, None]  # weak ones, and strong ones that make it fire
            node = _make(name, arguments, parameters)
            fault = "does not work on currents of all time steps"
            first, again = (_after_reset(node, current.requires_grad_()) for _ in range(2))
            with torch.no_grad():
                for parameter in node.parameters():  # as training will
                    parameter.mul_(0.9)
            later = _after_reset(node, current)
    except Exception as error:  # whatever a class of another project raises
        reason = f"{fault} ({type(error).__name__}: {' '.join(str(error).split())[:160] or 'without a reason'})"
    else:
        if not isinstance(first, Tensor) or first.shape != current.shape:
            reason = "does not return a spike for each current"
        elif any(((spikes != 0) & (spikes != 1)).any() for spikes in (first, later)):
            reason = "its spikes are not 0 and 1, as convolutions of spikes and their energy need"
        elif not torch.equal(first, again):
            reason = "does not give the same spikes again after a reset"
        elif not first.requires_grad:
            reason = "gives no gradient"
        else:
            return
    given = f" with {_listed(arguments)}" if arguments else ""
    raise UserError(f"{PREFIX}{name}{given}: {reason}", about="neuron")


def _after_reset(node: nn.Module, current: Tensor) -> Tensor:
    _reset(node)
    return node(current)


def _listed(arguments: dict) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())  # 'false' is a word, False is not
