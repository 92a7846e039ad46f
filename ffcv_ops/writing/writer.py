"""Write the images of a source as one ``.beton`` file.

Workers encode the images, and one process gives each image its place. The bytes are a function of the images, the
settings and the versions of the libraries that encode. The number of workers or machines and the interruptions of a run
do not change them. ``docs/WRITING.md`` describes what is on disk during a run.
"""

import os
import pickle
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.codec import jpeg
from ffcv_ops.codec.shared_tables import choose_tables
from ffcv_ops.errors import UserError
from ffcv_ops.files import publish
from ffcv_ops.lock import OwnerLock
from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.source import Source, SourceChanged, SourceError, Stage, class_difference
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.units import show_bytes, show_names
from ffcv_ops.workers.processes import choose_num_workers, end_if_imported, use_executor
from ffcv_ops.workers.tasks import TASKS_A_WORKER, NoWorkers, WorkerKilled, count_workers, run_in_order
from ffcv_ops.writing.encode import Encoded, EncodeJob, EncodeTask, encoder_versions
from ffcv_ops.writing.manifest import build_manifest, build_tables, change_remarks, complete_manifest, write_manifest
from ffcv_ops.writing.pages import PageLayout
from ffcv_ops.writing.partial_file import PartialFile, index_path, partial_paths, read_journal, remove_partial
from ffcv_ops.writing.plan import BadImage, WritePlan, WriteSettings, build_plan

# The images of a task. On a cluster, a task costs about as much as the encoding of some images.
_CHUNK, _CHUNK_ELSEWHERE = 16, 256
# On a cluster, tasks become smaller, down to so many images, until each worker gets several. Then no worker waits long
# for the last one.
_LEAST_ELSEWHERE, _MIN_TASKS_A_WORKER = 64, 4
_CHUNK_BYTES = 1 << 24
# The most that encoded images which wait for their turn may take of this machine's memory.
_WAITING_BYTES = 1 << 31
_SAMPLE_IMAGES = 64, 256
_SAMPLE_CHUNK, _SAMPLE_CHUNK_ELSEWHERE = 4, 16
# The first images take longer than this if kernels are being compiled, or if the storage is slow.
_QUIET_S = 10.0

Notice = Callable[[str], None]
Progress = Callable[[int, int], None]
Results = Generator[Encoded, None, None]


class WriteError(RuntimeError):
    """An end of a run that is no fault of settings or images: a full disk, a killed worker."""


def write(
    source: str | Path | SourceSpec,
    target: str | Path,
    settings: WriteSettings | None = None,
    *,
    num_workers: int = -1,
    executor: Executor | None = None,
    on_error: str = "stop",
    overwrite: bool = False,
    classes: Sequence[str] | None = None,
    notice: Notice = print,
    progress: Progress = lambda done, total: None,
    stage: Stage = lambda what, count: None,
) -> dict[str, Any]:
    """Write the images of a source as a ``.beton`` file with its manifest, or resume a run that was killed.

    Parameters
    ----------
    source : path or SourceSpec
        The images, such as a folder with one subfolder for each class (see `ffcv_ops.sources.kinds`).
    target : path
        The file to write. ``<target>.partial`` and its journal hold the unfinished work.
    settings : WriteSettings, optional
    num_workers : int
        Processes that encode; -1: as many as CPUs allowed. They are started by a fork server. A script that calls this
        function needs the guard ``if __name__ == "__main__"``. With an `executor`, the number of tasks that it runs at
        a time; -1: as many as it tells (see `ffcv_ops.workers.tasks.count_workers`).
    executor : concurrent.futures.Executor, optional
        Encodes the images, instead of processes of this machine. It may run a task more than once, and on any machine
        that sees the images. It stays open. Only this process writes the file.
    on_error : {"stop", "skip"}
        ``stop``: a bad image ends the run and deletes what was written. ``skip``: the file leaves out the image, and
        the manifest lists it.
    overwrite : bool
        Replace an existing file, once the new one is whole.
    classes : sequence of str, optional
        Class names in the order of their numbers, such as those of the training split's manifest. The source may lack
        some of them, and must not have others.
    notice : callable
        Called with each line that the user should know.
    progress : callable
        Called with the number of images done and the number of all images.
    stage : callable
        Called with the progress before that: what is done, and the number of images so far.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    UserError
        If the source, a setting, the target or the space on the disk has to be put right before the run.
    BadImage
        If an image cannot be decoded, or is larger than a page.
    WriteError
        If the run was stopped under way, by the disk or by a killed worker.
    """
    end_if_imported()
    settings, target = settings or WriteSettings(), Path(target)
    settings.check()
    if on_error not in ("stop", "skip"):
        raise UserError(f"on_error must be stop or skip, not {on_error!r}")
    choose_num_workers(num_workers)
    _check_target(target, overwrite)
    spec = source if isinstance(source, SourceSpec) else SourceSpec(str(source))
    listed = open_source(replace(spec, index=index_path(target)), stage)
    for remark in listed.remarks:
        notice(remark.line())
    if classes is not None:
        listed = _numbered_as(listed, classes, notice)
    identity, pages, _ = read_journal(partial_paths(target)[1])
    plan = build_plan(listed, settings).continuing(identity if pages else None)
    manifest = complete_manifest(plan, target)
    if manifest is not None:
        notice(f"{target} was whole already, its manifest is now too")
        return manifest
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; use --overwrite to replace it")
    partial_path = partial_paths(target)[0]
    conflict = f"{partial_path}: another process is writing this file"
    with OwnerLock(Path(f"{partial_path}.lock"), conflict, "choose another --target", notice):
        return _write(plan, target, executor, num_workers, on_error, notice, progress, stage)


