"""Read an image folder as ``torchvision.datasets.ImageFolder`` does: its classes, its images and their pixels."""

import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import NoReturn, overload

import numpy as np

from ffcv_ops.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# A network file system answers one question at a time slowly, and many questions at once quickly.
_SCAN_THREADS = 32


class PackedPaths(Sequence[str]):
    """A sequence of paths in one block of bytes, which takes a third of the memory of a list of ``str``."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._ends = array("q", [-1])

    def extend(self, block: bytes) -> None:
        """Append paths that are encoded as `os.fsencode` does, each followed by a zero byte."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + len(self._block)
        self._ends.frombytes(ends.astype(np.int64).tobytes())
        self._block += block

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return os.fsdecode(self.encoded(range(len(self))[index]))

    def encoded(self, index: int) -> bytes:
        """Return a path as bytes, by its number from 0."""
        return bytes(self._block[self._ends[index] + 1 : self._ends[index + 1]])


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images of a folder with one subfolder for each class, in the order of ``torchvision.datasets.ImageFolder``.

    Attributes
    ----------
    root : Path
    classes : list of str
        Names of the subfolders. The position of a name is the class number.
    paths : PackedPaths
        The images, relative to `root`.
    labels : ndarray of int32, shape (len(paths),)
        The class number of every image.
    stats : ndarray of int64, shape (len(paths), 2)
        The size in bytes and the time of the last change in ns of every image.
    """

    root: Path
    classes: list[str]
    paths: PackedPaths
    labels: np.ndarray
    stats: np.ndarray


def scan(root: str | os.PathLike[str]) -> ImageFolder:
    """List the images of a folder.

    Raises
    ------
    UserError
        If there is no such folder, if the folder has no class folders, or if a class folder has no image or cannot be
        read.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it should have one subfolder of images a class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise UserError(f"{root}: has no class folders; it should have one subfolder of images a class")
    paths, stats, counts = PackedPaths(), array("q"), []
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        for block, of_class in threads.map(partial(_scan_class, root), classes):
            paths.extend(block)
            stats.extend(of_class)
            counts.append(len(of_class) // 2)
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise UserError(f"{root / empty[0]}: class folder without an image{more}; remove it, or add its images")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageFolder(root, classes, paths, labels, np.frombuffer(stats, np.int64).reshape(-1, 2))


def _scan_class(root: Path, name: str) -> tuple[bytes, array]:
    """Return the paths of a class for `PackedPaths`, and size and time of change of its images in turn."""
    block, stats = b"", array("q")
    for folder, _, files in sorted(os.walk(root / name, onerror=_raise_unreadable, followlinks=True)):
        inside = os.path.relpath(folder, root)
        images = [file for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        for file in images:
            stats.extend(stat_image(os.path.join(folder, file)))
        block += os.fsencode("".join(f"{inside}{os.sep}{file}\0" for file in images))
    return block, stats


def _raise_unreadable(error: OSError) -> NoReturn:
    """Raise UserError for a folder that cannot be read. Without this, `os.walk` treats the folder as empty."""
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def stat_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the size of an image file in bytes and the time of its last change in ns.

    Raises
    ------
    UserError
        If the path is no file, such as a pipe, which a reader would wait for.
    """
    try:
        stat = os.stat(path)
    except OSError:
        stat = os.lstat(path)  # the encoder reports a link without a target as a bad image
    if not S_ISREG(stat.st_mode) and not S_ISLNK(stat.st_mode):
        raise UserError(f"{path}: is no file, though it is named like an image; remove or rename it")
    return stat.st_size, stat.st_mtime_ns


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image file to the pixels of ``torchvision.datasets.folder.pil_loader``.

    Those are the pixels of Pillow's ``convert("RGB")``. Grayscale, palette, alpha and CMYK images become RGB. An EXIF
    orientation is not applied. The content decides the format, not the extension. TurboJPEG decodes JPEGs, because it
    gives Pillow's pixels in less time. If TurboJPEG reports an error or a warning, Pillow decodes the JPEG.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Raises
    ------
    Exception
        Any exception that Pillow raises for a file it cannot decode (``OSError``, ``ValueError``, ``SyntaxError``).
    UserError
        If the file is PostScript, because Pillow would run it in Ghostscript.
    """
    from PIL import Image

    from ffcv_ops.codec import jpeg

    with open(path, "rb", buffering=0) as file:
        content = file.read()
    if content.startswith(b"\xff\xd8"):
        # Pillow raises DecompressionBombError for more pixels. It shall decide about such an image.
        max_pixels = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else None
        try:
            return jpeg.decode(np.frombuffer(content, np.uint8), max_pixels=max_pixels)
        except jpeg.JPEGError:
            pass
    with Image.open(path) as image:  # opened by its path, so that Pillow's messages name the file
        if image.format == "EPS":
            raise UserError("a PostScript program, not an image")
        return np.asarray(image.convert("RGB"))


def class_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Return how two lists of classes differ, in a few words; None if they are the same."""
    if list(expected) == list(found):
        return None
    missing, added = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = []
    for what, names in (("lacks", missing), ("has also", added)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{what} {', '.join(names[:3])}{more}")
    return "; ".join(parts) or "has them in another order"
