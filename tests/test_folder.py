"""What a folder loses or gains when it is listed and written, and what the user reads about it."""

import json
import os
import pickle
import struct
import sys
import threading
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from terminals import run_on_terminal, screen
from torchvision.datasets import ImageFolder

from ffcv_ops.beton import describe
from ffcv_ops.beton.layout import manifest_path
from ffcv_ops.errors import UserError
from ffcv_ops.progress import Progress
from ffcv_ops.sources import folder as folders
from ffcv_ops.sources import in_threads
from ffcv_ops.sources.folder import scan
from ffcv_ops.sources.image import Change, load_image, read_image
from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.source import SourceChanged
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.writing.encode import EncodeJob, EncodeTask
from ffcv_ops.writing.plan import BadImage, WriteSettings, build_plan
from ffcv_ops.writing.writer import write

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0][:48, :64])


def encoded(image, kind, **options):
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


JPEG = encoded(PHOTOGRAPH, "JPEG")


def make(root, *names, content=JPEG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def listed(root):
    found = scan(root)
    return dict(zip(found.keys, (found.classes[label] for label in found.labels), strict=True))


def lines(root):
    return [remark.line() for remark in scan(root).remarks]


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "data", "a/0.jpg", "a/1.jpg", "b/0.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# The listing


def test_an_ordinary_folder_has_no_remarks(root):
    assert lines(root) == []


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000", "$RECYCLE.BIN", "lost+found", "#recycle", ".git"],
)
def test_a_hidden_folder_is_no_class_and_has_no_images_of_one(root, name):
    """Beside the classes and inside of one, with images and empty."""
    before = listed(root)
    make(root, f"{name}/0.jpg", f"a/{name}/0.jpg")
    (root / "b" / name).mkdir()
    assert listed(root) == before
    assert lines(root) == [f"hidden folders left out: 3, such as {name}"]


def test_a_class_may_have_an_unusual_name(root):
    make(root, "@home/0.jpg", "#1/0.jpg", "recycle/0.jpg", "a.b/0.jpg")
    assert scan(root).classes == ["#1", "@home", "a", "a.b", "b", "recycle"] and lines(root) == []


def test_hidden_files_are_left_out(root):
    before = listed(root)
    make(root, "a/._0.jpg", "b/.0.jpg.swp", "b/.hidden.png", ".DS_Store", content=b"\0\5\x16\7")
    assert listed(root) == before
    assert lines(root) == ["hidden files left out: 4, such as .DS_Store"]


def test_files_of_other_extensions_are_counted_by_extension(root):
    before = listed(root)
    make(root, "a/0.jfif", "a/1.JFIF", "b/2.avif", "a/deep/3.heic", "README")
    assert listed(root) == before
    assert lines(root) == [
        "files left out for their extension .jfif: 2, such as a/0.jfif; convert or rename the images among them",
        "files left out without extension: 1, such as README; convert or rename the images among them",
        "files left out for their extension .avif: 1, such as b/2.avif; convert or rename the images among them",
        "files left out for their extension .heic: 1, such as a/deep/3.heic; convert or rename the images among them",
    ]


def test_many_extensions_take_few_lines(root):
    make(root, *(f"a/0.e{number:02d}" for number in range(40)), *("a/1.txt", "a/2.txt"))
    found = lines(root)
    assert len(found) == 9 and ".txt: 2" in found[0]
    assert found[-1] == "files left out for 33 more extensions: 33, such as a/0.e07"


def test_images_beside_the_class_folders_are_counted(root):
    before = listed(root)
    make(root, "stray.jpg", "other.PNG")
    assert listed(root) == before
    assert lines(root) == [
        "images beside the class folders left out: 2, such as other.PNG; move each into the folder of its class"
    ]


def test_images_deeper_than_their_class_are_taken_as_torchvision_does(root):
    make(root, "a/x/0.jpg", "a/x/y/1.jpg", "a/x-0.jpg", "b/z/0.jpg")
    theirs = ImageFolder(str(root))
    assert [(str(root / path), theirs.class_to_idx[name]) for path, name in listed(root).items()] == theirs.samples
    assert lines(root) == [
        "images in folders within a class folder: 3, such as a/x/0.jpg; their class is the folder at the top"
    ]


