"""Run worker processes that answer messages. They end with the run they work for, even if it is killed."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.files import write_all
from ffcv_ops.machine import cpus_per_rank

if TYPE_CHECKING:
    from ffcv_ops.workers import ranks

# A worker has one message to work on, and one to begin with after its answer.
MESSAGES_A_WORKER = 2
_RESULTS_A_WORKER = 8
_END = object()


# Exit status of a worker that found its script without a guard.
_NO_GUARD = 78


class WorkerKilled(RuntimeError):
    """The end of a worker process that was still needed."""


class WorkerTraceback(Exception):
    """The cause of an error that a worker process raised: the traceback as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def choose_num_workers(num_workers: int) -> int:
    """Return the number of workers for a setting; -1 stands for `cpus_per_rank`. Raise UserError for 0 workers."""
    if num_workers != -1 and num_workers < 1:
        raise UserError(f"num_workers must be -1 (all CPUs) or at least 1, not {num_workers}")
    return cpus_per_rank() if num_workers == -1 else num_workers


def end_if_imported() -> None:
    """End this process if it is a worker that imports the user's script: the script starts workers without a guard."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_NO_GUARD)


class Workers:
    """Processes that each call one function on message after message and send back its results.

    A fork server starts the processes, so they share only a pipe with this process. If this process is killed, its end
    of the pipe closes and the workers end. If a worker ends, `receive` raises at once. Workers ignore Ctrl-C and
    SIGHUP.

    Parameters
    ----------
    num_workers : int
    build : callable
        Called once in each process with `args`. It returns the function of messages. Both are importable by name.
    leader : Leader, optional
        The other ranks. Their workers count too, after the `num_workers` of this process.
    preload : sequence of str
        Modules that the fork server imports once for all workers, if the server does not run yet.
    """

    def __init__(
        self,
        num_workers: int,
        build: Callable[..., Callable[[Any], Any]],
        *args: Any,
        leader: "ranks.Leader | None" = None,
        preload: Sequence[str] = (),
    ):
        end_if_imported()
        context = fork_server(build, preload)
        self._leader = leader
        self._connections: list[multiprocessing.connection.Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._ready: deque[Any] = deque()
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, build, args), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        lent = leader.start_workers(build, args, preload) if leader else []
        self._lenders = [lender for lender, _ in lent]
        self._connections += [connection for _, connection in lent]
        self._outstanding = [0] * len(self._connections)

    @property
    def num_workers(self) -> int:
        """Return the number of processes, including those of other ranks."""
        return len(self._connections)

    def is_lent(self, worker: int) -> bool:
        """Return whether a worker belongs to another rank, which may be on another machine."""
        return worker >= len(self._processes)

    def idle(self) -> int | None:
        """Return the worker with the fewest messages to answer; None if every worker has enough."""
        worker = min(range(len(self._outstanding)), key=self._outstanding.__getitem__)
        return worker if self._outstanding[worker] < MESSAGES_A_WORKER else None

    def send(self, worker: int, message: Any) -> None:
        """Send a message to a worker. A worker answers its messages in their order."""
        try:
            self._connections[worker].send(message)
        except OSError:
            raise self._killed(worker) from None
        self._outstanding[worker] += 1

    def receive(self) -> tuple[int, Any]:
        """Wait for the next answer and return the worker and the answer.

        Raises
        ------
        Exception
            If the worker's function raised it. The cause is a `WorkerTraceback`.
        WorkerKilled
            If a worker has ended.
        """
        if not self._ready:
            others = [connection for _, connection in self._leader.ranks] if self._leader else []
            ready = multiprocessing.connection.wait([*self._connections, *others])
            if self._leader:
                self._leader.check(ready)
            self._ready.extend(ready)
        connection = self._ready.popleft()
        worker = self._connections.index(connection)
        try:
            answer, error, text = _receive(connection)
        except (EOFError, OSError):
            raise self._killed(worker) from None
        self._outstanding[worker] -= 1
        if error is not None:
            raise error from WorkerTraceback(text)
        return worker, answer

    def _killed(self, worker: int) -> WorkerKilled | UserError:
        if self.is_lent(worker):
            return WorkerKilled(f"a worker process of {self._lenders[worker - len(self._processes)]} ended")
        self._processes[worker].join(1)
        if self._processes[worker].exitcode == _NO_GUARD:
            return UserError(
                'the script that starts worker processes needs the guard `if __name__ == "__main__":` before the call, '
                "because each worker imports the script"
            )
        return WorkerKilled(f"a worker process ended with exit code {self._processes[worker].exitcode}")

    def close(self) -> None:
        """End the processes, even in the middle of a message."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def fork_server(build: Callable[..., Any], preload: Sequence[str]) -> multiprocessing.context.ForkServerContext:
    """Start the fork server if it does not run. It imports the module of `build`, the codecs and `preload`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([build.__module__, "cv2", "PIL.Image", "ffcv_ops.codec.jpeg", *preload])
    # Some Python versions do not pass the module path on. The server could then import other modules of the same name.
    with _environment(PYTHONPATH=os.pathsep.join(map(str, sys.path)), PYTHONSAFEPATH="1"):
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(
    connection: multiprocessing.connection.Connection, build: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]
) -> None:
    """Answer messages with the function that `build` returns, until the other end of the connection is closed.

    If the function has a method ``expect``, this is called with each message as soon as the message arrives, in another
    thread. The message before it may not be answered yet.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all processes, and the leader decides
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow warns about metadata that nobody reads
    import cv2

    cv2.setNumThreads(1)
    answer = build(*args)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive_messages, args=(connection, inbox, answer), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while (message := inbox.get()) is not _END:
            try:
                reply: tuple[Any, Exception | None, str] = answer(message), None, ""
            except Exception as error:
                reply = None, error, traceback.format_exc()
            _send(connection, reply)


