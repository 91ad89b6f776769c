"""The command line: what a program or a person gets to see, and that bad input costs nothing and leaves nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from enat.checkpoint import load_enat, load_vqgan, save_weights
from enat.config import ENATConfig
from enat.model import ENAT
from enat.tokenizer import VQGAN, VQGANConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.run import config as run_config
from pipelines.run import graph
from pipelines.storage.base import file_digest
from pipelines.workflow import driver

REPOSITORY = Path(__file__).parents[3]
DIGITS = REPOSITORY / "configs" / "digits.yaml"


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
        "dataset.path: {folder}/nowhere is not a directory",
        ("dataset.kind=image_folder", "dataset.path={folder}/nowhere"),
    ),
    Case("no config", "the config file {folder}/nowhere.yaml does not exist", config="{folder}/nowhere.yaml"),
    Case(
        "config mistyped",
        "the config file {folder}/digit.yaml does not exist; did you mean {folder}/digits.yaml?",
        config="{folder}/digit.yaml",
    ),
    Case(
        "config a folder",
        "the config {folder}/blocked cannot be read (Is a directory); name a readable YAML file",
        config="{folder}/blocked",
    ),
    Case("seed", "seed is -1; it must be at least 0 and below 2**63", ("seed=-1",), command="plan"),
    Case("seed of a stage", "train.seed is -1; it must be at least 0", ("train.seed=-1",)),
    Case("no CPUs", "cluster.num_cpus is 0; it must be at least 1", ("cluster.num_cpus=0",)),
    Case(
        "no config to plan", "the config file {folder}/nowhere.yaml does not exist", config="{folder}/nowhere.yaml", command="plan"
    ),
    Case("store below a file", "the store {folder}/file/store cannot be written", ("store={folder}/file/store",)),
    Case("workspace below a file", "{folder}/file", ("workspace={folder}/file/runs", "store={folder}/elsewhere")),
    Case("no weights", "tokenizer.weights: {folder}/nowhere.pth is not a file", ("tokenizer.weights={folder}/nowhere.pth",)),
    Case(
        "weights of an ENAT",
        "enat.safetensors holds enat, not the weights of vqgan",
        ("tokenizer.weights={folder}/enat.safetensors",),
    ),
    Case(
        "weights of another size", "wrong shape: quantize.embedding.weight is (64, 16)", ("tokenizer.weights={folder}/other.pth",)
    ),
    Case("weights that are a pickle", "{folder}/code.pth is not opened", ("tokenizer.weights={folder}/code.pth",)),
    Case("weights with a pickle inside", "{folder}/inside.ckpt is not opened", ("tokenizer.weights={folder}/inside.ckpt",)),
    Case(
        "weights called safe", "{folder}/code.safetensors is not a readable file", ("tokenizer.weights={folder}/code.safetensors",)
    ),
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
    (folder / "digits.yaml").write_text("name: digits")
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
from pipelines.cli import main as cli
from pipelines.cluster import connection
connection.prepare_environment()
from pipelines.run import graph, summary
from pipelines.tracking import run as tracking
from pipelines.workflow import driver
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
        assert not list(workspace.glob("store/*/*/[!.]*"))
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


def test_what_is_not_there_is_told_with_what_to_do() -> None:
    """A sentence continues after its fact: "X is not a directory; correct the path"."""
    facts = r"is not a file|is not a directory|does not exist|no such (?:file|revision|repository)|holds no state dict"
    bare = {
        f"{path.name}: {match[0]}"
        for path in (REPOSITORY / "pipelines").rglob("*.py")
        for match in re.finditer(rf'(?:Error\(|[:=] )f?"[^"\n]*(?:{facts})"\)?', path.read_text())
    }
    assert not bare


# Answers -------------------------------------------------------------------------------------------------------------------


def test_a_plan_as_json_names_stages_keys_and_what_is_done(ask: Callable[..., Any], tmp_path: Path) -> None:
    process = ask("plan", DIGITS, f"workspace={tmp_path / 'runs'}", "--json")
    assert (process.returncode, process.stderr) == (0, "")
    answer = json.loads(process.stdout)
    assert answer["store"] == str(tmp_path / "runs" / "store")
    rows = {row["stage"]: row for row in answer["stages"]}
    assert set(rows["train"]) == {"stage", "key", "reused", "parts_done"}
    assert len(rows["dataset"]["key"]) == 64 and rows["tokenizer"]["key"] is None and rows["token_map"]["key"] is None
    assert not any(row["reused"] or row["parts_done"] for row in answer["stages"])
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"


def test_a_plan_for_people_says_what_is_reused_and_what_is_not_known_yet(digits_run, ask: Callable[..., Any]) -> None:
    overrides = (*digits_run.overrides, "train.seed=1")
    process = ask("plan", DIGITS, f"workspace={digits_run.workspace}", *overrides)
    assert (process.returncode, process.stderr) == (0, "")
    lines = {line.split()[0]: line for line in process.stdout.splitlines() if line[:1].strip()}  # not those that go on
    assert all("reuse" in lines[stage] for stage in ("dataset", "tokenizer", "token_map", "reference"))
    assert "compute" in lines["train"] and "known after train" in lines["generate"] and "compute" in lines["generate"]
    assert "4 of 11 stages are reused" in process.stdout


def test_help_is_there_for_every_command(enat: Callable[..., Any]) -> None:
    process = enat("--help")
    assert process.returncode == 0 and process.stderr == ""
    for command in ("artifacts", "import", "plan", "run"):
        assert command in process.stdout


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("plan",), "KEY=VALUE"),
        (("run",), "KEY=VALUE"),
        (("import", "vqgan"), "FIELD=VALUE"),
        (("import", "enat"), "--vqgan"),
        (("artifacts", "show"), "--contact-sheet"),
    ],
)
def test_help_says_what_a_command_takes(ask: Callable[..., Any], command: tuple[str, ...], word: str) -> None:
    process = ask(*command, "--help")
    assert (process.returncode, process.stderr) == (0, "") and word in process.stdout


@pytest.mark.parametrize("arguments", [("run",), ("run", "a.yaml", "--jsn"), ("rnu", "a.yaml")])
def test_a_command_that_is_used_wrongly_says_so_in_one_line(enat: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    process = enat(*arguments)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("enat: ") and process.stderr.count("\n") == 1 and "--help" in process.stderr


# Importing weights, and looking at artifacts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What `enat import ... --json` answered, and the store that it wrote to."""

    answer: dict[str, Any]
    store: Path

    @property
    def manifest(self) -> Manifest:
        manifest = open_store(str(self.store)).read_manifest(self.answer["stage"], self.answer["key"])
        assert manifest is not None
        return manifest

    @property
    def file(self) -> Path:
        return open_store(str(self.store)).fetch(self.manifest, self.manifest.files[0].name)


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Path]:
    """One tokenizer in each kind of file, by suffix; "own" as enat itself writes it."""
    published = torch.load(folder / "right.pth", weights_only=True)
    torch.save({"state_dict": published, "epoch": torch.tensor(3)}, folder / "right.ckpt")
    save_file(published, folder / "right.safetensors")
    vqgan = VQGAN(VQGANConfig.preset("vqgan-small"))
    vqgan.load_state_dict({name.replace("quantize.embedding.", "codebook."): value for name, value in published.items()})
    save_weights(folder / "own.safetensors", vqgan)
    files = {suffix: folder / f"right.{suffix}" for suffix in ("pth", "ckpt", "safetensors")}
    return {**files, "own": folder / "own.safetensors"}


