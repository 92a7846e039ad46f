"""Positions in epochs and samples: runs that are resumed with other batches, ranks, epochs or images."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from betons import photographs, write_images
from plans import make_plan
from torch import nn

from ffcv_ops import Label, Loader, OrderOption, UserError
from ffcv_ops.lock import OwnerLock
from imagenet_training import dry_run
from imagenet_training.data.loaders import open_training_data
from imagenet_training.distributed import World
from imagenet_training.models.architectures import recipe_meta_model
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.reports.logs import RunLog
from imagenet_training.run.changes import best_notices, check_classes, check_rest_of_epoch, keeps_best, position_notices
from imagenet_training.run.resume import ResumePoint
from imagenet_training.run.run_folder import RunFolder
from imagenet_training.state import TrainState
from imagenet_training.training.epoch import train_epoch
from imagenet_training.training.loss import soft_target_cross_entropy
from imagenet_training.training.meters import EtaEstimator
from imagenet_training.training.optim import build_ema, build_optimizer
from imagenet_training.training.preemption import Stopped, StopRequest
from imagenet_training.training.trainer import Trainer, batch_place

FROZEN = Path(__file__).parent / "frozen"
CPU = torch.device("cpu")
NUM_TRAIN = 100
COSINE = ["--lr.lr_schedule_type=cosine", "--lr.warmup_epochs=1.5", "--lr.min_lr=0.001"]
STEP = ["--lr.lr_schedule_type=step", "--lr.step_length=2", "--lr.warmup_epochs=1"]


def recipe_of(*settings):
    return read_recipe(["--no_wandb", "--batch_size=10", "--epochs=6", "--precision=32", *settings])


def plan_of(recipe, world_size=1, num_train=NUM_TRAIN, resumed=None):
    return plan_run(recipe, world_size=world_size, num_train=num_train, num_val=8, device_type="cpu", resumed=resumed)


def content_of(recipe, plan, state, digest="a"):
    """What a checkpoint says of its run, beside the tensors."""
    resolved = recipe.to_dict()
    resolved["training"] |= {"batch_size": plan.batch_size, "accumulation": plan.accumulation}
    return {
        "format": 2,
        "state": dataclasses.asdict(state),
        "recipe": resolved,
        "world_size": plan.world_size,
        "global_batch_size": plan.global_batch_size,
        "asked_batch": [recipe.training.batch_size, recipe.training.accumulation],
        "data": {"train": {"num_samples": plan.num_train, "digest": digest}},
    }


def data_of(plan, digest="a"):
    return SimpleNamespace(train=SimpleNamespace(num_samples=plan.num_train, digest=digest))


class Part:
    """One process's part of a run on random tensors, from a state to a stop after so many steps or to an epoch."""

    storage_wait_s = 0.0

    def __init__(self, plan, state, folder, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3))
        self.plan, self.state, self.folder = plan, state, folder
        self.steps, self.places, self.saves, self.updates = [], [], [], []
        # The part of rank 0: no other rank is needed to count positions.
        world = World(world_size=plan.world_size)
        self.trainer = Trainer(
            model=self.model,
            ema=build_ema(self.model, 0.9),
            optimizer=build_optimizer(self.model, lr=0.1),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            world=world,
            loss=soft_target_cross_entropy,
            precision="32",
            accumulation=plan.accumulation,
            **options,
        )

    def epoch(self, epoch, *, skip_samples):
        """Stand for the loader of rank 0: full batches of what is left of an epoch."""
        samples = self.plan.samples_per_epoch // self.plan.world_size - skip_samples
        for _ in range(samples // self.plan.batch_size):
            yield torch.randn(self.plan.batch_size, 3, 2, 2), torch.eye(3)[torch.arange(self.plan.batch_size) % 3]

    def train(self, *, until_epoch=10**6, num_steps=10**6, save_only=False):
        """Train until an epoch begins, or until so many steps are taken."""
        plan, state, trainer = self.plan, self.state, self.trainer
        log = RunLog(self.folder, True, eta=EtaEstimator([8] * plan.epochs, plan.steps_per_epoch))
        backward, optimizer_step = trainer.backward, trainer.optimizer_step

        def noted_backward(*arguments, number, place):
            self.places.append(place)
            return backward(*arguments, number=number, place=place)

        def noted_step(lr, *, step):
            before = int(trainer.ema.n_averaged)
            optimizer_step(lr, step=step)
            fraction = plan.step_at(state.epoch, state.samples) / plan.steps_per_epoch
            self.steps.append((fraction, lr))
            self.updates.append(int(trainer.ema.n_averaged) > before)

        trainer.backward, trainer.optimizer_step = noted_backward, noted_step
        stop = StopRequest(World())
        stop.agreed = lambda: len(self.steps) >= num_steps
        stop.exit_status = 75
        try:
            while state.epoch < min(until_epoch, plan.epochs):
                save = lambda state: self.saves.append(state.step)  # noqa: E731
                train_epoch(trainer, self, state, plan, log, stop=stop, save=save)
                state.finish_epoch({})
        except Stopped:
            pass
        return self


def resumed_run(folder, parts, **options):
    """Train the parts of a run, each (settings, world size, how far), resumed from the state before; yield each."""
    state, content = TrainState(), None
    for settings, world_size, how_far in parts:
        recipe = recipe_of(*settings)
        plan = plan_of(recipe, world_size, resumed=content)
        if content is not None:
            check_rest_of_epoch(content, recipe, plan, data_of(plan))
            state = TrainState.of(content)
        part = Part(plan, state, folder, **options).train(**how_far)
        content = content_of(recipe, plan, state)
        yield part


def parts_with(*settings):
    """Three resumptions: another batch within an epoch, then more processes, then accumulation within an epoch."""
    return [
        (settings, 1, {"num_steps": 16}),
        ([*settings, "--batch_size=20"], 1, {"until_epoch": 3}),
        ([*settings, "--batch_size=2"], 2, {"num_steps": 35}),
        ([*settings, "--batch_size=5", "--training.accumulation=4"], 1, {}),
    ]


@pytest.mark.parametrize("schedule", [COSINE, STEP, []], ids=["cosine", "step", "cyclic"])
def test_the_learning_rate_is_that_of_an_undisturbed_run_at_the_same_epoch(tmp_path, schedule):
    undisturbed = plan_of(recipe_of(*schedule, "--lr=0.7"))
    *parts, last = resumed_run(tmp_path, parts_with(*schedule, "--lr=0.7"))
    steps = [step for part in (*parts, last) for step in part.steps]
    assert [len(part.steps) for part in (*parts, last)] == [16, 2 + 5, 25 + 10, 3 + 5]
    fractions = [fraction for fraction, _ in steps]
    assert fractions == sorted(set(fractions)) and fractions[-1] == 5.8
    for fraction, lr in steps:
        assert lr == pytest.approx(undisturbed.lr_at(fraction * undisturbed.steps_per_epoch), rel=1e-9), fraction


def test_a_rate_that_follows_the_batch_keeps_its_shape(tmp_path):
    """Half way through six epochs at the peak of 0.025 the rate of twice the batch is twice as high, not a warm-up."""
    base = ["--lr.lr_schedule_type=cosine", "--lr.base_lr=0.64"]
    first, second = resumed_run(tmp_path, [(base, 1, {"until_epoch": 3}), ([*base, "--batch_size=20"], 1, {})])
    assert first.steps[0][1] == pytest.approx(0.025) and second.steps[0] == (3.0, pytest.approx(0.025))
    assert second.steps[-1][1] == pytest.approx(0.05 * (1 + np.cos(np.pi * 29 / 30)) / 2)


def test_an_unchanged_run_reads_whole_steps():
    """The schedule of a run that was not changed is read at ints, as an earlier version did, so no bit changes."""
    plan = plan_of(recipe_of(*COSINE, "--training.accumulation=3"))
    for step in range(plan.total_steps):
        epoch, number = divmod(step, plan.steps_per_epoch)
        at = plan.step_at(epoch, number * plan.global_batch_size)
        assert type(at) is int and at == step


def test_no_two_batches_of_a_run_are_seeded_alike(tmp_path):
    fewer = [(["--batch_size=5", "--training.accumulation=4"], 1, {"until_epoch": 2}), ([], 1, {"until_epoch": 4})]
    places = [place for part in resumed_run(tmp_path, fewer) for place in part.places]
    assert len(places) == len(set(places)) == 2 * 20 + 2 * 10, "numbers of batches would repeat"
    places = [place for part in resumed_run(tmp_path, parts_with()) for place in part.places]
    assert len(places) == len(set(places)) == 16 + 7 + 35 + 8 * 4
    whole = Part(plan_of(recipe_of()), TrainState(), tmp_path).train(until_epoch=2)
    (first, second) = resumed_run(tmp_path, [((), 1, {"num_steps": 13}), ((), 1, {"until_epoch": 2})])
    assert first.places + second.places == whole.places


def test_the_average_is_updated_and_the_run_saved_every_so_many_steps_through_all_changes(tmp_path):
    options = ["--training.save_every_steps=3"]
    parts = list(resumed_run(tmp_path, parts_with(*options), ema_every=3))
    updates = [updated for part in parts for updated in part.updates]
    assert updates == [number % 3 == 2 for number in range(len(updates))]
    ends_and_stops = {10, 16, 18, 23, 48, 58, 61, 66}
    saves = [step for part in parts for step in part.saves]
    assert saves == [step for step in range(3, 67, 3) if step not in ends_and_stops]


@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_stop_between_epochs_does_not_save_again(beton, tmp_path, num_steps):
    arguments = [f"--logging.folder={tmp_path}", "--model.arch=test_resnet", "--model.num_classes=61"]
    recipe = recipe_of(*arguments, f"--data.train_dataset={beton}", f"--data.val_dataset={beton}")
    part = Part(plan_of(recipe), TrainState(), tmp_path)
    data, point = open_training_data(recipe), ResumePoint(None, None, {}, ())
    lock = OwnerLock(tmp_path / "run.lock", "", "")
    folder = RunFolder(recipe, part.plan, data, part.trainer, part.state, point, recipe_meta_model(recipe), lock)
    last = folder.checkpoints.last
    with pytest.raises(Stopped), folder:
        part.state.finish_epoch({})
        folder.save_epoch(part.state, None)
        folder.finish()
        before = last.stat()
        part.state.step += num_steps
        raise Stopped(75)
    assert (last.stat() == before) == (num_steps == 0)
    assert torch.load(last, weights_only=True)["state"]["step"] == num_steps


def test_a_frozen_checkpoint_of_format_1_keeps_its_position_and_its_seeds():
    content = torch.load(FROZEN / "last.ckpt", weights_only=True)
    state = TrainState.of(content)
    assert (state.epoch, state.samples, state.step) == (1, content["state"]["batch"] * 8, 8)
    plan = make_plan(5, batch_size=8, accumulation=2, global_batch_size=16, samples_per_epoch=80)
    assert plan.step_at(state.epoch, state.samples) == state.step
    assert [batch_place(state, plan, number) for number in (0, 1)] == [(16,), (17,)]
    assert batch_place(TrainState(epoch=1, samples=48, step=8), plan, 1) == (1, 56)


def saved_within(*settings, world_size=1, samples=40, num_train=NUM_TRAIN):
    recipe = recipe_of(*settings)
    plan = plan_of(recipe, world_size, num_train)
    return content_of(recipe, plan, TrainState(epoch=2, samples=samples, step=24))


PAGES = "--data.order=quasi_random"


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ([], {"settings": ["--training.seed=3"]}, "training.seed was 0: with 3, .* Keep 0 until the epoch ends"),
        ([PAGES], {}, "data.order was quasi_random: with random"),
        ([], {"settings": [PAGES]}, "data.order was random: with quasi_random"),
        ([], {"settings": ["--augmentation.repeats=3"]}, "augmentation.repeats was 1: with 3"),
        ([], {"num_train": 104}, "the number of training images was 100: with 104"),
        ([PAGES], {"settings": [PAGES, "--batch_size=5"], "world_size": 2}, "the number of processes was 1: with 2"),
        ([PAGES], {"settings": [PAGES], "digest": "b"}, "the digest of data.train_dataset was a: with b"),
        ([], {"settings": ["--batch_size=7"], "world_size": 3}, "3 processes cannot share .* Start 1 processes until"),
    ],
)
def test_within_an_epoch_what_would_lose_or_repeat_images_is_refused(before, now, message):
    content = saved_within(*before)
    recipe = recipe_of(*now.get("settings", []))
    plan = plan_of(recipe, now.get("world_size", 1), now.get("num_train", NUM_TRAIN))
    data = data_of(plan, now.get("digest", "a"))
    with pytest.raises(UserError, match=f"within epoch 2, after 40 of its images, and .*{message}"):
        check_rest_of_epoch(content, recipe, plan, data)
    content["state"]["samples"] = 0
    check_rest_of_epoch(content, recipe, plan, data)


