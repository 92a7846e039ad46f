"""A contact sheet: images over their captions, such as training images as the model gets them with their targets."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from timm.data import ImageNetInfo

from ffcv_ops.files import replacing

COLUMNS = 8
NUM_IMAGES = 4 * COLUMNS
MIN_CELL_PX = 160
CAPTION_PX = 40
GAP_PX = 10
HISTOGRAM_PX = 260


def denormalized(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images, float (N, 3, H, W), as 8-bit ones again, uint8 (N, H, W, 3); mean and std in 0 to 255."""
    channels_last = images.permute(0, 2, 3, 1).float().cpu()
    return (channels_last * torch.tensor(std) + torch.tensor(mean)).round().clamp(0, 255).byte().numpy()


def take_images(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], num_batches: int) -> tuple[torch.Tensor, ...]:
    """The first images of the first few batches, `NUM_IMAGES` in all, and their targets.

    Of several batches, because one batch may share one draw of what is mixed and how.

    Parameters
    ----------
    batches : iterable
        Images, float (N, 3, H, W), and targets, float (N, K); valid until the next is asked for.
    num_batches : int
        How many there are.
    """
    rows = min(NUM_IMAGES // COLUMNS, num_batches)
    taken = [
        (images[: NUM_IMAGES // rows].cpu().clone(), targets[: NUM_IMAGES // rows].cpu().clone())
        for (images, targets), _ in zip(batches, range(rows), strict=False)
    ]
    images, targets = zip(*taken, strict=True)
    return torch.cat(images), torch.cat(targets)


def class_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """Names to show for the classes of a data set: in words where they are numbers of ImageNet's WordNet."""
    info = ImageNetInfo()
    known = set(info.label_names())
    names = [f"class {label}" for label in range(num_classes)] if classes is None else classes
    return [info.label_name_to_description(name).split(",")[0] if name in known else name for name in names]


def caption(target: np.ndarray, names: Sequence[str]) -> str:
    """The classes of a target, float (K,), that stand out from the rest, heaviest first: a line each, at most two."""
    lines = []
    for label in np.argsort(-target, kind="stable")[:2]:
        if target[label] > target.min() + 1e-4:
            name = names[label]
            lines.append(f"{target[label]:.3f} {name if len(name) <= 20 else name[:19] + '…'}")
    return "\n".join(lines)


def draw_contact_sheet(
    images: np.ndarray,
    captions: Sequence[str],
    path: Path,
    *,
    title: str,
    histograms: Mapping[str, tuple[np.ndarray, np.ndarray]] = MappingProxyType({}),
) -> None:
    """Draw images in rows of eight, pixel for pixel or magnified by a whole number, over their captions.

    Parameters
    ----------
    images : ndarray of uint8, shape (N, H, W, 3)
    captions : sequence of str
        At most two lines each.
    path : Path
        Of the PNG, replaced whole.
    title : str
        Lines above the images.
    histograms : dict of str to tuple of ndarray, optional
        Drawn below the images: what is measured -> counts (B,) and the edges of the bins (B + 1,).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    factor = -(-MIN_CELL_PX // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    side = images.shape[1]
    num_rows = -(-len(images) // COLUMNS)
    title_px = 20 * (title.count("\n") + 1) + GAP_PX
    charts_px = HISTOGRAM_PX if histograms else 0
    width = COLUMNS * (side + GAP_PX) + GAP_PX
    height = num_rows * (side + CAPTION_PX) + title_px + charts_px + GAP_PX
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    FigureCanvasAgg(figure)
    figure.text(GAP_PX / width, 1 - GAP_PX / height, title, va="top", fontsize=10, parse_math=False)
    for number, (image, text) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = GAP_PX + column * (side + GAP_PX), GAP_PX + title_px + row * (side + CAPTION_PX)
        figure.figimage(image, left, height - top - side)
        figure.text(left / width, 1 - (top + side + 3) / height, text, va="top", fontsize=8, parse_math=False)
    for number, (what, (counts, edges)) in enumerate(histograms.items()):
        share = 1 / len(histograms)
        box = (number * share + 60 / width, 50 / height, share - 80 / width, (charts_px - 80) / height)
        axes = figure.add_axes(box)
        axes.bar(np.arange(len(counts)) + 0.5, counts, width=0.94)
        axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], rotation=45, ha="right")
        axes.tick_params(labelsize=7)
        axes.set_title(what, fontsize=9)
        axes.set_ylabel("images", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
