"""The code of this checkout as a package for a cluster: what git tracks of it, with its changes, and a record of both.

The package is a zip whose bytes depend on the files alone, so the same code is uploaded once. Besides the code it holds the
config of one run, code.json (commit, digest of the changes) and, where there are any, changes.diff.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = "code.json"
CHANGES = "changes.diff"
SIZE_LIMIT = 20_000_000
_CODE = ("enat", "pipelines")
_CONFIGS = ":(glob)configs/**/*.yaml"
_DISTRIBUTION = "enat-lab"
_NEVER = frozenset({"__pycache__", ".DS_Store"})
_OLDEST = (1980, 1, 1, 0, 0, 0)  # that a zip can state


@dataclass(frozen=True, kw_only=True)
class CodeState:
    """Which code this is. commit: 40 hex digits; None where there is no repository.   diff_digest: sha256 of what `git diff` says
    against that commit; None without changes.   digest: of the code's own bytes, however they came about."""

    version: str
    commit: str | None
    diff_digest: str | None
    digest: str

    @property
    def label(self) -> str:
        """As manifests and tracking name it."""
        if self.commit is None:
            return self.version
        return f"{self.version}+g{self.commit[:12]}{'+dirty' if self.diff_digest else ''}"


@dataclass(frozen=True, kw_only=True)
class CodePackage:
    """content: a zip.   config: where in it the run's config lies.   left_behind: code that git does not track."""

    state: CodeState
    content: bytes
    config: str
    files: Mapping[str, bytes]
    left_behind: tuple[str, ...] = ()


def pack(config: Path, root: Path = ROOT) -> CodePackage:
    """The code under `root` with one config. Raises ValueError where it is too large, or holds what cannot be sent."""
    tracked = _tracked(root)
    is_repository = bool(tracked)  # code installed into a folder that a repository ignores belongs to none
    files = {name: _read(root / name) for name in tracked or _installed(root)}
    commit = _commit(root) if is_repository else None
    held_back = [f":(exclude,literal){name}" for name in _ignored(root)]
    changed = ("diff", "--no-ext-diff", "--binary", "HEAD", "--", *_CODE, _CONFIGS, *held_back)
    diff = (_git(root, *changed) or b"") if is_repository else b""
    own = {name: content for name, content in files.items() if name.startswith(tuple(f"{folder}/" for folder in _CODE))}
    state = CodeState(
        version=package_version(_DISTRIBUTION),
        commit=commit,
        diff_digest=hashlib.sha256(diff).hexdigest() if diff else None,
        digest=_digest(own),
    )
    place = _place(config, root)
    files[place] = _read(config)
    record = {"version": state.version, "commit": commit, "diff_digest": state.diff_digest, "digest": state.digest}
    files[RECORD] = json.dumps(record, indent=1).encode()
    if diff:
        files[CHANGES] = diff
    content = _zip(files)
    if len(content) > SIZE_LIMIT:
        largest = sorted(files.keys() - {CHANGES, RECORD}, key=lambda name: -len(files[name]))[:3]
        raise ValueError(
            f"the code to send is {len(content) / 1e6:.1f} MB, more than {SIZE_LIMIT / 1e6:.0f} MB; the largest files are "
            f"{', '.join(largest)}: take them out of git, or name them in .rayignore"
        )
    left_behind = _untracked(root) if is_repository else ()
    return CodePackage(state=state, content=content, config=place, files=files, left_behind=left_behind)


def read_state(root: Path = ROOT) -> CodeState | None:
    """Of code that came as a package; None for a checkout and for installed code."""
    try:
        record = json.loads((root / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    return CodeState(**record)


def _tracked(root: Path) -> list[str]:
    """What git tracks and the working tree has, less what .rayignore names."""
    listed = _names(root, "ls-files", "-z", "--", *_CODE, _CONFIGS)
    ignored = set(_ignored(root))
    there = [name for name in listed if name not in ignored and (root / name).is_file()]
    if linked := [name for name in there if (root / name).is_symlink()]:
        raise ValueError(f"{linked[0]} is a symbolic link, which cannot be sent to a cluster; put the file in its place")
    return there


def _ignored(root: Path) -> list[str]:
    """What git tracks and .rayignore, in the language of .gitignore, names."""
    given = ("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.rayignore")
    return _names(root, *given) if (root / ".rayignore").is_file() else []


def _installed(root: Path) -> list[str]:
    found = (
        path for folder in _CODE for path in (root / folder).rglob("*") if path.is_file() and not _NEVER.intersection(path.parts)
    )
    return sorted(path.relative_to(root).as_posix() for path in found)


def _untracked(root: Path) -> tuple[str, ...]:
    names = _names(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_CODE)
    return tuple(name for name in names if name.endswith(".py"))


def _place(config: Path, root: Path) -> str:
    """Where it lies in the checkout, else a folder of its own."""
    resolved = config.resolve()
    inside = resolved.relative_to(root.resolve()).as_posix() if resolved.is_relative_to(root.resolve()) else ""
    return inside if inside.startswith("configs/") else f"submitted/{config.name}"


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _OLDEST)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _digest(files: Mapping[str, bytes]) -> str:
    lines = [f"{hashlib.sha256(content).hexdigest()} {name}\n" for name, content in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def _commit(root: Path) -> str | None:
    answer = _git(root, "rev-parse", "HEAD")
    return answer.decode().strip() if answer else None


def _names(root: Path, *arguments: str) -> list[str]:
    return [name.decode(errors="surrogateescape") for name in (_git(root, *arguments) or b"").split(b"\0") if name]


def _git(root: Path, *arguments: str) -> bytes | None:
    """None where there is no repository, no commit, or no git. Says the same whatever the user's own settings are."""
    settings = ("-c", "core.quotepath=off", "-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false", "-c", "color.ui=false")
    try:
        done = subprocess.run(["git", *settings, *arguments], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def describe_left_behind(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"git does not track {', '.join(names[:3])}{more}, which stay behind; `git add` what the run needs"
