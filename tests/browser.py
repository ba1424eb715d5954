"""A headless Chromium that tests open pages in, type and click in, and ask what they see."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
# Chromium reads its commands from file 3 and writes its answers to file 4.
LAUNCHER = """
import fcntl, os, sys
# out of the way first, as they may be 4 and 3
reads, writes = (fcntl.fcntl(int(file), fcntl.F_DUPFD, 5) for file in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
# What `press` takes: key, code of the key, and the text that it types.
KEYS = {
    "Enter": (13, "\r"),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
    "/": (191, "/"),
}
# until the page has drawn what an event changed
TWO_FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"


class Browser:
    """
    One page in a browser of its own, which is spoken to by its DevTools protocol.

    Args:
        profile: Folder for the browser's files.
        errors: What the page wrote to the console as an error or a warning, or threw, so far.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCHER, str(theirs_in), str(theirs_out)),
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
                *("--hide-scrollbars", "--disable-dev-shm-usage", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._reads, self._writes = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self._n_sent = 0
        self._session: str | None = None
        self.errors: list[str] = []
        pages = self._send("Target.getTargets")["targetInfos"]
        target = next(page for page in pages if page["type"] == "page")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._reads.close()
        self._writes.close()

    def open(self, path: Path, address: str = "") -> None:
        """Opens a file, and waits until its scripts have run. `address` is the part after #."""
        self.visit(f"{path.as_uri()}{address}")

    def visit(self, url: str) -> None:
        """Opens a page, and waits until its scripts have run."""
        # without this, a page that is open already would do
        self._send("Page.navigate", url="about:blank")
        self._send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Sets the size of the window in pixels, as narrow as one likes, and its colour scheme."""
        self._send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1},
            mobile=False,
        )
        scheme = "dark" if dark else "light"
        self._send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def ask(self, expression: str) -> Any:
        """What JavaScript gives for an expression, or for the promise that it gives."""
        answer = self._send(
            "Runtime.evaluate",
            **{"expression": expression, "returnByValue": True, "awaitPromise": True},
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str, n_frames: int = 600) -> None:
        """Waits until a JavaScript expression is true, for a number of frames at most."""
        for _ in range(n_frames):
            if self.ask(condition):
                return
            self.ask(TWO_FRAMES)
        raise AssertionError(f"never true: {condition}; errors: {self.errors}")

    def press(self, *keys: str) -> None:
        """Presses keys of KEYS one after the other."""
        for key in keys:
            code, text = KEYS[key]
            event = {"key": key, "windowsVirtualKeyCode": code}
            down = {**event, "type": "keyDown", **({"text": text} if text else {})}
            self._send("Input.dispatchKeyEvent", **down)
            self._send("Input.dispatchKeyEvent", **event, type="keyUp")
            self.ask(TWO_FRAMES)

    def type(self, text: str) -> None:
        """Types text into what has the focus."""
        self._send("Input.insertText", text=text)
        self.ask(TWO_FRAMES)

    def click(self, selector: str) -> None:
        """Clicks into the middle of the first element that a CSS selector finds."""
        box = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._send(
                "Input.dispatchMouseEvent",
                **{"type": kind, "x": box[0], "y": box[1]},
                **{"button": "left", "clickCount": 1},
            )
        self.ask(TWO_FRAMES)

    def picture(self, path: Path) -> None:
        """Writes a PNG of what the window shows."""
        path.write_bytes(
            base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])
        )

    def _send(self, method: str, **params: Any) -> Any:
        """Sends a command and gives its result. What the page tells meanwhile goes to `errors`."""
        self._n_sent += 1
        message: dict[str, Any] = {"id": self._n_sent, "method": method}
        message["params"] = params
        if self._session is not None:
            message["sessionId"] = self._session
        self._writes.write(json.dumps(message).encode() + b"\0")
        self._writes.flush()
        while True:
            answer = json.loads(self._receive())
            if answer.get("id") == self._n_sent:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._take_note(answer.get("method"), answer.get("params", {}))

    def _receive(self) -> bytes:
        message = bytearray()
        while (byte := self._reads.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        return bytes(message)

    def _take_note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.errors.append(json.dumps(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in (
            "error",
            "warning",
        ):
            self.errors.append(json.dumps(params["entry"]))
