"""Pages as headless Chromium shows them: what it writes on the console, how wide they are, a picture.

    with Browser() as browser:
        shown = browser.show(path, width=390)
        assert shown.console == []

Spoken to over two pipes, in the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/): no port, no driver.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
PATIENCE_SECONDS = 60
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
    "about:blank",
)


@dataclass(frozen=True)
class Shown:
    """A page as it was shown.

    Attributes:
        console: all that was written on the console: messages, errors, what the policy refused, uncaught exceptions.
        scroll_width: how wide the document is; over the width that it was given, one has to scroll sideways.
        small_text: the height of the smallest letters, in pixels.
        text: of the body, as a reader sees it.
    """

    console: list[str]
    scroll_width: int
    small_text: float
    text: str


class Browser:
    """Headless Chromium, for as long as the block lasts."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # It reads commands from 3 and answers on 4; the shell puts the pipes there.
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, f"--user-data-dir={self._home.name}", *OPTIONS],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._events = b"", 0, list[dict[str, Any]]()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._commands)
        os.close(self._answers)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._home.cleanup()

    def show(
        self, page: Path, width: int, picture: Path | None = None, is_dark: bool = False, most_height: int = 6000
    ) -> Shown:
        """Open a file at a width in pixels; `picture`: where to write a PNG of it, from its top to at most `most_height`."""
        self._events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.send("Page.navigate", url=page.resolve().as_uri())
        self._await("Page.loadEventFired")
        scroll_width = self.evaluate("document.documentElement.scrollWidth")
        small_text = self.evaluate(SMALLEST_TEXT)
        text = self.evaluate("document.body.innerText")
        if picture is not None:
            height = min(self.evaluate("document.documentElement.scrollHeight"), most_height)
            self.take_picture(picture, width, height)
        return Shown(self.console(), scroll_width, small_text, text)

    def take_picture(self, picture: Path, width: int, height: int, top: int = 0) -> None:
        """Write a PNG of the page from `top` on, as it is now."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        picture.write_bytes(base64.b64decode(shot["data"]))

    def move_pointer_to(self, selector: str, share: float = 0.5) -> None:
        """Move the mouse over an element, to this share of its width."""
        where = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        where += f"const b = e.getBoundingClientRect(); return [b.left + {share} * b.width, b.top + b.height / 2]; }})()"
        x, y = self.evaluate(where)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def console(self) -> list[str]:
        """What was written on the console since the page was opened."""
        self.evaluate("0")  # what was said before its answer is here then
        words = []
        for event in self._events:
            given = event.get("params", {})
            if event["method"] == "Runtime.consoleAPICalled":
                words.append(" ".join(str(one.get("value", one.get("description"))) for one in given["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                words.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Log.entryAdded":
                words.append(given["entry"]["text"])
        return words

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """One command; its result. What happens meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", None) and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _await(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        ends = time.monotonic() + PATIENCE_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, ends - time.monotonic()))
            more = os.read(self._answers, 1 << 16) if ready else b""
            assert more, "Chromium does not answer"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("main *")]
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length)
  .map((e) => {
    const svg = e.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return e instanceof SVGTitleElement ? Infinity : scale * parseFloat(getComputedStyle(e).fontSize);
  }))"""
