"""Write an image folder as one ``.beton`` file: workers encode, one place lays out, nothing is lost on the way.

The bytes are a function of the images, the settings and the versions of the libraries that encode: not of the number of
workers or machines, nor of how often the run was interrupted. ``docs/WRITING.md`` tells what is on disk while a run is
under way.
"""

import os
import platform
import shutil
import socket
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from json import dumps
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.codec import jpeg
from ffcv_ops.files import replace_text, write_all
from ffcv_ops.sources.folder import ImageFolder, class_difference, load_image, scan, stat_image
from ffcv_ops.units import show_bytes
from ffcv_ops.workers.processes import WorkerKilled, Workers, choose_num_workers, map_in_order
from ffcv_ops.workers.ranks import Leader
from ffcv_ops.writing import journal

MODES = ("jpg", "raw", "proportion", "smart")
_ROW_TYPE = np.dtype([("", beton.IMAGE_TYPE), ("", "<i8")], align=True)
_SAMPLE_TYPE = np.dtype(
    [
        *(("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8"), ("size", "<u8")),
        ("checksum", beton.CHECKSUM_TYPE),
    ]
)
_HEAD_BYTES = beton.HEADER_TYPE.itemsize + 2 * beton.FIELD_TYPE.itemsize
_CHUNK = 16
_CHUNKS_A_WORKER = 4
_ESTIMATE_IMAGES = 16, 128
# The two uses of the storage seed draw from different keys.
_ORDER_STREAM, _RAW_STREAM = 0, 1

Entry = tuple[int, int, int, int, bytes]
"""Mode, width, height, size in bytes and SHA-256 of an encoded image."""


class WriteError(RuntimeError):
    """A run that could not be finished: a full disk, a killed worker. The message says what to do."""


class BadImage(WriteError):
    """An image that cannot be decoded or stored; the unfinished file was deleted."""


