"""The training recipe: all settings of a run, and the checks that take several settings or the disk.

    python -m imagenet_training.planning.recipe --config-file FILE ...

checks a command line of ``train_imagenet.py`` within a second, and exits with status 2 if anything is wrong.

The settings are in `imagenet_training.planning.sections`. `check_recipe` holds the checks that take several settings.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.settings import Flags, Settings, ShippedFiles, read_settings
from ffcv_ops.settings.command_line import COMMAND_LINE
from imagenet_training.planning.outputs import check_own_output
from imagenet_training.planning.sections import (
    Augmentation,
    Data,
    Dist,
    Expected,
    LearningRate,
    Logging,
    Model,
    Resolution,
    Training,
    Validation,
    WandB,
)

# --resume auto
AUTO = "auto"
# Recipes are beside the packages, both in a checkout and in an installation.
RECIPES = ShippedFiles(Path(__file__).resolve().parents[2], "*_configs/*.yaml")


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """All settings of a training run. It never changes; what a run makes of it is in its `RunPlan`."""

    model: Model
    resolution: Resolution
    data: Data
    augmentation: Augmentation
    lr: LearningRate
    training: Training
    validation: Validation
    logging: Logging
    expected: Expected
    wandb: WandB
    dist: Dist


FLAGS: Flags = {
    "batch_size": "training.batch_size",
    "lr": "lr.lr",
    "epochs": "training.epochs",
    "num_workers": "data.num_workers",
    "precision": "training.precision",
    "resume": "training.resume",
    "wandb_project": "wandb.project",
    "wandb_name": "wandb.name",
    "no_wandb": ("wandb.enable", "0"),
    "dry_run": ("training.dry_run", "1"),
    "preview": "training.preview",
    "eval_only": ("training.eval_only", "1"),
    "report": "training.report",
}
DESCRIPTION = """Train an image classifier from a recipe.

