#!/usr/bin/env bash
# accelerate 1.15.0: with gradient accumulation, a learning rate schedule of the documented length stops at its beginning.
#
# The documentation of AcceleratedScheduler says: "When performing gradient accumulation scheduler lengths should not be
# changed accordingly, Accelerate will always step the scheduler to account for it." It does not. A prepared scheduler
# moves once for each step of the optimizer, whatever the accumulation is. So a schedule that was made for the number of
# batches is passed to a share only, 1/4 with an accumulation of 4. A cosine ends at 85 % of its peak in place of 0, and
# a one-cycle schedule ends in its rise. No error tells it, and more processes hide it: with 4 of them, each step moves
# the scheduler 4 times.
#
# adjust_scheduler of GradientAccumulationPlugin, "Whether to adjust the scheduler steps to account for the number of
# steps being accumulated", does not change this. Its default, True, gets lost (pull request 4262, open), and the code
# behind it would only move a counter, not the learning rate. Make the schedule for the steps of the optimizer.
#
# Expected: the last learning rate is about 0 with every accumulation.
# Seen (peak 1, two epochs of 64 batches; the last learning rate):
#   accumulation 1: cosine 0.000, one cycle 0.000
#   accumulation 4: cosine 0.854, one cycle 0.951
#   accumulation 4, adjust_scheduler=True: cosine 0.854, one cycle 0.951
#   accumulation 4, adjust_scheduler=False: cosine 0.854, one cycle 0.951
#   accumulation 4, schedules for 32 steps: cosine 0.000, one cycle 0.005
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 accelerate==1.15.0
cd "$folder"
cat >schedule.py <<'PYTHON'
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

NUM_BATCHES, EPOCHS = 64, 2


def last_lr(build_schedule, length, **options):
    accelerator = Accelerator(cpu=True, **options)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data = torch.utils.data.TensorDataset(torch.randn(NUM_BATCHES, 2), torch.randn(NUM_BATCHES, 1))
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(data), build_schedule(optimizer, length)
    )
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return scheduler.get_last_lr()[0]


def show(what, length=NUM_BATCHES * EPOCHS, **options):
    cosine = last_lr(CosineAnnealingLR, length, **options)
    cycle = last_lr(lambda optimizer, length: OneCycleLR(optimizer, 1.0, length), length, **options)
    print(f"{what}: cosine {cosine:.3f}, one cycle {cycle:.3f}")


show("accumulation 1")
show("accumulation 4", gradient_accumulation_steps=4)
for adjust in (True, False):
    plugin = GradientAccumulationPlugin(num_steps=4, adjust_scheduler=adjust)
    show(f"accumulation 4, adjust_scheduler={adjust}", gradient_accumulation_plugin=plugin)
show("accumulation 4, schedules for 32 steps", length=32, gradient_accumulation_steps=4)
PYTHON
"$folder/venv/bin/python" -W ignore schedule.py 2>errors | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
accumulation 1: cosine 0.000, one cycle 0.000
accumulation 4: cosine 0.854, one cycle 0.951
accumulation 4, adjust_scheduler=True: cosine 0.854, one cycle 0.951
accumulation 4, adjust_scheduler=False: cosine 0.854, one cycle 0.951
accumulation 4, schedules for 32 steps: cosine 0.000, one cycle 0.005
EXPECTED