@dataclass(frozen=True)
class WriteSettings:
    """What the content of a file depends on, besides the images.

    Attributes
    ----------
    mode : {"jpg", "raw", "proportion", "smart"}
        ``jpg``: JPEG. ``raw``: uint8 pixels. ``proportion``: a share of the images raw, the others JPEG. ``smart``:
        JPEG where the pixels take more than `smart_threshold` bytes, else raw; so decides FFCV's ``RGBImageField``.
    max_side : int
        Images with a longer side in px are shrunk to it as FFCV does (``INTER_AREA``, sizes rounded down); 0: never.
    quality : int
        JPEG quality, 1 to 100.
    raw_share : float
        With ``proportion``: the probability, 0 to 1, that an image is kept raw, 1 - FFCV's ``compress_probability``.
        The draw is a function of `seed` and the image's place in the sorted folder.
    smart_threshold : int or None
        With ``smart``: bytes. FFCV's default there, none, would keep every image raw; it has to be given here.
    subset : int
        Take this many images, evenly spaced through the sorted folder; -1: all.
    seed : int
        Seed of the order in which images are stored, and of the draws of ``proportion``.
    page_size : int
        Bytes, a power of two from 2 MiB to 2 GiB. No sample spans two pages.
    """

    mode: str = "jpg"
    max_side: int = 500
    quality: int = 90
    raw_share: float = 0.5
    smart_threshold: int | None = None
    subset: int = -1
    seed: int = 0
    page_size: int = 1 << 23

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot be."""
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.mode == "smart" and self.smart_threshold is None:
            raise ValueError("mode smart needs smart_threshold: images whose pixels take more bytes become JPEG")
        if not 0 <= self.max_side <= jpeg.MAX_SIDE_PX:
            raise ValueError(f"max_side must be 0 (keep sizes) or 1 to {jpeg.MAX_SIDE_PX} px, not {self.max_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, not {self.quality}")
        if not 0 <= self.raw_share <= 1:
            raise ValueError(f"raw_share must be 0 to 1, not {self.raw_share}")
        if self.subset != -1 and self.subset < 1:
            raise ValueError(f"subset must be -1 (all images) or at least 1, not {self.subset}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be 0 to 2^64 - 1, not {self.seed}")
        low, high = beton.MIN_PAGE_SIZE, beton.MAX_PAGE_SIZE
        if not low <= self.page_size <= high or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two from {low} to {high} bytes, not {self.page_size}")


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be written: `order` (n,) has the images in storage order, `raw` (n,) which of them are drawn raw."""

    folder: ImageFolder
    settings: WriteSettings
    order: np.ndarray
    raw: np.ndarray

    @property
    def num_images(self) -> int:
        """Images to store, those that will turn out to be bad included."""
        return len(self.order)

    @property
    def data_start(self) -> int:
        """Offset in bytes of the first page."""
        head_bytes = _HEAD_BYTES + self.num_images * _ROW_TYPE.itemsize
        return -(-head_bytes // self.settings.page_size) * self.settings.page_size

    def path(self, position: int) -> str:
        """The image at a position of the storage order, relative to the folder."""
        return self.folder.paths[self.order[position]]

    def identity(self) -> dict[str, Any]:
        """Everything the bytes of the file depend on, in JSON's types."""
        listing = sha256()
        labels, stats = self.folder.labels[self.order].tolist(), self.folder.stats[self.order].tolist()
        for index, label, (size, mtime_ns) in zip(self.order.tolist(), labels, stats, strict=True):
            listing.update(b"%d %d %d " % (label, size, mtime_ns))
            listing.update(os.fsencode(self.folder.paths[index]) + b"\0")
        return {
            "format": beton.MANIFEST_VERSION,
            "images": listing.hexdigest(),
            "libraries": library_versions(),
            "encoder": jpeg.ENCODER,
            **asdict(self.settings),
        }


def library_versions() -> dict[str, str]:
    """The versions of the libraries that the bytes of a file depend on."""
    import cv2
    import PIL

    return {"numpy": np.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__}


def encoder_versions() -> dict[str, str]:
    """What must be the same on all machines that encode for one file: the libraries, and what they make of an image."""
    wave = np.arange(240, dtype=np.int64) ** 2 // 97
    image = ((wave[:, None, None] + wave[None, :, None] * np.arange(1, 4)) % 256).astype(np.uint8)
    _, _, _, content = encode_image(image, WriteSettings(max_side=199), keep_raw=False)
    made = sha256(content)
    made.update(jpeg.decode(np.frombuffer(content, np.uint8)).tobytes())
    return {**library_versions(), "what becomes of an image": made.hexdigest()[:16]}


def build_plan(folder: ImageFolder, settings: WriteSettings) -> Plan:
    """Choose the images, the order in which they are stored and, for ``proportion``, those that stay raw."""
    total = len(folder.paths)
    count = total if settings.subset == -1 else min(settings.subset, total)
    chosen = np.arange(count) * total // count
    # Raw bits of a counter-based generator and a stable sort: the same on every machine and for every NumPy.
    order = chosen[np.argsort(_bits(settings.seed, _ORDER_STREAM, total)[chosen], kind="stable")]
    raw = np.full(count, settings.mode == "raw")
    if settings.mode == "proportion":
        raw = (_bits(settings.seed, _RAW_STREAM, total)[order] >> np.uint64(11)) * 2.0**-53 < settings.raw_share
    return Plan(folder, settings, order, raw)


def _bits(seed: int, stream: int, count: int) -> np.ndarray:
    return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)


# ---------------------------------------------------------------------------------------------------------------------
# In the workers


@dataclass(frozen=True)
class _Encode:
    """Encode a run of images and keep them until they are placed, or only measure them where `chunk` is None."""

    chunk: int | None
    paths: list[str]
    stats: list[list[int]]
    raw: list[bool]


@dataclass(frozen=True)
class _Place:
    """Write the images of an encoded run to these offsets, or hand them over; of a bad one there is nothing."""

    chunk: int
    ptr: list[int]
    hand_over: bool


@dataclass(frozen=True)
class _Placed:
    """The answer to `_Place`: what was handed over, and to which offsets it is to be written."""

    chunk: int
    ptr: list[int]
    contents: list[Any]


