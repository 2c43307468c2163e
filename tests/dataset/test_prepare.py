import io
import json
import os
import shutil
import signal
from fractions import Fraction

import av
import numpy
import pytest
from PIL import Image

import dataset.prepare as prepare
from dataset.decode import VideoError, decode_frames, every_frame
from dataset.demo import DEMOS, DemoSettings, generate_demo
from dataset.index import probe
from dataset.lists import VideoList, read_lists
from dataset.prepare import Settings, convert, scaled_down
from dataset.shards import Shard
from dataset.splits import read_hmdb51
from tests.dataset.test_decode import ORACLE
from tests.helpers.damaged_files import verdicts
from tests.helpers.kill_prepare import content, kills_leave_the_same_folder, start, wait_for_work
from tests.helpers.odd_videos import number_of, write_timed
from tests.helpers.script import command_line, full_disk, refused, run_here
from utils.errors import UserError


@pytest.fixture
def run(tiny_lists, tmp_path, monkeypatch, capfd):
    """Prepare the tiny lists' videos into tmp_path/out, with these flags changed. Returns stdout."""

    def run(**changed) -> str:
        flags = {**tiny_lists, "--out": tmp_path / "out", "--jobs": 2}
        flags |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        given = {flag: value for flag, value in flags.items() if value != ""}
        status, out, err = run_here(monkeypatch, capfd, given, prepare)
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refuse(tiny_lists, tmp_path, monkeypatch, capfd):
    def refuse(message: str, **changed) -> None:
        flags = {**tiny_lists, "--out": tmp_path / "out"}
        flags |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
        refused(monkeypatch, capfd, {f: v for f, v in flags.items() if v != ""}, message, prepare)

    return refuse


READABLE = [name for name, want in ORACLE.items() if want.get("decoded_frames")]


