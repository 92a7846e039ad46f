"""The steps of benchmarks/gpu_check.sh, one a process. Each appends its figures to OUT/check.jsonl as lines of JSON."""

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MODES = ("eager", "compiled", "compiled-graph", "graph")
# Modules that the bundle does not bring, because they are compiled for one Python or are large.
NEEDED_MODULES = (
    "cv2",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numba",
    "packaging",
    "PIL",
    "psutil",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "torchvision",
    "tqdm",
    "yaml",
)
# Options of torch.compile for the library's own layers, as others run them.
PEERS: dict[str, dict[str, Any]] = {
    "torch.compile": {},
    "torch.compile, reduce-overhead": {"mode": "reduce-overhead"},
    "torch.compile, pointwise tuned": {"options": {"max_autotune_pointwise": True}},
}
# Goals of the best mode.
TARGETS = {"trainer / model": 0.97, "trainer / peer": 1.2, "trainer / eager": 1.25, "trainer / torch.compile": 1.1}
# Published images/s of ResNet-50 on one GPU.
PUBLISHED = {"MLPerf MXNet": {"H100": 7140, "H200": 7950}, "PyTorch eager NCHW": {"H100": 2790, "H200": 3079}}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a check."""

    arch: str
    px: tuple[int, ...]
    batch_size: int
    num_batches: int
    precisions: tuple[str, ...]
    repeats: int
    epochs: int

    @property
    def peer_precision(self) -> str:
        """The precision that ffcv-imagenet has."""
        return "32" if self.precisions == ("32",) else "16-mixed"


SIZES = {
    "gpu": Sizes("resnet50", (224, 160), 256, 34, ("bf16-mixed", "16-mixed"), 30, 8),
    "cpu": Sizes("resnet18", (32,), 4, 6, ("32",), 1, 2),
}


class Check:
    """One run of the check: its folders, its sizes, and its record."""

    def __init__(self, options: argparse.Namespace):
        self.bundle, self.scratch, self.on_gpu = options.bundle, options.scratch, options.device == "gpu"
        self.record, self.sizes = options.out / "check.jsonl", SIZES[options.device]
        self.images = self.scratch / "images.beton"

    def add(self, step: str, **figures: Any) -> None:
        """Append a line of figures to the record."""
        line = json.dumps({"figure": step, **figures})
        print(line, flush=True)
        with open(self.record, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def figures(self, step: str) -> list[dict[str, Any]]:
        """Return the lines that a step has added."""
        lines = map(json.loads, self.record.read_text().splitlines())
        return [line for line in lines if line.get("figure") == step]

    def best_mode(self, precision: str) -> str:
        """Return the fastest mode of training.compile that was measured; the most promising one if none was."""
        speeds = {
            line["mode"]: line["images_per_s"]
            for line in self.figures("modes")
            if line["mode"] in MODES and line["precision"] == precision and "images_per_s" in line
        }
        return max(speeds, key=lambda mode: speeds[mode]) if speeds else "compiled-graph" if self.on_gpu else "eager"


def setting_of(mode: str) -> str:
    """Return the value of training.compile for a mode."""
    return {"eager": "0", "compiled": "1"}.get(mode, mode)


# --- setup


def setup(check: Check) -> None:
    """Install what lacks of the bundle's wheels, lay out the file of images, and record the machine."""
    absent = [module for module in NEEDED_MODULES if importlib.util.find_spec(module) is None]
    if absent:
        raise SystemExit(f"the machine must have these modules, and {sys.executable} lacks them: {', '.join(absent)}")
    lacking = []
    for wheel in sorted((check.bundle / "wheels").glob("*.whl")):
        name = wheel.name.split("-")[0]
        if importlib.util.find_spec(name) is None:
            lacking.append(wheel)
    if lacking:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", check.scratch / "site", *lacking], check=True)
    importlib.invalidate_caches()
    import torch
    from repeat_beton import repeat_file

    names = ("torch", "torchvision", "numba", "numpy", "timm", "ffcv")
    check.add(
        "machine",
        gpu=torch.cuda.get_device_name() if check.on_gpu else None,
        cpus=len(os.sched_getaffinity(0)),
        system=f"{platform.machine()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        python=platform.python_version(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        installed=[wheel.name for wheel in lacking],
        **{name: version(name) for name in names},
    )
    num_images = repeat_file(check.bundle / "data/images/train.beton", check.images, check.sizes.repeats)
    check.add("machine", images=num_images, file_mib=check.images.stat().st_size >> 20)


