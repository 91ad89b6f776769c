"""YAML and command-line overrides -> frozen dataclasses. Defaults < file < command line; unknown keys are errors.

Values only: an interpolation may refer to another key of the file, but resolvers (`${oc.env:...}`) are refused, so that
nothing from the environment, a secret least of all, ends in a manifest.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from pipelines.storage.redaction import without_credentials

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A sentence about one key or file of the configuration."""


def load_config(schema: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """The file's values (none without a file) under the overrides ("train.num_steps=10") as a schema. Raises ConfigError."""
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"{override!r} is no override; write key=value, such as train.num_steps=100")
    first = (str(path), _read(path)) if path is not None else ("the command line", OmegaConf.create({}))
    _refuse_resolvers(*first)
    return merge(schema, [first, *read_overrides(overrides)])


def read_overrides(overrides: Sequence[str]) -> list[tuple[str, DictConfig]]:
    """Each "key=value" as a layer of `merge`. Raises ConfigError."""
    layers = []
    for override in overrides:
        source = f"override {override}"
        try:
            layers.append((source, OmegaConf.from_dotlist([override])))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{source} is not readable as YAML: {_one_line(error)}") from error
        _refuse_resolvers(*layers[-1])
    return layers


def _refuse_resolvers(source: str, values: DictConfig) -> None:
    if _has_resolver(OmegaConf.to_container(values)):
        raise ConfigError(f"{source}: resolvers in ${{...}} are not allowed, only references to other keys")


def _read(path: Path) -> DictConfig:
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no config file {path}; {_closest_file(path)}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"the config {path} cannot be read ({error.strerror}); name a YAML file that can") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path} holds no mapping of keys to values")
    return values


def _closest_file(path: Path) -> str:
    names = [each.name for each in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"did you mean {path.parent / close[0]}?" if close else "correct the path; configs/ of the repository has examples"


def merge(schema: type[ConfigT], layers: Sequence[tuple[str, Any]]) -> ConfigT:
    """Lay values over the schema's defaults, each layer named for messages. Raises ConfigError."""
    merged = _defaults(schema)  # type: ignore[arg-type]  # mypy takes no class for hashable
    for source, values in layers:
        try:
            merged = OmegaConf.merge(merged, values)
        except ConfigKeyError as error:
            raise ConfigError(_unknown_key(schema, str(error.full_key), source)) from error
        except OmegaConfBaseException as error:
            where = f"{error.full_key}: " if error.full_key else ""
            raise ConfigError(f"{source}: {where}{_one_line(error)}") from error
    try:
        config: Any = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{layers[0][0]} does not say {error.full_key}, which has no default") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{layers[0][0]}: {_one_line(error)}") from error
    except ValueError as error:  # __post_init__ of a config: its sentence names the field
        raise ConfigError(f"{layers[0][0]}: {error}") from error
    return config


@cache
def _defaults(schema: type) -> Any:
    """Of a schema, never to be changed: OmegaConf takes a fifth of a second to make them for a whole run; merging copies."""
    defaults = OmegaConf.structured(schema)
    OmegaConf.set_readonly(defaults, None)
    return defaults


def with_overrides(config: ConfigT, overrides: Mapping[str, Any], source: str) -> ConfigT:
    """A copy of a config with nested values replaced, checked as those of a file. Raises ConfigError."""
    return merge(type(config), [(source, OmegaConf.create(to_dict(config))), (source, OmegaConf.create(dict(overrides)))])


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a dataclass, tuples as lists: what a manifest, a run's parameters or YAML can hold."""
    values = _lists(dataclasses.asdict(config))
    assert isinstance(values, dict)
    return values


def redacted(config: Any) -> dict[str, Any]:
    """to_dict for other people's eyes: user and password are taken out of URIs."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        return without_credentials(value) if isinstance(value, str) else value

    cleaned: dict[str, Any] = clean(to_dict(config))
    return cleaned


def identity(config: Any) -> Any:
    """What of a config decides the outcome, for keys.

    Fields called `execution` (workers, devices, batch per device) are left out, and those called `dataset`, which enters as the
    artifact of its index. A config that refers to something outside
    (a dataset, a weights file) has a method `identity()` that gives its content's digest in place of its path.
    """
    if hasattr(config, "identity"):
        return config.identity()
    if dataclasses.is_dataclass(config):
        return {
            field.name: identity(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if field.name not in ("execution", "dataset")
        }
    if isinstance(config, Mapping):
        return {key: identity(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [identity(value) for value in config]
    return config


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _unknown_key(schema: Any, key: str, source: str) -> str:
    """Name the key and the closest known one, level by level."""
    here: Any = schema
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = _fields(here)
        if part not in known:
            close = difflib.get_close_matches(part, known, n=1, cutoff=0.4)
            hint = f"did you mean {'.'.join([*parts[:depth], close[0]])}?" if close else f"known here: {', '.join(known)}"
            return f"{source}: unknown key {'.'.join(parts[: depth + 1])}; {hint}"
        here = known[part]
    return f"{source}: unknown key {key}"


def _fields(schema: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(schema):
        return {}
    hints = typing.get_type_hints(schema)
    fields = {}
    for field in dataclasses.fields(schema):
        options = [option for option in typing.get_args(hints[field.name]) if option is not type(None)] or [hints[field.name]]
        fields[field.name] = options[0]
    return fields


def _has_resolver(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_resolver, value.values()))
    if isinstance(value, list):
        return any(map(_has_resolver, value))
    if not isinstance(value, str):
        return False
    # A colon inside of ${...}, however nested; one behind it, as in ${host}:6379, is text.
    depth = 0
    for index, character in enumerate(value):
        if value.startswith("${", index):
            depth += 1
        elif character == "}" and depth:
            depth -= 1
        elif character == ":" and depth:
            return True
    return False


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split("\n    full_key")[0].split())
    return "a value has the wrong type" if "$VALUE" in message else message  # OmegaConf leaves its template there for list items
