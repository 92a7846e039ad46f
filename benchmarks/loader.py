"""Loading speed per core against stock FFCV, torchvision and DALI, on the same images in one run.

    python benchmarks/loader.py --data IMAGE_FOLDER [--against CHECKOUT] [--slipstream CHECKOUT] [--json FILE]

Writes the images of a folder of class folders at each case's side, once with FFCV's own writer and once with ours, in
the same quality; images are repeated until there are --num_images. Each peer then decodes random-resized crops with
flips into batches of 256 in a process of its own, all on one core with one worker, taking turns: one pass each,
--rounds times. Prints the machine, the versions and a table of medians; leaves nothing behind. ``--json`` writes a list
of objects: ``case``, ``peer``, ``images_per_s``, ``peer_images_per_s``, ``ratio``, the same by CPU time as
``cpu_ratio`` (equal on an idle machine, and the trustworthier on a busy one), peak memory, and the time from process
start to first batch at the second start.

Cases: ``jpg500-224`` is JPEG of at most 500 px a side decoded to 224 px; ``raw256-224`` raw pixels of at most 256 px.
Peers: ``stock`` (FFCV's writer and loader), ``stock-file`` (FFCV's file in our loader, against stock), ``torchvision``
(ImageFolder and DataLoader on the same JPEGs), ``dali`` (CPU pipeline with image_random_crop; where installed). Two
compare our loader with bicubic crops, RandAugment and Mixup or CutMix, as ResNet Strikes Back trains: ``timm`` does the
same through Pillow and timm's own collation, ``augmented`` is stock FFCV with none of it.

``--against`` names another checkout of this project. Three more peers compare with it: ``before``,
``before-stock-file`` and ``before-augmented``, the first and the last with files that this checkout writes.
``--slipstream`` names a checkout of slipstream with its C++ extension built and its dependencies importable. The peers
are ``slipstream`` (its cache of the same JPEGs) and ``slipstream-yuv420`` (its cache of decoded YUV planes).
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = ("jpg500-224", "jpg500-160", "jpg500-128", "jpg256-224", "raw256-224")
BATCH_SIZE = 256
QUALITY = 90
# Decoding whole originals in Python takes its time; a pass over a part of the images measures it as well.
SLOW_PASS = 2 * BATCH_SIZE


def parse(case: str) -> tuple[str, int, int]:
    """'jpg500-224' -> ('jpg', 500, 224)."""
    stored, size = case.split("-")
    return stored[:3], int(stored[3:]), int(size)


# --- files


def environment_of(checkouts: list[Path]) -> dict[str, str]:
    """Return the environment of a process that imports the packages of these checkouts."""
    paths = [*map(str, checkouts), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def write_files(data: Path, folder: Path, mode: str, side: int, num_images: int, against: Path | None) -> None:
    """Write <folder>/{stock,ours,before}.beton and, of JPEG modes, the stock file's payloads to <folder>/jpegs."""
    import cv2
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    from ffcv_ops.sources.image import load_image
    from ffcv_ops.writing.encode import shrink
    from ffcv_ops.writing.plan import WriteSettings
    from ffcv_ops.writing.writer import write

    images = sorted(path for path in data.glob("*/*") if path.is_file())
    if not images:
        raise SystemExit(f"error: {data} holds no class folders with images")
    source = folder / "source"
    for number in range(num_images):
        image = images[number % len(images)]
        link = source / image.parent.name / f"{number // len(images):05d}_{image.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())
    settings = WriteSettings(mode=mode, max_side=side, quality=QUALITY)
    write(source, folder / "ours.beton", settings, notice=lambda line: None)
    if against:
        code = (
            "import sys; from ffcv_ops.writing.plan import WriteSettings; from ffcv_ops.writing.writer import write\n"
            "if __name__ == '__main__':\n"
            f"    settings = WriteSettings(mode={mode!r}, max_side={side}, quality={QUALITY})\n"
            "    write(sys.argv[1], sys.argv[2], settings, notice=lambda line: None)\n"
        )
        script = folder / "write_before.py"
        script.write_text(code)
        command = [sys.executable, str(script), str(source), str(folder / "before.beton")]
        subprocess.run(command, check=True, env=environment_of([against]))
    fields = {"image": RGBImageField(write_mode=mode, max_resolution=side, jpeg_quality=QUALITY), "label": IntField()}
    loaded = ImageFolder(str(source), loader=load_image)
    DatasetWriter(str(folder / "stock.beton"), fields, num_workers=1).from_indexed_dataset(loaded)
    if mode != "jpg":
        return
    for path, _ in loaded.samples[: max(SLOW_PASS, len(images))]:
        target = folder / "jpegs" / Path(path).parent.name / f"{Path(path).stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        bgr = shrink(load_image(path), side)[:, :, ::-1]
        cv2.imwrite(str(target), bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


# --- peers: functions (folder, size) -> iterable of (images, labels), to be iterated once a pass


def build_ours(folder: Path, size: int, file: str = "ours.beton") -> Any:
    from ffcv.fields.basics import IntDecoder
    from ffcv.transforms import ToTensor

    from ffcv_ops import Loader, OrderOption, RandomResizedCrop

    pipelines = {"image": [RandomResizedCrop(size), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    return Loader(folder / file, BATCH_SIZE, num_workers=1, order=OrderOption.RANDOM, seed=0, pipelines=pipelines)


def build_stock_file(folder: Path, size: int) -> Any:
    return build_ours(folder, size, "stock.beton")


def build_before(folder: Path, size: int) -> Any:
    return build_ours(folder, size, "before.beton")


AUGMENTATION = "rand-m7-mstd0.5-inc1"
MIXING: dict[str, Any] = {"mixup_alpha": 0.1, "cutmix_alpha": 1.0, "num_classes": 1000}


def build_augmented(folder: Path, size: int, file: str = "ours.beton") -> Any:
    from ffcv.transforms import ToTensor

    from ffcv_ops import Label, Loader, Mix, OrderOption, RandAugment, RandomResizedCrop

    mix = Mix(**MIXING)
    image = [RandomResizedCrop(size, interpolation="bicubic"), RandAugment(AUGMENTATION), mix.images(), ToTensor()]
    pipelines = {"image": image, "label": [Label(), mix.targets()]}
    return Loader(folder / file, BATCH_SIZE, num_workers=1, order=OrderOption.RANDOM, seed=0, pipelines=pipelines)


def build_before_augmented(folder: Path, size: int) -> Any:
    return build_augmented(folder, size, "before.beton")


def build_timm(folder: Path, size: int) -> Any:
    import torch
    from timm.data import FastCollateMixup, create_transform
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    steps = create_transform(
        size, is_training=True, auto_augment=AUGMENTATION, interpolation="bicubic", use_prefetcher=True
    )
    images = ImageFolder(str(folder / "jpegs"), steps)
    collate = FastCollateMixup(label_smoothing=0.0, **MIXING)
    return torch.utils.data.DataLoader(
        images, BATCH_SIZE, shuffle=True, num_workers=0, collate_fn=collate, drop_last=True
    )


def build_stock(folder: Path, size: int) -> Any:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    return Loader(
        str(folder / "stock.beton"), BATCH_SIZE, num_workers=1, os_cache=True, order=OrderOption.RANDOM, seed=0,
        pipelines=pipelines,
    )  # fmt: skip


def build_torchvision(folder: Path, size: int) -> Any:
    import torch
    from torchvision import datasets, transforms

    torch.set_num_threads(1)
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    images = datasets.ImageFolder(str(folder / "jpegs"), transforms.Compose(steps))
    # In the process itself, which on one core is its best case: nothing is passed between processes.
    return torch.utils.data.DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=0)


def build_dali(folder: Path, size: int) -> Any:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    # Nothing is prepared between passes, while it is another peer's turn.
    @pipeline_def(
        batch_size=BATCH_SIZE, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False, exec_dynamic=False
    )
    def build() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(folder / "jpegs"), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(jpegs, device="cpu", random_area=(0.08, 1.0))
        images = fn.resize(images, size=(size, size), interp_type=types.INTERP_TRIANGULAR)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipeline = build()
    pipeline.build()
    return DALIGenericIterator(
        pipeline, ["images", "labels"], reader_name="reader", auto_reset=True, prepare_first_batch=False,
        last_batch_policy=LastBatchPolicy.PARTIAL,
    )  # fmt: skip


def build_slipstream(folder: Path, size: int, image_format: str = "jpeg") -> Any:
    from slipstream import SlipstreamLoader
    from slipstream.decoders import DecodeRandomResizedCrop
    from slipstream.readers.imagefolder import SlipstreamImageFolder
    from slipstream.transforms import RandomHorizontalFlip

    decode = DecodeRandomResizedCrop(size, num_threads=1, to_tensor=True)
    # Its own reader of FFCV's files takes those of FFCV 1.0.2 for another kind: the same JPEGs come from the folder.
    images = SlipstreamImageFolder(str(folder / "jpegs"), cache_dir=folder / "slipstream")
    # Its flip is of the last axis; a permuted view costs less than its own copy to channels first.
    pipeline = [decode, lambda images: images.permute(0, 3, 1, 2), RandomHorizontalFlip()]
    return SlipstreamLoader(
        images, BATCH_SIZE, drop_last=False, pipelines={"image": pipeline},
        image_format=image_format, use_threading=False, verbose=False,
    )  # fmt: skip


def build_slipstream_yuv420(folder: Path, size: int) -> Any:
    return build_slipstream(folder, size, "yuv420")


def has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


BUILDERS: dict[str, Callable[[Path, int], Any]] = {
    "ours": build_ours,
    "stock-file": build_stock_file,
    "augmented": build_augmented,
    "stock": build_stock,
    "torchvision": build_torchvision,
    "timm": build_timm,
    "dali": build_dali,
    "before": build_before,
    "before-stock-file": build_stock_file,
    "before-augmented": build_before_augmented,
    "slipstream": build_slipstream,
    "slipstream-yuv420": build_slipstream_yuv420,
}
# What each row compares: ours, and the other.
PEERS = {
    "stock": ("ours", "stock"),
    "stock-file": ("stock-file", "stock"),
    "torchvision": ("ours", "torchvision"),
    "dali": ("ours", "dali"),
    "timm": ("augmented", "timm"),
    "augmented": ("augmented", "stock"),
    "before": ("ours", "before"),
    "before-stock-file": ("stock-file", "before-stock-file"),
    "before-augmented": ("augmented", "before-augmented"),
    "slipstream": ("ours", "slipstream"),
    "slipstream-yuv420": ("ours", "slipstream-yuv420"),
}
OF_RAW_FILES = ("stock", "before")


def count(batch: Any) -> int:
    if isinstance(batch, dict):
        return len(batch["image"])
    return len(batch[0]["images"] if isinstance(batch[0], dict) else batch[0])


def serve(peer: str, folder: Path, size: int) -> None:
    """A peer's process: report the first batch, then one pass for each line of input."""
    loader = BUILDERS[peer](folder, size)
    imported_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    batches = iter(loader)
    next(batches)
    print(json.dumps({"first_batch_at": time.time(), "imported_mb": imported_mb}), flush=True)
    for _ in batches:  # warms the file's pages and whatever is compiled or allocated late
        pass
    for _ in sys.stdin:
        start, start_cpu, num_images = time.perf_counter(), time.process_time(), 0
        for batch in loader:
            num_images += count(batch)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"images": num_images, "wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": peak_mb}), flush=True)


