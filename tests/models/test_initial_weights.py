"""--init: which weights are taken, and what is refused."""

import pytest
import torch

from models import ReSpike
from models.initial_weights import initialise
from models.published_weights import published_names
from tests.utils.test_trained import SETTINGS, trained_model, write
from utils.errors import UserError
from utils.trained import export, load_trained


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "best.pt", trained_model())


def fresh(classes: int = 3) -> ReSpike:
    torch.manual_seed(2)
    return ReSpike("resnet18", classes, 2, branches="snn", fusion="lean", snn_batch_norm="merged")


def equal(model: ReSpike, other: ReSpike, head: bool) -> bool:
    own, others = model.state_dict(), other.state_dict()
    return all(torch.equal(own[name], others[name]) for name in own if head or not name.startswith("head."))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_same_classes_keep_the_head(checkpoint, tmp_path, suffix):
    if suffix == ".safetensors":
        export(load_trained(checkpoint), tmp_path / "n.safetensors")
        checkpoint = tmp_path / "n.safetensors"
    model = fresh()
    line = initialise(model, SETTINGS, checkpoint)
    assert equal(model, trained_model(), head=True)
    assert line == f"network: starts from {checkpoint} (trained for 7 epochs)"


@pytest.mark.parametrize("classes", [["x", "y", "z"], ["a", "b"], ["b", "a", "c"]])
def test_other_classes_have_a_new_head(checkpoint, classes):
    model = fresh(len(classes))
    head = model.head.weight.clone()
    line = initialise(model, SETTINGS | {"classes": classes}, checkpoint)
    assert equal(model, trained_model(), head=False) and torch.equal(model.head.weight, head)
    assert line.endswith("; the head is new: other classes")


def test_changed_settings_are_reported(checkpoint):
    line = initialise(fresh(), SETTINGS | {"stride": 4, "tau": 1.5}, checkpoint)
    assert "(trained for 7 epochs; stride 2 there, 4 here; tau 2.0 there, 1.5 here)" in line


@pytest.mark.parametrize(
    "name, value, flag",
    [("backbone", "resnet50", "model"), ("fusion", "cross", "fusion"), ("downsample", False, "downsample"),
     ("branches", "both", "branches")],
)  # fmt: skip
def test_another_network_is_refused_by_name(checkpoint, name, value, flag):
    with pytest.raises(UserError, match=f"its --{flag} is {SETTINGS[name]}, this run has {value}") as caught:
        initialise(fresh(), SETTINGS | {name: value}, checkpoint)
    assert caught.value.about == "init"


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_the_published_code(tmp_path, classes, prefix):
    source = ReSpike(num_classes=3)
    own = source.state_dict()
    published = {f"{prefix}{name}": own[ours] for name, ours in published_names(source).items()}
    torch.save(published, tmp_path / "published.pth")
    model = ReSpike(num_classes=classes)
    line = initialise(model, {}, tmp_path / "published.pth")
    assert equal(model, source, head=classes == 3) and "weights of the published code" in line
    assert line.endswith("the head is new: other classes") == (classes == 5)


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_state_dict_of_this_network(tmp_path, classes, prefix):
    weights = {f"{prefix}{name}": value for name, value in trained_model().state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    model = fresh(classes)
    head = model.head.weight.clone()
    line = initialise(model, SETTINGS | {"classes": list("vwxyz")[:classes]}, tmp_path / "weights.pt")
    assert equal(model, trained_model(), head=classes == 3) and torch.equal(model.head.weight, head) == (classes == 5)
    new_head = "" if classes == 3 else "; the head is new: other classes"
    assert line == f"network: starts from {tmp_path}/weights.pt (a state dict, without settings){new_head}"


@pytest.mark.parametrize("change", [{"branches": "both"}, {"branches": "ann"}, {"branches": "both", "fusion": "cross"}])
def test_a_state_dict_of_another_network_names_the_flags(tmp_path, change):
    torch.save(trained_model().state_dict(), tmp_path / "weights.pt")
    other = ReSpike(**{"num_classes": 3, "stride": 2, "fusion": "lean"} | change)
    with pytest.raises(
        UserError, match=r"not weights of the network that --model, --branches, .* name \(.*Missing"
    ) as e:
        initialise(other, SETTINGS, tmp_path / "weights.pt")
    assert e.value.about == "init" and "\n" not in str(e.value)


def test_running_statistics_of_all_steps_are_taken_for_every_step(checkpoint, tmp_path):
    source, settings = trained_model(), SETTINGS | {"snn_batch_norm": "through-time"}
    model = ReSpike("resnet18", 3, 4, branches="snn", fusion="lean", snn_batch_norm="through-time")
    line = initialise(model, settings, checkpoint)
    assert "snn_batch_norm merged there, through-time here" in line
    assert line.endswith("; SNN batch norm: every time step starts from statistics of all steps")
    for name, value in source.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(model.get_buffer(name), value.expand(3, -1))

    source = ReSpike(num_classes=3)
    source.snn.stages[1][0].shortcut_bn.running_var.uniform_(0.5, 2.0)
    own = source.state_dict()
    torch.save({name: own[ours] for name, ours in published_names(source).items()}, tmp_path / "published.pth")
    model = ReSpike(num_classes=3, snn_batch_norm="through-time")
    line = initialise(model, settings, tmp_path / "published.pth")
    assert line.endswith("(weights of the published code); SNN batch norm: every time step starts from statistics of "
                         "all steps")  # fmt: skip
    assert torch.equal(
        model.snn.stages[1][0].shortcut_bn.running_var, source.snn.stages[1][0].shortcut_bn.running_var.expand(3, -1)
    )
    key, residual = torch.randn(1, 2, 3, 32, 32), torch.randn(1, 2, 3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(key, residual), source.eval()(key, residual))


def test_published_weights_of_another_backbone(tmp_path):
    source = ReSpike("resnet34", num_classes=3)
    own = source.state_dict()
    torch.save({name: own[ours] for name, ours in published_names(source).items()}, tmp_path / "r34.pth")
    with pytest.raises(UserError, match="not a state dict of the published network with these settings"):
        initialise(ReSpike(num_classes=3), {}, tmp_path / "r34.pth")


def test_a_frozen_ann_stays_as_it_is():
    model = ReSpike(num_classes=3, stride=2)
    model.freeze_ann()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(torch.randn(2, 2, 3, 32, 32), torch.randn(2, 2, 1, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("ann.") for name in changed)
    assert "snn.stem.conv.weight" in changed and "snn.stem.bn.running_mean" in changed
