"""Sources of tar archives and of labels: the images of a folder in the order of the folder, or one clear error."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from archives import CONTENTS, NAMES, contents_of, jpeg, listed, make_folder, tar, tar_of_tars
from scipy.io import savemat
from torchvision.datasets import ImageNet, imagenet

from ffcv_ops.errors import UserError
from ffcv_ops.sources import tar_headers
from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.ranges import RangeReader, list_file
from ffcv_ops.sources.source import SourceChanged
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.sources.tar_headers import FILE, HARD_LINK, TarWalk
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """The same images without class folders."""
    return make_folder(tmp_path_factory.mktemp("flat"), {name.split("/")[1]: CONTENTS[name] for name in NAMES})


def members(path):
    reader = RangeReader([list_file(path)])
    walk = TarWalk(lambda offset, size: reader.read(0, offset, size), str(path), 0, os.path.getsize(path))
    return [(m.name.decode().rstrip("/"), m.kind, m.offset, m.size_bytes, m.target.decode()) for m in walk]


def members_of_tarfile(path):
    with tarfile.open(path, "r:") as archive:
        for m in archive:
            kind = (
                FILE if m.isreg() else HARD_LINK if m.islnk() else tar_headers.FOLDER if m.isdir() else "symbolic link"
            )
            yield m.name, kind, m.offset_data, m.size if m.isreg() else 0, m.linkname


# ---------------------------------------------------------------------------------------------------------------------
# Headers


@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, kind):
    """Of archives that GNU tar makes, with long names and links of each length that the format can hold."""
    deepest = {"v7": 0, "ustar": 2}.get(kind, 12)
    names = ["a/0.jpg", "b b/\u00e9.jpg", "c/" + "long folder/" * 5 * deepest + "name" * 20 + ".jpg"]
    make_folder(tmp_path / "in", {name: bytes(number * 700) for number, name in enumerate(names)})
    os.link(tmp_path / "in" / names[0], tmp_path / "in" / "z.jpg")
    os.symlink("a/0.jpg", tmp_path / "in" / "link.jpg")
    path = tar(tmp_path / "x.tar", f"--format={kind}", ".", folder=tmp_path / "in")
    assert members(path) == list(members_of_tarfile(path)) and len(members(path)) > len(names) + 2


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_pythons_archives(tmp_path, form):
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        for number in range(200):
            info = tarfile.TarInfo(f"{number}/{'d' * (number % 90)}/{number}.jpg")
            info.mtime, info.size = 0.5 + number if form == tarfile.PAX_FORMAT else number, 37 * number
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    assert members(tmp_path / "x.tar") == list(members_of_tarfile(tmp_path / "x.tar"))


# ---------------------------------------------------------------------------------------------------------------------
# The images of a folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["n01", "n02", "n03"],
        ["--sort=none", "."],
        ["--format=pax", "../train"],
        ["n03", "n01", "n02"],
        ["-P", "ABSOLUTE"],
    ],
    ids=["classes", "dot", "top folder", "other order", "absolute"],
)
def test_an_archive_of_class_folders_is_the_folder(tmp_path, folder, arguments):
    arguments = [argument.replace("ABSOLUTE", str(folder)) for argument in arguments]
    assert listed(tar(tmp_path / "x.tar", *arguments, folder=folder)) == listed(folder)


def test_class_archives_are_the_folder(tmp_path, folder):
    """Within one archive, in a folder, and by a pattern."""
    whole = tar_of_tars(tmp_path / "train.tar", folder)
    inner = tmp_path / "train.tar.classes"
    for address in (whole, inner, inner / "n*.tar", inner / "n{01..03}.tar"):
        assert listed(address) == listed(folder)
    source = open_source(SourceSpec(str(whole)))
    assert source.kind == "tar" and sorted(source.keys) == sorted(NAMES)
    assert source.facts == {"path": str(whole), "num_archives": 1, "num_images": len(NAMES)}


def test_images_deeper_in_a_class_keep_torchvisions_order(tmp_path):
    names = [
        "a/x/0.jpg",
        "a/x/y/1.jpg",
        "a/x-0.jpg",
        "a/x-1/2.jpg",
        "b/z/0.jpg",
        "b/.hidden/0.jpg",
        "a/._x.jpg",
        "a/1.txt",
    ]
    root = make_folder(tmp_path / "in", {name: jpeg(number) for number, name in enumerate(names)})
    path = tar(tmp_path / "x.tar", "b", "a", folder=root)
    assert listed(path) == listed(root) and len(listed(path)) == 5
    ours, theirs = ({remark.line() for remark in open_source(SourceSpec(str(place))).remarks} for place in (path, root))
    assert ours == theirs and len(ours) == 4


def test_files_with_several_names_are_links_in_an_archive(tmp_path):
    root = make_folder(tmp_path / "in", {"a/0.jpg": jpeg(0), "b/1.jpg": jpeg(1)})
    os.link(root / "a" / "0.jpg", root / "b" / "0.jpg")
    assert listed(tar(tmp_path / "x.tar", "a", "b", folder=root)) == listed(root)


def test_the_split_of_an_archive_of_both_is_chosen(tmp_path, folder):
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "in" / split)
    (tmp_path / "in" / "val" / "n01" / "n01_10.JPEG").write_bytes(jpeg(99))
    path = tar(tmp_path / "x.tar", "in", folder=tmp_path)
    assert listed(path, split="val") == listed(tmp_path / "in" / "val") != listed(path, split="train")
    with pytest.raises(UserError, match="holds the splits train, val; choose one with --split"):
        listed(path)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


ROWS = [(name.split("/")[1], name.split("/")[0]) for name in NAMES]
LABELS = {
    "comma": "".join(f"{name},{label}\n" for name, label in ROWS),
    "tab and header": "filename\tclass\n" + "".join(f"{name}\t{label}\n" for name, label in ROWS),
    "spaces": "".join(f"./{name}  {label}\n\n" for name, label in ROWS),
    "no extension": "\ufeffImage,Label\r\n" + "".join(f"{name[:-5]},{label}\r\n" for name, label in reversed(ROWS)),
    "quotes": "".join(f'"{name}";"{label}"\n' for name, label in ROWS),
    "kaggle": "ImageId,PredictionString\n" + "".join(f"{n[:-5]},{c} 1 2 3 4 {c} 5 6 7 8 \n" for n, c in ROWS),
}


@pytest.mark.parametrize("kind", LABELS)
def test_flat_images_with_labels_are_the_folder(tmp_path, folder, flat, kind):
    (tmp_path / "labels").write_text(LABELS[kind], encoding="utf-8")
    archive = tar(tmp_path / "x.tar", ".", folder=flat)
    for address in (flat, archive):
        assert listed(address, labels=str(tmp_path / "labels")) == listed(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LABELS["comma"].split("\n", 1)[1], r"n01_10.JPEG has no label in .*labels; add the labels or remove"),
        ("x,n01\n", "nor have 9 more images"),
        (LABELS["comma"] + "other.jpg,n01\n", "1 labels have no image in .*, such as other.jpg; remove"),
        (LABELS["comma"] + "n01_9.JPEG,n02\n", "line 11 names n01_9.JPEG again"),
        (LABELS["comma"] + "a,b,c\n", "line 11 has 3 columns; it should have a name and a class"),
        (LABELS["comma"] + "a,\n", "line 11 has no name or no class"),
        ("", "has no line with a name and a class"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, flat, text, message):
    (tmp_path / "labels").write_text(text, encoding="utf-8")
    for address in (flat, tar(tmp_path / "x.tar", ".", folder=flat)):
        with pytest.raises(UserError, match=message):
            listed(address, labels=str(tmp_path / "labels"))


def test_flat_images_without_labels_are_refused_with_the_remedy(tmp_path, flat):
    for address in (
        flat,
        tar(tmp_path / "x.tar", ".", folder=flat),
        tar(tmp_path / "y.tar", "../val", folder=val(flat, tmp_path)),
    ):
        with pytest.raises(UserError, match="no class folders; name their classes with --labels FILE, for ILSVRC's"):
            listed(address)


def val(flat, tmp_path):
    return shutil.copytree(flat, tmp_path / "val")


def test_class_numbers_in_the_order_of_text_are_pointed_out(tmp_path):
    make_folder(tmp_path / "in", {f"{number}.jpg": jpeg(number) for number in range(12)})
    (tmp_path / "labels").write_text("".join(f"{number},{number}\n" for number in range(12)))
    source = open_source(SourceSpec(str(tmp_path / "in"), labels=str(tmp_path / "labels")))
    assert source.classes[:4] == ["0", "1", "10", "11"]
    assert source.remarks[0].line().endswith("12, such as 10, which is class 2; write the numbers with leading zeros")


def make_devkit(folder, labels):
    """The development kit of ILSVRC 2012 as far as it is read; the ids are in another order than the names."""
    names = ["n09", *sorted(set(labels), reverse=True)]
    rows = [(number, name, "words", "gloss", int(name == "n09"), 0) for number, name in enumerate(names, 1)]
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "wordnet_height"]
    synsets = np.array(rows, [(field, object) for field in fields]).reshape(-1, 1)
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{names.index(label) + 1}\n" for label in labels)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    path = folder / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(data.parent, "ILSVRC2012_devkit_t12")
    shutil.rmtree(data.parent)
    return path


@pytest.fixture
def ilsvrc(tmp_path, folder, monkeypatch):
    """ILSVRC's three archives in small, for torchvision too."""
    root = tmp_path / "ilsvrc"
    root.mkdir()
    train = tar_of_tars(root / "ILSVRC2012_img_train.tar", folder)
    shutil.rmtree(f"{train}.classes")
    labels = [label for _, label in ROWS][::-1]
    images = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(20 + n) for n in range(1, 1 + len(labels))}
    tar(root / "ILSVRC2012_img_val.tar", *images, folder=make_folder(tmp_path / "val", images))
    make_devkit(root, labels)
    sums = {
        key: (name, hashlib.md5((root / name).read_bytes()).hexdigest())
        for key, (name, _) in imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    return root


# torchvision 0.26 unpacks archives in a way of which Python 3.12 and 3.13 warn.
@pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter extracted tar archives:DeprecationWarning")
def test_ilsvrcs_archives_give_torchvisions_samples(ilsvrc, tmp_path):
    """Images, classes and order are those that torchvision unpacks. The labels lie beside the archive."""
    shutil.copytree(ilsvrc, tmp_path / "theirs")
    for split in ("train", "val"):
        theirs = ImageNet(tmp_path / "theirs", split)
        expected = [
            (theirs.wnids[label], hashlib.sha256(Path(path).read_bytes()).hexdigest()) for path, label in theirs.samples
        ]
        assert listed(ilsvrc / f"ILSVRC2012_img_{split}.tar") == expected
        assert listed(tmp_path / "theirs" / split) == expected


def test_kaggles_layout_has_its_labels_above(tmp_path, folder, flat):
    images = {f"ILSVRC2012_val_{n:08d}.JPEG": CONTENTS[name] for n, name in enumerate(NAMES)}
    root = make_folder(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val", images)
    rows = "".join(f"ILSVRC2012_val_{n:08d},{name[:3]} 1 2 3 4\n" for n, name in enumerate(NAMES))
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    source = open_source(SourceSpec(str(root)))
    assert source.facts["labels"] == str(tmp_path / "LOC_val_solution.csv")
    assert [source.classes[label] for label in source.labels] == sorted(name[:3] for name in NAMES)


def test_the_folder_above_ilsvrcs_images_is_refused_with_the_right_one(tmp_path, ilsvrc):
    kaggle = make_folder(tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC" / "train", CONTENTS)
    for address, split, wanted in (
        (ilsvrc, "train", ilsvrc / "ILSVRC2012_img_train.tar"),
        (ilsvrc, "val", ilsvrc / "ILSVRC2012_img_val.tar"),
        *((above, "train", kaggle) for above in kaggle.parents[:4]),
    ):
        with pytest.raises(UserError, match=f"use --source {wanted}$"):
            open_source(SourceSpec(str(address), split=split))


@pytest.mark.parametrize("change", ["cut", "no truth", "no text"])
def test_a_damaged_development_kit_is_named(tmp_path, flat, change):
    path = make_devkit(tmp_path, ["n01"])
    if change == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif change == "no truth":
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("data/meta.mat"))
    else:
        path = tmp_path / "labels.csv"
        path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match=r"cannot be read as an archive|has no ILSVRC2012_val|is no text in UTF-8"):
        listed(flat, labels=str(path))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("flag", "ending", "remedy"),
    [("-z", ".gz", "gunzip"), ("-j", ".bz2", "bunzip2"), ("-J", ".xz", "unxz"), ("-z", "", "gunzip")],
)
def test_a_compressed_archive_is_refused_with_the_remedy(tmp_path, folder, flag, ending, remedy):
    path = tar(tmp_path / f"x.tar{ending}", flag, "n01", folder=folder)
    with pytest.raises(UserError, match=rf"is compressed .* unpack it once: {remedy}"):
        listed(path)


