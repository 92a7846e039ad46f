"""One step, one epoch, one evaluation."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from ffcv_ops.units import show_duration
from imagenet_training.checkpoint import TrainState, unwrapped
from imagenet_training.distributed import World, share_buffers, sum_over_ranks
from imagenet_training.logs import RunLog
from imagenet_training.loss import Loss
from imagenet_training.preemption import Stopped

# A run is stopped when this many losses in a row are not finite: under 16-bit precision a single one can pass.
NON_FINITE_STEPS = 3
DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32": torch.float32}


class RunError(RuntimeError):
    """A run that cannot go on, with what to do about it."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; off for ``"32"``."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "32")


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round the factors of 32-bit products, in convolutions and linear layers, to TF32's 10 bits."""
    # Of PyTorch's two interfaces the older: what is set by it can be read by both, what by the newer by that alone.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


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
        self.run_length = (self.run_length + 1) * ~torch.isfinite(loss.detach())
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
        Memory format of the images, as of the weights; a loader whose images have it costs no copy.
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

    def laid_out(self, images: torch.Tensor) -> torch.Tensor:
        """The images in the memory format of the weights; themselves where they have it."""
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

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

    def rehearse(self, shape: tuple[int, int, int, int]) -> Exception | None:
        """Pass a batch of zeros forward and back, and leave no trace: this is when a compiled model is compiled.

        Parameters
        ----------
        shape : tuple of int
            Of a batch's images, (N, 3, H, W).

        Returns
        -------
        Exception or None
            What went wrong, other than a want of memory, which is raised.
        """
        self.model.train()
        kept = [buffer.clone() for buffer in self.model.buffers()]
        images = self.laid_out(torch.zeros(shape, dtype=DTYPES[self.precision], device=self.world.device))
        # No rank waits for another here, so that one that fails leaves none behind.
        alone = self.model.no_sync() if dist.is_initialized() else contextlib.nullcontext()  # type: ignore[operator]
        try:
            with alone:
                with autocast(self.world.device, self.precision):
                    logits = self.model(images)
                logits.float().sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # dynamo, inductor, Triton and the C++ compiler raise many kinds
            return error
        finally:
            for buffer, value in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(value)
            self.optimizer.zero_grad(set_to_none=True)
        return None

    def is_finite(self) -> bool:
        """Whether all weights and statistics of the model are finite. Waits for the device."""
        values = [value.detach() for value in (*self.model.parameters(), *self.model.buffers())]
        norms = torch._foreach_norm([value for value in values if value.is_floating_point()])
        return bool(torch.stack(norms).isfinite().all())

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
    forecast: "Forecast",
    log_every: int,
    save: Callable[[], None],
    save_every_steps: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Train one epoch, or the rest of one that was interrupted.

    Parameters
    ----------
    trainer : Trainer
    loader : Loader
        ``loader.epoch(epoch, skip)`` yields images, float (N, 3, H, W), and targets, float (N, K), on the device.
    state : TrainState
        Moved on with every batch; the end of the epoch, after its evaluation, is left for the caller.
    log : RunLog
    steps_per_epoch : int
    forecast : Forecast
        Of the run's end.
    log_every : int
        Steps between progress lines; the only moments, beside saves, at which the host waits for the device.
    save, save_every_steps : callable, int
        Called every so many steps, on all ranks; 0 for never within an epoch.
    stop : callable
        Asked after every step whether the run is to stop there; the same answer on all ranks.

    Returns
    -------
    dict
        ``train/loss``, ``train/acc1``, ``train/acc5`` (against each image's heavier label where images are mixed),
        ``lr``, ``images_per_s``, ``data_wait`` (share of the time that was spent waiting for batches, by the GPU where
        there is one), ``step_s``; on a GPU ``gpu_peak_allocated_bytes``, ``gpu_peak_reserved_bytes``.

    Raises
    ------
    RunError
        A loss that stays non-finite, or weights that are, where they would be saved.
    Stopped
        As ``stop`` asked; ``state`` is ready to be saved.
    """
    model, world = trainer.model, trainer.world
    model.train()
    meter, finite = Meter(world.device), FiniteCheck(world.device)
    meter.restore(state.totals, world)
    state.totals = []
    clock = Clock(world.device)
    lr, end = trainer.lr(max(state.step - 1, 0)), state.step + steps_per_epoch - state.batch // trainer.accumulation
    place = {"total": steps_per_epoch * trainer.accumulation, "done": state.batch}
    batches = clock.watch(loader.epoch(state.epoch, skip=state.batch))

    def take_stock() -> None:
        """Make ``state`` ready to be saved. What rank 0 would save must be worth going on from."""
        if world.is_main and not trainer.is_finite():
            raise RunError(non_finite_message(state, lr, trainer.precision))
        state.totals = meter.totals()

    for images, targets in log.track(batches, f"epoch {state.epoch}", **place):
        if state.step == end:
            break
        images = trainer.laid_out(images)
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
            remaining_s = forecast.remaining_s(state.epoch, done, now["step_s"])
            log.progress(
                progress_line(state.epoch, done, steps_per_epoch, now, remaining_s), bar_text(now, remaining_s)
            )
            if step_s := clock.steady_step_s():
                remaining_s = forecast.remaining_s(state.epoch, done, step_s)
                log.say_once(pace_line(images.shape[-1], step_s * steps_per_epoch, remaining_s))
            log.metrics({"step/loss": now["train/loss"], "lr": lr, "images_per_s": now["images_per_s"]}, state.step)
        if stop():
            take_stock()
            raise Stopped
        if save_every_steps and state.step % save_every_steps == 0 and state.step < end:
            take_stock()
            save()
            state.totals = []
    take_stock()
    return {**metrics(state.totals, "train"), "lr": lr, **clock.rates(), **clock.peak_memory()}


class Clock:
    """Images per second over all ranks, the share of the time this rank waited for data, and its GPU's memory.

    On a GPU the wait is the GPU's own, between the end of one batch's work and the arrival of the next batch, both
    marked in its queue. The host runs ahead of the GPU and may wait for a batch while the GPU still has work.
    """

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.num_images = self.num_steps = 0
        self.wait_s = 0.0
        self.first: tuple[int, float] | None = None
        self.waits: collections.deque[tuple[Any, Any]] = collections.deque()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.start_s = time.perf_counter()

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches as they come, with the waits for them marked."""
        iterator = iter(batches)
        while True:
            asked = self._mark()
            batch = next(iterator, None)
            if batch is None:
                return
            self.waits.append((asked, self._mark()))
            self._add_waits()
            yield batch

    def _add_waits(self) -> None:
        """Add up the waits that are over; on a GPU those of some steps ago."""
        while self.waits and (not self.on_gpu or self.waits[0][1].query()):
            asked, came = self.waits.popleft()
            self.wait_s += asked.elapsed_time(came) / 1000 if self.on_gpu else came - asked

    def rates(self) -> dict[str, float]:
        """``images_per_s``, ``data_wait`` in [0, 1], ``step_s`` so far: exact where the device has been waited for."""
        elapsed_s = max(time.perf_counter() - self.start_s, 1e-9)
        self._add_waits()
        return {
            "images_per_s": self.num_images / elapsed_s,
            "data_wait": min(self.wait_s / elapsed_s, 1.0),
            "step_s": elapsed_s / max(self.num_steps, 1),
        }

    def steady_step_s(self) -> float:
        """Seconds a step took since the first call; 0 at that call, before which kernels were compiled and chosen."""
        now = self.num_steps, time.perf_counter()
        self.first = self.first or now
        num_steps = now[0] - self.first[0]
        return (now[1] - self.first[1]) / num_steps if num_steps else 0.0

    def peak_memory(self) -> dict[str, int]:
        """What tensors took of the GPU's memory at most, and what PyTorch held of it; nothing on a CPU."""
        if not self.on_gpu:
            return {}
        return {
            "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }


class Forecast:
    """When a run will end: steps at their present pace, in proportion to their pixels, and what lies between epochs.

    Parameters
    ----------
    resolutions : list of int
        Side of the images, px, in each epoch.
    steps_per_epoch : int
    eval_steps : float
        An evaluation's images in steps of training, which it is taken for until one has been timed.

    Attributes
    ----------
    between_s : float or None
        Time from the end of an epoch's last step to the next epoch: evaluation, logs, checkpoint.
    """

    def __init__(self, resolutions: list[int], steps_per_epoch: int, eval_steps: float = 0.0):
        self.resolutions, self.steps_per_epoch, self.eval_steps = resolutions, steps_per_epoch, eval_steps
        self.between_s: float | None = None

    def remaining_s(self, epoch: int, done: int, step_s: float) -> float:
        """Seconds left when ``done`` steps of an epoch are over, each of which took ``step_s``."""
        between_s = self.eval_steps * step_s if self.between_s is None else self.between_s
        here = self.resolutions[epoch]
        later = sum((size / here) ** 2 for size in self.resolutions[epoch + 1 :])
        steps = self.steps_per_epoch * (1 + later) - done
        return steps * step_s + between_s * (len(self.resolutions) - epoch)


def progress_line(epoch: int, done: int, steps: int, now: dict[str, float], remaining_s: float) -> str:
    """One line on where an epoch stands."""
    return (
        f"epoch {epoch}  step {done}/{steps}  loss {now['train/loss']:.4f}  top-1 {now['train/acc1']:.2%}  "
        f"lr {now['lr']:.5g}  {now['images_per_s']:,.0f} images/s  data wait {now['data_wait']:.1%}  "
        f"{show_duration(remaining_s)} to go"
    )


def bar_text(now: dict[str, float], remaining_s: float) -> str:
    """What stands behind the bar of an epoch on a terminal."""
    return (
        f"run {show_duration(remaining_s)} to go, loss {now['train/loss']:.3f}, top-1 {now['train/acc1']:.1%}, "
        f"{now['images_per_s']:,.0f} images/s"
    )


def pace_line(resolution: int, epoch_s: float, remaining_s: float) -> str:
    """What the first steps of a process say about the time that its run takes."""
    end = time.strftime("%a %d %b %Y %H:%M", time.localtime(time.time() + remaining_s))
    return (
        f"expected from the first steps, at {resolution} px and without evaluation: {show_duration(epoch_s)} an "
        f"epoch, the end in {show_duration(remaining_s)}, {end}"
    )


def non_finite_message(state: TrainState, lr: float, precision: str) -> str:
    """What to do about a loss or weights that are no longer finite."""
    remedies = [f"a lower learning rate (--lr {lr / 2:.3g})", "gradient clipping (--training.grad_clip=1)"]
    if precision != "32":
        remedies.insert(1, "--precision 32")
    return (
        f"the loss or a weight is not finite since about step {state.step} (epoch {state.epoch}, lr {lr:.4g}); the run "
        f"stops here. Remedies: {', '.join(remedies)}; then --resume the last checkpoint, which is from before"
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
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for images, labels in loader:
        images = images.contiguous(memory_format=layout)
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
