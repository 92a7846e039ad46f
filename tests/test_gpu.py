"""What only a CUDA device shows. Skipped where there is none."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from betons import photographs, write_images
from ffcv.transforms import ToDevice, ToTensor
from reference import PIXEL_MEAN, PIXEL_STD

import train_imagenet
from ffcv_ops import Label, Loader, Mix, Normalize, OrderOption, RandomResizedCrop
from imagenet_training.data.loaders import build_loaders
from imagenet_training.distributed import World
from imagenet_training.models.precision import allow_tf32
from imagenet_training.models.stem import replace_stem
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.reports.logs import RunLog
from imagenet_training.state import TrainState
from imagenet_training.training.epoch import train_epoch
from imagenet_training.training.meters import EtaEstimator, PredictionRecorder
from imagenet_training.training.preemption import PREEMPTED, StopRequest
from imagenet_training.training.step_mode import prepare_step

ROOT = Path(__file__).parent.parent
NUM_CLASSES = 4
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "photographs.beton"
    return write_images(path, photographs(96), labels=[number % NUM_CLASSES for number in range(96)])


def copied(values):
    # The loader writes over a batch later, and on the CPU .cpu() and .float() return the batch itself.
    return values.to("cpu", torch.float32, copy=True)


def batches(path, device, dtype):
    """Two epochs of mixed batches, made as the trainer makes them, copied to the CPU."""
    mix = Mix(NUM_CLASSES, mixup_alpha=0.2, cutmix_alpha=1.0, smoothing=0.1)
    to_device = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    image = [RandomResizedCrop(48), ToTensor(), *to_device, Normalize(PIXEL_MEAN, PIXEL_STD, dtype)]
    pipelines = {"image": [*image, mix.images()], "label": [Label(), *to_device, mix.targets()]}
    with Loader(path, 16, num_workers=2, order=OrderOption.RANDOM, seed=3, pipelines=pipelines) as loader:
        return [(copied(x), copied(y)) for epoch in range(2) for x, y in loader.epoch(epoch)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_batches_on_the_device_are_those_of_the_cpu(beton, dtype, tolerance):
    ours = batches(beton, torch.device("cuda", 0), dtype)
    theirs = batches(beton, torch.device("cpu"), torch.float32)
    assert len(ours) == len(theirs) == 12
    for (images, targets), (cpu_images, cpu_targets) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(images, cpu_images, atol=tolerance, rtol=0)
        torch.testing.assert_close(targets, cpu_targets, atol=1e-6, rtol=0)


def train(folder, beton, *arguments, status=0):
    command = [sys.executable, ROOT / "train_imagenet.py", "--no_wandb", "--model.arch=resnet18"]
    command += [
        f"--model.num_classes={NUM_CLASSES}",
        "--batch_size",
        "16",
        "--validation.resolution=64",
        "--lr",
        "0.01",
    ]
    command += [f"--data.train_dataset={beton}", f"--data.val_dataset={beton}", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32"])
def test_a_run_and_its_resumption(beton, tmp_path, precision):
    options = ["--precision", precision, "--training.ema_decay=0.9", "--training.grad_clip=1"]
    train(tmp_path, beton, *options, "--epochs", "4")
    first = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (first["scaler"].get("scale", 0) > 0) == (precision == "16-mixed")
    output = train(tmp_path, beton, *options, "--epochs", "5", "--resume", "checkpoints/last.ckpt")
    assert "resuming at epoch 4" in output
    (records,) = tmp_path.glob("logs/*.jsonl")
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(0 < row["val/loss"] < 10 and 0 <= row["data_wait"] <= 1 for row in rows)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_deterministic_runs_end_with_the_same_bits_recorded_or_not(beton, tmp_path):
    weights = []
    for mode in ("0", "graph", "graph"):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        train(folder, beton, "--training.deterministic=1", f"--training.compile={mode}", "--epochs=3", "--lr.lr=0.1")
        weights.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["model"])
    for others in weights[1:]:
        assert all(torch.equal(value, others[name]) for name, value in weights[0].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_max_pooling_is_that_of_pytorch(dtype):
    from imagenet_training.models.max_pool import max_pool

    torch.manual_seed(0)
    images = (torch.randn(6, 24, 20, 36, device="cuda", dtype=dtype) * 4).round() / 4  # many are equal
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    expected, (result, _) = F.max_pool2d(images, 3, stride=2, padding=1), max_pool(images)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, images, gradient)[0] for out in (result, expected))
    assert torch.equal(result, expected)
    torch.testing.assert_close(ours, theirs)


def test_a_compiled_stem_computes_what_the_plain_one_computes():
    torch.manual_seed(0)
    plain = torchvision.models.resnet50(num_classes=NUM_CLASSES).cuda().to(memory_format=torch.channels_last)
    stem = torch.nn.Sequential(plain.conv1, plain.bn1, plain.relu, plain.maxpool)
    ours = copy.deepcopy(stem)
    replace_stem(ours)
    images = torch.randn(8, 3, 96, 96, device="cuda").contiguous(memory_format=torch.channels_last)
    allow_tf32(False)
    results = []
    for module in (stem, torch.compile(ours)):
        out = module(images)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in module.parameters())])
    allow_tf32(True)
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


class Guarded:
    """A loader that lets nothing wait for the device while its batches 3 to 7 are trained on, and ends long after."""

    def __init__(self, loader):
        self.loader = loader

    @property
    def storage_wait_s(self):
        return self.loader.storage_wait_s

    def epoch(self, epoch, *, skip_samples=0):
        for number, batch in enumerate(self.loader.epoch(epoch, skip_samples=skip_samples)):
            torch.cuda.set_sync_debug_mode("error" if 3 <= number < 8 else "default")
            yield batch


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("16-mixed", []),
        ("16-mixed", ["--training.optimizer=adamw", "--training.grad_clip=1", "--training.accumulation=2"]),
        ("bf16-mixed", ["--training.optimizer=lamb", "--training.loss=bce", "--training.agc=0.01"]),
        ("32", ["--training.use_blurpool=1", "--training.compile=1"]),
        ("16-mixed", ["--training.compile=graph", "--training.grad_clip=1", "--training.accumulation=2"]),
        ("bf16-mixed", ["--training.compile=compiled-graph"]),
    ],
)
def test_steps_wait_for_nothing(beton, tmp_path, precision, options):
    settings = ["--model.arch=resnet18", f"--model.num_classes={NUM_CLASSES}", "--batch_size=6", "--epochs=1"]
    settings += [f"--data.train_dataset={beton}", f"--data.val_dataset={beton}", f"--logging.folder={tmp_path}"]
    settings += ["--resolution.min_res=64", "--resolution.max_res=64", "--lr.lr_peak_epoch=0", "--lr=0.01"]
    settings += ["--augmentation.mixup_alpha=0.2", "--augmentation.cutmix_alpha=1.0", "--training.ema_decay=0.9"]
    recipe = read_recipe([*settings, f"--precision={precision}", *options])
    run = train_imagenet.build(recipe, *train_imagenet.join_run(recipe))
    loader = build_loaders(recipe, run.plan, run.data, run.world).train
    log = RunLog(tmp_path, True, eta=EtaEstimator([64], run.plan.steps_per_epoch))
    modes = {"1": "compiled", "graph": "graph", "compiled-graph": "compiled-graph"}
    (wanted,) = {option.partition("compile=")[2] for option in options if "compile=" in option} or {"0"}
    assert prepare_step(run.trainer, 6, 64, log) == modes.get(wanted, "eager")
    doing_nothing = {"stop": StopRequest(run.world), "save": lambda state: None}
    try:
        values = train_epoch(run.trainer, Guarded(loader), TrainState(), run.plan, log, **doing_nothing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 <= values["data_wait"] <= 1
    assert 0 < values["gpu_peak_allocated_bytes"] <= values["gpu_peak_reserved_bytes"]


def test_out_of_memory_names_the_batch_size_to_try(beton, tmp_path):
    sizes = ["--batch_size", "64", "--resolution.min_res=2048", "--resolution.max_res=2048"]
    output = train(tmp_path, beton, "--model.arch=vgg16_bn", *sizes, status=1)
    assert "out of GPU memory at a batch size of 64" in output and "--batch_size 32" in output


def test_ranks_with_gpus_agree_to_stop_without_the_host_waiting():
    """Over NCCL with one rank that takes itself for one of two, so that it asks."""
    device = torch.device("cuda", 0)
    world = World(world_size=2, device=device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with StopRequest(world) as stop:
            assert not stop.agreed(now=True)
            spin = torch.ones(8192, 8192, device=device)
            for _ in range(200):
                spin = spin @ spin
            started_s = time.monotonic()
            assert not stop.agreed()
            assert not torch.cuda.current_stream().query() and time.monotonic() - started_s < 0.1
            os.kill(os.getpid(), signal.SIGUSR1)
            end_s = time.monotonic() + 10
            while not stop.agreed():
                assert time.monotonic() < end_s
        assert stop.exit_status == PREEMPTED
    finally:
        dist.destroy_process_group()


def test_what_is_taken_down_of_samples_makes_no_batch_wait_for_the_device():
    device = torch.device("cuda", 0)
    samples = PredictionRecorder(device, np.arange(64)[::-1].copy(), 64)
    logits, labels = torch.randn(64, 10, device=device), torch.arange(64, device=device) % 10
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in (0, 32):
            samples.add(logits[start : start + 32], labels[start : start + 32])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(samples.gather()[:, 1], logits.flip(0).argmax(1).cpu())
