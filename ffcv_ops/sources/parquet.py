"""List and read images in Parquet files, as Hugging Face's `datasets` writes them.

The listing reads the columns of classes and names, and only the places of the images. A reader then finds single images
in a row group (see `ffcv_ops.sources.parquet_pages`).
"""

import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import is_folder
from ffcv_ops.sources.columns import Columns, Labels, choose_columns, import_pyarrow, select
from ffcv_ops.sources.in_threads import Count, list_in_threads
from ffcv_ops.sources.index import load_index, with_index
from ffcv_ops.sources.parquet_content import PageError
from ffcv_ops.sources.parquet_pages import ColumnPages
from ffcv_ops.sources.parquet_places import SIZE_COLUMN, PlacedReader, find_places
from ffcv_ops.sources.ranges import RangeFile, RangeReader, list_files
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.source import Source, SourceError, Stage
from ffcv_ops.sources.splits import choose_split
from ffcv_ops.sources.tables import EMBED, Rows, build_source, find_files, pack_names, walk
from ffcv_ops.sources.webdataset import read_class_names
from ffcv_ops.sources.window import REMOTE, Read, Window
from ffcv_ops.units import show_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ffcv_ops.sources.kinds import SourceSpec

SUFFIX = ".parquet"
# More of them hold more memory of pyarrow, and its readers need Python's lock for each read.
_THREADS, _THREADS_REMOTE = 4, 16
_ROWS_AT_ONCE = 1 << 16
_ENCODINGS = frozenset("PLAIN RLE BIT_PACKED PLAIN_DICTIONARY RLE_DICTIONARY".split())
_CODECS = frozenset("UNCOMPRESSED SNAPPY GZIP BROTLI ZSTD LZ4".split())
# Places of pages and values that a process keeps. Those of ImageNet take less than half of it.
_MOST_PAGES_BYTES = 64 << 20
# From here on, decompressing a page for each image takes about as long as encoding the image.
_LARGE_PAGE_BYTES = 4 << 20
# Headers of pages and lengths of values take up to this size, and images seldom so little.
_SMALL_BYTES = 4 << 10


@dataclass(frozen=True)
class RowGroup:
    """The column of images in a row group.

    Attributes
    ----------
    file : int
        The number of the file in the reader.
    offset, size_bytes : int
        The place of the column in the file.
    codec : str
        Its compression, as pyarrow names it.
    max_level : int
        See `ColumnPages`.
    num_rows : int
    """

    file: int
    offset: int
    size_bytes: int
    codec: str
    max_level: int
    num_rows: int


