from dataclasses import replace

import numpy as np
import pytest
import timm.data.mixup
import torch
from ffcv.pipeline.state import State
from ffcv.transforms import ToTensor
from scipy import stats
from sklearn.datasets import load_sample_images

from ffcv_ops.loading.loader import Loader, OrderOption
from ffcv_ops.operations.base import Batch
from ffcv_ops.operations.crops import CenterCrop
from ffcv_ops.operations.erasing import RandomErasing
from ffcv_ops.operations.mix import Mix, MixDraw, cut_boxes, dense_targets_into, draw_mix, mix_pairs, mix_tensor
from ffcv_ops.operations.normalize import Label, Normalize
from ffcv_ops.operations.rand_augment import RandAugment
from ffcv_ops.operations.threads import WorkerPool
from tests.betons import photographs as photographs_of
from tests.betons import write_images
from tests.reference import mixed_images, mixed_targets

BOTH = dict(mixup_alpha=0.2, cutmix_alpha=1.0)
SIZE = (24, 20)


def photographs(num_images, size=SIZE):
    """Different crops of two photographs: uint8 (N, H, W, 3)."""
    sources = load_sample_images().images
    corners = np.random.default_rng(0).integers(0, 300, (num_images, 2))
    crops = [sources[i % 2][y : y + size[0], x : x + size[1]] for i, (y, x) in enumerate(corners)]
    return np.ascontiguousarray(np.stack(crops))


def batch_of(sample_ids, seed=0, epoch=0, num_workers=1):
    return Batch(seed, epoch, np.asarray(sample_ids), WorkerPool(num_workers), storage=None)


def plans(per, num_samples=7, size=SIZE, count=6, **settings):
    ids = np.arange(num_samples)
    return [draw_mix(seed, 0, ids, size, per=per, **(BOTH | settings)) for seed in range(count)]


def declare(operation, shape, dtype=torch.uint8):
    state = State(jit_mode=False, device=torch.device("cpu"), shape=shape, dtype=dtype)
    return operation.declare_state_and_memory(state)


def targets_of(labels, plan, num_classes, smoothing=0.0):
    targets = torch.empty(len(labels), num_classes)
    dense_targets_into(torch.as_tensor(labels), plan, smoothing, targets)
    return targets


def run_kernel(images, plan, kernel=mix_pairs):
    mixed = images.copy()
    rows = mixed.reshape(*mixed.shape[:2], -1)
    scratch = np.empty((1, 2, rows.shape[2]), dtype=np.float32)
    kernel(0, np.zeros(1, dtype=np.int64), rows, plan.box, plan.own_weight, scratch)
    return mixed


# --- the plan


def test_plan_is_a_function_of_seed_epoch_and_samples():
    def drawn(seed=3, epoch=5, ids=(4, 9, 2, 7), **settings):
        plan = draw_mix(seed, epoch, np.array(ids), SIZE, **(BOTH | settings))
        return tuple(plan.lam.tolist()), tuple(plan.box.ravel().tolist())

    assert drawn() == drawn()
    variants = [drawn(), drawn(seed=4), drawn(epoch=6), drawn(ids=(9, 4, 2, 7)), drawn(per="element")]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
@pytest.mark.parametrize("per", ["batch", "element"])
def test_plan_shapes(num_samples, per):
    for plan in plans(per, num_samples, count=4):
        assert plan.lam.dtype == np.float32 and plan.lam.shape == plan.use_cutmix.shape == (num_samples,)
        assert plan.box.shape == (num_samples, 4)
        if per == "batch":
            assert len(set(plan.lam)) == len(set(map(tuple, plan.box))) == 1


@pytest.mark.parametrize("size", [(224, 224), (160, 192), (7, 9)])
def test_boxes_are_timms(size, monkeypatch):
    draws = np.random.default_rng(1)
    lam, centre = draws.beta(1.0, 1.0, 500), draws.random((2, 500))
    boxes, kept = cut_boxes(lam, centre, size)
    for i in range(500):
        position = iter(int(c * side) for c, side in zip(centre[:, i], size, strict=True))
        monkeypatch.setattr(timm.data.mixup.np.random, "randint", lambda low, high, size=None, p=position: next(p))
        box, timms_lam = timm.data.mixup.cutmix_bbox_and_lam((3, *size), lam[i])
        assert tuple(boxes[i]) == tuple(box)
        assert abs(kept[i] - timms_lam) <= 2.0**-25


