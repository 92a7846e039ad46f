"""Sources of Parquet and Arrow files, in the layouts of `datasets`, pyarrow and others."""

import json
import os
import pickle
import random
import subprocess
import sys
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import CONTENTS, NAMES, contents_of, listed, make_folder
from PIL import Image

from ffcv_ops.errors import UserError
from ffcv_ops.sources import parquet, parquet_content
from ffcv_ops.sources.kinds import find_kind, open_source
from ffcv_ops.sources.parquet_content import PageError
from ffcv_ops.sources.parquet_pages import find_values, read_hybrid
from ffcv_ops.sources.ranges import RangeReader
from ffcv_ops.sources.source import SourceChanged
from ffcv_ops.sources.spec import SourceSpec

ROOT = Path(__file__).parents[1]
CLASSES = ["n01", "n02", "n03"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ORDER = sorted(NAMES, key=lambda name: sha256(name.encode()).hexdigest())
# What `datasets` 5.2 hands to pyarrow for a column of images.
DATASETS_5 = {
    "compression": {"image.bytes": "none", "image.path": "none", "label": "snappy"},
    "use_dictionary": ["label"],
    "column_encoding": {"image.bytes": "PLAIN", "image.path": "PLAIN"},
    "write_page_index": True,
    "use_content_defined_chunking": {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0},
}


def schema(names=CLASSES, **fields):
    """The schema of `datasets` for a column of images and one of classes."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema({"image": IMAGE, "label": pa.int64(), **fields}, metadata=metadata)


def columns(names=ORDER):
    """The images of the folder with the names of their files, as `datasets` keeps them."""
    images = [{"bytes": CONTENTS[name], "path": name.rpartition("/")[2]} for name in names]
    return {"image": images, "label": [CLASSES.index(name[:3]) for name in names]}


def table(data=None, kind=None, names=CLASSES):
    return pa.table(data or columns(), schema=kind or schema(names))


def write(path, data=None, **options):
    pq.write_table(table() if data is None else data, path, **options)
    return path


def opened(address, **options):
    return open_source(SourceSpec(str(address), **options))


def remarks_of(source):
    return [remark.what for remark in source.remarks]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


@pytest.mark.parametrize(
    "options",
    [
        DATASETS_5,
        {"row_group_size": 4},  # `datasets` before version 5
        {"row_group_size": 4, "data_page_version": "2.0"},
        {"use_dictionary": False, "data_page_version": "2.0", "compression": "gzip"},
        {"compression": "zstd", "write_statistics": False},
        {"compression": "lz4", "use_dictionary": False},
        {"compression": "brotli", "row_group_size": 1},
        {"compression": "none", "row_group_size": 3},
    ],
    ids=str,
)
def test_a_file_is_the_folder(tmp_path, folder, options):
    source = opened(write(tmp_path / "train.parquet", **options))
    assert source.kind == "parquet" and source.classes == CLASSES and not source.remarks
    assert listed(tmp_path / "train.parquet") == listed(folder)
    assert [*source.keys] == [key.rpartition("/")[2] for key in opened(folder).keys]
    reader = pickle.loads(pickle.dumps(source.reader))
    assert reader.read(source.keys[3], source.places[3].tolist()) == source.reader.read("", source.places[3].tolist())


def test_equal_images_share_their_place_in_a_dictionary(tmp_path):
    data = columns(ORDER * 3)
    for number, image in enumerate(data["image"]):
        image["path"] = f"{number:03d}.jpg"
    source = opened(write(tmp_path / "a.parquet", table(data)))
    found = {
        key: source.reader.read(key, place) for key, place in zip(source.keys, source.places.tolist(), strict=True)
    }
    assert found == {image["path"]: image["bytes"] for image in data["image"]}


class CountingRanges(RangeReader):
    """Counts the bytes that are read."""

    count = 0

    def read(self, number, offset, size_bytes):
        CountingRanges.count += size_bytes
        return super().read(number, offset, size_bytes)


def large_rows(kind):
    """Values of 20 to 120 kB: without order as JPEG data, with equal beginnings, or all zeros."""
    draw = random.Random(5)
    beginning = {"random": b"", "headers": b"\xff\xd8" + bytes(500), "zeros": bytes(60_000)}[kind]
    return [beginning + draw.randbytes(draw.randrange(20_000, 120_000)) for _ in range(60)]


@pytest.mark.parametrize("kind", ["random", "headers", "zeros"])
@pytest.mark.parametrize("compression", ["snappy", "none"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_an_image_does_not_cost_its_row_group(tmp_path, monkeypatch, kind, compression, use_dictionary):
    values = large_rows(kind)
    data = table({"image": [{"bytes": value, "path": f"{i}"} for i, value in enumerate(values)], "label": [0] * 60})
    path = write(tmp_path / "a.parquet", data, compression=compression, use_dictionary=use_dictionary)
    monkeypatch.setattr(parquet, "RangeReader", CountingRanges)
    CountingRanges.count = 0
    source = opened(path)
    num_listed = CountingRanges.count
    reader = source.reader
    reader._ranges = CountingRanges(reader.files)
    for key, place in zip(source.keys, source.places.tolist(), strict=True):
        assert reader.read(key, place) == values[int(key)]
    if kind != "zeros" or compression == "none":
        assert num_listed < 0.25 * path.stat().st_size
        assert CountingRanges.count - num_listed < 60 * (2 << 16) + 1.1 * sum(map(len, values))


@pytest.mark.parametrize(("compression", "content"), [("gzip", os.urandom(1 << 19)), ("snappy", bytes(1 << 19))])
def test_large_pages_that_cannot_be_split_are_named(tmp_path, compression, content):
    """Also those of Snappy, if its tags are many."""
    images = [{"bytes": content + bytes([i]), "path": f"{i}"} for i in range(20)]
    data = table({"image": images, "label": [i % 3 for i in range(20)]})
    source = opened(write(tmp_path / "a.parquet", data, compression=compression))
    assert ["large pages of images" in what and "(10.5 MB)" in what for what in remarks_of(source)] == [True]
    assert source.reader.read("", source.places[-1].tolist()) == images[int(source.keys[19])]["bytes"]


def test_blocks_of_snappy_that_refer_to_earlier_ones_are_read_together():
    """Snappy itself does not write such pages. Others may, because the format allows it."""
    content = random.Random(1).randbytes(64) * (1 << 13)  # 512 KiB
    first = bytes([60 << 2, 63]) + content[:64]
    copies = (bytes([(64 - 1) << 2 | 2]) + (64).to_bytes(2, "little")) * ((1 << 13) - 1)
    packed = parquet_content._to_varint(len(content)) + first + copies
    page = parquet_content.Page(0, len(packed), len(content), 1, 0, False, True)
    found = parquet_content.PageContent(lambda offset, size: packed[offset : offset + size], page, "SNAPPY")
    place = found.place(300_000, 300_100)
    assert place.value(packed[place.offset : place.offset + place.size_bytes]) == content[300_000:300_100]
    assert found.read(300_000, 300_100) == content[300_000:300_100]


@pytest.mark.parametrize("compression", ["snappy", "none", "gzip"])
def test_an_empty_image_may_stand_at_the_end_of_a_page(tmp_path, compression):
    values = [os.urandom((1 << 20) - 8), b""]
    data = table({"image": [{"bytes": value, "path": f"{i}"} for i, value in enumerate(values)], "label": [0, 1]})
    source = opened(write(tmp_path / "a.parquet", data, compression=compression, use_dictionary=False))
    assert [source.reader.read("", place) for place in source.places.tolist()] == values
    assert source.sizes_bytes.tolist() == [len(values[0]), 0]


def test_a_listing_that_was_kept_is_used(tmp_path, monkeypatch):
    path, index = write(tmp_path / "a.parquet"), tmp_path / "index"
    source = opened(path, index=index)
    source.save_index(index)
    expected = contents_of(source)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_list_file", None)
        assert contents_of(opened(path, index=index)) == expected
    write(path, row_group_size=3)
    assert contents_of(opened(path, index=index)) == expected


def test_rows_of_any_run_lengths_and_widths():
    """Against the examples of the format's description, and damaged numbers."""
    assert read_hybrid(bytes([0b11, 0b10001000, 0b11000110, 0b11111010]), 0, 3, 8).tolist() == [*range(8)]
    assert read_hybrid(bytes([10, 4]), 0, 3, 5).tolist() == [4] * 5
    assert read_hybrid(bytes([4, 44, 1, 3, 255, 1, 0, 0, 0, 0, 0, 0, 0]), 0, 9, 4).tolist() == [300, 300, 511, 0]
    for damaged in (b"", b"\x0a", b"\x03\x88", b"\xff" * 20, b"\0\0"):
        with pytest.raises(PageError):
            read_hybrid(damaged, 0, 9, 100)


def test_classes_come_from_numbers_and_texts(tmp_path, folder):
    data = columns()
    expected = listed(folder)
    texts = [CLASSES[label] for label in data["label"]]
    plain = {"image": [image["bytes"] for image in data["image"]], "path": [image["path"] for image in data["image"]]}
    for name, label in (
        ("text", pa.array(texts)),
        ("large", pa.array(texts, pa.large_string())),
        ("dictionary", pa.array(texts).dictionary_encode()),
    ):
        images = pa.array(data["image"], pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]))
        path = write(tmp_path / f"{name}.parquet", pa.table({"image": images, "label": label}))
        assert listed(path) == expected
    numbered = write(tmp_path / "numbers.parquet", pa.table({**plain, "label": pa.array(data["label"], pa.uint8())}))
    source = opened(numbered)
    assert source.classes == ["0", "1", "2"] and remarks_of(source)[0].startswith("classes without names")
    (tmp_path / "names.txt").write_text("n01\nn02\nn03\n")
    assert sorted(listed(numbered, class_names=str(tmp_path / "names.txt"))) == sorted(expected)
    digits = write(tmp_path / "digits.parquet", pa.table({**plain, "label": [str(5 * n) for n in data["label"]]}))
    assert opened(digits).labels.max() == 10
    ids = write(tmp_path / "ids.parquet", pa.table({**plain, "label": [f"{n:012d}" for n in data["label"]]}))
    assert opened(ids).classes == ["000000000000", "000000000001", "000000000002"]


