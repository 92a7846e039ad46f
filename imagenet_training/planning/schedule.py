"""The schedules of a run: the learning rate by its place in the epochs, the training resolution by epoch."""

import functools
import math
from collections.abc import Callable

from imagenet_training.planning.recipe import Recipe
from imagenet_training.planning.sections import LearningRate


def cyclic_lr(epoch: int, *, lr: float, peak_epoch: int, epochs: int) -> float:
    """Return ffcv-imagenet's ``get_cyclic_lr``: linear from 1e-4 of the peak at epoch 0 to the peak, then to 0.

    Parameters
    ----------
    epoch : int
        Epochs done, 0 to ``epochs``.
    lr : float
        The peak.
    peak_epoch, epochs : int
        Epochs of the peak and of 0. If the peak is beyond the end, the rate only rises.
    """
    if epoch < peak_epoch:
        return lr * (1e-4 + (1 - 1e-4) * epoch / peak_epoch)
    if epoch >= epochs:
        return 0.0
    return lr * (epochs - epoch) / (epochs - peak_epoch)


def step_lr(epoch: int, *, lr: float, ratio: float, length: int, epochs: int) -> float:
    """Return ffcv-imagenet's ``get_step_lr``: times ``ratio`` after every ``length`` epochs, 0 at the end."""
    return 0.0 if epoch >= epochs else lr * ratio ** (epoch // length)


def cosine_lr(progress: float, *, lr: float, min_lr: float) -> float:
    """Return half a cosine from ``lr`` at progress 0 to ``min_lr`` at 1 (SGDR, arXiv 1608.03983, no restarts)."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def resolution_at(epoch: int, *, min_res: int, max_res: int, start_ramp: int, end_ramp: int) -> int:
    """Return the side of the training crops in px, as ffcv-imagenet's ``get_resolution``.

    It is ``min_res`` up to epoch ``start_ramp``, and ``max_res`` from epoch ``end_ramp`` on. Between the two it is the
    multiple of 32 nearest to the straight line; a half goes to the even multiple.
    """
    if epoch <= start_ramp:
        return min_res
    if epoch >= end_ramp:
        return max_res
    on_line = min_res + (max_res - min_res) * (epoch - start_ramp) / (end_ramp - start_ramp)
    return round(on_line / 32) * 32


def resolution_of(recipe: Recipe) -> Callable[[int], int]:
    """Return the side of the training crops in px as a function of the epoch, counted from 0; see `resolution_at`."""
    resolution = recipe.resolution
    return functools.partial(
        resolution_at,
        min_res=resolution.min_res,
        max_res=resolution.max_res,
        start_ramp=resolution.start_ramp,
        end_ramp=resolution.end_ramp,
    )


def build_lr(settings: LearningRate, *, peak: float, epochs: int, steps_per_epoch: int) -> Callable[[float], float]:
    """Return the learning rate as a function of the optimizer step, counted from 0 over an undisturbed run.

    A run that was resumed with another batch asks for the step that its epoch and samples would be at; see
    `imagenet_training.planning.plan.RunPlan.step_at`. That may be a fraction.

    ``cyclic`` and ``step`` follow ffcv-imagenet: their values at the starts of epochs are joined by straight lines, so
    ``step`` falls over the epoch before a factor applies. ``cosine`` and ``step`` may start with a warm-up: over
    ``lr.warmup_epochs`` the rate rises linearly, from ``lr.warmup_lr`` times its value to all of it. The cosine begins
    after the warm-up, while ``step`` counts its epochs from the first.

    Parameters
    ----------
    peak : float
        Peak learning rate.
    """
    total_steps, warmup_steps = steps_per_epoch * epochs, settings.warmup_epochs * steps_per_epoch

    def cyclic(step: float) -> float:
        at_epoch = functools.partial(cyclic_lr, lr=peak, peak_epoch=settings.lr_peak_epoch, epochs=epochs)
        return _on_line(at_epoch, step, steps_per_epoch)

    def step_by_step(step: float) -> float:
        at_epoch = functools.partial(
            step_lr, lr=peak, ratio=settings.step_ratio, length=settings.step_length, epochs=epochs
        )
        return _on_line(at_epoch, step, steps_per_epoch)

    def cosine(step: float) -> float:
        progress = max(0.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return cosine_lr(progress, lr=peak, min_lr=settings.min_lr)

    shape = {"cyclic": cyclic, "step": step_by_step, "cosine": cosine}[settings.lr_schedule_type]

    def lr_at(step: float) -> float:
        lr = shape(step)
        if step < warmup_steps:
            lr *= settings.warmup_lr + (1 - settings.warmup_lr) * step / warmup_steps
        return lr

    return lr_at


def _on_line(at_epoch: Callable[[int], float], step: float, steps_per_epoch: int) -> float:
    """Return the value on the straight line between the values at the starts of this epoch and the next."""
    epoch, steps_done = divmod(step, steps_per_epoch)
    start, end = at_epoch(int(epoch)), at_epoch(int(epoch) + 1)
    return start + (end - start) * steps_done / steps_per_epoch
