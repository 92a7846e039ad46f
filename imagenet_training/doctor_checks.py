"""The checks of the doctor.

A check is a function of the options (``data``: list of paths; ``num_workers``: int) that yields its findings. It
imports the libraries that it checks. An exception that it raises becomes a finding.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from ffcv_ops.cgroups import available_bytes, cpu_quota, memory_limits
from ffcv_ops.machine import allowed_cpus
from ffcv_ops.units import show_bytes

DATA = "/fsx/ns1/train.beton", "/fsx/ns1/val.beton"
"""The default files of write_beton.py and train_imagenet.py."""
_ROOT = Path(__file__).resolve().parents[1]
_MIN_OPEN_FILES = 1024
_MIN_MEMORY_BYTES = 4e9
_MIN_SHARED_BYTES_PER_GPU = 1 << 28
# The rate of a smaller file is not that of a disk.
_MIN_MEASURED_BYTES = 1 << 26
# The loader reads ahead with at most this many threads. If a file does not fit into memory, it reads pages of this size
# with this many threads.
_NUM_READERS = 64
_PAGE_BYTES, _NUM_PAGE_READERS = 1 << 23, 12
_MAX_JPEG_DIFFERENCE = 8
_UPDATE_DRIVER = "update the driver, or install a PyTorch for its CUDA: https://pytorch.org/get-started"


class Finding(NamedTuple):
    """One result: status, what was found, the remedy, and what was checked (by default the check's name)."""

    status: str
    text: str
    remedy: str = ""
    name: str = ""


Options = argparse.Namespace


def check_python(options: Options) -> Iterator[Finding]:
    """Check the version of Python."""
    text = f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"
    if (3, 10) <= sys.version_info < (3, 15):
        yield Finding("ok", text)
    else:
        text = f"{text}: 3.10 to 3.14 are needed; nothing else was checked"
        yield Finding("error", text, "make setup PYTHON=python3.12")


def check_packages(options: Options) -> Iterator[Finding]:
    """Compare the installed packages with the project's requirements."""
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, requirements()):
        version = _version(requirement.name)
        if requirement.name == "opencv-python":  # other distributions have the same package
            version = version or _version("opencv-python-headless") or _version("opencv-contrib-python")
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is installed, {requirement} is needed")
    if wrong:
        yield Finding("error", "; ".join(wrong), setup_command(is_missing=True))
    else:
        yield Finding("ok", "all are installed, in the versions needed")


def check_cpus(options: Options) -> Iterator[Finding]:
    """Compare the CPUs of this process with the number of loading threads."""
    workers, allowed, total, quota = options.num_workers, allowed_cpus(), os.cpu_count() or 1, cpu_quota()
    text = f"{allowed} of {total} allowed to this process"
    if quota is not None and quota < min(workers, allowed):
        text = f"{text}, time of {quota:g}: {workers} loading threads would be throttled"
        yield Finding("warning", text, f"--num_workers {max(1, int(quota))}, or more time (docker --cpus)")
    elif workers > allowed or allowed == 1 < total:
        text = f"{text}: {min(workers, allowed)} of {workers} workers start"
        yield Finding("warning", text, "allow more CPUs: taskset, sbatch --cpus-per-task, docker --cpuset-cpus")
    else:
        yield Finding("ok", f"{text}; {workers} workers")


def check_limits(options: Options) -> Iterator[Finding]:
    """Check the limits of the shell: open files and address space."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= num_files < _MIN_OPEN_FILES:
        yield Finding("warning", f"{num_files} open files allowed", f"ulimit -n {_MIN_OPEN_FILES}")
    elif _has_address_limit():
        text = "the address space is limited: the loader maps whole files, and PyTorch reserves much"
        yield Finding("warning", text, "ulimit -v unlimited")
    else:
        yield Finding("ok", f"{num_files} open files")


def check_memory(options: Options) -> Iterator[Finding]:
    """Check the memory that the machine and the control groups (Slurm's, a container's) leave to this process."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, available = min([total, *(limit for limit, _ in memory_limits())]), available_bytes()
    text = f"{show_bytes(available)} of {show_bytes(limit)} available, page cache included"
    if available >= _MIN_MEMORY_BYTES:
        yield Finding("ok", text)
    else:
        remedy = "sbatch --mem, docker run --memory" if limit < total else "end other processes (top -o %MEM)"
        yield Finding("warning", f"{text}, {show_bytes(total)} in the machine: little for training", remedy)


