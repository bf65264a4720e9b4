"""The fuzz: mutated requests and answers, read by llmswap and by h11.

`python3 test_llmswap.py fuzz --help` tells more.
"""

import contextlib
import itertools
import math
import random
import re
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import h11
import llmswap

from test_llmswap import (
    BrokenAnswer,
    Client,
    Llmswap,
    reader_of,
    recorder,
    word_after,
)


FUZZ_USAGE = """\
python3 test_llmswap.py fuzz [--parser N] [--wire N] [--seed S]

N mutated requests and as many mutated answers (1,000,000 each) go through the reader of
HTTP in this process, and N connections (10,000) with such requests, cut anywhere, half
closed, left or reset, through a real llmswap. h11 reads all of them too: llmswap takes
a subset of what h11 takes and reads it alike, forwards nothing else, and answers in
whole. Exit status 1 if not, with the evidence.
"""

FUZZ_LIMIT = 50000  # bytes of a body
FUZZ_FRAMING = "(?i)content-length|transfer-encoding"


class FuzzViolation(Exception):
    """llmswap did not read what h11 reads, or forwarded what nobody asked for."""


class FuzzUnsure(Exception):
    """h11 refuses an empty line before an answer, or a trailer that looks like framing,
    which llmswap drops."""


def fuzz_require(condition, *evidence):
    """Raise the evidence unless the condition holds."""
    if not condition:
        raise FuzzViolation("\n    ".join(repr(each)[:1500] for each in evidence))


# ----------------------------------------------------------------------------------
# The second reader


def h11_read(connection, data):
    """Read one message: the request or final answer, its payload, what is behind it."""
    connection.receive_data(data)
    start, payload, is_ended = None, b"", False
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            reason = "no response line received" if not start else FUZZ_FRAMING
            if re.search(reason, str(error)):
                raise FuzzUnsure from error
            raise
        if event is h11.NEED_DATA and not is_ended:
            is_ended = True
            connection.receive_data(b"")
        elif isinstance(event, (h11.Request, h11.Response)):
            start = event
        elif isinstance(event, h11.Data):
            payload += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return start, payload, connection.trailing_data[0]
        elif not isinstance(event, h11.InformationalResponse):
            raise h11.RemoteProtocolError(f"{event} instead of a message")


def h11_request(data):
    """Read one request, and what is behind it."""
    line, mark, rest = re.sub(rb"\A(\r\n)+", b"", data).partition(b"\r\n")
    data = bytes(min(byte, 126) for byte in line) + mark + rest  # targets beyond ASCII
    start, payload, rest = h11_read(h11.Connection(h11.SERVER, 1 << 20), data)
    request = start.method.decode(), start.target.decode(), fuzz_told(start), payload
    return request, rest


def h11_answer(data, method):
    """Read the answer to such a request; whether the connection can serve another."""
    connection = h11.Connection(h11.CLIENT, 1 << 20)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    start, payload, rest = h11_read(connection, data)
    may_go_on = connection.their_state is h11.DONE and not rest
    return (start.status_code, fuzz_told(start), payload), may_go_on


def fuzz_told(message):
    """Its headers without those that only say how its body is framed."""
    framing = ("content-length", "transfer-encoding")
    pairs = [(fuzz_text(name), fuzz_text(value)) for name, value in message.headers]
    return [pair for pair in pairs if pair[0] not in framing]


def fuzz_text(raw):
    """A text of these bytes."""
    return raw if isinstance(raw, str) else bytes(raw).decode("latin-1")


# ----------------------------------------------------------------------------------
# What is sent: sound messages, then changed