@dataclass(frozen=True)
class _Encoded:
    """The answer to `_Encode`: an `Entry` for every image, or the reason why it is bad."""

    chunk: int | None
    entries: list[Entry | str]


def _start_workers(
    num_workers: int, settings: WriteSettings, root: Path, partial_path: Path, leader: Leader | None
) -> Workers:
    # The encoder's kernels are loaded once, before the processes are forked, where they will be used.
    preload = [] if settings.mode == "raw" else ["ffcv_ops.codec.encoder"]
    return Workers(num_workers, _Encoder, settings, root, partial_path, leader=leader, preload=preload)


class _Encoder:
    """Answers messages in a worker process."""

    def __init__(self, settings: WriteSettings, root: Path, partial_path: Path):
        # Text, for joining paths takes as long as reading a small file.
        self.settings, self.root, self.partial_path = settings, os.fspath(root), partial_path
        self._kept: dict[int, list[memoryview]] = {}

    @cached_property
    def _file(self) -> int:
        return os.open(self.partial_path, os.O_WRONLY)

    def __call__(self, message: _Encode | _Place) -> _Encoded | _Placed:
        return self._place(message) if isinstance(message, _Place) else self._encode(message)

    def _place(self, message: _Place) -> _Placed:
        contents = self._kept.pop(message.chunk)
        if message.hand_over:
            return _Placed(message.chunk, message.ptr, [PickleBuffer(content) for content in contents])
        for ptr, content in zip(message.ptr, contents, strict=True):
            write_all(self._file, content, ptr)
        return _Placed(message.chunk, [], [])

    def _encode(self, message: _Encode) -> _Encoded:
        entries: list[Entry | str] = []
        contents = []
        for path, stat, keep_raw in zip(message.paths, message.stats, message.raw, strict=True):
            path = os.path.join(self.root, path)
            self._check_same(path, stat)
            try:
                mode, width, height, content = encode_image(load_image(path), self.settings, keep_raw)
            except (MemoryError, ImportError):
                raise  # not the image's fault
            except Exception as error:  # Pillow raises what its decoders happen to raise
                entries.append(f"{type(error).__name__}: {error}")
                continue
            entries.append((mode, width, height, len(content), sha256(content).digest()))
            contents.append(content)
        if message.chunk is not None:
            self._kept[message.chunk] = contents
        return _Encoded(message.chunk, entries)

    def _check_same(self, path: str, stat: list[int]) -> None:
        """Refuse another image than was listed, such as another machine may have under the same name."""
        try:
            same = list(stat_image(path)) == stat
        except FileNotFoundError:
            same = False
        if not same:
            raise ValueError(
                f"{path}: on {socket.gethostname()} not the file that was listed (size or time of change differ, or it "
                "is gone); leave the images alone while they are written, and let all machines see the same ones"
            )


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink an image (H, W, 3) whose longer side exceeds `max_side` px, as FFCV's ``RGBImageField`` does; 0: never."""
    import cv2

    height, width = image.shape[:2]
    if not max_side or max(height, width) <= max_side:
        return image
    ratio = max_side / max(height, width)
    # FFCV stops at an image so narrow that its shorter side rounds down to 0 px.
    size = max(1, int(ratio * width)), max(1, int(ratio * height))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_image(image: np.ndarray, settings: WriteSettings, keep_raw: bool) -> tuple[int, int, int, memoryview]:
    """Return mode, width, height and bytes of an image (H, W, 3), shrunk and encoded as the settings say."""
    image = shrink(image, settings.max_side)
    height, width = image.shape[:2]
    if max(height, width) > jpeg.MAX_SIDE_PX:
        raise ValueError(f"{width} x {height} px are more than a file can hold; set max_side")
    if settings.mode == "smart":
        assert settings.smart_threshold is not None
        keep_raw = image.nbytes <= settings.smart_threshold
    if keep_raw:
        return beton.MODE_RAW, width, height, np.ascontiguousarray(image).reshape(-1).data
    return beton.MODE_JPG, width, height, jpeg.encode(image, settings.quality).data


# ---------------------------------------------------------------------------------------------------------------------
# In the run's own process


