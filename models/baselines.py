"""Networks to compare ReSpike with, trained on the same clips by the same scripts.

Both see every frame of a clip as a key frame: key [B, T, 3, H, W], as `dataset.residual.every_frame_a_key` gives
it, and a residual without frames. So they share ReSpike's loader, training, evaluation and energy.
"""

import contextlib

import torch
import torchvision
from torch import Tensor, nn

from models.network import Network
from models.resnet import ResNetStages, load_weights
from utils.errors import UserError

VIDEO_BACKBONES = ("r3d_18", "mc3_18", "r2plus1d_18")


class FramesResNet(Network):
    """A ResNet on each frame, its features averaged over the clip (TSN's consensus, arXiv 1608.00859).

    forward: key [B, T, 3, H, W], normalised; residual without frames -> logits [B, num_classes]. The average comes
    behind the linear classifier, which is the same as before it.

    backbone: resnet18, 34, 50, 101 or 152. weights: as `models.resnet.load_weights`. lif_backend: of the batch norms,
    as `models.neurons.lif`. Raises UserError.
    """

    stride = 1

    def __init__(
        self, backbone: str = "resnet18", num_classes: int = 51, weights: str | None = None, lif_backend: str = "auto"
    ):
        super().__init__()
        self.snn, self.fusions = None, ()
        self.ann = ResNetStages(backbone, weights, lif_backend)
        self.head = nn.Linear(self.ann.channels[-1], num_classes)

    @classmethod
    def from_settings(cls, settings: dict, lif_backend: str) -> "FramesResNet":
        return cls(settings["backbone"], settings["num_classes"], lif_backend=lif_backend)

    def forward(self, key: Tensor, residual: Tensor) -> Tensor:
        features = self.ann.stem(key.flatten(0, 1))  # [B*T, 64, H/4, W/4]
        for stage in self.ann.stages:
            features = stage(features)  # [B*T, C, H', W']
        logits = self.head(features.movedim(1, -1).mean((1, 2)))  # [B*T, classes]
        return logits.unflatten(0, key.shape[:2]).mean(1)


class VideoResNet(Network):
    """A video ResNet of torchvision (Tran et al., arXiv 1711.11248) on all T frames as one clip.

    forward: key [B, T, 3, H, W], normalised with ImageNet's constants, as all clips here; residual without frames
    -> logits [B, num_classes]. The network itself changes the clip to the constants of torchvision's Kinetics weights.
    On a CPU it computes in float32 whatever the precision of the run.

    backbone: r3d_18, mc3_18 or r2plus1d_18. weights: as `models.resnet.load_weights`, "default" are torchvision's
    for Kinetics-400. Raises UserError.
    """

    stride = 1
    memory_format = torch.channels_last_3d

    def __init__(self, backbone: str = "r3d_18", num_classes: int = 51, weights: str | None = None):
        super().__init__()
        self.snn, self.fusions = None, ()
        if backbone not in VIDEO_BACKBONES:
            raise UserError(f"backbone must be one of {', '.join(VIDEO_BACKBONES)}, got {backbone!r}")
        network = torchvision.models.get_model(backbone, weights=None)
        load_weights(network, backbone, weights)
        self.head = nn.Linear(network.fc.in_features, num_classes)
        network.fc = nn.Identity()
        self.body = network
        mean, std = _constants("resnet18")
        own_mean, own_std = _constants(backbone)
        self.register_buffer("scale", (std / own_std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_settings(cls, settings: dict, lif_backend: str) -> "VideoResNet":
        return cls(settings["backbone"], settings["num_classes"])

    def forward(self, key: Tensor, residual: Tensor) -> Tensor:
        clip = (key[:, :, :3] * self.scale + self.shift).transpose(1, 2)  # [B, 3, T, H, W]
        # On a CPU the bfloat16 gradient of a 3-D convolution of 2 frames holds memory that nobody wrote (PyTorch 2.15).
        with contextlib.nullcontext() if clip.is_cuda else torch.autocast("cpu", enabled=False):
            return self.head(self.body(clip))  # [B, classes]


def _constants(network: str) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation), [3] each, that torchvision normalises the pixels of this network with."""
    transform = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    return torch.tensor(transform.mean), torch.tensor(transform.std)
