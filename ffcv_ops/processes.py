"""Worker processes that end with the run they work for, however it ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")
_TASKS_A_WORKER = 4


def num_cpus() -> int:
    """The number of CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `num_workers` processes that ignore Ctrl-C and end when this process does, be it by ``kill -9``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ffcv_ops.writer", "cv2", "PIL.Image"])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import cv2

    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def map_in_order(
    pool: ProcessPoolExecutor, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], num_workers: int
) -> Iterator[Result]:
    """Yield ``function(*task)`` for every task, in their order, with a bounded number of them in flight."""
    pending: deque[Future[Result]] = deque()
    for task in tasks:
        pending.append(pool.submit(function, *task))
        if len(pending) > _TASKS_A_WORKER * num_workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
