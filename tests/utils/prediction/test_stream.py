"""Streams, as predict.py prints them, and sources that end, stall or break."""

import os
import socket
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy
import pytest
import torch

from dataset.decode import decode_frames
from dataset.residual import key_residual_split
from models import ReSpike
from tests.helpers.prediction import CLASSES, objects, run, variant
from utils.prediction.clips import Clips
from utils.prediction.frames import FrameByFrame

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_a_file_as_a_stream(monkeypatch, capfd, random_network, film):
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", film, "--json")
    lines = objects(out)
    assert status == 0 and len(lines) == FRAMES // 2  # frame_stride 2
    assert err.startswith("the source ended: 20 frames") and err.count("\n") == 1
    assert lines[0]["prediction"] is None and all(line["prediction"] in CLASSES for line in lines[1:])
    assert [line["time"] for line in lines] == pytest.approx([0.08 * number for number in range(20)], abs=0.002)
    assert all(line["dropped"] == 0 and line["latency_ms"] > 0 for line in lines) and lines[-1]["fps"] > 0
    # The last prediction is over the last two segments: the last four of every second frame.
    model = ReSpike.from_checkpoint(random_network.path)
    clip = Clips(model.trained).centre(decode_frames(film, range(32, 40, 2)))
    with torch.no_grad():
        best = model(*key_residual_split(clip[None], 2))[0].double().softmax(0).max(0)
    assert lines[-1]["prediction"] == CLASSES[best.indices]
    assert lines[-1]["probability"] == pytest.approx(best.values.item(), abs=1e-4)


def test_text_of_a_stream(monkeypatch, capfd, random_network, film, tmp_path):
    checkpoint = variant(random_network, tmp_path / "n.safetensors", {"sampling": "segments", "frame_stride": 1})
    status, out, err = run(monkeypatch, capfd, checkpoint, "--stream", film)
    lines = out.splitlines()
    assert status == 0 and len(lines) == FRAMES + 1
    assert "no prediction yet" in lines[0] and lines[-1].startswith("the source ended: 40 frames, ")
    assert err.startswith("note: trained on 4 frames spread over whole videos") and err.count("\n") == 1


def slow(monkeypatch, seconds: float) -> None:
    show = FrameByFrame.show
    monkeypatch.setattr(FrameByFrame, "show", lambda *args: (time.sleep(seconds), show(*args))[1])


def test_realtime_drops_rather_than_falls_behind(monkeypatch, capfd, random_network, film):
    slow(monkeypatch, 0.25)  # a frame of the stream comes every 0.08 s
    started = time.monotonic()
    status, out, _ = run(monkeypatch, capfd, random_network.path, "--stream", film, "--json", "--realtime")
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


def test_a_live_source_that_ends(monkeypatch, capfd, random_network, film, pipe):
    write_into(pipe, film.read_bytes())
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", pipe, "--json")
    lines = objects(out)
    assert status == 0 and err.startswith("the source ended: ")
    assert len(lines) + lines[-1]["dropped"] == FRAMES // 2


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_pipe_that_stalls(monkeypatch, capfd, random_network, film, pipe, share):
    content, release = film.read_bytes(), threading.Event()
    write_into(pipe, content[: int(len(content) * share)], then=lambda: release.wait(60))
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", pipe, "--json", "--timeout", "1")
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


def test_an_address_that_ends(monkeypatch, capfd, random_network, film, serve):
    address = serve(answer_of(film.read_bytes()))
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", address, "--json")
    assert status == 0 and err.startswith("the source ended: "), err
    assert len(objects(out)) + objects(out)[-1]["dropped"] == FRAMES // 2


def test_an_address_that_stalls(monkeypatch, capfd, random_network, film, serve):
    content, release = film.read_bytes(), threading.Event()
    address = serve(answer_of(content[: len(content) // 2], len(content)), then=lambda: release.wait(60))
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", address, "--timeout", "1")
    release.set()
    assert status == 1 and out
    assert err == f"error: {address}: no frame for 1 s; --timeout waits longer\n"


def test_an_address_that_breaks(monkeypatch, capfd, random_network, film, serve):
    content = film.read_bytes()
    address = serve(answer_of(content[: len(content) // 2], len(content)))
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", address)
    assert status == 1 and out
    assert err.count("\n") == 1 and err.startswith(f"error: {address}: "), err


@pytest.mark.parametrize("content", [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", answer_of(b"text" * 1000)])
def test_an_address_without_a_video(monkeypatch, capfd, random_network, serve, content):
    address = serve(content)
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", address, "--timeout", "5")
    assert status == 1 and out == ""
    assert err.count("\n") == 1 and err.startswith(f"error: {address}: "), err


def test_an_address_cannot_name_local_files(monkeypatch, capfd, random_network, film, serve):
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\nfile://{film}\n#EXT-X-ENDLIST\n".encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.apple.mpegurl\r\nContent-Length: {len(playlist)}\r\n\r\n"
    address = serve(head.encode() + playlist)
    status, out, _ = run(monkeypatch, capfd, random_network.path, "--stream", address, "--timeout", "5", "--json")
    assert status == 1 and out == ""


def test_a_damaged_file_as_a_stream(monkeypatch, capfd, random_network, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    status, out, err = run(monkeypatch, capfd, random_network.path, "--stream", tmp_path / "text.mp4")
    assert status == 1 and out == "" and err.count("\n") == 1 and "text.mp4" in err