def _check_target(target: Path, overwrite: bool) -> None:
    """Check the target before the source is listed, because a large one takes a while."""
    if target.is_dir():
        raise UserError(f"{target}: is a folder; --target names the file to make")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder to write {target.name} to; make it, or change --target")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{target.parent}: {target.name} cannot be written there; choose another place with --target")
    if target.exists() and not overwrite and not partial_paths(target)[1].exists():
        raise UserError(f"{target}: exists already; use --overwrite to replace it")
    partial, journal = partial_paths(target)
    identity = read_journal(journal)[0] or {}
    for key, own in (("format", beton.MANIFEST_VERSION), ("encoder", jpeg.ENCODER)):
        if isinstance(found := identity.get(key), int) and found > own:
            raise UserError(
                f"{partial}: begun by a newer version ({key} {found}; this version writes {own}); finish it with that "
                f"version, or delete {partial.name} and {journal.name}"
            )


def _numbered_as(source: Source, classes: Sequence[str], notice: Notice) -> Source:
    """Return a source whose class numbers are the positions in `classes`. Some of these classes may have no images."""
    if not set(source.classes) <= set(classes):
        difference = class_difference(classes, source.classes)
        are_numbers = all(name.isdigit() for name in source.classes) and not all(name.isdigit() for name in classes)
        hint = "; it numbers its classes: name them with --class_names FILE" if are_numbers else ""
        raise UserError(f"{source.address}: not the classes of the training split: it {difference}{hint}")
    missing = [name for name in classes if name not in set(source.classes)]
    if missing:
        notice(
            f"{source.address}: has no images of {len(missing)} of the training split's {len(classes)} classes: "
            f"{show_names(missing)}; classes are numbered as in the training split"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in source.classes], np.int32)[source.labels]
    return replace(source, classes=list(classes), labels=labels)


