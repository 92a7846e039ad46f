"""The text printed before a run: a table of its plan, and the resolved recipe."""

import math
from collections.abc import Iterable

import yaml

from ffcv_ops.settings.collect import DEFAULT
from ffcv_ops.settings.fields import show
from imagenet_training.data.augmentation import describe_augmentations
from imagenet_training.models.architectures import find_library
from imagenet_training.planning.plan import RunPlan, batch_arithmetic
from imagenet_training.planning.recipe import Recipe
from imagenet_training.training.loss import AUXILIARY_WEIGHTS

# Settings that belong to one command, not to a recipe.
OF_ONE_COMMAND = ("training.dry_run", "training.preview", "training.report")


def summary(recipe: Recipe, plan: RunPlan, size: str = "") -> str:
    """Return a table of what a run will do. `size` is the model's, in words."""
    batches = batch_arithmetic(plan.batch_size, plan.world_size, plan.accumulation)
    rows = [
        ("model", _model_line(recipe, plan)),
        *([("size", size)] if size else []),
        ("train", f"{recipe.data.train_dataset}, {plan.num_train:,} images, {recipe.data.order} order"),
        ("val", f"{recipe.data.val_dataset}, {plan.num_val:,} images"),
        ("crops", _crops_line(recipe)),
        ("augmentation", describe_augmentations(recipe)),
        ("mixing", _mixing_line(recipe)),
        ("loss", _loss_line(recipe, plan) + _auxiliary_part(recipe)),
        ("global batch", f"{batches} = {plan.global_batch_size}"),
        ("lr", plan.lr_arithmetic),
        ("schedule", _schedule_line(recipe)),
        ("optimizer", _optimizer_line(recipe)),
        ("length", f"{_count(plan.epochs, 'epoch')} x {plan.steps_per_epoch:,} steps = {plan.total_steps:,} steps"),
        ("precision", plan.precision + (", deterministic" if recipe.training.deterministic else "")),
    ]
    return _table(recipe, rows)


def evaluation_summary(recipe: Recipe, evaluated: str, size: str) -> str:
    """Return a table of what an evaluation will do. The weights, and the size of the model, are given in words."""
    model, blurpool = recipe.model, ", BlurPool" if recipe.training.use_blurpool else ""
    predicted = {"all": "of the model", "only": "of the validation file"}[recipe.validation.classes]
    rows = [
        ("weights", evaluated),
        ("model", f"{model.arch}, {model.num_classes} classes{blurpool}"),
        ("size", size),
        ("val", recipe.data.val_dataset),
        ("crops", _validation_crops(recipe)),
        ("predicted", f"classes {predicted}"),
        ("precision", recipe.training.precision),
    ]
    return _table(recipe, rows)


def _table(recipe: Recipe, rows: Iterable[tuple[str, str]]) -> str:
    """Return rows as text, below those of the recipe's files."""
    files = ", then ".join(str(path) for path in recipe.files) or "no file: defaults"
    overrides = [("  override", line) for line in recipe.overrides()]
    return "\n".join(f"{name:<14}{line}" for name, line in [("recipe", files), *overrides, *rows])


def resolved_recipe(recipe: Recipe) -> str:
    """Return all settings as YAML that reads back as the same recipe, with the source of each that is no default."""
    lines = ["# resolved recipe"]
    for section, values in recipe.to_dict().items():
        lines.append(f"{section}:")
        for name, value in values.items():
            key = f"{section}.{name}"
            if key in OF_ONE_COMMAND:
                continue
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
            source = recipe.source(key)
            lines.append(f"  {name}: {text}" if source == DEFAULT else f"  {f'{name}: {text}':<40}  # {source}")
    return "\n".join(lines)


def _model_line(recipe: Recipe, plan: RunPlan) -> str:
    model, training = recipe.model, recipe.training
    start = "pretrained" if model.pretrained else f"weights of {model.weights}" if model.weights else "from scratch"
    parts = [model.arch, f"{model.num_classes} classes"]
    parts.append(f"resumed from {plan.resumed_from}" if plan.resumed_from else start)
    if training.use_blurpool:
        parts.append("BlurPool")
    if model.freeze == "body":
        parts.append("only the head trains")
    if model.drop_path:
        parts.append(f"drop path {show(model.drop_path)}")
    if training.ema_decay:
        parts.append(f"moving average {plan.ema_decay:.6g} every {_count(training.ema_every, 'step')}")
    return ", ".join(parts)