def test_class_archives_that_are_compressed_are_refused(tmp_path, folder):
    (tmp_path / "n01.tar").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(UserError, match=r"x.tar/n01.tar: is compressed \(gzip\)"):
        listed(tar(tmp_path / "x.tar", "n01.tar", folder=tmp_path))


def test_a_cut_archive_is_refused_wherever_it_ends(tmp_path, folder):
    """Also at the end of a file, where tarfile and GNU tar notice nothing."""
    content = tar(tmp_path / "x.tar", "--format=gnu", "n01", "n02", folder=folder).read_bytes()
    last_bytes = members(tmp_path / "x.tar")[-1][2] + members(tmp_path / "x.tar")[-1][3]
    end = -(-last_bytes // 512) * 512
    for size in [*range(1, end, 331), end]:
        (tmp_path / "x.tar").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"is cut at byte \d+ \(.*\); copy or make it again|is no tar archive"):
            listed(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(content[: end + 512])
    assert len(listed(tmp_path / "x.tar")) == 7


@pytest.mark.parametrize("at", ["first", "later"])
def test_a_damaged_header_is_named(tmp_path, folder, at):
    content = bytearray(tar(tmp_path / "x.tar", "n01", folder=folder).read_bytes())
    place = members(tmp_path / "x.tar")[2 if at == "later" else 0][2] - 512
    content[place + 3] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"is damaged at byte {place}" if at == "later" else "is no tar archive"):
        listed(tmp_path / "x.tar")


