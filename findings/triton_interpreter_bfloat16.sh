#!/usr/bin/env bash
# Triton 3.8.0: TRITON_INTERPRET=1 cuts float32 off to bfloat16; the same kernel rounds to nearest when it is compiled.
#
# The interpreter is the way to test a kernel without a GPU, and its documentation warns of operations on bfloat16. The
# conversion at the end of a kernel that computes in float32 is also another one: half of all values differ in their last
# place, always towards zero. So a test that compares a kernel with PyTorch to the bit must do so for float16 or float32.
# float16 is rounded as on a GPU.
#
# Output seen (torch 2.14.1, triton 3.8.0):
#   float16: as PyTorch 100 %
#   bfloat16: as PyTorch 50 %, as cutting off 100 %
#   compiled for sm_90: rounds to nearest True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 triton==3.8.0 numpy==2.4.6
cd "$folder"
cat >kernel.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def convert(source, target, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


if sys.argv[1] == "interpreted":
    values = torch.linspace(1, 2, 256)
    for dtype in (torch.float16, torch.bfloat16):
        result = torch.empty(256, dtype=dtype)
        convert[(1,)](values, result, 256)
        rounded = (result == values.to(dtype)).float().mean().item()
        line = f"{str(dtype).removeprefix('torch.')}: as PyTorch {rounded:.0%}"
        if dtype == torch.bfloat16:
            cut = (values.view(torch.int32) & -65536).view(torch.float32).to(dtype)
            line += f", as cutting off {(result == cut).float().mean().item():.0%}"
        print(line.replace("%", " %"))
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"source": "*fp32", "target": "*bf16", "size": "constexpr"}
    code = triton.compile(ASTSource(convert, signature, {"size": 256}), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print("compiled for sm_90: rounds to nearest", "cvt.rn.bf16" in code)
PYTHON
(TRITON_INTERPRET=1 "$folder/venv/bin/python" kernel.py interpreted && "$folder/venv/bin/python" kernel.py compiled) | tee seen
diff seen - <<'EXPECTED'
float16: as PyTorch 100 %
bfloat16: as PyTorch 50 %, as cutting off 100 %
compiled for sm_90: rounds to nearest True
EXPECTED
