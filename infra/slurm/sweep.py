"""The overrides of one task of an array job: `python sweep.py CONFIG INDEX [FILE]`. Prints them, each ended by a NUL.

With a file: those in its line INDEX, counted from 0, quoted as in a shell. Without: the values of the INDEX-th of the config's
variants, which then runs alone under the name NAME-VARIANT.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.workflow import config as configuration


def main(config: str, index: int, file: str | None = None) -> list[str]:
    if file is not None:
        lines = [line for line in Path(file).read_text().splitlines() if line.strip() and not line.startswith("#")]
        if not lines:
            raise ValueError(f"{file} has no lines; write the overrides of one task in each line")
        if index < len(lines):
            return shlex.split(lines[index])
        raise ValueError(f"{file} has {len(lines)} lines, and none for index {index}; use --array=0-{len(lines) - 1}")
    values = yaml.safe_load(configuration.read_text(Path(config)))
    variants = {name: each for name, each in (values.get("variants") or {}).items() if each is not None}  # null drops one of a base
    if index < len(variants):
        name = [*variants][index]
        alone = [f"variants.{other}=null" for other in variants]
        return [*_leaves(variants[name]), *alone, f"name={values['name']}-{name}"]
    raise ValueError(f"{config} has {len(variants)} variants, and none for index {index}; set ENAT_SWEEP to a file of overrides")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


if __name__ == "__main__":
    try:
        sys.stdout.write("".join(f"{override}\0" for override in main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4])))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"enat.sbatch: {error}\n")
        sys.exit(2)
