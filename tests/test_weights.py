"""Files of weights of many origins: found by structure, loaded whole or refused, exported with all facts."""

import argparse
import copy
import dataclasses
import json
import os
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch.optim.swa_utils import AveragedModel

from ffcv_ops import UserError
from ffcv_ops.settings.fields import Channels
from imagenet_training import ModelCard, load_model
from imagenet_training.data.classes import head_notices
from imagenet_training.data.normalization import settle_normalization
from imagenet_training.distributed import World
from imagenet_training.dry_run import show_plan
from imagenet_training.models.architectures import build_model, head_of, model_arguments
from imagenet_training.models.card import CARD_KEY, IMAGENET_MEAN, IMAGENET_STD
from imagenet_training.models.export import export_weights, use_of_weights
from imagenet_training.models.weights import _present_names
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.planning.sections import Validation
from imagenet_training.training.epoch import measure

ROOT = Path(__file__).parent.parent
ARCH = {"arch": "test_resnet", "library": "timm", "num_classes": 4}
IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


class Config(dict):
    """A mapping of a class that only its author has."""


def trained(seed=0, **changed):
    """A model whose weights and statistics are unlike the initial ones."""
    torch.manual_seed(seed)
    model = build_model(**{**ARCH, **changed})
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def renamed(state, old, new):
    """The state below the first part of `old`, but the head under another name."""
    prefix = f"{old.partition('.')[0]}."
    found = {name: value for name, value in prefixed(state, prefix).items() if not name.startswith(f"{old}.")}
    return {**found, **{f"{new}.{part}": state[f"fc.{part}"] for part in ("weight", "bias")}}


def same(ours, theirs):
    return all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def averaged_state(model):
    return AveragedModel(model).state_dict()


CONTAINERS = {
    "timm": lambda s: {"arch": "x", "args": argparse.Namespace(lr=0.1, out=Path("x")), "state_dict": s, "metric": 1.0},
    "torchvision": lambda s: {"model": s, "args": argparse.Namespace(device="cuda", sizes=[1, 2])},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": Config(lr=0.1), "epoch": 3},
    "Lightning with a loss": lambda s: {"state_dict": {**prefixed(s, "net."), "criterion.weight": torch.ones(4)}},
    "compiled and distributed": lambda s: prefixed(s, "_orig_mod.module."),
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"m": torch.ones(1)}}}},
    "net": lambda s: {"net": prefixed(s, "module."), "acc": 93.2},
    "deep": lambda s: {"trainer": {"student": {"backbone": prefixed(s, "encoder.0.")}}},
    "wrapped layers": lambda s: {
        name.replace("layer1.", "layer1._fsdp_wrapped_module."): value for name, value in s.items()
    },
    "defaultdict": lambda s: {"weights": s, "log": defaultdict(list, loss=[1.0])},
    "old": lambda s: {name: value for name, value in s.items() if not name.endswith("num_batches_tracked")},
    "mmpretrain": lambda s: {"state_dict": renamed(s, "backbone.fc", "head.fc")},
    "a head of Lightning": lambda s: {"state_dict": renamed(s, "net.fc", "fc")},
    "half precision": lambda s: {
        name: value.half() if value.is_floating_point() else value for name, value in s.items()
    },
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_weights_are_found_by_their_structure(tmp_path, kind):
    source = trained()
    if kind == "half precision":
        source = source.half().float()
    torch.save(CONTAINERS[kind](dict(source.state_dict())), tmp_path / "file")
    notices = []
    model = build_model(**ARCH, weights=tmp_path / "file", whole=True, notices=notices)
    assert torch.equal(model.eval()(IMAGES), source(IMAGES))
    assert ["criterion.weight left out" in notice for notice in notices] == ([True] if "loss" in kind else [])