@pytest.mark.parametrize("size", [b"-0000001000\0", b"9" * 11 + b"\0", b"\xff" * 12, b"z" * 12])
def test_a_size_that_is_none_ends_no_listing_late(tmp_path, folder, size):
    content = bytearray(tar(tmp_path / "x.tar", "n01", folder=folder).read_bytes())
    place = members(tmp_path / "x.tar")[1][2] - 512
    content[place + 124 : place + 136] = size
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"is damaged at byte {place}|is cut at byte"):
        listed(tmp_path / "x.tar")


def test_a_name_that_is_there_twice_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="holds n01/n01_9.JPEG more than once"):
        listed(tar(tmp_path / "x.tar", "n01", "n02", "n01/n01_9.JPEG", folder=folder))


def test_archives_that_were_joined_are_refused(tmp_path, folder):
    parts = [tar(tmp_path / f"{name}.tar", name, folder=folder).read_bytes() for name in ("n01", "n02")]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="has data behind its end mark at byte .* `tar --concatenate`"):
        listed(tmp_path / "x.tar")


def test_what_cannot_be_read_by_place_is_refused(tmp_path, folder):
    root = shutil.copytree(folder, tmp_path / "in")
    (root / "n01" / "link.JPEG").symlink_to("n01_9.JPEG")
    with pytest.raises(UserError, match="n01/link.JPEG is a symbolic link.*--dereference"):
        listed(tar(tmp_path / "x.tar", "n01", folder=root))
    assert listed(tar(tmp_path / "x.tar", "--dereference", "n01", folder=root)) == listed_class(root, "n01")
    with open(root / "n01" / "hole.JPEG", "wb") as file:
        file.truncate(1 << 20)
    for form in ("gnu", "pax"):
        with pytest.raises(UserError, match="hole.JPEG is a sparse file; make the archive without --sparse"):
            listed(tar(tmp_path / "x.tar", "--sparse", "-h", f"--format={form}", "n01", folder=root))


