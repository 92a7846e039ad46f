"""Batch norm in training whose sums run in Triton, while ``torch.compile`` fuses the rest with its neighbours."""

import functools
import hashlib
import inspect
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """The division of a matrix (rows, channels) among the programs of a kernel.

    Attributes
    ----------
    channels, rows : int
        The size of a tile, each a power of two. A thread holds 8 neighbouring values of it.
    unroll : int
        Tiles that a program requests at once.
    stages : int
        Rounds in flight through shared memory, or 1: loads go to registers.
    programs : int
        About as many programs as this run, all tiles of channels together.
    """

    channels: int
    rows: int
    unroll: int
    stages: int
    programs: int

    @property
    def warps(self) -> int:
        return max(self.channels * self.rows // 256, 1)

    def chunk(self, rows: int, channels: int) -> int:
        """Return the number of rows of a program: of whole rounds, so that only the last program has a remainder."""
        parts = max(self.programs // triton.cdiv(channels, self.channels), 1)
        step = self.rows * self.unroll
        return triton.cdiv(triton.cdiv(rows, parts), step) * step


@functools.cache
def tiles(rows: int, channels: int, inputs: int) -> Tiles:
    """Return the tiles for a kernel that reads one or two inputs (rows, channels)."""
    # The fastest of eight for the layers of a ResNet-50 at 224 px on an H200, which runs these programs all at once.
    return Tiles(64, 16, 8, 1, 1056) if inputs == 1 else Tiles(64, 32, 2, 3, 396)


@triton.jit(do_not_specialize=["rows", "chunk", "parts"])
def _sums(
    x, results, rows, channels, chunk, parts,
    block_c: tl.constexpr, block_r: tl.constexpr, unroll: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """Program (c, p) reduces part p, which is `chunk` rows, of the block c of channels."""
    part = tl.program_id(1)
    start = part.to(tl.int64) * chunk
    count = tl.minimum(rows - start, chunk).to(tl.int32)
    channel = tl.program_id(0) * block_c + tl.arange(0, block_c)
    row = tl.arange(0, block_r)
    place = row[:, None] * channels + channel[None, :]
    known = (row[:, None] >= 0) & (channel < channels)[None, :]
    # Squares of distances to a value near the mean do not cancel. Here it is the mean of the first tile.
    near = tl.load(x + start * channels + place, mask=known & (row < count)[:, None], other=0.0).to(tl.float32)
    pivot = tl.sum(near, 0) / tl.minimum(count, block_r)
    total = tl.zeros((block_r, block_c), tl.float32)
    squares = tl.zeros((block_r, block_c), tl.float32)
    whole = count // (block_r * unroll) * (block_r * unroll)
    for i in tl.range(0, whole, block_r * unroll, num_stages=stages):
        for j in tl.static_range(unroll):
            tile = x + (start + i + j * block_r) * channels + place
            value = tl.load(tile) if even else tl.load(tile, mask=known, other=0.0)
            distance = value.to(tl.float32) - pivot[None, :]
            total += distance
            squares += distance * distance
    for i in tl.range(whole, count, block_r):
        inside = known & (i + row < count)[:, None]
        value = tl.load(x + (start + i) * channels + place, mask=inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, value - pivot[None, :], 0.0)
        total += distance
        squares += distance * distance
    shift = tl.sum(total, 0) / count
    target = results + channel.to(tl.int64) * parts + part
    tl.store(target, pivot + shift, mask=channel < channels)
    deviation = tl.maximum(tl.sum(squares, 0) - shift * shift * count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(target + channels.to(tl.int64) * parts, deviation, mask=channel < channels)


@triton.jit
def _add(gradient, x, mean, scale, bias, total, products, relu: tl.constexpr):
    distance = x.to(tl.float32) - mean[None, :]
    gradient = gradient.to(tl.float32)
    if relu:
        gradient = tl.where(distance * scale[None, :] <= -bias[None, :], 0.0, gradient)
    return total + gradient, products + gradient * distance


@triton.jit(do_not_specialize=["rows", "chunk", "parts"])
def _gradient_sums(
    gradient, x, mean, invstd, weight, bias, results, rows, channels, chunk, parts, relu: tl.constexpr,
    block_c: tl.constexpr, block_r: tl.constexpr, unroll: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """Program (c, p) reduces part p, which is `chunk` rows, of the block c of channels."""
    part = tl.program_id(1)
    start = part.to(tl.int64) * chunk
    count = tl.minimum(rows - start, chunk).to(tl.int32)
    channel = tl.program_id(0) * block_c + tl.arange(0, block_c)
    row = tl.arange(0, block_r)
    place = row[:, None] * channels + channel[None, :]
    known = (row[:, None] >= 0) & (channel < channels)[None, :]
    center = tl.load(mean + channel, mask=channel < channels, other=0.0)
    scale = tl.load(weight + channel, mask=channel < channels, other=0.0)
    scale *= tl.load(invstd + channel, mask=channel < channels, other=0.0)
    offset = tl.load(bias + channel, mask=channel < channels, other=0.0)
    total = tl.zeros((block_r, block_c), tl.float32)
    products = tl.zeros((block_r, block_c), tl.float32)
    whole = count // (block_r * unroll) * (block_r * unroll)
    for i in tl.range(0, whole, block_r * unroll, num_stages=stages):
        for j in tl.static_range(unroll):
            tile = (start + i + j * block_r) * channels + place
            if even:
                slope, value = tl.load(gradient + tile), tl.load(x + tile)
            else:
                slope = tl.load(gradient + tile, mask=known, other=0.0)
                value = tl.load(x + tile, mask=known, other=0.0)
            total, products = _add(slope, value, center, scale, offset, total, products, relu)
    for i in tl.range(whole, count, block_r):
        inside = known & (i + row < count)[:, None]
        tile = (start + i) * channels + place
        slope = tl.load(gradient + tile, mask=inside, other=0.0)
        value = tl.load(x + tile, mask=inside, other=0.0)
        total, products = _add(slope, value, center, scale, offset, total, products, relu)
    target = results + channel.to(tl.int64) * parts + part
    tl.store(target, tl.sum(total, 0), mask=channel < channels)
    tl.store(target + channels.to(tl.int64) * parts, tl.sum(products, 0), mask=channel < channels)


def _launch(kernel, inputs, vectors, chunk, chosen, *constants):
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    n, channels, height, width = inputs[0].shape
    results = _empty_parts(inputs[0], chunk)
    parts = results.shape[2]
    kernel[triton.cdiv(channels, chosen.channels), parts](
        *inputs, *vectors, results, n * height * width, channels, chunk, parts, *constants,
        chosen.channels, chosen.rows, chosen.unroll, chosen.stages, channels % chosen.channels == 0,
        num_warps=chosen.warps,
    )  # fmt: skip
    return results


def _empty_parts(x: torch.Tensor, chunk: int) -> torch.Tensor:
    n, channels, height, width = x.shape
    return x.new_empty((2, channels, (n * height * width + chunk - 1) // chunk), dtype=torch.float32)


# Operations of this kind take a third of the time that the host spends on those of `torch.library.custom_op`.
_library = torch.library.Library("imagenet_training", "FRAGMENT")
_library.define("batch_norm_sums(Tensor x, int chunk) -> Tensor")
_library.define(
    "batch_norm_gradient_sums(Tensor gradient, Tensor x, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, "
    "int chunk, bool relu) -> Tensor"
)


@torch.library.impl(_library, "batch_norm_sums", "CUDA")
def batch_norm_sums(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the mean of each part of the rows, and the sum of squared distances to it, for each channel.

    Additions are done in float32, and in a fixed order.

    Parameters
    ----------
    x : torch.Tensor
        Floats (N, C, H, W), of at most 32 bits. In channels_last memory it is a matrix of N * H * W rows of C values.
    chunk : int
        The rows of a part, from `Tiles.chunk`. The last part may have fewer.

    Returns
    -------
    torch.Tensor
        float32, (2, C, parts).
    """
    n, channels, height, width = x.shape
    return _launch(_sums, [x], [], chunk, tiles(n * height * width, channels, 1))


@torch.library.register_fake("imagenet_training::batch_norm_sums", lib=_library)
def _(x: torch.Tensor, chunk: int) -> torch.Tensor:
    return _empty_parts(x, chunk)


@torch.library.impl(_library, "batch_norm_gradient_sums", "CUDA")
def batch_norm_gradient_sums(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    chunk: int,
    relu: bool,
) -> torch.Tensor:
    """Return the sums over parts of the rows of g and of g * (x - mean), for each channel.

    Additions are done in float32, and in a fixed order.

    Parameters
    ----------
    gradient, x : torch.Tensor
        Floats (N, C, H, W), of at most 32 bits.
    mean, invstd, weight, bias : torch.Tensor
        float32, (C,).
    chunk : int
        The rows of a part, from `Tiles.chunk`. The last part may have fewer.
    relu : bool
        True: g is the gradient where a relu after the batch norm lets it pass, and 0 elsewhere. False: g is the
        gradient.

    Returns
    -------
    torch.Tensor
        float32, (2, C, parts).
    """
    n, channels, height, width = x.shape
    vectors = [mean, invstd, weight, bias]
    return _launch(_gradient_sums, [gradient, x], vectors, chunk, tiles(n * height * width, channels, 2), relu)


@torch.library.register_fake("imagenet_training::batch_norm_gradient_sums", lib=_library)
def _(gradient, x, mean, invstd, weight, bias, chunk, relu):
    return _empty_parts(x, chunk)


def combined(parts: torch.Tensor, rows: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the biased variance of each channel from what `batch_norm_sums` returns.

    Parts are merged as Chan, Golub and LeVeque (1983) do, around the first mean, so that no large numbers cancel.
    """
    means, deviations = parts
    counts = (rows - chunk * torch.arange(means.shape[1], device=parts.device)).clamp(max=chunk).float()
    first = means[:, :1]
    distances = means - first
    shift = (distances * counts).sum(1, keepdim=True) / rows
    variance = (deviations + counts * (distances - shift).square()).sum(1) / rows
    return (first + shift).squeeze(1), variance


def _per_channel(vector: torch.Tensor) -> torch.Tensor:
    return vector[:, None, None]


class _Normalize(torch.autograd.Function):
    """The normalisation by statistics of the same batch, whose part in the gradient it adds."""

    @staticmethod
    def forward(ctx, x, mean, invstd, weight, bias, relu):
        ctx.save_for_backward(x, mean, invstd, weight, bias)
        ctx.relu = relu
        result = (x.float() - _per_channel(mean)) * _per_channel(weight * invstd) + _per_channel(bias)
        if relu:
            result = torch.relu(result)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, mean, invstd, weight, bias = ctx.saved_tensors
        n, channels, height, width = x.shape
        rows = n * height * width
        chunk = tiles(rows, channels, 2).chunk(rows, channels)
        parts = torch.ops.imagenet_training.batch_norm_gradient_sums(
            gradient, x, mean, invstd, weight, bias, chunk, ctx.relu
        )
        total, products = parts.sum(2)
        distance = x.float() - _per_channel(mean)
        scale = weight * invstd
        slope = gradient.float()
        if ctx.relu:
            # Relu lets pass what is above 0. As a comparison with the bias this has the same bits in every kernel, as
            # no multiply-add can change it. If relu's own mask were used, PyTorch would keep it from the forward pass.
            slope = torch.where(distance * _per_channel(scale) <= -_per_channel(bias), 0.0, slope)
        common, along = total / rows, products * invstd * invstd / rows
        slope = (slope - _per_channel(common) - distance * _per_channel(along)) * _per_channel(scale)
        return slope.to(x.dtype), None, None, products * invstd, total, None


def batch_norm_act(
    x: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    momentum: float,
    eps: float,
    relu: bool,
) -> torch.Tensor:
    """Return what ``F.batch_norm`` in training, and then maybe ``F.relu``, return, up to rounding.

    It is made for ``torch.compile``, which makes one kernel of what surrounds the sums.

    Parameters
    ----------
    x : torch.Tensor
        Floats (N, C, H, W), of at most 32 bits, on a GPU, best in channels_last memory.
    running_mean, running_var : torch.Tensor
        float32, (C,). They are updated in place.
    weight, bias : torch.Tensor
        float32, (C,).
    momentum : float
        The share of this batch in the running statistics.
    eps : float
        Is added to the variance.
    relu : bool
        Whether values below 0 become 0.

    Returns
    -------
    torch.Tensor
        The type and shape of x.
    """
    with torch.no_grad():
        n, channels, height, width = x.shape
        rows = n * height * width
        chunk = tiles(rows, channels, 1).chunk(rows, channels)
        mean, variance = combined(torch.ops.imagenet_training.batch_norm_sums(x, chunk), rows, chunk)
        invstd = torch.rsqrt(variance + eps)
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance, alpha=momentum * rows / (rows - 1))
    return _Normalize.apply(x, mean, invstd, weight, bias, relu)


# An operation that PyTorch takes apart, because its caches on disk refuse graphs with Python functions. As they know
# operations by name, the name changes with this file.
_NAME = "batch_norm_act_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
_library.define(
    f"{_NAME}(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor weight, Tensor bias, "
    "float momentum, float eps, bool relu) -> Tensor"
)
_library.impl(_NAME, batch_norm_act, "CompositeImplicitAutograd")
OPERATION = getattr(torch.ops.imagenet_training, _NAME).default

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


def _is_relu(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in {"relu", "relu_"}
    return node.op == "call_function" and node.target in _RELUS


def _arguments(node: torch.fx.Node) -> tuple | None:
    """Return the arguments for `batch_norm_act` but the last, or None where the node does not fit."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    x, *vectors, training, momentum, eps = call.arguments.values()
    if training is not True or not isinstance(momentum, float) or not isinstance(eps, float):
        return None
    if not all(isinstance(part, torch.fx.Node) for part in (x, *vectors)):
        return None
    value = x.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dtype not in {torch.float16, torch.bfloat16, torch.float32}:
        return None
    # The kernels are compiled for sizes that are known now.
    if value.dim() != 4 or not all(isinstance(size, int) for size in value.shape):
        return None
    # Rows that begin at multiples of 16 bytes are read fast. One row has no variance, and PyTorch refuses it.
    if value.shape[1] % 16 or value.numel() <= value.shape[1]:
        return None
    if any(part.meta["example_value"].dtype != torch.float32 for part in vectors if "example_value" in part.meta):
        return None
    return (x, *vectors, momentum, eps)


def fuse_batch_norms(gm: torch.fx.GraphModule) -> int:
    """Replace, in place, batch norms in training, and relus that only they feed, by `batch_norm_act`.

    Parameters
    ----------
    gm : torch.fx.GraphModule
        The graph that ``torch.compile`` gives to a backend, for tensors on a GPU.

    Returns
    -------
    int
        The number of batch norms that were replaced. Others stay: in evaluation, without weights or running
        statistics, with sizes that vary, or with channels that 16 does not divide.
    """
    replaced = 0
    for node in list(gm.graph.nodes):
        arguments = _arguments(node)
        if arguments is None:
            continue
        users = list(node.users)
        relu = len(users) == 1 and _is_relu(users[0])
        last = users[0] if relu else node
        with gm.graph.inserting_before(node):
            fused = gm.graph.call_function(OPERATION, (*arguments, relu))
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        if relu:
            gm.graph.erase_node(last)
        gm.graph.erase_node(node)
        replaced += 1
    if replaced:
        gm.graph.lint()
        gm.recompile()
    return replaced


def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    """Compile a graph as ``torch.compile`` does by default, with `fuse_batch_norms` before: a backend for it."""
    from torch._inductor.compile_fx import compile_fx

    fuse_batch_norms(gm)
    return compile_fx(gm, inputs)
