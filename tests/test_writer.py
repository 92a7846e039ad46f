"""Writing a folder: stock FFCV reads it, the same bytes always, and what happens when something goes wrong."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import wait
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.fields.rgb_image import RGBImageField, resizer
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader

from ffcv_ops import lock
from ffcv_ops.beton.layout import manifest_path
from ffcv_ops.beton.reading import read_beton
from ffcv_ops.beton.verify import verify
from ffcv_ops.codec import jpeg
from ffcv_ops.codec.jpeg import decode
from ffcv_ops.errors import UserError
from ffcv_ops.sources import folder as folders
from ffcv_ops.sources.image import load_image
from ffcv_ops.sources.source import PackedKeys, SourceChanged
from ffcv_ops.writing import encode, partial_file, writer
from ffcv_ops.writing.encode import shrink
from ffcv_ops.writing.plan import BadImage, WriteSettings, build_plan
from ffcv_ops.writing.writer import WriteError, write

PAGE_SIZE = 1 << 21
PHOTOGRAPHS = load_sample_images().images


def photograph(number, height, width):
    """A crop of a photograph, another one for every number."""
    image = PHOTOGRAPHS[number % 2]
    y, x = (37 * number) % (image.shape[0] - height + 1), (53 * number) % (image.shape[1] - width + 1)
    return Image.fromarray(image[y : y + height, x : x + width])


@pytest.fixture
def folder(tmp_path):
    """Thirty photographs in three classes, some in a subfolder, some longer than 100 px."""
    for number in range(30):
        name = f"{number % 3}_class/{'deep/' if number % 5 == 0 else ''}{number:02d}.{'jpeg' if number % 2 else 'JPG'}"
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, 60 + 3 * number, 150 - 4 * number).save(path, quality=92)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Images for half a dozen pages when they are stored raw."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(60):
        path = folder / f"class_{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        photograph(number, 300, 250 + number).save(path)
    return folder


def quiet(source, target, settings=None, **options):
    return write(source, target, settings, notice=lambda line: None, **{"num_workers": 1} | options)


def leftovers(target):
    return sorted(path.name for path in target.parent.glob("*") if path.name.startswith(target.name))


def sources(folder, settings=None):
    """The images' paths in storage order."""
    return [str(folder / path) for path in _plan_paths(folder, settings or WriteSettings())]


def _plan_paths(folder, settings):
    plan = build_plan(folders.scan(folder), settings)
    return [plan.key(position) for position in range(plan.num_images)]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_a_folder_is_read_as_torchvision_reads_it(folder):
    (folder / "0_class" / "notes.txt").write_text("no image")
    (folder / "LICENSE").write_text("no class")
    found, theirs = folders.scan(folder), ImageFolder(str(folder))
    assert found.classes == theirs.classes
    assert [(str(folder / path), label) for path, label in zip(found.keys, found.labels, strict=True)] == theirs.samples
    assert folders.EXTENSIONS == IMG_EXTENSIONS
    assert found.places[:, 0].tolist() == [os.path.getsize(path) for path, _ in theirs.samples]


def test_packed_paths_are_a_sequence_of_text():
    names = ["a/0.jpg", "a/deep/1.jpg", os.fsdecode(b"b/caf\xe9.jpg"), "c/\u00e9.jpg"]
    paths = PackedKeys()
    for part in (names[:2], [], names[2:]):
        paths.extend(b"".join(os.fsencode(name) + b"\0" for name in part))
    assert list(paths) == names and len(paths) == 4
    assert paths[-1] == names[3] and paths[1:3] == names[1:3] and paths[np.uint32(2)] == names[2]
    assert paths.encoded(2) == b"b/caf\xe9.jpg"
    with pytest.raises(IndexError):
        paths[4]


