"""Training on Ray Train and DeepSpeed equals a plain loop, whatever the workers, and survives their loss."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.train.v2.api.exceptions import TrainingFailedError
from safetensors.torch import load_file

from enat import ENAT
from enat.checkpoint import load_enat
from enat.loss import objective
from enat.masking import mask_codes
from enat.model import draw_dropout_mask
from pipelines import workflow
from pipelines.artifacts import LocalStore, Manifest
from pipelines.stages import train
from pipelines.token_map import TokenMap, TokenMapInfo
from pipelines.tracking import RunHandle
from pipelines.train_config import ModelConfig, TrainConfig, TrainExecution
from pipelines.train_loop import initial_model
from pipelines.workflow import StageError

pytestmark = pytest.mark.usefixtures("ray_cluster")

KEY = "ab" * 32


@pytest.fixture(scope="module", autouse=True)
def _workers_need_no_test_modules() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def made_map(
    tiny_nodes: Callable[..., Any], make_session: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LocalStore, dict[str, Manifest]]:
    """A store with the tokenizer and the token map of the tiny run, and these two as the inputs of training."""
    store = LocalStore(tmp_path_factory.mktemp("store"))
    done = workflow.execute(tiny_nodes(until="token_map"), make_session(store))
    return store, {item.node.id: item.manifest for item in done}


@pytest.fixture(scope="module")
def config(tiny_nodes: Callable[..., Any]) -> TrainConfig:
    return tiny_nodes(until="train")[-1].config


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training left: EMA weights, raw weights, and the history of the run."""

    ema: dict[str, torch.Tensor]
    raw: dict[str, torch.Tensor]
    history: list[dict[str, float]]


@pytest.fixture
def fit(made_map, config: TrainConfig, make_context: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Trained]:
    """Train in a store under a key that the test has for itself."""
    store, inputs = made_map

    def fit(
        *, key: str = request.node.name, run: RunHandle | None = None, execution: dict[str, Any] | None = None, **changed: Any
    ) -> Trained:
        spread = dataclasses.replace(config.execution, **(execution or {}))
        replaced = {"run": run} if run else {}
        context = make_context(store, "train", key, **replaced)
        result = train.run(dataclasses.replace(config, execution=spread, **changed), inputs, context)
        files = {record.name: store.fetch_file("train", key, record) for record in (*result.files, *result.records)}
        return Trained(
            load_file(files["model.safetensors"]),
            load_file(files["raw.safetensors"]),
            json.loads(files["history.json"].read_text()),
        )

    return fit


@pytest.fixture(scope="module")
def plain(made_map, config: TrainConfig) -> Trained:
    """The same training as one writes it for one process: no Ray, no DeepSpeed, no shards, every group in turn."""
    store, inputs = made_map
    token_map = TokenMap.open(store, inputs["token_map"])
    model = initial_model(config.model.architecture(token_map.info), config.seed)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    size = config.batch_size // config.num_groups
    history = []
    for step in range(config.num_steps):
        batch = token_map.batch_rows(config.seed, step, config.batch_size)
        losses = []
        for group in range(config.num_groups):
            rng = np.random.default_rng([config.seed, step, group])
            own = slice(group * size, (group + 1) * size)
            codes, labels = map(torch.from_numpy, token_map.take(batch.rows[own], batch.flipped[own] & config.flip))
            labels[torch.from_numpy(rng.random(size) < config.label_dropout)] = model.config.null_label
            masked = mask_codes(codes, model.config.mask_id, config.masking, rng)
            dropout = torch.Generator().manual_seed(int(rng.integers(2**63)))
            kept = draw_dropout_mask(model.config, size, dropout, torch.device("cpu"))
            loss, _ = objective(model, ema, codes, labels, masked, dropout_mask=kept, label_smoothing=config.label_smoothing)
            (loss / config.num_groups).backward()
            losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warm_up_steps)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.mul_(config.ema_decay).add_(parameter, alpha=1 - config.ema_decay)
        history.append({"step": step + 1, "loss": float(np.mean(losses))})
    return Trained(ema.state_dict(), model.state_dict(), history)


