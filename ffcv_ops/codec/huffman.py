"""Huffman tables of a JPEG, made ready for `ffcv_ops.codec.entropy`: two symbols with one look-up.

A *set* has the four tables of an image: AC of luma, AC of chroma, DC of luma, DC of chroma. The table for AC is indexed
by the next bits of the scan, 12 for luma and 10 for chroma. Its entry has up to two symbols with their values:

    bits 0-5     the number of bits of both symbols; 0 if the entry has none
    bits 7-16    where the first value is stored, relative to the last stored value of the block, in bytes
    bits 17-27   the same for the second value
    bit 30       1 if an end of block is among the symbols
    bit 31       1 if the entry has no symbol: it is too long, rare or unknown
    bits 32-47   the second value; without a symbol, the length of its code in the upper byte and the symbol, or 0
    bits 48-63   the first value

If there is one symbol only, the second value is 0 and has the place of the first, which is stored after it. An end of
block stores a 0 behind the last value. Two entries are joined by adding them.
"""

import numpy as np

from ffcv_ops._kernels import kernel
from ffcv_ops.codec.inverse_dct import ROW_BYTES

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
_ZERO_RUN = 0xF0
_ESCAPE = (ROW_BYTES << _FIRST) | (ROW_BYTES | NO_SYMBOL) << _SECOND