class Peer:
    """A peer's process, as seen from here."""

    def __init__(self, name: str, folder: Path, size: int, core: int, checkout: Path):
        command = [sys.executable, __file__, "--serve", name, str(folder), str(size)]
        started = time.time()
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment_of([checkout]), preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        first = self._answer()
        self.first_batch_s = first["first_batch_at"] - started
        self.imported_mb = first["imported_mb"]
        self.passes: list[dict[str, float]] = []

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        raise SystemExit(f"error: a peer ended:\n{self.errors.read()}")

    def run_pass(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.passes.append(self._answer())

    def close(self) -> None:
        self.process.communicate()

    def images_per_s(self, clock: str) -> float:
        return statistics.median(one["images"] / one[clock] for one in self.passes)

    @property
    def peak_mb(self) -> float:
        return self.passes[-1]["peak_mb"]


def builders_of(names: list[str]) -> list[str]:
    """The builders that the peers' rows compare, each once."""
    return list(dict.fromkeys(builder for name in names for builder in PEERS[name]))


def measure(
    folder: Path, case: str, names: list[str], rounds: int, core: int, checkouts: dict[str, Path]
) -> Iterator[dict[str, Any]]:
    """Let the peers take turns, compare."""
    size = parse(case)[2]
    peers = {name: Peer(name, folder, size, core, checkouts[name]) for name in builders_of(names)}
    for _ in range(rounds):
        for peer in peers.values():
            peer.run_pass()
    for peer in peers.values():
        peer.close()
    for name in names:
        ours, other = (peers[builder] for builder in PEERS[name])
        yield {
            "case": case,
            "peer": name,
            "images_per_s": round(ours.images_per_s("wall_s"), 1),
            "peer_images_per_s": round(other.images_per_s("wall_s"), 1),
            "ratio": round(ours.images_per_s("wall_s") / other.images_per_s("wall_s"), 2),
            "cpu_ratio": round(ours.images_per_s("cpu_s") / other.images_per_s("cpu_s"), 2),
            "peak_rss_mb": round(ours.peak_mb),
            "peer_peak_rss_mb": round(other.peak_mb),
            "loader_rss_mb": round(ours.peak_mb - ours.imported_mb),
            "peer_loader_rss_mb": round(other.peak_mb - other.imported_mb),
            "first_batch_s": round(ours.first_batch_s, 2),
            "peer_first_batch_s": round(other.first_batch_s, 2),
        }


# --- report


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        model = next((value.strip() for key, value in lines if key.strip() == "model name"), model)
    packages = ["ffcv", "numba", "numpy", "opencv-python", "pillow", "timm", "torch", "torchvision"]
    packages += [name for name in packages_distributions().get("nvidia", []) if "dali" in name]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}\n{versions}"


