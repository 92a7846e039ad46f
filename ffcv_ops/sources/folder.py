"""An image folder, read as ``torchvision.datasets.ImageFolder`` reads it: its classes, its images, their pixels."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import NoReturn

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# A network file system answers one question at a time slowly and many at once quickly.
_SCAN_THREADS = 32


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of a folder that has one subfolder a class, sorted as ``torchvision.datasets.ImageFolder`` sorts them.

    Attributes
    ----------
    root : Path
    classes : list of str
        Names of the subfolders; the position is the class number.
    paths : list of str
        The images, relative to `root`.
    labels : ndarray of int64, shape (len(paths),)
    stats : ndarray of int64, shape (len(paths), 2)
        Size in bytes and time of the last change in ns of every image.
    """

    root: Path
    classes: list[str]
    paths: list[str]
    labels: np.ndarray
    stats: np.ndarray


def scan(root: str | os.PathLike[str]) -> ImageFolder:
    """List the images of a folder.

    Raises
    ------
    ValueError
        If there is no such folder, it has no class folders, or a class folder has no image or cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; it should have one subfolder of images a class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise ValueError(f"{root}: has no class folders; it should have one subfolder of images a class")
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        found = list(threads.map(_scan_class, [root] * len(classes), classes))
    empty = [name for name, images in zip(classes, found, strict=True) if not images]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ValueError(f"{root / empty[0]}: class folder without an image{more}; remove it, or add its images")
    images = [image for of_class in found for image in of_class]
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in found])
    return ImageFolder(root, classes, [path for path, *_ in images], labels, np.array([stat for _, *stat in images]))


def _scan_class(root: Path, name: str) -> list[tuple[str, int, int]]:
    images = []
    for folder, _, files in sorted(os.walk(root / name, onerror=_refuse, followlinks=True)):
        inside = os.path.relpath(folder, root)
        for file in sorted(files):
            if file.lower().endswith(EXTENSIONS):
                images.append((os.path.join(inside, file), *stat_image(os.path.join(folder, file))))
    return images


def _refuse(error: OSError) -> NoReturn:
    """A folder that cannot be read is not to pass for one without images."""
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror})")


def stat_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return an image file's size in bytes and time of its last change in ns."""
    try:
        stat = os.stat(path)
    except OSError:
        stat = os.lstat(path)  # a link without a target is a bad image, for the encoder to report
    if not S_ISREG(stat.st_mode) and not S_ISLNK(stat.st_mode):  # to open a pipe would be to wait for ever
        raise ValueError(f"{path}: is no file, though it is named like an image; remove or rename it")
    return stat.st_size, stat.st_mtime_ns


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image file to the pixels of ``torchvision.datasets.folder.pil_loader``.

    That is Pillow's ``convert("RGB")``: grayscale, palette, alpha and CMYK images become RGB, an EXIF orientation is
    not applied, and the content counts, not the extension. JPEGs go through TurboJPEG, which gives Pillow's pixels in
    less time; one that TurboJPEG cannot decode without a warning is left to Pillow's judgement.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Raises
    ------
    Exception
        Whatever Pillow raises for a file it cannot decode (``OSError``, ``ValueError``, ``SyntaxError``, ...);
        ValueError for PostScript, which it would have Ghostscript run.
    """
    from PIL import Image

    from ffcv_ops.codec import jpeg

    with open(path, "rb", buffering=0) as file:
        content = file.read()
    if content.startswith(b"\xff\xd8"):
        # Beyond this Pillow raises DecompressionBombError, and has the word.
        max_pixels = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
        try:
            return jpeg.decode(np.frombuffer(content, np.uint8), max_pixels=max_pixels)
        except ValueError:
            pass
    with Image.open(path) as image:  # by its name, which is in Pillow's messages
        if image.format == "EPS":  # Pillow has Ghostscript run it
            raise ValueError("a PostScript program, not an image")
        return np.asarray(image.convert("RGB"))


def class_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Say in a few words how two lists of classes differ; None if they are the same."""
    if list(expected) == list(found):
        return None
    missing, added = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = []
    for what, names in (("lacks", missing), ("has also", added)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what} {', '.join(names[:3])}{more}")
    return "; ".join(parts) or "has them in another order"
