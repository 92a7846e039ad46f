"""JPEG: encoding with restart segments and their index, and the one boundary to TurboJPEG.

A file written by `encode` is an ordinary baseline JPEG. A restart marker every *k* MCUs, *k* dividing the MCUs of a
row, makes every *k* MCUs decodable on their own, and an APP10 segment behind SOI says where each row of MCUs begins. A
reader that knows both decodes a crop for what the crop covers; all others skip the one and expect the other.
``docs/BETON_FORMAT.md`` has the bytes.
"""

import numpy as np

INDEX_MARKER = 0xEA
INDEX_NAME = b"ffcvrow\0"
MCU_PX = 16
_SEGMENT_MCUS = 2


def encode(image: np.ndarray, quality: int = 90) -> np.ndarray:
    """Encode an image as a baseline 4:2:0 JPEG with restart segments and their index.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        RGB, 1 to 65500 px a side.
    quality : int
        1 to 100, as libjpeg counts it.

    Returns
    -------
    ndarray of uint8, shape (size_bytes,)
        A function of the image, the quality and the version of OpenCV alone.

    Raises
    ------
    ValueError
        If the image is not uint8 (H, W, 3) or cannot be encoded.
    """
    import cv2

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a JPEG is made of uint8 pixels (H, W, 3), got {image.dtype} {image.shape}")
    mcus_per_row = -(-image.shape[1] // MCU_PX)
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, int(quality)),
        *(cv2.IMWRITE_JPEG_OPTIMIZE, 1),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
        *(cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval(mcus_per_row)),
    ]
    try:
        encoded, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    except cv2.error as error:
        raise ValueError(f"OpenCV cannot encode {image.shape} at quality {quality}: {error}") from error
    if not encoded:
        raise ValueError(f"OpenCV cannot encode {image.shape} at quality {quality}")
    return _with_index(jpeg.reshape(-1), mcus_per_row)


def restart_interval(mcus_per_row: int) -> int:
    """The number of MCUs between restart markers: the divisor of `mcus_per_row` nearest, as a ratio, to 32 px."""
    divisors = [k for k in range(1, mcus_per_row + 1) if mcus_per_row % k == 0]
    return min(divisors, key=lambda k: max(k / _SEGMENT_MCUS, _SEGMENT_MCUS / k))


def _with_index(jpeg: np.ndarray, mcus_per_row: int) -> np.ndarray:
    """Insert the offsets of the MCU rows, counted from SOI in the file that results, behind SOI."""
    scan_start, interval = _scan_start(jpeg)
    scan_end = jpeg.size - 2
    scan = jpeg[scan_start:scan_end]
    markers = np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] >= 0xD0) & (scan[1:] <= 0xD7))
    row_starts = markers[mcus_per_row // interval - 1 :: mcus_per_row // interval] + 2
    offsets = np.concatenate(([0], row_starts, [scan.size])) + scan_start
    length = 2 + len(INDEX_NAME) + 4 * offsets.size
    offsets += length + 2
    index = bytes([0xFF, INDEX_MARKER]) + length.to_bytes(2, "big") + INDEX_NAME + offsets.astype(">u4").tobytes()
    return np.concatenate((jpeg[:2], np.frombuffer(index, np.uint8), jpeg[2:]))


def _scan_start(jpeg: np.ndarray) -> tuple[int, int]:
    """The offset of the first entropy-coded byte, and the restart interval in MCUs, of a JPEG just encoded."""
    position, interval = 2, 0
    while True:
        marker, length = jpeg[position + 1], int.from_bytes(jpeg[position + 2 : position + 4].tobytes(), "big")
        if marker == 0xDD:
            interval = int.from_bytes(jpeg[position + 4 : position + 6].tobytes(), "big")
        position += 2 + length
        if marker == 0xDA:
            return position, interval
