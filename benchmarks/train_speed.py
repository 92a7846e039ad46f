"""Training speed of a recipe on real images: images/s and the share of the time spent waiting for data.

    python benchmarks/train_speed.py --data IMAGE_FOLDER --config-file rn50_configs/single_gpu_100ep.yaml

The images of a folder of class folders are repeated (as links) until there are --num_images, written with
``write_beton.py``, and trained on for two epochs with ``train_imagenet.py``; the second epoch counts. Prints the
machine, the versions and the two figures; leaves nothing behind. Further arguments go to ``train_imagenet.py``.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def repeat_images(source: Path, target: Path, num_images: int) -> int:
    """Link the images of class folders, round after round, until there are enough; returns the number of classes."""
    images = sorted(path for path in source.glob("*/*") if path.is_file())
    if not images:
        raise SystemExit(f"error: {source} holds no class folders with images")
    for number in range(num_images):
        image = images[number % len(images)]
        link = target / image.parent.name / f"{number // len(images):05d}_{image.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())
    return len({image.parent for image in images})


def run(*command: object, folder: Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders of images")
    parser.add_argument("--num_images", type=int, default=30_000, help="images an epoch (30000)")
    parser.add_argument("--config-file", required=True, help="the recipe")
    options, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_classes = repeat_images(options.data, folder / "train", options.num_images)
        for split, source in (("train", folder / "train"), ("val", options.data.resolve())):
            target = folder / f"{split}.beton"
            run(ROOT / "write_beton.py", "--split", split, "--source", source, "--target", target, folder=folder)
        run(
            ROOT / "train_imagenet.py",
            *("--config-file", Path(options.config_file).resolve(), "--no_wandb", "--epochs", 2),
            f"--data.train_dataset={folder / 'train.beton'}",
            f"--data.val_dataset={folder / 'val.beton'}",
            f"--model.num_classes={num_classes}",
            *("--lr.warmup_epochs=0", "--logging.folder=.", *further),
            folder=folder,
        )
        (records,) = (folder / "logs").glob("*.jsonl")
        last = json.loads(records.read_text().splitlines()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "ffcv", "numba"))
    print(f"{device}, Python {platform.python_version()}, {versions}")
    print(f"{last['images_per_s']:,.0f} images/s, waiting for data {last['data_wait']:.2%} of the time")


if __name__ == "__main__":
    main()
