"""Encoding with restart segments, and region decode: bit for bit what a full decode holds there."""

import io
import math
import os
import subprocess
import sys

import cv2
import numba as nb
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.codec import jpeg, region

if nb.config.DISABLE_JIT:
    pytest.skip("the kernels that call TurboJPEG exist compiled alone", allow_module_level=True)

PHOTOGRAPHS = load_sample_images().images
SIZES = [(1, 1), (1, 40), (40, 1), (15, 17), (16, 16), (17, 33), (64, 48), (97, 31), (150, 200), (203, 331)]


def photograph(height, width, which=0):
    image = PHOTOGRAPHS[which % 2]
    side = min(image.shape[0] / height, image.shape[1] / width)
    part = image[: max(int(height * side), 1), : max(int(width * side), 1)]
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)


def pillow_jpeg(image, **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", **options)
    return np.frombuffer(stream.getvalue(), np.uint8)


def without_index(data):
    """The same JPEG, its index segment cut out."""
    return np.concatenate((data[:2], data[4 + int.from_bytes(data[4:6].tobytes(), "big") :]))


class Decoder:
    """`decode_planes_into` with scratch of its own, giving the planes as arrays."""

    def __init__(self, chosen="own"):
        decoder = region.allocate_decoders(1)[0] if chosen == "own" else np.empty(0, np.int64)
        self.scratch = np.empty(8, np.int64), np.empty(1 << 20, np.uint8), decoder
        self.memory = np.empty(3 << 20, np.uint8)

    def __call__(self, data, size, window, eighths=8):
        found = region.decode_planes_into(data, size, window, eighths, self.scratch, self.memory)
        luma = found.height * found.width
        if found.v == region.RGB:
            return found, [self.memory[: 3 * luma].reshape(found.height, found.width, 3).copy()]
        planes = [self.memory[:luma].reshape(found.height, found.width).copy()]
        if found.v != region.GRAY:
            shape = found.height // found.v, found.width // found.h
            chroma = self.memory[luma : luma + 2 * shape[0] * shape[1]].reshape(2, *shape)
            planes += [chroma[0].copy(), chroma[1].copy()]
        return found, planes


@pytest.fixture(scope="module")
def decode_planes():
    return Decoder()


def random_windows(rng, size, count):
    for _ in range(count):
        h, w = (int(rng.integers(1, side + 1)) for side in size)
        yield int(rng.integers(0, size[0] - h + 1)), int(rng.integers(0, size[1] - w + 1)), h, w


# --- encoding


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quality", [30, 90, 100])
def test_every_reader_reads_it_and_sees_the_same_as_without_the_index(size, quality):
    image = photograph(*size)
    data = jpeg.encode(image, quality)
    plain = without_index(data)
    assert np.array_equal(data, jpeg.encode(image, quality))
    assert np.array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.imdecode(plain, cv2.IMREAD_COLOR))
    decoded = Image.open(io.BytesIO(data.tobytes()))
    assert decoded.mode == "RGB" and decoded.size == size[::-1]
    assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(plain.tobytes()))))
    assert np.array_equal(jpeg.decode(data), jpeg.decode(plain))
    layout = region.read_layout(data)
    assert (layout.height, layout.width) == size
    assert -(-size[1] // 16) % layout.interval == 0


def test_it_holds_the_pixels_of_the_stock_writer():
    image = photograph(203, 331)
    stock = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].reshape(-1)
    assert np.array_equal(jpeg.decode(jpeg.encode(image, 90)), jpeg.decode(stock))


@pytest.mark.parametrize("quality", [50, 75, 90, 95])
def test_it_is_hardly_larger_than_the_stock_writers(quality):
    images = [photograph(375, 500, which) for which in range(2)] + [photograph(192, 256, which) for which in range(2)]
    ours = sum(jpeg.encode(image, quality).size for image in images)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    stock = sum(cv2.imencode(".jpg", image[:, :, ::-1], options)[1].size for image in images)
    assert ours <= 1.01 * stock


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_not_an_image_is_refused(image):
    with pytest.raises(ValueError, match="uint8 pixels"):
        jpeg.encode(image)


def test_an_image_too_large_for_a_jpeg_is_refused():
    with pytest.raises(ValueError, match="at most 65500 px a side, got 1 x 70000"):
        jpeg.encode(np.zeros((1, 70_000, 3), np.uint8))


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_that_is_none_is_refused(quality):
    with pytest.raises(ValueError, match=f"quality must be 1 to 100, not {quality}"):
        jpeg.encode(np.zeros((8, 8, 3), np.uint8), quality)


