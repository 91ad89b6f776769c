"""Stage report: one self-contained page that shows the results of a run. Names are text, never markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from enat.checkpoint import load_vqgan
from enat.images import to_uint8
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.store import ArtifactStore
from pipelines.data.samples import MeasuredPasses, SamplesSummary, read_samples
from pipelines.data.token_map import TokenMap
from pipelines.registry.influences import with_interval
from pipelines.stages import evaluate, report
from pipelines.workflow.models import ModelSummary
from services.html_page import Page, assert_self_contained

PAIRS = ("closest pairs of samples", "closest pairs of real images")
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def inputs(digits_run) -> dict[str, Manifest]:
    """The inputs of the report of the real run, by name."""
    planned = digits_run.planned()
    return {name: planned[id].manifest for name, id in planned["report"].node.inputs.items()}


@pytest.fixture(scope="module")
def store(digits_run) -> ArtifactStore:
    return digits_run.store


@pytest.fixture(scope="module")
def config(digits_run) -> report.ReportConfig:
    return digits_run.planned()["report"].node.config


@pytest.fixture
def render(
    store: ArtifactStore, make_context: Callable[..., Any], request: pytest.FixtureRequest
) -> Callable[[report.ReportConfig, dict[str, Manifest]], Page]:
    """Render a report under a key of its own."""

    def render(config: report.ReportConfig, inputs: dict[str, Manifest]) -> Page:
        result = report.run(config, inputs, make_context(store, "test-report", request.node.name))
        return Page.parse(store.fetch_file("test-report", request.node.name, result.records[0]).read_text(encoding="utf-8"))

    return render


@pytest.fixture(scope="module")
def html(digits_run) -> str:
    return (digits_run.workspace / "digits.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page.parse(html)


# Self-contained ------------------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_its_pictures_can_be_decoded(html: str) -> None:
    page = assert_self_contained(html)
    assert set(page.images) == {"samples, one column per class", "progressive decoding", "reconstructions", *PAIRS}
    for picture in page.images.values():
        assert np.asarray(picture.convert("L")).std() > 1, "a picture of one colour shows nothing"
    assert page.widths["reconstructions"] == 2 * page.images["reconstructions"].width, "96 pixels for each image"


def test_the_loss_curves_are_those_of_training(page: Page, store: ArtifactStore, inputs: dict[str, Manifest]) -> None:
    history = json.loads(store.fetch(inputs["model"], "history.json").read_text())
    curves = page.series("loss")
    for name, key in (("all", "loss"), ("fresh", "fresh_loss"), ("with reused features", "reuse_loss")):
        assert curves[name] == [(row["step"], row[key]) for row in history] and len(history) > 1


# Content -------------------------------------------------------------------------------------------------------------------


def _tile(grid: Image.Image, row: int, column: int) -> np.ndarray:
    """One image of a grid of 96 x 96 tiles with gaps of two pixels, at 16 x 16."""
    left, top = 2 + column * 98, 2 + row * 98
    return np.asarray(grid.crop((left, top, left + 96, top + 96)).resize((16, 16), Image.Resampling.NEAREST))


@pytest.fixture(scope="module")
def decoded(store: ArtifactStore, inputs: dict[str, Manifest]) -> np.ndarray:
    """The samples as images, uint8 (R, 16, 16, 3)."""
    vqgan = load_vqgan(store.fetch(inputs["tokenizer"], "vqgan.safetensors"))
    codes = torch.from_numpy(read_samples(store, inputs["samples"]).codes).view(-1, 4, 4)
    return to_uint8(vqgan.decode(codes)).permute(0, 2, 3, 1).numpy()


def test_grid_has_a_column_for_every_class(page: Page, decoded: np.ndarray) -> None:
    grid = page.images["samples, one column per class"]
    assert grid.size == (10 * 98 + 2, 4 * 98 + 2)
    for index in range(40):
        np.testing.assert_array_equal(_tile(grid, index // 10, index % 10), decoded[index])
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in page.text


def test_progression_starts_gray_and_ends_with_the_sample(page: Page, decoded: np.ndarray) -> None:
    grid = page.images["progressive decoding"]
    assert grid.size == (8 * 98 + 2, 6 * 98 + 2)
    for sample in range(6):
        np.testing.assert_array_equal(_tile(grid, sample, 7), decoded[sample])
        gray = [(_tile(grid, sample, step) == 160).all(axis=-1).mean() for step in range(8)]
        assert gray == sorted(gray, reverse=True) and gray[0] > 0.8 and gray[-1] < 0.2


def test_cost_table_adds_up(page: Page, inputs: dict[str, Manifest]) -> None:
    start = next(number for number, row in enumerate(page.rows) if row[:2] == ["step", "masked before"])
    steps, (decoder, total) = page.rows[start + 1 : start + 9], page.rows[start + 9 : start + 11]
    assert [row[0] for row in steps] == [str(step) for step in range(1, 9)]
    assert sum(int(row[2]) for row in steps) == 16 and steps[0][1] == "16 of 16"
    assert decoder[0] == "tokenizer's decoder" and total[0] == "total"
    for column in (3, 4):
        assert sum(float(row[column]) for row in [*steps, decoder]) == pytest.approx(float(total[column]), abs=0.05)
    metrics, rows = inputs["evaluation"].metrics, {row[0]: row for row in page.rows}
    assert float(total[3]) == pytest.approx(1e3 * metrics["gmacs_total"], abs=0.01)
    assert float(rows["of it, what guidance adds"][3]) == pytest.approx(1e3 * metrics["gmacs_guidance"], abs=0.01)
    for what, part in (("codes", "sampling"), ("pixels", "decoding")):
        assert float(rows[f"{what} of one image"][2]) == pytest.approx(metrics[f"{part}_worker_seconds_per_image"], rel=1e-3)
    assert "worker time per image, decoding included" in page.text


def test_cost_of_samples_that_begin_with_codes(render, config: report.ReportConfig, inputs: dict[str, Manifest]) -> None:
    """With 3 of 16 codes masked, the table starts there, and its total is that of stage evaluate."""
    samples = replace(inputs["samples"], summary={**inputs["samples"].summary, "mask_ratio": 0.2})
    counted = evaluate._counted({"samples": samples, **{name: inputs[name] for name in ("model", "tokenizer")}})
    page = render(config, {**inputs, "samples": samples})
    start = next(number for number, row in enumerate(page.rows) if row[:2] == ["step", "masked before"])
    total = next(row for row in page.rows if row[0] == "total")
    assert page.rows[start + 1][1] == "3 of 16" and sum(int(row[2]) for row in page.rows[start + 1 : start + 9]) == 3
    assert float(total[3]) == pytest.approx(1e3 * counted["gmacs_total"], abs=0.01)
    assert counted["gmacs_total"] != inputs["evaluation"].metrics["gmacs_total"]


@pytest.mark.slow
def test_cost_of_samples_that_each_take_their_own_passes(render, config: report.ReportConfig, inputs: dict[str, Manifest]) -> None:
    """Means of two samples, of 2 and of 4 passes."""
    made, model = SamplesSummary.read(inputs["samples"]), ModelSummary.read(inputs["model"]).model
    sampler = replace(made.sampler, entropy_bound=8.0)
    counts = np.array([[16, 5, 0, 0, 0, 0, 0, 0], [16, 10, 4, 1, 0, 0, 0, 0]])
    summary = replace(made, sampler=sampler, measured=MeasuredPasses.of(counts, model, sampler, 0))
    samples = replace(inputs["samples"], summary=summary.to_dict())
    counted = evaluate._counted({"samples": samples, **{name: inputs[name] for name in ("model", "tokenizer")}})
    page = render(config, {**inputs, "samples": samples})
    start = next(number for number, row in enumerate(page.rows) if row[:2] == ["step", "masked before"])
    assert [row[1] for row in page.rows[start + 1 : start + 6]] == [f"{masked} of 16" for masked in (16.0, 7.5, 2.0, 0.5, 0.0)]
    assert sum(float(row[2]) for row in page.rows[start + 1 : start + 9]) == 16
    total = next(row for row in page.rows if row[0] == "total")
    assert float(total[4]) == pytest.approx(1e3 * counted["gmacs_executed"], abs=0.01) and counted["passes_per_image"] == 3
    assert "means over the samples, which took 3 of at most 8 steps" in page.text


def test_scores_of_all_variants_and_places_of_all_artifacts_are_shown(
    page: Page, store: ArtifactStore, inputs: dict[str, Manifest]
) -> None:
    rows = {row[0]: row for row in page.rows}
    for variant, name in (("main", "evaluation"), ("untrained", "evaluation@untrained")):
        assert with_interval(inputs[name].metrics, "frechet_distance") in rows[variant]
        assert f"{100 * inputs[name].metrics['class_agreement']:.1f} %" in rows[variant]
    assert len(inputs) == 12
    for name, manifest in inputs.items():
        row = next(row for row in page.rows if row[0] == name and manifest.key in row[-1])
        assert store.place(manifest.stage, manifest.key) in row[-1]


def test_samples_stand_beside_their_nearest_training_images(
    page: Page, store: ArtifactStore, inputs: dict[str, Manifest], decoded: np.ndarray
) -> None:
    """The closest pair is the first one of the picture: the sample, then the row of the token map."""
    found = pq.read_table(store.fetch(inputs["memorization"], "nearest.parquet")).to_pydict()
    closest = int(np.argmin(found["distance"]))
    pairs = page.images["closest pairs of samples"]
    np.testing.assert_array_equal(_tile(pairs, 0, 0), decoded[found["index"][closest]])
    tokens = TokenMap.open(store, inputs["token_map"])
    codes = tokens.codes[found["nearest_row"][closest], int(found["is_flipped"][closest])]
    assert (codes != read_samples(store, inputs["samples"]).codes[closest]).sum() == found["distance"][closest]
    vqgan = load_vqgan(store.fetch(inputs["tokenizer"], "vqgan.safetensors"))
    (nearest,) = to_uint8(vqgan.decode(torch.from_numpy(codes.astype(np.int64)).view(-1, 4, 4))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(_tile(pairs, 0, 1), nearest)
    rows = {row[0]: row for row in page.rows}
    for variant, suffix in (("main", ""), ("untrained", "@untrained")):
        assert with_interval(inputs[f"memorization{suffix}"].metrics, "nearest_distance") in rows[f"samples of {variant}"]
    assert f"{inputs['audit'].metrics['nearest_distance']:.4g}" in rows["real images"]


# Other runs ----------------------------------------------------------------------------------------------------------------


def test_names_are_never_markup(render, config: report.ReportConfig, inputs: dict[str, Manifest], page: Page) -> None:
    summary = inputs["token_map"].summary
    hostile_map = replace(
        inputs["token_map"],
        summary={**summary, "info": {**summary["info"], "dataset": HOSTILE}, "class_names": [f"{n}{HOSTILE}" for n in range(10)]},
    )
    evaluation = inputs["evaluation"]
    hostile_evaluation = replace(evaluation, summary={**evaluation.summary, "extractor": HOSTILE})
    hostile = render(replace(config, name=HOSTILE), {**inputs, "token_map": hostile_map, "evaluation": hostile_evaluation})
    assert hostile.tags == page.tags and set(hostile.images) == set(page.images) and hostile.scripts == page.scripts
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) >= 1 + 1 + 10 + 1


def test_untrained_model_has_no_loss_curve(render, config: report.ReportConfig, inputs: dict[str, Manifest]) -> None:
    swapped = {**inputs, **{name: inputs[f"{name}@untrained"] for name in ("model", "samples", "evaluation")}}
    shown = render(config, swapped)
    assert shown.charts == {} and shown.scripts[1] == "", "nothing to draw, so no script of Plotly"
    assert set(shown.images) == {"samples, one column per class", "progressive decoding", "reconstructions", *PAIRS}


def test_missing_results_are_not_shown(render, config: report.ReportConfig, inputs: dict[str, Manifest]) -> None:
    """An imported tokenizer has no reconstructions, a run without a judge no agreement."""

    def judgeless(manifest: Manifest) -> Manifest:
        return replace(manifest, metrics={name: value for name, value in manifest.metrics.items() if "agreement" not in name})

    tokenizer = inputs["tokenizer"]
    imported = replace(tokenizer, records=(), summary={**tokenizer.summary, "is_imported": True})
    kept = {name: judgeless(manifest) for name, manifest in inputs.items() if manifest.stage not in ("audit", "memorization")}
    shown = render(config, kept | {"tokenizer": imported})
    assert set(shown.images) == {"samples, one column per class", "progressive decoding"}
    assert "class agreement (independent" not in shown.text and "Nearest training images" not in shown.text
    titles, own = next(row for row in shown.rows if row[0] == "model"), next(row for row in shown.rows if row[0] == "main")
    assert "class agreement" not in titles and len(own) == len(titles)


@pytest.mark.slow
def test_only_the_first_classes_are_shown(render, config: report.ReportConfig, inputs: dict[str, Manifest], decoded) -> None:
    grid = render(replace(config, max_classes=3, samples_per_class=2), inputs).images["samples, one column per class"]
    assert grid.size == (3 * 98 + 2, 2 * 98 + 2)
    for row, first in enumerate((0, 10)):
        for column in range(3):
            np.testing.assert_array_equal(_tile(grid, row, column), decoded[first + column])


@pytest.mark.parametrize("wrong", ["samples_per_class", "num_progressions", "max_classes"])
def test_an_empty_report_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="it must be at least 1"):
        report.ReportConfig(**{wrong: 0})
