"""Arguments, options and output that several commands share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.formatting import parse_age, parse_size

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_A_PIPE = 1000


class SentenceGroup(click.Group):
    """Its help shows the first sentence of each command as a whole. click would cut it to one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, _first_sentence(command.help or "")) for name, command in commands if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


class _Parsed(click.ParamType):
    """A text for a function that raises ValueError with a sentence if it cannot parse it."""

    def __init__(self, name: str, parse: Callable[[str], float]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE, AGE = _Parsed("size", parse_size), _Parsed("age", parse_age)
FOLDER = click.Path(path_type=Path, file_okay=False)
CONFIG = click.argument("config", type=click.Path(path_type=Path))
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
JOBS = click.option(
    "--jobs",
    "num_jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stages to compute side by side. [default: as many as the cluster has room for; 1 on a local cluster of few CPUs]",
)
STORE = click.option("--store", default="runs/store", show_default=True, help="A folder or s3://bucket/prefix.")
TRACKING_URI = click.option("--tracking-uri", help="MLflow's URI. [default: MLFLOW_TRACKING_URI, or the database in --workspace]")
WORKSPACE = click.option("--workspace", type=FOLDER, default=Path("runs"), show_default=True)
_S3 = (
    click.option(
        "--s3-endpoint", metavar="URL", help="Endpoint of an S3 service. [default: from the AWS variables, as is the region]"
    ),
    click.option("--s3-region", metavar="NAME"),
    click.option("--s3-anonymous", is_flag=True, help="Do not sign requests. For public buckets."),
    click.option("--s3-path-style", is_flag=True, help="Put the bucket into the path of URLs, not into the host name."),
)


def s3_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options for access to buckets, for commands that open stores without a config. The command gets an S3Config as `s3`."""

    @wraps(command)
    def with_s3(
        *arguments: Any, s3_endpoint: str | None, s3_region: str | None, s3_anonymous: bool, s3_path_style: bool, **options: Any
    ) -> None:
        from pipelines.storage.s3_client import S3Config

        s3 = S3Config(endpoint_url=s3_endpoint, region=s3_region, anonymous=s3_anonymous, path_style=s3_path_style)
        command(*arguments, s3=s3, **options)

    for option in reversed(_S3):  # the option applied last comes first in --help
        with_s3 = option(with_s3)
    return with_s3


def split_overrides(arguments: tuple[str, ...], name: str) -> tuple[str | None, list[str]]:
    """The argument that is not KEY=VALUE, if there is one, and those that are. name: of that argument, in messages."""
    others = [argument for argument in arguments if "=" not in argument]
    if len(others) > 1:
        raise click.UsageError(f"give one {name}, not {' and '.join(others)}")
    return (others[0] if others else None), [argument for argument in arguments if "=" in argument]


def complete_stage(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of stages, for completion by the shell."""
    from pipelines.run import graph

    return [name for name in graph.stages() if name.startswith(incomplete)]


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def table_console() -> Console:
    """For tables on stdout. Lines that go to a file or a pipe are not wrapped."""
    terminal = console()
    if not terminal.is_terminal:
        terminal.width = _WIDTH_OF_A_PIPE
    return terminal


def echo_json(answer: Any) -> None:
    click.echo(json.dumps(answer, indent=1))
