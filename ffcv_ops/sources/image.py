"""Decode an image file to the pixels that torchvision's default loader gives, and note what was lost on the way."""

import contextlib
import os
from enum import IntFlag
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ffcv_ops.codec import jpeg
from ffcv_ops.errors import UserError
from ffcv_ops.sources.remarks import Remark

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_MAX_PIXELS = 178_956_970
"""The pixels of the largest image. Above this number, Pillow raises DecompressionBombError."""
_EXIF_START, _EXIF_NAME, _ORIENTATION = b"\xff\xe1", b"Exif\0\0", 0x0112
_PNG_START, _PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class Change(IntFlag):
    """Things that are lost or chosen when an image becomes 8-bit RGB. A file's journal stores their numbers."""

    DEPTH = 1
    FRAMES = 2
    TRANSPARENCY = 4
    ORIENTATION = 8
    CMYK = 16


_WORDS = {
    Change.DEPTH: ("images of more than 8 bits a sample", "the upper 8 bits are stored"),
    Change.FRAMES: ("images of several frames or pages", "the first is stored"),
    Change.TRANSPARENCY: ("images with transparency", "it is dropped, and the colours below it are stored"),
    Change.ORIENTATION: ("images with an EXIF orientation", "it is not applied, as in torchvision and FFCV"),
    Change.CMYK: ("CMYK images", "they become RGB without a colour profile"),
}


def change_remark(change: Change, count: int, example: str) -> Remark:
    """Return the remark on images with a change."""
    what, advice = _WORDS[change]
    return Remark(what, count, example, advice)


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the pixels of an image file, uint8 (H, W, 3). See `read_image`."""
    return read_image(path)[0]


def read_image(
    path: str | os.PathLike[str], max_pixels: int | None = None, content: bytes | None = None
) -> tuple[np.ndarray, Change]:
    """Decode an image file to the pixels of ``torchvision.datasets.folder.pil_loader``, except for deep grayscale.

    Those are the pixels of Pillow's ``convert("RGB")``. Grayscale, palette, alpha and CMYK images become RGB. An EXIF
    orientation is not applied, except for a TIFF, which Pillow turns. The content decides the format, not the
    extension. TurboJPEG decodes JPEGs, because it gives Pillow's pixels in less time. If TurboJPEG reports an error or
    a warning, Pillow decodes the JPEG.

    Grayscale of more than 8 bits keeps its upper 8 bits, as 16-bit RGB does in Pillow. Pillow's ``convert`` clips such
    grayscale at 255, which makes nearly all pixels white.

    Parameters
    ----------
    path : path
        The file, or the name of the content for messages.
    max_pixels : int, optional
        The largest number of pixels; 0 for no limit. Pillow's limit also holds, twice ``Image.MAX_IMAGE_PIXELS``.
    content : bytes, optional
        The content of the file, if it has been read already. The file is then not opened.

    Returns
    -------
    image : ndarray of uint8, shape (H, W, 3)
    changes : Change

    Raises
    ------
    Exception
        Any exception that Pillow raises for a file it cannot decode (``OSError``, ``ValueError``, ``SyntaxError``).
    UserError
        If the image is empty, has too many pixels, or has numbers of unknown range. Also if it is a JPEG of a kind
        that cannot be decoded, or PostScript, because Pillow would run it in Ghostscript.
    """
    if content is None:
        content = Path(path).read_bytes()
    if not content:
        raise UserError("the file is empty (0 bytes)")
    if max_pixels is None:
        from PIL import Image

        max_pixels = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    reason = None
    if content.startswith(b"\xff\xd8"):
        try:
            image = jpeg.decode(np.frombuffer(content, np.uint8), max_pixels=max_pixels or None)
            return image, _jpeg_changes(content)
        except jpeg.JPEGError as error:
            reason = error
    pixels, changes = _load_with_pillow(_NamedContent(content, path), max_pixels, reason)
    # Pillow gives the depth of a PNG only for grayscale.
    is_deep_png = content.startswith(_PNG_START) and content[_PNG_DEPTH_AT] > 8
    return pixels, changes | Change.DEPTH if is_deep_png else changes


class _NamedContent(BytesIO):
    """The content of a file that Pillow's messages name as if Pillow had opened the file."""

    def __init__(self, content: bytes, path: str | os.PathLike[str]):
        super().__init__(content)
        self._path = os.fspath(path)

    def __repr__(self) -> str:
        return repr(self._path)


