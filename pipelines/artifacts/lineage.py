"""What an artifact was made from, up to the dataset, and what was made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.tree import Tree

from pipelines.artifacts.inventory import Describe, phrase
from pipelines.artifacts.manifest import DamagedManifestError, Manifest, Name, inputs_of, name_of, short
from pipelines.artifacts.store import ArtifactStore
from pipelines.formatting import one_line, show_size


class Lineage:
    """The graph of a store's artifacts. A store may be shared and damaged: inputs may be gone, or even form a circle."""

    def __init__(self, manifests: Iterable[Manifest], describe: Describe = lambda manifest: "") -> None:
        self.describe = describe
        self.manifests = {name_of(manifest): manifest for manifest in manifests}
        self._made_from: dict[Name, list[Name]] = {}
        for name, manifest in sorted(self.manifests.items()):
            for source in inputs_of(manifest):
                self._made_from.setdefault(source, []).append(name)

    def inputs(self, name: Name) -> list[Name]:
        """Inputs of an artifact, including those that the store does not have."""
        return inputs_of(self.manifests[name]) if name in self.manifests else []

    def outputs(self, name: Name) -> list[Name]:
        return self._made_from.get(name, [])

    def ancestors(self, names: Iterable[Name]) -> list[Name]:
        """Artifacts that these were made from, directly or not, nearest first. They include one of `names` only if another was
        made from it."""
        return _reached(names, self.inputs)

    def descendants(self, names: Iterable[Name]) -> list[Name]:
        return _reached(names, self.outputs)

    def oldest_first(self, names: Iterable[Name]) -> list[Name]:
        """The same names, each after those of them that it was made from."""
        chosen = set(names)
        ordered: dict[Name, None] = {}
        for name in sorted(chosen):
            waiting, on_the_way = [(name, False)], set()
            while waiting:
                each, is_ready = waiting.pop()
                if is_ready:
                    ordered.setdefault(each)
                elif each not in on_the_way and each not in ordered:
                    on_the_way.add(each)
                    waiting.append((each, True))
                    waiting += [(source, False) for source in self.inputs(each)]
        return [name for name in ordered if name in chosen]


def read_lineage(store: ArtifactStore, manifest: Manifest) -> dict[Name, Manifest | DamagedManifestError | None]:
    """The manifests of an artifact and of everything that it was made from, read from a store, nearest first.

    A damaged manifest is replaced by its error, one that the store does not have by None. Their inputs are not known.
    """
    found: dict[Name, Manifest | DamagedManifestError | None] = {name_of(manifest): manifest}
    level = [manifest]
    while level:
        missing = [name for name in dict.fromkeys(source for each in level for source in inputs_of(each)) if name not in found]
        found |= dict.fromkeys(missing)
        found |= {(each.stage, each.key): each for each in store.read_manifests(missing)}
        level = [each for name in missing if isinstance(each := found[name], Manifest)]
    return found


def _reached(names: Iterable[Name], step: Callable[[Name], list[Name]]) -> list[Name]:
    waiting = [*names]
    reached: dict[Name, None] = {}
    for name in waiting:  # grows: the nearest come first
        for other in step(name):
            if other not in reached:
                reached[other] = None
                waiting.append(other)
    return [*reached]


def trees(lineage: Lineage, manifest: Manifest) -> list[Tree]:
    """Two trees for people: what it was made from, and what was made from it. An artifact is opened once in a tree."""
    name = name_of(manifest)
    roots = [Tree(f"[bold]{short(name)}[/] was made from"), Tree(f"[bold]{short(name)}[/] made")]
    for root, step in zip(roots, (lineage.inputs, lineage.outputs), strict=True):
        _grow(root, name, step, lineage)
        if not root.children:
            root.add("[dim]nothing[/]")
    return roots


def _grow(root: Tree, start: Name, step: Callable[[Name], list[Name]], lineage: Lineage) -> None:
    opened = {start}
    waiting = [(root, start, other) for other in reversed(step(start))]
    while waiting:  # not by recursion: manifests may form a chain of any length
        branch, name, other = waiting.pop()
        if other in opened and step(other):
            branch.add(f"{short(other)} [dim](above)[/]")
            continue
        opened.add(other)
        grown = branch.add(_line(name, other, lineage))
        waiting += [(grown, other, further) for further in reversed(step(other))]


def _line(name: Name, other: Name, lineage: Lineage) -> str:
    manifest = lineage.manifests.get(other)
    if manifest is None:
        return f"{short(other)} [red]not in this store[/]"
    reader, source = (lineage.manifests[name], manifest) if other in lineage.inputs(name) else (manifest, lineage.manifests[name])
    digests = {entry["digest"] for entry in reader.inputs.values() if (entry["stage"], entry["key"]) == name_of(source)}
    changed = "" if digests == {source.digest} else "  [yellow]made again since, with other content[/]"
    return f"{short(other)}  [dim]{show_size(manifest.size)}  {one_line(phrase(manifest, lineage.describe))}[/]{changed}"


def to_json(lineage: Lineage, manifest: Manifest) -> dict[str, Any]:
    """{"ancestors": [...], "descendants": [...]}, nearest first, each with its inputs."""

    def described(name: Name) -> Mapping[str, Any]:
        found = lineage.manifests.get(name)
        values: dict[str, Any] = {"artifact": "/".join(name), "is_in_store": found is not None}
        if found is not None:
            inputs = {role: f"{source['stage']}/{source['key']}" for role, source in found.inputs.items()}
            values |= {"digest": found.digest, "size": found.size, "phrase": phrase(found, lineage.describe), "inputs": inputs}
        return values

    name = [name_of(manifest)]
    return {
        "ancestors": [described(each) for each in lineage.ancestors(name)],
        "descendants": [described(each) for each in lineage.descendants(name)],
    }
