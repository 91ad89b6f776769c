"""The command line: its output, errors and exit codes. Bad input leaves nothing behind."""

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
from click.testing import CliRunner
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from enat.checkpoint import load_enat, load_vqgan, save_weights
from enat.config import ENATConfig
from enat.model import ENAT
from enat.tokenizer import VQGAN, VQGANConfig
from pipelines.artifacts.manifest import Manifest
from pipelines.artifacts.open import open_store
from pipelines.cli.main import commands
from pipelines.run import graph
from pipelines.run.loading import load_run
from pipelines.storage.base import file_digest
from pipelines.workflow import driver

REPOSITORY = Path(__file__).parents[3]
DIGITS = REPOSITORY / "configs" / "digits.yaml"


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@dataclass(frozen=True)
class Case:
    """A command that fails. error: part of its only line; {folder} is the folder of the test."""

    name: str
    error: str
    overrides: tuple[str, ...] = ()
    command: str = "run"
    config: str = str(DIGITS)
    code: int = 2


def _weights(name: str, file: str, error: str) -> Case:
    return Case(f"weights {name}", error, (f"tokenizer.weights={{folder}}/{file}",))


_NOWHERE = "{folder}/nowhere"
CASES = [
    Case("unknown key", "unknown key train.num_stepz; did you mean train.num_steps?", ("train.num_stepz=3",)),
    Case("wrong type", "train.num_steps: Value 'many' of type 'str' could not be converted to Integer", ("train.num_steps=many",)),
    Case(
        "resolution", "tokenizer.resolution is 18; it must be a multiple of the downsampling factor 4", ("tokenizer.resolution=18",)
    ),
    Case("grid", "train.model.grid_size is 16, but the token map of digits (16 px) has 4", ("train.model.grid_size=16",)),
    Case("codebook", "train.model.codebook_size is 1024, but the token map of digits", ("train.model.codebook_size=1024",)),
    Case("no dataset", f"dataset.path: {_NOWHERE} is not a directory", ("dataset.kind=image_folder", f"dataset.path={_NOWHERE}")),
    Case("no config", f"the config file {_NOWHERE}.yaml does not exist", config=f"{_NOWHERE}.yaml"),
    Case("no config to plan", f"the config file {_NOWHERE}.yaml does not exist", config=f"{_NOWHERE}.yaml", command="plan"),
    Case("mistyped config", "digit.yaml does not exist; did you mean {folder}/digits.yaml?", config="{folder}/digit.yaml"),
    Case("directory", "{folder}/blocked cannot be read (Is a directory); name a readable YAML file", config="{folder}/blocked"),
    Case("seed", "seed is -1; it must be at least 0 and below 2**63", ("seed=-1",), command="plan"),
    Case("seed of a stage", "train.seed is -1; it must be at least 0", ("train.seed=-1",)),
    Case("no CPUs", "cluster.num_cpus is 0; it must be at least 1", ("cluster.num_cpus=0",)),
    Case("store below a file", "the store {folder}/file/store cannot be written", ("store={folder}/file/store",)),
    Case("workspace below a file", "{folder}/file", ("workspace={folder}/file/runs", "store={folder}/elsewhere")),
    _weights("nowhere", "nowhere.pth", f"tokenizer.weights: {_NOWHERE}.pth is not a file"),
    _weights("of an ENAT", "enat.safetensors", "enat.safetensors holds enat, not the weights of vqgan"),
    _weights("of another size", "other.pth", "wrong shape: quantize.embedding.weight is (64, 16)"),
    _weights("as a pickle", "code.pth", "{folder}/code.pth is not opened"),
    _weights("with a pickle inside", "inside.ckpt", "{folder}/inside.ckpt is not opened"),
    _weights("called safe", "code.safetensors", "{folder}/code.safetensors is not a readable file"),
    Case(
        "error in a stage",
        "stage tokenizer failed: NotADirectoryError",
        ("tokenizer.weights={folder}/right.pth", "store={folder}/blocked"),
        code=1,
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files of weights, and files in place of folders."""
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


# Importing takes three seconds and longer, so one process imports once, and every command is run by a fork of it. What it has
# loaded is not loaded again by each of them.
_SERVER = """
import json, os, sys
from pipelines.cli import main as cli
from pipelines.cluster import connection
connection.prepare_environment()
import mlflow, ray, torch
from pathlib import Path
import enat.checkpoint, enat.model, enat.tokenizer
import pipelines.jobs.client, pipelines.jobs.submission, pipelines.run.prediction, pipelines.run.runner, pipelines.tracking.search
from pipelines.cli import sharing, run
pipelines.run.loading.load_run(Path("configs/digits.yaml"))
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
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    ) as server:
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
def test_errors_are_one_line_with_an_exit_code_and_leave_no_artifact(answers: dict[str, Any], folder: Path, case: Case) -> None:
    _assert_error(case, folder, answers[case.name])
    workspace = folder / "runs" / case.name
    if "weights" in case.name or case.code == 1:  # these are read when their stage runs
        assert not list(workspace.glob("store/*/*/[!.]*"))
    else:
        assert not workspace.exists()
    assert (folder / "file").read_text() == (folder / "blocked" / "tokenizer").read_text() == "in the way"
    assert [path for path in (folder / "blocked").iterdir() if path.name != ".logs"] == [folder / "blocked" / "tokenizer"]


@pytest.mark.slow
def test_errors_of_a_new_process_are_the_same(enat: Callable[..., Any], folder: Path) -> None:
    case = CASES[-1]
    _assert_error(case, folder, enat(*_arguments(case, folder)))


def _assert_error(case: Case, folder: Path, answer: subprocess.CompletedProcess[str]) -> None:
    assert answer.returncode == case.code, answer.stderr
    assert answer.stdout == ""
    assert answer.stderr.startswith("enat: ") and answer.stderr.count("\n") == 1 and answer.stderr.endswith("\n")
    assert case.error.format(folder=folder) in answer.stderr


def test_code_in_files_of_weights_is_never_executed(answers: dict[str, Any], folder: Path) -> None:
    assert answers and not (folder / "executed").exists()
    pickle.loads((folder / "code.pth").read_bytes())
    assert (folder / "executed").exists(), "the test would notice it"
    (folder / "executed").unlink()


def test_error_names_the_log_with_the_traceback(answers: dict[str, Any]) -> None:
    line = answers["error in a stage"].stderr
    log = Path(line.partition("(traceback in ")[2].rstrip(")\n"))
    assert "Traceback" in log.read_text() and "NotADirectoryError" in log.read_text()


def test_messages_about_missing_files_give_advice() -> None:
    """A message continues after its fact: "X is not a directory; fix the path"."""
    facts = r"is not a file|is not a directory|does not exist|no such (?:file|revision|repository)|holds no state dict"
    bare = {
        f"{path.name}: {match[0]}"
        for path in (REPOSITORY / "pipelines").rglob("*.py")
        for match in re.finditer(rf'(?:Error\(|[:=] )f?"[^"\n]*(?:{facts})"\)?', path.read_text())
    }
    assert not bare


# Commands ------------------------------------------------------------------------------------------------------------------


def test_plan_as_json(ask: Callable[..., Any], tmp_path: Path) -> None:
    process = ask("plan", DIGITS, f"workspace={tmp_path / 'runs'}", "--json")
    assert (process.returncode, process.stderr) == (0, "")
    answer = json.loads(process.stdout)
    assert answer["store"] == str(tmp_path / "runs" / "store")
    rows = {row["stage"]: row for row in answer["stages"]}
    assert set(rows["train"]) == {"stage", "key", "reused", "parts_done", "predicted"}
    assert rows["train"]["predicted"]["seconds"]["low"] < rows["train"]["predicted"]["seconds"]["value"]
    assert rows["train"]["predicted"]["artifacts_measured"] == 0 and answer["predicted"]["is_complete"]
    assert answer["predicted"]["machines"].startswith("this machine")
    assert len(rows["dataset"]["key"]) == 64 and rows["tokenizer"]["key"] is None and rows["token_map"]["key"] is None
    assert not any(row["reused"] or row["parts_done"] for row in answer["stages"])
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"


def test_plan_as_a_table(digits_run, ask: Callable[..., Any]) -> None:
    process = ask("plan", DIGITS, f"workspace={digits_run.workspace}", *digits_run.overrides, "train.seed=1")
    assert (process.returncode, process.stderr) == (0, "")
    lines = {line.split()[0]: line for line in process.stdout.splitlines() if line[:1].strip()}  # without continued lines
    assert all("reuse" in lines[stage] for stage in ("dataset", "tokenizer", "token_map", "reference"))
    assert "compute" in lines["train"] and "after train" in lines["generate"] and "compute" in lines["generate"]
    assert "5 of 14 stages are reused" in process.stdout


def test_plan_predicts_from_what_was_measured_here(digits_run, ask: Callable[..., Any]) -> None:
    process = ask("plan", DIGITS, f"workspace={digits_run.workspace}", *digits_run.overrides, "train.seed=1", "--json")
    rows = {row["stage"]: row["predicted"] for row in json.loads(process.stdout)["stages"]}
    assert rows["tokenizer"] is None, "it is reused"
    assert rows["train"]["artifacts_measured"] >= 1 and rows["generate"]["artifacts_measured"] >= 1
    made = {id: item.manifest for id, item in digits_run.planned().items()}
    assert made["train"].provenance["work"][0]["name"] == "training" and made["train"].provenance["work"][0]["count"] > 0


def test_plan_of_a_cluster_and_a_dataset_that_are_not_here(ask: Callable[..., Any]) -> None:
    config = DIGITS.with_name("imagenet256.yaml")
    process = ask("plan", config, "prices={device_hour: 2.5}", "--images", "1281167", "--cluster", "8x8xH200", "--json")
    assert (process.returncode, process.stderr) == (0, "")
    predicted = json.loads(process.stdout)["predicted"]
    assert predicted["is_complete"] and predicted["machines"] == "8 nodes with 8 x H200 and 96 CPUs"
    assert predicted["money"]["value"] == pytest.approx(2.5 * predicted["device_hours"]["value"])
    assert "train" in predicted["critical_path"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "8xH200"), "'8xH200' does not describe a cluster; write NODESxGPUSxNAME"),
        (("--cluster", "1x8xH200", "--address", "auto"), "give --address or --cluster, not both"),
        (("--classes", "10"), "--classes and --captions describe the images of --images"),
    ],
)
def test_plan_refuses_what_it_cannot_use(arguments: tuple[str, ...], message: str, ask: Callable[..., Any]) -> None:
    process = ask("plan", DIGITS, *arguments)
    assert process.returncode == 2 and message in process.stderr


