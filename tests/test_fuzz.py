"""Damaged files: whatever is changed in one, the loader and the check end with right pixels or a clear error.

Run as a script, ``python -m tests.test_fuzz FOLDER SEED COUNT``, this damages COUNT copies of the files in a folder,
each in its own way, and prints how many ended how, as JSON, and what was found to be wrong.
"""

import faulthandler
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from ffcv_ops.beton import layout as beton
from ffcv_ops.beton.layout import manifest_path
from ffcv_ops.beton.reading import read_beton
from tests.betons import photographs

NUM_SAMPLES = 12
REGIONS = ("header", "fields", "metadata", "payload", "payload", "alloc_table", "anywhere", "manifest")
CHECK_EVERY = 25
"""One damaged file in so many is checked by `verify` too, which starts a process for it."""


def write_files(folder):
    """Write the files to be damaged, by our writer and by FFCV's; every sample has a label of its own."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    from ffcv_ops.writing.plan import WriteSettings
    from ffcv_ops.writing.writer import write

    images = [image[: 100 + 9 * i] for i, image in enumerate(photographs(NUM_SAMPLES, side=200))]
    for label, image in enumerate(images):
        (folder / "images" / f"{label:02d}").mkdir(parents=True)
        assert cv2.imwrite(str(folder / "images" / f"{label:02d}" / "0.png"), image[:, :, ::-1])
    for mode in ("jpg", "raw"):
        settings = WriteSettings(mode, page_size=beton.MIN_PAGE_SIZE)
        write(folder / "images", folder / f"{mode}.beton", settings, num_workers=1, notice=lambda line: None)

    class Pairs:
        def __len__(self):
            return NUM_SAMPLES

        def __getitem__(self, index):
            return images[index], index

    fields = {"image": RGBImageField(write_mode="proportion"), "label": IntField()}
    writer = DatasetWriter(str(folder / "stock.beton"), fields, num_workers=1, page_size=beton.MIN_PAGE_SIZE)
    writer.from_indexed_dataset(Pairs())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_files(folder)
    return folder


def run(folder, seed, count, timeout):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_fuzz", folder, str(seed), str(count)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["wrong"] == []
    assert sum(found["loaded"].values()) == count
    return found


@pytest.mark.slow
def test_damaged_files_end_with_right_pixels_or_a_clear_error(folder):
    found = run(folder, seed=0, count=150, timeout=300)
    assert found["loaded"]["ValueError"] > 30 and found["loaded"]["right pixels"] > 10


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files_end_with_right_pixels_or_a_clear_error(folder, seed):
    run(folder, seed, count=600, timeout=3000)


class Original:
    """A file as it was: its bytes, its manifest's, where its parts are, and what a loader makes of it."""

    def __init__(self, path):
        self.name = path.name
        self.content = path.read_bytes()
        manifest = manifest_path(path)
        self.manifest = manifest.read_bytes() if manifest.exists() else None
        found = read_beton(path)
        fields = beton.HEADER_TYPE.itemsize, beton.HEADER_TYPE.itemsize + 2 * beton.FIELD_TYPE.itemsize
        table = found.alloc_table
        self.payloads = list(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
        self.parts = {
            "header": [(0, fields[0])],
            "fields": [fields],
            "metadata": [(fields[1], found.metadata_end)],
            "payload": [(ptr, ptr + size) for ptr, size in self.payloads],
            "alloc_table": [(found.alloc_table_ptr, found.size_bytes)],
            "anywhere": [(0, found.size_bytes)],
        }
        self.pixels = {crop: dict(load(path, crop, "raise")) for crop in CROPS}
        assert all(len(pixels) == NUM_SAMPLES for pixels in self.pixels.values())


def center_crop():
    from ffcv_ops.operations.crops import CenterCrop

    return CenterCrop(48, ratio=1)


def random_crop():
    from ffcv_ops.operations.crops import RandomResizedCrop

    return RandomResizedCrop(24)


CROPS = {"center": center_crop, "random": random_crop}


def load(path, crop, on_error, os_cache=True):
    """Return label and pixels of every image, as bytes."""
    from ffcv_ops.loading.loader import Loader
    from ffcv_ops.operations.normalize import Label

    pipelines = {"image": [CROPS[crop]()], "label": [Label()]}
    with Loader(path, 5, 2, os_cache, seed=3, drop_last=False, on_error=on_error, pipelines=pipelines) as loader:
        return [
            (int(label), image.tobytes())
            for images, labels in loader.epoch(0)
            for image, label in zip(images, labels, strict=True)
        ]


def damage(draw, content, parts):
    """Cut, flip bits, zero or overwrite within one of a file's parts."""
    content = bytearray(content)
    start, stop = parts[draw.integers(len(parts))]
    kind = draw.choice(["cut", "flip", "zeros", "noise"], p=[0.1, 0.5, 0.2, 0.2])
    at = int(draw.integers(start, stop))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        for position in draw.integers(start, stop, draw.integers(1, 4)).tolist():
            content[position] ^= 1 << int(draw.integers(8))
    else:
        length = min(stop - at, int(2 ** draw.integers(0, 12)))
        content[at : at + length] = bytes(length) if kind == "zeros" else draw.bytes(length)
    return str(kind), bytes(content)


def one_by_one(before, after):
    """A changed JPEG; and where few bytes were changed, the one before with each of them changed alone.

    A crop that is decoded for what it covers may meet a change that no reader can know, and not its neighbour that a
    decode of the whole image reports.
    """
    yield after
    if len(before) == len(after):
        changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
        for position in changed if 1 < len(changed) <= 3 else ():
            yield before[:position] + after[position : position + 1] + before[position + 1 :]


def decodes(content):
    from ffcv_ops.codec.jpeg import decode

    try:
        return decode(np.frombuffer(content, np.uint8)) is not None
    except ValueError:
        return False


class Fuzzer:
    """Damages files and judges what becomes of them."""

    def __init__(self, folder, seed):
        self.originals = [Original(path) for path in sorted(folder.glob("*.beton"))]
        self.folder = folder
        self.seed = seed
        self.loaded, self.checked, self.wrong = Counter(), Counter(), []

    def run(self, count):
        path = self.folder / "damaged" / f"{self.seed}.beton"
        path.parent.mkdir(exist_ok=True)
        for number in range(count):
            faulthandler.dump_traceback_later(600, exit=True)
            draw = np.random.default_rng((self.seed, number))
            original = self.originals[draw.integers(len(self.originals))]
            region = str(draw.choice(REGIONS if original.manifest else REGIONS[:-1]))
            manifest, content = original.manifest if draw.integers(2) else None, original.content
            if region == "manifest":
                kind, manifest = damage(draw, original.manifest, [(0, len(original.manifest))])
            else:
                kind, content = damage(draw, content, original.parts[region])
            path.write_bytes(content)
            manifest_path(path).unlink(missing_ok=True)
            if manifest:
                manifest_path(path).write_bytes(manifest)
            beside = "with" if manifest else "without"
            self.what = f"{number}: {original.name} {beside} manifest, {kind} in {region}"
            crop, on_error = str(draw.choice(list(CROPS))), str(draw.choice(["raise", "skip"]))
            unchanged = content == original.content
            self.loaded[self.judge(original, path, content, manifest, (crop, on_error, bool(draw.integers(2))))] += 1
            if number % CHECK_EVERY == 0:
                self.checked[self.judge_check(path, manifest, unchanged)] += 1
        faulthandler.cancel_dump_traceback_later()

    def judge(self, original, path, content, manifest, how):
        """Load a damaged file; name its end, and note it where it is wrong."""
        from ffcv_ops.operations.base import SampleError

        try:
            images = load(path, *how)
        except SampleError as error:
            self.expect(error.file == str(path) and error.failures, f"unclear: {error}")
            return "SampleError"
        except ValueError as error:
            self.expect(str(path) in str(error) or "reads the field" in str(error), f"unclear: {error}")
            self.expect("\n" not in str(error), f"several lines: {error}")
            return "ValueError"
        except Exception as error:
            self.expect(False, f"unclear: {type(error).__name__}: {error}")
            return type(error).__name__
        pixels = original.pixels[how[0]]
        self.expect(len(images) == NUM_SAMPLES, f"{len(images)} images")
        wrong = [i for i, (label, image) in enumerate(images) if pixels.get(label) != image]
        if not wrong:
            return "right pixels"
        for i in wrong:
            label, image = images[i]
            relabelled = manifest is None and image in pixels.values()
            self.expect(relabelled or self.cannot_be_known(original, path, content, label), "wrong pixels")
        return "other values that decode"

    def cannot_be_known(self, original, path, content, label):
        """Whether a sample that gives other pixels is one that no reader can tell from a good one."""
        found = read_beton(path)
        for sample_id in np.flatnonzero(found.labels == label):
            row = found.column("image")[sample_id]
            entry = found.alloc_table[found.alloc_table["ptr"] == row["data_ptr"]][0]
            if row["mode"] == beton.MODE_JPG:
                payload = slice(int(entry["ptr"]), int(entry["ptr"]) + int(entry["size"]))
                if not any(decodes(jpeg) for jpeg in one_by_one(original.content[payload], content[payload])):
                    return False
        return True

    def judge_check(self, path, manifest, unchanged):
        """Check a damaged file; with a manifest nothing may escape the check."""
        from ffcv_ops.beton.verify import verify

        try:
            report = verify(path, num_workers=1)
        except ValueError as error:
            self.expect(str(path) in str(error), f"unclear: {error}")
            return "ValueError"
        except Exception as error:
            self.expect(False, f"verify, unclear: {type(error).__name__}: {error}")
            return type(error).__name__
        self.expect(not report.sound or unchanged or manifest is None, "passes the check")
        return "sound" if report.sound else "not sound"

    def expect(self, holds, what):
        if not holds:
            self.wrong.append(f"{self.what}: {what}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    faulthandler.enable()
    fuzzer = Fuzzer(Path(sys.argv[1]), int(sys.argv[2]))
    fuzzer.run(int(sys.argv[3]))
    print(json.dumps({"loaded": fuzzer.loaded, "checked": fuzzer.checked, "wrong": fuzzer.wrong}))
