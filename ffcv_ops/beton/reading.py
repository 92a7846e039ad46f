"""Opening a ``.beton`` file: reading header and tables, with all checks before the first use."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ffcv_ops.beton.allocations import AllocationTable
from ffcv_ops.beton.layout import (
    ALLOC_TYPE,
    BYTES_FIELD,
    CUSTOM_FIELD,
    FIELD_TYPE,
    FLOAT_FIELD,
    HEADER_TYPE,
    IMAGE_FIELD,
    INT_FIELD,
    JSON_FIELD,
    MAX_PAGE_SIZE,
    METADATA_TYPES,
    MIN_PAGE_SIZE,
    MODE_JPG,
    MODE_RAW,
    TYPE_NAMES,
    VERSION,
)
from ffcv_ops.beton.manifest import check_labels, check_manifest, damaged, read_manifest
from ffcv_ops.errors import UserError

_EXPECTED_TYPES = {"image": IMAGE_FIELD, "label": INT_FIELD}
_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = _CHUNK_BYTES // ALLOC_TYPE.itemsize


@dataclass(frozen=True, eq=False)
class Beton:
    """A ``.beton`` file whose header and tables have been checked. Its arrays are read-only.

    Attributes
    ----------
    path : Path
    size_bytes, num_samples, page_size : int
    modified_s : int
        The time of the last change, in whole seconds: a file system may forget their fractions.
    field_names : tuple of str
        In the file's order. ``field_types`` has the type numbers of ``ffcv.types.TYPE_ID_HANDLER``.
    metadata : structured array, shape (num_samples,)
        One row for each sample, with the fields f0, f1, ... in the order of `field_names`.
    allocations : AllocationTable
        Offset, size and sample of every stored value.
    manifest : dict or None
        The content of the manifest; None if the file has none.
    """

    path: Path
    size_bytes: int
    modified_s: int
    num_samples: int
    page_size: int
    field_names: tuple[str, ...]
    field_types: tuple[int, ...]
    metadata: np.ndarray
    allocations: AllocationTable
    manifest: dict[str, Any] | None

    def column(self, name: str) -> np.ndarray:
        """Return the metadata of one field, shape (num_samples,); UserError when the file has no such field."""
        if name not in self.field_names:
            raise UserError(f"{self.path}: has no field {name!r}, only {', '.join(self.field_names)}")
        return self.metadata[f"f{self.field_names.index(name)}"]

    @property
    def alloc_table(self) -> np.ndarray:
        """The allocation table as the file has it, read from the file again: rows of `ALLOC_TYPE`, in its order."""
        rows = np.fromfile(self.path, ALLOC_TYPE, len(self.allocations), offset=self.alloc_table_ptr)
        if len(rows) < len(self.allocations):
            raise UserError(f"{self.path}: its size has changed since it was opened: it was replaced or cut")
        rows.setflags(write=False)
        return rows

    def sizes_at(self, ptr: np.ndarray) -> np.ndarray:
        """Return the bytes of the values at these offsets, uint32, of the shape of `ptr`."""
        return self.allocations.sizes[self.allocations.find(ptr)[0]]

    @property
    def labels(self) -> np.ndarray:
        """The class numbers, int64 (num_samples,)."""
        return self.column("label").astype(np.int64)

    @property
    def num_classes(self) -> int:
        """The manifest's number of classes, or the largest label plus one."""
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    @property
    def classes(self) -> list[str] | None:
        """The class folders' names in the order of the labels, where there is a manifest."""
        return None if self.manifest is None else self.manifest["classes"]

    @property
    def digest(self) -> str | None:
        """The manifest's digest of the whole file (see `file_digest`)."""
        return None if self.manifest is None else self.manifest["digest"]

    @property
    def metadata_end(self) -> int:
        """Offset in bytes of the end of the metadata rows."""
        return HEADER_TYPE.itemsize + len(self.field_names) * FIELD_TYPE.itemsize + self.metadata.nbytes

    @property
    def alloc_table_ptr(self) -> int:
        """Offset in bytes of the allocation table, the end of the pages."""
        return self.size_bytes - self.allocations.nbytes

    @property
    def data_start(self) -> int:
        """Offset in bytes of the first page that holds a sample."""
        if not len(self.allocations):
            return self.alloc_table_ptr
        return int(self.allocations.ptrs[0]) // self.page_size * self.page_size


