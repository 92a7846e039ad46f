"""JPEG: an encoder with restart segments and their index, and the only calls of TurboJPEG.

`encode` writes an ordinary baseline JPEG with a restart marker after every *k* MCUs, where *k* divides the MCUs of a
row. Therefore each segment of *k* MCUs can be decoded alone. An APP10 segment behind SOI has the offset of each row of
MCUs. A reader that knows both decodes only the segments under a crop. Every other reader skips the APP10 segment, and
handles restart markers as usual. ``docs/BETON_FORMAT.md`` describes the bytes.
"""

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ffcv_ops.errors import UserError

INDEX_MARKER = 0xEA
INDEX_NAME = b"ffcvrow\0"
# Add 1 with every change of the bytes that a file has of an image.
ENCODER = 3
# With this encoder, every image had Huffman tables of its own. A file that was begun with it is finished with it.
ENCODER_OF_OWN_TABLES = 2
MCU_PX = 16
MAX_SIDE_PX = 65500
SEGMENT_MCUS = 2
# The fewest bytes of a segment on average, without and with tables that images share, which make larger files.
_SEGMENT_BYTES, _SHARED_SEGMENT_BYTES = 160, 256
_TJPF_RGB, _TJPF_CMYK = 0, 11
_TJCS_CMYK = 3, 4  # CMYK, YCCK
# Baseline, extended and progressive frames, with Huffman codes and with arithmetic codes.
_DCT_FRAMES = 0xC0, 0xC1, 0xC2, 0xC9, 0xCA


class JPEGError(ValueError):
    """A JPEG is damaged, or has too many pixels."""


class UnsupportedJPEG(JPEGError):
    """A JPEG is of a kind that is not decoded to RGB here. The JPEG may be sound."""


class TurboJPEGNotFound(ImportError):
    """TurboJPEG 2.1 or later was not found. ``tried`` has the paths that were tried, each with its error."""

    def __init__(self, tried: list[str]):
        self.tried = tried
        super().__init__(
            "TurboJPEG 2.1 or later was not found. Install it (Debian, Ubuntu: apt install libturbojpeg0-dev; conda: "
            "conda install libjpeg-turbo) or set TURBOJPEG to the library's path. Tried:\n  " + "\n  ".join(tried)
        )


