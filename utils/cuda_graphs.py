"""The training network's forward and backward pass as CUDA graphs: two launches instead of thousands.

Worth it where the host is slower than the GPU: small batches, small frames. The graphs keep the activations' memory for
themselves, also while the network is tested.
"""

import torch
from torch import Tensor, nn


class GraphedNetwork(nn.Module):
    """`model` in training, replayed as CUDA graphs for batches of one size. Batches of another size (the last of an
    epoch) run as they are.

    key, residual: a batch of that size, as the model takes it, whose values do not matter. precision: of autocast, or
    None. Made before data loading starts: while PyTorch records, no other thread may pin memory.

    Gradients lie in the same memory after each backward pass, so each must be used up before the next one: one batch an
    optimizer step.

    held_bytes: of GPU memory that the graphs keep for themselves.
    """

    def __init__(self, model: nn.Module, key: Tensor, residual: Tensor, precision: torch.dtype | None):
        super().__init__()
        self.model = model.train()
        self._shapes = key.shape, residual.shape
        held_before = _reserved_bytes()
        before = [buffer.clone() for buffer in model.buffers()]
        # Casts of the weights belong into the graph, because the weights change from step to step.
        with torch.autocast("cuda", precision, enabled=precision is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (key, residual))
        self.held_bytes = _reserved_bytes() - held_before
        # The recording keeps gradients on a stream of its own. PyTorch waits for it and would warn of it.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self._replay = model.forward
        del model.forward  # PyTorch put it there; the class has its own
        with torch.no_grad():  # PyTorch ran the network some times before it recorded
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)

    def forward(self, key: Tensor, residual: Tensor) -> Tensor:
        if self.training and (key.shape, residual.shape) == self._shapes:
            return self._replay(key, residual)
        return self.model(key, residual)


def _reserved_bytes() -> int:
    """What PyTorch's allocator holds and no empty block of: the graphs' memory is never empty, though nothing in it
    counts as allocated between two replays."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