def test_help_and_wrong_usage(ask: Callable[..., Any]) -> None:
    for command, words in (
        ((), ("artifacts", "import", "plan", "run")),
        (("plan",), ("KEY=VALUE",)),
        (("run",), ("KEY=VALUE",)),
        (("import", "vqgan"), ("FIELD=VALUE",)),
        (("import", "enat"), ("--vqgan",)),
        (("artifacts", "show"), ("--contact-sheet",)),
    ):
        process = ask(*command, "--help")
        assert (process.returncode, process.stderr) == (0, "") and all(word in process.stdout for word in words), command
    for arguments in (("run",), ("run", "a.yaml", "--jsn"), ("rnu", "a.yaml")):
        process = ask(*arguments)
        assert process.returncode == 2 and process.stdout == ""
        assert process.stderr.startswith("enat: ") and process.stderr.count("\n") == 1 and "--help" in process.stderr


@pytest.mark.parametrize("group", [(), ("artifacts",), ("jobs",), ("import",)])
def test_help_has_whole_sentences_for_each_command(group: tuple[str, ...]) -> None:
    text = CliRunner().invoke(commands, [*group, "--help"], terminal_width=80).output
    listed = text.partition("Commands:\n")[2]
    entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=  \S)", listed) if entry.strip()]
    assert len(entries) > 1 and all(re.fullmatch(r"\S+ [A-Z].*[^.]\.", entry) for entry in entries), listed
    assert max(map(len, text.splitlines())) <= 80


