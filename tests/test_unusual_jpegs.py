"""Sound but unusual JPEGs: as images to write, as payloads of a file, and under --verify and --inspect."""

import base64
import io

import numpy as np
import pytest
from betons import write_images
from jpegs import Kind, encode, encode_lossless
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_ops.beton.describe import describe
from ffcv_ops.beton.verify import verify
from ffcv_ops.codec import jpeg, region
from ffcv_ops.errors import UserError
from ffcv_ops.progress import Progress
from ffcv_ops.sources.image import Change, read_image
from imagenet_training.data.file_sheet import decode_samples
from write_beton import run_verify

PHOTOGRAPH = load_sample_images().images[0][:70, :90]
RGB = list(np.moveaxis(PHOTOGRAPH, 2, 0))
YCBCR = list(np.moveaxis(np.asarray(Image.fromarray(PHOTOGRAPH).convert("YCbCr")), 2, 0))
BLACK = np.full((70, 90), 255, np.uint8)
ONE = (1, 1)
# The factors (h, v) of Y, Cb and Cr.
FACTORS = {
    "4:4:4": (ONE, ONE, ONE),
    "4:2:2": ((2, 1), ONE, ONE),
    "4:4:0": ((1, 2), ONE, ONE),
    "4:2:0": ((2, 2), ONE, ONE),
    "4:1:1": ((4, 1), ONE, ONE),
    "4:4:1": ((1, 4), ONE, ONE),
    "4:1:0": ((4, 2), ONE, ONE),
    "2x4": ((2, 4), ONE, ONE),
    "3x1": ((3, 1), ONE, ONE),
    "3x2": ((3, 2), ONE, ONE),
    "cb wide, cr high": ((2, 2), (2, 1), (1, 2)),
    "cb wide": ((2, 2), (2, 1), ONE),
    "cb full": ((2, 2), (2, 2), ONE),
    "cr high": ((2, 2), ONE, (1, 2)),
    "luma small": (ONE, (2, 2), (2, 2)),
    "all wide": ((2, 1), (2, 1), (2, 1)),
    "all high": ((1, 2), (1, 2), (1, 2)),
}
SOUND = {name: encode(YCBCR, Kind(factors)) for name, factors in FACTORS.items()} | {
    "gray 2x2": encode(YCBCR[:1], Kind(((2, 2),))),
    "gray 3x1": encode(YCBCR[:1], Kind(((3, 1),))),
    "rgb": encode(RGB, Kind((ONE,) * 3, adobe=0)),
    "rgb 4:2:0": encode(RGB, Kind(((2, 2), ONE, ONE), adobe=0)),
    "rgb 4:1:0": encode(RGB, Kind(((4, 2), ONE, ONE), adobe=0)),
    "16-bit tables": encode(YCBCR, Kind(((2, 2), ONE, ONE), wide_tables=True)),
    "restarts": encode(YCBCR, Kind(((2, 2), ONE, ONE), restart=3)),
    "4:1:0 restarts": encode(YCBCR, Kind(((4, 2), ONE, ONE), restart=1)),
}
UNSUPPORTED = {
    "12 bits a sample": [
        encode([plane.astype(int) * 16 for plane in YCBCR], Kind(((2, 2), ONE, ONE), precision=12)),
        encode([YCBCR[0].astype(int) * 16], Kind(precision=12)),
    ],
    "CMYK": [
        encode([*RGB, BLACK], Kind((ONE,) * 4, adobe=0)),
        encode([*YCBCR, BLACK], Kind(((2, 2), ONE, ONE, (2, 2)), adobe=2)),
    ],
    "a lossless or hierarchical process": [encode_lossless([YCBCR[0].astype(int) * 257], 16)],
}
# 24 x 16 px, made with `jpegtran -arithmetic`, and with `-progressive` too.
ARITHMETIC = [
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00RR90|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC0|NsC1OLe"
    "Y5eNVf02l)SA^-vr00R*K|I7di01yxb0T2-d|Jncy0|5X65d#qbKLGy#<V$x=T2MykSHT{!tNHn`LO+g0ek1jiUO6UFLaTBaOs&}yGi+l7lla6MeG5v"
    "V>;C}KQ=Vcj3#Z0^q%lIffdAP",
]


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_jpeg_gives_pillows_pixels(tmp_path, kind):
    data = SOUND[kind]
    assert np.array_equal(jpeg.decode(data), pillow(data)) and jpeg.check(data) == (70, 90)
    (tmp_path / "0.jpg").write_bytes(data.tobytes())
    image, changes = read_image(tmp_path / "0.jpg")
    assert np.array_equal(image, pillow(data)) and changes == Change(0)


@pytest.mark.parametrize("text", ARITHMETIC)
def test_an_arithmetic_jpeg_gives_pillows_pixels(text):
    data = np.frombuffer(base64.b85decode(text), np.uint8)
    assert np.array_equal(jpeg.decode(data), pillow(data)) and jpeg.check(data) == (16, 24)


