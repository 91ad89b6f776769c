"""The runnable configs: each can be planned, and those of published models have the published settings."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from enat.config import ENATConfig
from enat.cost import training_macs
from enat.training.masking import mask_codes
from pipelines.artifacts.manifest import Manifest
from pipelines.data.sources.config import DatasetConfig
from pipelines.run import config as run_config
from pipelines.run import graph
from pipelines.run.loading import load_run
from pipelines.stages.reference import ReferenceConfig
from pipelines.storage.base import digest_of
from pipelines.storage.s3_client import S3Config
from pipelines.workflow import config as configuration
from pipelines.workflow.driver import stage_key

CONFIGS = Path(__file__).parents[3] / "configs"
KEYS = Path(__file__).parent / "keys.json"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
IMAGENET256 = ["imagenet256", "imagenet256-sizes", "imagenet256-ablations", "imagenet256-one-step"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., run_config.RunConfig]:
    """A config whose files of others are replaced by small ones."""
    root = tmp_path_factory.mktemp("files")
    for folder, size in {"images": 20, "validation": 21}.items():
        (root / folder / "n0").mkdir(parents=True)
        Image.new("RGB", (size, size)).save(root / folder / "n0" / "a.png")
    (root / "captions.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "n0/a.png"}], "annotations": []}))
    (root / "weights").write_bytes(b"weights")
    (root / "clip").mkdir()
    (root / "clip" / "config.json").write_text("{}")

    def load(name: str, *overrides: str) -> run_config.RunConfig:
        text = (CONFIGS / f"{name}.yaml").read_text()
        own = [f"dataset.path={root / 'images'}"] if "digits" not in name else []
        own += [f"tokenizer.weights={root / 'weights'}"] if not name.startswith(("digits", "own")) else []
        if "captions:" in text:
            own += [
                *(f"{key}={root / 'clip'}" for key in ("captions.encoder", "evaluate.clip_score")),
                f"dataset.captions={root / 'captions.json'}",
            ]
            for section in ("reference", "generate"):
                own += [f"{section}.dataset.path={root / 'validation'}", f"{section}.dataset.captions={root / 'captions.json'}"]
        return load_run(CONFIGS / f"{name}.yaml", (*own, *overrides))

    return load


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("digits", "coco256", "imagenet512") else pytest.mark.slow) for name in NAMES]
)
def test_keys_of_stages_have_not_changed(load: Callable[..., Any], name: str) -> None:
    """keys.json has a key of every stage, with external files replaced and without the content of datasets. If keys change, every
    user computes artifacts again. After an intended change, ENAT_WRITE_KEYS=1 writes the file."""
    keys: dict[str, str] = {}
    for node in graph.build(load(name)):
        identity = node.identity if node.identity is not None else configuration.identity(node.config)
        identity = {**identity, "content": ""} if "content" in identity else identity
        inputs = {name: keys[id] for name, id in node.inputs.items() if node.stage.is_in_key(name)}
        key = {"stage": node.stage.name, "version": node.stage.version, "config": identity, "inputs": inputs}
        keys[node.id] = digest_of(key)[:16]
    known = json.loads(KEYS.read_text()) if KEYS.exists() else {}
    if os.environ.get("ENAT_WRITE_KEYS") == "1":
        KEYS.write_text(json.dumps({**known, name: keys}, indent=1, sort_keys=True) + "\n")
    else:
        assert keys == known[name]


def test_scores_while_training_read_the_reference_and_are_not_in_the_key(load: Callable[..., Any]) -> None:
    keys = []
    for scores in ("null", "{every: 100}"):
        nodes = graph.build(load("digits", f"train.scores={scores}"))
        ids = [node.id for node in nodes]
        (train,) = (node for node in nodes if node.id == "train")
        assert ("reference" in train.inputs) == (scores != "null") and ids.index("reference") < ids.index("train")
        made = {name: Manifest(stage="x", key=name, stage_version=1, config={}, inputs={}, files=()) for name in train.inputs}
        keys.append(stage_key(train, made))
    assert keys[0] == keys[1]


def test_weights_of_an_earlier_step_must_be_kept(load: Callable[..., Any]) -> None:
    keep = "train.execution.keep_every=300"
    load = partial(load, "digits", "variants.untrained=null")
    assert load(keep, "generate.checkpoint=600").generate.checkpoint == 600
    assert load("generate.checkpoint=1200").generate.checkpoint == 1200, "the last step"
    for overrides, sentence in (
        (("generate.checkpoint=600",), "set train.execution.keep_every to a divisor of it"),
        (
            ("generate.guide_checkpoint=600",),
            r"generate\.guide_checkpoint is 600; set train.execution.keep_every to a divisor of it",
        ),
        ((keep, "generate.guide_checkpoint=1500"), r"generate\.guide_checkpoint is 1500; it must be at most train.num_steps"),
        ((keep, "generate.checkpoint=400"), "set train.execution.keep_every to a divisor of it"),
        ((keep, "generate.checkpoint=1500"), "must be at most train.num_steps, which is 1200"),
    ):
        with pytest.raises(configuration.ConfigError, match=sentence):
            load(*overrides)


PROTOCOLS = "protocols={few: {evaluate: {num_samples: 200}}, other: {reference: {num_kept: 300}}}"


def test_protocols_score_the_samples_of_every_model_against_references_made_once(load: Callable[..., Any]) -> None:
    nodes = {node.id: node for node in graph.build(load("digits", PROTOCOLS))}
    alone = {node.id: node for node in graph.build(load("digits"))}
    assert {*nodes} - {*alone} == {
        "reference/other", "evaluate/few", "evaluate/other", "evaluate/few@untrained", "evaluate/other@untrained",
    }  # fmt: skip
    assert all(nodes[id] == node for id, node in alone.items() if id != "report"), "the run's own evaluation stays what it is"
    assert nodes["evaluate/other@untrained"].inputs["reference"] == "reference/other"
    assert nodes["evaluate/few@untrained"].inputs["samples"] == "generate@untrained"
    assert nodes["evaluate/few"].config.num_samples == 200 and nodes["evaluate/few"].inputs["reference"] == "reference"
    added = {name for name in nodes["report"].inputs if name not in alone["report"].inputs}
    assert added == {f"evaluation/{each}" for each in ("few", "other", "few@untrained", "other@untrained")}


def test_protocols_are_checked_like_the_run(load: Callable[..., Any]) -> None:
    for protocol, sentence in (
        ("{a: {generate: {num_samples: 9}}}", "protocols.a.generate would be ignored, because a protocol scores the same samples"),
        ("{a: {evaluate: {num_samples: 501}}}", "protocol a: evaluate.num_samples is 501; there are 500"),
        ("{a: {reference: {resolution: 32}}}", "protocol a: reference.resolution is 32; it must be that of the samples"),
        ("{a: 5}", "protocol a is 5; it must be a mapping"),
        ("{a/b: {}}", "the name 'a/b' must begin with a letter or digit"),
    ):
        with pytest.raises(configuration.ConfigError, match=re.escape(sentence)):
            load("digits", f"protocols={protocol}")
    assert load("digits", "protocols={a: null}").protocols == {}


def test_a_dataset_must_be_said_where_a_target_needs_one(tmp_path: Path) -> None:
    """No other images stand in for it, and a kind that is not given is not guessed."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    for given in ((), ("targets=[reference]",), ("targets=[tokenizer]",), ("dataset=null",), ("tokenizer.dataset.kind=digits",)):
        with pytest.raises(configuration.ConfigError, match=r"names none; set dataset\.kind .* `enat init FOLDER`"):
            load_run(None, ("name=it", *given))
    with pytest.raises(configuration.ConfigError, match=r"does not give dataset\.kind, which has no default"):
        load_run(None, ("name=it", "dataset.name=photos"))
    npz = (f"reference.npz={weights}", "reference.extractor=inception")
    for target, given in (
        ("tokenizer", ()),
        ("train", (f"train.weights={weights}", "train.model.preset=enat-s")),
        ("reference", npz),
    ):
        run = load_run(None, ("name=it", f"targets=[{target}]", f"tokenizer.weights={weights}", *given))
        assert "dataset" not in {node.stage.name for node in graph.build(run)}, target
    partly = load_run(None, ("name=it", "targets=[tokenizer]", "tokenizer.dataset.kind=digits"))
    assert [node.id for node in graph.build(partly)] == ["dataset", "tokenizer"], "a stage may have its own"