def encode(image: np.ndarray, quality: int = 90, tables: np.ndarray | None = None) -> np.ndarray:
    """Encode an image as a baseline 4:2:0 JPEG with restart segments and their index.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB, with sides from 1 to `MAX_SIDE_PX` px.
    quality : int
        1 to 100, on the scale of libjpeg.
    tables : ndarray of uint8, shape (num_sets, 4, 272), optional
        Sets of Huffman tables, from `ffcv_ops.codec.shared_tables`. The image gets the set with which it is smallest.
        Without sets, the image gets tables of its own.

    Returns
    -------
    ndarray of uint8, shape (size_bytes,)
        The JPEG: a function of the image, the quality, the tables and `ENCODER` only.

    Raises
    ------
    UserError
        If the image is not uint8 (H, W, 3) or is too large, or if the quality is not from 1 to 100.
    """
    from ffcv_ops.codec import encoder  # here, because its import compiles kernels that decoding does not need

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"a JPEG is made of uint8 pixels (H, W, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE_PX:
        raise UserError(f"a JPEG has at most {MAX_SIDE_PX} px a side, got {height} x {width}")
    if not 1 <= quality <= 100:
        raise UserError(f"quality must be 1 to 100, not {quality}")
    quantisation, divisors = encoder.build_quantisation(int(quality))
    dc, ends, tokens, ac_counts = encoder.tokenise(np.ascontiguousarray(image), divisors)
    mcus_per_row = -(-width // MCU_PX)
    interval = restart_interval(mcus_per_row, SEGMENT_MCUS)
    counts = encoder.count_symbols(dc, interval, ac_counts)
    huffman, codes, num_bits = _choose_tables(counts, tables)
    # A segment costs about three bytes more than its data. If there is little data, as in an image of the sky, longer
    # segments keep the file as small as a file without segments.
    num_segments = mcus_per_row // interval * -(-height // MCU_PX)
    segment_bytes = _SEGMENT_BYTES if tables is None else _SHARED_SEGMENT_BYTES
    coarser = restart_interval(mcus_per_row, interval * segment_bytes * num_segments / (num_bits / 8))
    if coarser > interval:
        interval = coarser
        counts = encoder.count_symbols(dc, interval, ac_counts)
        huffman, codes, num_bits = _choose_tables(counts, tables)
    scan, starts = encoder.write_scan(dc, ends, tokens, interval, codes, num_bits)
    header = _header(height, width, quantisation.tobytes(), huffman.tobytes(), interval)
    rows = starts[:: mcus_per_row // interval]
    index_start = 2 + 4 + len(INDEX_NAME)
    offsets = rows + (index_start + 4 * rows.size + len(header))
    index = _segment(INDEX_MARKER, INDEX_NAME + offsets.astype(">u4").tobytes())
    return np.concatenate((np.frombuffer(b"\xff\xd8" + index + header, np.uint8), scan))


def _choose_tables(counts: np.ndarray, tables: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the Huffman tables of an image, their codes, and the size of the scan in bits."""
    from ffcv_ops.codec import encoder

    if tables is None:
        tables = encoder.build_tables(counts)[None]
    codes = _build_codes(tables.tobytes())
    number, num_bits = encoder.choose_codes(counts, codes)
    if number < 0:
        raise ValueError("the Huffman tables lack a symbol that the image needs")
    return tables[number], codes[number], num_bits


@lru_cache(maxsize=8)
def _build_codes(tables: bytes) -> np.ndarray:
    from ffcv_ops.codec import encoder

    sets = np.frombuffer(tables, np.uint8).reshape(-1, 4, 272)
    return np.stack([encoder.build_codes(one) for one in sets])


def _header(height: int, width: int, tables: bytes, huffman: bytes, interval: int) -> bytes:
    """Return the segments from APP0 to SOS, as libjpeg writes them."""
    segments = [_segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")]
    segments += [_segment(0xDB, bytes([number]) + tables[64 * number : 64 * number + 64]) for number in range(2)]
    # Eight bits. Three components, each with number, sampling factors and quantisation table.
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    segments.append(_segment(0xC0, b"\x08" + size + b"\3\1\x22\0\2\x11\1\3\x11\1"))
    size_bytes = len(huffman) // 4
    for number, name in ((0, 0x00), (2, 0x10), (1, 0x01), (3, 0x11)):
        table = huffman[number * size_bytes : (number + 1) * size_bytes]
        segments.append(_segment(0xC4, bytes([name]) + table[: 16 + sum(table[:16])]))
    segments.append(_segment(0xDD, interval.to_bytes(2, "big")))
    # Three components, each with number and Huffman tables. Then: all coefficients, in one scan.
    segments.append(_segment(0xDA, b"\3\1\0\2\x11\3\x11\0\x3f\0"))
    return b"".join(segments)


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2, "big") + content


def restart_interval(mcus_per_row: int, wanted: float) -> int:
    """Return the number of MCUs of a segment: the divisor of `mcus_per_row` whose ratio to `wanted` is nearest to 1."""
    return min(_divisors(mcus_per_row), key=lambda k: max(k / wanted, wanted / k))


@lru_cache
def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def index_bytes(jpeg: np.ndarray) -> int:
    """Return the size in bytes of a JPEG's index of restart segments, marker included; 0 if there is no index."""
    if bytes(jpeg[2:4]) != bytes([0xFF, INDEX_MARKER]) or bytes(jpeg[6 : 6 + len(INDEX_NAME)]) != INDEX_NAME:
        return 0
    return 2 + int.from_bytes(bytes(jpeg[4:6]), "big")


def scan_start(jpeg: np.ndarray) -> tuple[int, int]:
    """Return the offset of the first entropy-coded byte, and the restart interval in MCUs (0 for none).

    Raises
    ------
    IndexError
        If the JPEG ends before its entropy-coded data.
    """
    position, interval = 2, 0
    while True:
        marker, length = jpeg[position + 1], int.from_bytes(jpeg[position + 2 : position + 4].tobytes(), "big")
        if marker == 0xDD:
            interval = int.from_bytes(jpeg[position + 4 : position + 6].tobytes(), "big")
        position += 2 + length
        if marker == 0xDA:
            return position, interval


def decode(jpeg: np.ndarray, *, max_pixels: int | None = None) -> np.ndarray:
    """Decode a whole JPEG of any origin.

    Parameters
    ----------
    jpeg : ndarray of uint8, shape (size_bytes,)
        The JPEG.
    max_pixels : int, optional
        The largest number of pixels that the header may claim.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
        RGB, as decoded by TurboJPEG with the accurate DCT.

    Raises
    ------
    UnsupportedJPEG
        If the JPEG is of a kind that is not decoded, such as CMYK or 12 bits a sample.
    JPEGError
        If TurboJPEG reports an error or a warning, with its message, or if the image has too many pixels.
    """
    return _decode(jpeg, 8, max_pixels)[0]


def check(jpeg: np.ndarray) -> tuple[int, int]:
    """Check a whole JPEG of any origin for damage, in less time than `decode` takes.

    Parameters
    ----------
    jpeg : ndarray of uint8, shape (size_bytes,)
        The JPEG.

    Returns
    -------
    tuple of two int
        Height and width in px.

    Raises
    ------
    UnsupportedJPEG
        If the JPEG is of a kind that `decode` does not decode. Damage of a CMYK JPEG is found nevertheless.
    JPEGError
        If TurboJPEG reports an error or a warning, with its message.
    """
    # TurboJPEG warns about headers and entropy-coded data. It reads all of them also at an eighth of the size.
    try:
        return _decode(jpeg, 1)[1]
    except UnsupportedJPEG:
        return _decode(jpeg, 8)[1]  # TurboJPEG 3 decodes a lossless JPEG only at its full size


def _decode(jpeg: np.ndarray, eighths: int, max_pixels: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the pixels at a scale of `eighths` / 8, and the height and width at full scale."""
    library = turbojpeg()
    jpeg = np.ascontiguousarray(jpeg, dtype=np.uint8)
    handle = open_decompressor()
    try:
        height, width, subsampling, colourspace = (ctypes.c_int() for _ in range(4))
        found = map(ctypes.byref, (width, height, subsampling, colourspace))
        # For sampling factors that TurboJPEG has no name for, it gives the size and an error, and decodes the image.
        if library.tjDecompressHeader3(handle, jpeg.ctypes.data, jpeg.size, *found) and width.value <= 0:
            if hasattr(library, "tj3DecompressHeader"):
                # For every bad header, the old function of TurboJPEG 3 reports a missing subsampling. The new function
                # reports the true reason.
                library.tj3DecompressHeader(handle, jpeg.ctypes.data, jpeg.size)
            raise _error(handle, jpeg)
        if max_pixels is not None and height.value * width.value > max_pixels:
            raise JPEGError(f"{width.value} x {height.value} px are more than {max_pixels} px")
        is_cmyk = colourspace.value in _TJCS_CMYK
        if is_cmyk and eighths == 8:
            raise _unsupported("CMYK")
        image = np.empty((-(-height.value * eighths // 8), -(-width.value * eighths // 8), 3 + is_cmyk), np.uint8)
        size, pixel = (image.shape[1], 0, image.shape[0]), _TJPF_CMYK if is_cmyk else _TJPF_RGB
        if library.tjDecompress2(handle, jpeg.ctypes.data, jpeg.size, image.ctypes.data, *size, pixel, 0):
            raise _error(handle, jpeg)
        if is_cmyk:
            raise _unsupported("CMYK")
        return image, (height.value, width.value)
    finally:
        close_decompressor(handle)


def open_decompressor() -> int:
    """Return a TurboJPEG handle for decompression by one thread at a time. Close it with `close_decompressor`."""
    handle = turbojpeg().tjInitDecompress()
    if not handle:
        raise MemoryError(f"TurboJPEG gives no decompressor: {_last_error(None)}")
    return handle


def close_decompressor(handle: int) -> None:
    """Free a handle of `open_decompressor`."""
    turbojpeg().tjDestroy(handle)


def _last_error(handle: int | None) -> str:
    return f"TurboJPEG: {turbojpeg().tjGetErrorStr2(handle).decode(errors='replace')}"


def _error(handle: int, jpeg: np.ndarray) -> JPEGError:
    """Return the error for a JPEG that TurboJPEG has refused."""
    kind, message = _unsupported_kind(jpeg), _last_error(handle)
    return JPEGError(message) if kind is None else _unsupported(f"{kind} ({message})")


def _unsupported(kind: str) -> UnsupportedJPEG:
    return UnsupportedJPEG(
        f"a JPEG of {kind}, which is not decoded to RGB; it may be sound: convert it to a JPEG of 8 bits in RGB, YCbCr "
        "or grayscale"
    )


def _unsupported_kind(jpeg: np.ndarray) -> str | None:
    """Return what the frame header has that TurboJPEG may not know; None if there is nothing."""
    position = 2
    while position + 10 <= jpeg.size and jpeg[position] == 0xFF:
        marker, precision = int(jpeg[position + 1]), int(jpeg[position + 4])
        if marker == 0xFF:  # bytes of 0xFF may fill the room before a marker
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # those three are no frames
            if marker not in _DCT_FRAMES:
                return "a lossless or hierarchical process"
            return "12 bits a sample" if precision == 12 else None
        else:
            position += 2 + int.from_bytes(jpeg[position + 2 : position + 4].tobytes(), "big")
    return None


def function_addresses() -> dict[str, int]:
    """Return the addresses of the TurboJPEG functions that compiled kernels call, by name."""
    names = ("tjInitDecompress", "tjDestroy", "tjDecompressHeader3", "tjDecompressToYUVPlanes", "tjDecompress2")
    return {name: ctypes.cast(getattr(turbojpeg(), name), ctypes.c_void_p).value or 0 for name in names}


@lru_cache(maxsize=1)
def turbojpeg() -> ctypes.CDLL:
    """Load the library of TurboJPEG, 2.1 or later, once.

    Returns
    -------
    ctypes.CDLL
        The library at the path in the environment variable ``TURBOJPEG``. If the variable is not set, the first of: the
        copy inside the package ffcv, that of a conda environment, that of the system.

    Raises
    ------
    TurboJPEGNotFound
        If there is no such library.
    """
    tried = []
    for path in _library_paths():
        try:
            library = ctypes.CDLL(path)
            _declare(library)
            return library
        except (OSError, AttributeError) as error:
            tried.append(f"{path}: {error}")
    raise TurboJPEGNotFound(tried)


def _library_paths() -> Iterator[str]:
    if os.environ.get("TURBOJPEG"):
        yield os.environ["TURBOJPEG"]
        return
    ffcv = importlib.util.find_spec("ffcv")
    if ffcv is not None and ffcv.origin:
        yield from map(str, sorted(Path(ffcv.origin).parents[1].glob("ffcv.libs/libturbojpeg-*.so*")))
    name = "libturbojpeg.dylib" if sys.platform == "darwin" else "libturbojpeg.so.0"
    for prefix in filter(None, (os.environ.get("CONDA_PREFIX"), sys.prefix)):
        if (Path(prefix) / "lib" / name).exists():
            yield str(Path(prefix) / "lib" / name)
    yield name
    found = ctypes.util.find_library("turbojpeg")
    if found:
        yield found


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
    signatures = {
        "tjInitDecompress": (pointer, []),
        "tjDestroy": (integer, [pointer]),
        "tjGetErrorStr2": (ctypes.c_char_p, [pointer]),
        "tjDecompressHeader3": (integer, [pointer, pointer, size, pointer, pointer, pointer, pointer]),
        "tjDecompress2": (integer, [pointer, pointer, size, pointer, integer, integer, integer, integer, integer]),
        "tjDecompressToYUVPlanes": (integer, [pointer, pointer, size, pointer, integer, pointer, integer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if hasattr(library, "tj3DecompressHeader"):
        library.tj3DecompressHeader.argtypes = [pointer, pointer, ctypes.c_size_t]