@dataclass
class _Page:
    """A page that is not in the journal yet."""

    start: int
    used: int = 0
    record: list[list[int] | str] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)
    unwritten: int = 0


class _Layout:
    """Puts encoded samples on pages one behind the other, and notes the pages that have been written."""

    def __init__(self, plan: Plan, partial: journal.PartialFile):
        self.plan, self.partial = plan, partial
        self.samples, self.reasons, self.position = _replay(plan, partial.resumed)
        self._pages = deque([_Page(plan.data_start + len(partial.resumed) * plan.settings.page_size)])
        self._pages_of_chunk: dict[int, list[_Page]] = {}
        partial.resumed.clear()

    def place(self, encoded: _Encoded, hand_over: bool) -> _Place:
        """Say where the images of the next run go, and whether whoever encoded them writes them."""
        assert encoded.chunk is not None
        before = len(self._pages)
        ptr = []
        for entry in encoded.entries:
            if isinstance(entry, str):
                self.reasons[self.position] = entry
                self._pages[-1].record.append(entry)
            else:
                ptr.append(self._add(entry))
            self.position += 1
        pages = list(self._pages)[before - 1 :]
        for page in pages:
            page.unwritten += 1
        self._pages_of_chunk[encoded.chunk] = pages
        return _Place(encoded.chunk, ptr, hand_over)

    def _add(self, entry: Entry) -> int:
        mode, width, height, size, digest = entry
        page_size = self.plan.settings.page_size
        if size > page_size:
            raise BadImage(
                f"{self.plan.folder.root / self.plan.path(self.position)}: {width} x {height} px take {size} bytes, a "
                f"page has {page_size}; use --page_size={1 << (size - 1).bit_length()} or a smaller --max_side"
            )
        if self._pages[-1].used + size > page_size:
            self._pages.append(_Page(self._pages[-1].start + page_size))
        page = self._pages[-1]
        ptr = page.start + page.used
        checksum = int(np.frombuffer(digest, beton.CHECKSUM_TYPE)[0])
        self.samples[self.position] = mode, width, height, ptr, size, checksum
        page.used += size
        page.record.append([mode, width, height, size, checksum])
        page.hashes += digest
        return ptr

    def written(self, placed: _Placed) -> None:
        """Take note that the images of a run are where `place` said, once those that were handed over are, too."""
        for ptr, content in zip(placed.ptr, placed.contents, strict=True):
            self.partial.write(content, ptr)
        for page in self._pages_of_chunk.pop(placed.chunk):
            page.unwritten -= 1
        while len(self._pages) > 1 and not self._pages[0].unwritten:
            self._note(self._pages.popleft())

    def close(self) -> None:
        """Note the last page, all images being written."""
        assert not self._pages_of_chunk and len(self._pages) == 1
        if self._pages[0].record:
            self._note(self._pages.popleft())
        self.partial.flush()

    def _note(self, page: _Page) -> None:
        self.partial.append_page(sha256(page.hashes).hexdigest(), {"samples": page.record}, page.used)


def _replay(plan: Plan, pages: Sequence[dict[str, Any]]) -> tuple[np.ndarray, dict[int, str], int]:
    """Return where the samples of journaled pages are, why others were skipped, and how many these are together."""
    samples, reasons, position = np.zeros(plan.num_images, _SAMPLE_TYPE), {}, 0
    for number, page in enumerate(pages):
        ptr = plan.data_start + number * plan.settings.page_size
        for entry in page["samples"]:
            if isinstance(entry, str):
                reasons[position] = entry
            else:
                mode, width, height, size, checksum = entry
                samples[position] = mode, width, height, ptr, size, checksum
                ptr += size
            position += 1
    return samples, reasons, position


