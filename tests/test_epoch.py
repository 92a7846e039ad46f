"""One epoch on tensors: gradients, accumulation, metrics, faults."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plans import make_plan
from torch import nn

from ffcv_ops.errors import UserError
from imagenet_training.data.classes import ClassMatch
from imagenet_training.distributed import World
from imagenet_training.models.precision import allow_tf32
from imagenet_training.planning.plan import plan_run
from imagenet_training.planning.recipe import read_recipe
from imagenet_training.reports.logs import RunLog
from imagenet_training.state import TrainState
from imagenet_training.training.epoch import calling_at_last, evaluate, measure, train_epoch
from imagenet_training.training.failures import RunError, ending_with_status, out_of_memory_message
from imagenet_training.training.loss import soft_target_cross_entropy
from imagenet_training.training.meters import (
    AccuracyMeter,
    EtaEstimator,
    NonFiniteGuard,
    PredictionRecorder,
    StepClock,
    accuracy_metrics,
)
from imagenet_training.training.optim import build_optimizer
from imagenet_training.training.preemption import Stopped, StopRequest
from imagenet_training.training.step_mode import COMPILED, EAGER
from imagenet_training.training.trainer import Trainer, build_trainer, infinite_buffers, make_deterministic

WORLD = World()


class Batches:
    """A loader over tensors, with the interface of the real one."""

    storage_wait_s = 0.0

    def __init__(self, images, targets, batch_size):
        self.images, self.targets, self.batch_size = images, targets, batch_size

    def epoch(self, epoch, *, skip_samples=0):
        rest = (values[skip_samples:].split(self.batch_size) for values in (self.images, self.targets))
        return zip(*rest, strict=True)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))


def make_trainer(model, **options):
    return Trainer(
        model=model,
        ema=None,
        optimizer=build_optimizer(model, lr=0.1, momentum=0.9),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        world=WORLD,
        loss=soft_target_cross_entropy,
        precision="32",
        **options,
    )


def run_epoch(trainer, batches, state, tmp_path, steps, *, save=lambda state: None, stop=None, **options):
    log = RunLog(tmp_path, True, eta=EtaEstimator([8, 8], steps), log_every=options.pop("log_every", 0))
    sizes = {"batch_size": batches.batch_size, "accumulation": trainer.accumulation}
    global_batch_size = batches.batch_size * trainer.accumulation
    sizes |= {"global_batch_size": global_batch_size, "samples_per_epoch": steps * global_batch_size}
    plan = make_plan(steps, **{"lr_at": lambda step: 0.1 / (step + 1), **sizes, **options})
    return train_epoch(trainer, batches, state, plan, log, stop=stop or StopRequest(WORLD), save=save)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    labels = torch.randint(6, (24,), generator=generator)
    return images, F.one_hot(labels, 6).float(), labels


def test_an_epoch_is_plain_sgd(data, tmp_path):
    images, targets, labels = data
    model, twin = small_model(), small_model()
    state = TrainState()
    values = run_epoch(make_trainer(model), Batches(images, targets, 8), state, tmp_path, steps=3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    losses, hits = [], 0
    for step, (x, y) in enumerate(zip(images.split(8), labels.split(8), strict=True)):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        logits = twin(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hits += (logits.argmax(1) == y).sum().item()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert values["train/loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert values["train/acc1"] == pytest.approx(hits / 24)
    assert values["lr"] == pytest.approx(0.1 / 3)
    assert (state.step, state.samples) == (3, 24)


def test_accumulation_equals_the_larger_batch(data, tmp_path):
    images, targets, _ = data
    whole, parts = small_model(), small_model()
    run_epoch(make_trainer(whole), Batches(images, targets, 12), TrainState(), tmp_path, steps=2)
    state = TrainState()
    run_epoch(make_trainer(parts, accumulation=3), Batches(images, targets, 4), state, tmp_path, steps=2)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (state.step, state.samples) == (2, 24)


def test_clipping_bounds_the_step(data, tmp_path):
    images, targets, _ = data
    model = small_model()
    before = [parameter.clone() for parameter in model.parameters()]
    run_epoch(make_trainer(model, grad_clip=1e-3), Batches(images * 50, targets, 24), TrainState(), tmp_path, steps=1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_adaptive_clipping_bounds_each_unit_by_its_weights(data, tmp_path):
    images, targets, _ = data
    model = small_model()
    before = [parameter.clone() for parameter in model.parameters()]
    head = frozenset({f"{len(model) - 1}.weight", f"{len(model) - 1}.bias"})
    trainer = make_trainer(model, agc=0.01, head=head)
    run_epoch(trainer, Batches(images * 50, targets, 24), TrainState(), tmp_path, steps=1)
    weight, was = model[0].weight, before[0]
    moved = (weight - was).flatten(1).norm(dim=1)
    bound = 0.1 * 0.01 * was.flatten(1).norm(dim=1)
    assert (moved <= bound * 1.001).all() and moved.max() > 0.5 * bound.max()
    head, was = model[-1].weight, before[-2]
    assert ((head - was).norm(dim=1) > 0.1 * 0.01 * was.norm(dim=1)).any(), "the head is not clipped"


@pytest.mark.parametrize(("arch", "layers"), [("squeezenet1_0", {"classifier.1"}), ("test_resnet", {"fc"})])
def test_adaptive_clipping_leaves_out_the_layers_of_the_classes(arch, layers):
    recipe = read_recipe([f"--model.arch={arch}", "--model.num_classes=10", "--training.agc=0.01", "--batch_size=8"])
    plan = plan_run(recipe, world_size=1, num_train=64, num_val=8, device_type="cpu")
    assert build_trainer(recipe, plan, WORLD).head == {
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }


def test_an_interrupted_epoch_goes_on_to_the_bit(data, tmp_path):
    images, targets, _ = data
    batches = Batches(images, targets, 4)
    whole = small_model()
    expected = run_epoch(make_trainer(whole), batches, TrainState(), tmp_path, steps=6)
    model, state, saved = small_model(), TrainState(), {}
    trainer = make_trainer(model)

    def save(state):
        saved["state"] = TrainState(**vars(state))
        saved["model"] = {name: value.clone() for name, value in model.state_dict().items()}
        saved["optimizer"] = trainer.optimizer.state_dict()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_epoch(trainer, batches, state, tmp_path, steps=6, save=save, save_every_steps=4)
    assert saved["state"].samples == 16
    resumed = small_model()
    resumed.load_state_dict(saved["model"])
    trainer = make_trainer(resumed)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    values = run_epoch(trainer, batches, saved["state"], tmp_path, steps=6)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert {k: values[k] for k in ("train/loss", "train/acc1", "lr")} == {
        k: expected[k] for k in ("train/loss", "train/acc1", "lr")
    }


def test_a_loss_that_is_not_finite_stops_within_a_few_steps(data, tmp_path):
    images, targets, _ = data
    images = images.clone()
    images[8:] = float("nan")
    state = TrainState()
    with pytest.raises(RunError, match=r"step 5 .*, lr 0\.02\).*--lr 0\.05\).*grad_clip"):  # half of the peak
        run_epoch(make_trainer(small_model()), Batches(images, targets, 4), state, tmp_path, steps=6)


@pytest.mark.parametrize("moment", ["save", "stop", "end"])
def test_weights_that_are_lost_are_not_saved(data, tmp_path, monkeypatch, moment):
    images, targets, _ = data
    trainer, saved = make_trainer(small_model()), []
    options = {"save": lambda state: saved.append(1), "save_every_steps": 3 * (moment == "save")}
    options["lr_at"] = lambda step: 0.1 if step < 2 else float("nan")  # the losses of three steps are finite
    state, stop = TrainState(), StopRequest(WORLD)
    monkeypatch.setattr(stop, "agreed", lambda: moment == "stop" and state.step == 3)
    with pytest.raises(RunError, match=r"step 3 .*--resume the last checkpoint, which is from before"):
        steps = 3 if moment == "end" else 4
        run_epoch(trainer, Batches(images, targets, 6), state, tmp_path, steps=steps, stop=stop, **options)
    assert not saved


def test_only_losses_in_a_row_stop_a_run():
    check = NonFiniteGuard(torch.device("cpu"))
    bad, good = torch.tensor(float("inf")), torch.tensor(1.0)
    assert not any(check.fails(loss) for loss in (bad, bad, good, bad, good, bad, bad))
    assert check.fails(bad)


def test_progress_is_said_and_steps_end_with_the_plan(data, tmp_path, capsys):
    images, targets, _ = data
    state = TrainState()
    run_epoch(make_trainer(small_model()), Batches(images, targets, 4), state, tmp_path, steps=5, log_every=2)
    lines = capsys.readouterr().out.splitlines()
    assert state.step == 5
    assert lines.pop(2).startswith("expected from the first steps, at 8 px")
    assert [line.split()[3] for line in lines] == ["2/5", "4/5"]
    assert all("images/s" in line and "data wait" in line and "to go" in line for line in lines)


def test_evaluation_counts_each_sample(data):
    images, _, labels = data
    model = small_model()
    loader = list(zip(images.split(7), labels.split(7), strict=True))
    values = measure(model, loader, WORLD, num_samples=24, precision="32")
    with torch.no_grad():
        logits = model.eval()(images)
    assert values["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert values["val/acc1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    top5 = logits.topk(5).indices
    assert values["val/acc5"] == pytest.approx((top5 == labels[:, None]).any(1).float().mean().item())
    with pytest.raises(RunError, match="counted 24 samples of a split of 25"):
        measure(model, loader, WORLD, num_samples=25, precision="32")


def test_evaluation_takes_down_each_sample_under_its_id(data):
    images, _, labels = data
    model, order = small_model(), np.random.default_rng(0).permutation(24)
    loader = list(zip(images[order].split(7), labels[order].split(7), strict=True))
    samples = PredictionRecorder(WORLD.device, order, 24)
    values = measure(model, loader, WORLD, num_samples=24, precision="32", recorder=samples)
    loss, predicted, confidence = samples.gather().T
    with torch.no_grad():
        logits = model.eval()(images)
    np.testing.assert_allclose(loss, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(predicted, logits.argmax(1))
    np.testing.assert_allclose(confidence, logits.softmax(1).amax(1), rtol=1e-4)
    assert values["val/acc1"] == pytest.approx(np.mean(predicted == labels.numpy()))


def test_flipped_evaluation_averages_both_views(data):
    images, _, labels = data
    model = small_model()
    values = measure(model, [(images, labels)], WORLD, num_samples=24, precision="32", flip=True)
    with torch.no_grad():
        logits = (model.eval()(images) + model(images.flip(3))) / 2
    assert values["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


class FullMemory(nn.Module):
    def forward(self, images):
        raise torch.OutOfMemoryError(f"{len(images)} images")


class Split(list):
    """Batches of images and labels, with the interface of a loader."""

    def __init__(self, images, labels):
        super().__init__([(images, labels)])
        self.beton, self.batch_size = SimpleNamespace(num_samples=len(labels), labels=labels.numpy()), len(labels)

    def next_traversal_order(self):
        return np.arange(self.batch_size)


def test_a_saved_run_that_ends_ignores_another_ctrl_c(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="75"), ending_with_status(make_plan(), WORLD, RunLog(tmp_path, True)):
            raise Stopped(75)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_memory_that_runs_out_in_training_names_a_smaller_batch_if_there_is_one():
    plan = make_plan(batch_size=6, global_batch_size=12, world_size=2)
    assert "Try --batch_size 3: its linearly scaled learning rate is 0.05" in out_of_memory_message(plan)
    assert "--batch_size 3 --training.accumulation=2" in out_of_memory_message(plan)
    assert "end what else uses it" in out_of_memory_message(make_plan(batch_size=1, global_batch_size=1))


def test_memory_that_runs_out_in_an_evaluation_names_its_own_batch_size(data, tmp_path):
    trainer, split, log = make_trainer(small_model()), Split(data[0], data[2]), RunLog(tmp_path, True)
    options = {"epoch": 0, "classes": ClassMatch(None)}
    settings = read_recipe(["--validation.batch_size=24", "--training.precision=32"]).validation
    assert evaluate(trainer, split, log, settings=settings, **options).values["val/loss"] > 0
    trainer.model = FullMemory()
    with pytest.raises(RunError, match=r"out of GPU memory in the evaluation.*try --validation.batch_size=12"):
        evaluate(trainer, split, log, settings=settings, **options)


def test_fewer_than_five_classes():
    meter = AccuracyMeter(torch.device("cpu"))
    logits, labels = torch.eye(3), torch.arange(3)
    meter.add(F.cross_entropy(logits, labels), logits, labels)
    assert accuracy_metrics(meter.totals(), "val")["val/acc5"] == 1.0


def test_images_in_the_weights_format_are_not_copied():
    channels_last = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    trainer = make_trainer(small_model())
    assert trainer.to_memory_format(channels_last).data_ptr() == channels_last.data_ptr()
    plain = make_trainer(small_model(), channels_last=False).to_memory_format(channels_last)
    assert plain.is_contiguous() and torch.equal(plain, channels_last)


def test_infinities_from_the_start_are_no_fault():
    model = small_model()
    model.register_buffer("limit", torch.tensor(torch.inf))
    model.register_buffer("average", torch.tensor(0.0))
    trainer = make_trainer(model, infinite=infinite_buffers(model))
    assert trainer.infinite == {"limit"} and trainer.is_finite()
    model.average.fill_(torch.inf)
    assert not trainer.is_finite()
    model.average.fill_(0.0)
    model[0].weight.detach()[0, 0] = torch.nan
    assert not trainer.is_finite()


def test_waits_are_those_between_batches():
    def slow():
        for number in range(3):
            time.sleep(0.1)
            yield number

    clock, loader = StepClock(torch.device("cpu"), images_per_step=10), SimpleNamespace(storage_wait_s=0.0)
    for number in clock.watch(slow(), loader):
        clock.num_images, clock.num_steps = 10 * (number + 1), number + 1
        time.sleep(0.2)
    rates = clock.rates()
    assert 0.3 <= clock.wait_s < 0.8
    assert rates["data_wait"] == pytest.approx(clock.wait_s / (3 * rates["step_s"]), rel=0.01)
    assert rates["images_per_s"] == pytest.approx(10 / rates["step_s"])
    assert clock.peak_memory() == {}


def test_the_part_of_a_wait_in_which_the_loader_waited_for_storage_is_named():
    loader = SimpleNamespace(storage_wait_s=7.0)

    def slow():
        for for_storage in (0.0, 0.1, 0.1):
            time.sleep(0.1)
            loader.storage_wait_s += for_storage
            yield 1
        time.sleep(0.1)

    clock = StepClock(torch.device("cpu"), images_per_step=1)
    for _ in clock.watch(slow(), loader):
        loader.storage_wait_s += 5  # while nobody waited
        clock.num_images = clock.num_steps = clock.num_steps + 1
    rates = clock.rates()
    assert 0.2 <= clock.storage_wait_s <= 0.3 and clock.wait_s == pytest.approx(clock.host_wait_s, abs=0.01)
    assert rates["data_wait_storage"] / rates["data_wait"] == pytest.approx(2 / 3, abs=0.15)
    assert len(clock.sums()) == 4
    resumed = StepClock(torch.device("cpu"), 1, [10, 2.0, 1.0])  # as a checkpoint from before
    assert resumed.rates() == {"images_per_s": 5.0, "data_wait": 0.5, "step_s": 0.2}


def test_the_next_pipeline_begins_before_the_last_batch_is_used():
    used, called = [], []
    for batch in calling_at_last(iter("abcd"), 3, lambda: called.append(list(used))):
        used.append(batch)
    assert used == list("abcd") and called == [["a", "b"]]
    assert list(calling_at_last("ab", 2, None)) == ["a", "b"]


def test_the_estimate_counts_evaluations_and_larger_images():
    eta = EtaEstimator([100, 100, 200], steps_per_epoch=10, eval_steps=4)
    assert eta.remaining_s(0, 5, step_s=2.0) == (5 + 10 + 40) * 2 + 3 * 4 * 2
    eta.pause_s = 100.0
    assert eta.remaining_s(1, 10, step_s=2.0) == 40 * 2 + 2 * 100
    assert eta.remaining_s(2, 10, step_s=8.0) == 100


def test_a_deterministic_run_takes_no_kernel_by_its_time(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic(True, [EAGER, COMPILED])
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and inductor.deterministic
        make_deterministic(False, [COMPILED])
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
        monkeypatch.setattr(torch._inductor, "config", SimpleNamespace())
        with pytest.raises(UserError, match="pass --training.compile=graph or 0"):
            make_deterministic(True, [COMPILED])
    finally:
        torch.use_deterministic_algorithms(False)


def test_tf32_is_what_the_recipe_says():
    try:
        for allowed in (True, False):
            allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
            if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
                assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def test_a_warm_up_leaves_no_trace(data, tmp_path):
    images, targets, _ = data
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = make_trainer(network)
    assert trainer.warm_up((4, 3, 8, 8)) is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(not state["momentum_buffer"].any() for state in trainer.optimizer.state.values())
    assert "expected input" in str(trainer.warm_up((4, 2, 8, 8)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