# --- step 1


def tests(check: Check) -> None:
    """Run the tests that need a GPU, and those of recorded steps, which need none. Compile models meanwhile."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-rf", "--durations=8"]
    pytest += ["-n", "4"] if importlib.util.find_spec("xdist") else ["-p", "no:xdist"]
    pytest += ["-p", "no:benchmark"]  # which warns beside xdist, and warnings are errors
    files = ["tests/test_gpu.py", "tests/test_recorded.py"]
    compiling = precompile(check)
    run_of_tests = subprocess.Popen(
        [*pytest, *files], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run_of_tests.stdout is not None
    lines = []
    for line in run_of_tests.stdout:  # as they come, because the step may be stopped at its limit
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = run_of_tests.wait()
    for process in compiling:
        process.wait()
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", " ".join(lines[-1:]))
    failed = [line.removeprefix("FAILED ")[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    check.add("tests", failing=failed, **{kind: int(number) for number, kind in counts})
    if status:
        raise SystemExit(f"pytest ended with status {status}: {', '.join(failed) or 'see the log'}")


def precompile(check: Check) -> list[subprocess.Popen[bytes]]:
    """Fill the compiler's cache on disk with what the next steps compile, in processes beside this one."""
    if not check.on_gpu:
        return []
    sizes, processes = check.sizes, []
    cases = [("own", precision, sizes.px[0]) for precision in sizes.precisions]
    cases += [("own", sizes.peer_precision, px) for px in sizes.px[1:]]
    for layers, precision, px in [*cases, ("plain", sizes.precisions[0], sizes.px[0])]:
        arguments = ["compile", f"--layers={layers}", f"--precision={precision}", f"--px={px}"]
        arguments.append(f"--bundle={check.bundle}")
        arguments += [f"--out={check.record.parent}", f"--scratch={check.scratch}"]
        processes.append(subprocess.Popen([sys.executable, __file__, *arguments], cwd=ROOT))
    return processes


def compile_model(check: Check, layers: str, precision: str, px: int) -> None:
    """Compile the model of the next steps once, with our layers or those of its library."""
    import torch
    from train_step import build_run

    from imagenet_training.models.architectures import compiled

    run, loader, _ = build_run(run_options(check, precision, "eager", px), prepare=False)
    trainer = run.trainer
    trainer.model = compiled(trainer.model) if layers == "own" else torch.compile(plain_layers(trainer.model))
    error = trainer.warm_up((check.sizes.batch_size, 3, px, px))
    loader.close()
    if error:
        raise error


def plain_layers(model: Any) -> Any:
    """Return a copy of a model that has the layers of its library."""
    import copy

    from imagenet_training.models.stem import StemConv2d, StemMaxPool2d

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (StemConv2d, StemMaxPool2d)):
            module.__class__ = type(module).__bases__[0]
    return model


# --- steps 2 and 3


def run_options(check: Check, precision: str, mode: str, px: int) -> argparse.Namespace:
    """Return the options of `train_step.build_run`."""
    sizes = check.sizes
    return argparse.Namespace(
        arch=sizes.arch,
        file=check.images,
        folder=check.scratch / "modes",
        num_workers=-1,
        size=px,
        batch_size=sizes.batch_size,
        batches=sizes.num_batches,
        warmup=4,
        precision=precision,
        compile=setting_of(mode),
        profile=None,
    )


def peak_gib(check: Check) -> float | None:
    import torch

    if not check.on_gpu:
        return None
    peak = torch.cuda.max_memory_reserved() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def modes(check: Check) -> None:
    """Time the bare step in every mode, the trainer on the file in the fastest one, and what others run."""
    first, *others = check.sizes.precisions
    modes_of(check, first)
    if check.on_gpu:
        peers_of(check, first, list(PEERS)[:1])
    judge_modes(check, first)
    for precision in others:
        modes_of(check, precision)
        judge_modes(check, precision)
    if check.on_gpu:
        peers_of(check, first, list(PEERS)[1:])
    failed = [line["mode"] for line in check.figures("modes") if "error" in line]
    if failed:
        raise SystemExit(f"no figure of {', '.join(failed)}: see the record")


def add_speed(check: Check, mode: str, precision: str, measure: Callable[[], float]) -> None:
    """Record the images/s that a function measures, or its error."""
    sizes = check.sizes
    case = {"mode": mode, "precision": precision, "px": sizes.px[0], "batch_size": sizes.batch_size}
    started_s = time.perf_counter()
    try:
        speed = measure()
    except Exception as error:  # one mode must not end the others
        traceback.print_exc()
        check.add("modes", **case, error=f"{type(error).__name__}: {str(error)[:300]}")
        return
    seconds = round(time.perf_counter() - started_s, 1)
    check.add("modes", **case, images_per_s=round(speed, 1), peak_gib=peak_gib(check), seconds=seconds)


