"""The `enat` command.

Exit codes: 0 done, 1 failed, 2 bad input, 3 drift (only reevaluate), 130 interrupted by Ctrl-C or SIGTERM. Errors are one line.
Tracebacks are written to the log file of the run.
"""

from __future__ import annotations

import logging
import signal
import sys
from pkgutil import resolve_name

import click

from pipelines.cli.options import SentenceGroup
from pipelines.cluster import connection, local, supervisor
from pipelines.formatting import printable
from pipelines.storage.base import AccessError
from pipelines.storage.redaction import without_credentials

_COMMANDS = {
    "artifacts": "artifacts:artifacts",
    "compare": "compare:compare",
    "config": "config:config",
    "doctor": "doctor:doctor",
    "evaluate": "run:evaluate",
    "export": "sharing:export",
    "import": "sharing:import_weights",
    "init": "config:init",
    "jobs": "jobs:jobs",
    "plan": "run:plan",
    "reevaluate": "reevaluate:reevaluate",
    "run": "run:run",
    "sample": "sample:sample",
    "search": "search:search",
    "submit": "jobs:submit",
}

_USES_RAY = {"evaluate", "reevaluate", "run", "search"}


class _LazyGroup(SentenceGroup):
    """Imports the module of a command when the command is used, so that each command pays only for its own imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = resolve_name(f"pipelines.cli.{_COMMANDS[cmd_name]}")
        return command


def main() -> None:
    """Run a command, and turn its errors into one line and an exit code."""
    if _USES_RAY.intersection(sys.argv[1:2]):
        supervisor.supervise()
    connection.prepare_environment()
    signal.signal(signal.SIGTERM, _interrupt)
    status = 1
    try:
        _command()
        status = 0
    except SystemExit as exit:
        status = int(exit.code or 0)
        raise
    finally:
        supervisor.end(status)


def _command() -> None:
    try:
        commands.main(prog_name="enat", standalone_mode=False)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except click.ClickException as error:
        usage = f"{error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else "enat --help"
        _fail(f"{error.format_message().rstrip('.')}; see {usage}", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; run the same command to continue from what is committed", 130)
    except Exception as error:
        if isinstance(error, ValueError) and not _is_failure(error):
            logging.getLogger(__name__).info("bad input", exc_info=True)
            _fail(str(error), 2)
        local.settle()
        if logging.getLogger().handlers:  # a log file; without one Python would print the traceback
            logging.getLogger(__name__).error("failed", exc_info=True)
        _fail(f"{error}{_log_hint()}", 1)


def _is_failure(error: BaseException | None) -> bool:
    """Whether a place refused or failed, whatever names the error was given on its way."""
    return error is not None and (isinstance(error, AccessError) or _is_failure(error.__cause__))


def _interrupt(*_: object) -> None:
    """Ray and systemd send SIGTERM to end a process. Clean up as for Ctrl-C."""
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    """message: may hold names of files and answers of servers, with characters that a terminal obeys, and URIs with a password."""
    click.echo(f"enat: {printable(without_credentials(message))}", err=True)
    sys.exit(code)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="enat-lab")
def commands() -> None:
    """Train and compare token-based image generators: token maps, models, samples and scores."""


def _log_hint() -> str:
    files = [handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    return f" (traceback in {files[0]})" if files else ""
