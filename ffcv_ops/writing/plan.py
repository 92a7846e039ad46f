"""Decide what a file is to hold: its settings, its images, their order, and the images that stay raw."""

import platform
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from json import dumps
from typing import Any

import numpy as np

from ffcv_ops.beton import layout as beton
from ffcv_ops.codec import jpeg
from ffcv_ops.errors import UserError
from ffcv_ops.sources.image import DEFAULT_MAX_PIXELS
from ffcv_ops.sources.source import Source, Stage

MODES = ("jpg", "raw", "proportion", "smart")
ROW_TYPE = np.dtype([("", beton.IMAGE_TYPE), ("", "<i8")], align=True)
"""The metadata of a sample: image and label."""
_HEAD_BYTES = beton.HEADER_TYPE.itemsize + 2 * beton.FIELD_TYPE.itemsize
# The seed has two uses. Each draws from a key of its own.
_ORDER_STREAM, _RAW_STREAM = 0, 1
# As Python objects, all images at once would take hundreds of MB.
_IMAGES_AT_ONCE = 4096


class BadImage(UserError):
    """An image that cannot be decoded or stored. The unfinished file was deleted."""


@dataclass(frozen=True)
class WriteSettings:
    """The settings that the content of a file depends on, besides the images.

    Attributes
    ----------
    mode : {"jpg", "raw", "proportion", "smart"}
        ``jpg``: JPEG. ``raw``: uint8 pixels. ``proportion``: a share of the images raw, the others JPEG. ``smart``:
        JPEG for an image whose pixels take more than `smart_threshold` bytes, else raw, as in FFCV's
        ``RGBImageField``.
    max_side : int
        Images with a longer side in px are shrunk to it as FFCV does (``INTER_AREA``, sizes rounded down); 0: never.
    quality : int
        JPEG quality, 1 to 100.
    raw_share : float
        With ``proportion``: the probability, 0 to 1, that an image stays raw. It is 1 - FFCV's
        ``compress_probability``. The draw is a function of `seed` and of the image's place in the sorted source.
    smart_threshold : int or None
        With ``smart``: bytes. FFCV's default, None, keeps every image raw. Here the mode needs a number.
    subset : int
        Take this many images, evenly spaced through the sorted source; -1: all.
    seed : int
        Seed of the order in which images are stored, and of the draws of ``proportion``.
    page_size : int
        Bytes, a power of two from 2 MiB to 2 GiB. No sample spans two pages.
    max_pixels : int or None
        An image of more pixels is bad; 0: no limit, None: Pillow's limit of 178,956,970.
    """

    mode: str = "jpg"
    max_side: int = 500
    quality: int = 90
    raw_share: float = 0.5
    smart_threshold: int | None = None
    subset: int = -1
    seed: int = 0
    page_size: int = 1 << 23
    max_pixels: int | None = None

    @property
    def pixel_limit(self) -> int:
        """Return the largest number of pixels of an image; 0 for no limit."""
        return DEFAULT_MAX_PIXELS if self.max_pixels is None else self.max_pixels

    def check(self) -> None:
        """Raise UserError for the first setting with an impossible value."""
        if self.mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.mode == "smart" and self.smart_threshold is None:
            raise UserError("mode smart needs smart_threshold: images whose pixels take more bytes become JPEG")
        if not 0 <= self.max_side <= jpeg.MAX_SIDE_PX:
            raise UserError(f"max_side must be 0 (keep sizes) or 1 to {jpeg.MAX_SIDE_PX} px, not {self.max_side}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must be 1 to 100, not {self.quality}")
        if not 0 <= self.raw_share <= 1:
            raise UserError(f"raw_share must be 0 to 1, not {self.raw_share}")
        if self.subset != -1 and self.subset < 1:
            raise UserError(f"subset must be -1 (all images) or at least 1, not {self.subset}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed must be 0 to 2^64 - 1, not {self.seed}")
        if self.max_pixels is not None and self.max_pixels < 0:
            raise UserError(f"max_pixels must be 0 (no limit) or at least 1, not {self.max_pixels}")
        low, high = beton.MIN_PAGE_SIZE, beton.MAX_PAGE_SIZE
        if not low <= self.page_size <= high or self.page_size & (self.page_size - 1):
            raise UserError(f"page_size must be a power of two from {low} to {high} bytes, not {self.page_size}")


