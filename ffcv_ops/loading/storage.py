"""Where the bytes of samples are in memory: the whole file mapped, or the pages of the coming batches read.

Two implementations of one protocol, after FFCV's memory managers: `MappedFile` leaves caching to the operating system
(``os_cache=True``), `PagedFile` reads whole pages into slots of this process ahead of their use (``os_cache=False``).
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

from ffcv_ops._ffcv import read_mapped
from ffcv_ops.cgroups import available_bytes as available_bytes
from ffcv_ops.loading import sigbus

# As the stock loader: pages are read up to three batches ahead of their use, by twelve threads.
_PREFETCH_BATCHES = 3
_NUM_READERS = 12


@dataclass(frozen=True)
class Regions:
    """The allocation table in the order of the file.

    Attributes
    ----------
    sample_ids, ptrs, sizes : ndarray uint64 (R,)
        Owner, place in the file and bytes of every region, by ascending place.
    """

    sample_ids: np.ndarray
    ptrs: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, alloc_table: np.ndarray) -> "Regions":
        """Sort an allocation table; an empty region comes before the one that begins at the same place."""
        order = np.lexsort((alloc_table["size"], alloc_table["ptr"]))
        return cls(*(np.ascontiguousarray(alloc_table[name][order]) for name in ("sample_id", "ptr", "size")))

    def find(self, data_ptrs: np.ndarray) -> np.ndarray:
        """Find the rows that pointers, uint64 (N,), belong to; ValueError when one is not in the table."""
        rows = np.searchsorted(self.ptrs, data_ptrs, side="right") - 1
        known = rows >= 0
        known[known] = self.ptrs[rows[known]] == data_ptrs[known]
        if not known.all():
            pointer = data_ptrs[~known][0]
            raise ValueError(
                f"the allocation table has no region at byte {pointer}: the file is damaged, write it anew"
            )
        return rows


class MappedFile:
    """A file mapped into memory; its pages are in the operating system's cache, shared by all processes.

    Parameters
    ----------
    path : path-like
        A .beton file.
    alloc_table : structured ndarray
        Its allocation table, fields ``sample_id``, ``ptr`` and ``size``.
    """

    def __init__(self, path: str | os.PathLike[str], alloc_table: np.ndarray):
        self.path = os.fspath(path)
        self.regions = Regions.of(alloc_table)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, dtype=np.uint8)
        self._number = sigbus.announce(self.data.ctypes.data, self.data.size)
        weakref.finalize(self, sigbus.forget, self._number).atexit = False

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Memory.locate`."""
        data_ptrs = np.asarray(data_ptrs, dtype=np.uint64)
        rows = self.regions.find(data_ptrs)
        return data_ptrs + np.uint64(self.data.ctypes.data), self.regions.sizes[rows]

    @property
    def storage_state(self) -> tuple[np.ndarray, ...]:
        """What FFCV's decoders hand to their reader, here `read_mapped`."""
        return self.data, self.regions.ptrs, self.regions.sizes

    def reader(self) -> Callable:
        """Return the function by which FFCV's decoders read a region, to be compiled with them."""
        return read_mapped

    def begin_batch(self, number: int) -> None:
        """Nothing to wait for."""

    def check(self) -> None:
        """Raise OSError if what was read since the file was mapped may be zeros, for it has become shorter."""
        if sigbus.was_cut(self._number) or self._map.size() < self.data.size:
            raise OSError(f"{self.path}: has less than its {self.data.size} bytes: it was cut or replaced while in use")

    def stop(self) -> None:
        """Nothing to stop."""

    def close(self) -> None:
        """The map closes when the last array over it is gone."""


@dataclass(frozen=True)
class Schedule:
    """When pages are read, and into which slot.

    Attributes
    ----------
    num_slots : int
        Pages in memory at a time.
    slots : dict of int to int
        The slot of each page.
    reads, needs, leaves : dict of int to list of int
        Batch number -> pages that may be read from that batch on, that it is the first to need, that nobody needs more.
    """

    num_slots: int
    slots: dict[int, int]
    reads: dict[int, list[int]]
    needs: dict[int, list[int]]
    leaves: dict[int, list[int]]


def plan_pages(regions: Regions, page_size: int, batches: Sequence[np.ndarray]) -> Schedule:
    """Plan the reading of the pages of an epoch's batches: each page once, into as few slots as that takes.

    Parameters
    ----------
    regions : Regions
    page_size : int
        Bytes.
    batches : sequence of ndarray int64
        Sample ids of each batch.
    """
    pages, first, last = _page_lifetimes(regions, page_size, batches)
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
    return Schedule(num_slots, slots, reads, needs, leaves)


