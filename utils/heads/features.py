"""Features that a frozen CNN computes from every frame of the evaluation clips: computed once, kept in a .npy file.

Beside the file NAME lies NAME.json: what it was made of, its size and its checksum. While NAME is built there are
.NAME.part.npy and .NAME.part.json. The next start continues an interrupted build from them.
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
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.batch_sampler import EvalBatchSampler
from dataset.clips import VideoTable, eval_clips
from dataset.residual import normalised
from dataset.transforms import eval_transforms
from dataset.video import VideoDataset, loaded, make_loader
from models.heads.cnn import FrameCNN, weights_digest
from utils.errors import UserError
from utils.files import write_atomically
from utils.progress import Progress

_FORMAT = 1
_SECONDS_BETWEEN_SAVES = 30.0


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


class _Files:
    """data: the features. manifest: what they were made of. part, part_manifest: the same during a build."""

    def __init__(self, data: Path):
        self.data = data
        self.manifest = data.with_name(f"{data.name}.json")
        self.part = data.with_name(f".{data.name}.part.npy")
        self.part_manifest = data.with_name(f".{data.name}.part.json")


def cached_features(
    data_file: Path,
    labels_file: Path,
    videos: VideoTable,
    sampling,
    network: FrameCNN | None,
    description: dict,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    size: int,
    pin: bool,
    may_build: bool,
    verify: bool = False,
) -> Features:
    """The features of every video's evaluation clips: read from `data_file` if it was made of the same videos,
    sampling, frame size and network, otherwise computed and written to it.

    data_file: .npy of the features.
    labels_file: .npy of the clips' labels, for other programs. Written if it is missing or differs.
    videos: the videos, each of which must be decodable.
    sampling: gives the frames of each clip (`dataset.frame_sampling`).
    network: normalised frames float32 [N, 3, size, size] -> [N, width]. A build moves it to `device`. None,
        allowed without `may_build`: the weights are not compared.
    description: more to compare, in types that JSON has.
    device: where the features are computed.
    batch_size: clips in a batch of the network.
    workers: processes that decode videos.
    size: pixels, side of a frame.
    pin: for copies to a GPU beside computation.
    may_build: False: never compute features.
    verify: compare the checksum of `data_file`, which reads it whole. Its size is always compared.

    Raises UserError if the files do not fit or are damaged without `may_build`, if a video cannot be decoded and if
    the files cannot be read or written.
    """
    files = _Files(data_file)
    clips = eval_clips(videos, sampling)
    labels = videos.labels[clips["video"]]
    try:
        parts = _parts(videos, sampling, size, network, description)
        fault = _fault(files, parts, verify)
        if fault and not may_build:
            raise UserError(f"{fault}; set import_CNN_forward_data to false to build it")
        if fault:
            print(f"{fault}; building it", flush=True)
            network = network.to(device).eval()
            array, done = _open_part(files, parts, (len(clips), sampling.clip_frames, network.width))
            transforms = eval_transforms(size, round(size * 256 / 224))
            dataset = VideoDataset(videos, clips[done:], sampling, transforms, seed=0)
            loader = make_loader(dataset, EvalBatchSampler(dataset.clips, batch_size), workers, pin)
            _fill(array, done, loader, network, device, lambda done: _save_part(files, parts, array, done))
            _finish(files, parts)
        _write_labels(labels_file, labels)
        data = numpy.load(data_file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(
            f"{error.filename or data_file}: cannot be read or written ({error.strerror or error}); "
            "name a file in a writable folder with enough room"
        ) from error
    return Features(data, labels, clips["video"])


# ---- what the features were made of ------------------------------------------------------------------


def _parts(videos: VideoTable, sampling, size: int, network: FrameCNN | None, description: dict) -> dict[str, str]:
    """A digest of each thing that shapes the features, by the name that a message gives it."""
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
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns]
        digest.update(os.fsencode(path) + json.dumps([stamp, label, frames]).encode() + b"\n")
    return digest.hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- is the file what it should be? ------------------------------------------------------------------


def _fault(files: _Files, parts: dict[str, str], verify: bool) -> str | None:
    """Why the data file cannot be used, in one line; None if it can."""
    for file in (files.data, files.manifest):
        if not file.is_file():
            return f"{file}: no such file"
    manifest = _read_manifest(files.manifest)
    if manifest is None:
        return f"{files.manifest}: not a readable description of {files.data.name}"
    different = [name for name in parts if manifest["parts"].get(name) != parts[name]]
    if different:
        return f"{files.data}: made with other {' and '.join(different)}"
    bytes_wanted, bytes_found = manifest["data"]["bytes"], files.data.stat().st_size
    if bytes_found != bytes_wanted:
        return f"{files.data}: damaged: expected {bytes_wanted} bytes, found {bytes_found}"
    if verify and _checksum(files.data) != manifest["data"]["sha256"]:
        return f"{files.data}: damaged: its checksum differs"
    return None


def _read_manifest(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None


def _checksum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# ---- building it -------------------------------------------------------------------------------------


def _open_part(files: _Files, parts: dict[str, str], shape: tuple[int, int, int]) -> tuple[numpy.memmap, int]:
    """(the array to fill, how many of its clips an interrupted build has filled)"""
    manifest = _read_manifest(files.part_manifest)
    fits = manifest is not None and manifest["key"] == _digest(parts)
    # The size is compared before the file is opened: opening a truncated file would fill it up with zeros.
    if fits and files.part.is_file() and files.part.stat().st_size == manifest["bytes"]:
        print(f"{files.data}: continuing, {manifest['done']} of {shape[0]} clips are done", flush=True)
        return open_memmap(files.part, mode="r+"), manifest["done"]
    files.data.parent.mkdir(parents=True, exist_ok=True)
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
    # Without reserved blocks a full disk would end the process with a signal, on a write to the mapped file.
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
    network: FrameCNN,
    device: torch.device,
    save: Callable[[int], None],
) -> None:
    """Compute the features of the loader's clips into `array`, from clip `done` on. `save(done)` is called every
    half minute, and at the end even if there is an error."""
    saved = time.monotonic()
    try:
        with Progress(len(loader), "CNN features", unit="batch") as progress, torch.no_grad():
            for batch in loaded(loader):
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
    finally:
        save(done)


def _save_part(files: _Files, parts: dict[str, str], array: numpy.memmap, done: int) -> None:
    array.flush()  # the features must be on the disk before the manifest counts them
    content = {"format": _FORMAT, "key": _digest(parts), "done": done, "bytes": files.part.stat().st_size}
    write_atomically(files.part_manifest, json.dumps(content).encode())


def _finish(files: _Files, parts: dict[str, str]) -> None:
    # Earlier features go first: with the new manifest they could be taken for the new ones. If this is interrupted,
    # the next start finds the complete part and finishes it.
    files.data.unlink(missing_ok=True)
    data = {"bytes": files.part.stat().st_size, "sha256": _checksum(files.part)}
    write_atomically(files.manifest, json.dumps({"format": _FORMAT, "parts": parts, "data": data}, indent=1).encode())
    os.replace(files.part, files.data)
    files.part_manifest.unlink(missing_ok=True)


def _write_labels(file: Path, labels: numpy.ndarray) -> None:
    content = io.BytesIO()
    numpy.save(content, labels, allow_pickle=False)
    if not file.is_file() or file.read_bytes() != content.getvalue():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
