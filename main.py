"""Features of a frozen CNN, cached, into spiking heads.

    python main.py                              # configs/config.json
    python main.py -c configs/demo.json

Reads top to bottom: the config, the videos, their features, a head and its training. utils/config.py says
what a config may hold, utils/sequences.py what an epoch is.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset.clips import VideoTable, eval_clips
from dataset.demo import DemoSettings, generate_demo
from dataset.frame_sampling import SegmentSampling
from dataset.index import VideoIndex
from dataset.residual import normalised
from dataset.splits import Split, drop, read_hmdb51, read_ucf101
from dataset.transforms import eval_transforms
from dataset.video import VideoDataset, make_loader
from models.heads.cnn import FrameCNN
from models.heads.ensemble_array import EnsembleArray
from models.heads.lmu import LMUHead
from models.heads.neurons import NEURONS
from utils.checkpoint import check_settings, kept_checkpoints, load_checkpoint, load_newest, save_checkpoint
from utils.device import choose_device, cpu_count, device_name, seed_all
from utils.errors import ArgumentParser, UserError, explain_loading
from utils.heads.config import Config, read_config
from utils.heads.engine import evaluate, minibatches, train_epoch
from utils.heads.features import Features, cached_features
from utils.heads.plots import save_curves
from utils.run_folder import RunFolder
from utils.script import run_script
from utils.signals import StopRequest

HEADS = ("ensemble_array", "lmu", "spiking_lmu")
KEYS_OF_FLAGS = {
    "--data-root": "data_path", "--annotation-path": "annotation_path", "--run-dir": "save_dir",
    "--weights": "pickle_locations.CNN_weights",
}  # fmt: skip
Batches = Callable[[int | None], Iterator[tuple[Tensor, Tensor]]]  # epoch (None: in order) -> (inputs, labels)


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="./configs/config.json", help="config file; see configs/")
    parser.add_argument("-d", "--device", help="a GPU's index, cuda, cuda:N or cpu; default: as use_cuda says")
    args = parser.parse_args()
    try:
        return run(args.config, args.device)
    except UserError as error:
        message = str(error)
        for flag, key in KEYS_OF_FLAGS.items():  # of the other scripts, which name flags
            message = message.replace(flag, key)
        raise UserError(message) from error


def run(config_file: str, device_name_asked: str | None) -> int:
    config = read_config(Path(config_file))
    device = pick_device(config_file, config.use_cuda, device_name_asked)
    print(f"{config_file}: {config.name}; {device_name(device)}")

    classes, train, test = find_videos(config)
    for head in HEADS if config.SNN.head == "all" else (config.SNN.head,):
        seed_all(config.seed)
        one = dataclasses.replace(config, SNN=dataclasses.replace(config.SNN, head=head))
        data = load_data(one, train, test, device)
        finished = run_head(config_file, one, data, len(classes), device, several=config.SNN.head == "all")
        if not finished:
            return 0
    return 0


def pick_device(config_file: str, use_cuda: bool, asked: str | None) -> torch.device:
    if asked is not None:
        return choose_device(f"cuda:{asked}" if asked.isdecimal() else asked)
    if use_cuda and not torch.cuda.is_available():
        raise UserError(f"{config_file}: use_cuda is true, and this machine has no CUDA device; set it to false")
    return choose_device("cuda" if use_cuda else "cpu")


# ---- data: split files -> what is readable -> features, or clips for end_to_end ----------------------


@dataclass
class Data:
    """Of training and test clips: minibatches, how many clips, the video of each clip; and the frame network
    that is trained along, where one is."""

    train: Batches
    test: Batches
    train_clips: int
    test_videos: Tensor
    width: int  # of what the head is given
    mean: Tensor  # [width] of the training features, and their standard deviation
    deviation: Tensor
    cnn: FrameCNN | None


def find_videos(config: Config) -> tuple[list[str], VideoTable, VideoTable]:
    """(classes, videos to train on, to test on)"""
    data_path, annotation_path = config.data_path, config.annotation_path
    if config.dset in ("demo", "demo_orders"):
        settings = DemoSettings(kind="motion" if config.dset == "demo" else "colour_orders")
        data_path, annotation_path = generate_demo(Path(data_path), settings, workers=cpu_count())
    read = read_ucf101 if config.dset == "ucf101" else read_hmdb51
    split: Split = read(data_path, annotation_path, config.split)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    index = VideoIndex(Path(cache) / "respike" / f"{config.dset}.json")
    infos = index.lookup([record.path for record in split.train + split.test], workers=cpu_count())
    unreadable = [path for path, info in infos.items() if info.error]
    if unreadable:
        print(f"{len(unreadable)} of {len(infos)} videos cannot be read and are left out: {unreadable[0]}, ...")
    split = drop(split, unreadable)
    if not split.train or not split.test:
        raise UserError(f"{data_path}: none of the videos to train on, or none to test on, can be read")
    tables = [VideoTable(part, [infos[record.path] for record in part]) for part in (split.train, split.test)]
    return split.classes, *tables


def load_data(config: Config, train: VideoTable, test: VideoTable, device: torch.device) -> Data:
    loader, files = config.dataloader, config.pickle_locations
    sampling = SegmentSampling(loader.frames_per_segment, loader.segments_per_video)
    imports = config.SNN_trainer.import_CNN_forward_data
    try:
        cnn = FrameCNN(config.CNN.backbone, files.CNN_weights, config.CNN.projection).to(device)
    except UserError as error:
        if not imports:
            raise
        print(f"note: the features are taken without comparing the CNN's weights: {error}")
        cnn = None
    if config.SNN_trainer.end_to_end:
        return Data(
            partial(clip_batches, config, train, sampling, device, True),
            partial(clip_batches, config, test, sampling, device, False),
            len(eval_clips(train, sampling)), torch.from_numpy(eval_clips(test, sampling)["video"].copy()), cnn.width,
            torch.zeros(cnn.width), torch.ones(cnn.width), cnn,
        )  # fmt: skip
    how = dict(
        network=cnn, description=dataclasses.asdict(config.CNN), device=device, batch_size=loader.batch_size,
        workers=loader.workers, size=loader.size, pin=loader.pin_memory and device.type == "cuda",
        may_build=not imports, shuffle=loader.shuffle,
    )  # fmt: skip
    parts = []
    for videos, data_file, labels_file in (
        (train, files.train_data, files.train_labels),
        (test, files.test_data, files.test_labels),
    ):
        parts.append(cached_features(Path(data_file), Path(labels_file), videos, sampling, **how))
    trained, tested = parts
    print(
        f"features: {list(trained.data.shape)} to train on, {list(tested.data.shape)} to test on (clips, frames, width)"
    )
    return Data(
        partial(feature_batches, config, trained, device), partial(feature_batches, config, tested, device),
        len(trained.labels), torch.from_numpy(tested.videos), trained.data.shape[2], *moments(trained), None,
    )  # fmt: skip


def moments(features: Features) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) [width] over clips and frames; a feature that never changes has deviation 1."""
    count, sums, squares = features.data.shape[0] * features.data.shape[1], 0.0, 0.0
    for start in range(0, len(features.data), 256):  # piece by piece: the file need not fit into memory
        sums = sums + features.data[start : start + 256].sum((0, 1), dtype="float64")
    for start in range(0, len(features.data), 256):
        squares = squares + ((features.data[start : start + 256] - sums / count) ** 2).sum((0, 1), dtype="float64")
    mean, deviation = (torch.from_numpy(value).float() for value in (sums / count, (squares / count) ** 0.5))
    return mean, torch.where(deviation > 0, deviation, 1.0)


