"""One epoch: a thread that produces its batches, and the iterator that returns them."""

from __future__ import annotations

import atexit
import itertools
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

import numba as nb
import numpy as np
import torch
from numba.core import config

from ffcv_ops.loading.graph import ReturnedBatch, returned_batch
from ffcv_ops.loading.order import replace_bad
from ffcv_ops.operations.base import Batch, SampleError
from ffcv_ops.operations.threads import WorkerPool

if TYPE_CHECKING:
    from ffcv_ops.loading.loader import Loader

# The most times that a batch is prepared, because a replacement may be bad too.
_MAX_ATTEMPTS = 50
# The most batches that a consumer may hold when it requests the next. With one more, the loader returns copies.
_MAX_HELD = 2


@dataclass
class _Prepared:
    """A batch that is ready for the consumer."""

    slot: int
    result: tuple
    num_replaced: int
    returned: ReturnedBatch | None  # None: the result is a copy


class EpochProducer:
    """The production of one epoch's batches: the state that its thread and its iterator share.

    Parameters
    ----------
    loader : Loader
    epoch : int
    ids : ndarray int (N,)
        The sample ids of all batches, one batch behind the other.
    copies : ndarray int (N,) or None
        The numbers of the samples' copies. None: all 0.
    """

    def __init__(self, loader: Loader, epoch: int, ids: np.ndarray, copies: np.ndarray | None):
        self.loader = loader
        self.epoch = epoch
        self.ids = ids
        self.copies = copies
        self.stopping = False
        self._num_done = itertools.count()
        self.ready: SimpleQueue = SimpleQueue()
        self.free: SimpleQueue = SimpleQueue()
        self.pool = WorkerPool(loader.num_workers)
        self.buffers = loader._take_buffers()
        try:
            self.storage = loader._open_storage(ids, self.buffers)
        except BaseException:
            loader._spare = self.buffers
            raise
        # The device may still work on the last epoch's batches. The thread waits for it before it writes over them.
        released = self.buffers.now()
        held = {batch.slot for batch in self.buffers.returned}
        for slot in range(self.buffers.num_slots):
            if slot not in held:
                self.free.put((slot, released))
        self.thread = threading.Thread(target=self._produce, name=f"ffcv_ops epoch {epoch}", daemon=True)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.ids) // self.loader.batch_size)

    def stop(self) -> None:
        """Make the thread end soon. This does not wait, because garbage collection may call it in any thread."""
        self.stopping = True
        self.pool.stop()
        self.storage.stop()
        self.free.put(None)

    def leave(self) -> None:
        """Stop, because the consumer needs no more batches. Call this once."""
        self.stop()
        self._done_with_buffers()

    def _done_with_buffers(self) -> None:
        """Give the buffers back at the second call. The thread and the consumer each call this once."""
        if next(self._num_done) == 1 and not self.loader._closed:
            self.loader._spare = self.buffers

    def _produce(self) -> None:
        """Prepare all batches for the consumer. Put None last, or the exception that ended the thread."""
        last: BaseException | None = None
        try:
            if self.loader._steps.is_compiled:
                nb.set_num_threads(min(self.loader.num_workers, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            for number in range(len(self)):
                slot_and_event = self.free.get()
                if slot_and_event is None or self.stopping:
                    break
                self.ready.put(self._prepare(number, *slot_and_event))
        except BaseException as error:  # the consumer raises it
            last = error
        try:
            self.pool.close()
            self.storage.close()
            self.buffers.finish()
        except BaseException as error:
            last = last or error
        self._done_with_buffers()
        self.ready.put(last)
        del last  # its traceback holds this frame: without this, the cycle would keep the buffers alive

    def _prepare(self, number: int, slot: int, released: Any) -> _Prepared:
        if released is not None:
            # The host writes into the slot next. So the host has to wait for copies out of the slot, not a stream.
            released.synchronize()
        total_s, since_s = self.loader.storage_wait_s, time.perf_counter()
        self.loader._storage_wait = total_s, since_s
        try:
            self.storage.begin_batch(number)
        finally:
            # A file in the page cache keeps nobody waiting: threads that try it may only wait for a CPU.
            waited_s = time.perf_counter() - since_s if self.storage.is_cold else 0.0
            self.loader._storage_wait = total_s + waited_s, None
        with self.buffers.on_stream(slot):
            part = slice(number * self.loader.batch_size, (number + 1) * self.loader.batch_size)
            wanted = self.ids[part].astype(np.int64)
            copies = np.zeros_like(wanted) if self.copies is None else self.copies[part].astype(np.int64)
            ids, result = self._run_with_replacements(wanted, copies, slot)
            if self.loader.copy:
                result, returned = tuple(_copied(part) for part in result), None
            else:
                result, returned = returned_batch(slot, result)
        return _Prepared(slot, result, int(np.count_nonzero(ids != wanted)), returned)

    def _run_with_replacements(self, wanted: np.ndarray, copies: np.ndarray, slot: int) -> tuple[np.ndarray, tuple]:
        """Run the pipelines on a batch. Under ``on_error="skip"`` replace bad samples and run them again.

        Every batch starts with an empty list of bad samples, for two reasons. A sample may be bad in one region only,
        and each epoch decodes another region. And a resumed epoch, which has not seen the batches before, must draw
        the same replacements.

        Returns
        -------
        ids : ndarray int64
            The samples that the batch is made of.
        result : tuple
            The results of the pipelines.

        Raises
        ------
        SampleError
            Under ``on_error="raise"``, or if no good sample was found.
        """
        loader = self.loader
        bad: dict[int, str] = {}
        num_attempts = 0
        while True:
            num_attempts += 1
            ids = wanted
            if bad:
                ids = replace_bad(wanted, copies, bad, loader.indices, seed=loader.seed, epoch=self.epoch)
            try:
                return ids, self._run(ids, copies, slot)
            except SampleError as error:
                self.storage.check()  # in a file that was cut, no sample is to blame
                error.file = loader.fname
                if (
                    loader.on_error == "raise"
                    or num_attempts == _MAX_ATTEMPTS
                    or bad.keys() >= dict(error.failures).keys()
                ):
                    raise
                bad.update(error.failures)
                loader.skipped.update(error.failures)

    def _run(self, ids: np.ndarray, copies: np.ndarray, slot: int) -> tuple:
        """Run the pipelines on a batch, and check that the file is as long as before."""
        batch = Batch(self.loader.seed, self.epoch, ids, self.pool, self.storage, copies)
        result = self.loader._steps.run(batch, self.buffers, slot, self.storage.storage_state)
        self.storage.check()
        return result


def _copied(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.clone()
    return part.copy() if isinstance(part, np.ndarray) else part


def _keep_for_this_stream(result: tuple) -> None:
    """Let the current stream finish its work on copied batches before a slot's stream gets their memory."""
    for part in result:
        if isinstance(part, torch.Tensor) and part.is_cuda:
            part.record_stream(torch.cuda.current_stream(part.device))


_producers: weakref.WeakSet[EpochProducer] = weakref.WeakSet()


def _stop_all() -> None:
    """End all epochs before the interpreter ends. A kernel in a daemon thread would use memory that is gone."""
    producers = list(_producers)
    for producer in producers:
        producer.stop()
    for producer in producers:
        producer.thread.join(timeout=10)


atexit.register(_stop_all)


class EpochIterator(Iterator):
    """The batches of one epoch; made by `Loader.epoch`.

    The epoch's threads end when the last reference to the iterator is dropped, as ``break`` does in a plain loop. If a
    name holds the iterator, call `close`, which also waits for the threads. ``len()`` is the number of batches from the
    start of this iterator, including those that it has returned.
    """

    def __init__(self, producer: EpochProducer):
        self._producer = producer
        self._finished = False
        self._num_replaced = 0
        self._finalizer = weakref.finalize(self, producer.leave)
        self._finalizer.atexit = False
        _producers.add(producer)
        producer.thread.start()

    def __len__(self) -> int:
        return len(self._producer)

    def __iter__(self) -> EpochIterator:
        return self

    def __next__(self) -> tuple:
        if self._finished:
            raise StopIteration
        producer, loader = self._producer, self._producer.loader
        self._free_slots()
        started = time.perf_counter()
        prepared = self._wait()
        loader.wait_s += time.perf_counter() - started
        if not isinstance(prepared, _Prepared):
            self._end(prepared)
        self._num_replaced += prepared.num_replaced
        loader.num_skipped += prepared.num_replaced
        producer.buffers.join(prepared.slot)
        result = prepared.result
        if prepared.returned is None:
            _keep_for_this_stream(result)
        elif loader.copy:  # since this batch was prepared
            with torch.inference_mode(False):
                result = tuple(_copied(part) for part in result)
        else:
            producer.buffers.returned.append(prepared.returned)
            return result
        producer.free.put((prepared.slot, producer.buffers.now()))
        return result

    def _free_slots(self) -> None:
        """Free the slots of the returned batches that the consumer does not hold any more.

        A plain loop holds the last batch until it has the next one. A loop that prefetches holds one more. A consumer
        that holds more than these collects batches. Then the loader returns copies, because the slots would run out.
        """
        producer, loader = self._producer, self._producer.loader
        # The consumer has queued all its work on these batches, or it would not have dropped them.
        released = producer.buffers.now()
        for batch in producer.buffers.take_dropped():
            producer.free.put((batch.slot, released))
        if len(producer.buffers.returned) > _MAX_HELD:
            loader.copy = True

    def _end(self, error: BaseException | None) -> NoReturn:
        """Raise the error that ended the epoch, or StopIteration."""
        self.close()
        if error is None:
            if self._num_replaced:
                warnings.warn(
                    f"{self._producer.loader.fname}: epoch {self._producer.epoch}: others stood in for samples that "
                    f"cannot be decoded, {self._num_replaced} times; loader.skipped has their ids and the reasons",
                    stacklevel=3,
                )
            raise StopIteration
        try:
            if isinstance(error, StopIteration):  # a `for` would take it for the end of the epoch
                raise RuntimeError("an operation raised StopIteration, see above") from error
            raise error
        finally:
            del error  # its traceback holds this frame

    def _wait(self) -> _Prepared | BaseException | None:
        producer = self._producer
        while True:
            try:
                return producer.ready.get(timeout=5)
            except Empty:
                if not producer.thread.is_alive() and producer.ready.empty():
                    raise RuntimeError(
                        "the loader's thread is gone: was this process forked during an epoch?"
                    ) from None

    def close(self) -> None:
        """End the epoch and wait for its threads. The iterator returns no more batches."""
        self._finished = True
        self._finalizer()
        self._producer.thread.join()
