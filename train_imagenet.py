"""Train an image classifier from a recipe.

    python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml
    torchrun --nproc_per_node=8 train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml

Reads the ``.beton`` files of ``data.train_dataset`` and ``data.val_dataset``. Prints the resolved recipe, the
arithmetic of the learning rate, then a line every ``logging.log_every`` steps and every epoch. Leaves behind, below
``logging.folder``: ``report.html``; ``logs/train_<time>.log``, ``.jsonl`` (a record of every epoch), ``.png`` (the
curve), ``.recipe.json`` and ``.predictions.npz`` (of the best epoch, for every validation image);
``checkpoints/last.ckpt``, the best checkpoint, and exported weights.

``--config-file`` may be repeated: later files win, then the command line. ``--resume checkpoints/last.ckpt`` goes on
with a run, ``--resume auto`` with its newest checkpoint, ``--eval_only`` evaluates (``--report out.html`` shows what it
got wrong), ``--dry_run`` shows the plan and touches nothing, ``--preview out.png`` draws training images as the model
gets them, ``--help`` lists every key.

SIGTERM, SIGUSR1 and Ctrl-C save the run where it stands; the exit status is then 75, after Ctrl-C 130. It is 2 for a
mistake in the recipe, found before anything is created, and 1 for a run that failed.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.machine import cpus_per_rank, is_launched
from ffcv_ops.units import show_duration
from imagenet_training.recipe import AUTO, Recipe, courses, read_recipe

if __name__ == "__main__":
    read_recipe(sys.argv[1:])  # so that a mistake, or --help, does not wait for imports that take seconds

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record
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
    SampleError,
    TrivialAugmentWide,
    read_beton,
)
from ffcv_ops._ffcv import ToDevice, ToTensor
from ffcv_ops.files import SaveError
from imagenet_training import distributed
from imagenet_training.background import Aside
from imagenet_training.checkpoint import Checkpoints, TrainState, copied, newest_checkpoint, read_checkpoint
from imagenet_training.distributed import Failure, World
from imagenet_training.logs import RunLog
from imagenet_training.loop import DTYPES, Forecast, RunError, SampleMeter, Trainer, allow_tf32, evaluate, train_epoch
from imagenet_training.loss import build_loss
from imagenet_training.metrics import pace
from imagenet_training.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_model,
    compiled,
    find_library,
    gains_from_compilation,
    model_size,
)
from imagenet_training.optim import build_ema, build_optimizer
from imagenet_training.plan import Plan, keep_global_batch, plan
from imagenet_training.predictions import Predictions
from imagenet_training.preemption import SECONDS_TO_END, Stopped, StopRequest
from imagenet_training.preview import caption, class_names, denormalized, draw_contact_sheet, take_images
from imagenet_training.report import NUM_MISTAKES_SHOWN, write_report
from imagenet_training.schedule import build_resolution, build_schedule
from imagenet_training.summary import resolved_recipe, summary

IMAGENET_NUM_TRAIN, IMAGENET_NUM_VAL = 1_281_167, 50_000
# For DistributedDataParallel; PyTorch 2.14 warns of the old name.
_LOCAL_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


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
        exit_with_user_error(UserError(str(error)))
    try:
        run.evaluate_only() if recipe.training.eval_only else run.train()
    except Stopped:
        distributed.stop()
        raise SystemExit(run.stop.exit_status) from None
    except Exception as error:
        end_failed(run, error)
    distributed.stop()


def end_failed(run: "Run", error: Exception) -> NoReturn:
    """Leave with exit status 1; of several ranks the first to fail says why, and torchrun ends the others."""
    expected = isinstance(error, (RunError, SampleError, SaveError, torch.OutOfMemoryError))
    if isinstance(error, torch.OutOfMemoryError):
        message = out_of_memory_message(run.recipe, run.plan)
    elif isinstance(error, SaveError):
        message = f"{error}. Put that right and start again; a run goes on with --resume auto"
    else:
        message = str(error) if expected else traceback.format_exc().rstrip()
    if run.world.world_size == 1:
        run.log.say(f"error: {message}")
    else:
        if distributed.is_lost_connection(error):
            time.sleep(SECONDS_TO_END)  # ended meanwhile, unless the other rank is on another node
        failure = run.board.announce(Failure(run.world.rank, message))
        if failure.rank != run.world.rank:
            run.tell_failure(failure)
            time.sleep(SECONDS_TO_END)
        elif run.world.is_main:
            run.log.say(f"error: rank 0: {message}")
        else:
            print(f"error: rank {failure.rank}: {message}", file=sys.stderr, flush=True)
    if expected:
        run.board.write("given up", message)
    try:
        run.aside.finish()  # an epoch that is over is saved, whatever came after it
    except Exception as other:
        run.log.say(f"error: the last save has failed too: {type(other).__name__}: {other}")
    get_error_handler().record_exception(error)
    run.log.close(exit_code=1)
    if run.world.world_size == 1:
        raise SystemExit(1) from error
    sys.stdout.flush()
    os._exit(1)  # leaving the process group would wait for ranks that are gone


def check_names(recipe: Recipe) -> None:
    """Refuse an architecture or an augmentation that does not exist, and drop path where there is none."""
    model_on_paper(recipe)
    try:
        augmentations(recipe)
    except ValueError as error:
        key = "augmentation.auto_augment"
        raise ValueError(f"{key} ({recipe.source(key)}): {error}") from None


def model_on_paper(recipe: Recipe) -> torch.nn.Module:
    """The recipe's model on the meta device: its shapes alone."""
    model = recipe.model
    with torch.device("meta"):
        return build_model(
            model.arch,
            library=model.library,
            num_classes=model.num_classes,
            drop_path=model.drop_path,
            use_blurpool=recipe.training.use_blurpool,
        )