def _assert_close(trained: Trained, plain: Trained) -> None:
    assert [row["step"] for row in trained.history] == [row["step"] for row in plain.history]
    np.testing.assert_allclose([row["loss"] for row in trained.history], [row["loss"] for row in plain.history], rtol=1e-5)
    for mine, theirs in ((trained.raw, plain.raw), (trained.ema, plain.ema)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_train_what_a_plain_loop_trains(fit, plain: Trained, num_workers: int, zero_stage: int) -> None:
    """On gloo: losses to a relative 1e-5, raw and EMA weights to 1e-5, whatever is shared out."""
    trained = fit(execution={"num_workers": num_workers, "zero_stage": zero_stage})
    _assert_close(trained, plain)


def test_the_comparison_could_fail(plain: Trained, made_map, config: TrainConfig) -> None:
    """Twelve steps move the weights by far more than the tolerance, and the EMA stays apart from them."""
    initial = initial_model(config.model.architecture(TokenMapInfo(**made_map[1]["token_map"].summary["info"])), config.seed)
    assert (plain.raw["token_embedding.weight"] - initial.token_embedding.weight).abs().max() > 1e-3
    assert (plain.raw["token_embedding.weight"] - plain.ema["token_embedding.weight"]).abs().max() > 1e-3
    assert plain.history[0]["loss"] - plain.history[-1]["loss"] > 0.01


# Losses --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Deadly(RunHandle):
    """Tracking of a run whose rank 0 is killed by SIGKILL once, when it logs a step. It notes every step that is logged.

    snapshot: Ray Train's record of checkpoints, which must name `checkpoint` before: what is tested is the going on from it.
    """

    uri: str = ""
    run_id: str | None = None
    notes: Path = Path()
    snapshot: Path = Path()
    checkpoint: str = "step-00000004"
    kill_at: int = 6

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        lines = self.notes.read_text().split() if self.notes.exists() else []
        self.notes.write_text(" ".join([*lines, str(step)]))
        if step == self.kill_at and str(step) not in lines:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not (self.snapshot.exists() and self.checkpoint in self.snapshot.read_text()):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)

    def steps(self) -> list[int]:
        return [int(step) for step in self.notes.read_text().split()]


@pytest.fixture
def deadly(made_map, tmp_path: Path) -> Deadly:
    snapshot = Path(made_map[0].work_uri("train", KEY)) / "ray-train" / "checkpoint_manager_snapshot.json"
    return Deadly(notes=tmp_path / "notes", snapshot=snapshot)


@pytest.fixture
def fresh_key(made_map):
    """Tests of resuming share a key, and each begins without what the one before left under it."""
    made_map[0].discard_work("train", KEY)
    yield
    made_map[0].discard_work("train", KEY)


@pytest.mark.usefixtures("fresh_key")
def test_a_worker_that_is_killed_is_replaced_and_training_goes_on_from_the_checkpoint(fit, plain: Trained, deadly: Deadly) -> None:
    trained = fit(key=KEY, run=deadly, execution={"num_workers": 2, "max_failures": 1})
    assert deadly.steps() == [*range(1, 7), *range(5, 13)]
    _assert_close(trained, plain)


@pytest.mark.faults
@pytest.mark.usefixtures("fresh_key")
def test_a_run_that_failed_goes_on_with_other_workers_also_where_ray_s_record_is_torn(fit, plain: Trained, deadly: Deadly) -> None:
    """Two workers leave a checkpoint, one goes on from it. Ray Train's record of checkpoints is left torn by a driver that is
    killed while it writes it."""
    with pytest.raises(TrainingFailedError):
        fit(key=KEY, run=deadly, execution={"num_workers": 2, "max_failures": 0})
    deadly.snapshot.write_bytes(deadly.snapshot.read_bytes()[:-7])
    trained = fit(key=KEY, run=deadly, execution={"num_workers": 1})
    assert deadly.steps() == [*range(1, 7), *range(5, 13)]
    _assert_close(trained, plain)


def test_a_run_that_diverges_fails_with_advice_and_saves_nothing_poisoned(
    made_map, tiny_nodes: Callable[..., Any], make_session: Callable[..., Any]
) -> None:
    store, _ = made_map
    nodes = tiny_nodes("train.learning_rate=1e6", "train.warm_up_steps=0", "train.execution.checkpoint_every=1", until="train")
    with pytest.raises(StageError, match=r"stage train failed: .*training diverged by step \d+ .*Lower train\.learning_rate"):
        workflow.execute(nodes, make_session(store))
    planned = workflow.plan(nodes, store)[-1]
    assert planned.key is not None and not planned.is_reused
    folder = Path(store.place("train", planned.key))
    assert not list(folder.glob("*.safetensors"))
    weights = list(folder.glob(".work/ray-train/step-*/*.safetensors"))
    assert all(torch.isfinite(tensor).all() for path in weights for tensor in load_file(path).values())


