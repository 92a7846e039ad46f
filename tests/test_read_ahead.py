"""Reading ahead: what is in the page cache when a batch begins, what is read of a warm file, and the errors."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from betons import photographs, write_images

from ffcv_ops import CenterCrop, Label, Loader, OrderOption, read_beton
from ffcv_ops.files import ReadError
from ffcv_ops.loading import read_ahead, storage
from ffcv_ops.loading.read_ahead import ReadAhead, values_of

BATCH = 32


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return read_beton(write_images(tmp_path_factory.mktemp("ahead") / "file.beton", photographs(128, side=256)))


@pytest.fixture
def file(beton):
    descriptor = os.open(beton.path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def values_in_order(beton, ids):
    values = values_of(beton.metadata, ["f0"], beton.allocations)
    return lambda number: values(ids[number * BATCH : (number + 1) * BATCH])


def resident(file, offset, size):
    """Return whether all pages of a range are in the page cache, as the kernel tells the owner of the file."""
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    with mmap.mmap(file, offset + size - start, access=mmap.ACCESS_READ, offset=start) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        answer = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), answer) == 0
        del view
    return all(page & 1 for page in answer)


def drop_from_cache(file):
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel reads no neighbours


def wait_until_idle(ahead):
    end_s = time.monotonic() + 60
    while any(reads.num_pending for reads in list(ahead._batches.values())):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_the_values_of_a_batch_are_in_the_cache_when_it_begins(beton, file, monkeypatch):
    monkeypatch.setattr(read_ahead, "_CACHED_NS", -1 << 40)  # storage here may be as fast as memory
    ids = np.random.default_rng(0).permutation(128)
    values = values_in_order(beton, ids)
    drop_from_cache(file)
    if resident(file, *map(int, (part[0] for part in values(3)))):
        pytest.skip("this file system keeps its files in memory")
    ahead = ReadAhead(file, "file.beton", values, 4)
    ahead._window_bytes = 1  # one batch behind the present one
    ahead.begin_batch(0)
    assert all(resident(file, int(offset), int(size)) for offset, size in zip(*values(0), strict=True))
    wait_until_idle(ahead)
    assert ahead.is_cold and not resident(file, *map(int, (part[-1] for part in values(3))))
    for number in range(1, 4):
        ahead.begin_batch(number)
    assert all(resident(file, int(offset), int(size)) for offset, size in zip(*values(3), strict=True))
    assert ahead._num_read <= 128
    ahead.close()


def test_of_a_file_in_the_cache_only_a_few_values_are_read(beton, file, monkeypatch):
    monkeypatch.setattr(read_ahead, "_CACHED_NS", 1 << 40)
    ahead = ReadAhead(file, "file.beton", values_in_order(beton, np.arange(128)), 4)
    for number in range(4):
        ahead.begin_batch(number)
    assert not ahead.is_cold and ahead._num_read == 4 * read_ahead._NUM_TRIED
    ahead.close()


def test_the_threads_double_while_that_makes_reading_faster(beton, file, monkeypatch):
    monkeypatch.setattr(read_ahead, "_MIN_MEASURED_S", 0.0)
    ahead = ReadAhead(file, "file.beton", values_in_order(beton, np.arange(128)), 4)
    ahead._start_threads(8)
    for num_read, num_threads in ((1000, 16), (2000, 32), (2000, 32), (4000, 64), (9000, 64)):
        ahead._num_read, ahead._since_s = num_read, time.perf_counter() - 1
        ahead._adapt()
        assert len(ahead._threads) == num_threads
    ahead.close()


def test_the_error_of_a_read_names_file_place_and_reason(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    one = np.array([4096]), np.array([100])
    with pytest.raises(ReadError, match=r"Is a directory, in the 100 bytes from 4096 on: 'here.beton'"):
        ReadAhead(folder, "here.beton", lambda number: one, 1).begin_batch(0)
    os.close(folder)


def test_a_batch_is_not_ended_by_the_error_of_a_later_one(beton, file):
    sizes = np.array([100])
    ahead = ReadAhead(file, "here.beton", lambda number: (np.array([beton.size_bytes * number]), sizes), 2)
    ahead.begin_batch(0)
    wait_until_idle(ahead)
    with pytest.raises(ReadError, match="here.beton: ends at byte"):
        ahead.begin_batch(1)
    ahead.close()


def test_a_file_that_ends_before_a_value_is_an_error(beton, file):
    beyond = np.array([beton.size_bytes - 10]), np.array([100])
    with pytest.raises(ReadError, match=rf"here.beton: ends at byte {beton.size_bytes}, in the 100 .*: it was cut"):
        ReadAhead(file, "here.beton", lambda number: beyond, 1).begin_batch(0)


def test_after_a_read_that_fails_once_the_rest_is_read_ahead(beton, file, monkeypatch):
    monkeypatch.setattr(read_ahead, "_CACHED_NS", -1 << 40)
    monkeypatch.setattr(read_ahead, "_CHUNK", BATCH)
    drop_from_cache(file)
    values = values_in_order(beton, np.arange(128))
    if resident(file, *map(int, (part[-1] for part in values(0)))):
        pytest.skip("this file system keeps its files in memory")
    read_values, failures = read_ahead._read_values, [3, 0]

    def fail_twice(descriptor, offsets, sizes, *rest):
        if not failures:
            return read_values(descriptor, offsets, sizes, *rest)
        failed = failures.pop(0)
        return read_values(descriptor, offsets[:failed], sizes[:failed], *rest)[0], failed

    monkeypatch.setattr(read_ahead, "_read_values", fail_twice)
    ahead = ReadAhead(file, "file.beton", values, 1)
    ahead.is_cold = True
    ahead.begin_batch(0)
    assert not failures, "the second failure was in the values behind the first one"
    assert all(resident(file, int(offset), int(size)) for offset, size in zip(*values(0), strict=True))
    ahead.close()


def test_stopping_wakes_the_thread_that_waits(beton, file):
    ahead = ReadAhead(file, "file.beton", values_in_order(beton, np.arange(128)), 4)
    ahead.close()
    with pytest.raises(RuntimeError, match="the epoch is closed"):
        ahead.begin_batch(0)


@pytest.mark.parametrize("is_larger", [False, True])
def test_a_file_that_is_larger_than_memory_is_mapped_for_random_reads(beton, monkeypatch, is_larger):
    monkeypatch.setattr(storage, "available_bytes", lambda: beton.size_bytes - is_larger)
    mapped = storage.MappedFile(beton.path, beton.allocations)
    storage.MappedEpoch(mapped, ReadAhead(mapped.file, "file.beton", values_in_order(beton, np.arange(128)), 4))
    maps = Path("/proc/self/smaps").read_text().partition(str(beton.path))[2]
    flags = next(line for line in maps.splitlines() if line.startswith("VmFlags:"))
    assert ("rr" in flags.split()) == is_larger


def test_every_offset_in_a_fields_metadata_is_a_value(beton):
    ids = np.array([5, 3, 99])
    offsets, sizes = values_of(beton.metadata, ["f0", "f1"], beton.allocations)(ids)
    assert offsets.tolist() == beton.metadata["f0"]["data_ptr"][ids].tolist()
    assert sizes.tolist() == beton.allocations.sizes_at(offsets.astype(np.uint64)).tolist()
    assert [len(part) for part in values_of(beton.metadata, ["f1"], beton.allocations)(ids)] == [0, 0]


def test_an_epoch_reads_every_value_ahead_and_leaves_no_thread(beton, monkeypatch):
    monkeypatch.setattr(read_ahead, "_CACHED_NS", -1 << 40)
    read = read_ahead._read_values
    monkeypatch.setattr(read_ahead, "_read_values", lambda *args: (time.sleep(0.02), read(*args))[1])
    made = []
    start = ReadAhead.__init__
    monkeypatch.setattr(ReadAhead, "__init__", lambda self, *args: (made.append(self), start(self, *args))[1])
    pipelines = {"image": [CenterCrop(32)], "label": [Label()]}
    with Loader(beton, BATCH, 2, order=OrderOption.RANDOM, seed=1, pipelines=pipelines) as loader:
        assert sum(len(labels) for _, labels in loader) == 128
        assert loader.storage_wait_s > 0
    (ahead,) = made
    assert ahead._next == 4 and not ahead._batches and ahead._num_read <= 128
    assert not any(thread.is_alive() for thread in ahead._threads)
