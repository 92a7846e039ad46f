"""Evaluate without training: which weights, under which settings, and with which classes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torchvision

from ffcv_ops import UserError, machine
from ffcv_ops.settings.collect import DEFAULT
from ffcv_ops.settings.command_line import COMMAND_LINE
from ffcv_ops.settings.fields import show
from imagenet_training.data.classes import names_of_weights
from imagenet_training.data.loaders import TrainingData, build_val_loader, open_evaluation_data, settle_num_classes
from imagenet_training.data.normalization import settle_normalization
from imagenet_training.distributed import World, join
from imagenet_training.models.architectures import find_library, model_size, recipe_meta_model
from imagenet_training.models.card import ModelCard
from imagenet_training.models.precision import DTYPES
from imagenet_training.models.weight_file import read_weight_file
from imagenet_training.planning.plan import RunPlan, plan_run
from imagenet_training.planning.recipe import Recipe, check_recipe, unused_notices
from imagenet_training.reports.logs import RunLog
from imagenet_training.run.provenance import check_ranks_agree, describe_run, differences
from imagenet_training.run.resume import ResumePoint, choose_checkpoint, load_whole
from imagenet_training.run.run_folder import report_evaluation, run_notices
from imagenet_training.run.summary import evaluation_summary, resolved_recipe
from imagenet_training.state import TrainState
from imagenet_training.training.epoch import evaluate
from imagenet_training.training.failures import ending_with_status
from imagenet_training.training.trainer import Trainer, build_trainer, unwrapped
from imagenet_training.training.trial import try_model

# The settings outside section `validation` that change the result of an evaluation, if a recipe has them.
_OUTSIDE_VALIDATION = (
    "model.arch", "model.library", "model.num_classes", "data.mean", "data.std", "training.use_blurpool",
    "training.precision", "training.tf32", "training.deterministic", "training.channels_last",
)  # fmt: skip
# Those outside `model`, `validation` and `dist` that an evaluation uses without a change of its result.
_USED = (
    "data.val_dataset", "data.num_workers", "data.in_memory", "logging.folder", "wandb.enable", "training.distributed",
    "training.eval_only", "training.report", "training.dry_run", "training.resume",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """The weights that an evaluation is about.

    Attributes
    ----------
    recipe : Recipe
        With the settings of the run that trained the weights, unless the command line has others.
    path, content : str and dict, or None
        The checkpoint; None for other weights.
    card : ModelCard or None
        The facts beside the weights of ``model.weights``, if this project wrote the file.
    classes : list of str or None
        Names of the model's classes, by number. None if they are not known.
    as_in_run : bool
        The settings of the evaluation are those of the run.
    """

    recipe: Recipe
    path: str | None
    content: Mapping[str, Any] | None
    notices: tuple[str, ...]
    card: ModelCard | None = None
    classes: list[str] | None = None
    as_in_run: bool = False

    @property
    def val_digest(self) -> str | None:
        """Digest of the run's validation file. None if it is not known."""
        return None if self.content is None else self.content["data"].get("val", {}).get("digest")

    @property
    def averaged(self) -> bool:
        """True if the moving average of the checkpoint is evaluated. If one is wanted, the checkpoint must have it."""
        assert self.content is not None
        wanted, stored = self.recipe.model.ema, self.content["ema"] is not None
        if wanted is True and not stored:
            raise UserError(f"{self.path} has no averaged weights: pass --model.ema=0 for the raw ones")
        return stored and bool(wanted)

    @property
    def epoch(self) -> int:
        """The epoch at whose end the weights were saved; -1 if they are from within an epoch, or not known."""
        state = TrainState.of(self.content) if self.content is not None else TrainState()
        return -1 if state.samples else state.epoch - 1

    def logged_acc1(self, val_digest: str | None) -> float | None:
        """Return the top-1 that the run logged of these weights on a file; None if it is not known."""
        if self.content is None or not self.as_in_run or self.averaged != (self.content["ema"] is not None):
            return None
        state = self.content["state"]
        if val_digest is None or val_digest != self.val_digest or self.epoch < 0 or state["best_epoch"] != self.epoch:
            return None
        return float(state["best_acc1"])

    def describe(self) -> str:
        """Return what is evaluated in words: the weights, their file, and their position in the run."""
        model = self.recipe.model
        if self.content is None:
            found = f"the weights of {model.weights}" if model.weights else f"the pretrained weights of {model.arch}"
            return found if self.card is None else f"{found}, {_epoch_of(self.card)}"
        kind = "the averaged weights" if self.averaged else "the raw weights"
        if self.averaged and not self.content["ema_updates"]:
            kind = "the averaged weights, which no step has updated yet,"
        return f"{kind} in {self.path}, {_position(TrainState.of(self.content), self.content['recipe'])}"


