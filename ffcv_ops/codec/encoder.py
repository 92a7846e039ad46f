"""Kernels of the JPEG encoder: from pixels to quantised coefficients, and from coefficients to an entropy-coded scan.

The result is that of libjpeg for baseline 4:2:0 with ``JDCT_ISLOW``, bit for bit, in less than half of the time. With
tables that are built for the image, it is that of ``optimize_coding``. Colour conversion and transform process the
blocks of a row of MCUs side by side, in loops that become vector code. AC symbols are found and counted once. The
restart interval is chosen afterwards, and so are the tables where several are offered.

A *strip* is a row of MCUs, uint8 (8, 8 x lanes). Its *lanes* are blocks of 8 x 8 px side by side: blocks of the upper
luma rows, of the lower luma rows, of Cb and of Cr. A *token* is an AC symbol with its extra bits,
``symbol << 16 | bits``. The import of this module compiles the kernels, or loads them from the cache of Numba.
"""

from functools import lru_cache
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

from ffcv_ops._kernels import CAN_CACHE
from ffcv_ops.codec.zigzag import ZIGZAG

_MCU_PX = 16
_BLOCKS_PER_MCU = 6
_LONGEST_CODE = 16
_END_OF_BLOCK, _ZERO_RUN = 0x00, 0xF0
# Rows are padded to a multiple of the bytes in a vector.
_VECTOR = 32

# ITU-T T.81, K.1: the quantisation of luma and of chroma at quality 50.
_QUANTISATION = np.array(
    [
        [
            [16, 11, 10, 16, 24, 40, 51, 61],
            [12, 12, 14, 19, 26, 58, 60, 55],
            [14, 13, 16, 24, 40, 57, 69, 56],
            [14, 17, 22, 29, 51, 87, 80, 62],
            [18, 22, 37, 56, 68, 109, 103, 77],
            [24, 35, 55, 64, 81, 104, 113, 92],
            [49, 64, 78, 87, 103, 121, 120, 101],
            [72, 92, 95, 98, 112, 100, 103, 99],
        ],
        [
            [17, 18, 24, 47, 99, 99, 99, 99],
            [18, 21, 26, 66, 99, 99, 99, 99],
            [24, 26, 56, 99, 99, 99, 99, 99],
            [47, 66, 99, 99, 99, 99, 99, 99],
            *([99] * 8 for _ in range(4)),
        ],
    ]
)[:, ZIGZAG[:, 0], ZIGZAG[:, 1]]


def _int4(*numbers: int) -> tuple[np.int32, ...]:
    return tuple(np.array(numbers, np.int32))


# The weights of jccolor.c (for R, G, B), jcsample.c (for four pixels) and, multiplied out, jfdctint.c of libjpeg.
_Y_WEIGHTS = _int4(19595, 38470, 7471, 0)
_CB_WEIGHTS = _int4(-11059, -21709, 32768, 0)
_CR_WEIGHTS = _int4(32768, -27439, -5329, 0)
_NONE, _Y_OFFSET, _C_OFFSET, _COLOUR_BITS = _int4(0, 1 << 15, (128 << 16) + (1 << 15) - 1, 16)
_MEAN_WEIGHTS, _MEAN_BITS = _int4(1, 1, 1, 1), np.int32(2)
_DCT = (
    _int4(8192, 8192, 0, 0),
    _int4(11363, 9633, 6437, 2260),
    _int4(0, 0, 10703, 4433),
    _int4(9633, -2259, -11362, -6436),
    _int4(8192, -8192, 0, 0),
    _int4(6437, -11362, 2261, 9633),
    _int4(0, 0, 4433, -10704),
    _int4(2260, -6436, 9633, -11363),
)
# After its first dimension the transform keeps 2 of the 13 fractional bits of its weights, after the second none, and
# not the factor 8 by which both enlarge.
_ROW_BITS, _COLUMN_BITS = _int4(11, 15)
# The number of bits of each magnitude. Differences of DC are the largest magnitudes.
_NUM_BITS = np.array([magnitude.bit_length() for magnitude in range(1 << 12)], np.uint8)
# A code is one word. Its low bits have the length of code and extra bits. Its high bits have the code, shifted to the
# left by the extra bits.
_LENGTH_BITS = 6

_KERNEL: dict[str, Any] = {"cache": CAN_CACHE, "nogil": True}


