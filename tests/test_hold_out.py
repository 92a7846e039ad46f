"""One folder gives both splits: which images are held out, and that no image is in both files."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from archives import contents_of, jpeg, make_folder, tar, tar_of_tars

from ffcv_ops.beton.reading import read_beton
from ffcv_ops.errors import UserError
from ffcv_ops.settings import read_settings
from ffcv_ops.sources.kinds import open_source
from ffcv_ops.sources.spec import SourceSpec
from ffcv_ops.writing.command import FLAGS, WriteBeton, check_other_split, choose_source, read_train_classes
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write
from imagenet_training.data.loaders import shared_image_notices

SCRIPT = Path(__file__).parents[1] / "write_beton.py"
COUNTS = {"ant": 30, "bee": 12, "cat": 3, "dog": 2, "eel": 1}
CONTENTS = {
    f"{name}/{number}.jpg": jpeg(100 * place + number)
    for place, (name, count) in enumerate(COUNTS.items())
    for number in range(count)
}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", CONTENTS)


def split_of(address, split, share=0.2):
    return open_source(SourceSpec(str(address), split=split, hold_out=share))


def held(address, share=0.2):
    return set(split_of(address, "val", share).keys)


def test_the_two_splits_are_the_whole_folder(folder):
    train, val = split_of(folder, "train"), split_of(folder, "val")
    assert sorted([*train.keys, *val.keys]) == sorted(CONTENTS)
    assert train.classes == val.classes == list(COUNTS)
    assert np.bincount(val.labels, minlength=5).tolist() == [6, 2, 1, 1, 0]
    whole = dict(
        zip(open_source(SourceSpec(str(folder))).keys, contents_of(open_source(SourceSpec(str(folder)))), strict=True)
    )
    for source in (train, val):
        assert contents_of(source) == [whole[key] for key in source.keys]
        assert source.facts["hold_out"] == 0.2


def test_archives_hold_out_the_images_of_their_folder(folder, tmp_path):
    flat = tar(tmp_path / "flat.tar", *sorted(COUNTS), folder=folder)
    nested = tar_of_tars(tmp_path / "nested.tar", folder)
    for split in ("train", "val"):
        expected = contents_of(split_of(folder, split))
        assert contents_of(split_of(flat, split)) == contents_of(split_of(nested, split)) == expected


def test_images_are_held_out_of_the_training_split_of_an_archive(folder, tmp_path):
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "train")
    make_folder(tmp_path / "both" / "val", {"ant/other.jpg": jpeg(7)})
    both = tar(tmp_path / "both.tar", "train", "val", folder=tmp_path / "both")
    assert contents_of(split_of(both, "val")) == contents_of(split_of(tmp_path / "both" / "train", "val"))


def test_new_images_move_few_others(folder):
    before = held(folder)
    make_folder(folder, {f"fox/{number}.jpg": jpeg(310 + number) for number in range(5)})
    assert {key for key in held(folder) if not key.startswith("fox/")} == before
    make_folder(folder, {"ant/new.jpg": jpeg(350)})
    assert len(before - held(folder)) <= 1


def test_equal_names_in_several_folders_of_a_class_are_chosen_apart(tmp_path):
    names = [f"ant/series{series}/{number}.jpg" for series in range(10) for number in range(10)]
    names.append("bee/0.jpg")
    place = make_folder(tmp_path / "series", {name: jpeg(place) for place, name in enumerate(names)})
    assert len({Path(key).name for key in held(place)}) > 2


def test_a_larger_share_holds_out_the_same_images_and_more(folder):
    assert held(folder, 0.1) < held(folder, 0.3) < held(folder, 0.9)
    assert len(held(folder, 0.999)) == len(CONTENTS) - len(COUNTS)  # one image of each class is for training


def test_no_bytes_are_in_both_splits(folder):
    key = sorted(key for key in held(folder) if key.startswith("ant/"))[0]
    copy = next(key for key in split_of(folder, "train").keys if key.startswith("bee/"))
    (folder / copy).write_bytes(CONTENTS[key])
    val = split_of(folder, "val")
    assert key not in val.keys and key in split_of(folder, "train").keys and len(val.keys) == 9
    (line,) = (remark.line() for remark in val.remarks if "same bytes" in remark.what)
    assert line == f"images not held out, because an image for training has the same bytes: 1, such as {key}"


def test_images_that_cannot_be_read_are_not_taken_for_the_same(folder):
    links = [sorted(held(folder))[0], split_of(folder, "train").keys[0]]
    for key in links:
        (folder / key).unlink()
        (folder / key).symlink_to("nowhere")
    val = split_of(folder, "val")
    assert links[0] in val.keys and links[1] not in val.keys and len(val.keys) == 10


def test_what_cannot_be_held_out_is_refused(folder, tmp_path):
    for share, split, what in [
        (1.0, "val", "between 0 and 1"),
        (0.1, None, "needs --split train"),
        (0, "val", "between"),
    ]:
        with pytest.raises(UserError, match=what):
            split_of(folder, split, share)
    make_folder(tmp_path / "single", {"a/1.jpg": jpeg(1), "b/1.jpg": jpeg(2)})
    make_folder(tmp_path / "same", {"a/1.jpg": jpeg(1), "a/2.jpg": jpeg(1)})
    for name in ("single", "same"):
        with pytest.raises(UserError, match="no class has two different ones"):
            split_of(tmp_path / name, "val")
    make_folder(tmp_path / "ilsvrc", {"ILSVRC2012_val_00000001.JPEG": jpeg(1)})
    ilsvrc = tar(tmp_path / "ilsvrc.tar", "ILSVRC2012_val_00000001.JPEG", folder=tmp_path / "ilsvrc")
    with pytest.raises(UserError, match="use --split val, without --hold_out"):
        split_of(ilsvrc, "val")


def write_files(train, val, folder):
    """Write files of these sources, without settings that matter. Return what a run of them is told."""
    files = []
    with ThreadPoolExecutor(1) as executor:
        for name, spec in (("train", train), ("val", val)):
            target = folder / f"{name}.beton"
            write(spec, target, WriteSettings(mode="raw"), executor=executor, overwrite=True, notice=lambda line: None)
            files.append(read_beton(target))
    return shared_image_notices(*files)


def test_a_run_is_told_if_it_is_validated_on_images_that_it_trains_on(folder, tmp_path):
    def part(split=None, share=None, place=folder):
        return SourceSpec(str(place), split=split, hold_out=share)

    other = make_folder(tmp_path / "other", {"ant/1.jpg": jpeg(310), "bee/1.jpg": jpeg(311)})
    archive = tar(tmp_path / "images.tar", *sorted(COUNTS), folder=folder)
    for train, val in [
        (part("train", 0.2), part("val", 0.2)),
        (part("train", 0.3), part("val", 0.2)),
        (part("train", 0.2), part(place=other)),
        (part("train", 0.2, archive), part("val", 0.2, archive)),
    ]:
        assert not write_files(train, val, tmp_path)
    from_one = [f"{tmp_path / 'val.beton'} is from {folder}, as is {tmp_path / 'train.beton'}, so the run is validated"]
    for train, val in [
        (part("train", 0.1), part("val", 0.2)),
        (part(), part("val", 0.2)),
        (part("train", 0.2), part()),
    ]:
        assert [line.rpartition(" on images")[0] for line in write_files(train, val, tmp_path)] == from_one
    (line,) = write_files(part(place=archive), part("val", 0.2, archive), tmp_path)
    assert f"is from {archive}" in line
    (line,) = write_files(part("val", 0.2), part("val", 0.2), tmp_path)
    assert "val.beton has the images of" in line


def run(*arguments, status=0):
    process = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == status and "Traceback" not in process.stderr, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_two_commands_write_both_files(folder):
    first = run("--split=train", "--source", folder, "--hold_out=0.2", "--num_workers=1")
    target = folder.parent / "val.beton"
    assert "images held out of training: 10, such as " in first and "4 classes" not in first
    assert f"the same command with --split val --target {target}, for the images held out" in first
    refused = run("--split=val", "--source", folder, "--hold_out=0.1", status=2)
    assert (
        f"{folder.parent / 'train.beton.json'}: was written with --hold_out=0.2, so images could be in both" in refused
    )
    assert not target.exists()
    second = run("--split=val", "--source", folder, "--hold_out=0.2", "--num_workers=1")
    assert f"--data.train_dataset={folder.parent / 'train.beton'} --data.val_dataset={target}" in second
    files = [read_beton(folder.parent / f"{split}.beton") for split in ("train", "val")]
    assert "not numbered as" not in first + second and not shared_image_notices(*files)
    assert [file.num_samples for file in files] == [38, 10] and files[0].classes == files[1].classes


def test_both_files_can_be_written_again_with_another_share(folder, tmp_path):
    """One after the other, so the file of the other split still has the earlier share."""

    def chosen(split, share, overwrite=False):
        settings = [f"--split={split}", f"--source={folder}", f"--hold_out={share}", f"--overwrite={int(overwrite)}"]
        return read_settings(
            WriteBeton, settings, flags={**FLAGS, "overwrite": "write.overwrite"}, description=""
        ).write

    def told(*arguments):
        lines = []
        check_other_split(chosen(*arguments), choose_source(chosen(*arguments))[1], lines.append)
        return lines

    assert not told("val", 0.2)
    lines = []
    assert read_train_classes(chosen("val", 0.2), tmp_path / "val.beton", lines.append) is None and not lines
    assert not write_files(
        *(SourceSpec(str(folder), split=split, hold_out=0.2) for split in ("train", "val")), tmp_path
    )
    assert not told("train", 0.2)
    with pytest.raises(UserError, match="write both files with --overwrite"):
        told("train", 0.1)
    (line,) = told("train", 0.1, True)
    assert "was written with --hold_out=0.2, so images could be in both files; write that file again too" in line
