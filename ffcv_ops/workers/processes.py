"""Run tasks in processes of this machine. They end with the process that started them, even if it is killed."""

import contextlib
import logging
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.files import write_all
from ffcv_ops.machine import cpus_per_rank
from ffcv_ops.workers.tasks import WorkerKilled

# A process has one task to work on, and one to prepare meanwhile.
_TASKS_A_PROCESS = 2
# If so many processes in a row are killed before they are ready, no further one is started.
_MAX_KILLED_STARTS = 8
_END = object()
# Exit status of a worker that found its script without a guard.
_NO_GUARD = 78


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


def set_up_process() -> None:
    """Prepare a process that works on tasks and on nothing else."""
    warnings.simplefilter("ignore")  # Pillow warns about metadata that nobody reads
    logging.getLogger("ffcv_ops").setLevel(logging.ERROR)  # otherwise all processes would log that they compile
    import cv2

    cv2.setNumThreads(1)


@dataclass
class _Job:
    """A task that is not done: its future, and the pickled function."""

    future: Future
    content: bytes
    started: bool = False


@dataclass
class _Process:
    """A process, the connection to it, and the jobs that it has. It works on the first one."""

    process: BaseProcess
    connection: Connection
    jobs: deque[_Job] = field(default_factory=deque)
    ready: bool = False


