"""Pages in a real headless chromium, driven by the DevTools protocol through a pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Browser:
    """events: everything that the browser reported."""

    process: subprocess.Popen[bytes]
    events: list[dict[str, Any]] = field(default_factory=list)
    session: str | None = None
    sent: int = 0

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **({"sessionId": self.session} if self.session else {})}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._read()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        content = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "chromium has ended"
            content += byte
        message: dict[str, Any] = json.loads(content)
        return message

    def open(self, path: Path, width: int, scheme: str = "light") -> None:
        """Show a file in a new tab of a width, until it has loaded."""
        self.session, self.events = None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.setLifecycleEventsEnabled", enabled=True)
        loader = self.send("Page.navigate", url=path.as_uri())["loaderId"]
        while not self._has_loaded(loader):
            self.events.append(self._read())

    def _has_loaded(self, loader: str) -> bool:
        """Whether the page has that this loader loads, and not only the empty page of a new tab."""
        ends = (event["params"] for event in self.events if event["method"] == "Page.lifecycleEvent")
        return any(event["name"] == "load" and event["loaderId"] == loader for event in ends)

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript on the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def of(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of a kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")
    arguments = [found, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += ["--no-first-run", f"--user-data-dir={profile}"]
    # The browser reads commands from file 3 and answers in file 4.
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
    )
    browser = Browser(process)
    yield browser
    browser.session = None
    browser.send("Browser.close")
    process.wait(60)
