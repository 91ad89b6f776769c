"""YAML files and command-line overrides as frozen dataclasses. Defaults < base < file < command line; unknown keys are errors.

A file may build on another one: `base: imagenet256.yaml` names a file by its path from the folder of the file that names it. Its
values are replaced key by key; a list is replaced as a whole. Files hold values only. An interpolation refers to another key of the
merged configuration. Resolvers (`${oc.env:...}`) are refused, because a value of the environment, such as a secret, would be
written to manifests.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from pipelines.storage.redaction import without_credentials

ConfigT = TypeVar("ConfigT")
_ADDED = "added"
SET_BY = "set_by"  # metadata of a field
_MOST_BYTES, _MOST_LEVELS, _MOST_ALIASES = 1 << 20, 50, 20  # aliases of aliases multiply what they stand for
_LARGEST = 2**31 - 1  # of numbers, other than seeds
BASE = "base"  # the key of a file that names the file it builds on
PRESET = "preset"  # the key of a section that names values; see _expanded


class ConfigError(ValueError):
    """A sentence about one key or file of the configuration."""


def set_by(key: str, default: Any = None) -> Any:
    """A field that the pipeline sets from what the user gives elsewhere, under `key`. A configuration that sets it is refused."""
    return dataclasses.field(default=default, metadata={SET_BY: key})


def added(default: Any) -> Any:
    """A field that earlier versions did not have. It is part of a key only if it differs from its default, so artifacts of earlier
    versions keep theirs."""
    return dataclasses.field(default=default, metadata={_ADDED: True})


def load_config(schema: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """The values of a file and its bases under the overrides ("train.num_steps=10"), as a schema. Raises ConfigError."""
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"{override!r} is not an override; write key=value, such as train.num_steps=100")
    files = [(str(file), values) for file, values in read_files(path, schema)] if path is not None else []
    layers = [*files, *((source, _expanded(schema, source, values, Path())) for source, values in read_overrides(overrides))]
    for source, values in layers:
        _refuse_set_fields(schema, source, OmegaConf.to_container(values))
    return merge(schema, layers, str(path) if path is not None else "the command line")


def read_files(path: Path, schema: Any = None) -> list[tuple[Path, DictConfig]]:
    """A config file and the files that it builds on, each with its own values, the last base first. Raises ConfigError.

    schema: whose named values are replaced by what they stand for; see _expanded.
    """
    files: list[tuple[Path, DictConfig]] = []
    named: list[Path] = []
    next_file: Path | None = path
    while next_file is not None:
        is_circle = next_file.resolve() in [file.resolve() for file in named]
        named.append(next_file)
        if is_circle:
            raise ConfigError(f"base: {' -> '.join(map(str, named))} is a circle; remove one `base`")
        values = _read(next_file, named[:-1])
        _refuse_resolvers(str(next_file), values)
        plain = OmegaConf.to_container(values)
        base = plain.get(BASE) if isinstance(plain, dict) else None
        if base is not None and (not isinstance(base, str) or not base or "${" in base):
            raise ConfigError(f"{next_file}: base is {base!r}; name one YAML file, such as base: imagenet256.yaml")
        own = OmegaConf.masked_copy(values, [str(key) for key in values if key != BASE])
        files.insert(0, (next_file, _expanded(schema, str(next_file), own, next_file.parent)))
        next_file = next_file.parent / base if base is not None else None
    return files


def read_text(path: Path, schema: Any = None) -> str:
    """The text of a config that needs no other file: as it is written, or merged with its bases. Raises ConfigError."""
    files = read_files(path, schema)
    if len(files) == 1 and files == read_files(path):
        return path.read_text()
    bases = ", ".join(file.name for file, _ in reversed(files[:-1])) or "the files that it names"
    return f"# {path.name}, merged with {bases}\n{OmegaConf.to_yaml(OmegaConf.merge(*(values for _, values in files)))}"


def read_overrides(overrides: Sequence[str]) -> list[tuple[str, DictConfig]]:
    """Each "key=value" as a layer of `merge`. Raises ConfigError."""
    layers = []
    for override in overrides:
        source = f"override {override}"
        _check_shape(f"override {override[:40]}", override.partition("=")[2])
        try:
            layers.append((source, OmegaConf.from_dotlist([override])))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{source} cannot be read as YAML: {_one_line(error)}") from error
        if BASE in layers[-1][1]:
            raise ConfigError(f"{source}: only a config file can name a base; write it into the file")
        _refuse_resolvers(*layers[-1])
    return layers


def _expanded(schema: Any, source: str, values: DictConfig, folder: Path) -> DictConfig:
    """Values in which names of the schema's PRESETS are replaced by what they stand for, also in variants.

    PRESETS: key of a section -> `(values of the section, folder from which paths count) -> values`. Raises ConfigError.
    """
    plain, is_changed = OmegaConf.to_container(values), False
    for key, expand in getattr(schema, "PRESETS", {}).items():
        *parents, name = key.split(".")
        variants = plain.get("variants") if isinstance(plain, dict) else None
        for variant, one in {"": plain, **(variants if isinstance(variants, dict) else {})}.items():
            place: Any = one
            for parent in parents:
                place = place.get(parent) if isinstance(place, dict) else None
            if not isinstance(place, dict) or not isinstance(place.get(name), dict) or PRESET not in place[name]:
                continue
            try:
                place[name], is_changed = expand(place[name], folder), True
            except ValueError as error:
                where = f"variants.{variant}.{key}" if variant else key
                raise ConfigError(f"{source}: {where}.{error}") from error
    if not is_changed:
        return values
    expanded = OmegaConf.create(plain)
    assert isinstance(expanded, DictConfig)
    return expanded


def _refuse_resolvers(source: str, values: DictConfig) -> None:
    if _has_resolver(OmegaConf.to_container(values)):
        raise ConfigError(f"{source}: resolvers in ${{...}} are not allowed, only references to other keys")


def _refuse_set_fields(schema: Any, source: str, values: Any, prefix: str = "") -> None:
    """Raises ConfigError for a value that would be ignored, because the pipeline sets the field."""
    if not isinstance(values, Mapping) or not dataclasses.is_dataclass(schema):
        return
    types = _fields(schema)
    for field in dataclasses.fields(schema):
        value, key = values.get(field.name), f"{prefix}{field.name}"
        if value is not None and SET_BY in field.metadata:
            origin = field.metadata[SET_BY]
            raise ConfigError(f"{source}: {key} would be ignored, because the pipeline sets it; use {origin} instead")
        _refuse_set_fields(types[field.name], source, value, f"{key}.")


def _read(path: Path, named_by: Sequence[Path]) -> DictConfig:
    """named_by: the files that led here, empty for the file of the command."""
    by = f" (the base of {named_by[-1]})" if named_by else ""
    try:
        _check_shape(f"{path}{by}", path.read_bytes())
        values = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"the config file {path}{by} does not exist; {_closest_file(path)}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"the config {path}{by} cannot be read ({error.strerror}); name a readable YAML file") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}{by} cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}{by} does not contain a mapping of keys to values")
    return values


def _check_shape(source: str, text: str | bytes) -> None:
    """Raises ConfigError for text that would crash the YAML library or fill the memory: nested deeply, or with many aliases.

    Looks at the events of the parser, which does not recurse. Other mistakes are named when the text is loaded.
    """
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{source} has {len(text):,} bytes; a config has at most {_MOST_BYTES:,}")
    depth = num_aliases = 0
    with suppress(YAMLError, UnicodeDecodeError):
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            num_aliases += isinstance(event, AliasEvent)
            if depth > _MOST_LEVELS or num_aliases > _MOST_ALIASES:
                what = f"more than {_MOST_LEVELS} levels" if depth > _MOST_LEVELS else f"more than {_MOST_ALIASES} aliases (*name)"
                raise ConfigError(f"{source} has {what}, which no config needs")


def _closest_file(path: Path) -> str:
    names = [each.name for each in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return (
        f"did you mean {path.parent / close[0]}?" if close else "fix the path; the folder configs/ of the repository has examples"
    )


def merge(schema: type[ConfigT], layers: Sequence[tuple[str, Any]], whole: str | None = None) -> ConfigT:
    """Merge layers of values over the schema's defaults. Raises ConfigError.

    Each layer has a name for messages. `whole` names all of them together; None takes the name of the first. The layers cannot be
    used afterwards: most of the time of a merge would be that of copying them.
    """
    whole = whole or layers[0][0]
    merged = copy.deepcopy(_defaults(schema))  # type: ignore[arg-type]  # mypy takes no class for hashable
    for source, values in layers:
        try:
            merged = OmegaConf.unsafe_merge(merged, values)
        except ConfigKeyError as error:
            raise ConfigError(_unknown_key(schema, str(error.full_key), source)) from error
        except TypeError as error:  # a list where a mapping is expected
            raise ConfigError(f"{source}: {_one_line(error)}; give each key a value of its own kind") from error
        except OmegaConfBaseException as error:
            where = f"{error.full_key}: " if error.full_key else ""
            raise ConfigError(f"{source}: {where}{_one_line(error)}") from error
    _refuse_senseless(whole, OmegaConf.to_container(merged))
    try:
        config: Any = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{whole} does not give {error.full_key}, which has no default") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{whole}: {_one_line(error)}") from error
    except ValueError as error:  # __post_init__ of a config: its sentence names the field
        raise ConfigError(f"{whole}: {_with_whole_key(merged, error)}") from error
    return config


def _with_whole_key(values: Any, error: ValueError) -> str:
    """The sentence of the first section that cannot be made, with the key of the section: sections name only their own fields."""
    for name in values:
        inner = OmegaConf.create({}) if OmegaConf.is_missing(values, name) else values._get_node(name)
        if not isinstance(inner, DictConfig) or inner._is_none() or not dataclasses.is_dataclass(OmegaConf.get_type(inner)):
            continue
        try:
            OmegaConf.to_object(inner)
        except ValueError as found:
            return with_key(name, OmegaConf.get_type(inner), _with_whole_key(inner, found))
    return str(error)


def with_key(key: str, schema: Any, sentence: str) -> str:
    """A sentence on a section that begins with one of its fields, or with a key inside it, under the section's own key."""
    if f"{key}." in sentence:
        return sentence
    begins_with_field = re.split(r"\W", sentence)[0] in _fields(schema)
    return f"{key}.{sentence}" if begins_with_field else f"{key}: {sentence}"


