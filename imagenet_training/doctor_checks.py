"""What the doctor looks at on the way from disk to batch.

A check is a function of the doctor's options (``data``: list of paths; ``num_workers``: int) that yields findings:
(status, name, text) or (status, name, text, remedy), see `doctor.Finding`. It imports what it asks about.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ffcv_ops.cgroups import control_groups, read
from ffcv_ops.machine import allowed_cpus
from ffcv_ops.units import show_bytes
from imagenet_training import doctor_storage as storage

DATA = "/fsx/ns1/train.beton", "/fsx/ns1/val.beton"
"""Where write_beton.py puts files and train_imagenet.py expects them, unless told otherwise."""
_DISTRIBUTION = "ffcv-imagenet-toolkit"
_ROOT = Path(__file__).resolve().parents[1]
_MIN_OPEN_FILES = 1024
_MIN_MEMORY_BYTES = 4e9
_MIN_SHARED_BYTES_A_GPU = 1 << 28
# Smaller files say nothing about a disk.
_MIN_MEASURED_BYTES = 1 << 26
_PAGE_BYTES, _PAGE_READERS = 1 << 23, 12
_UPDATE_DRIVER = (
    "update the driver, or install a PyTorch for its CUDA: https://pytorch.org/get-started/previous-versions"
)

Finding = tuple
Options = argparse.Namespace


def check_python(options: Options) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info < (3, 14):
        yield "ok", "Python", f"{version}, {_short(sys.executable)}"
    else:
        text = f"{version}, {_short(sys.executable)}: 3.10 to 3.13 are needed; nothing else was looked at"
        yield "error", "Python", text, "make setup PYTHON=python3.12"


def check_packages(options: Options) -> Iterator[Finding]:
    requirements = _requirements()
    missing, wrong = [], []
    for name, ranges in requirements.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if not in_range(version, ranges):
            wrong.append(f"{name} {version} is not {ranges}")
    if missing:
        wrong.insert(0, f"not installed: {', '.join(missing)}")
    if wrong:
        yield "error", "packages", "; ".join(wrong), install_command()
    else:
        yield "ok", "packages", f"{len(requirements)}, all in their ranges"


def check_compiler(options: Options) -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or "c++"
    path = shutil.which(compiler)
    if path is None:
        text = f"no {compiler} on the PATH: neither building ffcv nor torch.compile can work here"
        yield "warning", "compiler", text, "sudo apt-get install g++"
    else:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        yield "ok", "compiler", f"{said.splitlines()[0] if said else 'of unknown version'}, {path}"


def check_opencv(options: Options) -> Iterator[Finding]:
    cv2, trouble = _try_import("cv2")
    if trouble:
        is_system = re.search(r"lib\S+\.so\S*: cannot open", trouble[0])
        remedy = "sudo apt-get install libgl1 libglib2.0-0 libxcb1" if is_system else trouble[1]
        yield "error", "OpenCV", trouble[0], remedy
    else:
        yield "ok", "OpenCV", f"{cv2.__version__}, {_short(cv2.__file__)}"


def check_turbojpeg(options: Options) -> Iterator[Finding]:
    from ffcv_ops.codec import jpeg

    try:
        jpeg.turbojpeg()
    except ImportError as error:
        tried = [line.strip() for line in str(error).splitlines()[1:]]
        remedy = "unset TURBOJPEG" if os.environ.get("TURBOJPEG") else "sudo apt-get install libturbojpeg0-dev"
        yield "error", "TurboJPEG", f"2.1 or later was not found; tried {'; '.join(tried)}", remedy
        return
    path = _loaded_library("turbojpeg")
    version = re.search(rb"libjpeg-turbo version ([\d.]+)", Path(path).read_bytes()) if path else None
    yield "ok", "TurboJPEG", f"{version[1].decode() if version else 'of unknown version'}, {_short(path or '?')}"


def _loaded_library(name: str) -> str | None:
    """The path of a shared library in this process whose file name has `name` in it."""
    lines = Path("/proc/self/maps").read_text().splitlines() if os.path.exists("/proc/self/maps") else []
    return next((line.split(maxsplit=5)[5] for line in lines if name in line.rpartition("/")[2]), None)


def check_ffcv(options: Options) -> Iterator[Finding]:
    """Write images with our writer, load them with ours and with FFCV's compiled decoder, compare the pixels."""
    # Which makes ffcv importable where Python has no distutils.
    _, trouble = _try_import("ffcv_ops._ffcv", blame="ffcv")
    if trouble:
        yield "error", "ffcv", *trouble
        return
    start_s = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="ffcv_doctor_") as folder:
            num_images = round_trip(Path(folder))
    except Exception as error:
        text = f"{metadata.version('ffcv')} imports, but a round trip fails: {_one_line(error)}"
        yield "error", "ffcv", text, reinstall_command()
        return
    time_s = time.perf_counter() - start_s
    text = f"{metadata.version('ffcv')}; {num_images} images written, loaded and compared in {time_s:.1f} s"
    yield "ok", "ffcv", text