def feature_batches(
    config: Config, features: Features, device: torch.device, epoch: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features [T, B, width], labels [B]) on the device."""
    for batch in minibatches(len(features.labels), config.SNN.minibatch_size, config.seed, epoch):
        clips = torch.from_numpy(features.data[batch])  # copies out of the mapped file
        labels = torch.from_numpy(features.labels[batch])
        yield clips.transpose(0, 1).to(device, non_blocking=True), labels.to(device, non_blocking=True)


def clip_batches(
    config: Config,
    videos: VideoTable,
    sampling: SegmentSampling,
    device: torch.device,
    training: bool,
    epoch: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 clips [B, T, 3, H, W], labels [B]) on the device, for end_to_end."""
    loader = config.dataloader
    transforms = eval_transforms(loader.size, round(loader.size * 256 / 224))
    clips = eval_clips(videos, sampling)
    data = VideoDataset(videos, clips, sampling, transforms, config.seed, strict=True)
    pin = loader.pin_memory and device.type == "cuda"
    order = minibatches(len(clips), config.SNN.minibatch_size, config.seed, epoch if training else None)
    keys = [[(epoch or 0, clip) for clip in batch] for batch in order]
    try:
        for batch in make_loader(data, keys, loader.workers, pin):
            yield batch.clips.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    except UserError as error:
        raise explain_loading(error) from error


