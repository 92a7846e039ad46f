"""Learning rates and resolutions against ffcv-imagenet's formulas and numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ffcv_ops import UserError
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.planning.schedule import build_lr

NUM_TRAIN = 1280  # ten steps of 128


def plan_of(*settings, num_train=NUM_TRAIN):
    recipe = read_recipe(["--batch_size=128", *settings])
    return plan_run(recipe, world_size=1, num_train=num_train, num_val=100)


def per_step(at_epoch, epochs, steps_per_epoch):
    """ffcv-imagenet's ``train_loop``: each epoch's steps on the line between the values at its start and its end."""
    rates = []
    for epoch in range(epochs):
        lr_start, lr_end = at_epoch(epoch), at_epoch(epoch + 1)
        rates.extend(np.interp(np.arange(steps_per_epoch), [0, steps_per_epoch], [lr_start, lr_end]))
    return np.array(rates)


@pytest.mark.parametrize(("epochs", "peak"), [(16, 2), (88, 2), (3, 1), (2, 0), (1, 0), (2, 2), (1, 2), (3, 5)])
def test_cyclic_is_ffcv_imagenets(epochs, peak):
    def get_cyclic_lr(epoch):
        return np.interp([epoch], [0, peak, epochs], [1e-4 * 1.7, 1.7, 0])[0]

    plan = plan_of("--lr=1.7", f"--epochs={epochs}", f"--lr.lr_peak_epoch={peak}")
    ours = [plan.lr_at(step) for step in range(plan.total_steps)]
    np.testing.assert_allclose(ours, per_step(get_cyclic_lr, epochs, 10), rtol=1e-12, atol=1e-15)


def test_cyclic_known_values():
    plan = plan_of("--lr=1.7", "--epochs=16")
    assert plan.lr_at(0) == pytest.approx(1.7e-4)
    assert plan.lr_at(20) == 1.7
    assert plan.lr_at(90) == pytest.approx(0.85)  # half-way down, at epoch 9
    assert plan.lr_at(159) == pytest.approx(1.7 / 14 / 10)


@pytest.mark.parametrize(("ratio", "length", "epochs"), [(0.1, 30, 90), (0.5, 2, 7), (0.1, 4, 3)])
def test_step_is_ffcv_imagenets(ratio, length, epochs):
    def get_step_lr(epoch):
        return 0 if epoch >= epochs else ratio ** (epoch // length) * 0.4

    plan = plan_of(
        "--lr.lr_schedule_type=step",
        "--lr=0.4",
        f"--epochs={epochs}",
        f"--lr.step_ratio={ratio}",
        f"--lr.step_length={length}",
    )
    ours = [plan.lr_at(step) for step in range(plan.total_steps)]
    np.testing.assert_allclose(ours, per_step(get_step_lr, epochs, 10), rtol=1e-12, atol=1e-15)


def test_a_schedule_without_a_function_is_named():
    settings = replace(read_recipe([]).lr, lr_schedule_type="of_a_later_version")
    with pytest.raises(UserError, match="lr.lr_schedule_type=of_a_later_version is no schedule of this version"):
        build_lr(settings, peak=1.0, epochs=3, steps_per_epoch=10)


def test_step_falls_over_the_epoch_before_its_factor():
    plan = plan_of("--lr.lr_schedule_type=step", "--lr=1", "--epochs=90")
    assert plan.lr_at(289) == 1
    assert plan.lr_at(290) == 1
    assert plan.lr_at(295) == pytest.approx(0.55)
    assert plan.lr_at(300) == pytest.approx(0.1)


def test_step_warms_up():
    plan = plan_of("--lr.lr_schedule_type=step", "--lr=1", "--epochs=90", "--lr.warmup_epochs=2", "--lr.warmup_lr=0.01")
    assert plan.lr_at(0) == pytest.approx(0.01)
    assert plan.lr_at(10) == pytest.approx(0.505)
    assert plan.lr_at(20) == 1


def test_cosine_is_torchs_warmup_and_annealing():
    plan = plan_of(
        "--lr.lr_schedule_type=cosine",
        "--lr=0.25",
        "--epochs=12",
        "--lr.warmup_epochs=5",
        "--lr.warmup_lr=0.01",
        "--lr.min_lr=0.001",
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.25)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=50)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 70, eta_min=0.001)
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, annealing], milestones=[50])
    for step in range(plan.total_steps):
        assert plan.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_cosine_known_values():
    plan = plan_of("--lr.lr_schedule_type=cosine", "--epochs=15", "--lr.warmup_epochs=5")
    assert plan.lr_at(0) == 0
    assert plan.lr_at(25) == pytest.approx(0.125)
    assert plan.lr_at(50) == pytest.approx(0.25)  # 0.5 x 128 / 256
    assert plan.lr_at(100) == pytest.approx(0.125)
    assert plan.lr_at(149) == pytest.approx(0.25 * (1 + math.cos(math.pi * 0.99)) / 2)


def test_warmup_of_part_of_an_epoch():
    plan = plan_of("--lr.lr_schedule_type=cosine", "--epochs=1", "--lr.warmup_epochs=0.5", "--lr=1")
    assert [plan.lr_at(step) for step in range(5)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert plan.lr_at(5) == 1


def test_accumulation_schedules_optimizer_steps():
    plan = plan_of("--lr=1", "--epochs=4", "--training.accumulation=5")
    assert plan.total_steps == 8
    assert plan.lr_at(4) == 1


@pytest.mark.parametrize(
    ("start", "end"), [(11, 13), (17, 20), (23, 27), (29, 34), (41, 48), (65, 76), (0, 0), (5, 3), (-1, 4)]
)
@pytest.mark.parametrize(("low", "high"), [(160, 192), (128, 224), (176, 176), (96, 200)])
def test_resolution_is_ffcv_imagenets(start, end, low, high):
    def get_resolution(epoch):
        if epoch <= start:
            return low
        if epoch >= end:
            return high
        interp = np.interp([epoch], [start, end], [low, high])
        return int(np.round(interp[0] / 32)) * 32

    plan = plan_of(
        f"--resolution.min_res={low}",
        f"--resolution.max_res={high}",
        f"--resolution.start_ramp={start}",
        f"--resolution.end_ramp={end}",
    )
    assert [plan.resolution(epoch) for epoch in range(90)] == [get_resolution(epoch) for epoch in range(90)]


def test_resolution_known_values():
    plan = plan_of(
        "--resolution.min_res=160", "--resolution.max_res=192", "--resolution.start_ramp=11", "--resolution.end_ramp=13"
    )
    assert [plan.resolution(epoch) for epoch in (0, 11, 12, 13, 15)] == [160, 160, 192, 192, 192]
