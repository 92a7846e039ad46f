"""Loading and writing on a slow file system, against the same on a local disk, stock FFCV and another checkout.

    apt-get install gcc pkg-config libfuse3-dev fuse3      # and access to /dev/fuse
    python benchmarks/storage.py --data IMAGE_FOLDER [--against CHECKOUT] [--json FILE]

Writes the images of a folder of class folders as one file of JPEGs of at most 500 px; images are repeated until there
are --num_images. Then it loads random crops of 224 px, with --num_workers workers, in a process of its own for each
measurement: from the page cache ("local"), and from a fresh mount of `slow_file_system.c` whose cache is cold. "near"
is 500 us a lookup, 1 ms a read and 250 MB/s a stream; "far" is 2 ms, 5 ms and 100 MB/s. All cases take turns, --rounds
times; the table has medians. A ratio compares the same code on slow and local storage. Reads and bytes are what the
slow file system counted in the first round. The file system itself takes time on the same CPUs.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORAGE = {"near": (500, 1000, 250), "far": (2000, 5000, 100)}
LOADERS = {"RANDOM": True, "QUASI_RANDOM": False}


class SlowFileSystem:
    """Mounts of one folder.

    Parameters
    ----------
    folder : Path
        The folder to show.
    scratch : Path
        Gets the program and the mount point.
    """

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.program, self.mount_point = folder, scratch / "slow_file_system", scratch / "mount"
        self.mount_point.mkdir()
        flags = subprocess.check_output(["pkg-config", "--cflags", "--libs", "fuse3"], text=True)
        source = str(Path(__file__).with_name("slow_file_system.c"))
        subprocess.run(["cc", "-O2", "-o", str(self.program), source, *flags.split()], check=True)
        self.counts: dict[str, int] = {}

    @contextlib.contextmanager
    def mounted(self, lookup_us: int, read_us: int, mb_per_s: int, *options: str) -> Iterator[Path]:
        """Mount the folder with a cold cache. `counts` has what was read, after the end."""
        numbers = ["--lookup_us", str(lookup_us), "--read_us", str(read_us), "--mb_per_s", str(mb_per_s)]
        command = [str(self.program), str(self.folder), str(self.mount_point), *numbers, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while not os.path.ismount(self.mount_point):
                if process.poll() is not None:
                    raise SystemExit("the slow file system cannot be mounted: is there /dev/fuse, and may you use it?")
                time.sleep(0.01)
            try:
                yield self.mount_point
            finally:
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate()
                self.counts = json.loads(output)


def load(tree: str, path: str, order: str, num_workers: int) -> float:
    """Return the images/s of one epoch of random crops, by the loader of a checkout or by stock FFCV's ("stock")."""
    if tree == "stock":
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor

        def operations() -> dict[str, Any]:  # a loader changes those that it gets
            return {"image": [RandomResizedCropRGBImageDecoder((224, 224)), ToTensor()], "label": [IntDecoder()]}

    else:
        sys.path.insert(0, tree)
        from ffcv_ops import Label, Loader, OrderOption, RandomResizedCrop

        def operations() -> dict[str, Any]:
            return {"image": [RandomResizedCrop(224)], "label": [Label()]}

    arguments = {"num_workers": num_workers, "os_cache": LOADERS[order], "drop_last": False, "seed": 1}
    local = os.environ["LOCAL_FILE"]  # the first epoch compiles what has to be compiled
    for _ in Loader(local, 64, indices=list(range(256)), pipelines=operations(), **arguments):
        pass
    loader = Loader(path, 256, order=OrderOption[order], pipelines=operations(), **arguments)
    start_s = time.perf_counter()
    num_images = sum(len(batch[1]) for batch in loader)
    return num_images / (time.perf_counter() - start_s)


