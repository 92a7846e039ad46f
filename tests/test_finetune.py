"""A short fine-tuning run on digits, from weights of a file whose head has other classes."""

import sys

import pytest
import torch
from betons import write_digits

import train_imagenet
from imagenet_training import load_model
from imagenet_training.data.loaders import planned_data, settle_num_classes
from imagenet_training.models.architectures import build_model
from imagenet_training.planning.recipe import read_recipe

pytestmark = pytest.mark.slow


def test_only_the_head_of_given_weights_trains_on_the_classes_of_the_data(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path, num_train=64, num_val=16)
    torch.manual_seed(0)
    before = build_model("test_resnet", num_classes=1000).state_dict()
    torch.save(before, tmp_path / "weights.pt")
    argv = [
        f"--config-file={train_imagenet.__file__.replace('train_imagenet.py', 'rn50_configs/finetune.yaml')}",
        "--model.arch=test_resnet", f"--model.weights={tmp_path}/weights.pt", "--model.freeze=body",
        "--training.layer_decay=None", "--training.class_weights=auto", "--training.ema_decay=0.5",
        f"--data.train_dataset={tmp_path}/train.beton", f"--data.val_dataset={tmp_path}/val.beton",
        "--resolution.min_res=32", "--resolution.max_res=32", "--validation.resolution=32", "--batch_size=16",
        "--epochs=1", "--lr.warmup_epochs=0", "--num_workers=1", "--no_wandb", f"--logging.folder={tmp_path}/run",
    ]  # fmt: skip
    recipe = settle_num_classes(read_recipe(argv))
    assert recipe.model.num_classes == 10 and recipe.source("model.num_classes") == f"{tmp_path}/train.beton"
    assert planned_data(recipe).class_counts.sum() == 64
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *argv])
    train_imagenet.main()
    out = capsys.readouterr().out
    assert "only the head trains" in out and "images weighted by class" in out
    assert "fc.weight, fc.bias start from small random values" in out
    model, card = load_model(tmp_path / "run/checkpoints/test_resnet-weights.safetensors")
    after = model.state_dict()
    assert card.model["num_classes"] == 10 and len(card.classes) == 10
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"fc.weight", "fc.bias"}
    assert "Best classes" in (tmp_path / "run/report.html").read_text()
