"""Decompress pages of Parquet: no more of them than a value needs, where this is possible.

`datasets` before version 5 left the column of images to pyarrow's defaults. All images of a row group are then in one
page, which is compressed with Snappy. Snappy compresses blocks of 64 KiB independently. So the blocks of an image can
be decompressed without the others. Other pages are decompressed as a whole for each image.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ffcv_ops.sources.window import Read

CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "ZSTD", "LZ4")
"""The compressions that are read, by their names in pyarrow's metadata. A `Place` has the position in this list."""
_PLAIN, _SNAPPY = 0, 1
_SNAPPY_BLOCK = 1 << 16
# Below this size, a Snappy page is decompressed as a whole, which takes a tenth of a millisecond.
_SMALL_PAGE_BYTES = 512 << 10
_TAG_WINDOW = 4096
# Data that Snappy can compress consists of many short tags, which take longer to walk than to decompress.
_MOST_TAGS = 1 << 15


class PageError(ValueError):
    """A page that is damaged, or not of the kind that is read here."""


@dataclass(frozen=True)
class Page:
    """The header of a page and the place of its content in the file."""

    offset: int  # the place of the content, without the levels of a page of version 2
    size_bytes: int
    plain_bytes: int  # the size of the content once it is decompressed
    num_values: int
    encoding: int
    has_levels: bool  # the content begins with the levels, as in a page of version 1
    is_compressed: bool


class Place(NamedTuple):
    """A range of the file, and where a value lies in it once the range is decompressed. Sizes are in bytes.

    Of Snappy, the range consists of whole blocks, without the size of the page that stands before the first one.
    """

    offset: int
    size_bytes: int
    codec: int
    plain_bytes: int
    start: int
    value_bytes: int

    def value(self, content: bytes) -> bytes:
        """Return the value from the content of the range. Raise PageError if the content is damaged."""
        if self.codec != _PLAIN:
            content = _decompress(content, self.codec, self.plain_bytes)
        return content[self.start : self.start + self.value_bytes]


def read_varint(content: Sequence[int], position: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the position behind it. Raise PageError if the number is too long."""
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


class PageContent:
    """The decompressed content of a page, whose `codec` is in `CODECS`. A damaged page is a PageError."""

    def __init__(self, read: Read, page: Page, codec: str):
        self._read, self._page = read, page
        self._codec = CODECS.index(codec) if page.is_compressed else _PLAIN
        # The place of each block in the page. A page that cannot be split is one block.
        self._blocks, self._block_bytes = array("I", [0]), max(1, page.plain_bytes)
        self._literals: list[tuple[int, int, int]] = []
        self._held: tuple[Place | None, bytes] = None, b""
        if self._codec == _SNAPPY:
            self._blocks[0] = len(_to_varint(page.plain_bytes))
            if page.plain_bytes >= _SMALL_PAGE_BYTES and (found := _scan_snappy(read, page)):
                (self._blocks, self._literals), self._block_bytes = found, _SNAPPY_BLOCK

    def place(self, start: int, stop: int) -> Place:
        """Return where the bytes of the content from `start` to `stop` lie in the file."""
        page, block_bytes = self._page, self._block_bytes
        if self._codec == _PLAIN or start == stop:
            return Place(page.offset + start, stop - start, _PLAIN, 0, 0, stop - start)
        first, last = start // block_bytes, (stop - 1) // block_bytes
        begin = self._blocks[first]
        end = self._blocks[last + 1] if last + 1 < len(self._blocks) else page.size_bytes
        plain_bytes = min((last + 1) * block_bytes, page.plain_bytes) - first * block_bytes
        return Place(
            page.offset + begin, end - begin, self._codec, plain_bytes, start - first * block_bytes, stop - start
        )

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes of the content from `start` to `stop`. Raise PageError if they are damaged."""
        number = bisect_right(self._literals, (start, self._page.plain_bytes, 0)) - 1
        if number >= 0:
            first, at, length = self._literals[number]
            if stop <= first + length:
                return self._read(self._page.offset + at + start - first, stop - start)
        place = self.place(start, stop)
        if place.codec == _PLAIN:
            return self._read(place.offset, place.size_bytes)
        held, content = self._held
        if held is None or held[:4] != place[:4]:
            content = _decompress(self._read(place.offset, place.size_bytes), place.codec, place.plain_bytes)
            self._held = place, content
        return content[place.start : place.start + place.value_bytes]


def _scan_snappy(read: Read, page: Page) -> tuple[array, list[tuple[int, int, int]]] | None:
    """Walk the tags of a Snappy page without reading the data between them, which for JPEGs are long literals.

    The result is where each block begins in the compressed page, and the literals: start in the page, start in the
    compressed page, and length. It is None if there are many short tags, or if a block needs an earlier one.

    Raises
    ------
    PageError
        If the page is damaged.
    """
    end = page.size_bytes
    window, base = read(page.offset, min(_TAG_WINDOW, end)), 0
    blocks, literals = array("I"), list[tuple[int, int, int]]()
    try:
        size, position = read_varint(window, 0)
        if size != page.plain_bytes:
            raise PageError(f"the page at byte {page.offset} is not as long as its header tells")
        written = next_block = num_tags = 0
        while position < end:
            if written >= next_block:
                if written > next_block:
                    return None
                blocks.append(position)
                next_block += _SNAPPY_BLOCK
            if position + 5 > base + len(window) and base + len(window) < end or position < base:
                window, base = read(page.offset + position, min(_TAG_WINDOW, end - position)), position
            at = position - base
            tag = window[at]
            kind, rest = tag & 3, tag >> 2
            if kind == 0:
                extra = rest - 59 if rest >= 60 else 0
                length = int.from_bytes(window[at + 1 : at + 1 + extra], "little") + 1 if extra else rest + 1
                position += 1 + extra
                literals.append((written, position, length))
                position += length
            else:
                extra = (1, 2, 4)[kind - 1]
                distance = int.from_bytes(window[at + 1 : at + 1 + extra], "little")
                length = rest + 1
                if kind == 1:
                    length, distance = (rest & 7) + 4, distance + (rest >> 3 << 8)
                if written - distance < next_block - _SNAPPY_BLOCK:  # a copy from an earlier block
                    return None
                position += 1 + extra
            written += length
            num_tags += 1
            if num_tags > _MOST_TAGS:
                return None
    except IndexError:
        raise PageError(f"the page at byte {page.offset} is cut") from None
    if written != page.plain_bytes or position != end:
        raise PageError(f"the page at byte {page.offset} is damaged")
    return blocks, literals


def _to_varint(value: int) -> bytes:
    packed = bytearray()
    while value >= 0x80:
        packed.append(value & 0x7F | 0x80)
        value >>= 7
    packed.append(value)
    return bytes(packed)


def _decompress(content: bytes, codec: int, plain_bytes: int) -> bytes:
    """Return the decompressed content of a range. Raise PageError if it is damaged."""
    import pyarrow  # takes a while to import, and most files need no codec

    name = CODECS[codec].lower()
    if codec == _SNAPPY:
        content = _to_varint(plain_bytes) + content
    try:
        # Parquet's LZ4 has no frame.
        plain = pyarrow.Codec("lz4_raw" if name == "lz4" else name).decompress(content, plain_bytes, asbytes=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PageError(f"a page cannot be decompressed ({' '.join(str(error).split())})") from error
    if len(plain) != plain_bytes:
        raise PageError("a page is not as long as its header tells")
    return bytes(plain)
