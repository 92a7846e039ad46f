"""The layers of a ResNet's stem in their faster forms: the same results as PyTorch's own layers."""

import copy
import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from imagenet_training.models.stem import StemConv2d, StemMaxPool2d, replace_stem

pytest.importorskip("triton")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_a_convolution_of_blocks_is_the_convolution(size, bias):
    torch.manual_seed(size)
    conv = nn.Conv2d(3, 8, size, stride=2, padding=size // 2, bias=bias).double()
    ours = copy.deepcopy(conv)
    replace_stem(ours)
    images = torch.randn(2, 3, 12, 10, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected, result = conv(images), ours.blockwise(images)
    torch.testing.assert_close(result, expected)
    gradient = torch.randn_like(expected)
    (weight,), (ours_weight,) = (
        torch.autograd.grad(out, layer.weight, gradient) for out, layer in ((expected, conv), (result, ours))
    )
    torch.testing.assert_close(ours_weight, weight)
    assert torch.equal(ours(images), expected)  # not compiled


def test_only_what_suits_is_replaced_and_every_tensor_keeps_its_name():
    model = torchvision.models.resnet18()
    before = dict(model.state_dict(keep_vars=True))
    replace_stem(model)
    assert isinstance(model.conv1, StemConv2d) and isinstance(model.maxpool, StemMaxPool2d)
    assert sum(isinstance(module, StemConv2d) for module in model.modules()) == 1
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is value for name, value in before.items())
    for conv in (
        nn.Conv2d(3, 8, 7, stride=1, padding=3),
        nn.Conv2d(3, 8, 7, stride=2, padding=2),
        nn.Conv2d(3, 8, 4, stride=2, padding=2),
        nn.Conv2d(16, 8, 7, stride=2, padding=3),
        nn.Conv2d(3, 9, 7, stride=2, padding=3, groups=3),
        nn.Conv2d(3, 8, 7, stride=2, padding=3, padding_mode="reflect"),
        nn.Conv2d(3, 8, 7, stride=2, padding="valid"),
        model.conv1,
    ):
        assert not StemConv2d.suits(conv)
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1)):
        assert not StemMaxPool2d.suits(pool)
    assert StemMaxPool2d.suits(nn.MaxPool2d((3, 3), (2, 2), (1, 1)))


INTERPRETED = """
import copy, torch
import torch.nn.functional as F
from torch import nn
from imagenet_training.models.max_pool import OPERATION, max_pool
from imagenet_training.models.stem import replace_stem

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    images = (torch.randn(2, 5, 12, 16, dtype=dtype) * 4).round() / 4  # many are equal
    images[1, 1], images[1, 2, :5] = float("-inf"), float("inf")
    images = images.requires_grad_()
    expected, (result, places) = F.max_pool2d(images, 3, stride=2, padding=1), max_pool(images)
    assert torch.equal(result, expected) and result.dtype == dtype and 0 <= places.min() and places.max() == 8
    gradient = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(result, images, gradient)
    in_float32 = images.detach().float().requires_grad_()
    (theirs,) = torch.autograd.grad(F.max_pool2d(in_float32, 3, stride=2, padding=1), in_float32, gradient.float())
    # PyTorch on a CPU adds 16-bit floats. Triton's interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(ours, theirs.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=1e-6)
torch.library.opcheck(OPERATION, (torch.randn(1, 2, 4, 4).requires_grad_(),))
nan = torch.zeros(1, 1, 4, 4)
nan[0, 0, 3, 3] = float("nan")
assert max_pool(nan)[0].isnan().tolist() == F.max_pool2d(nan, 3, stride=2, padding=1).isnan().tolist()

torch.manual_seed(0)
plain = nn.Sequential(
    nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.MaxPool2d(3, stride=2, padding=1),
).to(memory_format=torch.channels_last)
ours = copy.deepcopy(plain)
replace_stem(ours)
images = torch.randn(4, 3, 16, 16)
graphs = []

def backend(graph, _):
    graphs.append(str(graph.code))
    return graph

results = []
for model in (plain, torch.compile(ours, backend="aot_eager"), torch.compile(ours, backend=backend)):
    plain.zero_grad(), ours.zero_grad()
    model(images).square().sum().backward()
    results.append([parameter.grad.clone() for parameter in model.parameters()])
for result in results[1:]:
    for gradient, expected in zip(result, results[0], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
assert "imagenet_training.max_pool_" in graphs[0] and graphs[0].count(".pad(") == 3, graphs[0]
"""


@pytest.mark.slow
def test_kernels_and_compiled_models_give_what_pytorch_gives():
    """The kernels run in Triton's interpreter."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["max_pool", "batch_norm"])
def test_operations_that_the_compiler_takes_apart_have_names_of_their_version(name):
    """Its caches on disk know them by name alone; see findings/torch_compile_cache_gradient.sh."""
    module = importlib.import_module(f"imagenet_training.models.{name}")
    digest = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    assert module.OPERATION.name().endswith(f"_{digest[:12]}")


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_kernels_compile_for_a_gpu_and_read_16_bytes_at_once(kind):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from imagenet_training.models import max_pool

    kinds = {"images": f"*{kind}", "gradient": f"*{kind}", "pooled": f"*{kind}", "result": f"*{kind}", "places": "*i8"}
    for kernel in (max_pool._pool, max_pool._spread):
        signature = {
            name: kinds.get(name, "constexpr" if name in ("channels", "block") else "i32") for name in kernel.arg_names
        }
        aligned = {(number,): [["tt.divisibility", 16]] for number in range(5)}
        source = ASTSource(kernel, signature, {"channels": 64, "block": max_pool.BLOCK}, aligned)
        code = compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code and "ld.global.b16" not in code
