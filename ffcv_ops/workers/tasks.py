"""Run tasks on an executor, in order, within a window, and find the task that ends its workers."""

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Protocol

from ffcv_ops.machine import allowed_cpus

# Results wait for their turn. The number of tasks that are not yet used is this number for each worker.
TASKS_A_WORKER = 4
# A lost task runs alone so often, before it counts as the cause.
_TRIES_ALONE = 2


class WorkerKilled(RuntimeError):
    """The end of a worker process or machine that was still needed."""


class NoWorkers(RuntimeError):
    """The end of all workers, or of the connection to them."""


class Task(Protocol):
    """A function without arguments and side effects. An executor may run it several times."""

    def __call__(self) -> Any: ...

    def split(self) -> "Sequence[Task]":
        """Return the tasks of single images, which together do the work of this task."""

    def join(self, results: list[Any]) -> Any:
        """Return the result of this task from the results of `split`."""

    def name(self) -> str:
        """Return the name of the task for a message."""


def count_workers(executor: Executor) -> int:
    """Return the number of tasks that an executor runs at a time. It is a guess for an unknown kind of executor.

    An executor may have a property ``num_workers``, as ours and those of mpi4py. It may change with time.
    """
    for name in ("num_workers", "_max_workers"):
        if isinstance(count := getattr(executor, name, None), int):
            return max(1, count)
    return allowed_cpus()


def run_in_order(
    executor: Executor,
    tasks: Iterable[Task],
    num_workers: int | None = None,
    max_waiting: int | None = None,
) -> Generator[Any, None, None]:
    """Yield the results of tasks in the order of the tasks.

    If a task ends its worker, or ran beside one that did, no further task is sent until all others are done. The parts
    of the task then run one at a time, so that the guilty part has no company.

    Parameters
    ----------
    executor : Executor
        Raises `WorkerKilled` for a task whose worker ended.
    tasks : iterable of Task
    num_workers : int, optional
        The number of tasks that the executor runs at a time. By default `count_workers` is asked again and again.
    max_waiting : int, optional
        The largest number of tasks that are sent and not yet used, for the sake of memory.

    Raises
    ------
    WorkerKilled
        If a part of a task ends its worker each time it runs alone. The message names the part.
    NoWorkers
        If the executor cancels a task, because it was shut down or has lost its workers.
    Exception
        If a task raised it.
    """
    done: SimpleQueue[Future] = SimpleQueue()
    numbered = enumerate(tasks)
    running: dict[Future, tuple[int, Task]] = {}
    lost: list[tuple[int, Task]] = []
    results: dict[int, Any] = {}
    num_sent = num_used = 0
    exhausted = False

    def has_room() -> bool:
        room = TASKS_A_WORKER * (num_workers or count_workers(executor))
        return num_sent - num_used < (min(room, max_waiting) if max_waiting else room)

    try:
        while True:
            while not exhausted and not lost and has_room():
                number, task = next(numbered, (-1, None))
                if task is None:
                    exhausted = True
                    break
                future = executor.submit(task)
                running[future] = number, task
                future.add_done_callback(done.put)
                num_sent += 1
            if running:
                future = done.get()
                number, task = running.pop(future)
                try:
                    results[number] = _result(future)
                except WorkerKilled:
                    lost.append((number, task))
                del future, task
            for number, task in [] if running else lost:
                results[number] = task.join([_run_alone(executor, part) for part in task.split()])
            if not running:
                lost.clear()
            while num_used in results:
                yield results.pop(num_used)
                num_used += 1
            if exhausted and not running and num_used == num_sent:
                return
    finally:
        for future in running:
            with suppress(Exception):
                future.cancel()


def _result(future: Future) -> Any:
    try:
        return future.result()
    except CancelledError:
        raise NoWorkers("the executor has cancelled a task") from None


def _run_alone(executor: Executor, part: Task) -> Any:
    for tries_left in reversed(range(_TRIES_ALONE)):
        try:
            return _result(executor.submit(part))
        except WorkerKilled as error:
            if not tries_left:
                raise WorkerKilled(
                    f"{part.name()}: its worker ends each time, also without other work ({error})"
                ) from error
