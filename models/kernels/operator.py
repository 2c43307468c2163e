"""One function of tensors with two faces: an operator of torch.library where PyTorch traces, a plain call elsewhere.

An operator is what torch.compile, torch.export, fake tensors and dispatch modes see. A call of one takes Python some 70
microseconds, in which a GPU could have run several kernels; an autograd function takes a quarter of it.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.library import custom_op

_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """`function`, whose arguments are as torch.library.custom_op wants them, and the first one is a tensor.

    name: of the operator, "respike::...". mutates: names of the arguments that it changes, the first one not.
    definition: the operator.
    """

    def __init__(self, name: str, function: Callable, mutates: tuple[str, ...] = ()):
        self.definition = custom_op(name, function, mutates_args=mutates)
        self._name = name.partition("::")[2]
        changed = [
            number for number, argument in enumerate(inspect.signature(function).parameters) if argument in mutates
        ]

        def run_and_mark(*arguments):
            output = function(*arguments)
            # What autograd has kept of them is no longer what lies there, and it must know.
            torch.autograd.graph.increment_version([arguments[number] for number in changed])
            return output

        self._run = run_and_mark if changed else function
        self._transformed = self.definition

    def register_fake(self, fake: Callable) -> Callable:
        """fake: what the function returns for tensors without memory."""
        self.definition.register_fake(fake)
        return fake

    def register_autograd(self, gradient: Callable, setup_context: Callable) -> None:
        """As torch.library.register_autograd. The gradient itself has none."""
        self.definition.register_autograd(gradient, setup_context=setup_context)
        run = self._run

        # Autograd functions have a method setup_context of their own, for which PyTorch binds arguments anew at each
        # call: 20 microseconds. Only torch.func needs it.
        def forward(ctx, *arguments):
            output = run(*arguments)
            setup_context(ctx, arguments, output)
            return output

        twice = once_differentiable(gradient)

        def backward(ctx, *gradients):
            return (twice if torch.is_grad_enabled() else gradient)(ctx, *gradients)

        def function(**methods: Callable) -> Callable:
            methods = {name: staticmethod(method) for name, method in methods.items()}
            return type(self._name, (Function,), methods).apply

        self._transformed = function(forward=run, setup_context=setup_context, backward=backward)
        self._run = function(forward=forward, backward=backward)

    def __call__(self, *arguments):
        # Dynamo ends at the first condition.
        if (
            torch.compiler.is_compiling()
            or type(arguments[0]) not in _PLAIN
            or torch._C._len_torch_dispatch_stack() > 0
        ):
            return self.definition(*arguments)
        if torch._C._are_functorch_transforms_active():  # its wrappers are plain tensors to Python
            return self._transformed(*arguments)
        return self._run(*arguments)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """Decorator: `Operator` of the function below."""
    return lambda function: Operator(name, function, mutates)
