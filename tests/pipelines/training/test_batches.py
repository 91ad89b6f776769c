"""Batches: a group depends on (seed, step, group) and on nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from enat.model import ENAT, TextCondition
from material.tiny_training import CONFIG, Material, changed
from pipelines.training.batches import Batches, GroupBatch, draw_group, pieces_per_group, rows_of
from pipelines.training.config import TrainConfig

WITH_DROPOUT = changed(model={"dropout": 0.2})


def _flat(batch: GroupBatch) -> list[Any]:
    """All values of a batch, for comparing."""
    text = isinstance(batch.condition, TextCondition)
    condition = [batch.condition.hidden, batch.condition.pooled] if text else [batch.condition]
    tensors = [batch.codes, *condition, batch.is_dropped, batch.masked.tokens, batch.masked.previous_tokens]
    numbers = [batch.step, batch.group, batch.weight, batch.dropout_seed, batch.masked.num_masked, batch.masked.previous_num_masked]
    return [*[None if tensor is None else tensor.tolist() for tensor in tensors], *numbers]


def _taken(material: Material, config: TrainConfig, *, steps: int, step: int = 0, captions: Any = None, **spread: int) -> list[Any]:
    """Groups of some steps, those of a step in a list of their own."""
    batches = Batches(config, material.token_map, captions, step=step, **spread)
    taken = [list(batches.take_step()) for _ in range(steps)]
    batches.close()
    return taken


def test_group_depends_on_seed_step_and_group_alone(material):
    spread = changed(execution={"num_workers": 4, "zero_stage": 3, "microbatches": 2})
    first, again, other = (draw_group(config, material.token_map, None, 3, 2) for config in (CONFIG, CONFIG, spread))
    assert _flat(first) == _flat(again) == _flat(other) and (first.step, first.group, first.weight) == (3, 2, 1.0)
    for seed, step, group in ((1, 3, 2), (0, 4, 2), (0, 3, 1)):
        theirs = draw_group(changed(seed=seed), material.token_map, None, step, group)
        assert first.dropout_seed != theirs.dropout_seed and first.masked.tokens.tolist() != theirs.masked.tokens.tolist()


@pytest.mark.parametrize(
    ("world_size", "microbatches", "num_pieces"), [(4, 1, 1), (5, 1, 2), (8, 1, 2), (8, 2, 2), (12, 1, 4), (16, 1, 4)]
)
def test_more_ranks_than_groups_share_the_rows_of_each(material, world_size, microbatches, num_pieces):
    """16 images in four groups."""
    config = changed(execution={"microbatches": microbatches})
    assert pieces_per_group(config, world_size) == num_pieces
    ranks = [_taken(material, config, steps=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(2):
        counted = [batch for rank in ranks for batch in rank[step] if batch.weight]
        places = [(batch.group, batch.piece) for batch in counted]
        assert places == [(group, piece) for group in range(4) for piece in range(num_pieces)]
        assert {batch.num_pieces for batch in counted} == {num_pieces}
        for batch in counted:
            assert _flat(batch)[:-4] == _flat(draw_group(config, material.token_map, None, step, batch.group))[:-4]
        assert len({len(rank[step]) for rank in ranks}) == 1, "every rank takes part in every reduction"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_groups_of_all_ranks_are_the_global_batch_once(material, world_size):
    ranks = [_taken(material, CONFIG, steps=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(3):
        groups = [batch for rank in ranks for batch in rank[step]]
        counted = [batch for batch in groups if batch.weight]
        assert [(batch.step, batch.group) for batch in counted] == [(step, group) for group in range(4)]
        rows = material.token_map.batch_rows(0, step, CONFIG.batch_size)
        codes, _ = material.token_map.take(rows.rows, rows.flipped)
        np.testing.assert_array_equal(torch.cat([batch.codes for batch in counted]), codes)
        assert {batch.weight for batch in groups} <= {0.0, 1.0}
        assert len({len(rank[step]) for rank in ranks}) == 1, "every rank takes part in every reduction"


def test_rank_with_fewer_groups_repeats_its_last_one_without_weight(material):
    ranks = [_taken(material, CONFIG, steps=1, rank=rank, world_size=3)[0] for rank in range(3)]
    assert [[(batch.group, batch.weight) for batch in rank] for rank in ranks] == [
        [(0, 1.0), (1, 1.0)],
        [(2, 1.0), (2, 0.0)],
        [(3, 1.0), (3, 0.0)],
    ]


def test_batches_from_a_step_on_are_those_of_an_uninterrupted_run(material):
    whole = _taken(material, CONFIG, steps=6, rank=0, world_size=2)
    later = _taken(material, CONFIG, steps=2, step=4, rank=0, world_size=2)
    assert [[_flat(batch) for batch in step] for step in later] == [[_flat(batch) for batch in step] for step in whole[4:]]


def test_error_of_drawing_is_raised_where_the_batch_is_taken(material, monkeypatch):
    token_map = material.token_map
    monkeypatch.setattr(token_map, "take", lambda *_: (_ for _ in ()).throw(OSError("the map is gone")))
    batches = Batches(CONFIG, token_map, None, step=0, rank=0, world_size=1)
    with pytest.raises(OSError, match="the map is gone"):
        list(batches.take_step())
    batches.close()


def test_time_waited_for_batches_is_counted(material, monkeypatch):
    import threading

    token_map, go = material.token_map, threading.Event()
    take = token_map.take
    monkeypatch.setattr(token_map, "take", lambda *rows: go.wait(30) and take(*rows))
    batches = Batches(CONFIG, token_map, None, step=0, rank=0, world_size=1)
    threading.Timer(0.2, go.set).start()
    list(batches.take_step())
    batches.close()
    assert 0.1 < batches.seconds_waited < 10


def test_rows_of_a_group_are_those_it_is_drawn_from(material):
    rows = rows_of(CONFIG, material.token_map, 3, 2)
    batch = draw_group(changed(flip=False), material.token_map, None, 3, 2)
    np.testing.assert_array_equal(batch.codes, material.token_map.codes[rows, 0])
    np.testing.assert_array_equal(batch.condition, material.token_map.labels[rows])
    every = np.concatenate([rows_of(CONFIG, material.token_map, 0, group) for group in range(4)])
    assert len(set(every.tolist())) == CONFIG.batch_size, "no image twice in an epoch"


def test_images_are_flipped_only_if_configured(material):
    def is_flipped(flip: bool) -> list[bool]:
        flipped = []
        for group in range(4):
            rows, batch = (
                rows_of(CONFIG, material.token_map, 0, group),
                draw_group(changed(flip=flip), material.token_map, None, 0, group),
            )
            flipped += (batch.codes.numpy() != material.token_map.codes[rows, 0]).any(axis=1).tolist()
        return flipped

    assert not any(is_flipped(False)) and 0 < sum(is_flipped(True)) < CONFIG.batch_size


@pytest.mark.slow
def test_configured_share_of_labels_is_dropped(material):
    for share in (0.0, 0.5):
        config = changed(cond_drop_prob=share)
        dropped = torch.cat([draw_group(config, material.token_map, None, step, 0).is_dropped for step in range(200)])
        assert abs(dropped.float().mean().item() - share) < 0.06


def test_captions_are_those_of_the_rows_that_are_drawn(material):
    for group in range(4):
        rows, batch = (
            rows_of(CONFIG, material.token_map, 1, group),
            draw_group(CONFIG, material.token_map, material.captions, 1, group),
        )
        assert isinstance(batch.condition, TextCondition)
        for place, row in enumerate(rows):
            both = material.captions.take(np.array([2 * row, 2 * row + 1]))[1]
            assert batch.condition.pooled[place].tolist() in both.tolist()
        codes = draw_group(CONFIG, material.token_map, None, 1, group)
        assert batch.codes.tolist() == codes.codes.tolist() and batch.dropout_seed == codes.dropout_seed


def test_every_caption_of_an_image_is_drawn(material):
    drawn = np.concatenate([material.token_map.batch_rows(0, step, 16).captions for step in range(40)])
    assert set(drawn.tolist()) == set(range(40))


@pytest.mark.parametrize(("count", "is_text"), [(2, True), (4, False)])
def test_microbatches_are_rows_of_the_group(material, count, is_text):
    config = changed(WITH_DROPOUT, model={"text": is_text, "dropout": 0.2}, cond_drop_prob=0.5)
    model = ENAT(material.architecture(config))
    drawn = [draw_group(config, material.token_map, material.captions if is_text else None, step, 1) for step in range(8)]
    assert {batch.is_reuse for batch in drawn} == {True, False}
    for batch in drawn:
        ((codes, condition, masked, kept),) = batch.microbatches(1, model)
        parts = list(batch.microbatches(count, model))
        assert len(parts) == count and kept is not None
        assert torch.equal(torch.cat([part[0] for part in parts]), codes)
        assert torch.equal(torch.cat([part[3] for part in parts]), kept)
        assert torch.equal(torch.cat([part[2].tokens for part in parts]), masked.tokens)
        assert {part[2].num_masked for part in parts} == {masked.num_masked}
        if masked.previous_tokens is not None:
            assert torch.equal(torch.cat([part[2].previous_tokens for part in parts]), masked.previous_tokens)
        for name in ("hidden", "pooled") if is_text else ("real",):
            assert torch.equal(torch.cat([getattr(part[1], name) for part in parts]), getattr(condition, name))


def test_dropped_conditions_are_the_null_condition(material):
    config = changed(cond_drop_prob=0.5)
    model, batch = ENAT(material.architecture(config)), draw_group(config, material.token_map, None, 0, 0)
    ((_, condition, _, _),) = batch.microbatches(1, model)
    assert 0 < batch.is_dropped.sum() < len(batch.codes)
    assert torch.equal(condition == model.config.null_label, batch.is_dropped)
    assert torch.equal(condition[~batch.is_dropped], batch.condition[~batch.is_dropped])


def test_moving_to_a_device_changes_no_value(material):
    for captions in (None, material.captions):
        batch = draw_group(CONFIG, material.token_map, captions, 2, 1)
        moved = batch.to(torch.device("cpu"))
        assert _flat(moved) == _flat(batch) and dataclasses.fields(moved) == dataclasses.fields(batch)
