"""The soak: random clients, kills, unloads and reloads; nothing stuck, leaked or lying.

`python3 test_llmswap.py soak --help` tells more.
"""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

from test_llmswap import (
    BrokenAnswer,
    CHAT,
    Client,
    Llmswap,
    Stream,
    UpstreamResponse,
    chat_body,
    eventually,
    family,
    soak_size,
    word_after,
    zombies_of,
)


SOAK_USAGE = """\
python3 test_llmswap.py soak [--minutes M] [--seed N] [--clients N] [--cores N]

Random clients ask seven models of which two may be loaded, while servers are killed,
models loaded and unloaded by hand, the file rewritten, and llmswap itself ended or
killed and started again (in the first tenth of the time, so that the last process lives
long enough to show a leak), all on so many cores. Each client checks its own answer;
threads, descriptors and memory may not grow from one half of the rest to the other; at
the end all must be quiet and given back. Exit status 1 if anything was not as promised,
with the evidence.
"""

SOAK_BOUND = 60.0  # seconds that no request may take
SOAK_LOG = os.path.join(tempfile.gettempdir(), "llmswap-soak.log")
SOAK_MODELS = {
    "quick": "cmd = FAKE --model quick --load 0-0.2\nidle-timeout = 1s\n",
    "narrow": "cmd = FAKE --model narrow --load 0-0.4\nconcurrency = 2\n",
    "stubborn": "cmd = FAKE --model stubborn --ignore-term --grandchild\n"
    "stop-timeout = 1\n",
    "closing": "cmd = FAKE --model closing --close-idle --load 0.1 --lines 50\n",
    "bare": "cmd = FAKE --model bare --no-health --load 0.1\n"
    "check-endpoint = /v1/models\nalias = naked\n",
    "failing": "cmd = FAKE --model failing --load 0.1 --load-exit 3 --lines 5\n",
    "other-name": 'uses = quick\nset-params = {"tokens": 5}\n',
}
SOAK_EXTRA = "cmd = FAKE --model extra --load 0-0.3\nidle-timeout = 2s\n"
SOAK_HEAD = "[llmswap]\nmodels-max = 2\npatience = 300ms\n\n"
SOAK_EDITS = (
    "pin = on\n",
    "idle-timeout = 1s\n",
    "concurrency = 1\n",
    "description = edited\n",
    "env.EDITED = 1\n",
    "loading-notice = off\n",
)
SOAK_BROKEN = (
    "[llmswap\nmodels-max = 2\n",
    "[llmswap]\nmodels-max = several\n",
    "[llmswap]\nno such key = 1\n",
)


class SoakViolation(Exception):
    """Something that must not happen did; the text is the evidence."""


class SoakSilence(SoakViolation):
    """No answer at all, which is allowed only during a restart of llmswap."""


def soak_require(condition, evidence):
    """Raise the evidence unless the condition holds."""
    if not condition:
        raise SoakViolation(evidence)


def soak_ini(models):
    """The INI file with these models."""
    return SOAK_HEAD + "\n".join(f"[{name}]\n{body}" for name, body in models.items())


class SoakTally:
    """What happened, counted by all threads."""

    def __init__(self):
        self.outcomes = Counter()  # (action, outcome)
        self.refusals = Counter()  # (status, the message's beginning)
        self.chaos = Counter()
        self.slowest = {}
        self.violations = []
        self.peaks = {"early": Counter(), "late": Counter()}  # in either half
        self.restarts = 0  # counts the beginning and the end of each
        self._lock = threading.Lock()

    def count(self, action, outcome, seconds):
        with self._lock:
            self.outcomes[action, outcome] += 1
            slowest = seconds, f"ended at {time.strftime('%H:%M:%S')}"
            self.slowest[action] = max(slowest, self.slowest.get(action, slowest))

    def refuse(self, status, message):
        with self._lock:
            self.refusals[status, " ".join(message.split())[:70]] += 1

    def violate(self, evidence):
        with self._lock:
            self.violations.append(f"{time.strftime('%H:%M:%S')} {evidence}")

    def peak(self, half, sizes):
        """Remember the largest sizes of a half."""
        for name, value in sizes.items():
            self.peaks[half][name] = max(self.peaks[half][name], value)


