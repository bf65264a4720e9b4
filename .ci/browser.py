"""A browser: headless Chromium, driven through its DevTools protocol."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
CHROMIUM_FLAGS = """\
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --remote-debugging-pipe
--disable-gpu-compositing --disable-software-rasterizer --in-process-gpu
--force-prefers-reduced-motion
""".split() + ["--host-resolver-rules=MAP *.test 127.0.0.1"]


class Browser:
    """Headless Chromium with one page, until the block ends.

    `complaints` are the errors on its page's console, and what its policy refused.
    """

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="llmswap-chromium-")
        (commands, self._commands), (self._results, results) = os.pipe(), os.pipe()
        fds = commands, results
        pipes = f'exec "$0" "$@" 3<&{commands} 4>&{results}'  # as Chromium wants them
        words = ["bash", "-c", pipes, CHROMIUM]
        words += [*CHROMIUM_FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        quiet = {"stdin": -3, "stdout": -3, "stderr": -3, "start_new_session": True}
        self._process = subprocess.Popen(words, pass_fds=fds, **quiet)
        for fd in fds:
            os.close(fd)
        self.complaints, self._session, self._received = [], {}, b""
        self._page = ""  # which was opened last
        self._numbers = itertools.count(1)
        deadline = time.monotonic() + 20
        while not (pages := self._pages()):
            assert time.monotonic() < deadline, "Chromium shows no page"
            time.sleep(0.02)
        target = {"targetId": pages[0]["targetId"], "flatten": True}
        session = self.call("Target.attachToTarget", **target)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands), os.close(self._results)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pages(self):
        targets = self.call("Target.getTargets")["targetInfos"]
        return [target for target in targets if target["type"] == "page"]

    def call(self, method, **params):
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = json.loads(self._receive())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _receive(self):
        while b"\0" not in self._received:
            piece = os.read(self._results, 1 << 16)
            assert piece, "Chromium has ended"
            self._received += piece
        message, _, self._received = self._received.partition(b"\0")
        return message

    def _note(self, event):
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(event["params"]["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded":
            entry = event["params"]["entry"]
            is_ours = self._page in entry.get("url", self._page)
            is_old = entry["source"] == "network" and not is_ours
            if entry["level"] == "error" and not is_old:
                self.complaints.append(entry["text"])

    def open(self, url):
        """Go to a page; it may not be complete yet. Old complaints are dropped, also
        those of its predecessor's connections that come later."""
        self._page = url
        self.call("Page.navigate", url=url)
        self.complaints.clear()

    def value(self, expression):
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, timeout=30.0):
        """The value of the expression as soon as it is true."""
        deadline = time.monotonic() + timeout
        while not (value := self.value(expression)):
            if time.monotonic() > deadline:
                seen = self.value("document.body.innerText")
                raise AssertionError(f"not within {timeout} s: {expression}\n{seen}")
            time.sleep(0.02)
        return value

    def press(self, key):
        """Press a key as a person does, on whatever has the focus."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}
        code, text = codes[key], {"Enter": "\r", " ": " "}.get(key)
        more = {"key": key, "windowsVirtualKeyCode": code}
        more["code"] = "Space" if key == " " else key
        if text:
            more["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown", **more)
        more.pop("text", None)
        self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    def type(self, text):
        """Type a text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, label):
        """Press Tab until the element of that name has the focus."""
        seen = []
        while (focus := self.value("document.activeElement.ariaLabel")) != label:
            assert len(seen) < 60, f"Tab does not lead to {label!r}, only to {seen}"
            seen.append(focus)
            self.press("Tab")

    def click(self, element):
        """Click on the middle of an element, as a person does, once it is there; again
        if it moved away meanwhile, as rows do when they change."""
        self.until(f"{element}?.checkVisibility()")
        watch = "addEventListener('click', () => { window.isHit = true; }, {once: true})"
        self.value(f"{{window.isHit = false; {element}.{watch}}}")
        box = f"{{const e = {element}; e.scrollIntoView({{block: 'center'}});"
        box += " const r = e.getBoundingClientRect();"
        for _ in range(5):
            x, y = self.value(f"{box} [r.x + r.width / 2, r.y + r.height / 2]}}")
            for kind in ("mousePressed", "mouseReleased"):
                how = {"x": x, "y": y, "button": "left", "clickCount": 1}
                self.call("Input.dispatchMouseEvent", type=kind, **how)
            if self.value("window.isHit"):
                break

    def look(self, width, scheme, height=800):
        """Be a screen of this width, in a `light` or a `dark` room."""
        size = {"height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
