"""Writing speed against stock FFCV's DatasetWriter, on the same images with the same settings in one run.

    python benchmarks/writer.py --data IMAGE_FOLDER [--json FILE]

Writes a folder of class folders, its images repeated until there are --num_images, as JPEGs of at most 500 px a side in
quality 90: with `ffcv_ops.writing.writer` and with FFCV's ``DatasetWriter`` and ``RGBImageField`` on torchvision's
``ImageFolder``. Each write is a process of its own on as many CPUs as it has workers; the two take turns, --rounds
times. Prints the machine, the versions and a table of medians; leaves nothing behind.

Cases: ``as-is`` takes the images as they are, ``large`` scales them to 1280 px on the longer side first, so that every
one must be shrunk. ``verify`` compares `ffcv_ops.beton.verify` of the file with decoding its JPEGs one after the other.

``images/s`` and ``ratio`` are of the steady state, from the first progress that is reported to the end; ``ratio (CPU
time)`` counts the CPU seconds of all its processes meanwhile, the trustworthier on a busy machine. ``ratio (whole)`` is
of the process from its start to its end.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIDE, QUALITY, LARGE_SIDE = 500, 90, 1280
CASES = ("as-is", "large", "verify")


# --- the images


def prepare(data: Path, folder: Path, num_images: int, large: bool) -> None:
    """Link, or scale and link, the images of a folder until there are enough."""
    from PIL import Image

    images = sorted(path.resolve() for path in data.glob("*/*") if path.is_file())
    if not images:
        raise SystemExit(f"error: {data} holds no class folders with images")
    for number in range(num_images):
        image = images[number % len(images)]
        link = folder / "source" / image.parent.name / f"{number // len(images):05d}_{image.stem}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not large:
            link.symlink_to(image)
        elif number < len(images):
            original = Image.open(image).convert("RGB")
            ratio = LARGE_SIDE / max(original.size)
            size = round(ratio * original.width), round(ratio * original.height)
            original.resize(size, Image.Resampling.BICUBIC).save(link, quality=QUALITY)
        else:
            link.symlink_to(link.with_name(f"00000_{image.stem}.jpg"))


# --- peers: functions of (folder, number of workers, progress), each in a process of its own


def write_ours(folder: Path, num_workers: int, progress: Callable[[int, int], None]) -> None:
    from ffcv_ops.writing.plan import WriteSettings
    from ffcv_ops.writing.writer import write

    settings = WriteSettings(max_side=SIDE, quality=QUALITY)
    write(
        folder / "source", folder / "ours.beton", settings, overwrite=True, num_workers=num_workers,
        notice=lambda line: None, progress=progress,
    )  # fmt: skip


def write_stock(folder: Path, num_workers: int, progress: Callable[[int, int], None]) -> None:
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField
    from torchvision.datasets import ImageFolder

    class Bar:
        """Takes the place of the bar that FFCV shows."""

        def __init__(self, total: int):
            self.done, self.total = 0, total

        def update(self, count: int) -> None:
            self.done += count
            progress(self.done, self.total)

        def close(self) -> None:
            pass

    ffcv.writer.tqdm = Bar
    fields = {"image": RGBImageField("jpg", max_resolution=SIDE, jpeg_quality=QUALITY), "label": IntField()}
    writer = ffcv.writer.DatasetWriter(str(folder / "stock.beton"), fields, num_workers=num_workers)
    writer.from_indexed_dataset(ImageFolder(str(folder / "source")))


def verify_ours(folder: Path, num_workers: int, progress: Callable[[int, int], None]) -> None:
    from ffcv_ops.beton.verify import verify

    assert verify(folder / "ours.beton", num_workers=num_workers, progress=progress).sound


def decode_all(folder: Path, num_workers: int, progress: Callable[[int, int], None]) -> None:
    """Decode every JPEG of the file to RGB, in one process."""
    import numpy as np

    from ffcv_ops.beton.reading import read_beton
    from ffcv_ops.codec.jpeg import decode

    found = read_beton(folder / "ours.beton")
    data = np.fromfile(found.path, np.uint8)
    for number, (_, ptr, size) in enumerate(found.alloc_table.tolist()):
        decode(data[ptr : ptr + size])
        if number % 16 == 15 or number + 1 == found.num_samples:
            progress(number + 1, found.num_samples)


PEERS = {"ours": write_ours, "stock": write_stock, "verify": verify_ours, "decode": decode_all}


def serve(peer: str, folder: Path, num_workers: int) -> None:
    """Do one peer's work and print what was measured, as JSON."""
    marks: list[tuple[int, float, float]] = []

    def mark(done: int, total: int) -> None:
        if done and (not marks or done == total) and (not marks or marks[-1][0] < total):
            this = psutil.Process()
            used = [process.cpu_times() for process in (this, *this.children(recursive=True))]
            marks.append((done, time.monotonic(), sum(times.user + times.system for times in used)))

    PEERS[peer](folder, num_workers, mark)
    (first, start_s, start_cpu_s), (last, end_s, end_cpu_s) = marks
    measured = {"images": last - first, "wall_s": end_s - start_s, "cpu_s": end_cpu_s - start_cpu_s}
    print(json.dumps(measured), flush=True)
    # FFCV's worker may hang when all is written, and its parent with it.
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(0)


