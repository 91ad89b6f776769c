"""Every `enat` command of the guide and the README is understood, and is run where this is cheap.

Run here, on the store of a short run of the demo, with the key of an artifact that exists in place of the page's key: what lists,
shows, checks, compares, plans and samples on this machine. Run in test_guide.py: those of own-dataset.md. Run in
test_guide_runs.py: what takes minutes. Not run: _NOT_RUN has each reason; of these commands, options, the config and KEY=VALUE are
checked.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from material.digits_run import REPOSITORY, CommandLineRun
from pipelines.cli.main import commands
from pipelines.run.config import RunConfig
from pipelines.workflow.config import load_config

GUIDE = REPOSITORY / "pipelines" / "guide"
PAGES = [REPOSITORY / "README.md", *sorted(GUIDE.glob("*.md"))]
_NOT_RUN = {
    r"imagenet(?!.* --images)|DiT-XL|retriever|metrics\.fid": "needs ImageNet, its weights, or runs with an FID",
    r"hf://|--address": "needs a hub, or a cluster that takes jobs; tests/pipelines/sharing and jobs have them",
    r"trian\.": "is refused, as the page shows; test_cli.py has such cases",
    r"^enat import": "needs published weights",
    r"--hf owner/name": "uploads to a hub; tests/pipelines/sharing has one",
}
# In test_guide_runs.py.
_LONG = r"^enat (run|search|evaluate|doctor) |^enat reevaluate configs/|^enat compare digits-|s3://|enat-s-digits@"
_RUNS_OF_GUIDE = {"own-dataset.md"}


def _commands(page: Path) -> list[str]:
    """Of the blocks of a shell; in blocks with output those after a prompt."""
    found = []
    for kind, block in re.findall(r"```(bash|console)\n(.*?)```", page.read_text(), re.DOTALL):
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or kind == "bash"]
        parts = [part.strip() for line in prompted for part in re.split(r" && |\s#\s", line)]
        found += [" ".join(part.split()) for part in parts if re.match(r"enat +[a-z]", part)]
    return found


EVERY = [(page.name, command) for page in PAGES for command in _commands(page)]


def _reason(command: str) -> str | None:
    return next((reason for pattern, reason in _NOT_RUN.items() if re.search(pattern, command)), None)


_RUN = list(dict.fromkeys(command for page, command in EVERY if page not in _RUNS_OF_GUIDE and _reason(command) is None))
HERE = [command for command in _RUN if not re.search(_LONG, command)]
LONG = [command for command in _RUN if re.search(_LONG, command)]


def with_keys(command: str, digits_run: CommandLineRun) -> str:
    """The command with keys of artifacts that exist."""
    made = {id: item.key for id, item in digits_run.planned().items()}
    return re.sub(r"\b(train|token_map)/[0-9a-f]{4}\b", lambda match: f"{match[1]}/{made[match[1]]}", command)


def _parse(arguments: Sequence[str]) -> click.Context:
    """Raises click.UsageError for an unknown command or option, and for a value of the wrong kind."""
    group, names = commands, [*arguments]
    context = click.Context(group, info_name="enat")
    while isinstance(group, click.Group):
        name, command, names = group.resolve_command(context, names)
        assert command is not None
        context = command.make_context(name, names, parent=context)
        group, names = command, [*context.protected_args, *context.args] if isinstance(command, click.Group) else []
    return context


def test_every_command_of_a_page_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert len(EVERY) > 50
    for page, command in EVERY:
        if command.endswith("--help"):
            assert CliRunner().invoke(commands, shlex.split(command)[1:]).exit_code == 0, (page, command)
            continue
        context = _parse(shlex.split(command)[1:])
        config, overrides = context.params.get("config"), context.params.get("overrides", ())
        values = [value for value in overrides if "=" in value and not value.endswith(".sampler.yaml")]  # of a search
        if context.info_name in {"run", "plan", "submit", "reevaluate", "evaluate", "search"} and "trian" not in command:
            is_here = config is not None and Path(config).exists()
            assert is_here or config is None or config == Path("flowers.yaml"), (page, command)
            load_config(RunConfig, config if is_here else None, values if is_here else ["name=any", *values])


def test_what_is_not_understood_is_found() -> None:
    for wrong in ("enat artifacts list", "enat plan configs/digits.yaml --clusters 8", "enat sample train/3f2a -n many"):
        with pytest.raises(click.UsageError):
            _parse(shlex.split(wrong)[1:])


def test_each_command_is_run_or_has_a_reason() -> None:
    assert len(HERE) >= 18
    assert len(LONG) >= 18
    assert all(any(re.search(pattern, command) for _, command in EVERY) for pattern in _NOT_RUN)
    kinds = {command.split()[1] for command in HERE}
    assert kinds == {"artifacts", "compare", "export", "plan", "reevaluate", "sample"}


@pytest.fixture(scope="module")
def place(digits_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout after the demo."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copytree(digits_run.workspace, folder / "runs")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE)
def test_commands_of_the_pages_succeed(command: str, digits_run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for folder in ("samples", "model"):  # of another command
        shutil.rmtree(folder, ignore_errors=True)
    result = CliRunner().invoke(commands, shlex.split(with_keys(command, digits_run))[1:], catch_exceptions=False)
    assert result.exit_code == 0 and result.output.strip(), result.output
