"""What tests that start processes, and tests that compare with other packages, rely on."""

import os
import subprocess
import sys

from tests.helpers.script import ROOT, finish, start_python


def test_processes_keep_the_pythonpath_that_they_were_given(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    paths = finish(start_python(["-c", "import sys; print(*sys.path, sep='\\n')"])).splitlines()
    assert str(ROOT) in paths and "/somewhere/else" in paths


def test_without_loguru_tests_that_need_spikingjelly_are_skipped():
    code = (
        "import sys, pytest; sys.modules['loguru'] = None; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'plain_build or backends_are', "
        "'tests/models/test_neurons.py', 'tests/models/test_respike.py']))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert " skipped" in result.stdout and "error" not in result.stdout.lower(), result.stdout


def test_every_line_that_the_mutations_break_is_still_there(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the program makes Triton interpret
    from tests.helpers.mutate_kernels import MUTATIONS

    assert not [(path, line) for path, line, _ in MUTATIONS if line not in (ROOT / path).read_text()]
