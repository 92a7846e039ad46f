"""Runs that are signalled, killed, restarted by torchrun, taken up by other numbers of ranks, or failed by one rank."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from betons import write_digits
from hosts import on_host, two_hosts

from ffcv_ops import UserError, read_beton
from ffcv_ops.loading.order import random_order
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.state import TrainState

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NUM_TRAIN, NUM_VAL, GLOBAL_BATCH = 130, 37, 32
# An architecture without BatchNorm, whose statistics are each rank's own, and no mixing, which is each batch's own.
RECIPE = """
model: {arch: test_convnext, library: timm, num_classes: 10}
resolution: {min_res: 32, max_res: 32}
data: {train_dataset: %(data)s/train.beton, val_dataset: %(data)s/val.beton, num_workers: 1}
augmentation: {crop_scale: [0.5, 1]}
lr: {lr_schedule_type: cosine, base_lr: 0.4, warmup_epochs: 1}
training: {batch_size: 32, epochs: 3, ema_decay: 0.9, precision: "32"}
validation: {resolution: 32, crop_ratio: 1, batch_size: 4}
logging: {log_every: 1}
wandb: {enable: 0}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Handwritten digits as .beton files, and their recipe."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, num_train=NUM_TRAIN, num_val=NUM_VAL)
    (folder / "recipe.yaml").write_text(RECIPE % {"data": folder})
    return folder


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Job:
    """The ranks of a run that `Ranks` has started."""

    def __init__(self, program, folder, pids):
        self.program, self.folder, self.pids = program, folder, pids

    def output(self):
        path = self.folder / "out.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text, count=1):
        """Wait until the ranks have printed a text so many times."""
        end_s = time.monotonic() + 400
        while self.output().count(text) < count:
            assert time.monotonic() < end_s, self.output()
            time.sleep(0.005)

    def statuses(self):
        """The exit statuses, or the negative signals, that the ranks ended with, once all have."""
        return json.loads(self.program.stdout.readline())


class Ranks:
    """Starts ranks; all of one job have ended before the next."""

    def __init__(self):
        self.program = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "ranks.py"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder, world_size, *arguments, output="file"):
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        batch = f"--batch_size={GLOBAL_BATCH // world_size}"
        job = {"folder": str(folder), "world_size": world_size, "port": port, "output": output}
        print(json.dumps({**job, "arguments": [batch, *map(str, arguments)]}), file=self.program.stdin, flush=True)
        return Job(self.program, folder, json.loads(self.program.stdout.readline()))

    def run(self, folder, world_size, *arguments):
        job = self.start(folder, world_size, *arguments)
        statuses = job.statuses()
        assert statuses == [0] * world_size, job.output()
        return job


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.program.stdin.close()
    ranks.program.wait(timeout=30)