@dataclass(frozen=True, eq=False)
class WritePlan:
    """The images of a file in storage order."""

    source: Source
    settings: WriteSettings
    order: np.ndarray  # uint32 (num_images,): the place of each image in the source's listing
    raw: np.ndarray  # bool (num_images,): the images that stay raw whatever their size
    encoder: int  # ``jpeg.ENCODER``, or the earlier ``jpeg.ENCODER_OF_OWN_TABLES`` of a file that was begun with it

    @property
    def num_images(self) -> int:
        """Return the number of images to store, which includes those that will prove bad."""
        return len(self.order)

    @property
    def data_start(self) -> int:
        """Return the offset of the first page in bytes."""
        head_bytes = _HEAD_BYTES + self.num_images * ROW_TYPE.itemsize
        return -(-head_bytes // self.settings.page_size) * self.settings.page_size

    def key(self, position: int) -> str:
        """Return the key of the image at a position of the storage order, such as its path in a folder."""
        return self.source.keys[self.order[position]]

    def locate(self, position: int) -> str:
        """Return the full name of the image at a position, for messages."""
        return self.source.locate(int(self.order[position]))

    def bad_image(self, position: int, reason: str) -> BadImage:
        """Return the error for the image at a position."""
        return BadImage(
            f"{self.locate(position)}: {reason}; repair or remove the image, or leave out bad images with "
            "--on_error=skip"
        )

    def identity(self, stage: Stage = lambda what, count: None) -> dict[str, Any]:
        """Return everything that the bytes of the file depend on, in JSON's types. Call `stage` with the progress."""
        source = self.source
        listing = sha256(dumps(source.identity).encode() if source.identity else b"")
        for start in range(0, self.num_images, _IMAGES_AT_ONCE):
            if start:
                stage("images of the listing hashed", start)
            chosen = self.order[start : start + _IMAGES_AT_ONCE]
            numbers = np.column_stack([source.labels[chosen], source.places[chosen]]).tolist()
            for index, row in zip(chosen.tolist(), numbers, strict=True):
                listing.update(b"%s %s\0" % (b" ".join(b"%d" % number for number in row), source.keys.encoded(index)))
        return {
            "format": beton.MANIFEST_VERSION,
            "images": listing.hexdigest(),
            "libraries": library_versions(),
            "encoder": self.encoder,
            # A journal without this key is of the default.
            **{key: value for key, value in asdict(self.settings).items() if (key, value) != ("max_pixels", None)},
        }

    def continuing(self, found: dict[str, Any] | None) -> "WritePlan":
        """Return the plan with the encoder that began a file with this identity, if nothing else has changed."""
        if found is not None and found.get("encoder") == jpeg.ENCODER_OF_OWN_TABLES:
            earlier = replace(self, encoder=jpeg.ENCODER_OF_OWN_TABLES)
            if earlier.identity() == found:
                return earlier
        return self


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that the bytes of a file depend on.

    On other machines than x86-64, the machine is among them. There, OpenCV shrinks some images to other pixels: on
    aarch64, 5.0.0 rounds up to 1 in 10,000 values of ``INTER_AREA`` to the neighbouring integer.
    """
    import cv2
    import PIL

    machine = {} if platform.machine() == "x86_64" else {"machine": platform.machine()}
    return {"numpy": np.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__, **machine}


def build_plan(source: Source, settings: WriteSettings) -> WritePlan:
    """Choose the images, their order in the file and, for ``proportion``, the images that stay raw."""
    total = len(source.keys)
    count = total if settings.subset == -1 else min(settings.subset, total)
    chosen = np.arange(count) * total // count
    # The raw bits of a counter-based generator and a stable sort are the same on every machine and for every NumPy.
    order = chosen[np.argsort(_bits(settings.seed, _ORDER_STREAM, total)[chosen], kind="stable")].astype(np.uint32)
    raw = np.full(count, settings.mode == "raw")
    if settings.mode == "proportion":
        raw = (_bits(settings.seed, _RAW_STREAM, total)[order] >> np.uint64(11)) * 2.0**-53 < settings.raw_share
    return WritePlan(source, settings, order, raw, jpeg.ENCODER)


def _bits(seed: int, stream: int, count: int) -> np.ndarray:
    """Return uint64 (count,) for a key of the counter-based generator."""
    return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)
