"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

CONFIG = click.argument("config", type=click.Path(path_type=Path))
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
STORE = click.option("--store", default="runs/store", show_default=True, help="A folder or s3://bucket/prefix.")
ENDPOINT = click.option("--s3-endpoint", help="URL of an S3 service; without it the AWS variables decide.")


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
