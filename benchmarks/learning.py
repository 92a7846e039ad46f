"""Learning on real images: a plain recipe, the same on stock FFCV's operations, and one in the manner of RSB A3.

    python benchmarks/learning.py --data FOLDER [--epochs 6] [--seeds 3] [--size 32] [--json out.json]

FOLDER holds ``train/`` and ``val/``, folders of class folders of images; CIFAR-10's 32 px are meant. Each recipe trains
timm's ``test_resnet`` (370,000 parameters, made for tests) from scratch with each seed, in turn. Prints the top-1 of
every run and, for each recipe, their mean and range, and the difference of the two plain ones against the spread of
seeds. Leaves nothing behind.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_imagenet  # noqa: E402
from ffcv_ops import OrderOption, read_beton  # noqa: E402
from imagenet_training.data.loaders import Loaders, build_loaders  # noqa: E402
from imagenet_training.models.card import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from imagenet_training.planning.recipe import Recipe, read_recipe  # noqa: E402
from imagenet_training.run.run_folder import locked_folder  # noqa: E402

# isort: split
# behind ffcv_ops, which makes ffcv importable
from ffcv import transforms  # noqa: E402
from ffcv.fields.decoders import (  # noqa: E402
    CenterCropRGBImageDecoder,
    IntDecoder,
    RandomResizedCropRGBImageDecoder,
)
from ffcv.loader import Loader as StockLoader  # noqa: E402

PLAIN = """
model: {arch: test_resnet}
resolution: {min_res: SIZE, max_res: SIZE}
augmentation: {crop_scale: [0.35, 1]}
lr: {lr_schedule_type: cosine, base_lr: 0.4, warmup_epochs: 1}
training: {batch_size: 64, weight_decay: 5e-4, bn_wd: 0, label_smoothing: 0.1, precision: "32"}
validation: {resolution: SIZE, crop_ratio: 1, lr_tta: 0}
logging: {log_every: 1000000}
wandb: {enable: 0}
"""
RSB = """
augmentation: {mixup_alpha: 0.1, cutmix_alpha: 1.0, auto_augment: rand-m6-mstd0.5-inc1}
lr: {base_lr: 0.032, warmup_lr: 1e-4, min_lr: 1e-6}
training: {optimizer: lamb, loss: bce, label_smoothing: 0, weight_decay: 0.02}
"""
RECIPES = {"plain": [PLAIN], "plain, stock operations": [PLAIN], "RSB-style": [PLAIN, RSB]}


class StockBatches:
    """Stock FFCV's loader and operations, behind the interface of ours.

    Parameters
    ----------
    recipe : Recipe
    train : bool
        Random crops, flips and dense targets; else centre crops and labels, in order.
    """

    storage_wait_s = 0.0

    def __init__(self, recipe: Recipe, *, train: bool):
        self.smoothing, self.num_classes = (
            recipe.training.label_smoothing if train else None,
            recipe.model.known_num_classes,
        )
        size = recipe.resolution.max_res
        self.beton = read_beton(recipe.data.train_dataset if train else recipe.data.val_dataset)
        self.batch_size = recipe.training.batch_size if train else recipe.validation.batch_size
        crop: Any = CenterCropRGBImageDecoder((size, size), ratio=recipe.validation.crop_ratio)
        flips = []
        if train:
            scale, ratio = recipe.augmentation.crop_scale, recipe.augmentation.crop_ratio
            crop = RandomResizedCropRGBImageDecoder((size, size), scale=scale, ratio=ratio)
            flips = [transforms.RandomHorizontalFlip(recipe.augmentation.flip)]
        mean, std = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)
        normalize = transforms.NormalizeImage(mean, std, np.float32)
        self.loader = StockLoader(
            self.beton.path,
            batch_size=self.batch_size,
            num_workers=1,
            order=OrderOption.RANDOM if train else OrderOption.SEQUENTIAL,
            seed=recipe.training.seed,
            drop_last=train,
            pipelines={
                "image": [crop, *flips, normalize, transforms.ToTensor(), transforms.ToTorchImage()],
                "label": [IntDecoder(), transforms.ToTensor(), transforms.Squeeze(1)],
            },
        )

    def __len__(self) -> int:
        return len(self.loader)

    def next_traversal_order(self) -> np.ndarray:
        """Return the ids of the validation samples in their order."""
        return np.arange(self.beton.num_samples)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self.loader:
            if self.smoothing is None:
                yield images, labels.long()
            else:
                targets = F.one_hot(labels.long(), self.num_classes) * (1.0 - self.smoothing)
                yield images, targets + self.smoothing / self.num_classes

    def epoch(self, epoch: int, *, skip_samples: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self)

    def begin(self, epoch: int | None = None) -> None:
        """Do nothing: stock FFCV's loader begins when it is asked for batches."""


