"""The position of a run: everything that changes from step to step, beside the tensors of model and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """The position of a run, as stored with every checkpoint.

    A position is counted in epochs and samples, which mean the same for every batch size and number of processes. The
    plan of a run has the steps that belong to a position; see `imagenet_training.planning.plan.RunPlan.step_at`.

    Attributes
    ----------
    epoch, samples : int
        Epochs finished, and samples of the current epoch that all ranks together have trained on.
    step : int
        Optimizer steps taken, of whatever size. This count only grows, and no schedule reads it.
    best_acc1, best_epoch : float, int
        Best top-1 on the validation split so far, in [0, 1], and its epoch. Both are -1 before the first evaluation.
    totals : list of float
        Sums over all ranks of the current epoch's loss and counts, if a save interrupts the epoch.
    pace : list of float
        The sums behind the current epoch's pace, if a save interrupts the epoch; see `StepClock.sums`.
    run_name : str
        Stem of the run's log files.
    wandb_id : str
        Id of the W&B run; "" without one.
    numbered_batches : bool
        True for a run that an earlier version began: it seeds a batch by its number over the run.
    step_mode : str
        The mode of the step, which was chosen by the first process of the run; "" before that.
    """

    epoch: int = 0
    samples: int = 0
    step: int = 0
    best_acc1: float = -1.0
    best_epoch: int = -1
    totals: list[float] = field(default_factory=list)
    pace: list[float] = field(default_factory=list)
    run_name: str = ""
    wandb_id: str = ""
    numbered_batches: bool = False
    step_mode: str = ""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "TrainState":
        """Return the position of a checkpoint. Format 1 counts an epoch's samples in batches of one rank."""
        state = dict(content["state"])
        if content["format"] == 1:
            samples_per_batch = content["global_batch_size"] // content["recipe"]["training"]["accumulation"]
            state.update(samples=state.pop("batch") * samples_per_batch, numbered_batches=True)
        return cls(**state)

    def finish_epoch(self, values: Mapping[str, float]) -> None:
        """Move to the start of the next epoch. Note the metrics of an evaluation, if any, if they are the best."""
        if values.get("val/acc1", -1.0) > self.best_acc1:
            self.best_acc1, self.best_epoch = values["val/acc1"], self.epoch
        self.epoch, self.samples, self.totals, self.pace = self.epoch + 1, 0, [], []

    def forget_best(self) -> None:
        """Forget the best result, which cannot be compared with later ones."""
        self.best_acc1, self.best_epoch = -1.0, -1

    def __str__(self) -> str:
        place = f", after {self.samples:,} of its images" if self.samples else ""
        return f"epoch {self.epoch}{place} ({self.step:,} steps taken)"
