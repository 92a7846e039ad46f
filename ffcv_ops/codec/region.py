"""Region decode: the part of a JPEG that a crop covers, as planes.

`ffcv_ops.codec.jpeg.encode` cuts the entropy-coded data into restart segments. Each segment is a part of one row of
MCUs, and an index has the offset of each row. `splice_into` copies the segments under a crop, with a header for their
extent, into a smaller JPEG. TurboJPEG decodes this JPEG to the pixels of a full decode, bit for bit. Any other JPEG is
decoded whole.

The kernels read files by address and call TurboJPEG. They name its functions by symbols, whose addresses are registered
on each import of this module. Therefore Numba can keep the kernels in its cache on disk.
"""

import os
from collections import namedtuple
from typing import Any

import llvmlite.binding as llvm
import numba as nb
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from ffcv_ops._kernels import external, kernel
from ffcv_ops.codec import entropy, jpeg
from ffcv_ops.codec.memory import address
from ffcv_ops.errors import UserError

for _name, _entry in jpeg.function_addresses().items():
    llvm.add_symbol(f"ffcv_ops_{_name}", _entry)


_open_decompressor = external("ffcv_ops_tjInitDecompress", "8", "")
_close_decompressor = external("ffcv_ops_tjDestroy", "4", "8")
_decompress_header = external("ffcv_ops_tjDecompressHeader3", "4", "8888888")
_decompress_to_planes = external("ffcv_ops_tjDecompressToYUVPlanes", "4", "88884844")
_decompress_to_rgb = external("ffcv_ops_tjDecompress2", "4", "888844444")
_memcpy = external("memcpy", "8", "888")
_memchr = external("memchr", "8", "848")

DECODERS = "own", "turbojpeg"
SLACK_BYTES = entropy.SLACK_BYTES
OK = 0
BAD_JPEG = 1
WRONG_SIZE = 2

_MCU_PX = jpeg.MCU_PX
_INDEX_MARKER = jpeg.INDEX_MARKER
_INDEX_NAME = tuple(jpeg.INDEX_NAME)
_ROWS_OFFSET = 6 + len(_INDEX_NAME)
GRAY = 0
RGB = -1
_TJPF_RGB = 0
_TJCS_YCBCR = 1
_TJCS_GRAY = 2
# Luma has v times as many rows and h times as many columns as chroma. The places are TurboJPEG's numbers of the
# subsamplings: 4:4:4, 4:2:2, 4:2:0, gray, 4:4:0, 4:1:1, 4:4:1.
_CHROMA_V = (1, 1, 2, GRAY, 2, 1, 4)
_CHROMA_H = (1, 2, 2, GRAY, 1, 4, 1)
_SUBSAMPLING_420 = 2

Layout = namedtuple("Layout", "height width frame interval scan")
Layout.__doc__ = """The layout of a JPEG: height and width in px, the offset of the height in the frame header, the
restart interval in MCUs, the offset of the entropy-coded data. All are 0 in `NOT_INDEXED`."""
NOT_INDEXED = Layout(0, 0, 0, 0, 0)

Planes = namedtuple("Planes", "status top left height width v h")
Planes.__doc__ = """The result of `decode_planes_into`: a status; top and left of the decoded region in the image in px;
height and width of its luma plane; the factors v and h by which chroma is smaller, or `GRAY` or `RGB` twice."""