def test_columns_are_found_or_chosen(tmp_path, folder):
    data = columns()
    shards = {"jpg": pa.array(data["image"], IMAGE), "json": [{"label": label, "w": 3} for label in data["label"]]}
    path = write(tmp_path / "shards.parquet", pa.table({**shards, "__key__": [str(i) for i in range(len(ORDER))]}))
    (tmp_path / "names.txt").write_text("n01\nn02\nn03\n")
    assert listed(path, class_names=str(tmp_path / "names.txt")) == listed(folder)
    two = table(
        {**data, "coarse": [0] * 10, "thumbnail": data["image"][::-1]}, schema(coarse=pa.int64(), thumbnail=IMAGE)
    )
    assert listed(write(tmp_path / "two.parquet", two)) == listed(folder)
    source = opened(tmp_path / "two.parquet", label_column="coarse", image_column="thumbnail")
    assert source.classes == ["0"] and source.facts["image_column"] == "thumbnail"
    with pytest.raises(UserError, match="several columns for the image .*one .*two.*--image_column"):
        opened(
            write(
                tmp_path / "b.parquet", pa.table({"one": shards["jpg"], "two": shards["jpg"], "label": data["label"]})
            )
        )


def test_images_without_a_name_of_their_own_are_named_by_row(tmp_path):
    data = columns()
    for image in data["image"]:
        image["path"] = "image.jpg"
    twice = opened(write(tmp_path / "twice.parquet", table(data)))
    assert remarks_of(twice) == ["images named by file and row (one class has a path twice)"]
    data["image"][4]["path"] = None
    write(tmp_path / "b.parquet", table(data))
    none = opened(str(tmp_path / "*.parquet"))
    assert remarks_of(none)[0] == "images named by file and row (rows without a path)"
    rows = [row for number in range(3) for row in range(10) if data["label"][row] == number]
    assert [*twice.keys] == [f"twice.parquet/{row:09d}" for row in rows]
    first = [f"{name}.parquet/{row:09d}" for name in ("b", "twice") for row in range(10) if data["label"][row] == 0]
    assert [*none.keys][: len(first)] == first


