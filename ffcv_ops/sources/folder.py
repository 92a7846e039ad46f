"""List an image folder as ``torchvision.datasets.ImageFolder`` does: its classes and its images."""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISLNK, S_ISREG

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.files import read_range
from ffcv_ops.sources.in_threads import Count, list_in_threads
from ffcv_ops.sources.labels import FLAT, assign, find_labels, number_remarks, read_labels
from ffcv_ops.sources.remarks import (
    BESIDE,
    DEEPER,
    HIDDEN_FILES,
    HIDDEN_FOLDERS,
    TWICE,
    Tally,
    is_hidden,
    listing_remarks,
    similar_names,
)
from ffcv_ops.sources.source import PackedKeys, Source, Stage, sort_keys, source_changed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# A network file system answers one question at a time slowly, and many questions at once quickly.
_SCAN_THREADS = 32


class FolderReader:
    """The files of a folder. The place of an image is its size in bytes and its time of the last change in ns."""

    def __init__(self, root: str | os.PathLike[str]):
        # The root is text: joining it to a path as a Path takes as long as reading a small file.
        self.root = str(Path(root).absolute())

    def locate(self, key: str) -> str:
        """Return the path of an image."""
        return os.path.join(self.root, key)

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of a file, if it is the one that was listed. See `Reader`."""
        path, stat = os.path.join(self.root, key), tuple(place)
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may have become a pipe
        except OSError as error:
            if not os.path.lexists(path) or stat_image(path) != stat:
                raise source_changed(path) from error
            raise  # as listed: a link without target, or a file without permission
        try:
            found = os.fstat(file)
            content = read_range(file, found.st_size, 0) if (found.st_size, found.st_mtime_ns) == stat else None
        finally:
            os.close(file)
        if content is None or len(content) < found.st_size:
            raise source_changed(path)
        return content

    def check(self) -> None:
        """Each read has noticed a change of its file. See `Reader`."""


def scan(root: str | os.PathLike[str], stage: Stage = lambda what, count: None) -> Source:
    """List the images of a folder with one subfolder for each class, in the order of ``ImageFolder``.

    Hidden folders and files are left out (see `is_hidden`). Otherwise the listing is that of ``ImageFolder``.

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
    keys, stats, counts, empty = PackedKeys(), array("q"), [], []
    seen: dict[tuple[int, int], str] = {}
    listings = list_in_threads(classes, partial(_list_class, root, _identify(root)), stage, _SCAN_THREADS)
    for name, listing in zip(classes, listings, strict=True):
        keys.extend(listing.block)
        stats.extend(listing.stats)
        counts.append(len(listing.stats) // 2)
        if not counts[-1]:
            others = f" but with other files ({listing.others.text()})" if listing.others.found else ""
            empty.append(f"{root / name}: class folder without an image{others}")
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
    places = np.frombuffer(stats, np.int64).reshape(-1, 2)
    facts = {"folder": str(root.absolute()), "num_images": len(keys)}
    reader = FolderReader(root)
    return Source(
        "folder", str(root), classes, keys, labels, places, places[:, 0], reader, facts=facts, remarks=remarks
    )


def list_flat(root: str | os.PathLike[str], labels_path: str | None, stage: Stage = lambda what, count: None) -> Source:
    """List the images of a folder, or of folders within it, whose classes are in a file of labels.

    If there is no `labels_path`, the labels of ILSVRC's validation images are looked for beside the folder.

    Raises
    ------
    UserError
        If there is no such folder, if it has no images, or if labels and images do not fit.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it should have images")
    table = read_labels(labels_path) if labels_path else None  # a mistake in it is found before the folder is listed
    (listing,) = list_in_threads([""], partial(_list_class, root, _identify(root)), stage, _SCAN_THREADS)
    keys = PackedKeys()
    keys.extend(listing.block)
    if not len(keys):
        raise UserError(f"{root}: has no class folders; it should have one subfolder of images a class")
    is_ilsvrc = keys[0].rpartition("/")[2].startswith("ILSVRC2012_val_")
    path = Path(labels_path) if labels_path else find_labels(str(root)) if is_ilsvrc else None
    if path is None:
        raise UserError(f"{root}: {FLAT}")
    classes, labels = assign(keys, table or read_labels(path), str(root), str(path))
    order = sort_keys(keys, labels)
    places = np.frombuffer(listing.stats, np.int64).reshape(-1, 2)[order]
    facts = {"folder": str(root.absolute()), "labels": str(path.absolute()), "num_images": len(keys)}
    remarks = [*listing_remarks(listing.tally, listing.others), *similar_names(classes), *number_remarks(classes)]
    return Source(
        "folder", str(root), classes, keys.take(order), labels[order], places, places[:, 0], FolderReader(root),
        facts=facts, remarks=remarks,
    )  # fmt: skip


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


def holds_folders_only(folder: Path) -> bool:
    """Return whether a folder holds folders, and no image beside them."""
    folders, files = _list_entries(folder)
    return bool(folders) and not any(map(_is_image, files))


@dataclass
class _ClassListing:
    """The images of a class: their paths for `PackedKeys`, and size and time of change of each in turn.

    `folders` has the identity, the relative path and the number of images of each folder.
    """

    block: bytes
    stats: array
    folders: list[tuple[tuple[int, int], str, int]]
    tally: Tally
    others: Tally


def _list_class(root: Path, top: tuple[int, int], name: str, count: Count) -> _ClassListing:
    """List a class, and count each image. Without a name, list the whole folder."""
    listing = _ClassListing(b"", array("q"), [], Tally(), Tally())
    for folder, identity, files in sorted(_walk(root, name, (top,) if name else (), listing.tally)):
        inside = os.path.relpath(folder, root) if name else os.path.relpath(folder, root).removeprefix(".")
        images = [file for file in files if _is_image(file)]
        if len(images) < len(files):
            for file in files:
                _count_file(file, os.path.join(inside, file), listing.tally, listing.others)
        for file in images:
            listing.stats.extend(stat_image(os.path.join(folder, file)))
            count(1)
        listing.block += os.fsencode("".join(f"{os.path.join(inside, file)}\0" for file in images))
        listing.folders.append((identity, inside, len(images)))
        if name and inside != name and images:
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
    root: Path, name: str, above: tuple[tuple[int, int], ...], tally: Tally
) -> Iterator[tuple[str, tuple[int, int], list[str]]]:
    """Yield path, identity and sorted files of each folder of a class. Links are followed, and circles refused."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(os.path.join(root, name), above)]
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
    """Return size in bytes and time of the last change in ns. Raise UserError for a pipe, or what else is no file."""
    try:
        stat = os.stat(path)
    except OSError:
        stat = os.lstat(path)  # the encoder reports a link without a target as a bad image
    if not S_ISREG(stat.st_mode) and not S_ISLNK(stat.st_mode):
        raise UserError(f"{path}: is no file, though it is named like an image; remove or rename it")
    return stat.st_size, stat.st_mtime_ns