def test_a_listing_takes_little_more_memory_than_its_names(tmp_path, monkeypatch):
    """ImageNet has 1,281,167 images: a byte for each is 1.2 MiB."""
    count = 50_000
    (tmp_path / "n01440764").mkdir()
    names = [f"n01440764_{number:05d}.JPEG" for number in range(count)]
    monkeypatch.setattr(folders, "_walk", lambda *args: [(str(tmp_path / "n01440764"), (0, 1), names)])
    monkeypatch.setattr(folders, "stat_image", lambda path: (100_000 + len(path), 1_700_000_000_000_000_000))
    tracemalloc.start()
    try:
        listing = folders.scan(tmp_path)
        size_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert listing.keys[count - 1] == "n01440764/n01440764_49999.JPEG" and listing.places.shape == (count, 2)
    name_bytes = len("n01440764/n01440764_00000.JPEG") + 1
    assert size_bytes / count < 1.25 * (name_bytes + listing.places[0].nbytes + 8 + 4)


@pytest.mark.parametrize("broken", ["missing", "empty", "class"])
def test_a_folder_without_images_is_named(tmp_path, broken):
    if broken != "missing":
        (tmp_path / "empty").mkdir()
    if broken == "class":
        (tmp_path / "class" / "cat").mkdir(parents=True)
    messages = {"missing": "no such folder", "empty": "no class folders", "class": "cat: class folder without an image"}
    with pytest.raises(UserError, match=messages[broken]):
        quiet(tmp_path / broken, tmp_path / "file.beton")


def test_a_folder_that_cannot_be_read_is_named(folder, tmp_path, monkeypatch):
    """Though its class has images elsewhere."""
    scandir = os.scandir

    def fail_for_one(path):
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail_for_one)
    with pytest.raises(UserError, match=r"_class/deep: cannot be read \(Permission denied\)"):
        quiet(folder, tmp_path / "file.beton")


def images_as_imagenet_has_them():
    """File contents by kind: what ImageNet's folders hold under the name of JPEG, and some more."""
    image = photograph(7, 121, 95)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, for who applies it
    kinds = {
        "baseline": ("JPEG", image, {"quality": 95}),
        "progressive": ("JPEG", image, {"progressive": True}),
        "full_chroma": ("JPEG", image, {"subsampling": 0}),
        "grayscale": ("JPEG", image.convert("L"), {}),
        "cmyk": ("JPEG", image.convert("CMYK"), {}),
        "exif": ("JPEG", image, {"exif": exif}),
        "png": ("PNG", image, {}),
        "palette": ("PNG", image.convert("P"), {}),
        "alpha": ("PNG", image.convert("RGBA"), {}),
        "gray_alpha": ("PNG", image.convert("LA"), {}),
        "bmp": ("BMP", image, {}),
        "webp": ("WEBP", image, {}),
        "tiff": ("TIFF", image, {}),
    }
    for name, (kind, pixels, options) in kinds.items():
        content = BytesIO()
        pixels.save(content, kind, **options)
        yield pytest.param(content.getvalue(), id=name)


@pytest.mark.parametrize("content", list(images_as_imagenet_has_them()))
def test_the_pixels_are_those_of_torchvisions_loader(tmp_path, content):
    path = tmp_path / "n01.JPEG"
    path.write_bytes(content)
    image = load_image(path)
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.asarray(pil_loader(str(path))))