class ProcessExecutor(Executor):
    """Processes of this machine as an executor, which is faster than ``ProcessPoolExecutor`` for large results.

    A fork server starts the processes, so they share only a pipe with this process. If this process is killed, its end
    of the pipe closes and the processes end. If a process is killed, its task raises `WorkerKilled`, another process
    takes its place, and no other task is lost. If it had not yet started to work, no task is lost at all. Processes
    ignore Ctrl-C and SIGHUP.

    If a submitted function has a method ``prepare``, another thread of the process calls it as soon as the function
    arrives. The process may still work on an earlier function then.

    Parameters
    ----------
    num_workers : int
    preload : sequence of str
        Modules that the fork server imports once for all processes, if the server does not run yet.
    """

    def __init__(self, num_workers: int, preload: Sequence[str] = ()):
        end_if_imported()
        self.num_workers = num_workers
        self._context = _fork_server(preload)
        self._lock = threading.RLock()
        self._waiting: deque[_Job] = deque()
        self._broken: Exception | None = None
        self._shut_down = False
        self._num_killed_starts = 0
        self._idle = threading.Condition(self._lock)
        self._wake, self._waker = self._context.Pipe(duplex=False)
        self._processes = [self._start() for _ in range(num_workers)]
        self._thread = threading.Thread(target=self._receive_answers, name="ProcessExecutor", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Run ``fn(*args, **kwargs)`` in a process. `fn` is importable by name, or an object that pickle can send.

        Raises
        ------
        RuntimeError
            After `shutdown`.
        Exception
            If no process can be started any more.
        """
        job = _Job(Future(), pickle.dumps(partial(fn, *args, **kwargs) if args or kwargs else fn, protocol=5))
        with self._lock:
            if self._broken:
                raise self._broken
            if self._shut_down:
                raise RuntimeError("cannot submit a task after shutdown")
            self._waiting.append(job)
            self._send_jobs()
        return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes. With `cancel_futures`, they end at once, even in the middle of a task."""
        with self._lock:
            self._shut_down = True
            if wait and not cancel_futures:
                self._idle.wait_for(lambda: not self._waiting and not any(held.jobs for held in self._processes))
            ended, self._processes = self._processes, []
            jobs = [*self._waiting, *(job for held in ended for job in held.jobs)]
            self._waiting.clear()
        for held in ended:
            held.process.terminate()
        with contextlib.suppress(OSError):
            self._waker.send_bytes(b"")
        self._thread.join()
        for held in ended:
            held.connection.close()
            held.process.join()
        self._wake.close()
        self._waker.close()
        for job in jobs:
            if not job.future.cancel() and not job.future.done():
                job.future.set_exception(WorkerKilled("the executor was shut down"))

    # -----------------------------------------------------------------------------------------------------------------

    def _start(self) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Process(process, ours)

    def _send_jobs(self) -> None:
        """Send waiting jobs to the processes with the fewest, until each has enough. The lock is held."""
        while self._waiting and self._processes:
            held = min(self._processes, key=lambda process: len(process.jobs))
            if len(held.jobs) >= _TASKS_A_PROCESS:
                return
            job = self._waiting.popleft()
            if not job.started and not job.future.set_running_or_notify_cancel():
                continue
            job.started = True
            held.jobs.append(job)
            with contextlib.suppress(OSError):  # the process has ended, and the other thread will see that
                held.connection.send_bytes(job.content)

    def _receive_answers(self) -> None:
        """Receive the answers of all processes, in a thread, until the executor is shut down."""
        while True:
            with self._lock:
                if self._shut_down and not self._processes:
                    return
                processes = {held.connection: held for held in self._processes}
            for connection in multiprocessing.connection.wait([self._wake, *processes]):
                if connection is not self._wake:
                    self._receive(processes[connection])  # type: ignore[index]

    def _receive(self, held: _Process) -> None:
        try:
            content, buffers = _receive_parts(held.connection)
        except (EOFError, OSError):
            self._replace(held)
            return
        if not held.ready:  # the first message only reports that the process has started
            held.ready = True
            self._num_killed_starts = 0
            return
        with self._lock:
            if held not in self._processes:
                return
            job = held.jobs.popleft()
            self._send_jobs()
            self._idle.notify_all()
        try:
            answer, error, text = pickle.loads(content, buffers=buffers)
        except Exception as unpickling:
            answer, error, text = None, unpickling, traceback.format_exc()
        if error is None:
            job.future.set_result(answer)
        else:
            error.__cause__ = WorkerTraceback(text)
            job.future.set_exception(error)

    def _replace(self, held: _Process) -> None:
        """Start another process for one that has ended. Only the job that it worked on is lost."""
        held.process.join(1)
        exit_code = held.process.exitcode
        with self._lock:
            if held not in self._processes:  # `shutdown` ended it
                return
            held.connection.close()
            self._processes.remove(held)
            lost = [held.jobs.popleft()] if held.jobs and held.ready else []
            self._waiting.extendleft(reversed(held.jobs))
            error: Exception = WorkerKilled(f"a worker process ended with exit code {exit_code}")
            try:
                if not held.ready:
                    self._num_killed_starts += 1
                    was_killed = exit_code is None or exit_code < 0
                    if not was_killed or self._num_killed_starts == _MAX_KILLED_STARTS:
                        raise _start_error(exit_code)  # the next one would not start either
                self._processes.append(self._start())
            except Exception as broken:
                self._broken = error = broken
                lost += [*self._waiting, *(job for other in self._processes for job in other.jobs)]
                self._waiting.clear()
                for other in self._processes:
                    other.jobs.clear()
            self._send_jobs()
            self._idle.notify_all()
        for job in lost:
            if not job.future.cancelled():
                job.future.set_exception(error)


@contextlib.contextmanager
def use_executor(executor: Executor | None, num_workers: int, preload: Sequence[str] = ()) -> Iterator[Executor]:
    """Yield an executor as it is; for None, yield processes (see `ProcessExecutor`) and end them behind the block."""
    if executor is not None:
        yield executor
        return
    processes = ProcessExecutor(choose_num_workers(num_workers), preload)
    try:
        yield processes
    finally:
        processes.shutdown(cancel_futures=True)


def _start_error(exit_code: int | None) -> Exception:
    if exit_code == _NO_GUARD:
        return UserError(
            'the script that starts worker processes needs the guard `if __name__ == "__main__":` before the call, '
            "because each worker imports the script"
        )
    return WorkerKilled(f"a worker process ended with exit code {exit_code} before it could start")


def _fork_server(preload: Sequence[str]) -> multiprocessing.context.ForkServerContext:
    """Start the fork server if it does not run. It imports the codecs and `preload`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "cv2", "PIL.Image", "ffcv_ops.codec.jpeg", *preload])
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


# ---------------------------------------------------------------------------------------------------------------------
# In the processes


def _serve(connection: Connection) -> None:
    """Run the tasks that arrive, until the other end of the connection is closed."""
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all processes, and the leader decides
        signal.signal(number, signal.SIG_IGN)
    set_up_process()
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive_tasks, args=(connection, inbox), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        _send(connection, None)
        while (task := inbox.get()) is not _END:
            try:
                answer: tuple[Any, Exception | None, str] = task(), None, ""
            except Exception as error:
                answer = None, error, traceback.format_exc()
            del task  # it may hold the images that it has read
            try:
                _send(connection, answer)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                _send(connection, (None, RuntimeError(f"{error}"), f"{answer[2]}{traceback.format_exc()}"))
            del answer


def _receive_tasks(connection: Connection, inbox: SimpleQueue) -> None:
    """Put the tasks of a connection into a queue, and `_END` behind the last one."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            content = connection.recv_bytes()
            try:
                task = pickle.loads(content)
                getattr(task, "prepare", lambda: None)()
            except Exception as error:
                task = partial(_raise, error)
            inbox.put(task)
    inbox.put(_END)


def _raise(error: Exception) -> None:
    raise error


def _send(connection: Connection, message: Any) -> None:
    """Send a message, then its large arrays. To copy them into the message would double their cost."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((content, [view.nbytes for view in views]))
    for view in views:
        write_all(connection.fileno(), view)


def _receive_parts(connection: Connection) -> tuple[bytes, list[memoryview]]:
    """Receive a pickled message from `_send` and its arrays."""
    content, sizes = connection.recv()
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    buffer = np.empty(sum(sizes), np.uint8).data
    rest = buffer
    while rest:
        received = os.readv(connection.fileno(), [rest])
        if not received:
            raise EOFError
        rest = rest[received:]
    return content, [buffer[end - size : end] for size, end in zip(sizes, ends, strict=True)]
