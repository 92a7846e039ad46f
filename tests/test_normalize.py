import numpy as np
import pytest
import torch
import torchvision.transforms.functional
from ffcv.pipeline.state import State
from sklearn.datasets import load_sample_images

from ffcv_ops.operations.base import Batch
from ffcv_ops.operations.normalize import Label, Normalize
from ffcv_ops.operations.threads import WorkerPool

MEAN, STD = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH = Batch(0, 0, np.arange(3), WorkerPool(1), storage=None)


def photographs():
    images = load_sample_images().images
    return np.stack([images[0][:40, :56], images[1][100:140, 200:256], images[0][-40:, -56:]])


def normalize(images, dtype):
    operation = Normalize(MEAN, STD, dtype)
    state, query = operation.declare_state_and_memory(
        State(jit_mode=False, device=images.device, shape=tuple(images.shape[1:]), dtype=images.dtype)
    )
    assert state.shape == (3, *images.shape[1:3]) and state.dtype is query.dtype is dtype
    buffer = torch.empty((len(images), *query.shape), dtype=query.dtype, device=query.device)
    return operation.generate_code()(images, buffer, BATCH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_agrees_with_torchvision(dtype, device):
    images = torch.from_numpy(photographs()).to(device)
    normalized = normalize(images, dtype)
    assert normalized.shape == (3, 3, 40, 56) and normalized.dtype is dtype and normalized.device == images.device
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    expected = torchvision.transforms.functional.normalize(
        images.permute(0, 3, 1, 2).double(), MEAN.tolist(), STD.tolist()
    )
    # one rounding to dtype, after a float32 sum
    torch.testing.assert_close(normalized.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=3e-7)


@pytest.mark.gpu
def test_later_batches_do_not_wait_for_the_device():
    images = torch.from_numpy(photographs()).cuda()
    code, buffer = Normalize(MEAN, STD).generate_code(), torch.empty(images.shape, device="cuda")
    code(images, buffer, BATCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        code(images, buffer, BATCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "mean, std, dtype, named",
    [
        ([0, 0], [1, 1, 1], torch.float32, "mean"),
        ([0, 0, 0], [1, 0, 1], torch.float32, "std"),
        ([0, 0, 0], [1, 1, 1], torch.uint8, "dtype"),
    ],
)
def test_arguments_are_checked(mean, std, dtype, named):
    with pytest.raises(ValueError, match=named):
        Normalize(mean, std, dtype)


@pytest.mark.parametrize("shape, dtype", [((3, 32, 32), torch.uint8), ((32, 32, 3), np.dtype("u1"))])
def test_a_wrong_place_in_the_pipeline_is_refused(shape, dtype):
    state = State(jit_mode=False, device=torch.device("cpu"), shape=shape, dtype=dtype)
    with pytest.raises(ValueError, match="ToTensor"):
        Normalize(MEAN, STD).declare_state_and_memory(state)


def test_labels():
    labels = np.array([5, 0, 999, 7, 7])
    ids = np.array([4, 0, 2], dtype=np.uint64)
    operation = Label()
    start = State(jit_mode=True, device=torch.device("cpu"), shape=None, dtype=np.dtype("u1"))
    state, query = operation.declare_state_and_memory(start)
    assert state.shape == query.shape == () and state.dtype is query.dtype is torch.int64
    decoded = operation.generate_code()(ids, torch.empty(3, dtype=torch.int64), labels, BATCH)
    assert decoded.dtype is torch.int64 and decoded.tolist() == [7, 5, 999]
    decoded[0] = -1
    assert labels[4] == 7
    with pytest.raises(TypeError, match="float64"):
        operation.generate_code()(ids, torch.empty(3, dtype=torch.int64), labels / 2, BATCH)
