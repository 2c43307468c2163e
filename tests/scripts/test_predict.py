"""predict.py as a user runs it: videos, annotated videos, streams, and sources that end, stall or break."""

import io
import json
import os
import shutil
import socket
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
import torch

import predict
from dataset.decode import decode_frames
from dataset.frame_sampling import SAMPLINGS
from dataset.index import probe
from dataset.residual import RESIDUALS, key_residual_split
from dataset.transforms import eval_transforms
from models import ReSpike
from models.batch_norm import StepBatchNorm2d
from models.respike import SETTINGS
from tests.helpers.script import refused, run_here
from utils.runtime import Runtime
from utils.trained import TrainedNetwork, export

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["wave", "clap", "jump", "sit", "run", "swim", "fly"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainedNetwork:
    """A random network whose neurons fire, as an exported file."""
    torch.manual_seed(5)
    network = dict(
        backbone="resnet18", num_classes=len(CLASSES), stride=2, downsample=True, branches="both", fusion="lean",
        snn_batch_norm="per-step",
    )  # fmt: skip
    model = ReSpike(**{name: network[name] for name in SETTINGS})
    with torch.no_grad():
        for _ in range(3):
            model(*key_residual_split(torch.randn(2, 4, 3, 64, 64), 2))
        for norm in (module for module in model.snn.modules() if isinstance(module, StepBatchNorm2d)):
            norm.bias.fill_(0.5)  # neurons fire for small residuals too
    settings = network | dict(
        classes=CLASSES, T=4, residual="key", neuron="lif", tau=4 / 3, surrogate="atan", alpha=2.0
    )
    flags = dict(dset="list", size=32, sampling="window", frame_stride=2, views=2, crops=1, amp=False)
    path = tmp_path_factory.mktemp("trained") / "network.safetensors"
    trained = TrainedNetwork(path, model.state_dict(), settings, flags, epochs=1)
    export(trained, path)
    return trained


def variant(trained: TrainedNetwork, path: Path, flags: dict | None = None, settings: dict | None = None) -> Path:
    changed = replace(
        trained, path=path, flags=trained.flags | (flags or {}), settings=trained.settings | (settings or {})
    )
    export(changed, path)
    return path


def run(monkeypatch, capfd, checkpoint, *arguments) -> tuple[int, str, str]:
    return run_here(monkeypatch, capfd, dict.fromkeys(map(str, (checkpoint, *arguments))), predict)


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def videos(tiny_demo) -> list[Path]:
    """Four videos of 10 frames, 40 pixels."""
    return sorted(tiny_demo[0].rglob("test*.avi"))[:4]


# ---- whole videos -----------------------------------------------------------------------------------


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
    monkeypatch, capfd, trained, tmp_path, videos, flags, more, views, crops, short_side
):
    checkpoint = variant(trained, tmp_path / "network.safetensors", flags, {"residual": "previous"})
    more = [part for word in more for part in word.split("=")]
    monkeypatch.setattr(sys, "argv", ["predict.py", str(checkpoint), *map(str, videos), "--json", *more])
    assert predict.main() == 0
    lines = objects(capfd.readouterr()[0])
    assert [line["path"] for line in lines] == list(map(str, videos))
    model = ReSpike.from_checkpoint(checkpoint)
    for video, line in zip(videos, lines, strict=True):
        best = expected(model, video, views, crops, short_side).topk(5)
        assert [name for name, _ in line["top5"]] == [CLASSES[label] for label in best.indices]
        assert [share for _, share in line["top5"]] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_text(monkeypatch, capfd, trained, videos):
    status, out, err = run(monkeypatch, capfd, trained.path, videos[0])
    lines = out.splitlines()
    assert status == 0 and err == "" and lines[0] == str(videos[0])
    assert len(lines) == 6 and all(line.split()[1] == "%" and line.split()[2] in CLASSES for line in lines[1:])


