"""Runs on a cluster through Ray's Jobs API: a client with helpful errors, our jobs, and their logs.

Metadata marks a job as ours. A run that is submitted again after it failed or was stopped is a further attempt of the same run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipelines.cluster.capacity import Capacity
from pipelines.jobs.progress import StageProgress, stages_in_progress
from pipelines.storage.redaction import without_credentials

RUN, ATTEMPT = "enat.run", "enat.attempt"  # metadata of a job: its run, and the number of the attempt
USER, CONFIG = "enat.user", "enat.config"
_ACTIVE = ("PENDING", "RUNNING")
_TIMEOUT = (10, 120)  # seconds to connect, and between two bytes of an answer
_RECONNECTS = 5
_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 300
_NOT_FOUND = re.compile(r"status code 404\b")


class ClusterError(RuntimeError):
    """A cluster was reached, but then did not answer as expected."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """started, ended: seconds since 1970, or None.   exit_code: of the driver, if it ended by itself."""

    id: str
    run: str
    attempt: int
    status: str
    message: str
    entrypoint: str
    started: float | None
    ended: float | None
    exit_code: int | None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        return self.status in _ACTIVE

    @property
    def name(self) -> str:
        """The name in the config of the run."""
        return self.metadata.get("enat.name", self.run)

    @property
    def user(self) -> str | None:
        """Who submitted it; None for jobs that were not submitted by `enat submit`."""
        return self.metadata.get(USER)

    @property
    def config(self) -> str:
        """The config file, or the name of the run where the file is not known."""
        return self.metadata.get(CONFIG, self.name)

    def to_json(self) -> dict[str, Any]:
        fields = ("id", "name", "user", "config", "run", "attempt", "status", "started", "ended", "exit_code", "entrypoint")
        return {name: getattr(self, name) for name in fields} | {"metadata": dict(self.metadata), "reason": self.reason}

    @property
    def reason(self) -> str | None:
        """Why it failed: the last line of its message."""
        if self.status != "FAILED":
            return None
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        return lines[-1][:500] if lines else None

    def describe_end(self) -> str:
        """How the job ended, as a sentence."""
        how = {"SUCCEEDED": "succeeded", "STOPPED": "was stopped", "FAILED": "failed"}.get(self.status, f"is {self.status.lower()}")
        return f"{self.id} {how}" + (f": {self.reason}" if self.reason else "")

    @property
    def command_exit_code(self) -> int:
        """Exit code of a command that waited for the job: that of the driver, if known."""
        if self.status == "SUCCEEDED":
            return 0
        return self.exit_code if self.exit_code is not None and 0 < self.exit_code < 128 else 1


class Cluster:
    """The Jobs API at an address such as http://127.0.0.1:8265.

    Raises ValueError if nothing answers, the token is refused, or the Ray versions differ; ClusterError after that.
    The token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"https?://[^\s/@]+/?", address):
            raise ValueError(
                f"--address {without_credentials(address)} is not an address of Ray's Jobs API; write http://HOST:8265"
            )
        self.address = address.rstrip("/")
        self._client = _open(self.address)
        self._check_version()

    def jobs(self) -> list[Job]:
        """Our jobs, newest first."""
        with self._asking():
            found = [_job(details) for details in self._client.list_jobs() if RUN in (details.metadata or {})]
        return sorted(found, key=lambda job: (job.started or 0, job.attempt), reverse=True)

    def job(self, id: str) -> Job | None:
        """The job with this id, or None."""
        with self._asking():
            try:
                return _job(self._client.get_job_info(id))
            except RuntimeError as error:
                if _NOT_FOUND.search(str(error)):
                    return None
                raise

    def find(self, beginning: str | None) -> Job:
        """Our job with this prefix of its id; without a prefix the newest. Raises ValueError if none or several match."""
        ours = self.jobs()
        if not ours:
            raise ValueError(f"no jobs of enat at {self.address}")
        if beginning is None:
            return ours[0]
        found = [job for job in ours if job.id == beginning] or [job for job in ours if job.id.startswith(beginning)]
        if not found:
            raise ValueError(f"no job {beginning} at {self.address}; list the jobs with `enat jobs ls`")
        if len(found) > 1:
            raise ValueError(f"{beginning} matches {len(found)} jobs: {', '.join(job.id for job in found[:4])}")
        return found[0]

    def start(self, id: str, entrypoint: str, environment: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
        """Start a job. Returns False if a job with this id exists: another submission was first, or the answer was lost and the
        request was repeated. Raises ClusterError."""
        try:
            with self._asking():
                self._client.submit_job(
                    entrypoint=entrypoint, submission_id=id, runtime_env=dict(environment), metadata=dict(metadata)
                )
        except ClusterError:
            if self.job(id) is None:
                raise
            return False
        return True

    def stop(self, job: Job, patience: float) -> Job:
        """Ask the job to end, and wait. Stopping a job that has ended does nothing."""
        with self._asking():
            self._client.stop_job(job.id)
        return self.wait(job.id, patience)

    def wait(self, id: str, patience: float) -> Job:
        """The job when it has ended, or its state after `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            job = self.job(id)
            if job is None:
                raise ClusterError(f"job {id} is gone from {self.address}: the cluster was restarted; submit the run again")
            if not job.is_active or time.monotonic() > deadline:
                return job
            time.sleep(_POLL_SECONDS)

    def log(self, id: str) -> str:
        with self._asking():
            return str(self._client.get_job_logs(id))

    def stages_in_progress(self, job: Job) -> list[StageProgress]:
        """Of an active job; empty for others, and if its log cannot be read now."""
        if not job.is_active:
            return []
        try:
            return stages_in_progress(self.log(job.id))
        except ClusterError:
            return []

    def follow(self, id: str, write: Callable[[str], object]) -> Job:
        """Write the log from the beginning until the job ends. Broken connections are restored."""
        written, failures = 0, 0
        while True:
            received = 0

            def take(text: str) -> None:
                nonlocal written, received, failures
                if new := text[max(0, written - received) :]:
                    write(new)
                    failures = 0
                received += len(text)
                written = max(written, received)

            try:
                asyncio.run(_read(self._client.tail_job_logs(id), take))
                job = self.wait(id, patience=0)
                if not job.is_active:
                    return job
            except TimeoutError:  # no output for a long time: the job is silent, or the connection is dead
                if not (job := self.wait(id, patience=0)).is_active:
                    write(self.log(id)[written:])
                    return job
            except (RuntimeError, OSError) as error:
                failures += 1
                if failures > _RECONNECTS:
                    raise ClusterError(f"the log of {id} was interrupted ({_first_line(error)}); the job continues") from error
            time.sleep(_POLL_SECONDS * 2**failures)

    def capacity(self) -> Capacity:
        """The current capacity of its nodes."""
        with self._asking():
            answer = self._client._do_request("GET", "/api/v0/nodes?limit=10000&detail=0")
            if answer.status_code != 200:
                self._client._raise_error(answer)
            rows = answer.json()["data"]["result"]["result"]
        return Capacity(tuple(row["resources_total"] for row in rows if row["state"] == "ALIVE"))

    def _check_version(self) -> None:
        import ray

        running = str(self._client._server_ray_version)
        if running.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ValueError(
                f"the cluster at {self.address} runs Ray {running}, but this code needs {ray.__version__}; "
                "use a cluster, or an image, with that version"
            )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn errors of the client into one sentence that names the cluster."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ValueError(_refusal(self.address, str(error))) from error
        except requests.exceptions.RequestException as error:
            raise ClusterError(f"the cluster at {self.address} no longer answers ({type(error).__name__})") from error
        except RuntimeError as error:
            raise ClusterError(f"the cluster at {self.address} refuses: {_last_line(error)}") from error


def _job(details: Any) -> Job:
    metadata = dict(details.metadata or {})
    attempt = metadata.get(ATTEMPT, "1")
    return Job(
        id=details.submission_id or details.job_id,
        run=metadata.get(RUN, details.submission_id or ""),
        attempt=int(attempt) if attempt.isdecimal() else 1,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        entrypoint=details.entrypoint,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        metadata=metadata,
    )


def _open(address: str) -> Any:
    """Ray's client, with timeouts added."""
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _TIMEOUT, **options})

    try:
        with _only(address):
            return Client(address)
    except AuthenticationError as error:
        raise ValueError(_refusal(address, str(error))) from error
    except (ConnectionError, requests.exceptions.Timeout) as error:
        raise ValueError(
            f"no Ray cluster with a Jobs API at {address} ({_reason(error)}); start it, or set another address"
        ) from error
    except (RuntimeError, KeyError, ValueError, requests.exceptions.RequestException) as error:  # another service listens there
        raise ValueError(f"{address} is not Ray's Jobs API ({_first_line(error)}); set its address") from error


