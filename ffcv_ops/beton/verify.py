"""Check a whole ``.beton`` file: header and tables, the decoding of every image, the digest of every page."""

import itertools
import os
import socket
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from hashlib import sha256
from typing import BinaryIO

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.reading import Beton, read_beton
from ffcv_ops.errors import UserError
from ffcv_ops.units import show_bytes, show_class_sizes
from ffcv_ops.workers.processes import choose_num_workers, use_executor
from ffcv_ops.workers.tasks import run_in_order

_READ_BYTES = 1 << 24
_IMAGE_TYPE = np.dtype(
    [
        *(("sample_id", "<i8"), ("ptr", "<u8"), ("size", "<u8")),
        *(("mode", "u1"), ("width", "<u2"), ("height", "<u2")),
    ]
)


@dataclass(frozen=True)
class Report:
    """The result of `verify`.

    Attributes
    ----------
    beton : Beton
    bad : dict of int to str
        The bad samples and what is wrong with each. A bad sample does not decode, or its bytes are not those that the
        manifest knows.
    unsupported : dict of int to str
        The samples that are JPEGs of a kind that is not decoded, such as CMYK, and what to do. They may be sound.
    problems : list of str
        The faults of the file as a whole, such as a digest that differs from the manifest's.
    digest : str
        The digest of the file as it is.
    class_counts : dict of int to int
        Number of images of every class that has any.
    """

    beton: Beton
    bad: dict[int, str]
    unsupported: dict[int, str]
    problems: list[str]
    digest: str
    class_counts: dict[int, int]

    @property
    def sound(self) -> bool:
        """Return whether nothing is wrong, and every image can be decoded."""
        return not self.bad and not self.unsupported and not self.problems

    def lines(self, time_s: float) -> list[str]:
        """Return what the file holds. `time_s` is the time that the check took."""
        file, compared = self.beton, "" if self.beton.manifest else "; there is no manifest to compare it with"
        rate = f"{file.num_samples / time_s:.0f} images/s"
        return [
            f"{file.path}: {file.num_samples} images, {show_bytes(file.size_bytes)}, {rate}",
            *([show_class_sizes(self.class_counts.values())] if self.class_counts else []),
            f"digest {self.digest}{compared}",
        ]

    def damage_lines(self) -> list[str]:
        """Return what is wrong: each fault, then their number."""
        faults = {"bad": self.bad, "unsupported": self.unsupported}
        samples = ", ".join(f"{len(found)} {kind} samples" for kind, found in faults.items() if found or kind == "bad")
        return [
            *(f"damaged: {problem}" for problem in self.problems),
            *(f"damaged: sample {sample}: {reason}" for sample, reason in sorted(self.bad.items())),
            *(f"unsupported: sample {sample}: {reason}" for sample, reason in sorted(self.unsupported.items())),
            f"{self.beton.path}: {samples}, {len(self.problems)} other problems",
        ]


