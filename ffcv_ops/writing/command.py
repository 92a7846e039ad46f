"""Settings of the command ``write_beton.py``, and the rules by which they choose paths and classes."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ffcv_ops import machine
from ffcv_ops.beton.layout import manifest_path
from ffcv_ops.errors import UserError
from ffcv_ops.settings import Flags, Settings, setting
from ffcv_ops.settings.fields import Choice, Integer, Number, Switch, Text
from ffcv_ops.sources.hold_out import check_share
from ffcv_ops.sources.kinds import KINDS, OPTIONS, find_kind
from ffcv_ops.sources.remote import is_remote
from ffcv_ops.sources.spec import AUTO, SourceSpec
from ffcv_ops.units import show_bytes, show_class_sizes
from ffcv_ops.writing.encode import encoder_versions
from ffcv_ops.writing.plan import MODES, WriteSettings

ROOT = Path("/fsx/ns1")


@dataclass(frozen=True)
class Write:
    """The file to write, its images, and its settings."""

    split: Literal["train", "val"] | None = setting(Choice("train", "val"))
    """Split to write. The classes of a val folder are numbered as in the train manifest, and may be fewer."""
    source: str | None = setting(Text())
    """Images: a folder with one subfolder for each class, a tar archive, or shards such as "train-{0000..1023}.tar" in
    quotes. Also Parquet files, or a folder of them or of Arrow files, as Hugging Face's datasets writes both. Archives,
    shards and Parquet files may lie on a server: https://HOST/train.tar, s3://BUCKET/FOLDER. None: /fsx/ns1/SPLIT."""
    source_kind: str = setting(Choice(AUTO, *KINDS), default=AUTO)
    """Kind of the source. auto: what is there decides."""
    labels: str | None = setting(Text())
    """Classes of a folder or archive without class folders: a file of lines "name class", ILSVRC2012_devkit_t12.tar.gz
    or LOC_val_solution.csv."""
    class_names: str | None = setting(Text())
    """Names of the classes that shards or tables number, one on each line. None: classes.txt beside the shards, or the
    names in the table, if they exist."""
    image_column: str | None = setting(Text())
    """Extension of the images in shards, or their column in Parquet. None: the only one."""
    label_column: str | None = setting(Text())
    """Extension, or key of .json, with the class in shards, or the column in Parquet. None: cls, label or class."""
    hold_out: float | None = setting(Number(above=0, below=1))
    """If the source has only images for training, hold this share of each class out. --split val writes the images held
    out, --split train the others. Give both the same share."""
    target: str | None = setting(Text())
    """File to write. None: the path of the source folder with .beton after it, or SPLIT.beton beside archives, and
    beside the folder with --hold_out."""
    train_manifest: str | None = setting(Text())
    """With --split val: manifest whose class numbers the file gets. None: train.beton.json beside the target."""
    mode: str = setting(Choice(*MODES), default="jpg")
    """Storage of the images. jpg: JPEG. raw: pixels. proportion: a share as pixels, the rest as JPEG. smart: pixels up
    to --smart_threshold bytes, JPEG above."""
    max_side: int = setting(Integer(min=0), default=500)
    """Shrink images whose longer side exceeds this (px). 0: keep all sizes."""
    quality: int = setting(Integer(min=1), default=90)
    """JPEG quality, 1 to 100."""
    num_workers: int = setting(Integer(min=-1), default=-1)
    """Processes of this machine that encode or verify. -1: all CPUs."""
    cluster: str | None = setting(Text())
    """Encode or verify on this Dask cluster: tcp://HOST:8786, tls://HOST:8786, or a scheduler file. None: on this
    machine."""
    raw_share: float = setting(Number(min=0, max=1), default=0.5)
    """With --mode proportion: share of the images stored as pixels."""
    smart_threshold: int | None = setting(Integer(min=0))
    """With --mode smart: if an image has more bytes of pixels than this, it is stored as JPEG."""
    subset: int = setting(Integer(min=-1), default=-1)
    """Write only this many images, evenly spaced through the sorted folder. -1: all."""
    seed: int = setting(Integer(min=0), default=0)
    """Seed of the order in which images are stored, and of the random choice of --mode proportion."""
    page_size: int = setting(Integer(min=1), default=1 << 23)
    """Bytes of a page, a power of two from 2097152. Quasi-random order reads one page at a time."""
    max_pixels: int | None = setting(Integer(min=0))
    """If an image has more pixels than this, it is bad. 0: no limit. None: Pillow's limit, 178,956,970."""
    on_error: Literal["stop", "skip"] = setting(Choice("stop", "skip"), default="stop")
    """If an image is bad: stop and write no file, or leave the image out and list it."""
    overwrite: bool = setting(Switch(), default=False)
    """Replace an existing target once the new file is complete."""
    verify: str | None = setting(Text())
    """Check this .beton file instead of writing one."""
    inspect: str | None = setting(Text())
    """Describe this .beton file instead of writing one."""
    sheet: str | None = setting(Text())
    """With --inspect: draw images of the file and histograms of their sizes into this PNG file."""

    @property
    def settings(self) -> WriteSettings:
        """Return the settings that the content of the file depends on."""
        return WriteSettings(**{field.name: getattr(self, field.name) for field in fields(WriteSettings)})


