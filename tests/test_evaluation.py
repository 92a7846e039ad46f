"""Evaluation without training: the weights and the settings are those of the run, or the user is told."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from browsers import PageReader
from sklearn.datasets import load_digits

import train_imagenet
from ffcv_ops import UserError, read_beton
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write
from imagenet_training.data.loaders import build_val_loader
from imagenet_training.distributed import World
from imagenet_training.evaluation import differences_from_published
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.reports.predictions import Predictions
from imagenet_training.run.checkpoint import save_atomically
from imagenet_training.training.epoch import measure

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
RECIPE = """
model: {arch: test_resnet, num_classes: 10}
data: {train_dataset: %(data)s/train.beton, val_dataset: %(data)s/val.beton, num_workers: 1}
resolution: {min_res: 32, max_res: 32}
augmentation: {crop_scale: [0.5, 1], flip: 0}
lr: {lr_schedule_type: cosine, base_lr: 0.4}
training: {batch_size: 16, epochs: 3, ema_decay: 0.5, use_blurpool: 1, precision: "32"}
validation: {resolution: 32, crop_ratio: 0.9, interpolation: bicubic, lr_tta: 0, batch_size: 16}
wandb: {enable: 0}
"""


def write_split(folder, split, start, stop, *, names=WORDS, classes=None):
    """Write digits as a .beton file. Only those are taken whose class has a name."""
    digits = load_digits()
    for number in range(start, stop):
        name = names[digits.target[number]]
        if name is not None:
            path = folder / split / name / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = cv2.resize((digits.images[number] * 15.9).astype(np.uint8), (32, 32))
            assert cv2.imwrite(str(path), image)
    settings = WriteSettings(mode="raw")
    write(folder / split, folder / f"{split}.beton", settings, num_workers=1, classes=classes, notice=lambda line: None)
    return folder / f"{split}.beton"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_split(folder, "train", 0, 160)
    write_split(folder, "val", 200, 271)
    (folder / "recipe.yaml").write_text(RECIPE % {"data": folder})
    return folder


def run_main(folder, arguments, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *map(str, arguments)])
    try:
        train_imagenet.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of three epochs: the path of its best checkpoint, the record of that epoch, and its predictions."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(folder, ["--config-file", data / "recipe.yaml"], patch) == 0
    (best,) = folder.glob("checkpoints/test_resnet-epoch*")
    (jsonl,) = folder.glob("logs/*.jsonl")
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    record = max(records, key=lambda record: record["val/acc1"])
    assert record["val/acc1"] > 0.2
    return best, record, Predictions.read(jsonl.with_suffix(".predictions.npz"))


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Evaluate in an empty folder; return exit status and output."""

    def evaluate(*arguments):
        capsys.readouterr()
        status = run_main(tmp_path, ["--eval_only", "--num_workers=1", *arguments], monkeypatch)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out + err

    return evaluate


def results(record):
    return f"loss {record['val/loss']:.4f}, top-1 {record['val/acc1']:.3%}, top-5 {record['val/acc5']:.3%}"


