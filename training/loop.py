"""One step, one epoch, one evaluation."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from training.checkpoint import TrainState, unwrapped
from training.distributed import World, share_buffers, sum_over_ranks
from training.logs import RunLog, format_duration
from training.loss import Loss

# A run is stopped when this many losses in a row are not finite: under 16-bit precision a single one can pass.
NON_FINITE_STEPS = 3
DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32": torch.float32}


class RunError(RuntimeError):
    """A run that cannot go on, with what to do about it."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; off for ``"32"``."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "32")


def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of N labels (N,) are the first, and among the first five, of logits (N, K): float64 (2,)."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()]).double()


class Meter:
    """Sums of loss and hits, kept on the device so that no step waits for them.

    ``sums`` is float64 (4,): loss times images, top-1 hits, top-5 hits, images.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        count = len(labels)
        self.sums[0] += loss.detach().double() * count
        self.sums[1:3] += count_hits(logits.detach(), labels)
        self.sums[3] += count

    def totals(self) -> list[float]:
        """The sums over all ranks. Every rank must call it."""
        return sum_over_ranks(self.sums).tolist()

    def restore(self, totals: list[float], world: World) -> None:
        """Go on from sums that a checkpoint kept: rank 0 carries them."""
        if totals and world.is_main:
            self.sums += torch.tensor(totals, dtype=torch.float64, device=self.sums.device)


class SampleMeter:
    """Loss, prediction and confidence for every sample of a split, kept on the device until all are done.

    Parameters
    ----------
    device : torch.device
    order : ndarray of int64
        Ids of this rank's samples, in the order in which they come.
    num_samples : int
        Size of the split.
    """

    def __init__(self, device: torch.device, order: np.ndarray, num_samples: int):
        self.order = torch.from_numpy(order).to(device)
        self.rows = torch.zeros(num_samples, 4, device=device)
        self.num_seen = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take down the next samples: float logits (N, K), labels (N,)."""
        norm = logits.logsumexp(dim=1)
        top = logits.max(dim=1)
        loss = norm - logits.gather(1, labels[:, None])[:, 0]
        rows = torch.stack([loss, top.indices.float(), (top.values - norm).exp(), torch.ones_like(norm)], dim=1)
        self.rows[self.order[self.num_seen : self.num_seen + len(labels)]] = rows
        self.num_seen += len(labels)

    def gather(self) -> np.ndarray:
        """Loss, class and confidence of all ranks' samples, float32 (num_samples, 3). Every rank must call it."""
        rows = sum_over_ranks(self.rows).cpu().numpy()
        assert (rows[:, 3] == 1).all(), "the ranks' samples are not the split, each once"
        return rows[:, :3]


def metrics(totals: list[float], split: str) -> dict[str, float]:
    """Mean loss and accuracies in [0, 1] from a meter's totals, named ``train/loss``, ``train/acc1``, ..."""
    loss, hits1, hits5, count = totals
    count = max(count, 1)
    return {f"{split}/loss": loss / count, f"{split}/acc1": hits1 / count, f"{split}/acc5": hits5 / count}


