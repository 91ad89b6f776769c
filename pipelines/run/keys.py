"""Every key of a config, as its dataclass declares it: type, default, text, unit, and whether it is part of a stage's key.

`enat config` shows them, and `write_reference` writes pipelines/guide/configuration.md.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.sampling import presets
from pipelines.workflow.config import PRESET, SET_BY

# Keys of stages that are not part of the stage's key. `execution` never is.
_NOT_IN_KEY = ("token_map.max_quarantine_share", "train.sampler", "train.scores", "train.s3")
_UNIT = " Unit: "

PAGE = Path(__file__).parents[1] / "guide" / "configuration.md"
_HEAD = """\
# Configuration

A run is one YAML file. This page lists every key, generated from the source by `python -m pipelines.run.keys`. In the terminal,
`enat config` lists the sections, `enat config train` the keys of one section, and `enat config train.num_steps` describes one key.

```yaml
base: imagenet256.yaml       # a file beside this one, whose values are used unless they are replaced below
name: small
train: {model: {preset: enat-s}}
variants:
  guided: {generate: {sampler: {guidance_scale: 4.0}}}   # the same run with other values; what both share is made once
```

```bash
enat plan configs/digits.yaml train.num_steps=1000      # any key can be replaced; defaults < base < file < command line
```

A base may have a base. Mappings are merged key by key, lists are replaced as a whole, and a null variant drops one of the base.
Values may refer to other keys (`${train.batch_size}`), but not to the environment. A key that is unknown, or that would be ignored,
is refused with the key to use instead. `enat submit` sends the merged file.

*In key* states whether a change makes the stage compute again: "yes", "no", or "content" if the content of the named file or folder
counts and its path does not.
"""


@dataclass(frozen=True)
class Key:
    """A key that a config may give. `default` is None for a section, and "required" if there is no default."""

    path: str
    type: str
    default: str | None
    unit: str
    text: str
    in_key: str

    @property
    def is_section(self) -> bool:
        return self.default is None


@cache
def all_keys() -> tuple[Key, ...]:
    """Every section and key, in the order of the dataclasses."""
    return tuple(_keys(RunConfig, ""))


def find(path: str) -> list[Key]:
    """A key, or a section followed by its keys and subsections; without a path the sections and keys of a run.

    Raises ValueError with the closest key for an unknown one.
    """
    parent = f"{path}." if path else ""
    inside = [key for key in all_keys() if key.path.startswith(parent) and "." not in key.path.removeprefix(parent)]
    own = [key for key in all_keys() if key.path == path]
    if not own and not inside:
        known = [key.path for key in all_keys()]
        last = [known_path for known_path in known if known_path.rpartition(".")[2] == path.rpartition(".")[2]]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.6) or last
        raise ValueError(f"unknown key {path}; " + (f"did you mean {close[0]}?" if close else "`enat config` lists the sections"))
    return [*own, *(key for key in inside if key not in own)]


def _keys(schema: Any, prefix: str) -> Iterator[Key]:
    hints, texts = typing.get_type_hints(schema), _texts(schema)
    if prefix.removesuffix(".") in RunConfig.PRESETS:
        yield Key(f"{prefix}{PRESET}", "string or null", "null", "", presets.TEXT, "yes")
    for field in dataclasses.fields(schema):
        if SET_BY in field.metadata:
            continue
        path, hint = f"{prefix}{field.name}", hints[field.name]
        inner = [each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)]
        is_section = bool(inner) and typing.get_origin(hint) is not dict
        text, _, unit = texts[field.name].partition(_UNIT)
        default = None if is_section else _default(field)
        yield Key(path, _type(hint), default, unit.rstrip("."), text, _in_key(path))
        if is_section:
            yield from _keys(inner[0], f"{path}.")


def _texts(schema: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for owner in reversed(schema.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                texts[statement.target.id] = str(ast.literal_eval(below.value)) if isinstance(below, ast.Expr) else ""
    return {name: " ".join(text.split()) for name, text in texts.items()}


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _shown(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else _shown(field.default_factory())


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool | dict):
        return json.dumps(value)  # as YAML writes it
    return str(value)


def _type(hint: Any) -> str:
    """As a reader of YAML knows it."""
    arguments = [each for each in typing.get_args(hint) if each is not type(None) and each is not ...]
    if isinstance(hint, types.UnionType):
        return " or ".join([*map(_type, arguments), *(["null"] if type(None) in typing.get_args(hint) else [])])
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(arguments[0])}"
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "mapping"
    return {str: "string", bool: "boolean"}.get(hint, hint.__name__)


def _in_key(path: str) -> str:
    section, _, rest = path.partition(".")
    if section == "seed":
        return "yes"
    stages = graph.stages()
    if section not in stages or not rest or "execution" in path.split(".") or path.endswith("dataset.name"):
        return "no"
    if any(path == name or path.startswith(f"{name}.") for name in _NOT_IN_KEY):
        return "no"
    is_file = any(path.rpartition(".")[2] in stage.external for stage in stages.values())
    return "content" if is_file else "yes"


def reference_page() -> str:
    """The text of the guide page."""
    lines = [_HEAD]
    listed: dict[str, list[tuple[Any, ...]]] = {}
    sections = {"": "The run"} | {key.path: key.text for key in all_keys() if key.is_section}
    for section, text in sections.items():
        rows = [key for key in find(section) if key.path != section and not key.is_section]
        if not rows:
            continue
        lines += ["", f"## `{section}`\n\n{_as_markdown(text)}" if section else f"## {text}", ""]
        shown = [(key.path.removeprefix(f"{section}."), key.type, key.default, key.text) for key in rows]
        if earlier := next((name for name, keys in listed.items() if keys == shown), None):
            lines.append(f"The keys are those of [`{earlier}`](#{earlier.replace('.', '')}).")
            continue
        listed[section] = shown
        lines += ["| key | type | default | in key | meaning |", "|---|---|---|---|---|"]
        for key in rows:
            unit = f" ({key.unit})" if key.unit else ""
            cells = (f"`{key.path}`", key.type + unit, f"`{key.default}`", key.in_key, _as_markdown(key.text))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _as_markdown(text: str) -> str:
    """Characters outside of `code` that Markdown would read as HTML or emphasis stand for themselves."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([<*])", r"\\\1", piece) for piece in pieces)


def write_reference() -> None:
    PAGE.write_text(reference_page())


if __name__ == "__main__":
    write_reference()
