"""ANN branch: a torchvision ResNet (arXiv 1512.03385) as a stem and four stages."""

import functools
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from models.batch_norm import FrameBatchNorm2d
from models.colours import ColourConv2d
from utils.errors import UserError


class BasicBlock(torchvision_resnet.BasicBlock):
    """torchvision's, with addition and ReLU in the pass of the batch norm before them."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(out), _shortcut(self, x), relu=True)


class Bottleneck(torchvision_resnet.Bottleneck):
    """torchvision's, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        return self.bn3(self.conv3(out), _shortcut(self, x), relu=True)


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


class Stem(nn.Sequential):
    """Convolution, batch norm with ReLU, max pooling: [N, 3, H, W] -> [N, 64, H/4, W/4]."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, pool = self
        return pool(norm(convolution(x), relu=True))


_BLOCKS = {  # of each backbone, and their number in each stage
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
BACKBONES = tuple(_BLOCKS)


class ResNetStages(nn.Module):
    """Stem and stages of a ResNet, without its classifier.

    stem: [N, 3, H, W] -> [N, 64, H/4, W/4]. stages[i]: -> [N, channels[i], H/4/2^i, W/4/2^i].
    `weights` as for `load_weights`. backend: of the batch norms, as `models.neurons.lif`.
    """

    def __init__(self, backbone: str, weights: str | None = None, backend: str = "auto"):
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        norm = functools.partial(FrameBatchNorm2d, backend=backend)
        resnet = torchvision_resnet.ResNet(*_BLOCKS[backbone], norm_layer=norm)
        load_weights(resnet, backbone, weights)
        resnet.conv1.__class__ = ColourConv2d  # torchvision has no argument for it
        self.stem = Stem(resnet.conv1, resnet.bn1, resnet.maxpool)
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])
        expansion = resnet.layer1[0].expansion
        self.channels = [64 * expansion, 128 * expansion, 256 * expansion, 512 * expansion]


def load_weights(resnet: nn.Module, backbone: str, weights: str | None) -> None:
    """Fill a ResNet of torchvision, for images or for videos, in place.

    weights: None or "none" leaves the random initialisation; "default" takes torchvision's best
    weights (for ImageNet; for Kinetics-400 if it is a video network), a name such as "IMAGENET1K_V1"
    that entry of torchvision's list (both are downloaded once into torch.hub's cache); anything else is the
    path of a state dict. Raises UserError if the weights cannot be downloaded or read, or do not fit.
    """
    if weights is None or weights == "none":
        return
    available = torchvision.models.get_model_weights(backbone)
    if weights == "default" or weights in available.__members__:
        entry = available.DEFAULT if weights == "default" else available[weights]
        if torch.hub.get_dir().startswith("~"):  # as in a container whose user id is in no list of users
            raise UserError(
                f"{weights}: HOME is not set, and this user has no home folder to keep the ImageNet weights in; "
                "set XDG_CACHE_HOME to a writable folder, or give none to start from random weights",
                about="weights",
            )
        try:
            state_dict = entry.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"{weights}: the weights of {backbone} could not be downloaded ({error}); "
                f"fetch {entry.url} elsewhere and give its path, or none to start from random weights",
                about="weights",
            ) from error
    else:
        state_dict = read_state_dict(Path(weights))
    # The classifier is not used; files older than PyTorch 0.4.1 have no num_batches_tracked.
    own = {name for name in resnet.state_dict() if not name.startswith("fc.")}
    found = {name for name in state_dict if not name.startswith("fc.")}
    for names, what in ((sorted(found - own), "does not belong to it"), (sorted(own - found), "is missing")):
        names = [name for name in names if not name.endswith("num_batches_tracked")]
        if names:
            raise UserError(f"{weights}: not the weights of a {backbone}: {names[0]} {what}", about="weights")
    try:
        resnet.load_state_dict({name: state_dict[name] for name in found & own}, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{weights}: not the weights of a {backbone}: {_first_detail(error)}", about="weights"
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    expected = "expected default, none, a torchvision weights name or a file"
    if not path.is_file():
        found = "this is a folder; --init takes a run" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {expected}; {found}", about="weights")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged or unsafe file
        raise UserError(f"{path}: not a readable state dict ({_first_detail(error)})", about="weights") from error
    if not isinstance(state_dict, dict) or not all(isinstance(v, Tensor) for v in state_dict.values()):
        found = f"a {type(state_dict).__name__}"
        if isinstance(state_dict, dict) and "model" in state_dict:
            found = "the checkpoint of a run; --init takes this file"
        raise UserError(f"{path}: expected a state dict (name -> tensor), found {found}", about="weights")
    return state_dict


def _first_detail(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines[0] if lines else type(error).__name__)
