"""List archives in threads, keep the listing on disk, and read their images: what tar archives and shards share."""

import json
import os
import threading
import time
import zipfile
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ffcv_ops.files import replacing
from ffcv_ops.sources.folder import EXTENSIONS
from ffcv_ops.sources.ranges import RangeFile, RangeReader
from ffcv_ops.sources.remarks import HIDDEN_FILES, HIDDEN_FOLDERS, Tally
from ffcv_ops.sources.source import PackedKeys, Stage
from ffcv_ops.sources.tar_headers import TarWalk

IMAGE_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_THREADS = 16
_PROGRESS_EVERY_S = 0.5
_INDEX_VERSION = 1


@dataclass(frozen=True)
class Part:
    """An archive, or an archive within another one.

    Attributes
    ----------
    file : int
        The number of the file in the reader.
    start, end : int
        The place of the archive in the file, in bytes.
    where : str
        The name of the archive, for messages.
    prefix : bytes
        Text to put before the names of its members, such as ``n01440764/``.
    """

    file: int
    start: int
    end: int
    where: str
    prefix: bytes = b""

    def walk(self, reader: RangeReader) -> TarWalk:
        """Return the members of the archive."""
        return TarWalk(lambda offset, size: reader.read(self.file, offset, size), self.where, self.start, self.end)


@dataclass
class Listing:
    """Images of archives, in any order.

    Attributes
    ----------
    names : PackedKeys
        The path of each image in its archive, behind the prefix of the part.
    places : array of int64
        File, offset and size in bytes of each image, one after the other.
    texts : array of int32
        If the archives tell classes, the number of each image's class text in `found`.
    found : dict of str to int
        The texts that tell classes.
    tally, extensions : Tally
        What was left out.
    folders : set of bytes
        The folders of the images. The name of the top is empty.
    entries : set of bytes
        Folders that the archives name, which may be empty.
    hidden : set of bytes
        Hidden folders that were left out.
    """

    names: PackedKeys = field(default_factory=PackedKeys)
    places: array = field(default_factory=lambda: array("q"))
    texts: array = field(default_factory=lambda: array("i"))
    found: dict[str, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    extensions: Tally = field(default_factory=Tally)
    folders: set[bytes] = field(default_factory=set)
    entries: set[bytes] = field(default_factory=set)
    hidden: set[bytes] = field(default_factory=set)
    block: bytearray = field(default_factory=bytearray)

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
        """Add the listing of another part, which has not been merged with anything."""
        self.names.extend(bytes(other.block))
        self.places.extend(other.places)
        numbers = [self.found.setdefault(text, len(self.found)) for text in other.found]
        self.texts.extend(numbers[text] for text in other.texts)
        self.tally.merge(other.tally)
        self.extensions.merge(other.extensions)
        self.folders |= other.folders
        self.entries |= other.entries
        for name in sorted(other.hidden):
            self.tally.add(HIDDEN_FOLDERS, os.fsdecode(name))

    def save(self, path: Path, identity: Any) -> None:
        """Write the listing so that `load` finds it again."""
        rest = [_INDEX_VERSION, identity, list(self.found), self.tally.found, self.extensions.found]
        text = json.dumps([*rest, *(sorted(map(os.fsdecode, names)) for names in (self.folders, self.entries))])
        names, places = np.frombuffer(self.names.block(), np.uint8), np.frombuffer(self.places, np.int64)
        content = np.frombuffer(text.encode(), np.uint8)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, text=content, names=names, places=places, texts=np.array(self.texts, np.int32))

    @classmethod
    def load(cls, path: Path | None, identity: Any) -> "Listing | None":
        """Return the listing of an interrupted run; None if there is none of the same archives."""
        if path is None or not path.exists():
            return None
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                version, found_identity, *rest = json.loads(arrays["text"].tobytes())
                if (version, found_identity) != (_INDEX_VERSION, json.loads(json.dumps(identity))):
                    return None
                names, places, texts = (arrays[name] for name in ("names", "places", "texts"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # it is cut, and the archives are still there
        listing = cls(places=array("q"), found={text: number for number, text in enumerate(rest[0])})
        listing.names.extend(names.tobytes())
        listing.places.frombytes(places.tobytes())
        listing.texts.frombytes(texts.tobytes())
        listing.tally.found, listing.extensions.found = (
            {kind: (count, example) for kind, (count, example) in tally.items()} for tally in rest[1:3]
        )
        listing.folders, listing.entries = (set(map(os.fsencode, names)) for names in rest[3:])
        return listing


ListPart = Callable[[Part, Callable[[], None]], Listing]
"""Lists a part. It calls its second argument for each image, which raises `Stopped` if the run ends."""


class Stopped(Exception):
    """The listing is not needed any more."""


def list_parts(parts: Sequence[Part], list_part: ListPart, stage: Stage) -> Listing:
    """List parts in threads, and return all of their images. A slow disk then has several questions at once."""
    whole = Listing()
    for listing in _in_threads(parts, list_part, stage):
        whole.merge(listing)
    return whole


def _in_threads(parts: Sequence[Part], list_part: ListPart, stage: Stage) -> Iterator[Listing]:
    counts, stop, reported_s = [0] * len(parts), threading.Event(), time.monotonic()

    def run(number: int, part: Part) -> Listing:
        def count() -> None:
            counts[number] += 1
            if stop.is_set():
                raise Stopped

        return list_part(part, count)

    def report(last_s: float) -> float:
        now_s = time.monotonic()
        if now_s - last_s < _PROGRESS_EVERY_S:
            return last_s
        stage("images listed", sum(counts))
        return now_s

    futures: deque[Future[Listing]] = deque()
    threads = ThreadPoolExecutor(_THREADS)
    rest = iter(enumerate(parts))
    try:
        while True:
            futures.extend(threads.submit(run, *part) for part in islice(rest, 2 * _THREADS - len(futures)))
            if not futures:
                return
            while not wait([futures[0]], _PROGRESS_EVERY_S).done:
                reported_s = report(reported_s)
            reported_s = report(reported_s)
            yield futures.popleft().result()
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


class ArchiveReader:
    """The files in archives. The place of an image is the number of the archive, offset and size in bytes."""

    def __init__(self, address: str, files: Sequence[RangeFile]):
        self.address, self._ranges = address, RangeReader(files)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self._ranges.files)

    def locate(self, key: str) -> str:
        """Return the name of the archives and that of the image in them."""
        return f"{self.address}/{key}"

    def read(self, key: str, place: Sequence[int]) -> bytes:
        """Return the content of a file. See `ffcv_ops.sources.source.Reader`."""
        return self._ranges.read(*place)
