"""Checkpoints: whole or absent, safe to load, refused when foreign."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plans import make_plan
from safetensors.torch import load_file, save_file

from ffcv_ops import UserError
from imagenet_training.distributed import World
from imagenet_training.models.architectures import build_model
from imagenet_training.models.card import ModelCard
from imagenet_training.models.export import export_weights
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.reports.background import BackgroundTask
from imagenet_training.run import checkpoint
from imagenet_training.run.checkpoint import (
    CheckpointFolder,
    checkpoint_content,
    copy_to_cpu,
    read_checkpoint,
    save_atomically,
    size_bytes,
)
from imagenet_training.run.resume import ResumePoint, restore
from imagenet_training.run.run_folder import check_folder, how_it_ended
from imagenet_training.state import TrainState
from imagenet_training.training.loss import soft_target_cross_entropy
from imagenet_training.training.optim import build_ema, build_optimizer
from imagenet_training.training.trainer import Trainer

WORLD = World()


class Run:
    """The part of a run that is saved and restored: its trainer, with the recipe and plan that count there."""

    def __init__(
        self,
        folder,
        *,
        num_classes=4,
        scaled=False,
        optimizer="sgd",
        decay=(1e-4, 0.0),
    ):
        self.card = ModelCard({"arch": "test_resnet", "library": "timm", "num_classes": num_classes})
        model = build_model(**self.card.model)
        self.trainer = Trainer(
            model=model,
            ema=build_ema(model, 0.9),
            optimizer=build_optimizer(model, optimizer, lr=0.1, weight_decay=decay[0], bn_wd=decay[1]),
            scaler=torch.amp.GradScaler("cpu", enabled=scaled),
            world=WORLD,
            loss=soft_target_cross_entropy,
            precision="32",
        )
        self.parts = {"model": model, "ema": self.trainer.ema, "optimizer": self.trainer.optimizer}
        self.recipe = SimpleNamespace(training=SimpleNamespace(optimizer=optimizer, weight_decay=decay[0]))
        self.plan = make_plan()
        stored = {"training": {"accumulation": 1, "optimizer": optimizer}}
        self.provenance = {"recipe": stored, "global_batch_size": 8}
        self.checkpoints = CheckpointFolder(folder, "resnet18")
        self.last = self.checkpoints.last

    def content(self, state):
        return checkpoint_content(state, self.trainer, self.provenance, self.card)

    def save(self, state, **options):
        self.checkpoints.save(self.content(state), **options)

    def restore(self, content):
        return restore(self.trainer, ResumePoint("a checkpoint", content, {}, ()), self.recipe, self.plan)

    def take_a_step(self):
        self.trainer.model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        self.trainer.optimizer.step()
        self.trainer.ema.update_parameters(self.trainer.model)


def test_everything_comes_back(tmp_path):
    ours = Run(tmp_path)
    ours.take_a_step()
    state = TrainState(epoch=3, step=17, best_acc1=0.25, best_epoch=2, run_name="train_x", wandb_id="abc")
    ours.save(state, is_best=True)
    theirs = Run(tmp_path)
    assert theirs.restore(read_checkpoint(ours.last)) == state
    for part in ("model", "ema"):
        for name, value in ours.parts[part].state_dict().items():
            assert torch.equal(theirs.parts[part].state_dict()[name], value), name
    mine, other = (run.parts["optimizer"].state_dict()["state"] for run in (ours, theirs))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key]["momentum_buffer"], other[key]["momentum_buffer"]) for key in mine)


def test_a_copy_stays_as_it_is_while_training_goes_on(tmp_path):
    run = Run(tmp_path, optimizer="adamw")
    run.take_a_step()
    content = copy_to_cpu(run.content(TrainState(step=1)))
    run.checkpoints.save(content)
    run.take_a_step()
    run.checkpoints.save(content, is_best=True)
    first, second = (read_checkpoint(path) for path in (run.last, run.checkpoints.best(TrainState())))
    live = run.content(TrainState(step=1))
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in live[part])
        assert not all(torch.equal(first[part][name], live[part][name]) for name in live[part])
    for number, values in live["optimizer"]["state"].items():
        assert all(
            torch.equal(first["optimizer"]["state"][number][key], content["optimizer"]["state"][number][key])
            for key in values
        )
        assert int(first["optimizer"]["state"][number]["step"]) == 1 and int(values["step"]) == 2
    assert content["model"]._metadata == live["model"]._metadata


def test_a_run_without_a_comparable_evaluation_names_no_best_accuracy():
    state = TrainState(epoch=3, best_acc1=0.5, best_epoch=1)
    assert how_it_ended(state, 0.4) == "best top-1 50.000% in epoch 1, last 40.000%"
    assert how_it_ended(state, None) == "best top-1 50.000% in epoch 1"
    state.forget_best()
    assert how_it_ended(state, None) == "no epoch was evaluated with the present validation settings"


def test_tasks_beside_training_run_in_order_and_their_errors_are_raised():
    task, done = BackgroundTask(), []

    def fail():
        raise OSError("no space left")

    task.start(lambda: (time.sleep(0.3), done.append("first")))
    task.start(lambda: done.append("second"))
    assert "first" in done
    task.start(fail)
    with pytest.raises(OSError, match="no space left"):
        task.start(lambda: done.append("third"))
    task.start(lambda: done.append("fourth"))
    task.finish()
    task.finish()
    assert done == ["first", "second", "fourth"]


def test_names_and_only_the_best_is_kept(tmp_path):
    run = Run(tmp_path)
    run.save(TrainState(epoch=1, best_acc1=0.5, best_epoch=0), is_best=True)
    run.save(TrainState(epoch=2, best_acc1=0.76543, best_epoch=1), is_best=True)
    run.save(TrainState(epoch=3, best_acc1=0.76543, best_epoch=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt",
        "resnet18-epoch=01-val_acc1=0.7654.ckpt",
        "resnet18-weights.safetensors",
    ]
    assert load_file(run.checkpoints.weights).keys() == run.parts["model"].state_dict().keys()


@pytest.mark.parametrize("num_written", [0, 1, 2])
def test_killed_between_two_files_a_run_finds_all_that_its_newest_checkpoint_names(tmp_path, monkeypatch, num_written):
    run, written = Run(tmp_path), []

    def some(save):
        def save_some(*arguments):
            if len(written) == num_written:
                raise KeyboardInterrupt
            written.append(arguments)
            save(*arguments)

        return save_some

    run.save(TrainState(epoch=1, step=7, best_acc1=0.5, best_epoch=0), is_best=True)
    run.take_a_step()
    monkeypatch.setattr(checkpoint, "save_atomically", some(save_atomically))
    monkeypatch.setattr(checkpoint, "export_weights", some(export_weights))
    with pytest.raises(KeyboardInterrupt):
        run.save(TrainState(epoch=2, step=8, best_acc1=0.6, best_epoch=1), is_best=True)
    content = read_checkpoint(run.checkpoints.newest()[0])
    assert run.checkpoints.best(TrainState(**content["state"])).exists()
    weights = load_file(run.checkpoints.weights)
    same = all(torch.equal(weights[name], value) for name, value in content["ema"].items())
    assert same or content["state"]["step"] == 7, "exported weights are the best, or will be once it is redone"


def test_an_earlier_run_is_kept(tmp_path):
    run, report = Run(tmp_path), tmp_path / "report.html"
    assert run.checkpoints.keep_earlier_run(report) == []
    for number in (1, 2):
        run.save(TrainState(epoch=number, best_acc1=0.5, best_epoch=0), is_best=True)
        report.write_text(f"report {number}")
        moved = run.checkpoints.keep_earlier_run(report)
        assert {path.parent for path in moved} == {tmp_path / f"earlier-{number}"} and len(moved) == 4
        assert not report.exists() and moved[-1].read_text() == f"report {number}"
        assert read_checkpoint(tmp_path / f"earlier-{number}" / "last.ckpt")["state"]["epoch"] == number
    assert not run.last.exists()


def test_an_earlier_report_is_kept_where_no_checkpoint_is(tmp_path):
    report = tmp_path / "report.html"
    report.write_text("earlier")
    (moved,) = CheckpointFolder(tmp_path / "checkpoints", "resnet18").keep_earlier_run(report)
    assert moved == tmp_path / "checkpoints" / "earlier-1" / "report.html" and moved.read_text() == "earlier"
    assert not report.exists()


def test_foreign_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")
    run = Run(tmp_path)
    run.save(TrainState(epoch=1))
    whole = run.last.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "cut.ckpt")
    torch.save(run.parts["model"].state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="--model.weights"):
        read_checkpoint(tmp_path / "weights.pt")
    save_file(run.parts["model"].state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of a run .*--model.weights"):
        read_checkpoint(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="another model"):
        Run(tmp_path, num_classes=5).restore(read_checkpoint(run.last))


def saved_by(run, **state):
    run.take_a_step()
    run.save(TrainState(**state))
    return read_checkpoint(run.last)


def test_the_recipe_s_decay_holds_and_the_momentum_is_the_checkpoint_s(tmp_path):
    content = saved_by(Run(tmp_path))
    theirs = Run(tmp_path, decay=(5e-4, 1e-5))
    theirs.restore(content)
    optimizer = theirs.parts["optimizer"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 1e-5]
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], content["optimizer"]["state"][key]["momentum_buffer"])


def test_the_steps_that_lamb_counts_come_back(tmp_path):
    content = saved_by(Run(tmp_path, optimizer="lamb"))
    theirs = Run(tmp_path, optimizer="lamb")
    theirs.restore(content)
    assert [group["step"] for group in theirs.parts["optimizer"].param_groups] == [1, 1]
    for key, state in theirs.parts["optimizer"].state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], content["optimizer"]["state"][key]["exp_avg"])


def test_the_momentum_comes_back_in_the_memory_format_of_the_weights(tmp_path):
    content = saved_by(Run(tmp_path))
    for state in content["optimizer"]["state"].values():
        if state["momentum_buffer"].ndim == 4:
            state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    theirs = Run(tmp_path)
    theirs.restore(content)
    for parameter, state in theirs.parts["optimizer"].state.items():
        assert state["momentum_buffer"].stride() == parameter.stride() and not state["momentum_buffer"].requires_grad


def test_what_a_run_keeps_of_its_checkpoint_has_no_tensors(tmp_path):
    content = Run(tmp_path, scaled=True).content(TrainState(epoch=1, step=3))
    assert size_bytes(content) > 0
    point = ResumePoint("last.ckpt", content, {}, ()).without_tensors()
    assert (
        size_bytes(point.content) == 0
        and point.content["state"] == content["state"]
        and len(content) > len(point.content)
    )
    assert ResumePoint(None, None, {}, ()).without_tensors().content is None


def test_another_optimizer_is_refused(tmp_path):
    content = saved_by(Run(tmp_path))
    with pytest.raises(UserError, match="training.optimizer=sgd, this one has lamb"):
        Run(tmp_path, optimizer="lamb").restore(content)
    with pytest.raises(UserError, match="in other groups: keep training.bn_wd"):
        Run(tmp_path, decay=(1e-4, None)).restore(content)


@pytest.mark.parametrize(("before", "now", "scale"), [(False, True, 2.0**16), (True, True, 8.0), (True, False, 1.0)])
def test_the_loss_s_scale_comes_back_where_there_was_one(tmp_path, before, now, scale):
    ours = Run(tmp_path, scaled=before)
    ours.trainer.scaler.scale(torch.ones(()))
    ours.trainer.scaler.update(8.0)
    theirs = Run(tmp_path, scaled=now)
    theirs.restore(saved_by(ours))
    assert theirs.trainer.scaler.get_scale() == scale


def test_the_newest_checkpoint_is_the_furthest_in_epochs_and_samples_not_in_steps(tmp_path):
    assert CheckpointFolder(tmp_path / "nowhere", "resnet18").newest() == (None, [])
    run = Run(tmp_path)
    state = {"epoch": 1, "step": 70, "run_name": "train_a", "best_acc1": 0.5, "best_epoch": 0}
    run.save(TrainState(**state), is_best=True)
    best = run.checkpoints.best(TrainState(best_acc1=0.5, best_epoch=0))
    assert run.checkpoints.newest() == (run.last, []), "the last, of equals"
    run.save(TrainState(**{**state, "step": 69}, samples=32))
    assert run.checkpoints.newest() == (run.last, [])
    run.save(TrainState(epoch=0, samples=64, step=71, run_name="train_b"))
    assert run.checkpoints.newest() == (best, [])
    assert run.checkpoints.newest(run_name="train_b") == (run.last, [])
    assert run.checkpoints.newest(run_name="train_c") == (None, [])


def test_checkpoints_further_than_the_resumed_one_are_kept_elsewhere(tmp_path):
    run = Run(tmp_path)
    run.save(TrainState(epoch=2, best_acc1=0.5, best_epoch=1, run_name="train_a"), is_best=True)
    resumed, state = run.checkpoints.newest()[0], TrainState(epoch=2)
    assert run.checkpoints.keep_abandoned(resumed, state) == []
    earlier = tmp_path / "of-epoch-1.ckpt"
    save_atomically(run.content(TrainState(epoch=1, samples=8)), earlier)
    run.save(TrainState(epoch=1, samples=16, best_acc1=0.5, best_epoch=1))
    moved = run.checkpoints.keep_abandoned(run.last, TrainState(epoch=1, samples=16))
    best, weights = run.checkpoints.best(TrainState(best_acc1=0.5, best_epoch=1)), run.checkpoints.weights
    assert moved == [tmp_path / "earlier-1" / best.name, tmp_path / "earlier-1" / weights.name]
    assert run.checkpoints.newest() == (run.last, [])
    assert run.checkpoints.keep_abandoned(earlier, TrainState(epoch=1, samples=8)) == [
        tmp_path / "earlier-2" / "last.ckpt"
    ]
    assert read_checkpoint(tmp_path / "earlier-2" / "last.ckpt")["state"]["samples"] == 16


def test_a_checkpoint_of_a_newer_version_is_no_damaged_one_and_is_never_replaced(tmp_path):
    run = Run(tmp_path)
    run.save(TrainState(epoch=1, best_acc1=0.5, best_epoch=0), is_best=True)
    content = run.content(TrainState(epoch=2))
    for newer, expected in (
        ({"format": 3, "place": {"epoch": 2}}, "of format 3, which a newer version has written; .* formats 1 to 2"),
        (
            {**content, "state": {**content["state"], "warp": 1}},
            "which a newer version has written: .* know warp in its state",
        ),
    ):
        save_atomically(newer, run.last)
        for read in (lambda: read_checkpoint(run.last), run.checkpoints.newest):
            with pytest.raises(UserError, match=f"^{run.last} is a checkpoint {expected}"):
                read()


def test_a_best_checkpoint_that_a_running_run_removes_is_passed_over_in_silence(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(TrainState(epoch=1, best_acc1=0.5, best_epoch=0), is_best=True)
    paths = run.checkpoints.paths()
    paths[1].unlink()
    monkeypatch.setattr(CheckpointFolder, "paths", lambda folder: paths)
    assert run.checkpoints.newest() == (run.last, [])
    run.last.unlink()
    assert run.checkpoints.newest() == (None, [])


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": 1, "state": {}, "model": Bomb()}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "ran").exists()


def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    program = textwrap.dedent("""
        import sys, pathlib, torch
        from imagenet_training.run.checkpoint import save_atomically
        for number in range(10**6):
            content = {"format": 1, "state": {}, "tensor": torch.full((500_000,), float(number))}
            save_atomically(content, pathlib.Path(sys.argv[1]))
            print(number, flush=True)
    """)
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    tensor = read_checkpoint(path)["tensor"]
    assert torch.equal(tensor, tensor[:1].expand_as(tensor))
    CheckpointFolder(tmp_path, "resnet18").remove_unfinished()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_file_before(tmp_path):
    path = tmp_path / "last.ckpt"
    save_atomically({"number": 1}, path)
    with pytest.raises(Exception, match="local object"):
        save_atomically({"number": lambda: 2}, path)
    assert torch.load(path) == {"number": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_hold_a_run_is_found_and_nothing_is_left(tmp_path):
    recipe, run = read_recipe([f"--logging.folder={tmp_path / 'run'}"]), Run(tmp_path)
    check_folder(recipe, run.trainer, TrainState())
    run.trainer.model = torch.nn.Linear(2**20, 2**30, device="meta")  # 4 PB
    with pytest.raises(UserError, match=r"logging.folder=.* are free there, and a checkpoint of this run takes 4.* GB"):
        check_folder(recipe, run.trainer, TrainState())
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def public_folder():
    """A folder in memory that every user may enter."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("part", ["", "logs", "checkpoints"])
def test_a_folder_without_permission_is_found(public_folder, part):
    recipe, run = read_recipe([f"--logging.folder={public_folder / 'run'}"]), Run(public_folder)
    closed, user = public_folder / "run" / part, os.geteuid()
    closed.mkdir(parents=True)
    (public_folder / "run").chmod(0o777)
    closed.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        with pytest.raises(
            UserError, match=rf"logging.folder=.*: the folder {closed} cannot be written to: Permission"
        ):
            check_folder(recipe, run.trainer, TrainState())
    finally:
        os.seteuid(user)


def test_an_earlier_run_is_moved_to_checkpoints_on_another_disk(tmp_path, public_folder):
    run = Run(tmp_path / "checkpoints")
    run.save(TrainState(run_name="run", epoch=1, step=3))
    report = public_folder / "report.html"
    report.write_text("a page")
    kept = run.checkpoints.keep_earlier_run(report)
    assert [path.name for path in kept] == ["last.ckpt", "report.html"]
    assert kept[1].read_text() == "a page" and not report.exists()