@pytest.fixture(scope="module")
def import_vqgan(ask: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[object], Imported]:
    store = tmp_path_factory.mktemp("imported") / "store"

    def run(path: object) -> Imported:
        process = ask("import", "vqgan", path, "--preset", "vqgan-small", "--store", store, "--json")
        assert process.returncode == 0, process.stderr
        return Imported(json.loads(process.stdout), store)

    return run


@pytest.mark.parametrize(
    "kind", ["ckpt", "own", *(pytest.param(kind, marks=pytest.mark.faults) for kind in ("pth", "safetensors"))]
)
def test_a_tokenizer_is_imported_from_each_kind_of_file(import_vqgan, weights: dict[str, Path], kind: str) -> None:
    imported = import_vqgan(weights[kind])
    expected = torch.load(weights["pth"], weights_only=True)
    vqgan = load_vqgan(imported.file)
    assert vqgan.config == VQGANConfig.preset("vqgan-small") and imported.manifest.summary["is_imported"]
    for name, tensor in vqgan.state_dict().items():
        assert torch.equal(tensor, expected[name.replace("codebook.", "quantize.embedding.")])
    assert imported.answer["weights"] == f"sha256:{file_digest(weights[kind])}" and imported.answer["stage"] == "tokenizer"
    assert imported.answer["place"] == f"{imported.store}/tokenizer/{imported.answer['key']}"
    assert not imported.answer["reused"]


