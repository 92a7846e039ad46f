"""The resampler against Pillow, to the bit, and against its slow twin."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.operations.resample import (
    BICUBIC,
    BILINEAR,
    INTERPOLATIONS,
    resample_planes_into,
    resample_rgb_into,
    workspace_bytes,
)
from tests import reference

FILTERS = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}
PILLOW_CHOOSES_ORDER = int(PIL.__version__.split(".")[0]) >= 13
NONE = np.empty((0, 0), np.uint8)
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2), "4:4:0": (2, 1)}


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return np.array(Image.fromarray(load_sample_images().images[0]).resize((500, 375)))


def touched(box) -> tuple[slice, slice]:
    y, x, height, width = box
    return slice(math.floor(y), math.ceil(y + height)), slice(math.floor(x), math.ceil(x + width))


def workspace_for(box, shape) -> np.ndarray:
    return np.empty(workspace_bytes(math.ceil(box[2]), math.ceil(box[3]), max(shape[:2])), np.uint8)


def rgb_of(image, box, shape, interpolation, flip=False) -> np.ndarray:
    out = np.empty((*shape, 3), np.uint8)
    resample_rgb_into(image, box, flip, interpolation, workspace_for(box, shape), out)
    return out


def planes_of(y, cb, cr, y_box, c_box, shape, interpolation, flip=False) -> np.ndarray:
    out = np.empty((*shape, 3), np.uint8)
    resample_planes_into(y, cb, cr, y_box, c_box, flip, interpolation, workspace_for(y_box, shape), out)
    return out


def region_of(plane, box, shape, interpolation) -> np.ndarray:
    return planes_of(plane, NONE, NONE, box, box, shape, interpolation)[..., 0]


def pillow(image, box, shape, interpolation) -> np.ndarray:
    """Pillow on the pixels that the box touches: decode, crop, resize."""
    rows, columns = touched(box)
    y, x, height, width = box
    top, left = y - rows.start, x - columns.start
    crop = Image.fromarray(np.ascontiguousarray(image[rows, columns]))
    return np.asarray(crop.resize(shape[::-1], FILTERS[interpolation], (left, top, left + width, top + height)))


def difference(a, b) -> int:
    return int(np.abs(a.astype(int) - b).max())


def subsampled(plane, factors) -> np.ndarray:
    height, width = (-(-side // factor) for side, factor in zip(plane.shape, factors, strict=True))
    return np.array(Image.fromarray(plane).resize((width, height), Image.Resampling.BOX))


@st.composite
def cases(draw, max_side=90):
    """A plane of noise, half of it saturated, a box within it in quarters of a pixel, and an output shape."""
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    y, x = draw(st.integers(0, 4 * height - 1)) / 4, draw(st.integers(0, 4 * width - 1)) / 4
    box = y, x, draw(st.integers(1, int(4 * (height - y)))) / 4, draw(st.integers(1, int(4 * (width - x)))) / 4
    if draw(st.booleans()):
        rows, columns = touched(box)
        box = tuple(float(v) for v in (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))
    shape = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(-128, 384, (height, width))
    return np.clip(noise, 0, 255).astype(np.uint8), box, shape, draw(st.sampled_from(sorted(FILTERS)))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_region_equals_its_twin_and_pillow(case):
    plane, box, shape, interpolation = case
    ours = region_of(plane, box, shape, interpolation)
    np.testing.assert_array_equal(ours, reference.resampled(plane, box, shape, interpolation == BICUBIC))
    if PILLOW_CHOOSES_ORDER:
        np.testing.assert_array_equal(ours, pillow(plane, box, shape, interpolation))
    elif interpolation == BILINEAR:
        assert difference(ours, pillow(plane, box, shape, interpolation)) <= 1


@pytest.mark.parametrize("name", INTERPOLATIONS)
@pytest.mark.parametrize("size", [128, 160, 224])
def test_photographs_equal_pillow(photograph, name, size):
    interpolation, shape = INTERPOLATIONS[name], (size, size)
    boxes = [(0.0, 0.0, 375.0, 500.0), (20.0, 31.0, 300.0, 330.0), (101.0, 7.0, 130.0, 173.0), (40.0, 50.0, 1.0, 1.0)]
    for box in [*boxes, (60.0, 60.0, float(size), float(size)), (0.0, 200.0, 330.0, 180.0)]:
        for image in (photograph, np.ascontiguousarray(photograph[::-1, ::-1])):
            expected = pillow(image, box, shape, interpolation)
            tolerance = 0 if PILLOW_CHOOSES_ORDER else interpolation + 1
            assert difference(rgb_of(image, box, shape, interpolation), expected) <= tolerance
            plane = np.ascontiguousarray(image[..., 1])
            assert difference(region_of(plane, box, shape, interpolation), expected[..., 1]) <= tolerance


def test_the_original_size_is_the_original(photograph):
    rows, columns = slice(30, 254), slice(40, 264)
    for interpolation in FILTERS:
        np.testing.assert_array_equal(
            rgb_of(photograph, (30.0, 40.0, 224.0, 224.0), (224, 224), interpolation), photograph[rows, columns]
        )


@pytest.mark.parametrize("interpolation", FILTERS)
def test_nothing_beyond_the_box_is_seen(photograph, interpolation):
    """Pillow's ``resize(box=...)`` would look at it; after a decoded crop there is nothing to look at."""
    box = 20.5, 30.0, 199.0, 150.0
    masked = np.zeros_like(photograph)
    masked[touched(box)] = photograph[touched(box)]
    ours = rgb_of(photograph, box, (96, 96), interpolation)
    np.testing.assert_array_equal(ours, rgb_of(masked, box, (96, 96), interpolation))
    y, x, height, width = box
    clamped_to_image = Image.fromarray(photograph).resize(
        (96, 96), FILTERS[interpolation], (x, y, x + width, y + height)
    )
    np.testing.assert_array_equal(ours[8:-8, 8:-8], np.asarray(clamped_to_image)[8:-8, 8:-8])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_planes_equal_their_twin(photograph, subsampling, interpolation):
    factors = SUBSAMPLINGS[subsampling]
    y, cb, cr = (np.array(plane) for plane in Image.fromarray(photograph).convert("YCbCr").split())
    cb, cr = subsampled(cb, factors), subsampled(cr, factors)
    boxes = [(0.0, 0.0, 375.0, 500.0), (21.0, 33.0, 203.0, 301.0), (100.0, 101.0, 40.0, 37.0), (7.0, 9.0, 1.0, 1.0)]
    for y_box in boxes:
        c_box = tuple(side / factors[axis % 2] for axis, side in enumerate(y_box))
        planes = [
            reference.resampled(plane, box, (160, 128), interpolation == BICUBIC)
            for plane, box in ((y, y_box), (cb, c_box), (cr, c_box))
        ]
        ours = planes_of(y, cb, cr, y_box, c_box, (160, 128), interpolation)
        assert difference(ours, reference.full_range_rgb(*planes)) <= 1