def read_beton(path: str | os.PathLike[str], *, custom_fields: Mapping[str, Any] | None = None) -> Beton:
    """Read and check header, tables and manifest of a ``.beton`` file; its pages are not read.

    Parameters
    ----------
    path : path
        A file of ours or of stock ffcv.
    custom_fields : mapping of str to Field class, optional
        As for ``ffcv.loader.Loader``: the classes of fields that FFCV does not know by number.

    Returns
    -------
    Beton

    Raises
    ------
    UserError
        One line naming the file and what is wrong with it: missing, empty, not a beton, unfinished, cut, damaged, a
        field of another type than its name says, or a manifest that belongs to another file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read(path, file, dict(custom_fields or {}))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write_beton.py makes it") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; write_beton.py makes a .beton file of its images") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read(path: Path, file: BinaryIO, custom_fields: Mapping[str, Any]) -> Beton:
    status = os.fstat(file.fileno())
    size_bytes, modified_s = status.st_size, int(status.st_mtime)
    header = _read_header(path, file, size_bytes)
    num_samples, page_size = int(header["num_samples"]), int(header["page_size"])
    alloc_table_ptr = int(header["alloc_table_ptr"])

    descriptors = _records(path, file, FIELD_TYPE, int(header["num_fields"]), alloc_table_ptr, "field descriptors")
    names = _field_names(path, descriptors)
    row_type = _row_type(path, names, descriptors, custom_fields)
    metadata = _records(path, file, row_type, num_samples, alloc_table_ptr, "metadata of its samples")
    head_bytes = file.tell()
    file.seek(alloc_table_ptr)
    num_allocations, rest = divmod(size_bytes - alloc_table_ptr, ALLOC_TYPE.itemsize)
    if rest:
        raise damaged(path, "its allocation table is cut or has bytes behind it")

    manifest = read_manifest(path)
    digest = None if manifest is None else _digest_of_head(file, head_bytes)
    bounds = _Bounds(num_samples, page_size, head_bytes, alloc_table_ptr)
    file.seek(alloc_table_ptr)
    allocations, problem = _read_allocations(path, file, num_allocations, bounds, digest)
    if manifest is not None and digest is not None:
        check_manifest(path, manifest, size_bytes, num_samples, digest.hexdigest())
    if problem:
        raise damaged(path, problem)
    allocations = allocations.in_order()
    _check_overlaps(path, allocations)
    types = tuple(int(type_id) for type_id in descriptors["type_id"])
    _check_pointers(path, names, types, metadata, allocations, custom_fields)
    beton = Beton(path, size_bytes, modified_s, num_samples, page_size, names, types, metadata, allocations, manifest)
    if manifest is not None:
        check_labels(path, manifest, beton.labels)
    return beton


def _read_header(path: Path, file: BinaryIO, size_bytes: int) -> np.void:
    if size_bytes == 0:
        raise UserError(f"{path}: the file is empty; write it again with write_beton.py")
    if size_bytes < HEADER_TYPE.itemsize:
        raise damaged(path, f"{size_bytes} bytes are less than a header")
    header = np.frombuffer(file.read(HEADER_TYPE.itemsize), HEADER_TYPE)[0]
    if header["version"] != VERSION:
        raise damaged(path, f"its first bytes say version {header['version']}, not {VERSION}")
    page_size = int(header["page_size"])
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise damaged(path, f"a page size of {page_size} bytes is no power of two from {MIN_PAGE_SIZE} on")
    if header["num_fields"] == 0:
        raise damaged(path, "it has no fields")
    alloc_table_ptr = int(header["alloc_table_ptr"])
    if alloc_table_ptr == 0:
        raise UserError(f"{path}: writing this file was never finished; write it again with write_beton.py")
    if alloc_table_ptr > size_bytes:
        raise damaged(path, f"it is cut: {size_bytes} bytes, its allocation table should begin at {alloc_table_ptr}")
    if header["num_samples"] == 0:
        raise damaged(path, "it has no samples")
    return header


def _records(path: Path, file: BinaryIO, dtype: np.dtype, count: int, end: int, what: str) -> np.ndarray:
    if count * dtype.itemsize > end - file.tell():
        raise damaged(path, f"there is no room for its {what} ({count} of {dtype.itemsize} bytes)")
    records = np.fromfile(file, dtype, count)
    if len(records) < count:
        raise damaged(path, f"its {what} could not be read whole")
    records.setflags(write=False)
    return records


def _field_names(path: Path, descriptors: np.ndarray) -> tuple[str, ...]:
    names = []
    for raw in descriptors["name"]:
        name = raw.tobytes().split(b"\0")[0]
        if not name or not name.isascii() or not name.decode("ascii").isprintable():
            raise damaged(path, f"{name!r} is no name of a field")
        names.append(name.decode("ascii"))
    if len(set(names)) < len(names):
        raise damaged(path, f"two of its fields have the same name ({', '.join(names)})")
    return tuple(names)


def _row_type(
    path: Path, names: tuple[str, ...], descriptors: np.ndarray, custom_fields: Mapping[str, Any]
) -> np.dtype:
    columns = []
    for name, descriptor in zip(names, descriptors, strict=True):
        type_id = int(descriptor["type_id"])
        if name in custom_fields:
            columns.append(custom_fields[name].from_binary(descriptor["arguments"]).metadata_type)
            continue
        if type_id == CUSTOM_FIELD:
            raise UserError(f"{path}: field {name!r} is a custom field; pass its class in custom_fields")
        if type_id not in METADATA_TYPES:
            raise damaged(path, f"field {name!r} has the unknown type {type_id}")
        expected = _EXPECTED_TYPES.get(name, type_id)
        if type_id != expected:
            found = TYPE_NAMES[type_id]
            raise UserError(f"{path}: field {name!r} should be {TYPE_NAMES[expected]} and is {found}")
        columns.append(METADATA_TYPES[type_id])
    return np.dtype([("", column) for column in columns], align=True)


class _Bounds(NamedTuple):
    """The limits that every row of an allocation table must keep; offsets in bytes."""

    num_samples: int
    page_size: int
    head_bytes: int
    alloc_table_ptr: int


def _digest_of_head(file: BinaryIO, head_bytes: int) -> Any:
    """Start the SHA-256 of a file's tables with its header, descriptors and metadata."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, head_bytes, _CHUNK_BYTES):
        digest.update(file.read(min(_CHUNK_BYTES, head_bytes - start)))
    return digest


