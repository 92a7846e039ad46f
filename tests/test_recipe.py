"""The strict front door, the recipes, and the arithmetic.

    PYTHONPATH=. python tests/test_recipe.py

writes the tables in docs/RECIPES.md anew: of all settings, which a test compares with the declared ones, and of the
published recipes, which a test compares with the numbers below.
"""

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from ffcv_ops.settings import Settings, read_settings, setting
from ffcv_ops.settings.declare import parameters_of
from ffcv_ops.settings.fields import Choice, Integer, Number, Switch, show
from ffcv_ops.settings.suggestions import did_you_mean
from imagenet_training.planning.plan import plan_run, rescaled_ema_decay
from imagenet_training.planning.recipe import FLAGS, Recipe, expected_accuracy, read_recipe
from imagenet_training.run.summary import resolved_recipe, summary

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("rn*_configs/*.yaml"))
IMAGENET = {"num_train": 1_281_167, "num_val": 50_000}
BUDGETS = {16: (11, 13), 24: (17, 20), 32: (23, 27), 40: (29, 34), 56: (41, 48), 88: (65, 76)}  # epochs: ramp


def published_rsb(**numbers):
    """What arXiv 2110.00476 and its repetitions in timm and mmpretrain say of A1, A2 and A3 alike, and the rest."""
    return {
        "global batch": 2048,
        "lr": numbers.pop("lr"),
        "model.arch": "resnet50",
        "augmentation.crop_scale": (0.08, 1.0),
        "augmentation.flip": 0.5,
        "augmentation.interpolation": ("bicubic", "bicubic (mmpretrain), either by chance (timm)"),
        "augmentation.erasing": 0.0,
        "augmentation.cutmix_alpha": 1.0,
        "augmentation.mix_prob": 1.0,
        "augmentation.switch_prob": 0.5,
        "lr.lr_schedule_type": "cosine",
        "lr.warmup_epochs": 5,
        "lr.warmup_lr": (1e-4, "1e-4 x lr (mmpretrain); 1e-6 or 1e-4 (others)"),
        "lr.min_lr": 1e-6,
        "training.loss": "bce",
        "training.bce_threshold": (None, "none (timm, mmpretrain); 0.2 (one configuration)"),
        "training.optimizer": "lamb",
        "training.bn_wd": (0.0, "none on norm and bias"),
        "training.ema_decay": 0.0,
        "training.precision": ("16-mixed", "mixed"),
        "validation.resolution": 224,
        "validation.crop_ratio": 0.95,
        "validation.interpolation": "bicubic",
        "augmentation.repeats": 1,
        "model.drop_path": 0.0,
        **numbers,
    }


