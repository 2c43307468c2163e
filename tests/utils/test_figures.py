"""The files that figures become."""

import pytest

from utils.errors import UserError
from utils.figures import new_figure, save_figure


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_decides_the_format(tmp_path, suffix, start):
    save_figure(tmp_path / f"a{suffix}", new_figure(1, 1))
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match="must end in"):
        save_figure(tmp_path / "a.gif", new_figure(1, 1))
    assert not list(tmp_path.iterdir())
