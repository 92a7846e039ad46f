"""Decoders of images that decode only a crop, resample it to a square, and flip it if drawn so.

A crop is (y, x, h, w) in px of the stored image. The two operations differ only in how they choose the crop of each
sample. One kernel does the rest: `ffcv_ops.codec.region` decodes the crop, and `ffcv_ops.operations.resample` resamples
it.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ffcv_ops import rng
from ffcv_ops._ffcv import AllocationQuery, State
from ffcv_ops._kernels import kernel
from ffcv_ops.codec import jpeg, region
from ffcv_ops.errors import UserError
from ffcv_ops.operations import resample
from ffcv_ops.operations.base import Batch, BatchOperation, SampleError
from ffcv_ops.operations.threads import take

_JPG = 0
_RAW = 1
_TRIES = 10
_DRAWS_PER_TRY = 4
_UNKNOWN_MODE = 3
_TOO_SHORT = 4
# Crops are rounded to this fraction of a px, so that floating point holds their sums exactly.
_CROP_STEP_PX = 1 / 1024


class _Crop(BatchOperation):
    """The base of both decoders: a subclass writes `_draw_into`."""

    def __init__(self, size: int, interpolation: str):
        super().__init__()
        if interpolation not in resample.INTERPOLATIONS:
            known = ", ".join(resample.INTERPOLATIONS)
            raise UserError(f"interpolation is {interpolation!r}; it can be {known}")
        self.size = size
        self.interpolation = interpolation
        self._scratch = _Scratch()

    @property
    def size(self) -> int:
        """Side of the output in px. It may be set between epochs."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if size != int(size) or size < 1:
            raise UserError(f"size is {size!r}; it is the output's side in whole px")
        self._size = int(size)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., np.ndarray]:
        return self._decode

    def close(self) -> None:
        self._scratch.close()

    @abstractmethod
    def _draw_into(
        self, batch: Batch, heights: np.ndarray, widths: np.ndarray, crops: np.ndarray, flips: np.ndarray
    ) -> None:
        """Write the crop (y, x, h, w) in px, and the flip, of each sample of a batch."""

    def _decode(
        self, sample_ids: np.ndarray, destination: np.ndarray, field_metadata: np.ndarray, batch: Batch
    ) -> np.ndarray:
        fields = field_metadata[sample_ids]
        modes, heights, widths = (fields[name].astype(np.int64) for name in ("mode", "height", "width"))
        addresses, sizes_bytes = batch.locate(fields["data_ptr"])
        crops, flips = np.empty((len(fields), 4)), np.zeros(len(fields), np.bool_)
        self._draw_into(batch, heights, widths, crops, flips)
        status = np.full(len(fields), region.OK, np.int32)
        interpolation = resample.INTERPOLATIONS[self.interpolation]
        self._scratch.fit(batch.num_workers, heights, widths, sizes_bytes, destination.shape[1])
        samples = addresses, sizes_bytes, modes, heights, widths, crops, flips
        batch.run(_crop_samples, samples, interpolation, self._scratch.arrays, destination, status)
        failed = np.flatnonzero(status)
        if failed.size:
            reasons = [_reason(status[i], addresses[i], sizes_bytes[i], heights[i], widths[i]) for i in failed]
            raise SampleError(list(zip(batch.sample_ids[failed].tolist(), reasons, strict=True)))
        return destination