PUBLISHED = {  # recipe: setting: the source's value, or (ours, the source's words)
    "rsb_a1": published_rsb(
        lr=5e-3,
        **{
            "training.epochs": 600,
            "resolution.min_res": 224,
            "resolution.max_res": 224,
            "training.weight_decay": 0.01,
            "training.label_smoothing": 0.1,
            "augmentation.mixup_alpha": 0.2,
            "augmentation.auto_augment": "rand-m7-mstd0.5-inc1",
            "augmentation.repeats": 3,
            "model.drop_path": 0.05,
            "expected.val_acc1": {600: 80.382},
        },
    ),
    "rsb_a2": published_rsb(
        lr=5e-3,
        **{
            "training.epochs": 300,
            "resolution.min_res": 224,
            "resolution.max_res": 224,
            "training.weight_decay": 0.02,
            "training.label_smoothing": 0.0,
            "augmentation.mixup_alpha": 0.1,
            "augmentation.auto_augment": "rand-m7-mstd0.5-inc1",
            "augmentation.repeats": 3,
            "model.drop_path": 0.05,
            "expected.val_acc1": {300: 79.828},
        },
    ),
    "rsb_a3": published_rsb(
        lr=8e-3,
        **{
            "training.epochs": 100,
            "resolution.min_res": 160,
            "resolution.max_res": 160,
            "training.weight_decay": 0.02,
            "training.label_smoothing": 0.0,
            "augmentation.mixup_alpha": 0.1,
            "augmentation.auto_augment": "rand-m6-mstd0.5-inc1",
            "expected.val_acc1": {100: 78.052},
        },
    ),
    "torchvision_v2": {
        "global batch": (1024, "8 GPUs x 128"),
        "lr": 0.5,
        "model.arch": "resnet50",
        "augmentation.crop_scale": (0.08, 1.0),
        "augmentation.flip": 0.5,
        "augmentation.interpolation": "bilinear",
        "augmentation.erasing": 0.1,
        "augmentation.cutmix_alpha": 1.0,
        "augmentation.mix_prob": (1.0, "one of Mixup and CutMix on every batch"),
        "augmentation.switch_prob": 0.5,
        "lr.lr_schedule_type": "cosine",
        "lr.warmup_epochs": 5,
        "lr.warmup_lr": (0.01, "0.01 x lr"),
        "lr.min_lr": 0.0,
        "training.loss": "cross_entropy",
        "training.optimizer": "sgd",
        "training.momentum": 0.9,
        "training.bn_wd": (0.0, "0 on norm"),
        "training.ema_decay": 0.99998,
        "training.ema_every": 32,
        "training.ema_rescale": (True, "x global batch x 32 / epochs"),
        "training.precision": ("16-mixed", "mixed"),
        "validation.resolution": 224,
        "validation.resize": 232,
        "validation.interpolation": "bilinear",
        "augmentation.repeats": 4,
        "training.epochs": 600,
        "resolution.min_res": 176,
        "resolution.max_res": 176,
        "training.weight_decay": 2e-5,
        "training.label_smoothing": 0.1,
        "augmentation.mixup_alpha": 0.2,
        "augmentation.auto_augment": ("trivial", "TrivialAugmentWide"),
        "expected.val_acc1": {600: 80.858},
        "expected.val_acc5": {600: 95.434},
    },
}


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file and gives its path."""

    def write_file(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


@pytest.fixture
def refusal(capsys):
    """Reads a command line that must be refused, and gives the message."""

    def refuse(*argv, read=read_recipe):
        with pytest.raises(SystemExit) as stop:
            read(list(argv))
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("error: ") == 1 and err.endswith("\n")
        return err.removeprefix("error: ").strip()

    return refuse


# ---------------------------------------------------------------------------------------------------------------------
# Composition


def test_defaults_are_ffcv_imagenets_where_it_has_the_key():
    recipe = read_recipe([])
    assert recipe.resolution.min_res == recipe.resolution.max_res == 160
    assert (recipe.lr.lr_schedule_type, recipe.lr.lr_peak_epoch) == ("cyclic", 2)
    assert (recipe.lr.step_ratio, recipe.lr.step_length) == (0.1, 30)
    training = recipe.training
    assert (training.batch_size, training.momentum, training.weight_decay, training.epochs) == (512, 0.9, 4e-5, 30)
    assert (training.label_smoothing, training.distributed, training.use_blurpool) == (0.1, False, False)
    assert (recipe.validation.batch_size, recipe.validation.resolution, recipe.validation.lr_tta) == (512, 224, True)
    assert (recipe.dist.world_size, recipe.dist.address, recipe.dist.port) == (1, "localhost", 12355)
    assert recipe.lr.lr is None and recipe.training.bn_wd is None
    assert recipe.augmentation.crop_scale == (0.08, 1.0) and recipe.augmentation.crop_ratio == (0.75, 1.3333)
    assert recipe.notices == () and recipe.files == ()
    assert {recipe.source(key) for key in recipe.flat()} == {"default"}


def test_later_files_and_then_the_command_line_win(write):
    first = write("training:\n  epochs: 10\n  batch_size: 64\nlr:\n  base_lr: 0.1\n  min_lr: 0.01\n", "first.yaml")
    second = write("training:\n  epochs: 20\nlr:\n  base_lr: 0.2\n", "second.yaml")
    recipe = read_recipe(["--epochs=30", "--config-file", first, "-C", second, "--lr.base_lr", "0.3"])
    assert (recipe.training.epochs, recipe.training.batch_size) == (30, 64)
    assert (recipe.lr.base_lr, recipe.lr.min_lr) == (0.3, 0.01)
    assert recipe.files == (Path(first), Path(second))
    assert recipe.source("training.epochs") == "command line"
    assert recipe.source("training.batch_size") == first
    assert recipe.source("training.momentum") == "default"
    assert recipe.overrides() == [
        f"lr.base_lr: 0.1 ({first}) -> 0.2 ({second}) -> 0.3 (command line)",
        f"training.epochs: 10 ({first}) -> 20 ({second}) -> 30 (command line)",
    ]
    assert recipe.history()["lr.base_lr"] == [[0.5, "default"], [0.1, first], [0.2, second], [0.3, "command line"]]
    assert recipe.history().keys() == {"lr.base_lr", "lr.min_lr", "training.epochs", "training.batch_size"}
    assert read_recipe([f"--config-file={second}", f"--config-file={first}"]).training.epochs == 10


def test_order_on_the_command_line_counts():
    assert read_recipe(["--epochs", "3", "--training.epochs=4"]).training.epochs == 4
    assert read_recipe(["--training.epochs=4", "--epochs", "3"]).training.epochs == 3


@pytest.mark.parametrize("none", ["None", "none", "null", "~"])
def test_none_restores_the_default(write, none):
    file = write(f"lr:\n  lr: 1.7\n  base_lr: 0.1\ntraining:\n  bn_wd: {none}\n")
    recipe = read_recipe(["-C", file, f"--lr.lr={none}", f"--lr.base_lr={none}"])
    assert recipe.lr.lr is None and recipe.lr.base_lr == 0.5 and recipe.training.bn_wd is None


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_short_flags_are_aliases(flag, tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.touch()
    target = FLAGS[flag]
    needed = ["--eval_only"] * (flag == "report") + ["--model.pretrained=1"] * (flag in ("report", "eval_only"))
    if isinstance(target, tuple):
        assert read_recipe([f"--{flag}", *needed]).flat() == read_recipe([f"--{target[0]}={target[1]}", *needed]).flat()
        return
    value = {"precision": "32", "resume": str(checkpoint), "lr": "1e-2"}.get(flag, "7")
    spellings = ([f"--{flag}={value}"], [f"--{flag}", value], [f"--{target}={value}"], [f"--{target}", value])
    flats = [read_recipe([*spelling, *needed]).flat() for spelling in spellings]
    assert flats[0] == flats[1] == flats[2] == flats[3]
    assert flats[0] != read_recipe(needed).flat()


def test_negative_values_follow_a_space():
    assert read_recipe(["--data.num_workers", "-1", "--resolution.start_ramp", "-3"]).resolution.start_ramp == -3


def test_environment_variables_are_not_read(monkeypatch):
    for name in ("training.epochs", "TRAINING_EPOCHS", "epochs", "training.nonsense"):
        monkeypatch.setenv(name, "3")
    assert read_recipe([]).training.epochs == 30


def test_json_dotted_keys_and_empty_sections(write):
    file = write(json.dumps({"training": {"epochs": 3}, "lr.base_lr": 0.2}), "recipe.json")
    recipe = read_recipe(["-C", file, "-C", write("lr:\n# base_lr: 0.1\n")])
    assert (recipe.training.epochs, recipe.lr.base_lr) == (3, 0.2)


def test_settings_are_plain_data(write):
    recipe = read_recipe(["-C", write("augmentation:\n  crop_scale: [0.2, 1]\n")])
    assert recipe.to_dict()["augmentation"]["crop_scale"] == [0.2, 1.0]
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
    assert copy.deepcopy(recipe).flat() == pickle.loads(pickle.dumps(recipe)).flat() == recipe.flat()
    with pytest.raises(AttributeError, match="trainning"):
        _ = recipe.trainning


def test_a_recipe_never_changes():
    recipe = read_recipe([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.training.epochs = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.training = recipe.training
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=31))
    assert (longer.flat()["training.epochs"], recipe.training.epochs) == (31, 30)


@pytest.mark.slow
def test_mypy_knows_the_recipe(tmp_path):
    lines = {
        "recipe.trainin.epoch": '"Recipe" has no attribute "trainin"; maybe "training"?',
        "recipe.training.epoch": '"Training" has no attribute "epoch"; maybe "epochs"?',
        "recipe.training.epochs = 3": 'Property "epochs" defined in "Training" is read-only',
        "reveal_type(recipe.training.epochs)": 'Revealed type is "int"',
        "reveal_type(recipe.training.bn_wd)": 'Revealed type is "float | None"',
        "reveal_type(recipe.training.nesterov)": 'Revealed type is "bool"',
        "count: int = setting(Text(), default='3')": "Incompatible types in assignment",
    }
    imports = (
        "from ffcv_ops.settings import setting",
        "from ffcv_ops.settings.fields import Text",
        "from imagenet_training.planning.recipe import read_recipe",
        "recipe = read_recipe([])",
    )
    (tmp_path / "mine.py").write_text("\n".join([*imports, *lines]) + "\n")
    # ffcv_ops/__init__.py names the types of the whole data path, and those of torch with them: seconds for nothing.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = True\n[mypy-ffcv_ops]\nfollow_imports = skip\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "mine.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = done.stdout.replace("builtins.", "").replace("Union[float, None]", "float | None").splitlines()
    for number, expected in enumerate(lines.values(), start=len(imports) + 1):
        assert any(line.startswith(f"mine.py:{number}: ") and expected in line for line in said), done.stdout


def test_import_is_light():
    code = "import sys, imagenet_training.planning.recipe\n"
    code += "print([name for name in ('torch', 'numba', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.weight_decay", "1e-4", 1e-4),
        ("training.weight_decay", "5.0e-05", 5e-5),
        ("training.weight_decay", "0", 0.0),
        ("lr.lr", "1", 1.0),
        ("training.nesterov", "False", False),
        ("training.nesterov", "no", False),
        ("training.nesterov", "0", False),
        ("training.nesterov", "true", True),
        ("training.nesterov", "on", True),
        ("training.nesterov", "1", True),
        ("training.precision", "32", "32"),
        ("augmentation.crop_scale", "[0.25, 1]", (0.25, 1.0)),
        ("augmentation.crop_scale", "0.25,1", (0.25, 1.0)),
        ("augmentation.auto_augment", "rand-m7-mstd0.5-inc1", "rand-m7-mstd0.5-inc1"),
        ("wandb.name", "2024", "2024"),
        ("wandb.name", "'False'", "False"),
    ],
)
def test_values_from_a_file_and_from_the_command_line_are_the_same(write, key, text, value):
    section, name = key.split(".")
    from_file = read_recipe(["-C", write(f"{section}:\n  {name}: {text}\n")]).flat()[key]
    from_command_line = read_recipe([f"--{key}={yaml.safe_load(text) if chr(39) in text else text}"]).flat()[key]
    assert from_file == from_command_line == value
    assert type(from_file) is type(from_command_line) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("training.nesterov", "maybe"),
        ("training.nesterov", "2"),
        ("training.nesterov", "''"),
        ("training.epochs", "0"),
        ("training.epochs", "-3"),
        ("training.epochs", "1.5"),
        ("training.epochs", "true"),
        ("training.epochs", "ten"),
        ("training.epochs", "[3]"),
        ("training.epochs", "{a: 1}"),
        ("training.batch_size", "0"),
        ("training.weight_decay", "1e-4x"),
        ("training.weight_decay", ".nan"),
        ("training.weight_decay", ".inf"),
        ("training.weight_decay", "yes"),
        ("training.label_smoothing", "1"),
        ("training.precision", "16"),
        ("augmentation.flip", "1.5"),
        ("augmentation.mixup_alpha", "-0.2"),
        ("augmentation.cutmix_alpha", "-1"),
        ("augmentation.crop_scale", "0.5"),
        ("augmentation.crop_scale", "[0.5]"),
        ("augmentation.crop_scale", "[0.5, 0.2]"),
        ("augmentation.crop_scale", "[0, 1]"),
        ("augmentation.crop_scale", "[0.1, 1, 2]"),
        ("augmentation.crop_scale", "[0.1, 1.5]"),
        ("augmentation.crop_scale", "[a, b]"),
        ("wandb.name", "yes"),
        ("wandb.name", "[a]"),
        ("wandb.name", "''"),
        ("data.num_workers", "-2"),
        ("data.order", "sequential"),
        ("augmentation.auto_augment", "randaugment"),
        ("augmentation.auto_augment", "augmix-m3"),
        ("augmentation.auto_augment", "[trivial]"),
        ("augmentation.repeats", "0"),
        ("augmentation.erasing", "1.1"),
        ("training.optimizer", "adam"),
        ("training.loss", "mse"),
        ("training.bce_threshold", "1"),
        ("training.agc", "-0.1"),
        ("validation.resize", "0"),
        ("expected.val_acc1", "{0: 30}"),
        ("expected.val_acc1", "{10: 130}"),
        ("expected.val_acc1", "{10: 30, 10: 40}"),
        ("expected.val_acc1", "{10: {20: 30}}"),
        ("expected.val_acc1", "{first: 30}"),
        ("expected.val_acc1", "{}"),
        ("expected.val_acc1", "30"),
        ("expected.val_acc1", "[30, 40]"),
        ("dist.port", "65536"),
        ("training.seed", "9223372036854775808"),
        ("training.epochs", "2026-99-99"),
        ("lr.lr", "1" + 400 * "0"),
        ("lr.lr", "1e400"),
    ],
)
def test_bad_values_are_refused(write, refusal, key, text):
    section, name = key.split(".")
    file = write(f"{section}:\n\n  {name}: {text}\n")
    message = refusal("-C", file)
    assert message.startswith(f"{file}:3: {key} must be ")
    assert "\n" not in message


@dataclasses.dataclass(frozen=True)
class Cfg:
    """A section."""

    count: int = setting(Integer(), required=True)
    """A count."""
    share: float = setting(Number(min=0, max=1), default=0.5)
    """A share, explained in two lines,
    of which this is the second."""
    mode: str = setting(Choice("jpg", "raw"), default="jpg")
    """A mode."""
    flag: bool = setting(Switch(), default=False)
    """A flag."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(Settings):
    cfg: Cfg