def check_shared_memory(options: Options) -> Iterator[Finding]:
    """Check /dev/shm, through which NCCL connects the GPUs of a machine."""
    free_bytes = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if num_gpus > 1 and free_bytes < num_gpus * _MIN_SHARED_BYTES_PER_GPU:
        text = f"{show_bytes(free_bytes)} free: little for {num_gpus} GPUs"
        yield Finding("warning", text, "docker run --shm-size=8g, or --ipc=host")
    else:
        yield Finding("ok", f"{show_bytes(free_bytes)} free")


def check_compiler(options: Options) -> Iterator[Finding]:
    """Look for the C++ compiler, which builds FFCV and which torch.compile needs."""
    compiler = os.environ.get("CXX") or "c++"
    path = shutil.which(compiler)
    if path:
        yield Finding("ok", path)
    else:
        text = f"no {compiler} on the PATH: FFCV cannot be built, and torch.compile cannot work"
        yield Finding("warning", text, "sudo apt-get install g++")


def check_opencv(options: Options) -> Iterator[Finding]:
    """Import OpenCV, which needs libraries of the system."""
    return _import("cv2", "sudo apt-get install libgl1 libglib2.0-0 libxcb1")


def check_torchvision(options: Options) -> Iterator[Finding]:
    """Import torchvision, which fails if it was built for another PyTorch."""
    return _import("torchvision", f"{sys.executable} -m pip install --force-reinstall torch torchvision")


def _import(module: str, remedy: str) -> Iterator[Finding]:
    try:
        library = import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) or _has_address_limit():
            raise
        yield Finding("error", one_line(error), remedy)
    else:
        yield Finding("ok", f"{library.__version__}, {library.__file__}")


def check_turbojpeg(options: Options) -> Iterator[Finding]:
    """Load TurboJPEG."""
    from ffcv_ops.codec import jpeg

    try:
        yield Finding("ok", jpeg.turbojpeg()._name)
    except jpeg.TurboJPEGNotFound as error:
        remedy = "unset TURBOJPEG" if os.environ.get("TURBOJPEG") else "sudo apt-get install libturbojpeg0-dev"
        yield Finding("error", f"2.1 or later was not found; tried {'; '.join(error.tried)}", remedy)


def check_numba(options: Options) -> Iterator[Finding]:
    """Look for the folder in which Numba keeps compiled kernels."""
    from ffcv_ops import _kernels, rng

    if _kernels.CAN_CACHE:
        yield Finding("ok", f"{_version('numba')}, keeps compiled kernels in {rng.philox.stats.cache_path}")
    else:
        text = f"{_version('numba')}, cannot keep compiled kernels: each run compiles for a minute or more"
        yield Finding("warning", text, "export NUMBA_CACHE_DIR=~/.cache/numba")


def check_ffcv(options: Options) -> Iterator[Finding]:
    """Write images with our writer, load them with our decoder and with FFCV's, and compare the pixels."""
    import_module("ffcv_ops._ffcv")
    with tempfile.TemporaryDirectory(prefix="ffcv_doctor_") as folder:
        num_images = _round_trip(Path(folder))
    yield Finding("ok", f"{_version('ffcv')}; {num_images} images written, loaded and compared")


