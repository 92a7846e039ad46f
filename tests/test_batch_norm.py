"""The sums of batch norm in Triton, and the pass that puts them into compiled models, against PyTorch."""

import copy
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("triton")

import torchvision
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from imagenet_training.models import batch_norm
from imagenet_training.models.batch_norm import Tiles, fuse_batch_norms


def as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def sums(x: torch.Tensor, chunk: int) -> torch.Tensor:
    parts = [(part.mean(0), (part - part.mean(0)).square().sum(0)) for part in as_rows(x).split(chunk)]
    return torch.stack([torch.stack(pair) for pair in parts], 2)


def gradient_sums(gradient, x, mean, invstd, weight, bias, chunk: int, relu: bool) -> torch.Tensor:
    distance = as_rows(x) - mean
    slope = as_rows(gradient)
    if relu:
        slope = slope.where(distance * (weight * invstd) > -bias, 0)
    parts = [part.split(chunk) for part in (slope, slope * distance)]
    return torch.stack([torch.stack([part.sum(0) for part in each], 1) for each in parts])


@torch.library.impl(batch_norm._library, "batch_norm_sums", "CPU")
def _(x, chunk):
    return sums(x.float(), chunk)


@torch.library.impl(batch_norm._library, "batch_norm_gradient_sums", "CPU")
def _(gradient, x, *rest):
    return gradient_sums(gradient.float(), x.float(), *rest)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype, memory_format=torch.channels_last)


# --- the kernels


def check_kernels() -> None:
    """Run in a process where Triton interprets."""
    torch.manual_seed(0)
    # Remainders of rows, of channels, of rounds; fewer rows than a tile; one part and several.
    for shape, tiles in (
        ((2, 16, 5, 7), Tiles(16, 8, 2, 1, 3)),
        ((2, 24, 4, 4), Tiles(16, 16, 1, 3, 1)),
        ((1, 8, 1, 2), Tiles(8, 16, 2, 1, 9)),
    ):
        n, channels, height, width = shape
        chunk = tiles.chunk(n * height * width, channels)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # Squares would cancel if nothing was subtracted from the values before.
            x = (channels_last(*shape) + (1000 if dtype == torch.float32 else 5)).to(dtype)
            parts = batch_norm._launch(batch_norm._sums, [x], [], chunk, tiles)
            expected = sums(x.double(), chunk)
            torch.testing.assert_close(parts, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
            found = batch_norm.combined(parts, n * height * width, chunk)
            variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
            # Means near 1000 are known to 3e-5, half of a last place, and so are standard deviations of 1.
            torch.testing.assert_close(found, (mean, variance), rtol=3e-5, atol=1e-6, check_dtype=False)

            gradient = channels_last(*shape, dtype=dtype)
            vectors = [found[0], torch.rsqrt(found[1]), torch.randn(channels), torch.randn(channels)]
            for relu in (False, True):
                kernel = batch_norm._gradient_sums
                parts = batch_norm._launch(kernel, [gradient, x], vectors, chunk, tiles, relu)
                doubles = [part.double() for part in (gradient, x, *vectors)]
                expected = gradient_sums(*doubles, chunk, relu)
                torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_the_kernels_add_what_they_should():
    environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-W", "ignore", "-c", "import test_batch_norm; test_batch_norm.check_kernels()"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    if "0-dimensional arrays" in done.stderr:
        pytest.skip("this Triton cannot interpret with this NumPy")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kernel, inputs", [(batch_norm._sums, 1), (batch_norm._gradient_sums, 2)])
def test_a_gpu_loads_16_bytes_at_once_and_spills_no_registers(kernel, inputs, tmp_path):
    tiles = batch_norm.tiles(256 * 56 * 56, 256, inputs)
    kinds = {"x": "*bf16", "gradient": "*bf16", "rows": "i32", "channels": "i32", "chunk": "i32", "parts": "i32"}
    kinds |= dict.fromkeys(("mean", "invstd", "weight", "bias", "results"), "*fp32")
    constants = {"block_c": tiles.channels, "block_r": tiles.rows, "unroll": tiles.unroll, "stages": tiles.stages}
    constants |= {"even": True, "relu": True}
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in signature}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name == "channels"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})
    loads = Counter(re.findall(r"ld\.global[.\w]*", compiled.asm["ptx"]))
    assert loads["ld.global.v4.b32"] >= inputs * tiles.unroll
    assert not [name for name in loads if name != "ld.global.v4.b32"]
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores" in report, report