FUZZ_BYTES = [
    bytes([each])
    for each in b"\r\n\0 \t:;,\x0b\x0c\x1b\x7f\x80\xa0\xff%/\\+-0fFgGx\"'{}*?#@"
]
FUZZ_LINES = [
    b"Content-Length: 5", b"Content-Length: 0", b"content-length: 5, 5",
    b"Content-Length: +5", b"Content-Length: -1", b"Content-Length: 0x5",
    b"Content-Length:", b"Content-Length: 5 5", b"Content-Length: 99999999999999999999",
    b"Content-Length: 00000000000000005", b"Content-Length: \xb2",
    b"Content-Length : 5", b" Content-Length: 5", b"Content_Length: 5",
    b"Content-Length: 5\t", b"Content-Length: 60000", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: Chunked", b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked;q=1",
    b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding:",
    b"Transfer-Encoding : chunked", b"Transfer-Encoding: chunked\x00",
    b"Transfer-Encoding\r\n: chunked", b"X: a\r\n\tTransfer-Encoding: chunked",
    b"Host: x", b"Host: localhost", b"Host:", b"Host: localhost:1", b"Host: [::1]",
    b"Host: [::1", b"Host: evil.example", b"Host: a b", b"Host: \xe4",
    b"HOST: localhost", b"Connection: close", b"Connection: keep-alive",
    b"Connection: Close, X-A", b"Connection: upgrade",
    b"Connection: host, content-length, transfer-encoding", b"Upgrade: websocket",
    b"Upgrade: h2c", b"Expect: 100-continue", b"Expect: x", b"TE: trailers",
    b"Trailer: X", b"Keep-Alive: 5", b"Origin: null", b"Origin: http://localhost:1",
    b"Origin: http://[", b"Referer: http://[", b"Referer: http://\xe2\x84\x80/",
    b"Referer: x", b"Sec-Fetch-Site: cross-site", b"Authorization: Basic =",
    b"Authorization: Basic \xff", b"Authorization: Bearer", b"x-api-key: \xff",
    b"Content-Type: multipart/form-data",
    b"Content-Type: multipart/form-data; boundary=x",
    b"Content-Type: application/x-www-form-urlencoded", b"Content-Encoding: gzip", b"X",
    b": x", b"X : y", b"X: \x00", b"X: a\rb", b"X: a\nb", b"X: a\x1b[31m", b"\xe4: b",
    b"X: \xe4\x80", b"", b" ", b"\t", b" folded", b"\tfolded: x", b"GET / HTTP/1.1",
    b"X:" + b" " * 300 + b"y" + b" " * 300, b"X: " + b"y" * 65300,
    b"X: " + b"y" * 66000, b"X: y" + b"\r\nX: y" * 100,
]
FUZZ_TARGETS = [
    b"/", b"*", b"x", b"", b"//x/y", b"/../..", b"/%2e%2e/%00", b"/%", b"/%zz%f",
    b"/\xe4\x80", b"/?model=%ff", b"/?model=\xff&autoload=1", b"/?%6dodel=x",
    b"http://localhost/a?b", b"HTTP://LOCALHOST", b"http://x/", b"http://localhost@x/",
    b"http://localhost:80/", b"https://localhost?x", b"http:///x", b"http://",
    b"ftp://localhost/", b"localhost:80", b"/#x", b"/a b", b"/\x00", b"/\x7f",
    b"/upstream/", b"/upstream//", b"/upstream/%2e%2e/x", b"/upstream/..",
    b"/logs/stream/%00", b"/v1/models/%0d%0aX:%20y", b"/health", b"/v1/models?reload=",
    b"/running", b"/props?model=", b"/metrics", b"/unload/",
    b"/upstream/" + b"a/" * 2000,
]
FUZZ_SIZES = [
    b"0", b"00", b"5", b"A", b"+5", b"-5", b"0x5", b"5;x=y", b"5 ;x", b"5;\x00",
    b"5;a\r", b" 5", b"5 ", b"5\t", b"", b";x", b"g", b"5_0", b"fffffffffffffff",
    b"ffffffffffffffff", b"7fffffff", b"5;" + b"x" * 5000, b"0;x", b"5\n", b"\xb2",
]
FUZZ_ENDS = [
    b"\n", b"\r", b"\n\r", b"\r\r\n", b"", b"\r\n\r\n", b"\r\n ", b"\r\n\t", b"\0\r\n",
    b"\r\n\0", b"\x85", b" \r\n",
]
FUZZ_WORDS = [
    b"get", b"G(T", b"CONNECT", b"TRACE", b"", b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.2",
    b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b"HTTP/01.1", b"HTTP/1",
    b"200", b"99", b"600", b"204", b"304", b"100", b"103", b"2000", b"20", b"-20",
    b"200\tOK", b"\xb2\xb2\xb2", b"O\0K", b"\x1b[31m", b"\xe4", *FUZZ_TARGETS,
]
FUZZ_FORM = (
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--x--\r\n'
)


