"""The code of this checkout as a package for a cluster: the files that git tracks, with their changes, and a record of both.

The package is a zip whose bytes depend only on the files, so the same code is uploaded once. It also contains the config of one
run, code.json (commit, digest of the changes) and, if there are changes, changes.diff.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from pipelines.workflow.config import read_text

ROOT = Path(__file__).parents[2]
RECORD = "code.json"
CHANGES = "changes.diff"
SIZE_LIMIT = 20_000_000
_CODE = ("enat", "pipelines")
_CONFIGS = ":(glob)configs/**/*.yaml"
_DISTRIBUTION = "enat-lab"
_NEVER = frozenset({"__pycache__", ".DS_Store"})
_OLDEST = (1980, 1, 1, 0, 0, 0)  # that a zip can state
# Settings of a user's git that would change a patch, set explicitly.
_SETTINGS = ("-c", "core.quotepath=off", "-c", "color.ui=false", "-c", "diff.suppressBlankEmpty=false")
_PATCH = (
    "--no-ext-diff", "--no-textconv", "--no-renames", "--no-relative", "--binary", "-U3", "--inter-hunk-context=0",
    "--diff-algorithm=myers", "--indent-heuristic", "--src-prefix=a/", "--dst-prefix=b/", "-O/dev/null",
)  # fmt: skip
_SHORT = 12  # digits of a commit or digest that people read


@dataclass(frozen=True, kw_only=True)
class CodeState:
    """Identity of the code. commit: 40 hex digits; None if it is not known.   diff_digest: sha256 of the output of `git diff`
    against that commit; None without changes.   digest: of the bytes of the code."""

    version: str
    commit: str | None
    diff_digest: str | None
    digest: str

    @property
    def label(self) -> str:
        """The name of the code in manifests and tracking. Equal labels mean equal code."""
        if self.commit is None:
            return f"{self.version}+code.{self.digest[:_SHORT]}"
        changes = f"+dirty.{self.diff_digest[:_SHORT]}" if self.diff_digest else ""
        return f"{self.version}+g{self.commit[:_SHORT]}{changes}"

    @property
    def tags(self) -> dict[str, str]:
        """Of a job, or of a tracking run."""
        return {
            "enat.commit": self.commit or "unknown",
            "enat.diff_sha256": self.diff_digest or "",
            "enat.code_sha256": self.digest,
        }


@dataclass(frozen=True, kw_only=True)
class CodePackage:
    """content: a zip.   config: path of the run's config in it.   left_behind: code that git does not track."""

    state: CodeState
    content: bytes
    config: str
    files: Mapping[str, bytes]
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Code:
    """The code under a root. files: of the package, by name.   diff: empty without changes or without a repository."""

    state: CodeState
    files: Mapping[str, bytes]
    diff: bytes
    is_tracked: bool


def pack(config: Path, root: Path = ROOT, schema: Any = None) -> CodePackage:
    """The code under `root` with one config, merged with its bases. schema: of the config; see config.read_text.

    Raises ValueError if it is too large, contains what cannot be sent, or git fails.
    """
    code = _look(root)
    place = _place(config, root)
    files = {**code.files, place: read_text(config, schema).encode(), RECORD: _record(code.state)}
    if code.diff:
        files[CHANGES] = code.diff
    content = _zip(files)
    if len(content) > SIZE_LIMIT:
        largest = sorted(files.keys() - {CHANGES, RECORD}, key=lambda name: -len(files[name]))[:3]
        raise ValueError(
            f"the code to send is {len(content) / 1e6:.1f} MB, more than {SIZE_LIMIT / 1e6:.0f} MB; the largest files are "
            f"{', '.join(largest)}: remove them from git, or list them in .rayignore"
        )
    left_behind = _untracked(root) if code.is_tracked else ()
    return CodePackage(state=code.state, content=content, config=place, files=files, left_behind=left_behind)


def state_of(root: Path = ROOT) -> CodeState:
    """State of the code under `root`: from its record, else from git, else from its bytes. Raises ValueError if git fails."""
    return read_state(root) or _look(root).state


