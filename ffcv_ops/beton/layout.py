"""The layout of a ``.beton`` file, and the place and digests of the manifest beside it.

A file of ffcv 1.0.2 has these parts, in this order: a header; one descriptor for each field; one metadata row for each
sample; zeros up to a page boundary; pages of ``page_size`` bytes with the encoded samples; the allocation table. No
sample spans two pages. The record types below repeat those of ``ffcv.types``. So this module needs neither torch nor
Numba.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

VERSION = 2
MIN_PAGE_SIZE = 1 << 21
MAX_PAGE_SIZE = 1 << 31
MANIFEST_VERSION = 1
CHECKSUM_TYPE = np.dtype("<u4")
"""The first bytes of a sample's SHA-256. The manifest stores them for every sample."""
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
METADATA_TYPES = {
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


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file's manifest: ``train.beton`` -> ``train.beton.json``."""
    return Path(f"{os.fspath(path)}.json")


def tables_digest(head: bytes, alloc_table: np.ndarray) -> str:
    """Return the SHA-256 of header, field descriptors and metadata (`head`) followed by the allocation table."""
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(alloc_table).view(np.uint8).data)
    return digest.hexdigest()


def file_digest(tables: str, pages: Iterable[str]) -> str:
    """Return the digest of a file: the SHA-256 of its `tables_digest` and of the hash of each of its pages, in order.

    The hash of a page is the SHA-256 of the SHA-256 of each value on it, in order. So the writer's workers hash values
    that are in memory, a resumed run reads nothing back, and a check uses all cores. The digest leaves out the bytes
    before the first page and those behind the last value of each page. They are zeros, and no reader uses them.
    """
    digest = hashlib.sha256(bytes.fromhex(tables))
    for page in pages:
        digest.update(bytes.fromhex(page))
    return f"sha256:{digest.hexdigest()}"