class FuzzDice(random.Random):
    """A source of sound messages and of changes to them."""

    def request(self, model="m"):
        """A sound request to a model, or for llmswap itself."""
        method = self.choice(b"GET POST POST POST PUT DELETE HEAD OPTIONS X-Y".split())
        name = model.encode()
        under = b"/upstream/" + name
        targets = [b"/v1/x?model=" + name, under + b"/a%20b?c=d", under + b"//"]
        target = self.choice([*targets, b"/health"])
        if self.random() < 0.1:
            target = self.choice([b"/", b"//x/y", b"/\xe4\x80", *FUZZ_TARGETS[-8:]])
        version = b"HTTP/1.0" if self.random() < 0.1 else b"HTTP/1.1"
        lines = [b"%s %s %s" % (method, target, version), b"Host: localhost"]
        more = b"Accept: */*,X-A: b,x-c:\td ,User-Agent: curl/8,Connection: keep-alive"
        lines += self.choices(more.split(b","), k=self.randrange(3))
        is_bare = method in (b"GET", b"HEAD", b"OPTIONS") and self.random() < 0.8
        body = b"" if is_bare else self._body(name)
        return self._framed(lines, body, version == b"HTTP/1.1")

    def _body(self, name):
        return self.choice([
            b'{"model":"%s"}' % name,
            b'{ "messages": [{"a":"\\u00e4"}], "model" : "%s", "stream":false}' % name,
            b'{"model":"%s","model":1,"y":"%s"}' % (name, b"y" * self.randrange(3000)),
            b"model=%s&x=y" % name,
            FUZZ_FORM % name,
            b"\0\r\n\r\nGET /unload HTTP/1.1\r\n\r\n",
            b"",
        ])

    def _framed(self, lines, body, may_be_chunked):
        if body and may_be_chunked and self.random() < 0.5:
            lines.append(b"Transfer-Encoding: chunked")
            body = self._chunked(body)
        elif body or self.random() < 0.2:
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    def _chunked(self, body):
        data = b""
        while body:
            size = self.randrange(1, 2 + len(body))
            more = self.choice([b"", b"", b"", b";a=b", b'; a="b"'])
            data += b"%x%s\r\n%s\r\n" % (len(body[:size]), more, body[:size])
            body = body[size:]
        return data + b"0\r\n" + self.choice([b"", b"", b"X: y\r\n"]) + b"\r\n"

    def answer(self):
        """A sound answer of a backend."""
        status = self.choice([b"200 OK", b"200", b"404 Not Found", b"204 No", b"503 X"])
        version = b"HTTP/1.0" if self.random() < 0.1 else b"HTTP/1.1"
        kind = self.choice([b"application/json", b"text/event-stream", b"text/plain"])
        lines = [version + b" " + status, b"Content-Type: " + kind]
        events, text = b"data: x\n\n" * self.randrange(4), b"x" * self.randrange(5000)
        body = b"" if status[:3] == b"204" else self.choice([b"{}", events, text])
        hints = b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" * self.choice([0, 0, 0, 1, 2])
        return hints + self._framed(lines, body, True)

    def cut(self, data):
        """The data in pieces as they might arrive."""
        count = self.choice([0, 0, 0, 1, 2, 4])
        places = sorted(self.randrange(len(data) + 1) for _ in range(count))
        return [data[a:b] for a, b in zip([0, *places], [*places, len(data)]) if a < b]

    def changed(self, data):
        """The data after up to four changes, mostly one."""
        for _ in range(self.choice([0, 1, 1, 1, 1, 2, 2, 3, 4])):
            data = self._change(data)
        return re.sub(rb"[ \t]+;", b";", data)  # h11 knows no blank before an extension

    def _change(self, data):
        at, size = self.randrange(len(data) + 1), self.randrange(1, 9)
        kind = self.choice("byte byte lost line line line end end word size size "
                           "trailer splice truncate".split())
        if kind == "byte":
            return data[:at] + self.choice(FUZZ_BYTES) + data[at + size % 2 :]
        if kind == "lost":
            return data[:at] + data[at + size :]
        if kind == "truncate":
            return data[:at]
        if kind == "splice":
            other = self.answer() if data[:5] == b"HTTP/" else self.request()
            return data[:at] + other[self.randrange(len(other)) :]
        if kind == "line":
            line = b"\r\n" + self.choice(FUZZ_LINES)
            return self._replaced(data, rb"\r\n[^\r\n]*|\r\n", line * (size % 3))
        if kind == "end":
            return self._replaced(data, rb"\r\n", self.choice(FUZZ_ENDS))
        if kind == "word":
            word = self.choice(FUZZ_WORDS)
            return self._replaced(data, rb"\A[^ ]+|(?<= )[^ \r]+", word)
        if kind == "size":
            return self._replaced(data, rb"(?<=\r\n)[0-9a-f]+", self.choice(FUZZ_SIZES))
        line = b"0\r\n" + self.choice(FUZZ_LINES) + b"\r\n"
        return self._replaced(data, rb"0\r\n", line)

    def _replaced(self, data, pattern, new):
        """One of the places that match, exchanged."""
        places = [match.span() for match in re.finditer(pattern, data)]
        start, end = self.choice(places or [(0, 0)])
        return data[:start] + new + data[end:] if places else data


