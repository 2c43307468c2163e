"""The networks that ReSpike is compared with."""

import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as F

from dataset.residual import every_frame_a_key
from models import FramesResNet, ReSpike, VideoResNet, load_network
from models.baselines import VIDEO_BACKBONES
from models.resnet import load_weights
from utils.energy import baselines, count_operations
from utils.errors import UserError
from utils.trained import TrainedNetwork, export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randint(0, 256, (2, 5, 3, 64, 96), dtype=torch.uint8)


def test_frames_is_torchvisions_resnet_averaged_over_the_frames(clip):
    resnet = torchvision.models.resnet18(num_classes=7).eval()
    model = FramesResNet("resnet18", 7)
    own = dict(model.state_dict())
    for (name, value), (_, theirs) in zip(own.items(), resnet.state_dict().items(), strict=True):
        assert value.shape == theirs.shape, name
    model.load_state_dict(dict(zip(own, resnet.state_dict().values(), strict=True)))
    frames = F.normalize(clip / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        want = torch.stack([resnet(frames[:, t]) for t in range(5)]).mean(0)
        torch.testing.assert_close(model.eval()(*every_frame_a_key(clip)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", VIDEO_BACKBONES)
def test_video_networks_are_torchvisions_with_its_constants(clip, backbone):
    """Written a second time: torchvision's own network and the constants of its Kinetics weights."""
    theirs = torchvision.models.get_model(backbone, num_classes=7).eval()
    model = VideoResNet(backbone, 7).eval()
    body = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    model.body.load_state_dict(body)
    model.head.load_state_dict(theirs.fc.state_dict())
    frames = F.normalize(clip / 255, (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    with torch.no_grad():
        want = theirs(frames.transpose(1, 2))
        torch.testing.assert_close(model(*every_frame_a_key(clip)), want, rtol=1e-4, atol=1e-5)
        padded = every_frame_a_key(clip, channels=8)
        torch.testing.assert_close(model(*padded), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make, row",
    [
        (lambda: FramesResNet("resnet18", 51), "resnet18_all_frames"),
        (lambda: FramesResNet("resnet50", 51), "resnet50_all_frames"),
        *((lambda name=name: VideoResNet(name, 51), f"{name}_224") for name in VIDEO_BACKBONES),
    ],
)
def test_operations_are_those_of_the_row_in_the_energy_table(make, row):
    with torch.device("meta"):
        model, respike = make(), ReSpike("resnet18", 51)
    assert count_operations(model, 16, 224)["total.macs"] == baselines(respike, 16, 224, 51)[row]["macs"]


def test_weights_of_a_file(tmp_path):
    theirs = torchvision.models.get_model("r3d_18")
    torch.save(theirs.state_dict(), tmp_path / "r3d.pth")
    model = VideoResNet("r3d_18", 5, weights=str(tmp_path / "r3d.pth"))
    assert torch.equal(model.body.layer4[1].conv2[0].weight, theirs.layer4[1].conv2[0].weight)
    with pytest.raises(UserError, match="not the weights of a mc3_18"):
        VideoResNet("mc3_18", 5, weights=str(tmp_path / "r3d.pth"))


def test_weights_that_cannot_be_fetched_name_the_file(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"r2plus1d_18 could not be downloaded \(no network\); fetch \S+r2plus1d"):
        load_weights(torchvision.models.get_model("r2plus1d_18"), "r2plus1d_18", "default")


@pytest.mark.parametrize(
    "model", [FramesResNet("resnet18", 3), VideoResNet("mc3_18", 3)], ids=lambda m: type(m).__name__
)
def test_a_checkpoint_gives_its_own_network_and_no_other(tmp_path, clip, model):
    backbone = "mc3_18" if isinstance(model, VideoResNet) else "resnet18"
    settings = dict(
        network=type(model).__name__, backbone=backbone, num_classes=3, classes=["a", "b", "c"], T=5, stride=1
    )
    path = tmp_path / "network.safetensors"
    export(TrainedNetwork(path, model.state_dict(), settings, {}, epochs=1), path)
    loaded = load_network(path)
    assert type(loaded) is type(model) and loaded.trained.frames == 5 and not loaded.training
    batch = every_frame_a_key(clip)
    with torch.no_grad():
        assert torch.equal(loaded(*batch), model.eval()(*batch))
    with pytest.raises(UserError, match=rf"a {type(model).__name__} \({backbone}\), expected a ReSpike"):
        ReSpike.from_checkpoint(path)


def test_gradients_of_two_frames_in_bfloat16_on_a_cpu_are_those_of_float32():
    """PyTorch's own bfloat16 gradient there holds, now and then, whatever lay in memory before."""
    model, gradients = VideoResNet("r3d_18", 3), []
    key, residual = every_frame_a_key(torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8))
    for bfloat16 in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(key, residual).square().sum()
        loss.backward()
        gradients.append(model.body.layer2[0].conv2[0].weight.grad.clone())
        model.zero_grad()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
