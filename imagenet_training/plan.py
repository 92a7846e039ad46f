"""The arithmetic of a run: batches, steps and learning rate, from a recipe, its data and its processes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ffcv_ops.errors import UserError
from ffcv_ops.settings.fields import show
from imagenet_training.recipe import Recipe

LR_BATCH_SIZE = 256
# Under repeated augmentation an epoch is a multiple of this many images, as that of timm's RepeatAugSampler.
REPEATED_ROUND = 256


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, once its data and its processes are known.

    Attributes
    ----------
    world_size, batch_size, accumulation : int
        Ranks, images a rank and batch, batches an optimizer step.
    global_batch_size : int
        Images an optimizer step: the product of the three.
    lr : float
        Peak learning rate.
    lr_arithmetic : str
        How it came about, such as ``0.5 x 128 / 256 = 0.25``.
    epochs, steps_per_epoch, total_steps : int
        Optimizer steps. What is left of an epoch after its last full step is not trained on.
    num_train, num_val : int
        Images of the two splits.
    ema_decay : float
        Of the moving average at each of its updates; 0 for none.
    notices : tuple of str
        What the user should know though nothing is wrong.
    """

    world_size: int
    batch_size: int
    accumulation: int
    global_batch_size: int
    lr: float
    lr_arithmetic: str
    epochs: int
    steps_per_epoch: int
    total_steps: int
    num_train: int
    num_val: int
    ema_decay: float
    notices: tuple[str, ...]


def plan(recipe: Recipe, *, world_size: int, num_train: int, num_val: int) -> Plan:
    """Work out a run's batches, steps and learning rate.

    The learning rate scales linearly (Goyal et al. 2017, arXiv 1706.02677): ``base_lr * global_batch_size / 256``,
    unless ``lr.lr`` is set.

    Parameters
    ----------
    recipe : Recipe
    world_size : int
        Processes that train.
    num_train, num_val : int
        Images of the two splits.

    Raises
    ------
    ValueError
        Where an epoch has not one optimizer step (unless the run only evaluates), a split has no images, or the
        schedule would rise instead of fall.
    """
    training = recipe.training
    global_batch_size = training.batch_size * world_size * training.accumulation
    seen = num_train
    if recipe.augmentation.repeats > 1 and num_train >= REPEATED_ROUND:
        seen = num_train // REPEATED_ROUND * REPEATED_ROUND
    steps_per_epoch = seen // (training.batch_size * world_size) // training.accumulation
    if num_val < 1:
        raise UserError(f"{recipe.data.val_dataset} has no images")
    if steps_per_epoch < 1 and not training.eval_only:
        fitting = num_train // (world_size * training.accumulation)
        hint = f"pass --batch_size {fitting} or less" if fitting else "use fewer processes or less accumulation"
        raise UserError(
            f"{recipe.data.train_dataset} has {num_train:,} images, fewer than the {global_batch_size:,} of one "
            f"optimizer step ({batch_arithmetic(training.batch_size, world_size, training.accumulation)}): {hint}"
        )
    lr, arithmetic = recipe.lr.lr, f"{show(recipe.lr.lr)} (lr.lr, {recipe.source('lr.lr')})"
    if lr is None:
        lr = recipe.lr.base_lr * global_batch_size / LR_BATCH_SIZE
        arithmetic = f"{show(recipe.lr.base_lr)} x {global_batch_size} / {LR_BATCH_SIZE} = {lr:.6g}"
    ema_decay = training.ema_decay
    if training.ema_rescale:
        ema_decay = rescaled_ema_decay(
            ema_decay, every=training.ema_every, global_batch_size=global_batch_size, epochs=training.epochs
        )
    if recipe.lr.min_lr > lr:
        raise UserError(f"lr.min_lr={show(recipe.lr.min_lr)} is above the peak learning rate, {arithmetic}")
    return Plan(
        world_size=world_size,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        global_batch_size=global_batch_size,
        lr=lr,
        lr_arithmetic=arithmetic,
        epochs=training.epochs,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps_per_epoch * training.epochs,
        num_train=num_train,
        num_val=num_val,
        ema_decay=ema_decay,
        notices=tuple(_batch_notices(recipe, world_size, global_batch_size)),
    )


