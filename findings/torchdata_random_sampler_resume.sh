#!/usr/bin/env bash
# torchdata 0.11.0: StatefulDataLoader with PyTorch's RandomSampler resumes in another order, and sees a quarter twice.
#
# The README says: "If you are using the default RandomSampler and BatchSampler in torch.utils.data they are patched when
# you import torchdata.stateful_dataloader". They are not. Only shuffle=True builds the sampler that keeps its state.
# Another sampler starts again, as in epoch 0, and is moved forward by the number of samples that were seen. After a
# resume in the middle of a later epoch, a quarter of the samples comes a second time, and as many never come. If the
# sampler has no generator, as PyTorch's documentation builds it, this also happens in epoch 0. There is no message, and
# the length of the epoch is right.
#
# A maintainer recommends this sampler for a random order that depends on the seed:
# https://github.com/meta-pytorch/data/issues/1440. No report of the wrong order was found. SubsetRandomSampler, for a
# part of a dataset, does the same. Pass shuffle=True with a generator, or RandomSampler of
# torchdata.stateful_dataloader.sampler. DistributedSampler with set_epoch is also right.
#
# Expected: each of 1,000 samples once, in the part before the resume and the part after it together.
# Seen (a resume after 50 of 100 batches, in a new loader):
#   shuffle=True, epoch 0: 0 % twice, 0 % never
#   shuffle=True, epoch 1: 0 % twice, 0 % never
#   torchdata's RandomSampler, epoch 1: 0 % twice, 0 % never
#   PyTorch's RandomSampler, epoch 0: 0 % twice, 0 % never
#   PyTorch's RandomSampler, epoch 1: 26 % twice, 26 % never
#   PyTorch's RandomSampler without generator, epoch 0: 25 % twice, 25 % never
#   PyTorch's SubsetRandomSampler, epoch 1: 24 % twice, 24 % never
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 torchdata==0.11.0
cd "$folder"
cat >resume.py <<'PYTHON'
import collections

import torch
import torchdata.stateful_dataloader.sampler as torchdata_samplers
from torch.utils.data import RandomSampler, SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

SAMPLES, BATCHES_BEFORE = range(1000), 50


def build(what):
    generator = torch.Generator().manual_seed(0)
    if what == "shuffle=True":
        return StatefulDataLoader(SAMPLES, 10, shuffle=True, generator=generator)
    sampler = {
        "torchdata's RandomSampler": lambda: torchdata_samplers.RandomSampler(SAMPLES, generator=generator),
        "PyTorch's RandomSampler": lambda: RandomSampler(SAMPLES, generator=generator),
        "PyTorch's RandomSampler without generator": lambda: RandomSampler(SAMPLES),
        "PyTorch's SubsetRandomSampler": lambda: SubsetRandomSampler(SAMPLES, generator=generator),
    }[what]()
    return StatefulDataLoader(SAMPLES, 10, sampler=sampler)


for what, epoch in (
    ("shuffle=True", 0),
    ("shuffle=True", 1),
    ("torchdata's RandomSampler", 1),
    ("PyTorch's RandomSampler", 0),
    ("PyTorch's RandomSampler", 1),
    ("PyTorch's RandomSampler without generator", 0),
    ("PyTorch's SubsetRandomSampler", 1),
):
    torch.manual_seed(0)
    loader = build(what)
    for _ in range(epoch):
        list(loader)
    batches = iter(loader)
    seen = [next(batches) for _ in range(BATCHES_BEFORE)]
    state = loader.state_dict()
    torch.manual_seed(1)
    loader = build(what)
    loader.load_state_dict(state)
    seen += list(loader)
    assert len(seen) == 100
    counts = collections.Counter(torch.cat(seen).tolist())
    twice, never = sum(count > 1 for count in counts.values()), len(SAMPLES) - len(counts)
    print(f"{what}, epoch {epoch}: {twice / 10:.0f} % twice, {never / 10:.0f} % never")
PYTHON
"$folder/venv/bin/python" -W ignore resume.py 2>errors | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
shuffle=True, epoch 0: 0 % twice, 0 % never
shuffle=True, epoch 1: 0 % twice, 0 % never
torchdata's RandomSampler, epoch 1: 0 % twice, 0 % never
PyTorch's RandomSampler, epoch 0: 0 % twice, 0 % never
PyTorch's RandomSampler, epoch 1: 26 % twice, 26 % never
PyTorch's RandomSampler without generator, epoch 0: 25 % twice, 25 % never
PyTorch's SubsetRandomSampler, epoch 1: 24 % twice, 24 % never
EXPECTED
