"""What each way of writing a file costs and gives on this machine: the figures to choose max_side and quality by.

    python benchmarks/tuning.py --data IMAGE_FOLDER [--size 224] [--num_images 1281167]

Writes the images of a folder of class folders once for each row, then loads all files in turns with one worker:
--rounds passes each, of random-resized crops to --size px with flips. Prints the machine, the versions and two tables;
leaves nothing behind.

The first table: size of an image in kB; of --num_images in GB, which is the memory that holds the file; images written
and loaded by a core in a second; cores that 1,000 loaded images/s need, and what is read for them in MB/s; PSNR of the
crops that a network would see (CenterCrop of 0.875 and of 0.5 of the shorter side) against the same crops of the
original files by Pillow, the median of the images. The second table: one file under each order and way of reading it.
Rates are images by CPU seconds, all threads counted, and so hold on a busy machine too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loader import describe_machine
from PIL import Image

from ffcv_ops import CenterCrop, Label, Loader, OrderOption, RandomResizedCrop
from ffcv_ops.operations.crops import center_crops
from ffcv_ops.sources.folder import scan
from ffcv_ops.sources.image import load_image
from ffcv_ops.writing.encode import encode_image
from ffcv_ops.writing.plan import WriteSettings, build_plan
from ffcv_ops.writing.writer import write

BATCH_SIZE = 100
IMAGENET_NUM_TRAIN = 1_281_167
MIN_PASS = 900
RATIOS = (0.875, 0.5)
FILES: list[dict[str, Any]] = [
    *({"max_side": side, "quality": quality} for side in (256, 400, 500, 0) for quality in (90, 95)),
    {"max_side": 500, "mode": "proportion", "raw_share": 0.5},
    {"max_side": 256, "mode": "raw"},
    {"max_side": 400, "mode": "raw"},
]
READ_FILE = "--max_side 500 --quality 90"
READINGS = {
    "in_memory=1, order=random": (True, OrderOption.RANDOM),
    "in_memory=1, order=quasi_random": (True, OrderOption.QUASI_RANDOM),
    "in_memory=0, order=quasi_random": (False, OrderOption.QUASI_RANDOM),
}


@dataclass
class Row:
    """One file, or one way of reading it."""

    name: str
    path: Path
    written_per_s: float
    psnr: list[float]
    loader: Loader
    rates: list[float]

    @property
    def bytes_per_image(self) -> float:
        return float(self.loader.beton.alloc_table["size"].mean())


def flags(settings: dict[str, Any]) -> str:
    """The settings as they are given to write_beton.py."""
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def open_loader(path: Path, size: int, os_cache: bool, order: OrderOption) -> Loader:
    pipelines = {"image": [RandomResizedCrop(size)], "label": [Label()]}
    return Loader(path, BATCH_SIZE, num_workers=1, os_cache=os_cache, order=order, seed=0, pipelines=pipelines)


def write_file(data: Path, path: Path, settings: dict[str, Any], size: int) -> Row:
    """Write one file, time its encoding, and compare what a network would see of it with the originals."""
    chosen = WriteSettings(**settings)
    write(data, path, chosen, notice=lambda line: None)
    plan = build_plan(scan(data), chosen)
    originals = [load_image(data / plan.key(position)) for position in range(plan.num_images)]
    started = time.process_time()
    for position, raw in enumerate(plan.raw):
        encode_image(load_image(data / plan.key(position)), chosen, bool(raw))
    rate = plan.num_images / (time.process_time() - started)
    psnr = [mean_psnr(path, originals, size, ratio) for ratio in RATIOS]
    return Row(flags(settings), path, rate, psnr, open_loader(path, size, True, OrderOption.RANDOM), [])


def mean_psnr(path: Path, originals: list[np.ndarray], size: int, ratio: float) -> float:
    """PSNR in dB of a file's centre crops against Pillow's of the same part of the original images, the median."""
    pipelines = {"image": [CenterCrop(size, ratio=ratio)], "label": None}
    with Loader(path, BATCH_SIZE, num_workers=1, drop_last=False, copy=True, pipelines=pipelines) as loader:
        crops = np.concatenate([np.asarray(batch[0]) for batch in loader])
        fields = loader.beton.metadata["f0"]
    heights, widths = (fields[name].astype(np.int64) for name in ("height", "width"))
    boxes = center_crops(heights, widths, size, ratio, None)
    values = []
    for original, crop, box, height, width in zip(originals, crops, boxes, heights, widths, strict=True):
        y, x, h, w = box
        down, across = original.shape[0] / height, original.shape[1] / width
        part = (x * across, y * down, (x + w) * across, (y + h) * down)
        expected = Image.fromarray(original).resize((size, size), Image.Resampling.BILINEAR, box=part)
        error = np.square(crop.astype(float) - np.asarray(expected)).mean()
        values.append(10 * np.log10(255**2 / max(error, 1e-3)))
    return statistics.median(values)


def run_pass(row: Row) -> None:
    """Load whole epochs until there are enough images to time."""
    started, num_images = time.process_time(), 0
    while num_images < MIN_PASS:
        num_images += sum(len(batch[0]) for batch in row.loader)
    row.rates.append(num_images / (time.process_time() - started))


def measure(rows: list[Row], rounds: int) -> None:
    """Let the rows take turns; a first pass warms pages, kernels and buffers."""
    for number in range(rounds + 1):
        for row in rows:
            run_pass(row)
            if not number:
                row.rates.clear()


def show_files(rows: list[Row], num_images: int) -> None:
    columns = ["written with", "kB an image", f"GB of {num_images:,}", "written/s", "loaded/s", "cores", "MB/s"]
    print("| " + " | ".join([*columns, *(f"PSNR {ratio:g}" for ratio in RATIOS)]) + " |")
    print("|---" * (len(columns) + len(RATIOS)) + "|")
    for row in rows:
        size, rate = row.bytes_per_image, statistics.median(row.rates)
        figures = f"{size / 1e3:.1f} | {size * num_images / 1e9:.0f} | {row.written_per_s:.0f} | {rate:.0f}"
        quality = " | ".join(f"{value:.1f}" for value in row.psnr)
        print(f"| `{row.name}` | {figures} | {1000 / rate:.2f} | {size / 1e3:.0f} | {quality} |")


def show_readings(rows: list[Row]) -> None:
    print("| read with | loaded/s | of the first |\n|---|---|---|")
    first = statistics.median(rows[0].rates)
    for row in rows:
        rate = statistics.median(row.rates)
        print(f"| `{row.name}` | {rate:.0f} | {rate / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders of images")
    parser.add_argument("--size", type=int, default=224, help="side of the crops in px (224)")
    parser.add_argument("--num_images", type=int, default=IMAGENET_NUM_TRAIN, help="images to reckon GB for (ImageNet)")
    parser.add_argument("--rounds", type=int, default=5, help="passes over each file (5)")
    options = parser.parse_args()
    print(f"{describe_machine()}\n{' '.join(sys.argv)}\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        files = [
            write_file(options.data, Path(name) / f"{number}.beton", settings, options.size)
            for number, settings in enumerate(FILES)
        ]
        measure(files, options.rounds)
        show_files(files, options.num_images)
        path = next(row.path for row in files if row.name == READ_FILE)
        readings = [
            Row(reading, path, 0.0, [], open_loader(path, options.size, *arguments), [])
            for reading, arguments in READINGS.items()
        ]
        measure(readings, options.rounds)
        print(f"\n`{READ_FILE}`, crops of {options.size} px:\n")
        show_readings(readings)


if __name__ == "__main__":
    main()