def _refuse_senseless(source: str, values: Any, key: str = "") -> None:
    """Raises ConfigError for NaN and infinity, which pass every comparison or none and would fail after hours, for numbers with
    zeros too many, for empty texts, such as an unset variable of the shell leaves, and for lists in lists, which OmegaConf takes
    for any element."""
    if isinstance(values, float) and not math.isfinite(values):
        raise ConfigError(f"{source}: {key} is {values}; it must be a finite number")
    if isinstance(values, int | float) and abs(values) > _LARGEST and not key.endswith("seed"):
        raise ConfigError(f"{source}: {key} is {values}; it must be at most {_LARGEST:,}")
    if values == "":
        raise ConfigError(f"{source}: {key} is empty; give a value, or null for the default")
    is_list = isinstance(values, list | tuple)
    for name, value in values.items() if isinstance(values, dict) else enumerate(values) if is_list else ():
        if is_list and isinstance(value, dict | list):
            raise ConfigError(f"{source}: {key} holds {value}; give single values, such as [a, b]")
        _refuse_senseless(source, value, f"{key}.{name}".lstrip("."))


@cache
def _defaults(schema: type) -> Any:
    """The defaults of a schema. Do not change them, but a copy. OmegaConf takes 0.2 s to build those of a whole run."""
    defaults = OmegaConf.structured(schema)
    OmegaConf.set_readonly(defaults, None)
    return defaults


