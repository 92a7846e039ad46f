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
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from betons import photographs, write_images

import write_beton
from ffcv_ops import cgroups as control_groups
from ffcv_ops import read_beton
from imagenet_training import doctor, logs
from imagenet_training import doctor_checks as checks
from imagenet_training import doctor_storage as storage
from imagenet_training.doctor_training import check_wandb, efa_adapters
from imagenet_training.recipe import RECIPE

ROOT = Path(__file__).resolve().parents[1]
STDLIB_ONLY = [
    ROOT / "ffcv_ops" / f"{name}.py" for name in ("__init__", "doctor", "checks", "control_groups", "storage")
]


def ask(check, data=(), num_workers=-1):
    """What one check finds, in a process of its own as ever."""
    options = argparse.Namespace(data=[str(path) for path in data], num_workers=num_workers)
    return list(doctor._ask(check if isinstance(check, str) else doctor._target(check), options))


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
    for name in ("packages", "OpenCV", "TurboJPEG", "ffcv", "PyTorch", "train.beton"):
        assert found[name].status == "ok", found[name]
    assert "libturbojpeg" in found["TurboJPEG"].text and "8 images written, loaded and compared" in found["ffcv"].text
    assert found["train.beton"].text.startswith("20 images, 4 MB, on ")


def test_without_a_venv_that_works_it_takes_python3_and_says_what_to_install(tmp_path):
    for name in ("Makefile", "pyproject.toml", "ffcv_ops", "launch"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/nowhere/python")
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    path = os.pathsep.join([str(tmp_path / "bare/bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    done = subprocess.run(
        ["make", "--no-print-directory", "doctor"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    command, *lines = done.stdout.splitlines()
    assert command.strip() == "python3 -m imagenet_training.doctor"
    found = {line.split()[1]: (line, remedy) for line, remedy in zip(lines, lines[1:], strict=False)}
    assert found["Python"][0].startswith("ok ") and found["packages"][0].startswith("error ")
    assert "numba" in found["packages"][0]
    for name in ("packages", "OpenCV", "ffcv", "PyTorch"):
        assert found[name][1].strip() == "-> make setup"


def test_with_too_little_address_space_it_survives_and_says_so():
    status, found = run(shell_before="ulimit -v 400000;")
    assert status == 1
    assert found["limits"] == doctor.Finding("warning", "limits", found["limits"].text, "ulimit -v unlimited")
    assert found["PyTorch"].status == "error" and found["PyTorch"].remedy == "ulimit -v unlimited"


def test_a_turbojpeg_that_is_not_there(monkeypatch):
    monkeypatch.setenv("TURBOJPEG", "/nowhere/libturbojpeg.so")
    (finding,) = ask(checks.check_turbojpeg)
    assert (finding.status, finding.remedy) == ("error", "unset TURBOJPEG")
    assert "/nowhere/libturbojpeg.so" in finding.text


def test_a_module_that_hides_an_installed_one(monkeypatch, tmp_path):
    (tmp_path / "ffcv.py").write_text("raise RuntimeError('not the real one')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (finding,) = ask(checks.check_ffcv)
    assert finding.status == "error" and finding.text.startswith(f"{tmp_path}/ffcv.py hides the installed one: ")
    assert finding.remedy.startswith(f"remove {tmp_path} from PYTHONPATH")


def test_fewer_cpus_than_workers():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        (finding,) = ask(checks.check_cpus, num_workers=8)
    finally:
        os.sched_setaffinity(0, allowed)
    assert finding.status == "warning" and finding.text.startswith("1 of ") and "of 8 workers 1 are" in finding.text
    assert "--cpus-per-task" in finding.remedy


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/cpu.max": "150000 100000\n"}, 1.5),
        ({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": "max 100000\n"}, None),
        ({"/proc/self/cgroup": "0::/../gone\n", "/sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "/proc/self/cgroup": "9:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/\n",
                "/sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_the_time_that_control_groups_leave(monkeypatch, files, quota):
    for module in (control_groups, checks):
        monkeypatch.setattr(module, "read", lambda path: files.get(str(path), ""))
    assert checks.cpu_quota() == quota
    asked = argparse.Namespace(num_workers=1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(1000)))
    (finding,) = checks.check_cpus(asked)
    assert finding[0] == ("ok" if quota is None else "warning")
    assert quota is None or finding[3].startswith(f"--num_workers {int(quota)},")


def test_data_that_is_cut_missing_or_not_there_yet(data, tmp_path):
    cut, empty = tmp_path / "cut.beton", tmp_path / "empty"
    cut.write_bytes(data.read_bytes()[:-100])
    empty.mkdir()
    folder, damaged, missing = ask(checks.check_data, [cut, tmp_path / "missing.beton", empty])
    assert damaged.status == missing.status == "error"
    assert damaged.text.startswith("damaged or not a .beton file: ") and missing.text == "no such file"
    assert damaged.remedy == f"python write_beton.py --source FOLDER --target {cut} --overwrite"
    assert folder.status == "warning" and " free on " in folder.text and folder.remedy.endswith(f"{empty}/train.beton")


@pytest.mark.parametrize("fits", [True, False])
def test_the_disk_is_compared_with_the_cpus(data, fits):
    status, name, text, *remedy = checks._reading(read_beton(data), 1, fits)
    rates = re.fullmatch(
        r"images/s: (\S+) decoded by 1 CPUs; from the disk, past the cache, (\S+) by pages, (\S+) one by one(.*)", text
    )
    decoded, pages, images = (int(rate.replace(",", "")) for rate in rates.groups()[:3])
    assert name == "train rate" and min(decoded, pages, images) > 0
    assert (status == "warning") == ((images if fits else pages) < decoded) == bool(remedy) == bool(rates[4])


def test_no_data_at_all():
    if any(Path(path).exists() for path in checks.DATA):
        pytest.skip("there is data in the default place")
    (finding,) = ask(checks.check_data)
    assert finding.status == "warning" and "/fsx/ns1/train.beton" in finding.text and "write_beton.py" in finding.remedy


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = ask(checks.check_compiler)
    assert (finding.status, finding.remedy) == ("warning", "sudo apt-get install g++")


def test_a_package_out_of_its_range(monkeypatch, tmp_path):
    (tmp_path / "numba-0.59.dist-info").mkdir()
    (tmp_path / "numba-0.59.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: numba\nVersion: 0.59\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (finding,) = ask(checks.check_packages)
    assert finding == ("error", "packages", "numba 0.59 is not >=0.61", checks.install_command())


def test_what_installs_is_no_command_that_would_do_nothing(monkeypatch, tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/setup.sh").touch()
    monkeypatch.setattr(checks, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert checks.install_command() == "make setup"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/setup.stamp").touch()
    assert checks.install_command() == "source .venv/bin/activate", "another Python than that of setup"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert checks.install_command() == "rm .venv/setup.stamp && make setup"


@pytest.mark.parametrize(
    ("cuda", "visible", "reason", "remedy"),
    [
        (None, "0", "this PyTorch was built without CUDA", "-m pip install --force-reinstall torch torchvision"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES= hides all", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", "0", "RuntimeError: the driver is too old", checks._UPDATE_DRIVER),
    ],
)
def test_a_gpu_that_cannot_be_used_has_a_reason_and_its_remedy(monkeypatch, cuda, visible, reason, remedy):
    def init():
        raise RuntimeError("the driver is too old")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(init=init))
    said, mends = checks._why_no_gpu(torch)
    assert said == reason and mends.endswith(remedy)


def test_few_open_files():
    command = (
        f"ulimit -n 256; exec {sys.executable} -c 'from ffcv_ops import checks; print(*checks.check_limits(None))'"
    )
    said = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "('warning', 'limits', '256 open files allowed', 'ulimit -n 1024')\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the check was ended by SIGSEGV"),
        ("os._exit(3)", "the check could not be run"),
        ("time.sleep(60)", "no answer after 1 s: it hangs"),
        ("raise OSError('disk on fire')", "OSError: disk on fire"),
    ],
)
def test_a_check_that_fails_is_a_finding(monkeypatch, tmp_path, body, said):
    (tmp_path / "broken.py").write_text(f"import os, signal, time\n\n\ndef check_it(options):\n    {body}\n    yield\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(doctor, "_TIME_LIMIT_S", 1 if "sleep" in body else 60)
    (finding,) = ask("broken:check_it")
    assert finding[:3] == ("error", "it", said)


def test_what_libraries_print_is_no_part_of_the_answer(monkeypatch, tmp_path):
    (tmp_path / "loud.py").write_text("def check_it(options):\n    print('hello')\n    yield 'ok', 'it', 'fine'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert ask("loud:check_it") == [("ok", "it", "fine", "")]


@pytest.mark.soak
def test_the_training_side_without_a_wandb_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    models, *_, wandb = ask("imagenet_training.doctor_training:check_training")
    assert models.status == "ok" and models.text == f"torchvision {version('torchvision')}, timm {version('timm')}"
    assert wandb.status == "warning" and "offline" in wandb.text and "setup_wandb.sh" in wandb.remedy


@pytest.mark.parametrize(
    ("mode", "key", "status"), [("online", False, "warning"), ("online", True, "ok"), ("disabled", False, "ok")]
)
def test_a_key_is_asked_for_where_runs_are_to_be_online(monkeypatch, mode, key, status):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(logs, "has_wandb_key", lambda: key)
    (finding,) = check_wandb()
    assert finding[0] == status


def test_efa_is_told_from_other_adapters(tmp_path):
    for device, driver in (("mlx5_0", "mlx5_core"), ("rdmap0s6", "efa"), ("rdmap1s6", "efa")):
        (tmp_path / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (tmp_path / "class" / device / "device").mkdir(parents=True)
        (tmp_path / "class" / device / "device/driver").symlink_to(tmp_path / "drivers" / driver)
    assert efa_adapters(tmp_path / "class") == ["rdmap0s6", "rdmap1s6"]
    assert efa_adapters(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("version", "ranges", "fits"),
    [
        ("1.0.2", ">=1.0.2,<1.1", True),
        ("1.1.0", ">=1.0.2,<1.1", False),
        ("1.0.1", ">=1.0.2,<1.1", False),
        ("0.9", ">=0.61", False),
        ("0.61.0rc1", ">=0.61", True),
        ("2.14.1+cu130", ">=2.6", True),
        ("84.2.1", ">=70", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, ranges, fits):
    assert checks.in_range(version, ranges) is fits


def test_the_ranges_are_those_it_can_read():
    requirements = checks._requirements()
    assert requirements["ffcv"] == ">=1.0.2,<1.1" and len(requirements) >= 15
    for ranges in requirements.values():
        assert all(part.startswith((">=", "<")) and part[-1].isdigit() for part in ranges.split(",")), ranges


def test_the_default_data_is_that_of_the_scripts():
    recipe = {".".join(path): param.default for path, param in RECIPE.entries.items()}
    assert checks.DATA == (recipe["data.train_dataset"], recipe["data.val_dataset"])
    assert [Path(path).parent for path in checks.DATA] == [write_beton.ROOT] * 2


@pytest.mark.parametrize("path", STDLIB_ONLY, ids=lambda path: path.name)
def test_it_can_be_read_where_nothing_is_installed_and_python_is_old(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    modules = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module).split(".")[0])
    assert modules - {"ffcv_ops"} <= sys.stdlib_module_names
    assert "__future__" in modules, "annotations of today would be evaluated"


def test_a_folder_is_on_a_file_system(tmp_path):
    assert storage.filesystem("/proc/self") == ("proc", "/proc")
    kind, mount = storage.filesystem(tmp_path)
    assert kind != "unknown" and str(tmp_path).startswith(mount)


@pytest.mark.parametrize("folder", [None, "/dev/shm"])  # a disk, and memory, which has no O_DIRECT on older kernels
def test_a_read_rate_is_measured(folder, tmp_path):
    path = Path(folder or tmp_path) / f"doctor_{os.getpid()}.bin"
    try:
        path.write_bytes(os.urandom(1 << 20) * 8)
        assert storage.cold_read_rate(path, 1 << 17, 2, time_s=0.1) > 1e6
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_color_is_for_terminals(environment, colored):
    master, terminal = pty.openpty()
    code = "from imagenet_training.doctor import Finding, _line\nprint(_line(Finding('error', 'it', 'bad', 'fix')))"
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