def decode_region(data, size, eighths=8):
    memory = np.empty(3 * 96 * 96, np.uint8)
    scratch = np.empty(8, np.int64), np.empty(1 << 16, np.uint8), np.empty(0, np.int64)
    found = region.decode_planes_into(data, size, (5, 6, 40, 50), eighths, scratch, memory)
    return found, memory


@pytest.mark.parametrize("kind", SOUND)
def test_a_loader_decodes_it_too(kind):
    """Either to planes, or to the pixels of a full decode."""
    data = SOUND[kind]
    found, memory = decode_region(data, (70, 90))
    assert found.status == region.OK
    if found.v == region.RGB:
        assert np.array_equal(memory[: 70 * 90 * 3].reshape(70, 90, 3), pillow(data))
    else:
        luma = memory[: found.height * found.width].reshape(found.height, found.width)[:70, :90]
        assert np.abs(luma.astype(int) - YCBCR[0]).mean() < 2
    halved, memory = decode_region(data, (70, 90), eighths=4)
    assert halved.status == region.OK and halved.height >= 35
    if found.v == region.RGB:
        assert np.abs(memory[: 35 * 45 * 3].reshape(35, 45, 3).astype(int) - pillow(data)[::2, ::2]).mean() < 15
    assert decode_region(data, (70, 91))[0].status != region.OK


def test_a_jpeg_is_decoded_after_headers_that_were_refused():
    """Unnamed factors, then damage, then a common JPEG, in every order."""
    damaged = SOUND["4:1:0"].copy()
    damaged[4:60] = 0
    kinds = {"4:1:0": region.OK, "4:2:0": region.OK, "cb wide": region.OK, "damaged": region.BAD_JPEG}
    for first in kinds:
        for second in kinds:
            for kind in (first, second):
                found, _ = decode_region(SOUND.get(kind, damaged), (70, 90))
                assert found.status == kinds[kind], (first, second)


def test_cut_jpegs_of_unnamed_factors_are_refused():
    for kind in ("4:1:0", "2x4", "cb wide, cr high"):
        for part in (0.3, 0.6, 0.9):
            data = SOUND[kind][: int(len(SOUND[kind]) * part)].copy()
            assert decode_region(data, (70, 90))[0].status == region.BAD_JPEG
            with pytest.raises(jpeg.JPEGError):
                jpeg.check(data)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_unsupported_jpeg_is_told_from_a_damaged_one(kind):
    for data in UNSUPPORTED[kind]:
        for read in (jpeg.decode, jpeg.check):
            with pytest.raises(jpeg.UnsupportedJPEG, match=f"^a JPEG of {kind}.* may be sound: convert it to a JPEG"):
                read(data)
    if kind == "CMYK":
        with pytest.raises(jpeg.JPEGError, match="Premature end|premature end") as caught:
            jpeg.check(data[: len(data) // 2].copy())
        assert not isinstance(caught.value, jpeg.UnsupportedJPEG)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_source_of_that_kind_is_converted_or_gives_the_reason(tmp_path, kind):
    for data in UNSUPPORTED[kind]:
        (tmp_path / "0.jpg").write_bytes(data.tobytes())
        if kind == "CMYK":
            image, changes = read_image(tmp_path / "0.jpg")
            assert changes == Change.CMYK and np.array_equal(image, pillow(data))
        else:
            with pytest.raises(UserError, match=f"a JPEG of {kind}.*TurboJPEG: Unsupported.*convert it"):
                read_image(tmp_path / "0.jpg")


def test_verify_and_inspect_tell_unsupported_from_damaged(tmp_path, capsys):
    cut = UNSUPPORTED["CMYK"][0]
    sound = [SOUND["4:1:0"], SOUND["cb wide"], SOUND["gray 2x2"]]
    payloads = [*sound, *(data for kind in UNSUPPORTED.values() for data in kind), cut[: len(cut) // 2], sound[0][:99]]
    upcoming = iter(payloads)
    images = [PHOTOGRAPH] * len(payloads)
    path = write_images(tmp_path / "unusual.beton", images, encode=lambda image: next(upcoming))
    report = verify(path, num_workers=1)
    assert set(report.bad) == {8, 9} and set(report.unsupported) == {3, 4, 5, 6, 7} and not report.sound
    assert run_verify(path, 1, None, Progress()) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in errors[:-1]] == ["damaged"] * 2 + ["unsupported"] * 5
    assert "sample 3: a JPEG of 12 bits a sample" in errors[2] and "convert it" in errors[2]
    assert errors[-1] == f"{path}: 2 bad samples, 5 unsupported samples, 0 other problems"
    drawn = decode_samples(describe(path).beton, np.arange(len(payloads)))
    kinds = [getattr(type(image), "__name__", "") for image in drawn]
    assert kinds == ["ndarray"] * 3 + ["UnsupportedJPEG"] * 6 + ["JPEGError"]
