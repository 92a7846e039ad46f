#!/usr/bin/env bash
# PyTorch 2.14.1: a compiled model cannot train under DistributedDataParallel with buckets of less than 1 MiB.
#
# bucket_cap_mb takes fractions, and plain models train with them. torch.compile splits the graph of a model at the
# buckets, expects the first one to be of 1 MiB whatever was asked for, and ends with a failed assertion. Small buckets
# are what small networks need for an exchange of gradients beside the backward pass.
#
# Output seen (torch 2.14.1, one process with gloo):
#   plain, bucket_cap_mb=0.5: trains
#   compiled, bucket_cap_mb=1: trains
#   compiled, bucket_cap_mb=0.5: AssertionError: First bucket should be smaller/equal to other buckets
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >buckets.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for name, bucket_cap_mb in (("plain", 0.5), ("compiled", 1), ("compiled", 0.5)):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    if name == "compiled":
        model = torch.compile(model, backend="aot_eager")
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    try:
        wrapped(torch.randn(4, 64)).sum().backward()
        result = "trains"
    except AssertionError as error:
        result = f"AssertionError: {str(error).partition(' to get')[0]}"
    print(f"{name}, bucket_cap_mb={bucket_cap_mb}: {result}")
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" buckets.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'EXPECTED'
plain, bucket_cap_mb=0.5: trains
compiled, bucket_cap_mb=1: trains
compiled, bucket_cap_mb=0.5: AssertionError: First bucket should be smaller/equal to other buckets
EXPECTED