def test_shell_completes_commands_and_stages() -> None:
    """As the line of the README asks the program."""
    for words, offered in (
        ("enat art", {"artifacts"}),
        ("enat jobs ", {"ls", "logs", "stop"}),
        ("enat artifacts ls --stage t", {"train", "token_map", "tokenizer"}),
    ):
        variables = {"_ENAT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        command = [Path(sys.executable).parent / "enat"]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=True)
        assert {line.partition(",")[2] for line in done.stdout.splitlines()} == offered


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
def test_tokenizer_is_imported_from_each_kind_of_file(import_vqgan, weights: dict[str, Path], kind: str) -> None:
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
def test_an_earlier_import_is_reused(import_vqgan, weights: dict[str, Path]) -> None:
    first, second = (import_vqgan(weights["pth"]).answer for _ in range(2))
    assert second == {**first, "reused": True}


def test_a_config_names_imported_weights_by_their_digest(ask: Callable[..., Any], import_vqgan, weights: dict[str, Path]) -> None:
    """The file itself may no longer exist."""
    imported = import_vqgan(weights["pth"])
    values = ["tokenizer.preset=vqgan-small", f"tokenizer.weights={imported.answer['weights']}", "targets=[tokenizer]"]
    process = ask("plan", DIGITS, f"store={imported.store}", *values, "--json")
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout)["stages"] == [
        {"stage": "tokenizer", "key": imported.answer["key"], "reused": True, "parts_done": 0, "predicted": None}
    ]


@pytest.mark.faults
def test_import_prints_lines_for_a_config(ask: Callable[..., Any], import_vqgan, weights: dict[str, Path], tmp_path: Path) -> None:
    imported = import_vqgan(weights["pth"])
    process = ask("import", "vqgan", weights["pth"], "--preset", "vqgan-small", "--store", imported.store)
    assert process.returncode == 0 and imported.answer["place"] in process.stdout
    lines = process.stdout.partition("in a config:\n")[2]
    path = tmp_path / "config.yaml"
    path.write_text(f"name: any\ntargets: [tokenizer]\n{lines}")
    (node,) = graph.build(load_run(path))
    assert driver.stage_key(node, {}) == imported.answer["key"]
    assert OmegaConf.load(path).tokenizer.weights == imported.answer["weights"]


