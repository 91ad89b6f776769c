"""From a config to a job on a cluster: what is sent, under which id, and what is refused before anything starts.

The id is a digest of the resolved config and the code (or image), so the same submission twice is one job.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.artifacts.open import open_store
from pipelines.cluster.capacity import AUTOSCALER, Capacity, ResourceRequest, judge
from pipelines.jobs import client as jobs
from pipelines.jobs.client import Cluster, Job
from pipelines.jobs.credentials import refuse_credentials, refuse_credentials_in, strings
from pipelines.run import graph
from pipelines.run.config import RunConfig
from pipelines.run.loading import load_run
from pipelines.storage.base import digest_of
from pipelines.storage.open import is_address
from pipelines.workflow import config as configuration
from pipelines.workflow import driver
from pipelines.workflow.provenance import CodePackage, describe_left_behind
from pipelines.workflow.provenance import pack as pack_code
from pipelines.workflow.stage import MAIN, PlannedStage

_DIGEST_OF_IMAGE = re.compile(r"@sha256:[0-9a-f]{64}$")
_STOP_SECONDS = 60  # for a checkpoint of training; Ray itself gives three
_NAME_LENGTH = 80
_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready to be sent to a cluster.

    run: the id that all attempts share.   arguments: of `enat run`, after the config.   package: None if an image has the code.
    config: the resolved config.   has_autoscaler: whether the cluster adds nodes on demand.
    num_jobs: stages to compute side by side; None lets the job choose.
    """

    run: str
    arguments: tuple[str, ...]
    metadata: Mapping[str, str]
    config: RunConfig
    package: CodePackage | None
    image: str | None
    config_text: str
    has_autoscaler: bool = False
    num_jobs: int | None = None

    @property
    def warning(self) -> str | None:
        """A warning to show before the job is sent, if any."""
        if self.package is not None:
            return describe_left_behind(self.package.left_behind) if self.package.left_behind else None
        if _DIGEST_OF_IMAGE.search(self.image or ""):
            return None
        return (
            f"the image {self.image} is named by a tag, and other code that is pushed under it would count as the same run; "
            "NAME@sha256:DIGEST says which code it is"
        )

    @property
    def entrypoint(self) -> str:
        """The job's shell command. Ray sends no files with an image, so the command writes the config first."""
        run = "python -m pipelines run" + (f" --jobs {self.num_jobs}" if self.num_jobs is not None else "")
        if self.package is not None:
            return f"{run} {shlex.join((self.package.config, *self.arguments))}"
        path = f'"${{TMPDIR:-/tmp}}/{self.run}.yaml"'
        return f"printf %s {shlex.quote(self.config_text)} > {path} && {run} {path} {shlex.join(self.arguments)}"


@dataclass(frozen=True)
class SubmissionResult:
    """outcome: "submitted"; "active" if the same run is still running; "succeeded" if it has already succeeded."""

    job: Job
    outcome: str


def prepare(
    config: Path,
    overrides: Sequence[str],
    *,
    image: str | None = None,
    allow_local_store: bool = False,
    has_autoscaler: bool = False,
    num_jobs: int | None = None,
) -> Submission:
    """Check a config and package the code. Raises ValueError if the config cannot run on a cluster or has credentials."""
    for override in overrides:
        refuse_credentials(override.partition("=")[0], override.partition("=")[2])
        if re.search(r"\bpreset\b.*\.ya?ml\b", override):
            raise ValueError(f"{override} names a file of this machine, which a job does not have; write it into the config")
    run = load_run(config, overrides, is_dataset_here=False)
    _refuse_unknown_targets(run)
    for file, _ in configuration.read_files(config):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            refuse_credentials(f"{file}, line {number},", line)
    if run.cluster.address not in (None, "auto"):
        raise ValueError(f"cluster.address is {run.cluster.address}, but a job runs on the cluster it is sent to; leave it out")
    for key, value in strings(configuration.to_dict(run)):
        refuse_credentials(key, value)
    _refuse_files_of_this_machine(run)
    places = _places(run, allow_local_store)
    run = configuration.with_overrides(run, places, "--allow-local-store") if places else run
    if image is not None:
        refuse_credentials("--image", image)
    package = None if image else pack_code(config, schema=RunConfig)
    if package is not None:
        refuse_credentials_in(package)
    resolved = {key: value for key, value in configuration.to_dict(run).items() if key != "cluster"}
    code = {"image": image} if image else {"code": package.state.digest if package else None}
    id = f"enat-{run.name[:_NAME_LENGTH]}-{digest_of({'config': resolved, **code})[:_DIGITS]}"
    given = (*overrides, *(f"{key}={value}" for key, value in places.items()), "cluster.address=auto")
    metadata = {jobs.RUN: id, "enat.name": run.name, jobs.CONFIG: str(config), "enat.store": run.store_uri, jobs.USER: _user()}
    return Submission(
        run=id,
        arguments=given,
        metadata=metadata | _code_metadata(package, image),
        config=run,
        package=package,
        image=image,
        config_text=configuration.read_text(config, RunConfig),
        has_autoscaler=has_autoscaler,
        num_jobs=num_jobs,
    )