@pytest.mark.parametrize("name", READABLE)
def test_prepared_frames_are_the_sources(clips, tmp_path, name):
    """All of them, upright, scaled down as torchvision does, and nothing lost but what one JPEG loses."""
    source, target = clips / name, tmp_path / "a.mov"
    convert(str(source), target, Settings())
    frames = probe(source).frames
    assert probe(target).frames == frames
    indices = range(0, frames, max(1, frames // 8))
    for frame, found in zip(decode_frames(source, indices), decode_frames(target, indices), strict=True):
        frame = scaled_down(frame, 256)
        assert min(found.shape[:2]) <= 256
        once = io.BytesIO()
        Image.fromarray(frame).save(once, "JPEG", quality=90)
        assert numpy.array_equal(found, numpy.asarray(Image.open(once)))
        assert numpy.abs(found.astype(int) - frame).mean() < 4


def test_any_player_reads_it(tiny_demo, tmp_path):
    source = next(tiny_demo[0].glob("*/*.avi"))
    convert(str(source), tmp_path / "a.mov", Settings())
    with av.open(str(tmp_path / "a.mov")) as container:
        assert container.format.name.startswith("mov") and len(container.streams) == 1
        assert container.streams.video[0].average_rate == 30
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    difference = numpy.abs(numpy.array(frames, int) - decode_frames(tmp_path / "a.mov", range(10)))
    assert difference.mean() < 3  # FFmpeg and libjpeg-turbo enlarge the colour planes in different ways


def test_every_frame_is_a_jpeg_of_the_quality(tiny_demo, tmp_path):
    source = next(tiny_demo[0].glob("*/*.avi"))
    sizes = {}
    for quality in (50, 90):
        convert(str(source), tmp_path / f"{quality}.mov", Settings(quality=quality))
        with av.open(str(tmp_path / f"{quality}.mov")) as container:
            packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        for packet, frame in zip(packets, decode_frames(source, range(10)), strict=True):
            own = io.BytesIO()
            Image.fromarray(frame).save(own, "JPEG", quality=quality)
            assert Image.open(io.BytesIO(packet)).quantization == Image.open(own).quantization
        sizes[quality] = sum(map(len, packets))
    assert sizes[50] < sizes[90]


def test_fewer_frames_a_second(tiny_demo, tmp_path):
    source = next(tiny_demo[0].glob("*/*.avi"))  # 30 frames a second
    convert(str(source), tmp_path / "a.mov", Settings(limit_fps=12))
    assert (probe(tmp_path / "a.mov").frames, probe(tmp_path / "a.mov").fps) == (4, 12)
    convert(str(source), tmp_path / "b.mov", Settings(limit_fps=60))
    assert probe(tmp_path / "b.mov").frames == 10
    want = decode_frames(tmp_path / "b.mov", [0, 3, 5, 8])  # the first at or after 0, 2.5, 5 and 7.5
    assert numpy.array_equal(decode_frames(tmp_path / "a.mov", range(4)), want)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.mov", "mjpeg")])
def test_fewer_frames_a_second_go_by_timestamps(tmp_path, name, codec):
    """10 frames a second for 2 s, then 30, a pause of 5 s, and 60."""
    times = [Fraction(n, 10) for n in range(20)] + [2 + Fraction(n, 30) for n in range(45)]
    times += [Fraction(17, 2) + Fraction(n, 60) for n in range(30)]
    path = write_timed(tmp_path / name, times, codec)
    assert probe(path).frames == len(times) == 95
    convert(str(path), tmp_path / "out.mov", Settings(limit_fps=10))
    kept = [times[number_of(frame)] for frame in every_frame(tmp_path / "out.mov")]
    seconds = [sum(begin <= time < begin + 1 for time in kept) for begin in (0, 1, 2, Fraction(17, 2))]
    assert seconds == [10, 10, 10, 5] and len(kept) == 40


@pytest.mark.parametrize(
    ("timestamps", "limit", "want"),
    [
        ([Fraction(n, 30) for n in range(10)], 12, [0, 3, 5, 8]),
        ([Fraction(n, 30) for n in range(10)], 30, list(range(10))),
        ([None] * 10, 12, [0, 3, 5, 8]),  # the average rate, 30
        ([Fraction(round(1000 * n / 24), 1000) for n in range(10)], 12, [0, 2, 4, 6, 8]),  # rounded to milliseconds
        ([Fraction(n, 15) for n in (0, 0, 1, 1, 2, 2, 3, 3)], 15, [0, 2, 4, 6]),  # packed B-frames repeat timestamps
        ([Fraction(n, 30) for n in (100, 101, 102, 103, 0, 1, 2, 3)], 15, [0, 2, 4, 6]),  # timestamps that start anew
        ([Fraction(n, 30) for n in (0, 300, 301, 302)], 15, [0, 1, 3]),  # a pause does not save up frames
    ],
)
def test_at_most_so_many_frames(timestamps, limit, want):
    frames = [(timestamp, number) for number, timestamp in enumerate(timestamps)]
    assert [number for _, number in prepare.at_most(frames, Fraction(limit), Fraction(30))] == want


def test_the_same_lists_find_the_prepared_files(run, tiny_lists, tmp_path, capfd):
    run()
    out = tmp_path / "out"
    found = {}
    for root in (tiny_lists["--train-list"].parent, out):
        lists = [VideoList(part, tiny_lists[f"--{part}-list"], root) for part in ("train", "val")]
        split = read_lists(*lists)
        found[root] = [(r.name, r.label, r.group) for r in split.train + split.test]
        assert not split.missing
    assert len(set(map(tuple, found.values()))) == 1
    assert "24 videos of" in capfd.readouterr().out
    manifest = json.loads((out / "prepared.json").read_text())
    assert manifest["complete"] and (manifest["videos"], manifest["frames"]) == (32, 320)
    files = list(out.rglob("*.mov"))
    assert manifest["bytes"] == sum(path.stat().st_size for path in files) and len(files) == 32
    assert set(os.listdir(out)) == {"videos", "prepared.json"}


def test_hmdb51s_layout_finds_them(tiny_demo, tmp_path, monkeypatch, capfd):
    data_root = tiny_demo[0]
    annotations = shutil.copytree(tiny_demo[1], tmp_path / "splits")
    for file in list(annotations.iterdir()):
        for split in "23":  # the official data set has three splits
            shutil.copy(file, str(file).replace("split1", f"split{split}"))
    flags = {"--dset": "hmdb51", "--data-root": data_root, "--annotation-path": annotations, "--out": tmp_path / "out"}
    assert run_here(monkeypatch, capfd, flags, prepare)[0] == 0
    before, after = (read_hmdb51(root, annotations, 2) for root in (data_root, tmp_path / "out"))
    assert [(r.name, r.label, r.group) for r in after.train] == [(r.name, r.label, r.group) for r in before.train]
    assert all(record.path.endswith(".mov") for record in after.train + after.test)
    assert not after.missing and not after.unlisted
    assert "on disk with another extension than listed" in capfd.readouterr().out


def test_a_second_start_does_what_is_missing(run, tmp_path, monkeypatch):
    run()
    before = content(tmp_path / "out")
    first, second, third = sorted((tmp_path / "out").rglob("*.mov"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    third.with_name(f".{third.name}.tmp").write_bytes(b"half")
    converted = []
    original = prepare.convert
    marker = tmp_path / "converted"

    def noted(source, target, settings):
        with open(marker, "a") as file:
            file.write(f"{target}\n")
        return original(source, target, settings)

    monkeypatch.setattr(prepare, "convert", noted)
    run()
    converted = marker.read_text().splitlines()
    assert sorted(converted) == [str(first), str(second)] and content(tmp_path / "out") == before


# ---- shards: jobs of an array ------------------------------------------------------------------------


@pytest.fixture
def some_broken(tiny_lists, tmp_path) -> dict:
    """Lists of 32 videos, of which two are broken and one is gone."""
    folder = shutil.copytree(tiny_lists["--train-list"].parent, tmp_path / "data")
    for broken in sorted((folder / "videos").rglob("*.avi"))[5:25:15]:
        broken.write_bytes(b"no video")
    max((folder / "videos").rglob("*.avi")).unlink()
    return {"train_list": folder / "train.txt", "val_list": folder / "val.txt"}


def without_shards(folder) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if not name.startswith(".shards/")}


def test_shards_in_any_order_leave_the_folder_of_one_process(run, some_broken, tmp_path):
    run(out=tmp_path / "whole", **some_broken)
    out = [run(shard=f"{number}/3", **some_broken) for number in (2, 3, 1)]
    assert without_shards(tmp_path / "out") == content(tmp_path / "whole")
    assert "31 videos, 1 listed" in out[0] and "of them in shard 2 of 3" in out[0]
    assert "not done, or done with other videos: 1, 3. The last one writes" in out[0]
    assert "shard 3 of 3 is done" in out[1] and "other videos: 1. The" in out[1]
    assert "29 videos, 290 frames" in out[2] and "2 videos cannot be read" in out[2]


def test_a_shard_converts_its_own_videos_alone(run, tmp_path):
    run(shard="1/4")
    here = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.mov")}
    assert 0 < len(here) < 16 and all(Shard(1, 4).has(name) for name in here)
    assert not json.loads((tmp_path / "out" / "prepared.json").read_text())["complete"]


def test_a_shard_leaves_what_another_is_writing(run, tmp_path):
    run(shard="1/2")
    names = [path.with_name(f".{path.name}.tmp") for path in (tmp_path / "out").rglob("*.mov")]
    own, another = names[0], names[0].with_name(".another.mov.tmp")
    for partial in (own, another):
        partial.write_bytes(b"half")
    run(shard="1/2")
    assert not own.exists() and another.exists()


def test_a_shard_that_was_stopped_is_started_again(run, tiny_lists, tmp_path, monkeypatch, capfd):
    run(out=tmp_path / "whole")
    run(shard="1/2")
    flags = {**tiny_lists, "--out": tmp_path / "out", "--jobs": 1, "--shard": "2/2"}
    with full_disk(9_000):
        refused(monkeypatch, capfd, flags, r"cannot be written \(File too large\)", prepare)
    assert not json.loads((tmp_path / "out" / "prepared.json").read_text())["complete"]
    run(shard="2/2")
    assert without_shards(tmp_path / "out") == content(tmp_path / "whole")


def test_a_shard_that_is_started_once_more_mends_its_files(run, tmp_path):
    for number in (1, 2):
        run(shard=f"{number}/2")
    before = content(tmp_path / "out")
    damaged = next(path for path in sorted((tmp_path / "out").rglob("*.mov")) if Shard(1, 2).has(
        str(path.relative_to(tmp_path / "out"))))  # fmt: skip
    damaged.write_bytes(damaged.read_bytes()[:-20])
    run(shard="1/2")
    assert content(tmp_path / "out") == before


def test_shards_of_other_videos_do_not_count(run, tmp_path):
    """One list, then the other, in as many shards: each is complete only after all of its own shards."""
    for number in (1, 2):
        run(shard=f"{number}/2", val_list="")
    out = run(shard="1/2", train_list="")
    assert "other videos: 2. The" in out
    manifest = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert not manifest["complete"] and len(manifest["files"]) == 24
    run(shard="2/2", train_list="")
    manifest = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert manifest["complete"] and manifest["videos"] == 32


def test_shards_share_a_folder_and_the_same_shard_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.lock._SECONDS_FOR_ANOTHER_TO_LEAVE", 0)
    folder, message = tmp_path / "out", r"another process is writing to it"
    for shard in ("1-of-2", "2-of-2"):
        (folder / shard).mkdir(parents=True)
    with prepare.locked(folder, shared=True), prepare.locked(folder / "1-of-2"):
        with prepare.locked(folder, shared=True), prepare.locked(folder / "2-of-2"):
            pass
        with pytest.raises(UserError, match=message), prepare.locked(folder / "1-of-2"):
            pass
        with pytest.raises(UserError, match=message), prepare.locked(folder):
            pass
    with prepare.locked(folder), pytest.raises(UserError, match=message), prepare.locked(folder, shared=True):
        pass


def test_a_shard_may_have_no_video(run, tiny_lists, tmp_path):
    (tmp_path / "list.txt").write_text(tiny_lists["--train-list"].read_text().splitlines()[0])
    lists = {"train_list": tmp_path / "list.txt", "val_list": "", "train_root": tiny_lists["--train-list"].parent}
    for more in ({"dry_run": None}, {}):
        out = [run(shard=f"{number}/3", **lists, **more) for number in (1, 2, 3)]
        assert sum("0 of them in shard" in text for text in out) == 2
    assert "prepare: 1 videos, 10 frames" in out[-1]


def test_what_cannot_be_sharded(refuse, run, tmp_path):
    refuse(r"--shard must be such as 3/16, the third of 16, from 1/16 to 16/16, got 0/2", shard="0/2")
    refuse(r"--shard: demo is generated by one process", shard="1/2", dset="demo", train_list="", val_list="")
    run(shard="1/2", quality=80)
    refuse(r"out: was prepared with quality 80, not 90", shard="2/2")


def test_verify_full_finds_a_damaged_frame(run, tmp_path):
    run()
    before = content(tmp_path / "out")
    path = min((tmp_path / "out").rglob("*.mov"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run()
    assert content(tmp_path / "out") != before
    run(verify="full")
    assert content(tmp_path / "out") == before


def test_other_settings_are_refused_by_name(run, refuse, tmp_path):
    run(quality=80)
    refuse(r"out: was prepared with quality 80, not 90")
    refuse(r"out: was prepared with short side 256, not 128", quality=80, short_side=128)
    (tmp_path / "out" / "prepared.json").write_text("[]")
    refuse(r"prepared\.json: is not a manifest")


def test_folders_and_flags_that_cannot_work(refuse, tiny_lists, tmp_path):
    folder = tiny_lists["--train-list"].parent
    refuse(r"--out .*: holds other files and no prepared\.json", out=folder)
    refuse(r"--quality must be 1 to 100, got 0", quality=0)
    refuse(r"--short-side must be at least 16", short_side=0)
    refuse(r"--limit-fps must be", limit_fps="nan")
    refuse(r"--jobs must be at least 1", jobs=0)
    refuse(r"needs at least one", train_list="", val_list="")
    refuse(r"--train-list: --dset hmdb51 has no lists", dset="hmdb51")
    outside = tmp_path / "lists"
    outside.mkdir()
    video = next(folder.glob("videos/*/*.avi"))
    (outside / "a.txt").write_text(f"{video} 0\n")
    refuse(r"lies outside of", train_list=outside / "a.txt", val_list="")
    shutil.copy(video, outside / "x.avi")
    shutil.copy(video, outside / "x.mp4")
    (outside / "a.txt").write_text("x.avi 0\nx.mp4 1\n")
    refuse(r"x\.avi and .*x\.mp4 would both become .*x\.mov", train_list=outside / "a.txt", val_list="")


def test_broken_videos_are_named_and_the_rest_goes_on(tiny_lists, tmp_path, run, refuse):
    folder = tmp_path / "data"
    shutil.copytree(tiny_lists["--train-list"].parent, folder)
    broken, gone = sorted((folder / "videos").rglob("*.avi"))[:2]
    broken.write_bytes(b"no video")
    gone.unlink()
    lists = {"train_list": folder / "train.txt", "val_list": folder / "val.txt"}
    out = run(**lists)
    assert "1 videos cannot be read" in out and "1 listed videos are not on disk" in out
    (line,) = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert line.startswith(f"{broken}: not a")
    assert (tmp_path / "out" / "missing.txt").read_text() == f"{gone}\n"
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["videos"] == 30
    refuse(rf"--strict: {broken}: not a", strict=None, **lists)


def test_a_full_disk_ends_it_with_one_line(tiny_lists, tmp_path, monkeypatch, capfd):
    with full_disk(9_000):
        message = r"cannot be written \(File too large\); 0 videos are done"
        refused(monkeypatch, capfd, {**tiny_lists, "--out": tmp_path / "out", "--jobs": 1}, message, prepare)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["prepared.json"]


def test_dry_run_predicts_and_writes_nothing(run, tmp_path):
    out = run(dry_run=None)
    assert "from 16 videos: about 0.00 GB" in out and "minutes with --jobs 2" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_half_written(clips, tmp_path, number):
    (tmp_path / "list.txt").write_text(
        "".join(f"{path.name} 0\n" for path in sorted((clips / "kinetics400").iterdir()))
    )
    flags = {"--dset": "list", "--train-list": tmp_path / "list.txt", "--data-root": clips / "kinetics400"}
    process = start(command_line(flags), tmp_path / "out")
    wait_for_work(process, tmp_path / "out")
    process.send_signal(number)
    out = process.communicate(timeout=20)[0]
    assert process.returncode in (130, 143) and "Traceback" not in out, out
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "prepared.json"]
    assert all(probe(path).frames > 200 for path in left) and len(left) < 6


def test_killed_and_started_again(tiny_lists, tmp_path):
    """tests/helpers/kill_prepare.py does this ten times on real clips (benchmarks/RESULTS.md)."""
    kills_leave_the_same_folder([*command_line(tiny_lists), "--jobs", "2"], tmp_path, kills=2, seed=0)


def test_damaged_files_give_frames_or_a_line(tiny_demo, tmp_path):
    """tests/helpers/damaged_files.py does this with 200 copies of a real clip (benchmarks/RESULTS.md)."""
    convert(str(next(tiny_demo[0].glob("*/*.avi"))), tmp_path / "whole.mov", Settings())
    found = verdicts(tmp_path, tmp_path / "whole.mov", files=70, seed=0)
    assert len(found) == 70 and not [result for result in found if result[1].startswith("WRONG")]


def test_what_cannot_be_decoded_is_no_fault_of_the_disk(tmp_path):
    (tmp_path / "a.avi").write_bytes(b"no video")
    with pytest.raises(VideoError):
        convert(str(tmp_path / "a.avi"), tmp_path / "b.mov", Settings())
    assert os.listdir(tmp_path) == ["a.avi"]


@pytest.mark.parametrize("name, kind, videos", [("demo", "motion", (24, 8)), ("demo-binding", "binding", (12, 4))])
def test_a_demos_prepared_folder_is_a_demo_data_set(tmp_path, monkeypatch, capfd, name, kind, videos):
    settings = DemoSettings(train_videos_per_class=3, test_videos_per_class=1, frames=10, side_pixels=40, kind=kind)
    monkeypatch.setitem(DEMOS, name, settings)
    flags = {"--dset": name, "--data-root": tmp_path / "demo", "--out": tmp_path / "out"}
    for _ in range(2):  # the second start finds everything
        status, _, err = run_here(monkeypatch, capfd, flags, prepare)
        assert status == 0, err
    data_root, annotations = generate_demo(tmp_path / "out", settings, workers=1)
    split = read_hmdb51(data_root, annotations, 1)
    assert (len(split.train), len(split.test), split.missing) == (*videos, [])
    assert all(record.path.endswith(".mov") for record in split.train + split.test)