def test_one_folder_of_folders_is_no_class(tmp_path):
    """One class with all images is what the wrong folder would give."""
    root = make(tmp_path / "data", "imagenet/a/0.jpg", "imagenet/b/0.jpg", "notes.txt")
    with pytest.raises(UserError, match=f"holds one folder, imagenet, .* perhaps {root / 'imagenet'}$"):
        open_source(SourceSpec(str(root)))
    make(root, "imagenet/1.jpg")
    assert open_source(SourceSpec(str(root))).classes == ["imagenet"]


def test_an_empty_class_folder_is_named_with_what_it_has(root):
    make(root, "c/0.jfif", "c/1.jfif", "c/x.txt")
    with pytest.raises(UserError, match=r"/c: class folder without an image but with other files \(2 .jfif, 1 .txt\);"):
        scan(root)
    (root / "d").mkdir()
    with pytest.raises(UserError, match="/c: class folder .*, and 1 more such folders; remove it"):
        scan(root)


@pytest.mark.parametrize(
    ("link", "target"), [("a/up", ".."), ("a/self", "."), ("self", "."), ("a/x/up", "../.."), ("a/above", "../..")]
)
def test_a_circle_of_links_is_refused(root, link, target):
    (root / "a" / "x").mkdir()
    (root / link).symlink_to(target)
    with pytest.raises(UserError, match="which holds it, so that images would count many times; remove this link"):
        scan(root)


def test_two_classes_that_link_to_each_other_are_refused(root):
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    with pytest.raises(UserError, match="which holds it"):
        scan(root)


def test_a_link_to_itself_is_a_file_that_is_left_out(root):
    for name in ("loop", "a/loop"):
        (root / name).symlink_to("loop")
    assert len(listed(root)) == 3
    assert lines(root) == ["files left out without extension: 2, such as loop; convert or rename the images among them"]


@pytest.mark.parametrize("link, example", [("c", "c, which is b"), ("a/again", "b, which is a/again")])
def test_a_folder_that_is_linked_twice_is_counted(root, link, example):
    (root / link).symlink_to(root / "b")
    assert len(listed(root)) == 4
    assert f"images read twice through links: 1, such as those of {example}; they are written once under each name" in (
        lines(root)
    )


def test_a_class_may_be_a_link(tmp_path, root):
    (tmp_path / "linked").mkdir()
    for name in ("a", "b"):
        (tmp_path / "linked" / name).symlink_to(root / name)
    assert listed(tmp_path / "linked") == listed(root) and lines(tmp_path / "linked") == []


@pytest.mark.parametrize(
    "pair", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("dog", "dog "), ("STRASSE", "stra\u00dfe")], ids=ascii
)
def test_classes_with_nearly_the_same_name_are_named(root, pair):
    make(root, *(f"{name}/0.jpg" for name in pair))
    (line,) = lines(root)
    assert line.startswith("classes that differ only in case, spaces or form of Unicode: 2, such as ")
    assert all(repr(name) in line for name in pair)


def test_classes_may_have_the_names_of_splits(tmp_path):
    names = ["bullet_train/test.jpg", "bus/0.jpg", "test/0.jpg", "train/val_0.jpg"]
    open_source(SourceSpec(str(make(tmp_path, *names))))  # takes no class for a split
    assert listed(tmp_path) == {name: name.split("/")[0] for name in names}


def test_hidden_folders_beside_the_splits_do_not_hide_them(root):
    (root.parent / ".cache").mkdir()
    root.rename(root.parent / "train")
    with pytest.raises(UserError, match="holds the splits"):
        open_source(SourceSpec(str(root.parent)))


# ---------------------------------------------------------------------------------------------------------------------
# Progress of the listing


def slow_stats(monkeypatch, seconds):
    """Make each question of the listing take a while, and return the list of the paths that were asked for."""
    stat_image, asked = folders.stat_image, []

    def slow(path):
        asked.append(path)
        time.sleep(seconds)
        return stat_image(path)

    monkeypatch.setattr(folders, "stat_image", slow)
    return asked


def test_a_long_listing_reports_its_progress(tmp_path, monkeypatch):
    make(tmp_path, *(f"{number % 3}/{number}.jpg" for number in range(600)))
    slow_stats(monkeypatch, 0.003)
    monkeypatch.setattr(in_threads, "_PROGRESS_EVERY_S", 0.05)
    seen: list[tuple[str, int]] = []
    scan(tmp_path, lambda what, count: seen.append((what, count)))
    assert len(seen) >= 3 and {what for what, _ in seen} == {"images listed"}
    assert 0 < seen[-1][1] <= 600 and seen == sorted(set(seen))