# ----------------------------------------------------------------------------------
# Clients: each action returns its outcome, complete, refused, broken or hung up


class SoakClient:
    """One client: asks one thing after the other, and checks what it is told."""

    def __init__(self, server, tally, seed, stop):
        self.server = server
        self.tally = tally
        self.random = random.Random(seed)
        self.stop = stop
        self.connection = self.connected = None  # and the count of restarts then

    def run(self):
        """Ask until told to stop."""
        while not self.stop.is_set():
            actions, weights = list(SOAK_ACTIONS), list(SOAK_ACTIONS.values())
            action = self.random.choices(actions, weights)[0]
            self._try(action)
            if self.random.random() < 0.3:
                self.stop.wait(self.random.random() ** 3)
        self._disconnect()

    def _try(self, action):
        started, restarts = time.monotonic(), self.tally.restarts
        try:
            outcome = action(self)
        except (SoakSilence, BrokenAnswer, OSError) as error:
            outcome = "broken"
            if restarts % 2 == 0 and restarts == self.tally.restarts:
                outcome = "violation"
                self.tally.violate(f"{action.__name__}: {error!r}"[:1500])
            self.stop.wait(0.1)
        except SoakViolation as violation:
            self.tally.violate(f"{action.__name__}: {violation}")
            outcome = "violation"
        except (AssertionError, ValueError, KeyError) as error:
            self.tally.violate(f"{action.__name__}: {error!r}"[:1500])
            outcome = "violation"
        if outcome not in ("complete", "refused"):
            self._disconnect()
        self.tally.count(action.__name__[5:], outcome, time.monotonic() - started)

    def _disconnect(self):
        if self.connection:
            self.connection.hang_up()
        self.connection = None

    def model(self):
        """A name to ask for; the failing and the missing ones less often."""
        names = [*SOAK_MODELS, "naked", "extra"]
        weights = [0.2 if name == "failing" else 1 for name in names]
        return self.random.choices(names, weights)[0]

    def connect(self):
        """The connection of before (if it leads to this llmswap), or a new one."""
        restarts, is_tired = self.tally.restarts, self.random.random() < 0.2
        if not self.connection or self.connected != restarts or is_tired:
            self._disconnect()
            self.connection = Client(self.server.port, SOAK_BOUND)
            self.connected = restarts
        return self.connection

    def chat(self, model, **wish):
        """(a body whose answer will carry a tag of its own, that tag)."""
        tag = f"tag{self.random.randrange(10**12)}"
        return chat_body(model, tag=tag, **wish), tag

    def ask(self, model, path, body, headers=()):
        """The answer to a POST, None if its body was cut, which is allowed."""
        connection = self.connect()
        with contextlib.suppress(ConnectionError):  # refused in mid-body: read on
            connection.send("POST", path, body, headers)
        answer = self.finish(connection, model)
        if answer is None or answer.headers.get("connection", "").lower() == "close":
            self._disconnect()
        return answer

    def finish(self, connection, model):
        """The answer that begins now, or None if it is cut after its head."""
        status, headers = soak_answered(connection.head, model)
        try:
            body = b"".join(connection.pieces(status, headers))
        except socket.timeout:
            raise SoakViolation(f"{model} stopped in mid-answer") from None
        except (BrokenAnswer, OSError):
            return None
        return UpstreamResponse(status, headers, body)

    def outcome(self, answer, model):
        """broken or refused, or None if there is an answer to be checked."""
        if answer is None:
            return "broken"
        if answer.status == 200:
            return None
        soak_check_error(answer.status, answer.body, model)
        self.tally.refuse(answer.status, json.loads(answer.body)["error"]["message"])
        return "refused"


def soak_answered(call, model):
    """What `call` returns; a request that gets no head at all is a violation."""
    try:
        return call()
    except socket.timeout:
        raise SoakViolation(f"{model} waited over {SOAK_BOUND} s") from None
    except (BrokenAnswer, OSError) as error:
        raise SoakSilence(f"{model} got no answer at all: {error!r}") from None


