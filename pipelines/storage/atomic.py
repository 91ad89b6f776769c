"""Files that appear under their names in one step, whole, and only where the names are free."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def copy_if_absent(source: Path, target: Path) -> bool:
    """Whether `target` was free, and is a copy now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False) as copy:
        with source.open("rb") as original:
            shutil.copyfileobj(original, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    return publish(Path(copy.name), target)


def write_if_absent(target: Path, content: bytes) -> bool:
    """Whether `target` was free, and holds the content now."""
    return publish(temporary(target, content), target)


def temporary(target: Path, content: bytes) -> Path:
    """A file beside `target` that holds the content, whatever happens to this machine next."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".tmp-", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Path(file.name)


def publish(finished: Path, target: Path) -> bool:
    """Give a finished temporary file its name, in one step, only if the name is free."""
    finished.chmod(0o644)
    try:
        os.link(finished, target)
    except FileExistsError:
        return False
    finally:
        finished.unlink()
    return True
