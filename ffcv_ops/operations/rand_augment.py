"""RandAugment, TrivialAugmentWide and random erasing on 8-bit images, in place, between the crop and the mixing.

The policies are timm 1.0.31's ``rand-...`` strings (Cubuk et al., arXiv 1909.13719) and torchvision's
TrivialAugmentWide (Mueller and Hutter, arXiv 2103.10158) and RandomErasing (Zhong et al., arXiv 1708.04896). A policy
draws, for every sample of a batch, a list of (operation, argument); the kernel then only applies it.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import State
from ffcv_ops._kernels import kernel
from ffcv_ops.operations.base import Batch, BatchOperation, take
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
from ffcv_ops.rng import ERASING, RAND_AUGMENT, uniform

IMAGENET_MEAN = (124, 116, 104)


@kernel
def augment_samples(worker, counter, images, operations, arguments, cubic, fill, scratch):
    """Apply to every image its operations, in place.

    Parameters
    ----------
    worker, counter
        As `Batch.run` passes them.
    images : ndarray of uint8, shape (N, H, W, 3), C-contiguous
    operations, arguments, cubic
        As `Draws` has them.
    fill : ndarray of uint8, shape (3,)
    scratch : Scratch
        Of all workers.
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


# --- what is drawn


@dataclass(frozen=True)
class Draws:
    """What happens to each image of a batch.

    Attributes
    ----------
    operations : ndarray of int64, shape (N, L)
        `pillow_ops`' constants, in the order in which they are applied.
    arguments : ndarray of float64, shape (N, L)
        In the units of each operation's function.
    cubic : ndarray of bool, shape (N, L)
        Bicubic instead of bilinear, for operations that interpolate.
    """

    operations: np.ndarray
    arguments: np.ndarray
    cubic: np.ndarray


@kernel
def _uniforms_into(seed, epoch, sample_ids, copies, stream, numbers):
    for i in range(len(sample_ids)):
        for index in range(numbers.shape[1]):
            numbers[i, index] = uniform(seed, epoch, sample_ids[i], copies[i], stream, index)


def _uniforms(batch: Batch, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """The first numbers of every sample's stream, float64 (N, *shape)."""
    numbers = np.empty((len(batch.sample_ids), math.prod(shape)))
    _uniforms_into(batch.seed, batch.epoch, batch.sample_ids, batch.copies, stream, numbers)
    return numbers.reshape(-1, *shape)


class Augmentation(BatchOperation):
    """Operations drawn for each image, applied in place to a uint8 array (N, H, W, 3); comes before ToTensor.

    Parameters
    ----------
    fill : sequence of 3 int
        Colour of what a shift or turn brings in from outside the image, 0 to 255.
    """

    def __init__(self, fill: Sequence[int]):
        super().__init__()
        self.fill = _colour(fill)

    @abstractmethod
    def draw(self, batch: Batch, size: tuple[int, int]) -> Draws:
        """The operations of a batch, a function of its seed, epoch, sample ids and copies and the size of its images.

        Parameters
        ----------
        batch : Batch
        size : tuple of int
            Height and width, px.

        Returns
        -------
        Draws
        """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        _check_place(self, previous_state)
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Any:
        # the scratch of one batch after another: (number of workers, height, width) -> arrays
        kept: dict[tuple[int, int, int], Scratch] = {}

        def augment(images: np.ndarray, _: None, batch: Batch) -> np.ndarray:
            _, height, width, _ = images.shape
            key = (batch.num_workers, height, width)
            if key not in kept:
                kept.clear()
                kept[key] = build_scratch(*key)
            drawn = self.draw(batch, (height, width))
            batch.run(augment_samples, images, drawn.operations, drawn.arguments, drawn.cubic, self.fill, kept[key])
            return images

        return augment


def _colour(fill: Sequence[int]) -> np.ndarray:
    if len(fill) != 3 or not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"fill is {fill}; it must be 3 values from 0 to 255")
    return np.array(fill, dtype=np.uint8)