python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml
torchrun --nproc_per_node=8 train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml"""


# Settings that have an effect only under a condition: the condition in words and as a function, and their keys.
_CONDITIONS: tuple[tuple[str, Callable[[Recipe], object], tuple[str, ...]], ...] = (
    ("training.optimizer=sgd", lambda recipe: recipe.training.optimizer == "sgd", ("training.momentum",)),
    ("training.ema_decay", lambda recipe: recipe.training.ema_decay, ("training.ema_every",)),
    ("lr.lr=None", lambda recipe: recipe.lr.lr is None, ("lr.base_lr",)),
    (
        "lr.lr_schedule_type=cyclic",
        lambda recipe: recipe.lr.lr_schedule_type == "cyclic",
        ("lr.lr_peak_epoch",),
    ),
    (
        "lr.lr_schedule_type=step",
        lambda recipe: recipe.lr.lr_schedule_type == "step",
        ("lr.step_ratio", "lr.step_length"),
    ),
    ("lr.lr_schedule_type=cosine", lambda recipe: recipe.lr.lr_schedule_type == "cosine", ("lr.min_lr",)),
    ("lr.warmup_epochs", lambda recipe: recipe.lr.warmup_epochs, ("lr.warmup_lr",)),
    (
        "Mixup or CutMix",
        lambda recipe: recipe.augmentation.mixup_alpha or recipe.augmentation.cutmix_alpha,
        ("augmentation.mix_prob", "augmentation.mix_per"),
    ),
    (
        "both Mixup and CutMix",
        lambda recipe: recipe.augmentation.mixup_alpha and recipe.augmentation.cutmix_alpha,
        ("augmentation.switch_prob",),
    ),
    (
        "a resolution.min_res below resolution.max_res",
        lambda recipe: recipe.resolution.min_res < recipe.resolution.max_res,
        ("resolution.start_ramp", "resolution.end_ramp"),
    ),
    ("validation.resize=None", lambda recipe: recipe.validation.resize is None, ("validation.crop_ratio",)),
    ("training.distributed=1", lambda recipe: recipe.training.distributed, ("dist.world_size",)),
)


def read_recipe(argv: list[str]) -> Recipe:
    """Read the training recipe with `read_settings`, then check what takes several settings or the disk.

    Raises
    ------
    SystemExit
        With status 2 and one message on stderr if anything is wrong; with status 0 after ``--help``.
    """
    recipe = read_settings(Recipe, argv, flags=FLAGS, description=DESCRIPTION, shipped=RECIPES)
    if _replaces_pretrained(recipe):
        recipe = recipe.with_values({"model.pretrained": False}, "model.weights")
    try:
        check_recipe(recipe)
    except UserError as error:
        exit_with_user_error(error)
    return replace(recipe, notices=tuple(_find_notices(recipe)))


def _replaces_pretrained(recipe: Recipe) -> bool:
    """Return True if the command line names a file of weights, and a recipe file asks for pretrained ones."""
    sources = [recipe.source(key) for key in ("model.weights", "model.pretrained")]
    return bool(recipe.model.weights and recipe.model.pretrained) and sources[0] == COMMAND_LINE != sources[1]


def check_recipe(recipe: Recipe) -> None:
    """Check that settings fit together, and that the files named in the recipe exist."""
    _check_schedule(recipe)
    _check_optimisation(recipe)
    _check_class_names(recipe)
    _check_frozen_body(recipe)
    _check_images(recipe)
    _check_files(recipe)


def _check_schedule(recipe: Recipe) -> None:
    lr, epochs, shown = recipe.lr, recipe.training.epochs, recipe.shown
    if lr.warmup_epochs and lr.lr_schedule_type == "cyclic":
        raise UserError(
            f"{shown('lr.warmup_epochs')} does not fit {shown('lr.lr_schedule_type')}, which warms "
            "up until lr.lr_peak_epoch: set one of the two, or pass --lr.warmup_epochs=0"
        )
    if lr.warmup_epochs and lr.warmup_epochs >= epochs:
        raise UserError(
            f"{shown('lr.warmup_epochs')} must be less than {shown('training.epochs')}: pass --lr.warmup_epochs=0"
        )


def _check_optimisation(recipe: Recipe) -> None:
    training, shown = recipe.training, recipe.shown
    if training.nesterov and training.optimizer != "sgd":
        raise UserError(f"{shown('training.nesterov')} needs training.optimizer=sgd, not {shown('training.optimizer')}")
    if training.nesterov and not training.momentum:
        raise UserError(f"{shown('training.nesterov')} needs a momentum, not {shown('training.momentum')}")
    if training.bce_threshold is not None and training.loss != "bce":
        raise UserError(f"{shown('training.bce_threshold')} needs training.loss=bce, not {shown('training.loss')}")
    if training.ema_rescale and not training.ema_decay:
        raise UserError(f"{shown('training.ema_rescale')} needs a moving average: set training.ema_decay")


def _check_class_names(recipe: Recipe) -> None:
    model, shown = recipe.model, recipe.shown
    if model.class_names and not (model.pretrained or model.weights or recipe.training.resume):
        raise UserError(f"{shown('model.class_names')} names the classes of weights: set --model.weights=FILE")


def _check_frozen_body(recipe: Recipe) -> None:
    model, training, shown = recipe.model, recipe.training, recipe.shown
    if model.freeze == "none" or training.eval_only:
        return
    if training.layer_decay is not None:
        raise UserError(
            f"{shown('training.layer_decay')} has no effect with {shown('model.freeze')}, which trains only the head: "
            "set one of the two"
        )
    if training.agc:
        raise UserError(
            f"{shown('training.agc')} has no effect with {shown('model.freeze')}: it does not clip the head, which "
            "alone trains. Set one of the two"
        )
    if not (model.pretrained or model.weights or training.resume):
        raise UserError(
            f"{shown('model.freeze')} would keep random weights: set --model.pretrained=1 or --model.weights=FILE"
        )


def _check_images(recipe: Recipe) -> None:
    shown = recipe.shown
    if recipe.resolution.min_res > recipe.resolution.max_res:
        raise UserError(f"{shown('resolution.min_res')} is larger than {shown('resolution.max_res')}")
    if recipe.augmentation.repeats > 1 and recipe.data.order != "random":
        raise UserError(f"{shown('augmentation.repeats')} needs --data.order=random, not {shown('data.order')}")
    resize = recipe.validation.resize
    if resize is not None and resize < recipe.validation.resolution:
        raise UserError(
            f"{shown('validation.resize')} is smaller than {shown('validation.resolution')}, the side of its crop"
        )


def _check_files(recipe: Recipe) -> None:
    training, model, shown = recipe.training, recipe.model, recipe.shown
    if training.report and not training.eval_only:
        raise UserError(
            f"{shown('training.report')} needs --eval_only; a training run writes report.html into its folder"
        )
    for key in ("training.eval_only", "training.dry_run"):
        if training.preview and recipe.flat()[key]:
            raise UserError(f"{shown('training.preview')} and {shown(key)} are two commands: pass one of them")
    for key, kind in (("training.report", "HTML page"), ("training.preview", "PNG")):
        if name := recipe.flat()[key]:
            try:
                check_own_output(Path(name), kind)
            except UserError as error:
                raise UserError(f"{shown(key)}: {error}") from error
    if model.pretrained and model.weights:
        raise UserError(f"{shown('model.pretrained')} and {shown('model.weights')} exclude each other: set one")
    if model.weights:
        _check_file(shown("model.weights"), Path(model.weights))
    if training.eval_only and not (model.pretrained or model.weights or training.resume):
        raise UserError("--eval_only has no weights to evaluate: set --resume, --model.weights or --model.pretrained=1")
    if training.resume not in (None, AUTO):
        _check_file(shown("training.resume"), Path(training.resume))


def _check_file(shown: str, path: Path) -> None:
    if not path.is_file():
        from imagenet_training.torch_file import no_file_message  # imports PyTorch, which takes seconds

        raise UserError(f"{shown}: {no_file_message(path)}")


def _find_notices(recipe: Recipe) -> Iterable[str]:
    lr, training = recipe.lr, recipe.training
    if recipe.data.gpu is not None:
        yield f"{recipe.shown('data.gpu')} has no effect"
    if training.eval_only:
        return
    stated = _stated_accuracy(recipe)
    if stated and not expected_accuracy(recipe):
        yield (
            f"the expected accuracies are those of {max(map(max, stated.values()))} epochs; this run has "
            f"{training.epochs} and is not compared with them"
        )
    if lr.lr_schedule_type == "cyclic" and lr.lr_peak_epoch >= training.epochs:
        yield (
            f"the learning rate will not reach its peak: lr.lr_peak_epoch={lr.lr_peak_epoch} is not before "
            f"training.epochs={training.epochs}"
        )
    yield from unused_notices(recipe)


def unused_notices(recipe: Recipe, section: str = "") -> Iterable[str]:
    """Yield a notice for each setting of the command line, perhaps only of one section, that has no effect."""
    for condition, holds, keys in _CONDITIONS:
        for key in keys:
            if key.startswith(section) and recipe.source(key) == COMMAND_LINE and not holds(recipe):
                yield f"{recipe.shown(key)} has no effect without {condition}"


def _stated_accuracy(recipe: Recipe) -> dict[str, dict[int, float]]:
    """Return the accuracies that the recipe states, in percent by epochs finished, under the names of the metrics."""
    stated = {
        "train/acc1": recipe.expected.train_acc1,
        "val/acc1": recipe.expected.val_acc1,
        "val/acc5": recipe.expected.val_acc5,
    }
    return {name: accuracies for name, accuracies in stated.items() if accuracies}


def expected_accuracy(recipe: Recipe) -> dict[str, dict[int, float]]:
    """Return the accuracies to compare a run with, in percent by epochs finished, under the names of the metrics.

    If the stated accuracies go beyond the epochs of the run, there are none to compare with, since a shorter schedule
    passes through other values.
    """
    stated = _stated_accuracy(recipe)
    return {} if any(max(accuracies) > recipe.training.epochs for accuracies in stated.values()) else stated


if __name__ == "__main__":
    read_recipe(sys.argv[1:])
