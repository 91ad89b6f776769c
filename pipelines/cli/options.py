"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

CONFIG = click.argument("config", type=click.Path(path_type=Path))
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
STORE = click.option("--store", default="runs/store", show_default=True, help="A folder or s3://bucket/prefix.")
_S3 = (
    click.option("--s3-endpoint", metavar="URL", help="Of an S3 service; without it the AWS variables decide, as of the region."),
    click.option("--s3-region", metavar="NAME"),
    click.option("--s3-anonymous", is_flag=True, help="Do not sign requests, for public buckets."),
    click.option("--s3-path-style", is_flag=True, help="The bucket stands in the path, not in the host name."),
)


def s3_options(command: Callable[..., None]) -> Callable[..., None]:
    """How buckets are reached, for a command that opens stores without a config. It gets them as `s3`, an S3Config."""

    @wraps(command)
    def with_s3(
        *arguments: Any, s3_endpoint: str | None, s3_region: str | None, s3_anonymous: bool, s3_path_style: bool, **options: Any
    ) -> None:
        from pipelines.storage.s3_client import S3Config

        s3 = S3Config(endpoint_url=s3_endpoint, region=s3_region, anonymous=s3_anonymous, path_style=s3_path_style)
        command(*arguments, s3=s3, **options)

    for option in reversed(_S3):  # the last one that is applied comes first in --help
        with_s3 = option(with_s3)
    return with_s3


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
