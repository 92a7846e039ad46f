"""The folder of a run: its logs, checkpoints and report, and what it prints at the start and the end."""

import dataclasses
import json
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ffcv_ops import UserError
from ffcv_ops.files import check_writable, nearest_folder
from ffcv_ops.lock import OwnerLock
from ffcv_ops.settings.command_line import replace_settings
from ffcv_ops.units import show_bytes
from imagenet_training.data.classes import head_notices, names_in_file
from imagenet_training.data.contact_sheet import class_names
from imagenet_training.data.loaders import TrainingData, validation_images
from imagenet_training.distributed import World, decided_by_main, wait_for_all
from imagenet_training.models.architectures import model_arguments, model_size
from imagenet_training.models.card import ModelCard
from imagenet_training.models.export import use_of_weights
from imagenet_training.planning.outputs import LOCK_NAME
from imagenet_training.planning.plan import RunPlan
from imagenet_training.planning.recipe import FLAGS, Recipe, expected_accuracy
from imagenet_training.reports.background import BackgroundTask
from imagenet_training.reports.logs import RunLog, data_wait_advice
from imagenet_training.reports.predictions import Predictions
from imagenet_training.reports.report import NUM_MISTAKES_SHOWN, write_report
from imagenet_training.run.changes import best_notices, position_notices
from imagenet_training.run.checkpoint import CheckpointFolder, checkpoint_content, copy_to_cpu, size_bytes
from imagenet_training.run.provenance import describe_run, differences
from imagenet_training.run.resume import LOCK_NOTE, RUN_NOTE, ResumePoint
from imagenet_training.run.summary import resolved_recipe, summary
from imagenet_training.state import TrainState
from imagenet_training.training.meters import EtaEstimator
from imagenet_training.training.preemption import Stopped
from imagenet_training.training.trainer import Trainer


