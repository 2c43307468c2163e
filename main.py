"""Features of a frozen CNN, cached, into spiking heads.

    python main.py                              # configs/config.json
    python main.py -c configs/demo.json

Reads top to bottom: the config, the videos, their features, a head and its training. utils/heads/config.py lists
what a config may hold, utils/heads/fit.py is the training, utils/heads/engine.py one epoch of it.
"""

if __name__ == "__main__":
    import utils.interrupted  # noqa: F401 - before the imports that take seconds

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset.clips import VideoTable
from dataset.demo import DEMOS, generate_demo
from dataset.frame_sampling import SegmentSampling
from dataset.index import VideoIndex
from dataset.readable import readable_videos
from models.heads.cnn import FrameCNN
from models.heads.ensemble_array import EnsembleArray
from models.heads.lmu import LMUHead
from models.heads.neurons import NEURONS
from models.heads.on_features import OnFeatures, OnFrames
from utils.checkpoint import check_settings, kept_checkpoints, load_checkpoint, save_checkpoint
from utils.device import choose_algorithms, choose_device, cpu_count, device_name, seed_all
from utils.errors import ArgumentParser, UserError
from utils.files import cache_folder, writing
from utils.heads.batches import ClipBatches, FeatureBatches
from utils.heads.config import HEADS, READERS, Config, naming, read_config
from utils.heads.engine import evaluate
from utils.heads.features import cached_features
from utils.heads.fit import fit, resume
from utils.run_folder import RunFolder
from utils.script import run_script


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="./configs/config.json", help="config file; see configs/")
    parser.add_argument("-d", "--device", help="a GPU's index, cuda, cuda:N or cpu; default: as use_cuda says")
    args = parser.parse_args()
    config = read_config(Path(args.config))
    device = pick_device(args.config, config.use_cuda, args.device)
    choose_algorithms(deterministic=False)
    print(f"{args.config}: {config.name}; {device_name(device)}")

    classes, train_videos, test_videos = find_videos(config)
    heads = HEADS if config.SNN.head == "all" else (config.SNN.head,)
    for head in heads:
        seed_all(config.seed)
        one = dataclasses.replace(config, SNN=dataclasses.replace(config.SNN, head=head))
        data = load_data(one, train_videos, test_videos, device)
        if not run_head(one, data, len(classes), device, in_own_folder=len(heads) > 1):
            break
    return 0


def pick_device(config_file: str, use_cuda: bool, asked: str | None) -> torch.device:
    if asked is not None:
        return choose_device(f"cuda:{asked}" if asked.isdecimal() else asked)
    if use_cuda and not torch.cuda.is_available():
        raise UserError(f"{config_file}: use_cuda is true, and this machine has no CUDA device; set it to false")
    return choose_device("cuda" if use_cuda else "cpu")


# ---- data: split files -> readable videos -> features, or clips if the CNN is trained along -----------------------


@dataclass
class Data:
    """What a head is trained and tested on."""

    train_loader: FeatureBatches | ClipBatches
    test_loader: FeatureBatches | ClipBatches
    mean: Tensor  # [width], of the training features
    deviation: Tensor  # [width], of the training features
    cnn: FrameCNN | None  # if it is trained along with the head


def find_videos(config: Config) -> tuple[list[str], VideoTable, VideoTable]:
    """(classes, videos to train on, videos to test on)"""
    data_path, annotation_path = config.data_path, config.annotation_path
    with naming("data_path, annotation_path"):
        if config.dset in DEMOS:
            data_path, annotation_path = generate_demo(Path(data_path), DEMOS[config.dset], workers=cpu_count())
        split = READERS[config.dset](data_path, annotation_path, config.split)
    index = VideoIndex(cache_folder() / f"{config.dset}.json")
    train, _, test = readable_videos(split, index, strict=False, write_list=None)
    return split.classes, train, test


def load_data(config: Config, train_videos: VideoTable, test_videos: VideoTable, device: torch.device) -> Data:
    """Minibatches of cached features, or of clips if the CNN is trained along with the head."""
    loading, files, trainer = config.dataloader, config.pickle_locations, config.SNN_trainer
    sampling = SegmentSampling(loading.frames_per_segment, loading.segments_per_video)
    batching = (config.SNN.minibatch_size, config.seed, device)
    try:
        with naming("pickle_locations.CNN_weights"):
            cnn = FrameCNN(config.CNN.backbone, files.CNN_weights, config.CNN.projection).to(device)
    except UserError as error:
        if not trainer.import_CNN_forward_data:
            raise
        print(f"note: the features are used without comparing the CNN's weights: {error}")
        cnn = None

    if trainer.end_to_end:
        loaders = [ClipBatches(videos, sampling, loading, *batching) for videos in (train_videos, test_videos)]
        return Data(*loaders, torch.zeros(cnn.width), torch.ones(cnn.width), cnn)

    train, test = (
        cached_features(Path(data_file), Path(labels_file), videos, sampling, cnn, config, device)
        for data_file, labels_file, videos in (
            (files.train_data, files.train_labels, train_videos),
            (files.test_data, files.test_labels, test_videos),
        )
    )
    print(f"features: {list(train.data.shape)} to train on, {list(test.data.shape)} to test on (clips, frames, width)")
    return Data(FeatureBatches(train, *batching), FeatureBatches(test, *batching), *train.moments(), cnn=None)


