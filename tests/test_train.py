"""The training script as its user runs it: whole runs, killed runs, several processes, mistakes."""

import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from betons import write_digits
from browsers import PageReader, needs_chromium, screenshot
from reference import PIXEL_MEAN, PIXEL_STD
from safetensors.torch import load_file
from terminals import run_on_terminal, screen
from wandb.proto import wandb_internal_pb2

import train_imagenet
from ffcv_ops import lock, read_beton
from ffcv_ops.writing.writer import write
from imagenet_training.data.loaders import build_random_crop, build_train_loader, open_train_file
from imagenet_training.distributed import start
from imagenet_training.models import architectures as model
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.reports.predictions import Predictions
from imagenet_training.reports.report import NUM_MISTAKES_SHOWN
from imagenet_training.run.provenance import differences
from imagenet_training.state import TrainState

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NUM_TRAIN, NUM_VAL = 130, 37  # neither divides into batches of 16 on two ranks
RECIPE = """
model: {arch: resnet18, num_classes: 10}
resolution: {min_res: 24, max_res: 32, start_ramp: 0, end_ramp: 1}
data: {train_dataset: %(data)s/train.beton, val_dataset: %(data)s/val.beton, num_workers: 2}
augmentation: {crop_scale: [0.5, 1], flip: 0, mixup_alpha: 0.2, cutmix_alpha: 1.0}
lr: {lr_schedule_type: cosine, base_lr: 0.4, warmup_epochs: 1}
training: {batch_size: 16, epochs: 3, bn_wd: 0, use_blurpool: 1, ema_decay: 0.9, precision: "32"}
validation: {resolution: 32, crop_ratio: 1, batch_size: 16}
logging: {log_every: 2}
expected: {val_acc1: {2: 10, 3: 20}}
"""


