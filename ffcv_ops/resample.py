"""Antialiased resampling of a region, in Numba, with Pillow's arithmetic.

An output pixel is the weighted mean of the source pixels under a filter (a triangle, or Keys' cubic with a = -0.5) that is
stretched by the downscale factor, as in Pillow's ``Resample.c``: first along x, then along y, both in 22 bit fixed point
with rounding to 8 bits in between. A region resampled here equals ``Image.crop(region).resize(...)`` to the bit.

A box ``(y, x, height, width)`` is given in pixels of the plane and may be fractional, as the boxes of subsampled chroma are.
Filter taps stay within the pixels that the box touches: "decode, crop, resize" means that nothing beyond the crop is seen.
Pillow's ``resize(box=...)`` clamps to the image instead; for a box that is the whole image the two agree.

The pass along x is what costs: its taps lie side by side in memory, where vector instructions cannot weigh them. Stripes of
rows are therefore transposed, tile by tile, weighed as rows, and transposed back; all of it stays in the first-level cache.
"""

import math
from collections import namedtuple
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

BILINEAR = 0
BICUBIC = 1
INTERPOLATIONS = {"bilinear": BILINEAR, "bicubic": BICUBIC}

PRECISION_BITS = 22
TILE = 16
ALIGNMENT = 64
MAX_STRIPE = 160
"""Rows transposed and weighed together: long enough to hide the cost of starting a loop, short enough to stay in cache."""

Taps = namedtuple("Taps", "first count weights stride")
"""For each output position: its first source position from the box's own, how many follow, and their weights, flat."""

Scratch = namedtuple("Scratch", "columns weighed sums between")
"""A transposed stripe, the same weighed, sums of a row, and the image between the two passes."""

_KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}


@nb.njit(**_KERNEL)
def _rounded_up(size, multiple):
    return (size + multiple - 1) // multiple * multiple


@nb.njit(**_KERNEL)
def _first_touched(start):
    return int(math.floor(start))


@nb.njit(**_KERNEL)
def _num_touched(start, extent):
    return int(math.ceil(start + extent)) - int(math.floor(start))


@nb.njit(**_KERNEL)
def _support(extent, size, interpolation):
    return (1.0 if interpolation == BILINEAR else 2.0) * max(extent / size, 1.0)


@nb.njit(**_KERNEL)
def _weights_stride(extent, size, interpolation):
    """Weights of one output position, padded, as they are read by fours."""
    return _rounded_up(2 * int(math.ceil(_support(extent, size, interpolation))) + 1, 4)


@nb.njit(**_KERNEL)
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
    taps = 4 * (_taps_entries(height, size, BICUBIC) + _taps_entries(width, size, BICUBIC))
    stripe = (MAX_STRIPE + TILE) * (width + size)
    planes = 3 * (height * width + size * size)
    num_pieces = 16
    return taps + 8 * (longest + MAX_STRIPE + TILE) + stripe + longest * size + planes + num_pieces * ALIGNMENT


@nb.njit(**_KERNEL)
def _cut(workspace, at, num_bytes):
    """The next piece of the workspace, and where the one after it begins."""
    if at + num_bytes > workspace.size:
        raise ValueError("the workspace is too small for this region: size it with workspace_bytes()")
    return workspace[at : at + num_bytes], at + _rounded_up(num_bytes, ALIGNMENT)


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
def _lay_taps_into(start, extent, mirrored, interpolation, taps):
    """Pillow's coefficients for one axis; mirrored ones give the output in reverse. Taps of no weight are left out."""
    size = taps.first.size
    scale = extent / size
    stretch = 1.0 / max(scale, 1.0)
    support = _support(extent, size, interpolation)
    offset, length = _first_touched(start), _num_touched(start, extent)
    for position in range(size):
        center = start - offset + (position + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), length)
        total = 0.0
        for tap in range(low, high):
            total += _filter((tap - center + 0.5) * stretch, interpolation)
        unit = (1 << PRECISION_BITS) / total
        target = size - 1 - position if mirrored else position
        first, count, last = low, 0, 1
        for tap in range(low, high):
            weight = _filter((tap - center + 0.5) * stretch, interpolation) * unit
            fixed = int(weight + math.copysign(0.5, weight))
            if fixed == 0 and count == 0:
                first += 1
                continue
            taps.weights[target * taps.stride + count] = fixed
            count += 1
            if fixed != 0:
                last = count
        taps.first[target] = first
        taps.count[target] = last


