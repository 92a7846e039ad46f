"""Write one split of an image folder as a .beton file, check such a file, or tell what is in one.

    python write_beton.py --split train      # /fsx/ns1/train -> /fsx/ns1/train.beton
    python write_beton.py --split val        # /fsx/ns1/val   -> /fsx/ns1/val.beton
    python write_beton.py --split train --source DATA/train --target FAST_DISK/train.beton
    python write_beton.py --verify /fsx/ns1/train.beton
    torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HEAD:29500 write_beton.py --split train    # on each of 4
    python write_beton.py --inspect /fsx/ns1/train.beton --sheet train.png

The folder has one subfolder of images a class. Beside the file appears its manifest, FILE.json: classes, counts,
settings, digest. Killed at any moment, the same command goes on where it was and makes the same bytes; until the file
is whole, its name ends in .partial. --verify reads a file whole, decodes every image and lists the bad ones. Under
torchrun the machines share the work, and make the same bytes as one. --inspect prints settings, classes and sizes, of
files of stock FFCV too; --sheet draws some of its images into a PNG.

Exit status: 0 done, or the verified file is sound; 1 stopped under way, or the verified file is damaged; 2 something to
put right first; 130 Ctrl-C; 143 SIGTERM.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NoReturn

from tqdm import tqdm

from ffcv_ops import machine
from ffcv_ops.beton.describe import describe, histogram_lines, lines
from ffcv_ops.beton.layout import manifest_path
from ffcv_ops.beton.verify import verify
from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.settings import Settings, ShippedFiles, read_settings, setting
from ffcv_ops.settings.fields import Choice, Integer, Number, Switch, Text
from ffcv_ops.units import show_bytes
from ffcv_ops.workers import ranks
from ffcv_ops.workers.processes import WorkerKilled, choose_num_workers
from ffcv_ops.writing.encode import encoder_versions
from ffcv_ops.writing.plan import MODES, BadImage, WriteSettings
from ffcv_ops.writing.writer import WriteError, write

ROOT = Path("/fsx/ns1")
RECIPES = ShippedFiles(Path(__file__).resolve().parent, "*_configs/*.yaml")
PLAIN_PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True)
class Write:
    """What to write, from which images, and how."""

    split: Literal["train", "val"] | None = setting(Choice("train", "val"))
    """Split to write. A val folder must have the classes of the train manifest."""
    source: str | None = setting(Text())
    """Folder with one subfolder of images for each class. None: /fsx/ns1/SPLIT."""
    target: str | None = setting(Text())
    """File to write. None: the path of the source folder with .beton after it."""
    train_manifest: str | None = setting(Text())
    """With --split val: manifest whose classes the folder must have. None: train.beton.json beside the target."""
    mode: str = setting(Choice(*MODES), default="jpg")
    """Storage of the images. jpg: JPEG. raw: pixels. proportion: a share as pixels, the rest as JPEG. smart: pixels up
    to --smart_threshold bytes, JPEG above."""
    max_side: int = setting(Integer(min=0), default=500)
    """Shrink images whose longer side exceeds this (px). 0: keep all sizes."""
    quality: int = setting(Integer(min=1), default=90)
    """JPEG quality, 1 to 100."""
    num_workers: int = setting(Integer(min=-1), default=-1)
    """Processes of each rank that encode or verify. -1: all CPUs."""
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


@dataclass(frozen=True, kw_only=True)
class WriteBeton(Settings):
    """The settings of this script."""

    write: Write


FLAGS: dict[str, str | tuple[str, str]] = {field.name: f"write.{field.name}" for field in fields(Write)}
FLAGS["overwrite"] = "write.overwrite", "1"


class Progress:
    """Images done, images/s and the time left: a bar on a terminal, a line now and then where output is piped."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._start_s = self._last_s = time.monotonic()
        self._first = 0

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._start_s = self._last_s = time.monotonic()
            self._first = done
            self._bar = tqdm(
                total=total, initial=done, unit=" images", disable=not sys.stderr.isatty(), dynamic_ncols=True
            )
        self._bar.update(done - self._bar.n)
        now_s = time.monotonic()
        if self._bar.disable and (now_s - self._last_s > PLAIN_PROGRESS_EVERY_S):
            self._last_s = now_s
            rate = max(done - self._first, 1) / (now_s - self._start_s)
            print(f"{done} / {total} images, {rate:.0f} images/s, {(total - done) / rate:.0f} s left", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which launchers and schedulers send, ends a run as Ctrl-C does."""


def terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    chosen = read_settings(WriteBeton, argv, flags=FLAGS, description=__doc__ or "", shipped=RECIPES).write
    signal.signal(signal.SIGTERM, terminate)
    progress = Progress()
    try:
        if chosen.sheet and not chosen.inspect:
            raise ValueError(f"--sheet {chosen.sheet}: --sheet needs --inspect FILE, whose images it draws")
        if chosen.inspect:
            return run_inspect(chosen)
        num_workers = choose_num_workers(chosen.num_workers)
        if machine.rank() > 0:
            return ranks.lend_workers(num_workers, encoder_versions)
        with ranks.lead(encoder_versions) as leader:
            return (run_verify if chosen.verify else run_write)(chosen, leader, progress)
    except (ValueError, BadImage, ImportError) as error:
        progress.close()
        exit_with_user_error(UserError(str(error)))
    except (WriteError, WorkerKilled, OSError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        progress.close()
        name, status = ("SIGTERM", 143) if isinstance(stop, Terminated) else ("Ctrl-C", 130)
        if machine.rank() == 0:
            writes = not (chosen.verify or chosen.inspect)
            goes_on = "; the same command goes on from what is on disk" if writes else ""
            print(f"stopped by {name}{goes_on}", file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process ends anyway, and without a traceback


def run_write(chosen: Write, leader: ranks.Leader | None, progress: Progress) -> int:
    """Write one split and sum up what was made."""
    source, target = paths(chosen)
    settings = WriteSettings(**{field.name: getattr(chosen, field.name) for field in fields(WriteSettings)})
    for name, value in (("source", source), ("target", target), ("settings", show_settings(settings))):
        notice(f"{name:<10}{value}")
    start_s = time.monotonic()
    manifest = write(
        source,
        target,
        settings,
        num_workers=chosen.num_workers,
        on_error=chosen.on_error,
        overwrite=chosen.overwrite,
        classes=train_classes(chosen, target),
        leader=leader,
        notice=notice,
        progress=progress,
    )
    progress.close()
    elapsed_s = time.monotonic() - start_s
    for skipped in manifest["skipped"]:
        notice(f"skipped {skipped['image']}: {skipped['reason']}")
    counts = manifest["class_counts"]
    notice(f"{target}: {manifest['num_samples']} images, {show_bytes(manifest['size_bytes'])}, {elapsed_s:.1f} s")
    notice(f"{len(counts)} classes of {min(counts)} to {max(counts)} images; {len(manifest['skipped'])} images skipped")
    notice(f"{manifest_path(target)}: digest {manifest['digest']}")
    say_next(target, chosen.split)
    return 0


def show_settings(settings: WriteSettings) -> str:
    """Return the settings that take effect, as text."""
    unused = {"raw_share": settings.mode != "proportion", "smart_threshold": settings.mode != "smart"}
    unused |= {"quality": settings.mode == "raw", "subset": settings.subset == -1}
    return ", ".join(f"{name} {value}" for name, value in vars(settings).items() if not unused.get(name))


def say_next(target: Path, split: str | None) -> None:
    """Say what is usually done with a file that has just been written."""
    path = shlex.quote(str(target))
    notice("next")
    notice(f"  check  python write_beton.py --verify {path}")
    notice(f"  look   python write_beton.py --inspect {path} --sheet {shlex.quote(f'{target.stem}.png')}")
    if split:
        recipe = "rn50_configs/single_gpu_100ep.yaml"
        notice(f"  train  python train_imagenet.py --config-file {recipe} --data.{split}_dataset={path}")


def paths(chosen: Write) -> tuple[Path, Path]:
    """Where to read from and write to, by the rules of ``--help``."""
    if chosen.source:
        source = Path(chosen.source)
    elif chosen.split:
        source = ROOT / chosen.split
    else:
        raise ValueError("say what to write: --split train, --split val, or --source FOLDER")
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; --source names the one with a subfolder of images for each class")
    absolute = Path(os.path.abspath(source))
    target = Path(chosen.target) if chosen.target else absolute.parent / f"{absolute.name}.beton"
    inner = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
    if inner and set(inner) <= {"train", "val", "test"}:
        name = chosen.split if chosen.split in inner else inner[0]
        raise ValueError(f"{source}: holds the splits, not the classes of one; use --source {source / name}")
    return source, target


def train_classes(chosen: Write, target: Path) -> list[str] | None:
    """Return the classes of the training split, or None if there is nothing to compare them with."""
    if chosen.split != "val":
        return None
    path = Path(chosen.train_manifest) if chosen.train_manifest else manifest_path(target.with_name("train.beton"))
    if not path.exists() and not chosen.train_manifest:
        notice(f"{path}: not there, so the classes are not compared with the training split's")
        return None
    try:
        return [str(name) for name in json.loads(path.read_bytes())["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a readable manifest; name the training split's with --train_manifest") from None


def run_verify(chosen: Write, leader: ranks.Leader | None, progress: Progress) -> int:
    """Check a file whole and say what is wrong with it."""
    path = Path(str(chosen.verify))
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    start_s = time.monotonic()
    try:
        report = verify(path, num_workers=chosen.num_workers, leader=leader, progress=progress)
    except ValueError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 1
    progress.close()
    rate = report.beton.num_samples / (time.monotonic() - start_s)
    counts = report.class_counts.values()
    notice(f"{path}: {report.beton.num_samples} images, {show_bytes(report.beton.size_bytes)}, {rate:.0f} images/s")
    if counts:
        notice(f"{len(counts)} classes of {min(counts)} to {max(counts)} images")
    notice(f"digest {report.digest}" + ("" if report.beton.manifest else "; there is no manifest to compare it with"))
    for problem in report.problems:
        print(f"damaged: {problem}", file=sys.stderr)
    for sample, reason in sorted(report.bad.items()):
        print(f"damaged: sample {sample}: {reason}", file=sys.stderr)
    if not report.sound:
        print(f"{path}: {len(report.bad)} bad samples, {len(report.problems)} other problems", file=sys.stderr)
        return 1
    notice("sound")
    return 0


def run_inspect(chosen: Write) -> int:
    """Say what is in a file, and draw some of it where a sheet was asked for."""
    sheet = Path(chosen.sheet) if chosen.sheet else None
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise ValueError(f"--sheet {sheet}: there is no folder {sheet.parent}")
    found = describe(str(chosen.inspect))
    for line in lines(found):
        notice(line)
    width = min(shutil.get_terminal_size().columns, 100)
    for what, (counts, bounds) in found.histograms().items():
        notice("\n".join(["", *histogram_lines(what, counts, bounds, width)]))
    if sheet is not None:
        from imagenet_training.file_sheet import draw_file_sheet  # imports torch, which no other use needs

        notice(f"\n{draw_file_sheet(found, sheet)} images: {sheet}")
    return 0


def notice(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)  # names of files need not be text
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