def _position(state: TrainState, recipe: Mapping[str, Any]) -> str:
    """Return the position of a run in words."""
    step = f"step {state.step:,}"
    if state.samples:
        return f"within epoch {state.epoch}, after {state.samples:,} of its images ({step})"
    if not state.epoch:
        return "before the first step"
    return f"after epoch {state.epoch - 1}, {state.epoch} of {recipe['training']['epochs']} ({step})"


def _epoch_of(card: ModelCard) -> str:
    """Return the epoch and the kind of the weights that a card describes, in words."""
    kinds = {True: "averaged", False: "raw", None: "averaged and raw"}
    epoch = f"after epoch {card.epoch}" if card.epoch >= 0 else "from within the first epoch"
    return f"{kinds[card.averaged]}, {epoch} of {card.run_name}"


def choose_candidate(recipe: Recipe, world: World) -> Candidate:
    """Choose the weights to evaluate, the same on every rank, and the settings that belong to them.

    Raises
    ------
    UserError
        If there are no weights, or they or their classes are named twice.
    """
    _check_one_source(recipe)
    point = choose_checkpoint(recipe, world)
    content, weights, card = point.content, recipe.model.weights, None
    own, saved = None, dict[str, Any]()
    if content is not None:
        own, saved = content.get("classes"), content["recipe"]
        if "card" in content:  # a run on a CPU may have had another precision than its recipe
            saved = {**saved, "training": {**saved["training"], "precision": content["card"]["precision"]}}
    elif weights:
        card = read_weight_file(weights, f"model.weights={weights}").card
        if card is not None:
            own, saved = card.classes, card.settings()
    source, notices = point.path or weights, list(point.notices)
    classes = names_of_weights(recipe, own, str(source))
    settled, lost, kept = with_settings_of(recipe, saved)
    check_recipe(settled)  # settings of the run and of the command line may not fit
    settled = settle_normalization(settle_num_classes(_with_number_of(settled, classes)), content)
    if lost:
        notices.append(f"settings of the run that saved {source} replace those of files: {', '.join(lost)}")
    if kept:
        notices.append(f"the result may differ from that of the run that saved {source}: {', '.join(kept)}")
    return Candidate(settled, point.path, content, tuple(notices), card, classes, as_in_run=not kept)


def _with_number_of(recipe: Recipe, classes: list[str] | None) -> Recipe:
    """Return a recipe with the number of the classes of ``model.class_names``, if it names them and has no other."""
    model = recipe.model
    if model.class_names is None or classes is None:
        return recipe
    if model.num_classes not in ("auto", len(classes)):
        raise UserError(
            f"{recipe.shown('model.class_names')} names {len(classes):,} classes, not "
            f"{recipe.shown('model.num_classes')}: pass --model.num_classes=auto"
        )
    return recipe.with_values({"model.num_classes": len(classes)}, "model.class_names")


def _check_one_source(recipe: Recipe) -> None:
    """Check that the command line does not name weights that would not be evaluated."""
    named = [key for key in ("training.resume", "model.weights", "model.pretrained") if recipe.flat()[key]]
    if any(recipe.source(key) == COMMAND_LINE for key in named[1:]):
        raise UserError(f"{' and '.join(map(recipe.shown, named))} are both given: only one can be evaluated")