def test_folders_lists_and_standard_input(monkeypatch, capfd, trained, videos, tmp_path):
    folder = tmp_path / "a folder"
    for number, video in enumerate(videos[:3]):
        (folder / "abc"[2 - number]).mkdir(parents=True)
        shutil.copy(video, folder / "abc"[2 - number] / f"{number}.AVI")
    (folder / "notes.txt").write_text("no video")
    (tmp_path / "list.txt").write_text(f"{videos[3]}\n\n{videos[0]}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{videos[1]}\n".encode())))
    status, out, err = run(
        monkeypatch, capfd, trained.path, folder, "-", "--json", "--list", tmp_path / "list.txt"
    )  # fmt: skip
    assert status == 0, err
    in_folder = [str(folder / name) for name in ("a/2.AVI", "b/1.AVI", "c/0.AVI")]
    assert [line["path"] for line in objects(out)] == [*in_folder, *map(str, (videos[1], videos[3], videos[0]))]


def test_a_bad_file_is_one_line_and_the_rest_goes_on(monkeypatch, capfd, trained, videos, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "empty").mkdir()
    status, out, err = run(
        monkeypatch, capfd, trained.path, tmp_path / "text.mp4", videos[0], tmp_path / "gone.avi", tmp_path / "empty",
        videos[1], "--json", "--save", tmp_path / "saved",
    )  # fmt: skip
    assert status == 1
    assert [line["path"] for line in objects(out)] == [str(videos[0]), str(videos[1])]
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), err
    assert {name for name in ("text.mp4", "gone.avi", "empty") if name in err} == {"text.mp4", "gone.avi", "empty"}
    assert len(list((tmp_path / "saved").iterdir())) == 2


def test_what_a_folder_hides_is_an_error(monkeypatch, capfd, trained, videos, tmp_path):
    """Linked folders are looked into; a link to nothing, and a name that no file can have, are named."""
    (tmp_path / "linked").symlink_to(videos[0].parent)
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\0b.mp4\n")))
    status, out, err = run(monkeypatch, capfd, trained.path, tmp_path, "-", "--json", "-j", "0")
    assert status == 1, err
    assert {Path(line["path"]).parent for line in objects(out)} == {tmp_path / "linked"}
    lines = err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines), err
    assert "gone.mp4: cannot be read" in lines[0] and "b.mp4: " in lines[1]


def test_a_file_that_breaks_after_a_first_look(monkeypatch, capfd, trained, videos, tmp_path):
    monkeypatch.setattr("dataset.video.RETRY_SECONDS", 0.0)
    (tmp_path / "broken.avi").write_bytes(b"\0" * 1000)
    seen = predict.VideoIndex.lookup

    def lookup(self, paths, workers):
        infos = seen(self, [path for path in paths if "broken" not in path], workers)
        return infos | {str(tmp_path / "broken.avi"): next(iter(infos.values()))}

    monkeypatch.setattr(predict.VideoIndex, "lookup", lookup)
    status, out, err = run(monkeypatch, capfd, trained.path, tmp_path / "broken.avi", videos[0], "--json")
    assert status == 1 and len(objects(out)) == 1 and err.count("\n") == 1 and "broken.avi" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "which videos"),
        (("--stream", "x.mp4", "y.mp4"), "--stream: takes one source and no VIDEO"),
        (("--stream", "x.mp4", "--save", "y"), "--stream: takes one source and no --save"),
        (("--stream", "x.mp4"), "--stream x.mp4: no such file or device"),
        (("--stream", "file:///etc/passwd"), "--stream file:///etc/passwd: expected an address of http"),
        (("--list", "/nowhere.txt"), "--list /nowhere.txt: cannot be read"),
        (("x.mp4", "--device", "tpu"), "--device tpu: expected"),
        (("x.mp4", "--crops", "2"), "--crops: invalid choice"),
    ],
)
def test_refusals(monkeypatch, capfd, trained, arguments, message):
    flags = dict.fromkeys((str(trained.path), *arguments))
    refused(monkeypatch, capfd, flags, message, predict)


# ---- annotated videos -------------------------------------------------------------------------------