class RunFolder:
    """The files of one run below ``logging.folder``. Ranks other than 0 write nothing.

    As a context manager it prints the summary and starts the files. At the end it waits for the last save. If the run
    is stopped by a signal, it saves the run first. If the run fails, the files stay open for the error.

    The caller moves the state on. The model on the meta device is for its size in the summary. The lock is that of the
    folder; see `locked_folder`.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: RunPlan,
        data: TrainingData,
        trainer: Trainer,
        state: TrainState,
        point: ResumePoint,
        meta_model: nn.Module,
        lock: OwnerLock,
    ):
        self.recipe, self.plan, self.data, self.trainer, self.state = recipe, plan, data, trainer, state
        self.point, self.world, self.meta_model, self.lock = point, trainer.world, meta_model, lock
        self.folder = Path(recipe.logging.folder)
        self.report = self.folder / "report.html"
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", recipe.model.arch)
        self.provenance = describe_run(recipe, plan, data, self.world)
        card = ModelCard.of_recipe(self.provenance["recipe"], model_arguments(recipe), self.provenance["classes"])
        self.card = dataclasses.replace(card, precision=plan.precision)
        resolutions = [plan.resolution(epoch) for epoch in range(plan.epochs)]
        self.log = RunLog(
            self.folder / "logs",
            self.world.is_main,
            expected_accuracy(recipe),
            eta=EtaEstimator(resolutions, plan.steps_per_epoch, plan.num_val / plan.global_batch_size),
            log_every=recipe.logging.log_every if recipe.logging.log_level else 0,
        )
        self._background = BackgroundTask()
        self._saved: TrainState | None = None

    def __enter__(self) -> "RunFolder":
        log, state = self.log, self.state
        self.lock.check()
        size = model_size(self.meta_model, self.recipe.validation.resolution)
        log.print(summary(self.recipe, self.plan, size))
        log.keep(resolved_recipe(self.recipe))
        notices = run_notices(self.recipe, self.plan, self.data, self.world, self.point, self.provenance)
        for notice in (*notices, *self.trainer.notices):
            log.print(f"note: {notice}")
        if self.world.is_main:
            self._make_room()
        if resumed := self.plan.resumed_from:
            log.print(f"resuming at {state}")
        log.open(state, self.provenance, Path(resumed).absolute().parent.parent / "logs" if resumed else None)
        if self.world.is_main:
            names = {"run_name": state.run_name, "wandb_id": state.wandb_id, LOCK_NOTE: self.lock.token}
            self.world.store.write(RUN_NOTE, json.dumps(names))
        return self

    def _make_room(self) -> None:
        """Remove unfinished files. Move files of another run, or of an abandoned part, to ``earlier-N``."""
        self.checkpoints.remove_unfinished()
        for path in (*self.folder.glob(".report.html.*.tmp"), *self.log.folder.glob(".*.tmp")):
            path.unlink()
        resumed = self.plan.resumed_from
        if not resumed or Path(resumed).resolve().parent != self.checkpoints.folder.resolve():
            for path in self.checkpoints.keep_earlier_run(self.report):
                self.log.print(f"note: an earlier run's {path.name} was kept as {path}")
        else:
            for path in self.checkpoints.keep_abandoned(Path(resumed), self.state):
                self.log.print(f"note: {path.name} is further than the resumed checkpoint, and was kept as {path}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.finish()
            self.log.close()
        elif isinstance(error, Stopped):
            self.save(self.state)
            self.finish()
            last = self.checkpoints.last
            self.log.print(f"stopped {error.reason}: {self.state}, saved as {last}; --resume auto goes on")
            self.log.close(exit_code=error.exit_status)
            wait_for_all(self.world)  # torchrun ends the other ranks once one has exited

    def finish(self) -> None:
        """Wait for the last save and report. Raise the error of either."""
        self._background.finish()

    def finish_failed(self) -> None:
        """Wait for the last save, and free the folder: on several ranks, the process then ends at once."""
        try:
            self.finish()
        finally:
            self.lock.release()

    def _start(self, work: Callable[[], None]) -> None:
        """Start a task that writes files, if the folder is still this run's. No step waits for the check."""

        def checked() -> None:
            self.lock.check()
            self.log.finish_writes()  # a checkpoint never is further than the records
            work()

        self._background.start(checked)

    def _content(self, state: TrainState) -> dict[str, Any]:
        """Return a copy of what a checkpoint holds, which further steps do not change."""
        return copy_to_cpu(checkpoint_content(state, self.trainer, self.provenance, self.card))

    def save(self, state: TrainState) -> None:
        """Save the run at its present position, while training goes on. A position is saved once."""
        if self.world.is_main and state != self._saved:
            self._saved = dataclasses.replace(state)
            content = self._content(state)
            self._start(lambda: self.checkpoints.save(content))

    def save_epoch(self, state: TrainState, predictions: Predictions | None) -> None:
        """Save the run after an epoch and write its report, while training goes on.

        The state is at the start of the next epoch. The predictions are those of the finished epoch, if it was
        evaluated.
        """
        if self.world.is_main:
            content = self._content(state)
            is_best = state.best_epoch == state.epoch - 1
            position, best = dataclasses.replace(state), predictions if is_best else None
            self._saved = position

            def work() -> None:
                self.checkpoints.save(content, is_best=is_best)
                self._report(position, best)

            self._start(work)
        self.log.eta.end_pause()

    def _report(self, state: TrainState, best: Predictions | None) -> None:
        """Draw the curve and write the report, with the predictions of the best epoch so far."""
        stored = self.log.folder / f"{state.run_name}.predictions.npz"
        try:
            self.log.draw()
            if best is not None:
                best.save(stored)
            shown = best or (Predictions.read(stored) if stored.exists() else None)
            if shown is not None and shown.epoch != state.best_epoch:  # of a part of the run that was abandoned
                shown = None
            mistakes = None
            if shown is not None and state.epoch == self.plan.epochs:
                mistakes = validation_images(self.recipe, self.data.val, shown.mistakes(NUM_MISTAKES_SHOWN))
            files = {
                "best checkpoint": self.checkpoints.best(state),
                "last checkpoint": self.checkpoints.last,
                "exported weights": self.checkpoints.weights,
                "record": self.log.folder / f"{state.run_name}.jsonl",
            }
            write_report(
                self.report,
                name=state.run_name,
                records=self.log.records(),
                provenance=self.provenance,
                expected_accuracy=self.log.expected_accuracy,
                files={what: str(path) for what, path in files.items() if path.exists()},
                predictions=shown,
                names=names_of(self.data),
                mistakes=mistakes,
            )
        except Exception as error:  # a page is no reason to end a run
            reason = str(error).partition("\n")[0]
            self.log.print(f"note: the report was not written: {type(error).__name__}: {reason}")
            self.log.keep(traceback.format_exc().rstrip())

    def print_next_steps(self) -> None:
        """Print how the run ended, where its files are, and what is usually done next."""
        self.finish()
        state, log, checkpoints = self.state, self.log, self.checkpoints
        best = checkpoints.best(state)
        log.print(f"done: {how_it_ended(state, log.last.get('val/acc1'))}")
        if best.exists():  # else the best epoch was in another folder, before the run was resumed
            log.print(f"  best checkpoint   {best}")
        log.print(f"  last checkpoint   {checkpoints.last}")
        if checkpoints.weights.exists():
            log.print(f"  exported weights  {checkpoints.weights}")
        log.print(f"  logs              {log.folder / state.run_name}.log .jsonl .png .recipe.json .predictions.npz")
        log.print(f"  report            {self.report}")
        if advice := data_wait_advice(log.records()):
            log.print(f"note: {advice}")
        log.print("next")
        settings = {"training.resume": str(checkpoints.last), "training.epochs": str(2 * self.plan.epochs)}
        train_on = ["python", sys.argv[0], *replace_settings(sys.argv[1:], FLAGS, settings)]
        evaluated = best if best.exists() else checkpoints.last  # it brings the settings of the run
        log.print(f"  evaluate     {shlex.join(['python', sys.argv[0], '--eval_only', '--resume', str(evaluated)])}")
        log.print(f"  train on     {shlex.join(train_on)}")
        if checkpoints.weights.exists():
            for line in use_of_weights(checkpoints.weights, self.card):
                log.print(f"  use weights  {line}")