def test_a_jpeg_with_a_warning_is_pillows_to_judge(tmp_path):
    """Stray bytes between segments: TurboJPEG warns, Pillow decodes, so the image counts."""
    content = BytesIO()
    photograph(1, 64, 64).save(content, "JPEG")
    path = tmp_path / "stray.jpg"
    path.write_bytes(content.getvalue()[:-2] + bytes(7) + b"\xff\xd9")
    with pytest.raises(ValueError, match="extraneous"):
        decode(np.frombuffer(path.read_bytes(), np.uint8))
    assert np.array_equal(load_image(path), np.asarray(pil_loader(str(path))))


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_stock_ffcv_reads_the_file(folder, tmp_path):
    """Count, labels, sizes and pixels, by ffcv's own reader and fields."""
    target = tmp_path / "file.beton"
    settings = WriteSettings(max_side=100, page_size=PAGE_SIZE)
    manifest = quiet(folder, target, settings, num_workers=2)
    stock, ours = Reader(str(target)), read_beton(target)
    assert list(stock.handlers) == ["image", "label"]
    assert isinstance(stock.handlers["image"], RGBImageField)
    labels = dict(ImageFolder(str(folder)).samples)
    paths = sources(folder)
    assert stock.metadata["f1"].tolist() == [labels[path] for path in paths] == ours.labels.tolist()
    content = np.fromfile(target, np.uint8)
    for path, row, value in zip(paths, stock.metadata["f0"], stock.alloc_table, strict=True):
        image = resizer(np.asarray(pil_loader(path)), 100)
        assert (row["height"], row["width"]) == image.shape[:2]
        stored = decode(content[int(value["ptr"]) :][: int(value["size"])])
        as_stock = cv2.imdecode(
            cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1], cv2.IMREAD_COLOR
        )
        assert np.array_equal(stored, as_stock[:, :, ::-1])
    assert manifest["num_samples"] == 30
    assert manifest["class_counts"] == [10, 10, 10]
    assert json.loads(manifest_path(target).read_text()) == manifest == ours.manifest
    assert leftovers(target) == ["file.beton", "file.beton.json"]


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_stock_loader_gives_the_pixels(tmp_path, mode, monkeypatch):
    # Compiled, its operations are noisy when they are collected.
    monkeypatch.setattr(Compiler, "is_enabled", False)
    for number in range(12):
        path = tmp_path / "data" / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, 48, 64).save(path)
    target = tmp_path / "file.beton"
    quiet(tmp_path / "data", target, WriteSettings(mode=mode))
    found = read_beton(target)
    content = np.fromfile(target, np.uint8)
    stored = [content[int(value["ptr"]) :][: int(value["size"])] for value in found.alloc_table]
    pixels = [decode(value) if mode == "jpg" else value.reshape(48, 64, 3) for value in stored]
    if mode == "raw":
        assert all(map(np.array_equal, pixels, map(pil_loader, sources(tmp_path / "data"))))
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    for os_cache in (True, False):
        loader = Loader(
            str(target),
            batch_size=12,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=os_cache,
            pipelines=pipelines,
        )
        ((images, labels),) = loader
        assert labels.ravel().tolist() == found.labels.tolist()
        # ffcv decodes with the fast DCT, which is off by a few levels.
        difference = np.abs(np.asarray(images).astype(int) - np.stack(pixels))
        assert difference.max() <= (0 if mode == "raw" else 8)


def test_the_bytes_depend_on_images_and_settings_alone(many, tmp_path):
    settings = WriteSettings(mode="proportion", page_size=PAGE_SIZE)
    digests = set()
    for workers in (1, 4):
        manifest = quiet(many, tmp_path / "file.beton", settings, num_workers=workers, overwrite=True)
        digests.add((manifest["digest"], hashlib.sha256((tmp_path / "file.beton").read_bytes()).hexdigest()))
    assert len(digests) == 1
    other = quiet(many, tmp_path / "other.beton", WriteSettings("proportion", page_size=PAGE_SIZE, seed=1))
    assert other["digest"] != manifest["digest"]


def test_modes_are_those_of_ffcv(many, tmp_path):
    def raw(settings):
        quiet(many, tmp_path / "file.beton", settings, num_workers=2, overwrite=True)
        found = read_beton(tmp_path / "file.beton").metadata["f0"]
        return dict(zip(_plan_paths(many, settings), found["mode"].tolist(), strict=True)), found

    share, _ = raw(WriteSettings("proportion", raw_share=0.3, subset=40))
    assert 3 < sum(share.values()) < 21
    # The draw is the image's own: whichever others are written.
    whole = build_plan(folders.scan(many), WriteSettings("proportion", raw_share=0.3))
    drawn = dict(zip(map(whole.key, range(60)), whole.raw.tolist(), strict=True))
    assert all(drawn[path] == mode for path, mode in share.items())
    _, rows = raw(WriteSettings("smart", smart_threshold=300 * 280 * 3, subset=40))
    assert ((rows["mode"] == 0) == (rows["width"].astype(int) > 280)).all()
    assert set(rows["mode"]) == {0, 1}