def write(tree: str, source: str, num_workers: int) -> tuple[float, str]:
    """Return the images/s and the digest of writing a folder with the writer of a checkout."""
    sys.path.insert(0, tree)
    from ffcv_ops.writing.writer import write as write_file

    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        manifest = write_file(source, Path(folder) / "file.beton", num_workers=num_workers, notice=lambda text: None)
        elapsed_s = time.perf_counter() - start_s
    return manifest["num_samples"] / elapsed_s, manifest["digest"]


def measure(tree: str, kind: str, path: Path, num_workers: int, local_file: Path) -> Any:
    """Run `load` or `write` in a process of its own."""
    command = [sys.executable, __file__, "--child", tree, kind, str(path), "--num_workers", str(num_workers)]
    environment = {**os.environ, "LOCAL_FILE": str(local_file)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of class folders of JPEGs")
    parser.add_argument("--against", type=Path, help="another checkout, to measure in turns with this one")
    parser.add_argument("--num_images", type=int, default=2800)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=[*LOADERS, "write"], choices=[*LOADERS, "write"])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tree, kind, path = options.child
        measured = (
            write(tree, path, options.num_workers) if kind == "write" else load(tree, path, kind, options.num_workers)
        )
        print(json.dumps(measured))
        return
    if options.data is None:
        parser.error("--data is missing")
    with tempfile.TemporaryDirectory(prefix="ffcv_storage_") as scratch:
        results = run(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def run(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Measure all cases in turns, and print a table of medians."""
    shown = scratch / "shown"
    repeat_images(options.data, shown / "images", options.num_images)
    file = shown / "file.beton"
    sys.path.insert(0, str(ROOT))
    from ffcv_ops.writing.writer import write as write_file

    write_file(shown / "images", file, num_workers=options.num_workers, notice=lambda text: None)
    slow = SlowFileSystem(shown, scratch)
    trees = {"this": str(ROOT), **({"against": str(options.against.resolve())} if options.against else {})}
    cases = [(kind, name) for kind in options.kinds for name in (*trees, *(["stock"] if kind == "RANDOM" else []))]
    rates: dict[tuple[str, str, str], list[float]] = {}
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    digests = set()
    for _ in range(options.rounds):
        for kind, name in cases:
            for storage in ("local", *STORAGE):
                mount = slow.mounted(*STORAGE[storage]) if storage in STORAGE else contextlib.nullcontext(shown)
                with mount as folder:
                    path = folder / ("images" if kind == "write" else file.name)
                    result = measure(trees.get(name, name), kind, path, options.num_workers, file)
                if kind == "write":
                    result, digest = result
                    digests.add((name, digest))
                rates.setdefault((kind, name, storage), []).append(result)
                counts.setdefault((kind, name, storage), slow.counts if storage in STORAGE else {})
    assert len(digests) == len({name for name, _ in digests}), f"the digests of one writer differ: {digests}"
    return table(rates, counts, file)


def table(rates: dict[Any, list[float]], counts: dict[Any, dict[str, int]], file: Path) -> list[dict[str, Any]]:
    """Print the medians, and return them."""
    print(f"file: {file.stat().st_size / 1e6:.0f} MB\n")
    print("| case | code | storage | images/s | of local | reads | MB read |\n|---|---|---|---|---|---|---|")
    results = []
    for (kind, name, storage), values in rates.items():
        rate, local = statistics.median(values), statistics.median(rates[kind, name, "local"])
        of = counts[kind, name, storage]
        row = {"case": kind, "code": name, "storage": storage, "images_per_s": rate, "of_local": rate / local, **of}
        results.append(row)
        read = f"{of['reads']:,} | {of['bytes'] / 1e6:.0f}" if of else "|"
        print(f"| {kind} | {name} | {storage} | {rate:,.0f} | {rate / local:.2f} | {read} |")
    return results


def repeat_images(source: Path, target: Path, num_images: int) -> None:
    """Link the images of a folder of class folders into another one, under new names, until there are enough."""
    paths = sorted(path for path in source.glob("*/*") if path.is_file())
    for number in range(num_images):
        path = paths[number % len(paths)]
        link = target / path.parent.name / f"{number // len(paths)}_{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
