"""What a run tells: console, log file, a JSONL record of every epoch, a curve, Weights & Biases."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tqdm import tqdm

from ffcv_ops.files import replace_text
from imagenet_training.charts import draw_curve
from imagenet_training.metrics import ExpectedAccuracy

if TYPE_CHECKING:  # so that reading a run's record does not need torch
    from imagenet_training.checkpoint import TrainState

Batch = TypeVar("Batch")


class RunLog:
    """The one place that speaks for a run; silent on every rank but 0.

    On a terminal, bars stand for the lines on where an epoch is; those lines are printed where the output is piped,
    and kept in the log file either way.

    Parameters
    ----------
    folder : Path
        Holds ``<run>.log`` as the console shows it, ``<run>.jsonl``, ``<run>.png``; made by `open`.
    is_main : bool
        Whether this is rank 0.
    courses : dict of str to dict of int to float, optional
        Accuracies to compare with, in percent by epochs finished: for ``train/acc1``, ``val/acc1``, ``val/acc5``.
    """

    def __init__(self, folder: Path, is_main: bool, courses: ExpectedAccuracy | None = None):
        self.folder = folder
        self.is_main = is_main
        self.courses = courses or {}
        self._file: TextIO | None = None
        self._run_name = ""
        self._wandb: Any = None
        self._unwritten: list[str] = []
        self._bar: tqdm | None = None
        self._said_once = False
        self.last: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line on rank 0, and keep it for the log file."""
        if not self.is_main:
            return
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
        self._keep(text)

    def say_once(self, text: str) -> None:
        """Print a line unless an earlier call has printed its own."""
        if not self._said_once:
            self._said_once = True
            self.say(text)

    def track(self, batches: Iterable[Batch], what: str, *, total: int, done: int = 0) -> Iterator[Batch]:
        """The batches as they are; on a terminal with a bar that counts them.

        Parameters
        ----------
        batches : iterable
        what : str
            Stands before the bar.
        total, done : int
            Batches in all, and those that were done earlier.
        """
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

    def progress(self, line: str, brief: str) -> None:
        """A passing line: kept for the log file, and printed unless a bar shows `brief` on a terminal."""
        if self._bar is None or not sys.stdout.isatty():
            self.say(line)
            return
        self._bar.set_postfix_str(brief)
        self._keep(line)

    def _keep(self, text: str) -> None:
        if self._file is None:
            self._unwritten.append(text)
        else:
            print(text, file=self._file, flush=True)

    def open(self, state: "TrainState", facts: dict[str, Any], wandb_settings: dict[str, Any]) -> None:
        """Begin the run's files, or go on with those of a resumed run; names them in ``state``.

        Records of epochs that the resumed run does again are dropped, so that each epoch stands once.
        """
        state.run_name = state.run_name or time.strftime("train_%Y-%m-%d_%H-%M-%S")
        self._run_name = state.run_name
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / f"{state.run_name}.log", "a", encoding="utf-8")
        for text in self._unwritten:
            print(text, file=self._file, flush=True)
        self._unwritten.clear()
        self._write_records([record for record in self.records() if record["epoch"] < state.epoch])
        replace_text(self.folder / f"{state.run_name}.recipe.json", json.dumps(facts, indent=1) + "\n")
        self._wandb = self._start_wandb(state, facts, **wandb_settings)

    @property
    def _records_path(self) -> Path:
        return self.folder / f"{self._run_name}.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """The records of the run's epochs so far."""
        if not self._records_path.exists():
            return []
        return [json.loads(line) for line in self._records_path.read_text(encoding="utf-8").splitlines()]

    def _write_records(self, records: list[dict[str, Any]]) -> None:
        replace_text(self._records_path, "".join(json.dumps(record) + "\n" for record in records))

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Send metrics of one step to W&B."""
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def epoch(self, values: dict[str, float], step: int) -> None:
        """Record a finished epoch: a JSONL line, W&B."""
        if not self.is_main:
            return
        self.last = values
        self._write_records([*self.records(), {**values, "step": step, "time": time.time()}])
        self.metrics(values, step)

    def draw(self) -> None:
        """Draw the curve of the epochs so far."""
        draw_curve(self.records(), self.folder / f"{self._run_name}.png", self.courses)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run and the log file."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
            self._wandb = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start_wandb(
        self, state: "TrainState", facts: dict[str, Any], *, enable: bool, project: str, name: str | None
    ) -> Any:
        if not enable:
            return None
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not has_wandb_key():
            mode = "offline"
            self.say(
                "W&B: no API key found, so this run is recorded offline. `bash launch/setup_wandb.sh` stores a key; "
                "`wandb sync` uploads the run; --no_wandb records nothing."
            )
        settings: dict[str, Any] = {
            "project": project,
            "name": name or state.run_name,
            "id": state.wandb_id or None,
            "resume": "allow" if state.wandb_id else None,
            "config": facts,
            "dir": str(self.folder),
            "settings": wandb.Settings(silent=True, console="off"),
        }
        try:
            run = wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
        except wandb.errors.Error as error:
            self.say(f"W&B: {error}. This run is recorded offline.")
            run = wandb.init(mode="offline", **settings)
        state.wandb_id = run.id
        return run


def has_wandb_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or kept by `wandb login`."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
