"""The keys of a training recipe, and the checks that take several keys or the disk.

    python -m imagenet_training.recipe --config-file FILE ...

checks a command line of ``train_imagenet.py`` within a second, with exit status 2 for a mistake.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastargs import Config, Param, Section, validation

from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.settings.collect import Settings, read_settings
from ffcv_ops.settings.fields import Auto, Choice, Course, Integer, Number, Range, Switch, Text, show
from ffcv_ops.settings.yaml_files import ShippedFiles

# --resume auto
AUTO = "auto"
# Recipes lie beside the packages, in a checkout as where they are installed.
RECIPES = ShippedFiles(Path(__file__).resolve().parents[1], "*_configs/*.yaml")


class AutoAugment(validation.Checker):
    """``trivial``, or timm's string for RandAugment, whose parts are read by those who augment."""

    def check(self, value: Any) -> str:
        if value != "trivial" and not re.fullmatch(r"rand(-[\w.]+)*", str(value)):
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "trivial, or timm's string such as rand-m7-mstd0.5-inc1"


RECIPE = Config()


def _section(name: str, description: str, /, **parameters: Param) -> None:
    Section(name, description, config_descriptor=RECIPE).params(**parameters)


_section(
    "model",
    "the network",
    arch=Param(Text(), "architecture, by its torchvision or timm name", default="resnet50"),
    pretrained=Param(Switch(), "start from the library's ImageNet weights (downloaded)", default=0),
    weights=Param(Text(), "start from a local weights file or checkpoint"),
    library=Param(
        Choice("auto", "torchvision", "timm"),
        "who builds the architecture; auto: torchvision if it has the name, else timm",
        default="auto",
    ),
    num_classes=Param(Integer(min=1), "size of the head; the data must have as many classes", default=1000),
    drop_path=Param(Number(min=0, below=1), "rate of stochastic depth (timm architectures)", default=0.0),
)
_section(
    "resolution",
    "side of the training crops, by epoch",
    min_res=Param(Integer(min=1), "until and at epoch start_ramp (px)", default=160),
    max_res=Param(Integer(min=1), "from epoch end_ramp on (px)", default=160),
    start_ramp=Param(Integer(), "last epoch at min_res; from here linear, in multiples of 32 px", default=0),
    end_ramp=Param(Integer(), "first epoch at max_res", default=0),
)
_section(
    "data",
    "what is read",
    train_dataset=Param(Text(), ".beton file of the training split", default="/fsx/ns1/train.beton"),
    val_dataset=Param(Text(), ".beton file of the validation split", default="/fsx/ns1/val.beton"),
    num_workers=Param(
        Integer(min=-1), "threads a rank; -1: all CPUs allowed, shared by the ranks of the node", default=-1
    ),
    in_memory=Param(Switch(), "the dataset fits in memory: leave caching to the operating system", default=1),
    order=Param(
        Choice("random", "quasi_random"),
        "order of the training samples; quasi_random reads a page at a time, for files larger than memory",
        default="random",
    ),
    gpu=Param(Integer(), "accepted, with a notice, because ffcv-imagenet's rn18 recipes set it; nothing reads it"),
)
_section(
    "augmentation",
    "what happens to training images",
    crop_scale=Param(Range(max=1), "area of a random crop, as a share of the image", default="0.08,1"),
    crop_ratio=Param(Range(), "width / height of a random crop", default="0.75,1.3333"),
    flip=Param(Number(min=0, max=1), "probability of a horizontal flip", default=0.5),
    interpolation=Param(Choice("bilinear", "bicubic"), "of the resampling to size", default="bilinear"),
    mixup_alpha=Param(Number(min=0), "Mixup's lambda is drawn from Beta(alpha, alpha); 0: no Mixup", default=0.0),
    cutmix_alpha=Param(Number(min=0), "CutMix's lambda is drawn from Beta(alpha, alpha); 0: no CutMix", default=0.0),
    mix_prob=Param(Number(min=0, max=1), "probability that a batch is mixed at all", default=1.0),
    switch_prob=Param(Number(min=0, max=1), "probability of CutMix where both are on", default=0.5),
    mix_per=Param(
        Choice("batch", "element"), "one draw of lambda and box for each batch or each image", default="batch"
    ),
    auto_augment=Param(AutoAugment(), "TrivialAugmentWide, or RandAugment, between crop and mixing; None: neither"),
    erasing=Param(Number(min=0, max=1), "probability that a random rectangle of an image is erased", default=0.0),
    repeats=Param(
        Integer(min=1), "copies of an image, augmented differently, in and across the ranks' batches", default=1
    ),
)
_section(
    "lr",
    "learning rate",
    lr=Param(Number(min=0), "peak learning rate, whatever the batch size; None: scaled linearly from base_lr"),
    base_lr=Param(Number(min=0), "peak learning rate for every 256 images of the global batch", default=0.5),
    lr_schedule_type=Param(Choice("cyclic", "step", "cosine"), "shape over the epochs", default="cyclic"),
    lr_peak_epoch=Param(Integer(min=0), "cyclic: linear to the peak at this epoch, then linear to 0", default=2),
    step_ratio=Param(Number(min=0), "step: factor after every step_length epochs", default=0.1),
    step_length=Param(Integer(min=1), "step: epochs between factors", default=30),
    warmup_epochs=Param(Number(min=0), "cosine and step: epochs of linear warm-up", default=0.0),
    warmup_lr=Param(Number(min=0, max=1), "warm-up starts at this share of the peak", default=0.0),
    min_lr=Param(Number(min=0), "cosine: learning rate at the end", default=0.0),
)
_section(
    "training",
    "optimisation",
    eval_only=Param(Switch(), "evaluate the weights at hand and stop", default=0),
    preview=Param(Text(), "draw training images as the model gets them into this PNG and stop"),
    report=Param(Text(), "with eval_only: write a report of the evaluation, an HTML page, into this file"),
    dry_run=Param(Switch(), "show the resolved recipe and its arithmetic and stop; needs no data", default=0),
    batch_size=Param(Integer(min=1), "images per GPU and batch", default=512),
    accumulation=Param(Integer(min=1), "batches per optimizer step", default=1),
    loss=Param(
        Choice("cross_entropy", "bce"), "cross entropy, or binary cross entropy of each class", default="cross_entropy"
    ),
    bce_threshold=Param(Number(min=0, below=1), "bce: targets above it count as 1, others as 0; None: as they are"),
    optimizer=Param(Choice("sgd", "lamb", "adamw"), "optimizer", default="sgd"),
    momentum=Param(Number(min=0, below=1), "SGD's momentum", default=0.9),
    nesterov=Param(Switch(), "SGD's momentum is Nesterov's", default=0),
    weight_decay=Param(Number(min=0), "weight decay", default=4e-5),
    bn_wd=Param(Number(min=0), "weight decay of one-dimensional parameters (norm, bias); None: as weight_decay"),
    epochs=Param(Integer(min=1), "passes over the training split", default=30),
    label_smoothing=Param(Number(min=0, below=1), "share of the target spread over all classes", default=0.1),
    distributed=Param(Switch(), "start dist.world_size processes, where torchrun has not", default=0),
    use_blurpool=Param(Switch(), "blur before strided convolutions", default=0),
    precision=Param(Choice("16-mixed", "bf16-mixed", "32"), "arithmetic", default="16-mixed"),
    tf32=Param(
        Switch(), "products of 32-bit numbers in TF32 (10 bits of mantissa) where the GPU's tensor cores can", default=1
    ),
    compile=Param(
        Auto(), "torch.compile the model; auto: on a GPU, for runs long enough to gain from it", default="auto"
    ),
    grad_clip=Param(Number(min=0), "largest norm of the gradient; 0: no clipping", default=0.0),
    agc=Param(
        Number(min=0),
        "adaptive clipping: largest norm of each unit's gradient, as a share of its weights'; 0: no clipping",
        default=0.0,
    ),
    ema_decay=Param(
        Number(min=0, below=1), "decay of the moving average of weights, which is then evaluated; 0: none", default=0.0
    ),
    ema_every=Param(Integer(min=1), "optimizer steps between updates of the moving average", default=1),
    ema_rescale=Param(
        Switch(), "1 - ema_decay is stated for one image and one epoch, and scaled as torchvision does", default=0
    ),
    channels_last=Param(Switch(), "memory format of images and weights", default=1),
    seed=Param(Integer(min=0, max=2**63 - 1), "of initial weights, order, crops, mixing", default=0),
    resume=Param(
        Text(), "checkpoint to go on from, such as checkpoints/last.ckpt; auto: the newest in logging.folder, if any"
    ),
    save_every_steps=Param(Integer(min=0), "save within an epoch every so many steps; 0: at its end only", default=0),
)
_section(
    "validation",
    "evaluation after each epoch",
    batch_size=Param(Integer(min=1), "images per GPU and batch", default=512),
    resolution=Param(Integer(min=1), "side of the centre crop as the network sees it (px)", default=224),
    lr_tta=Param(Switch(), "average the logits of each image and its mirror image", default=1),
    crop_ratio=Param(
        Number(min=0.01, max=1), "side of the centre crop, as a share of the image's shorter side", default=0.875
    ),
    resize=Param(Integer(min=1), "instead of crop_ratio: the shorter side before the centre crop (px), as torchvision"),
    interpolation=Param(Choice("bilinear", "bicubic"), "of the resampling to size", default="bilinear"),
)
_section(
    "logging",
    "what a run leaves behind",
    folder=Param(Text(), "holds logs/ and checkpoints/", default="."),
    log_level=Param(Integer(min=0), "0: evaluate and log at the end only; 1: every epoch", default=1),
    log_every=Param(Integer(min=1), "optimizer steps between progress lines", default=50),
)
_section(
    "expected",
    "what the recipe's source reports, for comparison: top-1 and top-5 in percent after so many epochs",
    train_acc1=Param(Course(), "top-1 on the training split"),
    val_acc1=Param(Course(), "top-1 on the validation split"),
    val_acc5=Param(Course(), "top-5 on the validation split"),
    global_batch_size=Param(Integer(min=1), "images per optimizer step there"),
)
_section(
    "wandb",
    "Weights & Biases",
    enable=Param(Switch(), "log there; offline where no key is found", default=1),
    project=Param(Text(), "project", default="imagenet"),
    name=Param(Text(), "name of the run; None: chosen by W&B"),
)
_section(
    "dist",
    "processes, where training.distributed is on and torchrun has not started them",
    world_size=Param(Integer(min=1), "number of processes, one a GPU", default=1),
    address=Param(Text(), "address of the first node", default="localhost"),
    port=Param(Integer(min=1, max=65535), "port there", default=12355),
)

