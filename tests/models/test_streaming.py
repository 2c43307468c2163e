"""A stream predicts what the whole clip predicts; its state is all in the dataclass."""

import random
import statistics

import pytest
import torch

from dataset.decode import decode_frames
from dataset.residual import key_residual_split
from dataset.transforms import eval_transforms
from models import ReSpike
from models.batch_norm import StepBatchNorm2d
from models.kernels.parameters import LIFParameters
from models.neurons import LIF, NEURONS
from models.streaming import StreamState, start_segment, step
from utils.errors import UserError
from utils.training.metrics import FiringRates

pytestmark = pytest.mark.usefixtures("one_thread")


def network(**settings) -> ReSpike:
    """In eval mode and float64; every weight that starts at zero is set, and neurons fire."""
    torch.manual_seed(5)
    model = ReSpike(num_classes=7, **settings)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        for _ in range(3):
            model(*key_residual_split(torch.randn(2, 2 * model.stride, 3, 64, 64), model.stride))
    for norm in (module for module in model.modules() if isinstance(module, StepBatchNorm2d)):
        torch.nn.init.normal_(norm.bias, 0.5, 0.5)
    return model.eval().double()


def test_its_neurons_fire():
    model = network()
    with FiringRates(model) as rates, torch.no_grad():
        model(*key_residual_split(torch.randn(1, 8, 3, 64, 64, dtype=torch.float64), 4))
    assert all(0.05 < rate < 0.6 for rate in rates.per_stage().values())


def stream(model: ReSpike, key: torch.Tensor, residual: torch.Tensor, segments: int | None = None) -> torch.Tensor:
    """Logits after each residual frame, [K * (stride-1), B, classes]."""
    state, logits = StreamState(segments or key.shape[1]), []
    for segment in range(key.shape[1]):
        state = start_segment(model, key[:, segment], state)
        for frame in range(residual.shape[2]):
            logits.append(None)
            logits[-1], state = step(model, residual[:, segment, frame], state)
    return torch.stack(logits)


