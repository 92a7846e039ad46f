"""The protocol of all sources: a `Source` lists its images once, and a `Reader` gives their bytes by place.

A source is compact. For each image it holds a key, a label and a place, which is a few integers. Only the process that
leads the writing holds a source. Workers hold the source's reader. They get the keys and places of the images that they
are to encode.

The order of the images decides the bytes of a file. It is the same for all kinds of sources (`sort_keys`): by class
number, then by folder, then by file name, as in ``torchvision.datasets.ImageFolder``.

To add a kind, write a module with a function that takes a `ffcv_ops.sources.spec.SourceSpec` and a `Stage`, and
returns a `Source`. Then register the function in ``ffcv_ops.sources.kinds.KINDS``, before ``tar``, which takes any
file.
"""

import os
import socket
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from ffcv_ops.errors import UserError
from ffcv_ops.sources.remarks import Remark
from ffcv_ops.units import show_names

Stage = Callable[[str, int], None]
"""Called with what is done, and with the number of images so far."""

# As Python objects, all keys at once would take hundreds of MB.
_KEYS_AT_ONCE = 4096


class SourceError(UserError):
    """An error of a source while images are read, which is not the fault of one image. It always ends the run."""


class SourceChanged(SourceError):
    """An image is not the one that was listed. Another machine may have another image there."""


def source_changed(path: str) -> SourceChanged:
    """Return the error for a file that has changed."""
    return SourceChanged(
        f"{path}: on {socket.gethostname()} not the file that was listed (size or time of change differ, or it is "
        "gone); leave the source alone while it is read, and let all machines see the same files"
    )


class PackedKeys(Sequence[str]):
    """A sequence of keys in one block of bytes, which takes a third of the memory of a list of ``str``."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._ends = array("q", [-1])

    def extend(self, block: bytes | bytearray) -> None:
        """Append keys that are encoded as `os.fsencode` does, each followed by a zero byte."""
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + len(self._block)
        self._ends.frombytes(ends.astype(np.int64).tobytes())
        self._block += block

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return os.fsdecode(self.encoded(range(len(self))[index]))

    def encoded(self, index: int) -> bytes:
        """Return a key as bytes, by its number from 0."""
        return bytes(self._block[self._ends[index] + 1 : self._ends[index + 1]])

    def block(self) -> bytearray:
        """Return all keys as `extend` takes them."""
        return self._block

    def take(self, order: np.ndarray, start: int = 0) -> "PackedKeys":
        """Return the keys with these numbers, without their first bytes."""
        taken = PackedKeys()
        for first in range(0, len(order), _KEYS_AT_ONCE):
            chosen = order[first : first + _KEYS_AT_ONCE].tolist()
            taken.extend(b"".join(self.encoded(index)[start:] + b"\0" for index in chosen))
        return taken


class Reader(Protocol):
    """Bytes of images by place, in any thread, process or machine. A reader is small, and `pickle` can send it.

    A reader opens files on first use. It does not send open files.
    """

    def locate(self, key: str) -> str:
        """Return the full name of an image for messages, such as its path."""

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of an image.

        Raises
        ------
        SourceError
            If the source has changed since it was listed (`SourceChanged`), or cannot be read.
        OSError
            If only this image cannot be read. It is then a bad image.
        """

    def check(self) -> None:
        """Raise SourceChanged if the source is not as it was listed, where `read` cannot notice it. It is the end."""


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a source in the order of `sort_keys`."""

    kind: str  # its name in ``ffcv_ops.sources.kinds.KINDS``
    address: str  # the source as messages name it, such as the path of a folder
    classes: list[str]  # the position of a name is the class number
    keys: PackedKeys  # the name of each image, relative to the address: class folder and file name, or a name like that
    labels: np.ndarray  # int32 (len(keys),): the class number of each image
    places: np.ndarray  # int64 (len(keys), P): what the reader needs to find an image, and to know that it is the same
    sizes_bytes: np.ndarray  # int64 (len(keys),): the size of each image
    reader: Reader
    # Facts that `places` rest on, in JSON's types, such as name, size and time of change of archives. The journal of
    # a file holds a hash of this identity and of all keys, labels and places.
    identity: list[Any] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # what the manifest tells about the source, in JSON's types
    remarks: list[Remark] = field(default_factory=list)  # what the listing left out, and what the user should know
    # Writes the listing to a path, for ``SourceSpec.index`` of a later run. None if the source is listed quickly.
    save_index: Callable[[Path], None] | None = None

    def locate(self, index: int) -> str:
        """Return the full name of an image for messages."""
        return self.reader.locate(self.keys[index])


def sort_keys(keys: PackedKeys, labels: np.ndarray) -> np.ndarray:
    """Return the order of images in a source: by class number, then by folder, then by file name.

    This is the order of ``torchvision.datasets.ImageFolder``. Folders and names are compared as text, so the folder
    ``a-b`` comes before ``a/b``, but behind ``a``.

    Returns
    -------
    order : ndarray of uint32, shape (len(keys),)
    """
    order = np.argsort(labels, kind="stable").astype(np.uint32)
    bounds = np.flatnonzero(np.diff(labels[order])) + 1
    for part in np.split(order, bounds):
        names = [keys[index].rpartition("/")[::2] for index in part.tolist()]
        part[:] = part[sorted(range(len(names)), key=names.__getitem__)]
    return order


def find_twice(keys: PackedKeys) -> str | None:
    """Return a key that several images have; None if there is no such key."""
    hashes = np.fromiter((hash(keys.encoded(index)) for index in range(len(keys))), np.int64, len(keys))
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return None
    seen: set[str] = set()
    for index in np.flatnonzero(np.isin(hashes, repeated)).tolist():
        if keys[index] in seen:
            return keys[index]
        seen.add(keys[index])
    return None


def class_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Return how two lists of classes differ, in a few words; None if they are the same."""
    if list(expected) == list(found):
        return None
    missing, added = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    parts = [f"{what} {show_names(names)}" for what, names in (("lacks", missing), ("has also", added)) if names]
    return "; ".join(parts) or "has them in another order"
