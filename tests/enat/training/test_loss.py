"""The objective: what counts, who teaches, which weights learn."""

import numpy as np
import pytest
import torch

from enat.model import draw_dropout_mask
from enat.training.loss import masked_cross_entropy, objective, previous_features, token_accuracy
from enat.training.masking import MaskedCodes, MaskingConfig, mask_codes
from material.small_models import ARCHITECTURES, TEXT, conditions, golden, golden_enat, nested_tokens, pairwise_cases, small_enat
from references import plain

LABELS = torch.tensor([0, 3, 5])


def drawn_codes(model, seed=0):
    shape = (len(LABELS), model.config.num_tokens)
    return torch.randint(model.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def drawn_masks(model, codes, reuse_probability, seed=1):
    return mask_codes(codes, model.config.mask_id, MaskingConfig(reuse_probability=reuse_probability), np.random.default_rng(seed))


def test_losses_equal_the_published_code():
    arrays = golden("enat_tiny")
    model = golden_enat(arrays)
    previous = None
    for step in range(arrays["meta"]["steps"]):
        previous = model(arrays[f"step{step}/masked_tokens"], arrays["labels"], previous)
        loss = masked_cross_entropy(previous, arrays["full_tokens"], arrays["meta"]["label_smoothing"])
        assert loss.item() == pytest.approx(arrays[f"step{step}/reuse_loss"].item(), abs=1e-4)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.7, 0.0), (0.0, 1e-3), (0.1, 0.5)])
@pytest.mark.parametrize("logits", ["all", "masked"])
def test_loss_and_accuracy_equal_the_plain_ones(label_smoothing, z_loss, logits):
    model = small_enat()
    masked = drawn_masks(model, drawn_codes(model), 0)
    output, everywhere = model(masked.tokens, LABELS, logits=logits), model(masked.tokens, LABELS)
    # The most likely codes themselves, except for every third position.
    codes = everywhere.logits.argmax(dim=-1)
    codes[:, ::3] = (codes[:, ::3] + 1) % model.config.codebook_size
    loss, accuracy = masked_cross_entropy(output, codes, label_smoothing, z_loss), token_accuracy(output, codes)
    assert loss.dtype == accuracy.dtype == torch.float32 and not accuracy.requires_grad
    expected = plain.smoothed_cross_entropy(everywhere.logits, codes, everywhere.mask, label_smoothing, z_loss)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    hits = everywhere.logits.argmax(dim=-1)[everywhere.mask] == codes[everywhere.mask]
    assert 0.5 < accuracy.item() < 1 and accuracy.item() == pytest.approx(hits.double().mean().item())


MASKS = [(9, None), (7, 13), (7, 7), (7, 16), (15, 16), (1, 1)]


@pytest.mark.parametrize(
    ("architecture", "masks"),
    [({**a, **b, **c, **d}, masks) for a, b, c, d, masks in pairwise_cases(*ARCHITECTURES, MASKS)],
    ids=str,
)
def test_every_weight_gets_a_gradient_and_the_teacher_none(architecture, masks):
    """Even if nothing is new or nothing was visible: ZeRO reduces one buffer a weight on every worker, in any mode of its group."""
    model, teacher = small_enat(**architecture).train(), small_enat(seed=1, **architecture)
    num_masked, previous_num_masked = masks if model.config.reuse else (masks[0], None)
    codes = drawn_codes(model)
    before, now = nested_tokens(model.config, [previous_num_masked or 16, num_masked])
    masked = MaskedCodes(now, num_masked, before if previous_num_masked is not None else None, previous_num_masked or 0)
    loss, output = objective(model, teacher, codes, conditions(model), masked)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert [name for name, weight in teacher.named_parameters() if weight.grad is not None] == []
    assert output.logits.shape == (len(LABELS), num_masked, model.config.codebook_size)
    assert (previous_features(teacher, masked, conditions(model)) is None) == (previous_num_masked is None)
    if previous_num_masked is not None:
        with pytest.raises(AssertionError):
            previous_features(teacher.train(), masked, conditions(model))


@pytest.mark.parametrize("reused_features", ["visible", "masked", "all"])
def test_reuse_trains_the_projection_on_the_features_of_the_teacher(reused_features):
    model, teacher = small_enat(reused_features=reused_features), small_enat(seed=1, reused_features=reused_features)
    codes = drawn_codes(model)
    masked = drawn_masks(model, codes, 1)
    assert masked.num_masked < masked.previous_num_masked < model.config.num_tokens
    loss, _ = objective(model, teacher, codes, LABELS, masked)
    by_hand = masked_cross_entropy(model(masked.tokens, LABELS, teacher(masked.previous_tokens, LABELS)), codes)
    fresh = masked_cross_entropy(model(masked.tokens, LABELS), codes)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert abs(loss.item() - fresh.item()) > 1e-3
    loss.backward()
    projections = [model.previous_projection, model.masked_projection]
    gradients = [projection.mlp.fc1.weight.grad for projection in projections if projection is not None]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("reused_features", ["visible", "masked", "all"])
def test_half_precision_model_learns_from_a_float32_teacher(reused_features):
    model = small_enat(reused_features=reused_features, qk_norm=True).to(torch.bfloat16).train()
    teacher = small_enat(seed=1, reused_features=reused_features, qk_norm=True)
    codes = drawn_codes(model)
    loss, output = objective(model, teacher, codes, LABELS, drawn_masks(model, codes, 1))
    loss.backward()
    assert (loss.dtype, output.features.dtype) == (torch.float32, torch.bfloat16)


def test_codes_that_no_visible_token_holds_get_no_gradient():
    """The head scores every code, so a head that was not detached would reach them."""
    model = small_enat()
    codes = drawn_codes(model) % 8
    loss, _ = objective(model, model, codes, LABELS, drawn_masks(model, codes, 0))
    loss.backward()
    rows = model.token_embedding.weight.grad.abs().sum(dim=1)
    assert (rows[8 : model.config.codebook_size] == 0).all()
    assert all(weight.grad is not None for weight in model.head.parameters())
    assert rows[model.config.mask_id] > 0


@pytest.mark.parametrize(
    ("extension", "reuse_probability"),
    [({}, 0), ({}, 1), ({"qk_norm": True}, 1), ({"reused_features": "all", **TEXT}, 1), ({"num_classes": 0}, 0)],
    ids=str,
)
def test_group_in_several_passes_has_the_loss_and_gradients_of_one(extension, reuse_probability):
    model, teacher = small_enat(**extension).train(), small_enat(seed=1, **extension)
    codes, condition = drawn_codes(model), conditions(model)
    masked = drawn_masks(model, codes, reuse_probability)
    dropout_mask = draw_dropout_mask(model.config, 3, torch.Generator().manual_seed(0), "cpu")

    def computed(passes):
        model.zero_grad()
        total = 0.0
        for images in passes:
            part = codes[images], condition[images], masked.rows(images)
            loss = objective(model, teacher, *part, dropout_mask=dropout_mask[images], z_loss=1e-3)[0] * len(part[0]) / 3
            loss.backward()
            total += loss.item()
        return total, [weight.grad.clone() for weight in model.parameters()]

    loss, gradients = computed([slice(0, 3)])
    other = draw_dropout_mask(model.config, 3, torch.Generator().manual_seed(1), "cpu")
    assert objective(model, teacher, codes, condition, masked, dropout_mask=other, z_loss=1e-3)[0].item() != loss
    loss_of_passes, gradients_of_passes = computed([slice(0, 1), slice(1, 3)])
    assert loss_of_passes == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(gradients_of_passes, gradients, atol=1e-5, rtol=1e-4)
