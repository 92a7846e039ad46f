"""Antialiased resampling of a region, in Numba, with Pillow's arithmetic.

An output pixel is the weighted mean of source pixels under a filter (a triangle, or Keys' cubic with a = -0.5) that is
stretched by the downscale factor, one axis after the other, both in 22 bit fixed point and rounded to 8 bits between
them, as Pillow's ``Resample.c`` has it. A region resampled here equals ``Image.crop(region).resize(...)`` of Pillow 13
to the bit. Earlier versions always begin with x; where this does not, they differ: by a grey level for bilinear, by
more for bicubic, whose overshoot is clipped between the passes.

A box ``(y, x, height, width)`` is in pixels of the plane and may be fractional, as the boxes of subsampled chroma are.
Weights stay within the pixels that the box touches: as "decode, crop, resize" has it, nothing beyond the crop is seen.
Pillow's ``resize(box=...)`` clamps to the image instead; for a box that is the whole image the two agree.

The pass along x is what costs, as its pixels lie side by side in memory, where vector instructions cannot weigh them.
Stripes of rows are therefore transposed tile by tile, weighed as the other pass weighs rows, and transposed back.
"""

import math
from collections import namedtuple
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload, register_jitable

from ffcv_ops._kernels import CAN_CACHE

BILINEAR = 0
BICUBIC = 1
INTERPOLATIONS = {"bilinear": BILINEAR, "bicubic": BICUBIC}

PRECISION_BITS = 22
TILE = 16
ALIGNMENT = 64
TOLERANCE = 1e-6
"""What a box may reach into a pixel, in pixels, without touching it: boxes are scaled, and rounded on the way."""

MAX_STRIPE = 160
"""Rows transposed and weighed together: enough to hide the cost of starting a loop, few enough to stay in cache."""

Taps = namedtuple("Taps", "firsts counts weights stride")
"""For each output position: its first source position from the box on, how many follow, and their weights, flat."""

Scratch = namedtuple("Scratch", "columns weighed sums between")
"""A transposed stripe, the same weighed, sums of a row, and the image between the two passes."""

Plan = namedtuple("Plan", "num_rows num_columns x_taps y_taps flip scratch")
"""What resampling planes of one size from one box takes."""

_KERNEL: dict[str, Any] = {"cache": CAN_CACHE, "nogil": True, "boundscheck": False, "error_model": "numpy"}


@register_jitable
def _rounded_up(size, multiple):
    return (size + multiple - 1) // multiple * multiple


@register_jitable
def _first_touched(start):
    return int(math.floor(start + TOLERANCE))


@register_jitable
def _num_touched(start, extent):
    return int(math.ceil(start + extent - TOLERANCE)) - _first_touched(start)


@register_jitable
def _support(extent, size, interpolation):
    return (1.0 if interpolation == BILINEAR else 2.0) * max(extent / size, 1.0)


@register_jitable
def _weights_stride(extent, size, interpolation):
    """Weights of one output position, padded, as they are read by fours."""
    return _rounded_up(2 * int(math.ceil(_support(extent, size, interpolation))) + 1, 4)


@register_jitable
def _taps_entries(extent, size, interpolation):
    return size * (2 + _weights_stride(extent, size, interpolation))


def workspace_bytes(max_height: int, max_width: int, size: int) -> int:
    """Size of a workspace that serves every region up to a given size.

    Parameters
    ----------
    max_height, max_width : int
        Largest box, in pixels of the largest plane.
    size : int
        Largest side of the output, in pixels.

    Returns
    -------
    int
        Bytes of the ``uint8`` array that the kernels take as ``workspace``, for either interpolation.
    """
    height, width = max_height + 2, max_width + 2  # what a fractional box touches
    longest = max(height, width, size)
    taps = 4 * (4 * (height + width) + 2 * 10 * size)  # above _taps_entries, which a smaller output may raise
    stripe = (MAX_STRIPE + TILE) * (width + size)
    planes = 3 * (height * width + size * size)
    num_pieces = 16
    return taps + 8 * (longest + MAX_STRIPE + TILE) + stripe + longest * size + planes + num_pieces * ALIGNMENT


