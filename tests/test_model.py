"""Architectures, weights in and out, BlurPool."""

import copy
import shutil

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from imagenet_training.models.architectures import (
    BlurPoolConv2d,
    build_model,
    can_compile,
    compiled,
    drop_path_notices,
    find_library,
    model_size,
    pretrained_weights,
    recipe_meta_model,
)
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.run.checkpoint import unwrapped

IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)


def test_library_prefers_torchvision_and_falls_back_to_timm():
    assert find_library("resnet50") == "torchvision"
    assert find_library("resnet50", "timm") == "timm"
    assert find_library("resnet50d") == "timm"


@pytest.mark.parametrize("library", ["auto", "torchvision", "timm"])
def test_unknown_architecture_names_the_nearest(library):
    with pytest.raises(ValueError, match=r"resnet5O.*resnet50"):
        find_library("resnet5O", library)


def test_the_size_of_resnet50_is_the_published_one():
    with torch.device("meta"):
        text = model_size(build_model("resnet50"), 224)
    assert text == "25.56 M parameters; 4.09 G multiply-adds (8.18 GFLOPs) an image of 224 px, forward"


def test_a_model_that_does_not_take_the_resolution_still_has_parameters():
    with torch.device("meta"):
        model = build_model("vit_tiny_patch16_224", library="timm")
    assert model_size(model, 100).startswith("5.72 M parameters; the cost of an image of 100 px is not known: ")
    assert model.training


def test_detection_models_are_not_classifiers():
    with pytest.raises(ValueError):
        find_library("fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_state_dict_is_the_library_s_own(library):
    model = build_model("resnet18", library=library, num_classes=10)
    plain = (
        torchvision.models.resnet18(num_classes=10)
        if library == "torchvision"
        else timm.create_model("resnet18", num_classes=10)
    )
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    assert torch.equal(model(IMAGES), plain(IMAGES))


def test_weights_of_another_kind_are_named():
    with pytest.raises(ValueError, match="no IMAGENET1K_V1 weights of regnet_y_128gf, but IMAGENET1K_SWAG_E2E_V1"):
        pretrained_weights("regnet_y_128gf", "torchvision")


def test_drop_path_needs_timm():
    with pytest.raises(ValueError, match="--model.library=timm"):
        build_model("resnet18", drop_path=0.1)
    model = build_model("resnet18", library="timm", drop_path=0.1)
    assert any(getattr(module, "drop_prob", 0) for module in model.modules())


@pytest.mark.parametrize(
    "arch, library, largest", [("convnext_tiny", "torchvision", 0.1), ("swin_s3_tiny_224", "timm", 0.1)]
)
def test_a_drop_path_that_no_setting_shows_is_told(arch, library, largest):
    recipe = read_recipe([f"--model.arch={arch}", f"--model.library={library}"])
    (notice,) = drop_path_notices(recipe, recipe_meta_model(recipe))
    assert f"{library}'s {arch} skips up to {largest} of its residual branches" in notice
    plain = read_recipe(["--model.arch=convnext_tiny", "--model.library=timm"])
    assert drop_path_notices(plain, recipe_meta_model(plain)) == []


def test_blurpool_goes_where_ffcv_imagenet_puts_it_and_keeps_names():
    torch.manual_seed(0)
    blurred = build_model("resnet50", num_classes=10, use_blurpool=True)
    plain = build_model("resnet50", num_classes=10)
    assert blurred.state_dict().keys() == plain.state_dict().keys()
    replaced = [name for name, module in blurred.named_modules() if isinstance(module, BlurPoolConv2d)]
    strided = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16
    ]
    assert replaced == strided and len(replaced) == 6
    conv = dict(blurred.named_modules())[replaced[0]]
    x = torch.randn(1, conv.in_channels, 9, 9)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    smooth = torch.nn.functional.conv2d(x, kernel.expand(conv.in_channels, 1, 3, 3), padding=1, groups=conv.in_channels)
    expected = torch.nn.functional.conv2d(smooth, conv.weight, stride=conv.stride, padding=conv.padding)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_local_weights(tmp_path, suffix, prefix):
    source = build_model("resnet18", num_classes=10)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = build_model("resnet18", num_classes=10, weights=path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    other_head = build_model("resnet18", num_classes=7, weights=path)
    assert torch.equal(other_head.conv1.weight, source.conv1.weight) and other_head.fc.weight.shape[0] == 7


def test_weights_of_ffcv_imagenet_with_blurpool(tmp_path):
    source = build_model("resnet18", num_classes=10, use_blurpool=True)
    state = {}
    for name, value in source.state_dict().items():
        layer = name.removesuffix(".weight")
        if isinstance(dict(source.named_modules()).get(layer), BlurPoolConv2d):
            state[f"module.{layer}.conv.weight"] = value
            state[f"module.{layer}.blur_filter"] = dict(source.named_buffers())[f"{layer}.blur_filter"]
        else:
            state[f"module.{name}"] = value
    torch.save(state, tmp_path / "final_weights.pt")
    model = build_model("resnet18", num_classes=10, use_blurpool=True, weights=tmp_path / "final_weights.pt")
    source.eval(), model.eval()
    assert torch.equal(model(IMAGES), source(IMAGES))


def test_unusable_weights_say_why(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        build_model("resnet18", weights=tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="not a file of weights"):
        build_model("resnet18", weights=tmp_path / "text.pt")
    torch.save(build_model("resnet34").state_dict(), tmp_path / "resnet34.pt")
    with pytest.raises(ValueError, match=r"does not fit.*unexpected \(96: layer1.2.bn1.bias"):
        build_model("resnet18", weights=tmp_path / "resnet34.pt")


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiled_model_is_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        BlurPoolConv2d(torch.nn.Conv2d(3, 16, 3, stride=2)), torch.nn.BatchNorm2d(16), torch.nn.AdaptiveAvgPool2d(1)
    )
    twin, fast = copy.deepcopy(model), compiled(model)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    fast(images).square().sum().backward()
    twin(images).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert unwrapped(fast) is model and model.state_dict().keys() == twin.state_dict().keys()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.inference_mode():
        model.eval()(images[:3])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "evaluation compiles nothing"


def test_where_models_can_be_compiled():
    assert not can_compile(torch.device("cpu"))


@pytest.mark.parametrize(("raw", "averaged"), [("model", "ema"), ("state_dict", "state_dict_ema")])
def test_the_averaged_weights_of_a_file_are_taken_unless_the_raw_ones_are_asked_for(tmp_path, raw, averaged):
    models = {name: build_model("resnet18", num_classes=10) for name in (raw, averaged)}
    torch.save({name: model.state_dict() for name, model in models.items()}, tmp_path / "both.pt")
    for ema, name in (("auto", averaged), (True, averaged), (False, raw)):
        loaded = build_model("resnet18", num_classes=10, weights=tmp_path / "both.pt", ema=ema)
        assert torch.equal(loaded.conv1.weight, models[name].conv1.weight), ema
    torch.save({raw: models[raw].state_dict()}, tmp_path / "raw.pt")
    with pytest.raises(ValueError, match=r"no averaged weights: pass --model.ema=0"):
        build_model("resnet18", num_classes=10, weights=tmp_path / "raw.pt", ema=True)
