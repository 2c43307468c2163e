"""Kill dataset.prepare with SIGKILL at random moments and start it again: the folder must end as an undisturbed run's.

    python -m tests.helpers.kill_prepare --dset list --train-list FILE --data-root FOLDER --kills 10

All flags but --kills and --seed go to dataset.prepare.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.script import ROOT


def start(flags: list[str], out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dataset.prepare", *flags, "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for_work(process: subprocess.Popen, out: Path) -> None:
    """Until it writes its first new video, or ends."""
    before = set(out.rglob("*"))
    while process.poll() is None and set(out.rglob("*")) <= before | {out / "prepared.json"}:
        time.sleep(0.005)


def kills_leave_the_same_folder(flags: list[str], scratch: Path, kills: int, seed: int) -> list[int]:
    """How many whole videos each of the kills left behind. Raises AssertionError if the folders differ."""
    undisturbed, killed = scratch / "undisturbed", scratch / "killed"
    process = start(flags, undisturbed)
    wait_for_work(process, undisturbed)
    begin = time.monotonic()
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    duration = time.monotonic() - begin
    generator = random.Random(seed)
    whole = []
    for _ in range(kills):
        process = start(flags, killed)
        wait_for_work(process, killed)
        time.sleep(generator.uniform(0, duration / 2))
        process.kill()
        process.communicate(timeout=60)
        whole.append(len(list(killed.rglob("*.mov"))))
        assert all(path.read_bytes() == (undisturbed / path.relative_to(killed)).read_bytes()
                   for path in killed.rglob("*.mov")), "a half-written video has its final name"  # fmt: skip
        if whole[-1] == len(list(undisturbed.rglob("*.mov"))):  # all done: begin again, for there is nothing to kill
            shutil.rmtree(killed)
    process = start(flags, killed)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert content(killed) == content(undisturbed)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole = kills_leave_the_same_folder(flags, Path(scratch), args.kills, args.seed)
    print(f"{args.kills} kills left {whole} whole videos; the folder is the undisturbed run's, byte for byte")


if __name__ == "__main__":
    main()
