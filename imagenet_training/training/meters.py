"""Measure a run: loss, accuracy, predictions, pace, memory. No measurement makes a step wait for the device."""

import collections
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from imagenet_training.distributed import World, sum_over_ranks

# A run ends if the losses of so many steps in a row are not finite. One such loss can pass under 16-bit precision.
NON_FINITE_STEPS = 3


def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the labels (N,) that are the first, and that are among the first five, of logits (N, K): float64 (2,).

    A row with a NaN or an infinite maximum has no hits.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1)
    hits = (top.indices == labels[:, None]) & top.values[:, :1].isfinite()  # topk takes NaN for the largest value
    return torch.stack([hits[:, 0].sum(), hits.sum()]).double()


def accuracy_metrics(totals: Sequence[float], split: str) -> dict[str, float]:
    """Return mean loss and accuracies in [0, 1] from a meter's totals, named ``train/loss``, ``train/acc1``, ..."""
    loss, hits1, hits5, count = totals
    count = max(count, 1)
    return {f"{split}/loss": loss / count, f"{split}/acc1": hits1 / count, f"{split}/acc5": hits5 / count}


class AccuracyMeter:
    """Sums kept on the device, float64 (4,): loss times images, top-1 hits, top-5 hits, images."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its mean loss (scalar), logits (N, K) and labels (N,)."""
        count = len(labels)
        self.sums[0] += loss.detach().double() * count
        self.sums[1:3] += count_hits(logits.detach(), labels)
        self.sums[3] += count

    def totals(self) -> list[float]:
        """Return the sums over all ranks. Every rank must call this."""
        return sum_over_ranks(self.sums).tolist()

    def restore(self, totals: list[float], world: World) -> None:
        """Continue from sums that a checkpoint kept. Rank 0 carries them for all ranks."""
        if totals and world.is_main:
            self.sums += torch.tensor(totals, dtype=torch.float64, device=self.sums.device)


class PredictionRecorder:
    """Loss, prediction and confidence of every sample of a split, kept on the device until the evaluation ends.

    `order` has the ids of this rank's samples, int64, in the order in which they come. The split has `num_samples`.
    """

    def __init__(self, device: torch.device, order: np.ndarray, num_samples: int):
        self.order = torch.from_numpy(order).to(device)
        self.rows = torch.zeros(num_samples, 4, device=device)
        self.num_seen = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Record the next samples: float logits (N, K), labels (N,)."""
        norm = logits.logsumexp(dim=1)
        top = logits.max(dim=1)
        loss = norm - logits.gather(1, labels[:, None])[:, 0]
        rows = torch.stack([loss, top.indices.float(), (top.values - norm).exp(), torch.ones_like(norm)], dim=1)
        self.rows[self.order[self.num_seen : self.num_seen + len(labels)]] = rows
        self.num_seen += len(labels)

    def gather(self) -> np.ndarray:
        """Return loss, class and confidence of all ranks' samples, float32 (num_samples, 3). Every rank must call."""
        rows = sum_over_ranks(self.rows).cpu().numpy()
        assert (rows[:, 3] == 1).all(), "the ranks' samples are not the split, each once"
        return rows[:, :3]


class NonFiniteGuard:
    """Detects a loss that stays non-finite.

    The count of non-finite losses in a row is copied to the host behind each step, and read a few steps later, once the
    copy has arrived.
    """

    def __init__(self, device: torch.device):
        self.run_length = torch.zeros((), dtype=torch.int64, device=device)
        self.on_gpu = device.type == "cuda"
        self.pending: collections.deque[tuple[Any, torch.Tensor]] = collections.deque()

    def fails(self, loss: torch.Tensor) -> bool:
        """Count a step's loss (scalar). Return True if too many losses in a row were not finite."""
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


