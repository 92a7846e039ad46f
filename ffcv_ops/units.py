"""Sizes, durations and lists of names as text."""

from __future__ import annotations  # the doctor is to be read by older Pythons too

import math
from collections.abc import Collection, Sequence


def show_bytes(size_bytes: float) -> str:
    """Return a size as text, such as ``68.71 GB`` or ``512.0 MB``."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def show_duration(time_s: float) -> str:
    """Return a number of seconds as text, such as ``2d 03:04:05``; ``?`` if the number is not finite."""
    if not math.isfinite(time_s):
        return "?"
    minutes, seconds = divmod(int(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours:02d}:{minutes:02d}:{seconds:02d}"


def show_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and the number of the others, such as ``a, b, c and 4 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def show_class_sizes(counts: Collection[int]) -> str:
    """Return the number of classes, and of the images of each, such as ``4 classes of 1 to 3 images``."""
    least, most = min(counts), max(counts)
    sizes = f"{most}" if least == most else f"{least} to {most}"
    return f"{len(counts)} class{'es' * (len(counts) > 1)} of {sizes} image{'s' * (most != 1)}"
