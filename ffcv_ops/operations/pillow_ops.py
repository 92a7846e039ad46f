"""Operations of Pillow on 8-bit images, in place: ImageOps, ImageEnhance, ``transform`` and ``rotate``.

Every operation gives the bytes of Pillow 13, with one exception. A rotation by an odd multiple of 45 degrees may differ
by 1 in a few bytes of 150,000, because Pillow rounds the sine to 15 digits, and the last digit decides there.

To add an operation, write its constant, its kernel and its branch of `apply_operation`.
"""

import math
from typing import NamedTuple

import numpy as np

from ffcv_ops._kernels import kernel

(
    IDENTITY,
    AUTO_CONTRAST,
    EQUALIZE,
    INVERT,
    ROTATE,
    POSTERIZE,
    SOLARIZE,
    SOLARIZE_ADD,
    COLOR,
    CONTRAST,
    BRIGHTNESS,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
) = range(16)

# Number of pixels around the image that an interpolation may read. They are copies of the edge of the image.
_MARGIN = 2


class Scratch(NamedTuple):
    """The memory of one worker while it changes an image in place.

    A rotation gathers whole pixels. Therefore its rows have four bytes per pixel, of which the last is unused. The rows
    of a shift have three bytes per pixel.

    Attributes
    ----------
    source : ndarray of uint8, shape ((H + 4) * (W + 4) * 4,)
        The image before the operation, with its edge repeated. A row has (W + 4) * 3 or (W + 4) * 4 bytes.
    rows : ndarray of uint8, shape (4, W * 4)
        Four rows, between which a row is interpolated.
    middle : ndarray of float64, shape (4, W * 4)
        Rows that are interpolated along x.
    along, down : ndarray of float64, shape (W * 4,)
        Position of each byte between its neighbours in the row, and between the rows: 0 to 1.
    position : ndarray of int32, shape (W,)
        Index of each pixel's neighbours.
    outside : ndarray of bool, shape (W,)
        True for a pixel from outside the image.
    centre : ndarray of float64, shape (W * 3,)
        The centre of each byte's pixel in px; constant.
    """

    source: np.ndarray
    rows: np.ndarray
    middle: np.ndarray
    along: np.ndarray
    down: np.ndarray
    position: np.ndarray
    outside: np.ndarray
    centre: np.ndarray


def build_scratch(num_workers: int, height: int, width: int) -> Scratch:
    """Build the scratch of all workers. Every array has one more axis, the first, of length `num_workers`."""
    return Scratch(
        source=np.empty((num_workers, (height + 2 * _MARGIN) * (width + 2 * _MARGIN) * 4), dtype=np.uint8),
        rows=np.empty((num_workers, 4, width * 4), dtype=np.uint8),
        middle=np.empty((num_workers, 4, width * 4), dtype=np.float64),
        along=np.empty((num_workers, width * 4), dtype=np.float64),
        down=np.empty((num_workers, width * 4), dtype=np.float64),
        position=np.empty((num_workers, width), dtype=np.int32),
        outside=np.empty((num_workers, width), dtype=np.bool_),
        centre=np.tile(np.repeat(np.arange(width) + 0.5, 3), (num_workers, 1)),
    )


# --- one value at a time


@kernel
def _map_values(values, tables):
    for i in range(0, len(values), 3):
        values[i] = tables[0, values[i]]
        values[i + 1] = tables[1, values[i + 1]]
        values[i + 2] = tables[2, values[i + 2]]