def test_images_keep_ffcvs_size(tmp_path):
    for height, width in ((333, 500), (501, 499), (100, 3000), (2000, 1), (20, 20)):
        image = np.zeros((height, width, 3), np.uint8)
        if (height, width) == (2000, 1):
            assert shrink(image, 500).shape == (500, 1, 3)
        else:
            assert shrink(image, 500).shape == resizer(image, 500).shape
        assert shrink(image, 0) is image


def test_a_subset_is_spread_over_the_classes(many):
    plan = build_plan(folders.scan(many), WriteSettings(subset=20))
    assert np.bincount(plan.source.labels[plan.order]).tolist() == [5, 5, 5, 5]
    assert len(set(plan.order.tolist())) == 20
    assert sorted(plan.order) != plan.order.tolist()
    assert sorted(build_plan(folders.scan(many), WriteSettings(subset=1000)).order) == list(range(60))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "png"}, "mode must be one of jpg, raw, proportion, smart"),
        ({"mode": "smart"}, "needs smart_threshold"),
        ({"max_side": 70000}, "max_side"),
        ({"quality": 0}, "quality"),
        ({"raw_share": 1.5}, "raw_share"),
        ({"subset": 0}, "subset"),
        ({"seed": -1}, "seed"),
        ({"page_size": 3 << 20}, "power of two"),
        ({"page_size": 1 << 20}, "power of two"),
    ],
)
def test_settings_that_cannot_be_are_named(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        quiet(folder, tmp_path / "file.beton", WriteSettings(**change))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def spoil(path):
    """Cut an image file in half."""
    os.truncate(path, path.stat().st_size // 2)


def test_a_bad_image_stops_the_run_and_leaves_nothing(many, tmp_path):
    shutil.copytree(many, tmp_path / "data")
    bad = Path(sources(tmp_path / "data")[50])
    spoil(bad)
    target = tmp_path / "file.beton"
    with pytest.raises(BadImage, match=f"{bad}: .*truncated.*--on_error=skip"):
        quiet(tmp_path / "data", target, WriteSettings("raw", page_size=PAGE_SIZE), num_workers=2)
    assert leftovers(target) == []


def test_a_bad_image_is_skipped_and_listed(folder, tmp_path):
    paths = sources(folder)
    Path(paths[3]).write_bytes(b"not an image")
    spoil(Path(paths[29]))
    target = tmp_path / "file.beton"
    manifest = quiet(folder, target, on_error="skip", num_workers=2)
    assert manifest["num_samples"] == 28
    assert {str(folder / skipped["image"]) for skipped in manifest["skipped"]} == {paths[3], paths[29]}
    assert "cannot identify" in str(manifest["skipped"]) and "truncated" in str(manifest["skipped"])
    labels = dict(ImageFolder(str(folder)).samples)
    kept = [path for path in paths if path not in (paths[3], paths[29])]
    assert Reader(str(target)).metadata["f1"].tolist() == [labels[path] for path in kept]
    assert verify(target, num_workers=1).sound


def test_nothing_but_bad_images_is_no_file(folder, tmp_path):
    for path in sources(folder):
        spoil(Path(path))
    with pytest.raises(BadImage):
        quiet(folder, tmp_path / "file.beton", on_error="skip")
    assert leftovers(tmp_path / "file.beton") == []


def test_an_image_larger_than_a_page_is_named(tmp_path):
    (tmp_path / "data" / "class").mkdir(parents=True)
    Image.fromarray(np.zeros((900, 900, 3), np.uint8)).save(tmp_path / "data" / "class" / "large.png")
    target = tmp_path / "file.beton"
    with pytest.raises(BadImage, match=r"large.png: 900 x 900 px .* --page_size=4194304"):
        quiet(tmp_path / "data", target, WriteSettings("raw", max_side=0, page_size=PAGE_SIZE))
    assert leftovers(target) == []


def test_an_existing_file_stays_until_the_new_one_is_whole(folder, tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "file.beton"
    quiet(folder, target)
    before = target.read_bytes()
    with pytest.raises(UserError, match="use --overwrite"):
        quiet(folder, target, WriteSettings(quality=50))
    spoil(Path(sources(folder)[7]))
    with pytest.raises(BadImage):
        quiet(folder, target, WriteSettings(quality=50), overwrite=True)
    assert target.read_bytes() == before
    assert read_beton(target).manifest is not None
    with monkeypatch.context() as patched, pytest.raises(WriteError, match="No space left"):
        patched.setattr(partial_file.PartialFile, "finish", no_space)
        quiet(folder, target, WriteSettings(quality=50), overwrite=True, on_error="skip")
    assert target.read_bytes() == before
    assert read_beton(target).manifest is not None
    assert quiet(folder, target, WriteSettings(quality=50), overwrite=True, on_error="skip")["num_samples"] == 29
    assert read_beton(target).num_samples == 29


def test_targets_that_cannot_be_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        quiet(folder, tmp_path)
    with pytest.raises(UserError, match="no such folder to write"):
        quiet(folder, tmp_path / "missing" / "file.beton")


def test_other_classes_than_expected_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="it lacks 3_class; has also 1_class"):
        quiet(folder, tmp_path / "file.beton", classes=["0_class", "2_class", "3_class"])
    assert not (tmp_path / "file.beton").exists()


@pytest.mark.parametrize(
    ("classes", "missing"),
    [
        (["0_class", "1_class", "2_class"], None),
        (["1_class", "2_class", "0_class"], None),
        (["0_class", "0_new", "1_class", "2_class", "3_class"], "2 of the training split's 5 classes: 0_new, 3_class;"),
        (
            [f"{i}_class" for i in range(12)],
            "9 of the training split's 12 classes: 3_class, 4_class, 5_class and 6 more",
        ),
    ],
)
def test_a_folder_is_numbered_as_the_training_split(folder, tmp_path, classes, missing):
    lines = []
    manifest = write(folder, tmp_path / "file.beton", num_workers=1, classes=classes, notice=lines.append)
    told = [line for line in lines if "training split" in line]
    assert [missing in line for line in told] == ([True] if missing else [])
    beton, own = read_beton(tmp_path / "file.beton"), quiet(folder, tmp_path / "own.beton")
    assert beton.classes == classes and beton.num_classes == len(classes)
    theirs = [own["classes"][label] for label in read_beton(tmp_path / "own.beton").labels]
    assert [classes[label] for label in beton.labels] == theirs
    assert (
        dict(zip(own["classes"], own["class_counts"], strict=True)).items()
        <= dict(zip(classes, manifest["class_counts"], strict=True)).items()
    )
    assert verify(tmp_path / "file.beton", num_workers=1).sound


def test_no_space_is_said_before_the_work(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="0.0 MB free, about .* needed"):
        quiet(folder, tmp_path / "file.beton")
    assert leftovers(tmp_path / "file.beton") == []


def stop_after(images):
    """A progress function that interrupts the run, as Ctrl-C does."""

    def progress(done, total):
        if done >= images:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_is_resumed_only_for_the_same_job(many, tmp_path):
    target = tmp_path / "file.beton"
    settings = WriteSettings("raw", page_size=PAGE_SIZE)
    expected = quiet(many, tmp_path / "expected.beton", settings)
    notices = []
    with pytest.raises(KeyboardInterrupt):
        quiet(many, target, settings, progress=stop_after(40))
    assert leftovers(target) == ["file.beton.partial", "file.beton.partial.journal"]
    with pytest.raises(KeyboardInterrupt):
        write(many, target, settings, num_workers=1, notice=notices.append, progress=stop_after(50))
    assert "resuming" in notices[0]
    manifest = quiet(many, target, settings, num_workers=3)
    assert manifest["digest"] == expected["digest"]
    assert target.read_bytes() == (tmp_path / "expected.beton").read_bytes()

    target.unlink()
    with pytest.raises(KeyboardInterrupt):
        quiet(many, target, settings, progress=stop_after(40))
    write(many, target, WriteSettings("raw", page_size=PAGE_SIZE, seed=5), num_workers=1, notice=notices.append)
    assert "starting over" in notices[-2] and "seed changed" in notices[-2]
    assert verify(target, num_workers=1).sound


def test_a_torn_journal_counts_as_far_as_it_is_whole(many, tmp_path):
    target = tmp_path / "file.beton"
    settings = WriteSettings("raw", page_size=PAGE_SIZE)
    expected = quiet(many, tmp_path / "expected.beton", settings)
    with pytest.raises(KeyboardInterrupt):
        quiet(many, target, settings, progress=stop_after(55))
    partial, journal_path = partial_file.partial_paths(target)
    whole = journal_path.read_bytes()
    _, pages, _ = partial_file.read_journal(journal_path)
    assert len(pages) >= 3
    for cut in (len(whole) - 1, len(whole) - 40, len(whole) // 2, 10, 0):
        journal_path.write_bytes(whole[:cut])
        identity, found, valid_bytes = partial_file.read_journal(journal_path)
        assert found == pages[: len(found)] and valid_bytes <= cut
    journal_path.write_bytes(whole[:-40])
    os.truncate(partial, partial.stat().st_size // 2)
    assert quiet(many, target, settings)["digest"] == expected["digest"]


def test_another_encoder_starts_over(many, tmp_path, monkeypatch):
    target, notices = tmp_path / "file.beton", []
    settings = WriteSettings("raw", page_size=PAGE_SIZE)
    with pytest.raises(KeyboardInterrupt):
        quiet(many, target, settings, progress=stop_after(40))
    monkeypatch.setattr(jpeg, "ENCODER", jpeg.ENCODER + 1)
    manifest = write(many, target, settings, num_workers=1, notice=notices.append)
    assert "starting over" in notices[0] and "encoder changed" in notices[0]
    assert manifest["versions"]["encoder"] == str(jpeg.ENCODER)


@pytest.mark.parametrize(("key", "number"), [("format", 2), ("encoder", jpeg.ENCODER + 1)])
def test_a_file_that_a_newer_version_began_is_refused_and_kept(tmp_path, key, number):
    target = tmp_path / "file.beton"
    partial, journal = partial_file.partial_paths(target)
    partial.write_bytes(b"pages")
    journal.write_bytes(partial_file._line({"format": 1, "encoder": 1, key: number}) + partial_file._line({"leaf": 0}))
    with pytest.raises(
        UserError, match=rf"^{partial}: begun by a newer version \({key} {number}; .*delete {partial.name}"
    ):
        quiet(tmp_path / "no images", target)
    assert partial.read_bytes() == b"pages" and journal.exists()


def huffman_sets(path):
    """Return the DHT segments of every JPEG in a file."""
    found, data = read_beton(path), path.read_bytes()
    for row in found.metadata["f0"][found.metadata["f0"]["mode"] == 0]:
        position, segments = int(row["data_ptr"]) + 2, b""
        while data[position + 1] != 0xDA:
            length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            segments += data[position : position + length] * (data[position + 1] == 0xC4)
            position += length
        yield segments


@pytest.mark.parametrize("version", [jpeg.ENCODER, jpeg.ENCODER_OF_OWN_TABLES])
def test_a_half_written_file_is_finished_with_its_encoder(many, tmp_path, monkeypatch, version):
    """JPEGs share a few sets of tables, or each has its own in a file that an earlier version began."""
    settings, target = WriteSettings("proportion", raw_share=0.8, page_size=PAGE_SIZE), tmp_path / "file.beton"
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "ENCODER", version)
        whole = quiet(many, tmp_path / "whole.beton", settings)
        with pytest.raises(KeyboardInterrupt):
            quiet(many, target, settings, progress=stop_after(40))
    notices = []
    manifest = write(many, target, settings, num_workers=1, notice=notices.append)
    assert any(line.startswith("resuming: ") for line in notices)
    assert manifest["digest"] == whole["digest"] and manifest["versions"]["encoder"] == str(version)
    sets = list(huffman_sets(target))
    assert (len(set(sets)) <= 4 < len(sets)) == (version == jpeg.ENCODER)


def test_changed_images_start_over(many, tmp_path):
    shutil.copytree(many, tmp_path / "data")
    target, notices = tmp_path / "file.beton", []
    settings = WriteSettings("raw", page_size=PAGE_SIZE)
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path / "data", target, settings, progress=stop_after(40))
    photograph(99, 300, 250).save(sources(tmp_path / "data")[0])
    write(tmp_path / "data", target, settings, num_workers=1, notice=notices.append)
    assert "starting over" in notices[0] and "images changed" in notices[0]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("change", [spoil, os.remove])
def test_images_that_change_under_way_stop_the_run(many, tmp_path, change, on_error):
    """As do those of which another machine has another version, or none."""
    shutil.copytree(many, tmp_path / "data")
    settings = WriteSettings("raw", page_size=PAGE_SIZE)
    changed = Path(sources(tmp_path / "data", settings)[59])

    def progress(done, total):
        if not done:
            change(changed)

    with pytest.raises(UserError, match=f"{changed}: on .* not the file that was listed"):
        quiet(tmp_path / "data", tmp_path / "file.beton", settings, on_error=on_error, progress=progress)
    assert not (tmp_path / "file.beton").exists()


def test_a_run_killed_before_its_manifest_writes_that_alone(folder, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    target = tmp_path / "file.beton"
    whole = quiet(folder, target)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(writer, "write_manifest", interrupt)
        quiet(folder, target, overwrite=True)
    assert leftovers(target) == ["file.beton", "file.beton.partial.journal"]
    inode = target.stat().st_ino
    manifest = quiet(folder, target)
    assert {**manifest, "written": ""} == {**whole, "written": ""}
    assert target.stat().st_ino == inode
    assert leftovers(target) == ["file.beton", "file.beton.json"]
    with pytest.raises(UserError, match="--overwrite"):
        quiet(folder, target)


def test_two_runs_do_not_write_one_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "GRACE_S", 0.0)
    target = tmp_path / "file.beton"
    path = tmp_path / "file.beton.partial.lock"
    with lock.OwnerLock(path, "", ""):
        with pytest.raises(
            UserError, match=r"file.beton.partial: another process is writing this file: process \d+ on"
        ):
            quiet(folder, target)
        assert leftovers(target) == ["file.beton.partial.lock"]
    assert quiet(folder, target)["num_samples"] == 30
    assert leftovers(target) == ["file.beton", "file.beton.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Checking a file whole


@pytest.fixture(scope="module")
def sound(many, tmp_path_factory):
    target = tmp_path_factory.mktemp("sound") / "file.beton"
    quiet(many, target, WriteSettings(page_size=PAGE_SIZE), num_workers=2)
    return target


@pytest.fixture
def copy(sound, tmp_path):
    for path in (sound, manifest_path(sound)):
        shutil.copy(path, tmp_path)
    return tmp_path / sound.name


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_sound_file_is_sound(sound):
    seen = []
    report = verify(sound, num_workers=2, progress=lambda done, total: seen.append((done, total)))
    assert report.sound
    assert report.digest == report.beton.digest
    assert report.class_counts == {0: 15, 1: 15, 2: 15, 3: 15}
    assert seen[-1] == (60, 60)


def test_damaged_samples_are_listed(copy):
    found = read_beton(copy)
    pointer, size = (found.alloc_table[name].astype(int) for name in ("ptr", "size"))
    overwrite(copy, pointer[7] + size[7] - 200, bytes(200))
    overwrite(copy, pointer[31], b"no JPEG at all")
    overwrite(copy, pointer[44] + size[44] // 2, b"\xff\xd9")
    report = verify(copy, num_workers=2)
    assert not report.sound
    assert set(report.bad) == {7, 31, 44}
    assert any("digest" in problem for problem in report.problems)


def test_a_change_that_decodes_is_found(copy):
    found = read_beton(copy)
    # Another resolution in the JFIF header: every decoder is content.
    position = int(found.alloc_table["ptr"][13]) + 12
    byte = np.fromfile(copy, np.uint8, 1, offset=position)[0]
    overwrite(copy, position, bytes([byte ^ 1]))
    report = verify(copy, num_workers=1)
    assert report.bad == {13: "its bytes are not those that were written"}
    assert "the digest is" in report.problems[0]
    manifest_path(copy).unlink()
    alone = verify(copy, num_workers=1)
    assert alone.sound and alone.digest == report.digest


def test_a_manifest_without_its_checksums_is_refused(copy):
    manifest = json.loads(manifest_path(copy).read_text())
    manifest_path(copy).write_text(json.dumps(manifest | {"checksums": manifest["checksums"][:-8]}))
    with pytest.raises(UserError, match="its checksums are damaged"):
        verify(copy, num_workers=1)


def test_data_where_zeros_should_be_is_reported(copy):
    found = read_beton(copy)
    overwrite(copy, found.metadata_end + 5, b"!")
    overwrite(copy, found.alloc_table_ptr - 5, b"!")
    report = verify(copy, num_workers=1)
    assert report.bad == {}
    assert {"page 0 has data between its values", "there is data between metadata and first page"} == set(
        report.problems
    )


def test_damaged_tables_are_refused(copy):
    overwrite(copy, 40, b"!")
    with pytest.raises(UserError, match="damaged"):
        verify(copy, num_workers=1)


def test_stock_files_are_checked_without_a_digest(tmp_path):
    from ffcv.fields import IntField, JSONField
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return np.asarray(photograph(index, 50, 60)), index % 3, {"id": int(index)}

    path = tmp_path / "stock.beton"
    fields = {"image": RGBImageField("jpg"), "label": IntField(), "json": JSONField()}
    DatasetWriter(str(path), fields, num_workers=1, page_size=PAGE_SIZE).from_indexed_dataset(Samples())
    report = verify(path, num_workers=1)
    assert report.sound
    assert report.class_counts == {0: 4, 1: 4, 2: 4}
    overwrite(path, int(Reader(str(path)).metadata["f0"]["data_ptr"][4]), bytes(30))
    assert set(verify(path, num_workers=1).bad) == {4}


def test_a_worker_reads_the_images_of_a_task_while_it_encodes_the_one_before(many, tmp_path):
    shutil.copytree(many, tmp_path / "data")
    plan = build_plan(folders.scan(tmp_path / "data"), WriteSettings("raw", page_size=PAGE_SIZE))
    job = encode.EncodeJob(plan.settings, pickle.dumps(plan.source.reader))
    tasks = [encode.EncodeTask.of_positions(job, plan, np.arange(start, start + 8)) for start in (0, 8)]
    for task in tasks:
        task.prepare()
    wait([content for task in tasks for content in task._reads])
    shutil.rmtree(tmp_path / "data")
    entries = [entry for task in tasks for entry in task().entries]
    assert len(entries) == 16 and not any(isinstance(entry, str) for entry in entries)


def test_only_the_file_that_was_listed_is_read(tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(bytes(range(200)) * 100)
    reader, listed = folders.FolderReader(tmp_path), folders.stat_image(path)
    assert reader.read("0.png", listed) == path.read_bytes()
    broken = tmp_path / "1.png"
    broken.symlink_to("nothing")
    with pytest.raises(FileNotFoundError):  # the image is bad, but it is what was listed
        reader.read("1.png", folders.stat_image(broken))
    for change in (lambda: os.utime(path, (1, 1)), lambda: os.truncate(path, 5), path.unlink, lambda: os.mkfifo(path)):
        change()
        with pytest.raises(SourceChanged, match=r"0.png: on .* not the file that was listed"):
            reader.read("0.png", listed)
