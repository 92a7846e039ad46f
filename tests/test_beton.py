"""Reading a .beton file: stock files pass, damage is one clear ValueError."""

import contextlib
import json
import os
from pathlib import Path

import ffcv.types
import numpy as np
import pytest
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.writer import DatasetWriter
from sklearn.datasets import load_sample_image

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.layout import manifest_path
from ffcv_ops.beton.reading import read_beton

PAGE_SIZE = 1 << 21
PHOTOGRAPH = load_sample_image("china.jpg")


class Samples:
    """Twenty photographs of different sizes with what FFCV can store beside them."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = np.ascontiguousarray(PHOTOGRAPH[: 100 + 10 * index, : 90 + 7 * index])
        return image, index % 4, {"id": int(index)}, index / 2, np.full(index % 3 + 1, 7, np.uint8), np.arange(6.0)


@pytest.fixture(scope="module")
def stock_file(tmp_path_factory):
    """A file by ffcv's own writer: two workers, raw and JPEG images, every kind of field."""
    path = tmp_path_factory.mktemp("stock") / "stock.beton"
    fields = {
        "image": RGBImageField(write_mode="proportion"),
        "label": IntField(),
        "json": JSONField(),
        "float": FloatField(),
        "bytes": BytesField(),
        "array": NDArrayField(np.dtype("<f8"), (6,)),
    }
    DatasetWriter(str(path), fields, num_workers=2, page_size=PAGE_SIZE).from_indexed_dataset(Samples(), chunksize=3)
    return path


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    """The bytes of a file of images and labels, as most files are."""
    path = tmp_path_factory.mktemp("plain") / "plain.beton"
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}

    class Pairs(Samples):
        def __getitem__(self, index):
            return super().__getitem__(index)[:2]

    DatasetWriter(str(path), fields, num_workers=1, page_size=PAGE_SIZE).from_indexed_dataset(Pairs())
    return path.read_bytes()


@pytest.fixture
def damaged(tmp_path, plain_file):
    """Writes a changed copy of the plain file and returns its path."""

    def write(change):
        content = bytearray(plain_file)
        changed = change(content)
        path = tmp_path / "damaged.beton"
        path.write_bytes(content if changed is None else changed)
        return path

    return write


def test_the_layout_is_that_of_ffcv():
    assert beton.VERSION == ffcv.types.CURRENT_VERSION
    assert beton.HEADER_TYPE == ffcv.types.HeaderType
    assert beton.FIELD_TYPE == ffcv.types.FieldDescType
    assert beton.ALLOC_TYPE == ffcv.types.ALLOC_TABLE_TYPE
    assert beton.IMAGE_TYPE == RGBImageField().metadata_type
    for number, field in ffcv.types.TYPE_ID_HANDLER.items():
        if field is not None:
            assert beton.TYPE_NAMES[number] == field.__name__


def test_a_stock_file_passes(stock_file):
    found = read_beton(stock_file)
    assert (found.num_samples, found.page_size, found.manifest) == (20, PAGE_SIZE, None)
    assert found.field_names == ("image", "label", "json", "float", "bytes", "array")
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [index % 4 for index in range(20)]
    assert (found.num_classes, found.classes, found.digest) == (4, None, None)
    stock = ffcv.reader.Reader(str(stock_file))
    assert np.array_equal(found.metadata, stock.metadata)
    assert np.array_equal(found.alloc_table, stock.alloc_table)
    with pytest.raises(ValueError, match="no field 'mask'"):
        found.column("mask")