AVERAGES = {
    "torchvision": lambda raw, average: {"model": raw.state_dict(), "model_ema": averaged_state(average)},
    "timm": lambda raw, average: {"state_dict": raw.state_dict(), "state_dict_ema": average.state_dict()},
    "one module": lambda raw, average: {
        "state_dict": {
            **prefixed(raw.state_dict(), "model."),
            **prefixed(averaged_state(average), "shadow."),
        }
    },
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights_are_taken_with_a_word_unless_the_raw_ones_are_wanted(tmp_path, kind):
    raw, average = trained(0), trained(1)
    torch.save(AVERAGES[kind](raw, average), tmp_path / "both.pt")
    for ema, source in (("auto", average), (True, average), (False, raw)):
        notices = []
        model = build_model(**ARCH, weights=tmp_path / "both.pt", ema=ema, notices=notices)
        assert same(model, source), ema
        assert len(notices) == (ema == "auto") and all("--model.ema=0 takes" in notice for notice in notices)


def test_averaged_weights_that_are_required_must_be_there(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "raw.pt")
    torch.save(averaged_state(trained()), tmp_path / "averaged.pt")
    with pytest.raises(UserError, match=r"raw.pt has no averaged weights: pass --model.ema=0"):
        build_model(**ARCH, weights=tmp_path / "raw.pt", ema=True)
    with pytest.raises(UserError, match=r"averaged.pt has only averaged weights"):
        build_model(**ARCH, weights=tmp_path / "averaged.pt", ema=False)


def test_several_weights_that_fit_are_refused_with_their_places(tmp_path):
    one, other = trained(0).state_dict(), trained(1).state_dict()
    torch.save({"state_dict": {**prefixed(one, "student."), **prefixed(other, "teacher.")}}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=r"several weights that fit: state_dict.student and state_dict.teacher\. Save"):
        build_model(**ARCH, weights=tmp_path / "two.pt")
    torch.save({"state_dict": one, "best": copy.deepcopy(one)}, tmp_path / "twins.pt")
    assert same(build_model(**ARCH, weights=tmp_path / "twins.pt"), trained(0))


@pytest.mark.parametrize(
    ("name", "value"), [("fc.bias", "nan"), ("conv1.0.weight", "inf"), ("bn1.running_var", "-inf")]
)
def test_values_that_are_not_finite_are_refused(tmp_path, name, value):
    state = trained().state_dict()
    state[name].flatten()[0] = float(value)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=f"bad.pt has values that are not finite in 1: {name}"):
        build_model(**ARCH, weights=tmp_path / "bad.pt")


def test_tensors_of_another_type_are_refused(tmp_path):
    state = trained().state_dict()
    torch.save({**state, "fc.weight": (100 * state["fc.weight"]).to(torch.int8)}, tmp_path / "quantized.pt")
    with pytest.raises(UserError, match=r"of another type \(1: fc.weight\)"):
        build_model(**ARCH, weights=tmp_path / "quantized.pt")


