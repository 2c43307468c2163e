"""What every network that the training scripts make has in common: how it comes back from a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import nn

from utils.errors import UserError
from utils.trained import TrainedNetwork, load_trained


class Network(nn.Module):
    """Base of `models.ReSpike` and of the networks that it is compared with (`models.baselines`).

    forward: key [B, K, 3, H, W] and residual [B, K, stride-1, 3, H, W], both normalised, as
    `dataset.residual.key_residual_split` makes them -> logits [B, classes].

    head: the linear classifier. stride: frames of a segment. snn, fusions: what is drawn and counted beside the rest.
    """

    stride: int
    head: nn.Linear
    snn: nn.Module | None  # None of a network without spikes
    fusions: nn.ModuleList | tuple  # of each stage; None for a stage without one
    memory_format = torch.channels_last  # of the weights, as the layers run fastest
    trained: TrainedNetwork | None = None  # how, if the network comes from a checkpoint
    from_settings: Callable[[dict, str], Self]  # settings of a checkpoint, lif_backend -> with random weights

    def lif_layers(self) -> dict[str, list[nn.Module]]:
        """The spiking neurons of each stage; empty without an SNN."""
        return {}

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, lif_backend: str = "auto") -> Self:
        """The network of a checkpoint or of a file that `evaluate.py --export` wrote, on the CPU and in eval mode.

        Its attribute `trained` has the class names, T, stride, size, sampling and every flag of the training script.
        Raises UserError if the file is absent, damaged or of another class of networks; `models.load_network` takes
        them all.
        """
        return cls.from_trained(load_trained(Path(path)), lif_backend)

    @classmethod
    def from_trained(cls, trained: TrainedNetwork, lif_backend: str = "auto") -> Self:
        if trained.network != cls.__name__:
            raise UserError(
                f"{trained.path}: a {trained.network} ({trained.settings.get('backbone')}), expected a {cls.__name__}"
            )
        try:
            with torch.device("cpu"):  # whatever torch.set_default_device says
                model = cls.from_settings(trained.settings, lif_backend)
            model.load_state_dict(trained.weights)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{trained.path}: not a whole network of this project ({detail})") from error
        model.trained = trained
        return model.eval()
