"""Describe a ``.beton`` file for people: classes, sizes, the storage of the images, and the manifest."""

import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.reading import Beton, read_beton
from ffcv_ops.codec import jpeg
from ffcv_ops.units import show_bytes

NUM_JPEGS_READ = 1000
"""The number of images, evenly spaced, whose JPEGs are read. The tables describe all images."""
_MOST_BINS = 14
_WIDE_RANGE = 30


@dataclass(frozen=True)
class Restarts:
    """The restart segments of some of a file's JPEGs.

    Attributes
    ----------
    num_jpegs, num_restarted, num_indexed : int
        The JPEGs that were read; those with restart segments; those with an index of them.
    segments : float
        Median number of segments in a JPEG that has segments.
    index_share : float
        Share of the indices in the bytes of all the JPEGs, 0 to 1.
    """

    num_jpegs: int
    num_restarted: int
    num_indexed: int
    segments: float
    index_share: float


@dataclass(frozen=True, eq=False)
class Description:
    """The description of a file.

    Attributes
    ----------
    beton : Beton
    class_counts : ndarray of int64, shape (K,)
        Number of images of each class. Without a manifest, only the labels that occur count as classes. Without labels,
        the array is empty.
    widths, heights, size_bytes : ndarray of int64, shape (N,)
        Sides in px and size in bytes of each stored image.
    raw : ndarray of bool, shape (N,)
        True for an image that is stored as pixels, false for a JPEG.
    restarts : Restarts
    """

    beton: Beton
    class_counts: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    size_bytes: np.ndarray
    raw: np.ndarray
    restarts: Restarts

    def histograms(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return three histograms by their titles: counts (B,), and the edges of the bins (B + 1,)."""
        shorter, longer = np.minimum(self.widths, self.heights), np.maximum(self.widths, self.heights)
        measured = {"shorter side (px)": shorter, "longer side (px)": longer, "stored size (bytes)": self.size_bytes}
        return {what: np.histogram(values, edges(values)) for what, values in measured.items()}


def describe(path: str | os.PathLike[str]) -> Description:
    """Describe a file from its tables, its manifest, and the JPEGs of `NUM_JPEGS_READ` images.

    Parameters
    ----------
    path : path
        A file of ours or of stock ffcv, with a field ``image``.

    Raises
    ------
    UserError
        If `read_beton` finds the file damaged, or if the file has no field ``image``.
    """
    found = read_beton(path)
    images = found.column("image")
    counts = np.zeros(0, np.int64)
    if found.manifest is not None:
        counts = np.array(found.manifest["class_counts"], np.int64)
    elif "label" in found.field_names:
        counts = np.unique(found.labels, return_counts=True)[1]
    return Description(
        beton=found,
        class_counts=counts,
        widths=images["width"].astype(np.int64),
        heights=images["height"].astype(np.int64),
        size_bytes=found.sizes_at(images["data_ptr"]).astype(np.int64),
        raw=images["mode"] == beton.MODE_RAW,
        restarts=_read_restarts(found, spread(found.num_samples, NUM_JPEGS_READ)),
    )


def spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of the numbers from 0 to `count` - 1, evenly spaced."""
    most = min(most, count)
    return np.arange(most) * count // max(most, 1)


def read_stored(found: Beton, samples: np.ndarray) -> list[np.ndarray]:
    """Return the stored bytes of some images, uint8 (size_bytes,) each."""
    ptr = found.column("image")["data_ptr"][samples]
    contents = []
    with open(found.path, "rb") as file:
        for start, size in zip(ptr.tolist(), found.sizes_at(ptr).tolist(), strict=True):
            file.seek(start)
            contents.append(np.frombuffer(file.read(size), np.uint8))
    return contents


def _read_restarts(found: Beton, samples: np.ndarray) -> Restarts:
    images = found.column("image")[samples]
    jpegs = samples[images["mode"] == beton.MODE_JPG]
    segments, index_bytes, num_bytes = [], [], 0
    for sample, content in zip(jpegs, read_stored(found, jpegs), strict=True):
        num_bytes += content.size
        try:
            _, interval = jpeg.scan_start(content)
        except IndexError:  # a damaged header
            continue
        if interval:
            row = found.column("image")[sample]
            per_row, rows = (-(-int(row[side]) // jpeg.MCU_PX) for side in ("width", "height"))
            segments.append(-(-per_row * rows // interval))
        if size := jpeg.index_bytes(content):
            index_bytes.append(size)
    share = sum(index_bytes) / num_bytes if num_bytes else 0.0
    return Restarts(len(jpegs), len(segments), len(index_bytes), statistics.median(segments or [0]), share)


def edges(values: np.ndarray) -> np.ndarray:
    """Return the edges of about 14 bins that hold all values.

    The edges are round numbers. They are evenly spaced, or over a wide range the series 1, 2, 5, 10, 20, ...

    Parameters
    ----------
    values : ndarray of int64, shape (N,)
        Positive.
    """
    low, high = int(values.min()), int(values.max()) + 1
    if high > low * _WIDE_RANGE:
        series = [step * 10**power for power in range(len(str(high)) + 1) for step in (1, 2, 5)]
        first = max(number for number, edge in enumerate(series) if edge <= low)
        last = min(number for number, edge in enumerate(series) if edge >= high)
        return np.array(series[first : last + 1])
    raw = max((high - low) / _MOST_BINS, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return np.arange(low // step, -(-high // step) + 1) * step


def lines(found: Description) -> list[str]:
    """Return the lines of a description, each with a name and a text."""
    file, manifest = found.beton, found.beton.manifest
    fields = zip(file.field_names, file.field_types, strict=True)
    rows = [
        ("file", f"{file.path}, {show_bytes(file.size_bytes)}"),
        ("images", f"{file.num_samples:,}, {_storage(found)}"),
        ("fields", ", ".join(f"{name} ({beton.TYPE_NAMES[kind]})" for name, kind in fields)),
        ("classes", _classes(found)),
        ("width", _spread_of(found.widths, "px")),
        ("height", _spread_of(found.heights, "px")),
        ("an image", f"{_spread_of(found.size_bytes, 'bytes')}, mean {found.size_bytes.mean():,.0f}"),
        ("segments", _segments(found.restarts)),
        ("pages", _pages(found)),
    ]
    if manifest is None:
        rows.append(("manifest", "none: written by stock FFCV, or the file beside it was lost"))
    else:
        settings = manifest.get("settings", {})
        rows += [
            ("settings", _pairs({key: value for key, value in settings.items() if value is not None})),
            ("order", f"shuffled by seed {settings.get('seed', '?')}, in which the samples are stored"),
            ("source", _pairs(manifest.get("source", {}))),
            *(("noted", _remark(remark)) for remark in manifest.get("remarks", [])),
            ("skipped", f"{len(manifest.get('skipped', []))} images"),
            ("written", f"{manifest.get('written', '?')}, {_pairs(manifest.get('versions', {}))}"),
            ("digest", file.digest or "none"),
        ]
    return [f"{name:<10}{what}" for name, what in rows]


def histogram_lines(what: str, counts: np.ndarray, bounds: np.ndarray, width: int) -> list[str]:
    """Return the lines of a histogram. Its bars are text, and a line has at most `width` characters."""
    names = [f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in pairwise(bounds.tolist())]
    numbers = [f"{count:,}" for count in counts]
    name_width, number_width = max(map(len, names)), max(map(len, numbers))
    room = max(width - name_width - number_width - 6, 1)
    bars = ["#" * math.ceil(room * count / max(counts.max(), 1)) for count in counts.tolist()]
    cells = zip(names, numbers, bars, strict=True)
    return [what, *(f"  {n:>{name_width}}  {c:>{number_width}}  {bar}".rstrip() for n, c, bar in cells)]


def _spread_of(values: np.ndarray, unit: str) -> str:
    low, middle, high = int(values.min()), int(np.median(values)), int(values.max())
    return f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}, median {middle:,}"


def _storage(found: Description) -> str:
    share = float(found.raw.mean())
    kinds = {0.0: "all JPEG", 1.0: "all raw"}
    return kinds.get(share, f"{share:.1%} raw ({int(found.raw.sum()):,}), the rest JPEG")


def _classes(found: Description) -> str:
    counts, names = found.class_counts, found.beton.classes
    if not len(counts):
        return "the file has no labels"
    text = f"{len(counts):,}, each of {_spread_of(counts, 'images')}"
    if names:
        text += f": {', '.join(names)}" if len(names) <= 10 else f": {names[0]}, {names[1]}, ... {names[-1]}"
    return text


def _segments(restarts: Restarts) -> str:
    if not restarts.num_jpegs:
        return "no JPEGs"
    seen = f"{restarts.num_jpegs:,} JPEGs looked at"
    if not restarts.num_restarted:
        return f"none in {seen}: a crop costs a decode of the whole image"
    return (
        f"{restarts.num_restarted / restarts.num_jpegs:.0%} of {seen} have restart segments, {restarts.segments:,.0f} "
        f"an image in the median; {restarts.num_indexed / restarts.num_jpegs:.0%} a row index, "
        f"{restarts.index_share:.1%} of the bytes"
    )


def _pages(found: Description) -> str:
    file = found.beton
    num_pages = (file.alloc_table_ptr - file.data_start) // file.page_size
    filled = int(file.alloc_table["size"].sum()) / max(num_pages * file.page_size, 1)
    return f"{num_pages:,} of {file.page_size:,} bytes, {filled:.1%} filled"


def _remark(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('what')}: {entry.get('count')}, such as {entry.get('example')}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "unknown"
