"""The base of operations that change 8-bit images in place, between the crop and ToTensor."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ffcv_ops._ffcv import State
from ffcv_ops.errors import UserError
from ffcv_ops.operations.base import Batch, BatchOperation

IMAGENET_MEAN = (124, 116, 104)
"""The mean colour of ImageNet: RGB, rounded."""


class ImageOperation(BatchOperation):
    """An operation on a uint8 array (N, H, W, 3), in place. A subclass writes `apply`.

    A new augmentation takes three files: its own file in this folder, ``ffcv_ops/__init__.py`` for its public name, and
    its test. CONTRIBUTING.md has the steps, also those for a setting of recipes. `Batch.draw_uniforms` gives it random
    numbers. For example::

        class RandomInvert(ImageOperation):
            def __init__(self, prob: float):
                super().__init__()
                self.prob = prob

            def apply(self, images: np.ndarray, batch: Batch) -> None:
                drawn = batch.draw_uniforms(rng.named_stream("RandomInvert"), ())
                images[drawn < self.prob] ^= 255
    """

    @abstractmethod
    def apply(self, images: np.ndarray, batch: Batch) -> None:
        """Change the images of a batch.

        Parameters
        ----------
        images : ndarray of uint8, shape (N, H, W, 3), C-contiguous
            RGB.
        batch : Batch
            Seed, epoch and sample ids, for random draws, and the workers, for kernels.
        """

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        if previous_state.dtype != np.dtype("u1") or previous_state.shape[-1] != 3:
            raise UserError(
                f"{type(self).__name__} needs uint8 arrays (H, W, 3), not {previous_state.dtype} "
                f"{previous_state.shape}: put it after the decoder and before ToTensor"
            )
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Callable[..., np.ndarray]:
        def change(images: np.ndarray, _: None, batch: Batch) -> np.ndarray:
            self.apply(images, batch)
            return images

        return change


def read_colour(fill: Sequence[int]) -> np.ndarray:
    """Return a colour as an array, uint8 (3,); raise UserError if the value is not a colour."""
    if len(fill) != 3 or not all(0 <= value <= 255 for value in fill):
        raise UserError(f"fill is {fill}; it must be 3 values from 0 to 255")
    return np.array(fill, dtype=np.uint8)