def run(peer: str, folder: Path, num_workers: int) -> dict[str, float]:
    cpus = sorted(os.sched_getaffinity(0))[:num_workers]
    start_s = time.monotonic()
    answer = subprocess.run(
        [sys.executable, __file__, "--serve", peer, str(folder), str(num_workers)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE, text=True, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )  # fmt: skip
    measured = json.loads(answer.stdout.splitlines()[-1])
    return measured | {"whole_s": time.monotonic() - start_s}


def measure(case: str, folder: Path, num_workers: int, rounds: int) -> dict[str, Any]:
    """Let the two peers take turns, compare."""
    names = ("verify", "decode") if case == "verify" else ("ours", "stock")
    for name in names:  # what they keep on disk between starts, they have from now on
        run(name, folder, num_workers)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(run(names[0], folder, num_workers))
        theirs.append(run(names[1], folder, num_workers))

    def rate(runs: list[dict[str, float]], clock: str) -> float:
        return statistics.median(one["images"] / one[clock] for one in runs)

    ratios = {clock: round(rate(ours, clock) / rate(theirs, clock), 2) for clock in ("wall_s", "cpu_s")}
    whole = statistics.median(one["whole_s"] for one in theirs) / statistics.median(one["whole_s"] for one in ours)
    return {
        "case": case,
        "num_workers": num_workers,
        "images_per_s": round(rate(ours, "wall_s"), 1),
        "peer_images_per_s": round(rate(theirs, "wall_s"), 1),
        "ratio": ratios["wall_s"],
        "cpu_ratio": ratios["cpu_s"],
        "whole_ratio": round(whole, 2),
    }


COLUMNS = {
    "case": "case", "num_workers": "workers", "images_per_s": "images/s", "peer_images_per_s": "peer's",
    "ratio": "ratio", "cpu_ratio": "ratio (CPU time)", "whole_ratio": "ratio (whole)",
}  # fmt: skip


def main() -> None:
    from loader import describe_machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders of images")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="cases to run (all)")
    parser.add_argument("--num_workers", nargs="+", type=int, default=[1, 2], help="numbers of workers (1 2)")
    parser.add_argument("--num_images", type=int, default=2048, help="images to write (2048)")
    parser.add_argument("--rounds", type=int, default=5, help="writes of each peer (5)")
    options = parser.parse_args()
    print(f"{describe_machine()}\n{' '.join(sys.argv)}\n", flush=True)
    print("| " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    results = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(options.data, folder, options.num_images, case == "large")
            if case == "verify":
                run("ours", folder, max(options.num_workers))
            for num_workers in options.num_workers if case != "verify" else [1]:
                row = measure(case, folder, num_workers, options.rounds)
                results.append(row)
                print("| " + " | ".join(f"{row[key]}" for key in COLUMNS) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] == "--serve":
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
