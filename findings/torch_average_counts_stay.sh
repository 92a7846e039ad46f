#!/usr/bin/env bash
# PyTorch 2.14.1: in a moving average with use_buffers=True, the number of batches of a batch norm never moves.
#
# AveragedModel averages the buffers as it averages the weights. The running mean and variance are floats and follow the
# model. The count of batches is an integer: 0.999 * 1 + 0.001 * 2 is cut off to 1 again, in every update. So the average
# says that it has seen one batch. A batch norm with momentum=None weights each batch by this count. If training goes on
# from the average, the first batch makes up half of its statistics.
#
# Output seen (torch 2.14.1, 300 updates with a decay of 0.999):
#   get_ema_avg_fn: model 300 batches, average 1
#   get_ema_multi_avg_fn: model 300 batches, average 1
#   after one batch of another kind: running mean of the model 0.0, of the average 5.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >average.py <<'PYTHON'
import torch
from torch import nn
from torch.optim import swa_utils

torch.manual_seed(0)
for name, key in (("get_ema_avg_fn", "avg_fn"), ("get_ema_multi_avg_fn", "multi_avg_fn")):
    model = nn.BatchNorm1d(4, momentum=None)
    average = swa_utils.AveragedModel(model, use_buffers=True, **{key: getattr(swa_utils, name)(0.999)})
    for _ in range(300):
        model(torch.randn(64, 4))
        average.update_parameters(model)
    counts = model.num_batches_tracked.item(), average.module.num_batches_tracked.item()
    print(f"{name}: model {counts[0]} batches, average {counts[1]}")
batch = torch.randn(64, 4) + 10
means = []
for norm in (model, average.module):
    norm(batch)
    means.append(norm.running_mean.mean().item())
print(f"after one batch of another kind: running mean of the model {means[0]:.1f}, of the average {means[1]:.1f}")
PYTHON
"$folder/venv/bin/python" average.py | tee seen
diff seen - <<'EXPECTED'
get_ema_avg_fn: model 300 batches, average 1
get_ema_multi_avg_fn: model 300 batches, average 1
after one batch of another kind: running mean of the model 0.0, of the average 5.0
EXPECTED