# Without training ----------------------------------------------------------------------------------------------------------


def test_no_steps_give_the_initial_weights_of_the_seed(fit, config: TrainConfig, made_map) -> None:
    untrained = fit(num_steps=0)
    initial = initial_model(config.model.architecture(TokenMapInfo(**made_map[1]["token_map"].summary["info"])), config.seed)
    for weights in (untrained.raw, untrained.ema):
        assert weights.keys() == initial.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in initial.state_dict().items())
    assert untrained.history == []


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("grid_size", 16, r"train\.model\.grid_size is 16, but the token map of photographs \(16 px\) has 4"),
        ("codebook_size", 1024, r"train\.model\.codebook_size is 1024, but the token map of photographs \(16 px\) has 32"),
        ("num_classes", 1000, r"train\.model\.num_classes is 1000, but the token map of photographs \(16 px\) has 2"),
        ("num_heads", 3, r"embed_dim 32 is not divisible by num_heads 3"),
    ],
)
def test_a_model_that_does_not_fit_the_token_map_is_refused(
    fit, config: TrainConfig, field: str, value: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(model=dataclasses.replace(config.model, **{field: value}))


def test_a_model_without_preset_must_give_its_sizes(fit) -> None:
    with pytest.raises(ValueError, match="no preset, so it must give decoder_layers, num_heads"):
        fit(model=ModelConfig(encoder_layers=1, embed_dim=32))


def test_a_preset_takes_the_sizes_of_the_token_map_and_every_replaced_field(made_map) -> None:
    info = TokenMapInfo(**made_map[1]["token_map"].summary["info"])
    made = ModelConfig(preset="enat-s", encoder_layers=3, reuse=False).architecture(info)
    assert (made.embed_dim, made.encoder_layers, made.reuse) == (512, 3, False)
    assert (made.grid_size, made.codebook_size, made.num_classes) == (4, 32, 2)


def test_more_workers_than_the_cluster_has_cpus_are_refused_at_once(fit) -> None:
    with pytest.raises(ValueError, match=r"train\.execution asks for 4 CPUs \(4 workers\), but the cluster has 2"):
        fit(execution={"num_workers": 4})


def test_a_token_map_of_another_tokenizer_is_refused(made_map, config: TrainConfig, make_context: Callable[..., Any]) -> None:
    store, inputs = made_map
    other = dataclasses.replace(inputs["tokenizer"], key="cd" * 32)
    with pytest.raises(
        ValueError, match=r"the token map of photographs \(16 px\) has tokenizer \w{12}, but the model expects tokenizer \w{12}"
    ):
        train.run(config, {**inputs, "tokenizer": other}, make_context(store, "train"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"num_groups": 5}, r"train\.batch_size 16 cannot be cut into 5 equal groups"),
        ({"num_groups": 1, "execution": TrainExecution(num_workers=2)}, r"train\.num_groups 1 cannot be shared by 2 workers"),
        ({"num_steps": -1}, r"train\.num_steps"),
        ({"label_dropout": 1.0}, r"train\.label_dropout is 1\.0; it must be in \[0, 1\)"),
        ({"ema_decay": -0.1}, r"train\.ema_decay is -0\.1"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(config: TrainConfig, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(config, **changed)


@pytest.mark.parametrize("field", ["checkpoint_every", "log_every", "sample_every"])
def test_an_interval_of_no_steps_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.execution\.{field} is 0; it must be at least 1"):
        TrainExecution(**{field: 0})


def test_the_learning_rate_rises_in_a_line_and_stays() -> None:
    config = TrainConfig(learning_rate=1.0, warm_up_steps=4)
    assert [config.learning_rate_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert dataclasses.replace(config, warm_up_steps=0).learning_rate_at(0) == 1.0


def test_trained_weights_open_as_a_model(made_map, fit, config: TrainConfig) -> None:
    fit(num_steps=0, key="opened")
    model = load_enat(made_map[0].root / "train" / "opened" / "model.safetensors")
    assert isinstance(model, ENAT) and model.config.embed_dim == config.model.embed_dim
