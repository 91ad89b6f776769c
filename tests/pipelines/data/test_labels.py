"""Descriptions of labels: equal words mean equal numbers of samples per class, for samples of any generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from material.summaries import summary_of
from pipelines.artifacts.manifest import Manifest
from pipelines.data.labels import check_stated, scheme_of_labels, stated_scheme
from pipelines.data.samples import sample_label
from pipelines.evaluation.protocol import scheme_of

FIELDS: dict[str, Any] = {"key": "a" * 64, "stage_version": 1, "inputs": {}, "files": ()}


def generated(asked_for: str, num_samples: int = 50_000, num_classes: int = 1000, **config: Any) -> str:
    given = {"labels": asked_for, "num_samples": num_samples, "num_classes": num_classes}
    summary = summary_of("generate", **given, mask_ratio=config.pop("mask_ratio", None))
    return scheme_of(Manifest(stage="generate", config=config, summary=summary, **FIELDS))


def test_samples_of_classes_in_turn_and_labels_that_are_as_many_of_each_are_the_same():
    labels = np.random.default_rng(0).permutation(50_000) % 1000
    assert generated("each class in turn") == scheme_of_labels(labels) == "1000 classes, 50 each"
    assert generated("given", labels=list(range(999, -1, -1))) == "1000 classes, 50 each"
    assert stated_scheme("1000 classes", 50_000) == "1000 classes, 50 each"
    assert generated("each class in turn", 10_000) == "1000 classes, 10 each"


def test_labels_of_other_classes_or_other_numbers_are_others():
    one = generated("given", labels=[207])
    few = [generated("given", labels=labels) for labels in ([207, 3], [207, 4], [207, 3, 3])]
    assert one == "class 207 alone" and one == scheme_of_labels(np.full(50_000, 207))
    assert few[0].startswith("2 classes given (") and len({one, *few}) == 4
    assert scheme_of_labels(np.resize([207, 3], 50_000)) == few[0]


def test_evenly_drawn_labels_are_described_as_about_equally_many():
    drawn = np.random.default_rng(0).integers(0, 1000, 50_000)
    assert scheme_of_labels(drawn) == "1000 classes, about 50 each"
    assert stated_scheme("1000 classes, drawn", 50_000) == "1000 classes, about 50 each"
    assert scheme_of_labels([*range(1000), *range(1000), 5]) == "1000 classes, about 2 each"
    unevenly = np.concatenate([np.arange(1000), drawn[:40_000], drawn[40_000:] // 2])
    assert scheme_of_labels(unevenly).startswith("1000 classes given (")
    assert scheme_of_labels([0] * 9000 + list(range(1000))).startswith("1000 classes given (")


@pytest.mark.parametrize("labels", [(), (4,), (1, 7, 7)])
@given(num_samples=st.integers(2, 60), num_classes=st.integers(8, 12))
def test_requested_labels_and_labels_of_samples_are_described_equally(labels, num_samples, num_classes):
    drawn = [sample_label(index, num_classes, labels) for index in range(num_samples)]
    asked_for = "given" if labels else "each class in turn"
    assert generated(asked_for, num_samples, num_classes, labels=list(labels)) == scheme_of_labels(drawn)


def test_captions_say_of_which_dataset_and_how_they_were_chosen():
    train, val = ({"kind": "coco", "name": name} for name in ("coco2014", "coco2014-val"))
    choices = ("drawn", "in_order")
    found = [generated("captions", caption_choice=choice, dataset=dataset) for dataset in (train, val) for choice in choices]
    assert found[2:] == ["captions of coco2014-val, drawn", "captions of coco2014-val, in order"] and len(set(found)) == 4
    assert stated_scheme(found[2], 30_000) == found[2]
    assert generated("captions", caption_choice="drawn", dataset={"kind": "coco", "name": None}) == "captions of coco, drawn"


def test_real_codes_say_what_share_of_them_was_masked():
    assert generated("token map rows", mask_ratio=0.2) == "token map rows, mask ratio 0.2"
    assert generated("token map rows", mask_ratio=0.4) != generated("token map rows", mask_ratio=0.2)


def test_model_without_classes_has_no_labels():
    assert generated("none", num_classes=0) == stated_scheme("none", 7) == "none"


def test_set_with_unknown_labels_is_unknown():
    assert scheme_of_labels([-1, -1]) == scheme_of_labels([0, 1, -1, 1]) == "unknown"


def test_statements_that_are_not_understood_or_cannot_be_true_are_refused():
    for text in ("", "balanced", "1000", "1000 classes, 50 each", "one class", "captions", "captions of coco", "given"):
        with pytest.raises(ValueError, match=r'"1000 classes" .* "none" .* "captions of NAME, drawn"'):
            check_stated(text)
    for text in ("1000 classes", "1 classes", "0 classes", "1501 classes, drawn"):
        with pytest.raises(ValueError, match="1500 images cannot be split equally"):
            stated_scheme(text, 1500)
