"""Try the model of a run on a few images, before the run creates or moves anything."""

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffcv_ops.errors import UserError
from imagenet_training.models.architectures import (
    build_meta_model,
    build_model,
    find_library,
    model_arguments,
    reason_of,
)
from imagenet_training.models.layers import set_training_mode
from imagenet_training.models.precision import autocast
from imagenet_training.planning.plan import RunPlan
from imagenet_training.planning.recipe import Recipe
from imagenet_training.training.loss import Loss, main_logits, recipe_loss

SIZES = ("resolution.min_res", "resolution.max_res", "validation.resolution")
# Sides that are tried for every model, px: multiples of 32, and those of published weights between them.
CANDIDATES_PX = sorted({*range(32, 513, 32), 240, 260, 299, 300, 331, 336, 380, 456, 528, 560, 600, 1024})
# Side of the images that a CPU passes with values, px.
SMALL_PX = 64


@dataclass(frozen=True)
class Need:
    """A pass that the run will make in training or else in evaluation mode, forward only or back too.

    `key` is the setting of its size; "" for a size that only the ramp between two settings reaches.
    """

    key: str
    size_px: int
    trains: bool
    backward: bool = False


@dataclass
class Trial:
    """A copy of a model that passes images, so that the model itself is not changed.

    The model has no distributed wrapper. On the meta device only shapes are tried.
    """

    model: nn.Module
    loss: Loss
    num_classes: int
    precision: str

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        self.device = next(self.model.parameters()).device
        if self.device.type != "cuda":
            self.precision = "32"

    def errors_of(self, needs: Iterable[Need], batch_size: int, on_meta: "Trial | None") -> dict[Need, Exception]:
        """Pass a batch for each need. Return the errors.

        With a trial of the same model on the meta device, a need is met if the shapes fit there, and small images pass
        with values. Only if one of the two fails, images of the full size pass with values.
        """
        passes: dict[Need, bool] = {}
        errors: dict[Need, Exception] = {}
        for need in needs:
            if on_meta is not None and on_meta.error_of(need, need.size_px, batch_size) is None:
                small = replace(need, key="", size_px=min(need.size_px, SMALL_PX))
                if small not in passes:
                    passes[small] = self.error_of(small, small.size_px, batch_size) is None
                if passes[small]:
                    continue
            if (error := self.error_of(need, need.size_px, batch_size)) is not None:
                errors[need] = error
        return errors

    def error_of(self, need: Need, size_px: int, batch_size: int) -> Exception | None:
        """Pass a batch as a need describes, but of the given size. Return the error, if there is one.

        The pass leaves no trace in PyTorch's settings and generators.
        """
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # not for these few images
        python_state = random.getstate()
        gpus = [self.device] if self.device.type == "cuda" else []
        try:
            # Without a gradient, the pass is cheaper.
            with torch.random.fork_rng(gpus), torch.set_grad_enabled(need.backward):
                self._pass(need, size_px, batch_size)
        except Exception as error:  # each architecture fails with its own kind of error
            return error
        finally:
            torch.backends.cudnn.benchmark = benchmark
            random.setstate(python_state)
        return None

    def _pass(self, need: Need, size_px: int, batch_size: int) -> None:
        if need.trains:
            set_training_mode(self.model)
        else:
            self.model.eval()
        outputs = self._forward(size_px, batch_size)
        logits = main_logits(outputs) if need.trains else outputs
        shape, wanted = tuple(getattr(logits, "shape", ())), (batch_size, self.num_classes)
        if shape != wanted:
            raise TypeError(f"the model's output is a {type(logits).__name__} of shape {shape}, not {wanted}")
        if need.trains:
            loss = self.loss(outputs, torch.full(wanted, 1 / self.num_classes, device=self.device))
            if need.backward and self.device.type != "meta":
                loss.backward()
                self.model.zero_grad(set_to_none=True)

    def _forward(self, size_px: int, batch_size: int) -> torch.Tensor:
        images = torch.randn(batch_size, 3, size_px, size_px, device=self.device)
        if self.precision == "32":
            return self.model(images)
        with autocast(self.device, self.precision):
            return self.model(images)


def needs_of(recipe: Recipe, plan: RunPlan) -> list[Need]:
    """Return the passes that the run will make, each size once. Between the smallest and the largest only forward."""
    needs = []
    if not recipe.training.eval_only:
        resolution, sizes = recipe.resolution, sorted({plan.resolution(epoch) for epoch in range(plan.epochs)})
        keys = {resolution.max_res: "resolution.max_res", resolution.min_res: "resolution.min_res"}
        needs = [Need(keys.get(size, ""), size, True, size in (sizes[0], sizes[-1])) for size in sizes]
        needs.sort(key=lambda need: not need.backward)
    return [*needs, Need("validation.resolution", recipe.validation.resolution, False)]


