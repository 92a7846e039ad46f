"""From what the file holds to what the model takes: images as normalised floats, labels as a tensor."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ffcv_ops._ffcv import AllocationQuery, State
from ffcv_ops.operations.base import Batch, BatchOperation


class Normalize(BatchOperation):
    """Normalise 8-bit images on the device they are on: ``(image - mean) / std``.

    uint8 tensor (N, H, W, 3) -> tensor (N, 3, H, W) of `dtype` in channels_last memory. Goes where FFCV's ToTorchImage
    and NormalizeImage would, after ToTensor and ToDevice; needs no cupy. The sum is made in float32 and rounded once.

    Parameters
    ----------
    mean, std : sequence of 3 floats
        Of each channel, in units of 0 to 255; std positive.
    dtype : torch.dtype
        float16, bfloat16 or float32.

    Raises
    ------
    ValueError
        For a dtype, mean or std outside the above.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32):
        super().__init__()
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype is {dtype}; it must be torch.float16, torch.bfloat16 or torch.float32")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean is {mean} and std {std}; each needs 3 values, those of std above 0")
        self.dtype = dtype
        self.scale = 1.0 / torch.tensor(std, dtype=torch.float64)
        self.shift = -torch.tensor(mean, dtype=torch.float64) * self.scale
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        height, width, channels = previous_state.shape
        if channels != 3 or not isinstance(previous_state.dtype, torch.dtype):
            raise ValueError(
                f"Normalize needs tensors (H, W, 3), not {previous_state.dtype} {previous_state.shape}: "
                "put ToTensor before it, and leave ToTorchImage out"
            )
        query = AllocationQuery((height, width, channels), dtype=self.dtype, device=previous_state.device)
        return replace(previous_state, jit_mode=False, shape=(channels, height, width), dtype=self.dtype), query

    def generate_code(self) -> Any:
        constants = self._constants  # copied to a device once, which waits for it, and not at every epoch

        def normalize(images: torch.Tensor, normalized: torch.Tensor, batch: Batch) -> torch.Tensor:
            if images.device not in constants:
                constants[images.device] = (self.shift.float().to(images.device), self.scale.float().to(images.device))
            shift, scale = constants[images.device]
            torch.addcmul(shift, images, scale, out=normalized)
            return normalized.permute(0, 3, 1, 2)

        return normalize


class Label(BatchOperation):
    """Decoder of an IntField: int64 tensor (N,), with nothing to compile; in pinned memory where there is a GPU."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        state = replace(previous_state, jit_mode=False, shape=(), dtype=torch.int64)
        return state, AllocationQuery((), dtype=torch.int64, device=torch.device("cpu"))

    def generate_code(self) -> Any:
        def decode_labels(sample_ids: np.ndarray, decoded: torch.Tensor, labels: np.ndarray, _: Batch) -> torch.Tensor:
            np.copyto(decoded.numpy(), labels[sample_ids])  # refuses what are no whole numbers
            return decoded

        return decode_labels