def with_settings_of(recipe: Recipe, saved: Mapping[str, Mapping[str, Any]]) -> tuple[Recipe, list[str], list[str]]:
    """Return a recipe with the settings of another run, by section, that change the result of an evaluation.

    The command line wins over the run, and the run wins over files and defaults. The run's validation file is only
    taken if the recipe names none.

    Returns
    -------
    recipe : Recipe
    lost, kept : list of str
        The settings of files that were replaced, and those of the command line that differ from the run's.
    """
    own, taken, lost, kept = recipe.to_dict(), dict[str, Any](), list[str](), list[str]()
    for key in (key for key in recipe.flat() if key in _OUTSIDE_VALIDATION or key.startswith("validation.")):
        section, name = key.split(".")
        if name not in saved.get(section, {}) or saved[section][name] == own[section][name]:
            continue
        if own[section][name] == "auto":
            taken[key] = saved[section][name]
            continue
        theirs, ours, source = show(saved[section][name]), show(own[section][name]), recipe.source(key)
        if source == COMMAND_LINE:
            kept.append(f"{key}={ours} (not {theirs})")
            continue
        taken[key] = saved[section][name]
        if source != DEFAULT:
            lost.append(f"{key}={theirs} (not {ours}, {source})")
    if recipe.source("data.val_dataset") == DEFAULT and "val_dataset" in saved.get("data", {}):
        taken["data.val_dataset"] = saved["data"]["val_dataset"]
    return recipe.with_values(taken, "the run that is evaluated"), lost, kept


def build_evaluated(candidate: Candidate, plan: RunPlan, world: World) -> Trainer:
    """Build the model of an evaluation on this rank's device, with weights that must be its own, and finite."""
    content = candidate.content
    plan = replace(plan, ema_decay=0.0)  # averaged weights are loaded into the model itself
    trainer = build_trainer(candidate.recipe, plan, world, from_checkpoint=content is not None)
    try_model(candidate.recipe, plan, unwrapped(trainer.model), trainer.loss)
    if content is not None:
        state = content["ema" if candidate.averaged else "model"]
        load_whole(unwrapped(trainer.model), state, str(candidate.path), content["recipe"])
    return trainer


def evaluate_only(recipe: Recipe) -> None:
    """Evaluate the weights at hand on the validation split. Create only the report, if the recipe names one.

    Raises
    ------
    UserError
        If there are no weights to evaluate, they do not fit or are not whole, or the data do not fit the model.
    """
    world = join(recipe)
    candidate = choose_candidate(recipe, world)
    recipe = candidate.recipe
    data = open_evaluation_data(recipe, candidate.classes, candidate.val_digest)
    check_ranks_agree(recipe, data)
    plan = plan_run(
        recipe,
        world_size=world.world_size,
        num_train=data.num_train,
        num_val=data.num_val,
        device_type=world.device.type,
        resumed_from=candidate.path,
    )
    trainer = build_evaluated(candidate, plan, world)
    loader = build_val_loader(recipe, data.val, world, DTYPES[plan.precision])
    provenance = describe_run(recipe, plan, data, world)
    log = RunLog(Path(recipe.logging.folder) / "logs", world.is_main)
    for notice in (*evaluation_notices(candidate, plan, data, world, provenance), *trainer.notices):
        log.print(f"note: {notice}")
    log.print(f"evaluating {candidate.describe()}")
    with ending_with_status(plan, world, log):
        evaluated = evaluate(
            trainer, loader, log, epoch=candidate.epoch, settings=recipe.validation, classes=data.classes
        )
        values = evaluated.values
        logged, logged_text = candidate.logged_acc1(data.val.digest), ""
        if logged is not None:
            logged_text = ", as the run logged" if logged == values["val/acc1"] else f"; the run logged {logged:.3%}"
        log.print(
            f"{recipe.data.val_dataset}: {data.num_val:,} images, loss {values['val/loss']:.4f}, "
            f"top-1 {values['val/acc1']:.3%}, top-5 {values['val/acc5']:.3%}{logged_text}"
        )
        if recipe.training.report and world.is_main:
            assert evaluated.predictions is not None
            report_evaluation(recipe, data, provenance, evaluated.predictions, candidate.describe())
            log.print(f"report: {recipe.training.report}")
    if not math.isfinite(values["val/loss"]):
        raise UserError(
            f"the logits of some images are not finite in {plan.precision}: evaluate with --precision 32. If that does "
            "not help, the weights are damaged"
        )


