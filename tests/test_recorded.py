"""Recorded steps against plain steps, to the bit, by a recorder that obeys the rules of CUDA graphs."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from recording import BrokenRecorder, ForgetfulRecorder, TapeRecorder
from timm.layers import DropPath
from torch import nn

from imagenet_training.distributed import World
from imagenet_training.reports.logs import RunLog
from imagenet_training.training.loss import soft_target_cross_entropy
from imagenet_training.training.meters import EtaEstimator
from imagenet_training.training.optim import build_ema, build_optimizer, parameter_groups
from imagenet_training.training.recorded import RecordedStep, Snapshot
from imagenet_training.training.step_mode import (
    COMPILED,
    COMPILED_GRAPH,
    EAGER,
    GRAPH,
    MODES,
    candidate_modes,
    fastest_mode,
    kept_mode,
    prepare_step,
)
from imagenet_training.training.trainer import Trainer

CPU = torch.device("cpu")
WORLD = World()
NUM_CLASSES, BATCH_SIZE = 5, 6


class Network(nn.Module):
    """A residual block with batch normalisation, drop path and dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.bn, self.drop_path, self.dropout = nn.BatchNorm2d(8), DropPath(0.4), nn.Dropout(0.3)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, images):
        features = self.bn(self.stem(images)).relu()
        features = features + self.drop_path(self.conv(features))
        return self.fc(self.dropout(features.mean((2, 3))))


def make_trainer(optimizer="sgd", *, init_scale=0.0, ema_decay=0.9, model=None, **options):
    torch.manual_seed(0)
    model = (model or Network()).to(memory_format=torch.channels_last)
    groups = parameter_groups(model, 1e-2, bn_wd=0.0)
    groups[0]["lr_scale"] = 0.7
    if optimizer == "sgd":
        built = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
        for parameter in model.parameters():
            built.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif optimizer == "adamw":
        built = torch.optim.AdamW(groups, lr=0.1, fused=True)
    else:
        built = build_optimizer(model, optimizer, lr=0.1, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale or 2.0, enabled=bool(init_scale), growth_interval=2)
    return Trainer(
        model=model,
        ema=build_ema(model, ema_decay),
        optimizer=built,
        scaler=scaler,
        world=WORLD,
        loss=soft_target_cross_entropy,
        num_classes=NUM_CLASSES,
        **{"precision": "32", **options},
    )


def batch(number, size_px=8):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(BATCH_SIZE, 3, size_px, size_px, generator=generator)
    labels = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), F.one_hot(labels, NUM_CLASSES).float()


def take_steps(trainer, steps, size_px=8):
    """Train on batches that depend on the numbers of the steps, and return losses and logits."""
    seen = []
    for step in steps:
        for number in range(trainer.accumulation):
            images, targets = batch(step * trainer.accumulation + number, size_px)
            images = images.to(trainer.image_dtype)
            results = trainer.backward(images, targets, number=number, place=(0, step, number))
            seen += [value.clone() for value in results]
        trainer.optimizer_step(0.1 / (step + 1), step=step)
    return seen


def content(trainer):
    """Return everything that a checkpoint keeps of a trainer."""
    return {
        "model": dict(trainer.model.state_dict()),
        "ema": dict(trainer.ema.state_dict()) if trainer.ema is not None else {},
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
    }


