"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class SaveError(OSError):
    """A file that was to appear did not: the disk is full, gone, or not to be written to."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, which becomes ``path`` in one move once all of it is on the disk.

    Raises
    ------
    SaveError
        Where that fails; an earlier file of the name is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # which torch.save leaves behind its own
        if not isinstance(reason, OSError):
            raise
        raise SaveError(
            f"{path} could not be written ({reason.strerror or reason}); what was there before still is"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _to_disk(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file so that it appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, would outlast a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
