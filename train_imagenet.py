"""Train an image classifier from a recipe.

    python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml
    torchrun --nproc_per_node=8 train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml

Reads the ``.beton`` files of ``data.train_dataset`` and ``data.val_dataset``. Prints the resolved recipe, the
arithmetic of the learning rate, then a line every ``logging.log_every`` steps and every epoch. Leaves behind, below
``logging.folder``: ``logs/train_<time>.log``, ``.jsonl`` (a record of every epoch), ``.png`` (the curve) and
``.recipe.json``; ``checkpoints/last.ckpt``, the best checkpoint, and exported weights.

``--config-file`` may be repeated: later files win, then the command line. ``--resume checkpoints/last.ckpt`` goes on
with a run, ``--eval_only`` evaluates, ``--dry_run`` shows the plan and touches nothing, ``--preview out.png`` draws
training images as the model gets them, ``--help`` lists every key.
"""

import functools
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ffcv.transforms import ToDevice, ToTensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from ffcv_ops import (
    Beton,
    CenterCrop,
    Label,
    Loader,
    Mix,
    Normalize,
    OrderOption,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    TrivialAugmentWide,
    read_beton,
)
from training import distributed
from training.checkpoint import Checkpoints, TrainState, read_checkpoint
from training.distributed import World
from training.logs import RunLog, pace
from training.loop import DTYPES, RunError, Trainer, evaluate, train_epoch
from training.loss import build_loss
from training.model import IMAGENET_MEAN, IMAGENET_STD, build_model
from training.optim import build_ema, build_optimizer
from training.preview import class_names, denormalized, draw_contact_sheet, take_images
from training.recipe import Plan, Settings, courses, plan, read_recipe, refuse, summary
from training.schedule import build_resolution, build_schedule

IMAGENET_NUM_TRAIN, IMAGENET_NUM_VAL = 1_281_167, 50_000


def main() -> None:
    recipe = read_recipe(sys.argv[1:])
    try:
        check_names(recipe)
        if recipe.training.dry_run:
            show_plan(recipe)
            return
        if recipe.training.preview:
            draw_preview(recipe)
            return
        world = join(recipe)
        run = Run(recipe, world)
    except ValueError as error:
        refuse(error)
    try:
        run.evaluate_only() if recipe.training.eval_only else run.train()
    except RunError as error:
        run.log.say(f"error: {error}")
        run.log.close(exit_code=1)
        raise SystemExit(1) from error
    except torch.OutOfMemoryError as error:
        run.log.say(f"error: {out_of_memory_message(recipe, run.plan)}")
        run.log.close(exit_code=1)
        raise SystemExit(1) from error
    distributed.stop()


def check_names(recipe: Settings) -> None:
    """Refuse an architecture or an augmentation that does not exist, and drop path where there is none."""
    with torch.device("meta"):
        build_model(recipe.model.arch, library=recipe.model.library, drop_path=recipe.model.drop_path)
    try:
        augmentations(recipe)
    except ValueError as error:
        key = "augmentation.auto_augment"
        raise ValueError(f"{key} ({recipe.source(key)}): {error}") from None


def show_plan(recipe: Settings) -> None:
    """Print the resolved recipe and its arithmetic. Needs no data, no GPU, and creates nothing."""
    sizes, assumed = [], []
    for path, imagenet_size in (
        (recipe.data.train_dataset, IMAGENET_NUM_TRAIN),
        (recipe.data.val_dataset, IMAGENET_NUM_VAL),
    ):
        if Path(path).exists():
            sizes.append(read_beton(path).num_samples)
        else:
            sizes.append(imagenet_size)
            assumed.append(f"{path} does not exist: assuming ImageNet's {imagenet_size:,} images")
    world_size = distributed.planned_world_size(recipe.training.distributed, recipe.dist.world_size)
    planned = plan(recipe, world_size=world_size, num_train=sizes[0], num_val=sizes[1])
    print(summary(recipe, planned))
    for line in [*recipe.notices, *planned.notices, *assumed]:
        print(f"note: {line}")


