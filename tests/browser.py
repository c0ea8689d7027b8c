"""Drive a headless Chromium over its debugging pipe (the DevTools protocol), with the standard library alone."""

import base64
import fcntl
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")


class Page:
    """One tab. What it logs as an error, and each URL that it asks for, is kept."""

    def __init__(self, browser, session):
        self.browser, self.session = browser, session
        self.errors, self.urls = [], []

    def send(self, method, **parameters):
        return self.browser.send(method, self.session, **parameters)

    def open(self, url, *, width=1280, height=900, dark=False, scale=1):
        mobile = width < 500
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, still])
        self.errors.clear(), self.urls.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")
        return self

    def run(self, expression):
        """Evaluate an expression (promises are awaited) and return its value."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"never came true: {condition}; errors: {self.errors}"
            time.sleep(0.03)
        return value

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    def type(self, selector, text):
        """Put the focus there and type, in place of what is there, as a keyboard does."""
        self.run(f"(e => (e.focus(), e.select?.()))(document.querySelector({json.dumps(selector)}))")
        self.send("Input.insertText", text=text)

    def key(self, name, code=0):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)

    def click(self, selector):
        """Click in the middle of it, with a mouse."""
        where = self.run(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f"return [r.x + r.width / 2, r.y + r.height / 2]}})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def shot(self, path, *, whole=True):
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(found["data"]))


class Browser:
    """A Chromium with a profile of its own."""

    def __init__(self, profile):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def pipes():  # Chromium reads from 3 and writes to 4
            kept = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 100) for pipe in (to_read, to_write)]  # they may be 3 or 4 now
            os.dup2(kept[0], 3), os.dup2(kept[1], 4)

        self.process = subprocess.Popen(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
                f"--user-data-dir={profile}", "about:blank",
            ],
            preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read), os.close(to_write)
        self._number, self._answers, self._pages = 0, {}, {}
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, method, session=None, **parameters):
        self._number += 1
        number, answer = self._number, queue.Queue()
        self._answers[number] = answer
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        found = answer.get(timeout=60)
        assert "error" not in found, f"{method}: {found}"
        return found["result"]

    def page(self):
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        return page

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._write)

    def _listen(self):
        with os.fdopen(self._read, "rb") as stream:
            rest = b""
            while data := stream.read1(1 << 20):
                *messages, rest = (rest + data).split(b"\0")
                for message in map(json.loads, messages):
                    self._take(message)

    def _take(self, message):
        if "id" in message:
            self._answers.pop(message["id"]).put(message)
            return
        page, method, said = self._pages.get(message.get("sessionId")), message["method"], message["params"]
        if page is None:
            return
        if method == "Runtime.exceptionThrown":
            page.errors.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            page.errors.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            page.errors.append(said["entry"]["text"] + " " + said["entry"].get("url", ""))
        elif method == "Network.requestWillBeSent":
            page.urls.append(said["request"]["url"])


@contextmanager
def chromium(profile):
    """Yield a browser; its profile's folder is removed afterwards."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)
