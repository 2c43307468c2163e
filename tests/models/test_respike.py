"""Structure of the network: sizes, variants, ablations, layouts, refusals. Numbers: test_golden.py."""

import pytest
import torch

from dataset.residual import key_residual_split
from models import ReSpike
from models.batch_norm import BATCH_NORMS
from models.kernels.parameters import LIFParameters
from models.neurons import BACKENDS, LIF, NEURONS
from models.resnet import read_state_dict
from tests.helpers.spikingjelly import skip_without_spikingjelly
from tests.models.test_golden import published_state_dict
from utils.errors import UserError
from utils.training.metrics import FiringRates


def clip(batch=2, frames=8, size=64, dtype=torch.float32):
    return torch.randn(batch, frames, 3, size, size, dtype=dtype)


def forward(model, stride=4, **shape):
    torch.manual_seed(1)
    return model(*key_residual_split(clip(**shape), stride))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("backbone, parameters", [("resnet18", 30_081_523), ("resnet50", 44_580_339)])
def test_parameters_of_the_published_network(backbone, parameters):
    assert count(ReSpike(backbone, num_classes=51, downsample=True)) == parameters


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_backbones(backbone):
    with torch.device("meta"):
        model = ReSpike(backbone, num_classes=9)
        logits = model(torch.empty(1, 2, 3, 32, 32), torch.empty(1, 2, 3, 3, 32, 32))
    assert logits.shape == (1, 9)


@pytest.mark.parametrize(
    "branches, fusion, width",
    [("both", "cross", 1024), ("both", "concat", 1024), ("ann", "cross", 512), ("snn", "concat", 512)],
)
def test_ablations(branches, fusion, width):
    model = ReSpike(num_classes=5, branches=branches, fusion=fusion)
    assert model.head.in_features == width
    assert any(block is not None for block in model.fusions) == (branches == "both" and fusion == "cross")
    logits = forward(model)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    # The last convolution of a fusion block is zero at first: what is before it learns from step 2 on.
    assert all(p.grad is not None for p in model.parameters())


def test_channels_of_zeros_behind_the_colours_change_nothing():
    """As frames come on a GPU. Gradients too: those of the weights that meet zeros alone are none."""
    torch.manual_seed(2)
    model = ReSpike(num_classes=5).double()
    frames = clip(dtype=torch.float64)
    results = []
    for channels in (3, 8):
        logits = model(*key_residual_split(frames, 4, channels=channels))
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_ann_alone_sees_no_residual_and_snn_alone_no_key_frame():
    key, residual = key_residual_split(clip(), 4)
    ann, snn = ReSpike(branches="ann").eval(), ReSpike(branches="snn").eval()
    with torch.no_grad():
        assert torch.equal(ann(key, residual), ann(key, residual * 0))
        assert torch.equal(snn(key, residual), snn(key * 0, residual))
        assert not torch.equal(snn(key, residual), snn(key, residual * 3))


def test_variants_fuse_where_they_should():
    assert [block is not None for block in ReSpike(downsample=True).fusions] == [True] * 4
    assert [block is not None for block in ReSpike(downsample=False).fusions] == [False, True, True, True]
    assert [block.pool for block in ReSpike(downsample=True).fusions] == [4, 2, 1, 1]


