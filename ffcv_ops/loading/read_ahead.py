"""Read the samples of the coming batches into the page cache, before a worker needs them.

A worker that meets a missing page of a mapped file waits for storage, one read at a time. On a file system behind a
network, such a read takes a millisecond. `ReadAhead` keeps many reads in flight, each of one whole value. For a file
that is in the page cache it only tries a few values of each batch.

No question to the kernel replaces the trial. ``mincore`` and ``cachestat`` answer only the owner of a file, and
``RWF_NOWAIT`` works on few file systems. So the time of a read decides: a value in the page cache is copied faster than
any storage answers. On busy CPUs, a read may take long because its thread had to wait for a CPU. Linux counts such
waits apart from those for storage.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from ffcv_ops._kernels import external, kernel
from ffcv_ops.cgroups import available_bytes
from ffcv_ops.files import read_exactly

# The values of this many bytes are read ahead, at most this share of the memory that is available.
_WINDOW_BYTES = 128 << 20
_WINDOW_SHARE = 1 / 8
_MAX_BATCHES = 16
# Threads that read. Each time the epoch waits for storage their number doubles, as long as that made reading faster.
_MIN_READERS, _MAX_READERS = 8, 64
_FASTER = 1.1
_MIN_MEASURED_S = 0.05
# Values tried in a batch that is expected in the page cache. If so many of them are slow, all are read.
_NUM_TRIED, _NUM_SLOW = 16, 2
# A read from the page cache takes at most this time, plus a nanosecond for each byte.
_CACHED_NS = 60_000
_CHUNK = 4
_MOST_WAIT_S = 1.0
_SCRATCH_BYTES = 1 << 20

_CLOCK_MONOTONIC, _RUSAGE_THREAD = 1, 1
# The fields of ``struct rusage`` in words of 64 bits, and the place of the voluntary context switches (getrusage(2)).
_RUSAGE_WORDS, _VOLUNTARY = 18, 16


_pread = external("pread", "8", "4888")
_clock_gettime = external("clock_gettime", "4", "48")
_getrusage = external("getrusage", "4", "48")


@kernel
def _read_values(
    file: int, offsets: np.ndarray, sizes: np.ndarray, scratch: np.ndarray, clock: np.ndarray, cached_ns: int
) -> tuple[int, int]:
    """Read values and forget them. Return how many were not in the page cache, and the first that failed, or -1.

    `clock` is int64 (`_RUSAGE_WORDS`,) for the answers of the kernel.
    """
    num_slow = 0
    if len(offsets):
        _getrusage(_RUSAGE_THREAD, clock.ctypes.data)
    num_waits = clock[_VOLUNTARY] if len(offsets) else 0
    counts_waits = num_waits > 0  # a reader has waited for this task, so 0 means that nothing is counted
    for i in range(len(offsets)):
        _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
        start_ns = clock[0] * 1_000_000_000 + clock[1]
        done = 0
        while done < sizes[i]:
            count = _pread(file, scratch.ctypes.data, min(sizes[i] - done, len(scratch)), offsets[i] + done)
            if count <= 0:
                return num_slow, i
            done += count
        _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
        elapsed_ns = clock[0] * 1_000_000_000 + clock[1] - start_ns
        if elapsed_ns > cached_ns + sizes[i]:
            _getrusage(_RUSAGE_THREAD, clock.ctypes.data)
            num_slow += clock[_VOLUNTARY] > num_waits or not counts_waits
            num_waits = clock[_VOLUNTARY]
    return num_slow, -1


@dataclass
class _Reads:
    """The reads of one batch.

    Attributes
    ----------
    offsets, sizes : ndarray int64 (N,)
    rest : ndarray int or None
        The values that are read only if those tried are slow; None if there are none.
    num_pending, num_slow : int
        Chunks that were asked for and are not read yet, and slow reads.
    is_bad : bool
        A read has failed. The batch reads its values again when it begins, and raises an error only if that fails too.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    rest: np.ndarray | None = None
    num_pending: int = 0
    num_slow: int = 0
    is_bad: bool = False