@nb.njit(**_KERNEL)
def _cut_taps(workspace, at, start, extent, size, mirrored, interpolation):
    piece, at = _cut(workspace, at, 4 * _taps_entries(extent, size, interpolation))
    entries = piece.view(np.int32)
    stride = _weights_stride(extent, size, interpolation)
    taps = Taps(entries[:size], entries[size : 2 * size], entries[2 * size :], stride)
    _lay_taps_into(start, extent, mirrored, interpolation, taps)
    return taps, at


def _transpose_tile_into(source, at, stride, out, out_at, out_stride):
    """Transpose TILE x TILE bytes between two flat arrays."""
    for row in range(TILE):
        for column in range(TILE):
            out[out_at + column * out_stride + row] = source[at + row * stride + column]


@intrinsic
def _shuffle_tile_into(typing_context, source, at, stride, out, out_at, out_stride):
    """Four rounds of interleaving halves transpose a tile within sixteen vector registers; LLVM finds no such thing itself."""
    vector = ir.VectorType(ir.IntType(8), TILE)
    indices = ir.VectorType(ir.IntType(32), TILE)
    interleave = [[half + i // 2 + TILE * (i % 2) for i in range(TILE)] for half in (0, TILE // 2)]

    def generate(context, builder, signature, args):
        def row_pointer(array_type, array, at, stride, row):
            data = context.make_array(array_type)(context, builder, array).data
            offset = builder.add(at, builder.mul(stride, ir.Constant(stride.type, row)))
            return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())

        rows = [builder.load(row_pointer(source, *args[:3], row), align=1) for row in range(TILE)]
        for _ in range(4):
            pairs = zip(rows[: TILE // 2], rows[TILE // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, ir.Constant(indices, order)) for pair in pairs for order in interleave]
        for row, value in enumerate(rows):
            builder.store(value, row_pointer(out, *args[3:], row), align=1)
        return context.get_dummy_value()

    return nb.void(source, at, stride, out, out_at, out_stride), generate


@overload(_transpose_tile_into)
def _overload_transpose_tile_into(source, at, stride, out, out_at, out_stride):
    def transpose(source, at, stride, out, out_at, out_stride):
        _shuffle_tile_into(source, at, stride, out, out_at, out_stride)

    return transpose


@nb.njit(**_KERNEL)
def _transpose_into(source, at, stride, height, width, out, out_at, out_stride):
    """Transpose (height, width) bytes; the last tiles overlap their neighbours, so that no byte beyond the region is touched."""
    if height < TILE or width < TILE:
        for row in range(height):
            for column in range(width):
                out[out_at + column * out_stride + row] = source[at + row * stride + column]
        return
    for tile_row in range(0, height, TILE):
        row = min(tile_row, height - TILE)
        for tile_column in range(0, width, TILE):
            column = min(tile_column, width - TILE)
            _transpose_tile_into(
                source, at + row * stride + column, stride, out, out_at + column * out_stride + row, out_stride
            )


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
    """Weigh count rows of bytes, stride apart, into one; four at a time, so that the sums of most stay in registers.

    The first half of sums holds one half in fixed point, for rounding, the second what more than four rows have summed to.
    Whole arrays and offsets are passed, as a view of a row would be counted in and out of use by atomic instructions, which
    take longer than the row. Unsigned offsets spare the test for negative indices, which keeps loops from being vectorised.
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
def _weigh_along_y_into(source, at, stride, width, taps, scratch, out):
    firsts, counts, weights, num_weights = taps
    sums = scratch.sums
    for row in range(firsts.size):
        first = at + firsts[row] * stride
        _weigh_rows_into(
            source, first, stride, counts[row], weights, row * num_weights, sums, out, row * width, width
        )


@nb.njit(**_KERNEL)
def _stripe_height(height):
    num_stripes = (height + MAX_STRIPE - 1) // MAX_STRIPE
    return _rounded_up((height + num_stripes - 1) // num_stripes, TILE)


@nb.njit(**_KERNEL)
def _weigh_along_x_into(source, at, stride, height, width, taps, scratch, out):
    firsts, counts, weights, num_weights = taps
    columns, weighed, sums, _ = scratch
    size = firsts.size
    lanes = _stripe_height(height)
    num_rows = min(height, lanes)
    for stripe in range(0, height, lanes):
        row = min(stripe, height - num_rows)  # the last stripe overlaps the one before it, to be a whole one too
        _transpose_into(source, at + row * stride, stride, num_rows, width, columns, 0, lanes)
        for x in range(size):
            first = firsts[x] * lanes
            _weigh_rows_into(
                columns, first, lanes, counts[x], weights, x * num_weights, sums, weighed, x * lanes, lanes
            )
        _transpose_into(weighed, 0, lanes, size, num_rows, out, row * size, size)


@nb.njit(**_KERNEL)
def _plan(box, shape, flip, interpolation, workspace):
    """Taps and scratch for a box, cut from the workspace."""
    y, x, height, width = box
    num_rows, num_columns = _num_touched(y, height), _num_touched(x, width)
    x_taps, free = _cut_taps(workspace, 0, x, width, shape[1], flip, interpolation)
    y_taps, free = _cut_taps(workspace, free, y, height, shape[0], False, interpolation)
    lanes = max(_stripe_height(num_rows), _stripe_height(shape[0]))
    longest = max(MAX_STRIPE + TILE, num_columns, shape[1])
    columns, free = _cut(workspace, free, lanes * num_columns)
    weighed, free = _cut(workspace, free, lanes * shape[1])
    sums, free = _cut(workspace, free, 8 * longest)
    between, free = _cut(workspace, free, max(shape[0] * num_columns, num_rows * shape[1]))
    scratch = Scratch(columns, weighed, sums.view(np.int32), between)
    scratch.sums[:longest] = 1 << (PRECISION_BITS - 1)
    return num_rows, num_columns, x_taps, y_taps, scratch


@nb.njit(**_KERNEL)
def _resample_into(source, at, stride, plan, out):
    """Resample the box whose first byte is source[at]; out is flat."""
    num_rows, num_columns, x_taps, y_taps, scratch = plan
    out_height, out_width = y_taps.first.size, x_taps.first.size
    between = scratch.between
    # Pillow's choice since its version 13: rows first where that drops at least twice as many rows as it would drop columns.
    if num_rows > out_height and num_rows - out_height > 2 * (num_columns - out_width):
        _weigh_along_y_into(source, at, stride, num_columns, y_taps, scratch, between)
        _weigh_along_x_into(between, 0, num_columns, out_height, num_columns, x_taps, scratch, out)
    else:
        _weigh_along_x_into(source, at, stride, num_rows, num_columns, x_taps, scratch, between)
        _weigh_along_y_into(between, 0, out_width, out_width, y_taps, scratch, out)


@nb.njit(**_KERNEL)
def _resample_plane_into(plane, box, plan, out):
    stride = plane.shape[1]
    at = _first_touched(box[0]) * stride + _first_touched(box[1])
    _resample_into(plane.reshape(-1), at, stride, plan, out)


@nb.njit(**_KERNEL)
def _split_channels_into(image, top, left, height, width, red, green, blue):
    for row in range(height):
        pixels = image[top + row, left : left + width].reshape(-1)
        reds = red[row * width : (row + 1) * width]
        greens = green[row * width : (row + 1) * width]
        blues = blue[row * width : (row + 1) * width]
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
    _resample_plane_into(plane, box, plan, out.reshape(-1))


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
    y_plane, free = _cut(workspace, 0, shape[0] * shape[1])
    cb_plane, free = _cut(workspace, free, shape[0] * shape[1])
    cr_plane, free = _cut(workspace, free, shape[0] * shape[1])
    scratch = workspace[free:]
    _resample_plane_into(y, y_box, _plan(y_box, shape, flip, interpolation, scratch), y_plane)
    if cb.size == 0:
        _join_channels_into(y_plane, y_plane, y_plane, out)
        return
    plan = _plan(c_box, shape, flip, interpolation, scratch)
    _resample_plane_into(cb, c_box, plan, cb_plane)
    _resample_plane_into(cr, c_box, plan, cr_plane)
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
    y, x, height, width = box
    num_rows, num_columns = _num_touched(y, height), _num_touched(x, width)
    shape = out.shape[:2]
    region, free = _cut(workspace, 0, 3 * num_rows * num_columns)
    resampled, free = _cut(workspace, free, 3 * shape[0] * shape[1])
    scratch = workspace[free:]
    size, out_size = num_rows * num_columns, shape[0] * shape[1]
    _split_channels_into(
        image, _first_touched(y), _first_touched(x), num_rows, num_columns,
        region[:size], region[size : 2 * size], region[2 * size :],
    )  # fmt: skip
    plan = _plan(box, shape, flip, interpolation, scratch)
    for channel in range(3):
        target = resampled[channel * out_size : (channel + 1) * out_size]
        _resample_into(region, channel * size, num_columns, plan, target)
    _join_channels_into(resampled[:out_size], resampled[out_size : 2 * out_size], resampled[2 * out_size :], out)
