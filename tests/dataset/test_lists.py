"""List files of every form that Kinetics is handed around in."""

import unicodedata
from pathlib import Path

import pytest

from dataset.index import VideoIndex
from dataset.label_map import read_label_map
from dataset.lists import VideoList, read_lists
from tests.helpers.script import without_privileges
from utils.errors import UserError

FILES = ["abseiling/a b.mp4", "abseiling/c.mkv", "air drumming/d_000010_000020.mp4", "e.webm", "f 12.avi", "g.AVI"]


@pytest.fixture
def root(tmp_path) -> Path:
    for name in FILES:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(b"")
    return tmp_path / "videos"


def read(root, train: str | bytes, val: str = "e.webm 0", **more):
    parts = []
    for part, text in (("train", train), ("val", val)):
        (root.parent / f"{part}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
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


@pytest.mark.parametrize(
    "name", ["z.ogv", "z.mts", "z.m2ts", "z.vob", "z.qt", "z.asf", "z.f4v", "z", "z.MTS", "z.strange", "z.mp4.part"]
)
def test_a_file_that_is_named_is_found_whatever_its_name(root, name):
    (root / name).write_bytes(b"")
    assert found(read(root, f"{name} 1\n"), root) == [(name, 1)]
    assert found(read(root, f"{name} 300 1\n"), root) == [(name, 1)]


def test_a_folder_is_no_video(root):
    """Extracted frames lie beside their video, in a folder of its name."""
    (root / "abseiling/c").mkdir()
    (root / "abseiling/d.mp4").mkdir()
    split = read(root, "abseiling/c 0\nabseiling/d.mp4 1\n")
    assert found(split, root) == [("abseiling/c.mkv", 0)] and split.missing == [str(root / "abseiling/d.mp4")]


def test_links_are_followed(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/v.mp4").write_bytes(b"")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "l.mp4").symlink_to(tmp_path / "elsewhere/v.mp4")
    (root / "loop").symlink_to(root)
    lines = "linked/v.mp4 0\nl.mp4 1\nloop/loop/e.webm 2\n"
    assert found(read(root, lines), root) == [("linked/v.mp4", 0), ("l.mp4", 1), ("loop/loop/e.webm", 2)]


@pytest.mark.parametrize("mode, is_read", [(0o000, False), (0o111, True)], ids=["locked", "may be passed through"])
def test_a_folder_without_permission_is_no_missing_video(open_folder, tiny_demo, mode, is_read):
    """Reading its videos tells why they cannot be read. If names in it may be opened, only not listed, they are."""
    source = next(tiny_demo[0].glob("*/*.avi"))
    folder = open_folder / "videos"
    for name in ("a/x.avi", "b/y.avi"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(source.read_bytes())
    (open_folder / "list.txt").write_text("a/x.avi 0\nb/y.avi 1\nb/gone.avi 1\n")
    (folder / "b").chmod(mode)
    try:
        with without_privileges():
            split = read_lists(None, VideoList("val", open_folder / "list.txt", folder))
            infos = VideoIndex(None).lookup([record.path for record in split.test], workers=1)
    finally:
        (folder / "b").chmod(0o755)
    names = ["a/x.avi", "b/y.avi"] if is_read else ["a/x.avi", "b/y.avi", "b/gone.avi"]
    assert [record.name for record in split.test] == names and len(split.missing) == is_read
    errors = [info.error for info in infos.values() if info.error]
    assert errors == ([] if is_read else [f"{folder}/{name}: cannot be read (Permission denied)" for name in names[1:]])


def test_lists_and_roots_without_permission_are_one_line(open_folder):
    locked = open_folder / "locked"
    (locked / "videos").mkdir(parents=True)
    for file in (locked / "list.txt", open_folder / "list.txt"):
        file.write_text("a.mp4 0\n")
    locked.chmod(0)
    try:
        with without_privileges():
            for file in (locked / "list.txt", open_folder / "list.txt"):
                with pytest.raises(UserError, match=r"locked/\w+(\.txt)?: cannot be read \(Permission denied\)"):
                    read_lists(None, VideoList("val", file, locked / "videos"))
    finally:
        locked.chmod(0o755)


SPELLINGS = {
    "backslashes": ("abseiling\\c.mkv 1", "abseiling/c.mkv"),
    "quotes": ('"abseiling/a b.mp4",1', "abseiling/a b.mp4"),
    "quotes and frames": ('"abseiling/a b.mp4" 300 1', "abseiling/a b.mp4"),
    "semicolons": ("abseiling/c.mkv;1", "abseiling/c.mkv"),
    "a step": ("./abseiling/c.mkv 1", "abseiling/c.mkv"),
    "accents of macOS": (unicodedata.normalize("NFD", "schön/ö.mp4") + " 1", "schön/ö.mp4"),
}


@pytest.mark.parametrize("line, name", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_other_systems_spell_names_in_another_way(root, line, name):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"")
    assert found(read(root, line), root) == [(name, 1)]


def test_a_name_that_looks_like_another_spelling_comes_first(root):
    for name in ('"q".mp4', "back\\slash.mp4", "back/slash.mp4"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
    names = [('"q".mp4', 0), ("back\\slash.mp4", 1)]
    assert found(read(root, "".join(f"{name} {label}\n" for name, label in names)), root) == names


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\x0c", "\x0b"])
def test_names_with_characters_that_end_lines_elsewhere(root, character):
    name = f"a{character}b.mp4"
    (root / name).write_bytes(b"")
    assert found(read(root, f"{name} 1\ne.webm 0\n"), root) == [(name, 1), ("e.webm", 0)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "cp1252"])
def test_lists_in_other_encodings(root, encoding):
    (root / "ü.mp4").write_bytes(b"")
    assert found(read(root, "ü.mp4 1\r\ne.webm 0\r\n".encode(encoding)), root) == [("ü.mp4", 1), ("e.webm", 0)]


def test_comments_are_no_videos(root, capsys):
    (root / "#1 goal.mp4").write_bytes(b"")
    split = read(root, "# total 250\n#\n# total 240000\n# made by hand: 12345678901\ne.webm 0\n#1 goal.mp4 1\n")
    assert found(split, root) == [("e.webm", 0), ("#1 goal.mp4", 1)] and split.classes == ["0", "1"]
    assert not split.missing
    assert "4 lines that begin with # and name no file are taken for comments, the first: line 1" in (
        capsys.readouterr().out
    )


def test_a_video_that_is_listed_twice_is_told(root, capsys):
    split = read(root, f"e.webm 0\nabseiling/c.mkv 1\nabseiling/c 1\n./abseiling/c.mkv 1\n{root}/abseiling/c.mkv 1\n")
    assert len(split.train) == 5
    assert f"lists 1 videos more than once, and each line counts; the first: {root}/abseiling/c.mkv\n" in (
        capsys.readouterr().out
    )


def test_a_video_with_two_labels_is_told(root, capsys):
    read(root, "abseiling/c.mkv 0\ne.webm 2\nabseiling/c.mkv 2\nabseiling/c.mkv 0\n", "g.AVI 1\n")
    out = capsys.readouterr().out
    assert "train.txt lists 1 videos with more than one label, and each line counts" in out
    assert f"the first: {root}/abseiling/c.mkv (0, 2)\n" in out and "more than once" not in out
    read(root, "e.webm 1\ng.AVI 0\n", "e.webm 0\ng.AVI 0\n")
    assert "2 videos are both trained and tested on, 1 of them with another label" in capsys.readouterr().out


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


QUOTED = '"label","youtube_id","time_start","time_end","split"\n"air drumming","d",10,20,"train"\n'
DIALECTS = {
    "quoted": QUOTED,
    "tabs": "label\tyoutube_id\ttime_start\ttime_end\tsplit\nair drumming\td\t10\t20\ttrain\n",
    "tabs, a cell empty at the end": "label\tyoutube_id\ttime_start\ttime_end\tsplit\nair drumming\td\t10\t20\t\n",
    "semicolons": QUOTED.replace(",", ";"),
    "with the rows numbered, as pandas does": QUOTED.replace('"label"', ',"label"').replace('"air', '0,"air'),
    "spaces": "label, youtube_id, time_start, time_end\nair drumming, d, 10, 20\n",
    "capitals": QUOTED.replace("label", "Label").replace("youtube_id", "YouTube_ID"),
    "comments above": "# from the site\n# 250 videos\n" + QUOTED,
    "spaces behind": QUOTED.replace("air drumming", "air drumming "),
    "Windows": "\ufeff" + QUOTED.replace("\n", "\r\n"),
    "paths and names": 'path,label\n"air drumming/d_000010_000020.mp4",air drumming\n',
    "names and paths": "label\tfilename\nair drumming\tair drumming/d_000010_000020.mp4\n",
}


@pytest.mark.parametrize("text", DIALECTS.values(), ids=DIALECTS.keys())
def test_dialects_of_csv(root, text):
    split = read(root, text, 'label,path\nair drumming,"e.webm"\n')
    assert found(split, root) == [("air drumming/d_000010_000020.mp4", 0)] and split.classes == ["air drumming"]


def test_a_table_of_paths_and_numbers(root):
    (root / "a, b.mp4").write_bytes(b"")
    split = read(root, 'path,label\n"a, b.mp4",3\nabseiling/a b.mp4,1.0\n')
    assert found(split, root) == [("a, b.mp4", 3), ("abseiling/a b.mp4", 1)] and len(split.classes) == 4


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
    "an empty class": (OFFICIAL + ",c,7,17,train\n", {}, r"train\.txt:5: expected label and .*, found an empty cell"),
    "a header alone": (OFFICIAL.split("\n")[0], {}, r"train\.txt: names no video"),
    "an empty cell": ("path,label\ne.webm,\n", {}, r"train\.txt:2: expected path and label, found an empty cell"),
    "comments alone": ("# a\n# b 3\n", {}, r"train\.txt: names no video"),
    "an unknown header": ("url,class\ne.webm,0\n", {}, r"train\.txt:1: expected `path label`.*found `url,class`"),
    "one long line": ("x" * 200_000, {}, r"train\.txt:1: expected `path label`"),
    "names and numbers": (OFFICIAL, {}, r"one names its classes, the other numbers"),
}  # fmt: skip


@pytest.mark.parametrize("text, more, message", BAD.values(), ids=BAD.keys())
def test_what_is_refused(root, text, more, message):
    with pytest.raises(UserError, match=message) as caught:
        read(root, text, **more)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_absent_lists_and_folders(root, tmp_path):
    here = VideoList("train", tmp_path / "no.txt", root)
    with pytest.raises(UserError, match=r"no\.txt: no such file"):
        read_lists(here, here)
    (tmp_path / "l.txt").write_text("e.webm 0")
    there = VideoList("val", tmp_path / "l.txt", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        read_lists(there, there)
    with pytest.raises(UserError, match=r"no_map\.txt: no such file; expected a class name a line"):
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
