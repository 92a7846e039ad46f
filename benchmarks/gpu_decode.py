"""Decoding on the GPU against ours on the CPU: the same crops of one epoch, ready on the device.

    python benchmarks/gpu_decode.py --file train.beton [--size 224] [--batch_size 256] [--batches 50] [--rounds 3]

``ours`` decodes the region under each crop on the CPU and copies 8-bit crops to the device. ``device`` copies the
JPEGs, decodes them whole with ``torchvision.io.decode_jpeg(device="cuda")`` (nvJPEG, which takes the hardware engines
of a GPU that has them), crops, and resizes there with antialiasing. Both run in the same loader with the same draws.
They take turns; prints machine, versions, the medians and their ratio. The product decodes on the CPU until this shows
a win.
Without a GPU ``device`` is the CPU as well, which only shows that the script works.
"""

import argparse
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_jpeg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ffcv_ops import Label, Loader, OrderOption, RandomResizedCrop, read_beton  # noqa: E402
from ffcv_ops.beton.layout import MODE_JPG  # noqa: E402

# isort: split
# behind ffcv_ops, which makes ffcv importable
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.transforms import ToDevice, ToTensor  # noqa: E402


class DeviceCrop(RandomResizedCrop):
    """`RandomResizedCrop` with torchvision's decoder on a device: gives uint8 tensors (N, size, size, 3) there."""

    def __init__(self, file: Path, size: int, device: torch.device):
        super().__init__(size)
        table = read_beton(file).alloc_table
        self.sizes = dict(zip(table["ptr"].tolist(), table["size"].tolist(), strict=True))
        self.data, self.device = np.fromfile(file, np.uint8), device

    def declare_state_and_memory(self, previous_state: Any) -> Any:
        shape = (self.size, self.size, 3)
        state = replace(previous_state, jit_mode=False, shape=shape, dtype=torch.uint8, device=self.device)
        return state, AllocationQuery(shape, torch.uint8, self.device)

    def _decode(self, sample_ids: np.ndarray, destination: Any, field_metadata: np.ndarray, batch: Any) -> Any:
        fields = field_metadata[sample_ids]
        if (fields["mode"] != MODE_JPG).any():
            raise ValueError("the file holds raw images: write one with --write_mode jpg")
        heights, widths = fields["height"].astype(np.int64), fields["width"].astype(np.int64)
        boxes, flips = np.empty((len(fields), 4)), np.zeros(len(fields), np.bool_)
        self._draw_into(batch, heights, widths, boxes, flips)
        jpegs = [torch.from_numpy(self.data[ptr : ptr + self.sizes[ptr]]) for ptr in fields["data_ptr"].tolist()]
        images = decode_jpeg(jpegs, ImageReadMode.RGB, device=self.device)
        for i, (top, left, height, width) in enumerate(boxes.round().astype(int).tolist()):
            crop = images[i][None, :, top : top + max(height, 1), left : left + max(width, 1)].float()
            crop = F.interpolate(crop, (self.size, self.size), mode="bilinear", antialias=True)
            crop = crop.flip(3) if flips[i] else crop
            destination[i] = crop[0].round().clamp(0, 255).permute(1, 2, 0)
        return destination


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="a .beton file of JPEGs")
    parser.add_argument("--size", type=int, default=224, help="px (224)")
    parser.add_argument("--batch_size", type=int, default=256, help="(256)")
    parser.add_argument("--batches", type=int, default=50, help="of a pass, the first not timed (50)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each (3)")
    parser.add_argument("--num_workers", type=int, default=-1, help="threads of the loader (all CPUs)")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    to_device = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    pipelines: dict[str, list[Any]] = {
        "ours": [RandomResizedCrop(options.size), ToTensor(), *to_device],
        "device": [DeviceCrop(options.file, options.size, device)],
    }
    loaders = {
        name: Loader(
            options.file,
            options.batch_size,
            options.num_workers,
            order=OrderOption.RANDOM,
            seed=0,
            pipelines={"image": pipeline, "label": [Label()]},
        )
        for name, pipeline in pipelines.items()
    }
    num_batches = min(options.batches, *map(len, loaders.values()))
    if num_batches < 2:
        raise SystemExit(f"error: {options.file} has fewer than two batches of {options.batch_size}")

    def run_pass(loader: Loader, epoch: int) -> tuple[float, torch.Tensor]:
        batches = loader.epoch(epoch)
        first = next(batches)[0].float().cpu()
        start_s = time.perf_counter()
        for _ in range(num_batches - 1):
            next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        images_per_s = (num_batches - 1) * options.batch_size / (time.perf_counter() - start_s)
        batches.close()
        return images_per_s, first

    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    firsts: dict[str, torch.Tensor] = {}
    for epoch in range(options.rounds):
        for name, loader in loaders.items():
            speed, firsts[name] = run_pass(loader, epoch)
            speeds[name].append(speed)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "ffcv", "numba"))
    print(f"{machine}; {platform.machine()}, {loaders['ours'].num_workers} threads, {versions}")
    print(f"command: {' '.join(sys.argv)}")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    difference = (firsts["ours"] - firsts["device"]).abs().mean().item()
    print(f"the crops differ by {difference:.2f} of 255 in the mean")
    print(f"ours {medians['ours']:,.0f} images/s, device {medians['device']:,.0f} images/s, ", end="")
    print(f"device / ours {medians['device'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main()
