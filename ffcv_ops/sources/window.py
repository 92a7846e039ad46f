"""Serve small reads of a file by larger ones, where they are close to each other."""

from collections.abc import Callable
from dataclasses import dataclass

Read = Callable[[int, int], bytes]
"""Called with offset and size in bytes; returns fewer bytes only at the end of the file."""


@dataclass(frozen=True)
class WindowSizes:
    """Sizes of reads, in bytes."""

    least: int
    most: int  # a window doubles up to this size while windows are near to each other
    near: int  # the distance up to which they are


# A disk is asked for what is wanted only. A server over a network gives a megabyte in the time of a question.
LOCAL = WindowSizes(2 << 10, 256 << 10, 4 << 10)
REMOTE = WindowSizes(16 << 10, 4 << 20, 1 << 20)


class Window:
    """Bytes around the last read, none of them behind `end`. Threads may share a window, though they then read more."""

    def __init__(self, read: Read, end: int, sizes: WindowSizes = LOCAL):
        self._read, self._end, self._sizes = read, end, sizes
        self._held: tuple[int, bytes] = 0, b""
        self._size = sizes.least

    def get(self, offset: int, size_bytes: int) -> bytes:
        """Return a range."""
        start, content = self._held
        at = offset - start
        if at < 0 or at + size_bytes > len(content):
            is_near = 0 <= at <= len(content) + self._sizes.near
            self._size = min(2 * self._size, self._sizes.most) if is_near else self._sizes.least
            wanted = max(0, min(max(self._size, size_bytes), self._end - offset))
            content = self._read(offset, wanted)
            self._held = offset, content
            at = 0
        return content[at : at + size_bytes]
