"""What may import what: the order of the files, and the packages that cost seconds or accounts."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# a file imports only files above it
ORDER = [
    "begin",
    "keys",
    "settings",
    "config",
    "files",
    "losses",
    "hosts",
    "device",
    "stages",
    "resampling",
    "scores",
    "intervals",
    "groups",
    "paired",
    "metrics",
    "b2",
    "jpeg",
    "dicom",
    "stacks",
    "devices",
    "formats",
    "volumes",
    "architecture",
    "weights",
    "model",
    "phantom",
    "facts",
    "given",
    "labels",
    "ledger",
    "loader",
    "data",
    "features",
    "discriminant",
    "heads",
    "references",
    "attribution",
    "progress",
    "tracking",
    "runs",
    "results",
    "confounding",
    "prevalence",
    "shortcuts",
    "looks",
    "power",
    "agreement",
    "findings",
    "figures",
    "forest",
    "gallery",
    "flow",
    "feature_map",
    "sweep",
    "report",
    "curve",
    "explain",
    "repeats",
    "compare",
    "versus",
    "leaderboard",
    "check",
    "eval",
    "train",
]
HEAVY = {"wandb", "pydicom", "b2sdk", "matplotlib", "jinja2"}
HEAVY |= {"nibabel", "h5py", "tifffile", "imagecodecs", "eyepy"}


def imports_in(tree):
    """Names of the packages and files that the nodes of a syntax tree import."""
    names = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def parsed(path):
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def outside_functions(node):
    """The nodes that run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def test_every_file_has_its_place():
    assert sorted(ORDER) == sorted(path.stem for path in Path(ROOT).glob("*.py"))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_above_it(name):
    """Imports inside functions count too."""
    imported = imports_in(ast.walk(parsed(f"{ROOT}/{name}.py")))
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_nobody_imports_a_command(name):
    assert not imports_in(ast.walk(parsed(f"{ROOT}/{name}.py"))) & {"train", "eval"}


@pytest.mark.parametrize("name", [name for name in ORDER if name != "jpeg"])
def test_heavy_packages_are_imported_by_the_functions_that_use_them(name):
    assert not imports_in(outside_functions(parsed(f"{ROOT}/{name}.py"))) & HEAVY


@pytest.mark.parametrize("path", sorted(Path(ROOT, "tests").glob("*.py")), ids=lambda p: p.stem)
def test_tests_import_no_other_test_and_no_measurement(path):
    names = {p.stem for p in Path(ROOT, "tests").glob("test_*.py")} | {"conftest", "bench"}
    names |= {p.stem for p in Path(ROOT, "bench").glob("*.py")}
    names -= set(ORDER)  # bench/evaluate.py, and others of that kind
    assert not imports_in(ast.walk(parsed(path))) & names


@pytest.mark.parametrize(
    ("names", "also"), [("model, losses, metrics, heads, device", []), ("features", ["tqdm"])]
)
def test_the_mathematics_imports_torch_numpy_and_scikit_learn_alone(names, also):
    """bench/gpu.py runs with these; scipy comes with scikit-learn. The feature pass draws a bar."""
    code = "import sys; sys.modules |= dict.fromkeys(sys.argv[1:])"  # None: not to be imported
    code += f"; import {names}"
    code += "; print(*(name for name, module in sys.modules.items() if module))"
    others = {"yaml", "pydantic", "tqdm", "fsspec", "dotenv", "b2sdk"} - set(also)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "-c", code, *others],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & HEAVY