class RandomResizedCrop(_Crop):
    """A random crop of each image, resampled to a square and flipped by chance: a decoder of ``RGBImageField``.

    Crops are distributed as those of ``RandomResizedCrop.get_params`` of torchvision. After ten tries that do not fit,
    the crop is the largest centred one of an allowed ratio. Crop and flip are functions of the seed, the epoch, the
    sample id and the copy. For everything else, see `CenterCrop`.

    Parameters
    ----------
    size : int
        Side of the output in px. The attribute may be set between epochs.
    scale : tuple of two float
        Smallest and largest area of the crop, as a share of the image's area: 0 < smallest <= largest <= 1.
    ratio : tuple of two float
        Smallest and largest width / height of the crop, above 0.
    flip : float
        Probability of a flip from left to right.
    interpolation : {"bilinear", "bicubic"}
        The filter; antialiased, as in Pillow.

    Raises
    ------
    UserError
        If a value is outside its range.
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
            raise UserError(f"scale is {tuple(scale)}; it is a share of the image's area, at most 1")
        if not 0 <= flip <= 1:
            raise UserError(f"flip is {flip!r}; it is a probability, 0 to 1")
        self.flip = float(flip)

    def _draw_into(
        self, batch: Batch, heights: np.ndarray, widths: np.ndarray, crops: np.ndarray, flips: np.ndarray
    ) -> None:
        drawn = batch.seed, batch.epoch, batch.sample_ids, batch.copies
        draw_crops_into(drawn, heights, widths, self.scale, self.ratio, self.flip, crops, flips)


class CenterCrop(_Crop):
    """The centre of each image, resampled to a square: a decoder of ``RGBImageField``.

    The output is a uint8 RGB array (N, size, size, 3). Only the crop is decoded and resampled. The result is that of a
    resize of the whole image and a crop of the result, but filters use pixels of the crop only. Therefore only the
    outermost pixels of the output differ. If the crop is at least twice as large as the output in both directions, the
    inverse DCT halves it first. Images that cannot be decoded raise a `SampleError` with their ids.

    Parameters
    ----------
    size : int
        Side of the output in px. The attribute may be set between epochs.
    ratio : float
        Side of the crop as a share of the image's shorter side, above 0 and at most 1. FFCV calls it ``ratio``, timm
        ``crop_pct``. torchvision has ``Resize(size / ratio)`` before ``CenterCrop(size)``. The crop is centred exactly.
    resize : int, optional
        Instead of `ratio`: the length in px to which the shorter side is resized before the crop, at least `size`. The
        longer side and the corner of the crop are rounded as in torchvision.
    interpolation : {"bilinear", "bicubic"}
        The filter; antialiased, as in Pillow.

    Raises
    ------
    UserError
        If a value is outside its range.
    """

    def __init__(
        self, size: int = 224, ratio: float = 224 / 256, resize: int | None = None, interpolation: str = "bilinear"
    ):
        super().__init__(size, interpolation)
        if not 0 < ratio <= 1:
            raise UserError(f"ratio is {ratio!r}; it is a share of the shorter side, above 0 and at most 1")
        self.ratio = float(ratio)
        self.resize = resize
        self._check_resize()

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        self._check_resize()
        return super().declare_state_and_memory(previous_state)

    def _check_resize(self) -> None:
        if self.resize is not None and self.resize < self.size:
            raise UserError(f"resize is {self.resize}; a crop of {self.size} px needs at least as much")

    def _draw_into(
        self, batch: Batch, heights: np.ndarray, widths: np.ndarray, crops: np.ndarray, flips: np.ndarray
    ) -> None:
        crops[:] = center_crops(heights, widths, self.size, self.ratio, self.resize)


def _interval(name: str, bounds: Sequence[float]) -> tuple[float, float]:
    low, high = (float(bound) for bound in bounds)
    if not 0 < low <= high < math.inf:
        raise UserError(f"{name} is {tuple(bounds)}; it is a pair (smallest, largest), above 0")
    return low, high


def center_crops(heights: np.ndarray, widths: np.ndarray, size: int, ratio: float, resize: int | None) -> np.ndarray:
    """Return the crops that a resize and a centre crop show.

    Parameters
    ----------
    heights, widths : ndarray of int, shape (N,)
        Sides of the images in px.
    size, ratio, resize
        See `CenterCrop`.

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
    stop = np.minimum(np.round((start + extent) / _CROP_STEP_PX) * _CROP_STEP_PX, sides)
    start = np.minimum(np.round(start / _CROP_STEP_PX) * _CROP_STEP_PX, stop - _CROP_STEP_PX)
    return np.concatenate((start, stop - start), axis=1)