# ----------------------------------------------------------------------------------
# The reader of HTTP, in this process


def fuzz_read(pieces):
    """The requests that llmswap reads, and the error for the next one or None; its
    `method` is that of a request of which only the body is refused."""
    reader, served = reader_of(*pieces), []
    method = "GET"
    try:
        while raw := reader.head():
            request = llmswap.Request(raw)
            method = request.method
            served.append(fuzz_read_one(reader, request))
            method = "GET"
            if not request.is_persistent:
                break
    except (llmswap.APIError, llmswap.ClientDisconnected) as error:
        error.method = method
        return served, error
    return served, None


def fuzz_read_one(reader, request):
    """Method, target, headers and body, after all that Handler looks at."""
    body = llmswap.Body(reader, request, FUZZ_LIMIT)
    request.parameter("model"), llmswap.percent_decoded(request.path)
    llmswap._host_name(request.get("host"))
    handler = object.__new__(llmswap.Handler)
    handler.head = request
    assert all(isinstance(key, bytes) for key in handler._given_keys())
    body.find_model(request.get("content-type"), is_needed=False)
    if body.members and body.is_complete:
        llmswap.edited_json(body.members, ["y"], {"z": 1}, {"model": "other", "x": {}})
    data = bytes(body.held) + b"".join(body.rest())
    return request.method, request.target, request.headers, data


def fuzz_compare(data, served):
    """Require that h11 reads these requests alike."""
    rest = data
    for method, target, headers, body in served:
        try:
            message, rest = h11_request(rest)
        except h11.RemoteProtocolError as error:
            fuzz_require(False, "h11 refuses", error, rest, data)
        ascii_target = "".join(min(char, "~") for char in target)
        is_alike = message[1] == ascii_target
        read = method, message[1] if is_alike else target, headers, body
        fuzz_require(message == read, "read otherwise", message, read, data)