def listed_class(root, name):
    return [entry for entry in listed(root) if entry[0] == name]


def test_a_class_without_images_is_refused(tmp_path, folder):
    root = shutil.copytree(folder, tmp_path / "in")
    (root / "n04").mkdir()
    with pytest.raises(UserError, match="n04: class folder without an image"):
        listed(tar(tmp_path / "x.tar", ".", folder=root))
    (root / "n04" / "readme.txt").write_text("no image")
    with pytest.raises(UserError, match="n04.tar: class archive without an image"):
        listed(tar_of_tars(tmp_path / "y.tar", root))
    with pytest.raises(UserError, match=r"has no images but other files \(1 .txt\)"):
        listed(tar(tmp_path / "z.tar", "n04", folder=root))


def test_an_address_of_nothing_is_named(tmp_path, folder):
    tar(tmp_path / "n01.tar", "n01", folder=folder)
    for address, message in (
        ("x.tar", "no such folder; --source names the one"),
        ("n{01..03}.tar", r"n02.tar: no such file, and 1 more of 3; .*n\{01..03\}.tar names it"),
        ("x*.tar", "no file has such a name"),
    ):
        with pytest.raises(UserError, match=message):
            listed(tmp_path / address)
    with pytest.raises(UserError, match="is read as tar archives, for which --class_names has no use"):
        listed(tmp_path / "n01.tar", class_names="x")


