"""The JPEG encoder: byte for byte libjpeg's, and what the pixels say."""

import heapq
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from reference import decoded_coefficients, jpeg_coefficients
from sklearn.datasets import load_sample_images

from ffcv_ops.codec import encoder, jpeg, shared_tables

PHOTOGRAPHS = load_sample_images().images
SIZES = [(1, 1), (1, 40), (40, 1), (7, 9), (8, 8), (15, 17), (16, 16), (24, 40), (33, 31), (97, 130), (203, 331)]


def images(size):
    """A part of a photograph, noise, and noise of black and white, which has the largest coefficients."""
    rng = np.random.default_rng(size)
    yield np.ascontiguousarray(PHOTOGRAPHS[size[0] % 2][100 : 100 + size[0], 200 : 200 + size[1]])
    yield rng.integers(0, 256, (*size, 3), np.uint8)
    yield rng.choice(np.array([0, 255], np.uint8), (*size, 3))


def without_index(data):
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def libjpegs(image, quality, interval):
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
        *(cv2.IMWRITE_JPEG_RST_INTERVAL, interval),
    ]
    return cv2.imencode(".jpg", image[:, :, ::-1], options)[1].tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quality", [1, 50, 90, 100])
def test_the_bytes_are_libjpegs(size, quality):
    for image in images(size):
        data = without_index(jpeg.encode(image, quality).tobytes())
        interval = int.from_bytes(data[data.index(b"\xff\xdd\0\4") + 4 :][:2], "big")
        assert data == libjpegs(image, quality, interval)


def test_the_coefficients_are_those_of_the_pixels():
    """Each is the exact one, rounded; the rounding of colours and of the integer transform may shift it a little."""
    for quality in (75, 90):
        tables = encoder.build_quantisation(quality)[0]
        for image in images((48, 64)):
            found = decoded_coefficients(jpeg.encode(image, quality).tobytes())
            assert np.abs(found - jpeg_coefficients(image, tables, encoder.ZIGZAG)).max() < 0.8


def test_a_quotient_is_exact_for_every_dividend():
    dividends = np.arange(1 << 14, dtype=np.uint32)
    for quality in range(1, 101):
        tables, divisors = encoder.build_quantisation(quality)
        for step, index in zip(*np.unique(tables, return_index=True), strict=True):
            half, reciprocal, shift = divisors.reshape(-1, 3)[index].astype(np.uint32)
            assert half == 4 * int(step)
            assert np.array_equal((dividends * reciprocal >> 16) >> shift, dividends // (8 * int(step)))


def tree_cost(counts):
    """Bits that Huffman's algorithm needs, with one more symbol that hardly occurs."""
    heap = [0.5, *counts[counts > 0].tolist()]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        cost += pair
        heapq.heappush(heap, pair)
    return cost


@pytest.mark.parametrize("skewed", [False, True])
def test_the_codes_are_the_best_there_are(skewed):
    rng = np.random.default_rng(0)
    ac_counts = rng.integers(0, 1000, (2, 256))
    if skewed:  # as deep a tree as there can be, deeper than a JPEG's codes may be long
        ac_counts[:] = 0
        ac_counts[:, 1], ac_counts[:, 2] = 1, 1
        for symbol in range(3, 40):
            ac_counts[:, symbol] = ac_counts[:, symbol - 1] + ac_counts[:, symbol - 2]
    tables = encoder.build_tables(encoder.count_symbols(np.zeros(6, np.int16), 1, ac_counts))
    codes = encoder.build_codes(tables)
    for counts, table, words in zip(ac_counts, tables[2:], codes[2:], strict=True):
        lengths = np.repeat(np.arange(1, 17), table[:16])
        symbols = table[16 : 16 + lengths.size]
        assert sorted(symbols) == np.flatnonzero(counts).tolist()
        assert (words[symbols] & 63 == lengths + (symbols & 15)).all()
        assert (2.0**-lengths).sum() < 1
        cost = (counts[symbols] * lengths).sum()
        assert abs(cost - tree_cost(counts)) <= 16 if not skewed else cost > tree_cost(counts)


def test_interpreted_it_makes_the_same_bytes(tmp_path):
    """The kernels without Numba, every overflow an error."""
    tables = shared_tables.choose_tables([shared_tables.count_symbols(image, 90) for image in images((48, 64))], 90)
    for number, image in enumerate(images((17, 23))):
        data, shared = jpeg.encode(image, 90), jpeg.encode(image, 90, tables)
        np.savez(tmp_path / f"{number}.npz", image=image, data=data, shared=shared, tables=tables)
    code = """
import pathlib, sys
import numpy as np
from ffcv_ops.codec import jpeg
paths = sorted(pathlib.Path(sys.argv[1]).glob("*.npz"))
assert len(paths) == 3
for path in paths:
    case = np.load(path)
    assert np.array_equal(jpeg.encode(case["image"], 90), case["data"]), path.name
    assert np.array_equal(jpeg.encode(case["image"], 90, case["tables"]), case["shared"]), path.name
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(tmp_path)]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1], timeout=120)
