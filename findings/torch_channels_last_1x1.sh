#!/usr/bin/env bash
# PyTorch 2.14.1: contiguous(memory_format=channels_last) leaves weights of 1 x 1 as they are; to() changes their strides.
#
# A tensor (N, C, 1, 1) is contiguous in both formats, whatever the strides of its sides of 1 are. So contiguous() returns
# it unchanged, and a check with is_contiguous() tells no difference. Module.to(memory_format=...) uses to(), which does
# change the strides. A network that was converted weight by weight with contiguous() trains with the same results, but
# its gradients come with the other strides, and DistributedDataParallel then copies them and warns.
#
# Output seen (torch 2.14.1):
#   as built (64, 1, 1, 1), contiguous() (64, 1, 1, 1), to() (64, 1, 64, 64)
#   is_contiguous in channels_last: True True True
#   converted by contiguous(): DistributedDataParallel warns of strides True
#   converted by to(): DistributedDataParallel warns of strides False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >strides.py <<'PYTHON'
import warnings

import torch
import torch.distributed as dist
from torch import nn

form = torch.channels_last
built = torch.randn(128, 64, 1, 1)
tensors = {"as built": built, "contiguous()": built.contiguous(memory_format=form), "to()": built.to(memory_format=form)}
print(", ".join(f"{name} {tensor.stride()}" for name, tensor in tensors.items()))
print("is_contiguous in channels_last:", *(tensor.is_contiguous(memory_format=form) for tensor in tensors.values()))

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for name in ("contiguous()", "to()"):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 1))
    for weight in model.parameters():
        if weight.ndim == 4:
            change = weight.data.contiguous if name == "contiguous()" else weight.data.to
            weight.data = change(memory_format=form)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            wrapped(torch.randn(2, 3, 8, 8).contiguous(memory_format=form)).sum().backward()
    warned = any("strides" in str(warning.message) for warning in seen)
    print(f"converted by {name}: DistributedDataParallel warns of strides", warned)
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" strides.py | tee seen
diff seen - <<'EXPECTED'
as built (64, 1, 1, 1), contiguous() (64, 1, 1, 1), to() (64, 1, 64, 64)
is_contiguous in channels_last: True True True
converted by contiguous(): DistributedDataParallel warns of strides True
converted by to(): DistributedDataParallel warns of strides False
EXPECTED
