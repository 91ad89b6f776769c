"""Secrets are never sent with a job: a value that looks like a credential, or equals one of the environment, is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.workflow.provenance import CHANGES, CodePackage

_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip
_SHORTEST_CREDENTIAL = 8  # a shorter value would be found in any text
_IN_URI = re.compile(
    r"://[^/?#\s]*@|://[^@\s]*:[^@\s]*@|[?&](X-Amz-Signature|X-Amz-Security-Token|Signature|sig|token|access_token|api_key|password)=",
    re.IGNORECASE,
)
_INSTEAD = "give the cluster the credential by its environment or a secret, and leave it out here"
_CONFIG_ENDINGS = (".yaml", ".yml")


def strings(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from strings(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from strings(value, prefix)
    elif isinstance(values, str):
        yield prefix, values


def _secrets() -> dict[str, str]:
    return {name: os.environ[name] for name in _CREDENTIALS if len(os.environ.get(name, "")) >= _SHORTEST_CREDENTIAL}


def refuse_credentials(place: str, text: str) -> None:
    """Raises ValueError if a text has an address with a credential, or the value of a secret. place: of the text."""
    if _IN_URI.search(text):
        raise ValueError(f"{place} holds a credential in an address, which all users of the cluster could read; {_INSTEAD}")
    if name := next((name for name, secret in _secrets().items() if secret in text), None):
        raise ValueError(f"{place} holds the value of {name}, which all users of the cluster could read; {_INSTEAD}")


def refuse_credentials_in(package: CodePackage) -> None:
    """Raises ValueError. Configs are checked as they are written, because a value that an override replaces is sent too."""
    for name, secret in _secrets().items():
        if found := next((file for file, content in package.files.items() if secret.encode() in content), None):
            raise ValueError(f"{found} holds the value of {name}, and would be sent to the cluster with the code; remove it")
    for place, line in _lines_of_configs(package):
        refuse_credentials(place, line)


def _lines_of_configs(package: CodePackage) -> Iterator[tuple[str, str]]:
    """Lines of all configs in the package, with those that its changes removed."""
    for name, content in package.files.items():
        if name.endswith(_CONFIG_ENDINGS):
            for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
                yield f"{name}, line {number},", line
    changed = ""
    for line in package.files.get(CHANGES, b"").decode(errors="replace").splitlines():
        if line.startswith("diff --git "):
            changed = line.rpartition(" b/")[2]
        elif changed.endswith(_CONFIG_ENDINGS):
            yield f"{changed}, as it was committed or as it is now,", line
