"""Read weights from files of several kinds, and load them into a model."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ffcv_ops.errors import UserError


def load_weights(model: nn.Module, path: str | Path, *, ema: bool | Literal["auto"] = "auto") -> None:
    """Load a local file of weights into a model, in place.

    The file may be a state dict (``torch.save`` or safetensors), an exported weights file, a checkpoint of this project
    (its moving average if it has one), or ffcv-imagenet's ``final_weights.pt``. Prefixes ``module.`` and ``_orig_mod.``
    are dropped. A head of another size keeps its initial weights.

    Raises
    ------
    UserError
        If the file is missing or unreadable, or its tensors do not fit. The message names the first few of them.
    """
    if not Path(path).is_file():
        raise UserError(f"model.weights={path}: no such file")
    content: Any
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpicklers and archives raise many kinds
        raise UserError(f"model.weights={path} is not a file of weights: {error}") from error
    averaged, raw = ("ema", "state_dict_ema", "model_ema"), ("model", "state_dict")
    names = {"auto": averaged + raw, True: averaged, False: raw}[ema]
    found = [name for name in names if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if ema is True and not found:
        raise UserError(f"model.weights={path} has no averaged weights: pass --model.ema=0 for the raw ones")
    content = content[found[0]] if found else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"model.weights={path} holds no state dict")
    load_state(model, content, str(path))


def load_state(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict into a model, in place. Only a head of another size may keep its initial weights."""
    own = model.state_dict()
    state = {_plain_name(name, own): value for name, value in state.items() if not name.endswith("blur_filter")}
    head = {name for name in list(own)[-2:] if name in state and own[name].shape != state[name].shape}
    state = {name: value for name, value in state.items() if name not in head}
    missing = sorted(own.keys() - state.keys() - head)
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"the weights of {source} do not fit this architecture: tensors {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def _plain_name(name: str, own: dict[str, torch.Tensor]) -> str:
    """Return a name without the parts that DDP, torch.compile and ffcv-imagenet's BlurPool (``.conv``) add."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    unwrapped = name.removesuffix(".conv.weight") + ".weight"
    return unwrapped if name not in own and unwrapped in own else name
