"""prepared.json of a folder of converted videos, and the lists beside it: what is there, and how it was made."""

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import av

from dataset.convert import Settings
from dataset.shards import SHARDS, Shard
from utils.errors import UserError
from utils.files import write_atomically, writing

MANIFEST = "prepared.json"
_FORMAT = 1  # of the files and the manifest


class Manifest:
    """prepared.json: source, settings, versions, counts, and size and number of frames of each file.

    Written when a conversion begins and, with `complete` true, when it ends; of shards, when the first begins and when
    the last ends. Raises UserError for a folder that was prepared with other settings, or that holds other files.

    listed: the videos, as `dataset.shards.listing` names them.
    """

    def __init__(self, folder: Path, settings: Settings, source: dict, listed: str, shard: Shard | None = None):
        self.folder = folder
        self.settings = settings
        self._path = folder / MANIFEST
        wanted = {"format": _FORMAT, **asdict(settings)}
        names = os.listdir(folder)  # before the manifest is read: another shard may write it just now
        earlier = self._read()
        if not earlier and any(name not in (MANIFEST, SHARDS) and not _is_partial(name) for name in names):
            raise UserError(f"--out {folder}: holds other files and no {MANIFEST}; name a new or an empty folder")
        for name, value in earlier.get("settings", {}).items():
            if wanted.get(name) != value:
                raise UserError(
                    f"--out {folder}: was prepared with {name.replace('_', ' ')} {value}, not {wanted.get(name)}; "
                    "give the same setting, or another folder"
                )
        self.files: dict[str, list[int]] = earlier.get("files", {})  # path below: [bytes, frames]
        sources = earlier.get("sources", [])
        self._content = {
            "settings": wanted,
            "sources": sources if source in sources else [*sources, source],
            "listed": listed,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("av", "torch", "torchvision", "numpy", "pillow")},
                "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
            },
        }
        if shard is None or earlier.get("listed") != listed:
            self.write(complete=False)

    def _read(self) -> dict:
        """Empty if there is none."""
        try:
            content = json.loads(self._path.read_bytes())
            if not all(isinstance(content[key], kind) for key, kind in (("settings", dict), ("files", dict))):
                raise ValueError
            return content
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path}: is not a manifest of prepared files; name another folder") from error

    def name_of(self, target: Path) -> str:
        return str(target.relative_to(self.folder))

    def known(self, target: Path) -> tuple[int, int] | None:
        entry = self.files.get(self.name_of(target))
        return tuple(entry) if isinstance(entry, list) and len(entry) == 2 else None

    def write(self, complete: bool, **counts: int) -> None:
        content = {**self._content, "complete": complete, **counts, "files": dict(sorted(self.files.items()))}
        with writing(self._path):
            write_atomically(self._path, (json.dumps(content, indent=1) + "\n").encode())


def _is_partial(name: str) -> bool:
    return name.startswith(f".{MANIFEST}.")  # as `write_atomically` begins it


def conclude(manifest: Manifest, results: dict[str, list[int] | str], missing: list[str]) -> None:
    """Write unreadable.txt, missing.txt and the complete manifest. results: as `prepare` returns them."""
    unreadable = [result for result in results.values() if isinstance(result, str)]
    for name, result in results.items():
        manifest.files.pop(name, None)
        if not isinstance(result, str):
            manifest.files[name] = result
    _write_list(manifest.folder / "unreadable.txt", unreadable)
    _write_list(manifest.folder / "missing.txt", missing)
    total_bytes = sum(size for size, _ in manifest.files.values())
    total_frames = sum(frames for _, frames in manifest.files.values())
    manifest.write(
        complete=True, videos=len(manifest.files), frames=total_frames, bytes=total_bytes,
        unreadable=len(unreadable), missing=len(missing),
    )  # fmt: skip
    print(
        f"prepare: {len(manifest.files)} videos, {total_frames} frames, {total_bytes / 1e9:.3f} GB in {manifest.folder}"
    )
    for lines, name, meaning in (
        (unreadable, "unreadable.txt", "videos cannot be read and are left out"),
        (missing, "missing.txt", "listed videos are not on disk"),
    ):
        if lines:
            print(f"prepare: {len(lines)} {meaning}, the first: {lines[0]} (all in {manifest.folder / name})")


def _write_list(path: Path, lines: list[str]) -> None:
    with writing(path):
        if lines:
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
        else:
            path.unlink(missing_ok=True)