def draw_preview(recipe: Settings) -> None:
    """Draw the first training images of epoch 0 as the model gets them. Needs training data, and trains nothing."""
    path, world = Path(recipe.training.preview), distributed.start()
    if not path.parent.is_dir():
        raise ValueError(f"training.preview={path}: there is no folder {path.parent}")
    data = open_data(recipe.data.train_dataset, recipe, "train")
    recipe.training.batch_size = min(recipe.training.batch_size, data.num_samples // world.world_size)
    crop = random_crop(recipe, build_resolution(recipe)(0))
    dtype = DTYPES[recipe.training.precision if world.device.type == "cuda" else "32"]
    with train_loader(recipe, world, num_workers(recipe, world), dtype, crop) as loader:
        images, targets = take_images(loader.epoch(0), len(loader))
    if world.is_main:
        shown = denormalized(images, IMAGENET_MEAN, IMAGENET_STD)
        title = preview_title(recipe, crop.size)
        names = class_names(data.classes, data.num_classes)
        draw_contact_sheet(shown, targets.numpy(), path, names=names, title=title)
        print(f"{len(shown)} training images as the model gets them: {path}")
    distributed.stop()


def join(recipe: Settings) -> World:
    """Become one rank of the run; under no launcher, start one where the recipe asks for several processes."""
    if distributed.under_torchrun():
        asked = recipe.dist.world_size if recipe.training.distributed else None
        world = distributed.start()
        if asked not in (None, world.world_size):
            recipe.notices.append(f"dist.world_size={asked}, but torchrun started {world.world_size}: torchrun wins")
        return world
    if recipe.training.distributed and recipe.dist.world_size > 1:
        distributed.relaunch(recipe.dist.world_size, recipe.dist.address, recipe.dist.port)
    return distributed.start()


class Run:
    """One run: everything is checked and built here, before anything is created on disk."""

    def __init__(self, recipe: Settings, world: World):
        self.recipe, self.world = recipe, world
        self.log = RunLog(Path(recipe.logging.folder) / "logs", world.is_main, courses(recipe))
        self.precision = recipe.training.precision
        if world.device.type == "cpu" and self.precision != "32":
            recipe.notices.append(f"no GPU is visible: training on the CPU, in 32-bit instead of {self.precision}")
            self.precision = "32"

        self.val = open_data(recipe.data.val_dataset, recipe, "val")
        self.train_data = (
            self.val if recipe.training.eval_only else open_data(recipe.data.train_dataset, recipe, "train")
        )
        check_same_classes(self.train_data, self.val)
        self.plan = plan(
            recipe, world_size=world.world_size, num_train=self.train_data.num_samples, num_val=self.val.num_samples
        )
        recipe.notices.extend(self.plan.notices)
        checkpoint = read_checkpoint(recipe.training.resume) if recipe.training.resume else None
        self.build(checkpoint)

    def build(self, checkpoint: dict[str, Any] | None) -> None:
        """Model, optimizer, moving average, loaders, and where the run stands."""
        recipe, world, training = self.recipe, self.world, self.recipe.training
        torch.manual_seed(training.seed)
        torch.backends.cudnn.benchmark = True
        model = build_model(
            recipe.model.arch,
            library=recipe.model.library,
            num_classes=recipe.model.num_classes,
            pretrained=bool(recipe.model.pretrained) and checkpoint is None,
            weights=recipe.model.weights if checkpoint is None else None,
            drop_path=recipe.model.drop_path,
            use_blurpool=bool(training.use_blurpool),
        ).to(world.device)
        if training.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.schedule = build_schedule(recipe, self.plan)
        self.trainer = Trainer(
            model=model,
            ema=build_ema(model, self.plan.ema_decay),
            optimizer=build_optimizer(
                model,
                training.optimizer,
                lr=self.plan.lr,
                momentum=training.momentum,
                nesterov=bool(training.nesterov),
                weight_decay=training.weight_decay,
                bn_wd=training.bn_wd,
            ),
            scaler=torch.amp.GradScaler(world.device.type, enabled=self.precision == "16-mixed"),
            world=world,
            loss=build_loss(training.loss, bce_threshold=training.bce_threshold),
            lr=self.schedule.lr,
            precision=self.precision,
            accumulation=training.accumulation,
            grad_clip=training.grad_clip,
            agc=training.agc,
            ema_every=training.ema_every,
            channels_last=bool(training.channels_last),
            seed=training.seed,
        )
        self.checkpoints = Checkpoints(
            folder=Path(recipe.logging.folder) / "checkpoints",
            arch=recipe.model.arch,
            world=world,
            parts={
                "model": model,
                "ema": self.trainer.ema,
                "optimizer": self.trainer.optimizer,
                "scaler": self.trainer.scaler,
            },
            facts=self.facts(),
        )
        self.state = TrainState()
        if checkpoint is not None:
            self.state = self.checkpoints.restore(checkpoint)
            recipe.notices.extend(differences(checkpoint, self.checkpoints.facts))
        self.eval_model = self.trainer.ema.module if self.trainer.ema is not None else model
        if world.world_size > 1:
            devices = [world.local_rank] if world.device.type == "cuda" else None
            self.trainer.model = DistributedDataParallel(model, device_ids=devices)
        threads, dtype = num_workers(recipe, world), DTYPES[self.precision]
        self.val_loader = val_loader(recipe, world, threads, dtype)
        if not training.eval_only:
            self.crop = random_crop(recipe, self.schedule.resolution(self.state.epoch))
            self.loader = train_loader(recipe, world, threads, dtype, self.crop)

    def facts(self) -> dict[str, Any]:
        """What makes the run repeatable, stored with its logs and every checkpoint."""
        recipe = self.recipe
        return {
            "recipe": recipe.to_dict(),
            "recipe_files": {str(path): Path(path).read_text(encoding="utf-8") for path in recipe.files},
            "seed": recipe.training.seed,
            "world_size": self.world.world_size,
            "global_batch_size": self.plan.global_batch_size,
            "commit": git_commit(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "torchvision", "timm", "ffcv", "numba", "numpy")},
            },
            "data": {
                name: {"path": str(beton.path), "num_samples": beton.num_samples, "digest": beton.digest}
                for name, beton in (("train", self.train_data), ("val", self.val))
            },
        }

    def train(self) -> None:
        """Epoch after epoch: train, evaluate, log, save."""
        recipe, state, log, checkpoints = self.recipe, self.state, self.log, self.checkpoints
        epochs = recipe.training.epochs
        self.open_logs()
        save = functools.partial(checkpoints.save, state)
        for epoch in range(state.epoch, epochs):
            self.crop.size = self.schedule.resolution(epoch)
            values = train_epoch(
                self.trainer,
                self.loader,
                state,
                log,
                steps_per_epoch=self.plan.steps_per_epoch,
                epochs=epochs,
                log_every=recipe.logging.log_every if recipe.logging.log_level else 0,
                save=save,
                save_every_steps=recipe.training.save_every_steps,
            )
            if recipe.logging.log_level or epoch == epochs - 1:
                values.update(self.evaluate())
            is_best = values.get("val/acc1", -1.0) > state.best_acc1
            if is_best:
                state.best_acc1, state.best_epoch = values["val/acc1"], epoch
            state.epoch, state.batch = epoch + 1, 0
            log.say(epoch_line(values, epoch, epochs, self.crop.size, pace(values, log.courses, epoch + 1)))
            log.epoch({"epoch": epoch, **values, "resolution": self.crop.size}, state.step)
            checkpoints.save(state, is_best=is_best)
        self.say_goodbye()
        log.close()

    def evaluate(self) -> dict[str, float]:
        recipe = self.recipe
        return evaluate(
            self.eval_model,
            self.val_loader,
            self.world,
            num_samples=self.val.num_samples,
            precision=self.precision,
            flip=bool(recipe.validation.lr_tta),
            channels_last=bool(recipe.training.channels_last),
        )

    def evaluate_only(self) -> None:
        """Evaluate the weights at hand on the validation split; creates nothing."""
        for notice in self.recipe.notices:
            self.log.say(f"note: {notice}")
        values = self.evaluate()
        self.log.say(
            f"{self.recipe.data.val_dataset}: {self.val.num_samples:,} images, loss {values['val/loss']:.4f}, "
            f"top-1 {values['val/acc1']:.3%}, top-5 {values['val/acc5']:.3%}"
        )

    def open_logs(self) -> None:
        """Say what is about to run, and open its files."""
        self.log.say(summary(self.recipe, self.plan))
        for notice in self.recipe.notices:
            self.log.say(f"note: {notice}")
        resumed = self.recipe.training.resume
        if not resumed or Path(resumed).resolve().parent != self.checkpoints.folder.resolve():
            for path in self.checkpoints.keep_earlier_run():
                self.log.say(f"note: an earlier run's checkpoint was kept as {path}")
        if resumed:
            self.log.say(f"resuming at epoch {self.state.epoch}, batch {self.state.batch} (step {self.state.step})")
        wandb_settings = self.recipe.wandb
        self.log.open(
            self.state,
            self.checkpoints.facts,
            {"enable": bool(wandb_settings.enable), "project": wandb_settings.project, "name": wandb_settings.name},
        )

    def say_goodbye(self) -> None:
        """Say how the run ended and where everything lies."""
        state, log, checkpoints = self.state, self.log, self.checkpoints
        log.say(f"done: best top-1 {state.best_acc1:.3%} in epoch {state.best_epoch}")
        log.say(f"  best checkpoint   {checkpoints.best(state)}")
        log.say(f"  last checkpoint   {checkpoints.last}")
        log.say(f"  exported weights  {checkpoints.weights}")
        log.say(f"  log, record, curve  {log.folder / state.run_name}.log .jsonl .png")