@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("fusion", ["cross", "film", "lean"])
def test_a_fresh_network_does_not_fuse_yet(fusion, downsample):
    """The last layer starts at zero, so the block is the identity and equals concat."""
    fused, concat = ReSpike(fusion=fusion, downsample=downsample).eval(), ReSpike(fusion="concat").eval()
    concat.load_state_dict(fused.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(forward(fused), forward(concat))


def test_channels_last_does_not_change_the_numbers():
    model = ReSpike().double().eval()
    key, residual = (x.double() for x in key_residual_split(clip(), 4))
    with torch.no_grad():
        want = model(key.contiguous(), residual.contiguous())
        got = model.to(memory_format=torch.channels_last)(key, residual)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("downsample", [True, False])
def test_agrees_with_a_plain_build_that_steps_through_time(downsample):
    """An independent way to the same numbers: SpikingJelly's LIFNode, a loop over steps, softmax attention."""
    skip_without_spikingjelly()
    from benchmarks.plain_respike import PlainReSpike, plain_split

    model = ReSpike(num_classes=7, downsample=downsample).double()
    model.load_reference_state_dict(published_state_dict("resnet18"))
    plain = PlainReSpike(model).double()
    frames = torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8)
    for ours, theirs in zip(key_residual_split(frames, 4), plain_split(frames, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    key, residual = key_residual_split(clip(dtype=torch.float64), 4)
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(model(key, residual), plain(key, residual), rtol=1e-9, atol=1e-9)


def test_merged_batch_norm_uses_one_set_of_statistics():
    model = ReSpike(branches="snn", snn_batch_norm="merged").train()
    bn = model.snn.stem.bn
    x = torch.randn(3, 2, 64, 4, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None, None]
    merged, _ = bn(x)
    torch.testing.assert_close(
        merged.transpose(0, 2).flatten(1).var(1, unbiased=False), torch.ones(64), rtol=1e-3, atol=1e-3
    )
    assert bn.num_batches_tracked == 1
    per_step = ReSpike(branches="snn").train().snn.stem.bn
    each, _ = per_step(x)
    torch.testing.assert_close(
        each.transpose(1, 2).flatten(2).var(2, unbiased=False), torch.ones(3, 64), rtol=1e-3, atol=1e-3
    )
    assert per_step.num_batches_tracked == 3


def test_state_does_not_outlive_a_forward():
    model = ReSpike().eval()
    with torch.no_grad():
        assert torch.equal(forward(model), forward(model))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("fc.bias"), r"1 missing tensors, the first: fc\.bias"),
        (
            lambda s: s.update({"snn_backbone.conv9.weight": torch.zeros(1)}),
            r"1 unknown names.*snn_backbone\.conv9\.weight",
        ),
        (lambda s: s.update({"fc.weight": torch.zeros(51, 1024)}), r"fc\.weight is \[51, 1024\] where \[7, 1024\]"),
    ],
)
def test_reference_weights_that_do_not_fit_are_refused_by_name(change, message):
    state_dict = published_state_dict("resnet18")
    change(state_dict)
    with pytest.raises(UserError, match=message):
        ReSpike(num_classes=7).load_reference_state_dict(state_dict)


def test_reference_weights_of_another_backbone_are_refused():
    with pytest.raises(UserError, match="unknown names"):
        ReSpike("resnet18", num_classes=7).load_reference_state_dict(published_state_dict("resnet50"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_neuron_is_a_class_and_an_entry(monkeypatch, backend):
    """Every layer of every backend runs the new class, and its firing rates are counted."""

    class Fires(LIF):
        def forward(self, current):
            return self.counted(torch.ones_like(current))

    monkeypatch.setitem(NEURONS, "fires", Fires)
    parameters = LIFParameters(tau=2.0)
    model = ReSpike(num_classes=3, stride=2, neuron=parameters, neuron_type="fires", lif_backend=backend).eval()
    model = model.to(memory_format=torch.channels_last)
    layers = [layer for stage in model.lif_layers().values() for layer in stage]
    assert [type(layer) for layer in layers] == 16 * [Fires]
    assert {layer.parameters_ for layer in layers} == {parameters} and {layer.backend for layer in layers} == {backend}
    with torch.no_grad(), FiringRates(model) as rates:
        forward(model, stride=2, batch=1, frames=2, size=32)
    assert rates.per_layer() == 16 * [1.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stride": 1}, "stride must be at least 2"),
        ({"backbone": "resnet9"}, "resnet18, resnet34"),
        ({"branches": "left"}, "both, ann, snn"),
        ({"fusion": "sum"}, "cross, film, lean, concat"),
        ({"num_classes": 0}, "num_classes"),
        ({"snn_batch_norm": "x"}, "per-step, merged, through-time"),
        ({"neuron_type": "izhikevich"}, "izhikevich: expected lif or sj.NAME"),
        ({"lif_backend": "cuda"}, "lif_backend must be one of auto, triton"),
        ({"neuron": LIFParameters(surrogate="triangle"), "lif_backend": "spikingjelly"}, "no surrogate triangle"),
        ({"weights": "/no/such/file"}, "no such file"),
    ],
)
def test_refused_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        ReSpike(**arguments)


@pytest.mark.parametrize(
    "key, residual, message",
    [
        ((2, 2, 3, 48, 64), (2, 2, 3, 3, 48, 64), "multiples of 32, got 48 x 64"),
        ((2, 2, 3, 64, 64), (2, 2, 1, 3, 64, 64), r"must be \[2, 2, 3, 3, 64, 64\] for stride 4"),
        ((2, 2, 1, 64, 64), (2, 2, 3, 1, 64, 64), r"\[B, K, 3, H, W\]"),
    ],
)
def test_refused_shapes(key, residual, message):
    with pytest.raises(ValueError, match=message) as caught:
        ReSpike()(torch.zeros(key), torch.zeros(residual))
    assert not isinstance(caught.value, UserError)  # the caller's fault, no flag can cause it


def test_one_small_key_frame_cannot_be_normalised():
    with pytest.raises(ValueError, match="one key frame of 32 x 32 pixels alone"):
        forward(ReSpike(), batch=1, frames=4, size=32)
    assert forward(ReSpike().eval(), batch=1, frames=4, size=32).shape == (1, 51)


def test_backbone_weights_from_a_file(tmp_path):
    import torchvision

    source = torchvision.models.resnet18(num_classes=3)
    torch.save(source.state_dict(), tmp_path / "r18.pt")
    model = ReSpike(weights=str(tmp_path / "r18.pt"))
    assert torch.equal(model.ann.stem[0].weight, source.conv1.weight)
    assert torch.equal(model.ann.stages[3][1].bn2.weight, source.layer4[1].bn2.weight)
    for other in ("resnet34", "resnet50"):
        with pytest.raises(UserError, match=rf"r18\.pt: not the weights of a {other}"):
            ReSpike(other, weights=str(tmp_path / "r18.pt"))
    deeper = torchvision.models.resnet34().state_dict()
    torch.save(deeper, tmp_path / "r34.pt")
    with pytest.raises(UserError, match=r"not the weights of a resnet18: layer1\.2.* does not belong"):
        ReSpike("resnet18", weights=str(tmp_path / "r34.pt"))
    old = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(old, tmp_path / "old.pt")  # as files from before PyTorch 0.4.1 are
    assert torch.equal(ReSpike(weights=str(tmp_path / "old.pt")).ann.stem[0].weight, source.conv1.weight)
    (tmp_path / "r18.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable state dict"):
        ReSpike(weights=str(tmp_path / "r18.pt"))


def test_a_run_is_no_weights_and_init_is_named(tmp_path):
    with pytest.raises(UserError, match="this is a folder; --init takes a run"):
        read_state_dict(tmp_path)
    torch.save({"model": {}, "epoch": 3}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="found the checkpoint of a run; --init takes this file"):
        read_state_dict(tmp_path / "last.pt")


def test_default_weights_offline_say_what_to_do(monkeypatch):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"could not be downloaded .*resnet18.*\.pth.*none to start"):
        ReSpike(weights="default")


