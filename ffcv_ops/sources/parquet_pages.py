"""Find where each value of a binary Parquet column lies, without reading the values.

A row group of images takes 10 to 100 MB, and pyarrow reads a column of a row group only as a whole. The writer encodes
images in random order, so each image would cost the decoding of a row group. The code here finds the pages of a column
by their headers, and the values in a page by the lengths before the values. It follows the format
description of Apache Parquet (``README.md``, ``Encodings.md`` and ``parquet.thrift`` of parquet-format 2.11).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ffcv_ops.sources.parquet_content import Page, PageContent, PageError, Place, read_varint
from ffcv_ops.sources.window import Read

PLAIN, DICTIONARY = 0, (2, 8)
"""Encodings as numbered in ``parquet.thrift``: plain, and numbers into a dictionary (two names of one encoding)."""
_DATA, _DICTIONARY_PAGE, _DATA_V2 = 0, 2, 3
_MOST_VALUES = 1 << 26
_HEADER_BYTES = 512
# The headers of pyarrow hold the smallest and the largest value, which may be long.
_MOST_HEADER_BYTES = 1 << 20
# If values are smaller than this, a page is read as a whole for their places. If not, only their lengths are read.
_SMALL_VALUE_BYTES = 16 << 10


def find_values(read: Read, offset: int, size_bytes: int, codec: str, max_level: int) -> Iterator[Place]:
    """Yield the place of each value of a column in one row group. No value may be null.

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
        If a page is damaged, or holds nulls.
    """
    dictionary: list[Place] = []
    position, end = offset, offset + size_bytes
    while position < end:
        page, position, is_data = _read_header(read, position, end, max_level > 0)
        content = PageContent(read, page, codec)
        begin = _skip_levels(page, content, max_level)
        if not is_data:
            dictionary = list(_find_plain(content, begin, page))
        elif page.encoding == PLAIN:
            yield from _find_plain(content, begin, page)
        elif page.encoding in DICTIONARY:
            numbers = content.read(begin, page.plain_bytes)
            if not numbers:
                raise PageError(f"the page at byte {page.offset} is empty")
            for number in read_hybrid(numbers, 1, numbers[0], page.num_values).tolist():
                if not 0 <= number < len(dictionary):
                    raise PageError(f"the page at byte {page.offset} has no value {number}")
                yield dictionary[number]
        else:
            raise PageError(f"the page at byte {page.offset} has the encoding {page.encoding}")


def _skip_levels(page: Page, content: PageContent, max_level: int) -> int:
    """Return where the values begin in the content of a page. The levels must tell that there are no nulls."""
    if not page.has_levels:
        return 0
    size_bytes = int.from_bytes(content.read(0, 4), "little")
    if size_bytes > page.plain_bytes:
        raise PageError(f"the page at byte {page.offset} has damaged levels")
    levels = read_hybrid(content.read(4, 4 + size_bytes), 0, max_level.bit_length(), page.num_values)
    if (levels != max_level).any():
        raise PageError(f"the page at byte {page.offset} has {(levels != max_level).sum()} nulls")
    return 4 + size_bytes


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
            place = offset + levels, size_bytes - levels, plain_bytes - levels
            page = Page(*place, inner[1], inner[4], False, inner.get(7, True))
        elif kind == _DICTIONARY_PAGE:
            inner = fields[7]
            page = Page(offset, size_bytes, plain_bytes, inner[1], PLAIN, False, True)
        else:
            raise PageError(f"the page at byte {position} is of the unknown kind {kind}")
    except (KeyError, TypeError):
        raise PageError(f"the header of a page at byte {position} is damaged") from None
    is_sound = page.size_bytes >= 0 and 0 <= page.plain_bytes < 1 << 31 and 0 <= page.num_values <= _MOST_VALUES
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


def _find_plain(content: PageContent, begin: int, page: Page) -> Iterator[Place]:
    """Yield the place of each value of a plain page. Before each value stands its length, in 4 bytes.

    Raises
    ------
    PageError
        If the lengths do not fit the page.
    """
    end = page.plain_bytes
    is_small = end - begin < page.num_values * _SMALL_VALUE_BYTES
    whole = content.read(begin, end) if is_small else b""
    position = begin
    for _ in range(page.num_values):
        length = whole[position - begin : position - begin + 4] if is_small else content.read(position, position + 4)
        start = position + 4
        position = start + int.from_bytes(length, "little")
        if position > end or len(length) < 4:
            raise PageError(f"the page at byte {page.offset} ends within a value")
        yield content.place(start, position)
    if position != end:
        raise PageError(f"the page at byte {page.offset} has {end - position} bytes behind its values")