def fuzz_parse_request(dice):
    """Have both read the same mutated requests."""
    sound = [dice.request() for _ in range(dice.choice([1, 1, 1, 2, 3]))]
    changed = [dice.changed(each) for each in sound]
    data = b"".join(changed)
    served, problem = fuzz_read(dice.cut(data))
    fuzz_compare(data, served)
    fuzz_require(changed != sound or not problem, "refused", data, problem)
    return "refused" if problem else "read"


def fuzz_parse_answer(dice):
    """Have both read the same mutated answer."""
    method = dice.choice(["GET", "GET", "POST", "HEAD"])
    sound = dice.answer()
    data = dice.changed(sound)
    reader = reader_of(*dice.cut(data))
    try:
        answer = llmswap.UpstreamResponse(reader, method)
        payload = b"".join(answer.pieces())
    except llmswap.BackendDied as problem:
        fuzz_require(data != sound, "refused", method, data, problem)
        return "refused"
    if answer.status == 101:
        return "upgraded"
    read = answer.status, answer.headers, payload
    try:
        message, may_go_on = h11_answer(data, method)
    except h11.RemoteProtocolError as error:
        fuzz_require(False, "h11 refuses", method, error, data)
    fuzz_require(message == read, "read otherwise", method, message, read, data)
    is_all = may_go_on or answer.is_http_10 or reader.sock.unread  # h11 ends all 1.0
    fuzz_require(is_all or not answer.is_reusable, "serves another", method, data)
    return "read"


def fuzz_parser(count, seed):
    """So many requests and answers; what became of them, and the violations."""
    tally, violations = Counter(), []
    for number in range(count):
        dice = FuzzDice(seed * 10**9 + number)
        for act in (fuzz_parse_request, fuzz_parse_answer):
            kind = act.__name__[11:]
            try:
                tally[kind, act(dice)] += 1
            except FuzzUnsure:
                tally[kind, "refused by h11"] += 1
            except Exception as error:
                violations.append(f"{kind} {number}: {error!r}")
    return tally, violations


# ----------------------------------------------------------------------------------
# Over the wire


