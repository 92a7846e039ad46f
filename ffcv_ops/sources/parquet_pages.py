"""Read single values of a Parquet column, without the rest of their row group.

A row group of images takes 10 to 100 MB, and pyarrow reads a column of a row group only as a whole. The writer encodes
images in random order, so each image would cost the decoding of a row group. The reader here finds the page of a
row by the headers of the pages, and the value in the page by the lengths before the values. It follows the format
description of Apache Parquet (``README.md``, ``Encodings.md`` and ``parquet.thrift`` of parquet-format 2.11).
"""

import struct
from array import array
from bisect import bisect_right
from typing import Any

import numpy as np

from ffcv_ops.sources.parquet_content import (
    SNAPPY_BLOCK,
    Content,
    Page,
    PageError,
    Place,
    Read,
    SnappyContent,
    open_content,
    read_varint,
)

PLAIN, DICTIONARY = 0, (2, 8)
"""Encodings as numbered in ``parquet.thrift``: plain, and numbers into a dictionary (two names of one encoding)."""
_DATA, _DICTIONARY_PAGE, _DATA_V2 = 0, 2, 3
_MOST_VALUES = 1 << 26
_HEADER_BYTES = 512
# The headers of pyarrow hold the smallest and the largest value, which may be long.
_MOST_HEADER_BYTES = 1 << 20
# If values are smaller than this, a page is read as a whole for their places. If not, only their lengths are read.
_SMALL_VALUE_BYTES = 16 << 10


