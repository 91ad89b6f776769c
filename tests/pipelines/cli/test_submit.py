"""`enat submit`, `enat jobs` and `enat plan --address` against a real head with its Jobs API and token, by a job that makes the
index of the digits and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import TOKEN, RayNodes, ray_nodes

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
    return make_shell(RAY_ADDRESS="http://127.0.0.1:1")  # which would win over --address, were it left to Ray


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shared")
    return (f"store={folder}/store", f"workspace={folder}/runs", "tracking.enabled=false")


@pytest.fixture(scope="module")
def twice(nodes: RayNodes, enat_shell: Shell, make_shell: Callable[..., Shell], places: tuple[str, ...]) -> list[Answer]:
    """Enter, pressed twice: the same submission by two processes at the same time."""
    command = ("submit", DIGITS, "targets=[dataset]", *places, "--address", nodes.url, "--json")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda shell: shell(*command), (enat_shell, make_shell())))


@pytest.fixture(scope="module")
def followed(nodes: RayNodes, enat_shell: Shell, twice: list[Answer]) -> Answer:
    """The log of that job to its end."""
    return enat_shell("jobs", "logs", twice[0].json["id"], "--follow", "--address", nodes.url)


@pytest.fixture(scope="module")
def failed(nodes: RayNodes, enat_shell: Shell, places: tuple[str, ...], followed: Answer) -> list[Answer]:
    """A job that cannot succeed, followed to its end; sent again and stopped at once; stopped once more."""
    bad = ("submit", DIGITS, "targets=[dataset]", "dataset.kind=image_folder", "dataset.path=/nowhere", *places)
    first = enat_shell(*bad, "--follow", "--json", "--address", nodes.url)
    second = enat_shell(*bad, "--json", "--address", nodes.url)
    stop = ("jobs", "stop", second.json["id"], "--json", "--address", nodes.url)
    return [first, second, enat_shell(*stop), enat_shell(*stop)]


def test_the_same_submission_at_the_same_time_is_one_job(twice: list[Answer]) -> None:
    first, second = (answer.json for answer in twice)
    assert first["id"] == second["id"] and {first["attempt"], second["attempt"]} == {1}
    assert sorted([first["outcome"], second["outcome"]]) == ["active", "submitted"]


def test_the_log_is_shown_to_the_end_and_the_exit_code_is_the_job_s(followed: Answer, twice: list[Answer], places) -> None:
    assert followed.code == 0, followed.err
    assert "✓ dataset" in followed.out and "images 1,797" in followed.out
    assert followed.out.endswith(f"{twice[0].json['id']} succeeded\n")
    assert len([*Path(places[0].removeprefix("store=")).glob("dataset/*/manifest.json")]) == 1


@pytest.mark.faults
def test_what_has_succeeded_is_run_once_more_only_where_that_is_asked_for(
    nodes: RayNodes, enat_shell: Shell, followed: Answer, twice: list[Answer], places
) -> None:
    command = ("submit", DIGITS, "targets=[dataset]", *places, "--address", nodes.url)
    said = enat_shell(*command)
    assert said.code == 0 and "nothing was started" in said.out and "--again" in said.out
    again = enat_shell(*command, "--again", "--json")
    assert (again.json["id"], again.json["outcome"]) == (f"{twice[0].json['id']}-2", "submitted")
    enat_shell("jobs", "stop", again.json["id"], "--address", nodes.url)


@pytest.mark.faults
def test_a_failed_job_ends_the_command_with_its_own_exit_code_and_sentence(failed: list[Answer]) -> None:
    first = failed[0]
    assert first.code == 2, "bad input, by the driver's exit code"
    assert first.json["status"] == "FAILED" and first.json["reason"].startswith("enat: ") and "/nowhere" in first.json["reason"]
    assert first.json["reason"] in first.err, "the log went to stderr, so that the answer is JSON alone"


def test_a_job_without_a_place_to_track_its_runs_refuses(nodes: RayNodes, enat_shell: Shell, places: tuple[str, ...]) -> None:
    """Its workspace would be in the folder of the job, which Ray removes."""
    refused = enat_shell("submit", DIGITS, "targets=[dataset]", places[0], "--follow", "--json", "--address", nodes.url)
    assert refused.code == 2 and refused.json["status"] == "FAILED"
    assert "would be tracked under runs, in a folder that is removed with the job; give tracking.uri=" in refused.json["reason"]


@pytest.mark.faults
def test_a_run_that_failed_is_gone_on_with_as_a_further_attempt(failed: list[Answer]) -> None:
    first, second = failed[0].json, failed[1].json
    assert (second["id"], second["attempt"], second["run"]) == (f"{first['id']}-2", 2, first["run"])


@pytest.mark.faults
def test_stopping_waits_for_the_end_and_does_nothing_the_second_time(failed: list[Answer]) -> None:
    stopped, repeated = failed[2], failed[3]
    assert (stopped.code, stopped.json["stopped"]) == (0, True) and stopped.json["status"] in ("STOPPED", "FAILED")
    assert (repeated.code, repeated.json["stopped"], repeated.json["status"]) == (0, False, stopped.json["status"])


@pytest.mark.faults
def test_jobs_are_listed_newest_first(nodes: RayNodes, enat_shell: Shell, failed: list[Answer], twice: list[Answer]) -> None:
    listed = enat_shell("jobs", "ls", "--json", "--address", nodes.url).json["jobs"]
    ids = [job["id"] for job in listed]
    expected = [failed[1].json["id"], failed[0].json["id"], twice[0].json["id"]]
    assert [id for id in ids if id in expected] == expected
    assert [job["started"] for job in listed] == sorted((job["started"] for job in listed), reverse=True)
    table = enat_shell("jobs", "ls", "--address", nodes.url).out.splitlines()
    assert table[0].split()[:2] == ["id", "status"] and [line.split()[0] for line in table[1:]] == ids
    (row,) = (line for line in table if line.split()[0] == failed[0].json["id"])
    assert "failed" in row and "/nowhere" in row


@pytest.mark.faults
def test_no_credential_is_in_what_the_cluster_tells_of_jobs(nodes: RayNodes, enat_shell: Shell, failed: list[Answer]) -> None:
    """Of the token and of the cluster's own variables, which jobs inherit."""
    told = [enat_shell("jobs", "ls", "--json", "--address", nodes.url).out]
    told += [enat_shell("jobs", "logs", job["id"], "--address", nodes.url).out for job in json.loads(told[0])["jobs"]]
    script = "import sys, ray.job_submission as j; print([job.json() for job in j.JobSubmissionClient(sys.argv[1]).list_jobs()])"
    raw = subprocess.run(
        [sys.executable, "-c", script, nodes.url], env=nodes.environment, capture_output=True, text=True, check=True
    )
    assert "enat.commit" in raw.stdout and "runtime_env" in raw.stdout
    for secret in (TOKEN, *SECRETS.values()):
        assert not [text for text in (*told, raw.stdout) if secret in text]


