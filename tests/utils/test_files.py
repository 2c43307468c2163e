import pwd
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import cache_folder


def test_the_cache_lies_where_the_user_wants_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/respike")
    for chosen in ("/data/cache", "~/../../data/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
        assert cache_folder().resolve() == Path("/data/cache/respike")


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "")

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="no home folder: set XDG_CACHE_HOME to a writable folder"):
        cache_folder()
