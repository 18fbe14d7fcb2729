"""A headless Chromium driven through its debugging pipe: real keys, sizes, schemes and the accessibility tree."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY_CODES = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36}
KEY_CODES |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page in a browser of its own; a context manager that ends the browser.

    Args:
        profile: an empty folder for the browser's files.
        width: of the page in CSS pixels.
        height: of the page in CSS pixels.
        scheme: light or dark.
    """

    def __init__(self, profile, *, width=1366, height=768, scheme="light"):
        self._read, browser_out = os.pipe()
        browser_in, self._write = os.pipe()

        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--no-first-run", f"--user-data-dir={profile}", "about:blank"]
        # The browser reads commands from descriptor 3 and writes answers to 4.
        self._process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3</dev/fd/{browser_in} 4>/dev/fd/{browser_out}', "sh", *command],
            pass_fds=(browser_in, browser_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_in)
        os.close(browser_out)
        self._buffer, self._number, self._session = b"", 0, None
        self.messages = []
        try:
            self._open_page(width, height, scheme)
        except BaseException:
            self.__exit__()
            raise

    def _open_page(self, width, height, scheme):
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=media)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def open(self, address):
        """Loads a page, and waits until it is ready."""
        self._call("Page.navigate", url="about:blank")  # with another fragment alone, nothing would be loaded
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + 60
        while self.run("document.documentElement?.dataset.readyMs ?? ''") == "":
            assert time.monotonic() < deadline, f"{address} did not get ready: {self.messages}"
            time.sleep(0.05)
        self.settle()

    def run(self, script):
        """Returns the value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def settle(self):
        """Waits for two frames, so that what was done is shown."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def press(self, key, *, times=1, modifiers=0):
        """Presses a key as a user does, at the element that has the focus."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        for _ in range(times):
            event = {"key": key, "windowsVirtualKeyCode": KEY_CODES.get(key, 0), "modifiers": modifiers}
            self._call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
            self._call("Input.dispatchKeyEvent", type="keyUp", **event)
        self.settle()

    def write(self, text):
        """Types a text at the element that has the focus."""
        self._call("Input.insertText", text=text)
        self.settle()

    def accessibility_tree(self):
        """Returns role, name and states of all elements that assistive technology sees."""
        nodes = self._call("Accessibility.getFullAXTree")["nodes"]
        return [
            {
                "role": node["role"]["value"],
                "name": node.get("name", {}).get("value", ""),
                **{entry["name"]: entry["value"].get("value") for entry in node.get("properties", [])},
            }
            for node in nodes
            if not node.get("ignored")
        ]

    def picture(self):
        """Returns the PNG bytes of the visible part of the page."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") in (
                "Runtime.exceptionThrown",
                "Log.entryAdded",
                "Runtime.consoleAPICalled",
            ):
                self.messages.append(answer["params"])
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], 60)
            assert ready, "the browser does not answer"
            read = os.read(self._read, 1 << 20)
            assert read, "the browser ended"
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)