# ---------------------------------------------------------------------------------------------------------------------
# Reading by place


def test_a_reader_travels_and_notices_another_archive(tmp_path, folder):
    path = tar(tmp_path / "x.tar", "n01", "n02", folder=folder)
    source = open_source(SourceSpec(str(path)))
    content = pickle.dumps(source.reader)
    reader = pickle.loads(content)
    key, place = source.keys[4], source.places[4].tolist()
    assert len(content) < 500 and reader.read(key, place) == CONTENTS[key] and reader.locate(key) == f"{path}/{key}"
    os.utime(path, (1, 1))
    for other in (reader, pickle.loads(content)):
        with pytest.raises(SourceChanged, match="x.tar: on .* not the file that was listed"):
            other.read(key, place)
    path.unlink()
    with pytest.raises(SourceChanged):
        pickle.loads(content).read(key, place)


def test_more_archives_than_files_may_be_open(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("ffcv_ops.sources.ranges._MOST_OPEN", 2)
    tar_of_tars(tmp_path / "train.tar", folder)
    reader = open_source(SourceSpec(str(tmp_path / "train.tar.classes"))).reader
    for _ in range(2):
        assert [reader.read("", [number, 512, 3]) for number in range(3)] == [b"\xff\xd8\xff"] * 3
        assert len(reader._ranges._open) == 2


def test_an_index_takes_little_more_memory_than_its_names(tmp_path):
    """ImageNet has 1,281,167 images: a byte for each is 1.2 MiB."""
    count = 5000
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(count):
            archive.addfile(tarfile.TarInfo(f"n{number // 1000:08d}/n{number // 1000:08d}_{number:05d}.JPEG"))
    tracemalloc.start()
    try:
        source = open_source(SourceSpec(str(tmp_path / "x.tar")))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source.keys) == count and peak_bytes / count < 300


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def quiet(source, target, **options):
    settings = WriteSettings("raw", page_size=1 << 21)
    return write(source, target, settings, num_workers=1, notice=lambda line: None, **options)


