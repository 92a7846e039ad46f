"""Decompress pages of Parquet: no more of them than a value needs, where this is possible.

`datasets` before version 5 left the column of images to pyarrow's defaults. All images of a row group are then in one
page, which is compressed with Snappy. Snappy compresses blocks of 64 KiB independently. So the blocks of an image can
be decompressed without the others (`SnappyContent`). Other pages are decompressed as a whole for each image.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Read = Callable[[int, int], bytes]
"""Called with offset and size in bytes; returns fewer bytes only at the end of the file."""

SNAPPY_BLOCK = 1 << 16
# Below this size, a Snappy page is decompressed as a whole, which takes a tenth of a millisecond.
_SMALL_PAGE_BYTES = 512 << 10
_TAG_WINDOW = 4096
# Data that Snappy can compress consists of many short tags, which take longer to walk than to decompress.
_MOST_TAGS = 1 << 15


class PageError(ValueError):
    """A page that is damaged, or not of the kind that is read here."""


@dataclass(frozen=True)
class Page:
    """The header of a page and the place of its content in the file.

    Attributes
    ----------
    offset, size_bytes : int
        The place of the content, without the levels of a page of version 2.
    plain_bytes : int
        The size of the content once it is decompressed.
    num_values : int
    encoding : int
    has_levels : bool
        The content begins with the levels, as in a page of version 1.
    is_compressed : bool
    """

    offset: int
    size_bytes: int
    plain_bytes: int
    num_values: int
    encoding: int
    has_levels: bool
    is_compressed: bool


def read_varint(content: Sequence[int], position: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the position behind it.

    Raises
    ------
    PageError
        If the number is too long.
    """
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise PageError("a number is damaged")


Place = tuple[int, int, int, int, int]
"""Offset and size of a range of the file, its plain size or 0, and start and size in it, in bytes."""


class Content(Protocol):
    """The decompressed content of a page."""

    def read(self, start: int, stop: int) -> bytes: ...

    def place(self, start: int, stop: int) -> Place | None:
        """Return where a range lies in the file, for ``PlacedReader``; None if it needs the whole page."""


def open_content(read: Read, page: Page, codec: str, blocks: array | None) -> Content:
    """Return the content of a page. `blocks` are those of a Snappy page, if they are known already."""
    if codec == "UNCOMPRESSED" or not page.is_compressed:
        return PlainContent(read, page)
    if codec != "SNAPPY" or page.plain_bytes < _SMALL_PAGE_BYTES:
        return WholeContent(read, page, codec)
    literals: Sequence[tuple[int, int, int]] = ()
    if blocks is None:
        blocks, literals = scan_snappy(lambda offset, size: read(page.offset + offset, size), page)
    return SnappyContent(read, page, blocks, literals)


class PlainContent:
    """A page that is not compressed."""

    def __init__(self, read: Read, page: Page):
        self._read, self._page = read, page

    def read(self, start: int, stop: int) -> bytes:
        return self._read(self._page.offset + start, stop - start)

    def place(self, start: int, stop: int) -> Place | None:
        return self._page.offset + start, stop - start, 0, 0, stop - start


class WholeContent:
    """A page that is decompressed as a whole, on first use."""

    def __init__(self, read: Read, page: Page, codec: str):
        self._source, self._page, self._codec = read, page, codec
        self._content: bytes | None = None

    def read(self, start: int, stop: int) -> bytes:
        if self._content is None:
            packed = self._source(self._page.offset, self._page.size_bytes)
            self._content = decompress(packed, self._codec, self._page.plain_bytes)
        return self._content[start:stop]

    def place(self, start: int, stop: int) -> Place | None:
        if self._codec != "SNAPPY" or self._page.plain_bytes >= _SMALL_PAGE_BYTES:
            return None
        size_of_size = len(_to_varint(self._page.plain_bytes))
        offset, size_bytes = self._page.offset + size_of_size, self._page.size_bytes - size_of_size
        return offset, size_bytes, self._page.plain_bytes, start, stop - start


