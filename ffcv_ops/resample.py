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
STRIPE = 64
"""Rows that are transposed and weighed together: four cache lines of accumulators, and a stripe fits the first-level cache."""

Taps = namedtuple("Taps", "first count weights")
"""For each output position: its first source position from the box's own, how many follow, and their weights."""

_KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}


@nb.njit(**_KERNEL)
def _padded(size):
    return (size + STRIPE - 1) // STRIPE * STRIPE


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
def _taps_entries(extent, size, interpolation):
    return size * (2 + 2 * int(math.ceil(_support(extent, size, interpolation))) + 1)


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
    taps = _taps_entries(max_height, size, BICUBIC) + _taps_entries(max_width, size, BICUBIC)
    stripes = 3 * STRIPE * _padded(max_width + 2)
    planes = 3 * (max_height + 3) * _padded(size)
    return 2 * 4 * taps + STRIPE * (max_width + 2 + size) + 4 * _padded(size) + stripes + planes + 16 * STRIPE


@nb.njit(**_KERNEL)
def _cut(workspace, at, num_bytes):
    """The next piece of the workspace, and where the one after it begins."""
    end = at + _padded(num_bytes)
    if end > workspace.size:
        raise ValueError("the workspace is too small for this region: size it with workspace_bytes()")
    return workspace[at : at + num_bytes], end


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
        target = size - 1 - position if mirrored else position
        first, count, last = low, 0, 1
        for tap in range(low, high):
            weight = _filter((tap - center + 0.5) * stretch, interpolation) / total * (1 << PRECISION_BITS)
            fixed = int(weight + math.copysign(0.5, weight))
            if fixed == 0 and count == 0:
                first += 1
                continue
            taps.weights[target, count] = fixed
            count += 1
            if fixed != 0:
                last = count
        taps.first[target] = first
        taps.count[target] = last


