"""Decoders of images: a crop, decoded for what it covers, resampled, perhaps mirrored.

Both operations are a rule that gives each sample of a batch a box in px of its stored image. One kernel does the rest:
`ffcv_ops.codec.region` decodes the box, `ffcv_ops.operations.resample` makes the output of it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ffcv_ops import rng
from ffcv_ops._ffcv import AllocationQuery, State
from ffcv_ops._kernels import kernel
from ffcv_ops.codec import jpeg, region
from ffcv_ops.operations import resample
from ffcv_ops.operations.base import Batch, BatchOperation, SampleError, take

_JPG = 0
_RAW = 1
_TRIES = 10
_DRAWS_PER_TRY = 4
_UNKNOWN_MODE = 3
_TOO_SHORT = 4
# Boxes are cut to this fraction of a px, so that floating point holds their sums exactly.
_BOX_STEP = 1 / 1024


class _Crop(BatchOperation):
    """What the two operations share; they differ in `_boxes_into`."""

    def __init__(self, size: int, interpolation: str):
        super().__init__()
        if interpolation not in resample.INTERPOLATIONS:
            known = ", ".join(resample.INTERPOLATIONS)
            raise ValueError(f"interpolation is {interpolation!r}; it can be {known}")
        self.size = size
        self.interpolation = interpolation
        self._scratch = _Scratch()

    @property
    def size(self) -> int:
        """Side of the output in px; may be set between epochs."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if size != int(size) or size < 1:
            raise ValueError(f"size is {size!r}; it is the output's side in whole px")
        self._size = int(size)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self):
        return self._decode

    def close(self) -> None:
        self._scratch.close()

    def _boxes_into(self, batch: Batch, heights: np.ndarray, widths: np.ndarray, boxes: np.ndarray, flips: np.ndarray):
        raise NotImplementedError

    def _decode(self, sample_ids, destination, field_metadata, batch: Batch) -> np.ndarray:
        fields = field_metadata[sample_ids]
        modes, heights, widths = (fields[name].astype(np.int64) for name in ("mode", "height", "width"))
        addresses, sizes_bytes = batch.locate(fields["data_ptr"])
        boxes, flips = np.empty((len(fields), 4)), np.zeros(len(fields), np.bool_)
        self._boxes_into(batch, heights, widths, boxes, flips)
        status = np.full(len(fields), region.OK, np.int32)
        interpolation = resample.INTERPOLATIONS[self.interpolation]
        self._scratch.fit(batch.num_workers, heights, widths, sizes_bytes, destination.shape[1])
        samples = addresses, sizes_bytes, modes, heights, widths, boxes, flips
        batch.run(_crop_samples, samples, interpolation, self._scratch.arrays, destination, status)
        failed = np.flatnonzero(status)
        if failed.size:
            reasons = [_reason(status[i], addresses[i], sizes_bytes[i], heights[i], widths[i]) for i in failed]
            raise SampleError(list(zip(batch.sample_ids[failed].tolist(), reasons, strict=True)))
        return destination


class RandomResizedCrop(_Crop):
    """Decode a random region, resampled to a square and perhaps mirrored: a decoder of ``RGBImageField``.

    Boxes are distributed as those of torchvision's ``RandomResizedCrop.get_params``: ten tries, then the largest
    centred box of an allowed ratio. Box and flip are functions of (seed, epoch, sample id, copy). Where the box is at
    least twice the output in both directions, the inverse DCT halves it first.

    Parameters
    ----------
    size : int
        Side of the output in px. The attribute may be set between epochs.
    scale : tuple of two float
        Smallest and largest area of the box, as a share of the image's; 0 < smallest <= largest <= 1.
    ratio : tuple of two float
        Smallest and largest width / height of the box; above 0.
    flip : float
        Probability of mirroring left and right.
    interpolation : {"bilinear", "bicubic"}
        Antialiased, as Pillow's.

    Raises
    ------
    ValueError
        For values outside of these ranges.

    Notes
    -----
    Gives uint8 RGB (N, size, size, 3). Raises `SampleError` with the ids and TurboJPEG's messages when images cannot be
    decoded.
    """

    def __init__(
        self,
        size: int = 224,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bilinear",
    ):
        super().__init__(size, interpolation)
        self.scale = _interval("scale", scale)
        self.ratio = _interval("ratio", ratio)
        if self.scale[1] > 1:
            raise ValueError(f"scale is {tuple(scale)}; it is a share of the image's area, at most 1")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip!r}; it is a probability, 0 to 1")
        self.flip = float(flip)

    def _boxes_into(self, batch: Batch, heights: np.ndarray, widths: np.ndarray, boxes: np.ndarray, flips: np.ndarray):
        drawn = batch.seed, batch.epoch, batch.sample_ids, batch.copies
        draw_boxes_into(drawn, heights, widths, self.scale, self.ratio, self.flip, boxes, flips)


