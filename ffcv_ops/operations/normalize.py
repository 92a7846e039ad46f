"""The last operations before the model: images become normalised floats, labels become a tensor."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import AllocationQuery, State
from ffcv_ops.errors import UserError
from ffcv_ops.operations.base import Batch, BatchOperation


class Normalize(BatchOperation):
    """Normalise 8-bit images on their device: ``(image - mean) / std``.

    The input is a uint8 tensor (N, H, W, 3). The output is a tensor (N, 3, H, W) of `dtype` in channels_last memory.
    The operation replaces ToTorchImage and NormalizeImage of FFCV, after ToTensor and ToDevice, and needs no cupy. The
    arithmetic is in float32, and the result is rounded once.

    Parameters
    ----------
    mean, std : sequence of 3 float
        Mean and standard deviation of each channel, in units of 0 to 255; std is positive.
    dtype : torch.dtype
        float16, bfloat16 or float32.

    Raises
    ------
    UserError
        If dtype, mean or std is outside its range.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32):
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UserError(f"dtype is {dtype}; it must be torch.float16, torch.bfloat16 or torch.float32")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"mean is {mean} and std {std}; each needs 3 values, those of std above 0")
        self.dtype = dtype
        self.scale = 1.0 / torch.tensor(std, dtype=torch.float64)
        self.shift = -torch.tensor(mean, dtype=torch.float64) * self.scale
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        height, width, channels = previous_state.shape
        if channels != 3 or not isinstance(previous_state.dtype, torch.dtype):
            raise UserError(
                f"Normalize needs tensors (H, W, 3), not {previous_state.dtype} {previous_state.shape}: "
                "put ToTensor before it, and leave ToTorchImage out"
            )
        query = AllocationQuery((height, width, channels), dtype=self.dtype, device=previous_state.device)
        return replace(previous_state, jit_mode=False, shape=(channels, height, width), dtype=self.dtype), query

    def generate_code(self) -> Any:
        constants = self._constants  # copied to a device once, because the CPU waits for the copy

        def normalize(images: torch.Tensor, normalized: torch.Tensor, batch: Batch) -> torch.Tensor:
            if images.device not in constants:
                constants[images.device] = (self.shift.float().to(images.device), self.scale.float().to(images.device))
            shift, scale = constants[images.device]
            torch.addcmul(shift, images, scale, out=normalized)
            return normalized.permute(0, 3, 1, 2)

        return normalize


class Label(BatchOperation):
    """The decoder of an IntField: an int64 tensor (N,), in pinned memory if there is a GPU. It compiles nothing."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        state = replace(previous_state, jit_mode=False, shape=(), dtype=torch.int64)
        return state, AllocationQuery((), dtype=torch.int64, device=torch.device("cpu"))

    def generate_code(self) -> Any:
        def decode_labels(sample_ids: np.ndarray, decoded: torch.Tensor, labels: np.ndarray, _: Batch) -> torch.Tensor:
            np.copyto(decoded.numpy(), labels[sample_ids])  # raises a TypeError if labels are not integers
            return decoded

        return decode_labels
