"""One epoch of training, and one evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ffcv_ops import Loader
from imagenet_training.data.classes import ClassMatch
from imagenet_training.distributed import World, share_buffers
from imagenet_training.models.precision import autocast
from imagenet_training.planning.plan import RunPlan
from imagenet_training.planning.sections import Validation
from imagenet_training.reports.logs import RunLog
from imagenet_training.reports.predictions import Predictions
from imagenet_training.state import TrainState
from imagenet_training.training.failures import RunError
from imagenet_training.training.meters import (
    AccuracyMeter,
    NonFiniteGuard,
    PredictionRecorder,
    StepClock,
    accuracy_metrics,
)
from imagenet_training.training.preemption import StopRequest
from imagenet_training.training.trainer import Trainer, batch_place

Batch = TypeVar("Batch")


class EpochMeters:
    """The measurements of one epoch of training. They continue those that the state has from before an interruption."""

    def __init__(self, trainer: Trainer, plan: RunPlan, state: TrainState):
        self.trainer, self.plan, self.state = trainer, plan, state
        self.accuracy, self.guard = AccuracyMeter(trainer.world.device), NonFiniteGuard(trainer.world.device)
        self.accuracy.restore(state.totals, trainer.world)
        self.clock = StepClock(trainer.world.device, plan.global_batch_size, state.pace)
        state.totals, state.pace = [], []
        self.lr = plan.lr_at(max(plan.step_at(state.epoch, state.samples) - 1, 0))

    def watch(self, batches: Iterable[Any], loader: Any) -> Iterator[Any]:
        """Yield the batches that are left of the epoch's full steps, and measure the waits for them."""
        batches_left = self.plan.steps_left(self.state.samples) * self.plan.accumulation
        return self.clock.watch(islice(batches, batches_left), loader)

    def add_batch(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: its loss (scalar), logits (N, K) and targets (N, K)."""
        self.accuracy.add(loss, logits, targets.argmax(dim=1))
        self.clock.num_images += len(targets) * self.trainer.world.world_size

    def add_step(self, loss: torch.Tensor, lr: float) -> None:
        """Count an optimizer step; raise RunError if too many losses in a row were not finite."""
        self.lr = lr
        self.clock.num_steps += 1
        if self.guard.fails(loss):
            raise RunError(non_finite_message(self.state, lr, self.plan))

    def store(self) -> None:
        """Make the state ready to be saved. Raise RunError if rank 0's weights are not worth saving."""
        if self.trainer.world.is_main and not self.trainer.is_finite():
            raise RunError(non_finite_message(self.state, self.lr, self.plan))
        self.state.totals, self.state.pace = self.accuracy.totals(), self.clock.sums()

    def values(self, totals: list[float] | None = None) -> dict[str, float]:
        """Return loss, accuracies and pace: from this rank's sums, or from the totals of all ranks if given."""
        totals = self.accuracy.sums.tolist() if totals is None else totals
        return {**accuracy_metrics(totals, "train"), "lr": self.lr, **self.clock.rates()}


def train_epoch(
    trainer: Trainer,
    loader: Any,
    state: TrainState,
    plan: RunPlan,
    log: RunLog,
    *,
    stop: StopRequest,
    save: Callable[[TrainState], None],
    begin_next: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train one epoch, or the rest of an epoch that was interrupted.

    Progress lines are the only moments, beside saves, at which the host waits for the device.

    Parameters
    ----------
    loader : Loader
        ``loader.epoch(epoch, skip_samples=n)`` yields images, float (N, 3, H, W), and targets, float (N, K), on the
        device.
    state : TrainState
        Moved on with every step. The caller finishes the epoch after its evaluation.
    save : callable
        Called with the state every ``plan.save_every_steps`` steps, on all ranks.
    begin_next : callable, optional
        Called when the last batch of this epoch has come. It can start the next loader while the device still works.

    Returns
    -------
    dict
        ``train/loss``, ``train/acc1``, ``train/acc5`` (against each image's heavier label if images are mixed),
        ``lr``, ``images_per_s``, ``data_wait`` (share of the time spent waiting for batches, by the GPU if there is
        one), ``data_wait_storage`` (the part of it that was for storage), ``step_s``; ``global_batch_size``; on a GPU
        ``gpu_peak_allocated_bytes``, ``gpu_peak_reserved_bytes``.

    Raises
    ------
    RunError
        If the loss stays non-finite, or weights that would be saved are not finite.
    Stopped
        If the ranks have agreed to stop. The state is ready to be saved.
    """
    trainer.train_mode()
    meters = EpochMeters(trainer, plan, state)
    batches = meters.watch(loader.epoch(state.epoch, skip_samples=state.samples // plan.world_size), loader)
    done = (plan.steps_per_epoch - plan.steps_left(state.samples)) * plan.accumulation
    bar = log.track(batches, f"epoch {state.epoch}", total=plan.batches_per_epoch, done=done)
    batches_left = plan.batches_per_epoch - done
    for count, (images, targets) in enumerate(calling_at_last(bar, batches_left, begin_next)):
        number = count % plan.accumulation
        loss, logits = trainer.backward(images, targets, number=number, place=batch_place(state, plan, number))
        meters.add_batch(loss, logits, targets)
        if number < plan.accumulation - 1:
            continue
        lr = plan.lr_at(plan.step_at(state.epoch, state.samples))
        trainer.optimizer_step(lr, step=state.step)
        state.step += 1
        state.samples += plan.global_batch_size
        meters.add_step(loss, lr)
        log.step(state, meters)
        if stop.agreed():
            meters.store()
            raise stop.stopped()
        if plan.saves_after(state.step, state.samples):
            meters.store()
            save(state)
            state.totals, state.pace = [], []  # they were for the checkpoint; the meters go on counting
    meters.store()
    log.eta.start_pause()
    size = {"global_batch_size": plan.global_batch_size}
    return {**meters.values(state.totals), **size, **meters.clock.peak_memory()}


def calling_at_last(batches: Iterable[Batch], num_batches: int, action: Callable[[], None] | None) -> Iterator[Batch]:
    """Yield batches. Call `action` when the last of so many has come: the loader's workers are idle from then on.

    The call comes before the batch is used, so that a GPU still has the work of the batches before.
    """
    for number, batch in enumerate(batches, 1):
        if action is not None and number == num_batches:
            action()
        yield batch


def non_finite_message(state: TrainState, lr: float, plan: RunPlan) -> str:
    """Return what to do about a loss or weights that are no longer finite. ``--lr`` is the peak of the schedule."""
    remedies = [f"a lower learning rate (--lr {plan.lr / 2:.3g})", "gradient clipping (--training.grad_clip=1)"]
    if plan.precision != "32":
        remedies.insert(1, "--precision 32")
    return (
        f"the loss or a weight is not finite since about step {state.step} (epoch {state.epoch}, lr {lr:.4g}); the run "
        f"stops here. Remedies: {', '.join(remedies)}; then --resume the last checkpoint, which is from before"
    )


@dataclass(frozen=True)
class Evaluation:
    """The values of `measure`, and the predictions for every sample of the split. Empty if there was no evaluation."""

    values: dict[str, float] = field(default_factory=dict)
    predictions: Predictions | None = None


NOT_EVALUATED = Evaluation()


def evaluate(
    trainer: Trainer,
    loader: Loader,
    log: RunLog,
    *,
    epoch: int,
    settings: Validation,
    classes: ClassMatch,
    stop: StopRequest | None = None,
    begin_next: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate the trainer's model on the whole validation split; see `measure`.

    Parameters
    ----------
    epoch : int
        Number of the epoch that the weights are of; -1 if they are of no epoch of the run.
    classes : ClassMatch
        The model's numbers for the classes of the split.
    begin_next : callable, optional
        Called when the last batch has come.

    Raises
    ------
    RunError
        If memory ran out, or the ranks together did not see each sample once.
    Stopped
        If the ranks have agreed to stop.
    """
    world, beton = trainer.world, loader.beton
    recorder = PredictionRecorder(world.device, loader.next_traversal_order(), beton.num_samples)
    labels = classes.to_model(beton.labels)
    batches: Iterable[Any] = loader
    if stop is not None:
        fewest = math.ceil(beton.num_samples // world.world_size / loader.batch_size)
        batches = stop.watched(loader, fewest)
    batches = calling_at_last(batches, len(loader), begin_next)
    try:
        values = measure(
            trainer.evaluated_model,
            log.track(batches, "validation", total=len(loader)),
            world,
            num_samples=beton.num_samples,
            precision=trainer.precision,
            flip=settings.lr_tta,
            channels_last=trainer.channels_last,
            numbers=classes.numbers,
            among=np.unique(labels) if settings.classes == "only" else None,
            recorder=recorder,
        )
    except torch.OutOfMemoryError as error:
        raise RunError(_out_of_memory_message(settings)) from error
    loss, predicted, confidence = recorder.gather().T
    if num_bad := np.count_nonzero(~np.isfinite(loss)):
        log.print(f"note: the logits of {num_bad:,} validation images are not finite; these images count as wrong")
    return Evaluation(values, Predictions(epoch, labels, predicted.astype(int), loss, confidence))


def _out_of_memory_message(settings: Validation) -> str:
    size = settings.batch_size
    remedy = "end what else uses it" if size == 1 else f"try --validation.batch_size={size // 2}"
    return f"out of GPU memory in the evaluation, at a batch size of {size}: {remedy}. Accuracies do not depend on it"


@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    world: World,
    *,
    num_samples: int,
    precision: str,
    flip: bool = False,
    channels_last: bool = True,
    numbers: np.ndarray | None = None,
    among: np.ndarray | None = None,
    recorder: PredictionRecorder | None = None,
) -> dict[str, float]:
    """Measure loss and accuracy of a model over batches, every sample counted once over all ranks.

    Parameters
    ----------
    model : torch.nn.Module
        Without a distributed wrapper. Its buffers become those of rank 0 on every rank first.
    batches : iterable
        Images, float (N, 3, H, W), and labels, int64 (N,), on the device: this rank's share of the split.
    num_samples : int
        Size of the split, which the count must equal.
    precision : {"16-mixed", "bf16-mixed", "32"}
    flip : bool
        Average the logits of each image and its mirror image.
    numbers : ndarray of int64, optional
        The model's class number for each label of the batches; None if they are the same.
    among : ndarray of int64, optional
        Class numbers. The model may predict no other class. None: all classes.

    Returns
    -------
    dict
        ``val/loss`` (plain cross entropy), ``val/acc1``, ``val/acc5``. An image whose logits are not finite counts as
        wrong, and makes the loss NaN.

    Raises
    ------
    RunError
        If the ranks together did not see each sample once.
    """
    share_buffers(model)
    model.eval()
    meter = AccuracyMeter(world.device)
    new_labels = None if numbers is None else torch.from_numpy(numbers).to(world.device)
    allowed = None if among is None else torch.from_numpy(among).to(world.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for images, labels in batches:
        images = images.contiguous(memory_format=layout)
        with autocast(world.device, precision):
            logits = model(images).float()
            if flip:
                logits = (logits + model(images.flip(3)).float()) / 2
        if new_labels is not None:
            labels = new_labels[labels]
        if allowed is not None:
            logits = torch.full_like(logits, -math.inf).index_copy(1, allowed, logits[:, allowed])
        meter.add(F.cross_entropy(logits, labels), logits, labels)
        if recorder is not None:
            recorder.add(logits, labels)
    totals = meter.totals()
    if round(totals[3]) != num_samples:
        raise RunError(f"validation counted {totals[3]:.0f} samples of a split of {num_samples}")
    return accuracy_metrics(totals, "val")
