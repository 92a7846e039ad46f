"""Continue a run: choose the checkpoint, and restore its state into the trainer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffcv_ops.errors import UserError
from ffcv_ops.settings.fields import show
from ffcv_ops.units import show_names
from imagenet_training.distributed import World, decided_by_main
from imagenet_training.models.weights import fault_of
from imagenet_training.planning.plan import RunPlan
from imagenet_training.planning.recipe import AUTO, Recipe
from imagenet_training.run.checkpoint import CheckpointFolder, read_checkpoint
from imagenet_training.state import TrainState
from imagenet_training.training.optim import regroup_as_earlier
from imagenet_training.training.step_mode import kept_mode
from imagenet_training.training.trainer import Trainer, unwrapped

# The settings that a model is built from.
_OF_THE_MODEL = ("model", "arch"), ("model", "library"), ("model", "num_classes"), ("training", "use_blurpool")

# The entries of a checkpoint that hold tensors.
_TENSORS = ("model", "ema", "optimizer", "scaler")

# The note in the ranks' store with the names that the run had before torchrun restarted it.
RUN_NOTE = "run"
# In that note, the token of the run's lock.
LOCK_NOTE = "lock"


@dataclass(frozen=True)
class ResumePoint:
    """The position from which a run starts.

    Attributes
    ----------
    path : str or None
        The checkpoint; None to start from the beginning.
    content : dict or None
        The content of the checkpoint.
    names : dict
        ``run_name`` and ``wandb_id`` of a run that torchrun has restarted before its first checkpoint.
    notices : tuple of str
        Facts that the user should know.
    """

    path: str | None
    content: dict[str, Any] | None
    names: Mapping[str, str]
    notices: tuple[str, ...]

    def without_tensors(self) -> "ResumePoint":
        """Return the point without the tensors of its checkpoint, which fill memory once they are restored."""
        if self.content is None:
            return self
        kept = {key: value for key, value in self.content.items() if key not in _TENSORS}
        return replace(self, content=kept)

    def has_model_of(self, recipe: Recipe) -> bool:
        """Return True if the run of the checkpoint had a recipe's model and sizes of images."""
        was, now = (self.content or {}).get("recipe", {}), recipe.to_dict()
        return all(was.get(section) == now[section] for section in ("model", "resolution", "validation"))


def choose_checkpoint(recipe: Recipe, world: World) -> ResumePoint:
    """Choose the checkpoint to continue from, the same on every rank.

    1. If torchrun has restarted this run, its own newest checkpoint.
    2. Else the checkpoint that ``training.resume`` names; for ``auto`` the newest one in ``logging.folder``.
    3. Else none.

    Raises
    ------
    UserError
        If the checkpoint cannot be read, all checkpoints found are damaged, the checkpoint was replaced while the ranks
        read it, or a run that torchrun has restarted would fail again.
    """
    if reason := world.store.read("given up"):
        raise UserError(f"the run is not tried again, since it would fail again: {reason}")
    names: dict[str, str] = json.loads(world.store.read(RUN_NOTE) or "{}")
    path, notices = decided_by_main(lambda: _choose_path(recipe, names.get("run_name", "")))
    content = read_checkpoint(path) if path is not None else None
    position = repr(content and content["state"])
    if decided_by_main(lambda: position) != position:  # a run in that folder goes on while its weights are evaluated
        raise UserError(f"training.resume={path} was replaced while the ranks read it: start again")
    return ResumePoint(path, content, names, tuple(notices))


def _choose_path(recipe: Recipe, restarted_run: str) -> tuple[str | None, list[str]]:
    asked, evaluates = recipe.training.resume, recipe.training.eval_only
    checkpoints = CheckpointFolder(Path(recipe.logging.folder) / "checkpoints", recipe.model.arch)
    notices: list[str] = []
    if restarted_run:
        path, notices = checkpoints.newest(restarted_run)
        if path is not None:
            return str(path), [*notices, f"torchrun has restarted the run: it goes on from its own {path}"]
    if asked != AUTO:
        return asked, notices
    path, notices = checkpoints.newest()
    if path is None and notices:
        remedy = "name the checkpoint to evaluate" if evaluates else "move it away to start a new run"
        raise UserError(f"--resume auto: {'; '.join(notices)}. There is no other: {remedy}")
    if path is None and evaluates:
        raise UserError(f"--resume auto: no checkpoint in {checkpoints.folder}, so there is nothing to evaluate")
    if path is None:
        return None, [f"--resume auto: no checkpoint in {checkpoints.folder}, so a new run starts"]
    return str(path), notices


