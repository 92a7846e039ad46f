"""The schedules of a run: the learning rate by its place in the epochs, the training resolution by epoch."""

import math
from collections.abc import Callable
from functools import partial

from ffcv_ops.errors import UserError
from imagenet_training.planning.sections import LearningRate, Resolution


def cyclic_lr(epoch: int, *, lr: float, peak_epoch: int, epochs: int) -> float:
    """Return ffcv-imagenet's ``get_cyclic_lr``: linear from 1e-4 of the peak at epoch 0 to the peak, then to 0.

    If the peak is beyond the end, the rate only rises.
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


def resolution_at(settings: Resolution, epoch: int) -> int:
    """Return the side of the training crops in px at an epoch, counted from 0, as ffcv-imagenet's ``get_resolution``.

    It is ``min_res`` up to epoch ``start_ramp``, and ``max_res`` from epoch ``end_ramp`` on. Between the two it is the
    multiple of 32 nearest to the straight line; a half goes to the even multiple.
    """
    if epoch <= settings.start_ramp:
        return settings.min_res
    if epoch >= settings.end_ramp:
        return settings.max_res
    grown = (settings.max_res - settings.min_res) * (epoch - settings.start_ramp)
    return round((settings.min_res + grown / (settings.end_ramp - settings.start_ramp)) / 32) * 32


def build_lr(settings: LearningRate, *, peak: float, epochs: int, steps_per_epoch: int) -> Callable[[float], float]:
    """Return the learning rate as a function of the optimizer step, counted from 0 over an undisturbed run.

    A run that was resumed with another batch asks for the step that its epoch and samples would be at; see
    `imagenet_training.planning.plan.RunPlan.step_at`. That may be a fraction.

    ``cyclic`` and ``step`` follow ffcv-imagenet: their values at the starts of epochs are joined by straight lines, so
    ``step`` falls over the epoch before a factor applies. ``cosine`` and ``step`` may start with a warm-up: over
    ``lr.warmup_epochs`` the rate rises linearly, from ``lr.warmup_lr`` times its value to all of it. The cosine begins
    after the warm-up, while ``step`` counts its epochs from the first.

    Raises
    ------
    UserError
        If there is no function for ``lr.lr_schedule_type``.
    """
    kind, warmup_steps = settings.lr_schedule_type, settings.warmup_epochs * steps_per_epoch
    by_epoch = {
        "cyclic": partial(cyclic_lr, lr=peak, peak_epoch=settings.lr_peak_epoch, epochs=epochs),
        "step": partial(step_lr, lr=peak, ratio=settings.step_ratio, length=settings.step_length, epochs=epochs),
    }
    by_progress = {"cosine": partial(cosine_lr, lr=peak, min_lr=settings.min_lr)}
    if kind not in by_epoch.keys() | by_progress.keys():
        raise UserError(f"lr.lr_schedule_type={kind} is no schedule of this version")

    def lr_at(step: float) -> float:
        if kind in by_progress:
            progress = max(0.0, (step - warmup_steps) / (steps_per_epoch * epochs - warmup_steps))
            lr = by_progress[kind](progress)
        else:
            epoch, steps_done = divmod(step, steps_per_epoch)
            start, end = by_epoch[kind](int(epoch)), by_epoch[kind](int(epoch) + 1)
            lr = start + (end - start) * steps_done / steps_per_epoch
        if step < warmup_steps:
            lr *= settings.warmup_lr + (1 - settings.warmup_lr) * step / warmup_steps
        return lr

    return lr_at