def test_jpegs_that_datasets_has_encoded_again_are_noticed(tmp_path):
    data = columns()
    for image in data["image"]:
        content = BytesIO()
        Image.open(BytesIO(image["bytes"])).save(content, "JPEG")
        image.update(bytes=content.getvalue(), path=None)
    assert any("JPEGs of quality 75" in what for what in remarks_of(opened(write(tmp_path / "a.parquet", table(data)))))
    for image in data["image"]:
        content = BytesIO()
        Image.open(BytesIO(image["bytes"])).save(content, "JPEG", quality=95)
        image["bytes"] = content.getvalue()
    assert len(remarks_of(opened(write(tmp_path / "a.parquet", table(data))))) == 1


def test_paths_without_bytes_are_read_as_files(tmp_path, folder):
    data = columns()
    for image, name in zip(data["image"], ORDER, strict=True):
        image.update(bytes=None, path=f"folder/{name}")
    path = write(tmp_path / "a.parquet", table(data))
    assert listed(path) == listed(folder)
    assert opened(path).sizes_bytes.tolist() == opened(folder).sizes_bytes.tolist()
    text = pa.table({"image": [str(tmp_path / "folder" / name) for name in ORDER], "label": data["label"]})
    text = write(tmp_path / "text.parquet", text)
    assert [digest for _, digest in listed(text, image_column="image")] == [digest for _, digest in listed(folder)]
    (folder / ORDER[0]).unlink()
    with pytest.raises(UserError, match="holds paths of images and not their bytes, and .* is not there"):
        opened(path)
    data["image"][ORDER.index(NAMES[0])]["path"] = "hf://datasets/me/images@main/3.jpg"
    (folder / ORDER[0]).write_bytes(b"")
    with pytest.raises(UserError, match="holds addresses of images.*hf://"):
        opened(write(tmp_path / "a.parquet", table(data)))


