"""List images in Arrow files, as ``save_to_disk`` of Hugging Face's `datasets` leaves them in a folder.

Arrow files are not compressed. The listing maps them into memory, touches the columns of classes and names, and notes
where the bytes of each image are in the file. A reader needs neither pyarrow nor a map.
"""

import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops import _sigbus
from ffcv_ops.errors import UserError
from ffcv_ops.sources.archives import ArchiveReader
from ffcv_ops.sources.columns import Columns, Labels, choose_columns, import_pyarrow, select
from ffcv_ops.sources.in_threads import Report
from ffcv_ops.sources.ranges import RangeFile, list_files
from ffcv_ops.sources.remote import is_remote
from ffcv_ops.sources.source import Source, Stage
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.splits import choose_split, split_name
from ffcv_ops.sources.tables import EMBED, FileRows, Rows, build_source, find_files

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".arrow"
_DICT, _STATE = "dataset_dict.json", "state.json"
# Files that `datasets` keeps beside the data in its cache: results of maps and shuffles, and unfinished files.
_CACHE_FILES = ("cache-", "tmp")
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def fits_arrow(spec: SourceSpec) -> bool:
    """Return whether an address names Arrow files, or a folder that ``save_to_disk`` has left."""
    if not os.path.isdir(spec.address):
        return spec.address.endswith(SUFFIX)
    return any(name in (_DICT, _STATE) or name.endswith(SUFFIX) for name in os.listdir(spec.address))


def open_arrow(spec: SourceSpec, stage: Stage) -> Source:
    """List the images of Arrow files. See `ffcv_ops.sources.kinds.Kind`."""
    if is_remote(spec.address):
        raise UserError(
            f"{spec.name}: Arrow files are mapped into memory, so they must lie on this machine; copy the folder "
            "here, or store the table as Parquet"
        )
    import_pyarrow(spec.address)
    files = list_files(_find(spec))
    paths = [file.path for file in files]
    with _mapped(files[0]) as content:
        columns = choose_columns(_open(content, paths[0])[0], spec, paths[0])
    rows, places, num_listed, report = Rows(paths, Labels(columns)), array("q"), 0, Report(stage)
    for number, file in enumerate(files):
        found = FileRows()
        with _mapped(file) as content:
            schema, batches = _open(content, file.path)
            columns.check_same(choose_columns(schema, spec, file.path), file.path)
            for batch in filter(len, batches):
                found.num_outer += _find_images(batch, content, columns, number, file, found.num_rows, places)
                found.add(batch, columns, file.path)
                num_listed += len(batch)
                report(num_listed)
            rows.add(found)
    if rows.are_outer(spec.name):
        return build_source(spec, rows, None, files)
    embedded = ArchiveReader(spec.address, files), np.frombuffer(places, np.int64).reshape(-1, 3)
    return build_source(spec, rows, embedded, files)


def _find(spec: SourceSpec) -> list[str]:
    """Return the files of the wanted table. Raise UserError if there are several or none, or rows in another order."""
    folder = spec.address
    if not os.path.isdir(folder):
        return choose_split(find_files(folder, SUFFIX), spec)
    if os.path.exists(os.path.join(folder, _DICT)):
        splits = [str(name) for name in _read_json(os.path.join(folder, _DICT)).get("splits", [])]
        wanted = [name for name in splits if split_name(name) == spec.split]
        if len(splits) == 1 and not spec.split:
            wanted = splits
        if len(wanted) != 1:
            raise UserError(
                f"{folder}: holds the splits {', '.join(splits)}; choose one with --split, or name its folder"
            )
        folder = os.path.join(folder, wanted[0])
    if not os.path.exists(os.path.join(folder, _STATE)):
        paths = [path for path in find_files(folder, SUFFIX) if not os.path.basename(path).startswith(_CACHE_FILES)]
        if not paths:
            raise UserError(f"{folder}: has no file that ends in {SUFFIX}, but for those of the cache of `datasets`")
        return choose_split(paths, spec)
    state = _read_json(os.path.join(folder, _STATE))
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"{folder}: an old version of `datasets` stored rows in another order here, which {_STATE} tells; load the "
            "folder with that version, and save it after flatten_indices()"
        )
    try:
        paths = [os.path.join(folder, entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{os.path.join(folder, _STATE)}: does not name the files of a table; save it again") from None
    if not paths:
        raise UserError(f"{folder}: has no rows")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(f"{missing[0]}: no such file, but {_STATE} names it; copy or save the table again")
    return paths


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or save the table again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: does not describe a table; copy or save the table again")
    return found


@contextmanager
def _mapped(file: RangeFile) -> Iterator["pa.Buffer"]:
    """Map a file. Raise UserError if it cannot be read, or at the end, if another process has cut it."""
    import pyarrow as pa

    try:
        with pa.memory_map(file.path) as opened:
            content = opened.read_buffer(file.size_bytes)
            watch = _sigbus.watch(content.address, max(1, content.size))
            try:
                yield content
                if _sigbus.was_cut(watch):
                    raise UserError(f"{file.path}: was cut while its images were listed; leave it alone")
            finally:
                _sigbus.forget(watch)
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{file.path}: cannot be read as Arrow file ({message}); copy or save it again") from error


def _open(content: "pa.Buffer", path: str) -> tuple["pa.Schema", Iterator["pa.RecordBatch"]]:
    """Return the columns and the batches of a mapped file. Raise UserError if the file is cut."""
    import pyarrow as pa

    if content.size >= len(_FILE_MAGIC) and bytes(content[: len(_FILE_MAGIC)]) == _FILE_MAGIC:
        file = pa.ipc.open_file(pa.BufferReader(content))
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    # Without its end mark, a file that was cut between two batches would look whole.
    if bytes(content[-len(_STREAM_END) :]) != _STREAM_END:
        raise UserError(f"{path}: has no end mark, so it is cut or not an Arrow file; copy or save it again")
    stream = pa.ipc.open_stream(pa.BufferReader(content))
    return stream.schema, iter(stream)


def _find_images(
    batch: "pa.RecordBatch",
    content: "pa.Buffer",
    columns: Columns,
    number: int,
    file: RangeFile,
    first_row: int,
    places: array,
) -> int:
    """Add the places of the images in a batch. Return how many rows have no bytes; raise UserError if only some do."""
    if columns.content is None:
        return len(batch)
    values = select(batch, columns.content)
    where = f"{file.path}: the column {columns.image}"
    if str(values.type) not in ("binary", "large_binary"):
        raise UserError(f"{where} is of the type {values.type}; store the images as binary")
    if values.null_count == len(values):
        return len(values)
    if values.null_count:
        row = first_row + int(np.flatnonzero(values.is_null())[0])
        raise UserError(
            f"{where} has {values.null_count} rows without bytes, such as row {row}; {EMBED}, or remove these rows"
        )
    _, offsets, data = values.buffers()
    kind = np.int32 if str(values.type) == "binary" else np.int64
    bounds = np.frombuffer(offsets, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    start = data.address - content.address if data is not None else 0
    if not 0 <= start <= start + bounds[-1] <= content.size:
        raise UserError(f"{where} is compressed; save it without compression, as save_to_disk does")
    found = np.column_stack([np.full(len(values), number), start + bounds[:-1], np.diff(bounds)])
    places.frombytes(found.astype(np.int64).tobytes())
    return 0
