"""The data path: from an image folder to a ``.beton`` file, and from the file to a batch.

Names are imported on first use, so that the writer's processes pay for neither torch nor Numba.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Beton": "beton",
    "CenterCrop": "crops",
    "Label": "normalize",
    "Loader": "loader",
    "Mix": "mix",
    "Normalize": "normalize",
    "OrderOption": "loader",
    "RandAugment": "rand_augment",
    "RandomErasing": "rand_augment",
    "RandomResizedCrop": "crops",
    "SampleError": "pipeline",
    "TrivialAugmentWide": "rand_augment",
    "read_beton": "beton",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
