"""Features that a frozen CNN gives of every frame of the fixed clips of videos: computed once, then mapped
into memory from a .npy file.

Beside the file NAME lie NAME.json, which says what it was made of and its checksum, and while it is being
made .NAME.part.npy and .NAME.part.json, from which an interrupted start goes on.
"""

import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from numpy.lib.format import open_memmap
from torch import nn
from torch.utils.data import DataLoader

from dataset.batch_sampler import EvalBatchSampler
from dataset.clips import VideoTable, eval_clips
from dataset.residual import normalised
from dataset.transforms import eval_transforms
from dataset.video import VideoDataset, make_loader
from models.heads.cnn import weights_digest
from utils.errors import UserError
from utils.files import write_atomically
from utils.progress import Progress

_FORMAT = 1
_PIECE_BYTES = 16 * 2**20
_SECONDS_BETWEEN_SAVES = 30.0
_TO_BUILD = "set the config's import_CNN_forward_data to false to build it"


@dataclass(frozen=True)
class Features:
    """Clips stand as in `dataset.clips.eval_clips`: those of a video one after another."""

    data: numpy.ndarray  # float32 [clips, frames, width], mapped from the file, read-only
    labels: numpy.ndarray  # int64 [clips]
    videos: numpy.ndarray  # int64 [clips], index into the table


class _Files:
    def __init__(self, data: Path, labels: Path):
        self.data, self.labels = data, labels
        self.manifest = data.with_name(f"{data.name}.json")
        self.part = data.with_name(f".{data.name}.part.npy")
        self.part_manifest = data.with_name(f".{data.name}.part.json")


