"""The fake model server: everything a backend can do, and every way it can misbehave.

`python3 .ci/fake.py --port N` is one; `--help` tells its flags. The tests start it
hundreds of times, so it imports no module that is written in Python: half of its start
would be json, signal, socket and threading.
"""

import _json
import _signal as signal
import _socket as socket
import _thread
import os
import select
import sys
import time

SimpleNamespace = type(sys.implementation)

FLAGS = {  # name: default, and what it does
    "host": ("127.0.0.1", "where to listen"),
    "port": (0, "where to listen"),
    "model": ("fake", "its name in answers"),
    "load": ("0", "seconds, or LOW-HIGH, until it is ready; all answers are 503"),
    "bind-late": (False, "nothing listens until it is ready"),
    "load-exit": (-1, "complain and exit with that status at the end of the load"),
    "load-signal": (0, "kill itself with that signal at the end of the load"),
    "load-hang": (False, "never become ready, and write nothing"),
    "load-until": ("", "load, and write lines, until that file exists"),
    "lines": (0, "so many lines of log during the load"),
    "ignore-term": (False, "ignore SIGTERM"),
    "stop-delay": (0.0, "seconds from SIGTERM to the end"),
    "stop-until": ("", "end after SIGTERM once that file exists"),
    "grandchild": (False, "spawn a process in its group that ignores SIGTERM"),
    "close-idle": (False, "close connections after each answer, without a word"),
    "no-health": (False, "404 on /health"),
    "list-delay": (0.0, "seconds until the answer to GET /v1/models"),
    "meta": ('{"n_ctx": 256}', "`meta` in that answer, as JSON"),
    "sleepable": (False, "POST /sleep, POST /wake_up, GET /is_sleeping, as vLLM"),
    "wake-fails": (False, "POST /wake_up is answered with 500"),
    "slot-save-path": ("", "save and restore slots there, and list them"),
    "slot-fault": ("", "what goes wrong with slots, as that file says: see below"),
    "print-env": (False, "write the environment to stdout"),
    "journal": ("", "append one JSON line to that file for each event of its life"),
}
USAGE = """\
The fake model server: python3 .ci/fake.py --port N [FLAG ...]

{}
Other options, such as those of llama-server, are ignored.
A request's JSON body says how it is answered:
  stream, stream_options.include_usage, model    as usual
  tokens N, interval S   how many tokens, and the pause between them
  slot N, talk NAME, prompt_tokens N    the size of a conversation's prompt in a slot
  until FILE             no more tokens once that file exists
  delay S                before the first byte; delay, interval FILE: until it exists
  size BYTES             of the content
  tag STRING             put into the content
  text STRING            the content itself
  arguments STRING       a tool call (a list: several), in fragments of `fragment`
  finish REASON          the finish reason
  status N               an error with that status; error TEXT: no more than that text
  die, cut PLACE         end the process, or the connection: before-byte, mid-event
                         (a whole chunk, half an event), boundary, mid-body
  reset                  with cut: RST instead of FIN
  stall K                silent for ever after K tokens
  hang, hang_health      never answer this request, nor any health check from now on
  until_close            no chunks: the end of the connection ends the stream

The file of slot-fault says ACTION KIND. ACTION: list, save, restore; KIND: hang, fail,
die, short (half a file), slow (half a second), useless.
SIGRTMIN + 1, 2: it exits with status 0, 1; 3: it closes its sockets; 4: rubbish on all.
"""

ORDERS = {1: "exit 0", 2: "exit 1", 3: "deaf", 4: "mad"}
RUBBISH = b"\0\xffrubbish\n\n" * 9
HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
BLOCK = memoryview(b"0123456789abcdef" * 65536)  # what /bytes sends: 1 MB
JSON_TYPE = "application/json; charset=utf-8"


def dumps(value):
    """The value as JSON."""
    text = _json.encode_basestring_ascii
    encode = _json.make_encoder(None, repr, text, None, ": ", ", ", False, False, True)
    return "".join(encode(value, 0)).encode()