def write_record(commit: str, root: Path = ROOT) -> None:
    """Write the record for the build of an image, which has no repository. commit: of the copied code, or "unknown".

    Raises ValueError for anything else.
    """
    if commit != "unknown" and not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ValueError(f"REVISION is {commit!r}; give the 40 digits of `git rev-parse HEAD`, or leave it out")
    own = {name: _read(root / name) for name in _installed(root)}
    known = None if commit == "unknown" else commit
    state = CodeState(version=package_version(_DISTRIBUTION), commit=known, diff_digest=None, digest=_digest(own))
    (root / RECORD).write_bytes(_record(state))


def read_state(root: Path = ROOT) -> CodeState | None:
    """State of code from a package or in an image; None for a checkout and for installed code."""
    try:
        record = json.loads((root / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    return CodeState(**record)


def read_changes(root: Path = ROOT) -> bytes | None:
    """The changes of a package since its commit; None without changes."""
    path = root / CHANGES
    return path.read_bytes() if path.is_file() else None


def _look(root: Path) -> _Code:
    tracked = _tracked(root) if _repository_of(root) is not None else []
    files = {name: _read(root / name) for name in tracked or _installed(root)}
    commit, diff = None, b""
    if tracked:  # code installed into a folder that a repository ignores does not belong to the repository
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        held_back = [f":(exclude,literal){name}" for name in _ignored(root)]
        diff = _git(root, "diff", *_PATCH, "HEAD", "--", *_CODE, _CONFIGS, *held_back)
    own = {name: content for name, content in files.items() if name.startswith(tuple(f"{folder}/" for folder in _CODE))}
    state = CodeState(
        version=package_version(_DISTRIBUTION),
        commit=commit,
        diff_digest=hashlib.sha256(diff).hexdigest() if diff else None,
        digest=_digest(own),
    )
    return _Code(state=state, files=files, diff=diff, is_tracked=bool(tracked))


def _repository_of(root: Path) -> Path | None:
    """The folder with the repository that contains `root`. It is found by name, because git fails in the same way without a
    repository and for one of another user."""
    return next((folder for folder in (root.resolve(), *root.resolve().parents) if (folder / ".git").exists()), None)


def _tracked(root: Path) -> list[str]:
    """Files that git tracks and the working tree has, without those that .rayignore lists."""
    listed = _names(root, "ls-files", "-z", "--", *_CODE, _CONFIGS)
    ignored = set(_ignored(root))
    there = [name for name in listed if name not in ignored and (root / name).is_file()]
    if linked := [name for name in there if (root / name).is_symlink()]:
        raise ValueError(f"{linked[0]} is a symbolic link, which cannot be sent to a cluster; replace it with the file")
    return there


def _ignored(root: Path) -> list[str]:
    """Files that git tracks and .rayignore lists, in the syntax of .gitignore."""
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


def _record(state: CodeState) -> bytes:
    return json.dumps(asdict(state), indent=1).encode()


def _place(config: Path, root: Path) -> str:
    """Path of the config in the package: its place in the checkout, or else a folder of its own."""
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


def _names(root: Path, *arguments: str) -> list[str]:
    return [name.decode(errors="surrogateescape") for name in _git(root, *arguments).split(b"\0") if name]


def _git(root: Path, *arguments: str) -> bytes:
    """The output of git. Raises ValueError if it fails: code in a repository must not be mistaken for code without one."""
    try:
        done = subprocess.run(["git", *_SETTINGS, *arguments], cwd=root, capture_output=True, check=True)
    except OSError as error:
        raise ValueError(f"{_repository_of(root)} is a git repository, but git cannot be started ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        output = " ".join(error.stderr.decode(errors="replace").split()) or f"exit code {error.returncode}"
        raise ValueError(f"git {arguments[0]} fails in {root}: {output}") from error
    return done.stdout


def describe_left_behind(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"git does not track {', '.join(names[:3])}{more}, which are not sent; `git add` what the run needs"


_log = logging.getLogger(__name__)


@cache
def code_version() -> str:
    """Package version with the git commit, and the beginning of a digest of the changes if there are any."""
    try:
        return state_of().label
    except ValueError as error:
        label = f"{package_version('enat-lab')}+unknown"
        _log.warning("the version of the code is not known, and results will state %s (%s)", label, error)
        return label


@cache
def code_commit() -> str | None:
    """The git commit, 40 hex digits. None if it is not known."""
    try:
        return state_of().commit
    except ValueError:
        return None
