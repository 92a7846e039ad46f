"""Worker processes that answer messages, and that end with the run they work for, however it ends."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# One message to work on and one to begin with when that is answered.
MESSAGES_A_WORKER = 2
_RESULTS_A_WORKER = 8


class WorkerKilled(RuntimeError):
    """A worker process ended that was still needed."""


def num_cpus() -> int:
    """The number of CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that each call one function on message after message and send back what it returns.

    They are started by a fork server, so that they share nothing with this process but a pipe, whose end is theirs:
    ``kill -9`` of this process ends them, and `receive` raises as soon as one of them is gone. Ctrl-C is for this
    process alone.

    Parameters
    ----------
    num_workers : int
    build : callable
        Called once in each process with `args`; returns the function of messages. Both are importable by name.
    preload : sequence of str
        Modules that the fork server imports for all of them, where it has not been started yet.
    """

    def __init__(
        self, num_workers: int, build: Callable[..., Callable[[Any], Any]], *args: Any, preload: Sequence[str] = ()
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([build.__module__, "cv2", "PIL.Image", "ffcv_ops.jpeg", *preload])
        self._outstanding = [0] * num_workers
        self._connections: list[multiprocessing.connection.Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._ready: deque[Any] = deque()
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, build, args), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    @property
    def num_workers(self) -> int:
        """How many processes there are."""
        return len(self._processes)

    def idle(self) -> int | None:
        """The worker with the fewest messages to answer; None if all have enough."""
        worker = min(range(len(self._outstanding)), key=self._outstanding.__getitem__)
        return worker if self._outstanding[worker] < MESSAGES_A_WORKER else None

    def send(self, worker: int, message: Any) -> None:
        """Give a worker a message; it answers its messages in their order."""
        try:
            self._connections[worker].send(message)
        except OSError:
            raise self._killed(worker) from None
        self._outstanding[worker] += 1

    def receive(self) -> tuple[int, Any]:
        """Wait for the next answer of any worker; raises what its function raised, or WorkerKilled."""
        if not self._ready:
            self._ready.extend(multiprocessing.connection.wait(self._connections))
        connection = self._ready.popleft()
        worker = self._connections.index(connection)
        try:
            answer, error = connection.recv()
        except (EOFError, OSError):
            raise self._killed(worker) from None
        self._outstanding[worker] -= 1
        if error is not None:
            raise error
        return worker, answer

    def _killed(self, worker: int) -> WorkerKilled:
        self._processes[worker].join(1)
        return WorkerKilled(f"a worker process ended with exit code {self._processes[worker].exitcode}")

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(
    connection: multiprocessing.connection.Connection, build: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about metadata that nobody reads
    import cv2

    cv2.setNumThreads(1)
    answer = build(*args)
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = connection.recv()
            try:
                reply: tuple[Any, Exception | None] = answer(message), None
            except Exception as error:
                reply = None, error
            connection.send(reply)


def map_in_order(workers: Workers, messages: Iterable[Any]) -> Iterator[Any]:
    """Yield the answers to messages in their order, with a bounded number of them waiting for their turn."""
    rest = enumerate(messages)
    asked: list[deque[int]] = [deque() for _ in range(workers.num_workers)]
    answers: dict[int, Any] = {}
    sent = done = 0
    exhausted = False
    while not exhausted or done < sent:
        worker = workers.idle()
        if worker is not None and not exhausted and sent - done < _RESULTS_A_WORKER * len(asked):
            number, message = next(rest, (-1, None))
            if number < 0:
                exhausted = True
                continue
            workers.send(worker, message)
            asked[worker].append(number)
            sent += 1
            continue
        worker, answer = workers.receive()
        answers[asked[worker].popleft()] = answer
        while done in answers:
            yield answers.pop(done)
            done += 1
