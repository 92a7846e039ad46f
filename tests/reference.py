"""Slow, obvious twins of the kernels, for the tests to compare with."""

import math
import re
from fractions import Fraction

import numpy as np
from PIL import Image

from imagenet_training.models.card import IMAGENET_MEAN, IMAGENET_STD

# ImageNet's statistics in units of 0 to 255.
PIXEL_MEAN, PIXEL_STD = (tuple(255 * value for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))

# --- mixing


def mixed_images(images: np.ndarray, plan) -> np.ndarray:
    """Every byte by itself, in exact arithmetic, halves rounded upward."""
    mixed = images.copy()
    for i, (top, bottom, left, right) in enumerate(plan.box):
        lam = Fraction(0) if plan.use_cutmix[i] else Fraction(float(plan.lam[i]))
        for y in range(top, bottom):
            for x in range(left, right):
                for channel in range(3):
                    own, other = int(images[i, y, x, channel]), int(images[-1 - i, y, x, channel])
                    mixed[i, y, x, channel] = int(lam * own + (1 - lam) * other + Fraction(1, 2))
    return mixed


def mixed_targets(labels: np.ndarray, plan, num_classes: int, smoothing: float) -> np.ndarray:
    """``lam * s(y) + (1 - lam) * s(y of the partner)`` in float64."""
    smooth = np.full((len(labels), num_classes), smoothing / num_classes)
    smooth[np.arange(len(labels)), labels] += 1 - smoothing
    lam = plan.lam.astype(np.float64)[:, None]
    return lam * smooth + (1 - lam) * smooth[::-1]


# --- crops


def random_box(uniforms, height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """torchvision's ``RandomResizedCrop.get_params``, its random numbers taken from an iterator over [0, 1)."""
    for _ in range(10):
        share, log_ratio, down, across = (next(uniforms) for _ in range(4))
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * log_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(down * (height - h + 1)), math.floor(across * (width - w + 1)), h, w
    in_ratio = width / height
    if in_ratio < ratio[0]:
        w, h = width, max(round(width / ratio[0]), 1)
    elif in_ratio > ratio[1]:
        w, h = max(round(height * ratio[1]), 1), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: np.ndarray, box, size: int, flip: bool, interpolation: str) -> np.ndarray:
    """Crop an RGB image to whole px, resize it with Pillow, mirror it."""
    y, x, h, w = (round(float(side)) for side in box)
    cropped = Image.fromarray(image[y : y + h, x : x + w])
    resized = np.asarray(cropped.resize((size, size), getattr(Image.Resampling, interpolation.upper())))
    return resized[:, ::-1] if flip else resized


# --- resampling


def axis_weights(start: float, extent: float, size: int, bicubic: bool) -> np.ndarray:
    """(size, touched) weights of an axis in 22 bit fixed point: the filter, stretched to scale down, normalised."""
    touched = np.arange(math.floor(start), math.ceil(start + extent)) + 0.5
    centers = start + (np.arange(size)[:, None] + 0.5) * extent / size
    x = np.abs(touched - centers) / max(extent / size, 1)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.select([x < 1, x < 2], [near, far]) if bicubic else np.maximum(1 - x, 0)
    return np.rint(weights / weights.sum(1, keepdims=True) * 2**22).astype(np.int64)


def resampled(plane: np.ndarray, box, shape: tuple[int, int], bicubic: bool) -> np.ndarray:
    """Both passes as matrix products, each rounded and clipped to bytes, in the order that Pillow 13 takes."""
    y, x, height, width = box
    down, across = axis_weights(y, height, shape[0], bicubic), axis_weights(x, width, shape[1], bicubic)
    rows, columns = down.shape[1], across.shape[1]
    image = plane[math.floor(y) :, math.floor(x) :][:rows, :columns].astype(np.int64)
    y_first = rows > shape[0] and rows - shape[0] > 2 * (columns - shape[1])
    for along_y in (y_first, not y_first):
        image = down @ image if along_y else image @ across.T
        image = np.clip((image + 2**21) >> 22, 0, 255)
    return image.astype(np.uint8)


