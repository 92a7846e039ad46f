"""What is in a ``.beton`` file, for people: classes, sizes, how the images are stored, and what the manifest tells."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.layout import Beton, read_beton
from ffcv_ops.codec import jpeg
from ffcv_ops.units import show_bytes

NUM_LOOKED_AT = 1000
"""Images whose JPEG is read, evenly spaced; all others are known from the tables."""
_BACKGROUND = 255
_MOST_BINS = 14
_WIDE_RANGE = 30


@dataclass(frozen=True)
class Restarts:
    """Of the JPEGs that were looked at: how many there were, and how many have restart segments, and their index.

    ``segments`` is the median number in an image that has them, ``index_share`` the index's share of all their bytes.
    """

    num_jpegs: int
    num_restarted: int
    num_indexed: int
    segments: float
    index_share: float


@dataclass(frozen=True, eq=False)
class Description:
    """What `describe` found.

    Attributes
    ----------
    beton : Beton
    class_counts : ndarray of int64, shape (K,)
        Images of each class; those of the labels that occur where there is no manifest, empty without labels.
    widths, heights, size_bytes : ndarray of int64, shape (N,)
        Of the stored images: px, px, bytes.
    raw : ndarray of bool, shape (N,)
        Which images are pixels, not JPEGs.
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
        """Counts (B,) and the edges of the bins (B + 1,) of what differs between images, by what is counted."""
        shorter, longer = np.minimum(self.widths, self.heights), np.maximum(self.widths, self.heights)
        measured = {"shorter side (px)": shorter, "longer side (px)": longer, "stored size (bytes)": self.size_bytes}
        return {what: np.histogram(values, edges(values)) for what, values in measured.items()}


def describe(path: str | os.PathLike[str]) -> Description:
    """Read a file's tables and manifest, and the JPEGs of `NUM_LOOKED_AT` images.

    Parameters
    ----------
    path : path
        A file of ours or of stock ffcv, with a field ``image``.

    Raises
    ------
    ValueError
        What `read_beton` says of a damaged file, or that it has no images.
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
        restarts=_look_at_restarts(found, spread(found.num_samples, NUM_LOOKED_AT)),
    )


def spread(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers from 0 to `count` - 1, evenly spaced."""
    most = min(most, count)
    return np.arange(most) * count // max(most, 1)


def read_stored(found: Beton, samples: np.ndarray) -> list[np.ndarray]:
    """The bytes of images as they are stored, uint8 (size_bytes,) each."""
    ptr = found.column("image")["data_ptr"][samples]
    contents = []
    with open(found.path, "rb") as file:
        for start, size in zip(ptr.tolist(), found.sizes_at(ptr).tolist(), strict=True):
            file.seek(start)
            contents.append(np.frombuffer(file.read(size), np.uint8))
    return contents


def _look_at_restarts(found: Beton, samples: np.ndarray) -> Restarts:
    images = found.column("image")[samples]
    jpegs = samples[images["mode"] == beton.MODE_JPG]
    segments, index_bytes, num_bytes = [], [], 0
    for sample, content in zip(jpegs, read_stored(found, jpegs), strict=True):
        num_bytes += content.size
        try:
            _, interval = jpeg.scan_start(content)
        except IndexError:  # damaged before its data begin
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
    """Round edges of at most 14 bins or so that hold all values: evenly spaced, or 1, 2, 5, 10, ... over a wide range.

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
    """A description in lines of text: ``name   what``."""
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
            ("skipped", f"{len(manifest.get('skipped', []))} images"),
            ("written", f"{manifest.get('written', '?')}, {_pairs(manifest.get('versions', {}))}"),
            ("digest", file.digest or "none"),
        ]
    return [f"{name:<10}{what}" for name, what in rows]


def histogram_lines(what: str, counts: np.ndarray, bounds: np.ndarray, width: int) -> list[str]:
    """A histogram as bars of text, `width` characters at most."""
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


def _pairs(values: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "not told"


def choose_samples(found: Beton, count: int) -> np.ndarray:
    """Samples for a look at a file: evenly spaced through the classes, then through each class; the same every time."""
    ids = np.arange(found.num_samples)
    if "label" in found.field_names:
        ids = np.argsort(found.labels, kind="stable")
    return ids[spread(len(ids), count)]


def decode_samples(found: Beton, samples: np.ndarray) -> list[np.ndarray | str]:
    """Whole images, uint8 (H, W, 3) each, or what is wrong with one."""
    images = found.column("image")
    decoded: list[np.ndarray | str] = []
    for sample, content in zip(samples, read_stored(found, samples), strict=True):
        row = images[sample]
        if row["mode"] == beton.MODE_RAW:
            decoded.append(content.reshape(int(row["height"]), int(row["width"]), 3))
            continue
        try:
            decoded.append(jpeg.decode(content))
        except (ValueError, MemoryError) as error:
            decoded.append(str(error) or "its header asks for more memory than there is")
    return decoded


def fit_into_squares(images: Sequence[np.ndarray], most_px: int) -> np.ndarray:
    """Images (H, W, 3) shrunk to fit squares and centred on white, uint8 (N, S, S, 3).

    S is the longest side of all, or `most_px` where that is less.
    """
    import cv2

    side = min(most_px, max(max(image.shape[:2]) for image in images))
    squares = np.full((len(images), side, side, 3), _BACKGROUND, np.uint8)
    for square, image in zip(squares, images, strict=True):
        height, width = image.shape[:2]
        ratio = min(1.0, side / max(height, width))
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        if ratio < 1:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        top, left = (side - size[1]) // 2, (side - size[0]) // 2
        square[top : top + size[1], left : left + size[0]] = image
    return squares