class FuzzClient:
    """Makes connections with mutated requests, one after the other."""

    def __init__(self, server, backend, model, seed):
        self.server, self.backend, self.model = server, backend, model
        self.seed = seed
        self.owed = Counter()  # digests of the requests that the backend may see
        self.tally, self.violations = Counter(), []

    def run(self, count):
        for number in range(count):
            dice = FuzzDice(f"{self.seed} {self.model} {number}")
            try:
                self.tally[self._try_requests(dice)] += 1
                self._look_at_backend()
            except FuzzUnsure:
                self.tally["refused by h11"] += 1
            except (FuzzViolation, OSError, BrokenAnswer) as error:
                self.violations.append(f"{self.model} {number}: {error!r}")

    def _look_at_backend(self):
        for request in self.backend.take_requests():
            is_request = isinstance(request, recorder.ForwardedRequest)
            fuzz_require(is_request, "forwarded", request)
            digest = recorder.request_digest(*request.start[:2], request.body)
            fuzz_require(self.owed[digest] > 0, "nobody asked for this", request)
            self.owed[digest] -= 1
            names = [name for name, _ in request.headers]
            own = {"transfer-encoding", "connection", "upgrade"}
            fuzz_require(names.count("host") == 1, request)
            fuzz_require(not (llmswap.HOP_BY_HOP - own) & set(names), request)

    def _try_requests(self, dice):
        """Some requests on one connection; what llmswap answers."""
        sound = [dice.request(self.model) for _ in range(dice.choice([1, 1, 2, 3]))]
        data = b"".join(dice.changed(each) for each in sound)
        served, problem = fuzz_read([data])
        fuzz_compare(data, served)
        prefix = f"/upstream/{self.model}"
        digests = []
        for method, target, _, body in served:
            own = target[len(prefix) :] if target.startswith(f"{prefix}/") else target
            digests.append(recorder.request_digest(method, own, body))
        self.owed.update(digests)
        end = dice.choice(["half closed", "half closed", "left", "reset"])
        with Client(self.server.port, 20) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in dice.cut(data):
                    client.sock.sendall(piece)
            if end != "half closed":
                client.hang_up(end == "reset")
                return end
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
            methods = [each[0] for each in served] + [getattr(problem, "method", "GET")]
            answers = list(self._answers(client, methods))
        self._check(answers, digests, problem, data)
        return "refused" if problem else "served"

    def _answers(self, client, methods):
        """Yield what comes, whole answers only, until the connection ends."""
        for method in itertools.chain(methods, itertools.repeat("GET")):
            with contextlib.suppress(ConnectionError):
                client.buffer = client.buffer or client.sock.recv(65536)
            if not client.buffer or client.buffer.endswith(b" Continue\r\n\r\n"):
                return  # after a 100 Continue we sent no body
            client.method = method
            yield client.answer()

    def _check(self, answers, digests, problem, data):
        fuzz_require(len(answers) <= len(digests) + bool(problem), data, answers)
        for answer, digest in itertools.zip_longest(answers, digests):
            if answer is None:
                break
            fuzz_require(answer.status not in range(500, 505), data, answer)
            if digest is None:
                fuzz_require(400 <= answer.status < 500, data, problem, answer)
            elif answer.status == 200 and len(answer.body) == 64:
                fuzz_require(answer.body == digest, "another's answer", data, answer)


FUZZ_MODELS = ("alpha-one", "bravo-two", "charlie-three", "delta-four")


def fuzz_wire(count, seed):
    """So many connections; what became of them, and the violations."""
    backends = [recorder.RecordingBackend() for _ in FUZZ_MODELS]
    text = f"[llmswap]\nmax-body = {FUZZ_LIMIT}\nmodels-max = 0\n"
    for name, backend in zip(FUZZ_MODELS, backends):
        text += f"[{name}]\nproxy = http://127.0.0.1:{backend.port}\n"
    with Llmswap(text) as server, ThreadPoolExecutor() as pool:
        clients = [
            FuzzClient(server, backend, name, seed)
            for name, backend in zip(FUZZ_MODELS, backends)
        ]
        for client in clients:
            assert server.get(f"/upstream/{client.model}/").status == 200
            client.backend.take_requests()
        counts = [math.ceil(count / len(clients))] * len(clients)
        list(pool.map(FuzzClient.run, clients, counts))
        violations = sum((client.violations for client in clients), [])
        if re.search("Traceback|bug", server.log()):
            violations.append(server.log()[-3000:])
    for backend in backends:
        backend.close()
    return sum((client.tally for client in clients), Counter()), violations


# ----------------------------------------------------------------------------------
# The command


def fuzz_main(argv):
    """Fuzz, print what became of it with the evidence, and return the exit status."""
    if "--help" in argv:
        print(FUZZ_USAGE)
        return 0
    seed, status = int(word_after(argv, "--seed", random.randrange(10**6))), 0
    print(f"seed {seed}")
    parts = {
        "parser": (fuzz_parser, 10**6, ("answer", "read")),
        "wire": (fuzz_wire, 10**4, "served"),
    }
    for part, (fuzz, count, needed) in parts.items():
        tally, violations = fuzz(int(word_after(argv, f"--{part}", count)), seed)
        if not tally[needed]:
            violations.append(f"nothing was {needed}")
        for outcome, number in sorted(tally.items()):
            print(f"{part:8}{number:>10,}  {outcome}")
        print(f"{part:8}{len(violations):>10,}  violations")
        print(*violations[:10], sep="\n    ")
        status |= bool(violations)
    return status
