"""The `enat` command.

Exit codes: 0 done, 1 failed, 2 bad input, 3 drift (of reevaluate), 130 ended by Ctrl-C or SIGTERM. Errors are one line;
tracebacks go to the run's log file.
"""

from __future__ import annotations

import logging
import signal
import sys

import click

from pipelines.cli.artifacts import artifacts
from pipelines.cli.compare import compare
from pipelines.cli.doctor import doctor
from pipelines.cli.evaluate import evaluate
from pipelines.cli.import_weights import import_weights
from pipelines.cli.jobs import jobs
from pipelines.cli.plan import plan
from pipelines.cli.reevaluate import reevaluate
from pipelines.cli.run import run
from pipelines.cli.sample import sample
from pipelines.cli.submit import submit
from pipelines.cluster import connection


def main() -> None:
    """Run a command, turning expected errors into one line and an exit code."""
    connection.prepare_environment()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        commands.main(prog_name="enat", standalone_mode=False)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except click.ClickException as error:
        usage = f"{error.ctx.command_path} --help" if isinstance(error, click.UsageError) and error.ctx else "enat --help"
        _fail(f"{error.format_message().rstrip('.')}; see {usage}", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; the same command continues from what is committed", 130)
    except ValueError as error:
        logging.getLogger(__name__).info("bad input", exc_info=True)
        _fail(str(error), 2)
    except Exception as error:
        if logging.getLogger().handlers:  # a log file; without one Python would print the traceback
            logging.getLogger(__name__).error("failed", exc_info=True)
        _fail(f"{error}{_log_hint()}", 1)


def _interrupt(*_: object) -> None:
    """Who ends a job or a unit sends SIGTERM: it is to leave no more behind than Ctrl-C does."""
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    click.echo(f"enat: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="enat-lab")
def commands() -> None:
    """Train and compare token-based image generators: token maps, models, samples and scores."""


for _command in (plan, run, submit, jobs, sample, evaluate, compare, reevaluate, import_weights, artifacts, doctor):
    commands.add_command(_command)


def _log_hint() -> str:
    files = [handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    return f" (traceback in {files[0]})" if files else ""
