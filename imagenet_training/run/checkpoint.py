"""Checkpoints: their content, the folder that holds them, written whole or not at all."""

import copy
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ffcv_ops.errors import UserError
from ffcv_ops.files import replacing
from ffcv_ops.units import show_names
from imagenet_training.models.card import ModelCard
from imagenet_training.models.export import export_weights
from imagenet_training.state import TrainState
from imagenet_training.torch_file import UnreadableFile, check_whole, load_file
from imagenet_training.training.trainer import Trainer, unwrapped

FORMAT = 2
# Format 1 counted the position within an epoch in batches; `TrainState.of` reads both.
READABLE_FORMATS = (1, FORMAT)


def save_atomically(content: Any, path: Path) -> None:
    """Save with ``torch.save`` under a temporary name, then move the file to ``path``."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def copy_to_cpu(value: Any) -> Any:
    """Return a copy on the CPU of what a checkpoint holds. Further steps do not change the copy."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        # A state_dict has the versions of its modules as an attribute, which copy.copy() keeps.
        new = copy.copy(value)
        new.update((key, copy_to_cpu(part)) for key, part in value.items())
        return new
    return [copy_to_cpu(part) for part in value] if isinstance(value, list) else value


def size_bytes(value: Any) -> int:
    """Return the size of the tensors of a checkpoint's content."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(size_bytes, parts))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running any code it may hold.

    Raises
    ------
    UserError
        If there is no such file, or the file is damaged, no checkpoint of a run, or of a newer version.
    """
    if not Path(path).is_file():
        raise UserError(f"training.resume={path}: no such file")
    try:
        check_whole(path)
        content = load_file(path)
    except UnreadableFile as error:
        if Path(path).suffix == ".safetensors":
            raise UserError(_no_checkpoint_message(path)) from error
        raise UserError(f"training.resume={path} cannot be read as a checkpoint: {error}") from error
    _refuse_newer_version(path, content)
    if not isinstance(content, dict) or content.get("format") not in READABLE_FORMATS or "state" not in content:
        raise UserError(_no_checkpoint_message(path))
    name = str(content["state"].get("run_name", ""))
    if Path(name).name != name:  # the log files of the run get this name
        raise UserError(f"training.resume={path} names its log files {name!r}: it is not to be trusted")
    return content


def _no_checkpoint_message(path: str | Path) -> str:
    return (
        f"training.resume={path} is not a checkpoint of a run (one such as checkpoints/last.ckpt); "
        "weights alone are loaded with --model.weights"
    )


def _refuse_newer_version(path: str | Path, content: Any) -> None:
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {number}, which a newer version has written; this version reads formats "
            f"{READABLE_FORMATS[0]} to {FORMAT}: use the newer version, or name another checkpoint with --resume"
        )
    state = content.get("state") if number == FORMAT else None
    if isinstance(state, dict):
        known = {field.name for field in fields(TrainState)}
        if unknown := [str(name) for name in state if name not in known]:
            raise UserError(
                f"{path} is a checkpoint which a newer version has written: this version does not know "
                f"{show_names(unknown)} in its state; use the newer version, or name another checkpoint with --resume"
            )


def checkpoint_content(
    state: TrainState, trainer: Trainer, provenance: dict[str, Any], card: ModelCard
) -> dict[str, Any]:
    """Return everything a run needs to continue, of types that ``torch.load(weights_only=True)`` admits.

    Besides position, tensors and the facts of the model, it has the keys of `describe_run`.
    """
    ema = trainer.ema
    return {
        "format": FORMAT,
        "state": asdict(state),
        "model": unwrapped(trainer.model).state_dict(),
        "ema": ema.module.state_dict() if ema is not None else None,
        "ema_updates": int(ema.n_averaged) if ema is not None else 0,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "card": card.to_dict(),
        **provenance,
    }