def try_model(recipe: Recipe, plan: RunPlan, model: nn.Module, loss: Loss) -> None:
    """Pass a batch of at most two images of each size of the run through a copy of its model, with the run's loss.

    The model is on the device of the run, or on the meta device.

    Raises
    ------
    UserError
        If the model fails, with settings that fit as far as a search finds some, or if it ignores ``model.drop_path``.
    """
    trial = Trial(model, loss, recipe.model.known_num_classes, plan.precision)
    batch_size = min(2, plan.batch_size)

    on_meta = None
    if trial.device.type == "cpu":  # where two large images take seconds
        on_meta = Trial(copy.deepcopy(model).to("meta"), recipe_loss(recipe), trial.num_classes, "32")
    failed = trial.errors_of(needs_of(recipe, plan), batch_size, on_meta)
    if failed and trial.device.type == "meta":  # perhaps only because there are no values
        try_model(recipe, plan, build_model(**model_arguments(recipe)), loss)
    elif failed:
        need, error = next(iter(failed.items()))
        remedy = _remedy(recipe, failed, batch_size, trial)
        raise UserError(_message(recipe, need, error, batch_size, remedy))
    check_drop_path(recipe, plan)


def _message(recipe: Recipe, need: Need, error: Exception, batch_size: int, remedy: str) -> str:
    model = recipe.model
    library = find_library(model.arch, model.library)
    images, mode = "one image" if batch_size == 1 else "images", "training" if need.trains else "evaluation"
    source = recipe.shown(need.key) if need.key else "between resolution.min_res and resolution.max_res"
    return (
        f"{library}'s {model.arch} cannot take {images} of {need.size_px} px in {mode}, {source}: "
        f"{reason_of(error)}; {remedy}"
    )


def _remedy(recipe: Recipe, failed: dict[Need, Exception], batch_size: int, trial: Trial) -> str:
    """Find settings with which the passes that failed succeed, by trying. Return them as text."""
    if any(isinstance(error, torch.OutOfMemoryError) for error in failed.values()):
        return "end what else uses the GPU's memory, or choose a smaller --model.arch"
    if batch_size == 1 and not any(trial.error_of(need, need.size_px, 2) for need in failed):
        return "--batch_size 2 or more works"
    settings = {}
    for need in failed:
        if not need.key:
            settings["resolution.min_res"] = recipe.resolution.max_res
            continue
        known_px = candidates(trial.model) | {recipe.flat()[key] for key in SIZES}
        sizes = sorted(known_px, key=lambda size: abs(size - need.size_px))
        fitting = next((size for size in sizes if trial.error_of(need, size, batch_size) is None), None)
        if fitting is None:
            return f"none of {len(sizes)} sizes that were tried works: choose another --model.arch"
        settings[need.key] = fitting
    if recipe.resolution.min_res == recipe.resolution.max_res and "resolution.min_res" in settings:
        settings["resolution.max_res"] = settings["resolution.min_res"]
    flags = [f"--{key}={settings[key]}" for key in SIZES if key in settings]
    return f"{' '.join(flags)} {'works' if len(flags) == 1 else 'work'}"


def candidates(model: nn.Module) -> set[int]:
    """Return the sides that are tried to find one that fits, px: common ones, and those that the model declares.

    timm's models name the sizes of their published weights. Some take no other size, such as 196, 378 or 518 px.
    """
    published: Any = getattr(model, "pretrained_cfg", None) or {}
    declared = [published.get(key) or () for key in ("input_size", "test_input_size", "min_input_size")]
    return {*CANDIDATES_PX, *(size[-1] for size in declared if size and size[-1] == size[-2])}


class DrawCounter(TorchDispatchMode):
    """Count the operations that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def check_drop_path(recipe: Recipe, plan: RunPlan) -> None:
    """Check that a model with ``model.drop_path`` draws more random numbers in training than a model without."""
    if not recipe.model.drop_path or recipe.training.eval_only:
        return
    arguments, counts = model_arguments(recipe), []
    for drop_path in (recipe.model.drop_path, 0.0):
        model = build_meta_model(**{**arguments, "drop_path": drop_path}).train()
        images = torch.empty(2, 3, *[plan.resolution(0)] * 2, device="meta")
        with DrawCounter() as draws, torch.no_grad():
            try:
                model(images)
            except Exception:  # this architecture needs values
                return
        counts.append(draws.count)
    if counts[0] == counts[1]:
        raise UserError(
            f"{recipe.shown('model.drop_path')}: timm's {recipe.model.arch} accepts the setting and ignores it; pass "
            "--model.drop_path=0"
        )