def full_range_rgb(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    """JFIF's conversion, in float64."""
    y, cb, cr = y.astype(float), cb - 128.0, cr - 128.0
    channels = y + 1.402 * cr, y - 0.344136286 * cb - 0.714136286 * cr, y + 1.772 * cb
    return np.clip(np.rint(np.stack(channels, axis=-1)), 0, 255).astype(np.uint8)


# --- JPEG


def jpeg_coefficients(image: np.ndarray, tables: np.ndarray, zigzag: np.ndarray) -> np.ndarray:
    """(num_blocks, 64) coefficients before rounding, in the order of a 4:2:0 scan; sides are multiples of 16."""
    r, g, b = (image[:, :, channel].astype(float) for channel in range(3))
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    chroma = [128 + (b - luma) * 0.5 / (1 - 0.114), 128 + (r - luma) * 0.5 / (1 - 0.299)]
    halves = [plane.reshape(len(plane) // 2, 2, -1, 2).mean((1, 3)) for plane in chroma]
    blocks = []
    for top in range(0, image.shape[0], 16):
        for left in range(0, image.shape[1], 16):
            blocks += [luma[top + y : top + y + 8, left + x : left + x + 8] for y in (0, 8) for x in (0, 8)]
            blocks += [half[top // 2 : top // 2 + 8, left // 2 : left // 2 + 8] for half in halves]
    k, x = np.arange(8)[:, None], np.arange(8)
    dct = np.cos((2 * x + 1) * k * np.pi / 16) / 2 * np.where(k == 0, math.sqrt(0.5), 1)
    transformed = np.array([dct @ (block - 128) @ dct.T for block in blocks])[:, zigzag[:, 0], zigzag[:, 1]]
    return transformed / tables[[0, 0, 0, 0, 1, 1] * (len(blocks) // 6)]


def decoded_coefficients(jpeg: bytes) -> np.ndarray:
    """(num_blocks, 64) coefficients that a baseline 4:2:0 JPEG with restart markers holds, read bit by bit."""
    codes, position = {}, 2
    while True:
        marker, length = jpeg[position + 1], int.from_bytes(jpeg[position + 2 : position + 4], "big")
        content = jpeg[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xC4:
            code, symbols = 0, iter(content[17:])
            for bits in range(1, 17):
                for _ in range(content[bits]):
                    codes[content[0], f"{code:0{bits}b}"] = next(symbols)
                    code += 1
                code *= 2
        if marker == 0xDD:
            interval = int.from_bytes(content, "big")
        if marker == 0xDA:
            break
    blocks = []
    for segment in re.split(rb"\xff[\xd0-\xd9]", jpeg[position:])[:-1]:
        bits = iter("".join(f"{byte:08b}" for byte in segment.replace(b"\xff\0", b"\xff")))
        last = [0, 0, 0]
        for number in range(6 * interval):
            component = max(number % 6 - 3, 0)
            blocks.append(_read_block(bits, codes, min(component, 1)))
            blocks[-1][0] = last[component] = blocks[-1][0] + last[component]
        assert "0" not in bits
    return np.array(blocks)


def _read_block(bits, codes, table: int) -> list[int]:
    block, k = [0] * 64, 0
    while k < 64:
        code = next(bits)
        while (16 * (k > 0) + table, code) not in codes:
            code += next(bits)
        symbol = codes[16 * (k > 0) + table, code]
        if k > 0 and symbol == 0:
            break
        k += symbol >> 4
        extra = "".join(next(bits) for _ in range(symbol & 15))
        # A number that begins with 0 is negative.
        block[k] = int(extra or "0", 2) - (2 ** len(extra) - 1 if extra.startswith("0") else 0)
        k += 1
    return block


def inverse_dct(
    coefficients: np.ndarray, quantisation: np.ndarray, zigzag: np.ndarray, block_px: int = 8
) -> np.ndarray:
    """Pixels of a block, uint8 (block_px, block_px): jidctint.c and jidctred.c of libjpeg, in whole numbers."""
    block = np.zeros((8, 8), np.int64)
    block[zigzag[:, 0], zigzag[:, 1]] = coefficients * quantisation.astype(np.int64)
    of_columns = {8: _inverse_dct_of_columns, 4: _inverse_dct_to_4, 2: _inverse_dct_to_2}
    if block_px == 1:
        block = (block[:1, :1] + 4) >> 3
    else:
        for shift in (11, 18):
            block = of_columns[block_px](block, shift).T
    return np.clip(block + 128, 0, 255).astype(np.uint8)


def _inverse_dct_to_4(rows: np.ndarray, shift: int) -> np.ndarray:
    even = (rows[0] << 14) + np.array([[1], [-1]]) * (rows[2] * 15137 - rows[6] * 6270)
    outer = rows[1] * 20995 + rows[3] * 7373 - rows[5] * 4926 - rows[7] * 4176
    inner = rows[1] * 8697 - rows[3] * 17799 + rows[5] * 11893 - rows[7] * 1730
    totals = even[0] + outer, even[1] + inner, even[1] - inner, even[0] - outer
    return np.array([(total + (1 << shift)) >> (shift + 1) for total in totals])


def _inverse_dct_to_2(rows: np.ndarray, shift: int) -> np.ndarray:
    odd = rows[1] * 29692 - rows[3] * 10426 + rows[5] * 6967 - rows[7] * 5906
    totals = (rows[0] << 15) + odd, (rows[0] << 15) - odd
    return np.array([(total + (2 << shift)) >> (shift + 2) for total in totals])


def _inverse_dct_of_columns(rows: np.ndarray, shift: int) -> np.ndarray:
    z1 = (rows[2] + rows[6]) * 4433
    even = [(rows[0] + rows[4]) << 13, (rows[0] - rows[4]) << 13, z1 - rows[6] * 15137, z1 + rows[2] * 6270]
    starts = even[0] + even[3], even[1] + even[2], even[1] - even[2], even[0] - even[3]
    a, b, c, d = rows[7], rows[5], rows[3], rows[1]
    z1, z2, z3, z4, z5 = a + d, b + c, a + c, b + d, (a + c + b + d) * 9633
    z1, z2, z3, z4 = z1 * -7373, z2 * -20995, z3 * -16069 + z5, z4 * -3196 + z5
    odd = d * 12299 + z1 + z4, c * 25172 + z2 + z3, b * 16819 + z2 + z4, a * 2446 + z1 + z3
    pairs = list(zip(starts, odd, strict=True))
    sums = [start + other for start, other in pairs] + [start - other for start, other in reversed(pairs)]
    return np.array([(total + (1 << shift - 1)) >> shift for total in sums])
