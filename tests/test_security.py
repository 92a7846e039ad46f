"""What a hostile file cannot do: SECURITY.md, claim by claim, where no other test holds it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from betons import PHOTOGRAPHS, photographs, write_images
from PIL import EpsImagePlugin, Image

from ffcv_ops.codec import jpeg, region
from ffcv_ops.sources.folder import scan
from ffcv_ops.sources.image import load_image
from imagenet_training.models.architectures import find_library
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.run.checkpoint import FORMAT, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def claim_size(content: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[at + 4 :]


def test_a_jpeg_that_claims_to_be_enormous_is_left_to_pillows_limit(tmp_path: Path) -> None:
    content = cv2.imencode(".jpg", PHOTOGRAPHS[0])[1].tobytes()
    path = tmp_path / "bomb.jpg"
    path.write_bytes(claim_size(content, 20_000, 20_000))
    with pytest.raises(Image.DecompressionBombError):
        load_image(path)
    path.write_bytes(content)
    assert load_image(path).shape == PHOTOGRAPHS[0].shape


def test_a_pipe_among_the_images_is_refused_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "0.jpg")
    with pytest.raises(ValueError, match="0.jpg: is no file"):
        scan(tmp_path)


def test_postscript_among_the_images_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("it was run"))
    path = tmp_path / "0.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="a PostScript program"):
        load_image(path)


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere/run", "folder/run"])
def test_a_checkpoint_does_not_choose_where_logs_go(tmp_path: Path, name: str) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"format": FORMAT, "state": {"run_name": name}}, path)
    with pytest.raises(ValueError, match="not to be trusted"):
        read_checkpoint(path)


def test_a_recipe_makes_no_python_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model:\n  arch: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(SystemExit) as exit:
        read_recipe(["--config-file", str(path)])
    assert exit.value.code == 2 and "recipe.yaml:2: not valid YAML" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.safe_load(path.read_text())


@pytest.mark.parametrize("arch", ["hf-hub:somebody/model", "local-dir:model", "os.system"])
def test_an_architecture_is_one_of_the_libraries(arch: str) -> None:
    with pytest.raises(ValueError, match="unknown to torchvision and timm"):
        find_library(arch)


LOAD = """
import sys, warnings
from ffcv_ops import CenterCrop, Label, Loader, RandomResizedCrop
for path in sys.argv[1:]:
    for decoder in (RandomResizedCrop(24), CenterCrop(24)):
        pipelines = {"image": [decoder], "label": [Label()]}
        with Loader(path, 8, num_workers=1, seed=0, drop_last=False, on_error="skip", pipelines=pipelines) as loader:
            try:
                print(sum(len(batch[0]) for batch in loader), len(loader.skipped))
            except ValueError as error:
                print(error)
"""


def damaged_jpegs(count: int) -> list[np.ndarray]:
    """JPEGs with restart segments whose headers and indices were tampered with, each in another way."""
    generator = np.random.default_rng(0)
    found = []
    for number, image in enumerate(photographs(count, side=96)):
        content = jpeg.encode(image, 90)
        end = region.read_layout(content).scan
        kind = number % 4
        if kind == 0:  # any bytes of header and index
            for position in generator.integers(2, end, 3):
                content[position] = generator.integers(256)
        elif kind == 1:  # offsets of rows that point anywhere
            at = 14 + 4 * int(generator.integers(0, 6))
            content[at : at + 4] = generator.integers(0, 256, 4) * [0, 0, 1, 1]
        elif kind == 2:  # fill bytes before a marker, where decoders disagree about what comes next
            at = int(np.flatnonzero((content[:-1] == 0xFF) & (content[1:] == 0xC0))[0])
            content = np.concatenate((content[:at], [0xFF], content[at:])).astype(np.uint8)
        else:  # another subsampling than the index is for
            at = int(np.flatnonzero((content[:-1] == 0xFF) & (content[1:] == 0xC0))[0])
            content[at + 11] = generator.choice([0x11, 0x12, 0x21, 0x41, 0x44])
        found.append(content)
    return found


def test_tampered_jpegs_end_in_a_reason_never_in_a_crash(tmp_path: Path) -> None:
    images, upcoming = photographs(80, side=96), iter(damaged_jpegs(80))
    paths = [
        write_images(tmp_path / f"{part}.beton", images[part::2], encode=lambda image: next(upcoming))
        for part in range(2)
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines() if re.fullmatch(r"\d+ \d+", line)]
    assert len(counts) == 4 and all(loaded == 40 for loaded, _ in counts)
    assert 0 < max(skipped for _, skipped in counts) < 40