def test_a_listing_that_is_stopped_ends_its_threads(tmp_path, monkeypatch):
    make(tmp_path, *(f"{number % 10}/{number}.jpg" for number in range(400)))
    asked, before = slow_stats(monkeypatch, 0.05), threading.active_count()
    monkeypatch.setattr(in_threads, "_PROGRESS_EVERY_S", 0.05)

    def interrupt(what, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, interrupt)
    assert threading.active_count() == before and len(asked) < 400


def test_without_a_terminal_a_stage_prints_a_line_every_so_often(capsys, monkeypatch):
    progress = Progress()
    progress.show_stage("images listed", 1000)
    assert capsys.readouterr() == ("", "")
    progress._last_s -= 11
    progress.show_stage("images listed", 402_113)
    progress.show_stage("images listed", 402_500)
    assert capsys.readouterr() == ("402,113 images listed\n", "")
    progress(0, 10)
    progress.close()


STAGE = """
from ffcv_ops.progress import Progress, print_line
progress = Progress()
progress.show_stage("images listed", 402_113)
print_line("hidden folders left out: 1")
progress.show_stage("images listed", 500_000)
progress(3, 10)
progress.close()
"""


def test_on_a_terminal_a_stage_is_a_count_that_goes_away():
    status, written = run_on_terminal([sys.executable, "-c", STAGE], columns=60)
    assert status == 0 and "402,113 images listed" in written and "500,000 images listed" in written
    shown = [line for line in screen(written) if line]
    assert shown[0] == "hidden folders left out: 1" and len(shown) == 2 and "3/10" in shown[1]


# ---------------------------------------------------------------------------------------------------------------------
# The pixels

RAMP = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)


def tiff(pixels, num_bits, photometric=1, sample_format=1):
    """An uncompressed grayscale TIFF, little-endian, with one strip."""
    tags = [(256, 4, pixels.shape[1]), (257, 4, pixels.shape[0]), (258, 3, num_bits), (259, 3, 1)]
    content = pixels.tobytes() if num_bits != 12 else pack_12_bits(pixels)
    tags += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, pixels.shape[0]), (279, 4, len(content))]
    tags.append((339, 3, sample_format))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def pack_12_bits(pixels):
    bits = np.unpackbits(pixels.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    return np.packbits(bits).tobytes()


DEEP = {
    "png": (encoded(Image.fromarray(RAMP), "PNG"), RAMP >> 8),
    "tiff": (encoded(Image.fromarray(RAMP), "TIFF"), RAMP >> 8),
    "tiff_lzw": (encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"), RAMP >> 8),
    "tiff_big_endian": (encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"), RAMP >> 8),
    "tiff_white_is_zero": (tiff(RAMP, 16, photometric=0), 255 - (RAMP >> 8)),
    "tiff_12_bits": (tiff(RAMP >> 4, 12), RAMP >> 8),
    "pgm": (encoded(Image.fromarray(RAMP), "PPM"), RAMP >> 8),
    "pgm_10_bits": (b"P5 64 48 1023\n" + (RAMP >> 6).astype(">u2").tobytes(), RAMP >> 8),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grayscale_keeps_its_upper_bits(tmp_path, kind):
    content, expected = DEEP[kind]
    make(tmp_path, "0.png", content=content)
    image, changes = read_image(tmp_path / "0.png")
    assert changes == Change.DEPTH and image.shape == (48, 64, 3)
    tolerance = 1 if kind == "pgm_10_bits" else 0  # Pillow scales 0 to 1023 to 0 to 65535
    assert np.abs(image.astype(int) - expected[:, :, None]).max() <= tolerance


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_deep_colour_is_noticed_and_keeps_its_upper_bits(tmp_path, extension):
    import cv2

    deep = np.stack((RAMP, RAMP[::-1], RAMP // 3), axis=2)
    make(tmp_path, "0.png", content=cv2.imencode(extension, deep[:, :, ::-1])[1].tobytes())
    image, changes = read_image(tmp_path / "0.png")
    assert changes == Change.DEPTH and np.array_equal(image, deep >> 8)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        tiff(RAMP, 16, sample_format=2),
    ],
    ids=["float", "int32", "signed"],
)
def test_numbers_of_unknown_range_are_refused(tmp_path, content):
    make(tmp_path, "0.tif", content=content)
    with pytest.raises(UserError, match="of no known range; save it with 8 or 16 bits"):
        read_image(tmp_path / "0.tif")


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def half_transparent():
    image = PHOTOGRAPH.convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]), (48, 32))))
    return image