def soak_check_error(status, body, model):
    """An error must have OpenAI's shape, and a status that fits what happens here."""
    try:
        error = json.loads(body)["error"]
        shape = {name: type(error[name]) for name in ("message", "type")}
    except (ValueError, KeyError, TypeError):
        raise SoakViolation(f"{model}: {status} with the body {body[:300]}") from None
    soak_require(shape == {"message": str, "type": str}, f"{model}: {error}")
    allowed = {502, 503, 504} | ({404} if model == "extra" else set())
    soak_require(status in allowed, f"{model}: {status} {error}")


def soak_server_name(model):
    """The name of the fake server that must answer for a model."""
    return {"other-name": "quick", "naked": "bare"}.get(model, model)


def soak_chat(client):
    """A chat answered whole."""
    model = client.model()
    wish = {"delay": round(client.random.random() ** 4, 3)}
    wish["size"] = client.random.choice([0, 0, 1000, 300000])
    body, tag = client.chat(model, **wish)
    answer = client.ask(model, CHAT, body)
    return client.outcome(answer, model) or soak_check_content(answer, model, tag)


def soak_check_content(answer, model, tag):
    """complete, if the right server answered."""
    soak_check_text(answer.content(), model, tag)
    return "complete"


def soak_check_text(text, model, tag):
    """The right server must have answered the right request."""
    words = text.split()
    soak_require(
        words[0] == soak_server_name(model) and words[2].startswith(tag),
        f"{model} with {tag} was answered: {text[:200]}",
    )


def soak_stream(client):
    """A stream read to its end."""
    tokens = client.random.randrange(1, 60)
    return soak_read_stream(client, {"tokens": tokens, "interval": 0.01})


def soak_slow_reader(client):
    """A stream of a megabyte, read slowly."""
    wish = {"tokens": 20, "size": 1000000}
    return soak_read_stream(client, wish, pause=client.random.random() / 20)


def soak_dying(client):
    """A stream in the middle of which the server dies, or cuts the connection."""
    place = client.random.choice(["before-byte", "mid-event", "boundary", "mid-body"])
    how = client.random.choice(["die", "cut"])
    return soak_read_stream(client, {"tokens": 6, how: place})


def soak_read_stream(client, wish, pause=0.0):
    """Read a stream as the server sends it; it must end with [DONE] or be broken."""
    model, events = client.model(), []
    body, tag = client.chat(model, stream=True, **wish)
    args = client.server.port, CHAT, body, (), SOAK_BOUND
    with soak_answered(lambda: Stream(*args), model) as stream:
        try:
            if stream.status != 200:
                return soak_refused_stream(client, stream, model)
            for event in stream.events():
                events.append(event)
                time.sleep(pause)
        except socket.timeout:
            evidence = f"{model} with {tag} stopped after {events[-1:]}"
            raise SoakViolation(evidence) from None
        except (BrokenAnswer, ConnectionError):
            return "broken"
    return soak_check_events(client, events, model, tag)


def soak_refused_stream(client, stream, model):
    """refused, if the error is one."""
    pieces = stream.client.pieces(stream.status, stream.headers)
    answer = UpstreamResponse(stream.status, stream.headers, b"".join(pieces))
    return client.outcome(answer, model)


def soak_check_events(client, events, model, tag):
    """A stream that ended cleanly: whole, or with an error event."""
    soak_require(events, f"{model} with {tag}: a stream without an event ended cleanly")
    last = events[-1]
    if last == "[DONE]" and not any('"error"' in event[:20] for event in events):
        documents = [json.loads(event) for event in events[:-1]]
        choices = [each["choices"] for each in documents if each.get("choices")]
        texts = [choice[0]["delta"].get("content") or "" for choice in choices]
        finish = choices[-1][0]["finish_reason"]
        soak_require(finish, f"{model}: no finish reason in {events[-3:]}")
        soak_check_text("".join(texts), model, tag)
        return "complete"
    errors = [event for event in events if event.startswith('{"error"')]
    soak_require(errors, f"{model} with {tag}: ended cleanly after {events[-2:]}")
    client.tally.refuse("event", json.loads(errors[0])["error"]["message"])
    return "refused"


