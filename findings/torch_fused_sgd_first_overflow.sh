#!/usr/bin/env bash
# PyTorch 2.14.1: if the first gradient of fused SGD overflows, its momentum is memory that nothing has written.
#
# A gradient scaler begins with a scale that is too large, so the first steps of float16 training are skipped. Fused
# optimizers skip them on the device. Fused SGD allocates its momentum in its first step as empty memory, which the first
# gradient is to fill. When that step is skipped, nothing fills it, but the next step takes it for a momentum. What was in
# that memory goes into the weights. With deterministic algorithms PyTorch fills empty memory with NaN, so all weights
# are NaN after the second step. SGD that is not fused, and the fused Adam, AdamW and Adagrad, begin with zeros or wait.
#
# Output seen (torch 2.14.1, on a CPU):
#   SGD, fused=False: weights after a skipped and a plain step -0.1
#   SGD, fused=True: weights after a skipped and a plain step nan
#   SGD, fused=True, momentum of zeros given before: weights after a skipped and a plain step -0.1
#   AdamW, fused=True: weights after a skipped and a plain step -0.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cd "$folder"
cat >overflow.py <<'PYTHON'
import torch

torch.use_deterministic_algorithms(True)


def train(name, fused, momentum_given=False, **options):
    weights = torch.nn.Parameter(torch.zeros(1000))
    optimizer = getattr(torch.optim, name)([weights], lr=0.1, fused=fused, **options)
    if momentum_given:
        optimizer.state[weights]["momentum_buffer"] = torch.zeros_like(weights)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for largest in (1e38, 1.0):  # the scale makes an infinity of the first gradient
        gradient = torch.ones(1000)
        gradient[0] = largest
        scaler.scale((weights * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    given = ", momentum of zeros given before" * momentum_given
    print(f"{name}, fused={fused}{given}: weights after a skipped and a plain step {weights[1].item():.4g}")


train("SGD", False, momentum=0.9)
train("SGD", True, momentum=0.9)
train("SGD", True, momentum=0.9, momentum_given=True)
train("AdamW", True, weight_decay=0.0)
PYTHON
"$folder/venv/bin/python" overflow.py | tee seen
diff seen - <<'EXPECTED'
SGD, fused=False: weights after a skipped and a plain step -0.1
SGD, fused=True: weights after a skipped and a plain step nan
SGD, fused=True, momentum of zeros given before: weights after a skipped and a plain step -0.1
AdamW, fused=True: weights after a skipped and a plain step -0.1
EXPECTED