def test_what_does_not_fit_is_refused_before_anything_starts(nodes: RayNodes, enat_shell: Shell, places) -> None:
    command = ("submit", DIGITS, *places, "tokenizer.execution.gpus_per_worker=1", "generate.execution.num_workers=8")
    refused = enat_shell(*command, "--address", nodes.url)
    said = [line for line in refused.err.splitlines() if "are not sent" not in line]  # of whoever is at work on this checkout
    assert refused.code == 2 and len(said) == 1
    assert "tokenizer.execution asks for 1 GPUs (1 workers), but the cluster has 0; lower num_workers" in refused.err
    assert "(2 CPUs and 0 GPUs on 1 node)" in refused.err


def test_a_plan_says_of_every_stage_whether_there_is_room_now(nodes: RayNodes, enat_shell: Shell, places) -> None:
    command = ("plan", DIGITS, *places, "generate.execution.num_workers=8", "--address", nodes.url)
    answer = enat_shell(*command, "--json").json
    needs = {stage["stage"]: stage["needs"] for stage in answer["stages"]}
    assert needs["dataset"] is None and needs["report"] is None and needs["train@untrained"] is None
    assert needs["train"]["fits"] and needs["train"]["room_now"] == 2
    assert not needs["generate"]["fits"] and answer["fits"] is False
    assert [node["CPU"] for node in answer["cluster"]["nodes"]] == [2.0]
    said = enat_shell(*command).out
    assert "the cluster has now 2 CPUs and 0 GPUs on 1 node" in said and "8 x 1 CPU" in said and "too little" in said


def test_another_token_is_refused_in_one_sentence(nodes: RayNodes, make_shell: Callable[..., Shell]) -> None:
    refused = make_shell(RAY_AUTH_TOKEN="another-token-" + "1" * 20)("jobs", "ls", "--address", nodes.url)
    assert refused.code == 2
    advice = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own"
    assert refused.err == f"enat: the cluster at {nodes.url} refuses the token (403); {advice}\n"


@pytest.mark.faults
def test_no_token_and_a_token_in_a_file(nodes: RayNodes, make_shell: Callable[..., Shell], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    none = make_shell(RAY_AUTH_TOKEN=None, HOME=str(tmp_path))("jobs", "ls", "--address", nodes.url)
    assert none.code == 2 and f"no token for the cluster at {nodes.url} (401)" in none.err
    gone = make_shell(RAY_AUTH_TOKEN=None, RAY_AUTH_TOKEN_PATH=str(tmp_path / "gone"))("jobs", "ls", "--address", nodes.url)
    assert gone.code == 2 and "RAY_AUTH_TOKEN_PATH is not a readable file" in gone.err
    unset = make_shell(RAY_AUTH_TOKEN=None, RAY_AUTH_MODE="disabled")("jobs", "ls", "--address", nodes.url)
    assert unset.code == 2 and "(401)" in unset.err
    assert (
        make_shell(RAY_AUTH_TOKEN=None, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))("jobs", "ls", "--address", nodes.url).code == 0
    )
