"""The settings of a recipe, by section.

To add a setting, add a field with a docstring to a section below, then use it, such as ``recipe.training.epochs``. The
key, its place in ``--help`` and the check of its value follow from the field. CONTRIBUTING.md tells the other steps.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from ffcv_ops.settings import setting
from ffcv_ops.settings.fields import (
    Auto,
    AutoInteger,
    Channels,
    Checker,
    Choice,
    Course,
    Integer,
    Number,
    Range,
    Switch,
    Text,
)


class AutoAugment(Checker[str]):
    """``trivial``, or timm's string for RandAugment, whose parts are read by the operation."""

    def check(self, value: Any) -> str:
        if value != "trivial" and not re.fullmatch(r"rand(-[\w.]+)*", str(value)):
            raise ValueError
        return str(value)

    def help(self) -> str:
        return "trivial, or timm's string such as rand-m7-mstd0.5-inc1"


class StepModeName(Checker[bool | str]):
    """The name of a mode of `imagenet_training.training.step_mode`, ``auto``, or a switch for ``torch.compile``."""

    words = ("auto", "graph", "compiled-graph")
    switches = {"compiled": True, "eager": False}  # as the log names these modes

    def check(self, value: Any) -> bool | str:
        word = str(value).strip().lower()
        return word if word in self.words else self.switches[word] if word in self.switches else Switch().check(value)

    def help(self) -> str:
        return f"{', '.join(self.words)}, 1 or 0"


@dataclass(frozen=True)
class Model:
    """The network."""

    arch: str = setting(Text(), default="resnet50")
    """Architecture, by its torchvision or timm name."""
    pretrained: bool = setting(Switch(), default=False)
    """Start from the ImageNet weights of torchvision or timm, which are downloaded."""
    weights: str | None = setting(Text())
    """Start from this file of weights or checkpoint."""
    class_names: str | None = setting(Text())
    """Text file with the class names of weights that have none: the name of class 0 on the first line, and so on."""
    ema: bool | Literal["auto"] = setting(Auto(), default="auto")
    """Take the averaged (1) or the raw weights (0) of a file that has both. auto: averaged if any."""
    library: Literal["auto", "torchvision", "timm"] = setting(Choice("auto", "torchvision", "timm"), default="auto")
    """Library that builds the architecture. auto: torchvision if it has the name, otherwise timm."""
    num_classes: int | Literal["auto"] = setting(AutoInteger(min=1), default=1000)
    """Number of classes. The training data must have as many. auto: as many as the training data have."""
    freeze: Literal["none", "body"] = setting(Choice("none", "body"), default="none")
    """body: only the head trains. The rest keeps its weights and its BatchNorm statistics."""
    drop_path: float = setting(Number(min=0, below=1), default=0.0)
    """Rate of stochastic depth: a share of the residual branches is skipped in training. Only timm's architectures."""

    @property
    def known_num_classes(self) -> int:
        """The number of classes, once `imagenet_training.data.loaders.settle_num_classes` has replaced ``auto``."""
        assert self.num_classes != "auto"
        return self.num_classes


@dataclass(frozen=True)
class Resolution:
    """Side of the training crops, by epoch."""

    min_res: int = setting(Integer(min=1), default=160)
    """Side up to epoch start_ramp (px)."""
    max_res: int = setting(Integer(min=1), default=160)
    """Side from epoch end_ramp on (px)."""
    start_ramp: int = setting(Integer(), default=0)
    """Last epoch at min_res. After it, the side grows linearly, in multiples of 32 px."""
    end_ramp: int = setting(Integer(), default=0)
    """First epoch at max_res."""


@dataclass(frozen=True)
class Data:
    """The files to read, and how they are read."""

    train_dataset: str = setting(Text(), default="/fsx/ns1/train.beton")
    """The .beton file of the training split."""
    val_dataset: str = setting(Text(), default="/fsx/ns1/val.beton")
    """The .beton file of the validation split."""
    num_workers: int = setting(Integer(min=-1), default=-1)
    """Threads that load the data of one rank. -1: all CPUs, shared equally by the ranks of the node."""
    in_memory: bool = setting(Switch(), default=True)
    """The file fits in memory: the operating system caches it. 0: read it page by page in each epoch."""
    order: Literal["random", "quasi_random"] = setting(Choice("random", "quasi_random"), default="random")
    """Order of the training samples. quasi_random reads one page at a time, for files larger than memory."""
    mean: tuple[float, float, float] | Literal["auto"] = setting(Channels(), default="auto")
    """Mean that normalises each channel, of pixels from 0 to 1. auto: that of the weights, or else ImageNet's."""
    std: tuple[float, float, float] | Literal["auto"] = setting(Channels(positive=True), default="auto")
    """Standard deviation that normalises each channel, of pixels from 0 to 1. auto: as data.mean."""
    gpu: int | None = setting(Integer())
    """Has no effect. It is accepted because ffcv-imagenet's recipes for ResNet-18 set it."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training images."""

    crop_scale: tuple[float, float] = setting(Range(max=1), default=(0.08, 1.0))
    """Area of a random crop, as a share of the image."""
    crop_ratio: tuple[float, float] = setting(Range(), default=(0.75, 1.3333))
    """Width / height of a random crop."""
    flip: float = setting(Number(min=0, max=1), default=0.5)
    """Probability that an image is mirrored."""
    interpolation: Literal["bilinear", "bicubic"] = setting(Choice("bilinear", "bicubic"), default="bilinear")
    """Interpolation that scales a crop to its final size."""
    mixup_alpha: float = setting(Number(min=0), default=0.0)
    """Mixup draws its weight lambda from Beta(alpha, alpha). 0: no Mixup."""
    cutmix_alpha: float = setting(Number(min=0), default=0.0)
    """CutMix draws its share lambda from Beta(alpha, alpha). 0: no CutMix."""
    mix_prob: float = setting(Number(min=0, max=1), default=1.0)
    """Probability that a batch is mixed."""
    switch_prob: float = setting(Number(min=0, max=1), default=0.5)
    """If both Mixup and CutMix are on: probability of CutMix."""
    mix_per: Literal["batch", "element"] = setting(Choice("batch", "element"), default="batch")
    """Draw lambda and the box once for each batch, or once for each image."""
    auto_augment: str | None = setting(AutoAugment())
    """TrivialAugmentWide or RandAugment, after the crop and before mixing. None: neither."""
    erasing: float = setting(Number(min=0, max=1), default=0.0)
    """Probability that a random rectangle of an image is erased."""
    repeats: int = setting(Integer(min=1), default=1)
    """Copies of each image, each with its own random changes, spread over the batches of all ranks."""