def round_trip(folder: Path) -> int:
    """Write a few images as JPEG and raw, load them by our decoder and by FFCV's, and compare.

    Parameters
    ----------
    folder : Path
        Empty, for images and file.

    Returns
    -------
    int
        The number of images.

    Raises
    ------
    ValueError
        If pixels or labels differ.
    """
    import numpy as np
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from PIL import Image

    from ffcv_ops import CenterCrop, Label, Loader
    from ffcv_ops.beton import layout as beton
    from ffcv_ops.codec import jpeg
    from ffcv_ops.writing.writer import WriteSettings, write

    size, num_images = 64, 8
    y, x, channel = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    images = [(y * i + x * (7 - i)) // 4 + 40 * channel for i in range(num_images)]
    images = [image.astype(np.uint8) for image in images]
    for label, image in enumerate(images):
        (folder / "images" / str(label)).mkdir(parents=True)
        Image.fromarray(image).save(folder / "images" / str(label) / "0.png")
    file = folder / "images.beton"
    write(folder / "images", file, WriteSettings(mode="proportion"), num_workers=1, notice=lambda text: None)
    written = beton.read_beton(file)
    is_raw = dict(zip(written.labels.tolist(), written.column("image")["mode"] == beton.MODE_RAW, strict=True))
    for decoder in (CenterCrop(size, ratio=1), SimpleRGBImageDecoder()):
        with Loader(file, num_images, 1, pipelines={"image": [decoder], "label": [Label()]}, copy=True) as loader:
            ((loaded, labels),) = loader.epoch(0)
            for pixels, label in zip(np.asarray(loaded), np.asarray(labels).ravel().tolist(), strict=True):
                expected = images[label] if is_raw[label] else jpeg.decode(jpeg.encode(images[label]))
                # Neither rounds as the accurate decoder does: ours converts colours itself, FFCV's has the fast DCT.
                if np.abs(pixels.astype(int) - expected).max() > 2 * (not is_raw[label]):
                    raise ValueError(f"{type(decoder).__name__} gives other pixels than were written")
    return num_images


def check_pytorch(options: Options) -> Iterator[Finding]:
    torch, trouble = _try_import("torch")
    if trouble:
        yield "error", "PyTorch", *trouble
        return
    driver = _driver()
    no_driver = driver is None and not Path("/dev/nvidiactl").exists()
    driver = driver or "driver unknown"
    about = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")
    if torch.cuda.is_available():
        yield "ok", "PyTorch", f"{about}; {driver}"
        for number in range(torch.cuda.device_count()):
            yield _gpu(torch, number)
    elif no_driver:
        yield "ok", "PyTorch", about
        text = "no NVIDIA GPU to be seen: everything runs on the CPU"
        yield "warning", "GPU", text, "none on a machine without one; in a container: docker run --gpus all"
    else:
        reason, remedy = _why_no_gpu(torch)
        yield "error", "PyTorch", f"{about}; {driver}, but no GPU can be used: {reason}", remedy


def _driver() -> str | None:
    """The NVIDIA driver's version and the newest CUDA it supports, as nvidia-smi tells them."""
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"Driver Version: *([\d.]+)", said)
    cuda = re.search(r"CUDA Version: *([\d.]+)", said)
    return f"driver {version[1]} for CUDA up to {cuda[1]}" if version and cuda else None


