"""A trained network as a file: what it says, exporting, and what is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import ReSpike
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.trained import export, load_trained

SETTINGS = {
    "backbone": "resnet18", "num_classes": 3, "stride": 2, "downsample": True, "branches": "snn", "fusion": "lean",
    "snn_batch_norm": "merged", "classes": ["a", "b", "c"], "T": 4, "residual": "previous", "neuron": "lif", "tau": 2.0,
    "surrogate": "sigmoid", "alpha": 3.0,
}  # fmt: skip
FLAGS = {"dset": "hmdb51", "size": 32, "sampling": "window", "precision": "bfloat16"}


def trained_model() -> ReSpike:
    torch.manual_seed(1)
    return ReSpike("resnet18", 3, 2, branches="snn", fusion="lean", snn_batch_norm="merged").eval()


def write(path: Path, model: torch.nn.Module, settings: dict = SETTINGS, **more) -> Path:
    state = {"model": model.state_dict(), "model_settings": settings, "flags": FLAGS, "position": {"epoch": 7}}
    save_checkpoint(path, state | more)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write(tmp_path / "best.pt", trained_model())


@pytest.fixture
def other_default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture
def exported(checkpoint, tmp_path) -> Path:
    export(load_trained(checkpoint), tmp_path / "network.safetensors")
    return tmp_path / "network.safetensors"


def test_the_network_comes_back_from_either_file(checkpoint, exported):
    key, residual = torch.randn(1, 2, 3, 32, 32), torch.randn(1, 2, 1, 3, 32, 32)
    for path in (checkpoint, exported, checkpoint.parent):  # a run folder stands for its best.pt
        model = ReSpike.from_checkpoint(path)
        neuron = model.snn.stages[0][0].lif1.parameters_
        assert (neuron.tau, neuron.surrogate, neuron.alpha) == (2.0, "sigmoid", 3.0)
        assert model.snn.stem.bn.mode == "merged" and not model.training
        with torch.no_grad():
            sent = model(key, residual)
        reference = ReSpike("resnet18", 3, 2, branches="snn", snn_batch_norm="merged", neuron=neuron).eval()
        reference.load_state_dict(trained_model().state_dict())
        with torch.no_grad():
            assert torch.equal(sent, reference(key, residual))
        it = model.trained
        assert (it.classes, it.frames, it.stride, it.residual) == (["a", "b", "c"], 4, 2, "previous")
        assert (it.size, it.sampling, it.precision, it.epochs) == (32, "window", "bfloat16", 7)


def test_a_network_comes_to_the_cpu_whatever_the_default_device(checkpoint, exported, other_default_device):
    for path in (checkpoint, exported):
        model = ReSpike.from_checkpoint(path)
        tensors = [*model.state_dict().values(), *model.buffers(), *model.trained.weights.values()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert torch.empty(1).device.type == "meta"


def test_an_earlier_checkpoint_had_todays_defaults(tmp_path):
    later = ("residual", "neuron", "tau", "surrogate", "alpha")
    settings = {name: value for name, value in SETTINGS.items() if name not in later}
    model = ReSpike.from_checkpoint(write(tmp_path / "old.pt", trained_model(), settings))
    assert model.trained.residual == "key" and model.snn.stages[0][0].lif1.parameters_.tau == pytest.approx(4 / 3)


def test_the_optimizer_is_not_exported(checkpoint, exported):
    weights = sum(value.numel() * value.element_size() for value in trained_model().state_dict().values())
    assert weights < exported.stat().st_size < weights + 50_000


def not_finite(path: Path) -> Path:
    model = trained_model()
    model.head.bias.data[1] = float("nan")
    return write(path, model)


def without_settings(path: Path) -> Path:
    save_file({"w": torch.zeros(2)}, path)
    return path


def cut_off(path: Path) -> Path:
    export(load_trained(write(path.with_suffix(".pt"), trained_model())), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    "make, name, message",
    [
        (lambda path: path, "no.pt", "no such checkpoint"),
        (lambda path: path, "no.safetensors", "no such file"),
        (not_finite, "nan.pt", r"its weights head\.bias are not all finite"),
        (without_settings, "other.safetensors", "without the settings of this project"),
        (cut_off, "cut.safetensors", "damaged or was cut off"),
        (lambda path: write(path, trained_model(), SETTINGS | {"fusion": "sum"}), "f.pt", "cross, film, lean, concat"),
        (lambda path: write(path, trained_model(), SETTINGS | {"num_classes": 4}), "c.pt", "not a whole network"),
        (lambda path: write(path, trained_model(), {"classes": ["a"]}), "s.pt", "not a whole network"),
        (lambda path: write(path, trained_model(), position={}), "p.pt", "not a whole checkpoint"),
    ],
)
def test_refused(tmp_path, make, name, message):
    with pytest.raises(UserError, match=message) as caught:
        ReSpike.from_checkpoint(make(tmp_path / name))
    assert "\n" not in str(caught.value) and (name in str(caught.value) or name == "f.pt")


def test_a_pickle_runs_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save({"format": 2, "model_settings": SETTINGS, "model": Malicious()}, tmp_path / "zip.pt")
    for name in ("raw.pt", "zip.pt"):
        with pytest.raises(UserError, match=f"{name}: not a readable checkpoint"):
            load_trained(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_an_export_has_the_suffix(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export(load_trained(checkpoint), tmp_path / "network.pt")
    with pytest.raises(UserError, match="cannot be written"):
        export(load_trained(checkpoint), tmp_path / "no folder" / "network.safetensors")
