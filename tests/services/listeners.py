"""The sockets on which a command and all processes that it starts listen, while it runs."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_LISTENING = "0A"  # the state in /proc/net/tcp


class Listeners:
    """found: (moment, process, address) of every listening socket. Sampled, so a socket must stay open for a moment.

    variable: NAME=VALUE in the environment of the processes to watch, and of no others.   moment: names the time of a sample.
    """

    def __init__(self, variable: str, moment: Callable[[], str] = lambda: "") -> None:
        self.found: set[tuple[str, str, str]] = set()
        self._variable, self._moment = variable.encode(), moment
        self._known: dict[str, tuple[str, str] | None] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[Listeners]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                self._sample()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()

    def _sample(self) -> None:
        rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
        addresses = {row[9]: row[1].partition(":")[0] for row in rows if row[3] == _LISTENING}
        if new := addresses.keys() - self._known.keys():
            owners = _owners()
            self._known |= {inode: self._named(addresses[inode], owners.get(inode)) for inode in new}
        moment = self._moment()
        self.found |= {(moment, *named) for inode in addresses if (named := self._known[inode]) is not None}

    def _named(self, address: str, process: Path | None) -> tuple[str, str] | None:
        with contextlib.suppress(OSError):
            if process is not None and self._variable in (process / "environ").read_bytes().split(b"\0"):
                return (process / "comm").read_text().strip(), _decoded(address)
        return None


def _owners() -> dict[str, Path]:
    """inode of a socket -> folder of its process."""
    owners = {}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            kind, _, inode = str(descriptor.readlink()).partition(":")
            if kind == "socket":
                owners[inode.strip("[]")] = descriptor.parents[1]
    return owners


def _decoded(address: str) -> str:
    """Each four bytes of an address are in the order of the machine."""
    raw = bytes.fromhex(address)
    decoded = ipaddress.ip_address(b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4)))
    return str(getattr(decoded, "ipv4_mapped", None) or decoded)