@dataclass(frozen=True)
class LearningRate:
    """Learning rate."""

    lr: float | None = setting(Number(min=0))
    """Peak learning rate for any batch size. None: base_lr, scaled linearly."""
    base_lr: float = setting(Number(min=0), default=0.5)
    """Peak learning rate for each 256 images of the global batch."""
    lr_schedule_type: Literal["cyclic", "step", "cosine"] = setting(
        Choice("cyclic", "step", "cosine"), default="cyclic"
    )
    """Shape of the schedule over the epochs."""
    lr_peak_epoch: int = setting(Integer(min=0), default=2)
    """cyclic: the rate rises linearly to its peak at this epoch, then falls linearly to 0."""
    step_ratio: float = setting(Number(min=0), default=0.1)
    """step: the rate is multiplied by this factor after every step_length epochs."""
    step_length: int = setting(Integer(min=1), default=30)
    """step: epochs between two factors."""
    warmup_epochs: float = setting(Number(min=0), default=0.0)
    """cosine and step: epochs of linear warm-up."""
    warmup_lr: float = setting(Number(min=0, max=1), default=0.0)
    """The warm-up starts at this share of the peak."""
    min_lr: float = setting(Number(min=0), default=0.0)
    """cosine: learning rate at the end."""


@dataclass(frozen=True)
class Training:
    """Optimisation."""

    eval_only: bool = setting(Switch(), default=False)
    """Only evaluate: the checkpoint of training.resume as its run did, model.weights, or the pretrained model."""
    preview: str | None = setting(Text())
    """Only draw training images as the model receives them, into this PNG file."""
    report: str | None = setting(Text())
    """With eval_only: write a report of the evaluation into this HTML file."""
    dry_run: bool = setting(Switch(), default=False)
    """Only print the plan of the run and the resolved recipe. Needs no data."""
    batch_size: int = setting(Integer(min=1), default=512)
    """Images of one batch of one GPU."""
    accumulation: int = setting(Integer(min=1), default=1)
    """Batches for each optimizer step."""
    loss: Literal["cross_entropy", "bce"] = setting(Choice("cross_entropy", "bce"), default="cross_entropy")
    """Loss: cross entropy, or binary cross entropy of each class."""
    bce_threshold: float | None = setting(Number(min=0, below=1))
    """bce: targets above the threshold become 1, all others 0. None: targets stay as they are."""
    class_weights: Literal["none", "auto"] = setting(Choice("none", "auto"), default="none")
    """auto: images of rare classes count more in the loss, by the effective number of images of their class."""
    optimizer: Literal["sgd", "lamb", "adamw"] = setting(Choice("sgd", "lamb", "adamw"), default="sgd")
    """Optimizer: SGD with momentum, timm's LAMB, or AdamW."""
    momentum: float = setting(Number(min=0, below=1), default=0.9)
    """sgd: momentum."""
    nesterov: bool = setting(Switch(), default=False)
    """sgd: use Nesterov's momentum."""
    layer_decay: float | None = setting(Number(above=0, max=1))
    """Factor of the learning rate from a layer to the layer before it. The head has the full rate. None: all have."""
    weight_decay: float = setting(Number(min=0), default=4e-5)
    """Weight decay."""
    bn_wd: float | None = setting(Number(min=0))
    """Weight decay of one-dimensional parameters (normalisation layers, biases), and of those that a model of timm
    spares, such as position embeddings. None: as weight_decay."""
    epochs: int = setting(Integer(min=1), default=30)
    """Passes over the training split."""
    label_smoothing: float = setting(Number(min=0, below=1), default=0.1)
    """Share of each target that is spread equally over all classes."""
    distributed: bool = setting(Switch(), default=False)
    """Start dist.world_size processes. Under torchrun it has no effect: torchrun has started them."""
    use_blurpool: bool = setting(Switch(), default=False)
    """Blur the input of strided convolutions (BlurPool)."""
    precision: Literal["16-mixed", "bf16-mixed", "32"] = setting(
        Choice("16-mixed", "bf16-mixed", "32"), default="16-mixed"
    )
    """Floating-point numbers of the model: float16 or bfloat16 mixed with float32, or only float32."""
    tf32: bool = setting(Switch(), default=True)
    """Multiply float32 matrices in TF32 (10 bits of mantissa) on GPUs that can. It is faster."""
    deterministic: bool = setting(Switch(), default=False)
    """Use only GPU kernels that give the same bits in every run. It is slower."""
    compile: bool | str = setting(StepModeName(), default="auto")
    """1: use torch.compile. graph: record the step as CUDA graphs. auto: on one GPU, the mode that is measured to be
    fastest; on several, 1 if the run is long enough to gain by it."""
    grad_clip: float = setting(Number(min=0), default=0.0)
    """Largest norm of the gradient. 0: no limit."""
    agc: float = setting(Number(min=0), default=0.0)
    """Adaptive clipping: largest norm of a unit's gradient, as a share of the norm of its weights. 0: no limit."""
    ema_decay: float = setting(Number(min=0, below=1), default=0.0)
    """Decay of a moving average of the weights, which is then evaluated instead of the model. 0: no average."""
    ema_every: int = setting(Integer(min=1), default=1)
    """Optimizer steps between two updates of the moving average."""
    ema_rescale: bool = setting(Switch(), default=False)
    """1 - ema_decay is meant for one image and one epoch, and is scaled to the run as torchvision does."""
    channels_last: bool = setting(Switch(), default=True)
    """Store images and weights in PyTorch's channels_last memory format, which GPUs process faster."""
    seed: int = setting(Integer(min=0, max=2**63 - 1), default=0)
    """Seed of the initial weights, the order of the samples, and all random changes of images."""
    resume: str | None = setting(Text())
    """Checkpoint to continue from, such as checkpoints/last.ckpt. auto: the newest one in logging.folder, if any."""
    save_every_steps: int = setting(Integer(min=0), default=0)
    """Also save a checkpoint within an epoch, after every so many steps. 0: only at the end of each epoch."""


