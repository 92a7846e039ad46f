"""RandAugment and TrivialAugmentWide on 8-bit images, in place, between the crop and the mixing.

The policies are the ``rand-...`` strings of timm 1.0.31 (Cubuk et al., arXiv 1909.13719) and TrivialAugmentWide of
torchvision (Mueller and Hutter, arXiv 2103.10158). A policy draws a list of (operation, argument) for each sample of a
batch. One kernel applies these lists.

To add an operation, write its kernel and its branch of `apply_operation` in `pillow_ops`. Then add a row to
`_RAND_TABLE` or to `_trivial_table`.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ffcv_ops._kernels import kernel
from ffcv_ops.errors import UserError
from ffcv_ops.operations.base import Batch
from ffcv_ops.operations.image_operation import IMAGENET_MEAN, ImageOperation, read_colour
from ffcv_ops.operations.pillow_ops import (
    AUTO_CONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    IDENTITY,
    INVERT,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    SOLARIZE_ADD,
    TRANSLATE_X,
    TRANSLATE_Y,
    Scratch,
    apply_operation,
    build_scratch,
)
from ffcv_ops.operations.threads import take
from ffcv_ops.rng import RAND_AUGMENT


@kernel
def augment_samples(worker, counter, images, operations, arguments, cubic, fill, scratch):
    """Apply the drawn operations to each image, in place.

    Parameters
    ----------
    worker, counter
        Passed by `Batch.run`.
    images : ndarray of uint8, shape (N, H, W, 3), C-contiguous
        The images. They are changed.
    operations, arguments, cubic
        The attributes of `Draws`.
    fill : ndarray of uint8, shape (3,)
        Colour of pixels from outside the image.
    scratch : Scratch
        Memory of all workers; see `build_scratch`.
    """
    own = Scratch(
        scratch.source[worker],
        scratch.rows[worker],
        scratch.middle[worker],
        scratch.along[worker],
        scratch.down[worker],
        scratch.position[worker],
        scratch.outside[worker],
        scratch.centre[worker],
    )
    while True:
        i = take(counter)
        if i >= len(images):
            return
        for layer in range(operations.shape[1]):
            apply_operation(images[i], operations[i, layer], arguments[i, layer], cubic[i, layer], fill, own)


# --- drawing


@dataclass(frozen=True)
class Draws:
    """The operations that are drawn for each image of a batch.

    Attributes
    ----------
    operations : ndarray of int64, shape (N, L)
        Constants of `pillow_ops`, in the order in which they are applied.
    arguments : ndarray of float64, shape (N, L)
        The argument of each operation, in the unit of its function.
    cubic : ndarray of bool, shape (N, L)
        True for bicubic, False for bilinear interpolation. Other operations ignore it.
    """

    operations: np.ndarray
    arguments: np.ndarray
    cubic: np.ndarray


class Augmentation(ImageOperation):
    """The base of policies that draw operations for each image. Put it before ToTensor.

    The input is a uint8 array (N, H, W, 3), which is changed in place.

    Parameters
    ----------
    fill : sequence of 3 int
        Colour of pixels that a shift or a rotation takes from outside the image, 0 to 255.
    """

    def __init__(self, fill: Sequence[int]):
        super().__init__()
        self.fill = read_colour(fill)
        # the scratch of the last batch, by number of workers, height and width
        self._scratch: dict[tuple[int, int, int], Scratch] = {}

    @abstractmethod
    def draw(self, batch: Batch, size: tuple[int, int]) -> Draws:
        """Draw the operations of a batch: a function of its seed, epoch, sample ids, copies and the image size.

        Parameters
        ----------
        batch : Batch
        size : tuple of two int
            Height and width of the images in px.

        Returns
        -------
        Draws
        """

    def apply(self, images: np.ndarray, batch: Batch) -> None:
        _, height, width, _ = images.shape
        key = (batch.num_workers, height, width)
        if key not in self._scratch:
            self._scratch = {key: build_scratch(*key)}
        drawn = self.draw(batch, (height, width))
        arguments = drawn.operations, drawn.arguments, drawn.cubic, self.fill, self._scratch[key]
        batch.run(augment_samples, images, *arguments)


# --- RandAugment

Level = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]


def _signed(largest: float) -> Level:
    return lambda share, sign, size: sign * (share * largest)


def _enhance(share: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return share * 1.8 + 0.1


def _enhance_increasing(share: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.maximum(0.1, 1.0 + sign * (share * 0.9))


def _whole(largest: int, at_most: int) -> Level:
    return lambda share, sign, size: np.minimum(np.trunc(share * largest), at_most)


def _rest(largest: int) -> Level:
    return lambda share, sign, size: largest - np.minimum(np.trunc(share * largest), largest)


def _none(share: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.zeros_like(share)


# Each row has two functions for the argument of an operation, the second for inc1. Their parameters are a share of the
# strength (level / 10), a sign, and the image size.
_RAND_TABLE: dict[int, tuple[Level, Level]] = {
    AUTO_CONTRAST: (_none, _none),
    EQUALIZE: (_none, _none),
    INVERT: (_none, _none),
    ROTATE: (_signed(30.0), _signed(30.0)),
    POSTERIZE: (_whole(4, 4), _rest(4)),
    SOLARIZE: (_whole(256, 256), _rest(256)),
    SOLARIZE_ADD: (_whole(110, 128), _whole(110, 128)),
    COLOR: (_enhance, _enhance_increasing),
    CONTRAST: (_enhance, _enhance_increasing),
    BRIGHTNESS: (_enhance, _enhance_increasing),
    SHARPNESS: (_enhance, _enhance_increasing),
    SHEAR_X: (_signed(0.3), _signed(0.3)),
    SHEAR_Y: (_signed(0.3), _signed(0.3)),
    TRANSLATE_X: (lambda share, sign, size: sign * (share * 0.45) * size[1],) * 2,
    TRANSLATE_Y: (lambda share, sign, size: sign * (share * 0.45) * size[0],) * 2,
}

# The weights "tweights" of timm 1.0.31, and "w0" of earlier versions, in the order of the table.
_WEIGHTS = {
    "tweights": (0.25, 0.05, 0.05, 3, 0.05, 0.05, 0.05, 0.25, 0.05, 0.05, 0.25, 2, 2, 1, 1),
    "w0": (0.025, 0.005, 0, 0.3, 0, 0.005, 0.005, 0.025, 0.005, 0.005, 0.025, 0.2, 0.2, 0.1, 0.1),
}


@dataclass(frozen=True)
class RandAugmentSettings:
    """The parts of a ``rand-...`` string, with timm's defaults.

    Attributes
    ----------
    magnitude : int
        m: strength, from 0 to `magnitude_max`.
    magnitude_std : float
        mstd: standard deviation of the strength. Above 100, the strength is uniform between 0 and `magnitude`.
    magnitude_max : int
        mmax: upper bound of the strength.
    num_layers : int
        n: number of operations that are drawn for an image.
    prob : float
        p: probability that a drawn operation is applied.
    increasing : bool
        inc: the effect of every operation grows with the strength.
    weights : str or None
        "w0" or "tweights": draw operations by these weights, each at most once. None: draw evenly, with repetition.
    """

    magnitude: int = 10
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    num_layers: int = 2
    prob: float = 0.5
    increasing: bool = False
    weights: str | None = None


def read_rand_augment(text: str) -> RandAugmentSettings:
    """Read a string of timm, such as ``rand-m7-mstd0.5-inc1``.

    Parameters
    ----------
    text : str
        ``rand`` and any of these parts, joined by dashes: m, n, mmax (whole numbers), mstd, p (numbers), inc (0 or 1),
        w0 or tweights.

    Returns
    -------
    RandAugmentSettings

    Raises
    ------
    UserError
        If a part is unknown, appears twice or is outside its range.
    """
    first, *parts = text.split("-")
    if first != "rand":
        raise UserError(f"{text!r} is not a RandAugment string; write one such as 'rand-m7-mstd0.5-inc1'")
    given: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"(m|n|mmax|inc)(\d+)|(mstd|p)(\d+\.?\d*)|(w0|tweights)", part)
        if match is None:
            raise UserError(
                f"unknown part {part!r} in {text!r}: m, n, mmax take a whole number, mstd, p a number, inc 0 or 1; "
                "w0 and tweights stand alone"
            )
        whole_key, whole, key, number, weights = match.groups()
        name = _PARTS[whole_key or key or "w"]
        if name in given:
            raise UserError(f"{text!r} gives {name} twice")
        given[name] = weights or (int(whole) if whole else float(number))
    if given.get("prob", 0) > 1 or given.get("num_layers", 1) < 1 or given.get("increasing", 0) > 1:
        raise UserError(f"{text!r}: p must be 0 to 1, n at least 1, inc 0 or 1")
    given["increasing"] = bool(given.get("increasing", False))
    settings = RandAugmentSettings(**given)
    if settings.weights and settings.num_layers > np.count_nonzero(_WEIGHTS[settings.weights]):
        raise UserError(f"{text!r}: {settings.weights} draws each operation once, and there are fewer than n")
    return settings


_PARTS = {
    "m": "magnitude",
    "mstd": "magnitude_std",
    "mmax": "magnitude_max",
    "n": "num_layers",
    "p": "prob",
    "inc": "increasing",
    "w": "weights",
}


class RandAugment(Augmentation):
    """RandAugment of timm 1.0.31, with the bytes of Pillow.

    The input is a uint8 array (N, H, W, 3), which is changed in place. As in timm, the interpolation is bilinear or
    bicubic by chance. At magnitude 10 under inc1, posterize keeps 0 bits: recent versions of Pillow raise an error, and
    older versions give a black image. This operation gives a black image.

    Parameters
    ----------
    config : str
        See `read_rand_augment`.
    fill : sequence of 3 int
        Colour of pixels from outside the image, 0 to 255. The default is ImageNet's mean, as in the training of timm.

    Raises
    ------
    UserError
        If `config` or `fill` is wrong.
    """

    def __init__(self, config: str, fill: Sequence[int] = IMAGENET_MEAN):
        super().__init__(fill)
        self.settings = read_rand_augment(config)

    def draw(self, batch: Batch, size: tuple[int, int]) -> Draws:
        settings = self.settings
        num_choices = max(len(_RAND_TABLE), settings.num_layers)
        numbers = batch.draw_uniforms(RAND_AUGMENT, (num_choices + 6 * settings.num_layers,))
        choice, numbers = np.split(numbers, [num_choices], axis=1)
        applied, radius, angle, sign, cubic, level = np.split(numbers, 6, axis=1)
        rows = self._choose(choice)

        if settings.magnitude_std > 100:
            level = settings.magnitude * level
        else:
            normal = np.sqrt(-2.0 * np.log1p(-radius)) * np.cos(2.0 * np.pi * angle)
            level = settings.magnitude + settings.magnitude_std * normal
        share = np.clip(level, 0.0, settings.magnitude_max) / 10.0
        sign = np.where(sign < 0.5, -1.0, 1.0)

        table = np.array(list(_RAND_TABLE))
        operations = np.where(applied < settings.prob, table[rows], IDENTITY)
        arguments = np.zeros(rows.shape)
        for operation, levels in _RAND_TABLE.items():
            drawn = operations == operation
            arguments[drawn] = levels[settings.increasing](share[drawn], sign[drawn], size)
        return Draws(operations, arguments, cubic < 0.5)

    def _choose(self, numbers: np.ndarray) -> np.ndarray:
        """Choose rows of the table, int64 (N, num_layers), by uniform numbers (N, at least the number of rows)."""
        num_layers = self.settings.num_layers
        if self.settings.weights is None:
            return (numbers[:, :num_layers] * len(_RAND_TABLE)).astype(np.int64)
        # The first arrivals of Poisson processes with these rates are a draw by weight without repetition.
        with np.errstate(divide="ignore"):
            arrival = -np.log1p(-numbers) / np.array(_WEIGHTS[self.settings.weights])
        return np.argsort(arrival, axis=1, kind="stable")[:, :num_layers]


# --- TrivialAugmentWide


def _trivial_table() -> tuple[np.ndarray, np.ndarray]:
    """Return the operations, int64 (14,), and their arguments by sign and magnitude, float64 (14, 2, 31)."""
    signs = np.array([[-1.0], [1.0]])

    def spaced(largest: float) -> np.ndarray:
        # by torch in float32, because its rounding decides to which pixel a translation is truncated
        return signs * torch.linspace(0.0, largest, 31).double().numpy()

    unused = np.zeros((2, 31))
    table = {
        IDENTITY: unused,
        SHEAR_X: spaced(0.99),
        SHEAR_Y: spaced(0.99),
        TRANSLATE_X: -np.trunc(spaced(32.0)),
        TRANSLATE_Y: -np.trunc(spaced(32.0)),
        ROTATE: spaced(135.0),
        BRIGHTNESS: 1.0 + spaced(0.99),
        COLOR: 1.0 + spaced(0.99),
        CONTRAST: 1.0 + spaced(0.99),
        SHARPNESS: 1.0 + spaced(0.99),
        POSTERIZE: np.tile(8 - np.rint(np.arange(31) / 5), (2, 1)),
        SOLARIZE: np.tile(np.linspace(255.0, 0.0, 31), (2, 1)),
        AUTO_CONTRAST: unused,
        EQUALIZE: unused,
    }
    return np.array(list(table)), np.stack(list(table.values()))


_TRIVIAL_OPERATIONS, _TRIVIAL_ARGUMENTS = _trivial_table()


class TrivialAugmentWide(Augmentation):
    """One operation of random strength for each image: ``TrivialAugmentWide(interpolation=BILINEAR)`` of torchvision.

    The input is a uint8 array (N, H, W, 3), which is changed in place. Pixels from outside the image are black. The
    default of torchvision is nearest neighbour, but its training reference and its weights use bilinear.
    """

    def __init__(self) -> None:
        super().__init__(fill=(0, 0, 0))

    def draw(self, batch: Batch, size: tuple[int, int]) -> Draws:
        numbers = batch.draw_uniforms(RAND_AUGMENT, (3, 1))
        rows = (numbers[:, 0] * len(_TRIVIAL_OPERATIONS)).astype(np.int64)
        magnitudes = (numbers[:, 1] * 31).astype(np.int64)
        signs = (numbers[:, 2] < 0.5).astype(np.int64)
        arguments = _TRIVIAL_ARGUMENTS[rows, signs, magnitudes]
        return Draws(_TRIVIAL_OPERATIONS[rows], arguments, np.zeros(rows.shape, dtype=np.bool_))