class ReadAhead:
    """The reads of one epoch.

    Parameters
    ----------
    file : int
        Descriptor of the file. It is not opened again, because some network file systems drop the cache of a file then.
    path : str
        For messages.
    values : callable
        Returns the offsets and sizes, each int64 (N,), of the values of a batch, for the batch's number.
    num_batches : int

    Attributes
    ----------
    is_cold : bool
        True if the file was not in the page cache lately, so that all values are read.
    """

    def __init__(self, file: int, path: str, values: Callable[[int], tuple[np.ndarray, np.ndarray]], num_batches: int):
        self.path = path
        self._file, self._values, self._num_batches = file, values, num_batches
        self._window_bytes = min(_WINDOW_BYTES, int(available_bytes() * _WINDOW_SHARE))
        self._lock = threading.Condition()
        self._wanted: SimpleQueue[tuple[_Reads, np.ndarray] | None] = SimpleQueue()
        self._batches: dict[int, _Reads] = {}
        self._next = self._current = 0
        self.is_cold = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._num_read, self._since_s, self._best_rate = 0, 0.0, 0.0
        nothing = np.empty(0, np.int64)
        _read_values(file, nothing, nothing, np.empty(0, np.uint8), nothing, 0)  # to load it is no wait for storage

    def begin_batch(self, number: int) -> None:
        """Wait for the values of a batch, and ask for those of the following batches. Batches begin in order.

        Raises
        ------
        ReadError
            If a value cannot be read.
        """
        self._current = number
        with self._lock:
            self._ask(number)
            reads = self._batches.pop(number)
            waited = reads.num_pending > 0
            while reads.num_pending and self._error is None:
                self._lock.wait()
            if self._error is not None:
                raise self._error
            if waited and self.is_cold:
                self._adapt()
        if reads.is_bad:
            self.read_again()

    def _ask(self, number: int) -> None:
        """Ask for the values of a batch, and of as many batches behind it as fit into the window."""
        if not self._threads:
            self._start_threads(_MIN_READERS)
        window_bytes = sum(int(reads.sizes.sum()) for reads in self._batches.values())
        while self._next < self._num_batches and (
            self._next <= number or (window_bytes < self._window_bytes and self._next <= number + _MAX_BATCHES)
        ):
            reads = _Reads(*self._values(self._next))
            window_bytes += int(reads.sizes.sum())
            everything = np.arange(len(reads.offsets))
            if self.is_cold or len(everything) <= _NUM_TRIED:
                self._put(reads, everything)
            else:
                tried = np.linspace(0, len(everything) - 1, _NUM_TRIED).astype(np.int64)
                reads.rest = np.setdiff1d(everything, tried)
                self._put(reads, tried)
            self._batches[self._next] = reads
            self._next += 1

    def _put(self, reads: _Reads, positions: np.ndarray) -> None:
        for start in range(0, len(positions), _CHUNK):
            reads.num_pending += 1
            self._wanted.put((reads, positions[start : start + _CHUNK]))

    def _adapt(self) -> None:
        """Double the threads if storage gave more than it gave to fewer of them."""
        now_s = time.perf_counter()
        elapsed_s = now_s - self._since_s
        if elapsed_s < _MIN_MEASURED_S:
            return
        rate = self._num_read / elapsed_s
        if rate > _FASTER * self._best_rate:
            self._best_rate = rate
            self._start_threads(min(len(self._threads), _MAX_READERS - len(self._threads)))
        self._num_read, self._since_s = 0, now_s

    def _start_threads(self, count: int) -> None:
        for _ in range(count if self._error is None else 0):
            name = f"ffcv_ops read ahead {len(self._threads)}"
            thread = threading.Thread(target=self._serve, args=(os.dup(self._file),), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, file: int) -> None:
        """Read what is asked for, until None is."""
        scratch, clock = np.empty(_SCRATCH_BYTES, np.uint8), np.zeros(_RUSAGE_WORDS, np.int64)
        try:
            while (task := self._wanted.get()) is not None and self._error is None:
                reads, positions = task
                offsets, sizes = reads.offsets[positions], reads.sizes[positions]
                num_slow = start = 0
                is_bad = False
                while start < len(offsets):
                    slow, failed = _read_values(file, offsets[start:], sizes[start:], scratch, clock, _CACHED_NS)
                    num_slow += slow
                    if failed < 0:
                        break
                    is_bad, start = True, start + failed + 1
                self._finish(reads, len(positions), num_slow, is_bad)
        except BaseException as error:  # the thread of the epoch raises it
            self._fail(error)
        finally:
            os.close(file)

    def _finish(self, reads: _Reads, num_read: int, num_slow: int, is_bad: bool) -> None:
        """Count a chunk that was read. If the file turns out not to be in the page cache, ask for the rest."""
        with self._lock:
            self._num_read += num_read
            reads.num_slow += num_slow
            reads.is_bad |= is_bad
            if reads.num_slow >= _NUM_SLOW and not self.is_cold:
                self.is_cold, self._num_read, self._since_s = True, 0, time.perf_counter()
            if self.is_cold:
                for waiting in (reads, *self._batches.values()):
                    if waiting.rest is not None:
                        self._put(waiting, waiting.rest)
                        waiting.rest = None
            reads.num_pending -= 1
            if not reads.num_pending:
                # A whole batch without slow reads: from now on only a few values are tried.
                if self.is_cold and reads.num_slow < _NUM_SLOW and len(reads.offsets) > _NUM_TRIED:
                    self.is_cold = False
                self._lock.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    def read_again(self) -> None:
        """Read the values of the present batch once more, for the error of a value that cannot be read.

        Raises
        ------
        ReadError
            If there is one.
        """
        for offset, size in zip(*map(np.ndarray.tolist, self._values(self._current)), strict=True):
            read_exactly(self._file, self.path, memoryview(bytearray(size)), offset)

    def stop(self) -> None:
        """End the reading. A thread that waits in `begin_batch` gets an error. Reads in flight are not waited for."""
        self._fail(RuntimeError(f"{self.path}: reading was stopped: the epoch is closed"))
        with self._lock:
            for _ in self._threads:
                self._wanted.put(None)

    def close(self) -> None:
        """End the reading and wait for the threads, but not long for a read that storage does not answer."""
        self.stop()
        end_s = time.monotonic() + _MOST_WAIT_S
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))


def values_of(metadata: Any, columns: list[str], allocations: Any) -> Callable[[np.ndarray], tuple[Any, Any]]:
    """Return the function from sample ids to the offsets and sizes of these samples' values.

    Every uint64 of a field's metadata that the allocation table has as an offset is one.
    """
    pointers = []
    for name in columns:
        column = metadata[name]
        parts = [column] if column.dtype.names is None else [column[part] for part in column.dtype.names]
        pointers += [part for part in parts if part.dtype == np.uint64]

    def values(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.concatenate([part[ids] for part in pointers]) if pointers else np.zeros(0, np.uint64)
        rows, known = allocations.find(offsets)
        return offsets[known].astype(np.int64), allocations.sizes[rows[known]].astype(np.int64)

    return values