VARIANTS = [
    dict(stride=4, downsample=True), dict(stride=2, downsample=True), dict(stride=4, downsample=False),
    dict(stride=2, downsample=False), dict(fusion="lean"), dict(fusion="lean", stride=2, downsample=False),
    dict(fusion="film"), dict(fusion="film", stride=2, downsample=False),
    dict(fusion="concat"), dict(branches="ann"), dict(branches="snn"),
    dict(backbone="resnet50", snn_batch_norm="merged"), dict(snn_batch_norm="through-time"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=lambda number: str(VARIANTS[number]))
def test_a_whole_clip_gives_the_offline_logits(number):
    settings, batch = VARIANTS[number], 1 + number % 2
    model = network(**settings)
    key, residual = key_residual_split(torch.randn(batch, 8, 3, 64, 64, dtype=torch.float64), model.stride)
    with torch.no_grad():
        offline = model(key, residual)
    torch.testing.assert_close(stream(model, key, residual)[-1], offline)


@pytest.mark.parametrize("stride, downsample", [(2, True), (4, False)])
def test_on_real_videos(clips, stride, downsample):
    model = network(stride=stride, downsample=downsample)
    (transform,) = eval_transforms(64, 64)
    videos = [path for path in sorted(clips.glob("[hku]*/**/*")) if path.suffix in (".avi", ".mp4", ".mkv")]
    assert len(videos) == 14
    differences = []
    for path in random.Random(stride).sample(videos, 5):
        frames = torch.from_numpy(decode_frames(path, range(5, 37, 4))).permute(0, 3, 1, 2)
        for dtype in (torch.float64, torch.float32):
            key, residual = (part.to(dtype) for part in key_residual_split(transform(frames)[None], stride))
            with torch.no_grad():
                offline = model.to(dtype)(key, residual)
            differences.append((stream(model, key, residual)[-1] - offline).abs().max().item())
    assert max(differences[::2]) < 1e-9
    # In float32 a batch of another size is rounded otherwise, and now and then a neuron at its threshold fires in one
    # of the two only. The logits then differ in the second digit, else by less than 1e-6.
    assert statistics.median(differences[1::2]) < 1e-5


@pytest.mark.parametrize("minus", ["previous", "none"])
def test_other_residuals(minus):
    model = network(stride=4)
    key, residual = key_residual_split(torch.randn(1, 8, 3, 64, 64, dtype=torch.float64), 4, minus=minus)
    with torch.no_grad():
        offline = model(key, residual)
    torch.testing.assert_close(stream(model, key, residual)[-1], offline)


def test_an_endless_stream_predicts_from_the_last_segments():
    model = network(stride=2)
    key, residual = key_residual_split(torch.randn(1, 10, 3, 64, 64, dtype=torch.float64), 2)
    logits = stream(model, key, residual, segments=3)
    with torch.no_grad():
        torch.testing.assert_close(logits[4], model(key[:, 2:5], residual[:, 2:5]))
        torch.testing.assert_close(logits[0], model(key[:, :1], residual[:, :1]))
        torch.testing.assert_close(logits[1], model(key[:, :2], residual[:, :2]))
        torch.testing.assert_close(stream(model, key, residual, segments=1)[3], model(key[:, 3:4], residual[:, 3:4]))


def test_within_a_segment_the_frames_so_far_count():
    model = network(stride=4)
    key, residual = key_residual_split(torch.randn(1, 4, 3, 64, 64, dtype=torch.float64), 4)
    logits = stream(model, key, residual)
    model.stride = 3  # the same network on a segment without its last frame
    with torch.no_grad():
        torch.testing.assert_close(logits[1], model(key, residual[:, :, :2]))


def test_interleaved_streams_do_not_disturb_each_other():
    model = network(stride=4)
    videos = [key_residual_split(torch.randn(1, 8, 3, 64, 64, dtype=torch.float64), 4) for _ in range(2)]
    alone = [stream(model, key, residual)[-1] for key, residual in videos]
    states, logits = [StreamState(2), StreamState(2)], [None, None]
    for segment in range(2):
        for number, (key, _) in enumerate(videos):
            states[number] = start_segment(model, key[:, segment], states[number])
        for frame in range(3):
            for number, (_, residual) in enumerate(videos):
                logits[number], states[number] = step(model, residual[:, segment, frame], states[number])
    assert torch.equal(torch.stack(logits), torch.stack(alone))
    assert not torch.equal(*logits)


def test_a_state_may_be_continued_twice():
    model = network(stride=4)
    key, residual = key_residual_split(torch.randn(1, 4, 3, 64, 64, dtype=torch.float64), 4)
    state = start_segment(model, key[:, 0], StreamState(1))
    _, state = step(model, residual[:, 0, 0], state)
    first, after = step(model, residual[:, 0, 1], state)
    again, _ = step(model, residual[:, 0, 1], state)
    assert torch.equal(first, again)
    assert state.steps == 1 and after.steps == 2
    # Two blocks of two layers in each of four stages.
    assert len(after.membranes) == 16
    assert not all(torch.equal(*pair) for pair in zip(state.membranes, after.membranes, strict=True))


@pytest.mark.gpu
def test_with_the_kernels_of_a_gpu():
    model = network(lif_backend="reference").to("cuda")
    fused = ReSpike(num_classes=7, lif_backend="triton").to("cuda").eval().double()
    fused.load_state_dict(model.state_dict())
    key, residual = key_residual_split(torch.randn(1, 4, 3, 64, 64, dtype=torch.float64, device="cuda"), 4)
    torch.testing.assert_close(stream(fused, key, residual), stream(model, key, residual))


def test_other_neurons_are_refused(monkeypatch):
    class Other(LIF):
        pass

    monkeypatch.setitem(NEURONS, "other", Other)
    model = ReSpike(branches="snn", neuron_type="other", neuron=LIFParameters()).eval()
    with pytest.raises(UserError, match=r"lif neurons only; this network has Other"):
        start_segment(model, torch.zeros(1, 3, 32, 32), StreamState(1))


def test_wrong_use():
    model = ReSpike()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        start_segment(model.train(), torch.zeros(1, 3, 32, 32), StreamState(1))
    with pytest.raises(ValueError, match=r"a key frame must be .* got \[1, 3, 32, 33\]"):
        start_segment(model.eval(), torch.zeros(1, 3, 32, 33), StreamState(1))