# ---- a head: built, trained, tested ------------------------------------------------------------------


class OnFeatures(nn.Module):
    """Features [T, B, width] -> logits [T * steps_per_frame, B, classes]: standardised with the training
    features' mean and deviation, and each frame shown for some steps."""

    def __init__(self, head: nn.Module, steps_per_frame: int, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.head, self.steps_per_frame = head, steps_per_frame
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, features: Tensor) -> Tensor:
        features = (features - self.mean) / self.deviation
        return self.head(features.repeat_interleave(self.steps_per_frame, dim=0))


class OnFrames(OnFeatures):
    """uint8 clips [B, T, 3, H, W] -> logits, with the CNN trained along."""

    def __init__(self, cnn: FrameCNN, head: nn.Module, steps_per_frame: int, mean: Tensor, deviation: Tensor):
        super().__init__(head, steps_per_frame, mean, deviation)
        self.cnn = cnn.requires_grad_(True)

    def forward(self, clips: Tensor) -> Tensor:
        frames = normalised(clips.flatten(0, 1))  # [B * T, 3, H, W]
        return super().forward(self.cnn(frames).unflatten(0, clips.shape[:2]).transpose(0, 1))


def build_head(config: Config, width: int, classes: int) -> nn.Module:
    snn = config.SNN
    own = None if snn.head == "lmu" else "SpikingRectifiedLinear"
    named = snn.neuron if snn.head != "lmu" and snn.neuron is not None else own
    neuron = None if named is None else NEURONS[named]()
    if snn.head == "ensemble_array":
        return EnsembleArray(width, classes, snn.ensembles, snn.neurons_per_ensemble, neuron, snn.synapse_seconds)
    return LMUHead(
        width, classes, snn.units, snn.order, memory_window(config), snn.memory, neuron, snn.synapse_seconds,
        snn.recurrent, snn.train_A_and_B,
    )  # fmt: skip


def memory_window(config: Config) -> float:
    """theta in time steps; where the config leaves it open, a whole segment."""
    return config.SNN.theta or float(config.dataloader.frames_per_segment * config.SNN.steps_per_frame)


def network_settings(config: Config, width: int, classes: int) -> dict:
    """What a checkpoint's network must have in common with this run's; not how it is trained."""
    how = ("minibatch_size", "loss", "train_mode")
    settings = {key: value for key, value in dataclasses.asdict(config.SNN).items() if key not in how}
    settings |= {"theta": memory_window(config), **dataclasses.asdict(config.CNN)}
    return settings | {"width": width, "classes": classes, "end_to_end": config.SNN_trainer.end_to_end}