def size_on_paper(recipe: Recipe) -> str:
    """The size of the recipe's model, at the resolution of the validation."""
    return model_size(model_on_paper(recipe), recipe.validation.resolution)


def show_plan(recipe: Recipe) -> None:
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
    print(summary(recipe, planned, size_on_paper(recipe)), resolved_recipe(recipe), sep="\n\n")
    for line in [*recipe.notices, *planned.notices, *assumed]:
        print(f"note: {line}")


def draw_preview(recipe: Recipe) -> None:
    """Draw the first training images of epoch 0 as the model gets them. Needs training data, and trains nothing."""
    path, world = Path(str(recipe.training.preview)), distributed.start()
    if not path.parent.is_dir():
        raise ValueError(f"training.preview={path}: there is no folder {path.parent}")
    data = open_data(recipe.data.train_dataset, recipe, "train")
    recipe = with_training(recipe, batch_size=min(recipe.training.batch_size, data.num_samples // world.world_size))
    crop = random_crop(recipe, build_resolution(recipe)(0))
    dtype = DTYPES[recipe.training.precision if world.device.type == "cuda" else "32"]
    with train_loader(recipe, world, num_workers(recipe, world), dtype, crop) as loader:
        images, targets = take_images(loader.epoch(0), len(loader))
    if world.is_main:
        shown = denormalized(images, IMAGENET_MEAN, IMAGENET_STD)
        title = preview_title(recipe, crop.size)
        names = class_names(data.classes, data.num_classes)
        draw_contact_sheet(shown, [caption(target, names) for target in targets.numpy()], path, title=title)
        print(f"{len(shown)} training images as the model gets them: {path}")
    distributed.stop()


def join(recipe: Recipe) -> World:
    """Become one rank of the run; under no launcher, start one where the recipe asks for several processes."""
    if is_launched():
        return distributed.start()
    if recipe.training.distributed and recipe.dist.world_size > 1:
        distributed.relaunch(recipe.dist.world_size, recipe.dist.address, recipe.dist.port)
    return distributed.start()


def noticed(recipe: Recipe, *notices: str) -> Recipe:
    """Return a recipe with more notices."""
    return dataclasses.replace(recipe, notices=(*recipe.notices, *notices))


def with_training(recipe: Recipe, **values: Any) -> Recipe:
    """Return a recipe with other values in its section training."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **values))


class Run:
    """One run: everything is checked and built here, before anything is created on disk."""

    def __init__(self, recipe: Recipe, world: World):
        if is_launched() and recipe.training.distributed and recipe.dist.world_size != world.world_size:
            recipe = noticed(
                recipe,
                f"dist.world_size={recipe.dist.world_size}, but torchrun started {world.world_size}: torchrun wins",
            )
        self.recipe, self.world = recipe, world
        self.log = RunLog(Path(recipe.logging.folder) / "logs", world.is_main, courses(recipe))
        self.board = distributed.Board(world)
        if reason := self.board.read("given up"):
            raise ValueError(f"the run is not tried again, since it would fail again: {reason}")
        self.stop = StopRequest(world, self.board, self.tell_failure)
        self.told_failure = False
        self.aside = Aside()
        self.precision = recipe.training.precision
        if world.device.type == "cpu" and self.precision != "32":
            recipe = noticed(recipe, f"no GPU is visible: training on the CPU, in 32-bit instead of {self.precision}")
            self.precision = "32"

        self.val = open_data(recipe.data.val_dataset, recipe, "val")
        self.train_data = (
            self.val if recipe.training.eval_only else open_data(recipe.data.train_dataset, recipe, "train")
        )
        check_same_classes(self.train_data, self.val)
        self.begun: dict[str, Any] = json.loads(self.board.read("run") or "{}")
        resume, notices = distributed.decided_by_main(self.choose_checkpoint)
        recipe = noticed(with_training(recipe, resume=resume), *notices)
        checkpoint = read_checkpoint(recipe.training.resume) if recipe.training.resume else None
        self.asked_batch = [recipe.training.batch_size, recipe.training.accumulation]
        if checkpoint is not None and not recipe.training.eval_only:
            recipe = keep_global_batch(recipe, checkpoint, world_size=world.world_size)
        self.plan = plan(
            recipe, world_size=world.world_size, num_train=self.train_data.num_samples, num_val=self.val.num_samples
        )
        self.recipe = noticed(recipe, *self.plan.notices)
        self.build(checkpoint)

    def choose_checkpoint(self) -> tuple[str | None, list[str]]:
        """The checkpoint to go on from, and notices: of this very run where torchrun restarted it, else as asked."""
        recipe, folder = self.recipe, Path(self.recipe.logging.folder) / "checkpoints"
        asked: str | None = recipe.training.resume
        notices: list[str] = []
        if self.begun:
            path, notices = newest_checkpoint(folder, recipe.model.arch, self.begun["run_name"])
            if path is not None:
                return str(path), [*notices, f"torchrun has restarted the run: it goes on from its own {path}"]
        if asked != AUTO:
            return asked, notices
        path, notices = newest_checkpoint(folder, recipe.model.arch)
        if path is None and notices:
            raise ValueError(f"--resume auto: {'; '.join(notices)}. No other is there: move it away to start anew")
        if path is None:
            return None, [f"--resume auto: no checkpoint in {folder}, so the run starts anew"]
        return str(path), notices

    def build(self, checkpoint: dict[str, Any] | None) -> None:
        """Model, optimizer, moving average, loaders, and where the run stands."""
        recipe, world, training = self.recipe, self.world, self.recipe.training
        torch.manual_seed(training.seed)
        torch.backends.cudnn.benchmark = True
        allow_tf32(training.tf32)
        model = build_model(
            recipe.model.arch,
            library=recipe.model.library,
            num_classes=recipe.model.num_classes,
            pretrained=recipe.model.pretrained and checkpoint is None,
            weights=recipe.model.weights if checkpoint is None else None,
            drop_path=recipe.model.drop_path,
            use_blurpool=training.use_blurpool,
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
                nesterov=training.nesterov,
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
            channels_last=training.channels_last,
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
        self.state = TrainState(**self.begun)
        if checkpoint is not None:
            self.state = self.checkpoints.restore(checkpoint, weights_only=training.eval_only)
            recipe = noticed(recipe, *differences(checkpoint, self.checkpoints.facts))
        self.eval_model = self.trainer.ema.module if self.trainer.ema is not None else model
        self.trainer.model = self.wrapped(model)
        self.recipe = noticed(recipe, *self.speed_notices())
        resolutions = [self.schedule.resolution(epoch) for epoch in range(training.epochs)]
        eval_steps = self.val.num_samples / self.plan.global_batch_size
        self.forecast = Forecast(resolutions, self.plan.steps_per_epoch, eval_steps)
        threads, dtype = num_workers(recipe, world), DTYPES[self.precision]
        self.val_loader = val_loader(recipe, world, threads, dtype)
        if not training.eval_only:
            self.crop = random_crop(recipe, self.schedule.resolution(self.state.epoch))
            self.loader = train_loader(recipe, world, threads, dtype, self.crop)

    def wrapped(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as a step calls it: compiled where that gains, and exchanging gradients between ranks."""
        training, world = self.recipe.training, self.world
        self.compiled_px, self.compiles = 0, training.compile
        if self.compiles == "auto":
            self.compiles = gains_from_compilation(world.device, self.plan.total_steps * training.accumulation)
        if self.compiles:
            model = compiled(model)
        if world.world_size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[world.local_rank] if world.device.type == "cuda" else None,
            **_LOCAL_BUFFERS,  # training reads none of them, and evaluation takes rank 0's
            gradient_as_bucket_view=True,
            # Holds neither with no_sync() nor with the way dynamo splits a graph at the buckets.
            static_graph=training.accumulation == 1 and not self.compiles,
        )

    def speed_notices(self) -> list[str]:
        """What the arithmetic of the run means on its GPU."""
        training, notices = self.recipe.training, []
        if self.world.device.type == "cuda" and self.precision == "32" and training.tf32:
            notices.append("32-bit products are made in TF32 where this GPU can: --training.tf32=0 makes them in full")
        if self.precision == "16-mixed" and training.optimizer == "lamb":
            notices.append(
                "LAMB under 16-mixed has the host wait for the GPU in every step, to learn whether the gradient "
                "overflowed; --precision bf16-mixed has no such check"
            )
        return notices

    def compile_for(self, size: int) -> None:
        """Compile the model for images of a size before their first step; go on without where that fails."""
        if not self.compiles or size == self.compiled_px:
            return
        if self.compiled_px:
            torch.compiler.reset()  # a size that is past does not come again
        started_s, self.compiled_px = time.perf_counter(), size
        error = self.trainer.rehearse((self.recipe.training.batch_size, 3, size, size))
        failures = distributed.sum_over_ranks(torch.tensor(int(error is not None), device=self.world.device))
        if failures:
            self.compiles = False
            torch.compiler.set_stance("force_eager")
            first_line = str(error).strip().partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}" if error else "on another rank"
            self.log.say(f"note: torch.compile failed, training goes on without it ({reason})")
        else:
            self.log.say(f"compiled for {size} px in {time.perf_counter() - started_s:.0f} s")

    def facts(self) -> dict[str, Any]:
        """What makes the run repeatable, stored with its logs and every checkpoint."""
        recipe, data = self.recipe, {"val": self.val}
        if not recipe.training.eval_only:
            data = {"train": self.train_data, "val": self.val}
        return {
            "recipe": recipe.to_dict(),
            "recipe_history": recipe.history(),
            "recipe_files": {str(path): Path(path).read_text(encoding="utf-8") for path in recipe.files},
            "seed": recipe.training.seed,
            "world_size": self.world.world_size,
            "global_batch_size": self.plan.global_batch_size,
            "asked_batch": self.asked_batch,
            "commit": git_commit(),
            "device": device_name(self.world.device),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "torchvision", "timm", "ffcv", "numba", "numpy")},
            },
            "data": {
                name: {"path": str(beton.path), "num_samples": beton.num_samples, "digest": beton.digest}
                for name, beton in data.items()
            },
        }

    def train(self) -> None:
        """Epoch after epoch: train, evaluate, log, save. Raises `Stopped`, all saved, where a signal asked for it."""
        state, log, epochs = self.state, self.log, self.recipe.training.epochs
        with self.stop:
            self.open_logs()
            try:
                for epoch in range(state.epoch, epochs):
                    self.train_epoch(epoch)
                    if epoch < epochs - 1 and self.stop.agreed(now=True):
                        raise Stopped
            except Stopped:
                self.save()
                self.aside.finish()
                log.say(f"stopped by a signal: {self.where()}, saved as {self.checkpoints.last}; --resume auto goes on")
                log.close(exit_code=self.stop.exit_status)
                distributed.wait_for_all(self.world)  # torchrun ends the others once one has left
                raise
            self.aside.finish()
        self.say_goodbye()
        log.close()

    def train_epoch(self, epoch: int) -> None:
        """One epoch, or what is left of it, from its first step to its checkpoint."""
        recipe, state, log, epochs = self.recipe, self.state, self.log, self.recipe.training.epochs
        self.crop.size = self.schedule.resolution(epoch)
        self.compile_for(self.crop.size)
        values = train_epoch(
            self.trainer,
            self.loader,
            state,
            log,
            steps_per_epoch=self.plan.steps_per_epoch,
            forecast=self.forecast,
            log_every=recipe.logging.log_every if recipe.logging.log_level else 0,
            save=self.save,
            save_every_steps=recipe.training.save_every_steps,
            stop=self.stop.agreed,
        )
        trained_s, predictions = time.perf_counter(), None
        if recipe.logging.log_level or epoch == epochs - 1:
            measured, predictions = self.evaluate(epoch)
            values.update(measured)
        self.forecast.between_s = time.perf_counter() - trained_s
        left_s = self.forecast.remaining_s(epoch, self.plan.steps_per_epoch, values["step_s"])
        values["remaining_s"] = left_s - self.forecast.between_s
        is_best = values.get("val/acc1", -1.0) > state.best_acc1
        if is_best:
            state.best_acc1, state.best_epoch = values["val/acc1"], epoch
        state.epoch, state.batch, state.totals = epoch + 1, 0, []
        log.say(epoch_line(values, epoch, epochs, self.crop.size, pace(values, log.courses, epoch + 1)))
        log.epoch({"epoch": epoch, **values, "resolution": self.crop.size}, state.step)
        stands, best = dataclasses.replace(state), predictions if is_best else None
        self.save(is_best=is_best, then=lambda: self.report(stands, best))
        self.forecast.between_s = time.perf_counter() - trained_s

    def save(self, *, is_best: bool = False, then: Callable[[], None] = lambda: None) -> None:
        """Save the run as it stands now, and do what is to follow, both on rank 0 while training goes on."""
        if not self.world.is_main:
            return
        content = copied(self.checkpoints.content(self.state))

        def work() -> None:
            self.checkpoints.save(content, is_best=is_best)
            then()

        self.aside.do(work)

    def evaluate(self, epoch: int) -> tuple[dict[str, float], Predictions]:
        """Metrics, and what the model makes of every sample, of the weights after an epoch."""
        recipe, num_samples = self.recipe, self.val.num_samples
        samples = SampleMeter(self.world.device, self.val_loader.next_traversal_order(), num_samples)
        batches: Iterable[Any] = self.val_loader
        if not recipe.training.eval_only:
            fewest = math.ceil(num_samples // self.world.world_size / recipe.validation.batch_size)
            batches = self.stop.watched(self.val_loader, fewest)
        values = evaluate(
            self.eval_model,
            self.log.track(batches, "validation", total=len(self.val_loader)),
            self.world,
            num_samples=num_samples,
            precision=self.precision,
            flip=bool(recipe.validation.lr_tta),
            channels_last=bool(recipe.training.channels_last),
            samples=samples,
        )
        loss, predicted, confidence = samples.gather().T
        return values, Predictions(epoch, self.val.labels, predicted.astype(int), loss, confidence)

    @functools.cached_property
    def class_names(self) -> list[str]:
        return class_names(self.val.classes, self.val.num_classes)

    def report(self, state: TrainState, best: Predictions | None) -> None:
        """Draw the curve and write the report anew after an epoch, the best so far where its predictions are given."""
        recipe, log, checkpoints = self.recipe, self.log, self.checkpoints
        stored = log.folder / f"{state.run_name}.predictions.npz"
        try:
            log.draw()
            if best is not None:
                best.save(stored)
            shown = best or (Predictions.read(stored) if stored.exists() else None)
            mistakes = None
            if shown is not None and state.epoch == recipe.training.epochs:
                mistakes = self.images_of(shown.mistakes(NUM_MISTAKES_SHOWN))
            files = {"best checkpoint": checkpoints.best(state), "last checkpoint": checkpoints.last}
            files |= {"exported weights": checkpoints.weights, "record": log.folder / f"{state.run_name}.jsonl"}
            write_report(
                self.report_path,
                name=state.run_name,
                records=log.records(),
                facts=checkpoints.facts,
                courses=log.courses,
                files={what: str(path) for what, path in files.items() if path.exists()},
                predictions=shown,
                names=self.class_names,
                mistakes=mistakes,
            )
        except OSError as error:
            log.say(f"note: the report was not written: {error}")

    @property
    def report_path(self) -> Path:
        return Path(self.recipe.logging.folder) / "report.html"

    def images_of(self, ids: np.ndarray) -> np.ndarray:
        """Validation images as the model gets them, but in 8 bits, uint8 (N, H, W, 3)."""
        alone = dataclasses.replace(self.world, rank=0, world_size=1)
        with val_loader(self.recipe, alone, 1, torch.float32, indices=np.sort(ids).tolist()) as loader:
            batches = [denormalized(images, IMAGENET_MEAN, IMAGENET_STD) for images, _ in loader]
        return np.concatenate(batches)[np.argsort(np.argsort(ids))] if batches else np.zeros((0, 1, 1, 3), np.uint8)

    def evaluate_only(self) -> None:
        """Evaluate the weights at hand on the validation split; creates nothing but a report that was asked for."""
        for notice in self.recipe.notices:
            self.log.say(f"note: {notice}")
        values, predictions = self.evaluate(self.state.epoch - 1)
        self.log.say(
            f"{self.recipe.data.val_dataset}: {self.val.num_samples:,} images, loss {values['val/loss']:.4f}, "
            f"top-1 {values['val/acc1']:.3%}, top-5 {values['val/acc5']:.3%}"
        )
        report = self.recipe.training.report
        if report and self.world.is_main:
            weights = self.recipe.training.resume or self.recipe.model.weights
            write_report(
                Path(report),
                name=f"evaluated with {weights or 'pretrained weights'}",
                records=[],
                facts=self.checkpoints.facts,
                courses={},
                predictions=predictions,
                names=self.class_names,
                mistakes=self.images_of(predictions.mistakes(NUM_MISTAKES_SHOWN)),
            )
            self.log.say(f"report: {report}")

    def open_logs(self) -> None:
        """Say what is about to run, and open its files."""
        table = summary(self.recipe, self.plan, size_on_paper(self.recipe))
        self.log.say(f"{table}\n\n{resolved_recipe(self.recipe)}")
        for notice in self.recipe.notices:
            self.log.say(f"note: {notice}")
        self.checkpoints.remove_unfinished()
        resumed = self.recipe.training.resume
        if not resumed or Path(resumed).resolve().parent != self.checkpoints.folder.resolve():
            for path in self.checkpoints.keep_earlier_run(self.report_path):
                self.log.say(f"note: an earlier run's {path.name} was kept as {path}")
        if resumed:
            self.log.say(f"resuming at {self.where()}")
        wandb_settings = self.recipe.wandb
        self.log.open(
            self.state,
            self.checkpoints.facts,
            {"enable": wandb_settings.enable, "project": wandb_settings.project, "name": wandb_settings.name},
        )
        if self.world.is_main:
            begun = {"run_name": self.state.run_name, "wandb_id": self.state.wandb_id}
            self.board.write("run", json.dumps(begun))

    def where(self) -> str:
        """Where the run stands, in words."""
        return f"epoch {self.state.epoch}, batch {self.state.batch} (step {self.state.step})"

    def tell_failure(self, failure: Failure) -> None:
        """Say on rank 0, and in its log, that another rank has failed, and of what; once."""
        if not self.told_failure:
            self.told_failure = True
            self.log.say(f"error: the run ends, because rank {failure.rank} has failed: {failure.message}")

    def say_goodbye(self) -> None:
        """Say how the run ended, where everything lies, and what to do with it."""
        state, log, checkpoints, model = self.state, self.log, self.checkpoints, self.recipe.model
        last, weights = log.last.get("val/acc1"), checkpoints.weights
        log.say(
            f"done: best top-1 {state.best_acc1:.3%} in epoch {state.best_epoch}"
            + (f", last {last:.3%}" if last is not None else "")
        )
        log.say(f"  best checkpoint   {checkpoints.best(state)}")
        log.say(f"  last checkpoint   {checkpoints.last}")
        log.say(f"  exported weights  {weights}")
        log.say(f"  logs              {log.folder / state.run_name}.log .jsonl .png .recipe.json .predictions.npz")
        log.say(f"  report            {self.report_path}")
        if find_library(model.arch, model.library) == "timm":
            options = f'num_classes={model.num_classes}, checkpoint_path="{weights}"'
            use = f'model = timm.create_model("{model.arch}", {options})'
        else:
            loaded = f'torch.load("{weights}", weights_only=True)'
            build = f"model = torchvision.models.{model.arch}(num_classes={model.num_classes})"
            use = f"{build}; model.load_state_dict({loaded})"
        command = shlex.join(["python", *sys.argv])
        log.say("next")
        log.say(f"  evaluate     {command} --eval_only --resume {shlex.quote(str(checkpoints.best(state)))}")
        log.say(
            f"  train on     {command} --resume {shlex.quote(str(checkpoints.last))} "
            f"--epochs {2 * self.recipe.training.epochs}"
        )
        log.say(f"  use weights  {use}")


def open_data(path: str, recipe: Recipe, split: str) -> Beton:
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


def num_workers(recipe: Recipe, world: World) -> int:
    """Threads that load for this rank."""
    asked = recipe.data.num_workers
    return asked if asked > 0 else cpus_per_rank()


def random_crop(recipe: Recipe, size: int) -> RandomResizedCrop:
    """The decoder of training images, perhaps mirrored, of a side in px."""
    augmentation = recipe.augmentation
    return RandomResizedCrop(
        size=size,
        scale=augmentation.crop_scale,
        ratio=augmentation.crop_ratio,
        flip=augmentation.flip,
        interpolation=augmentation.interpolation,
    )


def augmentations(recipe: Recipe) -> list[Any]:
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


def train_loader(recipe: Recipe, world: World, threads: int, dtype: torch.dtype, crop: RandomResizedCrop) -> Loader:
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
        os_cache=recipe.data.in_memory,
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


def val_loader(
    recipe: Recipe, world: World, threads: int, dtype: torch.dtype, indices: Sequence[int] | None = None
) -> Loader:
    """Batches of normalised float images (N, 3, H, W) and labels (N,): this rank's share, each sample once.

    Of all samples, or of those whose ids are given.
    """
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
        os_cache=recipe.data.in_memory,
        order=OrderOption.SEQUENTIAL,
        distributed=world.world_size > 1,
        rank=world.rank,
        world_size=world.world_size,
        indices=indices,
        drop_last=False,
        pipelines={
            "image": [crop, ToTensor(), *on_device(world), Normalize(IMAGENET_MEAN, IMAGENET_STD, dtype)],
            "label": [Label(), *on_device(world)],
        },
    )