@dataclass(frozen=True, kw_only=True)
class WriteBeton(Settings):
    """The settings of ``write_beton.py``."""

    write: Write


FLAGS: Flags = {field.name: f"write.{field.name}" for field in fields(Write)} | {"overwrite": ("write.overwrite", "1")}


def choose_source(chosen: Write) -> tuple[SourceSpec, Path]:
    """Return the source to read and the file to write. Raise UserError if there is nothing that can be read."""
    if chosen.source:
        address = chosen.source
    elif chosen.split:
        address = str(ROOT / ("train" if chosen.hold_out else chosen.split))
    else:
        raise UserError("nothing to write: use --split train, --split val, or --source with a folder or archive")
    options = {name: getattr(chosen, name) for name in OPTIONS}
    spec = SourceSpec(address, chosen.source_kind, chosen.split, **options, hold_out=chosen.hold_out)
    if spec.hold_out is not None:
        check_share(spec.hold_out, spec.split)
    spec = replace(spec, kind=find_kind(spec))
    return spec, Path(chosen.target) if chosen.target else _beside(spec)


def _beside(spec: SourceSpec) -> Path:
    """Return the path of a file beside its source."""
    if is_remote(spec.address):
        raise UserError(f"{spec.name}: lies on another machine; name the file to write with --target")
    source, split = Path(os.path.abspath(spec.address)), spec.split
    # The files of several splits may lie in one folder.
    if source.is_dir() and not (split and (spec.hold_out or spec.kind in ("webdataset", "parquet", "arrow"))):
        return source.parent / f"{source.name}.beton"
    if split is None and not source.exists():
        raise UserError(f"{source}: stands for several files; name the file to write with --target, or use --split")
    return source.parent / f"{split or source.name.removesuffix('.tar').removesuffix('.parquet')}.beton"


@contextmanager
def choose_executor(chosen: Write, notice: Callable[[str], None]) -> Iterator[Executor | None]:
    """Yield the executor of the cluster, connected for the time of the block; None for processes of this machine.

    Raises
    ------
    UserError
        If no cluster answers, if a machine of the cluster has other versions, or if `num_workers` is given for a
        cluster. Also under torchrun.
    """
    if machine.world_size() > 1:
        if machine.rank() > 0:
            sys.exit(2)  # rank 0 prints the message
        raise UserError(
            "this command does not run under torchrun; for several machines, start `dask scheduler` and `dask worker`, "
            "and run this command once with --cluster tcp://HOST:8786 (docs/WRITING.md)"
        )
    if not chosen.cluster:
        yield None
        return
    if chosen.num_workers != -1:
        raise UserError("--num_workers counts processes of this machine; with --cluster, use dask worker --nworkers")
    from ffcv_ops.workers.cluster import open_cluster  # here, because few have distributed

    with open_cluster(chosen.cluster, encoder_versions, notice) as executor:
        yield executor


