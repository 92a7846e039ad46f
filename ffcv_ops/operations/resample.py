"""Antialiased resampling of a crop, in Numba, with the arithmetic of Pillow.

An output pixel is the weighted mean of source pixels under a filter. The filter is a triangle, or the cubic of Keys
with a = -0.5, and it is stretched by the downscale factor. The axes are resampled one after the other. As in
``Resample.c`` of Pillow, both passes use 22 bit fixed point, and the result of the first pass is rounded to 8 bits. A
crop that is resampled here equals ``Image.crop(region).resize(...)`` of Pillow 13 to the bit. Earlier versions of
Pillow always begin with the x axis. If this module begins with the y axis, the results differ from theirs: by one grey
level for bilinear, and by more for bicubic, because its overshoot is clipped between the passes.

A crop ``(y, x, height, width)`` is in px of the plane. It may be fractional, as the crops of subsampled chroma are.
Weights stay within the pixels that the crop touches, so that no pixel beyond the crop has an effect.
``resize(box=...)`` of Pillow uses pixels of the whole image instead. If the crop is the whole image, the two agree.

Where Numba compiles for AVX2, `resample_avx2` weighs and converts the pixels. It has functions for the usual sizes and
scales. The plain loops here serve everything else, with the same bytes. For them, pixels along x are a problem. They
lie side by side in memory, and vector instructions cannot weigh them there. Therefore stripes of rows are transposed
tile by tile, weighed as the pass along y weighs rows, and transposed back.
"""

import math
from collections import namedtuple
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload, register_jitable

from ffcv_ops._kernels import HAS_AVX2, kernel
from ffcv_ops.codec.memory import address
from ffcv_ops.operations import resample_avx2

BILINEAR = 0
BICUBIC = 1
INTERPOLATIONS = {"bilinear": BILINEAR, "bicubic": BICUBIC}

PRECISION_BITS = 22
TILE_PX = 16
ALIGNMENT_BYTES = 64
TOLERANCE_PX = 1e-6
"""A crop does not touch a pixel that it covers by less than this, in px. Crops are scaled, which rounds them."""

MAX_STRIPE_PX = 160
"""Rows that are transposed and weighed together. More rows leave the cache. Fewer rows pay more for starting loops."""

AxisTaps = namedtuple("AxisTaps", "firsts counts weights num_pairs")
"""For each output position of an axis: its first source position in the crop, and the number of positions. Weight k of
position i is at ``k * len(firsts) + i``. There are at most `num_pairs` pairs of weights."""

Scratch = namedtuple("Scratch", "columns weighed sums between")
"""Arrays: a transposed stripe, the weighed stripe, the sums of a row, the image between the two passes."""

ResampleTaps = namedtuple("ResampleTaps", "num_rows num_columns x_taps y_taps num_parts scratch")
"""The taps of both axes, with the size of the crop and the scratch: for planes of one size and one crop."""

_OPTIONS: dict[str, Any] = {"boundscheck": False, "error_model": "numpy"}


@register_jitable
def _rounded_up(size, multiple):
    return (size + multiple - 1) // multiple * multiple


@register_jitable
def _first_touched(start):
    return int(math.floor(start + TOLERANCE_PX))


@register_jitable
def _num_touched(start, extent):
    return int(math.ceil(start + extent - TOLERANCE_PX)) - _first_touched(start)


@register_jitable
def _support(extent, size, interpolation):
    return (1.0 if interpolation == BILINEAR else 2.0) * max(extent / size, 1.0)


@register_jitable
def _weights_stride(extent, size, interpolation):
    """Return the number of weights of one output position, padded because they are read four at a time."""
    return _rounded_up(2 * int(math.ceil(_support(extent, size, interpolation))) + 1, 4)


@register_jitable
def _taps_entries(extent, size, interpolation):
    return size * (2 + _weights_stride(extent, size, interpolation))


def workspace_bytes(max_height: int, max_width: int, size: int) -> int:
    """Return the size of a workspace that is large enough for every crop up to a given size.

    Parameters
    ----------
    max_height, max_width : int
        Sides of the largest crop, in px of the largest plane.
    size : int
        Largest side of the output in px.

    Returns
    -------
    int
        Bytes of the uint8 array that the kernels take as ``workspace``, for both interpolations.
    """
    height, width = max_height + 2, max_width + 2  # a fractional crop touches up to two more
    longest = max(height, width, size)
    taps = 4 * (4 * (height + width) + 2 * 10 * size)  # an upper bound of _taps_entries, also for smaller outputs
    scratch = 8 * (4 * longest + 10 * size)  # an upper bound of what _build_axis_taps needs
    stripe = (MAX_STRIPE_PX + TILE_PX) * (width + size)
    planes = 3 * (height * width + size * size)
    num_pieces = 16
    return (
        taps
        + scratch
        + 8 * (longest + MAX_STRIPE_PX + TILE_PX)
        + stripe
        + longest * size
        + planes
        + num_pieces * ALIGNMENT_BYTES
    )


