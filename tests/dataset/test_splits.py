import pytest

from dataset.splits import cut_validation, drop, read_hmdb51, read_ucf101
from tests.helpers.script import without_privileges
from utils.errors import UserError


def make_hmdb51(root, lists: dict[str, dict[str, int]], on_disk: list[str], split=1):
    for name, files in lists.items():
        lines = "".join(f"{file} {part} \n" for file, part in files.items())
        (root / "splits").mkdir(exist_ok=True, parents=True)
        (root / "splits" / f"{name}_test_split{split}.txt").write_text(lines)
    for file in on_disk:
        path = root / "videos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root / "videos", root / "splits"


def test_hmdb51_layout(tmp_path):
    data = make_hmdb51(
        tmp_path,
        {
            "draw_sword": {"A_Film_draw_sword_f_nm_np1_fr_med_1.avi": 1},
            "sword": {"A_Film_sword_f_nm_np1_fr_med_0.avi": 2, "B (1)_sword_x_0.avi": 0, "gone.avi": 1},
        },
        ["draw_sword/A_Film_draw_sword_f_nm_np1_fr_med_1.avi", "sword/A_Film_sword_f_nm_np1_fr_med_0.avi",
         "sword/B (1)_sword_x_0.avi", "sword/extra.avi", "sword/notes.txt"],
    )  # fmt: skip
    split = read_hmdb51(*data, split=1)
    assert split.classes == ["draw_sword", "sword"] and split.classes_on_disk() == 2
    assert [(r.label, r.group) for r in split.train] == [(0, "A_Film")]
    assert [(r.label, r.group) for r in split.test] == [(1, "A_Film")]
    assert split.missing == ["sword/gone.avi"] and split.unlisted == ["sword/extra.avi"]


def test_ucf101_layout(tmp_path):
    for name in ("Archery/v_Archery_g08_c01.avi", "Archery/v_Archery_g08_c02.avi", "Biking/v_Biking_g01_c01.avi"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "classInd.txt").write_bytes(b"1 Archery\r\n2 Biking\r\n")
    (tmp_path / "trainlist01.txt").write_bytes(
        b"Archery/v_Archery_g08_c01.avi 1\r\nArchery/v_Archery_g09_c01.avi 1\r\n"
    )
    (tmp_path / "testlist01.txt").write_bytes(b"Biking/v_Biking_g01_c01.avi\r\n")
    split = read_ucf101(tmp_path / "videos", tmp_path, split=1)
    assert split.classes == ["Archery", "Biking"]
    assert [(r.label, r.group) for r in split.train] == [(0, "v_Archery_g08")]
    assert [r.label for r in split.test] == [1]
    assert split.missing == ["Archery/v_Archery_g09_c01.avi"] and split.unlisted == ["Archery/v_Archery_g08_c02.avi"]


@pytest.fixture(scope="module")
def official(splits, tmp_path_factory):
    """Folders of the videos of HMDB-51 and UCF-101, all empty: each of the three splits lists them all."""
    root, names = tmp_path_factory.mktemp("official"), set()
    for file in (splits / "hmdb51").glob("*_test_split1.txt"):
        name = file.name.removesuffix("_test_split1.txt")
        names |= {f"hmdb51/{name}/{line.split()[0]}" for line in file.read_text().splitlines()}
    for part in ("train", "test"):
        lines = (splits / f"ucf101/{part}list01.txt").read_text().splitlines()
        names |= {f"ucf101/{line.split()[0]}" for line in lines}
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True)
    for name in names:
        (root / name).touch()
    return root


@pytest.mark.parametrize("number, train, test", [(1, 3570, 1530), (2, 3570, 1530), (3, 3570, 1530)])
def test_official_hmdb51_lists(splits, official, number, train, test):
    """Counts of the official splits: 70 training and 30 test videos of each of 51 classes."""
    split = read_hmdb51(official / "hmdb51", splits / "hmdb51", number)
    assert (len(split.classes), len(split.train), len(split.test)) == (51, train, test)
    assert split.missing == [] and split.unlisted == []
    assert {len(r.group) > 0 for r in split.train} == {True}


