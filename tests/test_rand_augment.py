import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode
from torchvision.transforms import TrivialAugmentWide as TorchvisionTrivial

from ffcv_ops.operations import pillow_ops, rand_augment
from ffcv_ops.operations.rand_augment import RandAugment, TrivialAugmentWide, read_rand_augment
from tests.image_operations import SIZE, augmented, batch_of, images

RSB = "rand-m7-mstd0.5-inc1"

# in the order of timm's lists
TIMM_OPERATIONS = list(rand_augment._RAND_TABLE)
TIMM_FUNCTIONS = {
    pillow_ops.AUTO_CONTRAST: auto_augment.auto_contrast,
    pillow_ops.EQUALIZE: auto_augment.equalize,
    pillow_ops.INVERT: auto_augment.invert,
    pillow_ops.ROTATE: auto_augment.rotate,
    pillow_ops.POSTERIZE: auto_augment.posterize,
    pillow_ops.SOLARIZE: auto_augment.solarize,
    pillow_ops.SOLARIZE_ADD: auto_augment.solarize_add,
    pillow_ops.COLOR: auto_augment.color,
    pillow_ops.CONTRAST: auto_augment.contrast,
    pillow_ops.BRIGHTNESS: auto_augment.brightness,
    pillow_ops.SHARPNESS: auto_augment.sharpness,
    pillow_ops.SHEAR_X: auto_augment.shear_x,
    pillow_ops.SHEAR_Y: auto_augment.shear_y,
    pillow_ops.TRANSLATE_X: auto_augment.translate_x_abs,
    pillow_ops.TRANSLATE_Y: auto_augment.translate_y_abs,
}


# --- the string


@pytest.mark.parametrize(
    "text, expected",
    [
        (RSB, dict(magnitude=7, magnitude_std=0.5, increasing=True)),
        ("rand-m9-n3-p0.7-mmax12-w0", dict(magnitude=9, num_layers=3, prob=0.7, magnitude_max=12, weights="w0")),
        ("rand-mstd101-tweights-inc0", dict(magnitude_std=101.0, weights="tweights")),
        ("rand", {}),
    ],
)
def test_reads_timms_strings(text, expected):
    assert read_rand_augment(text) == rand_augment.RandAugmentSettings(**expected)


@pytest.mark.parametrize(
    "text, named",
    [
        ("augmix-m5", "rand-m7"),
        ("rand-m7-mstdd0.5", "mstdd0.5"),
        ("rand-m7.5", "m7.5"),
        ("rand-q3", "q3"),
        ("rand-m", "'m'"),
        ("rand--m7", "''"),
        ("rand-m7-m8", "magnitude twice"),
        ("rand-inc2", "inc"),
        ("rand-p1.5", "p must"),
        ("rand-n0", "n at least"),
        ("rand-n14-w0", "w0"),
        ("rand-t3a", "t3a"),
    ],
)
def test_refuses_other_strings(text, named):
    with pytest.raises(ValueError, match=named):
        RandAugment(text)


# --- what is drawn


@pytest.mark.parametrize("increasing", [False, True])
def test_arguments_are_timms(increasing):
    """Every operation at magnitudes 0 to 10 and both signs, against the functions timm applies with theirs."""
    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    picture = Image.fromarray(images(1)[0])
    hparams = dict(img_mean=(0, 0, 0), interpolation=Image.Resampling.BILINEAR)
    for operation, name in zip(TIMM_OPERATIONS, names, strict=True):
        for level in (0, 2.9, 7, 9.99, 10):
            if "Posterize" in name and (level == 10 if increasing else level < 2.5):
                continue  # 0 bits, which Pillow refuses
            expected = {}
            for seed in range(4):  # timm draws the sign
                random.seed(seed)
                timms = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
                expected[np.asarray(timms(picture)).tobytes()] = None
            ours = set()
            for sign in (-1.0, 1.0):
                levels = rand_augment._RAND_TABLE[operation][increasing]
                argument = levels(np.array([level / 10.0]), np.array([sign]), SIZE)[0]
                changed = images(1)
                scratch = pillow_ops.Scratch(*(part[0] for part in pillow_ops.build_scratch(1, *SIZE)))
                pillow_ops.apply_operation(changed[0], operation, argument, False, np.zeros(3, np.uint8), scratch)
                ours.add(changed[0].tobytes())
            assert ours == set(expected), (name, level)


def test_draws_have_timms_distribution():
    count = 30_000
    drawn = RandAugment(RSB).draw(batch_of(count), SIZE)
    assert drawn.operations.shape == drawn.arguments.shape == drawn.cubic.shape == (count, 2)
    kinds, counts = np.unique(drawn.operations, return_counts=True)
    assert kinds.tolist() == [pillow_ops.IDENTITY, *TIMM_OPERATIONS]
    assert stats.chisquare(counts, 2 * count * np.r_[0.5, np.full(15, 1 / 30)]).pvalue > 1e-3
    assert stats.binomtest(int(drawn.cubic.sum()), 2 * count).pvalue > 1e-3
    both = (drawn.operations > 0).all(axis=1)
    assert stats.binomtest(int(both.sum()), count, 0.25).pvalue > 1e-3

    degrees = drawn.arguments[drawn.operations == pillow_ops.ROTATE]
    assert stats.binomtest(int((degrees > 0).sum()), len(degrees)).pvalue > 1e-3
    assert stats.kstest(np.abs(degrees) / 3.0, stats.norm(7, 0.5).cdf).pvalue > 1e-3