def test_every_colour_is_converted_as_by_the_standard():
    y, cb, cr = (plane.reshape(512, -1) for plane in np.mgrid[0:256:4, 0:256:4, 0:256:4].astype(np.uint8))
    box = 0.0, 0.0, *map(float, y.shape)
    ours = planes_of(*(np.ascontiguousarray(plane) for plane in (y, cb, cr)), box, box, y.shape, BILINEAR)
    assert difference(ours, reference.full_range_rgb(y, cb, cr)) <= 1


def test_gray_planes_give_equal_channels(photograph):
    y, box = np.ascontiguousarray(photograph[..., 0]), (10.0, 20.0, 300.0, 220.0)
    ours = planes_of(y, NONE, NONE, box, (0.0, 0.0, 0.0, 0.0), (96, 112), BICUBIC)
    expected = reference.resampled(y, box, (96, 112), True)
    np.testing.assert_array_equal(ours, np.repeat(expected[..., None], 3, axis=-1))


@settings(max_examples=50, deadline=None)
@given(cases(max_side=60))
def test_a_flip_mirrors(case):
    plane, box, shape, interpolation = case
    image = np.ascontiguousarray(np.stack([plane, plane[::-1], 255 - plane], axis=-1))
    np.testing.assert_array_equal(
        rgb_of(image, box, shape, interpolation, flip=True), rgb_of(image, box, shape, interpolation)[:, ::-1]
    )
    planes = [np.ascontiguousarray(image[..., channel]) for channel in range(3)]
    np.testing.assert_array_equal(
        planes_of(*planes, box, box, shape, interpolation, flip=True),
        planes_of(*planes, box, box, shape, interpolation)[:, ::-1],
    )


def test_a_small_workspace_is_refused(photograph):
    workspace = np.empty(workspace_bytes(100, 100, 64), np.uint8)
    with pytest.raises(ValueError, match="workspace_bytes"):
        resample_rgb_into(
            photograph, (0.0, 0.0, 375.0, 500.0), False, BILINEAR, workspace, np.empty((64, 64, 3), np.uint8)
        )


