"""The summary of a run, printed before it begins."""

import math
from collections.abc import Iterable

import yaml

from ffcv_ops.settings.collect import DEFAULT, Settings
from ffcv_ops.settings.fields import show
from imagenet_training.plan import Plan, batch_arithmetic


def summary(recipe: Settings, plan: Plan, size: str = "") -> str:
    """What a run is going to do, and the resolved recipe with the source of every value that is not a default.

    The second half is YAML that reads back as the same recipe. ``size`` is the model's, in words.
    """
    files = ", then ".join(str(path) for path in recipe.files) or "no file: defaults"
    rows = [
        ("recipe", files),
        *(("  override", line) for line in recipe.overrides()),
        ("model", _model_line(recipe, plan)),
        *([("size", size)] if size else []),
        ("train", f"{recipe.data.train_dataset}, {plan.num_train:,} images, {recipe.data.order} order"),
        ("val", f"{recipe.data.val_dataset}, {plan.num_val:,} images"),
        ("crops", _crops_line(recipe)),
        ("augmentation", _augmentation_line(recipe)),
        ("mixing", _mixing_line(recipe)),
        ("loss", _loss_line(recipe)),
        (
            "global batch",
            f"{batch_arithmetic(plan.batch_size, plan.world_size, plan.accumulation)} = {plan.global_batch_size}",
        ),
        ("lr", plan.lr_arithmetic),
        ("schedule", _schedule_line(recipe)),
        ("optimizer", _optimizer_line(recipe)),
        ("length", f"{plan.epochs} epochs x {plan.steps_per_epoch:,} steps = {plan.total_steps:,} steps"),
        ("precision", recipe.training.precision),
    ]
    table = [f"{name:<14}{line}" for name, line in rows]
    return "\n".join([*table, "", "# resolved recipe", *_resolved_lines(recipe)])


def _resolved_lines(recipe: Settings) -> Iterable[str]:
    for section, values in recipe.to_dict().items():
        yield f"{section}:"
        for name, value in values.items():
            if (section, name) in (("training", "dry_run"), ("training", "preview"), ("training", "report")):
                continue
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
            source = recipe.source(f"{section}.{name}")
            yield f"  {name}: {text}" if source == DEFAULT else f"  {f'{name}: {text}':<40}  # {source}"


def _model_line(recipe: Settings, plan: Plan) -> str:
    model, training = recipe.model, recipe.training
    start = "pretrained" if model.pretrained else f"weights of {model.weights}" if model.weights else "from scratch"
    parts = [
        model.arch,
        f"{model.num_classes} classes",
        f"resumed from {training.resume}" if training.resume else start,
    ]
    parts += ["BlurPool"] * training.use_blurpool
    parts += [f"drop path {show(model.drop_path)}"] * bool(model.drop_path)
    parts += [f"moving average {plan.ema_decay:.6g} every {training.ema_every} steps"] * bool(training.ema_decay)
    return ", ".join(parts)


def _crops_line(recipe: Settings) -> str:
    resolution, augmentation, validation_ = recipe.resolution, recipe.augmentation, recipe.validation
    size = f"{resolution.min_res} px"
    if resolution.min_res < resolution.max_res:
        size += f" to epoch {resolution.start_ramp}, {resolution.max_res} px from epoch {resolution.end_ramp}"
    ratio = f"ratio {show(validation_.crop_ratio)}"
    if validation_.resize is not None:
        ratio = f"from {validation_.resize} px"
    return (
        f"{size}, {augmentation.interpolation}, scale {show(augmentation.crop_scale)}, flip {show(augmentation.flip)}; "
        f"validation {validation_.resolution} px, {ratio}, {validation_.interpolation}"
        + ", both flips"
        * validation_.lr_tta
    )


def _augmentation_line(recipe: Settings) -> str:
    augmentation = recipe.augmentation
    named = {None: [], "trivial": ["TrivialAugmentWide"]}
    parts = list(named.get(augmentation.auto_augment, [f"RandAugment {augmentation.auto_augment}"]))
    parts += [f"erasing {show(augmentation.erasing)}"] * bool(augmentation.erasing)
    parts += [f"{augmentation.repeats} copies of each image"] * (augmentation.repeats > 1)
    return ", ".join(parts or ["none"])


def _loss_line(recipe: Settings) -> str:
    training = recipe.training
    if training.loss == "cross_entropy":
        return "cross entropy"
    threshold = f", targets above {show(training.bce_threshold)} count as 1" * (training.bce_threshold is not None)
    return f"binary cross entropy{threshold}"


def _mixing_line(recipe: Settings) -> str:
    augmentation = recipe.augmentation
    alphas = (("Mixup", augmentation.mixup_alpha), ("CutMix", augmentation.cutmix_alpha))
    parts = [f"{name} {show(alpha)}" for name, alpha in alphas if alpha] or ["none"]
    if parts != ["none"]:
        parts.append(f"probability {show(augmentation.mix_prob)} per {augmentation.mix_per}")
    return ", ".join([*parts, f"label smoothing {show(recipe.training.label_smoothing)}"])


def _schedule_line(recipe: Settings) -> str:
    lr = recipe.lr
    warmup = f" after {show(lr.warmup_epochs)} warm-up epochs" if lr.warmup_epochs else ""
    return {
        "cosine": f"cosine{warmup}, to {show(lr.min_lr)}",
        "step": f"step{warmup}, x {show(lr.step_ratio)} every {lr.step_length} epochs",
        "cyclic": f"cyclic, peak at epoch {lr.lr_peak_epoch}, to 0",
    }[lr.lr_schedule_type]


def _optimizer_line(recipe: Settings) -> str:
    training = recipe.training
    parts = [training.optimizer]
    parts += [f"momentum {show(training.momentum)}" + " (Nesterov)" * training.nesterov] * (parts == ["sgd"])
    parts.append(f"weight decay {show(training.weight_decay)}")
    parts += [f"{show(training.bn_wd)} on one-dimensional parameters"] * (training.bn_wd is not None)
    parts += [f"gradient clipped to {show(training.grad_clip)}"] * bool(training.grad_clip)
    parts += [f"each unit's to {show(training.agc)} of its weights"] * bool(training.agc)
    return ", ".join(parts)
