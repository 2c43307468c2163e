"""The frozen CNN: its features, its weights and their digest."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from models.heads.cnn import FrameCNN, weights_digest
from utils.errors import UserError


@pytest.fixture(scope="module")
def projected() -> FrameCNN:
    torch.manual_seed(1)
    return FrameCNN("resnet18", "none", projection=True)


def test_frame_cnn_is_the_resnet_without_its_classifier(tmp_path):
    resnet = resnet18().eval()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    network = FrameCNN("resnet18", str(tmp_path / "resnet18.pth"))
    assert network.width == 512 and not network.training
    assert not any(value.requires_grad for value in network.parameters())
    frames = torch.randn(2, 3, 32, 32)
    resnet.fc = nn.Identity()
    torch.testing.assert_close(network(frames), resnet(frames))
    with pytest.raises(UserError, match=r"backbone must be one of resnet18.*got 'vgg16'"):
        FrameCNN("vgg16")


def test_widths_of_the_published_network():
    with torch.device("meta"):
        networks = [FrameCNN("resnet152", "none", projection) for projection in (False, True)]
        assert [network(torch.zeros(2, 3, 64, 64)).shape for network in networks] == [(2, 2048), (2, 512)]
    assert [network.width for network in networks] == [2048, 512]
    layers = [networks[1].fc1, networks[1].fc2, networks[1].fc3]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(2048, 1024), (1024, 768), (768, 512)]


def test_projection(projected, tmp_path):
    frames = torch.randn(2, 3, 32, 32)
    want = projected(frames)
    assert want.shape == (2, 512) and projected.width == 512 and projected.fc1.in_features == 512
    own = projected.state_dict()
    assert {name.split(".")[0] for name in own} == {"resnet", "fc1", "bn1", "fc2", "bn2", "fc3"}
    file = tmp_path / "cnn.pth"
    old = {f"module.{name}": value for name, value in own.items() if not name.endswith("num_batches_tracked")}
    for content in (own, old):
        torch.save(content, file)
        assert torch.equal(FrameCNN("resnet18", str(file), projection=True)(frames), want)


def test_weights_of_something_else_are_refused(projected, tmp_path):
    own = projected.state_dict()
    file = tmp_path / "cnn.pth"
    without = {name: value for name, value in own.items() if name != "fc2.weight"}
    for content, message in (
        (without, "fc2.weight is missing"),
        ({**own, "fc4.weight": torch.zeros(1)}, "fc4.weight does not belong to it"),
        ({**own, "fc3.bias": torch.zeros(7)}, r"fc3.bias is \[7\], expected \[512\]"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=message) as caught:
            FrameCNN("resnet18", str(file), projection=True)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        FrameCNN("resnet18", str(tmp_path / "none.pth"), projection=True)


def test_weights_digest():
    def layer(seed: int) -> nn.Linear:
        torch.manual_seed(seed)
        return nn.Linear(6, 5)

    digests = {weights_digest(layer(seed)) for seed in (0, 0, 1)}
    digests.add(weights_digest(layer(0).to(torch.bfloat16)))
    digests.add(weights_digest(nn.Sequential(layer(0))))
    assert len(digests) == 4 and {len(digest) for digest in digests} == {64}
    assert weights_digest(nn.BatchNorm2d(2)) == weights_digest(nn.BatchNorm2d(2))