def _array(item: Any, num_dims: int) -> Any:
    return nb.types.Array(item, num_dims, "C", readonly=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic. Operators of Numba widen 16 and 32 bits to 64, which leaves a quarter or a half of the lanes of a vector.


@nb.njit(**_KERNEL)
def _weigh(a, b, c, d, weights, offset, shift):
    left = np.add(np.multiply(a, weights[0]), np.multiply(b, weights[1]))
    right = np.add(np.multiply(c, weights[2]), np.multiply(d, weights[3]))
    return np.right_shift(np.add(np.add(left, right), offset), shift)


@nb.njit(**_KERNEL)
def _negate_if(value, sign):
    """Return `value` if `sign` is 0, and -`value` if `sign` is -1."""
    return np.subtract(np.bitwise_xor(value, sign), sign)


def _trailing_zeros(mask: Any) -> Any:
    return np.uint64((int(mask) & -int(mask)).bit_length() - 1)


@intrinsic
def _count_trailing_zeros(typing_context, mask) -> Any:
    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return nb.types.uint64(nb.types.uint64), codegen


@overload(_trailing_zeros)
def _compile_trailing_zeros(mask):
    return lambda mask: _count_trailing_zeros(mask)  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------------------------------
# Pixels to coefficients


@lru_cache(maxsize=4)
def build_quantisation(quality: int) -> tuple[np.ndarray, np.ndarray]:
    """Build the quantisation tables of luma and chroma, scaled as in libjpeg.

    Parameters
    ----------
    quality : int
        1 to 100.

    Returns
    -------
    tables : ndarray of uint8, shape (2, 64)
        The divisors, in the order of a JPEG.
    divisors : ndarray of uint16, shape (2, 64, 3)
        For `tokenise`: half of the divisor, its reciprocal, and the number of bits beyond 16 to shift products by.
    """
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = np.clip((_QUANTISATION * scale + 50) // 100, 1, 255)
    divisors = np.empty((2, 64, 3), np.uint16)
    for at, step in np.ndenumerate(tables):
        divisor = 8 * int(step)
        # The reciprocal is rounded up, by less than divisor / 2^(shift + 16). Therefore the quotient is exact for
        # dividends below 2^14. The largest dividend is 2^13 + 1020.
        shift = divisor.bit_length() - 2
        divisors[at] = divisor // 2, -(-(1 << 16 + shift) // divisor), shift
    return tables.astype(np.uint8), divisors


@nb.njit(**_KERNEL)
def _extend_into(row, period, out):
    """Copy a row, and repeat its last `period` values until `out` is full."""
    for i in range(row.size):
        out[i] = row[i]
    for i in range(row.size, out.size):
        out[i] = out[i - period]


@nb.njit(**_KERNEL)
def _convert_colour_into(pixels, y, cb, cr):
    for x in range(y.size):
        r, g, b = np.int32(pixels[3 * x]), np.int32(pixels[3 * x + 1]), np.int32(pixels[3 * x + 2])
        y[x] = _weigh(r, g, b, _NONE, _Y_WEIGHTS, _Y_OFFSET, _COLOUR_BITS)
        cb[x] = _weigh(r, g, b, _NONE, _CB_WEIGHTS, _C_OFFSET, _COLOUR_BITS)
        cr[x] = _weigh(r, g, b, _NONE, _CR_WEIGHTS, _C_OFFSET, _COLOUR_BITS)


@nb.njit(**_KERNEL)
def _halve_into(upper, lower, out):
    """Write the means of 2 x 2 px. Halves are rounded down and up in turn."""
    for x in range(out.size):
        a, b = np.int32(upper[2 * x]), np.int32(upper[2 * x + 1])
        c, d = np.int32(lower[2 * x]), np.int32(lower[2 * x + 1])
        out[x] = _weigh(a, b, c, d, _MEAN_WEIGHTS, np.int32(1 + (x & 1)), _MEAN_BITS)


@nb.njit(**_KERNEL)
def _read_strip_into(pixels, top, width, row, chroma, strip):
    """Convert the strip that begins at row `top` of the image. With its padding, the strip is `width` px wide.

    Below the image the last row of each plane is repeated. For chroma this is the last row after halving.
    """
    height = pixels.shape[0]
    for y in range(_MCU_PX):
        luma = strip[y & 7, (y >> 3) * width : ((y >> 3) + 1) * width]
        if top + (y & 14) < height:
            _extend_into(pixels[min(top + y, height - 1)], 3, row)
            _convert_colour_into(row, luma, chroma[y & 1, 0], chroma[y & 1, 1])
        else:
            above = (y - 1) >> 3
            _extend_into(strip[(y - 1) & 7, above * width : (above + 1) * width], 1, luma)
        if y & 1:
            for component in range(2):
                first, stop = (4 + component) * width // 2, (5 + component) * width // 2
                if top + y - 1 < height:
                    _halve_into(chroma[0, component], chroma[1, component], strip[y >> 1, first:stop])
                else:
                    _extend_into(strip[(y >> 1) - 1, first:stop], 1, strip[y >> 1, first:stop])


@nb.njit(**_KERNEL)
def _transform(x, shift):
    """Transform eight int32 by one dimension of the DCT."""
    half = np.left_shift(np.int32(1), np.subtract(shift, np.int32(1)))
    ah, bg, cf, de = np.add(x[0], x[7]), np.add(x[1], x[6]), np.add(x[2], x[5]), np.add(x[3], x[4])
    p, q, r, s = np.add(ah, de), np.add(bg, cf), np.subtract(ah, de), np.subtract(bg, cf)
    y0, y4 = _weigh(p, q, r, s, _DCT[0], half, shift), _weigh(p, q, r, s, _DCT[4], half, shift)
    y2, y6 = _weigh(p, q, r, s, _DCT[2], half, shift), _weigh(p, q, r, s, _DCT[6], half, shift)
    p, q, r, s = np.subtract(x[0], x[7]), np.subtract(x[1], x[6]), np.subtract(x[2], x[5]), np.subtract(x[3], x[4])
    y1, y3 = _weigh(p, q, r, s, _DCT[1], half, shift), _weigh(p, q, r, s, _DCT[3], half, shift)
    y5, y7 = _weigh(p, q, r, s, _DCT[5], half, shift), _weigh(p, q, r, s, _DCT[7], half, shift)
    return y0, y1, y2, y3, y4, y5, y6, y7


@nb.njit(**_KERNEL)
def _extract_sample(word, shift):
    return np.subtract(np.int32(np.bitwise_and(np.right_shift(word, shift), np.uint32(255))), np.int32(128))


@nb.njit(**_KERNEL)
def _transform_rows_into(strip, s0, s1, s2, s3, s4, s5, s6, s7):
    # Two words are a row of a block. Its bytes are separated in registers, which saves gathering them from memory.
    words = strip.view(np.uint32)
    b0, b1, b2, b3 = np.uint32(0), np.uint32(8), np.uint32(16), np.uint32(24)
    for row in range(8):
        for lane in range(s0.shape[1]):
            u, v = words[row, 2 * lane], words[row, 2 * lane + 1]
            left = _extract_sample(u, b0), _extract_sample(u, b1), _extract_sample(u, b2), _extract_sample(u, b3)
            y = _transform(
                (*left, _extract_sample(v, b0), _extract_sample(v, b1), _extract_sample(v, b2), _extract_sample(v, b3)),
                _ROW_BITS,
            )
            s0[row, lane], s1[row, lane], s2[row, lane], s3[row, lane] = y[0], y[1], y[2], y[3]
            s4[row, lane], s5[row, lane], s6[row, lane], s7[row, lane] = y[4], y[5], y[6], y[7]


@nb.njit(**_KERNEL)
def _transform_columns(s0, s1, s2, s3, s4, s5, s6, s7):
    for i in range(s0.size):
        upper = np.int32(s0[i]), np.int32(s1[i]), np.int32(s2[i]), np.int32(s3[i])
        y = _transform((*upper, np.int32(s4[i]), np.int32(s5[i]), np.int32(s6[i]), np.int32(s7[i])), _COLUMN_BITS)
        s0[i], s1[i], s2[i], s3[i], s4[i], s5[i], s6[i], s7[i] = y


@nb.njit(**_KERNEL)
def _transform_into(strip, s):
    """Write the DCT of every lane, multiplied by 8, int16 (64, lanes), column by column."""
    _transform_rows_into(strip, s[:8], s[8:16], s[16:24], s[24:32], s[32:40], s[40:48], s[48:56], s[56:])
    for k in range(0, 64, 8):
        _transform_columns(s[k], s[k + 1], s[k + 2], s[k + 3], s[k + 4], s[k + 5], s[k + 6], s[k + 7])


@nb.njit(**_KERNEL)
def _quantise_into(transformed, num_luma, divisors, coefficients, masks):
    """Write coefficients, int16 (64, lanes) in zigzag order, and a mask per lane with a bit for each that is not 0."""
    masks.fill(0)
    for table in range(2):
        first, stop = (0, num_luma) if table == 0 else (num_luma, transformed.shape[1])
        for k in range(64):
            at, part = 8 * ZIGZAG[k, 1] + ZIGZAG[k, 0], k >> 4
            half, reciprocal, shift = divisors[table, k, 0], np.uint32(divisors[table, k, 1]), divisors[table, k, 2]
            flag, none = np.uint16(1 << (k & 15)), np.uint16(0)
            # Unsigned, because a test for negative indices costs time.
            for lane in range(np.uint64(first), np.uint64(stop)):
                sign = np.right_shift(transformed[at, lane], np.int16(15))
                magnitude = np.uint16(_negate_if(transformed[at, lane], sign))
                product = np.multiply(np.uint32(np.add(magnitude, half)), reciprocal)
                quotient = np.int16(np.right_shift(np.uint16(np.right_shift(product, np.uint32(16))), shift))
                coefficients[k, lane] = _negate_if(quotient, sign)
                masks[part, lane] = np.bitwise_or(masks[part, lane], flag if quotient != 0 else none)


@nb.njit(**_KERNEL)
def _find_lane(mcu, number, width):
    """Return the lane of a block of an MCU (0 to 3: luma, 4: Cb, 5: Cr) in a strip that is `width` px wide."""
    if number < 4:
        return (number >> 1) * (width >> 3) + 2 * mcu + (number & 1)
    return number * (width >> 4) + mcu


@nb.njit(**_KERNEL)
def _pad_blocks(num_mcus, width, size, coefficients, masks):
    """Give each luma block beyond the image the DC of the block before, and no AC. `size` is the rest of the image."""
    for mcu in range(num_mcus):
        for number in range(1, 4):
            below = number >= 2 and size[0] <= 8
            if below or (number & 1 and _MCU_PX * mcu + 8 >= size[1]):
                lane = _find_lane(mcu, number, width)
                coefficients[0, lane] = coefficients[0, _find_lane(mcu, 1 if below else number - 1, width)]
                masks[0, lane] = masks[1, lane] = masks[2, lane] = masks[3, lane] = 0


@nb.njit(**_KERNEL)
def _tokenise_strip(coefficients, masks, width, dc, ends, tokens, end, counts):
    """Append the tokens of a strip, MCU by MCU, and count their symbols."""
    one, sixteen = np.uint64(1), np.uint64(16)
    end = np.uint64(end)
    for block in range(dc.size):
        number = block % _BLOCKS_PER_MCU
        lane, table = np.uint64(_find_lane(block // _BLOCKS_PER_MCU, number, width)), np.uint64(number >> 2)
        mask = np.uint64(masks[0, lane] & np.uint16(0xFFFE)) | np.uint64(masks[1, lane]) << sixteen
        mask |= np.uint64(masks[2, lane]) << np.uint64(32) | np.uint64(masks[3, lane]) << np.uint64(48)
        dc[block] = coefficients[0, lane]
        last = np.uint64(0)
        while mask != 0:
            k = _trailing_zeros(mask)
            mask &= mask - one
            run = k - last - one
            last = k
            while run >= sixteen:
                tokens[end] = _ZERO_RUN << 16
                counts[table, _ZERO_RUN] += 1
                end += one
                run -= sixteen
            value = np.int32(coefficients[k, lane])
            sign = np.right_shift(value, np.int32(31))
            num_bits = np.uint64(_NUM_BITS[np.uint64(_negate_if(value, sign))])
            symbol = run << np.uint64(4) | num_bits
            tokens[end] = symbol << sixteen | np.uint64(np.add(value, sign)) & ((one << num_bits) - one)
            counts[table, symbol] += 1
            end += one
        if last != np.uint64(63):
            tokens[end] = _END_OF_BLOCK << 16
            counts[table, _END_OF_BLOCK] += 1
            end += one
        ends[block] = end
    return np.int64(end)


@nb.njit((_array(nb.uint8, 3), _array(nb.uint16, 3)), **_KERNEL)
def tokenise(image, divisors):
    """Transform and quantise an image, and find its AC symbols.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB.
    divisors : ndarray of uint16, shape (2, 64, 3)
        See `build_quantisation`.

    Returns
    -------
    dc : ndarray of int16, shape (num_blocks,)
        The DC coefficient of each block, in the order of the scan.
    ends : ndarray of int64, shape (num_blocks,)
        The end of each block's tokens.
    tokens : ndarray of uint32, shape (64 x num_blocks,)
        The tokens.
    counts : ndarray of int64, shape (2, 256)
        The number of occurrences of each AC symbol of luma and of chroma.
    """
    height = image.shape[0]
    num_mcus, num_strips = -(-image.shape[1] // _MCU_PX), -(-height // _MCU_PX)
    width = -(-_MCU_PX * num_mcus // _VECTOR) * _VECTOR
    lanes = -(-3 * width // (8 * _VECTOR)) * _VECTOR
    row, chroma = np.empty(3 * width, np.uint8), np.empty((2, 2, width), np.uint8)
    strip = np.zeros((8, 8 * lanes), np.uint8)
    transformed, coefficients = np.empty((64, lanes), np.int16), np.empty((64, lanes), np.int16)
    masks = np.empty((4, lanes), np.uint16)
    pixels = image.reshape(height, 3 * image.shape[1])
    strip_blocks = _BLOCKS_PER_MCU * num_mcus
    dc, ends = np.empty(num_strips * strip_blocks, np.int16), np.empty(num_strips * strip_blocks, np.int64)
    tokens, counts = np.empty(64 * dc.size, np.uint32), np.zeros((2, 256), np.int64)
    end = 0
    for number in range(num_strips):
        top = _MCU_PX * number
        _read_strip_into(pixels, top, width, row, chroma, strip)
        _transform_into(strip, transformed)
        _quantise_into(transformed, width // 4, divisors, coefficients, masks)
        _pad_blocks(num_mcus, width, (height - top, image.shape[1]), coefficients, masks)
        part = slice(number * strip_blocks, (number + 1) * strip_blocks)
        end = _tokenise_strip(coefficients, masks, width, dc[part], ends[part], tokens, end, counts)
    return dc, ends, tokens, counts


# ---------------------------------------------------------------------------------------------------------------------
# Huffman tables


@nb.njit(**_KERNEL)
def _count_dc_into(dc, interval, counts):
    counts.fill(0)
    last = np.zeros(3, np.int64)
    for block in range(dc.size):
        if block % (_BLOCKS_PER_MCU * interval) == 0:
            last.fill(0)
        number = block % _BLOCKS_PER_MCU
        component = max(number - 3, 0)
        counts[number >> 2, _NUM_BITS[abs(dc[block] - last[component])]] += 1
        last[component] = dc[block]


@nb.njit(**_KERNEL)
def _compute_lengths_into(weights, lengths):
    """Compute the depth of each symbol by Huffman's algorithm. Among equal weights, the last symbol is merged first."""
    others = np.full(weights.size, -1)
    while True:
        rarest = second = -1
        for symbol in range(weights.size):
            if weights[symbol] > 0:
                if rarest < 0 or weights[symbol] <= weights[rarest]:
                    rarest, second = symbol, rarest
                elif second < 0 or weights[symbol] <= weights[second]:
                    second = symbol
        if second < 0:
            return
        weights[rarest] += weights[second]
        weights[second] = 0
        lengths[rarest] += 1
        while others[rarest] >= 0:
            rarest = others[rarest]
            lengths[rarest] += 1
        others[rarest] = second
        while second >= 0:
            lengths[second] += 1
            second = others[second]


@nb.njit(**_KERNEL)
def _limit_lengths(num_codes):
    """Limit the lengths of codes by T.81, K.2: one of two codes becomes shorter, the other one splits a third code."""
    for length in range(num_codes.size - 1, _LONGEST_CODE, -1):
        while num_codes[length] > 0:
            shorter = length - 2
            while num_codes[shorter] == 0:
                shorter -= 1
            num_codes[length] -= 2
            num_codes[length - 1] += 1
            num_codes[shorter + 1] += 2
            num_codes[shorter] -= 1


@nb.njit(**_KERNEL)
def _build_table_into(counts, table):
    """Write a table in the form of a JPEG: the number of codes of each length, then the symbols by length."""
    used = np.empty(256, np.int64)
    num_used = 0
    for symbol in range(256):
        if counts[symbol] > 0:
            used[num_used] = symbol
            num_used += 1
    # One more symbol, the rarest one, takes the code of all ones, which a JPEG must not use.
    weights, lengths = np.ones(num_used + 1, np.int64), np.zeros(num_used + 1, np.int64)
    for i in range(num_used):
        weights[i] = counts[used[i]]
    _compute_lengths_into(weights, lengths)
    num_codes = np.zeros(num_used + 2 + _LONGEST_CODE, np.int64)
    for depth in lengths:
        num_codes[depth] += 1
    _limit_lengths(num_codes)
    longest = _LONGEST_CODE
    while num_codes[longest] == 0:
        longest -= 1
    num_codes[longest] -= 1
    for i in range(_LONGEST_CODE):
        table[i] = num_codes[i + 1]
    end = _LONGEST_CODE
    for length in range(1, num_codes.size):
        for i in range(num_used):
            if lengths[i] == length:
                table[end] = used[i]
                end += 1


@nb.njit((_array(nb.int16, 1), nb.int64, _array(nb.int64, 2)), **_KERNEL)
def count_symbols(dc, interval, ac_counts):
    """Count the symbols of an image.

    Parameters
    ----------
    dc, ac_counts : ndarray
        ``dc`` and ``counts`` of `tokenise`.
    interval : int
        MCUs between restart markers.

    Returns
    -------
    ndarray of int64, shape (4, 256)
        The number of occurrences of each symbol of DC of luma, DC of chroma, AC of luma and AC of chroma.
    """
    counts = np.empty((4, 256), np.int64)
    _count_dc_into(dc, interval, counts[:2])
    counts[2:] = ac_counts
    return counts


@nb.njit((_array(nb.int64, 2),), **_KERNEL)
def build_tables(counts):
    """Build the best Huffman tables for symbols that were counted, as jchuff.c of libjpeg does.

    Parameters
    ----------
    counts : ndarray of int64, shape (4, 256)
        Result of `count_symbols`. A symbol that does not occur gets no code.

    Returns
    -------
    ndarray of uint8, shape (4, 272)
        The tables, in the order of the counts. Each has the number of codes of the lengths 1 to 16, and the symbols.
    """
    tables = np.zeros((4, _LONGEST_CODE + 256), np.uint8)
    for number in range(4):
        _build_table_into(counts[number], tables[number])
    return tables


@nb.njit((_array(nb.uint8, 2),), **_KERNEL)
def build_codes(tables):
    """Return the codes of tables by table and symbol, for `write_scan`: uint32 (4, 256). 0 stands for no code."""
    codes = np.zeros((4, 256), np.uint32)
    for number in range(4):
        code, at = 0, _LONGEST_CODE
        for length in range(1, _LONGEST_CODE + 1):
            for _ in range(tables[number, length - 1]):
                symbol = np.int64(tables[number, at])
                extra = symbol & 15
                codes[number, symbol] = code << extra + _LENGTH_BITS | length + extra
                code += 1
                at += 1
            code <<= 1
    return codes


@nb.njit((_array(nb.int64, 2), _array(nb.uint32, 3)), **_KERNEL)
def choose_codes(counts, codes):
    """Choose the codes with which an image has the fewest bits.

    Parameters
    ----------
    counts : ndarray
        Result of `count_symbols`.
    codes : ndarray of uint32, shape (num_sets, 4, 256)
        Results of `build_codes`.

    Returns
    -------
    number : int
        The number of the set, the first of equals; -1 if every set lacks a code that the image needs.
    num_bits : int
        Size of the scan in bits, without padding and markers.
    """
    best, least_bits = -1, 0
    for number in range(codes.shape[0]):
        num_bits, is_complete = 0, True
        for table in range(4):
            for symbol in range(256):
                is_complete &= counts[table, symbol] == 0 or codes[number, table, symbol] != 0
                num_bits += counts[table, symbol] * (codes[number, table, symbol] & ((1 << _LENGTH_BITS) - 1))
        if is_complete and (best < 0 or num_bits < least_bits):
            best, least_bits = number, num_bits
    return best, least_bits


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to a scan


@nb.njit(**_KERNEL)
def _store_into(bits, out, position):
    for i in range(8):
        out[position + np.uint64(i)] = bits >> np.uint64(56 - 8 * i) & np.uint64(0xFF)


@nb.njit(**_KERNEL)
def _write_segment_into(dc, ends, tokens, first, codes, out):
    """Write a restart segment, padded with ones to whole bytes. Return its size in bytes."""
    one, two, three, seven, sixteen = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(7), np.uint64(16)
    length_bits, length_mask = np.uint64(_LENGTH_BITS), np.uint64((1 << _LENGTH_BITS) - 1)
    last = np.zeros(3, np.int64)
    # Bits are collected at the upper end of a word. The whole word is stored each time, which is faster than a test.
    bits = used = position = np.uint64(0)
    token = np.uint64(first)
    for block in range(dc.size):
        number = block % _BLOCKS_PER_MCU
        component, table = max(number - 3, 0), np.uint64(number >> 2)
        difference = np.int64(dc[block]) - last[component]
        last[component] = dc[block]
        num_bits = np.uint64(_NUM_BITS[abs(difference)])
        extra = np.uint64(difference - (difference < 0)) & ((one << num_bits) - one)
        code = np.uint64(codes[table, num_bits])
        table += two
        end = np.uint64(ends[block])
        while True:
            used += code & length_mask
            bits |= (code >> length_bits | extra) << (np.uint64(64) - used)
            _store_into(bits, out, position)
            position += used >> three
            bits <<= used & np.uint64(56)
            used &= seven
            if token >= end:
                break
            extra = np.uint64(tokens[token])
            code = np.uint64(codes[table, extra >> sixteen])
            extra &= np.uint64(0xFFFF)
            token += one
    if used > 0:
        out[position] = bits >> np.uint64(56) | np.uint64(0xFF) >> used
        position += one
    return np.int64(position)


@nb.njit(**_KERNEL)
def _stuff_into(data, num_bytes, out, position):
    """Copy entropy-coded bytes with a zero after each byte of all ones. Return the end of the copy."""
    one = np.uint64(1)
    for i in range(num_bytes):
        out[position] = data[i]
        position += one
        if data[i] == 0xFF:
            out[position] = 0
            position += one
    return position


@nb.njit(
    (_array(nb.int16, 1), _array(nb.int64, 1), _array(nb.uint32, 1), nb.int64, _array(nb.uint32, 2), nb.int64),
    **_KERNEL,
)
def write_scan(dc, ends, tokens, interval, codes, num_bits):
    """Write the entropy-coded data of an image.

    Parameters
    ----------
    dc, ends, tokens : ndarray
        Results of `tokenise`.
    interval : int
        MCUs between restart markers. It divides the number of MCUs.
    codes : ndarray
        Result of `build_codes`.
    num_bits : int
        Result of `choose_codes` for this interval.

    Returns
    -------
    scan : ndarray of uint8, shape (size_bytes,)
        The restart segments with their markers, and EOI.
    starts : ndarray of int64, shape (num_segments + 1,)
        The start of each segment in the scan, and the start of EOI.
    """
    segment_blocks = _BLOCKS_PER_MCU * interval
    num_segments = dc.size // segment_blocks
    data, scan = np.empty(num_bits // 8 + 16, np.uint8), np.empty(num_bits // 4 + 4 * num_segments, np.uint8)
    starts = np.empty(num_segments + 1, np.int64)
    position, first = np.uint64(0), np.int64(0)
    for segment in range(num_segments):
        starts[segment] = position
        part = slice(segment * segment_blocks, (segment + 1) * segment_blocks)
        num_bytes = _write_segment_into(dc[part], ends[part], tokens, first, codes, data)
        first = ends[(segment + 1) * segment_blocks - 1]
        position = _stuff_into(data, num_bytes, scan, position)
        scan[position], scan[position + np.uint64(1)] = 0xFF, 0xD0 + segment % 8
        position += np.uint64(2)
    starts[num_segments] = position - np.uint64(2)
    scan[starts[num_segments] + 1] = 0xD9
    return scan[: np.int64(position)], starts