def test_fixed_and_uniform_magnitudes():
    fixed = RandAugment("rand-m7-p1-n4").draw(batch_of(500), SIZE)
    assert fixed.operations.shape == (500, 4) and (fixed.operations > 0).all()
    assert set(fixed.arguments[fixed.operations == pillow_ops.COLOR]) == {0.7 * 1.8 + 0.1}
    assert set(np.abs(fixed.arguments[fixed.operations == pillow_ops.TRANSLATE_X])) == {0.7 * 0.45 * SIZE[1]}
    many = RandAugment("rand-m7-p1-n17").draw(batch_of(5), SIZE)  # more than there are operations
    assert many.operations.shape == (5, 17) and (many.operations > 0).all()
    spread = RandAugment("rand-m8-p1-mstd101").draw(batch_of(20_000), SIZE)
    degrees = np.abs(spread.arguments[spread.operations == pillow_ops.ROTATE])
    assert stats.kstest(degrees, stats.uniform(0, 24).cdf).pvalue > 1e-3
    bounded = RandAugment("rand-m10-p1-mstd3-mmax12").draw(batch_of(5000), SIZE)
    assert np.abs(bounded.arguments[bounded.operations == pillow_ops.ROTATE]).max() == 36.0


@pytest.mark.parametrize("weights", ["w0", "tweights"])
def test_weighted_operations_come_once(weights):
    count = 30_000
    drawn = RandAugment(f"rand-n2-p1-{weights}").draw(batch_of(count), SIZE)
    assert (drawn.operations[:, 0] != drawn.operations[:, 1]).all()
    expected = np.array(rand_augment._WEIGHTS[weights])
    if weights == "tweights":
        assert (
            dict(zip(auto_augment._RAND_INCREASING_TRANSFORMS, expected, strict=True)) == auto_augment._RAND_WEIGHTED_0
        )
    expected = expected / expected.sum() * count
    first = np.array([(drawn.operations[:, 0] == operation).sum() for operation in TIMM_OPERATIONS])
    assert (first[expected == 0] == 0).all()
    assert stats.chisquare(first[expected > 0], expected[expected > 0]).pvalue > 1e-3


# --- what is made of it


def test_policy_is_pillows_operations_in_order():
    policy, source, batch = RandAugment("rand-m7-mstd0.5-inc1-p1"), images(60), batch_of(60)
    drawn = policy.draw(batch, SIZE)
    expected = []
    for image, operations, arguments, cubic in zip(source, drawn.operations, drawn.arguments, drawn.cubic, strict=True):
        picture = Image.fromarray(image)
        for operation, argument, is_cubic in zip(operations, arguments, cubic, strict=True):
            whole = operation in (pillow_ops.POSTERIZE, pillow_ops.SOLARIZE_ADD)
            unused = operation in (pillow_ops.AUTO_CONTRAST, pillow_ops.EQUALIZE, pillow_ops.INVERT)
            given = () if unused else (int(argument) if whole else float(argument),)
            resample = Image.Resampling.BICUBIC if is_cubic else Image.Resampling.BILINEAR
            picture = TIMM_FUNCTIONS[operation](
                picture, *given, resample=resample, fillcolor=rand_augment.IMAGENET_MEAN
            )
        expected.append(np.asarray(picture))
    assert np.array_equal(augmented(policy, source, batch), expected)


def test_trivial_augment_is_torchvisions(monkeypatch):
    """torchvision given the same row, magnitude and sign, for every row and some magnitudes."""
    torchvisions = TorchvisionTrivial(interpolation=InterpolationMode.BILINEAR)
    source = images(1)[0]
    scratch = pillow_ops.Scratch(*(part[0] for part in pillow_ops.build_scratch(1, *SIZE)))
    for row, operation in enumerate(rand_augment._TRIVIAL_OPERATIONS):
        for magnitude in (0, 1, 7, 15, 23, 30):
            for sign in (0, 1):
                answers = {14: row, 31: magnitude, 2: 1 - sign}
                monkeypatch.setattr(torch, "randint", lambda high, *_, a=answers, **__: torch.tensor(a[high]))
                expected = np.asarray(torchvisions(Image.fromarray(source)), dtype=int)
                changed = source.copy()
                argument = rand_augment._TRIVIAL_ARGUMENTS[row, sign, magnitude]
                pillow_ops.apply_operation(changed, operation, argument, False, np.zeros(3, np.uint8), scratch)
                # 4.5 degrees a step: the odd multiples of 45 differ by 1 in a few bytes
                assert np.abs(changed - expected).max() <= int(operation == pillow_ops.ROTATE and magnitude in (10, 30))


def test_trivial_augment_draws_evenly():
    drawn = TrivialAugmentWide().draw(batch_of(30_000), SIZE)
    assert drawn.operations.shape == (30_000, 1) and not drawn.cubic.any()
    kinds, counts = np.unique(drawn.operations, return_counts=True)
    assert len(kinds) == 14 and stats.chisquare(counts).pvalue > 1e-3
    steps, counts = np.unique(drawn.arguments[drawn.operations == pillow_ops.ROTATE], return_counts=True)
    assert len(steps) == 61 and stats.chisquare(np.delete(counts, 30)).pvalue > 1e-3