@pytest.mark.faults
def test_what_was_imported_before_is_reused(import_vqgan, weights: dict[str, Path]) -> None:
    first, second = (import_vqgan(weights["pth"]).answer for _ in range(2))
    assert second == {**first, "reused": True}


def test_a_config_finds_what_was_imported_by_its_digest_alone(
    ask: Callable[..., Any], import_vqgan, weights: dict[str, Path]
) -> None:
    """The file itself may be gone."""
    imported = import_vqgan(weights["pth"])
    values = ["tokenizer.preset=vqgan-small", f"tokenizer.weights={imported.answer['weights']}", "targets=[tokenizer]"]
    process = ask("plan", DIGITS, f"store={imported.store}", *values, "--json")
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout)["stages"] == [
        {"stage": "tokenizer", "key": imported.answer["key"], "reused": True, "parts_done": 0}
    ]


@pytest.mark.faults
def test_the_lines_that_an_import_prints_are_those_of_a_config(
    ask: Callable[..., Any], import_vqgan, weights: dict[str, Path], tmp_path: Path
) -> None:
    imported = import_vqgan(weights["pth"])
    process = ask("import", "vqgan", weights["pth"], "--preset", "vqgan-small", "--store", imported.store)
    assert process.returncode == 0 and imported.answer["place"] in process.stdout
    lines = process.stdout.partition("in a config:\n")[2]
    path = tmp_path / "config.yaml"
    path.write_text(f"name: any\ntargets: [tokenizer]\n{lines}")
    (node,) = graph.build(run_config.load_run(path))
    assert driver.stage_key(node, {}) == imported.answer["key"]
    assert OmegaConf.load(path).tokenizer.weights == imported.answer["weights"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{folder}/other.pth",), "wrong shape: quantize.embedding.weight is (64, 16), expected (128, 16)"),
        (("{folder}/right.pth", "codebook_size=64"), "wrong shape: quantize.embedding.weight is (128, 16), expected (64, 16)"),
        (("{folder}/right.pth", "codebook_sise=64"), "unknown key tokenizer.codebook_sise; did you mean tokenizer.codebook_size?"),
        (("{folder}/code.pth",), "{folder}/code.pth is not opened: it is not a torch file, or contains more than tensors"),
        (("{folder}/inside.ckpt",), "{folder}/inside.ckpt is not opened: it is not a torch file, or contains more than tensors"),
        (("{folder}/code.safetensors",), "{folder}/code.safetensors is not a readable file of weights"),
        (("{folder}/enat.safetensors",), "{folder}/enat.safetensors holds enat, not the weights of vqgan"),
        (("{folder}/nowhere.pth",), "tokenizer.weights: {folder}/nowhere.pth is not a file"),
        ((f"sha256:{'ab' * 32}",), "but the store has no artifact made from it; import the file first: enat import --help"),
        (("{folder}/right.pth", "--preset", "vqgan-big"), "no VQGAN preset is called 'vqgan-big'"),
    ],
)
def test_weights_that_cannot_be_imported_are_refused_in_one_line(
    ask: Callable[..., Any], folder: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    given = [argument.format(folder=folder) for argument in arguments]
    process = ask("import", "vqgan", "--preset", "vqgan-small", *given, "--store", tmp_path / "store")
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith("enat: ") and sentence.format(folder=folder) in process.stderr
    assert not (folder / "executed").exists(), "nothing that a file brings is run"
    assert not any(open_store(str(tmp_path / "store")).manifests())


def test_a_generator_is_imported_with_the_tokenizer_that_it_was_made_for(
    ask: Callable[..., Any], import_vqgan, weights: dict[str, Path], folder: Path
) -> None:
    """From a state dict of the published layout, as big as a test can have it."""
    imported = import_vqgan(weights["pth"])
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = ENAT(ENATConfig(**sizes, grid_size=4, codebook_size=128))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    published = _published_enat(model)
    torch.save(published, folder / "generator.pth")
    arguments = ["--preset", "enat-s", "--vqgan", imported.answer["weights"], "--vqgan-preset", "vqgan-small"]
    fields = [f"{name}={value}" for name, value in sizes.items()]
    process = ask("import", "enat", folder / "generator.pth", *arguments, *fields, "--store", imported.store, "--json")
    assert process.returncode == 0, process.stderr
    generator = Imported(json.loads(process.stdout), imported.store)
    assert generator.answer["stage"] == "train" and generator.manifest.inputs["tokenizer"]["key"] == imported.answer["key"]
    loaded = load_enat(generator.file)
    assert loaded.config == model.config and generator.manifest.summary["is_imported"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    wrong = ask("import", "enat", folder / "generator.pth", *arguments, *fields[:-1], "--store", imported.store)
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("enat: the published ENAT does not fit")
    assert "wrong shape: y_embedder.embedding_table.weight is (6, 32), expected (1001, 32)" in wrong.stderr


def _published_enat(model: ENAT) -> dict[str, torch.Tensor]:
    """A state dict of ours under the names of the published ones, with the embedder that they have and never use."""
    from enat import checkpoint

    own = model.state_dict()
    state = {checkpoint._published_enat_name(name, model.config): tensor.clone() for name, tensor in own.items()}
    state["mlm_layer.bias"] = state["mlm_layer.bias"][None, None]
    width = model.config.embed_dim
    for name, (rows, columns) in {"fc1": (4 * width, width), "fc2": (width, 4 * width)}.items():
        state |= {f"prev_embedder.{name}.weight": torch.zeros(rows, columns), f"prev_embedder.{name}.bias": torch.zeros(rows)}
    return state


def test_an_artifact_is_shown_by_the_beginning_of_its_key(ask: Callable[..., Any], import_vqgan, weights: dict[str, Path]) -> None:
    imported = import_vqgan(weights["pth"])
    key = imported.answer["key"]
    process = ask("artifacts", "show", f"tokenizer/{key[:16]}", "--store", imported.store, "--json")
    assert (process.returncode, process.stderr) == (0, "")
    assert Manifest.from_json(process.stdout.encode()) == imported.manifest
    for_people = ask("artifacts", "show", key[:16], "--store", imported.store)
    assert for_people.returncode == 0 and key in "".join(for_people.stdout.split()) and "vqgan.safetensors" in for_people.stdout
    wrong = ask("artifacts", "show", "xyz", "--store", imported.store)
    said = f"enat: the store {imported.store} has no artifact whose key begins with xyz; it has artifacts of "
    assert wrong.returncode == 2 and wrong.stderr.startswith(said) and wrong.stderr.endswith(" (enat artifacts ls)\n")
    refused = ask("artifacts", "show", key[:16], "--store", imported.store, "--contact-sheet", imported.store / "sheet.png")
    assert refused.returncode == 2 and "a contact sheet shows a token map" in refused.stderr


def test_a_contact_sheet_of_a_run_s_token_map_is_written(digits_run, ask: Callable[..., Any], tmp_path: Path) -> None:
    key = digits_run.planned()["token_map"].key
    store, sheet = digits_run.workspace / "store", tmp_path / "sheet.png"
    process = ask("artifacts", "show", key[:12], "--store", store, "--contact-sheet", sheet, "--images", "20")
    assert (process.returncode, process.stderr) == (0, "")
    assert f"contact sheet {sheet}" in process.stdout and "perplexity" in process.stdout
    with Image.open(sheet) as picture:
        assert picture.size == (16 * 98 + 2, 3 * 98 + 2)


@pytest.mark.parametrize(("words", "offered"), [("enat art", {"artifacts"}), ("enat jobs ", {"ls", "logs", "stop"})])
def test_the_shell_completes_commands(words: str, offered: set[str]) -> None:
    """What README's line of completion asks the program at every press of the key."""
    asked = {"_ENAT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [Path(sys.executable).parent / "enat"], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=True
    )
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} >= offered
