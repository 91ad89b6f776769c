"""The state of a sharded optimizer in files: written by any number of ranks, read by any other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines import engine


def _sharded(values: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """One flat partition per rank, padded at the very end with zeros, as ZeRO-1 cuts them."""
    size = -(-len(values) // ranks)
    return list(torch.nn.functional.pad(values, (0, size * ranks - len(values))).split(size))


def _engine(partition: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> Any:
    """What of a DeepSpeed engine the state functions touch: torch's optimizer over one flat partition."""
    parameter = torch.nn.Parameter(partition)
    states: Any = defaultdict(dict)
    if state is not None:
        states[parameter] = state
    inner = SimpleNamespace(param_groups=[{"params": [parameter]}], state=states)
    return SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def become(rank: int, ranks: int) -> None:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: ranks)

    return become


def _save(folder: Path, as_rank: Callable[[int, int], None], moments: dict[str, torch.Tensor], ranks: int) -> None:
    for rank in range(ranks):
        as_rank(rank, ranks)
        own = {name: _sharded(value, ranks)[rank] if value.ndim else value for name, value in moments.items()}
        engine.save_rank_state(folder, _engine(torch.zeros(1), own), {"step": 7, "history": [{"loss": 0.5}]})


@pytest.mark.parametrize("num_parameters", [1, 7, 8, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("other_ranks", [1, 2, 5, 8])
def test_moments_come_back_at_any_world_size(
    tmp_path: Path, as_rank: Callable[[int, int], None], num_parameters: int, ranks: int, other_ranks: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = {
        "exp_avg": torch.randn(num_parameters, generator=generator),
        "exp_avg_sq": torch.rand(num_parameters, generator=generator),
        "step": torch.tensor(7.0),
    }
    _save(tmp_path, as_rank, moments, ranks)
    pieces: dict[str, list[torch.Tensor]] = defaultdict(list)
    for rank, partition in enumerate(_sharded(torch.zeros(num_parameters), other_ranks)):
        as_rank(rank, other_ranks)
        opened = _engine(partition)
        engine.load_moments(tmp_path, opened, ranks)
        (state,) = opened.optimizer.optimizer.state.values()
        assert state["step"] == 7.0 and state["exp_avg"].shape == partition.shape
        for name in ("exp_avg", "exp_avg_sq"):
            pieces[name].append(state[name])
    for name, parts in pieces.items():
        joined = torch.cat(parts)
        assert torch.equal(joined[:num_parameters], moments[name]) and not joined[num_parameters:].any()


def test_rank_zero_adds_what_all_ranks_share(tmp_path: Path, as_rank: Callable[[int, int], None]) -> None:
    _save(tmp_path, as_rank, {"exp_avg": torch.ones(4)}, 2)
    assert engine.load_state(tmp_path) == {"step": 7, "history": [{"loss": 0.5}], "world_size": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "optimizer-00000.safetensors",
        "optimizer-00001.safetensors",
        "state.json",
    ]


def test_a_checkpoint_is_whole_with_the_state_of_every_rank(tmp_path: Path, as_rank: Callable[[int, int], None]) -> None:
    _save(tmp_path, as_rank, {"exp_avg": torch.ones(4)}, 3)
    assert engine.is_whole(tmp_path)
    for name in ("optimizer-00002.safetensors", "optimizer-00000.safetensors", "state.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        assert not engine.is_whole(tmp_path), name
        (tmp_path / name).write_bytes(content)
    assert engine.is_whole(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["state.json", "optimizer-00001.safetensors"],
)
def test_a_checkpoint_with_a_torn_file_is_not_whole(tmp_path: Path, as_rank: Callable[[int, int], None], name: str) -> None:
    """Ray copies checkpoints file by file, so a killed worker can leave one cut off."""
    _save(tmp_path, as_rank, {"exp_avg": torch.ones(400)}, 2)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    assert not engine.is_whole(tmp_path)