def allocate_decoders(num_workers: int) -> np.ndarray:
    """Return the scratch of our decoder for each worker.

    Returns
    -------
    ndarray of int64, shape (num_workers, n)
        Zeros. If the environment variable ``FFCV_OPS_DECODER`` is ``turbojpeg``, n is 0.

    Raises
    ------
    UserError
        If the variable is neither ``own`` nor ``turbojpeg``.
    """
    chosen = os.environ.get("FFCV_OPS_DECODER") or DECODERS[0]
    if chosen not in DECODERS:
        raise UserError(f"FFCV_OPS_DECODER is {chosen!r}; it can be {' or '.join(DECODERS)}")
    return np.zeros((num_workers, entropy.SCRATCH_BYTES // 8 if chosen == DECODERS[0] else 0), np.int64)


@intrinsic
def _pointer(typing_context, address) -> Any:
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return nb.types.CPointer(nb.types.uint8)(nb.types.int64), codegen


@kernel
def view_memory(address, size_bytes):
    """Return a view of the bytes at an address, uint8 (size_bytes,). The bytes must live longer than the view."""
    return nb.carray(_pointer(np.int64(address)), (np.int64(size_bytes),), np.uint8)  # type: ignore[call-arg]


@kernel
def _read_u2(data, offset):
    return np.int64(data[offset]) << 8 | np.int64(data[offset + 1])


@kernel
def _read_u4(data, offset):
    return _read_u2(data, offset) << 16 | _read_u2(data, offset + 2)


@kernel
def _write_u2(data, offset, value):
    data[offset] = value >> 8
    data[offset + 1] = value & 0xFF


@kernel
def read_layout(data):
    """Return the layout of a JPEG with restart segments and their index.

    Parameters
    ----------
    data : ndarray of uint8, shape (size_bytes,)

    Returns
    -------
    Layout
        `NOT_INDEXED` if the JPEG does not begin with an index, is not baseline 4:2:0, or contradicts its index.
    """
    if not _has_index(data):
        return NOT_INDEXED
    position, frame, interval = 2, 0, 0
    while position + 6 <= data.size and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xC0:
            frame = position + 5
        elif data[position + 1] == 0xDD:
            interval = _read_u2(data, position + 4)
        position += 2 + _read_u2(data, position + 2)
    if position + 6 > data.size or data[position] != 0xFF or interval == 0 or not _is_420(data, frame):
        return NOT_INDEXED
    height, width = _read_u2(data, frame), _read_u2(data, frame + 2)
    num_rows = -(-height // _MCU_PX)
    if _read_u2(data, 4) != _ROWS_OFFSET - 4 + 4 * (num_rows + 1) or -(-width // _MCU_PX) % interval != 0:
        return NOT_INDEXED
    return Layout(height, width, frame, interval, position + 2 + _read_u2(data, position + 2))


@kernel
def _has_index(data):
    if data.size < _ROWS_OFFSET or data[2] != 0xFF or data[3] != _INDEX_MARKER:
        return False
    for i in range(len(_INDEX_NAME)):
        if data[_ROWS_OFFSET - len(_INDEX_NAME) + i] != _INDEX_NAME[i]:
            return False
    return True


@kernel
def _is_420(data, frame):
    if frame == 0 or frame + 14 > data.size or data[frame + 4] != 3:
        return False
    return data[frame + 6] == 0x22 and data[frame + 9] == 0x11 and data[frame + 12] == 0x11


@kernel
def splice_into(data, layout, rows, segments, out):
    """Write a JPEG of some restart segments of another JPEG.

    Parameters
    ----------
    data : ndarray of uint8, shape (size_bytes,)
        A JPEG with restart segments and their index.
    layout : Layout
        The layout, from `read_layout`.
    rows, segments : tuple of two int
        First and last + 1 of the rows of MCUs, and of the segments in each row.
    out : ndarray of uint8, shape (at least size_bytes,)
        The output.

    Returns
    -------
    int
        Number of bytes written; 0 if a row or a marker is not at its expected offset.
    """
    segment_px = layout.interval * _MCU_PX
    segments_per_row = -(-layout.width // segment_px)
    source, target = address(data), address(out)
    header = 4 + _read_u2(data, 4)
    if not header < layout.scan <= data.size:
        return 0
    out[0], out[1] = 0xFF, 0xD8
    _memcpy(target + 2, source + header, layout.scan - header)
    length = 2 + layout.scan - header
    frame = 2 + layout.frame - header
    _write_u2(out, frame, min(layout.height, rows[1] * _MCU_PX) - rows[0] * _MCU_PX)
    _write_u2(out, frame + 2, min(layout.width, segments[1] * segment_px) - segments[0] * segment_px)
    num_written = 0
    for row in range(rows[0], rows[1]):
        position = _read_u4(data, _ROWS_OFFSET + 4 * row)
        stop = _read_u4(data, _ROWS_OFFSET + 4 * row + 4)
        if not layout.scan <= position <= stop or stop + 2 > data.size or (row == 0) != (position == layout.scan):
            return 0
        if row > 0 and (data[position - 2] != 0xFF or data[position - 1] != 0xD0 + (row * segments_per_row - 1) % 8):
            return 0
        for segment in range(segments[1]):
            start = position
            position = _find_marker(data, position, stop)
            is_last = row * _MCU_PX + _MCU_PX >= layout.height and segment + 1 == segments_per_row
            expected = 0xD9 if is_last else 0xD0 + (row * segments_per_row + segment) % 8
            if position < 0 or data[position + 1] != expected or length + position - start + 2 > out.size:
                return 0
            if segment >= segments[0]:
                _memcpy(target + length, source + start, position - start)
                length += position - start + 2
                out[length - 2], out[length - 1] = 0xFF, 0xD0 + num_written % 8
                num_written += 1
            position += 2
    out[length - 1] = 0xD9
    return length


@kernel
def _find_marker(data, position, stop):
    """Return the offset of the first marker that begins in [position, stop]; -1 if there is none."""
    while position <= stop:
        found = _memchr(address(data) + position, 0xFF, stop + 1 - position)
        if found == 0:
            return -1
        position = found - address(data)
        if data[position + 1] != 0:
            return position
        position += 2
    return -1


@kernel
def decode_planes_into(data, size, window, eighths, scratch, planes):
    """Decode the part of a JPEG under a window.

    Parameters
    ----------
    data : ndarray of uint8, shape (size_bytes,)
        A JPEG.
    size : tuple of two int
        Height and width in px that the JPEG must have.
    window : tuple of four int
        (y, x, h, w) in px, within the image.
    eighths : int
        Scale of the decode, by a smaller inverse DCT: 8, 4, 2 or 1. It is 8 if a side of the window is below 16 px.
    scratch : tuple of three ndarray
        Scratch of this thread: int64 (8,); uint8 (at least size_bytes + `SLACK_BYTES`,); a row of
        `allocate_decoders`.
    planes : ndarray of uint8, shape (at least 3 x height x width, each rounded up to whole MCUs of 32 px,)
        The output: Y, Cb and Cr one after the other, without padding. For a gray JPEG it is Y only. For a JPEG that is
        neither YCbCr nor gray it is interleaved RGB.

    Returns
    -------
    Planes
    """
    numbers, spliced, decoder = scratch
    layout = read_layout(data)
    is_indexed = layout.height == size[0] and layout.width == size[1]
    if decoder.size > 0:
        source, target = (address(data), data.size), (address(spliced), spliced.size)
        output = address(planes), planes.size
        own = address(decoder)
        if is_indexed:
            is_done = entropy.decode_region_into(source, layout, window, eighths, target, own, output)
        else:
            is_done = entropy.decode_plain_region_into(source, size, window, eighths, target, own, output)
        if is_done:
            top, left = window[0] // _MCU_PX * _MCU_PX, window[1] // _MCU_PX * _MCU_PX
            height = -(-(window[0] + window[2]) // _MCU_PX) * _MCU_PX - top
            width = -(-(window[1] + window[3]) // _MCU_PX) * _MCU_PX - left
            return Planes(OK, top, left, height * eighths // 8, width * eighths // 8, 2, 2)
    # A decompressor keeps the tables of its last JPEG, and takes them for a JPEG that lacks tables. Therefore each JPEG
    # has a decompressor of its own. It costs less than a microsecond.
    handle = _open_decompressor()
    found = _decode_with_turbojpeg(handle, data, size, layout, window, eighths, numbers, spliced, planes)
    _close_decompressor(handle)
    return found


@kernel
def _decode_with_turbojpeg(handle, data, size, layout, window, eighths, numbers, spliced, planes):
    if layout.height == size[0] and layout.width == size[1]:
        segment_px = layout.interval * _MCU_PX
        y, x, h, w = window
        rows = y // _MCU_PX, -(-(y + h) // _MCU_PX)
        segments = x // segment_px, -(-(x + w) // segment_px)
        length = splice_into(data, layout, rows, segments, spliced)
        if length > 0:
            top, left = rows[0] * _MCU_PX, segments[0] * segment_px
            height = min(layout.height, rows[1] * _MCU_PX) - top
            width = min(layout.width, segments[1] * segment_px) - left
            return _decode(
                handle, spliced[:length], (top, left, height, width), _SUBSAMPLING_420, eighths, numbers, planes
            )
    found = numbers.view(np.int32)
    at = address(numbers)
    found[0], found[1] = 0, 0
    is_named = _decompress_header(handle, address(data), data.size, at, at + 4, at + 8, at + 12) == 0
    if found[0] != size[1] or found[1] != size[0]:
        return Planes(WRONG_SIZE if is_named else BAD_JPEG, 0, 0, 0, 0, 0, 0)
    # If TurboJPEG has no name for the sampling factors, it gives the size and an error. It decodes such images to RGB.
    has_planes = is_named and (found[3] == _TJCS_YCBCR or found[3] == _TJCS_GRAY) and 0 <= found[2] < len(_CHROMA_V)
    subsampling = found[2] if has_planes else -1
    return _decode(handle, data, (0, 0, size[0], size[1]), subsampling, eighths, numbers, planes)


@kernel
def _decode(handle, data, region, subsampling, eighths, numbers, planes):
    top, left, height, width = region
    height, width = (height * eighths + 7) // 8, (width * eighths + 7) // 8
    at = address(planes)
    if subsampling < 0:
        status = _decompress_to_rgb(handle, address(data), data.size, at, width, 0, height, _TJPF_RGB, 0)
        return Planes(OK if status == 0 else BAD_JPEG, top, left, height, width, RGB, RGB)
    v, h = _CHROMA_V[subsampling], _CHROMA_H[subsampling]
    # TurboJPEG rounds its planes up to whole chroma samples, but its argument is the size of the image.
    v_step, h_step = max(v, 1), max(h, 1)
    plane_height, plane_width = -(-height // v_step) * v_step, -(-width // h_step) * h_step
    numbers[0] = at
    numbers[1] = numbers[0] + plane_height * plane_width
    numbers[2] = numbers[1] + (plane_height // v_step) * (plane_width // h_step)
    numbers[3] = numbers[4] = 0
    status = _decompress_to_planes(
        handle, address(data), data.size, address(numbers), width, address(numbers[3:]), height, 0
    )
    return Planes(OK if status == 0 else BAD_JPEG, top, left, plane_height, plane_width, v, h)


@kernel
def read_memory(address, size_bytes):
    """Return a copy of the bytes at an address."""
    return view_memory(address, size_bytes).copy()
