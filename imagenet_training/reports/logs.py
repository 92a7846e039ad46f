"""Log a run: console, log file, a JSONL record of every epoch, a curve."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tqdm import tqdm

from ffcv_ops.console import open_text
from ffcv_ops.files import SaveError, replace_text, replacing
from ffcv_ops.units import show_duration
from imagenet_training.reports.background import BackgroundQueue
from imagenet_training.reports.charts import draw_curve
from imagenet_training.reports.metrics import ExpectedAccuracy, Records, compare_with_expected, finite_values
from imagenet_training.reports.wandb import WandbRun, copy_parts, start_wandb
from imagenet_training.state import TrainState

if TYPE_CHECKING:  # the package `training` stands above this one
    from imagenet_training.training.epoch import EpochMeters
    from imagenet_training.training.meters import EtaEstimator

Batch = TypeVar("Batch")

# From this share of the time on, the line of an epoch names the cause of waits for data, and the end of a run a remedy.
_NAMED_DATA_WAIT, _MUCH_DATA_WAIT = 0.01, 0.05


class RunLog:
    """The one place that prints and records a run. It is silent on every rank but 0.

    On a terminal, a bar shows the progress of an epoch. If the output is piped, lines do. The log file gets the lines
    either way. A thread writes the files, so that no step waits for their storage.

    Parameters
    ----------
    folder : Path
        Holds ``<run>.log`` as the console shows it, ``<run>.jsonl``, ``<run>.png``. `open` makes the folder.
    is_main : bool
        True on rank 0.
    expected_accuracy : dict of str to dict of int to float, optional
        Accuracies to compare with, in percent by epochs finished: for ``train/acc1``, ``val/acc1``, ``val/acc5``.
    eta : EtaEstimator, optional
        Estimates the end of the run; needed by `step` and `epoch`.
    log_every : int
        Steps between progress lines; 0 for none.
    """

    def __init__(
        self,
        folder: Path,
        is_main: bool,
        expected_accuracy: ExpectedAccuracy | None = None,
        *,
        eta: "EtaEstimator | None" = None,
        log_every: int = 0,
    ):
        self.folder, self.is_main = folder, is_main
        self.expected_accuracy, self.log_every, self._eta = expected_accuracy or {}, log_every, eta
        self._file: TextIO | None = None
        self._run_name = ""
        self._wandb: WandbRun | None = None
        self._unwritten: list[str] = []
        self._writes = BackgroundQueue()
        self._records: list[dict[str, Any]] = []
        self._failed_files: set[Path] = set()
        self._bar: tqdm | None = None
        self._printed_pace = self._printed_failure = False
        self.last: dict[str, float] = {}
        self._library_notes = _LibraryNotes(self)

    @property
    def eta(self) -> "EtaEstimator":
        assert self._eta is not None, "this log is of a run that does not train"
        return self._eta

    def print(self, text: str) -> None:
        """Print text on rank 0, and add it to the log file."""
        if not self.is_main:
            return
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Add text to the log file only."""
        if not self.is_main:
            return
        if self._file is None:
            self._unwritten.append(text)
        else:
            self._writes.put(partial(print, text, file=self._file, flush=True))

    def failure(self, rank: int, message: str) -> None:
        """Print once that another rank has failed, and why."""
        if not self._printed_failure:
            self._printed_failure = True
            self.print(f"error: the run ends, because rank {rank} has failed: {message}")

    def track(self, batches: Iterable[Batch], what: str, *, total: int, done: int = 0) -> Iterator[Batch]:
        """Yield the batches. On a terminal, show a bar that counts from `done` to `total`, behind the text `what`."""
        if not (self.is_main and sys.stderr.isatty()):
            yield from batches
            return
        layout = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]{postfix}"
        look: dict[str, Any] = {"bar_format": layout, "unit": "batch", "dynamic_ncols": True, "leave": False}
        with tqdm(total=total, initial=done, desc=what, **look) as bar:
            self._bar = bar
            try:
                for batch in batches:
                    yield batch
                    bar.update()
            finally:
                self._bar = None

    def step(self, state: TrainState, meters: "EpochMeters") -> None:
        """Print and record the progress of an epoch, if a line is due after this step."""
        steps_per_epoch = meters.plan.steps_per_epoch
        done = steps_per_epoch - meters.plan.steps_left(state.samples)
        if not self.is_main or not self.log_every or done % self.log_every:
            return
        now = meters.values()
        remaining_s = self.eta.remaining_s(state.epoch, done, now["step_s"])
        self._progress(
            f"epoch {state.epoch}  step {done}/{steps_per_epoch}  loss {now['train/loss']:.4f}  "
            f"top-1 {now['train/acc1']:.2%}  lr {now['lr']:.5g}  {now['images_per_s']:,.0f} images/s  "
            f"{data_wait(now)}  {show_duration(remaining_s)} to go",
            f"run {show_duration(remaining_s)} to go, loss {now['train/loss']:.3f}, top-1 {now['train/acc1']:.1%}, "
            f"{now['images_per_s']:,.0f} images/s",
        )
        if not self._printed_pace and (step_s := meters.clock.steady_step_s()):
            self._printed_pace = True
            remaining_s = self.eta.remaining_s(state.epoch, done, step_s)
            self.print(pace_line(self.eta.resolutions[state.epoch], step_s * steps_per_epoch, remaining_s))
        if self._wandb is not None:
            position = meters.plan.step_at(state.epoch, state.samples) / steps_per_epoch
            values = {"step/loss": now["train/loss"], "lr": now["lr"], "images_per_s": now["images_per_s"]}
            self._wandb.log_step({**values, "position": position}, state.step)

    def _progress(self, line: str, brief: str) -> None:
        """Add a line to the log file, and print it unless a bar shows `brief` on a terminal."""
        if self._bar is None or not sys.stdout.isatty():
            self.print(line)
            return
        self._bar.set_postfix_str(brief)
        self.keep(line)

    def open(self, state: TrainState, provenance: dict[str, Any], earlier: Path | None = None) -> None:
        """Start the run's files, or continue those of a resumed run. The state gets the name of the files.

        Records of epochs that the resumed run repeats are dropped, so that each epoch is recorded once. If its logs
        were in another folder, `earlier`, its records are copied. Later, a file that cannot be written gets a note.

        Raises
        ------
        SaveError
            If a file cannot be made.
        """
        state.run_name = state.run_name or time.strftime("train_%Y-%m-%d_%H-%M-%S")
        self._run_name = state.run_name
        logging.getLogger("ffcv_ops").addHandler(self._library_notes)
        if not self.is_main:
            return
        path = self.folder / f"{state.run_name}.log"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open_text(path, lambda error: self._note_unwritten(path, unwritten(path, error)))
        except OSError as error:
            raise SaveError(unwritten(path, error)) from error
        for text in self._unwritten:
            print(text, file=self._file, flush=True)
        self._unwritten.clear()
        if earlier is not None and earlier.is_dir() and not earlier.samefile(self.folder):
            self._copy_records(earlier, state)
        self._records = [record for record in self._read_records() if record["epoch"] < state.epoch]
        self._write_records(self.records())
        replace_text(self.folder / f"{state.run_name}.recipe.json", json.dumps(provenance, indent=1) + "\n")
        self._wandb = start_wandb(state, provenance, self.folder, self.print, self._records)

    def _copy_records(self, earlier: Path, state: TrainState) -> None:
        """Copy what another folder holds of the run's finished epochs, so that report and W&B have all of them."""
        try:
            for name in (f"{state.run_name}.jsonl", f"{state.run_name}.predictions.npz"):
                if (earlier / name).is_file():
                    with replacing(self.folder / name) as temporary:
                        shutil.copyfile(earlier / name, temporary)
            num_parts = 0
            if state.wandb_id and (earlier / "wandb").is_dir():
                num_parts = copy_parts(earlier / "wandb", self.folder / "wandb", state.wandb_id)
        except OSError as error:
            self.print(f"note: the records in {earlier} were not all copied: {error}")
            return
        parts = f", with {num_parts} offline parts of W&B" if num_parts else ""
        self.print(f"note: the records of the resumed run were copied from {earlier}{parts}")

    @property
    def _records_path(self) -> Path:
        return self.folder / f"{self._run_name}.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the run's epochs so far."""
        return list(self._records)

    def _read_records(self) -> list[dict[str, Any]]:
        if not self._records_path.exists():
            return []
        lines, records = self._records_path.read_text(encoding="utf-8", errors="replace").splitlines(), []
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                    records.append(record)
        if num_bad := len(lines) - len(records):
            self.print(f"note: {num_bad} lines of {self._records_path} are no records of epochs, and were left out")
        return records

    def _write_records(self, records: Records) -> None:
        """Write all records so far, also those that an earlier call could not write."""
        try:
            replace_text(self._records_path, "".join(json.dumps(record) + "\n" for record in records))
        except SaveError as error:
            self._note_unwritten(self._records_path, str(error))

    def _note_unwritten(self, path: Path, message: str) -> None:
        """Print once for each file that it could not be written. The run goes on without."""
        if path not in self._failed_files:
            self._failed_files.add(path)
            with tqdm.external_write_mode(file=sys.stdout):
                print(f"note: {message}. The run goes on", flush=True)

    def epoch(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Print and record the metrics of an epoch that has just been finished: a line, a JSONL record, W&B.

        The state is at the start of the next epoch.
        """
        if not self.is_main:
            return
        self.eta.end_pause()
        epoch, resolutions = state.epoch - 1, self.eta.resolutions
        if "step_s" in values:
            left_s = self.eta.remaining_s(epoch, self.eta.steps_per_epoch, values["step_s"])
            values = {**values, "remaining_s": left_s - (self.eta.pause_s or 0.0)}
        expected = compare_with_expected(values, self.expected_accuracy, epoch + 1)
        self.print(epoch_line(values, epoch, len(resolutions), resolutions[epoch], expected))
        self.last = {"epoch": epoch, **values, "resolution": resolutions[epoch]}
        self._records.append({**self.last, "step": state.step, "time": time.time()})
        self._writes.put(partial(self._write_records, self.records()))
        if self._wandb is not None:
            self._wandb.log_epoch({**self.last, "position": state.epoch}, state.step)

    def finish_writes(self) -> None:
        """Wait until all lines and records are in their files."""
        self._writes.finish()

    def draw(self) -> None:
        """Draw the curve of the epochs so far."""
        draw_curve(self.records(), self.folder / f"{self._run_name}.png", self.expected_accuracy)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run and the log file."""
        logging.getLogger("ffcv_ops").removeHandler(self._library_notes)
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None
        self.finish_writes()
        if self._file is not None:
            self._file.close()
            self._file = None


class _LibraryNotes(logging.Handler):
    """Print what the data path logs, such as the compilation of its kernels."""

    def __init__(self, log: RunLog):
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.print(f"note: {record.getMessage()}")


def unwritten(path: Path, error: OSError) -> str:
    """Return that a file could not be written, and why."""
    return f"{path} could not be written ({error.strerror or error})"


def pace_line(resolution: int, epoch_s: float, remaining_s: float) -> str:
    """Return what the first steps of a process mean for the time that its run takes."""
    end = time.strftime("%a %d %b %Y %H:%M", time.localtime(time.time() + remaining_s))
    return (
        f"expected from the first steps, at {resolution} px and without evaluation: {show_duration(epoch_s)} an "
        f"epoch, the end in {show_duration(remaining_s)}, {end}"
    )


def data_wait(values: Mapping[str, float]) -> str:
    """Return the share of the time that training waited for data. From 1 % on, name what it waited for."""
    total = values["data_wait"]
    storage = values.get("data_wait_storage")
    if storage is None or total < _NAMED_DATA_WAIT:
        return f"data wait {total:.1%}"
    return f"data wait {total:.1%} (storage {storage:.1%}, CPU {total - storage:.1%})"


def data_wait_advice(records: Records) -> str:
    """Return what kept training waiting for data in most epochs, with the place of the remedies; "" if little did."""
    records = records[1:] or records  # the first epoch may have waited for the compilation of kernels
    waits, storage = finite_values(records, "data_wait"), finite_values(records, "data_wait_storage")
    if not waits or not storage or median(waits) < _MUCH_DATA_WAIT:
        return ""
    cause, remedy = "the CPU", "more cores or smaller images help"
    if median(storage) > median(waits) / 2:
        cause, remedy = "storage", "a copy of the files on a local disk helps"
    return f"training waited {median(waits):.0%} of its time for data, mostly for {cause}: {remedy}, see docs/TUNING.md"


def epoch_line(values: Mapping[str, float], epoch: int, epochs: int, resolution: int, expected: str) -> str:
    """Return one line on a finished epoch, and its distance from what the recipe expects."""
    line = (
        f"epoch {epoch} ({epoch + 1}/{epochs})  {resolution} px  train loss {values['train/loss']:.4f}  "
        f"top-1 {values['train/acc1']:.2%}"
    )
    if "val/acc1" in values:
        line += f"  val loss {values['val/loss']:.4f}  top-1 {values['val/acc1']:.2%}  top-5 {values['val/acc5']:.2%}"
    if "images_per_s" in values:
        line += f"  {values['images_per_s']:,.0f} images/s  {data_wait(values)}"
    if "gpu_peak_allocated_bytes" in values:
        allocated, reserved = (values[f"gpu_peak_{kind}_bytes"] / 2**30 for kind in ("allocated", "reserved"))
        line += f"  GPU memory {allocated:.1f} GiB ({reserved:.1f} reserved)"
    if values.get("remaining_s"):
        line += f"  {show_duration(values['remaining_s'])} to go"
    return f"{line}  {expected}" if expected else line
