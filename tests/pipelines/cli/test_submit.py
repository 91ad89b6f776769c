"""`enat submit`, `enat jobs` and `enat plan --address` on a real Ray head with its Jobs API and token, with a short job."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.ray_nodes import TOKEN, RayNodes, ray_nodes

pytestmark = pytest.mark.faults  # two nodes with a dashboard take half a minute to start; test_jobs.py needs none

REPOSITORY = Path(__file__).parents[3]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
SECRETS = {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-of-the-cluster", "MLFLOW_TRACKING_PASSWORD": "hunter2-of-the-cluster"}

# The command line in one process: ray and torch are imported once. The token is read once a process, so others need their own.
_COMMANDS = """
import contextlib, io, json, sys
from pipelines.cli import main as cli
answers = sys.stdout
for line in sys.stdin:
    sys.argv = ["enat", *json.loads(line)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code in (0, 1, 2), self.err
        return json.loads(self.out)


class Shell:
    """Commands one after another."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object) -> Answer:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        return Answer(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(2, loopback_only=True, **SECRETS) as started:
        yield started


@pytest.fixture(scope="module")
def make_shell(nodes: RayNodes) -> Iterator[Callable[..., Shell]]:
    made: list[Shell] = []

    def make(**replaced: str | None) -> Shell:
        values = {**nodes.environment, **replaced}
        made.append(Shell({name: value for name, value in values.items() if value is not None}))
        return made[-1]

    yield make
    for shell in made:
        shell.close()


@pytest.fixture(scope="module")
def enat_shell(make_shell: Callable[..., Shell]) -> Shell:
    return make_shell(RAY_ADDRESS="http://127.0.0.1:1")  # Ray itself would use it instead of --address


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shared")
    return (f"store={folder}/store", f"workspace={folder}/runs", "tracking.enabled=false")


@pytest.fixture(scope="module")
def twice(nodes: RayNodes, enat_shell: Shell, make_shell: Callable[..., Shell], places: tuple[str, ...]) -> list[Answer]:
    """The same submission by two processes at the same time."""
    command = ("submit", DIGITS, "targets=[dataset]", *places, "--address", nodes.url, "--json")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda shell: shell(*command), (enat_shell, make_shell())))


@pytest.fixture(scope="module")
def followed(nodes: RayNodes, enat_shell: Shell, twice: list[Answer]) -> Answer:
    """Follow the log of that job to its end."""
    return enat_shell("jobs", "logs", twice[0].json["id"], "--follow", "--address", nodes.url)


@pytest.fixture(scope="module")
def failed(nodes: RayNodes, enat_shell: Shell, places: tuple[str, ...], followed: Answer) -> list[Answer]:
    """A job that fails, followed to its end; submitted again and stopped at once; stopped a second time."""
    bad = ("submit", DIGITS, "targets=[dataset]", "dataset.kind=image_folder", "dataset.path=/nowhere", *places)
    first = enat_shell(*bad, "--follow", "--json", "--address", nodes.url)
    second = enat_shell(*bad, "--json", "--address", nodes.url)
    stop = ("jobs", "stop", second.json["id"], "--json", "--address", nodes.url)
    return [first, second, enat_shell(*stop), enat_shell(*stop)]


def test_simultaneous_equal_submissions_are_one_job(twice: list[Answer]) -> None:
    first, second = (answer.json for answer in twice)
    assert first["id"] == second["id"] and {first["attempt"], second["attempt"]} == {1}
    assert sorted([first["outcome"], second["outcome"]]) == ["active", "submitted"]


def test_followed_log_ends_with_the_exit_code_of_the_job(followed: Answer, twice: list[Answer], places) -> None:
    assert followed.code == 0, followed.err
    assert "✓ dataset" in followed.out and "1,797 images" in followed.out
    assert followed.out.endswith(f"{twice[0].json['id']} succeeded\n")
    assert len([*Path(places[0].removeprefix("store=")).glob("dataset/*/manifest.json")]) == 1


def test_a_succeeded_run_is_repeated_only_with_again(
    nodes: RayNodes, enat_shell: Shell, followed: Answer, twice: list[Answer], places
) -> None:
    command = ("submit", DIGITS, "targets=[dataset]", *places, "--address", nodes.url)
    refused = enat_shell(*command)
    assert refused.code == 0 and "nothing was started" in refused.out and "--again" in refused.out
    again = enat_shell(*command, "--again", "--json")
    assert (again.json["id"], again.json["outcome"]) == (f"{twice[0].json['id']}-2", "submitted")
    enat_shell("jobs", "stop", again.json["id"], "--address", nodes.url)


def test_a_failed_job_gives_the_command_its_exit_code_and_reason(failed: list[Answer]) -> None:
    first = failed[0]
    assert first.code == 2, "the exit code of the driver for bad input"
    assert first.json["status"] == "FAILED" and first.json["reason"].startswith("enat: ") and "/nowhere" in first.json["reason"]
    assert first.json["reason"] in first.err, "the log is on stderr and the JSON on stdout"


def test_a_job_without_a_tracking_server_fails(nodes: RayNodes, enat_shell: Shell, places: tuple[str, ...]) -> None:
    """Its workspace is in the folder of the job, which Ray removes."""
    refused = enat_shell("submit", DIGITS, "targets=[dataset]", places[0], "--follow", "--json", "--address", nodes.url)
    assert refused.code == 2 and refused.json["status"] == "FAILED"
    assert "would be tracked under runs, in a folder that is removed with the job; give tracking.uri=" in refused.json["reason"]


def test_a_failed_run_continues_as_another_attempt(failed: list[Answer]) -> None:
    first, second = failed[0].json, failed[1].json
    assert (second["id"], second["attempt"], second["run"]) == (f"{first['id']}-2", 2, first["run"])


def test_stop_waits_for_the_end_and_can_be_repeated(failed: list[Answer]) -> None:
    stopped, repeated = failed[2], failed[3]
    assert (stopped.code, stopped.json["stopped"]) == (0, True) and stopped.json["status"] in ("STOPPED", "FAILED")
    assert (repeated.code, repeated.json["stopped"], repeated.json["status"]) == (0, False, stopped.json["status"])


def test_jobs_are_listed_newest_first(nodes: RayNodes, enat_shell: Shell, failed: list[Answer], twice: list[Answer]) -> None:
    listed = enat_shell("jobs", "ls", "--json", "--address", nodes.url).json["jobs"]
    ids = [job["id"] for job in listed]
    expected = [failed[1].json["id"], failed[0].json["id"], twice[0].json["id"]]
    assert [id for id in ids if id in expected] == expected
    assert [job["started"] for job in listed] == sorted((job["started"] for job in listed), reverse=True)
    table = enat_shell("jobs", "ls", "--address", nodes.url).out.splitlines()
    assert table[0].split()[:2] == ["id", "status"] and [line.split()[0] for line in table[1:]] == ids
    (row,) = (line for line in table if line.split()[0] == failed[0].json["id"])
    assert "failed" in row and "/nowhere" in row and getpass.getuser() in row and " digits.yaml " in row and "enat: " not in row


def test_an_active_job_is_listed_with_its_stage_and_progress(nodes: RayNodes, enat_shell: Shell, tmp_path: Path) -> None:
    """Its tokenizer would take hours. Stopped, it is listed without a stage."""
    places = (f"store={tmp_path}/store", f"workspace={tmp_path}/runs", "tracking.enabled=false")
    slow = ("targets=[tokenizer]", "tokenizer.recipe.num_steps=1000000")
    job = enat_shell("submit", DIGITS, *slow, *places, "--json", "--address", nodes.url).json
    listing, deadline = ("jobs", "ls", "--address", nodes.url), time.monotonic() + 200
    while not re.search(r" tokenizer [\d,]+ of 1,000,000 steps", shown := enat_shell(*listing).out):
        assert time.monotonic() < deadline, shown
        time.sleep(1)
    (listed,) = (each for each in enat_shell(*listing, "--json").json["jobs"] if each["id"] == job["id"])
    (stage,) = listed["stages"]
    assert (stage["stage"], stage["total"], stage["unit"]) == ("tokenizer", 1_000_000, "steps")
    assert (listed["user"], listed["config"]) == (getpass.getuser(), str(DIGITS))
    enat_shell("jobs", "stop", job["id"], "--address", nodes.url)
    (listed,) = (each for each in enat_shell(*listing, "--json").json["jobs"] if each["id"] == job["id"])
    assert listed["stages"] == []


def test_jobs_and_logs_contain_no_credentials(nodes: RayNodes, enat_shell: Shell, failed: list[Answer]) -> None:
    """Neither the token nor the variables of the cluster, which jobs inherit."""
    texts = [enat_shell("jobs", "ls", "--json", "--address", nodes.url).out]
    texts += [enat_shell("jobs", "logs", job["id"], "--address", nodes.url).out for job in json.loads(texts[0])["jobs"]]
    script = "import sys, ray.job_submission as j; print([job.json() for job in j.JobSubmissionClient(sys.argv[1]).list_jobs()])"
    raw = subprocess.run(
        [sys.executable, "-c", script, nodes.url], env=nodes.environment, capture_output=True, text=True, check=True
    )
    assert "enat.commit" in raw.stdout and "runtime_env" in raw.stdout
    for secret in (TOKEN, *SECRETS.values()):
        assert not [text for text in (*texts, raw.stdout) if secret in text]


def test_a_run_that_does_not_fit_is_refused_before_it_starts(nodes: RayNodes, enat_shell: Shell, places) -> None:
    command = ("submit", DIGITS, *places, "tokenizer.execution.gpus_per_worker=1", "generate.execution.num_workers=8")
    refused = enat_shell(*command, "--address", nodes.url)
    errors = [line for line in refused.err.splitlines() if "are not sent" not in line]
    assert refused.code == 2 and len(errors) == 1
    assert "tokenizer.execution asks for 1 GPUs (1 workers), but the cluster has 0; lower num_workers" in refused.err
    assert "(2 CPUs and 0 GPUs on 1 node)" in refused.err


def test_plan_states_whether_each_stage_fits(nodes: RayNodes, enat_shell: Shell, places) -> None:
    command = ("plan", DIGITS, *places, "generate.execution.num_workers=8", "--address", nodes.url)
    answer = enat_shell(*command, "--json").json
    needs = {stage["stage"]: stage["needs"] for stage in answer["stages"]}
    assert needs["dataset"] is None and needs["report"] is None and needs["train@untrained"] is None
    assert needs["train"]["fits"] and needs["train"]["room_now"] == 2
    assert not needs["generate"]["fits"] and answer["fits"] is False
    assert [node["CPU"] for node in answer["cluster"]["nodes"]] == [2.0]
    table = enat_shell(*command).out
    assert "the cluster now has 2 CPUs and 0 GPUs on 1 node" in table and "8 x 1 CPU" in table and "too little" in table


def test_wrong_and_missing_tokens_are_refused(nodes: RayNodes, make_shell: Callable[..., Shell], tmp_path: Path) -> None:
    refused = make_shell(RAY_AUTH_TOKEN="another-token-" + "1" * 20)("jobs", "ls", "--address", nodes.url)
    assert refused.code == 2
    advice = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own"
    assert refused.err == f"enat: the cluster at {nodes.url} refuses the token (403); {advice}\n"
    (tmp_path / "token").write_text(TOKEN)
    for variables, error in (
        ({"HOME": str(tmp_path)}, f"no token for the cluster at {nodes.url} (401)"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")}, "RAY_AUTH_TOKEN_PATH is not a readable file"),
        ({"RAY_AUTH_MODE": "disabled"}, "(401)"),
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, None),
    ):
        answer = make_shell(RAY_AUTH_TOKEN=None, **variables)("jobs", "ls", "--address", nodes.url)
        assert answer.code == (0 if error is None else 2) and (error or "") in answer.err
