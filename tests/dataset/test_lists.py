"""List files of every form that Kinetics is handed around in."""

from pathlib import Path

import pytest

from dataset.lists import VideoList, read_label_map, read_lists
from utils.errors import UserError

FILES = ["abseiling/a b.mp4", "abseiling/c.mkv", "air drumming/d_000010_000020.mp4", "e.webm", "f 12.avi", "g.AVI"]


@pytest.fixture
def root(tmp_path) -> Path:
    for name in FILES:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(b"")
    return tmp_path / "videos"


def read(root, train: str, val: str = "e.webm 0", **more):
    parts = []
    for part, text in (("train", train), ("val", val)):
        (root.parent / f"{part}.txt").write_text(text)
        parts.append(VideoList(part, root.parent / f"{part}.txt", root))
    return read_lists(*parts, **more)


def found(split, root) -> list[tuple[str, int]]:
    return [(str(Path(record.path).relative_to(root)), record.label) for record in split.train]


def test_path_label(root):
    split = read(root, "abseiling/a b.mp4 3\nabseiling/c.mkv 0\n\ngone/x.mp4 1\n")
    assert found(split, root) == [("abseiling/a b.mp4", 3), ("abseiling/c.mkv", 0)]
    assert split.classes == ["0", "1", "2", "3"] and split.missing == [str(root / "gone/x.mp4")]
    assert [record.label for record in split.test] == [0]


def test_path_frames_label(root):
    split = read(root, "abseiling/a b.mp4 300 3\nf 12.avi 250 0\n")
    assert found(split, root) == [("abseiling/a b.mp4", 3), ("f 12.avi", 0)]


def test_a_name_that_ends_in_a_number(root):
    """`f 12 5` is `f 12` with label 5 where the disk says so, else 12 frames of `f`."""
    assert found(read(root, "f 12 5\n"), root) == [("f 12.avi", 5)]
    (root / "f 12.avi").rename(root / "f.avi")
    assert found(read(root, "f 12 5\n"), root) == [("f.avi", 5)]


@pytest.mark.parametrize("line", ["abseiling/c 2", "abseiling/c.mp4 2", "abseiling/c 300 2", "abseiling/c.webm 2"])
def test_the_extension_is_found_on_disk(root, capsys, line):
    assert found(read(root, line), root) == [("abseiling/c.mkv", 2)]
    assert ("another extension" in capsys.readouterr().out) == ("." in line)


def test_both_forms_in_one_list(root):
    assert found(read(root, "e.webm 9 0\nf 12.avi 9 1\nabseiling/c.mkv 2\ng.AVI 300 2\n"), root) == [
        ("e.webm", 0), ("f 12.avi", 1), ("abseiling/c.mkv", 2), ("g.AVI", 2),
    ]  # fmt: skip


def test_commas_and_tabs(root):
    assert found(read(root, "abseiling/a b.mp4, 300, 3\ne.webm,250,0\n"), root)[0] == ("abseiling/a b.mp4", 3)
    assert found(read(root, "abseiling/a b.mp4, 3\ne.webm, 0\n"), root)[0] == ("abseiling/a b.mp4", 3)
    assert found(read(root, "abseiling/a b.mp4,3\ne.webm,0\n"), root) == [("abseiling/a b.mp4", 3), ("e.webm", 0)]
    assert found(read(root, "abseiling/a b.mp4\t3\ne.webm\t0\n"), root)[0] == ("abseiling/a b.mp4", 3)


def test_absolute_paths(root):
    assert found(read(root, f"{root}/e.webm 1\n"), root) == [("e.webm", 1)]


OFFICIAL = """label,youtube_id,time_start,time_end,split
"air drumming",d,10,20,train
abseiling,c,7,17,train
abseiling,nothere,7,17,train
"""


def test_the_official_csv(root):
    (root / "abseiling/g_000001_000011.mp4").write_bytes(b"")
    val = "label,youtube_id,time_start,time_end,split\nzumba,e,0,10,val\nabseiling,g,1,11,val\n"
    split = read(root, OFFICIAL, val)
    assert split.classes == ["abseiling", "air drumming", "zumba"]
    assert found(split, root) == [("air drumming/d_000010_000020.mp4", 1), ("abseiling/c.mkv", 0)]
    assert [Path(record.path).name for record in split.test] == ["e.webm", "g_000001_000011.mp4"]
    assert split.missing == [str(root / "abseiling/nothere_000007_000017")]


