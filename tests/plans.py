"""Plans of runs for tests that need only some of their numbers."""

from typing import Any

from imagenet_training.planning.plan import RunPlan


def make_plan(steps_per_epoch: int = 1, **numbers: Any) -> RunPlan:
    """Build the plan of one process at a constant learning rate, other numbers as given."""
    defaults = {
        "world_size": 1,
        "batch_size": 8,
        "accumulation": 1,
        "global_batch_size": 8,
        "lr": 0.1,
        "lr_arithmetic": "0.1",
        "epochs": 1,
        "samples_per_epoch": 8 * steps_per_epoch,
        "num_train": 8 * steps_per_epoch,
        "num_val": 8,
        "ema_decay": 0.0,
        "precision": "32",
        "save_every_steps": 0,
        "evaluates_every_epoch": True,
        "lr_at": lambda step: 0.1,
        "resolution": lambda epoch: 8,
    }
    return RunPlan(steps_per_epoch=steps_per_epoch, **{**defaults, **numbers})
