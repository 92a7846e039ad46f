"""The data path: from an image folder to a ``.beton`` file, and from the file to a batch.

The file:

- `read_beton`: check header, tables and manifest of a file, and give them as a `Beton`.
- `Beton`: what a file holds: samples, classes, sizes, digest.

The loader:

- `Loader`: ffcv's, with errors raised, threads freed, epochs resumable, and draws that are functions of the seed.
- `OrderOption`: the order of the samples: ``SEQUENTIAL``, ``RANDOM``, ``QUASI_RANDOM``.
- `SampleError`: raised for a sample that cannot be decoded; names it and the file.

Operations of a pipeline, in the order in which they stand there:

- `RandomResizedCrop`, `CenterCrop`: decode the part of an image that is needed, and resample it.
- `RandAugment`, `TrivialAugmentWide`, `RandomErasing`: change 8-bit images.
- `Normalize`: 8-bit images to normalised floats, on the CPU or the GPU.
- `Mix`: Mixup and CutMix of a batch: ``mix.images()`` and ``mix.targets()``.
- `Label`: decode class numbers.
- `ToTensor`, `ToDevice`: FFCV's own.

Errors:

- `UserError`: a `ValueError` that the user can put right, in one line.

`python -m imagenet_training.doctor` tells whether a machine has what they need.

Names are imported on first use: the writer's processes need no torch, and `read_beton` no Numba either.
"""

from __future__ import annotations  # the doctor is to be read by older Pythons too

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffcv_ops._ffcv import OrderOption, ToDevice, ToTensor
    from ffcv_ops.beton.reading import Beton, read_beton
    from ffcv_ops.errors import UserError
    from ffcv_ops.loading.loader import Loader
    from ffcv_ops.operations.base import SampleError
    from ffcv_ops.operations.crops import CenterCrop, RandomResizedCrop
    from ffcv_ops.operations.erasing import RandomErasing
    from ffcv_ops.operations.mix import Mix
    from ffcv_ops.operations.normalize import Label, Normalize
    from ffcv_ops.operations.rand_augment import RandAugment, TrivialAugmentWide

__all__ = [
    "Beton",
    "CenterCrop",
    "Label",
    "Loader",
    "Mix",
    "Normalize",
    "OrderOption",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "SampleError",
    "ToDevice",
    "ToTensor",
    "TrivialAugmentWide",
    "UserError",
    "read_beton",
]
_HOMES = {
    "Beton": "beton.reading",
    "CenterCrop": "operations.crops",
    "Label": "operations.normalize",
    "Loader": "loading.loader",
    "Mix": "operations.mix",
    "Normalize": "operations.normalize",
    "OrderOption": "_ffcv",
    "RandAugment": "operations.rand_augment",
    "RandomErasing": "operations.erasing",
    "RandomResizedCrop": "operations.crops",
    "SampleError": "operations.base",
    "ToDevice": "_ffcv",
    "ToTensor": "_ffcv",
    "TrivialAugmentWide": "operations.rand_augment",
    "UserError": "errors",
    "read_beton": "beton.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
