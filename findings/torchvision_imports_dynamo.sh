#!/usr/bin/env bash
# torchvision 0.29.1: `import torchvision` imports all of torch._dynamo, and with it SymPy, torch.export and FSDP.
#
# torchvision.ops.roi_align decorates a function so that Dynamo is loaded only when the function is called. The same file
# takes a helper from torch._dynamo.utils when it is imported, and importing that module loads the whole package. Every
# model of torchvision.models pays for it at the start of every process: nearly as many modules as `import torch` itself loads.
#
# Output seen (torch 2.14.1):
#   after import torch: dynamo False, sympy False, fsdp False
#   after import torchvision: dynamo True, sympy True, fsdp True
#   torchvision adds more than 800 modules: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
cd "$folder"
cat >modules.py <<'PYTHON'
import sys


def show(after: str) -> int:
    names = {"dynamo": "torch._dynamo.symbolic_convert", "sympy": "sympy", "fsdp": "torch.distributed.fsdp"}
    print(f"after {after}: " + ", ".join(f"{name} {module in sys.modules}" for name, module in names.items()))
    return len(sys.modules)


import torch

before = show("import torch")
import torchvision

after = show("import torchvision")
print("torchvision adds more than 800 modules:", after - before > 800)
print(f"({before} modules, then {after})", file=sys.stderr)
PYTHON
"$folder/venv/bin/python" modules.py | tee seen
diff seen - <<'EXPECTED'
after import torch: dynamo False, sympy False, fsdp False
after import torchvision: dynamo True, sympy True, fsdp True
torchvision adds more than 800 modules: True
EXPECTED
