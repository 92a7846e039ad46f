"""The description of a source, as a user gives it."""

from dataclasses import dataclass
from pathlib import Path

from ffcv_ops.sources.remote import public_name

AUTO = "auto"


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user describes it."""

    address: str  # a path, a pattern, or a URL that fsspec knows
    kind: str = AUTO  # a name in `KINDS`, or ``auto``
    split: str | None = None  # the split to write, for sources that hold several
    labels: str | None = None  # a file with the class of each image, for images without class folders
    class_names: str | None = None  # a file with the names of the classes, for sources that number classes
    # The parts with the image and with the class, of samples with several parts: columns of tables, extensions of
    # shards, or a key of their JSON.
    image_column: str | None = None
    label_column: str | None = None
    hold_out: float | None = None  # the share of each class that is for validation, if all images are for training
    index: Path | None = None  # where an interrupted run may have left its listing (``Source.save_index``)

    @property
    def name(self) -> str:
        """Return the address for messages. A URL may hold secrets, which are left out."""
        return public_name(self.address)