def test_classes_follow_the_label_map(root):
    labels = root.parent / "labels.txt"
    labels.write_text("abseiling\nair drumming\nanswering questions\nzumba\n")
    split = read(root, OFFICIAL, class_names=read_label_map(labels))
    assert len(split.classes) == 4 and [label for _, label in found(split, root)] == [1, 0]
    assert read(root, "e.webm 3", class_names=read_label_map(labels)).classes[3] == "zumba"
    assert len(read(root, "e.webm 3", num_classes=400).classes) == 400


BAD = {
    "no label": ("e.webm 0\ne.webm\n", {}, r"train\.txt:2: expected `path label` or.*found `e.webm`"),
    "negative": ("e.webm -1\n", {}, r"train\.txt:1: expected"),
    "empty": ("\n\n", {}, r"names no video"),
    "nothing there": ("x/y.mp4 0\n", {}, r"none of its 1 videos is under .*expected such as x/y\.mp4"),
    "label too large": ("e.webm 7\n", {"num_classes": 5}, r"train\.txt:1: label 7, but there are 5 classes"),
    "csv quote": (OFFICIAL + 'a,"b,1,2,x\n', {}, r"train\.txt:5: expected label,youtube_id"),
    "csv infinity": (OFFICIAL + "a,b,inf,2,x\n", {}, r"train\.txt:5: expected label,youtube_id"),
    "csv columns": ("label,youtube_id\nx,y\n", {}, r"train\.txt:1: expected a column time_start"),
    "csv number": ("label,youtube_id,time_start,time_end\nx,y,soon,2\n", {}, r"train\.txt:2: expected .*`x,y,soon,2`"),
    "names and numbers": (OFFICIAL, {}, r"one names its classes, the other numbers"),
}  # fmt: skip


@pytest.mark.parametrize("text, more, message", BAD.values(), ids=BAD.keys())
def test_what_is_refused(root, text, more, message):
    with pytest.raises(UserError, match=message) as caught:
        read(root, text, **more)
    assert "\n" not in str(caught.value)


def test_absent_lists_and_folders(root, tmp_path):
    here = VideoList("train", tmp_path / "no.txt", root)
    with pytest.raises(UserError, match=r"no\.txt: no such file"):
        read_lists(here, here)
    (tmp_path / "l.txt").write_text("e.webm 0")
    there = VideoList("val", tmp_path / "l.txt", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        read_lists(there, there)
    with pytest.raises(UserError, match=r"cannot be read"):
        read_label_map(tmp_path / "no_map.txt")


def test_a_label_map_that_lacks_a_class(root, tmp_path):
    (tmp_path / "map.txt").write_text("abseiling\nzumba\n")
    with pytest.raises(UserError, match=r"train\.txt:2: class `air drumming` is not in the label map"):
        read(root, OFFICIAL, class_names=read_label_map(tmp_path / "map.txt"))
    with pytest.raises(UserError, match=r"3: the label map has 2 classes"):
        read(root, "e.webm 0", class_names=read_label_map(tmp_path / "map.txt"), num_classes=3)


def test_videos_on_both_lists_are_told(root, capsys):
    read(root, "e.webm 0\n")
    assert "1 videos are both trained and tested on" in capsys.readouterr().out


def test_the_official_lists(splits, clips):
    """Labels of the Kinetics-400 validation list against its label map."""
    lists = splits / "kinetics400"
    names = read_label_map(lists / "label_map_k400.txt")
    assert len(names) == 400
    for line in (lists / "kinetics400_val_list_videos.txt").read_text().splitlines()[::97]:
        path, label = line.rsplit(maxsplit=1)
        assert path.split("/")[0].replace("_", " ") == names[int(label)].replace("_", " ")


def test_only_a_list_to_test_on(root, tmp_path):
    (tmp_path / "val.txt").write_text("e.webm 2")
    split = read_lists(None, VideoList("val", tmp_path / "val.txt", root), class_names=list("abcd"))
    assert split.train == [] and split.test[0].label == 2 and split.classes == list("abcd")
