"""RandomResizedCrop and CenterCrop: what they show, how well, and that chance is a function."""

import hashlib
import io
import itertools
import math
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import cv2
import numba as nb
import numpy as np
import pytest
import torch
from ffcv.pipeline.state import State
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.transforms import v2

from ffcv_ops import rng
from ffcv_ops.codec import jpeg, region
from ffcv_ops.operations.base import Batch, SampleError
from ffcv_ops.operations.crops import CenterCrop, RandomResizedCrop, center_crops, draw_crop, draw_crops_into
from ffcv_ops.operations.threads import WorkerPool
from tests import reference

if nb.config.DISABLE_JIT:
    pytest.skip("the kernels that call TurboJPEG exist compiled alone", allow_module_level=True)

PHOTOGRAPHS = load_sample_images().images
FIELD = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
JPG, RAW = 0, 1


def photograph(height, width, which=0):
    image = PHOTOGRAPHS[which % 2]
    side = min(image.shape[0] / height, image.shape[1] / width)
    part = image[: max(int(height * side), 1), : max(int(width * side), 1)]
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)


def stock_jpeg(image):
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].reshape(-1)


class Samples:
    """Samples in memory: what a loader's file is to an operation."""

    def __init__(self, images, encode=jpeg.encode):
        self.payloads = [np.ascontiguousarray(encode(image)).reshape(-1) for image in images]
        self.fields = np.zeros(len(images), FIELD)
        self.fields["mode"] = RAW if encode is np.asarray else JPG
        self.fields["height"] = [image.shape[0] for image in images]
        self.fields["width"] = [image.shape[1] for image in images]
        self.fields["data_ptr"] = np.arange(len(images))

    def locate(self, data_ptrs):
        chosen = [self.payloads[int(pointer)] for pointer in data_ptrs]
        return np.array([p.ctypes.data for p in chosen], np.uint64), np.array([p.size for p in chosen], np.uint64)

    def decode(self, operation, seed=0, epoch=0, num_workers=1, ids=None, copies=None):
        ids = np.arange(len(self.fields)) if ids is None else np.asarray(ids)
        operation.accept_globals(self.fields, None)
        _, allocation = operation.declare_state_and_memory(State(True, torch.device("cpu"), (), np.dtype("u1")))
        out = np.full((len(ids), *allocation.shape), 77, allocation.dtype)
        with WorkerPool(num_workers) as pool:
            return operation.generate_code()(ids, out, self.fields, Batch(seed, epoch, ids, pool, self, copies))

    def boxes(self, operation, seed=0, epoch=0):
        heights, widths = (self.fields[name].astype(np.int64) for name in ("height", "width"))
        boxes, flips = np.empty((len(heights), 4)), np.empty(len(heights), np.bool_)
        drawn = seed, epoch, np.arange(len(heights)), np.zeros(len(heights), np.int64)
        draw_crops_into(drawn, heights, widths, operation.scale, operation.ratio, operation.flip, boxes, flips)
        return boxes, flips


def psnr(images, others):
    error = np.square(images.astype(float) - others).reshape(len(images), -1).mean(axis=1)
    return 10 * np.log10(255**2 / np.maximum(error, 1e-3))


@pytest.fixture
def crop():
    made = []

    def make(kind, *arguments, **options):
        made.append(kind(*arguments, **options))
        return made[-1]

    yield make
    for operation in made:
        operation.close()


# --- boxes


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (40, 400), (3, 2)])
def test_boxes_are_distributed_as_torchvisions(size):
    count = 20_000
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes, flips = np.empty((count, 4)), np.empty(count, np.bool_)
    drawn = 5, 3, np.arange(count), np.zeros(count, np.int64)
    draw_crops_into(drawn, np.full(count, size[0]), np.full(count, size[1]), scale, ratio, 0.5, boxes, flips)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    expected = np.array([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])
    for ours, theirs in [
        (boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3]),
        (boxes[:, 3] / boxes[:, 2], expected[:, 3] / expected[:, 2]),
        (boxes[:, 0], expected[:, 0]),
        (boxes[:, 1], expected[:, 1]),
    ]:
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    assert abs(flips.mean() - 0.5) < 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.1, 0.2), (3, 5), (1, 1)])
def test_boxes_are_those_of_the_obvious_twin_and_within_the_image(ratio):
    generator = np.random.default_rng(0)
    for sample_id in range(300):
        height, width = (int(side) for side in generator.choice([1, 2, 3, 17, 100, 500], 2))
        draw = 9, 1, sample_id, 2
        uniforms = (rng.uniform(*draw, rng.CROP, index) for index in itertools.count())
        expected = reference.random_box(uniforms, height, width, (0.3, 0.9), ratio)
        assert draw_crop(draw, height, width, (0.3, 0.9), ratio) == expected
        assert draw_crop.py_func(draw, height, width, (0.3, 0.9), ratio) == expected
        y, x, h, w = expected
        assert y >= 0 and x >= 0 and h >= 1 and w >= 1 and y + h <= height and x + w <= width