# ---- a head: built, trained, tested ------------------------------------------------------------------------------


def build_head(config: Config, width: int, classes: int) -> nn.Module:
    snn = config.SNN
    neuron = None if snn.head == "lmu" else NEURONS[snn.neuron or "SpikingRectifiedLinear"]()
    if snn.head == "ensemble_array":
        return EnsembleArray(width, classes, snn.ensembles, snn.neurons_per_ensemble, neuron, snn.synapse_seconds)
    return LMUHead(
        width, classes, snn.units, snn.order, memory_window(config), snn.memory, neuron, snn.synapse_seconds,
        snn.recurrent, snn.train_A_and_B,
    )  # fmt: skip


def memory_window(config: Config) -> float:
    """theta in time steps: the config's, or the whole clip."""
    return config.SNN.theta or float(config.dataloader.frames_per_segment * config.SNN.steps_per_frame)


def build_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    trainer = config.SNN_trainer
    parameters, learning_rate = network.parameters(), trainer.learning_rate
    if trainer.optimizer == "adam":
        return torch.optim.Adam(parameters, learning_rate, weight_decay=trainer.weight_decay)
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=trainer.weight_decay)


def network_settings(config: Config, width: int, classes: int) -> dict:
    """The settings that a checkpoint must share with this run. Those of the training may differ."""
    training = ("minibatch_size", "loss", "train_mode")
    settings = {key: value for key, value in dataclasses.asdict(config.SNN).items() if key not in training}
    settings |= {"theta": memory_window(config), **dataclasses.asdict(config.CNN)}
    return settings | {"width": width, "classes": classes, "end_to_end": config.SNN_trainer.end_to_end}


def run_head(config: Config, data: Data, classes: int, device: torch.device, in_own_folder: bool) -> bool:
    """Train and test one head. in_own_folder: the head gets a run folder and a file of weights of its own.
    Returns False if a signal stopped the training."""
    trainer, snn, weights = config.SNN_trainer, config.SNN, config.pickle_locations.SNN_weights
    folder = Path(config.save_dir) / config.name
    if in_own_folder:
        folder = folder / snn.head
        weights = weights and Path(weights).with_stem(f"{Path(weights).stem}-{snn.head}")
    if kept_checkpoints(folder) and trainer.do_SNN_training and not trainer.resume:
        raise UserError(
            f"{folder}: holds a run already; set SNN_trainer.resume to true to continue it, or give another name"
        )
    with naming("save_dir"):
        run = RunFolder(folder, resuming=True, overwrite=False)
    seed_all(config.seed)  # again: the head is the same whether the features were computed or read
    head = build_head(config, len(data.mean), classes)
    inputs = (snn.steps_per_frame, data.mean, data.deviation)
    network = OnFeatures(head, *inputs) if data.cnn is None else OnFrames(data.cnn, head, *inputs)
    network = network.to(device)
    settings = network_settings(config, len(data.mean), classes)
    print(f"{snn.head}: {sum(parameter.numel() for parameter in network.parameters()):,} parameters in {folder}")

    if not trainer.do_SNN_training:
        state = load_checkpoint(Path(weights))
        check_settings(Path(weights), state["model_settings"], settings)
        network.load_state_dict(state["model"])
    elif not train(config, network, data, run, settings, weights):
        run.close()
        return False
    tested = evaluate(network, data.test_loader, data.test_loader.videos)
    frames, segments = config.dataloader.frames_per_segment, config.dataloader.segments_per_video
    about = {"head": snn.head, "train_mode": snn.train_mode, "frames": frames, "segments": segments}
    run.write_result(about | tested)
    print(
        f"{snn.head}, train_mode {snn.train_mode}: last step {tested['last_step']:.2f} %, "
        f"video {tested['video']:.2f} % of {tested['counts']['videos']}"
    )
    run.close()
    return True


def train(
    config: Config, network: OnFeatures, data: Data, run: RunFolder, settings: dict, weights: str | Path | None
) -> bool:
    """Train from the run folder's newest checkpoint on, and save the weights. Returns False if a signal stopped it."""
    if weights is not None:
        with naming("pickle_locations.SNN_weights"), writing(weights):  # now, not after hours of training
            Path(weights).parent.mkdir(parents=True, exist_ok=True)
    optimizer = build_optimizer(config, network)
    history = resume(run, network, optimizer, settings)
    run.begin(len(history))
    run.write_config(dataclasses.asdict(config), network=settings)
    if config.SNN_trainer.get_initial_testing_accuracy and not history:
        tested = evaluate(network, data.test_loader, data.test_loader.videos)
        print(f"before training: last step {tested['last_step']:.2f} %, video {tested['video']:.2f} %")
    finished = fit(network, data.train_loader, data.test_loader, optimizer, run, config, history, settings)
    if finished and weights is not None:
        save_checkpoint(Path(weights), {"model_settings": settings, "model": network.state_dict()})
    return finished


if __name__ == "__main__":
    run_script(main)
