"""The command line accepts every `enat ...` that a manifest or a page runs, with files and keys that exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import yaml
from manifests import IN_IMAGE, INFRA, KUBERAY, REPOSITORY, compose, enat_commands, environment, secret_values
from test_manifests_run import OF_OTHERS, RUN_BY
from what_runs import parse, what_runs

from pipelines.run.config import RunConfig
from pipelines.workflow.config import load_config

COMMANDS = enat_commands()


def test_the_command_line_accepts_what_manifests_and_pages_run() -> None:
    expected = {"systemd", "cron", "README.md", "tokenize.md", "schedule.md", "enat-reevaluate: submit", "Dockerfile"}
    assert expected | {"RayJob imagenet256-train"} <= {place for place, _ in COMMANDS}
    for place, words in COMMANDS:
        try:
            parsed = parse(words)
        except click.UsageError as error:
            pytest.fail(f"{place}: enat {' '.join(words)}: {error.format_message()}")
        assert parsed is None or parsed.command.name in words, (place, words)
    for words in (["no-such-command"], ["plan"], ["run", "configs/digits.yaml", "--no-such-option"]):
        with pytest.raises(click.UsageError):
            parse(words)


def test_configs_exist_and_accept_the_overrides_of_the_commands() -> None:
    loaded = 0
    for _, words in COMMANDS:
        if words[0] in {"run", "plan", "submit"}:
            config = REPOSITORY / words[1].removeprefix(f"{IN_IMAGE}/")
            overrides = [re.sub(r"preset=runs/\S+", "preset=autonat-8", word) for word in words[2:] if re.match(r"[\w.]+=", word)]
            load_config(RunConfig, config, overrides)  # a sampler by name stands for the file that a search will write
            loaded += 1
    assert loaded >= 15
    with pytest.raises(ValueError, match="no_such_key"):
        load_config(RunConfig, REPOSITORY / "configs" / "digits.yaml", ["no_such_key=1"])
    files = [*INFRA.rglob("*.yaml"), *INFRA.rglob("*.md"), *INFRA.glob("single-machine/*")]
    named = {name for path in files for name in re.findall(r"configs/[\w.-]+\.yaml", path.read_text())}
    assert named and all((REPOSITORY / name).is_file() for name in named)


def test_a_test_runs_everything_that_a_manifest_runs() -> None:
    """Run a new command in test_manifests_run.py, or give a reason there why it cannot be run."""
    assert {*what_runs()} == {*RUN_BY, *OF_OTHERS} and not {*RUN_BY} & {*OF_OTHERS}
    assert all(compose()["services"][place.split()[1]]["image"].startswith(("minio/", "postgres:")) for place in OF_OTHERS)


def test_kustomize_lists_all_manifests() -> None:
    for folder in (INFRA / "kuberay", INFRA / "kuberay" / "jobs"):
        listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        existing = {path.name for path in KUBERAY if path.parent == folder}
        assert set(listed) == existing - {"kustomization.yaml", "secret.template.yaml", "secret.yaml"}


# Variables -----------------------------------------------------------------------------------------------------------------

# Variables of images that are not ours, of Docker's GPU support, of NCCL (compiled), and of programs that the Dockerfile runs.
_OF_IMAGES = {
    "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD",
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "PATH", "HOME", "PYTHONUNBUFFERED", "DS_BUILD_OPS", "UV_LINK_MODE",
    "UV_CACHE_DIR", "PIP_CACHE_DIR", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG",
}  # fmt: skip
_READERS = {  # the package that reads variables with this prefix, and the files that name them
    "AWS_": ("botocore", ("configprovider.py", "credentials.py")),
    "MLFLOW_": ("mlflow", ("environment_variables.py", "cli/__init__.py", "utils/cli_args.py")),
    "RAY_": ("ray", ("exceptions.py", "_private/authentication/authentication_token_setup.py", "_common/usage/usage_constants.py")),
}


def test_something_reads_every_variable() -> None:
    ours = [*(REPOSITORY / "pipelines").rglob("*.py"), *(REPOSITORY / "enat").rglob("*.py")]
    texts = {"": "\n".join(path.read_text() for path in ours)}
    for prefix, (package, names) in _READERS.items():
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        texts[prefix] = "\n".join((Path(spec.origin).parent / name).read_text() for name in names)
    texts["AWS_"] += "\nAWS_ENDPOINT_URL" if "ENDPOINT_URL" in texts["AWS_"].upper() else ""  # botocore names it without the prefix
    unread = [
        name
        for name in set(environment()) - _OF_IMAGES - {"ENAT_DATA"}
        if not any(name.startswith(prefix) and re.search(rf"\b{name}\b", text) for prefix, text in texts.items())
    ]
    assert not unread
    assert "${ENAT_DATA:?" in (INFRA / "compose.yaml").read_text()  # which compose itself reads


# What no file may contain --------------------------------------------------------------------------------------------------


def test_no_secret_no_package_index_and_no_floating_tag(tmp_path: Path) -> None:
    for path in INFRA.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".env":
            text = path.read_text()
            assert not secret_values(path) or path.suffix in {".py", ".md", ".lock"}, path
            assert not re.search(r"--(extra-)?index-url|pypi\.|AKIA[0-9A-Z]{16}|-----BEGIN", text), path
            assert not re.search(r"image:\s*\S+:latest|FROM \S+:latest", text), path
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        'RAY_AUTH_TOKEN: "abc"\nAWS_SECRET_ACCESS_KEY=x1\nautomountServiceAccountToken: false\nMINIO_ROOT_PASSWORD: ${X:?y}\n'
    )
    assert secret_values(bad) == ['RAY_AUTH_TOKEN: "abc"', "AWS_SECRET_ACCESS_KEY=x1"]