class CenterCrop(_Crop):
    """Decode the centre of the image, resampled to a square: a decoder of ``RGBImageField``.

    Only the region that is needed is decoded and resampled, as if the whole image had been resized and then cropped.
    Filter taps stay within the region, which the outermost output pixels alone can tell.

    Parameters
    ----------
    size : int
        Side of the output in px. The attribute may be set between epochs.
    ratio : float
        Side of the region as a share of the image's shorter side, 0 to 1: FFCV's ``ratio``, timm's ``crop_pct``,
        torchvision's ``Resize(size / ratio)`` before ``CenterCrop(size)``. The region is exactly centred.
    resize : int, optional
        Instead of `ratio`: to how many px the shorter side is resized before the crop, at least `size`. The longer side
        and the crop's corner are rounded as torchvision rounds them.
    interpolation : {"bilinear", "bicubic"}
        Antialiased, as Pillow's.

    Raises
    ------
    ValueError
        For values outside of these ranges.

    Notes
    -----
    Gives uint8 RGB (N, size, size, 3). Raises `SampleError` with the ids and TurboJPEG's messages when images cannot be
    decoded.
    """

    def __init__(
        self, size: int = 224, ratio: float = 224 / 256, resize: int | None = None, interpolation: str = "bilinear"
    ):
        super().__init__(size, interpolation)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio!r}; it is a share of the shorter side, above 0 and at most 1")
        self.ratio = float(ratio)
        self.resize = resize
        self._check_resize()

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        self._check_resize()
        return super().declare_state_and_memory(previous_state)

    def _check_resize(self) -> None:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize is {self.resize}; a crop of {self.size} px needs at least as much")

    def _boxes_into(self, batch: Batch, heights: np.ndarray, widths: np.ndarray, boxes: np.ndarray, flips: np.ndarray):
        boxes[:] = center_boxes(heights, widths, self.size, self.ratio, self.resize)


def _interval(name: str, bounds: Sequence[float]) -> tuple[float, float]:
    low, high = (float(bound) for bound in bounds)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{name} is {tuple(bounds)}; it is a pair (smallest, largest), above 0")
    return low, high


def center_boxes(heights: np.ndarray, widths: np.ndarray, size: int, ratio: float, resize: int | None) -> np.ndarray:
    """The regions that a resize and a centre crop show.

    Parameters
    ----------
    heights, widths : ndarray of int, shape (N,)
        Of the images, px.
    size, ratio, resize
        As for `CenterCrop`.

    Returns
    -------
    ndarray of float64, shape (N, 4)
        (y, x, h, w) in px of the image.
    """
    sides = np.stack((heights, widths), axis=1)
    shorter = sides.min(axis=1, keepdims=True)
    if resize is None:
        extent = np.repeat(ratio * shorter, 2, axis=1)
        start = (sides - extent) / 2
    else:
        resized = resize * sides // shorter
        start = np.round((resized - size) / 2) * sides / resized
        extent = size * sides / resized
    stop = np.minimum(np.round((start + extent) / _BOX_STEP) * _BOX_STEP, sides)
    start = np.minimum(np.round(start / _BOX_STEP) * _BOX_STEP, stop - _BOX_STEP)
    return np.concatenate((start, stop - start), axis=1)