class ColumnPages:
    """The pages of a binary column in one row group. No value may be null.

    Parameters
    ----------
    read : callable
        See `Read`.
    offset, size_bytes : int
        The place of the column in the file.
    codec : str
        The name of the compression in capitals, as pyarrow's metadata has it.
    max_level : int
        The level of a value that is not null: how many of the column and the structs around it may be null.

    Raises
    ------
    PageError
        If a header is damaged.
    """

    def __init__(self, read: Read, offset: int, size_bytes: int, codec: str, max_level: int):
        self._read, self._codec, self._max_level = read, codec, max_level
        self._dictionary: Page | None = None
        # Packed, since a process keeps the pages of thousands of row groups.
        self._first_rows, self._headers = array("q"), array("q")
        self._starts: dict[int, tuple[array, array | None]] = {}
        self._numbers: dict[int, np.ndarray] = {}
        self.num_rows = 0
        position, end = offset, offset + size_bytes
        while position < end:
            page, position, is_data = _read_header(read, position, end, max_level > 0)
            if not is_data:
                self._dictionary = page
                continue
            if page.encoding != PLAIN and page.encoding not in DICTIONARY:
                raise PageError(f"the page at byte {page.offset} has the encoding {page.encoding}")
            self._first_rows.append(self.num_rows)
            self._headers.extend(int(getattr(page, name)) for name in Page.__dataclass_fields__)
            self.num_rows += page.num_values
        # The most that is kept: headers, places of values, numbers into the dictionary, blocks of Snappy.
        self.memory_bytes = 1000 + 8 * len(self._headers) + 12 * self.num_rows + size_bytes * 4 // SNAPPY_BLOCK

    @property
    def largest_compressed_bytes(self) -> int:
        """Return the size of the largest page that has to be decompressed as a whole."""
        if self._codec in ("UNCOMPRESSED", "SNAPPY"):
            return 0
        pages = [self._page(number) for number in range(len(self._first_rows))]
        pages += [self._dictionary] if self._dictionary else []
        return max((page.plain_bytes for page in pages if page.is_compressed), default=0)

    def value(self, row: int) -> bytes:
        """Return the value of a row of the row group.

        Raises
        ------
        PageError
            If the page is damaged, or holds nulls.
        """
        content, start, stop = self._find(row)
        return content.read(start, stop)

    def place(self, row: int) -> Place | None:
        """Return where the value of a row lies in the file; None if it needs a whole large page. See `value`."""
        content, start, stop = self._find(row)
        return content.place(start, stop)

    def _find(self, row: int) -> tuple[Content, int, int]:
        """Return the content of the page that has the value of a row, and where the value begins and ends in it."""
        if not 0 <= row < self.num_rows:
            raise PageError(f"there are {self.num_rows} rows, not row {row}")
        number = bisect_right(self._first_rows, row) - 1
        page, place = self._page(number), row - self._first_rows[number]
        if page.encoding in DICTIONARY:
            if self._dictionary is None:
                raise PageError("the dictionary of a page is missing")
            place, page, number = int(self._dictionary_numbers(number, page)[place]), self._dictionary, -1
        if not 0 <= place < page.num_values:
            raise PageError(f"the page at byte {page.offset} has no value {place}")
        content, starts = self._locate(number, page)
        return content, starts[place], starts[place + 1] - 4

    def _page(self, number: int) -> Page:
        width = len(Page.__dataclass_fields__)
        offset, size_bytes, plain_bytes, num_values, encoding, levels, packed = self._headers[
            number * width : (number + 1) * width
        ]
        return Page(offset, size_bytes, plain_bytes, num_values, encoding, bool(levels), bool(packed))

    def _locate(self, number: int, page: Page) -> tuple["Content", array]:
        """Return the content of a page, and where each value begins in it, and the end plus 4 bytes."""
        kept = self._starts.get(number)
        blocks = kept[1] if kept else None
        content = open_content(self._read, page, self._codec, blocks)
        if kept:
            return content, kept[0]
        starts = _find_values(content, self._skip_levels(page, content), page)
        blocks = content.blocks if isinstance(content, SnappyContent) else None
        if isinstance(content, SnappyContent):
            content.literals = ()
        self._starts[number] = starts, blocks
        return content, starts

    def _skip_levels(self, page: Page, content: "Content") -> int:
        """Return where the values begin in the content of a page. The levels must tell that there are no nulls."""
        if not page.has_levels:
            return 0
        (size_bytes,) = struct.unpack("<I", content.read(0, 4))
        if size_bytes > page.plain_bytes:
            raise PageError(f"the page at byte {page.offset} has damaged levels")
        levels = read_hybrid(content.read(4, 4 + size_bytes), 0, self._max_level.bit_length(), page.num_values)
        if (levels != self._max_level).any():
            raise PageError(f"the page at byte {page.offset} has {(levels != self._max_level).sum()} nulls")
        return 4 + size_bytes

    def _dictionary_numbers(self, number: int, page: Page) -> np.ndarray:
        """Return the place in the dictionary of each value of a page."""
        kept = self._numbers.get(number)
        if kept is None:
            content = open_content(self._read, page, self._codec, None)
            start = self._skip_levels(page, content)
            body = content.read(start, page.plain_bytes)
            if not body:
                raise PageError(f"the page at byte {page.offset} is empty")
            kept = self._numbers[number] = read_hybrid(body, 1, body[0], page.num_values)
        return kept


def _read_header(read: Read, position: int, end: int, has_levels: bool) -> tuple[Page, int, bool]:
    """Return the page with a header at a position, the position behind the page, and whether it is a page of data."""
    size = _HEADER_BYTES
    while True:
        content = read(position, min(size, end - position))
        try:
            fields, length = read_thrift(content, 0)
            break
        except IndexError:
            if size >= _MOST_HEADER_BYTES or size >= end - position:
                raise PageError(f"the header of a page at byte {position} is damaged") from None
            size *= 8
    try:
        kind, plain_bytes, size_bytes = fields[1], fields[2], fields[3]
        offset = position + length
        if kind == _DATA:
            inner = fields[5]
            page = Page(offset, size_bytes, plain_bytes, inner[1], inner[2], has_levels, True)
        elif kind == _DATA_V2:
            inner = fields[8]
            levels = inner[5] + inner[6]
            if inner[2]:
                raise PageError(f"the page at byte {position} has {inner[2]} nulls")
            page = Page(
                offset + levels,
                size_bytes - levels,
                plain_bytes - levels,
                inner[1],
                inner[4],
                False,
                inner.get(7, True),
            )
        elif kind == _DICTIONARY_PAGE:
            inner = fields[7]
            page = Page(offset, size_bytes, plain_bytes, inner[1], PLAIN, False, True)
        else:
            raise PageError(f"the page at byte {position} is of the unknown kind {kind}")
    except (KeyError, TypeError):
        raise PageError(f"the header of a page at byte {position} is damaged") from None
    is_sound = min(page.size_bytes, page.plain_bytes, page.num_values) >= 0 and page.num_values <= _MOST_VALUES
    if not is_sound or offset + size_bytes > end:
        raise PageError(f"the header of a page at byte {position} is damaged")
    return page, offset + size_bytes, kind != _DICTIONARY_PAGE


