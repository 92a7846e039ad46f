"""Check what changed settings mean for the position of a resumed run, and refuse what would lose samples.

A position is counted in epochs and samples, so a run can continue with another batch size, number of processes, number
of epochs or file. At the end of an epoch anything may change. Within an epoch, the rest must have the samples that are
left, each once. `content` is that of the checkpoint.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from ffcv_ops.errors import UserError
from imagenet_training.data.loaders import TrainingData
from imagenet_training.planning.plan import RunPlan, epoch_samples, peak_lr, rescaled_ema_decay
from imagenet_training.planning.recipe import Recipe
from imagenet_training.planning.schedule import build_lr
from imagenet_training.planning.sections import LearningRate
from imagenet_training.state import TrainState

_NUM_NAMED = 3


def check_rest_of_epoch(content: Mapping[str, Any], recipe: Recipe, plan: RunPlan, data: TrainingData) -> None:
    """Check that the rest of an interrupted epoch has the samples that are left, each once.

    Samples are dealt to the ranks one by one, so any batch size and number of ranks will do that shares what is left.
    In quasi-random order each rank has its own pages, so the number of ranks and the pages must be the same too.

    Raises
    ------
    UserError
        If the order of the epoch is another one, or these ranks cannot share the rest.
    """
    state = TrainState.of(content)
    if not state.samples or data.train is None:
        return
    was, file = content["recipe"], content["data"]["train"]
    kept: list[tuple[str, Any, Any]] = [
        ("training.seed", was["training"]["seed"], recipe.training.seed),
        ("data.order", was["data"]["order"], recipe.data.order),
        ("augmentation.repeats", was["augmentation"]["repeats"], recipe.augmentation.repeats),
        ("the number of training images", file["num_samples"], plan.num_train),
    ]
    if recipe.data.order == "quasi_random":
        kept.append(("the number of processes", content["world_size"], plan.world_size))
        kept.append(("the digest of data.train_dataset", file["digest"], data.train.digest))
    position = f"the checkpoint is within epoch {state.epoch}, after {state.samples:,} of its images"
    remedy = "until the epoch ends, or resume from a checkpoint of the end of an epoch"
    for name, before, now in kept:
        if before != now:
            raise UserError(
                f"{position}, and {name} was {before}: with {now}, the rest of the epoch would have other images. "
                f"Keep {before} {remedy}"
            )
    if state.samples % plan.world_size:
        raise UserError(
            f"{position}, and {plan.world_size} processes cannot share the rest equally. Start {content['world_size']} "
            f"processes {remedy}"
        )


def check_classes(content: Mapping[str, Any], data: TrainingData) -> None:
    """Check that each output of the model still stands for the same class, as far as the names are known."""
    before, now = content.get("classes"), data.train.classes if data.train is not None else None
    if data.train is None or before is None or now is None or list(before) == list(now):
        return
    pairs = list(zip_longest(before, now))
    moved = [(number, *pair) for number, pair in enumerate(pairs) if pair[0] != pair[1]]
    shown = "; ".join(f"{number} was {was}, and is {name}" for number, was, name in moved[:_NUM_NAMED])
    more = f"; and {len(moved) - _NUM_NAMED} more" if len(moved) > _NUM_NAMED else ""
    raise UserError(
        f"{data.train.path} numbers {len(moved):,} of {len(pairs):,} classes differently than the run that is resumed: "
        f"{shown}{more}. Resume with the file of that run, or begin a run from its weights with --model.weights"
    )


def keeps_best(content: Mapping[str, Any], recipe: Recipe, data: TrainingData) -> bool:
    """Return True if accuracies of the run that is resumed can be compared with those that will be measured now."""
    was, now = content["recipe"].get("validation", {}), recipe.to_dict()["validation"]
    same_settings = all(was.get(name, value) == value for name, value in now.items() if name != "batch_size")
    return same_settings and content["data"].get("val", {}).get("digest", data.val.digest) == data.val.digest


def best_notices(content: Mapping[str, Any], recipe: Recipe, data: TrainingData) -> Iterator[str]:
    """Yield a notice if the best accuracy so far was measured on other images, or with other settings."""
    state = TrainState.of(content)
    if state.best_epoch >= 0 and not keeps_best(content, recipe, data):
        yield (
            f"the best top-1 so far, {state.best_acc1:.3%} in epoch {state.best_epoch}, was measured on other images "
            "or with other settings of validation: it counts no more, and the next epoch replaces the best checkpoint"
        )


def position_notices(content: Mapping[str, Any], recipe: Recipe, plan: RunPlan) -> Iterator[str]:
    """Yield what changed settings do to the schedules of a resumed run at its position."""
    state = TrainState.of(content)
    if state.epoch >= plan.epochs:
        yield (
            f"nothing is left to train: the run has finished {state.epoch} epochs, and training.epochs is {plan.epochs}"
        )
        return
    earlier_batch, earlier_steps = content["global_batch_size"], _earlier_steps_per_epoch(content)
    if (earlier_batch, earlier_steps) != (plan.global_batch_size, plan.steps_per_epoch):
        yield (
            f"an epoch now has {plan.steps_per_epoch:,} steps of {plan.global_batch_size:,} images, and had "
            f"{earlier_steps:,} of {earlier_batch:,}; the schedules go on at the same place of epoch {state.epoch}"
        )
    lr = plan.lr_at(plan.step_at(state.epoch, state.samples))
    earlier_lr = _earlier_lr(content, state.epoch * earlier_steps + state.samples / earlier_batch, earlier_steps)
    if not math.isclose(lr, earlier_lr, rel_tol=1e-6):
        yield (
            f"the learning rate goes on at {lr:.6g}, as in a run of {plan.epochs} epochs with this recipe; the run "
            f"that is resumed would have gone on at {earlier_lr:.6g}"
        )
    yield from _moving_average_notices(content, recipe, plan)


def _moving_average_notices(content: Mapping[str, Any], recipe: Recipe, plan: RunPlan) -> Iterator[str]:
    """Yield a notice if the moving average forgets at another pace than in the run that is resumed."""
    training, was, earlier_batch = recipe.training, content["recipe"]["training"], content["global_batch_size"]
    if not (training.ema_decay and was["ema_decay"]):
        return
    images, earlier_images = plan.global_batch_size * training.ema_every, earlier_batch * was["ema_every"]
    earlier_decay = was["ema_decay"]
    if was["ema_rescale"]:
        earlier_decay = rescaled_ema_decay(
            earlier_decay, every=was["ema_every"], global_batch_size=earlier_batch, epochs=was["epochs"]
        )
    if (images, plan.ema_decay) == (earlier_images, earlier_decay):
        return
    remedy = ""
    if not training.ema_rescale:
        as_before = earlier_decay ** (images / earlier_images)
        remedy = f"; --training.ema_decay={as_before:.6g} would average over as many images as before"
    yield (
        f"the moving average now has decay {plan.ema_decay:.6g} every {images:,} images, and had "
        f"{earlier_decay:.6g} every {earlier_images:,}{remedy}"
    )


def _earlier_steps_per_epoch(content: Mapping[str, Any]) -> int:
    num_train, repeats = content["data"]["train"]["num_samples"], content["recipe"]["augmentation"]["repeats"]
    return epoch_samples(num_train, content["world_size"], repeats) // content["global_batch_size"]


def _earlier_lr(content: Mapping[str, Any], step: float, steps_per_epoch: int) -> float:
    """Return the learning rate of the run that is resumed, at a place of its own schedule."""
    known = {field.name for field in fields(LearningRate)}
    settings = LearningRate(**{name: value for name, value in content["recipe"]["lr"].items() if name in known})
    peak, epochs = peak_lr(settings, content["global_batch_size"]), content["recipe"]["training"]["epochs"]
    return build_lr(settings, peak=peak, epochs=epochs, steps_per_epoch=steps_per_epoch)(step)
