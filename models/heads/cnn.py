"""The frozen CNN whose features of single frames are cached (`utils.heads.features`)."""

import hashlib
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.resnet import BACKBONES, load_weights, read_state_dict
from utils.errors import UserError

_PROJECTION_WIDTHS = (1024, 768, 512)


class FrameCNN(nn.Module):
    """A torchvision ResNet without its classifier: normalised frames [N, 3, H, W] -> features [N, width].

    The features are the global average of the last stage: width is 2048, or 512 for resnet18 and resnet34. With
    `projection` they go through the published layers 2048-1024-768-512, and width is 512. The module starts in eval
    mode, without gradients.

    weights: as for `models.resnet.load_weights`. With `projection`, a path is a state dict of this module; its
        names are those of the published "ResCNNEncoder" checkpoints (resnet.<number of the ResNet's child>, fc1,
        bn1, fc2, bn2, fc3). All other weights leave the projection random.

    Raises UserError if the weights cannot be loaded or do not fit.
    """

    def __init__(self, backbone: str = "resnet152", weights: str | None = "default", projection: bool = False):
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        resnet = torchvision.models.get_model(backbone, weights=None)
        named = (None, "none", "default", *torchvision.models.get_model_weights(backbone).__members__)
        own_file = projection and weights not in named
        if not own_file:
            load_weights(resnet, backbone, weights)
        self.projection = projection
        self.width = resnet.fc.in_features
        self.resnet = nn.Sequential(*list(resnet.children())[:-1])
        if projection:
            first, second, last = _PROJECTION_WIDTHS
            self.fc1, self.bn1 = nn.Linear(self.width, first), nn.BatchNorm1d(first)
            self.fc2, self.bn2 = nn.Linear(first, second), nn.BatchNorm1d(second)
            self.fc3 = nn.Linear(second, last)
            self.width = last
        if own_file:
            _load_state_dict(self, weights, f"a {backbone} with its projection")
        self.requires_grad_(False).eval()

    def forward(self, frames: Tensor) -> Tensor:
        features = self.resnet(frames).flatten(1)
        if not self.projection:
            return features
        features = self.bn1(self.fc1(features)).relu()
        features = self.bn2(self.fc2(features)).relu()
        return self.fc3(features)


def _load_state_dict(network: nn.Module, file: str, what: str) -> None:
    """Raises UserError with the first key that is unknown, missing or of another shape."""
    # DataParallel puts "module." before each name.
    found = {name.removeprefix("module."): value for name, value in read_state_dict(Path(file)).items()}
    own = network.state_dict()
    problems = [f"{name} does not belong to it" for name in found if name not in own]
    for name, value in own.items():
        if name not in found:  # files older than PyTorch 0.4.1 have no num_batches_tracked
            problems += [] if name.endswith("num_batches_tracked") else [f"{name} is missing"]
        elif found[name].shape != value.shape:
            problems.append(f"{name} is {list(found[name].shape)}, expected {list(value.shape)}")
    if problems:
        raise UserError(f"{file}: not the weights of {what}: {problems[0]}", about="weights")
    network.load_state_dict(found, strict=False)


def weights_digest(network: nn.Module) -> str:
    """sha256, in hexadecimal, of the names, shapes, types and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        # Viewed as bytes, because numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
