#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors and metadata, saved twice, are two different files.
#
# The tensors have a fixed order. The metadata comes from a hash map with a random seed, so its keys are shuffled in
# every call. With two keys half of the files differ, with twelve nearly all. Digests of weights therefore tell nothing
# about their equality, and stores that keep one copy of equal files keep all. A single key, or none, is safe.
#
# Output seen (safetensors 0.8.0, numpy 2.4.6):
#   0 keys of metadata: 1 content in 200 files
#   1 keys of metadata: 1 content in 200 files
#   2 keys of metadata: 2 contents in 200 files
#   12 keys of metadata: more than 100 contents in 200 files
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
cat >order.py <<'PYTHON'
import numpy as np
from safetensors.numpy import save

tensors = {"weight": np.arange(12.0, dtype=np.float32), "bias": np.zeros(3, np.float32)}
for num_keys in (0, 1, 2, 12):
    metadata = {f"key{number}": str(number) for number in range(num_keys)} or None
    found = len({save(tensors, metadata) for _ in range(200)})
    shown = {1: "1 content", 2: "2 contents"}.get(found, "more than 100 contents" if found > 100 else f"{found} contents")
    print(f"{num_keys} keys of metadata: {shown} in 200 files")
PYTHON
"$folder/venv/bin/python" order.py | tee seen
diff seen - <<'EXPECTED'
0 keys of metadata: 1 content in 200 files
1 keys of metadata: 1 content in 200 files
2 keys of metadata: 2 contents in 200 files
12 keys of metadata: more than 100 contents in 200 files
EXPECTED
