"""The records of epochs: names of metrics, the best epoch, the distance from the accuracies of a recipe's source.

Metrics are computed in `imagenet_training.training.meters`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METRICS = {"loss": "loss", "acc1": "top-1", "acc5": "top-5"}
# Accuracies in percent by epochs finished, for "train/acc1", "val/acc1" and "val/acc5".
ExpectedAccuracy = dict[str, dict[int, float]]
# One record for each epoch, as in a run's JSONL file.
Records = Sequence[Mapping[str, Any]]


def finite_values(records: Records, metric: str) -> list[float]:
    """Return the values of a metric, without the epochs that do not have a finite one."""
    return [record[metric] for record in records if math.isfinite(record.get(metric, math.nan))]


def best_record(records: Records) -> Mapping[str, Any] | None:
    """Return the record of the epoch with the highest validation top-1; None if no epoch was evaluated."""
    evaluated = [record for record in records if finite_values([record], "val/acc1")]
    return max(evaluated, key=lambda record: record["val/acc1"], default=None)


def compare_with_expected(values: Mapping[str, float], expected_accuracy: ExpectedAccuracy, num_epochs: int) -> str:
    """Return how far accuracies are from the expected ones, in percent points, as text; "" if nothing is expected.

    Between two stated epochs, the expected accuracy lies on the straight line that joins them. Before the first stated
    epoch, the text only names what is expected then. The values are accuracies in [0, 1] by metric, such as
    ``val/acc1``. `num_epochs` epochs are finished.
    """
    parts = []
    for metric, accuracies in expected_accuracy.items():
        split, name = metric.split("/")
        label = f"{split} {METRICS[name]}"
        epochs = list(accuracies)
        if num_epochs < epochs[0]:
            parts.append(f"{label} {accuracies[epochs[0]]:g} % after {epochs[0]} epochs")
        elif num_epochs <= epochs[-1] and metric in values:
            expected = float(np.interp(num_epochs, epochs, list(accuracies.values())))
            parts.append(f"{label} {expected:.1f} % ({100 * values[metric] - expected:+.1f})")
    return f"expected {', '.join(parts)}" if parts else ""