# --- region decode


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eighths", [8, 4, 2, 1])
def test_region_planes_equal_those_of_a_full_decode(decode_planes, size, eighths):
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    if eighths < 8 and min(size) < 16:
        pytest.skip("scaled only from 16 px on")
    for quality in (60, 90, 98):
        data = jpeg.encode(photograph(*size, which=quality), quality)
        whole, full = decode_planes(without_index(data), size, (0, 0, *size), eighths)
        assert whole.status == region.OK and (whole.top, whole.left) == (0, 0)
        for y, x, h, w in random_windows(rng, size, 25):
            if eighths < 8 and min(h, w) < 16:
                continue
            found, planes = decode_planes(data, size, (y, x, h, w), eighths)
            assert found.status == region.OK
            assert found.top <= y and found.left <= x
            assert (found.top + found.height * 8 / eighths) >= y + h and found.left + found.width * 8 / eighths >= x + w
            for plane, reference, step in zip(planes, full, (1, 2, 2), strict=True):
                top, left = (start * eighths // 8 // step for start in (found.top, found.left))
                # Luma's plane is rounded up to whole chroma samples; what lies beyond the image is nobody's.
                bottom, right = (math.ceil(math.ceil(side * eighths / 8) / step) for side in size)
                expected = reference[top:bottom, left:right][: plane.shape[0], : plane.shape[1]]
                assert np.array_equal(plane[: expected.shape[0], : expected.shape[1]], expected)


@pytest.mark.parametrize("size", [(17, 33), (64, 48), (97, 31), (203, 331)])
def test_spliced_rgb_equals_that_of_a_full_decode(size):
    """With 2 px around the crop, chroma upsampling sees the same neighbours."""
    rng = np.random.default_rng(1)
    spliced = np.empty(1 << 20, np.uint8)
    for quality in (75, 95):
        data = jpeg.encode(photograph(*size), quality)
        full = jpeg.decode(data)
        layout = region.read_layout(data)
        step = layout.interval * 16
        for y, x, h, w in random_windows(rng, size, 40):
            rows = max(y - 2, 0) // 16, -(-min(y + h + 2, size[0]) // 16)
            segments = max(x - 2, 0) // step, -(-min(x + w + 2, size[1]) // step)
            length = region.splice_into(data, layout, rows, segments, spliced)
            part = jpeg.decode(spliced[:length])
            top, left = y - rows[0] * 16, x - segments[0] * step
            assert np.array_equal(part[top : top + h, left : left + w], full[y : y + h, x : x + w])


def test_a_region_costs_the_bytes_it_covers():
    data = jpeg.encode(photograph(400, 600), 90)
    layout = region.read_layout(data)
    spliced = np.empty(data.size, np.uint8)
    quarter = region.splice_into(data, layout, (0, 13), (0, 600 // 16 // layout.interval // 2), spliced)
    assert quarter < 0.4 * data.size


@pytest.mark.parametrize(
    "options, channels",
    [
        ({"subsampling": "4:4:4"}, 3),
        ({"subsampling": "4:2:2"}, 3),
        ({"subsampling": "4:2:0"}, 3),
        ({"subsampling": "4:2:0", "restart_marker_blocks": 3}, 3),
        ({"progressive": True}, 3),
        ({"keep_rgb": True}, 3),
        ({}, 1),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (33, 47), (150, 200)])
def test_other_jpegs_are_decoded_whole(decode_planes, options, channels, size):
    image = photograph(*size) if channels == 3 else photograph(*size)[:, :, 1]
    data = pillow_jpeg(image, quality=92, **options)
    found, planes = decode_planes(data, size, (0, 0, *size))
    assert found.status == region.OK and (found.top, found.left) == (0, 0)
    expected = Image.open(io.BytesIO(data.tobytes()))
    if found.v == region.RGB:
        assert np.array_equal(planes[0], np.asarray(expected))
        return
    expected = np.asarray(expected.convert("YCbCr") if channels == 3 else expected).reshape(*size, -1)
    for plane, step, channel in zip(planes, ((1, 1), (found.v, found.h), (found.v, found.h)), range(3), strict=False):
        enlarged = plane.repeat(step[0], axis=0).repeat(step[1], axis=1)[: size[0], : size[1]]
        difference = np.abs(enlarged.astype(int) - expected[:, :, channel])
        assert difference.mean() < (1.5 if max(step) == 1 else 4)


def test_a_stale_or_damaged_index_is_not_believed(decode_planes):
    """Whatever the index says, pixels are right or the status says that they are not."""
    size = (97, 130)
    data = jpeg.encode(photograph(*size), 90)
    window = (40, 50, 30, 40)
    whole, expected = decode_planes(data, size, window)
    index_end = 4 + int.from_bytes(data[4:6].tobytes(), "big")
    rng = np.random.default_rng(3)
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(4, index_end)] = rng.integers(256)
        found, planes = decode_planes(damaged, size, window)
        if found.status == region.OK and found.top == 32:
            for plane, other, step in zip(planes, expected, (1, 2, 2), strict=True):
                top, left, other_left = 8 // step, (50 - found.left) // step, (50 - whole.left) // step
                part = plane[top : top + 30 // step, left : left + 40 // step]
                assert np.array_equal(part, other[top : top + 30 // step, other_left : other_left + 40 // step])


def test_a_row_that_begins_elsewhere_costs_time_alone(decode_planes):
    """All of the image is there, so the pixels are right, whatever the index says of a row."""
    size, window = (97, 130), (16, 0, 16, 130)
    for quality in (10, 90):
        data = jpeg.encode(photograph(*size), quality)
        _, (expected, *_) = decode_planes(data, size, window)
        start = int.from_bytes(data[18:22].tobytes(), "big")
        for shift in [*range(-40, 0), *range(1, 41), 1 << 30]:
            damaged = data.copy()
            damaged[18:22] = list((start + shift).to_bytes(4, "big"))
            found, (luma, *_) = decode_planes(damaged, size, window)
            assert found.status == region.OK
            np.testing.assert_array_equal(luma[16 - found.top :][:16, :130], expected[:16, :130])


def without_segment(data, marker, number=None):
    """Return the same JPEG without the segments of a marker, or without the one that defines a table of this number."""
    content, position = data.tobytes(), 2
    while content[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if content[position + 1] == marker and number in (None, content[position + 4]):
            content = content[:position] + content[end:]
        else:
            position = end
    return np.frombuffer(content, np.uint8)


@pytest.mark.parametrize("chosen", region.DECODERS)
def test_a_jpeg_gets_no_tables_of_the_image_before(chosen):
    """As TurboJPEG decodes it at first: with the standard's Huffman tables, and with no quantisation table."""
    size, window = (97, 130), (16, 32, 40, 50)
    whole = pillow_jpeg(photograph(*size, which=1), quality=75, subsampling="4:2:0")
    others = [jpeg.encode(photograph(*size), 30), pillow_jpeg(photograph(*size), optimize=True, progressive=True)]
    misnamed = whole.copy()
    misnamed[np.flatnonzero((whole[:-1] == 0xFF) & (whole[1:] == 0xC4))[1] + 4] = 0x12
    lacking = [without_segment(whole, 0xC4), without_segment(whole, 0xC4, 0x11), misnamed]
    decode = Decoder(chosen)
    _, expected = decode(whole, size, (0, 0, *size))
    for other in others:
        for data in lacking:
            assert decode(other, size, window)[0].status == region.OK
            found, planes = decode(data, size, (0, 0, *size))
            assert found.status == region.OK
            for plane, step, right in zip(planes, (1, 2, 2), expected, strict=True):
                extent = -(-size[0] // step), -(-size[1] // step)
                assert np.array_equal(plane[: extent[0], : extent[1]], right[: extent[0], : extent[1]])
        for data in (without_segment(whole, 0xDB), without_segment(whole, 0xDB, 1), without_segment(other, 0xDB)):
            assert decode(other, size, window)[0].status == region.OK
            assert decode(data, size, (0, 0, *size))[0].status == region.BAD_JPEG
        assert decode(other, size, window)[0].status == region.OK


def test_damage_reaches_the_status_and_nothing_else(decode_planes):
    """Noise in the file's last part, cut ends, files of noise: a status, and at no time memory that is not ours."""
    size = (97, 130)
    data = jpeg.encode(photograph(*size), 90)
    layout = region.read_layout(data)
    rng = np.random.default_rng(4)
    statuses = []
    for _ in range(300):
        damaged = data.copy()
        at = rng.integers(layout.scan, data.size, 20)
        damaged[at] = rng.integers(0, 256, 20)
        statuses.append(decode_planes(damaged, size, (0, 0, *size))[0].status)
        for cut in rng.integers(0, data.size, 3):
            assert decode_planes(data[:cut].copy(), size, (0, 0, *size))[0].status != region.OK
    assert statuses.count(region.BAD_JPEG) > 200
    assert decode_planes(rng.integers(0, 256, 500, np.uint8), size, (0, 0, *size))[0].status == region.BAD_JPEG
    assert decode_planes(data, (97, 131), (0, 0, 97, 131))[0].status == region.WRONG_SIZE


def test_decode_says_what_turbojpeg_says():
    with pytest.raises(ValueError, match="TurboJPEG: Not a JPEG file"):
        jpeg.decode(np.full(100, 7, np.uint8))
    with pytest.raises(ValueError, match="TurboJPEG: Premature end of JPEG file"):
        jpeg.decode(jpeg.encode(photograph(64, 48))[:-300])


def verdict(read, data):
    try:
        read(data)
    except ValueError as error:
        return str(error)


def test_a_check_finds_what_a_decode_finds():
    """At an eighth of the size all of the file is read nevertheless."""
    rng = np.random.default_rng(5)
    damaged = 0
    for data in (jpeg.encode(photograph(97, 130)), pillow_jpeg(photograph(97, 130), progressive=True)):
        assert jpeg.check(data) == (97, 130)
        for _ in range(150):
            other = data[: rng.integers(2, data.size)].copy() if rng.integers(4) == 0 else data.copy()
            other[rng.integers(2, other.size, 3)] = rng.integers(0, 256, 3)
            found = verdict(jpeg.decode, other)
            assert (found is None) == (verdict(jpeg.check, other) is None)
            damaged += found is not None
    assert 150 < damaged < 300


# --- the library


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_library_that_is_not_there_is_named():
    result = run_python("from ffcv_ops.codec import jpeg; jpeg.turbojpeg()", TURBOJPEG="/nowhere/libturbojpeg.so")
    assert result.returncode == 1
    assert "TurboJPEGNotFound: TurboJPEG 2.1 or later was not found" in result.stderr
    assert "/nowhere/libturbojpeg.so" in result.stderr
