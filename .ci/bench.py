"""The benchmark: each figure of llmswap beside the model server asked directly.

`python3 test_llmswap.py bench --help` tells more.
"""

import contextlib
import functools
import gc
import json
import llmswap
import os
import platform
import re
import resource
import select
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from typing import Optional

from test_llmswap import (
    BrokenAnswer,
    CHAT,
    Client,
    LLAMA_SERVER,
    LLMSWAP,
    ask,
    chat_body,
    cpu_seconds,
    eventually,
    fake_command,
    fake_file,
    free_port,
    gguf,
    is_listening,
    real_chat,
    request_head,
    wakeups,
)


BENCH_USAGE = """\
python3 test_llmswap.py bench [--only NAME,...] [--quick] [--against COMMAND]

Measures llmswap, or with --against another proxy, beside the model server asked
directly, and prints one line for each figure. NAMEs: {names}.

  --quick            shorter: figures are less steady
  --against COMMAND  the command line of another proxy; {{port}} is replaced by the port
                     it must listen on, {{config}} by the file of the models that it
                     must serve, as llama-swap's YAML:
                       llama-swap --config {{config}} --listen 127.0.0.1:{{port}}
                     No shell is run: the process started must be the proxy itself.
  --print-config     print that YAML, which names each model and its command, and end

wrk and nginx measure requests per second where both are installed; else a Python load
generator and the fake server do. Times of one run compare, those of two may not.
"""

BENCH_FOLDER = Path(tempfile.gettempdir()) / "llmswap-bench"
BENCH_FAULTS = (ArithmeticError, AssertionError, BrokenAnswer, LookupError, OSError)

BENCH_NGINX = """\
#!/bin/sh
# nginx as a model server on port $1: an answer of 300 bytes to everything
cat >"{folder}/nginx.conf" <<END
daemon off;
master_process off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    default_type application/json;
    server {{
        listen 127.0.0.1:$1 backlog=1024;
        location / {{ return 200 '{answer}'; }}
    }}
}}
END
exec nginx -e stderr -p "{folder}" -c "{folder}/nginx.conf"
"""


# ----------------------------------------------------------------------------------
# Rows


class BenchRow(NamedTuple):
    """One line of the table; all its numbers are of one unit."""

    name: str
    unit: str
    through: float
    direct: Optional[float] = None
    target: Optional[float] = None
    is_added: bool = False  # the target is for what the proxy adds, not for the whole
    at_least: bool = False  # the target is a lower bound

    def text(self):
        """The line."""
        added = self.through - (self.direct or 0)
        change = "" if self.direct is None else f"{self.through / self.direct:.2f}x"
        if self.is_added and self.direct is not None:
            change = f"+{bench_number(added)}"
        judged = added if self.is_added else self.through
        mark = ""
        if self.target is not None:
            is_met = judged >= self.target if self.at_least else judged <= self.target
            mark = "reached" if is_met else "missed"
        cells = [self.direct, self.through, change, self.target]
        cells = [c if isinstance(c, str) else bench_number(c) for c in cells]
        label = f"{self.name} [{self.unit}]"
        return f"{label:<48}" + "".join(f"{cell:>9}" for cell in cells) + f"  {mark}"


def bench_number(value):
    """Three digits that matter, thousands grouped; nothing for None."""
    if value is None:
        return ""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def bench_title():
    """The line above the rows."""
    cells = "".join(f"{word:>9}" for word in ("direct", "through", "change", "target"))
    return f"{'figure':<48}{cells}"


def bench_percentile(values, share):
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ----------------------------------------------------------------------------------
# What is measured from outside a process


def bench_resident(pid):
    """Resident memory of a process in MB."""
    return llmswap.memory_of(pid)["VmRSS"] / 2**20


# ----------------------------------------------------------------------------------
# The proxy and the servers under measurement


