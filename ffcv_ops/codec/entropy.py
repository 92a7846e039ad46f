"""The region under a crop, from the bytes of a JPEG of our writer to its planes, without TurboJPEG.

The restart segments under the crop are copied without their stuffed zeros, two segments at a time are decoded, and the
coefficients go straight into the lanes of `ffcv_ops.codec.inverse_dct`. While one segment waits for memory or for its
next look-up, the other one proceeds. Blocks beside the crop are decoded, so that damage is found, but not transformed.

Nothing is reported here. If anything is not as our writer writes it, the kernels return False, and the caller lets
TurboJPEG decode or report the image. What they accept, TurboJPEG decodes without a warning, to the same planes.

The innermost loops work on addresses (see `ffcv_ops.codec.memory`). They stay within the memory of `SCRATCH_BYTES`, of
the unstuffed bytes and of the planes for these reasons. Each position in a block is at most `_LAST` when a look-up
begins, and a look-up moves it by at most 32 rows, for which each group has room. A block begins only within its
segment, and takes less than `SLACK_BYTES`. Everything else is checked before the loops begin.
"""

from collections import namedtuple
from typing import Any

import numba as nb
import numpy as np

from ffcv_ops._kernels import kernel
from ffcv_ops.codec import huffman, jpeg
from ffcv_ops.codec.inverse_dct import (
    LANES,
    MAX_COEFFICIENT,
    ROW_BYTES,
    transform_chroma_row,
    transform_columns,
    transform_luma_row,
)
from ffcv_ops.codec.memory import (
    copy_until_ff,
    load_big_endian,
    load_i8,
    load_u1,
    store_i8,
    store_u1,
    store_u2,
)

_BLOCKS_PER_MCU = 6
_MCU_PX = 16
_LUMA_MCUS, _CHROMA_MCUS = 4, 8
# 64 rows of coefficients, and room for what a look-up stores beyond.
_GROUP_BYTES = 96 * ROW_BYTES
_LAST = 63 * ROW_BYTES
SLACK_BYTES = 1024
"""Bytes behind the unstuffed data that may be read or overwritten. The 64 symbols of a block have less than 256."""

# A chunk is what is decoded before its blocks are transformed: some rows of MCUs, whose coefficients fit into a cache.
_CHUNK_MCUS = 96
_MAX_ROW_MCUS = 256
_MAX_DECODED_MCUS = 1024
_NUM_LUMA_GROUPS, _NUM_CHROMA_GROUPS = _MAX_DECODED_MCUS // _LUMA_MCUS, _MAX_DECODED_MCUS // _CHROMA_MCUS

_Parts = namedtuple("_Parts", "luma chroma dump blocks segments places work quantisation state pyramid sets end")


def _lay_out(*sizes_bytes: int) -> _Parts:
    ends = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes_bytes)]).tolist()
    return _Parts(*ends)


_AT = _lay_out(
    _NUM_LUMA_GROUPS * _GROUP_BYTES,
    _NUM_CHROMA_GROUPS * _GROUP_BYTES,
    _GROUP_BYTES,
    8 * _BLOCKS_PER_MCU * _MAX_DECODED_MCUS,
    32 * _MAX_DECODED_MCUS,
    8 * _MAX_DECODED_MCUS,
    64 * ROW_BYTES,
    2 * 64,
    256,
    huffman.PYRAMID_BYTES,
    huffman.NUM_SETS * huffman.SET_BYTES,
)
SCRATCH_BYTES = _AT.end
"""Memory of a decoder, of one thread at a time. It is all zeros at first, and is never cleared."""

# Within the part `state`: the DC of three components of two streams, a look-up that does nothing, and of the queue.
_PARKED, _NEXT_SEGMENT, _NUM_SEGMENTS, _NUM_RUNNING = 64, 96, 104, 112
_PROBATION = 120
_COMPONENT_SHIFT = 56
_LOOK_UPS_PER_TURN = 4

