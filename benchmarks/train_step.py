"""Speed of training: the model alone, the trainer on a file, and ffcv-imagenet's own script on the same file.

    python benchmarks/train_step.py --data IMAGE_FOLDER --ffcv_imagenet CHECKOUT [--json FILE] [--profile FILE]

Writes the images of a folder of class folders into one ``.beton`` with ``write_beton.py``, repeated until an epoch has
--batches batches. ``--beton`` names a file to use instead. For every size, batch size and precision three processes
take turns, --rounds times:

``model``    the bare step: forward, loss, backward, optimizer, on one batch that lies on the device
``trainer``  ``train_imagenet.py``'s own epoch on the file: reading, decoding, mixing, metrics and all
``peer``     ``train_imagenet.py`` of a checkout of github.com/libffcv/ffcv-imagenet, its own epoch on the same file

The first --warmup batches of a pass are not timed. Prints machine, versions and command, and a table of medians with
the ratios trainer / model and trainer / peer. The peer has no torch.compile, and of precisions only 16-bit floats. It
is run with three replacements, none of them in its step: a stand-in for torchmetrics (only its evaluation uses it, with
arguments that no longer exist), normalisation in PyTorch where cupy is not installed, and, on a machine without a GPU,
where it would not start, the CPU in place of ``cuda:0``.

``--profile`` writes, as JSON, where the time of a step of the trainer goes: for each part the host's time and the
device's, and for how long the device had nothing to do.

On a CPU, to see it work:

    python benchmarks/train_step.py --data IMAGE_FOLDER --arch resnet18 --sizes 32 --batch_sizes 8 --batches 16 \
        --precisions 32
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PARTS = ("model", "trainer", "peer")
# ResNet-50 at 224 px on one A100: NVIDIA's DeepLearningExamples with DALI, and a run from folders of images.
PUBLISHED = {"DALI on an A100": 2470, "image folders on an A100": 237}
TARGETS = {"trainer / model": 0.97, "trainer / peer": 1.2}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Timed:
    """Batches of a loader, ``count`` of them, that start a clock when the first ``warmup`` are over."""

    def __init__(self, loader: Any, warmup: int, count: int):
        self.loader, self.warmup, self.count, self.start_s = loader, warmup, count, 0.0

    def __len__(self) -> int:
        return self.count

    @property
    def storage_wait_s(self) -> float:
        return self.loader.storage_wait_s

    def __iter__(self) -> Iterator[Any]:
        return self._watch(iter(self.loader))

    def epoch(self, epoch: int, *, skip_samples: int = 0) -> Iterator[Any]:
        return self._watch(self.loader.epoch(epoch, skip_samples=skip_samples))

    def _watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number in range(self.count):
            batch = next(batches)
            if number == self.warmup:
                synchronize()
                self.start_s = time.perf_counter()
            yield batch


# --- the three parts: functions of the options that return a function, which does a pass and returns images/s


def build_run(options: argparse.Namespace, *, prepare: bool = True) -> tuple[Any, Any, Any]:
    """Build a run as ``train_imagenet.py`` does: the run, its training loader and a log of progress lines."""
    import train_imagenet
    from ffcv_ops import read_beton
    from imagenet_training.data.loaders import build_loaders
    from imagenet_training.planning.recipe import read_recipe
    from imagenet_training.reports.logs import RunLog
    from imagenet_training.training.meters import EtaEstimator
    from imagenet_training.training.step_mode import prepare_step

    settings = {
        "model.arch": options.arch,
        "model.num_classes": read_beton(options.file).num_classes,
        "data.train_dataset": options.file,
        "data.val_dataset": options.file,
        "data.num_workers": options.num_workers,
        "resolution.min_res": options.size,
        "resolution.max_res": options.size,
        "augmentation.mixup_alpha": 0.2,
        "augmentation.cutmix_alpha": 1.0,
        "training.batch_size": options.batch_size,
        "training.precision": options.precision,
        "training.compile": options.compile,
        "training.epochs": 1,
        "lr.lr_peak_epoch": 0,
        "lr.lr": 0.01,
        "logging.folder": options.folder,
        "wandb.enable": 0,
    }
    recipe = read_recipe([f"--{key}={value}" for key, value in settings.items()])
    run = train_imagenet.build(recipe, *train_imagenet.join_run(recipe))
    log = RunLog(Path(options.folder), is_main=True, eta=EtaEstimator([options.size], options.batches), log_every=50)
    if prepare:
        prepare_step(run.trainer, options.batch_size, options.size, log)
    return run, build_loaders(recipe, run.plan, run.data, run.world).train, log


def build_model(options: argparse.Namespace) -> Callable[[], float]:
    from imagenet_training.models.precision import autocast

    run, loader, _ = build_run(options)
    trainer = run.trainer
    images, targets = (part.clone() for part in next(loader.epoch(0)))
    loader.close()
    trainer.model.train()

    def steps(count: int) -> None:
        for number in range(count):
            if trainer.recorded is not None:
                trainer.backward(images, targets, number=0, place=(number,))
                trainer.optimizer_step(0.01, step=number)
                continue
            with autocast(trainer.world.device, trainer.precision):
                logits = trainer.model(images)
            trainer.scaler.scale(trainer.loss(logits, targets)).backward()
            trainer.scaler.step(trainer.optimizer)
            trainer.scaler.update()
            trainer.optimizer.zero_grad(set_to_none=True)

    def run_pass() -> float:
        steps(options.warmup)
        synchronize()
        start_s = time.perf_counter()
        steps(options.batches - options.warmup)
        synchronize()
        return (options.batches - options.warmup) * options.batch_size / (time.perf_counter() - start_s)

    return run_pass


def train_once(run: Any, loader: Any, log: Any, num_batches: int) -> dict[str, float]:
    """Train one epoch of so many batches, with progress lines. Return what `train_epoch` measured."""
    from imagenet_training.state import TrainState
    from imagenet_training.training.epoch import train_epoch
    from imagenet_training.training.preemption import StopRequest

    plan = dataclasses.replace(run.plan, steps_per_epoch=num_batches)
    stop = StopRequest(run.world)
    return train_epoch(run.trainer, loader, TrainState(), plan, log, stop=stop, save=lambda state: None)


def build_trainer(options: argparse.Namespace) -> Callable[[], float]:
    run, loader, log = build_run(options)
    if options.profile:
        profile(run, loader, log, options)

    def run_pass() -> float:
        timed = Timed(loader, options.warmup, options.batches)
        train_once(run, timed, log, options.batches)
        synchronize()
        return (options.batches - options.warmup) * options.batch_size / (time.perf_counter() - timed.start_s)

    return run_pass


class HostAsGpu(str):
    """``cpu`` to PyTorch, 0 where the peer writes or compares the number of its GPU."""

    def __format__(self, specification: str) -> str:
        return "0"

    def __eq__(self, other: object) -> bool:
        return other == 0 or str.__eq__(self, other)

    __hash__ = str.__hash__


def import_peer(checkout: Path) -> Any:
    """ffcv-imagenet's script as a module, with what it needs and this environment does not have."""
    import numpy as np
    import setuptools  # noqa: F401  gives ffcv the distutils that Python no longer has
    from ffcv.pipeline.operation import Operation

    class Metric:
        """Stands in for torchmetrics' classes."""

        def __init__(self, *arguments: Any, **options: Any):
            pass

        def add_state(self, *arguments: Any, **options: Any) -> None:
            pass

        def to(self, *arguments: Any) -> "Metric":
            return self

    class Normalize(Operation):
        """NormalizeImage for tensors (N, 3, H, W) in channels_last memory, without cupy."""

        def __init__(self, mean: Any, std: Any, dtype: Any):
            super().__init__()
            self.mean, self.std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
            self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype if torch.cuda.is_available() else torch.float32

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
            place = torch.device(previous_state.device) if torch.cuda.is_available() else torch.device("cpu")
            self.scale = (1 / self.std).view(3, 1, 1).to(place)
            self.shift = (-self.mean / self.std).view(3, 1, 1).to(place)
            return replace(previous_state, jit_mode=False, dtype=self.dtype), None

        def generate_code(self) -> Callable[..., torch.Tensor]:
            def normalize(images: torch.Tensor, _: None) -> torch.Tensor:
                normalized = torch.empty_like(images, dtype=self.dtype)
                return torch.addcmul(self.shift, images, self.scale, out=normalized)

            return normalize

    class Stay(Operation):
        """ToDevice where there is none to go to."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__()

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
            return previous_state, None

        def generate_code(self) -> Callable[..., torch.Tensor]:
            return lambda images, _: images

    metrics = types.ModuleType("torchmetrics")
    metrics.Accuracy = metrics.Metric = Metric  # type: ignore[attr-defined]
    sys.modules["torchmetrics"] = metrics
    specification = importlib.util.spec_from_file_location("ffcv_imagenet", checkout / "train_imagenet.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if importlib.util.find_spec("cupy") is None or not torch.cuda.is_available():
        module.NormalizeImage = Normalize  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        module.ToDevice = Stay  # type: ignore[attr-defined]
    return module


def build_peer(options: argparse.Namespace) -> Callable[[], float]:
    module = import_peer(options.ffcv_imagenet)
    settings = {
        "model.arch": options.arch,
        "data.train_dataset": options.file,
        "data.val_dataset": options.file,
        "data.num_workers": options.num_workers if options.num_workers > 0 else len(os.sched_getaffinity(0)),
        "data.in_memory": 1,
        "resolution.min_res": options.size,
        "resolution.max_res": options.size,
        "training.batch_size": options.batch_size,
        "training.epochs": 1,
        "lr.lr": 0.01,
        "lr.lr_peak_epoch": 0,
        "logging.folder": options.folder,
    }
    sys.argv = ["train_imagenet.py", *(f"--{key}={value}" for key, value in settings.items())]
    module.make_config(quiet=True)
    trainer = module.ImageNetTrainer(gpu=0 if torch.cuda.is_available() else HostAsGpu("cpu"))
    loader = trainer.train_loader

    def run_pass() -> float:
        trainer.train_loader = timed = Timed(loader, options.warmup, options.batches)
        trainer.train_loop(0)
        synchronize()
        return (options.batches - options.warmup) * options.batch_size / (time.perf_counter() - timed.start_s)

    return run_pass


# --- where the time of a step goes


def profile(run: Any, loader: Any, log: Any, options: argparse.Namespace) -> None:
    """Profile the timed batches of one pass of the trainer, and write the time of an average step."""
    from imagenet_training.training import meters

    def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with torch.profiler.record_function(f"part:{name}"):
                return function(*arguments, **keywords)

        return call

    class Batches(Timed):
        """Profiles from the end of the warm-up to the last batch."""

        def _watch(self, batches: Iterator[Any]) -> Iterator[Any]:
            for number in range(self.count):
                if number == self.warmup:
                    synchronize()
                    profiler.start()
                    self.start_s = time.perf_counter()
                with torch.profiler.record_function("part:data"):
                    batch = next(batches)
                yield batch

    trainer = run.trainer
    originals = (trainer.backward, trainer.optimizer_step, meters.AccuracyMeter.add, meters.NonFiniteGuard.fails)
    trainer.backward = ranged("model", trainer.backward)
    trainer.optimizer_step = ranged("optimizer", trainer.optimizer_step)
    meters.AccuracyMeter.add = ranged("metrics", meters.AccuracyMeter.add)  # type: ignore[method-assign]
    meters.NonFiniteGuard.fails = ranged("metrics", meters.NonFiniteGuard.fails)  # type: ignore[method-assign]
    profiler = torch.profiler.profile()
    batches = Batches(loader, options.warmup, options.batches)
    train_once(run, batches, log, options.batches)
    synchronize()
    elapsed_s = time.perf_counter() - batches.start_s
    profiler.stop()
    trainer.backward, trainer.optimizer_step = originals[:2]
    meters.AccuracyMeter.add, meters.NonFiniteGuard.fails = originals[2:]  # type: ignore[method-assign]
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    summary = summarize(events, threading.get_native_id(), elapsed_s, options.batches - options.warmup)
    case = {"size": options.size, "batch_size": options.batch_size, "precision": options.precision}
    with open(options.profile, "a", encoding="utf-8") as file:
        file.write(json.dumps(case | summary) + "\n")


def summarize(events: list[dict[str, Any]], main_thread: int, elapsed_s: float, num_steps: int) -> dict[str, Any]:
    """The time of an average step by its parts, from a trace's events.

    What the main thread queues belongs to the part it is in. Kernels that autograd's thread queues on the same stream
    are the model's; those on other streams are the loader's, and run beside the model.
    """
    events = [event for event in events if event.get("ph") == "X"]
    ranges = [e for e in events if e["name"].startswith("part:") and e.get("cat") == "user_annotation"]
    host_s: dict[str, float] = collections.defaultdict(float)
    for event in ranges:
        host_s[event["name"].removeprefix("part:")] += event["dur"] / 1e6
    launches = {e["args"].get("correlation"): e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    by_main = collections.Counter(
        e["args"]["stream"] for e in work if launches.get(e["args"]["correlation"], {}).get("tid") == main_thread
    )
    main_stream = by_main.most_common(1)[0][0] if by_main else None
    device_s: dict[str, float] = collections.defaultdict(float)
    outside: dict[str, float] = collections.defaultdict(float)
    inside: dict[str, float] = collections.defaultdict(float)
    for event in work:
        launch = launches.get(event["args"]["correlation"])
        part = "loader, beside the model" if event["args"]["stream"] != main_stream else "model"
        if part == "model" and launch is not None and launch["tid"] == main_thread:
            around = [r["name"] for r in ranges if r["ts"] <= launch["ts"] < r["ts"] + r["dur"]]
            part = around[0].removeprefix("part:") if around else "rest of the loop"
        device_s[part] += event["dur"] / 1e6
        if part == "model":
            inside[event["name"][:80]] += event["dur"] / 1e6
        else:
            outside[f"{part}: {event['name'][:80]}"] += event["dur"] / 1e6
    busy_s = sum(seconds for part, seconds in device_s.items() if part != "loader, beside the model")
    host_s["rest of the loop"] = elapsed_s - sum(host_s.values())
    rounded = {part: round(1000 * seconds / num_steps, 4) for part, seconds in host_s.items()}
    on_device = {part: round(1000 * seconds / num_steps, 4) for part, seconds in device_s.items()}
    largest, largest_of_model = (sorted(times.items(), key=lambda item: -item[1])[:20] for times in (outside, inside))
    return {
        "step_ms": round(1000 * elapsed_s / num_steps, 4),
        "host_ms": rounded,
        "device_ms": on_device,
        "device_idle_ms": round(1000 * max(elapsed_s - busy_s, 0) / num_steps, 4) if work else None,
        "model_ms": {name: round(1000 * seconds / num_steps, 4) for name, seconds in largest_of_model},
        "outside_the_model_ms": {name: round(1000 * seconds / num_steps, 4) for name, seconds in largest},
    }


# --- taking turns


class Part:
    """One part in a process of its own, which does a pass whenever it is told to."""

    def __init__(self, name: str, case: dict[str, Any], options: argparse.Namespace, folder: Path):
        arguments = {**case, "part": name, "file": folder / "train.beton", "folder": folder / "runs"}
        arguments |= {key: getattr(options, key) for key in ("arch", "num_workers", "compile", "batches", "warmup")}
        if options.ffcv_imagenet:
            arguments["ffcv_imagenet"] = options.ffcv_imagenet.resolve()
        if options.profile and name == "trainer":
            arguments["profile"] = options.profile.resolve()
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, *(f"--{key}={value}" for key, value in arguments.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.images_per_s: list[float] = []

    def answer(self) -> str | None:
        """The next answer of the process; None where it has failed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return line.removeprefix("ANSWER ").strip()
        return None

    def run_pass(self) -> None:
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return
        print("go", file=self.process.stdin, flush=True)
        answer = self.answer()
        if answer is not None:
            self.images_per_s.append(float(answer))

    def close(self) -> str:
        """End the process; returns the last line of its complaint, if it failed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        failed = self.process.wait() != 0
        self.errors.seek(0)
        complaint = self.errors.read().strip().splitlines()
        self.errors.close()
        return (complaint[-1] if complaint else "it ended without a word") if failed else ""


def serve(options: argparse.Namespace) -> None:
    """Be one part: build it, then do a pass for every line on stdin."""
    build = {"model": build_model, "trainer": build_trainer, "peer": build_peer}[options.part]
    run_pass = build(options)
    print("ANSWER ready", flush=True)
    for _ in sys.stdin:
        print(f"ANSWER {run_pass()}", flush=True)
        torch.cuda.empty_cache()  # the other parts, whose turn it is, share the GPU


def measure(case: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the parts take turns on one case."""
    fits_peer = options.ffcv_imagenet and case["precision"] == ("16-mixed" if torch.cuda.is_available() else "32")
    parts = {name: Part(name, case, options, folder) for name in options.parts if name != "peer" or fits_peer}
    for part in parts.values():
        part.answer()
    for _ in range(options.rounds):
        for part in parts.values():
            part.run_pass()
    result = dict(case)
    for name, part in parts.items():
        complaint = part.close()
        if complaint:
            print(f"{name} failed: {complaint}", flush=True)
        if part.images_per_s:
            result[name] = round(statistics.median(part.images_per_s), 2)
    for ratio in TARGETS:
        above, below = ratio.split(" / ")
        if above in result and below in result:
            result[ratio] = round(result[above] / result[below], 3)
    return result


