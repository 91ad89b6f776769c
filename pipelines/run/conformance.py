"""Whether the scores of this installation are those of others, for `enat evaluate --conformance`.

Without samples, a small set of real photographs is scored by the stages and by torch-fidelity, with the same weights. With samples
whose scores are published, these are compared.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from pipelines.data.image_sets import ImageSetConfig, find_resolution
from pipelines.run import graph, runner
from pipelines.run.loading import load_run

if TYPE_CHECKING:
    from torch import Tensor

_SIDE, _IMAGES = 64, 40  # of each small set
_SMALL = {"num_splits": 4, "kernel_subsets": 10, "kernel_subset_size": 20}
# Score -> torch-fidelity's name for it, and how much of it both may differ by: sums of float32 are in another order.
_OF_TORCH_FIDELITY = {
    "fid": ("frechet_inception_distance", 1e-5),
    "kid": ("kernel_inception_distance_mean", 1e-4),
    "kid_std": ("kernel_inception_distance_std", 1e-4),
    "inception_score": ("inception_score_mean", 1e-4),
    "inception_score_std": ("inception_score_std", 1e-4),
    "precision": ("precision", 1e-4),
    "recall": ("recall", 1e-4),
}


@dataclass(frozen=True)
class KnownScores:
    """Scores of a published file, and how much of each ours may differ by.

    settings: overrides under which it was scored.   source: of the scores.
    """

    scores: Mapping[str, tuple[float, float]]
    settings: tuple[str, ...]
    source: str


# ADM's evaluator runs Inception in TensorFlow, and this code torch-fidelity's port of it. The tolerances are allowances for that;
# they were not measured, because the files are not at hand.
PUBLISHED = {
    "admnet_guided_upsampled_imagenet256.npz": KnownScores(
        {
            "fid": (3.94, 0.01),
            "sfid": (6.14, 0.02),
            "inception_score": (215.84, 0.01),
            "precision": (0.8265, 0.005),
            "recall": (0.5309, 0.01),
        },
        ("reference.extractor=inception", "evaluate.settings.split_size=5000"),
        "README of openai/guided-diffusion, evaluations, against VIRTUAL_imagenet256_labeled.npz",
    )
}


@dataclass(frozen=True)
class Agreement:
    """One score, here and elsewhere. tolerance: how much both may differ, as a share of the expected score."""

    score: str
    ours: float
    expected: float
    tolerance: float

    @property
    def is_good(self) -> bool:
        return abs(self.ours - self.expected) <= self.tolerance * max(abs(self.expected), 1e-3)


def check_small_set(weights: Mapping[str, Tensor] | None, console: Console) -> list[Agreement]:
    """Score 40 crops of one photograph against 40 of another, by the stages and by torch-fidelity.

    weights: of torch-fidelity's InceptionV3; None takes random ones, whose scores mean nothing but must agree.
    """
    import torch
    from torch_fidelity import calculate_metrics

    from enat.metrics.inception import random_inception_weights

    with tempfile.TemporaryDirectory(prefix="enat-conformance-") as folder:
        root = Path(folder)
        _write_crops(root)
        torch.save(dict(random_inception_weights() if weights is None else weights), root / "inception.pth")
        images = ImageSetConfig(path=str(root / "made"), name="conformance", kind="folder", labels="none")
        ours = _scores(
            images,
            [
                f"workspace={root / 'runs'}",
                "tracking.enabled=false",
                f"dataset={{kind: images, path: {root / 'real'}}}",
                "reference.extractor=inception",
                f"reference.weights={root / 'inception.pth'}",
                "reference.forward_batch_size=8",
                *(f"evaluate.settings.{name}={value}" for name, value in _SMALL.items()),
            ],
            console,
        )
        theirs = calculate_metrics(
            input1=str(root / "made"), input2=str(root / "real"), cuda=False, batch_size=8, verbose=False, save_cpu_ram=True,
            isc=True, fid=True, kid=True, prc=True, isc_splits=_SMALL["num_splits"], kid_subsets=_SMALL["kernel_subsets"],
            kid_subset_size=_SMALL["kernel_subset_size"], cache=False, feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(root / "inception.pth"),  # opened as a pickle, so it is a file from here
        )  # fmt: skip
    return [Agreement(score, ours[score], theirs[name], tolerance) for score, (name, tolerance) in _OF_TORCH_FIDELITY.items()]


def check_published(path: str, overrides: list[str], console: Console) -> list[Agreement]:
    """Score a published file. Raises ValueError for a file whose scores are not known."""
    name = PurePosixPath(path).name
    if name not in PUBLISHED:
        raise ValueError(f"the scores of {name} are not known here; --conformance takes {', '.join(PUBLISHED)}, or no --samples")
    known = PUBLISHED[name]
    ours = _scores(ImageSetConfig(path=path, name=name.partition(".")[0]), [*known.settings, *overrides], console)
    return [Agreement(score, ours[score], expected, tolerance) for score, (expected, tolerance) in known.scores.items()]


def _scores(images: ImageSetConfig, overrides: list[str], console: Console) -> dict[str, float]:
    run = load_run(None, ["name=conformance", "targets=[reference]", *overrides])
    handlers = logging.getLogger().handlers
    try:
        answer = runner.run(run, "conformance", console, lambda run: graph.build_evaluation(run, images, find_resolution(images)))
    finally:
        logging.getLogger().handlers = handlers  # the log of the run is removed with its folder
    scores: dict[str, Any] = answer["scores"]["main"]
    return scores


def _write_crops(root: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    for folder, name, seed in (("made", "china", 0), ("real", "flower", 1)):
        photograph, rng = Image.fromarray(load_sample_image(f"{name}.jpg")), np.random.default_rng(seed)
        (root / folder).mkdir()
        for number in range(_IMAGES):
            left, top = (int(rng.integers(0, size - _SIDE)) for size in photograph.size)
            photograph.crop((left, top, left + _SIDE, top + _SIDE)).save(root / folder / f"{number:03d}.png")


def show(agreements: list[Agreement], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("score", "here", "expected", "difference", "allowed", ""):
        table.add_column(column, justify="left" if column in ("score", "") else "right")
    for each in agreements:
        share = abs(each.ours - each.expected) / max(abs(each.expected), 1e-3)
        mark = "[green]agrees[/]" if each.is_good else "[red]differs[/]"
        table.add_row(each.score, f"{each.ours:.6g}", f"{each.expected:.6g}", f"{share:.1e}", f"{each.tolerance:.0e}", mark)
    console.print()
    console.print(table)