class ParquetReader:
    """The images in Parquet files. The place of an image is the number of its row, counted through all row groups."""

    def __init__(self, address: str, files: Sequence[RangeFile], groups: Sequence[RowGroup]):
        self.address, self._ranges, self._groups = public_name(address), RangeReader(files), groups
        self._first_rows = [0, *accumulate(group.num_rows for group in groups)]
        self._pages: OrderedDict[int, ColumnPages] = OrderedDict()
        self._memory_bytes = 0
        self._lock = threading.Lock()
        self._windows = threading.local()  # the one that a thread has used last, with its row group

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self._ranges.files, self._groups)

    def locate(self, key: str) -> str:
        """Return the address of the files and the name of the image."""
        return f"{self.address}/{key}"

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of an image. See `ffcv_ops.sources.source.Reader`."""
        (row,) = place
        number = bisect_right(self._first_rows, row) - 1
        try:
            return self.pages(number).value(row - self._first_rows[number])
        except PageError as error:
            group = self._groups[number]
            raise SourceError(
                f"{self._ranges.files[group.file].name}: is damaged in the row group whose images begin at byte "
                f"{group.offset}, at {key} ({error}); copy or write the file again"
            ) from error

    def pages(self, number: int) -> ColumnPages:
        """Return the pages of the images in a row group. Those that were used last are kept.

        Raises
        ------
        PageError
            If the header of a page is damaged.
        """
        with self._lock:
            found = self._pages.get(number)
            if found is not None:
                self._pages.move_to_end(number)
                return found
        found = self.find_pages(number)
        with self._lock:
            if number not in self._pages:
                self._pages[number] = found
                self._memory_bytes += found.memory_bytes
            while self._memory_bytes > _MOST_PAGES_BYTES and len(self._pages) > 1:
                self._memory_bytes -= self._pages.popitem(last=False)[1].memory_bytes
        return found

    def find_pages(self, number: int) -> ColumnPages:
        """Return the pages of a row group as `pages` does, but keep none."""
        group = self._groups[number]
        return ColumnPages(self._read_of(group), group.offset, group.size_bytes, group.codec, group.max_level)

    def _read_of(self, group: RowGroup) -> Read:
        """Return how the column of a row group is read. A server gives headers and lengths of many pages at once."""

        def read(offset: int, size_bytes: int) -> bytes:
            return self._ranges.read(group.file, offset, size_bytes)

        def read_small(offset: int, size_bytes: int) -> bytes:
            if size_bytes > _SMALL_BYTES:
                return read(offset, size_bytes)
            window, owner = getattr(self._windows, "held", (None, None))
            if window is None or owner is not group:
                window = Window(read, group.offset + group.size_bytes, REMOTE)
                self._windows.held = window, group
            return bytes(window.get(offset, size_bytes))

        return read_small if self._ranges.window_sizes is REMOTE else read

    def check(self) -> None:
        """See `ffcv_ops.sources.source.Reader`."""
        self._ranges.check()


class _RangeStream(io.RawIOBase):
    """A file of a `RangeReader`, for pyarrow."""

    def __init__(self, ranges: RangeReader, number: int):
        super().__init__()
        self._ranges, self._number, self._position = ranges, number, 0
        self._size_bytes = ranges.files[number].size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size_bytes - self._position)
        size = left if size is None or size < 0 else min(size, left)
        content = self._ranges.read(self._number, self._position, size)
        self._position += len(content)
        return content


@dataclass
class _FileRows:
    """The rows of a file as the listing finds them. `num_outer` rows have no bytes, but may have the path of a file."""

    block: bytearray = field(default_factory=bytearray)
    labels: list["pa.Array"] = field(default_factory=list)
    groups: list[RowGroup] = field(default_factory=list)
    num_rows: int = 0
    num_unnamed: int = 0
    num_outer: int = 0


def fits_parquet(spec: "SourceSpec") -> bool:
    """Return whether an address names Parquet files, or a folder with such files."""
    is_file = public_name(spec.address).endswith(SUFFIX)
    return is_file or (is_folder(spec.address) and bool(walk(spec.address, SUFFIX)))


def open_parquet(spec: "SourceSpec", stage: Stage) -> Source:
    """List the images of Parquet files.

    Raises
    ------
    UserError
        If pyarrow is missing, if a file is damaged, if columns cannot be chosen or read, or if an image or a class is
        missing.
    """
    pyarrow = import_pyarrow(spec.name)
    files = list_files(choose_split(find_files(spec.address, SUFFIX), spec))
    paths = [file.name for file in files]
    ranges = RangeReader(files)
    is_remote = ranges.window_sizes is REMOTE
    placed = PlacedReader(spec.address, files)
    rests_on: list[Any] = []
    if is_remote:
        rests_on = [spec.kind, spec.split, spec.image_column, spec.label_column, *(file.identity for file in files)]
        rests_on += [read_class_names(spec.class_names) if spec.class_names else None]
        earlier = load_index(spec.index, rests_on, spec.kind, spec.name, placed)
        if earlier is not None:
            return earlier
    with _reading(paths[0]):
        schema = _open(ranges, 0).schema_arrow
    columns = choose_columns(schema, spec, paths[0])
    labels, rows, groups = Labels(columns), Rows(paths), list[RowGroup]()
    num_outer = 0
    threads = _THREADS_REMOTE if is_remote else _THREADS
    listed = list_in_threads(range(len(files)), partial(_list_file, ranges, spec, columns), stage, threads)
    for path, found in zip(paths, listed, strict=True):
        first = 0
        for values in found.labels:
            labels.add(values, path, first)
            first += len(values)
        rows.add(bytes(found.block), found.num_rows, found.num_unnamed)
        groups += found.groups
        num_outer += found.num_outer
    if 0 < num_outer < rows.total:
        raise UserError(f"{spec.name}: {num_outer} of {rows.total} rows have no bytes in {columns.image}; {EMBED}")
    pyarrow.default_memory_pool().release_unused()
    identity = ["parquet", [file.identity for file in files], columns.image, columns.label]
    if num_outer:
        return build_source(spec, rows, labels, None, identity)
    reader = ParquetReader(spec.address, files, groups)
    places = _find_places(reader, groups, stage) if is_remote else None
    if places is not None:
        return with_index(build_source(spec, rows, labels, (placed, places), identity, SIZE_COLUMN), rests_on)
    source = build_source(spec, rows, labels, (reader, np.arange(rows.total)[:, None]), identity)
    source.remarks.extend(_page_remarks(reader, paths[0]))
    return source


def _find_places(reader: ParquetReader, groups: Sequence[RowGroup], stage: Stage) -> np.ndarray | None:
    """Return the place of each image, as `find_places` does. Raise UserError if a page is damaged."""
    try:
        return find_places(len(groups), lambda number: (groups[number].file, reader.find_pages(number)), stage)
    except PageError as error:
        raise UserError(f"{reader.address}: is damaged ({error}); copy or write the file again") from error


def _page_remarks(reader: ParquetReader, path: str) -> list[Remark]:
    """Return a remark if each image costs the decompression of a large page."""
    try:
        size_bytes = reader.pages(0).largest_compressed_bytes
    except PageError as error:
        raise UserError(f"{path}: is damaged ({error}); copy or write the file again") from error
    if size_bytes < _LARGE_PAGE_BYTES:
        return []
    what = f"large pages of images, each to be decompressed for every image in it ({show_bytes(size_bytes)})"
    advice = "if this is too slow, store the images without compression, or with Snappy"
    return [Remark(what, 1, path, advice)]


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn an error of pyarrow into a UserError."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no text
        message = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as Parquet ({message}); copy or write the file again") from error


def _open(ranges: RangeReader, number: int) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    return pq.ParquetFile(_RangeStream(ranges, number))


def _list_file(ranges: RangeReader, spec: "SourceSpec", columns: Columns, number: int, count: Count) -> _FileRows:
    """List a file, by its number in the reader."""
    path, found = ranges.files[number].name, _FileRows()
    with _reading(path):
        file = _open(ranges, number)
    columns.check_same(choose_columns(file.schema_arrow, spec, path), path)
    _list_groups(file, number, columns, path, found)
    for batch in _read_batches(file, columns, path):
        values = select(batch, columns.path) if columns.path else None
        block, num_unnamed = pack_names(values, len(batch), path)
        found.block += block
        found.num_unnamed += num_unnamed
        found.labels.append(select(batch, columns.label))
        found.num_rows += len(batch)
        count(len(batch))
    return found


def _read_batches(file: "pq.ParquetFile", columns: Columns, path: str) -> Iterator["pa.RecordBatch"]:
    """Yield the columns of classes and names."""
    names = [name for name in (columns.label, columns.path) if name]
    with _reading(path):
        yield from file.iter_batches(_ROWS_AT_ONCE, columns=names, use_threads=False)


def _list_groups(file: "pq.ParquetFile", number: int, columns: Columns, path: str, found: _FileRows) -> None:
    """Note where the images of each row group are."""
    metadata = file.metadata
    if columns.content is None:
        found.num_outer = metadata.num_rows
        return
    index = next(i for i in range(len(file.schema)) if file.schema.column(i).path == columns.content)
    leaf = file.schema.column(index)
    if leaf.physical_type != "BYTE_ARRAY" or leaf.max_repetition_level:
        raise UserError(f"{path}: the column {columns.image} is stored as {leaf.physical_type}; store it as binary")
    for i in range(metadata.num_row_groups):
        chunk, num_rows = metadata.row_group(i).column(index), metadata.row_group(i).num_rows
        strange = sorted(set(chunk.encodings) - _ENCODINGS) + sorted({chunk.compression} - _CODECS)
        if strange:
            raise UserError(
                f"{path}: stores the column {columns.image} as {strange[0]}, which cannot be read image by image; "
                'write it again as PLAIN (pyarrow: use_dictionary=False, compression="none")'
            )
        statistics = chunk.statistics
        num_null = statistics.null_count if statistics is not None and statistics.has_null_count else 0
        if 0 < num_null < num_rows:
            with _reading(path):
                nulls = select(file.read_row_group(i, columns=[columns.content]), columns.content).is_null()
            row = sum(metadata.row_group(j).num_rows for j in range(i)) + int(np.flatnonzero(nulls)[0])
            raise UserError(
                f"{path}: has {num_null} rows without bytes in {columns.image}, such as row {row}; {EMBED}, or remove "
                "these rows"
            )
        found.num_outer += num_null
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
            start = chunk.dictionary_page_offset
        found.groups.append(
            RowGroup(number, start, chunk.total_compressed_size, chunk.compression, leaf.max_definition_level, num_rows)
        )
