"""The arithmetic of a run: batches, steps, learning rate and schedules, from a recipe, its data and its ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.loading.epoch_length import samples_per_rank
from ffcv_ops.settings.fields import show
from imagenet_training.planning.class_weights import effective_number_weights
from imagenet_training.planning.recipe import Recipe
from imagenet_training.planning.schedule import build_lr, resolution_at
from imagenet_training.planning.sections import LearningRate

LR_BATCH_SIZE = 256
# The share of the first weights in a moving average that is worth a notice, and the share that the notice aims at.
_MUCH_OF_THE_START, _LITTLE_OF_THE_START = 0.05, 0.01
IMAGENET_NUM_TRAIN, IMAGENET_NUM_VAL, IMAGENET_NUM_CLASSES = 1_281_167, 50_000, 1000


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a run, once its data and its ranks are known.

    Attributes
    ----------
    world_size, batch_size, accumulation : int
        Ranks, images of a rank's batch, batches of an optimizer step.
    global_batch_size : int
        Images of an optimizer step: the product of the three.
    lr : float
        Peak learning rate.
    lr_arithmetic : str
        The arithmetic behind it, such as ``0.5 x 128 / 256 = 0.25``.
    epochs, steps_per_epoch, total_steps : int
        Optimizer steps. The images after the last full step of an epoch are not trained on.
    samples_per_epoch : int
        Samples that the loaders of all ranks draw for an epoch, with those after its last full step.
    num_train, num_val : int
        Images of the two splits.
    ema_decay : float
        Decay of the moving average at each of its updates; 0 for none.
    save_every_steps : int
        Steps between saves within an epoch; 0 for none.
    evaluates_every_epoch : bool
        Else only the last epoch is evaluated.
    lr_at : callable
        Learning rate at a place of the schedule; see `step_at`.
    resolution : callable
        Side of the training crops of an epoch, px.
    class_weights : tuple of float or None
        Weight of each class in the loss. None: all images count alike.
    resumed_from : str or None
        The checkpoint that the run continues from.
    """

    world_size: int
    batch_size: int
    accumulation: int
    global_batch_size: int
    lr: float
    lr_arithmetic: str
    epochs: int
    steps_per_epoch: int
    samples_per_epoch: int
    num_train: int
    num_val: int
    ema_decay: float
    precision: str
    save_every_steps: int
    evaluates_every_epoch: bool
    lr_at: Callable[[float], float]
    resolution: Callable[[int], int]
    class_weights: tuple[float, ...] | None = None
    resumed_from: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank trains on in an epoch."""
        return self.steps_per_epoch * self.accumulation

    def evaluates(self, epoch: int) -> bool:
        """Return True if the model is evaluated after an epoch."""
        return self.evaluates_every_epoch or epoch == self.epochs - 1

    def step_at(self, epoch: int, samples: int) -> float:
        """Return the place of a position in the schedule: the steps that an undisturbed run of this plan takes to it.

        It is an int, unless another global batch led to a position between two steps.
        """
        steps, rest = divmod(samples, self.global_batch_size)
        return epoch * self.steps_per_epoch + (steps + rest / self.global_batch_size if rest else steps)

    def steps_left(self, samples: int) -> int:
        """Return the full optimizer steps that are left of an epoch, so many samples of which are done."""
        return max(0, self.samples_per_epoch - samples) // self.global_batch_size

    def saves_after(self, step: int, samples: int) -> bool:
        """Return True if the run is saved once it has taken a number of steps, within an epoch that is not over."""
        due = self.save_every_steps and step % self.save_every_steps == 0
        return bool(due) and self.steps_left(samples) > 0


def plan_run(
    recipe: Recipe,
    *,
    world_size: int,
    num_train: int,
    num_val: int,
    class_counts: Sequence[int] | np.ndarray | None = None,
    device_type: str = "cuda",
    resumed: Mapping[str, Any] | None = None,
    resumed_from: str | None = None,
) -> RunPlan:
    """Work out a run's batches, steps, learning rate and schedules.

    The learning rate scales linearly (Goyal et al. 2017, arXiv 1706.02677): ``base_lr * global_batch_size / 256``,
    unless ``lr.lr`` is set.

    Parameters
    ----------
    num_train, num_val : int
        Images of the two splits.
    class_counts : sequence of int, optional
        Training images of each class, for ``training.class_weights``.
    device_type : {"cuda", "cpu"}
        Mixed precision needs a GPU.
    resumed, resumed_from : mapping and str, optional
        Content and path of the checkpoint that the run continues from, whose global batch is kept.

    Raises
    ------
    UserError
        If an epoch has not one optimizer step (unless the run only evaluates), a split has no images, these processes
        cannot share the global batch of the checkpoint, or the learning rate would rise to its end.
    """
    training = recipe.training
    batch_size, accumulation, notices = training.batch_size, training.accumulation, list[str]()
    if resumed is not None and not training.eval_only:
        batch_size, accumulation, kept = _kept_global_batch(recipe, resumed, world_size)
        notices.extend(kept)
    global_batch_size = batch_size * world_size * accumulation
    samples_per_epoch = epoch_samples(num_train, world_size, recipe.augmentation.repeats)
    steps_per_epoch = samples_per_epoch // global_batch_size
    if num_val < 1:
        raise UserError(f"{recipe.data.val_dataset} has no images")
    if steps_per_epoch < 1 and not training.eval_only:
        fitting = samples_per_epoch // (world_size * accumulation)
        hint = f"pass --batch_size {fitting} or less" if fitting else "use fewer processes or less accumulation"
        what, num_images = recipe.data.train_dataset, num_train
        if recipe.augmentation.repeats > 1:
            what, num_images = f"an epoch of {what} with {recipe.shown('augmentation.repeats')}", samples_per_epoch
        raise UserError(
            f"{what} has {num_images:,} images, fewer than the {global_batch_size:,} of one "
            f"optimizer step ({batch_arithmetic(batch_size, world_size, accumulation)}): {hint}"
        )
    lr, lr_arithmetic = _explained_lr(recipe, global_batch_size)
    ema_decay = training.ema_decay
    if training.ema_rescale:
        ema_decay = rescaled_ema_decay(
            ema_decay, every=training.ema_every, global_batch_size=global_batch_size, epochs=training.epochs
        )
    class_weights = None
    if training.class_weights == "auto" and class_counts is not None:
        class_weights = effective_number_weights(class_counts)
    precision = training.precision
    if device_type == "cpu" and precision != "32":
        precision = "32"
        does = "evaluating" if training.eval_only else "training"
        notices.append(f"no GPU is visible: {does} on the CPU, in 32-bit instead of {training.precision}")
    notices += _batch_notices(recipe, world_size, global_batch_size, batch_size, accumulation)
    notices += _precision_notices(recipe, precision, device_type)
    notices += _average_notices(recipe, ema_decay, global_batch_size, steps_per_epoch * training.epochs)
    return RunPlan(
        world_size=world_size,
        batch_size=batch_size,
        accumulation=accumulation,
        global_batch_size=global_batch_size,
        lr=lr,
        lr_arithmetic=lr_arithmetic,
        epochs=training.epochs,
        steps_per_epoch=steps_per_epoch,
        samples_per_epoch=samples_per_epoch,
        num_train=num_train,
        num_val=num_val,
        ema_decay=ema_decay,
        precision=precision,
        save_every_steps=training.save_every_steps,
        evaluates_every_epoch=recipe.logging.log_level > 0,
        lr_at=build_lr(recipe.lr, peak=lr, epochs=training.epochs, steps_per_epoch=steps_per_epoch),
        resolution=partial(resolution_at, recipe.resolution),
        class_weights=class_weights,
        resumed_from=resumed_from,
        notices=tuple(notices),
    )


def epoch_samples(num_train: int, world_size: int, repeats: int) -> int:
    """Return the number of samples that the training loaders of all ranks draw for an epoch."""
    return world_size * samples_per_rank(num_train, world_size, drop_last=True, repeats=repeats)


def peak_lr(settings: LearningRate, global_batch_size: int) -> float:
    """Return the peak learning rate of a global batch."""
    return settings.base_lr * global_batch_size / LR_BATCH_SIZE if settings.lr is None else settings.lr


def _explained_lr(recipe: Recipe, global_batch_size: int) -> tuple[float, str]:
    """Return the peak learning rate, and the arithmetic behind it."""
    settings, lr = recipe.lr, peak_lr(recipe.lr, global_batch_size)
    arithmetic = f"{show(settings.lr)} (lr.lr, {recipe.source('lr.lr')})"
    if settings.lr is None:
        arithmetic = f"{show(settings.base_lr)} x {global_batch_size} / {LR_BATCH_SIZE} = {lr:.6g}"
    if settings.min_lr > lr:
        raise UserError(f"lr.min_lr={show(settings.min_lr)} is above the peak learning rate, {arithmetic}")
    return lr, arithmetic


def _kept_global_batch(recipe: Recipe, resumed: Mapping[str, Any], world_size: int) -> tuple[int, int, list[str]]:
    """Return batch size and accumulation that keep the global batch of a resumed run, with a notice of a change.

    The recipe's batch size per process is kept if it divides this rank's share, and is never exceeded. A batch size or
    an accumulation that was changed since the checkpoint is the user's choice, and is not touched.

    Raises
    ------
    UserError
        If these processes cannot share that global batch, with the numbers of processes that can.
    """
    training, wanted, was = recipe.training, resumed["global_batch_size"], resumed["recipe"]["training"]
    batch_size, accumulation = training.batch_size, training.accumulation
    asked = [batch_size, accumulation]
    if resumed.get("asked_batch", asked) != asked or batch_size * accumulation * world_size == wanted:
        return batch_size, accumulation, []
    shared = _shared_batch(wanted, world_size, batch_size)
    arithmetic = batch_arithmetic(was["batch_size"], resumed["world_size"], was["accumulation"])
    if shared is None:
        able = [n for n in range(1, wanted + 1) if _shared_batch(wanted, n, batch_size)]
        near = [n for n in able if n < world_size][-2:] + [n for n in able if n > world_size][:1]
        raise UserError(
            f"the run was saved at a global batch of {arithmetic} = {wanted}, which {world_size} processes cannot "
            f"share in batches near {batch_size}: start {' or '.join(map(str, near))} processes; another "
            "--batch_size changes the global batch, and with it learning rate and steps"
        )
    notice = (
        f"the run was saved at a global batch of {arithmetic} = {wanted}; this one keeps it with "
        f"{batch_arithmetic(shared[0], world_size, shared[1])}"
    )
    return *shared, [notice]


def _shared_batch(global_batch_size: int, world_size: int, batch_size: int) -> tuple[int, int] | None:
    """Return the largest batch, at most ``batch_size``, and its accumulation that make up a global batch.

    None if there is none, or only one below half of what fits: BatchNorm would see other statistics.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        return None
    largest = min(batch_size, share)
    fitting = next(size for size in range(largest, 0, -1) if share % size == 0)
    return (fitting, share // fitting) if 2 * fitting >= largest else None


def rescaled_ema_decay(decay: float, *, every: int, global_batch_size: int, epochs: int) -> float:
    """Rescale a decay that is stated for one image and one epoch to a run's updates, as torchvision's references do.

    ``alpha' = min(1, (1 - decay) * global_batch_size * every / epochs)``, and the decay is ``1 - alpha'``.
    """
    return 1.0 - min(1.0, (1.0 - decay) * global_batch_size * every / epochs)


def _batch_notices(
    recipe: Recipe, world_size: int, global_batch_size: int, batch_size: int, accumulation: int
) -> Iterable[str]:
    """Yield a notice if the global batch is not the one that the recipe was published with."""
    published = recipe.expected.global_batch_size
    if published is None or published == global_batch_size or recipe.training.eval_only:
        return
    fitting_accumulation, left = divmod(published, batch_size * world_size)
    fitting_batch_size, rest = divmod(published, world_size * accumulation)
    remedy = ""
    if fitting_accumulation and not left:
        remedy = f"; --training.accumulation={fitting_accumulation} makes it the same"
    elif fitting_batch_size and not rest:
        remedy = f"; --batch_size {fitting_batch_size} makes it the same"
    yield f"the global batch is {global_batch_size}, and the recipe was published with {published}{remedy}"


def _average_notices(recipe: Recipe, decay: float, global_batch_size: int, num_steps: int) -> Iterable[str]:
    """Yield a notice if the run is so short that its moving average stays near the weights of the first steps."""
    training = recipe.training
    if not decay or training.eval_only:
        return
    num_moves = num_steps // training.ema_every - 1  # the first update copies the weights
    share = decay ** max(num_moves, 0)
    if share < _MUCH_OF_THE_START:
        return
    remedy = "--training.ema_decay=0 evaluates the weights themselves"
    if num_moves > 0:
        fitting = _LITTLE_OF_THE_START ** (1 / num_moves)
        if training.ema_rescale:
            fitting = max(0.0, 1 - (1 - fitting) * training.epochs / (global_batch_size * training.ema_every))
        remedy = f"--training.ema_decay={fitting:.6g} leaves {_LITTLE_OF_THE_START:.0%}, {remedy}"
    yield (
        f"after {num_moves + 1} updates, the moving average, which is evaluated, still holds {share:.0%} of the "
        f"weights of the first steps; {remedy}"
    )


def _precision_notices(recipe: Recipe, precision: str, device_type: str) -> Iterable[str]:
    """Yield what the precision means on a GPU."""
    training = recipe.training
    if device_type == "cuda" and precision == "32" and training.tf32:
        yield "32-bit products are made in TF32 where this GPU can: --training.tf32=0 makes them in full"
    if precision == "16-mixed" and training.optimizer == "lamb" and not training.eval_only:
        yield (
            "LAMB under 16-mixed has the host wait for the GPU in every step, to learn whether the gradient "
            "overflowed; --precision bf16-mixed has no such check"
        )


def batch_arithmetic(batch_size: int, world_size: int, accumulation: int) -> str:
    """Return the factors of a global batch as text."""
    return f"{batch_size} (batch size) x {world_size} (processes) x {accumulation} (accumulation)"
