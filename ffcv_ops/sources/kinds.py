"""Choose how a source is read: the kinds of sources, and the rule that finds the kind from what is there."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ffcv_ops.errors import UserError
from ffcv_ops.sources.addresses import is_pattern
from ffcv_ops.sources.arrow import fits_arrow, open_arrow
from ffcv_ops.sources.folder import holds_folders_only, list_classes, list_flat, scan
from ffcv_ops.sources.hold_out import check_share, hold_out
from ffcv_ops.sources.parquet import fits_parquet, open_parquet
from ffcv_ops.sources.remote import is_remote, public_name
from ffcv_ops.sources.source import Source, Stage
from ffcv_ops.sources.spec import AUTO, SourceSpec
from ffcv_ops.sources.tar import SPLITS, open_tar
from ffcv_ops.sources.webdataset import fits_shards, open_webdataset

_KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")


@dataclass(frozen=True)
class Kind:
    """A kind of source."""

    what: str  # what the kind is, for messages
    options: frozenset[str]  # the fields of `SourceSpec` that the kind uses, besides address, kind and index
    fits: Callable[[SourceSpec], bool]  # whether an address is of this kind; the first kind that fits is taken
    open: Callable[[SourceSpec, Stage], Source]  # lists the images; raises UserError if the source has to be put right


def _check_place(spec: SourceSpec) -> None:
    """Refuse a folder that holds ImageNet as it is distributed: the archives, or Kaggle's folders of both splits."""
    if is_remote(spec.address):
        return
    root, split = Path(spec.address), spec.split or "train"
    archives = sorted(root.glob("ILSVRC2012_img_*.tar"))
    if archives:
        wanted = root / f"ILSVRC2012_img_{split}.tar"
        path = wanted if wanted in archives else archives[0]
        raise UserError(f"{root}: holds archives of ILSVRC, each of one split; use --source {path}")
    for above in _KAGGLE_FOLDERS:
        if (root / above / split).is_dir():
            raise UserError(f"{root}: holds Kaggle's folders of ILSVRC; use --source {root / above / split}")


def _fits_folder(spec: SourceSpec) -> bool:
    if not os.path.isdir(spec.address):
        return False
    has_folders = bool(list_classes(Path(spec.address)))
    return has_folders or not any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in os.listdir(spec.address))


def _open_folder(spec: SourceSpec, stage: Stage) -> Source:
    if is_remote(spec.address):
        raise UserError(
            f"{spec.name}: archives, shards and Parquet files are read from other machines, no folders of images; "
            "mount the folder"
        )
    root = Path(spec.address)
    inner = list_classes(root) if root.is_dir() else []
    if inner and set(inner) <= SPLITS and not spec.labels:
        name = spec.split if spec.split in inner else inner[0]
        raise UserError(f"{root}: holds the splits, not the classes of one; use --source {root / name}")
    if spec.labels or (root.is_dir() and not inner):
        return list_flat(root, spec.labels, stage)
    if len(inner) == 1 and holds_folders_only(root / inner[0]):
        raise UserError(
            f"{root}: holds one folder, {inner[0]}, and that holds folders; --source names the folder right above the "
            f"folders of the classes, perhaps {root / inner[0]}"
        )
    return scan(root, stage)


def _fits_tar(spec: SourceSpec) -> bool:
    return is_remote(spec.address) or os.path.exists(spec.address) or is_pattern(spec.address)


_SAMPLE_OPTIONS = frozenset(["split", "class_names", "image_column", "label_column"])

KINDS: dict[str, Kind] = {
    "parquet": Kind("Parquet files", _SAMPLE_OPTIONS, fits_parquet, open_parquet),
    "arrow": Kind("Arrow files", _SAMPLE_OPTIONS, fits_arrow, open_arrow),
    "folder": Kind("folder of images", frozenset(["split", "labels"]), _fits_folder, _open_folder),
    "webdataset": Kind("WebDataset shards", _SAMPLE_OPTIONS, fits_shards, open_webdataset),
    "tar": Kind("tar archives", frozenset(["split", "labels"]), _fits_tar, open_tar),
}
OPTIONS = ("labels", "class_names", "image_column", "label_column")


def find_kind(spec: SourceSpec) -> str:
    """Return the name of the kind of a source. Raise UserError if none fits, or if an option is of no use for it."""
    if spec.kind != AUTO and spec.kind not in KINDS:
        raise UserError(f"source_kind must be {AUTO} or one of {', '.join(KINDS)}, not {spec.kind!r}")
    if spec.labels and is_remote(spec.labels):
        raise UserError(f"{public_name(spec.labels)}: --labels names a file of this machine; copy the file here")
    kinds = KINDS if spec.kind == AUTO else [spec.kind]
    found = next((name for name in kinds if spec.kind != AUTO or KINDS[name].fits(spec)), None)
    if found is None:
        raise UserError(
            f"{spec.name}: no such folder; --source names the one with a subfolder of images for each class, or "
            "archives"
        )
    unused = [f"--{name}" for name in OPTIONS if getattr(spec, name) is not None and name not in KINDS[found].options]
    if unused:
        what = KINDS[found].what
        raise UserError(f"{spec.name}: is read as {what}, for which {unused[0]} has no use; see --source_kind")
    return found


def open_source(spec: SourceSpec, stage: Stage = lambda what, count: None) -> Source:
    """List the images of a source. See `find_kind` and `Kind.open` for what it raises."""
    kind = find_kind(spec)
    split = spec.split
    if spec.hold_out is not None:
        check_share(spec.hold_out, split)
        spec = replace(spec, split="train")  # if the source has several splits, the images are held out of this one
    _check_place(spec)
    source = KINDS[kind].open(replace(spec, kind=kind), stage)
    return source if spec.hold_out is None else hold_out(source, spec.hold_out, split, stage)