def run_head(config_file: str, config: Config, data: Data, classes: int, device: torch.device, several: bool) -> bool:
    """Train and test one head in its run folder. False where a signal cut it short."""
    trainer, snn = config.SNN_trainer, config.SNN
    folder = Path(config.save_dir) / config.name / (snn.head if several else "")
    if kept_checkpoints(folder) and trainer.do_SNN_training and not trainer.resume:
        raise UserError(
            f"{config_file}: {folder} holds a run already; set SNN_trainer.resume to true to go on with it, or give "
            "another name"
        )
    run = RunFolder(folder, resuming=True, overwrite=False)
    seed_all(config.seed)  # again: whether features were computed or found must not show
    head = build_head(config, data.width, classes)
    shown = (head, snn.steps_per_frame, data.mean, data.deviation)
    network = OnFeatures(*shown) if data.cnn is None else OnFrames(data.cnn, *shown)
    network = network.to(device)
    settings = network_settings(config, data.width, classes)
    weights = config.pickle_locations.SNN_weights
    if weights is not None and several:
        weights = str(Path(weights).with_stem(f"{Path(weights).stem}-{snn.head}"))
    if weights is not None and trainer.do_SNN_training:
        try:
            Path(weights).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"pickle_locations.SNN_weights: {weights}: cannot be written ({error.strerror})") from error
    print(f"{snn.head}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters in {folder}")

    finished = True
    if trainer.do_SNN_training:
        finished = train(config, network, head, data, run, settings)
        if finished and weights is not None:
            save_checkpoint(Path(weights), {"model_settings": settings, "model": network.state_dict()})
    else:
        state = load_checkpoint(Path(weights))
        check_settings(Path(weights), state["model_settings"], settings)
        network.load_state_dict(state["model"])
    if finished:
        network.eval()
        tested = evaluate(network, data.test(None), data.test_videos)
        loader = config.dataloader
        about = {"head": snn.head, "train_mode": snn.train_mode, "frames": loader.frames_per_segment}
        run.write_result({**about, "segments": loader.segments_per_video, **tested})
        print(
            f"{snn.head}, train_mode {snn.train_mode}: last step {tested['last_step']:.2f} %, "
            f"video {tested['video']:.2f} % of {tested['counts']['videos']}"
        )
    run.close()
    return finished


def train(config: Config, network: nn.Module, head: nn.Module, data: Data, run: RunFolder, settings: dict) -> bool:
    """All epochs, from the newest checkpoint on. False where a signal cut it short: last.pt is the last epoch's."""
    trainer, snn = config.SNN_trainer, config.SNN
    if trainer.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), trainer.learning_rate, weight_decay=trainer.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            network.parameters(), trainer.learning_rate, momentum=0.9, weight_decay=trainer.weight_decay
        )
    found, first, history = load_newest(kept_checkpoints(run.path)), 0, []
    if found is not None:
        path, state = found
        check_settings(path, state["model_settings"], settings)
        check_settings(path, {"optimizer": state["optimizer_name"]}, {"optimizer": trainer.optimizer})
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = trainer.learning_rate, trainer.weight_decay
        first, history = state["epoch"], state["history"]
        print(f"resumed from {path}: {first} of {trainer.epochs} epochs are done")
    run.begin(first)
    run.write_config(config.as_dict(), network=settings)
    if trainer.get_initial_testing_accuracy and first == 0:
        network.eval()
        tested = evaluate(network, data.test(None), data.test_videos)
        print(f"before training: last step {tested['last_step']:.2f} %, video {tested['video']:.2f} %")
    steps = -(-data.train_clips // snn.minibatch_size)
    with StopRequest() as stop:
        for epoch in range(first, trainer.epochs):
            network.train()
            trained = train_epoch(
                network, head, data.train(epoch), optimizer, task=f"epoch {epoch + 1}/{trainer.epochs}", steps=steps,
                loss=snn.loss, train_mode=snn.train_mode, should_stop=stop.requested,
            )  # fmt: skip
            if trained is None:
                print(f"stopped by {stop.name} in epoch {epoch + 1}; the next start goes on with that epoch")
                return False
            network.eval()
            tested = evaluate(network, data.test(None), data.test_videos)
            line = {"epoch": epoch, **trained, **{f"test_{name}": value for name, value in tested.items()}}
            history.append(line)
            run.add_metrics(line)
            print(
                f"epoch {epoch + 1}/{trainer.epochs}: loss {trained['train_loss']:.4f}, last step: training "
                f"{trained['train_last_step']:.1f} %, test {tested['last_step']:.1f} %, video {tested['video']:.1f} %",
                flush=True,
            )
            parts = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
            rest = {"optimizer_name": trainer.optimizer, "epoch": epoch + 1, "history": history}
            state = {"model_settings": settings, **parts, **rest}
            save_checkpoint(run.last, state, keep=2)
    if history:
        save_curves(run.path / "curves.png", history, title=f"{config.name}: {snn.head}")
    return True


if __name__ == "__main__":
    run_script(main)
