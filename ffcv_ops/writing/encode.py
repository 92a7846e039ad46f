"""Encode images in worker processes, and keep them until their places in the file are known."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.codec import jpeg, shared_tables
from ffcv_ops.errors import UserError
from ffcv_ops.files import write_all
from ffcv_ops.sources.image import Change, read_image
from ffcv_ops.sources.source import Reader, SourceError
from ffcv_ops.writing.plan import WritePlan, WriteSettings, library_versions

# Threads of one worker that read images. A network file system answers in milliseconds, and several at once.
_NUM_READERS = 8

Entry = tuple[int, int, int, int, bytes, int]
"""Mode, width, height, size in bytes, SHA-256 and `Change` of an encoded image."""


@dataclass(frozen=True)
class EncodeRequest:
    """A run of images to encode, with the Huffman tables of the file. If `chunk` is None, they are a sample.

    A worker keeps the images of a run. Of a sample, it counts the symbols instead.
    """

    chunk: int | None
    keys: list[str]
    places: list[list[int]]
    raw: list[bool]
    tables: np.ndarray | None = None


@dataclass(frozen=True)
class Encoded:
    """The answer to `EncodeRequest`: an `Entry` for each image, or the reason why the image is bad.

    `counts` has the symbols of each JPEG of a sample, as `shared_tables.count_symbols` counts them.
    """

    chunk: int | None
    entries: list[Entry | str]
    counts: list[np.ndarray]


@dataclass(frozen=True)
class PlaceRequest:
    """The offsets in bytes of the good images of a run. The worker writes the images there, or hands them over."""

    chunk: int
    ptr: list[int]
    hand_over: bool


@dataclass(frozen=True)
class Placed:
    """The answer to `PlaceRequest`: the images that were handed over, and their offsets in bytes."""

    chunk: int
    ptr: list[int]
    contents: list[Any]


def encode_request(
    plan: WritePlan, chunk: int | None, positions: np.ndarray, tables: np.ndarray | None = None
) -> EncodeRequest:
    """Return the request for the images at these positions of the storage order."""
    keys = [plan.key(position) for position in positions]
    places, raw = plan.source.places[plan.order[positions]].tolist(), plan.raw[positions].tolist()
    return EncodeRequest(chunk, keys, places, raw, tables)


class Encoder:
    """A worker's function: it answers `EncodeRequest` with `Encoded`, and `PlaceRequest` with `Placed`.

    Threads read the images of the requests that have arrived, while earlier images are encoded.
    """

    def __init__(self, settings: WriteSettings, reader: Reader, partial_path: Path):
        from PIL import Image

        self.settings, self.reader, self.partial_path = settings, reader, partial_path
        self._kept: dict[int, list[memoryview]] = {}
        self._readers = ThreadPoolExecutor(_NUM_READERS)
        self._coming: deque[list[Future[bytes]]] = deque()
        # Pillow's limit is a global variable, and this process has one setting. `read_image` checks the number.
        Image.MAX_IMAGE_PIXELS = None

    @cached_property
    def _file(self) -> int:
        return os.open(self.partial_path, os.O_WRONLY)

    def expect(self, message: EncodeRequest | PlaceRequest) -> None:
        """Begin to read the images of a request that has arrived."""
        if isinstance(message, EncodeRequest):
            reads = map(self._readers.submit, repeat(self.reader.read), message.keys, message.places)
            self._coming.append(list(reads))

    def __call__(self, message: EncodeRequest | PlaceRequest) -> Encoded | Placed:
        return self._place(message) if isinstance(message, PlaceRequest) else self._encode(message)

    def _place(self, message: PlaceRequest) -> Placed:
        contents = self._kept.pop(message.chunk)
        if message.hand_over:
            return Placed(message.chunk, message.ptr, [PickleBuffer(content) for content in contents])
        for ptr, content in zip(message.ptr, contents, strict=True):
            write_all(self._file, content, ptr)
        return Placed(message.chunk, [], [])

    def _encode(self, message: EncodeRequest) -> Encoded:
        entries: list[Entry | str] = []
        contents, counts = [], []
        if not self._coming:
            self.expect(message)
        contents_read = self._coming.popleft()
        for key, keep_raw in zip(message.keys, message.raw, strict=True):
            loaded = self._load(self.reader.locate(key), contents_read.pop(0))
            if isinstance(loaded, str):
                entries.append(loaded)
                continue
            image, changes = loaded
            try:
                mode, width, height, content = encode_image(image, self.settings, keep_raw, message.tables)
            except UserError as error:
                entries.append(str(error))
                continue
            entries.append((mode, width, height, len(content), sha256(content).digest(), int(changes)))
            if message.chunk is not None:
                contents.append(content)
            elif mode == beton.MODE_JPG:
                counts.append(shared_tables.count_symbols(shrink(image, self.settings.max_side), self.settings.quality))
        if message.chunk is not None:
            self._kept[message.chunk] = contents
        return Encoded(message.chunk, entries, counts)

    def _load(self, name: str, content: Future[bytes]) -> tuple[np.ndarray, Change] | str:
        """Return the pixels of an image and their changes, or the reason why it cannot be decoded."""
        try:
            return read_image(name, self.settings.pixel_limit, content.result())
        except (MemoryError, ImportError, SourceError):  # not the image's fault
            raise
        except UserError as error:
            return str(error)
        except Exception as error:  # Pillow documents no class for what its decoders raise
            return f"{type(error).__name__}: {error}"


def encode_image(
    image: np.ndarray, settings: WriteSettings, keep_raw: bool, tables: np.ndarray | None = None
) -> tuple[int, int, int, memoryview]:
    """Return mode, width, height and bytes of an image (H, W, 3), shrunk and encoded as the settings tell.

    `tables` are the Huffman tables for `jpeg.encode`.

    Raises
    ------
    UserError
        If a side is longer than a file can hold.
    """
    image = shrink(image, settings.max_side)
    height, width = image.shape[:2]
    if max(height, width) > jpeg.MAX_SIDE_PX:
        raise UserError(f"{width} x {height} px are more than a file can hold; set max_side")
    if settings.mode == "smart":
        assert settings.smart_threshold is not None
        keep_raw = image.nbytes <= settings.smart_threshold
    if keep_raw:
        return beton.MODE_RAW, width, height, np.ascontiguousarray(image).reshape(-1).data
    return beton.MODE_JPG, width, height, jpeg.encode(image, settings.quality, tables).data


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink an image (H, W, 3) whose longer side exceeds `max_side` px, as FFCV's ``RGBImageField`` does; 0: never."""
    import cv2

    height, width = image.shape[:2]
    if not max_side or max(height, width) <= max_side:
        return image
    ratio = max_side / max(height, width)
    # FFCV fails for an image so narrow that its shorter side rounds down to 0 px.
    size = max(1, int(ratio * width)), max(1, int(ratio * height))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encoder_versions() -> dict[str, str]:
    """Return what all machines that encode for one file must share: library versions, and the result for one image."""
    wave = np.arange(240, dtype=np.int64) ** 2 // 97
    image = ((wave[:, None, None] + wave[None, :, None] * np.arange(1, 4)) % 256).astype(np.uint8)
    settings = WriteSettings(max_side=199)
    tables = shared_tables.choose_tables([shared_tables.count_symbols(image, settings.quality)], settings.quality)
    _, _, _, content = encode_image(image, settings, keep_raw=False, tables=tables)
    result = sha256(content)
    result.update(jpeg.decode(np.frombuffer(content, np.uint8)).tobytes())
    return {**library_versions(), "what becomes of an image": result.hexdigest()[:16]}
