"""A headless Chromium, driven over a pipe by its DevTools protocol: no driver and no network needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time

import cv2
import numpy as np

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without a GPU, WebGL is drawn by the CPU.
FLAGS = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run"]


class Page:
    """One page, loaded from a file. A context manager."""

    def __init__(self, path, folder, width=1200, height=900):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def place_pipes():  # where --remote-debugging-pipe expects them
            read, write = os.dup(to_browser), os.dup(from_browser)  # neither of them may be 3 already
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self.events, self._session = b"", 0, [], None
        try:
            self._open(path, width, height)
        except BaseException:
            self.__exit__()
            raise

    def _open(self, path, width, height):
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self, timeout=60):
        end = time.monotonic() + timeout
        poll = select.poll()  # select itself takes no numbers over 1,023
        poll.register(self._in, select.POLLIN)
        while b"\0" not in self._buffer:
            assert poll.poll(1000 * max(0, end - time.monotonic())), "the browser does not answer"
            self._buffer += os.read(self._in, 1 << 20)
        message, _, self._buffer = self._buffer.partition(b"\0")
        found = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found

    def run(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def drag(self, x, y, dx, dy):
        def mouse(kind, x, y, buttons):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

        mouse("mousePressed", x, y, 1)
        for share in (0.5, 1):
            mouse("mouseMoved", x + share * dx, y + share * dy, 1)
        mouse("mouseReleased", x + dx, y + dy, 0)

    def screenshot(self):
        """What is seen now: RGB [H, W, 3]."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    def complaints(self):
        """Console errors and warnings, exceptions, and requests to anything but the page's own file."""
        found = [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        for event in self.events:
            parameters = event["params"]
            kind = parameters.get("type") if event["method"] == "Runtime.consoleAPICalled" else None
            kind = parameters["entry"]["level"] if event["method"] == "Log.entryAdded" else kind
            if kind in ("error", "warning", "assert"):
                found.append(parameters)
            if event["method"] == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    found.append(url)
        return found
