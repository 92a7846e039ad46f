"""Try the architectures of torchvision and timm: build, train a step, export, load, change the head.

    python benchmarks/architectures.py --out docs/architectures.json --markdown docs/ARCHITECTURES.md [NAME ...]

NAME is ``LIBRARY/ARCH``, such as ``timm/resnet50``; without names, all classifiers of torchvision and the smallest of
each family of timm are tried. Each architecture gets a process of its own, with a time limit, at the smallest size of
images that it takes. ``--out`` is rewritten after each of them. If it exists, only what it lacks is tried.
``--markdown`` replaces the tables between the markers of that file. Needs no data and no GPU, and leaves nothing else.
"""

import argparse
import json
import math
import multiprocessing
import platform
import re
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

from ffcv_ops.errors import UserError  # noqa: E402
from ffcv_ops.files import replace_text  # noqa: E402
from imagenet_training.data.normalization import settle_normalization  # noqa: E402
from imagenet_training.distributed import World  # noqa: E402
from imagenet_training.models.architectures import build_model, model_arguments, recipe_meta_model  # noqa: E402
from imagenet_training.models.card import ModelCard  # noqa: E402
from imagenet_training.models.export import export_weights, load_model  # noqa: E402
from imagenet_training.planning.plan import plan_run  # noqa: E402
from imagenet_training.planning.recipe import Recipe, read_recipe  # noqa: E402
from imagenet_training.training.loss import recipe_loss  # noqa: E402
from imagenet_training.training.trainer import build_trainer  # noqa: E402
from imagenet_training.training.trial import Need, Trial, candidates, check_drop_path, try_model  # noqa: E402

NUM_CLASSES, OTHER_NUM_CLASSES, BATCH_SIZE = 10, 7, 2
WORLD = World()
ACTIONS = ("plan", "build", "step", "export", "load", "head")
# Parts of names, from the smallest model of a family to the largest; names without one are in the middle.
SIZE_WORDS = [
    "test zepto atto femto pico xxnano xnano nano xxtiny xxs xx xtiny xs ti tiny mini m0 s0 b0 f0 a0 050 pwee xxs24",
    "s s12 s18 small little 18 26 12 14",
    "medium m 50",
    "base b 101 betwixt",
    "large l 152 xl xlarge huge h giant g gigantic xxl xxlarge 1b 3b 5b 7b big",
]
MARKERS = ("<!-- tables -->", "<!-- end of tables -->")


def size_rank(name: str) -> tuple[int, int, str]:
    """Return a key that sorts the small models of a family first."""
    words = re.split(r"[_-]", name)
    ranks = [rank for rank, line in enumerate(SIZE_WORDS) for word in words if word in line.split()]
    return (min(ranks) if ranks and max(ranks) < 4 else max(ranks, default=2), len(name), name)


