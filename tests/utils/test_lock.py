import pytest

from utils.errors import UserError
from utils.lock import locked


def test_shards_share_a_folder_and_the_same_shard_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.lock._SECONDS_FOR_ANOTHER_TO_LEAVE", 0)
    folder, message = tmp_path / "out", r"another process is writing to it"
    for shard in ("1-of-2", "2-of-2"):
        (folder / shard).mkdir(parents=True)
    with locked(folder, shared=True), locked(folder / "1-of-2"):
        with locked(folder, shared=True), locked(folder / "2-of-2"):
            pass
        with pytest.raises(UserError, match=message), locked(folder / "1-of-2"):
            pass
        with pytest.raises(UserError, match=message), locked(folder):
            pass
    with locked(folder), pytest.raises(UserError, match=message), locked(folder, shared=True):
        pass
