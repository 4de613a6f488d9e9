"""A headless Chromium, driven by its DevTools protocol over a pipe: JSON texts, each with a zero byte at its end."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WITHIN_S = 30
KEYS = {"Enter": "\r", "Escape": "", "Tab": ""}


class Tab:
    """One page of the browser. Whatever waits ends after WITHIN_S with an AssertionError."""

    def __init__(self, line: socket.socket) -> None:
        self.line, self.session, self.number, self.data = line, "", 0, b""
        self.complaints: list[str] = []  # of the browser: errors, what a policy has forbidden
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params}
        if self.session:
            asked["sessionId"] = self.session
        self.line.sendall(json.dumps(asked).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self.number:
                assert "error" not in heard, f"{method}: {heard['error']}"
                result: dict[str, Any] = heard["result"]
                return result
            match heard.get("method"), heard.get("params", {}):
                case "Log.entryAdded", {"entry": {"level": "error", "text": text}}:
                    self.complaints.append(text)
                case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                    self.complaints.append(str(details.get("exception", details)))

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of an expression in JavaScript, as JSON has it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Returns when it holds."""
        deadline = time.monotonic() + WITHIN_S
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"), self.complaints)
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What the last of these elements shows."""
        found: str = self.value(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).innerText")
        return found

    def click(self, selector: str) -> None:
        self.value(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1).click()")

    def write(self, text: str) -> None:
        """As typed or pasted where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key: a character, or one of KEYS."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, 0)
        typed = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0, "text": KEYS.get(key, key)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **typed)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """A window of so many pixels, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """What it looks like, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self.data:
            piece = self.line.recv(1 << 16)
            assert piece, "the browser has ended"
            self.data += piece
        text, _, self.data = self.data.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found


@contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, whose files lie in `folder`."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, f"none of {', '.join(NAMES)} on the PATH: install one (Debian: apt-get install chromium)"
    options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--disable-gpu"]
    options += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses to have one as root
    here, there = socket.socketpair()
    here.settimeout(WITHIN_S)
    # The protocol goes over the file descriptors 3 and 4.
    line = ["bash", "-c", f'exec "$@" 3<&{there.fileno()} 4>&{there.fileno()}', "bash", program, *options]
    with here, (folder / "messages").open("wb") as messages:
        process = subprocess.Popen(line, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stderr=messages)
        there.close()
        try:
            yield Tab(here)
        finally:
            process.terminate()
            try:
                process.wait(WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