class FiniteCheck:
    """Stops a run whose loss is no longer finite, without making any step wait for the device.

    Each step's count of non-finite losses in a row is copied to the host behind the step, and looked at once the copy
    has come, a few steps later.
    """

    def __init__(self, device: torch.device):
        self.run_length = torch.zeros((), dtype=torch.int64, device=device)
        self.on_gpu = device.type == "cuda"
        self.pending: collections.deque[tuple[Any, torch.Tensor]] = collections.deque()

    def fails(self, loss: torch.Tensor) -> bool:
        """Count a step's loss (scalar), and tell whether too many in a row were not finite."""
        self.run_length = torch.where(torch.isfinite(loss.detach()), 0, self.run_length + 1)
        copy, event = self.run_length, None
        if self.on_gpu:
            copy = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(self.run_length, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((event, copy))
        while self.pending and (self.pending[0][0] is None or self.pending[0][0].query()):
            if self.pending.popleft()[1].item() >= NON_FINITE_STEPS:
                return True
        return False


@dataclass
class Trainer:
    """What a step needs: the model under training, what changes it, and how.

    Parameters
    ----------
    model : torch.nn.Module
        On its device, wrapped for distribution where there are several ranks.
    ema : AveragedModel or None
        Updated every ``ema_every`` steps.
    loss : callable
        Scalar loss of logits (N, K) and dense targets (N, K).
    lr : callable
        Learning rate of an optimizer step, counted from 0 over the run.
    precision : {"16-mixed", "bf16-mixed", "32"}
    accumulation : int
        Batches per optimizer step.
    grad_clip, agc : float
        Largest norm of the whole gradient; largest ratio of each unit's gradient norm to its weights' norm (adaptive
        gradient clipping, arXiv 2102.06171), the last layer's weight and bias excepted, as there. 0 does not clip.
    channels_last : bool
        Memory format of the images.
    seed : int
        Of what the model itself draws (dropout, drop path): a function of (seed, step, rank).
    """

    model: nn.Module
    ema: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    world: World
    loss: Loss
    lr: Callable[[int], float]
    precision: str
    accumulation: int = 1
    grad_clip: float = 0.0
    agc: float = 0.0
    ema_every: int = 1
    channels_last: bool = True
    seed: int = 0

    def gradient(self, images: torch.Tensor, targets: torch.Tensor, *, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one batch's share to the gradient; ranks exchange gradients with the step's last batch only.

        Parameters
        ----------
        images : torch.Tensor
            Float (N, 3, H, W).
        targets : torch.Tensor
            Float (N, K).

        Returns
        -------
        tuple of torch.Tensor
            Loss (scalar) and logits (N, K).
        """
        wait = self.model.no_sync() if not last and dist.is_initialized() else contextlib.nullcontext()  # type: ignore
        with wait:
            with autocast(self.world.device, self.precision):
                logits = self.model(images)
            loss = self.loss(logits, targets)
            self.scaler.scale(loss / self.accumulation).backward()
        return loss, logits

    def update(self, step: int) -> float:
        """Take the optimizer step from the gradient at hand; returns its learning rate."""
        lr = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.grad_clip or self.agc:
            self.scaler.unscale_(self.optimizer)
        if self.agc:
            adaptive_clip_grad([*self.model.parameters()][:-2], self.agc)
        if self.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and (step + 1) % self.ema_every == 0:
            self.ema.update_parameters(unwrapped(self.model))
        return lr

    def seed_step(self, step: int) -> None:
        """Make what the model draws in a step a function of (seed, step, rank), the same after any resume."""
        torch.manual_seed(hash((self.seed, step, self.world.rank)) % 2**63)


def train_epoch(
    trainer: Trainer,
    loader: Any,
    state: TrainState,
    log: RunLog,
    *,
    steps_per_epoch: int,
    epochs: int,
    log_every: int,
    save: Callable[[], None],
    save_every_steps: int = 0,
) -> dict[str, float]:
    """Train one epoch, or the rest of one that was interrupted.

    Parameters
    ----------
    trainer : Trainer
    loader : Loader
        ``loader.epoch(epoch, skip)`` yields images, float (N, 3, H, W), and targets, float (N, K), on the device.
    state : TrainState
        Moved on with every batch; the epoch number is left for the caller.
    log : RunLog
    steps_per_epoch, epochs : int
        For progress and the expected end.
    log_every : int
        Steps between progress lines; the only moments, beside saves, at which the host waits for the device.
    save, save_every_steps : callable, int
        Called every so many steps, on all ranks; 0 for never within an epoch.

    Returns
    -------
    dict
        ``train/loss``, ``train/acc1``, ``train/acc5`` (against each image's heavier label where images are mixed),
        ``lr``, ``images_per_s``, ``data_wait`` (share of the time spent waiting for batches).

    Raises
    ------
    RunError
        A loss that stays non-finite.
    """
    model, world = trainer.model, trainer.world
    model.train()
    meter, finite = Meter(world.device), FiniteCheck(world.device)
    meter.restore(state.totals, world)
    state.totals = []
    clock = Clock(loader)
    lr, end = 0.0, state.step + steps_per_epoch - state.batch // trainer.accumulation
    place = {"total": steps_per_epoch * trainer.accumulation, "done": state.batch}
    for images, targets in log.track(loader.epoch(state.epoch, skip=state.batch), f"epoch {state.epoch}", **place):
        if state.step == end:
            break
        if trainer.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        last = (state.batch + 1) % trainer.accumulation == 0
        trainer.seed_step(state.step * trainer.accumulation + state.batch % trainer.accumulation)
        loss, logits = trainer.gradient(images, targets, last=last)
        meter.add(loss, logits, targets.argmax(dim=1))
        state.batch += 1
        clock.num_images += len(images) * world.world_size
        if not last:
            continue
        lr = trainer.update(state.step)
        state.step += 1
        clock.num_steps += 1
        if finite.fails(loss):
            raise RunError(non_finite_message(state, lr, trainer.precision))
        done = steps_per_epoch - (end - state.step)
        if log_every and done % log_every == 0:
            now = {**metrics(meter.sums.tolist(), "train"), "lr": lr, **clock.rates()}
            remaining = (epochs - state.epoch) * steps_per_epoch - done
            remaining_s = clock.expect_s(remaining)
            log.progress(
                progress_line(state.epoch, done, steps_per_epoch, now, remaining_s), bar_text(now, remaining_s)
            )
            if step_s := clock.steady_step_s():
                log.say_once(pace_line(images.shape[-1], step_s * steps_per_epoch, step_s * remaining))
            log.metrics({"step/loss": now["train/loss"], "lr": lr, "images_per_s": now["images_per_s"]}, state.step)
        if save_every_steps and state.step % save_every_steps == 0 and state.step < end:
            state.totals = meter.totals()
            save()
            state.totals = []
    totals = meter.totals()
    return {**metrics(totals, "train"), "lr": lr, **clock.rates()}


class Clock:
    """Images per second over all ranks, and the share of the time this rank waited for data."""

    def __init__(self, loader: Any):
        self.loader = loader
        self.num_images = self.num_steps = 0
        self.wait_s = 0.0
        self.first: tuple[int, float] | None = None
        loader.take_wait_s()
        self.start_s = time.monotonic()

    def rates(self) -> dict[str, float]:
        elapsed_s = max(time.monotonic() - self.start_s, 1e-9)
        self.wait_s += self.loader.take_wait_s()
        return {"images_per_s": self.num_images / elapsed_s, "data_wait": min(self.wait_s / elapsed_s, 1.0)}

    def steady_step_s(self) -> float:
        """Seconds a step took since the first call; 0 at that call, before which kernels were compiled and chosen."""
        now = self.num_steps, time.monotonic()
        self.first = self.first or now
        num_steps = now[0] - self.first[0]
        return (now[1] - self.first[1]) / num_steps if num_steps else 0.0

    def expect_s(self, num_steps: int) -> float:
        """Seconds that so many further steps will take at the pace so far."""
        return (time.monotonic() - self.start_s) / self.num_steps * num_steps


def progress_line(epoch: int, done: int, steps: int, now: dict[str, float], remaining_s: float) -> str:
    """One line on where an epoch stands."""
    return (
        f"epoch {epoch}  step {done}/{steps}  loss {now['train/loss']:.4f}  top-1 {now['train/acc1']:.2%}  "
        f"lr {now['lr']:.5g}  {now['images_per_s']:,.0f} images/s  data wait {now['data_wait']:.1%}  "
        f"{format_duration(remaining_s)} to go"
    )


def bar_text(now: dict[str, float], remaining_s: float) -> str:
    """What stands behind the bar of an epoch on a terminal."""
    return (
        f"run {format_duration(remaining_s)} to go, loss {now['train/loss']:.3f}, top-1 {now['train/acc1']:.1%}, "
        f"{now['images_per_s']:,.0f} images/s"
    )


def pace_line(resolution: int, epoch_s: float, remaining_s: float) -> str:
    """What the first steps of a process say about the time that its run takes."""
    end = time.strftime("%a %d %b %Y %H:%M", time.localtime(time.time() + remaining_s))
    return (
        f"expected from the first steps, at {resolution} px and without evaluation: {format_duration(epoch_s)} an "
        f"epoch, the end in {format_duration(remaining_s)}, {end}"
    )


def non_finite_message(state: TrainState, lr: float, precision: str) -> str:
    """What to do about a loss that is no longer finite."""
    remedies = [f"a lower learning rate (--lr {lr / 2:.3g})", "gradient clipping (--training.grad_clip=1)"]
    if precision != "32":
        remedies.insert(1, "--precision 32")
    return (
        f"the loss is not finite since about step {state.step} (epoch {state.epoch}, lr {lr:.4g}); the run stops here. "
        f"Remedies: {', '.join(remedies)}; then --resume the last checkpoint, which is from before"
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    world: World,
    *,
    num_samples: int,
    precision: str,
    flip: bool = False,
    channels_last: bool = True,
    samples: SampleMeter | None = None,
) -> dict[str, float]:
    """Loss and accuracy of a model over a validation split, every sample counted once over all ranks.

    Parameters
    ----------
    model : torch.nn.Module
        Without a distributed wrapper; its buffers are made rank 0's on every rank first.
    loader : iterable
        Images, float (N, 3, H, W), and labels, int64 (N,), on the device; this rank's share of the split.
    num_samples : int
        Size of the split, against which the count is checked.
    flip : bool
        Average the logits of each image and its mirror image.
    samples : SampleMeter, optional
        Takes down what the model makes of each sample.

    Returns
    -------
    dict
        ``val/loss`` (plain cross entropy), ``val/acc1``, ``val/acc5``.

    Raises
    ------
    RunError
        Where the ranks together did not see each sample once.
    """
    share_buffers(model)
    model.eval()
    meter = Meter(world.device)
    for images, labels in loader:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(world.device, precision):
            logits = model(images).float()
            if flip:
                logits = (logits + model(images.flip(3)).float()) / 2
        meter.add(F.cross_entropy(logits, labels), logits, labels)
        if samples is not None:
            samples.add(logits, labels)
    totals = meter.totals()
    if round(totals[3]) != num_samples:
        raise RunError(f"validation counted {totals[3]:.0f} samples of a split of {num_samples}")
    return metrics(totals, "val")