def loads(text):
    """The value of this JSON; ValueError if it is none."""
    hooks = dict.fromkeys(("object_hook", "object_pairs_hook"))
    numbers = {"parse_int": int, "parse_float": float, "parse_constant": float}
    scan = _json.make_scanner(SimpleNamespace(strict=True, **hooks, **numbers))
    text = (text.decode() if isinstance(text, bytes) else text).strip()
    try:
        value, end = scan(text, 0)
        assert end == len(text)
        return value
    except (AssertionError, StopIteration, SystemError, ValueError):
        import json  # it can tell what is wrong

        return json.loads(text)


class HangUp(OSError):
    """The client went away before its answer was complete, or is to be cut off."""


def parse_flags(argv):
    """The flags in `argv`; what is not one of ours is ignored."""
    values = {name: default for name, (default, _) in FLAGS.items()}
    words = iter(argv)
    for word in words:
        name, _, value = word[2:].partition("=")
        if word.startswith("--") and name in FLAGS:
            kind = type(FLAGS[name][0])
            values[name] = True if kind is bool else kind(value or next(words))
    return SimpleNamespace(**{name.replace("-", "_"): values[name] for name in values})


def random_seconds(text):
    """Seconds in "0.5", or a random number of them in "0-2"."""
    low, _, high = text.partition("-")
    share = int.from_bytes(os.urandom(4), "big") / 2**32
    return float(low) + share * (float(high or low) - float(low))


def await_file(path, pause, action=lambda: None):
    """Wait until that file exists, if one is named."""
    while path and not os.path.exists(path):
        action()
        time.sleep(pause)


