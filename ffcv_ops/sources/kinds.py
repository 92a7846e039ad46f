"""Choose how a source is read: the kinds of sources, and the rule that finds the kind from what is there."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ffcv_ops.errors import UserError
from ffcv_ops.sources.folder import list_classes, scan
from ffcv_ops.sources.source import Source, Stage

AUTO = "auto"


@dataclass(frozen=True)
class SourceSpec:
    """What the user tells about a source.

    Attributes
    ----------
    address : str
        A path, or what else a kind understands.
    kind : str
        A name in `KINDS`, or ``auto``.
    split : str or None
        The split to write, for sources that hold several.
    index : Path or None
        Where an interrupted run may have left its listing (``Source.save_index``).
    """

    address: str
    kind: str = AUTO
    split: str | None = None
    index: Path | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes
    ----------
    what : str
        What the kind is, for messages.
    fits : callable
        Return whether an address is of this kind, from what is there. The first kind that fits is taken.
    open : callable
        List the images. It raises UserError if the source has to be put right.
    """

    what: str
    fits: Callable[[SourceSpec], bool]
    open: Callable[[SourceSpec, Stage], Source]


def _open_folder(spec: SourceSpec, stage: Stage) -> Source:
    root = Path(spec.address)
    if root.is_dir():
        inner = list_classes(root)
        if inner and set(inner) <= {"train", "val", "test"}:
            name = spec.split if spec.split in inner else inner[0]
            raise UserError(f"{root}: holds the splits, not the classes of one; use --source {root / name}")
    return scan(root, stage)


KINDS: dict[str, Kind] = {
    "folder": Kind(
        "folder with a subfolder of images for each class", lambda spec: os.path.isdir(spec.address), _open_folder
    ),
}


def find_kind(spec: SourceSpec) -> str:
    """Return the name of the kind of a source.

    Raises
    ------
    UserError
        If there is nothing at the address, or nothing that is known.
    """
    if spec.kind != AUTO:
        if spec.kind not in KINDS:
            raise UserError(f"source_kind must be {AUTO} or one of {', '.join(KINDS)}, not {spec.kind!r}")
        return spec.kind
    for name, kind in KINDS.items():
        if kind.fits(spec):
            return name
    raise UserError(f"{spec.address}: no such folder; --source names the one with a subfolder of images for each class")


def open_source(spec: SourceSpec, stage: Stage = lambda what, count: None) -> Source:
    """List the images of a source. See `find_kind` and `Kind.open` for what it raises."""
    kind = find_kind(spec)
    return KINDS[kind].open(replace(spec, kind=kind), stage)