@pytest.mark.parametrize(
    ("before", "settings", "world_size"),
    [
        ([], ["--batch_size=7"], 1),
        ([], ["--batch_size=3", "--training.accumulation=2"], 4),
        ([PAGES], [PAGES, "--batch_size=7"], 1),
        (["--augmentation.repeats=2"], ["--augmentation.repeats=2", "--batch_size=4"], 2),
    ],
)
def test_within_an_epoch_another_global_batch_is_allowed(before, settings, world_size):
    recipe = recipe_of(*settings)
    plan = plan_of(recipe, world_size)
    check_rest_of_epoch(saved_within(*before), recipe, plan, data_of(plan))


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("positions") / "train.beton", photographs(61, 16), per_page=4)


@pytest.mark.parametrize(
    ("order", "repeats", "parts"),
    [
        ("RANDOM", 1, [(1, 8, 2), (2, 3, 3), (1, 11, 1), (3, 2, 9)]),
        ("QUASI_RANDOM", 1, [(2, 4, 2), (2, 7, 1), (2, 2, 9)]),
        ("RANDOM", 3, [(2, 4, 3), (1, 9, 2), (2, 2, 9)]),
    ],
)
def test_each_image_of_an_epoch_is_seen_once_though_its_parts_have_other_batches(beton, order, repeats, parts):
    """Parts are (ranks, batch size, most batches of each rank). Only the last incomplete batch is lost."""
    seen, samples = [], 0
    for world_size, batch_size, most in parts:
        assert samples % world_size == 0
        num_batches = 0
        for rank in range(world_size):
            with Loader(
                beton,
                batch_size,
                1,
                order=OrderOption[order],
                seed=4,
                rank=rank,
                world_size=world_size,
                distributed=True,
                repeats=repeats,
                pipelines={"image": None, "label": [Label()]},
            ) as loader:
                batches = [batch.tolist() for (batch,) in loader.epoch(2, skip_samples=samples // world_size)][:most]
                assert all(len(batch) == batch_size for batch in batches)
                seen += [label for batch in batches for label in batch]
                num_batches += len(batches)
        samples += num_batches * batch_size
    assert len(seen) == samples and 61 - samples < world_size * (batch_size + 1)
    assert max(np.bincount(seen)) <= repeats
    if repeats == 1:
        assert len(set(seen)) == samples


def notices(settings=(), *, before=(), world_size=1, num_train=NUM_TRAIN, samples=0):
    content, recipe = saved_within(*before, samples=samples), recipe_of(*settings)
    return list(position_notices(content, recipe, plan_of(recipe, world_size, num_train)))


def test_classes_with_other_numbers_are_refused_by_name():
    names = ["cat", "dog", "emu", "fox", "gnu"]
    for before, now in ((names, names), (None, names), (names, None)):
        check_classes({"classes": before}, SimpleNamespace(train=SimpleNamespace(classes=now, path="t.beton")))
    renumbered = SimpleNamespace(train=SimpleNamespace(classes=[*names[1:], "cat"], path="t.beton"))
    expected = (
        r"^t.beton numbers 5 of 5 classes differently than the run that is resumed: 0 was cat, and is dog; "
        r"1 was dog, and is emu; 2 was emu, and is fox; and 2 more\. Resume with the file of that run"
    )
    with pytest.raises(UserError, match=expected):
        check_classes({"classes": names}, renumbered)


@pytest.mark.parametrize(
    ("settings", "digest", "kept"),
    [([], "v", True), (["--validation.batch_size=7"], "v", True), (["--validation.lr_tta=0"], "v", False)]
    + [([], "w", False)],
)
def test_a_best_accuracy_of_other_images_or_settings_counts_no_more(settings, digest, kept):
    recipe, state = recipe_of(), TrainState(epoch=2, best_acc1=0.5, best_epoch=1)
    content = content_of(recipe, plan_of(recipe), state)
    content["data"]["val"] = {"digest": "v"}
    now, data = recipe_of(*settings), SimpleNamespace(val=SimpleNamespace(digest=digest))
    assert keeps_best(content, now, data) == kept
    notices = list(best_notices(content, now, data))
    assert len(notices) == (not kept) and all("50.000% in epoch 1, was measured on other" in line for line in notices)


def test_a_run_that_is_resumed_as_it_was_says_nothing_of_its_position():
    assert notices() == notices(COSINE, before=COSINE, samples=40) == []
    average = ["--training.ema_decay=0.9", "--training.ema_rescale=1"]
    assert notices(average, before=average) == []


def test_a_dry_run_has_the_global_batch_of_its_checkpoint(monkeypatch, capsys):
    no_data = ["--data.train_dataset=none.beton", "--data.val_dataset=none.beton"]
    recipe = recipe_of("--data.mean=0.5,0.5,0.5", "--data.std=0.2,0.2,0.2", "--model.arch=resnet18", *no_data)
    content = content_of(recipe, plan_of(recipe, world_size=2), TrainState(epoch=2, step=10))
    point = ResumePoint("runs/last.ckpt", content, {}, ())
    monkeypatch.setattr(dry_run, "choose_checkpoint", lambda recipe, world: point)
    dry_run.show_plan(recipe)
    out = capsys.readouterr().out
    assert ", resumed from runs/last.ckpt\n" in out and "10 (batch size) x 1 (processes) x 2 (accumulation) = 20" in out
    assert "an epoch now has 64,058 steps of 20 images, and had 5 of 20" in out


def test_other_epochs_are_said_with_what_they_do_to_the_rate():
    common = ["--lr.lr_schedule_type=cosine", "--lr=1"]
    assert notices([*common, "--epochs=8"], before=common) == [
        "the learning rate goes on at 0.853553, as in a run of 8 epochs with this recipe; the run that is resumed "
        "would have gone on at 0.75"
    ]
    assert notices(["--epochs=2"]) == [
        "nothing is left to train: the run has finished 2 epochs, and training.epochs is 2"
    ]


def test_another_length_of_an_epoch_is_said():
    at_rate = ["--lr=1"]
    assert notices([*at_rate, "--batch_size=20"], before=at_rate) == [
        "an epoch now has 5 steps of 20 images, and had 10 of 10; the schedules go on at the same place of epoch 2"
    ]
    (line,) = notices(num_train=120)
    assert line.startswith("an epoch now has 12 steps of 10 images, and had 10 of 10; ")


def test_another_pace_of_the_moving_average_is_said_with_the_decay_that_keeps_it():
    average = ["--lr=1", "--training.ema_decay=0.98", "--training.ema_every=2"]
    _, line = notices([*average, "--batch_size=20"], before=average)
    assert line == (
        "the moving average now has decay 0.98 every 40 images, and had 0.98 every 20; --training.ema_decay=0.9604 "
        "would average over as many images as before"
    )
    rescaled = [*average, "--training.ema_rescale=1"]
    (*_, line) = notices([*rescaled, "--epochs=8"], before=rescaled)
    assert line == "the moving average now has decay 0.95 every 20 images, and had 0.933333 every 20"


def test_after_a_stop_in_validation_the_line_of_the_epoch_has_the_pace_of_its_training(tmp_path):
    plan = plan_of(recipe_of())
    first = Part(plan, TrainState(), tmp_path)
    stop = StopRequest(World())
    log = RunLog(tmp_path, True, eta=EtaEstimator([8] * 6, plan.steps_per_epoch))
    whole = train_epoch(first.trainer, first, first.state, plan, log, stop=stop, save=lambda state: None)
    content = content_of(recipe_of(), plan, first.state)
    num_images, elapsed_s, *_ = first.state.pace
    assert num_images == 100 and elapsed_s > 0
    half = plan_of(recipe_of("--batch_size=5"), resumed=content)
    for resumed_plan, steps in ((plan, 1), (half, 0.5)):
        state = TrainState.of(content)
        part = Part(resumed_plan, state, tmp_path)
        values = train_epoch(part.trainer, part, state, resumed_plan, log, stop=stop, save=lambda state: None)
        assert not part.places and values["images_per_s"] == pytest.approx(100 / elapsed_s)
        assert values["step_s"] == pytest.approx(steps * elapsed_s / 10)
    content["state"]["pace"] = []  # as from an earlier version
    state = TrainState.of(content)
    values = train_epoch(first.trainer, first, state, plan, log, stop=stop, save=lambda state: None)
    assert not {"images_per_s", "step_s", "data_wait"} & values.keys() and values["train/loss"] == whole["train/loss"]
    log.open(state, {"recipe": {"wandb": {"enable": False}}})
    state.finish_epoch({})
    log.epoch(state, values)
    log.close()
    assert "images/s" not in (tmp_path / f"{state.run_name}.log").read_text()
