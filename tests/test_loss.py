"""Losses against torch's and timm's."""

import pytest
import timm.loss
import torch
import torch.nn.functional as F

from imagenet_training.planning.class_weights import effective_number_weights
from imagenet_training.training.loss import build_loss, main_logits

LOGITS = torch.linspace(-3, 4, 24).reshape(4, 6).roll(2, 1)
LABELS = torch.tensor([0, 5, 5, 2])
HARD = F.one_hot(LABELS, 6).float()
SMOOTH = HARD * 0.9 + 0.1 / 6
MIXED = 0.3 * SMOOTH + 0.7 * SMOOTH.flip(0)


def test_cross_entropy_is_torch_s_on_labels_and_smoothed_labels():
    loss = build_loss("cross_entropy")
    torch.testing.assert_close(loss(LOGITS, HARD), F.cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(loss(LOGITS, SMOOTH), F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))
    mixed = 0.3 * F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    mixed += 0.7 * F.cross_entropy(LOGITS, LABELS.flip(0), label_smoothing=0.1)
    torch.testing.assert_close(loss(LOGITS, MIXED), mixed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("targets", [HARD, SMOOTH, MIXED])
def test_bce_is_timm_s(threshold, targets):
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold)
    torch.testing.assert_close(build_loss("bce", bce_threshold=threshold)(LOGITS, targets), theirs(LOGITS, targets))


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_half_precision_logits_lose_nothing_more(name):
    half = LOGITS.to(torch.bfloat16)
    loss = build_loss(name)
    torch.testing.assert_close(loss(half, SMOOTH), loss(half.float(), SMOOTH))
    assert loss(half, SMOOTH).dtype == torch.float32


def test_auxiliary_heads_add_their_weighted_share():
    outputs, loss = (LOGITS, LOGITS.flip(0), LOGITS.flip(1)), build_loss("bce", auxiliary_weight=0.3)
    alone = [build_loss("bce")(output, SMOOTH) for output in outputs]
    torch.testing.assert_close(loss(outputs, SMOOTH), alone[0] + 0.3 * alone[1] + 0.3 * alone[2])
    torch.testing.assert_close(loss(LOGITS, SMOOTH), alone[0])
    assert main_logits(outputs) is main_logits(LOGITS) is LOGITS
    with pytest.raises(TypeError, match="output is a tuple, for which no loss is defined"):
        build_loss("bce")(outputs, SMOOTH)


WEIGHTS = torch.tensor([0.5, 1.0, 4.0, 1.0, 1.0, 2.0])


def test_class_weights_multiply_the_loss_of_each_image():
    for name, threshold in (("cross_entropy", None), ("bce", None), ("bce", 0.2)):
        plain = build_loss(name, bce_threshold=threshold)
        weighted = build_loss(name, bce_threshold=threshold, class_weights=WEIGHTS)
        for targets in (HARD, SMOOTH, MIXED):
            images = [plain(LOGITS[i : i + 1], targets[i : i + 1]) * (targets[i] @ WEIGHTS) for i in range(4)]
            torch.testing.assert_close(weighted(LOGITS, targets), sum(images) / 4)
    theirs = F.cross_entropy(LOGITS, LABELS, WEIGHTS, reduction="sum") / 4
    torch.testing.assert_close(build_loss("cross_entropy", class_weights=WEIGHTS)(LOGITS, HARD), theirs)


def test_class_weights_are_the_inverse_effective_numbers_with_a_mean_of_1_over_the_images():
    counts = [5000, 500, 50, 1, 0]
    weights = effective_number_weights(counts)
    assert sum(n * w for n, w in zip(counts, weights, strict=True)) / sum(counts) == pytest.approx(1)
    assert weights[4] == 0 and sorted(weights[:4]) == list(weights[:4])
    effective = [(1 - 0.999**n) / (1 - 0.999) for n in counts]
    assert weights[3] / weights[0] == pytest.approx(effective[0] / effective[3])
    inverse = effective_number_weights(counts[:4], beta=1 - 1e-9)
    assert inverse[3] / inverse[0] == pytest.approx(5000, rel=1e-4)
    assert effective_number_weights([7, 7]) == pytest.approx((1, 1))
