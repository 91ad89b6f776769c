"""Batches: what a group learns from depends on (seed, step, group) and on nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, Material, changed

from enat.model import ENAT, TextCondition
from pipelines.training.batches import Batches, GroupBatch, draw_group, rows_of
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


def test_a_group_is_drawn_alike_every_time(material: Material) -> None:
    first, again = (draw_group(CONFIG, material.token_map, None, 3, 2) for _ in range(2))
    assert _flat(first) == _flat(again) and (first.step, first.group, first.weight) == (3, 2, 1.0)


@pytest.mark.parametrize("other", [(1, 3, 2), (0, 4, 2), (0, 3, 1)], ids=["seed", "step", "group"])
def test_another_seed_step_or_group_draws_something_else(material: Material, other: tuple[int, int, int]) -> None:
    seed, step, group = other
    mine = draw_group(CONFIG, material.token_map, None, 3, 2)
    theirs = draw_group(changed(seed=seed), material.token_map, None, step, group)
    assert mine.dropout_seed != theirs.dropout_seed and mine.masked.tokens.tolist() != theirs.masked.tokens.tolist()


def test_draws_do_not_depend_on_how_training_runs(material: Material) -> None:
    spread = changed(execution={"num_workers": 4, "zero_stage": 3, "microbatches": 2})
    assert _flat(draw_group(spread, material.token_map, None, 3, 2)) == _flat(draw_group(CONFIG, material.token_map, None, 3, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_groups_of_all_ranks_are_the_global_batch_once(material: Material, world_size: int) -> None:
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


def test_a_rank_with_fewer_groups_repeats_its_last_one_without_weight(material: Material) -> None:
    ranks = [_taken(material, CONFIG, steps=1, rank=rank, world_size=3)[0] for rank in range(3)]
    assert [[(batch.group, batch.weight) for batch in rank] for rank in ranks] == [
        [(0, 1.0), (1, 1.0)],
        [(2, 1.0), (2, 0.0)],
        [(3, 1.0), (3, 0.0)],
    ]


def test_batches_from_a_step_on_are_those_of_an_uninterrupted_run(material: Material) -> None:
    whole = _taken(material, CONFIG, steps=6, rank=0, world_size=2)
    later = _taken(material, CONFIG, steps=2, step=4, rank=0, world_size=2)
    assert [[_flat(batch) for batch in step] for step in later] == [[_flat(batch) for batch in step] for step in whole[4:]]


def test_what_drawing_fails_with_is_raised_where_the_batch_is_taken(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    token_map = material.token_map
    monkeypatch.setattr(token_map, "take", lambda *_: (_ for _ in ()).throw(OSError("the map is gone")))
    batches = Batches(CONFIG, token_map, None, step=0, rank=0, world_size=1)
    with pytest.raises(OSError, match="the map is gone"):
        list(batches.take_step())
    batches.close()


def test_time_waited_for_batches_is_counted(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    token_map, go = material.token_map, threading.Event()
    take = token_map.take
    monkeypatch.setattr(token_map, "take", lambda *rows: go.wait(30) and take(*rows))
    batches = Batches(CONFIG, token_map, None, step=0, rank=0, world_size=1)
    threading.Timer(0.2, go.set).start()
    list(batches.take_step())
    batches.close()
    assert 0.1 < batches.seconds_waited < 10


def test_rows_of_a_group_are_those_it_is_drawn_from(material: Material) -> None:
    rows = rows_of(CONFIG, material.token_map, 3, 2)
    batch = draw_group(changed(flip=False), material.token_map, None, 3, 2)
    np.testing.assert_array_equal(batch.codes, material.token_map.codes[rows, 0])
    np.testing.assert_array_equal(batch.condition, material.token_map.labels[rows])
    every = np.concatenate([rows_of(CONFIG, material.token_map, 0, group) for group in range(4)])
    assert len(set(every.tolist())) == CONFIG.batch_size, "no image twice in an epoch"


def test_images_are_flipped_only_where_the_config_says_so(material: Material) -> None:
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


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_as_many_labels_are_dropped_as_the_config_says(material: Material, share: float) -> None:
    config = changed(label_dropout=share)
    dropped = torch.cat([draw_group(config, material.token_map, None, step, 0).is_dropped for step in range(200)]).float().mean()
    assert abs(dropped.item() - share) < 0.06


def test_captions_are_those_of_the_rows_that_are_drawn(material: Material) -> None:
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


def test_every_caption_of_an_image_has_its_turn(material: Material) -> None:
    drawn = np.concatenate([material.token_map.batch_rows(0, step, 16).captions for step in range(40)])
    assert set(drawn.tolist()) == set(range(40))


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_parts_are_the_whole_cut_into_rows(material: Material, count: int, is_text: bool) -> None:
    config = changed(WITH_DROPOUT, model={"text": is_text, "dropout": 0.2}, label_dropout=0.5)
    model = ENAT(material.architecture(config))
    drawn = [draw_group(config, material.token_map, material.captions if is_text else None, step, 1) for step in range(8)]
    assert {batch.is_reuse for batch in drawn} == {True, False}
    for batch in drawn:
        ((codes, condition, masked, kept),) = batch.parts(1, model)
        parts = list(batch.parts(count, model))
        assert len(parts) == count and kept is not None
        assert torch.equal(torch.cat([part[0] for part in parts]), codes)
        assert torch.equal(torch.cat([part[3] for part in parts]), kept)
        assert torch.equal(torch.cat([part[2].tokens for part in parts]), masked.tokens)
        assert {part[2].num_masked for part in parts} == {masked.num_masked}
        if masked.previous_tokens is not None:
            assert torch.equal(torch.cat([part[2].previous_tokens for part in parts]), masked.previous_tokens)
        for name in ("hidden", "pooled") if is_text else ("real",):
            assert torch.equal(torch.cat([getattr(part[1], name) for part in parts]), getattr(condition, name))


def test_a_condition_is_dropped_where_the_draw_says_so(material: Material) -> None:
    config = changed(label_dropout=0.5)
    model, batch = ENAT(material.architecture(config)), draw_group(config, material.token_map, None, 0, 0)
    ((_, condition, _, _),) = batch.parts(1, model)
    assert 0 < batch.is_dropped.sum() < len(batch.codes)
    assert torch.equal(condition == model.config.null_label, batch.is_dropped)
    assert torch.equal(condition[~batch.is_dropped], batch.condition[~batch.is_dropped])


def test_moving_to_a_device_changes_no_value(material: Material) -> None:
    for captions in (None, material.captions):
        batch = draw_group(CONFIG, material.token_map, captions, 2, 1)
        moved = batch.to(torch.device("cpu"))
        assert _flat(moved) == _flat(batch) and dataclasses.fields(moved) == dataclasses.fields(batch)
