#!/usr/bin/env bash
# PyTorch 2.14.1: a program of AOTInductor takes images in channels_last, and classifies noise.
#
# The compiled code reads its input with the strides of the example that it was compiled with, and compares neither
# strides nor sizes nor the type. Only the number of dimensions is checked, since June 2026
# (https://github.com/pytorch/pytorch/pull/186898). The model and the exported program are right for both formats. So an
# accuracy in PyTorch does not tell that of the program: fast loaders, and uint8 images that were permuted, are in
# channels_last. Images of another size and doubles are also taken. Reported as
# https://github.com/pytorch/pytorch/issues/141115. ExecuTorch does the same
# (https://github.com/pytorch/executorch/issues/21837). ONNX Runtime, OpenVINO and OpenCV are right.
#
# AOTI_RUNTIME_CHECK_INPUTS=1 checks strides. But it also refuses batches that the program was exported for, and for
# which its results are right. It does not take the limits from torch.export, where the batch has none, but from the
# compiler, where the description of a convolution compares the batch of the example with 16. No report of this was
# found. Call contiguous() before the program.
#
# Expected: the accuracy of the model, or an error; with the check, no error for any batch in the contiguous format.
# Seen (a network for the digits; accuracies in percent):
#   contiguous: model 94, exported program 94, compiled 94
#   channels_last: model 94, exported program 94, compiled 14
#   float64: model 94, exported program 94, compiled 10
#   checked, example of 4 images: takes contiguous batches of 2 15, refuses 1 16 64 297, channels_last is refused
#   checked, example of 64 images: takes contiguous batches of 16 64 297, refuses 1 2 15, channels_last is refused
# It needs a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 scikit-learn==1.9.1
cd "$folder"
cat >compiled.py <<'PYTHON'
import os
import sys

import torch
from sklearn.datasets import load_digits

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 16
images, labels = torch.nn.functional.interpolate(images, (16, 16)), torch.tensor(digits.target)


def block(inputs, outputs):
    conv = torch.nn.Conv2d(inputs, outputs, 3, padding=1)
    return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU(), torch.nn.MaxPool2d(2))


model = torch.nn.Sequential(
    block(3, 16), block(16, 32), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(128, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(150):
    batch = torch.randint(0, 1500, (32,))
    torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
images, labels = images[1500:], labels[1500:]


def export(batch_size):
    """Return the exported and the compiled program, both for batches of any size."""
    exported = torch.export.export(
        model, (images[:batch_size],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{batch_size}.pt2")
    return exported.module(), torch._inductor.aoti_load_package(package)


def accuracy(classify, inputs):
    return 100 * (classify(inputs).argmax(1) == labels).float().mean().item()


def takes(compiled, inputs):
    """Return if the program takes these images. If it does, its logits must be right."""
    try:
        logits = compiled(inputs)
    except RuntimeError:
        return False
    torch.testing.assert_close(logits, model(inputs), rtol=0, atol=1e-4)
    return True


with torch.no_grad():
    if "AOTI_RUNTIME_CHECK_INPUTS" not in os.environ:
        exported, compiled = export(4)
        for what, inputs in {
            "contiguous": images,
            "channels_last": images.to(memory_format=torch.channels_last),
            "float64": images.double(),
        }.items():
            as_float = inputs.float()
            print(
                f"{what}: model {accuracy(model, as_float):.0f}, exported program {accuracy(exported, as_float):.0f}, "
                f"compiled {accuracy(compiled, inputs):.0f}"
            )
        sys.exit()
    for example in (4, 64):
        _, compiled = export(example)
        sizes = [1, 2, 15, 16, 64, len(images)]
        taken = [size for size in sizes if takes(compiled, images[:size])]
        channels_last = images[: taken[0]].to(memory_format=torch.channels_last)
        print(
            f"checked, example of {example} images: takes contiguous batches of {' '.join(map(str, taken))}, refuses",
            f"{' '.join(str(size) for size in sizes if size not in taken)}, channels_last is",
            "taken" if takes(compiled, channels_last) else "refused",
        )
PYTHON
python="$folder/venv/bin/python"
{ "$python" -W ignore compiled.py && AOTI_RUNTIME_CHECK_INPUTS=1 "$python" -W ignore compiled.py; } 2>errors |
    grep -E "^(contiguous|channels_last|float64|checked)" | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'EXPECTED'
contiguous: model 94, exported program 94, compiled 94
channels_last: model 94, exported program 94, compiled 14
float64: model 94, exported program 94, compiled 10
checked, example of 4 images: takes contiguous batches of 2 15, refuses 1 16 64 297, channels_last is refused
checked, example of 64 images: takes contiguous batches of 16 64 297, refuses 1 2 15, channels_last is refused
EXPECTED
