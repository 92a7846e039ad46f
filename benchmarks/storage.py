"""Loading, writing and training on a slow file system, against the same on a local disk, and against other code.

    apt-get install gcc pkg-config libfuse3-dev fuse3      # and access to /dev/fuse
    python benchmarks/storage.py --data IMAGE_FOLDER [--against CHECKOUT] [--json FILE]

Writes the images of a folder of class folders as one file of JPEGs of at most 500 px. Images are repeated until there
are --num_images. With 40,000 images, the file has more than 2 GB. Each measurement has a process of its own and reads
from the page cache ("local"), or from a fresh mount of `slow_file_system.c` whose cache is cold. "instant" does not
wait, so it shows what the file system itself costs on these CPUs. "near" is 500 us a lookup, 1 ms a read and 250 MB/s
a stream; "far" is 2 ms, 5 ms and 100 MB/s. The codes are "this" checkout, the one "against" which it is measured, and
"stock" FFCV. The kinds are

- RANDOM and QUASI_RANDOM: one epoch of random crops of 224 px, in images/s. QUASI_RANDOM is without the page cache.
- write: the writer on the folder of images, in images/s. The digests of one writer must be equal.
- boundary: seconds from the last step of an epoch to the first step of the next one, with validation, for a small
  network on 300 images. Data, logs and checkpoints are on the storage. Each value is the median of four boundaries.
- read_ahead: CPU seconds of an epoch from the page cache over those without reading ahead. Epochs of both take turns.

All cases take turns, --rounds times. The tables have medians. "of local" compares the same code on slow and local
storage, "of against" and "of stock" compare codes on the same storage. Reads and bytes are what the slow file system
counted in the first round. The file system itself takes time on the same CPUs.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORAGE = {"instant": (0, 0, 100_000), "near": (500, 1000, 250), "far": (2000, 5000, 100)}
LOADERS = {"RANDOM": True, "QUASI_RANDOM": False}
KINDS = [*LOADERS, "write", "boundary", "read_ahead"]
NUM_BOUNDARY_IMAGES, NUM_BOUNDARY_EPOCHS = 300, 6

Key = tuple[str, str, str]
"""Kind, code and storage of a case."""


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
        self.process: subprocess.Popen[str] | None = None

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
            self.process = process
            try:
                yield self.mount_point
            finally:
                process.send_signal(signal.SIGTERM)
                output, _ = process.communicate()
                self.counts = json.loads(output or "{}")
                if not output:  # it was killed
                    subprocess.run(["fusermount3", "-u", "-z", str(self.mount_point)], check=True)


# --- what a child measures: functions of a checkout, a path and the number of workers


def load(tree: str, path: Path, kind: str, num_workers: int) -> dict[str, float]:
    """Measure one epoch of random crops, by the loader of a checkout or by stock FFCV's ("stock")."""
    if tree == "stock":
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor

        def operations() -> dict[str, Any]:  # a loader changes those that it gets
            return {"image": [RandomResizedCropRGBImageDecoder((224, 224)), ToTensor()], "label": [IntDecoder()]}

    else:
        from ffcv_ops import Label, Loader, OrderOption, RandomResizedCrop

        def operations() -> dict[str, Any]:
            return {"image": [RandomResizedCrop(224)], "label": [Label()]}

    arguments = {"num_workers": num_workers, "os_cache": LOADERS[kind], "drop_last": False, "seed": 1}
    local = os.environ["LOCAL_FILE"]  # the first epoch compiles what has to be compiled
    for _ in Loader(local, 64, indices=list(range(256)), pipelines=operations(), **arguments):
        pass
    loader = Loader(path, 256, order=OrderOption[kind], pipelines=operations(), **arguments)
    start_s = time.perf_counter()
    num_images = sum(len(batch[1]) for batch in loader)
    return {"value": num_images / (time.perf_counter() - start_s)}


def write(tree: str, path: Path, kind: str, num_workers: int) -> dict[str, Any]:
    """Measure writing a folder with the writer of a checkout."""
    from ffcv_ops.writing.writer import write as write_file

    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        manifest = write_file(path, Path(folder) / "file.beton", num_workers=num_workers, notice=lambda text: None)
        elapsed_s = time.perf_counter() - start_s
    return {"value": manifest["num_samples"] / elapsed_s, "digest": manifest["digest"]}


