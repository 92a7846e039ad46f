"""Write scikit-learn's handwritten digits as an image folder, ImageNet in miniature.

    python launch/make_digits.py FOLDER

Leaves ``FOLDER/train`` (1,433 images) and ``FOLDER/val`` (364), a folder for each digit in both: JPEGs of 32 x 32 px,
grey as RGB, enlarged from 8 x 8. The images come with scikit-learn (the test part of the UCI set "Optical Recognition
of Handwritten Digits", 1,797 images), so nothing is downloaded. The same files come out every time.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE_PX = 32
VAL_EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as an image folder.")
    parser.add_argument("folder", type=Path, help="where train/ and val/ go; those two are replaced")
    counts = make_digits(parser.parse_args().folder)
    print(", ".join(f"{folder}: {count:,} images of 10 classes" for folder, count in counts.items()))


def make_digits(folder: Path) -> dict[Path, int]:
    """Write both splits below `folder`.

    Parameters
    ----------
    folder
        Made if need be; its ``train`` and ``val`` are replaced.

    Returns
    -------
    dict of Path to int
        The two split folders and how many images each holds. Every fifth image of a class is in ``val``.
    """
    digits = load_digits()
    counts = {folder / split: 0 for split in ("train", "val")}
    for split in counts:
        shutil.rmtree(split, ignore_errors=True)
    for digit in range(10):
        for position, index in enumerate(np.flatnonzero(digits.target == digit)):
            split = folder / ("val" if position % VAL_EVERY == 0 else "train")
            path = split / str(digit) / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            enlarge(digits.images[index]).save(path, quality=95)
            counts[split] += 1
    return counts


def enlarge(image: np.ndarray) -> Image.Image:
    """Turn one digit, (8, 8) floats from 0 (paper) to 16 (ink), into an RGB image of `SIDE_PX` a side."""
    gray = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    return gray.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).convert("RGB")


if __name__ == "__main__":
    main()
