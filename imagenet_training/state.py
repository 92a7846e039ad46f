"""The position of a run: everything that changes from step to step, beside the tensors of model and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """The position of a run, as stored with every checkpoint.

    Attributes
    ----------
    epoch, batch, step : int
        Epochs finished, batches of the current epoch taken by each rank, optimizer steps taken.
    best_acc1, best_epoch : float, int
        Best top-1 on the validation split so far, in [0, 1], and its epoch. Both are -1 before the first evaluation.
    totals : list of float
        Sums over all ranks of the current epoch's loss and counts, if a save interrupts the epoch.
    run_name : str
        Stem of the run's log files.
    wandb_id : str
        Id of the W&B run; "" without one.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_acc1: float = -1.0
    best_epoch: int = -1
    totals: list[float] = field(default_factory=list)
    run_name: str = ""
    wandb_id: str = ""

    def finish_epoch(self, values: Mapping[str, float]) -> None:
        """Note the result of the epoch if it is the best so far, and move to the start of the next epoch.

        Parameters
        ----------
        values : mapping
            Metrics of the evaluation, with ``val/acc1``; empty if there was none.
        """
        if values.get("val/acc1", -1.0) > self.best_acc1:
            self.best_acc1, self.best_epoch = values["val/acc1"], self.epoch
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, []

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.batch} (step {self.step})"