def test_only_what_targets_need_is_looked_at(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    images = ("name=it", "dataset.kind=images", f"dataset.path={tmp_path}", "reference.extractor=inception")
    nowhere = f"tokenizer.weights={tmp_path / 'nowhere'}"
    for target in ("dataset", "reference"):
        nodes = graph.build(load_run(None, (*images, nowhere, f"targets=[{target}]")))
        assert [node.id for node in nodes] == [*dict.fromkeys(("dataset", target))]
    with pytest.raises(ValueError, match=r"tokenizer\.weights: .*nowhere"):
        graph.build(load_run(None, (*images, nowhere, "targets=[token_map]")))
    (tmp_path / "weights").write_bytes(b"weights")
    imported = ("name=it", "targets=[tokenizer]", f"tokenizer.weights={tmp_path / 'weights'}")
    nodes = graph.build(load_run(None, (*imported, "dataset.kind=images", "dataset.path=/nowhere")))
    assert [node.id for node in nodes] == ["tokenizer"]


IGNORED = {  # override -> what the message names
    "report.name=other": "report.name",
    "report.variants=[nosuch]": "report.variants",
    "evaluate.images={path: x, name: y}": "enat evaluate --samples",
    "reconstruction={dataset: {kind: digits}}": "reconstruction.dataset",
    "token_map.dataset.kind=digits": "token_map.dataset",
    "train.s3.region=here": "train.s3",
    "dataset.s3.anonymous=true": "dataset.s3",
    "tokenizer={weights: x, dataset: {kind: digits}}": "tokenizer.dataset would be ignored, because tokenizer.weights",
    "reference={extractor: inception, npz: x, dataset: {kind: digits}}": "because reference.npz",
    "generate.dataset.kind=digits": "generate.dataset",
    "variants.a.report.max_classes=3": "variants.a.report",
    "variants.a.store=elsewhere": "variants.a.store",
    "variants.a.reconstruction={dataset: {kind: digits}}": "reconstruction.dataset",
}


def test_a_key_that_would_be_ignored_is_refused(load: Callable[..., Any]) -> None:
    for override, named in IGNORED.items():
        with pytest.raises(ValueError, match="would be ignored") as caught:
            load("digits", override)
        assert named in str(caught.value) and "\n" not in str(caught.value)


def test_former_names_of_keys_are_refused_in_configs_and_read_from_records(load: Callable[..., Any]) -> None:
    for old, new in run_config.RENAMED.items():
        with pytest.raises(ValueError, match=f"{re.escape(old)} was renamed to {re.escape(new)}$"):
            load("digits", f"{old}=1")
    recorded = {"generate": {"images_per_pass": 4, "execution": {"batch_size": 8, "num_workers": 2}}, "evaluate": {"judge": None}}
    assert run_config.with_new_names(recorded) == {
        "generate": {"forward_batch_size": 4, "execution": {"worker_batch_size": 8, "num_workers": 2}},
        "evaluate": {"judge": None},
    }
    assert recorded["generate"]["execution"] == {"batch_size": 8, "num_workers": 2}


def test_buckets_are_accessed_as_the_run_states(load: Callable[..., Any]) -> None:
    run = load("digits", "s3.region=a", "buckets.public={region: b, anonymous: true}")
    elsewhere = dataclasses.replace(
        run,
        reference=ReferenceConfig(
            extractor="inception", dataset=DatasetConfig(kind="images", path="s3://public/images"), weights="s3://private/weights"
        ),
        train=dataclasses.replace(run.train, weights="s3://public/weights"),
    )
    read = {
        name: graph.section(stage, elsewhere)
        for name, stage in graph.stages().items()
        if name in ("reference", "train", "token_map")
    }
    assert read["reference"].dataset.s3 == S3Config(region="b", anonymous=True) == read["train"].s3
    assert read["reference"].s3 == S3Config(region="a") == read["token_map"].dataset.s3


def test_null_variants_of_a_base_are_dropped(load: Callable[..., Any]) -> None:
    assert set(load("digits").variants) == {"untrained"}
    assert "untrained" not in load("digits-sweeps").variants
    assert load("digits", "variants.untrained=null").variants == {}


def test_configs_open_with_command_hardware_duration_and_result() -> None:
    for name in NAMES:
        head = (CONFIGS / f"{name}.yaml").read_text().split("\nname:")[0]
        assert head.startswith("# ") and all(f"#   {word} " in head for word in ("command", "hardware", "duration", "expected"))
        assert f"configs/{name}.yaml" in head


@pytest.mark.slow
def test_imagenet_is_trained_as_published(load: Callable[..., Any]) -> None:
    small = load("imagenet256").train
    for name in IMAGENET256:
        train = load(name).train
        assert (train.batch_size, train.num_groups, train.num_steps, train.warmup_steps) == (2048, 16, 500_000, 5000)
        assert (train.learning_rate, train.learning_rate_schedule) == (4e-4, "constant")
        assert (train.betas, train.weight_decay) == ((0.99, 0.99), 0.03)
        assert (train.weight_decay_on, train.max_grad_norm, train.precision) == ("all", None, "fp16")
        assert (train.ema_decay, train.label_smoothing, train.z_loss, train.flip) == (0.9999, 0.1, 0.0, True)
        assert (train.masking.alpha, train.masking.beta, train.masking.reuse_probability) == (12, 3, 0.5)
        assert train.cond_drop_prob == pytest.approx(1 - (1 - 0.15) * (1 - 0.1))
    large = load("imagenet512").train
    assert (large.batch_size, large.learning_rate) == (512, 1e-4)
    same = {"batch_size": small.batch_size, "learning_rate": small.learning_rate, "sampler": small.sampler}
    assert dataclasses.replace(large, **same) == small


@pytest.mark.slow
def test_scoring_on_devices_has_large_passes(load: Callable[..., Any]) -> None:
    """A device computes one pass at a time. Decoding takes 128 x H x W numbers per image in each of a few layers at once."""
    for name in (name for name in NAMES if "digits" not in name and not name.startswith("own-images")):
        run = load(name)
        sections = [section for section in (run.reference, run.evaluate, run.reconstruction) if section is not None]
        assert all(section.execution.gpus_per_worker and section.execution.worker_batch_size == 64 for section in sections)
        pixels = run.tokenizer.architecture().resolution ** 2
        assert 2 * 10**6 <= run.reference.forward_batch_size * pixels <= 128 * 256**2


def test_sizes_share_token_map_and_recipe(load: Callable[..., Any]) -> None:
    nodes = graph.build(load("imagenet256-sizes"))
    trained = [node for node in nodes if node.stage.name == "train"]
    assert [node.config.model.preset for node in trained] == ["enat-s", "enat-b", "enat-l", "enat-xl"]
    assert {node.inputs["token_map"] for node in trained} == {"token_map"}
    assert len({json.dumps({**node.identity, "model": None}, default=str) for node in trained}) == 1
    assert len([node for node in nodes if node.stage.name in ("dataset", "tokenizer", "token_map")]) == 3


def test_ablations_change_one_thing_each(load: Callable[..., Any]) -> None:
    run = load("imagenet256-ablations")
    models = {
        node.id.partition("@")[2]: (node.config.model, node.config.masking)
        for node in graph.build(run)
        if node.stage.name == "train"
    }
    own = ENATConfig.preset("enat-s")

    def architecture(name: str) -> ENATConfig:
        given = {field: value for field, value in dataclasses.asdict(models[name][0]).items() if value is not None}
        given.pop("text")
        return ENATConfig.preset(given.pop("preset"), **given)

    assert architecture("") == own
    assert architecture("nat") == ENATConfig.preset("nat-s", decoder_layers=5)
    assert architecture("disentangled") == dataclasses.replace(own, reuse=False)
    assert architecture("mae") == dataclasses.replace(own, decoder_attention="full")
    assert architecture("crossmae") == dataclasses.replace(own, decoder_attention="cross")
    assert architecture("reuse-masked") == dataclasses.replace(own, reused_features="masked")
    for name in ("split-14-2", "split-12-4", "split-8-8"):
        made = architecture(name)
        assert f"split-{made.encoder_layers}-{made.decoder_layers}" == name and made.encoder_layers + made.decoder_layers == 16
    assert models["trained-fresh"][1].reuse_probability == 0 and models["trained-reusing"][1].reuse_probability == 1


def test_coco_has_a_model_of_captions(load: Callable[..., Any]) -> None:
    """Trained on captions of the training images, scored with those of the validation images, without mirror images."""
    nodes = {node.id: node for node in graph.build(load("coco256"))}
    train, generate = nodes["train"], nodes["generate"]
    assert train.inputs["captions"] == "captions" and train.config.flip is False and load("imagenet256").train.flip is True
    assert train.config.model == dataclasses.replace(train.config.model, preset="enat-b", text=True)
    requested = nodes[generate.inputs["captions"]]
    assert generate.config.num_samples == 30_000
    assert requested.id != "captions" and requested.inputs["dataset"] == nodes["reference"].inputs["dataset"]
    assert nodes[requested.inputs["dataset"]].config.name == "coco2014-val"
    for override, sentence in (
        ("captions.encoder=null", r"train\.model\.text requires .*captions\.encoder"),
        ("train.model.num_classes=10", r"train\.model\.num_classes is 10, but a text model has no classes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load("coco256", override)


def test_imagenet_is_evaluated_as_published(load: Callable[..., Any]) -> None:
    """50 images of each class in 8 steps, FID by Inception's features of the training set."""
    for name, guidance, temperature in (*((name, 3.5, 6) for name in IMAGENET256[:3]), ("imagenet512", 4.5, 4)):
        nodes = {node.id: node for node in graph.build(load(name))}
        made, scored = nodes["generate"].config, nodes["evaluate"]
        sampler = made.sampler
        assert (made.num_samples, made.labels, sampler.num_steps) == (50_000, (), 8)
        assert (sampler.guidance_scale, sampler.sampling_temperature, sampler.remask_temperature) == (guidance, temperature, 1.5)
        assert nodes["reference"].config.extractor == "inception"
        assert nodes["reference"].inputs["dataset"] == nodes["token_map"].inputs["dataset"] == "dataset"
        assert scored.inputs == {"samples": "generate", "tokenizer": "tokenizer", "reference": "reference", "model": "train"}


def test_one_step_decoding_starts_from_the_token_map(load: Callable[..., Any]) -> None:
    """ENAT-L and a plain NAT of its depth and width are trained once each."""
    nodes = {node.id: node for node in graph.build(load("imagenet256-one-step"))}
    made = [node for node in nodes.values() if node.stage.name == "generate"]
    models = {node.inputs["model"]: nodes[node.inputs["model"]].config.model.preset for node in made}
    assert sorted(models.values()) == ["enat-l", "nat-l"] and len([n for n in nodes.values() if n.stage.name == "train"]) == 2
    for preset in models.values():
        ratios = [node.config.mask_ratio for node in made if models[node.inputs["model"]] == preset]
        assert sorted(ratios) == [0.2, 0.4, 0.6, 0.8]
    for node in made:
        assert node.inputs["token_map"] == "token_map"
        assert (node.config.sampler.num_steps, node.config.sampler.guidance_scale) == (1, 1.0)
        assert node.config.sampler.reuse is (models[node.inputs["model"]] == "enat-l")


def test_config_states_the_cost_of_training(load: Callable[..., Any]) -> None:
    """Averages over the masks of the recipe."""
    train, rng = load("imagenet256").train, np.random.default_rng(0)
    model = ENATConfig.preset(train.model.preset)
    macs = []
    for _ in range(2000):
        drawn = mask_codes(torch.zeros(1, model.num_tokens, dtype=torch.int64), model.mask_id, train.masking, rng)
        previous = None if drawn.previous_tokens is None else drawn.previous_num_masked
        macs.append(training_macs(model, drawn.num_masked, previous))
    (stated,) = re.findall(r"at ([\d.]+) GMACs an image", (CONFIGS / "imagenet256.yaml").read_text())
    assert np.mean(macs) / 1e9 == pytest.approx(float(stated), rel=0.01)


def test_digits_compare_shares_token_map_and_evaluation(load: Callable[..., Any]) -> None:
    """Four sizes and four attentions: ENAT's, the plain stack, MAE's and CrossMAE's. Artifacts of digits.yaml are reused."""
    nodes = graph.build(load("digits-compare"))
    demo = {node.id: node for node in graph.build(load("digits"))}
    trained = [node for node in nodes if node.stage.name == "train"]
    assert len(trained) == 7 and {node.inputs["token_map"] for node in trained} == {"token_map"}
    assert {node.config.model.decoder_attention for node in trained} == {None, "full", "cross"}
    assert len({node.config.model.embed_dim for node in trained}) == 4
    assert len([node for node in nodes if node.stage.name in ("tokenizer", "token_map", "reference")]) == 3
    for node in nodes:
        if node.id in ("tokenizer", "token_map", "reference"):
            assert node.identity == demo[node.id].identity


def test_sweep_reuses_the_model_of_the_demo(load: Callable[..., Any]) -> None:
    swept, demo = (graph.build(load(name)) for name in ("digits-sweeps", "digits"))
    (model,) = [node for node in swept if node.stage.name == "train"]
    assert model.identity == next(node for node in demo if node.id == "train").identity
    assert len([node for node in swept if node.stage.name == "generate"]) == 9