@kernel
def _find_ranges(values):
    """Return the lowest and the highest value of each channel. Scalars keep the loop in vector registers."""
    low_red = low_green = low_blue = np.uint8(255)
    high_red = high_green = high_blue = np.uint8(0)
    for i in range(len(values) // 3):
        red, green, blue = values[3 * i], values[3 * i + 1], values[3 * i + 2]
        low_red, high_red = min(low_red, red), max(high_red, red)
        low_green, high_green = min(low_green, green), max(high_green, green)
        low_blue, high_blue = min(low_blue, blue), max(high_blue, blue)
    return (low_red, low_green, low_blue), (high_red, high_green, high_blue)


@kernel
def auto_contrast(image):
    """Stretch each channel to 0 to 255: ``ImageOps.autocontrast``."""
    values = image.reshape(-1)
    tables = np.empty((3, 256), dtype=np.uint8)
    lows, highs = _find_ranges(values)
    for channel in range(3):
        low, high = float(lows[channel]), float(highs[channel])
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        for value in range(256):
            tables[channel, value] = min(max(int(value * scale + offset), 0), 255)
    _map_values(values, tables)


@kernel
def equalize(image):
    """Make each channel's histogram even: ``ImageOps.equalize``."""
    values = image.reshape(-1)
    counts = np.zeros((3, 256), dtype=np.int64)
    for i in range(0, len(values), 3):
        counts[0, values[i]] += 1
        counts[1, values[i + 1]] += 1
        counts[2, values[i + 2]] += 1
    tables = np.empty((3, 256), dtype=np.uint8)
    for channel in range(3):
        highest = np.flatnonzero(counts[channel])[-1]
        step = (len(values) // 3 - counts[channel, highest]) // 255
        below = step // 2
        for value in range(256):
            tables[channel, value] = min(below // step, 255) if step > 0 else value
            below += counts[channel, value]
    _map_values(values, tables)


@kernel
def invert(image):
    """Invert all values: ``ImageOps.invert``."""
    values = image.reshape(-1)
    for i in range(len(values)):
        values[i] = 255 - values[i]


@kernel
def posterize(image, num_bits):
    """Keep the highest `num_bits` (0 to 8) of each value: ``ImageOps.posterize``."""
    values = image.reshape(-1)
    mask = np.uint8(0xFF00 >> num_bits & 0xFF)
    for i in range(len(values)):
        values[i] &= mask


@kernel
def solarize(image, threshold):
    """Invert values at or above `threshold`: ``ImageOps.solarize``."""
    values = image.reshape(-1)
    if threshold > 255:
        return
    first = np.uint8(math.ceil(threshold))
    for i in range(len(values)):
        values[i] = values[i] if values[i] < first else 255 - values[i]


@kernel
def solarize_add(image, addend):
    """Add to values below 128, up to 255: ``solarize_add`` of timm."""
    values = image.reshape(-1)
    for i in range(len(values)):
        values[i] = min(values[i] + addend, 255) if values[i] < 128 else values[i]


# --- blends with a degenerate image, in float32 as in ``Image.blend``; integers are exact there


@kernel
def _blend(degenerate, value, factor):
    mixed = degenerate + factor * (value - degenerate)
    return np.int32(min(max(mixed, np.float32(0)), np.float32(255)))


@kernel
def _compute_grey(red, green, blue):
    total = np.float32(19595) * red + np.float32(38470) * green + np.float32(7471) * blue + np.float32(0x8000)
    return np.float32(np.int32(total * np.float32(2.0**-16)))


@kernel
def color(image, factor):
    """Blend with the grey image: ``ImageEnhance.Color``."""
    values = image.reshape(-1)
    factor = np.float32(factor)
    for i in range(len(values) // 3):
        red, green, blue = np.float32(values[3 * i]), np.float32(values[3 * i + 1]), np.float32(values[3 * i + 2])
        grey = _compute_grey(red, green, blue)
        values[3 * i] = _blend(grey, red, factor)
        values[3 * i + 1] = _blend(grey, green, factor)
        values[3 * i + 2] = _blend(grey, blue, factor)


@kernel
def _blend_with(image, level, factor):
    values = image.reshape(-1)
    level = np.float32(level)
    factor = np.float32(factor)
    for i in range(len(values)):
        values[i] = _blend(level, np.float32(values[i]), factor)


@kernel
def contrast(image, factor):
    """Blend with the mean grey: ``ImageEnhance.Contrast``."""
    values = image.reshape(-1)
    num_pixels = len(values) // 3
    total = 0
    for i in range(num_pixels):
        grey = _compute_grey(np.float32(values[3 * i]), np.float32(values[3 * i + 1]), np.float32(values[3 * i + 2]))
        total += int(grey)
    _blend_with(image, int(total / num_pixels + 0.5), factor)


@kernel
def brightness(image, factor):
    """Blend with black: ``ImageEnhance.Brightness``."""
    _blend_with(image, 0, factor)


@kernel
def _sum_row(row, i):
    return np.float32(row[i]) + np.float32(row[i + 3]) + np.float32(row[i + 6])


@kernel
def _sharpen_row_into(above, row, below, factor, out):
    """Sharpen a row. `out` begins one pixel after the rows, and ends one pixel before their end."""
    for i in range(len(out)):
        value = np.float32(row[i + 3])
        total = _sum_row(above, i) + _sum_row(row, i) + _sum_row(below, i) + np.float32(4) * value
        # a thirteenth of an integer is never near a half, so that the inexact product is rounded as the exact one
        smooth = np.float32(np.int32(total * np.float32(1 / 13) + np.float32(0.5)))
        out[i] = _blend(smooth, value, factor)


@kernel
def sharpness(image, factor, scratch):
    """Blend with the smoothed image, except at the edge: ``ImageEnhance.Sharpness``."""
    rows = image.reshape(image.shape[0], -1)
    source = scratch.source[: rows.size].reshape(rows.shape)
    _copy_into(image.reshape(-1), scratch.source[: rows.size])
    for y in range(1, len(rows) - 1):
        _sharpen_row_into(source[y - 1], source[y], source[y + 1], np.float32(factor), rows[y, 3:-3])


# --- shifts and rotations, in float64 as in Pillow; `cubic` selects bicubic; `fill` is the colour from outside


@kernel
def _interpolate_linear(first, second, fraction):
    return first + (second - first) * fraction


@kernel
def _interpolate_cubic(first, second, third, fourth, fraction):
    linear = third - first
    square = 2.0 * (first - second) + third - fourth
    cube = second - first - third + fourth
    return second + fraction * (linear + fraction * (square + fraction * cube))


@kernel
def _interpolate_into(first, second, third, fourth, fraction, cubic, out):
    """Interpolate between the second and the third row."""
    if cubic:
        for i in range(len(out)):
            a, b, c, d = np.float64(first[i]), np.float64(second[i]), np.float64(third[i]), np.float64(fourth[i])
            out[i] = _interpolate_cubic(a, b, c, d, fraction[i])
    else:
        for i in range(len(out)):
            out[i] = _interpolate_linear(np.float64(second[i]), np.float64(third[i]), fraction[i])


@kernel
def _clip_into(values, out):
    for i in range(len(out)):
        out[i] = np.int32(min(max(values[i], 0.0), 255.0))


@kernel
def _copy_into(row, out):
    """Copy a row by a loop, because Numba does not compile an assignment of slices to a vector copy."""
    for i in range(len(row)):
        out[i] = row[i]


@kernel
def _pad_into(image, source):
    """Write the image with its edge repeated to `source`, (H + 4, (W + 4) * 3)."""
    height, num_bytes = image.shape[0], image.shape[1] * 3
    rows = image.reshape(height, num_bytes)
    for y in range(len(source)):
        row = rows[min(max(y - _MARGIN, 0), height - 1)]
        _copy_into(row, source[y, 3 * _MARGIN : 3 * _MARGIN + num_bytes])
        for i in range(3):
            source[y, i] = source[y, i + 3] = row[i]
            source[y, num_bytes + 6 + i] = source[y, num_bytes + 9 + i] = row[num_bytes - 3 + i]


@kernel
def _pad(image, scratch):
    height, row_bytes = image.shape[0] + 2 * _MARGIN, (image.shape[1] + 2 * _MARGIN) * 3
    source = scratch.source[: height * row_bytes].reshape(height, row_bytes)
    _pad_into(image, source)
    return source


@kernel
def _fill(row, begin, end, fill):
    for x in range(begin, end):
        for channel in range(3):
            row[3 * x + channel] = fill[channel]


@kernel
def _find_inside(offset, length):
    """Return first and end of the pixels whose centre, moved by `offset`, stays within 0 to `length`."""
    first = min(max(int(math.ceil(-0.5 - offset)), 0), length)
    return first, min(max(int(math.ceil(length - 0.5 - offset)), first), length)


@kernel
def _write_fraction_into(centre, tilt, shift, whole, fraction):
    """Write the fraction of each position, with sums in the order of Pillow.

    If a byte is an integer but for rounding, the last bit of the sum decides its value.
    """
    for i in range(len(fraction)):
        fraction[i] = centre[i] + tilt + shift - 0.5 - (centre[i] - 0.5 + whole)


@kernel
def _shift_rows(image, slope, shift, cubic, fill, scratch):
    """Take each pixel (y, x) from x + slope * (y + 0.5) + shift of the same row."""
    height, width = image.shape[:2]
    rows = image.reshape(height, width * 3)
    padded = _pad(image, scratch)
    for y in range(height):
        tilt = slope * (y + 0.5)
        whole = math.floor(tilt + shift)
        begin, end = _find_inside(tilt + shift, width)
        start, size = 3 * (begin + int(whole) + _MARGIN), 3 * (end - begin)
        source = padded[y + _MARGIN]
        if size > 0:
            _write_fraction_into(scratch.centre[3 * begin : 3 * end], tilt, shift, whole, scratch.along[:size])
            _interpolate_into(
                source[start - 3 : start - 3 + size],
                source[start : start + size],
                source[start + 3 : start + 3 + size],
                source[start + 6 : start + 6 + size],
                scratch.along,
                cubic,
                scratch.middle[0, :size],
            )
            _clip_into(scratch.middle[0], rows[y, 3 * begin : 3 * end])
        _fill(rows[y], 0, begin, fill)
        _fill(rows[y], end, width, fill)


@kernel
def _gather_row_into(source, y, whole, row):
    highest = len(source) - 1
    for x in range(len(whole)):
        from_y = min(max(y + whole[x] + _MARGIN, 0), highest)
        pixel = source[from_y, 3 * (x + _MARGIN) : 3 * (x + _MARGIN) + 3]
        row[3 * x], row[3 * x + 1], row[3 * x + 2] = pixel[0], pixel[1], pixel[2]


@kernel
def _write_tilt_into(y, centre, slope, whole, fraction):
    """Write the fraction of each position, with sums in the order of Pillow; see `_write_fraction_into`."""
    for i in range(len(fraction)):
        fraction[i] = slope * centre[i] + (y + 0.5) - 0.5 - (y + whole[i])


@kernel
def shear_x(image, factor, cubic, fill, scratch):
    """Shear along x: ``transform(AFFINE, (1, factor, 0, 0, 1, 0))``."""
    _shift_rows(image, factor, 0.0, cubic, fill, scratch)


@kernel
def translate_x(image, shift_px, cubic, fill, scratch):
    """Shift along x: ``transform(AFFINE, (1, 0, shift_px, 0, 1, 0))``."""
    _shift_rows(image, 0.0, shift_px, cubic, fill, scratch)


@kernel
def translate_y(image, shift_px, cubic, fill, scratch):
    """Shift along y: ``transform(AFFINE, (1, 0, 0, 0, 1, shift_px))``."""
    height, width = image.shape[:2]
    rows = image.reshape(height, width * 3)
    padded = _pad(image, scratch)[:, 3 * _MARGIN : 3 * (_MARGIN + width)]
    begin, end = _find_inside(shift_px, height)
    whole = math.floor(shift_px)
    for y in range(begin, end):
        scratch.down[:] = y + 0.5 + shift_px - 0.5 - (y + whole)
        source = padded[y + int(whole) + _MARGIN - 1 :]
        _interpolate_into(
            source[0], source[1], source[2], source[3], scratch.down, cubic, scratch.middle[0, : 3 * width]
        )
        _clip_into(scratch.middle[0], rows[y])
    for y in range(height):
        if not begin <= y < end:
            _fill(rows[y], 0, width, fill)


@kernel
def shear_y(image, factor, cubic, fill, scratch):
    """Shear along y: ``transform(AFFINE, (1, 0, 0, factor, 1, 0))``."""
    height, width = image.shape[:2]
    rows = image.reshape(height, width * 3)
    padded = _pad(image, scratch)
    whole, taps = scratch.middle[0, : width * 3], scratch.rows[:, : width * 3]
    for x in range(width):
        scratch.position[x] = math.floor(factor * (x + 0.5))
        whole[3 * x : 3 * x + 3] = scratch.position[x]
    # Row y is interpolated between four sheared rows. The next row needs three of them again.
    for y in range(-1, 2):
        _gather_row_into(padded, y, scratch.position, taps[y + 1])
    for y in range(height):
        _gather_row_into(padded, y + 2, scratch.position, taps[(y + 3) % 4])
        _write_tilt_into(y, scratch.centre, factor, whole, scratch.down[: width * 3])
        above, here, below, under = taps[y % 4], taps[(y + 1) % 4], taps[(y + 2) % 4], taps[(y + 3) % 4]
        _interpolate_into(above, here, below, under, scratch.down, cubic, scratch.middle[1, : 3 * width])
        _clip_into(scratch.middle[1], rows[y])
    for x in range(width):
        begin, end = _find_inside(factor * (x + 0.5), height)
        for y in range(begin):
            _fill(rows[y], x, x + 1, fill)
        for y in range(end, height):
            _fill(rows[y], x, x + 1, fill)


@kernel
def _pad_words_into(image, source):
    """Write the image with its edge repeated and four bytes per pixel to `source`, (H + 4, W + 4, 4)."""
    height, width = image.shape[:2]
    for y in range(len(source)):
        from_y = min(max(y - _MARGIN, 0), height - 1)
        for x in range(width):
            for channel in range(3):
                source[y, x + _MARGIN, channel] = image[from_y, x, channel]
        for x in range(_MARGIN):
            source[y, x] = source[y, _MARGIN]
            source[y, width + _MARGIN + x] = source[y, width + _MARGIN - 1]


@kernel
def _rotate_row_into(y, height, width, matrix, along, down, position, outside):
    """Compute the source position of each pixel of row y."""
    cosine, sine, shift_x, shift_y = matrix
    for x in range(width):
        from_x = cosine * (x + 0.5) + sine * (y + 0.5) + shift_x
        from_y = -sine * (x + 0.5) + cosine * (y + 0.5) + shift_y
        outside[x] = (from_x < 0.0) | (from_x >= width) | (from_y < 0.0) | (from_y >= height)
        # any pixel of the image, because pixels from outside are overwritten with the fill
        from_x, from_y = (0.0, 0.0) if outside[x] else (from_x - 0.5, from_y - 0.5)
        left, top = math.floor(from_x), math.floor(from_y)
        along[x] = from_x - left
        down[x] = from_y - top
        position[x] = np.int32((top + _MARGIN) * (width + 2 * _MARGIN) + (left + _MARGIN))


@kernel
def _spread_into(pixels, values):
    """Write the value of each pixel four times, once for each byte."""
    for x in range(len(pixels)):
        values[4 * x] = values[4 * x + 1] = values[4 * x + 2] = values[4 * x + 3] = pixels[x]


@kernel
def _gather_words_into(words, position, offset, row):
    for x in range(len(position)):
        row[x] = words[np.uint32(position[x] + offset)]


@kernel
def rotate(image, degrees, cubic, fill, scratch):
    """Rotate counter-clockwise about the centre: ``rotate(degrees)``."""
    height, width = image.shape[:2]
    stride = width + 2 * _MARGIN
    _pad_words_into(image, scratch.source.reshape(height + 2 * _MARGIN, stride, 4))
    words, row_words = scratch.source.view(np.uint32), scratch.rows.view(np.uint32)
    rows, middle, out = scratch.rows, scratch.middle, scratch.rows[0]
    along, down, position, outside = (
        scratch.middle[0, :width],
        scratch.middle[1, :width],
        scratch.position,
        scratch.outside,
    )
    angle = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    shift_x = cosine * (-width / 2) + sine * (-height / 2) + width / 2
    shift_y = -sine * (-width / 2) + cosine * (-height / 2) + height / 2
    for y in range(height):
        matrix = (cosine, sine, shift_x, shift_y)
        _rotate_row_into(y, height, width, matrix, along, down, position, outside)
        _spread_into(along, scratch.along)
        _spread_into(down, scratch.down)
        for tap_y in range(-1 if cubic else 0, 3 if cubic else 2):
            for tap_x in range(-1 if cubic else 0, 3 if cubic else 2):
                _gather_words_into(words, position, tap_y * stride + tap_x, row_words[tap_x + 1])
            _interpolate_into(rows[0], rows[1], rows[2], rows[3], scratch.along, cubic, middle[tap_y + 1])
        _interpolate_into(middle[0], middle[1], middle[2], middle[3], scratch.down, cubic, scratch.along)
        _clip_into(scratch.along, out)
        for x in range(width):
            for channel in range(3):
                image[y, x, channel] = fill[channel] if outside[x] else out[4 * x + channel]


# --- the table


@kernel
def apply_operation(image, operation, argument, cubic, fill, scratch):
    """Apply one operation in place.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3), C-contiguous
        The image. It is changed.
    operation : int
        A constant of this module.
    argument : float
        The argument of the operation's function. Operations without an argument ignore it.
    cubic : bool
        True for bicubic, False for bilinear interpolation. Operations without interpolation ignore it.
    fill : ndarray of uint8, shape (3,)
        Colour of pixels from outside the image.
    scratch : Scratch
        Memory of one worker.
    """
    if operation == AUTO_CONTRAST:
        auto_contrast(image)
    elif operation == EQUALIZE:
        equalize(image)
    elif operation == INVERT:
        invert(image)
    elif operation == ROTATE:
        rotate(image, argument, cubic, fill, scratch)
    elif operation == POSTERIZE:
        posterize(image, int(argument))
    elif operation == SOLARIZE:
        solarize(image, argument)
    elif operation == SOLARIZE_ADD:
        solarize_add(image, int(argument))
    elif operation == COLOR:
        color(image, argument)
    elif operation == CONTRAST:
        contrast(image, argument)
    elif operation == BRIGHTNESS:
        brightness(image, argument)
    elif operation == SHARPNESS:
        sharpness(image, argument, scratch)
    elif operation == SHEAR_X:
        shear_x(image, argument, cubic, fill, scratch)
    elif operation == SHEAR_Y:
        shear_y(image, argument, cubic, fill, scratch)
    elif operation == TRANSLATE_X:
        translate_x(image, argument, cubic, fill, scratch)
    elif operation == TRANSLATE_Y:
        translate_y(image, argument, cubic, fill, scratch)