def read_thrift(content: bytes, position: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct in Thrift's compact protocol by their numbers, and the position behind the struct.

    Only what headers of pages consist of is read: numbers, truth values, binary and structs.

    Raises
    ------
    PageError
        If there is anything else.
    IndexError
        If the struct goes on behind the content.
    """
    fields: dict[int, Any] = {}
    number = 0
    while True:
        byte = content[position]
        position += 1
        if byte == 0:
            return fields, position
        step, kind = byte >> 4, byte & 15
        if step:
            number += step
        else:
            value, position = read_varint(content, position)
            number = (value >> 1) ^ -(value & 1)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind == 3:
            fields[number] = content[position]
            position += 1
        elif kind in (4, 5, 6):
            value, position = read_varint(content, position)
            fields[number] = (value >> 1) ^ -(value & 1)
        elif kind == 8:
            length, position = read_varint(content, position)
            position += length
        elif kind == 12:
            fields[number], position = read_thrift(content, position)
        else:
            raise PageError("the header of a page is damaged")


def read_hybrid(content: bytes, position: int, width: int, count: int) -> np.ndarray:
    """Return numbers from the hybrid of run lengths and packed bits, int32 (count,). Each number has `width` bits.

    Raises
    ------
    PageError
        If the content ends too early.
    """
    numbers = np.zeros(count, np.int32)
    done, num_bytes = 0, (width + 7) // 8
    try:
        while done < count and width:
            header, position = read_varint(content, position)
            if header & 1:
                size_bytes = (header >> 1) * width
                packed = np.frombuffer(content, np.uint8, size_bytes, position)
                bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
                found = bits @ (1 << np.arange(width, dtype=np.int64))
                taken = min(len(found), count - done)
                numbers[done : done + taken] = found[:taken]
                position += size_bytes
            else:
                taken = min(header >> 1, count - done)
                numbers[done : done + taken] = int.from_bytes(content[position : position + num_bytes], "little")
                position += num_bytes
            if not taken:
                raise PageError("the numbers of a page are damaged")
            done += taken
    except (IndexError, ValueError) as error:
        raise PageError("the numbers of a page are damaged") from error
    return numbers


def _find_values(content: Content, begin: int, page: Page) -> array:
    """Return where each value of a plain page begins, and the end of the page plus 4 bytes.

    Before each value stands its length, in 4 bytes.

    Raises
    ------
    PageError
        If the lengths do not fit the page.
    """
    end, starts = page.plain_bytes, array("I")
    is_small = end - begin < page.num_values * _SMALL_VALUE_BYTES
    whole = content.read(begin, end) if is_small else b""
    position = begin
    for _ in range(page.num_values):
        length = whole[position - begin : position - begin + 4] if is_small else content.read(position, position + 4)
        starts.append(position + 4)
        position += 4 + int.from_bytes(length, "little")
        if position > end or len(length) < 4:
            raise PageError(f"the page at byte {page.offset} ends within a value")
    if position != end:
        raise PageError(f"the page at byte {page.offset} has {end - position} bytes behind its values")
    starts.append(end + 4)
    return starts
