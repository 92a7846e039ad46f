"""RandAugment and TrivialAugmentWide, images/s on one core: ours against timm's and torchvision's on Pillow.

    python benchmarks/rand_augment.py [--images FOLDER] [--size 224] [--rounds 15] [--json out.json]

Without a folder the images are crops of scikit-learn's two photographs. Both sides get decoded images of one size and
take turns, a batch of 64 a turn; the peers start from Pillow images, whose conversion is not counted. Prints, for each
policy, the median images/s of both and the ratio of the medians; `--json` writes the same.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numba as nb
import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import rand_augment_transform

from ffcv_ops.operations.base import Batch, Storage
from ffcv_ops.operations.image_operation import IMAGENET_MEAN
from ffcv_ops.operations.rand_augment import Augmentation, RandAugment, TrivialAugmentWide
from ffcv_ops.operations.threads import WorkerPool

BATCH_SIZE = 64


def load_images(folder: Path | None, size: int) -> np.ndarray:
    """uint8 (BATCH_SIZE, size, size, 3): centre crops of the folder's images, or crops of two photographs."""
    if folder is None:
        corners = np.random.default_rng(0).integers(0, 427 - size, (BATCH_SIZE, 2))
        photographs = load_sample_images().images
        return np.stack([photographs[i % 2][y : y + size, x : x + size] for i, (y, x) in enumerate(corners)])
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"no .jpg, .jpeg or .png in {folder}")
    chosen = (Image.open(paths[i % len(paths)]).convert("RGB") for i in range(BATCH_SIZE))
    return np.stack([np.asarray(ImageOps.fit(image, (size, size))) for image in chosen])


def build_ours(policy: Augmentation, images: np.ndarray) -> Callable[[int], None]:
    augment, pool, work = policy.generate_code(), WorkerPool(1), images.copy()

    no_file = cast(Storage, None)  # augmentations read no samples

    def turn(number: int) -> None:
        np.copyto(work, images)
        augment(work, None, Batch(0, number, np.arange(BATCH_SIZE), pool, no_file))

    return turn


def build_peer(transform: Callable[[Image.Image], Image.Image], images: np.ndarray) -> Callable[[int], None]:
    pictures = [Image.fromarray(image) for image in images]

    def turn(number: int) -> None:
        for picture in pictures:
            transform(picture)

    return turn


def compare(ours: Callable[[int], None], peer: Callable[[int], None], rounds: int) -> dict[str, float]:
    times_s: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(rounds + 1):
        for name, turn in (("ours", ours), ("peer", peer)):
            start = time.perf_counter()
            turn(number)
            times_s[name].append(time.perf_counter() - start)
    # the first round compiles
    speeds = {f"{name}_images_per_s": BATCH_SIZE / statistics.median(spent[1:]) for name, spent in times_s.items()}
    return speeds | {"ratio": speeds["ours_images_per_s"] / speeds["peer_images_per_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images")
    parser.add_argument("--size", type=int, default=224, help="px (default: 224; at most 420 without a folder)")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each side (default: 15)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    images = load_images(arguments.images, arguments.size)
    results: dict[str, dict[str, float]] = {}
    for config in ("rand-m7-mstd0.5-inc1", "rand-m6-mstd0.5-inc1"):
        timms = rand_augment_transform(config, dict(translate_const=100, img_mean=IMAGENET_MEAN))
        ours, peer = build_ours(RandAugment(config), images), build_peer(timms, images)
        results[config] = compare(ours, peer, arguments.rounds)
    bilinear = torchvision.transforms.InterpolationMode.BILINEAR
    torchvisions = torchvision.transforms.TrivialAugmentWide(interpolation=bilinear)
    ours, peer = build_ours(TrivialAugmentWide(), images), build_peer(torchvisions, images)
    results["TrivialAugmentWide"] = compare(ours, peer, arguments.rounds)

    modules = (np, nb, PIL, timm, torch, torchvision)
    versions = {module.__name__: module.__version__ for module in modules}
    machine = {"machine": platform.platform(), "processor": platform.processor() or platform.machine(), **versions}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{arguments.images or 'photographs of scikit-learn'}, {arguments.size} px, one core")
    for name, result in results.items():
        print(
            f"{name:22s} ours {result['ours_images_per_s']:8.0f} images/s   Pillow {result['peer_images_per_s']:7.0f}"
            f" images/s   ratio {result['ratio']:.2f}"
        )
    if arguments.json:
        data = {"size_px": arguments.size, "images": str(arguments.images or "sklearn"), "results": results}
        arguments.json.write_text(json.dumps({**machine, **data}, indent=2) + "\n")


if __name__ == "__main__":
    main()
