#!/usr/bin/env bash
# PyTorch 2.14.1: a call of an operation of torch.library.custom_op costs three times that of one of torch.library.Library.
#
# Both call the same Python function. custom_op adds a layer for autograd, and checks of aliases and versions, in Python.
# The difference, about 20 microseconds on a slow core, counts where an operation is called a hundred times in a step: a
# compiled ResNet-50 with 106 such operations ran at 5,540 images/s on an H200, because the host could not keep up, and at
# 7,450 with operations of Library (PyTorch 2.11, batches of 256, bfloat16).
#
# Output seen (torch 2.14.1):
#   custom_op costs more than twice as much as Library: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >dispatch.py <<'PYTHON'
import statistics
import sys
import time

import torch

schema = "(Tensor x, int size) -> Tensor"


def function(x, size):
    return x.new_empty((2, size))


torch.library.custom_op("example::one", function, mutates_args=(), schema=schema)
library = torch.library.Library("example", "FRAGMENT")
library.define(f"two{schema}")
library.impl("two", function, "CPU")
x = torch.zeros(4)
times = {"custom_op": [], "Library": []}
with torch.no_grad():
    for _ in range(21):
        for name, operation in zip(times, (torch.ops.example.one.default, torch.ops.example.two.default)):
            start = time.perf_counter()
            for _ in range(500):
                operation(x, 8)
            times[name].append((time.perf_counter() - start) / 500)
medians = {name: statistics.median(values) for name, values in times.items()}
print({name: f"{1e6 * value:.1f} us" for name, value in medians.items()}, file=sys.stderr)
print("custom_op costs more than twice as much as Library:", medians["custom_op"] > 2 * medians["Library"])
PYTHON
"$folder/venv/bin/python" dispatch.py | tee seen
diff seen - <<'EXPECTED'
custom_op costs more than twice as much as Library: True
EXPECTED
