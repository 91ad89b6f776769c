"""Which rows share a section, and which published results are shown with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from material.compare_lab import PROTOCOL, Lab, key_of, text_of
from pipelines.comparison import columns as comparison_columns
from pipelines.comparison import compare, sentences
from pipelines.comparison import sections as comparison_sections
from pipelines.comparison.page import Grids
from services.html_page import Page

# Protocols -----------------------------------------------------------------------------------------------------------------


def test_different_protocols_have_different_sections(lab: Lab) -> None:
    fewer = {**PROTOCOL, "num_samples": 5000}
    lab.evaluate({"fid": 2.79})
    lab.evaluate({"fid": 3.5}, samples=key_of(2), num_steps=16)
    lab.evaluate({"fid": 9.99}, protocol=fewer)
    lab.evaluate({"frechet_distance": 50.0}, protocol={**PROTOCOL, "extractor": "dinov2", "extractor_digest": "0" * 64})
    found = lab.compare()
    assert [section.name for section in found.sections] == ["A", "B", "C"]
    by_values = {tuple(sorted(value for row in section.rows for value in row.metrics.values())) for section in found.sections}
    assert by_values == {(2.79, 3.5), (9.99,), (50.0,)}
    letters, rows = sentences.differences(found)
    different = dict(rows)
    assert letters == ["A", "B", "C"]
    assert different.keys() == {"extractor", "num samples", "extractor digest"}, "only what differs"
    assert Counter(different["num samples"]) == {"50,000": 2, "5,000": 1}
    text = text_of(found)
    assert "Numbers with different letters are not comparable" in text and "dinov2 features, 50,000 samples" in text


def test_equal_protocols_need_no_letters_and_a_wrong_digest_joins_nothing(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1), protocol_digest="same")
    lab.evaluate(samples=key_of(2), protocol=dict(reversed(PROTOCOL.items())))
    text = text_of(lab.compare())
    assert "comparable" not in text and text.startswith("imagenet, 256 px\ninception features, 50,000 samples")
    lab.evaluate(samples=key_of(3), protocol={**PROTOCOL, "num_samples": 10}, protocol_digest="same")
    assert len(lab.compare().sections) == 2


def test_a_protocol_that_cannot_be_read_counts_as_unknown(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    for number, text in enumerate(("{", "[1]", "null", '"text"')):
        lab.evaluate(samples=key_of(10 + number), protocol=text, protocol_digest=None)
    found = lab.compare()
    assert sorted(len(section.rows) for section in found.sections) == [1, 4] and len(found.notes) == 4
    lab.evaluate(samples=key_of(20), protocol=None, dataset="digits")
    datasets = [section.dataset for section in lab.compare().sections]
    assert sorted(map(str, datasets)) == ["digits", "imagenet", "imagenet"], "those of unknown protocols are told apart by dataset"


def test_sections_of_other_references_and_resolutions_are_apart(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    lab.evaluate(samples=key_of(2), resolution=512)
    lab.evaluate(samples=key_of(3), protocol={**PROTOCOL, "reference": "digits, 256 px, adm-center", "reference_digest": "3" * 64})
    assert [sentences.heading(section) for section in lab.compare().sections] == [
        "digits, 256 px",
        "imagenet, 256 px",
        "imagenet, 512 px",
    ]


def test_the_reference_defines_a_section_and_not_the_training_data(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    lab.evaluate(samples=key_of(2), model="enat-l-imported", dataset="imported", train_steps=0)
    lab.evaluate(samples=key_of(3), model="learned-elsewhere", dataset="my-photographs")
    (section,) = lab.compare(published="auto").sections
    assert sentences.heading(section) == "imagenet, 256 px" and section.published_dataset == "imagenet256"
    rows = {row.model: comparison_columns.record(row) for row in section.rows}
    assert rows["learned-elsewhere"]["dataset"] == "my-photographs"
    assert not {"dataset", "train_steps"} & rows["enat-l-imported"].keys(), "the training of imported weights is unknown"
    assert "trained on" in [column.title for column in comparison_columns.measured_table(section).columns]


def test_sections_that_share_a_protocol_are_comparable(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    lab.evaluate(samples=key_of(2), resolution=512)
    assert "comparable" not in text_of(lab.compare())
    lab.evaluate(samples=key_of(3), protocol={**PROTOCOL, "num_samples": 10})
    letters, rows = sentences.differences(lab.compare())
    assert sorted(map(len, letters)) == [1, 4] and dict(rows).keys() == {"num samples"}
    assert "comparable only if their letters share a column" in text_of(lab.compare())


def test_more_sections_than_letters_have_names_too() -> None:
    assert [comparison_sections._letters(number) for number in (0, 25, 26, 27, 701, 702)] == ["A", "Z", "AA", "AB", "ZZ", "AAA"]


# Published numbers ---------------------------------------------------------------------------------------------------------


def test_published_numbers_are_shown_for_their_dataset_only(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    digits = {**PROTOCOL, "reference": "digits, 16 px, adm-center", "reference_digest": "3" * 64}
    lab.evaluate(samples=key_of(2), dataset="digits", resolution=16, protocol=digits)
    lab.evaluate({"frechet_distance": 3.0}, samples=key_of(3), protocol={**PROTOCOL, "extractor": "dinov2"})
    sections = {sentences.heading(s): s for s in lab.compare(published="auto").sections if s.distance == "fid"}
    assert len(sections["imagenet, 256 px"].published) == 79 and not sections["digits, 16 px"].published
    assert not [s for s in lab.compare(published="auto").sections if s.distance != "fid" and s.published]
    assert not [s for s in lab.compare(published="none").sections if s.published]
    chosen = lab.compare(published="imagenet512")
    assert not [s for s in chosen.sections if s.published] and "imagenet512" in chosen.notes[0]
    lab.evaluate(protocol={**PROTOCOL, "reference": "my-folder, 256 px, adm-center"})
    for published, count in (("auto", 0), ("imagenet256", 79)):
        (own,) = (s for s in lab.compare(published=published).sections if s.dataset == "my-folder")
        assert len(own.published) == count


def test_published_rows_show_their_source_and_caveats(lab: Lab) -> None:
    lab.evaluate(protocol={**PROTOCOL, "num_samples": 5000})
    text = text_of(lab.compare(published="auto"))
    line = next(line for line in text.splitlines() if line.startswith("DiT-XL/2"))
    assert line.split()[1:5] == ["675M", "250", "59.5", "2.27"] and "arXiv 2212.09748" in line and "derived" in line
    assert "None of them was measured here" in text and "50,000 samples with each class as often as any other" in text
    assert "Differences here: 5,000 samples, which raises FID." in text
    assert " virtual " in line and "ADM's statistics of ImageNet; or unknown" in text
    assert next(line for line in text.splitlines() if line.startswith("ADM ")).split()[1:5] == ["–", "–", "–", "10.94"]
    assert "MAGE-B (unconditional)" in text


def test_a_section_states_how_its_protocol_differs_from_published_ones(lab: Lab) -> None:
    lab.evaluate()
    (section,) = lab.compare(published="auto").sections
    assert section.published_dataset == "imagenet256"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, []),
        ({"num_samples": 30_000}, ["30,000 samples, which raises FID"]),
        ({"labels": "unknown"}, ["labels unknown"]),
        ({"num_reference": 50_000}, ["against 50,000 images of imagenet"]),
        ({"num_reference": None}, ["against an unknown number of images of imagenet"]),
        ({"reference": "VIRTUAL_imagenet256_labeled.npz, 256 px", "num_reference": 10_000}, []),
    ]
    for changed, expected in cases:
        protocol = {**PROTOCOL, **changed}
        measured = replace(section, protocol=protocol, dataset=comparison_sections.reference_dataset(protocol))
        assert sentences.unlike_published(measured) == expected


@pytest.mark.slow
def test_published_numbers_appear_once_after_the_last_of_their_sections(lab: Lab) -> None:
    lab.evaluate(samples=key_of(1))
    lab.evaluate(samples=key_of(2), protocol={**PROTOCOL, "num_samples": 5000})
    lab.evaluate(samples=key_of(3), protocol={**PROTOCOL, "reference": "VIRTUAL_imagenet256_labeled.npz, 256 px"})
    found = lab.compare(published="auto")
    assert {name: [section.name for section in beside] for name, beside in found.quoted.items()} == {"C": ["A", "B", "C"]}
    text = text_of(found)
    assert text.count("\nRAR-XXL ") == 1 and text.index("\nC  ") < text.index("\nRAR-XXL ")
    few = next(section.name for section in found.sections if section.protocol["num_samples"] == 5000)
    assert f"{few}: 5,000 samples" in text
    page = Page.parse(compare.make_files(found, "compare-test", Grids()).page)
    assert page.text.count("RAR-XXL") == 1 and "not measured here: beside A, B, C" in page.text


# One step from real codes --------------------------------------------------------------------------------------------------

FROM_CODES = {**PROTOCOL, "labels": "token map rows"}


def test_one_step_decoding_has_its_own_published_numbers(lab: Lab) -> None:
    for number, (ratio, fid) in enumerate(((0.2, 3.5), (0.8, 45.0))):
        lab.generate(key_of(number), mask_ratio=ratio, num_steps=1)
        variant = f"masked-{ratio}"
        lab.evaluate({"fid": fid}, samples=key_of(number), variant=variant, num_steps=1, protocol=FROM_CODES)
    lab.evaluate(samples=key_of(9))
    one_step, whole = lab.compare(published="auto").sections[::-1]
    assert whole.published_dataset == "imagenet256" and one_step.published_dataset == "imagenet256-one-step"
    assert [row.mask_ratio for row in one_step.rows] == [0.2, 0.8]
    table = comparison_columns.measured_table(one_step)
    assert "mask ratio" in [column.title for column in table.columns]
    assert not [cell for row in table.rows for cell in row if cell.is_best], "other ratios are other tasks"
    text = text_of(lab.compare(published="auto"))
    assert "imagenet, 256 px, completed from real codes" in text
    assert [line.split()[1:4] for line in text.splitlines() if line.startswith("ENAT  ")] == [
        ["1", "0.2", "3.48"],
        ["1", "0.4", "6.74"],
        ["1", "0.6", "16.04"],
        ["1", "0.8", "45.51"],
    ]


def test_codes_completed_in_several_steps_have_no_published_numbers(lab: Lab) -> None:
    lab.evaluate(protocol=FROM_CODES, num_steps=8)
    for published in ("auto", "imagenet256", "imagenet256-one-step"):
        assert not lab.compare(published=published).sections[0].published


def test_a_mask_ratio_that_is_not_a_number_has_a_note(lab: Lab) -> None:
    lab.generate(key_of(1), mask_ratio="half")
    lab.evaluate(samples=key_of(1), protocol=FROM_CODES)
    found = lab.compare()
    assert found.rows[0].mask_ratio is None and "mask_ratio of generate/" in found.notes[0] and "'half'" in found.notes[0]