def cached_features(
    data_file: Path,
    labels_file: Path,
    videos: VideoTable,
    sampling,
    network: nn.Module | None,
    description: dict,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    size: int,
    pin: bool,
    may_build: bool,
    shuffle: bool = False,
) -> Features:
    """The features of the sampling's views of every video, out of `data_file` if it was made of the same
    videos, sampling, size and network, else, where `may_build`, computed and kept there.

    network: normalised frames float32 [N, 3, size, size] -> [N, width]; a build leaves it on `device`, in
    eval mode. None, where not `may_build`: its weights are not at hand to compare. description: what else
    there is to say of it, JSON. batch_size: clips. shuffle: accepted and without effect: in whatever
    order videos go through a frozen network, the features are the same.
    Raises UserError where there is no such file or it does not fit or is damaged and `may_build` is
    False, for a video that cannot be decoded, and where the files cannot be written.
    """
    if network is None and may_build:
        raise ValueError("features cannot be built without a network")
    _check_names(data_file, labels_file)
    _check_videos(videos, data_file)
    files = _Files(data_file, labels_file)
    clips = eval_clips(videos, sampling)
    labels = videos.labels[clips["video"]]
    parts = _parts(videos, sampling, size, network, description)
    try:
        fault = _fault_of_data(files, parts)
        labels_fault = None if fault else _damage(labels_file, _read_manifest(files.manifest)["labels"])
        _report(fault or labels_fault, may_build)
        if fault:
            network = network.to(device).eval()
            shape = (len(clips), sampling.clip_frames, _width(network, size, device))
            array, done = _open_part(files, parts, shape)
            if done < len(clips):
                transforms = eval_transforms(size, round(size * 256 / 224))
                dataset = VideoDataset(videos, clips[done:], sampling, transforms, seed=0)
                loader = make_loader(dataset, EvalBatchSampler(dataset.clips, batch_size), workers, pin)
                _fill(array, done, loader, network, device, lambda done: _save_part(files, parts, array, done))
            _finish(files, parts, shape, labels)
        elif labels_fault:
            write_atomically(labels_file, _npy(labels))
        data = numpy.load(data_file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(
            f"{data_file}: cannot be read or built ({error.strerror or error}); "
            "name a file in a writable folder with enough room"
        ) from error
    return Features(data, labels, clips["video"])


def _check_names(data_file: Path, labels_file: Path) -> None:
    for file in (data_file, labels_file):
        if file.suffix.lower() in (".pkl", ".pickle"):
            raise UserError(f"{file}: cached data are safe arrays now, not pickles; name a .npy file")
    if data_file == labels_file:
        raise UserError(f"{data_file}: named for the features and for their labels; name two files")


def _check_videos(videos: VideoTable, data_file: Path) -> None:
    if not len(videos):
        raise UserError(f"{data_file}: expected the features of at least one video, found no video; see to the lists")
    empty = numpy.flatnonzero(videos.frames < 1)
    if len(empty):
        raise UserError(f"{videos.path(empty[0])}: has no decodable frame; mend it or take it off the list")


def _parts(videos: VideoTable, sampling, size: int, network: nn.Module | None, description: dict) -> dict[str, str]:
    """A digest of each thing that shapes the features, by the name a user knows it by."""
    parts = {
        "videos": _digest_of_videos(videos),
        "sampling": _digest([type(sampling).__name__, asdict(sampling)]),
        "frame size": _digest(size),
        "description": _digest(description),
    }
    return parts if network is None else {**parts, "CNN weights": weights_digest(network)}


def _digest_of_videos(videos: VideoTable) -> str:
    digest = hashlib.sha256()
    for video, (label, frames) in enumerate(zip(videos.labels.tolist(), videos.frames.tolist(), strict=True)):
        path = os.path.abspath(videos.path(video))
        try:
            status = os.stat(path)
            stamp = [status.st_size, status.st_mtime_ns]
        except OSError:  # decoding says what is the matter with it
            stamp = [-1, -1]
        digest.update(os.fsencode(path) + json.dumps([stamp, label, frames]).encode() + b"\n")
    return digest.hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _fault_of_data(files: _Files, parts: dict[str, str]) -> str | None:
    """What keeps the data file from being used, as one line."""
    missing = next((file for file in (files.data, files.manifest) if not file.is_file()), None)
    if missing is not None:
        return f"{missing}: no such file"
    manifest = _read_manifest(files.manifest)
    if manifest is None:
        return f"{files.manifest}: not a readable description of {files.data.name}"
    different = [name for name in parts if manifest["parts"].get(name) != parts[name]]
    if different:
        return f"{files.data}: made with other {' and '.join(different)}"
    return _damage(files.data, manifest["data"])


def _report(fault: str | None, may_build: bool) -> None:
    if fault is None:
        return
    if not may_build:
        raise UserError(f"{fault}, but import_CNN_forward_data is true, which only reads it; {_TO_BUILD}")
    print(f"{fault}; building it", flush=True)


def _read_manifest(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None


def _damage(file: Path, recorded: dict) -> str | None:
    """Whether a file is what was written once: what is wrong with it, as one line."""
    if not file.is_file():
        return f"{file}: no such file"
    size = file.stat().st_size
    if size != recorded["bytes"]:
        return f"{file}: damaged: expected {recorded['bytes']} bytes, found {size}"
    return None if _checksum(file) == recorded["sha256"] else f"{file}: damaged: its checksum differs"


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as content:
        while piece := content.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _width(network: nn.Module, size: int, device: torch.device) -> int:
    """Known before hours of decoding, as the file's size is."""
    with torch.no_grad():
        features = network(torch.zeros(1, 3, size, size, device=device))
    if features.dim() != 2:
        raise ValueError(f"the network must give [N, width] of frames [N, 3, H, W], got {list(features.shape)}")
    return features.shape[1]


def _open_part(files: _Files, parts: dict[str, str], shape: tuple[int, int, int]) -> tuple[numpy.memmap, int]:
    """(the array to fill, how many of its clips are there already)"""
    manifest = _read_manifest(files.part_manifest)
    fits = manifest is not None and manifest["key"] == _digest(parts)
    # Looked at first: opening a file that was cut off would fill it up with zeros.
    if fits and files.part.is_file() and files.part.stat().st_size == manifest["bytes"]:
        print(f"{files.data}: going on, {manifest['done']} of {shape[0]} clips are done", flush=True)
        return open_memmap(files.part, mode="r+"), manifest["done"]
    files.data.parent.mkdir(parents=True, exist_ok=True)
    files.labels.parent.mkdir(parents=True, exist_ok=True)
    files.part_manifest.unlink(missing_ok=True)
    array = open_memmap(files.part, mode="w+", dtype=numpy.float32, shape=shape)
    try:
        _reserve(files.part)
    except OSError as error:
        files.part.unlink()
        raise UserError(
            f"{files.data}: cannot be written ({error.strerror}): it takes {array.nbytes / 1e9:.3f} GB; "
            "make room or name a file elsewhere"
        ) from error
    return array, 0


def _reserve(file: Path) -> None:
    # A mapped file with holes would end the process with a signal when the disk is full.
    if not hasattr(os, "posix_fallocate"):
        return
    with open(file, "r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                raise


def _fill(
    array: numpy.memmap,
    done: int,
    loader: DataLoader,
    network: nn.Module,
    device: torch.device,
    save: Callable[[int], None],
) -> None:
    """Compute the features of the loader's clips into `array` from clip `done` on; `save` takes how many of its
    clips are done, now and then and however this ends."""
    saved = time.monotonic()
    try:
        with Progress(len(loader), "CNN features", unit="batch") as progress, torch.no_grad():
            for batch in loader:
                if batch.failed:
                    raise UserError(
                        f"{batch.failed[0].error}; features need every video: mend it or take it off the list"
                    )
                clips, frames = batch.clips.shape[:2]
                features = network(normalised(batch.clips.to(device, non_blocking=True).flatten(0, 1)))
                array[done : done + clips] = features.float().unflatten(0, (clips, frames)).cpu().numpy()
                done += clips
                progress.advance()
                if time.monotonic() > saved + _SECONDS_BETWEEN_SAVES:
                    save(done)
                    saved = time.monotonic()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data loading process died ({' '.join(str(error).split())}); fewer workers, or more memory or /dev/shm"
        ) from error
    finally:
        save(done)


def _save_part(files: _Files, parts: dict[str, str], array: numpy.memmap, done: int) -> None:
    array.flush()  # what is said to be done must be on the disk before it is said
    content = {"format": _FORMAT, "key": _digest(parts), "done": done, "bytes": files.part.stat().st_size}
    write_atomically(files.part_manifest, json.dumps(content).encode())


def _finish(files: _Files, parts: dict[str, str], shape: tuple[int, int, int], labels: numpy.ndarray) -> None:
    # Cut off anywhere in here, the next start finds the whole part still there, or all of it done.
    own = _npy(labels)
    write_atomically(files.labels, own)
    content = {
        "format": _FORMAT,
        "key": _digest(parts),
        "parts": parts,
        "data": {"bytes": files.part.stat().st_size, "sha256": _checksum(files.part), "shape": shape},
        "labels": {"bytes": len(own), "sha256": hashlib.sha256(own).hexdigest()},
    }
    write_atomically(files.manifest, json.dumps(content, indent=1).encode())
    os.replace(files.part, files.data)
    files.part_manifest.unlink(missing_ok=True)


def _npy(array: numpy.ndarray) -> bytes:
    content = io.BytesIO()
    numpy.save(content, array, allow_pickle=False)
    return content.getvalue()
