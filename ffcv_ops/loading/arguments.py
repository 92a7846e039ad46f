"""The checks of a loader's arguments."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import OrderOption, PipelineSpec
from ffcv_ops.beton.reading import Beton
from ffcv_ops.errors import UserError
from ffcv_ops.machine import allowed_cpus
from ffcv_ops.operations.base import BatchOperation


def at_least(least: int, name: str, value: int) -> int:
    """Return a whole number, after a check that it is not below `least`."""
    if int(value) != value or value < least:
        raise UserError(f"{name} is {value}; it must be a whole number of at least {least}")
    return int(value)


def allowed_workers(num_workers: int) -> int:
    """Return the number of workers: at most the CPUs that the process may use, which is also the default."""
    allowed = allowed_cpus()
    if num_workers > allowed:
        warnings.warn(
            f"num_workers is {num_workers}; {allowed} CPUs are allowed to this process, using {allowed}", stacklevel=3
        )
    return allowed if num_workers < 1 else min(int(num_workers), allowed)


def topology(distributed: bool, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size, from the arguments or from torch.distributed."""
    if (rank is None) != (world_size is None):
        raise UserError("rank and world_size go together: give both or neither")
    if rank is None or world_size is None:
        if not distributed:
            return 0, 1
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise UserError(
                "distributed=True needs torch.distributed.init_process_group before, or rank and world_size"
            )
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise UserError(f"rank is {rank} of world_size {world_size}; ranks go from 0 to world_size - 1")
    return rank, world_size


def chosen_seed(seed: int | None, distributed: bool, order: Any) -> int:
    """Return the seed. The default is 0 for several ranks, which must agree, and a random number for one."""
    if seed is None:
        if not distributed:
            return int(np.random.randint(0, np.iinfo("int32").max))
        if order != OrderOption.SEQUENTIAL:
            warnings.warn("no seed was given with distributed=True: using 0 on all ranks", stacklevel=3)
        return 0
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed is {seed}; it must be from 0 to 2**63 - 1")
    return int(seed)


def checked_ids(indices: Any, beton: Beton, name: str = "indices") -> np.ndarray:
    """Return sample ids, int32 if all ids of the file fit, after a check that the file has them. None: all ids."""
    dtype = np.int32 if beton.num_samples < 1 << 31 else np.int64
    if indices is None:
        return np.arange(beton.num_samples, dtype=dtype)
    ids = np.asarray(indices)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise UserError(f"{name}: expected a sequence of sample ids, got {ids.dtype} of shape {ids.shape}")
    outside = (ids < 0) | (ids >= beton.num_samples)
    if outside.any():
        raise UserError(
            f"{name}: sample {ids[outside][0]} is not in {beton.path}, which has {beton.num_samples} samples"
        )
    return ids.astype(dtype)


def pipeline_spec(name: str, pipeline: Any, handlers: Mapping[str, Any]) -> PipelineSpec:
    """Return a copy of the user's pipeline, with our decoder at its place."""
    # FFCV takes the decoder out of the list of transforms, so the copy needs a list of its own.
    if isinstance(pipeline, PipelineSpec):
        spec = PipelineSpec(pipeline.source, pipeline.decoder, list(pipeline.transforms))
    elif isinstance(pipeline, Sequence):
        spec = PipelineSpec(name, decoder=None, transforms=list(pipeline))
    else:
        raise UserError(f"the pipeline of {name} must be a PipelineSpec or a sequence of operations, not {pipeline!r}")
    if isinstance(spec.source, str) and spec.source not in handlers:
        raise UserError(f"the pipeline of {name} reads the field {spec.source}; the file has {', '.join(handlers)}")
    if isinstance(spec.source, str) and spec.decoder is None and spec.transforms:
        if isinstance(spec.transforms[0], BatchOperation):
            spec.decoder = spec.transforms.pop(0)
    return spec
