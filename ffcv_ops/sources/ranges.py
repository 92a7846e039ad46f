"""Read ranges of large files, such as archives, in any thread, process or machine."""

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from stat import S_ISREG
from typing import Any

from ffcv_ops.errors import UserError
from ffcv_ops.sources.source import SourceChanged, SourceError

# A system may allow a process no more than 1,024 open files.
_MOST_OPEN = 64


@dataclass(frozen=True)
class RangeFile:
    """A file as it was listed.

    Attributes
    ----------
    path : str
        Absolute.
    size_bytes : int
    mtime_ns : int
        The time of the last change.
    """

    path: str
    size_bytes: int
    mtime_ns: int

    @property
    def identity(self) -> list[Any]:
        """Return what is the same as long as the content is, in JSON's types. The folder may change."""
        return [os.path.basename(self.path), self.size_bytes, self.mtime_ns]


def list_file(path: str | os.PathLike[str]) -> RangeFile:
    """Return a file as it is now.

    Raises
    ------
    UserError
        If there is no such file.
    """
    path = os.path.abspath(path)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not S_ISREG(stat.st_mode):
        raise UserError(f"{path}: is no file")
    return RangeFile(path, stat.st_size, stat.st_mtime_ns)


class RangeReader:
    """Ranges of files. Each file is opened on first use, and must still be as it was listed.

    Parameters
    ----------
    files : sequence of RangeFile
    """

    def __init__(self, files: Sequence[RangeFile]):
        self.files = tuple(files)
        self._open: dict[int, _OpenFile] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files,)

    def read(self, number: int, offset: int, size_bytes: int) -> bytes:
        """Return a range of a file. The range is shorter only if the file ends there.

        Raises
        ------
        SourceError
            If the file cannot be read.
        SourceChanged
            If the file is not the one that was listed.
        """
        file = self.files[number]
        try:
            content = self._read(number, offset, max(0, min(size_bytes, file.size_bytes - offset)))
        except FileNotFoundError:
            content = None
        except OSError as error:
            where = f"on {socket.gethostname()}, at byte {offset}"
            raise SourceError(f"{file.path}: cannot be read {where} ({error.strerror}); check its disk") from error
        if content is None:
            raise SourceChanged(
                f"{file.path}: on {socket.gethostname()} not the file that was listed (size or time of change differ, "
                "or it is gone); leave the file alone while it is read, and let all machines see the same one"
            )
        return content

    def _read(self, number: int, offset: int, size_bytes: int) -> bytes | None:
        """Return a range; None if the file has changed."""
        file, opened = self.files[number], self._opened(number)
        stat = os.fstat(opened.descriptor)
        if (stat.st_size, stat.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
            return None
        content = os.pread(opened.descriptor, size_bytes, offset)
        while len(content) < size_bytes:
            more = os.pread(opened.descriptor, size_bytes - len(content), offset + len(content))
            if not more:
                return None
            content += more
        return content

    def _opened(self, number: int) -> "_OpenFile":
        with self._lock:
            opened = self._open.pop(number, None) or _OpenFile(self.files[number].path)
            self._open[number] = opened  # the one that was used last stands last
            if len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]
        return opened


class _OpenFile:
    """An open file that is closed when no thread uses it any more."""

    def __init__(self, path: str):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may have become a pipe

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