def soak_hang_up(client):
    """A request whose client goes away at a random moment."""
    body, _ = client.chat(
        client.model(),
        stream=client.random.random() < 0.5,
        tokens=50,
        interval=0.02,
        delay=client.random.choice([0, 1, 30]),
    )
    with Client(client.server.port, SOAK_BOUND) as connection:
        connection.send("POST", CHAT, body)
        with contextlib.suppress(OSError):
            soak_listen(connection.sock, client.random.random() ** 2 * 2)
        connection.hang_up(reset=client.random.random() < 0.3)
    return "hung up"


def soak_listen(sock, seconds):
    """Receive for that long, or to the end of the answer."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        if not sock.recv(65536):
            return


def soak_half_request(client):
    """A request that stops in the middle of its head or body."""
    body, _ = client.chat(client.model())
    with Client(client.server.port, SOAK_BOUND) as connection:
        data = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        data += b"Content-Length: 5000\r\n\r\n" + json.dumps(body).encode()
        connection.sock.sendall(data[: client.random.randrange(1, len(data))])
        time.sleep(client.random.random() / 2)
    return "hung up"


def soak_upload(client):
    """A body of some megabytes, which the server must get byte for byte."""
    model = client.random.choice(["narrow", "stubborn", "closing", "bare"])
    filler = "x" * client.random.randrange(10**4, 6 * 10**6)
    fields = [("model", model), ("filler", filler)]
    client.random.shuffle(fields)
    body = json.dumps(dict(fields)).encode()
    answer = client.ask(model, "/echo", body)
    if outcome := client.outcome(answer, model):
        return outcome
    seen = answer.json()
    soak_require(seen["sha256"] == sha256(body).hexdigest(), f"{model}: altered {seen}")
    soak_require(seen["model"] == model, f"{model} was answered by {seen['model']}")
    return "complete"


def soak_form(client):
    """Audio in a multipart form, the model in a field before or after the file."""
    model = client.random.choice(["quick", "narrow", "bare"])
    size = client.random.randrange(10, 3 * 10**6)
    parts = [
        f'Content-Disposition: form-data; name="model"\r\n\r\n{model}\r\n',
        'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + "z" * size
        + "\r\n",
    ]
    client.random.shuffle(parts)
    body = "".join(f"--limit\r\n{part}" for part in parts) + "--limit--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=limit"}
    answer = client.ask(model, "/v1/audio/transcriptions", body.encode(), headers)
    if outcome := client.outcome(answer, model):
        return outcome
    length = answer.json()["fields"]["file"]["size"]
    soak_require(length == size, f"{model}: {length} bytes of {size}")
    return "complete"


def soak_embeddings(client):
    """Embeddings of some texts."""
    model, count = client.model(), client.random.randrange(1, 50)
    body = {"model": model, "input": ["text"] * count}
    answer = client.ask(model, "/v1/embeddings", body)
    if outcome := client.outcome(answer, model):
        return outcome
    document = answer.json()
    soak_require(len(document["data"]) == count, f"{model}: {document}")
    name = document["served_by"].split()[0]
    soak_require(name == soak_server_name(model), f"{model} was answered by {name}")
    return "complete"


def soak_websocket(client):
    """An upgraded connection that sends and gets back some bytes; it may be cut."""
    model = client.random.choice(["quick", "narrow", "bare"])
    headers = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    with Client(client.server.port, SOAK_BOUND) as connection:
        connection.send("GET", f"/upstream/{model}/ws", None, headers)
        answer = client.finish(connection, model)
        if answer.status == 409:  # it is not loaded, and this path does not load it
            return "refused"
        if answer.status != 101:
            return client.outcome(answer, model)
        return soak_echo(client, connection, model)


def soak_echo(client, connection, model):
    """complete if all comes back as it was sent, broken if cut."""
    for _ in range(client.random.randrange(1, 10)):
        sent = client.random.randbytes(client.random.randrange(1, 5000))
        try:
            connection.sock.sendall(sent)
            got = b"".join(connection.exactly(len(sent)))
        except socket.timeout:
            raise SoakViolation(f"{model}: a websocket went silent") from None
        except (BrokenAnswer, OSError):
            return "broken"
        soak_require(got == sent, f"{model}: a websocket altered its bytes")
        time.sleep(client.random.random() / 10)
    return "complete"


def soak_listing(client):
    """What llmswap answers itself, whatever goes on."""
    path = client.random.choice(["/v1/models", "/health", "/running", "/props"])
    started = time.monotonic()
    answer = client.server.get(path)
    soak_require(answer.status == 200 and answer.json(), f"{path}: {answer}")
    waited = time.monotonic() - started
    soak_require(waited < 3, f"{path} took {waited:.1f} s")
    return "complete"


SOAK_UNCOMPLETED = {"dying", "hang_up", "half_request"}  # meant to be broken
SOAK_ACTIONS = {  # and how often each is chosen
    soak_chat: 20,
    soak_stream: 20,
    soak_slow_reader: 3,
    soak_dying: 2,
    soak_hang_up: 10,
    soak_half_request: 3,
    soak_upload: 4,
    soak_form: 4,
    soak_embeddings: 10,
    soak_websocket: 4,
    soak_listing: 10,
}


# ----------------------------------------------------------------------------------
# Chaos


class SoakChaos:
    """Whatever a careless world does to llmswap and its servers."""

    def __init__(self, server, tally, seed):
        self.server = server
        self.tally = tally
        self.random = random.Random(seed)

    def run(self, seconds):
        """Do something random again and again, and look at the invariants."""
        start = time.monotonic()
        while (past := (time.monotonic() - start) / seconds) < 1:
            soak_require(self.server.process.poll() is None, "llmswap ended")
            if past > 0.1:
                half = "early" if past < 0.55 else "late"
                self.tally.peak(half, soak_size(self.server.pid))
            self._disturb(SOAK_CHAOS if past > 0.1 else {**SOAK_CHAOS, **SOAK_ENDS})
            time.sleep(self.random.random() * 3)

    def _disturb(self, chaos):
        """Do one thing, and look at the invariants."""
        actions, weights = list(chaos), list(chaos.values())
        action = self.random.choices(actions, weights)[0]
        self.tally.chaos[action] += 1
        try:
            action(self)
            self._look()
        except SoakViolation as violation:
            self.tally.violate(f"{action.__name__}: {violation}")
        except (OSError, BrokenAnswer, AssertionError, ValueError) as error:
            self.tally.violate(f"{action.__name__}: {type(error).__name__}: {error}")

    def _look(self):
        """Never more servers than allowed, no zombies that stay."""
        servers = self.fakes()
        if len(servers) > 2:  # the list was not read in one instant: look again
            staying = servers.items() & self.fakes().items()
            lines = {line for _, line in staying}  # a forked child has its parent's
            soak_require(len(lines) <= 2, f"too many servers at once: {servers}")
        if dead := set(zombies_of(self.server.pid)):
            time.sleep(1)
            dead &= set(zombies_of(self.server.pid))
            soak_require(not dead, f"zombies: {dead}")

    def fakes(self):
        """{pid: command line} of the model servers."""
        processes = family(self.server.token)
        return {pid: line for pid, line in processes.items() if "fake.pyc" in line}

    def kill_server(self):
        if servers := sorted(self.fakes()):
            soak_kill(self.random.choice(servers))

    def kill_helper(self):
        """Kill one of llmswap's own helpers, such as its guard."""
        helpers = set(family(self.server.token)) - {self.server.pid} - set(self.fakes())
        if helpers:
            soak_kill(self.random.choice(sorted(helpers)))

    def restart(self):
        """SIGTERM or SIGINT, one or two, and a new start."""
        self._begin_anew(self._end_gently)

    def crash(self):
        """SIGKILL, and a new start."""
        self._begin_anew(self.server.kill)

    def _begin_anew(self, end):
        self.tally.restarts += 1
        end()
        eventually(lambda: not family(self.server.token), 2)
        self.server.start()
        self.tally.restarts += 1

    def _end_gently(self):
        for _ in range(self.random.choice([1, 1, 2])):
            number = self.random.choice([signal.SIGTERM, signal.SIGINT])
            self.server.process.send_signal(number)
            time.sleep(self.random.random())
        status = self.server.process.wait(45)
        soak_require(status == 0, f"a signal to end: exit status {status}")

    def unload_all(self):
        answer = self.server.get("/unload")
        soak_require(answer.status == 200, f"/unload: {answer}")

    def load_one(self):
        self._command("/models/load")

    def unload_one(self):
        self._command("/models/unload")

    def _command(self, path):
        """Load or unload by hand; what cannot be done is refused in OpenAI's shape."""
        model = self.random.choice(list(SOAK_MODELS))
        answer = self.server.ask("POST", path, {"model": model}, (), SOAK_BOUND)
        if answer.status != 200:
            message = answer.message()
            self.tally.refuse(answer.status, f"{path}: {message}")
            soak_require(answer.status in (400, 502, 503, 504), f"{path}: {answer}")

    def reload(self):
        """Rewrite the file: models changed, added and removed."""
        models = dict(SOAK_MODELS)
        models["failing"] += self.random.choice(SOAK_EDITS[1:])
        models[self.random.choice(list(models)[:5])] += self.random.choice(SOAK_EDITS)
        if self.random.random() < 0.5:
            models["extra"] = SOAK_EXTRA
        self._reload(models)

    def _reload(self, models):
        """Have the file read again, and wait until it has been."""
        self.server.reload(soak_ini(models))
        eventually(lambda: set(self.server.states()) == set(models), 10)

    def reload_broken(self):
        """Rewrite the file with an error in it: nothing may change."""
        before = set(self.server.states())
        self.server.reload(self.random.choice(SOAK_BROKEN))
        time.sleep(0.3)
        after = set(self.server.states())
        soak_require(before == after, f"a broken file changed {before} to {after}")
        self._reload(SOAK_MODELS)