def bench_models(count=10):
    """{name: command} of the models that the proxy must serve, `count` in all."""
    fake = functools.partial(fake_command, "--journal", BENCH_FOLDER / "journal")
    program = Path(__file__).with_name("canned.py").resolve()
    canned = f"{sys.executable} -I -S {program} --port ${{PORT}}"
    models = {
        "swap-a": fake("--model", "swap-a", "--load", "0-2"),
        "swap-b": fake("--model", "swap-b", "--load", "0-2"),
        "a": fake("--model", "a", "--load", "0.5"),
        "b": fake("--model", "b", "--load", "0.5"),
        "canned": canned,
        "rps": canned,
    }
    if shutil.which("wrk") and shutil.which("nginx"):
        models["rps"] = f"sh {BENCH_FOLDER}/nginx.sh ${{PORT}}"
    spares = (f"spare-{number}" for number in range(count - len(models)))
    return {**models, **{name: fake("--model", name) for name in spares}}


def bench_ini(models):
    """The INI file for llmswap."""
    sections = [f"[{name}]\ncmd = {command}\n" for name, command in models.items()]
    return "\n".join(["[llmswap]\nmodels-max = 1\nqueue-max = 2048\n", *sections])


def bench_yaml(models):
    """The same for llama-swap."""
    lines = ["healthCheckTimeout: 60", "startPort: 21000", "models:"]
    for name, command in models.items():
        lines += [f'  "{name}":', f"    cmd: {command}", "    concurrencyLimit: 4096"]
    return "\n".join(lines) + "\n"


def bench_write_files():
    """Write what the models' commands and --against need."""
    BENCH_FOLDER.mkdir(exist_ok=True)
    shutil.copy(fake_file(), BENCH_FOLDER / "fake.pyc")
    (BENCH_FOLDER / "journal").write_text("")
    answer = json.dumps({"choices": [{"message": {"content": "word " * 50}}]})
    script = BENCH_NGINX.format(folder=BENCH_FOLDER, answer=answer)
    (BENCH_FOLDER / "nginx.sh").write_text(script)
    for name, count in (("few", 10), ("many", 500)):
        models = bench_models(count)
        (BENCH_FOLDER / f"{name}.ini").write_text(bench_stable(bench_ini(models)))
        (BENCH_FOLDER / f"{name}.yaml").write_text(bench_stable(bench_yaml(models)))


def bench_stable(text):
    """The text with the fake server where it outlives this process."""
    return text.replace(fake_file(), str(BENCH_FOLDER / "fake.pyc"))