@register_jitable
def _is_within(crop, shape):
    y, x, height, width = crop
    bottom, right = _first_touched(y) + _num_touched(y, height), _first_touched(x) + _num_touched(x, width)
    return min(height, width) > 0 and min(y, x) > -TOLERANCE_PX and bottom <= shape[0] and right <= shape[1]


@kernel(**_OPTIONS)
def _take_piece(workspace, num_bytes):
    """Return a piece of the workspace, and the rest of the workspace."""
    if num_bytes > workspace.size:
        raise ValueError("the workspace is too small for this region: size it with workspace_bytes()")
    return workspace[:num_bytes], workspace[_rounded_up(num_bytes, ALIGNMENT_BYTES) :]


@kernel(**_OPTIONS)
def _filter(x, interpolation):
    x = abs(x)
    if interpolation == BILINEAR:
        return max(1.0 - x, 0.0)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return near if x < 1.0 else (far if x < 2.0 else 0.0)


@kernel(**_OPTIONS)
def _find_sources_into(start, extent, support, flip, firsts, counts, centers):
    """Write the sources of each output. Return the largest number."""
    scale = extent / firsts.size
    offset, length = start - _first_touched(start), np.int32(_num_touched(start, extent))
    for i in range(np.uint64(firsts.size)):
        centers[i] = offset + (np.float64(np.int32(firsts.size - 1 - i if flip else i)) + 0.5) * scale
    for i in range(np.uint64(firsts.size)):
        firsts[i] = max(np.int32(centers[i] - support + 0.5), np.int32(0))
        counts[i] = min(np.int32(centers[i] + support + 0.5), length) - firsts[i]
    return counts.max()


@kernel(forceinline=True, **_OPTIONS)
def _evaluate_filter_into(firsts, counts, number, centers, shrink, interpolation, values, totals):
    for i in range(np.uint64(firsts.size)):
        value = _filter((np.float64(np.add(firsts[i], number)) - centers[i] + 0.5) * shrink, interpolation)
        values[i] = value if number < counts[i] else 0.0
        totals[i] += values[i]


@kernel(**_OPTIONS)
def _round_weights_into(values, units, weights):
    for i in range(np.uint64(units.size)):
        weight = values[i] * units[i]
        weights[i] = np.int32(weight + (0.5 if weight >= 0.0 else -0.5))


@kernel(**_OPTIONS)
def _compute_axis_taps_into(start, extent, interpolation, flip, axis, scratch):
    """Compute the coefficients of Pillow for one axis, for all outputs side by side. Return the number of pairs."""
    firsts, counts, weights = axis
    size = firsts.size
    shrink = 1.0 / max(extent / size, 1.0)
    centers, totals, values = scratch[:size], scratch[size : 2 * size], scratch[2 * size :]
    longest = _find_sources_into(start, extent, _support(extent, size, interpolation), flip, firsts, counts, centers)
    num_pairs = (longest + 1) // 2
    for i in range(size):
        totals[i] = 0.0
    for k in range(2 * num_pairs):
        row = values[k * size : (k + 1) * size]
        if interpolation == BILINEAR:
            _evaluate_filter_into(firsts, counts, np.int32(k), centers, shrink, BILINEAR, row, totals)
        else:
            _evaluate_filter_into(firsts, counts, np.int32(k), centers, shrink, BICUBIC, row, totals)
    for i in range(size):
        totals[i] = (1 << PRECISION_BITS) / totals[i]
    for k in range(2 * num_pairs):
        row = values[k * size : (k + 1) * size]
        _round_weights_into(row, totals, weights[k * size : (k + 1) * size])
    return num_pairs


