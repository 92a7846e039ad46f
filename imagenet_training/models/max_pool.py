"""Max pooling of 3 x 3 windows at stride 2 on GPUs, with a gradient that each input gathers."""

import hashlib
from pathlib import Path

import torch
import triton
import triton.language as tl

# Neighbouring values of a row that one program works on.
BLOCK = 1024
# The compiler's caches on disk know an operation by its name alone: they would keep the gradient of an earlier version.
# So the names change with this file.
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@triton.jit
def _pool(images, pooled, places, height, width, channels: tl.constexpr, block: tl.constexpr):
    """Program (r, b) fills block b of the pooled row r. Rows of all images are counted through."""
    pooled_width = width // 2
    row = tl.program_id(0)
    top = row % (height // 2) * 2 - 1  # the first row of the windows, in its image
    number = tl.program_id(1) * block + tl.arange(0, block)
    wanted = number < pooled_width * channels
    column, channel = number // channels, number % channels
    image_start = images + (row // (height // 2)).to(tl.int64) * height * width * channels
    largest = tl.full((block,), float("-inf"), tl.float32)
    place = tl.full((block,), -1, tl.int32)
    for y in tl.static_range(3):
        for x in tl.static_range(3):
            left = column * 2 - 1 + x
            inside = wanted & (top + y >= 0) & (left >= 0)  # windows end inside, because height and width are even
            value = tl.load(image_start + ((top + y) * width + left) * channels + channel, mask=inside, other=0.0)
            value = value.to(tl.float32)
            # The first of equal values wins, and a NaN always, as in PyTorch.
            takes = inside & ((value > largest) | (value != value) | (place < 0))
            largest = tl.where(takes, value, largest)
            place = tl.where(takes, 3 * y + x, place)
    target = row.to(tl.int64) * pooled_width * channels + number
    tl.store(pooled + target, largest.to(pooled.dtype.element_ty), mask=wanted)
    tl.store(places + target, place.to(tl.int8), mask=wanted)


@triton.jit
def _spread(gradient, places, result, height, width, channels: tl.constexpr, block: tl.constexpr):
    """Program (r, b) fills two rows of the input's gradient: those whose windows are in the pooled rows r and r + 1."""
    pooled_width = width // 2
    row = tl.program_id(0)
    number = tl.program_id(1) * block + tl.arange(0, block)
    row_size = pooled_width * channels
    wanted = number < row_size
    column, channel = number // channels, number % channels
    has_right = wanted & (column + 1 < pooled_width)
    has_below = row % (height // 2) + 1 < height // 2
    start = row.to(tl.int64) * row_size + number
    # The windows at this place, right of it, below it, and right below it.
    here = tl.load(gradient + start, mask=wanted, other=0.0).to(tl.float32)
    here_place = tl.load(places + start, mask=wanted, other=-1)
    right = tl.load(gradient + start + channels, mask=has_right, other=0.0).to(tl.float32)
    right_place = tl.load(places + start + channels, mask=has_right, other=-1)
    below = tl.load(gradient + start + row_size, mask=wanted & has_below, other=0.0).to(tl.float32)
    below_place = tl.load(places + start + row_size, mask=wanted & has_below, other=-1)
    corner = tl.load(gradient + start + row_size + channels, mask=has_right & has_below, other=0.0)
    corner_place = tl.load(places + start + row_size + channels, mask=has_right & has_below, other=-1)
    corner = corner.to(tl.float32)
    # Inputs at even places are in one window, others in two or four.
    even_even = tl.where(here_place == 4, here, 0.0)
    even_odd = tl.where(here_place == 5, here, 0.0) + tl.where(right_place == 3, right, 0.0)
    odd_even = tl.where(here_place == 7, here, 0.0) + tl.where(below_place == 1, below, 0.0)
    odd_odd = tl.where(here_place == 8, here, 0.0) + tl.where(right_place == 6, right, 0.0)
    odd_odd += tl.where(below_place == 2, below, 0.0) + tl.where(corner_place == 0, corner, 0.0)
    target = result + row.to(tl.int64) * 2 * width * channels + column * 2 * channels + channel
    kind = result.dtype.element_ty
    tl.store(target, even_even.to(kind), mask=wanted)
    tl.store(target + channels, even_odd.to(kind), mask=wanted)
    tl.store(target + width * channels, odd_even.to(kind), mask=wanted)
    tl.store(target + (width + 1) * channels, odd_odd.to(kind), mask=wanted)


def _grid(shape: torch.Size) -> tuple[int, int]:
    n, channels, height, width = shape
    return n * (height // 2), triton.cdiv(width // 2 * channels, BLOCK)


@torch.library.custom_op(f"imagenet_training::max_pool_{_VERSION}", mutates_args=())
def max_pool(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``F.max_pool2d(images, 3, stride=2, padding=1)`` returns, to the bit, and the places of the maxima.

    The gradient is added up in float32, and in a fixed order.

    Parameters
    ----------
    images : torch.Tensor
        Floats (N, C, H, W), of at most 32 bits; H and W are even.

    Returns
    -------
    pooled : torch.Tensor
        The type of the images, (N, C, H / 2, W / 2), in channels_last memory.
    places : torch.Tensor
        int8, (N, C, H / 2, W / 2): the place of each maximum in its window, row by row, from 0 to 8.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    pooled, places = _empty(images)
    n, channels, height, width = images.shape
    _pool[_grid(images.shape)](images, pooled, places, height, width, channels, BLOCK)
    return pooled, places


@max_pool.register_fake
def _empty(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, channels, height, width = images.shape
    shape, form = (n, channels, height // 2, width // 2), torch.channels_last
    pooled = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=form)
    return pooled, torch.empty(shape, dtype=torch.int8, device=images.device, memory_format=form)


@torch.library.custom_op(f"imagenet_training::max_pool_gradient_{_VERSION}", mutates_args=())
def max_pool_gradient(gradient: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the images, (N, C, H, W), of those of pooled images and the places of the maxima."""
    gradient, places = (part.contiguous(memory_format=torch.channels_last) for part in (gradient, places))
    result = _empty_gradient(gradient, places)
    n, channels, height, width = result.shape
    _spread[_grid(result.shape)](gradient, places, result, height, width, channels, BLOCK)
    return result


@max_pool_gradient.register_fake
def _empty_gradient(gradient: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    n, channels, height, width = places.shape
    shape = (n, channels, 2 * height, 2 * width)
    return torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _backward(ctx, gradient, _):
    return max_pool_gradient(gradient, *ctx.saved_tensors)


max_pool.register_autograd(_backward, setup_context=_keep)

# As an operation of PyTorch, which ``torch.compile`` keeps whole.
OPERATION = getattr(torch.ops.imagenet_training, f"max_pool_{_VERSION}").default
