"""Read ranges of large files, such as archives, in any thread, process or machine. Files may be remote."""

import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from stat import S_ISREG
from typing import Any

from ffcv_ops.errors import UserError
from ffcv_ops.files import read_range
from ffcv_ops.sources import remote
from ffcv_ops.sources.source import SourceError, source_changed
from ffcv_ops.sources.window import LOCAL, REMOTE, WindowSizes

# A system may allow a process no more than 1,024 open files.
_MOST_OPEN = 64
_THREADS = 16


@dataclass(frozen=True)
class RangeFile:
    """A file as it was listed."""

    path: str  # absolute, or a URL
    size_bytes: int
    version: int | str  # the time of the last change in ns, or what a server gives instead, such as an ETag

    @property
    def name(self) -> str:
        """Return the path for messages. A URL may hold secrets, which are left out."""
        return remote.public_name(self.path)

    @property
    def identity(self) -> list[Any]:
        """Return what is the same as long as the content is, in JSON's types. The folder may change."""
        return [os.path.basename(self.name), self.size_bytes, self.version]


def list_files(paths: Sequence[str]) -> list[RangeFile]:
    """Return files as they are now. See `list_file`. Slow storage is asked for several at once."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(list_file, paths))


def list_file(path: str | os.PathLike[str]) -> RangeFile:
    """Return a file as it is now. Raise UserError if there is no such file."""
    if isinstance(path, str) and remote.is_remote(path):
        return RangeFile(path, *remote.describe(path))
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

    A change of a local file is noticed by the next read. A web server is told which version is wanted. Other servers
    cannot be told, so a process asks them on first use, and `check` asks once more at the end.
    """

    def __init__(self, files: Sequence[RangeFile]):
        self.files = tuple(files)
        self._open: dict[int, _OpenFile] = {}
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.files,)

    @property
    def window_sizes(self) -> WindowSizes:
        """Return how much is read at once where small reads are close to each other."""
        return REMOTE if any(remote.is_remote(file.path) for file in self.files) else LOCAL

    def check(self) -> None:
        """Raise SourceChanged if a remote file is not the one that was listed. Local ones are compared at each read."""
        numbers = [number for number, file in enumerate(self.files) if remote.is_remote(file.path)]
        self._checked.clear()
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(lambda number: self.read(number, 0, 0), numbers))

    def read(self, number: int, offset: int, size_bytes: int) -> bytes:
        """Return a range of a file, shorter only at its end. Raise SourceError if it has changed or cannot be read."""
        file = self.files[number]
        size_bytes = max(0, min(size_bytes, file.size_bytes - offset))
        try:
            if not remote.is_remote(file.path):
                return self._read_local(number, offset, size_bytes)
            if number not in self._checked:
                remote.check(file)
                self._checked.add(number)
            return remote.read(file, offset, size_bytes)
        except (FileNotFoundError, remote.RemoteChanged, remote.RemoteMissing) as error:
            raise source_changed(file.name) from error
        except (remote.RemoteError, OSError) as error:
            what = f"{file.name}: cannot be read on {socket.gethostname()}, at byte {offset}"
            if isinstance(error, remote.RemoteError):
                raise SourceError(f"{what} ({error}); once the server answers, the same command goes on") from error
            raise SourceError(f"{what} ({error.strerror}); check its disk") from error

    def _read_local(self, number: int, offset: int, size_bytes: int) -> bytes:
        """Return a range of a file of this machine. Raise SourceChanged if the file is not the one that was listed."""
        file, opened = self.files[number], self._opened(number)
        stat = os.fstat(opened.descriptor)
        if (stat.st_size, stat.st_mtime_ns) != (file.size_bytes, file.version):
            raise source_changed(file.name)
        content = read_range(opened.descriptor, size_bytes, offset)
        if len(content) < size_bytes:
            raise source_changed(file.name)
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
