"""The network: equal to the published one and to the plain one, the published sizes, what it refuses."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from enat.blocks import FUSED_LINEAR, LinearGELU
from enat.config import ENATConfig
from enat.model import ENAT, TextCondition, draw_dropout_mask
from enat.sampler_config import SamplerConfig
from enat.sampling.sampler import sample
from material.small_models import (
    ARCHITECTURES,
    TEXT,
    captions,
    conditions,
    golden,
    golden_enat,
    nested_tokens,
    pairwise_cases,
    small_config,
    small_enat,
)
from references import plain

# All masked, then fewer and fewer, none new from one step to the next, and nothing masked at the end.
NUM_MASKED = [16, 13, 7, 7, 1, 0]


def test_run_with_and_without_reuse_equals_the_published_code():
    arrays = golden("enat_tiny")
    model, previous = golden_enat(arrays), None
    for step in range(arrays["meta"]["steps"]):
        tokens = arrays[f"step{step}/masked_tokens"]
        previous = model(tokens, arrays["labels"], previous)
        for kind, output in (("reuse", previous), ("fresh", model(tokens, arrays["labels"]))):
            torch.testing.assert_close(output.logits, arrays[f"step{step}/{kind}_logits"], atol=1e-4, rtol=0)
            torch.testing.assert_close(output.features, arrays[f"step{step}/{kind}_features"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "carries"),
    [({**a, **b, **c, **d}, carries) for a, b, c, d, carries in pairwise_cases(*ARCHITECTURES, [True, False])],
    ids=str,
)
def test_forward_equals_the_plain_one(architecture, carries):
    model = small_enat(**architecture)
    labels, carries = conditions(model), carries and model.config.reuse
    fast, slow = None, [None] * len(labels)
    for tokens in nested_tokens(model.config, NUM_MASKED):
        fast = model(tokens, labels, fast if carries else None)
        for image, label in enumerate(plain.rows(labels)):
            slow[image] = plain.forward(model, tokens[image], label, slow[image] if carries else None)
            assert torch.equal(fast.mask[image], slow[image].mask)
            torch.testing.assert_close(fast.logits[image], slow[image].logits, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(fast.features[image], slow[image].features, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", [{}, {"decoder_attention": "full", "reuse": False}, TEXT], ids=str)
def test_a_prepared_condition_gives_the_same_as_labels_or_captions(architecture):
    model = small_enat(**architecture)
    tokens, given = nested_tokens(model.config, [9])[0], conditions(model)
    with torch.no_grad():
        prepared = model.prepare(given)
        assert len(prepared) == len(given)
        assert torch.equal(model(tokens, prepared).logits, model(tokens, given).logits)
        torch.testing.assert_close(model(tokens[1:], prepared[1:]).logits, model(tokens, given).logits[1:])
    with pytest.raises(ValueError, match="conditioned on text" if architecture is TEXT else "takes labels"):
        model.prepare(torch.zeros(2, dtype=torch.int64) if architecture is TEXT else captions(small_enat(**TEXT).config, 2))


def test_linear_layer_and_gelu_at_once_equal_one_after_the_other():
    """On CPUs without gradients; not on empty input, in other precisions, or in training."""
    layer, x = LinearGELU(24, 40), torch.randn(3, 5, 24)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias), approximate="tanh")
    assert torch.equal(layer(x), expected)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    counts = counter.get_flop_counts()["Global"]
    assert [*counts.values()] == [2 * 3 * 5 * 24 * 40]
    assert (FUSED_LINEAR in {getattr(name, "_overloadpacket", name) for name in counts}) == (FUSED_LINEAR is not None)
    with torch.no_grad():
        assert layer(x[:, :0]).shape == (3, 0, 40)
        assert layer.double()(x.double()).dtype == torch.float64


def rows_of(model):
    """Tokens of two steps, and labels or captions."""
    return *nested_tokens(model.config, [16, 9]), conditions(model)


@pytest.mark.parametrize("architecture", [{}, {"reused_features": "masked"}, {"reused_features": "all"}], ids=str)
def test_reused_features_have_an_effect(architecture):
    """Otherwise the comparison above could not tell a reused state from a fresh one."""
    model = small_enat(**architecture)
    before, now = nested_tokens(model.config, [13, 9])
    fresh = model(now, conditions(model)).logits
    assert (model(now, conditions(model), model(before, conditions(model))).logits - fresh).abs().max() > 0.1


@pytest.mark.parametrize("architecture", [{}, TEXT], ids=["classes", "text"])
def test_condition_and_visible_codes_have_an_effect(architecture):
    model = small_enat(**architecture)
    _, tokens, condition = rows_of(model)
    output = model(tokens, condition)
    changed = torch.where(output.mask, tokens, (tokens + 1) % model.config.codebook_size)
    others = [(changed, condition), (tokens, condition[[1, 2, 0]])]
    if architecture:
        hidden, pooled = condition.hidden[[1, 2, 0]], condition.pooled[[1, 2, 0]]
        others += [(tokens, TextCondition(hidden, condition.pooled)), (tokens, TextCondition(condition.hidden, pooled))]
    for other in others:
        assert (output.logits - model(*other).logits)[output.mask].abs().max() > 0.1


def test_norms_of_queries_and_keys_have_an_effect():
    model, without = small_enat(qk_norm=True), ENAT(small_config()).eval()
    without.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in without.state_dict()})
    _, tokens, labels = rows_of(model)
    assert (model(tokens, labels).logits - without(tokens, labels).logits).abs().max() > 0.1


def test_projection_of_masked_positions_starts_without_effect():
    model = ENAT(small_config(reused_features="masked")).initialize(torch.Generator().manual_seed(0)).eval()
    before, now = nested_tokens(model.config, [13, 7])
    labels = conditions(model)
    assert torch.equal(model(now, labels, model(before, labels)).logits, model(now, labels).logits)


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


@pytest.mark.parametrize(("size", "millions"), [("s", 98.1), ("b", 219.6), ("l", 574.3), ("xl", 1040.7)])
def test_published_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = ENAT(ENATConfig.preset(f"enat-{size}"))
    dim = model.config.embed_dim
    unused_prev_embedder = 8 * dim**2 + 5 * dim  # an MLP that the published weights hold and never call
    count = sum(parameter.numel() for parameter in model.parameters()) + unused_prev_embedder
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    nat = ENATConfig.preset(f"nat-{size}")
    depth = model.config.encoder_layers + model.config.decoder_layers
    assert (nat.embed_dim, nat.num_heads, nat.decoder_layers) == (dim, model.config.num_heads, depth)
    assert (nat.encoder_layers, nat.decoder_attention, nat.reuse) == (0, "full", False)


def test_initialisation_depends_on_the_generator_alone_and_blocks_start_as_identity():
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


def drawn_dropout(model, num_images, seed=0):
    return draw_dropout_mask(model.config, num_images, torch.Generator().manual_seed(seed), "cpu")


def test_dropout_follows_its_mask_in_training_only():
    model = small_enat(dropout=0.5)
    _, tokens, labels = rows_of(model)

    def features(seed):
        return model(tokens, labels, dropout_mask=drawn_dropout(model, 3, seed)).features

    assert torch.equal(features(0), features(1))
    model.train()
    assert torch.equal(features(0), features(0))
    assert not torch.allclose(features(0), features(1))
    torch.manual_seed(3)
    assert torch.equal(model(tokens, labels).features, features(3)), "without a mask it is drawn from the default generator"
    with pytest.raises(ValueError, match="dropout_mask"):
        model(tokens, labels, dropout_mask=drawn_dropout(model, 2))
    assert drawn_dropout(small_enat(dropout=0.0), 3) is None


def test_dropout_keeps_the_mean():
    model = small_enat(encoder_layers=0, dropout=0.25).train()
    tokens = nested_tokens(model.config, [1], num_images=1)[0].expand(4000, -1)
    visible = ~(tokens[0] == model.config.mask_id)
    labels = torch.zeros(4000, dtype=torch.int64)
    drawn = model(tokens, labels, dropout_mask=drawn_dropout(model, 4000)).features[:, visible]
    assert (drawn == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(drawn.mean(dim=0), model.eval()(tokens[:1], labels[:1]).features[0, visible], atol=0.15, rtol=0)


@pytest.mark.parametrize(
    "architecture",
    [{}, {"decoder_attention": "full"}, {"reused_features": "all"}, {"qk_norm": True, **TEXT}],
    ids=str,
)
def test_activation_checkpointing_changes_no_bit(architecture):
    model = small_enat(dropout=0.5, **architecture)
    before, now = nested_tokens(model.config, [13, 7])
    labels, mask = conditions(model), drawn_dropout(model, 3)
    with torch.no_grad():
        previous = model(before, labels)
    model.train()
    losses, gradients, calls = [], [], []
    model.decoder[0].register_forward_pre_hook(lambda *_: calls.append(model.activation_checkpointing))
    for model.activation_checkpointing in (False, True):
        loss = model(now, labels, previous, dropout_mask=mask).logits.logsumexp(dim=-1).square().mean()
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.equal(*losses)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert calls == [False, True, True]  # once more in the backward pass

    with torch.no_grad():
        model(now, labels, previous)
    assert len(calls) == 4


@pytest.mark.parametrize("reused_features", ["visible", "masked", "all"])
def test_step_without_logits_has_the_features_that_the_next_one_reuses(reused_features):
    model = small_enat(reused_features=reused_features)
    before, now = nested_tokens(model.config, [13, 7])
    labels = conditions(model)
    whole, bare = model(before, labels), model(before, labels, logits="none")
    assert bare.logits.shape == (3, 0, model.config.codebook_size)
    assert torch.equal(model(now, labels, whole).logits, model(now, labels, bare).logits)


@pytest.mark.parametrize(
    "architecture", [{"reused_features": "all", "qk_norm": True, **TEXT}, {"decoder_attention": "full"}, {"reuse": False}], ids=str
)
def test_every_weight_is_used_within_a_call_of_its_module(architecture):
    """ZeRO-3 gathers partitioned weights when their module is called. The head takes the token embedding's as an argument."""
    model = small_enat(**architecture)
    gathered = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            gathered[module, name] = weight.data

            def gather(called, _, name=name):
                getattr(called, name).data = gathered[called, name]

            def release(called, _, __, name=name):
                getattr(called, name).data = torch.zeros(0)

            module.register_forward_pre_hook(gather)
            if module is not model.token_embedding:
                module.register_forward_hook(release)
                release(module, None, None)
    with torch.no_grad():
        output = model(nested_tokens(model.config, [9])[0], conditions(model))
        expected = small_enat(**architecture)(nested_tokens(model.config, [9])[0], conditions(small_enat(**architecture)))
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize(
    ("architecture", "previous", "now", "message"),
    [
        ({}, None, lambda few, many: torch.cat([few[:1], many[1:]]), "3 to 5 masked tokens"),
        ({}, 3, lambda few, many: many, "visible in `previous` is masked now"),
        ({"reuse": False}, 5, lambda few, many: few, "reuse=False"),
    ],
)
def test_tokens_that_cannot_be_a_step_are_refused(architecture, previous, now, message):
    model, labels = small_enat(**architecture), torch.tensor([0, 1, 2])
    few, many = nested_tokens(model.config, [3, 5])
    before = None if previous is None else model(few if previous == 3 else many, labels)
    with pytest.raises(ValueError, match=message):
        model(now(few, many), labels, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder_attention": "sideways"}, "self_cross, cross, full"),
        ({"num_heads": 5}, "must be a multiple of num_heads, which is 5"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"encoder_layers": -1}, "encoder_layers is -1"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"text_width": 12}, "num_classes is 5 .*text_width"),
        ({"text_width": 0, "num_classes": 0}, "text_width is 0"),
        ({**TEXT, "num_text_tokens": 0}, "num_text_tokens is 0"),
        ({"reused_features": "hidden"}, "visible, masked, all"),
        ({"reuse": False, "reused_features": "all"}, "reused_features is 'all' with reuse=False"),
    ],
)
def test_impossible_architecture_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        small_config(**overrides)


