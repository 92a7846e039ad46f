"""The storage of samples during an epoch: the whole file mapped, or the pages of the coming batches.

`MappedFile` leaves caching to the operating system (``os_cache=True``); `MappedEpoch` reads the samples of the coming
batches into its cache. `PagedFile` reads whole pages ahead of their use into memory of this process
(``os_cache=False``).
"""

import mmap
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from ffcv_ops import _sigbus
from ffcv_ops._ffcv import read_mapped
from ffcv_ops.beton.allocations import AllocationTable
from ffcv_ops.cgroups import available_bytes
from ffcv_ops.files import ReadError, read_exactly
from ffcv_ops.loading.read_ahead import ReadAhead

# The numbers of the stock loader: twelve threads read pages up to three batches ahead of their use.
_PREFETCH_BATCHES = 3
_NUM_READERS = 12


class MappedFile:
    """A file that is mapped into memory. Its pages are in the operating system's cache, which all processes share.

    If another process cuts the file, reading the map raises SIGBUS. The handler of `ffcv_ops._sigbus` then puts zeros
    there, and `check` raises ReadError before the batch is used.

    Parameters
    ----------
    path : path-like
        A .beton file.
    allocations : AllocationTable
    """

    def __init__(self, path: str | os.PathLike[str], allocations: AllocationTable):
        self.path = os.fspath(path)
        self.allocations = allocations
        self.file = open_for(self, self.path)
        self._map = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, dtype=np.uint8)
        self._number = _sigbus.watch(self.data.ctypes.data, self.data.size)
        weakref.finalize(self, _sigbus.forget, self._number).atexit = False

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return addresses and sizes of samples; see `Batch.locate`."""
        data_ptrs = np.asarray(data_ptrs, dtype=np.uint64)
        sizes = self.allocations.sizes_at(data_ptrs).astype(np.uint64)
        return data_ptrs + np.uint64(self.data.ctypes.data), sizes

    @property
    def storage_state(self) -> tuple[np.ndarray, ...]:
        """The storage state that FFCV's decoders pass to `read_mapped`."""
        return self.data, self.allocations.ptrs, self.allocations.sizes

    def reader(self) -> Callable:
        """Return the function by which FFCV's decoders read a value. FFCV compiles it into them."""
        return read_mapped

    def advise_random(self) -> None:
        """Ask the kernel to read no neighbours of a sample, and not to keep samples because they were used.

        Without this advice, Linux prefers mapped pages that were used to pages that were read ahead. It then drops the
        latter before their use.
        """
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)  # for reads
        self._map.madvise(mmap.MADV_RANDOM)  # for the map

    def check(self) -> None:
        """Raise ReadError if the file has become shorter or could not be read: a sample may have zeros in its place."""
        if self._size() < self.data.size:
            raise ReadError(
                f"{self.path}: has less than its {self.data.size} bytes: it was cut or replaced while in use"
            )
        if _sigbus.was_cut(self._number):
            raise ReadError(f"{self.path}: a part of it could not be read: storage failed, or the file was cut")

    def _size(self) -> int:
        try:
            return self._map.size()
        except OSError as error:
            raise ReadError(error.errno, error.strerror, self.path) from None


class MappedEpoch:
    """One epoch of a `MappedFile`: the values of the coming batches are read ahead of their use.

    Parameters
    ----------
    mapped : MappedFile
    read_ahead : ReadAhead
    """

    def __init__(self, mapped: MappedFile, read_ahead: ReadAhead):
        self._mapped, self._read_ahead = mapped, read_ahead
        if mapped.data.size > available_bytes():
            mapped.advise_random()
        self.locate, self.storage_state = mapped.locate, mapped.storage_state
        self.begin_batch, self.stop, self.close = read_ahead.begin_batch, read_ahead.stop, read_ahead.close

    @property
    def is_cold(self) -> bool:
        """True if the file was not in the page cache lately."""
        return self._read_ahead.is_cold

    def check(self) -> None:
        """Raise ReadError if the file was cut or could not be read; see `MappedFile.check`."""
        try:
            self._mapped.check()
        except ReadError:
            self._read_ahead.read_again()  # its error has the place and the reason
            raise