TURNED = encoded(PHOTOGRAPH, "JPEG", exif=with_orientation(6))
OTHER = PHOTOGRAPH.rotate(180)
CHANGES = {
    "plain_jpeg": (JPEG, 0),
    "plain_png": (encoded(PHOTOGRAPH, "PNG"), 0),
    "upright": (encoded(PHOTOGRAPH, "JPEG", exif=with_orientation(1)), 0),
    "opaque": (encoded(PHOTOGRAPH.convert("RGBA"), "PNG"), 0),
    "turned_jpeg": (TURNED, Change.ORIENTATION),
    "turned_late": (JPEG[:2] + b"\xff\xe2\0\x90" + bytes(142) + TURNED[2:], Change.ORIENTATION),
    "turned_png": (encoded(PHOTOGRAPH, "PNG", exif=with_orientation(3)), Change.ORIENTATION),
    "turned_webp": (encoded(PHOTOGRAPH, "WEBP", exif=with_orientation(8)), Change.ORIENTATION),
    "alpha": (encoded(half_transparent(), "PNG"), Change.TRANSPARENCY),
    "alpha_webp": (encoded(half_transparent(), "WEBP"), Change.TRANSPARENCY),
    "gray_alpha": (encoded(half_transparent().convert("LA"), "PNG"), Change.TRANSPARENCY),
    "palette": (encoded(PHOTOGRAPH.convert("P"), "PNG", transparency=3), Change.TRANSPARENCY),
    "colour_key": (encoded(PHOTOGRAPH, "PNG", transparency=(0, 0, 0)), Change.TRANSPARENCY),
    "gif": (encoded(PHOTOGRAPH, "GIF", save_all=True, append_images=[OTHER]), Change.FRAMES),
    "apng": (encoded(PHOTOGRAPH, "PNG", save_all=True, append_images=[OTHER]), Change.FRAMES),
    "webp": (encoded(PHOTOGRAPH, "WEBP", save_all=True, append_images=[OTHER]), Change.FRAMES),
    "pages": (encoded(PHOTOGRAPH, "TIFF", save_all=True, append_images=[OTHER, OTHER]), Change.FRAMES),
    "cmyk_jpeg": (encoded(PHOTOGRAPH.convert("CMYK"), "JPEG"), Change.CMYK),
    "cmyk_tiff": (encoded(PHOTOGRAPH.convert("CMYK"), "TIFF"), Change.CMYK),
    "deep": (DEEP["png"][0], Change.DEPTH),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_noticed_and_the_pixels_are_pillows(tmp_path, kind):
    content, expected = CHANGES[kind]
    make(tmp_path, "0.png", content=content)
    image, changes = read_image(tmp_path / "0.png")
    assert changes == Change(expected)
    if kind != "deep":
        assert np.array_equal(image, np.asarray(Image.open(BytesIO(content)).convert("RGB")))
        assert np.array_equal(load_image(tmp_path / "0.png"), image)


def test_a_damaged_second_frame_or_exif_does_not_spoil_an_image(tmp_path):
    pages = CHANGES["pages"][0]
    make(tmp_path, "0.tif", content=pages[: len(pages) * 2 // 3])
    assert read_image(tmp_path / "0.tif")[0].shape == (48, 64, 3)
    turned = CHANGES["turned_jpeg"][0]
    at = turned.index(b"Exif\0\0") + 6
    make(tmp_path, "1.jpg", content=turned[:at] + b"\xff" * 8 + turned[at + 8 :])
    assert read_image(tmp_path / "1.jpg")[1] == Change(0)


def test_the_changes_of_a_file_are_printed_once_and_kept(tmp_path):
    """Also if the run was interrupted, and whatever the number of workers."""
    for copy in range(4):
        for name, (content, _) in CHANGES.items():
            make(tmp_path / "data" / "class", f"{name}_{copy}.png", content=content)
    make(tmp_path / "data", "class/notes.txt", ".cache/0.jpg")
    settings = WriteSettings(mode="raw", page_size=1 << 21)
    notices, manifests = [], []

    def stop(done, total):
        if done >= 64:
            raise KeyboardInterrupt

    for number, options in enumerate([{"num_workers": 1}, {"num_workers": 2}]):
        target = tmp_path / f"{number}.beton"
        if number:
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "data", target, settings, notice=lambda line: None, progress=stop, **options)
        manifests.append(write(tmp_path / "data", target, settings, notice=notices.append, **options))
    remarks = {entry["what"]: (entry["count"], entry["example"]) for entry in manifests[0]["remarks"]}
    assert remarks == {
        "hidden folders left out": (1, ".cache"),
        "files left out for their extension .txt": (1, "class/notes.txt"),
        "images of more than 8 bits a sample": (4, "class/deep_0.png"),
        "images of several frames or pages": (16, "class/apng_0.png"),
        "images with transparency": (20, "class/alpha_0.png"),
        "images with an EXIF orientation": (16, "class/turned_jpeg_0.png"),
        "CMYK images": (8, "class/cmyk_jpeg_0.png"),
    }
    assert manifests[1]["remarks"] == manifests[0]["remarks"]
    assert json.loads(manifest_path(tmp_path / "0.beton").read_text())["remarks"] == manifests[0]["remarks"]
    described = "\n".join(describe.lines(describe.describe(tmp_path / "0.beton")))
    assert "noted     CMYK images: 8, such as class/cmyk_jpeg_0.png" in described
    for what, (count, example) in remarks.items():
        assert sum(line.startswith(f"{what}: {count}, such as {example}") for line in notices) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Empty and enormous files


def test_an_empty_file_is_found_before_the_work(root):
    make(root, "a/2.jpg", "b/3.png", content=b"")
    target, settings = root.parent / "x.beton", WriteSettings(mode="raw")
    with pytest.raises(BadImage, match=r"a/2.jpg: the file is empty \(0 bytes\), as are 1 more; repair or remove"):
        write(root, target, settings, num_workers=1, notice=lambda line: None)
    assert os.listdir(root.parent) == ["data"]
    manifest = write(root, target, settings, num_workers=1, notice=lambda line: None, on_error="skip")
    assert manifest["skipped"] == [
        {"image": name, "reason": "the file is empty (0 bytes)"} for name in ("a/2.jpg", "b/3.png")
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_the_limit_of_pixels_is_a_setting(root, kind, monkeypatch):
    """A task lifts the limit of Pillow while it runs, so that only the setting counts."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    make(root, "b/large.jpg", content=encoded(PHOTOGRAPH.resize((100, 80)), kind))
    with pytest.raises(Image.DecompressionBombError):
        load_image(root / "b" / "large.jpg")
    found = scan(root)
    for limit, is_good in ((5000, False), (8000, True), (0, True)):
        settings = WriteSettings(mode="raw", max_pixels=limit, max_side=50)
        job = EncodeJob(settings, pickle.dumps(found.reader))
        (entry,) = EncodeTask(job, ["b/large.jpg"], found.places[3:].tolist(), [True])().entries
        if is_good:
            assert entry[1:3] == (50, 40)
        else:
            assert entry.startswith("100 x 80 px are more than the limit of 5000 px;") and "--max_pixels=8000" in entry


def test_a_negative_limit_is_refused():
    with pytest.raises(UserError, match="max_pixels must be 0"):
        WriteSettings(max_pixels=-1).check()


def test_settings_without_a_limit_continue_a_file_of_before(root):
    """The journal of an earlier version has no such key."""
    plan, limited = (build_plan(scan(root), WriteSettings(max_pixels=limit)) for limit in (None, 7))
    assert "max_pixels" not in plan.identity() and limited.identity()["max_pixels"] == 7


def test_a_file_that_is_cut_while_it_is_read_has_changed(tmp_path, monkeypatch):
    """It is no bad image, which a run might leave out."""
    source = scan(make(tmp_path / "in", "a/1.jpg"))
    monkeypatch.setattr(folders, "read_range", lambda file, size_bytes, offset: b"")
    with pytest.raises(SourceChanged, match="not the file that was listed"):
        source.reader.read(source.keys[0], source.places[0].tolist())