def test_parts_cover_all_rows():
    for rows in (1, 49, 12544, 802816, 2**33):
        for channels in (8, 64, 2048):
            tiles = batch_norm.tiles(rows, channels, 1)
            chunk = tiles.chunk(rows, channels)
            parts = -(-rows // chunk)
            assert chunk % (tiles.rows * tiles.unroll) == 0
            assert parts * -(-channels // tiles.channels) <= tiles.programs


# --- the pass


class Block(nn.Module):
    """Two batch norms, of which a relu follows one, and a sum in place the other."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x
        return self.relu(out)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Block(16), Block(16))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1)
            nn.init.normal_(module.bias)
    return model.to(memory_format=torch.channels_last)


class Traced:
    """A backend that keeps the graphs, and the number of batch norms that were replaced in each."""

    def __init__(self):
        self.replaced, self.forward, self.backward = [], None, None

    def __call__(self, gm, inputs):
        self.replaced.append(fuse_batch_norms(gm))
        partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
        return aot_autograd(fw_compiler=self.keep_forward, bw_compiler=self.keep_backward, partition_fn=partition)(
            gm, inputs
        )

    def keep_forward(self, gm, inputs):
        self.forward = gm
        return torch._dynamo.backends.debugging.boxed_nop(gm, inputs)

    def keep_backward(self, gm, inputs):
        self.backward = gm
        return torch._dynamo.backends.debugging.boxed_nop(gm, inputs)


def compiled(model: nn.Module) -> tuple[nn.Module, Traced]:
    torch.compiler.reset()
    backend = Traced()
    return torch.compile(copy.deepcopy(model), backend=backend, dynamic=False), backend


def step(model: nn.Module, images: torch.Tensor, bf16: bool = False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        result = model(images)
    (result.to(images.dtype) * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    state = {name: value for name, value in model.state_dict().items() if "running" in name}
    return result, [p.grad for p in model.parameters()], list(state.values())


def furthest(results, expected) -> float:
    """Return the largest relative error, of the norm of each tensor."""
    pairs = list(zip(results, expected, strict=True))
    return max(((a.double() - b.double()).norm() / (b.double().norm() + 1e-9)).item() for a, b in pairs)


@pytest.mark.parametrize(
    "name, batch_norms, bf16",
    [
        ("small", 4, False),
        ("small", 4, True),
        pytest.param("resnet18", 20, False, marks=pytest.mark.slow),
        pytest.param("resnet18", 20, True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_learns_the_same(name, batch_norms, bf16):
    torch.manual_seed(0)
    model = small_model() if name == "small" else torchvision.models.resnet18(num_classes=10)
    model = model.to(memory_format=torch.channels_last).train()
    images = channels_last(8, 3, 32, 32)
    exact = step(copy.deepcopy(model).double(), images.double())
    plain = step(copy.deepcopy(model), images, bf16)
    other, backend = compiled(model)
    ours = step(other, images, bf16)
    assert backend.replaced == [batch_norms]
    assert ours[0].dtype == plain[0].dtype
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        mine, theirs, right = ([x] if isinstance(x, torch.Tensor) else x for x in (mine, theirs, right))
        # Rounding differs, and grows from layer to layer. Errors are to be of the size that PyTorch has.
        assert furthest(mine, right) < 1.5 * furthest(theirs, right) + 1e-6


def test_one_sum_a_batch_norm_and_no_tensor_more_than_without():
    model, backend = compiled(small_model())
    step(model, channels_last(4, 3, 18, 18), bf16=True)
    targets = Counter(str(node.target) for node in (*backend.forward.graph.nodes, *backend.backward.graph.nodes))
    assert targets["imagenet_training.batch_norm_sums.default"] == 4
    assert targets["imagenet_training.batch_norm_gradient_sums.default"] == 4
    assert not [name for name in targets if "native_batch_norm" in name or name == "aten.var_mean.correction"]
    saved = [node.meta["val"] for node in backend.backward.graph.nodes if node.op == "placeholder"]
    activations = [value for value in saved if value.dim() == 4 and value.shape[2] == 16]
    assert {value.dtype for value in activations} <= {torch.bfloat16, torch.bool}
    # The inputs and outputs of five convolutions, and perhaps the mask of the last relu.
    assert sum(value.dtype == torch.bfloat16 for value in activations) <= 10


def test_batch_norms_are_replaced_where_several_ranks_split_the_graph():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, backend = compiled(nn.Sequential(nn.Conv2d(3, 64, 3), *(Block(64) for _ in range(3))))  # of 1.8 MB
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        step(wrapped, channels_last(4, 3, 10, 10))
        assert len(backend.replaced) > 1 and sum(backend.replaced) == 6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(16).eval(),
        nn.BatchNorm2d(16, affine=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.BatchNorm2d(16).double(),
        nn.BatchNorm2d(24),
        nn.GroupNorm(2, 16),
    ],
    ids=["eval", "no weights", "no statistics", "double", "24 channels", "no batch norm"],
)
def test_what_does_not_fit_stays(norm):
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    x = channels_last(4, getattr(norm, "num_features", 16), 5, 5, dtype=dtype).requires_grad_()
    model, backend = compiled(norm)
    torch.testing.assert_close(model(x), copy.deepcopy(norm)(x))
    assert backend.replaced == [0]


@pytest.mark.parametrize(
    "relu, fused",
    [
        (torch.relu, True),
        (torch.relu_, True),
        (nn.functional.relu, True),
        (lambda x: x.relu_(), True),
        (lambda x: x.relu() + x, False),
        (nn.functional.gelu, False),
    ],
)
def test_a_relu_joins_where_nothing_else_reads_the_batch_norm(relu, fused):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x):
            return relu(self.norm(x))

    found = []

    def backend(gm, inputs):
        assert fuse_batch_norms(gm) == 1
        found.extend(node.args[-1] for node in gm.graph.nodes if node.target is batch_norm.OPERATION)
        return gm.forward

    torch.compiler.reset()
    model = Model()
    x = channels_last(4, 16, 5, 5)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected)
    assert found == [fused]


def test_a_nan_stays_one():
    x = channels_last(4, 8, 5, 5)
    x[0, 3, 0, 0] = float("nan")
    vectors = [torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8)]
    result = batch_norm.batch_norm_act(x, *vectors, 0.1, 1e-5, True)
    assert result[:, 3].isnan().all() and not result[:, :3].isnan().any()