@pytest.mark.parametrize("number, train, test", [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_official_ucf101_lists(splits, official, number, train, test):
    split = read_ucf101(official / "ucf101", splits / "ucf101", number)
    assert (len(split.classes), len(split.train), len(split.test)) == (101, train, test)
    assert not {r.group for r in split.train} & {r.group for r in split.test}  # official: whole groups


def test_real_clips(clips, splits):
    split = read_hmdb51(clips / "hmdb51", splits / "hmdb51", 1)
    assert len(split.classes) == 51 and split.classes_on_disk() == 2
    assert len(split.train) == 2 and len(split.test) == 1


def test_validation_takes_whole_groups(tmp_path):
    files = {f"film{number // 5}_wave_f_{number}.avi": 1 for number in range(100)} | {"t_wave_0.avi": 2}
    split = read_hmdb51(*make_hmdb51(tmp_path, {"wave": files}, [f"wave/{file}" for file in files]), 1)
    train, validation = cut_validation(split.train, 0.2, seed=3)
    assert len(train) + len(validation) == 100 and 20 <= len(validation) < 25
    assert not {r.group for r in train} & {r.group for r in validation}
    assert cut_validation(split.train, 0.2, seed=3) == (train, validation)
    assert cut_validation(split.train, 0.2, seed=4) != (train, validation)
    assert len(cut_validation(split.train, 0.999, seed=0)[0]) > 0
    with pytest.raises(UserError, match="2 source groups"):
        cut_validation(split.train[:5], 0.2, seed=0)


def test_drop(tmp_path):
    split = read_hmdb51(
        *make_hmdb51(
            tmp_path, {"wave": {"a.avi": 1, "b.avi": 1, "c.avi": 2}}, ["wave/a.avi", "wave/b.avi", "wave/c.avi"]
        ),
        1,
    )
    assert [r.path for r in drop(split, [split.train[0].path]).train] == [split.train[1].path]


def test_a_listed_video_is_found_whatever_its_suffix(tmp_path):
    data = make_hmdb51(tmp_path, {"wave": {"a.ogv": 1, "b": 2}, "run": {"c.strange": 1}}, ["wave/a.ogv", "wave/b"])
    (data[0] / "run").mkdir()
    (data[0] / "run/c.strange").write_bytes(b"")
    split = read_hmdb51(*data, 1)
    assert [video.name for video in split.train] == ["run/c.strange", "wave/a.ogv"] and not split.missing
    assert [video.name for video in split.test] == ["wave/b"] and not split.unlisted


def test_videos_that_are_listed_twice_are_told(tmp_path, capsys):
    root, lists = make_hmdb51(tmp_path, {"wave": {"a.avi": 1, "b.avi": 2}}, ["wave/a.mov", "wave/b.avi"])
    (lists / "wave_test_split1.txt").write_text("a.avi 1\na.mp4 1\nb.avi 2\n")
    assert len(read_hmdb51(root, lists, 1).train) == 2
    assert f"lists 1 videos more than once, and each line counts; the first: {root}/wave/a.mov" in (
        capsys.readouterr().out
    )
    (lists / "wave_test_split1.txt").write_text("a.avi 1\na.mp4 2\nb.avi 2\n")
    with pytest.raises(UserError, match=r"wave/a\.mp4 is listed both to train and to test on"):
        read_hmdb51(root, lists, 1)


def test_files_that_macos_leaves_beside_others_are_no_videos_and_no_lists(tmp_path):
    root, lists = make_hmdb51(tmp_path, {"run": {"a.avi": 1, "b.avi": 2}}, ["run/a.avi", "run/b.avi", "run/._a.avi"])
    (lists / "._run_test_split1.txt").write_bytes(b"\0\5\x16\7\0\2Mac OS X\0")
    split = read_hmdb51(root, lists, 1)
    assert split.classes == ["run"] and len(split.train) == 1 and split.unlisted == []


def test_a_class_folder_without_permission_is_not_missing(open_folder):
    root, lists = make_hmdb51(
        open_folder, {"run": {"a.avi": 1, "b.avi": 2}, "wave": {"c.avi": 1}}, ["run/a.avi", "run/b.avi", "wave/c.avi"]
    )
    (root / "wave").chmod(0)
    try:
        with without_privileges():
            split = read_hmdb51(root, lists, 1)
    finally:
        (root / "wave").chmod(0o755)
    assert [video.name for video in split.train] == ["run/a.avi", "wave/c.avi"] and not split.missing


def test_split_files_without_permission_are_one_line(open_folder):
    root, lists = make_hmdb51(open_folder, {"run": {"a.avi": 1, "b.avi": 2}}, ["run/a.avi", "run/b.avi"])
    lists.chmod(0)
    try:
        with without_privileges(), pytest.raises(UserError, match=r"splits: cannot be read \(Permission denied\)"):
            read_hmdb51(root, lists, 1)
    finally:
        lists.chmod(0o755)


def test_a_class_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "classInd.txt").write_text("1 Archery\n2 Archery\n")
    with pytest.raises(UserError, match=r"classInd\.txt: the class `Archery` comes 2 times"):
        read_ucf101(tmp_path, tmp_path, 1)


def test_refusals(tmp_path):
    root, lists = make_hmdb51(
        tmp_path, {"wave": {"a.avi": 1, "b.avi": 2}, "run": {"c.avi": 1}}, ["wave/a.avi", "wave/b.avi"]
    )
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        read_hmdb51(tmp_path / "nowhere", lists, 1)
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        read_hmdb51(root, tmp_path / "nowhere", 1)
    with pytest.raises(UserError, match=r"_test_split2\.txt, found none"):
        read_hmdb51(root, lists, 2)
    (root / "run").mkdir()
    with pytest.raises(UserError, match=r"run: class folder without a video"):
        read_hmdb51(root, lists, 1)
    (root / "run").rmdir()
    (lists / "run_test_split1.txt").write_text("c.avi 1\nd.avi three\n")
    with pytest.raises(UserError, match=r"run_test_split1\.txt:2: expected"):
        read_hmdb51(root, lists, 1)
    (lists / "run_test_split1.txt").unlink()
    (lists / "wave_test_split1.txt").write_text("a.avi 1\na.avi 2\n")
    with pytest.raises(UserError, match=r"wave/a\.avi is listed both to train and to test on"):
        read_hmdb51(root, lists, 1)
    (lists / "wave_test_split1.txt").write_text("x.avi 1\ny.avi 2\n")
    with pytest.raises(UserError, match="holds none of the videos to train on"):
        read_hmdb51(root, lists, 1)
    with pytest.raises(UserError, match=r"classInd\.txt: no such file"):
        read_ucf101(root, lists, 1)
