"""Hold an unfinished file: its pages on disk, and a journal of the pages from which a killed run resumes."""

import contextlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ffcv_ops.files import sync, write_all

_COMMIT_EVERY_S = 2.0


class PartialFile:
    """The files ``<target>.partial`` and ``<target>.partial.journal``.

    Others write the pages into the file. This class notes the pages and forces them to disk. The first line of the
    journal identifies the job. Each further line describes one page: its number, its SHA-256 and the caller's record. A
    line counts only if its CRC is right, and is written only after its page is safely on disk. A run can therefore
    trust every line after ``kill -9`` or a power cut. The caller ensures that no other process writes the same files.

    Parameters
    ----------
    target : Path
        The file to write.
    identity : dict
        What the content depends on, as JSON. A journal with another identity is not continued.
    data_start, page_size : int
        Offset of the first page and size of a page, in bytes.

    Raises
    ------
    OSError
        If the files cannot be made.
    """

    def __init__(self, target: Path, identity: dict[str, Any], data_start: int, page_size: int):
        self.target = target
        self.path, self.journal_path = partial_paths(target)
        self.data_start, self.page_size = data_start, page_size
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._journal = -1
        self._disk = ThreadPoolExecutor(1)
        self._commits: deque[Future[None]] = deque()
        self._uncommitted: list[bytes] = []
        self._committed_s = -_COMMIT_EVERY_S
        try:
            # The pages found, and the keys of `identity` that differ in an existing journal, which was then abandoned.
            self.resumed, self.changed = self._resume(identity)
            self.page_hashes: list[str] = [page["sha256"] for page in self.resumed]  # of every page noted, in order
        except BaseException:
            self.close()
            raise

    def _resume(self, identity: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        found, pages, journal_bytes = read_journal(self.journal_path)
        changed = [] if found is None else [key for key in found | identity if found.get(key) != identity.get(key)]
        on_disk = (os.fstat(self._file).st_size - self.data_start) // self.page_size
        if found is None or changed or on_disk < len(pages):
            self._start_over(identity)
            return [], changed
        self._journal = os.open(self.journal_path, os.O_RDWR | os.O_APPEND)
        os.ftruncate(self._journal, journal_bytes)
        os.ftruncate(self._file, self.data_start + len(pages) * self.page_size)
        return pages, changed

    def _start_over(self, identity: dict[str, Any]) -> None:
        """Make new files under the old names, because workers of a killed run may still write into the old file."""
        remove_partial(self.target)
        old, self._file = self._file, os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.close(old)
        self._journal = os.open(self.journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        write_all(self._journal, _line(identity))
        os.fsync(self._journal)
        sync(self.path.absolute().parent)

    def write(self, content: bytes | memoryview, offset: int) -> None:
        """Write into the file. All bytes of a page must be written before the page is noted."""
        write_all(self._file, content, offset)

    def append_page(self, sha256: str, record: dict[str, Any], num_bytes: int) -> None:
        """Note the next page, whose `num_bytes` have been written. A thread forces the page to disk."""
        number = len(self.page_hashes)
        if num_bytes < self.page_size:
            # The file grows by the zeros that fill the page.
            os.pwrite(self._file, b"\0", self.data_start + (number + 1) * self.page_size - 1)
        self._uncommitted.append(_line({"page": number, "sha256": sha256, **record}))
        self.page_hashes.append(sha256)
        while self._commits and self._commits[0].done():
            self._commits.popleft().result()
        if not self._commits and time.monotonic() - self._committed_s > _COMMIT_EVERY_S:
            self._begin_commit()

    def _begin_commit(self) -> None:
        lines, self._uncommitted = b"".join(self._uncommitted), []
        self._committed_s = time.monotonic()
        self._commits.append(self._disk.submit(self._commit, lines))

    def _commit(self, lines: bytes) -> None:
        # The pages come first, because a line of the journal promises that its page is on disk.
        os.fdatasync(self._file)
        write_all(self._journal, lines)
        os.fdatasync(self._journal)

    def flush(self) -> None:
        """Wait until all noted pages are on disk and in the journal."""
        self._begin_commit()
        while self._commits:
            self._commits.popleft().result()

    def finish(self, head: bytes, tail: bytes, header: bytes) -> None:
        """Write the bytes before the pages and behind them, and the header last."""
        write_all(self._file, tail, self.data_start + len(self.page_hashes) * self.page_size)
        write_all(self._file, head, len(header))
        os.fsync(self._file)
        write_all(self._file, header, 0)
        os.fsync(self._file)

    def close(self) -> None:
        """Force the noted pages to disk if possible, and close the files."""
        if self._journal >= 0 and self.path.exists():
            with contextlib.suppress(OSError):
                self.flush()
        self._disk.shutdown()
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)


def partial_paths(target: Path) -> tuple[Path, Path]:
    """Return the paths of the unfinished file and of its journal."""
    return Path(f"{target}.partial"), Path(f"{target}.partial.journal")


def index_path(target: Path) -> Path:
    """Return the path of the listing of the source, which is kept if the listing takes long."""
    return Path(f"{target}.partial.index")


def remove_partial(target: Path) -> None:
    """Delete the unfinished file, its journal and the listing of the source, if they exist."""
    for path in (*partial_paths(target), index_path(target)):
        path.unlink(missing_ok=True)


def read_journal(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Return the identity (None without one), the pages, and the length in bytes of the journal's valid part."""
    lines: list[dict[str, Any]] = []
    valid_bytes = 0
    for line in _raw_lines(path):
        crc, _, content = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(content):
            break
        entry = json.loads(content)
        if lines and entry.get("page") != len(lines) - 1:
            break
        lines.append(entry)
        valid_bytes += len(line)
    return (lines[0], lines[1:], valid_bytes) if lines else (None, [], 0)


def _raw_lines(path: Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        yield from file


def _line(entry: dict[str, Any]) -> bytes:
    content = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)
