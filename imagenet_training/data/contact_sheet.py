"""A contact sheet: images with captions, such as training images as the model gets them with their targets."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from ffcv_ops.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8
NUM_IMAGES = 4 * COLUMNS
MIN_CELL_PX = 160
CAPTION_PX = 40
GAP_PX = 10
HISTOGRAM_PX = 260
MAX_NAME_LENGTH = 20


def denormalized(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return normalised images, float (N, 3, H, W), as uint8 (N, H, W, 3). Mean and std are in the range 0 to 255."""
    channels_last = images.permute(0, 2, 3, 1).float().cpu()
    return (channels_last * torch.tensor(std) + torch.tensor(mean)).round().clamp(0, 255).byte().numpy()


def take_images(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], num_batches: int) -> tuple[torch.Tensor, ...]:
    """Return images, float (N, 3, H, W), and targets, float (N, K), of the first few of `num_batches` batches.

    N is at most `NUM_IMAGES`. The images come from several batches, because one batch may share a draw of Mixup or
    CutMix. A batch is valid until the next one is requested.
    """
    rows = min(NUM_IMAGES // COLUMNS, num_batches)
    taken = [
        (images[: NUM_IMAGES // rows].cpu().clone(), targets[: NUM_IMAGES // rows].cpu().clone())
        for (images, targets), _ in zip(batches, range(rows), strict=False)
    ]
    images, targets = zip(*taken, strict=True)
    return torch.cat(images), torch.cat(targets)


def class_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return a name to show for each class. An ImageNet class, such as ``n01440764``, gets its name in words."""
    if classes is None:
        return [f"class {label}" for label in range(num_classes)]
    if not any(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(classes)
    from timm.data import ImageNetInfo  # importing timm takes seconds

    info = ImageNetInfo()
    known = set(info.label_names())
    return [info.label_name_to_description(name).split(",")[0] if name in known else name for name in classes]


def caption(target: np.ndarray, names: Sequence[str]) -> str:
    """Return the classes with the highest weights in a target, float (K,): one line for each class, at most two.

    A class with the lowest weight in the target gets no line.
    """
    lines = []
    for label in np.argsort(-target, kind="stable")[:2]:
        if target[label] > target.min() + 1e-4:
            name = names[label] if len(names[label]) <= MAX_NAME_LENGTH else names[label][: MAX_NAME_LENGTH - 1] + "…"
            lines.append(f"{target[label]:.3f} {name}")
    return "\n".join(lines)


def draw_contact_sheet(
    images: np.ndarray,
    captions: Sequence[str],
    path: Path,
    *,
    title: str,
    histograms: Mapping[str, tuple[np.ndarray, np.ndarray]] = MappingProxyType({}),
) -> None:
    """Draw images, uint8 (N, H, W, 3), in rows of eight into a PNG, with captions of at most two lines.

    Small images are enlarged by a whole number. A character that Matplotlib's font does not have is drawn as a box. The
    title stands above the images. The histograms stand below, by title: counts (B,), and the edges of bins (B + 1,).
    """
    from matplotlib.figure import Figure

    factor = -(-MIN_CELL_PX // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    side = images.shape[1]
    num_rows = -(-len(images) // COLUMNS)
    title_px = 20 * (title.count("\n") + 1) + GAP_PX
    width = COLUMNS * (side + GAP_PX) + GAP_PX
    height = num_rows * (side + CAPTION_PX) + title_px + GAP_PX + (HISTOGRAM_PX if histograms else 0)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    figure.text(GAP_PX / width, 1 - GAP_PX / height, _drawable(title), va="top", fontsize=10, parse_math=False)
    for number, (image, text) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, bottom = GAP_PX + column * (side + GAP_PX), height - title_px - GAP_PX - row * (side + CAPTION_PX) - side
        figure.figimage(image, left, bottom)
        place = left / width, (bottom - 3) / height
        figure.text(*place, _drawable(text), va="top", fontsize=8, parse_math=False)
    _draw_histograms(figure, histograms, width, height)
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)  # a box shows it
        figure.savefig(temporary, format="png", dpi=100)


def _draw_histograms(
    figure: "Figure", histograms: Mapping[str, tuple[np.ndarray, np.ndarray]], width: int, height: int
) -> None:
    """Draw histograms side by side at the bottom of a figure of `width` x `height` px."""
    for number, (what, (counts, edges)) in enumerate(histograms.items()):
        share = 1 / len(histograms)
        box = (number * share + 60 / width, 50 / height, share - 80 / width, (HISTOGRAM_PX - 80) / height)
        axes = figure.add_axes(box)
        axes.bar(np.arange(len(counts)) + 0.5, counts, width=0.94)
        axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=45, ha="right")
        axes.tick_params(labelsize=7)
        axes.set_title(what, fontsize=9)
        axes.set_ylabel("images", fontsize=8)


def _drawable(text: str) -> str:
    """Return text without the surrogates that Python puts into a file's name for bytes that are no text."""
    return text.encode("utf-8", "replace").decode("utf-8")
