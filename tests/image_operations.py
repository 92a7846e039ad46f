"""Images, batches and one call, for tests of operations that change images."""

import numpy as np

from ffcv_ops.operations.base import Batch
from ffcv_ops.operations.threads import WorkerPool
from tests.betons import photographs

SIZE = (48, 40)


def batch_of(count, seed=0, epoch=0, num_workers=1, copies=None):
    return Batch(seed, epoch, 5 + 3 * np.arange(count), WorkerPool(num_workers), storage=None, copies=copies)


def images(count):
    return np.stack([image[: SIZE[0], : SIZE[1]] for image in photographs(count)])


def augmented(policy, source, batch):
    changed = source.copy()
    assert policy.generate_code()(changed, None, batch) is changed
    return changed
