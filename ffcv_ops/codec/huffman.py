"""Huffman tables of a JPEG, made ready for `ffcv_ops.codec.entropy`: two symbols with one look-up.

A *set* has the four tables of an image: AC of luma, AC of chroma, DC of luma, DC of chroma. The table for AC is indexed
by the next bits of the scan, 12 for luma and 10 for chroma. Its entry has up to two symbols with their values:

    bits 0-5     the number of bits of both symbols; 0 if the entry has none
    bits 7-16    where the first value is stored, relative to the last stored value of the block, in bytes
    bits 17-27   the same for the second value
    bit 30       1 if an end of block is among the symbols
    bit 31       1 if the entry has no symbol, because it is too long, rare or unknown
    bits 32-47   the second value
    bits 48-63   the first value

If there is one symbol only, the second value is 0 and has the place of the first, which is stored after it. An end of
block stores a 0 behind the last value. Two entries are joined by adding them.
"""

import numpy as np

from ffcv_ops._kernels import kernel
from ffcv_ops.codec.inverse_dct import ROW_BYTES
from ffcv_ops.codec.memory import load_i8, load_u1, store_i8, store_u1

AC_BITS = 12, 10
DC_BITS = 10
END_OF_BLOCK = 1 << 13
NO_SYMBOL = 1 << 14
"""Flags in the place of an entry's second value, and so in the position within a block."""
PLACE_MASK = 0x7FF
MOST_VALUE_BITS = 10
MOST_DC_BITS = 11

# A value of more bits is not in the table, so that the check of its size is where the symbol is decoded alone.
_TABLE_VALUE_BITS = 6
_FIRST, _SECOND = 7, 17
_LONGEST_CODE = 16
# The symbols' place in a DHT segment: behind marker, length, name and the number of codes of each length.
_SYMBOLS = 4 + 1 + _LONGEST_CODE
_ZERO_RUN = 0xF0
_ESCAPE = (ROW_BYTES << _FIRST) | (ROW_BYTES | NO_SYMBOL) << _SECOND