def rest(seconds):
    """Sleep in pieces: a signal that comes just before a sleep is noticed after it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))


def error_document(status, message):
    """An error as llama-server writes it."""
    return {"error": {"code": status, "message": message, "type": "server_error"}}


def pick(wish, name):
    """What the wish has of that name."""
    return {name: wish[name]} if name in wish else {}


class Request:
    """A client's connection: its requests, one by one, and the means to answer them."""

    def __init__(self, server, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server, self.sock, self.send = server, sock, sock.sendall
        self.file = open(sock.fileno(), "rb", closefd=False)
        self._poll = select.poll()
        self._poll.register(sock, HANG_UP)

    def serve(self):
        """Answer requests until the connection ends."""
        self.server.requests.add(self)
        try:
            while self._read_head() and self._answer():
                pass
        except (OSError, ValueError):
            pass  # a ValueError: the connection ended within a line
        finally:
            self.server.requests.discard(self)
            self.file.close()
            self.sock.close()

    def _read_head(self):
        """Whether another request has come."""
        start = self.file.readline().decode("latin-1")
        if not start:
            return False
        self.method, self.target, version = start.split()
        self.path, _, self.query = self.target.partition("?")
        self.headers, self.body = [], b""
        while line := self.file.readline().decode("latin-1").strip():
            name, value = line.split(":", 1)
            self.headers.append((name, value.strip()))
        self.fields = {name.lower(): value for name, value in self.headers}
        wish = self.fields.get("connection", "").lower()
        self.is_chunked = version == "HTTP/1.1"
        self.keep = wish != "close" if self.is_chunked else wish == "keep-alive"
        return True

    def read_body(self):
        """Take the body from the connection, however it is framed."""
        if self.fields.get("expect", "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.fields.get("transfer-encoding", "").lower() == "chunked":
            self.body = b"".join(self._chunks())
        elif length := int(self.fields.get("content-length", 0)):
            self.body = self.file.read(length)
            if len(self.body) < length:
                raise HangUp

    def _chunks(self):
        while size := int(self.file.readline().partition(b";")[0], 16):
            yield self.file.read(size)
            self.file.readline()
        while self.file.readline().strip():
            pass  # trailers

    def _answer(self):
        """Answer one request; whether the connection goes on."""
        server, flags = self.server, self.server.flags
        is_bare = flags.no_health and self.path == "/health"
        if server.order == "mad":
            self.send(RUBBISH)
            return False
        if not server.is_ready and not is_bare:
            self.read_body()
            self.reply(error_document(503, "Loading model"), 503)
        elif self.path in QUIET_ROUTES:
            self.read_body()
            QUIET_ROUTES[self.path](self)
        else:
            self._answer_counted()
        return self.keep and not flags.close_idle

    def _answer_counted(self):
        server = self.server
        server.count(requests=1, in_flight=1)
        server.note("request", path=self.path)
        try:
            if self.path != "/early":
                self.read_body()
            if server.is_asleep:
                return self.reply(error_document(503, "asleep"), 503)
            if self.path.startswith("/slots") and server.flags.slot_save_path:
                return answer_slots(self)
            ROUTES.get(self.path, answer_echo)(self)
        except (OSError, ValueError):
            server.count(cancelled=1)
            raise
        finally:
            server.count(in_flight=-1)

    def hold(self, seconds=None):
        """Wait (None: for ever; a text: until that file exists); HangUp as soon as the
        client hangs up."""
        while isinstance(seconds, str):
            if os.path.exists(seconds):
                return
            if self._poll.poll(10):
                raise HangUp
        if self._poll.poll(None if seconds is None else max(0.0, seconds) * 1000):
            raise HangUp

    def cut(self, is_reset):
        """End the connection here and now, with a FIN or a RST."""
        if is_reset:
            linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            self.sock.shutdown(socket.SHUT_RDWR)
        raise HangUp

    def parameter(self, name, default):
        """A number in the query."""
        pairs = (pair.partition("=") for pair in self.query.split("&"))
        return next((int(value) for key, _, value in pairs if key == name), default)

    def head(self, status, kind, *more):
        """An answer's head."""
        lines = [
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Otherwise'}",
            "Server: llama.cpp",
            "Access-Control-Allow-Origin: *",
            f"Content-Type: {kind}",
            *more,
            "Keep-Alive: timeout=5, max=100" if self.keep else "Connection: close",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def reply(self, document, status=200):
        """Answer with a JSON document, or bytes as they are."""
        body = document
        if not isinstance(body, bytes):
            body = dumps(document)
        head = self.head(status, JSON_TYPE, f"Content-Length: {len(body)}")
        self.send(head if self.method == "HEAD" else head + body)

    def start_stream(self, kind="text/event-stream"):
        """Send the head of an answer whose length is not known."""
        if self.is_chunked:
            self.send(self.head(200, kind, "Transfer-Encoding: chunked"))
        else:
            self.keep = False
            self.send(self.head(200, kind))

    def send_piece(self, data):
        """A piece of a stream that was started: one chunk."""
        self.send(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)

    def end_stream(self):
        """End an answer that was started, where the framing says so."""
        if self.is_chunked:
            self.send(b"0\r\n\r\n")


class Talk:
    """A chat, completion or message that was asked for, in the shape of OpenAI."""

    def __init__(self, request):
        self.request, self.wish = request, loads(request.body)
        self.name = request.server.flags.model
        self.id = f"{os.getpid()}-{_thread.get_ident()}"
        self.tokens = self.wish.get("tokens", 3)
        self.prompt, self.cached = request.server.process_prompt(self.wish)
        calls = self.wish.get("arguments", [])
        self.calls = [calls] if isinstance(calls, str) else calls
        self.finish = self.wish.get("finish", "tool_calls" if self.calls else "stop")
        self.is_chat = request.path != "/v1/completions"

    def pieces(self):
        """Yield the content, token by token, each made when it is asked for."""
        if "text" in self.wish or self.calls:
            yield from filter(None, [self.wish.get("text")])
            return
        width = self.wish.get("size", 0) // max(1, self.tokens)
        for number in range(self.tokens):
            if "until" in self.wish and os.path.exists(self.wish["until"]):
                return
            text = f" word{number}"
            if not number:
                text = f"{self.name} {os.getpid()} {self.wish.get('tag', '')}".rstrip()
            yield text.ljust(width, "x")

    def fragments(self):
        """Yield (number of the call, fragment of its arguments)."""
        step = self.wish.get("fragment", 5)
        for number, text in enumerate(self.calls):
            for start in range(0, len(text), step):
                yield number, text[start : start + step]

    def whole(self):
        """The answer as one document."""
        text = "".join(self.pieces())
        if not self.is_chat:
            return self.document({"text": text}, self.finish, **self.numbers())
        message = {"role": "assistant", "content": text or self.wish.get("text")}
        if self.calls:
            calls = enumerate(self.calls)
            message["tool_calls"] = [self._call(*each) for each in calls]
        return self.document({"message": message}, self.finish, **self.numbers())

    def _call(self, number, arguments):
        function = {"name": f"tool{number}", "arguments": arguments}
        return {"type": "function", "function": function, "id": f"call{number}"}

    def numbers(self):
        """The usage and the timings."""
        usage = {"completion_tokens": self.tokens, "prompt_tokens": self.prompt}
        usage["total_tokens"] = self.tokens + self.prompt
        usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        timings = {"cache_n": self.cached, "prompt_n": self.prompt - self.cached}
        timings.update(prompt_per_second=500.0, predicted_n=self.tokens)
        timings["predicted_per_second"] = 50.0
        return {"usage": usage, "timings": timings}

    def document(self, content, finish, kind="", **more):
        """A document with one choice, or with none."""
        choice = {"finish_reason": finish, "index": 0, **(content or {})}
        return {
            "choices": [choice] if content is not None else [],
            "created": int(time.time()),
            "model": self.wish.get("model", self.name),
            "system_fingerprint": "b0-fake",
            "object": f"chat.completion{kind}" if self.is_chat else "text_completion",
            "id": f"chatcmpl-{self.id}",
            **more,
        }

    def _event(self, content, finish=None, **more):
        if content is not None and self.is_chat:
            content = {"delta": content}
        document = self.document(content, finish, ".chunk", **more)
        return b"data: %b\n\n" % dumps(document)

    def events(self):
        """Yield (event, whether it is a token)."""
        if self.is_chat:
            yield self._event({"role": "assistant", "content": None}), False
        for piece in self.pieces():
            yield self._event({"content" if self.is_chat else "text": piece}), True
        opened = -1
        for number, fragment in self.fragments():
            if number > opened:
                opened = number
                call = {"index": number, **self._call(number, "")}
                yield self._event({"tool_calls": [call]}), False
            call = {"index": number, "function": {"arguments": fragment}}
            yield self._event({"tool_calls": [call]}), True
        numbers = self.numbers()
        if (self.wish.get("stream_options") or {}).get("include_usage"):
            yield self._event({}, self.finish), False
            yield self._event(None, **numbers), False
        else:
            yield self._event({}, self.finish, timings=numbers["timings"]), False
        yield b"data: [DONE]\n\n", False


class Message(Talk):
    """The same in the shape of Anthropic's /v1/messages."""

    def whole(self):
        text = "".join(self.pieces())
        content = [{"type": "text", "text": text}] if text else []
        for number, arguments in enumerate(self.calls):
            content.append(self._tool(number, parsed(arguments)))
        return self._message(content, self._reason(), self.tokens)

    def _reason(self):
        reasons = {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}
        return reasons.get(self.finish, self.finish)

    def _message(self, content, reason, tokens):
        return {
            "id": f"msg-{self.id}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.wish.get("model", self.name),
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": tokens},
        }

    def _tool(self, number, given):
        names = {"id": f"toolu{number}", "name": f"tool{number}"}
        return {"type": "tool_use", **names, "input": given}

    def _event(self, kind, **more):
        data = dumps({"type": kind, **more})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def events(self):
        start = self._event("message_start", message=self._message([], None, 0))
        yield start, False
        text = {"type": "text", "text": ""}
        yield from self._block(0, text, "text_delta", "text", self.pieces())
        for number in range(len(self.calls)):
            parts = [text for of, text in self.fragments() if of == number]
            kind, tool = "input_json_delta", self._tool(number, {})
            yield from self._block(number + 1, tool, kind, "partial_json", parts)
        delta = {"stop_reason": self._reason(), "stop_sequence": None}
        usage = {"output_tokens": self.tokens}
        yield self._event("message_delta", delta=delta, usage=usage), False
        yield self._event("message_stop"), False

    def _block(self, index, block, kind, name, pieces):
        start = self._event("content_block_start", index=index, content_block=block)
        yield start, False
        for piece in pieces:
            delta = {"type": kind, name: piece}
            yield self._event("content_block_delta", index=index, delta=delta), True
        yield self._event("content_block_stop", index=index), False


def parsed(arguments):
    """The JSON value, or the text itself if it is none."""
    try:
        return loads(arguments)
    except ValueError:
        return arguments


class Server:
    """The server: its life from the first instruction to the end, and its counts."""

    def __init__(self, flags):
        self.flags = flags
        self.lock = _thread.allocate_lock()
        self.counts = {"requests": 0, "in_flight": 0, "cancelled": 0, "health": 0}
        self.requests = set()
        self.is_ready = self.is_asleep = self.is_health_hung = False
        self.order = self.grandchild = self.listener = None
        self.slots = {0: None, 1: None}  # the conversation in each, and its tokens
        self.used_slots = set()

    def live(self):
        """Load, then serve until killed."""
        self.note("main")
        signal.signal(signal.SIGTERM, self._on_term)
        for order in ORDERS:
            signal.signal(signal.SIGRTMIN + order, self._on_order)
        if self.flags.grandchild:
            script = "trap '' TERM INT HUP; exec sleep 86399"
            words = ["sh", "-c", script]
            self.grandchild = os.posix_spawn("/bin/sh", words, os.environ)
            self.note("grandchild", grandchild=self.grandchild)
        for name in sorted(os.environ) if self.flags.print_env else ():
            self.say(f"env {name}={os.environ[name]}", 1)
        if not self.flags.bind_late:
            self._listen()
        self._load()
        if self.flags.bind_late:
            self._listen()
        self.is_ready = True
        self.note("ready")
        self.say("main: model loaded")
        while True:  # pause() would miss a signal that comes just before it
            time.sleep(0.2)

    def note(self, event, **more):
        """Append an event to the journal, with the monotonic time."""
        if self.flags.journal:
            now, name = time.monotonic(), self.flags.model
            line = {"event": event, "t": now, "pid": os.getpid(), "model": name, **more}
            with open(self.flags.journal, "ab", 0) as file:
                file.write(dumps(line) + b"\n")

    def say(self, text, descriptor=2):
        """Write a line of log; a closed pipe does not matter."""
        try:
            os.write(descriptor, text.encode() + b"\n")
        except OSError:
            pass

    def count(self, **changes):
        """Change these counts by so much."""
        with self.lock:
            for name, change in changes.items():
                self.counts[name] += change

    def process_prompt(self, wish):
        """The tokens of a request's prompt, and how many of them its slot had."""
        slot, talk = wish.get("slot", 0), wish.get("talk")
        prompt = wish.get("prompt_tokens", 7)
        before, had = self.slots[slot] or (None, 0)
        self.slots[slot] = talk, prompt
        self.used_slots.add(slot)
        is_same = talk is not None and before == talk
        return prompt, min(prompt, had) if is_same else 0

    def slot_entry(self, number):
        """What /slots says of a slot; one never used has no tokens to it."""
        entry = {"id": number, "n_ctx": 4096, "is_processing": False}
        if number in self.used_slots:
            entry["n_prompt_tokens"] = self.slots[number][1]
        return entry

    def slot_fault(self, action):
        """What shall go wrong with this now, if anything."""
        words = []
        if self.flags.slot_fault and os.path.exists(self.flags.slot_fault):
            with open(self.flags.slot_fault) as file:
                words = file.read().split()
        return words[1] if words[:1] == [action] else None

    def _on_term(self, number, frame):
        self.note("term")
        if not self.flags.ignore_term:  # this thread must be free for orders
            _thread.start_new_thread(self._end, ())

    def _end(self):
        time.sleep(self.flags.stop_delay)
        await_file(self.flags.stop_until, 0.02)
        self.note("end")
        os._exit(0)

    def _on_order(self, number, frame):
        order = self.order = ORDERS[number - signal.SIGRTMIN]
        if order == "exit 1":
            self.say("error: no reason is given")
        if order in ("exit 0", "exit 1"):
            os._exit(int(order[-1]))
        if order == "deaf" and self.listener:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        for request in list(self.requests):
            try:
                if order == "mad":
                    request.sock.send(RUBBISH)
                else:
                    request.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client has left

    def _listen(self):
        host, port = self.flags.host, self.flags.port
        self.listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind((host, port))
            self.listener.listen(1024)
        except OSError as error:
            self.say(f"couldn't bind HTTP server socket, port: {port} ({error})")
            self.note("end")
            os._exit(1)
        _thread.start_new_thread(self._accept, ())
        self.say(f"main: server is listening on http://{host}:{port}")

    def _accept(self):
        while True:
            try:
                fd, _ = self.listener._accept()
            except OSError:  # told to be deaf
                return
            request = Request(self, socket.socket(fileno=fd))
            _thread.start_new_thread(request.serve, ())

    def _load(self):
        seconds, lines = random_seconds(self.flags.load), self.flags.lines
        if self.flags.load_hang:
            time.sleep(1e6)
        line = "load_tensors: it takes its time"
        await_file(self.flags.load_until, 0.05, lambda: self.order or self.say(line))
        for number in range(lines):
            self.say(f"load_tensors: layer {number} of {lines}")
            rest(seconds / lines)
        if not lines:
            rest(seconds)
        if self.flags.load_signal:
            os.kill(os.getpid(), self.flags.load_signal)
        if self.flags.load_exit >= 0:
            self.say("llama_model_load: error loading model: unexpected end of file")
            self.say(f"main: exiting due to model loading error {self.flags.load_exit}")
            self.note("end")
            os._exit(self.flags.load_exit)


def answer_health(request):
    """Answer 200, unless a request wished otherwise."""
    request.server.count(health=1)
    if request.server.is_health_hung:
        request.hold()
    if request.server.flags.no_health:
        request.reply(error_document(404, "File Not Found"), 404)
    else:
        request.reply({"status": "ok"})


def answer_stats(request):
    """What this server has seen, and what it is."""
    server = request.server
    with open("/proc/self/oom_score_adj") as file:
        score = int(file.read())
    request.reply({
        **server.counts,
        "ports": list(map(peer_port, list(server.requests))),
        "pid": os.getpid(),
        "model": server.flags.model,
        "grandchild": server.grandchild,
        "is_asleep": server.is_asleep,
        "oom_score_adj": score,
        "environ": sorted(os.environ),
    })


def peer_port(request):
    """The port at the other end, None if it is gone."""
    try:
        return request.sock.getpeername()[1]
    except OSError:
        return None


def answer_models(request):
    """The list of its one model."""
    request.hold(request.server.flags.list_delay)
    model = {"id": request.server.flags.model, "object": "model", "aliases": []}
    meta = loads(request.server.flags.meta)
    model.update({"tags": ["x"], "meta": meta, "owned_by": "llamacpp"})
    request.reply({"object": "list", "data": [model]})


def answer_talk(request):
    """A chat, a completion or a message, as the request wishes."""
    kind = Message if request.path == "/v1/messages" else Talk
    talk, server = kind(request), request.server
    if talk.wish.get("hang"):
        server.is_health_hung |= bool(talk.wish.get("hang_health"))
        request.hold()
    request.hold(talk.wish.get("delay", 0))
    end_if_wished(talk, "before-byte")
    if status := talk.wish.get("status"):
        problem = error_document(status, "as asked")
        return request.reply({**problem, **pick(talk.wish, "error")}, status)
    server.note("answer")
    return (answer_stream if talk.wish.get("stream") else answer_whole)(talk)


def end_if_wished(talk, place):
    """End the process or the connection here if the request wishes it."""
    if talk.wish.get("die") == place:
        os._exit(9)
    if talk.wish.get("cut") == place:
        talk.request.cut(talk.wish.get("reset"))


def answer_whole(talk):
    """Answer at once, or with the first half of the body before an end."""
    request, wish = talk.request, talk.wish
    request.hold(wish.get("interval", 0) * talk.tokens)
    body = dumps(talk.whole())
    head = request.head(200, JSON_TYPE, f"Content-Length: {len(body)}")
    half = len(body) // 2
    if wish.get("die") or wish.get("cut"):
        request.send(head + body[:half])
        for place in ("mid-event", "mid-body", "boundary"):
            end_if_wished(talk, place)
    request.send(head + body)


def answer_stream(talk):
    """Answer event by event, one chunk each, ending where the request wishes."""
    request, wish = talk.request, talk.wish
    request.is_chunked &= not wish.get("until_close")
    request.start_stream()
    interval, due, sent = wish.get("interval", 0), time.monotonic(), 0
    for event, is_token in talk.events():
        if is_token:
            break_if_wished(talk, event, sent)
            sent += 1
        request.send_piece(event)
        if is_token and isinstance(interval, str):
            request.hold(interval)
        elif is_token and interval:
            due += interval
            request.hold(due - time.monotonic())
    request.end_stream()


def break_if_wished(talk, event, sent):
    """Stall, die or cut before token number `sent`, if the request wishes it."""
    request, half = talk.request, event[: len(event) // 2]
    if talk.wish.get("stall") == sent:
        request.hold()
    if sent != talk.tokens // 2:
        return
    end_if_wished(talk, "boundary")
    wishes = {talk.wish.get("die"), talk.wish.get("cut")}
    if "mid-event" in wishes:
        request.send_piece(half)
        end_if_wished(talk, "mid-event")
    if "mid-body" in wishes:
        request.send(b"%x\r\n%b" % (len(event), half))
        end_if_wished(talk, "mid-body")


def answer_embeddings(request):
    """A vector for each text: eight numbers, or in base64 their four bytes each."""
    import array
    import base64

    wish = loads(request.body)
    texts = wish.get("input", "")
    texts = [texts] if isinstance(texts, str) else texts
    vectors = [[len(text) / 8] * 8 for text in texts]
    if wish.get("encoding_format") == "base64":
        vectors = [array.array("f", vector) for vector in vectors]
        vectors = [base64.b64encode(vector).decode() for vector in vectors]
    request.reply({
        "object": "list",
        "model": wish.get("model", request.server.flags.model),
        "served_by": f"{request.server.flags.model} {os.getpid()}",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": len(texts), "total_tokens": len(texts)},
    })


def answer_transcription(request):
    """Say which form fields came, and how long each was."""
    mark = b"--" + request.fields["content-type"].partition("boundary=")[2].encode()
    fields = {}
    for part in request.body.split(mark)[1:-1]:
        head, _, value = part[2:-2].partition(b"\r\n\r\n")
        name = head.decode().partition('name="')[2].partition('"')[0]
        text = value.decode("latin-1")
        fields[name] = text if b"filename=" not in head else {"size": len(value)}
    text = f"{request.server.flags.model} {os.getpid()}: {len(request.body)} bytes"
    request.reply({"text": text, "fields": fields})


def answer_echo(request):
    """Tell what was asked, byte by byte."""
    import hashlib

    request.reply({
        "model": request.server.flags.model,
        "pid": os.getpid(),
        "method": request.method,
        "path": request.target,
        "headers": request.headers,
        "sha256": hashlib.sha256(request.body).hexdigest(),
        "length": len(request.body),
        "body": request.body[:2000].decode("latin-1"),
    })


def blocks(total, size):
    """Yield `total` bytes in views of `size`."""
    for start in range(0, total, size):
        yield BLOCK[: min(size, total - start)]


def answer_bytes(request):
    """`n` bytes: counted, in chunks of `size`, or until the connection ends."""
    total, kind = request.parameter("n", 1000), "application/octet-stream"
    if request.path == "/bytes":
        request.send(request.head(200, kind, f"Content-Length: {total}"))
        total = 0 if request.method == "HEAD" else total
        request.is_chunked = False
    else:
        request.is_chunked &= request.path == "/chunked"
        request.start_stream(kind)
    for block in blocks(total, request.parameter("size", 65536)):
        request.send_piece(block)
    request.end_stream()


def answer_websocket(request):
    """Accept the upgrade and send every byte back."""
    import base64
    import hashlib

    key = request.fields.get("sec-websocket-key", "").encode()
    token = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    fields = f"Sec-WebSocket-Accept: {base64.b64encode(token).decode()}"
    start = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    request.send(f"{start}Connection: Upgrade\r\n{fields}\r\n\r\n".encode())
    request.keep = False
    while data := request.file.read1(65536):
        request.send(data)


def answer_raw(request):
    """Send the request's body as it is, for an answer, and end the connection."""
    request.send(request.body)
    request.keep = False


def answer_early(request):
    """Refuse a body without reading it."""
    request.keep = False
    status = request.parameter("status", 413)
    request.reply(error_document(status, "refused before it was read"), status)


def answer_sleep(request):
    """Fall asleep or wake up, where it can, or say why not."""
    server, is_wake = request.server, request.path == "/wake_up"
    if is_wake and server.flags.wake_fails:
        return request.reply(error_document(500, "no memory left to wake up"), 500)
    server.is_asleep = server.flags.sleepable and not is_wake
    server.note("wake" if is_wake else "sleep")
    return request.reply(b"", 200 if server.flags.sleepable else 404)


def answer_is_sleeping(request):
    """Whether it sleeps."""
    request.reply({"is_sleeping": request.server.is_asleep})


def answer_slots(request):
    """List, save or restore slots, unless that goes wrong."""
    server, action = request.server, request.query.partition("action=")[2] or "list"
    fault, slots = server.slot_fault(action), server.slots
    server.note(action, path=request.path)
    if fault == "die":
        os.abort()
    if fault == "hang":
        request.hold()
    if fault == "slow":
        time.sleep(0.5)
    if fault == "fail":
        return request.reply(error_document(501, "slots are not supported"), 501)
    if action == "list":
        return request.reply([server.slot_entry(number) for number in slots])
    name = loads(request.body)["filename"]
    path = os.path.join(server.flags.slot_save_path, name)
    number = int(request.path.rpartition("/")[2])
    if action == "restore":
        with open(path) as file:
            slots[number] = None if fault == "useless" else loads(file.read())
        return request.reply({"n_restored": 1})
    talk, tokens = slots[number]
    text = dumps([talk, tokens]).decode().ljust(4 * tokens)
    with open(path, "w") as file:
        file.write(text[: len(text) // 2] if fault == "short" else text)
    request.reply({"id_slot": number, "n_saved": tokens, "n_written": len(text)})


QUIET_ROUTES = {  # neither counted as requests nor kept in the journal
    "/health": answer_health,
    "/stats": answer_stats,
    "/sleep": answer_sleep,
    "/wake_up": answer_sleep,
    "/is_sleeping": answer_is_sleeping,
}
ROUTES = {
    "/v1/models": answer_models,
    "/v1/chat/completions": answer_talk,
    "/v1/completions": answer_talk,
    "/v1/messages": answer_talk,
    "/v1/embeddings": answer_embeddings,
    "/v1/audio/transcriptions": answer_transcription,
    "/bytes": answer_bytes,
    "/chunked": answer_bytes,
    "/until-close": answer_bytes,
    "/ws": answer_websocket,
    "/raw": answer_raw,
    "/early": answer_early,
}


def main(argv):
    """Be a model server until killed."""
    if "--help" in argv:
        lines = (f"  --{name:<14}{text}\n" for name, (_, text) in FLAGS.items())
        return print(USAGE.format("".join(lines)))
    return Server(parse_flags(argv)).live()


if __name__ == "__main__":
    main(sys.argv[1:])