def test_presets_take_overrides_and_refuse_unknown_names():
    config = ENATConfig.preset("enat-b", grid_size=32, num_classes=10)
    assert (config.embed_dim, config.num_tokens, config.null_label, config.mask_id) == (768, 1024, 10, 1024)
    with pytest.raises(ValueError, match="enat-s, enat-b, enat-l, enat-xl"):
        ENATConfig.preset("enat-m")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_captions_are_computed_in_the_dtype_of_the_weights(dtype):
    model = small_enat(**TEXT)
    (tokens,) = nested_tokens(model.config, [10])
    given = captions(model.config, 3)
    rounded = TextCondition(given.hidden.to(dtype), given.pooled.to(dtype))
    output = model(tokens, rounded)
    assert output.logits.dtype == torch.float32
    assert torch.equal(output.logits, model(tokens, TextCondition(rounded.hidden.float(), rounded.pooled.float())).logits)
    assert model.to(torch.bfloat16)(tokens, rounded).logits.dtype == torch.bfloat16


def test_dropped_labels_and_captions_are_the_null_ones():
    is_dropped = torch.tensor([False, True, False])
    model = small_enat()
    assert model.drop_condition(torch.tensor([3, 2, 0]), is_dropped).tolist() == [3, 5, 0]
    assert model.null_condition(2).tolist() == [5, 5]
    assert small_enat(num_classes=0).null_condition(2).tolist() == [0, 0]

    model = small_enat(**TEXT)
    given, null = captions(model.config, 3), model.null_condition(3)
    dropped = model.drop_condition(given, is_dropped)
    assert (len(null), null.hidden.shape, null.pooled.shape) == (3, (3, 3, 12), (3, 12))
    for image, source in enumerate((given, null, given)):
        assert torch.equal(dropped.hidden[image], source.hidden[image])
        assert torch.equal(dropped.pooled[image], source.pooled[image])
    assert torch.equal(null.hidden[0], model.null_hidden)
    assert not torch.equal(null.pooled[0], torch.zeros(12))