def open_data(path: str, recipe: Settings, split: str) -> Beton:
    """Open a ``.beton`` and check that its classes are as many as the model's."""
    beton = read_beton(path)
    if beton.num_classes != recipe.model.num_classes:
        raise ValueError(
            f"{path} has {beton.num_classes} classes, the model {recipe.model.num_classes}: "
            f"pass --model.num_classes={beton.num_classes}, or another --data.{split}_dataset"
        )
    return beton


def check_same_classes(train: Beton, val: Beton) -> None:
    """Refuse two files that number their classes differently."""
    if train.classes is None or val.classes is None or train.classes == val.classes:
        return
    number, (ours, theirs) = next(
        (i, pair) for i, pair in enumerate(zip(train.classes, val.classes, strict=True)) if pair[0] != pair[1]
    )
    raise ValueError(f"class {number} is {ours} in {train.path} and {theirs} in {val.path}: write both from one set")


def on_device(world: World) -> list[Any]:
    """The operations that bring a batch to this rank's GPU; none on a CPU."""
    return [ToDevice(world.device, non_blocking=True)] if world.device.type == "cuda" else []


def num_workers(recipe: Settings, world: World) -> int:
    """Threads that load for this rank."""
    asked = recipe.data.num_workers
    return asked if asked > 0 else max(1, distributed.num_cpus() // world.local_world_size)


def random_crop(recipe: Settings, size: int) -> RandomResizedCrop:
    """The decoder of training images, perhaps mirrored, of a side in px."""
    augmentation = recipe.augmentation
    return RandomResizedCrop(
        size=size,
        scale=augmentation.crop_scale,
        ratio=augmentation.crop_ratio,
        flip=augmentation.flip,
        interpolation=augmentation.interpolation,
    )


def augmentations(recipe: Settings) -> list[Any]:
    """What changes the cropped 8-bit images before they are mixed."""
    augmentation = recipe.augmentation
    operations: list[Any] = []
    if augmentation.auto_augment == "trivial":
        operations.append(TrivialAugmentWide())
    elif augmentation.auto_augment:
        operations.append(RandAugment(augmentation.auto_augment))
    if augmentation.erasing:
        operations.append(RandomErasing(augmentation.erasing))
    return operations


def train_loader(recipe: Settings, world: World, threads: int, dtype: torch.dtype, crop: RandomResizedCrop) -> Loader:
    """Batches of normalised float images (N, 3, H, W) and dense targets (N, K) for this rank."""
    augmentation = recipe.augmentation
    mix = Mix(
        num_classes=recipe.model.num_classes,
        mixup_alpha=augmentation.mixup_alpha,
        cutmix_alpha=augmentation.cutmix_alpha,
        prob=augmentation.mix_prob,
        switch_prob=augmentation.switch_prob,
        smoothing=recipe.training.label_smoothing,
        per=augmentation.mix_per,
    )
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, dtype)
    return Loader(
        recipe.data.train_dataset,
        batch_size=recipe.training.batch_size,
        num_workers=threads,
        os_cache=bool(recipe.data.in_memory),
        order=OrderOption[recipe.data.order.upper()],
        distributed=world.world_size > 1,
        rank=world.rank,
        world_size=world.world_size,
        seed=recipe.training.seed,
        drop_last=True,
        repeats=augmentation.repeats,
        pipelines={
            "image": [crop, *augmentations(recipe), ToTensor(), *on_device(world), normalize, mix.images()],
            "label": [Label(), *on_device(world), mix.targets()],
        },
    )