def test_boxes_differ_by_seed_epoch_sample_and_copy_alone():
    draws = {
        draw: draw_crop(draw, 375, 500, (0.08, 1.0), (0.75, 4 / 3)) for draw in itertools.product(range(3), repeat=4)
    }
    assert len(set(draws.values())) == len(draws)


def test_a_centred_region_by_ratio_is_ffcvs():
    boxes = center_crops(np.array([375, 500, 7]), np.array([500, 333, 9]), 224, 0.8, None)
    assert np.array_equal(boxes[0], [37.5, 100, 300, 300])
    assert np.allclose(boxes, [[37.5, 100, 300, 300], [116.8, 33.3, 266.4, 266.4], [0.7, 1.7, 5.6, 5.6]], atol=2e-3)


@pytest.mark.parametrize("size, resize", [(224, 256), (224, 224), (160, 232), (1, 1)])
def test_a_centred_region_by_resize_is_torchvisions(size, resize):
    """Mark every px with its place, let torchvision resize and crop, and compare where the corners came from."""
    sides = np.array([(375, 500), (500, 375), (256, 256), (333, 500), (64, 900), (31, 29)])
    boxes = center_crops(sides[:, 0], sides[:, 1], size, 0.5, resize)
    for (height, width), (y, x, h, w) in zip(sides, boxes, strict=True):
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).double() + 0.5
        resized = v2.Resize(resize, interpolation=v2.InterpolationMode.NEAREST_EXACT)(places)
        expected = v2.CenterCrop(size)(resized)
        step = (torch.arange(size) + 0.5) / size
        assert (expected[0, :, 0] - (y + h * step)).abs().max() <= 0.51
        assert (expected[1, 0] - (x + w * step)).abs().max() <= 0.51
        assert y >= 0 and x >= 0 and y + h <= height and x + w <= width


# --- pixels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("encode, lowest", [(jpeg.encode, 37), (stock_jpeg, 37), (np.asarray, 50)])
@pytest.mark.parametrize("size", [224, 96])
def test_random_crops_look_like_full_decode_crop_and_pillow(crop, interpolation, encode, lowest, size):
    samples = Samples([photograph(375 + i, 500 - 7 * i, i) for i in range(12)], encode)
    operation = crop(RandomResizedCrop, size, interpolation=interpolation)
    images = samples.decode(operation, seed=4)
    boxes, flips = samples.boxes(operation, seed=4)
    assert 0 < flips.sum() < len(flips)
    sources = [
        photograph(375 + i, 500 - 7 * i, i) if encode is np.asarray else jpeg.decode(p)
        for i, p in enumerate(samples.payloads)
    ]
    expected = [
        reference.resized_crop(image, box, size, flip, interpolation)
        for image, box, flip in zip(sources, boxes, flips, strict=True)
    ]
    quality = psnr(images, np.stack(expected))
    scaled = (boxes[:, 2:].min(axis=1) >= 2 * size) & (encode is not np.asarray)
    assert quality[~scaled].mean() >= lowest
    assert size == 224 or not scaled.any() or quality[scaled].mean() >= 35


@pytest.mark.parametrize("size", [224, 64])
def test_a_region_gives_the_same_bytes_as_a_full_decode(crop, size):
    """The stock writer's JPEG of an image has the same coefficients, and no index."""
    images = [
        photograph(int(height), int(width), int(width))
        for height, width in np.random.default_rng(0).integers(1, 400, (60, 2))
    ]
    ours, stock = Samples(images), Samples(images, stock_jpeg)
    operation = crop(RandomResizedCrop, size)
    for epoch in range(3):
        assert np.array_equal(ours.decode(operation, epoch=epoch), stock.decode(operation, epoch=epoch))
    central = crop(CenterCrop, size, resize=size + 9, interpolation="bicubic")
    assert np.array_equal(ours.decode(central), stock.decode(central))


