"""The project installed as a wheel: its commands, its recipes, its types, away from the repository."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from documents import DOCUMENTS
from setuptools import build_meta

import ffcv_ops
from imagenet_training.planning import recipe as recipe_module
from imagenet_training.run import provenance

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def copy_sources(folder):
    """The files that a clone has, without what building and running leave in them."""
    left_behind = ["build", "dist", "demo", "logs", "checkpoints", "runs", "*.beton", "__pycache__", "*.egg-info"]
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", *left_behind)
    return shutil.copytree(ROOT, folder, ignore=ignored)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, copy_sources(folder / "sources")], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run an installed command from an empty folder, beside the packages that the tests have."""
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment, with_pip=False, symlinks=True)
    (target,) = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target]
    subprocess.run([*pip, wheel], check=True)
    empty = tmp_path_factory.mktemp("empty")

    def run(command, *arguments, status=0):
        variables = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        command = [target / "bin" / command] if "/" not in command else [command]
        done = subprocess.run([*command, *arguments], cwd=empty, env=variables, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        assert not list(empty.iterdir())
        return done.stdout + done.stderr

    run.target, run.python = target, environment / "bin/python"
    return run


def test_a_packaged_recipe_runs_from_anywhere(run):
    said = run("train-imagenet", "--config-file", "rn50_configs/single_gpu_100ep.yaml", "--dry_run")
    assert "0.5 x 128 / 256 = 0.25" in said
    assert str(run.target / "rn50_configs/single_gpu_100ep.yaml") in said


def test_the_other_commands_are_there(run):
    assert "--split" in run("write-beton", "--help")
    said = run("write-beton", "--config-file", "rn50_configs/single_gpu_100.yaml", status=2)
    assert said.endswith("no such file; did you mean rn50_configs/single_gpu_100ep.yaml?\n")
    assert "--num_workers" in run("ffcv-doctor", "--help")


def test_a_wheel_holds_what_runs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {
        str(path.relative_to(ROOT))
        for package in ("ffcv_ops", "imagenet_training")
        for path in (ROOT / package).rglob("*.py")
    }
    recipes = {str(path.relative_to(ROOT)) for path in ROOT.glob("*_configs/*.yaml")}
    typed = {"ffcv_ops/py.typed", "imagenet_training/py.typed"}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "imagenet_training/reports/templates").iterdir()}
    expected = code | recipes | typed | templates | {"train_imagenet.py", "write_beton.py"}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_a_source_distribution_holds_what_builds_and_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(copy_sources(tmp_path / "sources"))
    archive = tmp_path / build_meta.build_sdist(tmp_path)
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    wanted = {"Makefile", "constraints.txt", "launch/setup.sh", ".ci/run", "tests/conftest.py", "LICENSE"}
    wanted |= {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert wanted | {"rn50_configs/demo.yaml", "ffcv_ops/py.typed", "write_beton.py"} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_a_recipe_of_the_current_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "rn50_configs/rsb_a1.yaml"
    assert recipe_module.read_recipe(["--config-file", name]).files == (ROOT / name,)
    (tmp_path / "rn50_configs").mkdir()
    (tmp_path / name).write_text("training: {epochs: 7}\n")
    recipe = recipe_module.read_recipe(["--config-file", name])
    assert (recipe.files, recipe.training.epochs) == ((Path(name),), 7)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rn50_configs/rsb_a9.yaml", "; did you mean rn50_configs/rsb_a"),
        ("single_gpu_100ep.yaml", "; did you mean rn50_configs/single_gpu_100ep.yaml?"),
        ("rn18_configs/nothing_like_it.yaml", "; there are rn18_configs/rn18_16ep.yaml, rn18_configs/rn18_24ep.yaml, "),
    ],
)
def test_a_recipe_that_is_not_there(tmp_path, monkeypatch, capsys, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        recipe_module.read_recipe(["--config-file", name])
    assert stop.value.code == 2
    assert f"--config-file {name}: no such file{hint}" in capsys.readouterr().err


def test_an_installed_copy_has_no_commit_of_the_repository_around_it(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    script = tmp_path / "train_imagenet.py"
    script.write_text("")
    (tmp_path / "theirs.txt").write_text("")
    for command in (["init", "--quiet"], ["add", "theirs.txt"], ["commit", "--quiet", "--message=theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(script))
    assert provenance.git_commit() is None
    for command in (["add", "train_imagenet.py"], ["commit", "--quiet", "--message=ours"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert provenance.git_commit() == commit
    script.write_text("changed")
    assert provenance.git_commit() == f"{commit}+"


def test_public_names_are_documented_typed_and_there():
    tree = ast.parse((ROOT / "ffcv_ops/__init__.py").read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: str(node.module) for node in typed.body for alias in node.names}
    assert homes == {name: f"ffcv_ops.{home}" for name, home in ffcv_ops._HOMES.items()}
    assert sorted(homes) == ffcv_ops.__all__ and set(ffcv_ops.__all__) <= set(dir(ffcv_ops))
    for name in ffcv_ops.__all__:
        assert f"`{name}`" in ffcv_ops.__doc__
        assert getattr(ffcv_ops, name).__name__ == name


def test_mypy_sees_the_types_of_an_installed_package(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ffcv_ops import CenterCrop, Mix\nreveal_type(CenterCrop(224).size)\nMix('many')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", run.python, "mine.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": "", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert 'Revealed type is "int"' in done.stdout, done.stdout
    assert 'has incompatible type "str"; expected "int"' in done.stdout
