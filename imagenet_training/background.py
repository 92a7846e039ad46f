"""Work that training does not wait for: a thread does it while the next steps go on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundTask:
    """One task at a time, beside the thread that starts it."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._task: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start a task, once the one before has ended. Raise what the one before raised."""
        self.finish()
        self._task = self._executor.submit(work)

    def finish(self) -> None:
        """Wait until the task has ended. Raise what it raised."""
        task, self._task = self._task, None
        if task is not None:
            task.result()