class BenchProxy:
    """The proxy under measurement, while the block lasts."""

    def __init__(self, against=None, config="few"):
        self.port = free_port()
        path = BENCH_FOLDER / config
        words = [sys.executable, LLMSWAP, f"{path}.ini"]
        self._command = [*words, "--listen", f"127.0.0.1:{self.port}"]
        if against:
            command = against.format(port=self.port, config=f"{path}.yaml")
            self._command = shlex.split(command)

    def __enter__(self):
        self.started = time.monotonic()
        with open(BENCH_FOLDER / "log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self.pid = self.process.pid
        self.first_answer = self._await_answer() - self.started
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def _await_answer(self):
        """The time of the first answer on /v1/models."""
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                ask(self.port, "GET", "/v1/models")
                return time.monotonic()
            assert self.process.poll() is None, f"see {BENCH_FOLDER}/log"
            time.sleep(0.0005)


class BenchDirect:
    """A model's server run by itself, to be asked directly."""

    def __init__(self, name):
        self.port = free_port()
        command = bench_stable(bench_models()[name]).replace("${PORT}", str(self.port))
        self._command = command.split()

    def __enter__(self):
        with open(BENCH_FOLDER / "log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        eventually(lambda: is_listening(self.port))
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


class Bench:
    """One run: the proxy with ten models, and how long to measure."""

    def __init__(self, against, is_quick):
        self.against = against
        self.is_quick = is_quick
        self.proxy = None

    def times(self, count):
        """`count`, or a quarter of it when quick."""
        return max(2, count // 4) if self.is_quick else count

    def warm(self, model):
        """Have the proxy load a model."""
        answer = ask(self.proxy.port, "POST", CHAT, chat_body(model), timeout=60)
        assert answer.status == 200, answer

    def unload(self):
        """Have everything unloaded, where the proxy knows how."""
        ask(self.proxy.port, "GET", "/unload")
        time.sleep(0.2)


def bench_journal(offset=0):
    """(events that the fake servers noted after `offset`, the next offset)."""
    with open(BENCH_FOLDER / "journal", "rb") as file:
        file.seek(offset)
        data = file.read()
    return [json.loads(line) for line in data.splitlines()], offset + len(data)


# ----------------------------------------------------------------------------------
# The load generator


def bench_request(model, size=0, **wish):
    """A chat request as bytes, its body of `size` bytes."""
    body = chat_body(model, **wish)
    missing = size - len(json.dumps(body))
    body["messages"][0]["content"] += "x" * max(0, missing)
    data = json.dumps(body).encode()
    return request_head("POST", CHAT, len(data)) + data


def bench_connect(port):
    """A connection that sends at once."""
    sock = socket.create_connection(("127.0.0.1", port), 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def bench_receive(sock):
    """Receive one answer with a Content-Length into nothing."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        assert (more := sock.recv(65536)), f"no answer: {data}"
        data += more
    assert data.startswith(b"HTTP/1.1 200"), data[:500]
    head = data[:end].lower()
    missing = int(head.partition(b"content-length:")[2].partition(b"\r")[0])
    missing -= len(data) - end - 4
    buffer = bytearray(2**20)
    while missing:  # MSG_TRUNC: the kernel drops the bytes instead of copying them
        got = sock.recv_into(buffer, min(missing, len(buffer)), socket.MSG_TRUNC)
        assert got, "the answer was cut"
        missing -= got


def bench_latencies(sock, request, count):
    """Seconds that each of `count` requests in turn took on one connection."""
    latencies = []
    for _ in range(count):
        started = time.perf_counter()
        sock.sendall(request)
        data = sock.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
        missing = int(length) - len(body)
        while missing > 0:
            assert (more := sock.recv(65536)), "the answer was cut"
            missing -= len(more)
        latencies.append(time.perf_counter() - started)
    return latencies


class BenchStreams:
    """Many streams received by one thread; how late each token came."""

    def __init__(self, port, model, count, rate):
        self.lateness = []
        self._poll = select.epoll()
        self._socks = {}
        request = bench_request(model, stream=True, tokens=10**6, interval=1 / rate)
        for _ in range(count):
            sock = bench_connect(port)
            sock.sendall(request)
            self._socks[sock.fileno()] = sock
            self._poll.register(sock, select.EPOLLIN)

    def run(self, seconds):
        """Receive; return the lateness (s) of the tokens that came meanwhile."""
        self.lateness = []
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for descriptor, _ in self._poll.poll(left):
                self._receive(self._socks[descriptor])
        return self.lateness

    def _receive(self, sock):
        data = sock.recv(65536)
        now = time.monotonic()
        assert data, "a stream ended"
        for piece in data.split(b'"content":')[1:]:
            stamp = piece.lstrip(b' "')[:16]
            if len(stamp) == 16:
                self.lateness.append(now - float(stamp))

    def close(self):
        """Hang up."""
        for sock in self._socks.values():
            sock.close()


def bench_rate(port, model, connections, seconds):
    """Requests per second in closed loops over that many connections."""
    if shutil.which("wrk") and shutil.which("nginx"):
        return bench_wrk(port, model, connections, seconds)
    request, count = bench_request(model), 0
    poll, socks = select.epoll(), [bench_connect(port) for _ in range(connections)]
    by_descriptor = {sock.fileno(): sock for sock in socks}
    for sock in socks:
        poll.register(sock, select.EPOLLIN)
        sock.sendall(request)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for descriptor, _ in poll.poll(1):
            bench_receive(by_descriptor[descriptor])
            by_descriptor[descriptor].sendall(request)
            count += 1
    return count / seconds


def bench_wrk(port, model, connections, seconds):
    """The same measured by wrk."""
    script = BENCH_FOLDER / "wrk.lua"
    body = json.dumps(chat_body(model)).replace("\\", "\\\\").replace("'", "\\'")
    script.write_text(
        f"wrk.method = 'POST'\nwrk.body = '{body}'\n"
        "wrk.headers['Content-Type'] = 'application/json'\n"
    )
    url = f"http://127.0.0.1:{port}{CHAT}"
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), url]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text and "Socket errors" not in text, text
    return float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])


def bench_threads(calls):
    """Run all calls at once, each in a thread; their results, in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


# ----------------------------------------------------------------------------------
# The figures: each yields rows


def bench_swap(bench):
    """What is added around a server's own start, without the start of its process."""
    bench.unload()
    names = ["swap-a", "swap-b"] * (bench.times(24) // 2)
    swaps = bench_swaps(bench.proxy.port, names)
    before, after = zip(*swaps)
    both = [sum(swap) * 1000 for swap in swaps]
    median = statistics.median(both)
    yield BenchRow("swap: added around a start, median", "ms", median, target=10)
    yield BenchRow("swap: the same, maximum", "ms", max(both), target=25)
    part = statistics.median(before) * 1000
    yield BenchRow("swap: of it, from request to spawn", "ms", part)
    part = statistics.median(after) * 1000
    yield BenchRow("swap: of it, from ready to first byte", "ms", part)


def bench_swaps(port, names):
    """(seconds from request to spawn, from ready to first byte) of each swap but one.

    The start of the process itself is measured before each swap, so that both see the
    same machine, and its median taken off. The first swap stops no model: it is
    left out.
    """
    starts, swaps = [], []
    for name in names:
        starts.append(bench_process_start())
        swaps.append(bench_swap_once(port, name))
    cost = statistics.median(starts)
    return [(before - cost, after) for before, after in swaps[1:]]


def bench_process_start():
    """Seconds from the call that starts a fake server to its first instruction."""
    command = bench_stable(bench_models()["spare-0"]).replace("${PORT}", "0").split()
    _, offset = bench_journal()
    started = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        main = eventually(lambda: bench_event("main", process.pid, offset))
        process.kill()
    return main["t"] - started


def bench_event(kind, pid, offset):
    """The first event of that kind and process after `offset`, or None."""
    events, _ = bench_journal(offset)
    return next((e for e in events if (e["event"], e["pid"]) == (kind, pid)), None)


def bench_swap_once(port, name):
    """(seconds from request to the process's main, from ready to first byte)."""
    _, offset = bench_journal()
    request = bench_request(name)
    with contextlib.closing(bench_connect(port)) as sock:
        asked = time.monotonic()
        sock.sendall(request)
        head = sock.recv(65536)
        answered = time.monotonic()
    assert head.startswith(b"HTTP/1.1 200"), head
    events = [e for e in bench_journal(offset)[0] if e["model"] == name]
    times = {event["event"]: event["t"] for event in events}
    return times["main"] - asked, answered - times["ready"]


def bench_chat(bench):
    """What is added to a chat of 2 KB with a warm model, one connection."""
    bench.warm("canned")
    samples = {"direct": [], "through": []}
    with BenchDirect("canned") as server:
        ports = {"direct": server.port, "through": bench.proxy.port}
        socks = {name: bench_connect(port) for name, port in ports.items()}
        request = bench_request("canned", 2048)
        for turn in range(bench.times(24) + 1):
            for name, sock in socks.items():
                latencies = bench_latencies(sock, request, 200)
                samples[name] += latencies if turn else []
    for share in (0.5, 0.99):
        values = [bench_percentile(samples[name], share) * 1e6 for name in samples]
        name = f"chat: a warm one of 2 KB, p{share * 100:.0f}"
        target = 110 if share == 0.5 else 200
        yield BenchRow(name, "us", values[1], values[0], target, is_added=True)


def bench_streams(bench):
    """How late the tokens of 32 streams at 50 a second come, and what one costs."""
    bench.warm("canned")
    seconds = bench.times(12)
    with BenchDirect("canned") as server:
        direct, _, _ = bench_lateness(server.port, server.process.pid, 32, 50, seconds)
    pid = bench.proxy.pid
    through, cost, _ = bench_lateness(bench.proxy.port, pid, 32, 50, seconds)
    for share, target in ((0.5, 0.09), (0.99, 0.6)):
        values = [bench_percentile(times, share) * 1000 for times in (through, direct)]
        name = f"streams: 32 at 50/s, a token late, p{share * 100:.0f}"
        yield BenchRow(name, "ms", *values, target)
    cost *= 1e6
    yield BenchRow("streams: processor time for each token", "us", cost, target=35)


def bench_lateness(port, pid, count, rate, seconds):
    """(lateness of tokens, processor s of `pid` for each, its KB for each stream)."""
    resident = bench_resident(pid)
    streams = BenchStreams(port, "canned", count, rate)
    try:
        streams.run(1 + count / 500)
        cpu = cpu_seconds(pid)
        lateness = streams.run(seconds)
        cost = (cpu_seconds(pid) - cpu) / len(lateness)
        expected = count * rate * seconds
        assert len(lateness) > 0.9 * expected, f"{len(lateness)} of {expected} tokens"
        return lateness, cost, (bench_resident(pid) - resident) * 1024 / count
    finally:
        streams.close()
        time.sleep(0.5)


def bench_download(bench):
    """An answer of 512 MB."""
    bench.warm("canned")
    size, times = 512 * 2**20, bench.times(7)
    with BenchDirect("canned") as server:
        direct, _ = bench_download_rate(server.port, server.process.pid, size, times)
    through, cost = bench_download_rate(bench.proxy.port, bench.proxy.pid, size, times)
    target = 2300 if sys.version_info >= (3, 10) else 1300
    name = "download: an answer of 512 MB"
    yield BenchRow(name, "MB/s", through, direct, target, at_least=True)
    yield BenchRow("download: processor time for 1 GB", "s", cost, target=0.25)


def bench_download_rate(port, pid, size, times):
    """(MB/s, processor seconds of `pid` for 1 GB), medians."""
    rates, costs = [], []
    request = bench_request("canned", bytes=size)
    with contextlib.closing(bench_connect(port)) as sock:
        for _ in range(times):
            cpu, started = cpu_seconds(pid), time.monotonic()
            sock.sendall(request)
            bench_receive(sock)
            rates.append(size / 1e6 / (time.monotonic() - started))
            costs.append((cpu_seconds(pid) - cpu) * 1e9 / size)
    return statistics.median(rates), statistics.median(costs)


def bench_upload(bench):
    """A request of 40 MB (an image in JSON), its model named first or last."""
    bench.warm("canned")
    image = "data:image/png;base64," + "iVBORw0KGgoA" * (40 * 10**6 // 12)
    part = {"type": "image_url", "image_url": {"url": image}}
    messages = [{"role": "user", "content": [part]}]
    bodies = {
        "first": {"model": "canned", "messages": messages},
        "last": {"messages": messages, "model": "canned"},
    }
    for place, body in bodies.items():
        data = json.dumps(body).encode()
        with BenchDirect("canned") as server:
            direct = bench_upload_time(server.port, data, bench.times(9))
        through = bench_upload_time(bench.proxy.port, data, bench.times(9))
        name = f"upload: 40 MB, the model named {place}"
        yield BenchRow(name, "ms", through, direct, 50)
    time.sleep(0.5)  # what the last request held is freed after its answer
    resident = bench_resident(bench.proxy.pid)
    yield BenchRow("upload: resident afterwards", "MB", resident, target=35)


def bench_upload_time(port, data, times):
    """Milliseconds from the first byte sent to the end of the answer, median."""
    head, durations = request_head("POST", CHAT, len(data)), []
    with contextlib.closing(bench_connect(port)) as sock:
        for _ in range(times):
            started = time.monotonic()
            sock.sendall(head)
            sock.sendall(data)
            bench_receive(sock)
            durations.append((time.monotonic() - started) * 1000)
    return statistics.median(durations)


def bench_rps(bench):
    """Small requests as fast as they go."""
    bench.warm("rps")
    seconds = bench.times(8)
    for connections, target in ((1, 5500), (32, 8000)):
        with BenchDirect("rps") as server:
            direct = bench_rate(server.port, "rps", connections, seconds)
        through = bench_rate(bench.proxy.port, "rps", connections, seconds)
        name = f"requests per second, connections: {connections}"
        yield BenchRow(name, "1/s", through, direct, target, at_least=True)


def bench_alternate(bench):
    """Four clients in closed loops, two of them asking a, two b; one may be loaded."""
    bench.unload()
    _, offset = bench_journal()
    loop = functools.partial(bench_loop, bench.proxy.port, count=10, delay=0.05)
    started = time.monotonic()
    bench_threads([functools.partial(loop, model) for model in "abab"])
    seconds = time.monotonic() - started
    loads = sum(event["event"] == "main" for event in bench_journal(offset)[0])
    yield BenchRow("four clients, two models: loads", "n", loads, target=2)
    yield BenchRow("four clients, two models: all done after", "s", seconds, target=2.3)


def bench_loop(port, model, count, delay):
    """Ask `count` times, one after the other."""
    with Client(port, 120) as client:
        for _ in range(count):
            answer = client.ask("POST", CHAT, chat_body(model, delay=delay))
            assert answer.status == 200, answer


def bench_fair(bench):
    """b, while three clients keep a busy with requests that overlap."""
    bench.warm("b")
    bench.warm("a")
    stop = threading.Event()
    port = bench.proxy.port
    busy = [functools.partial(bench_keep_busy, port, n, stop) for n in range(3)]
    asking = functools.partial(bench_ask_b, port, stop)
    waited = bench_threads([asking, *busy])[0]
    yield BenchRow("three clients keep a busy: b waits", "s", waited, target=2.5)


def bench_keep_busy(port, number, stop):
    """Ask a for 0.3 s each time, until told to stop; the clients' turns overlap."""
    time.sleep(number * 0.1)
    with Client(port, 120) as client:
        while not stop.is_set():
            client.ask("POST", CHAT, chat_body("a", delay=0.3))


def bench_ask_b(port, stop):
    """Seconds that a request to b takes; it gives up after 20."""
    time.sleep(2)
    started = time.monotonic()
    with contextlib.suppress(socket.timeout):
        ask(port, "POST", CHAT, chat_body("b"), timeout=20)
    stop.set()
    return time.monotonic() - started


def bench_waiters(bench):
    """Forty, then five hundred requests for one model that is not loaded."""
    for count in (40, 500):
        bench.warm("a")
        _, offset = bench_journal()
        answered = bench_crowd(bench.proxy.port, "b", count)
        events, _ = bench_journal(offset)
        starts = sum(e["event"] == "main" for e in events)
        ready = max(e["t"] for e in events if e["event"] == "ready")
        yield BenchRow(f"{count} waiters: starts", "n", starts, target=1)
        late = (answered - ready) * 1000
        yield BenchRow(f"{count} waiters: from ready to the last answer", "ms", late)


def bench_crowd(port, model, count):
    """Send that many requests at once; the time of the last answer."""
    request = bench_request(model)
    socks = [bench_connect(port) for _ in range(count)]
    for sock in socks:
        sock.sendall(request)
    for sock in socks:
        bench_receive(sock)
        sock.close()
    return time.monotonic()


def bench_start(bench):
    """From the start of the process to the first answer on /v1/models."""
    durations = []
    for _ in range(bench.times(8)):
        with BenchProxy(bench.against) as proxy:
            durations.append(proxy.first_answer * 1000)
    median = statistics.median(durations)
    yield BenchRow("start to first answer on /v1/models", "ms", median, target=75)


def bench_idle(bench):
    """Wake-ups with a model loaded and nothing asked."""
    bench.warm("canned")
    time.sleep(2)
    seconds = bench.times(20)
    before = wakeups(bench.proxy.pid)
    time.sleep(seconds)
    count = (wakeups(bench.proxy.pid) - before) * 10 / seconds
    yield BenchRow("idle, a model loaded: wake-ups in 10 s", "n", count, target=0)


def bench_growth(bench):
    """One to a thousand open streams at 5 tokens a second, on a fresh proxy."""
    with BenchProxy(bench.against) as proxy, BenchDirect("canned") as server:
        ask(proxy.port, "POST", CHAT, chat_body("canned"))
        seconds = bench.times(8)
        for count in (1, 30, 1000):
            lateness, _, _ = bench_lateness(server.port, proxy.pid, count, 5, seconds)
            direct = bench_percentile(lateness, 0.99) * 1000
            through = proxy.port, proxy.pid
            lateness, cost, size = bench_lateness(*through, count, 5, seconds)
            late = bench_percentile(lateness, 0.99) * 1000
            name = f"{count} streams at 5/s"
            yield BenchRow(f"{name}: a token late, p99", "ms", late, direct, 5)
        yield BenchRow(f"{name}: memory for each", "KB", size, target=60)
        yield BenchRow(f"{name}: processor time for a token", "us", cost * 1e6)


def bench_many(bench):
    """Five hundred models in the file."""
    with BenchProxy(bench.against, "many") as proxy:
        start = proxy.first_answer * 1000
        yield BenchRow("500 models: start to first answer", "ms", start)
        durations = []
        for _ in range(bench.times(20)):
            started = time.monotonic()
            ask(proxy.port, "GET", "/v1/models")
            durations.append((time.monotonic() - started) * 1000)
        median = statistics.median(durations)
        yield BenchRow("500 models: /v1/models", "ms", median, target=10)
        swaps = bench_swaps(proxy.port, ["spare-7", "spare-400"] * 5)
        part = statistics.median(before for before, _ in swaps) * 1000
        yield BenchRow("500 models: from request to spawn", "ms", part, target=10)


def bench_memory(bench):
    """Resident memory after everything that was asked so far."""
    resident = bench_resident(bench.proxy.pid)
    yield BenchRow("resident after all of the above", "MB", resident, target=35)


def bench_memory_idle(bench):
    """Resident memory of a fresh proxy with ten models."""
    with BenchProxy(bench.against) as proxy:
        time.sleep(2)
        resident = bench_resident(proxy.pid)
    yield BenchRow("resident when idle, 10 models", "MB", resident, target=24)


BENCH_SIZES = {"2 MB": (128, 2), "200 MB": (512, 16)}  # width and layers
BENCH_PRESET = """\
version = 1
[*]
ctx-size = 256
threads = 1
[one]
model = {one}
[two]
model = {two}
"""


def bench_real(bench):
    """Two real models asked in turn, each request a swap, beside llama.cpp's router."""
    assert LLAMA_SERVER and not bench.against, "needs LLAMA_SERVER, and no --against"
    listen = ("--listen", "127.0.0.1:")
    commands = {
        "through": ([sys.executable, LLMSWAP, "{preset}"], listen),
        "router": ([LLAMA_SERVER, "--models-preset", "{preset}"], ("--port", "")),
    }
    for size, shape in BENCH_SIZES.items():
        paths = {name: BENCH_FOLDER / f"{name}.gguf" for name in ("one", "two")}
        for seed, path in enumerate(paths.values()):
            gguf.write_model(path, *shape, seed=seed)
        preset = BENCH_FOLDER / "real.ini"
        preset.write_text(BENCH_PRESET.format(**paths))
        medians = {
            name: bench_real_swap(words, option, preset, bench.times(24))
            for name, (words, option) in commands.items()
        }
        name = f"real models of {size}: a swap (direct: router)"
        yield BenchRow(name, "ms", medians["through"], medians["router"])


def bench_real_swap(words, option, preset, times):
    """Milliseconds from a request to its answer when the other model is loaded."""
    port, (name, prefix) = free_port(), option
    argv = [word.format(preset=preset) for word in words]
    argv += ["--models-max", "1", name, f"{prefix}{port}"]
    environ = {
        **os.environ,
        "PATH": f"{Path(LLAMA_SERVER).parent}:{os.environ['PATH']}",
    }
    with open(BENCH_FOLDER / "log", "ab") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=environ)
    durations = []
    try:
        eventually(lambda: is_listening(port))
        for turn in range(times + 2):
            body = real_chat("one" if turn % 2 else "two")
            started = time.monotonic()
            answer = ask(port, "POST", CHAT, body, timeout=60)
            assert answer.status == 200, answer.body[:300]
            durations.append((time.monotonic() - started) * 1000)
    finally:
        process.terminate()
        process.wait(60)
    return statistics.median(durations[2:])


BENCH_FIGURES = {
    "start": bench_start,
    "resident": bench_memory_idle,
    "swap": bench_swap,
    "real": bench_real,
    "alternate": bench_alternate,
    "fair": bench_fair,
    "waiters": bench_waiters,
    "chat": bench_chat,
    "streams": bench_streams,
    "download": bench_download,
    "upload": bench_upload,
    "rps": bench_rps,
    "idle": bench_idle,
    "memory": bench_memory,
    "growth": bench_growth,
    "many": bench_many,
}


# ----------------------------------------------------------------------------------
# The command


def bench_main(argv):
    """Run the benchmark, a line for each figure; the exit status."""
    if "--help" in argv:
        print(BENCH_USAGE.format(names=", ".join(BENCH_FIGURES)))
        return 0
    bench_write_files()
    if "--print-config" in argv:
        print((BENCH_FOLDER / "few.yaml").read_text(), end="")
        return 0
    against = argv[argv.index("--against") + 1] if "--against" in argv else None
    chosen = argv[argv.index("--only") + 1].split(",") if "--only" in argv else None
    if unknown := set(chosen or ()) - set(BENCH_FIGURES):
        print(f"no such figure: {', '.join(unknown)}; see --help", file=sys.stderr)
        return 2
    bench_prepare()
    print(bench_machine(against), bench_title(), sep="\n\n", flush=True)
    bench = Bench(against, "--quick" in argv)
    with BenchProxy(against) as bench.proxy:
        for name in chosen or BENCH_FIGURES:
            bench_print(bench, name)
    return 0


def bench_prepare():
    """Have descriptors enough, and no pauses of our own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.freeze()
    gc.disable()


def bench_machine(against):
    """One line on where and what is measured."""
    text = Path("/proc/cpuinfo").read_text()
    processor = re.search(r"model name\s*: (.*)", text)
    names = [
        processor[1] if processor else platform.machine(),
        f"{os.cpu_count()} cores",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        against or "llmswap",
    ]
    return ", ".join(names)


def bench_print(bench, name):
    """Print a figure's rows, or why there are none: the proxy may be at fault."""
    try:
        for row in BENCH_FIGURES[name](bench):
            print(row.text(), flush=True)
    except BENCH_FAULTS as error:
        reason = f"{type(error).__name__} {error}"[:250]
        print(f"{name:<48} not measured: {reason}", flush=True)
