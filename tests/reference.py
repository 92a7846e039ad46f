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
