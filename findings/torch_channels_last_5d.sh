#!/usr/bin/env bash
# torch 2.14.1: `model.to(memory_format=torch.channels_last)` refuses a model with a 5-D weight, and half converts it.
#
# The documentation says: "the desired memory format for 4D parameters and buffers in this module". The code converts
# 5-D tensors too, also to the format for four dimensions, and that raises. The layers before the first 5-D tensor are
# converted already. A model of 2-D and 3-D convolutions, such as timm's lambda_resnet26t, can take neither of the two
# formats. Known since 2022 as https://github.com/pytorch/pytorch/issues/77821. Convert each tensor by its dimensions.
#
# Output seen:
#   documented for: 4D parameters and buffers
#   channels_last: RuntimeError: required rank 4 tensor to use channels_last format
#   channels_last: converted [True, False, False]
#   channels_last_3d: RuntimeError: required rank 5 tensor to use channels_last_3d format
#   channels_last_3d: converted [False, False, False]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cd "$folder"
cat >formats.py <<'PYTHON'
import torch
from torch import nn

documentation = " ".join(nn.Module.to.__doc__.split())
print("documented for:", documentation.partition("the desired memory format for ")[2].partition(" in this module")[0])
for name in "channels_last", "channels_last_3d":
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Conv2d(3, 4, 3))
    try:
        model.to(memory_format=getattr(torch, name))
    except RuntimeError as error:
        print(f"{name}: RuntimeError: {error}")
    print(f"{name}: converted", [not layer.weight.is_contiguous() for layer in model])
PYTHON
"$folder/venv/bin/python" formats.py | tee seen
diff seen - <<'EXPECTED'
documented for: 4D parameters and buffers
channels_last: RuntimeError: required rank 4 tensor to use channels_last format
channels_last: converted [True, False, False]
channels_last_3d: RuntimeError: required rank 5 tensor to use channels_last_3d format
channels_last_3d: converted [False, False, False]
EXPECTED
