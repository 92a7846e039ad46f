#!/usr/bin/env bash
# transformers 5.24.0: Trainer multiplies the gradient of a ResNet by the number of processes, and of accumulated batches.
#
# Trainer leaves it to the model to divide a loss by all images of a step, if the forward method takes **kwargs. It then
# multiplies this loss by the number of processes (average_tokens_across_devices, on by default), and does not divide it
# by the number of accumulated batches. But of the 46 classes for image classification, 35 take **kwargs and, by their
# source, do not use the number of images, among them ResNet, RegNet, BiT, EfficientNet and MobileNet. On 8 GPUs, the
# gradient of such a model is 8 times that of the mean loss, and with an accumulation of 4, 32 times. So are the loss in
# the logs, the learning rate of SGD, and the norm that max_grad_norm clips. AdamW, the default optimizer, hides most of
# it.
#
# ViT, Swin and others do divide, but only for labels that are numbers of classes. Dense targets, as Mixup and CutMix
# give, take another way to the loss, which ignores the number of images. There these models have the same factor.
#
# For accumulation and numbers of classes, known since July 2026: https://github.com/huggingface/transformers/issues/47688.
# For processes and dense targets, no report about image classification was found. Set `accepts_loss_kwargs = False` on
# the model, as ConvNeXt's class does. A module of your own whose forward has no **kwargs is not concerned.
#
# Expected: all images are alike, so a step of SGD has the same length, and the loss in the logs is the same.
# Seen (length of the step and loss, relative to one process without accumulation):
#   ResNet, numbers of classes, 1 process, accumulation 4: step 4.0, loss 4.0
#   ResNet, numbers of classes, 2 processes, accumulation 1: step 2.0, loss 2.0
#   ResNet, numbers of classes, 2 processes, accumulation 4: step 8.0, loss 8.0
#   ViT, numbers of classes, 2 processes, accumulation 4: step 1.0, loss 1.0
#   ViT, dense targets, 2 processes, accumulation 1: step 2.0, loss 2.0
#   ViT, dense targets, 2 processes, accumulation 4: step 8.0, loss 8.0
#   ResNet with accepts_loss_kwargs = False, numbers of classes, 2 processes, accumulation 4: step 1.0, loss 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 transformers==5.24.0 \
    accelerate==1.15.0
cd "$folder"
cat >train.py <<'PYTHON'
import contextlib
import io
import json
import os
import sys

import torch
from transformers import (
    ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification,
)

torch.set_num_threads(1)
IMAGE = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))


class Images(torch.utils.data.Dataset):
    def __init__(self, label):
        self.label = label

    def __len__(self):
        return 64

    def __getitem__(self, number):
        return {"pixel_values": IMAGE, "labels": self.label}


def build(name):
    torch.manual_seed(0)
    if name == "ViT":
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=8, hidden_dropout_prob=0, num_labels=5,
        )
        return ViTForImageClassification(config)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config)
    if name.endswith("False"):
        model.accepts_loss_kwargs = False
    return model


def step(name, label, accumulation):
    model = build(name)
    before = torch.cat([part.detach().flatten().clone() for part in model.parameters()])
    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, optim="sgd",
        learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, use_cpu=True,
        disable_tqdm=True, report_to=[], save_strategy="no", log_level="error",
    )
    trainer = Trainer(model, arguments, train_dataset=Images(label))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    after = torch.cat([part.detach().flatten() for part in model.parameters()])
    return (after - before).norm().item(), trainer.state.log_history[0]["loss"]


results = {}
for name in ("ResNet", "ViT", "ResNet with accepts_loss_kwargs = False"):
    for what, label in (("numbers of classes", 1), ("dense targets", torch.tensor([0.7, 0.3, 0, 0, 0]))):
        for accumulation in (1, 4):
            results[f"{name}, {what}, {accumulation}"] = step(name, label, accumulation)
if os.environ.get("RANK", "0") == "0":
    json.dump(results, open(sys.argv[1], "w"))
PYTHON
cat >show.py <<'PYTHON'
import json

one, two = json.load(open("one.json")), json.load(open("two.json"))
for name, what, processes, accumulation in (
    ("ResNet", "numbers of classes", 1, 4),
    ("ResNet", "numbers of classes", 2, 1),
    ("ResNet", "numbers of classes", 2, 4),
    ("ViT", "numbers of classes", 2, 4),
    ("ViT", "dense targets", 2, 1),
    ("ViT", "dense targets", 2, 4),
    ("ResNet with accepts_loss_kwargs = False", "numbers of classes", 2, 4),
):
    step, loss = (one if processes == 1 else two)[f"{name}, {what}, {accumulation}"]
    start, start_loss = one[f"{name}, {what}, 1"]
    noun = "process" if processes == 1 else "processes"
    text = f"step {step / start:.1f}, loss {loss / start_loss:.1f}"
    print(f"{name}, {what}, {processes} {noun}, accumulation {accumulation}: {text}")
PYTHON
"$folder/venv/bin/python" -W ignore train.py one.json 2>errors || { cat errors >&2; exit 1; }
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --nproc_per_node=2 train.py two.json 2>errors || { cat errors >&2; exit 1; }
"$folder/venv/bin/python" show.py | tee seen
diff seen - <<'EXPECTED'
ResNet, numbers of classes, 1 process, accumulation 4: step 4.0, loss 4.0
ResNet, numbers of classes, 2 processes, accumulation 1: step 2.0, loss 2.0
ResNet, numbers of classes, 2 processes, accumulation 4: step 8.0, loss 8.0
ViT, numbers of classes, 2 processes, accumulation 4: step 1.0, loss 1.0
ViT, dense targets, 2 processes, accumulation 1: step 2.0, loss 2.0
ViT, dense targets, 2 processes, accumulation 4: step 8.0, loss 8.0
ResNet with accepts_loss_kwargs = False, numbers of classes, 2 processes, accumulation 4: step 1.0, loss 1.0
EXPECTED
