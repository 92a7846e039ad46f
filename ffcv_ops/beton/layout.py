"""The layout of a ``.beton`` file, the checks before its first use, and the manifest beside it.

A file of ffcv 1.0.2 is, in this order: a header, one descriptor a field, one metadata row a sample, zeros up to a page
boundary, pages of ``page_size`` bytes that hold the encoded samples, and the allocation table. No sample spans two
pages. The record types below are those of ``ffcv.types``, written out so that reading a file needs neither torch nor
Numba.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ffcv_ops.errors import UserError

VERSION = 2
MIN_PAGE_SIZE = 1 << 21
MAX_PAGE_SIZE = 1 << 31
MANIFEST_VERSION = 1
CHECKSUM_TYPE = np.dtype("<u4")
"""The first bytes of a sample's SHA-256, by which the manifest knows each of them."""
MODE_JPG, MODE_RAW = 0, 1
FLOAT_FIELD, INT_FIELD, IMAGE_FIELD, BYTES_FIELD, NDARRAY_FIELD, JSON_FIELD, TENSOR_FIELD = range(7)
CUSTOM_FIELD = 255

HEADER_TYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD_TYPE = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOC_TYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_TYPE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_BYTES_TYPE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_METADATA_TYPES = {
    FLOAT_FIELD: np.dtype("<f8"),
    INT_FIELD: np.dtype("<i8"),
    IMAGE_FIELD: IMAGE_TYPE,
    BYTES_FIELD: _BYTES_TYPE,
    NDARRAY_FIELD: np.dtype("<u8"),
    JSON_FIELD: _BYTES_TYPE,
    TENSOR_FIELD: np.dtype("<u8"),
}
TYPE_NAMES = {
    FLOAT_FIELD: "FloatField",
    INT_FIELD: "IntField",
    IMAGE_FIELD: "RGBImageField",
    BYTES_FIELD: "BytesField",
    NDARRAY_FIELD: "NDArrayField",
    JSON_FIELD: "JSONField",
    TENSOR_FIELD: "TorchTensorField",
    CUSTOM_FIELD: "a custom field",
}
_EXPECTED_TYPES = {"image": IMAGE_FIELD, "label": INT_FIELD}


