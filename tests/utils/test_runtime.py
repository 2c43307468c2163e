"""What the variables of a launcher mean. Runs in several processes are tested in tests/scripts."""

import pytest

from utils.errors import UserError
from utils.runtime import Place, join_run, launched, local_processes

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    def put(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_the_variables_of_torchrun(environment):
    environment(TORCHRUN)
    assert launched() == Place(rank=5, count=8, local_rank=1, local_count=4) and local_processes() == 4


@pytest.mark.parametrize(
    "variables",
    [{}, {"RANK": "1"}, {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "x", "LOCAL_WORLD_SIZE": "8"},
     {**TORCHRUN, "WORLD_SIZE": "1"}],
)  # fmt: skip
def test_a_process_without_others_is_alone(environment, variables):
    environment(variables)
    assert launched() is None and local_processes() == 1
    assert join_run("cpu", amp=False).count == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many' in the environment, expected a whole number"),
        ({"RANK": "one"}, "RANK is 'one' in the environment"),
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE is 8, LOCAL_RANK, MASTER_PORT not set: .*torchrun"),
        ({"RANK": "8"}, "WORLD_SIZE is 8 with RANK 8"),
        ({"RANK": "-1"}, "WORLD_SIZE is 8 with RANK -1"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK 4, LOCAL_WORLD_SIZE 4"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE 0"),
    ],
)
def test_variables_that_make_no_sense_are_refused(environment, change, message):
    environment(TORCHRUN | change)
    for function in (launched, local_processes, lambda: join_run("cpu", amp=False)):
        with pytest.raises(UserError, match=message):
            function()
