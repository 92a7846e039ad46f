"""What changes over a run: the learning rate by step, the training resolution by epoch."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from imagenet_training.plan import Plan
from imagenet_training.recipe import Recipe


def cyclic_lr(epoch: int, *, lr: float, peak_epoch: int, epochs: int) -> float:
    """ffcv-imagenet's ``get_cyclic_lr``: linear from 1e-4 of the peak at epoch 0 to the peak, then linear to 0.

    Parameters
    ----------
    epoch : int
        Epochs done, 0 to ``epochs``.
    lr : float
        The peak.
    peak_epoch, epochs : int
        Where the peak lies; where 0 is reached. With a peak beyond the end, the rise is all there is.
    """
    if epoch < peak_epoch:
        return lr * (1e-4 + (1 - 1e-4) * epoch / peak_epoch)
    if epoch >= epochs:
        return 0.0
    return lr * (epochs - epoch) / (epochs - peak_epoch)


def step_lr(epoch: int, *, lr: float, ratio: float, length: int, epochs: int) -> float:
    """ffcv-imagenet's ``get_step_lr``: times ``ratio`` after every ``length`` epochs, 0 at the end."""
    return 0.0 if epoch >= epochs else lr * ratio ** (epoch // length)


def cosine_lr(progress: float, *, lr: float, min_lr: float) -> float:
    """Half a cosine from ``lr`` at progress 0 to ``min_lr`` at progress 1 (SGDR, arXiv 1608.03983, no restarts)."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def resolution_at(epoch: int, *, min_res: int, max_res: int, start_ramp: int, end_ramp: int) -> int:
    """Side of the training crops in px, as ffcv-imagenet's ``get_resolution``.

    ``min_res`` to epoch ``start_ramp`` and at it, ``max_res`` from epoch ``end_ramp`` on, and between them the
    multiple of 32 nearest to the line that joins them, halves to the even multiple.
    """
    if epoch <= start_ramp:
        return min_res
    if epoch >= end_ramp:
        return max_res
    on_line = min_res + (max_res - min_res) * (epoch - start_ramp) / (end_ramp - start_ramp)
    return round(on_line / 32) * 32


@dataclass(frozen=True)
class Schedule:
    """A run's schedules, as pure functions of where it stands.

    Attributes
    ----------
    lr : callable
        Learning rate of an optimizer step, counted from 0 over the run.
    resolution : callable
        Side of the training crops in px, of an epoch, counted from 0.
    """

    lr: Callable[[int], float]
    resolution: Callable[[int], int]


def build_resolution(recipe: Recipe) -> Callable[[int], int]:
    """The side of the training crops in px, of an epoch, counted from 0; see `resolution_at`."""
    resolution = recipe.resolution
    return functools.partial(
        resolution_at,
        min_res=resolution.min_res,
        max_res=resolution.max_res,
        start_ramp=resolution.start_ramp,
        end_ramp=resolution.end_ramp,
    )


def build_schedule(recipe: Recipe, plan: Plan) -> Schedule:
    """The schedules that a recipe asks for.

    ``cyclic`` and ``step`` follow ffcv-imagenet: their values at the starts of epochs, joined by straight lines, so
    that ``step`` falls over the epoch before a factor applies. ``cosine`` and ``step`` may begin with a warm-up: over
    ``lr.warmup_epochs`` the rate rises linearly, from ``lr.warmup_lr`` times its value to all of it; the cosine
    begins after it, while ``step`` counts its epochs from the first.

    Parameters
    ----------
    recipe : Recipe
    plan : Plan
        Peak learning rate, epochs, steps an epoch.
    """
    settings = recipe.lr
    at_epoch = {
        "cyclic": functools.partial(cyclic_lr, lr=plan.lr, peak_epoch=settings.lr_peak_epoch, epochs=plan.epochs),
        "step": functools.partial(
            step_lr, lr=plan.lr, ratio=settings.step_ratio, length=settings.step_length, epochs=plan.epochs
        ),
    }.get(settings.lr_schedule_type)
    warmup_steps = settings.warmup_epochs * plan.steps_per_epoch

    def lr(step: int) -> float:
        if at_epoch is None:
            progress = (step - warmup_steps) / (plan.total_steps - warmup_steps)
            value = cosine_lr(max(0.0, progress), lr=plan.lr, min_lr=settings.min_lr)
        else:
            epoch, steps_done = divmod(step, plan.steps_per_epoch)
            start, end = at_epoch(epoch), at_epoch(epoch + 1)
            value = start + (end - start) * steps_done / plan.steps_per_epoch
        if step < warmup_steps:
            value *= settings.warmup_lr + (1 - settings.warmup_lr) * step / warmup_steps
        return value

    return Schedule(lr=lr, resolution=build_resolution(recipe))
