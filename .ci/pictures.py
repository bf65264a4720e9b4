"""The pictures of the README: the status page, as light and as dark rooms show it.

`python3 test_llmswap.py pictures` writes them to .github; it needs Chromium.
"""

import base64
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from test_llmswap import (
    CHAT,
    HERE,
    Llmswap,
    Stream,
    chat_body,
    chromium,
    eventually,
    fake_file,
    row,
    rows_of,
    show_gpu,
    shown,
    slow_model,
)


FILE = """
[llmswap]
models-max = 4
[*]
idle-timeout = 30m
[qwen3-coder]
cmd = HEAVY 1420
alias = coder
description = 30B-A3B, 128k context
[gpt-oss-20b]
cmd = SLOW
description = Reasoning, low effort
[bge-m3]
cmd = HEAVY 610
description = Embeddings
pin = on
[gemma-3-27b]
cmd = FAKE --load 0.3 --load-exit 1
description = Vision
[whisper-large-v3]
cmd = FAKE
description = Speech to text
"""
# Holds so many MiB, and is the fake server.
BALLAST = """\
import runpy, sys
ballast = b"x" * (int(sys.argv[-1]) << 20)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
GPU = {"1420": 18842, "610": 1138}  # MiB by ballast
OPENCODE = {"User-Agent": "opencode/1.0.134", "X-Session-Id": "ses_5f1c"}
ROO = {"User-Agent": "RooCode/3.36.0"}
WEBUI = {"User-Agent": "OpenWebUI/0.6.41"}
REQUESTS = (  # headers that name the client, the model, wishes for its answer
    (ROO, "qwen3-coder", {"prompt_tokens": 11874, "talk": 1, "tokens": 96, "delay": 1.2}),
    ({"User-Agent": "curl/8.14.1"}, "gemma-3-27b", {}),
    (ROO, "qwen3-coder", {"prompt_tokens": 12411, "talk": 1, "tokens": 118}),
    ({"User-Agent": "aider/0.86.1"}, "qwen-coder", {}),
    (OPENCODE, "qwen3-coder", {"prompt_tokens": 8214, "talk": 2, "tokens": 64, "delay": 0.8}),
)


def write_pictures(folder, browser, url):
    """Look at the page in both colour schemes, and keep what is seen."""
    browser.call("Emulation.setScrollbarsHidden", hidden=True)
    for scheme in ("light", "dark"):
        browser.look(1280, scheme, height=820)
        browser.open(url)
        browser.until(shown(row("qwen3-coder"), "GiB"))
        browser.value("document.body.style.fontFamily = 'Liberation Sans'")
        browser.until(shown(row("gpt-oss-20b"), "%"))
        browser.until(shown("$('recent')", "Cancel"))
        png = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
        path = folder / f"status-{scheme}.png"
        path.write_bytes(png)
        print(f"{path}: {path.stat().st_size >> 10} KB")


@contextlib.contextmanager
def busy_llmswap(folder):
    """llmswap with models of all sorts, after some requests and within two."""
    (folder / "ballast.py").write_text(BALLAST)
    show_gpu(folder, "--ballast", GPU)
    heavy = f"{sys.executable} -IS {folder}/ballast.py {fake_file()}"
    text = FILE.replace("HEAVY", f"{heavy} --port ${{PORT}} --ballast")
    text = text.replace("SLOW", slow_model(folder, seconds=60))
    path = f"{folder}:{os.environ['PATH']}"
    with Llmswap(text, env={"PATH": path}) as server, server.connect() as waiting:
        for fields, model, wish in REQUESTS:
            body = chat_body(model, stream=True, interval=0.02, **wish)
            server.post(CHAT, body, fields)
        server.post("/v1/embeddings", {"model": "bge-m3", "input": "text"}, WEBUI)
        waiting.send("POST", CHAT, chat_body("gpt-oss-20b"), WEBUI)
        body = chat_body("qwen3-coder", stream=True, tokens=10**6, interval=0.02)
        with Stream(server.port, CHAT, body, OPENCODE) as stream:
            next(stream.events())
            eventually(lambda: rows_of(server)[1]["seconds"] > 5)
            yield server


def pictures_main(argv):
    """Write both pictures; the exit status."""
    target = HERE.with_name(".github")
    with tempfile.TemporaryDirectory() as name, chromium.Browser() as browser:
        with busy_llmswap(Path(name)) as server:
            write_pictures(target, browser, server.url)
    return 0