@pytest.mark.parametrize(
    ("architecture", "condition", "message"),
    [
        ({}, TextCondition(torch.zeros(3, 3, 12), torch.zeros(3, 12)), "takes labels, not a TextCondition"),
        (TEXT, torch.tensor([0, 0, 0]), "takes a TextCondition, not labels"),
        ({}, torch.zeros(3, 1, dtype=torch.int64), r"labels have shape \(3, 1\)"),
        (TEXT, TextCondition(torch.zeros(3, 4, 12), torch.zeros(3, 12)), r"\(3, 4, 12\) and \(3, 12\); \(B, 3, 12\)"),
        (TEXT, TextCondition(torch.zeros(3, 3, 12), torch.zeros(2, 12)), r"\(3, 3, 12\) and \(2, 12\); \(B, 3, 12\)"),
        (TEXT, TextCondition(torch.zeros(2, 3, 12), torch.zeros(2, 12)), r"tokens have shape \(3, 16\); \(2, 16\)"),
        ({}, torch.zeros(0, dtype=torch.int64), r"tokens have shape \(3, 16\); \(0, 16\)"),
    ],
)
def test_condition_of_another_kind_or_shape_is_refused(architecture, condition, message):
    model = small_enat(**architecture)
    with pytest.raises(ValueError, match=message):
        model(nested_tokens(model.config, [9])[0], condition)
    if architecture and not isinstance(condition, torch.Tensor) and condition.hidden.shape[1:] != (3, 12):
        with pytest.raises(ValueError, match=r"\(1, 4, 12\) and \(1, 12\)"):
            model.set_null_caption(condition.hidden[0], condition.pooled[0])


