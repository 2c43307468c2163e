"""predict.py as a user runs it on files."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

import predict
from dataset.decode import decode_frames
from dataset.frame_sampling import SAMPLINGS
from dataset.index import probe
from dataset.residual import key_residual_split
from dataset.transforms import eval_transforms
from models import ReSpike
from tests.helpers.prediction import CLASSES, objects, run, variant
from tests.helpers.script import refused

pytestmark = pytest.mark.usefixtures("one_thread")


def expected(model: ReSpike, video: Path, views: int, crops: int, short_side: int) -> torch.Tensor:
    """Decoded, cropped and averaged one clip at a time."""
    shares = []
    sampling = SAMPLINGS[model.trained.sampling](4, model.trained.flags["frame_stride"], views)
    frames = probe(video).frames
    for place in sampling.places(frames):
        clip = torch.from_numpy(decode_frames(video, sampling.at(frames, place))).permute(0, 3, 1, 2)
        for transform in eval_transforms(32, short_side, crops):
            with torch.no_grad():
                split = key_residual_split(transform(clip)[None], 2, minus=model.trained.residual)
                shares.append(model(*split).double().softmax(1)[0])
    return torch.stack(shares).mean(0)


@pytest.mark.parametrize(
    "flags, more, views, crops, short_side",
    [
        ({}, (), 2, 1, 37),
        ({"dset": "hmdb51"}, ("--views=3", "--crops=3"), 3, 3, 32),
        ({"sampling": "segments", "frame_stride": 1}, ("-b=1",), 2, 1, 37),
    ],
)
def test_probabilities_are_those_of_a_test(
    monkeypatch, capfd, random_network, tmp_path, tiny_videos, flags, more, views, crops, short_side
):
    checkpoint = variant(random_network, tmp_path / "network.safetensors", flags, {"residual": "previous"})
    more = [part for word in more for part in word.split("=")]
    monkeypatch.setattr(sys, "argv", ["predict.py", str(checkpoint), *map(str, tiny_videos), "--json", *more])
    assert predict.main() == 0
    lines = objects(capfd.readouterr()[0])
    assert [line["path"] for line in lines] == list(map(str, tiny_videos))
    model = ReSpike.from_checkpoint(checkpoint)
    for video, line in zip(tiny_videos, lines, strict=True):
        best = expected(model, video, views, crops, short_side).topk(5)
        assert [name for name, _ in line["top5"]] == [CLASSES[label] for label in best.indices]
        assert [share for _, share in line["top5"]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_text(monkeypatch, capfd, random_network, tiny_videos):
    status, out, err = run(monkeypatch, capfd, random_network.path, tiny_videos[0])
    lines = out.splitlines()
    assert status == 0 and err == "" and lines[0] == str(tiny_videos[0])
    assert len(lines) == 6 and all(line.split()[1] == "%" and line.split()[2] in CLASSES for line in lines[1:])


def test_folders_lists_and_standard_input(monkeypatch, capfd, random_network, tiny_videos, tmp_path):
    folder = tmp_path / "a folder"
    for number, video in enumerate(tiny_videos[:3]):
        (folder / "abc"[2 - number]).mkdir(parents=True)
        shutil.copy(video, folder / "abc"[2 - number] / f"{number}.AVI")
    (folder / "notes.txt").write_text("no video")
    (tmp_path / "list.txt").write_text(f"{tiny_videos[3]}\n\n{tiny_videos[0]}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{tiny_videos[1]}\n".encode())))
    status, out, err = run(
        monkeypatch, capfd, random_network.path, folder, "-", "--json", "--list", tmp_path / "list.txt"
    )  # fmt: skip
    assert status == 0, err
    in_folder = [str(folder / name) for name in ("a/2.AVI", "b/1.AVI", "c/0.AVI")]
    named = [str(tiny_videos[number]) for number in (1, 3, 0)]
    assert [line["path"] for line in objects(out)] == [*in_folder, *named]


def test_a_bad_file_is_one_line_and_the_rest_goes_on(monkeypatch, capfd, random_network, tiny_videos, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "empty").mkdir()
    status, out, err = run(
        monkeypatch, capfd, random_network.path, tmp_path / "text.mp4", tiny_videos[0], tmp_path / "gone.avi",
        tmp_path / "empty", tiny_videos[1], "--json", "--save", tmp_path / "saved",
    )  # fmt: skip
    assert status == 1
    assert [line["path"] for line in objects(out)] == [str(tiny_videos[0]), str(tiny_videos[1])]
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), err
    assert {name for name in ("text.mp4", "gone.avi", "empty") if name in err} == {"text.mp4", "gone.avi", "empty"}
    assert len(list((tmp_path / "saved").iterdir())) == 2


def test_what_a_folder_hides_is_an_error(monkeypatch, capfd, random_network, tiny_videos, tmp_path):
    """Linked folders are looked into; a link to nothing, and a name that no file can have, are named."""
    (tmp_path / "linked").symlink_to(tiny_videos[0].parent)
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\0b.mp4\n")))
    status, out, err = run(monkeypatch, capfd, random_network.path, tmp_path, "-", "--json", "-j", "0")
    assert status == 1, err
    assert {Path(line["path"]).parent for line in objects(out)} == {tmp_path / "linked"}
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines), err
    assert "gone.mp4: cannot be read" in lines[0] and "b.mp4: " in lines[1]


def test_a_file_that_breaks_after_a_first_look(monkeypatch, capfd, random_network, tiny_videos, tmp_path):
    monkeypatch.setattr("dataset.video.RETRY_SECONDS", 0.0)
    (tmp_path / "broken.avi").write_bytes(b"\0" * 1000)
    seen = predict.VideoIndex.lookup

    def lookup(self, paths, workers):
        infos = seen(self, [path for path in paths if "broken" not in path], workers)
        return infos | {str(tmp_path / "broken.avi"): next(iter(infos.values()))}

    monkeypatch.setattr(predict.VideoIndex, "lookup", lookup)
    status, out, err = run(monkeypatch, capfd, random_network.path, tmp_path / "broken.avi", tiny_videos[0], "--json")
    assert status == 1 and len(objects(out)) == 1 and err.count("\n") == 1 and "broken.avi" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "which videos"),
        (("--stream", "x.mp4", "y.mp4"), "--stream: takes one source and no VIDEO"),
        (("--stream", "x.mp4", "--save", "y"), "--stream: takes one source and no --save"),
        (("--stream", "x.mp4"), "--stream x.mp4: no such file or device"),
        (("--stream", "file:///etc/passwd"), "--stream file:///etc/passwd: expected an address of http"),
        (("x.mp4", "--realtime"), "--realtime: paces a stream"),
        (("--list", "/nowhere.txt"), "--list /nowhere.txt: cannot be read"),
        (("x.mp4", "--device", "tpu"), "--device tpu: expected"),
        (("x.mp4", "--crops", "2"), "--crops: invalid choice"),
    ],
)
def test_refusals(monkeypatch, capfd, random_network, arguments, message):
    flags = dict.fromkeys((str(random_network.path), *arguments))
    refused(monkeypatch, capfd, flags, message, predict)
