"""The model path: from a recipe to a trained model, and from its files back to the model.

- `load_model`: build the model of an exported weights file or of a checkpoint.
- `ModelCard`: the facts about a model that its tensors do not hold.

Names are imported on first use, because PyTorch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagenet_training.models.card import ModelCard
    from imagenet_training.models.export import load_model

__all__ = ["ModelCard", "load_model"]
_HOMES = {"ModelCard": "card", "load_model": "export"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
