"""The doctor on a machine that works, and on one with this or that broken: real files, limits, paths and processes."""

import argparse
import ast
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from betons import photographs, write_images

from ffcv_ops import _kernels, read_beton
from ffcv_ops.writing import command as write_command
from imagenet_training import doctor
from imagenet_training import doctor_checks as checks
from imagenet_training.planning.sections import Data
from imagenet_training.reports import wandb as wandb_runs

ROOT = Path(__file__).resolve().parents[1]
STDLIB_ONLY = [
    *(ROOT / "imagenet_training" / f"{name}.py" for name in ("__init__", "doctor", "doctor_checks")),
    *(ROOT / "ffcv_ops" / f"{name}.py" for name in ("__init__", "cgroups", "machine", "units")),
]


def ask(name, data=(), num_workers=2):
    """Run one check in a process of its own, and return its findings."""
    options = argparse.Namespace(data=[str(path) for path in data], num_workers=num_workers)
    return doctor.run_check(name, options)


def here(name, num_workers=2):
    """Run one check in this process, and return its findings."""
    return list(checks.CHECKS[name](argparse.Namespace(data=[], num_workers=num_workers)))


def put_first(monkeypatch, folder):
    """Let a check import the modules of a folder rather than the installed ones."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def run(*arguments, shell_before=""):
    """The whole doctor, as a user starts it: exit status, and findings by name."""
    command = f"{shell_before} exec {sys.executable} -m imagenet_training.doctor --json {' '.join(map(str, arguments))}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    findings = [doctor.Finding(**finding) for finding in report["findings"]]
    assert report["status"] == max((finding.status for finding in findings), key=doctor.STATUSES.index)
    return done.returncode, {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "train.beton", photographs(20))


@pytest.mark.soak
def test_where_all_is_well_there_is_no_error(data):
    status, found = run("--data", data.parent)
    assert status == 0, found
    assert found["Python"].text.startswith(f"{sys.version.split()[0]}, ")
    for name in ("packages", "OpenCV", "TurboJPEG", "Numba", "ffcv", "PyTorch", "torchvision", "train.beton"):
        assert found[name].status == "ok", found[name]
    assert "libturbojpeg" in found["TurboJPEG"].text and "8 images written, loaded and compared" in found["ffcv"].text
    assert found["train.beton"].text.startswith("20 images, 4.2 MB, on ")


def test_without_a_venv_that_works_it_takes_python3_and_says_what_to_install(tmp_path):
    for name in ("Makefile", "pyproject.toml", "ffcv_ops", "imagenet_training", "launch"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/nowhere/python")
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    path = os.pathsep.join([str(tmp_path / "bare/bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", "WANDB_MODE": "online"}
    done = subprocess.run(
        ["make", "--no-print-directory", "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    command, *lines = done.stdout.splitlines()
    assert command.strip() == "python3 -m imagenet_training.doctor"
    found = {line.split()[1]: (line, remedy) for line, remedy in zip(lines, lines[1:], strict=False)}
    assert found["Python"][0].startswith("ok ") and found["limits"][0].startswith("ok ")
    for name in ("packages", "memory", "OpenCV", "TurboJPEG", "ffcv", "PyTorch", "torchvision", "W&B", "data"):
        assert found[name][0].startswith("error ") and "ModuleNotFoundError: No module named " in found[name][0]
        assert found[name][1].strip() == "-> make setup"


def test_an_old_python_is_named_and_nothing_else_is_checked():
    # Beside the Python of the tests, as tools that manage several versions install them, or on the PATH.
    candidates = [*Path(sys.base_prefix).parent.glob("*/bin/python3.8"), shutil.which("python3.8") or "nothing"]
    old = next((path for path in candidates if shutil.which(path) and not subprocess.call([path, "-c", ""])), None)
    if old is None:
        pytest.skip("there is no Python 3.8")
    done = subprocess.run([old, "-m", "imagenet_training.doctor"], cwd=ROOT, capture_output=True, text=True)
    line, remedy, summary = done.stdout.splitlines()
    assert line.startswith("error    Python        3.8.") and remedy.strip() == "-> make setup PYTHON=python3.12"
    assert (done.returncode, summary, done.stderr) == (1, "0 ok, 0 warnings, 1 error", "")


def test_with_too_little_address_space_it_survives_and_says_so():
    status, found = run(shell_before="ulimit -v 400000;")
    assert status == 1
    assert found["limits"].status == "warning" and found["limits"].remedy == "ulimit -v unlimited"
    assert found["PyTorch"].status == "error" and found["PyTorch"].remedy == "ulimit -v unlimited"


def test_a_turbojpeg_that_is_not_there(monkeypatch):
    monkeypatch.setenv("TURBOJPEG", "/nowhere/libturbojpeg.so")
    (finding,) = ask("TurboJPEG")
    assert (finding.status, finding.remedy) == ("error", "unset TURBOJPEG")
    assert "/nowhere/libturbojpeg.so" in finding.text


def test_fewer_cpus_than_workers():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        (finding,) = ask("CPUs", num_workers=8)
    finally:
        os.sched_setaffinity(0, allowed)
    assert finding.status == "warning" and finding.text.startswith("1 of ") and "1 of 8 workers start" in finding.text
    assert "--cpus-per-task" in finding.remedy


@pytest.mark.parametrize(
    ("quota", "status", "remedy"),
    [(None, "ok", ""), (1.5, "warning", "--num_workers 1, or"), (0.5, "warning", "--num_workers 1, or"), (4, "ok", "")],
)
def test_loading_threads_against_the_time_of_cpus(monkeypatch, quota, status, remedy):
    monkeypatch.setattr(checks, "cpu_quota", lambda: quota)
    monkeypatch.setattr(checks, "allowed_cpus", lambda: 4)
    (finding,) = here("CPUs", num_workers=4)
    assert finding.status == status and finding.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("limits", "remedy"), [([], "end other processes"), ([(1 << 30, 0), (1 << 40, 0)], "sbatch --mem")]
)
def test_little_memory(monkeypatch, limits, remedy):
    monkeypatch.setattr(checks, "memory_limits", lambda: limits)
    monkeypatch.setattr(checks, "available_bytes", lambda: 1 << 30)
    (finding,) = here("memory")
    assert finding.status == "warning" and finding.remedy.startswith(remedy)
    assert finding.text.startswith("1.07 GB of " + ("1.07 GB available" if limits else ""))
    monkeypatch.setattr(checks, "available_bytes", lambda: 1 << 40)
    assert here("memory")[0].status == "ok"


def test_kernels_that_cannot_be_kept(monkeypatch):
    assert here("Numba")[0].status == "ok" and "__pycache__" in here("Numba")[0].text
    monkeypatch.setattr(_kernels, "CAN_CACHE", False)
    (finding,) = here("Numba")
    assert finding.status == "warning" and finding.remedy.startswith("export NUMBA_CACHE_DIR=")


def test_data_that_is_cut_missing_or_not_there_yet(data, tmp_path):
    cut, empty = tmp_path / "cut.beton", tmp_path / "empty"
    cut.write_bytes(data.read_bytes()[:-100])
    empty.mkdir()
    damaged, missing, folder = ask("data", [cut, tmp_path / "missing.beton", empty])
    assert damaged.status == missing.status == "error"
    assert damaged.text.startswith(f"{cut}: damaged or not a .beton file: ") and "no such file" in missing.text
    assert damaged.remedy == f"python write_beton.py --source FOLDER --target {cut} --overwrite"
    assert folder.status == "warning" and " free on " in folder.text and folder.remedy.endswith(f"{empty}/train.beton")


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("disk", [1.0, 1e12])
def test_the_disk_is_compared_with_the_cpus(monkeypatch, data, fits, disk):
    monkeypatch.setattr(checks, "cold_read_rate", lambda *arguments, **options: disk)
    storage, finding = checks.rates(read_beton(data), 1, fits)
    assert storage.name == "train storage" and " ms for a read of " in storage.text
    assert ("are of no use" in storage.text) == (disk == 1.0)
    rates = re.match(r"images/s: (\S+) decoded by 1 CPUs; (\S+) read from the disk, past the cache(.*)", finding.text)
    decoded, read = (int(rate.replace(",", "")) for rate in rates.groups()[:2])
    assert finding.name == "train rate" and decoded > 0
    assert (finding.status == "warning") == (read < decoded) == bool(finding.remedy) == bool(rates[3])
    assert not rates[3] or rates[3] == f": {'the first' if fits else 'every'} epoch waits for the disk"


def test_no_data_at_all():
    if any(Path(path).exists() for path in checks.DATA):
        pytest.skip("there is data in the default place")
    (finding,) = ask("data")
    assert finding.status == "warning" and "/fsx/ns1/train.beton" in finding.text and "write_beton.py" in finding.remedy


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = here("compiler")
    assert (finding.status, finding.remedy) == ("warning", "sudo apt-get install g++")


def test_a_package_out_of_its_range(monkeypatch, tmp_path):
    (tmp_path / "numba-0.59.dist-info").mkdir()
    (tmp_path / "numba-0.59.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: numba\nVersion: 0.59\n")
    put_first(monkeypatch, tmp_path)
    (finding,) = ask("packages")
    assert (finding.status, finding.remedy) == ("error", checks.setup_command(is_missing=True))
    assert re.fullmatch(r"numba 0\.59 is installed, numba\S*>=0\.61\S* is needed", finding.text)


def test_opencv_without_windows_is_opencv_too(monkeypatch):
    versions = {"opencv-python": None, "opencv-python-headless": "4.9.0.80"}
    of_package = checks._version
    monkeypatch.setattr(checks, "_version", lambda name: versions[name] if name in versions else of_package(name))
    (finding,) = here("packages")
    assert finding.status == "ok"
    versions["opencv-python-headless"] = "4.1"
    (finding,) = here("packages")
    assert "opencv-python 4.1 is installed, opencv-python>=4.8 is needed" in finding.text


def test_what_installs_is_no_command_that_would_do_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "_ROOT", tmp_path)
    command = checks.setup_command(is_missing=True)
    assert f"{sys.executable} -m pip install --force-reinstall 'ffcv<" in command, "a package, not a clone"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/setup.sh").touch()
    assert checks.setup_command(is_missing=True) == "make setup"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/setup.stamp").touch()
    assert checks.setup_command(is_missing=True) == "source .venv/bin/activate", "another Python than that of setup"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert checks.setup_command(is_missing=True) == "rm .venv/setup.stamp && make setup"
    assert checks.setup_command() == "rm -r .venv && make setup"


@pytest.mark.parametrize(
    ("cuda", "visible", "devices", "status", "text", "remedy"),
    [
        (None, "0", ["nvidiactl"], "error", "without CUDA", "-m pip install --force-reinstall torch torchvision"),
        ("13.0", "", ["nvidiactl"], "error", "CUDA_VISIBLE_DEVICES hides all", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", "0", ["nvidiactl"], "error", "RuntimeError: the driver is too old", checks._UPDATE_DRIVER),
        ("13.0", "0", [], "warning", "no NVIDIA GPU is visible", "docker run --gpus all"),
    ],
)
def test_a_gpu_that_cannot_be_used_has_a_reason_and_its_remedy(
    monkeypatch, cuda, visible, devices, status, text, remedy
):
    def ones(*shape, **settings):
        raise RuntimeError("the driver is too old")

    torch = SimpleNamespace(__version__="2.14", version=SimpleNamespace(cuda=cuda), ones=ones, float16=None)
    torch.cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(os.path, "exists", lambda path: Path(path).name in devices)
    *_, finding = here("PyTorch")
    assert finding.status == status and text in finding.text and finding.remedy.endswith(remedy)


def test_few_open_files():
    code = "from imagenet_training import doctor_checks as c; print(*next(c.check_limits(None)), sep='|')"
    command = f'ulimit -n 256; exec {sys.executable} -c "{code}"'
    said = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "warning|256 open files allowed|ulimit -n 1024|\n"


@pytest.mark.parametrize(
    ("body", "said", "remedy"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the check was ended by SIGSEGV", "rm -r .venv && make setup"),
        ("os._exit(3)", "the check ended with status 3", "rm -r .venv && make setup"),
        ("time.sleep(60)", "no answer after 2 s", ""),
        ("raise OSError('disk on fire')", "OSError: disk on fire", "sudo apt-get install libgl1 libglib2.0-0 libxcb1"),
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'", None),
    ],
)
def test_a_library_that_fails_is_a_finding(monkeypatch, tmp_path, body, said, remedy):
    (tmp_path / "cv2.py").write_text(f"import os, signal, time\n{body}\n")
    put_first(monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "_TIME_LIMIT_S", 2 if "sleep" in body else 60)
    remedy = checks.setup_command(is_missing=True) if remedy is None else remedy
    assert ask("OpenCV") == [("error", said, remedy, "OpenCV")]


def test_what_libraries_print_is_no_part_of_the_answer(monkeypatch, tmp_path):
    (tmp_path / "cv2.py").write_text("print('hello')\n__version__ = '5'\n")
    put_first(monkeypatch, tmp_path)
    assert ask("OpenCV") == [("ok", f"5, {tmp_path}/cv2.py", "", "OpenCV")]


@pytest.mark.soak
def test_a_home_without_a_wandb_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (finding,) = ask("W&B")
    assert finding.status == "warning" and "offline" in finding.text and "setup_wandb.sh" in finding.remedy


@pytest.mark.parametrize(
    ("mode", "key", "status"), [("online", False, "warning"), ("online", True, "ok"), ("disabled", False, "ok")]
)
def test_a_key_is_looked_for_if_runs_are_to_be_online(monkeypatch, mode, key, status):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb_runs, "has_wandb_key", lambda: key)
    (finding,) = here("W&B")
    assert finding.status == status


def test_the_requirements_are_those_of_the_project():
    assert "ffcv>=1.0.2,<1.1" in checks.requirements() and len(checks.requirements()) >= 15


def test_the_default_data_is_that_of_the_scripts():
    assert checks.DATA == (Data.train_dataset, Data.val_dataset)
    assert [Path(path).parent for path in checks.DATA] == [write_command.ROOT] * 2


@pytest.mark.parametrize("path", STDLIB_ONLY, ids=lambda path: path.name)
def test_it_can_be_read_where_nothing_is_installed_and_python_is_old(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    modules = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module).split(".")[0])
    assert modules - {"ffcv_ops", "imagenet_training"} <= sys.stdlib_module_names


def test_a_folder_is_on_a_file_system(tmp_path):
    assert checks.file_system(Path("/proc/self")) == "proc (/proc)"
    kind, mount = re.fullmatch(r"(\S+) \((.+)\)", checks.file_system(tmp_path)).groups()
    assert kind and str(tmp_path).startswith(mount)


@pytest.mark.parametrize("folder", [None, "/dev/shm"])  # a disk, and memory
def test_a_read_rate_is_measured(folder, tmp_path):
    path = Path(folder or tmp_path) / f"doctor_{os.getpid()}.bin"
    try:
        path.write_bytes(os.urandom(1 << 20) * 8)
        assert checks.cold_read_rate(path, 1 << 17, 2, time_s=0.1) > 1e6
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_color_is_for_terminals(environment, colored):
    master, terminal = pty.openpty()
    code = "from imagenet_training.doctor import Finding, _line\nprint(_line(Finding('error', 'bad', 'fix', 'it')))"
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    for stdout in (terminal, subprocess.PIPE):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**clean, "TERM": "xterm", **environment},
            stdout=stdout,
            check=True,
        )
    seen = os.read(master, 1000)
    os.close(master)
    os.close(terminal)
    assert (b"\x1b[31merror  \x1b[0m  it" in seen) is colored
    assert done.stdout.decode().splitlines() == ["error    it            bad", f"{'':23}-> fix"]