@register_jitable
def _is_within(box, shape):
    y, x, height, width = box
    bottom, right = _first_touched(y) + _num_touched(y, height), _first_touched(x) + _num_touched(x, width)
    return min(height, width) > 0 and min(y, x) > -TOLERANCE and bottom <= shape[0] and right <= shape[1]


@nb.njit(**_KERNEL)
def _cut(workspace, num_bytes):
    """A piece of the workspace, and the rest of it."""
    if num_bytes > workspace.size:
        raise ValueError("the workspace is too small for this region: size it with workspace_bytes()")
    return workspace[:num_bytes], workspace[_rounded_up(num_bytes, ALIGNMENT) :]


@nb.njit(**_KERNEL)
def _filter(x, interpolation):
    x = abs(x)
    if interpolation == BILINEAR:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@nb.njit(**_KERNEL)
def _lay_taps_into(start, extent, interpolation, taps):
    """Pillow's coefficients for one axis, without those that round to nothing at either end."""
    scale = extent / taps.firsts.size
    shrink = 1.0 / max(scale, 1.0)
    support = _support(extent, taps.firsts.size, interpolation)
    offset, length = _first_touched(start), _num_touched(start, extent)
    for position in range(taps.firsts.size):
        center = start - offset + (position + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), length)
        total = 0.0
        for source in range(low, high):
            total += _filter((source - center + 0.5) * shrink, interpolation)
        unit = (1 << PRECISION_BITS) / total
        first, count, last = low, 0, 1
        for source in range(low, high):
            weight = _filter((source - center + 0.5) * shrink, interpolation) * unit
            fixed = int(weight + math.copysign(0.5, weight))
            if fixed == 0 and count == 0:
                first += 1
                continue
            taps.weights[position * taps.stride + count] = fixed
            count += 1
            if fixed != 0:
                last = count
        taps.firsts[position] = first
        taps.counts[position] = last


@nb.njit(**_KERNEL)
def _cut_taps(workspace, start, extent, size, interpolation):
    piece, workspace = _cut(workspace, 4 * _taps_entries(extent, size, interpolation))
    entries = piece.view(np.int32)
    stride = _weights_stride(extent, size, interpolation)
    taps = Taps(entries[:size], entries[size : 2 * size], entries[2 * size :], stride)
    _lay_taps_into(start, extent, interpolation, taps)
    return taps, workspace


def _transpose_tile_into(source, at, stride, out, out_at, out_stride):
    """Transpose TILE x TILE bytes between two flat arrays."""
    for row in range(TILE):
        for column in range(TILE):
            out[out_at + column * out_stride + row] = source[at + row * stride + column]


