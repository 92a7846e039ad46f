#!/usr/bin/env bash
# OpenVINO 2026.4.1 and OpenCV 5.0.0: both ignore the antialiasing of an ONNX Resize, without a message.
#
# torch.onnx.export writes interpolate(..., antialias=True) as Resize with antialias=1, which ONNX has since opset 18.
# So the preprocessing of a classifier can be a part of its file. ONNX Runtime gives the values of PyTorch. OpenVINO and
# OpenCV give those that PyTorch computes without antialiasing: the same for bilinear, and for bicubic those of another
# cubic. OpenVINO's converter of PyTorch models keeps the filter. So one module, on one device, gives two results.
#
# For OpenVINO and cubic, known since May 2026: https://github.com/openvinotoolkit/openvino/issues/35893. For linear,
# and for OpenCV, no report was found. TensorRT refuses the file (https://github.com/NVIDIA/TensorRT/issues/3560).
#
# Seen with 300 ImageNet images of about 500 px, resized to 224 px, bicubic, for EfficientNet-Lite0 in PyTorch: without
# antialiasing, 10 predictions are others. The accuracy is no guard against it: 88.3 % with, 88.7 % without.
#
# Output seen (torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2; a photograph of 640 x 427, mean difference in grey levels):
#   bilinear, ONNX Runtime: 0.0 to PyTorch with antialiasing, 1.5 to PyTorch without
#   bilinear, OpenVINO: 1.5 to PyTorch with antialiasing, 0.0 to PyTorch without
#   bilinear, OpenCV: 1.5 to PyTorch with antialiasing, 0.0 to PyTorch without
#   bilinear, OpenVINO, not through ONNX: 0.0 to PyTorch with antialiasing, 1.5 to PyTorch without
#   bicubic, ONNX Runtime: 0.0 to PyTorch with antialiasing, 1.8 to PyTorch without
#   bicubic, OpenVINO: 1.6 to PyTorch with antialiasing, 0.2 to PyTorch without
#   bicubic, OpenCV: 1.6 to PyTorch with antialiasing, 0.2 to PyTorch without
#   bicubic, OpenVINO, not through ONNX: 0.0 to PyTorch with antialiasing, 1.8 to PyTorch without
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 \
    onnxruntime==1.32.0 openvino==2026.4.1 opencv-python-headless==5.0.0.93 scikit-learn==1.9.1 pillow==13.0.0
cd "$folder"
cat >resize.py <<'PYTHON'
import cv2
import onnxruntime
import openvino
import torch
from sklearn.datasets import load_sample_image

photograph = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None].float()


class Resize(torch.nn.Module):
    def __init__(self, mode, antialias):
        super().__init__()
        self.options = {"mode": mode, "antialias": antialias}

    def forward(self, images):
        return torch.nn.functional.interpolate(images, size=(224, 224), **self.options)


def opencv(array):
    network = cv2.dnn.readNetFromONNX("resize.onnx")
    network.setInput(array)
    return network.forward()


for mode in ("bilinear", "bicubic"):
    smooth, plain = (Resize(mode, antialias) for antialias in (True, False))
    program = torch.onnx.export(smooth, (photograph,), dynamo=True, input_names=["images"], verbose=False)
    program.save("resize.onnx")
    converted = openvino.convert_model(smooth, example_input=photograph)
    array = photograph.numpy()
    found = {
        "ONNX Runtime": onnxruntime.InferenceSession("resize.onnx").run(None, {"images": array})[0],
        "OpenVINO": openvino.compile_model("resize.onnx", "CPU")([array])[0],
        "OpenCV": opencv(array),
        "OpenVINO, not through ONNX": openvino.compile_model(converted, "CPU")([array])[0],
    }
    for name, values in found.items():
        to_smooth, to_plain = ((torch.tensor(values) - module(photograph)).abs().mean() for module in (smooth, plain))
        print(f"{mode}, {name}: {to_smooth:.1f} to PyTorch with antialiasing, {to_plain:.1f} to PyTorch without")
PYTHON
"$folder/venv/bin/python" -W ignore resize.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'EXPECTED'
bilinear, ONNX Runtime: 0.0 to PyTorch with antialiasing, 1.5 to PyTorch without
bilinear, OpenVINO: 1.5 to PyTorch with antialiasing, 0.0 to PyTorch without
bilinear, OpenCV: 1.5 to PyTorch with antialiasing, 0.0 to PyTorch without
bilinear, OpenVINO, not through ONNX: 0.0 to PyTorch with antialiasing, 1.5 to PyTorch without
bicubic, ONNX Runtime: 0.0 to PyTorch with antialiasing, 1.8 to PyTorch without
bicubic, OpenVINO: 1.6 to PyTorch with antialiasing, 0.2 to PyTorch without
bicubic, OpenCV: 1.6 to PyTorch with antialiasing, 0.2 to PyTorch without
bicubic, OpenVINO, not through ONNX: 0.0 to PyTorch with antialiasing, 1.8 to PyTorch without
EXPECTED