class SnappyContent:
    """A page of Snappy, of which only the blocks around a value are decompressed.

    Parameters
    ----------
    blocks : array of uint32
        Where each block of 64 KiB begins in the compressed page. It is empty if the page cannot be split.
    literals : sequence of tuple
        Start in the page, start in the compressed page, and length of runs that are not compressed.
    """

    def __init__(self, read: Read, page: Page, blocks: array, literals: Sequence[tuple[int, int, int]]):
        self._read, self._page, self.blocks, self.literals = read, page, blocks, literals
        self._whole = WholeContent(read, page, "SNAPPY")

    def read(self, start: int, stop: int) -> bytes:
        if not self.blocks:
            return self._whole.read(start, stop)
        number = bisect_right(self.literals, (start, self._page.plain_bytes, 0)) - 1
        if number >= 0:
            first, at, length = self.literals[number]
            if stop <= first + length:
                return self._read(self._page.offset + at + start - first, stop - start)
        return self._read_blocks(start, stop)

    def place(self, start: int, stop: int) -> Place | None:
        if not self.blocks:
            return None
        first, last = start // SNAPPY_BLOCK, (max(stop, start + 1) - 1) // SNAPPY_BLOCK
        begin = self.blocks[first]
        end = self.blocks[last + 1] if last + 1 < len(self.blocks) else self._page.size_bytes
        plain_bytes = min((last + 1) * SNAPPY_BLOCK, self._page.plain_bytes) - first * SNAPPY_BLOCK
        return self._page.offset + begin, end - begin, plain_bytes, start - first * SNAPPY_BLOCK, stop - start

    def _read_blocks(self, start: int, stop: int) -> bytes:
        place = self.place(start, stop)
        assert place is not None
        offset, size_bytes, plain_bytes, inside, length = place
        try:
            content = decompress_blocks(self._read(offset, size_bytes), plain_bytes)
        except PageError:  # of a writer whose blocks refer to earlier ones
            return self._whole.read(start, stop)
        return content[inside : inside + length]


def scan_snappy(read: Read, page: Page) -> tuple[array, list[tuple[int, int, int]]]:
    """Walk the tags of Snappy without reading the data between them. See `SnappyContent` for the result.

    JPEG data does not compress, so it consists of literals of up to 64 KiB. If there are many short tags, or if a tag
    reaches into another block, the result is empty.

    Raises
    ------
    PageError
        If the page is damaged.
    """
    end = page.size_bytes
    window, base = read(0, min(_TAG_WINDOW, end)), 0
    blocks, literals = array("I"), list[tuple[int, int, int]]()
    try:
        size, position = read_varint(window, 0)
        if size != page.plain_bytes:
            raise PageError(f"the page at byte {page.offset} is not as long as its header tells")
        written = next_block = num_tags = 0
        while position < end:
            if written >= next_block:
                if written > next_block:
                    return array("I"), []
                blocks.append(position)
                next_block += SNAPPY_BLOCK
            if position + 5 > base + len(window) and base + len(window) < end or position < base:
                window, base = read(position, min(_TAG_WINDOW, end - position)), position
            at = position - base
            tag = window[at]
            kind, rest = tag & 3, tag >> 2
            if kind == 0:
                extra = rest - 59 if rest >= 60 else 0
                length = int.from_bytes(window[at + 1 : at + 1 + extra], "little") + 1 if extra else rest + 1
                position += 1 + extra
                literals.append((written, position, length))
                position += length
            elif kind == 1:
                length = (rest & 7) + 4
                position += 2
            else:
                length = rest + 1
                position += 3 if kind == 2 else 5
            written += length
            num_tags += 1
            if num_tags > _MOST_TAGS:
                return array("I"), []
    except IndexError:
        raise PageError(f"the page at byte {page.offset} is cut") from None
    if written != page.plain_bytes or position != end:
        raise PageError(f"the page at byte {page.offset} is damaged")
    return blocks, literals


def decompress_blocks(packed: bytes, plain_bytes: int) -> bytes:
    """Return the content of neighbouring blocks of Snappy. See `decompress` for what it raises."""
    return decompress(_to_varint(plain_bytes) + packed, "SNAPPY", plain_bytes)


def _to_varint(value: int) -> bytes:
    packed = bytearray()
    while value >= 0x80:
        packed.append(value & 0x7F | 0x80)
        value >>= 7
    packed.append(value)
    return bytes(packed)


def decompress(content: bytes, codec: str, plain_bytes: int) -> bytes:
    """Return the decompressed content of a page.

    Raises
    ------
    PageError
        If it is damaged.
    """
    import pyarrow  # takes a while to import, and most files need no codec

    try:
        # Parquet's LZ4 has no frame.
        plain = pyarrow.Codec("lz4_raw" if codec == "LZ4" else codec.lower()).decompress(
            content, plain_bytes, asbytes=True
        )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PageError(f"a page cannot be decompressed ({' '.join(str(error).split())})") from error
    if len(plain) != plain_bytes:
        raise PageError("a page is not as long as its header tells")
    return bytes(plain)