def boundary(tree: str, path: Path, kind: str, num_workers: int) -> dict[str, float]:
    """Measure the time between the steps of two epochs, with a checkout's trainer."""
    import train_imagenet
    from ffcv_ops import read_beton
    from imagenet_training.training.trainer import Trainer

    begun_s, ended_s = [], []
    backward, optimizer_step = Trainer.backward, Trainer.optimizer_step

    def timed_backward(*arguments: Any, **options: Any) -> Any:
        begun_s.append(time.perf_counter())
        return backward(*arguments, **options)

    def timed_step(*arguments: Any, **options: Any) -> Any:
        result = optimizer_step(*arguments, **options)
        ended_s.append(time.perf_counter())
        return result

    Trainer.backward, Trainer.optimizer_step = timed_backward, timed_step  # type: ignore[method-assign]
    settings = {
        **{"model.arch": "shufflenet_v2_x0_5", "model.num_classes": read_beton(path).num_classes},
        **{"data.train_dataset": path, "data.val_dataset": path, "logging.folder": path.parent / f"run_{os.getpid()}"},
        **{"resolution.min_res": 64, "resolution.max_res": 64, "validation.resolution": 64},
        **{"validation.batch_size": 50, "training.batch_size": 50, "training.epochs": NUM_BOUNDARY_EPOCHS},
        **{"lr.lr_peak_epoch": 0, "lr.lr": 0.01, "logging.log_every": 1, "training.precision": 32, "wandb.enable": 0},
        "data.num_workers": num_workers,
    }
    sys.argv[1:] = [f"--{key}={value}" for key, value in settings.items()]
    with contextlib.redirect_stdout(sys.stderr):
        train_imagenet.main()
    num_steps = len(ended_s) // NUM_BOUNDARY_EPOCHS
    ends = range(num_steps, len(ended_s), num_steps)
    boundaries_s = [begun_s[step] - ended_s[step - 1] for step in ends]
    return {"value": statistics.median(boundaries_s[1:])}  # before the first one, kernels are loaded


def read_ahead(tree: str, path: Path, kind: str, num_workers: int) -> dict[str, float]:
    """Measure the CPU time of reading ahead a file that is in the page cache."""
    from ffcv_ops import Label, Loader, OrderOption, RandomResizedCrop

    class Plain(Loader):
        """Without reading ahead."""

        def _open_storage(self, ids: Any, buffers: Any) -> Any:
            storage = super()._open_storage(ids, buffers)
            storage.begin_batch = lambda number: None  # type: ignore[method-assign]
            return storage

    def operations() -> dict[str, Any]:
        return {"image": [RandomResizedCrop(224)], "label": [Label()]}

    arguments = {"num_workers": num_workers, "order": OrderOption.RANDOM, "drop_last": False, "seed": 1}
    loaders = [kind(path, 256, pipelines=operations(), **arguments) for kind in (Loader, Plain)]
    times_s: list[list[float]] = [[], []]
    for number in range(9):
        for which in (0, 1) if number % 2 else (1, 0):
            start_s = time.process_time()
            for _ in loaders[which].epoch(number):
                pass
            times_s[which].append(time.process_time() - start_s)
    ours, plain = (statistics.median(times[1:]) for times in times_s)
    return {"value": ours / plain}


MEASURES: dict[str, Callable[[str, Path, str, int], dict[str, Any]]] = {
    **dict.fromkeys(LOADERS, load),
    **{"write": write, "boundary": boundary, "read_ahead": read_ahead},
}


def measure(tree: str, kind: str, path: Path, num_workers: int, local_file: Path) -> dict[str, Any]:
    """Measure one case in a process of its own, with the packages of a checkout."""
    command = [sys.executable, __file__, "--child", tree, kind, str(path), "--num_workers", str(num_workers)]
    environment = {**os.environ, "LOCAL_FILE": str(local_file), "WANDB_MODE": "disabled"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} of {tree} failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the cases, in turns


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of class folders of JPEGs")
    parser.add_argument("--against", type=Path, help="another checkout, to measure in turns with this one")
    parser.add_argument("--num_images", type=int, default=2800, help="images of the file (2800); 40000 are 2 GB")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--storage", nargs="+", default=["local", *STORAGE], choices=["local", *STORAGE])
    parser.add_argument("--no_stock", action="store_true", help="leave out stock FFCV")
    parser.add_argument("--json", type=Path, help="also write the results to this file, after each round")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tree, kind, path = options.child
        if tree != "stock":
            sys.path.insert(0, tree)
        print(json.dumps(MEASURES[kind](tree, Path(path), kind, options.num_workers)))
        return
    if options.data is None:
        parser.error("--data is missing")
    with tempfile.TemporaryDirectory(prefix="ffcv_storage_") as scratch:
        run(options, Path(scratch))


