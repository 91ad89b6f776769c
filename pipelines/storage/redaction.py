"""Remove credentials from URIs before they are shown or stored."""

from __future__ import annotations

import re

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)?://(\S+)")
_PLACES = frozenset({"s3", "hf"})  # after :// comes a bucket or an owner, not user and host, and no query follows
_SECRET = re.compile(r"(?<=[?&])[^=&\s]*(?:user|pass|pwd|secret|token|key|sig|credential|auth)[^=&\s]*=[^&\s]*", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """Remove user and password, before an @ or in a query, from a URI or from text with URIs in it.

    Cuts at the last @, because a password may hold one, or a slash. Names of objects and files may hold one, too: they stay if no
    user can come before them.
    """
    return _URI.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    scheme, rest = match[1] or "", match[2]
    authority = rest.partition("/")[0]
    if scheme in _PLACES and not re.search("[:@]", authority):
        return f"{scheme}://{without_credentials(rest)}"  # another URI may follow, for example after a comma
    user = (0, rest.rfind("@") + 1 if authority else 0)
    secrets = [user, *(found.span() for found in _SECRET.finditer(rest))]  # they overlap if a password holds ? or @
    kept = "".join(each for at, each in enumerate(rest) if not any(start <= at < stop for start, stop in secrets))
    if len(secrets) > 1:
        kept = re.sub(r"(?<=[?&])&+|[?&]+$", "", kept)
    return f"{scheme}://{kept if authority else without_credentials(kept)}"