def _check_place(operation: BatchOperation, previous_state: State) -> None:
    if previous_state.dtype != np.dtype("u1") or previous_state.shape[-1] != 3:
        raise ValueError(
            f"{type(operation).__name__} needs uint8 arrays (H, W, 3), not {previous_state.dtype} "
            f"{previous_state.shape}: put it after the decoder and before ToTensor"
        )


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


# Argument at a share (level / 10) of an operation's strength, a sign and an image size; then the same under inc1.
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

# "tweights" of timm 1.0.31, and "w0" of the versions before it, in the order of the table
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
        m: strength, 0 to 10 unless `magnitude_max` allows more.
    magnitude_std : float
        mstd: standard deviation of the strength; above 100 it is uniform between 0 and `magnitude`.
    magnitude_max : int
        mmax: upper bound of the strength.
    num_layers : int
        n: operations drawn for an image.
    prob : float
        p: probability that a drawn operation is applied.
    increasing : bool
        inc: strength grows with the magnitude for every operation.
    weights : str or None
        "w0" or "tweights": draw operations by these weights, each at most once; None: evenly, with repetition.
    """

    magnitude: int = 10
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    num_layers: int = 2
    prob: float = 0.5
    increasing: bool = False
    weights: str | None = None


def read_rand_augment(text: str) -> RandAugmentSettings:
    """Read timm's string, such as ``rand-m7-mstd0.5-inc1``.

    Parameters
    ----------
    text : str
        ``rand`` and any of m, n, mmax (whole numbers), mstd, p (numbers), inc (0 or 1), w0 or tweights, joined by
        dashes.

    Returns
    -------
    RandAugmentSettings

    Raises
    ------
    ValueError
        For a part that is unknown, given twice or out of range.
    """
    first, *parts = text.split("-")
    if first != "rand":
        raise ValueError(f"{text!r} is not a RandAugment string; write one such as 'rand-m7-mstd0.5-inc1'")
    given: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"(m|n|mmax|inc)(\d+)|(mstd|p)(\d+\.?\d*)|(w0|tweights)", part)
        if match is None:
            raise ValueError(
                f"unknown part {part!r} in {text!r}: m, n, mmax take a whole number, mstd, p a number, inc 0 or 1; "
                "w0 and tweights stand alone"
            )
        whole_key, whole, key, number, weights = match.groups()
        name = _PARTS[whole_key or key or "w"]
        if name in given:
            raise ValueError(f"{text!r} gives {name} twice")
        given[name] = weights or (int(whole) if whole else float(number))
    if given.get("prob", 0) > 1 or given.get("num_layers", 1) < 1 or given.get("increasing", 0) > 1:
        raise ValueError(f"{text!r}: p must be 0 to 1, n at least 1, inc 0 or 1")
    given["increasing"] = bool(given.get("increasing", False))
    settings = RandAugmentSettings(**given)
    if settings.weights and settings.num_layers > np.count_nonzero(_WEIGHTS[settings.weights]):
        raise ValueError(f"{text!r}: {settings.weights} draws each operation once, and there are fewer than n")
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
    """RandAugment as timm 1.0.31 does it, with Pillow's bytes.

    uint8 array (N, H, W, 3), changed in place. Interpolation is bilinear or bicubic by chance, as there. Where timm
    would keep 0 bits (posterize at magnitude 10 under inc1), which recent Pillow refuses, the image turns black, as it
    did in older ones.

    Parameters
    ----------
    config : str
        See `read_rand_augment`.
    fill : sequence of 3 int
        Colour from outside the image, 0 to 255. The default, ImageNet's mean, is what timm's training passes.

    Raises
    ------
    ValueError
        If `config` or `fill` is wrong.
    """

    def __init__(self, config: str, fill: Sequence[int] = IMAGENET_MEAN):
        super().__init__(fill)
        self.settings = read_rand_augment(config)

    def draw(self, batch: Batch, size: tuple[int, int]) -> Draws:
        settings = self.settings
        num_choices = max(len(_RAND_TABLE), settings.num_layers)
        numbers = _uniforms(batch, RAND_AUGMENT, (num_choices + 6 * settings.num_layers,))
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
        """Rows of the table, int64 (N, num_layers), from uniform numbers (N, rows of the table or more)."""
        num_layers = self.settings.num_layers
        if self.settings.weights is None:
            return (numbers[:, :num_layers] * len(_RAND_TABLE)).astype(np.int64)
        # the first to arrive, at these rates, are a draw by weight without repetition
        with np.errstate(divide="ignore"):
            arrival = -np.log1p(-numbers) / np.array(_WEIGHTS[self.settings.weights])
        return np.argsort(arrival, axis=1, kind="stable")[:, :num_layers]


# --- TrivialAugmentWide


def _trivial_table() -> tuple[np.ndarray, np.ndarray]:
    """Operations, int64 (14,), and their arguments, float64 (14, 2, 31): by sign and magnitude."""
    signs = np.array([[-1.0], [1.0]])

    def spaced(largest: float) -> np.ndarray:
        # by torch, because float32 decides into which pixel a translation is truncated
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
    """One operation of random strength for each image, as torchvision's ``TrivialAugmentWide(interpolation=BILINEAR)``.

    uint8 array (N, H, W, 3), changed in place; black from outside the image. torchvision's own default is nearest
    neighbour; bilinear is what its training reference passes, and with it made its weights.
    """

    def __init__(self) -> None:
        super().__init__(fill=(0, 0, 0))

    def draw(self, batch: Batch, size: tuple[int, int]) -> Draws:
        numbers = _uniforms(batch, RAND_AUGMENT, (3, 1))
        rows = (numbers[:, 0] * len(_TRIVIAL_OPERATIONS)).astype(np.int64)
        magnitudes = (numbers[:, 1] * 31).astype(np.int64)
        signs = (numbers[:, 2] < 0.5).astype(np.int64)
        arguments = _TRIVIAL_ARGUMENTS[rows, signs, magnitudes]
        return Draws(_TRIVIAL_OPERATIONS[rows], arguments, np.zeros(rows.shape, dtype=np.bool_))


# --- random erasing


class RandomErasing(BatchOperation):
    """Paint over a rectangle of some images, as torchvision's ``RandomErasing(p)`` with its default scale and ratio.

    uint8 array (N, H, W, 3), changed in place. torchvision erases after normalisation, with 0; here the colour is the
    mean, which normalises to 0 within the rounding of the mean to whole values.

    Parameters
    ----------
    prob : float
        Probability that an image loses a rectangle.
    fill : sequence of 3 int
        The rectangle's colour, 0 to 255.

    Raises
    ------
    ValueError
        If `prob` is not a probability, or `fill` not a colour.
    """

    scale = (0.02, 0.33)
    ratio = (0.3, 3.3)
    num_attempts = 10

    def __init__(self, prob: float, fill: Sequence[int] = IMAGENET_MEAN):
        super().__init__()
        if not 0 <= prob <= 1:
            raise ValueError(f"prob is {prob}; it must be 0 to 1")
        self.prob = prob
        self.fill = _colour(fill)

    def draw(self, batch: Batch, size: tuple[int, int]) -> np.ndarray:
        """Top, bottom, left, right of each image's rectangle, px, int64 (N, 4); all 0 where nothing is erased."""
        height, width = size
        numbers = _uniforms(batch, ERASING, (1 + self.num_attempts, 4))
        erased, (area, ratio, y, x) = numbers[:, 0, 0] < self.prob, np.moveaxis(numbers[:, 1:], 2, 0)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        low, high = np.log(self.ratio)
        ratio = np.exp(low + (high - low) * ratio)
        tall, wide = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (tall < height) & (wide < width)
        top, left = np.floor(y * (height - tall + 1)), np.floor(x * (width - wide + 1))
        boxes = np.stack([top, top + tall, left, left + wide], axis=2).astype(np.int64)
        boxes = boxes[np.arange(len(boxes)), fits.argmax(axis=1)]
        boxes[~(erased & fits.any(axis=1))] = 0
        return boxes

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        _check_place(self, previous_state)
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Any:
        def erase(images: np.ndarray, _: None, batch: Batch) -> np.ndarray:
            boxes = self.draw(batch, images.shape[1:3])
            for i in np.flatnonzero(boxes[:, 1] > boxes[:, 0]):
                top, bottom, left, right = boxes[i]
                images[i, top:bottom, left:right] = self.fill
            return images

        return erase