def _page_lifetimes(
    regions: Regions, page_size: int, batches: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pages in use, and the first and the last batch that needs each."""
    if not batches or not len(regions.ptrs):
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, nothing
    num_samples = 1 + max(int(regions.sample_ids.max()), *(int(ids.max()) for ids in batches))
    first_of_sample = np.full(num_samples, len(batches), dtype=np.int64)
    last_of_sample = np.full(num_samples, -1, dtype=np.int64)
    ids = np.concatenate(batches)
    numbers = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    # Of several assignments to one sample the last stays: forwards it is its last batch, backwards its first.
    last_of_sample[ids] = numbers
    first_of_sample[ids[::-1]] = numbers[::-1]

    owners = regions.sample_ids.astype(np.int64)
    used = (last_of_sample[owners] >= 0) & (regions.sizes > 0)
    pages, page_index = np.unique((regions.ptrs // np.uint64(page_size)).astype(np.int64)[used], return_inverse=True)
    first = np.full(len(pages), len(batches), dtype=np.int64)
    last = np.full(len(pages), -1, dtype=np.int64)
    np.minimum.at(first, page_index, first_of_sample[owners[used]])
    np.maximum.at(last, page_index, last_of_sample[owners[used]])
    return pages, first, last


class PagedFile:
    """The pages of the coming batches, read into this process by threads.

    Parameters
    ----------
    path : path-like
        A .beton file.
    regions : Regions
    page_size : int
        Bytes, a power of two.
    schedule : Schedule
        Of this epoch; see `plan_pages`.
    slots : ndarray uint8 (>= schedule.num_slots, page_size)
        Where the pages go.
    """

    def __init__(
        self, path: str | os.PathLike[str], regions: Regions, page_size: int, schedule: Schedule, slots: np.ndarray
    ):
        self.path = os.fspath(path)
        self.regions = regions
        self.page_size = page_size
        self.schedule = schedule
        self.slots = slots
        # Of all pages: an empty value points to whatever stands behind it, which may be on a page that nobody planned.
        num_pages = 1 + int(regions.ptrs.max(initial=0)) // page_size
        self.slot_of_page = np.zeros(num_pages, dtype=np.uint32)
        for page, slot in schedule.slots.items():
            self.slot_of_page[page] = slot
        self._present: set[int] = set()
        self._wanted: SimpleQueue = SimpleQueue()
        self._read: SimpleQueue = SimpleQueue()
        self._private: list[np.ndarray] = []
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def begin_batch(self, number: int) -> None:
        """Wait for the pages of a batch; batches begin in order.

        Raises
        ------
        OSError
            When a page cannot be read, or the file has become shorter than it was.
        """
        if not self._threads:
            self._start()
        self._private.clear()
        self._present.difference_update(self.schedule.leaves.get(number, ()))
        for page in self.schedule.reads.get(number, ()):
            self._wanted.put(page)
        for page in self.schedule.needs.get(number, ()):
            while page not in self._present:
                arrived, error = self._read.get()
                if error is not None:
                    raise error
                self._present.add(arrived)

    def _start(self) -> None:
        for number in range(min(_NUM_READERS, max(1, len(self.schedule.slots)))):
            thread = threading.Thread(target=self._read_pages, name=f"ffcv_ops reader {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _read_pages(self) -> None:
        """Read wanted pages until None is wanted; errors travel to whoever waits for pages."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                while (page := self._wanted.get()) is not None and not self._stopping:
                    self._fill(file.fileno(), self.slots[self.schedule.slots[page]], page * self.page_size)
                    self._read.put((page, None))
        except BaseException as error:  # the thread of the epoch raises it
            self._read.put((None, error))

    def _fill(self, file: int, destination: np.ndarray, offset: int) -> None:
        view = memoryview(destination)  # type: ignore[arg-type]
        while len(view):
            num_read = os.preadv(file, [view], offset)
            if num_read == 0:
                raise OSError(f"{self.path}: ends at byte {offset}, within a page: it was cut or replaced while in use")
            view, offset = view[num_read:], offset + num_read

    def check(self) -> None:
        """Nothing to ask: a read that comes short raises."""

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Memory.locate`; a sample that the batch was not planned with, a replacement, is read here."""
        data_ptrs = np.asarray(data_ptrs, dtype=np.uint64)
        sizes = self.regions.sizes[self.regions.find(data_ptrs)]
        pages, offsets = np.divmod(data_ptrs, np.uint64(self.page_size))
        present = np.isin(pages, np.fromiter(self._present, dtype=np.uint64, count=len(self._present)))
        slots = np.zeros(len(pages), dtype=np.uint64)
        slots[present] = self.slot_of_page[pages[present]]
        addresses = slots * np.uint64(self.page_size) + offsets + np.uint64(self.slots.ctypes.data)
        for i in np.flatnonzero(~present):
            region = np.empty(int(sizes[i]), dtype=np.uint8)
            with open(self.path, "rb", buffering=0) as file:
                self._fill(file.fileno(), region, int(data_ptrs[i]))
            self._private.append(region)
            addresses[i] = region.ctypes.data
        return addresses, sizes

    @property
    def storage_state(self) -> tuple[np.ndarray, ...]:
        """What FFCV's decoders hand to their reader."""
        return self.slots, self.regions.ptrs, self.regions.sizes, self.slot_of_page

    def stop(self) -> None:
        """End the reading, also for a thread that waits for pages in `begin_batch`."""
        self._stopping = True
        for _ in self._threads:
            self._wanted.put(None)
        self._read.put((None, RuntimeError(f"{self.path}: reading was stopped: the epoch is closed")))

    def close(self) -> None:
        """End the reading and wait for the threads: they write into the slots."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []


def paged_reader(page_size: int) -> Callable:
    """Return the function by which FFCV's decoders read a region of a `PagedFile`, to be compiled with them."""
    page_size_log2 = np.uint64(page_size.bit_length() - 1)

    def read_paged(address, storage_state):
        row = np.searchsorted(storage_state[1], address, side="right") - 1
        page = address >> page_size_log2
        offset = address - (page << page_size_log2)
        return storage_state[0][storage_state[3][page], offset : offset + storage_state[2][row]]

    return read_paged
