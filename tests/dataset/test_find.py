"""Which videos a user names."""

import io
import os
import sys
from pathlib import Path

import pytest

from dataset.find import find_videos
from utils.errors import UserError


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(*named, list_file=None) -> tuple[list[str], list[str]]:
    """(paths, errors)"""
    items = list(find_videos(map(str, named), list_file))
    return [i for i in items if isinstance(i, str)], [str(i) for i in items if isinstance(i, UserError)]


def test_a_file_that_is_named_is_given_back_whatever_its_name(tmp_path):
    names = [tmp_path / name for name in ("video", "video.xyz", "._video.mp4", "gone.mp4")]
    files(tmp_path, "video", "video.xyz", "._video.mp4")
    assert found(*names) == (list(map(str, names)), [])


def test_the_videos_of_a_folder_in_alphabetical_order(tmp_path, capsys):
    files(tmp_path, "b/2.MP4", "b/1.ogv", "a b/x.mts", "a/x.m2ts", "a/.hidden.mov", "top.vob", "b/._2.MP4", "a/c.qt")
    names = ["a/.hidden.mov", "a/c.qt", "a/x.m2ts", "a b/x.mts", "b/1.ogv", "b/2.MP4", "top.vob"]
    assert found(tmp_path) == ([str(tmp_path / name) for name in names], [])
    assert capsys.readouterr().err == ""


def test_other_files_of_a_folder_are_counted_in_a_note(tmp_path, capsys):
    files(tmp_path, "a.mp4", "b/notes.txt", "c.TXT", "d.xyz", "no_suffix", "._e.txt")
    assert found(tmp_path) == ([str(tmp_path / "a.mp4")], [])
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: 4 files are not named as videos (.txt, .xyz, no suffix) and left out; "
        "a file that is named itself is tried\n"
    )


def test_links_are_followed_without_looping(tmp_path):
    files(tmp_path, "elsewhere/walk/1.mp4", "elsewhere/2.mp4", "data/run/3.mp4", "data/run/deep/4.mp4")
    data = tmp_path / "data"
    (data / "walk").symlink_to(tmp_path / "elsewhere/walk")
    (data / "a_run").symlink_to("run")  # comes before the folder itself, which has its own name all the same
    (data / "run/deep/up").symlink_to("../..")
    (data / "self").symlink_to(".")
    (data / "file.mp4").symlink_to(tmp_path / "elsewhere/2.mp4")
    names = ["file.mp4", "run/3.mp4", "run/deep/4.mp4", "walk/1.mp4"]
    assert found(data) == ([str(data / name) for name in names], [])
    assert found(data / "a_run")[0] == [str(data / "a_run" / name) for name in ("3.mp4", "deep/4.mp4")] + [
        str(data / "a_run/deep/up/file.mp4"), str(data / "a_run/deep/up/walk/1.mp4")
    ]  # fmt: skip


def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    files(tmp_path, "a/1.mp4", "closed/2.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "lost_folder").symlink_to("/nowhere")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    listed = os.listdir

    def listdir(path):
        if Path(path).name == "closed":  # root may read any folder
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    paths, errors = found(tmp_path)
    assert paths == [str(tmp_path / "a/1.mp4")]
    assert sorted(errors) == [
        f"{tmp_path}/closed: cannot be read (Permission denied)",
        f"{tmp_path}/gone.mp4: cannot be read (No such file or directory)",
        f"{tmp_path}/loop.mp4: cannot be read (Too many levels of symbolic links)",
        f"{tmp_path}/lost_folder: cannot be read (No such file or directory)",
    ]
    assert found(tmp_path / "closed") == ([], [f"{tmp_path}/closed: cannot be read (Permission denied)"])


def test_a_folder_without_a_video_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    assert found(tmp_path) == ([], [f"{tmp_path}: a folder without a video"])


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lists_hold_any_name(tmp_path, monkeypatch, end):
    """Bytes that are no text, and characters that Python takes for ends of lines."""
    names = [b"caf\xe9.mp4", "a\u2028b\x0cc\x85.mp4".encode(), b" spaces .mp4"]
    content = b"\xef\xbb\xbf" + end.join([names[0], b"", *names[1:]])
    (tmp_path / "list.txt").write_bytes(content)
    assert found(list_file=str(tmp_path / "list.txt")) == (list(map(os.fsdecode, names)), [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert found("-") == (list(map(os.fsdecode, names)), [])


def test_a_list_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read") as caught:
        list(find_videos([], str(tmp_path)))
    assert caught.value.about == "list"
