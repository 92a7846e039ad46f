"""List and read images in Parquet files, as Hugging Face's `datasets` writes them.

The listing reads the columns of classes and names, and only the places of the images (see
`ffcv_ops.sources.parquet_pages`). A reader then reads single images, and needs no row group.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import is_folder
from ffcv_ops.sources.archives import ArchiveReader
from ffcv_ops.sources.columns import Columns, Labels, choose_columns, import_pyarrow, select
from ffcv_ops.sources.in_threads import Count, list_in_threads
from ffcv_ops.sources.index import load_index, with_index
from ffcv_ops.sources.parquet_content import CODECS, PageError, Place
from ffcv_ops.sources.parquet_pages import find_values
from ffcv_ops.sources.ranges import RangeReader, list_files
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.source import Source, SourceError, Stage
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.splits import choose_split
from ffcv_ops.sources.tables import EMBED, FileRows, Rows, build_source, find_files, walk
from ffcv_ops.sources.webdataset import read_class_names
from ffcv_ops.sources.window import REMOTE, Window
from ffcv_ops.units import show_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SUFFIX = ".parquet"
# More of them hold more memory of pyarrow, and its readers need Python's lock for each read.
_THREADS, _THREADS_REMOTE = 4, 16
_ROWS_AT_ONCE = 1 << 16
_ENCODINGS = frozenset("PLAIN RLE BIT_PACKED PLAIN_DICTIONARY RLE_DICTIONARY".split())
# From here on, decompressing a page for each image takes about as long as encoding the image.
_LARGE_PAGE_BYTES = 4 << 20


class ParquetReader(ArchiveReader):
    """The images in Parquet files. The place of an image is the number of its file, then the numbers of a `Place`."""

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of an image. See `ffcv_ops.sources.source.Reader`."""
        file, found = place[0], Place(*place[1:])
        try:
            return found.value(self._ranges.read(file, found.offset, found.size_bytes))
        except PageError as error:
            raise SourceError(
                f"{self.files[file].name}: is damaged at byte {found.offset}, at {key} ({error}); copy or write the "
                "file again"
            ) from error


@dataclass(frozen=True)
class _RowGroup:
    """The column of images in a row group: the number of its file, its place, and the arguments of `find_values`."""

    file: int
    offset: int
    size_bytes: int
    codec: str
    max_level: int
    num_rows: int


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


def fits_parquet(spec: SourceSpec) -> bool:
    """Return whether an address names Parquet files, or a folder with such files."""
    is_file = public_name(spec.address).endswith(SUFFIX)
    return is_file or (is_folder(spec.address) and bool(walk(spec.address, SUFFIX)))


def open_parquet(spec: SourceSpec, stage: Stage) -> Source:
    """List the images of Parquet files. See `ffcv_ops.sources.kinds.Kind`."""
    pyarrow = import_pyarrow(spec.name)
    files = list_files(choose_split(find_files(spec.address, SUFFIX), spec))
    paths = [file.name for file in files]
    ranges, reader = RangeReader(files), ParquetReader(spec.address, files)
    rests_on = [spec.kind, spec.split, spec.image_column, spec.label_column, *(file.identity for file in files)]
    rests_on += [read_class_names(spec.class_names) if spec.class_names else None]
    earlier = load_index(spec.index, rests_on, spec.kind, spec.name, reader)
    if earlier is not None:
        return earlier
    with _reading(paths[0]):
        schema = _open(ranges, 0).schema_arrow
    columns = choose_columns(schema, spec, paths[0])
    rows, groups = Rows(paths, Labels(columns)), list[_RowGroup]()
    threads = _THREADS_REMOTE if ranges.window_sizes is REMOTE else _THREADS
    listed = list_in_threads(range(len(files)), partial(_list_file, ranges, spec, columns), stage, threads)
    for found, more in listed:
        rows.add(found)
        groups += more
    pyarrow.default_memory_pool().release_unused()
    if rows.are_outer(spec.name):
        return build_source(spec, rows, None, files)
    located = list_in_threads(
        groups, partial(_find_images, ranges), lambda what, count: stage("images located", count), threads
    )
    places = np.concatenate(list(located))
    source = build_source(spec, rows, (reader, places), files)
    source.remarks.extend(_page_remarks(places, paths))
    return with_index(source, rests_on)