def test_default_weights_need_a_home_folder_to_keep_them_in(monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: "~/.cache/torch/hub")  # as of a user without one
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    with pytest.raises(UserError, match=r"no home folder .*; set XDG_CACHE_HOME .*none to start"):
        ReSpike(weights="default")


def test_torch_func_differentiates_and_maps_the_network():
    """grad is autograd's gradient, vmap the batch, and both together the gradient of each clip."""
    torch.manual_seed(1)
    model = ReSpike(num_classes=3, stride=3, downsample=False, fusion="lean", pack_spikes=True).double().eval()
    key, residual = key_residual_split(clip(2, 6, 32, torch.float64), 3)
    own = dict(model.named_parameters())
    weights = {name: value.detach() for name, value in own.items()}

    def loss(weights, key, residual):
        return torch.func.functional_call(model, weights, (key, residual)).square().sum()

    want = dict(zip(own, torch.autograd.grad(loss(own, key, residual), list(own.values())), strict=True))
    found = torch.func.grad(loss)(weights, key, residual)
    # A map over clips calls the network with one clip at a time.
    clips = key[:, None], residual[:, None]
    torch.testing.assert_close(torch.func.vmap(model)(*clips)[:, 0], model(key, residual))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, *clips)
    assert want["snn.stem.conv.weight"].abs().max() > 1e-6
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
        torch.testing.assert_close(each[name].sum(0), gradient, msg=name)


@pytest.mark.parametrize("mode", BATCH_NORMS)
def test_torch_func_differentiates_in_training_if_it_is_given_the_running_statistics(mode):
    torch.manual_seed(1)
    model = ReSpike(num_classes=3, stride=3, branches="snn", snn_batch_norm=mode).double().train()
    key, residual = key_residual_split(clip(2, 6, 32, torch.float64), 3)
    own, statistics = dict(model.named_parameters()), {name: value.clone() for name, value in model.named_buffers()}
    weights = {name: value.detach() for name, value in own.items()}

    def loss(weights, statistics):
        return torch.func.functional_call(model, (weights, statistics), (key, residual)).square().sum()

    found = torch.func.grad(loss)(weights, statistics)
    want = torch.autograd.grad(model(key, residual).square().sum(), list(own.values()))
    for (name, gradient), wanted in zip(found.items(), want, strict=True):
        torch.testing.assert_close(gradient, wanted, msg=name)
    for name, value in model.named_buffers():
        torch.testing.assert_close(statistics[name], value, msg=name)


def test_compiles_without_a_graph_break():
    model = ReSpike(num_classes=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    key, residual = key_residual_split(clip(2, 4, 32), 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(key, residual), model(key, residual))