def test_rounding_of_a_box_touches_no_further_pixel(photograph):
    rows = np.ascontiguousarray(photograph[:300])
    exact, rounded = (0.0, 20.0, 300.0, 330.0), (-1e-13, 20 - 1e-13, 300 + 1e-12, 330 + 1e-12)
    np.testing.assert_array_equal(rgb_of(rows, rounded, (64, 64), BILINEAR), rgb_of(rows, exact, (64, 64), BILINEAR))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_every_scale_equals_the_twin(interpolation):
    """Each number of weights has code of its own, and so has a scale at which two windows are needed."""
    noise = np.random.default_rng(0).integers(-128, 384, (40, 330)).clip(0, 255).astype(np.uint8)
    for length in (32, 33, 47, 64, 65, 97, 131, 140, 152, 180, 290, 330):
        across = noise[:, :length].copy()
        down = np.ascontiguousarray(across.T)
        for plane, shape in ((across, (33, 65)), (down, (65, 33))):
            box = 0.0, 0.0, *map(float, plane.shape)
            np.testing.assert_array_equal(
                region_of(plane, box, shape, interpolation),
                reference.resampled(plane, box, shape, interpolation == BICUBIC),
            )


def test_a_narrow_plane_in_wide_rows_is_read_within_its_rows(photograph):
    """The last rows and columns of a plane are those of the memory, beyond which a kernel must not read or write."""
    for height, width in ((32, 32), (33, 47), (300, 40), (40, 300)):
        whole = np.full(height * width + 128, 255, np.uint8)
        plane = whole[64:-64].reshape(height, width)
        plane[:] = photograph[:height, :width, 0]
        target = np.full(40 * 50 * 3 + 128, 7, np.uint8)
        out = target[64:-64].reshape(40, 50, 3)
        box = 0.0, 0.0, float(height), float(width)
        for interpolation in FILTERS:
            workspace = workspace_for(box, (40, 50))
            resample_planes_into(plane, NONE, NONE, box, box, False, interpolation, workspace, out)
            assert (target[:64] == 7).all() and (target[-64:] == 7).all()
            np.testing.assert_array_equal(out[..., 0], region_of(plane.copy(), box, (40, 50), interpolation))


def test_colours_are_converted_with_the_numbers_of_libjpeg():
    y, cb, cr = (plane.reshape(-1, 64) for plane in np.mgrid[0:256:5, 0:256, 0:256:4].astype(np.uint8))
    box = 0.0, 0.0, *map(float, y.shape)
    luma, blue, red = (plane.astype(int) for plane in (y, cb - np.uint8(128), cr - np.uint8(128)))
    blue, red = blue.astype(np.int8).astype(int), red.astype(np.int8).astype(int)
    differences = 91881 * red, -22554 * blue - 46802 * red, 116130 * blue
    expected = [np.clip(luma + (difference + (1 << 15) >> 16), 0, 255) for difference in differences]
    np.testing.assert_array_equal(planes_of(y, cb, cr, box, box, y.shape, BILINEAR), np.stack(expected, axis=-1))


def bytes_of_a_process(**environment: str) -> bytes:
    """Resample noise in a process of its own, to sizes with and without code for vectors."""
    script = textwrap.dedent("""
        import sys
        import numpy as np
        from ffcv_ops.operations.resample import *
        noise = np.random.default_rng(0).integers(0, 256, (37, 66, 3), dtype=np.uint8)
        workspace = np.empty(workspace_bytes(37, 66, 36), np.uint8)
        planes = [np.ascontiguousarray(noise[..., channel]) for channel in range(3)]
        box, c_box = (2.0, 3.0, 33.0, 62.0), (1.0, 1.5, 16.5, 33.0)
        for interpolation in (BILINEAR, BICUBIC):
            for shape in ((9, 18), (33, 36)):
                out = np.empty((*shape, 3), np.uint8)
                resample_rgb_into(noise, box, True, interpolation, workspace, out)
                sys.stdout.buffer.write(out.tobytes())
                resample_planes_into(*planes, box, c_box, False, interpolation, workspace, out)
                sys.stdout.buffer.write(out.tobytes())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        check=True,
        stdout=subprocess.PIPE,
    )
    return done.stdout


def test_without_jit_the_bytes_are_the_same():
    compiled = bytes_of_a_process()
    assert len(compiled) > 0
    assert compiled == bytes_of_a_process(NUMBA_DISABLE_JIT="1")


@pytest.mark.soak
def test_for_another_cpu_the_bytes_are_the_same():
    assert bytes_of_a_process() == bytes_of_a_process(NUMBA_CPU_NAME="generic")
