"""Which packages and modules import which; CONTRIBUTING.md has the rules."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ffcv_ops", "imagenet_training")
SCRIPTS = {path.stem for folder in (ROOT, ROOT / "launch", ROOT / "benchmarks") for path in folder.glob("*.py")}
SOURCES = sorted(
    path
    for folder in (*PACKAGES, "benchmarks", "launch", "tests", ".")
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
)
# Where a module's name is not that of what installs it.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "triton": "torch",  # which brings it where it has GPUs
    "yaml": "pyyaml",
}
# What benchmarks measure where somebody has installed it.
PEERS = {"nvidia", "slipstream"}


@cache
def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert "*" not in (alias.name for alias in node.names), f"{path}:{node.lineno} imports a star"
            modules.add(str(node.module).split(".")[0])
    return modules


def importers(module: str, *folders: str) -> set[str]:
    """The files, of those outside the tests or in ``folders``, that import a module."""
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if (path.relative_to(ROOT).parts[0] in folders if folders else ROOT / "tests" not in path.parents)
        and module in imported(path)
    }


def test_no_package_knows_a_script() -> None:
    assert {"train_imagenet"} <= SCRIPTS
    for script in SCRIPTS:
        assert not importers(script, *PACKAGES)


def test_packages_import_only_what_stands_below_them() -> None:
    """The layers of both packages are in pyproject.toml, under ``tool.importlinter``."""
    linted = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    told = "an import breaks a rule of CONTRIBUTING.md, or pyproject.toml (tool.importlinter) lacks a new package"
    assert linted.returncode == 0, f"{told}\n{linted.stdout}"


@pytest.mark.parametrize(
    ("module", "homes"),
    [
        ("ctypes", {"ffcv_ops/_sigbus.py", "ffcv_ops/codec/jpeg.py"}),
        ("ffcv", {"ffcv_ops/_ffcv.py"}),
        ("wandb", {"imagenet_training/reports/wandb.py"}),
    ],
)
def test_a_module_has_one_home(module: str, homes: set[str]) -> None:
    others = sorted(importers(module, *PACKAGES) ^ homes)
    assert not others, f"only {', '.join(sorted(homes))} should import {module}; see {', '.join(others)}"


def test_fastargs_stays_at_the_door() -> None:
    scripts = {"imagenet_training/planning/recipe.py", "write_beton.py", "train_imagenet.py"}
    assert {path for path in importers("fastargs") if not path.startswith("ffcv_ops/settings/")} <= scripts


def declared() -> set[str]:
    """The distributions that pyproject.toml asks for, to run and to develop."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|dev) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    return {name.lower() for names in lists for name in re.findall(r'"([\w.-]+)>=', names)}


def test_what_is_imported_is_declared() -> None:
    for path in SOURCES:
        own = {*PACKAGES, *SCRIPTS, "tests", *(other.stem for other in path.parent.iterdir())}
        if ROOT / "benchmarks" in path.parents:
            own |= PEERS
        for module in imported(path) - own - set(sys.stdlib_module_names):
            assert DISTRIBUTIONS.get(module, module) in declared(), (
                f"{path} imports {module}, which nothing installs: add it to pyproject.toml and constraints.txt"
            )


def test_each_dependency_has_a_tested_version() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert declared() <= {line.split("==")[0].lower() for line in text.splitlines() if "==" in line}
