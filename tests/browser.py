"""A real browser for tests: headless Chromium, spoken to in its DevTools protocol over a pipe.

Debian's package `chromium` is all it needs. Clicks and keys are input events, as from a hand.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time

FLAGS = (
    "--headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1 "
    "--no-first-run --disable-extensions --disable-background-networking --disable-dev-shm-usage "
    "--remote-debugging-pipe"
).split()
KEYS = {"Enter": 13, "Escape": 27, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One tab. `errors` collects what the console complains of, `requests` what is fetched."""

    def __init__(self, profile):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if not program:
            raise FileNotFoundError("no chromium here; Debian: apt-get install chromium")
        # Chromium reads commands from descriptor 3 and writes answers to 4, each ended by a NUL.
        # Copies above 9 cannot collide with those two.
        ends = [*os.pipe(), *os.pipe()]
        copies = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends]
        read_end, self.commands, self.answers, write_end = copies
        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(read_end, 3), os.dup2(write_end, 4)),
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, read_end, write_end):
            os.close(end)
        self.buffer, self.number, self.session = b"", 0, None
        self.errors, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self.notice(answer)

    def receive(self, deadline: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def notice(self, event: dict) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(params["args"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path, view: str = "") -> None:
        """A page of ours, until its script has finished; `view` is what follows the #."""
        self.errors, self.requests = [], []
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{view}")
        self.wait("document.querySelector('html[data-ready]') !== null")

    def wait(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, f"never: {condition}; {self.errors}"
            time.sleep(0.05)

    def js(self, expression: str):
        """The value of an expression in the page."""
        how = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.js(f"{found}.map((e) => e.textContent)")

    def count(self, selector: str) -> int:
        return self.js(f"document.querySelectorAll({json.dumps(selector)}).length")

    def seen(self, selector: str) -> bool:
        return self.js(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def mouse(self, kind: str, selector: str, across: float = 0.5) -> None:
        x, y = self.js(f"""(() => {{
            const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center", inline: "center"}});
            const box = e.getBoundingClientRect();
            return [box.x + box.width * {across}, box.y + 8];
        }})()""")
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, selector: str) -> None:
        self.mouse("mousePressed", selector)
        self.mouse("mouseReleased", selector)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key])

    def look(self, width: int, height: int, scheme: str = "light", media: str = "") -> None:
        """Size of the window in CSS pixels, light or dark, and the medium ("print")."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def close(self) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.commands)
        os.close(self.answers)
