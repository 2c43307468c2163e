"""A training step on a GPU that is not there: tensors without memory, whose device, type, shape and layout PyTorch
works out for every operator as it would on CUDA."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.kernels import geglu, triton_lif
from utils import triton_language


@contextlib.contextmanager
def fake_gpu(
    monkeypatch, precision: torch.dtype | None = torch.bfloat16, capability: tuple[int, int] = (9, 0)
) -> Iterator[torch.device]:
    """Inside it tensors are fake, and autocast to `precision` is on for CUDA. Yields the device, of compute capability
    (9, 0) (H100, H200) or (8, 0) (A100)."""
    monkeypatch.setattr(triton_language, "_capability", lambda: capability)
    # Without a GPU PyTorch would lay convolutions out as its CPU code does.
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *args, **kwargs: torch._C._ConvBackend.Cudnn)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # torch.autocast("cuda") switches itself off without a GPU, the flags that it sets do not.
    state = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision is not None)
    torch.set_autocast_dtype("cuda", precision or torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), _FusedAttention(capability):
            yield torch.device("cuda")
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", state[0])
        torch.set_autocast_dtype("cuda", state[1])


def launch_nothing(monkeypatch) -> None:
    """Triton kernels return at once, and what they would have written stays as it is."""
    for kernel in (triton_lif._forward_kernel, geglu._forward_kernel):
        monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: lambda *args, **kwargs: None)


class _FusedAttention(TorchFunctionMode):
    """Attention by the kernel that PyTorch chooses for half precision and heads of width 32: cuDNN's from compute
    capability 9.0 on, else flash attention. PyTorch asks the GPU itself."""

    def __init__(self, capability: tuple[int, int]):
        super().__init__()
        aten = torch.ops.aten
        self._cudnn = functools.partial(aten._scaled_dot_product_cudnn_attention, attn_bias=None)
        self._flash = aten._scaled_dot_product_flash_attention
        self._is_new = capability >= (9, 0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and torch.is_autocast_enabled("cuda"):
            args = [x.to(torch.get_autocast_dtype("cuda")) for x in args]
            if self._is_new:
                return self._cudnn(*args, compute_log_sumexp=torch.is_grad_enabled())[0]
            return self._flash(*args)[0]
        return function(*args, **(kwargs or {}))


def channels_last(model: nn.Module) -> nn.Module:
    """model.to(memory_format=torch.channels_last), which refuses fake tensors."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 4:
                laid_out = parameter.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(laid_out)
    return model


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """loss.backward() without autograd's engine, which asks for a real GPU: the nodes of the graph, last one first."""
    gradients = {loss.grad_fn: [torch.ones_like(loss)]}
    waiting = {loss.grad_fn}
    while waiting:
        node = max(waiting, key=lambda node: node._sequence_nr())  # all nodes that it got gradients from were later
        waiting.remove(node)
        if hasattr(node, "variable"):  # a leaf
            (grad,) = gradients.pop(node)
            leaf = node.variable
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            continue
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        if callable(node):
            results = node(*gradients.pop(node))
            results = results if isinstance(results, tuple) else (results,)
            results = [grad for grad, edge in zip(results, node.next_functions, strict=True) if edge[0] is not None]
        else:  # a function written in Python: results for all its arguments, edges for its tensors
            results = node.apply(*gradients.pop(node))
            results = [grad for grad, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        for (following, slot), grad in zip(edges, results, strict=True):
            if grad is None:
                continue
            expected = following._input_metadata[slot]
            grad = grad.sum_to_size(expected.shape).to(expected.dtype)  # as the engine does
            slots = gradients.setdefault(following, [None] * len(following._input_metadata))
            slots[slot] = grad if slots[slot] is None else slots[slot] + grad
            waiting.add(following)


@dataclass(frozen=True)
class Call:
    """One operator that was called, and the tensors that it took and gave."""

    name: str
    taken: tuple[Tensor, ...]
    given: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """What it reads and writes, each tensor once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.taken, *self.given))

    def __str__(self) -> str:
        short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64", torch.uint8: "u8"}
        taken, given = (
            ", ".join(f"{short.get(x.dtype, x.dtype)}{list(x.shape)}" for x in tensors if x.dim() > 1)
            for tensors in (self.taken, self.given)
        )
        return f"{self.bytes / 1e6:8.0f} MB  {self.name}: {taken} -> {given}"


class Calls(TorchDispatchMode):
    """Lists every operator that computes; views are left out."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        taken = tuple(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        given = tuple(x for x in tree_leaves(out) if isinstance(x, Tensor))
        aliases = [argument.alias_info for argument in function._schema.arguments if argument.alias_info]
        is_view = function._opname == "_unsafe_view" or any(not alias.is_write for alias in aliases)
        if given and not is_view:
            self.calls.append(Call(function.name().replace("aten::", ""), taken, given))
        return out