def show_evaluation(recipe: Recipe) -> None:
    """Print what an evaluation would do, and the resolved recipe. Check the data if they exist, and create nothing."""
    if machine.rank():
        return  # torchrun starts this on every rank
    candidate = choose_candidate(recipe, World())
    recipe = candidate.recipe
    size = model_size(recipe_meta_model(recipe), recipe.validation.resolution)
    print(f"{evaluation_summary(recipe, candidate.describe(), size)}\n\n{resolved_recipe(recipe)}")
    notices = [*recipe.notices, *candidate.notices]
    if Path(recipe.data.val_dataset).exists():
        notices += open_evaluation_data(recipe, candidate.classes, candidate.val_digest).classes.notices
    else:
        notices.append(f"{recipe.data.val_dataset} does not exist")
    for line in notices:
        print(f"note: {line}")


def evaluation_notices(
    candidate: Candidate, plan: RunPlan, data: TrainingData, world: World, provenance: dict[str, Any]
) -> Iterator[str]:
    """Yield everything about an evaluation that the user should know though nothing is wrong."""
    recipe = candidate.recipe
    yield from run_notices(recipe, plan, data, world, ResumePoint(None, None, {}, candidate.notices), provenance)
    others = [key for key in recipe.flat() if not key.startswith(("model.", "validation.", "dist."))]
    unused = [key for key in others if key not in _OUTSIDE_VALIDATION + _USED and recipe.source(key) == COMMAND_LINE]
    if unused:
        raw = "; --model.ema=0 evaluates the raw weights" if "training.ema_decay" in unused else ""
        yield f"an evaluation does not use {', '.join(unused)} of the command line{raw}"
    yield from unused_notices(recipe, "validation.")
    if candidate.content is not None:
        yield from differences(candidate.content, provenance, evaluates=True)
        for key in ("model.weights", "model.pretrained"):
            if recipe.flat()[key]:
                yield f"{recipe.shown(key)} is not evaluated, since training.resume names a checkpoint"
    elif recipe.model.pretrained and (differing := differences_from_published(recipe)):
        yield f"the published accuracy of these weights is that of other settings: {', '.join(differing)}"


def differences_from_published(recipe: Recipe) -> list[str]:
    """Return the settings with which a library publishes the accuracy of pretrained weights, where they differ."""
    arch, validation = recipe.model.arch, recipe.validation
    if find_library(arch, recipe.model.library) == "timm":
        import timm

        config: Any = timm.get_pretrained_cfg(arch)
        size, ratio = (config.test_input_size or config.input_size)[-1], config.test_crop_pct or config.crop_pct
        interpolation = config.interpolation
    else:
        transforms = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].transforms()
        size, ratio = transforms.crop_size[0], transforms.crop_size[0] / transforms.resize_size[0]
        interpolation = transforms.interpolation.value
    own_ratio = validation.resolution / validation.resize if validation.resize else validation.crop_ratio
    differing = [
        (size != validation.resolution, f"--validation.resolution={size}"),
        (abs(ratio - own_ratio) > 0.005, f"--validation.crop_ratio={ratio:.3g}"),
        (interpolation != validation.interpolation, f"interpolation {interpolation}"),
        (validation.lr_tta, "--validation.lr_tta=0"),
    ]
    return [text for differs, text in differing if differs]
