"""Architectures of torchvision and timm, their weights, and BlurPool."""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# A compilation takes about a minute; what a shorter run would gain from it is less.
MIN_STEPS_TO_COMPILE = 2000
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def find_library(arch: str, library: str = "auto") -> str:
    """The library that builds an architecture: ``"torchvision"`` or ``"timm"``.

    Parameters
    ----------
    arch : str
        As in ``torchvision.models.list_models()`` or ``timm.list_models()``.
    library : {"auto", "torchvision", "timm"}
        Where to look. ``"auto"`` prefers torchvision, whose names ffcv-imagenet's recipes use.

    Raises
    ------
    ValueError
        Naming the nearest known architectures.
    """
    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    if library in ("auto", "torchvision") and arch in torchvision_names:
        return "torchvision"
    if library in ("auto", "timm") and timm.is_model(arch):
        return "timm"
    known = {"torchvision": torchvision_names, "timm": timm.list_models()}
    names = [*known["torchvision"], *known["timm"]] if library == "auto" else known[library]
    nearest = ", ".join(difflib.get_close_matches(arch, sorted(set(names)), n=3, cutoff=0.5))
    where = "torchvision and timm" if library == "auto" else library
    raise ValueError(f"model.arch={arch} is unknown to {where}" + (f"; near it: {nearest}" if nearest else ""))


def build_model(
    arch: str,
    *,
    library: str = "auto",
    num_classes: int = 1000,
    pretrained: bool = False,
    weights: str | Path | None = None,
    drop_path: float = 0.0,
    use_blurpool: bool = False,
) -> nn.Module:
    """Build a classifier from images (N, 3, H, W) to logits (N, num_classes).

    Parameters
    ----------
    arch, library : str
        As for `find_library`.
    num_classes : int
        Size of the head. Pretrained weights of another head size lend all but the head.
    pretrained : bool
        Fetch the library's ImageNet weights: timm's default ones, torchvision's ``IMAGENET1K_V1``.
    weights : path, optional
        A local file instead; see `load_weights`.
    drop_path : float
        Rate of stochastic depth; timm architectures only.
    use_blurpool : bool
        Blur the input of every strided convolution with at least 16 input channels; see `apply_blurpool`.

    Raises
    ------
    ValueError
        Unknown architecture, drop path where the library has none, unusable weights.
    """
    if find_library(arch, library) == "timm":
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        model = timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, **options)
    else:
        if drop_path:
            raise ValueError(f"model.drop_path={drop_path} needs a timm architecture: add --model.library=timm")
        published = torchvision.models.get_model_weights(arch).__members__ if pretrained else {}
        if pretrained and "IMAGENET1K_V1" not in published:
            raise ValueError(
                f"torchvision has no IMAGENET1K_V1 weights of {arch}, but {', '.join(published)}: download those, and "
                "pass --model.weights=FILE in place of --model.pretrained=1"
            )
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
        if pretrained:
            chosen = published["IMAGENET1K_V1"]
            load_state(model, chosen.get_state_dict(progress=False), f"torchvision's {chosen}")
    if use_blurpool:
        apply_blurpool(model)
    if weights:
        load_weights(model, weights)
    return model


def model_size(model: nn.Module, resolution: int) -> str:
    """A model's size in words: its parameters, and what one image costs in a forward pass.

    Convolutions, matrix products and attention are counted; a multiply-add is two floating-point operations.

    Parameters
    ----------
    model : torch.nn.Module
        On the meta device, so that nothing is computed.
    resolution : int
        Side of the image, px.
    """
    parameters = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.2f} M parameters"
    training = model.training
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, 3, resolution, resolution, device="meta"))
    except Exception as error:  # timm's many architectures raise what they happen to raise without data
        reason = str(error).partition("\n")[0]
        return f"{parameters}; the cost of an image of {resolution} px is not known: {reason}"
    finally:
        model.train(training)
    flops = counter.get_total_flops()
    return (
        f"{parameters}; {flops / 2e9:,.3g} G multiply-adds ({flops / 1e9:,.3g} GFLOPs) an image of {resolution} px, "
        "forward"
    )


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a local file of weights into a model, in place.

    Takes a state dict (``torch.save`` or safetensors), an exported weights file, a checkpoint of this project (its
    moving average where it has one), or ffcv-imagenet's ``final_weights.pt``; ``module.`` and ``_orig_mod.`` prefixes
    are dropped. A head of another size is left as initialised.

    Raises
    ------
    ValueError
        A missing or unreadable file, or one whose tensors do not fit, naming the first few.
    """
    if not Path(path).is_file():
        raise ValueError(f"model.weights={path}: no such file")
    content: Any
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpicklers and archives raise many kinds
        raise ValueError(f"model.weights={path} is not a file of weights: {error}") from error
    for name in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"model.weights={path} holds no state dict")
    load_state(model, content, str(path))


def load_state(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict, wrapper prefixes dropped; only a head of another size may stay behind."""
    own = model.state_dict()
    state = {_plain_name(name, own): value for name, value in state.items() if not name.endswith("blur_filter")}
    head = {name for name in list(own)[-2:] if name in state and own[name].shape != state[name].shape}
    state = {name: value for name, value in state.items() if name not in head}
    missing = sorted(own.keys() - state.keys() - head)
    unexpected = sorted(state.keys() - own.keys())
    misshapen = sorted(name for name in state.keys() & own.keys() if state[name].shape != own[name].shape)
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"the weights of {source} do not fit this architecture: tensors {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def _plain_name(name: str, own: dict[str, torch.Tensor]) -> str:
    """The name without wrappers: DDP's, torch.compile's, and the ``.conv`` of ffcv-imagenet's BlurPool."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    unwrapped = name.removesuffix(".conv.weight") + ".weight"
    return unwrapped if name not in own and unwrapped in own else name


def gains_from_compilation(device: torch.device, num_steps: int) -> bool:
    """Whether compiling a model is worth its while: on a GPU that Triton knows, in a run of some length."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
        and num_steps >= MIN_STEPS_TO_COMPILE
    )


def compiled(model: nn.Module) -> nn.Module:
    """A module that shares a model's tensors and runs it compiled, each size of images on its own.

    The model itself stays as it is: its state dict has the plain names, and calling it compiles nothing.
    """
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


class BlurPoolConv2d(nn.Conv2d):
    """A convolution whose input is first smoothed with the 3 x 3 binomial filter, against aliasing under strides.

    The filter and the rule of where it applies are ffcv-imagenet's. It is no part of the state dict, so that weights
    keep the names of the architecture without BlurPool.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
        )
        self.weight, self.bias = conv.weight, conv.bias
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        blur_filter = torch.outer(row, row).expand(conv.in_channels, 1, 3, 3).clone()
        self.register_buffer("blur_filter", blur_filter, persistent=False)

    blur_filter: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        blurred = F.conv2d(input, self.blur_filter, padding=1, groups=self.in_channels)
        return super().forward(blurred)


def apply_blurpool(model: nn.Module) -> None:
    """Replace, in place, every strided convolution with at least 16 input channels by `BlurPoolConv2d`."""
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(model, name, BlurPoolConv2d(child))
        else:
            apply_blurpool(child)