SOAK_CHAOS = {  # and how often each is chosen
    SoakChaos.kill_server: 6,
    SoakChaos.kill_helper: 1,
    SoakChaos.unload_all: 1,
    SoakChaos.load_one: 3,
    SoakChaos.unload_one: 3,
    SoakChaos.reload: 3,
    SoakChaos.reload_broken: 1,
}
SOAK_ENDS = {SoakChaos.restart: 2, SoakChaos.crash: 2}
SOAK_GROWTH = {"threads": 16, "descriptors": 32, "resident": 10}  # of a peak; MB


def soak_kill(pid):
    """SIGKILL, if it still lives."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ----------------------------------------------------------------------------------
# The command


def soak_main(argv):
    """Soak, print one table, and return the exit status."""
    if "--help" in argv:
        print(SOAK_USAGE)
        return 0
    minutes = float(word_after(argv, "--minutes", 10))
    seed = int(word_after(argv, "--seed", random.randrange(10**6)))
    clients = int(word_after(argv, "--clients", 12))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: int(word_after(argv, "--cores", len(cores)))])
    print(f"{minutes:g} minutes, {clients} clients, seed {seed}", flush=True)
    tally, soak = SoakTally(), SoakRun(minutes * 60, clients, seed)
    try:
        soak.run(tally)
    except (AssertionError, SoakViolation) as error:  # the end was not clean
        tally.violate(str(error)[-3000:])
    soak_print(tally, soak.sizes)
    return 1 if tally.violations else 0


class SoakRun:
    """One soak, from a fresh llmswap to its end."""

    def __init__(self, seconds, clients, seed):
        self._seconds = seconds
        self._clients = clients
        self._seed = seed
        self.sizes = {}  # {moment: threads, descriptors, resident MB}

    def run(self, tally):
        """Start, soak, become quiet, end; violations go to `tally`."""
        with Llmswap(soak_ini(SOAK_MODELS)) as server:
            try:
                self._soak(server, tally)
                self._quieten(server, tally)
            finally:
                shutil.copy(server.folder / "stderr", SOAK_LOG)

    def _soak(self, server, tally):
        self._visit_all(server)
        self.sizes["before"] = soak_size(server.pid)
        stop = threading.Event()
        seeds = (self._seed * 1000 + number for number in range(self._clients))
        clients = [SoakClient(server, tally, seed, stop) for seed in seeds]
        threads = [threading.Thread(target=each.run, daemon=True) for each in clients]
        for thread in threads:
            thread.start()
        SoakChaos(server, tally, self._seed).run(self._seconds)
        stop.set()
        self._join(threads, tally)

    def _visit_all(self, server):
        """Use each model and many connections once, which fills all caches."""
        for model in SOAK_MODELS:
            server.chat(model)
        crowd = [server.connect() for _ in range(48)]
        for client in crowd:
            client.send("POST", "/echo", {"model": "closing", "filler": "x" * 10**6})
        for client in crowd:
            assert client.answer().status == 200
            client.hang_up()
        self._unload(server)

    def _join(self, threads, tally):
        deadline = time.monotonic() + SOAK_BOUND + 10
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if stuck := sum(thread.is_alive() for thread in threads):
            tally.violate(f"{stuck} clients still wait")

    def _unload(self, server):
        """Unload everything; only llmswap and its guard may be left."""
        server.get("/unload")
        eventually(lambda: not server.get("/running").json()["running"], 15)
        chaos = SoakChaos(server, None, 0)
        eventually(lambda: not chaos.fakes(), 15)

    def _quieten(self, server, tally):
        """When nobody asks, everything is given back."""
        for model in server.loaded():  # no server generates for clients that left
            eventually(lambda: server.stats(model)["in_flight"] == 0, 5)
        server.reload(soak_ini(SOAK_MODELS))
        self._unload(server)
        for model in ("quick", "stubborn"):
            assert server.chat(model).status == 200, "it no longer serves"
        self._unload(server)
        tally.chaos["loads in all"] = len(server.journal("main"))
        early, late = tally.peaks["early"], tally.peaks["late"]
        most = {name: size + 4 for name, size in self.sizes["before"].items()}
        most["resident"] = max(most["resident"] + 16, early["resident"])
        gc.collect()  # connections that tracebacks still hold
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self._grown(server, most), 30, every=0.5)
        self.sizes["after"] = soak_size(server.pid)
        for grown in self._grown(server, most):
            held = soak_connections(server.pid) if "descriptors" in grown else {}
            tally.violate(f"not given back: {grown} {held}")
        for name, slack in SOAK_GROWTH.items():
            if late[name] > early[name] + slack:
                tally.violate(f"{name} grow: {early[name]}, then {late[name]} at most")
        for action in {action for action, _ in tally.outcomes} - SOAK_UNCOMPLETED:
            if not tally.outcomes[action, "complete"]:
                tally.violate(f"{action} was never complete")

    def _grown(self, server, most):
        """The sizes that are above `most`, as texts."""
        now = soak_size(server.pid)
        return [
            f"{name}: {now[name]}, not {most[name]}"
            for name in most
            if now[name] > most[name]
        ]


def soak_connections(pid):
    """{name: local address, remote address and state, as the kernel writes them} of
    a process's TCP connections."""
    names = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(os.readlink(path))
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file]
    sockets = {f"socket:[{row[9]}]": " ".join(row[1:4]) for row in rows}
    return {name: sockets[name] for name in sockets if name in names}


