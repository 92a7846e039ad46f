"""Mixup and CutMix: one operation for the images of a batch, one operation for its targets.

Both operations draw the same `MixDraw`. It is a pure function of the seed, the epoch, the sample ids of the batch and
the image size. Therefore both agree, although they run at different times, on different threads and devices. Defaults
and arithmetic follow ``Mixup`` of timm 1.0.31 (Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899).

A mixed pixel is ``lam * own + (1 - lam) * partner``. The lam of Mixup is a multiple of 2**-16. The mixture of two 8-bit
values then fits into the 24 bits of a float32, and no device rounds it. Every device makes the same byte of the
mixture: the nearest one, and the upper one for a half.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import AllocationQuery, State
from ffcv_ops._kernels import kernel
from ffcv_ops.errors import UserError
from ffcv_ops.operations.base import Batch, BatchOperation
from ffcv_ops.operations.threads import take
from ffcv_ops.rng import MIX, batch_id, generator

_ONE = np.float32(1.0)
_HALF = np.float32(0.5)


@dataclass(frozen=True)
class MixDraw:
    """The draw of a batch: how much of its partner is mixed into each image, and where.

    The partner of the image i is the image N - 1 - i, as with ``flip(0)`` of timm. In an odd batch, which timm refuses,
    the middle image is its own partner and does not change.

    Attributes
    ----------
    lam : ndarray of float32, shape (N,)
        Share of the image's own target, from 0 to 1; 1 if nothing is mixed in. Under CutMix, lam is the share of pixels
        that are kept. Because lam is a multiple of 2**-24, 1 - lam is exact.
    box : ndarray of int64, shape (N, 4)
        Top, bottom, left and right of the region that changes, in px, ends exclusive. Under Mixup it is the whole
        image. Under CutMix it is the box, clipped to the image. It is empty if nothing is mixed in.
    use_cutmix : ndarray of bool, shape (N,)
        True if the region is copied from the partner (CutMix), False if it is a mixture (Mixup).
    """

    lam: np.ndarray
    box: np.ndarray
    use_cutmix: np.ndarray

    @property
    def own_weight(self) -> np.ndarray:
        """Return the weight of each image inside its own box: float32 (N,), a multiple of 2**-16."""
        return np.where(self.use_cutmix, np.float32(0), self.lam)

    @property
    def is_common(self) -> bool:
        """Return True if all images have the same box and weight."""
        return bool((self.box == self.box[0]).all() and (self.own_weight == self.own_weight[0]).all())


def draw_mix(
    seed: int,
    epoch: int,
    sample_ids: np.ndarray,
    size: tuple[int, int],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    per: str = "batch",
) -> MixDraw:
    """Draw the mixing of a batch: a pure function of its arguments and of the version of NumPy.

    Parameters
    ----------
    seed, epoch : int
        Seed of the loader, number of the epoch.
    sample_ids : ndarray of int64, shape (N,)
        Ids of the samples, in the order of the batch.
    size : tuple of two int
        Height and width of the images in px. Only CutMix depends on it.
    mixup_alpha, cutmix_alpha, prob, switch_prob, per
        As for `Mix`. At least one alpha is positive.

    Returns
    -------
    MixDraw
    """
    num_samples = len(sample_ids)
    num_draws = 1 if per == "batch" else num_samples
    draws = generator(seed, epoch, MIX, batch_id(sample_ids))
    applied = draws.random(num_draws) < prob
    use_cutmix = draws.random(num_draws) < (switch_prob if mixup_alpha > 0 else 1.0)
    use_cutmix &= cutmix_alpha > 0
    mixup_lam = draws.beta(mixup_alpha, mixup_alpha, num_draws) if mixup_alpha > 0 else np.ones(num_draws)
    cutmix_lam = draws.beta(cutmix_alpha, cutmix_alpha, num_draws) if cutmix_alpha > 0 else np.ones(num_draws)
    box, kept = cut_boxes(cutmix_lam, draws.random((2, num_draws)), size)

    box[~use_cutmix] = (0, size[0], 0, size[1])
    box[~applied] = 0
    lam = np.where(use_cutmix, kept, np.rint(mixup_lam * 2.0**16) / 2.0**16)
    lam[~applied] = 1.0
    return MixDraw(
        lam=np.broadcast_to(lam.astype(np.float32), num_samples).copy(),
        box=np.broadcast_to(box, (num_samples, 4)).copy(),
        use_cutmix=np.broadcast_to(use_cutmix & applied, num_samples).copy(),
    )


def cut_boxes(lam: np.ndarray, centre: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of CutMix as timm 1.0.31 does: sides ``int(side * sqrt(1 - lam))``, clipped to the image.

    Parameters
    ----------
    lam : ndarray of float64, shape (D,)
        Share of the image to keep.
    centre : ndarray of float64, shape (2, D)
        Centre of each box, as fractions of height and width in [0, 1).
    size : tuple of two int
        Height and width of the images in px.

    Returns
    -------
    box : ndarray of int64, shape (D, 4)
        Top, bottom, left and right in px.
    kept : ndarray of float64, shape (D,)
        Share of pixels outside the clipped box, rounded to multiples of 2**-24.
    """
    edges = []
    for side, position in zip(size, centre, strict=True):
        cut = (side * np.sqrt(1.0 - lam)).astype(np.int64)
        middle = (position * side).astype(np.int64)
        edges += [np.clip(middle - cut // 2, 0, side), np.clip(middle + (cut + 1) // 2, 0, side)]
    box = np.stack(edges, axis=1)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    return box, np.rint((1.0 - area / (size[0] * size[1])) * 2.0**24) / 2.0**24


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a small array to a device. Pinned memory is used, so that the CPU does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _channel_axis(shape: Sequence[int]) -> int:
    return -1 if shape[-1] == 3 else -3


def _height_and_width(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], shape[1]) if _channel_axis(shape) == -1 else (shape[1], shape[2])


@kernel
def _fill_weights_into(y, box, inside, weights):
    """Write the weight of an image's own bytes in row y: `inside` within the box, 1 elsewhere."""
    weights[:] = 1.0
    if box[0] <= y < box[1]:
        weights[3 * box[2] : 3 * box[3]] = inside


@kernel
def _mix_rows(first, second, first_weights, second_weights):
    """Mix two rows of bytes into each other, in place."""
    for x in range(len(first)):
        a = np.float32(first[x])
        b = np.float32(second[x])
        first[x] = np.int32(a * first_weights[x] + b * (_ONE - first_weights[x]) + _HALF)
        second[x] = np.int32(b * second_weights[x] + a * (_ONE - second_weights[x]) + _HALF)


@kernel
def mix_pairs(worker, counter, images, boxes, weights, scratch):
    """Mix the images i and N - 1 - i into each other, in place, two rows at a time.

    Parameters
    ----------
    worker, counter
        Passed by `Batch.run`.
    images : ndarray of uint8, shape (N, H, W * 3)
        The images. They are changed.
    boxes : ndarray of int64, shape (N, 4)
        See `MixDraw.box`.
    weights : ndarray of float32, shape (N,)
        See `MixDraw.own_weight`.
    scratch : ndarray of float32, shape (num_workers, 2, W * 3)
        Memory of the workers.
    """
    num_samples = len(images)
    while True:
        i = take(counter)
        if i >= num_samples // 2:
            return
        j = num_samples - 1 - i
        left = 3 * min(boxes[i, 2], boxes[j, 2])
        right = 3 * max(boxes[i, 3], boxes[j, 3])
        for y in range(min(boxes[i, 0], boxes[j, 0]), max(boxes[i, 1], boxes[j, 1])):
            _fill_weights_into(y, boxes[i], weights[i], scratch[worker, 0])
            _fill_weights_into(y, boxes[j], weights[j], scratch[worker, 1])
            _mix_rows(
                images[i, y, left:right],
                images[j, y, left:right],
                scratch[worker, 0, left:right],
                scratch[worker, 1, left:right],
            )


def mix_tensor(images: torch.Tensor, draw: MixDraw) -> None:
    """Mix a batch in place, on its device. The CPU does not wait for the device.

    Parameters
    ----------
    images : tensor of uint8 or float, shape (N, H, W, 3) or (N, 3, H, W), any strides
        The images. 8-bit values become those of `mix_pairs`: the exact mixture, with halves rounded up.
    draw : MixDraw
        The draw of the batch.
    """
    if images.is_floating_point() and draw.is_common:
        # Only the box is read and written, and each mixed value is rounded once, for every dtype.
        top, bottom, left, right = draw.box[0].tolist()
        region = (
            images[:, top:bottom, left:right]
            if _channel_axis(images.shape) == -1
            else images[:, :, top:bottom, left:right]
        )
        torch.lerp(region.flip(0), region, float(draw.own_weight[0]), out=region)
        return
    height, width = _height_and_width(images.shape[1:])
    box = _upload(draw.box, images.device)
    inner = _upload(draw.own_weight, images.device).view(-1, 1, 1)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    in_rows = (y >= box[:, :1]) & (y < box[:, 1:2])
    in_columns = (x >= box[:, 2:3]) & (x < box[:, 3:])
    weight = torch.where(in_rows[:, :, None] & in_columns[:, None, :], inner, 1.0)
    weight = weight.unsqueeze(_channel_axis(images.shape) % 4)
    mixed = images * weight + images.flip(0) * (1.0 - weight)
    images.copy_(mixed if images.is_floating_point() else mixed.add_(0.5))


def dense_targets_into(labels: torch.Tensor, draw: MixDraw | None, smoothing: float, targets: torch.Tensor) -> None:
    """Write the smoothed, mixed targets ``lam * s(y) + (1 - lam) * s(y of the partner)``.

    Parameters
    ----------
    labels : tensor of int64, shape (N,)
        The label y of each image.
    draw : MixDraw or None
        The draw of the batch; None if nothing is mixed.
    smoothing : float
        s(y) is ``smoothing / K`` in all K places, plus ``1 - smoothing`` at y.
    targets : tensor of float32, shape (N, K)
        The output, on the device of `labels`.
    """
    targets.fill_(smoothing / targets.shape[1])
    own = torch.ones(len(labels), device=labels.device)
    if draw is not None:
        own = _upload(draw.lam, labels.device)
        partner_labels = labels.flip(0)
        targets.scatter_add_(1, partner_labels[:, None], ((1.0 - smoothing) * (1.0 - own))[:, None])
    targets.scatter_add_(1, labels[:, None], ((1.0 - smoothing) * own)[:, None])


class Mix:
    """Mixup, CutMix, or either of them by chance, with label smoothing.

    Put `images` into the pipeline of the images, and `targets` into the pipeline of the labels of the same loader. If
    both alphas are 0, the images do not change, and the targets are smoothed only.

    Parameters
    ----------
    num_classes : int
        Number of classes K, the width of the targets.
    mixup_alpha, cutmix_alpha : float
        The parameter of Beta(alpha, alpha), from which lam is drawn; 0 turns Mixup or CutMix off.
    prob : float
        Probability that a batch (or an image) is mixed.
    switch_prob : float
        Probability of CutMix if both alphas are positive.
    smoothing : float
        Label smoothing, at least 0 and below 1. The loss must not smooth the targets again.
    per : {"batch", "element"}
        "batch": one lam and one box for the batch. "element": one for each image. timm calls these modes "batch" and
        "elem".

    Raises
    ------
    UserError
        If a value is outside its range.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        per: str = "batch",
    ):
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; it must be at least 1")
        if min(mixup_alpha, cutmix_alpha) < 0:
            raise UserError(f"mixup_alpha is {mixup_alpha} and cutmix_alpha {cutmix_alpha}; neither may be negative")
        if not (0 <= prob <= 1 and 0 <= switch_prob <= 1):
            raise UserError(f"prob is {prob} and switch_prob {switch_prob}; both are probabilities, 0 to 1")
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing is {smoothing}; it must be at least 0 and below 1")
        if per not in ("batch", "element"):
            raise UserError(f"per is {per!r}; it must be 'batch' or 'element'")
        self.num_classes = num_classes
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.smoothing = smoothing
        self.per = per
        self.size: tuple[int, int] | None = None

    def images(self) -> "MixImages":
        """Return the operation for images: arrays uint8 (N, H, W, 3), or tensors of any layout, dtype and device."""
        return MixImages(self)

    def targets(self) -> "MixTargets":
        """Return the operation for labels: it makes dense targets, a float32 tensor (N, num_classes)."""
        return MixTargets(self)

    @property
    def mixes(self) -> bool:
        """Return True if images are ever mixed."""
        return max(self.mixup_alpha, self.cutmix_alpha) > 0 and self.prob > 0

    def draw(self, batch: Batch) -> MixDraw | None:
        """Draw the mixing of a batch; return None if images are never mixed.

        Raises
        ------
        UserError
            If `images` is in no pipeline, so that the size of the images is unknown.
        """
        if not self.mixes:
            return None
        if self.size is None:
            raise UserError("the label's pipeline has targets() of this Mix; add its images() to the image's pipeline")
        return draw_mix(
            batch.seed,
            batch.epoch,
            batch.sample_ids,
            self.size,
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            prob=self.prob,
            switch_prob=self.switch_prob,
            per=self.per,
        )


class MixImages(BatchOperation):
    """The operation of a `Mix` for images. It changes the batch in place."""

    def __init__(self, mix: Mix):
        super().__init__()
        self.mix = mix

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        self.mix.size = _height_and_width(previous_state.shape)
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Any:
        mix = self.mix

        def mix_images(images: np.ndarray | torch.Tensor, _: None, batch: Batch) -> np.ndarray | torch.Tensor:
            draw = mix.draw(batch)
            if draw is None:
                return images
            size = _height_and_width(images.shape[1:])
            if size != mix.size:
                raise UserError(f"images are {size} px, but the epoch began with {mix.size}: targets would not match")
            if isinstance(images, torch.Tensor):
                mix_tensor(images, draw)
            else:
                assert images.dtype == np.uint8 and images.flags.c_contiguous
                rows = images.reshape(*images.shape[:2], -1)
                scratch = np.empty((batch.num_workers, 2, rows.shape[2]), dtype=np.float32)
                batch.run(mix_pairs, rows, draw.box, draw.own_weight, scratch)
            return images

        return mix_images


class MixTargets(BatchOperation):
    """The operation of a `Mix` for labels: int array or tensor, (N,) or (N, 1) -> float32 tensor (N, num_classes)."""

    def __init__(self, mix: Mix):
        super().__init__()
        self.mix = mix

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape = (self.mix.num_classes,)
        query = AllocationQuery(shape, dtype=torch.float32, device=previous_state.device)
        return replace(previous_state, jit_mode=False, shape=shape, dtype=torch.float32), query

    def generate_code(self) -> Any:
        mix = self.mix

        def mix_targets(labels: np.ndarray | torch.Tensor, targets: torch.Tensor, batch: Batch) -> torch.Tensor:
            labels = torch.as_tensor(labels).reshape(-1).long()
            if labels.device.type == "cpu":
                _check_labels(labels, batch.sample_ids, mix.num_classes)
            dense_targets_into(labels, mix.draw(batch), mix.smoothing, targets)
            return targets

        return mix_targets


def _check_labels(labels: torch.Tensor, sample_ids: np.ndarray, num_classes: int) -> None:
    wrong = torch.nonzero((labels < 0) | (labels >= num_classes)).flatten().tolist()
    if wrong:
        first = wrong[0]
        raise UserError(
            f"sample {sample_ids[first]} has label {labels[first].item()}, but num_classes is {num_classes}: "
            f"labels must be 0 to {num_classes - 1}"
        )
