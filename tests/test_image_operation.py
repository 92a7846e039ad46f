"""Tests of what all operations that change images have in common, and of what a new one needs."""

import numpy as np
import pytest
import torch
from ffcv.pipeline.state import State

from ffcv_ops import rng
from ffcv_ops.operations.base import Batch
from ffcv_ops.operations.erasing import RandomErasing
from ffcv_ops.operations.image_operation import ImageOperation
from ffcv_ops.operations.rand_augment import RandAugment, TrivialAugmentWide
from ffcv_ops.operations.threads import WorkerPool
from tests.image_operations import SIZE, augmented, batch_of, images

RSB = "rand-m7-mstd0.5-inc1"


def test_refuses_a_wrong_colour_and_a_wrong_place():
    for build in (lambda: RandAugment(RSB, fill=(300, 0, 0)), lambda: RandomErasing(0.1, fill=(0, 0))):
        with pytest.raises(ValueError, match="fill"):
            build()
    state = State(jit_mode=False, device=torch.device("cpu"), shape=(*SIZE, 3), dtype=torch.uint8)
    for operation in (RandAugment(RSB), RandomErasing(0.1)):
        with pytest.raises(ValueError, match="ToTensor"):
            operation.declare_state_and_memory(state)


@pytest.mark.parametrize(
    "policy", [RandAugment(RSB), TrivialAugmentWide(), RandomErasing(0.5)], ids=lambda p: type(p).__name__
)
def test_images_are_a_function_of_seed_epoch_sample_and_copy(policy):
    source = images(24)
    reference = augmented(policy, source, batch_of(24, seed=3, epoch=1))
    assert np.array_equal(reference, augmented(policy, source, batch_of(24, seed=3, epoch=1, num_workers=3)))
    alone = augmented(policy, source[7:9], Batch(3, 1, 5 + 3 * np.arange(7, 9), WorkerPool(1), storage=None))
    assert np.array_equal(reference[7:9], alone)
    others = [batch_of(24, seed=4, epoch=1), batch_of(24, seed=3, epoch=2)]
    others.append(batch_of(24, seed=3, epoch=1, copies=np.ones(24, dtype=np.int64)))
    for other in others:
        assert not np.array_equal(reference, augmented(policy, source, other))


class RandomInvert(ImageOperation):
    def __init__(self, prob):
        super().__init__()
        self.prob = prob

    def apply(self, images, batch):
        drawn = batch.draw_uniforms(rng.named_stream("RandomInvert"), ())
        images[drawn < self.prob] ^= 255


def test_a_new_operation_is_one_class():
    source = images(16)
    changed = augmented(RandomInvert(0.5), source, batch_of(16))
    inverted = (changed == 255 - source).all(axis=(1, 2, 3))
    assert 0 < inverted.sum() < 16 and np.array_equal(changed[~inverted], source[~inverted])
    again = augmented(
        RandomInvert(0.5), source[::-1][:4], Batch(0, 0, 5 + 3 * np.arange(15, 11, -1), WorkerPool(1), None)
    )
    assert np.array_equal(again, changed[::-1][:4]), "the same samples in another batch"
