"""Every `enat ...` that a manifest runs is one that the command line takes, with files and keys that exist."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from manifests import IN_IMAGE, INFRA, KUBERAY, REPOSITORY, compose, enat_commands, environment, secret_values
from test_manifests_run import OF_OTHERS, RUN_BY
from what_runs import what_runs

from pipelines.cli.main import commands
from pipelines.run.config import RunConfig
from pipelines.workflow.config import load_config

COMMANDS = enat_commands()


def _parse(words: Sequence[str]) -> click.Context | None:
    """Parse as `enat` would, running nothing. None: it asked for help. Raises click.UsageError."""
    command: click.Command = commands
    context = click.Context(commands, info_name="enat")
    rest = list(words)
    while isinstance(command, click.Group):
        if rest[:1] == ["--help"]:
            return None
        name = rest.pop(0)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"there is no command {name}")
        command = found
        context = click.Context(command, info_name=name, parent=context)
    return None if "--help" in rest else command.make_context(command.name, rest, parent=context.parent)


def test_commands_are_found_where_manifests_have_them() -> None:
    places = {place for place, _ in COMMANDS}
    assert {
        "systemd",
        "cron",
        "README.md",
        "tokenize.md",
        "schedule.md",
        "enat-reevaluate: submit",
        "RayJob imagenet256-train",
        "Dockerfile",
    } <= places


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[f"{place}: {' '.join(words)[:60]}" for place, words in COMMANDS])
def test_the_command_line_takes_what_a_manifest_runs(place: str, words: list[str]) -> None:
    parsed = _parse(words)
    assert parsed is None or parsed.command.name in words


def test_the_parser_of_these_tests_refuses_what_the_command_line_refuses() -> None:
    for words in (["no-such-command"], ["plan"], ["run", "configs/digits.yaml", "--no-such-option"]):
        with pytest.raises(click.UsageError):
            _parse(words)


@pytest.mark.parametrize("words", [words for _, words in COMMANDS if words[0] in {"run", "plan", "submit"}], ids=" ".join)
def test_configs_exist_and_take_the_values_that_replace_theirs(words: list[str]) -> None:
    config = REPOSITORY / words[1].removeprefix(f"{IN_IMAGE}/")
    assert config.is_file()
    load_config(RunConfig, config, [word for word in words[2:] if re.match(r"[\w.]+=", word)])


def test_a_key_that_no_config_has_would_be_noticed() -> None:
    with pytest.raises(ValueError, match="no_such_key"):
        load_config(RunConfig, REPOSITORY / "configs" / "digits.yaml", ["no_such_key=1"])


def test_every_config_that_is_named_exists() -> None:
    named = {
        name
        for path in [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.md"), *INFRA.glob("single-machine/*")]
        for name in re.findall(r"configs/[\w.-]+\.yaml", path.read_text())
    }
    assert named and all((REPOSITORY / name).is_file() for name in named)


def test_everything_that_a_manifest_runs_is_run_by_a_test() -> None:
    """A command that is new has to be run there, or has a reason not to be."""
    assert {*what_runs()} == {*RUN_BY, *OF_OTHERS} and not {*RUN_BY} & {*OF_OTHERS}
    assert all(compose()["services"][place.split()[1]]["image"].startswith(("minio/", "postgres:")) for place in OF_OTHERS)


# Variables -----------------------------------------------------------------------------------------------------------------

# Of images that are not ours, of Docker's GPU support, and of programs that the Dockerfile runs.
_OF_IMAGES = {
    "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "PATH", "HOME", "PYTHONUNBUFFERED", "DS_BUILD_OPS", "UV_LINK_MODE",
    "UV_CACHE_DIR", "PIP_CACHE_DIR",
}  # fmt: skip
_READERS = {  # which package reads variables of which kind, and where in it they are named
    "AWS_": ("botocore", ("configprovider.py", "credentials.py")),
    "MLFLOW_": ("mlflow", ("environment_variables.py", "cli/__init__.py", "utils/cli_args.py")),
    "RAY_": ("ray", ("exceptions.py", "_private/authentication/authentication_token_setup.py", "_common/usage/usage_constants.py")),
}


@pytest.mark.parametrize("name", sorted(set(environment()) - _OF_IMAGES))
def test_every_variable_is_read_by_something(name: str) -> None:
    if name == "ENAT_DATA":  # of compose.yaml itself
        assert "${ENAT_DATA:?" in (INFRA / "compose.yaml").read_text()
        return
    files = [*(REPOSITORY / "pipelines").rglob("*.py"), *(REPOSITORY / "enat").rglob("*.py")]
    for prefix, (package, names) in _READERS.items():
        if name.startswith(prefix):
            spec = find_spec(package)
            assert spec is not None and spec.origin is not None
            files += [Path(spec.origin).parent / file for file in names]
    assert any(re.search(rf"\b{name}\b", file.read_text()) or _in_parts(name, file) for file in files)


def _in_parts(name: str, file: Path) -> bool:
    """botocore names AWS_ENDPOINT_URL without its prefix, as it does for those of single services."""
    return name == "AWS_ENDPOINT_URL" and file.name == "configprovider.py" and "ENDPOINT_URL" in file.read_text().upper()


# What no file may hold -----------------------------------------------------------------------------------------------------

TEXTS = [path for path in INFRA.rglob("*") if path.is_file() and "__pycache__" not in path.parts and path.name != ".env"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(INFRA)))
def test_no_secret_no_package_index_and_no_floating_tag(path: Path) -> None:
    text = path.read_text()
    assert not secret_values(path) or path.suffix in {".py", ".md", ".lock"}
    assert not re.search(r"--(extra-)?index-url|pypi\.|AKIA[0-9A-Z]{16}|-----BEGIN", text)
    assert not re.search(r"image:\s*\S+:latest|FROM \S+:latest", text)


def test_a_secret_would_be_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        'RAY_AUTH_TOKEN: "abc"\nAWS_SECRET_ACCESS_KEY=x1\nautomountServiceAccountToken: false\nMINIO_ROOT_PASSWORD: ${X:?y}\n'
    )
    assert secret_values(bad) == ['RAY_AUTH_TOKEN: "abc"', "AWS_SECRET_ACCESS_KEY=x1"]


def test_manifests_are_listed_by_kustomize() -> None:
    for folder in (INFRA / "kuberay", INFRA / "kuberay" / "jobs"):
        import yaml

        listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        there = {path.name for path in KUBERAY if path.parent == folder} - {
            "kustomization.yaml",
            "secret.template.yaml",
            "secret.yaml",
        }
        assert set(listed) == there
