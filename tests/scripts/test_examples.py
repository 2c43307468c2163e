"""The examples for Slurm, with stand-ins for its commands: two nodes of one process each, an array of 16 jobs."""

import importlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import train_kinetics
from tests.helpers.script import ROOT

STANDINS = {
    # The training processes: say who they are; leave in order when they are warned.
    "python": """
        trap 'echo saved by $RANK >> $OUT; exit 0' USR2
        echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $MASTER_ADDR:$MASTER_PORT: $*" >> $OUT
        [ "$MODE" = fail ] && exit 3
        [ "$MODE" = finish ] && exit 0
        echo $$ >> $PIDS
        for i in $(seq 200); do sleep 0.05; done
        exit 9""",
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
        SLURM_PROCID=1 SLURM_LOCALID=0 "$@" & second=$!
        wait $first; status=$?
        wait $second || status=$?
        exit $status""",
    "scontrol": """
        [ "$1 $2" = "show hostnames" ] && { echo node1; echo node2; exit; }
        echo "scontrol $*" >> $OUT""",
    "scancel": """
        echo "scancel $*" >> $OUT
        kill -USR2 $(cat $PIDS)""",
}


def start(tmp_path: Path, mode: str) -> subprocess.Popen:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STANDINS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "16",
        "OUT": str(tmp_path / "out"), "PIDS": str(tmp_path / "pids"), "MODE": mode,
        "PATH": f"{commands}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(["bash", "examples/slurm.sh"], cwd=ROOT, env={**os.environ, **slurm})


@pytest.mark.parametrize("mode, status", [("finish", 0), ("fail", 3)])
def test_the_processes_know_each_other_and_their_status_counts(tmp_path, mode, status):
    assert start(tmp_path, mode).wait(timeout=30) == status
    lines = sorted((tmp_path / "out").read_text().splitlines())
    assert len(lines) == 2 and not any("requeue" in line for line in lines)
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank} of 2, 0 of 1, node1:23456: train_kinetics.py --dset kinetics400 -b 16")
        assert "--resume auto" in line


def test_a_warning_is_handed_on_and_the_job_queued_again(tmp_path):
    process = start(tmp_path, "train")
    end = time.monotonic() + 20
    while time.monotonic() < end and not (
        (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=30) == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[2] == "scancel --signal=USR2 123456"
    assert sorted(lines[3:5]) == ["saved by 0", "saved by 1"] and lines[5] == "scontrol requeue 123456"


def test_its_flags_exist(monkeypatch):
    text = (ROOT / "examples/slurm.sh").read_text()
    command = re.search(r"python (train_kinetics\.py .*?)\n\)", text, re.DOTALL).group(1)
    monkeypatch.setattr("sys.argv", command.split())
    args = train_kinetics.parse_args()
    assert (args.resume, args.checkpoint_minutes, args.batch_size, args.workers) == ("auto", 15.0, 16, 14)


def test_each_job_of_the_array_has_its_shard(tmp_path):
    """Also if only two of them are started again."""
    text = (ROOT / "examples/shards.sh").read_text()
    count = re.search(r"#SBATCH --array=1-(\d+)\n", text)[1]
    (tmp_path / "python").write_text('#!/bin/bash\necho "$*"; exit 3\n')
    (tmp_path / "python").chmod(0o755)
    job = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "16"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for command in re.findall(r"^#     sbatch (?:--array=4,7 )?examples/shards\.sh (.*)$", text, re.MULTILINE):
        ran = subprocess.run(
            ["bash", "examples/shards.sh", *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert ran.stdout == f"-m {command} --shard 7/{count} --jobs 16\n" and ran.returncode == 3


@pytest.mark.parametrize("name", ["prepare", "build_index"])
def test_the_arrays_flags_exist(monkeypatch, name):
    module = importlib.import_module(f"dataset.{name}")
    text = (ROOT / "examples/shards.sh").read_text()
    flags = re.search(rf"^#     sbatch examples/shards\.sh dataset\.{name} (.*)$", text, re.MULTILINE)[1]
    monkeypatch.setattr("sys.argv", [name, *flags.split(), "--shard", "7/16", "--jobs", "16"])
    assert module.parse_args().shard == (7, 16)
