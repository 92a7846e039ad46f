"""A copy of a ``.beton`` file on a local disk: checked by its digest, resumed after a kill, whole or absent."""

import contextlib
import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from ffcv_ops import beton, journal
from ffcv_ops.beton import Beton, read_beton
from ffcv_ops.processes import num_cpus
from ffcv_ops.verify import Page, pages_of
from ffcv_ops.writer import show_bytes

_BUFFER_BYTES = 1 << 30


class StageError(RuntimeError):
    """The file's bytes are not those that were written. The message says which, and what to do."""


def stage(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    notice: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Copy a file and its manifest into a folder, or go on where a killed run left off.

    Threads read, hash and write page after page. What is hashed is what is written, so that the copy has the digest of
    the manifest or does not get its name. Runs on one machine that copy into the same folder wait for each other.

    Parameters
    ----------
    source : path
        A file with a manifest beside it.
    folder : path
        Where the copy is to be, under the source's name; ``<name>.partial`` and its journal hold the unfinished one.
    notice : callable
        Is given what the user should know, a line each.
    progress : callable
        Is called with the bytes done and the bytes in all.

    Returns
    -------
    Path
        The copy. One that was there already is taken for what it was when it got its name: its tables are compared
        again, its pages are not.

    Raises
    ------
    ValueError
        For what has to be put right before: the source, the folder, another file under the same name, the space.
    StageError
        Where the source's pages are not what its manifest says.
    OSError
        For what else stopped it under way. The same call goes on from there, also after a StageError.
    """
    found, target = read_beton(source), Path(folder) / Path(source).name
    if found.manifest is None:
        raise ValueError(f"{source}: has no manifest to check a copy by; copy it with cp, or write it anew")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to copy {target.name} to")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the file to be copied; name another folder")
    with _only_one(target.parent, notice):
        if _is_there(target, found):
            journal.remove_partial(target)
            notice(f"{target} is there already")
        else:
            _copy(found, target, notice, progress)
    return target


@contextmanager
def _only_one(folder: Path, notice: Callable[[str], None]) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"waiting for another process that copies into {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks goes without
        yield
    finally:
        os.close(descriptor)


def _is_there(target: Path, found: Beton) -> bool:
    if not target.exists():
        return False
    with contextlib.suppress(ValueError):
        if read_beton(target).digest == found.digest:
            return True
    raise ValueError(
        f"{target}: exists already and is another file than {found.path}; remove it, or name another folder"
    )


def _copy(found: Beton, target: Path, notice: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    partial = journal.PartialFile(target, {"digest": found.digest}, found.data_start, found.page_size)
    with closing(partial), open(found.path, "rb") as file:
        done = len(partial.page_hashes)
        if partial.changed:
            notice(f"starting over: since {partial.path} was begun, {found.path} was written anew")
        if done:
            notice(
                f"resuming: {show_bytes(done * found.page_size)} of {show_bytes(found.size_bytes)} are there already"
            )
        _check_space(found, target, done)
        _copy_pages(found, partial, file.fileno(), progress)
        head = os.pread(file.fileno(), found.metadata_end, 0)
        digest = beton.file_digest(beton.tables_digest(head, found.alloc_table), partial.page_hashes)
        if digest != found.digest:
            journal.remove_partial(target)
            raise StageError(f"{found.path}: its digest is {digest}, the manifest's {found.digest}; write it again")
        header_bytes = beton.HEADER_TYPE.itemsize
        partial.finish(head[header_bytes:], found.alloc_table.tobytes(), head[:header_bytes])
        # The manifest first: where both are, both are whole.
        journal.write_whole(beton.manifest_path(target), (json.dumps(found.manifest, indent=1) + "\n").encode())
        partial.publish()
    journal.remove_partial(target)


def _check_space(found: Beton, target: Path, pages_done: int) -> None:
    needed, free = found.size_bytes - pages_done * found.page_size, shutil.disk_usage(target.parent).free
    if needed > free:
        if not pages_done:
            journal.remove_partial(target)
        raise ValueError(
            f"{target.parent}: {show_bytes(free)} free, {show_bytes(needed)} needed; make room, or name another folder"
        )


def _copy_pages(found: Beton, partial: journal.PartialFile, source: int, progress: Callable[[int, int], None]) -> None:
    def copy(page: Page) -> tuple[Page, str, list[int]]:
        size, content = page.stop - page.start, b""
        while part := os.pread(source, size - len(content), page.start + len(content)):  # one call reads below 2 GiB
            content = content + part if content else part
        if len(content) < size:
            raise StageError(f"{found.path}: was cut while it was read")
        page_hash, changed, _ = page.check(content)
        if not changed:
            partial.write(content, page.start)
        return page, page_hash, changed

    pages = pages_of(found)
    for _ in partial.page_hashes:
        next(pages)
    num_threads = max(1, min(num_cpus(), _BUFFER_BYTES // found.page_size))
    waiting: deque[Future[tuple[Page, str, list[int]]]] = deque()
    threads = ThreadPoolExecutor(num_threads)
    try:
        progress(len(partial.page_hashes) * found.page_size, found.size_bytes)
        while True:
            while len(waiting) < 2 * num_threads and (page := next(pages, None)):
                waiting.append(threads.submit(copy, page))
            if not waiting:
                break
            page, page_hash, changed = waiting.popleft().result()
            if changed:
                names = ", ".join(map(str, changed[:3])) + ", ..." * (len(changed) > 3)
                raise StageError(
                    f"{found.path}: damaged: the bytes of sample {names} are not those that were written; look with "
                    "write_beton.py --verify, and write it again"
                )
            partial.append_page(page_hash, {}, found.page_size)
            progress(page.stop, found.size_bytes)
    finally:
        threads.shutdown(cancel_futures=True)