def differences(checkpoint: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What a resumed run does differently from the one that saved the checkpoint, or does it on and with."""
    passing = {"training.resume", "training.report", "training.eval_only"}
    was, now = (
        {f"{section}.{key}": value for section, values in of["recipe"].items() for key, value in values.items()}
        | {"the commit": of["commit"], "the device": of["device"]}
        | {f"the version of {name}": number for name, number in of["versions"].items()}
        for of in (checkpoint, facts)
    )
    notices = [
        f"{name} is {value}, and was {was[name]} in the run that is resumed"
        for name, value in now.items()
        if name not in passing and was.get(name, value) != value
    ]
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
    if "gpu_peak_allocated_bytes" in values:
        allocated, reserved = (values[f"gpu_peak_{kind}_bytes"] / 2**30 for kind in ("allocated", "reserved"))
        line += f"  GPU memory {allocated:.1f} GiB ({reserved:.1f} reserved)"
    if values["remaining_s"]:
        line += f"  {show_duration(values['remaining_s'])} to go"
    return f"{line}  {expected}" if expected else line


def preview_title(recipe: Recipe, size: int) -> str:
    """What the images of a preview went through."""
    augmentation, names = recipe.augmentation, ", ".join(str(path) for path in recipe.files) or "no recipe"
    mixing = f"Mixup {augmentation.mixup_alpha:g}, CutMix {augmentation.cutmix_alpha:g}"
    return (
        f"{names}: epoch 0, {size} px, seed {recipe.training.seed}, the first images of the first batches\n"
        f"augmentation {augmentation.auto_augment or 'none'}, erasing {augmentation.erasing:g}, {mixing}, "
        f"label smoothing {recipe.training.label_smoothing:g}; below each image its classes and their target weights"
    )


def out_of_memory_message(recipe: Recipe, planned: Plan) -> str:
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


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}"


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
