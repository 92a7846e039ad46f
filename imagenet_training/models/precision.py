"""The floating-point formats that a model computes in."""

import torch

DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32": torch.float32}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision; it is off for ``"32"``."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "32")


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32: GPUs then round the factors of 32-bit products to 10 bits of mantissa."""
    # Both of PyTorch's interfaces can read a value set by the older one. Therefore the older one sets it.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