@pytest.mark.parametrize("encode", [jpeg.encode, stock_jpeg])
@pytest.mark.parametrize("size", [160, 64, 20])
def test_both_decoders_give_the_same_bytes(crop, size, encode, monkeypatch):
    """At all scales of the decode: the smallest output of the largest crops is decoded at an eighth."""
    samples = Samples([photograph(300 + 13 * i, 500 - 17 * i, i) for i in range(12)], encode)
    images = {}
    for chosen in region.DECODERS:
        monkeypatch.setenv("FFCV_OPS_DECODER", chosen)
        operation = crop(RandomResizedCrop, size, scale=(0.05, 1.0))
        images[chosen] = [samples.decode(operation, epoch=epoch) for epoch in range(2)]
    np.testing.assert_array_equal(images["own"], images["turbojpeg"])


@pytest.mark.parametrize("sides", [(1, 1), (1, 50), (50, 1), (2, 3), (31, 33)])
@pytest.mark.parametrize("encode", [jpeg.encode, stock_jpeg, np.asarray])
def test_images_smaller_than_the_output(crop, sides, encode):
    samples = Samples([np.full((*sides, 3), (200, 100, 50), np.uint8)] * 5, encode)
    for operation in (crop(RandomResizedCrop, 64), crop(CenterCrop, 64), crop(CenterCrop, 64, resize=70)):
        difference = np.abs(samples.decode(operation).astype(int) - (200, 100, 50))
        assert difference.max() <= 2


def test_gray_other_samplings_and_progressive_jpegs(crop):
    image = photograph(200, 260)
    options = [
        (image[:, :, 1], {}),
        (image, {"subsampling": "4:4:4"}),
        (image, {"subsampling": "4:2:2"}),
        (image, {"progressive": True}),
        (image, {"keep_rgb": True}),
    ]

    def encode(pair):
        stream = io.BytesIO()
        Image.fromarray(pair[0]).save(stream, "jpeg", quality=95, **pair[1])
        return np.frombuffer(stream.getvalue(), np.uint8)

    samples = Samples([image] * len(options))
    samples.payloads = [encode(option) for option in options]
    for size in (80, 180):
        images = samples.decode(crop(CenterCrop, size, ratio=1.0))
        expected = [
            reference.resized_crop(jpeg.decode(p), (0, 30, 200, 200), size, False, "bilinear") for p in samples.payloads
        ]
        assert psnr(images, np.stack(expected)).min() > 33


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_center_crop_is_torchvisions_resize_and_crop(crop, interpolation):
    images = [photograph(375, 500), photograph(500, 375, 1), photograph(300, 300)]
    samples = Samples(images)
    mode = v2.InterpolationMode[interpolation.upper()]
    torchvision = v2.Compose([v2.Resize(256, interpolation=mode, antialias=True), v2.CenterCrop(224)])
    expected = [torchvision(Image.fromarray(jpeg.decode(payload))) for payload in samples.payloads]
    for operation in (
        crop(CenterCrop, 224, interpolation=interpolation),
        crop(CenterCrop, 224, resize=256, interpolation=interpolation),
    ):
        quality = psnr(samples.decode(operation), np.stack([np.asarray(image) for image in expected]))
        # By ratio the longer side's corner is not rounded: up to half a px of the output.
        assert quality.min() > (35 if operation.resize else 25)


# --- functions of (seed, epoch, sample id, copy)


def test_the_same_bytes_for_any_number_of_workers_and_any_batch(crop):
    samples = Samples([photograph(100 + i, 140, i) for i in range(17)])
    expected = samples.decode(crop(RandomResizedCrop, 48), seed=3, epoch=2)
    for num_workers in (2, 4):
        assert np.array_equal(samples.decode(crop(RandomResizedCrop, 48), 3, 2, num_workers), expected)
    some = [5, 16, 0]
    operation = crop(RandomResizedCrop, 48)
    assert np.array_equal(samples.decode(operation, 3, 2, ids=some), expected[some])
    assert not np.array_equal(samples.decode(operation, 3, 1), expected)
    assert not np.array_equal(samples.decode(operation, 2, 2), expected)
    copies = samples.decode(operation, 3, 2, ids=[5, 5], copies=[0, 1])
    assert np.array_equal(copies[0], expected[5]) and not np.array_equal(copies[1], expected[5])


