"""Slow, obvious twins of the kernels, for the tests to compare with."""

from fractions import Fraction

import numpy as np

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
