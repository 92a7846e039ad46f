#!/usr/bin/env bash
# PyTorch 2.14.1: a compiled model computes with the gradient that a custom operation had in an earlier process.
#
# torch.compile keeps what it has compiled in a cache on disk. The key has the name of a custom operation, and the code of
# Triton kernels, but not the Python function that register_autograd was given, nor that of an operation that PyTorch
# takes apart (CompositeImplicitAutograd). After a change of such a function, the same script runs with the old one. There
# is no message, and the results are those of the old version until the cache is removed. Operations without
# torch.compile have the new gradient. A name that contains a digest of the source avoids this.
#
# Output seen (torch 2.14.1; the same in 2.11.0), the gradient of two versions of one operation:
#   custom_op, version 2: plain 2, compiled 2
#   custom_op, version 3: plain 3, compiled 2
#   composite, version 2: plain 2, compiled 2
#   composite, version 3: plain 3, compiled 2
#   custom_op, version 3, cache removed: plain 3, compiled 3
set -euo pipefail
command -v c++ >/dev/null || { echo "a C++ compiler is needed"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >gradient.py <<'PYTHON'
import sys

import torch

kind, version = sys.argv[1], int(sys.argv[2])
if kind == "custom_op":

    @torch.library.custom_op("example::operation", mutates_args=())
    def operation(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    operation.register_fake(torch.empty_like)
    operation.register_autograd(lambda ctx, gradient: version * gradient)
else:
    library = torch.library.Library("example", "DEF")
    library.define("operation(Tensor x) -> Tensor")
    library.impl("operation", lambda x: version * x, "CompositeImplicitAutograd")
    operation = torch.ops.example.operation


def loss(x):
    return operation(x).sum()


gradients = []
for function in (loss, torch.compile(loss)):
    x = torch.ones(4, requires_grad=True)
    function(x).backward()
    gradients.append(int(x.grad[0]))
print(f"{kind}, version {version}{', cache removed' * (len(sys.argv) > 3)}: plain {gradients[0]}, compiled {gradients[1]}")
PYTHON
export TORCHINDUCTOR_CACHE_DIR=$folder/cache
for kind in custom_op composite; do
    for version in 2 3; do
        "$folder/venv/bin/python" gradient.py $kind $version 2>errors || { cat errors; exit 1; }
    done
done | tee seen
rm -r "$folder/cache"
"$folder/venv/bin/python" gradient.py custom_op 3 removed 2>errors | tee -a seen
diff seen - <<'EXPECTED'
custom_op, version 2: plain 2, compiled 2
custom_op, version 3: plain 3, compiled 2
composite, version 2: plain 2, compiled 2
composite, version 3: plain 3, compiled 2
custom_op, version 3, cache removed: plain 3, compiled 3
EXPECTED
