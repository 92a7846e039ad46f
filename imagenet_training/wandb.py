"""Record a run in Weights & Biases; offline if there is no API key."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagenet_training.state import TrainState


def start_wandb(state: TrainState, provenance: dict[str, Any], folder: Path, log: Callable[[str], None]) -> Any:
    """Start the W&B run of a recipe, or continue the one that ``state`` names.

    Parameters
    ----------
    state : TrainState
        Gets the id of the W&B run.
    provenance : dict
        The run's origin; its ``recipe`` has the ``wandb`` settings.
    folder : Path
        W&B's own files go below it.
    log : callable
        Gets a line of text for each decision made for the user.

    Returns
    -------
    wandb.Run or None
        None if the recipe turns W&B off.
    """
    recipe = provenance["recipe"]["wandb"]
    if not recipe["enable"]:
        return None
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not has_wandb_key():
        mode = "offline"
        log(
            "W&B: no API key found, so this run is recorded offline. `bash launch/setup_wandb.sh` stores a key; "
            "`wandb sync` uploads the run; --no_wandb records nothing."
        )
    settings: dict[str, Any] = {
        "project": recipe["project"],
        "name": recipe["name"] or state.run_name,
        "id": state.wandb_id or None,
        "resume": "allow" if state.wandb_id else None,
        "config": {name: value for name, value in provenance.items() if name != "classes"},
        "dir": str(folder),
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        run = wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
    except wandb.errors.Error as error:
        log(f"W&B: {error}. This run is recorded offline.")
        run = wandb.init(mode="offline", **settings)
    state.wandb_id = run.id
    return run


def has_wandb_key() -> bool:
    """Return True if W&B could log in without a prompt: by a key in the environment, or kept by `wandb login`."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