def test_variances_below_zero_and_values_too_large_are_refused(tmp_path):
    state = trained().state_dict()
    torch.save({**state, "bn1.running_var": -state["bn1.running_var"]}, tmp_path / "negative.pt")
    with pytest.raises(UserError, match=r"negative variances in 1: bn1.running_var"):
        build_model(**ARCH, weights=tmp_path / "negative.pt")
    torch.save({**state, "fc.bias": state["fc.bias"].double() + 1e60}, tmp_path / "large.pt")
    with pytest.raises(UserError, match=r"not finite in 1: fc.bias"):
        build_model(**ARCH, weights=tmp_path / "large.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # PyTorch 2.11
def test_unusual_tensors_are_loaded_or_refused(tmp_path):
    state = trained().state_dict()
    torch.save({**state, "fc.weight": state["fc.weight"].to(torch.float8_e4m3fn)}, tmp_path / "float8.pt")
    assert build_model(**ARCH, weights=tmp_path / "float8.pt").fc.weight.dtype == torch.float32
    torch.save({**state, "fc.weight": state["fc.weight"].to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match=r"of another type \(1: fc.weight\)"):
        build_model(**ARCH, weights=tmp_path / "sparse.pt")


def test_the_tensors_of_an_optimizer_are_no_weights(tmp_path):
    source = trained()
    moments = {name: torch.zeros_like(value) for name, value in source.state_dict().items()}
    content = {"model": source.state_dict(), "optimizer": {"exp_avg": moments, "exp_avg_sq": moments}}
    torch.save({**content, "gradients": moments}, tmp_path / "all.pt")
    notices = []
    assert same(build_model(**ARCH, weights=tmp_path / "all.pt", notices=notices), source) and not notices


OLDER = {
    "densenet121": [(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.")],
    "vit_b_32": [(r"mlp\.0\.", "mlp.linear_1."), (r"mlp\.3\.", "mlp.linear_2.")],
}


@pytest.mark.parametrize("arch", OLDER)
def test_names_of_published_files_are_known(arch):
    with torch.device("meta"):
        own = build_model(arch, num_classes=10).state_dict()
    older = {}
    for name, value in own.items():
        for pattern, replacement in OLDER[arch]:
            name = re.sub(pattern, replacement, name)
        older[name] = value
    assert older.keys() != own.keys()
    present = _present_names(older, own)
    assert present.keys() == own.keys() and all(present[name] is own[name] for name in own)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>\n<title>404</title>", "it is text, such as a web page or a pointer of Git LFS"),
        (b"\x08\x07\x12\x07pytorch" + bytes(100), "it is neither safetensors nor of torch.save"),
        (b"PK", "is not a file of weights"),
        (None, "this is a folder"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, told):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    path = tmp_path if content is None else tmp_path / "file"
    with pytest.raises(UserError, match=told) as error:
        load_model(path)
    assert "weights_only" not in str(error.value)


def test_a_folder_as_a_hub_gives_it_names_its_file(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"this is a folder; pass a file in it, such as model.safetensors"):
        load_model(tmp_path)


def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.ScriptModule().save(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match="it is a TorchScript archive"):
        load_model(tmp_path / "script.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_one_changed_bit_is_noticed(tmp_path, suffix):
    state, path = trained().state_dict(), tmp_path / f"x{suffix}"
    export_weights(path, state, card_of()) if suffix == ".safetensors" else torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[data.index(state["fc.weight"].numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum of .* is wrong"):
        build_model(**ARCH, weights=path)


def test_a_file_that_would_run_code_runs_none(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"args": argparse.Namespace(x=Bomb()), "model": trained().state_dict()}, tmp_path / "hostile.pt")
    with pytest.raises(UserError, match="is not a file of weights"):
        build_model(**ARCH, weights=tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()
    torch.save(trained(), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"it holds an object of timm\S+ResNet; save its state_dict\(\) instead"):
        build_model(**ARCH, weights=tmp_path / "module.pt")


HEADS = {
    "resnet18": "fc",
    "squeezenet1_0": "classifier.1",
    "googlenet": "fc aux1.fc2 aux2.fc2",
    "inception_v3": "fc AuxLogits.fc",
    "deit_tiny_distilled_patch16_224": "head head_dist",
    "volo_d1_224": "head aux_head",
    "repvit_m0_9": "head.head.l head.head_dist.l",
    "levit_128s": "head.linear head_dist.linear",
    "efficientformer_l1": "head head_dist",
}


@pytest.mark.parametrize("arch", HEADS)
def test_the_head_is_what_depends_on_the_number_of_classes(arch):
    with torch.device("meta"):
        model = build_model(arch, num_classes=10)
    layers = {name.rpartition(".")[0] for name in head_of(model, arch=arch, num_classes=10).class_dims}
    assert all(any(layer.startswith(part) for part in HEADS[arch].split()) for layer in layers), layers
    assert all(any(layer.startswith(part) for layer in layers) for part in HEADS[arch].split()), layers


@pytest.mark.parametrize("arch", ["test_resnet", "deit_tiny_distilled_patch16_224", "squeezenet1_0"])
def test_a_head_of_another_size_starts_random_with_a_word(tmp_path, arch):
    source = build_model(arch, num_classes=12)
    torch.save(source.state_dict(), tmp_path / "twelve.pt")
    notices = []
    model = build_model(arch, num_classes=10, weights=tmp_path / "twelve.pt", notices=notices)
    head = head_of(model, arch=arch, num_classes=10)
    for name, value in source.state_dict().items():
        assert (name in head) or torch.equal(model.state_dict()[name], value), name
    (notice,) = notices
    assert (
        "has a head of 12 classes, and the model has 10 classes" in notice
        and "start from small random values" in notice
    )
    with pytest.raises(UserError, match=r"would be random\. Evaluate with data of the same classes"):
        build_model(arch, num_classes=10, weights=tmp_path / "twelve.pt", whole=True)


def test_a_new_head_is_small_so_that_the_trained_layers_keep_what_they_know(tmp_path):
    torch.save(build_model("test_efficientnet", num_classes=5).state_dict(), tmp_path / "x.pt")
    assert build_model("test_efficientnet", num_classes=4).classifier.weight.std() > 0.2
    for weights, large in (("x.pt", 0.0101), (None, 1)):
        options = {"weights": tmp_path / weights} if weights else {}
        std = build_model("test_efficientnet", num_classes=4, **options).classifier.weight.std()
        assert (std > 0.0099) and (std < large)


def test_weights_without_a_head_are_a_start_and_cannot_be_evaluated(tmp_path):
    save_file({n: v for n, v in trained().state_dict().items() if not n.startswith("fc.")}, tmp_path / "body")
    notices = []
    build_model(**ARCH, weights=tmp_path / "body", notices=notices)
    assert "has no head, and the model has 4 classes: fc.weight, fc.bias start" in notices[0]
    with pytest.raises(UserError, match="would be random"):
        build_model(**ARCH, weights=tmp_path / "body", whole=True)


@pytest.mark.parametrize("names", [("fc.1.weight", "fc.1.bias"), ("fc.0.weight", "fc.0.bias", "fc.2.weight")])
def test_a_head_of_other_layers_is_left_out_with_a_word(tmp_path, names):
    state = dict(trained().state_dict())
    features = state["fc.weight"].shape[1]
    del state["fc.weight"], state["fc.bias"]
    state.update({name: torch.ones(4 if name.endswith("bias") else (4, features)) for name in names})
    torch.save({"state_dict": prefixed(state, "module.encoder_q.")}, tmp_path / "other.pt")
    notices = []
    build_model(**ARCH, weights=tmp_path / "other.pt", notices=notices)
    assert any("a head of other layers" in notice and "random" in notice for notice in notices)
    assert any(f"{len(names)}: module.encoder_q.{min(names)}" in notice and "left out" in notice for notice in notices)
    with pytest.raises(UserError, match="a head of other layers"):
        build_model(**ARCH, weights=tmp_path / "other.pt", whole=True)


def test_a_head_is_not_taken_from_another_model_in_the_file(tmp_path):
    state, other = dict(trained(0).state_dict()), trained(1).state_dict()
    body = {name: value for name, value in state.items() if not name.startswith("fc.")}
    torch.save({**prefixed(body, "backbone."), **prefixed(other, "teacher.")}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="several weights that fit"):
        build_model(**ARCH, weights=tmp_path / "two.pt")


def test_names_of_the_project_that_published_an_architecture_are_known(tmp_path):
    """ConvNeXt's own names, which timm replaces in weights that it downloads."""
    source = build_model("test_convnext", library="timm", num_classes=4).eval()
    theirs = {}
    for name, value in source.state_dict().items():
        for ours, original in (
            (r"^stem\.", "downsample_layers.0."), (r"\.blocks\.", "."), (r"^head\.norm\.", "norm."),
            (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."), (r"conv_dw", "dwconv"),
            (r"mlp\.fc", "pwconv"), (r"^head\.fc\.", "head."),
        ):  # fmt: skip
            name = re.sub(ours, original, name)
        theirs[name] = value
    torch.save({"model": theirs}, tmp_path / "convnext.pth")
    notices = []
    model = build_model(
        "test_convnext", library="timm", num_classes=4, weights=tmp_path / "convnext.pth", whole=True, notices=notices
    )
    assert torch.equal(model.eval()(IMAGES), source(IMAGES)) and "timm's rules" in notices[0]


def test_the_same_shapes_under_other_names_are_told(tmp_path):
    torch.save({f"_{name}": value for name, value in trained().state_dict().items()}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"missing \(\d+: .*their shapes fit in their order: docs/FINE_TUNING.md"):
        build_model(**ARCH, weights=tmp_path / "other.pth")


def test_averages_that_cannot_be_matched_are_told(tmp_path):
    source = trained()
    ema = {"decay": 0.9, "shadow_params": [value + 1 for value in source.parameters()]}
    torch.save({"model": source.state_dict(), "ema": ema}, tmp_path / "torch_ema.pt")
    notices = []
    assert same(build_model(**ARCH, weights=tmp_path / "torch_ema.pt", notices=notices), source)
    assert "averaged weights without names (ema.shadow_params)" in notices[0]
    with pytest.raises(UserError, match="no averaged weights"):
        build_model(**ARCH, weights=tmp_path / "torch_ema.pt", ema=True)


def test_a_head_of_other_features_is_another_network(tmp_path):
    state = trained().state_dict()
    torch.save({**state, "fc.weight": state["fc.weight"][:, :7]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"of another shape \(1: fc.weight\)"):
        build_model(**ARCH, weights=tmp_path / "other.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Exports


def card_of(**changed):
    return ModelCard(
        {**ARCH, "drop_path": 0.0, "use_blurpool": False, **changed}, channels_last=True, classes=list("abcd")
    )


def test_exported_weights_bring_the_settings_of_their_evaluation():
    # A batch changes no accuracy, and the classes are those of one file of images.
    names = {field.name for field in dataclasses.fields(Validation)} - {"batch_size", "classes"}
    assert card_of().settings()["validation"].keys() == names, (
        "add the setting to ModelCard and to _SETTINGS (imagenet_training/models/card.py): else exported "
        "weights are evaluated with its default"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"use_blurpool": True},
        {"arch": "mnasnet0_5", "library": "torchvision"},
        {"arch": "test_vit"},
        {"arch": "resnet18", "library": "torchvision", "use_blurpool": True},
    ],
)
def test_an_export_builds_its_model(tmp_path, changed):
    card = card_of(**changed)
    model = build_model(**card.model).to(memory_format=torch.channels_last)
    side = 160 if "vit" in str(changed) else 64
    model(torch.randn(4, 3, side, side))
    export_weights(tmp_path / "x.safetensors", model.eval().state_dict(), card)
    images = torch.randn(2, 3, side, side)
    loaded = load_model(tmp_path / "x.safetensors")
    assert loaded.card == ModelCard(**{**vars(card), "averaged": False}) and not loaded.model.training
    assert torch.equal(loaded.model(images), model(images))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda facts: facts[:50], "the facts beside its tensors are damaged"),
        (lambda facts: "[]", "the facts beside its tensors are damaged"),
        (lambda facts: facts.replace('"metadata"', '"other"'), "the facts beside its tensors are damaged"),
        (lambda facts: facts.replace('"format": 1', '"format": 2'), "has facts of format 2; this version reads 1"),
        (lambda facts: facts.replace("0.485", "48.5"), "mean must be"),
        (lambda facts: facts.replace('"drop_path"', '"pool"'), "and nothing but arch"),
        (lambda facts: facts.replace('"d"]', '"d", "e"]'), "has 4 classes, and 5 names"),
        (lambda facts: facts.replace("bilinear", "best"), "interpolation must be one of"),
    ],
)
def test_facts_that_no_run_writes_are_refused(tmp_path, change, told):
    state, facts = trained().state_dict(), {"card": card_of().to_dict(), "metadata": {}}
    content = save(dict(state), {CARD_KEY: change(json.dumps(facts))})
    (tmp_path / "x.safetensors").write_bytes(content)
    for use in (load_model, lambda path: settled(f"--model.weights={path}")):
        with pytest.raises(UserError, match=told):
            use(tmp_path / "x.safetensors")


def test_equal_weights_have_equal_bytes(tmp_path):
    card = ModelCard(**{**vars(card_of()), "classes": ["\u00e4", "b", "c", "d"]})
    contents = set()
    for number in range(8):  # the package alone would write two orders by chance
        export_weights(tmp_path / f"{number}.safetensors", trained().state_dict(), card)
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    (content,) = contents
    assert int.from_bytes(content[:8], "little") % 8 == 0, "tensors begin at multiples of 8 bytes"
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", CARD_KEY}
    assert load_model(tmp_path / "0.safetensors").card.classes == card.classes


def test_tied_tensors_are_exported(tmp_path):
    model = trained()
    state = model.state_dict()
    state["bn1.bias"] = state["bn1.running_mean"]
    export_weights(tmp_path / "x.safetensors", state, card_of())
    loaded = load_model(tmp_path / "x.safetensors").model
    assert torch.equal(loaded.bn1.bias, loaded.bn1.running_mean) and same(loaded.layer1, model.layer1)


def test_an_export_tells_what_its_network_computes(tmp_path):
    blurred = trained(use_blurpool=True)
    export_weights(tmp_path / "x.safetensors", blurred.state_dict(), card_of(use_blurpool=True))
    with pytest.raises(UserError, match=r"computes something else .* --training.use_blurpool=1\. Pass that"):
        build_model(**ARCH, weights=tmp_path / "x.safetensors", whole=True)
    notices = []
    build_model(**ARCH, weights=tmp_path / "x.safetensors", notices=notices)
    assert "its own has --training.use_blurpool=1" in notices[0]
    model = build_model(**ARCH, use_blurpool=True, weights=tmp_path / "x.safetensors", whole=True)
    assert torch.equal(model.eval()(IMAGES), blurred(IMAGES))


def test_another_architecture_with_the_same_tensors_is_told(tmp_path):
    card = card_of(arch="efficientnet_lite0")
    export_weights(tmp_path / "x.safetensors", build_model(**card.model).state_dict(), card)
    with pytest.raises(UserError, match=r"something else .* --model.arch=efficientnet_lite0"):
        build_model("tf_efficientnet_lite0", num_classes=4, weights=tmp_path / "x.safetensors", whole=True)


def test_a_loaded_model_is_exported_with_its_blurpool_and_for_batches_of_any_size(tmp_path):
    card = card_of(use_blurpool=True)
    export_weights(tmp_path / "x.safetensors", trained(use_blurpool=True).state_dict(), card)
    model = load_model(tmp_path / "x.safetensors").model
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 32, 32)
    assert torch.equal(program.module()(images), model(images))
    assert not torch.equal(trained()(images), model(images))


def test_files_without_facts_are_refused_with_the_remedy(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "old.pt")
    with pytest.raises(
        UserError, match=r"does not say how to build its model.* Load other weights with --model.weights"
    ):
        load_model(tmp_path / "old.pt")


def test_the_library_s_own_line_is_given_only_where_it_builds_the_same(tmp_path):
    path = tmp_path / "x.safetensors"
    assert len(use_of_weights(path, card_of(use_blurpool=True))) == 1
    assert len(use_of_weights(path, card_of(arch="mnasnet0_5", library="torchvision"))) == 1
    assert len(use_of_weights(path, ModelCard(**{**vars(card_of()), "mean": (0.5, 0.5, 0.5)}))) == 1
    for changed in ({}, *({"arch": arch, "library": "torchvision"} for arch in ("resnet18", "googlenet"))):
        card = card_of(**changed)
        source = build_model(**card.model).eval()
        export_weights(path, source.state_dict(), card)
        for line in use_of_weights(path, card):
            names = {}
            exec(line, names)
            assert torch.equal(names["model"].to(memory_format=torch.contiguous_format)(IMAGES), source(IMAGES)), line


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation

HALF = (0.5, 0.5, 0.5)


def settled(*arguments, resumed=None):
    recipe = settle_normalization(read_recipe(["--model.num_classes=4", *arguments]), resumed)
    return recipe.data.mean, recipe.data.std, recipe.notices


def test_the_normalisation_is_that_of_the_weights(tmp_path):
    path = tmp_path / "x.safetensors"
    export_weights(path, trained().state_dict(), ModelCard(**{**vars(card_of()), "mean": HALF, "std": HALF}))
    assert settled() == (IMAGENET_MEAN, IMAGENET_STD, ())
    assert settled(f"--model.weights={path}") == (HALF, HALF, ())
    timm_s = ["--model.arch=vit_tiny_patch16_224", "--model.library=timm"]
    assert settled(*timm_s, "--model.pretrained=1") == (HALF, HALF, ())
    assert settled("--model.arch=resnet18", "--model.pretrained=1") == (IMAGENET_MEAN, IMAGENET_STD, ())
    old, kept = {"recipe": {"data": {}}}, {"recipe": {"data": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}}}
    assert settled(*timm_s, "--model.pretrained=1", resumed=old) == (IMAGENET_MEAN, IMAGENET_STD, ())
    assert settled(resumed=kept) == ((0.1, 0.2, 0.3), (1, 1, 1), ())


def test_another_normalisation_than_that_of_the_weights_is_noted(tmp_path):
    path = tmp_path / "x.safetensors"
    export_weights(path, trained().state_dict(), card_of())
    mean, std, notices = settled(f"--model.weights={path}", "--data.mean=0.5,0.5,0.5")
    assert (mean, std) == (HALF, IMAGENET_STD)
    assert len(notices) == 1 and "data.mean=0.5,0.5,0.5 (command line) is not 0.485,0.456,0.406" in notices[0]
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    mean, std, notices = settled(f"--model.weights={tmp_path / 'foreign.pt'}", "--model.arch=vit_tiny_patch16_224")
    assert mean == IMAGENET_MEAN and "does not say its normalisation: ImageNet's is assumed" in notices[0]
    assert "--data.mean=0.5,0.5,0.5 --data.std=0.5,0.5,0.5" in notices[0]
    both = ["--data.mean=0.5,0.5,0.5", "--data.std=0.5,0.5,0.5"]  # nothing is assumed
    foreign = [f"--model.weights={tmp_path / 'foreign.pt'}", "--model.arch=vit_tiny_patch16_224"]
    assert settled(*foreign, *both) == (HALF, HALF, ())


def test_a_plan_has_the_numbers_that_a_run_would_take(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    export_weights(path, trained().state_dict(), ModelCard(**{**vars(card_of()), "mean": HALF, "std": HALF}))
    small = [
        "--model.arch=resnet18",
        "--resolution.max_res=32",
        "--resolution.min_res=32",
        "--validation.resolution=32",
    ]
    for argv, mean in (([f"--model.weights={path}"], HALF), ([], IMAGENET_MEAN)):
        show_plan(read_recipe([*small, *argv]))
        assert f"\n  mean: [{', '.join(map(str, mean))}] " in capsys.readouterr().out


def test_a_head_of_other_classes_of_the_same_number_is_noted():
    assert head_notices("x", list("abc"), list("abc")) == head_notices("x", None, list("abc")) == []
    assert head_notices("x", list("abc"), list("abcd")) == []
    assert "the classes in another order than" in head_notices("x", list("abc"), list("cab"))[0]
    assert "a head of other classes than" in head_notices("x", list("abc"), list("abe"))[0]


@pytest.mark.parametrize("value", ["124,116,104", "0.5,0.5", "-0.1,0.5,0.5", "half", "nan,0.5,0.5"])
def test_a_mean_outside_its_range_is_refused(value):
    with pytest.raises(ValueError):
        Channels().check(value)
    assert Channels(positive=True).check("[0.5, 0.5, 0.5]") == HALF
    with pytest.raises(ValueError):
        Channels(positive=True).check("0,0.5,0.5")


def test_deep_grayscale_is_prepared_as_it_is_written():
    card, ramp = ModelCard(ARCH, resolution=16, crop_ratio=1.0), np.linspace(0, 65535, 16 * 16).reshape(16, 16)
    deep, plain = (
        Image.fromarray(ramp.astype(np.uint16)),
        Image.fromarray((ramp.astype(np.uint16) >> 8).astype(np.uint8)),
    )
    assert deep.mode == "I;16" and torch.equal(card.transform(deep), card.transform(plain))
    with pytest.raises(UserError, match="floating-point numbers of no known range"):
        card.transform(Image.fromarray(ramp.astype(np.float32)))


def test_an_image_is_prepared_in_three_lines():
    card = ModelCard(dict(ARCH), mean=HALF, std=HALF, resolution=32, crop_ratio=1.0)
    image = card.transform(Image.new("L", (50, 40), 255))
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and torch.equal(image, torch.ones(3, 32, 32))
    assert trained()(image[None]).shape == (1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# What a run prints

RECIPES = sorted([*ROOT.glob("rn50_configs/*.yaml"), *ROOT.glob("rn18_configs/*.yaml")])


def test_every_recipe_exports_all_that_its_evaluation_needs():
    for path in RECIPES:
        recipe = settle_normalization(read_recipe(["--config-file", str(path), "--model.num_classes=10"]))
        card = ModelCard.of_recipe(recipe.to_dict(), model_arguments(recipe), None)
        assert ModelCard.from_dict(card.to_dict(), "x").settings() == {
            section: {name: recipe.to_dict()[section][name] for name in values}
            for section, values in card.settings().items()
        } | {"model": {key: card.model[key] for key in ("arch", "library", "num_classes", "drop_path")}}, path
        assert card.model["use_blurpool"] == recipe.training.use_blurpool, path


@cache
def networks():
    """A recipe of each network that recipes have: only the first of an equal one builds a model."""
    recipes = (read_recipe(["--config-file", str(path), "--model.num_classes=10"]) for path in RECIPES)
    found = {}
    for recipe in recipes:
        arch = {"resnet50": "resnet18"}.get(recipe.model.arch, recipe.model.arch)  # the same code, and less of it
        network = {**model_arguments(recipe), "arch": arch}
        card = ModelCard.of_recipe(settle_normalization(recipe).to_dict(), network, None)
        found.setdefault(str((network, card.flip, card.channels_last)), card)
    return list(found.values())


def test_the_printed_lines_build_the_models_that_recipes_evaluate(tmp_path):
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    for card in networks():

        def measured(model, card=card):
            settings = {"num_samples": 6, "precision": "32", "flip": card.flip, "channels_last": card.channels_last}
            return measure(model, [(images, labels)], World(), **settings)

        model = build_model(**card.model).to(memory_format=torch.channels_last)
        with torch.no_grad():
            model.train()(images)  # statistics that are not the initial ones
        expected = measured(model)
        export_weights(tmp_path / "x.safetensors", model.state_dict(), card)
        lines = use_of_weights(tmp_path / "x.safetensors", card)
        assert len(lines) == 1 + (not card.model["use_blurpool"])
        for line in lines:
            names = {}
            exec(line, names)
            assert measured(names["model"].to(memory_format=torch.channels_last)) == expected, line


def test_weights_that_cannot_be_downloaded_are_one_line(tmp_path, monkeypatch):
    for name in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network: nothing listens there
    cached = tmp_path / "hub" / "checkpoints" / "resnet34-b627a593.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"broken")
    with pytest.raises(UserError, match=rf"weights of resnet34 are damaged .*: remove {cached}"):
        build_model("resnet34", pretrained=True)
    with pytest.raises(
        UserError, match=r"torchvision's weights of resnet18 could not be downloaded .*--model.weights=F"
    ):
        build_model("resnet18", pretrained=True)
