"""Print lines and the progress of a long command, on a terminal or into a file."""

import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
    """The progress of a command: images done, images/s and the time left.

    A terminal shows a bar. Output that goes into a file or a pipe gets a line every ten seconds.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage: tqdm | None = None
        self._start_s = self._last_s = time.monotonic()
        self._first = 0

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` images are done. The rate counts from the first call on."""
        if self._bar is None:
            self.close()
            self._start_s = self._last_s = time.monotonic()
            self._first = done
            self._bar = tqdm(
                total=total, initial=done, unit=" images", disable=not sys.stderr.isatty(), dynamic_ncols=True
            )
        self._bar.update(done - self._bar.n)
        now_s = time.monotonic()
        if self._bar.disable and now_s - self._last_s > _LINE_EVERY_S:
            self._last_s = now_s
            rate = max(done - self._first, 1) / (now_s - self._start_s)
            print(f"{done} / {total} images, {rate:.0f} images/s, {(total - done) / rate:.0f} s left", flush=True)

    def show_stage(self, what: str, count: int) -> None:
        """Show the number of images so far in a stage before the first one is done, such as "images listed"."""
        if self._stage is None:
            # A terminal shows a count, which goes away when the bar comes.
            self._stage = tqdm(disable=not sys.stderr.isatty(), bar_format="{desc}", leave=False)
        self._stage.set_description_str(f"{count:,} {what}")
        now_s = time.monotonic()
        if self._stage.disable and now_s - self._last_s > _LINE_EVERY_S:
            self._last_s = now_s
            print(f"{count:,} {what}", flush=True)

    def close(self) -> None:
        """End the bar, so that the next line stands below it."""
        for bar in (self._stage, self._bar):
            if bar is not None:
                bar.close()
        sys.stderr.flush()  # the end of the bar's line comes before what is printed next


def print_line(text: str) -> None:
    """Print a line above the bar."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)
