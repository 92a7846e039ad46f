"""Train an image classifier from a recipe.

    python train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml
    torchrun --nproc_per_node=8 train_imagenet.py --config-file rn50_configs/single_gpu_100ep.yaml

The run reads the ``.beton`` files of ``data.train_dataset`` and ``data.val_dataset``. It prints a summary of the recipe
and the arithmetic of the learning rate, then a line every ``logging.log_every`` steps and every epoch. Below
``logging.folder`` it leaves ``report.html``; ``logs/train_<time>.log``, ``.jsonl`` (a record of every epoch), ``.png``
(the curve), ``.recipe.json`` and ``.predictions.npz`` (of the best epoch, for every validation image);
``checkpoints/last.ckpt``, the best checkpoint, and exported weights.

``--config-file`` may be repeated: later files win, then the command line. The usual flags:

    --resume checkpoints/last.ckpt   continue a run; ``--resume auto`` finds its newest checkpoint
    --eval_only --report out.html    evaluate a checkpoint, and write a page with its mistakes
    --dry_run                        print the plan, and touch nothing
    --preview out.png                draw training images as the model gets them
    --help                           list every key

SIGTERM, SIGUSR1, SIGHUP (a closed terminal) and Ctrl-C save the run at its present step. So does the end of a reader of
the output, such as ``| head``. The exit status is then 75, after Ctrl-C 130. Status 2: a mistake was found before
anything was created. Status 1: the run failed.
"""

import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ffcv_ops.console import protect_output
from ffcv_ops.errors import UserError, exit_with_user_error
from imagenet_training.planning.recipe import Recipe, read_recipe

# The functions import what they use: a mistake, --help and --dry_run need not wait for imports that take seconds.
if TYPE_CHECKING:
    from torch.nn import Module

    from ffcv_ops.lock import OwnerLock
    from imagenet_training.data.loaders import Loaders, TrainingData
    from imagenet_training.distributed import World
    from imagenet_training.planning.plan import RunPlan
    from imagenet_training.run.resume import ResumePoint
    from imagenet_training.state import TrainState
    from imagenet_training.training.trainer import Trainer


@dataclass
class Run:
    """A run that can begin: everything is checked and built. Nothing is created on disk yet but the folder's lock."""

    world: "World"
    data: "TrainingData"
    point: "ResumePoint"
    plan: "RunPlan"
    trainer: "Trainer"
    state: "TrainState"
    meta_model: "Module"
    recipe: Recipe


def join_run(recipe: Recipe) -> "tuple[World, Module]":
    """Become one rank of the run. Return its place and, for its size, the model on the meta device."""
    from imagenet_training.distributed import join
    from imagenet_training.models.architectures import recipe_meta_model

    model = recipe_meta_model(recipe)  # an architecture that does not exist is an error before ranks meet
    return join(recipe), model


def build(recipe: Recipe, world: "World", meta_model: "Module") -> Run:
    """Open the data, choose the checkpoint, plan the run, and build the trainer at the position of the checkpoint."""
    from imagenet_training.data.loaders import open_training_data
    from imagenet_training.data.normalization import settle_normalization
    from imagenet_training.planning.plan import plan_run
    from imagenet_training.run.changes import check_classes, check_rest_of_epoch, keeps_best
    from imagenet_training.run.provenance import check_ranks_agree
    from imagenet_training.run.resume import choose_checkpoint, restore
    from imagenet_training.training.trainer import build_trainer, unwrapped
    from imagenet_training.training.trial import try_model

    data = open_training_data(recipe)
    check_ranks_agree(recipe, data)
    point = choose_checkpoint(recipe, world)
    recipe = settle_normalization(recipe, point.content)
    plan = plan_run(
        recipe,
        world_size=world.world_size,
        num_train=data.num_train,
        num_val=data.num_val,
        class_counts=data.class_counts,
        device_type=world.device.type,
        resumed=point.content,
        resumed_from=point.path,
    )
    if point.content is not None:
        check_classes(point.content, data)
        check_rest_of_epoch(point.content, recipe, plan, data)
    trainer = build_trainer(recipe, plan, world, from_checkpoint=point.content is not None)
    if not point.has_model_of(recipe):
        try_model(recipe, plan, unwrapped(trainer.model), trainer.loss)
    state = restore(trainer, point, recipe, plan)
    if point.content is not None and not keeps_best(point.content, recipe, data):
        state.forget_best()
    return Run(world, data, point.without_tensors(), plan, trainer, state, meta_model, recipe)


