"""The command line: what a program or a person gets to see, and that bad input costs nothing and leaves nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from enat import ENAT, VQGAN, ENATConfig, VQGANConfig
from enat.checkpoint import save_weights

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


class Code:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@dataclass(frozen=True)
class Case:
    """One command that must fail. sentence: what its only line holds; {folder} is the test's own folder."""

    name: str
    sentence: str
    overrides: tuple[str, ...] = ()
    command: str = "run"
    config: str = str(DIGITS)
    code: int = 2


CASES = [
    Case("unknown key", "unknown key train.num_stepz; did you mean train.num_steps?", ("train.num_stepz=3",)),
    Case(
        "ill-typed value",
        "train.num_steps: Value 'many' of type 'str' could not be converted to Integer",
        ("train.num_steps=many",),
    ),
    Case(
        "resolution",
        "resolution 18 is not divisible by the tokenizer's downsampling factor 4 (3 levels)",
        ("tokenizer.resolution=18",),
    ),
    Case("grid", "train.model.grid_size is 16, but the token map of digits (16 px) has 4", ("train.model.grid_size=16",)),
    Case("codebook", "train.model.codebook_size is 1024, but the token map of digits", ("train.model.codebook_size=1024",)),
    Case(
        "no dataset",
        "dataset.path {folder}/nowhere is no folder",
        ("dataset.kind=image_folder", "dataset.path={folder}/nowhere"),
    ),
    Case("no config", "there is no config file {folder}/nowhere.yaml", config="{folder}/nowhere.yaml"),
    Case("no config to plan", "there is no config file {folder}/nowhere.yaml", config="{folder}/nowhere.yaml", command="plan"),
    Case("store below a file", "the store {folder}/file/store cannot be written", ("store={folder}/file/store",)),
    Case("workspace below a file", "{folder}/file", ("workspace={folder}/file/runs", "store={folder}/elsewhere")),
    Case("no weights", "tokenizer.weights is {folder}/nowhere.pth, which is no file", ("tokenizer.weights={folder}/nowhere.pth",)),
    Case("weights of an ENAT", "does not fit the configured architecture", ("tokenizer.weights={folder}/enat.safetensors",)),
    Case(
        "weights of another size", "wrong shape: quantize.embedding.weight is (64, 16)", ("tokenizer.weights={folder}/other.pth",)
    ),
    Case("weights that are a pickle", "{folder}/code.pth is not opened", ("tokenizer.weights={folder}/code.pth",)),
    Case("weights with a pickle inside", "{folder}/inside.ckpt is not opened", ("tokenizer.weights={folder}/inside.ckpt",)),
    Case("weights called safe", "{folder}/code.safetensors is no readable file", ("tokenizer.weights={folder}/code.safetensors",)),
    Case(
        "a stage that breaks",
        "stage tokenizer failed: NotADirectoryError",
        ("tokenizer.weights={folder}/right.pth", "store={folder}/blocked"),
        code=1,
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to give as weights, good and bad, and places that are in the way."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "file").write_text("in the way")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "tokenizer").write_text("in the way")

    def published(vqgan: VQGAN) -> dict[str, torch.Tensor]:
        return {name.replace("codebook.", "quantize.embedding."): value for name, value in vqgan.state_dict().items()}

    torch.save(published(VQGAN(VQGANConfig.preset("vqgan-small"))), folder / "right.pth")
    torch.save({"state_dict": published(VQGAN(VQGANConfig.preset("vqgan-small", codebook_size=64)))}, folder / "other.pth")
    save_weights(folder / "enat.safetensors", ENAT(ENATConfig(encoder_layers=1, decoder_layers=1, embed_dim=32, num_heads=2)))
    marker = folder / "executed"
    (folder / "code.pth").write_bytes(pickle.dumps(Code(marker)))
    (folder / "code.safetensors").write_bytes(pickle.dumps(Code(marker)))
    torch.save({"weight": torch.zeros(1), "more": Code(marker)}, folder / "inside.ckpt")
    return folder


# Importing takes three seconds and longer, so one process imports once, and every command is run by a fork of it.
_SERVER = """
import json, os, sys
from pipelines import cli, cluster
cluster.prepare_environment()
from pipelines import pipeline, summary, tracking, workflow
print("ready", flush=True)
for line in sys.stdin:
    arguments, *paths = json.loads(line)
    if (child := os.fork()) == 0:
        for number, path in enumerate(paths, start=1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
        sys.argv, code = ["enat", *arguments], 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # at once: taking all modules down takes another second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _arguments(case: Case, folder: Path) -> list[str]:
    texts = (case.config, f"workspace={{folder}}/runs/{case.name}", "tracking.enabled=false", *case.overrides)
    return [case.command, *(text.format(folder=folder) for text in texts)]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run a command in a process of its own."""
    folder = tmp_path_factory.mktemp("answers")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin is not None and server.stdout is not None and server.stdout.readline() == "ready\n"

        def run(*arguments: object) -> subprocess.CompletedProcess[str]:
            paths = [folder / f"{len(list(folder.iterdir()))}.{kind}" for kind in ("out", "err")]
            print(json.dumps([[*map(str, arguments)], *map(str, paths)]), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess([], code, *(path.read_text() for path in paths))

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def answers(ask: Callable[..., Any], folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    return {case.name: ask(*_arguments(case, folder)) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_wrong_is_said_in_one_line_with_its_exit_code(answers: dict[str, Any], folder: Path, case: Case) -> None:
    _assert_said(case, folder, answers[case.name])


def test_a_command_of_a_fresh_shell_says_the_same(enat: Callable[..., Any], folder: Path) -> None:
    case = CASES[-1]
    _assert_said(case, folder, enat(*_arguments(case, folder)))


def _assert_said(case: Case, folder: Path, answer: subprocess.CompletedProcess[str]) -> None:
    assert answer.returncode == case.code, answer.stderr
    assert answer.stdout == ""
    assert answer.stderr.startswith("enat: ") and answer.stderr.count("\n") == 1 and answer.stderr.endswith("\n")
    assert case.sentence.format(folder=folder) in answer.stderr


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_is_wrong_leaves_no_artifact_and_bad_configuration_nothing_at_all(
    answers: dict[str, Any], folder: Path, case: Case
) -> None:
    workspace = folder / "runs" / case.name
    if "weights" in case.name or case.code == 1:  # these are read when their stage runs
        assert not list(workspace.glob("store/*/*/*"))
    else:
        assert not workspace.exists()
    assert (folder / "file").read_text() == (folder / "blocked" / "tokenizer").read_text() == "in the way"
    assert list((folder / "blocked").iterdir()) == [folder / "blocked" / "tokenizer"]


def test_code_in_a_file_of_weights_is_never_executed(answers: dict[str, Any], folder: Path) -> None:
    assert answers and not (folder / "executed").exists()
    pickle.loads((folder / "code.pth").read_bytes())
    assert (folder / "executed").exists(), "it would have been seen"
    (folder / "executed").unlink()


def test_the_traceback_of_a_stage_that_broke_is_in_the_log_that_is_named(answers: dict[str, Any]) -> None:
    line = answers["a stage that breaks"].stderr
    log = Path(line.partition("(traceback in ")[2].rstrip(")\n"))
    assert "Traceback" in log.read_text() and "NotADirectoryError" in log.read_text()


# Answers -------------------------------------------------------------------------------------------------------------------


def test_a_plan_as_json_names_stages_keys_and_what_is_done(ask: Callable[..., Any], tmp_path: Path) -> None:
    process = ask("plan", DIGITS, f"workspace={tmp_path / 'runs'}", "--json")
    assert (process.returncode, process.stderr) == (0, "")
    answer = json.loads(process.stdout)
    assert answer["store"] == str(tmp_path / "runs" / "store")
    rows = {row["stage"]: row for row in answer["stages"]}
    assert set(rows["train"]) == {"stage", "key", "reused", "parts_done"}
    assert len(rows["tokenizer"]["key"]) == 64 and rows["token_map"]["key"] is None
    assert not any(row["reused"] or row["parts_done"] for row in answer["stages"])
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"


def test_a_plan_for_people_says_what_is_reused_and_what_is_not_known_yet(digits_run, ask: Callable[..., Any]) -> None:
    overrides = (*digits_run.overrides, "train.seed=1")
    process = ask("plan", DIGITS, f"workspace={digits_run.workspace}", *overrides)
    assert (process.returncode, process.stderr) == (0, "")
    lines = {line.split()[0]: line for line in process.stdout.splitlines() if line.strip()}
    assert all("reuse" in lines[stage] for stage in ("tokenizer", "token_map", "reference"))
    assert "compute" in lines["train"] and "known after train" in lines["generate"] and "compute" in lines["generate"]
    assert "3 of 10 stages are reused" in process.stdout


def test_help_is_there_for_every_command(enat: Callable[..., Any]) -> None:
    process = enat("--help")
    assert process.returncode == 0 and process.stderr == ""
    for command in ("plan", "run"):
        assert command in process.stdout
        assert "KEY=VALUE" in enat(command, "--help").stdout


@pytest.mark.parametrize("arguments", [("run",), ("run", "a.yaml", "--jsn"), ("rnu", "a.yaml")])
def test_a_command_that_is_used_wrongly_says_so_in_one_line(enat: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    process = enat(*arguments)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("enat: ") and process.stderr.count("\n") == 1 and "--help" in process.stderr
