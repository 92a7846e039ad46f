"""List the files of a source in threads, so that a slow disk has several questions at once."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from ffcv_ops.sources.source import Stage

_PROGRESS_EVERY_S = 0.5
# To submit an item needs Python's lock, which busy threads give up late. So only as many items wait as keep them busy.
_WAITING_A_THREAD = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


Count = Callable[[int], None]
"""Counts images for the progress. It raises `Stopped` if the listing is not needed any more."""


class Stopped(Exception):
    """The listing is not needed any more."""


class Report:
    """Calls of a `Stage` with the number of images so far, no more than twice a second."""

    def __init__(self, stage: Stage):
        self._stage, self._last_s = stage, time.monotonic()

    def __call__(self, num_images: int) -> None:
        if time.monotonic() - self._last_s > _PROGRESS_EVERY_S:
            self._stage("images listed", num_images)
            self._last_s = time.monotonic()


def list_in_threads(
    items: Sequence[Item], list_item: Callable[[Item, Count], Result], stage: Stage, num_threads: int
) -> Iterator[Result]:
    """Yield the listing of each item, in order. If the caller stops early, the threads stop too.

    Parameters
    ----------
    items : sequence
        Files, or parts of files.
    list_item : callable
        Lists an item. It calls its second argument for the images as it finds them.
    stage : callable
        Called twice a second with the number of images so far.
    num_threads : int
    """
    counts, stop, report = [0] * len(items), threading.Event(), Report(stage)

    def run(number: int, item: Item) -> Result:
        def count(num_images: int) -> None:
            counts[number] += num_images
            if stop.is_set():
                raise Stopped

        return list_item(item, count)

    futures: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(num_threads)
    rest, most = iter(enumerate(items)), _WAITING_A_THREAD * num_threads
    try:
        while True:
            futures.extend(threads.submit(run, *item) for item in islice(rest, most - len(futures)))
            if not futures:
                return
            while not wait([futures[0]], _PROGRESS_EVERY_S).done:
                report(sum(counts))
            report(sum(counts))
            yield futures.popleft().result()
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)
