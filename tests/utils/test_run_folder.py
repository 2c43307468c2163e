import json
import multiprocessing

import pytest

from utils.errors import UserError
from utils.run_folder import RunFolder, leave_run_folders


def line(epoch):
    return {"epoch": epoch, "train_loss": 1.0, "firing_rate": {"stage1": 0.5}}


def test_metrics_and_their_undoing(tmp_path):
    run = RunFolder(tmp_path / "run", resuming=False, overwrite=False)
    for epoch in range(3):
        run.add_metrics(line(epoch))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train_lo')  # killed while it wrote
    run = RunFolder(tmp_path / "run", resuming=True, overwrite=False)
    run.begin(2)
    kept = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in kept] == [line(0), line(1)]


def test_a_test_after_other_epochs_is_kept(tmp_path, capsys):
    run = RunFolder(tmp_path, resuming=False, overwrite=False)
    for epochs, top1 in ((5, 80.0), (5, 81.0), (6, 79.0)):
        run.write_result({"after_epochs": epochs, "video_top1": top1})
    kept, newest = (json.loads((tmp_path / name).read_text()) for name in ("test-after-5.json", "test.json"))
    assert (kept["video_top1"], newest["video_top1"]) == (81.0, 79.0)
    assert capsys.readouterr().out == "note: the test after 5 epochs is kept as test-after-5.json\n"
    run.begin(0)
    assert not list(tmp_path.glob("test*.json"))


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    RunFolder(tmp_path, resuming=True, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def hold(folder, holding, leave):
    RunFolder(folder, resuming=True, overwrite=False)
    (folder / ".last.pt.7.tmp").write_bytes(b"being written")
    holding.set()
    leave.wait(30)


def test_a_folder_is_one_runs_at_a_time(tmp_path, monkeypatch, capsys):
    context = multiprocessing.get_context("fork")
    holding, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, holding, leave))
    other.start()
    assert holding.wait(30)
    monkeypatch.setattr("utils.lock._SECONDS_FOR_ANOTHER_TO_LEAVE", 1)
    with pytest.raises(UserError, match="another process is writing to it"):
        RunFolder(tmp_path, resuming=True, overwrite=False)
    assert "waiting for another process" in capsys.readouterr().out
    assert (tmp_path / ".last.pt.7.tmp").exists()  # what it writes is not taken for a leftover
    leave.set()
    other.join()
    RunFolder(tmp_path, resuming=True, overwrite=False)
    leave_run_folders()
    assert not (tmp_path / ".last.pt.7.tmp").exists()


def test_a_run_is_protected(tmp_path):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder(tmp_path, resuming=False, overwrite=False)
    RunFolder(tmp_path, resuming=True, overwrite=False)
    assert (tmp_path / "metrics.jsonl").exists()
    run = RunFolder(tmp_path, resuming=False, overwrite=True)
    assert (tmp_path / "metrics.jsonl").exists()  # until the new run begins
    run.begin(0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_config_says_what_ran(tmp_path):
    run = RunFolder(tmp_path, resuming=False, overwrite=False)
    run.write_config({"lr": 0.1}, network={"stride": 4})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"] == {"lr": 0.1} and config["network"] == {"stride": 4}
    assert set(config["versions"]) >= {"python", "torch", "torchvision", "spikingjelly", "av", "numpy"}


def test_lists_keep_names_that_are_not_text(tmp_path):
    run = RunFolder(tmp_path, resuming=False, overwrite=False)
    name = b"caf\xe9.avi".decode("utf-8", "surrogateescape")
    run.write_list("missing.txt", [name])
    assert (tmp_path / "missing.txt").read_bytes() == b"caf\xe9.avi\n"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        RunFolder(tmp_path / "file" / "run", resuming=False, overwrite=False)


def test_what_is_no_run_of_this_project_is_not_overwritten(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"weights of another project")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds best\.pt but no config\.json, so it is not a run"):
        RunFolder(tmp_path, resuming=False, overwrite=True)
    (tmp_path / "best.pt").rename(tmp_path / "other.pt")
    RunFolder(tmp_path, resuming=False, overwrite=True).begin(0)
    assert {"other.pt", "notes.txt"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0c", "\udcff"])
def test_names_with_characters_that_end_lines_elsewhere_stay_whole(tmp_path, character):
    run = RunFolder(tmp_path, resuming=False, overwrite=False)
    for lines in (["one: gone"], [f"a{character}b.avi: gone"], ["one: gone", "two: gone"]):
        run.add_to_list("broken.txt", lines)
    written = (tmp_path / "broken.txt").read_bytes().decode(errors="surrogateescape")
    assert written == f"one: gone\na{character}b.avi: gone\ntwo: gone\n"