class StepClock:
    """Measures images per second over all ranks, this rank's waits for data, and the memory of its GPU.

    On a GPU the wait is the GPU's own: from the end of one batch's work to the arrival of the next batch, both marked
    in the GPU's queue. The host runs ahead of the GPU, and may wait for a batch while the GPU still has work.

    Parameters
    ----------
    images_per_step : int
        Images of an optimizer step, in which `rates` counts.
    earlier : sequence of float
        The `sums` of the process that was interrupted in this epoch. They stand for an epoch of which nothing is left.
    """

    def __init__(self, device: torch.device, images_per_step: int, earlier: Sequence[float] = ()):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.images_per_step, self.earlier = images_per_step, list(earlier)
        self.num_images = self.num_steps = 0
        self.wait_s = 0.0
        self.host_wait_s = self.storage_wait_s = 0.0
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

    def watch(self, batches: Iterable[Any], loader: Any) -> Iterator[Any]:
        """Yield the batches as they come, and mark the waits for them.

        The loader's ``storage_wait_s`` shows which part of the host's waits was for storage. The rest was for the CPU.
        """
        iterator = iter(batches)
        while True:
            asked, asked_s, storage_wait_s = self._mark(), time.perf_counter(), loader.storage_wait_s
            batch = next(iterator, None)
            if batch is None:
                return
            waited_s = time.perf_counter() - asked_s
            self.host_wait_s += waited_s
            self.storage_wait_s += max(0.0, min(waited_s, loader.storage_wait_s - storage_wait_s))
            self.waits.append((asked, self._mark()))
            self._add_waits()
            yield batch

    def _add_waits(self) -> None:
        """Add the waits that are over. On a GPU these are the waits of some steps ago."""
        while self.waits and (not self.on_gpu or self.waits[0][1].query()):
            asked, came = self.waits.popleft()
            self.wait_s += asked.elapsed_time(came) / 1000 if self.on_gpu else came - asked

    def sums(self) -> list[float]:
        """Return images, seconds, seconds of waiting, and those of waiting for storage; [] if there are none.

        They are those of this process, or else of the earlier one. Old checkpoints lack the last one.
        """
        if not self.num_images:
            return self.earlier
        self._add_waits()
        storage_s = self.wait_s * self.storage_wait_s / max(self.host_wait_s, 1e-9)
        return [self.num_images, max(time.perf_counter() - self.start_s, 1e-9), self.wait_s, storage_s]

    def rates(self) -> dict[str, float]:
        """Return ``images_per_s``, ``data_wait`` in [0, 1] and ``step_s``; exact right after a wait for the device.

        ``data_wait_storage`` is the part of ``data_wait`` that was for storage. If no image was measured, nothing is
        returned.
        """
        if not (sums := self.sums()):
            return {}
        num_images, elapsed_s, *waits_s = sums
        waits = zip(("data_wait", "data_wait_storage"), waits_s, strict=False)
        return {
            "images_per_s": num_images / elapsed_s,
            **{name: min(wait_s / elapsed_s, 1.0) for name, wait_s in waits},
            "step_s": elapsed_s / num_images * self.images_per_step,
        }

    def steady_step_s(self) -> float:
        """Return the seconds a step took since the first call, and 0 at that call.

        Kernels are compiled and chosen before the first call, so the steps before it do not count.
        """
        now = self.num_steps, time.perf_counter()
        self.first = self.first or now
        num_steps = now[0] - self.first[0]
        return (now[1] - self.first[1]) / num_steps if num_steps else 0.0

    def peak_memory(self) -> dict[str, int]:
        """Return the most GPU memory that tensors took, and that PyTorch reserved. On a CPU, return nothing."""
        if not (self.on_gpu and self.num_images):
            return {}
        return {
            "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }


class EtaEstimator:
    """Estimates when a run ends: steps at their present pace, in proportion to their pixels, and pauses between epochs.

    Parameters
    ----------
    resolutions : list of int
        Side of the images in each epoch, px.
    eval_steps : float
        Images of an evaluation, counted in steps of training. An evaluation is taken to last so long until one has
        been timed.

    Attributes
    ----------
    pause_s : float or None
        Time from the end of an epoch's last step to the next epoch: evaluation, logs, checkpoint. None at first.
    """

    def __init__(self, resolutions: list[int], steps_per_epoch: int, eval_steps: float = 0.0):
        self.resolutions, self.steps_per_epoch, self.eval_steps = resolutions, steps_per_epoch, eval_steps
        self.pause_s: float | None = None
        self._pause_start_s = 0.0

    def start_pause(self) -> None:
        """Note that the steps of an epoch are over."""
        self._pause_start_s = time.perf_counter()

    def end_pause(self) -> None:
        """Take the time since `start_pause` for the length of every later pause."""
        self.pause_s = time.perf_counter() - self._pause_start_s

    def remaining_s(self, epoch: int, done: int, step_s: float) -> float:
        """Return the seconds left after ``done`` steps of an epoch, each of which took ``step_s``."""
        pause_s = self.eval_steps * step_s if self.pause_s is None else self.pause_s
        here = self.resolutions[epoch]
        later = sum((size / here) ** 2 for size in self.resolutions[epoch + 1 :])
        steps = self.steps_per_epoch * (1 + later) - done
        return steps * step_s + pause_s * (len(self.resolutions) - epoch)
