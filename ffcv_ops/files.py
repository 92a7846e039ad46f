"""Files that appear whole or not at all."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ffcv_ops.errors import UserError

# Suffixes of pages and pictures; those of "" are of kinds that nothing here writes.
_SUFFIXES = {"HTML page": (".html", ".htm"), "PNG": (".png",), "": (".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".gif")}
_BEGINNINGS = {"HTML page": b"<!doctype html", "PNG": b"\x89png\r\n"}


class SaveError(OSError):
    """A file could not be written: the disk is full, gone, or read-only."""


class ReadError(OSError):
    """A part of a file could not be read: storage failed, or the file was cut. The message names the file."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to. Once all of it is on the disk, it becomes ``path`` in one move.

    Raises
    ------
    SaveError
        If the file cannot be written. An earlier file of that name is left as it was.
    """
    # Two processes may write the same file. The last one wins, and no mixture of both appears.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own error from it
        if not isinstance(reason, OSError):
            raise
        raise SaveError(
            f"{path} could not be written ({reason.strerror or reason}); what was there before still is"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.absolute().parent)


def nearest_folder(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists. The path may be a file."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def check_writable(folder: Path, *names: str) -> None:
    """Check that files can be written in a folder, or that the folder can be made. Leave nothing behind.

    Parameters
    ----------
    folder : Path
        It need not exist.
    *names : str
        Files in the folder that will be written, if they exist.

    Raises
    ------
    UserError
        If a file cannot be written there.
    """
    existing = nearest_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            write_all(file.fileno(), bytes(1 << 16))
            os.fsync(file.fileno())
    except OSError as error:
        what = "cannot be written to" if existing == folder.absolute() else f"cannot be made in {existing}"
        raise UserError(f"the folder {folder} {what}: {error.strerror or error}") from error
    for path in (folder / name for name in names):
        try:
            if path.exists():
                open(path, "ab").close()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def check_output(path: Path, kind: str) -> None:
    """Check that a page or picture can be written, and that it replaces nothing but another one.

    Parameters
    ----------
    path : Path
    kind : {"HTML page", "PNG"}

    Raises
    ------
    UserError
        If its folder does not exist or cannot be written to, or the file has other content. Also if the name is that
        of another kind of file.
    """
    suffix = path.suffix.lower()
    if any(suffix in suffixes for other, suffixes in _SUFFIXES.items() if other != kind):
        raise UserError(f"the file is a {kind}: name it {path.with_suffix(_SUFFIXES[kind][0])}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent}")
    check_writable(path.parent, path.name)
    if path.is_file():
        with open(path, "rb") as file:
            beginning = file.read(16).lower()
        if beginning and not beginning.startswith(_BEGINNINGS[kind]):
            raise UserError(f"this file exists and is no {kind}: choose another name")


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name in one move that survives a power cut. A file of that name is replaced."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.absolute().parent)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file so that it appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of `content`, at an offset or at the file's position."""
    rest = memoryview(content)
    while rest:
        written = os.write(descriptor, rest) if offset is None else os.pwrite(descriptor, rest, offset)
        rest = rest[written:]
        offset = None if offset is None else offset + written


def read_range(file: int, size_bytes: int, offset: int) -> bytes:
    """Return a range of an open file, which has fewer bytes only if the file ends."""
    content = os.pread(file, size_bytes, offset)
    while len(content) < size_bytes and (more := os.pread(file, size_bytes - len(content), offset + len(content))):
        content += more
    return content


def size_of(path: str) -> int:
    """Return the size of a file. Raise ReadError if it cannot be read."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ReadError(error.errno, error.strerror, path) from None


def read_exactly(file: int, path: str, view: memoryview, offset: int) -> None:
    """Fill a view with the bytes of a file from an offset on. Raise ReadError, with path and place, if it fails."""
    place = f"in the {len(view)} bytes from {offset} on"
    while len(view):
        try:
            num_read = os.preadv(file, [view], offset)
        except OSError as error:
            raise ReadError(error.errno, f"{error.strerror}, {place}", path) from None
        if not num_read:
            raise ReadError(f"{path}: ends at byte {offset}, {place}: it was cut or replaced while in use")
        view, offset = view[num_read:], offset + num_read