# Parts of a set in bytes: the AC tables, the DC tables, and for each of them the codes in the form of T.81, F.2.2.3.
# The codes have for each length the first code beyond, moved to the upper end of 16 bits, and what to add to a code for
# the place of its symbol. The symbols follow.
AC_OFFSETS = 0, 8 << AC_BITS[0]
DC_OFFSETS = AC_OFFSETS[1] + (8 << AC_BITS[1]), AC_OFFSETS[1] + (8 << AC_BITS[1]) + (8 << DC_BITS)
CODES_OFFSET = DC_OFFSETS[1] + (8 << DC_BITS)
PLACES_OFFSET = 8 * (_LONGEST_CODE + 1)
SYMBOLS_OFFSET = 2 * PLACES_OFFSET
CODES_BYTES = SYMBOLS_OFFSET + 256
_KEY_OFFSET = CODES_OFFSET + 4 * CODES_BYTES
_KEY_BYTES = 4 * (21 + 256)
SET_BYTES = _KEY_OFFSET + -(-(8 + _KEY_BYTES) // 64) * 64
NUM_SETS = 16
PYRAMID_BYTES = 8 << max(AC_BITS)
"""Scratch of `build_set`."""


@kernel
def _read_codes_into(segment, num_symbols, most_bits, out):
    """Compute the codes of a table at an address. Return False if the table is none that an encoder writes."""
    code, place = 0, 0
    for length in range(1, _LONGEST_CODE + 1):
        count = np.int64(load_u1(segment + 4 + length))
        store_i8(out + PLACES_OFFSET + 8 * length, place - code)
        code += count
        place += count
        # No code is all ones.
        if place > num_symbols or (count > 0 and code >= 1 << length):
            return False
        store_i8(out + 8 * length, code << (_LONGEST_CODE - length))
        code <<= 1
    for i in range(place):
        symbol = np.int64(load_u1(segment + _SYMBOLS + i))
        store_u1(out + SYMBOLS_OFFSET + i, symbol)
        if symbol > most_bits:
            return False
    return 0 < place == num_symbols


@kernel
def value_of(extra, size):
    """Return the value whose symbol has `size` extra bits: EXTEND of T.81, F.2.2.1."""
    return extra - ((1 << size) - 1 if extra < (1 << size) >> 1 else 0)


@kernel
def _build_dc_into(segment, table):
    """Write the table of the differences of DC: the value, and the number of bits in the low byte; 0 if it is long."""
    for i in range(1 << DC_BITS):
        store_i8(table + 8 * i, 0)
    code, place = 0, _SYMBOLS
    for length in range(1, DC_BITS + 1):
        for _ in range(np.int64(load_u1(segment + 4 + length))):
            size = np.int64(load_u1(segment + place))
            used = length + size
            if used <= DC_BITS:
                width = 1 << (DC_BITS - used)
                for extra in range(1 << size):
                    first = table + 8 * (code << size | extra) * width
                    entry = value_of(extra, size) << 8 | used
                    for i in range(width):
                        store_i8(first + 8 * i, entry)
            code += 1
            place += 1
        code <<= 1


@kernel
def _build_ac_into(segment, bits, pyramid, table):
    """Write the table of AC. First fill `pyramid` with what can follow a symbol, by the bits that a symbol leaves."""
    # pyramid[1 << n : 2 << n] is for n bits.
    half = np.int64(1) << (bits - 1)
    for i in range(half):
        store_i8(pyramid + 8 * (half + i), 0)
    for i in range(2 * half):
        store_i8(table + 8 * i, _ESCAPE)
    for number in range(2):
        code, place = 0, _SYMBOLS
        for length in range(1, bits + 1):
            for _ in range(np.int64(load_u1(segment + 4 + length))):
                symbol = np.int64(load_u1(segment + place))
                size, used = symbol & 15, length + (symbol & 15)
                is_end = symbol == 0
                fits = 0 < size <= _TABLE_VALUE_BITS or is_end or symbol == _ZERO_RUN
                step = ROW_BYTES if is_end else ROW_BYTES * ((symbol >> 4) + 1)
                second = (step | END_OF_BLOCK if is_end else step) << _SECOND | used
                if number == 0 and fits and used < bits:
                    width = half >> used
                    for extra in range(1 << size):
                        first = pyramid + 8 * (half + (code << size | extra) * width)
                        entry = (value_of(extra, size) & 0xFFFF) << 32 | second
                        for i in range(width):
                            store_i8(first + 8 * i, entry)
                elif number == 1 and fits and used <= bits:
                    width = 2 * half >> used
                    for extra in range(1 << size):
                        first = table + 8 * (code << size | extra) * width
                        entry = (value_of(extra, size) & 0xFFFF) << 48 | step << _FIRST | second
                        for i in range(width):
                            store_i8(first + 8 * i, entry + (0 if is_end else load_i8(pyramid + 8 * (width + i))))
                code += 1
                place += 1
            code <<= 1
        if number == 0:
            for left in range(bits - 2, -1, -1):
                size = np.int64(1) << left
                for i in range(size):
                    entry = load_i8(pyramid + 16 * (size + i))
                    store_i8(pyramid + 8 * (size + i), entry if entry & 63 <= left else 0)


@kernel
def build_set(segments, built, pyramid):
    """Build a set from the DHT segments of a JPEG.

    Parameters
    ----------
    segments : int
        Address of the segments: DC and AC of luma, DC and AC of chroma. Their markers and lengths are right.
    built : int
        Address of the output, `SET_BYTES`.
    pyramid : int
        Address of the scratch, `PYRAMID_BYTES`.

    Returns
    -------
    bool
        False if a table is none that an encoder of 8 bit images writes. Then the output is no set.
    """
    key, num_bytes = built + _KEY_OFFSET, 0
    store_i8(key, 0)
    for table in range(4):
        segment = segments + num_bytes
        size_bytes = 2 + (np.int64(load_u1(segment + 2)) << 8 | np.int64(load_u1(segment + 3)))
        for i in range(size_bytes):
            store_u1(key + 8 + num_bytes + i, np.int64(load_u1(segment + i)))
        num_bytes += size_bytes
        is_dc, is_chroma = table % 2 == 0, table // 2
        codes = built + CODES_OFFSET + (is_chroma + (2 if is_dc else 0)) * CODES_BYTES
        if not _read_codes_into(segment, size_bytes - _SYMBOLS, MOST_DC_BITS if is_dc else 255, codes):
            return False
        if is_dc:
            _build_dc_into(segment, built + DC_OFFSETS[is_chroma])
        else:
            _build_ac_into(segment, AC_BITS[is_chroma], pyramid, built + AC_OFFSETS[is_chroma])
    store_i8(key, num_bytes)
    return True


@kernel
def has_key(built, segments, num_bytes):
    """Return whether the set at an address was built from the same DHT segments."""
    key = built + _KEY_OFFSET
    if load_i8(key) != num_bytes:
        return False
    for i in range(num_bytes):
        if load_u1(key + 8 + i) != load_u1(segments + i):
            return False
    return True
