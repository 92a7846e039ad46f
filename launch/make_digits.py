"""Write scikit-learn's handwritten digits as an image folder, ImageNet in miniature.

    python launch/make_digits.py FOLDER

The script writes ``FOLDER/train`` (1,433 images) and ``FOLDER/val`` (364), each with a folder for every digit. The
images are grey JPEGs of 32 x 32 px in RGB, enlarged from 8 x 8. They come with scikit-learn, so nothing is downloaded:
scikit-learn has the test part of the UCI set "Optical Recognition of Handwritten Digits", 1,797 images. Every run
writes the same files.
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
    """Write both splits into a folder.

    Parameters
    ----------
    folder : Path
        The folder, which may exist. Its ``train`` and ``val`` are replaced.

    Returns
    -------
    dict of Path to int
        The folders of both splits, and the number of images in each. Every fifth image of a class is in ``val``.
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
    """Turn a digit, float (8, 8) from 0 (paper) to 16 (ink), into an RGB image with sides of `SIDE_PX`."""
    gray = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    return gray.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).convert("RGB")


if __name__ == "__main__":
    main()