@intrinsic
def _shuffle_tile_into(typing_context, source, at, stride, out, out_at, out_stride):
    """Transpose a tile within sixteen vector registers, which LLVM finds no way to from loops.

    Interleaving the first half of the rows with the second, four times over, transposes sixteen rows of sixteen.
    """
    vector = ir.VectorType(ir.IntType(8), TILE)
    lanes = ir.VectorType(ir.IntType(32), TILE)
    interleave = [ir.Constant(lanes, [half + i // 2 + TILE * (i % 2) for i in range(TILE)]) for half in (0, TILE // 2)]

    def generate(context, builder, signature, args):
        source_value, at_value, stride_value, out_value, out_at_value, out_stride_value = args

        def row_pointer(array_type, array, at, stride, row):
            data = context.make_array(array_type)(context, builder, array).data
            offset = builder.add(at, builder.mul(stride, ir.Constant(stride.type, row)))
            return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())

        inputs = [row_pointer(source, source_value, at_value, stride_value, row) for row in range(TILE)]
        outputs = [row_pointer(out, out_value, out_at_value, out_stride_value, row) for row in range(TILE)]
        rows = [builder.load(pointer, align=1) for pointer in inputs]
        for _ in range(4):
            pairs = zip(rows[: TILE // 2], rows[TILE // 2 :], strict=True)
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


@nb.njit(**_KERNEL)
def _transpose_into(source, stride, height, width, out, out_stride):
    """Transpose (height, width) bytes; the last tiles overlap their neighbours, so that no byte beyond is touched."""
    if height < TILE or width < TILE:
        for row in range(height):
            for column in range(width):
                out[column * out_stride + row] = source[row * stride + column]
        return
    for tile_row in range(0, height, TILE):
        row = min(tile_row, height - TILE)
        for tile_column in range(0, width, TILE):
            column = min(tile_column, width - TILE)
            _transpose_tile_into(source, row * stride + column, stride, out, column * out_stride + row, out_stride)


@nb.njit(**_KERNEL)
def _product(byte, weight):
    # Numba's own ``*`` widens 32 bit operands to 64, which halves the lanes of a vector; the ufunc keeps their type.
    return np.multiply(np.int32(byte), weight)


@nb.njit(**_KERNEL)
def _to_byte(total):
    value = np.right_shift(np.int32(total), np.int32(PRECISION_BITS))
    return np.uint8(min(max(value, np.int32(0)), np.int32(255)))


@nb.njit(forceinline=True, **_KERNEL)
def _weigh_rows_into(source, at, stride, count, weights, tap, sums, out, out_at, length):
    """Weigh count rows of bytes, stride apart, into one, four at a time, so that most sums stay in registers.

    The first half of sums holds 0.5 in fixed point, for rounding, the second what all but the last four rows add up to.
    Offsets are passed and not views of rows: those would be counted in and out of use by atomic instructions that take
    as long as a row. They are unsigned, as a test for negative indices would keep the loops from being vectorised.
    """
    a, stride, target, length = np.uint64(at), np.uint64(stride), np.uint64(out_at), np.uint64(length)
    b, c, d = a + stride, a + stride + stride, a + stride + stride + stride
    carried = np.uint64(0)
    if count > 4:
        carried = np.uint64(sums.size // 2)
        for i in range(length):
            sums[carried + i] = sums[i]
    while count > 4:
        w0, w1, w2, w3 = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
        for i in range(length):
            total = _product(source[a + i], w0) + _product(source[b + i], w1)
            sums[carried + i] += total + _product(source[c + i], w2) + _product(source[d + i], w3)
        a = d + stride
        b, c, d = a + stride, a + stride + stride, a + stride + stride + stride
        tap += 4
        count -= 4
    w0, w1, w2, w3 = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
    if count == 1:
        for i in range(length):
            out[target + i] = _to_byte(sums[carried + i] + _product(source[a + i], w0))
    elif count == 2:
        for i in range(length):
            out[target + i] = _to_byte(sums[carried + i] + _product(source[a + i], w0) + _product(source[b + i], w1))
    elif count == 3:
        for i in range(length):
            total = sums[carried + i] + _product(source[a + i], w0) + _product(source[b + i], w1)
            out[target + i] = _to_byte(total + _product(source[c + i], w2))
    else:
        for i in range(length):
            total = sums[carried + i] + _product(source[a + i], w0) + _product(source[b + i], w1)
            out[target + i] = _to_byte(total + _product(source[c + i], w2) + _product(source[d + i], w3))


@nb.njit(**_KERNEL)
def _weigh_along_y_into(source, stride, width, taps, scratch, out):
    firsts, counts, weights, num_weights = taps
    sums = scratch.sums
    for y in range(firsts.size):
        at = firsts[y] * stride
        _weigh_rows_into(source, at, stride, counts[y], weights, y * num_weights, sums, out, y * width, width)


@register_jitable
def _stripe_height(height):
    num_stripes = (height + MAX_STRIPE - 1) // MAX_STRIPE
    return _rounded_up((height + num_stripes - 1) // num_stripes, TILE)


@nb.njit(**_KERNEL)
def _weigh_along_x_into(source, stride, height, width, taps, flip, scratch, out):
    firsts, counts, weights, num_weights = taps
    columns, weighed, sums, _ = scratch
    size = firsts.size
    lanes = _stripe_height(height)
    num_rows = min(height, lanes)
    for stripe in range(0, height, lanes):
        row = min(stripe, height - num_rows)  # the last stripe overlaps the one before it, to be a whole one too
        _transpose_into(source[row * stride :], stride, num_rows, width, columns, lanes)
        for x in range(size):
            at, target = firsts[x] * lanes, (size - 1 - x if flip else x) * lanes
            _weigh_rows_into(columns, at, lanes, counts[x], weights, x * num_weights, sums, weighed, target, lanes)
        _transpose_into(weighed, lanes, size, num_rows, out[row * size :], size)


@nb.njit(**_KERNEL)
def _plan(box, shape, flip, interpolation, workspace):
    y, x, height, width = box
    num_rows, num_columns = _num_touched(y, height), _num_touched(x, width)
    y_taps, workspace = _cut_taps(workspace, y, height, shape[0], interpolation)
    x_taps, workspace = _cut_taps(workspace, x, width, shape[1], interpolation)
    lanes = max(_stripe_height(num_rows), _stripe_height(shape[0]))
    columns, workspace = _cut(workspace, lanes * num_columns)
    weighed, workspace = _cut(workspace, lanes * shape[1])
    longest = max(lanes, num_columns, shape[1])
    sums, workspace = _cut(workspace, 8 * longest)
    between, workspace = _cut(workspace, max(shape[0] * num_columns, num_rows * shape[1]))
    scratch = Scratch(columns, weighed, sums.view(np.int32), between)
    scratch.sums[:longest] = 1 << (PRECISION_BITS - 1)
    return Plan(num_rows, num_columns, x_taps, y_taps, flip, scratch)


@nb.njit(**_KERNEL)
def _resample_into(source, stride, plan, out):
    """Resample the box that begins with the source; out is flat."""
    num_rows, num_columns, x_taps, y_taps, flip, scratch = plan
    out_height, out_width = y_taps.firsts.size, x_taps.firsts.size
    # As Pillow does since version 13: along y first where that takes away more than twice the rows that x does columns.
    if num_rows > out_height and num_rows - out_height > 2 * (num_columns - out_width):
        _weigh_along_y_into(source, stride, num_columns, y_taps, scratch, scratch.between)
        _weigh_along_x_into(scratch.between, num_columns, out_height, num_columns, x_taps, flip, scratch, out)
    else:
        _weigh_along_x_into(source, stride, num_rows, num_columns, x_taps, flip, scratch, scratch.between)
        _weigh_along_y_into(scratch.between, out_width, out_width, y_taps, scratch, out)


@nb.njit(**_KERNEL)
def _from_first_touched(plane, box):
    assert _is_within(box, plane.shape)
    return plane.reshape(-1)[_first_touched(box[0]) * plane.shape[1] + _first_touched(box[1]) :]


@nb.njit(**_KERNEL)
def _split_channels_into(image, box, red, green, blue):
    top, left, width = _first_touched(box[0]), _first_touched(box[1]), _num_touched(box[1], box[3])
    for row in range(red.size // width):
        pixels = image[top + row, left : left + width].reshape(-1)
        target = slice(row * width, (row + 1) * width)
        reds, greens, blues = red[target], green[target], blue[target]
        for x in range(width):
            reds[x] = pixels[3 * x]
            greens[x] = pixels[3 * x + 1]
            blues[x] = pixels[3 * x + 2]


@nb.njit(**_KERNEL)
def _join_channels_into(red, green, blue, out):
    pixels = out.reshape(-1)
    for i in range(red.size):
        pixels[3 * i] = red[i]
        pixels[3 * i + 1] = green[i]
        pixels[3 * i + 2] = blue[i]


@nb.njit(**_KERNEL)
def _channel(total):
    return np.uint8(min(max(np.right_shift(np.int32(total), np.int32(16)), np.int32(0)), np.int32(255)))


@nb.njit(**_KERNEL)
def _convert_colour_into(y, cb, cr, out):
    """JPEG's full-range BT.601, in the 16 bit fixed point of libjpeg's jdcolor.c."""
    pixels = out.reshape(-1)
    for i in range(y.size):
        luma = _product(y[i], np.int32(65536)) + 32768
        blue, red = np.subtract(np.int32(cb[i]), np.int32(128)), np.subtract(np.int32(cr[i]), np.int32(128))
        pixels[3 * i] = _channel(luma + _product(red, np.int32(91881)))
        pixels[3 * i + 1] = _channel(luma - _product(blue, np.int32(22554)) - _product(red, np.int32(46802)))
        pixels[3 * i + 2] = _channel(luma + _product(blue, np.int32(116130)))


@nb.njit(**_KERNEL)
def resample_region_into(plane, box, interpolation, workspace, out):
    """Resample a region of one plane.

    Parameters
    ----------
    plane : ndarray of uint8, shape (height, width), C-contiguous
        Source.
    box : tuple of float
        Region ``(y, x, height, width)`` in pixels of the plane, within it, of positive extent.
    interpolation : int
        ``BILINEAR`` or ``BICUBIC``.
    workspace : ndarray of uint8, shape (n,)
        Scratch of one thread; see :func:`workspace_bytes`.
    out : ndarray of uint8, shape (out_height, out_width), C-contiguous
        Where the result is written.
    """
    plan = _plan(box, out.shape, False, interpolation, workspace)
    _resample_into(_from_first_touched(plane, box), plane.shape[1], plan, out.reshape(-1))


@nb.njit(**_KERNEL)
def resample_planes_into(y, cb, cr, y_box, c_box, flip, interpolation, workspace, out):
    """Resample a region of a JPEG's planes and convert it to RGB.

    Luma and chroma are resampled each from its own resolution, and colour is converted for output pixels alone.

    Parameters
    ----------
    y, cb, cr : ndarray of uint8, shape (height, width), C-contiguous
        Luma and chroma planes, chroma of any subsampling and both alike; of size 0 for a grayscale image.
    y_box, c_box : tuple of float
        The region ``(y, x, height, width)`` in pixels of the luma and of the chroma planes, within them, of positive
        extent. ``c_box`` is not looked at for a grayscale image.
    flip : bool
        Whether to mirror the output horizontally.
    interpolation : int
        ``BILINEAR`` or ``BICUBIC``.
    workspace : ndarray of uint8, shape (n,)
        Scratch of one thread; see :func:`workspace_bytes`.
    out : ndarray of uint8, shape (out_height, out_width, 3), C-contiguous
        Where the RGB image is written.
    """
    shape = out.shape[:2]
    y_plane, rest = _cut(workspace, shape[0] * shape[1])
    cb_plane, rest = _cut(rest, shape[0] * shape[1])
    cr_plane, rest = _cut(rest, shape[0] * shape[1])
    plan = _plan(y_box, shape, flip, interpolation, rest)
    _resample_into(_from_first_touched(y, y_box), y.shape[1], plan, y_plane)
    if cb.size == 0:
        _join_channels_into(y_plane, y_plane, y_plane, out)
        return
    plan = _plan(c_box, shape, flip, interpolation, rest)
    _resample_into(_from_first_touched(cb, c_box), cb.shape[1], plan, cb_plane)
    _resample_into(_from_first_touched(cr, c_box), cr.shape[1], plan, cr_plane)
    _convert_colour_into(y_plane, cb_plane, cr_plane, out)


@nb.njit(**_KERNEL)
def resample_rgb_into(image, box, flip, interpolation, workspace, out):
    """Resample a region of an interleaved RGB image.

    Parameters
    ----------
    image : ndarray of uint8, shape (height, width, 3), C-contiguous
        Source.
    box : tuple of float
        Region ``(y, x, height, width)`` in pixels, within the image, of positive extent.
    flip : bool
        Whether to mirror the output horizontally.
    interpolation : int
        ``BILINEAR`` or ``BICUBIC``.
    workspace : ndarray of uint8, shape (n,)
        Scratch of one thread; see :func:`workspace_bytes`.
    out : ndarray of uint8, shape (out_height, out_width, 3), C-contiguous
        Where the result is written.
    """
    assert _is_within(box, image.shape)
    shape = out.shape[:2]
    size, out_size = _num_touched(box[0], box[2]) * _num_touched(box[1], box[3]), shape[0] * shape[1]
    region, rest = _cut(workspace, 3 * size)
    planes, rest = _cut(rest, 3 * out_size)
    plan = _plan(box, shape, flip, interpolation, rest)
    _split_channels_into(image, box, region[:size], region[size : 2 * size], region[2 * size :])
    for channel in range(3):
        target = planes[channel * out_size : (channel + 1) * out_size]
        _resample_into(region[channel * size :], plan.num_columns, plan, target)
    _join_channels_into(planes[:out_size], planes[out_size : 2 * out_size], planes[2 * out_size :], out)
