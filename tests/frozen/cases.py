"""Make images and batches, and run both commands, in the same way for every version of the code.

The images are exact copies of pixels that scikit-learn ships. They are saved as PPM files, whose bytes and sizes depend
on no encoder, and get a fixed time of change. So every machine makes the same files.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images

MTIME_NS = 1_700_000_000 * 10**9
PAGE_BYTES = 1 << 21
MODES = {
    "jpg": ["--mode=jpg", "--max_side=320"],
    "raw": ["--mode=raw", "--max_side=320"],
    "proportion": ["--mode=proportion", "--raw_share=0.6", "--max_side=320", "--seed=3"],
}
HALF_WRITTEN = ["--mode=proportion", "--raw_share=0.8", "--seed=1", "--on_error=skip"]
RECIPE = """
model: {arch: frozen_convnet, num_classes: 10}
resolution: {min_res: 24, max_res: 32, start_ramp: 0, end_ramp: 2}
data: {train_dataset: train.beton, val_dataset: val.beton, num_workers: 1}
augmentation: {crop_scale: [0.5, 1], mixup_alpha: 0.2, cutmix_alpha: 1.0, auto_augment: rand-m5}
lr: {lr_schedule_type: cosine, base_lr: 0.2, warmup_epochs: 1}
training: {batch_size: 8, accumulation: 2, epochs: 3, bn_wd: 0, ema_decay: 0.9, label_smoothing: 0.1, precision: "32"}
validation: {resolution: 32, crop_ratio: 1, batch_size: 8}
logging: {log_every: 1}
wandb: {enable: 0}
"""


def save_ppm(path: Path, image: np.ndarray) -> None:
    """Save an image, uint8 (H, W, 3) or (H, W), with a fixed time of change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.broadcast_to(image.reshape(*image.shape[:2], -1), (*image.shape[:2], 3))
    path.write_bytes(b"P6\n%d %d\n255\n" % image.shape[1::-1] + image.tobytes())
    os.utime(path, ns=(MTIME_NS, MTIME_NS))


def save_photographs(folder: Path) -> None:
    """Save 24 parts of two photographs in two classes, and a whole one that ``--max_side=320`` halves."""
    for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        for i in range(12):
            y, x, height, width = 9 * i, 17 * i, 200 + 10 * i, 320 - 7 * i
            save_ppm(folder / name / f"{i:02d}.ppm", image[y : y + height, x : x + width])
    save_ppm(folder / "china" / "whole.ppm", load_sample_images().images[0][:426])


def save_tiles(folder: Path) -> None:
    """Save 48 images that compress well: each repeats one square of a photograph. One more file is no image."""
    image = load_sample_images().images[1]
    for i in range(48):
        square = image[8 * i : 8 * i + 16, 12 * i : 12 * i + 16]
        save_ppm(folder / f"class{i % 3}" / f"{i:02d}.ppm", np.tile(square, (16, 15 + i % 4, 1)))
    broken = folder / "class1" / "broken.ppm"
    broken.write_bytes(b"no image")
    os.utime(broken, ns=(MTIME_NS, MTIME_NS))


def save_digits(folder: Path) -> None:
    """Save 80 handwritten digits for training and 30 for validation, 32 px, in ten classes each."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:110], digits.target, strict=False)):
        split = "train" if i < 80 else "val"
        save_ppm(
            folder / split / str(label) / f"{i:03d}.ppm", np.kron(pixels.astype(np.uint8) * 15, np.ones((4, 4), "u1"))
        )


def run(command: list, folder: Path, status: int = 0, **environment: str) -> str:
    """Run a Python program in a folder. Check its exit status, and return what it printed to stdout."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **environment}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=settings, text=True, capture_output=True, timeout=600)
    assert done.returncode == status, (command, done.stdout, done.stderr)
    return done.stdout


def write(root: Path, source: Path, target: Path, *arguments: str, status: int = 0) -> None:
    """Write a file by the command ``write_beton.py`` of the code in `root`."""
    where = ["--source", source, "--target", target, f"--page_size={PAGE_BYTES}", "--num_workers=1"]
    run([root / "write_beton.py", *where, *arguments], target.parent, status)


def train(root: Path, folder: Path, *arguments: str, status: int = 0, **environment: str) -> None:
    """Train `RECIPE` in a folder that has the digits' files, by ``train_imagenet.py`` of the code in `root`."""
    (folder / "recipe.yaml").write_text(RECIPE)
    command = ["-m", "frozen_convnet", root / "train_imagenet.py", "--config-file", "recipe.yaml", *arguments]
    run(command, folder, status, **environment)


def batches(kind: str, path: Path) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return three batches of one kind from the file that ``MODES["proportion"]`` writes."""
    from ffcv.transforms import ToTensor

    import ffcv_ops as ops

    settings = dict(batch_size=8, num_workers=1, seed=11, copy=True)
    normalize = ops.Normalize((120.0, 115.0, 100.0), (58.0, 57.0, 59.0))
    if kind == "training":
        mix = ops.Mix(2, mixup_alpha=0.2, cutmix_alpha=1.0, smoothing=0.1, per="element")
        image = [
            ops.RandomResizedCrop(48),
            ops.RandAugment("rand-m7-mstd0.5-inc1"),
            ToTensor(),
            normalize,
            mix.images(),
        ]
        pipelines = {"image": image, "label": [ops.Label(), mix.targets()]}
        loader = ops.Loader(path, order=ops.OrderOption.RANDOM, pipelines=pipelines, **settings)
    elif kind == "quasi_random":
        crop = ops.RandomResizedCrop(48, scale=(0.3, 1.0), interpolation="bicubic")
        pipelines = {"image": [crop, ops.RandomErasing(0.5), ToTensor()], "label": [ops.Label()]}
        loader = ops.Loader(path, order=ops.OrderOption.QUASI_RANDOM, pipelines=pipelines, **settings)
    else:
        pipelines = {"image": [ops.CenterCrop(48), ToTensor(), normalize], "label": [ops.Label()]}
        loader = ops.Loader(path, order=ops.OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False, **settings)
    with loader:
        for number, batch in enumerate(loader.epoch(2)):
            if number < 3:
                yield batch


def digest(array: np.ndarray) -> str:
    """Return the SHA-256 of shape, type and values."""
    return sha256(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def projected(array: np.ndarray) -> list[float]:
    """Return one weighted sum a sample. Two CPUs that round differently agree on it closely."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    return (rows @ (np.arange(rows.shape[1]) % 97 / 97) / rows.shape[1]).tolist()


def describe_batches(kind: str, path: Path) -> list[dict]:
    """Return digest, and of floats also the weighted sums, of every part of three batches."""
    parts = [part.numpy() for batch in batches(kind, path) for part in batch]
    return [{"digest": digest(part), **({"sums": projected(part)} if part.dtype.kind == "f" else {})} for part in parts]


def help_defaults(root: Path, script: str) -> dict[str, str]:
    """Return the default of every key and of every short flag that ``--help`` lists."""
    text = run([root / script, "--help"], root)
    found = re.findall(r"^  (--\w+\.\w+(?:, --\w+)*).*?: .*; default (.*)$", text, re.MULTILINE)
    return {flag: default for flags, default in found for flag in flags.split(", ")}


def machine() -> list[str]:
    """Return what the rounding of PyTorch's results depends on."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return [platform.machine(), *names[:1], torch.__version__, torch.backends.cpu.get_cpu_capability()]