def _refusal(address: str, message: str) -> str:
    if "Authentication failed" in message:
        return f"the cluster at {address} refuses the token (403); set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own"
    if "RAY_AUTH_TOKEN_PATH" in message and "cannot be opened" in message:
        return f"RAY_AUTH_TOKEN_PATH is not a readable file; set it to a file with the token of the cluster at {address}"
    return (
        f"no token for the cluster at {address} (401); set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own "
        "(or RAY_AUTH_MODE=disabled if it needs none)"
    )


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Hide RAY_ADDRESS and RAY_API_SERVER_ADDRESS, which would override the given address."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


async def _read(source: AsyncIterator[str], take: Callable[[str], None]) -> None:
    import aiohttp

    try:
        while True:
            async with asyncio.timeout(_SILENCE_SECONDS):
                text = await anext(source)
            take(text)
    except StopAsyncIteration:
        return
    except aiohttp.ClientError as error:
        raise ConnectionError(_first_line(error)) from error


def _reason(error: BaseException) -> str:
    return "it does not answer" if "imed out" in str(error) or "Timeout" in type(error).__name__ else "nothing listens there"


def _first_line(error: BaseException) -> str:
    return without_credentials((str(error).splitlines() or [type(error).__name__])[0])[:200]


def _last_line(error: BaseException) -> str:
    """The last line of the tracebacks that Ray answers with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return without_credentials(lines[-1] if lines else type(error).__name__)[:300]
