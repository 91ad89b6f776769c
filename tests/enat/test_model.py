"""The network: equal to the published one and to the plain one, the published sizes, what it refuses."""

import plain
import pytest
import torch
from small_models import golden, golden_enat, nested_tokens, small_config, small_enat

from enat import ENAT, ENATConfig
from enat.model import DECODER_ATTENTIONS

# All masked, then fewer and fewer, none new from one step to the next, and nothing masked at the end.
NUM_MASKED = [16, 13, 7, 7, 1, 0]


@pytest.fixture(scope="module")
def golden_run():
    arrays = golden("enat_tiny")
    return arrays, golden_enat(arrays)


@pytest.mark.parametrize("logits", ["all", "masked"])
def test_a_run_with_reuse_equals_the_published_code(golden_run, logits):
    arrays, model = golden_run
    previous = None
    for step in range(arrays["meta"]["steps"]):
        tokens = arrays[f"step{step}/masked_tokens"]
        previous = model(tokens, arrays["labels"], previous, logits=logits)
        expected = arrays[f"step{step}/reuse_logits"]
        if logits == "masked":
            expected = expected[tokens == model.config.mask_id].unflatten(0, (len(tokens), -1))
        torch.testing.assert_close(previous.logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(previous.features, arrays[f"step{step}/reuse_features"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", range(4))
def test_a_fresh_step_equals_the_published_code(golden_run, step):
    arrays, model = golden_run
    output = model(arrays[f"step{step}/masked_tokens"], arrays["labels"])
    torch.testing.assert_close(output.logits, arrays[f"step{step}/fresh_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features, arrays[f"step{step}/fresh_features"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("has_reuse", "carries"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("decoder_attention", DECODER_ATTENTIONS)
def test_the_fast_forward_equals_the_plain_one(decoder_attention, has_reuse, carries):
    model = small_enat(decoder_attention=decoder_attention, reuse=has_reuse)
    labels = torch.tensor([4, 0, model.config.null_label])
    fast, slow = None, [None] * len(labels)
    for tokens in nested_tokens(model.config, NUM_MASKED):
        fast = model(tokens, labels, fast if carries else None)
        for image, label in enumerate(labels.tolist()):
            slow[image] = plain.forward(model, tokens[image], label, slow[image] if carries else None)
            assert torch.equal(fast.mask[image], slow[image].mask)
            torch.testing.assert_close(fast.logits[image], slow[image].logits, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(fast.features[image], slow[image].features, atol=2e-5, rtol=1e-4)


def test_reuse_changes_what_is_computed():
    """Otherwise the comparisons above could not tell a carried state from a fresh one."""
    model = small_enat()
    before, now = nested_tokens(model.config, [13, 7])
    labels = torch.tensor([0, 1, 2])
    fresh = model(now, labels)
    reused = model(now, labels, model(before, labels))
    assert (fresh.logits - reused.logits).abs().max() > 0.1


def test_masked_logits_are_those_of_all_positions_in_ascending_order():
    model = small_enat()
    (tokens,) = nested_tokens(model.config, [6])
    labels = torch.tensor([0, 1, 2])
    everywhere, masked = model(tokens, labels), model(tokens, labels, num_masked=6, logits="masked")
    positions = torch.stack([row.nonzero()[:, 0] for row in tokens == model.config.mask_id])
    assert torch.equal(masked.masked_index, positions)
    assert masked.num_masked == everywhere.num_masked == 6
    expected = torch.stack([logits[index] for logits, index in zip(everywhere.logits, positions, strict=True)])
    torch.testing.assert_close(masked.logits, expected)


def test_labels_and_visible_codes_are_seen():
    model = small_enat()
    (tokens,) = nested_tokens(model.config, [10], num_images=1)
    output = model(tokens, torch.tensor([0]))
    assert (output.logits - model(tokens, torch.tensor([1])).logits).abs().max() > 0.1
    changed = torch.where(tokens == model.config.mask_id, tokens, (tokens + 1) % model.config.codebook_size)
    assert (output.logits - model(changed, torch.tensor([0])).logits)[output.mask].abs().max() > 0.1


@pytest.mark.parametrize(("size", "millions"), [("s", 98.1), ("b", 219.6), ("l", 574.3), ("xl", 1040.7)])
def test_published_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = ENAT(ENATConfig.preset(f"enat-{size}"))
    dim = model.config.embed_dim
    unused_prev_embedder = 8 * dim**2 + 5 * dim  # an MLP that the published weights hold and never call
    count = sum(parameter.numel() for parameter in model.parameters()) + unused_prev_embedder
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_initialisation_is_the_generators_alone_and_starts_blocks_as_identity():
    torch.manual_seed(1)
    first = ENAT(small_config()).initialize(torch.Generator().manual_seed(7)).eval()
    torch.manual_seed(2)
    second = ENAT(small_config()).initialize(torch.Generator().manual_seed(7))
    other = ENAT(small_config()).initialize(torch.Generator().manual_seed(8))
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)

    (tokens,) = nested_tokens(first.config, [9])
    embedded = first.embedding_norm(first.token_embedding(tokens) + first.position_embedding.weight)
    torch.testing.assert_close(first(tokens, torch.tensor([0, 1, 2])).features, embedded)


def test_initialisation_has_the_published_spread():
    model = ENAT(small_config(embed_dim=64, codebook_size=512)).initialize(torch.Generator().manual_seed(0))
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.label_embedding.weight.std().item() == pytest.approx(0.02, rel=0.15)
    weight = model.encoder[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5  # Glorot and Bengio 2010, eq. 16
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_dropout_is_drawn_from_its_generator_in_training_only():
    model = small_enat(dropout=0.5)
    (tokens,) = nested_tokens(model.config, [9])
    labels = torch.tensor([0, 1, 2])

    def features(seed):
        return model(tokens, labels, dropout_generator=torch.Generator().manual_seed(seed)).features

    assert torch.equal(features(0), features(1))
    model.train()
    assert torch.equal(features(0), features(0))
    assert not torch.allclose(features(0), features(1))


def test_dropout_keeps_the_mean():
    model = small_enat(encoder_layers=0, dropout=0.25).train()
    tokens = nested_tokens(model.config, [1], num_images=1)[0].expand(4000, -1)
    visible = ~(tokens[0] == model.config.mask_id)
    labels = torch.zeros(4000, dtype=torch.int64)
    drawn = model(tokens, labels, dropout_generator=torch.Generator().manual_seed(0)).features[:, visible]
    kept = model.eval()(tokens[:1], labels[:1]).features[0, visible]
    assert (drawn == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(drawn.mean(dim=0), kept, atol=0.15, rtol=0)


def test_rows_with_different_numbers_of_masked_tokens_are_refused():
    model = small_enat()
    few, many = nested_tokens(model.config, [3, 5])
    with pytest.raises(ValueError, match="3 to 5 masked tokens"):
        model(torch.cat([few[:1], many[1:]]), torch.tensor([0, 1, 2]))


def test_a_visible_token_cannot_be_masked_again():
    model = small_enat()
    few, many = nested_tokens(model.config, [3, 5])
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="visible in `previous` is masked now"):
        model(many, labels, model(few, labels))


def test_a_model_without_reuse_refuses_previous_features():
    model = small_enat(reuse=False)
    before, now = nested_tokens(model.config, [13, 7])
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="reuse=False"):
        model(now, labels, model(before, labels))


def test_an_empty_batch_is_refused():
    model = small_enat()
    with pytest.raises(ValueError, match="empty batch"):
        model(torch.zeros(0, 16, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder_attention": "sideways"}, "self_cross, cross, full"),
        ({"num_heads": 5}, "not divisible by num_heads 5"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"encoder_layers": -1}, "-1 encoder"),
        ({"decoder_layers": 0}, "0 decoder"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_an_impossible_architecture_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


def test_presets_take_overrides_and_refuse_unknown_names():
    config = ENATConfig.preset("enat-b", grid_size=32, num_classes=10)
    assert (config.embed_dim, config.num_tokens, config.null_label, config.mask_id) == (768, 1024, 10, 1024)
    with pytest.raises(ValueError, match="enat-s, enat-b, enat-l, enat-xl"):
        ENATConfig.preset("enat-m")
