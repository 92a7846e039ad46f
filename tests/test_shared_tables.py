"""The Huffman tables that the JPEGs of a file share."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.codec import encoder, jpeg
from ffcv_ops.codec.shared_tables import NUM_SETS, choose_tables, count_symbols

PHOTOGRAPHS = load_sample_images().images


def parts(count, height=176, width=208):
    """Parts of two photographs, of which the last half is blurred."""
    for i in range(count):
        y, x = 7 * i % (427 - height), 31 * i % (640 - width)
        part = PHOTOGRAPHS[i % 2][y : y + height, x : x + width]
        yield np.ascontiguousarray(part if i < count // 2 else cv2.GaussianBlur(part, (0, 0), 2))


def extremes():
    rng = np.random.default_rng(0)
    yield rng.integers(0, 256, (97, 131, 3), np.uint8)
    yield rng.choice(np.array([0, 255], np.uint8), (97, 131, 3))
    yield (np.indices((64, 64)).sum(axis=0)[..., None] % 2 * np.full(3, 255)).astype(np.uint8)
    yield np.zeros((1, 1, 3), np.uint8)


def huffman_segments(data):
    """Return the DHT segments of a JPEG."""
    data, position, found = data.tobytes(), 2, b""
    while data[position + 1] != 0xDA:
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == 0xC4:
            found += data[position : position + length]
        position += length
    return found


@pytest.fixture(scope="module")
def tables():
    return choose_tables([count_symbols(image, 90) for image in parts(24)], 90)


def test_every_symbol_of_a_baseline_jpeg_has_a_code():
    (image,) = parts(1)
    (tables,) = choose_tables([count_symbols(image, 100)], 100)
    ac = {run << 4 | bits for run in range(16) for bits in range(1, 11)} | {0x00, 0xF0}
    for number, table in enumerate(tables):
        lengths = np.repeat(np.arange(1, 17), table[:16])
        assert sorted(table[16 : 16 + lengths.size]) == sorted(ac if number >= 2 else range(12))
        assert (2.0**-lengths).sum() < 1, "the code of all ones must be free"


@pytest.mark.parametrize("quality", [1, 20, 50, 75, 90, 98])
def test_every_symbol_has_a_code_that_an_image_of_the_quality_may_have(quality):
    """The largest coefficients are those of black and white waves, at each place of a block, after each run."""
    (image,) = parts(1)
    tables = choose_tables([count_symbols(image, quality)], quality)
    waves = np.cos(np.pi / 16 * np.outer(np.arange(8), 2 * np.arange(8) + 1))
    blocks = [np.outer(a, b) * sign > 0 for a in waves for b in waves for sign in (1, -1)]
    gray = np.concatenate([np.concatenate(blocks[i : i + 16], 1) for i in range(0, 128, 16)])
    for picture in (gray, np.kron(gray, np.ones((2, 2)))):
        for colour in ((255, 255, 255), (255, 0, 0), (0, 0, 255)):
            image = (picture[..., None] * colour).astype(np.uint8)
            assert not count_symbols(image, quality)[encoder.build_codes(tables[0]) == 0].any()
            shared = jpeg.encode(image, quality, tables)
            assert np.array_equal(jpeg.decode(shared), jpeg.decode(jpeg.encode(image, quality)))


@pytest.mark.parametrize("quality", [1, 50, 90, 100])
def test_any_image_can_be_encoded_and_every_reader_sees_the_same(quality):
    tables = choose_tables([count_symbols(image, quality) for image in parts(8)], quality)
    for image in [*extremes(), *parts(4)]:
        shared, own = jpeg.encode(image, quality, tables), jpeg.encode(image, quality)
        assert np.array_equal(jpeg.decode(shared), jpeg.decode(own))
        assert np.array_equal(cv2.imdecode(shared, cv2.IMREAD_COLOR), cv2.imdecode(own, cv2.IMREAD_COLOR))
        pictures = [np.asarray(Image.open(io.BytesIO(data.tobytes()))) for data in (shared, own)]
        assert np.array_equal(*pictures)


def test_an_image_gets_the_set_with_which_it_is_smallest(tables):
    chosen = set()
    for image in parts(24):
        data = jpeg.encode(image, 90, tables)
        alone = [jpeg.encode(image, 90, one[None]) for one in tables]
        # The size with a set may move the restart interval by a step, and with it the size by a few bytes.
        assert data.size <= 1.001 * min(map(len, alone))
        chosen.add(huffman_segments(data))
    assert len(chosen) == NUM_SETS


def test_several_sets_are_smaller_than_one():
    counts = [count_symbols(image, 90) for image in parts(24)]
    several, (together,) = choose_tables(counts, 90), choose_tables([sum(counts)], 90)
    sizes = [[jpeg.encode(image, 90, sets).size for image in parts(24)] for sets in (several, together[None])]
    assert sum(sizes[0]) < 0.995 * sum(sizes[1])


def test_few_images_have_few_sets():
    assert choose_tables([], 90) is None
    (image,) = parts(1)
    counts = count_symbols(image, 90)
    assert len(choose_tables([counts], 90)) == len(choose_tables([counts] * 9, 90)) == 1
    # The difference is the segments that define codes of all symbols.
    assert jpeg.encode(image, 90, choose_tables([counts], 90)).size < jpeg.encode(image, 90).size + 400


def test_tables_without_a_symbol_are_refused(tables):
    (image,) = parts(1)
    short = tables.copy()
    short[:, 2, :16], short[:, 2, 1] = 0, 1
    with pytest.raises(ValueError, match="lack a symbol"):
        jpeg.encode(image, 90, short)


@pytest.mark.parametrize("quality", [75, 85, 90, 95])
def test_files_with_shared_tables_are_at_most_one_percent_larger_than_those_of_ffcv(quality):
    images = list(parts(24, 375, 500))
    sets = choose_tables([count_symbols(image, quality) for image in images[::2]], quality)
    shared = sum(jpeg.encode(image, quality, sets).size for image in images)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    stock = sum(cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].size for image in images)
    assert shared <= 1.01 * stock
