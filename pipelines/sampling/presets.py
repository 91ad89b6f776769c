"""Samplers by name: those that were published (presets.yaml), and those in files that `enat search` writes.

`generate.sampler.preset: autonat-8` in a config stands for the values of that sampler, and a name that ends with .yaml for those of
a file. What a config reads, records and computes are the values, so the same sampler has the same artifacts under any name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from enat.sampler_config import SamplerConfig
from pipelines.workflow.config import PRESET

TEXT = (
    "Name of a published sampler (autonat-8), or path of a YAML file that `enat search` wrote, from the folder of the config. It "
    "replaces all values of this section but `reuse`; values beside it replace its own."
)
_SUFFIXES = (".yaml", ".yml")
_MOST_BYTES = 1 << 16
_OF_THE_MODEL = ("reuse",)  # fields that a preset leaves as they are, unless it gives them


@cache
def presets() -> dict[str, SamplerConfig]:
    """The shipped samplers by name."""
    content = yaml.safe_load((resources.files("pipelines.sampling") / "presets.yaml").read_text(encoding="utf-8"))
    return {name: SamplerConfig(**each["sampler"]) for name, each in content.items()}


def with_preset(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Values of a SamplerConfig in which `preset` is replaced by what it stands for. Values beside it replace those of the preset.

    folder: from which the path of a file counts. Raises ValueError for an unknown name, a file that holds no sampler, and values
    that the preset's lists would hide.
    """
    given = {name: value for name, value in values.items() if name != PRESET}
    name = values.get(PRESET)
    if name is None:
        return given
    if not isinstance(name, str):
        raise ValueError(f"preset is {name!r}; give the name of a preset ({', '.join(presets())}) or of a YAML file")
    sampler, named = _of_file(folder / name) if name.endswith(_SUFFIXES) else (_of_name(name), set())
    kept = {each for each in _OF_THE_MODEL if each not in named}
    return {key: value for key, value in sampler.values_beside(given).items() if key not in kept} | given


def _of_name(name: str) -> SamplerConfig:
    if name not in presets():
        close = difflib.get_close_matches(name, presets(), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"presets are {', '.join(presets())}, and names of files end with .yaml"
        raise ValueError(f"preset names {name!r}, which does not exist; {hint}")
    return presets()[name]


def _of_file(path: Path) -> tuple[SamplerConfig, set[str]]:
    """The sampler of a file, and the names of the fields that it gives."""
    try:
        content = path.read_bytes()
        values = yaml.safe_load(content) if len(content) <= _MOST_BYTES else None
    except OSError as error:
        raise ValueError(f"preset names {path}, which cannot be read ({error.strerror}); fix the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"preset names {path}, which cannot be read as YAML; name a file of `enat search`") from error
    known = {each.name for each in dataclasses.fields(SamplerConfig)}
    if not isinstance(values, dict) or not values or not values.keys() <= known:
        raise ValueError(f"preset names {path}, which holds no values of a sampler alone; name a file of `enat search`")
    try:
        return SamplerConfig(**values), set(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"preset names {path}, whose values are no sampler: {error}") from error