@dataclass(frozen=True)
class Validation:
    """Evaluation after each epoch."""

    batch_size: int = setting(Integer(min=1), default=512)
    """Images of one batch of one GPU."""
    resolution: int = setting(Integer(min=1), default=224)
    """Side of the centre crop that the model receives (px)."""
    lr_tta: bool = setting(Switch(), default=True)
    """Average the logits of each image and its mirror image."""
    crop_ratio: float = setting(Number(min=0.01, max=1), default=0.875)
    """Side of the centre crop, as a share of the shorter side of the image."""
    resize: int | None = setting(Integer(min=1))
    """Instead of crop_ratio: scale the shorter side to this size before the centre crop, as torchvision does (px)."""
    interpolation: Literal["bilinear", "bicubic"] = setting(Choice("bilinear", "bicubic"), default="bilinear")
    """Interpolation that scales a crop to its final size."""
    classes: Literal["all", "only"] = setting(Choice("all", "only"), default="all")
    """Predict one of all classes of the model, or only one of those that the validation file has images of."""


@dataclass(frozen=True)
class Logging:
    """The files of a run."""

    folder: str = setting(Text(), default=".")
    """Folder of the run. It gets logs/ and checkpoints/."""
    log_level: int = setting(Integer(min=0), default=1)
    """1: evaluate and log after every epoch. 0: only at the end."""
    log_every: int = setting(Integer(min=1), default=50)
    """Optimizer steps between two lines of progress."""


@dataclass(frozen=True)
class Expected:
    """Accuracies that the source of the recipe reports, in percent after so many epochs, for comparison."""

    train_acc1: dict[int, float] | None = setting(Course())
    """Top-1 on the training split."""
    val_acc1: dict[int, float] | None = setting(Course())
    """Top-1 on the validation split."""
    val_acc5: dict[int, float] | None = setting(Course())
    """Top-5 on the validation split."""
    global_batch_size: int | None = setting(Integer(min=1))
    """Images of one optimizer step of the source."""


@dataclass(frozen=True)
class WandB:
    """Weights & Biases."""

    enable: bool = setting(Switch(), default=True)
    """Log to Weights & Biases; offline if there is no API key."""
    project: str = setting(Text(), default="imagenet")
    """Project."""
    name: str | None = setting(Text())
    """Name of the run. None: Weights & Biases chooses one."""


@dataclass(frozen=True)
class Dist:
    """Processes to start if training.distributed is on. Under torchrun they have no effect."""

    world_size: int = setting(Integer(min=1), default=1)
    """Number of processes, one for each GPU."""
    address: str = setting(Text(), default="localhost")
    """Address of the first node."""
    port: int = setting(Integer(min=1, max=65535), default=12355)
    """Port of the first node."""