# Parts of a set in bytes: the AC tables, the DC tables, then for each table the codes in the form of T.81, F.2.2.3.
AC_OFFSETS = 0, 8 << AC_BITS[0]
DC_OFFSETS = AC_OFFSETS[1] + (8 << AC_BITS[1]), AC_OFFSETS[1] + (8 << AC_BITS[1]) + (4 << DC_BITS)
CODES_OFFSET = DC_OFFSETS[1] + (4 << DC_BITS)
CODES_BYTES = 8 * 2 * (_LONGEST_CODE + 1) + 256
SYMBOLS_OFFSET = 8 * 2 * (_LONGEST_CODE + 1)
_KEY_OFFSET = CODES_OFFSET + 4 * CODES_BYTES
KEY_BYTES = 4 * (21 + 256)
SET_BYTES = _KEY_OFFSET + -(-(KEY_BYTES + 8) // 64) * 64
NUM_SETS = 8
PYRAMID_BYTES = 8 << max(AC_BITS)
"""Scratch of `build_set`."""


@kernel
def _read_codes_into(counts, symbols, most_bits, limits, offsets, out):
    """Compute the codes of a table. Return False if the table is none that an encoder writes.

    `limits` has for each length the first code beyond, moved to the upper end of 16 bits. `offsets` has what to add to
    a code for the place of its symbol.
    """
    code, place = 0, 0
    for length in range(1, _LONGEST_CODE + 1):
        count = np.int64(counts[length - 1])
        offsets[length] = place - code
        code += count
        place += count
        # No code is all ones.
        if place > 256 or (count > 0 and code >= 1 << length):
            return False
        limits[length] = code << (_LONGEST_CODE - length)
        code <<= 1
    for i in range(place):
        out[i] = symbols[i]
        if symbols[i] & 15 > most_bits:
            return False
    return place > 0


@kernel
def _value_of(extra, size):
    return extra - ((1 << size) - 1 if extra < (1 << size) >> 1 else 0)


@kernel
def _build_dc_into(counts, symbols, table):
    """Write the table of the differences of DC: the value, and the number of bits in the low byte; 0 if it is long."""
    table[:] = 0
    code, place = 0, 0
    for length in range(1, DC_BITS + 1):
        for _ in range(counts[length - 1]):
            size = np.int64(symbols[place])
            used = length + size
            if used <= DC_BITS:
                width = 1 << (DC_BITS - used)
                for extra in range(1 << size):
                    first = (code << size | extra) * width
                    table[first : first + width] = np.int32(_value_of(extra, size) << 8 | used)
            code += 1
            place += 1
        code <<= 1


@kernel
def _build_ac_into(counts, symbols, bits, pyramid, table):
    # pyramid[1 << n : 2 << n] has what follows a symbol, by the n bits that the symbol leaves of the index.
    half = 1 << (bits - 1)
    pyramid[half : 2 * half] = 0
    table[:] = np.int64(_ESCAPE)
    for number in range(2):
        code, place = 0, 0
        for length in range(1, bits + 1):
            for _ in range(counts[length - 1]):
                symbol = np.int64(symbols[place])
                run, size = symbol >> 4, symbol & 15
                used = length + size
                is_end, is_run = symbol == 0, symbol == _ZERO_RUN
                fits = size <= _TABLE_VALUE_BITS and (size > 0 or is_end or is_run)
                step = ROW_BYTES if is_end else ROW_BYTES * (run + 1)
                flag = END_OF_BLOCK if is_end else 0
                if number == 0 and fits and used < bits:
                    width = half >> used
                    for extra in range(1 << size):
                        entry = (_value_of(extra, size) & 0xFFFF) << 32 | (step | flag) << _SECOND | used
                        first = half + (code << size | extra) * width
                        pyramid[first : first + width] = entry
                elif number == 1 and not (fits and used <= bits):
                    width = 1 << (bits - length)
                    table[code * width : (code + 1) * width] = np.int64(_ESCAPE | (length << 8 | symbol) << 32)
                elif number == 1:
                    width = 1 << (bits - used)
                    for extra in range(1 << size):
                        value = _value_of(extra, size) & 0xFFFF
                        entry = value << 48 | step << _FIRST | (step | flag) << _SECOND | used
                        first = (code << size | extra) * width
                        if is_end:
                            table[first : first + width] = entry
                        else:
                            for i in range(width):
                                table[first + i] = entry + pyramid[width + i]
                code += 1
                place += 1
            code <<= 1
        if number == 0:
            for left in range(bits - 2, -1, -1):
                size = 1 << left
                for i in range(size):
                    entry = pyramid[2 * size + 2 * i]
                    pyramid[size + i] = entry if entry & 63 <= left else 0


@kernel
def build_set(key, pyramid, out):
    """Build a set from the DHT segments of an image, one after the other.

    Parameters
    ----------
    key : ndarray of uint8, shape (size_bytes,)
        The segments with markers, in the order in which `ffcv_ops.codec.jpeg` writes them: DC and AC of luma, DC and AC
        of chroma. Their lengths are right.
    pyramid : ndarray of int64, shape (PYRAMID_BYTES / 8,)
        Scratch.
    out : ndarray of uint8, shape (SET_BYTES,)
        The output.

    Returns
    -------
    bool
        False if a table is none that an encoder of 8 bit images writes.
    """
    stored = out[_KEY_OFFSET : _KEY_OFFSET + 8].view(np.int64)
    stored[0] = 0
    at = 0
    for number in range(4):
        is_dc, is_chroma = number % 2 == 0, number // 2
        size = np.int64(key[at + 2]) << 8 | np.int64(key[at + 3])
        counts, symbols = key[at + 5 : at + 21], key[at + 21 : at + 2 + size]
        at += 2 + size
        total = 0
        for count in counts:
            total += np.int64(count)
        if total != symbols.size:
            return False
        place = CODES_OFFSET + (2 * is_dc + is_chroma) * CODES_BYTES
        codes = out[place : place + SYMBOLS_OFFSET].view(np.int64)
        limits, offsets = codes[: _LONGEST_CODE + 1], codes[_LONGEST_CODE + 1 :]
        most_bits = MOST_DC_BITS if is_dc else 15
        target = out[place + SYMBOLS_OFFSET : place + CODES_BYTES]
        if not _read_codes_into(counts, symbols, most_bits, limits, offsets, target):
            return False
        if is_dc:
            for symbol in symbols:
                if symbol > MOST_DC_BITS:
                    return False
            first = DC_OFFSETS[is_chroma]
            _build_dc_into(counts, symbols, out[first : first + (4 << DC_BITS)].view(np.int32))
        else:
            bits, first = AC_BITS[is_chroma], AC_OFFSETS[is_chroma]
            table = out[first : first + (8 << bits)].view(np.int64)
            _build_ac_into(counts, symbols, bits, pyramid, table)
    out[_KEY_OFFSET + 8 : _KEY_OFFSET + 8 + key.size] = key
    stored[0] = key.size
    return True


@kernel
def has_key(built, key):
    """Return whether a set has been built by `build_set` from the same segments."""
    if built[_KEY_OFFSET : _KEY_OFFSET + 8].view(np.int64)[0] != key.size:
        return False
    stored = built[_KEY_OFFSET + 8 : _KEY_OFFSET + 8 + key.size]
    for i in range(key.size):
        if stored[i] != key[i]:
            return False
    return True