def modes_of(check: Check, precision: str) -> None:
    import torch
    from train_step import Timed, build_run, train_once

    from imagenet_training.training import step_mode

    px, num_batches = check.sizes.px[0], check.sizes.num_batches
    run, loader, log = build_run(run_options(check, precision, "eager", px), prepare=False)
    trainer, shape = run.trainer, (check.sizes.batch_size, 3, px, px)
    trainer.train_mode()

    def on_file(name: str) -> float:
        trainer.modes = (step_mode.MODES[name],)
        step_mode.prepare_step(trainer, shape[0], px, log)
        timed = Timed(loader, 4, num_batches)
        values = train_once(run, timed, log, num_batches)
        if check.on_gpu:
            torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - timed.start_s
        check.add("data wait", precision=precision, mode=name, data_wait=round(values["data_wait"], 4))
        step_mode.take_down(trainer)
        return (num_batches - 4) * shape[0] / elapsed_s

    for name in MODES if check.on_gpu else MODES[:1]:
        add_speed(check, name, precision, partial(step_mode.measure_mode, trainer, step_mode.MODES[name], shape))
    mode = check.best_mode(precision)
    add_speed(check, f"trainer, {mode}", precision, partial(on_file, mode))
    loader.close()


def peers_of(check: Check, precision: str, names: list[str]) -> None:
    import torch
    from train_step import build_run

    from imagenet_training.training.step_mode import step_s

    run, loader, _ = build_run(run_options(check, precision, "eager", check.sizes.px[0]), prepare=False)
    loader.close()
    trainer = run.trainer
    trainer.train_mode()
    model = plain_layers(trainer.model)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    batch_size, px = check.sizes.batch_size, check.sizes.px[0]

    def peer(options: dict[str, Any]) -> float:
        trainer.model = torch.compile(model, **options)
        return batch_size / step_s(trainer, (batch_size, 3, px, px))

    for name in names:
        add_speed(check, name, precision, partial(peer, PEERS[name]))


def judge_modes(check: Check, precision: str) -> None:
    """Record the ratios of the trainer in the best mode to the plain steps, beside published speeds."""
    speeds = {
        line["mode"]: line["images_per_s"]
        for line in check.figures("modes")
        if line["precision"] == precision and "images_per_s" in line
    }
    mode = check.best_mode(precision)
    for peer in ("eager", "torch.compile"):
        if f"trainer, {mode}" in speeds and peer in speeds:
            value = speeds[f"trainer, {mode}"] / speeds[peer]
            add_ratio(check, f"trainer / {peer}", value, precision=precision, mode=mode)
    card = check.figures("machine")[0]["gpu"] or ""
    for source, cards in PUBLISHED.items():
        for name, speed in cards.items():
            if name in card:
                check.add("published", source=source, images_per_s=speed)


def add_ratio(check: Check, name: str, value: float, **case: Any) -> None:
    check.add("ratio", name=name, value=round(value, 3), target=TARGETS[name], met=value >= TARGETS[name], **case)


def train_step(check: Check, *arguments: Any) -> None:
    """Run benchmarks/train_step.py on the check's file."""
    sizes = check.sizes
    command = [sys.executable, ROOT / "benchmarks/train_step.py", "--beton", check.images, "--arch", sizes.arch]
    command += ["--batch_sizes", sizes.batch_size, "--batches", sizes.num_batches, "--rounds", 1, *arguments]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)


def ratios(check: Check) -> None:
    """Compare the trainer with the bare step and with ffcv-imagenet, at every size."""
    precision = check.sizes.peer_precision
    mode = check.best_mode(precision)
    peer = check.bundle / "ffcv-imagenet"
    for px in check.sizes.px:
        result = check.scratch / f"ratios-{px}.json"
        arguments = ["--sizes", px, "--precisions", precision, "--compile", setting_of(mode), "--json", result]
        train_step(check, *arguments, *(["--ffcv_imagenet", peer] if peer.is_dir() else []))
        (line,) = json.loads(result.read_text())
        check.add("ratios", mode=mode, **line)
        for name in ("trainer / model", "trainer / peer"):
            if name in line:
                add_ratio(check, name, line[name], px=px, precision=precision, mode=mode)
        missing = {"model", "trainer", *(["peer"] if peer.is_dir() else [])} - line.keys()
        if missing:
            raise SystemExit(f"no figure of {', '.join(sorted(missing))} at {px} px: see the log")
    if not peer.is_dir():
        raise SystemExit("the bundle has no ffcv-imagenet: there is no ratio to it")