def names_to_try() -> list[str]:
    """Return all of torchvision's classifiers, and the smallest of each family of timm's."""
    sizes = {word for line in SIZE_WORDS for word in line.split()}
    families: dict[tuple[str, str], list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            words = [word for word in re.match(r"[a-z_]+", name).group().split("_") if word]  # type: ignore[union-attr]
            stem = "_".join([word for word in words if word not in sizes][:2])
            families.setdefault((module, stem), []).append(name)
    smallest = [min(names, key=size_rank) for names in families.values()]
    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision/{name}" for name in torchvision_names] + [f"timm/{name}" for name in sorted(smallest)]


def recipe_of(name: str, size_px: int, num_classes: int = NUM_CLASSES, *arguments: str) -> Recipe:
    """Return the recipe of an architecture at one size."""
    library, _, arch = name.partition("/")
    recipe = read_recipe(
        [
            f"--model.arch={arch}", f"--model.library={library}", f"--model.num_classes={num_classes}", "--no_wandb",
            f"--resolution.min_res={size_px}", f"--resolution.max_res={size_px}", f"--validation.resolution={size_px}",
            f"--batch_size={BATCH_SIZE}", "--precision=32", "--lr=0.001",
            "--training.grad_clip=1", *arguments,
        ]
    )  # fmt: skip
    return settle_normalization(recipe)


def smallest_size(recipe: Recipe, meta_model: torch.nn.Module) -> int | None:
    """Return the smallest candidate, px, at which a model trains and evaluates; None if there is none."""
    for on_meta in (True, False):  # some architectures compute with values
        model = meta_model if on_meta else build_model(**model_arguments(recipe))
        trial = Trial(model, recipe_loss(recipe), NUM_CLASSES, "32")
        for size in sorted(candidates(model)):
            needs = [Need("", size, trains=True), Need("", size, trains=False)]
            if all(trial.error_of(need, size, BATCH_SIZE) is None for need in needs):
                return size
    return None


def attempt(name: str, max_parameters: float, sender: Connection) -> None:
    """Try an architecture in this process, and send every fact about it as a pair (key, value)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    action = "plan"

    def done(action: str, value: Any = True) -> None:
        sender.send((action, value))

    try:
        recipe = recipe_of(name, 224)
        meta_model = recipe_meta_model(recipe)
        parameters = sum(parameter.numel() for parameter in meta_model.parameters())
        done("parameters", parameters)
        done("plan")
        if parameters > max_parameters:
            return
        action = "step"
        size = smallest_size(recipe, meta_model)
        done("size_px", size)
        recipe = recipe_of(name, size or 224)
        action = "build"
        trainer = build_trainer(recipe, plan_of(recipe), WORLD)
        done("build")
        action = "step"
        if size is None:
            try_model(recipe, plan_of(recipe), trainer.model, trainer.loss)
            raise AssertionError("no size was found, and the trial finds no fault")
        torch.manual_seed(0)
        images = torch.randn(BATCH_SIZE, 3, size, size)
        targets = torch.full((BATCH_SIZE, NUM_CLASSES), 1 / NUM_CLASSES)
        loss, _ = trainer.backward(images, targets, number=0, place=(0,))
        unused = sum(p.grad is None for p in trainer.model.parameters() if p.requires_grad)
        done("unused_parameters", unused)
        trainer.optimizer_step(0.001, step=0)
        assert math.isfinite(loss) and trainer.is_finite(), "the loss or a weight is not finite"
        done("step")
        with tempfile.TemporaryDirectory() as folder:
            action = "export"
            path = Path(folder) / "weights.safetensors"
            card = ModelCard.of_recipe(recipe.to_dict(), model_arguments(recipe), None)
            export_weights(path, trainer.evaluated_model.state_dict(), card)
            done("export")
            action = "load"
            images = trainer.to_memory_format(images)
            with torch.no_grad():
                wanted, got = trainer.evaluated_model.eval()(images), load_model(path).model(images)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            done("load")
            action = "head"
            other = build_model(**model_arguments(recipe_of(name, size, OTHER_NUM_CLASSES)), weights=path).eval()
            with torch.no_grad():
                assert other(images).shape == (BATCH_SIZE, OTHER_NUM_CLASSES)
            done("head")
        if name.startswith("timm/"):
            done("drop_path", drop_path_of(recipe_of(name, size, NUM_CLASSES, "--model.drop_path=0.1")))
    except UserError as error:
        done("error", [action, f"refused: {error}"])
    except Exception as error:
        done("error", [action, f"{type(error).__name__}: {error}"])
        done("traceback", traceback.format_exc())


def plan_of(recipe: Recipe) -> Any:
    return plan_run(recipe, world_size=1, num_train=100, num_val=10, device_type="cpu")


def drop_path_of(recipe: Recipe) -> str:
    """Return ``yes``, ``refused``, or ``ignored``: what an architecture makes of a drop path."""
    try:
        check_drop_path(recipe, plan_of(recipe))
        return "yes"
    except UserError:
        pass
    try:
        recipe_meta_model(recipe)
        return "ignored, therefore refused"
    except UserError:
        return "refused"


def try_in_process(name: str, limit_s: float, max_parameters: float) -> dict[str, Any]:
    """Try an architecture in a forked process, and end it after a time."""
    started_s, context = time.perf_counter(), multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(name, max_parameters, sender))
    process.start()
    sender.close()
    row: dict[str, Any] = {"name": name}
    try:
        while receiver.poll(limit_s - (time.perf_counter() - started_s)):
            key, value = receiver.recv()
            row[key] = value
        row["error"] = ["time", f"ended after {limit_s:.0f} s"]
        process.kill()
    except EOFError:
        pass
    process.join()
    if process.exitcode and "error" not in row:
        row["error"] = ["process", how_it_ended(process.exitcode)]
    return {**row, "time_s": round(time.perf_counter() - started_s, 1)}


def how_it_ended(exitcode: int) -> str:
    """Return how a process ended in words, from `multiprocessing`'s exit code: negative for a signal."""
    return f"exit status {exitcode}" if exitcode > 0 else f"ended by {signal.Signals(-exitcode).name}"


def outcome(row: dict[str, Any], max_parameters: float) -> str:
    """Return what happened to an architecture in words."""
    if row.get("parameters", 0) > max_parameters:
        return "left out: too large for this table"
    return ": ".join(row["error"]) if "error" in row else "all"


def tables(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows, limit = results["rows"], results["max_parameters"]
    tried = [row for row in rows if row.get("parameters", 0) <= limit]
    lines = [
        f"PyTorch {results['versions']['torch']}, torchvision {results['versions']['torchvision']}, timm "
        f"{results['versions']['timm']}; {results['machine']}; one image pair, CPU, 32-bit. "
        f"{len(rows) - len(tried)} architectures of more than {limit / 1e6:.0f} M parameters are only planned.",
        "",
        "| | tried | " + " | ".join(ACTIONS) + " |",
        "|---|---|" + "---|" * len(ACTIONS),
    ]
    for library in ("torchvision", "timm"):
        own = [row for row in tried if row["name"].startswith(library + "/")]
        counts = [sum(bool(row.get(action)) for row in own) for action in ACTIONS]
        lines.append(f"| {library} | {len(own)} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| architecture | parameters (M) | smallest size (px) | drop path | works |", "|---|---|---|---|---|"]
    for row in rows:
        size, drop_path = row.get("size_px") or "", row.get("drop_path", "")
        what = textwrap.shorten(outcome(row, limit).replace("|", "/"), 240, placeholder=" ...")
        millions = f"{row['parameters'] / 1e6:,.1f}" if "parameters" in row else ""
        lines.append(f"| {row['name']} | {millions} | {size} | {drop_path} | {what} |")
    return "\n".join(lines)


def write_markdown(path: Path, results: dict[str, Any]) -> None:
    """Replace what is between the markers of a document by the tables."""
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    replace_text(path, f"{before}{MARKERS[0]}\n\n{tables(results)}\n\n{MARKERS[1]}{after}")


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--limit_s", type=float, default=180)
    parser.add_argument("--max_parameters", type=float, default=400e6)
    arguments = parser.parse_args(argv if argv is None else list(argv))
    results: dict[str, Any] = {"rows": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
    results["versions"] = {name: version(name) for name in ("torch", "torchvision", "timm")}
    results["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    results["max_parameters"] = arguments.max_parameters
    known = {row["name"]: row for row in results["rows"]}
    order = arguments.names or names_to_try()
    for number, name in enumerate(order):
        if name not in known or arguments.names:
            known[name] = try_in_process(name, arguments.limit_s, arguments.max_parameters)
            said = outcome(known[name], arguments.max_parameters)
            print(f"{number + 1}/{len(order)}  {name}  {known[name]['time_s']} s  {said[:160]}", flush=True)
        results["rows"] = sorted(known.values(), key=lambda row: (not row["name"].startswith("torchv"), row["name"]))
        replace_text(arguments.out, json.dumps(results, indent=1) + "\n")
    if arguments.markdown:
        write_markdown(arguments.markdown, results)


if __name__ == "__main__":
    main()