@kernel(**_OPTIONS)
def _build_axis_taps(workspace, start, extent, size, interpolation, flip):
    stride = _weights_stride(extent, size, interpolation)
    piece, workspace = _take_piece(workspace, 4 * _taps_entries(extent, size, interpolation))
    entries = piece.view(np.int32)
    firsts, counts, weights = entries[:size], entries[size : 2 * size], entries[2 * size :]
    scratch = _take_piece(workspace, 8 * size * (2 + stride))[0].view(np.float64)
    num_pairs = _compute_axis_taps_into(start, extent, interpolation, flip, (firsts, counts, weights), scratch)
    return AxisTaps(firsts, counts, weights, num_pairs), workspace


# ---------------------------------------------------------------------------------------------------------------------
# With AVX2


@kernel(**_OPTIONS)
def _count_parts(taps, num_columns):
    """Return the argument `num_parts` of `resample_avx2.weigh_columns`; 0 if the plain loops have to serve."""
    firsts, group, spread = taps.firsts, resample_avx2.GROUP, resample_avx2.WINDOW_SPREAD
    if not HAS_AVX2 or min(num_columns, firsts.size) < resample_avx2.MIN_LENGTH:
        return 0
    if taps.num_pairs > resample_avx2.MAX_PAIRS:
        return 0
    num_parts = 1
    for number in range(0, firsts.size, group):
        start = min(number, firsts.size - group)
        for i in range(start, start + group, 8):
            if abs(firsts[i + 7] - firsts[i]) > spread:
                num_parts = 2
                if max(abs(firsts[i + 3] - firsts[i]), abs(firsts[i + 7] - firsts[i + 4])) > spread:
                    return 0
    return num_parts if num_parts == 1 or taps.num_pairs == resample_avx2.SPREAD_PAIRS else 0


# ---------------------------------------------------------------------------------------------------------------------
# Without AVX2, and for small sizes


def _transpose_tile_into(source, at, stride, out, out_at, out_stride):
    """Transpose TILE_PX x TILE_PX bytes from one flat array into another."""
    for row in range(TILE_PX):
        for column in range(TILE_PX):
            out[out_at + column * out_stride + row] = source[at + row * stride + column]