@dataclass(frozen=True)
class PageSchedule:
    """The times at which pages are read, and their slots.

    Attributes
    ----------
    num_slots : int
        The most pages that are in memory at a time.
    slots : dict of int to int
        The slot of each page.
    reads, needs, leaves : dict of int to list of int
        For a batch's number: the pages that may be read from this batch on; the pages that this batch is the first to
        need; the pages that no batch needs from this one on.
    """

    num_slots: int
    slots: dict[int, int]
    reads: dict[int, list[int]]
    needs: dict[int, list[int]]
    leaves: dict[int, list[int]]


def schedule_pages(allocations: AllocationTable, page_size: int, batches: Sequence[np.ndarray]) -> PageSchedule:
    """Schedule the reading of the pages of an epoch's batches: each page once, into as few slots as possible.

    Parameters
    ----------
    allocations : AllocationTable
    page_size : int
        Bytes.
    batches : sequence of ndarray int (batch_size,)
        Sample ids of each batch.
    """
    pages, first, last = _page_lifetimes(allocations, page_size, batches)
    reads, needs, leaves = defaultdict(list), defaultdict(list), defaultdict(list)
    for page, start, end in zip(pages.tolist(), first.tolist(), last.tolist(), strict=True):
        reads[max(0, start - _PREFETCH_BATCHES)].append(page)
        needs[start].append(page)
        leaves[end + 1].append(page)
    slots: dict[int, int] = {}
    free: list[int] = []
    num_slots = 0
    for number in range(len(batches)):
        free.extend(slots[page] for page in leaves[number])
        for page in reads[number]:
            if not free:
                free.append(num_slots)
                num_slots += 1
            slots[page] = free.pop()
    return PageSchedule(num_slots, slots, reads, needs, leaves)


