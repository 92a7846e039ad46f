"""Text for people: output that cannot be written never ends a command."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

# The other end of a pipe is closed; the terminal is closed.
_GONE = (errno.EPIPE, errno.EIO)
_reader_is_gone = False
_on_reader_gone: Callable[[], None] | None = None


class _LenientFile(io.FileIO):
    """A raw file. A write that fails is dropped, and `on_error` gets the error."""

    def __init__(self, file: Path | int, mode: str, on_error: Callable[[OSError], None]):
        super().__init__(file, mode, closefd=not isinstance(file, int))
        self._on_error = on_error

    def write(self, content: Any, /) -> int:
        try:
            while (written := super().write(content)) is None:  # the file does not wait by itself
                select.select([], [self], [])
        except OSError as error:
            self._on_error(error)
            return memoryview(content).nbytes
        return written


def open_text(path: Path, on_error: Callable[[OSError], None]) -> TextIO:
    """Open a text file to append lines to it. Text that cannot be written is dropped.

    Parameters
    ----------
    path : Path
        The file, in UTF-8. Characters that are no text, such as bytes of a file's name, appear as escapes.
    on_error : callable
        Called with the error of each write that fails.

    Raises
    ------
    OSError
        If the file cannot be opened.
    """
    raw = _LenientFile(path, "ab", on_error)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace")


def protect_output() -> None:
    """Let no print to stdout or stderr raise an error, for the rest of this process.

    - A character that the console cannot show appears as an escape.
    - If the reader of a pipe is gone, or the terminal is closed, further text is dropped.
    - If the disk behind a redirected output is full, the text is dropped until there is space again.

    Streams that a test or another program has put into the place of Python's own are left as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            setattr(sys, name, _protected(stream))


def _protected(stream: io.TextIOWrapper) -> TextIO:
    descriptor = stream.fileno()

    def drop(error: OSError) -> None:
        if error.errno in _GONE:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
        if error.errno == errno.EPIPE and descriptor == 1:
            _note_that_the_reader_is_gone()

    return io.TextIOWrapper(
        io.BufferedWriter(_LenientFile(descriptor, "wb", drop)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def call_if_reader_is_gone(action: Callable[[], None] | None) -> None:
    """Call `action` once if the reader of stdout, such as ``head``, is gone: now or later. None cancels this.

    The call is made in the thread that prints. An error that `action` raises is an error of that print.
    """
    global _on_reader_gone
    _on_reader_gone = action
    if _reader_is_gone and action is not None:
        _on_reader_gone = None
        action()


def _note_that_the_reader_is_gone() -> None:
    global _reader_is_gone, _on_reader_gone
    _reader_is_gone = True
    action, _on_reader_gone = _on_reader_gone, None
    if action is not None:
        action()