def write(
    source: str | Path,
    target: str | Path,
    settings: WriteSettings | None = None,
    *,
    num_workers: int = -1,
    on_error: str = "stop",
    overwrite: bool = False,
    classes: Sequence[str] | None = None,
    leader: Leader | None = None,
    notice: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write an image folder as a ``.beton`` file with its manifest, or go on where a killed run left off.

    Parameters
    ----------
    source : path
        A folder with one subfolder a class, as for ``torchvision.datasets.ImageFolder``.
    target : path
        The file to make. ``<target>.partial`` and its journal hold the unfinished work.
    settings : WriteSettings, optional
    num_workers : int
        Processes of this one that encode; -1: as many as CPUs allowed. They are started, not forked: a script that
        calls this needs the guard ``if __name__ == "__main__"``.
    on_error : {"stop", "skip"}
        A bad image stops the run, and what was written is deleted; or it is left out and listed in the manifest.
    overwrite : bool
        Replace an existing file, once the new one is whole.
    classes : sequence of str, optional
        The classes that the folder must have, in order, such as those of the training split's manifest.
    leader : Leader, optional
        Of the other ranks, which lend their workers (see `ffcv_ops.workers.ranks`).
    notice : callable
        Is given what the user should know, a line each.
    progress : callable
        Is called with the images done and the images in all.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    ValueError
        For what has to be put right before the run: folder, settings, existing target, space on disk.
    BadImage
        For an image that cannot be decoded, or that is larger than a page.
    WriteError
        For what else stopped the run under way: the disk, a killed worker.
    """
    settings, target = settings or WriteSettings(), Path(target)
    settings.check()
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be stop or skip, not {on_error!r}")
    num_workers = choose_num_workers(num_workers)
    _check_target(target, overwrite)
    folder = scan(source)
    difference = class_difference(classes, folder.classes) if classes is not None else None
    if difference:
        raise ValueError(f"{folder.root}: not the classes of the training split: it {difference}")
    plan = build_plan(folder, settings)
    manifest = _finish_manifest(plan, target)
    if manifest is not None:
        notice(f"{target} was whole already, its manifest is now too")
        return manifest
    if target.exists() and not overwrite:
        raise ValueError(f"{target}: exists already; use --overwrite to replace it")
    return _write(plan, target, num_workers, leader, on_error, notice, progress)


def _check_target(target: Path, overwrite: bool) -> None:
    """Find what cannot be before the folder is read, which takes a while where it is large."""
    if target.is_dir():
        raise ValueError(f"{target}: is a folder; --target names the file to make")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder to write {target.name} to; make it, or change --target")
    if target.exists() and not overwrite and not journal.partial_paths(target)[1].exists():
        raise ValueError(f"{target}: exists already; use --overwrite to replace it")


def _write(
    plan: Plan,
    target: Path,
    num_workers: int,
    leader: Leader | None,
    on_error: str,
    notice: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    settings, source = plan.settings, plan.folder.root.absolute()
    try:
        partial = journal.PartialFile(target, plan.identity(), plan.data_start, settings.page_size)
    except OSError as error:
        raise ValueError(f"{target}.partial: cannot be written ({error.strerror})") from error
    try:
        with (
            closing(partial),
            closing(_start_workers(num_workers, settings, source, partial.path, leader)) as workers,
        ):
            if leader:
                notice(f"{workers.num_workers} workers on {len(leader.hosts)} machine(s)")
            if partial.changed:
                notice(f"starting over: since {partial.path} was begun, {', '.join(partial.changed)} changed")
            layout = _Layout(plan, partial)
            if layout.position:
                notice(f"resuming: {layout.position} of {plan.num_images} images are on disk already")
            _check_space(plan, layout.position, target, workers, notice)
            _encode_rest(plan, layout, workers, on_error, progress)
            return _finish(plan, layout, target)
    except BadImage:
        journal.remove_partial(target)
        raise
    except ValueError:
        if not partial.page_hashes:
            journal.remove_partial(target)
        raise
    except (WorkerKilled, MemoryError) as error:
        raise WriteError(
            f"{error or 'out of memory'}; most often memory is short: give the run more, or fewer --num_workers; the "
            f"same command goes on from {partial.path}"
        ) from None
    except OSError as error:
        raise WriteError(
            f"{partial.path}: writing stopped ({error.strerror or error}); once that is mended, the same command goes "
            "on from there"
        ) from error


def _check_space(plan: Plan, done: int, target: Path, workers: Workers, notice: Callable[[str], None]) -> None:
    """Encode a few images to tell the size of the file, and compare it with the space on the disk."""
    count = min(plan.num_images, max(_ESTIMATE_IMAGES[0], min(plan.num_images // 50, _ESTIMATE_IMAGES[1])))
    positions = np.arange(count) * plan.num_images // count
    messages = (_encode(plan, None, chunk) for chunk in np.array_split(positions, -(-count // 4)))
    entries = [entry for encoded in map_in_order(workers, messages) for entry in encoded.entries]
    sizes = [entry[3] for entry in entries if not isinstance(entry, str)]
    if not sizes:
        return
    image_bytes = float(np.mean(sizes))
    pages = plan.num_images * image_bytes / max(image_bytes, plan.settings.page_size - image_bytes / 2)
    total_bytes = plan.data_start + np.ceil(pages) * plan.settings.page_size
    notice(f"{plan.num_images} images of about {image_bytes / 1e3:.1f} kB: about {show_bytes(total_bytes)}")
    needed = total_bytes * (1 - done / plan.num_images)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ValueError(
            f"{target.parent}: {show_bytes(free)} free, about {show_bytes(needed)} needed; make room, change --target, "
            "or write less (--max_side, --quality, --raw_share)"
        )


def _encode(plan: Plan, chunk: int | None, positions: np.ndarray) -> _Encode:
    paths = [plan.path(position) for position in positions]
    return _Encode(chunk, paths, plan.folder.stats[plan.order[positions]].tolist(), plan.raw[positions].tolist())


def _encode_rest(
    plan: Plan, layout: _Layout, workers: Workers, on_error: str, progress: Callable[[int, int], None]
) -> None:
    """Have the images encoded anywhere, placed in their order, and written by whoever encoded them."""
    if on_error == "stop" and layout.reasons:
        raise _bad_image(plan, *next(iter(layout.reasons.items())))
    starts = range(layout.position, plan.num_images, _CHUNK)
    encoded: dict[int, tuple[int, _Encoded]] = {}
    sent = placed = written = 0
    progress(layout.position, plan.num_images)
    while written < len(starts):
        worker = workers.idle()
        if worker is not None and sent < min(len(starts), placed + _CHUNKS_A_WORKER * workers.num_workers):
            stop = min(starts[sent] + _CHUNK, plan.num_images)
            workers.send(worker, _encode(plan, sent, np.arange(starts[sent], stop)))
            sent += 1
            continue
        worker, answer = workers.receive()
        if isinstance(answer, _Placed):
            layout.written(answer)
            written += 1
            continue
        encoded[answer.chunk] = worker, answer
        while placed in encoded:
            owner, run = encoded.pop(placed)
            bad = [number for number, entry in enumerate(run.entries) if isinstance(entry, str)]
            if bad and on_error == "stop":
                raise _bad_image(plan, layout.position + bad[0], str(run.entries[bad[0]]))
            workers.send(owner, layout.place(run, hand_over=workers.is_lent(owner)))
            placed += 1
            progress(layout.position, plan.num_images)
    layout.close()


def _bad_image(plan: Plan, position: int, reason: str) -> BadImage:
    path = plan.folder.root / plan.path(position)
    return BadImage(f"{path}: {reason}; mend or remove it, or leave bad images out with --on_error=skip")


# ---------------------------------------------------------------------------------------------------------------------
# The end: tables, name, manifest


def _finish(plan: Plan, layout: _Layout, target: Path) -> dict[str, Any]:
    if len(layout.reasons) == plan.num_images:
        raise _bad_image(plan, *next(iter(layout.reasons.items())))
    head, alloc_table = _tables(plan, layout.samples, layout.reasons, len(layout.partial.page_hashes))
    manifest = _manifest(plan, layout.samples, layout.reasons, layout.partial.page_hashes, target)
    header_bytes = beton.HEADER_TYPE.itemsize
    layout.partial.finish(head[header_bytes:], alloc_table.tobytes(), head[:header_bytes])
    # That of a file that is replaced goes when the new one is safely on disk.
    beton.manifest_path(target).unlink(missing_ok=True)
    layout.partial.publish()
    _write_manifest(target, manifest)
    return manifest


def _tables(plan: Plan, samples: np.ndarray, reasons: dict[int, str], num_pages: int) -> tuple[bytes, np.ndarray]:
    """Return the bytes from the header to the metadata's end, and the allocation table."""
    kept = np.ones(plan.num_images, bool)
    kept[list(reasons)] = False
    samples = samples[kept]
    header = np.zeros(1, beton.HEADER_TYPE)
    header["version"], header["num_fields"] = beton.VERSION, 2
    header["page_size"], header["num_samples"] = plan.settings.page_size, len(samples)
    header["alloc_table_ptr"] = plan.data_start + num_pages * plan.settings.page_size
    fields = np.zeros(2, beton.FIELD_TYPE)
    fields["type_id"] = beton.IMAGE_FIELD, beton.INT_FIELD
    fields["name"][:, :5] = np.frombuffer(b"imagelabel", np.uint8).reshape(2, 5)
    rows = np.zeros(len(samples), _ROW_TYPE)
    for name in ("mode", "width", "height"):
        rows["f0"][name] = samples[name]
    rows["f0"]["data_ptr"] = samples["ptr"]
    rows["f1"] = plan.folder.labels[plan.order[kept]]
    alloc_table = np.zeros(len(samples), beton.ALLOC_TYPE)
    alloc_table["sample_id"] = np.arange(len(samples))
    alloc_table["ptr"], alloc_table["size"] = samples["ptr"], samples["size"]
    return header.tobytes() + fields.tobytes() + rows.tobytes(), alloc_table


def _manifest(
    plan: Plan, samples: np.ndarray, reasons: dict[int, str], page_hashes: list[str], target: Path
) -> dict[str, Any]:
    head, alloc_table = _tables(plan, samples, reasons, len(page_hashes))
    labels = np.delete(plan.folder.labels[plan.order], list(reasons))
    checksums = np.delete(samples["checksum"], list(reasons))
    tables = beton.tables_digest(head, alloc_table)
    skipped = sorted((plan.path(position), reason) for position, reason in reasons.items())
    return {
        "format": beton.MANIFEST_VERSION,
        "file": target.name,
        "size_bytes": plan.data_start + len(page_hashes) * plan.settings.page_size + alloc_table.nbytes,
        "num_samples": len(alloc_table),
        "digest": beton.file_digest(tables, page_hashes),
        "settings": asdict(plan.settings),
        "source": {"folder": str(plan.folder.root.absolute()), "num_images": len(plan.folder.paths)},
        "skipped": [{"image": path, "reason": reason} for path, reason in skipped],
        "versions": {"python": platform.python_version(), "encoder": str(jpeg.ENCODER), **library_versions()},
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "classes": plan.folder.classes,
        "class_counts": np.bincount(labels, minlength=len(plan.folder.classes)).tolist(),
        "tables": tables,
        "checksums": b64encode(checksums.tobytes()).decode(),
    }


def _write_manifest(target: Path, manifest: dict[str, Any]) -> None:
    replace_text(beton.manifest_path(target), dumps(manifest, indent=1) + "\n")
    journal.remove_partial(target)


def _finish_manifest(plan: Plan, target: Path) -> dict[str, Any] | None:
    """Write the manifest of a run that was killed after the file had its name; None if there was no such run."""
    partial_path, journal_path = journal.partial_paths(target)
    if partial_path.exists() or not target.exists():
        return None
    identity, pages, _ = journal.read_journal(journal_path)
    samples, reasons, position = _replay(plan, pages) if identity == plan.identity() else (None, None, 0)
    if samples is None or reasons is None or position < plan.num_images:
        return None
    head, alloc_table = _tables(plan, samples, reasons, len(pages))
    with open(target, "rb") as file:
        if file.read(len(head)) != head:
            return None
    manifest = _manifest(plan, samples, reasons, [page["sha256"] for page in pages], target)
    _write_manifest(target, manifest)
    return manifest