@kernel
def draw_boxes_into(drawn, heights, widths, scale, ratio, flip, boxes, flips):
    """Draw a box and a flip for each sample of a batch.

    Parameters
    ----------
    drawn : tuple
        Seed, epoch, sample ids (N,) and copies (N,): what the draws are functions of.
    heights, widths : ndarray of int64, shape (N,)
        Of the images, px.
    scale, ratio : tuple of two float
        As for `RandomResizedCrop`.
    flip : float
        Probability of a flip.
    boxes : ndarray of float64, shape (N, 4)
        Where (y, x, h, w) go, whole px.
    flips : ndarray of bool, shape (N,)
    """
    seed, epoch, sample_ids, copies = drawn
    for i in range(len(sample_ids)):
        draw = seed, epoch, sample_ids[i], copies[i]
        y, x, h, w = draw_box(draw, heights[i], widths[i], scale, ratio)
        boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3] = y, x, h, w
        flips[i] = rng.uniform(seed, epoch, sample_ids[i], copies[i], rng.FLIP, 0) < flip


@kernel
def draw_box(draw, height, width, scale, ratio):
    """Draw a box as torchvision's ``RandomResizedCrop.get_params`` does, from the stream `rng.CROP`.

    Parameters
    ----------
    draw : tuple of four int
        Seed, epoch, sample id, copy.
    height, width : int
        Of the image, px.
    scale, ratio : tuple of two float
        As for `RandomResizedCrop`.

    Returns
    -------
    tuple of four int
        (y, x, h, w) in px.
    """
    seed, epoch, sample_id, copy = draw
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for number in range(0, _TRIES * _DRAWS_PER_TRY, _DRAWS_PER_TRY):
        share = scale[0] + (scale[1] - scale[0]) * rng.uniform(seed, epoch, sample_id, copy, rng.CROP, number)
        log_ratio = log_low + (log_high - log_low) * rng.uniform(seed, epoch, sample_id, copy, rng.CROP, number + 1)
        aspect = math.exp(log_ratio)
        w = round(math.sqrt(height * width * share * aspect))
        h = round(math.sqrt(height * width * share / aspect))
        if 0 < w <= width and 0 < h <= height:
            y = int((height - h + 1) * rng.uniform(seed, epoch, sample_id, copy, rng.CROP, number + 2))
            x = int((width - w + 1) * rng.uniform(seed, epoch, sample_id, copy, rng.CROP, number + 3))
            return y, x, h, w
    h, w = height, width
    if width < height * ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width > height * ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


