"""Encode images: the tasks of the workers, and the rules by which an image becomes bytes."""

import errno
import pickle
import platform
import socket
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.codec import jpeg, shared_tables
from ffcv_ops.errors import UserError
from ffcv_ops.sources.image import Change, read_image
from ffcv_ops.sources.source import Reader, SourceError
from ffcv_ops.workers.versions import compare_versions
from ffcv_ops.writing.plan import WritePlan, WriteSettings, library_versions

# Threads of one process that read images. A network file system answers in milliseconds, and several at once.
_NUM_READERS = 8
# The most images of a task that are read and not yet encoded. Originals can be much larger than what they become.
_READ_AHEAD = 32
# Errors of opening a file that are the file's own: no target of a link, no permission, a circle of links, a folder. For
# other errors, storage has failed, and no image may be left out.
_FAULTS_OF_IMAGES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO}

Entry = tuple[int, int, int, int, bytes, int]
"""Mode, width, height, size in bytes, SHA-256 and `Change` of an encoded image."""


@dataclass(frozen=True)
class Encoded:
    """The result of an `EncodeTask`."""

    entries: list[Entry | str]  # an `Entry` for each image, or the reason why the image is bad
    contents: list[np.ndarray]  # the bytes of each good image, uint8; empty for a sample
    counts: list[np.ndarray]  # for a sample, the symbols of each JPEG, as `shared_tables.count_symbols` counts them


@dataclass(frozen=True)
class EncodeJob:
    """The facts that all tasks of a file have in common."""

    settings: WriteSettings
    reader: bytes  # the pickled `Reader` of the source, which each process opens once
    tables: np.ndarray | None = None  # the Huffman tables of the file, for `jpeg.encode`
    is_sample: bool = False  # count the symbols of the images instead of keeping their bytes
    # The result of `encoder_versions` on the machine that leads. If another machine works on the task, it compares.
    versions: Mapping[str, str] | None = None


class EncodeTask:
    """The task to read and encode some images. See `ffcv_ops.workers.tasks.Task`.

    Parameters
    ----------
    job : EncodeJob
    keys, places, raw : sequences
        For each image, its key and place in the source, and whether it stays raw whatever its size.
    """

    def __init__(self, job: EncodeJob, keys: Sequence[str], places: Sequence[Sequence[int]], raw: Sequence[bool]):
        self.job, self.keys, self.places, self.raw = job, keys, places, raw
        self._reads: deque[Future[bytes]] = deque()

    @classmethod
    def of_positions(cls, job: EncodeJob, plan: WritePlan, positions: np.ndarray) -> "EncodeTask":
        """Return the task for the images at these positions of the storage order."""
        keys = [plan.key(position) for position in positions]
        places, raw = plan.source.places[plan.order[positions]].tolist(), plan.raw[positions].tolist()
        return cls(job, keys, places, raw)

    def prepare(self) -> None:
        """Begin to read the first images, in threads. Images of another task may still be encoded then."""
        self._reads = deque(self._read(number) for number in range(min(_READ_AHEAD, len(self.keys))))

    def _read(self, number: int) -> Future[bytes]:
        reader = _open_reader(self.job.reader)
        return _reader_threads().submit(reader.read, self.keys[number], self.places[number])

    def __call__(self) -> Encoded:
        """Return the encoded images.

        Raises
        ------
        SourceError
            If the source has changed since it was listed.
        UserError
            If this machine has other versions than the one that leads.
        MemoryError
            If an image needs more memory than there is. The message names the image.
        """
        job = self.job
        if job.versions is not None:
            compare_versions(socket.gethostname(), _own_versions(job.settings.mode != "raw"), job.versions)
        if not self._reads:
            self.prepare()
        reads, self._reads = self._reads, deque()
        reader = _open_reader(job.reader)
        encoded = Encoded([], [], [])
        with _no_pillow_limit:
            for number, (key, keep_raw) in enumerate(zip(self.keys, self.raw, strict=True)):
                name = reader.locate(key)
                if number + _READ_AHEAD < len(self.keys):
                    reads.append(self._read(number + _READ_AHEAD))
                try:
                    # The content is freed once the image is decoded.
                    loaded = _load(name, reads.popleft(), job.settings.pixel_limit)
                    entry = loaded if isinstance(loaded, str) else _encode(*loaded, keep_raw, job, encoded)
                except MemoryError as error:
                    raise MemoryError(f"{name}: out of memory") from error
                encoded.entries.append(entry)
        return encoded

    def split(self) -> list["EncodeTask"]:
        """Return a task for each image."""
        return [
            EncodeTask(self.job, [key], [place], [raw])
            for key, place, raw in zip(self.keys, self.places, self.raw, strict=True)
        ]

    def join(self, results: list[Encoded]) -> Encoded:
        """Return the result for all images from the results for each."""
        joined = Encoded([], [], [])
        for result in results:
            joined.entries.extend(result.entries)
            joined.contents.extend(result.contents)
            joined.counts.extend(result.counts)
        return joined

    def name(self) -> str:
        """Return the full name of the first image."""
        return _open_reader(self.job.reader).locate(self.keys[0])