def _find_images(ranges: RangeReader, group: _RowGroup, count: Count) -> np.ndarray:
    """Return the places of the images in a row group, int64 (group.num_rows, 7). See `ParquetReader`."""
    window = Window(partial(ranges.read, group.file), group.offset + group.size_bytes, ranges.window_sizes)
    places: list[tuple[int, ...]] = []
    try:
        for place in find_values(window.get, group.offset, group.size_bytes, group.codec, group.max_level):
            places.append((group.file, *place))
            count(1)
        if len(places) != group.num_rows:
            raise PageError(f"there are {len(places)} values for {group.num_rows} rows")
    except PageError as error:
        raise UserError(
            f"{ranges.files[group.file].name}: is damaged in the row group whose images begin at byte {group.offset} "
            f"({error}); copy or write the file again"
        ) from error
    return np.array(places, np.int64).reshape(-1, 1 + len(Place._fields))


def _page_remarks(places: np.ndarray, paths: Sequence[str]) -> list[Remark]:
    """Return a remark if images cost the decompression of a large page."""
    found = {name: places[:, 1 + number] for number, name in enumerate(Place._fields)}
    surplus_bytes = found["plain_bytes"] - found["value_bytes"]
    largest = int(np.argmax(surplus_bytes))
    if surplus_bytes[largest] < _LARGE_PAGE_BYTES:
        return []
    size = show_bytes(int(found["plain_bytes"][largest]))
    what = f"large pages of images, each to be decompressed for every image in it ({size})"
    advice = "if this is too slow, store the images without compression, or with Snappy"
    return [Remark(what, 1, paths[places[largest, 0]], advice)]


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


def _list_file(
    ranges: RangeReader, spec: SourceSpec, columns: Columns, number: int, count: Count
) -> tuple[FileRows, list[_RowGroup]]:
    """Return the rows of a file and its row groups, by its number in the reader."""
    path, found = ranges.files[number].name, FileRows()
    with _reading(path):
        file = _open(ranges, number)
    columns.check_same(choose_columns(file.schema_arrow, spec, path), path)
    groups = _list_groups(file, number, columns, path, found)
    for batch in _read_batches(file, columns, path):
        found.add(batch, columns, path)
        count(len(batch))
    return found, groups


def _read_batches(file: "pq.ParquetFile", columns: Columns, path: str) -> Iterator["pa.RecordBatch"]:
    """Yield the columns of classes and names."""
    names = [name for name in (columns.label, columns.path) if name]
    with _reading(path):
        yield from file.iter_batches(_ROWS_AT_ONCE, columns=names, use_threads=False)


def _list_groups(file: "pq.ParquetFile", number: int, columns: Columns, path: str, found: FileRows) -> list[_RowGroup]:
    """Return where the images of each row group are, and count the rows without bytes."""
    metadata = file.metadata
    if columns.content is None:
        found.num_outer = metadata.num_rows
        return []
    index = next(i for i in range(len(file.schema)) if file.schema.column(i).path == columns.content)
    leaf = file.schema.column(index)
    if leaf.physical_type != "BYTE_ARRAY" or leaf.max_repetition_level:
        raise UserError(f"{path}: the column {columns.image} is stored as {leaf.physical_type}; store it as binary")
    groups = []
    for i in range(metadata.num_row_groups):
        chunk, num_rows = metadata.row_group(i).column(index), metadata.row_group(i).num_rows
        strange = sorted(set(chunk.encodings) - _ENCODINGS) + sorted({chunk.compression} - {*CODECS})
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
        groups.append(
            _RowGroup(
                number, start, chunk.total_compressed_size, chunk.compression, leaf.max_definition_level, num_rows
            )
        )
    return groups