def run(options: argparse.Namespace, scratch: Path) -> None:
    """Measure all cases in turns, and print tables of medians."""
    shown = scratch / "shown"
    files = {kind: shown / "file.beton" for kind in KINDS}
    files |= {"write": shown / "images", "boundary": shown / "small.beton"}
    write_file_of(options.data, shown / "images", files["RANDOM"], options.num_images, options.num_workers)
    if "boundary" in options.kinds:
        small = scratch / "small"
        write_file_of(options.data, small, files["boundary"], NUM_BOUNDARY_IMAGES, options.num_workers)
    slow = SlowFileSystem(shown, scratch)
    trees = {"this": str(ROOT), **({"against": str(options.against.resolve())} if options.against else {})}
    values: dict[Key, list[float]] = {}
    counts: dict[Key, dict[str, int]] = {}
    digests: set[tuple[str, str]] = set()
    start_s = time.monotonic()
    for number in range(options.rounds):
        for case in cases(options, trees):
            kind, code, storage = case
            mount = slow.mounted(*STORAGE[storage]) if storage in STORAGE else contextlib.nullcontext(shown)
            with mount as folder:
                path = folder / files[kind].relative_to(shown)
                result = measure(trees.get(code, code), kind, path, options.num_workers, files["RANDOM"])
            values.setdefault(case, []).append(result["value"])
            counts.setdefault(case, slow.counts if storage in STORAGE else {})
            if "digest" in result:
                digests.add((code, result["digest"]))
        elapsed_s = time.monotonic() - start_s
        print(f"round {number + 1} of {options.rounds}, {elapsed_s / 60:.1f} min", file=sys.stderr, flush=True)
        results = rows(values, counts, files["RANDOM"].stat().st_size)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    if len(digests) > len({code for code, _ in digests}):
        raise SystemExit(f"the digests of one writer differ: {sorted(digests)}")
    print_tables(results, files["RANDOM"].stat().st_size, options)


def cases(options: argparse.Namespace, trees: dict[str, str]) -> Iterator[Key]:
    """Yield all cases of a round."""
    for kind in options.kinds:
        codes = [*trees, *(["stock"] if kind == "RANDOM" and not options.no_stock else [])]
        for code in codes if kind != "read_ahead" else ["this"]:
            for storage in options.storage if kind != "read_ahead" else ["local"]:
                yield kind, code, storage


def rows(values: dict[Key, list[float]], counts: dict[Key, dict[str, int]], file_bytes: int) -> list[dict[str, Any]]:
    """Return a row for each case, with its median and its ratios to other cases."""
    medians = {case: statistics.median(measured) for case, measured in values.items()}
    results = []
    for (kind, code, storage), value in medians.items():
        row: dict[str, Any] = {"kind": kind, "code": code, "storage": storage, "value": value}
        row["values"] = values[kind, code, storage]
        others = {"of_local": (kind, code, "local"), "of_against": (kind, "against", storage)}
        others["of_stock"] = kind, "stock", storage
        row |= {name: value / medians[other] for name, other in others.items() if other in medians}
        row |= counts[kind, code, storage]
        if "bytes" in row and kind in LOADERS:
            row["of_file"] = row["bytes"] / file_bytes
        results.append(row)
    return results


def print_tables(results: list[dict[str, Any]], file_bytes: int, options: argparse.Namespace) -> None:
    """Print a table for each unit."""
    print(
        f"{options.num_images:,} images, {file_bytes / 1e6:,.0f} MB, {options.num_workers} workers, "
        f"medians of {options.rounds} rounds"
    )
    ratios = ("of_local", "of_against", "of_stock")
    units = {"images/s": (*LOADERS, "write"), "s": ("boundary",), "CPU time, of without": ("read_ahead",)}
    for unit, kinds in units.items():
        shown = [row for row in results if row["kind"] in kinds]
        if not shown:
            continue
        headers = ["kind", "code", "storage", unit, *(name.replace("_", " ") for name in ratios)]
        headers += ["reads", "MB read", "of file"]
        print(f"\n| {' | '.join(headers)} |\n|{'---|' * len(headers)}")
        for row in shown:
            value = f"{row['value']:,.0f}" if unit == "images/s" else f"{row['value']:.3f}"
            cells = [row["kind"], row["code"], row["storage"], value]
            cells += [f"{row[name]:.2f}" if name in row else "" for name in ratios]
            cells += [f"{row['reads']:,}", f"{row['bytes'] / 1e6:,.0f}"] if "reads" in row else ["", ""]
            cells.append(f"{row['of_file']:.2f}" if "of_file" in row else "")
            print(f"| {' | '.join(cells)} |")


def write_file_of(source: Path, images: Path, file: Path, num_images: int, num_workers: int) -> None:
    """Write so many images of a folder of class folders as a file, in a process of its own."""
    repeat_images(source, images, num_images)
    command = [sys.executable, str(ROOT / "write_beton.py"), "--source", str(images), "--target", str(file)]
    done = subprocess.run(
        [*command, "--num_workers", str(num_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the file could not be written:\n{done.stdout[-4000:]}")


def repeat_images(source: Path, target: Path, num_images: int) -> None:
    """Link the images of a folder of class folders into another one, under new names, until there are enough."""
    paths = sorted(path for path in source.glob("*/*") if path.is_file())
    if not paths:
        raise SystemExit(f"--data {source}: no images in class folders")
    for number in range(num_images):
        path = paths[number % len(paths)]
        link = target / path.parent.name / f"{number // len(paths)}_{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except OSError:  # another disk, or too many links
            link.write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
