"""Draw a contact sheet of a ``.beton`` file: some of its images, and histograms of the sizes of all images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.describe import Description, read_stored, spread
from ffcv_ops.beton.reading import Beton
from ffcv_ops.codec import jpeg
from imagenet_training.data.contact_sheet import MIN_CELL_PX, NUM_IMAGES, class_names, draw_contact_sheet

_GREY = 128
_NAME_LENGTH = 24


def draw_file_sheet(found: Description, path: Path) -> int:
    """Draw a sheet into a PNG and return the number of images in it. An image that cannot be decoded is grey."""
    samples = choose_samples(found.beton, NUM_IMAGES)
    names = _names(found.beton, samples)
    images, captions = [], []
    for sample, name, image in zip(samples, names, decode_samples(found.beton, samples), strict=True):
        width, height = int(found.widths[sample]), int(found.heights[sample])
        size = f"{width} x {height} px, {found.size_bytes[sample] / 1e3:,.1f} kB"
        if isinstance(image, Exception):
            size = "unsupported JPEG" if isinstance(image, jpeg.UnsupportedJPEG) else "damaged"
            image = np.full((min(height, MIN_CELL_PX), min(width, MIN_CELL_PX), 3), _GREY, np.uint8)
        images.append(image)
        captions.append(f"{name[:_NAME_LENGTH]}\n{size}")
    shown = f"{len(samples)} of {found.beton.num_samples:,} images"
    title = f"{found.beton.path}: {shown}, evenly spaced through the classes"
    squares = fit_into_squares(images, MIN_CELL_PX)
    draw_contact_sheet(squares, captions, path, title=title, histograms=found.histograms())
    return len(samples)


def choose_samples(found: Beton, count: int) -> np.ndarray:
    """Return the ids of at most `count` samples, evenly spaced through the classes and then through each class."""
    ids = np.arange(found.num_samples)
    if "label" in found.field_names:
        ids = np.argsort(found.labels, kind="stable")
    return ids[spread(len(ids), count)]


def _names(found: Beton, samples: np.ndarray) -> list[str]:
    """Return the name of the class of each sample; empty names for a file without labels."""
    if "label" not in found.field_names:
        return [""] * len(samples)
    labels = found.labels[samples].tolist()
    if not found.classes:
        return [f"class {label}" for label in labels]
    names = class_names(found.classes, 0)
    return [names[label] for label in labels]


def decode_samples(found: Beton, samples: np.ndarray) -> list[np.ndarray | Exception]:
    """Return whole images, uint8 (H, W, 3) each. In the place of others is the reason."""
    images = found.column("image")
    decoded: list[np.ndarray | Exception] = []
    for sample, content in zip(samples, read_stored(found, samples), strict=True):
        row = images[sample]
        if row["mode"] == beton.MODE_RAW:
            decoded.append(content.reshape(int(row["height"]), int(row["width"]), 3))
            continue
        try:
            decoded.append(jpeg.decode(content))
        except (ValueError, MemoryError) as error:
            decoded.append(error)
    return decoded


def fit_into_squares(images: Sequence[np.ndarray], most_px: int) -> np.ndarray:
    """Shrink images (H, W, 3) to fit into squares and centre them on white: uint8 (N, S, S, 3).

    S is the longest side of all images, at most `most_px`.
    """
    side = min(most_px, max(max(image.shape[:2]) for image in images))
    squares = []
    for image in images:
        picture, square = Image.fromarray(image), Image.new("RGB", (side, side), "white")
        picture.thumbnail((side, side), Image.Resampling.BOX)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        squares.append(np.asarray(square))
    return np.stack(squares)