def verify(
    path: str | os.PathLike[str],
    *,
    num_workers: int = -1,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read every byte of a file and decode every image in it.

    A JPEG is bad if TurboJPEG reports an error or a warning, such as a premature end. It is also bad if its size is not
    the one in the metadata. A file of stock ffcv has no manifest, so there is no digest to compare with.

    Parameters
    ----------
    path : path
    num_workers : int
        Processes that decode; -1: as many as CPUs allowed. With an `executor`, the number of tasks that it runs at a
        time; -1: as many as it tells.
    executor : concurrent.futures.Executor, optional
        Checks the pages, instead of processes of this machine. It stays open.
    progress : callable
        Called with the number of images checked and the number of all images.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        If `read_beton` finds header, tables or manifest damaged, or if `num_workers` is 0.
    """
    choose_num_workers(num_workers)
    found = read_beton(path)
    bad: dict[int, str] = {}
    unsupported: dict[int, str] = {}
    page_hashes: list[str] = []
    problems: list[str] = []
    num_done = 0
    stat = os.stat(path)
    identity = stat.st_size, stat.st_mtime_ns
    known_workers = None if num_workers == -1 else num_workers
    with use_executor(executor, num_workers) as workers:
        pages, sent = itertools.tee(_pages_of(found))
        tasks = (_CheckTask(str(found.path.absolute()), identity, page) for page in sent)
        for page, checked in zip(pages, run_in_order(workers, tasks, known_workers), strict=True):
            if not checked.rest_is_zero:
                problems.append(f"page {len(page_hashes)} has data between its values")
            page_hashes.append(checked.sha256)
            bad |= checked.bad
            unsupported |= checked.unsupported
            num_done += len(page.images)
            progress(num_done, found.num_samples)
    digest = _check_digest(found, page_hashes, problems)
    labels = found.labels if "label" in found.field_names else np.zeros(0, np.int64)
    counts = dict(zip(*(column.tolist() for column in np.unique(labels, return_counts=True)), strict=True))
    return Report(found, bad, unsupported, problems, digest, counts)


def _check_digest(found: Beton, page_hashes: list[str], problems: list[str]) -> str:
    """Return the digest of a file as it is. Add what is wrong outside the pages to `problems`."""
    with open(found.path, "rb") as file:
        head = file.read(found.metadata_end)
        if not _only_zeros(file, found.data_start):
            problems.append("there is data between metadata and first page")
    digest = beton.file_digest(beton.tables_digest(head, found.alloc_table), page_hashes)
    if found.digest is not None and digest != found.digest:
        problems.append(f"the digest is {digest}, the manifest's {found.digest}")
    return digest


def _only_zeros(file: BinaryIO, end: int) -> bool:
    """Return whether a file has only zeros from its position to an offset."""
    for _ in range(file.tell(), end, _READ_BYTES):
        if not _is_zero(file.read(min(_READ_BYTES, end - file.tell()))):
            return False
    return True


def _is_zero(content: bytes) -> bool:
    return content.count(0) == len(content)


# ---------------------------------------------------------------------------------------------------------------------
# The tables, page by page


@dataclass(frozen=True)
class _PageTable:
    """The values and images on one page, in the order in which they are stored.

    Attributes
    ----------
    start, stop : int
        Offsets of the page in bytes.
    values : structured array, shape (n,)
        Rows of the allocation table.
    checksums : ndarray of uint32, shape (n,), or None
        The manifest's checksum of each value; None without a manifest.
    images : structured array, shape (m,)
        The images among the values, as `_IMAGE_TYPE`.
    """

    start: int
    stop: int
    values: np.ndarray
    checksums: np.ndarray | None
    images: np.ndarray


def _pages_of(found: Beton) -> Iterator[_PageTable]:
    """Yield the tables of a file, page by page. Raise UserError if the manifest's checksums are damaged."""
    expected = _expected_checksums(found)
    values = found.alloc_table[np.argsort(found.alloc_table["ptr"], kind="stable")]
    images = _images_of(found)
    checksums = None if expected is None else expected[values["sample_id"].astype(np.int64)]
    starts = np.arange(found.data_start, found.alloc_table_ptr + 1, found.page_size, dtype=np.uint64)
    of_values, of_images = (np.searchsorted(np.ascontiguousarray(rows["ptr"]), starts) for rows in (values, images))
    for number, start in enumerate(starts[:-1].tolist()):
        on_page = slice(of_values[number], of_values[number + 1])
        yield _PageTable(
            start,
            start + found.page_size,
            values[on_page],
            None if checksums is None else checksums[on_page],
            images[of_images[number] : of_images[number + 1]],
        )


def _expected_checksums(found: Beton) -> np.ndarray | None:
    """Return the manifest's checksums, uint32 (num_samples,); None without a manifest."""
    if found.manifest is None:
        return None
    try:
        expected = np.frombuffer(b64decode(found.manifest["checksums"]), beton.CHECKSUM_TYPE)
    except ValueError:
        expected = np.zeros(0, beton.CHECKSUM_TYPE)
    if len(expected) != found.num_samples:
        raise UserError(f"{beton.manifest_path(found.path)}: its checksums are damaged; restore it, or delete it")
    return expected


def _images_of(found: Beton) -> np.ndarray:
    """Return all images of a file as `_IMAGE_TYPE`, in the order in which they are stored."""
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


# ---------------------------------------------------------------------------------------------------------------------
# In the workers


@dataclass(frozen=True)
class _CheckedPage:
    """The result for one page: SHA-256, bad and unsupported samples, whether all bytes between the values are zero."""

    sha256: str
    bad: dict[int, str]
    unsupported: dict[int, str]
    rest_is_zero: bool


@dataclass(frozen=True)
class _CheckTask:
    """The task to read a page and to check each value on it. See `ffcv_ops.workers.tasks.Task`.

    Attributes
    ----------
    path : str
        The file, which may be on another machine than the one that asks.
    identity : tuple of int
        Size in bytes and time of change in ns of the file that is to be checked.
    page : _PageTable
    """

    path: str
    identity: tuple[int, int]
    page: _PageTable

    def __call__(self) -> _CheckedPage:
        """Return the result for the page. Raise OSError if the file is another one on this machine."""
        page = self.page
        with open(self.path, "rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != self.identity:
                raise OSError(
                    f"{self.path}: another file on {socket.gethostname()}; all machines must see the same one"
                )
            file.seek(page.start)
            content = file.read(page.stop - page.start)
        digests = [
            sha256(content[ptr - page.start : ptr - page.start + size]).digest()
            for _, ptr, size in page.values.tolist()
        ]
        undecodable, unsupported = _undecodable_samples(page, content)
        bad = _changed_samples(page, digests) | undecodable
        unsupported = {sample: reason for sample, reason in unsupported.items() if sample not in bad}
        return _CheckedPage(sha256(b"".join(digests)).hexdigest(), bad, unsupported, _rest_is_zero(page, content))

    def split(self) -> list["_CheckTask"]:
        """Return the task itself, because the digest of a page needs all of its values."""
        return [self]

    def join(self, results: list[_CheckedPage]) -> _CheckedPage:
        """Return the one result."""
        return results[0]

    def name(self) -> str:
        """Return the place of the page."""
        return f"{self.path}: the page from byte {self.page.start} on"


def _changed_samples(page: _PageTable, digests: list[bytes]) -> dict[int, str]:
    """Return the samples whose SHA-256 does not begin with the manifest's checksum."""
    if page.checksums is None:
        return {}
    size_bytes = beton.CHECKSUM_TYPE.itemsize
    found = np.frombuffer(b"".join(digest[:size_bytes] for digest in digests), beton.CHECKSUM_TYPE)
    changed = page.values["sample_id"][found != page.checksums]
    return dict.fromkeys(changed.tolist(), "its bytes are not those that were written")


def _undecodable_samples(page: _PageTable, content: bytes) -> tuple[dict[int, str], dict[int, str]]:
    """Return the samples whose JPEG is bad, those whose JPEG is of an unsupported kind, and the reasons."""
    from ffcv_ops.codec.jpeg import UnsupportedJPEG, check

    bad, unsupported = {}, {}
    for sample_id, ptr, size, mode, width, height in page.images.tolist():
        if mode != beton.MODE_JPG:
            continue
        try:
            found = check(np.frombuffer(content, np.uint8, size, ptr - page.start))
            if found != (height, width):
                bad[sample_id] = f"the JPEG has {found[1]} x {found[0]} px, the metadata {width} x {height}"
        except UnsupportedJPEG as error:
            unsupported[sample_id] = str(error)
        except (ValueError, MemoryError) as error:
            bad[sample_id] = str(error) or "its header asks for more memory than there is"
    return bad, unsupported


def _rest_is_zero(page: _PageTable, content: bytes) -> bool:
    """Return whether all bytes of a page are zero that belong to no value."""
    starts = (page.values["ptr"] - np.uint64(page.start)).tolist()
    ends = [start + size for start, size in zip(starts, page.values["size"].tolist(), strict=True)]
    gaps = zip([0, *ends], [*starts, len(content)], strict=True)
    return all(_is_zero(content[start:stop]) for start, stop in gaps)
