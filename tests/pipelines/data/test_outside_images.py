"""Images of other generators through the same stages, by the command: the same pixels get the same scores as our own samples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from material.digits_run import DIGITS, TINY_DIGITS
from pipelines.data.image_sets import ImageSetConfig, find_resolution
from pipelines.evaluation.readers import read_images, sample_reader
from pipelines.run import graph
from pipelines.run.loading import load_run


@pytest.fixture(scope="module")
def images(digits_run, tmp_path_factory):
    """Samples of the real run as somebody else would hand them on: PNG files."""
    planned = digits_run.planned()
    samples, tokenizer, reference = (planned[name].manifest for name in ("generate", "tokenizer", "reference"))
    folder = tmp_path_factory.mktemp("images")
    pixels = read_images(sample_reader(digits_run.store, samples, tokenizer, None), 0, 40, reference.summary["images_per_pass"])
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:05d}.png")
    return folder


def test_stages_are_those_of_the_run_and_nothing_is_trained(images, tmp_path):
    run = load_run(DIGITS, (*TINY_DIGITS, f"workspace={tmp_path}", "targets=[reference]"))
    asks = replace(run, evaluate=replace(run.evaluate, clip_score="clip"))  # nobody knows what these images were asked for
    nodes = {node.id: node for node in graph.build_evaluation(asks, ImageSetConfig(path=str(images), name="other"))}
    assert nodes["evaluate"].config.clip_score is None
    own = {node.id: node for node in graph.build(run)}
    assert list(nodes) == ["images", "dataset", "reference", "evaluate"]
    assert nodes["reference"].config == own["reference"].config and nodes["dataset"].config == own["dataset"].config
    assert nodes["evaluate"].inputs == {"samples": "images", "reference": "reference"} and nodes["evaluate"].config.judge is None


def test_protocols_of_the_config_score_outside_images_too(images, tmp_path):
    few = "protocols={few: {evaluate: {num_samples: 20}}, other: {reference: {num_kept: 7}}}"
    run = load_run(DIGITS, (*TINY_DIGITS, f"workspace={tmp_path}", "targets=[reference]", few))
    nodes = {node.id: node for node in graph.build_evaluation(run, ImageSetConfig(path=str(images), name="other"))}
    assert list(nodes) == ["images", "dataset", "reference", "evaluate", "evaluate/few", "reference/other", "evaluate/other"]
    assert nodes["evaluate/few"].inputs == {"samples": "images", "reference": "reference"}
    assert nodes["evaluate/few"].config.num_samples == 20 and nodes["evaluate/other"].config.judge is None


def test_reference_of_adm_needs_no_dataset(images, tmp_path):
    npz = tmp_path / "adm.npz"
    npz.write_bytes(b"its digest is part of the key")
    run = load_run(None, ("name=it", f"reference.npz={npz}", "reference.extractor=inception", "targets=[reference]"))
    source = ImageSetConfig(path=str(images), name="other")
    nodes = {node.id: node for node in graph.build_evaluation(run, source, find_resolution(source))}
    assert list(nodes) == ["images", "reference", "evaluate"] and nodes["reference"].inputs == {}
    assert nodes["reference"].config.resolution == 16


@pytest.mark.faults  # two commands with Ray
def test_same_pixels_get_the_same_scores(digits_run, images, enat):
    arguments = ("--samples", images, "--name", "somebody's", "--config", DIGITS, "--json", f"workspace={digits_run.workspace}")
    answer = enat("evaluate", *arguments, *TINY_DIGITS)
    assert answer.returncode == 0, answer.stderr
    scores, own = json.loads(answer.stdout)["scores"]["main"], digits_run.planned()["evaluate"].manifest
    for name in ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"):
        # Pixels that were decoded by another process may differ by a level where they are nearly half-way.
        assert scores[name] == pytest.approx(own.metrics[name], rel=1e-4, abs=0.026 if name != "frechet_distance" else 0), name
    assert "class_agreement" not in scores and "gmacs_total" not in scores
    stages = {stage["stage"]: stage["reused"] for stage in json.loads(answer.stdout)["stages"]}
    assert stages == {"images": False, "dataset": True, "reference": True, "evaluate": False}
    compared = enat("compare", "--workspace", digits_run.workspace, "--json", "--no-log")
    assert compared.returncode == 0 and "somebody's" in compared.stdout


@pytest.mark.faults
def test_missing_images_are_bad_input(enat, tmp_path):
    values = (f"workspace={tmp_path / 'runs'}", "tracking.enabled=false", *TINY_DIGITS)
    answer = enat("evaluate", "--samples", tmp_path / "nothing", "--name", "none", "--config", DIGITS, *values)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "nothing" in answer.stderr
