"""Write the images of one split as a .beton file, check such a file, or describe one.

    python write_beton.py --split train      # /fsx/ns1/train -> /fsx/ns1/train.beton
    python write_beton.py --split val        # /fsx/ns1/val   -> /fsx/ns1/val.beton
    python write_beton.py --split train --source DATA/train --target FAST_DISK/train.beton
    python write_beton.py --split train --source ILSVRC2012_img_train.tar
    python write_beton.py --split val --source ILSVRC2012_img_val.tar      # with ILSVRC2012_devkit_t12.tar.gz beside it
    python write_beton.py --split train --source "train-{0000..1023}.tar"  # WebDataset shards
    python write_beton.py --split train --source imagenet-1k/data          # Parquet files of Hugging Face's datasets
    python write_beton.py --split train --source s3://BUCKET/train.tar --target train.beton    # or https://, gs://, hf://
    python write_beton.py --source FOLDER_OR_TAR --labels labels.csv       # lines of a name and a class
    python write_beton.py --split train --source FOLDER --hold_out 0.1     # and --split val with the same
    python write_beton.py --verify /fsx/ns1/train.beton
    python write_beton.py --split train --cluster tcp://HOST:8786    # on the workers of a Dask cluster
    python write_beton.py --inspect /fsx/ns1/train.beton --sheet train.png

The source is a folder with one subfolder of images for each class, an archive, shards, or tables. Nothing has to be
unpacked; docs/WRITING.md lists what is read. A manifest, FILE.json, appears beside the file. It holds classes,
counts, settings and digest. If the command is killed, the same command resumes and writes the same bytes. Until the
file is whole, its name ends in .partial. The workers of a cluster read and encode the images, and only this machine
writes. The bytes are those that one machine writes.

--verify reads a whole file, decodes every image and lists the bad ones. --inspect prints settings, classes and sizes,
also for files of stock FFCV. --sheet draws some of the images into a PNG.

Exit status: 0 done, or the verified file is sound; 1 stopped under way, or the verified file is damaged; 2 something to
put right first; 130 Ctrl-C; 143 SIGTERM; 129 SIGHUP (a closed terminal); 141 the reader of the output is gone.
"""

import shutil
import signal
import sys
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import NoReturn

from ffcv_ops import machine
from ffcv_ops.beton.describe import describe, histogram_lines, lines
from ffcv_ops.beton.verify import verify
from ffcv_ops.console import call_if_reader_is_gone, protect_output
from ffcv_ops.errors import UserError, exit_with_user_error
from ffcv_ops.files import check_output
from ffcv_ops.progress import Progress, print_line
from ffcv_ops.settings import ShippedFiles, read_settings
from ffcv_ops.workers.processes import choose_num_workers
from ffcv_ops.workers.tasks import NoWorkers, WorkerKilled
from ffcv_ops.workers.versions import OtherMachine
from ffcv_ops.writing.command import (
    FLAGS,
    Write,
    WriteBeton,
    check_other_split,
    choose_executor,
    choose_source,
    next_commands,
    read_train_classes,
    settings_line,
    summary_lines,
)
from ffcv_ops.writing.writer import WriteError, write

RECIPES = ShippedFiles(Path(__file__).resolve().parent, "*_configs/*.yaml")
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which launchers and schedulers send, or SIGHUP of a closed terminal. It ends a run as Ctrl-C does.

    SIGPIPE stands for a reader of the output that is gone.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = signal.Signals(number)


def terminate(number: int, frame: object = None) -> NoReturn:
    """Raise Terminated for the first signal."""
    ignore_signals()
    raise Terminated(number)


