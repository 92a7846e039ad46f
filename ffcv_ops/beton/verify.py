"""Check a ``.beton`` file whole: header and tables, the decode of every sample, the digest of every page."""

import itertools
import os
import socket
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.layout import Beton, read_beton
from ffcv_ops.workers.processes import Workers, choose_num_workers, map_in_order
from ffcv_ops.workers.ranks import Leader

_READ_BYTES = 1 << 24
_IMAGE_TYPE = np.dtype(
    [
        *(("sample_id", "<i8"), ("ptr", "<u8"), ("size", "<u8")),
        *(("mode", "u1"), ("width", "<u2"), ("height", "<u2")),
    ]
)


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes
    ----------
    beton : Beton
    bad : dict of int to str
        The samples that do not decode, or have other bytes than the manifest knows them by, and what is wrong.
    problems : list of str
        What is wrong with the file as a whole, such as a digest that is not the manifest's.
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
class Page:
    """One page: where it is, the values on it (n,) in order, their checksums, the images on it as `_IMAGE_TYPE`."""

    start: int
    stop: int
    values: np.ndarray
    checksums: np.ndarray | None
    images: np.ndarray

    def check(self, content: bytes) -> tuple[str, list[int], bool]:
        """Return the hash of the page, the samples that the manifest knows by other bytes, and if all else is zero."""
        page_hash, end, clean = sha256(), 0, True
        changed = []
        for number, (sample_id, ptr, size) in enumerate(self.values.tolist()):
            start = ptr - self.start
            clean &= _is_zero(content[end:start])
            end = start + size
            digest = sha256(content[start:end]).digest()
            page_hash.update(digest)
            if self.checksums is not None and np.frombuffer(digest, beton.CHECKSUM_TYPE)[0] != self.checksums[number]:
                changed.append(sample_id)
        return page_hash.hexdigest(), changed, clean and _is_zero(content[end:])


