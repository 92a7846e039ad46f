"""The predictions for every image of a validation split: the wrong ones, and the classes that are confused."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffcv_ops.files import replacing


@dataclass(frozen=True)
class ClassResult:
    """The result for one class: its images, and the share of them with a correct prediction.

    ``confused_with`` is the class that is most often predicted instead, for ``num_confused`` images. If no image has a
    wrong prediction, it is the class itself, for 0 images.
    """

    label: int
    num_images: int
    accuracy: float
    confused_with: int
    num_confused: int

    @property
    def num_wrong(self) -> int:
        return self.num_images - round(self.accuracy * self.num_images)


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions for N images, in the order of their sample ids.

    Attributes
    ----------
    epoch : int
        Epoch of the weights; -1 if the weights are not from an epoch of the run.
    labels, predicted : ndarray of int64, shape (N,)
        Class of each image, and the class with the highest probability.
    loss, confidence : ndarray of float32, shape (N,)
        Cross entropy, and the probability of the predicted class in [0, 1].
    """

    epoch: int
    labels: np.ndarray
    predicted: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray

    def save(self, path: Path) -> None:
        """Write the attributes as a NumPy archive. An earlier archive is replaced whole."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Read predictions that `save` has written."""
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[name] for name in ("labels", "predicted", "loss", "confidence")]
            return cls(int(archive["epoch"]), *arrays)

    def mistakes(self, most: int) -> np.ndarray:
        """Return the sample ids of at most `most` wrong predictions, int64 (M,), with the highest loss first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-np.nan_to_num(self.loss[wrong], nan=np.inf), kind="stable")][:most]

    def mean_class_accuracy(self) -> float:
        """Return the mean of the accuracies of the classes that have images. A rare class counts like a common one."""
        return sum(result.accuracy for result in self.class_results()) / len(self.class_results())

    def worst_classes(self, most: int) -> list[ClassResult]:
        """Return at most `most` classes with a wrong prediction, with the lowest accuracy first."""
        return [result for result in self.class_results() if result.num_wrong][:most]

    def best_classes(self, most: int) -> list[ClassResult]:
        """Return at most `most` classes that `worst_classes` leaves out, with the highest accuracy first."""
        worst = {result.label for result in self.worst_classes(most)}
        return [result for result in reversed(self.class_results()) if result.label not in worst][:most]

    def class_results(self) -> list[ClassResult]:
        """Return the result for each class that has images, with the lowest accuracy first."""
        num_classes = int(max(self.labels.max(), self.predicted.max())) + 1
        totals = np.bincount(self.labels, minlength=num_classes)
        hits = np.bincount(self.labels[self.predicted == self.labels], minlength=num_classes)
        accuracy = hits / np.maximum(totals, 1)
        present = np.flatnonzero(totals)
        return [
            ClassResult(label, int(totals[label]), float(accuracy[label]), *self._most_confused(label))
            for label in present[np.argsort(accuracy[present], kind="stable")].tolist()
        ]

    def _most_confused(self, label: int) -> tuple[int, int]:
        """Return the class that is most often predicted for images of another class, and how often: itself if never."""
        counts = np.bincount(self.predicted[(self.labels == label) & (self.predicted != label)])
        return (int(counts.argmax()), int(counts.max())) if len(counts) else (label, 0)