@nb.njit(**_KERNEL)
def _cut_taps(workspace, at, start, extent, size, mirrored, interpolation):
    num_entries = _taps_entries(extent, size, interpolation)
    piece, end = _cut(workspace, at, 4 * num_entries)
    entries = piece.view(np.int32)
    weights = entries[2 * size :].reshape((size, num_entries // size - 2))
    taps = Taps(entries[:size], entries[size : 2 * size], weights)
    _lay_taps_into(start, extent, mirrored, interpolation, taps)
    return taps, end


@nb.njit(**_KERNEL)
def _cut_scratch(workspace, at, width, out_width):
    """What the pass along x works in: a transposed stripe, the same weighed, and sums."""
    columns, at = _cut(workspace, at, STRIPE * width)
    weighed, at = _cut(workspace, at, STRIPE * out_width)
    sums, at = _cut(workspace, at, 4 * max(STRIPE, out_width))
    return (columns, weighed, sums.view(np.int32)), at


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
def _to_byte(total):
    value = np.int32(total + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS
    return np.uint8(min(max(value, 0), 255))


@nb.njit(**_KERNEL)
def _weigh_many_into(source, at, stride, count, weights, sums, out, out_at, length):
    for i in range(length):
        sums[i] = 0
    for tap in range(count):
        row = source[at + tap * stride : at + tap * stride + length]
        weight = weights[tap]
        for i in range(length):
            sums[i] += row[i] * weight
    target = out[out_at : out_at + length]
    for i in range(length):
        target[i] = _to_byte(sums[i])


@nb.njit(**_KERNEL)
def _weigh_rows_into(source, at, stride, count, weights, sums, out, out_at, length):
    """Weigh count rows of length bytes, stride apart, into one; up to four at once, so that the sums stay in registers."""
    if count > 4:
        _weigh_many_into(source, at, stride, count, weights, sums, out, out_at, length)
        return
    target = out[out_at : out_at + length]
    a = source[at : at + length]
    if count == 1:
        for i in range(length):
            target[i] = a[i]
        return
    b = source[at + stride : at + stride + length]
    if count == 2:
        for i in range(length):
            target[i] = _to_byte(a[i] * weights[0] + b[i] * weights[1])
        return
    c = source[at + 2 * stride : at + 2 * stride + length]
    if count == 3:
        for i in range(length):
            target[i] = _to_byte(a[i] * weights[0] + b[i] * weights[1] + c[i] * weights[2])
        return
    d = source[at + 3 * stride : at + 3 * stride + length]
    for i in range(length):
        target[i] = _to_byte(a[i] * weights[0] + b[i] * weights[1] + c[i] * weights[2] + d[i] * weights[3])


@nb.njit(**_KERNEL)
def _weigh_row_into(rows, stride, taps, position, sums, out):
    """The pass along y for one output row."""
    at = taps.first[position] * stride
    _weigh_rows_into(rows, at, stride, taps.count[position], taps.weights[position], sums, out, 0, out.size)


@nb.njit(**_KERNEL)
def _weigh_columns_into(source, at, stride, height, width, taps, scratch, out, out_at, out_stride):
    """The pass along x over (height, width) bytes, height at most STRIPE, into as many columns as there are taps."""
    size = taps.first.size
    columns, weighed, sums = scratch
    _transpose_into(source, at, stride, height, width, columns, 0, STRIPE)
    for x in range(size):
        first = taps.first[x] * STRIPE
        _weigh_rows_into(columns, first, STRIPE, taps.count[x], taps.weights[x], sums, weighed, x * STRIPE, STRIPE)
    _transpose_into(weighed, 0, STRIPE, size, height, out, out_at, out_stride)


@nb.njit(**_KERNEL)
def _weigh_plane_columns_into(plane, box, taps, scratch, out, out_stride):
    """The pass along x over the rows that a box touches."""
    y, x, height, width = box
    top, left = _first_touched(y), _first_touched(x)
    num_rows, num_columns = _num_touched(y, height), _num_touched(x, width)
    source, stride = plane.reshape(-1), plane.shape[1]
    for stripe in range(0, num_rows, STRIPE):
        # The last stripe overlaps the one before it, so that a region of enough rows has whole stripes alone.
        row = max(min(stripe, num_rows - STRIPE), 0)
        at = (top + row) * stride + left
        _weigh_columns_into(
            source, at, stride, min(STRIPE, num_rows), num_columns, taps, scratch, out, row * out_stride, out_stride
        )


@nb.njit(**_KERNEL)
def _split_channels_into(image, top, left, height, width, out):
    """Part interleaved RGB into three planes of rows _padded(width) apart."""
    stride = _padded(width)
    for row in range(height):
        red, green, blue = (
            out[row * stride : row * stride + width],
            out[(STRIPE + row) * stride : (STRIPE + row) * stride + width],
            out[(2 * STRIPE + row) * stride : (2 * STRIPE + row) * stride + width],
        )
        pixels = image[top + row, left : left + width].reshape(-1)
        for x in range(width):
            red[x] = pixels[3 * x]
            green[x] = pixels[3 * x + 1]
            blue[x] = pixels[3 * x + 2]


@nb.njit(**_KERNEL)
def _write_rgb_into(red, green, blue, out):
    pixels = out.reshape(-1)
    for x in range(out.shape[0]):
        pixels[3 * x] = red[x]
        pixels[3 * x + 1] = green[x]
        pixels[3 * x + 2] = blue[x]


@nb.njit(**_KERNEL)
def _clip(value):
    return np.uint8(min(max(value, 0), 255))


@nb.njit(**_KERNEL)
def _write_ycc_into(y, cb, cr, out):
    """JPEG's full-range BT.601 in the fixed point of libjpeg's jdcolor.c."""
    pixels = out.reshape(-1)
    for x in range(out.shape[0]):
        luma, blue, red = np.int32(y[x]), np.int32(cb[x]) - 128, np.int32(cr[x]) - 128
        pixels[3 * x] = _clip(luma + (np.int32(91881 * red + 32768) >> 16))
        pixels[3 * x + 1] = _clip(luma + (np.int32(32768 - 22554 * blue - 46802 * red) >> 16))
        pixels[3 * x + 2] = _clip(luma + (np.int32(116130 * blue + 32768) >> 16))


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

    Notes
    -----
    Equals Pillow 13's ``Image.crop(hull).resize((out_width, out_height), resample, box)`` to the bit, ``hull`` being the
    pixels that the box touches.
    """
    y, x, height, width = box
    out_height, out_width = out.shape
    x_taps, at = _cut_taps(workspace, 0, x, width, out_width, False, interpolation)
    y_taps, at = _cut_taps(workspace, at, y, height, out_height, False, interpolation)
    scratch, at = _cut_scratch(workspace, at, _num_touched(x, width), out_width)
    rows, at = _cut(workspace, at, _num_touched(y, height) * out_width)
    _weigh_plane_columns_into(plane, box, x_taps, scratch, rows, out_width)
    target = out.reshape(-1)
    for row in range(out_height):
        _weigh_row_into(rows, out_width, y_taps, row, scratch[2], target[row * out_width : (row + 1) * out_width])


@nb.njit(**_KERNEL)
def resample_planes_into(y, cb, cr, y_box, c_box, flip, interpolation, workspace, out):
    """Resample a region of a JPEG's planes and convert it to RGB.

    Luma and chroma are resampled each from its own resolution, and colour is converted for output pixels alone.

    Parameters
    ----------
    y, cb, cr : ndarray of uint8, shape (height, width), C-contiguous
        Luma and chroma planes, chroma of any subsampling and both alike; of size 0 for a grayscale image.
    y_box, c_box : tuple of float
        The region ``(y, x, height, width)`` in pixels of the luma and of the chroma planes, of positive extent. ``c_box``
        is not looked at for a grayscale image.
    flip : bool
        Whether to mirror the output horizontally.
    interpolation : int
        ``BILINEAR`` or ``BICUBIC``.
    workspace : ndarray of uint8, shape (n,)
        Scratch of one thread; see :func:`workspace_bytes`.
    out : ndarray of uint8, shape (out_height, out_width, 3), C-contiguous
        Where the RGB image is written.
    """
    out_height, out_width, _ = out.shape
    x_taps, at = _cut_taps(workspace, 0, y_box[1], y_box[3], out_width, flip, interpolation)
    y_taps, at = _cut_taps(workspace, at, y_box[0], y_box[2], out_height, False, interpolation)
    scratch, at = _cut_scratch(workspace, at, _num_touched(y_box[1], y_box[3]), out_width)
    sums = scratch[2]
    y_row, at = _cut(workspace, at, out_width)
    y_rows, at = _cut(workspace, at, _num_touched(y_box[0], y_box[2]) * out_width)
    _weigh_plane_columns_into(y, y_box, x_taps, scratch, y_rows, out_width)
    if cb.size == 0:
        for row in range(out_height):
            _weigh_row_into(y_rows, out_width, y_taps, row, sums, y_row)
            _write_rgb_into(y_row, y_row, y_row, out[row])
        return
    x_taps, at = _cut_taps(workspace, at, c_box[1], c_box[3], out_width, flip, interpolation)
    c_taps, at = _cut_taps(workspace, at, c_box[0], c_box[2], out_height, False, interpolation)
    cb_row, at = _cut(workspace, at, out_width)
    cr_row, at = _cut(workspace, at, out_width)
    cb_rows, at = _cut(workspace, at, _num_touched(c_box[0], c_box[2]) * out_width)
    cr_rows, at = _cut(workspace, at, _num_touched(c_box[0], c_box[2]) * out_width)
    _weigh_plane_columns_into(cb, c_box, x_taps, scratch, cb_rows, out_width)
    _weigh_plane_columns_into(cr, c_box, x_taps, scratch, cr_rows, out_width)
    for row in range(out_height):
        _weigh_row_into(y_rows, out_width, y_taps, row, sums, y_row)
        _weigh_row_into(cb_rows, out_width, c_taps, row, sums, cb_row)
        _weigh_row_into(cr_rows, out_width, c_taps, row, sums, cr_row)
        _write_ycc_into(y_row, cb_row, cr_row, out[row])


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
    out_height, out_width, _ = out.shape
    top, left = _first_touched(y), _first_touched(x)
    num_rows, num_columns = _num_touched(y, height), _num_touched(x, width)
    stride = _padded(num_columns)
    x_taps, at = _cut_taps(workspace, 0, x, width, out_width, flip, interpolation)
    y_taps, at = _cut_taps(workspace, at, y, height, out_height, False, interpolation)
    scratch, at = _cut_scratch(workspace, at, num_columns, out_width)
    split, at = _cut(workspace, at, 3 * STRIPE * stride)
    rgb_row, at = _cut(workspace, at, 3 * out_width)
    plane_size = num_rows * out_width
    rows, at = _cut(workspace, at, 3 * plane_size)
    for stripe in range(0, num_rows, STRIPE):
        row = max(min(stripe, num_rows - STRIPE), 0)
        stripe_height = min(STRIPE, num_rows)
        _split_channels_into(image, top + row, left, stripe_height, num_columns, split)
        for channel in range(3):
            _weigh_columns_into(
                split, channel * STRIPE * stride, stride, stripe_height, num_columns, x_taps, scratch,
                rows, channel * plane_size + row * out_width, out_width,
            )  # fmt: skip
    red, green, blue = rgb_row[:out_width], rgb_row[out_width : 2 * out_width], rgb_row[2 * out_width :]
    for row in range(out_height):
        _weigh_row_into(rows[:plane_size], out_width, y_taps, row, scratch[2], red)
        _weigh_row_into(rows[plane_size : 2 * plane_size], out_width, y_taps, row, scratch[2], green)
        _weigh_row_into(rows[2 * plane_size :], out_width, y_taps, row, scratch[2], blue)
        _write_rgb_into(red, green, blue, out[row])
