"""Chromium without a screen, driven through a pipe by its DevTools protocol.

Messages are JSON with a zero byte behind each, in at descriptor 3 and out at 4
(--remote-debugging-pipe): no port, no driver, no library.  Chromium's methods are described at
chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import eventually

PROGRAM = "chromium-headless-shell"
PATIENCE_SECONDS = 45.0


class Browser:
    """One browser with one page."""

    def __init__(self, profile: Path) -> None:
        theirs, self._to = os.pipe()
        self._from, out = os.pipe()
        # The shell puts the pipes where Chromium wants them.
        script = f'exec "$@" 3<&{theirs} 4>&{out} {theirs}<&- {out}>&-'
        self.process = subprocess.Popen(
            [
                *("bash", "-c", script, "bash", PROGRAM),
                "--remote-debugging-pipe",
                "--no-sandbox",  # tests run as root
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--no-first-run",
                "--mute-audio",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(theirs, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs)
        os.close(out)
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None

    def connect(self) -> None:
        """To its page."""
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a method; fails if it does."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            reply = self._receive(deadline)
            if reply.get("id") == self._number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self.events.append(reply)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._from], [], [], left)[0], "it does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def text(self, selector: str) -> str | None:
        """Of the first such element; None if there is none, or it is not seen."""
        found: str | None = self.value(
            f"(e => e && e.checkVisibility() ? e.textContent : null)"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return found

    def shows(self, selector: str, text: str | None) -> None:
        """Wait until that element has that text; None: until there is none."""
        eventually(lambda: self.text(selector) == text, f"{selector}: {text!r}")

    def count(self, selector: str) -> int:
        found: int = self.value(f"document.querySelectorAll({json.dumps(selector)}).length")
        return found

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """A screenshot of the whole page, PNG."""
        done = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(done["data"]))

    def complaints(self) -> list[str]:
        """What went wrong in the page: exceptions, what the policy refused, what did not load."""
        self.value("0")  # what came before has come
        return [
            json.dumps(event["params"])
            for event in self.events
            if event["method"] == "Runtime.exceptionThrown"
            or (
                event["method"] == "Log.entryAdded"
                and event["params"]["entry"]["level"] in ("error", "warning")
            )
        ]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    started = Browser(profile)
    try:
        started.connect()
        yield started
    finally:
        started.close()