_ROWS_OFFSET = 6 + len(jpeg.INDEX_NAME)
# The bytes of our writer around the numbers that differ from image to image. The bytes are those of libjpeg.
_BEFORE_TABLES = tuple(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
_TABLE = tuple(b"\xff\xdb\0\x43")
_FRAME = tuple(b"\xff\xc0\0\x11\x08")
_COMPONENTS = tuple(b"\3\1\x22\0\2\x11\1\3\x11\1")
_CODES_NAMES = 0x00, 0x10, 0x01, 0x11
_SCAN = tuple(b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11\0\x3f\0")


@kernel
def _peek(data, position):
    """Return at least 57 bits from a position in bits, at the upper end."""
    return load_big_endian(data + (position >> 3)) << np.uint64(position & 7)


@kernel
def _find_symbol(codes, bits):
    """Return length << 8 | symbol of the code at the upper end of `bits`, or 0 if there is none."""
    next_bits = np.int64(bits >> np.uint64(48))
    for length in range(1, 17):
        if next_bits < load_i8(codes + 8 * length):
            place = load_i8(codes + huffman.PLACES_OFFSET + 8 * length) + (next_bits >> (16 - length))
            return length << 8 | np.int64(load_u1(codes + huffman.SYMBOLS_OFFSET + place))
    return 0


@kernel
def _decode_ac_alone(data, position, place, block, codes, quantisation):
    """Decode one AC symbol with all checks. Return the place, or -1 if no encoder writes it, and the position."""
    bits = _peek(data, position)
    found = _find_symbol(codes, bits)
    length, run, size = found >> 8, (found >> 4) & 15, found & 15
    if size == 0:
        if run == 0 and length > 0:
            return place | huffman.END_OF_BLOCK, position + length
        if run == 15:
            place += 16 * ROW_BYTES
            return (place if place <= _LAST else -1), position + length
        return -1, position
    place += (run + 1) * ROW_BYTES
    if size > huffman.MOST_VALUE_BITS or place > _LAST:
        return -1, position
    extra = np.int64((bits << np.uint64(length)) >> np.uint64(64 - size))
    value = huffman.value_of(extra, size)
    if abs(value) * np.int64(load_u1(quantisation + place // ROW_BYTES)) > MAX_COEFFICIENT:
        return -1, position
    store_u2(block + place, value)
    return place, position + length + size


@kernel
def _decode_dc_alone(data, position, codes):
    """Decode a difference of DC. Return it with the new position, which is -1 if there is no such code."""
    bits = _peek(data, position)
    found = _find_symbol(codes, bits)
    length, size = found >> 8, found & 255
    if length == 0:
        return 0, -1
    if size == 0:
        return 0, position + length
    extra = np.int64((bits << np.uint64(length)) >> np.uint64(64 - size))
    return huffman.value_of(extra, size), position + length + size


@nb.njit(nogil=True, forceinline=True)
def _look_up(bits, position, place, block, table, shift):
    """Store up to two values. Return the entry, and the bits, position and place after it."""
    entry = load_i8(table + (np.int64(bits >> shift) << 3))
    used = entry & 63
    second = entry >> 17
    at = block + place
    store_u2(at + (second & huffman.PLACE_MASK), entry >> 32)
    store_u2(at + ((entry >> 7) & 0x3FF), entry >> 48)
    return entry, bits << np.uint64(used), position + used, place + (second & 0x7FFF)


@kernel
def _end_segment(data, position, end):
    """Return whether a segment ends where it must: within its last byte, whose other bits are ones."""
    left = end - position
    if not 0 <= left < 8:
        return False
    return left == 0 or np.int64(load_u1(data + (position >> 3))) & ((1 << left) - 1) == (1 << left) - 1


@kernel
def _start_segment(scratch, stream):
    """Give a stream the next segment. Return its first block, 0 if there is none, its last block, start and end."""
    state = scratch + _AT.state
    number = load_i8(state + _NEXT_SEGMENT)
    if number >= load_i8(state + _NUM_SEGMENTS):
        return 0, 0, 0, 0
    store_i8(state + _NEXT_SEGMENT, number + 1)
    for component in range(3):
        store_i8(state + 32 * stream + 8 * component, 0)
    segment = scratch + _AT.segments + 32 * number
    return load_i8(segment), load_i8(segment + 8), load_i8(segment + 16), load_i8(segment + 24)


@nb.njit(nogil=True, forceinline=True)
def _end_block(context, stream, entry, bits, position, place, block, table, shift, at, last, end):
    """Finish a block, or the look-up that was not the last one after all, and begin the next block.

    Return a status and the stream. The status is 0 if the stream continues, 1 if it has ended, -1 if it is odd.
    """
    data, scratch, tables, limits = context
    is_chroma = np.int64(shift != np.uint64(64 - huffman.AC_BITS[0]))
    if (place & ~huffman.END_OF_BLOCK) > _LAST:
        place -= (entry >> 17) & 0x7FFF
        position -= entry & 63
        codes = tables + huffman.CODES_OFFSET + is_chroma * huffman.CODES_BYTES
        place, position = _decode_ac_alone(
            data, position, place, block, codes, scratch + _AT.quantisation + 64 * is_chroma
        )
        if place < 0:
            return -1, bits, position, place, block, table, shift, at, last, end
        if place < _LAST:
            return 0, _peek(data, position), position, place, block, table, shift, at, last, end
    at += 8
    if at > last:
        if not _end_segment(data, position, end):
            return -1, bits, position, place, block, table, shift, at, last, end
        at, last, position, end = _start_segment(scratch, stream)
        if at == 0:
            parked = scratch + _AT.state + _PARKED
            return 1, np.uint64(0), np.int64(0), np.int64(0), scratch + _AT.dump, parked, np.uint64(63), at, last, end
    described = load_i8(at)
    component = described >> _COMPONENT_SHIFT
    block = described & ((1 << _COMPONENT_SHIFT) - 1)
    is_chroma = np.int64(component > 0)
    bits = _peek(data, position)
    dc_table = tables + (huffman.DC_OFFSETS[1] if is_chroma else huffman.DC_OFFSETS[0])
    found = load_i8(dc_table + (np.int64(bits >> np.uint64(64 - huffman.DC_BITS)) << 3))
    difference, used = found >> 8, found & 63
    position += used
    bits <<= np.uint64(used)
    if used == 0:
        codes = tables + huffman.CODES_OFFSET + (2 + is_chroma) * huffman.CODES_BYTES
        difference, position = _decode_dc_alone(data, position, codes)
        if position < 0:
            return -1, bits, position, place, block, table, shift, at, last, end
        bits = _peek(data, position)
    last_dc = scratch + _AT.state + 32 * stream + 8 * component
    dc = load_i8(last_dc) + difference
    store_i8(last_dc, dc)
    store_u2(block, dc)
    limit = limits[1] if is_chroma else limits[0]
    if abs(dc) > limit or position > end:
        return -1, bits, position, place, block, table, shift, at, last, end
    table = tables + (huffman.AC_OFFSETS[1] if is_chroma else huffman.AC_OFFSETS[0])
    shift = np.uint64(64 - huffman.AC_BITS[1]) if is_chroma else np.uint64(64 - huffman.AC_BITS[0])
    return 0, bits, position, np.int64(0), block, table, shift, at, last, end


@kernel
def _decode_segments(data, scratch, tables, limits):
    """Decode all segments of the queue, two at a time. Return whether all are as an encoder writes them."""
    context = data, scratch, tables, limits
    none, nothing = np.int64(0), np.uint64(0)
    # A stream begins as if it had just finished a segment.
    a = _end_block(context, 0, none, nothing, none, none, none, none, nothing, none, none, none)
    a_status, a_bits, a_position, a_place, a_block, a_table, a_shift, a_at, a_last, a_end = a
    b = _end_block(context, 1, none, nothing, none, none, none, none, nothing, none, none, none)
    b_status, b_bits, b_position, b_place, b_block, b_table, b_shift, b_at, b_last, b_end = b
    if min(a_status, b_status) < 0:
        return False
    num_ended = a_status + b_status
    while num_ended < 2:
        a_bits, b_bits = _peek(data, a_position), _peek(data, b_position)
        for _ in range(_LOOK_UPS_PER_TURN):
            entry, a_bits, a_position, a_place = _look_up(a_bits, a_position, a_place, a_block, a_table, a_shift)
            if a_place >= _LAST:
                a = _end_block(
                    context, 0, entry, a_bits, a_position, a_place, a_block, a_table, a_shift, a_at, a_last, a_end
                )
                a_status, a_bits, a_position, a_place, a_block, a_table, a_shift, a_at, a_last, a_end = a
                if a_status < 0:
                    return False
                num_ended += a_status
            entry, b_bits, b_position, b_place = _look_up(b_bits, b_position, b_place, b_block, b_table, b_shift)
            if b_place >= _LAST:
                b = _end_block(
                    context, 1, entry, b_bits, b_position, b_place, b_block, b_table, b_shift, b_at, b_last, b_end
                )
                b_status, b_bits, b_position, b_place, b_block, b_table, b_shift, b_at, b_last, b_end = b
                if b_status < 0:
                    return False
                num_ended += b_status
    return True


@kernel
def _unstuff(source, stop, end, target):
    """Copy entropy-coded bytes without stuffed zeros, up to a marker.

    The marker must begin at or before the address `stop`. No byte from `end` on is read. Up to 32 bytes behind the copy
    are overwritten. Return the addresses of the marker, 0 if there is none, and of the end of the copy.
    """
    while source <= stop:
        if source + 33 <= end:
            count: Any = copy_until_ff(source, target)
            source += count
            target += count
            if count == 32:
                continue
            if source > stop:
                break
        elif load_u1(source) != 0xFF:
            store_u1(target, np.int64(load_u1(source)))
            source += 1
            target += 1
            continue
        if load_u1(source + 1) != 0:
            return source, target
        store_u1(target, 0xFF)
        source += 2
        target += 1
    return 0, target


@kernel
def _read_u2(data, offset):
    return np.int64(load_u1(data + offset)) << 8 | np.int64(load_u1(data + offset + 1))


@kernel
def _read_u4(data, offset):
    return _read_u2(data, offset) << 16 | _read_u2(data, offset + 2)


@kernel
def _matches(data, position, expected):
    for i in range(len(expected)):
        if load_u1(data + position + i) != expected[i]:
            return False
    return True


@kernel
def _read_header(data, start, limit, has_interval):
    """Find the parts of a header in which only sizes and tables differ from what our writer and libjpeg write.

    Nothing is read at or behind the offset `limit`. Return the offset of the first quantisation table, 0 if the header
    is another one, the offset and size of the Huffman tables, and the offset of the scan.
    """
    tables = start + len(_BEFORE_TABLES)
    frame = tables + 2 * (len(_TABLE) + 65)
    if frame + len(_FRAME) + 4 + len(_COMPONENTS) > limit or not _matches(data, start, _BEFORE_TABLES):
        return 0, 0, 0, 0
    for number in range(2):
        at = tables + number * (len(_TABLE) + 65)
        if not _matches(data, at, _TABLE) or load_u1(data + at + len(_TABLE)) != number:
            return 0, 0, 0, 0
    if not _matches(data, frame, _FRAME) or not _matches(data, frame + len(_FRAME) + 4, _COMPONENTS):
        return 0, 0, 0, 0
    huffman_start = at = frame + len(_FRAME) + 4 + len(_COMPONENTS)
    for number in range(4):
        if at + 5 > limit or _read_u2(data, at) != 0xFFC4 or load_u1(data + at + 4) != _CODES_NAMES[number]:
            return 0, 0, 0, 0
        size_bytes = _read_u2(data, at + 2)
        if not 19 < size_bytes <= 19 + 256:
            return 0, 0, 0, 0
        at += 2 + size_bytes
    num_bytes = at - huffman_start
    if has_interval:
        if at + 6 > limit or _read_u2(data, at) != 0xFFDD or _read_u2(data, at + 2) != 4:
            return 0, 0, 0, 0
        at += 6
    if at + len(_SCAN) > limit or not _matches(data, at, _SCAN):
        return 0, 0, 0, 0
    return tables + len(_TABLE) + 1, huffman_start, num_bytes, at + len(_SCAN)


@kernel
def _find_set(scratch, segments, num_bytes):
    """Return the address of the set of Huffman tables, 0 if the tables are not as an encoder writes them.

    Sets are kept. A new set takes the place of the last one that has been used for one image only.
    """
    sets, probation = scratch + _AT.sets, scratch + _AT.state + _PROBATION
    number = load_i8(probation)
    for other in range(huffman.NUM_SETS):
        if huffman.has_key(sets + other * huffman.SET_BYTES, segments, num_bytes):
            if other == number:
                store_i8(probation, (number + 1) % huffman.NUM_SETS)
            return sets + other * huffman.SET_BYTES
    built = sets + number * huffman.SET_BYTES
    return built if huffman.build_set(segments, built, scratch + _AT.pyramid) else 0


@kernel
def _queue_segment(scratch, number, first_mcu, num_mcus, start, end):
    """Describe a segment: its MCUs, and its first and last + 1 bit in the unstuffed data."""
    segment = scratch + _AT.segments + 32 * number
    first_block = scratch + _AT.blocks + 8 * _BLOCKS_PER_MCU * first_mcu
    store_i8(segment, first_block)
    store_i8(segment + 8, first_block + 8 * (_BLOCKS_PER_MCU * num_mcus - 1))
    store_i8(segment + 16, start)
    store_i8(segment + 24, end)


@kernel
def _queue_blocks(scratch, mcu, lane):
    """Describe the blocks of an MCU: where its coefficients go, or -1 as `lane` if nothing needs them."""
    luma = chroma = scratch + _AT.dump
    if lane >= 0:
        luma = scratch + _AT.luma + lane // _LUMA_MCUS * _GROUP_BYTES + lane % _LUMA_MCUS * 4
        chroma = scratch + _AT.chroma + lane // _CHROMA_MCUS * _GROUP_BYTES + lane % _CHROMA_MCUS * 2
    blocks = scratch + _AT.blocks + 8 * _BLOCKS_PER_MCU * mcu
    store_i8(blocks, luma)
    store_i8(blocks + 8, luma + 2)
    store_i8(blocks + 16, luma + LANES)
    store_i8(blocks + 24, luma + LANES + 2)
    store_i8(blocks + 32, chroma | 1 << _COMPONENT_SHIFT)
    store_i8(blocks + 40, (chroma + LANES) | 2 << _COMPONENT_SHIFT)


@kernel
def _queue_row(data, size_bytes, layout, row, segments, mcus, scratch, target, stop, queue):
    """Put the segments of a row of MCUs that lie under the crop into the queue.

    Parameters
    ----------
    data, size_bytes, layout : int, int, Layout
        The JPEG: address, size and layout.
    row : int
        The row.
    segments, mcus : tuple of two int
        First and last + 1 of the segments, and of the MCUs under the crop.
    scratch : int
        Address of the scratch.
    target, stop : int
        Addresses for the unstuffed bytes: of the next, and of the end of the memory.
    queue : tuple of four int
        Address of the unstuffed bytes. The numbers of segments, of MCUs, and of MCUs under the crop.

    Returns
    -------
    target : int
        Address of the next unstuffed byte; 0 if a row or a marker is not at its expected offset.
    queue : tuple of four int
    """
    first_byte, num_segments, num_mcus, num_lanes = queue
    segments_per_row = -(-layout.width // (_MCU_PX * layout.interval))
    position, row_stop = _read_u4(data, _ROWS_OFFSET + 4 * row), _read_u4(data, _ROWS_OFFSET + 4 * row + 4)
    if not layout.scan <= position <= row_stop or row_stop + 2 > size_bytes or (row == 0) != (position == layout.scan):
        return 0, queue
    if row > 0 and _read_u2(data, position - 2) != 0xFFD0 + (row * segments_per_row - 1) % 8:
        return 0, queue
    if target + (row_stop - position) > stop:
        return 0, queue
    for number in range(segments[1]):
        marker, copied = _unstuff(data + position, data + row_stop, data + size_bytes, target)
        is_last = row * _MCU_PX + _MCU_PX >= layout.height and number + 1 == segments_per_row
        if marker == 0 or load_u1(marker + 1) != (0xD9 if is_last else 0xD0 + (row * segments_per_row + number) % 8):
            return 0, queue
        position = marker + 2 - data
        if number < segments[0]:
            continue
        _queue_segment(
            scratch, num_segments, num_mcus, layout.interval, 8 * (target - first_byte), 8 * (copied - first_byte)
        )
        num_segments += 1
        target = copied
        for mcu in range(number * layout.interval, (number + 1) * layout.interval):
            is_inside = mcus[0] <= mcu < mcus[1]
            _queue_blocks(scratch, num_mcus, num_lanes if is_inside else -1)
            num_mcus += 1
            num_lanes += is_inside
    return target, (first_byte, num_segments, num_mcus, num_lanes)


@kernel
def _transform_chunk(scratch, num_lanes, mcus_per_row, block_px, y, cb, cr):
    """Transform the blocks of a chunk into planes, given the addresses of its first rows. Return if one is odd."""
    places, work = scratch + _AT.places, scratch + _AT.work
    divisors = scratch + _AT.quantisation
    y_stride, c_stride = 2 * block_px * mcus_per_row, block_px * mcus_per_row
    beyond = np.int64(0)
    for lane in range(-(-num_lanes // _CHROMA_MCUS) * _CHROMA_MCUS):
        row, column = divmod(min(lane, num_lanes - 1), mcus_per_row)
        store_i8(places + 8 * lane, y + 2 * block_px * (row * y_stride + column))
    for group in range(-(-num_lanes // _LUMA_MCUS)):
        beyond |= _transform_columns(scratch + _AT.luma + group * _GROUP_BYTES, divisors, work, block_px)
        for i in range(block_px):
            at = places + 8 * _LUMA_MCUS * group
            beyond |= _transform_luma_row(work + 8 * ROW_BYTES * i, at, i * y_stride, block_px * y_stride, block_px)
    for lane in range(-(-num_lanes // _CHROMA_MCUS) * _CHROMA_MCUS):
        row, column = divmod(min(lane, num_lanes - 1), mcus_per_row)
        store_i8(places + 8 * lane, cb + block_px * (row * c_stride + column))
    for group in range(-(-num_lanes // _CHROMA_MCUS)):
        beyond |= _transform_columns(scratch + _AT.chroma + group * _GROUP_BYTES, divisors + 64, work, block_px)
        for i in range(block_px):
            at = places + 8 * _CHROMA_MCUS * group
            beyond |= _transform_chroma_row(work + 8 * ROW_BYTES * i, at, i * c_stride, cr - cb, block_px)
    return beyond != 0


@kernel
def _transform_columns(group, divisors, work, block_px):
    if block_px == 8:
        return transform_columns(group, divisors, work, 8)
    if block_px == 4:
        return transform_columns(group, divisors, work, 4)
    if block_px == 2:
        return transform_columns(group, divisors, work, 2)
    return transform_columns(group, divisors, work, 1)


@kernel
def _transform_luma_row(work, places, offset, below, block_px):
    if block_px == 8:
        return transform_luma_row(work, places, offset, below, 8)
    if block_px == 4:
        return transform_luma_row(work, places, offset, below, 4)
    if block_px == 2:
        return transform_luma_row(work, places, offset, below, 2)
    return transform_luma_row(work, places, offset, below, 1)


@kernel
def _transform_chroma_row(work, places, offset, below, block_px):
    if block_px == 8:
        return transform_chroma_row(work, places, offset, below, 8)
    if block_px == 4:
        return transform_chroma_row(work, places, offset, below, 4)
    if block_px == 2:
        return transform_chroma_row(work, places, offset, below, 2)
    return transform_chroma_row(work, places, offset, below, 1)


@kernel
def _prepare_tables(data, found, scratch):
    """Return the address of the set of Huffman tables, 0 if a table is odd, and the largest DC of luma and chroma."""
    quantisation, codes, codes_bytes, _ = found
    if quantisation == 0:
        return 0, (0, 0)
    second = quantisation + len(_TABLE) + 65
    divisors = np.int64(load_u1(data + quantisation)), np.int64(load_u1(data + second))
    if min(divisors) == 0:
        return 0, (0, 0)
    for i in range(64):
        store_u1(scratch + _AT.quantisation + i, np.int64(load_u1(data + quantisation + i)))
        store_u1(scratch + _AT.quantisation + 64 + i, np.int64(load_u1(data + second + i)))
    tables = _find_set(scratch, data + codes, codes_bytes)
    return tables, (MAX_COEFFICIENT // divisors[0], MAX_COEFFICIENT // divisors[1])


@kernel
def _finish_chunk(tables, limits, scratch, unstuffed, num_segments, num_lanes, mcus_per_row, block_px, y, cb, cr):
    """Decode and transform what is in the queue. Return False if anything is odd."""
    store_i8(scratch + _AT.state + _NEXT_SEGMENT, 0)
    store_i8(scratch + _AT.state + _NUM_SEGMENTS, num_segments)
    is_sound = _decode_segments(unstuffed, scratch, tables, limits)
    if is_sound and not _transform_chunk(scratch, num_lanes, mcus_per_row, block_px, y, cb, cr):
        return True
    for i in range(0, _AT.dump, 8):
        store_i8(scratch + i, 0)
    return False


@kernel
def decode_plain_region_into(data, size, window, block_px, unstuffed, scratch, planes):
    """Decode the MCUs under a window of a JPEG that libjpeg wrote at its defaults, as FFCV's writer does.

    The whole scan is decoded, so that damage is found, but only the MCUs under the window are transformed. For the
    parameters and the result, see `decode_region_into`. `size` is height and width in px that the JPEG must have.
    """
    data, size_bytes = data
    if size_bytes < 4 or _read_u2(data, 0) != 0xFFD8:
        return False
    found = _read_header(data, 2, size_bytes, False)
    frame = found[0] + len(_TABLE) + 2 * 65 - 1 + len(_FRAME)
    if found[0] == 0 or _read_u2(data, frame) != size[0] or _read_u2(data, frame + 2) != size[1]:
        return False
    y, x, h, w = window
    rows = y // _MCU_PX, -(-(y + h) // _MCU_PX)
    columns = x // _MCU_PX, -(-(x + w) // _MCU_PX)
    num_rows, num_columns = -(-size[0] // _MCU_PX), -(-size[1] // _MCU_PX)
    num_px = 4 * block_px * block_px * (rows[1] - rows[0]) * (columns[1] - columns[0])
    if num_rows * num_columns > _MAX_DECODED_MCUS or 3 * num_px // 2 > planes[1]:
        return False
    if size_bytes + SLACK_BYTES > unstuffed[1]:
        return False
    tables, limits = _prepare_tables(data, found, scratch)
    if tables == 0:
        return False
    marker, end = _unstuff(data + found[3], data + size_bytes - 2, data + size_bytes, unstuffed[0])
    if marker == 0 or load_u1(marker + 1) != 0xD9:
        return False
    num_lanes = 0
    for row in range(num_rows):
        for column in range(num_columns):
            is_inside = rows[0] <= row < rows[1] and columns[0] <= column < columns[1]
            _queue_blocks(scratch, row * num_columns + column, num_lanes if is_inside else -1)
            num_lanes += is_inside
    _queue_segment(scratch, 0, 0, num_rows * num_columns, 0, 8 * (end - unstuffed[0]))
    y, cb, cr = planes[0], planes[0] + num_px, planes[0] + num_px + num_px // 4
    mcus_per_row = columns[1] - columns[0]
    return _finish_chunk(tables, limits, scratch, unstuffed[0], 1, num_lanes, mcus_per_row, block_px, y, cb, cr)


@kernel
def decode_region_into(data, layout, window, block_px, unstuffed, scratch, planes):
    """Decode the MCUs under a window, if the JPEG is sound and made as our writer makes it.

    Parameters
    ----------
    data : tuple of two int
        A JPEG: address and size in bytes.
    layout : Layout
        The layout, from `ffcv_ops.codec.region.read_layout`.
    window : tuple of four int
        (y, x, h, w) in px, within the image.
    block_px : int
        The side in px that a block has in the planes: 8, 4, 2 or 1. Smaller blocks are a decode at a reduced scale.
    unstuffed : tuple of two int
        Scratch: address and size in bytes, at least that of the JPEG and `SLACK_BYTES`.
    scratch : int
        Address of `SCRATCH_BYTES`, all zeros at first, that are kept from image to image.
    planes : tuple of two int
        The output: address and size in bytes. Y, Cb and Cr of the MCUs are written one after the other.

    Returns
    -------
    bool
        False if the JPEG is odd in any respect. Then the planes are without meaning.
    """
    y, x, h, w = window
    first_row, last_row = y // _MCU_PX, -(-(y + h) // _MCU_PX)
    mcus = x // _MCU_PX, -(-(x + w) // _MCU_PX)
    segments = mcus[0] // layout.interval, -(-mcus[1] // layout.interval)
    num_rows, mcus_per_row = last_row - first_row, mcus[1] - mcus[0]
    decoded_per_row = (segments[1] - segments[0]) * layout.interval
    num_px = 4 * block_px * block_px * num_rows * mcus_per_row
    if mcus_per_row > _MAX_ROW_MCUS or decoded_per_row > _MAX_DECODED_MCUS or 3 * num_px // 2 > planes[1]:
        return False
    data, size_bytes = data
    header = 4 + _read_u2(data, 4)
    if not header < layout.scan <= size_bytes:
        return False
    found = _read_header(data, header, layout.scan, True)
    tables, limits = _prepare_tables(data, found, scratch)
    if tables == 0 or found[3] != layout.scan:
        return False
    first_byte, stop, at = unstuffed[0], unstuffed[0] + unstuffed[1] - SLACK_BYTES, planes[0]
    rows_per_chunk = max(min(_CHUNK_MCUS // mcus_per_row, _MAX_DECODED_MCUS // decoded_per_row), 1)
    for chunk in range(first_row, last_row, rows_per_chunk):
        queue = first_byte, np.int64(0), np.int64(0), np.int64(0)
        target = first_byte
        for row in range(chunk, min(chunk + rows_per_chunk, last_row)):
            target, queue = _queue_row(data, size_bytes, layout, row, segments, mcus, scratch, target, stop, queue)
            if target == 0:
                return False
        done = 4 * block_px * block_px * (chunk - first_row) * mcus_per_row
        y, cb, cr = at + done, at + num_px + done // 4, at + num_px + num_px // 4 + done // 4
        if not _finish_chunk(
            tables, limits, scratch, first_byte, queue[1], queue[3], mcus_per_row, block_px, y, cb, cr
        ):
            return False
    return True
