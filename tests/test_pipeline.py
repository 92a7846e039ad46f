"""Workers and what they share: every sample once, exceptions raised, threads ended; and where a sample's bytes are."""

import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import time

import numba as nb
import numpy as np
import pytest

from ffcv_ops.beton.allocations import AllocationTable
from ffcv_ops.beton.reading import read_beton
from ffcv_ops.errors import UserError
from ffcv_ops.loading.storage import MappedFile, PagedFile, open_for, paged_reader, schedule_pages
from ffcv_ops.operations.base import Batch, SampleError
from ffcv_ops.operations.threads import WorkerPool, take
from tests.betons import PAGE_SIZE, jpeg_bytes, photographs, write_images


@nb.njit(nogil=True)
def count_into(worker, counter, counts, by_whom):
    while True:
        i = take(counter)
        if i >= len(counts):
            break
        counts[i] += 1
        by_whom[i] = worker


def num_threads_named(name):
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_every_position_is_taken_once(num_workers):
    with WorkerPool(num_workers) as pool:
        counts = np.zeros(200_000, np.int64)
        by_whom = np.full(len(counts), -1)
        for repeat in range(1, 4):
            pool.run(count_into, counts, by_whom)
            assert (counts == repeat).all()
        assert by_whom.min() >= 0 and by_whom.max() < num_workers


def test_take_refuses_other_counters():
    @nb.njit
    def taken(counter):
        return take(counter)

    assert taken(np.array([7])) == 7
    with pytest.raises(nb.errors.TypingError, match="int64"):
        taken(np.array([7.0]))


