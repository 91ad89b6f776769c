"""What one stage tells another: a frozen dataclass per stage, stored in the artifact's manifest and checked when it is read."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipelines.artifacts.manifest import Manifest
from pipelines.workflow import config as configuration

_VERSION = "summary_version"


class SummaryError(ValueError):
    """The manifest of an artifact has a summary that this version of the program cannot read."""


class Summary:
    """Base of the summaries. A subclass is a frozen dataclass whose fields are plain values or other dataclasses.

    A field that is added later needs a default, so that manifests written before it can still be read. Any other change of the
    fields raises `version`; manifests of another version are refused.
    """

    version: ClassVar[int] = 1
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    @property
    def dataset_name(self) -> str | None:
        """The dataset that the artifact was made from, if a field `dataset` of the summary or of its `info` names it."""
        return getattr(getattr(self, "info", self), "dataset", None)

    @property
    def is_from_outside(self) -> bool:
        """Whether a field `is_imported` states that the artifact was imported, so that the cost of making it is not known."""
        return getattr(self, "is_imported", False)

    def to_dict(self) -> dict[str, Any]:
        return {_VERSION: self.version, **configuration.to_dict(self)}

    @classmethod
    def read(cls, manifest: Manifest) -> Self:
        """The summary in a manifest. Raises SummaryError, naming the artifact and the field, if it does not have these fields."""
        values = {name: value for name, value in manifest.summary.items() if name != _VERSION}
        version = manifest.summary.get(_VERSION, 1)  # before summaries had a version they had the fields of version 1
        if version != cls.version:
            raise _error(manifest, f"it is version {version}, and this program reads version {cls.version}")
        try:
            return _adapter(cls).validate_json(json.dumps(values))  # type: ignore[arg-type]  # a class is hashable
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise _error(manifest, f"{field}: {first['msg']}") from error


@cache
def _adapter(summary: type[Summary]) -> TypeAdapter[Any]:
    return TypeAdapter(summary)


def _error(manifest: Manifest, problem: str) -> SummaryError:
    code = manifest.provenance.get("code")
    made_by = f", or read it with the code that made it ({code})" if code else ""
    return SummaryError(
        f"the summary of {manifest.stage}/{manifest.key[:12]} cannot be read ({problem}). "
        f"Remove this artifact from its store and run the config again{made_by}."
    )