@intrinsic
def _shuffle_tile_into(typing_context, source, at, stride, out, out_at, out_stride):
    """Transpose a tile within sixteen vector registers. LLVM does not find this from loops.

    To transpose sixteen rows of sixteen bytes, the first half of the rows is interleaved with the second, four times.
    """
    vector = ir.VectorType(ir.IntType(8), TILE_PX)
    lanes = ir.VectorType(ir.IntType(32), TILE_PX)
    interleave = [
        ir.Constant(lanes, [half + i // 2 + TILE_PX * (i % 2) for i in range(TILE_PX)]) for half in (0, TILE_PX // 2)
    ]

    def generate(context, builder, signature, args):
        source_value, at_value, stride_value, out_value, out_at_value, out_stride_value = args

        def row_pointer(array_type, array, at, stride, row):
            data = context.make_array(array_type)(context, builder, array).data
            offset = builder.add(at, builder.mul(stride, ir.Constant(stride.type, row)))
            return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())

        inputs = [row_pointer(source, source_value, at_value, stride_value, row) for row in range(TILE_PX)]
        outputs = [row_pointer(out, out_value, out_at_value, out_stride_value, row) for row in range(TILE_PX)]
        rows = [builder.load(pointer, align=1) for pointer in inputs]
        for _ in range(4):
            pairs = zip(rows[: TILE_PX // 2], rows[TILE_PX // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, order) for pair in pairs for order in interleave]
        for row, pointer in zip(rows, outputs, strict=True):
            builder.store(row, pointer, align=1)
        return context.get_dummy_value()

    return nb.void(source, at, stride, out, out_at, out_stride), generate


@overload(_transpose_tile_into)
def _overload_transpose_tile_into(source, at, stride, out, out_at, out_stride):
    def transpose(source, at, stride, out, out_at, out_stride):
        _shuffle_tile_into(source, at, stride, out, out_at, out_stride)  # type: ignore[call-arg]

    return transpose


@kernel(**_OPTIONS)
def _transpose_into(source, stride, height, width, out, out_stride):
    """Transpose (height, width) bytes. The last tiles overlap their neighbours, so that no byte beyond is touched."""
    if height < TILE_PX or width < TILE_PX:
        for row in range(height):
            for column in range(width):
                out[column * out_stride + row] = source[row * stride + column]
        return
    for tile_row in range(0, height, TILE_PX):
        row = min(tile_row, height - TILE_PX)
        for tile_column in range(0, width, TILE_PX):
            column = min(tile_column, width - TILE_PX)
            _transpose_tile_into(source, row * stride + column, stride, out, column * out_stride + row, out_stride)


@kernel(**_OPTIONS)
def _multiply(byte, weight):
    # ``*`` of Numba widens operands of 32 bits to 64, which halves the lanes of a vector. The ufunc keeps their type.
    return np.multiply(np.int32(byte), weight)


@kernel(**_OPTIONS)
def _round_to_byte(total):
    value = np.right_shift(np.int32(total), np.int32(PRECISION_BITS))
    return np.uint8(min(max(value, np.int32(0)), np.int32(255)))


@kernel(forceinline=True, **_OPTIONS)
def _weigh_rows_into(source, at, stride, taps, position, sums, out, out_at, length):
    """Weigh `count` rows of bytes, `stride` apart, into one row, four at a time. Most sums then stay in registers.

    The first half of `sums` holds 0.5 in fixed point, for rounding. The second half holds the sum of all but the last
    four rows. The arguments are offsets, because views of rows would be counted by atomic instructions, which take as
    long as a row. Offsets are unsigned, because a test for negative indices would prevent vector code.
    """
    a, stride, target, length = np.uint64(at), np.uint64(stride), np.uint64(out_at), np.uint64(length)
    count, weights, size, tap = taps.counts[position], taps.weights, taps.firsts.size, position
    b, c, d = a + stride, a + stride + stride, a + stride + stride + stride
    carried = np.uint64(0)
    if count > 4:
        carried = np.uint64(sums.size // 2)
        for i in range(length):
            sums[carried + i] = sums[i]
    while count > 4:
        w0, w1, w2, w3 = weights[tap], weights[tap + size], weights[tap + 2 * size], weights[tap + 3 * size]
        for i in range(length):
            total = _multiply(source[a + i], w0) + _multiply(source[b + i], w1)
            sums[carried + i] += total + _multiply(source[c + i], w2) + _multiply(source[d + i], w3)
        a = d + stride
        b, c, d = a + stride, a + stride + stride, a + stride + stride + stride
        tap += 4 * size
        count -= 4
    w0, w1, w2, w3 = weights[tap], weights[tap + size], weights[tap + 2 * size], weights[tap + 3 * size]
    if count == 1:
        for i in range(length):
            out[target + i] = _round_to_byte(sums[carried + i] + _multiply(source[a + i], w0))
    elif count == 2:
        for i in range(length):
            out[target + i] = _round_to_byte(
                sums[carried + i] + _multiply(source[a + i], w0) + _multiply(source[b + i], w1)
            )
    elif count == 3:
        for i in range(length):
            total = sums[carried + i] + _multiply(source[a + i], w0) + _multiply(source[b + i], w1)
            out[target + i] = _round_to_byte(total + _multiply(source[c + i], w2))
    else:
        for i in range(length):
            total = sums[carried + i] + _multiply(source[a + i], w0) + _multiply(source[b + i], w1)
            out[target + i] = _round_to_byte(total + _multiply(source[c + i], w2) + _multiply(source[d + i], w3))


@kernel(**_OPTIONS)
def _weigh_along_y_into(source, stride, width, taps, out):
    firsts, counts, weights, _ = taps.y_taps
    if HAS_AVX2 and taps.num_parts > 0:
        axis = address(firsts), address(counts), address(weights)
        resample_avx2.weigh_rows(address(source), stride, axis[0], axis[1], axis[2], firsts.size, width, address(out))
        return
    for y in range(firsts.size):
        _weigh_rows_into(source, firsts[y] * stride, stride, taps.y_taps, y, taps.scratch.sums, out, y * width, width)


@register_jitable
def _stripe_height(height):
    num_stripes = (height + MAX_STRIPE_PX - 1) // MAX_STRIPE_PX
    return _rounded_up((height + num_stripes - 1) // num_stripes, TILE_PX)


@kernel(**_OPTIONS)
def _weigh_along_x_into(source, stride, height, taps, out):
    columns, weighed, sums, _ = taps.scratch
    firsts, _, weights, num_pairs = taps.x_taps
    size, width = firsts.size, taps.num_columns
    if HAS_AVX2 and taps.num_parts > 0:
        axis = address(firsts), address(weights)
        resample_avx2.weigh_columns(
            address(source), stride, height, width, axis[0], axis[1], size, num_pairs, taps.num_parts, address(out)
        )
        return
    lanes = _stripe_height(height)
    num_rows = min(height, lanes)
    for stripe in range(0, height, lanes):
        row = min(stripe, height - num_rows)  # the last stripe overlaps the one before, so that it is whole too
        _transpose_into(source[row * stride :], stride, num_rows, width, columns, lanes)
        for x in range(size):
            _weigh_rows_into(columns, firsts[x] * lanes, lanes, taps.x_taps, x, sums, weighed, x * lanes, lanes)
        _transpose_into(weighed, lanes, size, num_rows, out[row * size :], size)


@kernel(**_OPTIONS)
def _build_taps(crop, shape, flip, interpolation, workspace):
    y, x, height, width = crop
    num_rows, num_columns = _num_touched(y, height), _num_touched(x, width)
    y_taps, workspace = _build_axis_taps(workspace, y, height, shape[0], interpolation, False)
    x_taps, workspace = _build_axis_taps(workspace, x, width, shape[1], interpolation, flip)
    num_parts = _count_parts(x_taps, num_columns) if y_taps.num_pairs <= resample_avx2.MAX_PAIRS else 0
    between, workspace = _take_piece(workspace, max(shape[0] * num_columns, num_rows * shape[1]))
    lanes = 0 if num_parts > 0 else max(_stripe_height(num_rows), _stripe_height(shape[0]))
    columns, workspace = _take_piece(workspace, lanes * num_columns)
    weighed, workspace = _take_piece(workspace, lanes * shape[1])
    longest = max(lanes, num_columns, shape[1])
    sums, workspace = _take_piece(workspace, 8 * longest)
    scratch = Scratch(columns, weighed, sums.view(np.int32), between)
    if num_parts == 0:
        scratch.sums[:longest] = 1 << (PRECISION_BITS - 1)
    return ResampleTaps(num_rows, num_columns, x_taps, y_taps, num_parts, scratch)


@kernel(**_OPTIONS)
def _resample_into(source, stride, taps, out):
    """Resample the crop whose first byte is the first of `source`. `out` is flat."""
    num_rows, num_columns, between = taps.num_rows, taps.num_columns, taps.scratch.between
    out_height, out_width = taps.y_taps.firsts.size, taps.x_taps.firsts.size
    # As Pillow since version 13: y comes first if it removes more than twice as many rows as x removes columns.
    if num_rows > out_height and num_rows - out_height > 2 * (num_columns - out_width):
        _weigh_along_y_into(source, stride, num_columns, taps, between)
        _weigh_along_x_into(between, num_columns, out_height, taps, out)
    else:
        _weigh_along_x_into(source, stride, num_rows, taps, between)
        _weigh_along_y_into(between, out_width, out_width, taps, out)


@kernel(**_OPTIONS)
def _skip_to_first_touched(plane, crop):
    assert _is_within(crop, plane.shape)
    return plane.reshape(-1)[_first_touched(crop[0]) * plane.shape[1] + _first_touched(crop[1]) :]


@kernel(**_OPTIONS)
def _split_channels_into(image, crop, red, green, blue):
    top, left, width = _first_touched(crop[0]), _first_touched(crop[1]), _num_touched(crop[1], crop[3])
    if HAS_AVX2 and width >= resample_avx2.MIN_LENGTH:
        at = address(image) + 3 * (top * image.shape[1] + left)
        for start in range(0, red.size, width):
            resample_avx2.split_channels(at, address(red) + start, address(green) + start, address(blue) + start, width)
            at += 3 * image.shape[1]
        return
    for row in range(red.size // width):
        pixels = image[top + row, left : left + width].reshape(-1)
        target = slice(row * width, (row + 1) * width)
        reds, greens, blues = red[target], green[target], blue[target]
        for x in range(width):
            reds[x] = pixels[3 * x]
            greens[x] = pixels[3 * x + 1]
            blues[x] = pixels[3 * x + 2]


@kernel(**_OPTIONS)
def _join_channels_into(red, green, blue, out):
    if HAS_AVX2 and red.size >= resample_avx2.MIN_LENGTH:
        resample_avx2.join_channels(address(red), address(green), address(blue), address(out), red.size)
        return
    pixels = out.reshape(-1)
    for i in range(red.size):
        pixels[3 * i] = red[i]
        pixels[3 * i + 1] = green[i]
        pixels[3 * i + 2] = blue[i]


@kernel(**_OPTIONS)
def _round_to_channel(total):
    return np.uint8(min(max(np.right_shift(np.int32(total), np.int32(16)), np.int32(0)), np.int32(255)))


@kernel(**_OPTIONS)
def _convert_colour_into(y, cb, cr, out):
    """Convert YCbCr to RGB as JPEG does (full-range BT.601), in the 16 bit fixed point of jdcolor.c in libjpeg."""
    if HAS_AVX2 and y.size >= resample_avx2.MIN_LENGTH:
        resample_avx2.convert_colour(address(y), address(cb), address(cr), address(out), y.size)
        return
    pixels = out.reshape(-1)
    for i in range(y.size):
        luma = _multiply(y[i], np.int32(65536)) + 32768
        blue, red = np.subtract(np.int32(cb[i]), np.int32(128)), np.subtract(np.int32(cr[i]), np.int32(128))
        pixels[3 * i] = _round_to_channel(luma + _multiply(red, np.int32(91881)))
        pixels[3 * i + 1] = _round_to_channel(luma - _multiply(blue, np.int32(22554)) - _multiply(red, np.int32(46802)))
        pixels[3 * i + 2] = _round_to_channel(luma + _multiply(blue, np.int32(116130)))


@kernel(**_OPTIONS)
def resample_planes_into(y, cb, cr, y_crop, c_crop, flip, interpolation, workspace, out):
    """Resample a crop of the planes of a JPEG and convert it to RGB.

    Luma and chroma are resampled from their own resolutions. Colour is converted for the pixels of the output only.

    Parameters
    ----------
    y, cb, cr : ndarray of uint8, shape (height, width), C-contiguous
        Luma and chroma planes. Both chroma planes have the same subsampling. For a gray image they have size 0.
    y_crop, c_crop : tuple of float
        The crop ``(y, x, height, width)`` in px of the luma plane and of the chroma planes, within the planes, with
        positive sides. ``c_crop`` is ignored for a gray image.
    flip : bool
        True to flip the output from left to right.
    interpolation : int
        ``BILINEAR`` or ``BICUBIC``.
    workspace : ndarray of uint8, shape (n,)
        Scratch of one thread; see `workspace_bytes`.
    out : ndarray of uint8, shape (out_height, out_width, 3), C-contiguous
        The output, RGB.
    """
    shape = out.shape[:2]
    y_plane, rest = _take_piece(workspace, shape[0] * shape[1])
    cb_plane, rest = _take_piece(rest, shape[0] * shape[1])
    cr_plane, rest = _take_piece(rest, shape[0] * shape[1])
    taps = _build_taps(y_crop, shape, flip, interpolation, rest)
    _resample_into(_skip_to_first_touched(y, y_crop), y.shape[1], taps, y_plane)
    if cb.size == 0:
        _join_channels_into(y_plane, y_plane, y_plane, out)
        return
    taps = _build_taps(c_crop, shape, flip, interpolation, rest)
    _resample_into(_skip_to_first_touched(cb, c_crop), cb.shape[1], taps, cb_plane)
    _resample_into(_skip_to_first_touched(cr, c_crop), cr.shape[1], taps, cr_plane)
    _convert_colour_into(y_plane, cb_plane, cr_plane, out)


@kernel(**_OPTIONS)
def resample_rgb_into(image, crop, flip, interpolation, workspace, out):
    """Resample a crop of an interleaved RGB image.

    Parameters
    ----------
    image : ndarray of uint8, shape (height, width, 3), C-contiguous
        Source.
    crop : tuple of float
        ``(y, x, height, width)`` in px, within the image, with positive sides.
    flip : bool
        True to flip the output from left to right.
    interpolation : int
        ``BILINEAR`` or ``BICUBIC``.
    workspace : ndarray of uint8, shape (n,)
        Scratch of one thread; see `workspace_bytes`.
    out : ndarray of uint8, shape (out_height, out_width, 3), C-contiguous
        The output.
    """
    assert _is_within(crop, image.shape)
    shape = out.shape[:2]
    size, out_size = _num_touched(crop[0], crop[2]) * _num_touched(crop[1], crop[3]), shape[0] * shape[1]
    region, rest = _take_piece(workspace, 3 * size)
    planes, rest = _take_piece(rest, 3 * out_size)
    taps = _build_taps(crop, shape, flip, interpolation, rest)
    _split_channels_into(image, crop, region[:size], region[size : 2 * size], region[2 * size :])
    for channel in range(3):
        target = planes[channel * out_size : (channel + 1) * out_size]
        _resample_into(region[channel * size :], taps.num_columns, taps, target)
    _join_channels_into(planes[:out_size], planes[out_size : 2 * out_size], planes[2 * out_size :], out)
