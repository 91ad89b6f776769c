"""Values that cannot work are refused before anything is made, in one sentence with the whole key and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from material.layouts import make_layouts
from pipelines.artifacts.store import ArtifactStore
from pipelines.cli import main
from pipelines.run import graph, runner
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.workflow import driver
from pipelines.workflow.config import ConfigError
from pipelines.workflow.node_run import Session

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"
_LARGE = "it must be at most 2,147,483,647"

# The value works, the second one does not, and what plan says of it after the key. One row a kind of field.
FIELDS = [
    ("train.num_steps=0", "-1", " is -1; it must be at least 0"),
    ("train.batch_size=64", "0", " is 0; it must be at least 1"),
    ("train.batch_size=64", "99999999999", f" is 99999999999; {_LARGE}"),
    ("seed=99999999999", "-1", " is -1; it must be at least 0 and below 2**63"),
    ("generate.num_samples=2", "1", " is 1; it must be at least 2"),
    ("generate.mask_ratio=1.0", "0", r" is 0.0; it must be in (0, 1]"),
    ("generate.sampler.top_p=0.5", "1.5", " is 1.5; it must be in (0, 1]"),
    ("generate.sampler.guidance_scale=1", "1e300", f" is 1e+300; {_LARGE}"),
    ("train.sampler.num_steps=4", "0", " is 0; it must be at least 1"),
    ("train.masking.alpha=0.1", "0", " is 0.0; it must be above 0"),
    ("train.cond_drop_prob=0", "1", " is 1.0; it must be in [0, 1)"),
    ("train.betas=[0,0.9]", "[0.9,1]", " is (0.9, 1.0); both must be in [0, 1)"),
    ("train.learning_rate=0.1", "nan", " is nan; it must be a finite number"),
    ("train.precision=bf16", "fp8", " is 'fp8'; choose one of fp32, bf16, fp16"),
    ("train.model.num_heads=8", "5", "embed_dim is 128; it must be a multiple of num_heads, which is 5"),
    ("train.model.encoder_layers=0", "-1", " is -1; it must be at least 0"),
    ("train.model.preset=enat-s", "enat-m", " is 'enat-m'; choose one of enat-s, "),
    ("train.execution.keep_every=200", "150", " is 150; it must be a multiple of checkpoint_every, which is 100"),
    ("train.execution.num_workers=3", "129", "batch_size is 128, but execution.num_workers 129 needs at least 129 with"),
    ("train.execution.cpus_per_worker=0.5", "1.5", " is 1.5; above 1 it must be a whole number"),
    ("token_map.execution.num_decoders=1", "0", " is 0; it must be at least 1"),
    ("tokenizer.resolution=32", "18", " is 18; it must be a multiple of the downsampling factor 4"),
    ("tokenizer.codebook_size=65536", "65537", " is 65537; it must be at most 65536"),
    ("tokenizer.recipe.commitment=0", "-1", " is -1.0; it must be at least 0"),
    ("tokenizer.dataset.kind=digits", "zip", " is 'zip'; choose one of digits, "),
    ("reference.num_epochs=1", "-1", " is -1; it must be at least 0"),
    ("reference.resolution=16", "32", " is 32; it must be that of the samples, 16"),
    ("evaluate.metrics=[kernel_distance]", "[inception_score]", " names inception_score, which cannot be computed here"),
    ("evaluate.settings.seed=0", "-1", " is -1; it must be in [0, 4294967295]"),
    ("reconstruction.num_images=2", "1", " is 1; it must be at least 2"),
    ("report.max_classes=1", "0", " is 0; it must be at least 1"),
    ("prices.worker_hour=0.1", "-0.1", " is -0.1; it must be at least 0"),
    ("generate.labels=[0,9]", "[0,10]", " has 10, but the classes of this model are 0 to 9"),
    ("generate.labels=[0]", "[[]]", " holds []; give single values, such as [a, b]"),
    ("targets=[train]", "[{a: 1}]", " holds {'a': 1}; give single values, such as [a, b]"),
    ("generate.labels=[]", "[-1]", " has -1, but the classes of this model are 0 to 9"),
    ("store=null", "''", " is empty; give a value, or null for the default"),
    ("dataset.path=null", "flowers", " is flowers, but kind digits has no path"),
    ("captions.encoder=null", "clip", " is given, but dataset digits has no captions"),
]  # fmt: skip


def _load(*overrides: str, is_dataset_here: bool = True) -> RunConfig:
    return load_run(DIGITS, ["variants.untrained=null", *overrides], is_dataset_here=is_dataset_here)


@pytest.mark.parametrize(("good", "bad", "sentence"), FIELDS, ids=[f"{good.split('=')[0]}={bad}" for good, bad, _ in FIELDS])
def test_a_value_that_cannot_work_is_refused(good: str, bad: str, sentence: str) -> None:
    key = good.split("=", maxsplit=1)[0]
    _load(good)
    with pytest.raises(ConfigError) as refused:
        _load(f"{key}={bad}")
    assert f"{key}{sentence}" in str(refused.value) if sentence.startswith(" ") else sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_plan_makes_nothing_and_exits_with_2(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["enat", "plan", str(DIGITS), f"workspace={tmp_path}", "generate.labels=[10]"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, error = capsys.readouterr()
    assert (ended.value.code, out, [*tmp_path.iterdir()]) == (2, "", [])
    assert error == "enat: generate.labels has 10, but the classes of this model are 0 to 9\n"


def test_a_model_of_captions_has_no_labels() -> None:
    text = ["train.model.text=true", "captions.encoder=clip", "dataset={kind: parquet, path: x}", "evaluate.judge=null"]
    _load(*text, is_dataset_here=False)
    for override, sentence in (
        ("generate.labels=[1]", r"generate\.labels is for models of classes"),
        ("evaluate.judge=svc", r"evaluate\.judge needs samples of classes"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            _load(*text, override, is_dataset_here=False)


def test_a_model_that_reuses_masked_tokens_is_not_sampled_with_masking_again() -> None:
    override = "generate.sampler.remask_ratio=0.1"
    _load(override)
    with pytest.raises(ConfigError, match=r"remask_ratio is 0\.1, but this model reuses features of masked tokens"):
        _load(override, "train.model.reused_features=all")


def test_labels_are_compared_with_the_dataset_as_soon_as_it_is_scanned(
    tmp_path: Path, make_session: Callable[..., Session], local_store: ArtifactStore, ray_cluster: None
) -> None:
    """Only a scan tells the classes of tar files. Nothing is trained."""
    make_layouts(tmp_path)
    run = _load(f"dataset={{kind: tar, path: {tmp_path / 'tar'}}}", "generate.labels=[0,9999]")
    with pytest.raises(ConfigError, match=r"generate\.labels has 9999, but the classes of this model are 0 to \d"):
        driver.execute(graph.build(run), make_session(local_store), check=partial(runner.check_made, run))
    assert [manifest.stage for manifest in local_store.manifests()] == ["dataset"]


def test_what_a_variant_shares_is_known(tiny_config: Path) -> None:
    overrides = ["variants={twin: {seed: 0}, small: {train: {num_steps: 3}}, steps: {generate: {sampler: {num_steps: 2}}}}"]
    run = load_run(tiny_config, overrides)
    nodes = graph.build(run)
    of_main = [node.id for node in nodes if "@" not in node.id and node.id != "report"]
    assert graph.nodes_of_variant(run, "twin", nodes) == of_main
    assert set(graph.nodes_of_variant(run, "steps", nodes)) - set(of_main) == {"generate@steps", "evaluate@steps"}
    assert set(of_main) - set(graph.nodes_of_variant(run, "small", nodes)) == {"train", "generate", "evaluate"}