@dataclass(frozen=True, eq=False)
class Beton:
    """A ``.beton`` file whose header and tables have been checked; its arrays are read-only.

    Attributes
    ----------
    path : Path
    size_bytes, num_samples, page_size : int
    field_names : tuple of str
        In the file's order; ``field_types`` has the type numbers of ``ffcv.types.TYPE_ID_HANDLER``.
    metadata : structured array, shape (num_samples,)
        One row a sample with the fields f0, f1, ... in the order of `field_names`.
    alloc_table : structured array, shape (allocations,)
        ``sample_id``, ``ptr`` and ``size`` (bytes) of every stored value, in the file's order.
    manifest : dict or None
        The content of `manifest_path`, None for a file written without one.
    """

    path: Path
    size_bytes: int
    num_samples: int
    page_size: int
    field_names: tuple[str, ...]
    field_types: tuple[int, ...]
    metadata: np.ndarray
    alloc_table: np.ndarray
    manifest: dict[str, Any] | None

    def column(self, name: str) -> np.ndarray:
        """Return the metadata of one field, shape (num_samples,); UserError when the file has no such field."""
        if name not in self.field_names:
            raise UserError(f"{self.path}: has no field {name!r}, only {', '.join(self.field_names)}")
        return self.metadata[f"f{self.field_names.index(name)}"]

    def sizes_at(self, ptr: np.ndarray) -> np.ndarray:
        """Return the bytes of the values at these offsets, uint64, of the shape of `ptr`."""
        # An empty value shares its offset with the value behind it; the last in this order is the one with bytes.
        table = self.alloc_table[np.lexsort((self.alloc_table["size"], self.alloc_table["ptr"]))]
        return table["size"][np.searchsorted(table["ptr"], ptr, side="right") - 1]

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
        return self.size_bytes - self.alloc_table.nbytes

    @property
    def data_start(self) -> int:
        """Offset in bytes of the first page that holds a sample."""
        if not len(self.alloc_table):
            return self.alloc_table_ptr
        return int(self.alloc_table["ptr"].min()) // self.page_size * self.page_size


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Return where the manifest of a file is: ``train.beton`` -> ``train.beton.json``."""
    return Path(f"{os.fspath(path)}.json")


def tables_digest(head: bytes, alloc_table: np.ndarray) -> str:
    """Return the SHA-256 of header, field descriptors and metadata (`head`) followed by the allocation table."""
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(alloc_table).view(np.uint8).data)
    return digest.hexdigest()


def file_digest(tables: str, pages: Iterable[str]) -> str:
    """Return the digest of a file: the SHA-256 of its `tables_digest` and of the hash of each of its pages, in order.

    The hash of a page is the SHA-256 of the SHA-256 of each value on it, in order. So the writer's workers hash what
    they have in memory, a resumed run reads nothing back, and a check uses all cores. The bytes it leaves out, before
    the first page and behind the last value of each, are zeros that no reader looks at.
    """
    digest = hashlib.sha256(bytes.fromhex(tables))
    for page in pages:
        digest.update(bytes.fromhex(page))
    return f"sha256:{digest.hexdigest()}"


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
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read(path: Path, file: BinaryIO, custom_fields: Mapping[str, Any]) -> Beton:
    size_bytes = os.fstat(file.fileno()).st_size
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
        raise _damaged(path, "its allocation table is cut or has bytes behind it")
    alloc_table = _records(path, file, ALLOC_TYPE, num_allocations, size_bytes, "allocation table")

    types = tuple(int(type_id) for type_id in descriptors["type_id"])
    manifest = _read_manifest(path)
    if manifest is not None:
        file.seek(0)
        _check_manifest(path, manifest, size_bytes, num_samples, tables_digest(file.read(head_bytes), alloc_table))
    _check_allocations(path, alloc_table, num_samples, page_size, head_bytes, alloc_table_ptr)
    _check_pointers(path, names, types, metadata, alloc_table, custom_fields)
    beton = Beton(path, size_bytes, num_samples, page_size, names, types, metadata, alloc_table, manifest)
    if manifest is not None:
        _check_labels(beton, manifest)
    return beton


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged or not a .beton file: {what}; write it again with write_beton.py")


def _read_header(path: Path, file: BinaryIO, size_bytes: int) -> np.void:
    if size_bytes == 0:
        raise UserError(f"{path}: the file is empty; write it again with write_beton.py")
    if size_bytes < HEADER_TYPE.itemsize:
        raise _damaged(path, f"{size_bytes} bytes are less than a header")
    header = np.frombuffer(file.read(HEADER_TYPE.itemsize), HEADER_TYPE)[0]
    if header["version"] != VERSION:
        raise _damaged(path, f"its first bytes say version {header['version']}, not {VERSION}")
    page_size = int(header["page_size"])
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise _damaged(path, f"a page size of {page_size} bytes is no power of two from {MIN_PAGE_SIZE} on")
    if header["num_fields"] == 0:
        raise _damaged(path, "it has no fields")
    alloc_table_ptr = int(header["alloc_table_ptr"])
    if alloc_table_ptr == 0:
        raise UserError(f"{path}: writing this file was never finished; write it again with write_beton.py")
    if alloc_table_ptr > size_bytes:
        raise _damaged(path, f"it is cut: {size_bytes} bytes, its allocation table should begin at {alloc_table_ptr}")
    if header["num_samples"] == 0:
        raise _damaged(path, "it has no samples")
    return header


def _records(path: Path, file: BinaryIO, dtype: np.dtype, count: int, end: int, what: str) -> np.ndarray:
    if count * dtype.itemsize > end - file.tell():
        raise _damaged(path, f"there is no room for its {what} ({count} of {dtype.itemsize} bytes)")
    records = np.fromfile(file, dtype, count)
    if len(records) < count:
        raise _damaged(path, f"its {what} could not be read whole")
    records.setflags(write=False)
    return records


def _field_names(path: Path, descriptors: np.ndarray) -> tuple[str, ...]:
    names = []
    for raw in descriptors["name"]:
        name = raw.tobytes().split(b"\0")[0]
        if not name or not name.isascii() or not name.decode("ascii").isprintable():
            raise _damaged(path, f"{name!r} is no name of a field")
        names.append(name.decode("ascii"))
    if len(set(names)) < len(names):
        raise _damaged(path, f"two of its fields have the same name ({', '.join(names)})")
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
        if type_id not in _METADATA_TYPES:
            raise _damaged(path, f"field {name!r} has the unknown type {type_id}")
        expected = _EXPECTED_TYPES.get(name, type_id)
        if type_id != expected:
            found = TYPE_NAMES[type_id]
            raise UserError(f"{path}: field {name!r} should be {TYPE_NAMES[expected]} and is {found}")
        columns.append(_METADATA_TYPES[type_id])
    return np.dtype([("", column) for column in columns], align=True)


def _check_allocations(
    path: Path, alloc_table: np.ndarray, num_samples: int, page_size: int, head_bytes: int, alloc_table_ptr: int
) -> None:
    """Check that every allocation lies inside one page of the data region, overlaps no other and names a sample."""
    if not len(alloc_table):
        return
    if alloc_table_ptr % page_size:
        raise _damaged(path, f"its allocation table begins at {alloc_table_ptr}, not at the end of a page")
    ptr, size = alloc_table["ptr"], alloc_table["size"]
    # Sizes are bounded before they are added to pointers, so that no sum wraps around.
    _require(path, alloc_table["sample_id"] < num_samples, "belongs to a sample that does not exist")
    _require(path, (size <= page_size) & (ptr >= head_bytes) & (ptr <= alloc_table_ptr), "points outside the pages")
    _require(path, ptr % page_size + size <= page_size, "spans two pages")
    _require(path, ptr + size <= alloc_table_ptr, "points outside the pages")
    if not np.all(ptr[1:] > ptr[:-1]):
        order = np.argsort(ptr, kind="stable")
        ptr, size = ptr[order], size[order]
    _require(path, ptr[1:] >= ptr[:-1] + size[:-1], "overlaps the next one")


def _require(path: Path, holds: np.ndarray, what: str) -> None:
    if not holds.all():
        raise _damaged(path, f"entry {int(np.argmin(holds))} of its allocation table {what}")


def _check_pointers(
    path: Path,
    names: tuple[str, ...],
    types: tuple[int, ...],
    metadata: np.ndarray,
    alloc_table: np.ndarray,
    custom_fields: Mapping[str, Any],
) -> None:
    for number, (name, type_id) in enumerate(zip(names, types, strict=True)):
        column = metadata[f"f{number}"]
        if name in custom_fields or type_id in (FLOAT_FIELD, INT_FIELD):
            continue
        if type_id == IMAGE_FIELD:
            _check_images(path, name, column, _allocated(path, name, column["data_ptr"], alloc_table))
        elif type_id in (BYTES_FIELD, JSON_FIELD):
            stored = column["size"] > 0
            size = _allocated(path, name, column["ptr"], alloc_table, stored)
            _require_samples(path, name, (size == column["size"]) | ~stored, "has another size than was allocated")
        else:
            _allocated(path, name, column, alloc_table)


def _allocated(
    path: Path, name: str, ptr: np.ndarray, alloc_table: np.ndarray, stored: np.ndarray | bool = True
) -> np.ndarray:
    """Return the bytes allocated at every pointer, having checked that they are its sample's, where one is `stored`."""
    table = alloc_table
    if len(table) == len(ptr):
        table = table[np.argsort(table["sample_id"], kind="stable")]
    if len(table) != len(ptr) or not np.array_equal(table["ptr"], ptr):
        # An empty value shares its pointer with the value behind it; the last in this order is the one with bytes.
        table = table[np.lexsort((table["size"], table["ptr"]))] if len(table) else np.zeros(1, ALLOC_TYPE)
        table = table[np.searchsorted(table["ptr"], ptr, side="right") - 1]
    found = np.where(stored, (table["ptr"] == ptr) & (ptr > 0), True)
    _require_samples(path, name, found, "has a pointer that the allocation table does not know")
    own = np.where(stored, table["sample_id"] == np.arange(len(ptr)), True)
    _require_samples(path, name, own, "has the pointer of another sample")
    return table["size"]