def _load_with_pillow(
    content: _NamedContent, max_pixels: int, reason: jpeg.JPEGError | None
) -> tuple[np.ndarray, Change]:
    """Decode an image with Pillow. `reason` is TurboJPEG's, if it has refused the image."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(content)
    except UnidentifiedImageError as error:
        if reason is not None:
            raise UserError(str(reason)) from error
        raise
    with opened as image:
        if image.format == "EPS":
            raise UserError("a PostScript program, not an image")
        width, height = image.size
        if max_pixels and width * height > max_pixels:
            raise UserError(
                f"{width} x {height} px are more than the limit of {max_pixels} px; if the image is wanted, use "
                f"--max_pixels={width * height}"
            )
        try:
            return _convert(image)
        except OSError as error:
            if isinstance(reason, jpeg.UnsupportedJPEG):
                raise UserError(str(reason)) from error
            raise


def _convert(image: "Image.Image") -> tuple[np.ndarray, Change]:
    """Return the pixels of an open image (H, W, 3), and the changes."""
    changes = Change(0)
    image.load()
    if _is_deep(image):
        changes |= Change.DEPTH
    # Pillow turns a TIFF as it loads, and then forgets the orientation.
    with contextlib.suppress(Exception):  # damaged EXIF is none, and Pillow documents no class for what it raises
        if image.getexif().get(_ORIENTATION, 1) != 1:
            changes |= Change.ORIENTATION
    if image.mode == "CMYK":
        changes |= Change.CMYK
    if _has_transparency(image):
        changes |= Change.TRANSPARENCY
    pixels = rgb_pixels(image)
    with contextlib.suppress(Exception):  # EOFError without another frame, anything if that frame is damaged
        image.seek(1)
        changes |= Change.FRAMES
    return pixels, changes


def rgb_pixels(image: "Image.Image") -> np.ndarray:
    """Return the pixels of Pillow's ``convert("RGB")``, uint8 (H, W, 3). Deep grayscale keeps its upper 8 bits.

    Raises
    ------
    UserError
        If the pixels are numbers of unknown range.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise UserError(f"its pixels are {kind} of no known range; save it with 8 or 16 bits without sign")
    if image.mode.startswith("I"):
        return np.repeat(_upper_bits(image)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _is_deep(image: "Image.Image") -> bool:
    """Return whether the samples in the file have more than 8 bits."""
    if image.mode.startswith("I"):
        return True
    if image.format == "TIFF":
        return max(getattr(image, "tag_v2", {}).get(_TIFF_BITS, (8,))) > 8
    return False


def _upper_bits(image: "Image.Image") -> np.ndarray:
    """Return the upper 8 bits of grayscale with 9 to 16 bits, uint8 (H, W), 0 for black."""
    num_bits = 16
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        num_bits = tags.get(_TIFF_BITS, (16,))[0]
    pixels = (np.asarray(image).astype(np.int64) >> (num_bits - 8)).astype(np.uint8)
    # For 8 bits, Pillow turns such pixels itself.
    return 255 - pixels if image.format == "TIFF" and tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else pixels


def _has_transparency(image: "Image.Image") -> bool:
    """Return whether a pixel of an image is not opaque. Of a palette or a key colour, only its presence counts."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return bool(np.asarray(image.getchannel(image.getbands()[-1])).min() < 255)
    return "transparency" in image.info


def _jpeg_changes(content: bytes) -> Change:
    """Return what a JPEG loses that TurboJPEG has decoded. It decodes no CMYK."""
    position = 2
    # EXIF is in one of the application segments and comments before the tables.
    while content[position : position + 2] >= b"\xff\xe0":
        size_bytes = int.from_bytes(content[position + 2 : position + 4], "big")
        if content.startswith(_EXIF_START, position) and content.startswith(_EXIF_NAME, position + 4):
            return _exif_changes(content[position + 4 : position + 2 + size_bytes])
        position += 2 + size_bytes
    return Change(0)


def _exif_changes(content: bytes) -> Change:
    from PIL import Image

    exif = Image.Exif()
    with contextlib.suppress(Exception):  # damaged EXIF is none, and Pillow documents no class for what it raises
        exif.load(content)
        if exif.get(_ORIENTATION, 1) != 1:
            return Change.ORIENTATION
    return Change(0)
