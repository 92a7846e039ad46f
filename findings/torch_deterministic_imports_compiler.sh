#!/usr/bin/env bash
# PyTorch 2.14.1: torch.use_deterministic_algorithms imports Inductor and Dynamo, even to switch the setting off.
#
# The function passes the setting on to torch._inductor.config, and imports that module for it. Importing it loads the
# whole compiler: about 890 modules, two to three seconds on a slow core, in every process of a run. A trainer that calls
# the function with False, to be sure, pays for it. torch.are_deterministic_algorithms_enabled() imports nothing.
#
# Output seen (torch 2.14.1):
#   after import torch: inductor False, dynamo False, sympy False
#   after are_deterministic_algorithms_enabled(): inductor False, dynamo False, sympy False
#   after use_deterministic_algorithms(False): inductor True, dynamo True, sympy True
#   modules added: more than 800
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >modules.py <<'PYTHON'
import sys

import torch


def show(after: str) -> int:
    names = {"inductor": "torch._inductor.config", "dynamo": "torch._dynamo.symbolic_convert", "sympy": "sympy"}
    print(f"after {after}: " + ", ".join(f"{name} {module in sys.modules}" for name, module in names.items()))
    return len(sys.modules)


show("import torch")
assert not torch.are_deterministic_algorithms_enabled()
before = show("are_deterministic_algorithms_enabled()")
torch.use_deterministic_algorithms(False)
added = show("use_deterministic_algorithms(False)") - before
print("modules added:", "more than 800" if added > 800 else added)
PYTHON
"$folder/venv/bin/python" modules.py | tee seen
diff seen - <<'EXPECTED'
after import torch: inductor False, dynamo False, sympy False
after are_deterministic_algorithms_enabled(): inductor False, dynamo False, sympy False
after use_deterministic_algorithms(False): inductor True, dynamo True, sympy True
modules added: more than 800
EXPECTED