def replaced(column, row, value):
    data = columns()
    data[column][row] = value
    return table(data)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda: replaced("image", 7, None), {}, "1 rows without bytes in image, such as row 7"),
        (lambda: replaced("image", 7, {"bytes": None, "path": "a"}), {"row_group_size": 1}, "1 of 10 rows have"),
        (lambda: replaced("label", 3, None), {}, "1 rows without a class, such as row 3"),
        (lambda: replaced("label", 3, -1), {"row_group_size": 2}, "has -1 in row 3, which is no class, as test splits"),
        (lambda: replaced("label", 3, 3), {}, "has the class 3, but the metadata of the column label names 3 classes"),
        (lambda: table(names=["a", "b", "a"]), {}, "has the class a twice; .*--class_names"),
        (lambda: table().slice(0, 0), {}, "has no rows"),
        (lambda: table().drop_columns("label"), {}, "no column that is known to hold the label .*--label_column"),
        (lambda: table().drop_columns("image"), {}, "no column that is known to hold the image .*--image_column"),
        (lambda: pa.table({"image": [[1, 2]], "label": [0]}), {}, r"has no column that .*image \(list<"),
        (lambda: pa.table({"image": [b"a"], "label": [0.5]}), {}, "label is of the type double"),
        (lambda: pa.table({"image": [b"a"], "label": [[0]]}), {}, "label is of the type list"),
        (lambda: pa.table({"image": [b"a"], "label": [1 << 40]}), {}, "has 1099511627776 in row 0, which is no class"),
        (lambda: table(), {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
         "stores the column image as DELTA_LENGTH_BYTE_ARRAY"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_written_are_refused(tmp_path, data, options, message):
    path = write(tmp_path / "a.parquet", data(), **options)
    with pytest.raises(UserError, match=message) as error:
        opened(path)
    assert "\n" not in str(error.value) and "a.parquet" in str(error.value)


def test_files_that_are_damaged_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", **DATASETS_5)
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:100], b"", b"PAR1", whole.replace(b"label", b"lab\xff\xff")):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet"):
            opened(path)
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(UserError, match="a.parquet: is damaged in the row group whose images begin at byte 4 "):
        opened(path)
    path.write_bytes(whole)
    source = opened(path)
    path.write_bytes(whole + b" ")
    with pytest.raises(SourceChanged, match="not the file that was listed"):
        source.reader.read(source.keys[0], source.places[0].tolist())


