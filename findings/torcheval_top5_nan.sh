#!/usr/bin/env bash
# torcheval 0.0.7: the top-5 accuracy of a network whose logits are all NaN is 100 %.
#
# MulticlassAccuracy(k=5) and HitRate(k=5) count the logits that are greater than that of the right class. If there are
# fewer than five, the prediction is right. No number is greater than NaN, and none than itself, so a network that has
# diverged, or that gives the same logit for all classes, is always right. A search, or the choice of the best
# checkpoint, by this number then takes the run that has failed. With k=1 it is as expected: the class is that of the
# first largest logit. The documentation does not say what happens to equal logits.
#
# Equal logits also occur where the network is sound. A logit in bfloat16 has 8 significant bits, and one of an int8
# network is one of 256 values. Then the top-5 accuracy is too high, here by up to 0.7 %. torchmetrics takes five
# classes, and no more. No report was found. Use torchmetrics, or torch.topk.
#
# Expected: the top-5 accuracies of torchmetrics, which are those of torch.topk.
# Seen (20,000 samples of 1,000 classes; torchmetrics 1.9.0):
#   NaN: torcheval top-1 0.1, top-5 100.0, hit rate 100.0; torchmetrics top-5 0.5
#   zeros: torcheval top-1 0.1, top-5 100.0, hit rate 100.0; torchmetrics top-5 0.5
#   float32: torcheval top-1 59.5, top-5 81.3, hit rate 81.3; torchmetrics top-5 81.3
#   bfloat16: torcheval top-1 59.5, top-5 81.4, hit rate 81.4; torchmetrics top-5 81.2
#   int8: torcheval top-1 59.6, top-5 81.9, hit rate 81.9; torchmetrics top-5 81.2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 torcheval==0.0.7 \
    torchmetrics==1.9.0
cd "$folder"
cat >top5.py <<'PYTHON'
import torch
import torcheval.metrics
import torchmetrics.classification

NUM_CLASSES = 1000
generator = torch.Generator().manual_seed(0)
labels = torch.randint(0, NUM_CLASSES, (20_000,), generator=generator)
logits = torch.randn(len(labels), NUM_CLASSES, generator=generator)
logits[torch.arange(len(labels)), labels] += 3.5


def percent(metric, values):
    metric.update(values, labels)
    return 100 * metric.compute().double().mean().item()


step = (logits.max() - logits.min()) / 255
for what, values in {
    "NaN": torch.full_like(logits, float("nan")),
    "zeros": torch.zeros_like(logits),
    "float32": logits,
    "bfloat16": logits.bfloat16(),
    "int8": (logits / step).round() * step,
}.items():
    top1, top5 = (percent(torcheval.metrics.MulticlassAccuracy(k=k), values) for k in (1, 5))
    hits = percent(torcheval.metrics.HitRate(k=5), values)
    other = torchmetrics.classification.MulticlassAccuracy(NUM_CLASSES, top_k=5, average="micro")
    print(
        f"{what}: torcheval top-1 {top1:.1f}, top-5 {top5:.1f}, hit rate {hits:.1f}; "
        f"torchmetrics top-5 {percent(other, values):.1f}"
    )
PYTHON
"$folder/venv/bin/python" -W ignore top5.py 2>errors | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
NaN: torcheval top-1 0.1, top-5 100.0, hit rate 100.0; torchmetrics top-5 0.5
zeros: torcheval top-1 0.1, top-5 100.0, hit rate 100.0; torchmetrics top-5 0.5
float32: torcheval top-1 59.5, top-5 81.3, hit rate 81.3; torchmetrics top-5 81.3
bfloat16: torcheval top-1 59.5, top-5 81.4, hit rate 81.4; torchmetrics top-5 81.2
int8: torcheval top-1 59.6, top-5 81.9, hit rate 81.9; torchmetrics top-5 81.2
EXPECTED
