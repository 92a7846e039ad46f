import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomErasing as TorchvisionErasing

from ffcv_ops.operations.erasing import RandomErasing
from tests.image_operations import SIZE, augmented, batch_of, images


def test_erasing_is_torchvisions():
    size, prob, count = (224, 224), 0.3, 20_000
    boxes = RandomErasing(prob).draw(batch_of(count), size)
    top, bottom, left, right = boxes[boxes[:, 1] > 0].T
    assert stats.binomtest(len(top), count, prob).pvalue > 1e-3
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    drawn = (TorchvisionErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(4000))
    theirs = np.array([box[:4] for box in drawn]).T
    for ours, expected in zip((top, left, bottom - top, right - left), theirs, strict=True):
        assert stats.ks_2samp(ours, expected).pvalue > 1e-3
    assert bottom.max() <= 224 and right.max() <= 224 and min(top.min(), left.min()) >= 0


def test_erasing_paints_its_boxes():
    operation, source, batch = RandomErasing(0.6, fill=(1, 2, 3)), images(20), batch_of(20)
    expected = source.copy()
    for image, (top, bottom, left, right) in zip(expected, operation.draw(batch, SIZE), strict=True):
        image[top:bottom, left:right] = (1, 2, 3)
    assert not np.array_equal(expected, source)
    assert np.array_equal(augmented(operation, source, batch), expected)
    assert np.array_equal(augmented(RandomErasing(0.0), source, batch), source)
    with pytest.raises(ValueError, match="prob"):
        RandomErasing(1.1)