def test_damaged_pages_are_errors_of_the_source(tmp_path):
    """Whatever a byte of the pages becomes, values or a PageError are the result."""
    path = write(tmp_path / "a.parquet", row_group_size=4)
    column, whole = pq.read_metadata(path).row_group(0).column(0), path.read_bytes()
    start, size_bytes = column.dictionary_page_offset, column.total_compressed_size
    draw, num_errors = random.Random(3), 0

    def read(offset, size):
        return bytes(content[offset : offset + size])

    for _ in range(1000):
        content = bytearray(whole)
        content[start + draw.randrange(60 if draw.random() < 0.5 else size_bytes)] = draw.randrange(256)
        try:
            for place in find_values(read, start, size_bytes, "SNAPPY", 2):
                place.value(read(place.offset, place.size_bytes))
        except PageError:
            num_errors += 1
    assert num_errors > 150


def test_files_of_a_split_are_chosen(tmp_path, folder):
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for number in range(3):
        rows = columns(ORDER[number::3])
        write(data / f"train-{number:05d}-of-00003.parquet", table(rows))
    write(data / "validation-00000-of-00001.parquet", table(columns(ORDER[:2])))
    (tmp_path / "hub" / "README.md").write_text("images")
    expected = listed(folder)
    for address in (tmp_path / "hub", data):
        assert find_kind(SourceSpec(str(address))) == "parquet"
        assert listed(address, split="train") == expected
        assert len(listed(address, split="val")) == 2
        with pytest.raises(UserError, match="holds the splits train, val; choose one with --split"):
            opened(address)
    for pattern in ("train-*.parquet", "train-{00000..00002}-of-00003.parquet"):
        assert listed(data / pattern) == expected
    (data / "train-00001-of-00003.parquet").unlink()
    assert remarks_of(opened(data, split="train")) == ["shards that are not there"]
    with pytest.raises(UserError, match="no such file; .* names it"):
        opened(data / "train-{00000..00002}-of-00003.parquet")
    write(data / "train-00001-of-00003.parquet", table(columns(ORDER[1::3]), names=["a", "b", "c"]))
    with pytest.raises(UserError, match="00001-of-00003.parquet: has other names of classes than the first file"):
        opened(data, split="train")


def test_a_folder_of_classes_is_still_a_folder(folder):
    (folder / "n01" / "notes.parquet").write_bytes(b"")
    assert find_kind(SourceSpec(str(folder))) == "folder"