COLUMNS = {
    "case": "case", "peer": "peer", "images_per_s": "images/s", "peer_images_per_s": "peer's", "ratio": "ratio",
    "cpu_ratio": "ratio (CPU time)", "peak_rss_mb": "peak MB", "peer_peak_rss_mb": "peer's",
    "loader_rss_mb": "of it loader", "peer_loader_rss_mb": "peer's", "first_batch_s": "first batch s",
    "peer_first_batch_s": "peer's",
}  # fmt: skip


def show(row: dict[str, Any]) -> str:
    return "| " + " | ".join(f"{row[key]}" for key in COLUMNS) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders of images")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="cases to run (all)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="peers (all)")
    parser.add_argument("--num_images", type=int, default=2560, help="images a file holds (2560)")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each peer (5)")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--slipstream", type=Path, help="a checkout of slipstream")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="CPU that all peers run on")
    options = parser.parse_args()
    print(f"{describe_machine()}\n{' '.join(sys.argv)}\n", flush=True)
    print("| " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    results: list[dict[str, Any]] = []
    written: dict[str, tempfile.TemporaryDirectory] = {}
    started: set[str] = set()
    absent = {"dali": not has_dali(), "before": not options.against, "slipstream": not options.slipstream}
    there = [peer for peer in PEERS if peer in options.peers and not absent.get(peer.split("-")[0])]
    checkouts = {"before": options.against, "slipstream": options.slipstream}
    checkouts = {name: (checkouts.get(name.split("-")[0]) or ROOT).resolve() for name in BUILDERS}
    for case in options.cases:
        mode, side, _ = parse(case)
        stored = case.split("-")[0]
        if stored not in written:
            written = {stored: tempfile.TemporaryDirectory()}
            folder = Path(written[stored].name)
            write_files(options.data, folder, mode, side, options.num_images, options.against and checkouts["before"])
        folder = Path(written[stored].name)
        names = [name for name in there if mode == "jpg" or name in OF_RAW_FILES]
        for builder in builders_of(names):
            if builder not in started:  # what it keeps on disk between starts, it has from now on
                Peer(builder, folder, parse(case)[2], options.core, checkouts[builder]).close()
                started.add(builder)
        for row in measure(folder, case, names, options.rounds, options.core, checkouts):
            results.append(row)
            print(show(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] == "--serve":
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