# --- steps 4 and 5


def train_command(check: Check, folder: Path, data: Path, *arguments: str) -> list[str]:
    """Return the command of a run of ResNet-18 on small images."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"data.train_dataset": data / "train.beton", "data.val_dataset": data / "val.beton"}
    settings |= {"logging.folder": folder, "training.epochs": check.sizes.epochs}
    if not check.on_gpu:
        settings |= {"data.num_workers": 1, "model.arch": "test_resnet"}  # timm's smallest
    flags = [f"--{key}={value}" for key, value in settings.items()]
    recipe = ["--config-file", "rn50_configs/demo.yaml", "--lr.warmup_epochs=1", "--no_wandb"]
    return [sys.executable, str(ROOT / "train_imagenet.py"), *recipe, *flags, *arguments]


def run(command: list[str], log: Path) -> int:
    """Run a command with its output in a file. Return its exit status."""
    with open(log, "w") as file:
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode


def run_cut(command: list[str], log: Path, line: str) -> int:
    """Run a command, and send SIGTERM when it prints a line that begins so. Return its exit status."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for printed in process.stdout:
            file.write(printed)
            if printed.startswith(line):
                process.send_signal(signal.SIGTERM)
        return process.wait()


def error_line(log: Path) -> str:
    """Return the line with which a run said why it ended, or else its last one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error")), lines[-1] if lines else "")[:400]


def faults(check: Check) -> None:
    """Interrupt and resume a run; make runs fail; record what they print and how they end."""
    import torch

    folder, data = check.scratch / "faults", check.bundle / "data/digits"
    mixed = ["--precision=16-mixed", "--training.ema_decay=0.99", "--epochs=2", "--training.deterministic=1"]
    mixed.append("--training.compile=graph" if check.on_gpu else "--training.compile=0")

    def command(name: str, *arguments: str) -> list[str]:
        return train_command(check, folder / name, data, *arguments)

    def log(name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def cut_and_resumed() -> tuple[int, int]:
        status = run_cut(command("cut", *mixed), log("cut"), "epoch 1  step")
        resumed = command("cut", *mixed, "--resume", str(folder / "cut/checkpoints/last.ckpt"))
        return status, run(resumed, log("resumed"))

    with ThreadPoolExecutor(4 if check.on_gpu else 1) as pool:
        whole = pool.submit(run, command("whole", *mixed), log("whole"))
        cut = pool.submit(cut_and_resumed)
        nan = pool.submit(run, command("nan", "--lr=1e12", "--epochs=2"), log("nan"))
    if check.on_gpu:  # alone, because it takes the memory of all others
        large = ["--model.arch=vgg16_bn", "--resolution.min_res=2048", "--resolution.max_res=2048", "--epochs=2"]
        run(command("oom", *large), log("oom"))
    for path in sorted(folder.glob("*.log")):
        print(f"-- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
    statuses = {"whole": whole.result(), "cut": cut.result()[0], "resumed": cut.result()[1], "nan": nan.result()}
    expected = {"whole": 0, "cut": 75, "resumed": 0, "nan": 1}
    check.add("faults", statuses=statuses, expected=expected)
    check.add("faults", case="NaN", says=error_line(log("nan")))
    check.add("faults", case="out of memory", says=error_line(log("oom")) if check.on_gpu else "not tried on a CPU")
    if statuses != expected:
        raise SystemExit(f"the runs ended with {statuses}, not {expected}: see the log")
    ours, theirs = (
        torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")
        for name in ("cut", "whole")
    )
    parts: dict[str, float] = {}
    for part in ("model", "ema"):
        pairs = [(ours[part][name].double(), value.double()) for name, value in theirs[part].items()]
        parts[part] = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)
    same_place = all(ours["state"][key] == theirs["state"][key] for key in ("epoch", "samples", "step"))
    equal = all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    check.add(
        "faults", case="resumed against undisturbed", same_place=same_place, equal=equal, largest_difference=parts
    )
    check.add("faults", case="overflow", scale=theirs["scaler"].get("scale"), begins_at=65536)
    if not same_place:
        raise SystemExit("the resumed run ends at another step than the undisturbed one")
    if not equal:
        raise SystemExit(f"a resumed run that is deterministic ends with other weights: {parts}")


def learning_runs(check: Check) -> Iterator[tuple[str, str, str]]:
    """Yield data, precision and mode of the runs that learn. The first runs alone, because its time counts."""
    for precision in reversed(check.sizes.precisions):
        for name in ("digits", "cifar"):
            if (check.bundle / "data" / name).is_dir():
                for mode in ("eager", "compiled-graph") if check.on_gpu else ("eager",):
                    yield name, precision, mode


def learning(check: Check) -> None:
    """Train ResNet-18 on digits and CIFAR-10, in all precisions and modes, and compare the accuracies."""

    def learn(case: tuple[str, str, str]) -> dict[str, Any]:
        name, precision, mode = case
        folder = check.scratch / "learning" / "-".join(case)
        flags = [f"--precision={precision}", f"--training.compile={setting_of(mode)}"]
        started_s = time.time()
        status = run(train_command(check, folder, check.bundle / "data" / name, *flags), folder.with_suffix(".log"))
        figures: dict[str, Any] = {"data": name, "precision": precision, "mode": mode, "status": status}
        for path in (folder / "logs").glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            reached = [row["time"] - started_s for row in rows if row.get("val/acc1", 0) >= 0.98]
            figures["acc1"] = [round(row["val/acc1"], 4) for row in rows]
            figures["images_per_s"] = round(statistics.median(row["images_per_s"] for row in rows), 1)
            figures["s_to_98"] = round(reached[0], 1) if reached and name == "digits" else None
        check.add("learning", **figures)
        return figures

    (check.scratch / "learning").mkdir(exist_ok=True)
    first, *others = learning_runs(check)
    results = [learn(first)]
    with ThreadPoolExecutor(4 if check.on_gpu else 1) as pool:
        results += pool.map(learn, others)
    for name in ("digits", "cifar"):
        ends = [result["acc1"][-1] for result in results if result["data"] == name and result.get("acc1")]
        if ends:
            check.add("learning", data=name, lowest=min(ends), highest=max(ends), runs=len(ends))
    failed = [result for result in results if result["status"]]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(results)} runs failed: see the log")


# --- steps 6 and 7


def decode(check: Check) -> None:
    """Compare decoding on the GPU with ours."""
    sizes, script = check.sizes, ROOT / "benchmarks/gpu_decode.py"
    command = [sys.executable, script, "--file", check.images, "--size", sizes.px[0], "--batch_size", sizes.batch_size]
    command += ["--batches", min(sizes.num_batches, 20), "--rounds", 2 if check.on_gpu else 1]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit((done.stderr.strip().splitlines() or ["no error"])[-1])
    line = done.stdout.strip().splitlines()[-1]
    ours, device, ratio = (float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", line))
    check.add("decode", ours_images_per_s=ours, device_images_per_s=device, ratio=ratio, px=sizes.px[0])


def profile(check: Check) -> None:
    """Record where the time of a step goes, in the best mode and plain."""
    precision = check.sizes.precisions[0]
    for mode in dict.fromkeys(["eager", check.best_mode(precision)]):
        path = check.scratch / f"profile-{mode}.jsonl"
        arguments = ["--sizes", check.sizes.px[0], "--precisions", precision, "--compile", setting_of(mode)]
        train_step(check, *arguments, "--parts", "trainer", "--profile", path)
        check.add("profile", mode=mode, **json.loads(path.read_text().splitlines()[0]))


STEPS = {
    "setup": setup,
    "tests": tests,
    "modes": modes,
    "ratios": ratios,
    "faults": faults,
    "learning": learning,
    "decode": decode,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "compile"])
    parser.add_argument("--bundle", type=Path, required=True, help="folder of make gpu-bundle")
    parser.add_argument("--out", type=Path, required=True, help="folder of check.jsonl")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of what may be removed at the end")
    parser.add_argument("--device", choices=SIZES, default="gpu", help="(gpu)")
    parser.add_argument("--precision", help="of step compile, which step tests runs")
    parser.add_argument("--px", type=int, help="of step compile")
    parser.add_argument("--layers", help="of step compile")
    options = parser.parse_args()
    if options.device == "gpu" and options.step != "setup":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no GPU is visible: pass --cpu to run the steps at a small size")
    if options.step == "compile":
        compile_model(Check(options), options.layers, options.precision, options.px)
    else:
        STEPS[options.step](Check(options))


if __name__ == "__main__":
    main()
