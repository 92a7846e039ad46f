"""Sizes and durations as text."""

import math


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