def _check_images(path: Path, name: str, column: np.ndarray, size: np.ndarray) -> None:
    mode, width, height = column["mode"], column["width"].astype(np.uint64), column["height"].astype(np.uint64)
    _require_samples(path, name, (mode == MODE_JPG) | (mode == MODE_RAW), "is neither JPEG nor raw")
    _require_samples(path, name, (width > 0) & (height > 0), "has no pixels")
    raw_bytes = width * height * np.uint64(3)
    _require_samples(path, name, (mode != MODE_RAW) | (size == raw_bytes), "has another size than its pixels need")
    _require_samples(path, name, size > 0, "has no bytes")


def _require_samples(path: Path, name: str, holds: np.ndarray, what: str) -> None:
    if not holds.all():
        raise _damaged(path, f"field {name!r} of sample {int(np.argmin(holds))} {what}")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    manifest = manifest_path(path)
    try:
        content = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError):
        raise UserError(f"{manifest}: not a readable manifest; restore it, or delete it to go without") from None
    types = {"size_bytes": int, "num_samples": int, "classes": list, "class_counts": list, "tables": str}
    types |= {"digest": str, "checksums": str}
    if not isinstance(content, dict) or content.get("format") != MANIFEST_VERSION:
        raise UserError(f"{manifest}: not a manifest of format {MANIFEST_VERSION}; restore it, or delete it")
    for key, kind in types.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{manifest}: lacks {key!r}; restore it, or delete it to go without")
    if not all(isinstance(name, str) for name in content["classes"]):
        raise UserError(f"{manifest}: its classes are no names; restore it, or delete it to go without")
    return content


def _check_manifest(path: Path, manifest: dict[str, Any], size_bytes: int, num_samples: int, tables: str) -> None:
    beside = manifest_path(path).name
    for what, found in (("size_bytes", size_bytes), ("num_samples", num_samples)):
        if manifest[what] != found:
            raise UserError(
                f"{path}: damaged, or {beside} belongs to another file: {what} is {found} and should be "
                f"{manifest[what]}; write it again with write_beton.py"
            )
    if manifest["tables"] != tables:
        raise UserError(
            f"{path}: damaged, or {beside} belongs to another file: header and tables have another SHA-256 than it "
            "says; write it again with write_beton.py"
        )


def _check_labels(beton: Beton, manifest: dict[str, Any]) -> None:
    labels, num_classes = beton.labels, len(manifest["classes"])
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        sample = int(np.argmax(outside))
        raise _damaged(beton.path, f"sample {sample} has label {labels[sample]}, the manifest {num_classes} classes")
    if np.bincount(labels, minlength=num_classes).tolist() != manifest["class_counts"]:
        raise UserError(f"{beton.path}: the images per class are not those of {manifest_path(beton.path).name}")