def train(recipe: Recipe) -> None:
    """Train a model from a recipe."""
    from imagenet_training.data.loaders import build_loaders
    from imagenet_training.run.run_folder import check_folder, locked_folder

    world, meta_model = join_run(recipe)
    with locked_folder(recipe, world) as lock:  # before the checkpoint is chosen, which another run may still write
        run = build(recipe, world, meta_model)
        recipe = run.recipe
        check_folder(recipe, run.trainer, run.state)
        train_epochs(recipe, run, build_loaders(recipe, run.plan, run.data, world), lock)


def train_epochs(recipe: Recipe, run: Run, loaders: "Loaders", lock: "OwnerLock") -> None:
    """Train, evaluate, log and save, epoch after epoch."""
    from imagenet_training.run.run_folder import RunFolder
    from imagenet_training.training.epoch import NOT_EVALUATED, evaluate, train_epoch
    from imagenet_training.training.failures import ending_with_status
    from imagenet_training.training.preemption import StopRequest
    from imagenet_training.training.step_mode import prepare_step

    plan, trainer, state = run.plan, run.trainer, run.state
    folder = RunFolder(recipe, plan, run.data, trainer, state, run.point, run.meta_model, lock)
    log = folder.log
    stopping = StopRequest(run.world, log.failure, log.keep)
    # From the inside out: the folder saves a run that stops, the signals get their old meaning, the process ends.
    with ending_with_status(plan, run.world, log, folder.finish_failed), stopping as stop, folder:
        for epoch in range(state.epoch, plan.epochs):
            loaders.set_resolution(plan.resolution(epoch))
            state.step_mode = prepare_step(trainer, plan.batch_size, plan.resolution(epoch), log)
            evaluates = plan.evaluates(epoch)
            begin_training = partial(loaders.begin_training, epoch + 1, plan)
            begin_next = loaders.val.begin if evaluates else None
            trained = train_epoch(
                trainer, loaders.train, state, plan, log, stop=stop, save=folder.save, begin_next=begin_next
            )
            evaluated = NOT_EVALUATED
            if evaluates:
                evaluated = evaluate(
                    trainer,
                    loaders.val,
                    log,
                    epoch=epoch,
                    settings=recipe.validation,
                    classes=run.data.classes,
                    stop=stop,
                    begin_next=begin_training,
                )
            else:
                begin_training()
            state.finish_epoch(evaluated.values)
            log.epoch(state, trained | evaluated.values)
            folder.save_epoch(state, evaluated.predictions)
            if epoch + 1 < plan.epochs:
                stop.raise_if_agreed(now=True)
        folder.print_next_steps()


def run(recipe: Recipe) -> None:
    """Run the command that the recipe asks for. Exit with status 2 if the user has to put something right first."""
    command = train
    if recipe.training.dry_run and recipe.training.eval_only:
        from imagenet_training.evaluation import show_evaluation as command
    elif recipe.training.dry_run:
        from imagenet_training.dry_run import show_plan as command
    elif recipe.training.preview:
        from imagenet_training.preview import draw_preview as command
    elif recipe.training.eval_only:
        from imagenet_training.evaluation import evaluate_only as command
    try:
        if recipe.model.num_classes == "auto" and not recipe.training.eval_only:
            from imagenet_training.data.loaders import settle_num_classes

            recipe = settle_num_classes(recipe)
        command(recipe)
    except UserError as error:
        exit_with_user_error(error)


def main() -> None:
    protect_output()
    try:
        recipe = read_recipe(sys.argv[1:])  # a mistake, or --help, ends here, before the imports that take seconds
        from torch.distributed.elastic.multiprocessing.errors import record

        record(run)(recipe)  # torchrun learns of an error from it
    except KeyboardInterrupt:  # while the run starts, or during an evaluation; training has a `StopRequest`
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends now, and a traceback would follow the line
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