def changed(checkpoint, folder, change):
    """Save a copy of a checkpoint after a change."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    save_atomically(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_a_checkpoint_needs_no_recipe_to_give_the_numbers_of_its_run(trained, evaluate):
    best, record, _ = trained
    status, output = evaluate("--resume", best)
    assert status == 0 and f"71 images, {results(record)}, as the run logged" in output
    step = f"after epoch {record['epoch']}, {record['epoch'] + 1} of 3 (step {record['step']})"
    assert f"evaluating the averaged weights in {best}, {step}" in output and "note: " not in output


def test_the_printed_line_builds_the_model_that_the_run_has_logged(trained, data, monkeypatch):
    best, record, _ = trained
    folder, names = best.parent.parent, {}
    (log,) = folder.glob("logs/*.log")
    monkeypatch.chdir(folder)
    exec(re.search(r"use weights +(.*)", log.read_text())[1], names)
    card, world = names["card"], World()
    file, recipe = read_beton(data / "val.beton"), read_recipe(["--config-file", str(data / "recipe.yaml")])
    settings = {"precision": card.precision, "flip": card.flip, "channels_last": card.channels_last}
    with build_val_loader(recipe, file, world, torch.float32) as loader:
        values = measure(names["model"], loader, world, num_samples=file.num_samples, **settings)
    assert values == {name: record[name] for name in values} and card.acc1 == record["val/acc1"]


def test_the_run_wins_over_files_and_says_so(trained, evaluate, tmp_path, data):
    best, record, _ = trained
    other = tmp_path / "other.yaml"
    other.write_text(
        "model: {arch: resnet18, num_classes: 7}\ntraining: {ema_decay: 0, use_blurpool: 0}\n"
        "validation: {resolution: 64, interpolation: bilinear, lr_tta: 1}\n"
    )
    status, output = evaluate("--config-file", other, "--resume", best)
    assert status == 0 and f"{results(record)}, as the run logged" in output
    (note,) = (line for line in output.splitlines() if line.startswith("note: "))
    for part in ("model.arch=test_resnet (not resnet18, ", "validation.resolution=32 (not 64", "use_blurpool=1 (not 0"):
        assert part in note
    assert "ema" not in note and str(other) in note


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--validation.resolution=24"], "the result may differ from that of .*: validation.resolution=24 .not 32."),
        (["--validation.lr_tta=1", "--validation.crop_ratio=1"], "crop_ratio=1 .not 0.9., |lr_tta=1 .not 0."),
        (
            ["--model.ema=0", "--epochs=9"],
            "does not use training.epochs of the command line$(.|\n)*evaluating the raw ",
        ),
        (["--training.use_blurpool=0"], "training.use_blurpool=0 .not 1."),
    ],
)
def test_the_command_line_wins_over_the_run_and_this_is_told(trained, evaluate, data, options, told):
    best, record, _ = trained
    status, output = evaluate("--config-file", data / "recipe.yaml", "--resume", best, *options)
    assert status == 0 and re.search(told, output, re.MULTILINE) and "the run logged" not in output
    assert results(record) not in output


def test_two_processes_evaluate_to_the_same_numbers(trained, tmp_path):
    best, record, _ = trained
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, ROOT / "train_imagenet.py", "--eval_only", "--resume", best]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count(f"71 images, {results(record)}, as the run logged") == 1


def test_a_checkpoint_from_within_an_epoch_is_told_as_such(trained, evaluate, tmp_path):
    best, _, _ = trained
    path = changed(best, tmp_path, lambda content: content["state"].update(epoch=1, samples=64, step=14))
    status, output = evaluate("--resume", path, "--report", "out.html")
    assert (
        status == 0 and "averaged weights in" in output and "within epoch 1, after 64 of its images (step 14)" in output
    )
    text = PageReader(tmp_path / "out.html").text
    assert "within epoch 1, after 64 of its images" in text and "after epoch" not in text


def test_averaged_weights_that_no_step_has_updated_are_told(trained, evaluate, tmp_path):
    status, output = evaluate("--resume", changed(trained[0], tmp_path, lambda content: content.update(ema_updates=0)))
    assert status == 0 and "the averaged weights, which no step has updated yet, in" in output


def spoil(part, suffix, value):
    """Return a change that sets one value of the first tensor of this part whose name ends so."""

    def change(content):
        name = next(name for name in content[part] if name.endswith(suffix))
        content[part][name][(0,) * content[part][name].ndim] = value

    return change


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (spoil("ema", "conv1.weight", float("nan")), [], "values that are not finite in 1: .*conv1.weight"),
        (spoil("ema", "running_mean", float("inf")), [], "values that are not finite in 1: .*running_mean"),
        (
            spoil("model", "fc.bias", -float("inf")),
            ["--model.ema=0"],
            "values that are not finite in 1: fc.bias",
        ),
        (spoil("ema", "running_var", -1.0), [], "negative variances in 1: .*running_var"),
        (lambda content: content.update(ema=None), ["--model.ema=1"], "has no averaged weights: pass --model.ema=0"),
        (lambda content: content["ema"].pop("fc.bias"), [], r"another model than the recipe's: 1 tensors \(fc.bias\)"),
    ],
)
def test_what_is_not_whole_is_refused(trained, evaluate, tmp_path, change, options, told):
    status, output = evaluate("--resume", changed(trained[0], tmp_path, change), *options)
    assert status == 2 and re.search(told, output) and len(output.strip().splitlines()) == 1


def test_bad_raw_weights_do_not_matter_if_the_average_is_whole(trained, evaluate, tmp_path):
    best, record, _ = trained
    path = changed(best, tmp_path, spoil("model", "conv1.weight", float("nan")))
    status, output = evaluate("--resume", path)
    assert status == 0 and results(record) in output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.num_classes=12"], r"another model than the recipe's: 2 tensors \(fc.weight, fc.bias\)"),
        (
            ["--model.arch=resnet18"],
            "pass the settings of its run: --model.arch=test_resnet --model.library=auto --model.num",
        ),
        (["--model.pretrained=1"], "training.resume=.* and model.pretrained=1 .command line. are both given"),
        (["--model.weights={best}"], "training.resume=.* and model.weights=.* are both given"),
        (
            ["-C", "resume.yaml", "--model.weights={best}"],
            "training.resume=auto .* and model.weights=.* are both given",
        ),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(trained, evaluate, tmp_path, options, told):
    best, _, _ = trained
    (tmp_path / "resume.yaml").write_text("training: {resume: auto}\n")
    resume = [] if "-C" in options else ["--resume", best]
    status, output = evaluate(*resume, *(option.format(best=best) for option in options))
    assert status == 2 and re.search(told, output) and len(output.strip().splitlines()) == 1


def test_settings_of_the_run_and_of_the_command_line_fit_together(trained, evaluate, tmp_path):
    path = changed(trained[0], tmp_path, lambda content: content["recipe"]["validation"].update(resize=40))
    status, output = evaluate("--resume", path, "--validation.resolution=48")
    assert status == 2
    assert "validation.resize=40 (the run that is evaluated) is smaller than validation.resolution=48" in output
    status, output = evaluate("--resume", path, "--validation.crop_ratio=0.5")
    assert status == 0 and "crop_ratio=0.5 (command line) has no effect without validation.resize=None" in output


def test_weights_of_a_file_s_recipe_give_way_to_the_checkpoint(trained, evaluate, tmp_path):
    best, record, _ = trained
    (tmp_path / "finetune.yaml").write_text(f"model: {{weights: {best}}}\n")
    status, output = evaluate("--config-file", "finetune.yaml", "--resume", best)
    assert status == 0 and results(record) in output and "is not evaluated, since training.resume names" in output


def test_exported_weights_bring_the_settings_and_the_classes_of_their_run(trained, evaluate, splits, data):
    best, record, _ = trained
    (weights,) = best.parent.glob("*-weights.*")
    status, output = evaluate(f"--model.weights={weights}", f"--data.val_dataset={data / 'val.beton'}")
    assert status == 0 and f"71 images, {results(record)}" in output
    assert f"the weights of {weights}, averaged, after epoch {record['epoch']} of train_" in output
    status, output = evaluate(f"--model.weights={weights}", f"--data.val_dataset={splits['other order']}")
    assert status == 0 and f"71 images, {results(record)}" in output and "labels are matched by name" in output
    status, output = evaluate(f"--model.weights={weights}", f"--data.val_dataset={splits['foreign']}")
    assert status == 2 and "deux, quatre" in output


def test_a_checkpoint_is_evaluated_alike_as_weights(trained, evaluate, data):
    best, record, _ = trained
    dataset = f"--data.val_dataset={data / 'val.beton'}"
    status, output = evaluate(f"--model.weights={best}", dataset)
    assert status == 0 and f"71 images, {results(record)}" in output
    status, output = evaluate(f"--model.weights={best}", dataset, "--model.ema=0")
    assert status == 0 and results(record) not in output


def test_a_head_of_another_size_is_not_evaluated(trained, evaluate, tmp_path, data):
    state = torch.load(trained[0], weights_only=True)["ema"]
    torch.save(state, tmp_path / "plain.pt")
    options = ["--model.weights=plain.pt", "--model.arch=test_resnet", f"--data.val_dataset={data / 'val.beton'}"]
    status, output = evaluate(*options)
    assert status == 2 and "has 10 classes, the model has 1,000, and the model has no names" in output
    status, output = evaluate(*options, "--model.num_classes=10")
    assert status == 0 and "are assumed to be those of the model in the same order: only the file has names" in output


def test_weights_without_names_are_given_those_of_a_text_file(trained, evaluate, tmp_path, data):
    best, record, _ = trained
    state, order = dict(torch.load(best, weights_only=True)["ema"]), [sorted(WORDS).index(name) for name in WORDS]
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][order]
    torch.save(state, tmp_path / "plain.pt")
    (tmp_path / "names.txt").write_text("\n".join(WORDS) + "\n")
    (weights,) = best.parent.glob("*-weights.*")
    names, dataset = "--model.class_names=names.txt", f"--data.val_dataset={data / 'val.beton'}"
    settings = ["--config-file", data / "recipe.yaml", "--model.num_classes=auto"]
    status, output = evaluate(*settings, "--model.weights=plain.pt", names)
    assert status == 0 and results(record) in output and "in another order: labels are matched by name" in output
    status, output = evaluate(*settings, "--model.weights=plain.pt", names, "--model.num_classes=9")
    assert status == 2 and "names 10 classes, not model.num_classes=9 (command line)" in output
    for source in (f"--model.weights={weights}", f"--resume={best}"):
        status, output = evaluate(source, names, dataset)
        assert status == 2 and "model.class_names=names.txt (command line): " in output
        assert "has the names of its classes itself" in output


def test_auto_evaluates_the_newest_checkpoint_and_never_untrained_weights(trained, evaluate, data):
    status, output = evaluate("--resume", "auto", f"--data.val_dataset={data / 'val.beton'}")
    assert status == 2 and "no checkpoint in checkpoints, so there is nothing to evaluate" in output
    folder = trained[0].parent.parent
    status, output = evaluate("--resume", "auto", f"--logging.folder={folder}")
    assert status == 0 and f"in {folder}/checkpoints/last.ckpt, after epoch 2, 3 of 3" in output


def test_the_plan_of_an_evaluation_is_that_of_the_evaluation(trained, evaluate, data):
    status, output = evaluate("--dry_run", "--resume", trained[0])
    assert status == 0 and "weights       the averaged weights in" in output
    assert "test_resnet, 10 classes, BlurPool" in output and "32 px, ratio 0.9, bicubic" in output
    assert f"{data}/val.beton" in output


@pytest.fixture(scope="module")
def splits(data, tmp_path_factory):
    """The validation images in other files: by classes in another order, some classes, and foreign ones."""
    folder = tmp_path_factory.mktemp("splits")
    even = [name if number % 2 == 0 else None for number, name in enumerate(WORDS)]
    foreign = [{"two": "deux", "four": "quatre"}.get(name, name) for name in WORDS]
    return {
        "other order": write_split(folder, "order", 200, 271, classes=WORDS),
        "some": write_split(folder, "some", 200, 271, names=even),
        "foreign": write_split(folder, "foreign", 200, 271, names=foreign),
    }


def test_a_file_in_another_order_gives_the_same_numbers(trained, evaluate, splits):
    best, record, _ = trained
    status, output = evaluate("--resume", best, f"--data.val_dataset={splits['other order']}", "--report", "out.html")
    assert status == 0 and f"71 images, {results(record)}" in output
    assert "in another order: labels are matched by name" in output and "has another digest" in output


def test_a_file_with_some_of_the_classes_is_evaluated_under_the_model_s_numbers(trained, evaluate, splits, tmp_path):
    best, _, whole = trained
    names = sorted(WORDS)
    even = np.isin(whole.labels, [names.index(WORDS[digit]) for digit in range(0, 10, 2)])
    dataset = f"--data.val_dataset={splits['some']}"
    status, output = evaluate("--resume", best, dataset, "--report", "out.html")
    correct = (whole.predicted == whole.labels)[even]
    assert (
        status == 0 and f"{even.sum()} images, loss {whole.loss[even].mean():.4f}, top-1 {correct.mean():.3%}" in output
    )
    assert "has 5 of the 10 classes of " in output
    text = PageReader(tmp_path / "out.html").text
    confused = {names[number] for number in whole.predicted[even & (whole.predicted != whole.labels)]}
    assert confused and all(name in text for name in confused)
    status, output = evaluate("--resume", best, dataset, "--validation.classes=only")
    only = float(re.search(r"top-1 ([\d.]+)%", output)[1]) / 100
    assert status == 0 and correct.mean() <= only <= 1


def test_a_file_with_foreign_classes_is_refused_with_their_names(trained, evaluate, splits):
    status, output = evaluate("--resume", trained[0], f"--data.val_dataset={splits['foreign']}")
    assert status == 2 and re.search("has 2 of 10 classes that .* does not have: deux, quatre", output)


def test_an_old_checkpoint_without_names_knows_those_of_its_own_validation_file(trained, evaluate, splits, tmp_path):
    best, record, _ = trained
    path = changed(best, tmp_path, lambda content: content.pop("classes"))
    status, output = evaluate("--resume", path)
    assert status == 0 and f"{results(record)}, as the run logged" in output and "assumed" not in output
    status, output = evaluate("--resume", path, f"--data.val_dataset={splits['some']}")
    assert status == 2 and "has 5 classes, " in output and "has no names to match them by" in output


def test_an_option_of_training_is_not_ignored_silently(trained, evaluate):
    best, record, _ = trained
    status, output = evaluate("--resume", best, "--training.ema_decay=0", "--batch_size=8")
    assert status == 0 and results(record) in output
    assert "does not use training.batch_size, training.ema_decay of the command line; --model.ema=0 evaluates" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.arch=resnet50", "--validation.lr_tta=0"], []),
        (["--model.arch=resnet50", "--validation.resize=256"], ["--validation.lr_tta=0"]),
        (["--model.arch=inception_v3", "--validation.lr_tta=0"], ["--validation.resolution=299"]),
        (
            ["--model.arch=vit_base_patch16_224", "--validation.lr_tta=0"],
            ["--validation.crop_ratio=0.9", "interpolation bicubic"],
        ),
    ],
)
def test_pretrained_weights_come_with_the_settings_of_their_accuracy(options, expected):
    recipe = read_recipe(["--eval_only", "--model.pretrained=1", *options])
    assert differences_from_published(recipe) == expected


def test_settings_with_values_are_checked_and_keep_their_history():
    recipe = read_recipe(["--lr", "0.3"])
    other = recipe.with_values({"lr.lr": 0.5, "augmentation.crop_scale": [0.2, 1]}, "a run")
    assert (other.lr.lr, other.augmentation.crop_scale, recipe.lr.lr) == (0.5, (0.2, 1.0), 0.3)
    assert other.source("lr.lr") == "a run" and other.overrides() == ["lr.lr: 0.3 (command line) -> 0.5 (a run)"]
    assert copy.copy(recipe).flat() == read_recipe(["--lr", "0.3"]).flat()
    with pytest.raises(UserError, match="a run: validation.interpolation must be one of bilinear, bicubic, not 'best'"):
        recipe.with_values({"validation.interpolation": "best"}, "a run")