def assert_equal(ours, theirs):
    """Compare nested values, tensors to the bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def record(trainer, recorder=None):
    trainer.train_mode()
    images, targets = (torch.empty_like(part) for part in batch(0))
    images = images.to(trainer.image_dtype).normal_()
    trainer.recorded = RecordedStep(trainer, recorder or TapeRecorder(), images, targets.fill_(1 / NUM_CLASSES))
    return trainer.recorded


CASES = [
    {},
    {"accumulation": 3, "grad_clip": 0.05, "ema_every": 2},
    {"optimizer": "adamw", "agc": 0.01, "head": frozenset({"fc.weight", "fc.bias"})},
    {"optimizer": "adamw", "accumulation": 2, "init_scale": 2.0**10, "grad_clip": 1.0},
    {"init_scale": 2.0**10, "ema_decay": 0.0},
    {"precision": "bf16-mixed"},
    {"optimizer": "lamb", "accumulation": 2},
    {"channels_last": False},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options)) or "plain")
def test_a_recorded_step_is_the_plain_step(options):
    plain, ours = make_trainer(**options), make_trainer(**options)
    before = copy.deepcopy(content(ours))
    recorded = record(ours)
    assert (recorded.update is None) == (options.get("optimizer") == "lamb")
    if options.get("optimizer", "sgd") == "sgd":
        assert_equal(content(ours), before)  # the trial steps left no trace
    plain.train_mode()
    assert_equal(take_steps(ours, range(7)), take_steps(plain, range(7)))
    assert_equal(content(ours), content(plain))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_overflow_at_the_first_step_skips_it_and_halves_the_scale(optimizer):
    plain, ours = (make_trainer(optimizer, init_scale=2.0**127, ema_decay=0.0) for _ in range(2))
    for trainer in (plain, ours):
        trainer.loss = lambda outputs, targets: 100 * soft_target_cross_entropy(outputs, targets)
    before = copy.deepcopy(dict(ours.model.named_parameters()))
    record(ours)
    plain.train_mode()
    assert_equal(take_steps(ours, range(1)), take_steps(plain, range(1)))
    assert ours.scaler.get_scale() == 2.0**126
    assert all(torch.equal(value, before[name]) for name, value in ours.model.named_parameters())
    assert_equal(take_steps(ours, range(1, 20)), take_steps(plain, range(1, 20)))
    assert_equal(content(ours), content(plain))


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "init_scale": 2.0**10, "accumulation": 2}], ids=str)
def test_a_recorded_run_resumes_to_the_bit(options):
    whole = make_trainer(**options)
    record(whole)
    take_steps(whole, range(3))
    saved = copy.deepcopy(content(whole))
    groups = saved["optimizer"]["param_groups"]
    assert all(not isinstance(value, torch.Tensor) for group in groups for value in group.values())
    later = take_steps(whole, range(3, 7))

    resumed = make_trainer(**options)
    resumed.model.load_state_dict(saved["model"])
    resumed.ema.load_state_dict(saved["ema"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"]:
        resumed.scaler.load_state_dict(saved["scaler"])
    record(resumed)
    assert_equal(content(resumed), saved)
    assert_equal(take_steps(resumed, range(3, 7)), later)
    assert_equal(content(resumed), content(whole))


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, True, eta=EtaEstimator([8], 1), log_every=0)


def test_every_resolution_is_recorded_again(log, capsys):
    plain, ours = make_trainer(), make_trainer(modes=(GRAPH,))
    plain.train_mode()
    recorder = TapeRecorder()
    for start, size_px in ((0, 8), (3, 12)):
        before = ours.recorded
        assert prepare_step(ours, BATCH_SIZE, size_px, log, recorder=recorder) == "graph"
        assert ours.recorded not in (None, before) and ours.recorded.images.shape[2] == size_px
        again = ours.recorded
        prepare_step(ours, BATCH_SIZE, size_px, log, recorder=recorder)  # the next epoch, of the same size
        assert ours.recorded is again
        steps = range(start, start + 3)
        assert_equal(take_steps(ours, steps, size_px), take_steps(plain, steps, size_px))
    assert_equal(content(ours), content(plain))
    assert re.findall(r"recorded for (\d+) px in \d+ s", capsys.readouterr().out) == ["8", "12"]


@pytest.mark.parametrize("num_successes", [0, 1, 2])
def test_what_cannot_be_recorded_is_left_out_with_a_note(log, capsys, num_successes):
    plain, ours = make_trainer(init_scale=4.0), make_trainer(init_scale=4.0, modes=(GRAPH,))
    plain.train_mode()
    assert prepare_step(ours, BATCH_SIZE, 8, log, recorder=BrokenRecorder(num_successes)) == "eager"
    assert ours.recorded is None
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    assert note.endswith(
        "the step could not be recorded, the mode is now eager "
        "(RuntimeError: operation not permitted when stream is capturing)"
    )
    assert_equal(take_steps(ours, range(3)), take_steps(plain, range(3)))
    assert_equal(content(ours), content(plain))


@pytest.mark.parametrize("forgotten", [0, 1, 2])
def test_replays_that_differ_from_the_plain_step_are_not_used(log, capsys, forgotten):
    options = {"accumulation": 2, "modes": (GRAPH,)}
    plain, ours = make_trainer(**options), make_trainer(**options)
    plain.train_mode()
    assert prepare_step(ours, BATCH_SIZE, 8, log, recorder=ForgetfulRecorder(forgotten)) == "eager"
    assert "RuntimeError: replayed steps differ from plain ones" in capsys.readouterr().out
    assert_equal(take_steps(ours, range(2)), take_steps(plain, range(2)))
    assert_equal(content(ours), content(plain))


class Peeking(Network):
    """A network whose host reads a value of a tensor."""

    def forward(self, images):
        logits = super().forward(images)
        return logits * (2.0 if images.mean().item() > 0 else 1.0)


def test_a_model_that_reads_its_values_is_not_recorded(log, capsys):
    ours = make_trainer(model=Peeking(), modes=(GRAPH,))
    assert prepare_step(ours, BATCH_SIZE, 8, log, recorder=TapeRecorder()) == "eager"
    assert "the host reads the value of a tensor" in capsys.readouterr().out


def test_the_measured_choice_leaves_no_trace_but_its_line(log, capsys):
    plain, ours = make_trainer(init_scale=4.0), make_trainer(init_scale=4.0, modes=(EAGER, GRAPH))
    plain.train_mode()
    before = copy.deepcopy(content(ours))
    name = prepare_step(ours, BATCH_SIZE, 8, log, recorder=TapeRecorder())
    assert ours.modes == (MODES[name],) and (ours.recorded is not None) == (name == "graph")
    assert re.search(
        rf"mode of the step: {name}; measured at 8 px, images/s: eager [\d,]+, graph [\d,]+\n", capsys.readouterr().out
    )
    assert_equal(content(ours), before)
    assert_equal(take_steps(ours, range(4)), take_steps(plain, range(4)))
    assert_equal(content(ours), content(plain))


def test_a_snapshot_undoes_what_an_optimizer_adds():
    trainer = make_trainer("lamb")
    before = copy.deepcopy(trainer.optimizer.state_dict()["param_groups"])
    snapshot = Snapshot(trainer)
    trainer.train_mode()
    take_steps(trainer, range(2))
    snapshot.restore()
    assert_equal(trainer.optimizer.state_dict()["param_groups"], before)
    assert not any(value.any() for state in trainer.optimizer.state.values() for value in state.values())
    assert trainer.ema.n_averaged == 0


def test_the_fastest_mode_is_taken_unless_a_simpler_one_is_as_fast():
    modes = [EAGER, GRAPH, COMPILED, COMPILED_GRAPH]

    def choose(*speeds):
        def measure(mode):
            speed = speeds[modes.index(mode)]
            if isinstance(speed, Exception):
                raise speed
            return speed

        return fastest_mode(modes, measure)

    assert choose(1000, 1100, 1300, 1400) == (
        COMPILED_GRAPH,
        "eager 1,000, graph 1,100, compiled 1,300, compiled-graph 1,400",
    )
    assert choose(1000, 1005, 1300, 1305)[0] == COMPILED
    assert choose(1000, 1005, 990, 800)[0] == EAGER
    mode, figures = choose(1000, RuntimeError("no capture\nmore"), 900, torch.OutOfMemoryError("too much"))
    assert mode == EAGER
    assert figures == (
        "eager 1,000, graph failed (RuntimeError: no capture), compiled 900, "
        "compiled-graph failed (OutOfMemoryError: too much)"
    )
    with pytest.raises(torch.OutOfMemoryError):
        choose(torch.OutOfMemoryError("eager"), 1, 1, 1)


def test_a_resumed_run_keeps_the_mode_that_was_found():
    assert kept_mode((EAGER, GRAPH, COMPILED), "graph") == (GRAPH,)
    assert kept_mode((EAGER, GRAPH), "compiled") == (EAGER, GRAPH)
    assert kept_mode((COMPILED,), "eager") == (COMPILED,)
    assert kept_mode((EAGER, GRAPH), "") == (EAGER, GRAPH)


def test_which_modes_a_run_may_use(monkeypatch):
    gpu = World(device=torch.device("cuda", 0))
    ranks = World(world_size=2, device=torch.device("cuda", 0))
    monkeypatch.setattr("imagenet_training.training.step_mode.can_compile", lambda device: device.type == "cuda")
    assert candidate_modes("auto", WORLD, 10**6) == ((EAGER,), [])
    assert candidate_modes("auto", gpu, 10) == ((EAGER,), [])
    assert candidate_modes("auto", gpu, 1000) == ((EAGER, GRAPH), [])
    assert candidate_modes("auto", gpu, 10**6) == ((EAGER, GRAPH, COMPILED, COMPILED_GRAPH), [])
    assert candidate_modes("auto", gpu, 10**6, deterministic=True) == ((GRAPH,), [])
    assert candidate_modes("auto", ranks, 10**6) == ((COMPILED,), [])
    assert candidate_modes("auto", ranks, 10**6, deterministic=True) == ((EAGER,), [])
    assert candidate_modes(False, gpu, 10**6) == ((EAGER,), [])
    assert candidate_modes(True, WORLD, 1) == ((COMPILED,), [])
    assert candidate_modes("compiled-graph", gpu, 1) == ((COMPILED_GRAPH,), [])
    (mode,), (notice,) = candidate_modes("compiled-graph", ranks, 1)
    assert mode == COMPILED and "several processes" in notice
    (mode,), (notice,) = candidate_modes("graph", WORLD, 1)
    assert mode == EAGER and "there is no GPU" in notice
