"""Where a file lies, and how fast it can be read from there when it is not in memory."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
import time
from pathlib import Path

_GOLDEN_RATIO = 0.6180339887498949


def filesystem(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the type of the file system that a path is on, such as ``ext4`` or ``lustre``, and its mount point."""
    real = os.path.realpath(path)
    found = "unknown", "/"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in mounts:
        before, _, after = line.partition(" - ")
        mount_point = before.split()[4].replace("\\040", " ")
        # Of several mounted over one another the last holds.
        if os.path.join(real, "").startswith(os.path.join(mount_point, "")) and len(mount_point) >= len(found[1]):
            found = after.split()[0], mount_point
    return found


def cold_read_rate(path: str | os.PathLike[str], block_bytes: int, num_threads: int, time_s: float = 1.0) -> float:
    """Measure how fast blocks from all over a file are read past the page cache.

    With ``O_DIRECT``, which leaves what is cached alone; where the file system has none, the blocks are dropped from
    the cache first.

    Parameters
    ----------
    path : path-like
        A file of at least one block.
    block_bytes : int
        Size of a read, a multiple of 4096.
    num_threads : int
        Reads in flight.
    time_s : float
        After this time in seconds no read is begun.

    Returns
    -------
    float
        Bytes a second.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    num_blocks = os.path.getsize(path) // block_bytes
    file, is_direct = _open_past_cache(path, block_bytes)
    numbers, sizes, errors = itertools.count(), [0] * num_threads, []
    start_s = time.perf_counter()

    def read(thread: int) -> None:
        buffer = mmap.mmap(-1, block_bytes)  # O_DIRECT asks for memory that is aligned to pages
        try:
            while time.perf_counter() - start_s < time_s:
                # Multiples of the golden ratio, modulo 1, are everywhere early and nowhere twice.
                offset = int(next(numbers) * _GOLDEN_RATIO % 1 * num_blocks) * block_bytes
                if not is_direct:
                    os.posix_fadvise(file, offset, block_bytes, os.POSIX_FADV_DONTNEED)
                sizes[thread] += os.preadv(file, [buffer], offset)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(thread,)) for thread in range(num_threads)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(file)
    if errors:
        raise errors[0]
    return sum(sizes) / (time.perf_counter() - start_s)


def _open_past_cache(path: str | os.PathLike[str], block_bytes: int) -> tuple[int, bool]:
    """Open a file with ``O_DIRECT`` where that works; tell whether it does."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY), False
    try:
        os.preadv(file, [mmap.mmap(-1, block_bytes)], 0)
    except OSError as error:
        os.close(file)
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY), False
    return file, True