class CheckpointFolder:
    """The checkpoints of the runs of one architecture in one folder, which the first save makes.

    The names of the best checkpoint and the exported weights begin with the architecture.
    """

    def __init__(self, folder: Path, arch: str):
        self.folder, self.arch = folder, arch

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.arch}-weights.safetensors"

    @property
    def older_weights(self) -> Path:
        """The weights that version 0.1.0 exported. They have no facts about the model."""
        return self.folder / f"{self.arch}-weights.pt"

    def best(self, state: TrainState) -> Path:
        """Return the path of the best checkpoint of a run."""
        return self.folder / f"{self.arch}-epoch={state.best_epoch:02d}-val_acc1={state.best_acc1:.4f}.ckpt"

    def paths(self) -> list[Path]:
        """Return the last checkpoint and the best ones that runs have left."""
        best = re.compile(re.escape(self.arch) + r"-epoch=\d+-val_acc1=\d\.\d{4}\.ckpt")
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [path for path in paths if path.name == "last.ckpt" or best.fullmatch(path.name)]

    def newest(self, run_name: str = "") -> tuple[Path | None, list[str]]:
        """Return the checkpoint that is furthest, by epochs and then by samples, and a notice for each damaged one.

        Of each file only the description is read, and the whole file only if it may be the answer. A file that a
        running run has just removed is left out. If a run is named, only its checkpoints count.

        Raises
        ------
        UserError
            If a newer version has written one of the files: an earlier checkpoint would replace it.
        """
        found, notices = [], list[str]()

        def pass_over(path: Path, error: Exception) -> None:
            if path.exists():
                notices.append(f"{path} is damaged and was passed over: {error}")

        for path in self.paths():
            try:
                content = load_file(path, mmap=True)
                _refuse_newer_version(path, content)
                state = TrainState.of(content)
            except (UnreadableFile, TypeError, KeyError) as error:
                pass_over(path, error)
            else:
                if run_name in ("", state.run_name):
                    found.append((state.epoch, state.samples, path.name == "last.ckpt", path))
        for *_, path in sorted(found, reverse=True):
            try:
                check_whole(path)
            except UnreadableFile as error:
                pass_over(path, error)
            else:
                return path, notices
        return None, notices

    def save(self, content: dict[str, Any], *, is_best: bool = False) -> None:
        """Write ``last.ckpt`` with the content of `checkpoint_content`, or a copy of it.

        For the best epoch so far, write its own checkpoint and the exported weights too. A run may be killed between
        any two files. The files that a checkpoint names are written before the checkpoint, so that the run can
        continue.
        """
        state = TrainState.of(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_best:
            card = ModelCard.from_dict(content["card"], str(self.weights))
            card = card.at(state, averaged=bool(content["ema"]))
            export_weights(self.weights, content["ema"] or content["model"], card)
            save_atomically(content, self.best(state))
        save_atomically(content, self.last)
        if is_best:
            for older in self.paths():
                if older not in (self.best(state), self.last):
                    older.unlink()
            self.older_weights.unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """Remove the temporary files of runs that were killed during a save."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    def keep_earlier_run(self, *others: Path) -> list[Path]:
        """Move the checkpoints and other files of an earlier run out of the way of a new run. Return the new paths."""
        return self._keep([*self.paths(), self.weights, self.older_weights, *others])

    def keep_abandoned(self, resumed: Path, state: TrainState) -> list[Path]:
        """Move the checkpoints that are further than the resumed one out of the way. Return the new paths.

        Otherwise ``--resume auto`` would return to the part of the run that was abandoned. The state is the position of
        the resumed checkpoint. Exported weights move with their checkpoint.
        """
        further = []
        for path in self.paths():
            with suppress(UnreadableFile, TypeError, KeyError):
                other = TrainState.of(load_file(path, mmap=True))
                if (other.epoch, other.samples) > (state.epoch, state.samples) and not path.samefile(resumed):
                    further.append(path)
        if any(path != self.last for path in further):
            further += [self.weights, self.older_weights]
        return self._keep(further)

    def _keep(self, paths: Iterable[Path]) -> list[Path]:
        """Move those of the paths that exist to a new folder ``earlier-N``, and return their new paths."""
        found = [path for path in paths if path.exists()]
        if not found:
            return []
        number = 1
        while (target := self.folder / f"earlier-{number}").exists():
            number += 1
        target.mkdir(parents=True)
        return [Path(shutil.move(path, target / path.name)) for path in found]  # perhaps to another disk
