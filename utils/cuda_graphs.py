"""The training network's forward and backward pass as CUDA graphs: two launches instead of thousands.

Worth it where the host is slower than the GPU: small batches, small frames. The graphs keep the activations' memory for
themselves, also while the network is tested.
"""

import torch
from torch import Tensor, nn


class GraphedNetwork(nn.Module):
    """`model` in training, replayed as CUDA graphs for batches of the size of the first one. Batches of another size
    (the last of an epoch) run as they are.

    Gradients lie in the same memory after each backward pass, so each must be used up before the next one: one batch an
    optimizer step.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._replay = None

    def forward(self, key: Tensor, residual: Tensor) -> Tensor:
        if self.training and self._replay is None:
            self._shapes = key.shape, residual.shape
            self._replay = self._capture(key, residual)
        if self.training and (key.shape, residual.shape) == self._shapes:
            return self._replay(key, residual)
        return self.model(key, residual)

    def _capture(self, key: Tensor, residual: Tensor):
        """The function that replays. PyTorch runs the network some times before it records; the running statistics are
        then as they were."""
        before = [buffer.clone() for buffer in self.model.buffers()]
        # Casts of the weights belong into the graph: the weights change from step to step.
        precision = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", precision, torch.is_autocast_enabled("cuda"), cache_enabled=False):
            torch.cuda.make_graphed_callables(self.model, (key, residual))
        replay = self.model.forward
        del self.model.forward  # PyTorch put it there; the class has its own
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)
        return replay