def ignore_signals() -> None:
    call_if_reader_is_gone(None)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    protect_output()
    arguments = sys.argv[1:] if argv is None else argv
    chosen = read_settings(WriteBeton, arguments, flags=FLAGS, description=__doc__ or "", shipped=RECIPES).write
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, terminate)
    writes = not (chosen.verify or chosen.inspect)
    if writes and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        call_if_reader_is_gone(lambda: terminate(signal.SIGPIPE))
    progress = Progress()
    try:
        return run(chosen, progress)
    except UserError as error:
        progress.close()
        exit_with_user_error(error)
    except (WriteError, WorkerKilled, NoWorkers, OSError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        progress.close()
        number = stop.number if isinstance(stop, Terminated) else signal.SIGINT
        if machine.rank() == 0:
            names = {signal.SIGINT: "by Ctrl-C", signal.SIGPIPE: "since the reader of the output is gone"}
            resume = "; the same command goes on from what is on disk" if writes else ""
            print(f"stopped {names.get(number, f'by {number.name}')}{resume}", file=sys.stderr)
        return 128 + number
    finally:
        ignore_signals()  # the process ends now, and a signal would print a traceback


def run(chosen: Write, progress: Progress) -> int:
    """Inspect, verify or write a file, as the settings tell, and return the exit status."""
    named = [f"--{name}" for name in ("verify", "inspect", "split", "source") if getattr(chosen, name)]
    if named[1:] and named != ["--split", "--source"]:
        raise UserError(f"{named[0]} and {named[1]} are two commands: pass one of them")
    if chosen.sheet and not chosen.inspect:
        raise UserError(f"--sheet {chosen.sheet}: --sheet needs --inspect FILE, whose images it draws")
    if chosen.inspect:
        return run_inspect(Path(chosen.inspect), Path(chosen.sheet) if chosen.sheet else None)
    choose_num_workers(chosen.num_workers)
    with choose_executor(chosen, print_line) as executor:
        if chosen.verify:
            return run_verify(Path(chosen.verify), chosen.num_workers, executor, progress)
        return run_write(chosen, executor, progress)


def run_write(chosen: Write, executor: Executor | None, progress: Progress) -> int:
    """Write one split and print a summary of the file."""
    source, target = choose_source(chosen)
    check_other_split(chosen, target, print_line)
    settings = chosen.settings
    for name, value in (("source", source.name), ("target", target), ("settings", settings_line(settings))):
        print_line(f"{name:<10}{value}")
    start_s = time.monotonic()
    manifest = write(
        source,
        target,
        settings,
        num_workers=chosen.num_workers,
        on_error=chosen.on_error,
        overwrite=chosen.overwrite,
        classes=read_train_classes(chosen, target, print_line),
        executor=executor,
        notice=print_line,
        progress=progress,
        stage=progress.show_stage,
    )
    progress.close()
    commands = next_commands(chosen, target, len(manifest["classes"]))
    summary = summary_lines(manifest, target, time.monotonic() - start_s)
    print_line("\n  ".join(["\n".join([*summary, "next"]), *commands]))
    return 0


def run_verify(path: Path, num_workers: int, executor: Executor | None, progress: Progress) -> int:
    """Check a whole file, print what is wrong with it, and return 1 if anything is."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    start_s = time.monotonic()
    try:
        report = verify(path, num_workers=num_workers, executor=executor, progress=progress)
    except OtherMachine:
        raise
    except UserError as error:
        print(f"damaged: {error}", file=sys.stderr)
        return 1
    progress.close()
    print_line("\n".join(report.lines(time.monotonic() - start_s)))
    if report.sound:
        print_line("sound")
        return 0
    print("\n".join(report.damage_lines()), file=sys.stderr)
    return 1


def run_inspect(path: Path, sheet: Path | None) -> int:
    """Describe a file, and draw some of its images into a PNG if the user wants a sheet."""
    if sheet is not None:
        try:
            check_output(sheet, "PNG")
        except UserError as error:
            raise UserError(f"--sheet {sheet}: {error}") from error
    found = describe(path)
    print_line("\n".join(lines(found)))
    width = min(shutil.get_terminal_size().columns, 100)
    for title, (counts, bounds) in found.histograms().items():
        print_line("\n".join(["", *histogram_lines(title, counts, bounds, width)]))
    if sheet is not None:
        from imagenet_training.data.file_sheet import draw_file_sheet  # imports torch, which no other use needs

        print_line(f"\n{draw_file_sheet(found, sheet)} images: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
