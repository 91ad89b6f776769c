"""Write local files in one step: a name appears only when its file is complete and on the disk."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.storage.base import CHUNK, StorageError

_ATTEMPTS = 100  # of creating a file in a directory that another process removes because it is empty
_WITHOUT_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


def write_if_absent(target: Path, chunks: Iterable[bytes]) -> bool:
    """Write a file unless its name is taken. Returns whether it was written."""
    written = _temporary(target, chunks)
    try:
        os.link(written, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_HARD_LINKS:
            raise
        raise StorageError(
            f"{target} is on a file system without hard links ({error.strerror}), which are needed to write files in one step"
        ) from error
    finally:
        written.unlink()
    return True


def replace(target: Path, chunks: Iterable[bytes]) -> None:
    """Write a file in place of an existing one."""
    _temporary(target, chunks).replace(target)


def chunks_of(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
    else:
        with source.open("rb") as file:
            yield from iter(lambda: file.read(CHUNK), b"")


def _temporary(target: Path, chunks: Iterable[bytes]) -> Path:
    """A complete file in the directory of `target`, readable for everybody."""
    with _create_beside(target) as file:
        path = Path(file.name)
        try:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
            path.chmod(0o644)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return path


def _create_beside(target: Path) -> Any:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False)
        except (FileNotFoundError, FileExistsError):  # mkdir: another process removed the existing directory meanwhile
            if attempt == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")