def keep_global_batch(recipe: Recipe, before: Mapping[str, Any], *, world_size: int) -> Recipe:
    """Give a run that goes on with other processes the global batch it had, by other batches and accumulation.

    The recipe's batch size per process stays where it divides, and is never exceeded. A batch size or an accumulation
    that was changed since is the user's choice and stays.

    Parameters
    ----------
    recipe : Recipe
        Stays as it is. The recipe that is returned has a notice of the arithmetic.
    before : mapping
        The checkpoint's ``recipe``, ``asked_batch`` (its batch size and accumulation as asked for), ``world_size`` and
        ``global_batch_size``.
    world_size : int
        Processes that go on.

    Raises
    ------
    ValueError
        Where these processes cannot have that global batch, with the numbers of processes that can.
    """
    training, wanted, was = recipe.training, before["global_batch_size"], before["recipe"]["training"]
    asked = [training.batch_size, training.accumulation]
    if before.get("asked_batch", asked) != asked or training.batch_size * training.accumulation * world_size == wanted:
        return recipe
    shared = _shared_out(wanted, world_size, training.batch_size)
    arithmetic = batch_arithmetic(was["batch_size"], before["world_size"], was["accumulation"])
    if shared is None:
        able = [n for n in range(1, wanted + 1) if _shared_out(wanted, n, training.batch_size)]
        near = [n for n in able if n < world_size][-2:] + [n for n in able if n > world_size][:1]
        raise UserError(
            f"the run was saved at a global batch of {arithmetic} = {wanted}, which {world_size} processes cannot "
            f"share in batches near {training.batch_size}: start {' or '.join(map(str, near))} processes; another "
            "--batch_size changes the global batch, and with it learning rate and steps"
        )
    notice = (
        f"the run was saved at a global batch of {arithmetic} = {wanted}; this one keeps it with "
        f"{batch_arithmetic(shared[0], world_size, shared[1])}"
    )
    training = replace(training, batch_size=shared[0], accumulation=shared[1])
    return replace(recipe, training=training, notices=(*recipe.notices, notice))


def _shared_out(global_batch_size: int, world_size: int, batch_size: int) -> tuple[int, int] | None:
    """The largest batch, not above ``batch_size``, and its accumulation that make up a global batch.

    None where there is none, or only one so small that BatchNorm would see other statistics: under half of what fits.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        return None
    largest = min(batch_size, share)
    fitting = next(size for size in range(largest, 0, -1) if share % size == 0)
    return (fitting, share // fitting) if 2 * fitting >= largest else None


def rescaled_ema_decay(decay: float, *, every: int, global_batch_size: int, epochs: int) -> float:
    """A decay stated for one image and one epoch, rescaled to a run's updates as torchvision's references do.

    ``alpha' = min(1, (1 - decay) * global_batch_size * every / epochs)``, and the decay is ``1 - alpha'``.
    """
    return 1.0 - min(1.0, (1.0 - decay) * global_batch_size * every / epochs)


def _batch_notices(recipe: Recipe, world_size: int, global_batch_size: int) -> Iterable[str]:
    """Whether the global batch is the one that the recipe was published with, and what would make it so."""
    training, published = recipe.training, recipe.expected.global_batch_size
    if published in (None, global_batch_size) or training.eval_only:
        return
    per_accumulation = training.batch_size * world_size
    accumulation, left = divmod(published, per_accumulation)
    batch_size, rest = divmod(published, world_size * training.accumulation)
    remedy = ""
    if accumulation and not left:
        remedy = f"; --training.accumulation={accumulation} makes it the same"
    elif batch_size and not rest:
        remedy = f"; --batch_size {batch_size} makes it the same"
    yield f"the global batch is {global_batch_size}, and the recipe was published with {published}{remedy}"


def batch_arithmetic(batch_size: int, world_size: int, accumulation: int) -> str:
    return f"{batch_size} (batch size) x {world_size} (processes) x {accumulation} (accumulation)"