def test_a_custom_field_is_read_through_its_class(tmp_path):
    class Doubled(FloatField):
        @staticmethod
        def from_binary(binary):
            return Doubled()

    class Pairs(Samples):
        def __getitem__(self, index):
            return index, float(index)

    path = tmp_path / "custom.beton"
    fields = {"label": IntField(), "weight": Doubled()}
    DatasetWriter(str(path), fields, num_workers=1, page_size=PAGE_SIZE).from_indexed_dataset(Pairs())
    with pytest.raises(ValueError, match="custom_fields"):
        read_beton(path)
    assert read_beton(path, custom_fields={"weight": Doubled}).column("weight").tolist() == list(range(20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"\x02", "less than a header"),
        (b"\xff\xd8\xff\xe0 a JPEG, say, of some length", "not a .beton file"),
        (bytes(4096), "not a .beton file"),
    ],
)
def test_what_is_no_beton_is_refused(tmp_path, content, message):
    path = tmp_path / "file.beton"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_beton(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this is a folder; write_beton.py makes a .beton file"):
        read_beton(tmp_path)


def put(dtype, offset, name, value):
    """A change of one record of a file."""

    def change(content):
        record = np.frombuffer(content, dtype, 1, offset)
        record[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alloc_table_ptr", 0, "never finished"),
        ("alloc_table_ptr", 1 << 40, "it is cut"),
        ("alloc_table_ptr", 1 << 63, "it is cut"),
        ("num_samples", 0, "no samples"),
        ("num_samples", 21, "damaged"),
        ("num_samples", 1 << 60, "no room for its metadata"),
        ("num_fields", 0, "no fields"),
        ("num_fields", 65535, "no room for its field descriptors"),
        ("page_size", 3 << 20, "page size"),
        ("page_size", 0, "page size"),
        ("page_size", 1 << 30, "end of a page"),
        ("version", 3, "version 3"),
    ],
)
def test_a_wrong_header_is_named(damaged, name, value, message):
    with pytest.raises(ValueError, match=message):
        read_beton(damaged(put(beton.HEADER_TYPE, 0, name, value)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(0, 3, "'image' should be RGBImageField"), (1, 0, "'label' should be IntField"), (1, 99, "unknown type 99")],
)
def test_a_wrong_field_type_is_named(damaged, field, value, message):
    offset = beton.HEADER_TYPE.itemsize + field * beton.FIELD_TYPE.itemsize
    with pytest.raises(ValueError, match=message):
        read_beton(damaged(put(beton.FIELD_TYPE, offset, "type_id", value)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mode", 7, "sample 5 is neither JPEG nor raw"),
        ("width", 0, "sample 5 has no pixels"),
        ("height", 9, "sample 5 has another size than its pixels need"),
        ("data_ptr", 1 << 62, "sample 5 has a pointer that the allocation table does not know"),
        ("data_ptr", 0, "sample 5 has a pointer that the allocation table does not know"),
    ],
)
def test_wrong_metadata_is_named(damaged, name, value, message):
    offset = beton.HEADER_TYPE.itemsize + 2 * beton.FIELD_TYPE.itemsize + 5 * 24
    with pytest.raises(ValueError, match=message):
        read_beton(damaged(put(beton.IMAGE_TYPE, offset, name, value)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample_id", 20, "a sample that does not exist"),
        ("sample_id", 4, "pointer of another sample"),
        ("ptr", 8, "points outside the pages"),
        ("ptr", (1 << 64) - 8, "points outside the pages"),
        ("ptr", 2 * PAGE_SIZE - 8, "spans two pages"),
        ("ptr", PAGE_SIZE + 8, "overlaps"),
        ("size", (1 << 64) - 8, "points outside the pages"),
        ("size", 1, "another size than its pixels need"),
    ],
)
def test_a_wrong_allocation_is_named(damaged, name, value, message):
    def change(content):
        put(beton.ALLOC_TYPE, len(content) - 15 * beton.ALLOC_TYPE.itemsize, name, value)(content)

    with pytest.raises(ValueError, match=message):
        read_beton(damaged(change))


def test_a_sample_that_points_to_another_ones_bytes_is_named(damaged):
    def change(content):
        start = beton.HEADER_TYPE.itemsize + 2 * beton.FIELD_TYPE.itemsize
        rows = np.frombuffer(content, [("image", beton.IMAGE_TYPE), ("rest", "V11")], 20, start)
        rows["image"][5] = rows["image"][6]

    with pytest.raises(ValueError, match="sample 5 has the pointer of another sample"):
        read_beton(damaged(change))


def test_every_cut_is_noticed(damaged, plain_file):
    draw = np.random.default_rng(0)
    cuts = [*range(1, 64), *draw.integers(0, 3000, 100), *range(len(plain_file) - 20 * 24, len(plain_file))]
    path = damaged(lambda content: None)
    for length in sorted([*cuts, *draw.integers(0, len(plain_file), 20)], reverse=True):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="damaged"):
            read_beton(path)


def test_bytes_behind_the_end_are_noticed(damaged):
    for extra in (1, 24, 240):
        with pytest.raises(ValueError, match="allocation table"):
            read_beton(damaged(lambda content, extra=extra: content + bytes(extra)))