def test_an_interrupted_run_keeps_the_index(tmp_path, folder, monkeypatch):
    path, target = tar_of_tars(tmp_path / "train.tar", folder), tmp_path / "x.beton"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quiet(path, target, progress=stop)
    names = sorted(entry.name for entry in tmp_path.glob("x.beton*"))
    assert names == ["x.beton.partial", "x.beton.partial.index", "x.beton.partial.journal"]
    with monkeypatch.context() as patched:
        patched.setattr("ffcv_ops.sources.tar.list_parts", None)  # it is not listed again
        manifest = quiet(path, target)
    assert manifest["digest"] == quiet(folder, tmp_path / "y.beton")["digest"]
    assert sorted(entry.name for entry in tmp_path.glob("x.beton*")) == ["x.beton", "x.beton.json"]
    assert manifest["source"] == {"kind": "tar", "path": str(path), "num_archives": 1, "num_images": len(NAMES)}


def test_an_index_counts_for_its_archives_only(tmp_path, folder):
    path = tar(tmp_path / "x.tar", "n01", folder=folder)
    source = open_source(SourceSpec(str(path)))
    source.save_index(tmp_path / "index")
    again = open_source(SourceSpec(str(path), index=tmp_path / "index"))
    assert contents_of(again) == contents_of(source) and again.save_index is not None
    tar(path, "n01", "n02", folder=folder)
    os.utime(path, (1, 1))
    assert len(listed(path, index=tmp_path / "index")) == 7
    (tmp_path / "index").write_bytes((tmp_path / "index").read_bytes()[:-100])
    assert len(listed(path, index=tmp_path / "index")) == 7


def run(*arguments, status=0):
    """Run the script as people do; return what it printed."""
    script = Path(__file__).parents[1] / "write_beton.py"
    process = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    output = process.stdout + process.stderr
    assert process.returncode == status and "Traceback" not in output, output
    return output


@pytest.mark.slow
def test_the_command_writes_the_same_bytes_from_each_source(tmp_path, folder, flat):
    tar_of_tars(tmp_path / "ILSVRC2012_img_train.tar", folder)
    tar(tmp_path / "flat.tar", ".", folder=flat)
    (tmp_path / "labels.csv").write_text(LABELS["comma"], encoding="utf-8")
    labels = ["--labels", tmp_path / "labels.csv"]
    sources = [[folder], [tmp_path / "ILSVRC2012_img_train.tar"], [tmp_path / "flat.tar", *labels], [flat, *labels]]
    digests = set()
    for number, source in enumerate(sources):
        target = tmp_path / f"{number}.beton"
        output = run("--source", *source, "--target", target, f"--num_workers={1 + number % 2}")
        digests.add(output.partition("digest ")[2].split()[0])
        assert "index" not in {path.suffix for path in tmp_path.iterdir()} and "3 classes of 3 to 4 images" in output
    assert len(digests) == 1


@pytest.mark.slow
def test_the_command_names_what_is_wrong_and_leaves_nothing(tmp_path, folder, flat):
    archive = tar(tmp_path / "x.tar", ".", folder=folder)
    shutil.copytree(flat, tmp_path / "flat")
    os.truncate(archive, archive.stat().st_size // 2)
    (tmp_path / "labels.csv").write_text("x,y\n")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (["--source", archive], "is cut at byte"),
        (["--source", tmp_path / "flat"], "name their classes with --labels FILE"),
        (["--source", tmp_path / "flat", "--labels", tmp_path / "labels.csv"], "has no label in"),
        (
            ["--source", tmp_path / "s-{0..3}.tar", "--target", tmp_path / "x.beton"],
            "s-0.tar: no such file, and 3 more",
        ),
        (["--source", tmp_path / "*.tar"], "stands for several files; name the file to write with --target"),
        (["--source", archive, archive], "put a pattern of several files in quotes"),
        (["--source", archive, "--class_names=x"], "is read as tar archives, for which --class_names has no use"),
    ):
        assert message in run(*arguments, status=2).splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