def save(folder, tables, state=None):
    """Write Arrow files as ``save_to_disk`` does."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, rows in zip(names, tables, strict=True):
        with pa.ipc.new_stream(folder / name, rows.schema) as stream:
            stream.write_table(rows, 3)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None, **(state or {})}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_arrow_files_are_the_folder(tmp_path, folder):
    expected = listed(folder)
    saved = save(tmp_path / "saved", [table(columns(ORDER[:3])), table(columns(ORDER[3:]))])
    source = opened(saved)
    assert source.kind == "arrow" and not source.remarks and source.sizes_bytes.tolist() == [
        len(CONTENTS[name]) for name in opened(folder).keys
    ]  # fmt: skip
    assert listed(saved) == listed(saved / "*.arrow") == expected
    large = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    with pa.ipc.new_file(tmp_path / "file.arrow", schema().set(0, pa.field("image", large))) as file:
        file.write_table(pa.table(columns(), schema=schema().set(0, pa.field("image", large))), 4)
    assert listed(tmp_path / "file.arrow") == expected
    # Of a cache of `datasets`, what maps have left is not taken.
    (saved / "state.json").unlink()
    (saved / "cache-1f2e.arrow").write_bytes(b"")
    assert listed(saved) == expected


def test_a_dict_of_tables_holds_splits(tmp_path, folder):
    save(tmp_path / "dict" / "train", [table()])
    save(tmp_path / "dict" / "validation", [table(columns(ORDER[:2]))])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert listed(tmp_path / "dict", split="train") == listed(folder)
    assert len(listed(tmp_path / "dict", split="val")) == 2
    with pytest.raises(UserError, match="holds the splits train, validation"):
        opened(tmp_path / "dict")


def test_arrow_files_that_cannot_be_written_are_refused(tmp_path):
    saved = save(tmp_path / "old", [table()], {"_indices_files": [{"filename": "indices.arrow"}]})
    with pytest.raises(UserError, match="rows in another order .*flatten_indices"):
        opened(saved)
    saved = save(tmp_path / "cut", [table()])
    (path,) = saved.glob("*.arrow")
    whole = path.read_bytes()
    for size in (len(whole) - 8, len(whole) // 2, 10, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="has no end mark, so it is cut"):
            opened(saved)
    path.write_bytes(whole[:1000] + whole[-8:])
    with pytest.raises(UserError, match="cannot be read as Arrow file"):
        opened(saved)
    path.unlink()
    with pytest.raises(UserError, match="no such file, but state.json names it"):
        opened(saved)
    packed = tmp_path / "packed.arrow"
    with pa.ipc.new_stream(packed, schema(), options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
        stream.write_table(table())
    with pytest.raises(UserError, match="column image is compressed"):
        opened(packed)
    with pa.ipc.new_stream(packed, schema()) as stream:
        stream.write_table(replaced("image", 7, None))
    with pytest.raises(UserError, match="1 rows without bytes, such as row 7"):
        opened(packed)


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need the package pyarrow .*\[parquet\]"):
        opened(write(tmp_path / "a.parquet"))


@pytest.mark.slow
def test_the_command_writes_the_bytes_of_the_folder(tmp_path, folder):
    """Both splits of one folder, each to its own file. What cannot be written leaves nothing."""
    data = tmp_path / "hub"
    data.mkdir()
    write(data / "train-00000-of-00001.parquet", row_group_size=3)
    write(data / "validation-00000-of-00001.parquet", table(columns(ORDER[:6])))

    def run(*arguments):
        command = [sys.executable, str(ROOT / "write_beton.py"), "--num_workers", "1", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    for arguments in (
        ("--split", "train", "--source", data),
        ("--split", "val", "--source", data),
        ("--source", folder, "--target", "folder.beton"),
    ):
        assert run(*arguments).returncode == 0
    assert (tmp_path / "train.beton").read_bytes() == (tmp_path / "folder.beton").read_bytes()
    assert json.loads((tmp_path / "val.beton.json").read_bytes())["num_samples"] == 6
    before = sorted(tmp_path.iterdir())
    broken = write(data / "c.parquet", replaced("label", 3, None))
    refused = run("--source", broken, "--target", "c.beton")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "row 3" in refused.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tables_of_datasets(tmp_path, folder, monkeypatch):
    """What `datasets` itself writes, and that the schema of these tests is its schema."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = datasets.Dataset.from_dict(columns(), features=features)
    expected = listed(folder)
    rows.to_parquet(str(tmp_path / "own.parquet"))
    assert pq.read_schema(tmp_path / "own.parquet").metadata[b"huggingface"] == schema().metadata[b"huggingface"]
    assert listed(tmp_path / "own.parquet") == expected
    ours, theirs = (
        pq.read_metadata(path).row_group(0).column(0)
        for path in (write(tmp_path / "ours.parquet", **DATASETS_5), tmp_path / "own.parquet")
    )
    assert (ours.compression, ours.encodings, ours.has_offset_index) == (
        theirs.compression, theirs.encodings, theirs.has_offset_index,
    )  # fmt: skip
    rows.shuffle(seed=1).save_to_disk(str(tmp_path / "disk"), num_shards=3)
    assert listed(tmp_path / "disk") == expected
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "dict"))
    assert listed(tmp_path / "dict", split="train") == expected
    # It stores the paths of a folder only, and all images again if a map has looked at them.
    images = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    images.to_parquet(str(tmp_path / "paths.parquet"))
    assert listed(tmp_path / "paths.parquet") == expected
    images.save_to_disk(str(tmp_path / "embedded"))
    assert listed(tmp_path / "embedded") == expected
    rows.map(lambda row: {"width": row["image"].width}).to_parquet(str(tmp_path / "mapped.parquet"))
    assert any("quality 75" in what for what in remarks_of(opened(tmp_path / "mapped.parquet")))