def test_annotated_videos(monkeypatch, capfd, trained, videos, tmp_path):
    sources = [tmp_path / name for name in ("a/wave.avi", "b/wave.avi", "saved/wave.mp4")]
    for source, video in zip(sources, videos[:3], strict=True):
        source.parent.mkdir()
        shutil.copy(video, source)
    before = sources[2].read_bytes()
    status, _, err = run(monkeypatch, capfd, trained.path, *sources, "--save", tmp_path / "saved")
    assert status == 0, err
    assert sources[2].read_bytes() == before
    written = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert written == ["wave-2.mp4", "wave-3.mp4", "wave-4.mp4", "wave.mp4"]
    with av.open(str(tmp_path / "saved" / "wave-2.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(probe(videos[0]).fps / 2, rel=0.01)
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(pictures) == 5  # every second frame of 10
    panels = [[picture[40:296, 16 + 272 * number : 272 + 272 * number] for number in range(3)] for picture in pictures]
    for number, (frame, key, residual) in enumerate(panels):
        is_key = number % 2 == 0
        assert (abs(frame - key).mean() < 4) == is_key
        assert (residual.std() < 2) == is_key  # of a key frame: one grey
        bars = pictures[number][340:460, 620:750]  # firing rates
        assert ((bars[..., 0] > 170) & (bars[..., 2] < 80)).any() != is_key
    spread = [abs(panels[number][1] - panels[0][1]).mean() for number in (1, 2)]
    assert spread[0] < 4 < spread[1]  # the key frame of the second segment is another one


@pytest.mark.parametrize("minus", RESIDUALS)
def test_frame_by_frame_ends_as_the_whole_clip(trained, videos, tmp_path, minus):
    checkpoint = variant(trained, tmp_path / "network.safetensors", settings={"residual": minus})
    model = ReSpike.from_checkpoint(checkpoint)
    shown, clips = predict.FrameByFrame(model, Runtime()), predict.Clips(model.trained)
    frames = clips.centre(torch.from_numpy(decode_frames(videos[0], (0, 2, 4, 6))).permute(0, 3, 1, 2))
    for frame in frames:
        judged = shown.show(frame)
    with torch.no_grad():
        offline = model(*key_residual_split(frames[None], 2, minus=minus))[0].double().softmax(0)
    torch.testing.assert_close(judged.probabilities, offline, rtol=0, atol=1e-5)


# ---- streams ----------------------------------------------------------------------------------------

FRAMES = 40


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """40 frames of noise, 25 a second, in a container that can be read from its start on."""
    path = tmp_path_factory.mktemp("film") / "film.ts"
    random = numpy.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", Fraction(25))
        stream.width = stream.height = 64
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 4, 10_000_000
        for _ in range(FRAMES):
            picture = random.integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_file_as_a_stream(monkeypatch, capfd, trained, film):
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", film, "--json")
    lines = objects(out)
    assert status == 0 and len(lines) == FRAMES // 2  # frame_stride 2
    assert err.startswith("the source ended: 20 frames") and err.count("\n") == 1
    assert lines[0]["prediction"] is None and all(line["prediction"] in CLASSES for line in lines[1:])
    assert [line["time"] for line in lines] == pytest.approx([0.08 * number for number in range(20)], abs=0.002)
    assert all(line["dropped"] == 0 and line["latency_ms"] > 0 for line in lines) and lines[-1]["fps"] > 0
    # The last prediction is over the last two segments: the last four of every second frame.
    model = ReSpike.from_checkpoint(trained.path)
    frames = decode_frames(film, range(32, 40, 2))
    clip = predict.Clips(model.trained).centre(torch.from_numpy(frames).permute(0, 3, 1, 2))
    with torch.no_grad():
        best = model(*key_residual_split(clip[None], 2))[0].double().softmax(0).max(0)
    assert lines[-1]["prediction"] == CLASSES[best.indices]
    assert lines[-1]["probability"] == pytest.approx(best.values.item(), abs=1e-4)


def test_text_of_a_stream(monkeypatch, capfd, trained, film, tmp_path):
    checkpoint = variant(trained, tmp_path / "n.safetensors", {"sampling": "segments", "frame_stride": 1})
    status, out, err = run(monkeypatch, capfd, checkpoint, "--stream", film)
    lines = out.splitlines()
    assert status == 0 and len(lines) == FRAMES + 1
    assert "no prediction yet" in lines[0] and lines[-1].startswith("the source ended: 40 frames, ")
    assert err.startswith("note: trained on 4 frames spread over whole videos") and err.count("\n") == 1


def slow(monkeypatch, seconds: float) -> None:
    show = predict.FrameByFrame.show
    monkeypatch.setattr(predict.FrameByFrame, "show", lambda *args: (time.sleep(seconds), show(*args))[1])


def test_realtime_drops_rather_than_falls_behind(monkeypatch, capfd, trained, film):
    slow(monkeypatch, 0.25)  # a frame of the stream comes every 0.08 s
    started = time.monotonic()
    status, out, _ = run(monkeypatch, capfd, trained.path, "--stream", film, "--json", "--realtime")
    took = time.monotonic() - started
    lines = objects(out)
    assert status == 0 and lines[-1]["dropped"] >= 5 and took > 1.5
    assert len(lines) + lines[-1]["dropped"] == FRAMES // 2
    # A frame waits for the two before it at most.
    assert max(line["latency_ms"] for line in lines) < 3.5 * max(1000 / line["fps"] for line in lines[1:])


@pytest.fixture
def pipe(tmp_path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def write_into(pipe: Path, content: bytes, then=lambda: None) -> None:
    def write():
        with open(pipe, "wb") as file:
            file.write(content)
            file.flush()
            then()

    threading.Thread(target=write, daemon=True).start()


def test_a_live_source_that_ends(monkeypatch, capfd, trained, film, pipe):
    write_into(pipe, film.read_bytes())
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", pipe, "--json")
    lines = objects(out)
    assert status == 0 and err.startswith("the source ended: ")
    assert len(lines) + lines[-1]["dropped"] == FRAMES // 2


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_pipe_that_stalls(monkeypatch, capfd, trained, film, pipe, share):
    content, release = film.read_bytes(), threading.Event()
    write_into(pipe, content[: int(len(content) * share)], then=lambda: release.wait(60))
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", pipe, "--json", "--timeout", "1")
    release.set()
    assert status == 1 and bool(out) == bool(share)
    assert err == f"error: {pipe}: no frame for 1 s; --timeout waits longer\n"


@pytest.fixture
def serve():
    """serve(answer) -> address: the answer is sent to whoever connects, then `then` runs before the connection ends."""
    sockets = []

    def start(answer: bytes, then=lambda: None) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def handle():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)
                    then()

        threading.Thread(target=handle, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/film.ts"

    yield start
    for listening in sockets:
        listening.close()


def answer_of(content: bytes, length: int | None = None) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nContent-Length: {length or len(content)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + content


def test_an_address_that_ends(monkeypatch, capfd, trained, film, serve):
    address = serve(answer_of(film.read_bytes()))
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", address, "--json")
    assert status == 0 and err.startswith("the source ended: "), err
    assert len(objects(out)) + objects(out)[-1]["dropped"] == FRAMES // 2


def test_an_address_that_stalls(monkeypatch, capfd, trained, film, serve):
    content, release = film.read_bytes(), threading.Event()
    address = serve(answer_of(content[: len(content) // 2], len(content)), then=lambda: release.wait(60))
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", address, "--timeout", "1")
    release.set()
    assert status == 1 and out
    assert err == f"error: {address}: no frame for 1 s; --timeout waits longer\n"


def test_an_address_that_breaks(monkeypatch, capfd, trained, film, serve):
    content = film.read_bytes()
    address = serve(answer_of(content[: len(content) // 2], len(content)))
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", address)
    assert status == 1 and out
    assert err.count("\n") == 1 and err.startswith(f"error: {address}: "), err


@pytest.mark.parametrize("content", [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", answer_of(b"text" * 1000)])
def test_an_address_without_a_video(monkeypatch, capfd, trained, serve, content):
    address = serve(content)
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", address, "--timeout", "5")
    assert status == 1 and out == ""
    assert err.count("\n") == 1 and err.startswith(f"error: {address}: "), err


def test_an_address_cannot_name_local_files(monkeypatch, capfd, trained, film, serve):
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\nfile://{film}\n#EXT-X-ENDLIST\n".encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.apple.mpegurl\r\nContent-Length: {len(playlist)}\r\n\r\n"
    address = serve(head.encode() + playlist)
    status, out, _ = run(monkeypatch, capfd, trained.path, "--stream", address, "--timeout", "5", "--json")
    assert status == 1 and out == ""


def test_a_damaged_file_as_a_stream(monkeypatch, capfd, trained, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    status, out, err = run(monkeypatch, capfd, trained.path, "--stream", tmp_path / "text.mp4")
    assert status == 1 and out == "" and err.count("\n") == 1 and "text.mp4" in err