def verify(
    path: str | os.PathLike[str],
    *,
    num_workers: int = -1,
    leader: Leader | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read a file from its first byte to its last and decode every image in it.

    A JPEG counts as bad if TurboJPEG reports an error or a warning, such as a premature end, or if it is of another
    size than its metadata says. Files of stock ffcv have no manifest to compare a digest with; all else is checked.

    Parameters
    ----------
    path : path
    num_workers : int
        Processes of this one that decode; -1: as many as CPUs allowed.
    leader : Leader, optional
        Of the other ranks, which lend their workers (see `ffcv_ops.workers.ranks`).
    progress : callable
        Is called with the images checked and the images in all.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        What `read_beton` says of a file whose header or tables are damaged, or that there are to be no workers.
    """
    num_workers = choose_num_workers(num_workers)
    found = read_beton(path)
    bad: dict[int, str] = {}
    pages: list[str] = []
    problems: list[str] = []
    done = 0
    stat = os.stat(path)
    identity = stat.st_size, stat.st_mtime_ns
    with closing(Workers(num_workers, _Checker, found.path.absolute(), identity, leader=leader)) as workers:
        asked, told = itertools.tee(pages_of(found))
        for page, (page_hash, failures, clean) in zip(told, map_in_order(workers, asked), strict=True):
            if not clean:
                problems.append(f"page {len(pages)} has data between its values")
            pages.append(page_hash)
            bad |= failures
            done += len(page.images)
            progress(done, found.num_samples)
    return _report(found, bad, pages, problems)


def _expected_checksums(found: Beton) -> np.ndarray | None:
    """The manifest's checksums, (num_samples,), where there is a manifest."""
    if found.manifest is None:
        return None
    try:
        expected = np.frombuffer(b64decode(found.manifest["checksums"]), beton.CHECKSUM_TYPE)
    except ValueError:
        expected = np.zeros(0, beton.CHECKSUM_TYPE)
    if len(expected) != found.num_samples:
        raise ValueError(f"{beton.manifest_path(found.path)}: its checksums are damaged; restore it, or delete it")
    return expected


def pages_of(found: Beton) -> Iterator[Page]:
    """Yield the pages of a file, in order; ValueError where the manifest's checksums are damaged."""
    expected = _expected_checksums(found)
    values = found.alloc_table[np.argsort(found.alloc_table["ptr"], kind="stable")]
    images = _images(found)
    checksums = None if expected is None else expected[values["sample_id"].astype(np.int64)]
    starts = np.arange(found.data_start, found.alloc_table_ptr + 1, found.page_size, dtype=np.uint64)
    of_values, of_images = (np.searchsorted(np.ascontiguousarray(rows["ptr"]), starts) for rows in (values, images))
    for number, start in enumerate(starts[:-1].tolist()):
        on_page = slice(of_values[number], of_values[number + 1])
        yield Page(
            start,
            start + found.page_size,
            values[on_page],
            None if checksums is None else checksums[on_page],
            images[of_images[number] : of_images[number + 1]],
        )


def _images(found: Beton) -> np.ndarray:
    """All images of a file, in the order in which they are stored."""
    types = zip(found.field_names, found.field_types, strict=True)
    columns = [found.column(name) for name, type_id in types if type_id == beton.IMAGE_FIELD]
    rows = np.concatenate([np.zeros(0, beton.IMAGE_TYPE), *columns])
    images = np.zeros(len(rows), _IMAGE_TYPE)
    images["sample_id"] = np.tile(np.arange(found.num_samples), len(columns))
    images["ptr"] = rows["data_ptr"]
    images["size"] = found.sizes_at(rows["data_ptr"])
    for name in ("mode", "width", "height"):
        images[name] = rows[name]
    return images[np.argsort(images["ptr"], kind="stable")]


class _Checker:
    """Reads pages in a worker process; answers with the page's hash, its bad samples, and if all else on it is zero."""

    def __init__(self, path: Path, identity: tuple[int, int]):
        self.path, self.identity = path, identity

    @cached_property
    def _file(self) -> BinaryIO:
        """The file, opened for the first page so that who asked for it learns what is wrong."""
        file = open(self.path, "rb")
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != self.identity:
            raise OSError(f"{self.path}: another file on {socket.gethostname()}; all machines must see the same one")
        return file

    def __call__(self, page: Page) -> tuple[str, dict[int, str], bool]:
        self._file.seek(page.start)
        content = self._file.read(page.stop - page.start)
        page_hash, changed, clean = page.check(content)
        bad = dict.fromkeys(changed, "its bytes are not those that were written")
        for sample_id, ptr, size, mode, width, height in page.images.tolist():
            if mode == beton.MODE_JPG:
                message = _check_jpeg(np.frombuffer(content, np.uint8, size, ptr - page.start), width, height)
                if message:
                    bad[sample_id] = message
        return page_hash, bad, clean


def _is_zero(content: bytes) -> bool:
    return content.count(0) == len(content)


def _check_jpeg(jpeg: np.ndarray, width: int, height: int) -> str | None:
    from ffcv_ops.codec.jpeg import check

    try:
        found = check(jpeg)
    except (ValueError, MemoryError) as error:
        return str(error) or "its header asks for more memory than there is"
    if found != (height, width):
        return f"the JPEG has {found[1]} x {found[0]} px, the metadata {width} x {height}"
    return None


def _report(found: Beton, bad: dict[int, str], pages: list[str], problems: list[str]) -> Report:
    with open(found.path, "rb") as file:
        head = file.read(found.metadata_end)
        if not _only_zeros(file, found.data_start):
            problems.append("there is data between metadata and first page")
    digest = beton.file_digest(beton.tables_digest(head, found.alloc_table), pages)
    if found.digest is not None and digest != found.digest:
        problems.append(f"the digest is {digest}, the manifest's {found.digest}")
    labels = found.labels if "label" in found.field_names else np.zeros(0, np.int64)
    counts = dict(zip(*(column.tolist() for column in np.unique(labels, return_counts=True)), strict=True))
    return Report(found, bad, problems, digest, counts)


def _only_zeros(file: BinaryIO, end: int) -> bool:
    for _ in range(file.tell(), end, _READ_BYTES):
        if not _is_zero(file.read(min(_READ_BYTES, end - file.tell()))):
            return False
    return True
