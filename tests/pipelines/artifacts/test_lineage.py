"""What an artifact was made from and what was made from it: as names, as a tree, as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from types import SimpleNamespace

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from material.places import key_of, make, make_chain
from pipelines.artifacts import lineage
from pipelines.artifacts.lineage import Lineage
from pipelines.artifacts.manifest import Manifest, name_of
from pipelines.artifacts.store import ArtifactStore
from pipelines.run import graph


@pytest.fixture
def chain(local_store: ArtifactStore) -> SimpleNamespace:
    return make_chain(local_store)


def _shown(graph: Lineage, manifest: Manifest) -> list[str]:
    text = io.StringIO()
    for tree in lineage.trees(graph, manifest):
        Console(file=text, width=200).print(tree, highlight=False)
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def _short(manifest: Manifest) -> str:
    return f"{manifest.stage}/{manifest.key[:12]}"


def test_trees_show_both_directions_and_open_each_artifact_once(local_store: ArtifactStore, chain) -> None:
    lines = _shown(Lineage(local_store.manifests(), graph.describe), chain.first)
    dataset, tokenizer, token_map, scores = map(_short, (chain.dataset, chain.tokenizer, chain.map, chain.scores))
    assert lines == [
        f"{_short(chain.first)} was made from",
        f"├── {token_map} 11 B",
        f"│ ├── {dataset} 9 B 5 images, 1 classes",
        f"│ └── {tokenizer} 11 B",
        f"│ └── {dataset} 9 B 5 images, 1 classes",
        f"└── {tokenizer} (above)",
        f"{_short(chain.first)} made",
        f"├── {scores} 10 B",
        f"└── {_short(chain.samples)} 10 B",
        f"└── {scores} 10 B",
    ]


def test_a_tree_names_missing_and_recomputed_artifacts(local_store: ArtifactStore, chain) -> None:
    unrelated = make(local_store, "train/unrelated")
    local_store.delete_manifest(*name_of(chain.dataset))
    again = dataclasses.replace(chain.tokenizer, files=())
    manifests = [again if name_of(found) == name_of(again) else found for found in local_store.manifests()]
    lines = "\n".join(_shown(Lineage(manifests), chain.map))
    assert f"{_short(chain.dataset)} not in this store" in lines
    assert f"{_short(chain.tokenizer)} 0 B made again since, with other content" in lines
    assert "made again" not in "\n".join(_shown(Lineage(local_store.manifests(), graph.describe), chain.samples))
    assert _shown(Lineage(manifests), unrelated)[1:] == ["└── nothing", f"{_short(unrelated)} made", "└── nothing"]


def test_json_has_every_artifact_once_nearest_first(local_store: ArtifactStore, chain) -> None:
    answer = json.loads(json.dumps(lineage.to_json(Lineage(local_store.manifests(), graph.describe), chain.scores)))
    assert answer["descendants"] == []
    ancestors = [entry["artifact"] for entry in answer["ancestors"]]
    assert ancestors[0] == f"generate/{chain.samples.key}" and len(ancestors) == 5 == len(set(ancestors))
    (dataset,) = (entry for entry in answer["ancestors"] if entry["artifact"].startswith("dataset/"))
    assert dataset == {
        "artifact": f"dataset/{chain.dataset.key}",
        "is_in_store": True,
        "digest": chain.dataset.digest,
        "size": 9,
        "phrase": "5 images, 1 classes",
        "inputs": {},
    }
    local_store.delete_manifest(*name_of(chain.dataset))
    answer = lineage.to_json(Lineage(local_store.manifests(), graph.describe), chain.scores)
    assert {"artifact": f"dataset/{chain.dataset.key}", "is_in_store": False} in answer["ancestors"]


_GRAPHS = st.integers(1, 9).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=25))
)


def _graph(size: int, edges: set[tuple[int, int]]) -> Lineage:
    """edges: (source, made from it); they may lead in a circle."""

    def source(number: int) -> dict[str, str]:
        return {"stage": "train", "key": key_of(str(number)), "digest": ""}

    inputs = [{str(a): source(a) for a, b in sorted(edges) if b == number} for number in range(size)]
    values = {"stage": "train", "stage_version": 1, "config": {}, "files": ()}
    return Lineage(Manifest(**values, key=key_of(str(number)), inputs=inputs[number]) for number in range(size))  # type: ignore[arg-type]


@given(_GRAPHS)
def test_ancestors_descendants_and_order_are_those_of_networkx(drawn: tuple[int, set[tuple[int, int]]]) -> None:
    size, edges = drawn
    graph, reference = _graph(size, edges), networkx.DiGraph()
    names = [("train", key_of(str(number))) for number in range(size)]
    reference.add_nodes_from(names)
    reference.add_edges_from((names[a], names[b]) for a, b in edges)
    has_circle = not networkx.is_directed_acyclic_graph(reference)
    for name in names:
        itself = {name} if any(name in circle for circle in networkx.simple_cycles(reference)) else set()
        assert set(graph.ancestors([name])) == networkx.ancestors(reference, name) | itself
        assert set(graph.descendants([name])) == networkx.descendants(reference, name) | itself
        assert lineage.trees(graph, graph.manifests[name]), "it ends"
    ordered = graph.oldest_first(names)
    assert sorted(ordered) == sorted(names)
    if not has_circle:
        assert all(ordered.index(names[a]) < ordered.index(names[b]) for a, b in edges)


def test_a_chain_of_any_length_is_followed() -> None:
    graph = _graph(1200, {(number, number + 1) for number in range(1199)})
    names = [("train", key_of(str(number))) for number in range(1200)]
    assert len(graph.ancestors([names[-1]])) == 1199 and graph.oldest_first(names) == names
