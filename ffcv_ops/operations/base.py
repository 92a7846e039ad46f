"""How operations of ours run: a batch's context, and the workers.

FFCV compiles each operation with ``parallel=True``: the batch is cut into equal shares, every sample has its own
scratch, and no exception leaves the kernel. Here a pool of Python threads calls one ``nogil`` kernel each; a worker
takes the next sample from a shared counter, so that a slow sample delays nobody, scratch belongs to a worker, and
exceptions propagate.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, config
from numba.extending import intrinsic

from ffcv_ops import rng
from ffcv_ops._ffcv import Operation
from ffcv_ops._kernels import kernel

# A counter set to this value tells every worker that there is nothing left to take.
_NOTHING_LEFT = np.int64(1) << 62


@intrinsic
def _fetch_and_add_one(typing_context: Any, counter: Any) -> tuple[Any, Callable[..., Any]]:
    """Atomically add one to ``counter[0]`` and return its value before."""
    if not (isinstance(counter, nb.types.Array) and counter.dtype == nb.int64 and counter.mutable):
        raise nb.errors.TypingError(f"take() needs a writable int64 array, not {counter}")

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return nb.int64(counter), codegen


if config.DISABLE_JIT:  # type: ignore[attr-defined]
    _take_lock = threading.Lock()

    def take(counter: np.ndarray) -> int:
        """Take the next sample position (the interpreted twin of the compiled `take`)."""
        with _take_lock:
            position = int(counter[0])
            counter[0] += 1
        return position
else:

    @kernel
    def take(counter: np.ndarray) -> int:
        """Take the next sample position: an atomic fetch-and-add, for use inside kernels.

        Parameters
        ----------
        counter : int64 array (1,)
            The counter that `Batch.run` hands to a kernel.

        Returns
        -------
        int64
            The counter's value before; at or above the number of samples when none is left.
        """
        return _fetch_and_add_one(counter)  # type: ignore[call-arg]


class SampleError(ValueError):
    """Samples that could not be decoded.

    Parameters
    ----------
    failures : sequence of (int, str)
        Sample id in the file and what is wrong with it, one pair a sample.
    file : str, optional
        The file the samples are in; the loader fills it in.
    """

    def __init__(self, failures: Sequence[tuple[int, str]], file: str | None = None):
        super().__init__(list(failures), file)
        self.failures = [(int(sample_id), message) for sample_id, message in failures]
        self.file = file

    def __str__(self) -> str:
        shown = "; ".join(f"sample {sample_id}: {message}" for sample_id, message in self.failures[:5])
        more = f"; and {len(self.failures) - 5} more" if len(self.failures) > 5 else ""
        return f"{self.file + ': ' if self.file else ''}{shown}{more}"


def _serve(worker: int, inbox: SimpleQueue, outcomes: SimpleQueue) -> None:
    """Run the tasks of one worker thread until it is sent None."""
    while True:
        task = inbox.get()
        if task is None:
            return
        kernel, counter, args = task
        outcome = None
        try:
            kernel(worker, counter, *args)
        except BaseException as error:  # whatever it is, the caller of run() raises it
            counter[0] = _NOTHING_LEFT
            outcome = error
        # Only what is running may keep a batch's arrays alive.
        del task, kernel, counter, args
        outcomes.put(outcome)
        del outcome


def _dismiss(inboxes: list[SimpleQueue]) -> None:
    for inbox in inboxes:
        inbox.put(None)


class WorkerPool:
    """A fixed number of workers: the calling thread is worker 0, the others are threads started at the first run.

    Parameters
    ----------
    num_workers : int
        Number of workers, at least 1.

    Notes
    -----
    One run at a time. The threads end on `close`, or when the pool is garbage collected.
    """

    def __init__(self, num_workers: int):
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        self.num_workers = num_workers
        self._inboxes: list[SimpleQueue] = []
        self._outcomes: SimpleQueue = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._counter: np.ndarray | None = None
        self._stopped = False

    def _start(self) -> None:
        self._inboxes = [SimpleQueue() for _ in range(self.num_workers - 1)]
        for worker, inbox in enumerate(self._inboxes, start=1):
            thread = threading.Thread(
                target=_serve, args=(worker, inbox, self._outcomes), name=f"ffcv_ops worker {worker}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        weakref.finalize(self, _dismiss, self._inboxes)

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        """Call ``kernel(worker, counter, *args)`` once on every worker; return when all are done.

        Parameters
        ----------
        kernel : callable
            Usually a compiled ``nogil`` function. ``worker`` is 0..num_workers-1, ``counter`` an int64 array (1,),
            zero at the start, that all share.

        Raises
        ------
        BaseException
            The first exception of any worker. The others are told that no sample is left and waited for.
        """
        self._refuse_if_stopped()
        if not self._threads and self.num_workers > 1:
            self._start()
        counter = np.zeros(1, dtype=np.int64)
        self._counter = counter
        for inbox in self._inboxes:
            inbox.put((kernel, counter, args))
        first: BaseException | None = None
        try:
            kernel(0, counter, *args)
        except BaseException as error:
            counter[0] = _NOTHING_LEFT
            first = error
        for _ in self._inboxes:
            outcome = self._wait_for_one(counter)
            first = first or outcome
        self._counter = None
        self._refuse_if_stopped()
        if first is not None:
            try:
                raise first
            finally:
                del first  # a frame in its own traceback would keep the batch alive until the cycle is collected

    def _wait_for_one(self, counter: np.ndarray) -> BaseException | None:
        """Wait until one more worker is done, whatever interrupts the wait: workers write into the caller's arrays."""
        interrupt: BaseException | None = None
        while True:
            try:
                outcome = self._outcomes.get()
                return interrupt or outcome
            except KeyboardInterrupt as error:
                counter[0] = _NOTHING_LEFT
                interrupt = error

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise RuntimeError("the workers were stopped: the loader or its epoch is closed")

    def stop(self) -> None:
        """Make a run in progress in another thread end early, and raise there, as every later run does."""
        self._stopped = True
        counter = self._counter
        if counter is not None:
            counter[0] = _NOTHING_LEFT

    def close(self) -> None:
        """End the threads and wait for them."""
        self._stopped = True
        _dismiss(self._inboxes)
        for thread in self._threads:
            thread.join()
        self._inboxes, self._threads = [], []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Memory(Protocol):
    """What a batch needs: the addresses of its samples."""

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map pointers in the file, uint64 (N,), to absolute addresses and sizes in bytes, each uint64 (N,)."""


class Batch:
    """What an operation learns of the batch it works on.

    Parameters
    ----------
    seed, epoch : int
        The loader's seed and the epoch's number.
    sample_ids : ndarray int64 (N,)
        Ids in the file.
    pool : WorkerPool
        The workers that `run` uses.
    memory : Memory
        Where the samples' bytes are.
    copies : ndarray int64 (N,), optional
        Number of the copy of each sample under repeated augmentation; zeros when not given.

    Attributes
    ----------
    num_workers : int
        Number of workers: the ``worker`` of a kernel is below it, so scratch can be one entry a worker.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        sample_ids: np.ndarray,
        pool: WorkerPool,
        memory: Memory,
        copies: np.ndarray | None = None,
    ):
        self.seed = int(seed)
        self.epoch = int(epoch)
        self.sample_ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
        self.copies = np.zeros_like(self.sample_ids) if copies is None else np.ascontiguousarray(copies, dtype=np.int64)
        self.num_workers = pool.num_workers
        self._pool = pool
        self._memory = memory

    def locate(self, data_ptrs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the bytes of samples, whether mapped (``os_cache``) or read into this process.

        Parameters
        ----------
        data_ptrs : ndarray uint64 (N,)
            Pointers in the file, as the fields' metadata have them, of samples of this batch.

        Returns
        -------
        addresses : ndarray uint64 (N,)
            Absolute memory addresses, valid while the batch is being prepared.
        sizes_bytes : ndarray uint64 (N,)

        Raises
        ------
        ValueError
            When the allocation table does not know a pointer.
        """
        return self._memory.locate(data_ptrs)

    def draw_uniforms(self, stream: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return random numbers for each sample of the batch; see `rng.draw_uniforms`."""
        return rng.draw_uniforms(self.seed, self.epoch, self.sample_ids, self.copies, stream, shape)

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        """Call ``kernel(worker, counter, *args)`` once on every worker; see `WorkerPool.run`.

        A kernel reads::

            while True:
                i = take(counter)
                if i >= len(sample_ids):
                    break
                ...
        """
        self._pool.run(kernel, *args)


class BatchOperation(Operation):
    """Base class of our operations; they go into the same pipelines as FFCV's.

    ``declare_state_and_memory`` is FFCV's and is asked at the start of every epoch, so that a size changed between
    epochs counts.
    ``generate_code`` returns an ordinary Python callable, which is never compiled (kernels inside it are):

    - a decoder's is ``fn(sample_ids, destination, field_metadata, batch)``,
    - a transform's is ``fn(inputs, destination, batch)``,

    where ``destination`` is what was asked for in the AllocationQuery, cut to the batch (a tuple if a tuple was asked
    for, None if nothing was), and ``batch`` a `Batch`. Both return the array or tensor that the next operation gets. A
    decoder raises `SampleError` for bad samples.

    In a pipeline that reads a field, the first operation, if it is one of ours, is the decoder.
    """

    def close(self) -> None:
        """Free what belongs to the workers; called when the loader is closed or garbage collected."""
