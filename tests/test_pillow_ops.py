"""Every operation against Pillow's, byte by byte."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as tv

from ffcv_ops.operations import pillow_ops
from tests.betons import PHOTOGRAPHS

FILL = np.array([124, 116, 104], dtype=np.uint8)
IMAGES = [PHOTOGRAPHS[0][:224, 100:324], PHOTOGRAPHS[1][150:247, 200:331], PHOTOGRAPHS[1][:40, :33]]
FACTORS = np.r_[0.1, 0.37, 1.0, 1.63, 1.9, 0.0, 1.99, np.random.default_rng(0).uniform(0, 2, 10)]
BITS, THRESHOLDS, ADDENDS = range(1, 9), (0, 77, 127.5, 128, 255, 256), (0, 1, 77, 110, 128)
SLOPES = np.r_[0.0, 0.3, -0.3, 0.99, -0.99, 0.21, np.random.default_rng(1).uniform(-1, 1, 6)]
SHIFTS = np.r_[0.0, 16.0, -16.0, 10.5, 70.3, -33.1, 500.0, -500.0, np.random.default_rng(2).uniform(-100, 100, 6)]
ANGLES = np.r_[0.0, 90.0, -90.0, 30.0, -4.5, 0.01, np.random.default_rng(3).uniform(-135, 135, 8)]

EXACT = {
    pillow_ops.AUTO_CONTRAST: (auto_augment.auto_contrast, None),
    pillow_ops.EQUALIZE: (auto_augment.equalize, None),
    pillow_ops.INVERT: (auto_augment.invert, None),
    pillow_ops.POSTERIZE: (auto_augment.posterize, BITS),
    pillow_ops.SOLARIZE: (auto_augment.solarize, THRESHOLDS),
    pillow_ops.SOLARIZE_ADD: (auto_augment.solarize_add, ADDENDS),
    pillow_ops.COLOR: (auto_augment.color, FACTORS),
    pillow_ops.CONTRAST: (auto_augment.contrast, FACTORS),
    pillow_ops.BRIGHTNESS: (auto_augment.brightness, FACTORS),
    pillow_ops.SHARPNESS: (auto_augment.sharpness, FACTORS),
}
INTERPOLATED = {
    pillow_ops.ROTATE: (auto_augment.rotate, ANGLES),
    pillow_ops.SHEAR_X: (auto_augment.shear_x, SLOPES),
    pillow_ops.SHEAR_Y: (auto_augment.shear_y, SLOPES),
    pillow_ops.TRANSLATE_X: (auto_augment.translate_x_abs, SHIFTS),
    pillow_ops.TRANSLATE_Y: (auto_augment.translate_y_abs, SHIFTS),
}


def applied(image, operation, argument=0.0, cubic=False, fill=FILL):
    changed = np.ascontiguousarray(image).copy()
    scratch = pillow_ops.Scratch(*(part[0] for part in pillow_ops.build_scratch(1, *image.shape[:2])))
    pillow_ops.apply_operation(changed, operation, float(argument), cubic, fill, scratch)
    return changed


@pytest.mark.parametrize("operation", EXACT)
def test_values_are_pillows(operation):
    function, arguments = EXACT[operation]
    for image in IMAGES:
        picture = Image.fromarray(image)
        for argument in [()] if arguments is None else [(a,) for a in arguments]:
            assert np.array_equal(applied(image, operation, *argument), function(picture, *argument)), argument


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("operation", INTERPOLATED)
def test_interpolation_is_pillows(operation, cubic):
    function, arguments = INTERPOLATED[operation]
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    for image in IMAGES:
        picture = Image.fromarray(image)
        for argument in arguments:
            expected = function(picture, float(argument), resample=resample, fillcolor=tuple(FILL.tolist()))
            assert np.array_equal(applied(image, operation, argument, cubic), expected), argument


@pytest.mark.parametrize("degrees", [45.0, -45.0, 135.0, -135.0])
def test_odd_multiples_of_45_degrees(degrees):
    """There the last digit of the rounded sine decides a few bytes."""
    picture = Image.fromarray(IMAGES[0])
    for cubic, resample in enumerate((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)):
        expected = np.asarray(picture.rotate(degrees, resample, fillcolor=tuple(FILL.tolist())), dtype=int)
        difference = np.abs(applied(IMAGES[0], pillow_ops.ROTATE, degrees, bool(cubic)) - expected)
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 30


@pytest.mark.parametrize("operation", [*EXACT, *INTERPOLATED])
def test_flat_and_tiny_images(operation):
    function, arguments = (EXACT | INTERPOLATED)[operation]
    argument = () if arguments is None else (arguments[1],)
    settings = {}
    if operation in INTERPOLATED:
        settings = {"resample": Image.Resampling.BILINEAR, "fillcolor": tuple(FILL.tolist())}
    for image in (
        np.full((9, 7, 3), 255, np.uint8),
        np.full((9, 7, 3), 3, np.uint8),
        *(IMAGES[0][:n, :n] for n in (1, 2, 3)),
    ):
        expected = function(Image.fromarray(np.ascontiguousarray(image)), *argument, **settings)
        assert np.array_equal(applied(image, operation, *argument), expected)


def test_identity_and_no_bits():
    assert np.array_equal(applied(IMAGES[2], pillow_ops.IDENTITY), IMAGES[2])
    assert not applied(IMAGES[2], pillow_ops.POSTERIZE, 0).any()


def test_without_compilation(tmp_path):
    """The interpreter gives the same bytes: nothing depends on how Numba types an expression."""
    image = PHOTOGRAPHS[0][200:212, 300:310]
    for operation, (_, arguments) in (EXACT | INTERPOLATED).items():
        argument = 0.0 if arguments is None else float(arguments[1])
        for cubic in (0, 1):
            np.savez(
                tmp_path / f"{operation}-{cubic}.npz",
                **dict(image=image, operation=operation, argument=argument, cubic=cubic, fill=FILL),
                expected=applied(image, operation, argument, bool(cubic)),
            )
    code = """
import pathlib, sys
import numpy as np
from ffcv_ops.operations import pillow_ops
for path in pathlib.Path(sys.argv[1]).glob("*.npz"):
    case = dict(np.load(path))
    changed = case["image"].copy()
    scratch = pillow_ops.Scratch(*(part[0] for part in pillow_ops.build_scratch(1, *changed.shape[:2])))
    arguments = int(case["operation"]), float(case["argument"]), bool(case["cubic"])
    pillow_ops.apply_operation(changed, *arguments, case["fill"], scratch)
    assert np.array_equal(changed, case["expected"]), path.name
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, timeout=120)


def test_torchvisions_geometry():
    """Its affine calls come to the shifts of the table: the same shear, a translation the other way."""
    image, picture = IMAGES[1], Image.fromarray(IMAGES[1])
    bilinear = tv.InterpolationMode.BILINEAR
    for name, operation, magnitude, argument in [
        ("ShearX", pillow_ops.SHEAR_X, 0.627, 0.627),
        ("ShearY", pillow_ops.SHEAR_Y, -0.231, -0.231),
        ("TranslateX", pillow_ops.TRANSLATE_X, 17.06, -17),
        ("TranslateY", pillow_ops.TRANSLATE_Y, -9.6, 9),
        ("Rotate", pillow_ops.ROTATE, 67.5, 67.5),
        ("Brightness", pillow_ops.BRIGHTNESS, -0.33, 0.67),
    ]:
        expected = autoaugment._apply_op(picture, name, magnitude, bilinear, None)
        assert np.array_equal(applied(image, operation, argument, fill=np.zeros(3, np.uint8)), expected), name