def train(name: str, data: Path, folder: Path, seed: int, options: argparse.Namespace) -> float:
    """Train one recipe with one seed; returns the last epoch's top-1 on the validation split, in percent."""
    argv = []
    for number, text in enumerate(RECIPES[name]):
        path = folder / f"recipe-{number}.yaml"
        path.write_text(text.replace("SIZE", str(options.size)))
        argv += ["--config-file", str(path)]
    for key, value in {
        "data.train_dataset": data / "train.beton",
        "data.val_dataset": data / "val.beton",
        "model.num_classes": read_beton(data / "train.beton").num_classes,
        "training.epochs": options.epochs,
        "training.seed": seed,
        "logging.folder": folder,
    }.items():
        argv.append(f"--{key}={value}")
    recipe = read_recipe(argv)
    world, meta_model = train_imagenet.join_run(recipe)
    with locked_folder(recipe, world) as lock:
        run = train_imagenet.build(recipe, world, meta_model)
        loaders = build_loaders(recipe, run.plan, run.data, world)
        if "stock" in name:
            stock: dict[str, Any] = {split: StockBatches(recipe, train=split == "train") for split in ("train", "val")}
            loaders = Loaders(**stock, train_crop=loaders.train_crop)
        train_imagenet.train_epochs(recipe, run, loaders, lock)
    (records,) = (folder / "logs").glob("*.jsonl")
    return 100 * json.loads(records.read_text().splitlines()[-1])["val/acc1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train/ and val/")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run (6)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3)")
    parser.add_argument("--size", type=int, default=32, help="side of the images the network sees, px (32)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    accuracies: dict[str, list[float]] = {name: [] for name in RECIPES}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        for split in ("train", "val"):
            paths = ["--source", options.data / split, "--target", data / f"{split}.beton"]
            subprocess.run([sys.executable, ROOT / "write_beton.py", "--split", split, *paths], check=True)
        for seed in range(options.seeds):
            for name in RECIPES:
                with tempfile.TemporaryDirectory() as folder:
                    accuracies[name].append(train(name, data, Path(folder), seed, options))
                print(f"RESULT seed {seed}, {name}: {accuracies[name][-1]:.1f} %", flush=True)
    versions = {package: version(package) for package in ("torch", "ffcv", "timm", "numba")}
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"{options.epochs} epochs at {options.size} px; top-1 on the validation split:")
    for name, values in accuracies.items():
        print(f"{name:<24} {statistics.mean(values):5.1f} %   {min(values):.1f} to {max(values):.1f}")
    ours, stock = accuracies["plain"], accuracies["plain, stock operations"]
    if options.seeds > 1:
        spread = (statistics.variance(ours) / len(ours) + statistics.variance(stock) / len(stock)) ** 0.5
        difference = statistics.mean(ours) - statistics.mean(stock)
        print(f"ours - stock: {difference:+.1f} points; its standard error from seeds alone {spread:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "accuracies": accuracies}, indent=1) + "\n")


if __name__ == "__main__":
    main()