FLAGS: dict[str, str | tuple[str, str]] = {
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


def read_recipe(argv: list[str]) -> Settings:
    """Read the training recipe: `read_settings` of `RECIPE`, then the checks that take two keys or the disk.

    Raises
    ------
    SystemExit
        With status 2 after one message on stderr, for any mistake; with status 0 after ``--help``.
    """
    recipe = read_settings(RECIPE, argv, flags=FLAGS, description=DESCRIPTION, shipped=RECIPES)
    try:
        check_recipe(recipe)
    except UserError as error:
        exit_with_user_error(error)
    recipe.notices.extend(_find_notices(recipe))
    return recipe


def check_recipe(recipe: Settings) -> None:
    """Check what no single key shows.

    Raises
    ------
    ValueError
        Naming the keys at odds and where their values came from.
    """

    def said(key: str) -> str:
        return f"{key}={show(recipe.flat()[key])} ({recipe.source(key)})"

    lr, training, model, resolution = recipe.lr, recipe.training, recipe.model, recipe.resolution
    if resolution.min_res > resolution.max_res:
        raise UserError(f"{said('resolution.min_res')} is larger than {said('resolution.max_res')}")
    if lr.warmup_epochs and lr.lr_schedule_type == "cyclic":
        raise UserError(
            f"{said('lr.warmup_epochs')} has no place in {said('lr.lr_schedule_type')}, which warms up until "
            "lr.lr_peak_epoch: set one of the two, or --lr.warmup_epochs=0"
        )
    if lr.warmup_epochs and lr.warmup_epochs >= training.epochs:
        raise UserError(
            f"{said('lr.warmup_epochs')} must be less than {said('training.epochs')}: pass --lr.warmup_epochs=0"
        )
    if training.nesterov and training.optimizer != "sgd":
        raise UserError(f"{said('training.nesterov')} has no place in {said('training.optimizer')}: it is SGD's")
    if training.nesterov and not training.momentum:
        raise UserError(f"{said('training.nesterov')} needs a momentum, not {said('training.momentum')}")
    if training.bce_threshold is not None and training.loss != "bce":
        raise UserError(f"{said('training.bce_threshold')} has no place in {said('training.loss')}: it is bce's")
    if training.ema_rescale and not training.ema_decay:
        raise UserError(f"{said('training.ema_rescale')} needs a moving average: set training.ema_decay")
    if recipe.augmentation.repeats > 1 and recipe.data.order != "random":
        raise UserError(f"{said('augmentation.repeats')} needs --data.order=random, not {said('data.order')}")
    if recipe.validation.resize is not None and recipe.validation.resize < recipe.validation.resolution:
        raise UserError(
            f"{said('validation.resize')} is smaller than {said('validation.resolution')}, the crop from it"
        )
    if training.report and not training.eval_only:
        raise UserError(
            f"{said('training.report')} needs --eval_only; a run that trains leaves report.html in its folder"
        )
    if training.report and not Path(training.report).absolute().parent.is_dir():
        raise UserError(f"{said('training.report')}: there is no folder {Path(training.report).parent}")
    if model.pretrained and model.weights:
        raise UserError(f"{said('model.pretrained')} and {said('model.weights')} exclude each other: set one")
    for key in ("model.weights", "training.resume"):
        path = recipe.flat()[key]
        if path is not None and (key, path) != ("training.resume", AUTO) and not Path(path).is_file():
            raise UserError(f"{said(key)}: no such file")


def _find_notices(recipe: Settings) -> Iterable[str]:
    lr, training, model = recipe.lr, recipe.training, recipe.model
    expected = _expected(recipe)
    if expected and not courses(recipe):
        yield (
            f"the expected accuracies are those of {max(map(max, expected.values()))} epochs; this run has "
            f"{training.epochs} and is not compared with them"
        )
    if recipe.data.gpu is not None:
        yield f"data.gpu={recipe.data.gpu} ({recipe.source('data.gpu')}) has no effect here"
    if lr.lr_schedule_type == "cyclic" and lr.lr_peak_epoch >= training.epochs:
        yield (
            f"the learning rate will not come down from its peak: lr.lr_peak_epoch={lr.lr_peak_epoch} is not before "
            f"training.epochs={training.epochs}"
        )
    if training.eval_only and not (model.pretrained or model.weights or training.resume):
        yield "evaluating untrained weights: model.weights, model.pretrained or --resume give others"


def _expected(recipe: Settings) -> dict[str, dict[int, float]]:
    expected = {
        "train/acc1": recipe.expected.train_acc1,
        "val/acc1": recipe.expected.val_acc1,
        "val/acc5": recipe.expected.val_acc5,
    }
    return {name: course for name, course in expected.items() if course}


def courses(recipe: Settings) -> dict[str, dict[int, float]]:
    """The accuracies to compare a run with, in percent by epochs finished, under the names of the run's metrics.

    None where they go beyond the run's epochs: a shorter schedule passes through other values.
    """
    expected = _expected(recipe)
    return {} if any(max(course) > recipe.training.epochs for course in expected.values()) else expected


if __name__ == "__main__":
    read_recipe(sys.argv[1:])