def _read_allocations(
    path: Path, file: BinaryIO, length: int, bounds: _Bounds, digest: Any
) -> tuple[AllocationTable, str]:
    """Return an allocation table in the file's order, and the problem of its first bad row."""
    # The table is read in parts, so that its 24 bytes a value are never in memory at once. The problem is not raised
    # here, because a manifest that does not belong to the file has a better message.
    table, problem = AllocationTable.empty(length, bounds.num_samples), ""
    if length and bounds.alloc_table_ptr % bounds.page_size:
        problem = f"its allocation table begins at {bounds.alloc_table_ptr}, not at the end of a page"
    for start in range(0, length, _CHUNK_ROWS):
        rows = np.fromfile(file, ALLOC_TYPE, min(_CHUNK_ROWS, length - start))
        part = slice(start, start + len(rows))
        if len(rows) < min(_CHUNK_ROWS, length - start):
            raise damaged(path, "its allocation table could not be read whole")
        if digest is not None:
            digest.update(rows.view(np.uint8).data)
        problem = problem or _problem_of_rows(rows, start, bounds)
        table.ptrs[part], table.sizes[part], table.sample_ids[part] = rows["ptr"], rows["size"], rows["sample_id"]
    return table, problem


def _problem_of_rows(rows: np.ndarray, start: int, bounds: _Bounds) -> str:
    """Return what is wrong with the first bad row: each value belongs to a sample and lies inside one page."""
    num_samples, page_size, head_bytes, alloc_table_ptr = bounds
    ptr, size = rows["ptr"], rows["size"]
    # Sizes are bounded before they are added to pointers, so that no sum wraps around.
    bounded = (size <= page_size) & (ptr >= head_bytes) & (ptr <= alloc_table_ptr)
    for holds, what in (
        (rows["sample_id"] < num_samples, "belongs to a sample that does not exist"),
        (bounded, "points outside the pages"),
        (ptr % page_size + size <= page_size, "spans two pages"),
        (ptr + size <= alloc_table_ptr, "points outside the pages"),
    ):
        if not holds.all():
            return f"entry {start + int(np.argmin(holds))} of its allocation table {what}"
    return ""


