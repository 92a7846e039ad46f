"""List archives and read their images, for tar archives and for shards."""

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ffcv_ops.sources.folder import EXTENSIONS
from ffcv_ops.sources.in_threads import Count, list_in_threads
from ffcv_ops.sources.ranges import RangeFile, RangeReader
from ffcv_ops.sources.remarks import HIDDEN_FILES, HIDDEN_FOLDERS, Tally
from ffcv_ops.sources.remote import public_name
from ffcv_ops.sources.source import PackedKeys, Stage
from ffcv_ops.sources.tar_headers import TarWalk, check_not_compressed

IMAGE_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_THREADS = 16


@dataclass(frozen=True)
class Part:
    """An archive, or an archive within another one."""

    file: int  # the number of the file in the reader
    start: int  # the place of the archive in the file, in bytes
    end: int
    where: str  # the name of the archive, for messages
    prefix: bytes = b""  # text to put before the names of its members, such as ``n01440764/``

    def walk(self, reader: RangeReader) -> TarWalk:
        """Return the members of the archive."""
        return TarWalk(
            lambda offset, size: reader.read(self.file, offset, size), self.where, self.start, self.end,
            reader.window_sizes,
        )  # fmt: skip


def whole_archives(files: Sequence[RangeFile], reader: RangeReader) -> list[Part]:
    """Return the archives of a reader. Raise TarError if one is compressed."""
    for number, file in enumerate(files):
        check_not_compressed(reader.read(number, 0, 8), file.name)
    return [Part(number, 0, file.size_bytes, file.name) for number, file in enumerate(files)]


@dataclass
class Listing:
    """Images of archives, in any order."""

    # The path of each image in its archive, behind the prefix of the part. Those of `block` are added by `merge`.
    names: PackedKeys = field(default_factory=PackedKeys)
    block: bytearray = field(default_factory=bytearray)
    # File, offset and size in bytes of each image, one after the other.
    places: array = field(default_factory=lambda: array("q"))
    # If the archives tell classes: their texts, and the number of each image's text.
    found: dict[str, int] = field(default_factory=dict)
    texts: array = field(default_factory=lambda: array("i"))
    # Everything that was left out.
    tally: Tally = field(default_factory=Tally)
    extensions: Tally = field(default_factory=Tally)
    hidden: set[bytes] = field(default_factory=set)
    # The folders of the images, of which that of the top is empty, and those that the archives name.
    folders: set[bytes] = field(default_factory=set)
    entries: set[bytes] = field(default_factory=set)

    def add(self, name: bytes, part: Part, offset: int, size_bytes: int, text: str | None = None) -> None:
        """Add an image."""
        self.block += name + b"\0"
        self.places.extend((part.file, offset, size_bytes))
        if text is not None:
            self.texts.append(self.found.setdefault(text, len(self.found)))

    def count_other(self, name: bytes) -> None:
        """Count a file that is no image."""
        path = os.fsdecode(name)
        base = path.rpartition("/")[2]
        if base.startswith("."):
            self.tally.add(HIDDEN_FILES, path)
        else:
            self.extensions.add(os.path.splitext(base)[1].lower(), path)

    def merge(self, other: "Listing") -> None:
        """Add the listing of another part, which has not been merged with anything, and is not used any more."""
        self.names.extend(other.block)
        other.block = bytearray()
        self.places.extend(other.places)
        numbers = [self.found.setdefault(text, len(self.found)) for text in other.found]
        self.texts.extend(numbers[text] for text in other.texts)
        self.tally.merge(other.tally)
        self.extensions.merge(other.extensions)
        self.folders |= other.folders
        self.entries |= other.entries
        for name in sorted(other.hidden):
            self.tally.add(HIDDEN_FOLDERS, os.fsdecode(name))


ListPart = Callable[[Part, Count], Listing]
"""Lists a part, and counts each image."""


def list_parts(parts: Sequence[Part], list_part: ListPart, stage: Stage) -> Listing:
    """List parts in threads, and return all of their images."""
    whole = Listing()
    for listing in list_in_threads(parts, list_part, stage, _THREADS):
        whole.merge(listing)
    return whole


class ArchiveReader:
    """The files in archives. The place of an image is the number of the archive, offset and size in bytes."""

    def __init__(self, address: str, files: Sequence[RangeFile]):
        self.address, self._ranges = public_name(address), RangeReader(files)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.files)

    @property
    def files(self) -> tuple[RangeFile, ...]:
        """Return the archives as they were listed."""
        return self._ranges.files

    def locate(self, key: str) -> str:
        """Return the name of the archives and that of the image in them."""
        return f"{self.address}/{key}"

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of a file. See `ffcv_ops.sources.source.Reader`."""
        return self._ranges.read(*place)

    def check(self) -> None:
        """See `ffcv_ops.sources.source.Reader`."""
        self._ranges.check()