def with_overrides(config: ConfigT, overrides: Mapping[str, Any], source: str) -> ConfigT:
    """A copy of a config with nested values replaced, checked as those of a file. Raises ConfigError."""
    _refuse_set_fields(type(config), source, overrides)
    return merge(type(config), [(source, OmegaConf.create(to_dict(config))), (source, OmegaConf.create(dict(overrides)))])


def to_dict(config: Any) -> dict[str, Any]:
    """The values of a dataclass as nested dictionaries and lists, for manifests, parameters of a run and YAML."""
    values = _lists(dataclasses.asdict(config))
    assert isinstance(values, dict)
    return values


def redacted(config: Any) -> dict[str, Any]:
    """The values of `to_dict` with user names and passwords removed from URIs."""
    cleaned: dict[str, Any] = redacted_value(to_dict(config))
    return cleaned


def redacted_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: redacted_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_value(inner) for inner in value]
    return without_credentials(value) if isinstance(value, str) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def changed(config: Any, usual: Any = None) -> dict[str, Any]:
    """Values of a config that differ from their defaults, by dotted keys, without user names and passwords.

    A section that is null by default counts as "default" if it is given without values. usual: a config that states the defaults
    instead of the schema. Fields without defaults count as changed.
    """
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value, default = getattr(config, each.name), _default_of(each) if usual is None else getattr(usual, each.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = changed(value, default if type(default) is type(value) else None)
            found |= {f"{each.name}.{key}": inner_value for key, inner_value in inner.items()}
            if default is None and not inner:
                found[each.name] = "default"
        elif value != default:
            found |= flat({each.name: "null" if value is None else redacted_value(value)})
    return found


def _default_of(each: dataclasses.Field[Any]) -> Any:
    return each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default


def identity(config: Any) -> Any:
    """The values of a config that decide the outcome of a stage. They are part of the stage's key.

    Fields named `execution` (workers, devices, batch per device) are left out. Fields named `dataset` are left out because the
    index of the dataset is an input of the stage. A config that refers to an external file has a method `identity()`, which
    returns the digest of the file's content instead of its path.
    """
    if hasattr(config, "identity"):
        return config.identity()
    if dataclasses.is_dataclass(config):
        return {
            field.name: identity(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if field.name not in ("execution", "dataset")
            and not (_ADDED in field.metadata and getattr(config, field.name) == field.default)
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
    """A sentence with the key and the closest known one, searched level by level."""
    renamed = getattr(schema, "RENAMED", {})
    if key in renamed:
        return f"{source}: {key} was renamed to {renamed[key]}"
    here: Any = schema
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
            continue
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
        options = [option for option in typing.get_args(hints[field.name]) if option is not type(None)]
        is_optional = type(None) in typing.get_args(hints[field.name])
        fields[field.name] = options[0] if is_optional else hints[field.name]
    return fields


def _has_resolver(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_resolver, value.values()))
    if isinstance(value, list):
        return any(map(_has_resolver, value))
    if not isinstance(value, str):
        return False
    # A colon inside ${...}, at any depth, is a resolver. A colon after it, as in ${host}:6379, is text.
    without = re.sub(r"\$\{[^{}:]*\}", "", value)
    return bool(re.search(r"\$\{[^{}]*:", value)) or (without != value and _has_resolver(without))


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split("\n    full_key")[0].split())
    return "a value has the wrong type" if "$VALUE" in message else message  # OmegaConf's unfilled template, for items of lists
