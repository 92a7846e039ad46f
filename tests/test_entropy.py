"""Our decoder of regions: every plane equals that of TurboJPEG, whatever happens to the bytes, and no byte is touched
beyond the memory that the decoder is given.

Run as a script, ``python -m tests.test_entropy SEED COUNT``, this decodes COUNT damaged JPEGs between guard pages with
both decoders, and prints how many ended how, as JSON.
"""

import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numba as nb
import numpy as np
import pytest

from ffcv_ops.codec import entropy, huffman, jpeg, region, shared_tables
from ffcv_ops.codec.zigzag import ZIGZAG
from ffcv_ops.errors import UserError
from tests.reference import decoded_coefficients, inverse_dct
from tests.test_jpeg import photograph, pillow_jpeg, random_windows
from tests.test_shared_tables import huffman_segments

if nb.config.DISABLE_JIT:
    pytest.skip("the kernels of the decoder exist compiled alone", allow_module_level=True)

NUM_MUTANTS = int(os.environ.get("FFCV_OPS_MUTANTS", 3000))
SCALES = 8, 4, 2, 1


class Both:
    """Both decoders on the same JPEG: `decode` compares them, and returns the status and whether ours accepted it.

    The scale of the decode is in eighths.
    """

    def __init__(self, allocate=lambda size, dtype: np.zeros(size, dtype)):
        self.allocate = allocate
        self.own = allocate(region.allocate_decoders(1).size, np.int64)
        self.none = np.zeros(0, np.int64)

    def decode(self, data, size, window, eighths=8):
        planes = [self.allocate(3 * (-(-size[0] // 32) * 32) * (-(-size[1] // 32) * 32), np.uint8) for _ in range(2)]
        results = []
        for decoder, memory in zip((self.own, self.none), planes, strict=True):
            scratch = np.empty(8, np.int64), self.allocate(data.size + region.SLACK_BYTES, np.uint8), decoder
            found = region.decode_planes_into(data, size, window, eighths, scratch, memory)
            results.append((found, window_of(found, memory, window, eighths) if found.status == region.OK else []))
        (ours, parts), (theirs, expected) = results
        assert ours.status == theirs.status
        assert (ours.v, ours.h) == (theirs.v, theirs.h)
        for part, other in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(part, other)
        accepted = self.accepts(data, size, window, eighths, planes[0])
        assert not accepted or ours.status == region.OK
        return ours.status, accepted

    def accepts(self, data, size, window, eighths, planes):
        layout = region.read_layout(data)
        unstuffed = self.allocate(data.size + region.SLACK_BYTES, np.uint8)
        source, *memory = [(array.ctypes.data, array.size) for array in (data, unstuffed, planes)]
        memory.insert(1, self.own.ctypes.data)
        if (layout.height, layout.width) != size:
            return entropy.decode_plain_region_into(source, size, window, eighths, *memory)
        return entropy.decode_region_into(source, layout, window, eighths, *memory)


def window_of(found, memory, window, eighths):
    """Return the part of each plane that the window touches."""
    luma = found.height * found.width
    if found.v == region.RGB:
        return [memory[: 3 * luma].reshape(found.height, found.width, 3)]
    planes, steps = [memory[:luma].reshape(found.height, found.width)], [(1, 1)]
    if found.v != region.GRAY:
        shape = found.height // found.v, found.width // found.h
        planes += list(memory[luma : luma + 2 * shape[0] * shape[1]].reshape(2, *shape))
        steps += 2 * [(found.v, found.h)]
    top, left = window[0] - found.top, window[1] - found.left
    y, x = top * eighths // 8, left * eighths // 8
    bottom, right = -(-(top + window[2]) * eighths // 8), -(-(left + window[3]) * eighths // 8)
    return [
        plane[y // v : -(-bottom // v), x // h : -(-right // h)].copy()
        for plane, (v, h) in zip(planes, steps, strict=True)
    ]


@pytest.fixture(scope="module")
def both():
    return Both()


def patterns(size):
    """Yield images that are unlike photographs."""
    rng = np.random.default_rng(7)
    yield rng.integers(0, 256, (*size, 3), np.uint8)
    yield 255 * rng.integers(0, 2, (*size, 3), np.uint8)
    yield 255 * rng.integers(0, 2, (*size, 1), np.uint8).repeat(3, 2)
    checkered = np.indices(size).sum(0) % 2
    yield (255 * checkered).astype(np.uint8)[:, :, None].repeat(3, 2)
    yield np.full((*size, 3), 255, np.uint8)
    yield np.zeros((*size, 3), np.uint8)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 40), (40, 1), (15, 17), (16, 16), (17, 33), (64, 48), (97, 31), (203, 331)]
)
def test_planes_equal_those_of_turbojpeg(both, size):
    rng = np.random.default_rng(sum(size))
    for quality in (1, 10, 50, 90, 98, 100):
        data = jpeg.encode(photograph(*size, which=quality), quality)
        for window in ((0, 0, *size), *random_windows(rng, size, 12)):
            for eighths in SCALES:
                assert both.decode(data, size, window, eighths) == (region.OK, True)


@pytest.mark.parametrize("quality", range(1, 101, 9))
def test_planes_of_noise_equal_those_of_turbojpeg(both, quality):
    """Saturated noise of the lowest qualities has pixels far beyond the range. Such images are left to TurboJPEG."""
    rng = np.random.default_rng(quality)
    size = (100, 134)
    for image in patterns(size):
        data = jpeg.encode(image, quality)
        for window in ((0, 0, *size), *random_windows(rng, size, 4)):
            for eighths in SCALES:
                status, accepted = both.decode(data, size, window, eighths)
                assert status == region.OK and (accepted or quality < 10)


def test_a_large_image_is_decoded_in_several_chunks(both):
    size = (1100, 2000)
    data = jpeg.encode(photograph(*size), 95)
    for window in ((0, 0, *size), (77, 333, 600, 1600), (1000, 1500, 100, 500)):
        for eighths in SCALES:
            assert both.decode(data, size, window, eighths) == (region.OK, True)


def test_an_image_that_is_too_wide_is_left_to_turbojpeg(both):
    size = (20, 5000)
    data = jpeg.encode(photograph(*size), 90)
    assert both.decode(data, size, (0, 0, *size)) == (region.OK, False)
    assert both.decode(data, size, (0, 900, 20, 4000)) == (region.OK, True)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (203, 331), (500, 500)])
def test_planes_of_files_without_restart_markers_equal_those_of_turbojpeg(both, size):
    """As FFCV's writer makes them, with the tables of the standard or with their own."""
    rng = np.random.default_rng(1)
    for quality in (5, 75, 90, 100):
        for optimize in (False, True):
            data = pillow_jpeg(photograph(*size), quality=quality, subsampling="4:2:0", optimize=optimize)
            for window in ((0, 0, *size), *random_windows(rng, size, 6)):
                for eighths in SCALES:
                    assert both.decode(data, size, window, eighths) == (region.OK, True)
    large = pillow_jpeg(photograph(520, 500), subsampling="4:2:0")
    assert both.decode(large, (520, 500), (0, 0, 100, 100)) == (region.OK, False)


def test_files_with_shared_tables_are_decoded_with_tables_that_are_built_once():
    size, both = (176, 208), Both()
    images = [cv2.GaussianBlur(photograph(*size, which=i), (0, 0), 0.3 + i // 2) for i in range(12)]
    counts = [shared_tables.count_symbols(image, 90) for image in images]
    sets = shared_tables.choose_tables(counts, 90)
    encoded = [jpeg.encode(image, 90, sets) for image in images]
    groups = Counter(huffman_segments(data) for data in encoded)
    assert len(groups) == len(sets) == shared_tables.NUM_SETS

    def decode(data, window, eighths=8):
        """Return whether tables were built. Building overwrites this scratch."""
        scratch = both.own[entropy._AT.pyramid // 8 :][: huffman.PYRAMID_BYTES // 8]
        scratch[:] = -1
        assert both.decode(data, size, window, eighths) == (region.OK, True)
        return bool((scratch != -1).any())

    # `both` decodes each image twice. The second time, the tables are there, and so they stay.
    assert sum(decode(data, (0, 0, *size)) for data in encoded) == len(sets)
    rng = np.random.default_rng(0)
    for image, data in zip(images, encoded, strict=True):
        for window in random_windows(rng, size, 4):
            for eighths in SCALES:
                assert not decode(data, window, eighths)
        assert decode(jpeg.encode(image, 90), (0, 0, *size)), "an image with tables of its own"


def test_other_jpegs_are_left_to_turbojpeg(both):
    image = photograph(97, 130)
    for options in ({"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_blocks": 3}):
        assert both.decode(pillow_jpeg(image, **options), (97, 130), (3, 5, 70, 60)) == (region.OK, False)


@pytest.mark.parametrize("block_px", SCALES)
def test_planes_are_those_of_the_definition(both, block_px):
    """Read bit by bit and transformed in the order of libjpeg, one block at a time."""
    size, height, width = (48, 64), 6 * block_px, 8 * block_px
    for quality in (5, 60, 97):
        data = jpeg.encode(photograph(*size), quality)
        memory = np.empty(3 << 13, np.uint8)
        assert both.accepts(data, size, (0, 0, *size), block_px, memory)
        quantisation = [data[at + 4 : at + 68] for at in np.flatnonzero(data == 0xDB) if data[at - 1] == 0xFF]
        blocks = decoded_coefficients(data.tobytes())
        mcus = blocks.reshape(3, 4, 6, 64)
        luma, chroma = memory[: height * width], memory[height * width : height * width * 3 // 2]
        luma = luma.reshape(3, 2, block_px, 4, 2, block_px).transpose(0, 3, 1, 4, 2, 5)
        chroma = chroma.reshape(2, 3, block_px, 4, block_px).transpose(1, 3, 0, 2, 4)
        for row, column in np.ndindex(3, 4):
            for number in range(6):
                expected = inverse_dct(mcus[row, column, number], quantisation[number // 4], ZIGZAG, block_px)
                found = chroma[row, column, number - 4] if number > 3 else luma[row, column, number >> 1, number & 1]
                np.testing.assert_array_equal(found, expected)


def test_the_environment_can_choose_turbojpeg(monkeypatch):
    assert region.allocate_decoders(2).shape[1] > 0
    monkeypatch.setenv("FFCV_OPS_DECODER", "turbojpeg")
    assert region.allocate_decoders(2).shape == (2, 0)
    monkeypatch.setenv("FFCV_OPS_DECODER", "fast")
    with pytest.raises(UserError, match="FFCV_OPS_DECODER is 'fast'; it can be own or turbojpeg"):
        region.allocate_decoders(2)


# --- damage


def test_damaged_jpegs_end_as_with_turbojpeg():
    command = [sys.executable, "-m", "tests.test_entropy", "0", str(NUM_MUTANTS)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found.values()) == NUM_MUTANTS
    assert min(found["0 by us"], found["0 by TurboJPEG"], found["1 by TurboJPEG"]) > NUM_MUTANTS // 100


class Guarded:
    """Arrays that end or begin at a page that nobody may touch. Each request reuses the memory of the last one."""

    def __init__(self):
        self.free = {}
        self.taken = []
        self.at_end = True

    def reset(self, at_end):
        for size_bytes, array in self.taken:
            self.free.setdefault(size_bytes, []).append(array)
        self.taken, self.at_end = [], at_end

    def __call__(self, size, dtype):
        num_bytes = size * np.dtype(dtype).itemsize
        page = mmap.PAGESIZE
        length = -(-num_bytes // page) * page
        if not self.free.get(length):
            mapped = mmap.mmap(-1, length + 2 * page)
            memory = np.frombuffer(mapped, np.uint8)
            mprotect = ctypes.CDLL(None, use_errno=True).mprotect
            mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            for guard in (memory.ctypes.data, memory.ctypes.data + page + length):
                assert mprotect(guard, page, 0) == 0
            self.free.setdefault(length, []).append(memory[page : page + length])
        memory = self.free[length].pop()
        self.taken.append((length, memory))
        part = memory[length - num_bytes :] if self.at_end else memory[:num_bytes]
        return part.view(dtype)


def mutate(draw, data, layout):
    """Return a copy with a few changes, most of them where our decoder reads."""
    scan = jpeg.scan_start(data)[0]
    parts = {"index": (2, 60), "header": (max(layout.frame - 180, 0), scan), "scan": (scan, data.size)}
    start, stop = parts[draw.choice(list(parts), p=(0.1, 0.3, 0.6))]
    content = data.copy()
    kind = draw.choice(["flip", "bytes", "markers", "cut", "remove", "repeat"], p=(0.4, 0.2, 0.15, 0.05, 0.1, 0.1))
    at = draw.integers(start, stop, draw.integers(1, 4))
    if kind == "flip":
        content[at] ^= (1 << draw.integers(0, 8, at.size)).astype(np.uint8)
    elif kind == "bytes":
        content[at] = draw.integers(0, 256, at.size)
    elif kind == "markers":
        content[at] = 0xFF
        content[np.minimum(at + 1, data.size - 1)] = draw.choice([0, 0xD0, 0xD3, 0xD9, 0xFF], at.size)
    elif kind == "cut":
        content = content[: at[0]].copy()
    elif kind == "remove":
        content = np.delete(content, slice(at[0], at[0] + draw.integers(1, 4)))
    else:
        content = np.insert(content, at[0], content[at[0] : at[0] + draw.integers(1, 40)])
    return content


def run(seed, count):
    guarded = Guarded()
    both = Both(guarded)
    guarded.taken = []  # the decoder keeps its memory
    sources = []
    for number, quality in enumerate((1, 30, 75, 90, 97, 100)):
        size = (49 + 23 * number, 190 - 17 * number)
        sources.append((size, jpeg.encode(photograph(*size, which=number), quality)))
        if number % 2:
            plain = pillow_jpeg(photograph(*size, which=number), quality=quality, subsampling="4:2:0")
            sources.append((size, plain))
    sources.append(((60, 70), jpeg.encode(next(patterns((60, 70))), 80)))
    outcomes = Counter()
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        size, data = sources[draw.integers(len(sources))]
        guarded.reset(at_end=bool(number % 2))
        content = mutate(draw, data, region.read_layout(data))
        mutant = guarded(content.size, np.uint8)
        mutant[:] = content
        window = next(random_windows(draw, size, 1)) if draw.integers(3) else (0, 0, *size)
        eighths = int(draw.choice(SCALES))
        try:
            status, accepted = both.decode(mutant, size, window, eighths)
        except AssertionError:
            print(f"mutant {number} of seed {seed}, window {window}, {eighths} eighths", file=sys.stderr)
            raise
        outcomes[f"{status} by {'us' if accepted else 'TurboJPEG'}"] += 1
    return outcomes


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