def test_settings_of_another_program(refusal, capsys):
    def read(argv):
        return read_settings(Program, argv, flags={"fast": ("cfg.flag", "1"), "n": "cfg.count"}, description="Test.")

    settings = read(["--n", "3", "--cfg.share=1", "--fast"])
    assert settings.to_dict() == {"cfg": {"count": 3, "share": 1.0, "mode": "jpg", "flag": True}}
    assert read(["--n=3", "--cfg.flag=False"]).cfg.flag is False
    assert "cfg.count is not set: pass --cfg.count=VALUE or set it in a --config-file (A count.)" in refusal(read=read)
    assert "cfg.count is not set" in refusal("--n=None", read=read)
    assert "one of jpg, raw, not 'jpeg'; did you mean jpg?" in refusal("--n=3", "--cfg.mode=jpeg", read=read)
    for bad in ("--cfg.share=1.5", "--cfg.flag=maybe", "--cfg.count=1.5"):
        assert "must be" in refusal("--n=3", bad, read=read)
    with pytest.raises(SystemExit):
        read(["--help"])
    out = capsys.readouterr().out
    assert "cfg: A section.\n  --cfg.count, --n: an integer; required\n      A count.\n" in out
    assert "A share, explained in two lines, of which this is the second." in out


def test_a_setting_without_an_explanation_is_a_mistake_of_the_program():
    @dataclasses.dataclass(frozen=True)
    class Silent:
        """A section."""

        count: int = setting(Integer(), default=1)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mute(Settings):
        silent: Silent

    with pytest.raises(TypeError, match="Silent.count needs a docstring below it"):
        read_settings(Mute, [], flags={}, description="")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training:\n  epoch: 3\n", ":2: unknown setting training.epoch; did you mean training.epochs"),
        ("trainning:\n  epochs: 3\n", ":1: unknown setting trainning; did you mean training"),
        ("epochs: 3\n", ":1: unknown setting epochs; did you mean training.epochs"),
        ("lr:\n  epochs: 3\n", ":2: unknown setting lr.epochs; did you mean training.epochs"),
        ("lr:\n  zzzzzz: 3\n", ":2: unknown setting lr.zzzzzz; --help lists every setting"),
        ("lr:\n  lr: 1\n  lr: 2\n", ":3: lr.lr is set twice, first in line 2"),
        ("lr:\n  lr: 1\ntraining:\n  epochs: 3\nlr:\n  base_lr: 2\n", ":5: lr is set twice, first in line 1"),
        ("lr:\n  lr: 1\nlr.lr: 2\n", ":3: lr.lr is set twice, first in line 2"),
        ("lr: 0.5\n", ":1: lr is a section and must hold settings, not a value"),
        ("lr: [1, 2]\n", ":1: lr is a section and must hold settings"),
        ("lr:\n  lr:\n    lr: 1\n", ":2: lr.lr must be a number >= 0, not a mapping"),
        ("- lr\n- training\n", ": not a mapping of sections to settings"),
        ("just text\n", ": not a mapping of sections to settings"),
        ("# nothing\n", ": not a mapping of sections to settings"),
        ("", ": not a mapping of sections to settings"),
        ("lr:\n  lr: [1\n", ":3: not valid YAML"),
        ("lr:\n\tlr: 1\n", ":2: not valid YAML"),
        ("lr: {}\n---\nlr: {}\n", ":2: not valid YAML"),
        ("lr:\n  lr: !!python/object/apply:os.system [ls]\n", ":2: not valid YAML"),
    ],
)
def test_mistakes_in_files_are_named(write, refusal, text, expected):
    file = write(text)
    assert refusal("-C", file).startswith(file + expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epoch=3"], "command line: unknown setting --epoch; did you mean --epochs"),
        (["--training.epoch", "3"], "unknown setting --training.epoch; did you mean --training.epochs?"),
        (["--batch-size=3"], "unknown setting --batch-size; did you mean --batch_size"),
        (["--lr.epochs=3"], "did you mean --epochs or --training.epochs?"),
        (["--qqqq"], "unknown setting --qqqq; --help lists every setting"),
        (["--lr"], "command line, --lr needs a value: --lr=VALUE"),
        (["--lr", "--epochs=3"], "command line, --lr needs a value"),
        (["--config-file"], "command line, --config-file needs a value"),
        (["--lr=fast"], "command line, --lr: lr.lr must be a number >= 0, not 'fast'"),
        (["--epochs="], "command line, --epochs: training.epochs must be an integer >= 1, not ''"),
        (["--no_wandb=1"], "--no_wandb takes no value; to give one, use --wandb.enable=1"),
        (["--no_wandb", "1"], "command line: '1' belongs to no setting"),
        (["--precision=16mixed"], "one of 16-mixed, bf16-mixed, 32, not '16mixed'; did you mean 16-mixed?"),
        (["-x"], "command line: '-x' belongs to no setting"),
        (["--"], "command line: '--' belongs to no setting"),
        ([str(RECIPES[0])], f"a configuration file is given as --config-file {RECIPES[0]}"),
        (["--config-file=no/where.yaml"], "--config-file no/where.yaml: no such file"),
        ([f"--config-file={ROOT}"], "cannot be read"),
    ],
)
def test_mistakes_on_the_command_line_are_named(refusal, argv, expected):
    assert expected in refusal(*argv)