def test_the_size_changes_between_epochs_without_recompiling(crop):
    samples = Samples([photograph(100, 140)])
    operation = crop(RandomResizedCrop, 32)
    samples.decode(operation)
    from ffcv_ops.operations.crops import _crop_samples

    compiled = len(_crop_samples.signatures)
    for size in (64, 33, 160):
        operation.size = size
        assert samples.decode(operation, epoch=size).shape == (1, size, size, 3)
    assert len(_crop_samples.signatures) == compiled


def test_scratch_is_allocated_once(crop):
    samples = Samples([photograph(100, 140)] * 4)
    operation = crop(RandomResizedCrop, 32)
    samples.decode(operation)
    before = operation._scratch.arrays
    samples.decode(operation, epoch=1)
    assert all(a is b for a, b in zip(before, operation._scratch.arrays, strict=True))
    Samples([photograph(300, 400)]).decode(operation)
    assert operation._scratch.arrays[1] is not before[1]
    assert operation._scratch.arrays[2] is before[2], "the decoders keep their Huffman tables"


# --- failures


def test_failures_name_sample_and_reason_and_spare_the_others(crop):
    samples = Samples([photograph(100, 140, i) for i in range(8)])
    operation = crop(RandomResizedCrop, 48)
    samples.decode(operation)
    samples.payloads[2] = samples.payloads[2].copy()
    samples.payloads[2][400:] = 0
    samples.payloads[5] = np.full(300, 9, np.uint8)
    samples.fields["width"][6] = 141
    samples.fields["mode"][7] = 4
    with pytest.raises(SampleError) as caught:
        samples.decode(operation, num_workers=2)
    failures = dict(caught.value.failures)
    assert sorted(failures) == [2, 5, 6, 7]
    assert failures[2].startswith("TurboJPEG: ")
    assert failures[5] == "TurboJPEG: Not a JPEG file: starts with 0x09 0x09"
    assert failures[6] == "the JPEG has 140x100 px, the file's table says 141x100"
    assert "mode" in failures[7]
    raw = Samples([photograph(100, 140)], np.asarray)
    raw.payloads[0] = raw.payloads[0][:-1]
    with pytest.raises(SampleError, match="41999 bytes are too few for 140x100 px"):
        raw.decode(operation)


def test_the_reason_costs_no_memory_for_what_a_damaged_header_claims(crop):
    samples = Samples([photograph(100, 140)], stock_jpeg)
    payload = samples.payloads[0] = samples.payloads[0].copy()
    at = int(np.flatnonzero((payload[:-1] == 0xFF) & (payload[1:] == 0xC0))[0])
    payload[at + 5 : at + 9] = list((12_000).to_bytes(2, "big") * 2)
    tracemalloc.start()
    try:
        with pytest.raises(SampleError, match="sample 0: TurboJPEG: "):
            samples.decode(crop(RandomResizedCrop, 48))
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomResizedCrop(0), "size is 0"),
        (lambda: RandomResizedCrop(22.5), "size is 22.5"),
        (lambda: RandomResizedCrop(scale=(0, 1)), "scale is"),
        (lambda: RandomResizedCrop(scale=(0.5, 1.5)), "at most 1"),
        (lambda: RandomResizedCrop(ratio=(2, 1)), "ratio is"),
        (lambda: RandomResizedCrop(flip=1.5), "probability"),
        (lambda: RandomResizedCrop(interpolation="area"), "bilinear, bicubic"),
        (lambda: CenterCrop(ratio=0), "ratio is 0"),
        (lambda: CenterCrop(224, resize=200), "resize is 200"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- compiled code


@pytest.mark.soak
def test_a_second_process_loads_the_kernel_from_disk_wherever_the_library_lies(crop, tmp_path):
    """The cache holds TurboJPEG's functions by name: another copy of the library serves as well."""
    code = textwrap.dedent("""
        import hashlib
        from tests.test_crops import Samples, photograph, RandomResizedCrop
        from ffcv_ops.operations import crops
        images = Samples([photograph(100, 140)]).decode(RandomResizedCrop(48))
        stats = crops._crop_samples.stats
        print(hashlib.sha256(images).hexdigest(), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
    """)
    library = tmp_path / "libturbojpeg-elsewhere.so"
    loaded = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "turbojpeg" in line)
    library.write_bytes(Path(loaded).read_bytes())
    samples = Samples([photograph(100, 140)])
    expected = hashlib.sha256(samples.decode(crop(RandomResizedCrop, 48))).hexdigest()
    environment = {**os.environ, "TURBOJPEG": str(library)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    assert result.stdout.split() == [expected, "1", "0"]