def _write(
    plan: WritePlan,
    target: Path,
    executor: Executor | None,
    num_workers: int,
    on_error: str,
    notice: Notice,
    progress: Progress,
    stage: Stage,
) -> dict[str, Any]:
    if on_error == "stop":
        _check_sizes(plan)
    try:
        partial = PartialFile(target, plan.identity(stage), plan.data_start, plan.settings.page_size)
    except OSError as error:
        raise UserError(f"{target}.partial: cannot be written ({error.strerror})") from error
    try:
        with closing(partial), _start_workers(plan, executor, num_workers) as workers:
            if plan.source.save_index and not index_path(target).exists():
                plan.source.save_index(index_path(target))
            if partial.changed:
                notice(f"starting over: since {partial.path} was begun, {', '.join(partial.changed)} changed")
            layout = PageLayout(plan, partial)
            done = layout.stored.position
            if done:
                notice(f"resuming: {done} of {plan.num_images} images are on disk already")
            with _notice_after(_QUIET_S, notice, "if this is the first start here, the encoder is being compiled"):
                sizes, counts = _measure_sample(plan, workers)
            _check_space(plan, done, target, sizes, notice)
            tables = workers.choose_tables(counts) if plan.encoder != jpeg.ENCODER_OF_OWN_TABLES else None
            _encode_rest(plan, layout, workers, tables, sizes, on_error, progress)
            manifest = _finish(plan, layout, target)
            for remark in change_remarks(plan, layout.stored):
                notice(remark.line())
            return manifest
    except BadImage:
        remove_partial(target)
        raise
    except UserError as error:
        # If storage or a server has failed, the same command goes on, and needs its listing.
        goes_on = isinstance(error, SourceError) and not isinstance(error, SourceChanged)
        if not partial.page_hashes and not goes_on:
            remove_partial(target)
        raise
    except (NoWorkers, BrokenExecutor) as error:
        raise WriteError(f"{error or type(error).__name__}; the same command goes on from {partial.path}") from error
    except (WorkerKilled, MemoryError) as error:
        raise WriteError(
            f"{str(error) or 'out of memory'}; most often memory is short: give the run more, or fewer --num_workers; "
            f"the same command goes on from {partial.path}"
        ) from None
    except OSError as error:
        raise WriteError(
            f"{partial.path}: writing stopped ({error.strerror or error}); fix the cause, then the same command goes "
            "on from there"
        ) from error


