"""The log of a run, kept where the run's results are: the folder of a job, in which it is written, is removed with the job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from rich.console import Console

from pipelines.artifacts.store import ArtifactStore
from pipelines.formatting import one_line
from pipelines.storage.base import StorageError
from pipelines.storage.redaction import without_credentials
from pipelines.tracking.run import RunHandle

_log = logging.getLogger(__name__)
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a job's driver
FOLDER = ".logs"  # of a store, beside its stages
_NAME = "run.log"  # in MLflow
_MOST_BYTES = 4_000_000  # of the end of a long log


@dataclass
class KeptLog:
    """place: in the store, once the run has ended and if something was logged.   run: the tracking run, once it exists."""

    place: str | None = None
    run: RunHandle | None = None


@contextmanager
def keeping(store: ArtifactStore, path: Path, console: Console) -> Iterator[KeptLog]:
    """However the work ends, copy its log with its traceback to the store and to the tracking run. If a job fails, print where: its
    own folder, which the error names, is removed with it.

    Does not raise: what cannot be copied costs a warning.
    """
    kept, has_failed = KeptLog(), False
    try:
        yield kept
    except Exception:
        _log.info("the run failed", exc_info=True)
        has_failed = True
        raise
    finally:
        keep(kept, store, path)
        if has_failed and IN_JOB in os.environ:
            _show(kept, console)


def keep(kept: KeptLog, store: ArtifactStore, path: Path) -> None:
    """Copy a log as it is now, if something was logged."""
    try:
        text = path.read_bytes()[-_MOST_BYTES:].decode(errors="replace")
    except FileNotFoundError:  # nothing was logged
        return
    content = without_credentials(text).encode()
    name = f"{FOLDER}/{path.stem}-{uuid4().hex[:8]}{path.suffix}"
    try:
        store.folder.put_if_absent(name, content)
        kept.place = f"{store.uri}/{name}"
    except (OSError, StorageError) as error:
        _log.warning("the log of this run was not copied to the store (%s)", error)
    if kept.run is not None:
        kept.run.log_bytes(content, _NAME)


def _show(kept: KeptLog, console: Console) -> None:
    if kept.place is not None:
        console.print(f"log       {one_line(kept.place)}", highlight=False, soft_wrap=True)
    if kept.run is not None and kept.run.run_id is not None:
        uri = one_line(without_credentials(kept.run.uri))
        console.print(f"tracking  {uri} (run {kept.run.run_id})", highlight=False, soft_wrap=True)
