"""The set-up script says what it needs, and leaves alone what is done; the demo's data is the same every time."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BASIC_TOOLS = ("awk", "bash", "cat", "cksum", "dirname", "env", "id", "paste", "uname")
NOBODY = 65534


@pytest.fixture
def clone() -> Iterator[Path]:
    """What the script reads, without .venv, where every user may look."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        clone = Path(folder) / "clone"
        for name in ("pyproject.toml", "constraints.txt", "launch/setup.sh"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
        yield clone


def set_up(
    clone: Path, *tools: str, python: str = sys.executable, user: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing on the PATH but its basic tools and those given."""
    path = clone.parent / "bin"
    path.mkdir()
    for tool in (*BASIC_TOOLS, *tools):
        target = shutil.which(tool)
        if target is None:
            pytest.skip(f"there is no {tool} here")
        (path / tool).symlink_to(target)
    return subprocess.run(
        [path / "bash", clone / "launch" / "setup.sh"],
        env={"PATH": str(path), "PYTHON": python},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        user=user,
    )


def test_without_apt_it_names_the_packages_of_every_manager(clone: Path) -> None:
    done = set_up(clone)
    assert done.returncode == 1
    assert "there is no apt here" in done.stderr
    lines = {line.split()[0]: line for line in done.stderr.splitlines() if line.startswith("  ")}
    assert "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev" in lines["apt"]
    assert "dnf install gcc-c++ pkgconf-pkg-config opencv-devel turbojpeg-devel" in lines["dnf"]
    assert "brew install pkgconf opencv jpeg-turbo" in lines["brew"]
    assert "conda-forge cxx-compiler pkg-config libopencv libjpeg-turbo" in lines["conda"]
    assert not (clone / ".venv").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that every user may run")
def test_without_root_or_sudo_it_asks_only_for_what_is_missing(clone: Path) -> None:
    done = set_up(clone, "apt-get", "c++", python="/usr/bin/python3", user=NOBODY)
    assert done.returncode == 1
    assert "you are not root, and there is no sudo" in done.stderr
    assert "pkg-config libopencv-dev" in done.stderr
    assert "g++" not in done.stderr


def wheel_name(glibc: str, tag: str = "cp310-abi3") -> str:
    return f"ffcv-1.0.2-{tag}-manylinux_{glibc}_{platform.machine()}.whl"


OWN = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        (wheel_name("2_17"), True),
        (wheel_name("2_99"), False),
        (wheel_name("2_17", f"{OWN}-{OWN}"), True),
        (wheel_name("2_17", "cp39-cp39"), False),
    ],
)
def test_a_wheel_of_ffcv_that_fits_spares_what_building_needs(clone: Path, name: str, fits: bool) -> None:
    (clone / "dist").mkdir()
    (clone / "dist" / name).touch()
    asked = (
        f"source {clone}/launch/setup.sh; wheel=$(find_wheel {sys.executable}); echo [$wheel]; missing {sys.executable}"
    )
    found = subprocess.run(
        ["bash", "-c", asked], env={**os.environ, "CXX": "no-compiler"}, capture_output=True, text=True
    )
    wheel, _, needs = found.stdout.partition("\n")
    assert wheel == (f"[dist/{name}]" if fits else "[]")
    assert ("compiler" in needs) is not fits


def test_who_lacks_a_compiler_is_told_of_the_wheel(clone: Path) -> None:
    assert "run make ffcv-wheel on a machine that has these" in set_up(clone).stderr


@pytest.mark.soak
def test_the_wheel_of_ffcv_brings_its_libraries(clone: Path, tmp_path: Path) -> None:
    """Needs a compiler, the libraries' headers and a package index."""
    shutil.copy(ROOT / "launch/ffcv_wheel.sh", clone / "launch")
    subprocess.run(["bash", clone / "launch/ffcv_wheel.sh"], env={**os.environ, "PYTHON": sys.executable}, check=True)
    (wheel,) = clone.glob("dist/*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, wheel]
    subprocess.run(pip, check=True)
    code = "import ffcv; from ffcv_ops.codec import jpeg; print(jpeg.turbojpeg()._name); jpeg.open_decompressor()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()).parent == tmp_path / "ffcv.libs"
    assert wheel.name.startswith("ffcv-1.0.2-cp310-abi3-")
    (extension,) = tmp_path.glob("ffcv/_libffcv.abi3.so")
    linked = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
    system = {"libc", "libm", "libpthread", "libdl", "librt", "libz", "libgcc_s", "libstdc++", "linux-vdso"}
    for line in linked.splitlines():
        name, _, place = line.partition("=>")
        assert "ffcv.libs" in place or name.split(".so")[0].strip().split("/")[-1] in {*system, "ld-linux-x86-64"}, line


def test_an_interpreter_that_does_not_fit_is_refused(clone: Path) -> None:
    done = set_up(clone, python="/no/such/python")
    assert done.returncode == 1
    assert "PYTHON=/no/such/python is no Python from 3.10 to 3.14" in done.stderr


def test_what_is_done_is_left_alone() -> None:
    stamp = ROOT / ".venv/setup.stamp"
    checksum = "cat pyproject.toml constraints.txt launch/setup.sh | cksum"
    made_from = stamp.read_text().splitlines() if stamp.exists() else []
    if made_from[::2] != [subprocess.check_output(checksum, shell=True, cwd=ROOT, text=True).strip(), str(ROOT)]:
        pytest.skip("make setup is due here")
    before = stamp.stat().st_mtime_ns
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    done = subprocess.run(
        ["bash", ROOT / "launch/setup.sh"], env={**os.environ, "PYTHON": python}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stamp.stat().st_mtime_ns == before


def test_an_environment_that_was_moved_is_made_anew(clone: Path) -> None:
    venv.create(clone / ".venv", with_pip=False, symlinks=True)
    (packages,) = clone.glob(".venv/lib/python*/site-packages")
    (packages / "pip.py").touch()

    def serves() -> bool:
        asked = ["bash", "-c", f"source launch/setup.sh; serves {sys.executable}"]
        return subprocess.run(asked, cwd=clone).returncode == 0

    assert serves()
    clone = clone.rename(clone.with_name("moved"))
    assert not serves(), "its scripts, activate among them, lead to the old folder"


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_the_digits_are_an_image_folder_and_always_the_same(tmp_path: Path) -> None:
    script = ROOT / "launch/make_digits.py"
    subprocess.run([sys.executable, script, tmp_path / "first"], check=True, capture_output=True)
    files = images(tmp_path / "first")
    assert sum(name.startswith("train/") for name in files) == 1433
    assert sum(name.startswith("val/") for name in files) == 364
    for split in ("train", "val"):
        assert sorted(path.name for path in (tmp_path / "first" / split).iterdir()) == [str(d) for d in range(10)]
    with Image.open(tmp_path / "first" / next(iter(files))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    assert len({name.rpartition("/")[2] for name in files}) == len(files)
    runpy.run_path(str(script))["make_digits"](tmp_path / "second")
    assert images(tmp_path / "second") == files
