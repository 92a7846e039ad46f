"""List an image folder as ``torchvision.datasets.ImageFolder`` does: its classes and its images."""

import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import overload

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.remarks import (
    BESIDE,
    DEEPER,
    HIDDEN_FILES,
    HIDDEN_FOLDERS,
    TWICE,
    Remark,
    Tally,
    is_hidden,
    listing_remarks,
    similar_names,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# A network file system answers one question at a time slowly, and many questions at once quickly.
_SCAN_THREADS = 32
# Its start needs Python's lock, which busy threads give up late. So only as many classes wait as keep threads busy.
_MOST_WAITING = 2 * _SCAN_THREADS
_PROGRESS_EVERY_S = 0.5

Stage = Callable[[str, int], None]
"""Called with what is done, and with the number of images so far."""


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
    remarks : list of Remark
        What the listing left out, and what the user should know about it.
    """

    root: Path
    classes: list[str]
    paths: PackedPaths
    labels: np.ndarray
    stats: np.ndarray
    remarks: list[Remark] = field(default_factory=list)


def scan(root: str | os.PathLike[str], stage: Stage = lambda what, count: None) -> ImageFolder:
    """List the images of a folder.

    Hidden folders and files are left out (see `is_hidden`). Otherwise the listing is that of ``ImageFolder``.

    Parameters
    ----------
    root : path
    stage : callable
        See `Stage`. It is called about twice a second.

    Raises
    ------
    UserError
        If there is no such folder, if the folder has no class folders, or if a class folder has no image or cannot be
        read. Also if a link leads to a folder above it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it should have one subfolder of images a class")
    tally, extensions = Tally(), Tally()
    classes = list_classes(root, tally, extensions)
    if not classes:
        raise UserError(f"{root}: has no class folders; it should have one subfolder of images a class")
    paths, stats, counts, empty = PackedPaths(), array("q"), [], []
    seen: dict[tuple[int, int], str] = {}
    for name, listing in zip(classes, _list_in_threads(root, classes, stage), strict=True):
        paths.extend(listing.block)
        stats.extend(listing.stats)
        counts.append(len(listing.stats) // 2)
        if not counts[-1]:
            others = ", ".join(
                f"{count} {kind or 'without extension'}" for kind, (count, _) in listing.others.found.items()
            )
            empty.append(
                f"{root / name}: class folder without an image"
                + (f" but with other files ({others})" if others else "")
            )
        tally.merge(listing.tally)
        extensions.merge(listing.others)
        for identity, folder, count in listing.folders:
            first = seen.setdefault(identity, folder)
            if first != folder:
                tally.add(TWICE, f"those of {folder}, which is {first}", count)
    if empty:
        more = f", and {len(empty) - 1} more such folders" if len(empty) > 1 else ""
        raise UserError(f"{empty[0]}{more}; remove it, or add its images")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    remarks = [*listing_remarks(tally, extensions), *similar_names(classes)]
    return ImageFolder(root, classes, paths, labels, np.frombuffer(stats, np.int64).reshape(-1, 2), remarks)


def list_classes(root: Path, tally: Tally | None = None, extensions: Tally | None = None) -> list[str]:
    """Return the sorted names of the class folders. Count what lies beside them in `tally` and `extensions`."""
    tally, extensions = tally or Tally(), extensions or Tally()
    folders, files = _list_entries(root)
    for name in files:
        _count_file(name, name, tally, extensions)
        if _is_image(name):
            tally.add(BESIDE, name)
    for name in filter(is_hidden, folders):
        tally.add(HIDDEN_FOLDERS, name)
    return [name for name in folders if not is_hidden(name)]


@dataclass
class _ClassListing:
    """The images of a class: their paths for `PackedPaths`, and size and time of change of each in turn.

    `folders` has the identity, the relative path and the number of images of each folder.
    """

    block: bytes
    stats: array
    folders: list[tuple[tuple[int, int], str, int]]
    tally: Tally
    others: Tally


def _list_in_threads(root: Path, classes: Sequence[str], stage: Stage) -> Iterator[_ClassListing]:
    """Yield the listing of each class. If the caller stops early, the threads stop too."""
    counts, stop, reported_s = [0] * len(classes), threading.Event(), time.monotonic()

    def report() -> None:
        nonlocal reported_s
        if time.monotonic() - reported_s > _PROGRESS_EVERY_S:
            stage("images listed", sum(counts))
            reported_s = time.monotonic()

    futures, top = deque[Future[_ClassListing]](), _identify(root)
    threads = ThreadPoolExecutor(_SCAN_THREADS)
    try:
        for number, name in enumerate(classes):
            futures.append(threads.submit(_list_class, root, name, top, counts, number, stop))
            if len(futures) == _MOST_WAITING:
                yield _await(futures.popleft(), report)
        while futures:
            yield _await(futures.popleft(), report)
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


def _await(future: Future[_ClassListing], report: Callable[[], None]) -> _ClassListing:
    while not wait([future], _PROGRESS_EVERY_S).done:
        report()
    report()
    return future.result()


def _list_class(
    root: Path, name: str, top: tuple[int, int], counts: list[int], number: int, stop: threading.Event
) -> _ClassListing:
    """List a class, and keep ``counts[number]`` up to date for the progress."""
    listing = _ClassListing(b"", array("q"), [], Tally(), Tally())
    for folder, identity, files in sorted(_walk(root, name, top, listing.tally)):
        inside = os.path.relpath(folder, root)
        images = [file for file in files if _is_image(file)]
        if len(images) < len(files):
            for file in files:
                _count_file(file, os.path.join(inside, file), listing.tally, listing.others)
        for file in images:
            if stop.is_set():
                return listing
            listing.stats.extend(stat_image(os.path.join(folder, file)))
            counts[number] += 1
        listing.block += os.fsencode("".join(f"{inside}{os.sep}{file}\0" for file in images))
        listing.folders.append((identity, inside, len(images)))
        if inside != name and images:
            listing.tally.add(DEEPER, os.path.join(inside, images[0]), len(images))
    return listing


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _count_file(name: str, path: str, tally: Tally, extensions: Tally) -> None:
    """Count a file that is left out, unless it is an image."""
    if name.startswith("."):
        tally.add(HIDDEN_FILES, path)
    elif not _is_image(name):
        extensions.add(os.path.splitext(name)[1].lower(), path)


def _walk(
    root: Path, name: str, top: tuple[int, int], tally: Tally
) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
    """Yield path, identity and sorted files of each folder of a class. Links are followed, and circles refused."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(os.path.join(root, name), (top,))]
    while waiting:
        folder, above = waiting.pop()
        identity = _identify(folder)
        if identity in above:
            raise UserError(
                f"{folder}: leads to the folder {os.path.realpath(folder)}, which holds it, so that images would count "
                "many times; remove this link"
            )
        folders, files = _list_entries(folder)
        yield folder, identity, files
        for inner in folders:
            path = os.path.join(folder, inner)
            if is_hidden(inner):
                tally.add(HIDDEN_FOLDERS, os.path.relpath(path, root))
            else:
                waiting.append((path, (*above, identity)))


def _identify(folder: str | os.PathLike[str]) -> tuple[int, int]:
    """Return what is the same for all paths of one folder."""
    try:
        stat = os.stat(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return stat.st_dev, stat.st_ino


def _list_entries(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files in a folder. A link counts as its target."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


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