def _page_lifetimes(
    table: AllocationTable, page_size: int, batches: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pages that are needed, and the numbers of the first and the last batch that need each of them."""
    if not batches or not len(table):
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, nothing
    num_samples = 1 + max(int(table.sample_ids.max()), *(int(ids.max()) for ids in batches))
    first_of_sample = np.full(num_samples, len(batches), dtype=np.int64)
    last_of_sample = np.full(num_samples, -1, dtype=np.int64)
    ids = np.concatenate(batches)
    numbers = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    # If an assignment names a sample several times, the last one stays. So the first batch is assigned backwards.
    last_of_sample[ids] = numbers
    first_of_sample[ids[::-1]] = numbers[::-1]

    owners = table.sample_ids.astype(np.int64)
    used = (last_of_sample[owners] >= 0) & (table.sizes > 0)
    pages, page_index = np.unique((table.ptrs // np.uint64(page_size)).astype(np.int64)[used], return_inverse=True)
    first = np.full(len(pages), len(batches), dtype=np.int64)
    last = np.full(len(pages), -1, dtype=np.int64)
    np.minimum.at(first, page_index, first_of_sample[owners[used]])
    np.maximum.at(last, page_index, last_of_sample[owners[used]])
    return pages, first, last


class PagedFile:
    """The pages of the coming batches. Threads read them into this process.

    Parameters
    ----------
    path : path-like
        A .beton file; for messages.
    file : int
        Its descriptor. It is not opened again, because another file may have its name by then.
    allocations : AllocationTable
    page_size : int
        Bytes, a power of two.
    schedule : PageSchedule
        The schedule of this epoch; see `schedule_pages`.
    slots : ndarray uint8 (>= schedule.num_slots, page_size)
        Memory for the pages.
    """

    is_cold = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        file: int,
        allocations: AllocationTable,
        page_size: int,
        schedule: PageSchedule,
        slots: np.ndarray,
    ):
        self.path, self._file = os.fspath(path), file
        self.allocations = allocations
        self.page_size = page_size
        self.schedule = schedule
        self.slots = slots
        # It has all pages of the file: an empty value has the offset of the value behind it, on any page.
        num_pages = 1 + int(allocations.ptrs.max(initial=0)) // page_size
        self.slot_of_page = np.zeros(num_pages, dtype=np.uint32)
        for page, slot in schedule.slots.items():
            self.slot_of_page[page] = slot
        self._present: set[int] = set()
        self._failed: set[int] = set()
        self._wanted: SimpleQueue = SimpleQueue()
        self._read: SimpleQueue = SimpleQueue()
        self._unscheduled: list[np.ndarray] = []
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def begin_batch(self, number: int) -> None:
        """Wait for the pages of a batch. Batches begin in order.

        Raises
        ------
        ReadError
            If a page cannot be read, or the file has become shorter.
        """
        if not self._threads:
            self._start()
        self._unscheduled.clear()
        self._present.difference_update(self.schedule.leaves.get(number, ()))
        for page in self.schedule.reads.get(number, ()):
            self._wanted.put(page)
        for page in self.schedule.needs.get(number, ()):
            while page not in self._present:
                arrived, error = self._read.get()
                if arrived is None:
                    raise error
                self._present.add(arrived)
                if error is not None:
                    self._failed.add(arrived)
            if page in self._failed:  # only the batch that needs the page raises its error, if there still is one
                self._failed.discard(page)
                self._fill(page)

    def _start(self) -> None:
        for number in range(min(_NUM_READERS, max(1, len(self.schedule.slots)))):
            thread = threading.Thread(target=self._read_pages, name=f"ffcv_ops reader {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _read_pages(self) -> None:
        """Read wanted pages until None is wanted. The thread that waits for pages raises the errors."""
        try:
            while (page := self._wanted.get()) is not None and not self._stopping:
                failure = None
                try:
                    self._fill(page)
                except ReadError as error:
                    failure = error
                self._read.put((page, failure))
        except BaseException as error:  # the thread of the epoch raises it
            self._read.put((None, error))

    def _fill(self, page: int) -> None:
        """Read a page into its slot."""
        read_exactly(self._file, self.path, memoryview(self.slots[self.schedule.slots[page]]), page * self.page_size)

    def check(self) -> None:
        """Do nothing: a read of too few bytes has raised an error."""

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return addresses and sizes of samples; see `Batch.locate`. Replacements, which no page has, are read here."""
        data_ptrs = np.asarray(data_ptrs, dtype=np.uint64)
        sizes = self.allocations.sizes_at(data_ptrs).astype(np.uint64)
        pages, offsets = np.divmod(data_ptrs, np.uint64(self.page_size))
        present = np.isin(pages, np.fromiter(self._present, dtype=np.uint64, count=len(self._present)))
        slots = np.zeros(len(pages), dtype=np.uint64)
        slots[present] = self.slot_of_page[pages[present]]
        addresses = slots * np.uint64(self.page_size) + offsets + np.uint64(self.slots.ctypes.data)
        for i in np.flatnonzero(~present):
            sample = np.empty(int(sizes[i]), dtype=np.uint8)
            read_exactly(self._file, self.path, memoryview(sample), int(data_ptrs[i]))  # type: ignore[arg-type]
            self._unscheduled.append(sample)
            addresses[i] = sample.ctypes.data
        return addresses, sizes

    @property
    def storage_state(self) -> tuple[np.ndarray, ...]:
        """The storage state that FFCV's decoders pass to their reader."""
        return self.slots, self.allocations.ptrs, self.allocations.sizes, self.slot_of_page

    def stop(self) -> None:
        """End the reading. A thread that waits for pages in `begin_batch` gets an error."""
        self._stopping = True
        for _ in self._threads:
            self._wanted.put(None)
        self._read.put((None, RuntimeError(f"{self.path}: reading was stopped: the epoch is closed")))

    def close(self) -> None:
        """End the reading and wait for the threads, which write into the slots."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []


def open_for(owner: object, path: str) -> int:
    """Open a file to read it without a buffer, as long as its owner lives. Raise ReadError if it cannot be opened."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ReadError(error.errno, error.strerror, path) from None
    weakref.finalize(owner, os.close, file).atexit = False
    return file


def paged_reader(page_size: int) -> Callable:
    """Return the function by which FFCV's decoders read a value of a `PagedFile`. FFCV compiles it into them."""
    page_size_log2 = np.uint64(page_size.bit_length() - 1)

    def read_paged(address: np.uint64, storage_state: tuple[np.ndarray, ...]) -> np.ndarray:
        row = np.searchsorted(storage_state[1], address, side="right") - 1
        page = address >> page_size_log2
        offset = address - (page << page_size_log2)
        return storage_state[0][storage_state[3][page], offset : offset + storage_state[2][row]]

    return read_paged