@lru_cache(2)
def _open_reader(content: bytes) -> Reader:
    """Return the reader of a source, which may hold open files and what it has read ahead."""
    return pickle.loads(content)


@cache
def _reader_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_READERS)


class _NoPillowLimit:
    """A context without Pillow's limit of pixels, which is a global variable. `read_image` checks the setting."""

    def __init__(self) -> None:
        self._lock, self._num_users = threading.Lock(), 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        from PIL import Image

        with self._lock:
            if not self._num_users:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._num_users += 1

    def __exit__(self, *error: object) -> None:
        from PIL import Image

        with self._lock:
            self._num_users -= 1
            if not self._num_users:
                Image.MAX_IMAGE_PIXELS = self._limit


_no_pillow_limit = _NoPillowLimit()


def _load(name: str, content: Future[bytes], max_pixels: int) -> tuple[np.ndarray, Change] | str:
    """Return the pixels of an image and their changes, or the reason why it cannot be decoded."""
    try:
        return read_image(name, max_pixels, content.result())
    except (MemoryError, ImportError, SourceError):  # not the image's fault
        raise
    except UserError as error:
        return str(error)
    except OSError as error:
        # The errors of decoders have no number.
        if error.errno is not None and error.errno not in _FAULTS_OF_IMAGES:
            reason = f"[Errno {error.errno}] {error.strerror}"
            raise SourceError(
                f"{name}: cannot be read ({reason}): storage failed; once it is back, the same command goes on"
            ) from error
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # Pillow documents no class for what its decoders raise
        return f"{type(error).__name__}: {error}"


def _encode(image: np.ndarray, changes: Change, keep_raw: bool, job: EncodeJob, encoded: Encoded) -> Entry | str:
    """Return the entry of an image, or the reason why it is bad. Add its bytes or its symbols to `encoded`."""
    try:
        mode, width, height, content = encode_image(image, job.settings, keep_raw, job.tables)
    except UserError as error:
        return str(error)
    if not job.is_sample:
        encoded.contents.append(content)
    elif mode == beton.MODE_JPG:
        image = shrink(image, job.settings.max_side)
        encoded.counts.append(shared_tables.count_symbols(image, job.settings.quality))
    return mode, width, height, content.nbytes, sha256(content.data).digest(), int(changes)


def encode_image(
    image: np.ndarray, settings: WriteSettings, keep_raw: bool, tables: np.ndarray | None = None
) -> tuple[int, int, int, np.ndarray]:
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
        return beton.MODE_RAW, width, height, np.ascontiguousarray(image).reshape(-1)
    return beton.MODE_JPG, width, height, jpeg.encode(image, settings.quality, tables)


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


def encoder_versions(encodes: bool = True) -> dict[str, str]:
    """Return what all machines that encode for one file must share: versions, processor, and the result for one image.

    Without `encodes`, the image is only decoded and shrunk. That does not load the kernels of the encoder.
    """
    wave = np.arange(240, dtype=np.int64) ** 2 // 97
    image = ((wave[:, None, None] + wave[None, :, None] * np.arange(1, 4)) % 256).astype(np.uint8)
    settings = WriteSettings(max_side=199)
    if encodes:
        tables = shared_tables.choose_tables([shared_tables.count_symbols(image, settings.quality)], settings.quality)
        _, _, _, content = encode_image(image, settings, keep_raw=False, tables=tables)
    else:
        import cv2

        content = cv2.imencode(".jpg", shrink(image, settings.max_side))[1]
    result = sha256(content.data)
    result.update(jpeg.decode(content).tobytes())
    return {
        **library_versions(),
        "machine": platform.machine(),
        "encoder": str(jpeg.ENCODER),
        "what becomes of an image": result.hexdigest()[:16],
    }


_own_versions = cache(encoder_versions)