def read_train_classes(chosen: Write, target: Path, notice: Callable[[str], None]) -> list[str] | None:
    """Return the classes of the training split, whose numbers a val file gets.

    For the training split, and without a manifest of it, there are none: the result is None. If images are held out,
    both splits have the classes of the source anyway.

    Raises
    ------
    UserError
        If the manifest cannot be read, or if the one named by the user does not exist.
    """
    if chosen.split != "val":
        return None
    path = _train_manifest(chosen, target)
    if not path.exists() and not chosen.train_manifest:
        if chosen.hold_out is None:
            notice(f"{path}: not there, so the classes are not numbered as in the training split")
        return None
    try:
        return [str(name) for name in json.loads(path.read_bytes())["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a readable manifest; name the training split's with --train_manifest") from None


def _train_manifest(chosen: Write, target: Path) -> Path:
    return Path(chosen.train_manifest) if chosen.train_manifest else manifest_path(target.with_name("train.beton"))


def check_other_split(chosen: Write, target: Path, notice: Callable[[str], None]) -> None:
    """Compare the images that are held out with those of the other split's file, if it has been written.

    Raises
    ------
    UserError
        If another share was held out there, so that an image would be in both files. With `overwrite`, which may
        replace one file after the other, this is a notice.
    """
    if chosen.hold_out is None:
        return
    is_val = chosen.split == "val"
    path = _train_manifest(chosen, target) if is_val else manifest_path(target.with_name("val.beton"))
    try:
        share = json.loads(path.read_bytes())["source"].get("hold_out")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no file of this command
    if share != chosen.hold_out:
        was = f"with --hold_out={share:g}" if share else "without --hold_out"
        fault = f"{path}: was written {was}, so images could be in both files"
        if not chosen.overwrite:
            raise UserError(
                f"{fault}; use the same, write both files with --overwrite, or choose a --target in another folder"
            )
        notice(f"{fault}; write that file again too")


def settings_line(settings: WriteSettings) -> str:
    """Return the settings that take effect as text, such as ``mode jpg, max_side 500``."""
    unused = {"raw_share": settings.mode != "proportion", "smart_threshold": settings.mode != "smart"}
    unused |= {"quality": settings.mode == "raw", "subset": settings.subset == -1}
    unused |= {"max_pixels": settings.max_pixels is None}
    return ", ".join(f"{name} {value}" for name, value in vars(settings).items() if not unused.get(name))


def summary_lines(manifest: dict[str, Any], target: Path, time_s: float) -> list[str]:
    """Return what a file that has just been written holds, and the images that were left out."""
    skipped = manifest["skipped"]
    return [
        *(f"skipped {image['image']}: {image['reason']}" for image in skipped),
        f"{target}: {manifest['num_samples']} images, {show_bytes(manifest['size_bytes'])}, {time_s:.1f} s",
        f"{show_class_sizes(manifest['class_counts'])}; {len(skipped)} images skipped",
        f"{manifest_path(target)}: digest {manifest['digest']}",
    ]


def next_commands(chosen: Write, target: Path, num_classes: int) -> list[str]:
    """Return the commands that are usually next for a file that has just been written.

    The recipe is for ImageNet if the file has as many classes. The file of the other split is named if it is there.
    If images are held out, it comes first.
    """
    path = shlex.quote(str(target))
    lines = [
        f"check  python write_beton.py --verify {path}",
        f"look   python write_beton.py --inspect {path} --sheet {shlex.quote(f'{target.stem}.png')}",
    ]
    if chosen.split:
        recipe = f"rn50_configs/{'single_gpu_100ep' if num_classes == 1000 else 'finetune'}.yaml"
        files = [
            (name, target if name == chosen.split else target.with_name(f"{name}.beton")) for name in ("train", "val")
        ]
        data = [f"--data.{name}_dataset={shlex.quote(str(file))}" for name, file in files if file.exists()]
        for name, file in files:
            if chosen.hold_out and not file.exists():
                which = "held out" if name == "val" else "for training"
                same = f"the same command with --split {name} --target {shlex.quote(str(file))}"
                return [*lines, f"write  {same}, for the images {which}"]
        lines.append(f"train  python train_imagenet.py --config-file {recipe} {' '.join(data)}")
    return lines