def _crops_line(recipe: Recipe) -> str:
    resolution, augmentation = recipe.resolution, recipe.augmentation
    size = f"{resolution.min_res} px"
    if resolution.min_res < resolution.max_res:
        size += f" to epoch {resolution.start_ramp}, {resolution.max_res} px from epoch {resolution.end_ramp}"
    return (
        f"{size}, {augmentation.interpolation}, scale {show(augmentation.crop_scale)}, flip {show(augmentation.flip)}; "
        f"validation {_validation_crops(recipe)}"
    )


def _validation_crops(recipe: Recipe) -> str:
    validation = recipe.validation
    parts = [
        f"{validation.resolution} px",
        f"ratio {show(validation.crop_ratio)}" if validation.resize is None else f"from {validation.resize} px",
        validation.interpolation,
    ]
    if validation.lr_tta:
        parts.append("both flips")
    return ", ".join(parts)


def _auxiliary_part(recipe: Recipe) -> str:
    """Return the auxiliary heads' share of the loss, and what their architectures do to the images."""
    weight = AUXILIARY_WEIGHTS.get(recipe.model.arch)
    if weight is None or find_library(recipe.model.arch, recipe.model.library) == "timm":
        return ""
    return f", plus {weight} x that of each auxiliary head; the model rescales images to -1 to 1 itself"


def _loss_line(recipe: Recipe, plan: RunPlan) -> str:
    training = recipe.training
    parts = [{"cross_entropy": "cross entropy", "bce": "binary cross entropy"}[training.loss]]
    if training.bce_threshold is not None:
        parts.append(f"targets above {show(training.bce_threshold)} count as 1")
    if plan.class_weights is not None:
        weights = [weight for weight in plan.class_weights if weight]
        parts.append(f"images weighted by class, {min(weights):.3g} to {max(weights):.3g}")
    elif training.class_weights == "auto":
        parts.append("images weighted by class")
    return ", ".join(parts)


def _mixing_line(recipe: Recipe) -> str:
    augmentation = recipe.augmentation
    alphas = (("Mixup", augmentation.mixup_alpha), ("CutMix", augmentation.cutmix_alpha))
    parts = [f"{name} {show(alpha)}" for name, alpha in alphas if alpha]
    if parts:
        parts.append(f"probability {show(augmentation.mix_prob)} per {augmentation.mix_per}")
    return ", ".join([*(parts or ["none"]), f"label smoothing {show(recipe.training.label_smoothing)}"])


def _schedule_line(recipe: Recipe) -> str:
    lr = recipe.lr
    warmup = f" after {_count(lr.warmup_epochs, 'warm-up epoch')}" if lr.warmup_epochs else ""
    return {
        "cosine": f"cosine{warmup}, to {show(lr.min_lr)}",
        "step": f"step{warmup}, x {show(lr.step_ratio)} every {_count(lr.step_length, 'epoch')}",
        "cyclic": f"cyclic, peak at epoch {lr.lr_peak_epoch}, to 0",
    }[lr.lr_schedule_type]


def _count(number: float, unit: str) -> str:
    return f"{show(number)} {unit}{'s' * (number != 1)}"


def _optimizer_line(recipe: Recipe) -> str:
    training = recipe.training
    parts: list[str] = [training.optimizer]
    if training.optimizer == "sgd":
        parts.append(f"momentum {show(training.momentum)}" + (" (Nesterov)" if training.nesterov else ""))
    if training.layer_decay is not None:
        parts.append(f"learning rate x {show(training.layer_decay)} for each layer before the head")
    parts.append(f"weight decay {show(training.weight_decay)}")
    if training.bn_wd is not None:
        parts.append(f"{show(training.bn_wd)} on one-dimensional parameters")
    if training.grad_clip:
        parts.append(f"gradient clipped to {show(training.grad_clip)}")
    if training.agc:
        parts.append(f"gradient of each unit clipped to {show(training.agc)} of its weights")
    return ", ".join(parts)