def val_loader(recipe: Settings, world: World, threads: int, dtype: torch.dtype) -> Loader:
    """Batches of normalised float images (N, 3, H, W) and labels (N,): this rank's share, each sample once."""
    validation = recipe.validation
    crop = CenterCrop(
        validation.resolution,
        ratio=validation.crop_ratio,
        resize=validation.resize,
        interpolation=validation.interpolation,
    )
    return Loader(
        recipe.data.val_dataset,
        batch_size=validation.batch_size,
        num_workers=threads,
        os_cache=bool(recipe.data.in_memory),
        order=OrderOption.SEQUENTIAL,
        distributed=world.world_size > 1,
        rank=world.rank,
        world_size=world.world_size,
        drop_last=False,
        pipelines={
            "image": [crop, ToTensor(), *on_device(world), Normalize(IMAGENET_MEAN, IMAGENET_STD, dtype)],
            "label": [Label(), *on_device(world)],
        },
    )


def differences(checkpoint: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What a resumed run does differently from the one that saved the checkpoint."""
    notices = []
    for section, values in facts["recipe"].items():
        for key, value in values.items():
            before = checkpoint["recipe"].get(section, {}).get(key, value)
            if before != value and (section, key) != ("training", "resume"):
                notices.append(f"{section}.{key} is {value}, and was {before} in the run that is resumed")
    for split, data in facts["data"].items():
        before = checkpoint["data"].get(split, data)
        if before["digest"] != data["digest"]:
            notices.append(f"the {split} data is not the resumed run's: {data['path']} has another digest")
    return notices


def epoch_line(values: dict[str, float], epoch: int, epochs: int, resolution: int, expected: str) -> str:
    """One line on a finished epoch, and where it stands against what the recipe expects."""
    line = (
        f"epoch {epoch} ({epoch + 1}/{epochs})  {resolution} px  train loss {values['train/loss']:.4f}  "
        f"top-1 {values['train/acc1']:.2%}"
    )
    if "val/acc1" in values:
        line += f"  val loss {values['val/loss']:.4f}  top-1 {values['val/acc1']:.2%}  top-5 {values['val/acc5']:.2%}"
    line += f"  {values['images_per_s']:,.0f} images/s  data wait {values['data_wait']:.1%}"
    return f"{line}  {expected}" if expected else line


def preview_title(recipe: Settings, size: int) -> str:
    """What the images of a preview went through."""
    augmentation, names = recipe.augmentation, ", ".join(str(path) for path in recipe.files) or "no recipe"
    mixing = f"Mixup {augmentation.mixup_alpha:g}, CutMix {augmentation.cutmix_alpha:g}"
    return (
        f"{names}: epoch 0, {size} px, seed {recipe.training.seed}, the first images of the first batches\n"
        f"augmentation {augmentation.auto_augment or 'none'}, erasing {augmentation.erasing:g}, {mixing}, "
        f"label smoothing {recipe.training.label_smoothing:g}; below each image its classes and their target weights"
    )


def out_of_memory_message(recipe: Settings, planned: Plan) -> str:
    """The batch size to try after the GPU's memory ran out, and the learning rate it scales to."""
    batch_size = max(1, recipe.training.batch_size // 2)
    global_batch_size = planned.global_batch_size // recipe.training.batch_size * batch_size
    lr = planned.lr * global_batch_size / planned.global_batch_size
    accumulation = 2 * recipe.training.accumulation
    return (
        f"out of GPU memory at a batch size of {recipe.training.batch_size}. Try --batch_size {batch_size}: its "
        f"linearly scaled learning rate is {lr:.4g} (global batch {global_batch_size}); or --batch_size {batch_size} "
        f"--training.accumulation={accumulation}, which keeps the global batch and the learning rate"
    )


def git_commit() -> str | None:
    """The commit of the code that runs, with ``+`` where files were changed since; None outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy may lie within another repository, which does not know it.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


# What is started, as a script or by the command's name: torchrun learns of an error from it.
command = record(main)

if __name__ == "__main__":
    command()
