"""Features that a frozen CNN computes from every frame of the evaluation clips: computed once, kept in a .npy file.

Beside the file NAME lies NAME.json: what it was made of, its size and its checksum. While NAME is built, the clips that
are done stand in .NAME.DIGEST.part, whose digest is that of all it is made of. The next start continues with it.
"""

import glob
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dataset.batch_sampler import EvalBatchSampler
from dataset.clips import VideoTable, eval_clips
from dataset.frame_sampling import FrameSampling
from dataset.residual import normalised
from dataset.transforms import eval_transforms
from dataset.video import VideoDataset, loaded, make_loader
from models.heads.cnn import FrameCNN, weights_digest
from utils.errors import UserError
from utils.files import write_atomically
from utils.heads.config import Config, DataloaderConfig
from utils.progress import Progress

_FORMAT = 1


@dataclass(frozen=True)
class Features:
    """Features of clips, in the order of `dataset.clips.eval_clips`: the clips of a video one after another."""

    data: numpy.ndarray  # float32 [clips, frames, width], mapped from the file, read-only
    labels: numpy.ndarray  # int64 [clips]
    videos: numpy.ndarray  # int64 [clips], index into the table

    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation), each [width], over clips and frames. A feature that never changes gets the
        deviation 1."""
        pieces = [self.data[start : start + 256] for start in range(0, len(self.data), 256)]  # may exceed the memory
        count = self.data.shape[0] * self.data.shape[1]
        mean = sum(piece.sum((0, 1), dtype="float64") for piece in pieces) / count
        variance = sum(((piece - mean) ** 2).sum((0, 1), dtype="float64") for piece in pieces) / count
        deviation = torch.from_numpy(variance**0.5).float()
        return torch.from_numpy(mean).float(), torch.where(deviation > 0, deviation, 1.0)


def cached_features(
    data_file: Path,
    labels_file: Path,
    videos: VideoTable,
    sampling: FrameSampling,
    network: FrameCNN | None,
    config: Config,
    device: torch.device,
) -> Features:
    """The features of every video's evaluation clips: read from `data_file` if it was made of the same videos,
    sampling, frame size and network, otherwise computed and written to it.

    data_file: .npy of the features.
    labels_file: .npy of the clips' labels, for other programs. Written if it is missing or differs.
    videos: the videos, each of which must be decodable.
    sampling: which frames make a clip.
    network: normalised frames float32 [N, 3, size, size] -> [N, width]. A build moves it to `device`. None, allowed
        if import_CNN_forward_data is true: the weights are not compared.
    config: how to build, and whether. With verify_CNN_data the checksum of `data_file` is compared, which reads it
        whole. Its size is always compared.
    device: where the features are computed.

    Raises UserError if the files do not fit or are damaged and import_CNN_forward_data is true, if a video cannot be
    decoded and if the files cannot be read or written.
    """
    clips = eval_clips(videos, sampling)
    labels = videos.labels[clips["video"]]
    try:
        parts = _parts(videos, sampling, config, network)
        fault = _fault(data_file, parts, config.SNN_trainer.verify_CNN_data)
        if fault and config.SNN_trainer.import_CNN_forward_data:
            raise UserError(f"{fault}; set import_CNN_forward_data to false to build it")
        if fault:
            print(f"{fault}; building it", flush=True)
            part, done = _open_part(data_file, parts, (len(clips), sampling.clip_frames, network.width))
            batches = EvalBatchSampler(clips[done:], config.dataloader.batch_size)
            loader = eval_loader(videos, clips[done:], sampling, config.dataloader, batches, device)
            _append(part, loader, network, device)
            _finish(data_file, part, parts)
        _write_labels(labels_file, labels)
        data = numpy.load(data_file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(
            f"{error.filename or data_file}: cannot be read or written ({error.strerror or error}); "
            "name a file in a writable folder with enough room"
        ) from error
    return Features(data, labels, clips["video"])


# ---- what the features were made of ------------------------------------------------------------------


def _parts(videos: VideoTable, sampling: FrameSampling, config: Config, network: FrameCNN | None) -> dict[str, str]:
    """A digest of each thing that shapes the features, by the name that a message gives it."""
    parts = {
        "videos": _digest_of_videos(videos),
        "sampling": _digest([type(sampling).__name__, asdict(sampling)]),
        "frame size": _digest(config.dataloader.size),
        "description": _digest(asdict(config.CNN)),
    }
    return parts if network is None else {**parts, "CNN weights": weights_digest(network)}


def _digest_of_videos(videos: VideoTable) -> str:
    digest = hashlib.sha256()
    for video, (label, frames) in enumerate(zip(videos.labels.tolist(), videos.frames.tolist(), strict=True)):
        path = os.path.abspath(videos.path(video))
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns]
        digest.update(os.fsencode(path) + json.dumps([stamp, label, frames]).encode() + b"\n")
    return digest.hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- is the file what it should be? ------------------------------------------------------------------


def _fault(data_file: Path, parts: dict[str, str], verify: bool) -> str | None:
    """Why the data file cannot be used, in one line; None if it can."""
    manifest_file = _manifest_of(data_file)
    for file in (data_file, manifest_file):
        if not file.is_file():
            return f"{file}: no such file"
    try:
        manifest = json.loads(manifest_file.read_bytes())
    except ValueError:
        manifest = {}
    if manifest.get("format") != _FORMAT:
        return f"{manifest_file}: not a readable description of {data_file.name}"
    different = [name for name in parts if manifest["parts"].get(name) != parts[name]]
    if different:
        return f"{data_file}: made with other {' and '.join(different)}"
    wanted, found = manifest["data"]["bytes"], data_file.stat().st_size
    if found != wanted:
        return f"{data_file}: damaged: expected {wanted} bytes, found {found}"
    if verify and _checksum(data_file) != manifest["data"]["sha256"]:
        return f"{data_file}: damaged: its checksum differs"
    return None


def _manifest_of(data_file: Path) -> Path:
    return data_file.with_name(f"{data_file.name}.json")


def _checksum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# ---- building it -------------------------------------------------------------------------------------


def eval_loader(
    videos: VideoTable, clips: numpy.ndarray, sampling: FrameSampling, loading: DataloaderConfig,
    batches: Sampler | list, device: torch.device, strict: bool = False,
) -> DataLoader:  # fmt: skip
    """A loader of evaluation clips for `device`. batches, strict: as for `make_loader` and `VideoDataset`."""
    transforms = eval_transforms(loading.size, round(loading.size * 256 / 224))
    dataset = VideoDataset(videos, clips, sampling, transforms, seed=0, strict=strict)
    return make_loader(dataset, batches, loading.workers, pin=loading.pin_memory and device.type == "cuda")


def _open_part(data_file: Path, parts: dict[str, str], shape: tuple[int, int, int]) -> tuple[Path, int]:
    """(the file to append features to, how many of the clips an interrupted build has written to it). `shape` is that
    of all features."""
    part = data_file.with_name(f".{data_file.name}.{_digest(parts)[:16]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for other in part.parent.glob(f".{glob.escape(data_file.name)}.*.part"):
        if other != part:  # of a build from something else
            other.unlink()
    header = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    begin, clip_bytes = header.tell(), 4 * shape[1] * shape[2]
    done = (part.stat().st_size - begin) // clip_bytes if part.exists() else 0
    if done > 0:
        print(f"{data_file}: continuing, {done} of {shape[0]} clips are done", flush=True)
        os.truncate(part, begin + done * clip_bytes)  # the last clip may be cut off
        return part, done
    part.write_bytes(header.getvalue())
    return part, 0


def _append(part: Path, loader: DataLoader, network: FrameCNN, device: torch.device) -> None:
    network = network.to(device).eval()
    with open(part, "ab") as file, Progress(len(loader), "CNN features", "batch") as progress, torch.no_grad():
        for batch in loaded(loader):
            if batch.failed:
                raise UserError(f"{batch.failed[0].error}; features need every video: mend it or take it off the list")
            features = network(normalised(batch.clips.to(device, non_blocking=True).flatten(0, 1)))
            file.write(features.float().cpu().numpy())
            progress.advance()
        file.flush()
        os.fsync(file.fileno())


def _finish(data_file: Path, part: Path, parts: dict[str, str]) -> None:
    # Earlier features go first: with the new manifest they could be taken for the new ones. If this is interrupted,
    # the next start finds the complete part and finishes it.
    data_file.unlink(missing_ok=True)
    data = {"bytes": part.stat().st_size, "sha256": _checksum(part)}
    manifest = {"format": _FORMAT, "parts": parts, "data": data}
    write_atomically(_manifest_of(data_file), json.dumps(manifest, indent=1).encode())
    os.replace(part, data_file)


def _write_labels(file: Path, labels: numpy.ndarray) -> None:
    content = io.BytesIO()
    numpy.save(content, labels, allow_pickle=False)
    if not file.is_file() or file.read_bytes() != content.getvalue():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
