"""The state of a run on disk: what it holds, written whole or not at all, and taken up again."""

import copy
import re
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ffcv_ops.files import replacing
from imagenet_training.distributed import World

FORMAT = 1


@dataclass
class TrainState:
    """Where a run stands. Everything that changes from step to step beside the tensors of model and optimizer.

    Attributes
    ----------
    epoch, batch, step : int
        Epochs finished, batches of the current epoch taken per rank, optimizer steps taken.
    best_acc1, best_epoch : float, int
        Best top-1 on the validation split so far, in [0, 1], and its epoch; -1 before the first.
    totals : list of float
        Sums over all ranks of the current epoch's loss and counts, for an epoch that a save interrupts.
    run_name : str
        Stem of the run's log files.
    wandb_id : str
        Of the W&B run, "" without one.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_acc1: float = -1.0
    best_epoch: int = -1
    totals: list[float] = field(default_factory=list)
    run_name: str = ""
    wandb_id: str = ""


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` under a temporary name, to the disk, then in one move to ``path``."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def copied(value: Any) -> Any:
    """A copy on the CPU of what a checkpoint holds, which further steps leave as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        # A state_dict carries the versions of its modules as an attribute, which copy.copy() takes along.
        new = copy.copy(value)
        new.update((key, copied(part)) for key, part in value.items())
        return new
    return [copied(part) for part in value] if isinstance(value, list) else value


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running any code it may hold.

    Raises
    ------
    ValueError
        No such file, not a checkpoint of a run, or a damaged one.
    """
    if not Path(path).is_file():
        raise ValueError(f"training.resume={path}: no such file")
    try:
        check_whole(path)
        content = _load(path)
    except ValueError as error:
        raise ValueError(f"training.resume={path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "state" not in content:
        raise ValueError(
            f"training.resume={path} is not a checkpoint of a run (one such as checkpoints/last.ckpt); "
            "weights alone are loaded with --model.weights"
        )
    name = str(content["state"].get("run_name", ""))
    if Path(name).name != name:  # the run's log files are called so
        raise ValueError(f"training.resume={path} names its log files {name!r}: it is not to be trusted")
    return content


def _load(path: str | Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # the unpicklers and archives raise many kinds
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


def check_whole(path: str | Path) -> None:
    """Check that a checkpoint has every byte it was written with: PyTorch stores checksums, and does not read them.

    Raises
    ------
    ValueError
        A file that is empty, cut, or damaged anywhere.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError("the file is empty" if not Path(path).stat().st_size else str(error)) from error
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} in it is wrong")


def written_checkpoints(folder: Path, arch: str) -> list[Path]:
    """The last checkpoint and the best ones that runs of an architecture have left in a folder."""
    best = re.compile(re.escape(arch) + r"-epoch=\d+-val_acc1=\d\.\d{4}\.ckpt")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.name == "last.ckpt" or best.fullmatch(path.name)]


def newest_checkpoint(folder: Path, arch: str, run_name: str = "") -> tuple[Path | None, list[str]]:
    """Find the checkpoint with the most steps, passing over damaged ones.

    Of each file the description alone is read, and the whole of those that may be the answer.

    Parameters
    ----------
    run_name : str
        Only checkpoints of the run of this name count; "" for those of any.

    Returns
    -------
    path : Path or None
        None where there is no checkpoint.
    notices : list of str
        One for each damaged file, with what is wrong with it.
    """
    found, notices = [], []
    for path in written_checkpoints(folder, arch):
        try:
            state = _load(path, mmap=True)["state"]
            found.append((state["step"], path.name == "last.ckpt", path, state["run_name"]))
        except (ValueError, TypeError, KeyError) as error:
            why = "the file is empty" if not path.stat().st_size else error
            notices.append(f"{path} is damaged and was passed over: {why}")
    for _, _, path, name in sorted(found, reverse=True):
        if run_name not in ("", name):
            continue
        try:
            check_whole(path)
        except ValueError as error:
            notices.append(f"{path} is damaged and was passed over: {error}")
        else:
            return path, notices
    return None, notices


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile, or the model itself."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


