"""Work that training does not wait for: a thread does it while the next steps go on."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundQueue:
    """Short tasks that one thread does in order, such as writes to slow storage. Any thread may add one."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._tasks: deque[Future[None]] = deque()
        self._lock = threading.Lock()

    def put(self, task: Callable[[], None]) -> None:
        """Add a task. Raise what an earlier task raised."""
        with self._lock:
            self._raise_errors()
            self._tasks.append(self._executor.submit(task))

    def finish(self) -> None:
        """Wait until all tasks so far have ended. Raise what one of them raised."""
        self._executor.submit(lambda: None).result()  # without the lock, since a task may add another one
        with self._lock:
            self._raise_errors()

    def _raise_errors(self) -> None:
        while self._tasks and self._tasks[0].done():
            self._tasks.popleft().result()


class BackgroundTask(BackgroundQueue):
    """One task at a time, beside the thread that starts it."""

    def start(self, work: Callable[[], None]) -> None:
        """Start a task, once the one before has ended. Raise what the one before raised."""
        self.finish()
        self.put(work)
