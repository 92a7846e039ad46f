"""Copy a .beton file and its manifest to a local disk, checked: see launch/stage.sh."""

import sys
import time

from ffcv_ops.staging import StageError, stage
from ffcv_ops.writer import show_bytes

PROGRESS_EVERY_S = 5.0


class Progress:
    """A line now and then: bytes done, bytes/s and the time left."""

    def __init__(self) -> None:
        self.start_s = self._last_s = 0.0
        self.first = self.done = -1

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if self.first < 0:
            self.start_s, self._last_s, self.first = now_s, now_s, done
        self.done = done
        if now_s - self._last_s > PROGRESS_EVERY_S and done > self.first:
            self._last_s = now_s
            left_s = (total - done) / self.rate()
            say(f"{show_bytes(done)} of {show_bytes(total)}, {show_bytes(self.rate())}/s, {left_s:.0f} s left")

    def rate(self) -> float:
        return (self.done - self.first) / max(time.monotonic() - self.start_s, 1e-9)


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0].startswith("-"):
        say("usage: bash launch/stage.sh FILE.beton FOLDER")
        return 0 if argv in (["--help"], ["-h"]) else 2
    progress = Progress()
    try:
        target = stage(*argv, notice=say, progress=progress)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except StageError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: copying stopped ({error}); once that is mended, the same command goes on")
        return 1
    except KeyboardInterrupt:
        say("stopped by Ctrl-C; the same command goes on from what is on disk")
        return 130
    if progress.done >= 0:
        say(f"{target}: {show_bytes(progress.done)}, {show_bytes(progress.rate())}/s, as its manifest's digest says")
    # All else goes to stderr, so that a script can use this line.
    print(f"--data.{'val' if target.stem.startswith('val') else 'train'}_dataset={target.absolute()}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