def test_draws_have_their_distributions():
    num_draws = 100_000
    plan = draw_mix(0, 0, np.arange(num_draws), (224, 224), per="element", prob=0.9, switch_prob=0.3, **BOTH)
    applied = (plan.box[:, 1] > 0) | plan.use_cutmix
    assert abs(applied.mean() - 0.9) < 4 * np.sqrt(0.9 * 0.1 / num_draws)
    num_applied = applied.sum()
    assert abs(plan.use_cutmix.sum() / num_applied - 0.3) < 4 * np.sqrt(0.3 * 0.7 / num_applied)
    assert (plan.lam[~applied] == 1).all() and (plan.box[~applied] == 0).all()

    mixup = plan.lam[applied & ~plan.use_cutmix].astype(np.float64)
    assert abs(mixup.mean() - 0.5) < 0.01
    assert abs(mixup.var() - 0.1786) < 0.002
    assert abs(np.maximum(mixup, 1 - mixup).mean() - 0.899) < 0.002

    top, bottom, left, right = plan.box[plan.use_cutmix].T
    assert top.min() == left.min() == 0 and bottom.max() == right.max() == 224
    assert (top <= bottom).all() and (left <= right).all()
    np.random.seed(0)  # timm draws from NumPy's global state
    timms = np.array([timm.data.mixup.rand_bbox((3, 224, 224), lam) for lam in np.random.beta(1.0, 1.0, 20_000)])
    for ours, theirs in zip(plan.box[plan.use_cutmix].T, timms.T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    sides = timms[:, 1] - timms[:, 0], timms[:, 3] - timms[:, 2]
    assert stats.ks_2samp(bottom - top, sides[0]).pvalue > 1e-3
    assert stats.ks_2samp(right - left, sides[1]).pvalue > 1e-3
    assert abs(plan.lam[plan.use_cutmix].mean() - 0.680) < 0.006


def test_batches_draw_as_elements_do():
    batches = [draw_mix(0, epoch, np.arange(4), (224, 224), switch_prob=0.3, **BOTH) for epoch in range(4000)]
    use_cutmix = np.array([plan.use_cutmix[0] for plan in batches])
    lam = np.array([plan.lam[0] for plan in batches])
    assert abs(use_cutmix.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    assert abs(lam[~use_cutmix].var() - 0.1786) < 0.01
    assert abs(lam[use_cutmix].mean() - 0.680) < 0.03


@pytest.mark.parametrize("alpha", ["mixup_alpha", "cutmix_alpha"])
def test_one_alpha_alone(alpha):
    other = {"mixup_alpha": "cutmix_alpha", "cutmix_alpha": "mixup_alpha"}[alpha]
    for plan in plans("element", 50, **{other: 0.0}):
        assert plan.use_cutmix.all() == (alpha == "cutmix_alpha") == plan.use_cutmix.any()


# --- images


@pytest.mark.parametrize("per", ["batch", "element"])
@pytest.mark.parametrize("num_images", [6, 7])
def test_image_sides_agree_with_exact_arithmetic(per, num_images):
    images = photographs(num_images)
    for plan in plans(per, num_images):
        expected = mixed_images(images, plan)
        assert np.array_equal(run_kernel(images, plan), expected)
        nhwc = torch.from_numpy(images.copy())
        channels_last = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
        nchw = channels_last.contiguous()
        for tensor in (nhwc, channels_last, nchw):
            strides = tensor.stride()
            mix_tensor(tensor, plan)
            assert tensor.stride() == strides
        assert np.array_equal(nhwc.numpy(), expected)
        assert np.array_equal(channels_last.permute(0, 2, 3, 1).numpy(), expected)
        assert np.array_equal(nchw.permute(0, 2, 3, 1).numpy(), expected)


def test_kernel_without_compilation():
    images = photographs(3, (6, 5))
    for plan in plans("element", 3, (6, 5)):
        assert np.array_equal(run_kernel(images, plan, mix_pairs.py_func), mixed_images(images, plan))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_operations_through_a_batch(num_workers):
    images, labels = photographs(9), np.arange(9) % 4
    ids = 100 + 3 * np.arange(9)
    mix = Mix(4, smoothing=0.1, per="element", **BOTH)
    image_side, target_side = mix.images(), mix.targets()
    declare(image_side, (*SIZE, 3))
    state, query = declare(target_side, (), torch.int64)
    assert state.shape == query.shape == (4,) and state.dtype is torch.float32
    for epoch in range(3):
        batch = batch_of(ids, seed=11, epoch=epoch, num_workers=num_workers)
        plan = draw_mix(11, epoch, ids, SIZE, per="element", **BOTH)
        mixed = images.copy()
        assert image_side.generate_code()(mixed, None, batch) is mixed
        assert np.array_equal(mixed, mixed_images(images, plan))
        for given in (labels, labels[:, None], torch.from_numpy(labels), torch.from_numpy(labels[:, None])):
            targets = target_side.generate_code()(given, torch.empty(9, 4), batch)
            np.testing.assert_allclose(targets, mixed_targets(labels, plan, 4, 0.1), atol=1e-7)


@pytest.mark.parametrize("per", ["batch", "element"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_tensors(dtype, layout, per):
    images = torch.randn(6, 3, *SIZE, generator=torch.Generator().manual_seed(0)).to(dtype, memory_format=layout)
    for plan in plans(per, 6):
        assert plan.is_common == (per == "batch")
        mixed = images.clone()
        mix_tensor(mixed, plan)
        assert mixed.stride() == images.stride()
        for i, (top, bottom, left, right) in enumerate(plan.box):
            lam = float(plan.own_weight[i])
            expected = images[i].double()
            region = np.s_[:, top:bottom, left:right]
            expected[region] = lam * expected[region] + (1 - lam) * images[5 - i].double()[region]
            torch.testing.assert_close(mixed[i].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("per", ["batch", "element"])
def test_cuda_gives_the_same_bytes_without_waiting(per):
    images = photographs(7)
    for plan in plans(per, 7):
        on_device = torch.from_numpy(images).cuda()
        labels = torch.arange(7).cuda()
        targets = torch.empty(7, 10, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            mix_tensor(on_device, plan)
            mix_tensor(on_device.half(), plan)
            dense_targets_into(labels, plan, 0.1, targets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert np.array_equal(on_device.cpu().numpy(), run_kernel(images, plan))
        torch.testing.assert_close(targets.cpu(), targets_of(np.arange(7), plan, 10, 0.1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("per", ["batch", "element"])
def test_agreement_with_timm(per, monkeypatch):
    """timm given the same lambda, box and partner."""
    images, labels = photographs(8), torch.arange(8) % 5
    for plan in plans(per, 8):
        boxes = iter(plan.box[plan.use_cutmix & (plan.lam < 1)])
        monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda shape, lam, count=None, b=boxes: next(b))
        timms = timm.data.mixup.Mixup(**BOTH, mode="elem" if per == "element" else "batch", num_classes=5)
        timms._params_per_elem = lambda count, p=plan: (p.lam.copy(), p.use_cutmix)
        timms._params_per_batch = lambda p=plan: (float(p.lam[0]), bool(p.use_cutmix[0]))
        expected, expected_targets = timms(torch.from_numpy(images).permute(0, 3, 1, 2).float(), labels)

        mixed = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        mix_tensor(mixed, plan)
        assert torch.equal(mixed, expected)
        torch.testing.assert_close(targets_of(labels, plan, 5, 0.1), expected_targets, rtol=0, atol=2e-7)
        bytes_mixed = torch.from_numpy(run_kernel(images, plan)).permute(0, 3, 1, 2)
        assert torch.equal(bytes_mixed, (expected + 0.5).floor().byte())


# --- the seven invariants


@pytest.mark.parametrize("per", ["batch", "element"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_invariant_1_mass_is_one(per, smoothing):
    for num_classes in (3, 10, 1000):
        labels = np.random.default_rng(0).integers(0, num_classes, 33)
        labels[:3] = labels[-3:][::-1]
        for plan in plans(per, 33):
            targets = targets_of(labels, plan, num_classes, smoothing)
            mass = targets.double().sum(1)
            if smoothing == 0:
                assert (mass == 1).all()
            torch.testing.assert_close(mass, torch.ones(33, dtype=torch.float64), rtol=0, atol=2e-7)
            assert targets.min() == np.float32(smoothing / num_classes)
            heaviest = targets[:3].max(1)
            assert np.array_equal(heaviest.indices, labels[:3])
            on = 1 - smoothing + smoothing / num_classes
            torch.testing.assert_close(heaviest.values, torch.full((3,), on), rtol=0, atol=1.2e-7)
            assert (targets[:3] > smoothing / num_classes + 1e-6).sum() == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_invariant_2_targets_mix_as_images_do(smoothing):
    labels = np.random.default_rng(0).integers(0, 10, 33)
    for plan in plans("element", 33):
        expected = mixed_targets(labels, plan, 10, smoothing)
        np.testing.assert_allclose(targets_of(labels, plan, 10, smoothing), expected, rtol=0, atol=1.2e-7)


def test_invariant_3_smoothing_is_in_the_target():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(33, 10, generator=generator).double(), torch.randint(0, 10, (33,), generator=generator)
    for plan in plans("element", 33):
        soft = torch.nn.functional.cross_entropy(logits, targets_of(labels, plan, 10, 0.1).double(), reduction="none")
        own, other = (
            torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1, reduction="none")
            for y in (labels, labels.flip(0))
        )
        lam = torch.from_numpy(plan.lam).double()
        torch.testing.assert_close(soft, lam * own + (1 - lam) * other, rtol=0, atol=1e-6)


def test_invariant_4_mean_and_share():
    images = photographs(8, (32, 32))
    for plan in plans("batch", 8, (32, 32), count=12):
        mixed = run_kernel(images, plan)
        if not plan.use_cutmix[0]:
            assert abs(mixed.mean() - images.mean()) < 0.5
            exact = torch.from_numpy(images).double()
            mix_tensor(exact, plan)
            assert abs(exact.mean().item() - images.mean()) < 1e-9
        else:
            constant = np.repeat(np.array([0, 255], dtype=np.uint8), 4)[:, None, None, None] * np.ones_like(images)
            kept = (run_kernel(constant, plan) == constant).all(axis=3).mean(axis=(1, 2))
            assert np.array_equal(kept.astype(np.float32), plan.lam)


@pytest.mark.parametrize("per", ["batch", "element"])
def test_invariant_5_constant_images_weigh_as_their_targets(per):
    classes = np.arange(9)
    for scale in (1, 28):
        images = np.broadcast_to((scale * classes)[:, None, None, None], (9, *SIZE, 3)).astype(np.uint8)
        for plan in plans(per, 9):
            weights = targets_of(classes, plan, 9).double().numpy() @ classes
            as_float = torch.from_numpy(images.copy()).float()
            mix_tensor(as_float, plan)
            np.testing.assert_allclose(as_float.mean((1, 2, 3)), scale * weights, atol=2e-4)
            as_bytes = run_kernel(np.ascontiguousarray(images), plan).mean(axis=(1, 2, 3))
            np.testing.assert_allclose(as_bytes, scale * weights, atol=0.5)


@pytest.mark.parametrize("settings", [dict(prob=0.0, **BOTH), dict()])
def test_invariant_6_not_applied(settings):
    images, labels = photographs(5), np.array([0, 1, 2, 1, 0])
    mix = Mix(3, smoothing=0.3, **settings)
    image_side, target_side = mix.images(), mix.targets()
    declare(image_side, (*SIZE, 3))
    batch = batch_of(np.arange(5))
    assert np.array_equal(image_side.generate_code()(images.copy(), None, batch), images)
    targets = target_side.generate_code()(labels, torch.empty(5, 3), batch)
    np.testing.assert_allclose(targets, 0.1 + 0.7 * np.eye(3)[labels], atol=1e-7)

    unmixed = replace(plans("element", 5)[0], lam=np.ones(5, np.float32), box=np.zeros((5, 4), np.int64))
    assert np.array_equal(run_kernel(images, unmixed), images)
    np.testing.assert_allclose(targets_of(labels, unmixed, 3, 0.3), targets, atol=1e-7)


def test_invariant_7_moments_at_224():
    plan = draw_mix(1, 0, np.arange(100_000), (224, 224), mixup_alpha=0.2, cutmix_alpha=0.0, per="element")
    lam = plan.lam.astype(np.float64)
    assert abs(lam.var() - 0.1786) < 0.0015 and abs(np.maximum(lam, 1 - lam).mean() - 0.899) < 0.0015
    plan = draw_mix(1, 0, np.arange(100_000), (224, 224), mixup_alpha=0.0, cutmix_alpha=1.0, per="element")
    assert abs(plan.lam.mean() - 0.680) < 0.004


# --- what a user can get wrong


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(num_classes=0), "num_classes"),
        (dict(num_classes=2, mixup_alpha=-0.1), "mixup_alpha"),
        (dict(num_classes=2, prob=1.5), "prob"),
        (dict(num_classes=2, smoothing=1.0), "smoothing"),
        (dict(num_classes=2, per="pair"), "per"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(ValueError, match=named):
        Mix(**settings)


def test_a_label_outside_the_classes_is_named():
    target_side = Mix(3).targets()
    with pytest.raises(ValueError, match="sample 12 has label 3"):
        target_side.generate_code()(np.array([0, 3]), torch.empty(2, 3), batch_of([11, 12]))


def test_sides_that_could_disagree_are_refused():
    mix = Mix(3, **BOTH)
    with pytest.raises(ValueError, match=r"images\(\)"):
        mix.targets().generate_code()(np.array([0, 1]), torch.empty(2, 3), batch_of([0, 1]))
    image_side = mix.images()
    declare(image_side, (64, 64, 3))
    with pytest.raises(ValueError, match="64"):
        image_side.generate_code()(photographs(2), None, batch_of([0, 1]))


def test_plan_is_what_the_operations_use():
    mix = Mix(3, **BOTH)
    declare(mix.images(), (3, *SIZE), torch.uint8)
    assert mix.size == SIZE
    assert isinstance(mix.draw(batch_of([0, 1])), MixDraw)


# --- in a loader


def test_a_loaders_images_and_targets_agree(tmp_path):
    """Crop, augment, erase, mix, normalise; the size of the images changes between epochs."""
    path = write_images(tmp_path / "photographs.beton", photographs_of(30))  # its labels are the sample ids
    settings = dict(batch_size=10, order=OrderOption.RANDOM, seed=5, copy=True)
    mix, crop = Mix(30, smoothing=0.1, per="element", **BOTH), CenterCrop(32)
    augment, erase = RandAugment("rand-m7-mstd0.5-inc1"), RandomErasing(0.5)
    image = [crop, augment, erase, mix.images(), ToTensor(), Normalize(np.full(3, 120.0), np.full(3, 60.0))]
    mixing = {"image": image, "label": [Label(), mix.targets()]}
    plain = {"image": [crop, ToTensor()], "label": [Label()]}

    def batches(pipelines, num_workers=1):
        with Loader(path, pipelines=pipelines, num_workers=num_workers, **settings) as loader:
            for epoch, crop.size in enumerate((32, 24)):
                for images, labels in loader.epoch(epoch):
                    yield epoch, images, labels

    made = list(batches(mixing))
    for (_, *batch), (_, *again) in zip(made, batches(mixing, num_workers=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    for (epoch, images, targets), (_, unmixed, ids) in zip(made, batches(plain), strict=True):
        ids, expected = ids.numpy(), unmixed.numpy()
        for operation in (augment, erase):
            operation.generate_code()(expected, None, batch_of(ids, seed=5, epoch=epoch))
        plan = draw_mix(5, epoch, ids, expected.shape[1:3], per="element", **BOTH)
        expected = (run_kernel(expected, plan).transpose(0, 3, 1, 2) - 120.0) / 60.0
        np.testing.assert_allclose(images, expected, atol=1e-6)
        np.testing.assert_allclose(targets, mixed_targets(ids, plan, 30, 0.1), atol=1.2e-7)