@contextmanager
def _notice_after(time_s: float, notice: Notice, text: str) -> Iterator[None]:
    """Print a text if the block takes longer than a time."""
    timer = threading.Timer(time_s, notice, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_sizes(plan: WritePlan) -> None:
    """Raise BadImage for an empty file before the work, because the listing has the sizes."""
    empty = np.sort(plan.order[plan.source.sizes_bytes[plan.order] == 0])
    if len(empty):
        more = f", as are {len(empty) - 1} more" if len(empty) > 1 else ""
        raise plan.bad_image(int(np.flatnonzero(plan.order == empty[0])[0]), f"the file is empty (0 bytes){more}")


@dataclass(frozen=True)
class _Workers:
    """The executor of a run, and what all of its tasks have in common."""

    executor: Executor
    num_workers: int | None
    plan: WritePlan
    job: EncodeJob

    @property
    def are_elsewhere(self) -> bool:
        """Return whether the workers are not processes of this run, but those of an executor of the user."""
        return self.job.versions is not None

    def chunk_size(self, num_images: int, image_bytes: int) -> int:
        """Return the number of images of a task. The bytes of the file do not depend on this number."""
        most = min(_CHUNK_ELSEWHERE if self.are_elsewhere else _CHUNK, _CHUNK_BYTES // image_bytes)
        if self.are_elsewhere:
            num_workers = self.num_workers or count_workers(self.executor)
            share = num_images // (_MIN_TASKS_A_WORKER * num_workers)
            # Enough tasks for all workers may wait in memory.
            share = min(share, _WAITING_BYTES // (TASKS_A_WORKER * num_workers * image_bytes))
            most = min(most, max(share, _LEAST_ELSEWHERE))
        return max(1, most)

    def run(self, job: EncodeJob, chunks: Iterable[np.ndarray], max_waiting: int | None = None) -> Results:
        """Yield the result for each of some chunks of positions in the storage order."""
        tasks = (EncodeTask.of_positions(job, self.plan, chunk) for chunk in chunks)
        return run_in_order(self.executor, tasks, self.num_workers, max_waiting)

    def choose_tables(self, counts: list[np.ndarray]) -> np.ndarray | None:
        """Choose the Huffman tables of the file. A process of this run has the kernels for it, which load for seconds.

        On a cluster, this machine chooses. A machine that joins only now has not been compared with it.
        """
        quality = self.job.settings.quality
        if self.are_elsewhere:
            return choose_tables(counts, quality)
        tables: np.ndarray | None = self.executor.submit(choose_tables, counts, quality).result()
        return tables


@contextmanager
def _start_workers(plan: WritePlan, executor: Executor | None, num_workers: int) -> Iterator[_Workers]:
    """Yield the workers: the executor, or processes of this machine, which end behind the block."""
    # The encoder's kernels are loaded once, before the processes are forked.
    preload = ["ffcv_ops.writing.encode", *([] if plan.settings.mode == "raw" else ["ffcv_ops.codec.encoder"])]
    versions = None if executor is None else encoder_versions(plan.settings.mode != "raw")
    job = EncodeJob(plan.settings, pickle.dumps(plan.source.reader), versions=versions)
    with use_executor(executor, num_workers, preload) as chosen:
        yield _Workers(chosen, None if num_workers == -1 else num_workers, plan, job)


def _measure_sample(plan: WritePlan, workers: _Workers) -> tuple[list[int], list[np.ndarray]]:
    """Return the sizes in bytes of a few images, and the symbols of the JPEGs among them.

    The images are evenly spaced in the storage order. They decide the Huffman tables, and so the bytes of the file.
    Therefore they depend on the plan only.
    """
    count = min(plan.num_images, max(_SAMPLE_IMAGES[0], min(plan.num_images // 50, _SAMPLE_IMAGES[1])))
    positions = np.arange(count) * plan.num_images // count
    chunk = _SAMPLE_CHUNK_ELSEWHERE if workers.are_elsewhere else _SAMPLE_CHUNK
    chunks = np.array_split(positions, -(-count // chunk))
    sizes: list[int] = []
    counts: list[np.ndarray] = []
    for encoded in workers.run(replace(workers.job, is_sample=True), chunks):
        sizes += [entry[3] for entry in encoded.entries if not isinstance(entry, str)]
        counts += encoded.counts
    return sizes, counts


def _check_space(plan: WritePlan, done: int, target: Path, sizes: list[int], notice: Notice) -> None:
    """Estimate the size of the file from the sizes of a few images, and compare it with the space on the disk."""
    if not sizes:
        return
    image_bytes = float(np.mean(sizes))
    pages = plan.num_images * image_bytes / max(image_bytes, plan.settings.page_size - image_bytes / 2)
    total_bytes = plan.data_start + np.ceil(pages) * plan.settings.page_size
    notice(f"{plan.num_images} images of about {image_bytes / 1e3:.1f} kB: about {show_bytes(total_bytes)}")
    needed = total_bytes * (1 - done / plan.num_images)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(
            f"{target.parent}: {show_bytes(free)} free, about {show_bytes(needed)} needed; make room, change --target, "
            "or write less (--max_side, --quality, --raw_share)"
        )


def _encode_rest(
    plan: WritePlan,
    layout: PageLayout,
    workers: _Workers,
    tables: np.ndarray | None,
    sizes: list[int],
    on_error: str,
    progress: Progress,
) -> None:
    """Encode the images that are not in the file yet, anywhere and in any order, and write them in their order.

    `sizes` are those of a few images in bytes. They bound what waits in memory.
    """
    stored = layout.stored
    if on_error == "stop" and stored.reasons:
        raise plan.bad_image(*next(iter(stored.reasons.items())))
    image_bytes = max(1, int(np.mean(sizes or [1])))
    chunk = workers.chunk_size(plan.num_images - stored.position, image_bytes)
    starts = range(stored.position, plan.num_images, chunk)
    chunks = (np.arange(start, min(start + chunk, plan.num_images)) for start in starts)
    progress(stored.position, plan.num_images)
    job = replace(workers.job, tables=tables)
    with closing(workers.run(job, chunks, max(1, _WAITING_BYTES // (chunk * image_bytes)))) as results:
        for encoded in results:
            for number, entry in enumerate(encoded.entries if on_error == "stop" else ()):
                if isinstance(entry, str):
                    raise plan.bad_image(stored.position + number, entry)
            layout.add(encoded)
            progress(stored.position, plan.num_images)
    layout.close()


def _finish(plan: WritePlan, layout: PageLayout, target: Path) -> dict[str, Any]:
    """Write the tables, give the file its name, and write the manifest."""
    stored, partial = layout.stored, layout.partial
    if len(stored.reasons) == plan.num_images:
        raise plan.bad_image(*next(iter(stored.reasons.items())))
    plan.source.reader.check()
    head, alloc_table = tables = build_tables(plan, stored, len(partial.page_hashes))
    manifest = build_manifest(plan, stored, tables, partial.page_hashes, target)
    header_bytes = beton.HEADER_TYPE.itemsize
    partial.finish(head[header_bytes:], alloc_table.tobytes(), head[:header_bytes])
    # The new file is safe on the disk. Now the manifest of a replaced file may go.
    beton.manifest_path(target).unlink(missing_ok=True)
    publish(partial.path, target)
    write_manifest(target, manifest)
    return manifest