@pytest.mark.slow
def test_few_graphs_are_compiled_however_many_tokens_are_masked() -> None:
    """Natural draws, 0 and 1 visible tokens among them, fresh and with features of an earlier step: no graph after the first steps.

    Past its limit torch runs new shapes uncompiled, without a word.
    """
    torch._dynamo.reset()
    counters.clear()
    model = small_enat(grid_size=8).train()
    model.compile_blocks(backend="eager")
    generator, num_tokens = torch.Generator().manual_seed(1), 64
    sizes = [0, 1, 63, 64, *torch.randint(0, 65, (200,), generator=generator).tolist()]
    counts = []
    for number, num_masked in enumerate(sizes):
        tokens = torch.randint(0, model.config.codebook_size, (3, num_tokens), generator=generator)
        labels, order = torch.zeros(3, dtype=torch.long), torch.rand(3, num_tokens, generator=generator).argsort(1)
        previous = None
        if number % 2:
            before = int(torch.randint(num_masked, num_tokens + 1, (), generator=generator))
            masked = tokens.scatter(1, order[:, :before], model.config.mask_id)
            with torch.no_grad():
                previous = model(masked, labels, num_masked=before, logits="none")
        masked = tokens.scatter(1, order[:, :num_masked], model.config.mask_id)
        out = model(masked, labels, previous, num_masked=num_masked, logits="masked")
        out.features.square().sum().backward()
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[20] <= 6
    assert not counters["unimplemented"] and "recompile_limit" not in str(dict(counters))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ({"encoder_layers": 0, "decoder_layers": 3, "decoder_attention": "full", "reuse": False}, {"local_steps": 2}),
        pytest.param({"encoder_layers": 3}, {"guide_layers": 2}, marks=pytest.mark.faults),
        ({}, {"entropy_bound": 8.0}),
    ],
    ids=str,
)
def test_compiled_blocks_give_the_samples_of_every_sampler(architecture, options) -> None:
    """With few graphs: those of a compiled block differ only in whether it gets keys and values."""
    torch._dynamo.reset()
    counters.clear()
    model, labels = small_enat(grid_size=6, **architecture), torch.arange(3)
    config = SamplerConfig(num_steps=9, reuse=model.config.reuse, guidance_schedule="constant", **options)
    expected = sample(model, labels, config, seeds=range(3))
    model.compile_blocks(backend="eager")
    assert torch.equal(sample(model, labels, config, seeds=range(3)), expected)
    assert 0 < counters["stats"]["unique_graphs"] <= 6
    assert not counters["unimplemented"] and "recompile_limit" not in str(dict(counters))