def _why_no_gpu(torch: Any) -> tuple[str, str]:
    """Why PyTorch uses none of the GPUs that there are, and what mends it."""
    if torch.version.cuda is None:
        remedy = f"{_short(sys.executable)} -m pip install --force-reinstall torch torchvision"
        return "this PyTorch was built without CUDA", remedy
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden} hides all", "unset CUDA_VISIBLE_DEVICES"
    try:
        torch.cuda.init()
    except Exception as error:
        return _one_line(error), _UPDATE_DRIVER
    return "PyTorch gives no reason", _UPDATE_DRIVER


def _gpu(torch: Any, number: int) -> Finding:
    """A GPU: its name, its memory, whether it computes, what is known of its JPEG engine."""
    properties = torch.cuda.get_device_properties(number)
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
    try:
        ones = torch.ones(256, 256, device=f"cuda:{number}", dtype=torch.float16)
        assert (ones @ ones)[0, 0].item() == 256
    except Exception as error:
        return "error", f"GPU {number}", f"{name}: does not compute: {_one_line(error)}", _UPDATE_DRIVER
    return "ok", f"GPU {number}", f"{name}{_jpeg_engine(properties.uuid)}"


def _jpeg_engine(uuid: object) -> str:
    """What the driver tells of an engine for JPEGs: it counts the use of one, or says nothing."""
    try:
        command = ["nvidia-smi", "-q", "-d", "UTILIZATION", "-i", f"GPU-{uuid}"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return ", the driver counts a JPEG engine" if re.search(r"JPEG *: *\d", said) else ""


def check_cpus(options: Options) -> Iterator[Finding]:
    total, allowed, quota = os.cpu_count() or 1, allowed_cpus(), cpu_quota()
    usable = max(1, min(allowed, int(quota or allowed)))
    asked = options.num_workers if options.num_workers > 0 else allowed
    text = f"{allowed} of {total} allowed to this process" + ("" if quota is None else f", time of {quota:g}")
    widen = "taskset, sbatch --cpus-per-task, docker --cpuset-cpus"
    if asked > usable and quota is not None and quota < allowed:
        remedy = f"--num_workers {usable}, or more time (docker --cpus)"
        yield "warning", "CPUs", f"{text}: {asked} loading threads would be throttled", remedy
    elif asked > allowed:
        yield "warning", "CPUs", f"{text}: of {asked} workers {allowed} are started", f"allow more of them: {widen}"
    elif allowed == 1 and total > 1:
        yield "warning", "CPUs", f"{text}: one thread loads, and shares its CPU", f"allow more of them: {widen}"
    else:
        yield "ok", "CPUs", f"{text}; {asked} workers"


def cpu_quota() -> float | None:
    """The CPU time a second that control groups leave this process, in CPUs; None where they set no limit."""
    quotas = []
    for folder in control_groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            limit = " ".join(read(folder / file) for file in files).split()
            if len(limit) == 2 and limit[0].isdigit():
                quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def check_limits(options: Options) -> Iterator[Finding]:
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        text = f"address space is limited to {show_bytes(address_space)}: files are mapped, and PyTorch reserves much"
        yield "warning", "limits", text, "ulimit -v unlimited"
    if 0 <= open_files < _MIN_OPEN_FILES:
        yield "warning", "limits", f"{open_files} open files allowed", f"ulimit -n {_MIN_OPEN_FILES}"
    elif address_space == resource.RLIM_INFINITY:
        yield "ok", "limits", f"{open_files} open files"


def check_memory(options: Options) -> Iterator[Finding]:
    from ffcv_ops.loading.storage import available_bytes

    available = available_bytes()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{show_bytes(available)} of {show_bytes(total)} available, page cache included"
    if available < _MIN_MEMORY_BYTES:
        yield "warning", "memory", f"{text}: little for training", "end what else runs here (top -o %MEM)"
    else:
        yield "ok", "memory", text


def check_shared_memory(options: Options) -> Iterator[Finding]:
    """/dev/shm, by which NCCL joins the GPUs of a machine."""
    if not os.path.isdir("/dev/shm"):
        yield "warning", "/dev/shm", "not there: several GPUs cannot exchange data by it", "mount -t tmpfs shm /dev/shm"
        return
    free, num_gpus = shutil.disk_usage("/dev/shm").free, len(list(Path("/dev").glob("nvidia[0-9]*")))
    if num_gpus > 1 and free < num_gpus * _MIN_SHARED_BYTES_A_GPU:
        text = f"{show_bytes(free)} free: little for {num_gpus} GPUs"
        yield "warning", "/dev/shm", text, "docker run --shm-size=8g, or --ipc=host"
    else:
        yield "ok", "/dev/shm", f"{show_bytes(free)} free"


def check_data(options: Options) -> Iterator[Finding]:
    """The files to be read: whether they are whole, whether they fit into memory, how fast they can be read."""
    given = [Path(path) for path in options.data]
    paths = given or [Path(path) for path in DATA if os.path.exists(path)]
    if not paths:
        remedy = "python write_beton.py --split train  # or --data FILE ..., where it is elsewhere"
        yield "warning", "data", f"{' and '.join(DATA)} are not there", remedy
        return
    files = []
    for path in paths:
        inside = sorted(path.glob("*.beton")) if path.is_dir() else [path]
        files += inside
        if not inside:
            yield _empty_folder(path)
    from ffcv_ops.beton.layout import read_beton
    from ffcv_ops.loading.storage import available_bytes

    sound = []
    for file in files:
        try:
            beton = read_beton(file)
        except ValueError as error:
            text = re.sub("; write.*", "", str(error).replace(f"{file}: ", ""))
            yield "error", file.name, text, f"python write_beton.py --source FOLDER --target {file} --overwrite"
            continue
        sound.append(beton)
        kind, mount = storage.filesystem(file)
        text = f"{beton.num_samples:,} images, {show_bytes(beton.size_bytes)}, on {kind} ({mount})"
        yield "ok", file.name, text
    fits = sum(beton.size_bytes for beton in sound) <= available_bytes()
    for beton in sound:
        if beton.size_bytes >= _MIN_MEASURED_BYTES:
            yield _reading(beton, options.num_workers, fits)
    if sound and not fits:
        text = f"together {show_bytes(sum(beton.size_bytes for beton in sound))}, more than the memory available"
        yield "warning", "data", text, "--data.in_memory=0 --data.order=quasi_random"


def _empty_folder(path: Path) -> Finding:
    """A folder for files to come: whether they can be written there."""
    kind, mount = storage.filesystem(path)
    text = f"no .beton file, {show_bytes(shutil.disk_usage(path).free)} free on {kind} ({mount})"
    if not os.access(path, os.W_OK):
        return (
            "error",
            str(path),
            f"{text}, and not to be written to",
            f"sudo chown $USER {path}  # where it is mounted to be written to",
        )
    return "warning", str(path), text, f"python write_beton.py --source FOLDER --target {path}/train.beton"


def _reading(beton: Any, num_workers: int, fits: bool) -> Finding:
    """What the disk gives from a file, against what the CPUs can decode of it."""
    name = f"{beton.path.stem} rate"
    workers = min(num_workers, allowed_cpus()) if num_workers > 0 else allowed_cpus()
    image_bytes = (beton.alloc_table_ptr - beton.data_start) / beton.num_samples
    ways = (-(-int(image_bytes) // 4096) * 4096, workers), (_PAGE_BYTES, _PAGE_READERS)
    try:
        images, pages = (storage.cold_read_rate(beton.path, *way) / image_bytes for way in ways)
        decoded = _load_rate(beton, workers)
    except Exception as error:
        remedy = f"python write_beton.py --verify {beton.path}"
        return "error", name, _one_line(error), install_command() if isinstance(error, ImportError) else remedy
    text = (
        f"images/s: {decoded:,.0f} decoded by {workers} CPUs; from the disk, past the cache, {pages:,.0f} by pages, "
        f"{images:,.0f} one by one"
    )
    if fits and images < decoded:
        remedy = f"cat {beton.path} >/dev/null  # brings it into memory"
        return "warning", name, f"{text}: the first epoch waits for it", remedy
    if not fits and pages < decoded:
        return "warning", name, f"{text}: every epoch waits for it", "a faster disk, or write_beton.py --max_side 400"
    return "ok", name, text


def _load_rate(beton: Any, workers: int, time_s: float = 1.5) -> float:
    """Images/s that threads decode to random crops of 224 px, from memory."""
    from ffcv_ops import Label, Loader, RandomResizedCrop

    num_images = min(beton.num_samples, 64 * workers)
    pipelines = {"image": [RandomResizedCrop(224)], "label": [Label()]}
    ids = range(num_images)
    with Loader(beton.path, min(64, num_images), workers, pipelines=pipelines, indices=ids, drop_last=False) as loader:
        for _ in loader:  # into memory, and whatever happens once
            pass
        done, start_s = 0, time.perf_counter()
        while time.perf_counter() - start_s < time_s:
            for _ in loader:
                pass
            done += num_images
        return done / (time.perf_counter() - start_s)


CHECKS: tuple[Callable[[Options], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_cpus,
    check_limits,
    check_memory,
    check_shared_memory,
    check_compiler,
    check_opencv,
    check_turbojpeg,
    check_ffcv,
    check_pytorch,
)


# ---------------------------------------------------------------------------------------------------------------------
# What the checks share


def _try_import(module: str, blame: str | None = None) -> tuple[Any, tuple[str, str] | None]:
    """Import a module; on failure say what happened to it, or to the package to `blame`, and what mends it.

    A module elsewhere than where its package was installed is the likeliest reason, and the hardest to see.
    """
    name = blame or module
    try:
        return importlib.import_module(module), None
    except Exception as error:
        reason, is_missing = _one_line(error), isinstance(error, ModuleNotFoundError)
    try:
        installed = Path(str(metadata.distribution(name).locate_file(name)))
    except metadata.PackageNotFoundError:
        installed = None
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is not None and installed is not None and installed not in origin.parents:
        text = f"{origin} hides the installed one: {reason}"
        return None, (text, f"remove {origin.parent} from PYTHONPATH, or rename {origin.name}")
    return None, (reason, install_command() if is_missing else crash_remedy())


def _requirements() -> dict[str, str]:
    """The packages that the project asks for, and their ranges: ``{"numba": ">=0.61"}``."""
    project = _ROOT / "pyproject.toml"
    if project.is_file():
        text = project.read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("\n]")[0]
        lines = re.findall(r'^ *"([^"]+)"', text, re.MULTILINE)
    else:
        lines = [line for line in metadata.requires(_DISTRIBUTION) or () if ";" not in line]
    found = [re.fullmatch(r"([\w.-]+) *(.*)", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def in_range(version: str, ranges: str) -> bool:
    """Whether a version is within ranges such as ``>=1.0.2,<1.1``; what follows the release numbers does not count."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"\d+(\.\d+)*", text)
        parts = [int(part) for part in release[0].split(".")] if release else []
        return parts + [0] * (6 - len(parts))

    for part in filter(None, ranges.split(",")):
        sign, bound = part[:2].strip("0123456789. "), part.lstrip("<>= ")
        if sign == ">=" and numbers(version) < numbers(bound) or sign == "<" and numbers(version) >= numbers(bound):
            return False
    return True


def install_command() -> str:
    """What installs all packages in their ranges, or leads to where they are installed."""
    environment = _ROOT / ".venv"
    stamp = environment / "setup.stamp"  # where it is right, make setup takes all else to be so
    if not _is_clone():
        wanted = (f"'{name}{ranges}'" for name, ranges in _requirements().items())
        return f"{_short(sys.executable)} -m pip install {' '.join(wanted)}"
    if not stamp.exists():
        return "make setup"
    if Path(sys.prefix).resolve() != environment.resolve():
        return f"source {_short(str(environment))}/bin/activate"
    return f"rm {_short(str(stamp))} && make setup"


def reinstall_command() -> str:
    """What replaces packages that are there and do not work."""
    return "rm -r .venv && make setup" if _is_clone() else f"{install_command()} --force-reinstall"


def _is_clone() -> bool:
    return (_ROOT / "launch" / "setup.sh").is_file()


def crash_remedy() -> str:
    """What to do where a library cannot be loaded, or ends the process that uses it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return reinstall_command() if limit == resource.RLIM_INFINITY else "ulimit -v unlimited"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _short(path: str) -> str:
    """A path as seen from the current folder, where it is below."""
    here = os.path.join(os.getcwd(), "")
    return path[len(here) :] if path.startswith(here) else path
