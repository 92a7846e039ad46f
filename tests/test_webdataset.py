"""Sources of WebDataset shards that the package webdataset and GNU tar have written."""

import json
import os
import warnings
from hashlib import sha256

import pytest
from archives import CONTENTS, NAMES, jpeg, listed, make_folder, tar

from ffcv_ops.errors import UserError
from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.webdataset import read_class_names
from ffcv_ops.writing.command import Write, choose_source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import webdataset

# webdataset leaves its files for Python to close.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
CLASSES = ["n01", "n02", "n03"]


def write_shards(folder, samples, per_shard=4):
    """Write shards with webdataset's own writer."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%04d.tar"), maxcount=per_shard, verbose=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def samples(label=lambda name: {"cls": str(CLASSES.index(name[:3])).encode()}):
    """The images of the folder, in another order, under keys with their folders."""
    return [{"__key__": name[:-5], "jpeg": CONTENTS[name], **label(name)} for name in sorted(NAMES, key=hash_of)]


def hash_of(name):
    return sha256(name.encode()).hexdigest()


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


def theirs(folder):
    """Key and hash of each sample, as webdataset reads them."""
    paths = sorted(map(str, folder.glob("*.tar")))
    found = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
    return sorted((sample["__key__"], sha256(sample["jpeg"]).hexdigest()) for sample in found)


def test_shards_of_webdatasets_writer_are_the_folder(tmp_path, folder):
    """With class numbers and their names, class names, and both in JSON."""
    numbered = write_shards(tmp_path / "numbered", samples())
    (numbered / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    named = write_shards(tmp_path / "named", samples(lambda name: {"cls": name[:3].encode()}))
    in_json = write_shards(
        tmp_path / "json", samples(lambda name: {"json": json.dumps({"label": name[:3], "wnid": 3}).encode()})
    )
    other_key = write_shards(
        tmp_path / "key", samples(lambda name: {"json": json.dumps({"a": 1, "w": name[:3]}).encode()})
    )
    expected = listed(folder)
    assert listed(numbered) == listed(named) == listed(in_json) == expected
    assert listed(other_key, label_column="w", kind="webdataset") == expected
    assert listed(numbered / "train-{0000..0002}.tar") == listed(numbered / "train-*.tar") == expected
    assert [
        (key[:-5], digest)
        for key, digest in sorted(zip(open_source(SourceSpec(str(named))).keys, (d for _, d in expected), strict=True))
    ] == theirs(named)


def test_numbers_without_names_are_the_class_numbers(tmp_path):
    shards = write_shards(tmp_path / "shards", samples(lambda name: {"cls": str(2 * int(name[2])).encode()}))
    source = open_source(SourceSpec(str(shards)))
    assert source.kind == "webdataset" and source.classes == [str(number) for number in range(7)]
    assert sorted(set(source.labels.tolist())) == [2, 4, 6]
    (tmp_path / "names").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="has the class 6, but .*names names 3 classes"):
        listed(shards, class_names=str(tmp_path / "names"))


@pytest.mark.parametrize("order", ["--sort=name", "--sort=none"])
def test_shards_of_gnu_tar_in_any_order(tmp_path, folder, order):
    """webdataset itself loses samples whose files are not neighbours."""
    parts = {}
    for name in NAMES:
        parts |= {f"x.y/{name}": CONTENTS[name], f"x.y/{name[:-5]}.cls": name[:3].encode()}
    make_folder(tmp_path / "in", parts)
    path = tar(tmp_path / "x.tar", order, "x.y", folder=tmp_path / "in")
    split = tar(
        tmp_path / "y.tar", *(f"x.y/{n}" for n in NAMES), *(f"x.y/{n[:-5]}.cls" for n in NAMES), folder=tmp_path / "in"
    )
    assert listed(path) == listed(folder)
    assert listed(split, kind="webdataset") == listed(folder)


def test_other_parts_of_samples_and_metadata_are_left_out(tmp_path):
    make_folder(
        tmp_path / "in",
        {"0.jpg": jpeg(0), "0.CLS": b"7\n", "0.json": b'{"label": 3}', "0.txt": b"a cat", "README": b""},
    )
    make_folder(tmp_path / "in", {"__key__": b"", "__meta__/0.jpg": jpeg(1), "._0.jpg": b"", "0.seg.png": jpeg(2)})
    path = tar(tmp_path / "x.tar", ".", folder=tmp_path / "in")
    source = open_source(SourceSpec(str(path), image_column="jpg"))
    assert list(source.keys) == ["0.jpg"] and source.classes[source.labels[0]] == "7"
    lines = {remark.line().partition(":")[0] for remark in source.remarks}
    assert {
        "parts of samples left out with extension .txt",
        "parts of samples left out with extension .seg.png",
    } <= lines
    with pytest.raises(UserError, match=r"0.* and 0.* are images of one sample, because .*; choose the extension"):
        listed(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.jpg": jpeg(0), "0.cls": b"1", "1.jpg": jpeg(1)}, "the sample 1 has an image but no class"),
        ({"0.jpg": jpeg(0), "0.cls": b"1", "1.cls": b"1"}, "the sample 1 has a class but no image"),
        ({"0.jpg": jpeg(0), "0.cls": b""}, "0.cls is no class but ''"),
        ({"0.jpg": jpeg(0), "0.json": b"{"}, "0.json cannot be read as JSON"),
        ({"0.jpg": jpeg(0), "0.json": b'{"x": 1}'}, "has an image but no class .*--label_column"),
        ({"0.a.jpg": jpeg(0), "0.b.jpg": jpeg(1), "0.cls": b"1"}, "0.a.jpg and 0.b.jpg are images of one sample"),
        ({"0.jpg": jpeg(0), "0.cls": b"99999999"}, "which is no class number"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, files, message):
    make_folder(tmp_path / "in", files)
    with pytest.raises(UserError, match=message):
        listed(tar(tmp_path / "x.tar", *files, folder=tmp_path / "in"))


def test_one_name_in_two_shards_is_refused(tmp_path):
    for shard in ("a", "b"):
        make_folder(tmp_path / shard, {"0.jpg": jpeg(0), "0.cls": b"1"})
        tar(tmp_path / f"{shard}.tar", "0.jpg", "0.cls", folder=tmp_path / shard)
    with pytest.raises(UserError, match="holds 0.jpg more than once"):
        listed(tmp_path / "{a,b}.tar")


def test_shards_of_a_split_are_chosen_and_gaps_named(tmp_path, folder):
    shards = write_shards(tmp_path / "shards", samples(lambda name: {"cls": name[:3].encode()}))
    val = write_shards(tmp_path / "val", samples(lambda name: {"cls": name[:3].encode()})[:2])
    (val / "train-0000.tar").rename(shards / "validation-0000.tar")
    assert listed(shards, split="train") == listed(folder)
    assert len(listed(shards, split="val")) == 2
    for address in (shards, shards / "*.tar"):
        with pytest.raises(UserError, match="holds the splits train, val; choose one with --split"):
            listed(address)
    assert not open_source(SourceSpec(str(shards), split="train")).remarks
    for name in ("train", "val"):  # the files of the splits do not replace each other
        _, target = choose_source(Write(source=str(shards), split=name))
        assert target == shards.parent / f"{name}.beton"
    (shards / "train-0001.tar").unlink()
    for address in (shards, shards / "train-*.tar"):
        (remark,) = open_source(SourceSpec(str(address), split="train")).remarks
        assert remark.line() == "shards that are not there: 1, such as train-0001.tar; the file will be without them"


def test_a_cut_or_compressed_shard_is_refused(tmp_path):
    shards = write_shards(tmp_path / "shards", samples())
    path = shards / "train-0001.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train-0001.tar: is cut at byte"):
        listed(shards)
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(UserError, match=r"train-0001.tar: is compressed \(Zstandard\)"):
        listed(shards)


@pytest.mark.parametrize("line", ["a/b.JPEG,n01440764", "ILSVRC2012_val_1.jpeg\t3", "x.png;cat"])
def test_labels_of_images_are_no_names_of_classes(tmp_path, line):
    (tmp_path / "labels.csv").write_text(f"name,class\n{line}\n")
    with pytest.raises(UserError, match="labels.csv: has labels of images, such as"):
        read_class_names(str(tmp_path / "labels.csv"))
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish, Carassius auratus\n")
    assert len(read_class_names(str(tmp_path / "names.txt"))) == 2
