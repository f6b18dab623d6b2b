"""A real browser for tests: headless Chromium, spoken to in its DevTools protocol over a pipe.

Debian's package `chromium` is all it needs. Clicks and keys are input events, as from a hand.
"""

import json
import select
import shutil
import subprocess
import time

FLAGS = """--headless --no-sandbox --hide-scrollbars --disable-dev-shm-usage
    --disable-background-networking --remote-debugging-pipe""".split()
PIPES = 'exec "$@" 3<&0 4>&1'  # it reads commands from descriptor 3, and writes answers to 4
KEYS = {"Enter": 13, "Escape": 27, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One tab. `errors` collects what the console complains of, `requests` what is fetched."""

    def __init__(self, profile):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, "no chromium here; Debian: apt-get install chromium"
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        shell = ["sh", "-c", PIPES, "sh", *command]
        self.process = subprocess.Popen(shell, stderr=subprocess.DEVNULL, **pipes)
        self.buffer, self.number, self.session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """What the browser answers; events that come before the answer are noticed."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.notice(answer["method"], answer["params"])
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], 60)
            more = ready and self.process.stdout.read(1 << 20)
            assert more, "the browser has ended, or does not answer"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def notice(self, event: str, params: dict) -> None:
        level = params.get("entry", {}).get("level") or params.get("type")  # of the console
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown" or level in ("error", "warning"):
            self.errors.append(params)

    def open(self, path, view: str = "") -> None:
        """A page of ours, until its script has finished; `view` is what follows the #."""
        self.errors, self.requests = [], []
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{view}")
        end = time.monotonic() + 20
        while not self.all("html[data-ready]"):
            assert time.monotonic() < end, self.errors
            time.sleep(0.05)

    def js(self, expression: str):
        """The value of an expression in the page."""
        how = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def all(self, selector: str, what: str = "e.textContent") -> list:
        """Of every element e that the selector finds."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.js(f"{found}.map((e) => {what})")

    def seen(self, selector: str) -> bool:
        return self.all(selector, "e.checkVisibility()")[0]

    def mouse(self, kind: str, selector: str, across: float = 0.5) -> None:
        x, y, width = self.js(f"""(() => {{
            const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center", inline: "center"}});
            const box = e.getBoundingClientRect();
            return [box.x, box.y, box.width];
        }})()""")
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x + width * across, y=y + 8, **button)

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
        self.process.communicate(timeout=20)