def _round_trip(folder: Path) -> int:
    """Return the number of images that were compared; raise ArithmeticError if pixels differ."""
    import numpy as np
    from PIL import Image

    from ffcv_ops import CenterCrop, Label, Loader
    from ffcv_ops._ffcv import SimpleRGBImageDecoder
    from ffcv_ops.writing.plan import WriteSettings
    from ffcv_ops.writing.writer import write

    y, x, channel = np.meshgrid(np.arange(64), np.arange(64), np.arange(3), indexing="ij")
    images = np.stack([(y * i + x * (7 - i)) // 4 + 40 * channel for i in range(8)]).astype(np.uint8)
    for label, image in enumerate(images):
        (folder / "images" / str(label)).mkdir(parents=True)
        Image.fromarray(image).save(folder / "images" / str(label) / "0.png")
    file = folder / "images.beton"
    write(folder / "images", file, WriteSettings(mode="jpg"), num_workers=1, notice=lambda text: None)
    for decoder in (CenterCrop(64, ratio=1), SimpleRGBImageDecoder()):
        with Loader(file, len(images), 1, pipelines={"image": [decoder], "label": [Label()]}) as loader:
            for loaded, labels in loader:
                difference = np.asarray(loaded).astype(int) - images[np.asarray(labels).ravel()]
                if np.abs(difference).max() > _MAX_JPEG_DIFFERENCE:
                    raise ArithmeticError(f"{type(decoder).__name__} gives other pixels than were written")
    return len(images)


def check_pytorch(options: Options) -> Iterator[Finding]:
    """Import PyTorch and compute on each GPU."""
    import torch

    text = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")
    if not (torch.cuda.is_available() or os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")):
        yield Finding("ok", text)
        remedy = "none on a machine without a GPU; in a container: docker run --gpus all"
        yield Finding("warning", "no NVIDIA GPU is visible: everything runs on the CPU", remedy, "GPU")
    elif torch.version.cuda is None:
        remedy = f"{sys.executable} -m pip install --force-reinstall torch torchvision"
        yield Finding("error", f"{text}: no GPU can be used", remedy)
    elif os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        yield Finding("error", f"{text}; CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("ok", text)
        yield from (gpu(torch, number) for number in range(max(1, torch.cuda.device_count())))


def gpu(torch: Any, number: int) -> Finding:
    """Compute on a GPU."""
    try:
        ones = torch.ones(256, 256, device=f"cuda:{number}", dtype=torch.float16)
        if (ones @ ones)[0, 0].item() != 256:
            raise ArithmeticError("a matrix product is wrong")
        found = torch.cuda.get_device_properties(number)
    except Exception as error:
        return Finding("error", f"does not compute: {one_line(error)}", _UPDATE_DRIVER, f"GPU {number}")
    text = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}"
    return Finding("ok", text, name=f"GPU {number}")


def check_wandb(options: Options) -> Iterator[Finding]:
    """Look for the key of Weights & Biases."""
    from imagenet_training.reports.wandb import has_wandb_key

    mode = os.environ.get("WANDB_MODE") or "online"
    if mode != "online" or has_wandb_key():
        yield Finding("ok", f"WANDB_MODE={mode}" if mode != "online" else "an API key was found")
    else:
        text = "no API key: runs are recorded offline, for `wandb sync` to upload later"
        yield Finding("warning", text, "bash launch/setup_wandb.sh, or --no_wandb to record nothing")


def check_data(options: Options) -> Iterator[Finding]:
    """Check the data files: their tables, their file systems, and the rates of the disk and of the loader."""
    from ffcv_ops import UserError, read_beton

    paths = [Path(path) for path in options.data or filter(os.path.exists, DATA)]
    if not paths:
        remedy = "python write_beton.py --split train  # or --data FILE ..., if the file is elsewhere"
        yield Finding("warning", f"neither {' nor '.join(DATA)} exists", remedy)
    betons = []
    for path in paths:
        files = sorted(path.glob("*.beton")) if path.is_dir() else [path]
        if not files:
            text = f"no .beton file, {show_bytes(shutil.disk_usage(path).free)} free on {file_system(path)}"
            yield Finding(
                "warning", text, f"python write_beton.py --source FOLDER --target {path}/train.beton", str(path)
            )
        for file in files:
            try:
                betons.append(read_beton(file))
            except UserError as error:
                remedy = f"python write_beton.py --source FOLDER --target {file} --overwrite"
                yield Finding("error", str(error), remedy, file.name)
            else:
                text = f"{betons[-1].num_samples:,} images, {show_bytes(betons[-1].size_bytes)}"
                yield Finding("ok", f"{text}, on {file_system(file)}", name=file.name)
    size_bytes = sum(beton.size_bytes for beton in betons)
    fits = size_bytes <= available_bytes()
    for beton in betons:
        if beton.size_bytes >= _MIN_MEASURED_BYTES:
            yield from rates(beton, min(options.num_workers, allowed_cpus()), fits)
    if not fits:
        text = f"together {show_bytes(size_bytes)}, more than the memory available"
        yield Finding("warning", text, "--data.in_memory=0 --data.order=quasi_random")


def file_system(path: Path) -> str:
    """Return the type and the mount point of the file system that holds a path, such as ``lustre (/fsx)``."""
    import psutil

    real = path.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if Path(mount.mountpoint) in (real, *real.parents)]
    # If several file systems are mounted in one place, the last one is visible.
    mount = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))
    return f"{mount.fstype} ({mount.mountpoint})"