@contextlib.contextmanager
def flipped(path, draw, places, count):
    """Flip bits of a file for the time of a block."""
    with open(path, "r+b", buffering=0) as file:
        before = {}
        for position in set(draw.choice(places, count).tolist()):
            before[position] = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([before[position][0] ^ 1 << draw.integers(8)]), position)
        yield
        for position, byte in before.items():
            os.pwrite(file.fileno(), byte, position)


def test_flipped_bits_in_header_and_tables_never_crash(damaged, plain_file):
    """Without a manifest some flips cannot be known (a label, a width); what is returned still lies in the file."""
    draw = np.random.default_rng(1)
    head_bytes = beton.HEADER_TYPE.itemsize + 2 * beton.FIELD_TYPE.itemsize + 20 * 24
    places = [*range(24), *range(24, 42), *range(1065, 1083), *range(2106, head_bytes)]
    places += range(len(plain_file) - 20 * 24, len(plain_file))
    refused = 0
    path = damaged(lambda content: None)
    for _ in range(300):
        with flipped(path, draw, places, draw.integers(1, 4)):
            try:
                found = read_beton(path)
            except ValueError as error:
                assert "\n" not in str(error)
                found = None
        if found is None:
            refused += 1
            continue
        table = found.alloc_table
        assert found.num_samples == len(table) == 20
        assert int((table["ptr"] + table["size"]).max()) <= found.alloc_table_ptr
        assert set(found.metadata["f0"]["data_ptr"].tolist()) == set(table["ptr"].tolist())
    assert refused > 150


@pytest.fixture
def with_manifest(damaged, plain_file):
    """Writes a changed copy beside a manifest of the original; the manifest may be changed too."""

    def write(change, change_manifest=lambda manifest: manifest):
        path = damaged(lambda content: None)
        manifest_path(path).unlink(missing_ok=True)
        found = read_beton(path)
        manifest = {
            "format": beton.MANIFEST_VERSION,
            "size_bytes": found.size_bytes,
            "num_samples": 20,
            "classes": ["a", "b", "c", "d"],
            "class_counts": [5, 5, 5, 5],
            "tables": beton.tables_digest(plain_file[: found.metadata_end], found.alloc_table),
            "digest": "sha256:00",
            "checksums": "",
        }
        manifest_path(path).write_text(json.dumps(change_manifest(manifest)))
        return damaged(change)

    return write


def test_every_flipped_bit_is_noticed_with_a_manifest(with_manifest, plain_file):
    path = with_manifest(lambda content: None)
    assert read_beton(path).classes == ["a", "b", "c", "d"]
    draw = np.random.default_rng(2)
    places = [*range(2106 + 20 * 24), *range(len(plain_file) - 20 * 24, len(plain_file))]
    for _ in range(200):
        with flipped(path, draw, places, 1), pytest.raises(ValueError, match="write it again|should be|custom_fields"):
            read_beton(path)
    read_beton(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest | {"size_bytes": 7}, "size_bytes is .* and should be 7"),
        (lambda manifest: manifest | {"num_samples": 7}, "num_samples is 20 and should be 7"),
        (lambda manifest: manifest | {"tables": "00"}, "another SHA-256"),
        (lambda manifest: manifest | {"classes": ["a"]}, "sample 1 has label 1, the manifest 1 classes"),
        (lambda manifest: manifest | {"classes": [0, 1, 2, 3]}, "classes are not names"),
        (lambda manifest: manifest | {"class_counts": [6, 5, 5, 4]}, "images per class"),
        (lambda manifest: manifest | {"format": 2}, "format 2, which a newer version has written"),
        (lambda manifest: manifest | {"format": 0}, "not a manifest of format 1"),
        (lambda manifest: {"format": 1}, "lacks 'size_bytes'"),
        (lambda manifest: [], "not a manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(with_manifest, change, message):
    with pytest.raises(ValueError, match=message):
        read_beton(with_manifest(lambda content: None, change))


def test_a_damaged_manifest_is_named(with_manifest):
    path = with_manifest(lambda content: None)
    manifest_path(path).write_bytes(b"{\xff")
    with pytest.raises(ValueError, match="not a readable manifest"):
        read_beton(path)


def test_the_manifests_place():
    assert manifest_path("/data/train.beton") == Path("/data/train.beton.json")