def write_file(data: Path, folder: Path, num_images: int) -> None:
    """<folder>/train.beton with the images of class folders, round after round until there are enough."""
    images = sorted(path for path in data.glob("*/*") if path.is_file())
    if not images:
        raise SystemExit(f"error: {data} holds no class folders with images")
    for number in range(num_images):
        image = images[number % len(images)]
        link = folder / "images" / image.parent.name / f"{number // len(images):05d}_{image.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())
    paths: list[str | Path] = ["--source", folder / "images", "--target", folder / "train.beton"]
    subprocess.run([sys.executable, ROOT / "write_beton.py", "--split", "train", *paths], check=True)


def show(results: list[dict[str, Any]]) -> None:
    columns = ("size", "batch_size", "precision", *PARTS, *TARGETS, *PUBLISHED)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for result in results:
        against = {
            name: round(result["trainer"] / speed, 2) for name, speed in PUBLISHED.items() if "trainer" in result
        }
        row = result | (against if result["size"] == 224 else {})
        print("| " + " | ".join(str(row.get(column, "-")) for column in columns) + " |")
    print(f"images/s; targets on a GPU: {', '.join(f'{name} at least {value}' for name, value in TARGETS.items())}")
    print(f"published: {', '.join(f'{speed:,} images/s {name}' for name, speed in PUBLISHED.items())}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of class folders of images")
    parser.add_argument("--beton", type=Path, help="in place of --data: a .beton file of --batches batches or more")
    parser.add_argument("--ffcv_imagenet", type=Path, help="a checkout of github.com/libffcv/ffcv-imagenet")
    parser.add_argument("--arch", default="resnet50", help="torchvision architecture (resnet50)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 160], help="px (224 160)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[128, 256], help="(128 256)")
    parser.add_argument("--precisions", nargs="+", default=["16-mixed", "bf16-mixed"], help="(16-mixed bf16-mixed)")
    parser.add_argument("--batches", type=int, default=120, help="batches a pass (120)")
    parser.add_argument("--warmup", type=int, default=4, help="of these, not timed (4)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each part (3)")
    parser.add_argument("--num_workers", type=int, default=-1, help="loader threads; -1: all CPUs (-1)")
    parser.add_argument("--compile", help="training.compile of model and trainer (1 on a GPU, else 0)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="which of them take turns (all)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--profile", type=Path, help="append where a step's time goes, a line of JSON a case")
    for name in ("part", "precision", "file", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("size", "batch_size"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is None:
        options.compile = str(int(torch.cuda.is_available()))
    if options.warmup >= options.batches:
        parser.error("--warmup must be less than --batches")
    if not options.part and (options.data is None) == (options.beton is None):
        parser.error("either --data or --beton is needed")
    if options.ffcv_imagenet and not (options.ffcv_imagenet / "train_imagenet.py").is_file():
        parser.error(f"--ffcv_imagenet: {options.ffcv_imagenet} holds no train_imagenet.py")
    return options


def main() -> None:
    options = parse()
    if options.part:
        serve(options)
        return
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{machine}; {platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "torchvision", "ffcv", "numba", "numpy")))
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.cuda.is_available() else "")
    print(f"command: {' '.join(sys.argv)}", flush=True)
    cases = [
        {"size": size, "batch_size": batch_size, "precision": precision}
        for size in options.sizes
        for batch_size in options.batch_sizes
        for precision in options.precisions
    ]
    with tempfile.TemporaryDirectory() as name:
        if options.beton:
            (Path(name) / "train.beton").symlink_to(options.beton.resolve())
        else:
            write_file(options.data, Path(name), max(options.batch_sizes) * options.batches)
        results = []
        for case in cases:
            results.append(measure(case, options, Path(name)))
            print(json.dumps(results[-1]), flush=True)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