def test_a_missing_file_suggests_its_neighbour(refusal):
    message = refusal("--config-file", f"{ROOT}/rn50_configs/single_gpu_100.yaml")
    assert message.endswith(f"no such file; did you mean {ROOT}/rn50_configs/single_gpu_100ep.yaml?")


def test_files_that_are_no_text_are_refused(tmp_path, refusal):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    assert "cannot be read" in refusal("-C", str(path))
    path.write_bytes(b"lr:\n  lr: \x00\n")
    assert "not valid YAML" in refusal("-C", str(path))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--resolution.min_res=192"],
            "resolution.min_res=192 (command line) is larger than resolution.max_res=160 (default)",
        ),
        (
            ["--lr.lr_schedule_type=cosine", "--lr.warmup_epochs=5", "--epochs=5"],
            "lr.warmup_epochs=5 (command line) must be less than training.epochs=5 (command line)",
        ),
        (["--lr.warmup_epochs=5"], "does not fit lr.lr_schedule_type=cyclic (default)"),
        (["--training.nesterov=1", "--training.momentum=0"], "needs a momentum"),
        ([f"--resume={ROOT}"], "(command line): this is a folder"),
        (["--resume=no/last.ckpt"], "training.resume=no/last.ckpt (command line): no such file"),
        (["--model.weights=no/weights.pt"], "model.weights=no/weights.pt (command line): no such file"),
        ([f"--model.weights={__file__}", "--model.pretrained=1"], "exclude each other"),
        (
            ["--training.optimizer=lamb", "--training.nesterov=1"],
            "needs training.optimizer=sgd, not training.optimizer=lamb (command line)",
        ),
        (["--training.bce_threshold=0.2"], "needs training.loss=bce, not training.loss=cross_entropy (default)"),
        (
            ["--model.freeze=body", "--model.pretrained=1", "--training.layer_decay=0.8"],
            "training.layer_decay=0.8 (command line) has no effect with model.freeze=body (command line)",
        ),
        (
            ["--model.freeze=body", "--model.pretrained=1", "--training.agc=0.01"],
            "training.agc=0.01 (command line) has",
        ),
        (["--model.freeze=body"], "would keep random weights: set --model.pretrained=1"),
        (["--model.class_names=names.txt"], "names the classes of weights: set --model.weights=FILE"),
        (["--training.ema_rescale=1"], "needs a moving average: set training.ema_decay"),
        (["--augmentation.repeats=3", "--data.order=quasi_random"], "needs --data.order=random"),
        (["--preview=a.png", "--eval_only"], "and training.eval_only=1 (command line) are two commands"),
        (["--preview=a.png", "--dry_run"], "and training.dry_run=1 (command line) are two commands"),
        (["--validation.resize=200"], "is smaller than validation.resolution=224 (default), the side of its crop"),
    ],
)
def test_settings_at_odds_are_refused(refusal, argv, expected):
    assert expected in refusal(*argv)