def _receive_messages(connection: multiprocessing.connection.Connection, inbox: SimpleQueue, answer: Any) -> None:
    """Put the messages of a connection into a queue, and `_END` behind the last one."""
    expect = getattr(answer, "expect", lambda message: None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = connection.recv()
            expect(message)
            inbox.put(message)
    inbox.put(_END)


def _send(connection: multiprocessing.connection.Connection, message: Any) -> None:
    """Send a message, then the buffers in it (`pickle.PickleBuffer`). To copy them would double their cost."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((content, [view.nbytes for view in views]))
    for view in views:
        write_all(connection.fileno(), view)


def _receive(connection: multiprocessing.connection.Connection) -> Any:
    """Receive a message and its buffers from `_send`."""
    content, sizes = connection.recv()
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    buffer = np.empty(sum(sizes), np.uint8).data
    rest = buffer
    while rest:
        received = os.readv(connection.fileno(), [rest])
        if not received:
            raise EOFError
        rest = rest[received:]
    return pickle.loads(content, buffers=[buffer[end - size : end] for size, end in zip(sizes, ends, strict=True)])


def map_in_order(workers: Workers, messages: Iterable[Any]) -> Iterator[Any]:
    """Yield the answers to messages in their order. A bounded number of answers waits for its turn."""
    rest = enumerate(messages)
    sent_to: list[deque[int]] = [deque() for _ in range(workers.num_workers)]
    answers: dict[int, Any] = {}
    num_sent = num_done = 0
    exhausted = False
    while not exhausted or num_done < num_sent:
        worker = workers.idle()
        if worker is not None and not exhausted and num_sent - num_done < _RESULTS_A_WORKER * len(sent_to):
            number, message = next(rest, (-1, None))
            if number < 0:
                exhausted = True
                continue
            workers.send(worker, message)
            sent_to[worker].append(number)
            num_sent += 1
            continue
        worker, answer = workers.receive()
        answers[sent_to[worker].popleft()] = answer
        while num_done in answers:
            yield answers.pop(num_done)
            num_done += 1