def how_it_ended(state: TrainState, last_acc1: float | None) -> str:
    """Return the best top-1 of a run, and the last one if an epoch has been evaluated since its start."""
    if state.best_epoch < 0:  # the run has nothing left to train, and its settings of evaluations have changed
        return "no epoch was evaluated with the present validation settings"
    last = "" if last_acc1 is None else f", last {last_acc1:.3%}"
    return f"best top-1 {state.best_acc1:.3%} in epoch {state.best_epoch}{last}"


def check_folder(recipe: Recipe, trainer: Trainer, state: TrainState) -> None:
    """Check for all ranks that a run can write its files and one checkpoint. Create and move nothing."""

    def check() -> None:
        folder = Path(recipe.logging.folder)
        _check_writable(recipe, folder)
        _check_writable(recipe, folder / "checkpoints")
        _check_writable(recipe, folder / "logs", f"{state.run_name}.log")
        needed_bytes = size_bytes(checkpoint_content(state, trainer, {}, ModelCard({})))
        free_bytes = shutil.disk_usage(nearest_folder(folder / "checkpoints")).free
        if free_bytes < needed_bytes:
            raise UserError(
                f"{recipe.shown('logging.folder')}: {show_bytes(free_bytes)} are free there, and a checkpoint of this "
                f"run takes {show_bytes(needed_bytes)}: free space, or pass another --logging.folder"
            )

    decided_by_main(check)


def _check_writable(recipe: Recipe, folder: Path, *names: str) -> None:
    """Check a folder, and files in it, below ``logging.folder``; see `ffcv_ops.files.check_writable`."""
    try:
        check_writable(folder, *names)
    except UserError as error:
        raise UserError(f"{recipe.shown('logging.folder')}: {error}") from error


@contextmanager
def locked_folder(recipe: Recipe, world: World) -> Iterator[OwnerLock]:
    """Lock ``logging.folder`` for this run. Rank 0 has the lock. All ranks raise UserError if another run has it."""
    folder = Path(recipe.logging.folder)
    conflict = f"logging.folder={folder}: another run writes into this folder"
    lock = OwnerLock(
        folder / LOCK_NAME, conflict, "pass another --logging.folder", lambda line: print(line, flush=True)
    )
    # If torchrun has restarted this run, it has ended the process that had the lock.
    predecessor = json.loads(world.store.read(RUN_NOTE) or "{}").get(LOCK_NOTE, "")

    def take() -> None:
        _check_writable(recipe, folder)
        lock.acquire(predecessor)

    decided_by_main(take)
    try:
        yield lock
    finally:
        lock.release()


def run_notices(
    recipe: Recipe, plan: RunPlan, data: TrainingData, world: World, point: ResumePoint, provenance: dict[str, Any]
) -> Iterator[str]:
    """Yield everything about a run that the user should know though nothing is wrong."""
    yield from recipe.notices
    asked = recipe.dist.world_size
    if recipe.training.distributed and asked != world.world_size:
        yield f"dist.world_size={asked}, but torchrun started {world.world_size}: torchrun wins"
    yield from point.notices
    yield from plan.notices
    yield from data.classes.notices
    if recipe.validation.classes == "only" and len(set(data.val.labels.tolist())) == 1:
        yield f"validation.classes=only, and {data.val.path} has images of one class: every prediction is right"
    weights = recipe.model.weights
    if data.train is not None and weights and point.content is None:
        yield from head_notices(weights, names_in_file(recipe), data.train.classes)
    if point.content is not None:
        yield from position_notices(point.content, recipe, plan)
        yield from best_notices(point.content, recipe, data)
        yield from differences(point.content, provenance)


def report_evaluation(
    recipe: Recipe,
    data: TrainingData,
    provenance: dict[str, Any],
    predictions: Predictions,
    evaluated: str,
) -> None:
    """Write the report of an evaluation without training, of the weights `evaluated`, into ``training.report``."""
    assert recipe.training.report is not None
    write_report(
        Path(recipe.training.report),
        name=f"evaluation of {evaluated}",
        records=[],
        provenance=provenance,
        expected_accuracy={},
        predictions=predictions,
        names=names_of(data),
        mistakes=validation_images(recipe, data.val, predictions.mistakes(NUM_MISTAKES_SHOWN)),
    )


def names_of(data: TrainingData) -> list[str]:
    """Return the names of the model's classes by number, in words if they are numbers of ImageNet's WordNet."""
    return class_names(data.classes.names, data.val.num_classes)