def submit(cluster: Cluster, submission: Submission, *, again: bool = False) -> SubmissionResult:
    """Start the run, unless it is running or has succeeded. `again` starts it even if it has succeeded.

    A run that failed or was stopped continues as another attempt: the store has what earlier attempts committed. Raises ValueError
    if the cluster has no room for it.
    """
    attempts = [job for job in cluster.jobs() if job.run == submission.run]
    last = max(attempts, key=lambda job: job.attempt, default=None)
    if last is not None and last.is_active:
        return SubmissionResult(last, "active")
    if last is not None and last.status == "SUCCEEDED" and not again:
        return SubmissionResult(last, "succeeded")
    if not submission.has_autoscaler:
        check_room(submission.config, cluster.capacity())
    number = last.attempt + 1 if last is not None else 1
    id = submission.run if number == 1 else f"{submission.run}-{number}"
    metadata = {**submission.metadata, jobs.ATTEMPT: str(number)}
    with tempfile.TemporaryDirectory(prefix="enat-submit-") as folder:
        environment = _runtime_environment(submission, Path(folder))
        is_ours = cluster.start(id, submission.entrypoint, environment, metadata)
    job = cluster.job(id)
    if job is None:
        raise jobs.ClusterError(f"{id} was sent to {cluster.address}, which does not have it; submit it again")
    return SubmissionResult(job, "submitted" if is_ours else "active")


def resource_requests(run: RunConfig) -> list[ResourceRequest]:
    """The workers that the stages of a run request, according to its config. The store is not read."""
    wanted = graph.needed_by(run.targets or graph.stages())
    found: dict[tuple[str, Any], ResourceRequest] = {}
    for name, variant in {MAIN: run, **run.variant_runs}.items():
        for part in (part for part in graph.GRAPH if part.stage.name in wanted):
            stage, config = part.stage, part.config(variant)
            if config is not None and (workers := stage.workers(config)) is not None:
                node = stage.name if name == MAIN else f"{stage.name}@{name}"
                found.setdefault((stage.name, workers), ResourceRequest(node=node, workers=workers))
    return list(found.values())


def requests_of(planned: Sequence[PlannedStage]) -> list[ResourceRequest]:
    """The workers that the stages of a plan request which are not reused."""
    computed = [item.node for item in planned if not item.is_reused]
    workers = {node.id: node.stage.workers(node.config) for node in computed}
    return [ResourceRequest(node=id, workers=each) for id, each in workers.items() if each is not None]


def check_room(run: RunConfig, capacity: Capacity) -> None:
    """Raises ValueError if a stage does not fit on the cluster.

    Dataset and store are read only if a stage does not fit, because that takes time and permissions: a stage whose artifact
    is in the store needs no room.
    """
    if not (problems := _problems(resource_requests(run), capacity)):
        return
    not_seen = ""
    try:
        planned = driver.plan(graph.build(run), open_store(run.store_uri, run.s3))
    except (ValueError, OSError) as error:
        not_seen = f"; the store could not be checked for finished stages ({error})"
    else:
        problems = _problems(requests_of(planned), capacity)
    if problems:
        more = f" (and {len(problems) - 1} more stages do not fit: see enat plan --address)" if len(problems) > 1 else ""
        raise ValueError(
            f"{problems[0]}{more}. This is its current size ({capacity.describe()}); "
            f"if it adds nodes on demand, give --wait-for-nodes{not_seen}"
        )


def _problems(requests: Sequence[ResourceRequest], capacity: Capacity) -> list[str]:
    return [problem for request in requests if (problem := judge(request, capacity).problem) is not None]


def _refuse_unknown_targets(run: RunConfig) -> None:
    """Raises ConfigError, before anything is sent."""
    every = run.every_run().values()
    known = [part.stage.name for part in graph.GRAPH if any(part.config(each) is not None for each in every)]
    graph.check_targets(run.targets, known)


def _refuse_files_of_this_machine(run: RunConfig) -> None:
    """Raises ValueError for a relative path, which the cluster would resolve against the unpacked code. An absolute path may be a
    folder that all nodes share."""
    for name, each in run.every_run().items():
        for key, place in graph.external_files(each).items():
            if is_address(place) or place.startswith("sha256:") or Path(place).is_absolute():
                continue
            where = f"{name}: {key}" if name else key
            raise ValueError(
                f"{where} is {place}, a path of this machine that the cluster would not see; "
                "give s3://bucket/..., or the absolute path of what all nodes share"
            )


def _places(run: RunConfig, allow_local_store: bool) -> dict[str, str]:
    """Absolute paths of store and workspace, if they are relative. Raises ValueError for a store that only this machine can see."""
    is_remote, is_absolute = "://" in run.store_uri, Path(run.store_uri).is_absolute()
    if is_remote or (run.store is not None and is_absolute):
        return {}
    if not allow_local_store:
        raise ValueError(
            f"the store {run.store_uri} is a folder of this machine, which the cluster would not see; "
            "give store=s3://bucket/prefix or the absolute path of a folder that all nodes share, "
            "or --allow-local-store if the cluster is only this machine"
        )
    return {"workspace": str(Path(run.workspace).absolute()), "store": str(Path(run.store_uri).absolute())}


def _user() -> str:
    """Who submits, for others who look at the cluster's jobs."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return str(os.getuid())


def _code_metadata(package: CodePackage | None, image: str | None) -> dict[str, str]:
    if package is None:
        return {"enat.image": str(image)}
    state = package.state
    return {"enat.code": state.label, "enat.dirty": str(state.diff_digest is not None).lower(), **state.tags}


def _runtime_environment(submission: Submission, folder: Path) -> dict[str, Any]:
    """Contains no secrets: anyone who may list jobs can read their environments. The cluster has its own credentials."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), "ENAT_PROGRESS_SECONDS": "30"}
    variables |= {AUTOSCALER: "1"} if submission.has_autoscaler else {}
    if submission.package is None:
        return {"image_uri": submission.image, "env_vars": variables}
    archive = folder / "code.zip"
    archive.write_bytes(submission.package.content)
    return {"working_dir": str(archive), "env_vars": variables}
