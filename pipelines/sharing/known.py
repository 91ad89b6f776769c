"""Weights that others published (known.yaml): where they are, what they are, and what is not known of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KnownWeights:
    """An entry of known.yaml, which describes the fields. tokenizer_preset: that of the generator's tokenizer, if not its own."""

    kind: Literal["vqgan", "enat"]
    file: Annotated[str, Field(pattern=r"^(hf://|https://)")] | None
    page: Annotated[str, Field(pattern=r"^https://")]
    name: str
    layout: Literal["MAGE", "open-muse", "ENAT"]
    preset: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    licence: str
    source: str
    tokenizer: str | None = None
    tokenizer_preset: str | None = None

    @model_validator(mode="after")
    def _check(self) -> KnownWeights:
        if (self.tokenizer is None) != (self.kind == "vqgan"):
            raise ValueError("a generator has a tokenizer, and a tokenizer has none")
        return self

    def values(self, place: str, tokenizer: str | None = None) -> list[str]:
        """Values of a config that uses the weights. place, tokenizer: paths or addresses of the files."""
        if self.kind == "vqgan":
            return [f"tokenizer.preset={self.preset}", f"tokenizer.weights={place}"]
        assert self.tokenizer is not None
        preset = self.tokenizer_preset or load_known()[self.tokenizer].preset
        return [
            f"tokenizer.preset={preset}",
            f"tokenizer.weights={tokenizer}",
            f"train.model.preset={self.preset}",
            f"train.weights={place}",
        ]


@cache
def load_known() -> Mapping[str, KnownWeights]:
    """All entries of known.yaml by name."""
    return read_known((resources.files("pipelines.sharing") / "known.yaml").read_text(encoding="utf-8"))


def read_known(text: str) -> dict[str, KnownWeights]:
    """Parse the text of such a file. Raises ValueError if it is not valid."""
    import yaml

    found = TypeAdapter(dict[str, KnownWeights]).validate_python(yaml.safe_load(text))
    if unknown := [each.tokenizer for each in found.values() if each.tokenizer and each.tokenizer not in found]:
        raise ValueError(f"{unknown[0]} is the tokenizer of an entry, but is not an entry")
    return found


def place_of(name: str, given: str | None) -> str:
    """Where to read the weights of an entry. given: a file that the user has. Raises ValueError if it is needed."""
    entry = load_known()[name]
    if given is not None:
        return given
    if entry.file is None:
        raise ValueError(
            f"{name} is published where only browsers get it; download {entry.name} from {entry.page}, then pass the file: "
            f"enat import {name} {entry.name}"
        )
    return entry.file


def verify(name: str, sha256: str) -> str:
    """A sentence about the content of a file of an entry. Raises ValueError if it is not what was published."""
    known = load_known()[name].sha256
    if known is None:
        return f"not verified: the checksum of {name} is not known; this file has sha256:{sha256}"
    if known != sha256:
        raise ValueError(f"the file is not {name}: it has sha256:{sha256}, and sha256:{known} was published; download it again")
    return f"verified: the file is {name} as published"