@kernel
def draw_crops_into(drawn, heights, widths, scale, ratio, flip, crops, flips):
    """Draw a crop and a flip for each sample of a batch.

    Parameters
    ----------
    drawn : tuple
        Seed, epoch, sample ids (N,) and copies (N,). The draws are a function of these.
    heights, widths : ndarray of int64, shape (N,)
        Sides of the images in px.
    scale, ratio : tuple of two float
        See `RandomResizedCrop`.
    flip : float
        Probability of a flip.
    crops : ndarray of float64, shape (N, 4)
        The output: (y, x, h, w) in whole px.
    flips : ndarray of bool, shape (N,)
        The output.
    """
    seed, epoch, sample_ids, copies = drawn
    for i in range(len(sample_ids)):
        draw = seed, epoch, sample_ids[i], copies[i]
        y, x, h, w = draw_crop(draw, heights[i], widths[i], scale, ratio)
        crops[i, 0], crops[i, 1], crops[i, 2], crops[i, 3] = y, x, h, w
        flips[i] = rng.uniform(seed, epoch, sample_ids[i], copies[i], rng.FLIP, 0) < flip


@kernel
def draw_crop(draw, height, width, scale, ratio):
    """Draw a crop from the stream `rng.CROP`, as ``RandomResizedCrop.get_params`` of torchvision does.

    Parameters
    ----------
    draw : tuple of four int
        Seed, epoch, sample id and copy.
    height, width : int
        Sides of the image in px.
    scale, ratio : tuple of two float
        See `RandomResizedCrop`.

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
    """The memory of the workers while they decode a batch: a row of each array per worker."""

    def __init__(self) -> None:
        self._decoders = np.empty((0, 0), np.int64)
        self._extent: tuple[int, ...] = (0, 0, 0, 0)
        self.arrays: tuple[np.ndarray, ...] = ()

    def fit(
        self, num_workers: int, heights: np.ndarray, widths: np.ndarray, sizes_bytes: np.ndarray, size: int
    ) -> None:
        """Make the arrays large enough for every sample of a batch. They never shrink.

        Each array is as large as the largest height, width and file of the batch together need, even if no sample has
        all three. This costs no memory, because the operating system provides a page only when it is first touched.

        Parameters
        ----------
        num_workers : int
        heights, widths, sizes_bytes : ndarray of int, shape (N,)
            Sides in px and sizes in bytes of the stored images.
        size : int
            Side of the output in px.
        """
        wanted = int(heights.max()), int(widths.max()), int(sizes_bytes.max()), size
        extent = tuple(max(pair) for pair in zip(wanted, self._extent, strict=True))
        if extent == self._extent and num_workers <= len(self._decoders):
            return
        if num_workers > len(self._decoders):  # those that there are keep the Huffman tables that they have built
            self._decoders = region.allocate_decoders(num_workers)
        num_workers = len(self._decoders)
        height, width, file_bytes, side = self._extent = extent
        plane_bytes = 3 * (-(-height // 32) * 32) * (-(-width // 32) * 32)
        workspace_bytes = resample.workspace_bytes(height + 32, width + 32, side)
        spliced, planes, workspaces = (
            np.empty((num_workers, -(-num_bytes // 4096) * 4096), np.uint8)
            for num_bytes in (file_bytes + region.SLACK_BYTES, plane_bytes, workspace_bytes)
        )
        numbers = np.empty((num_workers, 8), np.int64)
        self.arrays = numbers, spliced, self._decoders, planes, workspaces

    def close(self) -> None:
        self._decoders, self._extent, self.arrays = np.empty((0, 0), np.int64), (0, 0, 0, 0), ()


def _reason(status: int, address: int, size_bytes: int, height: int, width: int) -> str:
    """Return the reason why a sample could not be decoded. Kernels return only a status."""
    if status == _UNKNOWN_MODE:
        return "it is neither a JPEG (mode 0) nor raw pixels (mode 1)"
    if status == _TOO_SHORT:
        return f"{size_bytes} bytes are too few for {width}x{height} px"
    try:
        found = jpeg.check(region.read_memory(np.int64(address), np.int64(size_bytes)))
    except jpeg.JPEGError as error:
        return str(error)
    return f"the JPEG has {found[1]}x{found[0]} px, the file's table says {width}x{height}"


@kernel
def _choose_eighths(h, w, size):
    """Return the scale of the decode in eighths: halved while the crop is at least twice as large as the output."""
    eighths = 8
    while eighths > 1 and min(h, w) >= 16 and min(h, w) * eighths >= 16 * size:
        eighths //= 2
    return eighths


@kernel(inline="always")  # compiled within its only caller, which saves a sixth of the time to compile all kernels
def _crop_jpeg_into(data, image_size, crop, flip, interpolation, scratch, out):
    decoder, planes, workspace = scratch
    y, x, h, w = crop
    top, left = math.floor(y), math.floor(x)
    window = top, left, math.ceil(y + h) - top, math.ceil(x + w) - left
    eighths = _choose_eighths(h, w, out.shape[0])
    found = region.decode_planes_into(data, image_size, window, eighths, decoder, planes)
    if found.status != region.OK:
        return found.status
    scale = eighths / 8
    y_crop = (y - found.top) * scale, (x - found.left) * scale, h * scale, w * scale
    luma_size = found.height * found.width
    if found.v == region.RGB:
        image = planes[: 3 * luma_size].reshape((found.height, found.width, 3))
        resample.resample_rgb_into(image, y_crop, flip, interpolation, workspace, out)
        return found.status
    luma = planes[:luma_size].reshape((found.height, found.width))
    c_height, c_width, c_crop = 0, 0, y_crop
    if found.v != region.GRAY:
        c_height, c_width = found.height // found.v, found.width // found.h
        c_crop = y_crop[0] / found.v, y_crop[1] / found.h, y_crop[2] / found.v, y_crop[3] / found.h
    c_size = c_height * c_width
    cb = planes[luma_size : luma_size + c_size].reshape((c_height, c_width))
    cr = planes[luma_size + c_size : luma_size + 2 * c_size].reshape((c_height, c_width))
    resample.resample_planes_into(luma, cb, cr, y_crop, c_crop, flip, interpolation, workspace, out)
    return found.status


@kernel(inline="always")
def _crop_sample_into(data, mode, image_size, crop, flip, interpolation, scratch, out):
    height, width = image_size
    if mode == _JPG:
        return _crop_jpeg_into(data, image_size, crop, flip, interpolation, scratch, out)
    if mode != _RAW:
        return _UNKNOWN_MODE
    if data.size < height * width * 3:
        return _TOO_SHORT
    image = data[: height * width * 3].reshape((height, width, 3))
    resample.resample_rgb_into(image, crop, flip, interpolation, scratch[2], out)
    return region.OK


@kernel
def _crop_samples(worker, counter, samples, interpolation, scratch, out, status):
    """Take samples from the counter until none is left, and decode them."""
    addresses, sizes_bytes, modes, heights, widths, crops, flips = samples
    numbers, spliced, decoders, planes, workspaces = scratch
    while True:
        i = take(counter)
        if i >= len(status):
            break
        decoder = numbers[worker], spliced[worker], decoders[worker]
        own = decoder, planes[worker], workspaces[worker]
        data = region.view_memory(addresses[i], sizes_bytes[i])
        crop = crops[i, 0], crops[i, 1], crops[i, 2], crops[i, 3]
        status[i] = _crop_sample_into(
            data, modes[i], (heights[i], widths[i]), crop, flips[i], interpolation, own, out[i]
        )