class _Scratch:
    """What the workers decode in, one batch at a time: a row of each array and a TurboJPEG handle a worker."""

    def __init__(self) -> None:
        self._handles = np.empty(0, np.int64)
        self._extent: tuple[int, ...] = (0, 0, 0, 0)
        self.arrays: tuple[np.ndarray, ...] = ()

    def fit(self, num_workers: int, heights: np.ndarray, widths: np.ndarray, sizes_bytes: np.ndarray, size: int):
        """Grow to what a batch needs; untouched memory costs nothing, so all samples' maxima count, not each one's."""
        wanted = int(heights.max()), int(widths.max()), int(sizes_bytes.max()), size
        extent = tuple(max(pair) for pair in zip(wanted, self._extent, strict=True))
        if extent == self._extent and num_workers <= len(self._handles):
            return
        opened = [jpeg.open_decompressor() for _ in range(num_workers - len(self._handles))]
        self._handles = np.concatenate((self._handles, np.array(opened, np.int64)))
        height, width, file_bytes, side = self._extent = extent
        plane_bytes = 3 * (-(-height // 32) * 32) * (-(-width // 32) * 32)
        row_bytes = file_bytes, plane_bytes, resample.workspace_bytes(height + 32, width + 32, side)
        self.arrays = (
            self._handles,
            np.empty((len(self._handles), 8), np.int64),
            *(np.empty((len(self._handles), -(-num_bytes // 4096) * 4096), np.uint8) for num_bytes in row_bytes),
        )

    def close(self) -> None:
        for handle in self._handles.tolist():
            jpeg.close_decompressor(handle)
        self._handles, self._extent, self.arrays = np.empty(0, np.int64), (0, 0, 0, 0), ()


def _reason(status: int, address: int, size_bytes: int, height: int, width: int) -> str:
    """What is wrong with a sample, after the fact: kernels give a number alone."""
    if status == _UNKNOWN_MODE:
        return "it is neither a JPEG (mode 0) nor raw pixels (mode 1)"
    if status == _TOO_SHORT:
        return f"{size_bytes} bytes are too few for {width}x{height} px"
    try:
        found = jpeg.check(region.read_memory(np.int64(address), np.int64(size_bytes)))
    except ValueError as error:
        return str(error)
    return f"the JPEG has {found[1]}x{found[0]} px, the file's table says {width}x{height}"


@kernel
def _eighths(h, w, size):
    """The scale of the decode: halved as long as the box is at least twice the output."""
    eighths = 8
    while eighths > 1 and min(h, w) >= 16 and min(h, w) * eighths >= 16 * size:
        eighths //= 2
    return eighths


@kernel
def _crop_jpeg_into(data, image_size, box, flip, interpolation, scratch, out):
    handle, numbers, spliced, planes, workspace = scratch
    y, x, h, w = box
    top, left = math.floor(y), math.floor(x)
    window = top, left, math.ceil(y + h) - top, math.ceil(x + w) - left
    eighths = _eighths(h, w, out.shape[0])
    found = region.decode_planes_into(handle, data, image_size, window, eighths, numbers, spliced, planes)
    if found.status != region.OK:
        return found.status
    scale = eighths / 8
    y_box = (y - found.top) * scale, (x - found.left) * scale, h * scale, w * scale
    luma_size = found.height * found.width
    if found.v == region.RGB:
        image = planes[: 3 * luma_size].reshape((found.height, found.width, 3))
        resample.resample_rgb_into(image, y_box, flip, interpolation, workspace, out)
        return found.status
    luma = planes[:luma_size].reshape((found.height, found.width))
    c_height, c_width, c_box = 0, 0, y_box
    if found.v != region.GRAY:
        c_height, c_width = found.height // found.v, found.width // found.h
        c_box = y_box[0] / found.v, y_box[1] / found.h, y_box[2] / found.v, y_box[3] / found.h
    c_size = c_height * c_width
    cb = planes[luma_size : luma_size + c_size].reshape((c_height, c_width))
    cr = planes[luma_size + c_size : luma_size + 2 * c_size].reshape((c_height, c_width))
    resample.resample_planes_into(luma, cb, cr, y_box, c_box, flip, interpolation, workspace, out)
    return found.status


@kernel
def _crop_sample_into(data, mode, image_size, box, flip, interpolation, scratch, out):
    height, width = image_size
    if mode == _JPG:
        return _crop_jpeg_into(data, image_size, box, flip, interpolation, scratch, out)
    if mode != _RAW:
        return _UNKNOWN_MODE
    if data.size < height * width * 3:
        return _TOO_SHORT
    image = data[: height * width * 3].reshape((height, width, 3))
    resample.resample_rgb_into(image, box, flip, interpolation, scratch[4], out)
    return region.OK


@kernel
def _crop_samples(worker, counter, samples, interpolation, scratch, out, status):
    """What the workers run."""
    addresses, sizes_bytes, modes, heights, widths, boxes, flips = samples
    handles, numbers, spliced, planes, workspaces = scratch
    while True:
        i = take(counter)
        if i >= len(status):
            break
        own = handles[worker], numbers[worker], spliced[worker], planes[worker], workspaces[worker]
        data = region.memory(addresses[i], sizes_bytes[i])
        box = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        status[i] = _crop_sample_into(
            data, modes[i], (heights[i], widths[i]), box, flips[i], interpolation, own, out[i]
        )
        if status[i] == region.BAD_JPEG:
            handles[worker] = region.renew_decompressor(handles[worker])
