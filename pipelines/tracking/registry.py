"""Registered models of MLflow: names, versions, tags and aliases, within the limits of its databases."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ILLEGAL_IN_MODEL = re.compile(r"[^\w\-.]+")


# Limits of the databases of MLflow's registry. sqlite accepts longer values; PostgreSQL and MySQL refuse or truncate them.
_MODEL_NAME_LIMIT = 256
TAG_LIMIT = 5000
DESCRIPTION_LIMIT = 5000
DIGEST_TAG = "enat.digest"
CREATED_TAG = "enat.created"


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model, with its tags."""

    name: str
    version: str
    tags: Mapping[str, str]


def pyfunc_files(
    loader: str, *, column: tuple[str, str], output: tuple[int, ...], params: Mapping[str, int | float | str]
) -> dict[str, bytes]:
    """The file MLmodel of a version that MLflow loads by importing a module, not by unpickling.

    loader: a module with a function `_load_pyfunc`, which is given the folder of the version.   column: name and type of the input.
    output: shape of a row, uint8.   params: defaults of what predict() takes beside its input.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    types = {int: "long", float: "double", str: "string"}
    signature = ModelSignature(
        inputs=Schema([ColSpec(column[1], column[0])]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *output))]),
        params=ParamSchema([ParamSpec(name, types[type(value)], value) for name, value in params.items()]),
    )
    model = Model(artifact_path="model", signature=signature)
    model.add_flavor("python_function", loader_module=loader, data=".", python_version=platform.python_version())
    text: str = model.to_yaml()
    return {"MLmodel": text.encode()}


def set_version_tags(client: Any, version: ModelVersion, tags: Mapping[str, str | None]) -> None:
    """Set tags. The value None deletes a tag."""
    from mlflow.exceptions import MlflowException

    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(version.name, version.version, key, value[:TAG_LIMIT])
        elif key in version.tags:
            try:
                client.delete_model_version_tag(version.name, version.version, key)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another process has just deleted it
                    raise


def as_model_version(version: Any) -> ModelVersion:
    tags = {str(key): str(value) for key, value in version.tags.items()}
    return ModelVersion(name=version.name, version=str(version.version), tags=tags)


def create_once(create: Callable[[], object]) -> None:
    """Create something by name, unless another run has just created it."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def model_name(text: str) -> str:
    """A legal name for a registered model. A name that is already legal does not change."""
    return _ILLEGAL_IN_MODEL.sub("-", text).strip(".-")[:_MODEL_NAME_LIMIT].rstrip(".-") or "model"


def first_versions(client: Any, name: str) -> dict[str, Any]:
    """Digest -> the first version with that content. Versions without a digest belong to others and are ignored."""
    versions = client.search_model_versions(f"name='{name}'")
    ours = [version for version in versions if DIGEST_TAG in version.tags]
    return {version.tags[DIGEST_TAG]: version for version in sorted(ours, key=lambda version: -int(version.version))}


def version_of(client: Any, name: str, digest: str) -> str | None:
    version = first_versions(client, name).get(digest)
    return None if version is None else str(version.version)


def move_alias(client: Any, name: str, alias: str) -> None:
    """Set an alias to the version created last. Checks again after each change: another run may have registered a newer one."""
    from mlflow.exceptions import MlflowException

    alias_at = _version_at(client, name, alias)
    while (newest := _newest_version(client, name)) != alias_at:
        try:
            client.set_registered_model_alias(name, alias, newest)
            alias_at = newest
        except MlflowException:
            if alias_at is not None or (alias_at := _version_at(client, name, alias)) is None:
                raise  # otherwise another run set it first: the database refuses one of two new aliases


def _version_at(client: Any, name: str, alias: str) -> str | None:
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def _newest_version(client: Any, name: str) -> str:
    versions = first_versions(client, name).values()
    newest = max(versions, key=lambda version: (version.tags.get(CREATED_TAG, ""), int(version.version)))
    return str(newest.version)


def shortened(description: str) -> str:
    rest = "\n\n(the rest is in the file README.md of this version)"
    if len(description) <= DESCRIPTION_LIMIT:
        return description
    return description[: DESCRIPTION_LIMIT - len(rest)] + rest
