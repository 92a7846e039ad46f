"""The bundle for a machine with a GPU, and the check that runs there: what needs no GPU of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from betons import photographs, write_digits, write_images

from ffcv_ops import CenterCrop, Label, Loader, ToTensor, read_beton

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from repeat_beton import repeat_file  # noqa: E402


def load(path):
    pipelines = {"image": [CenterCrop(64, ratio=1.0), ToTensor()], "label": [Label()]}
    with Loader(path, 1, num_workers=1, pipelines=pipelines, copy=True) as loader:
        return [np.stack([value[0].numpy() for value in column]) for column in zip(*loader, strict=True)]


@pytest.mark.parametrize("per_page", [None, 3])
def test_a_repeated_file_has_the_images_again_and_again(tmp_path, per_page):
    once, often = tmp_path / "once.beton", tmp_path / "often.beton"
    write_images(once, photographs(7), labels=[0, 1, 2, 0, 1, 2, 3], per_page=per_page)
    assert repeat_file(once, often, 3) == 21
    assert read_beton(often).num_classes == 4
    for ours, theirs in zip(load(often), load(once), strict=True):
        assert np.array_equal(ours, np.concatenate([theirs] * 3))


def refused(*command):
    done = subprocess.run(["bash", *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_wrong_arguments_are_refused_in_one_line(tmp_path):
    check, bundle = ROOT / "benchmarks/gpu_check.sh", ROOT / "benchmarks/gpu_bundle.sh"
    assert "two folders are needed" in refused(check)
    assert "is no bundle of make gpu-bundle" in refused(check, tmp_path, tmp_path / "out")
    for name in ("wheels", "data"):
        (tmp_path / name).mkdir()
    assert "--gpu is unknown; the options are --cpu and --steps" in refused(check, tmp_path, tmp_path / "out", "--gpu")
    assert "--steps needs numbers from 1 to 7" in refused(check, tmp_path, tmp_path / "out", "--steps", "8")
    assert "--data= is no folder" in refused(bundle)
    assert "--data=nowhere is no folder" in refused(bundle, "--data", "nowhere")
    assert "--data needs a value" in refused(bundle, "--data")
    assert "has no train/" in refused(bundle, "--data", tmp_path, "--cifar", tmp_path)
    assert "has no train_imagenet.py" in refused(bundle, "--data", tmp_path, "--ffcv_imagenet", tmp_path)


@pytest.mark.slow
def test_a_step_that_fails_leaves_the_others(tmp_path):
    """The bundle has no script of ffcv-imagenet, and a damaged file of digits."""
    bundle = tmp_path / "bundle"
    (bundle / "wheels").mkdir(parents=True)
    images = bundle / "data/images"
    images.mkdir(parents=True)
    write_images(images / "train.beton", photographs(80), labels=[number % 4 for number in range(80)])
    digits = bundle / "data/digits"
    digits.mkdir()
    write_digits(digits, num_train=64, num_val=16)
    (digits / "train.beton").write_bytes(b"no file")
    command = ["bash", ROOT / "benchmarks/gpu_check.sh", bundle, tmp_path / "out", "--cpu", "--steps", "3 5 6"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable}, timeout=600)
    lines = [json.loads(line) for line in (tmp_path / "out/check.jsonl").read_text().splitlines()]
    steps = {line["name"]: line for line in lines if "step" in line}
    assert {name: line["status"] for name, line in steps.items()} == {
        "setup": "ok",
        "ratios": "failed",
        "learning": "failed",
        "decode": "ok",
    }
    assert "the bundle has no ffcv-imagenet" in steps["ratios"]["error"]
    assert "runs failed" in steps["learning"]["error"]
    (ratio,) = (line for line in lines if line["figure" if "figure" in line else "step"] == "ratio")
    assert ratio["name"] == "trainer / model" and ratio["value"] > 0
