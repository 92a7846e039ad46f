"""Work that need not hold up training: done in a thread of its own while the next steps go on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Aside:
    """One piece of work at a time, beside the thread that asks for it."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._begun: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, once the one before has ended; raises what that one raised."""
        self.finish()
        self._begun = self._executor.submit(work)

    def finish(self) -> None:
        """Wait until all that was begun has been done; raises what it raised."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()