def _check_overlaps(path: Path, table: AllocationTable) -> None:
    apart = table.ptrs[1:] - table.ptrs[:-1] >= table.sizes[:-1]
    if not apart.all():
        raise damaged(path, f"the value at byte {table.ptrs[:-1][~apart][0]} overlaps the next one")


def _check_pointers(
    path: Path,
    names: tuple[str, ...],
    types: tuple[int, ...],
    metadata: np.ndarray,
    allocations: AllocationTable,
    custom_fields: Mapping[str, Any],
) -> None:
    for number, (name, type_id) in enumerate(zip(names, types, strict=True)):
        column = metadata[f"f{number}"]
        if name in custom_fields or type_id in (FLOAT_FIELD, INT_FIELD):
            continue
        if type_id == IMAGE_FIELD:
            _check_images(path, name, column, _allocated(path, name, column["data_ptr"], allocations))
        elif type_id in (BYTES_FIELD, JSON_FIELD):
            stored = column["size"] > 0
            size = _allocated(path, name, column["ptr"], allocations, stored)
            _require_samples(path, name, (size == column["size"]) | ~stored, "has another size than was allocated")
        else:
            _allocated(path, name, column, allocations)


def _allocated(
    path: Path, name: str, ptr: np.ndarray, table: AllocationTable, stored: np.ndarray | bool = True
) -> np.ndarray:
    """Return the bytes allocated at each offset. Check that the offset is its sample's, unless it is not `stored`."""
    if np.array_equal(table.ptrs, ptr):  # one value for each sample, in the order of the samples
        rows, known = np.arange(len(ptr), dtype=np.uint32), ptr > 0
    else:
        rows, known = table.find(ptr)
        known &= ptr > 0
    unused = np.logical_not(stored)
    _require_samples(path, name, known | unused, "has a pointer that the allocation table does not know")
    if not len(table):
        return np.zeros(len(ptr), np.uint32)
    own = table.sample_ids[rows] == np.arange(len(ptr), dtype=table.sample_ids.dtype)
    _require_samples(path, name, own | unused, "has the pointer of another sample")
    return table.sizes[rows]


def _check_images(path: Path, name: str, column: np.ndarray, size: np.ndarray) -> None:
    mode, width, height = column["mode"], column["width"].astype(np.uint64), column["height"].astype(np.uint64)
    _require_samples(path, name, (mode == MODE_JPG) | (mode == MODE_RAW), "is neither JPEG nor raw")
    _require_samples(path, name, (width > 0) & (height > 0), "has no pixels")
    raw_bytes = width * height * np.uint64(3)
    _require_samples(path, name, (mode != MODE_RAW) | (size == raw_bytes), "has another size than its pixels need")
    _require_samples(path, name, size > 0, "has no bytes")


def _require_samples(path: Path, name: str, holds: np.ndarray, what: str) -> None:
    if not holds.all():
        raise damaged(path, f"field {name!r} of sample {int(np.argmin(holds))} {what}")