def soak_print(tally, sizes):
    """The table, and the evidence."""
    outcomes = ["complete", "refused", "broken", "hung up", "violation"]
    titles = "".join(f"{name:>11}" for name in [*outcomes, "slowest"])
    print(f"{'action':<16}{titles}")
    for action in sorted(tally.slowest):
        counts = [tally.outcomes[action, outcome] for outcome in outcomes]
        cells = "".join(f"{count:>11,}" for count in counts)
        seconds, moment = tally.slowest[action]
        print(f"{action:<16}{cells}{seconds:>10.2f}s  {moment}")
    print("\nrefusals")
    for (status, message), count in tally.refusals.most_common():
        print(f"{count:>8,}  {status} {message}")
    chaos = {getattr(k, "__name__", k): count for k, count in tally.chaos.items()}
    moments = {
        "chaos": chaos,
        "before": sizes.get("before", {}),
        "first half, at most": tally.peaks["early"],
        "second half, at most": tally.peaks["late"],
        "after": sizes.get("after", {}),
    }
    print()
    for moment, values in moments.items():
        text = ", ".join(f"{name} {value:,}" for name, value in values.items())
        print(f"{moment:<22}{text}")
    print(f"\nviolations: {len(tally.violations)}  (llmswap's log: {SOAK_LOG})")
    for evidence in tally.violations[:20]:
        print(f"  {evidence}")