@dataclass
class Checkpoints:
    """Saves and restores one run in one folder; writes on rank 0, reads on every rank.

    Parameters
    ----------
    folder : Path
        Made on the first save.
    arch : str
        Begins the names of the best checkpoint and the exported weights.
    world : World
    parts : dict
        What holds tensors: ``model``, ``optimizer``, ``scaler``, and ``ema`` or None.
    facts : dict
        Stored with every checkpoint: recipe, its files, seed, commit, versions, data digests, global batch size.
    """

    folder: Path
    arch: str
    world: World
    parts: dict[str, Any]
    facts: dict[str, Any]

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.arch}-weights.pt"

    def best(self, state: TrainState) -> Path:
        return self.folder / f"{self.arch}-epoch={state.best_epoch:02d}-val_acc1={state.best_acc1:.4f}.ckpt"

    def content(self, state: TrainState) -> dict[str, Any]:
        """All a run needs to go on, of types that ``torch.load(weights_only=True)`` admits."""
        ema = self.parts["ema"]
        return {
            "format": FORMAT,
            "state": asdict(state),
            "model": unwrapped(self.parts["model"]).state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "ema_updates": int(ema.n_averaged) if ema is not None else 0,
            "optimizer": self.parts["optimizer"].state_dict(),
            "scaler": self.parts["scaler"].state_dict(),
            **self.facts,
        }

    def save(self, content: dict[str, Any], *, is_best: bool = False) -> None:
        """Write ``last.ckpt``; for the best epoch so far its own checkpoint and the exported weights too.

        In an order such that a run that is killed between them can go on: what a checkpoint names has been written.

        Parameters
        ----------
        content : dict
            What `content` gave, or a copy of it.
        is_best : bool
        """
        if not self.world.is_main:
            return
        state = TrainState(**content["state"])
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_best:
            save_atomically(content["ema"] or content["model"], self.weights)
            save_atomically(content, self.best(state))
        save_atomically(content, self.last)
        if is_best:
            for older in written_checkpoints(self.folder, self.arch):
                if older not in (self.best(state), self.last):
                    older.unlink()

    def remove_unfinished(self) -> None:
        """Remove what runs that were killed while they saved have left in the folder."""
        if self.world.is_main:
            for path in self.folder.glob(".*.tmp"):
                path.unlink()

    def keep_earlier_run(self, *others: Path) -> list[Path]:
        """Move the checkpoints of an earlier run in this folder, and other files of it, out of the way of a new one.

        Returns
        -------
        list of Path
            Where they are now: a folder ``earlier-N`` beside them.
        """
        if not self.world.is_main or not self.folder.is_dir():
            return []
        found = [
            *written_checkpoints(self.folder, self.arch),
            *(path for path in (self.weights, *others) if path.exists()),
        ]
        if not found:
            return []
        number = 1
        while (target := self.folder / f"earlier-{number}").exists():
            number += 1
        target.mkdir()
        return [path.rename(target / path.name) for path in found]

    def restore(self, content: dict[str, Any], *, weights_only: bool = False) -> TrainState:
        """Load what `read_checkpoint` read into the parts of the run.

        Parameters
        ----------
        content : dict
        weights_only : bool
            Leave optimizer and loss scaling as they are: nothing will be trained.

        Raises
        ------
        ValueError
            Weights of another architecture or head, another optimizer, or a run stopped within an epoch whose
            remaining global batches would be others.
        """
        state = TrainState(**content["state"])
        if state.batch and not weights_only:
            self._check_same_batches(content)
            steps = state.batch // content["recipe"]["training"]["accumulation"]
            state.batch = steps * self.facts["recipe"]["training"]["accumulation"]
        ema = self.parts["ema"]
        try:
            unwrapped(self.parts["model"]).load_state_dict(content["model"])
            if ema is not None:
                ema.module.load_state_dict(content["ema"] or content["model"])
                ema.n_averaged.fill_(content["ema_updates"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another model than the recipe's: {error}") from error
        if not weights_only:
            self._restore_optimizer(content)
            if content["scaler"]:  # empty where the losses of the run were not scaled
                self.parts["scaler"].load_state_dict(content["scaler"])
        return state

    def _restore_optimizer(self, content: dict[str, Any]) -> None:
        """Take momenta and the like from a checkpoint, and everything that a recipe sets from this run's own."""
        optimizer, saved = self.parts["optimizer"], content["optimizer"]
        was, now = (facts["recipe"]["training"]["optimizer"] for facts in (content, self.facts))
        if was != now:
            raise ValueError(
                f"the checkpoint is of a run with training.optimizer={was}, this one has {now}: keep {was}, or begin a "
                "run from its weights with --model.weights"
            )
        own = optimizer.state_dict()
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
            raise ValueError(
                "the checkpoint's optimizer has the parameters in other groups, by their weight decay: keep "
                "training.bn_wd, or begin a run from its weights with --model.weights"
            )
        groups = [{**theirs, **ours} for theirs, ours in zip(saved["param_groups"], own["param_groups"], strict=True)]
        optimizer.load_state_dict({"state": {**own["state"], **saved["state"]}, "param_groups": groups})
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    # In the memory format of the weights, which may be another now: fused optimizers insist on it.
                    state[name] = torch.empty_like(parameter).copy_(value)

    def _check_same_batches(self, content: dict[str, Any]) -> None:
        """Within an epoch the steps to come must be of the samples that are left.

        They are for any number of ranks with the same global batch, where samples are dealt to the ranks one by one.
        """
        ours, state = self.facts, content["state"]
        where = f"the checkpoint stands {state['batch']} batches into epoch {state['epoch']}"
        if content["global_batch_size"] != ours["global_batch_size"]:
            raise ValueError(
                f"{where} at a global batch of {content['global_batch_size']}; this run has "
                f"{ours['global_batch_size']}. Go on with the same until the epoch ends"
            )
        order = ours["recipe"]["data"]["order"]
        if content["world_size"] != ours["world_size"] and order == "quasi_random":
            raise ValueError(
                f"{where} of {content['world_size']} processes in {order} order, each with pages of its own, which "
                f"{ours['world_size']} processes cannot end. Go on with {content['world_size']} until the epoch ends, "
                "or from a checkpoint of the end of an epoch"
            )