def test_did_you_mean():
    assert did_you_mean("a.colour", ["a.color", "b.colour", "c.size"]) == "; did you mean b.colour or a.color?"
    assert did_you_mean("xyz", ["training.epochs"]) == "; --help lists every setting"
    assert did_you_mean("xyz", []) == "; --help lists every setting"


def test_a_script_ends_with_status_2_and_one_message():
    code = "import sys; from imagenet_training.planning.recipe import read_recipe; read_recipe(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "--epoch=1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: unknown setting --epoch; did you mean --epochs or --training.epochs?\n"


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit) as stop:
        read_recipe(["--epochs=nonsense", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for key in read_recipe([]).flat():
        assert f"--{key}" in out
    for flag in FLAGS:
        assert re.search(rf"--{flag}\b", out)
    assert all(param.desc.split()[0] in out for param in parameters_of(Recipe).values())


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def ffcv_imagenet_yaml(name, epochs):
    """A recipe with the keys, values and notation of ffcv-imagenet's ``{name}_{epochs}_epochs.yaml``."""
    rn18 = name == "rn18"
    start_ramp, end_ramp = BUDGETS[epochs]
    return "\n".join(
        [
            "data:",
            *(["  gpu: 0"] if rn18 else []),
            "  in_memory: 1\n  num_workers: 12",
            f"dist:\n  world_size: {1 if rn18 else 8}",
            "logging:\n  folder: /tmp/" + ("\n  log_level: 0" if rn18 else ""),
            f"lr:\n  lr: {0.5 if rn18 else 1.7}" + ("\n  lr_peak_epoch: 2" if rn18 else ""),
            "  lr_schedule_type: cyclic",
            f"model:\n  arch: resnet{18 if rn18 else 50}",
            f"resolution:\n  end_ramp: {end_ramp}\n  max_res: 192\n  min_res: 160\n  start_ramp: {start_ramp}",
            f"training:\n  batch_size: {1024 if rn18 else 512}\n  bn_wd: 0\n  distributed: {0 if rn18 else 1}",
            f"  epochs: {epochs}\n  label_smoothing: 0.1\n  momentum: 0.9\n  optimizer: sgd",
            f"  weight_decay: {'5e-5' if rn18 else '0.0001'}\n  use_blurpool: 1",
            "validation:\n  lr_tta: true\n  resolution: 256\n",
        ]
    )


@pytest.mark.parametrize("epochs", BUDGETS)
@pytest.mark.parametrize("name", ["rn18", "rn50"])
def test_ffcv_imagenets_recipes_resolve_and_ours_agree(write, name, epochs):
    world_size = 1 if name == "rn18" else 8
    file = write(ffcv_imagenet_yaml(name, epochs))
    overrides = ["--data.train_dataset=/d/train.ffcv", "--data.val_dataset=/d/val.ffcv", "--data.num_workers=12"]
    theirs = read_recipe(["--config-file", file, *overrides, "--data.in_memory=1", "--logging.folder=/d/runs"])
    assert theirs.data.train_dataset == "/d/train.ffcv" and theirs.logging.folder == "/d/runs"
    assert theirs.training.bn_wd == 0 and theirs.validation.lr_tta is True
    assert theirs.training.weight_decay == (5e-5 if name == "rn18" else 1e-4)
    assert len(theirs.notices) == (name == "rn18")
    assert name == "rn50" or "data.gpu=0" in theirs.notices[0]

    ours = read_recipe(["--config-file", str(ROOT / f"{name}_configs/{name}_{epochs}ep.yaml")])
    differing = {key for key, value in ours.flat().items() if value != theirs.flat()[key]}
    assert differing <= {
        "lr.lr", "lr.base_lr", "data.train_dataset", "data.val_dataset", "data.num_workers", "data.gpu",
        "training.distributed", "dist.world_size", "logging.folder", "logging.log_level",
        "expected.global_batch_size", "expected.val_acc1", "expected.val_acc5",
    }  # fmt: skip
    assert expected_accuracy(ours).keys() == {"val/acc1", "val/acc5"} and list(ours.expected.val_acc1) == [epochs]
    plans = [plan_run(recipe, world_size=world_size, **IMAGENET) for recipe in (ours, theirs)]
    assert plans[0].lr == plans[1].lr == (0.5 if name == "rn18" else 1.7)
    assert plans[0].total_steps == plans[1].total_steps and not plans[0].notices
    for step in range(0, plans[0].total_steps, 997):
        assert plans[0].lr_at(step) == plans[1].lr_at(step)


def test_there_are_twenty_recipes():
    assert len(RECIPES) == 20


def test_a_file_of_weights_on_the_command_line_replaces_the_pretrained_ones_of_a_recipe():
    finetune = ["-C", str(ROOT / "rn50_configs/finetune.yaml")]
    assert read_recipe(finetune).model.pretrained
    recipe = read_recipe([*finetune, f"--model.weights={__file__}"])
    assert not recipe.model.pretrained and recipe.source("model.pretrained") == "model.weights"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_documents_that_resolve(path, write):
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for heading in ("Source", "Expected", "Duration", "Command"):
        assert f"# {heading} " in header
    assert str(path.relative_to(ROOT)) in header
    assert f"[{path.stem}]" in (ROOT / "docs/RECIPES.md").read_text()

    recipe = read_recipe(["-C", str(path)])
    assert recipe.notices == ()
    planned = plan_run(recipe, world_size=1, **IMAGENET)
    assert "\n\n" not in summary(recipe, planned)
    assert read_recipe(["-C", write(resolved_recipe(recipe))]).flat() == recipe.flat()


def test_the_asked_for_recipes_have_their_numbers():
    for stem, epochs, batch_size, lr in (("single_gpu_100ep", 100, 128, 0.25), ("resnet_strikes_back", 600, 256, 0.5)):
        recipe = read_recipe(["-C", str(ROOT / f"rn50_configs/{stem}.yaml")])
        planned = plan_run(recipe, world_size=1, **IMAGENET)
        assert (recipe.training.epochs, recipe.training.batch_size, planned.lr) == (epochs, batch_size, lr)
        assert planned.lr_arithmetic == f"0.5 x {batch_size} / 256 = {lr}"
        assert (recipe.training.momentum, recipe.training.weight_decay) == (0.9, 2e-5)
        assert (recipe.lr.lr_schedule_type, recipe.lr.warmup_epochs) == ("cosine", 5)
        augmentation = recipe.augmentation
        assert (augmentation.mixup_alpha, augmentation.cutmix_alpha, augmentation.flip) == (0.2, 1.0, 0.5)
        assert (augmentation.crop_scale, recipe.training.label_smoothing) == ((0.08, 1.0), 0.1)
        assert planned.resolution(epochs - 1) == 224
        assert recipe.training.precision == "16-mixed"


def test_a_short_run_of_a_cyclic_recipe_is_noticed_not_refused(write):
    recipe = read_recipe(["-C", write(ffcv_imagenet_yaml("rn50", 16)), "--epochs=1"])
    assert "will not reach its peak" in recipe.notices[0]


@pytest.mark.parametrize(
    "key, value, others, condition",
    [
        ("training.momentum", 0.5, ["--training.optimizer=adamw"], "training.optimizer=sgd"),
        ("training.ema_every", 4, [], "training.ema_decay"),
        ("lr.base_lr", 7, ["--lr=1"], "lr.lr=None"),
        ("lr.lr_peak_epoch", 3, ["--lr.lr_schedule_type=cosine"], "lr.lr_schedule_type=cyclic"),
        ("lr.step_length", 3, [], "lr.lr_schedule_type=step"),
        ("lr.min_lr", 0.1, [], "lr.lr_schedule_type=cosine"),
        ("lr.warmup_lr", 0.1, [], "lr.warmup_epochs"),
        ("augmentation.mix_prob", 0.5, [], "Mixup or CutMix"),
        ("augmentation.switch_prob", 0.1, ["--augmentation.mixup_alpha=1"], "both Mixup and CutMix"),
        ("resolution.end_ramp", 3, [], "a resolution.min_res below resolution.max_res"),
        ("validation.crop_ratio", 0.9, ["--validation.resize=256"], "validation.resize=None"),
        ("dist.world_size", 8, [], "training.distributed=1"),
    ],
)
def test_a_setting_without_effect_is_noticed_if_it_is_on_the_command_line(write, key, value, others, condition):
    section, name = key.split(".")
    notice = f"{key}={value} (command line) has no effect without {condition}"
    assert notice in read_recipe([f"--{key}={value}", *others]).notices
    in_file = read_recipe(["-C", write(f"{section}: {{{name}: {value}}}"), *others])
    assert not any("has no effect" in line for line in in_file.notices)


def test_an_evaluation_is_told_nothing_of_training():
    argv = ["-C", str(ROOT / "rn50_configs/rsb_a1.yaml"), "--epochs=1", "--lr.warmup_epochs=0", "--training.momentum=0"]
    for others, count in (([], 3), (["--eval_only", "--model.pretrained=1"], 0)):
        recipe = read_recipe([*argv, *others])
        plan = plan_run(recipe, world_size=8, **IMAGENET)
        assert len([*recipe.notices, *plan.notices]) == count


def test_settings_with_their_conditions_are_not_noticed():
    argv = ["--training.momentum=0.5", "--lr.base_lr=1", "--lr.lr_peak_epoch=3", "--validation.crop_ratio=0.9"]
    argv += ["--augmentation.mixup_alpha=1", "--augmentation.mix_prob=0.5", "--training.ema_decay=0.9"]
    assert read_recipe([*argv, "--training.ema_every=2"]).notices == ()


def test_evaluating_untrained_weights_is_refused(tmp_path, capsys):
    weights = tmp_path / "weights.pt"
    weights.touch()
    with pytest.raises(SystemExit) as stop:
        read_recipe(["--eval_only"])
    assert stop.value.code == 2 and "--eval_only has no weights to evaluate" in capsys.readouterr().err
    assert read_recipe(["--eval_only", f"--model.weights={weights}"]).notices == ()


def test_expected_accuracies_are_read_alike_from_files_and_the_command_line(write):
    recipe = read_recipe(["-C", write("expected:\n  val_acc1: {25: 50, 10: 3e1}\n  train_acc1: null\n"), "--epochs=25"])
    assert expected_accuracy(recipe) == {"val/acc1": {10: 30.0, 25: 50.0}} and list(recipe.expected.val_acc1) == [
        10,
        25,
    ]
    assert recipe.notices == ()
    other = read_recipe(["--expected.val_acc1=10:30,25:50", "--epochs=25"])
    assert other.flat() == recipe.flat() and show(other.expected.val_acc1) == "10:30,25:50"


def test_a_shorter_run_is_not_compared_with_the_expected_accuracies():
    recipe = read_recipe(["-C", str(ROOT / "rn50_configs/single_gpu_100ep.yaml"), "--epochs=50"])
    assert "those of 100 epochs; this run has 50" in recipe.notices[0]


def published_row(stem, key):
    """A setting's value in a recipe on 8 GPUs, and in its source."""
    recipe = read_recipe(["-C", str(ROOT / f"rn50_configs/{stem}.yaml")])
    planned = plan_run(recipe, world_size=8, **IMAGENET)
    derived = {"global batch": planned.global_batch_size, "lr": planned.lr}
    value, words = derived[key] if key in derived else recipe.flat()[key], PUBLISHED[stem][key]
    return value, *(words if isinstance(words, tuple) and isinstance(words[1], str) else (words, show(words)))


@pytest.mark.parametrize(("stem", "key"), [(stem, key) for stem, values in PUBLISHED.items() for key in values])
def test_published_recipes_have_their_source_s_numbers(stem, key):
    value, expected, _ = published_row(stem, key)
    assert value == (pytest.approx(expected) if key == "lr" else expected)


def test_published_recipes_leave_nothing_else_at_odds_with_the_defaults():
    for stem, values in PUBLISHED.items():
        recipe = read_recipe(["-C", str(ROOT / f"rn50_configs/{stem}.yaml")])
        assert {key for key in recipe.flat() if recipe.source(key) != "default"} - values.keys() <= {
            "model.library", "data.train_dataset", "data.val_dataset", "lr.base_lr", "training.batch_size",
            "training.accumulation", "validation.lr_tta", "expected.global_batch_size",
        }  # fmt: skip
        assert not recipe.validation.lr_tta


def test_torchvision_s_moving_average():
    # (1 - 0.99998) * 8 * 128 * 32 / 600, whatever the number of GPUs that make up the global batch
    recipe = read_recipe(["-C", str(ROOT / "rn50_configs/torchvision_v2.yaml"), "--training.accumulation=2"])
    planned = plan_run(recipe, world_size=4, **IMAGENET)
    assert planned.ema_decay == pytest.approx(1 - 0.00109227, abs=1e-8)
    assert "moving average 0.998908 every 32 steps" in summary(recipe, planned)
    assert rescaled_ema_decay(0.5, every=32, global_batch_size=1024, epochs=1) == 0.0


@pytest.mark.parametrize(
    ("argv", "updates_and_share", "is_advised"),
    [
        (["--training.ema_decay=0.99"], None, False),  # 0.99 ** 559 is 0.4 %
        (["--training.ema_decay=0.999"], "560 updates, .* 57%", True),
        (["--training.ema_decay=0.99998", "--training.ema_every=32", "--training.ema_rescale=1"], "17 updates", True),
        (["--training.ema_decay=0.9", "--training.ema_every=1000"], "0 updates, .* 100%", False),
        (["--training.ema_decay=0.999", "--eval_only", "--model.pretrained=1"], None, False),
    ],
)
def test_an_average_that_stays_near_the_first_weights_is_noticed(argv, updates_and_share, is_advised):
    def notices(*more):
        recipe = read_recipe(["--epochs=8", "--batch_size=64", "--lr.warmup_epochs=0", *argv, *more])
        planned = plan_run(recipe, world_size=1, num_train=70 * 64, num_val=64)
        return [notice for notice in planned.notices if "moving average" in notice]

    assert len(notices()) == (updates_and_share is not None)
    if updates_and_share is not None:
        assert re.search(updates_and_share, notices()[0]) and "--training.ema_decay=0 evaluates" in notices()[0]
    if is_advised:
        (taken,) = re.findall(r"(--training.ema_decay=\S+) leaves 1%", notices()[0])
        assert not notices(taken)


@pytest.mark.parametrize(
    ("argv", "world_size", "notice"),
    [
        ([], 8, None),
        (["--training.accumulation=2"], 4, None),
        (["--training.accumulation=8"], 1, None),
        ([], 1, "is 256, and the recipe was published with 2048; --training.accumulation=8 makes it the same"),
        ([], 16, "is 4096, and the recipe was published with 2048; --batch_size 128 makes it the same"),
        (["--batch_size=100"], 3, "is 300, and the recipe was published with 2048"),
    ],
)
def test_another_global_batch_than_the_published_is_noticed(argv, world_size, notice):
    recipe = read_recipe(["-C", str(ROOT / "rn50_configs/rsb_a2.yaml"), *argv])
    planned = plan_run(recipe, world_size=world_size, **IMAGENET)
    notices = [notice for notice in planned.notices if "global batch" in notice]
    assert len(notices) == (notice is not None)
    assert notice is None or notices[0].endswith(notice)


def published_table():
    """The published recipes, value by value, as a Markdown table."""
    keys = dict.fromkeys(key for values in PUBLISHED.values() for key in values)
    rows = ["| setting | " + " | ".join(f"{stem} | source" for stem in PUBLISHED) + " |"]
    rows.append("|---" * (1 + 2 * len(PUBLISHED)) + "|")
    for key in [*(key for key in keys if "." not in key), *(key for key in read_recipe([]).flat() if key in keys)]:
        cells = [f"`{key}`" if "." in key else key]
        for stem, values in PUBLISHED.items():
            value, _, source = published_row(stem, key) if key in values else ("", "", "")
            cells += [show(value), source]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def settings_table():
    """Every setting of the recipe as a Markdown table."""
    short = {target if isinstance(target, str) else target[0]: flag for flag, target in FLAGS.items()}
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for (key, default), param in zip(read_recipe([]).flat().items(), parameters_of(Recipe).values(), strict=True):
        names = f"`{key}`" + (f", `--{short[key]}`" if key in short else "")
        rows.append(f"| {names} | {show(default)} | {param.checker.help()} | {param.desc} |")
    return "\n".join(rows)


def budgets_table():
    """The recipes after ffcv-imagenet's, value by value, as a Markdown table; where budgets differ, in their order."""
    columns: dict[str, dict[str, list[str]]] = {}
    for name, world_size in (("rn50", 8), ("rn18", 1)):
        for epochs in BUDGETS:
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                file.write(ffcv_imagenet_yaml(name, epochs))
                file.flush()
                theirs = read_recipe(["-C", file.name])
            ours = read_recipe(["-C", str(ROOT / f"{name}_configs/{name}_{epochs}ep.yaml")])
            lr = plan_run(ours, world_size=world_size, **IMAGENET).lr
            set_there = [key for key in theirs.flat() if theirs.source(key) != "default"]
            for key in set_there:
                if key.split(".")[0] in ("model", "resolution", "lr", "training", "validation"):
                    row = columns.setdefault(key, {})
                    row.setdefault(name, []).append(show(lr if key == "lr.lr" else ours.flat()[key]))
                    row.setdefault(f"{name} source", []).append(show(theirs.flat()[key]))
    names = ("rn50", "rn50 source", "rn18", "rn18 source")
    rows = ["| setting | rn50_*ep | source | rn18_*ep | source |", "|---|---|---|---|---|"]
    for key, row in columns.items():
        cells = [", ".join(dict.fromkeys(row.get(name, [""]))) for name in names]
        rows.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(rows)


TABLES = {"settings": settings_table, "published": published_table, "budgets": budgets_table}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_in_the_documentation_are_current(name):
    text = (ROOT / "docs/RECIPES.md").read_text()
    table = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0].strip()
    assert table == TABLES[name](), f"run: PYTHONPATH=. python {Path(__file__).relative_to(ROOT)}"


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize(
    ("argv", "world_size", "lr", "arithmetic", "global_batch_size", "steps"),
    [
        (["--batch_size=128"], 1, 0.25, "0.5 x 128 / 256 = 0.25", 128, 10_009),
        (["--batch_size=128"], 8, 2.0, "0.5 x 1024 / 256 = 2", 1024, 1251),
        (["--batch_size=64", "--training.accumulation=4"], 2, 1.0, "0.5 x 512 / 256 = 1", 512, 2502),
        (["--batch_size=256", "--lr.base_lr=0.1"], 1, 0.1, "0.1 x 256 / 256 = 0.1", 256, 5004),
        (["--batch_size=96", "--lr.base_lr=1e-3"], 1, 0.000375, "0.001 x 96 / 256 = 0.000375", 96, 13_345),
        (["--batch_size=512", "--lr=1.7"], 8, 1.7, "1.7 (lr.lr, command line)", 4096, 312),
        (["--batch_size=512", "--lr=0"], 1, 0.0, "0 (lr.lr, command line)", 512, 2502),
    ],
)
def test_linear_scaling_and_steps(argv, world_size, lr, arithmetic, global_batch_size, steps):
    planned = plan_run(read_recipe([*argv, "--epochs=3"]), world_size=world_size, **IMAGENET)
    assert planned.lr == pytest.approx(lr)
    assert planned.lr_arithmetic == arithmetic
    assert (planned.global_batch_size, planned.steps_per_epoch, planned.total_steps) == (
        global_batch_size, steps, 3 * steps,
    )  # fmt: skip
    assert (planned.world_size, planned.num_train, planned.num_val) == (world_size, 1_281_167, 50_000)


def test_accumulation_drops_what_is_left_of_an_epoch():
    recipe = read_recipe(["--batch_size=10", "--training.accumulation=3"])
    assert plan_run(recipe, world_size=1, num_train=89, num_val=1).steps_per_epoch == 2  # 8 batches, 2 left over


def test_repeats_leave_an_epoch_at_a_multiple_of_256_images():
    for repeats, steps in ((1, 3), (3, 2)):
        recipe = read_recipe(["--batch_size=100", f"--augmentation.repeats={repeats}"])
        assert plan_run(recipe, world_size=1, num_train=300, num_val=1).steps_per_epoch == steps
    recipe = read_recipe(["--batch_size=100", "--augmentation.repeats=3"])
    assert plan_run(recipe, world_size=1, num_train=250, num_val=1).steps_per_epoch == 2


def test_plans_that_cannot_be():
    recipe = read_recipe(["--batch_size=64", "--training.accumulation=2"])
    with pytest.raises(
        ValueError, match="200 images, fewer than the 256 .*64 .batch size.*pass --batch_size 50 or less"
    ):
        plan_run(recipe, world_size=2, num_train=200, num_val=10)
    with pytest.raises(ValueError, match="use fewer processes or less accumulation"):
        plan_run(recipe, world_size=2, num_train=3, num_val=10)
    with pytest.raises(ValueError, match="val.beton has no images"):
        plan_run(recipe, world_size=1, num_train=200, num_val=0)
    with pytest.raises(ValueError, match="lr.min_lr=1 is above the peak learning rate, 0.1"):
        plan_run(read_recipe(["--lr=0.1", "--lr.min_lr=1"]), world_size=1, **IMAGENET)
    repeated = read_recipe(["--batch_size=280", "--augmentation.repeats=3"])
    with pytest.raises(ValueError, match=r"an epoch of .* with augmentation.repeats=3 .* has 256 images.* 256 or less"):
        plan_run(repeated, world_size=1, num_train=300, num_val=10)
    assert (
        plan_run(
            read_recipe(["--eval_only", "--model.pretrained=1"]), world_size=1, num_train=3, num_val=3
        ).steps_per_epoch
        == 0
    )


def test_the_suggested_batch_size_fits():
    for num_train, world_size, accumulation in ((200, 2, 2), (7, 1, 3), (1000, 8, 1)):
        argv = [f"--training.accumulation={accumulation}"]
        with pytest.raises(ValueError) as error:
            plan_run(read_recipe([*argv, "--batch_size=999"]), world_size=world_size, num_train=num_train, num_val=1)
        suggested = re.search(r"--batch_size (\d+)", str(error.value)).group(1)
        recipe = read_recipe([*argv, f"--batch_size={suggested}"])
        assert plan_run(recipe, world_size=world_size, num_train=num_train, num_val=1).steps_per_epoch == 1


def test_summary_tells_what_matters(write):
    file = write("training:\n  epochs: 100\n  bn_wd: 0\nlr:\n  lr_schedule_type: cosine\n  warmup_epochs: 5\n")
    mixing = ["--augmentation.mixup_alpha=0.2", "--augmentation.cutmix_alpha=1"]
    recipe = read_recipe(["-C", file, "--epochs=90", "--batch_size=128", "--precision=bf16-mixed", *mixing])
    text = summary(recipe, plan_run(recipe, world_size=2, **IMAGENET))
    for part in (
        file,
        f"training.epochs: 100 ({file}) -> 90 (command line)",
        "resnet50, 1000 classes, from scratch",
        "/fsx/ns1/train.beton, 1,281,167 images",
        "/fsx/ns1/val.beton, 50,000 images",
        "0.5 x 256 / 256 = 0.5",
        "cosine after 5 warm-up epochs, to 0",
        "128 (batch size) x 2 (processes) x 1 (accumulation) = 256",
        "90 epochs x 5,004 steps = 450,360 steps",
        "bf16-mixed",
        "Mixup 0.2, CutMix 1, probability 1 per batch, label smoothing 0.1",
        "0 on one-dimensional parameters",
    ):
        assert part in text, part
    recipe = read_recipe([])
    assert max(map(len, summary(recipe, plan_run(recipe, world_size=1, **IMAGENET)).splitlines())) < 120


def test_one_of_a_thing_is_not_in_the_plural():
    cosine = ["--lr.lr_schedule_type=cosine", "--lr.warmup_epochs=1", "--training.ema_decay=0.5", "--epochs=2"]
    step = ["--lr.lr_schedule_type=step", "--lr.step_length=1", "--epochs=1"]
    for settings, parts in (
        (cosine, ("cosine after 1 warm-up epoch, to 0", "moving average 0.5 every 1 step\n", "2 epochs x")),
        (step, ("x 0.1 every 1 epoch\n", " 1 epoch x")),
    ):
        text = summary(recipe := read_recipe(settings), plan_run(recipe, world_size=1, **IMAGENET))
        for part in parts:
            assert part in text, part


def test_summary_names_the_checkpoint_that_auto_has_found():
    recipe = read_recipe(["--resume=auto"])
    for resumed, words in ((None, "from scratch"), ("runs/a/last.ckpt", "resumed from runs/a/last.ckpt")):
        text = summary(recipe, plan_run(recipe, world_size=1, resumed_from=resumed, **IMAGENET))
        assert f"resnet50, 1000 classes, {words}\n" in text


if __name__ == "__main__":
    document = ROOT / "docs/RECIPES.md"
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = re.split(f"{begin}.*{end}", document.read_text(), flags=re.DOTALL)
        document.write_text(f"{before}{begin}\n{table()}\n{end}{after}")
