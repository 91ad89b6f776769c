"""Samplers by name in a config: the values are read, planned, recorded and computed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from enat.sampler_config import SamplerConfig
from pipelines.cli.run import plan
from pipelines.cli.sample import _sampler
from pipelines.jobs import submission
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.sampling.presets import presets
from pipelines.workflow import config as configuration

CONFIGS = Path(__file__).parents[3] / "configs"
AUTONAT = {
    "num_steps": 8,
    "mask_ratios": [0.95316, 0.87954, 0.79402, 0.74600, 0.62498, 0.40732, 0.26066, 0.0],
    "guidance_scales": [1.0, 1.0, 1.0, 1.9151, 2.6160, 2.1946, 2.3832, 2.2268],
    "sampling_temperatures": [2.8999, 1.8673, 1.1444, 1.3796, 1.4700, 1.3761, 1.7082, 0.7133],
    "remask_temperatures": [2.4049, 2.4776, 1.1917, 0.7685, 1.0673, 0.9354, 0.7844, 0.0],
}


def _load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {CONFIGS / 'digits.yaml'}\nname: own\n{text}\n")
    return load_run(path, [*overrides, f"store={tmp_path / 'store'}"])


def _identity(run: RunConfig) -> object:
    return configuration.identity(graph.section(graph.stages()["generate"], run))


def test_a_name_is_the_same_as_its_values(tmp_path: Path) -> None:
    """The key of stage generate is the same, so no artifact is made again."""
    named = _load(tmp_path, "generate: {sampler: {preset: autonat-8}}")
    assert named.generate.sampler == SamplerConfig(**AUTONAT)
    # digits.yaml sets scalars, which written-out lists would have to reset.
    scalars = {"guidance_scale": 3.5, "sampling_temperature": 6.0, "remask_temperature": 1.5}
    written = _load(tmp_path, f"generate: {{sampler: {json.dumps({**scalars, **AUTONAT})}}}")
    assert _identity(named) == _identity(written)


def test_values_beside_a_name_replace_its_own(tmp_path: Path) -> None:
    run = _load(tmp_path, "generate: {sampler: {preset: autonat-8, guidance_scale: 2.0, top_p: 0.9}}")
    expected = SamplerConfig(**AUTONAT).replaced(guidance_scale=2.0, top_p=0.9)
    assert run.generate.sampler == expected and run.generate.sampler.guidance_scales is None


def test_reuse_belongs_to_the_model(tmp_path: Path) -> None:
    text = "train: {model: {reuse: false}}\ngenerate: {sampler: {reuse: false, preset: autonat-8}}"
    assert _load(tmp_path, text).generate.sampler.reuse is False
    below = _load(
        tmp_path, "train: {model: {reuse: false}}\ngenerate: {sampler: {reuse: false}}", "generate.sampler.preset=autonat-8"
    )
    assert below.generate.sampler.reuse is False and below.generate.sampler.mask_ratios is not None


def test_a_variant_may_name_one(tmp_path: Path) -> None:
    run = _load(tmp_path, "variants: {autonat: {generate: {sampler: {preset: autonat-8}}}}")
    assert run.variant_runs["autonat"].generate.sampler == SamplerConfig(**AUTONAT)
    assert run.generate.sampler.guidance_scale == 2.0


def test_a_file_counts_from_the_config_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found.yaml").write_text("num_steps: 2\nguidance_scales: [1.0, 2.0]\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = _load(tmp_path, "generate: {sampler: {preset: found.yaml}}")
    assert run.generate.sampler == SamplerConfig(num_steps=2, guidance_scales=(1.0, 2.0))
    given = load_run(CONFIGS / "digits.yaml", [f"generate.sampler.preset={tmp_path / 'found.yaml'}"])
    assert given.generate.sampler == run.generate.sampler


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autonat8", r"generate\.sampler\.preset names 'autonat8', which does not exist; did you mean autonat-8"),
        ("missing.yaml", r"generate\.sampler\.preset names .*missing\.yaml, which cannot be read \(No such file"),
        ("config.yaml", r"config\.yaml, which holds no values of a sampler alone"),
        ("wrong.yaml", r"wrong\.yaml, whose values are no sampler: guidance_scales has 1 values for 2 steps"),
        ("broken.yaml", r"broken\.yaml, which cannot be read as YAML"),
        ("large.yaml", r"large\.yaml, which holds no values of a sampler alone"),
        ("[a]", "generate.sampler.preset is"),
    ],
)
def test_what_is_no_sampler_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "wrong.yaml").write_text("num_steps: 2\nguidance_scales: [1.0]\n")
    (tmp_path / "broken.yaml").write_text("num_steps: [\n")
    (tmp_path / "large.yaml").write_text("num_steps: 2\n" + "#" * (1 << 17))
    with pytest.raises(configuration.ConfigError, match=message):
        _load(tmp_path, f"generate: {{sampler: {{preset: {name}}}}}")


def test_a_plan_shows_the_values(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        f"base: {CONFIGS / 'digits.yaml'}\nname: own\ngenerate: {{sampler: {{preset: autonat-8}}}}\n"
    )
    arguments = [str(tmp_path / "own.yaml"), f"store={tmp_path / 'store'}", f"workspace={tmp_path}", "--json"]
    answer = CliRunner().invoke(plan, arguments, catch_exceptions=False)
    sampler = json.loads(answer.stdout)["config"]["generate"]["sampler"]
    assert "preset" not in sampler and sampler["guidance_scales"] == AUTONAT["guidance_scales"]


def test_a_job_gets_the_values_of_a_file(tmp_path: Path) -> None:
    """The file is not sent; the values are."""
    (tmp_path / "found.yaml").write_text("num_steps: 2\nguidance_scales: [1.0, 2.0]\n")
    (tmp_path / "own.yaml").write_text("name: own\ndataset: {kind: digits}\ngenerate: {sampler: {preset: found.yaml}}\n")
    text = configuration.read_text(tmp_path / "own.yaml", RunConfig)
    assert "found.yaml" not in text.split("\n", 1)[1] and "guidance_scales" in text
    with pytest.raises(ValueError, match="names a file of this machine"):
        submission.prepare(CONFIGS / "digits.yaml", [f"generate.sampler.preset={tmp_path / 'found.yaml'}"])


def test_a_sample_takes_one() -> None:
    """With the model's own reuse; other values of the command line replace those of the preset."""
    generator = SimpleNamespace(sampler=SamplerConfig(num_steps=4, guidance_scale=2.0, reuse=False))
    found = _sampler(generator, ["preset=autonat-8", "top_p=0.9"])  # type: ignore[arg-type]
    assert found == SamplerConfig(**AUTONAT, reuse=False, top_p=0.9)
    with pytest.raises(configuration.ConfigError, match="override preset=autonat: preset names 'autonat'"):
        _sampler(generator, ["preset=autonat"])  # type: ignore[arg-type]


def test_shipped_presets_state_their_source() -> None:
    import yaml

    content = yaml.safe_load((Path(submission.__file__).parents[1] / "sampling" / "presets.yaml").read_text())
    assert content.keys() == presets().keys()
    for name, each in content.items():
        assert each.keys() == {"found_for", "source", "license", "sampler"}, name
        assert each["source"].startswith("https://") and each["license"] == "MIT"
        assert {field.name for field in dataclasses.fields(SamplerConfig)} >= each["sampler"].keys()
