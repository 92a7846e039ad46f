"""What a model made of every image of a validation split: which it got wrong, and which classes it takes for others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffcv_ops.files import replacing


@dataclass(frozen=True)
class ClassResult:
    """How one class fared: images of it, the share of them recognised, what the others were most often taken for.

    ``confused_with`` is -1 where all were recognised.
    """

    label: int
    num_images: int
    accuracy: float
    confused_with: int
    num_confused: int


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions for N images, in the order of their sample ids.

    Attributes
    ----------
    epoch : int
        Of the weights; -1 where they are of no epoch of the run.
    labels, predicted : ndarray of int64, shape (N,)
        Class of each image, and the likeliest one.
    loss, confidence : ndarray of float32, shape (N,)
        Cross entropy, and the probability of the predicted class.
    """

    epoch: int
    labels: np.ndarray
    predicted: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray

    def save(self, path: Path) -> None:
        """Write them as a NumPy archive of the attributes, which appears whole or not at all."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Read what `save` has written."""
        with np.load(path, allow_pickle=False) as content:
            return cls(
                int(content["epoch"]), *(content[name] for name in ("labels", "predicted", "loss", "confidence"))
            )

    def mistakes(self, most: int) -> np.ndarray:
        """Sample ids of the wrong predictions with the highest loss, worst first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-np.nan_to_num(self.loss[wrong], nan=np.inf), kind="stable")][:most]

    def worst_classes(self, most: int) -> list[ClassResult]:
        """The classes with the lowest accuracy that have images, worst first; those without a mistake are left out."""
        num_classes = int(max(self.labels.max(), self.predicted.max())) + 1
        totals = np.bincount(self.labels, minlength=num_classes)
        hits = np.bincount(self.labels[self.predicted == self.labels], minlength=num_classes)
        accuracy = hits / np.maximum(totals, 1)
        with_mistakes = np.flatnonzero(hits < totals)
        return [
            ClassResult(label, int(totals[label]), float(accuracy[label]), *self._most_confused(label))
            for label in with_mistakes[np.argsort(accuracy[with_mistakes], kind="stable")][:most].tolist()
        ]

    def _most_confused(self, label: int) -> tuple[int, int]:
        taken_for = np.bincount(self.predicted[(self.labels == label) & (self.predicted != label)])
        return int(taken_for.argmax()), int(taken_for.max())
