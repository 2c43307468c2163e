"""Who may import whom: data flows one way, and a reader finds each part where it belongs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READ_A_NETWORK = ("utils.energy", "utils.pictures", "utils.prediction", "utils.training", "utils.heads")
# Folder -> what its files must not import. Files directly in utils/ are plumbing: they know neither data nor network,
# except the command utils/plots.py. benchmarks/ (how fast is it?) and experiments/ (how good is it?) stand above
# all of them and beside each other.
FORBIDDEN = {
    "benchmarks": ("experiments",),
    "experiments": ("benchmarks",),
    "utils": ("dataset", "models", *READ_A_NETWORK),
    "dataset": ("models", *READ_A_NETWORK),
    "models": ("dataset", *READ_A_NETWORK),
    "models/kernels": ("models.heads", "models.respike", "models.neurons"),
    "utils/energy": ("dataset", "utils.pictures", "utils.prediction", "utils.training", "utils.heads"),
    "utils/pictures": ("utils.energy", "utils.prediction", "utils.training", "utils.heads"),
    "utils/prediction": ("utils.energy", "utils.pictures", "utils.heads", "models.heads"),
    "utils/training": ("utils.prediction", "utils.heads", "models.heads"),
    "utils/heads": ("utils.energy", "utils.pictures", "utils.prediction", "utils.training"),
}
FILES = [file for folder in (*FORBIDDEN, "models/heads") for file in sorted((ROOT / folder).glob("*.py"))]


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_arrow_points_up(file):
    folder = str(file.parent.relative_to(ROOT))
    forbidden = set(FORBIDDEN.get(folder, FORBIDDEN["models"]))
    if folder not in ("benchmarks", "experiments"):
        forbidden |= {"benchmarks", "experiments"}
    if str(file.relative_to(ROOT)) == "utils/plots.py":
        forbidden -= {"models", "dataset", "utils.pictures", "utils.prediction"}
    above = {name for name in imported(file) if any(name == up or name.startswith(f"{up}.") for up in forbidden)}
    assert not above, f"{file} imports {above}"


def test_no_circles():
    modules = {str(file.relative_to(ROOT).with_suffix("")).replace("/", "."): file for file in FILES}
    arrows = {name: imported(file) & set(modules) - {name} for name, file in modules.items()}
    while ends := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - ends for name, targets in arrows.items() if name not in ends}
    assert not arrows


def test_library_functions_do_not_take_args():
    """The command line ends in the scripts and in utils/training/flags.py."""
    for file in FILES:
        if file.name != "flags.py" and "__main__" not in file.read_text():
            functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
            assert not any(argument.arg == "args" for node in functions for argument in node.args.args), file
