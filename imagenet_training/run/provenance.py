"""The provenance of a run: everything that makes it repeatable, stored with its logs and every checkpoint."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ffcv_ops import Beton, UserError
from ffcv_ops.settings.fields import show
from imagenet_training.data.loaders import TrainingData
from imagenet_training.distributed import World, of_all_ranks
from imagenet_training.planning.plan import RunPlan
from imagenet_training.planning.recipe import Recipe

LIBRARIES = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy")
# A resumed run differs in these by nature.
_EXPECTED_TO_DIFFER = {"training.resume", "training.report", "training.eval_only"}
# Settings that may differ from rank to rank: the places of files, and what only rank 0 uses.
_OF_ONE_RANK = (
    "data.train_dataset", "data.val_dataset", "data.num_workers", "data.in_memory", "logging.folder", "wandb.", "dist.",
)  # fmt: skip


def describe_run(recipe: Recipe, plan: RunPlan, data: TrainingData, world: World) -> dict[str, Any]:
    """Return a run's resolved recipe, its files, seed, ranks, commit, device, versions, classes and data.

    All values are of JSON types. The classes are None if the training file has no manifest.

    The recipe holds the batch size and the accumulation that are in effect; ``asked_batch`` holds those asked for.
    """
    resolved, training = recipe.to_dict(), recipe.training
    resolved["training"] |= {
        "batch_size": plan.batch_size,
        "accumulation": plan.accumulation,
        "resume": plan.resumed_from,
    }
    files = {"train": data.train, "val": data.val} if data.train is not None else {"val": data.val}
    return {
        "recipe": resolved,
        "recipe_history": recipe.history(),
        "recipe_files": dict(zip(map(str, recipe.files), recipe.texts, strict=True)),
        "seed": training.seed,
        "world_size": world.world_size,
        "global_batch_size": plan.global_batch_size,
        "asked_batch": [training.batch_size, training.accumulation],
        "commit": git_commit(),
        "device": device_name(world.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        # Names of the model's classes, by number.
        "classes": data.train.classes if data.train is not None else data.classes.names,
        "data": {
            split: {"path": str(beton.path), "num_samples": beton.num_samples, "digest": beton.digest}
            for split, beton in files.items()
        },
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, evaluates: bool = False) -> list[str]:
    """Return a notice for everything in which a run differs from the run that saved its checkpoint.

    Both are given as `describe_run` returns them. If the checkpoint is only evaluated, settings, and versions that
    change no result, are left out.
    """
    earlier, current = _flat(before), _flat(now)
    which = "evaluated" if evaluates else "resumed"
    if evaluates:
        current = {name: current[name] for name in ("the device", "the version of torch")}
    notices = [
        f"{name} is {value}, and was {earlier[name]} in the run that is {which}"
        for name, value in current.items()
        if name not in _EXPECTED_TO_DIFFER and earlier.get(name, value) != value
    ]
    for split, data in now["data"].items():
        was = before["data"].get(split, data)
        if was["num_samples"] != data["num_samples"]:
            sizes = f"{data['num_samples']:,} images, and there were {was['num_samples']:,}"
            notices.append(f"the {split} data is not the {which} run's: {data['path']} has {sizes}")
        elif was["digest"] != data["digest"]:
            notices.append(f"the {split} data is not the {which} run's: {data['path']} has another digest")
    return notices


def check_ranks_agree(recipe: Recipe, data: TrainingData) -> None:
    """Check that all ranks have the same settings, and files with the same content.

    Each machine may have its own copy of recipe and files. If copies differ, ranks wait for steps that others do not
    take, or train on other images than the record says.

    Raises
    ------
    UserError
        On every rank, with the first difference.
    """
    settings = {key: value for key, value in recipe.flat().items() if not key.startswith(_OF_ONE_RANK)}
    files = {"data.val_dataset": data.val} | ({"data.train_dataset": data.train} if data.train is not None else {})
    facts = {key: show(value) for key, value in settings.items()}
    facts |= {f"the content of {key}": _describe_content(file) for key, file in files.items()}
    first, *others = of_all_ranks(facts)
    for rank, theirs in enumerate(others, 1):
        for name, value in theirs.items():
            if first.get(name) != value:
                raise UserError(
                    f"{name} is {value} on rank {rank}, and {first.get(name)} on rank 0: give all machines the same "
                    "command, recipe and files"
                )


def _describe_content(file: Beton) -> str:
    """Return the number of images and the digest of a file; of a file without a manifest, that of its metadata."""
    digest = file.digest or f"sha256 of the metadata {hashlib.sha256(file.metadata.tobytes()).hexdigest()}"
    return f"{file.num_samples:,} images, {digest}"


def _flat(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, the commit, the device and the versions of a run by the names that notices use."""
    settings = {
        f"{section}.{key}": value for section, values in provenance["recipe"].items() for key, value in values.items()
    }
    versions = {f"the version of {name}": number for name, number in provenance["versions"].items()}
    # The first version stored no device.
    facts = {f"the {name}": provenance[name] for name in ("commit", "device") if name in provenance}
    return settings | facts | versions


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}"


def git_commit() -> str | None:
    """Return the commit of the code, with ``+`` if files were changed since; None outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # If the package is installed, it may lie within another repository, which does not track it.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