@pytest.fixture(scope="module")
def undisturbed(ranks, data, tmp_path_factory):
    """By the number of ranks, the folders of whole runs at the same global batch, made when first asked for."""
    folder = tmp_path_factory.mktemp("undisturbed")

    class Runs(dict):
        def __missing__(self, world_size):
            self[world_size] = folder / str(world_size)
            ranks.run(self[world_size], world_size, "--config-file", data / "recipe.yaml")
            return self[world_size]

    return Runs()


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def records(folder):
    (path,) = folder.glob("logs/*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(ours, theirs):
    """To the bit: weights, moving average, momentum, and what was recorded of every epoch."""
    a, b = last(ours), last(theirs)
    assert a["state"]["step"] == b["state"]["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][name], value) for name, value in b[part].items())
    for name, value in b["optimizer"]["state"].items():
        assert torch.equal(a["optimizer"]["state"][name]["momentum_buffer"], value["momentum_buffer"])
    for mine, other in zip(records(ours), records(theirs), strict=True):
        for name in ("epoch", "step", "train/loss", "train/acc1", "val/loss", "val/acc1", "lr"):
            assert mine[name] == other[name], name


def assert_nearly_same_run(ours, theirs):
    """Within float error: ranks sum in another order."""
    for mine, other in zip(records(ours), records(theirs), strict=True):
        assert (mine["epoch"], mine["step"], mine["lr"]) == (other["epoch"], other["step"], other["lr"])
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert mine["val/loss"] == pytest.approx(other["val/loss"], rel=1e-5)
    a, b = last(ours)["model"], last(theirs)["model"]
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_several_ranks_train_as_one_does(undisturbed, world_size):
    assert_nearly_same_run(undisturbed[world_size], undisturbed[1])


def test_a_signal_to_one_rank_stops_all_at_one_step_and_nothing_is_lost(ranks, undisturbed, data, tmp_path):
    arguments = ["--config-file", data / "recipe.yaml", "--resume", "auto"]
    job = ranks.start(tmp_path / "run", 2, *arguments)
    job.wait_for("epoch 1  step 1/4")
    os.kill(job.pids[1], signal.SIGUSR1)
    assert job.statuses() == [75, 75], job.output()
    state = last(tmp_path / "run")["state"]
    assert f"stopped by a signal: {TrainState(**state)}, saved as" in job.output()
    assert 5 <= state["step"] < 12
    (log,) = tmp_path.glob("run/logs/*.log")
    assert log.read_text().rstrip().endswith("--resume auto goes on")
    resumed = ranks.run(tmp_path / "run", 2, *arguments)
    assert "no checkpoint in checkpoints, so a new run starts" in resumed.output()
    assert f"resuming at {TrainState(**state)}" in resumed.output()
    assert_same_run(tmp_path / "run", undisturbed[2])


def test_a_signal_during_validation_is_honoured_there(ranks, undisturbed, data, tmp_path):
    arguments = ["--config-file", data / "recipe.yaml"]
    job = ranks.start(tmp_path / "run", 1, *arguments)
    job.wait_for("epoch 1  step 4/4")
    os.kill(job.pids[0], signal.SIGINT)
    assert job.statuses() == [130], job.output()
    state = last(tmp_path / "run")["state"]
    assert (state["epoch"], state["samples"], state["step"]) == (1, 128, 8), "trained, and not evaluated"
    ranks.run(tmp_path / "run", 1, *arguments, "--resume", "auto")
    assert_same_run(tmp_path / "run", undisturbed[1])


def test_a_hang_up_saves_the_run_and_no_page_ends_it(ranks, undisturbed, data, tmp_path):
    arguments = ["--config-file", data / "recipe.yaml", "--resume", "auto"]
    job = ranks.start(tmp_path / "run", 1, *arguments)
    job.wait_for("epoch 0  step 1/4")
    (tmp_path / "run" / "report.html").mkdir()  # the report cannot be written
    job.wait_for("epoch 1  step 1/4")
    os.kill(job.pids[0], signal.SIGHUP)
    assert job.statuses() == [75], job.output()
    assert "SIGHUP: saving at the end of this step" in job.output()
    assert "note: the report was not written: SaveError: report.html could not be written" in job.output()
    assert 5 <= last(tmp_path / "run")["state"]["step"] < 12
    ranks.run(tmp_path / "run", 1, *arguments)
    assert_same_run(tmp_path / "run", undisturbed[1])


def test_a_run_whose_reader_is_gone_is_saved_and_its_log_goes_on(ranks, undisturbed, data, tmp_path):
    arguments = ["--config-file", data / "recipe.yaml", "--resume", "auto"]
    job = ranks.start(tmp_path / "run", 2, *arguments, output="no reader")
    assert job.statuses() == [75, 75], job.output()
    (log,) = tmp_path.glob("run/logs/*.log")
    text = log.read_text()
    assert "the reader of the output is gone: saving at the end of this step" in text
    state = last(tmp_path / "run")["state"]
    assert f"stopped since the reader of its output is gone: {TrainState(**state)}, saved as" in text
    assert job.output() == ""
    job = ranks.start(tmp_path / "run", 2, *arguments, output="no reader, nohup")
    assert job.statuses() == [0, 0], "whoever starts a run with nohup wants it to go on"
    assert_same_run(tmp_path / "run", undisturbed[2])


def test_a_second_signal_ends_at_once(ranks, data, tmp_path):
    job = ranks.start(tmp_path / "run", 2, "--config-file", data / "recipe.yaml", "--epochs", "300")
    job.wait_for("epoch 1  step 1/4")
    os.kill(job.pids[1], signal.SIGSTOP)  # rank 0 waits for it, and can neither agree nor save
    os.kill(job.pids[0], signal.SIGTERM)
    time.sleep(1.2)
    os.kill(job.pids[0], signal.SIGHUP)  # the terminal of somebody who waits for the save
    time.sleep(0.2)
    assert "a second signal: ending" not in job.output()
    os.kill(job.pids[0], signal.SIGTERM)
    job.wait_for("a second signal: ending at once")
    os.kill(job.pids[1], signal.SIGKILL)
    assert job.statuses() == [128 + signal.SIGTERM, -signal.SIGKILL]
    assert last(tmp_path / "run")["state"]["step"] == 4, "as saved at the end of epoch 0"


def test_other_numbers_of_ranks_take_a_run_over(ranks, undisturbed, data, tmp_path):
    """1 rank for an epoch, 2 from its end on, 1 again within an epoch: the samples of every step stay the same."""
    recipe = ["--config-file", data / "recipe.yaml", "--resume", "auto"]
    job = ranks.start(tmp_path / "run", 1, *recipe)
    job.wait_for("epoch 0 (1/3)")
    os.kill(job.pids[0], signal.SIGTERM)
    assert job.statuses() == [75]
    state = last(tmp_path / "run")["state"]
    assert state["epoch"] == 1
    job = ranks.start(tmp_path / "run", 2, *recipe, "--batch_size=32")
    job.wait_for("step 2/4", count=2)
    os.kill(job.pids[0], signal.SIGTERM)
    assert job.statuses() == [75, 75]
    assert (
        "the run was saved at a global batch of 32 (batch size) x 1 (processes) x 1 (accumulation) = 32; this one "
        "keeps it with 16 (batch size) x 2 (processes) x 1 (accumulation)"
    ) in job.output()
    ranks.run(tmp_path / "run", 1, *recipe)
    assert_nearly_same_run(tmp_path / "run", undisturbed[1])


def test_other_batches_take_a_run_over_within_its_epochs(ranks, data, tmp_path):
    """A batch of 32 on one rank, of 2 x 8 on two, of 4 x 2 on one: the learning rate is that of one undisturbed run."""
    recipe = ["--config-file", data / "recipe.yaml", "--lr=0.05"]
    undisturbed = plan_run(recipe_of(*map(str, recipe)), world_size=1, num_train=NUM_TRAIN, num_val=NUM_VAL)
    recipe += ["--resume", "auto"]
    for world_size, line, arguments in (
        (1, "epoch 0  step 2/4", ["--batch_size=32"]),
        (2, "epoch 1  step 1/8", ["--batch_size=8"]),
    ):
        job = ranks.start(tmp_path / "run", world_size, *recipe, *arguments)
        job.wait_for(line)
        os.kill(job.pids[0], signal.SIGTERM)
        assert job.statuses() == [75] * world_size
        state = last(tmp_path / "run")["state"]
        assert not state["totals"] or state["totals"][3] == state["samples"], "every image of both parts is counted"
    output = ranks.run(tmp_path / "run", 1, *recipe, "--batch_size=4", "--training.accumulation=2").output()
    assert "note: an epoch now has 8 steps of 16 images, and had 4 of 32; the schedules go on at the same" in output
    assert "note: an epoch now has 16 steps of 8 images, and had 8 of 16; the schedules go on at the same" in output
    lines = re.findall(r"^epoch (\d)  step (\d+)/(\d+) .* lr (\S+)", output, re.MULTILINE)
    places = [int(epoch) + (int(step) - 1) / int(steps) for epoch, step, steps, _ in lines]
    assert places == sorted(set(places)) and {steps for _, _, steps, _ in lines} == {"4", "8", "16"}
    for place, (*_, lr) in zip(places, lines, strict=True):
        assert float(lr) == pytest.approx(undisturbed.lr_at(place * undisturbed.steps_per_epoch), rel=1e-4), place
    assert records(tmp_path / "run")[-1]["global_batch_size"] == 8
    steps = [record["step"] for record in records(tmp_path / "run")]
    assert len(steps) == 3 and steps == sorted(set(steps)) and steps[-1] == len(lines)


def test_damaged_checkpoints_are_passed_over_with_a_notice(ranks, undisturbed, data, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    content = last(undisturbed[1])
    whole = (undisturbed[1] / "checkpoints" / "last.ckpt").read_bytes()
    content["state"].update(epoch=2, step=8)
    torch.save(content, folder / "checkpoints" / "test_convnext-epoch=00-val_acc1=0.1000.ckpt")
    zeroed = bytearray(whole)
    zeroed[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    damages = {"cut.ckpt": whole[: len(whole) // 2], "empty.ckpt": b"", "garbage.ckpt": b"x" * 5000, "last": zeroed}
    arguments = ["--config-file", data / "recipe.yaml", "--resume", "auto", "--eval_only"]
    for name, damaged in damages.items():
        (folder / "checkpoints" / "last.ckpt").write_bytes(damaged)
        (folder / "out.txt").unlink(missing_ok=True)
        job = ranks.run(folder, 1, *arguments)
        assert "note: checkpoints/last.ckpt is damaged and was passed over: " in job.output(), name
    for path in (folder / "checkpoints").glob("test_convnext*"):
        path.unlink()
    (folder / "out.txt").unlink()
    job = ranks.start(folder, 2, *arguments)
    assert job.statuses() == [2, 2] and "Traceback" not in job.output()
    first = next(line for line in job.output().splitlines() if "rror" in line)
    assert first.startswith("error: --resume auto: ") and "name the checkpoint to evaluate" in first


def test_a_rank_that_fails_says_so_first_and_the_others_end(ranks, data, tmp_path):
    """A corrupt image that rank 1 alone comes to see."""
    beton = read_beton(data / "train.beton")
    order = random_order(np.arange(NUM_TRAIN), seed=0, epoch=0, rank=1, world_size=2)
    sample = int(order[GLOBAL_BATCH // 2])
    for name in ("train.beton", "train.beton.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    with open(tmp_path / "train.beton", "r+b") as file:
        for row in beton.alloc_table[beton.alloc_table["sample_id"] == sample]:
            file.seek(int(row["ptr"]))
            file.write(bytes(int(row["size"])))
    dataset = f"--data.train_dataset={tmp_path / 'train.beton'}"
    job = ranks.start(tmp_path / "run", 2, "--config-file", data / "recipe.yaml", dataset)
    assert all(status != 0 for status in job.statuses())
    errors = [line for line in job.output().splitlines() if "rror" in line]
    assert re.match(rf"error: rank 1: .*train.beton: sample {sample}: ", errors[0]), job.output()
    (log,) = tmp_path.glob("run/logs/*.log")
    assert f"because rank 1 has failed: {tmp_path}/train.beton: sample {sample}" in log.read_text()


def workers(torchrun):
    """The processes of torchrun's ranks, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            names = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for name in names if parent == torchrun.pid else ():
            if name.startswith(b"RANK="):
                found[int(name.removeprefix(b"RANK="))] = int(path.parent.name)
    return found


@pytest.mark.soak
def test_torchrun_restarts_a_killed_worker_and_the_run_ends_as_if_undisturbed(undisturbed, data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command += [ROOT / "train_imagenet.py", "--config-file", data / "recipe.yaml", "--batch_size=16"]
    torchrun = subprocess.Popen(
        [*command, "--training.save_every_steps=3"],
        cwd=tmp_path,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = ""
    for line in torchrun.stdout:
        output += line
        if line.startswith("epoch 1  step 3/4"):
            os.kill(workers(torchrun)[1], signal.SIGKILL)
            break
    output += torchrun.communicate(timeout=400)[0]
    assert torchrun.returncode == 0, output
    assert "torchrun has restarted the run: it goes on from its own checkpoints/last.ckpt" in output
    assert_same_run(tmp_path, undisturbed[2])


def two_machine_command():
    """The command of docs/MULTI_NODE_TRAINING.md for two machines, as printed there."""
    text = (ROOT / "docs" / "MULTI_NODE_TRAINING.md").read_text()
    section = text.partition("## Two machines")[2].partition("\n## ")[0]
    (command,) = re.findall(r"^    (torchrun (?:.*\\\n)*.*)$", section, re.MULTILINE)
    return command.replace("\\\n", " ")


@pytest.fixture
def hosts():
    with two_hosts({"first": "10.213.0.1", "second": "10.213.0.2"}) as hosts:
        yield list(hosts)


@pytest.mark.soak
def test_the_two_machine_command_works_as_printed(hosts, undisturbed, data, tmp_path):
    command = two_machine_command()
    for printed, ours in (
        ("HEAD", hosts[0]),
        ("--nproc_per_node=8", "--nproc_per_node=1"),
        ("rn50_configs/single_gpu_100ep.yaml", str(data / "recipe.yaml")),
    ):
        assert command.count(printed) == 1
        command = command.replace(printed, ours)
    command += f" --batch_size=16 --logging.folder={tmp_path}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    processes = [
        subprocess.Popen(
            [*on_host(host), "sh", "-c", f"hostname {host} && exec {command}"],
            cwd=ROOT,
            env={**environment(), "PATH": path},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for host in reversed(hosts)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("done: best" in output for output in outputs) == 1, "rank 0 speaks, on one machine"
    assert_same_run(tmp_path, undisturbed[2])


@pytest.mark.soak
def test_the_script_for_one_machine_passes_a_signal_on_and_its_status_asks_for_more(undisturbed, data, tmp_path):
    command = ["bash", ROOT / "launch" / "single_node.sh", "--config-file", data / "recipe.yaml", "--batch_size=16"]
    command += [f"--logging.folder={tmp_path}", "--resume", "auto"]
    statuses = []
    for signals in ([signal.SIGUSR1], []):
        script = subprocess.Popen(
            command, env={**environment(), "NPROC": "2"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output = ""
        for line in script.stdout:
            output += line
            if signals and line.startswith("epoch 1  step 1/4"):
                script.send_signal(signals.pop())
        statuses.append(script.wait(timeout=400))
    assert statuses == [75, 0], output
    assert re.search("resuming at epoch [12]", output), "at the signal's step, or a few tiny ones later"
    assert_same_run(tmp_path, undisturbed[2])


def test_the_script_for_one_machine_starts_nothing_for_a_mistake():
    command = ["bash", ROOT / "launch" / "single_node.sh", "--epoch", "3"]
    script = subprocess.run(command, env={**environment(), "NPROC": "2"}, text=True, capture_output=True)
    assert script.returncode == 2 and script.stdout == ""
    assert script.stderr == (
        "error: command line: unknown setting --epoch; did you mean --epochs or --training.epochs?\n"
    )


SLURM = {
    "scontrol": 'echo "scontrol $*" >>calls; if [ "$1" = show ]; then echo first; echo second; fi',
    "scancel": 'echo "scancel $*" >>calls',
    "srun": 'echo "srun $SRUN_CPUS_PER_TASK $*" >>calls; while ! grep -q scancel calls; do sleep 0.05; done; exit 1',
}


def test_the_slurm_script_has_a_run_that_its_time_cuts_short_saved_and_goes_on_with_it(tmp_path):
    for name in (".venv", "ffcv_ops", "imagenet_training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, program in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SUBMIT_DIR": tmp_path, "JOB_ID": 7, "JOB_NODELIST": "many", "JOB_NUM_NODES": 2, "CPUS_PER_TASK": 64}
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    calls, lines = tmp_path / "calls", []
    for _ in range(2):
        calls.unlink(missing_ok=True)
        script = subprocess.Popen(
            ["bash", ROOT / "launch" / "slurm.sbatch", "--epochs", "3"],
            env={**os.environ, **path, **{f"SLURM_{name}": str(value) for name, value in job.items()}},
            text=True,
            stdout=subprocess.PIPE,
        )
        while not calls.exists() or "srun" not in calls.read_text():
            assert script.poll() is None
            time.sleep(0.01)
        script.send_signal(signal.SIGUSR1)
        output, _ = script.communicate(timeout=30)
        assert script.returncode == 1 and "back into the queue" in output
        lines.append(calls.read_text().splitlines())
        (tmp_path / "runs" / "7" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "7" / "checkpoints" / "last.ckpt").touch()
    for resume, (hosts, srun, *rest) in zip(("", "--resume auto "), lines, strict=True):
        assert hosts == "scontrol show hostnames many"
        assert srun.startswith("srun 64 ") and "--nnodes=2 " in srun and "--rdzv_endpoint=first:20007 " in srun
        assert srun.endswith(f" train_imagenet.py --epochs 3 {resume}--logging.folder=runs/7")
        assert rest == ["scancel --signal=TERM 7", "scontrol requeue 7"]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.s*")))
def test_launch_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


IMAGENET = {"num_train": 1_281_167, "num_val": 50_000}


def recipe_of(*arguments):
    return read_recipe(["--no_wandb", *arguments])


@pytest.mark.parametrize(
    ("batch_size", "world_size", "expected"),
    [(128, 4, (128, 2)), (128, 16, (64, 1)), (128, 1, (128, 8)), (96, 4, (64, 4)), (128, 8, (128, 1))],
)
def test_the_global_batch_is_kept_by_accumulation_or_smaller_batches(batch_size, world_size, expected):
    recipe = recipe_of(f"--batch_size={batch_size}")
    before = {
        "recipe": {"training": {"batch_size": 128, "accumulation": 1}},
        "asked_batch": [batch_size, 1],
        "world_size": 8,
        "global_batch_size": 1024,
    }
    plan = plan_run(recipe, world_size=world_size, **IMAGENET, resumed=before)
    assert (plan.batch_size, plan.accumulation) == expected
    assert plan.global_batch_size == 1024
    assert len(plan.notices) == (world_size != 8)


def test_a_global_batch_that_cannot_be_shared_names_the_processes_that_can():
    before = {
        "recipe": {"training": {"batch_size": 128, "accumulation": 1}},
        "asked_batch": [128, 1],
        "world_size": 8,
        "global_batch_size": 1024,
    }
    with pytest.raises(UserError, match="1024, which 6 processes cannot .* start 2 or 4 or 8 processes"):
        plan_run(recipe_of("--batch_size=128"), world_size=6, **IMAGENET, resumed=before)
    plan = plan_run(recipe_of("--batch_size=100"), world_size=6, **IMAGENET, resumed=before)
    assert (plan.batch_size, plan.accumulation) == (100, 1), "another batch size is the user's choice"