def run_script(*arguments, folder, launcher=(sys.executable,), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        environment.pop(name, None)
    command = [*launcher, str(ROOT / "train_imagenet.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def finish(process, status=0):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Handwritten digits as JPEGs, written by the script that users run."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return folder


@pytest.fixture(scope="module")
def recipe(data):
    path = data / "recipe.yaml"
    path.write_text(RECIPE % {"data": data})
    return path


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    """An undisturbed run of three epochs, recorded by W&B offline; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    output = finish(run_script("--config-file", recipe, "--wandb_project", "digits", folder=folder))
    return folder, output


def read_wandb(folder):
    """The protobuf records of an offline W&B run: a log of 32 KiB blocks behind a header of 7 bytes."""
    (path,) = folder.glob("logs/wandb/offline-run-*/run-*.wandb")
    data, records, payload, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        payload += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(payload))
            payload = b""
    return records


def test_a_run_leaves_its_log_record_curve_and_checkpoints(whole_run):
    folder, output = whole_run
    (log,), (jsonl,), (png,) = (list(folder.glob(f"logs/train_*{suffix}")) for suffix in (".log", ".jsonl", ".png"))
    resolved = re.compile(r"# resolved recipe\n(?:\w+:\n(?:  .*\n)+)+")
    assert resolved.sub("", log.read_text()) == output, "the console is one screen, the log file has the whole recipe"
    assert resolved.search(log.read_text()) and not resolved.search(output)
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert [record["resolution"] for record in records] == [24, 32, 32]
    for record in records:
        for name in ("train/loss", "train/acc1", "train/acc5", "val/loss", "val/acc1", "val/acc5", "lr"):
            assert np.isfinite(record[name]), name
        assert 0 < record["data_wait"] < 1 and record["step_s"] > 0
    assert records[0]["remaining_s"] > records[1]["remaining_s"] > records[2]["remaining_s"] == 0
    assert cv2.imread(str(png)).std() > 0
    best = max(records, key=lambda record: record["val/acc1"])
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {
        "last.ckpt",
        "resnet18-weights.safetensors",
        f"resnet18-epoch={best['epoch']:02d}-val_acc1={best['val/acc1']:.4f}.ckpt",
    }
    assert "0.4 x 16 / 256 = 0.025" in output
    assert re.search(r"^epoch 0 .* expected val top-1 10 % after 2 epochs$", output, re.MULTILINE)
    difference = 100 * records[2]["val/acc1"] - 20
    assert re.search(rf"^epoch 2 .* expected val top-1 20.0 % \({difference:+.1f}\)$", output, re.MULTILINE)


def test_the_report_is_of_the_run(whole_run):
    folder, output = whole_run
    page = PageReader(folder / "report.html")
    (jsonl,) = folder.glob("logs/train_*.jsonl")
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    best = max(records, key=lambda record: record["val/acc1"])
    predictions = Predictions.read(jsonl.with_suffix(".predictions.npz"))
    assert predictions.epoch == best["epoch"]
    assert np.mean(predictions.predicted == predictions.labels) == pytest.approx(best["val/acc1"])
    assert predictions.loss.mean() == pytest.approx(best["val/loss"], rel=1e-5)
    text = page.text
    assert f"{100 * best['val/acc1']:.2f} % best top-1, epoch {best['epoch']}" in text
    assert "3 of 3 epochs finished" in text and "the run is complete" in text
    for part in ("Loss", "Top-1", "Top-5", "Learning rate", "Images per second", "Share of the time", "val, expected"):
        assert part in text, part
    assert re.search(r"wandb.project imagenet digits command line", text), "what differs from the recipe's file"
    assert version("torch") in text and str(folder / "checkpoints") not in text and "checkpoints/last.ckpt" in text
    num_mistakes = int((predictions.predicted != predictions.labels).sum())
    assert page.num_images == min(num_mistakes, NUM_MISTAKES_SHOWN) > 0
    assert "25.56 M" not in output and "11.18 M parameters; " in output
    assert "expected from the first steps, at 24 px" in output


@needs_chromium
def test_the_report_opens_in_a_browser_light_and_dark(whole_run, tmp_path):
    light, dark = (screenshot(whole_run[0] / "report.html", tmp_path, *o) for o in ((), ("--force-dark-mode",)))
    assert light[-1, 0].min() > 200 and dark[-1, 0].max() < 60


def test_a_checkpoint_tells_what_made_it(whole_run, data):
    content = torch.load(whole_run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["recipe"]["lr"]["base_lr"] == 0.4
    assert RECIPE % {"data": data} in content["recipe_files"].values()
    assert content["data"]["train"]["num_samples"] == NUM_TRAIN and content["data"]["train"]["digest"]
    assert content["versions"]["torch"] == version("torch")
    assert content["state"]["epoch"] == 3


def test_exported_weights_are_the_architecture_s_own(whole_run):
    state = load_file(whole_run[0] / "checkpoints" / "resnet18-weights.safetensors")
    torchvision.models.resnet18(num_classes=10).load_state_dict(state)


def test_wandb_offline_history_holds_the_metrics(whole_run):
    folder, output = whole_run
    assert "recorded offline" in output
    records = read_wandb(folder)
    (run,) = {record.run.project for record in records if record.HasField("run")}
    assert run == "digits"
    config = {u.key: json.loads(u.value_json) for r in records if r.HasField("run") for u in r.run.config.update}
    assert config["recipe"]["training"]["epochs"] == 3
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    epochs = [row for row in rows if "val/acc1" in row]
    assert [row["epoch"] for row in epochs] == [0, 1, 2]
    positions = [row["position"] for row in rows if "position" in row]
    assert positions == sorted(positions) and positions[0] == 2 / 8 and positions[-1] == 3, "in epochs"
    names = {"train/loss", "train/acc1", "train/acc5", "val/loss", "val/acc1", "val/acc5", "lr", "images_per_s"}
    assert all(names <= row.keys() for row in epochs)


def test_a_full_disk_ends_the_run_with_its_reason(recipe, tmp_path):
    def limit():  # a file of 20 MB is the largest there is room for; a checkpoint takes more
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    output = finish(run_script("--config-file", recipe, "--no_wandb", folder=tmp_path, preexec_fn=limit), 1)
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert re.search(r"checkpoints/.+ could not be written \(File too large\); .* Put that right", line)
    assert "Traceback" not in output and list((tmp_path / "checkpoints").iterdir()) == []


def test_killed_and_resumed_equals_undisturbed(recipe, whole_run, tmp_path):
    process = run_script("--config-file", recipe, "--no_wandb", "--training.save_every_steps=3", folder=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1  step 6/8"):  # past the save at step 12, which waits for that at step 9
            process.send_signal(signal.SIGKILL)
            break
    finish(process, -signal.SIGKILL)
    last = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)["state"]
    assert 9 <= state["step"] < 24 and state["step"] == 8 * state["epoch"] + state["samples"] / 16
    output = finish(run_script("--config-file", recipe, "--no_wandb", "--resume", last, folder=tmp_path))
    assert f"resuming at {TrainState(**state)}" in output
    ours, theirs = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (tmp_path, whole_run[0]))
    for part in ("model", "ema"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name
    (jsonl,) = tmp_path.glob("logs/train_*.jsonl")
    (whole,) = whole_run[0].glob("logs/train_*.jsonl")
    assert "3 of 3 epochs finished" in PageReader(tmp_path / "report.html").text
    stored = [Predictions.read(path.with_suffix(".predictions.npz")) for path in (jsonl, whole)]
    assert stored[0].epoch == stored[1].epoch and (stored[0].loss == stored[1].loss).all()
    for ours, theirs in zip(
        *([json.loads(x) for x in p.read_text().splitlines()] for p in (jsonl, whole)), strict=True
    ):
        for name in ("epoch", "train/loss", "train/acc1", "val/loss", "val/acc1", "lr"):
            assert ours[name] == theirs[name], name


def start_forked(folder, *arguments):
    """Start the script in a copy of this process, which has imported what takes longest; return its output too."""
    reader, writer = os.pipe()

    def run():
        os.chdir(folder)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        sys.argv = ["train_imagenet.py", *map(str, arguments)]
        train_imagenet.main()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(writer)
    return process, open(reader)


def weights_after(num_kills, recipe, folder, seed):
    """Kill runs, and the runs that go on from them, at random moments; yield the weights of each that is through."""
    draw = np.random.default_rng(seed)
    num_killed = num_resumed = num_whole = step = 0
    while num_killed < num_kills or step:
        run = folder / f"run_{seed}_{num_whole}"
        run.mkdir(exist_ok=True)
        last = run / "checkpoints" / "last.ckpt"
        resume = ["--resume", last] if last.exists() else []
        num_resumed += len(resume) // 2
        process, output = start_forked(
            run,
            "--config-file",
            recipe,
            "--no_wandb",
            "--training.save_every_steps=2",
            "--logging.log_every=1",
            *resume,
        )
        num_left = int(draw.integers(1, max(2, 25 - step))) if num_killed < num_kills else 25
        with output:
            for line in output:
                num_left -= bool(re.match(r"epoch \d  step ", line))
                if num_left == 0:
                    time.sleep(draw.uniform(0, 0.2))
                    process.kill()
                    break
            rest = output.read()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            num_killed += 1
            step = torch.load(last, weights_only=True)["state"]["step"] if last.exists() else 0
            continue
        assert process.exitcode == 0, rest
        yield torch.load(last, weights_only=True)
        num_whole, step = num_whole + 1, 0
    print(f"seed {seed}: {num_killed} runs killed, {num_resumed} resumed, {num_whole} finished")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_change_no_weight(recipe, tmp_path, seed):
    process, output = start_forked(tmp_path, "--config-file", recipe, "--no_wandb")
    assert output.read() and process.join() is None and process.exitcode == 0
    expected = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    all_found = list(weights_after(5, recipe, tmp_path, seed))
    assert all_found
    for found in all_found:
        for part in ("model", "ema"):
            for name, value in expected[part].items():
                assert torch.equal(found[part][name], value), name


def test_two_processes_agree_and_count_each_validation_sample_once(recipe, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import sys
        import torch
        import torch.distributed as dist
        import train_imagenet
        from imagenet_training.run.run_folder import RunFolder
        from imagenet_training.training.trainer import unwrapped

        def compare_ranks(folder):
            for name, value in unwrapped(folder.trainer.model).state_dict().items():
                others = [torch.empty_like(value) for _ in range(2)]
                dist.all_gather(others, value)
                assert torch.equal(*others) or "running" in name, name
            print("ranks agree", flush=True)
            print_next_steps(folder)

        print_next_steps, RunFolder.print_next_steps = RunFolder.print_next_steps, compare_ranks
        train_imagenet.main()
    """)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = ["--config-file", recipe, "--no_wandb", "--epochs", "2", "--dist.world_size=4"]
    process = subprocess.Popen(
        [*launcher, str(program), *map(str, arguments), "--training.distributed=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = finish(process)
    assert output.count("ranks agree") == 2 and "Warning" not in output
    assert output.count("done: best") == 1, "only rank 0 speaks"
    assert "torchrun wins" in output
    assert "0.4 x 32 / 256 = 0.05" in output
    (jsonl,) = tmp_path.glob("logs/train_*.jsonl")
    record = json.loads(jsonl.read_text().splitlines()[-1])
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = {*tmp_path.rglob("*")}
    options = ["--eval_only", "--resume", last, "--report", "evaluation.html"]
    output = finish(run_script("--config-file", recipe, *options, folder=tmp_path))
    assert {*tmp_path.rglob("*")} - before == {tmp_path / "evaluation.html"}
    assert not re.findall("digest|eval_only", output), "evaluating is no difference from the run that is evaluated"
    page = PageReader(tmp_path / "evaluation.html")
    assert f"{100 * record['val/acc1']:.2f} % top-1 37 images" in page.text and page.num_images > 0
    stored = Predictions.read(next(tmp_path.glob("logs/*.npz")))
    assert np.mean(stored.predicted == stored.labels) == pytest.approx(
        torch.load(last, weights_only=True)["state"]["best_acc1"]
    )
    match = re.search(r"37 images, loss ([\d.]+), top-1 ([\d.]+)%", output)
    assert float(match[1]) == pytest.approx(record["val/loss"], abs=2e-4)
    assert float(match[2]) == pytest.approx(100 * record["val/acc1"], abs=1e-3)


@pytest.mark.soak
def test_a_recipe_that_asks_for_processes_gets_them_and_a_terminal_one_bar(recipe, tmp_path):
    options = ["--training.distributed=1", "--dist.world_size=2", "--dist.port=29543", "--no_wandb"]
    options += ["--epochs", "1", "--lr.warmup_epochs=0"]
    command = [sys.executable, str(ROOT / "train_imagenet.py"), "--config-file", str(recipe), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status, written = run_on_terminal(command, columns=90, cwd=tmp_path, env=environment)
    lines = screen(written)
    assert status == 0, written
    assert any("0.4 x 32 / 256 = 0.05" in line for line in lines)
    assert sum(line.startswith("done: best") for line in lines) == 1
    (log,) = tmp_path.glob("logs/train_*.log")
    passing = [line for line in log.read_text().splitlines() if re.match("epoch 0  step", line)]
    assert len(passing) == 2 and not {*passing} & {*lines}
    assert re.search(r"epoch 0 +\d+%\|.*\| \d/4 \[.* to go", written) and re.search(r"validation +\d+%\|", written)
    evaluate = next(line for line in log.read_text().splitlines() if line.startswith("  evaluate "))
    command = shlex.split(evaluate.removeprefix("  evaluate "))
    assert command[0] == "python" and Path(tmp_path, command[-1]).exists() and "--eval_only" in command


@pytest.mark.soak
def test_a_run_without_a_compiler_goes_on_without_compiling(recipe, whole_run, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    output = finish(run_script("--config-file", recipe, "--no_wandb", "--training.compile=1", folder=tmp_path))
    (note,) = (line for line in output.splitlines() if "torch.compile failed" in line)
    assert "training goes on without it" in note and "InvalidCxxCompiler: No working C++ compiler" in note
    ours, theirs = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (tmp_path, whole_run[0]))
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_compiled_runs_resume_to_the_bit(recipe, tmp_path, monkeypatch, num_processes):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    options = ["--config-file", recipe, "--no_wandb", "--training.compile=1", "--training.save_every_steps=2"]
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
        process = run_script(*options, folder=folder, launcher=launcher)
        if folder.name == "cut":
            for line in process.stdout:
                if line.startswith("epoch 1  step 4/"):
                    process.terminate()
                    break
            process.communicate(timeout=600)
            process = run_script(*options, "--resume", "checkpoints/last.ckpt", folder=folder, launcher=launcher)
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output
        assert "compiled for 32 px" in output
    whole, cut = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders)
    for part in ("model", "ema"):
        assert all(torch.equal(cut[part][name], value) for name, value in whole[part].items())
    weights = load_file(folders[0] / "checkpoints" / "resnet18-weights.safetensors")
    torchvision.models.resnet18(num_classes=10).load_state_dict(weights)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call the script in this process in an empty folder: exit status, stdout, stderr, and what it created."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *map(str, arguments)])
        before = set(tmp_path.rglob("*"))
        status = 0
        try:
            train_imagenet.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr(), set(tmp_path.rglob("*")) - before

    return call


def test_ctrl_c_while_a_run_starts_prints_one_line(call, monkeypatch):
    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_imagenet, "run", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        status, _, err, created = call()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "a second one would print a traceback"
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130 and err == "stopped by Ctrl-C\n" and not created


def test_mistakes_are_refused_before_anything_is_created(call, recipe, data, tmp_path):
    foreign = tmp_path / "foreign.beton"
    foreign.write_bytes(b"no beton at all" * 100)
    cases = {
        ("--data.train_dataset=none.beton",): "none.beton",
        (f"--data.train_dataset={foreign}",): "foreign.beton",
        ("--model.num_classes=1000",): "--model.num_classes=10",
        ("--model.arch=resnet1",): "resnet18",
        ("--training.batchsize=3",): "training.batch_size",
        ("--epochs", "many"): "epochs",
        ("--batch_size", "131"): "131",
        ("--resume", "none.ckpt"): "none.ckpt",
        ("--augmentation.auto_augment=rand-x7",): "augmentation.auto_augment (command line): unknown part 'x7'",
        ("--augmentation.auto_augment=rand-x7", "--dry_run"): "unknown part 'x7'",
        ("--model.drop_path=0.1", "--dry_run"): "--model.library=timm",
        ("--preview", "nowhere/out.png"): "there is no folder nowhere",
        ("--preview", "out.png", "--data.train_dataset=none.beton"): "none.beton",
        ("--model.weights=none.pt",): "none.pt",
        ("--report", "out.html"): "needs --eval_only",
        ("--report", "nowhere/out.html", "--eval_only", "--model.pretrained=1"): "there is no folder nowhere",
        ("--report", "/proc/o", "--eval_only", "--model.pretrained=1"): "the folder /proc cannot be written to: ",
        ("--preview", "logs"): "logs cannot be written: Is a directory",
        ("--model.arch=test_vit3", "--no_wandb"): "--resolution.min_res=160 --resolution.max_res=160 "
        "--validation.resolution=160 work",
        ("--model.arch=test_vit3", "--dry_run"): "cannot take images of 24 px in training, resolution.min_res=24",
        ("--batch_size", "1"): "cannot take one image of 24 px",
        (f"--logging.folder={foreign}",): "foreign.beton cannot be written to: Not a directory",
        ("--logging.folder=/proc/run",): "the folder /proc/run cannot be made in /proc: ",
        ("--logging.folder=run",): "the folder run/logs cannot be written to: Not a directory",
    }
    (tmp_path / "logs").mkdir()
    earlier = tmp_path / "run" / "checkpoints" / "last.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"of an earlier run")
    (tmp_path / "run" / "logs").write_bytes(b"a file")
    for arguments, expected in cases.items():
        status, out, err, created = call("--config-file", recipe, *arguments)
        assert (status, created) == (2, set()), (arguments, err)
        assert expected in err and "Traceback" not in err, (arguments, err)
    assert earlier.exists()


def test_a_bug_keeps_its_traceback(recipe, tmp_path):
    """A ValueError that is no `UserError`, raised by NumPy while the model is built."""
    program = textwrap.dedent("""
        import sys
        import numpy as np
        import train_imagenet
        from imagenet_training.training import trainer

        trainer.build_model = lambda *arguments, **options: np.zeros(3) + np.zeros(4)
        train_imagenet.main()
    """)
    command = [sys.executable, "-c", program, "--config-file", str(recipe), "--no_wandb"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not [*tmp_path.iterdir()]
    assert "Traceback" in done.stderr and "ValueError: operands could not be broadcast" in done.stderr
    assert "error: " not in done.stderr


def test_a_foreign_class_in_the_validation_file_is_refused(call, recipe, data, tmp_path):
    manifest = json.loads((data / "val.beton.json").read_text())
    manifest["classes"][3] = "seven"
    (tmp_path / "val.beton").write_bytes((data / "val.beton").read_bytes())
    (tmp_path / "val.beton.json").write_text(json.dumps(manifest))
    for options in ((), ("--dry_run",)):
        arguments = ("--config-file", recipe, f"--data.val_dataset={tmp_path / 'val.beton'}", *options)
        status, _, err, created = call(*arguments)
        assert (status, created) == (2, set())
        assert re.search(r"val.beton has 1 of 10 classes that .*train.beton does not have: seven$", err.strip())


@pytest.fixture(scope="module")
def reversed_val(data, tmp_path_factory):
    """The validation images in a file that numbers the classes from the last to the first."""
    target = tmp_path_factory.mktemp("reversed") / "val.beton"
    classes = [str(digit) for digit in range(9, -1, -1)]
    write(data / "val", target, num_workers=1, classes=classes, notice=lambda line: None)
    return target


def test_a_resumed_run_says_what_has_changed_since():
    facts = {
        "recipe": {"training": {"epochs": 4, "resume": "last.ckpt"}, "wandb": {"name": "a new setting"}},
        "commit": "abc",
        "device": "a GPU",
        "versions": {"torch": "2.9", "timm": "1"},
        "data": {
            "train": {"path": "train.beton", "num_samples": 9, "digest": None},
            "val": {"path": "val.beton", "num_samples": 5, "digest": "12"},
        },
    }
    before = {
        "recipe": {"training": {"epochs": 3, "resume": None}},
        "commit": "abc+",
        "device": "another",
        "versions": {"torch": "2.8", "timm": "1"},
        "data": {
            "train": {"path": "train.beton", "num_samples": 8, "digest": None},
            "val": {"path": "val.beton", "num_samples": 5, "digest": "56"},
        },
    }
    assert differences(before, facts) == [
        "training.epochs is 4, and was 3 in the run that is resumed",
        "the commit is abc, and was abc+ in the run that is resumed",
        "the device is a GPU, and was another in the run that is resumed",
        "the version of torch is 2.9, and was 2.8 in the run that is resumed",
        "the train data is not the resumed run's: train.beton has 9 images, and there were 8",
        "the val data is not the resumed run's: val.beton has another digest",
    ]
    assert differences(facts, facts) == []
    del before["device"]  # the first version stored none
    assert not any("device" in notice for notice in differences(before, facts))


def test_dry_run_needs_no_data_and_creates_nothing(call):
    status, out, _, created = call("--config-file", ROOT / "rn50_configs" / "single_gpu_100ep.yaml", "--dry_run")
    assert (status, created) == (0, set())
    assert "0.5 x 128 / 256 = 0.25" in out and f"{1_281_167 // 128:,}" in out and "1,281,167" in out


def test_a_preview_shows_what_the_model_gets_and_creates_nothing_else(call, recipe, tmp_path, monkeypatch):
    options = ["--augmentation.auto_augment=rand-m7-mstd0.5-inc1", "--augmentation.erasing=0.5", "--training.seed=3"]
    argv = ["--config-file", str(recipe), "--preview", "out.png", *options]
    status, out, _, created = call(*argv)
    assert (status, created) == (0, {tmp_path / "out.png"}) and "32 training images" in out
    read = read_recipe(argv)
    file, crop = open_train_file(read), build_random_crop(read, 24)
    with build_train_loader(read, file, start(), torch.float32, crop, batch_size=16) as loader:
        images, targets = next(loader.epoch(0))
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    first = (images[0].permute(1, 2, 0) * std + mean).round().byte().numpy().repeat(7, axis=0).repeat(7, axis=1)
    sheet = cv2.imread("out.png")[:, :, ::-1]
    np.testing.assert_array_equal(sheet[60 : 60 + 168, 10 : 10 + 168], first)


def test_every_part_of_the_published_recipes_runs(call, recipe, reversed_val, tmp_path):
    common = [
        "--config-file",
        recipe,
        "--no_wandb",
        "--epochs",
        "1",
        "--lr.warmup_epochs=0",
        "--expected.val_acc1=1:10",
    ]
    rsb = ["--training.optimizer=lamb", "--training.loss=bce", "--model.library=timm", "--model.drop_path=0.05"]
    rsb += ["--augmentation.auto_augment=rand-m7-mstd0.5-inc1", "--augmentation.repeats=3", "--training.agc=0.01"]
    v2 = ["--augmentation.auto_augment=trivial", "--augmentation.erasing=0.1", "--augmentation.repeats=4"]
    v2 += ["--validation.resize=36", "--training.ema_every=2", "--training.ema_rescale=1", "--training.ema_decay=0.99"]
    v2 += [f"--data.val_dataset={reversed_val}"]
    for options, told in ((rsb, "binary cross entropy"), (v2, "moving average 0.68 every 2 steps")):
        status, out, err, _ = call(*common, *options)
        assert status == 0 and told in out and "done: best" in out, (out, err)
    assert "in another order: labels are matched by name" in out
    file, newest = read_beton(reversed_val), max(tmp_path.glob("logs/*.npz"), key=lambda path: path.stat().st_mtime)
    assert [str(label) for label in Predictions.read(newest).labels] == [file.classes[label] for label in file.labels]


def test_a_loss_that_explodes_ends_the_run_with_its_remedies(call, recipe, monkeypatch):
    built, meta_model = [], model.recipe_meta_model
    monkeypatch.setattr(model, "recipe_meta_model", lambda recipe: built.append(1) or meta_model(recipe))
    status, out, _, created = call("--config-file", recipe, "--no_wandb", "--lr", "1e30", "--epochs", "2")
    assert status == 1
    assert len(built) == 1, "built on the meta device once"
    assert "the loss or a weight is not finite" in out and "--training.grad_clip=1" in out
    assert any(path.suffix == ".log" and "not finite" in path.read_text() for path in created)


def test_a_second_run_is_refused_before_anything_is_created(call, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "GRACE_S", 0.0)
    with lock.OwnerLock(tmp_path / "run.lock", "", ""):
        status, _, err, created = call("--config-file", recipe, "--resume", "auto")
        assert (status, created) == (2, set())
        assert re.search(
            r"^error: logging.folder=\.: another run writes into this folder: process \d+ on \S+ since [\d :-]+\. "
            r"Wait for that process, end it, or pass another --logging.folder$",
            err,
            re.MULTILINE,
        )
        (tmp_path / "logs").mkdir()
        for options in (("--eval_only", "--report", "report.html"), ("--preview", "logs/train.png")):
            status, _, err, created = call("--config-file", recipe, *options)
            assert (status, created) == (2, set()) and "a training run writes this file; choose another name" in err
    status, _, err, _ = call("--config-file", recipe, "--preview", recipe)
    assert status == 2 and "this file exists and is no PNG: choose another name" in err
