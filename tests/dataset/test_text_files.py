import pytest

from dataset.text_files import read_lines, read_text
from utils.errors import UserError

TEXT = "ü b.mp4 0\n\n  c.mp4 1\n"
ENCODINGS = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with a mark": TEXT.encode("utf-8-sig"),
    "UTF-16, little-endian, as PowerShell writes": b"\xff\xfe" + TEXT.encode("utf-16-le"),
    "UTF-16, big-endian": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "Windows line ends": TEXT.replace("\n", "\r\n").encode(),
    "old Mac line ends": TEXT.replace("\n", "\r").encode(),
    "UTF-16 with Windows line ends": TEXT.replace("\n", "\r\n").encode("utf-16"),
}


@pytest.mark.parametrize("content", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_text_of_any_system_is_the_same_text(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert read_text(tmp_path / "list.txt") == TEXT
    assert list(read_lines(tmp_path / "list.txt")) == [(1, "ü b.mp4 0"), (3, "  c.mp4 1")]


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "\x0c", "\x0b", "\x1c", "\x1e"])
def test_only_line_ends_end_a_line(tmp_path, character):
    (tmp_path / "list.txt").write_text(f"a{character}b.mp4 0\nc.mp4 1\n")
    assert [line for _, line in read_lines(tmp_path / "list.txt")] == [f"a{character}b.mp4 0", "c.mp4 1"]


def test_bytes_that_are_no_utf_8_are_kept(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.mp4 0\n")
    assert read_text(tmp_path / "list.txt") == "caf\udce9.mp4 0\n"  # as os.listdir gives such a name


REFUSED = {
    "UTF-16 without a mark": ("a.mp4 0\n".encode("utf-16-le"), r"zero bytes in it; save it as UTF-8"),
    "a spreadsheet": (b"PK\x03\x04\x14\x00\x06\x00", r"expected a text file in UTF-8"),
    "half a character": (b"\xff\xfea\x00b", r"cannot be read as UTF-16"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_text_is_one_line(tmp_path, content, message):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_text(tmp_path / "list.txt", about="train_list")
    assert str(caught.value).startswith(f"{tmp_path / 'list.txt'}: ") and "\n" not in str(caught.value)
    assert caught.value.about == "train_list"


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no\.txt: no such file; expected lines of text"):
        read_text(tmp_path / "no.txt", "lines of text")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_text(tmp_path)