def test_the_interpreted_kernel_takes_every_position_once():
    code = f"""
import numpy as np
from ffcv_ops.operations.threads import WorkerPool, take
{inspect.getsource(count_into.py_func).replace("@nb.njit(nogil=True)", "")}
with WorkerPool(3) as pool:
    counts, by_whom = np.zeros(1000, np.int64), np.zeros(1000, np.int64)
    pool.run(count_into, counts, by_whom)
    assert (counts == 1).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, timeout=120)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_exception_of_any_worker_is_raised_and_the_others_end(failing):
    seen = []

    def kernel(worker, counter, num_positions):
        if worker == failing:
            raise KeyError("from a worker")
        while take(counter) < num_positions:
            time.sleep(0.001)
        seen.append(worker)

    with WorkerPool(3) as pool:
        with pytest.raises(KeyError, match="from a worker") as caught:
            pool.run(kernel, 10**6)
        assert "kernel" in [entry.name for entry in caught.traceback]
        assert sorted(seen) == sorted({0, 1, 2} - {failing})
        counts = np.zeros(100, np.int64)
        pool.run(count_into, counts, counts.copy())
        assert (counts == 1).all()


def test_compiled_exceptions_are_raised():
    @nb.njit(nogil=True)
    def kernel(worker, counter):
        if worker == 1:
            raise ValueError("from a kernel")

    with WorkerPool(2) as pool, pytest.raises(ValueError, match="from a kernel"):
        pool.run(kernel)


def test_stop_ends_a_run_early():
    entered = threading.Event()

    def kernel(worker, counter):
        entered.set()
        while take(counter) < 10**9:
            time.sleep(0.001)

    pool = WorkerPool(2)
    threading.Thread(target=lambda: (entered.wait(), pool.stop())).start()
    with pytest.raises(RuntimeError, match="stopped"):
        pool.run(kernel)
    pool.close()
    with pytest.raises(RuntimeError, match="stopped"):
        pool.run(kernel)


def test_threads_end_on_close_and_with_the_pool():
    before = num_threads_named("ffcv_ops worker")
    kept, dropped = WorkerPool(4), WorkerPool(4)
    for pool in (kept, dropped):
        pool.run(lambda worker, counter: None)
    del pool
    assert num_threads_named("ffcv_ops worker") == before + 6
    kept.close()
    assert num_threads_named("ffcv_ops worker") == before + 3
    del dropped
    gc.collect()
    assert wait_until(lambda: num_threads_named("ffcv_ops worker") == before)


def test_a_pool_needs_a_worker():
    with pytest.raises(ValueError, match="num_workers is 0"):
        WorkerPool(0)


def test_sample_errors_name_samples_and_file_and_survive_pickling():
    error = SampleError([(i, "cut") for i in range(7)], "train.beton")
    copied = pickle.loads(pickle.dumps(error))
    assert copied.failures == error.failures
    assert str(copied) == str(error)
    assert str(error).startswith("train.beton: sample 0: cut; sample 1: cut") and "2 more" in str(error)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    images = photographs(11)
    return read_beton(write_images(tmp_path_factory.mktemp("pipeline") / "small.beton", images, per_page=3)), images


def bytes_at(address, size):
    import ctypes

    return ctypes.string_at(int(address), int(size))


def check_located(beton, images, storage, sample_ids):
    with WorkerPool(1) as pool:
        batch = Batch(0, 0, sample_ids, pool, storage)
        addresses, sizes = batch.locate(beton.metadata["f0"]["data_ptr"][sample_ids])
    for sample_id, address, size in zip(sample_ids, addresses, sizes, strict=True):
        assert bytes_at(address, size) == jpeg_bytes(images[sample_id]).tobytes()


def test_a_mapped_file_locates_every_sample(small):
    beton, images = small
    check_located(beton, images, MappedFile(beton.path, beton.allocations), np.arange(11)[::-1])


def test_a_table_in_any_order_is_the_same_table(small):
    beton, images = small
    rows = beton.alloc_table[[4, 1, 0, 9, 3, 2, 10, 5, 7, 8, 6]]
    mixed = AllocationTable(rows["ptr"], rows["size"], rows["sample_id"]).in_order()
    assert mixed.sample_ids.tolist() == list(range(11))
    check_located(beton, images, MappedFile(beton.path, mixed), np.arange(11))


def test_an_unknown_pointer_is_refused(small):
    beton, _ = small
    storage = MappedFile(beton.path, beton.allocations)
    for pointer in (0, int(beton.alloc_table["ptr"][2]) + 1, 2**63):
        with pytest.raises(UserError, match=f"no region at byte {pointer}"):
            storage.locate(np.array([pointer], np.uint64))


def open_paged(beton, batches):
    table, file = beton.allocations, open_for(beton, beton.path)
    schedule = schedule_pages(table, PAGE_SIZE, batches)
    return PagedFile(beton.path, file, table, PAGE_SIZE, schedule, np.empty((schedule.num_slots, PAGE_SIZE), np.uint8))


def test_a_paged_file_locates_scheduled_and_other_samples(small):
    beton, images = small
    batches = [np.array([0, 1, 2]), np.array([10, 3, 4]), np.array([5, 0, 9])]
    memory = open_paged(beton, batches)
    try:
        for number, batch in enumerate(batches):
            memory.begin_batch(number)
            check_located(beton, images, memory, batch)
            check_located(beton, images, memory, np.array([batch[0], 7]))
    finally:
        memory.close()
    assert num_threads_named("ffcv_ops reader") == 0


def test_a_pointer_to_a_page_that_is_not_planned_leads_to_no_memory_of_others(small):
    """FFCV's decoders follow the pointer of an empty value to whatever stands behind it."""
    beton, _ = small
    memory = open_paged(beton, [np.array([0])])
    last = beton.alloc_table[-1]
    assert paged_reader(PAGE_SIZE)(last["ptr"], memory.storage_state).size == last["size"]


def test_pages_are_read_once_into_few_slots(small):
    beton, _ = small
    batches = [np.array([i]) for i in range(11)] + [np.array([0])]
    schedule = schedule_pages(beton.allocations, PAGE_SIZE, batches)
    assert sorted(page for pages in schedule.reads.values() for page in pages) == [1, 2, 3, 4]
    assert schedule.num_slots == 3  # the first page stays, another is in use, a third is read ahead
    assert schedule_pages(beton.allocations, PAGE_SIZE, []).num_slots == 0


def test_a_file_cut_in_use_is_an_error_not_zeros(small, tmp_path):
    beton, images = small
    write_images(tmp_path / "cut.beton", images, per_page=3)
    cut = read_beton(tmp_path / "cut.beton")
    os.truncate(cut.path, 3 * PAGE_SIZE + 10)
    memory = open_paged(cut, [np.array([9])])
    try:
        with pytest.raises(OSError, match="cut or replaced"):
            memory.begin_batch(0)
    finally:
        memory.close()
