"""Predictions against what was measured on this machine, and what the published configs would take on H200s, computed.

    .venv/bin/python tests/benchmarks/predictions.py              about 15 minutes on two cores
    .venv/bin/python tests/benchmarks/predictions.py --computed   the table of H200s only, in a few seconds

Each case is run twice in one store: first small, which measures the rates, then larger and with another seed, which is predicted
before it runs. The figures are the predicted over the measured seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from common import run_script, show, where
from rich.console import Console
from rich.table import Table
from tokenization import write_images, write_tokenizer

_ROOT = Path(__file__).parents[2]
_ENAT = _ROOT / ".venv" / "bin" / "enat"
_CLUSTERS = ("1x1xH200", "1x8xH200", "8x8xH200")
_SIZES = ("enat-s", "enat-b", "enat-l", "enat-xl")
_DATASETS = {"imagenet256.yaml": 1_281_167, "imagenet512.yaml": 1_281_167, "coco256.yaml": 82_783}
# A grid of 16 x 16 codes out of 1,024, from little work: what is measured is the generator.
_LIGHT = {"resolution": 256, "base_channels": 32, "channel_multipliers": [1, 1, 1, 1, 2], "num_res_blocks": 1}
_PHOTOGRAPHS = {"resolution": 128, "base_channels": 64, "num_res_blocks": 1}


@dataclass(frozen=True)
class Case:
    """config: a file, or None.   small, large: values of the two runs."""

    config: str | None
    values: tuple[str, ...]
    small: tuple[str, ...]
    large: tuple[str, ...]


@click.command()
@click.option("--scale", default=1.0, help="Factor on the numbers of steps and images.")
@click.option("--computed", is_flag=True, help="Only the table of H200s.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(scale: float, computed: bool, as_json: bool) -> None:
    if not computed:
        with tempfile.TemporaryDirectory(prefix="enat-bench-") as place:
            figures: dict[str, Any] = dict(where())
            for name, case in cases(Path(place), scale).items():
                figures |= compare(name, case, Path(place) / name)
        show("predictions", figures, as_json)
    if not as_json:
        show_table(table())


def cases(place: Path, scale: float) -> dict[str, Case]:
    def many(number: int) -> int:
        return max(2, round(number * scale))

    def digits(factor: int, seed: int) -> tuple[str, ...]:
        steps = [f"tokenizer.recipe.num_steps={many(100 * factor)}", f"train.num_steps={many(200 * factor)}"]
        return *steps, f"generate.num_samples={250 * factor}", f"reference.num_epochs={many(5 * factor)}", f"seed={seed}"

    def photographs(name: str, tokenizer: dict[str, Any], count: int) -> tuple[str, ...]:
        folder = write_images(place / f"{name}-{count}", (256, 256), count)
        weights = write_tokenizer(place / f"{name}-tokenizer", tokenizer)
        values = [f"tokenizer.{key}={json.dumps(value)}" for key, value in tokenizer.items()]
        source = f"dataset={{kind: images, path: {folder}}}"
        return "tokenizer.preset=vqgan-256", *values, f"tokenizer.weights={weights}", source, "token_map.forward_batch_size=8"

    def slice_of_s(num_steps: int, seed: int) -> tuple[str, ...]:
        return *photographs("slice", _LIGHT, many(32)), f"train.num_steps={num_steps}", f"seed={seed}"

    model = "train={model: {preset: enat-s}, batch_size: 8, num_groups: 2, warmup_steps: 2}"
    workers = "train.execution={num_workers: 1, cpus_per_worker: 2, log_every: 2}"
    return {
        "digits": Case("digits.yaml", ("targets=[evaluate]",), digits(1, 0), digits(3, 1)),
        "enat_s": Case(None, ("targets=[train]", model, workers), slice_of_s(many(6), 0), slice_of_s(many(18), 1)),
        "photographs": Case(
            None,
            ("targets=[token_map]",),
            photographs("photographs", _PHOTOGRAPHS, many(64)),
            photographs("photographs", _PHOTOGRAPHS, many(256)),
        ),
    }


def compare(name: str, case: Case, place: Path) -> dict[str, float]:
    """Predicted over measured seconds of the larger run without connecting to Ray, and of its stages of a second and more."""
    _run(case, case.small, place, name)
    answer = _run(case, case.large, place, name)
    took = answer["seconds"] - answer["connecting_seconds"]
    figures = {
        f"{name}_seconds": took,
        f"{name}_predicted_over_measured": answer["predicted"]["seconds"]["value"] / took,
        f"{name}_is_in_range": answer["predicted"]["seconds"]["low"] <= took <= answer["predicted"]["seconds"]["high"],
    }
    for stage in answer["stages"]:
        if not stage["reused"] and stage["predicted_seconds"] and stage["made_in_seconds"] >= 1:
            ratio = stage["predicted_seconds"]["value"] / stage["made_in_seconds"]
            figures[f"{name}_{stage['stage']}_predicted_over_measured"] = ratio
    return figures


def _run(case: Case, values: tuple[str, ...], place: Path, name: str) -> dict[str, Any]:
    config = _ROOT / "configs" / (case.config or "digits.yaml")
    if case.config is None:
        place.mkdir(parents=True, exist_ok=True)
        config = place / "empty.yaml"
        config.write_text(f"name: {name}\n")
    command = [str(_ENAT), "run", str(config), f"workspace={place}", f"store={place / 'store'}", *case.values, *values, "--json"]
    environment = {**os.environ, "ENAT_CACHE": str(place / "cache")}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        raise SystemExit(finished.stderr)
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def table() -> list[tuple[str, ...]]:
    """Rows: config, model, cluster, hours of training, of everything else, GPU-hours. Computed, nothing of it is measured."""
    from pipelines.cluster.hardware import parse_cluster
    from pipelines.prediction.predict import predict
    from pipelines.prediction.rates import Rates
    from pipelines.run import prediction as run_prediction
    from pipelines.run.loading import load_run

    rows = []
    for name, images in _DATASETS.items():
        for preset in _SIZES:
            run = load_run(_ROOT / "configs" / name, (f"train.model.preset={preset}",), is_dataset_here=False)
            planned, foreseen_by = run_prediction.unread_plan(run), run_prediction.foreseen_by(images, None, None)
            for cluster in _CLUSTERS:
                predicted = predict(planned, Rates({}), parse_cluster(cluster), foreseen_by=foreseen_by)
                assert predicted.is_complete, [stage.problem for stage in predicted.stages.values() if stage.problem]
                training, total = predicted.stages["train"].seconds.value / 3600, predicted.seconds.value / 3600
                others = [f"{predicted.stages[stage].seconds.value / 60:.1f}" for stage in ("token_map", "generate", "evaluate")]
                hours = f"{predicted.device_hours.value:,.0f}"
                rows.append((name.removesuffix(".yaml"), preset, cluster, f"{training:.1f}", *others, f"{total:.1f}", hours))
    return rows


def show_table(rows: list[tuple[str, ...]]) -> None:
    titles = (
        "config",
        "model",
        "cluster",
        "training (h)",
        "token map (min)",
        "samples (min)",
        "scores (min)",
        "all (h)",
        "GPU-hours",
    )
    shown = Table(title="computed from published peaks", title_justify="left", box=None)
    for title in titles:
        shown.add_column(title)
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)


if __name__ == "__main__":
    run_script(globals(), main)
