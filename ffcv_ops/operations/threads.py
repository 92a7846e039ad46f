"""The workers of a loader, and the counter from which a worker takes its next sample.

FFCV compiles each operation with ``parallel=True``. Then every worker gets an equal share of the batch, every sample
needs its own scratch, and no exception leaves the kernel. Here every thread of a pool calls one ``nogil`` kernel, and a
worker takes its next sample from a shared counter. So a slow sample delays no other sample, scratch belongs to a
worker, and exceptions reach the caller.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, config
from numba.extending import intrinsic

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