def rates(beton: Any, num_workers: int, fits: bool) -> Iterator[Finding]:
    """Measure the storage, and compare how fast it gives images with how fast the CPUs decode them."""
    name, image_bytes = beton.path.stem, beton.size_bytes // beton.num_samples
    block_bytes, num_threads = (image_bytes, _NUM_READERS) if fits else (_PAGE_BYTES, _NUM_PAGE_READERS)
    read_s = block_bytes / cold_read_rate(beton.path, block_bytes, 1, time_s=0.5)
    bytes_per_s = cold_read_rate(beton.path, block_bytes, num_threads)
    read, decoded = bytes_per_s / image_bytes, _load_rate(beton, num_workers)
    num_fed = int(read / decoded * num_workers)
    text = f"{1e3 * read_s:.2g} ms for a read of {block_bytes / 1e3:,.0f} kB; {num_threads} reads at a time give "
    text += f"{show_bytes(int(bytes_per_s))}/s, enough for {num_fed} workers like these"
    if num_fed < num_workers:
        text += f": more than --num_workers {max(1, num_fed)} are of no use while the file is not in memory"
    yield Finding("ok", text, name=f"{name} storage")
    text = f"images/s: {decoded:,.0f} decoded by {num_workers} CPUs; {read:,.0f} read from the disk, past the cache"
    if read >= decoded:
        yield Finding("ok", text, name=f"{name} rate")
        return
    if fits:
        text, remedy = f"{text}: the first epoch waits for the disk", f"cat {beton.path} >/dev/null  # into memory"
    else:
        text, remedy = f"{text}: every epoch waits for the disk", "a faster disk, or write_beton.py --max_side 400"
    yield Finding("warning", text, remedy, f"{name} rate")


def cold_read_rate(path: Path, block_bytes: int, num_threads: int, time_s: float = 1.0) -> float:
    """Return how many bytes/s are read from random places of a file, each dropped from the page cache before."""
    start_s = time.perf_counter()

    def read(descriptor: int) -> int:
        num_bytes = 0
        while time.perf_counter() - start_s < time_s:
            offset = random.randrange(0, os.path.getsize(path), block_bytes)
            os.posix_fadvise(descriptor, offset, block_bytes, os.POSIX_FADV_DONTNEED)
            num_bytes += len(os.pread(descriptor, block_bytes, offset))
        return num_bytes

    with open(path, "rb") as file, ThreadPoolExecutor(num_threads) as threads:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        num_bytes = sum(threads.map(read, [file.fileno()] * num_threads))
    return num_bytes / (time.perf_counter() - start_s)


def _load_rate(beton: Any, num_workers: int, time_s: float = 1.5) -> float:
    """Return how many images/s the loader decodes from memory to random crops of 224 px."""
    from ffcv_ops import Label, Loader, RandomResizedCrop

    ids, num_loaded = range(min(beton.num_samples, 64 * num_workers)), 0
    pipelines = {"image": [RandomResizedCrop(224)], "label": [Label()]}
    with Loader(beton.path, min(64, len(ids)), num_workers, pipelines=pipelines, indices=ids) as loader:
        for _ in loader:  # the first epoch compiles, and reads the file into memory
            pass
        start_s = time.perf_counter()
        while time.perf_counter() - start_s < time_s:
            num_loaded += sum(len(labels) for _, labels in loader)
    return num_loaded / (time.perf_counter() - start_s)


CHECKS: dict[str, Callable[[Options], Iterator[Finding]]] = {
    "Python": check_python,
    "packages": check_packages,
    "CPUs": check_cpus,
    "limits": check_limits,
    "memory": check_memory,
    "/dev/shm": check_shared_memory,
    "compiler": check_compiler,
    "OpenCV": check_opencv,
    "TurboJPEG": check_turbojpeg,
    "Numba": check_numba,
    "ffcv": check_ffcv,
    "PyTorch": check_pytorch,
    "torchvision": check_torchvision,
    "W&B": check_wandb,
    "data": check_data,
}


def requirements() -> list[str]:
    """Return the packages that the project needs, such as ``numba>=0.61,<0.69``."""
    project = _ROOT / "pyproject.toml"
    if project.is_file():
        section = project.read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("\n]")[0]
        return re.findall(r'^ *"([^"]+)"', section, re.MULTILINE)
    return [line for line in metadata.requires("ffcv-imagenet-toolkit") or () if ";" not in line]


def setup_command(is_missing: bool = False) -> str:
    """Return the command for packages that are missing or of a wrong version, or else for a package that fails."""
    if _has_address_limit() and not is_missing:
        return "ulimit -v unlimited"
    if not (_ROOT / "launch" / "setup.sh").is_file():
        return f"{sys.executable} -m pip install --force-reinstall " + " ".join(f"'{line}'" for line in requirements())
    if not is_missing:
        return "rm -r .venv && make setup"
    if not (_ROOT / ".venv" / "setup.stamp").exists():
        return "make setup"
    if Path(sys.prefix).resolve() != (_ROOT / ".venv").resolve():
        return "source .venv/bin/activate"
    return "rm .venv/setup.stamp && make setup"


def _has_address_limit() -> bool:
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
