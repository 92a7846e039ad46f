"""Check a ``.beton`` file whole: header and tables, the decode of every sample, the digest of every page."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ffcv_ops import beton
from ffcv_ops.beton import Beton, read_beton
from ffcv_ops.processes import map_in_order, num_cpus, worker_pool

_READ_BYTES = 1 << 24
_TASK_BYTES = 1 << 23


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes
    ----------
    beton : Beton
    bad : dict of int to str
        The samples that do not decode, and why.
    problems : list of str
        What else is wrong: pages with another SHA-256 than the manifest's, a digest that does not agree.
    digest : str
        Of the file as it is.
    class_counts : dict of int to int
        Images of every class that has any.
    """

    beton: Beton
    bad: dict[int, str]
    problems: list[str]
    digest: str
    class_counts: dict[int, int]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad and not self.problems


@dataclass(frozen=True)
class _Samples:
    """Where the images of some pages are: ids, offsets and sizes in bytes, modes, widths and heights, each (n,)."""

    ids: np.ndarray
    ptr: np.ndarray
    size: np.ndarray
    mode: np.ndarray
    width: np.ndarray
    height: np.ndarray


def verify(
    path: str | os.PathLike[str],
    *,
    num_workers: int = -1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read a file from its first byte to its last and decode every image in it.

    A JPEG counts as bad if TurboJPEG reports an error or a warning, such as a premature end, or if it is of another
    size than its metadata says. Files of stock ffcv have no manifest to compare a digest with; all else is checked.

    Parameters
    ----------
    path : path
    num_workers : int
        Processes that decode; -1: as many as CPUs allowed.
    progress : callable
        Is called with the images checked and the images in all.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        What `read_beton` says of a file whose header or tables are damaged.
    """
    found = read_beton(path)
    num_workers = num_cpus() if num_workers == -1 else num_workers
    bad: dict[int, str] = {}
    pages: list[str] = []
    done = 0
    with worker_pool(num_workers) as pool:
        for hashes, failures, count in map_in_order(pool, _check_pages, _tasks(found), num_workers):
            pages += hashes
            bad |= failures
            done += count
            progress(done, found.num_samples)
    return _report(found, bad, pages)


def _tasks(found: Beton) -> Iterator[tuple[Path, int, int, int, _Samples]]:
    """Split the pages of a file into runs of `_TASK_BYTES` or one page, each with the images on it."""
    samples = _samples(found)
    task_bytes = max(_TASK_BYTES, found.page_size)
    for start in range(found.data_start, found.alloc_table_ptr, task_bytes):
        stop = min(start + task_bytes, found.alloc_table_ptr)
        first, last = np.searchsorted(samples.ptr, (start, stop))
        part = _Samples(*(column[first:last] for column in vars(samples).values()))
        yield found.path, start, stop, found.page_size, part


def _samples(found: Beton) -> _Samples:
    """All images of a file, sorted by where they are."""
    images = [
        found.column(name)
        for name, type_id in zip(found.field_names, found.field_types, strict=True)
        if type_id == beton.IMAGE_FIELD
    ]
    ids = np.tile(np.arange(found.num_samples), len(images))
    rows = np.concatenate([np.zeros(0, beton.IMAGE_TYPE), *images])
    order = np.argsort(rows["data_ptr"], kind="stable")
    ids, rows = ids[order], rows[order]
    table = found.alloc_table[np.argsort(found.alloc_table["ptr"], kind="stable")]
    size = table["size"][np.searchsorted(table["ptr"], rows["data_ptr"], side="right") - 1]
    return _Samples(ids, rows["data_ptr"], size, rows["mode"], rows["width"], rows["height"])


def _check_pages(
    path: Path, start: int, stop: int, page_size: int, samples: _Samples
) -> tuple[list[str], dict[int, str], int]:
    """Return the SHA-256 of some pages, the bad samples on them, and the number of samples looked at."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(stop - start)
    hashes = [sha256(content[at : at + page_size]).hexdigest() for at in range(0, stop - start, page_size)]
    pixels = np.frombuffer(content, np.uint8)
    bad = {}
    for sample_id, ptr, size, mode, width, height in zip(*vars(samples).values(), strict=True):
        if mode == beton.MODE_JPG:
            message = _check_jpeg(pixels[int(ptr) - start :][: int(size)], int(width), int(height))
            if message:
                bad[int(sample_id)] = message
    return hashes, bad, len(samples.ids)


def _check_jpeg(jpeg: np.ndarray, width: int, height: int) -> str | None:
    from ffcv_ops.jpeg import decode

    try:
        image = decode(jpeg)
    except ValueError as error:
        return str(error)
    if image.shape != (height, width, 3):
        return f"the JPEG has {image.shape[1]} x {image.shape[0]} px, the metadata {width} x {height}"
    return None


def _report(found: Beton, bad: dict[int, str], pages: list[str]) -> Report:
    with open(found.path, "rb") as file:
        head = file.read(found.metadata_end)
        problems = [] if _only_zeros(file, found.data_start) else ["there is data between metadata and first page"]
    digest = beton.file_digest(beton.tables_digest(head, found.alloc_table), pages)
    if found.manifest is not None:
        for number, (page, should) in enumerate(zip(pages, found.manifest["pages"], strict=False)):
            if page != should:
                problems.append(f"page {number} has changed: {_on_page(found, number)}")
        if digest != found.digest:
            problems.append(f"the digest is {digest}, the manifest's {found.digest}")
    labels = found.labels if "label" in found.field_names else np.zeros(0, np.int64)
    counts = dict(zip(*(column.tolist() for column in np.unique(labels, return_counts=True)), strict=True))
    return Report(found, bad, problems, digest, counts)


def _only_zeros(file: BinaryIO, end: int) -> bool:
    while file.tell() < end:
        content = file.read(min(_READ_BYTES, end - file.tell()))
        if content.count(0) < len(content):
            return False
    return True


def _on_page(found: Beton, number: int) -> str:
    start = found.data_start + number * found.page_size
    ptr = found.alloc_table["ptr"]
    ids = np.unique(found.alloc_table["sample_id"][(ptr >= start) & (ptr < start + found.page_size)])
    return f"it holds {len(ids)} samples, {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}"
