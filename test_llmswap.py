#!/usr/bin/env python3
"""The tests of llmswap, with a client for them.

    python3 -m pytest test_llmswap.py      the tests; see .ci/run for what more they use
    pytest -n 6 --dist worksteal ...       the same by six workers of pytest-xdist
    python3 .ci/fake.py --port N           the fake model server that they spawn
    python3 test_llmswap.py bench          the benchmark; see bench --help
    python3 test_llmswap.py soak           random clients, kills and reloads
    python3 test_llmswap.py faults         each fault in each state, as a table
    python3 test_llmswap.py fuzz           mutated HTTP, read by llmswap and by h11
    python3 test_llmswap.py pictures       the README's, of the status page
"""

import ast
import atexit
import base64
import bisect
import collections
import contextlib
import errno
import functools
import graphlib
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import py_compile
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from llmswap import (
    ConfigError,
    RepairStream,
    ModelNotFound,
    repair_arguments,
    repair_body,
)
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import ANY, Mock

import llmswap


class Absent:
    """Stands for a library that is not there, and for what is taken from it."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self


try:
    import pytest
except ImportError:  # the commands do without it
    pytest = Absent()


# ==================================================================================
# The harness: a client, the fake server and llmswap itself, as a test wants them.
# ==================================================================================


HERE = Path(__file__).resolve()
CI = HERE.with_name(".ci")
LLMSWAP = os.environ.get("LLMSWAP") or str(HERE.with_name("llmswap.py"))
LLAMA_SERVER = os.environ.get("LLAMA_SERVER")  # a real one; without it, tests skip
with_llama_server = pytest.mark.skipif(not LLAMA_SERVER, reason="needs LLAMA_SERVER")
CHAT = "/v1/chat/completions"
FAMILY = "TEST_FAMILY"  # an environment variable by which a test knows its processes
SHARE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # of tests and ports
SHARES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


class BrokenAnswer(Exception):
    """The connection ended before the answer was complete."""


def load_tool(name):
    """A file of the folder .ci as a module; it may import from this one."""
    sys.modules.setdefault("test_llmswap", sys.modules[__name__])
    spec = importlib.util.spec_from_file_location(name, CI / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chromium, fake, forks, gguf, machines, recorder = map(
    load_tool, ("browser", "fake", "forks", "gguf", "machines", "recorder")
)

PYTHON = forks.PYTHON
recent_ports = collections.deque(maxlen=500)  # that free_port gave


def free_port():
    """A port without listener, below those that llmswap gives to model servers and the
    kernel to clients, above those that browsers refuse, not one of another share of
    the same tests, and none that was given a short while ago."""
    while True:
        port = random.randrange(6700 + SHARE, 10000, SHARES)
        if port in recent_ports:
            continue
        recent_ports.append(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def eventually(condition, timeout=20.0, every=0.01):
    """What `condition` returns once that is true; AssertionError after `timeout`."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {condition}"
        time.sleep(every)
    return result


class UpstreamResponse(NamedTuple):
    """A complete answer; names of headers in lower case."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)

    def message(self):
        return self.json()["error"]["message"]

    def content(self):
        return self.json()["choices"][0]["message"]["content"]


def encoded(body):
    """The bytes of a body: those given, those of a text, or JSON."""
    if body is None or isinstance(body, (bytes, bytearray, memoryview)):
        return body or b""
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def request_head(method, path, length, headers=()):
    """A request's head; `headers` are pairs, which replace the usual ones."""
    fields = {"Host": "127.0.0.1"}
    if length:
        fields["Content-Type"] = "application/json"
    if length or method in ("POST", "PUT", "PATCH"):
        fields["Content-Length"] = str(length)
    fields.update(headers)
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Client:
    """One connection, used for one request after the other; strict about framing."""

    def __init__(self, port, timeout=30.0):
        if isinstance(port, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(port)
        else:
            self.sock = socket.create_connection(("127.0.0.1", port), timeout)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(timeout)
        self.buffer = b""
        self.method = "GET"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hang_up()

    def hang_up(self, reset=False):
        if reset:
            reset_at_close(self.sock)
        self.sock.close()

    def send(self, method, path, body=None, headers=()):
        self.method, data = method, encoded(body)
        self.sock.sendall(request_head(method, path, len(data), headers) + data)

    def ask(self, method, path, body=None, headers=()):
        self.send(method, path, body, headers)
        return self.answer()

    def answer(self):
        status, headers = self.head()
        return UpstreamResponse(status, headers, b"".join(self.pieces(status, headers)))

    def head(self):
        """Status and headers of the next answer that is not a 100 Continue."""
        status = 100
        while status == 100:
            start, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            version, status = start.split(" ")[:2]
            assert version == "HTTP/1.1", start
            status = int(status)
        pairs = (line.split(":", 1) for line in lines)
        return status, {name.lower(): value.strip() for name, value in pairs}

    def pieces(self, status, headers):
        """Yield the body of the answer with this head as it comes, without framing."""
        if self.method == "HEAD" or status in (101, 204, 304):
            return
        if headers.get("transfer-encoding", "").lower() == "chunked":
            yield from self._chunks()
        elif "content-length" in headers:
            yield from self.exactly(int(headers["content-length"]))
        else:
            yield from self._rest()

    def exactly(self, count):
        """Yield the next `count` bytes in pieces as they come."""
        while count:
            if not self.buffer:
                self._receive()
            piece, self.buffer = self.buffer[:count], self.buffer[count:]
            count -= len(piece)
            yield piece

    def _until(self, mark):
        while (end := self.buffer.find(mark)) < 0:
            self._receive()
        piece, self.buffer = self.buffer[:end], self.buffer[end + len(mark) :]
        return piece

    def _receive(self):
        data = self.sock.recv(262144)
        if not data:
            raise BrokenAnswer(f"the connection ended after {self.buffer[-200:]!r}")
        self.buffer += data

    def _chunks(self):
        while size := int(self._until(b"\r\n").partition(b";")[0], 16):
            yield from self.exactly(size)
            assert self._until(b"\r\n") == b"", "a chunk is longer than its size"
        while self._until(b"\r\n"):
            pass

    def _rest(self):
        if self.buffer:
            yield self.buffer
        while piece := self.sock.recv(262144):
            yield piece


def reset_at_close(sock):
    """Let the connection end by a reset, not by a clean end."""
    linger = struct.pack("ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def ask(port, method, path, body=None, headers=(), timeout=30.0):
    with Client(port, timeout) as client:
        return client.ask(method, path, body, headers)


class Stream:
    """A request answered by server-sent events: its head at once, then its events."""

    def __init__(self, port, path, body=None, headers=(), timeout=30.0):
        self.client = Client(port, timeout)
        self.client.send("POST" if body is not None else "GET", path, body, headers)
        self.status, self.headers = self.client.head()
        self.raw = b""  # everything that came, comments too
        self.is_complete = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.client.hang_up()

    def events(self):
        """Yield the data of each event; BrokenAnswer if the stream was cut."""
        rest = b""
        for piece in self.client.pieces(self.status, self.headers):
            self.raw += piece
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                lines = [line for line in block.split(b"\n") if line[:5] == b"data:"]
                if lines:
                    yield b"\n".join(line[5:].strip() for line in lines).decode()
        if rest.strip():
            raise BrokenAnswer(f"the stream ended within an event: {rest!r}")
        self.is_complete = True

    def documents(self):
        for event in self.events():
            if event != "[DONE]":
                yield json.loads(event)

    def text(self):
        """The content of all chunks of a chat, joined; "[DONE]" must have come."""
        choices = (each["choices"] for each in self.documents() if each.get("choices"))
        pieces = [choice[0]["delta"].get("content") or "" for choice in choices]
        assert b"data: [DONE]" in self.raw, self.raw[-300:]
        return "".join(pieces)


# ----------------------------------------------------------------------------------
# Processes


@lru_cache(maxsize=None)
def compiled(path, name):
    """The path of this Python file's bytecode, so that no start compiles it."""
    folder = tempfile.mkdtemp(prefix=f"{name}-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return py_compile.compile(path, os.path.join(folder, f"{name}.pyc"), doraise=True)


def llmswap_file():
    return compiled(LLMSWAP, "llmswap")


def fake_file():
    """The fake server, compiled: it starts in 15 ms."""
    return compiled(CI / "fake.py", "fake")


def run_llmswap(*words, env=os.environ):
    """What llmswap does with these arguments until it ends, as subprocess.run tells."""
    args = [*PYTHON, llmswap_file(), *map(str, words)]
    return forks.run(args, {**env}, os.path.dirname(llmswap_file()))


def install_llmswap(folder):
    """Copy it there, with its bytecode, as its first start as a module leaves it."""
    source = Path(shutil.copy2(LLMSWAP, Path(folder) / "llmswap.py"))
    cached = Path(importlib.util.cache_from_source(source))
    cached.parent.mkdir()
    shutil.copy(llmswap_file(), cached)


def llmswap_words(constants):
    """The arguments with which Python runs llmswap, with these constants."""
    if not constants:
        return [llmswap_file()]
    path = f"import sys; sys.path.insert(0, {os.path.dirname(llmswap_file())!r})"
    sets = "; ".join(f"l.{name} = {value!r}" for name, value in constants.items())
    return ["-c", f"{path}; import llmswap as l; {sets}; sys.exit(l.main())"]


def fake_command(*flags, port="${PORT}"):
    """The value of `cmd` for a fake server with these flags."""
    words = [*PYTHON, fake_file(), "--port", port]
    return " ".join([*words, *map(str, flags)])


def fake_binary(folder, *flags, name="llama-server"):
    """An executable in `folder` that takes llama-server's options and is the fake."""
    words = f"{sys.executable} -I -S {fake_file()} {' '.join(map(str, flags))}"
    return executable(Path(folder) / name, f'exec {words} "$@"')


def executable(path, script):
    """Write a shell script that can be run; return its path."""
    fresh = path.with_suffix(".new")
    fresh.write_text(f"#!/bin/sh\n{script}\n")
    fresh.chmod(0o755)
    fresh.replace(path)  # which may run just now
    return str(path)


def family(token):
    """{pid: command line} of the living processes that carry this token, in their
    environment or, where another user's cannot be read, as an argument."""
    mark, commands = f"{FAMILY}={token}\0".encode(), {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            words = _read_proc(entry, "cmdline")
            if mark in words or mark in _read_proc(entry, "environ"):
                commands[int(entry)] = words.replace(b"\0", b" ").decode().strip()
    return commands


def _read_proc(pid, name):
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)  # half the cost of a file object
    try:
        return b"".join(iter(functools.partial(os.read, fd, 1 << 16), b""))
    finally:
        os.close(fd)


def zombies_of(pid):
    """The pids of the dead children that process `pid` has not reaped."""
    pids = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = _read_proc(entry, "stat").rpartition(b")")[2].split()[:2]
            if state == b"Z" and int(parent) == pid:
                pids.append(int(entry))
    return pids


class Fake:
    """A fake server on a port of its own; within a block, it runs."""

    def __init__(self, *flags, env=None):
        self.port = free_port()
        self._command = fake_command(*flags, port=str(self.port)).split()
        self._env = env
        self.process = None

    def __enter__(self):
        self.on()
        eventually(lambda: is_listening(self.port))
        return self

    def __exit__(self, *_):
        self.off()

    def on(self):
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(
            self._command, env=self._env, stdout=null, stderr=null,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def off(self):
        if self.process:
            os.killpg(self.pid, signal.SIGKILL)  # not reaped: the pid is its own
            self.process.wait()
            self.process = None

    def is_ready(self):
        with contextlib.suppress(OSError):
            return self.ask("GET", "/health").status == 200

    def ask(self, method, path, body=None, headers=()):
        return ask(self.port, method, path, body, headers)

    def stats(self):
        return self.ask("GET", "/stats").json()


def is_listening(port):
    """Whether a process accepts connections on this port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


class Llmswap:
    """llmswap on an INI file, in a folder of its own, until the block ends.

    The end is a SIGTERM, after which it must exit with status 0 and leave no process;
    a test that ends it otherwise calls `kill` or waits for `process` itself.
    `FAKE` in the text stands for the command of a fake server with a journal, `GATE`
    for the file `gate`; `constants` replace those of llmswap.py.
    """

    def __init__(self, text, *args, env=None, **constants):
        self.folder = Path(tempfile.mkdtemp(prefix="llmswap-test-"))
        self.ini = self.folder / "test.ini"
        self.gate = self.folder / "gate"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = f"{os.getpid()}-{self.port}"
        self.unread = []  # kept open
        self._args = [*PYTHON, *llmswap_words(constants), str(self.ini)]
        self._args += ["--listen", f"127.0.0.1:{self.port}", *args]
        self._env = {**os.environ, FAMILY: self.token, **(env or {})}
        self.write(text)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, kind, *_):
        try:
            self._end(is_failing=kind is not None)
        except BaseException:
            self._kill_family()
            raise
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_family(self):
        for pid in family(self.token):
            os.kill(pid, signal.SIGKILL)

    def start(self):
        with open(self.folder / "stderr", "ab") as stderr:
            place = os.path.dirname(llmswap_file())
            self.process = forks.start(self._args, self._env, [stderr, stderr], place)
        self.pid = self.process.pid
        eventually(self._is_up, 30)

    def _is_up(self):
        assert self.process.poll() is None, f"it ended at its start:\n{self.log()}"
        return is_listening(self.port)

    def _end(self, is_failing):
        if self.process.poll() is None:
            self.process.terminate()
            status = self.process.wait(45)
            assert is_failing or status == 0, f"exit status {status}:\n{self.log()}"
        if is_failing:
            return self._kill_family()
        eventually(lambda: not family(self.token), 6)
        assert "Traceback" not in self.log(), self.log()

    def kill(self):
        """SIGKILL, as the kernel or a careless person sends it."""
        self.process.kill()
        self.process.wait()

    def write(self, text):
        """Write the INI file, FAKE and GATE replaced."""
        fake = fake_command("--journal", str(self.folder / "journal"))
        fresh = self.ini.with_suffix(".new")
        fresh.write_text(text.replace("FAKE", fake).replace("GATE", str(self.gate)))
        fresh.replace(self.ini)  # atomic

    def reload(self, text):
        self.write(text)
        self.process.send_signal(signal.SIGHUP)

    def log(self):
        """What it wrote to stdout and stderr so far."""
        path = self.folder / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    def journal(self, event=None, model=None):
        """The events of its fake servers so far, of this kind and model (None: all)."""
        path = self.folder / "journal"
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines]
        events = [each for each in events if event in (None, each["event"])]
        return [each for each in events if model in (None, each["model"])]

    def ask(self, method, path, body=None, headers=(), timeout=30.0):
        return ask(self.port, method, path, body, headers, timeout)

    def get(self, path, headers=()):
        return self.ask("GET", path, None, headers)

    def post(self, path, body=None, headers=()):
        return self.ask("POST", path, body, headers)

    def chat(self, model, **wish):
        """The answer to a chat request; `wish` as the fake server understands it."""
        return self.post("/v1/chat/completions", chat_body(model, **wish))

    def stream(self, model, **wish):
        """A streamed chat; `wish` as the fake server understands it."""
        body = chat_body(model, stream=True, **wish)
        return Stream(self.port, "/v1/chat/completions", body)

    def connect(self, timeout=30.0):
        return Client(self.port, timeout)

    def states(self):
        """{model: state} as /v1/models tells it."""
        data = self.get("/v1/models").json()["data"]
        return {model["id"]: model["status"]["value"] for model in data}

    def loaded(self):
        return sorted(n for n, state in self.states().items() if state == "loaded")

    def stats(self, model):
        """What the fake server of a model has seen (it is loaded if it is not)."""
        return self.get(f"/upstream/{model}/stats?autoload=true").json()


def chat_body(model, **wish):
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": model, "messages": messages, **wish}


def cpu_seconds(pid):
    """Processor seconds that a process has used, its ended threads included."""
    return time.clock_gettime((~pid << 3) | 2)  # its CPU clock, as the kernel names it


def wakeups(pid):
    """Voluntary context switches of the threads of a process so far."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    counts = re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", "".join(texts))
    return sum(map(int, counts))


def soak_size(pid):
    """Threads, descriptors and resident MB of a process."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {
        "threads": int(fields["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "resident": int(fields["VmRSS"].split()[0]) // 1024,
    }


def word_after(argv, name, default):
    """The word after `name`, or the default."""
    return argv[argv.index(name) + 1] if name in argv else default


# ==================================================================================
# 0  The file itself: its sections, its README, its example.
# ==================================================================================

BANNER = re.compile(r"^# ={82}\n# (\d+)  (\w[\w ]*): .*", re.MULTILINE)
FOREIGN_NAMES = {  # by section: names that it never uses
    "Errors": "threading socket subprocess time os",
    "Configuration": "threading socket subprocess time select signal",
    "Scheduling": "threading socket subprocess time os select signal Config Model",
    "Backends": "Scheduler Pool Handler Reply Request Condition",
    "Pool": "socket http Handler Reply Request select subprocess",
    "Relay": "Config Model Pool Scheduler subprocess Handler",
    "Repair": "socket Request Reply Model Config Pool Handler http",
    "Pages": "socket Handler Pool Scheduler subprocess threading",
    "API": "Scheduler subprocess Popen",
    "Command line": "",
}
SOURCE = Path(LLMSWAP).read_text()


@lru_cache(maxsize=None)
def source_tree():
    return ast.parse(SOURCE)


def source_sections():
    """{name: its nodes} of each section of llmswap.py, in order."""
    banners = [*BANNER.finditer(SOURCE)]
    assert [int(banner[1]) for banner in banners] == [*range(1, 11)]
    sections = {banner[2]: [] for banner in banners}
    starts = [SOURCE.count("\n", 0, banner.start()) for banner in banners]
    names = [None, *sections]
    sections[None] = []  # what stands above them all
    for node in source_tree().body:
        sections[names[bisect.bisect(starts, node.lineno)]].append(node)
    del sections[None]
    return sections


def test_sections_stand_in_their_order_and_know_only_what_they_may():
    sections = source_sections()
    assert [*sections] == [*FOREIGN_NAMES]
    below = {  # functions and classes; other nodes have no name
        getattr(node, "name", None)
        for nodes in sections.values() for node in nodes
    }
    for section, nodes in sections.items():
        below -= {getattr(node, "name", None) for node in nodes}
        used = {name for node in nodes for name in names_from_outside(node)}
        assert not used & below, f"{section} uses what stands below"
        walked = [each for node in nodes for each in ast.walk(node)]
        names = {getattr(each, "id", getattr(each, "attr", None)) for each in walked}
        assert not names & set(FOREIGN_NAMES[section].split()), section


def names_from_outside(node):
    """The names that the code uses and does not itself give a value."""
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    own = {each.id for each in names if not isinstance(each.ctx, ast.Load)}
    own |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
    return {each.id for each in names} - own


def test_private_attributes_are_used_by_their_own_class_only():
    public = r"__\w+__|_exit|_replace|_asdict"
    for node in ast.walk(source_tree()):
        if isinstance(node, ast.Attribute) and node.attr[0] == "_":
            owner = getattr(node.value, "id", None) or ast.unparse(node.value)
            is_own = owner in ("self", "cls", "super()", "Handler")
            assert is_own or re.fullmatch(public, node.attr), node.lineno


def test_functions_and_lines_are_short_and_imports_are_of_the_standard_library():
    assert max(map(len, SOURCE.splitlines())) <= 88
    modules = []
    for node in ast.walk(source_tree()):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name
        elif isinstance(node, ast.Import):
            modules += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module.partition(".")[0])
    if sys.version_info >= (3, 10):
        assert set(modules) <= sys.stdlib_module_names


README = HERE.with_name("README.md")
PAGES = [README, HERE.with_name(".github") / "recipes.md"]


def section(title):
    """What stands under the heading that begins so, in the README or the recipes."""
    text = "".join(page.read_text() for page in PAGES)
    pattern = rf"^###? {re.escape(title)}.*\n((?:(?!##).*\n)*)"
    sections = re.findall(pattern, text, re.MULTILINE)
    assert len(sections) == 1, f"{len(sections)} sections begin with {title!r}"
    return sections[0]


def anchors(page):
    """What GitHub makes of the headings of a page, to be linked to."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]


@pytest.mark.parametrize("page", PAGES, ids=["readme", "recipes"])
def test_links_lead_to_files_and_headings_that_exist(page):
    text = page.read_text()
    assert max(map(len, text.splitlines())) <= 100
    links = re.findall(r"\]\(([^)]+)\)|\b(?:src|srcset)=\"([^\"]+)\"", text)
    links = ["".join(pair) for pair in links]
    inner = [each for each in links if not each.startswith("https://")]
    for link in inner:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    names = {(page.parent / each.partition("#")[0]).resolve() for each in inner}
    assert {each.resolve() for each in PAGES} - {page.resolve()} <= names


def test_all_keys_are_printed_and_those_that_the_readme_names_exist():
    printed = run_llmswap("--keys").stdout
    keys = llmswap.PROXY_KEYS + llmswap.MODEL_KEYS
    for key in keys:
        text = " ".join(f"{key.name} = {key.default} {key.help}".split())
        assert text.replace("`", "") in " ".join(printed.split())
    table = README.read_text().partition("The keys that most")[2].partition("Durations")[0]
    named = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = re.findall(r"`([^`]+)`", " ".join(named))
    lines = section("Coming from llama-swap").splitlines()
    ours = [line.split("|")[-2] for line in lines if line[:3] == "| `"]
    translated = re.findall(r"`([a-z][a-z-]+)(?: = [^`]*)?`", "".join(ours))
    assert len(names) > 9 and len(translated) > 15
    assert {*names, *translated} <= {key.name for key in keys} | {"ttl"}


def test_the_example_and_every_file_of_the_pages_give_no_warnings(tmp_path):
    pages = "".join(page.read_text() for page in PAGES)
    files = re.findall(r"^```ini\n(.*?)^```$", pages, re.MULTILINE | re.DOTALL)
    assert len(files) > 8
    for text in (*files, HERE.with_name("example.ini").read_text()):
        (tmp_path / "x.ini").write_text(text)
        config = llmswap.load_config(str(tmp_path / "x.ini"))
        problems = [model.problem for model in config.models.values() if model.problem]
        assert [*config.warnings, *problems] == [], text


def test_only_the_tests_need_pytest():
    run = "import sys; sys.modules['pytest'] = None; import test_llmswap as t"
    words = [sys.executable, "-c", f"{run}; t.main(['bench', '--help'])"]
    pipe = subprocess.PIPE
    done = subprocess.run(words, cwd=HERE.parent, stdout=pipe, stderr=pipe, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "test_llmswap.py bench" in done.stdout


@pytest.mark.parametrize(
    "section, keys", [("*", llmswap.MODEL_KEYS), ("llmswap", llmswap.PROXY_KEYS)]
)
def test_the_example_shows_every_key_once_at_its_default(section, keys):
    text = HERE.with_name("example.ini").read_text()
    manual = text.partition(f"\n[{section}]\n")[2].partition("\n[")[0]
    shown = re.findall(r"((?:^; .*\n)+);?([\w.-]+) =(.*)\n", manual, re.MULTILINE)
    overrides = {"idle-timeout": "15m"}  # so that the example gives back memory
    for (help, name, value), key in itertools.zip_longest(shown, keys):
        assert name == key.name and value.strip() == overrides.get(name, key.default)
        text = " ".join(line[2:] for line in help.splitlines())
        assert text == key.help.replace("`", "")


# ==================================================================================
# 1  Errors: every failure, with its HTTP status.
# ==================================================================================


@pytest.mark.parametrize("kind, expected", [
    (llmswap.QueueFull, (503, "queue_full", 5, None)),
    (llmswap.QueueTimeout, (503, "queue_timeout", 5, None)),
    (llmswap.ShuttingDown, (503, "shutting_down", 5, None)),
    (llmswap.ModelUnloaded, (503, "model_unloaded", None, False)),
    (llmswap.ModelMisconfigured, (500, "model_unusable", None, False)),
    (llmswap.LoadTimeout, (504, "model_load_timeout", None, False)),
])
def test_an_error_says_whether_and_when_to_try_again(kind, expected):
    error = kind("no")
    assert (error.status, error.code, error.retry_after, error.may_retry) == expected


# ==================================================================================
# 2  Configuration: from text to frozen values.
# ==================================================================================


def read(tmp_path, text, environ={}, **overrides):
    """Return the Config of a file with this text, called m.ini."""
    path = tmp_path / "m.ini"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    cwd = os.getcwd()
    os.chdir(tmp_path)
    try:
        return llmswap.load_config("m.ini", environ=environ, **overrides)
    finally:
        os.chdir(cwd)


def options(model, table=None):
    """Return a model's llama-server options, without those the router would add."""
    return without_router_options(model.command(table or OPTIONS, 1))


def without_router_options(argv):
    model_options, words = [], iter(argv[1:])
    for word in words:
        if word in ("--host", "--port", "--alias", "--log-colors"):
            next(words)
        else:
            model_options.append(word)
    return model_options


# Like the output of llama-server --help, with many unused options.
HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-c,    --ctx-size N                     size of the prompt context
                                        (env: LLAMA_ARG_CTX_SIZE)
--keep N                                number of tokens to keep
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
-kvo,  --kv-offload, -nkvo, --no-kv-offload
                                        whether to enable KV cache offloading
                                        (env: LLAMA_ARG_KV_OFFLOAD)
--no-host                               bypass host buffer
                                        (env: LLAMA_ARG_NO_HOST)
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM
--lora FNAME                            path to LoRA adapter
-m,    --model FNAME                    model path to load
-hft,  --hf-token TOKEN                 Hugging Face access token
                                        (env: HF_TOKEN)
--log-colors [on|off|auto]              Set colored logging
-s,    --seed SEED                      RNG seed
--temp, --temperature N                 temperature (default: 0.80)
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding
-mm,   --mmproj FILE                    path to a multimodal projector file
--mmproj-auto, --no-mmproj, --no-mmproj-auto
                                        whether to use multimodal projector file
-a,    --alias STRING                   set model name aliases
--host HOST                             IP addresses to listen on
--port PORT                             port to listen (default: 8080)
--ui,  --webui, --no-ui, --no-webui     whether to enable the Web UI
--embedding, --embeddings               restrict to embedding use case
--api-key KEY                           API key to use for authentication
--ssl-cert-file FNAME                   path to file a PEM-encoded SSL certificate
--models-max N                          for router server
--jinja, --no-jinja                     whether to use jinja template engine
                                        (env: LLAMA_ARG_JINJA)
--chat-template JINJA_TEMPLATE          set custom jinja chat template
""" + "".join(f"--filler-{number} N\n" for number in range(150))
OPTIONS = llmswap.parse_help(HELP)


# ---- Values ----------------------------------------------------------------------


@pytest.mark.parametrize("key, values, malformed", [
    ("queue-timeout",
     {"90": 90, "90s": 90, "15m": 900, "1h30m": 5400, "1.5h": 5400, "250ms": 0.25,
      "0": 0, "99999999d": 100 * 365 * 86400},
     ["", "soon", "1.", ".5", "-1", "1h30", "1 h", "1e3", "٣s", "9" * 400, "10M"]),
    ("patience", {"auto": None, "5s": 5}, ["", "never"]),
    ("max-body",
     {"512M": 512 * 2**20, "18G": 18 * 2**30, "1.5T": 1.5 * 2**40, "18 GiB": 18 * 2**30,
      "18gb": 18 * 2**30, "7": 7},
     ["", "G", "-1G", "1X", "1GG", "1,5G", "1\u212a", "9" * 400]),
    ("keep-loaded", {"ON": True, "yes": True, "enabled": True, "0": False, "No": False},
     ["", "maybe", "2", "onn"]),
    ("pin", {"ON": True, "0": False, "loaded": "loaded"}, ["", "loaded on", "unload"]),
    ("concurrency", {"0": 0, "12": 12}, ["", "-1", "1.5", "one", "1_0", "٣", "9" * 20]),
    ("oom-score-adj", {"-1000": -1000, "7": 7},
     ["", "1001", "-1001", "9999", "1.5", "--1"]),
    ("alias", {"a, b,,a , c": ("a", "b", "c")}, []),
    ("needs", {"vram\t18G,ram  4, x 1": {"vram": 18 * 2**30, "ram": 4, "x": 1}, "": {}},
     ["vram", "vram 1G, vram 2G", "18G", "vram 1X", "v=1"]),
    ("budget", {"auto": {"vram": None, "ram": None}, "vram auto, gpu 1": {
        "vram": None, "gpu": 1}}, ["gpu0 auto", "auto, ram 4G", "vram auto, vram 4G"]),
    ("sets", {"a + b, c+b": (("a", "b"), ("c", "b")), "": ()}, []),
    ("set-params", {'{"a": {"b": 1}}': {"a": {"b": 1}}, "": {}},
     ["[1]", "1", "{", '{"a": NaN}', "{'a': 1}", "null"]),
    ("listen",
     {"127.0.0.1:8080": (("127.0.0.1", 8080),), "box.lan:0": (("box.lan", 0),),
      "[::1]:80, unix:/run/a.sock": (("::1", 80), "/run/a.sock")},
     ["", ",", "8080", ":8080", "h:99999", "::1:80", "[::1]", "http://h:1", "unix:",
      "h:x", "a b:1"]),
    ("check-endpoint", {"/v1/health": "/v1/health", "none": None},
     ["", "health", "/a b", "None"]),
    ("sleep",
     {"POST /sleep?level=1": (("POST", "/sleep?level=1", ""),), "": (),
      "/wake_up": (("POST", "/wake_up", ""),),
      'POST /a {"b": ["c, d"]},/e , GET /f': (
          ("POST", "/a", '{"b": ["c, d"]}'), ("POST", "/e", ""), ("GET", "/f", ""))},
     ["sleep", "post /x", "POST", "POST sleep", "/a /b", '/a {"b"', '/a {} {}', "/a,,/b"]),
    ("wake-mac",
     {"ab:cd:EF:01:23:45": bytes.fromhex("abcdef012345"), "": None,
      "ab-cd-ef-01-23-45": bytes.fromhex("abcdef012345")},
     ["ab:cd:ef:01:23", "ab:cd:ef:01:23:45:67", "abcdef012345", "gb:cd:ef:01:23:45"]),
    ("proxy", {"https://h:1/base": "https://h:1/base"},
     ["", "h:1", "ftp://h", "http://", "http://h/a b", "http://h:80800", "http://h:0",
      "http://[::1:80", "http://:80"]),
    ("allowed-hosts", {"My-Box, b": ("my-box", "b"), "*": ("*",)}, ["*.b", "http://b"]),
    ("cors-origins", {"*": ("*",), "http://A/, null": ("http://a", "null")}, ["http://"]),
    ("loading-notice", {"OFF": "off"}, ["", "on"]),
])
def test_values_are_read_and_malformed_ones_refused(key, values, malformed):
    parse = {**llmswap.PROXY_KEY, **llmswap.MODEL_KEY}[key].parse
    assert {text: parse(text) for text in values} == values
    for text in malformed:
        with pytest.raises(ValueError):
            parse(text)


# ---- The INI language of llama.cpp -------------------------------------------------


@pytest.mark.parametrize("text, sections", [
    ("", {}), ("[a]\r\nc = 1\r\n", {"a": {"c": "1"}}),
    ("[a]\rc = 1\rd = 2", {"a": {"c": "1", "d": "2"}}),
    ("[a] ; x\n; c = 1\n  # c = 2\n\t\n[b]# comment", {"a": {}, "b": {}}),
    ("[ a b ]\n[x#y;z]\n[c\nd]", {"a b ": {}, "x#y;z": {}, "c\nd": {}}),
    ("[a]\nc\t = \t1 \t\nd=\ne = ", {"a": {"c": "1", "d": "", "e": ""}}),
    # a comment begins at any ; or #, and nothing is quoted or escaped
    ("[a]\nc = top_k;top_p\nd = /m/a#1\ne = /m/a  ; why\nf = ;\ng = {\"x\":\"a#b\"}",
     {"a": {"c": "top_k", "d": "/m/a", "e": "/m/a", "f": "", "g": "{\"x\":\"a"}}),
    ("[a]\nc = \"a b\"\nd = a\\\ne = a.b=bool:false\nt = é\u2028\x85\x0b\x0cé",
     {"a": {"c": "\"a b\"", "d": "a\\", "e": "a.b=bool:false",
            "t": "é\u2028\x85\x0b\x0cé"}}),
    ("[a]\nc = 1\nc = 2\n[b]\n[a]\nd = 2\nd = 3", {"b": {}, "a": {"d": "3"}}),
    ("version = 1\nc = 1\n[default]\nd = 1\n[a]\nversion = 2",
     {"default": {"d": "1"}, "a": {}}),
    ("c = 1\n[a]", {"default": {"c": "1"}, "a": {}}),
    # unambiguous texts that llama.cpp refuses
    ("  [a]\n  c = 1", {"a": {"c": "1"}}), ("\ufeff[a]\nc = 1", {"a": {"c": "1"}}),
    ("[a]\n--ctx-size = 1\n-c = 2", {"a": {"ctx-size": "1", "c": "2"}}),
    # values of llmswap's own keys
    ("[a]\ncmd = serve #1; x \\", {"a": {"cmd": "serve #1; x"}}),
    ("[a]\nextra-args = --x a;b # c", {"a": {"extra-args": "--x a;b # c"}}),
    ("[a]\nset-params = {\"a\": \"; #\"}", {"a": {"set-params": '{"a": "; #"}'}}),
    ("[a]\ndescription = it's C#; really ; a\t# b",
     {"a": {"description": "it's C#; really"}}),
    ("[a]\nttl = 5 ; five\nalias = a#b\nstop-timeout = 5;x",
     {"a": {"idle-timeout": "5", "alias": "a", "stop-timeout": "5"}}),
])
def test_sections_are_read(text, sections):
    parsed = llmswap.parse_presets(text.encode(), "m.ini", print)
    assert [*parsed] == [*sections]
    for name, section in parsed.items():
        settings = section.settings.values()
        assert {each.key: each.text for each in settings} == sections[name]


@pytest.mark.parametrize("text, message", [
    ("[a]\nmodel: x", "2: 'model: x' is neither [section], key = value nor a comment"),
    ("[a]\njinja\n", "2: "), ("[a] junk\n", "1: "), ("\n\n[]\n", "3: "),
    ("[ ]\n", "1: "), ("[a]\n9 = 1\n", "2: "), ("[a]\r\n\r\n= 1", "3: "),
    ("[a\n", "1: "), ("[a]\nc d = 1", "2: "), ("[a]\n---c = 1", "2: "),
    (b"[a]\nc = \xff", "2: 'c = \\udcff' is neither [section], "),
    ("[a]\nc = 1".encode("utf-16-le"), "1: "),
    *[(f"[*]\n{key} = x", f"2: [*] {key}: cannot be given")
      for key in ("cmd", "unit", "proxy", "uses", "alias", "a")],
    *[(f"[llmswap]\n{line}", f"2: [llmswap] {message}") for line, message in (
        ("models-max = many", "models-max: 'many' is not a whole number"),
        ("listen = 8080", "listen: '8080' is not an address such as 127.0.0.1:8080"),
        ("lissen = x", "lissen: unknown key; did you mean listen?"),
        ("idle-timeout = 5", "idle-timeout: belongs to a model, or in [*]"),
        ("patience = ${env.NONE}", "patience: ${env.NONE} is unknown here"),
        ("patience = ${NONE}", "patience: ${NONE} is unknown here"),
        ("api-key = ${env.EMPTY}", "api-key: there is no key"),
        ("api-key = ${k}\n[macros]\nk =", "api-key: there is no key"),
        ("api-key-file = /dev/null", "api-key-file: there is no key"),
        ("cors-origins = a.example", "cors-origins: 'a.example' is not localhost, *"),
        ("allowed-hosts = a:8080", "allowed-hosts: 'a:8080' is not a host name"),
        ("sets = nobody", "sets: there is no model"),
        ("sets = a +\n[a]\nm = x", "sets: there is no model ''"),
        ("default-model = nobody", "default-model: there is no model 'nobody'"),
        ("api-key-file = /nowhere/keys", "api-key-file: [Errno 2]"),
        ("idle-command = 'x", "idle-command: No closing quotation"),
        ("idle-command = x ${env.QUOTE}", "idle-command: No closing quotation"))],
])
def test_mistakes_that_stop_the_start_name_their_place(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, {"QUOTE": "'", "EMPTY": ""})
    assert str(caught.value).startswith(f"m.ini:{message}")


def test_any_bytes_are_read_or_refused():
    chance = random.Random(7)
    words = (b"[ ] [a] [b] [*] [llmswap] [macros] = ; # $ ${ } PORT ' \" \\ , - _ 1 c "
             b"m cmd uses proxy alias listen env.A \xc3\xa9 \xff \0").split(b" ")
    words += [b"\n", b"\n", b"\r", b" ", b"\t"]
    for _ in range(2000):
        data = b"".join(chance.choice(words) for _ in range(chance.randrange(30)))
        try:
            config = llmswap.ConfigLoader(data, "m.ini", {}).load({})
        except ConfigError as error:
            assert str(error).startswith("m.ini:")
        else:
            assert all(config.resolve(name) is model
                       for name, model in config.models.items())


@pytest.mark.parametrize("name, canonical", [
    ("qwen3:8b", "qwen3:8B"), ("u/r:q4_k_m", "u/r:Q4_K_M"), ("m:a-b-c", "m:C"),
    ("u/r:UD-Q4_K_XL", "u/r:Q4_K_XL"), ("m:thinking-high", "m:HIGH"), ("m:v1.5", "m:5"),
    ("m:latest", "m:LATEST"), ("a:b:c", "a:b:C"), ("m:x y", "m:X Y"), ("m:é", "m:é"),
    ("m:", "m:"), ("plain", "plain"), ("m:a-", "m:A-"), ("m:-aſ", "m:-Aſ"),
])
def test_canonical_names_are_llama_cpps(name, canonical):
    assert llmswap.canonical_name(name) == canonical


# ---- Files, with expressions over their models and the expected values --------------

MEANINGS = [
    # lines indented deeper than `cmd` continue it
    ("""
     [a]
     cmd = docker run --rm \\
         -p ${PORT}:80   ; literal \\
         # a remark
       --name 'x  y'

       idle-timeout = 5
     [b]
     cmd =
         serve
         --port ${PORT}
     pin = on
     """, {
        "argv(a)": ["docker", "run", "--rm", "-p", "7:80", ";", "literal", "--name",
                    "x  y"],
        "a.settings.idle_timeout": 5,
        "argv(b)": ["serve", "--port", "7"],
        "b.settings.pin": True,
    }),
    # other spellings of keys
    *[(f"[a]\nm = x\n{line}", {"a.settings.idle_timeout": 60})
      for line in ("idle_timeout = 1m", "ttl = 60", "--idle-timeout = 60")],
    # macros may hold macros and variables, but not themselves
    ("""
     [macros]
     base = serve --port ${PORT} ${who}  ; a remark
     who  = --name ${MODEL_ID} --key ${env.KEY}
     loop = ${loop}
     two  = second
     [a]
     cmd = ${base} $${x} ${ $A
     [b]
     cmd = ${loop}
     [c]
     model = ${env.KEY}/${MODEL_ID}.gguf
     [llmswap]
     api-key = ${env.KEY}, ${two}
     """, {
        "argv(a)": ["serve", "--port", "7", "--name", "a", "--key", "k ${PORT}", "${x}",
                    "${", "$A"],
        "b.problem": "m.ini:10: [b] cmd: ${loop} is unknown here; $${ is a literal ${",
        "options(c)": ["--model", "k ${PORT}/c.gguf"],
        "config.api_keys": ("k ${PORT}", "second", "four"),
    }),
    ("[macros]\nhere = http://h:${PORT}\n[*]\nm = x\n[a]\nproxy = ${here}", {
        "a.kind": "llama-server", "a.url(8)": "http://h:8"}),
    # without macros a dollar in an option of llama-server is literal
    ("[a]\nm = ${PORT}$${x}", {"options(a)": ["--model", "${PORT}$${x}"]}),
    # port and pid are filled in when they are known
    ("""
     [a]
     cmd      = serve
     cmd-stop = stop --pid ${PID} --port ${PORT} '${MODEL_ID}'
     proxy    = http://127.0.0.1:${PORT}/base/
     env.OLLAMA_HOST = 127.0.0.1:${PORT}
     """, {
        "a.problem": None,
        "argv(a)": ["serve"],
        "a.stop_command(8, 9)": ["stop", "--pid", "9", "--port", "8", "a"],
        "a.url(8)": "http://127.0.0.1:8/base",
        "a.environment(8)": {"OLLAMA_HOST": "127.0.0.1:8"},
    }),
    # every section overrides [*], wherever it stands
    ("[a]\nctx-size = 1\n[*]\nc = 2\nkeep = 3\nno-jinja = on\n[b]\njinja = on", {
        "options(a)": ["--no-jinja", "--keep", "3", "--ctx-size", "1"],
        "options(b)": ["--jinja", "--keep", "3", "--ctx-size", "2"],
    }),
    # host, port and alias are set where the router sets them
    ("[a]\nhost = 0.0.0.0\nm = x\nembedding = on", {
        "argv(a)": ["llama-server", "--embeddings", "--host", "127.0.0.1",
                    "--log-colors", "off", "--port", "7", "--alias", "a",
                    "--model", "x"],
    }),
    ("[a]\nmodel = ~/x\nmmproj = a~b", {
        "options(a)": ["--model", os.path.expanduser("~/x"), "--mmproj", "a~b"]}),
    # without a table, unknown options pass as written with their values
    ("[a]\nmodel = x\nnew_one = on\njinja = off", {
        "options(a, UNKNOWN)": ["--jinja", "off", "--model", "x", "--new-one", "on"],
    }),
    # the kind is decided by a model's own section
    ("""
     [*]
     m = default.gguf
     [a]
     [b]
     cmd = serve ${PORT}
     [c]
     unit  = c.service
     proxy = http://h:1
     [d]
     proxy = http://h:1
     [e]
     uses = A
     [f]
     proxy = http://127.0.0.1:${PORT}/prefix
     [g]
     uses = d, nowhere, A
     [nowhere]
     unit = x
     """, {
        "[each.kind for each in models]": [
            "llama-server", "cmd", "unit", "remote", "uses", "llama-server", "uses",
            "unit"],
        "[bool(each.problem) for each in models]": [False] * 7 + [True],
        "[each.backends for each in models][:7]": [
            ("a",), ("b",), ("c",), ("d",), ("a",), ("f",), ("d", "a")],
        "argv(c)": [],
    }),
    # own keys of [*] hold for all models, options for llama-servers
    ("""
     [*]
     idle-timeout = 5m
     ngl = 9
     env.A = 1
     env.B = 2
     pin = perhaps
     needs = vram 8G
     [a]
     cmd = serve ${PORT}
     env.B = 3
     [b]
     m = x
     idle-timeout = 1
     pin = off
     [c]
     uses = b
     [llmswap]
     budget = vram 8G
     """, {
        "a.settings.idle_timeout": 300, "b.settings.idle_timeout": 1,
        "a.settings.env": {"A": "1", "B": "3"}, "b.settings.env": {"A": "1", "B": "2"},
        "a.problem": "m.ini:7: [*] pin: 'perhaps' is not on or off, nor 'loaded'",
        "a.options": (), "b.problem": None, "c.problem": None, "c.settings.needs": {},
    }),
    # values that llama.cpp forgives are forgiven
    *[(f"[a]\nm = x\n{line}", {
        "a.problem": None, "(a.settings.stop_timeout, a.settings.load_on_startup)":
        (10, False), "config.warnings": (f"m.ini:3: [a] {line.split()[0]}: {warning}",),
      }) for line, warning in (
        ("stop-timeout = soon", "'soon' is not a duration such as 15m; taken as 10"),
        ("stop-timeout =", "'' is not a duration such as 15m; taken as 10"),
        ("load-on-startup = maybe", "'maybe' is not on or off; taken as off"))],
    # a source may be spelled in many ways
    *[(text, {"a.problem": None}) for line in (
        "m = x", "model = x", "hf = u/r", "hfr = u/r", "hf_repo = u/r", "mu = u",
        "dr = d", "LLAMA_ARG_MODEL = x", "gpt-oss-20b-default = on",
        "fim-qwen-7b-spec = on",
      ) for text in (f"[a]\n{line}", f"[*]\n{line}\n[a]")],
    # models are found by every name
    ("[qwen3:8b]\nm = x\nalias = coder, GPT-4\n[Coder]\nm = y", {
        **{f"config.find({name!r})": "qwen3:8b" for name in (
            "qwen3:8b", "qwen3:8B", "coder", "GPT-4", "gpt-4", " QWEN3:8B ")},
        "config.find('Coder')": "Coder", "models[0].aliases": ("coder", "GPT-4"),
    }),
    # the first owner keeps a name
    ("[a]\nm = x\nalias = b, c, a\n[b]\nm = x\nalias = c, d", {
        "[*map(config.find, 'abcd')]": ["a", "b", "a", "b"],
        "(a.aliases, b.aliases)": (("c",), ("d",)),
        "config.warnings": ("m.ini:1: [a]: the alias 'b' already means [b]",
                            "m.ini:4: [b]: the alias 'c' already means [a]"),
    }),
    ("[m:q4]\nm = x\n[m:Q4]\nm = x\n[n:a-q]\nm = x\n[n:b-q]\nm = x\n", {
        "config.find('m:Q4')": "m:q4", "config.find('n:Q')": "n:b-q",
        "config.find('n:a-q')": "n:a-q",
        "config.warnings": (
            "m.ini:3: [m:Q4]: replaced by [m:q4], the same in llama.cpp",
            "m.ini:5: [n:a-q]: llama.cpp's name 'n:Q' already means [n:b-q]"),
    }),
    # keys before the first section
    ("version = 1\nm = x\n[a]\nm = y", {
        "[each.name for each in models]": ["default", "a"],
        "config.warnings": (
            "m.ini:2: keys before the first section make a model 'default'; keys for "
            "all models belong in [*]",),
    }),
    ("version = 1\n__PRESET_DEDUP_CACHE_MODELS = 1\n[default]\nversion = 1\n[a]\nm = x",
     {"[each.name for each in models]": ["a"], "config.warnings": ()}),
    ("version = 1\n[*]\nngl = 9 ; all\nmodels-max = 2\n[a] # one\nmodel = /m/a # file\n"
     "jinja = on\nfa = auto",
     {"config.warnings": (), "config.pitfalls(lambda model: OPTIONS)": []}),
    # models-max, wherever it is
    *[(text, {"proxy.models_max": most}) for text, most in (
        ("", 1),
        ("[llmswap]\nmodels-max = 3", 3),
        ("[*]\nmodels-max = 3", 3),
        ("[*]\nmodels-max = x", 1),
        ("[*]\nmodels-max = 3\n[llmswap]\nmodels-max = 2", 2),
        ("[llmswap]\nbudget = vram 1G", 0),
        ("[llmswap]\nsets = a\n[a]\nm = x", 0),
        ("[llmswap]\nsets = a\nmodels-max = 1\n[a]\nm = x", 1))],
    # the model for requests that name none
    *[(text, {"config.default_model() and config.default_model().name": name})
      for text, name in (
        ("", None),
        ("[a]\nm = x", "a"),
        ("[a]\nm = x\n[b]\nm = x", None),
        ("[llmswap]\ndefault-model = B\n[a]\nm=x\n[c]\nm=x\nalias = b", "c"))],
    ("[llmswap]\nllama-server = /one\n[a]\ncmd = x ${PORT}\n[b]\nm = x", {
        "(a.settings.hang_timeout, b.settings.hang_timeout)": (0, 60),
        "b.settings.llama_server": "/one"}),
    ("[llmswap]\nllama-server = /one\n[*]\nllama-server = /two\nhang-timeout = 5\n"
     "[a]\ncmd = x ${PORT}\n[b]\nm = x\n[c]\nm = x\nllama-server = /3", {
        "a.settings.hang_timeout": 5,
        "(b.settings.llama_server, c.settings.llama_server)": ("/two", "/3")}),
    ("[llmswap]\nsets = coder + E, a+b\n[c,1]\nm = x\nalias = coder\n[e]\nm = x\n"
     "[f]\nuses = e\nalias = a\n[b]\nm = x\n",
     {"proxy.sets": ({"c,1", "e"}, {"e", "b"})}),
    # API keys: of the file, the environment and the key file
    ("[llmswap]\napi-key = one, t;w #o\napi-key-file = keys",
     {"config.api_keys": ("one", "t;w #o", "four", "three", "one")}),
]
ENVIRON = {"KEY": "k ${PORT}", "LLMSWAP_API_KEY": "four"}


@pytest.mark.parametrize("text, values", MEANINGS)
def test_a_file_means(tmp_path, text, values):
    (tmp_path / "keys").write_text("# mine\nthree\n\n one \n")
    config = read(tmp_path, text, ENVIRON)
    names = {
        **config.models, "models": [*config.models.values()], "config": config,
        "proxy": config.settings, "options": options, "OPTIONS": OPTIONS,
        "UNKNOWN": llmswap.UNKNOWN_OPTIONS,
        "argv": lambda model: model.command(OPTIONS, 7),
    }
    assert {each: eval(each, names) for each in values} == values


def test_the_command_line_overrules_the_file(tmp_path):
    text = "[llmswap]\nlisten = 127.0.0.1:1\nbudget = vram 1G\n"
    assert read(tmp_path, text, models_max=2).settings.models_max == 2
    more = f"{text}models-max = 3"
    assert read(tmp_path, more, models_max="0").settings.models_max == 0
    assert read(tmp_path, text, listen="[::1]:2").settings.listen == (("::1", 2),)
    with pytest.raises(ConfigError, match="^--listen: 'x'"):
        read(tmp_path, text, listen="x")
    with pytest.raises(ConfigError, match="No such file"):
        llmswap.load_config(tmp_path / "none.ini")


# ---- Options of llama-server -----------------------------------------------------


@pytest.mark.parametrize("text", [
    "", "usage: wrapper [options]\n", HELP.replace("--filler", "filler"),
])
def test_help_of_another_program_gives_no_table(text):
    assert llmswap.parse_help(text) is None


@pytest.mark.parametrize("words, lines", [
    (["--jinja"], [
        "jinja = true", "jinja = 1", "jinja = on", "jinja = enabled", "jinja = no",
        "jinja = False", "jinja = OFF", "jinja = auto", "jinja =", "no-jinja = yes",
        "no-jinja = True", "no-jinja =", "no-jinja = 0", "LLAMA_ARG_NO_JINJA = true"]),
    (["--no-jinja"], [
        "jinja = false", "jinja = 0", "jinja = off", "jinja = disabled",
        "no-jinja = true", "no-jinja = on", "no_jinja = on", "LLAMA_ARG_JINJA = off"]),
    (["--embeddings"], ["embedding = no", "embedding ="]),
    ([], ["embedding = false", "host = h\nport = 1", "api-key = k\nmodels-max = 2",
          "ssl-cert-file = x\nlog-colors = on",
          "version = 3\ndedup-cache-models = on"]),
    (["--no-kv-offload"], ["nkvo = 1"]),
    (["--no-host"], ["no-host = true", "LLAMA_ARG_NO_HOST = on"]),
    (["--flash-attn", "true"], ["flash-attn = true"]),
    (["--flash-attn", "off"], ["fa = off"]),
    (["--no-webui"], ["webui = off"]), (["--webui"], ["ui = on"]),
    (["--n-gpu-layers", "4"], ["ngl = 4", "ngl=4\nn-gpu-layers=5\ngpu-layers=6"]),
    (["--ctx-size", "1"], [
        "c=1", "ctx_size = 1", "--ctx-size = 1", "LLAMA_ARG_CTX_SIZE = 1",
        "ctx-size=1\nc=2\nLLAMA_ARG_CTX_SIZE=3"]),
    (["--temperature", "0"], ["temp = 0"]), (["--keep", "1"], ["keep = 1"]),
    (["--chat-template", ""], ["chat-template ="]),
    (["--hf-token", "t"], ["HF_TOKEN = t"]), (["--lora", "b"], ["lora=a\nlora=b"]),
    (["--no-mmproj-auto"], ["no-mmproj=1\nmmproj-auto=1"]),
    (["--keep", "3", "--ctx-size", "2", "--seed", "1"], ["seed=1\nc=2\nkeep=3"]),
    (["--x", "a b", "-y"], ["extra-args = --x 'a b' -y"]),
])
def test_options_become_words_as_the_router_has_them(tmp_path, words, lines):
    for line in lines:
        assert options(read(tmp_path, f"[a]\n{line}").models["a"]) == words, line


@pytest.mark.parametrize("text, argv, words", [
    ("~/s --m ~/m --x=~/y '~z'", ["/h/s", "--m", "/h/m", "--x=~/y", "~z"], ""),
    ("A=1 B='x y' s", ["env", "A=1", "B=x y", "s"], ""),
    ("sh -c 'cd /x && $A | b; > c'", ["sh", "-c", "cd /x && $A | b; > c"], ""),
    ("s a && b", ["s", "a", "&&", "b"], "&&"),
    ("s 2>&1 | tee x # y", ["s", "2>&1", "|", "tee", "x", "#", "y"], "2>&1 | #"),
    ("cd /x; s $HOME", ["cd", "/x;", "s", "$HOME"], "/x; $HOME"),
    ("s --json '{\"a\": 1}' --re .*=CPU a&b",
     ["s", "--json", '{"a": 1}', "--re", ".*=CPU", "a&b"], ""),
])
def test_habits_of_a_shell_work_or_are_warned_of(
    tmp_path, monkeypatch, text, argv, words
):
    monkeypatch.setenv("HOME", "/h")
    for lines in (f"cmd = {text}", f"cmd = s\ncmd-stop = {text}"):
        config = read(tmp_path, f"[a]\nproxy = http://x:1\n{lines}")
        model = config.models["a"]
        is_stop = "cmd-stop" in lines
        command = model.stop_command(1, 2) if is_stop else model.command(None, 1)
        assert command == argv and len(config.warnings) == bool(words)
        assert all(f"understands {words}, " in each for each in config.warnings)


NEITHER = "neither a key of llmswap nor an option of this llama-server"


@pytest.mark.parametrize("line, reason", [
    ("ctx-sise = 1", f"{NEITHER}; did you mean ctx-size?"),
    ("idle-timeuot = 1", f"{NEITHER}; did you mean idle-timeout?"),
    ("zzz = 1", NEITHER), ("listen = x", "belongs in [llmswap]"),
])
def test_an_unknown_option_is_named_with_its_place(tmp_path, line, reason):
    config = read(tmp_path, f"[a]\nm = x\n{line}\n[b]\nm = y")
    with pytest.raises(ConfigError) as caught:
        options(config.models["a"])
    key = line.split()[0]
    assert str(caught.value) == f"m.ini:3: [a] {key}: {reason}"
    assert options(config.models["b"]) == ["--model", "y"]


# ---- Models ----------------------------------------------------------------------


@pytest.mark.parametrize("section, reason", [
    ("c = 1", "[a]: it has no source"),
    ("m = x\nidle-timeout = soon", "[a] idle-timeout: 'soon' is not a duration such"),
    ("m = x\ndescription = ${PORT}", "[a] description: ${PORT} is unknown here"),
    ("m = x\nenv.A = ${B}", "[a] env.A: ${B} is unknown here"),
    ("m = x\nextra-args = 'a", "[a] extra-args: No closing quotation"),
    ("m = x\nneeds = 1\ncwd = ${X}", "[a] needs: '1' is not one resource"),
    ("m = x\nproxy = http://h:1", "[a] proxy: the proxy of a llama-server needs ${P"),
    ("m = x\nsleep = /sleep", "sleep and wake need each other"),
    ("cmd = serve", "[a] cmd: without ${PORT} it needs proxy = URL"),
    ("cmd = serve $${PORT}", "[a] cmd: without ${PORT} it needs proxy = URL"),
    ("cmd = serve ${PID} ${PORT}", "[a] cmd: ${PID} is unknown here"),
    ("cmd =\nproxy = http://h", "[a] cmd: it must not be empty"),
    ("cmd = 'serve ${PORT}", "[a] cmd: No closing quotation"),
    ("cmd = serve ${PORT}\nctx-size = 1",
     "[a] ctx-size: no key of llmswap; options of llama-server cannot stand beside"),
    ("cmd = serve ${PORT}\nlode-timeout = 1",
     "beside cmd; did you mean load-timeout?"),
    ("cmd = serve ${PORT}\nlisten = 1", "[a] listen: belongs in [llmswap]"),
    ("cmd = serve ${PORT}\nunit = x", "[a] unit: cannot stand beside cmd"),
    ("unit = x", "it needs proxy = URL, without ${PORT}"),
    ("proxy = http://h:${PORT}", "[a]: it has no source"),
    ("proxy = h:1", "[a] proxy: 'h:1' is not a URL"),
    ("uses = a", "'a' itself uses another model"),
    ("uses = b\nidle-timeout = 1", "[a] idle-timeout: cannot stand beside uses"),
    ("uses = b\ncmd = x ${PORT}", "[a] uses: cannot stand beside cmd"),
    ("uses = c", "it uses 'c': m.ini:"), ("uses = ,", "[a] uses: it must not be empty"),
    ("uses = b, nobody", "there is no model 'nobody' to use"),
])
def test_a_mistake_makes_only_its_model_unusable(tmp_path, section, reason):
    config = read(tmp_path, f"[b]\nm = x\n[c]\n[d]\nm = x\n[a]\n{section}\n")
    assert config.models["a"].problem.startswith("m.ini:")
    assert reason in config.models["a"].problem
    assert config.models["a"].environment("8") == {}
    assert config.models["b"].problem is config.models["d"].problem is None


@pytest.mark.parametrize("text, warning", [
    ("[a]\nm = /a#b", "m.ini:2: [a] m: a comment begins at '#', as in llama.cpp; "
                      "the value is '/a'"),
    ("[a]\nm = x\nj = {\"a #b\"}", "a comment begins at '#'"),
    ("[a]\nm = \"x y\"", "the quotes are part of the value"),
    ("[a]\nm = x\njinja = no", "neither true nor false; llama.cpp makes it --jinja"),
    ("[a]\nm = x\nno-jinja = yes", "llama.cpp makes it --jinja"),
    ("[a]\nm = x\nc = 1\nctx-size = 2", "[a] ctx-size: the same option as c; this one"),
    ("[a]\nm = x\nm = y", "m.ini:3: [a] m: given before; this one counts"),
    ("[a]\n[a]\nm = x", "m.ini:2: [a]: given before; this one counts"),
    ("[*]\napi-key = x\n[a]\nm = x\n[b]\nm = x", "[*] api-key: belongs in [llmswap]; it"),
    ("[*]\nidle-timeuot = 1\n[a]\ncmd = x ${PORT}", "effect: no model here is a llama-"
     "server; did you mean idle-timeout?"),
    ("[*]\nlisten = x\n[a]\ncmd = x ${PORT}", "without effect: belongs in [llmswap]"),
    ("[a]\nproxy = http://h/v1/", "proxy: what clients ask for begins with /v1 already"),
    ("[a]\ncmd = x ${PORT}\nllama-server = y", "llama-server: without effect"),
    ("[llmswap]\nmodels-dir = nowhere", "[llmswap] models-dir: [Errno 2]"),
])
def test_surprises_are_warned_of_once(tmp_path, text, warning):
    config = read(tmp_path, text)
    warnings = [*config.warnings, *config.pitfalls(lambda model: OPTIONS)]
    matches = [text for text in warnings if warning in text]
    assert len(matches) == 1 and matches[0].startswith("m.ini:")


def test_the_cache_is_listed_by_the_llama_server_of_all_models(tmp_path):
    path, binaries = tmp_path / "m.ini", []
    path.write_text("[llmswap]\ncache-models = on\n[*]\nllama-server = /x/y\n")
    llmswap.load_config(path, list_cached=binaries.append)
    assert binaries == ["/x/y"]


@pytest.mark.parametrize("name, message", [
    ("codr", "there is no model 'codr'; did you mean coder? there are a, coder"),
    ("gpt-4-mini",
     "there is no model 'gpt-4-mini'; did you mean gpt-4o-mini? there are a, coder"),
])
def test_an_unknown_name_is_answered_with_near_ones(tmp_path, name, message):
    text = "[a]\nm=x\nalias = gpt-4o-mini\n[coder]\nm=x\n[zzy]\nm=x\nunlisted = on"
    with pytest.raises(ModelNotFound, match=f"^{re.escape(message)}$"):
        read(tmp_path, text).resolve(name)


@pytest.mark.parametrize("limits, a, b, misfit", [
    ("models-max = 2", "pin = on", "", None),
    ("models-max = 1", "pin = on", "", "beside the pinned a: models-max is 1"),
    ("models-max = 0", "pin = on", "pin = on", None),
    ("budget = vram 24G", "pin = on\nneeds = vram 20G", "needs = vram 4G", None),
    ("budget = vram 24G", "pin = on\nneeds = vram 20G", "needs = vram 5G",
     "beside the pinned a: they need vram 25G, the budget is vram 24G"),
    ("budget = vram 24G", "", "needs = vram 25G", "fit: they need vram 25G"),
    ("budget = vram 24G", "", "needs = vrma 25G", "does not name 'vrma'"),
    ("budget = vram 24G", "", "sleep-needs = ram 1G", "does not name 'ram'"),
    ("sets = a + b", "pin = on", "", None),
    ("sets = a + c, b + c", "pin = on", "", "pinned a: none of sets has them together"),
    ("sets = a + c", "", "", None),
    ("models-max = 1", "pin = loaded", "pin = loaded", None),
])
def test_a_model_must_fit_beside_all_that_are_pinned(tmp_path, limits, a, b, misfit):
    config = read(tmp_path, f"[llmswap]\n{limits}\n[a]\nm=x\n{a}\n[b]\nm=x\n{b}\n"
                            "[c]\nm = x\n[r]\nproxy = http://h\n[u]\nuses = b\n")
    assert config.models["a"].problem is None and config.models["r"].problem is None
    if misfit is None:
        assert config.models["b"].problem is config.models["u"].problem is None
    else:
        assert misfit in config.models["b"].problem
        assert config.models["b"].problem in config.models["u"].problem


LAUNCHED = "[*]\nngl = 1\nc = 7\n[a]\nmodel = x\nc = 2\nidle-timeout = 5\nenv.A = 1\n"


@pytest.mark.parametrize("old, new, is_same", [
    *[(LAUNCHED, LAUNCHED + line, True) for line in (
        "alias = b", "idle-timeout = 9", "set-params = {\"a\": 1}", "pin = on",
        "description = ${MODEL_ID}", "proxy-key = x", "cmd-stop = x ${PID}")],
    (LAUNCHED, "\n\n" + LAUNCHED.replace("c = 7", "c = 8"), True),
    (LAUNCHED, "[llmswap]\nmodels-dir = .\n" + LAUNCHED, True),
    *[(LAUNCHED, LAUNCHED + line, False) for line in (
        "c = 3", "env.A = 2", "extra-args = -x", "cwd = /", "keep = 1",
        "llama-server = /x", "oom-score-adj = 0", "env.B = 1")],
    (LAUNCHED, LAUNCHED.replace("ngl = 1", "ngl = 2"), False),
    ("[*]\nc = 1\n[a]\nm = x\nctx-size = 2", "[*]\nctx-size = 2\n[a]\nm = x\nc = 1",
     False),
    *[(f"[macros]\nx = 1\n[a]\n{line}", f"[macros]\nx = {x}\n[a]\n{line}", x == 1)
      for line in ("cmd = serve ${PORT} ${x}", "m = ${x}") for x in (1, 2)],
    # the first macro makes $ special in options
    *[(f"[a]\nm = {text}", f"[macros]\ny = 1\n[a]\nm = {text}", is_same)
      for text, is_same in (("x", True), ("${MODEL_ID}", False), ("$${x}", False))],
])
def test_a_reload_spares_a_backend_unless_its_launch_changes(
    tmp_path, old, new, is_same
):
    (tmp_path / "a.gguf").touch()
    launches = [read(tmp_path, text).models["a"].launch for text in (old, new)]
    assert (launches[0] == launches[1]) is is_same


# ---- models-dir ------------------------------------------------------------------


@pytest.fixture
def models_dir(tmp_path):
    for name in ("top.gguf", "a.gguf.b.gguf", "mmproj-top.gguf", "mtp-top.gguf",
                 "U.GGUF", "e:q4_0/z.gguf", "only/mmproj.gguf", "empty/readme.txt",
                 "notes.txt", "s/s-00001-of-00002.gguf", "s/s-00002-of-00002.gguf",
                 "s/mmproj-s.gguf", "s/dflash-s.gguf", "p-00001-of-00002.gguf",
                 "q-00001-of-2/a.gguf", "q-00001-of-2/b-00001-of-00002.gguf",
                 "hidden/.h.gguf"):
        path = tmp_path / "dir" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "dir"


def test_every_gguf_in_models_dir_is_a_model(tmp_path, models_dir):
    config = read(tmp_path, "[llmswap]\nmodels-dir = dir\n[*]\nngl = 1\n[top]\nc = 2\n"
                            "[s]\nmodel-draft = other\n[e:q4_0]\ncmd = x ${PORT}")
    argvs = {name: options(model) for name, model in config.models.items()}
    ngl = ["--n-gpu-layers", "1"]
    assert argvs == {
        "a.b": ["--model", "dir/a.gguf.b.gguf", *ngl],
        "e:q4_0": ["1"],
        "hidden": ["--model", "dir/hidden/.h.gguf", *ngl],
        "q-00001-of-2": ["--model", "dir/q-00001-of-2/b-00001-of-00002.gguf", *ngl],
        "p-00001-of-00002": ["--model", "dir/p-00001-of-00002.gguf", *ngl],
        "s": ["--model-draft", "other", "--model", "dir/s/s-00001-of-00002.gguf",
              "--mmproj", "dir/s/mmproj-s.gguf", *ngl],
        "top": ["--ctx-size", "2", "--model", "dir/top.gguf", *ngl],
    }
    assert {model.problem for model in config.models.values()} == {None}


# ---- The same argv as llama-server's router -----------------------------------------


presets = load_tool("presets")


@with_llama_server
@pytest.mark.parametrize("seed", range(3))
def test_every_argv_is_that_of_llama_servers_router(tmp_path, seed):
    table = llmswap.options_of(LLAMA_SERVER)
    shared = {"alias"}  # llama.cpp knows the keys that llmswap shares with it
    assert {key.name for key in llmswap.MODEL_KEYS} & table.by_key.keys() == shared
    path = tmp_path / "models.ini"
    path.write_bytes(presets.RandomPreset(seed, table).text().encode())
    theirs = presets.argvs_of_router(path)
    config = llmswap.load_config(path)
    ours = {name: config.resolve(name) for name in theirs}
    assert len({model.name for model in ours.values()}) == len(theirs)
    for name, model in ours.items():
        expected = map(os.path.expanduser, without_router_options(theirs[name]))
        assert options(model, table) == list(expected)


@with_llama_server
def test_models_dir_is_read_as_the_router_reads_it(tmp_path, models_dir):
    path = tmp_path / "models.ini"
    path.write_text("[*]\nc = 1\n[top]\nngl = 2\n")
    theirs = presets.argvs_of_router(path, "--models-dir", str(models_dir))
    path.write_text(f"{path.read_text()}[llmswap]\nmodels-dir = {models_dir}\n")
    config = llmswap.load_config(path)
    assert set(config.models) == set(theirs)
    for name, model in config.models.items():
        argv = options(model, llmswap.options_of(LLAMA_SERVER))
        assert argv == without_router_options(theirs[name])


# ==================================================================================
# 3  Scheduling
# ==================================================================================


@pytest.mark.parametrize("pauses, cost, expected", [
    ([], 1.0, 0.005), ([0.1, 5.0], 1.0, 0.2), ([0.1, 5.0, 5.0], 1.0, 0.005),
    ([0.25], 1.0, 0.005), ([0.25], 2.0, 0.5), ([9.0] * 8 + [0.1] * 4, 1.0, 0.2),
])
def test_return_gap(pauses, cost, expected):
    model = llmswap.ModelState("a", llmswap.ModelSpec())
    model.pauses.extend(pauses)
    assert model.return_gap(cost) == expected


# -- stories -----------------------------------------------------------------------

# A title, the models with their specs and the limits if they are not two plain ones,
# and the events: when, what, and the decisions that follow. "next 15" is the next
# deadline; "+" before an event: no decision is asked for after it. Tickets are numbered
# from 1. `serve` loads the model if need be, in no time, and serves one request; `busy`
# leaves that request in flight.
STORIES = """
A model with a waiting ticket counts as busy
    a b c | models_max=2 patience=0
    0    serve a 1
    0    serve b 2
    9    +ask c
    9    ask a           -> grant 4, evicted b for c

Without a ticket a failed load is not retried, and the victim serves on
    a b | models_max=2
    0    busy a
    2    ask b           -> start b
    3    exited b starved
    4    ask a
    5    end 2           -> grant 3
    6    ask b           -> start b

A ticket that may not load is refused once its model is to go
    a b | patience=0
    0    serve a 1
    0    busy a
    9    ask b
    9    ask a no-load       -> refuse 4: invalid_request
    9    end 2           -> evicted a for b
    9    ask a no-load       -> refuse 5: invalid_request

A changed model drains and is replaced, and its tickets wait
    a
    0    busy a
    1    reload a(concurrency=1) changed a
    2    ask a
    3    end 1           -> reload a
    4    exited a        -> start a
    5    loaded a        -> grant 2
    6    ask a

A ticket joins a load that its first client left, and is served in strict order
    a b | patience=0
    0    ask a           -> start a
    1    ask b
    2    +ask a
    2    end 1
    3    loaded a        -> grant 3
    4    end 3           -> evicted a for b

A sleeping backend can crash, which is no measured stop
    0    serve a 1
    2    slept a
    3    crashed a
    3    ask a
    9    exited a        -> start a
    9    loaded a        -> grant 2
    20   ask b           ; next 21

A busy victim ends its requests before the retry
    a b | models_max=2
    0    busy a
    2    ask b           -> start b
    3    exited b starved
    3    ask a
    4    end 1           -> evicted a for b
    5    exited a        -> start b
    6    loaded b        -> grant 2, start a

A victim that falls asleep makes room for the retry
    a(can_sleep=1) b | models_max=2
    0    serve a 1
    2    ask b           -> start b
    3    exited b starved       -> sleep a for b
    4    slept a         -> start b

Needs measured as larger count in full in the next run
    a(needs=2) b(needs=6) | models_max=0 budget=8
    0    serve a 1
    1    serve b 2
    3    learn a 5
    4    exited a
    4    learn a 5
    4    ask a           -> evicted b for a

A model is stopped instead if it would not fit even asleep
    a(sleeps) b(needs=7) | budget=8
    0    serve a 1
    9    ask b           -> sleep a for b
    9    slept a         -> evicted a for b
    10   exited a        -> start b

Waking is a start
    a(can_sleep=1) b
    0    serve a 1
    9    ask b           -> sleep a for b
    9    slept a         -> start b
    9    loaded b        -> grant 2
    9    end 2
    20   ask a           -> evicted b for a
    21   exited b        -> wake a
    22   loaded a        -> grant 3

The load time of an adopted model is not measured, and it is kept loaded again
    a(keep_loaded=1) b
    0    unload a
    0    adopted a
    9    loaded a
    9    busy a
    20   ask b           ; next 21
    20   end 2
    20   exited a broken ; next 69

Nothing is evicted while a model stopped for idleness makes the room
    b c a(idle_timeout=1) | models_max=2 patience=0
    0    serve b 0
    1    serve a 1
    2    wait            -> idle a
    2    ask c
    3    exited a        -> start c

A model pinned once loaded stays: what does not fit beside it is refused at once
    p(is_pinned_once_loaded=1) b r(is_local=0)
    0    ask p           -> start p
    0    ask b
    1    loaded p        -> grant 1, refuse 2: model_pinned
    9    ask b           -> refuse 3: model_pinned
    9    ask r           -> start r
    9    unload p
    9    ask b
    10   end 1           -> unload p
    11   exited p        -> start b
    12   loaded b        -> grant 5
    12   end 5
    20   ask p           -> evicted b for p

A model pinned once loaded may be evicted while it loads without a ticket
    p(is_pinned_once_loaded=1) b
    0    ask p           -> start p
    1    +end 1
    1    ask b           -> abandoned p for b

A model pinned once loaded is unloaded when idle
    p(is_pinned_once_loaded=1,idle_timeout=60) b
    0    serve p 1
    2    wait            ; next 61
    61   wait            -> idle p

A reload that pins a draining model spares it
    a b | patience=0
    0    busy a
    1    ask b
    2    reload a(is_pinned_once_loaded=1) b -> refuse 2: model_pinned
    3    ask a           -> grant 3

A keep_loaded model is evicted, and loaded again once it fits
    k(keep_loaded=1) b(idle_timeout=5)
    0    wait            -> start k
    1    loaded k        ; next never
    9    ask b           -> evicted k for b
    10   exited k        -> start b
    11   loaded b        -> grant 1
    12   end 1           ; next 17
    17   wait            -> idle b
    18   exited b        -> start k

`choose` returns the model that can serve soonest
    a b(can_sleep=1) c | models_max=2 patience=0
    0    soonest a of a b c
    0    ask b           -> start b
    0    soonest b of a b c
    0    ask c           -> start c
    1    loaded c        -> grant 2
    1    soonest c of a b c
    2    ask a
    3    end 2           -> evicted c for a
    3    soonest b of a b c
    4    exited c        -> start a
    4    soonest a of a b c
    5    loaded b        -> grant 1
    5    soonest b of b a
    6    unload b
    6    soonest a of c b a

Victims that drain stay chosen
    a b c | models_max=2 patience=0
    0    busy a
    1    busy b
    2    ask c
    3    end 2
    4    ask a
    5    end 1           -> evicted a for c

Beside a busy victim only those idle ones go that must
    a(needs=2) b(needs=1) c(needs=1) d(needs=3) | models_max=0 budget=4 patience=0
    0    serve b 0
    1    serve c 1
    2    busy a
    9    ask d           -> evicted b for d
    9    end 3           -> evicted a for d

Victims serve again when the ticket times out
    a b | patience=0 queue_timeout=5
    0    busy a
    1    ask b           ; next 6
    6    end 1           -> refuse 2: queue_timeout
    6    ask a           -> grant 3

Sets load together, beside what sleeps, and other models alone
    a b c d s(sleeps) | models_max=0 budget=20 sets=ab,bc
    0    serve s 0
    1    ask a           -> sleep s for a
    1    slept s         -> start a
    1    loaded a        -> grant 2
    1    end 2
    9    serve b 9
    20   ask c           -> evicted a for c
    21   exited a        -> start c
    21   loaded c        -> grant 4
    21   end 4
    30   ask d           -> evicted b for d, evicted c for d

A victim goes at its own time unless its newcomer needs the room of others, too
    a(needs=10) b(needs=2) c(needs=9) d(needs=3) e(needs=2) | models_max=0 budget=12
    0    serve b 0
    0    busy a
    9    ask c
    9    ask d           ; next 10
    9    end 4
    9    ask e           -> evicted b for e

A victim serves on if the newcomer got its room from another
    a b c | models_max=2 patience=0
    0    busy a
    1    busy b
    2    ask c
    3    exited b        -> start c
    4    end 1

A victim that fell asleep with a request in flight is not woken
    a b c | models_max=2 patience=1
    0    busy b
    0    busy a
    0.5  ask c
    0.6  slept b
    0.7  ask b
    1.5  wait
    2    end 1           -> evicted b for c
    2.1  exited b        -> start c
    2.2  end 2           -> evicted a for b

A busy victim serves new requests until patience ends
    a b | patience=5
    0    busy a
    10   ask b
    14.9 ask a           -> grant 3 ; next 15
    15   wait
    15.1 ask a
    16   end 1
    17   end 3           -> evicted a for b

The cost of a swap includes the stop
    0    ask a           -> start a
    1    loaded a        -> grant 1
    2    end 1
    10   ask b           -> evicted a for b
    10.25 exited a       -> start b
    11.25 loaded b       -> grant 2
    12   end 2
    20   ask a           -> evicted b for a
    20.25 exited b       -> start a
    21.25 loaded a       -> grant 3
    30   ask b           ; next 32.25

A pause is learned, across loads, and begins when the last client has left
    0    ask a           -> start a
    1    end 1
    1.1  loaded a
    1.1  serve a 2
    2    unload a        -> unload a
    2    exited a
    2.2  busy a
    2.3  ask b
    2.3  end 3           ; next 2.7

A pause begins when the last of several requests ends
    0    ask a           -> start a
    0    ask a
    8    loaded a        -> grant 1, grant 2
    9    end 1
    10.5 ask a           -> grant 3
    11   end 2
    11   end 3
    12   ask a           -> grant 4
    12   ask b
    13   end 4           ; next 15

A client that alternates between two models teaches no return gap
    0    ask a           -> start a
    8    loaded a        -> grant 1
    8    end 1
    8.1  ask b           -> evicted a for b
    8.1  exited a        -> start b
    8.2  loaded b        -> grant 2
    8.2  end 2
    9    ask a           -> evicted b for a
    9    exited b        -> start a
    17   loaded a        -> grant 3
    17.1 ask b
    17.2 end 3           ; next 17.205

A model that takes no room never waits for any
    a b c r(is_local=0)
    0    busy a
    0    ask b
    0    ask c
    0    ask r           -> start r

Idle time counts from readiness
    a(idle_timeout=60)
    0    ask a           -> start a
    1    end 1           ; next never
    50   loaded a        ; next 110
    110  wait            -> idle a

A successful load resets the back-off, and so does a load by hand
    a
    0    fail a 2
    0    serve a 1
    1    exited a
    2    fail a 3
    2.5  ask a           -> refuse 7: model_backing_off
    2.5  ask a manual    -> start a

A model on another machine is not backed off
    r(is_local=0)
    0    fail r 3
    0    ask r           -> start r

keep-alive 0 unloads once nothing is in flight or waiting
    a(concurrency=1)
    0    busy a
    0    +keep a 0
    1    ask a
    2    end 1           -> grant 2
    3    end 2           -> idle a

A preemptible lease is not drained for
    0    serve a 1
    1    ask a preemptible -> grant 2
    9    ask b           -> evicted a for b
    10   exited a        -> start b
    10   end 2

Unload by hand gives requests in flight their stop-timeout, once
    a(stop_timeout=10)
    0    busy a
    5    unload a        ; next 15
    14   unload a        ; next 15
    15   wait            -> unload a

A reload resets the back-off of a changed model
    a
    0    fail a 3
    0    ask a           -> refuse 4: model_backing_off
    0    reload a changed a
    0    ask a           -> start a
    0    exited a broken -> refuse 5: model_start_failed
    0    fail a
    0    ask a           -> start a
    0    reload a changed a -> reload a
    0    exited a        -> start a
    0    exited a broken -> refuse 7: model_start_failed
    0    ask a           -> start a

A removed model drains and stops, and its tickets are refused
    a(concurrency=1)
    0    busy a
    1    ask a
    2    reload b        -> refuse 2: model_not_found
    2    ask a           -> refuse 3: model_not_found
    3    end 1           -> reload a
    4    exited a
    4    ask a           -> refuse 4: model_not_found

A model removed and added again before it exited is replaced
    a
    0    busy a
    1    reload b
    2    reload a b
    3    ask a
    4    end 1           -> reload a
    5    exited a        -> start a

The youngest tickets are refused when the queue is full
    a b | queue_max=2
    0    busy a
    0    ask b
    0    ask b
    0    ask b           -> refuse 4: queue_full
    0    ask a           -> grant 5
"""


walk, stories = map(load_tool, ("walk", "stories"))
BROKEN, STARVED, in_words = walk.BROKEN, walk.STARVED, walk.in_words
World = walk.World
STORY_LINE = re.compile(r" +(\d\S*) ([^;>]*)(?:->([^;]*))?(?:; next (.*))?")


@pytest.mark.parametrize("story", STORIES.strip().split("\n\n"))
def test_story(story):
    title, *lines = story.splitlines()
    stage = stories.Story("a b" if STORY_LINE.fullmatch(lines[0]) else lines.pop(0))
    for line in lines:
        now, text, expected, deadline = STORY_LINE.fullmatch(line).groups("")
        words, moment = stage.tell(now, text.strip())
        assert ", ".join(words) == expected.strip(), f"{title}: {line}"
        if deadline:
            next_moment = pytest.approx(float(deadline.replace("never", "inf")))
            assert moment == next_moment, f"{title}: {line}"


def test_failed_loads_are_spaced_and_a_refusal_says_for_how_long():
    stage, now, moments = stories.Story("a"), 0.0, [0.0]
    for _ in range(10):
        stage.tell(now, "fail a")
        now = max(now, stage.core.models["a"].retry_at)
        moments.append(now)
    steps = [after - before for before, after in zip(moments, moments[1:])]
    assert steps == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    stage.core.submit("a", now - 1.5)
    [refusal] = stage.core.decide(now - 1.5)[0]
    assert (refusal.problem.status, refusal.problem.retry_after) == (503, 2)
    assert str(BROKEN) in str(refusal.problem)


def ask_in_a_loop(world, name, requests, thinking, served):
    """Ask, wait, be served, think, and ask again, so many times."""

    def ask(left):
        ticket = world.scheduler.submit(name, world.now)
        ticket.waiter = lambda _: world.after(0.05, finish, ticket, left - 1)

    def finish(ticket, left):
        served.append(name)
        world.scheduler.finish(ticket, world.now)
        if left:
            world.after(thinking, ask, left)

    ask(requests)


@pytest.mark.parametrize("thinking, clients, requests, most", [
    (0, 3, 10, 3), (0.1, 3, 10, 10), (0.1, 1, 30, 12)
])
def test_two_groups_of_clients_in_closed_loops_need_few_loads(
    thinking, clients, requests, most
):
    specs = {name: llmswap.ModelSpec() for name in "ab"}
    takes, served = {"load": 0.5, "stop": 0.02}, []
    scheduler = llmswap.Scheduler(llmswap.Limits(), specs)
    world = World(scheduler, lambda kind, name: takes[kind])
    for i, name in enumerate("ab" * clients):
        client = ask_in_a_loop, world, name, requests, thinking, served
        world.after(i / 100, *client)
    while world.next_moment() < math.inf:
        world.now = max(world.now, world.next_moment())
        world.run_agenda()
        world.turn()
    assert Counter(served) == dict.fromkeys("ab", clients * requests)
    assert world.starts <= most


def crowded_stage(models, loaded, more=""):
    """Models m0, m1, ... that need 1 each; the first are busy and fill all room."""
    specs = " ".join(f"m{i}(needs=1)" for i in range(models))
    stage = stories.Story(f"{specs} {more} | models_max=0 budget={loaded} queue_max=0")
    for i in range(loaded):
        stage.tell(i, f"busy m{i}")
    return stage


def decide_and_count(stage, now):
    """The decisions, and how many Python calls they took."""
    calls = []
    sys.setprofile(lambda frame, event, argument: event == "call" and calls.append(1))
    words, _ = stage.decide(now)
    sys.setprofile(None)
    return words, len(calls)


def test_a_decision_takes_time_in_proportion_to_the_queue():
    stage, counts = crowded_stage(models=500, loaded=20), []
    for i in range(1000):
        stage.tell(20, f"+ask m{20 + i % 480}")
        if i in (499, 999):
            stage.decide(20)
            words, count = decide_and_count(stage, 20.1)
            assert words == [] and stage.core.queued == i + 1
            counts.append(count)
    assert counts[1] < 2.5 * counts[0] < 2.5 * 20_000


def test_many_victims_are_chosen_in_bounded_steps_and_without_waste():
    stage = crowded_stage(models=60, loaded=60, more="new(needs=30)")
    for i in range(60):
        stage.tell(60, f"end {i + 1}")
    stage.tell(99, "+ask new")
    words, count = decide_and_count(stage, 99)
    assert words == [f"evicted m{i} for new" for i in range(30)]
    assert count < 200_000


@pytest.mark.parametrize("is_calm", [False, True])
def test_a_random_walk_over_all_events(is_calm):
    for seed in range(20):
        try:
            walk.Walk(seed, is_calm).run(steps=150)
        except Exception as error:
            raise AssertionError(f"seed {seed}, is_calm={is_calm}") from error


# ==================================================================================
# 4  Backends
# ==================================================================================


class WatchedBackend:
    """A backend in this process, and its listener."""

    def __init__(self, model):
        self.events = queue.SimpleQueue()
        self.backend = llmswap.ProcessBackend(model, self, 0.0)
        self.backend.start()

    def on_loaded(self, _):
        self.events.put("loaded")

    def on_exited(self, _, problem):
        self.events.put(problem)

    def on_line(self, *_):
        """Ignored, as are the next three."""

    on_dying = on_described = on_progress = on_line

    def loaded(self):
        event = self.events.get(timeout=30)
        assert event == "loaded", event
        return self.backend

    def exited(self):
        problem = self.events.get(timeout=30)
        assert problem != "loaded"
        return problem

    def stop(self):
        self.backend.stop()
        return self.exited()

    def wrote(self, text):
        return any(text in line for line in list(self.backend.lines))


@pytest.fixture(scope="module")
def guard():
    llmswap.GUARD.start()
    yield llmswap.GUARD
    llmswap.GUARD.close()


@pytest.fixture
def begin(guard, tmp_path):
    """Start a backend of a model [m]: flags of the fake server, keys of the section."""
    all_watched = []

    def begin(*flags, **keys):
        model = model_of(tmp_path, *flags, **keys)
        all_watched.append(WatchedBackend(model))
        return all_watched[-1]

    yield begin
    for watched in all_watched:
        watched.backend.stop(at_once=True)
        eventually(lambda watched=watched: not has_group(watched.backend.pid))


def model_of(folder, *flags, **keys):
    """The model [m] of a file with these keys; without `cmd`, a fake server."""
    keys = {name.replace("_", "-"): value for name, value in keys.items()}
    if not {"cmd", "model"} & set(keys):
        keys["cmd"] = fake_command(*flags)
    text = "[m]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items())
    model = read(folder, text, os.environ).models["m"]
    assert not model.problem, model.problem
    return model


def script(folder, text, name="script"):
    path = folder / name
    path.write_text(text)
    return f"/bin/sh {path} ${{PORT}}"


def has_group(group):
    stats = filter(None, map(llmswap.process_stat, llmswap.group_members(group)))
    return any(stat.state != "Z" for stat in stats)


def get(port, path):
    return ask(port, "GET", path).json()


def test_a_free_port_is_no_recent_one_nor_for_outgoing_connections(monkeypatch):
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    outgoing = range(*map(int, text.split()))
    monkeypatch.setattr(random, "sample", lambda ports, count: ports[:count])
    ports = {llmswap.free_port() for _ in range(20)}
    assert min(ports) >= 10000 and not ports & {*outgoing} and len(ports) == 20


MISSING = [
    # keys of the model, in an empty folder that is HERE; what check_start says
    ({"cmd": "no-such-one ${PORT}"}, "no program 'no-such-one' on the PATH"),
    ({"cmd": "/no/such/file ${PORT}"}, "/no/such/file does not exist"),
    ({"cmd": "./m.ini ${PORT}", "cwd": "HERE"}, "m.ini is not executable"),
    ({"cmd": "${env.NONE} ${PORT}"}, "no program '' on the PATH"),
    ({"model": "HERE/x", "llama-server": "/bin/true"}, "x does not exist (option"),
    ({"cmd": "true ${PORT}", "cwd": "HERE/none"}, "/none is not a folder (cwd)"),
    ({"cmd": "env -u NONE true ${PORT}"}, None),
    ({"cmd": "PATH=HERE:/bin no-such-one ${PORT}"}, None),  # env(1) may find it
]


@pytest.mark.parametrize("keys, text", MISSING)
def test_what_is_missing_is_found_before_the_start(tmp_path, monkeypatch, keys, text):
    monkeypatch.setenv("NONE", "")
    keys = {key: value.replace("HERE", str(tmp_path)) for key, value in keys.items()}
    fails = pytest.raises(llmswap.LoadFailed, match=text and re.escape(text))
    with fails if text else contextlib.nullcontext():
        llmswap.check_start(model_of(tmp_path, **keys))


@pytest.mark.parametrize("words, result", [
    ("echo out; exit 3", (3, "out")),
    ("echo out; sleep 60 & exit 3", (3, "out")),  # sleep holds the pipe open
    ("echo out; sleep 60", (None, "out")),
    (None, (None, "/no/such/file: No such file or directory")),
])
def test_a_command_gives_its_status_and_output_in_time(words, result):
    argv = ["/bin/sh", "-c", words] if words else ["/no/such/file"]
    began = time.monotonic()
    assert llmswap.run_command(argv, 3.0) == result
    assert time.monotonic() - began < 30


def test_half_a_help_of_a_binary_that_was_killed_is_not_believed(tmp_path, monkeypatch):
    killed = None, HELP
    monkeypatch.setattr(llmswap, "run_command", lambda *_, **__: killed)
    binary = executable(tmp_path / "server", "true")
    assert llmswap.options_of(binary) is llmswap.UNKNOWN_OPTIONS
    monkeypatch.setattr(llmswap, "run_command", lambda *_, **__: (0, HELP))
    assert llmswap.options_of(binary) is llmswap.UNKNOWN_OPTIONS
    later = time.monotonic() + llmswap.ASK_AGAIN_AFTER
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert llmswap.options_of(binary).find("jinja")


def test_a_relative_folder_of_the_path_is_below_the_models_own(tmp_path):
    (tmp_path / "bin").mkdir()
    binary = executable(tmp_path / "bin" / "server", "true")
    program = llmswap.find_program("server", {"PATH": "bin:/usr/bin"}, str(tmp_path))
    assert program == binary
    with pytest.raises(llmswap.LoadFailed):
        llmswap.find_program("server", {"PATH": "bin:/usr/bin"}, None)


def test_forty_callers_ask_a_binary_once_and_hold_up_no_other(tmp_path):
    asked = tmp_path / "asked"
    other = executable(tmp_path / "other", f"touch {asked}")
    script = f"until [ -e {asked} ]; do sleep 0.1; done\necho x >>{asked}"
    binary = executable(tmp_path / "server", script)
    with ThreadPoolExecutor(40) as crowd:
        list(crowd.map(llmswap.options_of, [binary] * 39 + [other]))
    assert asked.read_text() == "x\n"


def test_a_child_starts_in_clean_surroundings(begin, tmp_path, monkeypatch):
    foreign = ("LISTEN_FDS LISTEN_PID NOTIFY_SOCKET WATCHDOG_USEC WATCHDOG_PID "
               "LLAMA_API_KEY LLAMA_SERVER_ROUTER_PORT LLMSWAP_API_KEY "
               "JOURNAL_STREAM").split()
    for name in (*foreign, "KEPT"):
        monkeypatch.setenv(name, "1")
    text = "cat /proc/self/oom_score_adj; ls /proc/self/fd; "
    text += "grep ^Sig[BI] /proc/self/status; env; exit 3"
    keys = {"cmd": script(tmp_path, text), "env.OTHER": "${PORT}"}
    inherited = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    watched = begin(**keys, oom_score_adj=777)
    assert "exited with status 3" in str(watched.exited())
    os.close(inherited)
    lines = list(watched.backend.lines)
    assert lines[:5] == ["777", "0", "1", "2", "3"]  # 3 is that of ls itself
    masks = {line[:6]: int(line[8:], 16) for line in lines if line.startswith("Sig")}
    ignored = re.search(r"SigIgn:\t(\w+)", Path("/proc/self/status").read_text())[1]
    ours = int(ignored, 16) & ~(1 << signal.SIGPIPE - 1)  # SIGHUP under nohup
    assert masks["SigBlk"] == 0 and masks["SigIgn"] & ~ours == 0, masks
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert environment["KEPT"] == "1"
    assert environment["OTHER"] == str(watched.backend.port)
    assert not set(foreign) & set(environment)


def test_the_guard_forgets_a_command_that_has_ended(guard):
    assert llmswap.run_command(["true"], 5) == (0, "")
    assert not guard._groups  # whose numbers may soon be others'


def test_a_score_that_the_kernel_refuses_is_told(guard, tmp_path):
    model = model_of(tmp_path)
    settings = model.settings._replace(oom_score_adj=2000)  # even to root
    watched = WatchedBackend(model._replace(settings=settings))
    watched.loaded()
    eventually(lambda: watched.wrote("llmswap: oom-score-adj 2000 was refused"))
    assert watched.stop() is None


FAILED_LOADS = [
    # how it ends; how many processes the kernel kills for memory meanwhile; the reason
    ("--load-exit 7", 0, "exited with status 7"),
    ("--load-signal 9", 0, "killed by signal 9 (SIGKILL)"),
    ("--load-signal 9", 1, "killed by the kernel: out of memory"),
    ("--load-exit 137", 1, "killed by the kernel: out of memory"),
]


@pytest.mark.parametrize("flags, kills, reason", FAILED_LOADS)
def test_a_failed_load_is_told_with_its_reason_and_last_lines(
    begin, monkeypatch, flags, kills, reason
):
    counts = itertools.count(0, kills)  # asked before the start, and at the end
    monkeypatch.setattr(llmswap, "oom_kills", lambda: next(counts))
    problem = begin("--lines", "1", *flags.split()).exited()
    assert f"m could not be started: {reason}" in str(problem)
    assert "load_tensors: layer 0 of 1" in str(problem)
    assert problem.may_retry is False and problem.status == 502
    assert problem.is_out_of_memory == bool(kills)
    assert problem.__traceback__ is None  # frames would keep descriptors open


def test_a_load_without_a_sign_of_progress_is_given_up(begin, monkeypatch):
    pages = itertools.count(0, 4096)  # a page now and then is no progress
    monkeypatch.setattr(llmswap, "_kernel_counts", lambda *_: next(pages))
    monkeypatch.setattr(llmswap, "LOOK_AT_LOADS", 0.05)
    problem = begin("--load-hang", load_timeout=0.3).exited()
    assert isinstance(problem, llmswap.LoadTimeout) and problem.status == 504
    assert "no sign of progress for 0.3 s" in str(problem)


LOADS = [
    # what a server does again and again before it is ready; how it is started
    ("print('line', flush=True)", ""),
    ("memory.append(b'x' * 2**20)", ""),
    ("os.preadv(file, [page], 0)", "sh -c '\"$@\"; exit' x "),  # past the cache
]
LOADING_SERVER = """\
import mmap, os, time
memory, page = [], mmap.mmap(-1, 2**20)
file = os.open('file', os.O_RDONLY | os.O_DIRECT)
while True:
    STEP
    time.sleep(0.03)
"""


@pytest.mark.parametrize("step, wrapper", LOADS)
def test_a_load_that_goes_on_is_not_given_up(
    begin, tmp_path, monkeypatch, step, wrapper
):
    monkeypatch.setattr(llmswap, "LOOK_AT_LOADS", 0.1)
    (tmp_path / "x.py").write_text(LOADING_SERVER.replace("STEP", step))
    (tmp_path / "file").write_bytes(bytes(2**20))
    keys = {"cmd": f"{wrapper}{sys.executable} -S {tmp_path}/x.py", "load_timeout": 1}

    def goes_on():
        watched = begin(**keys, proxy="http://127.0.0.1:1", cwd=tmp_path)
        with contextlib.suppress(queue.Empty):
            return not watched.events.get(timeout=1.5)
        return True

    assert any(goes_on() for _ in range(3))  # a server may be late, but not each time


@pytest.mark.parametrize("delay", [0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08])
def test_a_stop_at_any_moment_of_a_start_leaves_nothing(begin, delay):
    watched = begin("--load", "0.02")
    threading.Event().wait(delay)
    watched.backend.stop()
    event = watched.events.get(timeout=30)
    assert (watched.events.get(timeout=30) if event == "loaded" else event) is None
    assert not has_group(watched.backend.pid)


STOPS = [
    # flags, keys, is it loaded; the fewest seconds that it takes
    (["--ignore-term", "--grandchild"], {"stop_timeout": 60}, False, 0.0),
    (["--ignore-term", "--grandchild"], {"stop_timeout": 0.3}, True, 0.3),
    (["--stop-delay", "0.2"], {"cmd_stop": "/no", "stop_timeout": 60}, True, 0.2),
]


@pytest.mark.parametrize("flags, keys, is_loaded, least", STOPS)
def test_a_stop_takes_no_longer_than_it_may(begin, flags, keys, is_loaded, least):
    watched = begin(*flags, *([] if is_loaded else ["--load-hang"]), **keys)
    if is_loaded:
        watched.loaded()
    eventually(lambda: watched.wrote("listening"))
    asked_at = time.monotonic()
    assert watched.stop() is None
    assert least <= time.monotonic() - asked_at
    assert not has_group(watched.backend.pid)


def test_workers_that_outlive_their_leader_are_killed(begin):
    watched = begin("--grandchild")  # a child that holds its output open
    backend = watched.loaded()
    stats = get(backend.port, "/stats")
    assert (stats["pid"], stats["oom_score_adj"]) == (backend.pid, 1000)
    os.kill(backend.pid, signal.SIGKILL)
    assert "m ended by itself: killed by signal 9" in str(watched.exited())
    assert backend.died(0)
    worker = llmswap.process_stat(stats["grandchild"])
    assert worker is None or worker.state == "Z"


def test_a_stop_command_is_run_instead_and_may_finish(begin, tmp_path):
    record = tmp_path / "told"
    text = f"echo $1 $2 >{record}; kill -TERM $2; sleep 0.2; echo done >>{record}"
    watched = begin(cmd_stop=f"{script(tmp_path, text)} ${{PID}}")
    backend = watched.loaded()
    assert watched.stop() is None
    assert record.read_text() == f"{backend.port} {backend.pid}\ndone\n"


def test_a_stop_command_that_fails_without_a_word_is_reported():
    text = "[a]\ncmd = FAKE\ncmd-stop = false\nstop-timeout = 0.1\n"
    with Llmswap(text) as server:
        server.chat("a")
        unload(server, "a")
        eventually(lambda: "a | llmswap: cmd-stop: it failed" in server.log())


def test_a_stop_command_that_hangs_is_killed_with_what_it_started(begin, tmp_path):
    script(tmp_path, f"echo $$ >{tmp_path}/pid; sleep 60; :")
    watched = begin(cmd_stop=f"/bin/sh {tmp_path}/script", stop_timeout=3)
    watched.loaded()
    assert watched.stop() is None
    stopper = int((tmp_path / "pid").read_text())
    eventually(lambda: not has_group(stopper))


def test_a_flood_of_output_neither_blocks_it_nor_fills_the_memory(begin, tmp_path):
    flood = "head -c 400000 /dev/zero | tr '\\0' x; echo; echo over; exit 5"
    watched = begin(cmd=script(tmp_path, flood))
    assert "exited with status 5" in str(watched.exited())
    assert watched.backend.lines[-1] == "over"
    assert max(map(len, watched.backend.lines)) <= llmswap.MAX_LINE


@pytest.mark.parametrize("act", ["yes", "sleep 60"])
def test_a_process_that_left_the_group_delays_nothing(begin, tmp_path, act):
    pid = tmp_path / "pid"
    text = f"setsid sh -c 'echo $$ >{pid}; exec {act}' &\n"
    text += f"while [ ! -s {pid} ]; do sleep 0.01; done; exit 4"
    try:
        assert "status 4" in str(begin(cmd=script(tmp_path, text)).exited())
        eventually(lambda: "output" not in str(threading.enumerate()))
    finally:
        with contextlib.suppress(ProcessLookupError):  # its pipe may have no reader
            os.kill(int(pid.read_text()), signal.SIGKILL)


# -- readiness and strangers


@pytest.mark.parametrize("address, is_found", [
    ("127.0.0.1", True), ("0.0.0.0", True), ("127.0.0.2", False), ("::", True),
    ("::ffff:127.0.0.1", True),
])
def test_all_listeners_of_a_loopback_port_are_found(address, is_found):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as sockets:
        port, inodes = 0, set()
        for _ in range(100):
            sock = sockets.enter_context(socket.socket(family))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((address, port))
            port = sock.getsockname()[1]
            assert inodes or llmswap.listening_inodes(port) == set()
            sock.listen()
            inodes.add(os.fstat(sock.fileno()).st_ino)
        assert llmswap.listening_inodes(port) == (inodes if is_found else set())
        assert llmswap.holder_of(inodes.pop(), [1]) == os.getpid()


def test_without_a_check_endpoint_ready_means_that_the_port_accepts(begin):
    flags = ["--no-health", "--load", "0.05", "--bind-late"]
    begin(*flags, check_endpoint="none").loaded()


@pytest.fixture
def odd(begin):
    """Start a backend with the server .ci/odd.py."""

    def begin_odd(act, **keys):
        command = f"{sys.executable} -S {CI}/odd.py ${{PORT}} '{act}'"
        return begin(cmd=command, sleep="POST /sleep", wake="POST /wake", **keys)

    return begin_odd


def test_a_health_check_that_nobody_answers_is_repeated(odd, monkeypatch):
    monkeypatch.setattr(llmswap, "HEALTH_TIMEOUT", 0.1)
    odd("deaf").loaded()


def test_an_answer_that_is_no_http_or_none_is_not_healthy(odd, monkeypatch):
    monkeypatch.setattr(llmswap, "HEALTH_TIMEOUT", 60.0)
    for act in "SSH-2.0", "mute":
        assert "no sign of progress" in str(odd(act, load_timeout=0.4).exited())


@pytest.mark.parametrize("act", ["GET /health", "POST /wake"])
def test_an_exit_ends_a_probe_whose_socket_a_worker_holds_open(odd, act):
    watched = odd(act)
    if act == "GET /health":
        assert "status 3" in str(watched.exited())
    else:
        watched.loaded().wake()
        watched.loaded()  # it is started anew


class Stranger:
    """A foreign process that can listen on a port; `heard` returns what it received."""

    def __init__(self, port=None):
        self.port, pipe = port, subprocess.PIPE
        words = [*PYTHON, CI / "stranger.py"]
        new = {"start_new_session": True, "stdin": pipe, "stdout": pipe}
        self._process = subprocess.Popen(words, **new)
        self.pid = self._process.pid
        birth = llmswap.process_stat(self.pid).start + 1
        ticks = os.sysconf("SC_CLK_TCK")  # later processes are younger
        eventually(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) * ticks > birth)

    def listen(self):
        self._process.stdin.write(b"%d\n" % self.port)
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"listening\n"

    def heard(self):
        self._process.kill()
        return self._process.communicate()[0]


def kind_keys(kind, folder):
    """The keys that make [m] a fake server of this kind, ready once `go` exists."""
    flags = f"--bind-late --load-until {folder}/go"
    if kind == "cmd":
        return {"cmd": fake_command(flags)}
    (folder / "m.gguf").touch()
    binary = fake_binary(folder)
    return {"llama-server": binary, "model": folder / "m.gguf", "extra-args": flags}


@pytest.fixture
def stranger(monkeypatch):
    """A Stranger whose port is the first that llmswap chooses."""
    stranger, free = Stranger(free_port()), llmswap.free_port
    ports = iter([stranger.port])
    monkeypatch.setattr(llmswap, "free_port", lambda: next(ports, None) or free())
    yield stranger
    assert stranger.heard() == b""


@pytest.mark.parametrize("kind", ["cmd", "llama-server"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_stranger_on_the_chosen_port_hears_nothing(
    begin, stranger, tmp_path, kind, is_late
):
    if not is_late:
        stranger.listen()
    watched = begin(**kind_keys(kind, tmp_path))
    if is_late:
        eventually(lambda: watched.backend.pid)
        stranger.listen()
    eventually(lambda: watched.backend.port not in (None, stranger.port))
    (tmp_path / "go").touch()
    watched.loaded()
    assert get(watched.backend.port, "/stats")["pid"] == watched.backend.pid


def test_a_taken_port_is_found_after_an_exit(begin, stranger, tmp_path, monkeypatch):
    dial = llmswap.Upstream.dial

    def dial_others(upstream, timeout):
        if upstream.port == stranger.port:
            raise ConnectionRefusedError
        return dial(upstream, timeout)

    monkeypatch.setattr(llmswap.Upstream, "dial", dial_others)
    stranger.listen()
    text = f"PORT=$1\n[ $1 != {stranger.port} ] || exit 1\nexec {fake_command()}"
    assert begin(cmd=script(tmp_path, text)).loaded().port != stranger.port


def order_to(name):
    """The signal by which a fake server is ordered to do this."""
    number = next(number for number, order in fake.ORDERS.items() if order == name)
    return signal.SIGRTMIN + number


@pytest.mark.parametrize("later, is_reaped, is_ours", [
    (set(), False, True), ({1}, False, False), ({1}, True, False),
])
def test_a_child_that_ends_while_it_is_looked_at_is_no_stranger(
    tmp_path, monkeypatch, later, is_reaped, is_ours
):
    backend = llmswap.ProcessBackend(model_of(tmp_path), None, 0.0)
    backend.upstream = SimpleNamespace(host="127.0.0.1", port=1)
    child = subprocess.Popen(["true"])
    eventually(lambda: llmswap.process_stat(child.pid).state == "Z")
    if is_reaped:
        child.wait()
    backend.pid, looks = child.pid, iter([{1}, later])  # inodes of listeners
    monkeypatch.setattr(llmswap, "listening_inodes", lambda _: next(looks))
    assert backend._is_listener_ours() is is_ours
    assert bool(backend._stranger) is not is_ours
    child.wait()


def test_a_listener_of_a_child_whose_first_thread_has_ended_is_its_own(begin, tmp_path):
    starts = tmp_path / "starts"
    watched = begin(cmd=f"{sys.executable} {CI}/leaderless.py ${{PORT}} {starts}")
    assert "status 3" in str(watched.exited())
    assert starts.read_text().split() == ["started"]  # its port was not taken


def test_only_a_child_that_is_just_ending_has_time_to_die(begin, monkeypatch):
    backend, waits = begin().backend, []
    monkeypatch.setattr(llmswap.Backend, "died", lambda _, wait: waits.append(wait))
    for state, flags in ("S", 0), ("R", 4), ("Z", 4):
        stat = llmswap.ProcessStat(state, 1, 1, flags, 1, 1)
        monkeypatch.setattr(llmswap, "process_stat", lambda _, stat=stat: stat)
        backend.died(0.1)
    assert waits == [0.1, 5.0, 0.1]


def test_a_stranger_that_comes_after_the_load_is_found_by_a_hang_check(begin, tmp_path):
    (tmp_path / "go").touch()
    backend = begin(**kind_keys("llama-server", tmp_path), hang_timeout=0.3).loaded()
    stranger = Stranger(backend.port)
    os.kill(backend.pid, order_to("deaf"))  # it lives on
    eventually(lambda: not is_listening(backend.port))
    stranger.listen()
    eventually(lambda: backend.report_stall() or backend.died(0))  # as a request does
    assert stranger.heard() == b""


def test_a_stranger_may_leave_a_fixed_port_before_it_is_needed(begin, tmp_path):
    stranger, flags = Stranger(free_port()), ("--bind-late", "--load-until")
    stranger.listen()
    command = fake_command(*flags, str(tmp_path / "gone"), port=str(stranger.port))
    watched = begin(cmd=command, proxy=f"http://127.0.0.1:{stranger.port}")
    eventually(lambda: watched.backend._stranger)
    assert stranger.heard() == b""
    (tmp_path / "gone").touch()
    watched.loaded()


def test_a_fixed_port_held_by_a_stranger_is_told(begin, monkeypatch):
    monkeypatch.setattr(llmswap, "HEALTH_TIMEOUT", 0.3)
    stranger = Stranger(free_port())
    stranger.listen()
    reason = rf"its port {stranger.port} is held by process {stranger.pid} \(python"
    for command, expected in (
        ("sleep 60", reason),  # the other one may say so before the port is asked
        (fake_command(port=str(stranger.port)), f"{reason}|Address already in use"),
    ):
        watched = begin(cmd=command, proxy=f"http://127.0.0.1:{stranger.port}")
        assert re.search(expected, str(watched.exited()))
    assert stranger.heard() == b""


def test_a_line_at_every_check_does_not_make_checks_endless(begin, monkeypatch):
    probes, probe = [], llmswap.Backend._probe
    count = lambda *words: probes.append(words) or probe(*words)  # noqa: E731
    monkeypatch.setattr(llmswap.Backend, "_probe", count)
    began = time.monotonic()
    begin("--load", "0.4", "--lines", "1000").loaded()
    most = (time.monotonic() - began) / 0.005  # the pause between two of them
    assert 0 < len(probes) <= most + 2


def test_a_worker_may_be_the_server_and_close_its_output(begin, tmp_path):
    text = f"exec >&- 2>&-\nPORT=$1\n{fake_command()} &\nwait"
    watched = begin(cmd=script(tmp_path, text))
    backend = watched.loaded()
    assert get(backend.port, "/stats")["pid"] != backend.pid
    cpu = time.process_time()
    threading.Event().wait(0.2)
    assert time.process_time() - cpu < 0.03  # no thread spins on the closed output
    assert watched.stop() is None


def test_a_silent_request_with_answering_health_is_left_alone(begin):
    watched = begin(hang_timeout=9)
    backend = watched.loaded()
    with Client(backend.port) as client:
        client.send("POST", CHAT, chat_body("m", hang=True))
        seen = get(backend.port, "/stats")["health"]
        for _ in range(3):
            backend.report_stall()
            eventually(lambda: backend._silent_since is None)
        assert get(backend.port, "/stats")["health"] > seen
        assert watched.events.empty()
    backend = begin().loaded()  # of `cmd`, which is not suspected by default
    backend.report_stall()
    assert backend._silent_since is None


GPU_TOOLS = [
    # the tool and its script, where PID is a worker of the stopped model; does the next
    # start wait for that worker as long as it may, and how long is that in s
    ("nvidia-smi", "echo 1; echo $PID", True, 0.5),
    ("rocm-smi", "echo 'PID  PROCESS'; echo \"$PID  python3  1  4096\"", True, 0.5),
    ("nvidia-smi", "echo 1; [ -e $0.asked ] || echo $PID; touch $0.asked", False, 15),
    ("nvidia-smi", "exec sleep 60", True, 0.5),
    ("nvidia-smi", "exit 9", False, 15),
]


@pytest.mark.parametrize("tool, does, is_awaited, most", GPU_TOOLS)
def test_the_next_start_waits_for_the_gpu_no_longer_than_it_may(
    tool, does, is_awaited, most, tmp_path
):
    text = f"[llmswap]\nsettle-timeout = {most}s\n[b]\ncmd = FAKE --model b\n"
    text += "[a]\ncmd = FAKE --model a --grandchild\n"
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Llmswap(text, env={"PATH": path}) as server:
        server.chat("a")
        pid = server.stats("a")["grandchild"]
        executable(tmp_path / tool, f"PID={pid}\n{does}")
        assert server.chat("b").status == 200
        ended, began = server.journal("end", "a")[0], server.journal("main", "b")[0]
        assert (began["t"] - ended["t"] >= most) is is_awaited


# -- descriptors, threads, guard


def test_lives_leave_no_descriptor_and_no_thread(begin):
    def live(*flags):
        watched = begin(*flags)
        if not flags:
            watched.loaded()
        if "--load-exit" not in flags:
            watched.backend.stop()
        watched.exited()
        watched.backend = SimpleNamespace(pid=None, stop=lambda at_once: None)

    live()
    threads, before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        live(), live("--load-exit", "1"), live("--load-hang")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
    eventually(lambda: threading.active_count() <= threads)
    assert not zombies_of(os.getpid())


def test_a_fork_that_fails_is_a_failed_start(begin, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(llmswap.subprocess, "Popen", refuse_to_fork)
        assert "no more processes" in str(begin().exited())
    begin().loaded()


@pytest.fixture
def upstream():
    """An Upstream, and as `listener` the socket to which it leads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        upstream = llmswap.Upstream(f"http://127.0.0.1:{listener.getsockname()[1]}")
        upstream.listener = listener
        yield upstream
        upstream.close()


def test_a_closed_upstream_gives_no_connection_and_cuts_those_in_use(upstream):
    used, idle = upstream.connect()[0], upstream.connect()[0]
    upstream.release_connection(idle)
    assert upstream.connect() == (idle, True)
    upstream.release_connection(idle)
    upstream.close()
    assert used.recv(1) == b""
    upstream.release_connection(used)
    assert used.fileno() == idle.fileno() == -1
    with pytest.raises(ConnectionAbortedError):
        upstream.connect()


def test_a_connection_kept_over_a_suspension_is_not_used_again(upstream, monkeypatch):
    upstream.release_connection(upstream.connect()[0])
    suspended = llmswap.suspended_seconds() + 60
    monkeypatch.setattr(llmswap, "suspended_seconds", lambda: suspended)
    assert not upstream.connect()[1]


@pytest.mark.parametrize("shell", ["/bin/sh", "bash"])
def test_the_guard_kills_the_groups_it_was_told_and_no_others(shell):
    stubborn = ["/bin/sh", "-c", "trap '' TERM INT HUP; echo; sleep 60 & sleep 60"]
    new = {"start_new_session": True, "stderr": subprocess.DEVNULL}
    pipe = subprocess.PIPE
    groups = [subprocess.Popen(stubborn, stdout=pipe, **new) for _ in range(3)]
    for group in groups:
        with group.stdout as output:
            assert output.readline()  # its trap is set
    guard = subprocess.Popen([shell, "-c", llmswap.GUARD_SCRIPT], stdin=pipe, **new)
    signs = "+ {0}\n+ {1}\n- {1}\n+ {2}\n+ {2}\n- {2}\n"
    signs = signs.format(*(group.pid for group in groups))
    guard.communicate(signs.encode(), timeout=20)
    assert groups[0].wait(20) == -signal.SIGKILL
    eventually(lambda: not has_group(groups[0].pid))
    assert groups[1].poll() is None and groups[2].poll() is None
    for group in groups[1:]:
        os.killpg(group.pid, signal.SIGKILL)
        group.wait()


def refuse_to_fork(*_, **__):
    raise OSError(errno.EAGAIN, "no more processes")


# ==================================================================================
# 5  Pool
# ==================================================================================


class Puppet:
    """A backend that does what the test says."""

    pid, port, upstream, location, started_at = 1, 2, None, "pid 1", 0.0
    progress = None

    def __init__(self, model, listener):
        self.model = model
        self.listener = listener
        self.is_stopping = False

    def start(self):
        """Nothing: the test says when it is loaded."""

    def stop(self, at_once=False):
        self.is_stopping = True

    def sleep(self):
        """Nothing: the test says when it sleeps."""

    def is_reachable(self):
        return True

    def load(self):
        self.started_at = time.monotonic()
        self.listener.on_loaded(self)

    def end(self, problem=None):
        self.listener.on_exited(self, problem)


class PoolRequest:
    """A request on a thread of its own, with a lease until `end`."""

    def __init__(self, pool, name):
        self.backend = self.problem = None
        self._may_end, self._is_over = threading.Event(), threading.Event()
        work, before = (pool, pool.config.resolve(name)), count_of(pool)
        threading.Thread(target=self._run, args=work, daemon=True).start()
        eventually(lambda: self._is_over.is_set() or count_of(pool) > before)

    def _run(self, pool, model):
        try:
            with pool.lease(model, lambda: False) as backend:
                self.backend = backend
                self._may_end.wait(30)
        except llmswap.APIError as problem:
            self.problem = problem
        self._is_over.set()

    def granted(self):
        return eventually(lambda: self.backend)

    def refused(self):
        return eventually(lambda: self.problem)

    def end(self):
        self._may_end.set()
        assert self._is_over.wait(5)


def count_of(pool):
    """How many requests run or wait."""
    counts = pool.counts()
    return counts["queued"] + counts["requests"]


class PoolStage:
    """A Pool whose backends are puppets and whose clock is turned by hand."""

    def __init__(self, folder, text):
        self._folder = folder
        self.now = 1000.0
        self.backends = []  # every puppet there was
        self.log_lines = []
        log = lambda *line: self.log_lines.append(line)  # noqa: E731
        self.pool = llmswap.Pool(self.config(text), log, self._make, lambda: self.now)

    def _make(self, model, listener):
        self.backends.append(Puppet(model, listener))
        return self.backends[-1]

    def config(self, text):
        return read(self._folder, text.replace("TRUE", "cmd = true ${PORT}"))

    def ask(self, name):
        return PoolRequest(self.pool, name)

    def backend(self, name, number=-1):
        runs = lambda: [e for e in self.backends if e.model.name == name]  # noqa: E731
        return eventually(runs)[number]

    def state(self, name):
        return self.pool.status(self.pool.config.models[name]).state

    def load(self, name):
        request = self.ask(name)
        self.backend(name).load()
        request.granted()
        request.end()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(llmswap, "POLL_INTERVAL", 0.02)  # how soon a hang-up is noticed
    return PoolStage(tmp_path, "[a]\nTRUE\n[b]\nTRUE\n")


@pytest.mark.parametrize("error", [OSError(24, "none left"), RuntimeError("no thread")])
def test_a_start_that_fails_at_once_blocks_nothing(stage, monkeypatch, error):
    def fail(*_):
        raise error

    is_made = isinstance(error, RuntimeError)  # but cannot be started
    broken = (Puppet, "start") if is_made else (stage.pool, "_make_backend")
    with monkeypatch.context() as patch, stage.pool.events.subscribe() as get:
        patch.setattr(*broken, fail)
        problem = stage.ask("a").refused()
        events = [get(1)["data"], get(1)["data"]]
    assert problem.status == 502 and "could not be started" in str(problem)
    assert ("error", str(problem)) in stage.log_lines and stage.state("a") == "unloaded"
    assert events == [{"status": "loading"}, {"status": "unloaded", "exit_code": 1}]
    assert stage.pool.backend_of(stage.pool.config.resolve("a")) is None
    stage.load("b")


def test_a_backend_that_wakes_by_itself_is_no_load(stage):
    stage.load("a")
    stage.pool.on_slept(stage.backend("a"))
    stage.pool.on_loaded(stage.backend("a"))
    assert stage.state("a") == "loaded"
    loads = [count for key, count in stage.pool.metrics().items() if key[0] == "loads"]
    assert loads == [1]


def test_a_model_misconfigured_by_a_reload_refuses_waiting_and_new_requests(stage):
    stage.load("a")
    waiting = stage.ask("b")
    broken = "[a]\nTRUE\nno-such-key = 1\n[b]\nno-such-key = 1\n"
    stage.pool.reload(stage.config(broken))
    assert isinstance(waiting.refused(), llmswap.ModelMisconfigured)
    assert stage.state("a") == "loaded"  # as it is
    assert isinstance(stage.ask("a").refused(), llmswap.ModelMisconfigured)


def test_a_model_in_memory_is_not_examined_again(stage, monkeypatch):
    stage.load("a")
    monkeypatch.setattr(llmswap, "check_start", Mock(side_effect=llmswap.LoadFailed("x")))
    request = stage.ask("a")
    request.granted()
    request.end()


def test_a_backend_that_drains_keeps_its_settings_through_any_reloads(stage):
    stage.load("a")
    request, backend = stage.ask("a"), stage.backend("a")
    request.granted()
    for command, stop in (("true", "one"), ("new", "two"), ("new", "three")):
        text = f"[a]\ncmd = {command} ${{PORT}}\ncmd-stop = {stop}\n"
        stage.pool.reload(stage.config(text))
        assert backend.model.settings.cmd_stop == "one"
    request.end()


def test_one_that_falls_asleep_is_stopped_at_the_end(tmp_path):
    asleep = "\nsleep = /s\nwake = /w\n"
    text = f"[llmswap]\npatience = 0\n[a]\nTRUE{asleep}[b]\nTRUE\n"
    stage = PoolStage(tmp_path, text)
    stage.load("a")
    stage.ask("b")
    eventually(lambda: stage.state("a") == "unloading")
    end = threading.Thread(target=stage.pool.close, args=(0,))
    end.start()
    eventually(lambda: stage.backends[0].is_stopping)
    stage.backends[0].end()
    end.join(5)
    assert not end.is_alive()


class Quick(Puppet):
    """A backend that loads and ends by itself after random moments."""

    def start(self):
        self._is_asked = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self, at_once=False):
        self._is_asked.set()

    def _run(self):
        chance = random.random()
        is_asked = self._is_asked.wait(random.random() * 0.004)
        if not is_asked and chance > 0.1:
            self.load()
            lifetime = random.random() * 0.05 if chance < 0.3 else None
            is_asked = self._is_asked.wait(lifetime)
        self.end(None if is_asked else llmswap.LoadFailed("bad luck"))


def test_many_threads_at_once_get_a_backend_or_a_reason(tmp_path):
    text = "[llmswap]\nmodels-max = 2\npatience = 0\n"
    text += "".join(f"[{name}]\ncmd = true ${{PORT}}\n" for name in "abcde")
    pool = llmswap.Pool(read(tmp_path, text), lambda *_: None, Quick)
    pool.start()
    served = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(30):
            model = pool.config.resolve(rng.choice("abcde"))
            with contextlib.suppress(llmswap.APIError, llmswap.ClientDisconnected):
                with pool.lease(model, lambda: rng.random() < 0.1) as backend:
                    served.append(type(backend) is Quick)
                    if rng.random() < 0.1:
                        pool.unload(model)

    with ThreadPoolExecutor(16) as crowd:
        list(crowd.map(work, range(16)))
    assert all(served) and len(served) > 20
    assert count_of(pool) == 0
    pool.close(0)


def test_load_on_startup_does_not_delay_the_start(tmp_path, monkeypatch):
    asked, may_go_on = threading.Event(), threading.Event()

    def check(model):
        asked.set()
        may_go_on.wait(10)

    monkeypatch.setattr(llmswap, "check_start", check)
    stage = PoolStage(tmp_path, "[a]\nTRUE\nload-on-startup = on\n[b]\nTRUE\n")
    stage.pool.start()
    assert asked.wait(5) and not stage.backends
    may_go_on.set()
    stage.backend("a").load()
    assert stage.state("a") == "loaded"
    stage.backend("a").end()
    stage.pool.close(0)


def test_a_model_misconfigured_by_a_reload_during_its_check_blocks_nothing(
    stage, monkeypatch
):
    text = "[llmswap]\nmodels-max = 1\nbudget = vram 1G\n[a]\nTRUE\nneeds = vram 2G\n"
    config = stage.config(text + "[b]\nTRUE\n")
    monkeypatch.setattr(llmswap, "check_start", lambda _: stage.pool.reload(config))
    assert "the budget is vram 1G" in str(stage.ask("a").refused())
    stage.ask("b")
    assert stage.state("b") == "loading"


def test_a_unit_replaced_by_a_reload_during_the_search_is_not_adopted(
    tmp_path, monkeypatch
):
    text = "[a]\nunit = {}.service\nproxy = http://127.0.0.1:3004\n"
    stage = PoolStage(tmp_path, text.format("old"))

    def running(*_, **__):
        monkeypatch.setattr(llmswap, "running_units", lambda *_, **__: set())
        stage.pool.reload(stage.config(text.format("new")))
        return {"old.service"}

    monkeypatch.setattr(llmswap, "running_units", running)
    monkeypatch.setattr(Puppet, "adopt", Puppet.start, raising=False)
    stage.pool._adopt_units()
    assert stage.state("a") == "unloaded" and not stage.backends


def test_a_follower_that_does_not_keep_up_loses_items(monkeypatch):
    monkeypatch.setattr(llmswap.Broadcast, "BACKLOG", 10)
    feed = llmswap.Broadcast(3)
    with feed.subscribe() as get, feed.subscribe() as other:
        for number in range(100):
            feed.publish(number)
        assert [get(0) for _ in range(11)] == [*range(10), None]
        feed.publish(100)
        assert get(0.1) == 100 and other(0) == 0
    with feed.subscribe() as get:
        assert [get(0) for _ in range(4)] == [98, 99, 100, None]
    assert not feed._followers


# ==================================================================================
# 10  Command line
# ==================================================================================

MANY = """\
[llmswap]
models-max = 0
[still]
cmd = FAKE --model still --grandchild --ignore-term
[loading]
cmd = FAKE --model loading --load-hang --grandchild --ignore-term
[stopping]
cmd = FAKE --model stopping --grandchild --ignore-term
stop-timeout = 20
"""


def ask_later(server, model):
    """Send a chat request, and read no answer."""
    client = server.connect()
    client.send("POST", CHAT, chat_body(model))
    server.unread.append(client)
    return client


def unload(server, model):
    """Unload a model by hand, and wait until it is unloaded."""
    assert server.post("/models/unload", {"model": model}).status == 200
    eventually(lambda: server.states()[model] == "unloaded")


KILLS = int(os.environ.get("KILLS", 2))  # 50 takes most of a minute
KILL_MOMENTS = [0.001, *(random.uniform(0, 1.5 / 50 * KILLS) for _ in range(KILLS - 1))]


@pytest.mark.parametrize("moment", [None, *KILL_MOMENTS], ids=range(KILLS + 1))
def test_sigkill_at_any_moment_leaves_nothing_of_any_group(moment):
    with Llmswap(MANY) as server:
        for model in ("still", "loading", "stopping"):
            ask_later(server, model)
        if moment is None:  # each model in the state that its name says
            eventually(lambda: server.journal("grandchild", "loading"))
            assert server.chat("still").status == server.chat("stopping").status == 200
            server.post("/models/unload", {"model": "stopping"})
            eventually(lambda: server.journal("term", "stopping"))
            eventually(lambda: len(family(server.token)) == 8)
        else:
            threading.Event().wait(moment)
        server.kill()
        eventually(lambda: not family(server.token), 5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_hangs_ends_with_llmswap(tmp_path, number):
    binary = executable(tmp_path / "llama-server", "exec sleep 600")
    text = f"[llmswap]\nllama-server = {binary}\n[a]\nmodel = {binary}\n"
    with Llmswap(text) as server:  # it asks the binary for its options
        eventually(lambda: "sleep 600" in family(server.token).values())
        server.process.send_signal(number)
        server.process.wait(30)
        eventually(lambda: not family(server.token), 5)


def test_a_killed_guard_is_replaced_and_knows_every_group():
    def guards(server):
        lines = family(server.token).items()
        return [pid for pid, line in lines if "llmswap-guard" in line]

    with Llmswap(MANY) as server:
        ask_later(server, "loading")
        assert server.chat("still").status == 200
        eventually(lambda: server.journal("grandchild", "loading"))
        [old] = guards(server)
        os.kill(old, signal.SIGKILL)
        eventually(lambda: zombies_of(server.pid))
        ask_later(server, "stopping")
        eventually(lambda: guards(server) not in ([], [old]))
        eventually(lambda: not zombies_of(server.pid))
        server.kill()


# ---- signals


def test_sigterm_lets_requests_end_and_refuses_those_that_wait_or_come_late():
    text = "[a]\ncmd = FAKE --model a --grandchild\n[b]\ncmd = FAKE --model b\n"
    body = encoded(chat_body("a"))
    start = Llmswap(text, REFUSAL_SECONDS=20.0)
    with start as server, server.connect() as late, server.connect() as idle:
        end = server.folder / "end"
        stream = server.stream("a", tokens=10**6, interval=0.02, until=str(end))
        waiting = ask_later(server, "b")
        eventually(lambda: server.get("/health").json().get("queued"))
        late.sock.sendall(request_head("POST", CHAT, len(body)) + body[:9])
        assert idle.ask("GET", "/health").status == 200
        server.process.terminate()
        assert idle.sock.recv(1) == b""
        eventually(lambda: not is_listening(server.port))
        server.process.send_signal(signal.SIGHUP)  # SIGHUP is no second signal
        refusal = waiting.answer()
        assert refusal.status == 503 and "retry-after" in refusal.headers
        end.touch()
        assert stream.text() and stream.is_complete
        late.sock.sendall(body[9:])  # at the very end
        assert late.answer().status == 503
        assert server.process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_everything_at_once(number):
    text = "[a]\ncmd = FAKE --model a --ignore-term\nstop-timeout = 60\n"
    with Llmswap(text) as server, server.stream("a", tokens=1000, interval=0.1):
        server.process.send_signal(number)
        eventually(lambda: "ending" in server.log())
        server.process.send_signal(number)
        assert server.process.wait(20) == 0


def test_idle_backends_are_stopped_in_parallel(tmp_path):
    keys = f"cmd = FAKE --stop-until {tmp_path}/end\nstop-timeout = 60\n"
    models = "".join(f"[{name}]\n{keys}" for name in "abcd")
    with Llmswap(f"[llmswap]\nmodels-max = 0\n{models}") as server:
        for name in "abcd":
            server.chat(name)
        server.process.terminate()
        eventually(lambda: len(server.journal("term")) == 4)
        (tmp_path / "end").touch()
        assert server.process.wait(20) == 0


def test_a_request_after_a_stop_during_the_load_is_served_every_time(tmp_path):
    end = tmp_path / "end"
    with Llmswap(f"[a]\ncmd = FAKE --load-until {end}\n") as server:
        for number in range(8):
            first = ask_later(server, "a")
            eventually(lambda: server.states()["a"] == "loading", every=0.001)
            server.post("/models/unload", {"model": "a"})
            end.touch()
            assert server.chat("a").status == 200, number
            assert first.answer().status == 503
            end.unlink()
            unload(server, "a")
        eventually(lambda: not zombies_of(server.pid))


def test_nothing_runs_while_nothing_happens():
    with Llmswap("[a]\ncmd = FAKE\n") as server:
        server.chat("a")
        counts = [-1]

        def is_asleep():
            counts.append(wakeups(server.pid))
            return counts[-2] == counts[-1]

        eventually(is_asleep, every=0.5)
        assert not zombies_of(server.pid)


# ---- reload


def test_a_reload_keeps_streams_replaces_changed_and_removes_missing_models():
    text = "[llmswap]\nmodels-max = 0\n[kept]\ncmd = FAKE --model kept\n"
    text += "[changed]\ncmd = FAKE --model {}\n"
    with Llmswap(text.format("old") + "[gone]\ncmd = FAKE --model gone\n") as server:
        names = "kept", "changed", "gone"
        streams = [server.stream(name, tokens=40, interval=0.02) for name in names]
        pid = server.stats("kept")["pid"]
        server.reload(text.format("new"))
        eventually(lambda: "models: kept, changed\n" in server.log())
        waiting = ask_later(server, "changed")
        assert server.chat("gone").status == 404
        assert all("word39" in stream.text() for stream in streams)
        assert waiting.answer().content().startswith("new ")
        assert server.stats("kept")["pid"] == pid
        eventually(lambda: "model gone" not in str(family(server.token)))


def test_a_signal_is_heard_behind_many_others():
    with Llmswap("") as server:
        server.ini.unlink()
        os.mkfifo(server.ini)
        for _ in range(400):
            server.process.send_signal(signal.SIGHUP)  # while it waits for the file
            eventually(lambda: not pending_signals(server.pid), every=0.0005)
        server.process.terminate()
        assert server.process.wait(10) == 0


def pending_signals(pid):
    """A mask of the signals of a process that none of its threads has handled yet."""
    fields = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"ShdPnd:\s*(\w+)", fields)[1], 16)


def test_a_new_key_counts_on_open_connections():
    locked = "[llmswap]\napi-key = {}\n[a]\ncmd = FAKE\n"
    old, new = ({"Authorization": f"Bearer {key}"} for key in ("old", "new"))
    with Llmswap(locked.format("old")) as server, server.connect() as client:
        request = "GET", "/v1/models", None
        assert [client.ask(*request, old).status for _ in range(3)] == [200] * 3
        server.reload(locked.format("new"))
        eventually(lambda: "was read again" in server.log())
        answers = [client.ask(*request, key).status for key in (old, new, old, new)]
        assert answers == [401, 200, 401, 200]


def test_a_log_level_holds_from_the_first_line():
    with Llmswap("[llmswap]\nlog-level = error\n[a]\ncmd = FAKE\n") as server:
        assert server.chat("a").status == 200
        assert "llmswap 1.0 at" not in server.log()


@pytest.mark.parametrize("args", [(), ("--verbose",)])
def test_a_reload_sets_the_log_level_unless_verbose_does(args):
    with Llmswap("[a]\ncmd = FAKE\n", *args) as server:
        server.reload("[llmswap]\nlog-level = error\n[b]\ncmd = FAKE\n")
        eventually(lambda: "b" in server.states())
        assert server.chat("b").status == 200
        eventually(lambda: ("b: loading" in server.log()) == bool(args))


# ---- how it is started


@contextmanager
def running(command, address, **options):
    """The process of llmswap (or what this command starts), once it answers there; it
    must end with status 0 at a SIGTERM, without a traceback if its stderr is a pipe."""
    is_command = isinstance(command, list)
    process = subprocess.Popen(command, **options) if is_command else command
    with process:
        try:
            eventually(lambda: llmswap.is_llmswap(address))
            yield process
            process.terminate()
            written = process.communicate(timeout=30)[1]
            assert process.returncode == 0 and "Traceback" not in (written or "")
        finally:
            process.kill()


IGNORE_SIGCHLD = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
WAYS_TO_START = {
    "as a file": [],
    "as a module": [],
    "without descriptors": ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"],
    "with SIGCHLD ignored": [
        sys.executable, "-c", f"{IGNORE_SIGCHLD}; os.execv(sys.argv[1], sys.argv[1:])",
    ],
}


@pytest.mark.parametrize("way", WAYS_TO_START)
def test_however_it_is_started_it_serves_and_ps_shows_its_command(tmp_path, way):
    port = free_port()
    bad = fake_command("--load-exit", 7)
    text = f"[m]\ncmd = {fake_command()}\n[bad]\ncmd = {bad}\n"
    (tmp_path / "m.ini").write_text(text)
    shutil.copy(LLMSWAP, tmp_path / "llmswap.py")
    file = ["-m", "llmswap"] if way == "as a module" else [llmswap_file()]
    file = [LLMSWAP] if way == "as a file" else file
    words = [sys.executable, *file, "m.ini", "--listen", f"127.0.0.1:{port}"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [*WAYS_TO_START[way], *words]
    with running(command, ("127.0.0.1", port), cwd=tmp_path, env=env) as process:
        shown = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[:-1]
        assert shown == words
        assert ask(port, "POST", CHAT, chat_body("m")).status == 200
        answer = ask(port, "POST", CHAT, chat_body("bad"))
        assert "exited with status 7" in answer.message()
        if way == "without descriptors":
            fds = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)]
            assert fds == [os.devnull] * 3
    is_cached = bool(list((tmp_path / "__pycache__").glob("llmswap.*.pyc")))
    assert is_cached == (way == "as a module")


def test_stderr_that_nobody_reads_delays_neither_requests_nor_the_end(tmp_path):
    (tmp_path / "m.ini").write_text(f"[m]\ncmd = {fake_command()}\n")
    port = free_port()
    words = [*PYTHON, llmswap_file(), str(tmp_path / "m.ini"), "--verbose"]
    words += ["--listen", f"127.0.0.1:{port}"]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write_end, b"x" * 4096):
            pass
    os.set_blocking(write_end, True)
    with running(words, ("127.0.0.1", port), stderr=write_end):
        assert ask(port, "POST", CHAT, chat_body("m")).status == 200
    os.close(read_end), os.close(write_end)


def test_listen_needs_a_restart(tmp_path):
    path, place = tmp_path / "m.ini", tmp_path / "socket"
    path.write_text(f"[llmswap]\nlisten = unix:{place}\n")
    command = [*PYTHON, llmswap_file(), str(path)]
    with running(command, str(place), stderr=subprocess.PIPE, text=True) as process:
        path.write_text(f"[llmswap]\nlisten = 127.0.0.1:{free_port()}\n")
        process.send_signal(signal.SIGHUP)
        assert any("`listen` needs a restart" in line for line in process.stderr)
        assert llmswap.is_llmswap(str(place))


def test_a_file_is_looked_at_later_if_no_thread_can_be_started(tmp_path, monkeypatch):
    watch, changes = llmswap.FileWatch(str(tmp_path)), []
    monkeypatch.setattr(llmswap, "WATCH_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_to_start)
        watch.check(lambda: None)
    (tmp_path / "new").touch()
    watch.check(lambda: changes.append("seen"))
    eventually(lambda: changes == ["seen"])


def refuse_to_start(_):
    raise RuntimeError("can't start new thread")


def test_a_second_start_exits_0_and_a_foreign_listener_is_an_error(tmp_path):
    (tmp_path / "m.ini").write_text("[m]\ncmd = true ${PORT}\n")
    words, place = [tmp_path / "m.ini", "--listen"], str(tmp_path / "socket")
    ours = running([*PYTHON, llmswap_file(), *words, f"unix:{place}"], place)
    with Llmswap("") as tcp, Fake() as other, ours:
        for listen, status, text in (
            (f"127.0.0.1:{tcp.port}", 0, "llmswap answers at http://{}/ already"),
            (f"127.0.0.1:{other.port}", 1, "cannot listen on http://{}/: Address "),
            (f"unix:{place}", 0, "llmswap answers at {} already"),
        ):
            done = run_llmswap(*words, listen)
            assert done.returncode == status
            assert text.format(listen) in done.stderr


def test_output_that_cannot_be_written_is_an_error():
    keys, null = [sys.executable, llmswap_file(), "--keys"], subprocess.DEVNULL
    with open("/dev/full", "w") as full:
        assert subprocess.call(keys, stdout=full, stderr=null) == 1


@pytest.mark.parametrize("by_rename", [False, True])
def test_an_edited_file_is_in_use_before_the_next_request(by_rename):
    text = "[llmswap]\nmodels-max = 0\n[kept]\ncmd = FAKE --model kept\n"
    with Llmswap(text, WATCH_EVERY=0.0, WATCH_TIMEOUT=20.0) as server:
        edit = server.write if by_rename else server.ini.write_text
        with server.stream("kept", tokens=10**6, interval=0.05) as stream:
            events = stream.events()
            next(events)
            text = server.ini.read_text()
            edit(text + "[new]\nuses = kept\n")
            assert server.chat("new").status == 200
            edit(text + "[new]\nuses = nobody\n[[")
            for _ in range(3):
                assert server.chat("new").status == 200  # of the last good file
            assert ":7: " in shown_problem(server)
            eventually(lambda: f"not reloaded: {server.ini}:7: " in server.log())
            assert server.log().count("not reloaded: ") == 1
            server.ini.unlink()
            assert server.chat("new").status == 200
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: server.log().count("not reloaded: ") == 2)
            edit(text)
            assert server.chat("new").status == 404
            assert shown_problem(server) is None
            next(events)


def shown_problem(server):
    with Stream(server.port, "/", headers={"Accept": "text/event-stream"}) as stream:
        return next(stream.documents())["problem"]


def test_a_file_is_looked_at_by_requests_only_and_not_if_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(llmswap, "WATCH_EVERY", 99.0)
    monkeypatch.setattr(llmswap, "WATCH_TIMEOUT", 20.0)
    path, changes = tmp_path / "x.ini", []
    path.write_text("0")
    watch = llmswap.FileWatch(str(path))
    path.write_text("")  # as editors and shells do before they write it
    watch._find_change(lambda: changes.append("empty"))
    for text in ("1", "22"):  # the second one too soon after the first
        path.write_text(text)
        watch.check(lambda: changes.append(path.read_text()))
    assert changes == ["1"]
    with Llmswap("[llmswap]\nwatch = off\n[a]\ncmd = FAKE", WATCH_EVERY=0.0) as server:
        server.write("[b]\ncmd = FAKE")
        assert server.chat("a").status == 200
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: server.chat("b").status == 200)


def test_a_file_on_a_mount_that_hangs_delays_requests_little(tmp_path, monkeypatch):
    watch, hanging, waits = llmswap.FileWatch(str(tmp_path)), threading.Event(), []
    monkeypatch.setattr(watch, "_stamp", hanging.wait)
    monkeypatch.setattr(llmswap, "WATCH_TIMEOUT", 0.2)
    watch.check(lambda: None)
    assert watch._look.is_alive()
    monkeypatch.setattr(watch._look, "join", waits.append)
    watch.check(lambda: None)  # later requests do not wait for it again
    hanging.set()
    assert waits == [0.0]


def test_a_reload_lists_downloads_unless_the_binary_fails(tmp_path):
    binary = tmp_path / "llama-server"
    text = f"[llmswap]\nllama-server = {binary}\ncache-models = on\n"
    with Llmswap(text, WATCH_EVERY=0.0, WATCH_TIMEOUT=6.0) as server:
        eventually(lambda: "shows no model" in server.log())
        for script, names, warnings in (
            ("echo ' 1. a/b:Q8_0'", ["a/b:Q8_0"], 1), ("exit 1", ["a/b:Q8_0"], 2),
            ("echo none", [], 3),
        ):
            executable(binary, script)
            server.get("/v1/models?reload=1")
            eventually(lambda: server.log().count("shows no model") >= warnings)
            eventually(lambda: [*server.states()] == names)
        executable(binary, "sleep 9")
        server.write(f"{text}[a]\ncmd = FAKE")
        assert server.chat("a").status == 200


@pytest.mark.parametrize("output", [None, "number of models in cache: 0"])
def test_without_a_file_and_downloads_three_lines_say_what_to_do(tmp_path, output):
    if output:
        executable(tmp_path / "llama-server", f"echo '{output}'")
    env = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = run_llmswap(env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 3 and "llama-server -hf" in done.stderr


# ==================================================================================
# 4  Backends: units (of a stand-in systemctl), sleep, remote models, models that stay
# ==================================================================================

BRISK = dict(
    COMMAND_TIMEOUT=20.0, WAKE_INTERVAL=0.2, CONNECT_TIMEOUT=0.3, POLL_INTERVAL=0.1,
    EARLY_HEAD_AFTER=0.2, JOURNAL_DELAY=0.01, ADOPT_TIMEOUT=20.0,
)


def test_the_parrot_repeats_the_last_message():
    with socketserver.TCPServer(("127.0.0.1", 0), llmswap.Parrot) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with Client(server.server_address[1]) as client:  # one connection for all
            assert client.ask("GET", "/health").json()["status"] == "ok"
            assert client.ask("GET", "/v1/models").json()["data"] == [{"id": "parrot"}]
            messages = [{"content": "no"}, {"content": "Hi you"}]
            body = {"model": "jo", "messages": messages}
            answer = client.ask("POST", CHAT, body)
            assert answer.content() == "jo says: Hi you"
            assert answer.json()["usage"]["completion_tokens"] == 4
            assert b"squawk" in client.ask("POST", CHAT, {"messages": []}).body
            began = time.monotonic()
            answer = client.ask("POST", CHAT, {**body, "stream": True})
            assert time.monotonic() > began + 0.2
            assert answer.headers["content-type"] == "text/event-stream"
            words = re.findall(rb'"content": ?"([^"]*)"', answer.body)
            assert words == [b"jo ", b"says: ", b"Hi ", b"you"]
            assert answer.body.endswith(b"data: [DONE]\n\n")


def brisk(text, **more):
    return Llmswap(text, **{**BRISK, **more})


JOURNALCTL = r'''
name=; while [ $# -gt 0 ]; do case $1 in --*unit) name=$2; shift;; esac; shift; done
exec tail -n 20 "$STAND_IN/$name.log"
'''


class Units:
    """Stand-ins for systemctl and journalctl, and the units they have."""

    def __init__(self, folder):
        self.folder = folder
        self.env = {"PATH": f"{folder}:{os.environ['PATH']}", "STAND_IN": str(folder)}
        file = compiled(CI / "systemctl.py", "systemctl")
        warn = "[ $3 = show ] && echo Hm >&2\n"
        call = f'exec {sys.executable} -IS {file} "$@"'
        executable(folder / "systemctl", warn + call)
        executable(folder / "journalctl", JOURNALCTL)

    def add(self, name, *flags, port):
        command = fake_command("--model", name, *flags, port=str(port))
        (self.folder / f"{name}.service.cmd").write_text(command)

    def __call__(self, *words, **more):
        words, env = ["systemctl", "--user", *words], {**os.environ, **self.env, **more}
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, timeout=60)
        return done.stdout

    def serve(self, *flags, more="", constants={}, **keys):
        """llmswap with a unit [a], a fake server with these flags."""
        port = free_port()
        self.add("a", *flags, port=port)
        return brisk(unit_ini(("a", port), **keys) + more, env=self.env, **constants)

    def pid(self, name):
        return int((self.folder / f"{name}.service.pid").read_text())

    def is_running(self, name):
        return self("is-active", "--", f"{name}.service") == b"active\n"

    def calls(self):
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def units(tmp_path):
    yield Units(tmp_path)
    for path in tmp_path.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.killpg(os.getpgid(int(path.read_text())), signal.SIGKILL)


def unit_ini(*units, head="", manager="", **more):
    """An INI file of units (name, port) with these keys."""
    text = f"[llmswap]\n{head}\n"
    for name, port in units:
        text += f"[{name}]\nunit = {manager}{name}.service\n"
        text += f"proxy = http://127.0.0.1:{port}\n"
        text += "".join(f"{key.replace('_', '-')} = {more[key]}\n" for key in more)
    return text


# ---- units


@pytest.mark.parametrize("manager", ["", "system:"])
def test_a_unit_is_started_asked_and_stopped(units, manager):
    with units.serve("--load", "0.2", manager=manager) as server:
        assert server.states() == {"a": "unloaded"}
        assert server.chat("a").content().startswith("a ")
        assert server.states() == {"a": "loaded"} and units.is_running("a")
        unload(server, "a")
        assert not units.is_running("a")
        assert server.chat("a").status == 200
    assert not units.is_running("a")
    starts = [call for call in units.calls() if " start " in call]
    scope = "--system" if manager else "--user"
    assert starts and all(f"{scope} --no-ask-password start" in call for call in starts)


def test_two_units_share_one_port_and_are_never_confused(units):
    port = free_port()
    units.add("a", "--load", "0.1", "--stop-delay", "0.2", port=port)
    units.add("b", "--load", "0.1", port=port)
    text = unit_ini(("a", port), ("b", port), head="models-max = 0")
    with brisk(text, env=units.env) as server:
        for name in "aba":
            assert server.chat(name).content().split()[0] == name
            assert server.loaded() == [name]


def test_a_foreign_listener_on_the_port_of_a_unit_gets_no_request(units):
    with Fake("--model", "stranger") as stranger:
        units.add("a", "--load", "0.1", port=stranger.port)
        ini = unit_ini(("a", stranger.port), load_timeout="20s")
        with brisk(ini, env=units.env) as server:
            answer = server.chat("a")
            assert answer.status in (502, 504)
            assert "couldn't bind" in answer.message()
            assert stranger.stats()["requests"] == 0


def test_a_unit_found_running_or_added_by_a_reload_is_adopted(units):
    ports = {"a": free_port(), "b": free_port()}
    for name, port in ports.items():
        units.add(name, "--load-until", units.folder / "go", port=port)
    head = "models-max = 0"
    ini = unit_ini(("a", ports["a"]), head=head, idle_timeout="200ms")
    server = brisk(ini, env=units.env)
    units("start", "--", "a.service", TEST_FAMILY=server.token)
    pid = units.pid("a")
    with server:
        assert server.states() == {"a": "loading"}
        client = ask_later(server, "a")
        eventually(lambda: server.get("/health").json()["queued"])
        (units.folder / "go").touch()
        assert client.answer().content().split()[1] == str(pid)
        eventually(lambda: server.states() == {"a": "unloaded"})
        assert not units.is_running("a")
        units("start", "--", "b.service", TEST_FAMILY=server.token)
        server.reload(unit_ini(*ports.items(), head=head))
        eventually(lambda: server.states() == {"a": "unloaded", "b": "loaded"})
        assert not any(" --no-ask-password start" in call for call in units.calls())


def test_a_unit_that_stops_or_is_restarted_by_somebody_is_noticed(units):
    with units.serve("--stop-delay", "0.2") as server:
        assert server.chat("a").status == 200
        os.kill(units.pid("a"), signal.SIGKILL)
        eventually(lambda: server.states() == {"a": "unloaded"})
        model = server.get("/v1/models/a").json()
        assert "ended by itself: exit-code, status 137" in model["status"]["error"]
        assert "model loaded" in model["status"]["error"]  # from its journal
        assert server.chat("a").status == 200
        assert any("reset-failed" in call for call in units.calls())
        units("stop", "--", "a.service")  # by somebody else, which is no failure
        eventually(lambda: server.states() == {"a": "unloaded"})
        assert "failed" not in server.get("/v1/models/a").json()["status"]
        assert server.chat("a").status == 200
        calls = len(units.calls())
        units("restart", "--", "a.service", TEST_FAMILY=server.token)
        eventually(lambda: "a.service runs already" in server.log())
        eventually(lambda: server.states() == {"a": "loaded"})
        assert server.chat("a").content().split()[1] == str(units.pid("a"))
        assert not re.search("password (stop|start|kill)", str(units.calls()[calls:]))


@pytest.mark.parametrize("kind", ["forks", "target"])  # a target has no such property
def test_a_unit_without_a_main_process_is_looked_at_now_and_then(units, kind):
    (units.folder / f"a.service.{kind}").touch()
    with units.serve(constants={"UNIT_POLL": 0.2}, hang_timeout="30s") as server:
        assert server.chat("a").status == 200
        os.kill(units.pid("a"), signal.SIGSTOP)
        ask_later(server, "a")
        eventually(lambda: server.get("/health").json()["requests"])
        os.kill(units.pid("a"), signal.SIGKILL)
        eventually(lambda: "ended by itself" in server.log())


def test_the_reason_why_a_unit_does_not_come_up_is_told(units):
    other = unit_ini(("b", free_port())).replace("[llmswap]", "")
    with units.serve("--load-exit", "3", more=other) as server:
        answer = server.chat("a")
        assert (answer.status, answer.headers["x-should-retry"]) == (502, "false")
        text = "a (a.service) could not be started: exit-code, status 3"
        assert text in answer.message()
        assert "exiting due to model loading error 3" in answer.message()
        assert server.get("/v1/models/a").json()["status"]["exit_code"] == 3
        assert "Unit b.service not found." in server.chat("b").message()
        assert "repeated too quickly" not in server.chat("a").message()


@pytest.mark.parametrize("verb", ["show", "start", "stop"])
def test_a_systemctl_that_hangs_blocks_no_other_model(units, verb):
    (units.folder / f"a.service.hang-{verb}").touch()
    keys = {"head": "models-max = 0", "stop_timeout": "0.3"}
    keys["load_timeout"] = "3s" if verb == "start" else "20s"
    near, brief = "[b]\ncmd = FAKE\n", {"COMMAND_TIMEOUT": 3.0, "ADOPT_TIMEOUT": 0.1}
    with units.serve(more=near, constants=brief, **keys) as server:
        assert server.chat("b").status == 200  # once it waited for systemd
        with ThreadPoolExecutor() as crowd:
            waits = crowd.submit(server.chat, "a")
            began = time.monotonic()
            assert server.chat("b").status == 200
            assert time.monotonic() - began < 3
            assert waits.result(30).status == (504 if verb == "start" else 200)
        server.post("/models/unload", {"model": "a"})
        eventually(lambda: server.states()["a"] == "unloaded")
        os.unlink(units.folder / f"a.service.hang-{verb}")
        assert not units.is_running("a")


@pytest.mark.parametrize("text", ["systemctl: No such file", "Failed to connect a bus"])
def test_without_systemctl_or_if_it_fails_the_answer_says_so(tmp_path, text):
    if "bus" in text:
        executable(tmp_path / "systemctl", f"echo {text} >&2\nexit 1")
    ini = unit_ini(("a", free_port())) + "[b]\ncmd = FAKE\n"
    with brisk(ini, env={"PATH": str(tmp_path)}) as server:
        answer = server.chat("a")
        assert answer.status == 502 and text in answer.message()
        assert server.chat("b").status == 200


# ---- sleep of processes

SLEEPY = """
[a]
cmd = FAKE --model a --sleepable {}
sleep = POST /sleep?level=1
wake = POST /wake_up
[b]
cmd = FAKE --model b
"""


def test_a_victim_that_can_sleep_is_put_to_sleep_and_woken():
    with brisk(SLEEPY.format("")) as server:
        pid = server.chat("a").content().split()[1]
        assert server.chat("b").status == 200
        assert server.states() == {"a": "sleeping", "b": "loaded"}
        assert server.get("/props?model=a").status == 503  # passed on; the fake sleeps
        assert server.get("/slots?model=a").status == 400
        assert server.states()["a"] == "sleeping"
        assert server.chat("a").content().split()[1] == pid
        assert server.states() == {"a": "loaded", "b": "unloaded"}
        server.chat("b")
        assert server.post("/models/load", {"model": "a"}).status == 200
        eventually(lambda: server.states() == {"a": "loaded", "b": "unloaded"})
        server.chat("b")
        assert server.states()["a"] == "sleeping"
        unload(server, "a")
        events = [each["event"] for each in server.journal(model="a")]
        assert (events.count("sleep"), events.count("wake")) == (3, 2)
        assert events.count("main") == 1


@pytest.mark.parametrize("last, is_asleep", [("/reset", True), ("/fails", False)])
def test_sleep_and_wake_may_take_several_requests(tmp_path, last, is_asleep):
    journal = tmp_path / "journal"
    wake = ["POST /wake_up", 'POST /rpc {"method": "reload"}', "POST /done"]
    text = f"""\
[a]
cmd   = {sys.executable} {CI}/steps.py ${{PORT}} {journal}
sleep = POST /sleep?level=2, {last}
wake  = {", ".join(wake)}
[b]
cmd = FAKE
"""
    with brisk(text) as server:
        assert server.post("/v1/x", {"model": "a"}).status == 200
        assert server.chat("b").status == 200
        assert server.states()["a"] == ("sleeping" if is_asleep else "unloaded")
        eventually(lambda: is_asleep or "did not fall asleep" in server.log())
        assert server.post("/v1/x", {"model": "a"}).status == 200
        asked = re.findall(r"^(POST (?!/v1/x).*\S)", journal.read_text(), re.M)
    falls_asleep = ["POST /sleep?level=2", f"POST {last}"]
    assert asked == falls_asleep + (wake if is_asleep else [])


@pytest.mark.parametrize("flags", ["", "--wake-fails"])
def test_a_sleeping_model_that_dies_or_does_not_wake_is_started_again(flags):
    with brisk(SLEEPY.format(flags)) as server:
        pid = int(server.chat("a").content().split()[1])
        assert server.chat("b").status == 200
        if not flags:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: server.states()["a"] == "unloaded")
        assert int(server.chat("a").content().split()[1]) != pid
        assert server.loaded() == ["a"]


def test_sleep_needs_count_while_it_sleeps():
    text = "[llmswap]\nbudget = vram 10G\n" + SLEEPY.format("")
    text = text.replace("[b]", "needs = vram 8G\nsleep-needs = vram 4G\n[b]")
    with brisk(text + "needs = vram 8G\n") as server:
        server.chat("a"), server.chat("b")  # a would hold too much: it is stopped
        assert server.states() == {"a": "unloaded", "b": "loaded"}


@with_llama_server
def test_a_llama_server_that_puts_itself_to_sleep_shows_as_sleeping(tmp_path):
    text = real_models(tmp_path, "a", "budget = vram 8G", "needs = vram 5G")
    text += "sleep-idle-seconds = 1\n[b]\ncmd = FAKE --model b\n"
    paths = "/health / /v1/models /v1/models/a /running /metrics /slots".split()
    with brisk(text, SLEEP_POLL=0.3) as server:
        assert server.post(CHAT, real_chat("a")).status == 200
        eventually(lambda: server.states()["a"] == "sleeping")
        for path in (*paths, "/props?model=a", "/metrics?model=a"):
            server.get(path)
        assert server.get("/props?model=a").json()["is_sleeping"] is True
        assert server.get("/slots?model=a").status == 400
        assert server.states() == {"a": "sleeping", "b": "unloaded"}
        assert server.chat("b").status == 200  # beside it: what sleeps needs nothing
        assert server.states() == {"a": "sleeping", "b": "loaded"}
        assert server.post(CHAT, real_chat("a")).status == 200
        assert server.states()["b"] == "unloaded"  # as `a` is awake
        eventually(lambda: server.log().count("a: loaded in") == 2)
        assert "a: unloading" not in server.log()  # the same process all the time


# ---- remote models


@pytest.fixture
def machine():
    """A machine elsewhere that can be switched off and on."""
    with Fake("--model", "far", "--load", "0.1", "--sleepable") as machine:
        yield machine


def remote_ini(port, *lines):
    more = "\n".join(lines)
    near = "[near]\ncmd = FAKE --model near\n"
    return f"[far]\nproxy = http://127.0.0.1:{port}\n{more}\n{near}"


def test_a_remote_model_takes_no_room_and_gets_the_proxy_key(machine):
    with brisk(remote_ini(machine.port, "proxy-key = s\u20accret")) as server:
        assert server.chat("near").status == 200
        assert server.chat("far").content().startswith("far ")
        ours = {"Authorization": "Bearer mine"}
        got = echoed(server.post("/echo", {"model": "far"}, ours))
        assert got["authorization"].encode("latin-1").decode() == "Bearer s\u20accret"
        assert server.loaded() == ["far", "near"]
        unload(server, "far")
        assert server.loaded() == ["near"] and is_listening(machine.port)


def test_a_proxy_may_lead_to_other_llmswaps_but_not_back(machine):
    loop = "[far]\nproxy = {}\nconcurrency = 1\n"
    with brisk(remote_ini(machine.port)) as inner, brisk(loop.format(inner.url)) as outer:
        edge = {"Via": "1.0 edge"}.items()
        headers = outer.ask("POST", "/echo", {"model": "far"}, edge).json()["headers"]
        via = [value for name, value in headers if name.lower() == "via"]
        assert via[0] == "1.0 edge" and len(set(via)) == len(via) == 3
        for turn, target in enumerate((outer, inner), 1):  # itself, then each other
            outer.reload(loop.format(target.url))
            inner.reload(loop.format(outer.url))
            for each in (outer, inner):
                eventually(lambda: each.log().count("was read again") >= turn)
            answer = outer.chat("far")
            assert (answer.status, answer.json()["error"]["code"]) == (508, "loop_detected")
            assert "far" in answer.message() and "`proxy`" in answer.message()
            assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_sleeping_machine_is_woken_and_the_client_gets_its_answer(machine, is_stream):
    machine.off()
    with machines.ears() as (keys, packets), ThreadPoolExecutor() as crowd:
        with brisk(remote_ini(machine.port, *keys)) as server:
            began = time.monotonic()
            waits = crowd.submit(server.stream if is_stream else server.chat, "far")
            eventually(lambda: len(packets) >= 3)
            machine.on()
            answer = waits.result()
            text = answer.text() if is_stream else answer.content()
            assert text.startswith("far ")
            assert not is_stream or answer.raw.startswith(b":")
            times = [moment for moment, _ in packets]
            assert times[-1] - began >= 0.2 * (len(times) - 1), times
            packet = b"\xff" * 6 + bytes.fromhex("abcdef012345") * 16
            assert {data for _, data in packets} == {packet}
            assert server.chat("far").status == 200
            assert len(packets) <= len(times) + 1  # it answers: nothing is to be woken


def test_a_remote_without_the_check_endpoint_is_a_504_that_names_it(machine):
    eventually(machine.is_ready)
    lines = "check-endpoint = /early?status=404", "load-timeout = 2s"
    reason = "its check-endpoint answers 404"
    with brisk(remote_ini(machine.port, *lines), LOAD_LINE_EVERY=0.1) as server:
        answer = server.chat("far")
        assert answer.status == 504 and reason in answer.message()
        line = rf"far: loading after \d s \({reason}\)\n"
        eventually(lambda: re.search(line, server.log()))


def test_a_machine_that_does_not_wake_in_time_is_a_504(machine):
    machine.off()
    with machines.ears() as (keys, packets):
        ini = remote_ini(machine.port, "load-timeout = 250ms", *keys)
        with brisk(ini, WAKE_INTERVAL=60.0) as server:
            for turn in range(3):  # it is tried again each time: asleep, not broken
                eventually(lambda: len(packets) == turn)  # each of them sent at once
                began = time.monotonic()
                answer = server.chat("far")
                assert answer.status == 504 and 0.24 < time.monotonic() - began
                assert "showed no sign of progress for 0.25 s" in answer.message()
                assert "Connection refused" in answer.message()


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_remote_that_vanished_is_waited_for_and_not_called_broken(machine, is_silent):
    lines = ["sleep = POST /sleep?level=1", "wake = POST /wake_up", "needs = gpu 2"]
    text = "[llmswap]\nbudget = gpu 2\n" + remote_ini(machine.port, *lines)
    with brisk(text + "needs = gpu 1\n", FRESH=0.0) as server:
        for state, sign in ("loaded", "or gone"), ("sleeping", "did not wake up"):
            assert server.chat("far").status == 200
            assert state == "loaded" or server.chat("near").status == 200
            assert server.states()["far"] == state
            with ThreadPoolExecutor() as crowd:
                with machines.absence(machine, is_silent):
                    waits = crowd.submit(server.chat, "far")
                    eventually(lambda: sign in server.log())
                assert waits.result().content().startswith("far ")
        status = server.get("/v1/models/far").json()["status"]
        assert status["value"] == "loaded" and "failed" not in status
        assert "could not" not in server.log()


def test_a_remote_llmswap_that_is_started_anew_cuts_no_stream_and_fails_no_request():
    far = brisk("[big]\ncmd = FAKE --model big\n")
    with far as remote, brisk(f"[big]\nproxy = {remote.url}\n") as server:
        with server.stream("big", tokens=12, interval=0.05) as stream:
            events = stream.events()
            next(events)
            remote.process.terminate()
            eventually(lambda: not is_listening(remote.port))
            with ThreadPoolExecutor() as crowd:
                waits = crowd.submit(server.chat, "big")
                eventually(lambda: "asleep or gone" in server.log())
                assert list(events)[-1] == "[DONE]" and stream.is_complete
                remote.process.wait()
                remote.start()
                assert waits.result().status == 200


# ---- TLS, suspension


with_openssl = pytest.mark.skipif(
    not shutil.which("openssl"), reason="needs openssl"
)


def certified(folder, machine, name="IP:127.0.0.1"):
    """The INI text for an https upstream before the machine, and that upstream."""
    eventually(machine.is_ready)
    tls = load_tool("tls").Tls(folder, machine.port, name)
    return remote_ini(tls.port, "load-timeout = 5s").replace("http:", "https:"), tls


@with_openssl
def test_an_https_upstream_is_used_if_its_certificate_is_good(machine, tmp_path):
    ini, tls = certified(tmp_path, machine)
    with brisk(ini, env={"SSL_CERT_FILE": str(tls.certificate)}) as server:
        for _ in range(3):
            assert server.chat("far").content().startswith("far ")
        big = server.chat("far", size=3_000_000)
        assert len(big.content()) >= 3_000_000 - 3
        with server.stream("far", tokens=3, stall=0.25) as stream:
            assert stream.text().startswith("far ")
        assert tls.accepted <= 5  # kept connections are used again


@with_openssl
@pytest.mark.parametrize("trust", [False, True])
def test_an_https_upstream_that_cannot_be_verified_gets_nothing(
    machine, tmp_path, trust
):
    ini, tls = certified(tmp_path, machine, *["DNS:elsewhere"] * trust)
    env = {"SSL_CERT_FILE": str(tls.certificate)} if trust else {}
    with brisk(ini, env=env) as server:
        answer = server.chat("far")
        assert answer.status == 502 and "certificate verify failed" in answer.message()
        assert machine.stats()["requests"] == 0


@pytest.mark.parametrize("act, is_quiet", [
    (lambda other: None, True), (lambda other: other.sendall(b"x"), False),
    (lambda other: other.close(), False),
    (lambda other: (reset_at_close(other), other.close()), False),
])
def test_a_kept_connection_serves_again_only_if_nothing_came_on_it(
    upstream, act, is_quiet
):
    ours, _ = upstream.connect()
    theirs, _ = upstream.listener.accept()
    with theirs:
        theirs.sendall(b"x" * 1000)
        assert len(ours.recv(1000)) == 1000  # all is read
        act(theirs)
        eventually(lambda: select.select([ours], [], [], 0)[0] or is_quiet)
        upstream.release_connection(ours)
        assert upstream.connect()[1] is is_quiet


@with_openssl
def test_a_kept_connection_with_tls_holds_nothing_of_its_last_record(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tls = load_tool("tls").Tls(tmp_path, listener.getsockname()[1])
        trust = ssl.create_default_context(cafile=tls.certificate)
        plain = socket.create_connection(("127.0.0.1", tls.port))
        ours = trust.wrap_socket(plain, server_hostname="127.0.0.1")
        theirs, _ = listener.accept()
    with ours, theirs:
        upstream = llmswap.Upstream(f"http://127.0.0.1:{tls.port}")
        for size, is_kept in ((16, True), (6, False)):
            theirs.sendall(b"answer, and more")
            assert len(ours.recv(size)) == size
            upstream.release_connection(ours)
            assert upstream.connect()[1] is is_kept


class Code(str):
    """Source text that is its own repr: a constant to be evaluated."""

    __repr__ = str.__str__


def test_after_a_suspension_the_whole_program_trusts_nothing_of_before(
    machine, tmp_path
):
    """SIGSTOP stands for the suspension; the jump of the clocks is played."""
    eventually(machine.is_ready)
    clock = tmp_path / "slept"  # once it exists, an hour was slept
    slept = Code(f"lambda: 3600.0 * l.os.path.exists({str(clock)!r})")
    with brisk(remote_ini(machine.port), suspended_seconds=slept, FRESH=1e9) as server:
        assert server.chat("far").status == server.chat("near").status == 200
        before = machine.stats()
        with server.connect() as client:
            eventually(lambda: client.ask("GET", "/health").json()["requests"] == 0)
        server.process.send_signal(signal.SIGSTOP)
        machine.process.send_signal(signal.SIGSTOP)
        clock.touch()
        server.process.send_signal(signal.SIGCONT)
        with ThreadPoolExecutor() as crowd:
            far = crowd.submit(server.chat, "far")
            assert server.chat("near").status == 200
            machine.process.send_signal(signal.SIGCONT)
            assert far.result().status == 200
        after = machine.stats()
        assert after["requests"] == before["requests"] + 1
        assert after["health"] == before["health"] + 1
        old = before["ports"]  # whose ends it may notice a little later
        eventually(lambda: set(machine.stats()["ports"]).isdisjoint(old))


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare"), reason="needs root"
)
def test_how_long_the_machine_slept_is_read_from_the_kernels_clocks():
    program = "import llmswap; print(llmswap.suspended_seconds())"
    words = ["unshare", "-T", "--boottime", "3600", sys.executable, "-c", program]
    done = subprocess.run(words, cwd=HERE.parent, stdout=subprocess.PIPE)
    if done.returncode:
        pytest.skip("no time namespaces here")
    assert 3599 < float(done.stdout) - llmswap.suspended_seconds() < 3601


# ---- models that stay, and models that stand for several


def starts_of(server, model):
    return len(server.journal("main", model))


def test_a_model_pinned_once_loaded_stays_and_the_answer_says_that_it_does():
    text = "[a]\ncmd = FAKE --model a\npin = loaded\n[b]\ncmd = FAKE --model b\n"
    with brisk(text) as server:
        assert server.chat("b").status == server.chat("a").status == 200
        for wish in ({}, {"stream": True}):
            answer = server.chat("b", **wish)
            assert (answer.status, answer.headers["x-should-retry"]) == (409, "false")
            assert answer.json()["error"]["code"] == "model_pinned"
            assert "'b' does not fit beside the pinned a" in answer.message()
        assert server.states() == {"a": "loaded", "b": "unloaded"}
        assert server.post("/models/unload", {"model": "a"}).status == 200
        assert server.chat("b").status == 200


KEPT = "[k]\ncmd = FAKE --model k\nkeep-loaded = on\n[b]\ncmd = FAKE --model b\n"


def test_a_kept_model_is_loaded_whenever_it_fits_but_not_against_an_unload_by_hand():
    text = f"{KEPT}idle-timeout = 0.2s\n"
    with brisk(text) as server:
        eventually(lambda: server.loaded() == ["k"])
        assert server.chat("b").status == 200
        eventually(lambda: server.loaded() == ["k"])
        assert server.post("/models/unload", {"model": "k"}).status == 200
        assert server.chat("b").status == 200
        eventually(lambda: not server.loaded())
        assert server.chat("b").status == 200
        assert starts_of(server, "k") == 2
        server.reload(text)
        eventually(lambda: server.loaded() == ["k"])


def test_what_is_loaded_on_startup_comes_before_what_is_kept_loaded():
    with brisk(f"{KEPT}load-on-startup = on\n") as server:
        eventually(lambda: server.loaded() == ["b"])
        assert starts_of(server, "k") == 0


SEVERAL = """\
[llmswap]
models-max = {}
[a]
cmd = FAKE --model a
proxy-key = of-a
[b]
cmd = FAKE --model b --load-until {}
proxy-key = of-b
[any]
uses = a, b
"""


def test_of_several_models_the_one_that_is_loaded_or_loading_is_used(tmp_path):
    with brisk(SEVERAL.format(1, tmp_path / "go")) as server:
        assert server.chat("any").status == 200
        assert server.states() == {"a": "loaded", "b": "unloaded", "any": "loaded"}
        clients = [ask_later(server, "b")]
        eventually(lambda: server.states()["b"] == "loading")
        clients.append(ask_later(server, "any"))
        eventually(lambda: server.get("/health").json()["queued"] == 2)
        assert server.states() == {"a": "unloaded", "b": "loading", "any": "loading"}
        (tmp_path / "go").touch()
        assert [client.answer().status for client in clients] == [200, 200]
        assert (chats_seen(server, "a"), chats_seen(server, "b")) == (1, 2)
        headers = echoed(server.post("/echo", {"model": "any"}))
        assert headers["authorization"] == "Bearer of-b"
        assert server.post("/models/unload", {"model": "any"}).status == 200
        eventually(lambda: server.states()["b"] == "unloaded")
        assert server.chat("any").status == 200
        assert server.loaded() == ["a", "any"]


def test_a_request_over_which_one_of_several_models_died_goes_to_the_next(tmp_path):
    (tmp_path / "go").touch()
    with brisk(SEVERAL.format(2, tmp_path / "go")) as server:
        assert server.chat("a").status == server.chat("b").status == 200
        assert server.chat("any", die="before-byte").status == 502
        assert (chats_seen(server, "a"), chats_seen(server, "b")) == (2, 2)
        assert starts_of(server, "a") == starts_of(server, "b") == 1


# ---- the idle-command


def test_without_requests_all_is_unloaded_and_the_idle_command_runs(tmp_path):
    mark = tmp_path / "ran"
    mark.touch()
    command = f"/bin/sh -c 'date +%s.%N >>{mark}; sleep 0.1'"
    head = f"[llmswap]\nmodels-max = 2\nidle-command = {command}\n"
    head += f"idle-command-after = 3s\n{KEPT}pin = on\n"

    def runs():
        assert server.get("/v1/models").status == 200  # no use of a model
        return mark.read_text().count("\n")

    with brisk(head) as server:
        for turn in (1, 2):
            began = time.time()
            assert server.chat("b").status == 200
            eventually(lambda t=turn: starts_of(server, "k") == t)
            eventually(lambda t=turn: runs() == t)
            assert float(mark.read_text().split()[-1]) > began + 2.9
            done = "idle-command ended with status 0"
            eventually(lambda t=turn: server.log().count(done) == t)
            assert server.log().count(f"idle: running {command}") == turn
            assert server.states() == {"k": "unloaded", "b": "unloaded"}
            assert starts_of(server, "k") == turn  # it rests until a request


GPU_USES = [
    # the tool, its option, its output while other programs use a GPU, and otherwise
    ("nvidia-smi", "compute-apps", "PID, [N/A]", "", "holds GPU memory"),
    ("nvidia-smi", "utilization", "11\n[N/A]", "10\n[N/A]", "in use, 11 %"),
    ("rocm-smi", "showuse", "device,x\ncard0,97", "device,x\ncard0,3", "in use, 97 %"),
]


@pytest.mark.parametrize("tool, question, used, free, text", GPU_USES)
def test_the_idle_command_waits_while_others_use_a_gpu(
    tmp_path, tool, question, used, free, text
):
    answer = f"[ -e {tmp_path}/free ] && echo '{free}' || echo '{used}'"
    answer = answer.replace("PID", str(os.getpid()))
    executable(tmp_path / tool, f'case "$*" in *{question}*) {answer};; esac')
    head = f"[llmswap]\nidle-command = touch {tmp_path}/ran\nidle-command-after = 0.1s\n"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with brisk(head + "[a]\ncmd = FAKE\n", env=env, GPU_LOOK_EVERY=0.05) as server:
        eventually(lambda: "the idle-command waits: " in server.log())
        assert text in server.log() and not (tmp_path / "ran").exists()
        (tmp_path / "free").touch()
        eventually(lambda: "idle-command ended with status 0" in server.log())
        assert server.log().count("the idle-command waits: ") == 1


def test_a_request_while_the_last_model_stops_cancels_the_idle_command(tmp_path):
    executable(tmp_path / "nvidia-smi", f"[ -e {tmp_path}/free ] || echo 99")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    head = "[llmswap]\nidle-command = true\nidle-command-after = 0.3s\n"
    head += f"[a]\ncmd = FAKE --stop-until {tmp_path}/end\n"
    with brisk(head, env=env, GPU_LOOK_EVERY=0.05) as server:
        assert server.chat("a").status == 200
        eventually(lambda: "a: unloading" in server.log())
        client = ask_later(server, "a")
        eventually(lambda: server.get("/health").json()["queued"])
        (tmp_path / "end").touch()
        assert client.answer().status == 200
        (tmp_path / "free").touch()
        eventually(lambda: "idle: running" in server.log().rpartition("a: loaded")[2])
        stop = server.log().partition("a: unloading")[2].partition("a: loaded")[0]
        assert "idle" not in stop


@pytest.mark.parametrize("command, text", [
    ("false", "ended with status 1"), ("/no/such/thing", "idle-command: "),
])
def test_a_failure_of_the_idle_command_is_logged(command, text):
    head = f"[llmswap]\nidle-command = {command}\nidle-command-after = 0.2s\n"
    with brisk(head + "[a]\ncmd = FAKE\n") as server:
        eventually(lambda: text in server.log())
        assert server.chat("a").status == 200


# ==================================================================================
# 6  Relay: as a hostile world would use it.
# ==================================================================================


@contextmanager
def pair():
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    llmswap.set_socket_timeouts(ours)
    with ours, theirs:
        yield ours, theirs


class Pieces:
    """A socket that gives these pieces, then the end."""

    def __init__(self, *pieces):
        self.unread = collections.deque(filter(None, pieces))

    def recv(self, size):
        piece = self.unread.popleft() if self.unread else b""
        if len(piece) > size:
            self.unread.appendleft(piece[size:])
        return piece[:size]

    def sendall(self, data):
        """Take a 100 Continue."""


def reader_of(*pieces):
    return llmswap.SocketReader(Pieces(*pieces))


def everything(sock):
    """All that comes until the other side ends; and whether it ended by a reset."""
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionError:
        return data, True
    return data, False


def http(text, body=b""):
    """The bytes of a request from its lines."""
    return text.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body


def request_of(text):
    return llmswap.Request(http(text))


def seconds_of(action, tries=3):
    """Processor seconds of this thread, the best of some tries."""
    times = []
    for _ in range(tries):
        began = time.thread_time()
        action()
        times.append(time.thread_time() - began)
    return min(times)


GET = "GET / HTTP/1.1\nHost: x"
POST = "POST /v1/x HTTP/1.1\nHost: x"
LARGE = os.urandom(1 << 16) * 40  # 2.5 MB


# ---- heads


def test_a_head_is_found_however_its_bytes_are_cut():
    head = b"GET /x HTTP/1.1\r\nHost: a\r\nX: \xc3\xa4\r\n\r\n"
    for cut in range(len(head)):
        for start in (b"", b"\r\n\r\n"):  # some clients send empty lines after a body
            reader = reader_of(start + head[:cut], head[cut:] + b"rest")
            assert reader.head() == head and reader.recv() == b"rest"
        assert reader_of(head[:cut]).head() == b""


def test_a_head_may_have_64_kilobytes_and_100_lines_and_no_more():
    start, end = b"GET / HTTP/1.1\r\nX: ", b"\r\n\r\n"
    for blank in (b"", b"\r\n" * 32000):  # empty lines count, and cost little
        fill = b"x" * (llmswap.MAX_HEAD - len(blank + start + end))
        head = blank + start + fill + end
        assert seconds_of(lambda data=head: reader_of(data).head()) < 0.05
        with pytest.raises(llmswap.HeadersTooLarge):
            reader_of(blank + start + fill + b"x" + end).head()
    lines = [f"X-{number}: y" for number in range(99)]
    assert len(request_of("\n".join([GET, *lines])).headers) == 100
    with pytest.raises(llmswap.HeadersTooLarge):
        request_of("\n".join([GET, *lines, "X: y"]))


def test_a_head_sent_byte_by_byte_is_late_as_well():
    head = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 9000
    late = llmswap.StallMonitor(0.05, lambda: llmswap.RequestTimeout("late"))
    with pytest.raises(llmswap.RequestTimeout):
        llmswap.SocketReader(Pieces(*(bytes([b]) for b in head)), late).head()


# Each is answered 400 and goes nowhere: see the doubtful requests of section 9.
SMUGGLING = [
    f"{GET}\n{lines}"
    for lines in [
        "Content-Length: 5\nContent-Length: 5", "Content-Length: 5, 5",
        "Content-Length: +5", "Content-Length: 0x5", "Content-Length:",
        "Content-Length: \u00b2", "Content-Length: 9999999999999999999",
        "Content-Length: 5\nTransfer-Encoding: chunked", "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding:\x0bchunked", "X: a\n b", "X : a", ": a", "X",
        "X: a\x00b", "X: a\rb", "X\u00e4: b", "Host: y",
    ]
] + [
    "GET / HTTP/1.1", "GET / HTTP/1.0\nTransfer-Encoding: chunked",
    "GET  / HTTP/1.1\nHost: x", "GET / HTTP/1.1 \nHost: x", " GET / HTTP/1.1\nHost: x",
    "GET / x HTTP/1.1\nHost: x", "GET /\x01 HTTP/1.1\nHost: x", "GET /\nHost: x",
    "GET / HTTP/1.2\nHost: x", "GET / HTTP/2.0\nHost: x", "GET / http/1.1\nHost: x",
    "G(T / HTTP/1.1\nHost: x", "GET x HTTP/1.1\nHost: x",
    "GET http://x/ HTTP/1.1\nHost: x", "OPTIONS * HTTP/1.1\nHost: x",
]


@pytest.mark.parametrize("target, path, query", [
    ("/a?c=http://c/d", "/a", "c=http://c/d"), ("//evil/a", "//evil/a", ""),
    ("/?a=b&model=q%C3%A4+1%2Fx", "/", ANY), ("/?model=q\u00c3\u00a4+1/x", "/", ANY),
])
def test_targets_and_headers_are_read_as_their_senders_mean_them(target, path, query):
    head = f"GET {target} HTTP/1.1\nHost: x\nX-A: \t a  b\t \nX-B:\nx-a: 2"
    request = request_of(head)
    assert (request.path, request.query) == (path, query)
    model = "q\u00e4 1/x" if "model" in target else None
    assert (request.parameter("model"), request.parameter("x")) == (model, None)
    assert request.all("x-a") == ["a  b", "2"]
    assert request.get("x-b") == request.get("none") == ""


# ---- chunks


BAD_CHUNKS = [
    b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\nx\r\n", b"1_0\r\n",
    b"1\nx\r\n0\r\n\r\n", b"1\r\nxx\r\n0\r\n\r\n", b"1\r\nx\r\r\n",
    b"1\r\nx\n0\r\n\r\n", b"1\r\nx\r\n0\r\n\n", b"1\r\nx\r\n0\r\nA: b\n\r\n",
    b"1\r\nx0\r\n\r\n", b" 1\r\nx\r\n", b"1;a\x00\r\nx\r\n", b"1000000000000000\r\n",
    b"1;" + b"x" * 5000, b"0\r\n" + b"A: b\r\n" * 200, b"0\r\nA: \0\r\n\r\n",
    b"0\r\nA: b\rc\r\n\r\n", b"0\r\nA : b\r\n\r\n", b"0\r\nA: b\r\n c\r\n\r\n",
    b"0\r\n1\r\nx\r\n", b"1\r\nx\n\n",
]


def payload_of(*pieces):
    head = request_of(f"{POST}\n{IN_CHUNKS}")
    return b"".join(llmswap.read_payload(reader_of(*pieces), head))


@pytest.mark.parametrize("data, payload", [
    (b"0\r\n\r\n", b""),
    (b"A;x=y\r\n0123456789\r\n1 ;z\r\n!\r\n000\r\n\r\n", b"0123456789!"),
    (b"2 \r\n\r\n\r\n0\r\nTrailer: x\r\nOther: y\r\n\r\n", b"\r\n"),
    (b"1\r\n\r\r\n1\r\n\n\r\n0;a\r\n\r\n", b"\r\n"),
])
def test_chunks_are_decoded_however_they_are_cut(data, payload):
    single_bytes = [bytes([byte]) for byte in data]
    for cut in range(len(data) + 1):
        for pieces in ([data[:cut], data[cut:] + b"next"], [*single_bytes, b"next"]):
            reader = reader_of(*pieces)
            body = llmswap.Body(reader, request_of(f"{POST}\n{IN_CHUNKS}"), 100)
            assert body.hold(100) and body.held == payload
            assert reader.recv() == b"next"


@pytest.mark.parametrize("data", BAD_CHUNKS)
def test_bad_chunks_are_refused_however_they_are_cut(data):
    for cut in range(0, len(data), max(1, len(data) // 50)):
        with pytest.raises(llmswap.BadRequest):
            payload_of(data[:cut], data[cut:])


def test_tiny_chunks_cost_in_proportion_to_their_number():
    def decode(count):
        assert len(payload_of(b"1\r\nx\r\n" * count + b"0\r\n\r\n")) == count

    assert seconds_of(lambda: decode(20000)) < 16 * seconds_of(lambda: decode(2500))


# ---- bodies


IN_CHUNKS = "Transfer-Encoding: chunked"


def chunked(data, size=50000):
    pieces = (data[at : at + size] for at in range(0, len(data), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def body_of(framing, data):
    return llmswap.Body(reader_of(data), request_of(f"{POST}\n{framing}"), 1 << 30)


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, len(LARGE)])
def test_a_body_is_held_whole_or_comes_piece_by_piece(is_chunked, size):
    data = LARGE[:size]
    framing = IN_CHUNKS if is_chunked else f"Content-Length: {size}"
    for held in (1000, 1 << 30):
        reader = reader_of((chunked(data) if is_chunked else data) + b"next")
        body = llmswap.Body(reader, request_of(f"{POST}\n{framing}"), 1 << 30)
        assert body.hold(held) is (body.received == size)
        assert min(held, size) <= len(body.held) <= held + llmswap.BUFFER_SIZE
        assert bytes(body.held) + b"".join(body.rest()) == data
        assert body.is_complete and reader.recv() == b"next"


# ---- JSON and forms


def found_in(data, kind="application/json"):
    """A Body of which the model was searched, read as far as that took."""
    body = body_of(f"Content-Length: {len(data)}", data)
    body.find_model(kind)
    return body


JSON, FORM = "application/json", "application/x-www-form-urlencoded; charset=x"


@pytest.mark.parametrize("kind, data, model", [
    (JSON, ' \r\n\t{ "x" : [ {"model":"no"} ] ,\n"model" : "\\u00e4" } ', "\u00e4"),
    (JSON, '\ufeff{"model":"a"}', "a"), (JSON, '{"model":"\\ud800"}', "\ud800"),
    (JSON, '{"x":{"model":"no"}}', None), (JSON, '{"model":5}', None),
    (JSON, "", None), (JSON, '{"x":"a raw \n newline","model":"a"}', "a"),
    (FORM, ' \n{"model":"a"}', "a"),  # curl -d calls it a form
])
def test_the_model_is_found_at_the_top_level_and_nowhere_else(kind, data, model):
    assert found_in(data.encode(), kind).model == model


def test_a_body_that_is_no_json_object_is_refused():
    for data in ("[]", "model=a", '{"x":', '{"model":"a"} {}', '{"x":' + "[" * 10**6):
        with pytest.raises(llmswap.BadRequest):
            found_in(data.encode())


@pytest.mark.parametrize("body, removed, overrides, result", [
    ('{"model": "b" , "x":1}', "", {"model": "a"}, '{"model":"a","x":1}'),
    ('{"a":{"x":1}}', "", {"a": 5}, '{"a":5}'),
    ('{"a":{"x":1}}', "a", {"a": {"y": 2}}, '{"a":{"y":2}}'),
    ('{"a":{"x":"\\ud800"}}', "", {"a": {}}, '{"a":{"x":"\\ud800"}}'),
    ('{"a":1e400,"b":12345678901234567890}', "", {"model": "\u00e4"},
     '{"a":Infinity,"b":12345678901234567890,"model":"\u00e4"}'),
])
def test_edits_keep_the_order_of_names(body, removed, overrides, result):
    members = found_in(body.encode()).members
    assert llmswap.edited_json(members, removed, {}, overrides).decode() == result


def multipart(*fields, boundary="xYz"):
    """A form's bytes and its content type; a value that is bytes is a file."""
    data = b""
    for name, value in fields:
        more = "" if isinstance(value, str) else '; filename="model"'
        line = f'Content-Disposition: form-data; name="{name}"{more}'
        data += f"--{boundary}\r\n{line}\r\n\r\n".encode() + encoded(value) + b"\r\n"
    kind = f"multipart/form-data; boundary={boundary}"
    return data + f"--{boundary}--\r\n".encode(), kind


def test_the_model_of_a_form_is_found_wherever_it_stands_and_in_linear_time():
    noise = LARGE + b'\r\n\r\nname="model"\r\n\r\nno\r\n--xY'
    for fields in (
        [("model", "a/b"), ("file", noise)],
        [("file", noise), ("x", "y"), ("model", "a/b"), ("z", noise)],
    ):
        data, kind = multipart(*fields)
        body = found_in(data, kind)
        assert body.model == "a/b" and data[slice(*body.span)] == b"a/b"
        assert bytes(body.held) + b"".join(body.rest()) == data

    data, _ = multipart(("file", b"model"), ("model", "c"), boundary="a b'c")
    assert found_in(data, 'multipart/form-data; Boundary="a b\'c"').model == "c"
    assert found_in(*multipart(("file", b"model"))).model is None
    with pytest.raises(llmswap.BadRequest):
        found_in(data, "multipart/form-data")
    slow = b"--x\r\n" + b"Content-Disposition: form-data;" * 30000 + b"\r\n\r\n\r\n--x"
    kind = "multipart/form-data; boundary=x"
    assert seconds_of(lambda: found_in(slow, kind)) < 0.3
    part = b"--x\r\nContent-Disposition: form-data; name=model\r\n\r\n"
    for slow in (b"--x\r\n" * 8000, part * 8000, part + bytes(4 << 20)):  # no end
        assert seconds_of(lambda data=slow: found_in(data, kind)) < 0.2


# ---- answers read


def read_answer(*pieces, method="GET"):
    answer = llmswap.UpstreamResponse(reader_of(*pieces), method)
    return answer, b"".join(answer.pieces())


@pytest.mark.parametrize("data", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: Chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
])
def test_an_answer_cut_anywhere_is_never_taken_for_whole(data):
    for cut in range(len(data)):
        answer, payload = read_answer(data[:cut], data[cut:])
        assert (answer.status, payload, answer.is_reusable) == (200, b"hello", True)
        with pytest.raises(llmswap.BackendDied):
            read_answer(data[:cut])


@pytest.mark.parametrize("head, method, payload, is_reusable", [
    ("1.1 200 OK", "GET", b"hello", False),
    ("1.1 204 No Content", "GET", b"", False),
    ("1.1 200 OK\nContent-Length: 9", "HEAD", b"", False),
    ("1.1 304 Not Modified\nContent-Length: 9", "GET", b"", False),
    ("1.0 200 OK\nContent-Length: 5\nConnection: keep-alive", "GET", b"hello", False),
    ("1.1 200\nContent-Length: 5", "GET", b"hello", True),
    ("1.1 200\nContent-Length: 5\nConnection: x\nConnection: close", "GET", b"hello",
     False),
])
def test_an_answer_ends_where_its_head_says(head, method, payload, is_reusable):
    answer, got = read_answer(http(f"HTTP/{head}", b"hello"), method=method)
    assert (got, answer.is_reusable) == (payload, is_reusable)


def test_events_are_passed_on_by_whole_chunks_and_other_bytes_as_they_come():
    for kind, expected in (("text/event-stream", b"ab"), ("text/plain", b"abcd")):
        head = f"HTTP/1.1 200 OK\n{IN_CHUNKS}\nContent-Type: {kind}"
        answer, got = reader_of(http(head, b"2\r\nab\r\n4\r\ncd")), b""
        with pytest.raises(llmswap.BackendDied):
            for piece in llmswap.UpstreamResponse(answer, "GET").pieces():
                got += piece
        assert got == expected


# ---- answers written


def replied(request, act, *extra):
    """The bytes that a client gets, whether it gets a reset, and the ClientResponse."""
    with pair() as (ours, theirs):
        reply = llmswap.ClientResponse(ours, request_of(request), list(extra))
        act(reply)
        ours.close()
        return (*everything(theirs), reply)


HEAD, OLD = GET.replace("GET", "HEAD"), GET.replace("1.1", "1.0")
IN_THREE_CHUNKS = b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


COUNTED = "content-length: 5"


@pytest.mark.parametrize("request_text, length, framing, payload, is_persistent", [
    (GET, 5, COUNTED, b"hello", True), (HEAD, None, "", b"", True),
    (GET, None, "transfer-encoding: chunked", IN_THREE_CHUNKS, True),
    (GET + "\nConnection: x, Close", 5, COUNTED, b"hello", False),
    (OLD, None, "", b"hello", False),
    (OLD + "\nConnection: keep-alive", 5, COUNTED, b"hello", False),
])
def test_an_answer_is_framed_as_its_client_can_read_it(
    request_text, length, framing, payload, is_persistent
):
    def act(reply):
        reply.start(200, [("x", "y")], length)
        for piece in (b"hel", memoryview(b"lo"), b""):
            reply.send(piece)
        reply.end()

    data, is_reset, reply = replied(request_text, act, ("e", "f"))
    closing = "" if is_persistent else "connection: close"
    head = "\n".join(filter(None, ["HTTP/1.1 200 OK\nx: y\ne: f", framing, closing]))
    assert data == http(head, payload)
    assert (is_reset, reply.is_persistent) == (False, is_persistent)


def test_a_slow_reader_is_served_and_one_that_does_not_read_is_not(monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(step=20).__next__)
    monkeypatch.setattr(llmswap, "time", clock)

    def send(*outcomes):
        """40 KB to a socket that takes so many bytes or times out, by turns."""
        sock = Mock(**{"send.side_effect": itertools.cycle(outcomes)})
        reply = llmswap.ClientResponse(sock, request_of(GET), [])
        reply.start(200, [], 40000)
        reply.send(bytes(40000))

    send(1000, socket.timeout)
    with pytest.raises(llmswap.ClientDisconnected):
        send(socket.timeout)


@pytest.mark.parametrize(
    "payload, length, is_told",
    [(b"", None, True), (b"\n", None, True), (b"data: x\r\n\r\n", None, True),
     (b"data: x\r\r", None, True), (b"data: " + b"x" * 9999 + b"\n\n", None, True),
     (b"data: x\n", None, False),
     (b"data: x\n\n", 500, False)],  # counted: no byte may be added
)
def test_a_broken_stream_says_why_between_events_only_and_does_not_end(
    payload, length, is_told, monkeypatch
):
    def act(reply):
        reply.start(200, [("content-type", "text/event-stream")], length)
        reply.send(payload)
        reply.heartbeat()
        reply.abort(llmswap.BackendDied("it died"))

    monkeypatch.setattr(llmswap, "COMMENT_EVERY", 0.0)
    data, _, reply = replied(GET, act)
    error = re.search(rb'data: \{"error":\{"message":"it died".*\}\}\n\n', data)
    assert bool(error) is is_told and (b"\n:\n" in data) is is_told
    assert not data.endswith(b"0\r\n\r\n") and not reply.is_persistent


def test_a_hang_up_is_noticed_even_behind_bytes_that_nobody_read():
    with pair() as (ours, theirs):
        reply = llmswap.ClientResponse(ours, request_of(GET), [])
        reply.heartbeat()
        theirs.sendall(b"pipelined")
        reply.heartbeat()
        theirs.close()
        with pytest.raises(llmswap.ClientDisconnected):
            reply.heartbeat()


# ---- one request to a backend, one answer back

HASTE = dict(
    POLL_INTERVAL=0.05, EARLY_HEAD_AFTER=0.2, COMMENT_EVERY=0.1, LINGER_SECONDS=0.3
)

MODELS = """
[llmswap]
models-max = 0
max-body   = 300M
[a]
cmd = FAKE --model a
[b]
cmd   = FAKE --model b
alias = org/b, b with blank, b%41
[closing]
cmd = FAKE --model closing --close-idle
[slow]
cmd = FAKE --model slow --load 60
[late]
cmd = FAKE --model late --load-until GATE
[late2]
cmd = FAKE --model late2 --load 0.3
loading-notice = off
[edited]
cmd          = FAKE --model edited
model-name   = real/name
default-params = {"options": {"x": 9, "deep": {"a": 1, "b": {"c": 2}}}, "top_p": 1}
set-params   = {"temperature": 0.5, "options": {"deep": {"e": true}}}
strip-params = top_k, ttl2
[shared]
uses = a
set-params = {"seed": 7}
[hidden]
cmd = FAKE
unlisted = on
[keyed]
cmd = FAKE --model keyed
proxy-key = backend-key
[gone]
cmd = /no/such/program ${PORT}
"""


def hasty(text, *args, **constants):
    """llmswap with shorter timeouts and intervals."""
    return Llmswap(text, *args, **{**HASTE, **constants})


@pytest.fixture(scope="module")
def swap():
    with hasty(MODELS) as running:
        yield running


def anonymous_memory(pid):
    return llmswap.memory_of(pid)["RssAnon"]


def raw(swap, data):
    """Everything that comes back for these bytes, and whether a reset ended it."""
    with swap.connect() as client:
        client.sock.sendall(data)
        return everything(client.sock)


def chat_text(model, **wish):
    """The bytes of a whole chat request, for HTTP/1.0 or 1.1."""
    version = wish.pop("version", "1.1")
    body = json.dumps(chat_body(model, **wish)).encode()
    head = f"POST {CHAT} HTTP/{version}\nHost: localhost\n"
    return http(f"{head}Content-Length: {len(body)}", body)


@pytest.mark.parametrize("path", ["bytes", "until-close", "chunked"])
def test_a_large_answer_goes_down_byte_for_byte_in_bounded_memory(swap, path):
    swap.chat("a")
    before, size = anonymous_memory(swap.pid), (32 << 20) + 12345
    expected = sha256(b"".join(fake.blocks(size, 65536))).digest()
    with swap.connect() as client:
        for _ in range(1 if path == "until-close" else 2):  # the next begins behind it
            client.send("GET", f"/upstream/a/{path}?n={size}&size=65536")
            answer = client.head()
            for _ in range(10):  # the client reads nothing meanwhile
                swap.chat("a")
            assert anonymous_memory(swap.pid) < before + (16 << 20)
            assert sha256(b"".join(client.pieces(*answer))).digest() == expected


@pytest.mark.parametrize("path, start, end, kind, most", [
    ("/v1/echo", b'{"x":"', b'","model":"a"}', JSON, 120),
    ("/v1/echo", b'{"x":"', b'","model":"edited"}', JSON, 160),
    ("/upstream/a/v1/echo", b"", b"", "application/octet-stream", 24),
])
def test_large_bodies_go_up_in_bounded_memory(swap, path, start, end, kind, most):
    swap.chat("a"), swap.chat("edited")
    before, process = llmswap.memory_of(swap.pid), Path(f"/proc/{swap.pid}")
    (process / "clear_refs").write_text("5")  # its peak is what it has now
    body = start + b"x" * (32 << 20) + end
    echo = swap.post(path, body, {"Content-Type": kind}).json()
    assert b"edited" in end or echo["sha256"] == sha256(body).hexdigest()
    peak = int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1]) << 10
    assert echo["length"] >= len(body) and peak < before["VmRSS"] + (most << 20)
    eventually(lambda: anonymous_memory(swap.pid) < before["RssAnon"] + (16 << 20))


def cancelled(swap, model):
    """How many requests its server saw cancelled, once none is in flight there."""
    eventually(lambda: not swap.stats(model)["in_flight"])
    return swap.stats(model)["cancelled"]


UPLOAD = "POST /upstream/a/v1/x HTTP/1.1\nHost: localhost\nContent-Length: 9000000"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "text",
    [lambda: chat_text("a", hang=True), lambda: chat_text("a", stream=True, stall=0),
     lambda: chat_text("a", stream=True, tokens=10000, interval=0.01),
     lambda: http(UPLOAD, b"x" * 4_000_000),
     lambda: http(f"GET /upstream/a/bytes?n={1 << 40} HTTP/1.1\nHost: localhost")],
    ids=["prefill", "prefill of a stream", "stream", "upload", "large answer"],
)
def test_a_hang_up_cancels_the_request_at_once(swap, text, reset):
    before = cancelled(swap, "a")
    with swap.connect() as client:
        client.sock.sendall(text())
        eventually(lambda: swap.stats("a")["in_flight"])
        client.hang_up(reset)
    eventually(lambda: swap.stats("a")["cancelled"] == before + 1, 4)


def test_a_hang_up_during_the_load_or_in_the_queue_leaves_nothing_waiting(swap):
    swap.post("/api/models/unload/slow")  # another test may have left it loading
    eventually(lambda: swap.get("/health").json()["queued"] == 0)
    with swap.connect() as one, swap.connect() as two:
        for client in (one, two):
            client.send("POST", CHAT, chat_body("slow"))
        eventually(lambda: swap.get("/health").json()["queued"] == 2)
    eventually(lambda: swap.get("/health").json()["queued"] == 0, 4)


def test_backend_connections_are_kept_and_those_it_closed_are_replaced_unnoticed(swap):
    for _ in range(30):
        assert swap.chat("closing").status == 200
    data = json.dumps({"model": "closing", "x": "x" * 3_000_000})
    for _ in range(3):
        assert swap.post("/v1/x", data).json()["length"] == len(data)
    swap.chat("a")
    before = swap.stats("a")["ports"]
    for _ in range(20):
        swap.chat("a")
    assert set(swap.stats("a")["ports"]) & set(before)


@pytest.fixture(scope="module")
def hospital():
    """An llmswap whose models may be made to die, each at most once."""
    models = [f"m{number}" for number in range(30)]
    text = "".join(f"[{model}]\ncmd = FAKE --model {model}\n" for model in models)
    text += "[gone]\ncmd = /no/such/program ${PORT}\n"
    slow = {"EARLY_HEAD_AFTER": 9.0}  # and a death may be late
    for name in ("died", "death"):
        way = f"lambda backend, _, look=l.Backend.{name}: look(backend, 9.0)"
        slow[f"Backend.{name}"] = Code(way)
    with hasty("[llmswap]\nmodels-max = 0\n" + text, **slow) as running:
        running.victims = iter(models)
        yield running


@pytest.fixture
def victim(hospital):
    return next(hospital.victims)


def chats_seen(swap, model):
    return len(swap.journal("request", model))


@pytest.mark.parametrize("wish", [{}, {"stream": True}, {"x": "x" * 3_000_000}])
def test_a_request_is_sent_once_more_if_the_backend_died_over_it(
    hospital, victim, wish
):
    assert hospital.chat(victim).status == 200  # so that a kept connection is used
    answer = hospital.chat(victim, die="before-byte", **wish)
    assert answer.status == 502 or (answer.status, "stream" in wish) == (200, True)
    assert b'"code":"backend_died"' in answer.body
    assert f"{victim} ended by itself: exited with status 9".encode() in answer.body
    assert b"model loaded" in answer.body  # one of its last lines
    assert chats_seen(hospital, victim) == 3
    assert len(hospital.journal("main", victim)) == 2
    assert hospital.chat(victim).status == 200


PLACES = "mid-event", "mid-body", "boundary"
BREAKS = [*itertools.product(("die", "cut"), (False, True), PLACES)]
BREAKS.remove(("cut", True, "boundary"))  # it looks complete


@pytest.mark.parametrize("end, until_close, place", BREAKS)
def test_a_broken_stream_never_ends_cleanly(hospital, victim, end, until_close, place):
    wish = {end: place, "until_close": until_close, "tokens": 4}
    with hospital.stream(victim, **wish) as stream:
        with pytest.raises(BrokenAnswer, match="the connection ended"):
            list(stream.events())
    is_within = place == "mid-event" or (place == "mid-body" and until_close)
    assert (b'"code":"backend_died"' in stream.raw) is not is_within
    assert is_within or stream.raw.endswith(b"}}\n\n")
    assert b"[DONE]" not in stream.raw


@pytest.mark.parametrize("end", [{"die": "mid-body"}, {"cut": "mid-body", "reset": 1}])
def test_a_broken_counted_answer_never_looks_whole_nor_is_asked_for_again(
    hospital, victim, end
):
    with pytest.raises(BrokenAnswer):
        hospital.chat(victim, **end)
    assert chats_seen(hospital, victim) == 1


@pytest.mark.parametrize("place", ["mid-event", "boundary"])
def test_a_broken_stream_resets_a_client_of_http_1_0(hospital, victim, place):
    text = chat_text(victim, stream=True, die=place, tokens=4, version="1.0")
    assert raw(hospital, text)[1]


def read_until(mark, pieces):
    """Read pieces up to this mark; return them all, joined."""
    data = b""
    while mark not in data:
        data += next(pieces)
    return data


def test_streams_get_a_head_then_comments_during_a_load_unless_these_are_off(swap):
    with swap.stream("late") as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        eventually(lambda: swap.states()["late"] == "loading")
        pieces = stream.client.pieces(stream.status, stream.headers)
        assert read_until(b":\n\n:\n\n", pieces) == b":\n\n:\n\n"
        swap.gate.touch()
        assert re.search(b"late (?s:.*)DONE", b"".join(pieces))
    with swap.stream("late2") as stream:
        assert stream.text() and stream.headers["x-accel-buffering"] == "no"
    assert not stream.raw.startswith(b":")
    for model in ("late", "late2"):
        swap.post("/models/unload", {"model": model})


def test_during_prefill_and_in_pauses_comments_come_between_events(swap, tmp_path):
    before, between = tmp_path / "before", tmp_path / "between"  # the tokens
    wish = {"delay": str(before), "interval": str(between)}
    with swap.stream("a", tokens=2, **wish) as stream:
        pieces = stream.client.pieces(stream.status, stream.headers)
        raw = read_until(b":\n\n:\n\n", pieces)
        before.touch()
        raw += read_until(b"}\n\n:\n\n", pieces)
        between.touch()
        raw += b"".join(pieces)
    assert re.match(rb"(:\n\n){2,}data: ", raw)
    assert re.search(rb"\}\n\n(:\n\n)+data: ", raw)


def test_before_the_early_head_a_failure_keeps_its_status(hospital):
    answer = hospital.chat("gone", stream=True)
    assert (answer.status, answer.headers["x-should-retry"]) == (502, "false")
    assert "/no/such/program" in answer.message()


def test_an_error_of_the_backend_is_an_event_after_an_early_head_else_unchanged(
    swap, hospital, victim, tmp_path
):
    for status in (400, 404, 429, 500, 503):
        answer = hospital.chat(victim, stream=True, status=status)
        assert answer.status == status
        assert answer.json()["error"]["code"] == status
    for more, text in ({}, "as asked"), ({"error": "no room on the GPU"}, "no room on"):
        gate = tmp_path / text
        with swap.stream("a", delay=str(gate), status=429, **more) as stream:
            gate.touch()  # now that there is a head
            (problem,) = stream.documents()
        assert text in problem["error"]["message"] and stream.is_complete


def test_only_paths_that_stream_events_get_an_early_head(swap):
    body = {"model": "slow", "stream": True}
    swap.post("/api/models/unload/slow")
    with swap.connect() as speech:
        speech.send("POST", "/v1/audio/speech", body)
        for path in (CHAT, "/v1/completions", MESSAGES, "/v1/responses", "/infill"):
            with Stream(swap.port, path, body) as stream:
                assert stream.headers["content-type"] == "text/event-stream"
        assert not select.select([speech.sock], [], [], 0)[0]


def test_a_backend_that_answers_early_and_reads_no_more_is_heard(swap):
    swap.chat("a")
    data = b'{"model":"a","x":"' + b"x" * 8_000_000 + b'"}'
    answer = swap.post("/early?status=429", data)
    assert answer.status == 429 and "refused" in answer.message()


@pytest.mark.parametrize("given, expected", [
    ({}, {"model": "real/name", "temperature": 0.5, "top_p": 1,
          "options": {"x": 9, "deep": {"a": 1, "b": {"c": 2}, "e": True}}}),
    ({"temperature": 2, "top_k": 1, "top_p": 2}, {"temperature": 0.5, "top_p": 2}),
    ({"options": {"x": 1, "deep": {"b": {"c": 3, "d": 4}}}},
     {"options": {"x": 1, "deep": {"a": 1, "b": {"c": 3, "d": 4}, "e": True}}}),
    ({"keep_alive": "5m", "ttl": 60, "z": 1}, {"z": 1}),
])
def test_requests_are_edited_as_the_file_says(swap, given, expected):
    sent = json.loads(swap.post("/v1/x", {"model": "edited", **given}).json()["body"])
    assert {name: sent[name] for name in expected} == expected
    assert not {"top_k", "keep_alive", "ttl"} & set(sent)
    assert swap.post("/v1/x?model=shared", {}).json()["body"] == '{"seed":7}'
    data, other = b"--x", {"Content-Type": "multipart/form-data"}
    assert swap.post("/v1/x?model=a", data, other).json()["body"] == "--x"


def test_the_model_is_found_behind_blanks(swap):
    text = "\n" * 99 + json.dumps(chat_body("a"))
    assert swap.post(CHAT, text).status == 200


def test_a_body_without_edits_is_forwarded_byte_for_byte(swap):
    text = ' {"x" : 1.0e5,\r\n"x":"\\u00e4\u00e4", "model":"a","model":"b" } '
    assert swap.post("/v1/x", text).json()["body"].encode("latin-1").decode() == text


def test_the_model_is_found_and_its_name_put_into_forms_too(swap):
    for model, name in (("a", "a"), ("edited", "real/name")):
        data, kind = multipart(("file", LARGE), ("model", model))
        answer = swap.post("/v1/audio/transcriptions", data, {"Content-Type": kind})
        assert answer.json()["fields"] == {"file": {"size": len(LARGE)}, "model": name}


def test_keep_alive_of_a_request_unloads_its_model(swap):
    for seconds in (1e10, 0):
        assert swap.chat("late2", keep_alive=seconds).status == 200
    eventually(lambda: swap.states()["late2"] == "unloaded")
    for wrong in ("soon", [1], True):
        answer = swap.chat("a", keep_alive=wrong)
        assert (answer.status, answer.json()["error"]["param"]) == (400, "keep_alive")


def echoed(answer):
    return {name.lower(): value for name, value in answer.json()["headers"]}


def test_fields_of_one_connection_and_private_ones_are_not_passed_on(swap):
    private = {
        "X-Conversation-Id": "c::a", "X-Own": "1", "Keep-Alive": "30", "TE": "trailers",
        "Proxy-Authorization": "x", "Accept-Encoding": "gzip",
    }
    fields = {"Connection": "keep-alive, X-Own", "X-Kept": "\u00e4", **private}
    fields["Authorization"] = "Bearer for-the-backend"
    answer = swap.post("/v1/x", {"model": "a"}, fields)
    assert not {"access-control-allow-origin", "keep-alive"} & set(answer.headers)
    got = echoed(answer)
    assert got["x-kept"] == "\u00e4" and got["authorization"] == fields["Authorization"]
    assert got["host"].startswith("127.0.0.1:") and str(swap.port) not in got["host"]
    assert not {name.lower() for name in private} & set(got)
    got = echoed(swap.post("/v1/x", {"model": "keyed"}, fields))
    assert got["authorization"] == "Bearer backend-key"


def websocket(client, path, **fields):
    """Ask for an upgrade; the answer's head."""
    more = {"Connection": "Upgrade", "Upgrade": "websocket"}
    client.send("GET", path, None, {"Sec-WebSocket-Key": "eA==", **more, **fields})
    return client.head()


def test_websockets_pass_bytes_both_ways(swap):
    swap.chat("a")
    with swap.connect() as client:
        status, headers = websocket(client, "/upstream/a/ws")
        assert (status, headers["upgrade"]) == (101, "websocket")
        assert headers["connection"].lower() == "upgrade"
        token = hashlib.sha1(b"eA==258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        assert headers["sec-websocket-accept"] == base64.b64encode(token).decode()
        for data in (b"ping", LARGE * 5):  # more than all buffers on the way
            sender = threading.Thread(target=client.sock.sendall, args=(data,))
            sender.start()
            assert b"".join(client.exactly(len(data))) == data
            sender.join()
        assert swap.stats("a")["in_flight"] >= 1
    eventually(lambda: swap.stats("a")["in_flight"] == 0)


def test_a_websocket_is_cut_when_its_model_is_stopped(swap):
    swap.chat("b")
    with swap.connect() as client:
        assert websocket(client, "/ws?model=b")[0] == 101
        unload(swap, "b")
        assert everything(client.sock)[0] == b""


def test_only_websockets_are_upgrades(swap):
    swap.chat("a")
    fields = {"Connection": "Upgrade", "Upgrade": "h2c"}
    got = echoed(swap.ask("GET", "/upstream/a/x", None, fields))
    assert not {"upgrade", "connection"} & set(got)
    fields["Upgrade"] = "websocket"
    assert "upgrade" not in echoed(swap.post("/v1/x", {"model": "a"}, fields))


def test_chunked_uploads_trailers_and_continue_work(swap):
    head = "POST /v1/x HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n"
    for data in (b'{"model":"a"}', b'{"model":"a","x":"' + b"x" * 3_000_000 + b'"}'):
        with swap.connect() as client:
            client.sock.sendall(http(head + "Expect: 100-continue"))
            assert client.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sock.sendall(chunked(data)[:-2] + b"Trailer: x\r\n\r\n")
            assert client.answer().json()["sha256"] == sha256(data).hexdigest()
            assert client.ask("GET", "/health").status == 200


def test_a_client_that_expects_to_continue_may_be_refused_instead(swap):
    head = "POST /v1/x HTTP/1.1\nHost: evil.example\nContent-Length: 5"
    data, _ = raw(swap, http(head + "\nExpect: 100-continue"))
    assert data.startswith(b"HTTP/1.1 403 ")
    assert b"connection: close" in data


def test_pipelined_requests_are_answered_in_order(swap):
    with swap.connect() as client:
        texts = [chat_text("a", tag=str(tag), size=50) for tag in range(5)]
        client.sock.sendall(b"\r\n".join(texts))
        for tag in range(5):
            assert f" {tag}" in client.answer().content()


def test_the_head_of_an_answer_can_be_had_alone(swap):
    paths = "/health /v1/models / /models/sse /logs/stream /none /upstream/a/stats"
    assert swap.get("/upstream/a/").status == 200  # loads it
    with swap.connect() as client:
        for path in paths.split():
            status = 404 if path == "/none" else 200
            assert client.ask("HEAD", path).status == status
        answer = client.ask("HEAD", "/upstream/a/bytes?n=123")
        assert (answer.status, answer.headers["content-length"]) == (200, "123")


def test_slow_heads_and_stalled_bodies_are_answered_408():
    head = "POST /v1/x HTTP/1.1\nHost: localhost\nContent-Length: 5000000"
    bodies = http(head, b'{"model"'), http(head, b'{"model":"a"' + b" " * 3_000_000)
    haste = {"HEAD_SECONDS": 0.2, "STALL_SECONDS": 0.2, "LINGER_SECONDS": 9.0}
    with hasty("[a]\ncmd = FAKE", **haste) as swap:
        for data in (b"GET / HTTP/1.1\r\nHost:", *bodies):
            assert raw(swap, data)[0].startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("data, status", [
    (b"GET / HTTP/1.1\nHost: x\n\n", 400), (b"GET / HTTP/1.1\r\nHost: x\nX: y", 400),
    (b"GET / HTTP/1.1\rHost: x\r", 400), (b"GET /\0 HTTP/1.1\r\n", 400),
    (b"GET / HTTP/1.1\r\nX: " + bytes([120]) * 66000, 431),
    (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % 2**40, 413),
])
def test_a_request_that_cannot_be_is_refused_before_its_end(swap, data, status):
    assert raw(swap, data)[0].startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("framing, body", [
    (IN_CHUNKS, chunked(LARGE)), (f"Content-Length: {len(LARGE)}", LARGE)
], ids=["chunked", "counted"])
def test_a_client_that_goes_on_sending_still_reads_its_refusal(framing, body):
    text = "[llmswap]\nmax-body = 1M\n[a]\ncmd = FAKE"
    with hasty(text, LINGER_SECONDS=9.0) as swap, swap.connect() as client:
        client.sock.sendall(http(f"POST /x HTTP/1.1\nHost: localhost\n{framing}", body))
        assert client.answer().status == 413


# ==================================================================================
# 9  API
# ==================================================================================

@pytest.fixture(scope="module")
def guarded():
    text = """
    [llmswap]
    api-key       = s3cret, schl\u00fcssel
    cors-origins  = localhost, https://chat.example
    [a]
    cmd = FAKE --model a
    """
    with hasty(text) as running:
        yield running


KEY = {"Authorization": "Bearer s3cret"}


def test_models_are_listed_as_openai_and_llama_cpp_do_and_none_is_loaded(swap):
    starts = len(swap.journal("main"))
    answer = swap.get("/v1/models")
    assert answer.json()["object"] == "list"
    entries = {entry["id"]: entry for entry in answer.json()["data"]}
    assert "hidden" not in entries
    entry = entries["b"]
    assert entry["object"] == "model" and isinstance(entry["created"], int)
    assert entry["aliases"] == ["b with blank", "b%41", "org/b"]
    assert entry["status"]["value"] in ("loaded", "unloaded")
    assert isinstance(entry["status"]["args"], list) and "meta" in entry
    for name in ("b", "org/b", "org%2Fb", "b%20with%20blank", "b%2541"):
        assert swap.get(f"/v1/models/{name}").json()["id"] == "b"
    for path in ("/models", "/v1/models?x=y", "/v1/models/hidden"):
        assert swap.get(path).status == 200
    assert swap.get("/v1/models/none").status == 404
    assert len(swap.journal("main")) == starts


MASKED = [
    (["--api-key", "s", "x"], ["--api-key", "***", "x"]),
    (["--api-key=s"], ["--api-key=***"]),
    (["-hft", "s"], ["-hft", "***"]),
    (["--key", "-s"], ["--key", "***"]),
    (["--password", "a", "b"], ["--password", "***", "b"]),
    (["--use-token", "--model", "m"], ["--use-token", "--model", "m"]),
    (["HF_TOKEN=s", "x"], ["HF_TOKEN=***", "x"]),
    (["--max-tokens", "5", "--tokenizer", "t"],) * 2,
    (["sh", "-c", "v --api-key s --x"], ["sh", "-c", "v --api-key *** --x"]),
    (["sh", "-c", "x; A_KEY='s s' v"], ["sh", "-c", "x; A_KEY=*** v"]),
]


def test_values_of_secret_options_are_masked():
    for argv, shown in MASKED:
        assert llmswap.mask_secrets(argv) == shown


def test_a_model_that_a_reload_removes_meanwhile_is_not_found():
    removed = SimpleNamespace(_resolve=str, _model_entries=lambda models: [])
    with pytest.raises(llmswap.ModelNotFound):
        llmswap.Handler.get_model(removed, "x")


def test_models_are_loaded_and_unloaded_by_hand_as_by_llama_cpp(swap):
    swap.post("/unload")
    with Stream(swap.port, "/models/sse") as stream:
        events = stream.documents()
        for action, state, problem in (
            ("load", "loaded", "model is already running"),
            ("unload", "unloaded", "model is not running"),
        ):
            path = f"/models/{action}"
            assert swap.post(path, {"model": "org/b"}).json() == {"success": True}
            eventually(lambda: swap.states()["b"] == state)
            answer = swap.post(path, {"model": "b"})
            assert (answer.status, answer.message()) == (400, problem)
            assert swap.post(path, {"model": "none"}).status == 404
            assert swap.post(path, {}).status == swap.post(path, "{").status == 400
            assert swap.get(path).status == 405
        seen = [next(events), next(events)]
        while seen[-1]["data"]["status"] != "unloaded":
            seen.append(next(events))
    loading = {"status": "loading"}
    assert seen[0] == {"model": "b", "event": "model_status", "data": loading}
    assert seen[1]["data"]["status"] == "loaded"
    assert {each["model"] for each in seen} == {"b"}


QUESTIONS = "props slots metrics lora-adapters".split()
LOADS_NOTHING = [  # method and path; the status of the answer while it is not loaded
    ("POST", f"{CHAT}?autoload=false", 400),
    ("DELETE", "/v1/x?model=hidden&autoload=no", 400),
    *(("GET", f"/{word}?model=hidden", 400) for word in QUESTIONS),
    ("GET", "/slots?model=hidden&autoload=false", 400),
    *(("GET", f"/upstream/hidden/{word}", 409) for word in QUESTIONS),
    *(("GET", f"/upstream/hidden/{path}", 409) for path in ("v1/models", "x.js", "ws")),
    *(("GET", f"/{word}?model=none", 404) for word in QUESTIONS),
    *(("GET", f"/{word}?model=", 400) for word in QUESTIONS),
]


def test_nothing_is_loaded_against_a_clients_will(swap):
    starts = len(swap.journal("main"))
    for method, path, status in LOADS_NOTHING:
        body = {"model": "hidden"} if method == "POST" else None
        answer = swap.ask(method, path, body)
        text = {400: "model", 404: "no model", 409: "only the page itself"}[status]
        assert answer.status == status and text in answer.message(), path
    assert answer.message() == "model name is missing from the request"
    assert swap.get("/slots?model=hidden").message() == "model is not loaded"
    assert len(swap.journal("main")) == starts
    for path in ("/upstream/hidden/", "/slots?model=hidden&autoload=true"):
        swap.post("/api/models/unload/hidden")
        assert swap.get(path).json()["path"] in ("/", path)
        assert swap.get("/upstream/hidden/x.js").status == 200
        assert swap.get("/props?model=hidden").json()["path"] == "/props?model=hidden"
    swap.post("/api/models/unload/hidden")
    props = swap.get("/props?autoload=false").json()  # llmswap's own
    assert props == swap.get("/props").json() and props["role"] == "router"
    assert "default_generation_settings" in props and props["ui_settings"] == {}


def test_without_autoload_models_are_loaded_by_hand():
    with Llmswap("[llmswap]\nmodels-autoload = off\n[a]\ncmd = FAKE") as server:
        assert server.get("/props").json()["models_autoload"] is False
        answer = server.chat("a")
        assert (answer.status, answer.message()) == (400, "model is not loaded")
        assert server.get("/upstream/a/").status == 400
        for action, state in (("load", "loaded"), ("unload", "unloaded")):
            server.post(f"/models/{action}", {"model": "a"})
            eventually(lambda: server.states()["a"] == state)
            assert (server.chat("a").status == 200) == (action == "load")
        assert server.post("/upstream/a/x?autoload=false").status == 400
        assert server.post(f"{CHAT}?autoload=true", chat_body("a")).status == 200


def test_paths_of_other_servers_are_answered_in_their_words(swap):
    assert swap.post("/v1/streams/lookup", {"conv_ids": ["x"]}).json() == []
    for path in ("/tools", "/cors-proxy"):  # llama.cpp's router without its features
        for answer in (swap.get(path), swap.post(path, {})):
            assert answer.status == 403
            assert answer.json()["error"]["type"] == "feature_disabled"
    for path in ("/v1/models", "/health", "/props", "/running", "/logs"):
        answer, other = swap.get(path), swap.get(f"{path}/?x=y")
        assert answer.status == other.status == 200
        assert answer.headers["server"] == "llmswap (llama.cpp)"
    assert swap.get("/v1/models/b/").json()["id"] == "b"
    twice, ollama = "/v1 twice", "OpenAI-compatible"
    for path, words in (
        ("/v1/v1/models", twice), ("/api/tags", ollama), ("/api/version/", ollama),
    ):
        for answer in (swap.get(path), swap.post(path, {"model": "a"})):
            assert answer.status == 404 and words in answer.message()
            assert "http://127.0.0.1/v1" in answer.message()  # as the Host it was sent
    assert swap.get("/slots/?model=a").status == swap.get("/slots?model=a").status


def test_a_client_that_speaks_tls_is_told_so(swap):
    answer, _ = raw(swap, b"\x16\x03\x01\x02\x00\x01")  # a TLS ClientHello
    assert answer.startswith(b"HTTP/1.1 400 ") and b"is it TLS (https://)?" in answer
    eventually(lambda: "is it TLS" in swap.log())


def test_a_start_that_is_bound_to_fail_is_known_before():
    text = "[gone]\ncmd = /no/such/program --port ${PORT}\n[fine]\ncmd = FAKE"
    with Llmswap(text) as server:
        status = lambda: server.get("/v1/models/gone").json()["status"]  # noqa: E731
        eventually(lambda: "failed" in status())  # a client does not wait for files
        assert status()["failed"] and status()["exit_code"] == 1
        assert status()["error"] == "/no/such/program does not exist"
        assert "failed" not in server.get("/v1/models/fine").json()["status"]
        with Stream(server.port, "/", headers=EVENTS) as stream:
            models = {each["id"]: each for each in next(stream.documents())["models"]}
        assert "does not exist" in models["gone"]["failure"]
        assert not models["fine"]["failure"]


def rows_of(server, query=""):
    return server.get(f"/api/requests{query}").json()["requests"]


def test_requests_are_remembered_with_who_asked_for_what():
    with Llmswap("[a]\ncmd = FAKE\nalias = x\n[b]\ncmd = FAKE --load-exit 3") as server:
        server.ask("X" * 999, CHAT, chat_body("n" * 999))
        (row,) = eventually(lambda: rows_of(server))
        assert (len(row["method"]), len(row["asked"])) == (500, 500)
        fields = {"User-Agent": "tester" * 99, "X-Session-Id": "s1"}
        assert server.post(CHAT, chat_body("x"), fields).status == 200
        eventually(lambda: all(row["status"] for row in rows_of(server)))
        row, _ = rows_of(server)
        assert row["user_agent"] == ("tester" * 99)[:500]
        names = "client session method path asked model stream status error".split()
        assert [row[name] for name in names] == [
            "127.0.0.1", "s1", "POST", CHAT, "x", "a", False, 200, None]
        assert row["tokens_out"] > 0 and abs(row["started"] - time.time()) < 60
        assert 0 < row["waited"] < row["first_byte"] <= row["seconds"]
        assert server.chat("none").status == 404
        eventually(lambda: rows_of(server)[0]["asked"] == "none")
        assert server.chat("b").status == 502
        assert server.get("/upstream/a/").status == 200  # pages are no requests
        eventually(lambda: all(row["status"] for row in rows_of(server)))
        rows = rows_of(server)
        assert [row["status"] for row in rows][:3] == [502, 404, 200]
        assert [row["asked"] for row in rows][:3] == ["b", "none", "x"]
        assert "exited with status 3" in rows[0]["error"]
        assert [row["asked"] for row in rows_of(server, "?model=x")] == ["x"]
        assert rows_of(server, "?limit=1") == rows_of(server)[:1]
        assert server.get("/api/requests?limit=x").status == 400


def test_a_request_in_flight_is_shown_and_can_be_cancelled():
    with Llmswap("[a]\ncmd = FAKE\n[b]\ncmd = FAKE --load 60") as server:

        def cancel(model):
            (row,) = eventually(lambda: rows_of(server, f"?model={model}")[:1])
            assert row["status"] is None and row["seconds"] > 0
            path = f"/api/requests/{row['id']}/cancel"
            assert server.post(path).json() == {"success": True}
            eventually(lambda: rows_of(server, f"?model={model}")[0]["status"] == 499)
            assert server.post(path).status == 404

        for model, wish in (("a", {"hang": True}), ("b", {})):  # at work, and waiting
            with server.connect() as client:
                client.send("POST", CHAT, chat_body(model, **wish))
                if wish:
                    eventually(lambda: server.get("/health").json()["requests"])
                cancel(model)
                answer = client.answer()
                assert answer.status == 499
                assert answer.json()["error"]["code"] == "request_cancelled"
        with server.stream("a", tokens=10**6, interval=0.05) as stream:
            events = stream.events()
            next(events)
            cancel("a")
            with pytest.raises(BrokenAnswer):
                list(events)
            assert b"request_cancelled" in stream.raw
        eventually(lambda: server.get("/health").json()["requests"] == 0)
        assert server.post("/api/requests/1/stop").status == 404


def test_a_request_that_is_refused_once_it_was_cancelled_is_answered():
    with Llmswap("[a]\ncmd = FAKE --load 60") as server, server.connect() as client:
        client.send("POST", CHAT, chat_body("a"))
        (row,) = eventually(lambda: rows_of(server))
        server.post(f"/api/requests/{row['id']}/cancel")
        server.post("/models/unload", {"model": "a"})  # before the cancel is noticed
        assert client.answer().status in (499, 503)


FORM_THAT_STALLS = (
    b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
    b"Content-Type: multipart/form-data; boundary=X\r\n\r\n"
    b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--X\r\n'
)


@pytest.mark.parametrize("is_upload", [False, True])
def test_a_cancel_ends_the_request_of_a_client_that_does_nothing(is_upload):
    with Llmswap("[a]\ncmd = FAKE") as server, server.connect() as client:
        if is_upload:
            client.sock.sendall(FORM_THAT_STALLS + bytes(3_000_000))
        else:
            client.send("POST", CHAT, chat_body("a", size=20_000_000))
        in_flight = lambda: rows_of(server)[0]["waited"] is not None  # noqa: E731
        (row,) = eventually(lambda: rows_of(server))
        eventually(in_flight)
        server.post(f"/api/requests/{row['id']}/cancel")
        eventually(lambda: rows_of(server)[0]["status"] == 499, 10)


def test_five_hundred_requests_are_remembered_in_a_megabyte():
    log = llmswap.RequestLog()
    tracemalloc.start()
    try:
        for number in range(600):
            row = dict.fromkeys(llmswap.REQUEST_FIELDS, number + 0.5)
            for name in "client user_agent session path asked model".split():
                row[name] = f"{number} {'x' * 100}"
            row["id"] = None
            log.start(row, None)
            log.end(row)
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    assert [row["id"] for row in log.rows()] == [*range(600, 100, -1)]


def test_llama_swaps_routes(swap):
    swap.chat("a")
    eventually(lambda: entry_of(swap, "a")["status"]["args"])
    running = {each["model"]: each for each in swap.get("/running").json()["running"]}
    assert running["a"]["state"] == "ready"
    assert running["a"]["proxy"].startswith("http://127.0.0.1:")
    assert "fake.py" in running["a"]["cmd"] and "shared" not in running
    answer = swap.post("/api/models/unload/a")
    assert (answer.status, answer.body) == (200, b"OK")
    assert swap.states()["a"] == "unloaded"
    assert swap.post("/api/models/unload/none").status == 404
    eventually(lambda: b" a: loaded in " in swap.get("/logs").body)


def test_everything_is_unloaded(guarded):
    ways = "GET /unload", "POST /unload", "POST /api/models/unload"
    for method, path in map(str.split, (*ways, "POST /api/models/unload/")):
        assert guarded.post("/v1/x", {"model": "a"}, KEY).status == 200
        answer = guarded.ask(method, path, None, KEY)
        assert (answer.status, answer.body) == (200, b"OK")
        assert guarded.get("/health").json()["loaded"] == 0


def test_logs_are_followed_with_and_without_history(swap):
    swap.chat("a")
    with swap.connect() as client:
        client.send("GET", "/logs/stream/a")
        status, headers = client.head()
        assert headers["content-type"].startswith("text/plain")
        assert any(b"model loaded" in piece for piece in client.pieces(status, headers))
    with swap.connect() as client:
        client.send("GET", "/logs/stream?no-history")
        status, headers = client.head()
        swap.post("/unload")
        swap.post("/models/load", {"model": "b"})
        pieces, seen = client.pieces(status, headers), b""
        while b"b: loading" not in seen:
            seen += next(pieces)
        assert b": loaded in" not in seen.partition(b"b: loading")[0]
        unload(swap, "b")
    assert swap.get("/logs/stream/none").status == 404


def test_under_upstream_a_models_own_server_is_reached(swap):
    for name, path, seen in (
        ("a", "x?y=z", "/x?y=z"),
        ("org/b", "x", "/x"),
        ("org%2Fb", "x/y%2Fz%20%25", "/x/y%2Fz%20%25"),
        ("b%2541", "%C3%A4?q=%26", "/%C3%A4?q=%26"),
        ("shared", "/x", "//x"),
    ):
        assert swap.get(f"/upstream/{name}/").json()["path"] == "/"  # loads it
        assert swap.get(f"/upstream/{name}/{path}").json()["path"] == seen
    assert swap.post("/upstream/a/x", "no json").json()["body"] == "no json"
    data, kind = multipart(("file", LARGE))  # of unknown meaning: streamed
    answer = swap.post("/upstream/a/x", data, {"Content-Type": kind})
    assert answer.json()["length"] == len(data)
    answer = swap.get("/upstream/org%2Fb?x=y")
    assert answer.status == 308
    assert answer.headers["location"] == "/upstream/org%2Fb/?x=y"
    assert swap.get("/upstream/none/x").status == 404


def test_requests_are_routed_by_body_form_or_query_whatever_the_path(swap):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for method, path, body, fields in (
        ("POST", CHAT, chat_body("shared"), {}),
        ("POST", "/v1/x", {"model": "shared"}, form),  # curl -d
        ("POST", "/v1/x?model=shared", b"RIFF....", {"Content-Type": "audio/wav"}),
        ("POST", "/any/path", {"model": "a"}, {"Content-Type": ""}),
        ("PUT", "/v1/x", {"model": "a"}, {}),
        ("GET", "/v1/x?model=a", None, {}),
        ("DELETE", "/v1/x?model=a", None, {}),
    ):
        answer = swap.ask(method, path, body, fields)
        assert answer.status == 200
        if path != CHAT:
            assert (answer.json()["method"], answer.json()["path"]) == (method, path)


ERRORS = [  # method, path, body; status and code of the answer
    ("POST", CHAT, "{", 400, "invalid_request"),
    ("POST", CHAT, {}, 400, "invalid_request"),
    ("POST", CHAT, {"model": ""}, 400, "invalid_request"),
    ("POST", CHAT, {"model": "clossing"}, 404, "model_not_found"),
    ("POST", "/v1/x", {"model": "x" * 100_000}, 404, "model_not_found"),
    ("POST", "/v1/x", '{"model":"\\ud800"}', 404, "model_not_found"),
    ("GET", "/v1/none", None, 404, "not_found"),
    ("DELETE", "/v1/models", None, 405, "method_not_allowed"),
    ("POST", "/running", {"model": "a"}, 405, "method_not_allowed"),
    ("PUT", "/health", None, 405, "method_not_allowed"),
    ("POST", "/v1/x", {"model": "gone"}, 502, "model_start_failed"),
]


def test_errors_have_openais_shape_and_a_real_status(swap):
    for method, path, body, status, code in ERRORS:
        answer = swap.ask(method, path, body)
        problem = answer.json()["error"]
        assert (answer.status, problem["code"]) == (status, code), (path, body)
        assert set(problem) == {"message", "type", "param", "code"}
        assert 0 < len(problem["message"]) < 1000
        assert answer.headers["content-type"].startswith("application/json")
    answer = swap.chat("clossing")
    assert "closing" in answer.message() and answer.json()["error"]["param"] == "model"
    assert "hidden" not in swap.chat("hiden").message()
    with swap.connect() as client:  # usable after an error
        for _ in range(2):
            assert client.ask("POST", "/v1/x", {"model": "none"}).status == 404
            assert client.ask("POST", "/v1/x", "x" * 500_000).status == 400
            assert client.ask("GET", "/health").json()["status"] == "ok"


# ---- access


def basic(password):
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


# Requests; the status of their answers, with "cors" if the page of that origin may read
# them; then their headers: alternatives stand between |, and & joins. Words in braces
# are those of ACCESS_WORDS.
CORS_AND_KEY_RULES = """
GET /v1/models -> 200
    Authorization: bearer  s3cret | Authorization: s3cret | x-api-key: s3cret
    Authorization: {basic_umlaut} | Authorization: Bearer {umlaut}
    Authorization: Bearer no & x-api-key: s3cret
    {own} & {key} & {site} same-site & {mode} no-cors
    {own} & {stored} & {site} cross-site & {mode} navigate
    {own} & {stored} & {site} none & {mode} navigate
    {key} & Origin: https://evil.example
GET /v1/models -> 401
    | Authorization: Bearer s3cre | Authorization: Basic s3cret | x-api-key: \u00e4
    Authorization: {basic_wrong} | {own} & {stored} & Origin: https://evil.example
    {own} & {stored} & {site} same-site & {mode} no-cors
GET /v1/models -> 401 cors
    {own} & {stored} & Origin: http://localhost:3000
GET /models /running /metrics /logs /upstream/a/ /none -> 401
POST /v1/x -> 401
    | {own} & {stored} & {site} cross-site & {mode} navigate
GET / -> 401
    Accept: text/event-stream
GET / /health /v1/health -> 200
    x-api-key: wrong
GET /health -> 403
    Host: evil.example
OPTIONS /v1/models -> 204
    Origin: https://evil.example
OPTIONS /v1/models -> 204 cors
    Origin: http://localhost:3000
POST /v1/x -> 200 cors
    {key} & Origin: http://localhost:3000 | {key} & Origin: https://127.0.0.1
    {key} & Origin: http://[::1]:5173 | {key} & Origin: https://chat.example
    {own} & {stored} & Origin: http://127.0.0.1:{port}
    {own} & {stored} & {site} same-origin & Origin: http://[::1]
POST /v1/x -> 403
    {key} & Origin: https://chat.example:444 | {key} & Origin: http://chat.example
    {key} & Origin: http://localhost@evil.example | {key} & Origin: null
    {key} & Origin: http://localhost.evil.example
GET /v1/none -> 404 cors
    {key} & Origin: https://chat.example
GET /upstream/a/ws -> 403
    {key} & {ws} & Origin: https://evil.example
"""
HOST_AND_PAGE_RULES = """
GET /v1/models -> 200
    Host: LOCALHOST:8080 | Host: 192.168.1.5:8080 | Host: [::1]:80
    Host: host.docker.internal:8080
GET /v1/models -> 403
    Host: localhost.evil.example | Host: 127.0.0.1.evil.example:8080 | Host: [::1
    Host: [::1].evil.example | Host: localhost:80@evil.example | Host: :evil.example
GET /v1/models?reload=1 -> 200 cors
    Origin: http://localhost:3000
GET /v1/models?reload=1 -> 200
    {site} same-origin & User-Agent: Mozilla/5.0 | | User-Agent: curl/8.0
    Referer: http://127.0.0.1/x & User-Agent: Mozilla/5.0
POST /v1/x -> 200 cors
    {own} & Origin: http://127.0.0.1:{port}
GET /upstream/a/x -> 200
    Origin: https://evil.example | {site} cross-site & {mode} no-cors
POST /models/load /models/unload /api/models/unload /api/models/unload/a /unload \
/v1/chat/completions /upstream/hidden/x -> 403
    Origin: https://evil.example | Origin: null
GET,HEAD /unload /v1/models?reload=1 /upstream/hidden/x \
/props?model=hidden&autoload=true /x?model=hidden -> 403
    Origin: https://evil.example | Origin: null | Referer: https://evil.example/page
    {site} cross-site & {mode} no-cors | User-Agent: Mozilla/5.0 (X11; Linux x86_64)
"""
ACCESS_WORDS = {
    "key": "Authorization: Bearer s3cret",
    "stored": f"Authorization: {basic('s3cret')}",  # by a browser
    "basic_umlaut": basic("schl\u00fcssel"),
    "basic_wrong": basic("wrong"),
    "umlaut": "schl\u00fcssel".encode().decode("latin-1"),
    "ws": "Connection: Upgrade & Upgrade: websocket & Sec-WebSocket-Key: eA==",
    "site": "Sec-Fetch-Site:",
    "mode": "Sec-Fetch-Mode:",
}


def access_rules(text):
    """Yield (method, path, headers, what is expected) of each rule."""
    for block in re.split(r"\n(?=\S)", text.strip()):
        title, *lines = block.split("\n")
        requests, expected = title.split(" -> ")
        methods, *paths = requests.split()
        fields = " | ".join(map(str.strip, lines)).split("|")
        for method, path, each in itertools.product(methods.split(","), paths, fields):
            yield method, path, each.strip(), expected


def access_given(client, method, path, fields):
    """The status of a request, and "cors" if the page of its origin may read it."""
    pairs = [each.partition(":") for each in fields.split(" & ")]
    fields = {name.strip(): value.strip() for name, _, value in pairs if name.strip()}
    body = {"model": "a" if path == "/v1/x" else "hidden"} if method == "POST" else None
    answer = client.ask(method, path, body, fields)
    if answer.headers.get("connection") == "close":  # a body that was not read
        port = client.sock.getpeername()[1]
        client.hang_up()
        client.__init__(port)
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed in (None, fields.get("Origin"))
    if answer.status == 403 and method != "HEAD":
        assert re.search("allowed-hosts|cors-origins", answer.message())
    return f"{answer.status} cors" if allowed else str(answer.status)


@pytest.mark.parametrize("kind", ["swap", "guarded"])
def test_access_follows_host_origin_key_and_signs_of_a_browser(request, kind):
    server = request.getfixturevalue(kind)
    rules = CORS_AND_KEY_RULES if kind == "guarded" else HOST_AND_PAGE_RULES
    own = f"Host: 127.0.0.1:{server.port}"
    words = {**ACCESS_WORDS, "port": server.port, "own": own}
    server.post("/v1/x", {"model": "a"}, KEY)
    starts = len(server.journal("main"))
    with server.connect() as client:  # one connection: nothing is remembered
        wrong = [
            rule
            for *rule, expected in access_rules(rules.format(**words))
            if access_given(client, *rule) != expected
        ]
    assert wrong == []
    assert server.post("/v1/x", {"model": "a"}, KEY).status == 200
    assert len(server.journal("main")) == starts  # nothing was loaded or unloaded


def test_a_refused_client_learns_how_to_authenticate_and_allowed_pages_pass(guarded):
    refused = guarded.get("/v1/models")
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    opened = guarded.get("/upstream/a/", {"Accept": "text/html, */*"})
    assert opened.headers["www-authenticate"].startswith("Basic")  # it asks a person
    page = guarded.get("/", {"Accept": "text/html"})  # the bare page needs no key
    assert page.status == 200 and b"<title>llmswap</title>" in page.body
    assert page.headers["content-security-policy"] == llmswap.PAGE_POLICY
    with Stream(guarded.port, "/", None, {**EVENTS, **KEY}) as stream:
        assert len(next(stream.documents())["models"]) == 1
    wish = {"Access-Control-Request-Headers": "authorization, x-stainless-os"}
    allowed = {**KEY, "Origin": "https://chat.example"}
    headers = guarded.ask("OPTIONS", CHAT, None, {**allowed, **wish}).headers
    assert headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert "POST" in headers["access-control-allow-methods"]
    guarded.post("/v1/x", {"model": "a"}, KEY)
    with guarded.connect() as client:
        assert websocket(client, "/upstream/a/ws", **allowed)[0] == 101


# ---- secrets and strange names


def test_every_key_is_compared_and_in_constant_time(monkeypatch):
    compare = Mock(side_effect=bytes.__eq__)
    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = b"one", b"two", "thr\u00e4e".encode(), b"\xff"  # as in the environment
    for given in (*keys, b"none", b""):
        assert llmswap._is_key(given, [*map(os.fsdecode, keys)]) is (given in keys)
        calls = [each.args for each in compare.call_args_list[-len(keys) :]]
        assert calls == [(given, key) for key in keys]


def shown_by(server, fields):
    """Each place where llmswap shows something, and its text."""
    yield "log", server.log()
    paths = "/ /models /v1/models /v1/models/a /running /props /metrics /logs /health"
    for path in [*paths.split(), "/v1/none?key=K-wrong", "/upstream/a/stats"]:
        answer = server.get(path, fields)
        yield path, f"{answer.headers}{answer.body.decode()}"
    for path, more in (("/", EVENTS), ("/logs/stream/a", {})):
        with server.connect() as client:
            client.send("GET", path, None, {**fields, **more})
            status, headers = client.head()
            yield path, next(client.pieces(status, headers)).decode()


def test_no_key_is_ever_logged_shown_or_passed_on(tmp_path):
    (tmp_path / "keys").write_text("K-file\n")
    backend = recorder.RecordingBackend()
    text = f"""
    [llmswap]
    api-key      = K-ini
    api-key-file = {tmp_path}/keys
    [a]
    cmd = FAKE --print-env --api-key K-option
    [far]
    proxy     = http://127.0.0.1:{backend.port}
    proxy-key = K-proxy
    """
    with Llmswap(text, "--verbose", env={"LLMSWAP_API_KEY": "K-env"}) as server:
        forms = [{"x-api-key": f"K-{name}"} for name in ("ini", "file", "env")]
        values = "Bearer K-ini", "Bearer K-env", basic("K-file")
        forms += [{"Authorization": value, "api-key": "K-ini"} for value in values]
        for fields in forms:
            assert server.post("/v1/x", {"model": "far"}, fields).status == 200
            wrong = {name: f"{value}-wrong" for name, value in fields.items()}
            assert server.post("/v1/x?key=K-wrong", {"model": "a"}, wrong).status == 401
        assert server.get("/upstream/a/", forms[0]).status == 200
        shown = lambda: server.get("/v1/models/a", forms[0]).json()  # noqa: E731
        eventually(lambda: shown()["status"]["args"])
        for place, shown in shown_by(server, forms[0]):
            shown = shown.replace("/upstream/a/stats", "").replace(str(tmp_path), "")
            if place == "/upstream/a/stats":  # the server knows its own options
                shown = shown.replace("K-option", "")
            elif place in ("/v1/models/a", "/running"):
                assert "***" in shown
            assert not re.search(r"K-(ini|file|env|proxy|wrong|option)", shown), place
            assert basic("K-file")[6:] not in shown, place
    for request in backend.take_requests():
        fields = [value for _, value in request.headers if "K-" in value]
        assert fields == ["Bearer K-proxy"] and not request.all("x-api-key")
    backend.close()


STRANGE = (
    "a\x1b[2J\x9b31mb\x07",
    "<img src=x onerror=alert(1)>",
    "x\n12:00:00 y: loaded",
)
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def test_strange_names_reach_no_log_terminal_or_header_as_they_are():
    text = "".join(f"[{name}]\ncmd = FAKE --load-exit 1\n" for name in STRANGE)
    text += "[ok]\ncmd = FAKE\nalias = \x9b1m\u202e, \x1b]0;title\x07\n"
    text += "description = \x1b[1m\n"
    text += "[bad]\ncmd = FAKE\nidle-timeout = \x1b[2J\n[odd\x85]\nno-key = \x1b[2J\n"
    with Llmswap("[llmswap]\nmodels-max = 0\n" + text, "--verbose") as server:
        for name in (*STRANGE, "bad", "none\x1b[2J\x9b", "none\r\nX: y", "\x1b" * 2000):
            answer = server.chat(name)
            assert answer.status in (404, 500, 502) and b"\x1b" not in answer.body
            path = urllib.parse.quote(name, safe="")
            for answer in (
                server.get(f"/upstream/{path}"),
                server.get(f"/upstream/{path}/x"),
                server.get(f"/v1/models/{path}"),
                server.post(f"/api/models/unload/{path}"),
            ):
                assert not CONTROLS.search(str([*answer.headers.values()]))
                assert "x" not in answer.headers and b"\x1b" not in answer.body
        for path in "/models /v1/models /running /health /metrics /props".split():
            assert not CONTROLS.search(server.get(path).body.decode()), path
        eventually(lambda: r"\x9b31mb\x07" in server.log())
        assert "a[2J" not in server.log()
        for shown in (server.log(), server.get("/logs").body.decode()):
            assert not CONTROLS.search(shown)
            assert not re.search("^12:00:00 y", shown, re.MULTILINE)
        assert "\n12:00" not in server.get("/metrics").body.decode()
        shown = run_llmswap(server.ini, "--check")
        assert not CONTROLS.search(shown.stdout + shown.stderr)
        assert not re.search("^12:00:00 y", shown.stdout, re.MULTILINE)
        server.ini.write_text("[a]\n\x1b[2J broken\n")
        shown = run_llmswap(server.ini, "--check")
        assert shown.returncode == 2 and not CONTROLS.search(shown.stderr)


def test_a_unix_socket_is_for_its_group_from_the_first_moment_and_replaces_nothing(
    tmp_path, monkeypatch
):
    modes, path, bind = [], str(tmp_path / "socket"), socket.socket.bind

    def watched(sock, address):
        bind(sock, address)
        modes.append(os.stat(address).st_mode & 0o777)

    monkeypatch.setattr(socket.socket, "bind", watched)
    monkeypatch.delattr(os, "chmod")  # it would come too late
    (tmp_path / "notes").write_text("dear")
    before = os.umask(0)
    try:
        llmswap.open_listener(path).close()
        with llmswap.open_listener(path):  # the first has left its file
            for name in ("notes", "socket"):
                with pytest.raises(OSError, match="Address already in use"):
                    llmswap.open_listener(str(tmp_path / name))
    finally:
        assert os.umask(before) == 0
    assert modes == [0o660, 0o660] and os.stat(path).st_mode & 0o777 == 0o660
    assert (tmp_path / "notes").read_text() == "dear"


# ---- backends that answer anything


@pytest.fixture(scope="module")
def liar():
    """llmswap before a backend that answers as a test wishes; `b` has a path there."""
    backend = recorder.RecordingBackend()
    url = f"http://127.0.0.1:{backend.port}"
    text = f"[llmswap]\nmax-body = 16M\n[a]\nproxy = {url}\n[b]\nproxy = {url}/own\n"
    with hasty(text, CONNECT_TIMEOUT=9.0) as running:  # one that is late is not gone
        running.backend = backend
        assert running.get("/upstream/a/").status == 200
        yield running
    backend.close()


def test_doubtful_requests_are_answered_400_closed_and_not_forwarded(liar):
    behind = http("GET /upstream/a/smuggled HTTP/1.1\nHost: localhost")
    upload = "POST /upstream/a/x HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked"
    requests = [http(upload, chunks + b"\r\n\r\n") for chunks in BAD_CHUNKS]
    for ours in ("POST /unload", "POST /models/load", "GET /health", "OPTIONS /x"):
        text = upload.replace("POST /upstream/a/x", ours)
        requests.append(http(text, BAD_CHUNKS[-1]))
    for text in SMUGGLING:
        text = text.replace("Host: x", "Host: localhost", 1)
        requests.append(http(text.replace(" / ", " /upstream/a/x ", 1), b"0\r\n\r\n"))
    liar.backend.take_requests()
    clients = [crowd(liar, 1, request + behind)[0] for request in requests]
    for client, request in zip(clients, requests):
        data, _ = everything(client.sock)
        assert data.startswith(b"HTTP/1.1 400 "), request
        assert data.count(b"server: llmswap") == 1, request
        assert b"connection: close" in data, request
        assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"]
        client.hang_up()
    assert liar.backend.take_requests() == [] and "Traceback" not in liar.log()
    assert "a" in liar.loaded()  # nothing was obeyed


ABC_IN_CHUNKS = b"3 ;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n"


def test_unusual_requests_are_understood(liar):
    start = "/upstream/a/x HTTP/1"
    requests = {
        f"POST {start}.1\nHost: localhost\nContent-Length: 000003": b"abc",
        f"POST {start}.1\nHost: localhost\nTRANSFER-ENCODING: Chunked": ABC_IN_CHUNKS,
        f"POST {start}.0\nContent-Length: 3": b"abc",
        f"GET {start}.1\nHost: localhost\nContent-Length: 3": b"abc",
        f"DELETE {start}.1\nHost: LOCALHOST": b"",
        f"PROPFIND {start}.1\nHost: localhost\nX-A:\t b \t": b"",
    }
    liar.backend.take_requests()
    for text, body in requests.items():
        data, _ = raw(liar, http(f"{text}\nConnection: close", body))
        assert data.startswith(b"HTTP/1.1 200 "), text
        (request,) = liar.backend.take_requests()
        assert request.start[:2] == (text.split()[0], "/x")
        assert request.body == (b"abc" if body else b"")
    data, _ = raw(liar, http(f"OPTIONS {start}.1\nHost: localhost\nConnection: close"))
    assert data.startswith(b"HTTP/1.1 204 ")


def answer_of(liar, answer):
    """The answer that a client gets when the backend sends these bytes."""
    target = f"/{random.randrange(10**12)}?autoload=true"
    liar.backend.wishes[target] = answer
    return liar.get(f"/upstream/a{target}")


OK = b"HTTP/1.1 200 OK\r\n"
RUBBISH = [
    b"\0\1\2\3", b"220 smtp.example ESMTP\r\n\r\n", b"HTTP/2.0 200 OK\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 200, b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n",
    b"HTTP/1.1 200 \x1b[2JOK\r\n\r\n", b"HTTP/1.1 600 No\r\n\r\n",
    OK + b"Content-Length: 1, 1\r\n\r\nx", OK + b"X : a\r\n\r\n", OK + b"X: y\r\n",
    OK + b"X: " + b"x" * 70000 + b"\r\n\r\n", OK + b"X: y\r\n" * 101 + b"\r\n",
]


def test_rubbish_from_a_backend_is_a_502_with_the_reason(liar):
    for answer in RUBBISH:
        got = answer_of(liar, answer)
        assert got.status == 502, answer
        assert got.json()["error"]["code"] == "backend_died"
        assert "the backend gave no answer: " in got.message()
        assert liar.get("/health").status == 200 and "Traceback" not in liar.log()


CHUNKED_ANSWER = OK + b"Transfer-Encoding: Chunked\r\n\r\n"
VALID_ANSWERS = [  # of a backend; status and body that the client gets
    (b"HTTP/1.0 200 OK\r\n\r\nabc", 200, b"abc"),
    (b"\r\n" + OK + b"Content-Length: 3\r\n\r\nabcdef", 200, b"abc"),
    (CHUNKED_ANSWER + ABC_IN_CHUNKS, 200, b"abc"),
    (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, b""),
    (b"HTTP/1.1 418 \xe4\r\nContent-Length: 0\r\n\r\n", 418, b""),
]


def test_answers_that_are_valid_pass_and_bad_chunks_break_them(liar):
    for answer, status, body in VALID_ANSWERS:
        got = answer_of(liar, answer)
        assert (got.status, got.body) == (status, body), answer
    for chunks in BAD_CHUNKS:
        with pytest.raises(BrokenAnswer):
            answer_of(liar, CHUNKED_ANSWER + chunks)


CODINGS = [
    ("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress),
]
BAD_CODINGS = [
    ("br", b"x", 415, "'br'"),
    ("gzip, gzip", b"x", 415, "gzip"),
    ("gzip", gzip.compress(b"{}")[:-9], 400, "too early"),
    ("gzip", b"{}", 400, "content coding"),
    ("gzip", gzip.compress(bytes(17 << 20)), 413, "max-body"),
]


def test_encoded_bodies_are_decoded_or_refused(liar):
    data = b'{"model": "a", "messages": ["%b"]}' % (b"x" * 100_000)
    liar.backend.take_requests()
    for path, (coding, encode) in itertools.product((CHAT, "/upstream/a/x"), CODINGS):
        liar.post(path, encode(data), {"Content-Encoding": coding})
        (request,) = liar.backend.take_requests()
        assert request.body == data
        assert not request.all("content-encoding")
    for coding, body, status, word in BAD_CODINGS:
        answer = liar.post(CHAT, body, {"Content-Encoding": coding})
        assert answer.status == status and word in answer.message()
        assert not liar.backend.take_requests()


PATHS = {  # the path asked for: the one that the backend gets; b is below /own
    "/upstream/b/x/.y/.": "/own/x/.y/.",
    "/upstream/b/x?a=/../..": "/own/x?a=/../..",
    "/upstream/b/?": "/own/?",
    "/upstream/b///x": "/own///x",
    "/upstream/b/%00%0d%0a%25": "/own/%00%0d%0a%25",
    f"/upstream/{'a/' * 30000}": f"/{'a/' * 29999}",
}
BAD_PATHS = {
    400: "../x x/.. x/%2e%2E/y x/.%2e/y ..%2fx x\\..\\y x/..%5cy x/..;/y",  # below b
    404: "/upstream/ /upstream// /upstream/../a/x /upstream/%2e%2e/health "
    "/upstream/a%2f..%2f..%2fhealth /upstream/a%00/x /upstream/%ff%fe/x //upstream/a/x "
    "/upstream/a%0d%0aSet-Cookie:%20x=y/x /UPSTREAM/a/x /./unload /%75nload "
    f"/upstream/{'%61' * 20000}/",
}


def test_no_path_leads_to_another_place(liar):
    assert liar.get("/upstream/b/").status == 200  # loads it
    liar.backend.take_requests()
    asked = [(path, 200, [target]) for path, target in PATHS.items()]
    asked += [(f"/upstream/b/{each}", 400, []) for each in BAD_PATHS[400].split()]
    asked += [(each, 404, []) for each in BAD_PATHS[404].split()]
    for path, status, targets in [*asked, ("*", 400, [])]:
        used = cpu_seconds(liar.pid)
        answer = liar.get(path)
        assert answer.status == status and "set-cookie" not in answer.headers, path
        assert cpu_seconds(liar.pid) < used + 0.5
        assert [each.start[1] for each in liar.backend.take_requests()] == targets, path
    assert "a" in liar.loaded()  # nothing was unloaded


# ---- the slow and the many


def quickest(swap, count=20):
    """Seconds that the quicker half of some requests took at most."""
    with swap.connect() as client:
        times = []
        for _ in range(count):
            began = time.monotonic()
            assert client.ask("GET", "/upstream/a/stats").status == 200
            times.append(time.monotonic() - began)
    return statistics.median(times)


def given_back(swap, before):
    """Whether threads and descriptors are as before, idle connections aside."""
    now, allowance = soak_size(swap.pid), llmswap.IDLE_CONNECTIONS + 4
    threads = before["threads"] + 2  # llmswap may have begun to serve before these
    descriptors = before["descriptors"] + allowance
    return now["descriptors"] <= descriptors and now["threads"] <= threads


def crowd(swap, count, data):
    """So many connections on which these bytes were sent."""
    clients = [swap.connect() for _ in range(count)]
    for client in clients:
        client.sock.sendall(data)
    return clients


HALF = "POST /v1/x HTTP/1.1\nHost: localhost\nContent-Length: 9000"
UNREAD = http("GET /upstream/a/bytes?n=99000000 HTTP/1.1\nHost: localhost")
CROWDS = (
    (500, b""),
    (150, b"GET /health HTTP/1.1\r\nHost:"),
    (150, http(HALF, b'{"model":"a",')),
    (20, UNREAD),
)


def test_many_slow_clients_delay_no_other_and_leave_nothing():
    with hasty(MODELS, HEAD_SECONDS=90.0) as swap:
        swap.chat("a")
        before, alone = soak_size(swap.pid), quickest(swap)
        threads = before["threads"] + 5
        for count, data in CROWDS:
            clients = crowd(swap, count, data)
            both = 2 * count if data == UNREAD else count
            eventually(lambda: soak_size(swap.pid)["descriptors"] > both)
            assert soak_size(swap.pid)["threads"] <= threads + count
            eventually(lambda: quickest(swap) < 3 * alone + 0.03, 40)
            for client in clients:
                client.hang_up(reset=True)
            eventually(lambda: given_back(swap, before), 30)
            eventually(lambda: swap.stats("a")["in_flight"] == 0)
        assert b'status="500"' not in swap.get("/metrics").body  # for a reset


def test_five_hundred_at_once_are_all_answered(swap):
    swap.chat("a")
    before = soak_size(swap.pid)
    clients = crowd(swap, 500, chat_text("a", delay=0.3))
    assert [client.answer().status for client in clients] == [200] * 500
    for client in clients:
        client.hang_up()
    eventually(lambda: given_back(swap, before), 30)


def test_a_client_that_never_reads_its_stream_is_given_up():
    with hasty(MODELS, STALL_SECONDS=0.3) as swap:
        swap.chat("a")
        (client,) = crowd(swap, 1, UNREAD)
        eventually(lambda: cancelled(swap, "a") == 1)
        client.hang_up()


def with_few_descriptors(swap, option, count):
    """The same llmswap, under a limit of descriptors: the soft one (-S) or both."""
    swap._args[:0] = ["sh", "-c", f'ulimit {option}n {count}; exec "$@"', "sh"]
    return swap


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_all_addresses_of_both_kinds_may_be_listened_on_at_one_port():
    port = free_port()
    with llmswap.open_listener(("0.0.0.0", port)):
        llmswap.open_listener(("::", port)).close()


def test_a_soft_limit_of_descriptors_is_raised_for_us_and_kept_for_models():
    with with_few_descriptors(hasty(MODELS), "-S", 64) as swap:
        swap.chat("a")
        clients = crowd(swap, 50, b"")
        pid = swap.stats("a")["pid"]
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == 64
        soft, hard = resource.prlimit(swap.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard % 2**63, llmswap.MAX_DESCRIPTORS) > 64
        for client in clients:
            client.hang_up()


def test_beyond_the_limit_of_connections_there_is_a_clear_503():
    with with_few_descriptors(hasty(MODELS, LINGER_SECONDS=3.0), "-", 128) as swap:
        clients = crowd(swap, 1, chat_text("a"))  # an ended one might still count
        assert clients[0].answer().status == 200
        before = soak_size(swap.pid)
        clients += crowd(swap, 63, b"")
        for _ in range(3):
            with swap.connect() as client:
                answer = client.ask("POST", "/v1/x", "x" * 15_000)
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert answer.headers["server"] == llmswap.SERVER_HEADER[1]
            assert "64 connections are open already" in answer.message()
        more = crowd(swap, 200, b"GET / HTTP/1.1\r\n")
        refused = [client.answer().status for client in more]
        assert refused == [503] * 200
        assert soak_size(swap.pid)["descriptors"] < 128
        for client in [*clients, *more]:
            client.hang_up()
        eventually(lambda: given_back(swap, before), 30)
        assert swap.chat("a").status == 200


def test_without_descriptors_nothing_spins_and_all_is_well_afterwards():
    with hasty(MODELS, MAX_DESCRIPTORS=10**6) as swap:
        swap.chat("a")
        used = max(map(int, os.listdir(f"/proc/{swap.pid}/fd")))
        limits = resource.prlimit(swap.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(swap.pid, resource.RLIMIT_NOFILE, (used + 8, limits[1]))
        clients, began = crowd(swap, 40, b""), time.monotonic()
        eventually(lambda: "could not be accepted" in swap.log())
        busy = cpu_seconds(swap.pid)
        time.sleep(0.5)  # what is measured
        assert cpu_seconds(swap.pid) < busy + 0.1
        tries = swap.log().count("could not be accepted")
        assert tries <= time.monotonic() - began + 2  # one a second
        resource.prlimit(swap.pid, resource.RLIMIT_NOFILE, limits)
        for client in clients:
            client.hang_up()
        eventually(lambda: swap.chat("a").status == 200)


def test_a_second_of_fuzz_finds_nothing():
    pytest.importorskip("h11")
    assert load_tool("fuzz").fuzz_main("--parser 1000 --wire 400 --seed 1".split()) == 0


# ==================================================================================
# 7  Repair
# ==================================================================================

# What a model wrote ⇒ what it meant; ␤ ␍ ␉ as they look, ❞ for three quotes.
MEANT = (CI / "meant.txt").read_text()

# Texts that mean no object, or several; ¦ stands between them
LEFT_ALONE = r"""¦   ¦hello¦"¦}{¦[1, 2¦key: value¦{"hello"}¦{"a": {1, 2}}¦{return "a": 1}
¦{"a": [1, 2, "b": 3}¦{"a": 1}{"b": 2}¦{"a":1,}{"a":2,}¦[{"a": 1}, {"b": 2}
¦[1, {"a": 1}¦{{name}}¦The set {x} is open¦body { color: red; }"""

VALID = [
    *("{}", ' {"a" : 1.50,\n"b":[ ]} ', '"{\\"a\\": 1}"', '[{"a": 1}]'),
    *('{"a": "\\ud83d", "a": 1e999}', '{"a": "x\\", \\"b\\": 1}"}'),
    "[" * 300 + "]" * 300,
    "[" * 100_000 + "{}" + "]" * 100_000,
    *('{"a":' + opener * 500 for opener in ('{"a":', "{x:(")),  # too deep to repair
    '{"a": ' + "9" * 100_000 + "}",
]


def test_broken_arguments_become_the_object_that_is_meant_and_all_else_stays():
    signs = str.maketrans({"␤": "\n", "␍": "\r", "␉": "\t", "❞": '"' * 3})
    for row in MEANT.strip().split("\n"):
        text, meant = row.translate(signs).split(" ⇒ ")
        assert fake.parsed(repair_arguments(text)) == json.loads(meant), row
    many = '{"a":1 x}' * 99
    for text in [*re.split("\n?¦", LEFT_ALONE), many, *VALID]:
        assert repair_arguments(text) == text
        if text in VALID and text[0] == "{" and text[-1] == "}":
            assert repair_arguments(f"<tool_call>{text}</tool_call>") == text
    assert isinstance(json.loads(repair_arguments('{"a":' * 300)), dict)


PIECES = """hello|New York|x = 1|foo(bar, baz)|a: b|it's|if (x) { return y; }|d['k']
[1, 2]|a\\b|\\d+\\b|say "hi" now|print("x")|<a href="u">t</a>|naïve 统一|😀|`ls`|"
http://x.y/z?a=1#b|// no comment|# heading|/* c */|a, b, c||{|}|},|null|True|...
{"k": "v"}|["a", "b"]|key: value, other: thing|```py|<tool>|--flag="v w"|C:\\dir\\n"""
REPAIR_NAMES = "path content old_str new_str cmd n file-path max_tokens a b2".split()


def random_value(rng, depth=0):
    kind = rng.random()
    if kind < 0.55 or depth > 3:
        return rng.choice(" \n").join(rng.choices(PIECES.split("|"), k=2))
    if kind < 0.75:
        return rng.choice([True, False, None, 0, 1, -5, 3.5, 1e10, 123456])
    if kind < 0.88:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return random_object(rng, depth + 1)


def random_object(rng, depth=0):
    names = rng.sample(REPAIR_NAMES, rng.randrange(1, 5))
    return {name: random_value(rng, depth) for name in names}


def compact(value):
    return json.dumps(value, ensure_ascii=False)


def indented(value):
    return json.dumps(value, indent=2)


DAMAGE = {
    "cut brackets": lambda value: compact(value)[:-1],
    "python": repr,
    "trailing comma": lambda value: indented(value)[:-2] + ",\n}",
    "raw newlines": lambda value: re.sub(
        r"\\(.)", lambda m: "\n" if m[1] == "n" else m[0], compact(value)
    ),
    "fence": lambda value: f"```json\n{indented(value)}\n```",
    "prose": lambda value: f"Sure, here it is:\n{compact(value)}\n\nHope it helps.",
    "tags": lambda value: f"<tool_call>\n{compact(value)}\n</tool_call>",
    "too many brackets": lambda value: compact(value) + "]}",
    "special token": lambda value: compact(value) + "<|im_end|>",
    "twice": lambda value: compact(value) + compact(value),
    "encoded": lambda value: json.dumps(compact(value))[:-1],
    "encoded, no quotes": lambda value: json.dumps(compact(value))[1:-1],
    "no opening brace": lambda value: compact(value)[1:],
    "bare keys": lambda value: re.sub(
        r'^(\s*)"(\w+)":', r"\1\2:", indented(value), flags=re.M
    ),
    "no commas": lambda value: re.sub(r'(?<=["}\]\de]),\n', "\n", indented(value)),
    "comments": lambda value: indented(value).replace(",\n", ", // it's here\n"),
    "no colon": lambda value: re.sub(r'^(\{"[\w-]+"):', r"\1", compact(value)) + ",",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_typical_damage_to_any_object_is_undone(damage):
    rng = random.Random(damage)
    for _ in range(150):
        value = random_object(rng)
        text = DAMAGE[damage](value)
        assert json.loads(repair_arguments(text)) == value, text


def test_anything_is_an_object_or_unchanged_and_nothing_raises():
    rng = random.Random(7)
    alphabet = "{}[]()\"'`,:;\\/*#=.+-09aeu \n\tx<|“”‘’…\ud800\0" + "\"{}':,"
    for _ in range(4000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        mended = repair_arguments(text)
        assert mended == text or isinstance(json.loads(mended), dict)
    text = compact({"a": ['say "x"', {"b": [1.5e3, None]}, "ü\\"], "c": {"d": ""}})
    for end in range(1, len(text)):  # every cut is an object
        assert isinstance(json.loads(repair_arguments(text[:end])), dict)


HOSTILE = [
    *("[", "{", '{"a":', '{"a":"}', '"', "\\", '\\"', '","', "1,", '"//', '"/*', '"}'),
    *('"]//"\n', '"k":"v" ', "][", "{}", '{"a":1,}', "{x ", "\n", "“", '"+', ' \n"'),
    *("`", '"""', "(", "x:", "<|", "&quot;", '{"', '("', "\\ud83d", ": ", "…"),
    *('"x"+', "'}", "1_", "00", "\n, ", "/* */", ",'", "}, \"k\": 1", "=>", "\\'"),
    '",' + "#" * 99,
]
STARTS = ["", '{"a": ', '{"a": x', "{'a': '", '{"a": {"b": ["']


@pytest.mark.parametrize("start", STARTS)
def test_time_is_linear_whatever_comes(start):
    def seconds(length):
        text = start + unit * (length // len(unit))
        return seconds_of(lambda: repair_arguments(text), tries=1)

    for unit in HOSTILE:
        ratios = (seconds(6000) / max(seconds(1500), 0.0006) for _ in range(5))
        assert any(ratio < 6 for ratio in ratios), unit  # 4 if linear


# The streams. `chunk` makes OpenAI's events, `call` the delta of a tool call.

GOOD = '{"a": "x", "b": [1, 2]}'
BAD = "{'a': 'x', b: [1, 2,]"


def chunk(delta, finish=None, index=0):
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c", "model": "m", "choices": [choice]}


def call(arguments, index=0, **more):
    function = {"arguments": arguments}
    if "id" in more:
        function["name"] = "f"
    return {"tool_calls": [{"index": index, **more, "function": function}]}


def fragments(text):
    return [text[at : at + 3] for at in range(0, len(text), 3)]


def one_call(arguments, finish="tool_calls"):
    return [
        chunk({"role": "assistant", "content": "Let me see"}),
        chunk(call("", id="1", type="function")),
        *(chunk(call(part)) for part in fragments(arguments)),
        *([chunk({}, finish)] if finish else []),
    ]


def message(arguments, reason="tool_use", *after):
    tool = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    delta = {"type": "content_block_delta", "index": 1}
    parts = ["", *fragments(arguments)]
    deltas = [{"type": "input_json_delta", "partial_json": part} for part in parts]
    return [
        {"type": "message_start", "message": {"content": []}},
        {"type": "content_block_start", "index": 1, "content_block": tool},
        *({**delta, "delta": each} for each in deltas),
        {"type": "content_block_stop", "index": 1},
        *after,
        {"type": "message_delta", "delta": {"stop_reason": reason}},
        {"type": "message_stop"},
    ]


def events(payloads, done="[DONE]", eol="\n"):
    lines = []
    for payload in payloads:
        lines += [f"event: {payload['type']}"] if "type" in payload else []
        lines += [f"data: {json.dumps(payload)}", ""]
    lines += [f"data: {done}", ""] if done else []
    return "".join(line + eol for line in lines).encode()


def test_the_time_of_a_call_in_many_fragments_is_linear():
    def seconds(count):
        stream = events([chunk(call(part)) for part in ['{"a": "', *"x" * count]])
        return seconds_of(lambda: through(stream, *range(0, len(stream), 999)), tries=1)

    ratios = (seconds(6400) / max(seconds(1600), 0.001) for _ in range(5))
    assert any(ratio < 8 for ratio in ratios)  # 4 if linear


def through(stream, *cuts):
    repair = RepairStream()
    marks = [0, *sorted(cuts), len(stream)]
    out = [repair.feed(stream[a:b]) for a, b in zip(marks, marks[1:])]
    return b"".join(out) + repair.finish()


def arguments_in(stream):
    """The arguments that a client puts together, by choice and tool, or by block."""
    calls = collections.defaultdict(str)
    for data in re.findall("^data:(.*[}])", stream.decode(), re.MULTILINE):
        payload = json.loads(data)
        for choice in payload.get("choices", ()):
            for tool in choice["delta"].get("tool_calls", ()):
                key = choice["index"], tool["index"]
                calls[key] += tool["function"].get("arguments", "")
        if "partial_json" in payload.get("delta", ()):
            calls[payload["index"]] += payload["delta"]["partial_json"]
    return calls


def is_repaired(text):
    return text != BAD and json.loads(text) == json.loads(GOOD)


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
def test_calls_in_a_stream_are_repaired_or_pass_however_it_is_cut(eol):
    rng = random.Random(1)
    for make, key in ((one_call, (0, 0)), (message, 1)):
        stream = events(make(GOOD), eol=eol)
        assert through(stream, *range(len(stream))) == stream
        for _ in range(30):
            assert through(stream, *rng.choices(range(len(stream)), k=5)) == stream
        stream = events(make(BAD), eol=eol)
        out = through(stream)
        assert is_repaired(arguments_in(out)[key])
        assert through(stream, *range(len(stream))) == out
        assert out.count(eol.encode()) == stream.count(eol.encode())


BOTH = {"tool_calls": call(BAD, 0)["tool_calls"] + call(GOOD, 1)["tool_calls"]}
NEXT_BLOCK = {"type": "content_block_start", "index": 2, "content_block": {}}

# What a stream holds: which of its calls are repaired, and which stay as they are.
STREAMS = {
    "no reason but [DONE]": (one_call(BAD, None), "repaired"),
    "max_tokens": (message(BAD, "max_tokens"), "kept"),
    "error": ([*one_call(BAD, None), {"error": {"message": "x"}}], "kept"),
    "error of Anthropic": ([*message(BAD)[:-4], {"error": {"message": "x"}}], "kept"),
    "a later block": (message(BAD, "max_tokens", NEXT_BLOCK), "repaired"),
    "the last call begun": (
        [*one_call(BAD, None), chunk(call("", 1, id="2")), chunk({}, "length")],
        "repaired",
    ),
    "by turns, the first cut": (
        [chunk(call(BAD[:6])), chunk(call(BAD, 1)), chunk(call(BAD[6:]), "length")],
        "kept repaired",
    ),
    "one chunk with its end": ([chunk(BOTH, "stop")], "repaired kept"),
    "one chunk, cut": ([chunk(call(BAD, id="1"), "length")], "kept"),
    "each choice by itself": (
        [chunk(call(BAD), reason, i) for i, reason in enumerate(("stop", "length"))],
        "repaired kept",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_calls_in_a_stream_are_repaired_unless_they_were_cut_off(case):
    payloads, expected = STREAMS[case]
    stream = events(payloads)
    calls = [text for text in arguments_in(through(stream)).values() if text]
    are_kept = [text == GOOD or BAD.startswith(text) for text in calls]
    assert [("repaired", "kept")[each] for each in are_kept] == expected.split()
    assert all(each or is_repaired(text) for each, text in zip(are_kept, calls))
    assert "repaired" in expected or through(stream) == stream


def test_the_end_of_a_stream_needs_no_blank_line_but_has_to_come():
    stream = events(one_call(BAD), done=None).rstrip()
    assert is_repaired(arguments_in(through(stream))[0, 0])
    unfinished = events(one_call(BAD, None), done=None)
    for stream in (unfinished, unfinished[:-9]):
        assert through(stream) == stream


def test_text_names_and_comments_do_not_wait_for_arguments():
    repair = RepairStream()
    out = repair.feed(events([chunk(call(BAD, id="1"))], None))
    assert b'"name":"f"' in out and arguments_in(out) == {(0, 0): ""}
    for passing in (events([chunk({"content": "hi"})], None), b": still here\n\n"):
        assert repair.feed(passing) == passing
    assert is_repaired(arguments_in(repair.feed(events([chunk({}, "stop")])))[0, 0])


def test_a_changed_event_keeps_its_other_lines_and_members():
    event = b': hi\nid: 7\ndata:{"n":1.50, "choices" : [\ndata:{"delta":{"tool_calls":[{'
    event += b'"function":{"arguments": "{\'a\': 1"}}]}, "logprobs":[-0.10]}]}\n\n'
    lines = through(event + events([])).splitlines()
    assert lines[:2] == [b": hi", b"id: 7"] and len(lines) == 6
    payload = json.loads(lines[2][5:])
    [choice] = payload.pop("choices")
    assert payload == {"n": 1.5} and choice["logprobs"] == [-0.1]
    assert choice["delta"]["tool_calls"] == [{"function": {"arguments": '{"a":1}'}}]


def test_no_stream_is_too_strange():
    rng = random.Random(3)
    for _ in range(600):
        stream = bytearray(events(rng.choice([one_call(BAD), message(BAD)])))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(stream))
            end = at + rng.randrange(20)
            junk = [b"", b"\n", b"\n\n", b"null", b"[]", b"{}", b'"', b"\xff\0", b"1"]
            stream[at:end] = rng.choice(junk)
        stream = bytes(stream)
        assert through(stream, len(stream) // 3, len(stream) // 2) == through(stream)
        repair_body(stream)


# Answers that are no stream.


def completion(arguments, finish="tool_calls", content=None):
    function = {"name": "f", "arguments": arguments}
    answer = {"content": content, "tool_calls": [{"id": "1", "function": function}]}
    return {"choices": [{"message": answer, "finish_reason": finish}], "n": 1.0}


def anthropic(given, reason="tool_use"):
    use = {"type": "tool_use", "id": "1", "name": "f", "input": given}
    return {"content": [{"type": "text", "text": ""}, use], "stop_reason": reason}


def repaired(answer):
    """The answer after its repair."""
    return json.loads(repair_body(json.dumps(answer).encode()))


def test_a_completion_is_repaired_and_its_empty_content_becomes_null():
    for arguments, content, expected in (
        (BAD, "", None), (GOOD, "", None), (BAD, "Let me see", "Let me see"),
    ):
        body = json.dumps(completion(arguments, content=content), indent=2).encode()
        payload = json.loads(through(body))
        answer = payload["choices"][0]["message"]
        assert payload["n"] == 1.0 and answer["content"] == expected
        function = answer["tool_calls"][0]["function"]
        assert json.loads(function["arguments"]) == json.loads(GOOD)
    bare = {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
    assert repaired(bare) == bare
    for given in (BAD, GOOD):  # a string becomes the object in it
        answer = repaired(anthropic(given))
        assert answer["content"][1]["input"] == json.loads(GOOD)


def test_only_the_last_call_of_a_choice_that_was_cut_off_stays():
    body = completion(BAD)
    body["choices"] += completion(BAD, "length")["choices"]
    body["choices"][1]["message"]["tool_calls"] *= 2
    calls = [
        call["function"]["arguments"]
        for choice in repaired(body)["choices"]
        for call in choice["message"]["tool_calls"]
    ]
    assert [text == BAD for text in calls] == [False, False, True]


def test_a_body_that_needs_no_repair_stays_byte_for_byte():
    answers = [
        *(completion('{"a": "\u00e9"}'), completion(BAD, "length"), completion("none")),
        *(anthropic({}), anthropic([{"a": 1}, {"b": 2}]), anthropic(BAD, "max_tokens")),
        *(anthropic("none"), anthropic(None), {"choices": 1, "tool_calls": []}, None),
    ]
    texts = [json.dumps(each, indent=1, ensure_ascii=False) for each in answers]
    bodies = [*map(str.encode, texts), b"\xff", b'{"tool_calls":' + b"[" * 100_000]
    for body in bodies:
        assert repair_body(body) == body


# ----------------------------------------------------------------------------------
# From end to end

BROKEN_CALL = "{'path': 'a.py', 'lines': [1, 2,"
MEANT_CALL = {"path": "a.py", "lines": [1, 2]}
MESSAGES = "/v1/messages"
each_api = pytest.mark.parametrize("path", [CHAT, MESSAGES])


@pytest.fixture(scope="module")
def repairing():
    """llmswap with one fake model under two names, only one of which is repaired."""
    text = "[as-is]\ncmd = {}\n[mended]\nuses = as-is\njson-repair = on\n"
    with Llmswap(text.format(fake_command("--model", "x"))) as proxy:
        yield proxy


def calls_of(proxy, path, model="mended", **wish):
    """The arguments of each tool call in the answer as a client reads them, parsed if
    they are JSON."""
    body = {"model": model, **wish}
    if wish.get("stream"):
        with Stream(proxy.port, path, body) as stream:
            assert list(stream.events())
            calls = arguments_in(stream.raw).values()
    elif path == MESSAGES:
        content = proxy.post(path, body).json()["content"]
        calls = [part["input"] for part in content if "input" in part]
    else:
        message = proxy.post(path, body).json()["choices"][0]["message"]
        calls = [call["function"]["arguments"] for call in message["tool_calls"]]
    return [fake.parsed(each) if isinstance(each, str) else each for each in calls]


@each_api
def test_arguments_are_repaired_where_that_is_asked_for(repairing, path):
    for stream in (False, True):
        wish = dict(arguments=BROKEN_CALL, stream=stream)
        assert calls_of(repairing, path, **wish) == [MEANT_CALL]
        assert calls_of(repairing, path, "as-is", **wish) == [BROKEN_CALL]
        cut = dict(arguments=[BROKEN_CALL] * 2, finish="length", text="Let me see")
        cut_off = calls_of(repairing, path, stream=stream, **cut)
        assert cut_off == [MEANT_CALL, BROKEN_CALL]


def test_a_client_that_leaves_during_a_tool_call_is_noticed(repairing):
    before = cancelled(repairing, "as-is")
    wish = dict(arguments="x" * 100_000, interval=0.02)
    with repairing.stream("mended", **wish):
        eventually(lambda: repairing.stats("as-is")["in_flight"])
    eventually(lambda: repairing.stats("as-is")["cancelled"] == before + 1)


def test_what_needs_no_repair_passes_llmswap_byte_for_byte(repairing):
    broken, streamed = json.dumps(completion(BAD)).encode(), events(one_call(BAD))
    coded = "gzip\nContent-Encoding: gzip"  # it says so; encoded bodies are not read
    for kind, body, status in (
        ("application/json", json.dumps(completion(GOOD), indent=1).encode(), 200),
        ("text/event-stream", events(one_call(GOOD)), 200),
        ("application/json", broken, 500),
        (f"application/json; {coded}", broken, 200),
        (f"text/event-stream; {coded}", streamed, 200),
    ):
        head = f"HTTP/1.1 {status}\nContent-Type: {kind}\nContent-Length: {len(body)}"
        answer = repairing.post("/upstream/mended/raw", http(head, body))
        assert (answer.status, answer.body) == (status, body)
        assert (answer.headers.get("content-encoding") == "gzip") is (coded in kind)
    for method, body in (("GET", None), ("POST", {})):  # a POST's is read for its usage
        fields = {"Accept-Encoding": "gzip"}
        answer = repairing.ask(method, "/upstream/mended/echo", body, fields)
        assert ("accept-encoding" in echoed(answer)) == (method == "GET")


@each_api
def test_text_flows_while_the_arguments_are_held(repairing, path):
    wish = dict(text="Let me see", arguments=BROKEN_CALL, fragment=8, stall=4)
    body = {"model": "mended", "stream": True, **wish}
    with Stream(repairing.port, path, body) as stream:
        seen = ""
        for event in stream.events():  # after three fragments nothing comes any more
            seen += event
            if "Let me see" in seen and "tool0" in seen:
                break
        assert "path" not in seen


@each_api
@pytest.mark.parametrize("place", ["boundary", "mid-event", "mid-body"])
def test_a_repaired_stream_that_breaks_is_still_broken(repairing, path, place):
    wish = dict(arguments=BROKEN_CALL, cut=place, fragment=4, tokens=6)
    body = {"model": "mended", "stream": True, **wish}
    with Stream(repairing.port, path, body) as stream:
        with pytest.raises(BrokenAnswer):
            list(stream.events())
    assert b"[DONE]" not in stream.raw and b"message_stop" not in stream.raw
    came = arguments_in(stream.raw[: stream.raw.rfind(b"\n\n") + 2])
    assert BROKEN_CALL.startswith("".join(came.values()))  # never mended


def test_errors_tell_anthropics_clients_in_their_words(repairing):
    body = {"model": "as-is", "stream": True, "tokens": 4, "cut": "boundary"}
    with Stream(repairing.port, MESSAGES, body) as stream:
        with pytest.raises(BrokenAnswer):
            list(stream.events())
    assert b"event: error\ndata: {\"type\":\"error\",\"error\":{" in stream.raw
    answer = repairing.post(MESSAGES, {"model": "nobody"})
    assert answer.status == 404 and answer.json()["type"] == "error"
    assert answer.json()["error"]["code"] == "model_not_found"


# ==================================================================================
# Progress and the terminal: how far a load is, and what a person sees.
# ==================================================================================

def slow_model(folder, seconds=0.4, shards=1, half="/"):
    """The `cmd` of a server that maps a model of 80 MB for so long, then is ready; it
    waits halfway until the file `half` exists."""
    paths = [folder / f"model-{n:05}-of-{shards:05}.gguf" for n in range(1, shards + 1)]
    for path in paths:
        path.touch()
        os.truncate(path, 80 * 2**20 // shards)
    words = [*PYTHON, CI / "mapper.py", "--map-seconds", seconds]
    words += ["--read", ",".join(map(str, paths)), "--half", half]
    words += ["--then", fake_file()]
    words += ["--model", paths[0], "--port", "${PORT}"]
    return " ".join(map(str, words))


def watchful(text, *args):
    """llmswap that looks at loads, and tells of them, often."""
    often = {"LOOK_AT_LOADS": 0.04, "NOTICE_EVERY": 0.1, "LOAD_LINE_EVERY": 0.2}
    return hasty(text, *args, LONG_WAIT=0.3, **often)


def progress_events(server, model):
    """The progress that /models/sse tells while the model loads, then its end."""
    samples = []
    with Stream(server.port, "/models/sse") as stream:
        server.post("/models/load", {"model": model})
        for event in stream.documents():
            status = event["data"]
            if event["model"] == model and "progress" in status:
                assert event["event"] == "status_change"
                samples.append(status["progress"])
            elif event["model"] == model and status["status"] != "loading":
                return samples, status


def test_progress_is_read_from_the_memory_of_the_loading_processes_and_logged(tmp_path):
    half, line = tmp_path / "half", re.compile(r"a: loading, \d\d? % after \d+ s")
    command = slow_model(tmp_path, shards=3, half=half)
    command = f"""sh -c 'trap "" TERM; "$@"; exit' x {command} --stop-delay 0.3"""
    with watchful(f"[a]\ncmd = {command}\n") as server, ThreadPoolExecutor() as other:
        began = time.monotonic()
        events = other.submit(progress_events, server, "a")
        eventually(lambda: len(line.findall(server.log())) > 1)
        half.touch()
        samples, end = events.result()
        most = (time.monotonic() - began) / 0.04
        assert len(samples) <= most
        values = [status["value"] for status in samples]
        assert values == sorted(values) and values[-1] <= 0.99
        assert any(0.15 < value < 0.85 for value in values), values
        assert end == {"status": "loaded"}
        first = samples[0]
        assert (first["stages"], first["current"]) == (["text_model"], "text_model")
        server.post("/models/unload", {"model": "a"})
        eventually(lambda: re.search(r"a: unloaded after \d\.\d s", server.log()))
        assert "a: unloading (by hand)\n" in server.log()
        assert len(line.findall(server.log())) <= most / 5


def test_without_a_model_file_no_progress_is_guessed_and_the_end_is_told():
    text = "[a]\ncmd = FAKE --load 0.3\n[b]\ncmd = FAKE --load-exit 3\n"
    with watchful(text + "[c]\ncmd = FAKE --load-signal 9\n") as server:
        assert progress_events(server, "a") == ([], {"status": "loaded"})
        for model, code in (("b", 3), ("c", 1)):
            end = {"status": "unloaded", "exit_code": code}
            assert progress_events(server, model) == ([], end)
            status = server.get(f"/v1/models/{model}").json()["status"]
            assert (status["exit_code"], status["failed"]) == (code, True)


def test_a_chat_that_asked_for_it_reads_the_progress_as_reasoning(tmp_path):
    half = tmp_path / "half"
    command = slow_model(tmp_path, half=half)
    ini = f"[*]\nloading-notice = reasoning\n[a]\ncmd = {command}\n"
    with watchful(ini) as server, server.stream("a") as stream:
        chunks = []
        for chunk in stream.documents():
            chunks.append(chunk)
            if "%" in str(chunk):
                half.touch()
        notices = [chunk for chunk in chunks if "loading" in chunk["id"]]
        assert notices and chunks[: len(notices)] == notices  # before the backend's first
        for chunk in notices:
            (choice,) = chunk["choices"]
            assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == "a"
            assert choice["index"] == 0 and choice["finish_reason"] is None
            text = choice["delta"].pop("reasoning_content")
            assert re.fullmatch(r"waiting.*\n|loading a, (\d s|\d\d? %)\n", text)
            assert not choice["delta"]
        assert "%" in text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert stream.is_complete and b"data: [DONE]" in stream.raw


def test_other_requests_get_comments_instead():
    text = "[a]\ncmd = FAKE --load-until GATE\nloading-notice = reasoning\n"
    body = {**chat_body("a"), "stream": True, "prompt": "x", "max_tokens": 3}
    with watchful(text) as server:
        paths = "/v1/completions", MESSAGES
        streams = [Stream(server.port, path, body) for path in paths]
        server.gate.touch()  # now that they have heads
        for stream in streams:
            with stream:
                assert list(stream.events())
            assert stream.raw.startswith(b":\n\n") and b"reasoning" not in stream.raw


def test_notices_tell_of_the_room_and_a_failed_load_ends_them_with_an_error():
    flags, chunks = "--load-until GATE --load-exit 3", []
    text = "[*]\nloading-notice = reasoning\n[a]\ncmd = FAKE\n"
    with watchful(f"{text}[b]\ncmd = FAKE {flags}\n") as server:
        room = server.folder / "room"
        with server.stream("a", interval=str(room)), server.stream("b") as stream:
            for chunk in stream.documents():
                chunks.append(chunk)
                room.touch()  # which a makes, as it ends
                if "loading b" in str(chunk):
                    server.gate.touch()
        last = chunks.pop()
        statuses = lambda: {row["status"] for row in rows_of(server)}  # noqa: E731
        eventually(lambda: statuses() == {200, 502})  # though both heads said 200
    notices = [each["choices"][0]["delta"]["reasoning_content"] for each in chunks]
    assert notices[0] == "waiting for room for b\n"
    assert re.fullmatch(r"loading b, \d s\n", notices[-1])
    assert last["error"]["code"] == "model_start_failed" and stream.is_complete
    assert stream.status == 200 and "status 3" in last["error"]["message"]


@pytest.mark.parametrize("flags, meta", [
    (("--list-delay", 0), {"n_ctx": 256}), (("--list-delay", 60), {}),
    (("--meta", "[1]"), {}),
])
def test_the_meta_of_a_llama_server_is_shown_once_it_came(tmp_path, flags, meta):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    text = f"[llmswap]\nllama-server = {fake_binary(tmp_path, *flags)}\n"
    text += f"[a]\nmodel = {tmp_path}/x.gguf\nalias = b, c\n"
    with Llmswap(text, HEALTH_TIMEOUT=50.0) as server:
        began = time.monotonic()
        assert server.get("/v1/models/a").json()["meta"] == {}
        assert server.get("/upstream/a/").status == 200  # the list holds up nothing
        eventually(lambda: server.get("/v1/models/a").json()["meta"] == meta)
        entry = server.get("/v1/models/a").json()
        assert (entry["id"], entry["aliases"], entry["tags"]) == ("a", ["b", "c"], [])
        server.post("/models/unload", {"model": "a"})
        eventually(lambda: server.states()["a"] == "unloaded")
        assert server.get("/v1/models/a").json()["meta"] == meta
        assert time.monotonic() < began + 30


@pytest.mark.parametrize("is_journal", [False, True])
def test_log_lines_have_time_or_priority_and_no_control_characters(
    tmp_path, monkeypatch, is_journal
):
    path = tmp_path / "log"
    with path.open("w") as stderr:
        status = os.fstat(2)
        stream = f"{status.st_dev}:{status.st_ino}" if is_journal else "8:1"
        monkeypatch.setenv("JOURNAL_STREAM", stream)
        monkeypatch.setattr(sys, "stderr", stderr)
        log = llmswap.Log()
        log("debug", "no"), log("info", "x")
        log("error", "\x1b[1mone\n\ttwo\x07\u202e\ud800")
        log.close()  # which waits a second at most
        eventually(lambda: "two" in path.read_text())
    shown = re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", path.read_text())
    wanted = "<6>x\n<3>one\n<3>          two\\x07\\u202e\\ud800\n"
    assert shown == (wanted if is_journal else re.sub("(?m)^<.>", "", wanted))


def test_failures_are_logged_at_the_start_and_repeated_ones_in_one_line(tmp_path):
    text = "".join(f"[m{n}]\ncmd = no-such-server ${{PORT}}\n" for n in range(8))
    text += "[x]\ncmd = FAKE\nctx-siz = 3\n[y]\nmodel = /none.gguf\n"
    text += "[a]\ncmd = FAKE --load-exit 3\n"
    with Llmswap(text, env={"PATH": "/usr/bin:/bin"}) as server:
        missing = eventually(lambda: re.findall(".*no-such-server.*", server.log()))
        assert len(missing) == 1 and "m0, m1, m2, m3, m4, m5, m6, m7" in missing[0]
        eventually(lambda: re.search(r"x cannot be used: .*i:\d+: \[x\]", server.log()))
        remedy = eventually(lambda: re.search("(?m)^.* y could.*$", server.log()))[0]
        assert "'llama-server' on the PATH; `llama-server` in [llmswap]" in remedy
        server.chat("a")
        server.chat("a")
        server.post("/models/load", {"model": "a"})
        same = "a could not be started: exited with status 3"
        eventually(lambda: server.log().count(f"{same}, as before\n") == 2)
        assert server.log().count(f"{same}\n") == 1
        assert server.log().count("error loading model: unexpected end of file") == 1


CHECKED = (CI / "checked.ini").read_text()


def test_check_shows_each_command_as_it_can_be_pasted_and_each_error(tmp_path):
    binary = fake_binary(tmp_path)
    words = """--url http://x:${PORT}/v1 '' 'a  b' "it's" '$HOME `x` \\'"""
    path = tmp_path / "x.ini"
    path.write_text(CHECKED.format(folder=tmp_path, binary=binary, words=words))
    done = run_llmswap(path, "--check")
    *blocks, end = done.stdout.split("\n\n")
    shown = dict(block.split("\n  ", 1) for block in blocks)
    coder = "coder (one-alias, another-alias): llama-server"
    assert set(shown) == {
        coder, "shared: uses", "script: cmd", "service: unit", "far: remote",
        "typo: llama-server",
    }
    argv, missing = shown[coder].split("\n  ")
    model = llmswap.load_config(str(path)).models["coder"]
    assert shlex.split(argv) == model.command(llmswap.table_of(model), "${PORT}")
    assert missing.startswith("cannot start now: ") and "does not exist" in missing
    assert shown["shared: uses"] == "the backend of coder"
    assert shown["service: unit"] == "bge-m3.service at http://127.0.0.1:3004"
    assert shown["far: remote"] == "http://192.168.11.12:8080"
    assert shown["typo: llama-server"].startswith(f"error: {path}:21: [typo]")
    warnings = end.splitlines()
    assert f"the options of {binary} are unknown" in warnings[0]
    assert any(re.match(r"\S+x.ini:23: ", line) for line in warnings)
    assert warnings[-1] == "1 of 6 models cannot be used: typo"
    assert done.returncode == 2
    (tmp_path / "fine.ini").write_text("[a]\ncmd = no-such ${PORT}\n")
    fine = run_llmswap(tmp_path / "fine.ini", "--check")
    assert fine.returncode == 0 and fine.stdout.endswith("\n\nno errors\n")
    words = ["sh", "-c", shown["script: cmd"]]
    pasted = subprocess.run(words, env={"PORT": "81"}, stdout=subprocess.PIPE)
    assert pasted.stdout.decode().split("|")[:-1] == [
        str(tmp_path), "at 81; here", "--port", "81",
        "--url", "http://x:81/v1", "", "a  b", "it's", "$HOME `x` \\",
    ]


# ---- the recipes, each run as it stands but for paths and ports


def adapted(title, kind, *changes):
    """The recipe's block of that kind, with `changes`: (old text, new text)."""
    text = recipe(title, kind)[0]
    for old, new in changes:
        assert old in text, f"{old!r} is not in the recipe {title!r}"
        text = text.replace(old, str(new))
    return text


OTHER_MODEL = "[other]\ncmd = FAKE\nload-timeout = 9\n"


def run_recipe(title, folder, *changes, more=OTHER_MODEL, before="", **constants):
    """llmswap with `before`, the INI file of that recipe, and `more`. Its programs and
    models are those of the folder, in which missing model files are written.
    """
    text = before + adapted(title, "ini", *changes) + more
    text = text.replace("/models/", f"{folder}/")
    for path in map(Path, re.findall(r"/\S+\.gguf", text)):
        if not path.exists():
            path.write_bytes(b"GGUF")
    return Llmswap(text, env={"PATH": f"{folder}:{os.environ['PATH']}"}, **constants)


def alike(line):
    """The line without what differs from one run to the next."""
    line = re.sub(r"^\d\d:\d\d:\d\d ", "", line)
    return re.sub(r"in \d\.\d\d s \(pid \d+, port \d+\)", "in S s", line)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_first_screen_of_the_readme_shows_what_happens(tmp_path):
    readme, port = README.read_text(), free_port()
    start = re.search(r"\n {4}(python3 llmswap.py example.ini)\n", readme)[1]
    commands = re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n(.*\n)", readme, re.MULTILINE)
    terminal = re.search(r"terminal says.*?```\n(.*?)```", readme, re.DOTALL)[1]
    terminal = terminal.replace(":8080", f":{port}")
    shutil.copy(HERE.with_name("example.ini"), tmp_path)
    shutil.copy(llmswap_file(), tmp_path / "llmswap.py")  # Python knows bytecode
    (tmp_path / "python3").symlink_to(sys.executable)
    env, log = {"PATH": f"{tmp_path}:/usr/bin:/bin"}, tmp_path / "log"
    command = ["sh", "-c", f"exec {start} --listen 127.0.0.1:{port} 2>log"]
    with running(command, ("127.0.0.1", port), cwd=tmp_path, env=env):
        eventually(lambda: log.read_text().count("could not be") == 3)
        for line, output in commands:
            line = line.replace("localhost:8080", f"127.0.0.1:{port}")
            assert subprocess.check_output(["sh", "-c", line], text=True) == output
        shown = [line for line in terminal.splitlines() if line != "..."]
        eventually(lambda: log.read_text().count("\n") >= len(shown) + 3)
        lines = log.read_text().splitlines()
        rare = "could not be started|unloaded after"  # the second: if that was slow
        lines = [line for line in lines if not re.search(rare, line)]
        assert sorted(map(alike, lines)) == sorted(map(alike, shown))
        assert len(commands) == 2


def test_recipe_docker(tmp_path):
    state, hang = tmp_path / "state", "hang-timeout = 1200ms\n" + OTHER_MODEL
    words = f"{sys.executable} -IS {CI}/docker.py {state} {fake_file()}"
    executable(tmp_path / "docker", f'exec {words} "$@"')
    often = {"STALL_CHECK_AFTER": 0.1, "POLL_INTERVAL": 0.05}
    with run_recipe("Docker and Podman", tmp_path, more=hang, **often) as server:
        assert server.chat("boxed").status == 200
        [box] = state.iterdir()
        assert box.name == "llmswap-boxed"
        server.chat("other")  # evicts it
        assert not box.exists() and server.loaded() == ["other"]
        assert server.chat("boxed", hang=True, hang_health=True).status == 502
        eventually(lambda: "boxed hung" in server.log() and not box.exists())
        assert server.chat("boxed").status == 200
        server.reload(server.ini.read_text().replace("-ngl 99", "-ngl 99 --load 60"))
        eventually(lambda: "was read again" in server.log() and not box.exists())
        server.post("/models/load", {"model": "boxed"})
        eventually(box.exists)
        server.post("/models/unload", {"model": "boxed"})
        eventually(lambda: server.states()["boxed"] == "unloaded")
        assert not box.exists()
        server.post("/models/load", {"model": "boxed"})
        eventually(box.exists)
    assert not box.exists()  # at the end of llmswap


PODMAN = """\
export CONTAINERS_CONF={0}/conf
exec podman --root {0}/graph --runroot {0}/run --storage-driver vfs --runtime runc "$@"
"""


@pytest.fixture
def podman():
    """A folder with a `docker` that is Podman, with an image of the real llama-server
    under the name that the recipe has."""
    if not (LLAMA_SERVER and shutil.which("podman") and shutil.which("runc")):
        pytest.skip("needs podman, runc and LLAMA_SERVER")
    folder = tempfile.TemporaryDirectory(prefix="podman-")  # it wants a short path
    tmp_path = Path(folder.name)
    (tmp_path / "conf").write_text("[containers]\ndefault_ulimits = []\n")
    executable(tmp_path / "docker", PODMAN.format(tmp_path))
    needs = subprocess.check_output(["ldd", LLAMA_SERVER], text=True)
    libraries = " ".join(re.findall(r"/\S+", needs))
    [image] = re.findall(r"ghcr\.io\S+", adapted("Docker and Podman", "ini"))
    entry = "--change 'ENTRYPOINT [\"/app/llama-server\"]'"
    command = f"""mkdir -p image/app && cp {LLAMA_SERVER} image/app/llama-server &&
        cp --parents {libraries} image &&
        tar c -C image . | ./docker import -q {entry} - {image} &&
        ./docker run --rm {image} --version"""
    done = subprocess.run(command, shell=True, cwd=tmp_path, stderr=-1, text=True)
    if done.returncode:
        pytest.skip(f"podman cannot run here: {done.stderr}")
    yield tmp_path
    subprocess.run([tmp_path / "docker", "rm", "-fa", "-t0"], stdout=-3)
    folder.cleanup()


def test_recipe_docker_with_podman_and_a_real_llama_server(podman):
    gguf.write_model(podman / "qwen3-8b-q4_k_m.gguf")
    volume = "/models:/models", f"{podman}:{podman}"
    small = "-ngl", "-t 1 -c 256 -ngl"
    boxes = [podman / "docker", "ps", "-aq"]
    with run_recipe("Docker and Podman", podman, volume, small) as server:
        answer = server.post(CHAT, real_chat("boxed"))
        assert answer.status == 200, answer.body
        assert subprocess.check_output(boxes)
        server.chat("other")
        assert server.loaded() == ["other"] and not subprocess.check_output(boxes)


LARGE_MODELS = "".join(  # for a recipe that names none
    f"[{name}]\nmodel = /models/{name}.gguf\n" for name in ("coder", "thinker")
)


def test_recipe_a_small_model_that_stays(tmp_path):
    title = "A small model that stays while large ones swap"
    for path in ("bge-m3-q8_0.gguf", "coder.gguf", "thinker.gguf"):
        gguf.write_model(tmp_path / path)
    binary = LLAMA_SERVER or fake_binary(tmp_path)
    program = "[llmswap]", f"[llmswap]\nllama-server = {binary}"
    pooling = "[embed]", "[embed]\npooling = mean"  # as the real bge-m3 says of itself
    options = {"before": "[*]\nctx-size = 256\nthreads = 1\n", "more": LARGE_MODELS}
    with run_recipe(title, tmp_path, program, pooling, **options) as server:
        eventually(lambda: server.loaded() == ["embed"])
        for large in ("coder", "thinker"):
            assert server.post(CHAT, real_chat(large)).status == 200
            assert server.loaded() == sorted(["embed", large])
            answer = server.post("/v1/embeddings", {"model": "embed", "input": "x"})
            assert answer.json()["data"][0]["embedding"]
        eventually(lambda: server.log().count("unloading") == 1)
        assert server.log().count("embed: loading") == 1


def test_recipe_conversations_that_outlive_the_swap(tmp_path):
    title = "Conversations that outlive the swap"
    fake_binary(tmp_path)
    head = f"[llmswap]\nstate-dir = {tmp_path}/state\n"
    with run_recipe(title, tmp_path, before=head, more=LARGE_MODELS) as server:
        for prompt, cached in ((3122, 0), (3200, 3122)):
            answer = server.chat("coder", talk="x", prompt_tokens=prompt).json()
            usage = answer["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached
            assert server.chat("thinker").status == 200
        for line in recipe(title, "text")[0].splitlines():
            start = re.sub(r"\d+ M", "M", line[:-6])
            eventually(lambda: start in re.sub(r"\d+ M", "M", server.log()))


def test_recipe_agents_with_repaired_tool_calls(tmp_path):
    title = "Open WebUI, and agents with repaired tool calls"
    fake_binary(tmp_path)
    with run_recipe(title, tmp_path) as server:
        calls = calls_of(server, CHAT, "qwen3-coder", arguments=BROKEN_CALL)
        assert calls == [MEANT_CALL]


SITE = "daemon off; pid pid; error_log error.log; events {{ }} http {{ {} }}"


@pytest.mark.skipif(
    not all(map(shutil.which, ("nginx", "openssl"))), reason="needs nginx and openssl"
)
def test_recipe_behind_nginx_with_tls(tmp_path):
    title, name, conf = "Behind nginx", "models.home.example", tmp_path / "nginx.conf"
    certificate, key = load_tool("tls").write_certificate(tmp_path, f"DNS:{name}")
    allowed = re.search("`(allowed-hosts = [^`]*)`", section(title))[1]
    text = f"[llmswap]\n{allowed}\n[a]\ncmd = FAKE\n"
    with Llmswap(text) as server, contextlib.ExitStack() as stack:
        port = free_port()
        site = adapted(
            title, "nginx", ("listen 443", f"listen 127.0.0.1:{port}"),
            ("/etc/ssl/models.pem", certificate), ("/etc/ssl/models.key", key),
            ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
        )
        conf.write_text(SITE.format(f"access_log off;\n{site}\n"))
        command = ["nginx", "-p", tmp_path, "-e", "error.log", "-c", conf]
        nginx = stack.enter_context(subprocess.Popen(command))
        stack.callback(nginx.terminate)
        eventually(lambda: is_listening(port))
        client = stack.enter_context(Client(port))
        trust = ssl.create_default_context(cafile=certificate)
        client.sock = trust.wrap_socket(client.sock, server_hostname=name)
        body = chat_body("a", stream=True, interval=str(server.gate))
        client.send("POST", CHAT, body, {"Host": name})
        pieces = client.pieces(*client.head())
        next(pieces)  # which nginx does not hold back until the last one comes
        server.gate.touch()
        assert b"[DONE]" in b"".join(pieces)
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Host": name}
        client.send("GET", "/upstream/a/ws", None, upgrade)
        assert client.head()[0] == 101
        client.sock.sendall(b"to and fro")
        assert b"".join(client.exactly(10)) == b"to and fro"


def test_recipe_llmswap_in_a_container(tmp_path):
    image = recipe("Docker and Podman", "dockerfile")[0]
    copied = "COPY llmswap.py models.ini /opt/llmswap/\nWORKDIR /opt/llmswap\n"
    assert copied in image
    install_llmswap(tmp_path)
    (tmp_path / "models.ini").write_text(f"[a]\ncmd = {fake_command()}\n")
    (tmp_path / "python3").symlink_to(sys.executable)
    port = free_port()
    command = json.loads(re.search(r"ENTRYPOINT (.*)", image)[1].replace("8080", str(port)))
    path = re.search(r"PATH=(.*):\$PATH", image)[1].replace("/app", str(tmp_path))
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    with running(command, ("127.0.0.1", port), cwd=tmp_path, env=env):
        assert ask(port, "POST", CHAT, chat_body("a")).status == 200
    compose = recipe("Docker and Podman", "yaml")[0]
    grace = int(re.search(r"stop_grace_period: (\d+)s", compose)[1])
    assert grace > llmswap.DRAIN_SECONDS


def test_recipe_where_one_machine_is_not_enough(tmp_path):
    title = "Where one machine is not enough"
    executable(
        tmp_path / "vllm",
        'case "$*" in *"backend ray "*"parallel-size 2"*) ;; *) exit 1 ;; esac\n'
        f'exec {sys.executable} -I -S {fake_file()} "$@"',
    )
    other = "[llmswap]\napi-key = its-api-key\n[coder]\ncmd = FAKE --model coder\n"
    with Llmswap(other) as far:
        address = ("http://192.168.11.14:8080", f"http://127.0.0.1:{far.port}")
        with run_recipe(title, tmp_path, address) as server:
            assert server.post("/v1/x", {"model": "ray"}).status == 200
            assert server.chat("elsewhere").status == 200
    if LLAMA_SERVER:
        config = read(tmp_path, adapted(title, "ini"))
        argv = config.models["spread"].command(llmswap.options_of(LLAMA_SERVER), 1)
        workers = argv[argv.index("--rpc") + 1]
        assert workers == "192.168.11.12:50052,192.168.11.13:50052"


def test_recipe_cron(tmp_path):
    folder, port = tmp_path / "llmswap", free_port()
    folder.mkdir()
    shutil.copy(llmswap_file(), folder / "llmswap.py")  # Python knows bytecode
    (folder / "models.ini").write_text(f"[llmswap]\nlisten = 127.0.0.1:{port}\n")
    (tmp_path / "python3").symlink_to(sys.executable)
    lines = recipe("cron instead of systemd").replace("/opt/llmswap", str(folder))
    command = re.search(r"^\* \* \* \* \* +(.*)", lines, re.MULTILINE)[1]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SHELL": "/bin/sh", "HOME": "/root"}
    command = ["sh", "-c", f"exec {command}"]
    with running(command, ("127.0.0.1", port), env=env, cwd="/") as first:
        assert subprocess.run(command, env=env, cwd="/").returncode == 0
        assert first.poll() is None
        text = f"llmswap answers at http://127.0.0.1:{port}/ already\n"
        assert text in (folder / "log").read_text()


def test_recipe_sleeping_instead_of_stopping(tmp_path):
    fake_binary(tmp_path, "--sleepable", name="vllm")
    assert "--enable-sleep-mode" in adapted("Sleeping instead of stopping", "ini")
    with run_recipe("Sleeping instead of stopping", tmp_path) as server:
        first = server.stats("vllm")
        assert "VLLM_SERVER_DEV_MODE" in first["environ"]
        server.chat("other")
        assert server.states() == {"vllm": "sleeping", "other": "loaded"}
        assert server.chat("vllm").status == 200
        assert server.stats("vllm")["pid"] == first["pid"]


# ==================================================================================
# Pages: what people and Prometheus see.
# ==================================================================================

# ---- numbers in answers

OPENAI_END = events([
    {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None},
    {"choices": [], "usage": {
        "completion_tokens": 20, "prompt_tokens": 7, "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 3}}},
])
LLAMA_END = events([
    {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": {
        "cache_n": 236, "prompt_n": 1, "prompt_ms": 30.9, "predicted_n": 35,
        "predicted_ms": 661.1, "predicted_per_second": 52.94}},
])
MESSAGE_USAGE = {"input_tokens": 25, "cache_read_input_tokens": 0, "output_tokens": 1}
ANTHROPIC_START = events(
    [{"type": "message_start", "message": {"id": "a", "usage": MESSAGE_USAGE}}], None
)
LAST_USAGE = {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}
ANTHROPIC_END = events(
    [{"type": "message_delta", **LAST_USAGE}, {"type": "message_stop"}], None
)
JSON_END = b'"}}],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'
LLAMA_PLAIN = b',"tokens_predicted":4,"tokens_evaluated":9,"truncated":false}'


@pytest.mark.parametrize(
    "ends, reported",
    [
        (OPENAI_END, (7, 20, None)),
        (LLAMA_END, (237, 35, 52.94)),
        (JSON_END, (7, 3, None)),
        (LLAMA_PLAIN, (9, 4, None)),
        (ANTHROPIC_START + b"\0" + ANTHROPIC_END, (25, 15, None)),
        (ANTHROPIC_END, (None, 15, None)),
        (JSON_END[:-1] + b',"timings":{"predicted_per_second":1e2}}', (7, 3, 100.0)),
        (b'{"usage": {"prompt_tokens" : 7 , "completion_tokens":1', (7, None, None)),
        (b'{"content":"say {\\"prompt_tokens\\": 99, }"}', (None, None, None)),
        (bytes(range(256)) * 16, (None, None, None)),
        (b'{"prompt_tokens": 5, "completion_tokens": 1e999}', (5, None, None)),
        (b'{"prompt_tokens": 5, "completion_tokens": %b}' % (b"9" * 400), (5, None, None)),
    ],
)
def test_token_counts_are_read_from_the_ends_of_an_answer(ends, reported):
    assert llmswap.usage_in(ends)[:3] == reported


@pytest.mark.parametrize(
    "tokens, reported, seconds, speed",
    [(10, 50.0, 1.0, 50.0), (10, None, 2.0, 5.0), (10, None, 0.05, None),
     (2, 50.0, 1.0, 50.0), (1, 50.0, 1.0, None), (None, 50.0, 1.0, None)],
)
def test_a_speed_is_that_which_is_told_or_that_of_an_answer_that_took_a_while(
    tokens, reported, seconds, speed
):
    assert llmswap.speed_of(llmswap.Usage(None, tokens, reported), seconds) == speed


@pytest.mark.parametrize("end", [OPENAI_END, LLAMA_END, ANTHROPIC_END, JSON_END])
def test_a_tail_cut_anywhere_tells_the_truth_or_nothing(end):
    whole = llmswap.usage_in(end)
    for at in range(len(end)):
        for part in (end[at:], end[:at]):
            reported = llmswap.usage_in(part)
            assert reported.tokens_out in (None, whole.tokens_out)
            assert reported.tokens_in in (None, whole.tokens_in, 1)  # cache_n lost


@pytest.mark.parametrize("seed", range(10))
def test_the_ends_of_a_payload_are_kept_however_it_comes(seed):
    chance = random.Random(seed)
    reply, sent = llmswap.ClientResponse(SimpleNamespace(send=len), None, []), b""
    for _ in range(chance.randrange(1, 60)):
        piece = chance.randbytes(chance.choice([1, 3, 200, 4095, 4096, 70000]))
        reply.send(piece)
        sent += piece
    size = llmswap.EXCERPT_SIZE
    is_all = len(sent) <= 2 * size
    assert reply.excerpt == (sent if is_all else sent[:size] + b"\0" + sent[-size:])


# ---- Prometheus

LABEL = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"'
SAMPLE = re.compile(rf"([a-z_]+)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")


def metrics_of(text):
    """{(name, label, value, ...): number}, after a strict reading of the format."""
    assert text.endswith("\n") and "\n\n" not in text
    samples, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds, f"{name} comes twice"
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            name, labels, number = SAMPLE.fullmatch(line).groups()
            family = re.sub("_(bucket|sum|count)$", "", name)
            assert list(kinds)[-1] in (name, family), f"{line} is not with its family"
            pairs = re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', labels or "")
            key = (name, *sum(pairs, ()))
            assert key not in samples, f"{line} comes twice"
            samples[key] = float(number)
    for name, kind in kinds.items():
        assert name.endswith("_total") == (kind == "counter")
    return samples


def metrics_with(server, key, headers=()):
    """The metrics of llmswap, None as long as that key is missing."""
    samples = metrics_of(server.get("/metrics", headers).body.decode())
    return samples if key in samples else None


def counted(samples, name):
    """{values of the labels: number} of one metric."""
    return {key[2::2]: number for key, number in samples.items() if key[0] == name}


def test_metrics_are_well_formed_and_histograms_add_up():
    meters = llmswap.Metrics()
    for seconds in (0.005, 0.3, 600, 700):
        meters.observe("loads", "a", seconds)
    shared = llmswap.ModelStatus("a", state="loaded", rss=10, running=1)
    models = llmswap.ModelStatus('a"b\\c\nd\x07\x9be'), shared, shared._replace(
        id="b", shares="a")
    metrics = metrics_of(llmswap.metrics_text(models, meters, {}, 1750000000.0))
    assert metrics["process_start_time_seconds",] == 1750000000
    assert metrics["llmswap_requests_queued", "model", r"a\"b\\c\nd\\x07\\x9be"] == 0
    in_flight = counted(metrics, "llmswap_requests_in_flight")
    assert ("a",) in in_flight and ("b",) not in in_flight  # b shares with a
    name = "llmswap_load_duration_seconds"
    buckets = {key[4]: n for key, n in metrics.items() if key[0] == f"{name}_bucket"}
    assert list(buckets.values()) == sorted(buckets.values())
    bounds = {"0.005": 1, "0.25": 1, "0.5": 2, "600": 3, "+Inf": 4}  # inclusive
    assert {bound: buckets[bound] for bound in bounds} == bounds
    assert metrics[f"{name}_count", "model", "a"] == 4
    assert metrics[f"{name}_sum", "model", "a"] == pytest.approx(1300.305)


PAGE_MODELS = """
[llmswap]
models-max = 1
[a]
cmd = FAKE --load 0.6 --lines 40
[b]
cmd = FAKE
[bad]
cmd = FAKE --load-exit 3
"""


def test_requests_and_stops_are_counted_by_model_status_and_cause():
    text = PAGE_MODELS + "[idler]\ncmd = FAKE\nidle-timeout = 300ms\n"
    text += "[slow]\ncmd = FAKE --load 60\n"
    with Llmswap(text) as server:
        sent = encoded({"model": "a", "tokens": 20})
        got = server.post(CHAT, sent).body
        Stream(server.port, "/models/sse").close()  # is no failed request
        with server.stream("b", tokens=5) as stream:
            stream.text()
        cut = server.stream("b", tokens=5, cut="mid-event")
        with cut as stream, pytest.raises(BrokenAnswer):
            list(stream.events())
        server.post(CHAT, {"model": "bad"})
        server.post(CHAT, {"model": "nobody"})
        with Client(server.port) as client:
            client.send("POST", CHAT, {"model": "b", "delay": 60})
            eventually(lambda: server.get("/health").json()["requests"])
            resident = "llmswap_model_resident_memory_bytes", "model", "b"
            assert metrics_with(server, resident)[resident] > 2**20
        left = ("llmswap_requests_total", "model", "b", "status", "499")
        eventually(lambda: metrics_with(server, left))
        server.post("/unload")
        with server.connect() as client:
            client.send("POST", CHAT, chat_body("slow"))
            eventually(lambda: "loading" in server.states().values())
        assert server.chat("b").status == 200
        server.reload(text.replace("[b]\n", "[b]\nenv.X = 1\n"))
        eventually(lambda: server.loaded() == [])
        assert server.chat("idler").status == 200
        eventually(lambda: server.loaded() == [])
        last = ("llmswap_requests_total", "model", "idler", "status", "200")
        metrics = eventually(lambda: metrics_with(server, last))
    assert counted(metrics, "llmswap_requests_total") == {
        ("a", "200"): 1, ("b", "200"): 2, ("bad", "502"): 1, ("", "404"): 1,
        ("b", "499"): 1, ("b", "502"): 1, ("slow", "499"): 1, ("idler", "200"): 1,
    }
    assert counted(metrics, "llmswap_stops_total") == {
        ("a", "evicted"): 1, ("b", "evicted"): 1, ("b", "unload"): 1,
        ("slow", "abandoned"): 1, ("b", "reload"): 1, ("idler", "idle"): 1,
    }
    assert metrics["llmswap_swaps_total",] == 2  # to b, from a and from a load given up
    sizes = {"request_bytes": len(sent), "response_bytes": len(got)}
    totals = {**sizes, "prompt_tokens": 7, "completion_tokens": 20}
    for name, number in totals.items():
        assert metrics[f"llmswap_{name}_total", "model", "a"] == number
    assert metrics["llmswap_failures_total", "model", "bad", "state", "loading"] == 1
    assert metrics["llmswap_load_duration_seconds_sum", "model", "a"] > 0.6
    assert metrics["llmswap_request_wait_seconds_sum", "model", "a"] > 0.6
    assert metrics["process_resident_memory_bytes",] > 2**20


def test_resident_memory_is_that_of_the_whole_process_group():
    code = "import os, time; os.fork(); held = b'x' * 2**26; time.sleep(60)"
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    group = leader.pid
    try:
        eventually(lambda: llmswap.resident_by_group()[group] > 2 * 2**26)
    finally:
        os.killpg(group, signal.SIGKILL)
        leader.wait()
    eventually(lambda: not llmswap.resident_by_group()[group])


# ---- the page and its snapshots


def test_the_page_loads_nothing_from_outside_and_runs_its_own_script_alone():
    page, policy = llmswap.STATUS_PAGE, llmswap.PAGE_POLICY
    urls = re.findall(r"https?://[^'\"\s]*", page)
    assert set(urls) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"\s(src|on\w+|style)=|@import|url\(", page)
    words = "innerHTML outerHTML insertAdjacent document.write eval( setHTML"
    assert not [word for word in words.split() if word in page]
    assert "unsafe" not in policy and len(page) < 35000


EVENTS = {"Accept": "text/event-stream"}
LOCKED = PAGE_MODELS.replace("models-max", "api-key = secret\nmodels-max")
SECRET = {"x-api-key": "secret"}


def snapshots_of(server):
    """The stream that the page reads."""
    return Stream(server.port, "/", None, EVENTS)


def test_a_snapshot_comes_at_each_change_but_four_times_a_second_at_most():
    text = PAGE_MODELS.replace("--load 0.6", "--load-until GATE")
    with Llmswap(text) as server, snapshots_of(server) as stream:
        snapshots = stream.documents()
        assert [model["state"] for model in next(snapshots)["models"]] == ["unloaded"] * 3
        server.post("/models/load", {"model": "a"})
        until(snapshots, lambda models: models["a"]["state"] == "loading")
        server.gate.touch()
        models = until(snapshots, lambda models: models["a"]["state"] == "loaded")
        assert models["a"]["rss"] is None or models["a"]["rss"] > 0
        assert models["a"]["seconds"] < 2 and models["b"]["seconds"] is None
        server.post(CHAT, {"model": "b", "tokens": 20})
        models = until(snapshots, lambda models: models["b"]["tokens_per_second"])
        assert models["a"]["stopped"] == "evicted for b"
        eventually(lambda: "a: unloading (evicted for b)\n" in server.log())
        server.post(CHAT, {"model": "bad"})
        models = until(snapshots, lambda models: models["bad"]["failure"])
        assert "exited with status 3" in models["bad"]["failure"]
        assert models["bad"]["seconds"] < 2
        began, seen = time.monotonic(), []
        for _ in range(100):
            server.post(CHAT, {"model": "b", "tokens": 1, "interval": 0})
        server.post("/models/unload", {"model": "b"})
        counted = (snapshot for snapshot in snapshots if (seen.append(snapshot), True))
        until(counted, lambda models: models["b"]["stopped"] == "unloaded by hand")
        assert len(seen) <= 5 * (time.monotonic() - began + 1) + 2


def until(snapshots, condition):
    """The models of the first snapshot that meets the condition."""
    deadline = time.monotonic() + 10
    for snapshot in snapshots:
        models = {model["id"]: model for model in snapshot["models"]}
        if condition(models):
            return models
        assert time.monotonic() < deadline, models


# ---- the page in a browser

@pytest.fixture(scope="module")
def browser():
    if not chromium.CHROMIUM:
        pytest.skip("there is no Chromium")
    with chromium.Browser() as browser:
        yield browser


# an expression: whether the page has this width by now, and needs no more
FITS = "innerWidth === {0} && document.documentElement.scrollWidth <= {0}"


def row(name, selector=""):
    return f"document.querySelector('li[data-id=\"{name}\"] {selector}')"


def shown(selector, text):
    """An expression: whether what is shown there contains the text."""
    return f"{selector}?.innerText.includes({json.dumps(text)})"


STORY = PAGE_MODELS.replace("[bad]", """[long]
cmd = FAKE
set-params = {"tokens": 10000, "interval": 0.02}
[endless]
cmd = FAKE --load 60
[bad]""")


def test_a_model_is_loaded_asked_read_and_stopped_by_mouse(browser):
    with Llmswap(STORY.replace("--load 0.6", "--load-until GATE")) as server:
        browser.look(390, "dark")
        browser.open(server.url)
        browser.click(row("endless", "[data-do=load]"))
        browser.until(shown(row("endless", ".state"), "loading"))
        cancel = row("endless", "[data-do=unload]")
        browser.until(shown(cancel, "Cancel"))
        browser.click(cancel)
        browser.until(shown(row("endless", ".state"), "unloaded by hand"))
        server.post("/models/load", {"model": "a"})  # and the page shows it by itself
        browser.until(shown(row("a", ".state"), "loading"))
        server.gate.touch()
        browser.until(shown(row("a", ".state"), "loaded"))
        assert browser.value("document.title") == "a · llmswap"
        browser.click(row("a", "[data-do=log]"))
        browser.until(shown("$('lines')", "model loaded"))
        server.post("/unload")
        assert server.chat("a").status == 200
        browser.until("$('lines').innerText.split('model loaded').length === 3")
        assert browser.value("$('lines').scrollHeight > $('lines').clientHeight")
        below = "{const l = $('lines'); l.scrollHeight - l.clientHeight - l.scrollTop}"
        assert browser.value(below) < 2, "the end is not visible"
        browser.until("snapshot.requests === 4")  # it shows a as loaded again
        browser.click("$('log').querySelector('button')")
        browser.until("!$('log').open")
        assert browser.value("document.activeElement.ariaLabel") == "Log a"
        ask_by_mouse(browser, "long")
        browser.until(shown("$('reply')", "word9"))
        browser.click("$('send')")  # its label is Stop now
        browser.until(shown("$('stats')", "stopped"))
        assert browser.value("$('send').innerText") == "Send"
        eventually(lambda: server.get("/health").json()["requests"] == 0)
        browser.press("Escape")
        assert browser.complaints == []
        ask_by_mouse(browser, "bad")
        browser.until(shown("$('error')", "exited with status 3"))
        browser.until(shown(row("bad", ".why"), "exited with status 3"))
        browser.until(shown(row("long", ".state"), "evicted for bad"))
        assert browser.value("$('live-region').textContent") == "bad failed"
        server.reload("")
        browser.until(shown("document.querySelector('main')", "No models yet"))
        assert browser.value("$('search').hidden")
        assert all("502" in text for text in browser.complaints)
        server.process.terminate()
        server.process.wait(20)
        browser.until(shown("$('connection')", "reconnecting"))
        server.start()
        browser.until(shown("$('connection')", "live"))


def ask_by_mouse(browser, model):
    browser.click(row(model, "[data-do=prompt]"))
    browser.value("$('text').value = ''")
    browser.type("hello")
    browser.click("$('send')")


def test_a_model_is_loaded_asked_read_and_stopped_by_keyboard_with_a_key(browser):
    with Llmswap(LOCKED.replace("secret", "Schlüssel")) as server:
        browser.look(1280, "light")
        browser.open(server.url)
        for given in ("ключ", "Schlüssel"):
            browser.until("document.querySelector('#key-dialog')?.open")
            browser.type(given)
            browser.press("Enter")
            refused = "$('key-text').innerText.includes('not accepted')"
            browser.until(f"!$('key-dialog').open || {refused}")
        browser.until(shown(row("a"), "Load"))
        browser.complaints.clear()
        browser.tab_to("Load a")
        browser.press("Enter")
        browser.until(shown(row("a", ".state"), "loaded"))
        focused = "document.activeElement.closest('li')?.dataset.id"
        assert browser.value(focused) == "a", "the focus did not move along"
        assert browser.value("document.activeElement.innerText") == "Unload"
        browser.press(" ")
        browser.until(shown(row("a", ".state"), "unloaded by hand"))
        browser.tab_to("Prompt b")
        browser.press("Enter")
        browser.type("hello")
        browser.press("Enter")
        browser.until(shown("$('reply')", "word1"))
        browser.press("Escape")
        browser.until(shown(row("b", ".state"), "loaded"))  # snapshots come after answers
        browser.until(shown("$('recent')", "browser"))  # asked for with the key, too
        browser.tab_to("Log b")
        browser.press("Enter")
        browser.until(shown("$('lines')", "model loaded"))
        browser.press("Escape")
        assert browser.value("document.activeElement.ariaLabel") == "Log b"
        browser.open(server.url)  # the key is asked for once
        browser.until(shown(row("b", ".state"), "loaded"))
        assert not browser.value("document.querySelector('#key-dialog').open")
        assert browser.complaints == []


REQUEST = "document.querySelector('.request[data-id=\"{}\"] {}')"


def test_requests_are_seen_opened_filtered_and_cancelled_by_keyboard(browser):
    agent = {"User-Agent": "<b>agent</b>/1.0", "X-Session-Id": "s1"}
    with Llmswap(STORY) as server, server.connect() as client:
        for prompt in (11900, 12400):
            body = chat_body("a", talk=1, prompt_tokens=prompt, tokens=380)
            assert server.post(CHAT, body, agent).status == 200
        assert server.chat("nobody").status == 404
        browser.look(390, "light")
        browser.open(server.url)
        done, refused = (REQUEST.format(number, "") for number in (2, 3))
        browser.until(shown(refused, "404 there is no model 'nobody'"))
        assert browser.value(shown(refused, "nobody"))
        browser.until(shown(done, "12.4k in (11.9k cached), 380 out, 50 tok/s"))
        assert browser.value(shown(done, "<b>agent<"))  # a text, whatever it is
        client.send("POST", CHAT, chat_body("long", stream=True), agent)
        running = REQUEST.format(4, "button")
        browser.until(f"{running}?.checkVisibility()")
        browser.tab_to("Cancel request 4 of long")
        browser.until(shown(REQUEST.format(4, ""), "first byte"))
        browser.press("Enter")
        browser.until(shown(REQUEST.format(4, ""), "499"))
        assert browser.value("document.activeElement.closest('.request').dataset.id") == "4"
        assert not browser.value(f"{running}.checkVisibility()")
        browser.press("Enter")  # the focus is on the row now, which opens
        facts = REQUEST.format(4, "dl")
        for text in ("s1", "POST /v1/chat/completions", "cancelled by hand"):
            browser.until(shown(facts, text))
        server.chat("a")
        browser.until(REQUEST.format(5, "") + " !== null")
        assert browser.value(f"{facts}.checkVisibility()"), "it closed at an update"
        browser.value("$('search').focus()")
        browser.type("LONG")
        ids = "[...document.querySelectorAll('.request')].map((e) => e.dataset.id)"
        browser.until(f"`${{{ids}}}` === '4'")
        assert browser.complaints == []


def test_requests_are_fetched_at_changes_once_a_second_and_not_while_hidden(browser):
    fetches = "performance.getEntriesByType('resource')"
    fetches += ".filter((each) => each.name.includes('/api/requests')).length"
    with Llmswap(PAGE_MODELS) as server:
        browser.look(1280, "light")
        browser.open(server.url)
        browser.until(shown(row("b"), "Load"))
        began = time.monotonic()
        for _ in range(200):
            assert server.chat("b").status == 200
        browser.until("recentKey.startsWith('800 ') && !isFetching")  # four steps each
        busy = browser.value(fetches)
        assert busy <= 3 + (time.monotonic() - began)  # two may be of before
        age = f"parseInt({row('b', '.state span')}.innerText)"
        browser.until(f"{age} >= {browser.value(age) + 2}")  # it is shown each second
        assert browser.value(fetches) == busy
        browser.value("Object.defineProperty(document, 'hidden', {value: true})")
        assert server.chat("b").status == 200
        browser.until("snapshot.requests === 804")
        assert browser.value(fetches) == busy


def test_forty_models_fit_any_width_and_are_searched(browser, tmp_path):
    names = (f"a-model-with-a-rather-long-name-{n}-instruct-q4_k_m" for n in range(40))
    rows = "[...document.querySelectorAll('main li')]"
    visible = f"{rows}.filter(li => li.checkVisibility())"
    (tmp_path / os.fsdecode(b"\xff.gguf")).touch()  # a name that is no UTF-8
    text = f"[llmswap]\nmodels-dir = {tmp_path}\n"
    text += "".join(f"[{name}]\ncmd = FAKE\n" for name in names)
    with Llmswap(text) as server:
        for width in (320, 390, 1280):
            browser.look(width, "light")
            browser.open(server.url)
            browser.until(f"{rows}.length === 41")
            browser.until(FITS.format(width))
            browser.value("$('search').focus()")
            browser.type("NAME-17")
            browser.until(f"{visible}.length === 1")
            assert "name-17" in browser.value(f"{visible}[0].innerText")
            assert browser.complaints == []


def test_the_page_shows_what_holds_the_budget_and_what_is_free(tmp_path, browser):
    with auto_server(tmp_path) as server:
        measured_chat(server, "small")
        browser.look(390, "dark")
        browser.open(server.url)
        browser.until(shown("document.querySelector('#budget')", "vram 23.5 GiB"))
        browser.until(shown("$('budget')", "small 6.3 GiB"))
        parts = "[...$('budget').querySelectorAll('p:first-child span:not([hidden])')]"
        assert browser.value(f"{parts}[2].innerText") == "free 17.2 GiB"
        assert browser.value(f"{parts}[0].offsetWidth") == 112
        wide = browser.value(f"{parts}[2].offsetWidth / {parts}[1].offsetWidth")
        about = "needs vram 6.3 GiB, ram "
        browser.until(shown("document.querySelector('[data-id=small]')", about))
        assert 2 < wide < 3.5
        assert browser.complaints == []


ALL_STATES = """
[llmswap]
models-max = 3
[*]
idle-timeout = 15h
[busy]
cmd = FAKE
alias = first, second
description = For code
[still]
cmd = FAKE
[slow]
cmd = {slow}
[dozy]
cmd = FAKE --sleepable
sleep = POST /sleep?level=1
wake = POST /wake_up
[gone]
cmd = FAKE
[bad]
cmd = FAKE --load-exit 3
[wrong]
cmd = FAKE
colour = red
[twin]
uses = busy
"""
AT_A_GLANCE = {
    "busy": "first, second|For code|loaded|1 running|50 tok/s|512 MiB",
    "still": "loaded|none|Unloads in|14 h",
    "slow": "loading| %| s|1 waiting|Cancel",
    "dozy": "sleeping|512 MiB",
    "bad": "failed| s ago|exited with status 3|unexpected end of file|Try again",
    "gone": "evicted for bad",
    "wrong": "unusable|colour",
    "twin": "shares busy",
}


@pytest.fixture(scope="module")
def all_states(tmp_path_factory):
    """llmswap with a model in each state there is."""
    folder = tmp_path_factory.mktemp("states")
    text = ALL_STATES.format(slow=slow_model(folder, seconds=9000))
    server = hasty(text, env={"PATH": f"{folder}:{os.environ['PATH']}"})
    show_gpu(folder, f"{server.folder}/journal")
    with server, server.connect() as waiting:
        for model in ("dozy", "gone", "still", "busy"):
            assert server.chat(model, tokens=5).status == 200
        with server.stream("busy", tokens=10**6, interval=0.1) as stream:
            next(stream.events())
            server.chat("bad")
            waiting.send("POST", CHAT, chat_body("slow"))
            yield server


def test_gauges_show_the_present(all_states):
    progress = "llmswap_load_progress_ratio", "model", "slow"
    gpu = "llmswap_model_gpu_memory_bytes", "model", "still"  # its tool may be late
    eventually(lambda: metrics_with(all_states, gpu))
    metrics = eventually(lambda: metrics_with(all_states, progress))
    assert 0 < metrics[progress] < 0.9
    assert metrics["llmswap_requests_in_flight", "model", "busy"] == 1
    assert metrics["llmswap_requests_queued", "model", "slow"] == 1
    assert metrics[gpu] == 2**29
    assert metrics["llmswap_last_tokens_per_second", "model", "busy"] == 50
    assert metrics["llmswap_model_resident_memory_bytes", "model", "dozy"] > 2**20
    states = counted(metrics, "llmswap_model_state")
    assert dict(key for key, number in states.items() if number) == {
        "busy": "loaded", "still": "loaded", "slow": "loading", "dozy": "sleeping",
        "gone": "unloaded", "bad": "unloaded", "wrong": "unloaded",
    }


def test_prometheus_own_parser_reads_what_we_mean(all_states):
    if not CLIENTS:
        pytest.skip("CLIENTS names no Python with prometheus_client")
    text = all_states.get("/metrics").body.decode()
    words = [CLIENTS, CI / "samples.py"]
    read = json.loads(subprocess.check_output(words, input=text, text=True))
    samples = {(name, *sum(labels.items(), ())): n for name, labels, n in read}
    assert samples == metrics_of(text) and len(samples) > 100


def test_the_queries_of_the_dashboard_name_metrics_and_labels_of_ours(all_states):
    dashboard = Path(LLMSWAP).with_name(".github") / "grafana.json"
    queries = re.findall(r'"(?:expr|query)": (".*_.*")', dashboard.read_text())
    [scrape] = recipe("Prometheus and Grafana", "yaml")
    job = re.search(r"job_name: (\S+)", scrape)[1]
    gpu = "llmswap_model_gpu_memory_bytes", "model", "still"
    labels = collections.defaultdict(set)
    for name, *pairs in eventually(lambda: metrics_with(all_states, gpu)):
        labels[name].update(pairs[::2])
    for query in map(json.loads, queries):
        names = re.findall(r"\b(?:llmswap|process)_\w+", query)
        assert names, query
        jobs = re.findall(r'job=~"([^"]+)"', query)
        assert all(re.fullmatch(each, job) for each in jobs), query
        used = set(re.findall(r"(\w+)=~?\"", query)) - {"job"}  # Prometheus adds it
        for group in re.findall(r"by \((.*?)\)", query):
            used.update(group.split(", "))
        for name in names:
            assert name in labels and used <= labels[name], (query, labels[name])


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (920, "dark"), (1280, "light")])
def test_every_state_is_shown_at_any_width_in_light_and_dark(
    browser, all_states, width, scheme
):
    browser.look(width, scheme)
    browser.open(all_states.url)
    for model, words in AT_A_GLANCE.items():
        for word in words.split("|"):
            browser.until(shown(row(model), word))
    assert 0 < browser.value(row("slow", "progress") + ".value") < 0.9
    assert browser.value(row("slow", "h3") + ".offsetWidth") > 99
    browser.until(FITS.format(width))
    assert browser.value((CI / "contrast.js").read_text()) == []
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    darkest = max(map(int, re.findall(r"\d+", ground)))
    assert (darkest < 64) == (scheme == "dark")
    for words in ("2 of 7 loaded", "1 running", "1 waiting", "B memory", "VRAM"):
        browser.until(shown("$('totals')", words))
    assert browser.complaints == []


def test_nothing_runs_but_the_pages_own_script(browser, all_states):
    browser.open(all_states.url)
    browser.until(shown(row("busy"), "loaded"))
    add = "document.body.append(Object.assign(document.createElement"
    browser.value(f"{add}('script'), {{textContent: 'window.stolen = 1'}}))")
    browser.value(f"{add}('img'), {{src: 'http://other.test/'}}))")
    assert browser.value("fetch('http://other.test/').catch(() => 'no')") == "no"
    assert browser.value("window.stolen") is None
    complaints = " ".join(map(str, browser.complaints))
    assert all(word in complaints for word in ("script-src", "img-src", "connect-src"))


# ==================================================================================
# Clients: what people have already, driven as it is.
# ==================================================================================

CLIENTS = os.environ.get("CLIENTS")  # a Python that has openai and anthropic
NODE_OPENAI = os.path.join(os.environ.get("NODE_PATH", "/nowhere"), "openai")
NODE = os.path.exists(NODE_OPENAI) and shutil.which("node")
LIBRARIES = {  # what drives each, see .ci/sdk.py
    "openai": [CLIENTS, CI / "sdk.py", "openai"],
    "anthropic": [CLIENTS, CI / "sdk.py", "anthropic"],
    "node": [NODE, CI / "sdk.js"],
}
BROKEN_WISH = {
    "arguments": "{'a': 1,", "tool_choice": "auto", "parallel_tool_calls": False,
    "tools": [{"type": "function", "function": {"name": "tool0", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}}}}}],
}
BUSY_WISH, ONE_RETRY = {"status": 503}, {"retries": 1}
CUT_WISH = {"cut": "boundary", "tokens": 4}
CUT_EVENT_WISH = {"cut": "mid-event", "tokens": 4}
REAL_WISH = {"ignore_eos": True, "temperature": 0, "max_tokens": 4}
CLIENT_CASES = {  # the call, the model, what is sent along, options; the result
    "chats": ("whole", "m", {"text": "Good day"}, {}, ["Good day", "stop", 3]),
    "streams": ("flow", "m", {"text": "Good day"}, {}, ["Good day", "stop", 3]),
    "repaired": ("whole", "mended", BROKEN_WISH, {}, ['tool0{"a":1}', "tool_calls", 3]),
    "mended": ("flow", "mended", BROKEN_WISH, {}, ['tool0{"a":1}', "tool_calls", 3]),
    "as it is": ("flow", "m", BROKEN_WISH, {}, ["tool0{'a': 1,", "tool_calls", 3]),
    "unknown model": ("whole", "nobody", {}, {}, ["NotFoundError", 404]),
    "wrong key": ("whole", "m", {}, {"key": "wrong"}, ["AuthenticationError", 401]),
    "large body": ("whole", "m", {"x": "x" * 2**20}, {}, ["APIStatusError", 413]),
    "failed load": ("whole", "bad", {}, {}, ["InternalServerError", 502]),
    "busy": ("whole", "busy", BUSY_WISH, ONE_RETRY, ["InternalServerError", 503]),
    "cut stream": ("flow", "m", CUT_WISH, {}, ["APIError", None]),
    "cut event": ("flow", "m", CUT_EVENT_WISH, {}, ["RemoteProtocolError", None]),
    "embeds": ("embeds", "m", ["four", "eight888"], {}, [[8, 0.5], [8, 1.0]]),
    "uploads": ("uploads", "m", 10000, {}, ANY),
    "waits": ("waits", "bad", {}, {}, [502, True]),
    "lists": ("lists", "", {}, {}, ANY),
    "finds": ("finds", "m", {}, {}, "m"),
    "real stream": ("flow", "real", REAL_WISH, {}, [ANY, "length", 4]),
    "real count": ("counts", "real", {}, {}, True),
}
OTHER_RESULTS = {
    "anthropic": {
        "as it is": ["ValueError", None],
        "large body": ["ContentTooLargeError", 413],
        "busy": ["ServiceUnavailableError", 503],
        "cut stream": ["APIStatusError", 200],
    },
    "node": {"large body": ["APIError", 413], "cut event": ["TypeError", None]},
}
CLIENT_FILE = """
[llmswap]
models-max = 0
api-key = secret
max-body = 1M
[m]
cmd = FAKE --model m
[busy]
cmd = FAKE --model busy
[bad]
cmd = FAKE --model bad --load-exit 3
[mended]
uses = m
json-repair = on
"""
REAL_MODEL = """
[real]
llama-server = {}
model = {}
"""


def run_client(url, client):
    cases = {
        name: case[:-1] for name, case in CLIENT_CASES.items()
        if LLAMA_SERVER or not name.startswith("real")
    }
    options = {"input": json.dumps(cases), "text": True, "timeout": 180}
    return json.loads(subprocess.check_output([*LIBRARIES[client], url], **options))


@pytest.mark.parametrize("client", LIBRARIES)
def test_a_client_sees_what_was_meant_and_repeats_what_may_succeed(tmp_path, client):
    if not LIBRARIES[client][0]:
        pytest.skip(f"{client} is not there (CLIENTS, NODE_PATH)")
    text = CLIENT_FILE
    if LLAMA_SERVER:
        model = gguf.write_model(tmp_path / "model.gguf")
        text += REAL_MODEL.format(LLAMA_SERVER, model)
    with Llmswap(text) as server:
        report = run_client(server.url, client)
        usual = {name: case[-1] for name, case in CLIENT_CASES.items()}
        expected = {**usual, **OTHER_RESULTS.get(client, {})}
        assert report == {case: expected[case] for case in report} and len(report) > 12
        listed = server.get("/v1/models", SECRET).json()["data"]
        assert report["lists"] == sorted(each["id"] for each in listed)
        sent = report.get("uploads", "m 1: 10000 bytes")  # with the rest of the form
        assert re.fullmatch(r"m \d+: 10\d\d\d bytes", sent)
        asked = Counter(each["path"] for each in server.journal("request", "m"))
        chats = MESSAGES if client == "anthropic" else CHAT
        assert asked[chats] == 7 and set(asked.values()) <= {7, 1}
        assert len(server.journal("request", "busy")) == 2
        assert len(server.journal("main", "bad")) == (4 if client == "openai" else 1)
        counted = metrics_of(server.get("/metrics", SECRET).body.decode())
        assert counted["llmswap_prompt_tokens_total", "model", "m"] >= 3 * 7


WEBUI = {  # what Open WebUI sends with each request, a GET too
    "Content-Type": "application/json",
    "Authorization": "Bearer secret",
    "X-OpenWebUI-Chat-Id": "b7c1",
    "Accept-Encoding": "gzip, deflate, br",
}


def test_recipe_open_webui_whose_calls_do_what_it_expects():
    bases = re.findall(r"`http://([^/]+)(/\S+)`", section("Open WebUI"))
    hosts = [host for host, _ in bases]
    assert hosts == ["127.0.0.1:8080", "host.docker.internal:8080"]
    with Llmswap(CLIENT_FILE) as server, server.connect() as client:
        for host, path in bases:
            fields = {**WEBUI, "Host": host}
            assert client.ask("GET", f"{path}/models", None, fields).status == 200
        with Stream(server.port, CHAT, chat_body("m", stream=True), WEBUI) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.text().endswith("word2")
        speech = {"model": "m", "input": "Good day", "voice": "alloy"}
        echo = client.ask("POST", "/v1/audio/speech", speech, WEBUI).json()
        assert json.loads(echo["body"]) == speech
        sent = {name.lower(): value for name, value in echo["headers"]}
        assert sent["x-openwebui-chat-id"] == "b7c1" and "authorization" not in sent


# ---- other pages, and llama-server's own


def fetched(browser, url, body=None):
    """What a page gets: the status, whether to retry, the text."""
    headers = {"authorization": "Bearer secret", "x-stainless-lang": "js"}
    options = {"headers": {**headers, "content-type": "application/json"}}
    if body:
        options.update(method="POST", body=json.dumps(body))
    read = "[a.status, a.headers.get('x-should-retry'), await a.text()]"
    asked = f"fetch({json.dumps(url)}, {json.dumps(options)})"
    return browser.value(f"{asked}.then(async (a) => {read})")


def test_a_page_reads_answers_and_errors_if_its_origin_is_allowed_else_causes_nothing(
    browser,
):
    with Fake() as site:  # any page will do
        allowed = f"http://app.test:{site.port}"
        foreign = f"http://evil.test:{site.port}"
        text = LOCKED.replace("[llmswap]", f"[llmswap]\ncors-origins = {allowed}")
        browser.open(allowed)
        browser.until(f"location.origin === '{allowed}'")
        with Llmswap(text) as server:
            listed = fetched(browser, f"{server.url}/v1/models")
            chat = functools.partial(fetched, browser, server.url + CHAT)
            streamed = chat(chat_body("b", stream=True))
            failed = chat(chat_body("bad"))
        browser.open(foreign)
        browser.until(f"location.origin === '{foreign}'")
    assert listed[0] == 200 and '"id":"bad"' in listed[2]
    assert streamed[0] == 200 and streamed[2].endswith("data: [DONE]\n\n")
    assert failed[:2] == [502, "false"] and "exited with status 3" in failed[2]
    with Llmswap(text.replace("api-key = secret\n", "")) as server:
        asked = f"fetch('{server.url}/v1/models').catch((error) => error.name)"
        assert browser.value(asked) == "TypeError"
        post = "{method: 'POST', mode: 'no-cors', body: '{\"model\": \"b\"}'}"
        for path in (CHAT, "/models/load", "/unload", "/upstream/b/"):
            way = post if path in (CHAT, "/models/load") else "{mode: 'no-cors'}"
            browser.value(f"fetch('{server.url}{path}', {way}).then((a) => a.type)")
        assert server.journal() == [] and server.loaded() == []
        key = "llmswap_requests_total", "model", "", "status", "403"
        eventually(lambda: (metrics_with(server, key) or {key: 0})[key] >= 2)


LLAMA_UI = os.environ.get("LLAMA_UI")  # the folder of llama-server's own web UI, built
UI_FILE = """
[llmswap]
api-key = secret
llama-server = {server}
models-max = 0
[*]
path = {ui}
ctx-size = 512
threads = 1
[one]
model = {model}
[org/two]
model = {model}
n-predict = 5
"""


@pytest.mark.skipif(not (LLAMA_SERVER and LLAMA_UI), reason="LLAMA_UI names no folder")
def test_llama_servers_own_page_works_under_upstream(browser, tmp_path):
    model = gguf.write_model(tmp_path / "model.gguf")
    text = UI_FILE.format(server=LLAMA_SERVER, ui=LLAMA_UI, model=model)
    browser.look(1280, "light")
    with Llmswap(text) as server:
        browser.open(server.url)
        browser.until("document.querySelector('#key-dialog')?.open")
        browser.type("secret")
        browser.press("Enter")
        browser.click(row("org/two", "[data-do=load]"))
        browser.until(shown(row("org/two", ".state"), "loaded"))
        link = browser.value(row("org/two", "a") + ".href")
        named = link.replace("//", "//anyone:secret@")  # as if typed when asked for
        browser.open(named + "health")
        browser.until(shown("document.body", "ok"))
        browser.open(link)
        box = "document.querySelector('textarea')"
        browser.until(f"{box}?.checkVisibility()")
        browser.click(box)
        browser.type("hello")
        browser.press("Enter")
        counted = "llmswap_completion_tokens_total", "model", "org/two"
        eventually(lambda: metrics_with(server, counted, SECRET)[counted])
        listed = server.get("/v1/models", SECRET).json()["data"]
        assert [each["status"]["value"] for each in listed] == ["unloaded", "loaded"]
        urls = "performance.getEntriesByType('resource').map((each) => each.name)"
        asked = [url for url in browser.value(urls) if url.startswith("http")]
        assert len(asked) > 5 and all(url.startswith(link) for url in asked), asked
        browser.until(shown("document.body", " t/s"))  # the answer's figures


# ==================================================================================
# 10  Command line: systemd
# ==================================================================================

activation = load_tool("activation")


def quick_file():
    model = f"[a]\ncmd = {fake_command()}\nidle-timeout = 20ms\n"
    return "[llmswap]\nexit-idle-time = 50ms\n" + model


def test_activated_it_serves_exits_when_idle_and_loses_no_connection(tmp_path):
    """Each round starts it; the next clients come as it exits."""
    with activation.Activator(quick_file(), tmp_path) as systemd:
        assert ask(systemd.port, "POST", CHAT, chat_body("a")).status == 200
        eventually(lambda: "idle for" in systemd.log())
        deadline = time.monotonic() + 60
        while systemd.starts < 8:
            assert time.monotonic() < deadline, systemd.log()
            clients = []
            for _ in range(6):
                clients.append(Client(systemd.port))
                clients[-1].send("GET", "/v1/models")
                time.sleep(0.002)
            for client in clients:
                assert client.answer().status == 200
                client.hang_up()
            time.sleep(0.05 + random.uniform(-0.006, 0.008))  # its exit-idle-time
        eventually(lambda: len(systemd.statuses) == systemd.starts)
    assert set(systemd.statuses) == {0}


def test_the_idle_exit_heeds_no_idle_connection_nor_what_is_kept_loaded(tmp_path):
    by_hand = Llmswap("[llmswap]\nexit-idle-time = 50ms\n[a]\ncmd = FAKE\n")
    text = f"[k]\ncmd = {fake_command()}\nkeep-loaded = on\n"
    with by_hand as server, activation.Activator(text, tmp_path) as systemd:
        with Client(systemd.port) as client:
            assert client.ask("POST", CHAT, {"model": "k"}).status == 200
            systemd.ini.write_text(quick_file() + text)
            assert client.ask("GET", "/models?reload=1").status == 200
            eventually(lambda: systemd.statuses == [0])
            assert client.sock.recv(1) == b"" and not family(systemd.token)
        assert server.chat("a").status == 200  # not activated, it stays


def test_a_connection_in_the_backlog_cancels_the_idle_exit():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    with socket.create_server(("127.0.0.1", 0)) as low:
        listener = socket.socket(fileno=os.dup2(low.fileno(), 1500))  # beyond select()
        pool = llmswap.Pool(no_models(), lambda *_: None)
        app = SimpleNamespace(reload_if_changed=lambda: None)
        server = llmswap.Server([listener], pool, lambda *_: None, app)
        with Client(listener.getsockname()[1]) as client:
            client.send("GET", "/health")
            assert llmswap.await_event(listener, select.POLLIN, 9)
            assert not server.try_idle_exit()
            server.start()
            assert client.answer().status == 200
            eventually(server.try_idle_exit)
            assert server.is_alive()
        server.stop()


def test_activated_with_a_broken_file_it_answers_503_until_it_is_mended(tmp_path):
    with activation.Activator("[llmswap]\nlode = 1\n", tmp_path) as systemd:
        for turn in (1, 2):
            answer = ask(systemd.port, "GET", "/health")
            assert answer.status == 503 and "its file is broken" in answer.message()
            eventually(lambda: systemd.statuses == [2] * turn)
        assert systemd.log().count("[llmswap] lode: unknown key") == systemd.starts == 2
        systemd.ini.write_text(quick_file())
        for statuses in ([2, 2, 0], [2, 2, 0, 0]):  # the socket outlives a SIGTERM
            assert ask(systemd.port, "GET", "/health").status == 200
            systemd.process.terminate()
            eventually(lambda wanted=statuses: systemd.statuses == wanted)


def test_sockets_of_another_process_are_not_used():
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    assert llmswap.passed_listeners(environ) == []
    words = [*PYTHON, llmswap_file(), os.devnull, "--listen", "unix:/no/way"]
    env = {**os.environ, **environ}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "without a shell" in done.stderr


def test_a_notify_socket_that_nobody_reads_holds_nothing_up(tmp_path, monkeypatch):
    systemd = activation.Notifications(str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(systemd.address)
        sender.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sender.send(b"STATUS=full")
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    with activation.Activator(quick_file(), tmp_path) as activated:
        assert ask(activated.port, "POST", CHAT, chat_body("a")).status == 200
        eventually(lambda: activated.statuses == [0])  # idle, it exits


def test_systemd_is_notified_of_ready_status_and_stopping():
    systemd = activation.Notifications(f"@llmswap-test-{os.getpid()}")
    env = {"NOTIFY_SOCKET": systemd.address}
    text = "[a]\ncmd = FAKE\n[twin]\nuses = a\n"
    with Llmswap(text, env=env, EXTEND_EVERY=0.1) as proxy, proxy.connect() as client:
        systemd.until("READY=1")
        assert proxy.chat("a").status == 200
        systemd.until("STATUS=a loaded")
        client.send("POST", CHAT, chat_body("a", hang=True))
        eventually(lambda: proxy.get("/health").json()["requests"] == 1)
        proxy.process.terminate()
        assert "EXTEND_TIMEOUT_USEC=15000000" in systemd.until("STOPPING=1")[-1]
        for _ in range(3):  # as long as the request is in flight
            systemd.until("EXTEND_TIMEOUT_USEC=15000000")
        client.hang_up()


def test_the_watchdog_is_fed_while_listener_lock_and_timer_work(tmp_path, monkeypatch):
    systemd = activation.Notifications(str(tmp_path / "notify"))
    environ = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "40000"}
    notifier = llmswap.SystemdNotifier(environ)
    pool = llmswap.Pool(no_models(), lambda *_: None)
    pool.start()
    is_deaf = threading.Event()
    server = SimpleNamespace(pool=pool, is_alive=lambda: not is_deaf.is_set())
    llmswap.start_thread(notifier.watch, "watch", server)
    first = systemd.until("STATUS=nothing is loaded")
    assert all("WATCHDOG=1" in lines for lines in first)
    systemd.until("WATCHDOG=1")
    with pool._lock:
        systemd.until_silence()
    systemd.until("WATCHDOG=1")
    is_deaf.set()  # no connections are accepted any more
    systemd.until_silence()
    is_deaf.clear()
    systemd.until("WATCHDOG=1")
    pool._scheduler.decide = None  # a bug, of which the timer's thread dies
    with pytest.raises(TypeError):
        pool.unload_all("")
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pool._lock:
        pool._timer.notify()
    systemd.until_silence()
    pool._is_closed = True
    llmswap.GUARD.close()


def no_models():
    return llmswap.ConfigLoader(b"", "none.ini", {}).load({})


def test_units_are_what_systemd_accepts(tmp_path):
    ini = tmp_path / "my $models.ini"
    addresses = "localhost:8123, unix:s, unix:/run/user/1/100%.sock"
    ini.write_text(f"[llmswap]\nlisten = {addresses}\n")
    env = {**os.environ, "PATH": f"{tmp_path}/my $tools 10%:{os.environ['PATH']}"}
    units = run_llmswap(ini, "--units", env=env).stdout
    for text in (
        "ListenStream=127.0.0.1:8123\n", "ListenStream=/run/user/1/100%%.sock\n",
        "BindIPv6Only=ipv6-only\n", f"ListenStream={os.getcwd()}/s\n",
        f'"PATH={tmp_path}/my $tools 10%%:', f'"{tmp_path}/my $$models.ini"',
        f"WorkingDirectory={Path(llmswap_file()).parent}\n", " -m llmswap ",
        "KillMode=mixed", "OOMPolicy=continue", "Restart=on-failure", "WatchdogSec=60",
    ):
        assert text in units
    _, *parts = re.split(r"^# \S+/(llmswap\.\w+)$\n", units, flags=re.MULTILINE)
    for name, unit in zip(parts[::2], parts[1::2]):
        (tmp_path / name).write_text(unit)
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    verify = ["systemd-analyze", "verify", "--user", *tmp_path.glob("llmswap.*")]
    env["XDG_RUNTIME_DIR"] = str(tmp_path)
    done = subprocess.run(verify, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")


# ---- a Debian that is booted for these tests, in namespaces of its own


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """The machine, after the recipe for a user service was followed there, as root."""
    programs = "systemctl", "dbus-daemon", "ip", "unshare"
    if os.getuid() or not all(map(shutil.which, programs)):
        pytest.skip("needs root, systemd, dbus and iproute2")
    machine = machines.Debian(tmp_path_factory.mktemp("debian"))
    with contextlib.ExitStack() as stack:
        stack.callback(machine.end)
        try:
            eventually(machine.is_up, 20, 0.1)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"no systemd can be booted here: {error}")
        (machine.home / "llmswap").mkdir()
        install_llmswap(machine.home / "llmswap")
        (machine.home / "llmswap/models.ini").touch()
        machine(recipe("A systemd user service that starts when somebody asks"))
        yield machine


def recipe(title, kind=""):
    """The commands (or the blocks of that kind) of a recipe."""
    if kind:
        blocks = rf"^```{kind}\n(.*?)^```$"
        return re.findall(blocks, section(title), re.MULTILINE | re.DOTALL)
    return "".join(re.findall(r"^    (.*\n)", section(title), re.MULTILINE))


def write_within(debian, ini):
    """Let this be the file of llmswap there, which does not run."""
    debian("systemctl --user stop llmswap.service")
    (debian.home / "llmswap/models.ini").write_text(ini)


def ask_within(debian, *request):
    with machines.network_of(debian.network):
        return ask(8080, *request)


def chat_within(debian, model):
    return ask_within(debian, "POST", CHAT, chat_body(model))


def test_the_recipe_for_a_user_service_as_written_on_a_real_systemd(debian):
    tools = debian.home / ".local/bin"  # on the PATH of a login, not of a service
    tools.mkdir(parents=True)
    fake_binary(tools)
    text = f"{quick_file()}[b]\nmodel = {LLMSWAP}\nidle-timeout = 20ms\n"
    write_within(debian, text)
    assert debian("loginctl show-user --value -p Linger root") == "yes"
    assert debian("systemctl --user is-enabled llmswap.socket") == "enabled"

    def await_shown(name, value):
        show = f"systemctl --user show --value -p {name} llmswap.service"
        debian(f'until [ "$({show})" = "{value}" ]; do sleep 0.05; done')  # 30 s

    await_shown("ActiveState", "inactive")
    body = chat_body("a", stream=True, tokens=10**5, interval=0.05)
    with machines.network_of(debian.network):
        stream = Stream(8080, CHAT, body)
    with stream:
        await_shown("StatusText", "a loaded")
    for model in "baba":  # more often may no service start by default
        await_shown("ActiveState", "inactive")
        assert chat_within(debian, model).status == 200
    await_shown("ActiveState", "inactive")
    await_shown("Result", "success")
    (debian.home / "llmswap/models.ini").write_text("no file of ours")
    assert "its file is broken" in ask_within(debian, "GET", "/health").message()
    await_shown("ActiveState", "failed")
    await_shown("NRestarts", "0")
    (debian.home / "llmswap/models.ini").write_text(text)
    assert chat_within(debian, "a").status == 200


def test_a_core_that_is_stuck_is_started_anew_by_a_real_systemd(debian):
    write_within(debian, f"[a]\ncmd = {fake_command()}\n")
    folder = "~/.config/systemd/user/llmswap.service.d"
    debian(f"mkdir {folder}; printf '[Service]\nWatchdogSec=3\n' >{folder}/quick.conf; "
           "systemctl --user daemon-reload")
    try:
        pid = chat_within(debian, "a").content().split()[1]
        debian("kill -STOP $(systemctl --user show --value -p MainPID llmswap.service)")
        restarts = functools.partial(debian.show, "NRestarts", "llmswap.service")
        eventually(lambda: restarts() == "1", every=0.1)
        assert chat_within(debian, "a").content().split()[1] != pid
        assert debian("pgrep -fc '[f]ake.pyc.*--port'") == "1"
        log = debian("journalctl --user-unit llmswap.service -o cat")
        assert "Failed with result 'watchdog'" in log
    finally:
        debian(f"rm -r {folder}; systemctl --user daemon-reload")


def test_the_recipe_for_units_as_models_as_written_on_a_real_systemd(debian):
    [text] = recipe("systemd units as models", "ini")
    text += "[broken]\nunit = broken.service\nproxy = http://127.0.0.1:3004\n"
    folders = {"--user": debian.home / ".config/systemd/user",
               "--system": debian.home.parent / "etc/systemd/system"}
    for scope, name, *flags in (
        ("--user", "bge-m3"), ("--system", "qwen3", "--load", "0.2"),
        # it runs long enough for the journal to know the unit of its lines
        ("--user", "broken", "--load", "0.5", "--load-exit", "3"),
    ):
        command = fake_command("--model", name, *flags, port="3004")
        unit = folders[scope] / f"{name}.service"
        unit.write_text(f"[Service]\nExecStart={command}\n")
    debian("systemctl daemon-reload; systemctl --user daemon-reload")
    debian("systemctl --user start bge-m3.service")
    pid = debian.show("MainPID", "bge-m3.service")
    write_within(debian, text)

    def state_of(name):
        return ask_within(debian, "GET", f"/v1/models/{name}").json()["status"]

    eventually(lambda: state_of("bge-m3")["value"] == "loaded")  # found running
    assert chat_within(debian, "bge-m3").content().split()[:2] == ["bge-m3", pid]
    assert chat_within(debian, "qwen3").content().startswith("qwen3 ")
    assert debian.show("ActiveState", "bge-m3.service") == "inactive"
    assert chat_within(debian, "bge-m3").content().startswith("bge-m3 ")
    assert debian.show("ActiveState", "qwen3.service", "--system") == "inactive"
    assert chat_within(debian, "qwen3").status == 200
    debian("systemctl kill --signal=KILL qwen3.service")
    eventually(lambda: state_of("qwen3")["value"] == "unloaded")
    assert "ended by itself: signal, status 9" in state_of("qwen3")["error"]
    answer = chat_within(debian, "broken")
    assert answer.status == 502
    reason = "broken (broken.service) could not be started: exit-code, status 3"
    assert reason in answer.message()
    journal = "exiting due to model loading error 3"  # it may not have it the first time
    eventually(lambda: journal in chat_within(debian, "broken").message())


# ---- two machines, in network namespaces joined by a cable


def as_written(text, **more):
    """llmswap that listens where its file says, on port 8080."""
    proxy = brisk(text, **more)
    proxy.port = 8080
    del proxy._args[-2:]  # --listen
    proxy._args[1:3] = ["-IS"]  # not forked, as forks have the tests' network
    return proxy


def test_the_recipe_for_two_machines_as_written_but_for_its_times(tmp_path):
    if not shutil.which("ip") or subprocess.call(["unshare", "--net", "true"]):
        pytest.skip("needs iproute2 and the right to make networks")
    box, gpu = recipe("Two machines, one of them asleep", "ini")
    gpu = gpu.replace("= 30m", "= 400ms").replace("/models/", f"{tmp_path}/")
    model = tmp_path / "gpt-oss-120b-mxfp4-00001-of-00003.gguf"
    model.touch()
    fake_binary(tmp_path)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(machines.Sleeper(tmp_path))
        with machines.network_of(machine.gpu):
            far = stack.enter_context(as_written(gpu, env=env))
        stack.enter_context(machine.alive(far))
        eventually(lambda: machine.naps == 1)
        stack.enter_context(machines.network_of(machine.box))
        haste = dict.fromkeys(
            ("FRESH", "CONNECT_TIMEOUT", "EARLY_HEAD_AFTER", "POLL_INTERVAL"), 0.1
        )
        near = stack.enter_context(as_written(box, **haste))
        began = time.monotonic()
        with near.stream("big", interval=str(near.gate)) as stream:
            assert next(stream.documents()) and machine.packets
            assert time.monotonic() - began > 0.4
            packets = len(machine.packets)  # it stays awake as long as it answers
            assert near.chat("big").status == 200 and len(machine.packets) == packets
            near.gate.touch()
        eventually(lambda: machine.naps == 2)
        with near.stream("big") as stream:
            assert stream.text().split()[0] == str(model)
        assert stream.raw.startswith(b":") and len(machine.packets) > packets
        assert "could not" not in near.log() + far.log(), near.log()


# ==================================================================================
# Memory that looks after itself: budgets and needs that are `auto`
# ==================================================================================

GB = 1 << 30
MB = 1 << 20

SHORT_OF_MEMORY = (CI / "short_of_memory.txt").read_text()  # what servers say
OTHER_FAILURES = """\
error loading model: failed to open GGUF file '/models/x.gguf'
ggml_vulkan: Failed to allocate pinned memory (x)"""


def test_servers_say_when_memory_is_short():
    for text, is_short in ((SHORT_OF_MEMORY, True), (OTHER_FAILURES, False)):
        for line in text.splitlines():
            log = f"load_tensors: 1 of 9\n{line}\nexiting\n"
            assert bool(llmswap.OUT_OF_MEMORY.search(log)) == is_short, line


ROCM_SIZES = (
    "device,VRAM Total Memory (B),VRAM Total Used Memory (B)\n"
    "card0,17163091968,692142080\ncard1,N/A,N/A\n\n"
)
ROCM_PROCESSES = (
    "PID\tPROCESS NAME\tGPU(s)\tVRAM USED\tSDMA USED\tCU OCCUPANCY\n"
    "1\tllama-server\t1\t15053770752\t0\t0\n7\tx\t1\tUNKNOWN\t0\t0\n"
)
MACHINES = [
    # what the tool prints of GPUs and of processes, of which 1 is ours; GiB of vram
    ("24576, 9216\n", "7, 1024\n1, 8192\n", 22.5),  # a unit that runs already
    ("24576, 0\n12288, 1024\n", "7, [N/A]\n", 34),
    ("24576, 0\n[N/A], [N/A]\n", "", 23.5),
    ("512, 512\n", "", 2**-30),  # models that use it are loaded one at a time
    ("[N/A], [N/A]\n", "", None),  # its memory is that of the machine
    (ROCM_SIZES, ROCM_PROCESSES, (17163091968 - 692142080 - 2**29 + 15053770752) / GB),
    (None, None, None),
]


@pytest.mark.parametrize("sizes, processes, vram", MACHINES)
def test_the_budget_of_a_machine(tmp_path, monkeypatch, sizes, processes, vram):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if sizes is not None:
        tool = "rocm-smi" if sizes == ROCM_SIZES else "nvidia-smi"
        questions = f"*memory.total*|*meminfo) echo '{sizes}' ;; *) echo '{processes}'"
        executable(tmp_path / tool, f"case $1 in {questions}; esac")
    budget = llmswap.machine_budget(lambda pid: pid == 1)
    assert budget.get("vram") == (vram and vram * GB)
    memory = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    assert budget["ram"] == pytest.approx(0.9 * memory * 1024, rel=0.01)


def test_processes_are_known_by_their_group_or_unit(monkeypatch):
    cgroup = "0::/user.slice/user@1000.service/app.slice/coder.service/payload\n"
    read = lambda path: cgroup if path == "/proc/1/cgroup" else ""  # noqa: E731
    group = llmswap.process_stat(1).group
    assert llmswap.belongs_to(1, {group}, set()) and not llmswap.belongs_to(1, {-1}, set())
    monkeypatch.setattr(llmswap, "read_text_or_empty", read)
    for unit in ("coder", "coder.service", "system:coder"):
        assert llmswap.belongs_to(1, set(), {"x", unit})
    assert not llmswap.belongs_to(1, set(), {"code"}) and not llmswap.belongs_to(1, set(), set())


def test_mapped_files_count_as_memory_unless_they_are_on_the_gpu(tmp_path):
    model, size = tmp_path / "m.gguf", 64 * MB
    model.write_bytes(bytes(size))
    code = "import mmap, sys, time\nfile = open(sys.argv[2], 'rb')\n"
    code += "held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
    code += "sum(held[i] for i in range(0, len(held), 4096))\ntime.sleep(60)"
    command = [sys.executable, "-c", code, "-m", str(model)]
    with subprocess.Popen(command, start_new_session=True) as child:
        eventually(lambda: llmswap.memory_of(child.pid).get("RssFile", 0) > size)
        alone = llmswap.memory_taken(child.pid, None)
        on_gpu = llmswap.memory_taken(child.pid, size)
        child.kill()
    assert on_gpu["vram"] == size and "vram" not in alone
    assert on_gpu["ram"] < size < alone["ram"]
    assert llmswap.memory_taken(child.pid, size) == {}  # it is gone


def auto_model(folder, name="m", budget="auto", **keys):
    keys = keys or {"cmd": f"true {name} ${{PORT}}"}
    rows = "".join(f"{key.replace('_', '-')} = {text}\n" for key, text in keys.items())
    text = f"[llmswap]\nbudget = {budget}\n[{name}]\n{rows}"
    return read(folder, text).models[name]


BUDGET = {"vram": 24 * GB, "ram": 64 * GB}
LEARNED = [
    # GiB known before, and their source; peak; may others have squeezed it, is the run
    # over; GiB known afterwards
    (None, "not known yet", 10, True, False, 10.5),
    (21, "measured", 10, False, False, 21),  # later in this run it may take more
    (21, "measured", 10, False, True, 10.5),
    (10.5, "measured", 20, False, False, 21),
    (21, "measured", 10, True, True, None),  # it had to squeeze in
    (20, "llama-fit-params", 17, True, True, None),
    (20, "llama-fit-params", 19, True, True, 19.95),
    (20, "llama-fit-params", 17, False, False, 17.85),
    (40, "out of memory", 10, False, True, None),
]


def needs_file(folder, *known):
    """Write needs.json; each of `known` is (model, source, GiB)."""
    rows = {}
    for model, source, size in known:
        row = {"source": source, "amounts": {"vram": int(size * GB)}}
        rows[llmswap._command_key(model)] = row
    (folder / "needs.json").write_text(json.dumps({"version": 1, "needs": rows}))


@pytest.mark.parametrize("known, source, peak, squeezed, over, then", LEARNED)
def test_a_peak_is_learned_unless_it_was_squeezed(
    tmp_path, known, source, peak, squeezed, over, then
):
    model = auto_model(tmp_path)
    if known:
        needs_file(tmp_path, (model, source, known))
    needs = llmswap.Needs(str(tmp_path), print)
    needs.learn(model, {"vram": peak * GB}, squeezed, over)
    amounts, origin = needs.of(model, BUDGET)
    assert amounts["vram"] == pytest.approx((then or known) * GB)
    assert origin == ("measured" if then else source)


def test_what_is_known_is_kept_by_command_and_shared(tmp_path):
    folder = tmp_path / "state"
    one, two = auto_model(tmp_path, "one"), auto_model(tmp_path, "two")
    first, second = (llmswap.Needs(str(folder), print) for _ in range(2))
    assert first.of(one, BUDGET) == (BUDGET, "not known yet")  # all of it
    for needs, model in ((first, one), (second, two)):
        needs.learn(model, {"vram": GB, "ram": GB}, False, False)
        needs.save()
    fresh = llmswap.Needs(str(folder), print)
    for model in (one, two):
        assert fresh.of(model, BUDGET)[0]["vram"] == int(GB * 1.05)
    changed = auto_model(tmp_path, "one", cmd="true more ${PORT}")
    assert fresh.of(changed, BUDGET)[1] == "not known yet"
    written = auto_model(tmp_path, cmd="true ${PORT}", needs="vram 6G")
    assert fresh.of(written, BUDGET) == ({"vram": 6 * GB}, "written")
    assert not fresh.estimate(written, BUDGET)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["needs.json"]


BROKEN_NEEDS = [
    "", "[]", "\xff", '{"version": 2, "needs": {}}', '{"version": 1}', "[" * 100000,
    '{"version": 1, "needs": {"k": {"amounts": {"vram": "6G"}}}}',
    '{"version": 1, "needs": {"k": {"amounts": 3}}}',
    '{"version": 1, "needs": {"k": {"amounts": {"vram": 1e999}}}}',
]


def test_a_broken_file_of_needs_is_set_aside_and_a_lost_one_is_a_warning(tmp_path):
    path, model, log = tmp_path / "needs.json", auto_model(tmp_path), []
    for text in (*BROKEN_NEEDS, None):
        folder = tmp_path if text is not None else "/proc/nowhere"
        path.write_text(text or "", encoding="latin-1")
        needs = llmswap.Needs(str(folder), lambda *line: log.append(line))
        needs.learn(model, {"ram": GB}, False, False)
        needs.save()
        [(level, message)] = log
        assert level == "warning"
        log.clear()
        if text is not None:
            assert "cannot be read and is set aside: " in message
            aside = tmp_path / "needs.json.broken"
            assert aside.read_text(encoding="latin-1") == text
            assert len(json.loads(path.read_text())["needs"]) == 1
    path.unlink(), aside.unlink(), path.mkdir()  # it cannot be read, whole as it is
    needs = llmswap.Needs(str(tmp_path), lambda *line: log.append(line))
    needs.learn(model, {"ram": GB}, False, False)
    needs.save()
    assert len(log) == 2 and path.is_dir() and not aside.exists()


FIT_HELP = (CI / "fit_help.txt").read_text()
FIT_ROWS = "0.00.1 I main: printing ...\nCUDA0 7401 814 517 \nHost 1280 0 154 \n"
UNFIT = "error: failed to load model\n"


ESTIMATES = [
    # what llama-fit-params prints; the budget; MiB of the estimate, and its source
    (FIT_ROWS, "auto", {"vram": 8732 + 3, "ram": 1434}, "llama-fit-params"),
    ("CUDA0 10 20 30 \nCUDA1 1 2 3 \nhost 5 0 1 \n", "vram 24G, ram auto",
     {"vram": 66 + 3, "ram": 6}, "llama-fit-params"),
    ("Host 100 20 3 \n", "auto", {"vram": 0, "ram": 123 + 3}, "llama-fit-params"),
    (FIT_ROWS, "ram auto", {"ram": 8732 + 1434 + 3}, "llama-fit-params"),
    (UNFIT, "vram 24G, ram auto", {"vram": 6, "ram": 0}, "file sizes"),
    (UNFIT, "ram auto", {"ram": 6}, "file sizes"),
]


def fit_model(folder, help, rows, budget="vram 24G, ram auto"):
    """A llama-server model with a projector, and a stand-in for llama-fit-params."""
    (folder / "m.gguf").write_bytes(bytes(2 * MB))
    (folder / "mmproj.gguf").write_bytes(bytes(3 * MB))
    tool = f"echo $* >>{folder}/argv; [ $1 = --help ] && echo '{help}' || echo '{rows}'"
    executable(folder / "llama-fit-params", tool)
    server = executable(folder / "llama-server", "")
    keys = {"llama-server": server, "model": folder / "m.gguf", "ctx-size": 4096}
    keys |= {"mmproj": folder / "mmproj.gguf", "temp": "0.7"}
    keys["extra-args"] = "-ngl 9 --jinja --flash-attn on --chat-template x"
    return auto_model(folder, budget=budget, **keys)


@pytest.mark.parametrize("rows, budget, expected, source", ESTIMATES)
def test_a_model_is_estimated(tmp_path, rows, budget, expected, source):
    model = fit_model(tmp_path, FIT_HELP, rows, budget)
    needs = llmswap.Needs(str(tmp_path), print)
    total = dict.fromkeys(expected, 64 * GB)
    assert needs.estimate(model, total) and not needs.estimate(model, total)
    amounts, origin = needs.of(model, total)
    assert {name: round(size / MB) for name, size in amounts.items()} == expected
    assert origin == source
    asked = (tmp_path / "argv").read_text().splitlines()
    options = f"--ctx-size 4096 --model {tmp_path}/m.gguf -ngl 9 --flash-attn on"
    assert asked == ["--help", f"{options} --offline -fitp on"]  # those that it knows
    if source == "file sizes":  # what is measured replaces it
        needs.learn(model, dict.fromkeys(expected, GB), False, False)
        assert needs.of(model, total)[0] == dict.fromkeys(expected, int(GB * 1.05))


def test_a_llama_fit_params_that_hangs_or_cannot_print_is_not_waited_for(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(llmswap, "TOOL_TIMEOUT", 0.2)
    model = fit_model(tmp_path, FIT_HELP.replace("-fitp, --fit-print", "--x"), FIT_ROWS)
    assert llmswap.fit_params_estimate(model) == {}
    (tmp_path / "llama-fit-params").write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    assert llmswap.fit_params_estimate(model) == {}
    assert time.monotonic() - began < 5


def test_a_client_that_waits_for_an_estimate_gets_comments_and_may_leave(tmp_path):
    fit_model(tmp_path, FIT_HELP, FIT_ROWS)
    executable(tmp_path / "llama-fit-params", "exec sleep 600")
    text = f"[llmswap]\nbudget = ram 64G\n[a]\nllama-server = {tmp_path}/llama-server\n"
    text += f"model = {tmp_path}/m.gguf\nneeds = auto\n"
    with watchful(text) as server:
        with server.stream("a") as stream:  # its head is there
            assert next(stream.client.pieces(stream.status, stream.headers))[:1] == b":"
        eventually(lambda: rows_of(server)[0]["status"] == 499)
        assert "a: loading" not in server.log()


COUNTED = [
    # pinned and unpinned models, each GiB written (if any), known, and counted of the
    # 24 of the budget; "byte" is one byte, "rest" all but that
    ("a model too large counts for all", [], [(None, 40, 24), (None, 6, 6)]),
    ("beside a pinned one for what is left", [(None, 10, 10)], [(None, 40, 14)]),
    ("written ones, too", [(10, 10, 10)], [(14, 14, 14), (None, 20, 14)]),
    ("a pinned one is believed", [(None, 20, 20)], [(14, 14, 4)]),
    ("unknown, it leaves room for one", [(None, 24, "rest")], [(None, 24, "byte")] * 2),
]


@pytest.mark.parametrize("_, pinned, unpinned", COUNTED)
def test_needs_are_cut_down_so_that_each_can_be_loaded(tmp_path, _, pinned, unpinned):
    text, known, expected = "[llmswap]\nbudget = vram auto\n", {}, []
    sizes = {"byte": 1, "rest": 24 * GB - 1}
    for number, (written, needs, count) in enumerate([*unpinned, *pinned]):
        pin = "on" if number >= len(unpinned) else "off"
        text += f"[m{number}]\ncmd = true ${{PORT}}\npin = {pin}\n"
        text += f"needs = vram {written}G\n" if written else ""
        known[f"m{number}"] = {"vram": needs * GB}
        expected.append(sizes.get(count) or count * GB)
    config = read(tmp_path, text)
    counted = llmswap.counted_needs(config, {"vram": 24 * GB}, known)
    assert [counted[name]["vram"] for name in known] == expected


AUTO_FILES = [
    # budget; needs in [*]; needs of m; its needs as read, its problem
    ("auto", "", "", None, None),
    ("vram 24G, ram auto", "", "", None, None),
    ("vram 24G", "", "", {}, None),
    ("vram 24G", "", "auto", None, None),
    ("vram 24G", "auto", "", None, None),
    ("auto", "vram 6G", "", {"vram": 6 * GB}, None),
    ("auto", "", "vram 6G", {"vram": 6 * GB}, None),
    ("auto", "", "gpu0 6G", {"gpu0": 6 * GB}, "does not name 'gpu0'"),
    ("", "", "auto", None, "of no use without a budget"),
]


@pytest.mark.parametrize("budget, star, own, needs, problem", AUTO_FILES)
def test_needs_are_auto_where_the_budget_is(tmp_path, budget, star, own, needs, problem):
    text = f"[llmswap]\nbudget = {budget}\n[*]\n" + (f"needs = {star}\n" if star else "")
    text += "[m]\ncmd = true ${PORT}\n" + (f"needs = {own}\n" if own else "")
    text += "[far]\nproxy = http://127.0.0.1:1\n[twin]\nuses = m\n"
    config = read(tmp_path, text)
    model = config.models["m"]
    assert model.settings.needs == needs and (problem or "") in (model.problem or "")
    assert not config.models["far"].has_auto_needs
    assert not config.models["twin"].has_auto_needs
    assert config.settings.models_max == (0 if budget else 1)


GPU_MODELS = {"small": 6144, "middle": 8192, "large": 14336}
AUTO_FILE = "[llmswap]\nbudget = auto\nstate-dir = STATE\n" + "".join(
    f"[{name}]\ncmd = FAKE --model {name}\n" for name in GPU_MODELS
)


@pytest.mark.parametrize("text", ["gpu0 auto", "auto, ram 4G", "vram auto, vram 4G"])
def test_only_vram_and_ram_can_be_auto(text):
    with pytest.raises(ValueError):
        llmswap.parse_budget(text)


def show_gpu(folder, mark, sizes=None, row="%s, %d"):
    """`folder/nvidia-smi` shows processes with the words `mark` and one of `sizes`."""
    held = [f"{word} {size}" for word, size in (sizes or {mark: 512}).items()]
    (folder / "gpu.new").write_text("\n".join([mark, row, *held]))
    (folder / "gpu.new").replace(folder / "gpu")  # atomic
    if not (folder / "nvidia-smi").exists():
        script = f"exec {sys.executable} -IS {CI}/nvidia_smi.py {folder} $1"
        executable(folder / "nvidia-smi", script)


@contextmanager
def auto_server(tmp_path, text=AUTO_FILE, row="%s, %d", **constants):
    """llmswap with a GPU of 24 GiB, on which the models take 6, 8 and 14 GiB."""
    text = text.replace("STATE", str(tmp_path / "state"))
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    server = Llmswap(text, env=env, **constants)
    server.needs = tmp_path / "state/needs.json"
    show_gpu(tmp_path, f"{server.folder}/journal", GPU_MODELS, row)
    with server:
        yield server


def entry_of(server, model):
    return server.get(f"/v1/models/{model}").json()


def measured_chat(server, model):
    """Ask a model, and wait until its needs are measured and saved; return what is
    loaded."""
    assert server.chat(model).status == 200
    eventually(lambda: entry_of(server, model)["needs"]["source"] == "measured")
    eventually(lambda: server.needs.exists() and model in server.needs.read_text())
    return server.loaded()


def test_models_of_unknown_size_are_loaded_alone_first_and_together_afterwards(tmp_path):
    text = recipe("As many models as fit", "ini")[0]
    text = text.replace("budget = auto\n", "budget = auto\nstate-dir = STATE\n")
    text += AUTO_FILE.partition("STATE\n")[2]
    with auto_server(tmp_path, text) as server:
        for model in ("small", "middle", "large"):
            assert measured_chat(server, model) == [model]
        for model, loaded in (
            ("small", ["large", "small"]),
            ("middle", ["middle", "small"]),  # it evicts one, the older one
            ("large", ["large", "middle"]),  # it evicts what it must, no more
        ):
            assert server.chat(model).status == 200
            assert server.loaded() == loaded
        needs = entry_of(server, "large")["needs"]
        assert needs["vram"] == int(14 * GB * 1.05)
        server.kill()
        eventually(lambda: not family(server.token))
        server.start()
        for model in ("small", "middle"):  # it is known at once
            assert server.chat(model).status == 200
        assert server.loaded() == ["middle", "small"]
        assert entry_of(server, "large")["needs"] == needs


def test_the_vendors_tool_is_asked_rarely_and_delays_nobody(tmp_path):
    def hanging_tools(server):
        lines = family(server.token).items()
        return [pid for pid, words in lines if words == "sleep 60"]

    patient = Code("lambda question, timeout=60, ask=l.ask_gpus: ask(question, timeout)")
    with auto_server(tmp_path, ask_gpus=patient) as server:
        server.get("/health")
        asked, tool = tmp_path / "asked", tmp_path / "nvidia-smi"
        at_start = asked.read_text().count("\n")
        measured_chat(server, "small")
        before = asked.read_text()
        assert 1 <= before.count("\n") - at_start <= 3
        for _ in range(100):
            assert server.chat("small").status == 200
        assert asked.read_text() == before and llmswap.MEASURE_INTERVAL == 60
        tool.write_text("#!/bin/sh\nexec sleep 60\n")
        assert server.chat("middle").status == 200
        hanging = eventually(lambda: hanging_tools(server))
        assert server.loaded() == ["middle"] and server.chat("middle").status == 200
        assert hanging == hanging_tools(server)  # neither waited for it
        tool.write_text("#!/bin/sh\n")
        os.kill(hanging[0], signal.SIGKILL)
        eventually(lambda: entry_of(server, "middle")["needs"]["source"] == "measured")


@pytest.mark.parametrize("row", ["%s, [N/A]%.0s", "%.0s%.0s"])
def test_a_tool_that_shows_no_processes_tells_what_a_model_alone_takes(tmp_path, row):
    with auto_server(tmp_path, row=row) as server:
        for model in ("small", "middle"):
            assert measured_chat(server, model) == [model]
            need = GPU_MODELS[model] * MB * 1.05
            assert entry_of(server, model)["needs"]["vram"] == int(need)


def test_the_peak_of_the_last_run_counts(tmp_path):
    with auto_server(tmp_path, MEASURE_INTERVAL=0.02) as server:
        asked = tmp_path / "asked"

        def needs_of_small(size):
            show_gpu(tmp_path, f"{server.folder}/journal", {"small": size * 1024})
            before = asked.read_text().count("\n")
            # three may be of a measurement that began in the run before
            eventually(lambda: asked.read_text().count("\n") > before + 4)
            return entry_of(server, "small")["needs"]["vram"] / GB / 1.05

        measured_chat(server, "small")
        assert needs_of_small(10) == pytest.approx(10)
        assert needs_of_small(7) == pytest.approx(10)
        unload(server, "small")
        assert server.chat("small").status == 200
        assert needs_of_small(8) == pytest.approx(10)
        unload(server, "small")
        eventually(lambda: entry_of(server, "small")["needs"]["vram"] < 9 * GB)


SHORT_FILE = """\
[llmswap]
models-max = 3
[first]
cmd = FAKE --model first
[second]
cmd = FAKE --model second
[hungry]
cmd = /bin/sh FOLDER/hungry FAKE --model hungry
"""
HUNGRY = """\
echo >>FOLDER/tries
[ $(wc -l <FOLDER/tries) -le FAILURES ] || exec "$@"
echo 'CUDA0: cudaMalloc failed: out of memory'
exit 1
"""


@pytest.mark.parametrize("failures", [1, 2])
def test_a_load_without_memory_makes_room_once_unseen_by_its_client(tmp_path, failures):
    script = HUNGRY.replace("FOLDER", str(tmp_path)).replace("FAILURES", str(failures))
    (tmp_path / "hungry").write_text(script)
    with Llmswap(SHORT_FILE.replace("FOLDER", str(tmp_path))) as server:
        for model in ("first", "second"):
            assert server.chat(model).status == 200
        answer = server.chat("hungry")
        assert len((tmp_path / "tries").read_text()) == 2
        if failures == 1:
            assert answer.status == 200 and server.loaded() == ["hungry", "second"]
            [end], [start] = map(server.journal, ("end", "main"), ("first", "hungry"))
            assert end["t"] < start["t"]
            again = "hungry: loading again once first is unloaded"
            eventually(lambda: again in server.log())
            assert "failed" not in entry_of(server, "hungry")["status"]
        else:
            assert answer.status == 502 and "out of memory" in answer.message()
            assert server.loaded() == ["second"]
            assert server.chat("hungry").status == 200  # this one has its own two


def stage_of_needs(folder, **sources):
    """A stage of models with known needs, each name=(source, GiB)."""
    text = f"[llmswap]\nbudget = vram 24G\nstate-dir = {folder}\n[*]\nneeds = auto\n"
    text += "".join(f"[{name}]\nTRUE {name}\n" for name in sources)
    models = PoolStage(folder, text).pool.config.models
    needs_file(folder, *((models[name], *known) for name, known in sources.items()))
    return PoolStage(folder, text)


def test_a_model_that_never_fits_whole_is_not_learned_from_what_it_squeezed_into(
    tmp_path,
):
    estimates = {"a": ("llama-fit-params", 40), "b": ("llama-fit-params", 20)}
    stage = stage_of_needs(tmp_path, **estimates)
    pool, models = stage.pool, stage.pool.config.models
    for name in estimates:
        stage.load(name)
        pool._runs[stage.backend(name)].peak = {"vram": 12 * GB}
        stage.now += 99
        pool.unload(models[name])
        stage.backend(name).end()
    sources = [pool.status(models[name]).needs_source for name in estimates]
    assert sources == ["llama-fit-params", "measured"]


def test_a_model_that_had_no_memory_beside_another_needs_more_until_the_end(tmp_path):
    sizes = {"a": ("measured", 8), "b": ("measured", 6), "c": ("measured", 4)}
    stage = stage_of_needs(tmp_path, **sizes)
    stage.load("a")
    stage.now += 9
    stage.load("b")
    request = stage.ask("c")
    stage.backend("c").end(STARVED)
    assert stage.backend("a").is_stopping and not stage.backend("b").is_stopping
    stage.backend("a").end()
    stage.backend("c", 1).load()
    assert request.granted() is stage.backend("c", 1)
    request.end()
    pool, model = stage.pool, stage.pool.config.models["c"]
    pool._runs[stage.backend("c", 1)].peak = {"vram": 4 * GB}
    pool.unload(model)
    stage.backend("c", 1).end()
    status, later = pool.status(model), llmswap.Needs(str(tmp_path), print)
    assert status.needs == {"vram": (24 - 6) * GB}
    assert status.needs_source == "out of memory"
    assert later.of(model, pool.budget) == ({"vram": 4 * GB}, "measured")


def test_needs_and_budget_are_shown(tmp_path):
    with auto_server(tmp_path) as server:
        measured_chat(server, "small")
        need, total = int(6 * GB * 1.05), int(23.5 * GB)
        assert entry_of(server, "large")["needs"]["source"] == "not known yet"
        metrics = server.get("/metrics").body.decode()
        assert f'llmswap_budget_bytes{{resource="vram"}} {total}\n' in metrics
        labels = '{model="small",resource="vram"}'
        assert f"llmswap_model_needs_bytes{labels} {need}\n" in metrics
        with snapshots_of(server) as stream:
            snapshot = next(stream.documents())
        models = {model["id"]: model for model in snapshot["models"]}
        assert snapshot["budget"]["vram"] == total
        assert models["small"]["holds"]["vram"] == need and not models["large"]["holds"]
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        output = run_llmswap(server.ini, "--check", env=env).stdout
        assert re.search(r"^  needs vram 6.3G, ram \S+ \(measured\)$", output, re.M)
        assert re.search(r"^  needs vram .* \(not known yet\)$", output, re.M)
        assert re.search(r"^budget vram \S+G, ram \S+G$", output, re.M)


# ==================================================================================
# 4  Backends: contexts that outlive them
# ==================================================================================

CONTEXT_FILE = """
[llmswap]
state-dir = {folder}/state
{settings}
[*]
llama-server = {folder}/llama-server
model = {folder}/m.gguf
slot-fault = {folder}/fault
journal = {folder}/journal
stop-timeout = 1
[a]
keep-context = on
{lines}
[b]
c = 1
"""


def context_file(folder, lines="", settings=""):
    """An INI file of fake llama-servers a and b, of which a keeps its context."""
    fake_binary(folder)
    (folder / "m.gguf").write_text("weights")
    return CONTEXT_FILE.format(folder=folder, lines=lines, settings=settings)


Keeping = load_tool("keeping").Keeping

KEEPING_STOPS = {
    Keeping.swap: "", Keeping.restart: "", Keeping.reload_and_swap: "",
    Keeping.await_unloaded: "idle-timeout = 100ms",
}


@pytest.mark.parametrize("stop", KEEPING_STOPS)
def test_a_conversation_outlives_every_stop_but_a_kill(tmp_path, stop):
    with Keeping(tmp_path, KEEPING_STOPS[stop] + "\n[a-too]\nuses = a") as server:
        assert server.tell() == 0
        stop(server)
        [old] = server.files()
        assert server.tell(prompt=3100, model="a-too") == 3000
        eventually(lambda: old not in server.files())
        stop(server)
        paths = (tmp_path / "state").rglob("*")
        modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in paths}
        assert modes == {(True, 0o700), (False, 0o600)}
        sizes = server.get("/metrics").body.decode()
        [old] = server.files()
        assert server.tell(prompt=3200) == 3100 and server.complaints() == []
        eventually(lambda: old not in server.files())  # an idle one saves another soon
        if stop is Keeping.swap:
            metrics = lambda: server.get("/metrics").body.decode()  # noqa: E731
            cached = 'llmswap_prompt_tokens_cached_total{model="a"} 3100\n'
            eventually(lambda: cached in metrics())  # a moment after the answer
            assert 'context_tokens_total{model="a",action="restored"} 6100\n' in metrics()
            assert 'context_seconds_saved_total{model="a"} 12.2\n' in metrics()
            assert 'llmswap_context_bytes{model="a"} 12400\n' in sizes


@pytest.mark.parametrize("text", [
    "", "[]", '{"F": []}', '{"F": ["c", 1, 1, [[0, "f"]]]}', "[" * 100000,
    '{"F": ["c", 1, 1e999, []]}',
])
def test_a_broken_manifest_of_contexts_counts_as_none(tmp_path, text):
    config = read(tmp_path, context_file(tmp_path, settings="context-max = 1"))
    [folder] = {each.context_dir for each in config.models.values()} - {""}
    os.makedirs(folder)
    manifest = tmp_path / "state/context/manifest.json"
    manifest.write_text(text.replace("F", folder))
    store = llmswap.ContextStore()
    store.configure(config)
    assert store.exchange(folder) == llmswap.SavedContext()
    assert json.loads(manifest.read_text()) == {}


FAULTS_OF_SLOTS = [
    "list hang", "save hang", "save die", "save short", "restore hang", "restore fail",
    "restore die",
]


def test_contexts_outlive_an_idle_exit(tmp_path):
    settings = "exit-idle-time = 50ms"
    text = context_file(tmp_path, "idle-timeout = 20ms", settings)
    body = chat_body("a", talk="x", prompt_tokens=3000)
    with activation.Activator(text, tmp_path) as systemd:
        for ended, cached in ((1, 0), (2, 3000)):
            answer = ask(systemd.port, "POST", CHAT, body).json()
            assert answer["timings"]["cache_n"] == cached
            eventually(lambda ended=ended: len(systemd.statuses) == ended)


@pytest.mark.parametrize("fault", FAULTS_OF_SLOTS)
def test_what_goes_wrong_with_a_context_delays_a_swap_within_bounds(tmp_path, fault):
    with Keeping(tmp_path) as server:
        server.tell()
        server.fault(fault)
        for step in (server.swap, server.tell):
            began = time.monotonic()
            assert step() in (None, 0)
            assert time.monotonic() - began < 4  # a request takes at most 1 s
        assert len(server.complaints(1)) == 1, server.log()
        server.fault("none")
        server.swap()
        eventually(lambda: len(server.files()) == 1)
        assert server.tell() == 3000


@pytest.mark.parametrize("fault, action, reason", [
    ("list fail", "list", "context was not saved: /slots: it answers 501"),
    ("save slow", "save", "context was not saved: /slots/0.action=save: no answer in"),
    ("restore useless", "restore", "the restored context was of no use"),
])
def test_after_two_failures_no_context_of_a_command_is_kept(
    tmp_path, fault, action, reason
):
    with Keeping(tmp_path) as server:
        server.fault(fault)  # "slow" is 0.5 s, twice what a save of 1300 tokens may take
        for _ in range(4):
            server.tell("another", prompt=600)  # no save and no failure
            server.tell("another", prompt=900)
            server.tell_and_swap(prompt=1300)
        assert server.actions(action) == 2
        first, second = server.complaints(2)
        assert re.match(reason, first) and second.startswith(first)
        assert second.endswith("; no more contexts are kept")
        eventually(lambda: server.files() == [])
        assert ": used" not in server.log()
        server.change_command()
        server.fault("none")
        server.tell_and_swap()
        assert server.tell() == 3000


def test_conversations_come_back_though_others_begin_and_one_rests(tmp_path):
    talks = "p 3000 0, q 1600 0, r 900 0, r 1000 900, s 2000 0, t 3000 0, t 3100 3000"
    with Keeping(tmp_path) as server:
        server.tell("y", 300, slot=1)
        for talk, prompt, cached in map(str.split, talks.split(", ")):
            assert server.tell_and_swap(talk, int(prompt)) == int(cached), talk
        assert server.tell("y", 300, slot=1) == 300


def test_a_llama_server_that_cannot_save_is_left_alone(tmp_path):
    other = "[c]\ncmd = FAKE\nkeep-context = on"
    with Keeping(tmp_path, f"embeddings = on\n{other}") as server:
        server.tell_and_swap()
        assert server.tell() == server.actions("list") == 0
        assert server.complaints() == []
        eventually(lambda: "keep-context: without effect beside" in server.log())
        model = llmswap.load_config(server.ini).models["a"]
    names = "model embeddings host port alias slot-fault journal".split()
    table = llmswap.OptionTable([llmswap.Option((f"--{name}",)) for name in names])
    assert "--slot-save-path" not in model.command(table, 1)
    assert f"{tmp_path}/state/context/a/" in model.command(llmswap.UNKNOWN_OPTIONS, 1)


@pytest.mark.parametrize("change, complaints, restores", [
    (lambda server: server.change_file("m.gguf"), 1, 0),
    (lambda server: server.change_file("llama-server"), 1, 0),
    (Keeping.change_command, 1, 0), (Keeping.crash, 0, 1),
], ids=["weights", "binary", "command", "crash"])
def test_in_doubt_a_saved_context_is_deleted(tmp_path, change, complaints, restores):
    with Keeping(tmp_path) as server:
        server.tell_and_swap()
        change(server)
        assert server.tell() == 0
        reasons = ["has changed" in each for each in server.complaints(complaints)]
        assert reasons == [True] * complaints
        assert server.actions("restore") == restores
        eventually(lambda: server.files() == [])
        server.swap()
        assert server.tell() == 3000


def test_saved_contexts_stay_below_a_limit_and_go_with_their_model(tmp_path):
    lines = "[c]\nkeep-context = on"
    with Keeping(tmp_path, lines, "context-max = 30K\nmodels-max = 1") as server:
        server.tell(model="c")
        server.tell_and_swap(model="a")
        assert len(server.files("a")) == len(server.files("c")) == 1
        server.tell_and_swap(prompt=5000)  # 20 KB and 12 KB
        eventually(lambda: server.files("c") == [] and len(server.files("a")) == 1)
        server.reload(server.text.replace("keep-context = on\n[c]", "[c]"))
        eventually(lambda: not (tmp_path / "state/context/a").exists())


def test_a_folder_of_the_presets_own_is_used_with_care(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    names = {"notes", "a.0.mine", "other.0.0123abcd", "a.1.0.0123abcd"}
    for name in {*names, "a.0.0123abcd"}:  # the last: left by a killed llmswap
        (own / name).write_text("x")
    with Keeping(tmp_path, f"slot-save-path = {own}/") as server:
        server.tell_and_swap()
        eventually(lambda: len(os.listdir(own)) == 5)
        assert names < {*os.listdir(own)} and "a.0.0123abcd" not in os.listdir(own)
        server.restart()
        assert server.tell_and_swap() == 3000
        server.reload(server.text.replace("keep-context = on", ""))
        eventually(lambda: {*os.listdir(own)} == names)


def test_without_a_state_directory_models_run_as_without_contexts(tmp_path):
    (tmp_path / "state").write_text("a file")
    with Keeping(tmp_path) as server:
        server.tell_and_swap()
        assert server.tell() == server.actions("list") == 0
        assert "cannot be kept" in server.complaints(1)[0]


def test_a_manifest_that_cannot_be_written_keeps_no_model_from_its_start(tmp_path):
    (tmp_path / "state/context/manifest.json").mkdir(parents=True)
    with Keeping(tmp_path) as server:
        server.tell_and_swap()
        assert server.tell() == 0


def test_a_kill_of_llmswap_at_any_moment_leaves_nothing_that_is_half(tmp_path):
    with Keeping(tmp_path) as server:
        for seconds in (0.0, 0.05, 0.15):
            server.tell()
            client = ask_later(server, "b")
            time.sleep(seconds)  # whatever that meets: a save, a stop, a start
            server.kill()
            client.hang_up()
            eventually(lambda: not family(server.token))
            server.start()
            assert server.tell() in (0, 3000)
            eventually(lambda: server.files() == [])


def test_a_stop_during_a_restore_is_a_kill(tmp_path):
    with Keeping(tmp_path, "stop-timeout = 60") as server:
        server.tell_and_swap(prompt=30000)  # worth a minute
        server.fault("restore hang")
        client = ask_later(server, "a")
        eventually(lambda: server.actions("restore"))
        began = time.monotonic()
        unload(server, "a")
        assert time.monotonic() - began < 20 and client.answer().status == 503
        assert server.tell() == 0 and server.complaints() == []


def test_a_second_sigterm_ends_a_save_at_once(tmp_path):
    with Keeping(tmp_path, "stop-timeout = 60") as server:
        server.tell(prompt=600_000)  # worth 20 minutes: a save may take a minute
        server.fault("save hang")
        server.process.terminate()
        eventually(lambda: server.actions("save"))
        server.process.terminate()
        assert server.process.wait(20) == 0 and server.complaints() == []
        server.start()
        assert server.tell() == 0
        eventually(lambda: server.files() == [])


# ==================================================================================
# A real llama-server, with tiny models of random weights made here
# ==================================================================================

REAL_FILE = """\
version = 1
[llmswap]
llama-server = {server}
[*]
ctx-size = 256
threads = 1
[one]
model = {folder}/one.gguf
alias = first
[two]
model = {folder}/two.gguf
embeddings = on
pooling = mean
idle-timeout = 300ms
[broken]
model = {folder}/broken.gguf
[wrong]
model = {folder}/one.gguf
ctx-size = many
[typo]
model = {folder}/one.gguf
ctx-sise = 1
"""
def real_models(folder, names, settings="", common="", **shape):
    """Make model files of these names; the INI text for a real llama-server."""
    text = f"[llmswap]\nllama-server = {LLAMA_SERVER}\n{settings}\n[*]\n{common}\n"
    for seed, name in enumerate(names):
        path = gguf.write_model(folder / f"{name}.gguf", seed=seed, **shape)
        text += f"[{name}]\nthreads = 1\nmodel = {path}\n"
    return text


def go_on(server, messages):
    """Ask model a once more; return the server's timings."""
    body = {"model": "a", "messages": messages, "max_tokens": 8}
    answer = server.post(CHAT, body).json()
    content = answer["choices"][0]["message"]["content"]
    messages.append({"role": "assistant", "content": content})
    messages.append({"role": "user", "content": "and then"})
    return answer["timings"]


def test_the_scheduler_learns_how_long_a_stop_with_a_save_takes(tmp_path, monkeypatch):
    (tmp_path / "fault").write_text("save slow")  # half a second
    (tmp_path / "pool.ini").write_text(context_file(tmp_path))
    config, exited = llmswap.load_config(str(tmp_path / "pool.ini")), queue.SimpleQueue()

    class Spy(llmswap.Scheduler):
        def exited(self, name, *report):
            victim = super().exited(name, *report)
            exited.put((name, self.models[name].stop_seconds))
            return victim

    monkeypatch.setattr(llmswap, "Scheduler", Spy)
    pool = llmswap.Pool(config, lambda *_: None)
    pool.start()
    try:
        request = PoolRequest(pool, "a")
        port = request.granted().port
        assert ask(port, "POST", CHAT, chat_body("a", prompt_tokens=4500)).status == 200
        request.end()
        PoolRequest(pool, "b").end()
        name, seconds = exited.get(timeout=10)
        assert name == "a" and seconds >= 0.5
    finally:
        pool.close(0)


@with_llama_server
def test_two_real_conversations_outlive_swaps_and_a_restart(tmp_path):
    keys = "ctx-size = 8192\nkeep-context = on\nparallel = 2"
    text = real_models(tmp_path, "ab", f"state-dir = {tmp_path}/state", keys, width=128)
    talks = [[{"role": "user", "content": 600 * word}] for word in ("hedge ", "badge ")]
    with Llmswap(text) as server:
        first = [go_on(server, talk) for talk in talks]
        assert [timings["cache_n"] for timings in first] == [0, 0]
        for turn in range(3):
            if turn < 2:
                assert server.post(CHAT, real_chat("b")).status == 200
            else:
                server.process.terminate()
                assert server.process.wait(30) == 0
                server.start()
            for talk in talks:
                timings = go_on(server, talk)
                cached = timings["cache_n"]
                assert cached >= 0.95 * (cached + timings["prompt_n"]) > 2800
        assert "context was not" not in server.log()
        eventually(lambda: len(re.findall("restored .* in ", server.log())) == 3)
        saved, restored = (
            [int(each) for each in re.findall(rf"{verb} .* in (\d+) ms", server.log())]
            for verb in ("saved", "restored")
        )
    anew = min(timings["prompt_ms"] for timings in first)
    assert min(saved) + min(restored) < anew


@pytest.fixture(scope="module")
def real():
    """llmswap over a real llama-server with two real models and two that fail."""
    if not LLAMA_SERVER:
        pytest.skip("LLAMA_SERVER names no llama-server")
    proxy = Llmswap("")
    gguf.write_model(proxy.folder / "one.gguf", seed=1)
    gguf.write_model(proxy.folder / "two.gguf", width=128, seed=2)
    (proxy.folder / "broken.gguf").write_bytes(b"not a model" * 1000)
    proxy.write(REAL_FILE.format(server=LLAMA_SERVER, folder=proxy.folder))
    with proxy:
        yield proxy


def real_chat(model, **wish):
    messages = [{"role": "user", "content": "hello"}]
    how = {"max_tokens": 4, "ignore_eos": True}  # random weights may end at once
    return {"model": model, "messages": messages, **how, **wish}


@with_llama_server
def test_real_models_are_estimated_measured_and_loaded_together(tmp_path):
    budget = f"budget = ram auto\nstate-dir = {tmp_path}/state"
    common, shape = "ctx-size = 2048\ntemp = 0.5", {"width": 256, "layers": 8}
    text = real_models(tmp_path, ("one", "two"), budget, common, **shape)
    model = read(tmp_path, f"{text}extra-args = --no-warmup\n").models["two"]
    size = (tmp_path / "two.gguf").stat().st_size
    beside = Path(LLAMA_SERVER).resolve().with_name("llama-fit-params")
    estimate = llmswap.fit_params_estimate(model)
    assert not beside.exists() or size < estimate["ram"] < 4 * size
    with Llmswap(text) as server:
        for name in ("one", "two"):
            assert server.post(CHAT, real_chat(name)).status == 200
            known = eventually(lambda: entry_of(server, name).get("needs"))
            assert size < known["ram"] < 10 * size + (200 << 20)
            eventually(lambda: entry_of(server, name)["needs"]["source"] == "measured")
        assert server.loaded() == ["one", "two"]


def test_a_real_model_answers_streams_and_is_swapped_and_unloaded(real):
    answer = real.post(CHAT, real_chat("first")).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["object"] == "chat.completion"
    wish = {"stream_options": {"include_usage": True}}
    with real.stream("one", max_tokens=4, ignore_eos=True, **wish) as stream:
        documents = list(stream.documents())
    assert documents[-1]["usage"]["completion_tokens"] == 4
    assert stream.is_complete and b"data: [DONE]" in stream.raw
    with real.stream("one", max_tokens=4000, ignore_eos=True) as stream:
        next(stream.events())  # and its client leaves
    eventually(lambda: real.get("/health").json()["requests"] == 0)
    answer = real.post("/v1/embeddings", {"model": "two", "input": "hello"})
    assert len(answer.json()["data"][0]["embedding"]) == 128
    eventually(lambda: real.loaded() == [])  # one was evicted, two was idle


def test_a_real_model_that_cannot_be_loaded_says_why_in_its_own_words(real):
    for model, words in (("broken", "invalid magic"), ("wrong", "--ctx-size")):
        answer = real.post(CHAT, real_chat(model))
        assert answer.status == 502 and answer.headers["x-should-retry"] == "false"
        assert words in answer.message()
    eventually(lambda: "failed" in entry_of(real, "typo")["status"])  # not asked for
    error = entry_of(real, "typo")["status"]["error"]
    assert "ctx-sise" in error and "ctx-size?" in error
    done = run_llmswap(real.ini, "--check")
    assert done.returncode == 2 and "ctx-size?" in done.stdout


def test_a_gguf_header_is_read_up_to_its_tokenizer(tmp_path):
    path = tmp_path / "f"
    fields, _ = gguf.header_fields(64, 2)
    tags = gguf.STRING, ["a tokenizer."]
    fields.insert(1, gguf.field_bytes("tags", gguf.ARRAY, tags))
    before = b"".join(f for f in fields if b"\0tokenizer" not in f)
    head = b"GGUF".ljust(24) + before
    path.write_bytes(head + gguf.string_bytes("tokenizer.ggml.tokens"))
    whole = llmswap.read_gguf(path)
    assert whole["context_length"] == 4096
    for size in range(len(head)):
        path.write_bytes(head[:size])
        assert llmswap.read_gguf(path).items() <= whole.items()
    path.write_bytes(b"GGML" + head[4:])
    for each in (path, tmp_path, tmp_path / "none"):
        assert llmswap.read_gguf(each) == {}


def test_a_look_at_files_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(llmswap, "check_files", lambda *_: hanging.wait(20))
    models = [*read(tmp_path, "[a]\ncmd = x ${PORT}").models.values()]
    inspector, began = llmswap.Inspector(), time.monotonic()
    assert inspector.details_of(models)["a"] == llmswap.Details()
    assert time.monotonic() < began + 10
    hanging.set()
    eventually(lambda: inspector.details_of(models)["a"].argv)


ABILITIES_FILE = """
[llmswap]
llama-server = {server}
[trained]
model = {folder}/one.gguf
[served]
model = {folder}/one.gguf
ctx-size = 512
[other]
cmd = FAKE
capabilities = embeddings, context 8192, vision
[shares]
uses = other
capabilities = tools
"""
ABILITIES = {  # n_ctx, context_length, capabilities, what it takes, owner
    "trained": (None, 4096, "tools", "text", "llamacpp"),
    "served": (512, 512, "tools", "text", "llamacpp"),
    "other": (8192, 8192, "vision embeddings", "text image", "llmswap"),
    "shares": (8192, 8192, "vision tools embeddings", "text image", "llmswap"),
}


def test_what_a_model_can_do_is_told_before_it_is_loaded(tmp_path):
    gguf.write_model(tmp_path / "one.gguf")
    program = LLAMA_SERVER or "llama-server"
    with Llmswap(ABILITIES_FILE.format(folder=tmp_path, server=program)) as server:
        has_length = lambda name: "context_length" in entry_of(server, name)  # noqa: E731
        eventually(lambda: all(map(has_length, ABILITIES)))
        for name, (n_ctx, length, abilities, inputs, owner) in ABILITIES.items():
            entry = entry_of(server, name)
            assert entry["meta"].get("n_ctx") == n_ctx
            assert entry["context_length"] == length
            assert entry["capabilities"] == abilities.split()
            assert entry["architecture"]["input_modalities"] == inputs.split()
            assert entry["owned_by"] == owner
        assert entry_of(server, "trained")["meta"]["n_ctx_train"] == 4096
        assert set(server.states().values()) == {"unloaded"}


ROUTER_FILE = """\
[*]
ctx-size = 256
threads = 1
stop-timeout = 7
[one]
model = {folder}/one.gguf
alias = second, first
tags = b, a
no-jinja = 1
n-gpu-layers = 0
load-on-startup = no
[seeing]
model = {folder}/one.gguf
mmproj = {folder}/projector.gguf
ctx-size = 0
no-kv-offload = off
[gone]
model = {folder}/gone.gguf
"""


@contextmanager
def llama_router(folder):
    """The port of llama-server in router mode, with the file `models.ini`."""
    port = free_port()
    command = [LLAMA_SERVER, "--models-preset", folder / "models.ini"]
    command += ["--models-max", "1", "--port", str(port), "--host", "127.0.0.1"]
    environment = {**os.environ, "HOME": str(folder), "LLAMA_CACHE": str(folder / "no")}
    with subprocess.Popen(command, env=environment, stdout=-3, stderr=-3) as process:
        try:
            eventually(lambda: is_listening(port))
            eventually(lambda: ask(port, "GET", "/health").status == 200)
            yield port
        finally:
            process.terminate()


def router_entries(port):
    """Each model's entry without what depends on the machine."""
    listed = ask(port, "GET", "/models").json()["data"]
    entries = {each["id"]: each for each in listed}
    for entry in entries.values():
        del entry["created"]
        args = entry["status"]["args"]
        args[args.index("--port") + 1] = args[0] = ""
        if entry["status"]["value"] == "unloaded":  # we know what cannot start
            for key in ("failed", "exit_code", "error"):
                entry["status"].pop(key, None)
    return entries


def loaded_event(port):
    """Load the model `one`; return the event that says it is loaded."""
    with Stream(port, "/models/sse") as stream:
        answer = ask(port, "POST", "/models/load", {"model": "one"})
        assert answer.json() == {"success": True}
        for event in stream.documents():
            if event["data"].get("status") == "loaded":
                event["data"]["info"].pop("created")
                return event


@with_llama_server
def test_models_are_described_as_by_llama_cpps_router(tmp_path):
    gguf.write_model(tmp_path / "one.gguf")
    projector = gguf.field_bytes("clip.has_vision_encoder", gguf.FLAG, True)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + projector
    (tmp_path / "projector.gguf").write_bytes(head)
    text = ROUTER_FILE.format(folder=tmp_path)
    (tmp_path / "models.ini").write_text(text)
    text = f"[llmswap]\nllama-server = {LLAMA_SERVER}\n{text}"
    with llama_router(tmp_path) as router, Llmswap(text) as proxy:
        ports = router, proxy.port

        def compare():
            theirs, ours = map(router_entries, ports)
            for name, entry in theirs.items():
                assert {key: ours[name].get(key) for key in entry} == entry
            return ours

        eventually(lambda: entry_of(proxy, "gone")["status"].get("preset"))
        inputs = compare()["seeing"]["architecture"]["input_modalities"]
        assert inputs == ["text", "image"]
        theirs, ours = map(loaded_event, ports)
        assert theirs == ours
        compare()
        for port in ports:
            ask(port, "POST", "/models/unload", {"model": "one"})
            state = lambda: router_entries(port)["one"]["status"]["value"]  # noqa: E731
            eventually(lambda: state() == "unloaded")
        compare()
        assert entry_of(proxy, "one")["meta"]["n_vocab"] == 311  # from its last load
        status = entry_of(proxy, "gone")["status"]
        assert status["failed"] and "does not exist" in status["error"]


@with_llama_server
def test_downloaded_models_are_served_without_a_file(tmp_path):
    hub, commit = tmp_path / "hub", "0" * 40
    for user, tag in (("one", "Q8_0"), ("two", "Q8_0"), ("two", "Q4_K_M")):
        base = hub / f"models--{user}--tiny"
        folder = base / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / "main").write_text(commit)
        gguf.write_model(folder / f"tiny-{tag}.gguf")
    text = f"[llmswap]\nllama-server = {LLAMA_SERVER}\ncache-models = on\n"
    text += "default-model = one/tiny\n[*]\nctx-size = 256\n[two/tiny:q8_0]\nalias = second\nctx-size = 128"
    env = {"HF_HUB_CACHE": str(hub), "LLAMA_CACHE": str(hub)}
    with Llmswap(text, env=env) as server:
        models = server.get("/v1/models").json()["data"]
        assert {each["id"]: each["source"] for each in models} == {
            "one/tiny:Q8_0": "cache", "two/tiny:Q4_K_M": "cache",
            "two/tiny:q8_0": "preset",
        }
        assert entry_of(server, "one/tiny")["can_remove"]
        for name, size in (("one/tiny", "256"), ("second", "128")):
            assert server.post(CHAT, real_chat(name)).status == 200
            args = eventually(lambda: entry_of(server, name)["status"]["args"])
            assert args[args.index("--ctx-size") + 1] == size and "--offline" in args
        assert server.post(CHAT, real_chat("two/tiny")).status == 404


@with_llama_server
def test_a_killed_real_model_is_loaded_again_and_gone_soon_after_llmswap_is(tmp_path):
    gguf.write_model(tmp_path / "one.gguf")
    text = f"[llmswap]\nllama-server = {LLAMA_SERVER}\n"
    with Llmswap(f"{text}[one]\nmodel = {tmp_path}/one.gguf\n") as proxy:
        assert proxy.post(CHAT, real_chat("one")).status == 200
        lines = family(proxy.token).items()
        [pid] = [pid for pid, line in lines if "one.gguf" in line]
        os.kill(pid, signal.SIGKILL)
        assert proxy.post(CHAT, real_chat("one")).status == 200
        eventually(lambda: not zombies_of(proxy.pid))
        proxy.kill()
        eventually(lambda: not family(proxy.token), 10)


# ==================================================================================
# The exploration: every order of events in small worlds of the scheduler.
# ==================================================================================

explore = load_tool("explore")


@pytest.mark.parametrize("name", explore.SMALL_WORLDS)
def test_every_order_of_events_in_a_small_world_keeps_all_promises(name):
    followers, traces = explore.explore(name, tickets=2, faults=1)
    assert len(followers) > 50
    waiting = {number for number, trace in enumerate(traces) if trace}
    for number in waiting:
        assert followers[number], traces[number]
    graph = {number: waiting.intersection(followers[number]) for number in waiting}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"goes round\n{traces[error.args[1][0]]}") from None


# ==================================================================================
# Faults: each state of a model, and each thing that can go wrong in it.
# ==================================================================================


def test_faults_at_every_moment_do_what_the_table_says():
    """Some of them; the command `faults` goes through all."""
    faults = load_tool("faults")
    assert faults.faults_main(["machine sleeps", "rubbish", "SIGKILL"]) == 0
    for fault in faults.FAULTS:
        assert all(len(row) == 5 for row in faults.expected_rows(fault))
    lines = faults.FAULT_TABLE.splitlines()
    names = {line.partition("|")[0].strip() for line in lines}
    assert names == {*faults.FAULTS, "fault"}


@pytest.mark.parametrize("kind, reason", [
    ("cmd", "m hung: neither"),
    ("unit", "m (m.service) hung: neither"),
    ("remote", "it does not answer any more"),
])
def test_a_hung_backend_is_restarted_unless_tokens_flow(units, machine, kind, reason):
    units.add("m", port=machine.port)
    sources = {"cmd": "cmd = FAKE", "unit": "unit = m.service", "remote": ""}
    proxy = "" if kind == "cmd" else f"proxy = http://127.0.0.1:{machine.port}"
    text = f"[m]\n{sources[kind]}\n{proxy}\nhang-timeout = 1200ms\nstop-timeout = 0.5\n"
    if kind != "remote":
        machine.off()
    with brisk(text, env=units.env, STALL_CHECK_AFTER=0.1, POLL_INTERVAL=0.05) as server:
        assert server.chat("m").status == 200
        with server.stream("m", tokens=34, interval=0.05) as stream:
            events, silent = stream.events(), server.connect()
            next(events)
            body = chat_body("m", hang=True, hang_health=True)
            silent.send("POST", "/v1/chat/completions", body)
            list(events)
            assert stream.is_complete and reason not in server.log()
        eventually(lambda: reason in server.log())
        silent.hang_up()
        if kind == "remote":
            machine.off()
            machine.on()
        assert server.chat("m").status == 200


# ==================================================================================
# The commands
# ==================================================================================


def main(argv):
    """Run the command that the first argument names; the exit status."""
    if argv and argv[0] in ("bench", "soak", "fuzz", "pictures", "faults"):
        return getattr(load_tool(argv[0]), f"{argv[0]}_main")(argv[1:])
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
