"""Hold an earlier version's names, flags, files, batches, checkpoint and half-written file.

`frozen/make.py` made the data to compare with, and its docstring names the commit.
"""

import json
import lzma
import os
import shutil
import zlib
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from frozen import cases

import ffcv_ops
from ffcv_ops.writing.plan import library_versions

ROOT = Path(__file__).parent.parent
FROZEN = Path(__file__).parent / "frozen"
EXPECTED = json.loads((FROZEN / "expected.json").read_text())
SAME_MACHINE = cases.machine() == EXPECTED["machine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The photographs, and a file of each mode."""
    folder = tmp_path_factory.mktemp("frozen")
    cases.save_photographs(folder / "photographs")
    for mode, arguments in cases.MODES.items():
        cases.write(ROOT, folder / "photographs", folder / f"{mode}.beton", *arguments)
    return folder


def digests(target):
    manifest = json.loads(Path(f"{target}.json").read_bytes())
    return {"bytes": sha256(target.read_bytes()).hexdigest(), "manifest": manifest["digest"]}


def test_no_public_name_is_gone():
    assert set(EXPECTED["public"]) <= set(ffcv_ops.__all__)
    for name in EXPECTED["public"]:
        assert getattr(import_module("ffcv_ops"), name).__name__ == name


@pytest.mark.parametrize("script", EXPECTED["help"])
def test_no_key_is_gone_and_defaults_are_the_same(script):
    expected = EXPECTED["help"][script]
    found = cases.help_defaults(ROOT, script)
    assert {flag: found.get(flag) for flag in expected} == expected


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_file_has_the_same_bytes(folder, mode):
    assert digests(folder / f"{mode}.beton") == EXPECTED["files"][mode]


@pytest.mark.parametrize("kind", EXPECTED["batches"])
def test_batches_are_the_same(folder, kind):
    """Compare floats bit by bit only on the machine of the frozen data: another CPU may round differently."""
    found = cases.describe_batches(kind, folder / "proportion.beton")
    for ours, theirs in zip(found, EXPECTED["batches"][kind], strict=True):
        if SAME_MACHINE or "sums" not in theirs:
            assert ours == theirs
        else:
            np.testing.assert_allclose(ours["sums"], theirs["sums"], rtol=1e-5, atol=1e-6)


def test_a_half_written_file_is_finished(tmp_path):
    cases.save_tiles(tmp_path / "tiles")
    target = tmp_path / "tiles.beton"
    partial, journal = (tmp_path / f"tiles.beton{suffix}" for suffix in (".partial", ".partial.journal"))
    partial.write_bytes(lzma.decompress((FROZEN / f"{partial.name}.xz").read_bytes()))
    journal.write_bytes(with_libraries_of_this_machine(lzma.decompress((FROZEN / f"{journal.name}.xz").read_bytes())))
    inode = partial.stat().st_ino
    cases.write(ROOT, tmp_path / "tiles", target, *cases.HALF_WRITTEN)
    assert target.stat().st_ino == inode, "the writer has started over"
    assert digests(target) == EXPECTED["half_written"]
    assert not partial.exists() and not journal.exists()


def with_libraries_of_this_machine(journal):
    """Replace the versions of NumPy, OpenCV and Pillow: where these are others, the writer rightly starts over."""
    line, _, rest = journal.partition(b"\n")
    identity = json.loads(line.partition(b" ")[2])
    identity["libraries"] = library_versions()
    content = json.dumps(identity, separators=(",", ":")).encode()
    return b"%08x %s\n%s" % (zlib.crc32(content), content, rest)


@pytest.mark.slow
def test_a_checkpoint_from_within_an_epoch_is_resumed_to_the_same_end(tmp_path):
    """The weights have the same bits on the machine of the frozen data, and elsewhere nearly the same values."""
    cases.save_digits(tmp_path)
    for split in ("train", "val"):
        cases.write(ROOT, tmp_path / split, tmp_path / f"{split}.beton")
    checkpoint = shutil.copy(FROZEN / "last.ckpt", tmp_path / "frozen.ckpt")
    assert torch.load(checkpoint, weights_only=True)["state"]["batch"] > 0
    cases.train(ROOT, tmp_path, "--resume", os.fspath(checkpoint))

    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    (record,) = tmp_path.glob("logs/*.jsonl")
    records = [json.loads(line) for line in record.read_text().splitlines()]
    assert last["state"]["epoch"] == 3 and [record["epoch"] for record in records] == [1, 2]
    assert set(EXPECTED["checkpoint"]) <= set(last) and set(EXPECTED["record"]) <= set(records[-1])
    with np.load(FROZEN / "weights.npz") as expected:
        assert len(expected) == len(last["model"]) + len(last["ema"])
        for name in expected:
            part, key = name.split("/")
            tolerance = {"rtol": 0, "atol": 0} if SAME_MACHINE else {"rtol": 1e-3, "atol": 1e-5}
            np.testing.assert_allclose(last[part][key], expected[name], err_msg=name, **tolerance)