@pytest.mark.slow
def test_wrong_weights_are_not_imported(ask: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    opened = "is not opened: it is not a torch file, or contains more than tensors"
    shape = "wrong shape: quantize.embedding.weight is"
    for arguments, error in (
        (("other.pth",), f"{shape} (64, 16), expected (128, 16)"),
        (("right.pth", "codebook_size=64"), f"{shape} (128, 16), expected (64, 16)"),
        (("right.pth", "codebook_sise=64"), "unknown key tokenizer.codebook_sise; did you mean tokenizer.codebook_size?"),
        (("code.pth",), f"{folder}/code.pth {opened}"),
        (("inside.ckpt",), f"{folder}/inside.ckpt {opened}"),
        (("code.safetensors",), f"{folder}/code.safetensors is not a readable file of weights"),
        (("enat.safetensors",), f"{folder}/enat.safetensors holds enat, not the weights of vqgan"),
        (("nowhere.pth",), f"tokenizer.weights: {folder}/nowhere.pth is not a file"),
        ((f"sha256:{'ab' * 32}",), "but the store has no artifact made from it; import the file first: enat import --help"),
        (("right.pth", "--preset", "vqgan-big"), "preset is 'vqgan-big'; choose one of"),
    ):
        path = arguments[0] if ":" in arguments[0] else folder / arguments[0]
        process = ask("import", "vqgan", "--preset", "vqgan-small", path, *arguments[1:], "--store", tmp_path / "store")
        assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1, arguments
        assert process.stderr.startswith("enat: ") and error in process.stderr
    assert not (folder / "executed").exists(), "code in files is not run"
    assert not any(open_store(str(tmp_path / "store")).manifests())


@pytest.mark.slow
def test_generator_is_imported_with_its_tokenizer(
    ask: Callable[..., Any], import_vqgan, weights: dict[str, Path], folder: Path
) -> None:
    """From a small state dict of the published layout."""
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
    """Our state dict under published names, with the embedder that the published models have and never use."""
    from enat import checkpoint

    own = model.state_dict()
    state = {checkpoint._published_enat_name(name, model.config): tensor.clone() for name, tensor in own.items()}
    state["mlm_layer.bias"] = state["mlm_layer.bias"][None, None]
    width = model.config.embed_dim
    for name, (rows, columns) in {"fc1": (4 * width, width), "fc2": (width, 4 * width)}.items():
        state |= {f"prev_embedder.{name}.weight": torch.zeros(rows, columns), f"prev_embedder.{name}.bias": torch.zeros(rows)}
    return state


def test_artifact_is_shown_by_a_prefix_of_its_key(ask: Callable[..., Any], import_vqgan, weights: dict[str, Path]) -> None:
    imported = import_vqgan(weights["pth"])
    key = imported.answer["key"]
    process = ask("artifacts", "show", f"tokenizer/{key[:16]}", "--store", imported.store, "--json")
    assert (process.returncode, process.stderr) == (0, "")
    assert Manifest.from_json(process.stdout.encode()) == imported.manifest
    for_people = ask("artifacts", "show", key[:16], "--store", imported.store)
    assert for_people.returncode == 0 and key in "".join(for_people.stdout.split()) and "vqgan.safetensors" in for_people.stdout
    wrong = ask("artifacts", "show", "xyz", "--store", imported.store)
    error = f"enat: the store {imported.store} has no artifact whose key begins with xyz; it has artifacts of "
    assert wrong.returncode == 2 and wrong.stderr.startswith(error) and wrong.stderr.endswith(" (enat artifacts ls)\n")
    refused = ask("artifacts", "show", key[:16], "--store", imported.store, "--contact-sheet", imported.store / "sheet.png")
    assert refused.returncode == 2 and "a contact sheet shows a token map" in refused.stderr


def test_contact_sheet_of_a_token_map(digits_run, ask: Callable[..., Any], tmp_path: Path) -> None:
    key = digits_run.planned()["token_map"].key
    store, sheet = digits_run.workspace / "store", tmp_path / "sheet.png"
    process = ask("artifacts", "show", key[:12], "--store", store, "--contact-sheet", sheet, "--images", "20")
    assert (process.returncode, process.stderr) == (0, "")
    assert f"contact sheet {sheet}" in process.stdout and "perplexity" in process.stdout
    with Image.open(sheet) as picture:
        assert picture.size == (16 * 98 + 2, 3 * 98 + 2)
