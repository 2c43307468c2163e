"""The ANN branch is torchvision's ResNet, with its batch norms, additions and ReLUs in one pass on a GPU."""

import pytest
import torch
import torchvision

from models.resnet import ResNetStages

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(backbone: str, backend: str = "auto") -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(backbone, weights=None)
    torch.manual_seed(3)
    return ResNetStages(backbone, backend=backend).train(), theirs.train()


def features_of_torchvision(resnet, x):
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


def features_of_ours(resnet, x):
    x = resnet.stem(x)
    for stage in resnet.stages:
        x = stage(x)
    return x


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_it_is_torchvisions_to_the_bit(backbone):
    """First weights, features in training and evaluation, gradients and running statistics."""
    ours, theirs = pair(backbone)
    x = torch.randn(3, 3, 64, 64)
    results = []
    for resnet, features in ((ours, features_of_ours), (theirs, features_of_torchvision)):
        trained = features(resnet, x)
        trained.square().sum().backward()
        evaluated = features(resnet.eval(), x)
        parameters = [value for name, value in resnet.named_parameters() if not name.startswith("fc.")]
        results.append([trained, evaluated, *parameters, *(value.grad for value in parameters), *resnet.buffers()])
    for own, other in zip(*results, strict=True):
        assert torch.equal(own, other)


@pytest.mark.kernels
# Channels-last, as in training, a program has several channels: Triton's interpreter takes a fraction of the time.
@pytest.mark.parametrize(
    "backbone, layout", [("resnet18", torch.contiguous_format), ("resnet50", torch.channels_last)], ids=str
)
def test_the_kernels_give_the_same_stem_and_block(backbone, layout):
    results = []
    for backend in ("triton", "reference"):
        ours, _ = pair(backbone, backend)
        parts = torch.nn.Sequential(ours.stem, ours.stages[0][:1]).to(torch.float64, memory_format=layout)
        torch.manual_seed(4)
        features = parts(torch.randn(2, 3, 16, 16, dtype=torch.float64))
        features.square().sum().backward()
        results.append([features, *(value.grad for value in parts.parameters()), *parts.buffers()])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9 * other.detach().abs().max().item())