def restore(trainer: Trainer, point: ResumePoint, recipe: Recipe, plan: RunPlan) -> TrainState:
    """Load a checkpoint into the trainer, and return the position of the run.

    Raises
    ------
    UserError
        If the weights are of another architecture or head, or the optimizer is another one.
    """
    content = point.content
    if content is None:
        return TrainState(run_name=point.names.get("run_name", ""), wandb_id=point.names.get("wandb_id", ""))
    state = TrainState.of(content)
    earlier_batches = content["global_batch_size"], content["recipe"]["training"]["accumulation"]
    if earlier_batches != (plan.global_batch_size, plan.accumulation):
        state.numbered_batches = False  # numbers could repeat
    load_whole(unwrapped(trainer.model), content["model"], str(point.path), content["recipe"])
    if trainer.ema is not None:
        load_whole(trainer.ema.module, content["ema"] or content["model"], str(point.path), content["recipe"])
        trainer.ema.n_averaged.fill_(content["ema_updates"])
    _restore_optimizer(trainer, content, recipe)
    if content["scaler"]:  # empty if the losses of the run were not scaled
        trainer.scaler.load_state_dict(content["scaler"])
    trainer.modes = kept_mode(trainer.modes, state.step_mode)
    return state


def load_whole(model: nn.Module, state: Mapping[str, torch.Tensor], path: str, recipe: Mapping[str, Any]) -> None:
    """Load all tensors of a checkpoint's model, in place. The path and the resolved recipe of its run are for messages.

    Raises
    ------
    UserError
        If the tensors are those of another model, if a value is not finite, or if a variance is negative.
    """
    own = model.state_dict()
    differing = [name for name in own if name not in state or state[name].shape != own[name].shape]
    differing += [name for name in state if name not in own]
    if differing:
        saved = {f"{section}.{name}": recipe.get(section, {}).get(name) for section, name in _OF_THE_MODEL}
        settings = " ".join(f"--{key}={show(value)}" for key, value in saved.items() if value is not None)
        raise UserError(
            f"{path} is of another model than the recipe's: {len(differing)} tensors ({show_names(differing)}) differ; "
            f"pass the settings of its run: {settings}"
        )
    if fault := fault_of(state, own):
        raise UserError(f"{path} has {fault}: its run failed; use an earlier checkpoint")
    model.load_state_dict(state)


def _restore_optimizer(trainer: Trainer, content: Mapping[str, Any], recipe: Recipe) -> None:
    """Take momenta and step counts from a checkpoint, and everything that a recipe sets from this run."""
    optimizer, training, saved = trainer.optimizer, recipe.training, content["optimizer"]
    was = content["recipe"]["training"]["optimizer"]
    if was != training.optimizer:
        raise UserError(
            f"the checkpoint is of a run with training.optimizer={was}, this one has {training.optimizer}: keep {was}, "
            "or begin a run from its weights with --model.weights"
        )
    if not _fits(optimizer, saved):
        # Versions before the one that reads `no_weight_decay()` decayed all parameters of several dimensions.
        changed = regroup_as_earlier(optimizer, unwrapped(trainer.model), training.weight_decay)
        if not _fits(optimizer, saved):
            raise UserError(
                "the checkpoint's optimizer has other parameters, or has them in other groups: keep training.bn_wd, "
                "training.layer_decay and model.freeze, or begin a run from its weights with --model.weights"
            )
        trainer.notices += (
            f"an earlier version began the run, and gave training.weight_decay to {show_names(changed)} too; the run "
            "goes on so, and a new run would give them training.bn_wd",
        )
    own = optimizer.state_dict()
    groups = [{**theirs, **ours} for theirs, ours in zip(saved["param_groups"], own["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": {**own["state"], **saved["state"]}, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # The memory format of the weights may have changed, and fused optimizers insist on the weights' one.
                state[key] = torch.empty_like(parameter).copy_(value)


def _fits(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> bool:
    """Return True if a saved optimizer has as many parameters in each group, and tensors of their shapes."""
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
        return False
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return all(
        value.shape == parameter.shape
        for number, parameter in enumerate(parameters)
        for value in saved["state"].get(number, {}).values()
        if isinstance(value, torch.Tensor) and value.ndim  # a count of steps has no dimension
    )
