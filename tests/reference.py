"""Slow, obvious twins of the kernels, for the tests to compare with."""

import math
from fractions import Fraction

import numpy as np
from PIL import Image

# --- mixing


def mixed_images(images: np.ndarray, plan) -> np.ndarray:
    """Every byte by itself, in exact arithmetic, halves rounded upward."""
    mixed = images.copy()
    for i, (top, bottom, left, right) in enumerate(plan.box):
        lam = Fraction(0) if plan.use_cutmix[i] else Fraction(float(plan.lam[i]))
        for y in range(top, bottom):
            for x in range(left, right):
                for channel in range(3):
                    own, other = int(images[i, y, x, channel]), int(images[plan.partner[i], y, x, channel])
                    mixed[i, y, x, channel] = int(lam * own + (1 - lam) * other + Fraction(1, 2))
    return mixed


def mixed_targets(labels: np.ndarray, plan, num_classes: int, smoothing: float) -> np.ndarray:
    """``lam * s(y) + (1 - lam) * s(y of the partner)`` in float64."""
    smooth = np.full((len(labels), num_classes), smoothing / num_classes)
    smooth[np.arange(len(labels)), labels] += 1 - smoothing
    lam = plan.lam.astype(np.float64)[:, None]
    return lam * smooth + (1 - lam) * smooth[plan.partner]


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
